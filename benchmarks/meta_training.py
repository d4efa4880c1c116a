"""What a meta-step costs: seconds and memory over a plain loop, the whole adjoint, two processes.

    python benchmarks/meta_training.py [--rows a b c] [--repetitions 3] [--quick] [--out FILE]

float32, one thread. 64 logistic problems of the paper's size (d = 512, n = 256), RNNprop of width
30, gradients of f detached. The rows:

    a  seconds (CPU time) of two segments of 20 steps and their updates, over a plain loop of
       PyTorch with nn.LSTMCell that keeps the graph of a segment; they take turns
    b  peak memory of that above what was there before, by the kernel's high-water mark; each in a
       process of its own
    c  peak memory of the whole discrete adjoint (gradients of f differentiated through), K = 1,000
       over K = 100; one shard of 8 problems, d = 64, as a shard is what is run at a time
    d  meta-steps a second (wall time) of two processes over one
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from discrete.learned import RNNprop
from discrete.learned.draws import mixed_seed
from discrete.learned.families import LogisticFamily
from discrete.learned.tasks import MetaTask
from discrete.learned.training import MetaLoss, meta_train
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).resolve().parent / "results" / "meta_training.md"
ROWS = "abcd"
HIDDEN, PROBLEMS, SEGMENT = 30, 64, 20


class PlainRNNprop(nn.Module):
    """RNNprop as one writes it, on all coordinates of all problems at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(2, HIDDEN)
        self.cells = nn.ModuleList(nn.LSTMCell(HIDDEN, HIDDEN) for _ in range(2))
        self.output = nn.Linear(HIDDEN, 1)

    def step(
        self, k: int, g: Tensor, m: Tensor, v: Tensor, memory: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """u, m, v and the memory after a step."""
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g * g
        root = (v / (1 - 0.95 ** (k + 1))).sqrt() + 1e-8
        rows = torch.stack([g / root, m / (1 - 0.95 ** (k + 1)) / root], -1).reshape(-1, 2)
        rows = nn.functional.elu(self.inputs(rows))
        after = []
        for cell, state in zip(self.cells, memory, strict=True):
            state = cell(rows, state)
            rows = state[0]
            after.append(state)
        return 0.1 * self.output(rows).tanh().reshape(g.shape), m, v, after


def plain_step(learned: PlainRNNprop, tasks: list[MetaTask], segments: int) -> None:
    """A meta-step of truncated backpropagation, the values of f alone."""
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-3)
    data = torch.cat([task.objective.features for task in tasks])  # type: ignore[attr-defined]
    labels = torch.cat([task.objective.labels for task in tasks])  # type: ignore[attr-defined]
    x = torch.cat([task.x0 for task in tasks])
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    zeros = x.new_zeros(x.numel(), HIDDEN)
    memory = [(zeros, zeros)] * 2
    for segment in range(segments):
        x, total = x.detach(), torch.zeros(())
        memory = [(h.detach(), c.detach()) for h, c in memory]
        for k in range(segment * SEGMENT, (segment + 1) * SEGMENT):
            point = x.detach()
            slopes = -labels * torch.sigmoid(-labels * torch.einsum("bnd,bd->bn", data, point))
            g = torch.einsum("bn,bnd->bd", slopes, data) / data.shape[1] + 0.01 * point
            u, m, v, memory = learned.step(k, g, m, v, memory)
            x = x + u
            losses = nn.functional.softplus(-labels * torch.einsum("bnd,bd->bn", data, x))
            total = total + losses.mean(-1).mean() + 0.005 * x.square().sum(-1).mean()
        optimizer.zero_grad()
        (total / (segments * SEGMENT)).backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()


