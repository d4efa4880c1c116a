"""What came out of a run: a gradient, its error, or what a user is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from page import figure
from torch import Tensor


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor | None:
    """d value / d leaf, or None where autograd has none."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)[0]


def or_none(value: Tensor, leaf: Tensor) -> str:
    """The derivative as a cell of a table; "None" where autograd has none."""
    found = gradient_of(value, leaf)
    return "None" if found is None else figure(float(found))


def relative(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float((found.double() - truth).norm() / truth.norm())


def said(action: Callable[[], Any]) -> str:
    """What a user sees: the value, and the warnings; or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = action()
        except Exception as error:
            return f"raises `{type(error).__name__}`"
    own = [w.category.__name__ for w in caught if issubclass(w.category, UserWarning)]
    if isinstance(value, Tensor):
        value = float(value.detach())
    text = figure(value) if isinstance(value, float) else str(value)
    return f"{text}, warns `{own[-1]}`" if own else text
