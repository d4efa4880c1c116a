"""Gradient routes of a user's own: right, an error or a warning, and never silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from own_routes import (
    PAGE,
    OneByOne,
    Switched,
    estimates,
    every_problem,
    every_target,
)
from pages import blocks, missing_targets, printed
from torch import Tensor

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    Piece,
    PullBack,
    StepAdjoint,
)
from theory_checks.closed_forms import CLOSED_FORMS

# --- right ones ---------------------------------------------------------------------------------


class Delegating(GradientRoute):
    """Somebody else's work."""

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return InterpolatingAdjoint().pull_back(piece, cotangent)


class KeepsNothing(Delegating):
    """It says that it needs no steps, and hands on to a route that does."""

    keeps_trajectory = False


class StepByStep(StepAdjoint):
    """A subclass that changes nothing."""

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return super().pull_back(piece, cotangent)


RIGHT = (Delegating(), KeepsNothing(), OneByOne(), StepByStep())


@every_problem
@every_target
@pytest.mark.parametrize("route", RIGHT, ids=lambda route: type(route).__name__)
def test_a_right_route(route: GradientRoute, targets: list[float], jumps: bool) -> None:
    """Right, without a warning (they are errors here), and held against another."""
    error, result = Switched(targets, jumps=jumps).error(route)
    assert error < 1e-6
    assert max(estimates(result)) < 5e-8
    parts = result.evidence if isinstance(result.evidence, list) else [result.evidence]
    assert all(part.second_route is not None for part in parts)
    assert all(part.passed for part in parts)


