"""A run file: everything that one model, from log to scores, is decided by."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from base.config import Config, Name
from base.errors import ConfigError
from base.masking import has_password, masked
from features.pipeline import FittedPipeline
from features.schema import Schema
from features.source import Files
from features.transforms import Vocabulary
from pipelines.settings import FeatureRun
from recsys.calibration import Method
from recsys.contrast.config import SelfSupervision
from recsys.contrast.corpus import require_item
from recsys.contrast.task import require_trainable
from recsys.device import DeviceName
from recsys.gate import Gates, RetrievalGates
from recsys.models import ModelConfig
from recsys.models.funnel import FunnelConfig, require_funnel
from recsys.models.two_tower import TwoTowerConfig
from recsys.retrieval import Cuts
from recsys.sparsity.config import Sparsity
from recsys.trainer import TrainConfig
from serving.drift import Checks
from serving.index import ExactConfig, IndexConfig


class EntireSpace(Config):
    """What is known of an output on all impressions, beyond the rows that it speaks of."""

    label: str
    """A raw 0/1 column: what would have followed a click, as synthetic logs know, or what users said of items shown at
    random. Rows where it is null do not count."""
    truth: str | None = None
    """A raw column with its known probability."""


def _by_label(value: Any) -> Any:
    """`entire_space = { p_x = "column" }` for `{ p_x = { label = "column" } }`."""
    return (
        {k: {"label": v} if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value
    )


class Evaluation(Config):
    """What else to measure than the whole."""

    slices: tuple[str, ...] = ()
    """Raw columns: metrics for each of their values."""
    user: str | None = None
    """Raw column of the user: AUC within users as well."""
    truth: dict[str, str] = {}
    """By output, a raw column with its known probability, as synthetic logs have: the noise floor of every metric."""
    entire_space: Annotated[dict[str, EntireSpace], BeforeValidator(_by_label)] = {}
    """By output that presupposes a label: what is known of it on all impressions."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of raw columns whose joint effect the report draws, observed beside predicted."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All raw columns that it needs, derived ones included."""
        user = () if self.user is None else (self.user,)
        entire = [c for e in self.entire_space.values() for c in (e.label, e.truth) if c is not None]
        known = (*self.truth.values(), *entire)
        return (*self.slices, *user, *known, *(column for pair in self.pairs for column in pair))


class Sampling(Config):
    """Down-sampling in training; scores are corrected for it exactly."""

    negative_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows without a click (the first label) that training keeps, drawn anew every epoch."""


class Calibration(Config):
    """A map from the model's probabilities to those of a held-out day, fitted after training and kept in the bundle."""

    method: Method
    partition: str | None = None
    """By default the validation rows. It may be neither trained nor tested on."""
    outputs: tuple[str, ...] | None = None
    """By default all. Each is calibrated by itself, so that a product need not stay one."""


class Retrieval(Cuts):
    """Who asks for items, which items there are, and how rankings of them are measured."""

    user: str
    """Raw column of the user."""
    item: str
    """Raw column of the item; a vocabulary feature of it counts the items and tells them apart."""
    items: Annotated[Files | None, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)] = None
    """The corpus, a row per item, to which [[tables]] are joined; by default the items of the log's positive rows, up
    to those that are measured."""

    @property
    def cuts(self) -> Cuts:
        return Cuts(k=self.k, head=self.head, torso=self.torso)


class SecondStage(Config):
    """Another run's model, which puts the candidates in order."""

    config: Path
    """Its run file, relative to the working directory."""
    model: str = "champion"
    """An alias, a version number, or a bundle's folder."""
    by: str | None = None
    """The output to order by; by default its first."""


