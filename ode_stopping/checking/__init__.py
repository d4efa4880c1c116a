"""How a gradient of a stopping time or index is checked: what both sides share.

`subjects` says what the result depends on and how to move it, `ladder` measures a slope by
differences on a ladder of step sizes, `differences` applies it to the result, `report` holds the
rows, their allowances and the verdict. `sensitivity` and `identities` are the roads of the
continuous side that use no differences.
"""

from .report import Finding, GradientReport

__all__ = ["Finding", "GradientReport"]
