"""Raw held-out rows through a bundle, and what its scores are worth."""

from collections.abc import Sequence

import polars as pl

from base.errors import ConfigError, DataError, did_you_mean
from features.schema import Output, carried
from features.source import REASON
from pipelines.config import Run
from recsys import metrics
from recsys.bundle import Bundle
from serving.score import score


def held_out(run: Run, partition: str | None) -> list[str]:
    """The partition asked for, or all test partitions. Raises ConfigError if there are none."""
    partitions = [partition] if partition else run.source.partitions("test")
    if not partitions:
        raise ConfigError("data.split has no test rows; name a test day or share, or pass --partition")
    return partitions


def scored_table(run: Run, bundle: Bundle, partitions: Sequence[str]) -> pl.DataFrame:
    """Keys, labels, slices, known truth and probabilities of the good rows of raw partitions."""
    labels = {carried(label): label for label in run.labels}
    carry = list(dict.fromkeys([*run.data.key, *labels, *run.evaluate.columns]))
    parts: list[pl.DataFrame] = []
    for partition in partitions:
        good = run.source.checked(partition).filter(pl.col(REASON).is_null())
        parts += list(score(bundle, good, carry=carry))
    if not parts or not sum(p.height for p in parts):
        raise DataError(
            f"{', '.join(partitions)}: {run.data.path} has no rows to measure on; check the path and data.split"
        )
    # A label may be called like a raw column that is carried too: then the label is meant.
    table = pl.concat(parts)
    return table.drop([name for name in labels.values() if name in table.columns]).rename(labels)


def measure(run: Run, outputs: Sequence[Output], scored: pl.DataFrame) -> pl.DataFrame:
    """The metrics of every question and, where the truth is known, of the truth itself: the noise floor.

    Raises ConfigError on a setting of [evaluate] for an output that the model does not give.
    """
    names = [o.name for o in outputs]
    for setting in ("truth", "entire_space"):
        if unknown := [n for n in getattr(run.evaluate, setting) if n not in names]:
            hint = did_you_mean(unknown[0], names, f"; the outputs are {', '.join(names)}")
            raise ConfigError(f"evaluate.{setting}: {unknown[0]!r} is no output of {run.model.name}{hint}")
    asked = questions(run, outputs)
    truth = [o.model_copy(update={"name": c}) for o in asked if (c := run.evaluate.truth.get(o.name))]
    return metrics.evaluate(scored, [*asked, *truth], by=run.evaluate.slices, user=run.evaluate.user)


def questions(run: Run, outputs: Sequence[Output]) -> list[Output]:
    """Every output in its own space, then those whose label is known on all impressions in the entire space."""
    known = run.evaluate.entire_space
    return [*outputs, *(Output(name=o.name, label=known[o.name]) for o in outputs if o.name in known)]
