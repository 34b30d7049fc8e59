"""report: the last evaluation as one page for a person, published beside the model and logged to MLflow."""

import math
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import mlflow
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from base.errors import ArtefactError, ConfigError, Superseded
from base.masking import masked
from base.storage import dump_json, is_published, publish, read_manifest, resolve
from features.schema import Output
from features.source import REASON
from features.transforms import UNKNOWN
from pipelines import (
    drift_page,
    items_page,
    judgement,
    page,
    plots,
    ranking_page,
    sparse_page,
    stages_page,
    tasks_page,
)
from pipelines.config import Run
from pipelines.evaluate import evaluation_of
from pipelines.line import Line
from pipelines.measure import check_day, held_out, questions, truth_of
from pipelines.plots import Plot
from pipelines.rankings import ask
from pipelines.tracking import registry_of
from recsys import metrics
from recsys.bundle import Bundle
from recsys.data import batches, to_columns
from recsys.models.autoint import AutoInt

SAMPLE_ROWS = 20_000
"""Held-out raw rows, spread evenly, on which attention and unknown ids are counted."""

LEVELS = 12
"""Values drawn on each axis of a pair of columns."""

_SELF = (
    "The training loss is the main one and alpha times the self-supervised one, in which an item's one view is to find "
    "its other among a batch's."
)

_METRICS = {
    "auc": ("AUC", ".4f", "positives ranked above negatives; 0.5 is guessing, 1 is perfect"),
    "log_loss": ("log loss", ".4f", "surprise per row, in nats; less is better"),
    "normalized_entropy": ("NE", ".4f", "log loss over that of always predicting the mean; below 1 is useful"),
    "calibration_ratio": ("calibration", ".3f", "predicted over observed positives; 1 is right"),
    "ece": ("ECE", ".4f", "how far probabilities are off, on average; 0 is right"),
    "user_auc": ("user AUC", ".4f", "AUC within one user's rows, averaged over users"),
}


