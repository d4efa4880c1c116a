"""Fresh batches: signal and decrease on the same one, and what keeps the rate in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import inf
from typing import Any

import pytest
import torch
from online_runs import D, adam_signals, closure_of, leaf, random
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from discrete import SGDOLA, AdamOLA
from discrete.online import OnlineAdaptation
from discrete.online.closures import Randomness
from discrete.online.window import Window

STEPS, BATCH = 300, 40
FIXED = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1e0)


def blobs() -> tuple[Tensor, Tensor]:
    """Three classes in eight dimensions, overlapping a little."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(3, 8, dtype=D, generator=generator)
    labels = torch.randint(3, (400,), generator=generator)
    return middles[labels] + torch.randn(400, 8, dtype=D, generator=generator), labels


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    parts = [nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)]
    return nn.Sequential(*parts).double()


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = STEPS) -> tuple[float, Any]:
    """The loss over all the data at the end, and the optimiser."""
    (x, y), model = blobs(), net()
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.step(closure_of(optimizer, lambda r=rows: cross_entropy(model(x[r]), y[r])))
    with torch.no_grad():
        return float(cross_entropy(model(x), y)), optimizer


@cache
def best(kind: type[Any]) -> tuple[float, list[float]]:
    """The smallest loss of a fixed rate, and the rates that come within a factor of 1.5 of it."""
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    losses = {lr: trained(lambda p, lr=lr: kind(p, lr, **extra))[0] for lr in FIXED}
    least = min(losses.values())
    return least, [lr for lr, loss in losses.items() if loss < 1.5 * least]


