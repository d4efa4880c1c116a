"""The rows of a gradient check, their allowances, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from math import inf, isfinite
from typing import Any

from .ladder import Slope

__all__ = [
    "AT_A_KINK",
    "FINITE_DIFFERENCES",
    "FORWARD_SENSITIVITY",
    "NOTHING",
    "SAME_ROAD",
    "Finding",
    "GradientReport",
    "judge",
]

NOTHING = "less than the result is rounded by"
AT_A_KINK = "at a kink: this may be the slope of its other side"
FINITE_DIFFERENCES = "finite differences"
FORWARD_SENSITIVITY = "forward sensitivity"

# A second run of the route itself: it says how far off the tolerance is, and is no judge.
SAME_ROAD = "tenth of the tolerance"
# How many of its own uncertainties a reference may be off by.
_SAFETY = 3.0
# A reference that is less certain, relative to the derivative, than this and than the promise may
# not see an error of .1 %: its agreement is worth nothing.
_COARSE = 1e-4
# A gradient that is wrong by less than this many times what the reference may be off by is called
# wrong only where its Taylor remainder says so as well, by an order as close to 1 as this.
_CLEAR = 100.0
_NEAR_ONE = 0.2


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        subject: What was differentiated to: the name of a leaf, "x0", "target", "t0"; or the name
            of an identity.
        road: The independent road.
        gradient: The route's figure: a directional derivative, a side of an identity, or the norm
            of a gradient.
        reference: The road's figure.
        difference: |gradient - reference|, relative to the largest figure of this subject.
        allowance: The largest relative difference that passes.
        passed: True, False, or None where the road could not judge.
        direction: Which of the random directions; None where there is none.
        step: Step size of the differences, relative to the leaf; None for other roads.
        sides: One-sided slopes (below, above) at a kink.
        note: What was special; may be empty.
        order: Observed order of the Taylor remainder |T(h) - T(0) - h gradient|, of the differences
            only: about 2 where the gradient is right, about 1 where it is wrong or at a kink, None
            where the remainder does not stand above the noise.
    """

    subject: str
    road: str
    gradient: float
    reference: float
    difference: float
    allowance: float
    passed: bool | None
    direction: int | None = None
    step: float | None = None
    sides: tuple[float, float] | None = None
    note: str = ""
    order: float | None = None

    def row(self, count: int = 1) -> tuple[str, ...]:
        """The cells of its line in the table, where it stands for `count` directions."""
        verdict = {True: "ok", False: "WRONG", None: "no verdict"}[self.passed]
        name = self.subject if count == 1 else f"{self.subject} (worst of {count})"
        note = self.note
        if self.sides is not None:
            note = f"{note} {self.sides[0]:.6g} (below), {self.sides[1]:.6g} (above)"
        return (
            name,
            self.road,
            f"{self.gradient:.9g}",
            f"{self.reference:.9g}",
            f"{self.difference:.1e}",
            f"{self.allowance:.1e}",
            "" if self.order is None else f"{self.order:.2f}",
            verdict,
            note.strip(),
        )


