"""Every number and figure of the page "When is it wrong?" (docs/when-is-it-wrong.md).

python docs/failures             prints the tables in Markdown and draws the figures
python docs/failures --update    writes the tables into the page as well
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

from measurements import MEASUREMENTS, measured
from page import IMAGES, PAGE, written

from theory_checks.files import require_output, require_writable, run_script, write_atomically


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        prog="python docs/failures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables; default: all")
    parser.add_argument("--update", action="store_true", help="write the tables into the page")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    require_writable(IMAGES)
    if options.update:
        require_output(PAGE)
    print(f"torch {version('torch')}, torchdiffeq {version('torchdiffeq')}")
    names = options.names or list(MEASUREMENTS)
    with ProcessPoolExecutor(max_workers=options.jobs) as pool:
        for name, table in zip(names, pool.map(measured, names), strict=True):
            print(f"\n## {name}\n\n{table}", flush=True)
            if options.update:
                text = PAGE.read_text(encoding="utf-8")
                write_atomically(PAGE, written(text, name, table).encode())


if __name__ == "__main__":
    run_script(main)