@pytest.mark.parametrize("lr", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize(
    ("kind", "fixed"), [(AdamOLA, torch.optim.Adam), (SGDOLA, torch.optim.SGD)]
)
def test_the_rate_finds_the_good_ones(kind: type[Any], fixed: type[Any], lr: float) -> None:
    least, good = best(fixed)
    reached, optimizer = trained(lambda p: kind(p, lr))
    rate = optimizer.history.rates[-1]
    assert min(good) / 10 < rate < 10 * max(good)
    # A factor of 3 for not knowing the rate. A fixed 1e-5 stays above twenty times the best loss.
    assert reached < 3 * least
    assert trained(lambda p: fixed(p, 1e-5))[0] > 10 * least


def test_what_the_guards_keep_off() -> None:
    least, good = best(torch.optim.Adam)
    rates = {}
    for name, options in {
        "guarded": {},
        "own part kept": {"held_out": False},
        "no caution": {"caution": 1.0},
    }.items():
        loss, optimizer = trained(lambda p, o=options: AdamOLA(p, 1e-1, **o))
        rates[name] = optimizer.history.rates[-1]
        # The present gradient agrees with itself, and the rate goes up without end.
        assert (loss > 10 * least) == (name == "own part kept")
    assert rates["own part kept"] > 10 * max(good)
    assert rates["guarded"] < 3 * max(good)
    # A direction with momentum overshoots by itself, and without caution the rate gives way to it.
    assert rates["no caution"] < rates["guarded"] / 3


def test_through_several_steps_it_finds_them_too() -> None:
    least, good = best(torch.optim.Adam)
    loss, optimizer = trained(lambda p: AdamOLA(p, 1e-3, horizon=3))
    assert min(good) / 10 < optimizer.history.rates[-1] < 10 * max(good)
    assert loss < 3 * least


def test_the_printed_form_takes_the_whole_direction() -> None:
    # It has no held-out signal: the same run as on one batch, and the rate grows.
    _, optimizer = trained(lambda p: AdamOLA(p, 1e-2, variant="paper", adapt_rate=1e-4), 60)
    assert optimizer.history.rates[-1] > 5e-2


# --- what the signal is ---------------------------------------------------------------------------


def weighted(x: Tensor, k: int) -> Tensor:
    """The loss of step k."""
    weight = torch.logspace(-1, 1, 5, dtype=D) if k % 2 else torch.logspace(1, -1, 5, dtype=D)
    return (weight * torch.log(torch.cosh(x - k % 2))).sum()


def two_batches(kind: type[Any], **options: Any) -> tuple[OnlineAdaptation, list[Tensor]]:
    """Steps on two losses in turn; the gradients at the start and at the end of the last."""
    x = leaf(random(5, seed=1))
    through_window = options.pop("through_window", False)
    optimizer = kind([x], 0.02, **options)
    if through_window:
        arguments = (optimizer.step_map, kind.buffers, kind.coordinates, optimizer._adapted)
        optimizer._window = Window(1, *arguments)
    seen: list[Tensor] = []

    for k in range(6):

        def closure(k: int = k) -> Tensor:
            optimizer.zero_grad()
            loss = weighted(x, k)
            loss.backward()
            assert x.grad is not None
            seen.append(x.grad.clone())
            return loss

        optimizer.step(closure)
    return optimizer, seen


def test_the_own_part_is_left_out_of_adams_signal() -> None:
    # The signal as documented, from the gradients: without (1 - beta1) g_k in the average.
    optimizer, seen = two_batches(AdamOLA, adapt_rate=1e-300)
    mean = square = torch.zeros(5, dtype=D)
    expected = []
    for k in range(6):
        g, following = seen[2 * k], seen[2 * k + 1]
        older = 0.9 * mean
        mean, square = older + 0.1 * g, 0.999 * square + 0.001 * g * g
        # The first step is not known to be of a fresh batch: there is none before it.
        part = mean if k == 0 else older
        root = (square / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
        d = part / (1 - 0.9 ** (k + 1)) / root
        change = optimizer.history.after[k] - optimizer.history.loss[k]  # type: ignore[operator]
        expected.append(0.02 * float(following @ d) / abs(change))
    assert optimizer.history.signals["lr"] == pytest.approx(expected, rel=1e-10)
    whole, _ = two_batches(AdamOLA, adapt_rate=1e-300, held_out=False)
    gaps = zip(whole.history.signals["lr"][1:], expected[1:], strict=True)
    assert min(abs(a - b) for a, b in gaps) > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_own_part_is_left_out_of_sgds_signal(nesterov: bool) -> None:
    optimizer, seen = two_batches(SGDOLA, adapt_rate=1e-300, momentum=0.8, nesterov=nesterov)
    velocity, expected = torch.zeros(5, dtype=D), []
    for k in range(6):
        g, following = seen[2 * k], seen[2 * k + 1]
        older, velocity = velocity, 0.8 * velocity + g
        d = g + 0.8 * velocity if nesterov else velocity
        if k:
            d = 0.64 * older if nesterov else 0.8 * older
        change = optimizer.history.after[k] - optimizer.history.loss[k]  # type: ignore[operator]
        expected.append(0.02 * float(following @ d) / abs(change))
    assert optimizer.history.signals["lr"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_a_window_the_same_is_left_out(kind: type[Any], nesterov: bool, decay: float) -> None:
    # Over one step the window has to say what the product says.
    options: dict[str, Any] = {"weight_decay": decay, "adapt_rate": 1e-300}
    if kind is SGDOLA:
        options["nesterov"] = nesterov
    elif decay:
        options["decoupled_weight_decay"] = nesterov
    plain, _ = two_batches(kind, **options)
    window, _ = two_batches(kind, through_window=True, **options)
    assert plain._window is None
    assert window._window is not None
    assert plain.history.signals["lr"] == pytest.approx(window.history.signals["lr"], rel=1e-10)


@pytest.mark.parametrize("horizon", [2, 4])
def test_through_several_steps_it_is_left_out_of_the_newest(horizon: int) -> None:
    optimizer, _ = two_batches(AdamOLA, adapt_rate=1e-300, horizon=horizon)
    losses = [lambda x, k=k: weighted(x, k) for k in range(6)]
    options = {"lr": [0.02] * 6, "betas": (0.9, 0.999)}
    for held_out in (True, False):
        given = [{**options, "held_out": held_out}]
        expected = adam_signals(losses, [random(5, seed=1)], given, 6, horizon)["lr"]
        same = optimizer.history.signals["lr"][-1] == pytest.approx(expected, rel=1e-10)
        assert same == held_out


def test_losses_of_one_step_are_of_one_batch() -> None:
    for horizon in (1, 3):
        _, optimizer = trained(lambda p, h=horizon: AdamOLA(p, 1e-12, horizon=h), 20)
        history = optimizer.history
        for before, after in zip(history.loss, history.after, strict=True):
            assert after == pytest.approx(before, rel=1e-6)
        assert len(set(history.loss)) == 20


def test_a_fixed_batch_is_known_as_one() -> None:
    # Then nothing is left out, and betas may be adapted.
    x = leaf(random(5, seed=1))
    found = []
    for held_out in (True, False):
        x = leaf(random(5, seed=1))
        optimizer = AdamOLA([x], 0.02, adapt=("lr", "beta1"), held_out=held_out)
        closure = closure_of(optimizer, lambda x=x: torch.cosh(x).sum())
        for _ in range(10):
            optimizer.step(closure)
        found.append(optimizer.history)
    assert found[0] == found[1]


# --- random numbers -------------------------------------------------------------------------------


def test_dropout_shows_both_evaluations_the_same_mask(device: torch.device) -> None:
    (x, y), model = blobs(), net(dropout=0.5).to(device)
    x, y = x.to(device), y.to(device)
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer = AdamOLA(model.parameters(), 1e-12)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, lambda: cross_entropy(model(x), y)))
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(masks[0], masks[2])
    for before, after in zip(optimizer.history.loss, optimizer.history.after, strict=True):
        assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"horizon": 3}])
