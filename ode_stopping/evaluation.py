"""The user's flow and criterion, evaluated so that no gradient is lost.

A `FlowMap` and a `CriterionMap` sit between the solvers, which see flat vectors without gradients,
and the user's functions, which see states and may call `torch.autograd.grad` themselves. They count
evaluations, keep t inside [t0, max_time], check shapes, and build a graph only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .leaves import LeafSet
from .states import StateLayout

__all__ = ["CriterionMap", "FlowMap", "Stats", "UserFunction", "Vjp"]


@dataclass
class Stats:
    """What a run cost, in counts.

    Attributes:
        nfe_forward: Evaluations of the flow (or of the update) until the target was found.
        nfe_backward: Evaluations of the flow in the latest backward pass; None before there was
            one.
        vjps: Vector-Jacobian products in the latest backward pass; None before there was one.
        criterion_calls: Evaluations of the criterion on the way to the target.
        accepted: Accepted steps.
        rejected: Rejected steps.
        control: Evaluations of the flow, among `nfe_forward`, that the control of the velocity
            took.
        checks: Evaluations spent on tracing the parameters and on comparing the derivatives of flow
            and criterion with differences, before any gradient is promised.
    """

    nfe_forward: int = 0
    nfe_backward: int | None = None
    vjps: int | None = None
    criterion_calls: int = 0
    accepted: int = 0
    rejected: int = 0
    control: int = 0
    checks: int = 0

    def to_dict(self) -> dict[str, int | None]:
        """The counts by name."""
        return asdict(self)


class TotalStats(Stats):
    """The counts of the parts of a run, added up whenever they are read.

    Args:
        parts: One a part; those of a backward pass that did not reach a part count as 0.
    """

    def __init__(self, parts: Sequence[Stats]) -> None:
        super().__init__()
        self._parts = list(parts)

    def __getattribute__(self, name: str) -> Any:
        if name not in _COUNTS:
            return super().__getattribute__(name)
        counts = [getattr(part, name) for part in self._parts]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


_COUNTS = frozenset(field.name for field in fields(Stats))


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


class FlowMap(UserFunction):
    """dx/dt = F(t, x) on flat vectors, evaluated at times inside [t0, horizon] only.

    Args:
        function: The flow.
        layout: Layout of the state.
        like: A state, for dtype and device.
        times: The start, the times at which the flow jumps, and the horizon, increasing.
        jumps_at_start: Whether the flow jumps at the start, too.

    Attributes:
        times: The times as given.
        jumps_at_start: As given.
        reads_clock_blindly: Whether the flow was seen to lose its derivative to t (`t.item()`).
    """

    name = "flow"

    def __init__(
        self,
        function: Callable[..., Any],
        layout: StateLayout,
        like: Tensor,
        *,
        times: Sequence[float],
        jumps_at_start: bool = False,
    ) -> None:
        super().__init__(function, layout, like)
        # The bounds in the dtype that the user sees: float32 rounds, and a 3/t flow must not see t
        # < t0.
        self.times = tuple(times)
        self.reads_clock_blindly = False
        self._times = [UserFunction.time_tensor(self, t) for t in times]
        low, high = self._times[0], self._times[-1]
        if jumps_at_start:
            low = torch.nextafter(low, high)
        self.jumps_at_start = jumps_at_start
        self._low, self._high = self._bounds = (low, high)

    def enter(self, index: int) -> None:
        """From now on, evaluate between times[index] and times[index + 1] only.

        At a jump the flow is evaluated one rounding inside of the segment: nobody knows whether it
        takes its left or its right limit there.
        """
        low, high = self._times[index], self._times[index + 1]
        self._low = self._bounds[0] if index == 0 else torch.nextafter(low, high)
        last = index + 2 == len(self._times)
        self._high = high if last else torch.nextafter(high, low)

    def leave(self) -> None:
        """Evaluate anywhere between the start and the horizon again."""
        self._low, self._high = self._bounds

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="flow", dtype=self.dtype))

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """The time, clamped to the interval on which the flow may be evaluated."""
        time = super().time_tensor(t)
        clamped = torch.minimum(torch.maximum(time.detach(), self._low), self._high)
        # A time that is differentiated keeps its derivative.
        return time + (clamped - time.detach()) if time.requires_grad else clamped


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
