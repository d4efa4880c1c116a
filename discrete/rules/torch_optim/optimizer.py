"""The optimisers of `torch.optim` as update rules, so that their stopping index has a gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ode_stopping.core.validation import checked_state, described
from ode_stopping.problems.base import Objective, check_objective, objective_gradient

from .traced_step import TracedNumber, guarded, traced
from .trial import check_first_step, require_same_steps, walk_with

__all__ = ["TorchOptimizer"]

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "it evaluates f several times a step, through a closure",
    torch.optim.SparseAdam: "it takes sparse gradients only; use Adam",
    torch.optim.Muon: "it rounds its direction to bfloat16, and a rounded step has no derivative",
}

_SET_HERE = ("differentiable", "foreach", "fused", "capturable")


def _asgd(k: int, group: dict[str, Any]) -> dict[str, Any]:
    """Step size, and weight of the new position in the mean, before step k."""
    lr, lambd = group["lr"], group["lambd"]
    return {
        "eta": lr / ((1 + lambd * lr * float(k)) ** group["alpha"]),
        "mu": 1 / max(1, float(k) - group["t0"]),
    }


# Numbers that an optimiser keeps although they are functions of k: no part of the state here.
_SCHEDULES: dict[type[Optimizer], Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    torch.optim.ASGD: _asgd,
}


class TorchOptimizer(nn.Module):
    """The step of a `torch.optim` optimiser as an update (k, state) -> next state.

        update = TorchOptimizer(torch.optim.Adam, f, lr=lr, betas=(b1, b2))
        run = stopping_index(update, update.initial_state(x0), LossValue(f), eps)
        dN = torch.autograd.grad(run.steps, [lr, b1, x0])

    The state is (x, *buffers): the position, and what the optimiser keeps for it (momentum,
    averages of squares, ...). The step counter is k. The code that runs is the optimiser's own,
    without `foreach` and `fused`, and gives the same numbers bit for bit, with a graph as without
    (see `traced_step`). torch's own `differentiable=True` is not used: with it torch computes
    beta^k in single precision, loses the derivative of SGD's first momentum, and has none to most
    hyperparameters.

    Differentiable are x0, every tensor that requires grad in the objective, and these, given as 0-d
    tensors that require grad (each held against differences in tests/test_torch_optimizer.py):

    =============  ==============================================================
    SGD            lr, momentum, dampening, weight_decay
    Adam, AdamW    lr, betas, eps, weight_decay
    NAdam          lr, betas, eps, weight_decay, momentum_decay
    RAdam          lr, betas, eps, weight_decay
    RMSprop        lr, alpha, eps, weight_decay, momentum
    Adagrad        lr, lr_decay, weight_decay, initial_accumulator_value, eps
    Adadelta       lr, rho, eps, weight_decay
    Adamax         lr, betas, eps, weight_decay
    Adafactor      lr, beta2_decay, eps, d, weight_decay
    ASGD           lr, lambd, alpha, t0, weight_decay
    Rprop          lr, etas, step_sizes
    =============  ==============================================================

    A hyperparameter that stands where the code branches (a momentum or weight decay of 0) has no
    derivative and raises GradientError. LBFGS, SparseAdam and Muon are refused. Classes from
    elsewhere work if all that they remember is in their state: `initial_state` compares their
    first steps with a run of their own, and the derivative with differences.

    In one place the numbers are not torch's: single numbers in the state, which torch keeps in
    single precision whatever the dtype of x (`mu_product` of NAdam, `eta` and `mu` of ASGD), have
    the dtype of x here. torch does the same after `torch.set_default_dtype(torch.float64)`.

    Args:
        optimizer: The class, not an object.
        objective: A `Problem` or any callable x -> f(x); see `objective_gradient`.
        options: The optimiser's keyword arguments. Numbers may be 0-d tensors, also in tuples.

    Attributes:
        optimizer: The class.
        objective: As given.
        options: As given: a tensor stays the object that it is.

    Raises:
        TypeError: `optimizer` is not an optimiser class, or one that is refused; `objective` is not
            callable; a tensor is not floating-point; an option is unknown.
        ValueError: A tensor is not 0-d, an option is one that is set here, or the optimiser itself
            complains about a value.
    """

    def __init__(self, optimizer: type[Optimizer], objective: Objective, **options: Any) -> None:
        super().__init__()
        _check_class(optimizer)
        check_objective(objective)
        for name in _SET_HERE:
            if name in options:
                raise ValueError(f"{name} is set by TorchOptimizer; leave it out")
        self.optimizer = optimizer
        self.objective = objective
        self.options = options
        for label, tensor in self._tensors():
            _check_tensor(tensor, label)
        parameters = inspect.signature(optimizer).parameters
        self._fixed = {name: False for name in ("foreach", "fused") if name in parameters}
        self._names: tuple[str, ...] | None = None
        self._counter: Any = None
        self._template = self._new_template(self._plain_options())

    def forward(self, k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state after step k. At k = 0 the optimiser starts afresh: buffers are not read.

        Raises:
            TypeError, ValueError: The state is not one of `initial_state`, which has to be called
                first; or the optimiser keeps something else than it did then.
            MissingGradientError: With grad: the derivative to a hyperparameter is lost on the way.
            GradientError: With grad: a hyperparameter stands at a branch. In the backward pass: the
                step has no finite derivative.
        """
        names = self._names
        if names is None:
            raise ValueError("call initial_state(x0) before the first step: it finds the buffers")
        if not isinstance(state, tuple) or len(state) != 1 + len(names):
            raise TypeError(
                f"the state must be the tuple ({', '.join(('x', *names))}), as initial_state(x0) "
                f"returns it; got {described(state)}"
            )
        x, *buffers = state
        step = self._traced if torch.is_grad_enabled() else self._plain
        return step(k, x, buffers if k else [])

    def initial_state(self, x0: Tensor) -> tuple[Tensor, ...]:
        """(x0, *zeros): x0 is the object that was given, so that gradients reach it.

        The optimiser is tried for three steps on a copy of x0, which finds its buffers; the update
        has to go the same way. If grad is enabled, the derivative of the first step is compared
        with differences.

        Args:
            x0: The start, of any shape.

        Raises:
            TypeError, ValueError: x0 is not a finite floating-point tensor; or the optimiser cannot
                be an update, and why.
            MissingGradientError: The derivative of the first step is wrong or missing.
        """
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor; got {described(x0)}")
        checked_state(x0, half=True)
        name, shape = self.optimizer.__name__, x0.shape
        with torch.no_grad():
            walk = walk_with(
                lambda parameters: self._made(parameters, self._plain_options()),
                self._kept,
                lambda p: _at_least_1d(objective_gradient(self.objective, p.reshape(shape))),
                _at_least_1d(x0.detach()),
            )
            self._names, self._counter = tuple(walk.buffers), walk.counter
            zeros = (x0.new_zeros(buffer.shape) for buffer in walk.buffers.values())
            state = (x0, *zeros)
            require_same_steps(self, (x0.detach(), *state[1:]), walk, name=name)
        if torch.is_grad_enabled():
            check_first_step(self, state, name=name)
        return state

    @staticmethod
    def position(state: tuple[Tensor, ...]) -> Tensor:
        """x of a state."""
        return state[0]

    def buffer(self, state: tuple[Tensor, ...], name: str) -> Tensor:
        """A buffer of a state, by the name that the optimiser has for it ("exp_avg", ...).

        Raises:
            KeyError: There is none of that name.
        """
        names = self._names or ()
        if name not in names:
            raise KeyError(f"no buffer {name!r} in the state; there are {list(names)}")
        return state[1 + names.index(name)]

    def extra_repr(self) -> str:
        """The class and its options, for printing."""
        options = (f"{name}={value}" for name, value in self._plain_options().items())
        return ", ".join((self.optimizer.__name__, *options))

    def _plain(self, k: int, x: Tensor, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """A step without graph."""
        p = _at_least_1d(x).clone()
        optimizer = self._fresh(k, p)
        self._fill(optimizer, k, p, [buffer.clone() for buffer in buffers])
        p.grad = _at_least_1d(objective_gradient(self.objective, x)).clone()
        _step(optimizer)
        return self._collected(optimizer, p, x)

    def _traced(self, k: int, x: Tensor, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """The same step with a graph to x, buffers, hyperparameters and objective."""
        live = [(label, tensor) for label, tensor in self._tensors() if tensor.requires_grad]
        values = [tensor.to(dtype=torch.float64, device=x.device) for _, tensor in live]
        gradient = _at_least_1d(objective_gradient(self.objective, x))
        p, gradient, *rest = guarded(
            [_at_least_1d(x), gradient, *values, *buffers],
            where=f"step {k} of {self.optimizer.__name__}",
        )
        numbers = {
            label: TracedNumber.of(value, label)
            for (label, _), value in zip(live, rest[: len(live)], strict=True)
        }
        options = self._mapped(lambda label, tensor: numbers.get(label, tensor.item()))
        p.grad = gradient
        with traced():
            # Made anew: a constructor may use hyperparameters, too.
            optimizer = self._made([p], options)
            self._fill(optimizer, k, p, rest[len(live) :])
            _step(optimizer)
        return self._collected(optimizer, p, x)

    def _made(self, parameters: list[Tensor], options: dict[str, Any]) -> Optimizer:
        make: Callable[..., Optimizer] = self.optimizer
        return make(parameters, **self._fixed, **options)

    def _new_template(self, options: dict[str, Any]) -> tuple[dict[str, Any], Optimizer]:
        return options, self._made([torch.zeros(1, 1)], options)

    def _fresh(self, k: int, p: Tensor) -> Optimizer:
        """An optimiser for p; from k = 1 on a copy, since a constructor costs as much as a step."""
        options = self._plain_options()
        if k == 0:
            return self._made([p], options)
        found = self._template  # read once: another thread may put its own there
        if found[0] != options:
            found = self._template = self._new_template(options)
        template = found[1]
        optimizer = object.__new__(self.optimizer)
        optimizer.__dict__.update(template.__dict__)
        optimizer.param_groups = [{**template.param_groups[0], "params": [p]}]
        optimizer.state = type(template.state)(dict)
        return optimizer

    def _fill(self, optimizer: Optimizer, k: int, p: Tensor, buffers: list[Tensor]) -> None:
        """Give the optimiser its state before step k."""
        scheduled = {
            name: torch.tensor(value, dtype=p.dtype, device=p.device)
            for name, value in self._scheduled(k, optimizer).items()
        }
        if k == 0:
            if not optimizer.state.get(p):
                optimizer.state[p] = _Entries(p, scheduled)
            return
        entries: dict[str, Any] = dict(zip(self._names or (), buffers, strict=True))
        if isinstance(self._counter, Tensor):
            entries["step"] = torch.full_like(self._counter, float(k))
        elif self._counter is not None:
            entries["step"] = type(self._counter)(k)
        optimizer.state[p] = {**entries, **scheduled}

    def _scheduled(self, k: int, optimizer: Optimizer) -> dict[str, Any]:
        schedule = _SCHEDULES.get(self.optimizer)
        return {} if schedule is None else schedule(k, optimizer.param_groups[0])

    def _kept(self, optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
        """What the optimiser keeps for p, besides functions of k."""
        known = {"step", *self._scheduled(0, optimizer)}
        entries = optimizer.state.get(p, {})
        return {name: entry for name, entry in entries.items() if name not in known}

    def _collected(self, optimizer: Optimizer, p: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The state after the step."""
        p.grad = None  # it would keep the graph of the gradient alive
        entries, names = self._kept(optimizer, p), self._names or ()
        if set(entries) != set(names):
            raise ValueError(
                f"{self.optimizer.__name__} keeps {sorted(entries)} now, and kept {sorted(names)} "
                "at the start: call initial_state(x0) again after a change of the options"
            )
        return (p.reshape(x.shape), *(entries[name].to(x.dtype) for name in names))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """The options that are tensors, by name: "lr", "betas[0]"."""
        found: list[tuple[str, Tensor]] = []
        self._mapped(lambda label, tensor: found.append((label, tensor)))
        return found

    def _mapped(self, function: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        """The options with every tensor replaced."""
        return {name: _replaced(name, value, function) for name, value in self.options.items()}

    def _plain_options(self) -> dict[str, Any]:
        return self._mapped(lambda _, tensor: tensor.item())


class _Entries(dict[str, Any]):
    """The state of a parameter that has none yet.

    Single numbers take the dtype of the parameter: in single precision, in which torch has them,
    they would be rounded in the midst of a derivative. Scheduled ones are replaced.
    """

    def __init__(self, like: Tensor, scheduled: dict[str, Tensor]) -> None:
        super().__init__()
        self._dtype, self._scheduled = like.dtype, scheduled

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "step" and isinstance(value, Tensor) and value.ndim == 0:
            value = value.to(self._dtype)
        super().__setitem__(key, self._scheduled.get(key, value))


# Not an inner function: one that calls itself is a cycle, which keeps graphs alive for a while.
def _replaced(label: str, value: Any, function: Callable[[str, Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(label, value)
    if type(value) in (list, tuple):
        entries = enumerate(value)
        return type(value)(_replaced(f"{label}[{i}]", entry, function) for i, entry in entries)
    return value


def _at_least_1d(x: Tensor) -> Tensor:
    # A number of another dtype would change that of a tensor without dimensions.
    return x.reshape(1) if x.ndim == 0 else x


def _step(optimizer: Optimizer) -> None:
    # Without the hooks, and the switch of the autograd mode, around it.
    step: Callable[[Optimizer], Any] = inspect.unwrap(type(optimizer).step)
    step(optimizer)


def _check_class(optimizer: object) -> None:
    if not isinstance(optimizer, type) or not issubclass(optimizer, Optimizer):
        kind, hint = type(optimizer), ""
        if isinstance(optimizer, Optimizer):
            hint = f". Give the class: TorchOptimizer(torch.optim.{kind.__name__}, ...)"
        raise TypeError(
            f"optimizer must be a class derived from torch.optim.Optimizer; got {kind.__name__}"
            + hint
        )
    for refused, reason in _REFUSED.items():
        if issubclass(optimizer, refused):
            raise TypeError(f"{optimizer.__name__} cannot be an update: {reason}")


def _check_tensor(tensor: Tensor, label: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{label} must be floating-point; got dtype {tensor.dtype}")
    if tensor.shape != ():
        raise ValueError(f"{label} must be a number or a 0-d tensor; got {described(tensor)}")
