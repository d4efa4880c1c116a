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

from ode_stopping.core.validation import described
from ode_stopping.problems.base import Objective, check_objective, gradient_and_batch_dims

from .files import read_optimizer, write_optimizer
from .torch_optim import LearnedTorchOptimizer, require_whole_digits

__all__ = ["LearnedOptimizer", "LearnedUpdate", "norm_of"]

Memory = tuple[Tensor, ...]


class LearnedOptimizer(nn.Module, ABC):
    """theta -> an update rule. Subclasses define `step`, and `initial_memory` where they have any.

        update = learned.update(f)
        run = stopping_index(update, update.initial_state(x0), LossValue(f), eps)

    Points have shape (..., d): one problem, or a batch of them with the coordinates last.

    Attributes:
        options: The arguments of the constructor, as they have to be given again. What JSON holds
            can be saved: numbers, strings, True, False, None, and lists and dicts of these.
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

        Raises:
            TypeError: The objective cannot be called.
        """
        return LearnedUpdate(self, objective)

    def optimizer(self, parameters: Any) -> LearnedTorchOptimizer:
        """A `torch.optim.Optimizer` that trains other parameters by this rule.

        Args:
            parameters: As for any optimiser of torch's; float32 or float64. The rule has to be on
                their device, its own type may be another.

        Raises:
            TypeError, ValueError: See `LearnedTorchOptimizer`.
        """
        return LearnedTorchOptimizer(parameters, learned=self)

    def save(self, path: str | Path) -> None:
        """Write parameters, options and version to a safetensors file (needs the extra `learn`).

        A kill on the way leaves the file that was there before, or the new one.

        Raises:
            ImportError: The extra is missing; the message names it.
            TypeError: An option that JSON does not hold, by its name.
            OSError: The file cannot be written.
        """
        write_optimizer(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, to the CPU (needs the extra `learn`).

        `LearnedOptimizer.load` reads any class that is imported, a subclass only its own kind.
        Parameters have the types that they were saved with.

        Raises:
            FileNotFoundError: There is no such file.
            ImportError: The extra is missing; the message names it.
            ValueError: No learned optimiser, half of one, one of another or an unknown class, or of
                another version.
        """
        every = LearnedOptimizer
        return read_optimizer(every, cls, Path(path))  # type: ignore[type-abstract]

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LearnedUpdate(nn.Module):
    """The update of a learned optimiser on one objective, (k, (x, *memory)) -> next state.

    Gradients of f are differentiated through: it is the iteration as it runs.

    Args:
        learned: The optimiser.
        objective: x -> f(x), one value a sample.

    Raises:
        TypeError: No learned optimiser; an objective that cannot be called.
    """

    def __init__(self, learned: LearnedOptimizer, objective: Objective) -> None:
        super().__init__()
        if not isinstance(learned, LearnedOptimizer):
            raise TypeError(f"learned must be a LearnedOptimizer; got {described(learned)}")
        check_objective(objective)
        self.learned = learned
        self.objective = objective

    def initial_state(self, x0: Tensor) -> tuple[Tensor, ...]:
        """(x0, *memory), the memory in the type and on the device of x0.

        Without a memory it is the tuple (x0,).

        Raises:
            TypeError: x0 is no tensor of float32 or float64.
        """
        require_whole_digits(x0, name="x0")
        return (x0, *self.learned.initial_memory(x0))

    def forward(self, k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state.

        Raises:
            TypeError: The state is no tuple (x, *memory).
        """
        if not isinstance(state, tuple):
            raise TypeError(
                "the state of a learned optimiser is a tuple (x, *memory); got "
                f"{described(state)}. Start from update.initial_state(x0)"
            )
        x, *memory = state
        gradient, samples = gradient_at(self.objective, k, x)
        step, after = self.learned.step(k, gradient, tuple(memory), norm_of(gradient, samples))
        return (x + step, *after)


def gradient_at(objective: Objective, k: int, x: Tensor) -> tuple[Tensor, int]:
    """The gradient that step k is given, and how many leading axes of x count samples.

    It is that of f, or of the objective's own minibatch.

    Raises:
        TypeError, ValueError: `gradient_at` returns no tensor of the shape of x.
    """
    own: Any = getattr(objective, "gradient_at", None)
    gradient = None if own is None else own(k, x)
    if gradient is None:
        return gradient_and_batch_dims(objective, x)
    if not isinstance(gradient, Tensor):
        raise TypeError(f"objective.gradient_at must return a tensor; got {described(gradient)}")
    if gradient.shape != x.shape:
        raise ValueError(
            f"objective.gradient_at must return the shape of x, {tuple(x.shape)}; got "
            f"{tuple(gradient.shape)}"
        )
    return gradient, max(x.ndim - 1, 0)


def norm_of(gradient: Tensor, samples: int | None = None) -> Tensor:
    """|g| over the coordinates of each problem, shape (..., 1).

    Args:
        gradient: Shape (..., d).
        samples: How many leading axes count problems; None: all but the last.
    """
    first = max(gradient.ndim - 1, 0) if samples is None else samples
    axes = tuple(range(first, gradient.ndim))
    return torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)
