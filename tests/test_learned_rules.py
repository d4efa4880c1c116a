"""Learned optimisers as update rules: closed forms, plain loops, and every road to dN."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_loops import (
    CURVATURE,
    X0,
    coordinate_lstm_path,
    quadratic,
    rnnprop_path,
    trained,
)
from torch import Tensor

from discrete import (
    DiscreteAdjoint,
    IndexRoute,
    Truncated,
    Unrolled,
    check_index_gradient,
    stopping_index,
)
from discrete.learned import (
    CoordinateLSTM,
    LearnedOptimizer,
    LearnedPreconditioner,
    LearnedSchedule,
    RNNprop,
)
from ode_stopping import LossValue, Quadratic

RATES = [0.1, 0.3, 0.2]


def path_of(learned: LearnedOptimizer, f: Any, x: Tensor, steps: int) -> list[Tensor]:
    """The iterates of the update itself."""
    update = learned.update(f)
    state = update.initial_state(x)
    path = [x]
    for k in range(steps):
        state = update(k, state)
        path.append(state[0])
    return path


def seeded(make: Callable[[], LearnedOptimizer], seed: int = 0) -> LearnedOptimizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def all_four() -> dict[str, LearnedOptimizer]:
    return {
        "schedule": LearnedSchedule(RATES, every=2, momentum=0.4),
        "preconditioner": seeded(lambda: LearnedPreconditioner(3, rate=0.2, rank=2)),
        "lstm": trained(CoordinateLSTM),
        "rnnprop": trained(RNNprop),
    }


NAMES = ("schedule", "preconditioner", "lstm", "rnnprop")


# --- Closed forms ---------------------------------------------------------------------------------


def test_schedule_on_a_quadratic() -> None:
    """x_k = prod (1 - r_i q) x_0, and dN/dlog r_i = grad J . sum_j r_i q / (1 - r_i q) x_N / dJ."""
    learned, f = LearnedSchedule(RATES, every=2), quadratic()
    update = learned.update(f)
    run = stopping_index(update, update.initial_state(X0), LossValue(f), 0.05)
    q = CURVATURE
    used = [min(k // 2, 2) for k in range(run.index)]
    factors = [1 - RATES[i] * q for i in used]
    xs = [X0]
    for factor in factors:
        xs.append(factor * xs[-1])
    losses = [float(0.5 * (q * x * x).sum()) for x in xs]
    assert losses[-1] <= 0.05 < losses[-2]
    torch.testing.assert_close(run.state[0], xs[-1], rtol=1e-14, atol=0.0)
    expected = torch.zeros(3, dtype=torch.float64)
    for i, factor in zip(used, factors, strict=True):
        change = -RATES[i] * q / factor * xs[-1]
        expected[i] -= (q * xs[-1] * change).sum() / (losses[-1] - losses[-2])
    (found,) = torch.autograd.grad(run.steps, learned.log_rates)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_schedule_with_momentum() -> None:
    """m <- mu m + q x, x <- x - r m, with the derivatives of both carried along."""
    mu, learned, f = 0.6, LearnedSchedule(RATES, every=3, momentum=0.6), quadratic()
    update = learned.update(f)
    run = stopping_index(update, update.initial_state(X0), LossValue(f), 0.05)
    q = CURVATURE
    x, m = X0, torch.zeros(3).double()
    dx, dm = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()  # rates by coordinates
    losses = [float(f(x))]
    for k in range(run.index):
        i = min(k // 3, 2)
        m, dm = mu * m + q * x, mu * dm + q * dx
        dx = dx - RATES[i] * dm
        dx[i] -= RATES[i] * m  # to log r
        x = x - RATES[i] * m
        losses.append(float(0.5 * (q * x * x).sum()))
    assert losses[-1] <= 0.05 < losses[-2]
    torch.testing.assert_close(run.state[0], x, rtol=1e-13, atol=0.0)
    expected = -(dx @ (q * x)) / (losses[-1] - losses[-2])
    (found,) = torch.autograd.grad(run.steps, learned.log_rates)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_preconditioner_on_a_quadratic() -> None:
    """x_N = (1 - P Q)^N x_0 and dx_N = -sum_j A^(N-1-j) dP Q x_j, entry by entry of a and V."""
    learned = LearnedPreconditioner(3, rate=0.2, rank=2)
    with torch.no_grad():
        learned.log_diagonal.copy_(torch.tensor([-1.0, -2.0, -0.5]).double())
        assert learned.factor is not None
        learned.factor.copy_(torch.tensor([[0.2, 0.1], [-0.1, 0.3], [0.4, 0.0]]).double())
    a, v = learned.log_diagonal.detach(), learned.factor.detach()
    rotation = torch.linalg.qr(torch.tensor([[1.0, 2, 0], [0, 1, 1], [1, 0, 3]]).double())[0]
    f = Quadratic(CURVATURE, rotation=rotation)
    hessian = torch.autograd.functional.hessian(f, X0)
    step = torch.eye(3).double() - (torch.diag(a.exp()) + v @ v.T) @ hessian
    update = learned.update(f)
    run = stopping_index(update, update.initial_state(X0), LossValue(f), 0.05)
    n = run.index
    xs = [torch.linalg.matrix_power(step, k) @ X0 for k in range(n + 1)]
    torch.testing.assert_close(run.state[0], xs[n], rtol=1e-12, atol=0.0)

    def derivative(change: Tensor) -> float:
        """dN for a change of P."""
        powers = [torch.linalg.matrix_power(step, n - 1 - j) for j in range(n)]
        moved = -sum(power @ change @ hessian @ x for power, x in zip(powers, xs, strict=False))
        value, before = 0.5 * xs[n] @ hessian @ xs[n], 0.5 * xs[n - 1] @ hessian @ xs[n - 1]
        return float(-(hessian @ xs[n]) @ moved / (value - before))

    found = torch.autograd.grad(run.steps, [learned.log_diagonal, learned.factor])
    for i in range(3):
        unit = torch.zeros(3, 3).double()
        unit[i, i] = a[i].exp()
        assert float(found[0][i]) == pytest.approx(derivative(unit), rel=1e-11)
        for j in range(2):
            one = torch.zeros(3, 2).double()
            one[i, j] = 1.0
            change = one @ v.T + v @ one.T
            assert float(found[1][i, j]) == pytest.approx(derivative(change), rel=1e-11)


# --- Networks against plain loops -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lstm", "rnnprop"])
def test_network_is_the_plain_loop(kind: str) -> None:
    f = quadratic()
    start = torch.tensor([1.0, -2.0, 1e-6], dtype=torch.float64)  # one below e^-10
    learned: Any
    if kind == "lstm":
        learned = trained(CoordinateLSTM)
        plain = coordinate_lstm_path(learned, f.gradient, start, 9)
    else:
        learned = trained(RNNprop)
        plain = rnnprop_path(learned, f.gradient, start, 9)
    for ours, theirs in zip(path_of(learned, f, start, 9), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 1.0}, {"alpha": 0.2}])
def test_options_of_rnnprop(options: dict[str, float]) -> None:
    f, weights = quadratic(), trained(RNNprop).state_dict()
    learned = RNNprop(5, **options, betas=(0.8, 0.8)).double()  # type: ignore[arg-type]
    learned.load_state_dict(weights)
    plain = rnnprop_path(learned, f.gradient, X0, 7, beta=0.8, **options)
    for ours, theirs in zip(path_of(learned, f, X0, 7), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-12)


def test_definition_3_through_the_plain_loop() -> None:
    """dN to every weight of RNNprop, by autograd through cells of torch's."""
    learned, f = trained(RNNprop), quadratic()
    update = learned.update(f)
    run = stopping_index(update, update.initial_state(X0), LossValue(f), 0.3)
    found = torch.autograd.grad(run.steps, list(learned.output.parameters()))
    path = rnnprop_path(learned, f.gradient, X0, run.index)
    values = [f(x) for x in path]
    assert values[-1].item() <= 0.3 < values[-2].item()
    gradients = torch.autograd.grad(values[-1], list(learned.output.parameters()))
    for ours, theirs in zip(found, gradients, strict=True):
        expected = -theirs / (values[-1] - values[-2]).detach()
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_features_by_hand() -> None:
    learned = CoordinateLSTM(3, log_range=2.0)
    g = torch.tensor([1.0, -0.5, 0.1, -0.0, 0.0, torch.e**-2], dtype=torch.float64)
    found = learned._features(g)
    small = 0.1 * torch.e**2
    log2 = 0.6931471805599453
    expected = [[0.0, 1.0], [-log2 / 2, -1.0], [-1.0, small], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-7, atol=1e-7)


