"""StoPM: the constants of an inertial flow with Hessian-driven damping, learned by its T.

    x'' + (alpha/t) x' + beta(t) hess F(x) x' + gamma(t) grad F(x) = 0,   min E[ T + rho (P + Q) ]

T is the stopping time of |grad f| <= eps; P and Q are the time integrals of the violated conditions
of stability (of Euler with the fixed step h) and of convergence, `stability_margins` and
`convergence_margins`; beta and gamma are small networks of t. Without P the minimum of T would be
at gamma = inf, where no step h is stable. (Xie, Yin, Wen, "ODE-based Learning to Optimize", arXiv
2406.02006; alpha = 6, t0 = 1, h = 0.04 and eps = 3e-4 are theirs.)

Ours is the scale: the flow sees F = f / (h^2 L), with L the Lipschitz constant of grad f. Then
beta = h, gamma = 1 are the constants of Nesterov's method at its step 1/L, whatever the data, and
what is learned on one data set means the same on another. The criterion stays that of f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .core.states import State, pieces
from .criteria import GradientNorm
from .flows import (
    InertialHessianFlow,
    NetworkSchedule,
    VanishingDamping,
    WithIntegrals,
    convergence_margins,
    stability_margins,
)
from .flows.conditions import convergence_values, stability_values, violation
from .flows.hessian_damping import Coefficients
from .flows.hyperparameters import at_time, is_constant
from .problems.base import Objective, objective_gradient
from .problems.differentiation import value_and_gradient
from .solving.solver import Solver
from .solving.torchdiffeq import Torchdiffeq
from .tuning import StoppingTask, TuningHistory, TuningRecord, minimise_stopping_time

__all__ = [
    "LearnedISHD",
    "StoPMConstants",
    "learned_ishd",
    "stopm_penalty",
    "stopm_task",
    "train_stopm",
]

Curvature = Callable[[Tensor], Tensor | float]

# The solver's tolerance is relative to the present size of a state. A violation that begins on the
# way would make an integral leave exact zero, where no step is small enough for it.
_OFFSET = 1.0


class StoPMConstants(nn.Module):
    """beta(t) and gamma(t) as networks, to be shared by the flows of several objectives.

    They start next to Nesterov's constants beta = h, gamma = 1, but inside of the conditions of
    stability and not on their edge gamma = beta/h, where P has a kink.

    Args:
        step: h, in flow time.
        t0: Start time, > 0.
        hidden: Units of each network.
        seed: Of the networks.
        spread: Of the networks, see `NetworkSchedule`.
        beta: beta(t0)/h at the start.
        gamma: gamma(t0) at the start.

    Raises:
        ValueError: `step` or `t0` not positive; a start that is not.
    """

    def __init__(
        self,
        *,
        step: float = 0.04,
        t0: float = 1.0,
        hidden: int = 8,
        seed: int = 0,
        spread: float = 0.02,
        beta: float = 1.5,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("step", step), ("t0", t0)):
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value:g}")
        self.step, self.t0 = float(step), float(t0)
        shared: dict[str, Any] = {"hidden": hidden, "start": t0, "spread": spread}
        self.beta = NetworkSchedule(beta * step, seed=2 * seed, **shared)
        self.gamma = NetworkSchedule(gamma, seed=2 * seed + 1, **shared)


class LearnedISHD(WithIntegrals):
    """The flow of one objective, with P and Q as further states: (x, v, P, Q).

    Args:
        objective: f.
        constants: beta and gamma.
        alpha: Of the damping alpha/t.
        lipschitz: L; None: the objective's own.
        curvature: x -> Lambda(x) >= |hess f(x)| in the condition of stability; None: L.

    Attributes:
        objective: f.
        flow: The `InertialHessianFlow` of F = f/(h^2 L), whose Euler iterates with step h are the
            algorithm (EIGAC).
        constants: beta and gamma.
        scale: 1/(h^2 L).

    Raises:
        ValueError: L is not known, or not positive.
    """

    flow: InertialHessianFlow

    def __init__(
        self,
        objective: Objective,
        constants: StoPMConstants,
        *,
        alpha: float = 6.0,
        lipschitz: float | None = None,
        curvature: Curvature | None = None,
    ) -> None:
        known = lipschitz if lipschitz is not None else _own_lipschitz(objective)
        if known is None or not known > 0:
            raise ValueError(
                f"lipschitz must be a positive number, of grad f; got {known} (None: the objective "
                "has none of its own)"
            )
        step = constants.step
        scale = 1.0 / (step**2 * known)
        flow = InertialHessianFlow(
            _Rescaled(objective, scale),
            damping=VanishingDamping(alpha),
            beta=constants.beta,
            gamma=constants.gamma,
        )

        def largest(x: Tensor) -> Tensor | float:
            return 1.0 / step**2 if curvature is None else scale * curvature(x)

        def unstable(t: Tensor, state: State) -> Tensor:
            return stability_margins(flow, t, state[0], step=step, curvature=largest).violation()

        def divergent(t: Tensor, state: State) -> Tensor:
            return convergence_margins(flow, t).violation()

        super().__init__(flow, unstable, divergent)
        self.objective, self.constants = objective, constants
        self.scale, self.largest = scale, largest

    def forward(self, t: Tensor, x: State) -> State:
        """(x', v', P', Q').

        What `WithIntegrals` gives, with beta, gamma and their derivatives computed once for all,
        and in closed form: the networks, and not the data, are what an evaluation costs.
        """
        position, v, _, _ = pieces(x, 4, "LearnedISHD")
        flow = self.flow
        beta, gamma = _jet(flow.beta, t, v), _jet(flow.gamma, t, v)
        a, time = at_time(flow.damping, t, v), t.to(v)
        now = Coefficients(a, beta.value, beta.rate, gamma.value)
        largest = torch.as_tensor(self.largest(position), dtype=v.dtype, device=v.device)
        unstable = violation(stability_values(now, self.constants.step, largest))
        slope = gamma.rate - beta.second - (beta.rate - beta.value / time) / time
        divergent = violation(convergence_values(time, a, now.weight(time), slope))
        return *flow.velocity(position, v, now), unstable, divergent

    def initial_state(self, x0: Tensor | State, **options: Any) -> State:
        """The state at rest at t0: v0 = beta(t0) grad F(x0). It depends on beta.

        Args:
            x0: Position; a state (x, v) is taken as it is.
            **options: As for `InertialHessianFlow`.
        """
        if isinstance(x0, Tensor):
            options = {"t0": self.constants.t0, **options}
        *state, p, q = super().initial_state(x0, **options)
        return (*state, p + _OFFSET, q + _OFFSET)

    def integrals(self, state: State) -> tuple[Tensor, ...]:
        """P and Q, each 0-d (the states themselves start at 1, see the module)."""
        return tuple(value - _OFFSET for value in super().integrals(state))


def learned_ishd(
    objective: Objective,
    constants: StoPMConstants | None = None,
    *,
    alpha: float = 6.0,
    lipschitz: float | None = None,
    curvature: Curvature | None = None,
) -> LearnedISHD:
    """The flow of an objective with constants that may be shared; see `LearnedISHD`.

    Args:
        objective: f.
        constants: None: new ones, at `.constants`.
        alpha: Of the damping alpha/t.
        lipschitz: L; None: the objective's own.
        curvature: x -> Lambda(x), a bound on |hess f(x)|; None: L.
    """
    made = StoPMConstants() if constants is None else constants
    return LearnedISHD(objective, made, alpha=alpha, lipschitz=lipschitz, curvature=curvature)


def stopm_task(
    flow: LearnedISHD,
    x0: Tensor,
    *,
    target: float = 3e-4,
    max_time: float | None = None,
    name: str = "",
) -> StoppingTask:
    """T of |grad f| <= target along the flow, from rest at x0.

    Args:
        flow: As `learned_ishd` makes it.
        x0: Start, shape (d,).
        target: eps.
        max_time: Absolute horizon, in flow time; None: t0 + 100, which is 2500 steps of h = 0.04.
        name: For messages.
    """
    t0 = flow.constants.t0
    return StoppingTask(
        flow,
        lambda: flow.initial_state(x0),
        GradientNorm(flow.objective, squared=False),
        target,
        t0=t0,
        max_time=t0 + 100.0 if max_time is None else max_time,
        evidence="light",  # an inner loop at a loose tolerance: errors of a per cent do not matter
        name=name,
    )


def stopm_penalty(task: StoppingTask, result: Any) -> Tensor:
    """P + Q of a run, for `minimise_stopping_time(..., penalty=stopm_penalty, weight=rho)`."""
    p, q = task.flow.integrals(result.state)  # type: ignore[attr-defined]
    return p + q


def train_stopm(
    tasks: StoppingTask | Iterable[StoppingTask],
    constants: StoPMConstants,
    *,
    iterations: int = 40,
    rate: float = 0.08,
    rho: float = 3.0,
    clip: float = 6.0,
    solver: Solver | None = None,
    callback: Callable[[TuningRecord], bool | None] | None = None,
    **options: Any,
) -> TuningHistory:
    """Train the constants on some tasks, in place: `minimise_stopping_time` with settings for it.

    Adam with a rate that falls like a cosine. The slopes of P are a hundred times those of T, and
    its kinks lie where the minimum is: clipping keeps a step across a kink from undoing the rest.
    The best of all iterations is kept, with P + Q next to zero; the last need not be.

    P and Q look at times up to T only. Constants that are to serve problems with a longer T are
    better trained on one of those, or with a larger rho: what a violation that the objective
    tolerates does later, nobody sees.

    Args:
        tasks: As `stopm_task` makes them, over flows that share the constants.
        constants: What is trained.
        iterations: Steps of Adam.
        rate: Of Adam, at the start.
        rho: Weight of P + Q.
        clip: Largest norm of the gradient.
        solver: None: rtol 1e-5. (A `GradientAccuracyWarning` comes with estimates of about 1 %,
            which do not matter here.)
        callback: As for `minimise_stopping_time`.
        **options: The rest of its options.

    Raises:
        TypeError, ValueError, TuningError: As `minimise_stopping_time`.
    """
    adam = torch.optim.Adam(constants.parameters(), lr=rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations, eta_min=0.01 * rate)

    def after(record: TuningRecord) -> bool | None:
        falling.step()
        return None if callback is None else callback(record)

    return minimise_stopping_time(
        tasks,
        constants,
        optimizer=adam,
        iterations=iterations,
        penalty=stopm_penalty,
        weight=rho,
        clip=clip,
        solver=Torchdiffeq(rtol=1e-5) if solver is None else solver,
        callback=after,
        **options,
    )


class _Rescaled(nn.Module):
    """F = scale * f."""

    def __init__(self, objective: Objective, scale: float) -> None:
        super().__init__()
        self.objective, self.scale = objective, scale

    def forward(self, x: Tensor) -> Tensor:
        """F(x)."""
        return self.scale * self.objective(x)

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient."""
        return self.scale * objective_gradient(self.objective, x)


