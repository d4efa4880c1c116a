"""Draws the pictures of docs/flows: paths on the level sets of one quadratic, and J over time.

python docs/flow_pictures.py [NAME ...]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from discrete import Algorithm, Euler, SemiImplicitEuler, stopping_index
from discrete.rules import algorithms
from ode_stopping import (
    ExponentialSchedule,
    Flow,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    LossValue,
    NesterovFlow,
    PreconditionedFlow,
    Quadratic,
    RescaledGradientFlow,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    WithIntegrals,
    plots,
    stopping_time,
)
from theory_checks.files import require_writable, run_script, write_atomically
from theory_checks.plotting import COLOURS, new_figure, style

IMAGES = Path(__file__).parent / "images" / "flows"
# The example of every page.
F = Quadratic(torch.tensor([0.1, 1.0], dtype=torch.float64))
X0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
TARGET = 1e-3
# For the flows that go coordinate by coordinate: F turned by 30 degrees.
C, S = math.cos(math.pi / 6), math.sin(math.pi / 6)
TURNED = Quadratic(F.spectrum, rotation=torch.tensor([[C, -S], [S, C]], dtype=torch.float64))
HORIZON = 60.0

Bound = Callable[[Tensor, Any], Tensor]


@dataclass
class Case:
    """A value of the hyperparameter: a flow, and the iteration that is drawn with it.

    Attributes:
        name: For the legend.
        flow: The flow.
        start: Its state at t0; None: at rest at X0.
        t0: Start time.
        update: The iteration; None draws none.
        step: h, of an update that is a bare callable.
        start_of_update: None: that of the flow.
        bound: (t, state) -> what J stays below, drawn dashed.
        line: Whether the flow is drawn.
    """

    name: str
    flow: Flow
    start: Any = None
    t0: float = 0.0
    update: Any = None
    step: float | None = None
    start_of_update: Any = None
    bound: Bound | None = None
    line: bool = True

    def __post_init__(self) -> None:
        """Solve both sides."""
        criterion = LossValue(self.objective)
        start = self.flow.initial_state(X0) if self.start is None else self.start
        self.run = stopping_time(self.flow, start, criterion, TARGET, t0=self.t0, max_time=HORIZON)
        self.iteration = None
        if self.update is not None:
            first = start if self.start_of_update is None else self.start_of_update
            clock = {} if self.step is not None else {"t0": self.t0}
            steps = int(HORIZON / self.h())
            self.iteration = stopping_index(
                self.update, first, criterion, TARGET, max_steps=steps, **clock
            )

    @property
    def objective(self) -> Quadratic:
        """f."""
        flow: Any = self.flow.flow if isinstance(self.flow, WithIntegrals) else self.flow
        return flow.objective

    def h(self) -> float:
        """The step of the iteration, in flow time."""
        return float(self.update.step) if self.step is None else self.step


def by_algorithm(name: str, algorithm: Algorithm, **changed: Any) -> Case:
    """An algorithm beside its own flow."""
    given = {"start": algorithm.initial_state(X0), "t0": float(algorithm.t0)}
    return Case(name, algorithm.flow, update=algorithm.update, **{**given, **changed})


def gradient() -> list[Case]:
    """One flow, three steps."""
    steps = [
        by_algorithm(f"lr = {lr:g}", algorithms.gradient_descent(F, lr=lr), line=False)
        for lr in (0.2, 1.0, 1.8)
    ]
    return [Case("flow", GradientFlow(F)), *steps]


def rescaled_gradient() -> list[Case]:
    """Rates that fall; the last of them too fast."""
    flows = {
        decay: RescaledGradientFlow(F, schedule=ExponentialSchedule(1.0, decay))
        for decay in (0.0, 0.04, 0.06)
    }
    return [
        Case(f"decay = {decay:g}", flow, update=Euler(flow, step=1.0))
        for decay, flow in flows.items()
    ]


def preconditioned() -> list[Case]:
    """From the gradient flow to Newton's."""
    flows = {
        p: PreconditionedFlow(F, preconditioner=torch.tensor([p, 1.0], dtype=torch.float64))
        for p in (1.0, 3.0, 10.0)
    }
    return [
        Case(f"p = ({p:g}, 1)", flow, update=Euler(flow, step=0.4)) for p, flow in flows.items()
    ]