# --- Roads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interpolation", [None, "log"])
def test_every_route_gives_one_gradient(name: str, interpolation: Any) -> None:
    learned, f = all_four()[name], quadratic()
    update = learned.update(f)
    found: list[list[Tensor]] = []
    index = int(stopping_index(update, update.initial_state(X0), LossValue(f), 0.3).index)
    routes: list[IndexRoute] = [
        Unrolled(),
        DiscreteAdjoint(),
        DiscreteAdjoint(memory=1024),
        Truncated(steps=index),
    ]
    for route in routes:
        run = stopping_index(
            update,
            update.initial_state(X0),
            LossValue(f),
            0.3,
            gradient=route,
            interpolation=interpolation,
        )
        assert run.index == index
        found.append(list(torch.autograd.grad(run.steps, list(learned.parameters()))))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert any(float(one.abs().max()) > 1e-3 for one in found[0])


@pytest.mark.parametrize("name", NAMES)
def test_check_passes(name: str) -> None:
    learned, f = all_four()[name], quadratic()
    update = learned.update(f)
    state = update.initial_state(X0)
    report = check_index_gradient(update, state, LossValue(f), 0.3, directions=1)
    assert report.passed, report
    assert not report.unjudged, report
    assert len(report.subjects) == len(list(learned.parameters()))


