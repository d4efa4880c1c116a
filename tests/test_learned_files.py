"""Learned optimisers in files: what comes back, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_loops import X0, quadratic, trained
from torch import Tensor, nn

from discrete.learned import (
    CoordinateLSTM,
    LearnedOptimizer,
    LearnedPreconditioner,
    LearnedSchedule,
    RNNprop,
)
from discrete.learned.files import read_tensors, write_tensors
from ode_stopping.core import files

ROOT = Path(__file__).resolve().parents[1]
Memory = tuple[Tensor, ...]


class Tied(LearnedOptimizer):
    """A class of a user's: two names for one parameter, a buffer, and options of every kind."""

    version = 3

    def __init__(self, table: dict[str, Any], flags: list[Any], name: str = "a") -> None:
        super().__init__(table=table, flags=flags, name=name)
        self.rate = nn.Parameter(torch.tensor([table["rate"]], dtype=torch.float32))
        self.same = self.rate
        self.register_buffer("seen", torch.arange(3))

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        return -(self.rate + self.same).to(gradient.dtype) * gradient, ()


class Odd(LearnedOptimizer):
    """Options that are anything."""

    def __init__(self, value: Any) -> None:
        super().__init__(value=value)

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        return -gradient, ()


def made() -> dict[str, LearnedOptimizer]:
    tied = Tied({"rate": 0.05}, [1, None, True, "b", [0.5]], name="c").double()
    with torch.no_grad():
        tied.rate.mul_(1.5)
    return {
        "schedule": LearnedSchedule([0.1, 0.2], every=3, momentum=0.5),
        "preconditioner": LearnedPreconditioner(3, rate=0.2, rank=2),
        "diagonal": LearnedPreconditioner(3),
        "lstm": trained(CoordinateLSTM),
        "rnnprop": trained(RNNprop, torch.float32),
        "half": trained(RNNprop).bfloat16(),
        "tied": tied,
    }


def state_after(learned: LearnedOptimizer, steps: int = 4) -> Tensor:
    update = learned.update(quadratic())
    state = update.initial_state(X0)
    for k in range(steps):
        state = update(k, state)
    return state[0]


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(made()))
def test_what_comes_back(name: str, tmp_path: Path) -> None:
    learned = made()[name]
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(0.01)  # not what the constructor makes
    learned.save(tmp_path / "one.safetensors")
    before = torch.random.get_rng_state()
    for kind in (type(learned), LearnedOptimizer):
        found = kind.load(str(tmp_path / "one.safetensors"))
        assert type(found) is type(learned)
        assert found.options == learned.options
        assert list(found.state_dict()) == list(learned.state_dict())
        for ours, theirs in zip(
            found.state_dict().values(), learned.state_dict().values(), strict=True
        ):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert all(p.requires_grad for p in found.parameters())
        assert torch.equal(state_after(found), state_after(learned))
    # What the constructors drew does not count.
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_parameter_under_two_names_stays_one(tmp_path: Path) -> None:
    made()["tied"].save(tmp_path / "one")
    found = Tied.load(tmp_path / "one")
    assert found.rate is found.same
    assert found.rate.dtype == torch.float64
    assert found.get_buffer("seen").dtype == torch.int64


def test_parameters_that_share_memory(tmp_path: Path) -> None:
    """Views of one tensor are saved as what they hold."""
    learned = LearnedSchedule([0.1, 0.2, 0.3])
    learned.log_rates = nn.Parameter(learned.log_rates.detach().flip(0)[::2].expand(3, 2)[0])
    found_options = {**learned.options, "rates": [0.1, 0.3]}
    learned.options.update(found_options)
    learned.save(tmp_path / "one")
    torch.testing.assert_close(
        LearnedSchedule.load(tmp_path / "one").rates, torch.tensor([0.3, 0.1]).double()
    )


