"""The report's figures, each an SVG drawn by matplotlib; nothing here keeps state or reads a run.

Text stays text and colours can become CSS variables, so that one drawing serves light and dark pages alike.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from recsys.gate import Comparison, title

# Model and truth are Okabe and Ito's blue and vermilion, which colour-blind eyes tell apart.
INK, MUTED, LINE, PAPER = "#1b1f24", "#626b76", "#d5dae0", "#fffffe"
MODEL, TRUTH = "#0072b2", "#d55e00"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--card", MODEL: "--model", TRUTH: "--truth"}

SIDE = 4.6
"""Width of a figure in inches: two stand side by side on a desk, one fills a phone, and the text is legible on both."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a value may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Plot:
    """One figure."""

    name: str
    """Of its file, without the ending."""
    text: str
    """What it shows, for those who do not see it."""
    svg: str
    """A document of its own."""

    @property
    def inline(self) -> str:
        """As part of a page: sized by it, in its colours, with nothing that points outside."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
        body = re.sub(r"\s*\n\s*", " ", body)
        for colour, variable in _VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        # Names that nothing refers to would be repeated from figure to figure.
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
        body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
        box = re.search(r'viewBox="0 0 ([\d.]+) ', body)
        least = round(float(box[1]) * 0.95) if box else 300  # below it letters would be too small: scroll instead
        head = f'<svg role="img" aria-label="{escape(self.text)}" style="min-width:{least}px" viewBox'
        return re.sub(r"<svg[^>]*?viewBox", lambda _: head, body, count=1)


def _plot(name: str, text: str, height: float, draw: Callable[[Figure, Axes], None], width: float = SIDE) -> Plot:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The reader's browser draws the letters, so matplotlib's own font need not have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", dpi=200, metadata={"Date": None})
    return Plot(name, text, written.getvalue())


def short(value: str, length: int = 18) -> str:
    """A value as a label: printable and not long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
    return clean if len(clean) <= length else f"{clean[: length - 1]}…"


# Curves


Curve = Sequence[tuple[float, float]]
"""Points (epochs done, value)."""


def epochs(name: str, quantity: str, lines: Mapping[str, Curve], best: int) -> Plot:
    """A quantity over epochs; the first line, validation, has a dot per epoch, further ones are drawn grey.

    `best` counts from 1.
    """

    def draw(figure: Figure, axes: Axes) -> None:
        for i, (label, points) in enumerate(lines.items()):
            done, values = [p[0] for p in points], [p[1] for p in points]
            if i:
                axes.plot(done, values, label=label, color=MUTED)
            else:
                axes.plot(done, values, marker="o", markersize=4.5, label=label, color=MODEL)
        first = next(iter(lines.values()))
        axes.axvline(best, color=TRUTH, linewidth=1, linestyle=":", label=f"best epoch: {best}")
        axes.plot(best, first[best - 1][1], "o", markersize=9, color=MODEL, markeredgecolor=TRUTH, markeredgewidth=1.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0 if len(lines) > 1 else 0.6, len(first) + 0.4)
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.margins(y=0.12)
        _legend_above(figure, axes)

    return _plot(name, f"{quantity} by epoch", 2.9, draw)


