"""Planted errors: each is one line of the library changed, and the tests have to notice.

    python benchmarks/mutations.py [--only N ...] [--jobs 2] [--out mutations.md]

Every error is planted in a copy of the packages, and the tests named beside it are run there until
the first of them fails; first of all they have to pass with nothing planted. One that survives is a
hole in the suite. The exit status is 1 if any does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from joblib import Parallel, delayed

from theory_checks.files import require_output, run_script, write_text

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("ode_stopping", "discrete", "theory_checks", "tests", "benchmarks", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """One line, changed.

    Attributes:
        file: Where it stands, from the root of the repository.
        before: What stands there; it occurs exactly once.
        after: What is planted.
        tests: Files under `tests/` that are to notice.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def _in(file: str, *planted: tuple[str, str], tests: str) -> list[Mutation]:
    return [Mutation(file, before, after, tuple(tests.split())) for before, after in planted]


G = "ode_stopping/gradients"
D = "discrete/gradients"
MUTATIONS = [
    *_in(
        f"{G}/quotient.py",
        ("scale = -(on_state @ crossing", "scale = (on_state @ crossing"),
        ("@ crossing.velocity + on_time)", "@ crossing.velocity)"),
        ("return on_state + scale * crossing.gradient", "return scale * crossing.gradient"),
        ("0.5 * dt.square() * acceleration", "dt.square() * acceleration"),
        ("for _ in range(2):\n        # On a kink", "for _ in range(1):\n        # On a kink"),
        tests="test_closed_forms.py test_second_derivatives.py test_several_targets.py "
        "test_step_adjoint.py",
    ),
    *_in(
        f"{G}/steps.py",
        ("self._time + by_shift, self", "self._time - by_shift, self"),
        ("lams.append(jump.cotangent)", "lams.append(2 * jump.cotangent)"),
        ("mass = self._lam @ (after.f0 - before.f1)", "mass = self._lam @ (after.f1 - before.f1)"),
        ("(torch.stack(inner) * errors).sum()", "0.0 * (torch.stack(inner) * errors).sum()"),
        ("residual = products.sum() + self._time", "residual = products.sum()"),
        ("if pulled.departure is None or pulled", "if True or pulled"),
        ("gap <= 100 * torch.finfo(gaps.dtype).eps * size", "gap <= size"),
        tests="test_step_adjoint.py test_step_adjoint_limits.py test_switching_times.py "
        "test_each_figure.py test_refinement.py",
    ),
    *_in(
        f"{G}/backward.py",
        ("targets[k] = -scale", "targets[k] = scale"),
        ("a + b for a, b in zip(pulled.leaves", "a for a, b in zip(pulled.leaves"),
        ("t0 = -_start_rate(", "t0 = _start_rate("),
        ("[-masses.get(b, 0.0) for b", "[masses.get(b, 0.0) for b"),
        tests="test_closed_forms.py test_several_targets.py test_switching_times.py "
        "test_refinement.py",
    ),
    *_in(
        f"{G}/refinement.py",
        ("factor = 2.0**order - 1.0", "factor = 2.0 ** (2 * order)"),
        ("if max(errors, default=0.0) <= _BELIEVED", "if max(errors, default=0.0) >= _BELIEVED"),
        ("return self.result(self._found, [inf]", "return self.result(self._found, [0.0]"),
        ("returned = other if replaces", "returned = self._found if replaces"),
        ("size = max(size, FLOOR * natural)", "size = max(size, 1e9 * natural)"),
        tests="test_refinement.py test_lost_derivatives.py test_evidence.py",
    ),
    *_in(
        f"{G}/regridded.py",
        ("moved = ends[-1] - start - residual", "moved = ends[-1] - start + residual"),
        ("times[:-1:2], times[-1]", "times[:-1], times[-1]"),
        ("for t in (a, 0.5 * (a + b))]", "for t in (a, a + 0.1 * (b - a))]"),
        tests="test_refinement.py",
    ),
    *_in(
        f"{G}/directional.py",
        ("return -(hit.watch.criterion.value", "return (hit.watch.criterion.value"),
        (
            "self._given.before[self._row] @ before)",
            "0 * (self._given.before[self._row] @ before))",
        ),
        tests="test_lost_derivatives.py",
    ),
    *_in(
        f"{G}/directional.py",
        ("state = state - late * velocity", "state = state + 0.0 * velocity"),
        ("plain(event.time + late, state)", "plain(event.time, state)"),
        tests="test_integrate.py test_event_rules.py",
    ),
    *_in(
        f"{G}/chain.py",
        ("lam = self._lam + self._after(self._row)", "lam = self._lam"),
        ("self._lam = pulled.state", "self._lam = lam"),
        ("self._tau + pulled.time", "self._tau + 0.0 * pulled.time"),
        ("times[-1] += extra[0]", "times[-1] += 0.0 * extra[0]"),
        ("states[-1] += extra[1]", "states[-1] += 2.0 * extra[1]"),
        ("self._tau - (lam @ point.velocity)", "self._tau + (lam @ point.velocity)"),
        tests="test_integrate.py test_event_rules.py test_public_examples.py",
    ),
    *_in(
        "ode_stopping/crossing/transitions.py",
        ("again = replace(watch, leave=", "again = replace(watch, leave=None and "),
        ("(watch.event, watch.index))", "(-watch.event, watch.index))"),
        tests="test_event_rules.py",
    ),
    *_in(
        "ode_stopping/core/directional.py",
        ("if together == 0.0:", "if together >= 0.0:"),
        ("if k in moved else tensor", "if k in moved[:1] else tensor"),
        tests="test_lost_derivatives.py test_lost_derivatives_discrete.py",
    ),
    *_in(
        f"{G}/jumps.py",
        ("_carried(problem, step, shift) - step.f1", "_carried(problem, step, shift) - step.f0"),
        ("velocity = torch.where(before >= after", "velocity = torch.where(before < after"),
        ("near > _JUMP * jump and near", "near < _JUMP * jump and near"),
        tests="test_jumps_in_the_state.py test_moved_jumps.py",
    ),
    *_in(
        f"{G}/kinks.py",
        ("point.time - aside, point.state - aside", "point.time + aside, point.state + aside"),
        ("if not abs(far) > allowed:", "if abs(far) > allowed:"),
        tests="test_kinks.py",
    ),
    *_in(
        f"{G}/evidence.py",
        ('names += ["quadrature", "time_term", "noise"]', 'names += ["quadrature", "noise"]'),
        ("estimate <= self.promise:\n            return", "estimate <= 1e9:\n            return"),
        tests="test_evidence.py test_each_figure.py",
    ),
    *_in(
        "ode_stopping/crossing/point.py",
        ("delay = -float(crossing.gradient @ state_error)", "delay = 0.0 * float(crossing.rate)"),
        ("@ self.velocity) + self.explicit_rate", "@ self.velocity)"),
        tests="test_each_figure.py test_closed_forms.py",
    ),
    *_in(
        f"{G}/backward_solve.py",
        ("self._difference + difference", "self._difference"),
        ("value[z.time] += mass", "value[z.time] -= mass"),
        tests="test_each_figure.py test_breakpoints.py test_switching_times.py",
    ),
    *_in(
        f"{D}/index.py",
        ("n - 1 + s, excess, log1p(", "n + s, excess, log1p("),
        ("excess = (1 - s) * before + s * after", "excess = s * before + (1 - s) * after"),
        ("index, excess, accurate_decrease", "index, excess, -accurate_decrease"),
        ("dp, dq = float((h * da).detach())", "dp, dq = float(da.detach())"),
        tests="test_index.py test_fractional.py",
    ),
]


