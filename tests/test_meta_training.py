"""The loop of meta-training: what it learns, logs, leaves out, and how it goes on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from meta_script import FAMILY
from torch import Tensor

from discrete.learned import LearnedSchedule, RNNprop
from discrete.learned.evaluation import evaluate
from discrete.learned.families import LeastSquaresFamily, LinearDataFamily, MixedFamily
from discrete.learned.files import read_tensors
from discrete.learned.tasks import LinearBatch, MetaTask
from discrete.learned.training import MetaLoss, MetaRecord, meta_train

SCRIPT = Path(__file__).with_name("meta_script.py")
ROOT = SCRIPT.resolve().parent.parent


def fresh() -> RNNprop:
    torch.manual_seed(0)
    return RNNprop(5)


def train(learned: RNNprop, **options: object) -> list[MetaRecord]:
    settings: dict[str, object] = {
        "steps": 6,
        "batch": 16,
        "horizon": 10,
        "segment": 5,
        "loss": MetaLoss(stopping=0.1),
        "seed": 1,
    }
    return meta_train(learned, FAMILY, **(settings | options)).records  # type: ignore[arg-type]


def bits(learned: RNNprop) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in learned.parameters()])


def numbers(records: list[MetaRecord]) -> list[dict[str, object]]:
    """All but the wall time."""
    return [{k: v for k, v in r.to_dict().items() if k != "seconds"} for r in records]


def test_a_schedule_learns_the_best_rate_of_a_quadratic() -> None:
    """One step of gradient descent on q x^2 / 2 from 1: the best rate is 1/q."""
    features = torch.full((8, 1, 1), 2.0, dtype=torch.float64)
    task = MetaTask(
        LinearBatch(features, torch.zeros(8, 1, dtype=torch.float64), loss="squares"),
        torch.ones(8, 1, dtype=torch.float64),
    )
    learned = LearnedSchedule([0.05])
    meta_train(
        learned,
        lambda count, seed: task,
        loss=MetaLoss(stopping=0.0),
        steps=400,
        batch=8,
        shards=1,
        horizon=1,
        rate=0.05,
        decay=1e-4,
    )
    assert learned.rates[0].item() == pytest.approx(0.25, rel=1e-3)


def test_training_makes_it_faster_on_problems_that_it_has_not_seen() -> None:
    learned, test = fresh(), FAMILY.draw(32, seed=99)
    before = evaluate(learned, test, horizon=40)
    meta_train(
        learned, FAMILY, steps=60, batch=16, shards=1, horizon=20, segment=10, rate=1e-2, seed=2
    )
    after = evaluate(learned, test, horizon=40)
    assert float(after.index.double().mean()) < 0.7 * float(before.index.double().mean())
    assert after.values.shape == (41, 32)
    assert after.steps.shape == (40, 32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": "through", "truncated": False, "update": "horizon"},
        {"update": "horizon", "horizon": (5, 12)},
    ],
)
def test_a_training_goes_on_as_if_it_had_not_been_stopped(
    tmp_path: Path, options: dict[str, object]
) -> None:
    whole, parts = fresh(), fresh()
    records = train(whole, **options)
    file = tmp_path / "state.safetensors"

    def stop(record: MetaRecord) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, checkpoint=file, progress=stop, **options)
    again = RNNprop(5)  # other numbers: those of the file count
    continued = train(again, checkpoint=file, **options)
    assert torch.equal(bits(whole), bits(again))
    assert numbers(records) == numbers(continued)
    # A training that has ended is read, and not done again.
    finished = RNNprop(5)
    assert len(train(finished, checkpoint=file, **options)) == 6
    assert torch.equal(bits(whole), bits(finished))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    train(fresh(), checkpoint=file, steps=1)
    with pytest.raises(ValueError, match=r"seed = 1 \(now 2\)"):
        train(fresh(), checkpoint=file, steps=1, seed=2)
    RNNprop(5).save(file)
    with pytest.raises(ValueError, match="no meta-training"):
        train(fresh(), checkpoint=file, steps=1)


def test_a_checkpoint_knows_its_data(tmp_path: Path) -> None:
    file, data = tmp_path / "state.safetensors", torch.randn(2000, 6)
    labels = torch.where(data[:, 0] > 0, 1.0, -1.0)
    options = {"steps": 1, "batch": 8, "horizon": 5, "checkpoint": file}
    meta_train(fresh(), LinearDataFamily(data, labels, 8), **options)  # type: ignore[arg-type]
    data[1000] += 1.0  # not among the rows that are printed
    with pytest.raises(ValueError, match="tasks"):
        meta_train(fresh(), LinearDataFamily(data, labels, 8), **options)  # type: ignore[arg-type]


def test_a_checkpoint_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[MetaRecord] = []
    with pytest.raises(OSError, match=r"file|directory"):
        train(fresh(), checkpoint=tmp_path / "file" / "state", progress=seen.append)
    assert seen == []


def test_the_best_on_validation_is_kept() -> None:
    learned, validation = fresh(), FAMILY.draw(16, seed=7)
    history = meta_train(
        learned,
        FAMILY,
        validation=validation,
        validate_every=1,
        steps=8,
        batch=8,
        shards=1,
        horizon=10,
        rate=0.3,  # so large that it gets worse again
        seed=3,
    )
    seen = [record.validation for record in history.records]
    assert None not in seen
    assert history.best == min(range(8), key=lambda k: seen[k] or 0.0)
    index = evaluate(learned, validation, horizon=10).index.double().mean()
    assert float(index) == min(one for one in seen if one is not None)


def test_an_update_that_is_not_finite_is_left_out() -> None:
    def tasks(count: int, seed: int) -> MetaTask:
        task = FAMILY.draw(count, seed=seed)
        x0 = task.x0.clone()
        x0[0] = float("nan")
        return MetaTask(task.objective, x0, targets=task.targets)

    learned = fresh()
    before = bits(learned)
    history = meta_train(learned, tasks, steps=2, batch=16, horizon=10, seed=4)
    assert history.skipped == 0  # one bad problem in each shard spoils nothing
    assert all(record.blown >= 0.5 for record in history.records)
    assert bool(bits(learned).isfinite().all())
    assert not torch.equal(before, bits(learned))
    with torch.no_grad():
        learned.output.weight.fill_(float("nan"))
    history = meta_train(learned, FAMILY, steps=1, batch=16, horizon=10, segment=5)
    assert history.skipped == 2


def test_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log.jsonl"
    records = train(fresh(), log=file, progress=True, steps=2)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [record.to_dict() for record in records]
    told = capsys.readouterr().err
    assert "step 2/2" in told
    assert "s left" in told


def test_horizons() -> None:
    drawn = [record.horizon for record in train(fresh(), horizon=(5, 12), steps=8)]
    assert len(set(drawn)) > 2
    assert all(5 <= one <= 12 for one in drawn)
    grown = train(fresh(), horizon=lambda step: 5 * (step + 1), steps=3)
    assert [record.horizon for record in grown] == [5, 10, 15]


def test_mixed_families() -> None:
    mixed = MixedFamily([FAMILY, LeastSquaresFamily(6, 8)])
    losses = {mixed.draw(2, seed=seed).objective.loss for seed in range(20)}  # type: ignore[attr-defined]
    assert losses == {"logistic", "squares"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 12}, "multiple of shards"),
        ({"rate": -1.0}, "rate"),
        ({"update": "never"}, "update"),
        ({"inputs": "some"}, "inputs"),
        ({"truncated": False}, 'update="horizon"'),
        ({"horizon": (9, 3)}, "horizon"),
        ({"horizon": lambda step: 0}, r"horizon\(0\)"),
        ({"loss": "f"}, "loss must be a MetaLoss"),
        ({"loss": MetaLoss(weights=[1.0])}, "every step of the horizon, 10"),
        ({"dtype": torch.int64}, "dtype"),
        ({"validation": 3}, "validation"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        train(fresh(), **options)


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        (None, "TaskFamily or a callable"),
        (lambda count, seed: 3, "must return a MetaTask"),
        (lambda count, seed: FAMILY.draw(3, seed=seed), "asked for 2 problems, and returned 3"),
    ],
)
def test_bad_tasks(tasks: object, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        meta_train(fresh(), tasks, steps=1, batch=16)  # type: ignore[arg-type]


def test_what_has_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        meta_train(fresh().requires_grad_(False), FAMILY, steps=1)
    with pytest.raises(TypeError, match="LearnedOptimizer"):
        meta_train(torch.nn.Linear(1, 1), FAMILY, steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        MixedFamily([])


def launched(*arguments: str, processes: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(SCRIPT), *arguments], env=environment)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_same_bits(tmp_path: Path, processes: int) -> None:
    one, many, again = (tmp_path / f"{name}.pt" for name in ("one", "many", "again"))
    state, half = tmp_path / "state.safetensors", tmp_path / "half.safetensors"
    alone = launched("-", str(one), "20")
    together = launched(str(state), str(many), "20", processes=processes)
    while together.poll() is None:
        # (It is renamed into its place, so that it is whole at any time.)
        if state.exists() and 0 < steps_in(shutil.copy(state, half)) < 20:
            break
        time.sleep(0.01)
    assert 0 < steps_in(half) < 20
    assert alone.wait(120) == 0
    assert together.wait(120) == 0
    # Another number of processes goes on from the middle.
    assert launched(str(half), str(again), "20").wait(120) == 0
    first, second, third = (torch.load(path) for path in (one, many, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], third[name]) for name in first)


def steps_in(file: Path) -> int:
    """How many steps a checkpoint has behind it."""
    steps: int = json.loads(read_tensors(file)[1]["numbers"])["step"]
    return steps


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_loses_nothing_but_the_step(tmp_path: Path, kills: int) -> None:
    steps = str(20 + 4 * kills)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    state = tmp_path / "state.safetensors"
    undisturbed = launched("-", str(whole), steps)
    generator = torch.Generator().manual_seed(kills)
    for _ in range(kills):
        run = launched(str(state), str(parts), steps)
        before, begin = state.stat().st_mtime_ns if state.exists() else 0, time.monotonic()
        # Not before something was done, and then at a random moment of the next steps.
        while time.monotonic() - begin < 60 and run.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(0.3 * float(torch.rand((), generator=generator)))
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert launched(str(state), str(parts), steps).wait(300) == 0
    assert undisturbed.wait(300) == 0
    first, second = torch.load(whole), torch.load(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stopping": -1.0}, "stopping must be"),
        ({"stopping": float("inf")}, "stopping must be"),
        ({"weights": [1.0, -1.0]}, r"weights\[1\]"),
        ({"largest": 0.0}, "largest must be"),
        ({"values": "square"}, "values must be"),
        ({"interpolation": "hermite"}, "interpolation must be"),
    ],
)
def test_bad_losses(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MetaLoss(**options)  # type: ignore[arg-type]


def test_no_logarithm_of_a_decrease() -> None:
    """It is negative where f rises."""

    def tasks(count: int, seed: int) -> MetaTask:
        task = FAMILY.draw(count, seed=seed)
        return MetaTask(task.objective, task.x0, "decrease", task.targets)

    with pytest.raises(ValueError, match='interpolation="log" needs'):
        meta_train(fresh(), tasks, loss=MetaLoss(interpolation="log"), steps=1, batch=8, horizon=3)
