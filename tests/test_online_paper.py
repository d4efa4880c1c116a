"""`variant="paper"` is Algorithm 2 as printed, with its traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from online_runs import SVM, D, algorithm2, closure_of, gap, leaf, run

from discrete import AdamOLA
from discrete.online.rules import Decision, Observation, PaperRule

STEPS = 200
# alpha_0, eta, eps_desc. With eps_desc = 0 the rate follows rounding once f has converged (Df in
# the denominator), and 1e-14 in alpha_0 grows to 1e-5 within 200 steps; none of these does that.
SETTINGS = [
    (1e-3, 1e-6, 1e-2),
    (1e-2, 1e-4, 1e-2),
    (1e-1, 1e-4, 1e-5),
    (1e0, 1e-4, 1e-5),
    (1e0, 1e-6, 0.0),
    (1e-1, 1e-2, 1e-5),  # alpha < 0
    (5e-1, 1e0, 0.0),  # alpha < 0 after the first step
]
every_setting = pytest.mark.parametrize(("alpha", "eta", "threshold"), SETTINGS)


def paper(
    pieces: list[torch.Tensor], alpha: float, eta: float, threshold: float, **options: bool
) -> AdamOLA:
    return AdamOLA(pieces, alpha, (0.9, 0.999), 1e-8, eta, threshold, "paper", **options)


@every_setting
def test_iterates_and_rates_are_those_of_numpy(alpha: float, eta: float, threshold: float) -> None:
    problem, w = SVM(), leaf(SVM().start)
    optimizer = paper([w], alpha, eta, threshold)
    mine = run(optimizer, problem, [w], STEPS)
    other = algorithm2(problem, alpha, eta, threshold, STEPS)
    assert gap(mine, other) < 1e-12
    assert optimizer.history.rates == list(mine[1])


def test_the_settings_show_every_branch() -> None:
    seen: set[str] = set()
    negative = 0
    for alpha, eta, threshold in SETTINGS:
        w = leaf(SVM().start)
        optimizer = paper([w], alpha, eta, threshold)
        rates = run(optimizer, SVM(), [w], 100)[1]
        seen |= set(optimizer.history.action)
        negative += rates.min() < 0
    assert seen == {"larger", "smaller", "no decrease"}
    assert negative == 2


@every_setting
def test_deterministic_changes_no_number(alpha: float, eta: float, threshold: float) -> None:
    plain, single = leaf(SVM().start), leaf(SVM().start)
    # Past the hundredth step, which evaluates once more.
    twice = run(paper([plain], alpha, eta, threshold), SVM(), [plain], 110)
    once = run(paper([single], alpha, eta, threshold, deterministic=True), SVM(), [single], 110)
    assert np.array_equal(once[0], twice[0])
    assert np.array_equal(once[1], twice[1])


@pytest.mark.parametrize("sizes", [(2, 4), (1, 1, 3, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_many_tensors_are_one(sizes: tuple[int, ...], groups: int, device: torch.device) -> None:
    alpha, eta, threshold = SETTINGS[1]
    start = torch.tensor(SVM().start, dtype=D, device=device)
    pieces = [leaf(piece) for piece in start.split(list(sizes))]
    given = [{"params": pieces[:1]}, {"params": pieces[1:]}] if groups == 2 else pieces
    optimizer = AdamOLA(given, alpha, adapt_rate=eta, descent_threshold=threshold, variant="paper")
    closure = closure_of(optimizer, lambda: SVM()(*pieces))
    for _ in range(60):
        optimizer.step(closure)
    iterates, rates = algorithm2(SVM(), alpha, eta, threshold, 60)
    there = torch.cat([p.detach() for p in pieces]).cpu().numpy()
    assert abs(there - iterates[-1]).max() < 1e-12 * abs(iterates[-1]).max()
    for trace in optimizer.history.values["lr"]:
        assert abs(np.array(trace) - rates).max() < 1e-12 * rates.max()
    assert len(optimizer.history.values["lr"]) == groups


class WrongSign(PaperRule):
    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        decision = super().decide(derivatives, seen)
        return decision._replace(moves={n: -move for n, move in decision.moves.items()})


class ReferenceStays(PaperRule):
    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        reference = seen.before if self.reference is None else self.reference
        decision = super().decide(derivatives, seen)
        self.reference = reference
        return decision


class NoTest(PaperRule):
    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        self.reference = float("inf")
        return super().decide(derivatives, seen)


class OlderChange(PaperRule):
    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        before = getattr(self, "older", seen)
        self.older = seen
        return super().decide(derivatives, seen._replace(before=seen.after - before.change))


class NotCounted(PaperRule):
    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        decision = super().decide(derivatives, seen)
        self.updates = 0
        return decision


@pytest.mark.parametrize("planted", [WrongSign, ReferenceStays, NoTest, OlderChange, NotCounted])
def test_planted_errors_are_caught(planted: type[PaperRule]) -> None:
    found = []
    for alpha, eta, threshold in SETTINGS[1:4]:
        w = leaf(SVM().start)
        optimizer = paper([w], alpha, eta, threshold)
        optimizer.rule = planted(threshold)
        mine = run(optimizer, SVM(), [w], 100)
        found.append(gap(mine, algorithm2(SVM(), alpha, eta, threshold, 100)))
    assert min(found) > 1e-5, found


def test_equal_losses_move_nothing_but_count() -> None:
    rule = PaperRule(0.0)
    rule.decide({"lr": -2.0}, Observation(3.0, 2.0, 0.0))
    assert (rule.reference, rule.updates) == (2.0, 1)
    # f_ref - f > 0, and Df = 0: no quotient, but f_ref moves and the update is counted.
    decision = rule.decide({"lr": -2.0}, Observation(1.0, 1.0, 0.0))
    assert (decision.action, decision.moves) == ("no signal", {})
    assert (rule.reference, rule.updates) == (1.0, 2)


def test_the_rate_jumps_from_a_tiny_one_and_turns_negative() -> None:
    # The documented traps. dN/d alpha = -1/alpha nearly for small steps: eta/alpha is added.
    w = leaf(SVM().start)
    rates = run(paper([w], 1e-5, 1e-2, 1e-5), SVM(), [w], 5)[1]
    assert rates[0] == pytest.approx(1e-2 / 1e-5, rel=0.01)
    w = leaf(SVM().start)
    rates = run(paper([w], *SETTINGS[-1]), SVM(), [w], 50)[1]
    assert (rates < 0).all()
    assert SVM().value(w.detach().numpy()) > 1e3 * SVM().value(SVM().start)
    for lr in (1e-5, 0.5):
        w = leaf(SVM().start)
        rates = run(AdamOLA([w], lr), SVM(), [w], 50)[1]
        assert (rates > 0).all()
        assert (rates[1:] < 1.2 * rates[:-1]).all()
        assert SVM().value(w.detach().numpy()) < SVM().value(SVM().start)


def test_a_loss_that_is_not_finite_is_only_recorded() -> None:
    w = leaf([0.5])
    optimizer = paper([w], 10.0, 1e-3, 0.0)
    closure = closure_of(optimizer, lambda: -torch.log(1 - w.square()).sum())
    for _ in range(3):
        optimizer.step(closure)
    assert not np.isfinite(optimizer.history.after[0] or 0.0)
    assert optimizer.history.action == ["no decrease"] * 3
    assert optimizer.history.rates == [10.0] * 3


def test_the_printed_form_goes_through_several_steps_too() -> None:
    # -dN/d alpha by theta itself: that by log alpha over alpha, while nothing has moved.
    signals: dict[str, list[float | None]] = {}
    for variant in ("paper", "guarded"):
        w = leaf(SVM().start)
        optimizer = AdamOLA([w], 1e-2, adapt_rate=1e-300, variant=variant, horizon=3)
        run(optimizer, SVM(), [w], 5)
        signals[variant] = optimizer.history.signals["lr"]
    for printed, relative in zip(signals["paper"], signals["guarded"], strict=True):
        assert printed is not None
        assert relative is not None
        assert 1e-2 * printed == pytest.approx(relative, rel=1e-12)
