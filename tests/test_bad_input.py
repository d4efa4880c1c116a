"""Bad input is refused at entry, with the argument's name and what it got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import GradientNorm, StoppingWarning, Torchdiffeq, stopping_time

F64 = torch.float64
X0 = torch.tensor([2.0], dtype=F64)


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def first_entry(t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    return state[0].sum()


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "flow": decay,
        "x0": X0,
        "criterion": half_square,
        "target": 0.01,
        **changes,
    }
    positional = [arguments.pop(name) for name in ("flow", "x0", "criterion", "target")]
    return stopping_time(*positional, **arguments)


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x0": [1.0]}, TypeError, "x0 .* list"),
    ({"x0": torch.tensor([1])}, TypeError, "x0 .* torch.int64"),
    ({"x0": torch.tensor([1.0 + 1j])}, TypeError, "x0 .* torch.complex64"),
    ({"x0": ()}, ValueError, "x0 .* empty"),
    ({"x0": torch.zeros(0, dtype=F64)}, ValueError, "x0 .* at least one"),
    ({"x0": (X0, torch.zeros(1))}, TypeError, "x0 .* one dtype"),
    ({"x0": (X0, torch.zeros(1, dtype=F64, device="meta"))}, ValueError, "x0 .* one device"),
    ({"x0": torch.tensor([1.0, float("nan")])}, ValueError, "x0 .* finite"),
    ({"x0": torch.tensor([float("inf")])}, ValueError, "x0 .* finite"),
    ({"target": float("nan")}, ValueError, "target .* finite; got nan"),
    ({"target": float("inf")}, ValueError, "target .* finite; got inf"),
    ({"target": "small"}, TypeError, "target .* str"),
    ({"target": True}, TypeError, "target .* bool"),
    ({"target": torch.ones(2, 2)}, ValueError, r"target .* \(2, 2\)"),
    ({"target": torch.ones(0)}, ValueError, r"target .* \(0,\)"),
    ({"target": torch.tensor([0.2, 0.1, 0.2])}, ValueError, "target .* 0.2 more than once"),
    ({"target": torch.tensor([0.2, float("nan")])}, ValueError, "target .* finite; got nan"),
    ({"target": torch.tensor([2, 1])}, TypeError, "target .* torch.int64"),
    ({"target": torch.tensor(1)}, TypeError, "target .* torch.int64"),
    (
        {"target": -0.1, "criterion": GradientNorm(lambda x: x.square().sum())},
        ValueError,
        "target .* negative.* -0.1",
    ),
    ({"t0": float("nan")}, ValueError, "t0 .* finite"),
    ({"t0": torch.zeros(2)}, ValueError, "t0 .* 0-d"),
    ({"t0": None}, TypeError, "t0 .* NoneType"),
    ({"max_time": -1.0}, ValueError, "max_time .* later than t0 = 0; got -1"),
    ({"max_time": 0.0}, ValueError, "max_time .* later than t0"),
    ({"max_time": float("inf")}, ValueError, "max_time .* finite"),
    ({"max_time": float("nan")}, ValueError, "max_time .* finite"),
    ({"max_time": "long"}, TypeError, "max_time .* str"),
    ({"censored": "never"}, ValueError, "censored .* 'never'"),
    ({"censored": float("nan")}, ValueError, "censored .* NaN"),
    ({"params": [1.0]}, TypeError, "params .* float"),
    ({"params": [torch.zeros(1)]}, ValueError, "params .* require grad"),
    ({"flow": lambda t, x: x.sum()}, ValueError, r"flow .* shape .* \(1,\); got \(\)"),
    ({"flow": lambda t, x: -x.float()}, TypeError, "flow .* torch.float64; got torch.float32"),
    ({"flow": lambda t, x: 1.0}, TypeError, "flow .* float"),
    ({"flow": lambda t, x: (x, x)}, TypeError, "flow .* tuple"),
    (
        {"flow": lambda t, s: (s[0],), "x0": (X0, X0), "criterion": first_entry},
        ValueError,
        "flow returned 1 tensors .* 2",
    ),
    (
        {"flow": lambda t, s: s[0], "x0": (X0, X0), "criterion": first_entry},
        TypeError,
        "flow .* tuple of 2",
    ),
    ({"criterion": lambda t, x: x}, ValueError, r"criterion .* scalar .*\(1,\)"),
    ({"criterion": lambda t, x: 1.0}, TypeError, "criterion .* float"),
    ({"flow": 3}, TypeError, "flow .* callable.* int"),
    ({"criterion": None}, TypeError, "criterion .* callable.* NoneType"),
    ({"gradient": "adjoint"}, TypeError, "gradient .* str"),
    ({"solver": "dopri5"}, TypeError, "solver .* str"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    CASES,
    ids=[f"{i}-{next(iter(c[0]))}" for i, c in enumerate(CASES)],
)
def test_refused_at_entry(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "method .* 'euler'"),
        ({"rtol": 0.0}, "rtol .* 0.0"),
        ({"rtol": float("nan")}, "rtol .* nan"),
        ({"atol": -1.0}, "atol .* -1.0"),
        ({"max_steps": 0}, "max_steps .* 0"),
        ({"max_step": 0.0}, "max_step .* 0.0"),
        ({"first_step": -1.0}, "first_step .* -1.0"),
    ],
)
def test_solver_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Torchdiffeq(**options)


def test_batches_are_announced() -> None:
    with pytest.raises(NotImplementedError, match="batched=True"):
        call(batched=True)


def test_errors_of_the_user_are_shown_as_they_are() -> None:
    def broken(t: Tensor, x: Tensor) -> Tensor:
        raise KeyError("missing key")

    with pytest.raises(KeyError, match="missing key"):
        call(flow=broken)


def test_functional_transforms_name_the_batched_form() -> None:
    with pytest.raises(RuntimeError, match="batched="):
        torch.func.vmap(lambda x: stopping_time(decay, x, half_square, 0.1).time)(
            torch.ones(3, 1, dtype=F64)
        )


def test_tolerance_below_the_dtype_warns() -> None:
    with pytest.warns(StoppingWarning, match="rtol = 1e-09 is below what torch.float32"):
        call(x0=X0.float(), solver=Torchdiffeq(rtol=1e-9, max_steps=5), throw=False, gradient=None)


def test_rounding_noise_of_the_criterion_warns() -> None:
    """In float32, 1 + x^2/2 cannot say when x^2/2 is down to 1e-5."""
    x0 = X0.float().requires_grad_()
    with pytest.warns(StoppingWarning, match="rounding in torch.float32"):
        call(x0=x0, criterion=lambda t, x: 1 + half_square(t, x), target=1 + 1e-5)
