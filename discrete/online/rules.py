"""What a signal does to a hyperparameter: Algorithm 2 as printed, and the guarded form.

With J = f and the step that has just been made, x_k -> x_{k+1}, the one-step sensitivity of the
stopping index (equation 13; K steps: `window`) is the quotient

    S = dN/d theta = -(df(x_{k+1})/d theta) / Df,    Df = f(x_{k+1}) - f(x_k)

which for the learning rate alpha and the direction d_k of the step is (grad f(x_{k+1}) . d_k)/Df.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, NamedTuple

__all__ = ["Decision", "GuardedRule", "Observation", "PaperRule"]

Action = Literal[
    "larger", "smaller", "backed off", "no decrease", "no signal", "undone", "not looked at"
]


class Observation(NamedTuple):
    """What one step showed.

    Attributes:
        before: f(x_k).
        after: f(x_{k+1}), on the same batch.
        rounding: Below which a change of f says nothing.
        steps: Through how many steps the derivatives go back.
    """

    before: float
    after: float
    rounding: float
    steps: int = 1

    @property
    def change(self) -> float:
        """Df; negative where f fell."""
        return self.after - self.before


class Decision(NamedTuple):
    """What follows from it.

    Attributes:
        action: In a word, for the history.
        moves: By how much each hyperparameter moves, by name, for an adaptation rate of 1: in
            theta itself (`PaperRule`) or in u (`GuardedRule`). Empty: none moves.
        signals: -dN/d theta, or K r before any clipping, by name; empty where Df is 0 or within its
            rounding.
    """

    action: Action
    moves: dict[str, float]
    signals: dict[str, float]


@dataclass
class PaperRule:
    """Algorithm 2 of arXiv 2505.22509 as printed: alpha <- alpha - eta S.

    Where f_ref - f(x_{k+1}) > descent_threshold * (updates so far), the rate moves (if Df is not 0)
    and f_ref <- f(x_{k+1}), which starts at f(x_0). Nothing keeps the rate positive, and a step
    that raised f has the wrong sign: trap and cure are `GuardedRule`'s.

    Attributes:
        threshold: eps_desc, in units of f.
        updates: How often the condition was met.
        reference: f_ref; None before the first step.
    """

    threshold: float
    updates: int = 0
    reference: float | None = None

    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        """The change of the rate for eta = 1.

        Args:
            derivatives: df(x_{k+1})/d theta.
            seen: The step.
        """
        if self.reference is None:
            self.reference = seen.before
        moves: dict[str, float] = {}
        if seen.change != 0:
            moves = {name: slope / seen.change for name, slope in derivatives.items()}
        if not self.reference - seen.after > self.threshold * self.updates:
            return Decision("no decrease", {}, moves)
        self.reference = seen.after
        self.updates += 1
        if not moves:
            return Decision("no signal", {}, {})
        return Decision("larger" if sum(moves.values()) > 0 else "smaller", moves, moves)

    def state(self) -> dict[str, Any]:
        """For a state_dict."""
        return {"updates": self.updates, "reference": self.reference}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.updates, self.reference = state["updates"], state["reference"]


@dataclass
class GuardedRule:
    """Descent of N in coordinates without unit, by steps that are bounded and may be refused.

        r = -(df(x_{k+1})/du) / (K |Df|),  clipped to [-max_signal, max_signal]
        u <- u + eta r                 where f fell and r > 0
        u <- u + eta caution r         where f fell and r < 0, or f rose and r < 0
        eta = adapt_rate / sqrt(1 + updates/settle)

    and nothing where f rose and r > 0, where f fell by no more than the threshold, and where it
    moved within its rounding. Where f fell, r is -dN/du for each of the K steps that the derivative
    goes back through; where it rose, N has no derivative, and r is the descent direction of f.

    Attributes:
        threshold: The decrease that an update takes, in units of f.
        max_signal: The bound on r. One signal of the rounding's size would move the rate anywhere.
        caution: Weight of a negative signal. r = 0 is the best step along d_k *alone*; a direction
            with momentum wants longer ones, as what overshoots is used again.
        settle: After how many updates the steps get shorter.
        updates: How often something moved.
    """

    threshold: float = 0.0
    max_signal: float = 0.5
    caution: float = 1.0 / 3.0
    settle: float = 25.0
    updates: int = 0

    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        """The change of u for adapt_rate = 1.

        Args:
            derivatives: df(x_{k+1})/du.
            seen: The step.
        """
        if not abs(seen.change) > seen.rounding:
            return Decision("no signal", {}, {})
        fell = seen.change < 0
        signals = {name: -slope / abs(seen.change) for name, slope in derivatives.items()}
        if fell and not -seen.change > self.threshold:
            return Decision("no decrease", {}, signals)
        moves: dict[str, float] = {}
        for name, signal in signals.items():
            clipped = min(max(signal / seen.steps, -self.max_signal), self.max_signal)
            if clipped < 0 and self.caution:
                moves[name] = self.caution * clipped
            elif clipped > 0 and fell:
                moves[name] = clipped
        if not moves:
            return Decision("no signal" if fell else "no decrease", {}, signals)
        scale = 1.0 / sqrt(1.0 + self.updates / self.settle)
        self.updates += 1
        grew = sum(moves.values()) > 0
        action: Action = "larger" if grew else "smaller" if fell else "backed off"
        return Decision(action, {name: scale * move for name, move in moves.items()}, signals)

    def state(self) -> dict[str, Any]:
        """For a state_dict."""
        return {"updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.updates = state["updates"]
