"""The learned networks once more, as plain loops over torch's own cells; and small trained ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from discrete.learned import CoordinateLSTM, LearnedOptimizer, RNNprop
from ode_stopping import Quadratic

CURVATURE = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
X0 = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
Kind = TypeVar("Kind", bound=LearnedOptimizer)
Gradient = Callable[[Tensor], Tensor]


def quadratic() -> Quadratic:
    return Quadratic(CURVATURE)


@cache
def _weights(kind: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        learned = kind(hidden=5).to(dtype)
    f, update = quadratic(), learned.update(quadratic())
    tuner = torch.optim.Adam(learned.parameters(), lr=2e-2)
    for _ in range(40):
        state, total = update.initial_state(X0), torch.zeros((), dtype=torch.float64)
        for k in range(8):
            state = update(k, state)
            total = total + f(state[0]).log()
        tuner.zero_grad()
        total.backward()
        tuner.step()
    return {name: value.clone() for name, value in learned.state_dict().items()}


def trained(kind: type[Kind], dtype: torch.dtype = torch.float64) -> Kind:
    """A network of width 5 that goes down on the quadratic."""
    learned = kind(hidden=5).to(dtype)  # type: ignore[call-arg]
    learned.load_state_dict(_weights(kind, dtype))
    return learned


def cells_of(learned: CoordinateLSTM | RNNprop) -> list[nn.LSTMCell]:
    """Its layers as torch's cells, which have their gates in the order write, keep, cell, last."""
    cells = []
    for weight, bias in zip(learned.lstm.weights, learned.lstm.biases, strict=True):
        hidden = bias.shape[0] // 4
        width = weight.shape[1] - hidden
        cell = nn.LSTMCell(width, hidden).double()
        keep, write, new, last = range(4)
        rows = torch.cat(
            [torch.arange(hidden) + gate * hidden for gate in (write, keep, new, last)]
        )
        with torch.no_grad():
            cell.weight_ih.copy_(weight[rows, :width])
            cell.weight_hh.copy_(weight[rows, width:])
            cell.bias_ih.copy_(bias[rows])
            cell.bias_hh.zero_()
        cells.append(cell)
    return cells


def through(
    cells: list[nn.LSTMCell], rows: Tensor, memory: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    after = []
    for cell, (h, c) in zip(cells, memory, strict=True):
        h, c = cell(rows, (h, c))
        after.append((h, c))
        rows = h
    return rows, after


def zeros(cells: list[nn.LSTMCell], rows: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.zeros(rows, cell.hidden_size).double(), torch.zeros(rows, cell.hidden_size).double())
        for cell in cells
    ]


def coordinate_lstm_path(
    learned: CoordinateLSTM, gradient: Gradient, x: Tensor, steps: int, p: float = 10.0
) -> list[Tensor]:
    """x_0 .. x_steps of L2O-DM on one problem, coordinate by coordinate."""
    cells = cells_of(learned)
    memory, path = zeros(cells, len(x)), [x]
    for _ in range(steps):
        rows = []
        for g in gradient(x):
            if abs(float(g.detach())) >= torch.e ** (-p):
                rows.append(torch.stack([g.abs().log() / p, g / g.abs()]))
            else:
                rows.append(torch.stack([torch.tensor(-1.0).double(), g * torch.e**p]))
        h, memory = through(cells, torch.stack(rows), memory)
        x = x + 0.1 * (h @ learned.output.weight.double()[0] + learned.output.bias.double())
        path.append(x)
    return path


def rnnprop_path(
    learned: RNNprop,
    gradient: Gradient,
    x: Tensor,
    steps: int,
    *,
    alpha: float = 0.5,
    damping: float = 0.5,
    beta: float = 0.95,
) -> list[Tensor]:
    """x_0 .. x_steps of RNNprop on one problem."""
    cells = cells_of(learned)
    memory, path = zeros(cells, len(x)), [x]
    m, v, largest = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(()).double()
    for k in range(steps):
        g = gradient(x)
        m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * g * g
        mhat, vhat = m / (1 - beta ** (k + 1)), v / (1 - beta ** (k + 1))
        root = (vhat + 1e-16).sqrt()
        pair = torch.stack([g / root, mhat / root], dim=1)
        inner = functional.elu(
            pair @ learned.inputs.weight.double().T + learned.inputs.bias.double()
        )
        h, memory = through(cells, inner, memory)
        u = alpha * (h @ learned.output.weight.double()[0] + learned.output.bias.double()).tanh()
        length = g.square().sum().sqrt()
        largest = torch.maximum(largest, length)
        x = x + u * (length / largest) ** damping
        path.append(x)
    return path