def test_folders_are_made(tmp_path: Path) -> None:
    LearnedSchedule([0.1]).save(tmp_path / "a" / "b" / "c.safetensors")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["c.safetensors"]


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), torch.ones(2), [1j], X0.dtype])
def test_options_that_json_does_not_hold(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the option value of this Odd cannot be saved: it is"):
        Odd(value).save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Counting(Odd):
        def get_extra_state(self) -> int:
            return 3

        def set_extra_state(self, state: int) -> None: ...

    with pytest.raises(TypeError, match="the state _extra_state of this Counting"):
        Counting(1).save(tmp_path / "one")


def test_another_class(tmp_path: Path) -> None:
    LearnedSchedule([0.1]).save(tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"one holds a LearnedSchedule, and no RNNprop: read it by Learned"
    ):
        RNNprop.load(tmp_path / "one")


def altered(path: Path, **about: str) -> Path:
    """The file with something else said about it."""
    tensors, said = read_tensors(path)
    write_tensors(tensors, {**said, **about}, path)
    return path


def test_unknown_class_and_version(tmp_path: Path) -> None:
    path = tmp_path / "one"
    made()["tied"].save(path)
    with pytest.raises(ValueError, match="one is of version 2, and this Tied reads version 3"):
        LearnedOptimizer.load(altered(path, version="2"))
    with pytest.raises(ValueError, match="holds a Gone, which is not known here: import"):
        LearnedOptimizer.load(altered(path, version="3", **{"class": "Gone"}))


def test_no_learned_optimiser(tmp_path: Path) -> None:
    write_tensors({"a": torch.ones(2)}, {}, tmp_path / "bare")
    with pytest.raises(ValueError, match="bare holds no learned optimiser"):
        RNNprop.load(tmp_path / "bare")
    (tmp_path / "text").write_text("not at all")
    with pytest.raises(ValueError, match="text is no safetensors file, or half of one"):
        RNNprop.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        RNNprop.load(tmp_path / "none")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_half_a_file(share: float, tmp_path: Path) -> None:
    path = tmp_path / "one"
    trained(RNNprop).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="one is no safetensors file, or half of one"):
        RNNprop.load(path)


def test_missing_and_further_tensors(tmp_path: Path) -> None:
    path = tmp_path / "one"
    trained(RNNprop).save(path)
    tensors, about = read_tensors(path)
    tensors.pop("output.bias")
    write_tensors(tensors, about, path)
    with pytest.raises(RuntimeError, match=r"output\.bias"):
        RNNprop.load(path)


# --- Kills ----------------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one"
    LearnedSchedule([0.1]).save(path)
    order: list[str] = []
    sync = os.fsync

    def synced(descriptor: int) -> None:
        order.append("fsync")
        sync(descriptor)

    def fails(*names: object) -> None:
        order.append("replace")
        raise OSError("no")

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="no"):
        LearnedSchedule([0.7]).save(path)
    monkeypatch.undo()
    assert order == ["fsync", "replace"]
    assert LearnedSchedule.load(path).options["rates"] == [0.1]
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


WRITER = """
import sys, torch
from pathlib import Path
from discrete.learned.files import write_tensors
path, k = Path(sys.argv[1]), 0
while True:
    k += 1
    write_tensors({"a": torch.full((200_000,), float(k))}, {"k": str(k)}, path)
    if k == 1:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "one"
    for delay in (0.0, 0.013, 0.029, 0.051, 0.083):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        tensors, about = read_tensors(path)
        assert torch.equal(tensors["a"], torch.full((200_000,), float(about["k"])))


# --- Without the extra ----------------------------------------------------------------------------

HIDDEN = """
import sys
sys.modules["safetensors"] = None
sys.modules["safetensors.torch"] = None
import torch, discrete.learned as learned
from ode_stopping import LossValue, Quadratic
rule = learned.LearnedSchedule([0.1])
f = Quadratic(torch.ones(2, dtype=torch.float64))
update = rule.update(f)
print(update(0, update.initial_state(torch.ones(2, dtype=torch.float64)))[0].tolist())
for use in (lambda: rule.save("x"), lambda: learned.LearnedSchedule.load("x")):
    try:
        use()
    except ImportError as error:
        print(error)
"""


def test_without_safetensors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps, saving, loading = done.stdout.splitlines()
    assert json.loads(steps) == [0.9, 0.9]
    assert saving == 'saving and loading needs safetensors: pip install "ode-stopping[learn]"'
    assert loading == saving
    assert not (ROOT / "x").exists()


def test_import_loads_no_safetensors() -> None:
    code = "import sys, discrete.learned; print('safetensors' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
