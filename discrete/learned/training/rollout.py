"""Runs of a learned optimiser on a batch of problems, and their gradients to its parameters.

A run goes forward without a graph, a stretch at a time. What comes back is the sum of <c_k, x_k>
over the iterates, with the cotangents c_k that a loss makes (`loss.cotangents`), by one of two
roads:

- "detached": the gradients of f that the optimiser is fed count as constants. Then
  x_k = x_0 + u_0 + ... + u_{k-1}, so that u_j receives C_j = c_{j+1} + c_{j+2} + ..., and of the
  run only these gradients are needed: where the graph of the network was not kept on the way, it is
  replayed on them, some coordinates at a time. It is a truncated direction, not the gradient of the
  loss.
- "through": the whole iteration is replayed with its graph, gradients of f among it.

Either stops at the start of the stretch (truncated backpropagation) or goes on into the stretch
before (the whole discrete adjoint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ode_stopping.core.sweep import Sweep, products

from ..base import LearnedOptimizer, LearnedUpdate, norm_of
from ..tasks import MetaTask
from .loss import Measured, Outcomes, measure

__all__ = ["Inputs", "Rollout", "Stretch"]

Inputs = Literal["detached", "through"]
Memory = tuple[Tensor, ...]

# Coordinates in one replay: the graph of a step of a network of width 20 is then some MiB.
_TILE = 2048
# Bytes of graph that a stretch may keep on the way forward. That of a step is about so many times
# the memory of the optimiser.
_GRAPH = 2**28
_GRAPH_PER_MEMORY = 5


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run, and what their gradient needs.

    Attributes:
        measured: f, J, the iterates and the gradients of f.
        memory: Of the optimiser at the start, each of shape (b, d, ...); None: not kept.
        fed: The gradients that the steps were given, shape (S, b, d).
        taken: The steps u_k with their graph to theta, where it was kept, each of shape (b, d).
    """

    measured: Measured
    memory: Memory | None
    fed: Tensor
    taken: tuple[Tensor, ...] = ()

    @property
    def begin(self) -> int:
        """Its first step."""
        return self.measured.begin


class Rollout:
    """One run, as far as it has gone.

    Args:
        learned: The optimiser, whose parameters may change between two stretches.
        task: The problems.
    """

    def __init__(self, learned: LearnedOptimizer, task: MetaTask) -> None:
        self.task = task
        self._learned = learned
        self.k = 0
        self.x = task.x0.detach().clone()
        self.memory = learned.initial_memory(self.x)
        f, gradient = task.value_and_gradient(self.x)
        self._here = f, gradient, measure(task, 0, self.x, f, gradient, None)
        self.outcomes = Outcomes.at_start(f, self._here[2], task.targets)

    @torch.no_grad()
    def advance(
        self, steps: int, *, keep: bool = True, record: bool = False
    ) -> tuple[Stretch, Tensor]:
        """Go on for so many steps.

        Args:
            steps: S.
            keep: Whether the memory at the start is kept.
            record: Whether the graph of the steps to theta is kept, if it is not too large.

        Returns:
            The stretch, and at which of its steps each target was met (`Outcomes.after`).
        """
        task, learned = self.task, self._learned
        own = getattr(task.objective, "gradient_at", None)
        memory, begin = self.memory if keep else None, self.k
        f, gradient, value = self._here
        xs, fs, gradients, values, fed = [self.x], [f], [gradient], [value], []
        record = record and self._fits(steps)
        taken: list[Tensor] = []
        for k in range(begin, begin + steps):
            minibatch = None if own is None else own(k, self.x)
            given = gradient if minibatch is None else minibatch
            with torch.set_grad_enabled(record):
                step, self.memory = learned.step(k, given, self.memory, norm_of(given))
            if record:
                taken.append(step)
            self.x = self.x + step.detach()
            before = f
            f, gradient = task.value_and_gradient(self.x)
            value = measure(task, k + 1, self.x, f, gradient, before)
            xs.append(self.x)
            fs.append(f)
            gradients.append(gradient)
            values.append(value)
            fed.append(given)
        self.memory = tuple(piece.detach() for piece in self.memory)
        self.k, self._here = begin + steps, (f, gradient, value)
        part = Measured(begin, *(torch.stack(rows) for rows in (xs, fs, gradients, values)))
        self.outcomes, places = self.outcomes.after(part, task.targets)
        return Stretch(part, memory, torch.stack(fed), tuple(taken)), places

    def _fits(self, steps: int) -> bool:
        numbers = sum(piece.numel() for piece in self.memory)
        size = _GRAPH_PER_MEMORY * numbers * self.x.element_size()
        return steps * size <= _GRAPH

    @property
    def value(self) -> Tensor:
        """f where the run stands, shape (b,)."""
        return self._here[0]

    def usable(self, rows: Tensor) -> Tensor:
        """Rows of shape (..., b, d) with zeros for the problems whose run left the numbers."""
        return torch.where(self.outcomes.finite.unsqueeze(-1), rows, torch.zeros_like(rows))


