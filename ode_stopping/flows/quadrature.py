"""Integrals along a path as further states of the same solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ode_stopping.flows.base import Flow, State

Integrand = Callable[[Tensor, Any], Tensor]


class WithIntegrals(Flow):
    """A flow with integrals along its path: q_i' = integrand_i(t, state), q_i(t0) = 0.

    The state is (*state of the flow, q_1, ..., q_n), each q_i of shape (). The value of the
    integrals at T is `flow.integrals(result.state)`, differentiable as T itself is: a penalty on
    the path costs no further solve.

    Args:
        flow: the flow; a `Flow` or any callable (t, state) -> velocity.
        integrands: callables (t, state of the flow) -> 0-d tensor.

    Raises:
        TypeError: one of them is not callable.
        ValueError: no integrands.
    """

    def __init__(self, flow: Callable[..., Any], *integrands: Integrand) -> None:
        super().__init__()
        if not callable(flow):
            raise TypeError(f"flow must be callable, (t, x) -> dx/dt, got {type(flow).__name__}")
        if not integrands:
            raise ValueError("integrands must name at least one")
        for integrand in integrands:
            if not callable(integrand):
                kind = type(integrand).__name__
                raise TypeError(f"integrands must be callable, (t, state) -> 0-d, got {kind}")
        self.flow = flow
        self.integrands = integrands
        # Registered, so that their parameters are the flow's.
        self.modules_of_integrands = nn.ModuleList(
            [integrand for integrand in integrands if isinstance(integrand, nn.Module)]
        )

    def inner(self, state: State) -> Any:
        """The state of the flow, without the integrals."""
        kept = state[: -len(self.integrands)]
        return kept[0] if len(kept) == 1 else kept

    def integrals(self, state: State) -> tuple[Tensor, ...]:
        """The integrals in a state, each of shape ()."""
        return tuple(state[-len(self.integrands) :])

    def forward(self, t: Tensor, x: State) -> State:
        """The velocity of the flow, and the integrands."""
        state = self.inner(x)
        velocity = self.flow(t, state)
        moved = velocity if isinstance(velocity, tuple) else (velocity,)
        return (*moved, *(integrand(t, state).to(moved[0]) for integrand in self.integrands))

    def initial_state(self, x0: Tensor | State, **options: Any) -> State:
        """The flow's initial state (a tuple is taken as one already), and zeros."""
        if isinstance(self.flow, Flow) and isinstance(x0, Tensor):
            x0 = self.flow.initial_state(x0, **options)
        start = x0 if isinstance(x0, tuple) else (x0,)
        zeros = [torch.zeros((), dtype=start[0].dtype, device=start[0].device)] * len(
            self.integrands
        )
        return (*start, *(zero.clone() for zero in zeros))

    def position(self, state: State) -> Tensor:
        """The position of the flow."""
        inner = self.inner(state)
        position = self.flow.position(inner) if isinstance(self.flow, Flow) else None
        return position if position is not None else super().position(inner)
