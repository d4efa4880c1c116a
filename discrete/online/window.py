"""The sensitivity of f(x_{k+1}) through the last K steps, by the discrete adjoint.

    lam <- grad f(x_{k+1})
    for j = k, ..., k-K+1:  S <- S + (dG_j/d theta)^T lam;  lam <- (dG_j/dz)^T lam

This is Algorithm 1 stopped after K steps (`Truncated(steps=K)`), with the optimiser's buffers in
the state z = (x, buffers) and g_j = grad f_j(x_j) inside G_j: K - 1 products with the Hessian, by
differentiating the gradients once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.status import StoppingWarning
from ode_stopping.core.sweep import Sweep, products
from ode_stopping.core.warn import warn_user

from .bundles import Bundle, flat, unflattened
from .closures import Evaluation, require_second_derivatives
from .coordinates import Coordinate

__all__ = ["Snapshot", "StepMap", "Window"]

# (snapshot's x, gradient, buffers, values, steps, group, held_out) -> (x, buffers) after the step,
# all flat, in differentiable operations; with held_out without the gradient's own part in x.
StepMap = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Snapshot:
    """A bundle before a step: all that the step depends on.

    Attributes:
        x: Position, flat.
        gradient: Of f_j at x, flat.
        buffers: The optimiser's, flat.
        values: The hyperparameters then, by name.
        group: The other options of the group.
        steps: j + 1 of every element: a number, or a flat tensor where they differ.
        held_out: Whether the gradient's own part is left out of S while the step is the newest.
    """

    x: Tensor
    gradient: Tensor
    buffers: tuple[Tensor, ...]
    values: dict[str, float]
    group: dict[str, Any]
    steps: float | Tensor
    held_out: bool

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        buffers: Sequence[str],
        coordinates: Sequence[Coordinate],
        *,
        held_out: bool,
    ) -> Snapshot:
        """What a bundle is now."""
        steps = [float(state["step"]) + 1.0 for state in bundle.states]
        same = all(step == steps[0] for step in steps)
        return cls(
            x=flat(bundle.parameters),
            gradient=flat(bundle.gradients),
            buffers=tuple(flat(bundle.buffer(name)) for name in buffers),
            values={c.name: c.read(bundle.group) for c in coordinates},
            group={key: value for key, value in bundle.group.items() if key != "params"},
            steps=steps[0] if same else _spread(steps, bundle.parameters),
            held_out=held_out,
        )

    def like(self, p: Tensor) -> Snapshot:
        """The same on the device and in the dtype of a parameter, as torch loads its buffers."""
        return replace(
            self,
            x=self.x.to(p),
            gradient=self.gradient.to(p),
            buffers=tuple(buffer.to(p) for buffer in self.buffers),
            steps=self.steps.to(p) if isinstance(self.steps, Tensor) else self.steps,
        )


class _Step:
    """All bundles before a step, and the gradients with their graphs."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        parts: list[list[int]],
        snapshots: list[Snapshot],
        graph: list[list[Tensor]] | None,
    ) -> None:
        self.parts = parts
        self.parameters = [[parameters[i] for i in part] for part in parts]
        self.live = [p.requires_grad for part in self.parameters for p in part]
        self.snapshots = snapshots
        self.graph = graph

    def go_back(self) -> None:
        """Put the parameters where they were."""
        for part, snapshot in zip(self.parameters, self.snapshots, strict=True):
            for p, value in zip(part, unflattened(snapshot.x, part), strict=True):
                p.copy_(value)

    def accept(self, seen: Evaluation) -> bool:
        """Take the graph of an evaluation at this point, if its gradients are those of then."""
        found = []
        for part, snapshot in zip(self.parts, self.snapshots, strict=True):
            graph = [(seen.graph or seen.gradients)[i] for i in part]
            if any(gradient is None for gradient in graph):
                return False
            found.append([gradient for gradient in graph if gradient is not None])
            # Relative to the whole: next to the optimum every batch's gradient is small.
            away = torch.linalg.vector_norm(flat(found[-1]) - snapshot.gradient)
            if not away <= 1e-5 * torch.linalg.vector_norm(snapshot.gradient):
                return False
        self.graph = found
        return True

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of f_j at x_j times flat vectors, one a bundle."""
        outputs, weights = [], []
        for graph, parameters, vector in zip(
            self.graph or [], self.parameters, vectors, strict=True
        ):
            pieces = unflattened(vector, parameters)
            for gradient, piece in zip(graph, pieces, strict=True):
                if gradient.requires_grad:  # else the loss is linear in it
                    outputs.append(gradient)
                    weights.append(piece)
        inputs = [p for parameters in self.parameters for p in parameters]
        live = [p for p, is_live in zip(inputs, self.live, strict=True) if is_live]
        products: Sequence[Tensor | None] = [None] * len(live)
        if outputs:
            products = torch.autograd.grad(
                outputs, live, weights, retain_graph=True, allow_unused=True
            )
        of = dict(zip(map(id, live), products, strict=True))
        known = iter(
            torch.zeros_like(p) if (product := of.get(id(p))) is None else product for p in inputs
        )
        return [flat([next(known) for _ in parameters]) for parameters in self.parameters]


class Window:
    """The last K steps, the newest last.

    Args:
        horizon: K.
        step_map: The optimiser's step.
        buffers: The names of its buffers.
        known: All hyperparameters that the step depends on.
        adapted: Those to differentiate to.
    """

    def __init__(
        self,
        horizon: int,
        step_map: StepMap,
        buffers: Sequence[str],
        known: Sequence[Coordinate],
        adapted: Sequence[Coordinate],
    ) -> None:
        self._steps: deque[_Step] = deque(maxlen=horizon)
        self._map = step_map
        self._buffers = tuple(buffers)
        self._known = tuple(known)
        self._adapted = tuple(adapted)

    def __len__(self) -> int:
        return len(self._steps)

    def append(
        self, bundles: Sequence[Bundle], parameters: Sequence[Tensor], *, held_out: bool
    ) -> None:
        """Add the step that is about to be made.

        A parameter without a gradient takes no part in a step; where other parameters take part
        than before, or some were frozen, lam does not line up, and the window begins anew.
        """
        places = {id(p): place for place, p in enumerate(parameters)}
        step = _Step(
            parameters,
            [[places[id(p)] for p in bundle.parameters] for bundle in bundles],
            [
                Snapshot.of(bundle, self._buffers, self._known, held_out=held_out)
                for bundle in bundles
            ],
            [bundle.graph or [] for bundle in bundles],
        )
        last = self._steps[-1] if self._steps else step
        if (last.parts, last.live) != (step.parts, step.live):
            self._steps.clear()
        if not self._steps:  # not in every step: it is a walk through the whole graph
            require_second_derivatives([g for bundle in bundles for g in bundle.graph or []])
        self._steps.append(step)
        self._steps[0].graph = []  # lam ends there: no product is taken of it

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    @property
    def stale(self) -> bool:
        """Whether steps were loaded whose graphs are still missing."""
        return any(step.graph is None for step in self._steps)

    def state(self) -> list[Any]:
        """The snapshots, for a state_dict; graphs cannot be kept."""
        return [
            {"parts": step.parts, "snapshots": [asdict(one) for one in step.snapshots]}
            for step in self._steps
        ]

    def load(self, state: Sequence[Any], parameters: Sequence[Tensor]) -> None:
        """Take what `state` gave; `stale` then until `rebuild`.

        Args:
            state: The snapshots.
            parameters: All of the optimiser's, in order.
        """
        self._steps.clear()
        for entry in state:
            parts = entry["parts"]
            snapshots = [
                Snapshot(**one).like(parameters[part[0]])
                for one, part in zip(entry["snapshots"], parts, strict=True)
            ]
            self._steps.append(_Step(parameters, parts, snapshots, None))
        if self._steps:
            self._steps[0].graph = []

    def rebuild(self, evaluation: Callable[[], Evaluation], parameters: Sequence[Tensor]) -> None:
        """Evaluate at the kept points again, for their graphs.

        Where the gradient is not the kept one (another batch), the window begins anew, with a
        warning.
        """
        present = [p.detach().clone() for p in parameters]
        try:
            for step in self._steps:
                if step.graph is not None:
                    continue
                step.go_back()
                seen = evaluation()
                if not step.accept(seen):
                    warn_user(
                        "the closure has another loss now than when the state was saved: the "
                        "last steps that the sensitivity goes back through are forgotten, and it "
                        "has its full horizon again after as many new ones",
                        StoppingWarning,
                    )
                    self.clear()
                    return
        finally:
            for p, value in zip(parameters, present, strict=True):
                p.copy_(value)

    def derivatives(
        self, gradients: Sequence[Tensor], *, in_log: bool, active: Sequence[bool]
    ) -> dict[str, float]:
        """df(x_{k+1})/d theta over the window, by name; d/du with `in_log`.

        Args:
            gradients: grad f(x_{k+1}), flat, one a bundle.
            in_log: Whether to u instead of theta.
            active: Whether the hyperparameters of a bundle are adapted.
        """
        total = dict.fromkeys((c.name for c in self._adapted), 0.0)
        sweeps = [Sweep([gradient]) for gradient in gradients]
        for place in range(len(self._steps) - 1, -1, -1):
            step = self._steps[place]
            on_gradients = []
            for sweep, snapshot, is_active in zip(sweeps, step.snapshots, active, strict=True):
                # Of older steps nothing is left out: their batches are not the one that f is of.
                held_out = snapshot.held_out and place == len(self._steps) - 1
                on_gradient, slopes = self._pull_back(snapshot, sweep, held_out=held_out)
                on_gradients.append(on_gradient)
                if is_active:
                    for coordinate, slope in zip(self._adapted, slopes, strict=True):
                        value = snapshot.values[coordinate.name]
                        factor = coordinate.slope(value) if in_log else 1.0
                        total[coordinate.name] += factor * float(slope)
            if place > 0:
                for sweep, product in zip(sweeps, step.curvature(on_gradients), strict=True):
                    sweep.lam[0] = sweep.lam[0] + product
        return total

    def _pull_back(
        self, snapshot: Snapshot, sweep: Sweep, *, held_out: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Take lam through one step of one bundle: its gradients to g_j, and to theta there."""
        with torch.enable_grad():
            x, gradient, *buffers = (
                piece.detach().requires_grad_()
                for piece in (snapshot.x, snapshot.gradient, *snapshot.buffers)
            )
            numbers: dict[str, Any] = dict(snapshot.values)
            for coordinate in self._adapted:
                numbers[coordinate.name] = torch.tensor(
                    numbers[coordinate.name], dtype=torch.float64, requires_grad=True
                )
            adapted = [numbers[coordinate.name] for coordinate in self._adapted]

            def stepped(held_out: bool) -> list[Tensor]:
                after, kept = self._map(
                    x,
                    gradient,
                    tuple(buffers),
                    numbers,
                    snapshot.steps,
                    snapshot.group,
                    held_out=held_out,
                )
                return [after, *kept]

            if len(sweep.lam) == 1:  # the newest step: nothing depends on its buffers yet
                sweep.join([torch.zeros_like(buffer) for buffer in buffers])
            other = products(stepped(True), adapted, sweep.lam) if held_out else None
            on_gradient, *slopes = sweep.through(
                stepped(False), [x, *buffers], [gradient, *adapted]
            )
        return on_gradient, slopes if other is None else other


def _spread(steps: Sequence[float], parameters: Sequence[Tensor]) -> Tensor:
    """A number a parameter, as often as that has elements."""
    return torch.cat(
        [p.new_full((p.numel(),), step) for step, p in zip(steps, parameters, strict=True)]
    )
