"""Algorithm 1's sweep: cotangents and accumulators, taken back through a segment with a graph.

    for k = N-1 .. 0:   S += (dG_k/dtheta)^T lam,   then   lam <- (dG_k/dx)^T lam

of arXiv 2505.22509. A segment is one step or many: one call of autograd takes lam through all of
it, with the same sums in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Sweep", "products"]


class Sweep:
    """lam on its way back, and the sums that it leaves in the leaves.

    Args:
        lam: Cotangents on the pieces of the state at the end.
        leaves: Tensors that every segment may depend on.

    Attributes:
        lam: The cotangents where the sweep stands.
        sums: One accumulator a leaf, of its dtype, or in single precision for half types.
        sizes: Of each, the sum of the norms of what the segments left, 0-d.
    """

    def __init__(self, lam: Sequence[Tensor], leaves: Sequence[Tensor] = ()) -> None:
        self.lam = list(lam)
        # Many small parts do not add up in half precision.
        types = [torch.float32 if leaf.element_size() < 4 else leaf.dtype for leaf in leaves]
        pairs = list(zip(leaves, types, strict=True))
        self.sums = [torch.zeros_like(leaf, dtype=dtype) for leaf, dtype in pairs]
        self.sizes = [leaf.new_zeros((), dtype=dtype) for leaf, dtype in pairs]
        self._leaves = list(leaves)

    def join(self, cotangents: Sequence[Tensor]) -> None:
        """Further pieces of the state, on which nothing has arrived so far but this."""
        self.lam += cotangents

    def leave(self, gradients: Sequence[Tensor | None]) -> None:
        """Add what a segment leaves in the leaves."""
        for total, size, gradient in zip(self.sums, self.sizes, gradients, strict=True):
            if gradient is not None:
                total += gradient
                size += torch.linalg.vector_norm(gradient)

    def through(
        self,
        end: Sequence[Tensor],
        start: Sequence[Tensor],
        extra: Sequence[Tensor] = (),
        *,
        keep: bool = False,
    ) -> list[Tensor]:
        """Take lam from the end of a segment to its start; the sums grow.

        Args:
            end: The pieces of the state at the end, with a graph.
            start: Those at the start: leaves of the graph.
            extra: Further tensors of this segment alone.
            keep: Whether the graph is kept, since it runs through nodes older than the segment.

        Returns:
            The gradient to each of `extra`.
        """
        inputs = [*start, *extra, *self._leaves]
        found = _products(end, inputs, self.lam, keep=keep)
        first, second = len(start), len(start) + len(extra)
        self.leave(found[second:])
        filled = _filled(found[:second], inputs[:second])
        self.lam = filled[:first]
        return filled[first:]


def products(
    end: Sequence[Tensor], inputs: Sequence[Tensor], lam: Sequence[Tensor], *, keep: bool = False
) -> list[Tensor]:
    """(d end/d input)^T lam for each input; zeros where there is no dependence."""
    return _filled(_products(end, inputs, lam, keep=keep), inputs)


def _products(
    end: Sequence[Tensor], inputs: Sequence[Tensor], lam: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor | None]:
    # A piece without a graph is a constant. autograd would refuse it.
    live = [(piece, weight) for piece, weight in zip(end, lam, strict=True) if piece.requires_grad]
    if not live:
        return [None] * len(inputs)
    ends, weights = zip(*live, strict=True)
    return torch.autograd.grad(ends, inputs, weights, allow_unused=True, retain_graph=keep)


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if gradient is None else gradient
        for gradient, p in zip(found, like, strict=True)
    ]
