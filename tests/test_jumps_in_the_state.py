"""A flow that jumps at a surface in x: no step's transpose has the jump of lam, and it is said."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from ode_stopping import GradientAccuracyWarning, Torchdiffeq, stopping_time
from ode_stopping.gradients.jumps import shares_of_jumps
from theory_checks.closed_forms import CLOSED_FORMS

F64 = torch.float64


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Switch:
    """x' = -s x with s = a above 1 and b below, y' = -c x y, J = y.

    With K = log(y0/eps)/c it is x(T) = 1 - b (K - (x0 - 1)/a) and T = log(x0)/a - log(x(T))/b.
    """

    def __init__(self) -> None:
        self.a, self.b, self.c = leaf(1.0), leaf(2.0), leaf(0.3)
        self.x0, self.y0 = leaf(2.0), leaf(1.0)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b, "c": self.c, "x0": self.x0, "y0": self.y0}

    def truth(self, eps: float) -> tuple[Tensor, ...]:
        length = torch.log(self.y0 / eps) / self.c
        end = 1 - self.b * (length - (self.x0 - 1) / self.a)
        time = torch.log(self.x0) / self.a - torch.log(end) / self.b
        return torch.autograd.grad(time, list(self.leaves.values()))

    def flow(self, t: Tensor, z: Tensor) -> Tensor:
        rate = torch.where(z[0] > 1, self.a, self.b)
        return torch.stack([-rate * z[0], -self.c * z[0] * z[1]])


@pytest.mark.parametrize("rtol", [1e-7, 1e-4])
def test_the_error_is_known_leaf_by_leaf(rtol: float) -> None:
    switch, eps = Switch(), 0.68
    x0 = torch.stack([switch.x0, switch.y0])
    result = stopping_time(
        switch.flow,
        x0,
        lambda t, z: z[1],
        eps,
        params=[x0],
        solver=Torchdiffeq(rtol=rtol),
        evidence="standard",
    )
    with pytest.warns(GradientAccuracyWarning, match="jumps in the state"):
        found = torch.autograd.grad(result.time, list(switch.leaves.values()))
    errors = {
        name: abs(float((f - g) / g))
        for name, f, g in zip(switch.leaves, found, switch.truth(eps), strict=True)
    }
    assert result.evidence is not None
    estimates = {entry.name: entry.error for entry in result.evidence.leaves}
    assert result.evidence.worst is not None
    assert result.evidence.worst.cause == "jump"
    for name in ("a", "b", "c"):
        estimate = next(v for k, v in estimates.items() if k.endswith(name))
        assert errors[name] <= max(10 * estimate, result.evidence.promise), name
    assert max(errors.values()) > result.evidence.promise


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("case", range(len(CLOSED_FORMS)))
def test_smooth_flows_have_none(case: int, rtol: float) -> None:
    form = CLOSED_FORMS[case]
    leaves = form.leaves(1e-3, 0.25)
    result = stopping_time(
        form.flow(leaves),
        leaves["x0"],
        form.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        solver=Torchdiffeq(rtol=rtol),
        evidence="light",
    )
    assert result.problem is not None
    assert shares_of_jumps(result.problem) == {}


def test_a_jump_in_one_coordinate_of_small_share() -> None:
    """lam^T F hardly knows it, and the leaf that acts there is wrong as a whole."""
    a, b = leaf(1.0), leaf(3.0)
    small = 1e-3

    def flow(t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([-z[0] - small * z[1], -torch.where(z[1] > 1, a, b) * z[1]])

    z0 = torch.tensor([2.0, 2.0], dtype=F64)
    result = stopping_time(
        flow, z0, lambda t, z: z[0], 0.5, solver=Torchdiffeq(rtol=1e-4), evidence="standard"
    )
    with pytest.warns(GradientAccuracyWarning, match="jumps in the state"):
        result.time.backward()
    assert result.evidence is not None
    assert result.evidence.worst is not None
    assert result.evidence.worst.name.endswith("a")


def test_a_jump_at_a_named_time_is_no_jump_in_the_state() -> None:
    a, b, x0 = leaf(1.0), leaf(2.0), leaf(2.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -torch.where(t < 0.4, a, b) * x

    result = stopping_time(flow, x0, lambda t, x: x, 0.5, breakpoints=[0.4], evidence="standard")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.time.backward()
    time = 0.4 + (math.log(2.0 / 0.5) - 0.4) / 2.0
    torch.testing.assert_close(float(result.time.detach()), time, rtol=1e-6, atol=0)
    assert a.grad is not None
    torch.testing.assert_close(float(a.grad), -0.4 / 2.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("speeds", [(3.0, 2.0), (2.0, 0.5), (5.0, 1.0)])
def test_the_size_of_the_error_is_told(speeds: tuple[float, float]) -> None:
    """x' = -a above 1 and -b below: dT/dx0 = 1/a, and the steps, which go over it, have 1/b."""
    fast, slow = speeds
    x0 = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -torch.where(x > 1, fast, slow) * torch.ones_like(x), x0, lambda t, x: x, 0.5
    )
    with pytest.warns(GradientAccuracyWarning, match="the flow jumps in the state"):
        result.time.backward()
    (leaf,) = (leaf for leaf in result.evidence.leaves if leaf.name == "x0")
    assert leaf.cause == "jump"
    assert x0.grad is not None
    error = abs(float(x0.grad) * fast - 1.0)
    assert error > 0.3
    assert leaf.error == pytest.approx(error, rel=0.1)
