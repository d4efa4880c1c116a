"""What a batch refuses, and the planted errors that its checks must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import F64, Leaves, drawn, gradients, number, quadratics
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, StepDecrease, Truncated, Unrolled, stopping_index
from ode_stopping import (
    GradientAccuracyWarning,
    GradientError,
    KinkWarning,
    MissingGradientError,
    NotReproducibleError,
    StoppingWarning,
)
from ode_stopping.core.coupling import refuse_coupling
from ode_stopping.core.rows import Rows
from ode_stopping.core.samples import Samples
from ode_stopping.core.status import Status

X0 = torch.tensor([[1.0, 0.5], [2.0, 1.0], [0.7, -1.0], [1.5, 0.2], [0.9, 0.9]], dtype=F64)


def shrink(k: int, x: Tensor) -> Tensor:
    return 0.8 * x


def square(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum(-1)


def square_of(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def call(**options: Any) -> Any:
    given = {"update": shrink, "x0": X0, "criterion": square, "target": 1e-2, "batched": True}
    given.update(options)
    return stopping_index(
        given.pop("update"), given.pop("x0"), given.pop("criterion"), given.pop("target"), **given
    )


# --- samples that depend on each other ----------------------------------------------------------

COUPLED_UPDATES: dict[str, Callable[[int, Tensor], Tensor]] = {
    "mean over the batch": lambda k, x: 0.8 * x + 1e-6 * x.mean(0),
    "norm of the batch": lambda k, x: x - 0.2 * x / x.norm().clamp(min=1.0),
    "the neighbour above": lambda k, x: 0.8 * x + 0.01 * x.roll(1, 0),
    "one on the last alone": lambda k, x: torch.cat([0.8 * x[:-1], 0.8 * x[-1:] * x[:1].abs()]),
    "the last on the one before": lambda k, x: torch.cat([0.8 * x[:3], x[3:4] * x[4:], x[4:] / 2]),
}


@pytest.mark.parametrize("name", COUPLED_UPDATES)
@pytest.mark.parametrize("gradient", [None, DiscreteAdjoint()])
def test_an_update_that_couples_samples_is_refused(name: str, gradient: Any) -> None:
    with pytest.raises(ValueError, match="update couples the samples"):
        call(update=COUPLED_UPDATES[name], gradient=gradient)


def test_a_criterion_that_couples_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="criterion couples the samples"):
        call(criterion=lambda t, x: x.square().sum(-1) / x.square().sum())


@pytest.mark.parametrize("count", [2, 3, 5, 8, 9])
def test_any_pair_is_found(count: int) -> None:
    rows = drawn(count, 2, seed=30, grad=False)
    refuse_coupling(lambda x: torch.sin(x), rows, name="update")
    for one in range(count):
        for other in range(count):
            if one == other:
                continue

            def pair(x: Tensor, one: int = one, other: int = other) -> Tensor:
                moved = torch.zeros_like(x)
                moved[one] = 1e-7 * x[other]
                return torch.sin(x) + moved

            with pytest.raises(ValueError, match=f"gives sample {one} changes"):
                refuse_coupling(pair, rows, name="update")


def test_a_coupling_that_comes_later_is_found_before_a_gradient() -> None:
    rate = number(0.8)

    def update(k: int, x: Tensor) -> Tensor:
        return rate * x + (1e-4 * x.mean(0) if k > 3 else 0.0)

    with pytest.raises(ValueError, match="update couples the samples"):
        call(update=update)


def test_rows_that_are_not_declared_are_refused() -> None:
    first, second = drawn(5, seed=31), number([0.5, 0.6, 0.7, 0.8, 0.75])

    def update(k: int, x: Tensor) -> Tensor:
        return second[:, None] * x + 0.0 * first[:, None]

    with pytest.raises(ValueError, match=r"update does not give .* per_sample does not name"):
        call(update=update, per_sample=[first])
    with pytest.raises(ValueError, match=r"update does not give .* random numbers"):
        call(update=update, per_sample=())
    assert call(update=update, per_sample=[first, second]).row_steps < call(update=update).row_steps


def test_nothing_to_declare_is_a_declaration() -> None:
    whole, dropped = call(), call(per_sample=())
    assert torch.equal(whole.index, dropped.index)
    assert dropped.row_steps < whole.row_steps


# --- derivatives that are wrong -----------------------------------------------------------------


class Planted(torch.autograd.Function):
    """The identity with a derivative that is 10 % off where the row is told to be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wrong: Tensor) -> Tensor:
        ctx.save_for_backward(wrong)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (wrong,) = ctx.saved_tensors
        return cotangents[0] * (1.0 + 0.1 * wrong[:, None]), None


