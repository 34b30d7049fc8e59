"""The part of a run file that decides features and examples. Steps that need no more read it without torch."""

from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from base.config import Config, Name, checked_name
from base.errors import ConfigError
from features.pipeline import FeaturePipeline
from features.schema import NewRows
from features.source import Data, Source, Table
from features.split import Day, DaySplit, EachDay, days_of
from features.transforms import AnyTransform


class Daily(Config):
    """How a model lives from day to day: what `--day` means.

    For day d the model is trained to d - 2, calibrated on d - 1, and judged on d, which nothing has been trained on.
    """

    window_days: PositiveInt = 7
    """Days that a full training learns from. As long, a row waits between its id's retirement and its next id; and so
    far back, from the day that is asked about, a retrieval model's users are known to have seen items."""
    new_rows: NewRows = "mean"
    """How the row of a new id begins: at the `mean` of its table, or at a draw by a `hash` of its number."""
    accumulator_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Multiplies Adagrad's sums once a day. At 1 popular ids hardly move any more after some weeks."""
    observed_days: NonNegativeInt = 0
    """How long after a day its run takes place: outcomes up to then are in the log."""


def _on_a_filesystem(value: Any) -> Any:
    if "://" in str(value):
        raise ValueError(
            f"{str(value)!r} is not on a filesystem: publishing needs atomic renames and links, which object stores do "
            "not have; name a folder that all machines mount"
        )
    if "\0" in str(value):
        raise ValueError(f"{str(value)!r} holds a NUL, which no path can; remove it")
    return value


class FeatureRun(Config):
    """A run file as the steps on features see it: what belongs to models stands there unread."""

    name: Name | None = None
    """Name of this model among those of the same output folder; by default that of the model."""
    output: Annotated[Path, BeforeValidator(_on_a_filesystem)]
    """Folder for everything that is made; several machines may share it over a POSIX filesystem."""
    data: Data
    tables: tuple[Table, ...] = ()
    derive: dict[str, str] = {}
    """Further raw columns, each a SQL expression over one row."""
    features: Annotated[tuple[AnyTransform, ...], Field(min_length=1)]
    daily: Daily = Daily()
    day: Day | None = None
    """The day that a step is run for, set by `--day`; then `data.split` follows from it."""
    full: bool = False
    """Set by `--full`: fit and train from nothing on a window of days, instead of going on from the day before."""
    model: Any
    train: Any = None
    sparsity: Any = None
    ssl: Any = None
    retrieval: Any = None
    """Where it is given, the run's rows are those whose first label is 1."""
    index: Any = None
    recommend: Any = None
    sampling: Any = None
    calibrate: Any = None
    device: Any = None
    evaluate: Any = None
    gate: Any = None
    mlflow: Any = None
    checks: Any = None

    @field_validator("features")
    @classmethod
    def _well_named(cls, features: tuple[AnyTransform, ...]) -> tuple[AnyTransform, ...]:
        """Of a run file only: a Bundle's features keep the names that they were made with."""
        for feature in features:
            try:
                checked_name(feature.output)
            except ValueError as error:
                raise ValueError(f'{feature.kind} of {", ".join(feature.sources)}: {error}, in name = "…"') from None
        FeaturePipeline(features)  # which refuses the same name twice
        return features

    @model_validator(mode="after")
    def _logs_are_files(self) -> Self:
        if "://" in self.data.path:
            raise ConfigError(f"data.path = {self.data.path!r}: logs are read from a filesystem; mount or copy them")
        return self

    def on(self, day: date, *, full: bool = False) -> Self:
        """This run as it is on one day. Raises ConfigError if the log is not split by day."""
        if not self.data.split.by_day or self.data.time is None:
            raise ConfigError("--day needs a log with data.time, split by day; data.split = { train = 0.8, … } is not")
        trained_to = self.data.day_before(day, 2)
        first = self.data.day_before(trained_to, self.daily.window_days - 1) if full else trained_to
        split = DaySplit(train=f"{first}..{trained_to}", valid=str(self.data.day_before(day)), test=str(day))
        observed = str(day + timedelta(days=self.daily.observed_days))
        seen = {"observed_until": observed} if self.data.matures_after_days else {}
        data = self.data.model_copy(update={"split": split, **seen})
        return self.model_copy(update={"data": data, "day": str(day), "full": full})

    def at(self, partition: str) -> Self:
        """This run as it is on the day of a partition, where days have no roles; otherwise itself."""
        if not isinstance(self.data.split, EachDay) or not partition.startswith("day="):
            return self
        try:
            return self.on(date.fromisoformat(partition.removeprefix("day=")))
        except ValueError:
            return self  # the source says what is wrong with the name

    @property
    def source(self) -> Source:
        """The log. Of a retrieval run only positive rows are learned from, counted and asked about."""
        return Source(self.data, self.tables, self.derive, positive=self.positive)

    @property
    def positive(self) -> str | None:
        """The label that a retrieval run's rows have."""
        return None if self.retrieval is None else self.labels[0]

    @property
    def pipeline(self) -> FeaturePipeline:
        return FeaturePipeline(self.features, self.derive)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.data.labels)

    @property
    def on_day(self) -> date:
        """Of `day`. Raises ConfigError where the step was not given one."""
        if self.day is None:
            raise ConfigError("this step is run for a day: pass --day 2026-03-07")
        return days_of(self.day)[0]

    @property
    def trained_to(self) -> date:
        """The last day that the model of `day` may have seen."""
        return self.data.day_before(self.on_day, 2)

    @property
    def features_path(self) -> Path:
        return self.output / "features"

    def examples_path(self, partition: str) -> Path:
        return self.output / "examples" / partition

    @property
    def line_path(self) -> Path:
        """Which line daily steps go on with."""
        return self.output / "line"

    def checks_path(self, partition: str) -> Path:
        return self.output / "checks" / partition

    def counts_path(self, partition: str) -> Path:
        return self.output / "counts" / partition
