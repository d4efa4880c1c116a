"""The contract of flows with more states than the position."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from augmented import AUGMENTED, TIME, UNPICKLABLE, Pieces, plain, points, problem, state_of
from torch import Tensor, nn

from ode_stopping.flows import (
    AdamFlow,
    Flow,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    WithIntegrals,
)

every_flow = pytest.mark.parametrize("make", AUGMENTED.values(), ids=AUGMENTED.keys())


def assert_same(first: Pieces, second: Pieces) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_flow
def test_velocity_has_the_state_s_structure(make: Callable[[], Flow]) -> None:
    flow = make()
    state = state_of(flow)
    velocity = flow(TIME, state)
    assert isinstance(velocity, tuple)
    assert [v.shape for v in velocity] == [s.shape for s in state]
    assert all(v.dtype == torch.float64 and bool((v != 0).all()) for v in velocity)


@pytest.mark.parametrize("name", [name for name in AUGMENTED if "integrals" not in name])
def test_batches_equal_loops(name: str) -> None:  # an integral is one number for all samples
    flow = AUGMENTED[name]()
    state = state_of(flow, 3)
    velocity = flow(TIME, state)
    for i in range(3):
        row = tuple(piece[i] if piece.ndim else piece for piece in state)
        for all_of, one in zip(velocity, flow(TIME, row), strict=True):
            torch.testing.assert_close(
                all_of[i] if all_of.ndim else all_of, one, rtol=1e-13, atol=1e-14
            )


@every_flow
def test_autograd_modes(make: Callable[[], Flow]) -> None:
    flow = make()
    state = state_of(flow)
    with torch.no_grad():
        quiet = flow(TIME, state)
        loud_state = tuple(piece.clone().requires_grad_() for piece in state)
        assert not any(v.requires_grad for v in (*quiet, *flow(TIME, loud_state)))
    loud = flow(TIME, loud_state)
    assert all(v.requires_grad for v in loud)
    assert_same(tuple(v.detach() for v in loud), quiet)
    # Nothing but the user's own leaves may ask for a gradient.
    learnable = any(p.requires_grad for p in flow.parameters())
    assert any(v.requires_grad for v in flow(TIME, state)) == learnable
    assert not flow.position_velocity(TIME, state).requires_grad or learnable


@every_flow
def test_derivatives_to_state_time_and_parameters(make: Callable[[], Flow]) -> None:
    flow = make()
    named, state = dict(flow.named_parameters()), state_of(flow)
    inputs = tuple(v.detach().clone().requires_grad_() for v in (TIME, *state, *named.values()))

    def velocity(t: Tensor, *rest: Tensor) -> Pieces:
        pieces, parameters = rest[: len(state)], rest[len(state) :]
        swapped = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(flow, swapped, (t, pieces))

    assert torch.autograd.gradcheck(velocity, inputs)
    assert torch.autograd.gradgradcheck(velocity, inputs)


@every_flow
def test_float32_is_kept_with_float64_parameters(make: Callable[[], Flow]) -> None:
    # Data of a problem have to be converted; parameters of the dynamics follow the state.
    flow, reference = make(), make()
    for module in flow.modules():
        if isinstance(module, GradientFlow) and isinstance(module.objective, nn.Module):
            module.objective.float()
    exact_state = state_of(reference)
    state = tuple(piece.float() for piece in exact_state)
    for t in (TIME, TIME.float()):
        velocity = flow(t, state)
        assert {v.dtype for v in velocity} == {torch.float32}
        assert flow.position_velocity(t, state).dtype == torch.float32
        for own, exact in zip(velocity, reference(TIME, exact_state), strict=True):
            torch.testing.assert_close(own.double(), exact, rtol=2e-5, atol=2e-5)


@every_flow
def test_copies_compute_the_same(make: Callable[[], Flow]) -> None:
    flow = make()
    state, copied = state_of(flow), copy.deepcopy(flow)
    assert_same(copied(TIME, state), flow(TIME, state))
    for mine, other in zip(flow.parameters(), copied.parameters(), strict=True):
        assert mine is not other


@pytest.mark.parametrize("name", sorted(set(AUGMENTED) - UNPICKLABLE))
def test_pickled_and_loaded_state_dict(name: str) -> None:
    flow = AUGMENTED[name]()
    state = state_of(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)
    store = io.BytesIO()
    torch.save(flow, store)
    store.seek(0)
    assert_same(torch.load(store, weights_only=False)(TIME, state), flow(TIME, state))
    other = AUGMENTED[name]()
    other.load_state_dict(flow.state_dict())
    assert_same(other(TIME, state), flow(TIME, state))


@every_flow
def test_position_comes_first(make: Callable[[], Flow]) -> None:
    flow, x = make(), points()
    options = {"t0": 0.5} if isinstance(flow, InertialHessianFlow) else {}
    start = flow.initial_state(x, **options)
    state = state_of(flow)
    assert [s.shape for s in start] == [s.shape for s in state]
    assert [s.dtype for s in start] == [s.dtype for s in state]
    assert start[0] is x
    assert flow.position(state) is state[0]
    assert torch.equal(flow.position_velocity(TIME, state), flow(TIME, state)[0])


@every_flow
def test_other_states_are_refused(make: Callable[[], Flow]) -> None:
    flow = make()
    state = state_of(flow)
    for call in (flow, flow.position_velocity):
        with pytest.raises(TypeError, match=r"start from flow\.initial_state\(x0\)"):
            call(TIME, points())
        with pytest.raises(TypeError, match="tuple of 1"):
            call(TIME, state[:1])
    if not isinstance(flow, WithIntegrals):
        with pytest.raises(TypeError, match=f"{type(flow).__name__} is a tuple"):
            flow(TIME, (*state, points()))


# --- starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heavy-ball", "nesterov", "strongly-convex"])
def test_inertial_flows_start_at_rest_or_with_a_velocity(name: str) -> None:
    flow, x, v = AUGMENTED[name](), points(2), points(2, seed=1)
    assert_same(flow.initial_state(x), (x, torch.zeros_like(x)))
    assert flow.initial_state(x, velocity=v)[1] is v
    assert torch.equal(flow.initial_state(x, velocity=v.float())[1], v.float().double())


@pytest.mark.parametrize("name", ["heavy-ball", "high-resolution", "hessian"])
def test_a_velocity_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"velocity must have the shape of x0, \(2, 3\)"):
        AUGMENTED[name]().initial_state(points(2), velocity=points())


def test_adaptive_starts_are_moments_of_a_constant_gradient() -> None:
    """Against the solution of m' = (g - m)/tau from 0, at the age."""
    x, f = points(), problem()
    g = f.gradient(x)
    for age in (0.0, 1e-9, 0.2, math.inf):
        flow = AdamFlow(f, tau1=0.3, tau2=0.7)
        reached = [-math.expm1(-age / tau) for tau in (0.3, 0.7)]
        start = flow.initial_state(x, age=age)
        moments = (reached[0] * g, reached[1] * g * g)
        expected = (x, *moments, *torch.tensor(reached, dtype=torch.float64))
        for own, other in zip(start, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-14, atol=0)
        own = RMSPropFlow(f, tau=0.7).initial_state(x, age=age)
        torch.testing.assert_close(own[1], reached[1] * g * g, rtol=1e-14, atol=0)
    assert bool((AdamFlow(f, tau1=1, tau2=1).initial_state(x)[1] == 0).all())


