"""States: a tensor of any shape or a tuple of tensors, seen by the solvers as one flat vector."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

__all__ = ["State", "StateLayout", "first_entry", "pieces"]

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class StateLayout:
    """How a state is laid out in a flat vector of n numbers.

    Attributes:
        shapes: Shape of each piece, in order.
        is_tuple: Whether the user's state is a tuple (kept for a tuple of one piece, too).
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool

    @classmethod
    def of(cls, state: State) -> StateLayout:
        """Read the layout off a state."""
        if isinstance(state, Tensor):
            return cls((state.shape,), is_tuple=False)
        return cls(tuple(piece.shape for piece in state), is_tuple=True)

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each piece."""
        return [shape.numel() for shape in self.shapes]

    def pack(self, state: State) -> Tensor:
        """Flatten to shape (n,), differentiably."""
        if isinstance(state, Tensor):
            return state.reshape(-1)
        return torch.cat([piece.reshape(-1) for piece in state])

    def unpack(self, flat: Tensor) -> State:
        """Restore the user's structure; leading axes of `flat` (..., n) are kept."""
        if not self.is_tuple:
            return flat.reshape((*flat.shape[:-1], *self.shapes[0]))
        pieces = torch.split(flat, self.sizes, dim=-1)
        return tuple(
            piece.reshape((*flat.shape[:-1], *shape))
            for piece, shape in zip(pieces, self.shapes, strict=True)
        )

    def pack_rows(self, state: State) -> Tensor:
        """Flatten pieces that have a leading axis of b samples to shape (b, n), differentiably."""
        if isinstance(state, Tensor):
            return state.reshape(len(state), -1)
        return torch.cat([piece.reshape(len(piece), -1) for piece in state], dim=1)

    def rows(self, count: int) -> StateLayout:
        """The layout of so many states, one behind the other along a new first axis."""
        shapes = tuple(torch.Size((count, *shape)) for shape in self.shapes)
        return StateLayout(shapes, self.is_tuple)

    def norm(self, flat: Tensor) -> Tensor:
        """Largest root-mean-square over the pieces: no piece hides behind a longer one."""
        return self.rms(flat).max()

    def rms(self, flat: Tensor) -> Tensor:
        """Root mean square of every piece that has elements, shape (pieces,).

        Over all rows, where `flat` has several, shape (..., n).
        """
        if len(self.shapes) == 1:
            return (torch.linalg.vector_norm(flat) / flat.numel() ** 0.5).reshape(1)
        parts = torch.split(flat, self.sizes, dim=-1)
        return torch.stack([part.square().mean().sqrt() for part in parts if part.numel()])

    def piecewise_rms(self, flat: Tensor) -> Tensor:
        """Every element replaced by the root mean square of its piece, in the shape of `flat`."""
        sizes = [size for size in self.sizes if size]
        pairs = zip(self.rms(flat), sizes, strict=True)
        return torch.cat([r.expand(*flat.shape[:-1], size) for r, size in pairs], dim=-1)

    def check_like(self, state: object, *, name: str, dtype: torch.dtype) -> State:
        """Return `state` if it has this layout and dtype, else raise naming `name`."""
        if self.is_tuple:
            if not isinstance(state, tuple | list):
                raise TypeError(
                    f"{name} must return a tuple of {len(self.shapes)} tensors, as the state is "
                    f"one; got {type(state).__name__}"
                )
            pieces = tuple(state)
        else:
            pieces = (state,)
        if len(pieces) != len(self.shapes):
            raise ValueError(
                f"{name} returned {len(pieces)} tensors for a state of {len(self.shapes)}"
            )
        for index, (piece, shape) in enumerate(zip(pieces, self.shapes, strict=True)):
            if not isinstance(piece, Tensor):
                raise TypeError(
                    f"{name} must return tensors; entry {index} is {type(piece).__name__}"
                )
            if piece.shape != shape:
                raise ValueError(
                    f"{name} must return the shape of the state, {tuple(shape)}; "
                    f"got {tuple(piece.shape)} (entry {index})"
                )
            if piece.dtype != dtype:
                raise TypeError(
                    f"{name} must return the dtype of the state, {dtype}; got {piece.dtype} "
                    f"(entry {index}): is a parameter of another dtype involved?"
                )
        return cast("State", pieces if self.is_tuple else pieces[0])

    def slices(self) -> list[slice]:
        """Where each piece stands in the flat vector."""
        bounds = [0]
        for size in self.sizes:
            bounds.append(bounds[-1] + size)
        return [slice(a, b) for a, b in pairwise(bounds)]


def first_entry(state: State) -> Tensor:
    """The library's convention for augmented states (x, v, ...): the position comes first."""
    return state[0] if isinstance(state, tuple) else state


def pieces(state: object, count: int, name: str) -> tuple[Tensor, ...]:
    """The pieces of a state that has so many.

    Raises:
        TypeError: It has not.
    """
    if isinstance(state, tuple) and len(state) == count:
        return cast("tuple[Tensor, ...]", state)
    what = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
    raise TypeError(
        f"the state of {name} is a tuple of {count} tensors, got {what}: start from "
        "flow.initial_state(x0)"
    )
