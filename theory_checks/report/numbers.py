"""Numbers as people read them, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_DIGITS = 4
_SPECIAL = {"NaN": "NaN", "Infinity": "∞", "-Infinity": "−∞"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any) -> str:
    """One value: four significant digits, powers of ten outside [1e-3, 1e5), a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _grouped(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if isinstance(value, float):
        if value == 0.0:
            return "0"
        if _scientific(value):
            return power(value)
        return f"{value:.{_decimals(value)}f}".replace("-", "−")
    text = str(value)
    return _SPECIAL.get(text, text)


def power(value: float, digits: int = 2, *, trim: bool = True) -> str:
    """A float as mantissa × power of ten, such as 2.5 × 10⁻⁷."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    if trim and "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    raised = str(int(exponent)).translate(_SUPERSCRIPT)
    if trim and mantissa in ("1", "-1"):
        return f"{'−' if mantissa == '-1' else ''}10{raised}"
    return f"{mantissa.replace('-', '−')}\u00a0×\u00a010{raised}"


def column(values: Sequence[Any]) -> list[str]:
    """A column of a table: its floats share one notation and one number of decimals."""
    floats = [v for v in values if isinstance(v, float) and math.isfinite(v) and v != 0.0]
    if any(_scientific(v) for v in floats):
        return [
            power(v, trim=False)
            if isinstance(v, float) and math.isfinite(v) and v != 0.0
            else number(v)
            for v in values
        ]
    decimals = max((_decimals(v) for v in floats), default=0)
    return [
        f"{v:.{decimals}f}".replace("-", "−")
        if isinstance(v, float) and math.isfinite(v)
        else number(v)
        for v in values
    ]


def lines(values: Any, limit: int = 4) -> list[str]:
    """A number, or several by name, as lines; after `limit` of them it says how many are left."""
    if not isinstance(values, Mapping):
        return [number(values)]
    shown = [f"{name}: {number(value)}" for name, value in list(values.items())[:limit]]
    if len(values) > limit:
        shown.append(f"and {len(values) - limit} more")
    return shown


def seconds(value: float) -> str:
    """A duration in seconds, or minutes and hours where it is long."""
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def interval(ends: Sequence[Any] | None) -> str:
    """A confidence interval, empty where there is none."""
    return "" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def _scientific(value: float) -> bool:
    """Whether a finite, non-zero float is written with a power of ten."""
    return not 1e-3 <= abs(value) < 1e5


def _decimals(value: float) -> int:
    """How many decimals show four significant digits without trailing zeros."""
    places = max(0, _DIGITS - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return len(text.split(".")[1].rstrip("0")) if "." in text else 0


def _grouped(value: int) -> str:
    """An integer, its thousands set apart by thin spaces from five digits on."""
    text = f"{value:,}".replace(",", "\u2009") if abs(value) >= 10_000 else str(value)
    return text.replace("-", "−")
