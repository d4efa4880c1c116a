"""The table "Bad input" of the contract, row by row, for both sides.

An argument is refused at entry by an error that names it, what it got, and what to do; everything
else ends in a status or a warning. Odd input beyond the table stands at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, Heun, RungeKutta4, stopping_index
from ode_stopping import (
    DegenerateCrossingError,
    DivergedError,
    GradientFlow,
    GradientNorm,
    InterpolatingAdjoint,
    LossValue,
    Quadratic,
    Status,
    StoppingWarning,
    Torchdiffeq,
    stopping_time,
)

F64 = torch.float64
NAN, INF = math.nan, math.inf
X0 = torch.tensor([2.0, 1.0], dtype=F64)
META = torch.zeros(2, dtype=F64, device="meta")
NORM = GradientNorm(Quadratic(torch.ones(2, dtype=F64)))
BOTH, FLOW, STEPS = ("continuous", "discrete"), ("continuous",), ("discrete",)


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def solve(side: str, **changes: Any) -> Any:
    """A good call with some arguments changed; `flow` becomes Euler's on the discrete side."""
    call: dict[str, Any] = {"x0": X0, "criterion": half_square, "target": 0.1, **changes}
    flow = call.pop("flow", decay)
    if side == "continuous":
        first, function = flow, stopping_time
    else:
        first, function = call.pop("update", None) or Euler(flow, step=0.1), stopping_index
        call.setdefault("max_steps", 1000)
    return function(first, call.pop("x0"), call.pop("criterion"), call.pop("target"), **call)


def twice(t: Tensor, x: Tensor) -> Tensor:
    return half_square(t, x).expand(2)


@dataclass(frozen=True)
class Row:
    """One refusal: the row's name in the table, sides, what is changed, and what is said."""

    name: str
    sides: tuple[str, ...]
    changes: dict[str, Any] | Callable[[], Any]
    error: type[Exception]
    argument: str
    got: str
    remedy: str


def row(
    name: str, sides: tuple[str, ...], changes: Any, error: type[Exception], *words: str
) -> Row:
    return Row(name, sides, changes, error, *words)