def newton() -> list[Case]:
    """Damping makes it the gradient flow, slowed down."""
    return [
        by_algorithm(f"damping = {lam:g}", algorithms.newton(F, lr=0.4, damping=lam))
        for lam in (0.0, 0.1, 0.5)
    ]


def heavy_ball() -> list[Case]:
    """Underdamped, better, overdamped; the energy bounds J."""
    lr = 0.09
    cases = []
    for a in (0.2, 0.4, 2.0):
        made = algorithms.sgd(F, lr=lr, momentum=1 - a * math.sqrt(lr))
        cases.append(by_algorithm(f"damping = {a:g}", made, bound=made.flow.energy))
    return cases


def nesterov() -> list[Case]:
    """Nesterov's method runs beside the flow, not on it."""
    cases, h = [], 0.4
    for alpha in (3.0, 6.0, 10.0):
        flow = NesterovFlow(F, alpha=alpha)
        method = algorithms.nesterov(F, lr=h**2, alpha=alpha)
        cases.append(
            Case(
                f"alpha = {alpha:g}",
                flow,
                t0=float(method.t0),
                update=method.update,
                bound=lambda t, s, flow=flow: flow.energy(t, s) / t**2,
            )
        )
    return cases


def nag_sc(mu: float, s: float) -> Callable[[int, Any], Any]:
    """Nesterov's method for strongly convex f, on (look-ahead point, iterate)."""
    root = math.sqrt(mu * s)

    def step(k: int, state: Any) -> Any:
        y, x = state
        following = y - s * F.gradient(y)
        return following + (1 - root) / (1 + root) * (following - x), following

    return step


def strongly_convex_nesterov() -> list[Case]:
    """mu too small, right, too large."""
    s, cases = 0.09, []
    for mu in (0.02, 0.1, 0.4):
        flow = StronglyConvexNesterovFlow(F, mu=mu)
        bound = flow.energy if mu <= 0.1 else None
        cases.append(
            Case(
                f"mu = {mu:g}",
                flow,
                update=nag_sc(mu, s),
                step=math.sqrt(s),
                start_of_update=(X0, X0),
                bound=bound,
            )
        )
    return cases


def high_resolution() -> list[Case]:
    """The step of the algorithm is part of the flow."""
    flows = {s: HighResolutionFlow(F, mu=0.1, s=s) for s in (0.01, 0.16, 1.0)}
    return [
        Case(
            f"s = {s:g}",
            flow,
            update=nag_sc(0.1, s),
            step=math.sqrt(s),
            start_of_update=(X0, X0),
            bound=lambda t, state, flow=flow, s=s: flow.energy(t, state) / (1 + math.sqrt(0.1 * s)),
        )
        for s, flow in flows.items()
    ]


def inertial_hessian() -> list[Case]:
    """Hessian-driven damping takes the oscillation away."""
    h, cases = 0.3, []
    for beta in (0.0, h, 1.5):
        flow = InertialHessianFlow(F, damping=VanishingDamping(3.0), beta=beta, gamma=1.0)
        update = SemiImplicitEuler(flow, step=h)
        cases.append(Case(f"beta = {beta:g}", flow, t0=3 * h, update=update))
    return cases


def rmsprop() -> list[Case]:
    """The memory tau, from moments that are grown up."""
    cases = []
    for tau in (0.1, 1.0, 5.0):
        flow = RMSPropFlow(TURNED, tau=tau)
        start = flow.initial_state(X0, age=math.inf)
        cases.append(Case(f"tau = {tau:g}", flow, start, update=SemiImplicitEuler(flow, step=0.05)))
    return cases


def adam() -> list[Case]:
    """The memory tau1: the algorithm from zero moments, the flow from a small age."""
    lr, cases = 0.05, []
    for tau1 in (0.1, 0.3, 1.0):
        made = algorithms.adam(TURNED, lr=lr, betas=(1 - lr / tau1, 1 - lr))
        cases.append(
            Case(
                f"tau1 = {tau1:g}",
                made.flow,
                made.flow.initial_state(X0, age=0.01),
                update=made.update,
                start_of_update=made.initial_state(X0),
            )
        )
    return cases


def with_integrals() -> list[Case]:
    """What friction takes, beside the energy."""
    cases = []
    for a in (0.2, 0.4, 2.0):
        inner = HeavyBallFlow(F, damping=a)
        lost = lambda t, s, a=a: a * s[1].square().sum()  # noqa: E731
        cases.append(Case(f"damping = {a:g}", WithIntegrals(inner, lost)))
    return cases


