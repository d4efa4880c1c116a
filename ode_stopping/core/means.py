"""The mean over many runs, of which some did not meet their target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

__all__ = ["ReachedMean", "mean_over_reached"]


class _Run(Protocol):
    """What is read off a `StoppingResult` or a `StoppingIndexResult`."""

    @property
    def reached(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ReachedMean:
    """A mean over the runs that met their target, and how many that were.

    Attributes:
        mean: Mean over the reached, shape (), float64; differentiable.
        reached: How many runs (or samples of batched ones) are in the mean.
        missed: How many are not.
    """

    mean: Tensor
    reached: int
    missed: int

    @property
    def fraction(self) -> float:
        """The part of the runs that met their target."""
        return self.reached / (self.reached + self.missed)


def mean_over_reached(
    results: Iterable[object], *, which: Literal["time", "steps"] | None = None
) -> ReachedMean:
    """Mean stopping time, or mean stopping index, over the runs that met their target.

        mean = sum_{i reached} T_i / #{i reached}

    A miss is infinite, and the plain mean with it: ``torch.stack([r.time for r in runs]).mean()``
    is inf and refuses to be differentiated. Here misses are left out before the mean is taken, so
    that neither inf nor NaN gets into it or into its gradient; a censored miss is a miss, too.

    Mind what that mean says: it is conditional on success. A parameter under which fewer runs reach
    their target can lower it, so keep an eye on `missed`, or use `censored=`, which counts a miss
    with a number of your own.

    Args:
        results: What `stopping_time` or `stopping_index` returned, of one kind, one or many.
        which: "time" (flow time) or "steps"; None: "steps" for results that have them (those of
            `stopping_index`), else "time".

    Raises:
        TypeError: An entry is no result.
        ValueError: Nothing was reached; no results; an unknown `which`, or one that the results do
            not have.
    """
    if which not in (None, "time", "steps"):
        raise ValueError(f'which must be "time", "steps" or None; got {which!r}')
    runs = list(results) if isinstance(results, Iterable) else [results]
    if not runs:
        raise ValueError("results must hold at least one result; got none")
    kind = which or ("steps" if all(hasattr(run, "steps") for run in runs) else "time")
    kept, missed = [], 0
    for position, run in enumerate(runs):
        value, hit = _checked(run, kind, position)
        missed += int((~hit).sum())
        # Selected, not multiplied by zero: 0 * inf is NaN, forward and backward.
        kept.append(value[hit])
    chosen = torch.cat([piece.to(kept[0].device) for piece in kept])
    if not chosen.numel():
        raise ValueError(
            f"results has no run that met its target, in {missed}: there is no mean. Raise the "
            "horizon, choose targets that are met earlier, or say what a miss counts as with "
            "censored="
        )
    return ReachedMean(chosen.mean(), chosen.numel(), missed)


def _checked(run: object, kind: str, position: int) -> tuple[Tensor, Tensor]:
    """The values, shape (B,), and which of them are reached; B = 1 unless batched."""
    if not isinstance(getattr(run, "reached", None), Tensor):
        raise TypeError(
            "results must hold results of stopping_time or stopping_index; entry "
            f"{position} is {type(run).__name__}"
        )
    value = getattr(run, kind, None)
    if not isinstance(value, Tensor):
        raise ValueError(
            f'which = "{kind}", but entry {position} of results has none (a bare update has no '
            "flow time, a flow no steps)"
        )
    hit = cast("_Run", run).reached.to(value.device).expand(value.shape).reshape(-1)
    return value.to(torch.float64).reshape(-1), hit
