"""A run file: everything that one model, from log to scores, is decided by."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from base.config import Config
from features.pipeline import FeaturePipeline
from features.source import Data, Source, Table
from features.transforms import AnyTransform
from recsys.device import DeviceName
from recsys.gate import Gates
from recsys.models import ModelConfig
from recsys.trainer import TrainConfig


class Evaluation(Config):
    """What else to measure than the whole."""

    slices: tuple[str, ...] = ()
    """Raw columns: metrics for each of their values."""
    user: str | None = None
    """Raw column of the user: AUC within users as well."""
    truth: dict[str, str] = {}
    """By label, a raw column with its known probability, as synthetic logs have: the noise floor of every metric."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of raw columns whose joint effect the report draws, observed beside predicted."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All raw columns that it needs, derived ones included."""
        user = () if self.user is None else (self.user,)
        return (*self.slices, *user, *self.truth.values(), *(column for pair in self.pairs for column in pair))


class Registry(Config):
    """Where MLflow is."""

    uri: str | None = None
    """Tracking and registry URI; by default a SQLite file in the output folder."""
    experiment: str = "ctr"
    model: str = "ctr"
    """Name of the registered model."""


class Run(Config):
    """The root of a run file."""

    name: str | None = None
    """Name of this model among those of the same output folder; by default that of the model."""
    output: Path
    """Folder for everything that is made."""
    data: Data
    tables: tuple[Table, ...] = ()
    derive: dict[str, str] = {}
    """Further raw columns, each a SQL expression over one row."""
    features: Annotated[tuple[AnyTransform, ...], Field(min_length=1)]
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    device: DeviceName = "auto"
    """Where to train, evaluate and score; `auto` is CUDA where there is one."""
    evaluate: Evaluation = Evaluation()
    gate: Gates = Gates()
    mlflow: Registry = Registry()

    @property
    def source(self) -> Source:
        return Source(self.data, self.tables, self.derive)

    @property
    def pipeline(self) -> FeaturePipeline:
        return FeaturePipeline(self.features, self.derive)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.data.labels)

    @property
    def tracking_uri(self) -> str:
        return self.mlflow.uri or f"sqlite:///{(self.output / 'mlflow.db').absolute()}"

    @property
    def features_path(self) -> Path:
        return self.output / "features"

    def examples_path(self, partition: str) -> Path:
        return self.output / "examples" / partition

    def scores_path(self, partition: str) -> Path:
        return self.output / "scores" / partition

    @property
    def folder(self) -> Path:
        """Of this model: its training state, bundle, evaluations and report."""
        return self.output / "models" / (self.name or self.model.name)

    @property
    def bundle_path(self) -> Path:
        return self.folder / "bundle"

    def evaluation_path(self, partition: str) -> Path:
        return self.folder / "evaluation" / partition

    @property
    def report_path(self) -> Path:
        return self.folder / "report"
