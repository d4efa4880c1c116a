"""The command line: `python -m theory_checks list` and `python -m theory_checks run`.

Exit status: 0 exactly when every selected check holds, 1 when one fails, 2 for bad usage, 3 when
the folder cannot be written, 130 when interrupted; whatever was finished by then is kept.
"""

from __future__ import annotations

import enum
import importlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import joblib
import torch
import typer

from . import terminal
from .context import Context
from .files import UNWRITABLE
from .registry import REGISTRY, Check, Registry
from .runner import StoppedError
from .runner import run as run_checks

INTERRUPTED = 130
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Profile(enum.StrEnum):
    """How much is computed."""

    quick = "quick"
    paper = "paper"


class Dtype(enum.StrEnum):
    """The floating type."""

    float64 = "float64"
    float32 = "float32"


def make_app(registry: Registry | None = None) -> typer.Typer:
    """The command line over `registry`; over the checks of the package where None."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Checks that the code does what the theorems say.",
    )

    @app.command("list")
    def list_() -> None:
        """List the checks: name, source, title and group."""
        terminal.show_checks(terminal.make_console(), _known(registry))

    @app.command()
    def run(
        names: Annotated[
            list[str] | None, typer.Argument(metavar="[NAME]...", help="More of what --only takes.")
        ] = None,
        profile: Annotated[
            Profile, typer.Option(help="quick: minutes. paper: the full grids of the paper.")
        ] = Profile.quick,
        only: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="A name, a group or a glob; may be repeated."),
        ] = None,
        device: Annotated[str, typer.Option(help="A device of torch, as in cuda:0.")] = "cpu",
        dtype: Annotated[Dtype, typer.Option(help="The floating type.")] = Dtype.float64,
        seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = 0,
        jobs: Annotated[
            int | None,
            typer.Option(min=1, help="Worker processes. [default: all cores; 1 off the CPU]"),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(file_okay=False, help="The report's folder. [default: reports/PROFILE]"),
        ] = None,
        fresh: Annotated[
            bool, typer.Option("--fresh", help="Reuse nothing of an earlier run in the folder.")
        ] = False,
    ) -> None:
        """Run checks and write summary.json, index.html and figures/ into a folder.

        Checks that passed in the same folder are not run again while nothing has changed that
        their results depend on: settings, versions, source.
        """
        selected = _select(_known(registry), [*(only or []), *(names or [])])
        context = Context(
            profile=profile.value,
            device=_device(device, DTYPES[dtype.value]),
            dtype=DTYPES[dtype.value],
            seed=seed,
            jobs=jobs or (joblib.cpu_count() if device == "cpu" else 1),
        )
        folder = out if out is not None else Path("reports") / profile.value
        raise typer.Exit(_run(selected, context, folder, fresh))

    return app


def _run(selected: list[Check], context: Context, out: Path, fresh: bool) -> int:
    """Run what was selected and print the results; the exit status."""
    console = terminal.make_console()
    try:
        with _terminable(), terminal.display(console) as display:
            entries = run_checks(selected, context, out, fresh=fresh, display=display)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what was finished is in {out}, and the same command goes on from there",
            soft_wrap=True,
            markup=False,
        )
        return INTERRUPTED
    except StoppedError as stopped:
        finished = [*stopped.kept, *stopped.lost]
        if finished:
            terminal.show_table(console, finished)
        typer.echo(f"{stopped}", err=True)
        return UNWRITABLE
    terminal.show_results(console, entries, out)
    return 0 if all(entry.passed for entry in entries) else 1


def _known(registry: Registry | None) -> Registry:
    """The registry to use; the package's own is filled by importing its checks."""
    if registry is not None:
        return registry
    importlib.import_module("theory_checks.checks")
    return REGISTRY


def _select(registry: Registry, patterns: list[str]) -> list[Check]:
    """The selected checks, or a usage error."""
    wanted = [part.strip() for pattern in patterns for part in pattern.split(",") if part.strip()]
    if patterns and not wanted:
        raise typer.BadParameter("it names no check", param_hint="--only")
    try:
        selected = registry.select(wanted)
    except KeyError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="--only") from None
    if not selected:
        raise typer.BadParameter("there are no checks to run", param_hint="--only")
    return selected


def _device(name: str, dtype: torch.dtype) -> torch.device:
    """The device, once it has held a number of this type and given it back."""
    try:
        device = torch.device(name)
        torch.ones(1, dtype=dtype, device=device).item()
    except Exception as error:  # torch raises several kinds, AssertionError among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise typer.BadParameter(
            f"{name!r} is not available for {str(dtype).removeprefix('torch.')}: {reason}",
            param_hint="--device",
        ) from None
    return device


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a polite kill (SIGTERM) end the run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may set handlers; elsewhere a kill is just a kill
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
