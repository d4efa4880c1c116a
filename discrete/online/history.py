"""What an adapting optimiser did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ode_stopping.core.optional import optional_module, pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AdaptationHistory"]


@dataclass(repr=False)
class AdaptationHistory:
    """Columns, one entry a recorded step.

    Attributes:
        step: The number of the step, from 1.
        loss: f(x_k), before the step.
        after: f(x_{k+1}) on the same batch; None in steps that were not looked at (`every`).
        action: "larger", "smaller", "backed off", "no decrease", "no signal", "undone", or
            "not looked at".
        signals: What the step said, by name and before any clipping: -dN/du (guarded form; over
            the size of the change where f rose) or -dN/d theta (printed form); None where nothing
            was measured.
        values: Of every adapted hyperparameter after the step, by name, one list a group:
            ``history.values["lr"][0]`` is the trace of the first group's learning rate.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    after: list[float | None] = field(default_factory=list)
    action: list[str] = field(default_factory=list)
    signals: dict[str, list[float | None]] = field(default_factory=dict)
    values: dict[str, list[list[float]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        if not self.step:
            return "AdaptationHistory(no steps)"
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.counts().items()))
        ends = ", ".join(
            f"{name} {trace[0]:.3g} -> {trace[-1]:.3g}"
            for name, traces in self.values.items()
            for trace in traces
        )
        return f"AdaptationHistory({len(self)} steps to {self.step[-1]}; {ends}; {counts})"

    @property
    def rates(self) -> list[float]:
        """The learning rate of the first group after every recorded step."""
        return self.values["lr"][0] if "lr" in self.values else []

    def counts(self) -> dict[str, int]:
        """How often each action was taken."""
        return {name: self.action.count(name) for name in dict.fromkeys(self.action)}

    def add(
        self,
        step: int,
        loss: float,
        after: float | None,
        action: str,
        signals: dict[str, float],
        values: dict[str, list[float]],
    ) -> None:
        """Record a step; a group that is new has its value from here on repeated backward."""
        self.step.append(step)
        self.loss.append(loss)
        self.after.append(after)
        self.action.append(action)
        for name, row in values.items():
            self.signals.setdefault(name, []).append(signals.get(name))
            traces = self.values.setdefault(name, [])
            for number, value in enumerate(row):
                if number == len(traces):
                    traces.append([value] * (len(self.step) - 1))
                traces[number].append(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for a state_dict."""
        return {
            "step": list(self.step),
            "loss": list(self.loss),
            "after": list(self.after),
            "action": list(self.action),
            "signals": {name: list(column) for name, column in self.signals.items()},
            "values": {name: [list(t) for t in traces] for name, traces in self.values.items()},
        }

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> AdaptationHistory:
        """What `to_dict` gave."""
        plain = {name: list(columns[name]) for name in ("step", "loss", "after", "action")}
        signals = {name: list(column) for name, column in columns["signals"].items()}
        values = {name: [list(t) for t in traces] for name, traces in columns["values"].items()}
        return cls(**plain, signals=signals, values=values)

    def to_dataframe(self) -> Any:
        """One row a step as a pandas DataFrame (needs the extra `checks`)."""
        pandas = optional_module("pandas", "AdaptationHistory.to_dataframe")
        columns: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "after": self.after,
            "action": self.action,
        }
        for name, traces in self.values.items():
            columns[f"signal of {name}"] = self.signals[name]
            for number, trace in enumerate(traces):
                columns[name if number == 0 else f"{name} (group {number})"] = trace
        return pandas.DataFrame(columns)

    def plot(self, name: str = "lr", *, axes: Axes | None = None) -> Axes:
        """The trace of a hyperparameter over the steps, one line a group; rises are marked.

        Args:
            name: Which one.
            axes: None makes a figure.

        Raises:
            ImportError: matplotlib is missing.
            KeyError: It is not adapted.
        """
        if name not in self.values:
            raise KeyError(
                f"nothing is recorded of {name!r}: it is not adapted, or record_every is 0 "
                f"(recorded: {list(self.values)})"
            )
        style = pictures("style")
        axes = style.canvas(axes, "AdaptationHistory.plot")
        several = len(self.values[name]) > 1
        for number, trace in enumerate(self.values[name]):
            axes.plot(self.step, trace, label=f"group {number}" if several else None)
        trace = self.values[name][0]
        back = [i for i, action in enumerate(self.action) if action in ("backed off", "undone")]
        axes.plot(
            [self.step[i] for i in back],
            [trace[i] for i in back],
            linestyle="",
            marker=".",
            markersize=4,
            label="f rose" if back else None,
        )
        axes.set(xlabel="step", ylabel={"lr": "learning rate"}.get(name, name))
        if all(value > 0 for traces in self.values[name] for value in traces):
            axes.set_yscale("log")
        style.legend(axes)
        return axes
