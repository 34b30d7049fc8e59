"""The report's sections on models of several tasks: the funnel stage by stage, and what its experts do."""

import numpy as np
import polars as pl
import torch

from features.schema import Output
from pipelines import page, plots
from pipelines.config import Run
from pipelines.measure import questions, truth_of
from pipelines.page import Html
from pipelines.plots import Plot
from recsys.bundle import Bundle
from recsys.data import batches, to_columns
from recsys.experts import active_per_row
from recsys.metrics import in_space
from recsys.models.funnel import Funnel
from recsys.models.multitask import MultiTask

# Shape suffixes: T = tasks, E = experts.

DECILES = 10


def funnel(run: Run, bundle: Bundle, scored: pl.DataFrame, drawn: list[Plot]) -> Html:
    """Calibration per stage, and conversion by propensity; nothing for a model without a funnel."""
    if not isinstance(bundle.model, Funnel):
        return Html()
    click, given, _ = bundle.outputs
    stages = questions(run, bundle.outputs)
    rows: list[list[str]] = []
    for stage in stages:
        inside = scored.filter(in_space(scored, stage))
        predicted, observed = _mean(inside, stage.name), _mean(inside, stage.label)
        ratio = predicted / observed if observed else float("nan")
        truth = truth_of(run, stage)
        shares = [predicted, observed, *([] if not run.evaluate.truth else [_mean(inside, truth)])]
        rows.append([stage.name, stage.space, f"{inside.height:,}", *(page.number(s, ".3%") for s in shares),
                     page.number(ratio, ".3f")])  # fmt: skip
    head = ["probability", "on", "rows", "predicted", "observed", *(["known truth"] if run.evaluate.truth else [])]
    known = [truth_of(run, stage) or stage.label for stage in stages if (stage.name, stage.given) == (given.name, None)]
    deciles = by_propensity(scored, click, given, known[0] if known else None)
    drawing = plots.propensity("funnel-by-propensity", given.name, deciles)
    return page.tag(
        "section",
        page.tag("h2", "The funnel, stage by stage"),
        page.tag("p", "Each probability speaks of its own rows: a conversion given a click is observed on clicked rows "
                 "only, and asked of all. Where a model learns conversion from clicks alone, or through their product, "
                 "it tends to promise too much where clicks are rare: the left of the figure."),
        page.table([*head, "predicted / observed"], rows, left=2),
        page.figures(page.figure(drawn, drawing, "Conversion by propensity",
                                 f"Tenths of the impressions by {click.name}; intervals are 95%.")),
    )  # fmt: skip


def by_propensity(scored: pl.DataFrame, click: Output, given: Output, truth: str | None) -> pl.DataFrame:
    """Per tenth of the rows by predicted click: mean click, conversion predicted on all, observed on clicks, true.

    Columns: propensity, predicted, observed, clicks, and truth where a column of it is given.
    """
    place = (pl.col(click.name).rank("ordinal") - 1) * DECILES // pl.len()
    clicked = in_space(scored, given)
    known = [] if truth is None else [pl.col(truth).cast(pl.Float64).mean().alias("truth")]
    return (
        scored.with_columns(place.alias("decile"), clicked.alias("clicked"))
        .group_by("decile")
        .agg(
            pl.col(click.name).cast(pl.Float64).mean().alias("propensity"),
            pl.col(given.name).cast(pl.Float64).mean().alias("predicted"),
            pl.col(given.label).filter("clicked").cast(pl.Float64).mean().alias("observed"),
            pl.col("clicked").sum().alias("clicks"),
            *known,
        )
        .sort("decile")
    )


def experts(bundle: Bundle, sample: pl.DataFrame, drawn: list[Plot]) -> Html:
    """How much each task draws from each expert, and how many a row uses; nothing for a model without experts."""
    model = bundle.model
    if not isinstance(model, Funnel | MultiTask) or model.network.experts is None:
        return Html()
    weights: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in batches(to_columns(sample, bundle.schema, labels=False), 8192):
            found = model.network.expert_weights(model.embed.separate(batch.to(bundle.device)))
            assert found is not None
            weights.append(found.cpu())
    weights_BTE = torch.cat(weights)
    active = float(active_per_row(weights_BTE).double().mean())
    mean_TE = weights_BTE.double().mean(0).numpy()
    count = mean_TE.shape[1]
    names = bundle.schema.funnel or bundle.schema.labels
    tasks = [*names, *(f"tower {i + 1}" for i in range(len(names), len(mean_TE)))]
    drawing = plots.heat(
        "experts", "Mean weight of each expert in each task's mixture", mean_TE, ("task", tasks),
        ("expert", [str(e + 1) for e in range(count)]), span=(0.0, float(mean_TE.max())), quantity="mean weight",
        written=lambda v: f"{100 * v:.0f}",
    )  # fmt: skip
    idle = int((mean_TE.max(0) < 0.01).sum())
    return page.tag(
        "section",
        page.tag("h2", "What the experts do"),
        page.tag("p", f"A row uses {active:.2f} of {count} experts in some task, on average over {len(weights_BTE):,} "
                 f"held-out rows; {idle} experts have less than 1% of every task."),
        page.figures(page.figure(drawn, drawing, "Utilisation", "Percent; a line adds up to 100.")),
    )  # fmt: skip


def _mean(rows: pl.DataFrame, column: str | None) -> float:
    if column is None or rows.is_empty():
        return float("nan")
    mean = rows[column].cast(pl.Float64).mean()
    return float(mean) if isinstance(mean, float) else float(np.nan)