# --- Zeros, NaN, batches --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [[1.0, 0.0, -0.5], [0.0, 0.0, 0.0]])
def test_derivatives_are_finite_where_a_gradient_is_zero(
    name: str, dtype: torch.dtype, start: list[float]
) -> None:
    """A coordinate, or the whole problem, at rest from the start; differentiated through f."""
    learned = all_four()[name]
    f = Quadratic(CURVATURE.to(dtype))
    x0 = torch.tensor(start, dtype=dtype, requires_grad=True)
    end = path_of(learned, f, x0, 4)[-1]
    assert torch.isfinite(end).all()
    gradients = torch.autograd.grad(end.sum(), [x0, *learned.parameters()], allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    if name == "rnnprop" and not any(start):
        assert not end.any()  # damped: it stays


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_where_a_problem_comes_to_rest(name: str) -> None:
    """A gradient of exactly 0 after some steps, and back: 0 where |x| < 1."""

    def flat(x: Tensor) -> Tensor:
        return (x.abs() - 1).clamp_min(0).square().sum(-1)

    learned = all_four()[name]
    x0 = torch.tensor([1.01, -1.02, 0.3], dtype=torch.float64, requires_grad=True)
    end = path_of(learned, flat, x0, 12)[-1]
    gradients = torch.autograd.grad(end.sum(), [x0, *learned.parameters()])
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_seen_and_stays_in_its_problem(name: str) -> None:
    learned = all_four()[name]

    def broken(x: Tensor) -> Tensor:
        factor = torch.where(x[..., 0] > 5, float("nan"), 1.0)
        return factor * (CURVATURE * x * x).sum(-1)

    xs = torch.stack([X0, X0 + 10.0])
    end = path_of(learned, broken, xs, 3)[-1]
    assert torch.isnan(end[1]).all()
    torch.testing.assert_close(end[0], path_of(learned, broken, X0, 3)[-1], rtol=1e-13, atol=1e-14)
    update = learned.update(broken)
    run = stopping_index(
        update, update.initial_state(X0 + 10.0), lambda t, s: s[0].sum(), -1e9, throw=False
    )
    assert run.status.name == "DIVERGED"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_batch_is_its_problems_one_by_one(name: str, shape: tuple[int, ...]) -> None:
    learned, f = all_four()[name], quadratic()
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(shape, generator=generator, dtype=torch.float64)
    together = path_of(learned, f, xs, 6)[-1]
    single = [path_of(learned, f, x, 6)[-1] for x in xs.reshape(-1, 3)]
    torch.testing.assert_close(together, torch.stack(single).reshape(shape), rtol=0.0, atol=1e-13)
    update = learned.update(f)
    for piece in update.initial_state(xs)[1:]:
        assert piece.shape[: len(shape)] == shape


@pytest.mark.parametrize("kind", [CoordinateLSTM, RNNprop])
def test_matrix_of_one_problem(kind: Any) -> None:
    """f(X) of shape () for X of shape (2, 2): its norm is over all four."""
    weights = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, -2.0], [0.7, 0.1]], dtype=torch.float64)
    learned = trained(kind)
    matrix = path_of(learned, lambda x: (weights * x * x).sum(), start, 5)[-1]
    vector = path_of(
        learned, lambda x: (weights.reshape(-1) * x * x).sum(-1), start.reshape(-1), 5
    )[-1]
    torch.testing.assert_close(matrix.reshape(-1), vector, rtol=0.0, atol=1e-13)


