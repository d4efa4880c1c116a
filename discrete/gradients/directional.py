"""The gradient of x_{N-1}, held against one difference of it along all that it depends on.

The twin of the continuous side's `gradients.directional`: a derivative that is lost in some steps
only shows in the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ode_stopping.core.directional import contradictions
from ode_stopping.core.names import names_of
from ode_stopping.core.status import GradientAccuracyWarning
from ode_stopping.core.warn import warn_user

from ..call import Call
from .adjoint import DiscretePullBack
from .problem import IndexProblem

__all__ = ["warn_about", "warn_about_lost"]


def warn_about_lost(problem: IndexProblem, cotangent: Tensor, pulled: DiscretePullBack) -> None:
    """Warn by name of tensors whose derivative is lost or wrong in some of the steps.

    Costs two runs up to x_{N-1}, and more only where something is wrong. A truncated sum is not
    looked at: it is no gradient.

    Args:
        problem: The solved problem.
        cotangent: On x_{N-1}, shape (n,).
        pulled: What the route made of it.
    """
    last = problem.index - 1
    if pulled.start is None or last <= problem.first:
        return
    update, clock = problem.update, problem.clock
    leaves = problem.leaves.detached_from_history()
    places = {id(leaf): index for index, leaf in enumerate(problem.leaves.tensors)}

    def value(start: Tensor) -> float:
        # Through torch, which shows another step where that is moved.
        step = clock.step
        h = float(step.detach() + 0.0) if isinstance(step, Tensor) else step
        x = start
        for k in range(problem.first, last):
            x = update.step(k, x, clock.start_value + k * h)
        return float(cotangent @ x)

    size = float((cotangent * problem.previous).abs().sum())
    gradients = [pulled.start, *(pulled.leaves[places[id(leaf)]] for leaf in leaves)]
    errors = contradictions(value, problem.x0, leaves, gradients, size)
    warn_about(errors, leaves, problem.run.call, f"x_{last}")


def warn_about(errors: Sequence[float], leaves: Sequence[Tensor], call: Call, what: str) -> None:
    """Say which of (x0, *leaves) have a derivative that a difference contradicts.

    Args:
        errors: Relative, one a tensor; 0 where there is none.
        leaves: Tensors that were moved besides x0.
        call: What was asked.
        what: The name of what they move.
    """
    functions = {"update": call.update.given, "criterion": call.criterion.function}
    names = ["x0", *names_of(leaves, functions)]
    lost = [name for name, error in zip(names, errors, strict=True) if error > 0.0]
    if lost:
        warn_user(
            f"the gradient of this stopping index may be wrong by about {max(errors):.1e} "
            f"(relative): moving {', '.join(lost)} a little changes {what} by something else "
            "than the derivatives of the update say. One of them is lost or wrong in some of the "
            "steps: a .detach(), .item() or torch.no_grad() on a branch, a hook, a "
            "torch.autograd.Function.",
            GradientAccuracyWarning,
        )
