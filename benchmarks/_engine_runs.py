"""Who is timed in `engine.py`: the library, torchdiffeq and diffrax, and how they take turns."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from time import process_time
from typing import Any

import torch
from _engine_cases import DTYPE, RotatedQuadratic, Subject
from torch import Tensor
from torchdiffeq import odeint, odeint_event

from ode_stopping import GradientRoute, StoppingResult, Torchdiffeq, stopping_time

RTOL = 1e-6
ATOL = 1e-4 * RTOL  # of states of size 1: the library's own choice, given to its peers as well


@dataclass(frozen=True)
class Sample:
    """One run: CPU seconds of both passes, and the derivatives of T."""

    forward: float
    backward: float
    gradients: list[Tensor]
    result: StoppingResult | None = None

    @property
    def total(self) -> float:
        """CPU seconds of value and gradient."""
        return self.forward + self.backward


Run = Callable[[], Sample]


def solve(subject: Subject, route: GradientRoute | None = None) -> StoppingResult:
    """The library's stopping time, judged by its by-products; by the default route or another."""
    options: dict[str, Any] = {"evidence": "light"}
    options |= {} if route is None else {"gradient": route}
    solver = Torchdiffeq(rtol=RTOL)
    flow, x0, criterion = subject.flow, subject.x0, subject.criterion
    return stopping_time(flow, x0, criterion, subject.target, solver=solver, **options)


def ours(make: Callable[[], Subject], route: GradientRoute | None = None) -> Run:
    """The library's run on fresh subjects."""

    def run() -> Sample:
        subject = make()
        begin = process_time()
        result = solve(subject, route)
        middle = process_time()
        result.time.sum().backward()
        end = process_time()
        gradients = [_gradient_of(leaf) for leaf in subject.leaves]
        return Sample(middle - begin, end - middle, gradients, result)

    return run


def through_torchdiffeq(make: Callable[[], Subject]) -> Run:
    """`odeint_event` differentiated through the steps of `odeint`."""

    def run() -> Sample:
        subject = make()
        begin = process_time()
        event, _ = odeint_event(
            subject.flow,
            subject.x0,
            torch.zeros((), dtype=DTYPE),
            event_fn=lambda t, y: subject.criterion(t, y) - subject.target,
            odeint_interface=odeint,
            rtol=RTOL,
            atol=ATOL,
        )
        middle = process_time()
        event.backward()
        end = process_time()
        return Sample(middle - begin, end - middle, [_gradient_of(leaf) for leaf in subject.leaves])

    return run


def has_diffrax() -> bool:
    """Whether the extra `bench` is installed."""
    return find_spec("diffrax") is not None


def through_diffrax(case: RotatedQuadratic) -> Run:
    """diffrax with its default adjoint, compiled before it is timed; all counts as forward."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import optimistix

    jax.config.update("jax_enable_x64", True)
    matrix = jnp.asarray(case.matrix.numpy())
    leaves = [jnp.asarray(case.theta.numpy()), jnp.asarray(case.start.numpy())]
    # Newton stops on J - eps as well, which is of size eps here.
    finder: Any = optimistix.Newton(rtol=1e-9, atol=1e-9 * float(case.target))

    def criterion(t: Any, y: Any, args: Any, **_: Any) -> Any:
        gradient = matrix @ y
        return gradient @ gradient - case.target

    def time_of(theta: Any, x0: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -args * (matrix @ y)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1e6,
            dt0=None,
            y0=x0,
            args=theta,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL),
            event=diffrax.Event(criterion, finder),
            max_steps=4096,
        )
        return solution.ts[-1]

    compiled = jax.jit(jax.value_and_grad(time_of, argnums=(0, 1))).lower(*leaves).compile()

    def run() -> Sample:
        begin = process_time()
        _, gradients = jax.block_until_ready(compiled(*leaves))
        end = process_time()
        return Sample(end - begin, 0.0, [torch.tensor(jax.device_get(g)) for g in gradients])

    return run


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def race(runs: Mapping[str, Run], rounds: int) -> dict[str, list[Sample]]:
    """Samples of all runs, taken in turns; a first round warms up and does not count."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is imported is not walked again in somebody's time
    for turn in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if turn else "default")
                sample = run()
            if turn:
                samples[name].append(sample)
    return samples


def ratios(
    ours_: Sequence[Sample], peer: Sequence[Sample], seconds: Callable[[Sample], float]
) -> tuple[float, str]:
    """Median over the rounds of a ratio of times, and its quartiles as text."""
    each = [seconds(own) / seconds(other) for own, other in zip(ours_, peer, strict=True)]
    low, middle, high = statistics.quantiles(each, method="inclusive")
    return middle, f"{low:.2f} to {high:.2f}"


def median(samples: Sequence[Sample], seconds: Callable[[Sample], float]) -> float:
    """Median of a time, in seconds."""
    return statistics.median(seconds(sample) for sample in samples)


def error(samples: Sequence[Sample], truth: Sequence[Tensor]) -> float:
    """Largest relative error of a leaf's gradient in the latest sample."""
    pairs = zip(samples[-1].gradients, truth, strict=True)
    return max(float((found - true).norm() / true.norm()) for found, true in pairs)
