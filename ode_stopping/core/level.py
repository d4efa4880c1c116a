"""How close to a target J has to be for rounding to decide on which side it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite, nextafter

import torch
from torch import Tensor

from .functions import CriterionMap
from .rows import CriterionRows
from .status import StoppingWarning
from .warn import warn_user

__all__ = ["Rounding", "RowRounding", "are_near", "near_targets", "warn_of_the_start"]

# By this J may miss a target that a point was computed to lie on: by some roundings of the last
# step and of J itself, and by one of T, which is large against the motion of x where T is.
_ROUNDINGS = 8.0
_OF_TIME = 1e-12
# How much larger than that a distance may be for which the derivatives of J are asked.
_ROOM = 100.0
# Over so much of t the change of J says how large t J_t is.
_LATER = 1e-6


@dataclass(frozen=True)
class Rounding:
    """How well J is known at a point.

        max(8 eps_machine, 1e-12) (|J| + |target| + sum_i |g_i| max(|x_i|, |x|) + |J_t t|),

    |x| the largest root mean square of a piece: an entry that is 0 where J meets its target (an
    angle, say) was computed among others that are not, and errs by their rounding.

    Attributes:
        unit: The factor, for the dtype of the state.
        size: The sum, without the target.
    """

    unit: float
    size: float

    @classmethod
    def at(cls, criterion: CriterionMap, t: float, x: Tensor) -> Rounding:
        """At time t and state x, shape (n,), by one gradient of J."""
        value, gradient, by_time = criterion.gradient(t, x)
        entries = x.abs().clamp(min=float(criterion.layout.norm(x)))
        size = abs(value) + float((gradient.abs() * entries).sum()) + abs(by_time * t)
        # A derivative that is not finite (a norm at zero) says nothing.
        return cls(_unit(x), size if isfinite(size) else abs(value))

    def around(self, target: float) -> float:
        """Half the width of the band around a target in which J cannot be told from it."""
        return self.unit * (self.size + abs(target))

    def beyond(self, target: float) -> float:
        """The value that J has to exceed to have left a target; above it in any case."""
        return max(target + self.around(target), nextafter(target, inf))


def _unit(x: Tensor) -> float:
    return max(_ROUNDINGS * torch.finfo(x.dtype).eps, _OF_TIME)


def near_targets(value: float, x: Tensor, targets: Iterable[float]) -> list[float]:
    """Targets to which J is so close that its rounding has to be looked at.

    A cheap look, since most runs begin far from their targets: no derivative is taken.
    """
    size, room = max(abs(value), float(x.abs().max())), _ROOM * _unit(x)
    return [eps for eps in targets if abs(value - eps) <= room * max(size, abs(eps))]


@dataclass(frozen=True)
class RowRounding:
    """`Rounding` of every sample of a batch.

    Attributes:
        unit: The factor, for the dtype of the state.
        size: The sums, without the target, shape (b,).
    """

    unit: float
    size: Tensor

    @classmethod
    def at(cls, criterion: CriterionRows, t: float, x: Tensor) -> RowRounding:
        """At time t and states x, shape (b, n), by one gradient of J, and a difference over t."""
        value, gradient = criterion.row_gradients(t, x)
        parts = torch.split(x, criterion.layout.sizes, dim=1)
        means = [part.square().mean(dim=1).sqrt() for part in parts if part.shape[1]]
        entries = torch.maximum(x.abs(), torch.stack(means).amax(dim=0)[:, None])
        size = value.abs() + (gradient.abs() * entries).sum(dim=1)
        if t != 0.0:
            # One derivative to t for each sample would take as many passes; its size will do.
            later = criterion.row_values(t + _LATER * abs(t), x)
            size = size + (later - value).abs() / _LATER
        return cls(_unit(x), torch.where(torch.isfinite(size), size, value.abs()))

    def around(self, targets: Tensor) -> Tensor:
        """Half the widths of the bands around targets of shape (b, K)."""
        return self.unit * (self.size[:, None] + targets.abs())

    def beyond(self, targets: Tensor) -> Tensor:
        """The values that J has to exceed to have left targets of shape (b, K)."""
        above = torch.nextafter(targets, targets.new_tensor(inf))
        return torch.maximum(targets + self.around(targets), above)


def are_near(values: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """Which targets J is so close to that its rounding has to be looked at, shape (b, K).

    Args:
        values: J, shape (b,).
        x: The states, shape (b, n).
        targets: Shape (b, K).
    """
    size = torch.maximum(values.abs(), x.abs().amax(dim=1).to(values.dtype))[:, None]
    reach = _ROOM * _unit(x) * torch.maximum(size, targets.abs())
    return (values[:, None] - targets).abs() <= reach


def warn_of_the_start(criterion: CriterionMap, value: float, target: float) -> None:
    """Warn of a run that starts on its target and moves away from it.

    Args:
        criterion: J.
        value: J at the start.
        target: eps.
    """
    gap = criterion.shown(value - target)
    warn_user(
        "the criterion is within its rounding of the target "
        f"{criterion.shown(target):g} at the start ({gap:+.2g} from it) and moves away from it, so "
        "a rounding decides whether the target is met at the start or at the next crossing. "
        "leave_first=True asks for the next crossing; where the start is meant, choose a target "
        "that it has clearly met",
        StoppingWarning,
    )
