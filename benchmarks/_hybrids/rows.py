"""What is stored of a problem, and what is said of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

GRADIENT, CRASHED, OTHER, ORACLE = "gradient", "crashed", "other hits", "oracle only"


@dataclass(frozen=True)
class Leaf:
    """One tensor of one gradient.

    Attributes:
        error: Relative.
        estimate: What the library says of it: its own entry where there is one, else the whole.
        norm: Of what came.
        truth: Norm of the oracle's.
        natural: Its natural size.
        clear: The oracle's own relative error.
    """

    error: float
    estimate: float
    norm: float
    truth: float
    natural: float
    clear: float


@dataclass(frozen=True)
class Row:
    """What came of one problem; all that is stored.

    Attributes:
        seed: Of the sample.
        number: Of the problem.
        evidence: Level of the evidence.
        chosen: Family or route that was not drawn, or "".
        outcome: "gradient", the name of an exception of the library, "other hits", "crashed: ..."
            for any other exception, "oracle only", or "unusable: ...", where there is nothing to
            compare with.
        family: Of the problem.
        route: Name of the route.
        method: Method of torchdiffeq.
        rtol: Tolerance.
        default: Whether that is the default, and is not passed.
        promise: Relative error up to which nothing is said.
        scales: Of state, time and J.
        hits: How many.
        status: How the run ended.
        error_of_value: |L - L*| over the sum of its terms' sizes.
        warned: Whether a `GradientAccuracyWarning` came in the backward pass.
        told: Whether one, or a `KinkWarning`, came in the forward run.
        said: First words of the warnings or of the exception.
        leaves: By name; those of which the oracle is clear to a tenth of the promise.
        unclear: Names of the others.
        dropped: Why earlier draws of this number were thrown away.
        oracle_seconds: Of the oracle.
        seconds: Of all.
    """

    seed: int
    number: int
    evidence: str
    chosen: str
    outcome: str
    family: str = ""
    route: str = ""
    method: str = ""
    rtol: float = math.nan
    default: bool = False
    promise: float = math.nan
    scales: tuple[float, ...] = ()
    hits: int = 0
    status: str = ""
    error_of_value: float = math.nan
    warned: bool = False
    told: bool = False
    said: str = ""
    leaves: dict[str, Leaf] = field(default_factory=dict)
    unclear: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    oracle_seconds: float = math.nan
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
    def bad(self) -> list[str]:
        """Leaves beyond the promise; a NaN counts."""
        return [name for name, leaf in self.leaves.items() if not leaf.error <= self.promise]

    @property
    def silent(self) -> list[str]:
        """Leaves that are wrong beyond promise and ten estimates, without a warning."""
        if not self.has_gradient or self.warned or self.told:
            return []
        leaves = self.leaves
        # No estimate is none to hide behind.
        return [
            name
            for name in self.bad
            if math.isnan(leaves[name].estimate)
            or not leaves[name].error <= 10 * leaves[name].estimate
        ]

    @property
    def verdict(self) -> str:
        """One word for the gradient."""
        if not self.has_gradient:
            if not self.usable:
                return "unusable"
            if self.outcome in (OTHER, ORACLE):
                return self.outcome
            return "crashed" if self.outcome.startswith(CRASHED) else "refused"
        if self.silent:
            return "silently wrong"
        if self.bad:
            return "warned" if self.warned or self.told else "beyond the promise"
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
        """Of the sample and the number."""
        return f"{self.seed} {self.number} {self.evidence} {self.chosen}"


def load(path: Path) -> dict[str, Row]:
    """Stored rows by their key; a line that was cut off is left out."""
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            held = json.loads(line)
            leaves = {name: Leaf(**leaf) for name, leaf in held.pop("leaves").items()}
            row = Row(leaves=leaves, scales=tuple(held.pop("scales")), **held)
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