VE, TE = ValueError, TypeError
# fmt: off
REFUSED = [
    row("non-floating x0: int", BOTH, {"x0": torch.ones(2, dtype=torch.int64)}, TE, "x0", "torch.int64", "floating-point"),  # noqa: E501
    row("non-floating x0: bool", BOTH, {"x0": torch.tensor([True])}, TE, "x0", "torch.bool", "x0.double()"),  # noqa: E501
    row("non-floating x0: complex", BOTH, {"x0": X0 + 0j}, TE, "x0", "torch.complex128", "real and imaginary"),  # noqa: E501
    row("non-floating x0: list", BOTH, {"x0": [1.0, 2.0]}, TE, "x0", "list", "torch.tensor"),
    row("non-floating x0: array", BOTH, {"x0": np.ones(2)}, TE, "x0", "ndarray", "torch.tensor"),
    row("mixed device in x0", BOTH, {"x0": (X0, META)}, VE, "x0", "meta", "one device"),
    row("mixed device: target", BOTH, {"target": META.sum()}, VE, "target", "meta", "x0.device"),
    row("mixed device: t0", BOTH, {"t0": META.sum()}, VE, "t0", "meta", "x0.device"),
    row("mixed dtype in x0", BOTH, {"x0": (X0, X0.float())}, TE, "x0", "float32, torch.float64", "one dtype"),  # noqa: E501
    row("mixed dtype: flow", FLOW, {"flow": lambda t, x: -x.float()}, TE, "flow", "torch.float32", "parameter of another dtype"),  # noqa: E501
    row("mixed dtype: update", STEPS, {"update": lambda k, x: x.float()}, TE, "update", "torch.float32", "parameter of another dtype"),  # noqa: E501
    row("wrong shape of J: (2,)", BOTH, {"criterion": twice}, VE, "criterion", "(2,)", "batched="),
    row("wrong shape of J: (1,)", BOTH, {"criterion": lambda t, x: x[:1]}, VE, "criterion", "(1,)", "scalar"),  # noqa: E501
    row("wrong shape of J: a float", BOTH, {"criterion": lambda t, x: 1.0}, TE, "criterion", "float", "0-d tensor"),  # noqa: E501
    row("wrong shape of J: None", BOTH, {"criterion": lambda t, x: None}, TE, "criterion", "NoneType", "0-d tensor"),  # noqa: E501
    row("wrong kind of J: bool", BOTH, {"criterion": lambda t, x: (x < 0.1).all()}, TE, "criterion", "torch.bool", "floating-point"),  # noqa: E501
    row("wrong kind of J: int", BOTH, {"criterion": lambda t, x: half_square(t, x).round().long()}, TE, "criterion", "torch.int64", "floating-point"),  # noqa: E501
    row("wrong kind of J: complex", BOTH, {"criterion": lambda t, x: half_square(t, x) + 0j}, TE, "criterion", "torch.complex128", "floating-point"),  # noqa: E501
    row("NaN target", BOTH, {"target": NAN}, VE, "target", "nan", "finite"),
    row("NaN target: tensor", BOTH, {"target": torch.tensor(NAN)}, VE, "target", "nan", "finite"),
    row("infinite target", BOTH, {"target": INF}, VE, "target", "inf", "finite"),
    row("infinite target: integer", BOTH, {"target": 10**400}, VE, "target", "integer", "finite"),
    row("negative target", BOTH, {"criterion": NORM, "target": -0.1}, VE, "target", "-0.1", "GradientNorm is never below 0"),  # noqa: E501
    row("negative target: tensor", BOTH, {"criterion": NORM, "target": torch.tensor(-0.5)}, VE, "target", "-0.5", "never below 0"),  # noqa: E501
    row("non-finite x0: NaN", BOTH, {"x0": torch.tensor([1.0, NAN])}, VE, "x0", "1 NaN or inf", "finite"),  # noqa: E501
    row("non-finite x0: inf in a tuple", BOTH, {"x0": (X0, X0 * INF)}, VE, "x0", "2 NaN or inf (entry 1)", "finite"),  # noqa: E501
    row("horizon before t0", FLOW, {"t0": 2.0, "max_time": 1.0}, VE, "max_time", "1", "later than t0 = 2"),  # noqa: E501
    row("horizon before t0: equal", FLOW, {"t0": 1.0, "max_time": 1.0}, VE, "max_time", "1", "later than t0 = 1"),  # noqa: E501
    row("horizon before t0: NaN", FLOW, {"max_time": NAN}, VE, "max_time", "nan", "finite"),
    row("horizon before t0: steps", STEPS, {"max_steps": -1}, VE, "max_steps", "-1", "at least 1"),
    row("horizon before t0: no steps", STEPS, {"max_steps": 0}, VE, "max_steps", "0", "at least 1"),
    row("horizon before t0: 1e6 steps", STEPS, {"max_steps": 1e6}, TE, "max_steps", "float 1000000.0", "an int"),  # noqa: E501
    row("non-finite t0", BOTH, {"t0": NAN}, VE, "t0", "nan", "finite"),
    row("direction: unknown", BOTH, {"direction": "up"}, VE, "direction", "'up'", '"falling" or "rising"'),  # noqa: E501
    row("direction: None", BOTH, {"direction": None}, VE, "direction", "NoneType", '"falling" or "rising"'),  # noqa: E501
    row("direction: either", BOTH, {"direction": "either"}, VE, "direction", "'either'", '"rising"'),  # noqa: E501
    row("leave_first: str", BOTH, {"leave_first": "no"}, TE, "leave_first", "str 'no'", "True or False"),  # noqa: E501
    row("negative target that rises", BOTH, {"criterion": NORM, "target": -0.1, "direction": "rising"}, VE, "target", "-0.1", "never be crossed"),  # noqa: E501
    row("log with eps <= 0 that rises", STEPS, {"interpolation": "log", "target": -1.0, "direction": "rising"}, VE, "interpolation", "-1", "positive target"),  # noqa: E501
    row("step <= 0: zero", STEPS, lambda: Euler(decay, step=0.0), VE, "step", "0", "positive"),
    row("step <= 0: negative", STEPS, lambda: Heun(decay, step=-0.1), VE, "step", "-0.1", "positive"),  # noqa: E501
    row("step <= 0: NaN", STEPS, lambda: RungeKutta4(decay, step=NAN), VE, "step", "nan", "finite"),
    row("step <= 0: tensor", STEPS, lambda: Euler(decay, step=torch.tensor(-1.0)), VE, "step", "-1", "positive"),  # noqa: E501
    row("log with eps <= 0", STEPS, {"interpolation": "log", "target": 0.0}, VE, "interpolation", "0", "positive target"),  # noqa: E501
    row("log with J <= 0", STEPS, {"interpolation": "log", "criterion": lambda t, x: x.sum() - 2.9}, VE, "interpolation", "J = -", "positive"),  # noqa: E501
    row("hermite without a flow", STEPS, {"interpolation": "hermite", "update": lambda k, x: 0.9 * x}, VE, '"hermite"', "function", "needs an update with a flow"),  # noqa: E501
    row("partial_step without a flow", STEPS, {"interpolation": "partial_step", "update": lambda k, x: 0.9 * x}, VE, '"partial_step"', "function", "needs an update with a flow"),  # noqa: E501
]
ODD = [
    row("x0: sparse", BOTH, {"x0": X0.to_sparse()}, TE, "x0", "sparse_coo", "to_dense()"),
    row("x0: without data", BOTH, {"x0": META}, VE, "x0", "meta", "must hold numbers"),
    row("x0: half precision", FLOW, {"x0": X0.half()}, TE, "x0", "torch.float16", "x0.float()"),
    row("target: str", BOTH, {"target": "0.1"}, TE, "target", "str '0.1'", "a float or a 0-d"),
    row("target: int tensor", BOTH, {"target": torch.tensor(1)}, TE, "target", "torch.int64", "target.double()"),  # noqa: E501
    row("target: (1, 1)", BOTH, {"target": torch.ones(1, 1)}, VE, "target", "(1, 1)", "squeeze()"),
    row("target: complex", BOTH, {"target": 0.1j}, TE, "target", "complex 0.1j", "a float or a 0-d"),  # noqa: E501
    row("t0: shape (1,)", BOTH, {"t0": torch.zeros(1)}, VE, "t0", "(1,)", "squeeze()"),
    row("criterion: a class", BOTH, {"criterion": LossValue}, TE, "criterion", "class LossValue", "LossValue(...)"),  # noqa: E501
    row("criterion: a number", BOTH, {"criterion": 0.1}, TE, "criterion", "float 0.1", "callable"),
    row("flow: a class", FLOW, {"flow": GradientFlow}, TE, "flow", "class GradientFlow", "GradientFlow(...)"),  # noqa: E501
    row("flow: returns None", FLOW, {"flow": lambda t, x: None}, TE, "flow", "NoneType", "must return tensors"),  # noqa: E501
    row("update: a class", STEPS, {"update": Euler}, TE, "update", "class Euler", "Euler(...)"),
    row("update: a flow", STEPS, {"update": GradientFlow(lambda x: x.sum())}, TE, "update", "flow GradientFlow", "Euler(flow, step=h)"),  # noqa: E501
    row("gradient: a class", FLOW, {"gradient": InterpolatingAdjoint}, TE, "gradient", "class InterpolatingAdjoint", "brackets"),  # noqa: E501
    row("gradient: a class, discrete", STEPS, {"gradient": DiscreteAdjoint}, TE, "gradient", "class DiscreteAdjoint", "gradient=DiscreteAdjoint()"),  # noqa: E501
    row("gradient: of the other side", STEPS, {"gradient": InterpolatingAdjoint()}, TE, "gradient", "InterpolatingAdjoint", "DiscreteAdjoint()"),  # noqa: E501
    row("gradient: of the other side, continuous", FLOW, {"gradient": DiscreteAdjoint()}, TE, "gradient", "DiscreteAdjoint", "GradientRoute"),  # noqa: E501
    row("solver: str", FLOW, {"solver": "dopri5"}, TE, "solver", "str 'dopri5'", "Torchdiffeq"),
    row("solver: a class", FLOW, {"solver": Torchdiffeq}, TE, "solver", "class Torchdiffeq", "brackets"),  # noqa: E501
    row("censored: a word", BOTH, {"censored": "never"}, (VE, TE), "censored", "'never'", '"horizon"'),  # type: ignore[arg-type]  # noqa: E501
    row("censored: a list", BOTH, {"censored": [1.0]}, TE, "censored", "list", '"horizon"'),
    row("censored: a tensor", BOTH, {"censored": torch.tensor(1.0)}, TE, "censored", "Tensor", '"horizon"'),  # noqa: E501
    row("params: a number in it", BOTH, {"params": [1.0]}, TE, "params", "float", "must hold tensors"),  # noqa: E501
    row("params: a tensor", BOTH, {"params": torch.ones(2, requires_grad=True)}, TE, "params", "Tensor", "list of tensors"),  # noqa: E501
    row("params: a module", BOTH, {"params": torch.nn.Linear(1, 1)}, TE, "params", "Linear", "list of tensors"),  # noqa: E501
    row("throw: a word", BOTH, {"throw": "no"}, TE, "throw", "str 'no'", "True or False"),
    row("max_time: shape (1,)", FLOW, {"max_time": torch.ones(1)}, VE, "max_time", "(1,)", "0-d"),
]
# fmt: on