def planted(where: Callable[[int], Tensor]) -> Any:
    def build(leaves: Leaves) -> Any:
        c, lr = leaves["c"], leaves["lr"]

        def update(k: int, x: Tensor) -> Tensor:
            return x - lr * c * Planted.apply(x, where(k).to(F64))

        return update, lambda t, x: (c * x * x).sum(-1) / 2, leaves["x0"], {}

    return replace(quadratics(count=6), build=build)


@pytest.mark.parametrize("wrong", [torch.ones(6), torch.eye(6)[2]], ids=["all", "one sample"])
def test_a_planted_error_is_caught_before_a_gradient(wrong: Tensor) -> None:
    with pytest.raises(MissingGradientError, match="update"):
        planted(lambda k: wrong).batch()
    # By the same road without an error there is nothing to catch.
    planted(lambda k: torch.zeros(6)).batch().steps.sum().backward()


@pytest.mark.parametrize("memory", [2**26, 1500])
def test_a_planted_error_in_some_steps_is_caught_by_the_difference(memory: int) -> None:
    family = planted(lambda k: torch.eye(6)[2] * (3 <= k < 9))
    route = DiscreteAdjoint(memory=memory)
    found = family.batch(gradient=route)
    with pytest.warns(GradientAccuracyWarning, match="x0"):
        found.steps.sum().backward()
    # "light" asks for no difference: what it would have seen is not there.
    family.batch(gradient=route, evidence="light").steps.sum().backward()


def test_a_lost_derivative_of_one_parameter_is_named() -> None:
    c, lr = drawn(4, 2, seed=32, grad=False).abs() + 0.5, number(0.3)

    def update(k: int, x: Tensor) -> Tensor:
        rate = lr.detach() if 2 <= k < 6 else lr
        return x - rate * c * x

    found = call(update=update, x0=X0[:4], per_sample=[c])
    with pytest.warns(GradientAccuracyWarning, match=r"moving .*lr"):
        found.steps.sum().backward()


def test_a_criterion_without_its_derivative_is_refused() -> None:
    weight = number(1.0)
    with pytest.raises(MissingGradientError, match="criterion"):
        call(
            criterion=lambda t, x: (x.detach() ** 2).sum(-1) * weight,
            x0=X0.clone().requires_grad_(),
        )


def test_a_tensor_that_no_traced_evaluation_used_is_found() -> None:
    # Used in some middle steps only: the graphs of the run know it, and so do kept states.
    rate, late = number(0.8), number(0.9)

    def update(k: int, x: Tensor) -> Tensor:
        return (late if k in (4, 5) else rate) * x

    right = [stopping_index(update, x, square, 1e-2) for x in X0]
    loss = torch.stack([one.steps for one in right]).sum()
    for memory in (2**26, 600):
        found = call(update=update, gradient=DiscreteAdjoint(memory=memory))
        for a, b in zip(
            gradients(found.steps.sum(), [rate, late]), gradients(loss, [rate, late]), strict=True
        ):
            assert torch.isclose(a, b, rtol=1e-12)


