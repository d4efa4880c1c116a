"""Parameters that are moved together: those of one group, device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Bundle",
    "Moved",
    "aligned",
    "bundled",
    "clip",
    "flat",
    "inner",
    "length",
    "unflattened",
]


@dataclass
class Bundle:
    """Some parameters of a group, in order.

    Attributes:
        group: The parameter group.
        parameters: Those that have a gradient.
        gradients: Theirs, without graph.
        states: The optimiser's entries for them.
        graph: The gradients with a graph, where one was kept.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    graph: list[Tensor] | None

    def buffer(self, name: str) -> list[Tensor]:
        """A buffer of every parameter."""
        return [state[name] for state in self.states]

    def decayed(self) -> list[Tensor]:
        """The gradients with the group's weight decay in them, coupled."""
        decay = self.group["weight_decay"]
        if not decay:
            return self.gradients
        return list(torch._foreach_add(self.gradients, self.parameters, alpha=decay))


class Moved:
    """What a step did to a bundle: x <- x - lr * direction.

    Args:
        directions: One a parameter.
        held_out: The same without the present gradient's part in them; None where not asked for.
        decay: The weights of the penalty that weight decay descends (see `penalty`): one number,
            or one tensor a parameter; None without weight decay.
    """

    def __init__(
        self,
        directions: list[Tensor],
        held_out: list[Tensor] | None = None,
        decay: float | list[Tensor] | None = None,
    ) -> None:
        self.directions = directions
        self.held_out = held_out
        self.decay = decay

    def along(self, gradients: Sequence[Tensor], *, held_out: bool) -> float:
        """The product of gradients and directions: one transfer from the device."""
        return float(inner(gradients, (self.held_out if held_out else self.directions) or []))


def bundled(
    groups: Sequence[dict[str, Any]],
    states: Any,
    gradients: Sequence[Tensor | None],
    graph: Sequence[Tensor | None] | None,
) -> list[Bundle]:
    """The bundles of all groups.

    Args:
        groups: The optimiser's.
        states: Its state, by parameter.
        gradients: One a parameter, in the order of the groups; None takes no part.
        graph: The same with a graph, or None.
    """
    made: dict[tuple[int, torch.device, torch.dtype], Bundle] = {}
    place = 0
    for number, group in enumerate(groups):
        for p in group["params"]:
            gradient, kept = gradients[place], None if graph is None else graph[place]
            place += 1
            if gradient is None:
                continue
            key = (number, p.device, p.dtype)
            if key not in made:
                made[key] = Bundle(group, [], [], [], None if graph is None else [])
            bundle = made[key]
            bundle.parameters.append(p)
            bundle.gradients.append(gradient)
            bundle.states.append(states[p])
            if bundle.graph is not None and kept is not None:
                bundle.graph.append(kept)
    return list(made.values())


def aligned(
    bundles: Sequence[Bundle], parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[list[Tensor]]:
    """The gradients of a later evaluation in the order of the bundles; zeros where there is none.

    Args:
        bundles: Of an earlier one.
        parameters: All of the optimiser's.
        gradients: One a parameter.
    """
    of = dict(zip(map(id, parameters), gradients, strict=True))
    return [
        [torch.zeros_like(p) if (g := of[id(p)]) is None else g for p in bundle.parameters]
        for bundle in bundles
    ]


def clip(bundles: Sequence[Bundle], limit: float) -> None:
    """Scale the gradients of all bundles so that together they are no longer than the limit."""
    whole = hypot(*(float(length(bundle.gradients)) for bundle in bundles))
    if whole > limit:
        for bundle in bundles:
            bundle.gradients = list(torch._foreach_mul(bundle.gradients, limit / whole))


def length(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all entries, 0-d."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one row, a copy."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflattened(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a flat vector in the shapes of these tensors."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The sum of all products, 0-d."""
    products = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(first, second, strict=True)]
    return products[0] if len(products) == 1 else torch.stack(products).sum()
