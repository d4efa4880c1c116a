"""The gradient of any objective, in every autograd mode, and the errors that name a bad one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.problems import Problem, objective_gradient

DIM = 5


class Bare(Problem):
    """A user's problem that says nothing but its value."""

    dim = DIM

    def forward(self, x: Tensor) -> Tensor:
        return torch.cosh(x).sum(-1)


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


def test_plain_callable_in_every_mode() -> None:
    a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return a * (x**3).sum(-1)

    x = points(2)
    expected = 9.0 * x**2
    with torch.no_grad():
        quiet = objective_gradient(f, x)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, expected, rtol=1e-15, atol=0)
    # x without grad, f with a parameter: the graph leads to the parameter, and to nothing else.
    loud = objective_gradient(f, x)
    (slope,) = torch.autograd.grad(loud.sum(), a, retain_graph=True)
    torch.testing.assert_close(slope, (3 * x**2).sum(), rtol=1e-14, atol=0)
    loud.sum().backward()
    assert a.grad is not None
    assert reached_leaves(loud) == {id(a)}
    assert not x.requires_grad
    assert x.grad is None


def reached_leaves(tensor: Tensor) -> set[int]:
    """Every leaf requiring grad that a graph leads to."""
    found, pending = set(), [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.requires_grad:
            found.add(id(leaf))
        pending.extend(following for following, _ in node.next_functions)
    return found


def test_only_the_path_through_the_argument_counts() -> None:
    x = points().requires_grad_()
    gradient = objective_gradient(lambda z: (z * x).sum(-1), x)  # linear in z, x a mere constant
    torch.testing.assert_close(gradient, x)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.ones_like(x))


def test_linear_objective_and_modules() -> None:
    slope = torch.arange(1.0, DIM + 1, dtype=torch.float64)
    torch.testing.assert_close(
        objective_gradient(lambda x: x @ slope, points(2)), slope.expand(2, DIM)
    )
    net = nn.Sequential(nn.Linear(DIM, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    gradient = objective_gradient(net, points(2))
    assert gradient.requires_grad
    assert all(p is not None for p in torch.autograd.grad(gradient.pow(2).sum(), [net[0].weight]))


def test_gradient_method_of_any_object_is_used() -> None:
    class Own:
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            raise AssertionError("the value is not needed")

        def gradient(self, x: Tensor) -> Tensor:
            self.calls += 1
            return 2 * x

    own = Own()
    torch.testing.assert_close(objective_gradient(own, points()), 2 * points())
    assert own.calls == 1


def test_matrix_state_with_one_value() -> None:
    x = points(3)
    torch.testing.assert_close(objective_gradient(lambda z: 0.5 * (z * z).sum(), x), x)
    number = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(objective_gradient(lambda z: z**3, number), 3 * number**2)


BAD_OBJECTIVES = {
    "not callable": (3.0, TypeError, "objective must be callable"),
    "float": (lambda x: 1.0, TypeError, "objective must return a tensor, got float"),
    "integers": (lambda x: x.sum(-1).long(), TypeError, "objective must return floating point"),
    "elementwise": (lambda x: x * x, ValueError, r"one value a sample, shape \(3,\)"),
    "kept axis": (
        lambda x: (x * x).sum(-1, keepdim=True),
        ValueError,
        r"got shape \(3, 1\)",
    ),
    "wrong axis": (lambda x: (x * x).sum(0), ValueError, r"got shape \(5,\)"),
    "constant": (lambda x: x.new_ones(3), ValueError, "objective does not depend on x"),
    "detached": (lambda x: (x.detach() ** 2).sum(-1), ValueError, "objective does not depend"),
    "parameter only": (
        lambda x: torch.ones(3, requires_grad=True) * 2,
        ValueError,
        "objective does not depend",
    ),
}


@pytest.mark.parametrize("name", BAD_OBJECTIVES)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_objectives_are_named(name: str, grad: bool) -> None:
    objective, error, message = BAD_OBJECTIVES[name]
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        objective_gradient(objective, points(3))


def test_bad_gradient_methods_and_points() -> None:
    class Own(Bare):
        def gradient(self, x: Tensor) -> Tensor:
            return x.sum(-1)

    with pytest.raises(ValueError, match=r"objective\.gradient must return the shape of x"):
        objective_gradient(Own(), points(3))
    with pytest.raises(TypeError, match="x must be floating point"):
        objective_gradient(Bare(), torch.arange(DIM))
    with pytest.raises(TypeError, match="x must be a tensor, got tuple"):
        objective_gradient(Bare(), (points(), points()))  # type: ignore[arg-type]
