"""The only thing that crosses from training to anything else: weights, features, schema, configuration, proof."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from base.config import Config
from base.errors import ArtefactError, DataError
from base.storage import Staging, dump_json, is_published, publish, resolve, verify
from features.pipeline import FittedPipeline
from features.profile import Reference
from features.schema import Output, Schema
from features.split import Day
from recsys.calibration import Calibrator, calibrated
from recsys.data import IdCount, IdPolicy, batches, to_columns
from recsys.device import CPU, denormals_flushed
from recsys.models import Model, ModelConfig, build_model
from recsys.sparsity.config import Sparsity
from recsys.sparsity.tables import SparseTables
from recsys.tensors import load_tensors, save_tensors

KIND = "bundle"
_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
_CALIBRATORS: TypeAdapter[dict[str, Calibrator]] = TypeAdapter(dict[str, Calibrator])
_ROWS = "golden.parquet"
_CALIBRATION = "calibration.json"
_PROFILE = "profile.json"
_SPARSITY = "sparsity.json"
_GOLDEN_TOLERANCE = 1e-6


class Origin(Config):
    """Which days a bundle has seen; all None where days play no part."""

    day: Day | None = None
    """The day that it was made to be judged on."""
    line: str | None = None
    """The day of the full training that its ids go back to."""
    trained_to: Day | None = None
    """The last day that it was trained on."""
    calibrated_on: Day | None = None
    """The day that it was calibrated or, a retrieval model, measured on, and whose rows are its golden ones."""


NOWHERE = Origin()
"""Of a bundle that knows no days."""


@dataclass(frozen=True)
class Bundle:
    """A trained model with everything needed to score raw rows."""

    model: Model
    model_config: ModelConfig
    features: FittedPipeline
    schema: Schema
    settings: Mapping[str, Any]
    """The resolved configuration of the run."""
    metrics: Mapping[str, Any]
    """What was measured on the validation rows, per evaluation."""
    golden: pl.DataFrame
    """A few raw rows with the probabilities they must get."""
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict[str, Calibrator])
    """By output: what turns the model's probability into a calibrated one; applied wherever the bundle scores."""
    profile: Reference | None = None
    """What the rows looked like that it was trained on, and held-out ones: what later days are compared with."""
    origin: Origin = NOWHERE
    sparsity: Sparsity | None = None
    """Of its tables; None if they are dense."""
    version: str = ""
    """Content hash of the stored bundle; empty before it is saved."""
    device: torch.device = CPU
    """Where it computes."""

    def to(self, device: torch.device) -> "Bundle":
        """The same bundle, computing on `device`."""
        return replace(self, model=self.model.to(device), device=device)

    @property
    def outputs(self) -> Sequence[Output]:
        """The probabilities it gives."""
        return self.model.outputs

    @property
    def inputs(self) -> tuple[str, ...]:
        """The raw columns it needs."""
        return self.features.recipe.inputs

    @property
    def no_scores(self) -> pl.DataFrame:
        """The probabilities of no rows."""
        return pl.DataFrame(schema={o.name: pl.Float32 for o in self.outputs})

    def predict(
        self, frame: pl.LazyFrame, *, batch_size: int = 8192, policy: IdPolicy = "error", count: IdCount | None = None
    ) -> Iterator[pl.DataFrame]:
        """Probabilities of raw rows, in their order, one frame per batch; columns are the outputs, Float32.

        Raises DataError if a column is missing or of another kind than in training.
        """
        examples = self.features.transform(frame).collect(engine="streaming")
        yield from self.predict_examples(examples, batch_size=batch_size, policy=policy, count=count)

    def predict_examples(
        self,
        examples: pl.DataFrame,
        *,
        batch_size: int,
        policy: IdPolicy = "error",
        count: IdCount | None = None,
        log_odds: bool = False,
    ) -> Iterator[pl.DataFrame]:
        """The same from rows that the bundle's own features have transformed.

        With `log_odds` each output's log(p / (1 - p)) follows as `log_odds_of` it, Float64 and not calibrated.
        """
        columns = to_columns(examples, self.schema, labels=False, policy=policy, count=count)
        names = [o.name for o in self.outputs]
        self.model.eval()
        for batch in batches(columns, batch_size):
            with torch.no_grad(), denormals_flushed():
                logits_BL = self.model(batch.to(self.device))
                p_BO = self.model.probabilities(logits_BL).float().cpu().numpy()
                odds_BO = None
                if log_odds or self.calibrators:
                    odds_BO = self.model.log_odds(logits_BL).cpu().numpy()
            wrong_BO = ~np.isfinite(p_BO if odds_BO is None else p_BO + odds_BO)
            if wrong_BO.any():
                raise DataError(f"{wrong_BO.sum()} of {p_BO.size} probabilities are not finite; do not publish")
            found: dict[str, NDArray[Any]] = {}
            for i, name in enumerate(names):
                found[name] = p_BO[:, i]
                if odds_BO is not None and name in self.calibrators:
                    found[name] = calibrated(self.calibrators[name], p_BO[:, i], odds_BO[:, i])
            if log_odds and odds_BO is not None:
                found |= {log_odds_of(name): odds_BO[:, i] for i, name in enumerate(names)}
            yield pl.DataFrame(found)

    def check_golden(self) -> None:
        """Score the golden rows again. Raises ArtefactError if one differs by more than 1e-6."""
        if self.golden.is_empty():
            return
        found = pl.concat(self.predict(self.golden.lazy()))
        for output in self.outputs:
            difference = (found[output.name] - self.golden[f"@{output.name}"]).abs().max()
            if difference is None or not float(difference) <= _GOLDEN_TOLERANCE:  # pyright: ignore[reportArgumentType]
                raise ArtefactError(
                    f"bundle {self.version}: {output.name} of its golden rows differs by {difference}; this machine or "
                    "these library versions do not compute what was trained: see `recsys doctor`"
                )

    def save(self, target: Path, *, overwrite: bool = False) -> "Bundle":
        """Publish the bundle as `target` and return it as loaded from there."""
        with publish(target, KIND, overwrite=overwrite) as staging:
            self._write(staging)
        return Bundle.load(target)

    def _write(self, staging: Staging) -> None:
        save_tensors(staging, "weights", self.model.state_dict())
        self.features.save(staging, prefix="features/")
        about = {
            "schema": self.schema.model_dump(mode="json"),
            "model": self.model_config.model_dump(mode="json"),
            "settings": self.settings,
            "metrics": self.metrics,
            "origin": self.origin.model_dump(mode="json"),
        }
        if self.calibrators:
            about["calibration"] = {name: c.model_dump(mode="json") for name, c in self.calibrators.items()}
        if self.sparsity is not None:
            about["sparsity"] = self.sparsity.model_dump(mode="json")
        if self.profile is not None:
            about["profile"] = self.profile.model_dump(mode="json")
        for name, value in about.items():
            (staging / f"{name}.json").write_bytes(dump_json(value))
        self.golden.write_parquet(staging / _ROWS)
        staging.about["features"] = self.features.version

    @classmethod
    def load(cls, target: Path) -> "Bundle":
        """Read a bundle, published or copied. Raises ArtefactError naming what is missing, altered or mismatched."""
        if not is_published(target):
            raise ArtefactError(f"{target}: there is no trained model there; run `recsys train` first")
        folder = resolve(target, KIND)
        manifest = verify(folder)
        features = FittedPipeline.load(folder / "features")
        if features.version != manifest.about.get("features"):
            raise ArtefactError(
                f"{folder / 'features'}: is version {features.version}, but the model was trained with "
                f"{manifest.about.get('features')}; take both from the same run"
            )
        schema = _json(folder / "schema.json", Schema.model_validate)
        if (schema.dense, schema.sparse) != (features.dense, features.sparse):
            raise ArtefactError(
                f"{folder / 'schema.json'}: does not describe the stored features; take both from one run"
            )
        config = _json(folder / "model.json", _MODEL.validate_python)
        sparsity = _json(folder / _SPARSITY, Sparsity.model_validate) if _SPARSITY in manifest.files else None
        weights = load_tensors(folder / "weights")
        model = load_model(config, schema, weights, where=folder / "weights", sparsity=sparsity)
        return cls(
            model=model,
            model_config=config,
            features=features,
            schema=schema,
            settings=_json(folder / "settings.json"),
            metrics=_json(folder / "metrics.json"),
            golden=_table(folder / _ROWS),
            origin=_json(folder / "origin.json", Origin.model_validate),
            calibrators=_calibrators(folder) if _CALIBRATION in manifest.files else {},
            profile=_json(folder / _PROFILE, Reference.model_validate) if _PROFILE in manifest.files else None,
            sparsity=sparsity,
            version=manifest.version,
        )


