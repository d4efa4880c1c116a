"""`python -m theory_checks`: hands over to `theory_checks.cli`, or says what to install."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("jinja2", "joblib", "matplotlib", "rich", "typer")


def missing() -> list[str]:
    """The packages of the extra `checks` that the command line cannot do without and that lack."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With the exit status; 2 where a package is missing.
    """
    lacking = missing()
    if lacking:
        print(
            f'theory_checks needs {", ".join(lacking)}: pip install "ode-stopping[checks]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    from .cli import make_app
    from .files import run_script

    run_script(lambda: make_app()(prog_name="python -m theory_checks"))


if __name__ == "__main__":
    main()