def test_the_generator_ends_as_after_one_evaluation(
    options: dict[str, Any], device: torch.device
) -> None:
    (x, y), losses = blobs(), []
    x, y = x.to(device), y.to(device)
    states = []
    for make in (torch.optim.Adam, lambda p, lr: AdamOLA(p, lr, adapt_rate=0.0, **options)):
        model = net(dropout=0.5).to(device)
        optimizer = make(model.parameters(), 1e-3)
        torch.manual_seed(5)
        losses.append(
            [
                float(
                    optimizer.step(
                        closure_of(optimizer, lambda m=model: cross_entropy(m(x), y))
                    ).detach()
                )
                for _ in range(6)
            ]
        )
        states.append(Randomness(list(model.parameters()))._before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][place], states[1][place]) for place in states[0])


def test_the_generator_comes_back_after_an_error() -> None:
    x, calls = leaf([1.0]), []
    optimizer = AdamOLA([x], 0.1)

    def loss() -> Tensor:
        calls.append(torch.rand(()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x.square().sum()

    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(optimizer, loss))
    assert torch.equal(calls[0], calls[1])
    following = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), calls[0])
    assert torch.equal(torch.rand(()), following)


# --- how often the closure is called --------------------------------------------------------------


def counted(steps: int, **options: Any) -> list[int]:
    """Calls of the closure in each step."""
    x, calls = leaf(random(4, seed=1)), [0]
    optimizer = AdamOLA([x], 1e-3, **options)

    def loss() -> Tensor:
        calls[-1] += 1
        return torch.cosh(x).sum()

    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)
        calls.append(0)
    return calls[:-1]


def test_calls_of_the_closure() -> None:
    assert counted(6) == [2] * 6
    for every in (2, 3, 5):
        assert counted(10 * every, every=every) == ([1] * (every - 1) + [2]) * 10
    # Once a step; at the first there is no evaluation yet, and the second and every hundredth check
    # that the closure is what it is said to be.
    expected = [2, 2] + [1] * 97 + [2] + [1] * 20
    assert counted(120, deterministic=True) == expected
    assert counted(120, deterministic=True, horizon=2) == expected
    assert counted(120, deterministic=True, every=4) == expected


