"""Optimisers by hand, as rules on batches of problems, each with one number to tune."""

from __future__ import annotations

from torch import Tensor

from discrete.learned import LearnedOptimizer

Memory = tuple[Tensor, ...]


class GradientDescent(LearnedOptimizer):
    """u = -r g."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate=rate)
        self.rate = rate

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """The step."""
        return -self.rate * gradient, ()


class Nesterov(LearnedOptimizer):
    """NAG with momentum k/(k + 3): x+ = y - r g(y), written for the point y where g is taken."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate=rate)
        self.rate = rate

    def initial_memory(self, x: Tensor) -> Memory:
        """The last step of the other sequence, zeros."""
        return (x.new_zeros(x.shape),)

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """From y_k to y_{k+1}, with x_{k+1} = x_k + v_{k+1}, v_{k+1} = mu_k v_k - r g(y_k)."""
        now, following = k / (k + 3.0), (k + 1) / (k + 4.0)
        moved = now * memory[0] - self.rate * gradient
        # y = x + mu v, so that y+ - y = v+ + mu+ v+ - mu v.
        return moved + following * moved - now * memory[0], (moved,)


class Adam(LearnedOptimizer):
    """Adam with its usual betas."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate=rate)
        self.rate = rate

    def initial_memory(self, x: Tensor) -> Memory:
        """Both averages, zeros."""
        return x.new_zeros(x.shape), x.new_zeros(x.shape)

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """The step."""
        m = 0.9 * memory[0] + 0.1 * gradient
        v = 0.999 * memory[1] + 0.001 * gradient.square()
        root = (v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        return -self.rate * (m / (1 - 0.9 ** (k + 1))) / root, (m, v)


RIVALS = {"GD": GradientDescent, "NAG": Nesterov, "Adam": Adam}
RATES = {
    "GD": tuple(2.0**e for e in range(-4, 6)),
    "NAG": tuple(2.0**e for e in range(-5, 5)),
    "Adam": (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
}
