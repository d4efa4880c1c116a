"""Fixtures every test file shares.

The default dtype stays float32 on purpose: a library that leans on it would pass here and fail for
its users. Tests name float64 where they build tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed torch, keep it to one thread, and see that the test leaves the default dtype alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32, f"the test left {left} as the default dtype"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; the CUDA case runs under `make test-gpu` only."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(name)


pytest_plugins = ["dummy_checks"]
