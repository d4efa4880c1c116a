"""What a check is given: settings, parallel work that survives an interruption, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from .cells import MISSING, CellCache, returned
from .fingerprint import canonical, digest, function_hash, library_hash, versions
from .sealed import ForeignError

Item = TypeVar("Item")
Result = TypeVar("Result")
PROFILES = ("quick", "paper")
SHARED_CELLS = "shared"


class ProgressHook(Protocol):
    """Where a running check says how far it is; the terminal implements it."""

    def message(self, text: str) -> None:
        """Show one short line about what is going on."""

    def warning(self, text: str) -> None:
        """Show one line that has to stay: something stored is not used."""

    def step(self, done: int, total: int) -> None:
        """Show that `done` of `total` pieces of the running check are finished."""


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

    def _stored(self, key: str, kind: Any) -> Any:
        """The finished cell of this key, or `MISSING`; says so where its file is a foreign one."""
        if self.cells is None:
            return MISSING
        try:
            return self.cells.load(key, kind)
        except ForeignError as error:
            if self.hook is not None:
                self.hook.warning(f"{error}: computed anew")
            return MISSING

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`[function(item) for item in items]`, over `jobs` processes, with finished cells kept.

        A cell is computed again when anything that can change it did: the check, the settings, the
        item, the versions, the libraries, or the source of the module that defines `function`.
        Torch is seeded per cell, from the run's seed and the item, so the number of jobs and an
        interruption change no random number.

        Args:
            function: Called with one item; returns what `cells.encode` can store, dataclasses
                by its return annotation. Settings reach it through the item,
                `functools.partial` or a closure over plain data or this context.
            items: Plain data (`theory_checks.fingerprint.canonical` says what that is).

        Returns:
            The results in the order of `items`.

        Raises:
            TypeError: An item, or something bound to `function`, that no key can be made of; a
                result that cannot be stored.
            WriteError: A finished cell cannot be written; those before it are kept.
            Exception: Whatever `function` raises; cells that are finished by then are kept.
        """
        entries = list(items)
        common = digest(settings_key(self), self.check, library_hash(), function_hash(function))
        keys = [digest(common, canonical(entry)) for entry in entries]
        kind = returned(function)
        results = [self._stored(key, kind) for key in keys]
        waiting = [index for index, result in enumerate(results) if result is MISSING]
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
        context.cells.save(key, result, returned(function))
    return index, result
