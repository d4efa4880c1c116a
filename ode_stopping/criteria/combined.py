"""Several criteria in one: stop when any of them is met, or when all of them are.

In units of its own target every J_i is met at 1, so that the criteria can be compared:

    AnyOf   J = min_i J_i / eps_i        AllOf   J = max_i J_i / eps_i        both with target 1

With direction="rising" the two change places: min_i J_i / eps_i has risen to 1 where *all* J_i have
risen to their eps_i, and the maximum where *any* has.

The derivative of the stopping time is that of the member that decides at T (the implicit quotient
of Theorem 1, arXiv 2505.22509, sees no other); where two decide at once T has a kink.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.states import State
from ..core.validation import described, require_callable
from ..problems.tensors import Number, as_floating, attach, scalar
from .base import Criterion

__all__ = ["AllOf", "AnyOf"]

Member: TypeAlias = Callable[[Any, Any], Tensor]


class _Combined(Criterion):
    """J_1/eps_1, ..., J_m/eps_m, and one of them that decides.

    The members stand as attributes `criterion0`, `criterion1`, ...: modules are registered, other
    callables are kept as they are. Likewise `target0`, `target1`, ..., as `attach` keeps them.
    """

    def __init__(self, *criteria: Member, targets: Sequence[Tensor | Number]) -> None:
        super().__init__()
        if not criteria:
            raise ValueError(
                f"criteria must be at least one criterion, got none; write "
                f"{type(self).__name__}(first, second, targets=[...])"
            )
        if isinstance(targets, str | Tensor) or not isinstance(targets, Sequence):
            raise TypeError(
                "targets must be a list of numbers or 0-d tensors, one a criterion, got "
                f"{described(targets)}"
            )
        if len(targets) != len(criteria):
            raise ValueError(
                f"targets must be one number a criterion, got {len(targets)} for "
                f"{len(criteria)} criteria"
            )
        self.count = len(criteria)
        for index, (criterion, target) in enumerate(zip(criteria, targets, strict=True)):
            _check_member(criterion, f"criteria[{index}]")
            setattr(self, f"criterion{index}", criterion)
            attach(self, f"target{index}", _checked_target(target, f"targets[{index}]"))
        # Of the instance, as some criteria know it of their objective only.
        self.nonnegative = all(getattr(one, "nonnegative", False) is True for one in criteria)

    @property
    def criteria(self) -> tuple[Member, ...]:
        """The members, in order."""
        return tuple(getattr(self, f"criterion{index}") for index in range(self.count))

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """eps_i, 0-d tensors, in order; those that were given as tensors are the same objects."""
        return tuple(getattr(self, f"target{index}") for index in range(self.count))

    @abstractmethod
    def _decide(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """J and the index of the member that decides, from ratios of shape (m, ...)."""

    def _ratios(self, t: Tensor, state: State) -> Tensor:
        """J_i / eps_i, shape (m,) or (m, samples)."""
        ratios = []
        for index, (criterion, target) in enumerate(zip(self.criteria, self.targets, strict=True)):
            value = criterion(t, state)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(
                    f"criteria[{index}] must return a floating-point tensor, got {described(value)}"
                )
            # A 0-d value of lower precision would be promoted by a 0-d target.
            unit = target.to(value.dtype)
            if not bool(unit > 0):
                raise ValueError(
                    f"targets[{index}] must be positive in {value.dtype}, the dtype of its "
                    f"criterion, got {float(target.detach()):g}"
                )
            ratios.append(value / unit)
        # A member without samples (a function of time alone, say) counts for each of them.
        return torch.stack(torch.broadcast_tensors(*ratios))

    def forward(self, t: Tensor, state: State) -> Tensor:
        """J, 0-d or one value a sample."""
        return self._decide(self._ratios(t, state))[0]

    def active(self, t: Tensor, state: State) -> int:
        """The index of the member that decides at this state; of equal ones, either.

        Raises:
            ValueError: The criteria give one value a sample; call once a sample.
        """
        with torch.no_grad():
            _, index = self._decide(self._ratios(t, state))
        if index.shape != ():
            raise ValueError(
                f"active needs one state, got samples of shape {tuple(index.shape)}; call it once "
                "a sample"
            )
        return int(index)

    def extra_repr(self) -> str:
        """The targets, for printing."""
        return f"targets={[float(target.detach()) for target in self.targets]}"


class AnyOf(_Combined):
    """J = min_i J_i / eps_i, for the target 1: stops the first time that any J_i <= eps_i.

        stopping_time(flow, x0, AnyOf(LossValue(f), GradientNorm(f), targets=[1e-3, 1e-6]), 1.0)

    In one dtype J <= 1 holds exactly where some J_i <= eps_i does, rounding included; and J is
    positive where the J_i are. T is differentiable to what the J_i are and to the eps_i. What only
    inactive members use (`active`), their eps_i among it, gets the derivative 0: a change of it
    that is small enough does not move T.

    Members may be combinations themselves, with the target 1:
    AnyOf(AllOf(a, b, targets=[...]), c, targets=[1.0, eps]).

    "Any" is for a J that falls. With direction="rising" J >= 1 holds where *all* J_i >= eps_i: for
    "any has risen" use AllOf there. With leave_first=True J itself has to be above 1 first, that
    is all members above their eps_i at once (for AllOf: any of them).

    Args:
        criteria: At least one; `Criterion` modules or any callables (t, state) -> J, 0-d or one
            value a sample. Each takes the position out of the state itself.
        targets: eps_i > 0, one a criterion, numbers or 0-d tensors. A tensor that requires grad is
            kept as the leaf it is (see `attach`).

    Attributes:
        nonnegative: All members declare that they are.

    Raises:
        TypeError: A criterion is not callable, is a class, or is one that `stopping_index` has to
            see itself (`StepDecrease`); targets is no list, or holds something else than numbers
            and floating-point tensors. At a call: a member returns no floating-point tensor.
        ValueError: No criteria; another number of targets; a target that is not 0-d, not finite or
            not positive, at construction or, where it has moved or is too small for the dtype of
            its criterion, at a call.
    """

    def _decide(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = ratios.min(dim=0)
        return values, indices


class AllOf(_Combined):
    """J = max_i J_i / eps_i, for the target 1: stops the first time that all J_i <= eps_i at once.

    (With direction="rising": the first time that any J_i >= eps_i; see `AnyOf`.)

    Criteria that held before, one after the other, do not count: they have to hold together.
    Arguments, attributes, derivatives and errors: see `AnyOf`.
    """

    def _decide(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = ratios.max(dim=0)
        return values, indices


def _check_member(criterion: object, name: str) -> None:
    """Raise a TypeError that names the criterion unless it can be a member."""
    require_callable(criterion, name=name, call="(t, state) -> J")
    # Such a criterion has values that are marks and no measurements. The discrete side asks it
    # before it takes a quotient; inside of a combination nobody would, and the gradient be wrong.
    if callable(getattr(criterion, "measures", None)):
        raise TypeError(
            f"{name} is a {type(criterion).__name__}, some of whose values are marks and no "
            "measurements: stopping_index has to be given it by itself"
        )


def _checked_target(target: Tensor | Number, name: str) -> Tensor:
    """The target as a 0-d tensor, the same object where it is one; positive."""
    if isinstance(target, bool):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {described(target)}")
    tensor = as_floating(scalar(target, name), name)
    if not float(tensor.detach()) > 0:
        raise ValueError(
            f"{name} must be positive, since J_i is measured in units of it, got "
            f"{float(tensor.detach()):g}"
        )
    return tensor
