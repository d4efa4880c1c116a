"""The user's functions on flat vectors, evaluated so that no gradient is lost.

The solvers see flat vectors without gradients; the user's functions see states and may call
`torch.autograd.grad` themselves. In between stands a `UserFunction`: it counts evaluations, checks
shapes, and builds a graph only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .leaves import LeafSet
from .names import tensors_in
from .states import State, StateLayout

__all__ = ["Clock", "CriterionMap", "ResetMap", "UserFunction", "Vjp", "sum_of_products"]

Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True)
class Vjp:
    """One vector-Jacobian product of a function f(theta, x, t) with a cotangent lam.

    Attributes:
        value: f, shape (n,), without graph.
        state: f_x^T lam, shape (n,).
        time: f_t^T lam, shape ().
        leaves: f_theta^T lam, one tensor a leaf.
    """

    value: Tensor
    state: Tensor
    time: Tensor
    leaves: list[Tensor]


class UserFunction:
    """A user's callable (t, state), called in the cheapest autograd mode in which it works.

    Args:
        function: The callable.
        layout: Layout of the state.
        like: A state, for dtype and device.

    Attributes:
        calls: How often it was evaluated.
        products: How many vector-Jacobian products were taken of it.
    """

    name: str

    def __init__(self, function: Callable[..., Any], layout: StateLayout, like: Tensor) -> None:
        self.function = function
        self.layout = layout
        self.dtype = like.dtype
        self.device = like.device
        self.calls = 0
        self.products = 0
        self._needs_graph = False
        # A state that is one vector is handed on as it is.
        self._shape = None if layout.is_tuple else layout.shapes[0]
        self._is_vector = self._shape is not None and len(self._shape) == 1
        # What a right output looks like, and whether it is flat by itself.
        self._output_shape = self._shape
        self._output_is_flat = self._is_vector

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """A 0-d tensor of the state's dtype and device."""
        if isinstance(t, Tensor):
            right = t.dtype is self.dtype and t.device == self.device
            return t if right else t.to(dtype=self.dtype, device=self.device)
        return torch.scalar_tensor(t, dtype=self.dtype, device=self.device)

    def _checked(self, output: Any) -> Tensor:
        raise NotImplementedError("subclasses check the output")

    def _call(self, time: Tensor, flat: Tensor) -> Tensor:
        """The function at a flat state; its output flat, too, and checked."""
        state: State = flat
        if not self._is_vector:
            state = self.layout.unpack(flat) if self._shape is None else flat.view(self._shape)
        output = self.function(time, state)
        # What is right is seen at a glance; `_checked` says what is wrong with the rest.
        if (
            type(output) is Tensor
            and output.shape == self._output_shape
            and output.dtype is self.dtype
        ):
            return output if self._output_is_flat else output.reshape(-1)
        return self._checked(output)

    def plain(self, t: float | Tensor, flat: Tensor) -> Tensor:
        """Value without graph.

        The function is tried without gradients first. One that differentiates inside (autograd.grad
        on the state) fails there with a RuntimeError, and is given a graph from then on.
        """
        return self.plain_at(self.time_tensor(t), flat)

    def plain_at(self, time: Tensor, flat: Tensor) -> Tensor:
        """`plain`, at a time that is a tensor of the right kind already."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.plain_at(time, flat)
        self.calls += 1
        if flat.requires_grad:
            flat = flat.detach()
        if not self._needs_graph:
            version = flat._version
            try:
                value = self._call(time, flat)
                # (A function may return a parameter itself.)
                return value.detach() if value.requires_grad else value
            except RuntimeError:
                # Either it needs a graph, or it is broken: then the same error comes again below.
                self._needs_graph = True
            finally:
                if flat._version != version:
                    self._refuse_change()
                if flat.requires_grad:
                    # A flag that the function has set, on what is the run's own.
                    flat.requires_grad_(False)
        with torch.enable_grad():
            leaf = flat.detach().requires_grad_(True)
            try:
                return self._call(time, leaf).detach()
            except RuntimeError as error:
                self._explain(error)
                raise

    def _explain(self, error: RuntimeError) -> None:
        """Raise a TypeError that names both dtypes where a function fails because they differ."""
        if "dtype" not in str(error) and "scalar type" not in str(error):
            return
        for name, tensor in tensors_in(self.function, self.name):
            if tensor.is_floating_point() and tensor.dtype != self.dtype:
                raise TypeError(
                    f"{self.name} mixes dtypes: the state is {self.dtype}, and {name} is "
                    f"{tensor.dtype} ({error}). Give both one dtype, as with module.to(x0.dtype) "
                    "or x0.to(dtype)"
                ) from error

    def _refuse_change(self) -> None:
        """Raise, for the function changed the state that it was given: it is the run's own."""
        raise ValueError(
            f"{self.name} changed x in place; it must return a new tensor, since x is needed "
            "again (write -x, not x.neg_())"
        )

    def traced(self, t: Tensor, flat: Tensor) -> Tensor:
        """Value with graph; `t` and `flat` are made to require grad by the caller."""
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self.traced(t, flat)
        self.calls += 1
        return self._call(t, flat if flat.requires_grad else flat.detach().requires_grad_(True))

    def inputs(self, t: float | Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh leaves (t, flat) that require grad."""
        # (A copy of the state is not needed: one that is changed in place was refused by `plain`.)
        time = self.time_tensor(t).detach()
        time = time.clone() if isinstance(t, Tensor) else time
        return time.requires_grad_(True), flat.detach().requires_grad_(True)

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

    def count_product(self) -> None:
        """Count a vector-Jacobian product that was taken without an evaluation."""
        self.products += 1

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
        self.products += 1
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
    """J(t, x) on flat vectors: a 0-d tensor that falls to its targets.

    A J that rises to eps is -J that falls to -eps. Here the sign is turned, and so that of every
    value and derivative behind the entry, where J always falls; `oriented` does it to a target, and
    `shown` turns a number back for the user.

    Args:
        function: The callable.
        layout: Layout of the state.
        like: A state, for dtype and device.
        rises: Whether the user's J rises to its targets.
    """

    name = "criterion"

    def __init__(
        self,
        function: Callable[..., Any],
        layout: StateLayout,
        like: Tensor,
        *,
        rises: bool = False,
    ) -> None:
        super().__init__(function, layout, like)
        self.rises = rises
        self._output_shape = torch.Size(())
        self._output_is_flat = True
        # A criterion that says so gives one number a sample; the flow's time must not matter.
        self._takes_rows = bool(getattr(function, "takes_rows", False))

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
                "a batch of problems see batched=."
            )
        return output

    def _call(self, time: Tensor, flat: Tensor) -> Tensor:
        value = super()._call(time, flat)
        return -value if self.rises else value

    def oriented(self, target: Tensor) -> Tensor:
        """The user's target, as the one that J falls to here; its graph goes on."""
        return -target if self.rises else target

    def shown(self, value: Value) -> Value:
        """A value of J, of its rate or of a target, in the user's sign."""
        return -value if self.rises else value

    @property
    def far_side(self) -> str:
        """Where the user's J comes from: "above" or "below" its target."""
        return "below" if self.rises else "above"

    def value(self, t: float | Tensor, flat: Tensor) -> float:
        """J as a Python float."""
        return float(self.plain(t, flat))

    def values(self, points: Sequence[tuple[float, Tensor]]) -> list[float]:
        """J at several points (t, x), read from the device in one go."""
        if len(points) == 1:
            return [self.value(*points[0])]
        # The last point is the end of a step, whose product the flow has just made: by itself.
        *inner, last = points
        rows = self._rows(inner) if self._takes_rows and len(inner) > 1 else None
        found = [self.plain(t, x) for t, x in inner] if rows is None else rows
        return torch.stack([*found, self.plain(*last)]).tolist()

    def _rows(self, points: Sequence[tuple[float, Tensor]]) -> list[Tensor] | None:
        """J at several states in one call; None where the function cannot after all."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._rows(points)
        states: State = self.layout.unpack(torch.stack([x for _, x in points]))
        output = self.function(self.time_tensor(points[-1][0]), states)
        if type(output) is not Tensor or output.shape != (len(points),):
            self._takes_rows = False
            return None
        self.calls += len(points)
        rows = output.detach()
        return list((-rows if self.rises else rows).unbind())

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


class Clock(CriterionMap):
    """-t, which falls to -T at a known time T: a crossing like any other, with J' = -1.

    Args:
        layout: Layout of the state.
        like: A state, for dtype and device.
    """

    name = "clock"

    def __init__(self, layout: StateLayout, like: Tensor) -> None:
        super().__init__(lambda t, x: t, layout, like, rises=True)

    def value(self, t: float | Tensor, flat: Tensor) -> float:
        """-t, which no dtype rounds."""
        return -float(t)

    def gradient(self, t: float | Tensor, flat: Tensor) -> tuple[float, Tensor, float]:
        """-t, 0 (shape (n,)) and -1."""
        return -float(t), torch.zeros_like(flat), -1.0

    def vjp(
        self, t: float | Tensor, flat: Tensor, cotangent: Tensor, leaves: LeafSet, *, look: bool
    ) -> Vjp:
        """See `UserFunction.vjp`: nothing arrives at x and the leaves."""
        time = torch.scalar_tensor(-float(t), dtype=torch.float64, device=self.device)
        return Vjp(time, torch.zeros_like(flat), -cotangent, leaves.zeros())


class ResetMap(UserFunction):
    """x+ = R(t, x-) on flat vectors: what the state becomes at an event."""

    name = "reset"

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="reset", dtype=self.dtype))


def sum_of_products(cotangents: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Inner product over lists of tensors."""
    parts = [(a * b).sum() for a, b in zip(cotangents, directions, strict=True)]
    return torch.stack(parts).sum()
