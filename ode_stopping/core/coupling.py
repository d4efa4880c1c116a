"""Are the samples of a batch independent? Looked at before a run that takes them for it.

A function of rows must give every row a value that depends on that row alone (and on what is
declared to have one row a sample). One that does not (a mean over the batch, a norm over all of
it, batch normalisation) would make N of one problem depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .consistency import natural_size, noise_like
from .rows import Rows

__all__ = ["refuse_coupling", "refuse_undeclared"]

# By how much rows are moved, in units of their entries, the second where the first is refused.
_MOVES = (1e-2, 1e-6)
# Of an entry's move, the share that does not depend on its own size.
_FLOOR = 1e-2
# Roundings by which a row may differ that was computed beside others.
_ROUNDINGS = 4.0
_OTHER_SHAPE = 1e3


def refuse_coupling(evaluate: Callable[[Tensor], Tensor], rows: Tensor, *, name: str) -> None:
    """Raise if what a function makes of one row depends on another row.

    Rows are moved in halves, by the binary digits of their numbers: any two differ in a digit, so
    any coupling of two is seen. Takes three evaluations and one for each digit. A function that
    draws random numbers, so that it has no two equal values, cannot be looked at.

    Args:
        evaluate: Rows, shape (B, n), to values, shape (B, ...), without graph.
        rows: The point.
        name: Of the function, for the message.

    Raises:
        ValueError: Naming the function and a sample.
    """
    count = len(rows)
    if count == 1:
        return
    base, again = _flat(evaluate(rows)), _flat(evaluate(rows))
    noise = (base - again).abs().nan_to_num()
    if bool((noise > _OTHER_SHAPE * torch.finfo(base.dtype).eps * _size(base).amax()).any()):
        return
    numbers = torch.arange(count, device=rows.device)
    for size in _MOVES:
        floor = _FLOOR * natural_size(rows)
        moved = rows + size * noise_like(seed=5)(rows) * torch.maximum(rows.abs(), floor)
        try:
            all_moved = _flat(evaluate(moved))
            for digit in range((count - 1).bit_length()):
                own = (numbers >> digit) % 2 == 1
                mixed = _flat(evaluate(torch.where(own[:, None], moved, rows)))
                right = torch.where(own[:, None], all_moved, base)
                _require_equal(mixed, right, noise, name)
        except (ArithmeticError, AssertionError, RuntimeError):
            continue  # numbers that it was not made for
        return


def refuse_undeclared(
    evaluate: Callable[[Tensor], Tensor], rows: Tensor, everyone: Rows, *, name: str
) -> None:
    """Raise if a function does not give every second row alone what it gives it among all.

    Args:
        evaluate: Rows, shape (b, n), to values, shape (b, ...), without graph.
        rows: The point, shape (B, n).
        everyone: All rows, with what is declared.
        name: Of the function, for the message.

    Raises:
        ValueError: Naming the function and `per_sample`.
    """
    if len(rows) == 1:
        return
    some = everyone.keeping(torch.arange(1, len(rows), 2, device=rows.device))
    base = _flat(evaluate(rows))
    right = some.of(base)
    reason = ""
    try:
        with some.shown():
            alone = _flat(evaluate(some.of(rows)))
    except (IndexError, RuntimeError, ValueError) as error:
        reason = f" ({error})"
    else:
        eps = torch.finfo(right.dtype).eps
        own, largest = _size(right).amax(dim=1, keepdim=True), _size(base).amax()
        allowed = eps**0.5 * own + _OTHER_SHAPE * eps * largest
        if bool((((alone - right).abs() <= allowed) | ~torch.isfinite(right)).all()):
            return
    raise ValueError(
        f"the {name} does not give some of the samples alone what it gives them among all{reason}: "
        "it uses a tensor with one row a sample that per_sample does not name, or draws random "
        "numbers by the batch. Name every such tensor, as the function itself uses it, or leave "
        "per_sample out: then no sample leaves the computation"
    )


def _require_equal(found: Tensor, right: Tensor, noise: Tensor, name: str) -> None:
    eps = torch.finfo(right.dtype).eps
    allowed = _ROUNDINGS * (noise + eps * _size(right).amax(dim=1, keepdim=True))
    same = ((found - right).abs() <= allowed) | (found == right)
    same = same | (torch.isnan(found) & torch.isnan(right))
    rows = same.all(dim=1)
    if not bool(rows.all()):
        sample = int((~rows).nonzero()[0])
        raise ValueError(
            f"the {name} couples the samples of the batch: what it gives sample {sample} changes "
            "when others are moved (a sum, mean or norm over dim 0, batch normalisation?). With "
            "batched=True dim 0 holds independent problems; work along the other axes"
        )


def _size(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values.abs(), 0.0)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
