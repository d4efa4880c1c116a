"""Optimisers that tune their hyperparameters while they run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite, log
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ode_stopping.core.status import DivergedError

from .bundles import Bundle, Moved, aligned, bundled, clip, flat
from .closures import Closure, Evaluation, Randomness
from .coordinates import ANCHOR, LEARNING_RATE, WEIGHT_DECAY, Coordinate
from .evaluations import Evaluations
from .history import AdaptationHistory
from .options import AdaptationOptions
from .penalty import penalty_change, with_penalty
from .retreat import Retreat
from .rules import Decision, Observation
from .window import Window

__all__ = ["OnlineAdaptation"]

_UNDONE = log(0.1)


class OnlineAdaptation(Optimizer):
    """A `torch.optim.Optimizer` that descends its own stopping index while it runs.

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        for _ in range(steps):
            loss = optimizer.step(closure)

    Every `step` evaluates the closure at x_k, moves, and evaluates it again at x_{k+1}, with the
    same random numbers of torch's generators. The derivative of f(x_{k+1}) to the hyperparameters
    through the last `horizon` steps, over the change of f, is the derivative of the stopping index
    N (Definition 3, truncated; equation 13 for one step), and the hyperparameters take a step along
    it: one signal for the whole optimiser, whatever the number of tensors and groups.

    With a fresh batch in every step the present gradient agrees with itself whatever the rate, and
    would drive it up without end. So where the loss at x_k is not the one that the last step ended
    with, the gradient's own part in d_k is left out of the signal (`held_out`).

    A subclass says what a step is: `coordinates`, `buffers`, `move`, `step_map`; see `AdamOLA`.

    Args:
        params: Tensors or parameter groups. A group may have its own "adapt_rate" (0: its
            hyperparameters stay, and it takes no part in the signal).
        defaults: The group options of the subclass.
        options: Everything about the adaptation; see `AdaptationOptions`.

    Attributes:
        options: As given.
        rule: What turns signals into steps, with its counters.
        history: `AdaptationHistory`, a record a step.

    Raises:
        ValueError: A hyperparameter that is to be adapted has no admissible value.
    """

    coordinates: ClassVar[tuple[Coordinate, ...]]
    buffers: ClassVar[tuple[str, ...]]
    gradient_like: ClassVar[bool] = False  # whether directions have the unit of a gradient

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        options: AdaptationOptions,
    ) -> None:
        self.options = options
        self.rule = options.rule()
        self.history = AdaptationHistory()
        self._steps = 0
        self._adapted = options.chosen(self.coordinates, type(self).__name__)
        self._evaluations = self._new_evaluations()
        self._window = self._new_window()
        super().__init__(params, defaults)

    @abstractmethod
    def move(self, bundle: Bundle, *, held_out: bool) -> Moved:
        """Move the bundle's parameters by one step, in place, and advance states["step"]."""

    @staticmethod
    @abstractmethod
    def step_map(
        x: Tensor,
        gradient: Tensor,
        buffers: tuple[Tensor, ...],
        values: Mapping[str, Any],
        steps: float | Tensor,
        group: Mapping[str, Any],
        *,
        held_out: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same step on flat tensors, in differentiable operations: (x, buffers) after it.

        With `held_out` x moves without the present gradient's part in the direction.
        """

    @staticmethod
    @abstractmethod
    def remembers(group: Mapping[str, Any]) -> bool:
        """Whether a direction has parts that are not the present gradient's."""

    @staticmethod
    def check_group(group: Mapping[str, Any]) -> None:
        """Raise a ValueError that names a group's option which is not admissible."""
        if not group["lr"] > 0:
            raise ValueError(f"lr must be positive; got {group['lr']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its hyperparameters are bounded relative to their values."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group[ANCHOR] = {c.name: c.read(group) for c in self._adapted}

    def _check(self, group: Mapping[str, Any]) -> None:
        self.check_group(group)
        if not 0 <= group["adapt_rate"] < inf:
            raise ValueError(
                f"adapt_rate must be finite and not negative; got {group['adapt_rate']}"
            )
        if group["adapt_rate"]:
            for coordinate in self._adapted:
                coordinate.require_admissible(group)
        if any(p.is_complex() for p in group["params"]):
            raise ValueError(f"{type(self).__name__} takes real parameters; got a complex one")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step, and what follows from it for the hyperparameters.

        Args:
            closure: Computes the loss and its gradients (zero_grad, forward, backward) and returns
                the loss. It is called at x_k and at x_{k+1}; with `deterministic` at x_{k+1} only.

        Returns:
            What the closure returned at x_k.

        Raises:
            TypeError: No closure, or one that returns no number.
            DivergedError: The loss at x_k is not finite, or that at x_{k+1}, and a smaller rate
                is no help (guarded form).
            RuntimeError: `deterministic`, and the closure is not.
            ValueError: A hyperparameter of the memory (a beta) is adapted on fresh batches.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure: it looks at the loss before and "
                "after its step"
            )
        if _processes() > 1:
            raise RuntimeError(
                f"{type(self).__name__} runs in one process: every rank would see the loss of its "
                "own batch and find its own learning rate"
            )
        parameters = self._parameters()
        self._come_back(closure, parameters)
        before = self._evaluations.before(closure, parameters, self._steps + 1)
        if self.options.guarded and not isfinite(before.loss):
            raise DivergedError(
                f"the loss is {before.loss:g} before step {self._steps + 1}: nothing can be "
                "learned there. Start from a smaller learning rate, or look at the data",
                step=self._steps,
            )
        self._steps += 1
        due = self._steps % self.options.every == 0
        held_out = due and self._leaves_out_present_gradient()
        bundles = self._bundles(before)
        if self._window is not None:
            self._window.append(bundles, parameters, held_out=held_out)
        retreat = self._retreat(bundles) if due else None
        moved = [self.move(bundle, held_out=held_out) for bundle in bundles]
        after = None
        if due or self.options.deterministic:
            after = self._evaluations.after(closure, parameters)
        decision = Decision("not looked at", {}, {})
        if due and after is not None:
            seen = Observation(
                before.loss,
                after.loss + (penalty_change(bundles, moved) if self._penalised else 0.0),
                max(before.rounding, after.rounding),
                self._reach,
            )
            if retreat is not None and retreat.blew_up(moved, seen):
                decision = self._undo(retreat, moved, seen)
            else:
                decision = self._adapt(bundles, moved, after, seen, held_out=held_out)
        undone = decision.action == "undone"
        self._evaluations.end(before if undone else after, parameters, reusable=not undone)
        self._record(before, after, decision)
        return before.value

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and under "adaptation" all that the adaptation goes on from."""
        return {**super().state_dict(), "adaptation": self._adaptation()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. The options come from the state, as the groups' hyperparameters do.

        With a horizon above 1 the first step afterwards calls the closure at the kept points to
        have their second derivatives back; where the closure has another batch by then, the window
        begins anew, with a warning.

        Raises:
            ValueError: The state is that of another class, or does not fit.
        """
        if state_dict.get("adaptation", {}).get("buffers") != list(self.buffers):
            raise ValueError(
                f"the state is not one of {type(self).__name__}: it has no entry "
                f'"adaptation" for the buffers {list(self.buffers)}'
            )
        super().load_state_dict(state_dict)
        self._restore(state_dict["adaptation"])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return {**super().__getstate__(), "adaptation": self._adaptation()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other way."""
        state = dict(state)
        adaptation = state.pop("adaptation", None)
        super().__setstate__(state)
        if adaptation is not None:
            self._restore(adaptation)

    def _adaptation(self) -> dict[str, Any]:
        return {
            "buffers": list(self.buffers),
            "options": self.options.to_dict(),
            "rule": self.rule.state(),
            "steps": self._steps,
            "evaluations": self._evaluations.state(),
            "history": self.history.to_dict(),
            "window": None if self._window is None else self._window.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.options = AdaptationOptions.from_dict(state["options"])
        self._adapted = self.options.chosen(self.coordinates, type(self).__name__)
        self.rule = self.options.rule()
        self.rule.load(state["rule"])
        self._steps = state["steps"]
        self._evaluations = self._new_evaluations()
        self._evaluations.load(state["evaluations"])
        self.history = AdaptationHistory.from_dict(state["history"])
        self._window = self._new_window()
        if self._window is not None and state["window"] is not None:
            self._window.load(state["window"], self._parameters())

    def _new_evaluations(self) -> Evaluations:
        return Evaluations(
            type(self).__name__,
            deterministic=self.options.deterministic,
            graph=self.options.horizon > 1,
        )

    def _new_window(self) -> Window | None:
        """None where the signal is a plain product: the learning rate alone, over one step."""
        if self.options.horizon == 1 and self._adapted == (LEARNING_RATE,):
            return None
        return Window(
            self.options.horizon, self.step_map, self.buffers, self.coordinates, self._adapted
        )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _penalised(self) -> bool:
        """Whether weight decay counts as part of f: in the guarded form, unless it is adapted.

        A weight decay that is adapted is judged by the loss alone, or it would abolish itself.
        """
        return self.options.guarded and WEIGHT_DECAY not in self._adapted

    @property
    def _reach(self) -> int:
        """Through how many steps the present derivatives go back."""
        return 1 if self._window is None else max(len(self._window), 1)

    def _come_back(self, closure: Closure, parameters: list[Tensor]) -> None:
        """What was kept of the last steps does not hold where parameters were changed since."""
        if self._window is None:
            return
        if self._evaluations.moved_since(parameters):
            self._window.clear()
        if self._window.stale:
            with Randomness(parameters).again():
                self._window.rebuild(lambda: self._evaluations.at(closure, parameters), parameters)

    def _retreat(self, bundles: Sequence[Bundle]) -> Retreat | None:
        """None in the printed form, and where no rate is adapted that could be made smaller."""
        if not (self.options.guarded and self._rates()):
            return None
        return Retreat(bundles, self.options.max_rise, gradient_like=self.gradient_like)

    def _rates(self) -> list[dict[str, Any]]:
        """The groups whose learning rate is adapted."""
        if LEARNING_RATE not in self._adapted:
            return []
        return [group for group in self.param_groups if group["adapt_rate"]]

    def _leaves_out_present_gradient(self) -> bool:
        """Whether this is known to be a fresh batch: the first step is not, and counts as none."""
        if (
            self._evaluations.repeats is not False
            or not self.options.held_out
            or not self.options.guarded
        ):
            return False
        for group in self.param_groups:
            if group["adapt_rate"] and not self.remembers(group):
                raise ValueError(
                    f"{type(self).__name__} without momentum cannot be adapted on fresh batches: "
                    "its whole direction is the present gradient, which agrees with itself. Give "
                    "it momentum, or pass held_out=False for the plain signal"
                )
        memory = [c.name for c in self._adapted if c.memory]
        if memory:
            raise ValueError(
                f"{', '.join(memory)} cannot be adapted on fresh batches: the signal weighs the "
                "present gradient against older ones, and the present one agrees with itself. "
                "Adapt the learning rate alone, or pass held_out=False for the plain signal"
            )
        return True

    def _bundles(self, seen: Evaluation) -> list[Bundle]:
        for p, gradient in zip(self._parameters(), seen.gradients, strict=True):
            if gradient is not None and not self.state[p]:
                self.state[p]["step"] = 0
                for name in self.buffers:
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        bundles = bundled(self.param_groups, self.state, seen.gradients, seen.graph)
        if self.options.max_grad_norm < inf:
            clip(bundles, self.options.max_grad_norm)
        return bundles

    def _adapt(
        self,
        bundles: Sequence[Bundle],
        moved: Sequence[Moved],
        after: Evaluation,
        seen: Observation,
        *,
        held_out: bool,
    ) -> Decision:
        """Let the hyperparameters follow from a step."""
        gradients = aligned(bundles, self._parameters(), after.gradients)
        if self._penalised:
            gradients = with_penalty(gradients, bundles, moved)
        derivatives = self._derivatives(bundles, moved, gradients, held_out=held_out)
        decision = self.rule.decide(derivatives, seen)
        self._apply(decision)
        return decision

    def _derivatives(
        self,
        bundles: Sequence[Bundle],
        moved: Sequence[Moved],
        gradients: Sequence[list[Tensor]],
        *,
        held_out: bool,
    ) -> dict[str, float]:
        """df(x_{k+1})/du, or d/d theta in the printed form, by name."""
        active = [bool(bundle.group["adapt_rate"]) for bundle in bundles]
        in_log = self.options.guarded
        if self._window is not None:
            return self._window.derivatives(
                [flat(g) for g in gradients], in_log=in_log, active=active
            )
        slope = 0.0
        for bundle, step, gradient, counts in zip(bundles, moved, gradients, active, strict=True):
            if counts:
                product = step.along(gradient, held_out=held_out)
                slope -= product * (bundle.group["lr"] if in_log else 1.0)
        return {"lr": slope}

    def _apply(self, decision: Decision) -> None:
        for group in self.param_groups:
            for coordinate in self._adapted:
                move = group["adapt_rate"] * decision.moves.get(coordinate.name, 0.0)
                if not move:
                    continue
                if self.options.guarded:
                    coordinate.write(group, coordinate.moved(group, move))
                else:
                    coordinate.write(group, coordinate.read(group) + move)

    def _undo(self, retreat: Retreat, moved: Sequence[Moved], seen: Observation) -> Decision:
        """Back to x_k, with a tenth of the rate."""
        retreat.go_back()
        if self._window is not None:
            self._window.clear()
        told = f"the loss is {seen.after:g} after step {self._steps}"
        if not retreat.led_anywhere(moved):
            raise DivergedError(
                f"{told}, for the direction of the step is not finite: the gradient at a finite "
                "loss is not, or an average of its squares is 0 and eps too",
                step=self._steps,
            )
        smaller = False
        for group in self._rates():
            rate = LEARNING_RATE.read(group)
            LEARNING_RATE.write(group, LEARNING_RATE.moved(group, _UNDONE))
            smaller = smaller or LEARNING_RATE.read(group) < rate
        if not smaller:
            raise DivergedError(
                f"{told}, at the smallest learning rate that is allowed: a millionth of the first",
                step=self._steps,
            )
        return Decision("undone", {}, {})

    def _record(self, before: Evaluation, after: Evaluation | None, decision: Decision) -> None:
        if self.options.record_every and self._steps % self.options.record_every == 0:
            self.history.add(
                self._steps,
                before.loss,
                None if after is None else after.loss,
                decision.action,
                decision.signals,
                {c.name: [c.read(group) for group in self.param_groups] for c in self._adapted},
            )


def _processes() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1
