"""The gradient of meta-training against autograd through a plain loop, and against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from variants import slow_after

from discrete import stopping_index
from discrete.learned import CoordinateLSTM, LearnedOptimizer, LearnedPreconditioner, RNNprop
from discrete.learned.families import LeastSquaresFamily, LogisticFamily
from discrete.learned.tasks import MetaTask
from discrete.learned.training import MetaLoss
from discrete.learned.training import rollout as rollout_module
from discrete.learned.training.loss import cotangents
from discrete.learned.training.rollout import Rollout, gradients
from ode_stopping import GradientNorm, LossValue

DTYPE = torch.float64
HORIZON = 12


def trained(kind: str = "rnnprop") -> LearnedOptimizer:
    """One that goes down: its output is turned against the gradient by hand."""
    torch.manual_seed(3)
    learned: LearnedOptimizer
    if kind == "preconditioner":
        return LearnedPreconditioner(5, rate=0.4, rank=2)
    learned = (RNNprop(6, damping=0.5) if kind == "rnnprop" else CoordinateLSTM(6)).double()
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    task = family().draw(8, seed=77, dtype=DTYPE)
    for _ in range(60):
        update = learned.update(task.objective)
        state, total = update.initial_state(task.x0), torch.zeros((), dtype=DTYPE)
        for k in range(8):
            state = update(k, state)
            total = total + task.objective(state[0]).log().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return learned


def family(**options: object) -> LogisticFamily:
    return LogisticFamily(5, 12, ridge=0.05, targets=(0.3, 0.1), **options)  # type: ignore[arg-type]


def ours(
    learned: LearnedOptimizer,
    task: MetaTask,
    loss: MetaLoss,
    inputs: str,
    segments: tuple[int, ...],
    **options: int,
) -> tuple[float, list[Tensor], Rollout]:
    """The loss without N, the gradient of all, and the run."""
    rollout, stretches, rows, value = Rollout(learned, task), [], [], 0.0
    for count in segments:
        stretch, places = rollout.advance(count, keep=not stretches)
        share = 1.0 / len(task)
        total = sum(segments)
        part, found = cotangents(task, loss, stretch.measured, places, horizon=total, share=share)
        value += float(part)
        stretches.append(stretch)
        rows.append(found)
    found_all = gradients(learned, rollout, stretches, rows, inputs, **options)  # type: ignore[arg-type]
    return value, found_all, rollout


def plain(
    learned: LearnedOptimizer, task: MetaTask, loss: MetaLoss, inputs: str, horizon: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop as one writes it: the sum of f, the sum of the N (a surrogate with the derivative of
    the index that is asked for), and the N."""
    x = task.x0.clone()
    memory = learned.initial_memory(x)
    fs, js = [task.objective(x)], [task.measured(torch.zeros(()), x)]
    for k in range(horizon):
        point = x if inputs == "through" else x.detach().requires_grad_(True)
        with torch.enable_grad():
            if inputs == "through" and not point.requires_grad:
                point = point.requires_grad_(True)
            (g,) = torch.autograd.grad(
                task.objective(point).sum(), point, create_graph=inputs == "through"
            )
        step, memory = learned.step(k, g, memory, g.norm(dim=-1, keepdim=True))
        x = x + step
        fs.append(task.objective(x))
        js.append(task.measured(torch.zeros(()), x))
    f, j = torch.stack(fs), torch.stack(js)
    values = loss.of_values(f[1:]).sum(0).mean() / horizon
    total, numbers = torch.zeros((), dtype=DTYPE), []
    for target in task.targets.tolist():
        for b in range(len(task)):
            met = (j[:, b] <= target).nonzero()
            n = int(met[0]) if len(met) else -1
            numbers.append(n)
            if n < 1:
                continue
            if loss.interpolation == "log":
                p, q = j[n - 1, b].log(), j[n, b].log()
                total = total + (n - 1) + (p - torch.tensor(target, dtype=DTYPE).log()) / (p - q)
            else:
                # Definition 3: -dJ_N / (J_N - J_{N-1}).
                total = total - j[n, b] / (j[n, b] - j[n - 1, b]).detach()
    index = total / len(task) / len(task.targets)
    return values, loss.stopping * index, torch.tensor(numbers).reshape(len(task.targets), -1).T


