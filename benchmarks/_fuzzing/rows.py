"""What is stored of a case, and what is said of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cases import Settings

GRADIENT, CRASHED = "gradient", "crashed"


@dataclass(frozen=True)
class Leaf:
    """One tensor of one gradient.

    Attributes:
        error: Relative.
        estimate: What the library says of it: its own entry where there is one, else the whole.
        norm: Of what came.
        truth: Norm of the oracle's.
        natural: Its natural size.
    """

    error: float
    estimate: float
    norm: float
    truth: float
    natural: float


@dataclass(frozen=True)
class Row:
    """What came of one case; all that is stored.

    Attributes:
        settings: Of the sample.
        number: Of the case.
        outcome: "gradient", the name of an exception of the library or of a status, "crashed: ..."
            for any other exception, or "unusable: ...", where there is nothing to compare with.
        flow: Name of the family.
        criterion: Name of the criterion.
        route: Name of the route.
        method: Method of torchdiffeq.
        dtype: Of the state.
        rtol: Tolerance.
        default: Whether that is the default of the dtype.
        promise: Relative error up to which nothing is said.
        scales: Of state, time and J.
        margin: Of the closest dip of J before T.
        slope: |J'(T)| over its terms.
        switches: How often the flow changed its formula.
        error_of_time: |T - T*| / (T* - t0).
        warned: Whether a `GradientAccuracyWarning` came in the backward pass.
        grazing: Whether one came in the forward run (a near graze).
        said: First words of the warnings or of the exception.
        leaves: By name.
        figures: Of the evidence.
        taken: Route whose gradient it is, in the end.
        cost: CPU time of value + gradient over that with evidence="light"; None: not measured.
        seconds: Of all, oracle included.
    """

    settings: Settings
    number: int
    outcome: str
    flow: str = ""
    criterion: str = ""
    route: str = ""
    method: str = ""
    dtype: str = ""
    rtol: float = math.nan
    default: bool = False
    promise: float = math.nan
    scales: tuple[float, ...] = ()
    margin: float = math.inf
    slope: float = math.nan
    switches: int = 0
    error_of_time: float = math.nan
    warned: bool = False
    grazing: bool = False
    said: str = ""
    leaves: dict[str, Leaf] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    taken: str = ""
    cost: float | None = None
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether there was something to compare with."""
        return not self.outcome.startswith("unusable")

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient came."""
        return self.outcome == GRADIENT

    @property
    def spoken(self) -> bool:
        """Whether there was any warning of the gradient."""
        return self.warned or self.grazing

    @property
    def bad(self) -> list[str]:
        """Leaves beyond the promise; a NaN counts."""
        return [name for name, leaf in self.leaves.items() if not leaf.error <= self.promise]

    @property
    def silent(self) -> list[str]:
        """Leaves that are wrong beyond promise and ten estimates, without a warning."""
        if not self.has_gradient or self.spoken:
            return []
        leaves = self.leaves
        return [name for name in self.bad if not leaves[name].error <= 10 * leaves[name].estimate]

    @property
    def good(self) -> bool:
        """A gradient all of whose leaves keep the promise."""
        return self.has_gradient and not self.bad

    @property
    def accused(self) -> bool:
        """A good gradient that was warned of."""
        return self.good and self.warned

    @property
    def verdict(self) -> str:
        """One word for the gradient."""
        if not self.has_gradient:
            crashed = "crashed" if self.outcome.startswith(CRASHED) else "refused"
            return crashed if self.usable else "unusable"
        if self.silent:
            return "silently wrong"
        if self.bad:
            return "warned" if self.spoken else "beyond the promise"
        return "accused" if self.warned else "right"

    @property
    def worst(self) -> str:
        """Name of the worst leaf."""

        def error(name: str) -> float:
            found = self.leaves[name].error
            return found if found == found else math.inf

        return max(self.leaves, key=error, default="")

    @property
    def key(self) -> str:
        """Of the settings and the number."""
        return json.dumps([asdict(self.settings), self.number], sort_keys=True)


def load(path: Path) -> dict[str, Row]:
    """Stored rows by their key; a line that was cut off is left out."""
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            held = json.loads(line)
            settings = held.pop("settings")
            for name in ("methods", "dtypes"):
                settings[name] = tuple(settings[name])
            leaves = {name: Leaf(**leaf) for name, leaf in held.pop("leaves").items()}
            scales = tuple(held.pop("scales"))
            row = Row(settings=Settings(**settings), leaves=leaves, scales=scales, **held)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        rows[row.key] = row
    return rows


def keep(path: Path, row: Row) -> None:
    """Add a row to a file, on a line of its own even where the last one was cut off."""
    with path.open("ab+") as stream:
        separator = b""
        if stream.tell() > 0:
            stream.seek(-1, 2)
            separator = b"" if stream.read(1) == b"\n" else b"\n"
        stream.write(separator + json.dumps(asdict(row)).encode() + b"\n")
