"""How a run can end, and what its result then says and gives a gradient of."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from iterations import gradients, nonlinear, nonlinear_leaves, number
from torch import Tensor, nn

from discrete import DiscreteAdjoint, Euler, StoppingIndexResult, stopping_index
from ode_stopping import DivergedError, NotReachedError, Status


def square(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def decay(
    *, rate: float = 1.0, h: float | Tensor = 0.1, target: Any = 0.1, **keywords: Any
) -> tuple[StoppingIndexResult, Tensor, Tensor]:
    theta, x0 = number(rate), number([1.0, 2.0])
    rule = Euler(lambda t, x: -theta * x, step=h)
    return stopping_index(rule, x0, square, target, **keywords), theta, x0


class TestAtStart:
    @pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
    def test_zero_steps_and_zero_gradients(self, interpolation: Any) -> None:
        eps, t0, h = number(5.0), number(0.7), number(0.1)
        result, theta, x0 = decay(target=eps, t0=t0, h=h, interpolation=interpolation)
        assert result.status is Status.AT_START
        assert result.index == 0
        assert bool(result.reached)
        assert float(result.steps.detach()) == 0.0
        leaves = {"theta": theta, "x0": x0, "eps": eps, "t0": t0, "h": h}
        assert all(not bool(g.any()) for g in gradients(result.steps, leaves).values())
        # Not None either: a training loop over many samples steps on.
        result.steps.backward()
        assert all(leaf.grad is not None for leaf in (theta, x0, eps))

    def test_time_is_t0(self) -> None:
        t0, h = number(0.7), number(0.1)
        result, theta, x0 = decay(target=5.0, t0=t0, h=h)
        assert result.time is not None
        assert float(result.time.detach()) == 0.7
        leaves = {"theta": theta, "x0": x0, "t0": t0, "h": h}
        found = {name: float(g.sum()) for name, g in gradients(result.time, leaves).items()}
        assert found == {"theta": 0.0, "x0": 0.0, "t0": 1.0, "h": 0.0}

    def test_state_passes_through(self) -> None:
        result, _, x0 = decay(target=9.0)
        assert isinstance(result.state, Tensor)
        torch.testing.assert_close(result.state, x0, rtol=0, atol=0)
        (found,) = torch.autograd.grad((result.state * number([3.0, -1.0])).sum(), x0)
        assert found.tolist() == [3.0, -1.0]
        assert math.isnan(float(result.decrease))


class TestNotReached:
    def test_infinite_and_indexed_minus_one(self) -> None:
        result, _, _ = decay(max_steps=7)
        assert result.status is Status.NOT_REACHED
        assert result.index == -1
        assert not bool(result.reached)
        assert math.isinf(result.steps.item())
        assert result.time is not None
        assert math.isinf(result.time.item())
        assert len(result.trajectory.losses) == 8
        assert (result.best, result.best_index) == (float(result.trajectory.losses[7]), 7)
        assert "7 steps" in result.note

    def test_the_last_step_allowed_counts(self) -> None:
        full, _, _ = decay()
        assert decay(max_steps=full.index)[0].status is Status.REACHED
        assert decay(max_steps=full.index - 1)[0].status is Status.NOT_REACHED

    @pytest.mark.parametrize("of", ["steps", "time", "state"])
    def test_a_cotangent_raises_and_a_zero_one_does_not(self, of: str) -> None:
        h = number(0.1)
        result, theta, x0 = decay(h=h, max_steps=7)
        value = getattr(result, of).sum()
        with pytest.raises(NotReachedError, match="censored"):
            torch.autograd.grad(value, theta, retain_graph=True)
        masked = torch.where(result.reached, value, torch.zeros_like(value))
        for gradient in gradients(masked, {"theta": theta, "x0": x0, "h": h}).values():
            assert not bool(gradient.any())

    def test_censored(self) -> None:
        for censored, expected in ((50.0, 50.0), (50, 50.0), ("horizon", 7.0)):
            result, theta, x0 = decay(max_steps=7, censored=censored)
            assert float(result.steps.detach()) == expected
            assert result.status is Status.NOT_REACHED
            found = gradients(result.steps, {"theta": theta, "x0": x0})
            assert not any(bool(g.any()) for g in found.values())
        assert decay(censored=50.0)[0].index == decay()[0].index


class TestDiverged:
    def test_raises_with_step_and_best(self) -> None:
        with pytest.raises(DivergedError, match="step") as caught:
            decay(h=1e200, target=1e-3)
        error = caught.value
        assert error.step == 1
        assert error.best == 5.0
        assert error.time == 1e200
        assert error.result.status is Status.DIVERGED
        assert error.result.index == -1

    def test_returned_without_throw(self) -> None:
        result, theta, _ = decay(h=1e200, target=1e-3, throw=False)
        assert result.status is Status.DIVERGED
        assert math.isinf(result.steps.item())
        assert (result.best, result.best_index) == (5.0, 0)
        with pytest.raises(NotReachedError, match="DIVERGED"):
            torch.autograd.grad(result.steps, theta)

    def test_nan_is_no_hit(self) -> None:
        def update(k: int, x: Tensor) -> Tensor:
            return x if k < 3 else x * math.nan

        result = stopping_index(update, number([1.0]), square, 0.5, throw=False)
        assert result.status is Status.DIVERGED
        assert "step 4" in result.note

    @pytest.mark.parametrize("max_steps", [1_000, 5])
    def test_nan_where_the_criterion_does_not_look(self, max_steps: int) -> None:
        def update(k: int, state: Any) -> Any:
            x, v = state
            return 0.8 * x, v * math.nan if k == 3 else v

        start = number([1.0]), number([1.0])
        with pytest.raises(DivergedError, match="NaN"):
            stopping_index(
                update, start, lambda t, s: s[0].square().sum(), 1e-3, max_steps=max_steps
            )


def test_target_met_exactly() -> None:
    x0 = number([1.0])
    # 1, 1/2, 1/4: exact in binary.
    rule = Euler(lambda t, x: -x, step=0.5)
    result = stopping_index(rule, x0, lambda t, x: x.sum(), 0.25)
    assert result.index == 2
    assert result.status is Status.REACHED
    (found,) = torch.autograd.grad(result.steps, x0)
    assert float(found) == pytest.approx(0.25 / 0.25)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), None], ids=["adjoint", "none"])
@pytest.mark.parametrize("keywords", [{}, {"max_steps": 3}, {"target": 9.0}], ids=str)
def test_pickling(gradient: Any, keywords: dict[str, Any]) -> None:
    result, _, _ = decay(gradient=gradient, **keywords)
    again = pickle.loads(pickle.dumps(result))
    assert repr(again) == repr(result)
    assert str(again.to_dict()) == str(result.to_dict())  # as text: NaN is not itself
    assert again.status is result.status
    assert torch.equal(again.trajectory.losses, result.trajectory.losses)
    assert again.trajectory.indices == result.trajectory.indices
    assert not again.steps.requires_grad


def test_to_dict_and_repr() -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves)
    record = result.to_dict()
    assert record["index"] == result.index
    assert record["status"] == "REACHED"
    assert [len(piece) for piece in record["state"]] == [2, 2]
    assert record["stats"]["nfe_forward"] == result.index
    assert record["stats"]["vjps"] is None
    text = repr(result)
    assert text.startswith("StoppingIndexResult\n")
    assert f"index       {result.index}\n" in text
    assert "backward" not in text
    result.steps.backward()
    assert f"backward    {result.index} steps" in repr(result)
    assert result.stats.vjps == result.index


def test_to_dataframe_and_plot() -> None:
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    result, _, _ = decay()
    frame = result.to_dataframe()
    assert list(frame.columns) == ["step", "criterion"]
    assert frame["criterion"].tolist() == result.trajectory.losses.tolist()
    axes = result.plot()
    assert axes.get_yscale() == "log"
    matplotlib.pyplot.close(axes.figure)


@pytest.mark.parametrize("interpolation", [None, "partial_step"])
def test_second_derivatives_raise(interpolation: Any) -> None:
    result, theta, _ = decay(interpolation=interpolation)
    (first,) = torch.autograd.grad(result.steps, theta, create_graph=True)
    torch.testing.assert_close(
        first, torch.autograd.grad(result.steps, theta, retain_graph=True)[0]
    )
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(first, theta, retain_graph=True)
    # A penalty on the gradient would lose its own gradient in silence otherwise.
    with pytest.raises(RuntimeError, match="differentiated again"):
        (result.steps + first.square()).backward()


def test_no_graph_under_no_grad() -> None:
    with torch.no_grad():
        result, _, _ = decay(interpolation="hermite")
    assert not result.steps.requires_grad
    assert result.index - 1 < float(result.steps) <= result.index


def test_misses_give_closures_and_modules_a_gradient_of_zero() -> None:
    class Rate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -self.rate * x

    flow = Rate()
    result = stopping_index(
        Euler(flow, step=0.1), number([2.0]), square, 1e-9, max_steps=5, censored="horizon"
    )
    (2.0 * result.steps).backward()
    assert flow.rate.grad is not None
    assert float(flow.rate.grad) == 0.0
