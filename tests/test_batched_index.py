"""`stopping_index(batched=True)` is what a Python loop of single calls gives, sample by sample."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from batches import (
    F64,
    FAMILIES,
    Family,
    distance,
    drawn,
    gradients,
    logistic,
    momentum,
    number,
    pieces,
    quadratics,
    require_equal_runs,
)
from torch import Tensor

from discrete import DiscreteAdjoint, stopping_index
from ode_stopping import Status

# Whole graph; checkpoints and replay; chunks of three steps from few checkpoints.
ROUTES = {
    "graph": DiscreteAdjoint(),
    "replay": DiscreteAdjoint(memory=1500),
    "chunks": DiscreteAdjoint(memory=900, chunk=3),
}


def require_equal_gradients(
    family: Family, found: Any, right: list[Any], *, cotangents: bool = True
) -> None:
    """dN of each sample to 1e-12 |J_N| / |J_N - J_(N-1)|; then all of them at once, with states."""
    wanted = family.wanted
    total, totals = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    worst = 1.0
    for sample, one in enumerate(right):
        loss = one.trajectory.losses[int(one.index)]
        condition = max(1.0, abs(float(loss / one.decrease)))
        worst = max(worst, condition)
        single, own = gradients(one.steps, wanted), gradients(found.steps[sample], wanted)
        scale = max(float(g.abs().max()) for g in single)
        for a, b in zip(own, single, strict=True):
            assert float((a - b).abs().max()) <= 1e-12 * condition * scale
        for place, piece in enumerate(pieces(one.state)):
            weight = drawn(*piece.shape, seed=10 + sample, grad=False)
            total = total + (weight * piece).sum() + (sample + 1) * one.steps
            theirs = pieces(found.state)[place][sample]
            totals = totals + (weight * theirs).sum() + (sample + 1) * found.steps[sample]
    for a, b in zip(gradients(totals, wanted), gradients(total, wanted), strict=True):
        assert distance(a, b) <= 1e-12 * worst


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("interpolation", [None, "log"])
def test_batch_is_the_loop_of_single_calls(name: str, interpolation: Any) -> None:
    family = FAMILIES[name]()
    right = family.singles(interpolation=interpolation)
    assert len({one.index for one in right}) > 2
    for declared in (False, True):
        found = family.batch(declared=declared, interpolation=interpolation)
        require_equal_runs(found, right)
        require_equal_gradients(family, found, right)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("build", [quadratics, logistic, momentum])
@pytest.mark.parametrize("declared", [False, True])
def test_every_way_back_gives_one_gradient(build: Any, route: str, declared: bool) -> None:
    family = build()
    right = family.singles()
    found = family.batch(declared=declared, gradient=ROUTES[route])
    require_equal_gradients(family, found, right)
    assert (found.stats.nfe_backward == 0) == (route == "graph")


@pytest.mark.parametrize("route", ROUTES)
def test_dropping_changes_nothing_but_the_cost(route: str) -> None:
    family = quadratics(count=9)
    dropped, full = (family.batch(declared=d, gradient=ROUTES[route]) for d in (True, False))
    assert dropped.row_steps < full.row_steps
    assert torch.equal(dropped.index, full.index)
    assert distance(dropped.state, full.state) <= 1e-12
    weights = drawn(9, seed=8, grad=False)
    for a, b in zip(
        gradients((weights * dropped.steps).sum(), family.wanted),
        gradients((weights * full.steps).sum(), family.wanted),
        strict=True,
    ):
        assert distance(a, b) <= 1e-12


def test_samples_that_have_stopped_cost_nothing_once_a_quarter_has() -> None:
    rows: list[int] = []
    rates = number([0.9] * 3 + [0.5] * 3 + [0.02] * 2)

    def update(k: int, x: Tensor) -> Tensor:
        rows.append(len(x))
        return x - rates[:, None] * x

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return x.square().sum(-1)

    x0 = torch.ones(8, 2, dtype=F64)
    found = stopping_index(
        update, x0, criterion, 1e-2, batched=True, per_sample=[rates], gradient=None
    )
    ends = found.index.tolist()
    # Computed by the definition: of the rows in the computation those leave that are over, when
    # they are a quarter of it.
    expected, inside = 0, list(ends)
    for k in range(max(ends)):
        alive = [n for n in inside if n > k]
        if len(alive) <= 0.75 * len(inside):
            inside = alive
        expected += len(inside)
    assert found.row_steps == expected < 8 * max(ends)
    run = rows[-max(ends) :]
    assert sum(run) == expected
    assert run[0] == 8
    assert run[-1] == 2
    rows.clear()
    whole = stopping_index(update, x0, criterion, 1e-2, batched=True, gradient=None)
    assert set(rows) == {8}
    assert whole.row_steps == 8 * max(ends)
    assert torch.equal(whole.index, found.index)


def test_one_backward_pass_costs_what_the_longest_sample_costs() -> None:
    found = quadratics(count=9).batch(gradient=DiscreteAdjoint(memory=10**6, chunk=8))
    found.steps.sum().backward()
    assert found.stats.vjps == int(found.index.max())
    assert found.stats.nfe_backward == int(found.index.max())


def test_a_batch_of_one() -> None:
    for build in (quadratics, momentum):
        family = build(count=1)
        right = family.singles()
        for declared in (False, True):
            found = family.batch(declared=declared)
            assert found.index.shape == (1,)
            require_equal_runs(found, right)
            require_equal_gradients(family, found, right)


def test_permuted_samples_give_permuted_results() -> None:
    family = quadratics(count=8)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    leaves = {
        name: leaf[order].detach().requires_grad_() if name in ("c", "x0") else leaf
        for name, leaf in family.leaves.items()
    }
    moved = Family(family.build, leaves, family.own, family.target)
    for declared in (False, True):
        first, second = family.batch(declared=declared), moved.batch(declared=declared)
        assert torch.equal(first.index[order], second.index)
        assert torch.equal(first.state[order], second.state)
        weights = drawn(8, seed=9, grad=False)
        one = gradients((weights * first.steps).sum(), list(family.leaves.values()))
        two = gradients((weights[order] * second.steps).sum(), list(leaves.values()))
        for name, a, b in zip(leaves, one, two, strict=True):
            assert distance(a[order] if name in ("c", "x0") else a, b) <= 1e-13


@pytest.mark.parametrize("shape", ["()", "(B,)", "(1, K)", "(B, K)"])
@pytest.mark.parametrize("declared", [False, True])
def test_targets_of_every_shape(shape: str, declared: bool) -> None:
    family, count = quadratics(count=5), 5
    steps = torch.arange(count, dtype=F64)
    target = {
        "()": number(0.02),
        "(B,)": (0.01 * (1 + steps)).requires_grad_(),
        # In no order, and one that some samples have met at the start.
        "(1, K)": number([[0.02, 1.5, 1e-4]]),
        "(B, K)": (0.003 * (1 + steps)[:, None] * number([[1.0, 0.3]])).detach().requires_grad_(),
    }[shape]
    family = Family(family.build, family.leaves, family.own, target)
    right = family.singles()
    found = family.batch(declared=declared)
    require_equal_runs(found, right)
    weights = drawn(*found.steps.shape, seed=12, grad=False)
    loss = torch.stack([(w * one.steps).sum() for w, one in zip(weights, right, strict=True)]).sum()
    parts = drawn(*found.state.shape, seed=13, grad=False)
    loss = loss + sum((p * one.state).sum() for p, one in zip(parts, right, strict=True))
    same = (weights * found.steps).sum() + (parts * found.state).sum()
    for a, b in zip(gradients(same, family.wanted), gradients(loss, family.wanted), strict=True):
        assert distance(a, b) <= 1e-11


def test_rising_and_leaving_first() -> None:
    # J oscillates on its way down: it starts below the target, rises above it, and falls again.
    phases = number([0.1, 0.4, 0.25, 0.33])

    def build(leaves: Any) -> Any:
        omega = leaves["omega"]

        def update(k: int, state: Any) -> Any:
            x, v = state
            v = v - 0.1 * omega[..., None] * x
            return x + 0.1 * v, v

        start = leaves["x0"], torch.ones_like(leaves["x0"])
        return update, lambda t, state: state[0].square().sum(-1), start, {}

    leaves = {"x0": phases.detach()[:, None].clone().requires_grad_(), "omega": phases}
    family = Family(build, leaves, ("omega",), number(0.2))
    for options in ({"direction": "rising"}, {"leave_first": True}, {}):
        right = family.singles(**options)
        assert any(one.index > 0 for one in right) == bool(options)
        for declared in (False, True):
            found = family.batch(declared=declared, **options)
            require_equal_runs(found, right)
            loss = torch.stack([one.steps for one in right]).sum()
            one, two = gradients(loss, family.wanted), gradients(found.steps.sum(), family.wanted)
            assert all(distance(a, b) <= 1e-11 for a, b in zip(two, one, strict=True))


def test_states_at_given_steps() -> None:
    family, at = quadratics(count=6), (4, 0, 11, 11, 20)
    right = family.singles(at=at)
    for declared in (False, True):
        for route in ROUTES.values():
            found = family.batch(declared=declared, at=at, gradient=route)
            states = torch.stack([one.states_at for one in right], dim=1)
            assert distance(found.states_at, states) <= 1e-12
            known = torch.isfinite(states)
            assert bool(known.any())
            assert not bool(known.all())
            weights = drawn(*states.shape, seed=14, grad=False)
            loss = (weights * states)[known].sum()
            same = (weights * found.states_at)[known].sum()
            for a, b in zip(
                gradients(same, family.wanted), gradients(loss, family.wanted), strict=True
            ):
                assert distance(a, b) <= 1e-12


def test_states_of_more_than_one_axis_and_of_none() -> None:
    rate = number([0.1, 0.2, 0.4])

    def update(k: int, x: Any) -> Any:
        return tuple(p - rate.reshape(-1, *(1,) * (p.ndim - 1)) * p for p in x)

    def one(k: int, x: Any) -> Any:
        return tuple(p - rate[1] * p for p in x)

    def criterion(t: Tensor, x: Any) -> Tensor:
        a, b = x
        return a.square().sum((-1, -2)) + b.square()

    x0 = drawn(3, 2, 2, seed=15), drawn(3, seed=16)
    found = stopping_index(update, x0, criterion, 1e-3, batched=True, per_sample=[rate])
    right = stopping_index(one, (x0[0][1], x0[1][1]), criterion, 1e-3)
    assert found.state[0].shape == (3, 2, 2)
    assert found.state[1].shape == (3,)
    assert int(found.index[1]) == right.index
    wanted = [rate, *x0]
    for a, b in zip(gradients(found.steps[1], wanted), gradients(right.steps, wanted), strict=True):
        assert distance(a, b) <= 1e-12


def test_one_number_is_read_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _plain: Any = plain) -> Any:
            nonlocal reads
            reads += 1
            return _plain(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    family = quadratics(count=16)
    per_run: dict[int, tuple[int, int]] = {}
    for steps in (40, 80):
        reads = 0
        found = family.batch(gradient=None, max_steps=steps, throw=False)
        per_run[steps] = reads, len(found.trajectory.losses)
    (first, short), (second, long) = per_run[40], per_run[80]
    # What a run reads besides is the same for both.
    assert second - first <= long - short


def test_what_is_returned_can_be_printed_kept_and_tabulated() -> None:
    family = quadratics(count=4)
    found = family.batch(declared=True)
    assert "REACHED (4)" in repr(found)
    kept = pickle.loads(pickle.dumps(found))
    assert torch.equal(kept.index, found.index)
    assert kept.status == [Status.REACHED] * 4
    described = found.to_dict()
    assert described["index"] == found.index.tolist()
    assert described["status"] == ["REACHED"] * 4
    assert described["best"] == found.best.tolist()
    table = pytest.importorskip("pandas") and found.to_dataframe()
    assert list(table) == ["step", *(f"criterion_{i}" for i in range(4))]
    states = found.trajectory.states
    assert states.shape == (len(found.trajectory.indices), 4, 3)
    for sample, one in enumerate(family.singles()):
        own = one.trajectory.states
        assert distance(states[: len(own), sample], own) <= 1e-12
        assert bool(states[len(own) :, sample].isnan().all())