def loss_curve(name: str, curve: Curve, beside: Curve = ()) -> Plot:
    """The training loss, and `beside` it the self-supervised part of it, by epoch."""

    def draw(figure: Figure, axes: Axes) -> None:
        axes.plot([p[0] for p in curve], [p[1] for p in curve], color=MUTED, label="training")
        if beside:
            axes.plot([p[0] for p in beside], [p[1] for p in beside], marker="o", markersize=4.5, color=MODEL,
                      label="self-supervised, mean of the epoch")  # fmt: skip
            _legend_above(figure, axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")

    return _plot(name, "training loss by epoch", 2.9, draw)


def roc(name: str, curve: pl.DataFrame, truth: pl.DataFrame | None) -> Plot:
    """The ROC curve, and that of the known truth."""

    def draw(figure: Figure, axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="guessing")
        if truth is not None:
            axes.plot(truth["fpr"], truth["tpr"], color=TRUTH, linewidth=1.5, label="known truth")
        axes.plot(curve["fpr"], curve["tpr"], color=MODEL, label="model")
        axes.set_xlabel("share of the negatives above the threshold")
        axes.set_ylabel("share of the positives above it")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        _legend_above(figure, axes)

    return _plot(name, "ROC curve", 3.6, draw)


def calibration(name: str, curve: pl.DataFrame) -> Plot:
    """Mean label against mean prediction of equal shares of the rows, with 95 % intervals."""
    predicted, observed = curve["mean_predicted"].to_numpy(), curve["mean_observed"].to_numpy()
    error = 1.96 * np.sqrt(observed * (1 - observed) / curve["count"].to_numpy())
    top = max(predicted.max(), (observed + error).max()) * 1.05

    def draw(figure: Figure, axes: Axes) -> None:
        axes.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
        axes.errorbar(predicted, observed, yerr=error, color=MODEL, linewidth=1, elinewidth=1.2, marker="o",
                      markersize=4, label="model, 95% interval")  # fmt: skip
        axes.set_xlabel("predicted probability, mean of the bin")
        axes.set_ylabel("share of positives in the bin")
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        _legend_above(figure, axes)

    return _plot(name, "Calibration curve", 3.6, draw)


def propensity(name: str, quantity: str, deciles: pl.DataFrame) -> Plot:
    """A conditional probability by tenths of the click's: predicted on all rows, observed on clicks, and the truth."""
    x = deciles["propensity"].to_numpy()
    observed = deciles["observed"].cast(pl.Float64).fill_null(math.nan).to_numpy()
    error = 1.96 * np.sqrt(observed * (1 - observed) / np.maximum(deciles["clicks"].to_numpy(), 1))

    def draw(figure: Figure, axes: Axes) -> None:
        axes.errorbar(x, observed, yerr=error, color=MUTED, linestyle="", elinewidth=1.2, marker="s", markersize=4,
                      label="observed on clicks")  # fmt: skip
        if "truth" in deciles.columns:
            axes.plot(x, deciles["truth"], color=TRUTH, linewidth=1.5, marker="D", markersize=4, label="true, all rows")
        axes.plot(x, deciles["predicted"], color=MODEL, linewidth=1.5, marker="o", markersize=4.5,
                  label="predicted, all rows")  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("predicted click probability, mean of the tenth")
        axes.set_ylabel(short(quantity, 40))
        axes.set_ylim(bottom=0)
        _legend_above(figure, axes)

    return _plot(name, f"{quantity} by propensity", 3.6, draw)


def histogram(name: str, label: str, scores_N: NDArray[Any], labels_N: NDArray[np.bool_]) -> Plot:
    """How scores are distributed among positives and among negatives."""
    top = float(np.quantile(scores_N, 0.999)) or 1.0
    edges = np.linspace(0, top, 51)

    def draw(figure: Figure, axes: Axes) -> None:
        for value, colour in ((0, MUTED), (1, MODEL)):
            inside_N = np.clip(scores_N[labels_N == value], 0, top)
            share = np.histogram(inside_N, edges)[0] / max(inside_N.size, 1)
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(share, edges, color=colour, linewidth=1.5, label=f"{short(label)} = {value}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of the rows with this label")
        axes.set_xlim(0, top)
        axes.set_ylim(bottom=0)
        _legend_above(figure, axes)

    return _plot(name, f"Distribution of predicted probabilities by {label}", 3.6, draw)


# By value


def dots(
    name: str,
    quantity: str,
    labels: Sequence[str],
    counts: Sequence[int],
    values: ArrayLike,
    errors: ArrayLike,
    *,
    truth: ArrayLike | None = None,
    reference: tuple[str, float],
) -> Plot:
    """One value per line with its 95 % interval, the number of rows at the right; `reference` is a vertical line."""
    places = np.arange(len(labels))

    def draw(figure: Figure, axes: Axes) -> None:
        axes.axvline(reference[1], color=MUTED, linewidth=1, linestyle="--", label=reference[0])
        if truth is not None:
            axes.plot(truth, places, linestyle="", marker="D", markersize=5, color=TRUTH, label="known truth")
        axes.errorbar(np.asarray(values), places, xerr=np.asarray(errors), linestyle="", marker="o", markersize=5.5,
                      elinewidth=1.2, color=MODEL, label="model, 95% interval")  # fmt: skip
        _lines(axes, labels)
        axes.margins(x=0.08)
        for place, count in enumerate(counts):
            axes.text(1.03, place, f"{count:,}", transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        axes.text(1.03, 1.0, "rows", transform=axes.transAxes, va="bottom", fontsize=8.5, color=MUTED)
        axes.set_xlabel(quantity)
        _legend_above(figure, axes)

    return _plot(name, f"{quantity} by value", 1.15 + 0.24 * len(labels), draw)


def drift(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    warn: Sequence[float | None],
    stop: Sequence[float | None],
) -> Plot:
    """PSI per line on a logarithmic scale, each with the thresholds that hold for it."""
    places = np.arange(len(labels))
    least = 1e-4
    shown = np.maximum(values, least)  # 0 has no place on the scale
    limits = [[math.nan if limit is None else max(limit, least) for limit in line] for line in (warn, stop)]
    beyond = [any(v > limit for limit in both) for v, *both in zip(shown, *limits, strict=True)]

    def draw(figure: Figure, axes: Axes) -> None:
        for line, colour, style, text in zip(limits, (MUTED, INK), ("--", "-"), ("warns", "stops"), strict=True):
            if np.isfinite(line).any():
                axes.vlines(line, places - 0.5, places + 0.5, color=colour, linewidth=1.2, linestyle=style, label=text)
        axes.hlines(places, least, shown, color=LINE, linewidth=1.2)
        for outside, colour, marker, text in ((False, MODEL, "o", "within"), (True, TRUTH, "D", "beyond")):
            if (chosen := np.asarray(beyond, bool) == outside).any():
                axes.plot(shown[chosen], places[chosen], marker, markersize=5.5, color=colour, label=text)
        axes.set_xscale("log")
        axes.set_xlim(least, max(1.0, 2 * float(shown.max())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _lines(axes, labels)
        axes.set_xlabel("PSI")
        _legend_above(figure, axes, columns=4)

    return _plot(name, "Population stability index by feature", 1.15 + 0.24 * len(labels), draw)


def shares(name: str, labels: Sequence[str], before: Sequence[float], now: Sequence[float], quantity: str) -> Plot:
    """A share per line, then and now."""
    places = np.arange(len(labels))

    def draw(figure: Figure, axes: Axes) -> None:
        axes.hlines(places, before, now, color=MUTED, linewidth=1.2)
        axes.plot(before, places, linestyle="", marker="|", markersize=11, markeredgewidth=2, color=INK, label="before")
        axes.plot(now, places, linestyle="", marker="o", markersize=5.5, color=MODEL, label="this day")
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
        _lines(axes, labels)
        axes.set_xlabel(quantity)
        _legend_above(figure, axes)

    return _plot(name, f"{quantity}, before and on the day", 1.15 + 0.24 * len(labels), draw)


def bars(name: str, labels: Sequence[str], values: Sequence[float], quantity: str) -> Plot:
    """A bar per line, from 0."""
    places = np.arange(len(labels))

    def draw(_: Figure, axes: Axes) -> None:
        axes.barh(places, values, height=0.62, color=MODEL, alpha=0.8)
        axes.set_xlim(left=0)
        _lines(axes, labels)
        axes.set_xlabel(quantity)

    return _plot(name, f"{quantity} by line", 0.85 + 0.24 * len(labels), draw)


@dataclass(frozen=True)
class Stage:
    """What is left after a stage of a funnel."""

    label: str
    items: int
    recall: float


def stages(name: str, before: Sequence[Stage], last: Sequence[Stage]) -> Plot:
    """A funnel: recall after each stage as a bar about the middle; the ways to make the last one stand below it."""
    lines = [*before, *last]
    places = np.arange(len(lines))

    def draw(_: Figure, axes: Axes) -> None:
        for place, stage in enumerate(lines):
            colour = MODEL if place < len(before) or place == len(lines) - 1 else MUTED
            axes.barh(place, stage.recall, left=-stage.recall / 2, height=0.56, color=colour, alpha=0.8)
            axes.text(0, place - 0.31, f"{stage.label}: {stage.items:,} items", ha="center", va="bottom", fontsize=9,
                      bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1})  # fmt: skip
            inside = stage.recall > 0.16
            axes.text(0 if inside else stage.recall / 2 + 0.015, place, f"{stage.recall:.1%}", va="center",
                      ha="center" if inside else "left", fontsize=9, color=PAPER if inside else INK)  # fmt: skip
        for place in range(len(before)):  # the last ways all begin at the end of the stages before
            above, below = before[place].recall / 2, lines[place + 1].recall / 2
            for side in (-1, 1):
                axes.plot([side * above, side * below], [place + 0.28, place + 0.72], color=LINE, linewidth=1.2)
        axes.set_ylim(len(lines) - 0.55, -0.75)
        axes.set_xlim(-0.52, 0.52)
        axes.set_axis_off()

    return _plot(name, "Recall after each stage", 0.3 + 0.62 * len(places), draw)


def _lines(axes: Axes, labels: Sequence[str]) -> None:
    """One line per label, the first on top."""
    axes.set_yticks(np.arange(len(labels)), [short(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def heat(
    name: str,
    text: str,
    matrix: NDArray[np.float64],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    *,
    span: tuple[float, float],
    quantity: str,
    written: Callable[[float], str] | None = None,
) -> Plot:
    """A heat map; `rows` and `columns` are the axis' name and its labels. Colours diverge where `span` holds 0 inside.

    `written` puts the values into the cells.
    """
    low, high = span
    colours = matplotlib.colormaps["RdBu_r" if low < 0 < high else "Blues"]
    height, width = matrix.shape

    def draw(figure: Figure, axes: Axes) -> None:
        axes.grid(visible=False)
        axes.set_facecolor(LINE)  # seen where a cell is empty
        masked = np.ma.masked_invalid(matrix)
        mesh = axes.pcolormesh(masked, cmap=colours, vmin=low, vmax=high, edgecolors=PAPER, linewidth=0.6)
        mesh.set_rasterized(matrix.size > 600)  # as paths, many cells make a heavy page
        axes.invert_yaxis()
        axes.set_xticks(np.arange(width) + 0.5, [short(v, 14) for v in columns[1]], rotation=50, ha="right",
                        rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(np.arange(height) + 0.5, [short(v, 14) for v in rows[1]])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(columns[0])
        axes.set_ylabel(rows[0])
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=28)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.set_label(quantity)
        if written is not None:
            for i, j in np.argwhere(np.isfinite(matrix)).tolist():
                dark = (matrix[i, j] - low) / (high - low or 1) > 0.55
                colour = "#ffffff" if dark else "#000000"  # on the cell, whatever the page's colours
                value = written(float(matrix[i, j]))
                axes.text(j + 0.5, i + 0.5, value, ha="center", va="center", color=colour, fontsize=7)

    cell = 0.25 if height <= 16 else 0.19
    return _plot(name, text, 1.25 + cell * height, draw, width=max(SIDE, 1.7 + 0.19 * width))


def scatter(
    name: str, text: str, x: NDArray[Any], y: NDArray[Any], rows: NDArray[Any], xlabel: str, ylabel: str
) -> Plot:
    """A dot per cell, its area by its rows, and the line on which both are equal."""
    reach = 1.08 * float(np.nanmax(np.abs(np.concatenate([x, y, [1e-3]]))))

    def draw(figure: Figure, axes: Axes) -> None:
        axes.plot([-reach, reach], [-reach, reach], color=MUTED, linewidth=1, linestyle="--", label="equal")
        axes.axhline(0, color=LINE, linewidth=1)
        axes.axvline(0, color=LINE, linewidth=1)
        area = 8 + 90 * rows / max(rows.max(), 1)
        axes.scatter(x, y, s=area, color=MODEL, alpha=0.6, linewidths=0, label="one cell; area: its rows")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _legend_above(figure, axes)

    return _plot(name, text, 3.9, draw)


# Between two models


def forest(name: str, comparisons: Sequence[Comparison]) -> Plot:
    """Each difference of candidate and champion (finite) with its interval, in units of its own margin."""
    labels = [f"{c.output}: {title(c.metric)}" + ("" if c.slice == "all" else f", {c.slice}") for c in comparisons]
    places = np.arange(len(comparisons))
    # Without a usable margin, the interval's own width is the unit.
    spans = [max(c.upper - c.difference if c.upper < math.inf else 0, abs(c.difference), 1e-12) for c in comparisons]
    units = [c.margin if 0 < c.margin < math.inf else s for c, s in zip(comparisons, spans, strict=True)]
    value, lower, upper, limit = (
        np.array([[c.difference, c.lower, c.upper, -c.margin] for c in comparisons]) / np.array(units)[:, None]
    ).T
    limit = np.where(np.isfinite(limit), limit, np.nan)
    reach = 1.2 * max(2.0, *(float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in (value, lower, upper)))
    lower, upper = np.clip(lower, -reach, reach), np.clip(upper, -reach, reach)

    def draw(figure: Figure, axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1, linestyle="--", label="equal")
        axes.plot(limit, places, linestyle="", marker="|", markersize=12, markeredgewidth=1.6, color=TRUTH,
                  label="margin")  # fmt: skip
        axes.hlines(places, lower, upper, color=MODEL, linewidth=1.2)
        axes.plot(value, places, linestyle="", marker="o", markersize=5.5, color=MODEL, label="candidate, interval")
        axes.set_xscale("symlog", linthresh=2, linscale=1.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-reach, reach)
        axes.set_yticks(places, [short(label, 44) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("worse than the champion  ·  better, in margins")
        _legend_above(figure, axes)

    height = 1.15 + 0.24 * len(labels)
    return _plot(name, "Differences of candidate and champion", height, draw, width=1.5 * SIDE)


def shift(name: str, output: str, scores: Mapping[str, NDArray[Any]]) -> Plot:
    """How the scores of two models are distributed; the first is drawn grey."""
    top = max(float(np.quantile(scores_N, 0.999)) for scores_N in scores.values()) or 1.0
    edges = np.linspace(0, top, 51)

    def draw(figure: Figure, axes: Axes) -> None:
        for (model, scores_N), colour in zip(scores.items(), (MUTED, MODEL), strict=True):
            share = np.histogram(np.clip(scores_N, 0, top), edges)[0] / max(scores_N.size, 1)
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(share, edges, color=colour, linewidth=1.5, label=model)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.set_xlabel(f"predicted probability, {short(output, 40)}")
        axes.set_ylabel("share of the rows")
        axes.set_xlim(0, top)
        axes.set_ylim(bottom=0)
        _legend_above(figure, axes)

    return _plot(name, f"Distribution of {output} by both models", 3.6, draw)


def _legend_above(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Outside the data, whatever the data are, and as wide as the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