def assert_same(found: list[Tensor], expected: tuple[Tensor | None, ...], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        other = torch.zeros_like(a) if b is None else b
        assert float((a - other).norm()) <= tolerance * max(float(other.norm()), 1e-3)


@pytest.mark.parametrize("kind", ["rnnprop", "l2o", "preconditioner"])
@pytest.mark.parametrize("inputs", ["detached", "through"])
@pytest.mark.parametrize("interpolation", slow_after(1, ["log", None]))
def test_the_whole_gradient_is_that_of_the_plain_loop(
    kind: str, inputs: str, interpolation: str | None
) -> None:
    learned, task = trained(kind), family().draw(6, seed=5, dtype=DTYPE)
    loss = MetaLoss(stopping=0.7, interpolation=interpolation)  # type: ignore[arg-type]
    value, found, rollout = ours(learned, task, loss, inputs, (5, 4, 3), tile=7)
    values, index, numbers = plain(learned, task, loss, inputs, HORIZON)
    assert torch.equal(rollout.outcomes.index, numbers)
    assert int((numbers > 0).sum()) >= 5
    assert value == pytest.approx(values.item(), rel=1e-12)
    expected = torch.autograd.grad(values + index, list(learned.parameters()), allow_unused=True)
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("inputs", ["detached", "through"])
def test_the_logarithm_of_f_alone(inputs: str) -> None:
    learned, task = trained(), family().draw(4, seed=6, dtype=DTYPE)
    loss = MetaLoss(stopping=0.0, values="log")
    value, found, _ = ours(learned, task, loss, inputs, (6, 6))
    values, _, _ = plain(learned, task, loss, inputs, HORIZON)
    assert value == pytest.approx(values.item(), rel=1e-12)
    expected = torch.autograd.grad(values, list(learned.parameters()), allow_unused=True)
    assert_same(found, expected, 1e-9)


def test_a_truncated_gradient_ends_at_the_start_of_its_segment() -> None:
    """What a segment gives is the whole gradient of a run that begins there."""
    learned, task = trained(), family().draw(4, seed=8, dtype=DTYPE)
    loss = MetaLoss(stopping=0.0)
    rollout = Rollout(learned, task)
    rollout.advance(5)
    stretch, places = rollout.advance(4)
    _, rows = cotangents(task, loss, stretch.measured, places, horizon=9, share=0.25)
    found = gradients(learned, rollout, [stretch], [rows], "through")
    update, memory = learned.update(task.objective), stretch.memory
    assert memory is not None
    state, total = (stretch.measured.x[0], *memory), torch.zeros((), dtype=DTYPE)
    for k in range(5, 9):
        state = update(k, state)
        total = total + task.objective(state[0]).mean() / 9
    assert_same(found, torch.autograd.grad(total, list(learned.parameters())), 1e-10)


@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_the_size_of_a_tile_does_not_matter(tile: int) -> None:
    learned, task = trained("l2o"), family().draw(4, seed=9, dtype=DTYPE)
    _, found, _ = ours(learned, task, MetaLoss(), "detached", (4, 4), tile=tile)
    _, other, _ = ours(learned, task, MetaLoss(), "detached", (8,))
    assert_same(found, tuple(other), 1e-11)


@pytest.mark.parametrize("kind", ["rnnprop", "l2o", "preconditioner"])
def test_a_graph_that_is_kept_gives_what_a_replay_gives(kind: str) -> None:
    learned, task = trained(kind), family().draw(4, seed=9, dtype=DTYPE)
    found = []
    for record in (True, False):
        rollout = Rollout(learned, task)
        rollout.advance(3)
        stretch, places = rollout.advance(5, record=record)
        assert bool(stretch.taken) is record
        assert not any(piece.requires_grad for piece in rollout.memory)
        _, rows = cotangents(task, MetaLoss(), stretch.measured, places, horizon=8, share=0.25)
        found.append(gradients(learned, rollout, [stretch], [rows], "detached"))
    assert_same(found[0], tuple(found[1]), 1e-11)


def test_a_graph_beyond_its_room_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "_GRAPH", 1000)
    rollout = Rollout(trained(), family().draw(4, seed=9, dtype=DTYPE))
    stretch, _ = rollout.advance(5, record=True)
    assert stretch.taken == ()


def test_the_index_of_one_problem_is_that_of_stopping_index() -> None:
    """The gradient of N by the whole adjoint, through the gradients of f."""
    learned = trained()
    task = family().draw(1, seed=11, dtype=DTYPE)
    task = MetaTask(task.objective, task.x0, targets=torch.tensor([0.15], dtype=DTYPE))
    loss = MetaLoss(values="none")
    _, found, rollout = ours(learned, task, loss, "through", (5, 4, 3))

    def objective(x: Tensor) -> Tensor:
        return task.objective(x.unsqueeze(0)).squeeze(0)

    update = learned.update(objective)
    criterion = GradientNorm(objective, squared=False)
    run = stopping_index(update, update.initial_state(task.x0[0]), criterion, 0.15)
    assert run.index == int(rollout.outcomes.index[0, 0]) > 1
    expected = torch.autograd.grad(run.steps, list(learned.parameters()))
    assert_same(found, expected, 1e-9)


def test_the_gradient_of_the_fractional_index_is_that_of_differences() -> None:
    learned, task = trained(), family().draw(3, seed=12, dtype=DTYPE)
    loss = MetaLoss(values="none", interpolation="log")
    _, found, _ = ours(learned, task, loss, "through", (6, 6))
    directions = [torch.randn_like(p) * 1e-6 for p in learned.parameters()]

    def index(sign: float) -> tuple[float, Tensor]:
        with torch.no_grad():
            for p, d in zip(learned.parameters(), directions, strict=True):
                p.add_(sign * d)
            _, total, numbers = plain(learned, task, loss, "detached", HORIZON)
            for p, d in zip(learned.parameters(), directions, strict=True):
                p.sub_(sign * d)
        return total.item(), numbers

    (ahead, first), (behind, second) = index(1.0), index(-1.0)
    assert torch.equal(first, second)
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert 2 * slope == pytest.approx(ahead - behind, rel=1e-4)