def report(run: Run, *, partition: str | None = None) -> Path:
    """Write the page of the run's evaluation (by default on its test rows); returns where it is published.

    Raises ArtefactError if there is no evaluation, or it is of another bundle or other columns than the run's.
    """
    partition = partition or (f"day={run.day}" if run.day else None)
    check_day(run)
    facts = _gather(run, partition)
    registry = registry_of(run)
    run_id = registry.run_of_training(facts.bundle.version)
    drawn: list[Plot] = []
    sections = [
        _heading(facts, _registered(run, registry.versions_of_run(run_id))),
        tasks_page.funnel(run, facts.bundle, facts.scored, drawn),
        *_qualities(facts, drawn),
        judgement.section(run.gate_path(partition or "test"), facts.bundle.version, drawn),
        tasks_page.experts(facts.bundle, facts.sample, drawn),
        _how_it_learned(facts, drawn),
        _slices(facts, drawn),
        _attention(facts, drawn),
        *_pairs(facts, drawn),
        sparse_page.section(facts.bundle, drawn),
        *drift_page.sections(run, facts.bundle, facts.partitions, drawn),
        _made_of(facts),
    ]
    with publish(run.report_path, "report", overwrite=True, keep=3) as staging:
        (staging / "index.html").write_text(_page(facts, [s for s in sections if s]), encoding="utf-8")
        for plot in drawn:
            (staging / f"plots/{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        staging.about.update(bundle=facts.bundle.version)
    folder = resolve(run.report_path)
    with registry.run(run_id):
        mlflow.log_artifact(str(folder / "index.html"), "report")
        mlflow.log_artifacts(str(folder / "plots"), "plots")
    return run.report_path / "index.html"


# --- what it is made from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """Everything the sections read."""

    run: Run
    bundle: Bundle
    partitions: Sequence[str]
    """Whose rows were measured."""
    scored: pl.DataFrame
    """Empty for a retrieval model."""
    measured: int
    """Held-out rows, or of a retrieval model users."""
    table: pl.DataFrame
    """The metrics, as `metrics.evaluate` or `retrieval.rank_items` gives them."""
    sample: pl.DataFrame
    """Examples: up to SAMPLE_ROWS held-out rows as the model sees them."""

    def truth_of(self, output: Output) -> str | None:
        """The column of the output's known probability."""
        return truth_of(self.run, output)


def _gather(run: Run, partition: str | None) -> _Facts:
    target = run.evaluation_path(partition or "test")
    if not is_published(target):
        if run.day is not None:
            raise Superseded(f"{target}: the day's model was not judged; run `recsys promote --day {run.day}`")
        raise ArtefactError(f"{target}: there is no evaluation yet; run `recsys evaluate` first")
    scored, table, folder = evaluation_of(run, partition)
    bundle = Bundle.load(run.bundle_path)
    measured = read_manifest(folder).about.get("bundle")
    if measured != bundle.version:
        raise ArtefactError(
            f"{target}: is of bundle {measured}, but the run's bundle is {bundle.version}; run `recsys evaluate` again"
        )
    missing = sorted(set(run.evaluate.columns) - set(scored.columns) | set(run.evaluate.slices) - set(table["slice"]))
    if run.retrieval is not None and set(run.retrieval.k) != set(table["k"]):
        raise ArtefactError(f"{target}: was measured at other retrieval.k; run `recsys evaluate` again")
    if missing:
        raise ArtefactError(
            f"{target}: was measured without {missing[0]!r}, which [evaluate] names now; run `recsys evaluate` again"
        )
    for pair in run.evaluate.pairs:
        if pair[0] == pair[1]:
            raise ConfigError(f"evaluate.pairs: {pair[0]!r} stands there twice; name two columns")
        for column in pair:
            if scored[column].dtype.is_nested():
                raise ConfigError(f"evaluate.pairs: {column!r} holds lists; name a column of single values")
    partitions = held_out(run, partition)
    measured = scored.height if run.retrieval is None else table["users"][0]
    return _Facts(run, bundle, partitions, scored, measured, table, _sample(run, bundle, partitions))


def _sample(run: Run, bundle: Bundle, partitions: Sequence[str]) -> pl.DataFrame:
    raw = pl.concat(run.source.checked(p).filter(pl.col(REASON).is_null()).select(bundle.inputs) for p in partitions)
    rows = raw.select(pl.len()).collect(engine="streaming").item()
    return bundle.features.transform(raw.gather_every(max(1, math.ceil(rows / SAMPLE_ROWS)))).collect()


def _registered(run: Run, versions: Sequence[int]) -> str:
    """Name and number of the registered version; not its alias, which the next promotion may move."""
    return f"registered as {run.mlflow.model} version {max(versions)}" if versions else "not registered"


# --- sections --------------------------------------------------------------------------------------------------------


def _page(facts: _Facts, sections: Sequence[page.Html]) -> str:
    frame = Template((files("pipelines") / "report.html").read_text(encoding="utf-8"))
    title = f"{_name(facts.run)}, bundle {facts.bundle.version}"
    return frame.substitute(title=escape(title), body="\n".join(sections))


def _name(run: Run) -> str:
    return run.name or run.model.name


def _heading(facts: _Facts, registered: str) -> page.Html:
    partitions = facts.partitions
    span = partitions[0] if len(partitions) == 1 else f"{partitions[0]} to {partitions[-1]}"
    model = "" if _name(facts.run) == facts.run.model.name else f"{facts.run.model.name}, "
    return page.tag(
        "header",
        page.tag("h1", f"{_name(facts.run)} on {span}"),
        page.tag(
            "p",
            f"{model}bundle ",
            page.tag("code", facts.bundle.version),
            f", {registered}. Measured on {facts.measured:,} {'held-out rows' if facts.scored.height else 'users'} of ",
            page.tag("code", facts.run.data.path),
            f", {', '.join(partitions)}.",
        ),
    )


def _how_it_learned(facts: _Facts, drawn: list[Plot]) -> page.Html:
    history, best = facts.bundle.metrics.get("history", []), int(facts.bundle.metrics.get("best_epoch", 0))
    if not history or not best:
        return page.Html()
    outputs = facts.bundle.outputs
    curve = [(float(done), float(loss)) for done, loss in facts.bundle.metrics.get("curve", [])]
    train_loss = {"training": curve} if curve else {}
    figures: list[page.Html] = []
    if facts.run.retrieval is not None:
        figures = ranking_page.learning(history, best, facts.run.retrieval.k[0], drawn)
    self_loss = [(e["epoch"], e["self_loss"]) for e in history if "self_loss" in e]
    for output in outputs if facts.run.retrieval is None else ():
        loss, auc = (
            [(e["epoch"], e.get(f"{output.name}.{m}", math.nan)) for e in history] for m in ("log_loss", "auc")
        )
        # With several outputs the training loss is their sum, or something else again, and gets a figure of its own.
        beside = train_loss if len(outputs) == 1 else {}
        losses = plots.epochs(f"epochs-{output.name}-loss", "log loss", {"validation": loss, **beside}, best)
        ranks = plots.epochs(f"epochs-{output.name}-auc", "AUC", {"validation": auc}, best)
        figures += [
            page.figure(drawn, losses, f"Log loss, {output.name}"),
            page.figure(drawn, ranks, f"AUC, {output.name}"),
        ]
    if len(outputs) > 1 or facts.run.retrieval is not None or self_loss:
        caption = _SELF if self_loss else ""
        figures.append(page.figure(drawn, plots.loss_curve("epochs-loss", curve, self_loss), "Training loss", caption))
    chosen = (
        f"The weights kept are those of epoch {best} of {len(history)}, the best on the validation rows. "
        "Where the training loss falls on and validation gets worse, the model learns rows by heart."
    )
    went_on = "One pass over the day's rows, from the state of the day before; measured on the day after it."
    text = chosen if "objective" in history[-1] else went_on
    return page.tag("section", page.tag("h2", "How it learned"), page.tag("p", text), page.figures(*figures))


# Quality


def _qualities(facts: _Facts, drawn: list[Plot]) -> Iterator[page.Html]:
    if facts.run.retrieval is not None:
        yield ranking_page.section(facts.table, facts.run.retrieval, drawn)
        yield from _items_and_stages(facts, drawn)
        return
    for output in questions(facts.run, facts.bundle.outputs):
        yield _quality(facts, output, drawn)


def _items_and_stages(facts: _Facts, drawn: list[Plot]) -> Iterator[page.Html]:
    """What a retrieval model makes of single items, and what is left of what users should get after two stages."""
    run, bundle = facts.run, facts.bundle
    (ranking,) = ask(run, bundle, None, facts.partitions, may_be_empty=True, say=lambda _: None)
    yield items_page.section(run, bundle, ranking, facts.partitions)
    yield stages_page.section(run, bundle, ranking, facts.table, facts.partitions, drawn)


def _quality(facts: _Facts, output: Output, drawn: list[Plot]) -> page.Html:
    found = metrics.headline(facts.table, output.name, output.space)
    truth = facts.truth_of(output)
    floor = metrics.headline(facts.table, truth, output.space) if truth else None
    known = facts.scored.filter(metrics.in_space(facts.scored, output))
    base = output.name if output in facts.bundle.outputs else f"{output.name}-everywhere"
    labels_N, scores_N = known[output.label].to_numpy() == 1, known[output.name].to_numpy()
    on = "" if len(facts.bundle.outputs) == 1 else f", on {output.space}"
    numbers: list[list[str]] = []
    for metric, (title, form, meaning) in _METRICS.items():
        if metric in found:
            what = page.tag("span", title, page.tag("span", meaning, kind="note"))
            numbers.append([what, *(page.number(n[metric], form) for n in (found, floor) if n is not None)])
    head = ["", "model", *([] if floor is None else ["known truth"])]
    figures: list[page.Html] = []
    if 0 < found["positives"] < found["rows"]:
        of_truth = metrics.roc_curve(known[output.label], known[truth]) if truth else None
        curve = metrics.roc_curve(labels_N, scores_N)
        drawing = plots.roc(f"{base}-roc", curve, of_truth)
        figures.append(page.figure(drawn, drawing, "Ranking", "The higher above guessing, the better."))
    if found["rows"]:
        bins = metrics.calibration_curve(labels_N, scores_N)
        spread = plots.histogram(f"{base}-scores", output.label, scores_N, labels_N)
        figures += [
            page.figure(drawn, plots.calibration(f"{base}-calibration", bins), "Calibration",
                    f"{bins.height} bins of equally many rows; on the line, probabilities are right."),
            page.figure(drawn, spread, "Separation", "The further apart, the better the model tells them apart."),
        ]  # fmt: skip
    return page.tag(
        "section",
        page.tag("h2", f"Quality of {output.name}, the probability of {output.label} = 1{on}"),
        *(page.tag("p", sentence) for sentence in _reading(output, found, floor)),
        page.table(head, numbers, kind="headline"),
        page.tag("p", f"{found['rows']:,.0f} rows, {found['positives']:,.0f} of them positive"
             f"{_share(found['positives'], found['rows'])}."
             + ("" if floor is None else " Known truth is the true probability of every row, measured alike: the noise"
                " floor that no model can beat but by luck."), kind="note"),
        page.figures(*figures),
    )  # fmt: skip


def _reading(output: Output, found: dict[str, float], floor: dict[str, float] | None) -> Iterator[str]:
    """The numbers in words."""
    if not found["rows"]:
        yield f"Nothing can be measured on {output.space}: {output.label} is not known there yet, or there are none."
        return
    auc, ne, ratio, ece = (found[m] for m in ("auc", "normalized_entropy", "calibration_ratio", "ece"))
    if not math.isfinite(auc) or not math.isfinite(ne):
        yield f"The rows hold only one value of {output.label}, so that there is nothing to rank."
        return
    possible = "" if floor is None else f"; knowing the true probabilities would give {floor['auc']:.1%}"
    ranking = f"A positive row is ranked above a negative one in {auc:.1%} of cases (50% is guessing{possible})."
    side = "below" if ne < 1 else "above"
    gain = f"Its log loss is {abs(1 - ne):.1%} {side} that of always predicting the mean"
    learnable = 0.0 if floor is None else 1 - floor["normalized_entropy"]
    if ne < 1 and learnable > 0:
        gain += f", where {learnable:.1%} is possible: it has learned {(1 - ne) / learnable:.0%} of what can be learned"
    yield f"{ranking} {gain}."
    if ratio < 2:
        promise = f"It predicts {abs(ratio - 1):.1%} {'more' if ratio > 1 else 'fewer'} positives than there were"
    else:
        promise = f"It predicts {ratio:.1f} times as many positives as there were"
    yield f"{promise}, and its probabilities are off by {100 * ece:.2g} percentage points on average."


# Slices


def _slices(facts: _Facts, drawn: list[Plot]) -> page.Html:
    columns = dict.fromkeys(facts.run.evaluate.slices)
    if not columns:
        return page.Html()
    parts: list[page.Html] = []
    for output in facts.bundle.outputs:
        for column in columns:
            parts += _slice(facts, output, column, drawn)
    return page.tag(
        "section",
        page.tag("h2", "Where it is good, and where it is not"),
        page.tag("p", "Each value of a column measured by itself. Bars are 95% intervals: of values with few rows the "
             "metrics say little."),
        *parts,
    )  # fmt: skip


def _slice(facts: _Facts, output: Output, column: str, drawn: list[Plot]) -> list[page.Html]:
    here = facts.table.filter(pl.col("slice") == column)
    found = here.filter(pl.col("output") == output.name, pl.col("space") == output.space)
    truth = facts.truth_of(output)
    floor = here.filter(pl.col("output") == truth, pl.col("space") == output.space) if truth else None
    whole = metrics.headline(facts.table, output.name, output.space)
    values, rows = found["value"].to_list(), found["rows"].to_list()
    auc = plots.dots(
        f"{output.name}-auc-by-{_file_name(column)}",
        "AUC",
        values,
        rows,
        found["auc"],
        1.96 * _auc_error(found),
        truth=None if floor is None else floor["auc"],
        reference=("all rows", whole["auc"]),
    )
    ratio = plots.dots(
        f"{output.name}-calibration-by-{_file_name(column)}",
        "predicted / observed positives",
        values,
        rows,
        [r if math.isfinite(r) else math.nan for r in found["calibration_ratio"]],
        1.96 * _ratio_error(found),
        reference=("right", 1.0),
    )
    measured = {m: v for m, v in _METRICS.items() if found[m].is_not_null().any()}
    numbers = [
        [r["value"], f"{r['rows']:,}", f"{r['positives']:,}", *(page.number(r[m], v[1]) for m, v in measured.items())]
        for r in found.iter_rows(named=True)
    ]
    head = [column, "rows", "positives", *(title for title, _, _ in measured.values())]
    return [
        page.tag("h3", f"{output.name} by {column}"),
        page.figures(page.figure(drawn, auc, "Ranking"), page.figure(drawn, ratio, "Calibration")),
        page.details("All numbers", page.table(head, numbers)),
    ]


def _auc_error(found: pl.DataFrame) -> NDArray[np.float64]:
    """Standard error of each AUC (Hanley and McNeil 1982, Radiology 143, eq. 2)."""
    auc, positives = found["auc"].to_numpy(), found["positives"].to_numpy()
    negatives = found["rows"].to_numpy() - positives
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return np.sqrt(np.maximum(variance, 0) / np.maximum(positives * negatives, 1))


def _ratio_error(found: pl.DataFrame) -> NDArray[np.float64]:
    """Standard error of predicted over observed positives, the observed ones being a binomial count."""
    ratio, positives, rows = (found[c].to_numpy() for c in ("calibration_ratio", "positives", "rows"))
    relative = np.sqrt((1 - positives / np.maximum(rows, 1)) / np.maximum(positives, 1))
    return np.where(positives > 0, ratio, 0.0) * relative


# Attention


def _attention(facts: _Facts, drawn: list[Plot]) -> page.Html:
    if not isinstance(facts.bundle.model, AutoInt):
        return page.Html()
    fields, a_LFK = facts.bundle.schema.fields, _attention_map(facts, facts.bundle.model)
    mean_FK = a_LFK.mean(axis=0)
    even = 1 / len(fields)
    top = float(a_LFK.max())

    def heat(name: str, title: str, a_FK: NDArray[np.float64], *, caption: str = "", kind: str = "") -> page.Html:
        written = (lambda v: f"{100 * v:.0f}") if len(fields) <= 16 else None
        drawing = plots.heat(
            name, title, a_FK, ("field", fields), ("attends to", fields),
            span=(0.0, top), quantity="share of attention", written=written,
        )  # fmt: skip
        return page.figure(drawn, drawing, title, caption, kind=kind)

    caption = f"Percent, lines add up to 100; even attention would be {even:.1%} everywhere."
    kind = "large" if len(fields) > 24 else ""
    heats = [heat("attention", "All layers and heads", mean_FK, caption=caption, kind=kind)]
    if len(a_LFK) > 1:
        heats += [heat(f"attention-layer-{i}", f"Layer {i}", a_FK, kind=kind) for i, a_FK in enumerate(a_LFK, start=1)]
    return page.tag(
        "section",
        page.tag("h2", "Which fields attend to which"),
        page.tag("p", f"Mean over {facts.sample.height:,} held-out rows. Attention describes how the model mixes its "
             "fields, not what causes clicks nor by how much a pair matters; beyond the first layer a field already "
             "carries others."),
        page.figures(*heats),
        *_largest(facts, mean_FK),
    )  # fmt: skip


def _attention_map(facts: _Facts, model: AutoInt) -> NDArray[np.float64]:
    """a_LFK: mean over the sample's rows and over heads."""
    columns = to_columns(facts.sample, facts.bundle.schema, labels=False)
    fields = len(facts.bundle.schema.fields)
    total_LFK = torch.zeros(len(model.layers), fields, fields, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for batch in batches(columns, 1024):  # L·H·F² numbers a row
            total_LFK += model.attention(batch).double().mean(dim=2).sum(dim=1)
    return (total_LFK / len(columns)).numpy()


def _largest(facts: _Facts, mean_FK: NDArray[np.float64]) -> list[page.Html]:
    fields = facts.bundle.schema.fields
    both_FK = (mean_FK + mean_FK.T) / 2
    first, second = np.triu_indices(len(fields), k=1)
    order = np.argsort(-both_FK[first, second], kind="stable")
    if not order.size:
        return []
    sources = {t.output: set(t.sources) for t in facts.bundle.features.recipe.transforms}
    wanted = [set(pair) for pair in facts.run.evaluate.pairs]
    rows: list[list[str]] = []
    for rank, k in enumerate(order, start=1):
        a, b = fields[first[k]], fields[second[k]]
        is_wanted = any(len(p) == 2 and p == sources[a] | sources[b] for p in wanted)
        if rank <= 10 or is_wanted:
            share = both_FK[first[k], second[k]]
            pair = page.tag("span", f"{a} × {b}", page.tag("b", " ◂ drawn below") if is_wanted else "")
            rows.append([pair, f"{rank}", f"{share:.1%}", f"{share * len(fields):.2f}"])
    return [
        page.tag("h3", "Largest interactions"),
        page.table(["pair of fields", f"rank of {order.size}", "mean attention", "times even"], rows),
        page.tag("p", "Mean of the attention in both directions. Pairs named in evaluate.pairs are listed whatever "
                 "their rank.", kind="note"),
    ]  # fmt: skip


# Pairs


def _pairs(facts: _Facts, drawn: list[Plot]) -> list[page.Html]:
    pairs = dict.fromkeys(facts.run.evaluate.pairs)
    return [_pair(facts, output, pair, drawn) for output in facts.bundle.outputs for pair in pairs]


def _pair(facts: _Facts, output: Output, pair: tuple[str, str], drawn: list[Plot]) -> page.Html:
    truth = facts.truth_of(output)
    cells, shown = _cells(facts.scored, pair, output, truth)
    if cells.is_empty():
        return page.Html()
    # The column with more values runs downwards, where its names have room.
    down, across = sorted(pair, key=lambda c: cells[c].n_unique(), reverse=True)
    levels = [list(dict.fromkeys(cells.sort(f"order {c}")[c])) for c in (down, across)]

    def matrix(column: str) -> NDArray[np.float64]:
        found = np.full([len(v) for v in levels], np.nan)
        for a, b, value in cells.select(down, across, column).iter_rows():
            found[levels[0].index(a), levels[1].index(b)] = value
        return found

    rows = np.nan_to_num(matrix("rows"))
    logits = matrix("known"), matrix("model")
    joint = _residual(logits[0], rows), _residual(logits[1], rows)
    rates = matrix("known rate"), matrix("model rate")
    reach = max(float(np.nanmax(np.abs(joint))), 1e-6)
    top = float(np.nanmax(rates))
    base = f"{output.name}-{_file_name(down)}-{_file_name(across)}"
    name, learned = ("planted truth", "what was learned") if truth else ("observed", "what was predicted")

    (correlation, slope), (of_all, _) = _relation(*joint, rows), _relation(*logits, rows)
    # Against noisy counts a slope would come out too small.
    strength = f"; the interaction has {max(slope, 0):.0%} of its strength" if truth and math.isfinite(slope) else ""

    def heat(which: int, what: str, m: NDArray[Any], span: tuple[float, float], quantity: str) -> page.Html:
        title = (name.capitalize(), learned.capitalize())[which]
        drawing = plots.heat(
            f"{base}-{what}-{('known', 'model')[which]}", f"{title}: {quantity} by {down} and {across}", m,
            (down, [str(v) for v in levels[0]]), (across, [str(v) for v in levels[1]]), span=span, quantity=quantity,
        )  # fmt: skip
        return page.figure(drawn, drawing, title)

    dots = plots.scatter(
        f"{base}-scatter", f"Learned against {name}: interaction of {down} and {across}",
        joint[0][rows > 0], joint[1][rows > 0], rows[rows > 0], f"{name} (log-odds)",
        f"{learned} (log-odds)",
    )  # fmt: skip
    return page.tag(
        "section",
        page.tag("h2", f"{down} × {across}: {name} beside {learned}, {output.name}"),
        page.tag("p", f"The interaction: a cell's log-odds less what its {down} and its {across} explain by "
                 f"themselves. Over the cells, weighted by their rows, the correlation of {name} and {output.name} is ",
                 page.tag("b", page.number(correlation, ".2f")), " for the interaction and "
                 f"{page.number(of_all, '.2f')} for the whole log-odds{strength}."),
        page.figures(*(heat(i, "interaction", m, (-reach, reach), "log-odds") for i, m in enumerate(joint)),
                     page.figure(drawn, dots, "Cell by cell",
                                 "On the line, the model has the interaction in full strength.")),
        page.details("The probabilities themselves",
                 page.figures(*(heat(i, "rate", m, (0.0, top), "mean probability") for i, m in enumerate(rates)))),
        page.tag("p", f"{shown:.0%} of the rows are shown: the {LEVELS} most frequent values of each column"
             + ("." if truth else ", where log-odds come from counts of labels and carry their noise."), kind="note"),
    )  # fmt: skip


def _cells(
    scored: pl.DataFrame, pair: tuple[str, str], output: Output, truth: str | None
) -> tuple[pl.DataFrame, float]:
    """Rows, rates and log-odds of each pair of frequent values, and the share of rows they cover.

    Known probabilities are averaged as log-odds, in which effects add up; of labels only the count has log-odds.
    """
    table = scored.filter(metrics.in_space(scored, output))
    whole = table.height
    for column in pair:
        sizes = table.group_by(column).len().sort("len", column, descending=[True, False], nulls_last=True)
        kept = sizes.head(LEVELS)
        numeric = scored[column].dtype.is_numeric()
        kept = kept.sort(column, nulls_last=True) if numeric else kept  # numbers have an order of their own
        order = kept.select(column, pl.int_range(pl.len()).alias(f"order {column}"))
        table = table.join(order, on=column, how="inner", nulls_equal=True, maintain_order="left")
    p = pl.col(output.name).cast(pl.Float64)
    known = pl.col(truth or output.label).cast(pl.Float64)

    def log_odds(value: pl.Expr) -> pl.Expr:
        if truth is None:
            return ((value.sum() + 0.5) / ((1 - value).sum() + 0.5)).log()
        clipped = value.clip(metrics.CLIP, 1 - metrics.CLIP)
        return (clipped / (1 - clipped)).log().mean()

    cells = table.group_by(pair).agg(
        *(pl.col(f"order {c}").first() for c in pair),
        pl.len().alias("rows"),
        known.mean().alias("known rate"),
        p.mean().alias("model rate"),
        log_odds(known).alias("known"),
        log_odds(p).alias("model"),
    )
    named = (pl.col(c).cast(pl.String).fill_null(metrics.MISSING) for c in pair)
    return cells.sort([f"order {c}" for c in pair]).with_columns(named), table.height / max(whole, 1)


def _residual(value: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the best sum of a row effect and a column effect leaves over, by weighted least squares."""
    height, width = value.shape
    i, j = np.nonzero(weight > 0)
    design = np.hstack([np.eye(height)[i], np.eye(width)[j]])
    root = np.sqrt(weight[i, j])
    effects = np.linalg.lstsq(design * root[:, None], value[i, j] * root, rcond=None)[0]
    left = np.full(value.shape, np.nan)
    left[i, j] = value[i, j] - design @ effects
    return left


def _relation(x: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[float, float]:
    """Correlation of y and x over the cells, and the slope of y on x."""
    inside = weight > 0
    x, y, weight = x[inside], y[inside], weight[inside]
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    xx, xy, yy = (float((weight * product).sum()) for product in (x * x, x * y, y * y))
    tiny = 1e-12 * float(weight.sum())
    return (xy / math.sqrt(xx * yy) if min(xx, yy) > tiny else math.nan), (xy / xx if xx > tiny else math.nan)


# What it is made of


def _made_of(facts: _Facts) -> page.Html:
    run, bundle = facts.run, facts.bundle
    settings = [page.details("The configuration it was trained with", page.tag("pre", _settings(bundle.settings)))]
    if (now := run.model_dump(mode="json")) != bundle.settings:
        settings.append(page.details("The run file now, which differs", page.tag("pre", _settings(now))))
    head = ["feature", "kind", "columns", "table rows", "unknown ids", "empty bags"]
    return page.tag(
        "section",
        page.tag("h2", "What it is made of"),
        page.tag("h3", "Features"),
        page.table(head, list(_features(facts)), left=3),
        page.tag("p", f"Unknown: ids without a row of their own among {facts.sample.height:,} held-out rows, "
             "whether new, rare or missing.", kind="note"),
        page.tag("h3", "Data"),
        page.table(["role", "partition", "rows", "set aside", "sha256 of the raw files"], _data(facts), left=2),
        page.tag("h3", "Versions"),
        page.tag("p", "This page was made with ", ", ".join(_versions()), "."),
        page.tag("h3", "Configuration"),
        *settings,
    )  # fmt: skip


def _features(facts: _Facts) -> Iterator[list[str]]:
    tables = {f.name: f for f in facts.bundle.schema.sparse}
    for transform in facts.bundle.features.recipe.transforms:
        name, rows, unknown, empty = transform.output, "", "", ""
        if table := tables.get(name):
            ids = facts.sample[name]
            if table.multi:
                empty = f"{(ids.list.len() == 0).mean() or 0:.1%}"
                ids = ids.explode(empty_as_null=False, keep_nulls=False)
            rows, unknown = f"{table.rows:,}", f"{(ids == UNKNOWN).mean() or 0:.1%}"
        yield [name, transform.kind, ", ".join(transform.sources), rows, unknown, empty]


def _data(facts: _Facts) -> list[list[str]]:
    """Which raw files: from the examples' manifests, and for the test rows from the files as they are now."""
    found: list[list[str]] = []
    run, line = facts.run, facts.bundle.origin.line
    path_of = run.examples_path if line is None else Line(run.output / "lines" / line).examples_path
    for role in ("train", "valid"):
        for partition in run.source.partitions(role):
            target = path_of(partition)
            about = read_manifest(resolve(target, "examples")).about if is_published(target) else {}
            if about.get("pipeline") in facts.bundle.features.accepts:
                aside = f"{sum(about['bad'].values()):,}"
                found.append([role, partition, f"{about['rows']:,}", aside, page.tag("code", about["raw"]["sha256"])])
            else:
                found.append([role, partition, "", "", "its examples are gone, or were made again by other features"])
    for partition in facts.partitions:
        alone = len(facts.partitions) == 1
        rows = f"{facts.measured:,}" if alone else ""
        found.append(
            [
                "measured",
                partition,
                rows,
                _lost(facts) if alone else "",
                page.tag("code", run.source.fingerprint(partition)["sha256"]),
            ]
        )
    return found


def _lost(facts: _Facts) -> str:
    """Rows that a ranking was not asked about, since their item is not in the corpus."""
    if facts.run.retrieval is None:
        return ""
    return f"{read_manifest(resolve(facts.run.ranking_path(facts.partitions))).about['lost']:,}"


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}"
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "polars"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue  # one of the two fbgemm


def _settings(settings: Any) -> str:
    return masked(dump_json(settings).decode())  # of versions from before passwords were refused


def _share(part: float, whole: float) -> str:
    return f" ({part / whole:.2%})" if whole else ""


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)