PICTURES: dict[str, Callable[[], list[Case]]] = {
    name.__name__.replace("_", "-"): name
    for name in (
        gradient,
        rescaled_gradient,
        preconditioned,
        newton,
        heavy_ball,
        nesterov,
        strongly_convex_nesterov,
        high_resolution,
        inertial_hessian,
        rmsprop,
        adam,
        with_integrals,
    )
}


def draw(name: str, cases: list[Case]) -> Any:
    """Paths on the left; J, or the balance of energies, on the right."""
    figure, (left, right) = new_figure(1, 2, width=4.2, height=3.1)
    figure.get_layout_engine().set(wspace=0.06)
    runs, colours = [], []
    for case, colour in zip(cases, COLOURS, strict=False):
        for run in (case.iteration, case.run if case.line else None):
            if run is not None:
                runs.append(run)
                colours.append(colour)
    plots.plot_paths(cases[0].objective, runs, axes=left, colors=colours, levels=12)
    left.get_legend().remove()
    left.grid(visible=False)
    left.set(xlabel="$x_1$", ylabel="$x_2$")
    (balance if name == "with-integrals" else criterion)(right, cases)
    return figure


def criterion(axes: Any, cases: list[Case]) -> None:
    """J over flow time: flows as lines with T marked, iterates as dots, bounds dashed."""
    flows = {case.name: case.run for case in cases if case.line}
    plots.plot_criterion(flows, axes=axes, criterion=LossValue(cases[0].objective), target=TARGET)
    for case, colour in zip(cases, COLOURS, strict=False):
        if case.iteration is not None:
            losses = case.iteration.trajectory.losses.numpy()
            times = case.t0 + case.h() * np.arange(len(losses))
            name = None if case.line else f"{case.name}, hN = {times[-1]:.4g}"
            axes.plot(times, losses, ".", color=colour, markersize=3.5, label=name)
        if case.bound is not None:
            times, values = followed(case, case.bound)
            axes.plot(times, values, "--", color=colour, linewidth=0.9)
    axes.set(ylabel="J = f")
    axes.legend(loc="upper right")


def balance(axes: Any, cases: list[Case]) -> None:
    """The energy, what was lost, and their sum."""
    for case, colour in zip(cases, COLOURS, strict=False):
        flow = case.flow
        times, lost = followed(case, lambda t, s, flow=flow: flow.integrals(s)[0])
        energy = followed(case, lambda t, s, flow=flow: flow.flow.energy(t, flow.inner(s)))[1]
        label = f"{case.name}, T = {float(case.run.time.detach()):.4g}"
        axes.plot(times, lost, color=colour, label=label)
        axes.plot(times, energy, "--", color=colour, linewidth=0.9)
        axes.plot(times, lost + energy, ":", color=colour)
    axes.set(xlabel="flow time t", ylabel="energy")
    axes.legend(loc="center right")


def followed(case: Case, function: Bound) -> tuple[Any, Any]:
    """Times along a flow, and a function there."""
    times = torch.linspace(case.t0, case.run.trajectory.end, 300, dtype=torch.float64)
    with torch.no_grad():
        states = [case.run.trajectory(t) for t in times]
        values = [float(function(t, s)) for t, s in zip(times, states, strict=True)]
    return times.numpy(), np.array(values)


def save(figure: Any, path: Path) -> None:
    """A small file: a palette of 128 colours."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    picture = Image.open(buffer).convert("RGB")
    small = BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    write_atomically(path, small.getvalue())


def main() -> None:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args().names or list(PICTURES)
    torch.set_num_threads(1)
    require_writable(IMAGES)
    for name in names:
        cases = PICTURES[name]()
        with style():
            figure = draw(name, cases)
            save(figure, IMAGES / f"{name}.png")
        for case in cases:
            found = f"T = {float(case.run.time.detach()):.4f}"
            if case.iteration is not None and bool(case.iteration.reached):
                end = case.t0 + case.h() * case.iteration.index
                found += f", t0 + h N = {end:.4g} with h = {case.h():g}"
            print(f"{name}: {case.name}: {found}")


if __name__ == "__main__":
    run_script(main)