@pytest.mark.parametrize(
    ("case", "side"),
    [pytest.param(r, side, id=f"{r.name} - {side}") for r in REFUSED + ODD for side in r.sides],
)
def test_refused(case: Row, side: str) -> None:
    with pytest.raises(case.error) as caught:
        case.changes() if callable(case.changes) else solve(side, **case.changes)
    text = str(caught.value)
    for word in (case.argument, case.got, case.remedy):
        assert word in text


@pytest.mark.parametrize("side", BOTH)
@pytest.mark.parametrize("target", [np.float32(0.1), np.float64(0.1), torch.tensor(0.1), 1])
def test_numbers_of_other_libraries_are_numbers(side: str, target: Any) -> None:
    result = solve(side, target=target)
    assert bool(result.reached)


class TestStatusRows:
    """J(x0) <= eps; never reached; NaN or inf on the way; tangential crossing."""

    @pytest.mark.parametrize("side", BOTH)
    @pytest.mark.parametrize("target", [2.5, 9.0])
    def test_met_at_the_start(self, side: str, target: float) -> None:
        result = solve(side, target=target, t0=0.7)
        assert result.status is Status.AT_START
        assert result.time.item() == 0.7
        assert getattr(result, "index", 0) == 0

    @pytest.mark.parametrize("side", BOTH)
    def test_never_reached(self, side: str) -> None:
        """J falls to its least value and rises again: the best J and where come with the miss."""

        def swing(t: Tensor, x: Tensor) -> Tensor:
            return (t - 1.0).square() + 3.0 + 0.0 * x.sum()

        limit = {"max_time": 4.0} if side == "continuous" else {"max_steps": 40}
        result = solve(side, criterion=swing, target=2.0, **limit)
        assert result.status is Status.NOT_REACHED
        assert result.time.item() == INF
        assert not bool(result.reached)
        assert result.best == pytest.approx(3.0, abs=0.5)
        where = result.best_time if side == "continuous" else 0.1 * result.best_index
        assert where == pytest.approx(1.0, abs=0.7)
        assert "max_time" in result.status.value
        assert "max_steps" in result.status.value

    @pytest.mark.parametrize("side", BOTH)
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("where", ["flow", "criterion"])
    def test_not_a_number_on_the_way(self, side: str, value: float, where: str) -> None:
        def flow(t: Tensor, x: Tensor) -> Tensor:
            return -x * torch.where(t > 0.35, value, 1.0)

        def criterion(t: Tensor, x: Tensor) -> Tensor:
            return half_square(t, x) + torch.where(t > 0.35, value, 0.0)

        changes = {"flow": flow} if where == "flow" else {"criterion": criterion}
        result = solve(side, **changes, throw=False)
        assert result.status is Status.DIVERGED
        assert not bool(result.reached)
        with pytest.raises(DivergedError, match="DIVERGED") as caught:
            solve(side, **changes)
        assert caught.value.time == pytest.approx(0.4, abs=0.15)
        assert caught.value.step is not None
        assert caught.value.best is not None
        assert math.isfinite(caught.value.best)

    def test_tangential_crossing(self) -> None:
        def touch(t: Tensor, x: Tensor) -> Tensor:
            return (t - 1.0).square() + 0.5 + 0.0 * x.sum()

        with pytest.raises(DegenerateCrossingError, match=r"J'\(T\) = .* scale") as caught:
            solve("continuous", criterion=touch, target=0.5)
        assert caught.value.time == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("side", BOTH)
