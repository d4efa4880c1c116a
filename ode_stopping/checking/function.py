"""`check_gradient`: the gradient of any function, by whatever library, against differences."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from math import inf, isfinite, nan, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..core.leaves import LeafSet
from ..core.names import names_of
from ..core.status import GradientError, Status
from ..core.substitution import Substitution
from ..core.validation import require_callable, require_count
from .differences import (
    compared,
    difference_slopes,
    gradients_of,
    largest_step,
    rounding_of,
    widened,
)
from .ladder import measure_noise
from .quiet import listening, quiet
from .report import GradientReport
from .subjects import Call, Directions, Subject, chosen_directions

__all__ = ["check_gradient"]

# What is allowed of a gradient whose method promises nothing: far less than an error of .1 %.
_PROMISE = 1e-4
# ... and what the digits of single precision allow.
_PROMISE_PER_ROOT_EPS = 3.0
# Rounding of a value of f, in units of eps, that is always reckoned with.
_ROUNDING = 1.0
# Noise relative to the slope beyond which longer first steps would tell of another function.
_NOISIEST = 1e-5
# Ratio of the lengths of two meshes: where f moves by a multiple of the unit of its rounding from
# one value to the next, the errors are regular, and one mesh does not see them.
_IRREGULAR = 1.618


def check_gradient(
    f: Callable[..., Any],
    params: Iterable[Tensor],
    *,
    rtol: float | None = None,
    directions: int = 3,
    seed: int = 0,
) -> GradientReport:
    """Compare the gradient of any function by autograd with differences, leaf by leaf.

    For gradients of other libraries, adjoints and custom `autograd.Function`s. Along random
    directions in every tensor, f is evaluated on a ladder of step sizes; central differences give
    the slope, the two sides tell a kink, and |f(p + h d) - f(p) - h df.d| falls as h^2 where the
    gradient is right (the order of the Taylor remainder). Step sizes follow from the noise of f,
    which is measured; there is none to choose. What is closer to the differences than `rtol`, and
    three times what they are uncertain by, is right, as long as an error of .1 % would have been
    seen; see `GradientReport.verdict`.

    Cost: one gradient, 20 to 100 values of f for its noise, and 6 to 16 for every tensor and
    direction; a single number has one direction. Nothing of the user's is changed, not for a
    moment: f() sees other values in the place of the tensors, f(*params) is given copies.

    Args:
        f: f() -> 0-d tensor, a function that uses `params`; or f(*params) -> 0-d tensor, where it
            cannot be called without arguments. It has to give the same value each time: an f with
            randomness is found noisy.
        params: The tensors, which require grad.
        rtol: Relative error that is allowed of the gradient. Default: 1e-4, or 3 sqrt(eps) of the
            coarsest dtype among f's value and the tensors where that is more (1e-3 in float32).
        directions: Random directions a tensor.
        seed: Seed of the directions.

    Returns:
        The report, with the value of f as `.time` and nan as `.rate`. A tensor of which torch can
        give f no other value (a compiled function's) is not judged, and its findings say so: give
        it to f as an argument. A GradientError in f's backward pass has failed, with its reason.

    Raises:
        TypeError, ValueError: Bad input: f is not called in either way; it returns something else
            than a finite real 0-d tensor; a tensor is listed twice, is not real and floating, or
            does not require grad.
    """
    require_callable(f, name="f", call="() -> 0-d tensor")
    tensors = _checked_params(params)
    require_count(directions, name="directions")
    if rtol is not None and not (isinstance(rtol, int | float) and 0 < rtol < 1):
        raise ValueError(f"rtol must be a number between 0 and 1, or None; got {rtol!r}")
    as_arguments = _takes_arguments(f, tensors)
    names = names_of(tensors, {"f": f}, tensors)
    call = Call((), True, 0.0, 0.0)
    if as_arguments:
        call = Call(tuple(p.detach().clone().requires_grad_() for p in tensors), True, 0.0, 0.0)
        tensors = list(call.pieces)
    kind = "x0" if as_arguments else "leaf"
    pairs = zip(names, tensors, strict=True)
    subjects = [Subject(name, kind, index, p) for index, (name, p) in enumerate(pairs)]
    with torch.enable_grad():
        return _checked(f, call, subjects, rtol, directions, seed)


def _checked(
    f: Callable[..., Any],
    call: Call,
    subjects: list[Subject],
    rtol: float | None,
    directions: int,
    seed: int,
) -> GradientReport:
    calls, error = 0, ""
    gradients: list[Tensor] = []

    def evaluate(at: Call) -> Tensor:
        nonlocal calls
        calls += 1
        # f may differentiate to its arguments inside.
        return _checked_value(f(*(p.detach().requires_grad_() for p in at.pieces)))

    def solve(at: Call) -> tuple[Status, float]:
        number = float(evaluate(at).detach())
        return (Status.REACHED if isfinite(number) else Status.DIVERGED), number

    with listening() as warned:
        value = _checked_value(f(*call.pieces))
        at = float(value.detach())
        if not isfinite(at):
            raise ValueError(f"there is no gradient to check: f is {at}")
        try:
            if value.requires_grad:
                gradients = gradients_of(value, subjects)
            else:
                gradients = [torch.zeros_like(subject.tensor) for subject in subjects]
                warned.append("the value of f does not require grad: a gradient of zero")
        except GradientError as refused:
            error = f"{type(refused).__name__}: {refused}"
    names = tuple(subject.name for subject in subjects)
    if error:
        return GradientReport(
            "f", "autograd", at, nan, (), names, error=error, warnings=tuple(warned)
        )
    eps = max(torch.finfo(t.dtype).eps for t in (value, *(s.tensor for s in subjects)))
    promise = max(_PROMISE, _PROMISE_PER_ROOT_EPS * sqrt(eps)) if rtol is None else float(rtol)
    chosen = chosen_directions(subjects, directions, seed)
    with quiet():
        noise, largest = _noise(lambda step: _moved_together(evaluate, call, chosen, step), at, eps)
        findings = compared(
            widened(chosen, gradients, noise, promise),
            gradients,
            lambda subject, moves, gradient: difference_slopes(
                call,
                subject,
                moves,
                gradient,
                solve,
                at=at,
                noise=noise,
                promise=promise,
                largest=largest,
            ),
            promise=promise,
            least=rounding_of(at, value.dtype),
        )
    return GradientReport(
        "f", "autograd", at, nan, tuple(findings), names, warnings=tuple(warned), solves=calls
    )


def _noise(function: Callable[[float], float | None], at: float, eps: float) -> tuple[float, float]:
    """Error of one value of f, and the first step of a ladder that suits it."""
    length, floor = largest_step(eps), _ROUNDING * eps * abs(at)
    noise, far = 0.0, length
    while noise == 0.0 and far < 1.0:
        noise = max(measure_noise(function, h) for h in (far, _IRREGULAR * far))
        far *= 4.0
    if noise > floor:
        # Kinks beside the point look like noise from afar; from near by they are left out.
        lengths = [_IRREGULAR**i * eps ** (1 / 3) for i in range(4)]
        noise = min(noise, max(measure_noise(function, h, distinct=True) for h in lengths))
    noise = max(noise, floor)
    ends = [value for value in (function(length), function(-length)) if value is not None]
    slope = max((abs(value - at) for value in ends), default=0.0) / length
    relative = noise / slope if slope > 0.0 else inf
    largest = largest_step(min(max(relative, eps), max(_NOISIEST, eps)))
    # The third step is the first that can be judged; eps^(1/5) is where it errs least.
    return noise, max(largest, min(1.0, 16.0 * eps**0.2))


def _moved_together(
    evaluate: Callable[[Call], Tensor], call: Call, chosen: Directions, step: float
) -> float | None:
    """f with every tensor moved by step times its first direction; None where it has no value."""
    moves = [(s.tensor, s.tensor.detach() + step * moves[0]) for s, moves in chosen if moves]
    try:
        if call.pieces:
            places = {id(old): new for old, new in moves}
            pieces = tuple(places.get(id(piece), piece) for piece in call.pieces)
            value = float(evaluate(Call(pieces, True, 0.0, 0.0)).detach())
        else:
            with Substitution([old for old, _ in moves], [new for _, new in moves]):
                value = float(evaluate(call).detach())
    except (RuntimeError, ValueError, ArithmeticError):
        return None
    return value if isfinite(value) else None


def _checked_params(params: Any) -> list[Tensor]:
    if isinstance(params, Iterable) and not isinstance(params, Tensor):
        params = list(params)
    tensors = LeafSet.collect(params=params).tensors
    if not tensors:
        raise ValueError("params is empty: there is no gradient to check")
    if len(tensors) < len(params):
        raise ValueError("params lists a tensor twice")
    return tensors


def _takes_arguments(f: Callable[..., Any], tensors: list[Tensor]) -> bool:
    """Whether f is to be called as f(*params), and not as f()."""
    try:
        signature = inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except (TypeError, ValueError):
        return True  # torch's own functions have none
    starred = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    for arguments in (tensors, []) if starred else ([], tensors):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return bool(arguments)
    raise TypeError(
        f"f must be callable as f() or as f(*params) with {len(tensors)} tensors; its signature is "
        f"{signature}"
    )


def _checked_value(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"f must return a 0-d tensor; got {type(value).__name__}")
    if value.ndim != 0:
        raise ValueError(f"f must return a 0-d tensor; got one of shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"f must return a real floating tensor; got {value.dtype}")
    return value