@pytest.mark.parametrize("route", RIGHT, ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("level", ["standard", "thorough"])
def test_the_other_levels_of_evidence(route: GradientRoute, level: str) -> None:
    error, result = Switched([1e-2], jumps=False).error(route, evidence=level)
    assert error < 1e-6
    assert result.evidence.second_route is not None
    assert result.evidence.refinement < 1e-7


def test_a_cotangent_on_the_state() -> None:
    """w^T x_T on two modes: against the default route."""
    case = next(c for c in CLOSED_FORMS if c.name.startswith("form5"))
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64)
    found = []
    for route in (StepAdjoint(), OneByOne()):
        leaves = case.leaves(1e-2, 0.25)
        result = case.solve(leaves, route, rtol=1e-9)
        found.append(torch.autograd.grad(weights @ result.state, [*leaves.values()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_zero() -> None:
    """x' = -a x keeps the direction of x and J its length: d(w^T x_T)/da = 0."""
    problem = Switched([1e-2], jumps=False)
    result = problem.solve(OneByOne())
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64)
    found = torch.autograd.grad(weights @ result.state, problem.leaves)
    assert abs(found[0].item()) < 1e-15


# --- wrong ones ---------------------------------------------------------------------------------


class Ones(GradientRoute):
    """Whatever it is asked."""

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        leaves = [torch.ones_like(leaf) for leaf in piece.leaves.tensors]
        return PullBack(torch.ones_like(cotangent), leaves)


class OnesAndKeepsNothing(Ones):
    keeps_trajectory = False


def spoiled(pulled: PullBack) -> PullBack:
    """1 % off in the leaves, every figure as it was."""
    return replace(pulled, leaves=[1.01 * leaf for leaf in pulled.leaves])


class WrongDelegate(GradientRoute):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        pulled = InterpolatingAdjoint().pull_back(piece, cotangent)
        return PullBack(pulled.start, [1.01 * leaf for leaf in pulled.leaves])


class WrongWithFigures(GradientRoute):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(InterpolatingAdjoint().pull_back(piece, cotangent))


class WrongInterpolating(InterpolatingAdjoint):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


class WrongSteps(StepAdjoint):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


class WrongPath(StepAdjoint):
    def pull_back_path(self, path: Piece, jumps: Any) -> PullBack:
        return spoiled(super().pull_back_path(path, jumps))


class WrongBacksolve(BacksolveAdjoint):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


class WrongForward(ForwardSensitivity):
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


class WrongDirect(DirectAdjoint):
    own_graph: ClassVar[bool] = False

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


class Grandchild(WrongInterpolating):
    """Nothing of its own."""


OFF_BY_A_PERCENT = (
    WrongDelegate(),
    WrongWithFigures(),
    WrongInterpolating(),
    WrongSteps(),
    WrongPath(),
    WrongDirect(),
    Grandchild(),
)


@every_problem
@every_target
@pytest.mark.parametrize("route", [Ones(), OnesAndKeepsNothing()], ids=["ones", "keeps-nothing"])
def test_a_route_that_returns_ones(route: GradientRoute, targets: list[float], jumps: bool) -> None:
    with pytest.warns(GradientAccuracyWarning, match="A route of your own is wrong"):
        error, result = Switched(targets, jumps=jumps).error(route)
    assert error > 0.5
    assert min(estimates(result)) > 0.5


@every_problem
@every_target
@pytest.mark.parametrize("route", OFF_BY_A_PERCENT, ids=lambda route: type(route).__name__)
def test_a_route_that_is_wrong_by_a_percent(
    route: GradientRoute, targets: list[float], jumps: bool
) -> None:
    with pytest.warns(GradientAccuracyWarning, match="InterpolatingAdjoint"):
        error, result = Switched(targets, jumps=jumps).error(route)
    assert error > 5e-3
    assert min(estimates(result)) > 5e-3


@pytest.mark.parametrize(
    "route", [WrongBacksolve(), WrongForward()], ids=lambda route: type(route).__name__
)
def test_wrong_subclasses_of_the_other_routes(route: GradientRoute) -> None:
    with pytest.warns(GradientAccuracyWarning, match="InterpolatingAdjoint"):
        error, result = Switched([1e-2], jumps=False).error(route)
    assert error > 5e-3
    assert min(estimates(result)) > 5e-3


def test_a_thorough_run_warns_as_well() -> None:
    with pytest.warns(GradientAccuracyWarning, match="A route of your own is wrong"):
        Switched([1e-2], jumps=False).error(WrongDelegate(), evidence="thorough")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pulled: replace(pulled, start=1.01 * pulled.start),
        lambda pulled: replace(pulled, start=torch.full_like(pulled.start, float("nan"))),
        lambda pulled: replace(pulled, leaves=[-leaf for leaf in pulled.leaves]),
        lambda pulled: replace(pulled, leaves=[float("nan") * leaf for leaf in pulled.leaves]),
        lambda pulled: replace(pulled, leaves=[0.0 * leaf for leaf in pulled.leaves]),
    ],
    ids=["start", "nan-start", "sign", "nan-leaves", "zeros"],
)
def test_other_ways_to_be_wrong(spoil: Callable[[PullBack], PullBack]) -> None:
    class Spoiled(GradientRoute):
        def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
            return spoil(InterpolatingAdjoint().pull_back(piece, cotangent))

    with pytest.warns(GradientAccuracyWarning, match="InterpolatingAdjoint"):
        _, result = Switched([1e-2], jumps=False).error(Spoiled())
    assert result.evidence.estimate > 5e-3


class WrongGraph(DirectAdjoint):
    """Its own graph of T is 1 % off, its pull-back is right."""

    def graph(
        self, problem: Any, x0: Tensor, t0: Tensor, targets: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        times, states = super().graph(problem, x0, t0, targets)
        return [time + 0.01 * (time - time.detach()) for time in times], states


def test_a_wrong_graph() -> None:
    with pytest.warns(GradientAccuracyWarning, match="InterpolatingAdjoint"):
        error, _ = Switched([1e-2], jumps=False).error(WrongGraph())
    assert error > 5e-3


class WrongPullBackOfDirect(DirectAdjoint):
    """It inherits a graph of its own, which goes past the pull-back that it writes."""

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return spoiled(super().pull_back(piece, cotangent))


def test_a_subclass_of_the_direct_route_is_not_passed_by() -> None:
    with pytest.warns(GradientAccuracyWarning, match="InterpolatingAdjoint"):
        error, _ = Switched([1e-2], jumps=False).error(WrongPullBackOfDirect())
    assert error > 5e-3


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("identity",), ("quadrature",), ("time_term",), ("identity", "quadrature")], ids=str
)
def test_a_figure_that_is_promised_and_missing(names: tuple[str, ...]) -> None:
    """A right gradient, but nothing that speaks for it."""

    class Silent(GradientRoute):
        figures: ClassVar[tuple[str, ...]] = names

        def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
            pulled = InterpolatingAdjoint().pull_back(piece, cotangent)
            return PullBack(pulled.start, pulled.leaves)

    with pytest.warns(GradientAccuracyWarning):
        error, result = Switched([1e-2], jumps=False).error(Silent())
    assert error < 1e-6
    assert result.evidence.estimate == float("inf")