@pytest.mark.parametrize("age", [-1.0, math.nan])
def test_bad_ages(age: float) -> None:
    with pytest.raises(ValueError, match="age must be >= 0"):
        RMSPropFlow(plain, tau=0.3).initial_state(points(), age=age)


def test_a_start_of_finite_age_needs_constant_times() -> None:
    flow = AdamFlow(plain, tau1=0.3, tau2=lambda t: 0.5 + t)
    for age in (0.0, math.inf):
        flow.initial_state(points(), age=age)
    with pytest.raises(TypeError, match="tau2 must be a constant here; got the schedule <lambda>"):
        flow.initial_state(points(), age=0.1)


def test_a_start_carries_derivatives_to_the_time_constants() -> None:
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    flow = AdamFlow(problem(), tau1=tau, tau2=0.7)

    def moments(tau: Tensor, x: Tensor) -> Pieces:
        flow.tau1 = tau
        return flow.initial_state(x, age=0.2)

    assert torch.autograd.gradcheck(moments, (tau, points().requires_grad_()))


def test_adam_starts_at_the_limit_of_its_quotient() -> None:
    """m/c1 and v/c2 are 0/0 at age 0; the limits are g and g^2."""
    f, x = problem(), points()
    flow = AdamFlow(f, tau1=0.3, tau2=0.6, eps=0.01)
    g = f.gradient(x)
    at_zero = flow(TIME, flow.initial_state(x))
    torch.testing.assert_close(at_zero[0], -g / (g.abs() + 0.01), rtol=1e-14, atol=0)
    nearby = flow(TIME, flow.initial_state(x, age=1e-9))
    torch.testing.assert_close(at_zero, nearby, rtol=1e-8, atol=1e-8)
    assert torch.equal(flow.position_velocity(TIME, flow.initial_state(x)), at_zero[0])


def test_an_element_without_a_gradient_stays_without_nan() -> None:
    """sqrt(v) at v = 0 has the derivative 0 here, so that 0/eps stays 0 backward as well."""
    flow = AdamFlow(lambda x: x[..., 0] ** 2, tau1=0.3, tau2=0.6)
    state = tuple(s.detach().requires_grad_() for s in flow.initial_state(points(), age=0.1))
    velocity = flow(TIME, state)
    assert bool((velocity[0][1:] == 0).all())
    gradients = torch.autograd.grad(velocity[0].sum(), state[1:])
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


