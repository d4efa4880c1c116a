"""What a flow is: the right-hand side of x'(t) = F(t, x), and where its state has the position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..core.states import State, first_entry


class Flow(nn.Module, ABC):
    """The velocity field F of the flow x'(t) = F(t, x) = -A(theta, x, t) (eq. 1).

    Conventions, those of torchdiffeq: `flow(t, x)` with t a 0-d tensor (flow time) and the state x
    a tensor (..., d), or a tuple of tensors for flows with more states than the position. The
    result has the structure, shapes and dtype of x; a parameter of another floating type is
    converted to that of x.

    A flow works in every autograd mode: under `torch.no_grad()` it returns a detached velocity;
    with grad enabled it is differentiable, more than once, to x, to t and to every tensor inside
    that requires grad, whether that is a registered parameter or one the user only holds.
    """

    @abstractmethod
    def forward(self, t: Tensor, x: Any) -> Any:
        """dx/dt at time t and state x."""

    def initial_state(self, x0: Tensor) -> Any:
        """The state that starts the flow from position x0 at rest; x0 itself where that is all."""
        return x0

    def position(self, state: State) -> Tensor:
        """The position x inside a state: the first entry of a tuple, else the state itself."""
        return first_entry(state)

    def require_differentiable(self, state: State) -> None:
        """Raise a GradientError where the path from this start has no derivative to it."""
        return None

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x' alone: the first piece of the velocity; a flow that has it more cheaply overrides it.

        The semi-implicit Euler method moves the position with it, after all other states.
        """
        return first_entry(self(t, state))