def test_a_replay_that_differs_is_refused() -> None:
    factor, rate = [0.8], number(1.0)

    def update(k: int, x: Tensor) -> Tensor:
        return rate * factor[0] * x

    found = call(update=update, gradient=DiscreteAdjoint(chunk=4))
    factor[0] = 0.79
    with pytest.raises(NotReproducibleError):
        found.steps.sum().backward(retain_graph=True)
    # Of the states alone no value of J is asked that could differ.
    with pytest.raises(NotReproducibleError, match="replaying the update"):
        found.state.sum().backward()


def test_a_criterion_that_has_changed_is_refused() -> None:
    factor, rate = [1.0], number(0.8)
    found = call(update=lambda k, x: rate * x, criterion=lambda t, x: factor[0] * square(t, x))
    factor[0] = 1.1
    with pytest.raises(NotReproducibleError, match="criterion gave"):
        found.steps.sum().backward()


def test_a_stochastic_update_is_refused() -> None:
    rate = number(0.8)
    with pytest.raises(NotReproducibleError, match="update"):
        call(update=lambda k, x: rate * x + 1e-3 * torch.rand_like(x))
    # Of the index alone nobody asks that it can be run again.
    call(update=lambda k, x: rate * x + 1e-3 * torch.rand_like(x), gradient=None)


