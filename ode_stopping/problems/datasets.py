"""Classification data that need no network: scikit-learn's bundled sets and a synthetic one.

Every loader returns (X, y), X of shape (n, features) and y of shape (n,) with labels -1 and +1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def breast_cancer(
    *, standardize: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The Wisconsin diagnostic breast-cancer data: 569 samples of 30 features, +1 = benign.

    Args:
        standardize: Every column to mean 0 and (population) standard deviation 1; the raw columns
            differ by four orders of magnitude.
        dtype: Of both tensors.

    Raises:
        ImportError: Scikit-learn is not installed.
    """
    bunch = sklearn_datasets().load_breast_cancer()
    features = torch.as_tensor(bunch.data, dtype=torch.float64)
    if standardize:
        features = (features - features.mean(0)) / features.std(0, correction=0)
    labels = 2 * torch.as_tensor(bunch.target) - 1
    return features.to(dtype), labels.to(dtype)


def digits(
    *,
    classes: Sequence[int] = (0, 1),
    scale: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Two classes of the 8 x 8 handwritten digits, 64 features; the first class -1, the second +1.

    Args:
        classes: Two different digits.
        scale: Divide the pixels 0..16 by 16.
        dtype: Of both tensors.

    Raises:
        ImportError: Scikit-learn is not installed.
        ValueError: `classes` is not two different digits.
    """
    if len(classes) != 2 or classes[0] == classes[1] or not set(classes) <= set(range(10)):
        raise ValueError(f"classes must be two different digits from 0 to 9, got {classes}")
    bunch = sklearn_datasets().load_digits()
    target = torch.as_tensor(bunch.target)
    chosen = (target == classes[0]) | (target == classes[1])
    features = torch.as_tensor(bunch.data, dtype=torch.float64)[chosen]
    if scale:
        features = features / 16.0
    labels = 2 * (target[chosen] == classes[1]).to(dtype) - 1
    return features.to(dtype), labels


def synthetic_logistic(
    *,
    samples: int = 256,
    dim: int = 512,
    seed: int,
    nonzeros: int | None = None,
    flipped: float = 0.05,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Standard normal rows labelled by the sign of a sparse linear function, some labels flipped.

    y = sign(X z) with z having `nonzeros` standard normal entries in random places; then
    round(flipped * samples) labels, chosen at random, change sign. Drawn in float64, so a seed
    means the same data in every dtype. (Sizes as in Figure 3; the sparsity and the share
    are our choice.)

    Args:
        samples: Rows n.
        dim: Columns.
        seed: Of a generator of its own; the global random state is neither read nor changed.
        nonzeros: Entries of z that are not zero; default a tenth of dim, at least 1.
        flipped: Share of wrong labels, in [0, 1/2).
        dtype: Of both tensors.

    Raises:
        ValueError: A size below 1, more nonzeros than columns, or a share outside [0, 1/2).
    """
    nonzeros = max(1, dim // 10) if nonzeros is None else nonzeros
    if samples < 1 or dim < 1:
        raise ValueError(f"samples and dim must be at least 1, got {samples} and {dim}")
    if not 1 <= nonzeros <= dim:
        raise ValueError(f"nonzeros must be between 1 and dim = {dim}, got {nonzeros}")
    if not 0 <= flipped < 0.5:
        raise ValueError(f"flipped must be in [0, 1/2), got {flipped}")
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    truth = torch.zeros(dim, dtype=torch.float64)
    support = torch.randperm(dim, generator=generator)[:nonzeros]
    truth[support] = torch.randn(nonzeros, generator=generator, dtype=torch.float64)
    # where, not sign: a label must never be 0.
    labels = torch.where(features @ truth < 0, -1.0, 1.0)
    wrong = torch.randperm(samples, generator=generator)[: round(flipped * samples)]
    labels[wrong] *= -1
    return features.to(dtype), labels.to(dtype)


def sklearn_datasets() -> Any:
    """The module sklearn.datasets, imported where it is used.

    Raises:
        ImportError: Scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'this data set needs scikit-learn: pip install "ode-stopping[checks]"'
        ) from error
    return datasets
