"""The training loss of a network as an objective of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.leaves import walk
from ..core.validation import described, require_callable
from .base import Problem

__all__ = ["ModuleObjective"]


class ModuleObjective(Problem):
    """f(x) = loss(model(inputs; x), targets), with x the model's trained parameters in one vector.

    Gradient descent on f with step h is what `torch.optim.SGD(model.parameters(), lr=h)` does on
    the whole of the data, and `GradientFlow` its limit.

    x holds the parameters that require grad when the objective is made, in the order of
    `model.named_parameters()`, a shared one once. The model's other parameters and its buffers
    enter as they are at each call. The model is not written to: what an evaluation does to its
    buffers (running statistics of batch normalisation) happens to copies and is forgotten, so that
    f is a function of x alone. Only `load` changes the model.

    A model that draws at random (dropout in train mode) gives no objective: `stopping_time` and
    `stopping_index` raise NotReproducibleError. Batch normalisation in train mode gives one: its
    statistics are those of `inputs`.

    The model's operations have to be twice differentiable in torch for the gradient of a stopping
    time. With ReLU they are between kinks.

    The model moves along in `.to(...)`, `.train()` and `.eval()` as a submodule would, but it is
    none: its parameters are values to start from, and not parameters that f depends on. Those of
    the loss, and data that require grad, are, and get their gradients.

    Args:
        model: The network, called as model(inputs).
        loss: (output, targets) -> 0-d tensor, as `nn.functional.mse_loss` or
            `nn.CrossEntropyLoss()`. It may use `model.parameters()`, for a penalty: during the call
            these are the entries of x.
        data: (inputs, targets), tensors, kept as the objects they are.

    Attributes:
        dim: Number of trained parameters d.
        inputs: As given.
        targets: As given.
        loss: As given.

    Raises:
        TypeError: `model` is no module, loss not callable or without a floating-point tensor as its
            value, data not two tensors.
        ValueError: No trained parameters, or parameters not initialised yet, complex, of several
            dtypes or devices; a loss that is not 0-d; a model or loss that uses trained parameters
            through references of its own, behind the back of x.
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[..., Any]
    _supervised: _Supervised

    def __init__(
        self, model: nn.Module, loss: Callable[..., Any], data: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {described(model)}")
        require_callable(loss, name="loss", call="(output, targets) -> value")
        inputs, targets = _checked_data(data)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check_trained(trained)
        _keep(self, "inputs", inputs)
        _keep(self, "targets", targets)
        # Past nn.Module's own __setattr__, which would register the model, and a loss with it that
        # holds the model for a penalty.
        object.__setattr__(self, "_supervised", _Supervised(model, loss))
        if isinstance(loss, nn.Module) and not _shares(loss, trained):
            self.loss = loss
        else:
            object.__setattr__(self, "loss", loss)
        self._shapes = {name: p.shape for name, p in trained.items()}
        names = {id(parameter): name for name, parameter in trained.items()}
        self._places = {
            place: names[id(parameter)]
            for place, parameter in _places(self._supervised, buffers=False)
            if id(parameter) in names
        }
        self.dim = sum(shape.numel() for shape in self._shapes.values())
        self._check_nothing_behind_x(trained)

    @property
    def model(self) -> nn.Module:
        """The model as given."""
        return self._supervised.model

    @property
    def dtype(self) -> torch.dtype:
        """The type of the trained parameters."""
        return self._trained()[0].dtype

    def _trained(self) -> list[nn.Parameter]:
        """The model's own trained parameters."""
        with _SWAPPED:
            return [self.model.get_parameter(name) for name in self._shapes]

    def initial_point(self) -> Tensor:
        """The model's present parameters, copied and without graph, shape (d,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._trained()])

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters of a point x of shape (d,), by name, with graph to x.

        Raises:
            ValueError: x has another shape or dtype.
        """
        self._check_point(x)
        if x.ndim != 1:
            raise ValueError(f"x must be one point of shape ({self.dim},), got {tuple(x.shape)}")
        pieces = x.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def load(self, x: Tensor) -> None:
        """Write a point x of shape (d,) into the model's parameters.

        Raises:
            ValueError: x has another shape or dtype.
        """
        with torch.no_grad():
            for parameter, value in zip(self._trained(), self.unflatten(x).values(), strict=True):
                parameter.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        """f(x), shape (...,), for x of shape (..., d): one run of the model a point."""
        self._check_point(x)
        if x.ndim == 1:
            return self._value(x)
        # No vmap: models that write to buffers or choose a branch fail in it.
        values = [self._value(row) for row in x.reshape(-1, self.dim)]
        return torch.stack(values).reshape(x.shape[:-1]) if values else x.sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient, shape (..., d), by autograd."""
        self._check_point(x)
        return super().gradient(x)

    def _value(self, x: Tensor) -> Tensor:
        """f at one point, shape ()."""
        pieces = self.unflatten(x)
        tensors = {place: pieces[name] for place, name in self._places.items()}
        with _SWAPPED:
            # Copies of the buffers take what the model writes to them. A copy keeps the graph.
            copies: dict[Tensor, Tensor] = {}
            for place, buffer in _places(self._supervised, buffers=True):
                tensors[place] = copies.setdefault(buffer, buffer.clone())
            # Every place by its own name. Left to tie them itself, torch (2.13) swaps a module that
            # is used twice two times, and puts the first swap's tensors back into the model.
            value = functional_call(
                self._supervised, tensors, (self.inputs, self.targets), tie_weights=False
            )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"loss must return a floating-point tensor, got {described(value)}")
        if value.shape != ():
            raise ValueError(
                f"loss must return one number, a 0-d tensor, got shape {tuple(value.shape)}; take "
                'its mean or sum, as in reduction="mean"'
            )
        return value

    def _check_nothing_behind_x(self, trained: dict[str, nn.Parameter]) -> None:
        """Raise a ValueError where f uses a trained parameter itself, instead of its entries of x.

        The derivative to x would lack that part, and nobody else could see it.
        """
        with torch.enable_grad():
            found, _ = walk([self._value(self.initial_point())])
        met = {id(tensor) for tensor in found}
        behind = [name for name, parameter in trained.items() if id(parameter) in met]
        if behind:
            raise ValueError(
                f"model or loss uses the parameter {behind[0]} through a reference of its own "
                "(a list of parameters made beforehand?), and would not see that x replaces it. "
                "Look it up at each call, as model.parameters() does"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModuleObjective:
        """Let `.to(...)` and the like reach the model, which is not registered."""
        super()._apply(fn, recurse)
        self._supervised._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> ModuleObjective:
        """Set the mode, also that of the model."""
        super().train(mode)
        self._supervised.train(mode)
        return self

    def extra_repr(self) -> str:
        """The model and the sizes, for printing."""
        return (
            f"model={type(self.model).__name__}, dim={self.dim}, "
            f"inputs={tuple(self.inputs.shape)}, targets={tuple(self.targets.shape)}"
        )


# torch puts the entries of x into the model for the time of a call: another thread must not see
# them there, nor put them back. Models may share their parts, so there is one lock for all.
_SWAPPED = RLock()


class _Supervised(nn.Module):
    """(inputs, targets) -> loss(model(inputs), targets), as one module.

    The loss inside, so that it too sees x where it looks at the model's parameters.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Any:
        """The value of the loss."""
        return self.loss(self.model(inputs), targets)


def _checked_data(data: object) -> tuple[Tensor, Tensor]:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"data must be a pair (inputs, targets), got {described(data)}")
    for tensor, name in zip(data, ("inputs", "targets"), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"data must hold tensors, {name} is {described(tensor)}")
    return data[0], data[1]