def planted(mutation: Mutation, folder: Path) -> None:
    """A copy of the repository with the error in it.

    Raises:
        ValueError: The line is not there, or there more than once.
    """
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    place = folder / mutation.file
    text = place.read_text()
    if text.count(mutation.before) != 1:
        raise ValueError(
            f"{mutation.file} holds {mutation.before!r} {text.count(mutation.before)} times, not "
            "once: the list is to be brought up to date"
        )
    write_text(place, text.replace(mutation.before, mutation.after))


def killed(mutation: Mutation) -> tuple[bool, float]:
    """Whether a test fails, and the seconds that it took."""
    begin = perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted(mutation, folder)
        tests = [str(Path("tests") / test) for test in mutation.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, check=False
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
    return done.returncode == 1, perf_counter() - begin


def table(numbers: list[int], results: list[tuple[bool, float]]) -> str:
    """Markdown."""
    lines = ["| | file | line | planted | noticed after, s |", "| --- | --- | --- | --- | --- |"]
    for number, (noticed, seconds) in zip(numbers, results, strict=True):
        one = MUTATIONS[number]
        texts = [text.replace("|", "\\|").replace("\n", " ") for text in (one.before, one.after)]
        outcome = f"{seconds:.0f}" if noticed else "**survived**"
        lines.append(f"| {number} | `{one.file}` | `{texts[0]}` | `{texts[1]}` | {outcome} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the list")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out is not None:
        require_output(options.out)
    numbers = options.only or list(range(len(MUTATIONS)))
    results = []
    sound = {MUTATIONS[n].tests: replace(MUTATIONS[n], after=MUTATIONS[n].before) for n in numbers}
    for tests, (fails, _) in zip(
        sound, Parallel(n_jobs=options.jobs)(map(delayed(killed), sound.values())), strict=True
    ):
        if fails:
            raise SystemExit(f"with nothing planted a test fails in {', '.join(tests)}")
    found = Parallel(n_jobs=options.jobs, return_as="generator")(
        delayed(killed)(MUTATIONS[n]) for n in numbers
    )
    for number, (noticed, seconds) in zip(numbers, found, strict=True):
        results.append((noticed, seconds))
        verdict = "noticed" if noticed else "SURVIVED"
        print(f"{number}: {verdict} after {seconds:.0f} s, {MUTATIONS[number].file}", flush=True)
    survived = sum(not noticed for noticed, _ in results)
    text = f"# Planted errors\n\nBy `benchmarks/mutations.py`: {len(numbers)}, of which {survived} "
    text += f"survived.\n\n{table(numbers, results)}\n"
    print(text)
    if options.out is not None:
        write_text(options.out, text)
    raise SystemExit(1 if survived else 0)


if __name__ == "__main__":
    run_script(main)
