"""The page on learned optimisers: its examples run as printed, one after the other."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from pages import blocks, missing_targets, printed_in_turn

import discrete.learned
from discrete import stopping_index
from discrete.learned import LearnedOptimizer, LearnedSchedule, MetaLoss, families
from ode_stopping import LossValue, Quadratic

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-learned-optimizers.md"
# What the example for several processes takes from those before it.
SETTING = """\
import torch
from discrete.learned import RNNprop, meta_train
from discrete.learned.families import LogisticFamily

family = LogisticFamily(8, 12, ridge=0.05, targets=(0.3, 0.1, 0.03))
"""


def test_examples_print_what_is_printed_below_them() -> None:
    assert printed_in_turn(PAGE) == blocks(PAGE, "text")


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_every_class_is_in_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE))
    kinds = {
        name
        for name in discrete.learned.__all__
        if isinstance(kind := getattr(discrete.learned, name), type)
        and issubclass(kind, LearnedOptimizer)
        and kind is not LearnedOptimizer
    }
    assert named == kinds


def test_no_single_rate_is_as_fast() -> None:
    f = Quadratic(torch.tensor([1.0, 10.0], dtype=torch.float64))
    x0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    fastest = float("inf")
    for rate in torch.linspace(0.1, 0.2, 100)[:-1].tolist():
        update = LearnedSchedule([rate]).update(f)
        start = update.initial_state(x0)
        run = stopping_index(update, start, LossValue(f), 1e-3, interpolation="log", gradient=None)
        fastest = min(fastest, float(run.steps))
    assert fastest > 16


def test_every_family_and_every_option_of_the_loss_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    kinds = [getattr(families, name) for name in families.__all__]
    named = {kind.__name__ for kind in kinds if kind is not families.TaskFamily}
    assert {name for name in named if f"`{name}`" not in text} == set()
    options = {field.name for field in dataclasses.fields(MetaLoss)}
    assert options == set(re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE))


def test_two_processes_print_what_one_does(tmp_path: Path) -> None:
    """The example for torchrun, started by it."""
    code = next(one for one in blocks(PAGE, "python") if one.startswith("# train.py"))
    script = tmp_path / "train.py"
    script.write_text(f"{SETTING}\n{code}", encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in blocks(PAGE, "text")
