"""Recorded tensor operations: the function at other inputs, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.gradients.recording import Recording, Unrecordable


def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        yield tuple(torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[misc]


def test_recording_is_the_function_at_other_inputs() -> None:
    weight = torch.arange(5.0, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        parts = torch.stack([x * weight.exp(), y.detach()]).unbind()
        return [torch.cat([parts[0], y]), torch.tanh(x) @ y, weight.exp()]

    first, second = inputs()
    recording = Recording.of(function, *first)
    for one, other in zip(recording.run(*second), function(*second), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    alone = recording.giving(1)
    assert len(alone.operations) == 2 < len(recording.operations)
    assert torch.equal(alone.run(*second)[0], torch.tanh(second[0]) @ second[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x if bool(x[0] > 0) else y],
        lambda x, y: [x * x[0].item()],
        lambda x, y: [x * torch.rand_like(x)],
        lambda x, y: [x * float(len(x.nonzero()))],
        lambda x, y: [x + torch.from_numpy(y.numpy())],
        lambda x, y: [x + y.clone().zero_()],
        lambda x, y: [x + nn.Parameter(y)],
        lambda x, y: [x if torch.equal(x, y) else y],
        lambda x, y: [x * float(f"{y[0]:.2f}")],
    ],
)
def test_recording_is_refused(function: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    with pytest.raises(Unrecordable, match="in a recording"):
        Recording.of(function, *next(inputs()))
