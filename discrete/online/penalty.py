"""What weight decay descends besides the loss.

Weight decay pulls x towards 0, which the loss knows nothing of: where the pull is what is left to
do, every step raises the loss, and its derivative to the rate says "shorter" for ever. What such
steps descend is f plus a penalty,

    coupled (in the gradient):  wd/2 |x|^2
    decoupled (AdamW):          wd/2 sum_i P_i x_i^2,   P = sqrt(vhat) + eps of the step

as the direction mhat/P + wd x is that of mhat + wd P x. So this penalty is added to f(x_{k+1}) -
f(x_k) and to grad f(x_{k+1}), P held fixed; no further evaluation is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bundles import Bundle, Moved, inner

__all__ = ["penalty_change", "with_penalty"]


def penalty_change(bundles: Sequence[Bundle], moved: Sequence[Moved]) -> float:
    """The penalty at x_{k+1} less that at x_k = x_{k+1} + lr d."""
    change = 0.0
    for bundle, step in zip(bundles, moved, strict=True):
        if step.decay is not None:
            rate = bundle.group["lr"]
            # x_{k+1}^2 - x_k^2 = -lr d (2 x_{k+1} + lr d)
            sums = torch._foreach_add(
                torch._foreach_mul(bundle.parameters, 2.0), step.directions, alpha=rate
            )
            weighted = _weighted(list(sums), step.decay)
            change -= 0.5 * rate * float(inner(step.directions, weighted))
    return change


def with_penalty(
    gradients: Sequence[list[Tensor]], bundles: Sequence[Bundle], moved: Sequence[Moved]
) -> list[list[Tensor]]:
    """Gradients at x_{k+1}, one list a bundle, and those of the penalty."""
    return [
        gradient
        if step.decay is None
        else list(torch._foreach_add(gradient, _weighted(bundle.parameters, step.decay)))
        for gradient, bundle, step in zip(gradients, bundles, moved, strict=True)
    ]


def _weighted(tensors: list[Tensor], decay: float | list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_mul(tensors, decay))
