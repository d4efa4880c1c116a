"""A derivative taken inside a function that is itself differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_gradient(
    function: Callable[[Tensor], Tensor], point: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A function's value and its gradient at a point, in every autograd mode.

    With grad enabled both carry their graph (`create_graph=True`): to the point, where it requires
    grad, and to every tensor inside the function that does. Under `torch.no_grad()` grad is enabled
    inside, and both are detached.

    Args:
        function: point -> value of any shape; the gradient is that of the sum of its entries.
        point: Floating-point tensor of any shape; need not require grad.

    Returns:
        The value, and the gradient, shape of the point; None where the value does not depend on it.
    """
    keep_graph = torch.is_grad_enabled()
    through = keep_graph and point.requires_grad
    with torch.enable_grad():
        # A fresh alias: should the function also use the point by another way (a reference that is
        # the same tensor, say), only the path through its argument counts.
        argument = point.view_as(point) if through else point.detach().requires_grad_()
        value = function(argument)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(
                value.sum(), argument, create_graph=keep_graph, allow_unused=True
            )
    if not keep_graph:
        return value.detach(), None if gradient is None else gradient.detach()
    if not through:
        # The leaf made above must not pass for one of the user's: with requires_grad off nothing
        # accumulates in it, and a graph that leads to it alone is no graph at all.
        argument.requires_grad_(False)
        value = value if _reaches_leaf(value) else value.detach()
        if gradient is not None and not _reaches_leaf(gradient):
            gradient = gradient.detach()
    return value, gradient


def _reaches_leaf(tensor: Tensor) -> bool:
    """Whether a graph leads to any leaf that requires grad."""
    if tensor.grad_fn is None:
        return tensor.requires_grad
    pending, seen = [tensor.grad_fn], {tensor.grad_fn}
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.requires_grad:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return False
