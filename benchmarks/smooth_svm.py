"""The race on the smooth SVM: every method, at the best setting of its grid, over many starts.

Data: LIBSVM's a1a, a2a, a3a, w3a where the environment variable ODE_STOPPING_DATA names their
folder, and two sets that come with scikit-learn. The rules are those of the check `figure-6`
(theory_checks/smooth_svm), whose paper profile shows the same study in a report.

    python benchmarks/smooth_svm.py [--data FOLDER [--download]] [--seeds N] [--jobs N]
        [--keep FOLDER] [--figures FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from ode_stopping.problems import libsvm
from theory_checks.cells import CellCache
from theory_checks.context import Context
from theory_checks.files import (
    WriteError,
    require_output,
    require_writable,
    run_script,
    write_atomically,
    write_text,
)
from theory_checks.plotting import style, to_png
from theory_checks.registry import Table
from theory_checks.smooth_svm.figures import draw_profiles, draw_rates, draw_traces
from theory_checks.smooth_svm.methods import METHODS, available_methods
from theory_checks.smooth_svm.problems import GIVEN_SEED, LIBSVM, available, seeds_of
from theory_checks.smooth_svm.race import HORIZON, TOLERANCE
from theory_checks.smooth_svm.study import (
    Study,
    collect,
    grid_table,
    profile,
    ratio_in_words,
    tuned_table,
)

RESULTS = Path(__file__).parent / "results" / "smooth_svm.md"
RULES = f"""\
Iterations until the gradient's max-norm is below {TOLERANCE:g} (the check counts), at most
{HORIZON}, over {{starts}} starts of length 1. A method takes the setting of its grid that is best
for the data set in the median over the same starts that are reported: by iterations, or by f - f*
at the end where the median run misses. Intervals of medians are those of order statistics, those of
ratios of a paired bootstrap, both at the chosen setting. A miss is infinite and never left out; a
run has diverged where f ends above where it began. GD, heavy ball, NAG and NAG-SC are those of the
paper's study, at 1/L. Algorithm 2 as printed has the settings of the paper's Table 1, which were
chosen for the LIBSVM sets (elsewhere: a1a's). Adam-OLA has its defaults everywhere, chosen on the
LIBSVM sets from 24 other starts and the given one, which is one of these (breast cancer and digits
had no part in that). An iteration of L-BFGS may take several evaluations, one of schedule-free Adam
takes gradients elsewhere than the result is, one with K = 3 two products with the Hessian; NAG is
judged at its look-ahead points. Seconds are medians to the tolerance or the horizon, and depend on
the machine's load."""
BY_RATE = ("Adam", "Adam-OLA", "Adam-OLA, printed", "Adam-OLA, K = 3")


class Progress:
    """How far the study is, on the terminal."""

    def message(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr)

    def warning(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr)

    def step(self, done: int, total: int) -> None:
        """Show every tenth of the way."""
        if total and (done * 10) // total > ((done - 1) * 10) // total:
            print(f"{done} of {total} cells", file=sys.stderr)


def markdown(table: Table) -> list[str]:
    """A table of the report as Markdown."""

    def shown(entry: object) -> str:
        return f"{entry:.2g}" if isinstance(entry, float) else str(entry)

    lines = [f"### {table.title}", "", f"| {' | '.join(table.columns)} |"]
    lines.append(f"|{' --- |' * len(table.columns)}")
    lines += [f"| {' | '.join(shown(entry) for entry in row)} |" for row in table.rows]
    return [*lines, "", *([table.note, ""] if table.note else [])]


def summary(study: Study) -> list[str]:
    """One line a data set and the shares of the performance profiles."""
    pairs = [("Adam-OLA", "Adam"), ("Adam-OLA, finer", "Adam, finer")]
    pairs = [(mine, other) for mine, other in pairs if {mine, other} <= set(study.methods)]
    lines = []
    if pairs:
        head = [f"{mine} over {other}" for mine, other in pairs]
        lines += [f"| data | {' | '.join(head)} | Adam-OLA diverged | Adam diverged |"]
        lines += [f"|{' --- |' * (len(pairs) + 3)}"]
    for data in study.data if pairs else ():
        told = [ratio_in_words(study, data, mine, other) for mine, other in pairs]
        lost = [study.diverged(data, method) for method in pairs[0]]
        row = [data, *told, *(f"{n} of {total}" for n, total in lost)]
        lines.append(f"| {' | '.join(row)} |")
    found = profile(study)
    lines += ["", "| method | fastest on | converges on | within twice the fastest on |"]
    lines.append("| --- | --- | --- | --- |")
    twice = (found.ratios <= 2.0).mean(axis=0)
    for i, method in enumerate(study.methods):
        shares = (found.wins[i], found.solved[i], twice[i])
        lines.append(f"| {method} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |")
    return [*lines, ""]


def main() -> None:
    """Run the study, write the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12, help="starts")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=None, help="some of them only")
    parser.add_argument("--keep", type=Path, help="a folder for finished cells, to go on from")
    parser.add_argument("--figures", type=Path, help="a folder for pictures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--data", type=Path, help="the folder with LIBSVM's files")
    parser.add_argument("--download", action="store_true", help="fetch what is not in it")
    options = parser.parse_args()
    require_output(options.out)
    for folder in (options.keep, options.figures):
        if folder is not None:
            require_writable(folder)
    begin = time.perf_counter()
    if options.data is not None:
        os.environ["ODE_STOPPING_DATA"] = str(options.data)
    if options.download:
        if os.environ.get("ODE_STOPPING_DATA"):
            require_writable(Path(os.environ["ODE_STOPPING_DATA"]).expanduser())
        for name in LIBSVM:
            libsvm(name, download=True)
    cells = None if options.keep is None else CellCache(options.keep / "smooth-svm")
    context = Context(profile="paper", jobs=options.jobs, cells=cells, hook=Progress())
    seeds = seeds_of(options.seeds)
    try:
        study = collect(context, available(), options.methods or available_methods(), seeds)
    except WriteError as error:
        kept = f"{error.reason}; finished cells are kept in {options.keep}"
        raise WriteError(error.path, kept) from error
    absent = [name for name, method in METHODS.items() if not method.available]
    by_rate = [method for method in BY_RATE if method in study.methods]
    lines = [
        "# The race on the smooth SVM",
        "",
        f"`python benchmarks/smooth_svm.py --seeds {options.seeds}` on "
        f"{platform.processor() or platform.machine()}, {options.jobs} jobs of one thread, Python "
        f"{platform.python_version()}, torch {version('torch')}.",
        "",
        RULES.format(starts=options.seeds)
        + (f" Not installed: {', '.join(absent)}." if absent else ""),
        "",
        *summary(study),
        *(line for name in study.data for line in markdown(tuned_table(study, name))),
        *(line for name in study.data for line in markdown(grid_table(study, name, by_rate))),
    ]
    write_text(options.out, "\n".join(lines))
    if options.figures is not None:
        with style():
            pictures = {"profiles": draw_profiles(profile(study), study.methods)}
            pictures["by-rate"] = draw_rates(study, by_rate[:3])
            for name in study.data:
                pictures[f"traces-{name.replace(' ', '-')}"] = draw_traces(study, name, GIVEN_SEED)
        for name, picture in pictures.items():
            write_atomically(options.figures / f"{name}.png", to_png(picture))
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
