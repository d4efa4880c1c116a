"""Eigenvalues in the complex plane: of a Hessian, or of a flow linearised at a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.states import State, StateLayout
from .style import DASHES, GREY, canvas, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["flow_spectrum", "plot_spectrum"]

_LARGEST = 2000


def flow_spectrum(flow: Callable[..., Any], t: float | Tensor, state: State) -> Tensor:
    """Eigenvalues of F_x(t, x), the flow linearised at a state, by its dense Jacobian.

    Euler with step h is stable along an eigenvalue l with negative real part where |1 + h l| < 1.

    Args:
        flow: (t, x) -> dx/dt.
        t: Flow time.
        state: A tensor or a tuple of tensors, with n entries in all.

    Returns:
        Shape (n,), complex, ordered by their real parts.

    Raises:
        ValueError: n > 2000; the velocity does not depend on the state as far as autograd sees.
    """
    layout = StateLayout.of(state)
    flat = layout.pack(state).detach()
    if flat.numel() > _LARGEST:
        raise ValueError(
            f"state has {flat.numel()} entries: a dense Jacobian is for {_LARGEST} at most"
        )
    clock = torch.as_tensor(t, dtype=flat.dtype, device=flat.device).detach()

    def velocity(x: Tensor) -> Tensor:
        return layout.pack(flow(clock, layout.unpack(x)))

    with torch.enable_grad():
        if not velocity(flat.clone().requires_grad_()).requires_grad:
            raise ValueError("flow does not depend on the state as far as autograd can see")
        jacobian = torch.autograd.functional.jacobian(velocity, flat)
    return _eigenvalues(jacobian.detach())


def plot_spectrum(
    matrix_or_eigenvalues: Any,
    *,
    axes: Axes | None = None,
    label: str | None = None,
    step: float | None = None,
) -> Axes:
    """Eigenvalues in the complex plane.

    Args:
        matrix_or_eigenvalues: A matrix (n, n), or eigenvalues (n,), real or complex.
        axes: Where to draw; None makes a figure.
        label: Name for the legend.
        step: h: draw the disc |1 + h l| = 1 too, in which Euler's method is stable for x' = l x.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        ValueError: Neither a square matrix nor a vector.
    """
    given = torch.as_tensor(matrix_or_eigenvalues).detach()
    if given.ndim == 2 and given.shape[0] == given.shape[1]:
        given = _eigenvalues(given)
    if given.ndim != 1:
        raise ValueError(
            f"give a square matrix or a vector of eigenvalues, got shape {tuple(given.shape)}"
        )
    eigenvalues = given.cpu().to(torch.complex128).numpy()
    axes = canvas(axes, "plot_spectrum")
    for line in (axes.axhline, axes.axvline):
        line(0.0, color=GREY, linewidth=0.6, zorder=1)
    if step is not None:
        circle = (np.exp(1j * np.linspace(0.0, 2 * np.pi, 200)) - 1) / step
        axes.plot(
            circle.real,
            circle.imag,
            color=GREY,
            linestyle=DASHES,
            linewidth=1.0,
            label=f"Euler, h = {step:g},\nstable inside",
        )
    axes.plot(
        eigenvalues.real,
        eigenvalues.imag,
        linestyle="none",
        marker="o",
        markersize=6,
        markerfacecolor="none",
        markeredgewidth=1.4,
        label=label,
    )
    axes.set(
        xlabel=r"real part of $\lambda$ (1 / flow time)", ylabel=r"imaginary part of $\lambda$"
    )
    if step is not None:
        axes.set_aspect("equal", adjustable="datalim")  # else the circle is none
    elif not eigenvalues.imag.any():
        axes.set_yticks([0.0])
    legend(axes, outside=step is not None)
    return axes


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Ordered by real part; complex."""
    found = torch.linalg.eigvals(matrix.to(torch.float64) if not matrix.is_complex() else matrix)
    return found[np.argsort(found.real.cpu().numpy(), kind="stable")]