def test_figures_that_are_there() -> None:
    class Vouching(Delegating):
        figures: ClassVar[tuple[str, ...]] = ("identity", "quadrature", "time_term")

    error, result = Switched([1e-2], jumps=True).error(Vouching())
    assert error < 1e-6
    assert result.evidence.second_route is None
    assert {"identity", "quadrature", "time_term"} <= set(result.evidence.figures)


def test_figures_are_not_inherited() -> None:
    class Vouching(Delegating):
        figures: ClassVar[tuple[str, ...]] = ("identity",)

    class Child(Vouching):
        pass

    assert Child.figures == StepByStep.figures == Grandchild.figures == ()


@pytest.mark.parametrize(
    "route",
    [StepAdjoint(), InterpolatingAdjoint(), BacksolveAdjoint(), ForwardSensitivity()],
    ids=lambda route: type(route).__name__,
)
def test_routes_of_the_library_speak_for_themselves(route: GradientRoute) -> None:
    error, result = Switched([1e-2], jumps=False).error(route)
    assert error < 1e-6
    assert result.evidence.second_route is None
    assert result.evidence.identity is not None


def test_the_direct_route_is_held_against_another() -> None:
    _, result = Switched([1e-2], jumps=False).error(DirectAdjoint())
    assert result.evidence.second_route < 5e-8


# --- what is kept -------------------------------------------------------------------------------


def test_steps_that_were_not_kept_are_no_states() -> None:
    """x0 would be the answer at every time otherwise."""
    result = Switched([1e-2], jumps=False).solve(BacksolveAdjoint())
    assert result.problem is not None
    for trajectory in (result.problem.trajectory, result.trajectory):
        with pytest.raises(RuntimeError, match="states were not kept"):
            trajectory.flat(0.5)
        with pytest.raises(RuntimeError, match="states were not kept"):
            trajectory(0.5)


def test_a_route_that_vouches_for_what_it_cannot_know() -> None:
    """It keeps nothing and claims figures, so that nothing is kept for another: an error."""

    class Claiming(Delegating):
        keeps_trajectory = False
        figures: ClassVar[tuple[str, ...]] = ("identity", "quadrature")

    problem = Switched([1e-2], jumps=False)
    result = problem.solve(Claiming())
    with pytest.raises(RuntimeError, match="states were not kept"):
        result.time.backward()


def test_the_cost_of_the_other_route_is_no_cost_of_this_one() -> None:
    problem = Switched([1e-2], jumps=False)
    _, own = problem.error(OneByOne())
    _, held = problem.error(Delegating())
    assert own.stats.route == "OneByOne"
    assert own.stats.checks > own.stats.accepted
    assert held.stats.vjps is not None


def test_warnings_come_at_every_backward_pass() -> None:
    problem = Switched([1e-2], jumps=False)
    result = problem.solve(Ones())
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result.time.backward(retain_graph=True)
        assert [w.category for w in caught] == [GradientAccuracyWarning]


# --- the page -----------------------------------------------------------------------------------


def test_example_prints_what_is_printed_below_it() -> None:
    assert printed(blocks(PAGE, "python")[0], "how-to") == blocks(PAGE, "text")[0]


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_names_on_the_page_exist() -> None:
    """What the page says of a piece and of figures."""
    problem = Switched([1e-2], jumps=False).solve(StepAdjoint()).problem
    assert problem is not None
    for name in ("x0", "x_end", "velocity", "steps", "trajectory", "method", "flow", "leaves"):
        assert hasattr(problem, name), name
    pulled = set(PullBack.__dataclass_fields__)
    assert {"start", "leaves", "departure", "time", "quadrature_errors", "defect"} <= pulled