# --- Types, copies, input -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_of_parameters_and_state_are_apart(
    name: str, weights: torch.dtype, dtype: torch.dtype
) -> None:
    learned = all_four()[name].to(weights)
    reference = path_of(all_four()[name], quadratic(), X0, 5)[-1]
    update = learned.update(Quadratic(CURVATURE.to(dtype)))
    state = update.initial_state(X0.to(dtype))
    for k in range(5):
        state = update(k, state)
    assert {piece.dtype for piece in state} == {dtype}
    torch.testing.assert_close(state[0].double(), reference, rtol=0.0, atol=2e-5)
    state[0].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == weights for p in learned.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="x0 must be dense and of float32 or float64"):
        trained(RNNprop).update(quadratic()).initial_state(X0.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_copies_take_the_same_steps(name: str) -> None:
    learned = all_four()[name]
    for other in (copy.deepcopy(learned), pickle.loads(pickle.dumps(learned))):
        assert repr(other) == repr(learned)
        assert other.options == learned.options
        for ours, theirs in zip(
            path_of(learned, quadratic(), X0, 4), path_of(other, quadratic(), X0, 4), strict=True
        ):
            assert torch.equal(ours, theirs)
    update = copy.deepcopy(learned.update(quadratic()))
    assert torch.equal(
        update(0, update.initial_state(X0))[0], path_of(learned, quadratic(), X0, 1)[1]
    )


def test_own_gradient_of_a_step() -> None:
    """`gradient_at(k, x)` is asked in the place of the gradient of f."""

    class Scaled(Quadratic):
        def gradient_at(self, k: int, x: Tensor) -> Tensor:
            return (k + 1) * self.gradient(x)

    path = path_of(LearnedSchedule([0.1]), Scaled(CURVATURE), X0, 2)
    first = (1 - 0.1 * CURVATURE) * X0
    torch.testing.assert_close(path[2], (1 - 0.2 * CURVATURE) * first, rtol=1e-14, atol=0.0)

    class Flat(Quadratic):
        def gradient_at(self, k: int, x: Tensor) -> Tensor:
            return self.gradient(x).sum(-1, keepdim=True)

    with pytest.raises(ValueError, match=r"objective\.gradient_at must return the shape of x"):
        path_of(LearnedSchedule([0.1]), Flat(CURVATURE), X0, 1)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LearnedSchedule([]), ValueError, "rates must hold at least one"),
        (lambda: LearnedSchedule(0.1), TypeError, "rates must be a list of numbers"),  # type: ignore[arg-type]
        (lambda: LearnedSchedule([0.1, -1.0]), ValueError, r"rates\[1\] must be finite and > 0"),
        (lambda: LearnedSchedule([0.1], every=0), ValueError, "every must be at least 1"),
        (lambda: LearnedSchedule([0.1], momentum=1.0), ValueError, "momentum must be .*< 1"),
        (lambda: LearnedSchedule([0.1], momentum="0"), TypeError, "momentum must be a number"),  # type: ignore[arg-type]
        (lambda: LearnedPreconditioner(0), ValueError, "dim must be at least 1"),
        (lambda: LearnedPreconditioner(2, rank=-1), ValueError, "rank must be at least 1"),
        (lambda: LearnedPreconditioner(2, rate=float("nan")), ValueError, "rate must be finite"),
        (lambda: CoordinateLSTM(0), ValueError, "hidden must be at least 1"),
        (lambda: CoordinateLSTM(4, layers=1.0), TypeError, "layers must be an int"),  # type: ignore[arg-type]
        (lambda: CoordinateLSTM(4, scale=0.0), ValueError, "scale must be finite and > 0"),
        (lambda: CoordinateLSTM(4, log_range=100), ValueError, "log_range must be .*< 80"),
        (lambda: RNNprop(4, alpha=-0.1), ValueError, "alpha must be finite and > 0"),
        (lambda: RNNprop(4, damping=-0.5), ValueError, "damping must be finite and >= 0"),
        (lambda: RNNprop(4, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be .*< 1"),
        (lambda: RNNprop(4, betas=0.9), TypeError, "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: RNNprop(4).update(3), TypeError, "objective must be callable"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_bad_state() -> None:
    f = quadratic()
    with pytest.raises(TypeError, match=r"Start from update\.initial_state\(x0\)"):
        stopping_index(LearnedSchedule([0.1]).update(f), X0, LossValue(f), 0.1)
    update = LearnedPreconditioner(1).update(f)
    with pytest.raises(ValueError, match="is for 1 coordinates"):
        stopping_index(update, update.initial_state(X0), LossValue(f), 0.1)
