"""One difference of a result along a direction in everything that it depends on.

The derivatives of a function are compared with differences at a few points before a gradient is
promised. One that is lost elsewhere (detached on a branch, changed by a hook, wrong in a custom
function) shows in the result itself: it is computed again with all tensors moved a little, to
either side, and has to change by what the gradient says. The result is one whose gradient has no
error but rounding: that of given steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .consistency import (
    Thresholds,
    disagreement,
    if_allowed,
    natural_size,
    noise_like,
    wider_direction,
)
from .memo import Memo, sharing
from .substitution import Substitution

__all__ = ["contradictions"]

# Of the float64 result; what is lost is worth a thousand times as much.
_MISMATCH = 1e-5
# An entry that contributes more than the least of the tensors is moved less, down to this share.
_LEAST_SHARE = 1e-3
# So many tensors are looked at by themselves where one of them is wrong.
_SINGLE = 64


def contradictions(
    value: Callable[[Tensor], float],
    start: Tensor,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    size: float,
) -> list[float]:
    """Relative error of each gradient that a difference contradicts, 0 of the others.

    Costs the result twice, and more only where something is wrong.

    Args:
        value: Start to result, without graph; it is called with other values in the place of the
            leaves (`Substitution`).
        start: Where it starts, shape (n,).
        leaves: What it depends on besides. Those that it does not show to torch (a compiled
            function's own) are left out.
        gradients: Of the result, to the start and to the leaves.
        size: Of the numbers that the result is made of, for rounding.
    """
    with torch.no_grad():
        return _Difference(value, start, leaves, gradients, size).errors()


class _Difference:
    """The result as a function of all tensors that can be moved."""

    def __init__(
        self,
        value: Callable[[Tensor], float],
        start: Tensor,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor],
        size: float,
    ) -> None:
        self._result, self._size = value, size
        self._leaves, self._gradients = list(leaves), list(gradients)
        self._tensors = [start, *leaves]
        limits = Thresholds.of(*self._tensors)
        in_double = Thresholds.of(torch.zeros((), dtype=torch.float64)).mismatch
        self._limits = replace(limits, mismatch=limits.mismatch * _MISMATCH / in_double)
        self._directions = self._spread()
        self._met: set[int] = {0}
        self._known: dict[tuple[tuple[int, ...], float], float] = {}

    def _spread(self) -> list[Tensor]:
        """A random direction in which the entries contribute alike."""
        noise = noise_like(seed=2)
        sizes = [natural_size(tensor) for tensor in self._tensors]
        shares = [
            (gradient.to(size.dtype).reshape(size.shape) * size).abs()
            for gradient, size in zip(self._gradients, sizes, strict=True)
        ]
        largest = [float(share.max()) if share.numel() else 0.0 for share in shares]
        least = max(
            min((one for one in largest if one > 0), default=0.0),
            _LEAST_SHARE * max(largest, default=0.0),
        )
        tiny = torch.finfo(torch.float32).tiny
        return [
            noise(size) * size * (least / share.clamp_min(tiny)).clamp(_LEAST_SHARE, 1.0)
            for size, share in zip(sizes, shares, strict=True)
        ]

    def errors(self) -> list[float]:
        """See `contradictions`."""
        found = self._errors(range(len(self._tensors)))
        wider = {
            k: direction
            for k, leaf in enumerate(self._leaves, 1)
            if (direction := wider_direction(leaf, self._gradients[k], self._size, self._limits))
            is not None
        }
        if not wider:
            return found
        noise = noise_like(seed=6)
        for k, direction in wider.items():
            self._directions[k] = noise(direction) * direction
        self._known.clear()
        for k, error in zip(wider, self._errors(list(wider)), strict=True):
            found[k] = max(found[k], error)
        return found

    def _errors(self, moved: Sequence[int]) -> list[float]:
        """The errors of some of the tensors."""
        together = self._gap(moved)
        if together == 0.0:
            return [0.0] * len(moved)
        # Which of them it is; all, where it is none by itself.
        found = [self._gap([k]) if i < _SINGLE else 0.0 for i, k in enumerate(moved)]
        return found if max(found) > 0.0 else [together] * len(moved)

    def _gap(self, moved: Sequence[int]) -> float:
        """By how much the gradient is contradicted along some of the tensors; 0 where it is not."""
        self._value(moved, 0.5 * self._limits.perturbation)
        moved = [k for k in moved if k in self._met]
        contributions = [self._contribution(k) for k in moved]
        exact, size = sum(contributions), sum(c * c for c in contributions) ** 0.5
        found = disagreement(
            lambda h: self._value(moved, h), exact, self._limits, self._size, least=size
        )
        if found is None:
            return 0.0
        return abs(found - exact) / max(abs(found), abs(exact), size)

    def _contribution(self, k: int) -> float:
        """The derivative along tensor k, as the gradient has it."""
        low, high = self._at(k, -0.5), self._at(k, 0.5)
        # What a coarse type cannot hold was not moved.
        change = (high.double() - low.double()) / self._limits.perturbation
        return float((self._gradients[k].double().reshape(change.shape) * change).sum())

    def _at(self, k: int, share: float) -> Tensor:
        tensor = self._tensors[k].detach()
        moved = tensor + share * self._limits.perturbation * self._directions[k]
        return moved.to(tensor.dtype)

    def _value(self, moved: Sequence[int], length: float) -> float:
        """The result with some tensors moved by a length along their directions."""
        key = (tuple(moved), length)
        if key not in self._known:
            share = length / self._limits.perturbation
            start, *values = (
                self._at(k, share) if k in moved else tensor
                for k, tensor in enumerate(self._tensors)
            )
            with Substitution(self._leaves, values) as seen, sharing(Memo()):
                self._known[key] = if_allowed(partial(self._result, start.detach()))
            self._met |= {k for k, met in enumerate(seen.met, 1) if met}
        return self._known[key]
