"""What a check is given: settings, parallel work that survives an interruption, progress."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from .fingerprint import canonical, digest, function_hash, library_hash, versions

Item = TypeVar("Item")
Result = TypeVar("Result")
PROFILES = ("quick", "paper")
SHARED_CELLS = "shared"
_MISSING = object()


class ProgressHook(Protocol):
    """Where a running check says how far it is; the terminal implements it."""

    def message(self, text: str) -> None:
        """Show one short line about what is going on."""

    def step(self, done: int, total: int) -> None:
        """Show that `done` of `total` pieces of the running check are finished."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either its old or its new content, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class CellCache:
    """Finished cells of `Context.map`, one file each below `folder`.

    Attributes:
        folder: Where the files are.
        reuse: False to compute everything anew (and overwrite what is there).
    """

    folder: Path
    reuse: bool = True

    def load(self, key: str) -> Any:
        """The result stored under `key`, or `_MISSING`; an unreadable file counts as missing."""
        if not self.reuse:
            return _MISSING
        try:
            with (self.folder / f"{key}.pickle").open("rb") as stream:
                return pickle.load(stream)
        except (
            Exception
        ):  # a truncated or foreign pickle can raise anything; computing anew is safe
            return _MISSING

    def save(self, key: str, result: Any) -> None:
        """Store `result` under `key`."""
        write_atomically(self.folder / f"{key}.pickle", pickle.dumps(result))


@dataclass(frozen=True)
class Context:
    """The settings of a run, handed to every check.

    Attributes:
        profile: "quick" or "paper".
        device: Where tensors are to live.
        dtype: The floating type of the tensors.
        seed: Of every random choice; `torch.manual_seed(seed)` was called before the check.
        jobs: Worker processes of `map`.
        check: The name of the running check.
        cells: Where `map` keeps finished cells; None keeps nothing.
        hook: The progress display; None shows nothing.
    """

    profile: str = "quick"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64
    seed: int = 0
    jobs: int = 1
    check: str = ""
    cells: CellCache | None = None
    hook: ProgressHook | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {PROFILES}, got {self.profile!r}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")

    def __getstate__(self) -> dict[str, Any]:
        """What travels to a worker: no display, and no workers of its own."""
        return {**self.__dict__, "hook": None, "jobs": 1}

    @property
    def __cache_key__(self) -> str:
        """What of the context can change a result; used where a cell's function closes over it."""
        return settings_key(self)

    def choose(self, *, quick: Result, paper: Result) -> Result:
        """`quick` or `paper`, by profile."""
        return quick if self.profile == "quick" else paper

    def shared(self) -> Context:
        """This context with the cell folder that checks have in common, for `map`.

        Two checks that map one function over equal items then compute each of them once.
        """
        if self.cells is None:
            return self
        folder = self.cells.folder.parent / SHARED_CELLS
        return replace(self, check=SHARED_CELLS, cells=replace(self.cells, folder=folder))

    def progress(self, message: str) -> None:
        """Show one short line about what the check is doing."""
        if self.hook is not None:
            self.hook.message(message)

    def step(self, done: int, total: int) -> None:
        """Show that `done` of `total` pieces are finished; `map` calls it by itself."""
        if self.hook is not None:
            self.hook.step(done, total)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`[function(item) for item in items]`, over `jobs` processes, with finished cells kept.

        A cell is computed again when anything that can change it did: the check, the settings, the
        item, the versions, the libraries, or the source of the module that defines `function`.
        Torch is seeded per cell, from the run's seed and the item, so the number of jobs and an
        interruption change no random number.

        Args:
            function: Called with one item; what it returns has to be picklable. Settings reach
                it through the item, `functools.partial` or a closure over plain data or this
                context.
            items: Plain data (`theory_checks.fingerprint.canonical` says what that is).

        Returns:
            The results in the order of `items`.

        Raises:
            TypeError: An item, or something bound to `function`, that no key can be made of.
            Exception: Whatever `function` raises; cells that are finished by then are kept.
        """
        entries = list(items)
        common = digest(settings_key(self), self.check, library_hash(), function_hash(function))
        keys = [digest(common, canonical(entry)) for entry in entries]
        results: list[Any] = [
            _MISSING if self.cells is None else self.cells.load(key) for key in keys
        ]
        waiting = [index for index, result in enumerate(results) if result is _MISSING]
        if self.cells is not None and len(waiting) < len(entries):
            self.progress(f"{len(entries) - len(waiting)} of {len(entries)} cells reused")
        done = len(entries) - len(waiting)
        self.step(done, len(entries))
        tasks = [(self, function, index, entries[index], keys[index]) for index in waiting]
        for index, result in _in_parallel(tasks, min(self.jobs, len(tasks))):
            results[index] = result
            done += 1
            self.step(done, len(entries))
        return results


def settings_key(context: Context) -> str:
    """The settings and versions that enter every key."""
    return digest(
        context.profile,
        str(context.device),
        str(context.dtype),
        str(context.seed),
        canonical(versions()),
    )


def _in_parallel(tasks: list[tuple[Any, ...]], jobs: int) -> Iterable[tuple[int, Any]]:
    """Run the cells, yielding (index, result) as they finish."""
    if jobs <= 1:
        return (_cell(*task) for task in tasks)
    import joblib

    runner = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", pre_dispatch="2*n_jobs")
    return runner(joblib.delayed(_worker_cell)(*task) for task in tasks)


def _worker_cell(*task: Any) -> tuple[int, Any]:
    """A cell in a process of its own, where one thread each keeps jobs from fighting for cores."""
    torch.set_num_threads(1)
    return _cell(*task)


def _cell(
    context: Context, function: Callable[[Any], Any], index: int, item: Any, key: str
) -> tuple[int, Any]:
    """Compute one cell, and store it at once: a later interruption must not cost it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(digest(str(context.seed), canonical(item))[:12], 16))
        result = function(item)
    if context.cells is not None:
        context.cells.save(key, result)
    return index, result
