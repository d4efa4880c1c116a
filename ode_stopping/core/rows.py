"""The user's functions on the rows of a batch, of which some may have left.

A state of b samples is a matrix of b rows, each a flat vector of n numbers. Where samples have left
the computation, a tensor that has one row a sample has to be seen with the rows that are left:
`Rows` shows them in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .functions import CriterionMap
from .states import StateLayout
from .substitution import Substitution
from .validation import described

__all__ = ["CriterionRows", "Rows", "checked_per_sample", "packed_rows"]


class Rows:
    """Those samples of a batch that take part in a computation.

    Args:
        count: B, how many samples the batch has.
        tensors: What the functions use that has one row a sample, each shape (B, ...).
        index: Which samples take part, ascending, shape (b,); None: all.
    """

    def __init__(
        self, count: int, tensors: tuple[Tensor, ...] = (), index: Tensor | None = None
    ) -> None:
        self.index = index
        self._count = count
        self._tensors = tensors
        self._fixed: dict[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._count if self.index is None else len(self.index)

    def keeping(self, kept: Tensor) -> Rows:
        """The rows at some positions among these."""
        return Rows(self._count, self._tensors, kept if self.index is None else self.index[kept])

    def of(self, values: Tensor) -> Tensor:
        """The rows of a tensor of shape (B, ...), differentiably."""
        return values if self.index is None else values.index_select(0, self.index)

    def into(self, values: Tensor, mask: Tensor, new: Tensor | float) -> Tensor:
        """A tensor of shape (B, ...) with other rows where a mask of these rows, (b, ...), says so.

        Args:
            values: Shape (B, ...).
            mask: Shape (b,) or of as many dimensions as `values`.
            new: A number, or shape (b, ...).
        """
        mask = mask.reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim))
        if self.index is None:
            return torch.where(mask, new, values)
        return values.index_copy(0, self.index, torch.where(mask, new, self.of(values)))

    def shown(self) -> AbstractContextManager[Any]:
        """A context in which the functions see these rows of their tensors."""
        if self.index is None or not self._tensors:
            return nullcontext()
        fixed = self._fixed
        if fixed is None:
            # What is differentiated to is taken anew by every evaluation, for its graph.
            fixed = {
                place: self.of(tensor)
                for place, tensor in enumerate(self._tensors)
                if not tensor.requires_grad
            }
            self._fixed = fixed
        some = [
            fixed[place] if place in fixed else self.of(tensor)
            for place, tensor in enumerate(self._tensors)
        ]
        return Substitution(self._tensors, some, graph=True)

    def release(self) -> None:
        """Let go of the copies that were made to be shown; they are made again when needed."""
        self._fixed = None


def checked_per_sample(tensors: object, count: int) -> tuple[Tensor, ...] | None:
    """The tensors that have one row a sample; None where nothing is declared.

    Raises:
        TypeError: No list of tensors.
        ValueError: A tensor without `count` rows.
    """
    if tensors is None:
        return None
    if isinstance(tensors, Tensor | str | dict) or not isinstance(tensors, Iterable):
        raise TypeError(
            f"per_sample must be a list of tensors, as in per_sample=[X]; got {described(tensors)}"
        )
    found = tuple(tensors)
    for place, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"per_sample[{place}] must be a tensor; got {described(tensor)}")
        if tensor.ndim == 0 or tensor.shape[0] != count:
            raise ValueError(
                f"per_sample[{place}] must have one row a sample, {count} as x0; got shape "
                f"{tuple(tensor.shape)}"
            )
    unique = {id(tensor): tensor for tensor in found}
    return tuple(unique.values())


def packed_rows(
    layout: StateLayout, output: object, *, name: str, dtype: torch.dtype, count: int | None
) -> Tensor:
    """What a function of a batch returned, as rows, shape (b, n).

    Args:
        layout: Of one sample.
        output: What was returned.
        name: Of the function, for messages.
        dtype: Of the state.
        count: b; None: what the output has.

    Raises:
        TypeError, ValueError: The output is not like a state of b samples.
    """
    if count is None:
        first = output[0] if isinstance(output, tuple | list) else output
        count = len(first) if isinstance(first, Tensor) and first.ndim else 0
    return layout.pack_rows(layout.rows(count).check_like(output, name=name, dtype=dtype))


class CriterionRows(CriterionMap):
    """J of every sample: rows, shape (b, n), to values, shape (b,)."""

    def _call(self, time: Tensor, flat: Tensor) -> Tensor:
        state = flat if self._is_vector else self.layout.unpack(flat)
        output = self.function(time, state)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"criterion must return a tensor, one value a sample; got {type(output).__name__}"
            )
        if not output.is_floating_point():
            raise TypeError(
                f"criterion must return a floating-point tensor; got dtype {output.dtype}"
            )
        if output.shape != flat.shape[:1]:
            raise ValueError(
                f"criterion must return one value a sample, shape ({len(flat)},), when "
                f"batched=True; got shape {tuple(output.shape)}"
            )
        return -output if self.rises else output

    def row_values(self, t: float | Tensor, flat: Tensor) -> Tensor:
        """J of every row without graph, shape (b,), float64."""
        return self.plain(t, flat).to(torch.float64)

    def row_gradients(self, t: float | Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """J, shape (b,), float64, and the gradient of each to its own row, shape (b, n)."""
        time, state = self.inputs(t, flat)
        value = self.traced(time, state)
        gradient: Tensor | None = None
        if value.requires_grad:
            ones = torch.ones_like(value)
            # The graph may run through older nodes (a hyper-network); they are not this call's.
            (gradient,) = torch.autograd.grad(
                value, [state], ones, allow_unused=True, retain_graph=True
            )
        found = torch.zeros_like(flat) if gradient is None else gradient
        return value.detach().to(torch.float64), found