def test_with_every_only_some_steps_are_looked_at() -> None:
    _, optimizer = trained(lambda p: AdamOLA(p, 1e-3, every=4), 40)
    history = optimizer.history
    assert [action == "not looked at" for action in history.action] == ([True] * 3 + [False]) * 10
    assert [after is None for after in history.after] == ([True] * 3 + [False]) * 10
    assert [s is None for s in history.signals["lr"]] == ([True] * 3 + [False]) * 10
    moved = [a != b for a, b in zip([1e-3, *history.rates], history.rates, strict=False)]
    assert moved == ([False] * 3 + [True]) * 10


def test_every_still_finds_the_good_rates() -> None:
    least, good = best(torch.optim.Adam)
    loss, optimizer = trained(lambda p: AdamOLA(p, 1e-3, every=2))
    assert min(good) / 10 < optimizer.history.rates[-1] < 10 * max(good)
    assert loss < 4 * least


# --- what cannot be done --------------------------------------------------------------------------


def stochastic(optimizer: OnlineAdaptation, x: Tensor) -> Callable[[], Tensor]:
    calls = [0.0]

    def loss() -> Tensor:
        calls[0] += 1.0
        return (x - 0.1 * calls[0]).square().sum()

    return closure_of(optimizer, loss)


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_closure_that_is_not_deterministic_is_told(horizon: int) -> None:
    x = leaf([1.0, 2.0])
    optimizer = AdamOLA([x], 0.01, deterministic=True, horizon=horizon)
    closure = stochastic(optimizer, x)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="it is not deterministic"):
        optimizer.step(closure)


def test_a_closure_that_turns_stochastic_is_told_in_time() -> None:
    x, noise = leaf([1.0, 2.0]), 0.0
    optimizer = AdamOLA([x], 0.01, deterministic=True)
    closure = closure_of(
        optimizer, lambda: (x - noise * torch.rand(2, dtype=D)).square().sum() + 1.0
    )
    for _ in range(60):
        optimizer.step(closure)
    noise = 0.5
    with pytest.raises(RuntimeError, match="it is not deterministic"):
        [optimizer.step(closure) for _ in range(40)]
    assert len(optimizer.history) == 99


@pytest.mark.parametrize("deterministic", [True, False])
def test_parameters_may_be_changed_between_the_steps(deterministic: bool) -> None:
    # A projection, in the second step, too, which is one that checks.
    x = leaf([1.0, 2.0])
    optimizer = AdamOLA([x], 0.01, deterministic=deterministic)
    closure = closure_of(optimizer, lambda: x.square().sum())
    for k in range(5):
        optimizer.step(closure)
        with torch.no_grad():
            x.clamp_(min=1.5 - 0.1 * k)
        reached = x.detach().square().sum().item()
    optimizer.step(closure)
    # The loss that was seen is that of the changed parameters.
    assert optimizer.history.loss[-1] == reached


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamOLA(p, 0.01, adapt=("lr", "beta1")), "beta1 cannot be adapted"),
        (lambda p: AdamOLA(p, 0.01, adapt=("beta1", "beta2")), "beta1, beta2 cannot be adapted"),
        (lambda p: SGDOLA(p, 0.01, adapt=("momentum",)), "momentum cannot be adapted"),
        (lambda p: SGDOLA(p, 0.01, momentum=0.0), "SGDOLA without momentum cannot"),
        (lambda p: AdamOLA(p, 0.01, betas=(0.0, 0.9)), "AdamOLA without momentum cannot"),
    ],
)
def test_what_has_no_signal_on_fresh_batches_is_told(
    make: Callable[[Any], OnlineAdaptation], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(make, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamOLA(p, 0.01, adapt=("lr", "beta1"), held_out=False),
        lambda p: SGDOLA(p, 0.01, momentum=0.0, held_out=False),
        lambda p: SGDOLA(p, 0.01, momentum=0.0, adapt_rate=0.0),
        lambda p: AdamOLA(p, 0.01, adapt=("lr", "weight_decay"), weight_decay=0.1),
    ],
)
def test_and_what_is_asked_for_is_done(make: Callable[[Any], OnlineAdaptation]) -> None:
    loss, optimizer = trained(make, 10)
    assert loss < inf
    assert len(optimizer.history) == 10
