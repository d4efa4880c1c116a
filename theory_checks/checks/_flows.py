"""Every flow of the library on one small problem, for the checks of orders and of energies.

f = x^T Q x/2 + sum x^4/4 with a rotated Q of three curvatures, and J = f. The start is set in Q's
own basis, the two ends of the spectrum strongest: J of an inertial flow then goes up and down
before it meets the target, and meets it far from an extremum, where T would be all but singular.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discrete import Euler, Heun, RungeKutta4, SemiImplicitEuler, UpdateRule
from ode_stopping import (
    Criterion,
    DiagonalPreconditioner,
    ExponentialSchedule,
    LossValue,
    PolynomialSchedule,
    PreconditionedFlow,
    Problem,
    QuarticQuadratic,
    RescaledGradientFlow,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.core.states import State
from ode_stopping.flows import (
    AdamFlow,
    AtLeast,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    NewtonFlow,
    Positive,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
)
from ode_stopping.flows.gradient import GradientFlow
from ode_stopping.problems.rotations import random_rotation

from ..measurements import Measurement, measure_index, measure_time

CURVATURES = (1.0, 3.0, 8.0)
START = (1.2, 0.2, 0.7)
TARGET = 0.25
# The asymptotic range and the oscillation were looked at for this problem, so it does not follow
# the seed of the run.
SEED = 4
RULES: dict[str, type[UpdateRule]] = {
    "Euler": Euler,
    "semi-implicit Euler": SemiImplicitEuler,
    "Heun": Heun,
    "Runge-Kutta 4": RungeKutta4,
}
ONE_STATE = ("gradient flow, schedule", "gradient flow, preconditioner", "Newton")


@dataclass(frozen=True)
class Dynamics:
    """A flow with hyperparameters that can be learnt.

    Attributes:
        make: f -> the flow.
        t0: Start time.
    """

    make: Callable[[Problem], GradientFlow]
    t0: float = 0.0


def _preconditioned(f: Problem) -> GradientFlow:
    logarithms = nn.Parameter(torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64))
    return PreconditionedFlow(f, preconditioner=DiagonalPreconditioner(logarithms, log=True))


def _hessian_damped(f: Problem) -> GradientFlow:
    # beta = 0.05 t^-1.5. The power is above 1 so that the weight w of the energy falls.
    return InertialHessianFlow(
        f,
        damping=VanishingDamping(AtLeast(1, value=3)),
        beta=PolynomialSchedule(0.05, 1.5, start=1.0),
        gamma=Positive(1.2),
    )


FLOWS: dict[str, Dynamics] = {
    "gradient flow, schedule": Dynamics(
        lambda f: RescaledGradientFlow(f, schedule=ExponentialSchedule(1.0, 0.3))
    ),
    "gradient flow, preconditioner": Dynamics(_preconditioned),
    "heavy ball": Dynamics(lambda f: HeavyBallFlow(f, damping=Positive(0.4))),
    "Nesterov": Dynamics(lambda f: NesterovFlow(f, alpha=AtLeast(1, value=3)), t0=1.0),
    "NAG-SC": Dynamics(lambda f: StronglyConvexNesterovFlow(f, mu=Positive(0.1))),
    "high resolution": Dynamics(
        lambda f: HighResolutionFlow(f, mu=Positive(0.1), s=Positive(0.004))
    ),
    "Hessian damping": Dynamics(_hessian_damped, t0=1.0),
    "RMSProp": Dynamics(lambda f: RMSPropFlow(f, tau=Positive(0.5), eps=Positive(0.1))),
    "Adam": Dynamics(
        lambda f: AdamFlow(f, tau1=Positive(0.5), tau2=Positive(1.0), eps=Positive(0.5))
    ),
    "Newton": Dynamics(lambda f: NewtonFlow(f, damping=Positive(0.5))),
}
# With a larger eps the layer at the start, of width tau (eps/g)^2, spans several steps.
FROM_REST: dict[str, Dynamics] = {
    "RMSProp": Dynamics(lambda f: RMSPropFlow(f, tau=Positive(0.5), eps=Positive(1.0))),
    "Adam": Dynamics(
        lambda f: AdamFlow(f, tau1=Positive(0.5), tau2=Positive(1.0), eps=Positive(1.0))
    ),
}


@dataclass(frozen=True)
class Setting:
    """A flow, ready to be followed.

    Attributes:
        flow: The flow.
        criterion: J = f.
        state: The start; it depends on theta where the flow's start does.
        t0: Start time.
        parameters: theta: the hyperparameters and the three curvatures (which J has as well).
    """

    flow: GradientFlow
    criterion: Criterion
    state: State
    t0: float
    parameters: list[nn.Parameter]


def start_of(flow: GradientFlow, x0: Tensor, t0: float, age: float) -> State:
    """The state that starts a flow from x0: at rest, with moments of the given age."""
    if isinstance(flow, InertialHessianFlow):
        return flow.initial_state(x0, t0=t0)
    if isinstance(flow, RMSPropFlow | AdamFlow):
        return flow.initial_state(x0, age=age)
    state: State = flow.initial_state(x0)
    return state


def setting(name: str, *, age: float = math.inf) -> Setting:
    """A flow of `FLOWS`, or of `FROM_REST` where the age is 0.

    Raises:
        KeyError: An unknown name.
    """
    dynamics = (FROM_REST if age == 0.0 else FLOWS)[name]
    rotation = random_rotation(len(CURVATURES), seed=SEED)
    curvatures = nn.Parameter(torch.tensor(CURVATURES, dtype=torch.float64))
    f = QuarticQuadratic(curvatures, rotation=rotation)
    flow = dynamics.make(f)
    x0 = rotation @ torch.tensor(START, dtype=torch.float64)
    state = start_of(flow, x0, dynamics.t0, age)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return Setting(flow, LossValue(f), state, dynamics.t0, parameters)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        flow: A key of `FLOWS`.
        rule: A key of `RULES`; None for the continuous side.
        step: h, on the discrete side.
        rtol: Of the continuous side.
    """

    flow: str
    rule: str | None = None
    step: float = 0.0
    rtol: float = 1e-12


def measure(cell: Cell) -> Measurement:
    """T and dT, or t0 + h N* and h dN* with a partial last step."""
    own = setting(cell.flow)
    problem: Any = (own.state, own.criterion, TARGET)
    if cell.rule is None:
        # dopri8: a quarter of dopri5's time at this tolerance.
        solver = Torchdiffeq(method="dopri8", rtol=cell.rtol)
        return measure_time(own.flow, *problem, parameters=own.parameters, t0=own.t0, solver=solver)
    return measure_index(
        RULES[cell.rule](own.flow, step=cell.step),
        *problem,
        parameters=own.parameters,
        t0=own.t0,
        interpolation="partial_step",
    )


def minima_before(name: str) -> int:
    """How often J rises again before it meets the target."""
    own = setting(name)
    result = stopping_time(own.flow, own.state, own.criterion, TARGET, t0=own.t0)
    times = torch.linspace(own.t0, result.trajectory.end, 401, dtype=torch.float64)
    with torch.no_grad():
        states = result.trajectory(times)
        position = states[0] if isinstance(states, tuple) else states
        values = own.flow.objective(position)
    inner = values[1:-1]
    return int(((inner < values[:-2]) & (inner <= values[2:])).sum())