def drawn(dim: int, problems: int) -> list[MetaTask]:
    """The shards of a batch."""
    family = LogisticFamily(dim, dim // 2, ridge=0.01)
    return [family.draw(problems // 8, seed=shard) for shard in range(8)]


def ours_step(learned: RNNprop, tasks: list[MetaTask], segments: int) -> None:
    """The same by `meta_train`, with the stopping index besides."""
    by_seed = {mixed_seed(0, 0, 1 + shard): task for shard, task in enumerate(tasks)}
    meta_train(
        learned,
        lambda count, seed: by_seed[seed],
        loss=MetaLoss(stopping=1.0),
        steps=1,
        batch=sum(len(task) for task in tasks),
        horizon=segments * SEGMENT,
        segment=SEGMENT,
        seed=0,
    )


def seconds(action: Callable[[], object]) -> float:
    """CPU time."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


def peak_mib(action: Callable[[], object]) -> float:
    """How far the resident set rises above where it was."""
    with Path("/proc/self/clear_refs").open("w", encoding="ascii") as file:
        file.write("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    action()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"the kernel does not tell {name}")


def in_a_process(*arguments: str) -> float:
    """The last word that this script prints for these arguments."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )
    return float(done.stdout.split()[-1])


def measured(what: str, size: int) -> float:
    """One figure in a process of its own."""
    torch.manual_seed(0)
    if what == "adjoint":
        family = LogisticFamily(64, 32, ridge=0.01)
        task = family.draw(8, seed=0)
        return peak_mib(
            lambda: meta_train(
                RNNprop(20),
                lambda count, seed: task,
                steps=1,
                batch=8,
                shards=1,
                horizon=size,
                segment=SEGMENT,
                truncated=False,
                update="horizon",
                inputs="through",
            )
        )
    tasks = drawn(size, PROBLEMS)
    if what == "plain":
        plain = PlainRNNprop()
        return peak_mib(lambda: plain_step(plain, tasks, 1))
    return peak_mib(lambda: ours_step(RNNprop(HIDDEN), tasks, 1))


def training(processes: int, steps: int) -> float:
    """Wall seconds of a training, without its start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, "--train", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def train(steps: int) -> None:
    """What each process does for row d."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    family = LogisticFamily(128, 64, ridge=0.01)
    history = meta_train(RNNprop(HIDDEN), family, steps=steps + 1, horizon=40)
    if int(os.environ["RANK"]) == 0:
        print("seconds", sum(record.seconds for record in history.records[1:]), flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="d = 64 in place of 512")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(measured(options.measure[0], int(options.measure[1])))
        return
    if options.train:
        train(options.train)
        return
    if options.out is not None:
        require_output(options.out)
    dim = 64 if options.quick else 512
    table = ["| row | case | figure | bar | goal | ours, other |", "|" + " --- |" * 6]
    print(*table, sep="\n")

    def line(*cells: str) -> None:
        table.append("| " + " | ".join(cells) + " |")
        print(table[-1], flush=True)

    if "a" in options.rows:
        torch.manual_seed(0)
        tasks, plain, learned = drawn(dim, PROBLEMS), PlainRNNprop(), RNNprop(HIDDEN)
        pairs = []
        for _ in range(options.repetitions):
            mine = seconds(lambda: ours_step(learned, tasks, 2))
            pairs.append((mine, seconds(lambda: plain_step(plain, tasks, 2))))
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        line(
            "a", f"d = {dim}, 40 steps, seconds", f"{ratio:.2f}", "0.9", "0.6", f"{a:.2f}, {b:.2f}"
        )
    if "b" in options.rows:
        a, b = in_a_process("ours", str(dim)), in_a_process("plain", str(dim))
        line("b", f"d = {dim}, peak MiB", f"{a / b:.3f}", "0.25", "0.05", f"{a:.0f}, {b:.0f}")
    if "c" in options.rows:
        a, b = in_a_process("adjoint", "1000"), in_a_process("adjoint", "100")
        case = "whole adjoint, peak MiB, K = 1000 over 100"
        line("c", case, f"{a / b:.2f}", "1.5", "1.2", f"{a:.0f}, {b:.0f}")
    if "d" in options.rows:
        pairs = [(training(2, 3), training(1, 3)) for _ in range(options.repetitions)]
        speed = statistics.median(0.5 * one / two for two, one in pairs)
        two, one = (statistics.median(column) for column in zip(*pairs, strict=True))
        line(
            "d",
            "efficiency of 2 processes",
            f"{speed:.2f}",
            "0.85",
            "0.95",
            f"{two:.2f}, {one:.2f}",
        )
    if options.out is not None:
        text = [
            "# Cost of meta-training",
            "",
            f"By `python benchmarks/meta_training.py --repetitions {options.repetitions}`: "
            f"float32, one thread a process, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{platform.machine()}.",
            "",
            *table,
            "",
        ]
        write_text(options.out, "\n".join(text))


if __name__ == "__main__":
    run_script(main)