# --- whose tensors are learnable ------------------------------------------------------------------

Made = Callable[[object], Flow]
HYPERPARAMETERS: dict[str, tuple[Made, str]] = {
    "HeavyBallFlow.damping": (lambda v: HeavyBallFlow(problem(), damping=v), "damping"),
    "StronglyConvex.mu": (lambda v: StronglyConvexNesterovFlow(problem(), mu=v), "mu"),
    "NesterovFlow.alpha": (lambda v: NesterovFlow(problem(), alpha=v), "alpha"),
    "VanishingDamping.alpha": (
        lambda v: HeavyBallFlow(problem(), damping=VanishingDamping(v)),
        "alpha",
    ),
    "HighResolutionFlow.mu": (lambda v: HighResolutionFlow(problem(), mu=v, s=0.1), "mu"),
    "HighResolutionFlow.s": (lambda v: HighResolutionFlow(problem(), mu=0.1, s=v), "s"),
    "InertialHessianFlow.damping": (
        lambda v: InertialHessianFlow(problem(), damping=v, beta=0.1, gamma=1.0),
        "damping",
    ),
    "InertialHessianFlow.beta": (
        lambda v: InertialHessianFlow(problem(), damping=1.0, beta=v, gamma=1.0),
        "beta",
    ),
    "InertialHessianFlow.gamma": (
        lambda v: InertialHessianFlow(problem(), damping=1.0, beta=0.1, gamma=v),
        "gamma",
    ),
    "RMSPropFlow.tau": (lambda v: RMSPropFlow(problem(), tau=v), "tau"),
    "RMSPropFlow.eps": (lambda v: RMSPropFlow(problem(), tau=1.0, eps=v), "eps"),
    "RMSPropFlow.inside": (lambda v: RMSPropFlow(problem(), tau=1.0, inside=v), "inside"),
    "AdamFlow.tau1": (lambda v: AdamFlow(problem(), tau1=v, tau2=1.0), "tau1"),
    "AdamFlow.tau2": (lambda v: AdamFlow(problem(), tau1=1.0, tau2=v), "tau2"),
    "AdamFlow.eps": (lambda v: AdamFlow(problem(), tau1=1.0, tau2=1.0, eps=v), "eps"),
    "AdamFlow.inside": (lambda v: AdamFlow(problem(), tau1=1.0, tau2=1.0, inside=v), "inside"),
}
every_hyperparameter = pytest.mark.parametrize("name", HYPERPARAMETERS)
CLOSED = {"damping", "beta", "eps", "inside"}


@every_hyperparameter
def test_the_user_s_tensor_gets_the_gradient(name: str) -> None:
    make, _ = HYPERPARAMETERS[name]
    leaf = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    flow = make(leaf)
    assert list(flow.parameters()) == []
    first, *others = (v.sum() for v in flow(TIME, state_of(flow)))
    (first + 2 * sum(others)).backward()
    assert leaf.grad is not None
    assert float(leaf.grad) != 0
    fixed = make(0.5)
    assert not any(v.requires_grad for v in fixed(TIME, state_of(fixed)))
    assert_same(fixed(TIME, state_of(fixed)), tuple(v.detach() for v in flow(TIME, state_of(flow))))


@every_hyperparameter
def test_bad_hyperparameters_are_named(name: str) -> None:
    make, argument = HYPERPARAMETERS[name]
    for bad, error in (
        (-0.1, ValueError),
        (torch.tensor(-0.1), ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (torch.ones(2), ValueError),
        (torch.tensor(1), TypeError),
        ("0.5", TypeError),
        (True, TypeError),
        (None, TypeError),
        (nn.Module, TypeError),
    ):
        with pytest.raises(error, match=rf"^{argument} must"):
            make(bad)
    if argument in CLOSED:
        make(0.0)
    else:
        with pytest.raises(ValueError, match=f"{argument} must be > 0; got 0"):
            make(0.0)


@pytest.mark.parametrize("argument", ["mu", "s"])
def test_high_resolution_takes_no_schedules(argument: str) -> None:
    """s(t) would need beta', which the equation does not have."""
    given = {"mu": 0.5, "s": 0.1, argument: lambda t: 1 / t}
    with pytest.raises(TypeError, match=f"{argument} must be a constant here"):
        HighResolutionFlow(problem(), **given)


def test_objectives_are_checked_and_registered() -> None:
    with pytest.raises(TypeError, match="objective must be callable"):
        HeavyBallFlow(1.0, damping=0.5)
    net = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    names = set(dict(HeavyBallFlow(net, damping=0.5).named_parameters()))
    assert names == {"objective.0.weight", "objective.0.bias"}