class Recommend(Config):
    """How many items a user is given, and what they have seen of them."""

    k: PositiveInt = 20
    candidates: PositiveInt | None = None
    """How many the ranking chooses from; by default 10 × k, or the whole corpus if it is smaller."""
    seen_days: PositiveInt | None = None
    """In a log split by day, positive rows of so many days before are what a user has seen; by default of all."""
    ranking: SecondStage | None = None
    """Without one, the items are in the order of their similarity."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.candidates is not None and self.ranking is None:
            raise ConfigError("recommend.candidates are what recommend.ranking chooses from; name one, or leave it out")
        if self.candidates is not None and self.candidates < self.k:
            raise ConfigError(f"recommend.candidates = {self.candidates}: fewer than recommend.k = {self.k}")
        return self

    def depth(self, items: int) -> int:
        """How many items are looked up for a user. Raises ConfigError where a corpus of so many has fewer."""
        for name, number in (("k", self.k), ("candidates", self.candidates or 0)):
            if number > items:
                raise ConfigError(f"recommend.{name} = {number}: the corpus has {items} items; ask for fewer")
        return self.k if self.ranking is None else self.candidates or min(10 * self.k, items)


_LOG_IN = "leave user and password out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def _address(uri: str) -> str:
    """An address that MLflow can have. Raises ValueError, which repeats no password."""
    if not re.match(r"https?://|sqlite:///|(postgresql|mysql|mssql)(\+\w+)?://", uri):
        raise ValueError(
            f"{_quoted(uri)} is no address of MLflow; write http://…, https://…, sqlite:///FILE, "
            "postgresql+psycopg2://… or mysql+pymysql://…"
        )
    if not uri.startswith("sqlite"):
        if re.search(r"\s", uri):
            raise ValueError("the address holds a blank; write it as %20")
        # SQLAlchemy takes the password to end at the first @, and drivers tell the rest as the host's name.
        if uri.partition("?")[0].count("@") > 1:
            raise ValueError("the address holds more than one @; write those of user and password as %40")
    if uri.startswith("http") and has_password(uri):
        raise ValueError(f"{masked(uri)!r} holds a password, which MLflow would print; {_LOG_IN}")
    return uri


def _quoted(text: str) -> str:
    """What is no address, to be shown; not where an @ says that it may hold a password in a place of its own."""
    return "what is given" if "@" in text else repr(masked(text))


def _without_password(uri: str) -> str:
    """An address as it may stand in a run file, from where it goes into Bundles, logs and reports."""
    if uri.startswith("$"):
        if not re.fullmatch(r"\$[A-Za-z_]\w*", uri) or uri == "$MLFLOW_TRACKING_URI":
            raise ValueError(
                f"{_quoted(uri)} is no environment variable that can hold an address: MLflow itself writes "
                'MLFLOW_TRACKING_URI, and a name is letters, digits and _; write "$RECSYS_MLFLOW_URI", for instance'
            )
        return uri
    if has_password(_address(uri)):
        raise ValueError(
            f"{masked(uri)!r} holds a password, which every Bundle would keep; put the address into an environment "
            'variable and write "$RECSYS_MLFLOW_URI", for instance, or leave the password to ~/.pgpass or PGPASSWORD '
            "(PostgreSQL)"
        )
    return uri


def _in_addresses(name: str) -> str:
    if ":" in name:
        raise ValueError(f"{name!r} holds ':', which MLflow's models:/… cannot; leave it out")
    return name


class Registry(Config):
    """Where MLflow is."""

    uri: Annotated[str, AfterValidator(_without_password)] | None = None
    """Tracking and registry URI, or `$NAME` of the environment variable that holds it, which is for addresses with a
    password; by default a SQLite file in the output folder."""
    experiment: Annotated[str, Field(min_length=1)] = "ctr"
    model: Annotated[Name, AfterValidator(_in_addresses)] = "ctr"
    """Name of the registered model."""
    reference_above_mb: NonNegativeFloat = 500
    """A larger Bundle is not uploaded: MLflow keeps where its published folder lies, which must be mounted wherever
    the model is used."""


class Run(FeatureRun):
    """The root of a run file."""

    model: ModelConfig
    train: TrainConfig = TrainConfig()
    sparsity: Sparsity | None = None
    """Tables of which only a share of the weights exists; by default they are dense."""
    ssl: SelfSupervision | None = None
    """A self-supervised task over the items beside the main one."""
    retrieval: Retrieval | None = None
    index: IndexConfig = ExactConfig()
    recommend: Recommend = Recommend()
    sampling: Sampling = Sampling()
    calibrate: Calibration | None = None
    device: DeviceName = "auto"
    """Where to train, evaluate and score; `auto` is CUDA where there is one."""
    evaluate: Evaluation = Evaluation()
    gate: Gates = Gates()
    checks: Checks = Checks()
    mlflow: Registry = Registry()

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        labels, funnel = tuple(self.data.labels), self.data.funnel
        if isinstance(self.model, FunnelConfig):
            require_funnel(self.model.name, labels, funnel)
        if self.sampling.negative_rate < 1 and len(labels) > 1 and set(funnel) != set(labels):
            raise ConfigError(
                f"sampling.negative_rate = {self.sampling.negative_rate}: scores can be corrected for one label, or "
                f"for a funnel of all of them; data.labels are {list(labels)}, data.funnel is {list(funnel)}"
            )
        return self

    @model_validator(mode="after")
    def _sparsity_fits(self) -> Self:
        if self.sparsity is not None and self.train.processes > 1:
            raise ConfigError(
                f"train.processes = {self.train.processes}: sparse tables are trained by one process; set it to 1, or "
                "leave [sparsity] out"
            )
        return self

    @model_validator(mode="after")
    def _ssl_fits(self) -> Self:
        if self.ssl is None:
            return self
        require_trainable(self.model, self.train.processes)
        if isinstance(self.model, TwoTowerConfig) and self.ssl.item is not None:
            raise ConfigError("ssl.item: what the item of a two-tower model is, model.item says; leave it out")
        require_item(self.ssl, self.ssl_item, tuple(t.output for t in self.features))
        return self

    @model_validator(mode="after")
    def _retrieval_fits(self) -> Self:
        of_ranking = self.train.monitor in ("recall", "ndcg")
        if not isinstance(self.model, TwoTowerConfig):
            of_gate = self.gate.retrieval != RetrievalGates()
            if self.retrieval is not None or of_ranking or of_gate:
                what = f'train.monitor = "{self.train.monitor}"' if of_ranking else "gate.retrieval"
                what = "retrieval" if self.retrieval else what
                raise ConfigError(f'{what} is of two-tower models; model.name is "{self.model.name}"')
            for what, is_given in (
                ("index", self.index != ExactConfig()),
                ("recommend", self.recommend != Recommend()),
            ):
                if is_given:
                    raise ConfigError(f'{what} is of two-tower models; model.name is "{self.model.name}"')
            return self
        if self.retrieval is None:
            raise ConfigError('model.name = "two_tower" needs [retrieval]: user = "…", item = "…"')
        if not of_ranking:
            raise ConfigError(
                f'train.monitor = "{self.train.monitor}": a two-tower model is measured by "recall" or "ndcg"'
            )
        unfit = {
            "sampling.negative_rate": self.sampling != Sampling(),
            "calibrate": self.calibrate is not None,
            "evaluate": self.evaluate != Evaluation(),
            "gate.outputs": bool(self.gate.outputs),
        }
        if given := [name for name, is_given in unfit.items() if is_given]:
            raise ConfigError(f"{given[0]} speaks of probabilities, and a two-tower model gives none; leave it out")
        _ = self.item_feature
        return self

    @property
    def ssl_item(self) -> tuple[str, ...]:
        """Names of the item's features. Raises ConfigError if nothing says them."""
        if isinstance(self.model, TwoTowerConfig):
            return self.model.item
        if self.ssl is None or self.ssl.item is None:
            raise ConfigError('[ssl] needs item = ["…"]: the features that describe the item alone')
        return self.ssl.item

    @property
    def item_feature(self) -> str:
        """Name of the feature that tells items apart and counts them. Raises ConfigError if there is none."""
        assert self.retrieval is not None
        column = self.retrieval.item
        for t in self.features:
            if isinstance(t, Vocabulary) and t.column == column and t.min_count == 1 and not (t.is_bag or t.max_size):
                return t.output
        raise ConfigError(
            f'retrieval.item = "{column}": give it a feature with kind = "vocabulary" and min_count = 1, which tells '
            "items apart and counts them; model.item need not name it"
        )

    @model_validator(mode="after")
    def _checks_fit(self) -> Self:
        if self.checks.overrides:
            features = tuple(t.output for t in self.features)
            self.checks.require_names(features, self.pipeline.inputs, self.labels)
        return self

    def schema_of(self, fitted: FittedPipeline) -> Schema:
        """The contract of this run's examples."""
        rate = self.sampling.negative_rate
        item = None if self.retrieval is None else self.item_feature
        return fitted.schema(self.data.key, self.labels, funnel=self.data.funnel, negative_rate=rate, item=item)

    @property
    def tracking_uri(self) -> str:
        """Where MLflow is; it may hold a password. Raises ConfigError if the environment does not say."""
        uri = self.mlflow.uri
        if uri is None:
            return f"sqlite:///{(self.output / 'mlflow.db').absolute()}"
        if not uri.startswith("$"):
            return uri
        named = os.environ.get(uri[1:])
        if not named:
            raise ConfigError(
                f"mlflow.uri = {uri!r}: that environment variable is not set; export MLflow's address in it"
            )
        try:
            return _address(named)
        except ValueError as error:
            raise ConfigError(f"mlflow.uri = {uri!r}: {error}") from None

    @property
    def key(self) -> str | None:
        """Name of this model among those of the other days."""
        return self.day and f"{self.day}-full" if self.full else self.day

    def scores_path(self, partition: str) -> Path:
        return self.output / "scores" / partition

    @property
    def folder(self) -> Path:
        """Of this model: its training state, bundle, evaluations and report."""
        name = self.name or self.model.name
        return self.output / "models" / (f"{name}-full" if self.full else name)

    @property
    def training_lock(self) -> Path:
        """Whoever trains this model holds it. It is no part of `folder`, which a refused training does not make."""
        return self.output / "training" / self.folder.name

    @property
    def bundle_path(self) -> Path:
        return self.folder / "bundle" if self.day is None else self.folder / "bundles" / f"day={self.day}"

    @property
    def index_path(self) -> Path:
        return self.folder / "index"

    def recommendations_path(self, partition: str) -> Path:
        return self.output / "recommendations" / partition

    def evaluation_path(self, partition: str) -> Path:
        return self.folder / "evaluation" / partition

    def ranking_path(self, partitions: Sequence[str], *, of_champion: bool = False) -> Path:
        """What a retrieval model, or the champion beside it, is asked about partitions."""
        ends = dict.fromkeys((partitions[0], partitions[-1]))
        name = f"{self.folder.name}-champion" if of_champion else self.folder.name
        return self.output / "rankings" / name / "..".join(ends)

    def gate_path(self, partition: str) -> Path:
        """Of the last verdict on a version of this model."""
        return self.folder / "gate" / partition

    @property
    def report_path(self) -> Path:
        return self.folder / "report" if self.day is None else self.folder / "reports" / f"day={self.day}"
