"""Algorithm 1's sweep: the same sums as one graph of everything, whatever the segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ode_stopping.core.sweep import Sweep, products

F64 = torch.float64
A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=F64)


def step(x: Tensor, v: Tensor, theta: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    return A @ x * theta + 0.1 * v * extra, v - 0.3 * theta.sin() * x


def leaves() -> tuple[Tensor, ...]:
    return tuple(
        torch.tensor(value, dtype=F64, requires_grad=True)
        for value in ([1.0, -0.5], [0.3, 0.7], [0.8, 1.1], [1.5, 0.5], [9.0])
    )


@pytest.mark.parametrize("length", [1, 2, 6])
def test_equal_to_one_graph(length: int) -> None:
    x0, v0, theta, extra, unused = leaves()
    lam = [torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([-1.0, 0.5], dtype=F64)]
    path, x, v = [(x0, v0)], x0, v0
    for _ in range(6):
        x, v = step(x, v, theta, extra)
        path.append((x, v))
    truth = torch.autograd.grad([x, v], [x0, v0, theta, extra], lam)
    sweep = Sweep(lam, [theta, unused])
    by_extra = torch.zeros_like(extra)
    for begin in range(6 - length, -1, -length):
        start = [piece.detach().requires_grad_() for piece in path[begin]]
        x, v = start
        for _ in range(length):
            x, v = step(x, v, theta, extra)
        (gradient,) = sweep.through([x, v], start, [extra])
        by_extra += gradient
    found = [*sweep.lam, sweep.sums[0], by_extra]
    torch.testing.assert_close(found, list(truth), rtol=1e-14, atol=0)
    assert sweep.sums[1].tolist() == [0.0]


def test_constant_pieces_and_no_dependence() -> None:
    x0, v0, theta, _, _ = leaves()
    sweep = Sweep([torch.ones(2, dtype=F64)] * 2, [theta])
    sweep.through([x0.detach(), 2 * v0], [x0, v0])
    assert [cotangent.tolist() for cotangent in sweep.lam] == [[0.0, 0.0], [2.0, 2.0]]
    sweep.through([x0.detach(), v0.detach()], [x0, v0])
    assert not any(bool(cotangent.any()) for cotangent in (*sweep.lam, *sweep.sums))
    (zero,) = products([v0 * 3], [theta], [torch.ones(2, dtype=F64)])
    assert zero.tolist() == [0.0, 0.0]