@dataclass(frozen=True)
class _Jet:
    """A function of t with its first two derivatives, each 0-d."""

    value: Tensor
    rate: Tensor
    second: Tensor


def _jet(schedule: Any, t: Tensor, like: Tensor) -> _Jet:
    if isinstance(schedule, NetworkSchedule):
        jet = _network_jet(schedule, t)
        return _Jet(jet.value.to(like), jet.rate.to(like), jet.second.to(like))
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    if is_constant(schedule):
        return _Jet(at_time(schedule, t, like), zero, zero)

    def rate(time: Tensor) -> Tensor:
        found = value_and_gradient(lambda s: at_time(schedule, s, like), time)[1]
        return torch.zeros_like(time) if found is None else found

    first, second = value_and_gradient(rate, t)
    curve = zero if second is None else second.to(like)
    return _Jet(at_time(schedule, t, like), first.to(like), curve)


def _network_jet(network: NetworkSchedule, t: Tensor) -> _Jet:
    """softplus(z(s)), z = b + sum_j v_j tanh(w_j s + u_j), s = log(1 + t - start)."""
    age = 1 + t.to(network.bias.dtype) - network.start
    units = torch.tanh(network.weight * age.log() + network.shift)
    slopes = network.output * network.weight * (1 - units * units)
    z = network.bias + (network.output * units).sum()
    # d/dt = (1/age) d/ds
    z1 = slopes.sum() / age
    z2 = -(2 * (slopes * network.weight * units).sum() / age + z1) / age
    opening = torch.sigmoid(z)
    value = functional.softplus(z, threshold=40.0)
    return _Jet(value, opening * z1, opening * ((1 - opening) * z1 * z1 + z2))


def _own_lipschitz(objective: object) -> float | None:
    known = getattr(objective, "lipschitz", None)
    return known() if callable(known) else None