def test_second_derivatives_raise() -> None:
    family = quadratics(count=3)
    found = family.batch()
    (gradient,) = torch.autograd.grad(found.steps.sum(), [family.leaves["lr"]], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.backward()


# --- criteria without a derivative --------------------------------------------------------------


def test_a_piecewise_constant_criterion_raises_in_the_backward_pass() -> None:
    rate = number(0.8)
    found = call(
        update=lambda k, x: rate * x,
        criterion=lambda t, x: (10 * square(t, x)).ceil() / 10 + 0 * x.sum(-1),
        target=0.15,
    )
    assert bool(found.reached.all())
    with pytest.raises(GradientError, match="piecewise constant"):
        found.steps.sum().backward()


def test_jumps_and_kinks_are_warned_of_by_sample() -> None:
    rate = number(0.8)

    def jumps(t: Tensor, x: Tensor) -> Tensor:
        return square(t, x) + (x[:, 0] > 0.5)

    with pytest.warns(StoppingWarning, match=r"sample 0 and \d others: the criterion jumps"):
        call(update=lambda k, x: rate * x, criterion=jumps, target=0.9)

    def kink(t: Tensor, x: Tensor) -> Tensor:
        return torch.maximum(x[:, 0].abs(), x[:, 1].abs())

    with pytest.warns(KinkWarning, match="sample 4: the criterion has a kink"):
        call(update=lambda k, x: rate * x, criterion=kink, target=0.1)


def test_a_start_within_the_rounding_of_its_target() -> None:
    x0 = torch.tensor([[1.0, 0.0], [0.1 * (1 + 1e-15), 0.0]], dtype=F64)
    rates = torch.tensor([0.8, 1.2], dtype=F64)
    with pytest.warns(StoppingWarning, match="leave_first=True"):
        call(
            update=lambda k, x: rates[:, None] * x,
            x0=x0,
            target=0.01,
            max_steps=20,
            gradient=None,
        )


# --- what is refused by name --------------------------------------------------------------------


@pytest.mark.parametrize("route", [Unrolled(), Truncated(steps=2)])
def test_other_routes(route: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"DiscreteAdjoint.*{type(route).__name__}"):
        call(gradient=route)


@pytest.mark.parametrize("name", ["hermite", "partial_step"])
def test_interpolations_that_need_a_flow(name: Any) -> None:
    with pytest.raises(NotImplementedError, match="interpolation"):
        call(update=Euler(lambda t, x: -x, step=0.1), interpolation=name)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x0 without samples": ({"x0": torch.tensor(1.0, dtype=F64)}, "x0 must have the samples"),
    "pieces of two lengths": ({"x0": (X0, X0[:2])}, "x0 must have as many samples"),
    "a target for others": ({"target": number([0.1, 0.2, 0.3])}, r"target must have .*\(3,\)"),
    "targets for others": ({"target": number([[0.1], [0.2]])}, r"target must have .*\(2, 1\)"),
    "no target": ({"target": torch.zeros(1, 0, dtype=F64)}, r"target must have .*\(1, 0\)"),
    "a target that is NaN": ({"target": number([[0.1, float("nan")]])}, "target must be finite"),
    "a target twice": ({"target": number([[0.1, 0.2, 0.1]])}, "a value twice; got 0.1"),
    "a scalar criterion": ({"criterion": lambda t, x: x.sum()}, r"one value a sample.*\(5,\)"),
    "an update of one row": ({"update": lambda k, x: x[:1]}, r"update must return .*\(1, 2\)"),
    "a t0 for each": ({"t0": torch.zeros(5, dtype=F64)}, "t0 must be a 0-d"),
    "rows of another length": ({"per_sample": [X0[:2]]}, r"per_sample\[0\] must have .*\(2, 2\)"),
    "rows without a batch": ({"per_sample": [X0], "batched": False}, "per_sample .* batched"),
    "log of a negative J": (
        {"criterion": lambda t, x: square(t, x) - 0.05, "interpolation": "log"},
        "stays positive",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_a_step_decrease_of_a_batch_needs_its_mark() -> None:
    criterion = StepDecrease(square_of)
    with pytest.raises(ValueError, match=r"x0 must have shape \(B, n"):
        criterion.initial_state(X0[:, 0], batched=True)
    with pytest.raises(TypeError, match="wrap"):
        call(criterion=criterion, x0=(X0, X0), update=lambda k, x: (0.8 * x[0], x[1]))
    start = criterion.initial_state(X0)  # a single mark for all
    with pytest.raises(ValueError, match="entry 1 is 0-d"):
        call(update=criterion.wrap(shrink), criterion=criterion, x0=start)


def test_bad_types_are_named() -> None:
    for options, message in (
        ({"per_sample": X0}, "per_sample must be a list"),
        ({"per_sample": [1.0]}, r"per_sample\[0\] must be a tensor"),
        ({"target": torch.ones(5, dtype=torch.long)}, "target must be floating"),
        ({"criterion": lambda t, x: 1.0}, "criterion must return a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            call(**options)


def test_an_update_that_changes_x_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="in place"):
        call(update=lambda k, x: x.mul_(0.8))


# --- the record ---------------------------------------------------------------------------------


def test_the_record_of_samples_by_itself() -> None:
    start = torch.arange(6, dtype=F64).reshape(3, 2)
    everyone = Rows(3)
    record = Samples.at_start(start, 2)
    met = torch.tensor([[True, False], [False, False], [True, True]])
    now, before = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 5.0, 6.0]).double()
    later = record.with_hits(7, everyone, met, (now, before), (start + 1, start))
    assert record.index.tolist() == [[-1, -1]] * 3
    assert later.index.tolist() == [[7, -1], [-1, -1], [7, 7]]
    assert later.decrease.nan_to_num().tolist() == [[-3.0, 0.0], [0.0, 0.0], [-3.0, -3.0]]
    some = everyone.keeping(torch.tensor([0, 1]))
    ended = torch.tensor([False, True])
    last = later.with_ends(9, some, ended, Status.DIVERGED, start[:2] + 5)
    assert last.ended.tolist() == [0, 9, 0]
    assert last.state[1].tolist() == [[7.0, 8.0]] * 2
    assert last.state[0].tolist() == [[1.0, 2.0], [0.0, 1.0]]
    assert last.statuses()[1] == [Status.DIVERGED] * 2
    assert last.statuses()[2] == [Status.REACHED] * 2
    losses = torch.tensor([[3.0, torch.nan, 1.0], [2.0, torch.nan, 4.0]])
    assert last.with_best(losses).best_index.tolist() == [1, 0, 0]
    assert last.with_best(losses).best.isnan().tolist() == [False, True, False]