def gradients(
    learned: LearnedOptimizer,
    rollout: Rollout,
    stretches: Sequence[Stretch],
    cotangents: Sequence[Tensor],
    inputs: Inputs,
    *,
    tile: int = _TILE,
) -> list[Tensor]:
    """d/dtheta of the sum of <c_k, x_k> over consecutive stretches, one tensor a parameter.

    What happened before the first of them counts as constant.

    Args:
        learned: The optimiser.
        rollout: The run.
        stretches: In order of the steps; the first with its memory.
        cotangents: Of each, c_a .. c_{a+S}, shape (S + 1, b, d).
        inputs: Which road.
        tile: Coordinates in one replay, for "detached".
    """
    clean = [rollout.usable(rows) for rows in cotangents]
    parameters = [p for p in learned.parameters() if p.requires_grad]
    if inputs == "through":
        return _through(learned, rollout.task, stretches, clean, parameters)
    first = stretches[0]
    # (A graph with numbers that are none gives nothing else.)
    if len(stretches) == 1 and first.taken and bool(rollout.outcomes.finite.all()):
        return products(first.taken, parameters, _arriving(clean[0]).unbind())
    return _detached(learned, rollout, stretches, clean, parameters, tile)


def _detached(
    learned: LearnedOptimizer,
    rollout: Rollout,
    stretches: Sequence[Stretch],
    cotangents: Sequence[Tensor],
    parameters: Sequence[Tensor],
    tile: int,
) -> list[Tensor]:
    """Network replayed on the gradients that it was fed."""
    arriving = torch.zeros_like(rollout.x)
    on_steps: list[Tensor] = []
    for rows in reversed(cotangents):
        # What arrives at the start of a stretch goes on to the one before.
        sums = _arriving(rows) + arriving
        arriving = sums[0] + rows[0]
        on_steps.insert(0, sums)
    fed = [rollout.usable(one.fed) for one in stretches]
    norms = [norm_of(one) for one in fed]
    memory = stretches[0].memory
    assert memory is not None
    whole = rollout.x.numel()
    totals = [torch.zeros_like(p) for p in parameters]
    size = tile if learned.coordinatewise else whole
    for begin in range(0, whole, size):
        taken = slice(begin, min(begin + size, whole)) if learned.coordinatewise else None
        start = tuple(_taken(_finite(piece), taken, rollout.x.shape) for piece in memory)
        parts = [
            _Part(
                one.begin,
                _steps(g, taken),
                _steps(n.expand(g.shape) if learned.coordinatewise else n, taken),
                _steps(c, taken),
            )
            for one, g, n, c in zip(stretches, fed, norms, on_steps, strict=True)
        ]
        found = _replayed(learned, parts, start, parameters)
        totals = [a + b for a, b in zip(totals, found, strict=True)]
    return totals


def _arriving(rows: Tensor) -> Tensor:
    """C_j = c_{j+1} + C_{j+1} of a stretch with c_a .. c_{a+S}, shape (S, b, d)."""
    return rows[1:].flip(0).cumsum(0).flip(0)


@dataclass(frozen=True)
class _Part:
    """A stretch of some coordinates: first step, gradients, their norms, and C."""

    begin: int
    fed: Tensor
    norms: Tensor
    on_steps: Tensor


