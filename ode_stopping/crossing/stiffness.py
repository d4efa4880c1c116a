"""How fast is the fastest motion of a flow? What explicit steps have to be short against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solving.flow_map import FlowMap

__all__ = ["fastest_rate", "if_stiff"]

_POWERS = 24
# A run whose last steps are this long against the fastest rate of the flow is held by stability.
_RECENT = 64
_AT_THE_LIMIT = 1.0


def if_stiff(flow: FlowMap, t: float, x: Tensor, grid: Sequence[float]) -> str:
    """What to say where steps are held by stability and not by the error; else nothing.

    Args:
        flow: The flow.
        t: Where the run stands.
        x: The state there, shape (n,).
        grid: The ends of the accepted steps.
    """
    last = grid[-_RECENT:]
    if len(last) < 2:
        return ""
    length, rate = (last[-1] - last[0]) / (len(last) - 1), fastest_rate(flow, t, x)
    if not length * rate > _AT_THE_LIMIT:
        return ""
    return (
        f"; the flow is stiff: its fastest rate is about {rate:.3g}, and steps of {length:.3g} are "
        f"{length * rate:.1f} over that, the limit of stability of an explicit method, which no "
        "tolerance moves. Scale or precondition the flow, or choose a target that is met earlier"
    )


def fastest_rate(flow: FlowMap, t: float, x: Tensor) -> float:
    """The spectral radius of F_x at a point, in 1/time, by the power method on differences.

    Args:
        flow: The flow; it is evaluated 25 times.
        t: Time.
        x: State, shape (n,).

    Returns:
        The estimate; 0 where a value is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    # One scale for each entry, since those of a stiff problem may differ by orders.
    scale = x.abs() + float(x.abs().max()) * 1e-6 + torch.finfo(x.dtype).tiny ** 0.5
    shift = torch.finfo(x.dtype).eps ** 0.5
    with torch.no_grad():
        here = flow.plain(t, x)
        rates: list[float] = []
        for _ in range(_POWERS):
            size = float((direction / scale).abs().max())
            if not 0.0 < size < float("inf"):
                break
            step = direction * (shift / size)
            change = flow.plain(t, x + step) - here
            before, after = float((step / scale).norm()), float((change / scale).norm())
            rates.append(after / before)
            direction = change
    # Complex pairs make single ratios swing.
    last = rates[len(rates) // 2 :]
    if len(rates) < _POWERS or not all(0.0 < rate < float("inf") for rate in last):
        return 0.0
    return float(torch.tensor(last, dtype=torch.float64).log().mean().exp())
