"""The peer, torchdiffeq: `odeint_event` with `odeint_adjoint`, or with `odeint`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from problems import Function
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event


class StillRunning(Exception):
    """The peer was stopped by us, after more evaluations than the measurement allows."""


class Field(nn.Module):
    """A flow with its parameters registered, as torchdiffeq wants it, that counts evaluations."""

    def __init__(
        self, function: Function, parameters: Sequence[nn.Parameter] = (), limit: int = 10**9
    ) -> None:
        super().__init__()
        self.registered = nn.ParameterList(parameters)
        self.function = function
        self.calls, self.limit = 0, limit

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        self.calls += 1
        if self.calls > self.limit:
            raise StillRunning
        return self.function(t, x)


def peer_time(
    flow: Field,
    x0: Tensor,
    criterion: Function,
    target: Any,
    *,
    adjoint: bool = True,
    **options: Any,
) -> Tensor:
    """The event time of torchdiffeq; rtol 1e-9 and atol 1e-12 unless said otherwise."""
    options = {"rtol": 1e-9, "atol": 1e-12, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        event, _ = odeint_event(
            flow,
            x0,
            torch.tensor(0.0, dtype=x0.dtype),
            event_fn=lambda t, x: criterion(t, x) - target,
            odeint_interface=odeint_adjoint if adjoint else odeint,
            **options,
        )
    return event
