"""Raw held-out rows through a bundle, and what its scores are worth."""

from collections.abc import Sequence

import polars as pl

from base.errors import ArtefactError, ConfigError, DataError, did_you_mean
from base.storage import is_published
from features.schema import Output, Schema, Sparse, carried
from features.source import REASON
from features.split import EachDay
from pipelines.config import Run
from recsys import metrics
from recsys.bundle import Bundle
from recsys.models import build_model
from serving.score import score


def check_day(run: Run) -> None:
    """Raises ArtefactError where no --day says which of the daily models is meant."""
    if run.day is None and isinstance(run.data.split, EachDay) and not is_published(run.bundle_path):
        raise ArtefactError(f"{run.bundle_path}: there is no trained model there, each day has its own; pass --day")


def held_out(run: Run, partition: str | None) -> list[str]:
    """The partition asked for, or all test partitions. Raises ConfigError if there are none."""
    partitions = [partition] if partition else run.source.partitions("test")
    if not partitions:
        raise ConfigError("data.split has no test rows; name a test day or share, or pass --partition")
    return partitions


def scored_table(run: Run, bundle: Bundle, partitions: Sequence[str], *, log_odds: bool = False) -> pl.DataFrame:
    """Keys, labels, slices, known truth and probabilities (and their log-odds) of the good rows of raw partitions."""
    labels = {carried(label): label for label in run.labels}
    carry = list(dict.fromkeys([*run.data.key, *labels, *run.evaluate.columns]))
    parts: list[pl.DataFrame] = []
    for partition in partitions:
        good = run.source.checked(partition).filter(pl.col(REASON).is_null())
        parts += list(score(bundle, good, carry=carry, log_odds=log_odds))
    if not parts or not sum(p.height for p in parts):
        raise DataError(
            f"{', '.join(partitions)}: {run.data.path} has no rows to measure on; check the path and data.split"
        )
    # A label may be called like a raw column that is carried too: then the label is meant.
    table = pl.concat(parts)
    return table.drop([name for name in labels.values() if name in table.columns]).rename(labels)


def measure(run: Run, outputs: Sequence[Output], scored: pl.DataFrame) -> pl.DataFrame:
    """The metrics of every question and, where the truth is known, of the truth itself: the noise floor."""
    truth = [o.model_copy(update={"name": c}) for o in questions(run, outputs) if (c := truth_of(run, o))]
    asked = [*questions(run, outputs), *truth]
    return metrics.evaluate(scored, asked, by=run.evaluate.slices, user=run.evaluate.user)


def questions(run: Run, outputs: Sequence[Output]) -> list[Output]:
    """Every output in its own space, then those whose label is known on all impressions in the entire space."""
    known = run.evaluate.entire_space
    return [*outputs, *(Output(name=o.name, label=known[o.name].label) for o in outputs if o.name in known)]


def truth_of(run: Run, question: Output) -> str | None:
    """The column of a question's known probability."""
    entire = run.evaluate.entire_space.get(question.name)
    if entire is not None and question.given is None:
        return entire.truth
    return run.evaluate.truth.get(question.name)


def check_outputs(run: Run) -> None:
    """Raises ConfigError where a setting names an output that the model will not give, before hours of training."""
    probe = Schema(
        keys=(),
        dense=(),
        sparse=tuple(Sparse(name=t.output, rows=1) for t in run.features),
        labels=run.labels,
        funnel=run.data.funnel,
        item=None if run.retrieval is None else run.item_feature,
    )
    outputs = {o.name: o for o in build_model(run.model, probe, table_device="meta").outputs}
    named = {
        "evaluate.truth": run.evaluate.truth,
        "evaluate.entire_space": run.evaluate.entire_space,
        "gate.outputs": run.gate.outputs,
        "calibrate.outputs": (run.calibrate and run.calibrate.outputs) or (),
    }
    for setting, names in named.items():
        if unknown := [n for n in names if n not in outputs]:
            hint = did_you_mean(unknown[0], list(outputs), f"; the outputs are {', '.join(outputs)}")
            raise ConfigError(f"{setting}: {unknown[0]!r} is no output of {run.model.name}{hint}")
    partition = run.calibrate and run.calibrate.partition
    if partition and run.day:
        raise ConfigError(
            f"calibrate.partition = {partition!r}: with --day a model is calibrated on the day before; leave it out"
        )
    for role in ("train", "test") if partition else ():
        if partition in run.source.partitions(role):
            raise ConfigError(
                f"calibrate.partition = {partition!r} is a {role} partition: calibrate on rows that are "
                "neither trained on nor tested on, such as the validation day"
            )
    if plain := [n for n in run.evaluate.entire_space if outputs[n].given is None]:
        raise ConfigError(
            f"evaluate.entire_space: {plain[0]!r} speaks of all impressions already; name an output that presupposes a "
            "label, or leave it out"
        )