@pytest.mark.parametrize("criterion", ["loss", "own", "norm"])
def test_any_criterion(criterion: str) -> None:
    learned, task = trained(), family().draw(3, seed=13, dtype=DTYPE)
    objective = task.objective
    measures = {
        "loss": LossValue(objective),
        "own": lambda t, x: objective(x) + 0.1 * x.square().mean(-1),
        "norm": GradientNorm(objective),
    }
    targets = {"loss": [0.6, 0.45], "own": [0.65, 0.5], "norm": [0.05, 0.01]}
    task = MetaTask(
        objective, task.x0, measures[criterion], torch.tensor(targets[criterion], dtype=DTYPE)
    )
    loss = MetaLoss(stopping=1.0)
    _, found, rollout = ours(learned, task, loss, "detached", (6, 6))
    values, index, numbers = plain(learned, task, loss, "detached", HORIZON)
    assert torch.equal(rollout.outcomes.index, numbers)
    assert int((numbers > 0).sum()) >= 2
    expected = torch.autograd.grad(values + index, list(learned.parameters()), allow_unused=True)
    assert_same(found, expected, 1e-9)


def test_the_printed_decrease_counts_rises() -> None:
    """f_{k-1} - f_k <= 1e-5 is met by a rise; its cotangents are those of both iterates."""
    learned = trained()
    base = LeastSquaresFamily(5, 12, condition=3.0).draw(6, seed=4, dtype=DTYPE)
    task = MetaTask(base.objective, base.x0, "decrease", torch.tensor([1e-5], dtype=DTYPE))
    loss = MetaLoss(values="none")
    rollout = Rollout(learned, task)
    stretch, places = rollout.advance(40)
    f, place = stretch.measured.f, places[:, 0]
    assert int((place > 1).sum()) >= 3
    rows = torch.arange(6)
    assert torch.equal(rollout.outcomes.rises[:, 0], f[place, rows] > f[place - 1, rows])
    _, found = cotangents(task, loss, stretch.measured, places, horizon=40, share=1.0)
    for b in range(6):
        n = int(place[b])
        if n < 2:
            continue
        x = stretch.measured.x[:, b].clone().requires_grad_(True)
        own = torch.stack([task.objective(_one(row, b, 6))[b] for row in x])
        j = own[:-1] - own[1:]
        scale = (j[n - 1] - j[n - 2]).detach()
        (expected,) = torch.autograd.grad(-j[n - 1] / scale, x)
        assert torch.allclose(found[:, b], expected, rtol=1e-9, atol=1e-12)


def _one(row: Tensor, b: int, count: int) -> Tensor:
    return torch.stack([row if k == b else torch.zeros_like(row) for k in range(count)])


def test_a_run_that_leaves_the_numbers_spoils_nothing() -> None:
    learned, task = trained(), family().draw(4, seed=14, dtype=DTYPE)
    _, alone, _ = ours(learned, task, MetaLoss(), "detached", (4, 4))
    x0 = task.x0.clone()
    x0[2] = float("nan")
    spoilt = MetaTask(task.objective, x0, targets=task.targets)
    _, found, rollout = ours(learned, spoilt, MetaLoss(), "detached", (4, 4))
    assert rollout.outcomes.finite.tolist() == [True, True, False, True]
    assert rollout.outcomes.index[2].tolist() == [-1, -1]
    assert all(bool(g.isfinite().all()) for g in found)
    assert any(not torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stopping": -1.0}, "stopping"),
        ({"values": "g"}, "values"),
        ({"interpolation": "hermite"}, "interpolation"),
    ],
)
def test_bad_losses(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MetaLoss(**options)  # type: ignore[arg-type]


def test_the_index_of_a_batch_is_that_of_batched_stopping_index() -> None:
    """All problems and targets of a task, on both roads."""
    learned, task = trained(), family().draw(6, seed=5, dtype=DTYPE)
    loss = MetaLoss(values="none")
    _, found, rollout = ours(learned, task, loss, "through", (5, 4, 3))
    update, data = learned.update(task.objective), task.objective
    run = stopping_index(
        update,
        update.initial_state(task.x0),
        GradientNorm(task.objective, squared=False),
        task.targets.unsqueeze(0),
        max_steps=HORIZON,
        censored="horizon",
        batched=True,
        per_sample=[data.features, data.labels, data.transposed],  # type: ignore[attr-defined]
    )
    assert torch.equal(run.index, rollout.outcomes.index)
    # (A target that is met at the start has no derivative on either road.)
    expected = torch.autograd.grad(run.steps.mean(1).mean(), list(learned.parameters()))
    assert_same(found, expected, 1e-9)
