"""Small networks and their data, which the tests of `ModuleObjective` share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ode_stopping import ModuleObjective

F64 = torch.float64


def regression(samples: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (samples, 2) and targets (samples, 1)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 2, generator=generator, dtype=F64)
    return inputs, torch.sin(2 * inputs[:, :1]) * inputs[:, 1:]


def network(*middle: nn.Module) -> nn.Sequential:
    """2-8-1, tanh, with further modules in the middle."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), *middle, nn.Tanh(), nn.Linear(8, 1)).double()


def objective(model: nn.Module | None = None, **options: Any) -> ModuleObjective:
    """The mean squared error on `regression`, of `network`."""
    return ModuleObjective(
        network() if model is None else model,
        options.get("loss", functional.mse_loss),
        options.get("data", regression()),
    )


def slopes_of_torch(f: ModuleObjective, x: Tensor) -> Tensor:
    """The gradient as a training loop finds it, on a copy of the model with x loaded."""
    model = copy.deepcopy(f.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(x.detach(), trained)
    slopes = torch.autograd.grad(f.loss(model(f.inputs), f.targets), trained)
    return torch.cat([slope.reshape(-1) for slope in slopes])


def moved(x: Tensor, seed: int = 5) -> Tensor:
    """A point some way off."""
    generator = torch.Generator().manual_seed(seed)
    return x + 0.3 * torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype)
