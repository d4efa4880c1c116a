"""Which tensors does a computation depend on? A walk over the autograd graph.

Gradients are silently lost when a method asks the user to list the parameters and one is forgotten.
So nobody is asked: the graph of a traced evaluation knows every tensor that it touched. The walk
ends at leaves (their `AccumulateGrad` node holds the tensor), and at the non-leaf tensors that the
caller names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .status import UntrackedTensorError

__all__ = ["LeafSet", "describe_tensor", "module_parameters", "walk"]


def walk(
    roots: Iterable[Tensor], *, boundary: Sequence[Tensor] = ()
) -> tuple[list[Tensor], set[Any]]:
    """Leaves that require grad below `roots`, and the graph nodes that were passed.

    Args:
        roots: Outputs of a traced evaluation.
        boundary: Non-leaf tensors at which the walk stops (they count as leaves if they are met).

    Returns:
        The leaves in the order in which they were met, and the visited nodes. Keep the nodes alive
        for as long as they are compared: their identity is that of a Python wrapper.
    """
    found: dict[int, Tensor] = {}
    stack: list[Any] = []
    edges = {(p.grad_fn, p.output_nr): p for p in boundary if p.grad_fn is not None}
    for root in roots:
        if root.grad_fn is None:
            if root.requires_grad:
                found[id(root)] = root
        elif (root.grad_fn, root.output_nr) in edges:
            named = edges[root.grad_fn, root.output_nr]
            found[id(named)] = named
        else:
            stack.append(root.grad_fn)
    visited: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        following = node.next_functions
        if not following:
            variable = getattr(node, "variable", None)
            # autograd.grad at a fixed point leaves a node for a variable that requires no grad (any
            # more).
            if variable is not None and variable.requires_grad:
                found[id(variable)] = variable
            continue
        for edge in following:
            successor = edge[0]
            if successor is None:
                continue
            if edges and edge in edges:
                found[id(edges[edge])] = edges[edge]
            elif successor not in visited:
                visited.add(successor)
                stack.append(successor)
    return list(found.values()), visited


def module_parameters(*functions: object) -> list[Tensor]:
    """Registered parameters and buffers that require grad of those arguments that are modules."""
    tensors: list[Tensor] = []
    for function in functions:
        if isinstance(function, nn.Module):
            tensors += [p for p in function.parameters() if p.requires_grad]
            tensors += [b for b in function.buffers() if b.requires_grad and b.is_leaf]
    return tensors


def _refuse_complex(tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(
            f"{describe_tensor(tensor)} that requires grad is used: complex tensors are not "
            "differentiated to. Keep its real and imaginary part in a real tensor, and make the "
            "complex one of it inside (torch.view_as_complex)"
        )


def describe_tensor(tensor: Tensor) -> str:
    """A short description for error messages."""
    return f"a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"


@dataclass
class LeafSet:
    """The tensors that receive gradients: registered parameters, named ones, and those found.

    Attributes:
        tensors: In a fixed order; the gradients are returned in it.
        has_history: Whether some evaluation runs through graph nodes that are older than itself (a
            hyper-network's output): those nodes must survive many backward passes.
        has_gap: Whether some traced evaluation came back without any graph, although its inputs
            require grad. It may be constant, or it may have lost its graph and every leaf with it.
    """

    tensors: list[Tensor]
    boundary: tuple[Tensor, ...] = ()
    has_history: bool = False
    has_gap: bool = False
    _ids: set[int] = field(default_factory=set)
    _history: set[Any] = field(default_factory=set)

    @classmethod
    def collect(cls, *functions: object, params: Iterable[Tensor] | None = None) -> LeafSet:
        """Start from registered parameters and from the tensors in `params`."""
        if params is not None and (
            isinstance(params, Tensor | nn.Module | str | dict) or not isinstance(params, Iterable)
        ):
            raise TypeError(
                f"params must be a list of tensors, as in params=[w]; got {type(params).__name__}"
            )
        named = tuple(params) if params is not None else ()
        for position, tensor in enumerate(named):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"params must hold tensors; entry {position} is {type(tensor).__name__}"
                )
            if not tensor.requires_grad:
                raise ValueError(
                    f"params holds {describe_tensor(tensor)} (entry {position}) that does not "
                    "require grad"
                )
        for tensor in (*module_parameters(*functions), *named):
            _refuse_complex(tensor)
        unique: dict[int, Tensor] = {}
        for tensor in (*module_parameters(*functions), *named):
            unique.setdefault(id(tensor), tensor)
        boundary = tuple(p for p in named if not p.is_leaf)
        return cls(list(unique.values()), boundary, _ids=set(unique))

    def copy(self) -> LeafSet:
        """The same tensors in a set of its own, without what was learned of their history."""
        return LeafSet(list(self.tensors), self.boundary, _ids=set(self._ids))

    def add_from(self, roots: Sequence[Tensor], *, inputs: Sequence[Tensor]) -> set[Any]:
        """Add what a traced evaluation depends on, besides its own `inputs`; return the nodes."""
        leaves, nodes = walk(roots, boundary=self.boundary)
        own = {id(tensor) for tensor in inputs}
        if own and not all(root.requires_grad for root in roots):
            self.has_gap = True
        for leaf in leaves:
            if id(leaf) not in self._ids and id(leaf) not in own:
                _refuse_complex(leaf)
                self._ids.add(id(leaf))
                self.tensors.append(leaf)
        return nodes

    def note_history(self, first: set[Any], second: set[Any]) -> None:
        """Nodes that two separate evaluations share are older than both."""
        shared = {node for node in first & second if getattr(node, "variable", None) is None}
        if shared:
            self.has_history = True
            self._history |= shared

    def require_known(
        self, roots: Sequence[Tensor], *, inputs: Sequence[Tensor], where: str
    ) -> None:
        """Raise if an evaluation on the way back depends on a tensor that is not in the set.

        Raises:
            UntrackedTensorError: Naming the tensor and the remedy.
        """
        leaves, _ = walk(roots, boundary=self.boundary)
        own = {id(tensor) for tensor in inputs}
        for leaf in leaves:
            if id(leaf) not in self._ids and id(leaf) not in own:
                raise UntrackedTensorError(
                    f"{describe_tensor(leaf)} that requires grad is used {where}, but not in the "
                    "evaluations that were traced on the forward run (a branch taken late?). Its "
                    "gradient would be lost: make it a parameter of the module, or name it in "
                    "params=."
                )

    def detached_from_history(self) -> list[Tensor]:
        """Leaves that no older node leads to: changing them changes the next evaluation."""
        behind: set[int] = set()
        for node in self._history:
            for successor, _ in node.next_functions:
                variable = getattr(successor, "variable", None)
                if variable is not None:
                    behind.add(id(variable))
        return [p for p in self.tensors if p.is_leaf and id(p) not in behind]

    def zeros(self) -> list[Tensor]:
        """A zero gradient for every tensor."""
        return [torch.zeros_like(p) for p in self.tensors]
