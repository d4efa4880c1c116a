"""The indices of a batch, linear in what they depend on, and where cotangents enter the sweep.

Of every target of every sample

    dN = sum_j weight_j dJ(x_j) + by_target d eps,      j = N, or N - 1 and N,

with the weights of Definition 3 or of the fractional index "log" (`index`). A batch is pulled back
by numbers of this kind alone: at step j each sample's lam gains weight_j grad J(x_j).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import nan

import torch
from torch import Tensor

from ode_stopping.core.rows import Rows

from ..iterating.batch import BatchRun

__all__ = ["Injections", "LinearIndex", "accurate_decreases", "linear_index"]

# Share of the decrease below which its rounding is let be.
_SETTLED = 1e-3


@dataclass(frozen=True)
class LinearIndex:
    """The indices with their derivatives to J at the last steps, and to the targets.

    Attributes:
        value: N or N*, shape (B, K), float64; NaN where a target was not met.
        steps: The steps j, shape (B, K) each; -1 where there is none.
        weights: The derivatives to J(x_j), shape (B, K) each, float64; 0 where there is none.
        by_target: The derivative to eps, shape (B, K).
        flat: Where J_N = J_{N-1}: the value stands, and has no derivative; shape (B, K).
    """

    value: Tensor
    steps: list[Tensor]
    weights: list[Tensor]
    by_target: Tensor
    flat: Tensor


def linear_index(run: BatchRun, decreases: Tensor) -> LinearIndex:
    """The indices of a run.

    Args:
        run: The forward run.
        decreases: J_N - J_{N-1}, shape (B, K).

    Raises:
        ValueError: "log" with a J that is not positive, or a target that is not.
    """
    samples, whole = run.samples, run.call.definition.whole
    index, shown = samples.index, run.call.criterion.shown
    counted = index.to(torch.float64)
    value = torch.where(samples.met, counted, nan)
    solved = index > 0
    if whole:
        flat = solved & (decreases == 0)
        quotient = torch.where(solved & ~flat, 1.0 / decreases, 0.0)
        return LinearIndex(value, [index], [-quotient], quotient, flat)
    ends = torch.where(solved, torch.minimum(shown(samples.value), shown(samples.before)), 1.0)
    if not bool((ends > 0).all()):
        sample, place = (ends <= 0).nonzero()[0].tolist()
        raise ValueError(
            'interpolation="log" needs a criterion that stays positive; got '
            f"J = {float(ends[sample, place]):g} of sample {sample} at the end of its run"
        )
    p, q, eps = samples.before, samples.value, run.call.levels
    s = (p / eps).log() / (p / q).log()
    slope = torch.log1p(decreases / p)
    flat = solved & ~((slope != 0) & torch.isfinite(s))
    fit = solved & ~flat
    parts = [-(1 - s) / (p * slope), -s / (q * slope), 1.0 / (eps * slope)]
    first, second, by_target = (torch.where(fit, part, 0.0) for part in parts)
    value = torch.where(fit, counted - 1 + s, value)
    return LinearIndex(value, [index - 1, index], [first, second], by_target, flat)


def accurate_decreases(run: BatchRun) -> Tensor:
    """J_N - J_{N-1}, shape (B, K), where it cancels in low precision by the trapezoidal form.

    See `index.accurate_decrease`. Samples whose decrease stands clear of its rounding are not
    looked at; the others are, step by step.
    """
    samples, plain = run.samples, run.samples.decrease
    if run.call.begin.dtype == torch.float64:
        return plain
    call = run.call
    criterion, update, clock = call.criterion, call.update, call.update.clock
    eps, found = torch.finfo(call.begin.dtype).eps, plain.clone()
    for place in range(plain.shape[1]):
        index, solved = samples.index[:, place], samples.index[:, place] > 0
        here = torch.where(solved[:, None], samples.state[:, place], call.begin)
        _, slope = criterion.row_gradients(clock.time(run.index), here)
        size = samples.value[:, place].abs() + samples.before[:, place].abs()
        rounding = 4 * eps * (size + (slope * here).double().abs().sum(dim=1))
        doubtful = solved & (rounding > _SETTLED * plain[:, place].abs())
        for n in index[doubtful].unique().tolist():
            mask = doubtful & (index == n)
            after = torch.where(mask[:, None], here, call.begin)
            before = torch.where(mask[:, None], samples.previous[:, place], call.begin)
            time = update.time_tensor(clock.time(n - 1))
            increment = update.increment(n - 1, before, time).detach().double()
            _, ahead = criterion.row_gradients(clock.time(n), after)
            _, behind = criterion.row_gradients(clock.time(n - 1), before)
            trapezoidal = 0.5 * ((ahead.double() + behind.double()) * increment).sum(dim=1)
            # What the time itself does to J, which a shared t gives no single derivatives of.
            at_end = criterion.row_values(clock.time(n), before)
            at_begin = criterion.row_values(clock.time(n - 1), before)
            trapezoidal = trapezoidal + (at_end - at_begin)
            gap = (trapezoidal - plain[:, place]).abs()
            explained = mask & (trapezoidal < 0) & (gap <= rounding)
            found[:, place] = torch.where(explained, trapezoidal, found[:, place])
    return found


class Injections:
    """Cotangents on J and on the states at the steps where they enter, with zeros left out.

    Args:
        on_values: Steps and cotangents on J there, shape (B, M) each, float64.
        on_states: Steps, shape (B, L), and cotangents on the states there, shape (B, L, n).

    Attributes:
        needed: The last step of each sample that a cotangent enters at, shape (B,); 0: none.
    """

    def __init__(self, on_values: tuple[Tensor, Tensor], on_states: tuple[Tensor, Tensor]) -> None:
        steps, self._weights = on_values
        self._value_steps = torch.where(self._weights != 0, steps, -1)
        steps, self._cotangents = on_states
        self._state_steps = torch.where((self._cotangents != 0).any(dim=2), steps, -1)
        every = torch.cat([self._value_steps, self._state_steps], dim=1)
        self.needed = every.amax(dim=1).clamp(min=0)
        self.weighted = {k for k in self._value_steps.unique().tolist() if k >= 0}
        self.steps = [k for k in every.unique().tolist() if k >= 0]

    @cached_property
    def last(self) -> int:
        """The last step that a cotangent enters at; -1: none does."""
        return self.steps[-1] if self.steps else -1

    def at(self, k: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Of step k the cotangents on J, shape (b,), and on the states, shape (b, n)."""
        here = self._value_steps == k
        weights = torch.where(here, self._weights, 0.0).sum(dim=1)
        there = (self._state_steps == k)[:, :, None]
        states = torch.where(there, self._cotangents, 0.0).sum(dim=1)
        return rows.of(weights), rows.of(states)
