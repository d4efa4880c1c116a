"""One run of one optimiser from one start, and all runs of a cell of the study."""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize

from ode_stopping.core.status import DivergedError

from .methods import METHODS, Method, Setting
from .problems import SVMProblem, load, start
from .statistics import Outcome

__all__ = ["HORIZON", "TOLERANCE", "Cell", "Race", "race", "run_cell"]

Array = NDArray[np.float64]
HORIZON = 1000  # iterations
TOLERANCE = 1e-4  # on the max-norm of the gradient


@dataclass(frozen=True, eq=False)
class Race:
    """One run.

    Attributes:
        setting: What was tuned.
        iterations: Until the gradient's max-norm was below the tolerance, the check included: one
            more than the steps. inf for a miss.
        gap: f - f* at the end.
        diverged: f ended above f(x0), or was not finite, or the optimiser raised DivergedError.
        seconds: Wall time.
        values: f at every iteration; empty where traces were not kept.
        times: Seconds until then.
        rates: The learning rate before every step, where there is one.
    """

    setting: Setting
    iterations: float
    gap: float
    diverged: bool
    seconds: float
    values: Array = field(default_factory=lambda: np.empty(0))
    times: Array = field(default_factory=lambda: np.empty(0))
    rates: Array = field(default_factory=lambda: np.empty(0))

    @property
    def outcome(self) -> Outcome:
        """For `tune`."""
        return Outcome(self.iterations, self.gap, self.diverged)


@dataclass(frozen=True)
class Cell:
    """What is computed, and kept, together: all settings of a method on one problem and start."""

    data: str
    method: str
    seed: int
    traces: bool = False


def run_cell(cell: Cell) -> list[Race]:
    """All runs of a cell."""
    torch.set_num_threads(1)
    problem, method = load(cell.data), METHODS[cell.method]
    x0 = start(problem.dim, cell.seed)
    return [race(problem, method, s, x0, traces=cell.traces) for s in method.grid(problem)]


def race(
    problem: SVMProblem,
    method: Method,
    setting: Setting,
    x0: Array,
    *,
    horizon: int = HORIZON,
    tolerance: float = TOLERANCE,
    traces: bool = True,
) -> Race:
    """Run an optimiser until the gradient is small, f is not finite, or the iterations are used up.

    f and its gradient at the point where the run is looked at are computed once: the optimiser's
    closure is answered from memory there.

    Args:
        problem: f.
        method: The optimiser.
        setting: One of its grid.
        x0: The start, shape (d,).
        horizon: Limit on the iterations.
        tolerance: On the max-norm of the gradient.
        traces: Whether to keep values, times and rates.
    """
    if method.needs:
        importlib.import_module(method.needs)  # before the clock starts
    log = _Log(problem, tolerance)
    with warnings.catch_warnings():
        # Of the rivals from PyPI, about torch's interfaces.
        warnings.filterwarnings("ignore", category=(FutureWarning))
        if method.make is None:
            _by_scipy(problem, x0, log, horizon)
        else:
            _by_steps(problem, method.make, setting, x0, log, horizon)
    first, last = log.values[0], log.values[-1]
    diverged = log.refused or not math.isfinite(last) or last > first
    return Race(
        setting,
        float(len(log.values)) if log.met else math.inf,
        last - problem.minimum,
        diverged,
        log.times[-1],
        *((np.array(log.values), np.array(log.times), np.array(log.rates)) if traces else ()),
    )


class _Log:
    """The course of a run."""

    def __init__(self, problem: SVMProblem, tolerance: float) -> None:
        self.values: list[float] = []
        self.times: list[float] = []
        self.rates: list[float] = []
        self.met = False
        self.refused = False  # the optimiser itself said that it diverged
        self._tolerance = tolerance
        self._began = time.perf_counter()

    def look(self, value: float, gradient: Array) -> bool:
        """Note an iteration; whether the run is over."""
        self.values.append(value)
        self.times.append(time.perf_counter() - self._began)
        self.met = bool(np.abs(gradient).max() < self._tolerance)
        return self.met or not math.isfinite(value)


class _Memory:
    """The closure of a parameter, with the last evaluation kept."""

    def __init__(self, problem: SVMProblem, x: torch.Tensor) -> None:
        self.problem = problem
        self._x = x
        self._at = np.full(problem.dim, np.nan)
        self._known: tuple[float, Array] = (math.nan, self._at)

    def evaluate(self) -> tuple[float, Array]:
        """f and its gradient at the parameter."""
        point = self._x.detach().numpy()
        if not np.array_equal(point, self._at):
            self._at, self._known = point.copy(), self.problem(point)
        return self._known

    def __call__(self) -> torch.Tensor:
        """Loss and gradient, as any closure for torch has them."""
        self._x.grad = None
        loss: torch.Tensor = _Value.apply(self._x, self)
        loss.backward()
        return loss


class _Value(torch.autograd.Function):
    """f for autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, memory: _Memory) -> torch.Tensor:
        """f(x)."""
        ctx.save_for_backward(x)
        ctx.memory = memory
        return torch.tensor(memory.evaluate()[0], dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Weight * grad f(x)."""
        (x,) = ctx.saved_tensors
        return weight * _Gradient.apply(x, ctx.memory), None


class _Gradient(torch.autograd.Function):
    """grad f for autograd, with the product with the Hessian as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, memory: _Memory) -> torch.Tensor:
        """grad f(x)."""
        ctx.save_for_backward(x)
        ctx.problem = memory.problem
        return torch.from_numpy(memory.evaluate()[1].copy())

    @staticmethod
    def backward(ctx: Any, vector: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Hessian of f at x times a vector."""
        (x,) = ctx.saved_tensors
        return torch.from_numpy(ctx.problem.curvature(x.numpy(), vector.numpy())), None


def _by_steps(
    problem: SVMProblem,
    make: Callable[[torch.Tensor, Setting, SVMProblem], Any],
    setting: Setting,
    x0: Array,
    log: _Log,
    horizon: int,
) -> None:
    x = torch.tensor(x0, dtype=torch.float64, requires_grad=True)
    optimizer = make(x, setting, problem)
    closure = _Memory(problem, x)
    two_points = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    with np.errstate(all="ignore"):
        for iteration in range(1, horizon + 1):
            if two_points:  # schedule-free: gradients are taken elsewhere than the result is
                optimizer.eval()
            if log.look(*closure.evaluate()) or iteration == horizon:
                return
            if two_points:
                optimizer.train()
            log.rates.append(float(optimizer.param_groups[0]["lr"]))
            try:
                optimizer.step(closure)
            except DivergedError:
                log.refused = True
                return


def _by_scipy(problem: SVMProblem, x0: Array, log: _Log, horizon: int) -> None:
    """L-BFGS-B with SciPy's memory of 10; an iteration may evaluate f several times."""
    if log.look(*problem(x0)):
        return

    def callback(intermediate_result: Any) -> None:
        if log.look(*problem(intermediate_result.x)) or len(log.values) >= horizon:
            raise StopIteration

    options = {"maxiter": horizon, "maxfun": 100 * horizon, "ftol": 0.0, "gtol": 0.0}
    optimize.minimize(problem, x0, jac=True, method="L-BFGS-B", callback=callback, options=options)
