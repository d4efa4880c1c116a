"""A learned optimiser: parameters theta that make an update rule out of an objective.

    x_{k+1} = x_k + u_k,   (u_k, s_{k+1}) = step_theta(k, grad f(x_k), s_k)

Its memory s is part of the state of the iteration, so `stopping_index`, its adjoints, checks and
tuning see an update like any other. A new one is a class with an initial memory and a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ode_stopping.core.validation import require_instance
from ode_stopping.problems.base import Objective, check_objective, objective_gradient

from .files import read_optimizer, write_optimizer
from .torch_optim import LearnedTorchOptimizer

__all__ = ["LearnedOptimizer", "LearnedUpdate", "norm_of"]

Memory = tuple[Tensor, ...]


class LearnedOptimizer(nn.Module, ABC):
    """theta -> an update rule. Subclasses define `step`, and `initial_memory` where they have any.

        update = learned.update(f)
        run = stopping_index(update, update.initial_state(x0), LossValue(f), eps)

    Points have shape (..., d): one problem, or a batch of them with the coordinates last.

    Attributes:
        options: The arguments of the constructor, as they have to be given again; numbers, strings
            and lists only.
        coordinatewise: Whether `step` treats every coordinate by itself and alike, so that it may
            be given any of them, flat.
        version: Of what `save` writes; raised where older files no longer mean the same.
    """

    coordinatewise: ClassVar[bool] = True
    version: ClassVar[int] = 1

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def initial_memory(self, x: Tensor) -> Memory:
        """The memory s_0 at a point of shape (..., d): tensors that begin with this shape."""
        return ()

    @abstractmethod
    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """The step u_k and the memory after it.

        Args:
            k: Number of the step, from 0.
            gradient: grad f(x_k), shape (..., d).
            memory: s_k, of the shapes of `initial_memory`.
            norm: |grad f(x_k)| over all coordinates of a problem, shape (..., 1), or of the shape
                of `gradient` where that holds coordinates of several problems.

        Returns:
            u_k, of the shape of `gradient`, and s_{k+1}.
        """

    def update(self, objective: Objective) -> LearnedUpdate:
        """The update (k, state) -> next state for an objective x -> f(x), one value a sample.

        An objective with a method `gradient_at(k, x)` is asked for that (minibatches by step).
        """
        return LearnedUpdate(self, objective)

    def optimizer(self, parameters: Any) -> LearnedTorchOptimizer:
        """A `torch.optim.Optimizer` that trains other parameters by this rule.

        Args:
            parameters: As for any optimiser of torch's.
        """
        return LearnedTorchOptimizer(parameters, learned=self)

    def save(self, path: str | Path) -> None:
        """Write parameters, options and version to a safetensors file (needs the extra `learn`)."""
        write_optimizer(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; of a subclass: only such a one (needs the extra `learn`).

        Raises:
            ValueError: No learned optimiser, one of an unknown class, or of another version.
        """
        found = read_optimizer(cls, Path(path))
        require_instance(found, cls, name="path", example=f"a file of {cls.__name__}")
        return found

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LearnedUpdate(nn.Module):
    """The update of a learned optimiser on one objective, (k, (x, *memory)) -> next state.

    Gradients of f are differentiated through: it is the iteration as it runs.

    Args:
        learned: The optimiser.
        objective: x -> f(x), one value a sample.
    """

    def __init__(self, learned: LearnedOptimizer, objective: Objective) -> None:
        super().__init__()
        check_objective(objective)
        self.learned = learned
        self.objective = objective

    def initial_state(self, x0: Tensor) -> tuple[Tensor, ...]:
        """(x0, *memory); a memory of nothing leaves the tuple (x0,)."""
        return (x0, *self.learned.initial_memory(x0))

    def forward(self, k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state."""
        x, *memory = state
        gradient = gradient_at(self.objective, k, x)
        step, after = self.learned.step(k, gradient, tuple(memory), norm_of(gradient))
        return (x + step, *after)


def gradient_at(objective: Objective, k: int, x: Tensor) -> Tensor:
    """The gradient that step k is given: of f, or of the objective's own minibatch."""
    own: Any = getattr(objective, "gradient_at", None)
    return objective_gradient(objective, x) if own is None else own(k, x)


def norm_of(gradient: Tensor) -> Tensor:
    """|g| over the coordinates of each problem, shape (..., 1)."""
    return torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
