"""The loop of meta-training: eq. 11 of arXiv 2505.22509, over shards, segments and processes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.core.validation import described, require_instance

from ..base import LearnedOptimizer
from ..draws import mixed_seed
from ..families import TaskFamily
from ..tasks import MetaTask
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .history import MetaHistory, MetaRecord
from .log import Log
from .loss import MetaLoss, cotangents
from .options import MetaOptions
from .parallel import Processes, processes
from .rollout import Inputs, Rollout, Stretch, gradients

__all__ = ["meta_train"]

Tasks = TaskFamily | Callable[[int, int], MetaTask]


def meta_train(
    learned: LearnedOptimizer,
    tasks: Tasks,
    *,
    loss: MetaLoss = MetaLoss(),  # noqa: B008 - immutable
    steps: int = 500,
    batch: int = 64,
    shards: int = 8,
    horizon: int | tuple[int, int] | Callable[[int], int] = 100,
    segment: int = 20,
    truncated: bool = True,
    update: Literal["segment", "horizon"] = "segment",
    inputs: Inputs = "detached",
    rate: float = 3e-3,
    decay: float = 0.1,
    clip: float = 1.0,
    validation: MetaTask | None = None,
    validate_every: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool | Callable[[MetaRecord], None] = False,
) -> MetaHistory:
    """Train a learned optimiser to be low, and at its target soon.

        minimise over theta  E_tasks [ sum_{k=1..K} w_k f(x_k) + lambda N_J ]

    by Adam on theta, from batches of problems. With inputs="detached", the default, the gradients
    of f that the optimiser is fed count as constants: a truncated direction that is cheap, and not
    the gradient of the loss (`stopping_index` always differentiates through). It runs on one
    process or, started by `torchrun`, on several, with the same bits (each with one number of
    threads).

    Args:
        learned: The optimiser; its parameters are trained in place, and are the best ones on
            `validation` in the end, or the last ones.
        tasks: A family, or a callable (count, seed) -> MetaTask; the same seed has to give the same
            problems.
        loss: The weights w, lambda, and the kind of index.
        steps: Meta-steps.
        batch: Problems in each.
        shards: Parts that a batch is cut into, whatever the number of processes, which has to
            divide it. For small problems on one process 1 is faster.
        horizon: K; (least, largest) draws it anew each step; a callable step -> K is a curriculum.
        segment: Steps of the optimiser in one graph.
        truncated: Whether the gradient ends at the start of a segment. False: the whole discrete
            adjoint, with checkpoints; needs update="horizon".
        update: "segment": theta moves after every segment; "horizon": once a meta-step, by their
            sum.
        inputs: "detached", or "through": the gradients of f are differentiated, too.
        rate: Learning rate of Adam.
        decay: What the rate falls by in all, geometrically.
        clip: Bound on the norm of the gradient.
        validation: Problems to look at every `validate_every` steps, over the longest horizon.
        validate_every: Meta-steps.
        seed: Of everything that is drawn.
        device: Where it runs; `learned` is moved there.
        dtype: Of the problems of a family.
        checkpoint: A file that is written after every step, and from which a training that was
            stopped goes on as if it had not been (needs the extra `learn`).
        log: A file of one JSON object a step.
        tensorboard: A folder of events for TensorBoard, where it is installed.
        progress: Whether to print a line a step, or what to call with the record of each.

    Returns:
        One record a step. An update whose gradient is not finite is left out, and counted.

    Raises:
        TypeError, ValueError: Bad arguments; a checkpoint of a training with other settings.
    """
    if not isinstance(learned, LearnedOptimizer):
        raise TypeError(f"learned must be a LearnedOptimizer; got {described(learned)}")
    if not any(p.requires_grad for p in learned.parameters()):
        raise ValueError(f"this {type(learned).__name__} has no parameters that require grad")
    if not (isinstance(tasks, TaskFamily) or callable(tasks)):
        raise TypeError(
            "tasks must be a TaskFamily or a callable (count, seed) -> MetaTask; got "
            f"{described(tasks)}"
        )
    require_instance(validation, MetaTask, name="validation", example="family.draw(64, seed=1)")
    settings = MetaOptions(
        loss=loss,
        steps=steps,
        batch=batch,
        shards=shards,
        horizon=horizon,
        segment=segment,
        truncated=truncated,
        update=update,
        inputs=inputs,
        rate=rate,
        decay=decay,
        clip=clip,
        validate_every=validate_every,
        seed=seed,
        dtype=dtype,
    )
    place = torch.device(device)
    with processes(place, settings.shards) as group:
        training = _Training(learned.to(place), tasks, validation, settings, place, group)
        file = None if checkpoint is None else Path(checkpoint)
        found = None if file is None else read_checkpoint(file, training.settings)
        if found is not None:
            training.restore(found)
        group.wait()
        if found is None and file is not None and group.rank == 0:
            # What cannot be written is said before the work.
            write_checkpoint(training.checkpoint(), file)
        with Log(log, tensorboard, progress, of=training.history, first=group.rank == 0) as told:
            while training.step < settings.steps:
                record = training.advance()
                if file is not None and group.rank == 0:
                    write_checkpoint(training.checkpoint(), file)
                told.record(record, settings.steps)
        training.take_best()
    return training.history


class _Shard:
    """A shard's run in a meta-step, and what it makes of the parameters until the next update.

    Args:
        learned: The optimiser.
        task: The problems.
        options: Of the training.

    Attributes:
        rollout: The run.
        loss: Its share of sum w_k f(x_k) so far.
    """

    def __init__(self, learned: LearnedOptimizer, task: MetaTask, options: MetaOptions) -> None:
        self.rollout = Rollout(learned, task)
        self.loss = 0.0
        self._learned, self._options = learned, options
        self._gradient: list[Tensor] = []
        self._stretches: list[Stretch] = []
        self._on_states: list[Tensor] = []

    def run(self, count: int, horizon: int) -> None:
        """One more segment forward."""
        options, rollout = self._options, self.rollout
        # Of a gradient that goes back to the start the memory there is enough.
        stretch, places = rollout.advance(
            count,
            keep=options.truncated or not self._stretches,
            record=options.truncated and options.inputs == "detached",
        )
        share = 1.0 / options.batch
        value, on_states = cotangents(
            rollout.task, options.loss, stretch.measured, places, horizon=horizon, share=share
        )
        self.loss += float(value.nan_to_num(float("inf")))
        if not options.truncated:
            self._stretches.append(stretch)
            self._on_states.append(on_states)
            return
        # At once, so that no other shard's graph is there beside this one's.
        found = gradients(self._learned, rollout, [stretch], [on_states], options.inputs)
        before = self._gradient or [torch.zeros_like(part) for part in found]
        self._gradient = [a + b for a, b in zip(before, found, strict=True)]

    def take_gradient(self) -> Tensor:
        """Of everything since the last update, in one vector; it begins anew."""
        found, self._gradient = self._gradient, []
        if self._stretches:
            parts = self._stretches, self._on_states
            found = gradients(self._learned, self.rollout, *parts, self._options.inputs)
            self._stretches, self._on_states = [], []
        wide = torch.float64 if found[0].dtype == torch.float64 else torch.float32
        return torch.cat([part.reshape(-1).to(wide) for part in found])


class _Training:
    """A training between two steps."""

    def __init__(
        self,
        learned: LearnedOptimizer,
        tasks: Tasks,
        validation: MetaTask | None,
        options: MetaOptions,
        device: torch.device,
        group: Processes,
    ) -> None:
        self._learned, self._tasks, self._validation = learned, tasks, validation
        self._options, self._device, self._group = options, device, group
        self._parameters = [p for p in learned.parameters() if p.requires_grad]
        self._adam = torch.optim.Adam(self._parameters, lr=options.rate)
        self._best: list[Tensor] | None = None
        self._least = float("inf")
        self.history = MetaHistory()
        self.step = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        about = {"class": type(self._learned).__name__, "options": self._learned.options}
        return {**self._options.to_dict(), **about, "tasks": _described(self._tasks)}

    def advance(self) -> MetaRecord:
        """One meta-step."""
        begin, options = time.perf_counter(), self._options
        rate = options.rate_of(self.step)
        for group in self._adam.param_groups:
            group["lr"] = rate
        horizon = options.horizon_of(self.step, mixed_seed(options.seed, self.step, 0))
        shards = {number: self._shard(number) for number in self._group.shards}
        norm, skipped, done = 0.0, 0, 0
        while done < horizon:
            count = min(options.segment, horizon - done)
            for shard in shards.values():
                shard.run(count, horizon)
            done += count
            if options.update == "segment" or done == horizon:
                norm, sound = self._update(shards)
                skipped += not sound
        figures = self._figures(shards, horizon)
        self.step += 1
        record = MetaRecord(
            step=self.step - 1,
            horizon=horizon,
            **figures,
            skipped=skipped,
            gradient_norm=norm,
            rate=rate,
            validation=self._validated(),
            seconds=time.perf_counter() - begin,
        )
        self.history.records.append(record)
        return record

    def _shard(self, number: int) -> _Shard:
        options = self._options
        count, seed = (
            options.batch // options.shards,
            mixed_seed(options.seed, self.step, 1 + number),
        )
        if isinstance(self._tasks, TaskFamily):
            task = self._tasks.draw(count, seed=seed, device=self._device, dtype=options.dtype)
        else:
            task = self._tasks(count, seed)
        if not isinstance(task, MetaTask):
            raise TypeError(f"tasks must return a MetaTask; got {described(task)}")
        if len(task) != count:
            raise ValueError(f"tasks was asked for {count} problems, and returned {len(task)}")
        return _Shard(self._learned, task, options)

    def _update(self, shards: Mapping[int, _Shard]) -> tuple[float, bool]:
        """Move theta; the norm of the gradient, and whether it was finite."""
        parts = {number: shard.take_gradient() for number, shard in shards.items()}
        total = self._group.total(parts)
        norm = float(torch.linalg.vector_norm(total))
        if not isfinite(norm):
            return norm, False
        total = total * min(1.0, self._options.clip / norm) if norm > 0 else total
        sizes = [p.numel() for p in self._parameters]
        for p, part in zip(self._parameters, torch.split(total, sizes), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        self._adam.step()
        self._adam.zero_grad()
        return norm, True

    def _figures(self, shards: Mapping[int, _Shard], horizon: int) -> dict[str, float]:
        """What is told of a step, the mean over all shards."""
        rows = {number: self._figures_of(one, horizon) for number, one in shards.items()}
        loss, value, finite, reached, index, rises, met, blown = self._group.total(rows).tolist()
        problems = self._options.batch
        return {
            "loss": loss + self._options.loss.stopping * index / problems,
            "value": value / finite if finite else float("nan"),
            "reached": reached / problems,
            "index": index / problems,
            "rises": rises / met if met else 0.0,
            "blown": blown / problems,
        }

    def _figures_of(self, shard: _Shard, horizon: int) -> Tensor:
        outcomes, f = shard.rollout.outcomes, shard.rollout.value
        met = outcomes.index >= 0
        figures = [
            torch.tensor(shard.loss),
            torch.where(outcomes.finite, f, torch.zeros_like(f)).sum(),
            outcomes.finite.sum(),
            # (The mean over the targets of each problem.)
            met.double().mean(1).sum(),
            outcomes.counted(horizon).double().mean(1).sum(),
            outcomes.rises.sum(),
            (outcomes.index > 0).sum(),
            outcomes.blown().sum(),
        ]
        return torch.stack([one.to(device=self._device, dtype=torch.float64) for one in figures])

    def _validated(self) -> float | None:
        """Mean N on the validation problems, where it is due; the best parameters are kept."""
        options = self._options
        due = self.step % options.validate_every == 0 or self.step == options.steps
        if self._validation is None or not due:
            return None
        length = options.longest
        rollout = Rollout(self._learned, self._validation)
        for begin in range(0, length, options.segment):
            rollout.advance(min(options.segment, length - begin), keep=False)
        index = float(rollout.outcomes.counted(length).double().mean())
        if index < self._least:
            self._least, self.history.best = index, self.step - 1
            self._best = [p.detach().clone() for p in self._parameters]
        return index

    def take_best(self) -> None:
        """Put the best parameters on validation in their place."""
        if self._best is not None:
            with torch.no_grad():
                for p, best in zip(self._parameters, self._best, strict=True):
                    p.copy_(best)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        tensors = _named("parameter", [p.detach() for p in self._parameters])
        states = [self._adam.state[p] for p in self._parameters]
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if all(name in state for state in states):
                tensors |= _named(name, [state[name] for state in states])
        if self._best is not None:
            tensors |= _named("best", self._best)
        numbers = {
            "step": self.step,
            "least": self._least if isfinite(self._least) else None,
            "best": self.history.best,
            "records": [record.to_dict() for record in self.history.records],
        }
        return Checkpoint(tensors, numbers, self.settings)

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint."""
        tensors, numbers = found.tensors, found.numbers
        with torch.no_grad():
            for p, stored in zip(self._parameters, _listed("parameter", tensors), strict=True):
                p.copy_(stored)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            for p, stored in zip(self._parameters, _listed(name, tensors), strict=False):
                home = stored if name == "step" else stored.to(p)
                self._adam.state[p][name] = home.clone()
        best = _listed("best", tensors)
        self._best = [one.to(self._device) for one in best] or None
        self._least = float("inf") if numbers["least"] is None else numbers["least"]
        self.step = numbers["step"]
        self.history.best = numbers["best"]
        self.history.records = [MetaRecord(**record) for record in numbers["records"]]


def _named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{place}": tensor for place, tensor in enumerate(tensors)}


def _listed(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return [tensors[f"{name}.{place}"] for place in range(count)]


def _described(value: Any) -> str:
    """Problems in words, the same in every process and run; data by a digest of their bytes."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        return f"tensor {tuple(value.shape)} {digest[:16]}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if is_dataclass(value) and not isinstance(value, type):
        parts = [f"{one.name}={_described(getattr(value, one.name))}" for one in fields(value)]
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return repr(value)