_HEAD = (
    "subject", "road", "gradient", "reference", "difference", "allowed", "order", "verdict", ""
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class GradientReport:
    """The verdict on a gradient, with the figures that it rests on.

    Attributes:
        quantity: What was differentiated: "T", "N*", or "f" (any function).
        route: The route that was checked; "autograd" for a function.
        time: T in flow time, N* in steps, or the value of f.
        rate: J'(T), or J(x_N) - J(x_{N-1}); nan for a function.
        findings: The comparisons, one a row of the table.
        subjects: Everything that was checked, by name.
        error: Why the route gave no gradient; empty if it did.
        warnings: What the route itself warned about.
        solves: Runs (of a function: calls) that the check took, besides the route's own.
    """

    quantity: str
    route: str
    time: float
    rate: float
    findings: tuple[Finding, ...] = ()
    subjects: tuple[str, ...] = ()
    error: str = ""
    warnings: tuple[str, ...] = field(default=())
    solves: int = 0

    @property
    def wrong(self) -> tuple[str, ...]:
        """The subjects with a comparison that failed, by name."""
        return tuple(dict.fromkeys(f.subject for f in self.findings if f.passed is False))

    @property
    def kinks(self) -> tuple[str, ...]:
        """The subjects in which the result has a kink here: two one-sided slopes."""
        return tuple(dict.fromkeys(f.subject for f in self.findings if f.sides is not None))

    @property
    def unjudged(self) -> tuple[str, ...]:
        """The subjects that no independent road could judge in all of its directions."""
        roads = {(f.subject, f.road) for f in self.findings if f.road != SAME_ROAD}
        in_doubt = {(f.subject, f.road) for f in self.findings if f.passed is None}
        judged = {subject for subject, _ in roads - in_doubt}
        return tuple(name for name in self.subjects if name not in judged)

    @property
    def passed(self) -> bool:
        """Whether the verdict is "right", or "kink": nothing failed, and everything was judged."""
        return self.verdict in ("right", "kink")

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on every subject by itself, by name."""
        return {
            name: _worst_of(name in self.wrong, name in self.unjudged, name in self.kinks)
            for name in self.subjects
        }

    @property
    def verdict(self) -> str:
        """The worst of all: "wrong", before "noise", before "kink", before "right".

        - "right": every comparison held, and every subject was judged by an independent road.
        - "wrong": a comparison failed, or the route refused to give a gradient.
        - "kink": the result has two one-sided slopes here; the gradient is one of them or lies
          between them. An optimiser may use it; it is not the derivative, for there is none.
        - "noise": something could not be judged; its findings say why. The values are too noisy
          for differences, or there are none beside the point.
        """
        return _worst_of(bool(self.error or self.wrong), bool(self.unjudged), bool(self.kinks))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists only."""
        plain = {name: value for name, value in asdict(self).items() if name != "findings"}
        return {
            **{key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()},
            "passed": self.passed,
            "verdict": self.verdict,
            "verdicts": self.verdicts,
            "wrong": list(self.wrong),
            "unjudged": list(self.unjudged),
            "kinks": list(self.kinks),
            "findings": [
                {**asdict(f), "sides": None if f.sides is None else list(f.sides)}
                for f in self.findings
            ],
        }

    def _headline(self) -> str:
        if self.passed:
            return "passed" + (f" (kink: {', '.join(self.kinks)})" if self.kinks else "")
        reasons = []
        if self.error:
            reasons.append("no gradient")
        if self.wrong:
            reasons.append("wrong: " + ", ".join(self.wrong))
        if self.unjudged:
            reasons.append("not judged: " + ", ".join(self.unjudged))
        return "FAILED (" + "; ".join(reasons) + ")"

    def __repr__(self) -> str:
        slope = {"T": ", J'(T)", "N*": ", J_N - J_(N-1)"}.get(self.quantity)
        lines = [
            f"GradientReport of {self.quantity} by {self.route}: {self._headline()}",
            f"  {self.quantity} = {self.time:.12g}"
            + (f"{slope} = {self.rate:.6g}" if slope else "")
            + f", {self.solves} further runs",
        ]
        lines += [f"  error: {self.error}"] if self.error else []
        lines += [f"  warned: {text}" for text in self.warnings]
        if self.findings:
            rows = [_HEAD, *_worst_rows(self.findings)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
            for row in rows:
                cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
                lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)


def _worst_of(wrong: bool, unjudged: bool, kinked: bool) -> str:
    return "wrong" if wrong else "noise" if unjudged else "kink" if kinked else "right"


def _worst_rows(findings: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    """One line a subject and road: a failed direction, else one without verdict, else the worst."""
    for _, group in groupby(findings, key=lambda f: (f.subject, f.road)):
        rows = list(group)
        yield max(rows, key=_badness).row(len(rows))


def _badness(finding: Finding) -> tuple[int, float]:
    rank = {False: 2, None: 1, True: 0}[finding.passed]
    return rank, finding.difference if finding.difference == finding.difference else 0.0


def judge(
    subject: str,
    road: str,
    pairs: list[tuple[float, Slope | None]],
    *,
    promise: float,
    why_not: str = "",
    kinked: Sequence[bool] = (),
    least: float = 0.0,
    roundings: Sequence[float] = (),
) -> list[Finding]:
    """Compare the route's figures with a road's, one pair a direction.

    Differences are taken relative to the largest figure over the directions, since the derivative
    along one of them may vanish by chance. A road may be wrong by three of its own uncertainties on
    top of the promise; one that is so uncertain that .1 % might pass gives no verdict. So may the
    route by what the type of its gradient cannot hold.

    Args:
        subject: What was differentiated to.
        road: Name of the road.
        pairs: The route's directional derivatives, and the road's; None where it has none.
        promise: Relative error that is allowed of the route.
        why_not: The note for a pair without a reference.
        kinked: Directions with a kink, in which a road that takes one side of it is no judge.
        least: A figure that is no larger is a rounding of the result, and so is nothing.
        roundings: Of the route's figures, one a direction; none: 0.
    """
    known = [slope for _, slope in pairs if slope is not None]
    scale = max(
        (abs(v) for slope in known for v in (slope.value, *(slope.sides or ()))), default=0.0
    )
    if scale == 0.0:
        scale = max((abs(gradient) for gradient, _ in pairs), default=0.0)
    findings = []
    for index, (gradient, slope) in enumerate(pairs):
        direction = index if len(pairs) > 1 else None
        if slope is None:
            nan = float("nan")
            findings.append(
                Finding(subject, road, gradient, nan, nan, nan, None, direction, note=why_not)
            )
            continue
        low, high = sorted(slope.sides or (slope.value, slope.value))
        gap = max(low - gradient, gradient - high, 0.0) if isfinite(gradient) else inf
        blur = _SAFETY * slope.uncertainty
        difference, allowance = _ratio(gap, scale), promise
        if gap > 0.0:
            rounding = roundings[index] if index < len(roundings) else 0.0
            allowance += _ratio(blur + _SAFETY * rounding, scale)
        # The first clause is for 0 = 0; `not <=` lets NaN fail.
        passed: bool | None = gap == 0.0 or difference <= allowance
        note = slope.note
        if passed and gap > 0.0 and allowance - promise > max(_COARSE, promise):
            passed, note = None, f"{note} differences too noisy to judge".strip()
        if (
            passed is False
            and slope.step
            and gap <= _CLEAR * blur
            and slope.order is not None
            and abs(slope.order - 1) > _NEAR_ONE
        ):
            passed, note = None, "as far off as noise may be, and the remainder is not of order 1"
        if not passed and index < len(kinked) and kinked[index]:
            passed, note = None, AT_A_KINK
        if not passed and max(abs(gradient), abs(low), abs(high)) <= least:
            passed, note = True, NOTHING
        findings.append(
            Finding(
                subject,
                road,
                gradient,
                slope.value,
                difference,
                allowance,
                passed,
                direction,
                slope.step or None,
                slope.sides,
                note,
                slope.order,
            )
        )
    return findings


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0 else inf
