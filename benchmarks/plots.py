"""Pictures for the results pages, as SVG text that is the same for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

SIZE = (6.4, 4.0)
# Text stays text, and neither dates nor random names make two files of the same numbers differ.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "hicom", "axes.grid": True, "grid.color": "#ddd", "font.size": 9}


def as_svg(figure: Figure) -> str:
    """Return a picture as SVG text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def accuracy_plot(title: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, Any]]]) -> str:
    """Return accuracy in percent over a logarithmic axis, with intervals.

    Args:
        title: over the picture.
        x_label: of the axis.
        lines: label -> (place on the axis, number with `mean`, `low` and `high` from 0 to 1), by place.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE)
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel="accuracy, %")
        places = sorted({x for line in lines.values() for x, _ in line})
        if not places:
            axes.text(0.5, 0.5, "missing", ha="center", transform=axes.transAxes)
            return as_svg(figure)
        for label, line in lines.items():
            means = [100 * y.mean for _, y in line]
            errors = [[100 * (y.mean - y.low) for _, y in line], [100 * (y.high - y.mean) for _, y in line]]
            axes.errorbar([x for x, _ in line], means, errors, marker="o", markersize=4, capsize=3, label=label)
        axes.set_xscale("log")
        # Of two that are too close to be read, the first has a number.
        axes.set_xticks([x for i, x in enumerate(places) if i == 0 or x > 1.15 * places[i - 1]])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend()
        return as_svg(figure)


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the training loss over steps, one panel a stage.

    Args:
        logs: name of a stage -> its `log.json`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((2.4 * len(logs), 2.4), layout="constrained")
        for axes, (name, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
            points = [(entry["step"], float(entry["loss"])) for entry in log if "loss" in entry]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
            axes.set(title=name, xlabel="steps", xlim=(0, None))
        figure.axes[0].set_ylabel("loss")
        return as_svg(figure)
