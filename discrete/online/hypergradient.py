"""Adam with hypergradient descent on its learning rate, the older rival of `AdamOLA`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from .adam import adam_direction, check_adam_group
from .bundles import bundled, inner
from .history import AdaptationHistory

__all__ = ["AdamHD"]


class AdamHD(Optimizer):
    """Adam-HD of Baydin, Cornish, Martinez Rubio, Schmidt and Wood (ICLR 2018, arXiv 1703.04782).

        alpha <- alpha + hypergradient_lr (grad f(x_k) . d_{k-1}),   x_{k+1} = x_k - alpha d_k

    grad f(x_k) . d_{k-1} is -df(x_k)/d alpha through the last step: the numerator of AdamOLA's
    signal, without the change of f below it. So hypergradient_lr has units (alpha^2/f), and nothing
    keeps alpha positive; as printed. No second evaluation is made: on minibatches the two gradients
    are those of different batches.

    Args:
        params: Tensors or parameter groups; one rate signal over all of them.
        lr: First learning rate.
        betas: As in Adam.
        eps: As in Adam.
        hypergradient_lr: Step on alpha; 0 is Adam. A group may have its own.
        weight_decay: As in `torch.optim.Adam`.
        record_every: Of the history, in steps; 0 keeps none.

    Attributes:
        history: `AdaptationHistory`, with the loss where a closure is given.

    Raises:
        ValueError: A value that is not admissible, by name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        hypergradient_lr: float = 1e-7,
        *,
        weight_decay: float = 0.0,
        record_every: int = 1,
    ) -> None:
        self.history = AdaptationHistory()
        self.record_every = record_every
        self._steps = 0
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "hypergradient_lr": hypergradient_lr,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": False,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_adam_group(group)
            if not group["hypergradient_lr"] >= 0:
                raise ValueError(
                    f"hypergradient_lr must not be negative; got {group['hypergradient_lr']}"
                )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a closure, its loss is returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p].update(
                        step=0,
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                        direction=torch.zeros_like(p),
                    )
        bundles = bundled(self.param_groups, self.state, gradients, None)
        products = [inner(b.gradients, b.buffer("direction")) for b in bundles]
        # One number for all groups: as in AdamOLA, the rates move together.
        descent = sum(float(product) for product in products)
        action = "larger" if descent > 0 else "smaller" if descent < 0 else "no signal"
        for group in self.param_groups:
            group["lr"] = group["lr"] + group["hypergradient_lr"] * descent
        for bundle in bundles:
            directions, _, _ = adam_direction(bundle)
            torch._foreach_add_(bundle.parameters, directions, alpha=-bundle.group["lr"])
            for state, direction in zip(bundle.states, directions, strict=True):
                state["direction"] = direction
        for p, state in self.state.items():
            if p.grad is None:  # it has not moved
                state["direction"].zero_()
        self._steps += 1
        if self.record_every and self._steps % self.record_every == 0:
            loss = float("nan") if value is None else float(value)
            rates = [float(group["lr"]) for group in self.param_groups]
            self.history.add(self._steps, loss, None, action, {"lr": descent}, {"lr": rates})
        return value

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the history under "adaptation"."""
        return {**super().state_dict(), "adaptation": self._own()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ValueError: The state is that of another class, or does not fit.
        """
        own = state_dict.get("adaptation", {})
        if "record_every" not in own:
            raise ValueError(
                f'the state is not one of {type(self).__name__}: it has no entry "adaptation" with '
                "its history"
            )
        super().load_state_dict(state_dict)
        self._take(own)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return {**super().__getstate__(), "adaptation": self._own()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other way."""
        state = dict(state)
        own = state.pop("adaptation", None)
        super().__setstate__(state)
        self._take(own)

    def _own(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "record_every": self.record_every,
            "history": self.history.to_dict(),
        }

    def _take(self, own: dict[str, Any] | None) -> None:
        if own is not None:
            self._steps, self.record_every = own["steps"], own["record_every"]
            self.history = AdaptationHistory.from_dict(own["history"])