def load_model(
    config: ModelConfig,
    schema: Schema,
    weights: Mapping[str, Tensor],
    *,
    where: Path,
    sparsity: Sparsity | None = None,
) -> Model:
    """A plain, unsharded model with these weights. Raises ArtefactError if they are not exactly the model's."""
    model = build_model(config, schema, table_device="meta", sparsity=sparsity)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for module, tables in model.named_modules():
        if isinstance(tables, SparseTables):  # how many rows have how many weights, the weights say
            mine = {name: t for name, t in weights.items() if name.startswith(f"{module}.")}
            tables.adopt({name.removeprefix(f"{module}."): t for name, t in mine.items()}, where)
            weights = {name: t for name, t in weights.items() if name not in mine}
            expected = {name: shape for name, shape in expected.items() if not name.startswith(f"{module}.")}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ArtefactError(
                f"{where}: {name} is {found.get(name, 'missing')}, the model needs {expected.get(name, 'none')}; "
                "weights and configuration belong to different runs"
            )
    model.load_state_dict(dict(weights), strict=True, assign=True)
    return model.eval()


def log_odds_of(output: str) -> str:
    """Name of the column of an output's log-odds."""
    return f"@log_odds {output}"


def _calibrators(folder: Path) -> dict[str, Calibrator]:
    return _json(folder / _CALIBRATION, _CALIBRATORS.validate_python)


def golden_rows(bundle: Bundle, raw: pl.DataFrame) -> pl.DataFrame:
    """Raw rows with the probabilities `bundle` gives them as `@p_...`."""
    rows = raw.select(bundle.inputs)
    scores = pl.concat(bundle.predict(rows.lazy()))
    return rows.hstack([scores[o.name].alias(f"@{o.name}") for o in bundle.outputs])


def _json(path: Path, parse: Callable[[Any], Any] = lambda value: value) -> Any:
    try:
        return parse(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:  # also what pydantic says of a bundle that another version wrote
        first = str(error).splitlines()[0]
        raise ArtefactError(f"{path}: cannot be read ({first}); restore or rebuild the bundle") from None


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); restore or rebuild the bundle") from None
