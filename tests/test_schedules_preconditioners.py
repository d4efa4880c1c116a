"""Schedules and preconditioners: whose tensors are learnable, the networks, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.flows import (
    ConstantSchedule,
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    ExponentialSchedule,
    GradientFlow,
    NetworkPreconditioner,
    PolynomialSchedule,
    PreconditionedFlow,
    RescaledGradientFlow,
)
from ode_stopping.problems import QuarticQuadratic, Rosenbrock, geometric_spectrum, random_rotation

DIM = 4
TIME = torch.tensor(0.7, dtype=torch.float64)
DIAGONAL = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)


def problem() -> QuarticQuadratic:
    return QuarticQuadratic(
        geometric_spectrum(DIM, 10.0), rotation=random_rotation(DIM, seed=1), quartic=0.5
    )


def plain(x: Tensor) -> Tensor:
    return torch.cosh(x).sum(-1) + 0.1 * (x * x.roll(1, -1)).sum(-1)


def hidden(seed: int = 0) -> CoordinatewisePreconditioner:
    return CoordinatewisePreconditioner(DIM, seed=seed)


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


# --- whose tensors are learnable, and that they stay the user's --------------------------------


def test_modules_are_registered() -> None:
    net = nn.Sequential(nn.Linear(DIM, 1), nn.Flatten(0)).double()
    flow = RescaledGradientFlow(net, schedule=ExponentialSchedule(1.0, 0.1))
    assert {id(p) for p in net.parameters()} < {id(p) for p in flow.parameters()}
    assert set(dict(flow.named_parameters())) == {
        "objective.0.weight",
        "objective.0.bias",
        "schedule.rate",
        "schedule.decay",
    }
    assert list(GradientFlow(plain).parameters()) == []


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda *a: ConstantSchedule(*a), ("value",)),
        (lambda *a: ExponentialSchedule(*a), ("rate", "decay")),
        (lambda *a: PolynomialSchedule(*a), ("rate", "power")),
    ],
    ids=["constant", "exponential", "polynomial"],
)
def test_schedules_keep_tensors_and_learn_numbers(
    make: Callable[..., nn.Module], names: tuple[str, ...]
) -> None:
    numbers = make(*[0.5] * len(names))
    assert dict(numbers.named_parameters()).keys() == set(names)
    assert all(p.dtype == torch.float64 and p.shape == () for p in numbers.parameters())
    leaves = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in names]
    kept = make(*leaves)
    assert all(getattr(kept, name) is leaf for name, leaf in zip(names, leaves, strict=True))
    assert list(kept.parameters()) == []
    kept(TIME).backward()
    assert all(leaf.grad is not None and float(leaf.grad) != 0 for leaf in leaves)
    parameters = [nn.Parameter(torch.tensor(0.5, dtype=torch.float64)) for _ in names]
    registered = make(*parameters)
    assert {id(p) for p in registered.parameters()} == {id(p) for p in parameters}
    fixed = make(*[torch.tensor(0.5, dtype=torch.float64) for _ in names])
    assert list(fixed.parameters()) == []
    assert not fixed(TIME).requires_grad
    assert float(fixed(TIME)) == numbers(TIME).item()


def test_start_and_scale_are_fixed_unless_they_require_grad() -> None:
    start = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    schedule = PolynomialSchedule(1.0, 0.5, start=start, scale=3.0)
    assert schedule.start is start
    assert set(dict(schedule.named_parameters())) == {"rate", "power"}
    schedule(TIME).backward()
    expected = 0.5 / 3.0 * (1 + (0.7 - 0.2) / 3.0) ** -1.5
    assert float(start.grad) == pytest.approx(expected, rel=1e-13)


def test_schedules_accept_many_times() -> None:
    times = torch.linspace(0, 2, 5, dtype=torch.float64)
    schedule = ExponentialSchedule(2.0, 0.5)
    torch.testing.assert_close(schedule(times).detach(), 2 * torch.exp(-0.5 * times))
    assert "decay=0.5" in repr(schedule)


def test_preconditioner_tensor_stays_the_leaf() -> None:
    leaf = DIAGONAL.clone().requires_grad_()
    flow = PreconditionedFlow(problem(), preconditioner=leaf)
    assert flow.preconditioner is leaf
    assert list(flow.parameters()) == []
    flow(TIME, points()).sum().backward()
    assert leaf.grad is not None
    parameter = nn.Parameter(DIAGONAL.clone())
    flow = PreconditionedFlow(problem(), preconditioner=parameter)
    assert next(flow.parameters()) is parameter
    assert flow.preconditioner is parameter
    for log in (False, True):
        assert DiagonalPreconditioner(leaf, log=log).values is leaf
    assert len(list(DiagonalPreconditioner([1.0, 2.0]).parameters())) == 1
    assert list(DiagonalPreconditioner(DIAGONAL).parameters()) == []


def test_conversion_leaves_the_user_s_leaf_alone() -> None:
    leaf = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    schedule = ExponentialSchedule(leaf, 0.3).to(torch.float32)
    assert schedule.rate is leaf
    assert leaf.dtype == torch.float64
    assert schedule.decay.dtype == schedule.start.dtype == torch.float32


def test_a_hyper_network_output_can_be_the_schedule() -> None:
    raw = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rate, decay = torch.exp(raw)
    RescaledGradientFlow(problem(), schedule=ExponentialSchedule(rate, decay))(
        TIME, points()
    ).sum().backward()
    assert raw.grad is not None
    assert bool((raw.grad != 0).all())


# --- the networks -------------------------------------------------------------------------------


def test_coordinatewise_preconditioner_has_ten_parameters_a_coordinate() -> None:
    for dim in (1, 7):
        module = CoordinatewisePreconditioner(dim, seed=0)
        assert sum(p.numel() for p in module.parameters()) == 10 * dim


def test_coordinatewise_preconditioner_by_its_formula() -> None:
    module, x, g = hidden(3), points(2, seed=1), points(2, seed=2)
    w, v, b = (p.detach() for p in (module.input_weights, module.output_weights, module.bias))
    value = module(x, g, TIME).detach()
    for s in range(2):
        for i in range(DIM):
            total = float(b[i])
            for j in range(3):
                inner = w[0, j, i] * x[s, i] + w[1, j, i] * g[s, i]
                total += float(v[j, i]) * math.tanh(float(inner))
            assert float(value[s, i]) == pytest.approx(math.log1p(math.exp(total)), rel=1e-13)
    # A network of its own: nothing crosses between coordinates.
    jacobian = torch.autograd.functional.jacobian(lambda z: module(z, g[0], TIME), x[0])
    assert torch.equal(jacobian, torch.diag(torch.diagonal(jacobian)))
    assert bool((torch.diagonal(jacobian) != 0).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_networks_start_near_one(scale: float) -> None:
    dim = 200
    x = scale * torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for module in (CoordinatewisePreconditioner(dim, seed=1), NetworkPreconditioner((16,), seed=1)):
        start = module(x, -3 * x, TIME)
        # Saturated, the argument of softplus is off by four normal numbers of size 0.1, and
        # softplus has slope 0.63 there: a standard deviation of 0.126 at most.
        off = start.detach() - 1
        assert 0.0 < float(off.pow(2).mean().sqrt()) < 0.126 * 1.2
        assert float(off.abs().max()) < 5 * 0.126
    exact = CoordinatewisePreconditioner(dim, seed=1, spread=0.0)(x, x, TIME)
    torch.testing.assert_close(exact, torch.ones_like(x), rtol=1e-15, atol=0)


def test_networks_are_seeded_by_themselves() -> None:
    before = torch.get_rng_state()
    for make in (lambda s: hidden(s), lambda s: NetworkPreconditioner((3,), seed=s)):
        first, again, other = (list(make(s).parameters()) for s in (1, 1, 2))
        torch.rand(3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        torch.set_rng_state(before)
    hidden(5)
    assert torch.equal(before, torch.get_rng_state())
    single = CoordinatewisePreconditioner(DIM, seed=1, dtype=torch.float32)
    assert torch.equal(single.bias, hidden(1).bias.float())


def test_network_preconditioner_has_no_dimension() -> None:
    module = NetworkPreconditioner((8,))
    assert sum(p.numel() for p in module.parameters()) == (3 + 1) * 8 + 8 + 1
    for dim in (2, 9):
        x = torch.ones(3, dim, dtype=torch.float64)
        assert module(x, x, TIME).shape == (3, dim)
        assert module(x, x, TIME).std().item() < 1e-15  # equal inputs, equal outputs
    x = torch.zeros(1, dtype=torch.float64)
    assert module(x, x, TIME).item() != module(x, x, TIME + 1).item()


# --- bad input ----------------------------------------------------------------------------------

ROSENBROCK = Rosenbrock(dim=DIM)
BAD_CONSTRUCTION = {
    "objective": (lambda: GradientFlow(1.0), TypeError, "objective must be callable"),
    "schedule": (
        lambda: RescaledGradientFlow(ROSENBROCK, schedule=0.5),
        TypeError,
        "schedule must be callable.*ConstantSchedule",
    ),
    "preconditioner": (
        lambda: PreconditionedFlow(ROSENBROCK, preconditioner=[1.0]),
        TypeError,
        "preconditioner must be callable",
    ),
    "preconditioner NaN": (
        lambda: PreconditionedFlow(ROSENBROCK, preconditioner=DIAGONAL * math.nan),
        ValueError,
        "preconditioner must be finite",
    ),
    "value": (lambda: ConstantSchedule([1.0, 2.0]), ValueError, "value must be a number"),
    "value tensor": (lambda: ConstantSchedule(DIAGONAL), ValueError, "value must be a number"),
    "value NaN": (lambda: ConstantSchedule(math.nan), ValueError, "value must be finite"),
    "value text": (lambda: ConstantSchedule("fast"), TypeError, "value must hold real numbers"),
    "value None": (lambda: ConstantSchedule(None), TypeError, "value must hold real numbers"),
    "decay": (lambda: ExponentialSchedule(1.0, math.inf), ValueError, "decay must be finite"),
    "start": (lambda: ExponentialSchedule(1.0, 1.0, start=DIAGONAL), ValueError, "start"),
    "scale": (
        lambda: PolynomialSchedule(1.0, 1.0, scale=0.0),
        ValueError,
        "scale must be positive",
    ),
    "values": (
        lambda: DiagonalPreconditioner([[1.0]]),
        ValueError,
        r"values must have shape \(d,\)",
    ),
    "values integer": (
        lambda: DiagonalPreconditioner(torch.ones(2).long()),
        TypeError,
        "values must be a floating-point",
    ),
    "hidden": (lambda: NetworkPreconditioner(()), ValueError, "hidden"),
    "hidden zero": (lambda: NetworkPreconditioner((3, 0)), ValueError, "hidden"),
    "dim": (lambda: CoordinatewisePreconditioner(0, seed=0), ValueError, "dim"),
    "spread": (lambda: CoordinatewisePreconditioner(2, seed=0, spread=-1), ValueError, "spread"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_construction_is_named(name: str) -> None:
    make, error, message = BAD_CONSTRUCTION[name]
    with pytest.raises(error, match=message):
        make()


def test_coordinate_count_is_checked() -> None:
    with pytest.raises(ValueError, match="x has 3 coordinates, the preconditioner 4"):
        hidden()(torch.ones(3), torch.ones(3), TIME)
