"""The user's flow and criterion, evaluated so that no gradient is lost.

A `FlowMap` and a `CriterionMap` sit between the solvers, which see flat vectors without gradients,
and the user's functions, which see states and may call `torch.autograd.grad` themselves. They count
evaluations, keep t inside [t0, max_time], check shapes, and build a graph only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .leaves import LeafSet
from .states import StateLayout

__all__ = ["CriterionMap", "UserFunction", "Vjp"]


@dataclass(frozen=True)
class Vjp:
    """One vector-Jacobian product of the flow F(theta, x, t) with a cotangent lam.

    Attributes:
        value: F, shape (n,), without graph.
        state: F_x^T lam, shape (n,).
        time: F_t^T lam, shape ().
        leaves: F_theta^T lam, one tensor a leaf.
    """

    value: Tensor
    state: Tensor
    time: Tensor
    leaves: list[Tensor]


class UserFunction:
    """A user's callable (t, state), called in the cheapest autograd mode in which it works."""

    name: str

    def __init__(self, function: Callable[..., Any], layout: StateLayout, like: Tensor) -> None:
        self.function = function
        self.layout = layout
        self.dtype = like.dtype
        self.device = like.device
        self.calls = 0
        self._needs_graph = False

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """A 0-d tensor of the state's dtype and device."""
        if isinstance(t, Tensor):
            return t.to(dtype=self.dtype, device=self.device)
        return torch.tensor(t, dtype=self.dtype, device=self.device)

    def _checked(self, output: Any) -> Tensor:
        raise NotImplementedError("subclasses check the output")

    def plain(self, t: float | Tensor, flat: Tensor) -> Tensor:
        """Value without graph.

        The function is tried without gradients first. One that differentiates inside (autograd.grad
        on the state) fails there with a RuntimeError, and is given a graph from then on.
        """
        self.calls += 1
        time = self.time_tensor(t)
        if not self._needs_graph:
            version = flat._version
            try:
                with torch.no_grad():
                    return self._checked(self.function(time, self.layout.unpack(flat)))
            except RuntimeError:
                # Either it needs a graph, or it is broken: then the same error comes again below.
                self._needs_graph = True
            finally:
                self._require_unchanged(flat, version)
        with torch.enable_grad():
            leaf = flat.detach().requires_grad_(True)
            return self._checked(self.function(time, self.layout.unpack(leaf))).detach()

    def _require_unchanged(self, flat: Tensor, version: int) -> None:
        """Raise if the function changed the state that it was given: it is the run's own."""
        if flat._version != version:
            raise ValueError(
                f"{self.name} changed x in place; it must return a new tensor, since x is needed "
                "again (write -x, not x.neg_())"
            )

    def traced(self, t: Tensor, flat: Tensor) -> Tensor:
        """Value with graph; `t` and `flat` are made to require grad by the caller."""
        self.calls += 1
        with torch.enable_grad():
            if not flat.requires_grad:
                flat = flat.detach().requires_grad_(True)
            return self._checked(self.function(t, self.layout.unpack(flat)))

    def inputs(self, t: float | Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh leaves (t, flat) that require grad."""
        time = self.time_tensor(t).detach().clone().requires_grad_(True)
        return time, flat.detach().clone().requires_grad_(True)

    def vjp(
        self, t: float | Tensor, flat: Tensor, cotangent: Tensor, leaves: LeafSet, *, look: bool
    ) -> Vjp:
        """Value and all vector-Jacobian products at one point.

        Args:
            t: Time.
            flat: State, shape (n,).
            cotangent: Shape of the value.
            leaves: Tensors to differentiate to.
            look: Walk the graph and raise if it holds an unknown leaf.
        """
        time, state = self.inputs(t, flat)
        value = self.traced(time, state)
        return self.pull(value, time, state, cotangent, leaves, look=look)

    def pull(
        self,
        value: Tensor,
        time: Tensor,
        state: Tensor,
        cotangent: Tensor,
        leaves: LeafSet,
        *,
        look: bool,
    ) -> Vjp:
        """Vector-Jacobian products of an evaluation that was traced already."""
        if not value.requires_grad:
            zeros = leaves.zeros()
            return Vjp(value.detach(), torch.zeros_like(state), torch.zeros_like(time), zeros)
        if look:
            where = f"by the {self.name} at t = {time.item():.6g}"
            leaves.require_known([value], inputs=(time, state), where=where)
        grads = torch.autograd.grad(
            value,
            [state, time, *leaves.tensors],
            cotangent,
            allow_unused=True,
            retain_graph=leaves.has_history,
        )
        return Vjp(
            value.detach(),
            _or_zeros(grads[0], state),
            _or_zeros(grads[1], time),
            [_or_zeros(g, p) for g, p in zip(grads[2:], leaves.tensors, strict=True)],
        )


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.detach()


class CriterionMap(UserFunction):
    """J(t, x) on flat vectors: a 0-d tensor."""

    name = "criterion"

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"criterion must return a 0-d tensor; got {type(output).__name__}")
        if not output.is_floating_point():
            raise TypeError(
                f"criterion must return a floating-point tensor; got dtype {output.dtype}"
            )
        if output.shape != ():
            raise ValueError(
                f"criterion must return a scalar (shape ()); got shape {tuple(output.shape)}. For "
                "a batch "
                "of problems see batched=."
            )
        return output

    def value(self, t: float | Tensor, flat: Tensor) -> float:
        """J as a Python float."""
        return float(self.plain(t, flat))

    def gradient(self, t: float | Tensor, flat: Tensor) -> tuple[float, Tensor, float]:
        """J, grad J (shape (n,)) and dJ/dt."""
        time, state = self.inputs(t, flat)
        value = self.traced(time, state)
        if not value.requires_grad:
            return value.item(), torch.zeros_like(state), 0.0
        # The graph may run through older nodes (a hyper-network); they are not this call's to free.
        grads = torch.autograd.grad(value, [state, time], allow_unused=True, retain_graph=True)
        g, rate = _or_zeros(grads[0], state), _or_zeros(grads[1], time)
        return value.item(), g, float(rate)


def sum_of_products(cotangents: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Inner product over lists of tensors."""
    parts = [(a * b).sum() for a, b in zip(cotangents, directions, strict=True)]
    return torch.stack(parts).sum()