def _check_trained(trained: dict[str, nn.Parameter]) -> None:
    if not trained:
        raise ValueError("model must have parameters that require grad, got none")
    lazy = [name for name, p in trained.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"model must be initialised, {lazy[0]} has no shape yet; call model(inputs) once before"
        )
    dtypes = sorted({str(p.dtype) for p in trained.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"model must have trained parameters of one dtype, got {', '.join(dtypes)}"
        )
    devices = sorted({str(p.device) for p in trained.values()})
    if len(devices) > 1:
        raise ValueError(
            f"model must have trained parameters on one device, got {', '.join(devices)}"
        )
    if not next(iter(trained.values())).is_floating_point():
        raise ValueError(f"model must have real parameters, got dtype {dtypes[0]}")


def _places(module: nn.Module, *, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    """Every parameter or buffer with its name, once a place: a shared one has several.

    A module that is used twice counts once.
    """
    for prefix, part in module.named_modules():
        own = part.named_buffers if buffers else part.named_parameters
        for name, tensor in own(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, tensor


def _shares(loss: nn.Module, trained: dict[str, nn.Parameter]) -> bool:
    own = {id(parameter) for parameter in loss.parameters()}
    return any(id(parameter) in own for parameter in trained.values())


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """As `attach`, for tensors of any type: class labels are integers, inputs may be tokens."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    elif tensor.requires_grad:
        setattr(module, name, tensor)
    else:
        module.register_buffer(name, tensor)
