"""Integrals along a path as further states of the same solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.states import State, first_entry
from .base import Flow

Integrand = Callable[[Tensor, Any], Tensor]


class WithIntegrals(Flow):
    """A flow with integrals along its path: q_i' = integrand_i(t, state), q_i(t0) = 0.

    The state is (*state of the flow, q_1, ..., q_n), each q_i of shape (). The value of the
    integrals at T is `flow.integrals(result.state)`, differentiable as T itself is: a penalty on
    the path costs no further solve.

    Args:
        flow: The flow; a `Flow` or any callable (t, state) -> velocity.
        integrands: Callables (t, state of the flow) -> 0-d tensor or number. A state that is one
            tensor comes as that tensor.

    Raises:
        TypeError: One of them is not callable.
        ValueError: No integrands; at a call, an integrand that is not one number.
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
        """The state of the flow, without the integrals.

        Raises:
            TypeError: No tuple, or too short a one.
        """
        if not isinstance(state, tuple) or len(state) <= len(self.integrands):
            what = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
            raise TypeError(
                f"the state of WithIntegrals is a tuple, with {len(self.integrands)} integrals "
                f"last; got {what}: start from flow.initial_state(x0)"
            )
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
        return (*moved, *(self._rate(i, t, state, moved[0]) for i in range(len(self.integrands))))

    def _rate(self, index: int, t: Tensor, state: Any, like: Tensor) -> Tensor:
        rate = self.integrands[index](t, state)
        if not isinstance(rate, Tensor):
            return torch.tensor(float(rate), dtype=like.dtype, device=like.device)
        if rate.shape != ():
            raise ValueError(
                f"integrands must give one number each; number {index} gave shape "
                f"{tuple(rate.shape)}"
            )
        return rate.to(like)

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x' as the flow has it, without the integrands."""
        if isinstance(self.flow, Flow):
            return self.flow.position_velocity(t, self.inner(state))
        return first_entry(self.flow(t, self.inner(state)))

    def initial_state(self, x0: Tensor | State, **options: Any) -> State:
        """The flow's initial state (a tuple is taken as one already), and zeros.

        Args:
            x0: A position, or a state of the flow.
            **options: Go to the flow's own `initial_state`.

        Raises:
            TypeError: Options that nobody takes.
        """
        if isinstance(self.flow, Flow) and isinstance(x0, Tensor):
            x0 = self.flow.initial_state(x0, **options)
        elif options:
            raise TypeError(
                f"initial_state got {', '.join(options)}, but the state is given already: options "
                "go to the initial_state of a Flow"
            )
        start = x0 if isinstance(x0, tuple) else (x0,)
        zeros = [torch.zeros((), dtype=start[0].dtype, device=start[0].device)] * len(
            self.integrands
        )
        return (*start, *(zero.clone() for zero in zeros))

    def require_differentiable(self, state: State) -> None:
        """Ask the flow."""
        if isinstance(self.flow, Flow):
            self.flow.require_differentiable(self.inner(state))

    def position(self, state: State) -> Tensor:
        """The position of the flow."""
        inner = self.inner(state)
        position = self.flow.position(inner) if isinstance(self.flow, Flow) else None
        return position if position is not None else super().position(inner)
