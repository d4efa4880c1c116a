"""What the checks of events share: Jacobians by one output at a time, and how they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Figure

__all__ = ["errors_of", "jacobian", "leaves_of", "worst_figure"]

# An error of zero has to be drawn somewhere.
_FLOOR = 1e-17


def leaves_of(values: Mapping[str, float | Sequence[float]]) -> dict[str, Tensor]:
    """The values as float64 tensors that require grad."""
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in values.items()
    }


def jacobian(outputs: Tensor, leaves: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """d outputs / d leaves, shape (M, P), by one backward pass an output.

    A leaf that an output does not reach counts as zero.

    Args:
        outputs: Shape (M,), with their graph.
        leaves: Scalars and vectors, P numbers in all.
    """
    tensors = list(leaves.values())
    rows = []
    for output in outputs.unbind():
        found = torch.autograd.grad(output, tensors, retain_graph=True, allow_unused=True)
        row = [
            torch.zeros_like(leaf) if part is None else part
            for leaf, part in zip(tensors, found, strict=True)
        ]
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    return np.asarray(torch.stack(rows).detach().numpy())


def errors_of(
    found: NDArray[np.float64],
    exact: NDArray[np.float64],
    leaves: Mapping[str, Tensor],
    *,
    by_column: bool = False,
) -> dict[str, float]:
    """The largest error to each leaf; of a vector its norm, row by row.

    Relative where the derivative is not zero; where it is, the error itself.

    Args:
        found: Shape (M, P).
        exact: Likewise.
        leaves: As for `jacobian`.
        by_column: Relative to the largest derivative to the leaf, over all rows, instead of each
            row's own: some rows may be nearly zero by accident.
    """
    errors: dict[str, float] = {}
    begin = 0
    for name, leaf in leaves.items():
        columns = slice(begin, begin + leaf.numel())
        begin += leaf.numel()
        size = np.linalg.norm(exact[:, columns], axis=1)
        if by_column:
            size = np.full_like(size, size.max())
        gap = np.linalg.norm(found[:, columns] - exact[:, columns], axis=1)
        # np.max hands a NaN on, max() would lose it.
        errors[name] = float(np.max(gap / np.where(size > 0.0, size, 1.0)))
    return errors


def worst_figure(
    name: str,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    label: str,
    bound: float,
    caption: str,
) -> Figure:
    """Errors over the number of the event, one curve a name, with the bound dashed.

    Args:
        name: Of the figure.
        curves: The numbers, and the errors there.
        label: Of the horizontal axis.
        bound: What is still right.
        caption: What to see.
    """
    figure, axes = new_figure()
    for position, (curve, (numbers, errors)) in enumerate(curves.items()):
        axes.plot(
            numbers,
            np.maximum(errors, _FLOOR),
            marker=MARKERS[position % len(MARKERS)],
            color=COLOURS[position % len(COLOURS)],
            markerfacecolor="white",
            label=curve,
        )
    axes.axhline(bound, color="#555555", linestyle=(0, (4, 3)), label="tolerance")
    axes.set(yscale="log", xlabel=label, ylabel="largest relative error of a derivative")
    axes.legend(loc="best", ncols=2)
    return Figure(name, caption, figure, "errors below a dashed line")
