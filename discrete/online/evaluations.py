"""The loss before and after every step: which evaluations serve twice, and what they tell."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from .closures import Closure, Evaluation, Randomness, evaluate, same_loss

__all__ = ["Evaluations"]

# A closure that is said to be deterministic is asked twice in its second step, and now and then.
_CHECKED, _CHECK_EVERY = 2, 100


class Evaluations:
    """The evaluations of an optimiser's closure.

    Args:
        name: The optimiser's, for messages.
        deterministic: Whether the closure is said to be.
        graph: Whether gradients are to be differentiable.

    Attributes:
        repeats: Whether the last step began with the loss that the one before ended with, so that
            the batch is no fresh one; None where that is not known.
    """

    def __init__(self, name: str, *, deterministic: bool, graph: bool) -> None:
        self.repeats: bool | None = True if deterministic else None
        self._name = name
        self._deterministic = deterministic
        self._graph = graph
        self._ended: tuple[float, float] | None = None  # loss of the last step's end, its rounding
        self._pending: Evaluation | None = None
        self._left: tuple[Any, ...] | None = None  # versions of the parameters after a step
        self._random: Randomness | None = None

    def at(self, closure: Closure, parameters: Sequence[Tensor]) -> Evaluation:
        """A new evaluation where the parameters are."""
        return evaluate(closure, parameters, name=self._name, graph=self._graph)

    def moved_since(self, parameters: Sequence[Tensor]) -> bool:
        """Whether somebody has changed the parameters since the last step."""
        return self._left is not None and self._left != _versions(parameters)

    def before(self, closure: Closure, parameters: Sequence[Tensor], step: int) -> Evaluation:
        """Loss and gradients at x_k: those that the last step ended with, or new ones.

        Args:
            closure: The user's.
            parameters: Where they are now.
            step: The number of the step that is about to be made, from 1.

        Raises:
            RuntimeError: The closure is said to be deterministic, and is not.
        """
        pending, self._pending = self._pending, None
        if pending is not None and (self.moved_since(parameters) or not pending.still_valid()):
            pending = None
        if pending is not None and step != _CHECKED and step % _CHECK_EVERY:
            return pending
        self._random = None if self._deterministic else Randomness(parameters)
        seen = self.at(closure, parameters)
        if self._ended is None:
            return seen
        # Parameters that were changed between the steps count as another batch, which is safe.
        same = same_loss(seen, self._ended)
        if self._deterministic and pending is not None and not same:
            raise RuntimeError(
                f"{self._name}(deterministic=True), and the closure gives the loss {seen.loss!r} "
                f"where it gave {self._ended[0]!r} before: it is not deterministic (another batch, "
                "dropout, parameters changed through .data). Leave the option out"
            )
        if not self._deterministic:
            self.repeats = same
        return seen

    def after(self, closure: Closure, parameters: Sequence[Tensor]) -> Evaluation:
        """Loss and gradients at x_{k+1}, with the random numbers of x_k."""
        with nullcontext() if self._random is None else self._random.again():
            return self.at(closure, parameters)

    def end(
        self, ended: Evaluation | None, parameters: Sequence[Tensor], *, reusable: bool
    ) -> None:
        """The step is over.

        Args:
            ended: The evaluation where the parameters are now; None where there is none.
            parameters: These.
            reusable: Whether its gradients are still what the parameters hold.
        """
        self._ended = None if ended is None else (ended.loss, ended.rounding)
        self._pending = ended if self._deterministic and reusable else None
        self._left = _versions(parameters)

    def state(self) -> dict[str, Any]:
        """For a state_dict."""
        return {"ended": self._ended, "repeats": self.repeats}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self._ended = None if state["ended"] is None else tuple(state["ended"])
        self.repeats = state["repeats"]
        self._pending = self._left = None


def _versions(parameters: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes when a parameter is changed in place, frozen or set free."""
    return tuple((p._version, p.requires_grad) for p in parameters)