def test_two_crossings_in_a_step_give_the_first(side: str) -> None:
    """J = cos(5 t) dips below the target five times until t = 2 pi."""
    flow = lambda t, x: torch.ones_like(x)  # noqa: E731
    result = solve(side, flow=flow, criterion=lambda t, x: torch.cos(5 * t) + 0 * x[0], target=0.3)
    first = math.acos(0.3) / 5
    if side == "continuous":
        assert result.time.item() == pytest.approx(first, rel=1e-6)
    else:
        assert result.index == math.ceil(first / 0.1)


@pytest.mark.parametrize("name", ["rounding noise of J", "tolerance below the dtype"])
def test_arithmetic_warns(name: str) -> None:
    x0 = X0.float().requires_grad_()
    changes: dict[str, Any] = {"criterion": lambda t, x: 1 + half_square(t, x), "target": 1 + 1e-5}
    if name == "tolerance below the dtype":
        changes = {"solver": Torchdiffeq(rtol=1e-9, max_steps=5), "throw": False, "gradient": None}
    expected = "rounding in torch.float32" if "noise" in name else "rtol = 1e-09 is below"
    with pytest.warns(StoppingWarning, match=expected):
        solve("continuous", x0=x0, **changes)


@pytest.mark.parametrize("side", BOTH)
@pytest.mark.parametrize("target", [1e-3, 1e-9])
def test_no_evaluation_outside_of_the_horizon(side: str, target: float) -> None:
    seen: list[float] = []
    theta = torch.tensor(3.0, dtype=F64, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return -theta / (t - 0.45) * x

    limit = {"max_time": 2.5} if side == "continuous" else {"max_steps": 20}
    result = solve(side, flow=flow, target=target, t0=0.5 + 0.1, **limit)
    if bool(result.reached):
        result.time.backward()
    assert min(seen) >= 0.6
    assert max(seen) <= 2.6


# The first use of forward mode makes PyTorch script its own decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("side", BOTH)
class TestFunctionalTransforms:
    """Refused at entry, whichever tensor is transformed: an argument or one in a closure."""

    @staticmethod
    def function(side: str, name: str) -> Callable[[Tensor], Tensor]:
        def of(value: Tensor) -> Tensor:
            theta = value if name == "theta" else torch.tensor(1.0, dtype=F64)
            phi = value if name == "phi" else torch.tensor(0.5, dtype=F64)
            changes: dict[str, Any] = {
                "flow": lambda t, x: -theta * x,
                "criterion": lambda t, x: phi * x.square().sum(),
            }
            if name == "step":
                changes["update"] = Euler(decay, step=value)
            elif name not in ("theta", "phi"):
                changes[name] = value
            return solve(side, **changes).time

        return of

    @pytest.mark.parametrize("name", ["x0", "target", "t0", "theta", "phi", "step"])
    @pytest.mark.parametrize(
        "transform", ["vmap", "grad", "jvp", "jacrev", "jacfwd", "hessian", "vjp"]
    )
    def test_name_the_batched_form(self, side: str, name: str, transform: str) -> None:
        if name == "step" and (side == "continuous" or transform == "vmap"):
            return  # no step; the rule's own check of it, before there is a call
        function = self.function(side, name)
        value = X0 if name == "x0" else torch.tensor(0.1, dtype=F64)
        calls: dict[str, Callable[[], Any]] = {
            "vmap": lambda: torch.func.vmap(function)(torch.stack([value, 1.1 * value])),
            "jvp": lambda: torch.func.jvp(function, (value,), (torch.ones_like(value),)),
            "vjp": lambda: torch.func.vjp(function, value),
        }
        default = lambda: getattr(torch.func, transform)(function)(value)  # noqa: E731
        with pytest.raises(RuntimeError, match=r"batched=.* torch\.autograd\.grad"):
            calls.get(transform, default)()

    @pytest.mark.parametrize("name", ["x0", "theta", "phi"])
    def test_forward_mode(self, side: str, name: str) -> None:
        """A tangent would be lost without a word."""
        value = X0 if name == "x0" else torch.tensor(0.7, dtype=F64)
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match="forward-mode"),
        ):
            self.function(side, name)(
                torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
            )

    def test_a_flow_may_use_them_inside(self, side: str) -> None:
        gradient = torch.func.grad(lambda x: 0.5 * x.square().sum())
        result = solve(side, flow=lambda t, x: -gradient(x), gradient=None)
        assert result.time.item() == pytest.approx(solve(side).time.item(), rel=1e-9)


@pytest.mark.parametrize("side", BOTH)
@pytest.mark.parametrize("where", ["flow", "criterion"])
@pytest.mark.parametrize("gradient", [True, False])
def test_functions_that_change_their_argument_are_refused(
    side: str, where: str, gradient: bool
) -> None:
    """In place, the state of the run itself would move: T = 6e-15 for 1.5 was seen."""
    x0 = X0.clone()

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return x.mul_(-1.0)

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return 0.5 * x.mul_(0.5).square().sum()

    changes: dict[str, Any] = {"flow": flow} if where == "flow" else {"criterion": criterion}
    if not gradient:
        changes["gradient"] = None
    with pytest.raises(ValueError, match=f"{where if side == 'continuous' else ''}.*in place"):
        solve(side, x0=x0, **changes)
    assert torch.equal(x0, X0)
