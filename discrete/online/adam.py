"""Adam that tunes its learning rate, and if wanted its betas and weight decay, while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ode_stopping.flows.roots import root_without_derivative_at_zero

from .base import OnlineAdaptation
from .bundles import Bundle, Moved
from .coordinates import BETA1, BETA2, LEARNING_RATE, WEIGHT_DECAY
from .options import AdaptationOptions, Variant, names, of_variant

__all__ = ["AdamOLA", "adam_direction"]


class AdamOLA(OnlineAdaptation):
    """Adam with online learning-rate adaptation (Algorithm 2 of arXiv 2505.22509), a drop-in.

        optimizer = AdamOLA(model.parameters(), lr=1e-3)
        loss = optimizer.step(closure)          # in the place of torch.optim.Adam's

    The steps are those of `torch.optim.Adam`. In between, one signal over all tensors,

        S = (grad f(x_{k+1}) . d_k) / (f(x_{k+1}) - f(x_k)),   x_{k+1} = x_k - alpha d_k

    the derivative dN/d alpha of the stopping index through the last step (equation 13), moves the
    learning rate.

    `variant="paper"` is the algorithm as printed: alpha <- alpha - adapt_rate S wherever
    f_ref - f(x_{k+1}) > descent_threshold * (updates so far), f_ref being f at the last update. It
    may drive alpha below zero, and depends on the units of f and x.

    `variant="guarded"` (the default) takes the same signal with these guards:

    ====================  ==========================================================================
    relative step         log alpha <- log alpha - eta alpha S: alpha stays positive, and nothing
                          depends on the units of x or f
    decrease required     f(x_{k+1}) < f(x_k) on the same batch; where f rose, S has the wrong sign,
                          and the rate backs off if the step overshot (grad f(x_{k+1}) . d_k < 0)
    bounded signal        alpha S is clipped to max_signal; the rate stays within a factor of 1e6 of
                          where it began; changes of f within its rounding count for nothing
    caution               a signal to shrink counts a third: alpha S = 0 is the best step along d_k
                          alone, and a direction with momentum wants longer ones
    settling              eta = adapt_rate / sqrt(1 + updates/settle)
    held out              on fresh batches the present gradient's own part is left out of d_k in S
    undo                  a step to a loss that is not finite is taken back (the parameters, not the
                          averages), the rate divided by 10; with `every` only where it is looked at
    ====================  ==========================================================================

    Args:
        params: Tensors or parameter groups.
        lr: First learning rate, in units of x a step.
        betas: Decay of the averages of gradients and of their squares.
        eps: Added to the root.
        adapt_rate: How fast the rate follows. "guarded": without unit; default 0.25. "paper": eta,
            in units of alpha squared; default 1e-2 (the paper's for a1a). A group may have its own;
            0 fixes it.
        descent_threshold: The decrease that an update takes. "guarded": in units of f, default 0.
            "paper": eps_desc, default 1e-5.
        variant: "guarded" or "paper".
        weight_decay: As in `torch.optim.Adam`. What it descends counts as part of f in the signal.
        decoupled_weight_decay: That of AdamW instead.
        adapt: What is adapted: "lr", "beta1", "beta2", "weight_decay" (guarded form).
        **options: See `AdaptationOptions`: `horizon` (sensitivities through the last K steps),
            `every` (adapt in every m-th step only), `deterministic` (one call of the closure a
            step), `max_grad_norm` (clip here, not in the closure), `held_out`, `max_signal`,
            `caution`, `settle`, `record_every`.

    Attributes:
        history: `AdaptationHistory`: `history.rates`, `history.plot()`.

    Raises:
        TypeError, ValueError: A value that is not admissible, by name.
    """

    coordinates = (LEARNING_RATE, BETA1, BETA2, WEIGHT_DECAY)
    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapt_rate: float | None = None,
        descent_threshold: float | None = None,
        variant: Variant = "guarded",
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        adapt: Sequence[str] = ("lr",),
        **options: Any,
    ) -> None:
        adapt_rate, descent_threshold = of_variant(variant, adapt_rate, descent_threshold)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "adapt_rate": adapt_rate,
        }
        chosen = AdaptationOptions.of(
            type(self).__name__,
            adapt=names(adapt),
            variant=variant,
            descent_threshold=descent_threshold,
            **options,
        )
        super().__init__(params, defaults, chosen)

    @staticmethod
    def check_group(group: Mapping[str, Any]) -> None:
        """Raise where an option of Adam is not admissible."""
        check_adam_group(group)

    def move(self, bundle: Bundle, *, held_out: bool) -> Moved:
        """One step of Adam."""
        group = bundle.group
        decay: float | list[Tensor] | None = group["weight_decay"] or None
        directions, own, roots = adam_direction(bundle, with_own_part=held_out)
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_add_(directions, bundle.parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(roots, group["weight_decay"])
            decay = roots
        torch._foreach_add_(bundle.parameters, directions, alpha=-group["lr"])
        rest = None if own is None else list(torch._foreach_sub(directions, own))
        return Moved(directions, rest, decay)

    @staticmethod
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
        """One step of Adam on flat tensors."""
        beta1, beta2 = values["beta1"], values["beta2"]
        decay = values["weight_decay"] if group["weight_decay"] else 0.0
        decoupled = group["decoupled_weight_decay"]
        total = gradient if decoupled or not group["weight_decay"] else gradient + decay * x
        mean = beta1 * buffers[0] + (1 - beta1) * total
        square = beta2 * buffers[1] + (1 - beta2) * total * total
        root = root_without_derivative_at_zero(square / (1 - beta2**steps)) + group["eps"]
        numerator = mean - (1 - beta1) * gradient if held_out else mean
        direction = numerator / (1 - beta1**steps) / root
        if decoupled and group["weight_decay"]:
            direction = direction + decay * x
        return x - values["lr"] * direction, (mean, square)

    @staticmethod
    def remembers(group: Mapping[str, Any]) -> bool:
        """Whether beta1 > 0."""
        return bool(group["betas"][0] > 0)


def adam_direction(
    bundle: Bundle, *, with_own_part: bool = False
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor]]:
    """Advance the averages by a step; Adam's direction mhat/(sqrt(vhat) + eps), tensor by tensor.

    Args:
        bundle: With the buffers "exp_avg" and "exp_avg_sq", and "step".
        with_own_part: Whether the present gradient's part of the direction is wanted.

    Returns:
        The direction, that part of it (or None), and sqrt(vhat) + eps.
    """
    group = bundle.group
    beta1, beta2 = group["betas"]
    gradients = bundle.gradients if group["decoupled_weight_decay"] else bundle.decayed()
    mean, square = bundle.buffer("exp_avg"), bundle.buffer("exp_avg_sq")
    for state in bundle.states:
        state["step"] += 1
    steps = [state["step"] for state in bundle.states]
    torch._foreach_lerp_(mean, gradients, 1 - beta1)
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, gradients, gradients, value=1 - beta2)
    roots = torch._foreach_sqrt(square)
    torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(roots, group["eps"])
    corrections = [1 - beta1**step for step in steps]
    directions = list(torch._foreach_div(mean, roots))
    torch._foreach_div_(directions, corrections)
    own = None
    if with_own_part:
        own = list(torch._foreach_div(bundle.gradients, roots))
        torch._foreach_mul_(own, [(1 - beta1) / correction for correction in corrections])
    return directions, own, list(roots)


def check_adam_group(group: Mapping[str, Any]) -> None:
    """Raise where an option of Adam is not admissible.

    Raises:
        ValueError: Naming it.
    """
    if not group["lr"] > 0:
        raise ValueError(f"lr must be positive; got {group['lr']}")
    for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1); got {beta}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must not be negative; got {group['eps']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must not be negative; got {group['weight_decay']}")
