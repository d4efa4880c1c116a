"""What a stopping time depends on, by name, and how to move it without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..core.leaves import LeafSet
from ..core.names import names_of
from ..core.states import State
from ..core.substitution import Substitution
from ..core.validation import checked_state

__all__ = ["Call", "Directions", "Subject", "chosen_directions", "lacking", "moved", "subjects_of"]


@dataclass(frozen=True)
class Call:
    """The differentiable arguments of a call, as fresh copies.

    Attributes:
        pieces: x0, one tensor a piece.
        is_tuple: Whether x0 is a tuple.
        target: eps.
        t0: Start time.
    """

    pieces: tuple[Tensor, ...]
    is_tuple: bool
    target: float | Tensor
    t0: float | Tensor

    @classmethod
    def of(cls, x0: State, target: float | Tensor, t0: float | Tensor) -> Call:
        """Copies without history: what x0 itself was computed from is not this check's business."""
        state = checked_state(x0)
        pieces = state if isinstance(state, tuple) else (state,)
        copies = tuple(_copy(piece) for piece in pieces)
        return cls(copies, isinstance(state, tuple), _copy(target), _copy(t0))

    @property
    def x0(self) -> State:
        """In the structure that the user gave it."""
        return self.pieces if self.is_tuple else self.pieces[0]

    def detached(self) -> Call:
        """The same numbers, none of which requires grad."""
        pieces = tuple(piece.detach() for piece in self.pieces)
        return Call(pieces, self.is_tuple, _plain(self.target), _plain(self.t0))


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Subject:
    """One tensor that the result depends on.

    Attributes:
        name: For the report.
        kind: "x0", "target", "t0" or "leaf".
        index: Piece of x0, or position in the set of leaves.
        tensor: The tensor.
        size: What a relative step is relative to if the tensor is zero.
        movable: Whether another value of it changes the next evaluation (not so where flow or
            criterion use something that was computed from it beforehand).
    """

    name: str
    kind: str
    index: int
    tensor: Tensor
    size: float = 1.0
    movable: bool = True


# Every subject with the directions it is moved along.
Directions = list[tuple[Subject, list[Tensor]]]


def subjects_of(
    call: Call,
    leaves: LeafSet,
    functions: dict[str, object],
    params: Sequence[Tensor] | None,
    *,
    span: float,
    height: float,
) -> list[Subject]:
    """Everything that requires grad: x0, target, t0, and the leaves of flow and criterion.

    Args:
        call: The arguments.
        leaves: The leaves that were found.
        functions: Name -> flow (or update) and criterion, to find names for the leaves.
        params: The tensors that the caller named.
        span: T - t0, or h N: the size of a change of t0.
        height: The largest |J - eps| of the run: a size for a target of zero.
    """
    found = []
    overall = _rms(torch.cat([piece.detach().reshape(-1) for piece in call.pieces])) or 1.0
    for index, piece in enumerate(call.pieces):
        if piece.requires_grad:
            name = f"x0[{index}]" if call.is_tuple else "x0"
            found.append(Subject(name, "x0", index, piece, overall))
    for kind, value, size in (("target", call.target, height), ("t0", call.t0, span)):
        if isinstance(value, Tensor) and value.requires_grad:
            found.append(Subject(kind, kind, 0, value, size))
    movable = {id(p) for p in (*leaves.detached_from_history(), *leaves.boundary)}
    names = names_of(leaves.tensors, functions, params, taken=[subject.name for subject in found])
    for index, (leaf, name) in enumerate(zip(leaves.tensors, names, strict=True)):
        found.append(Subject(name, "leaf", index, leaf, movable=id(leaf) in movable))
    return found


def directions_for(subject: Subject, count: int, generator: torch.Generator) -> list[Tensor]:
    """Random directions, of the tensor's shape; a step of 1 is about the tensor's own size.

    An element that is small among its neighbours moves by their size. One direction is all there
    is for a single number.
    """
    value = subject.tensor.detach()
    if value.numel() == 0:
        return []
    size = _rms(value) or subject.size
    if value.numel() == 1:
        return [torch.full_like(value, size)]
    scale = 0.5 * (value.abs() + size)
    found = []
    for _ in range(min(count, value.numel())):
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        found.append(noise.to(value) * scale)
    return found


def chosen_directions(subjects: Sequence[Subject], count: int, seed: int) -> Directions:
    """Every subject with its directions, all from one seed."""
    generator = torch.Generator().manual_seed(seed)
    return [(subject, directions_for(subject, count, generator)) for subject in subjects]


@contextmanager
def moved(call: Call, subject: Subject, direction: Tensor, step: float) -> Iterator[Call]:
    """The arguments of the call with one subject moved by step * direction.

    In the place of a leaf another tensor is seen by this thread; the leaf itself is left alone.

    Raises:
        ValueError: At the end, where the leaf was not met inside.
    """
    if subject.kind == "leaf":
        leaf = subject.tensor
        with Substitution([leaf], [_moved_value(subject, direction, step)]) as looked:
            yield call
        if not all(looked.met):
            raise ValueError(
                f"{subject.name} is used where torch cannot be given another value of it (a "
                "compiled function?), or not at all"
            )
        return
    value = _moved_value(subject, direction, step)
    if subject.kind == "x0":
        pieces = list(call.pieces)
        pieces[subject.index] = value
        yield replace(call, pieces=tuple(pieces))
    elif subject.kind == "target":
        yield replace(call, target=value)
    else:
        yield replace(call, t0=value)


def lacking(subject: Subject, direction: Tensor, step: float) -> Tensor | None:
    """What a moved subject lacks of the move, in float64: its own type rounds p + h d.

    None where there is no wider type to tell it in.
    """
    value = subject.tensor.detach()
    if value.dtype == torch.float64 or not value.is_floating_point():
        return None
    wanted = value.double() + step * direction.double()
    return wanted - _moved_value(subject, direction, step).double()


def _moved_value(subject: Subject, direction: Tensor, step: float) -> Tensor:
    return subject.tensor.detach() + step * direction


def _rms(value: Tensor) -> float:
    return float(value.norm()) / sqrt(value.numel()) if value.numel() else 0.0