def _replayed(
    learned: LearnedOptimizer,
    parts: Sequence[_Part],
    memory: Memory,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The gradient of sum_j <C_j, u_j>, from the last part to the first."""
    starts = [memory]
    with torch.no_grad():
        for part in parts[:-1]:
            for j, (g, n) in enumerate(zip(part.fed, part.norms, strict=True)):
                _, memory = learned.step(part.begin + j, g, memory, n)
            starts.append(memory)
    sweep = Sweep([torch.zeros_like(piece) for piece in starts[-1]], parameters)
    for part, start in zip(reversed(parts), reversed(starts), strict=True):
        first = part is parts[0]
        leaves = tuple(p.detach().requires_grad_(not first) for p in start)
        after, total = leaves, torch.zeros((), dtype=part.fed.dtype, device=part.fed.device)
        with torch.enable_grad():
            for j, (g, n, c) in enumerate(zip(part.fed, part.norms, part.on_steps, strict=True)):
                step, after = learned.step(part.begin + j, g, after, n)
                total = total + (c * step).sum()
        _sweep_through(sweep, [*after, total], leaves, reaches=not first)
    return sweep.sums


def _through(
    learned: LearnedOptimizer,
    task: MetaTask,
    stretches: Sequence[Stretch],
    cotangents: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The whole iteration replayed, from the last stretch to the first."""
    update = LearnedUpdate(learned, task.objective)
    starts = _Starts(update, stretches)
    sweep: Sweep | None = None
    for place in reversed(range(len(stretches))):
        one, rows = stretches[place], cotangents[place]
        reaches = place > 0
        leaves = tuple(p.detach().requires_grad_(reaches) for p in starts.at(place))
        state, total = leaves, torch.zeros((), dtype=rows.dtype, device=rows.device)
        with torch.enable_grad():
            if reaches:
                total = (rows[0] * state[0]).sum()
            for j, c in enumerate(rows[1:]):
                state = update(one.begin + j, state)
                total = total + (c * state[0]).sum()
        if sweep is None:
            sweep = Sweep([torch.zeros_like(piece) for piece in state], parameters)
        _sweep_through(sweep, [*state, total], leaves, reaches=reaches)
    assert sweep is not None
    return sweep.sums


def _sweep_through(
    sweep: Sweep, ends: Sequence[Tensor], starts: Sequence[Tensor], *, reaches: bool
) -> None:
    """One stretch back; the last of its ends is a number whose cotangent is 1."""
    sweep.join([torch.ones_like(ends[-1])])
    sweep.through(ends, starts if reaches else [])


class _Starts:
    """The states at the starts of stretches, of which about the root of their number is held.

    Args:
        update: The iteration.
        stretches: With the memory of the first.
    """

    def __init__(self, update: LearnedUpdate, stretches: Sequence[Stretch]) -> None:
        self._update, self._stretches = update, stretches
        memory = stretches[0].memory
        assert memory is not None
        self._stride = max(round(len(stretches) ** 0.5), 1)
        state = (stretches[0].measured.x[0], *memory)
        self._held = {0: state}
        last = (len(stretches) - 1) // self._stride * self._stride
        for place in range(last):
            state = self._over(place, state)
            if (place + 1) % self._stride == 0:
                self._held[place + 1] = state

    def at(self, place: int) -> tuple[Tensor, ...]:
        """The state at the start of a stretch; to be asked from the last to the first."""
        self._held = {k: state for k, state in self._held.items() if k <= place}
        if place not in self._held:
            k = max(self._held)
            state = self._held[k]
            while k < place:
                state, k = self._over(k, state), k + 1
                self._held[k] = state
        return self._held[place]

    @torch.no_grad()
    def _over(self, place: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        one = self._stretches[place]
        for j in range(len(one.fed)):
            state = self._update(one.begin + j, state)
        return state


def _taken(piece: Tensor, taken: slice | None, shape: torch.Size) -> Tensor:
    """Some coordinates of a piece of the memory that begins with a shape."""
    if taken is None:
        return piece
    return piece.reshape(shape.numel(), *piece.shape[len(shape) :])[taken]


def _steps(rows: Tensor, taken: slice | None) -> Tensor:
    """Some coordinates of every step, shape (S, coordinates)."""
    return rows if taken is None else rows.reshape(len(rows), -1)[:, taken]


def _finite(piece: Tensor) -> Tensor:
    return piece.nan_to_num(0.0, 0.0, 0.0)
