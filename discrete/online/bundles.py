"""Parameters that are moved together: those of one group, device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bundle", "bundled", "flat", "inner", "unflattened"]


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
