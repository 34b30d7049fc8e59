"""train: prepared examples in; a bundle, an MLflow run and a registered challenger out."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset

import serving.pyfunc as served
from base.errors import DataError
from base.storage import dump_json, read_manifest, resolve
from features.pipeline import FittedPipeline
from features.source import REASON
from pipelines.config import Run
from pipelines.measure import check_outputs, scored_table
from pipelines.prepare import examples_of
from pipelines.tracking import registry_of
from recsys import processes
from recsys.bundle import Bundle, golden_rows, load_model
from recsys.calibration import Calibrator, fit_calibrator
from recsys.data import ExampleStream
from recsys.device import pick_device
from recsys.metrics import in_space
from recsys.trainer import Progress, Trained

GOLDEN_ROWS = 64


def train(
    run: Run, *, on_step: Callable[[Progress], None] = lambda _: None, say: Callable[[str], None] = print
) -> Trained:
    """Train, bundle, register. A killed run resumes from its last checkpoint; a finished one is only registered.

    Raises ArtefactError or DataError if nothing suitable is prepared, RegistryError if MLflow does not answer.
    """
    check_outputs(run)
    registry = registry_of(run)  # first: hours of training should not end in a refused connection
    fitted = FittedPipeline.load(resolve(run.features_path, "features", made_by="`recsys prepare`"))
    if fitted.recipe != run.pipeline:
        raise DataError(
            f"{run.features_path}: fitted from other [[features]] or [derive]; run `recsys prepare --overwrite`"
        )
    schema = run.schema_of(fitted)
    training, validation = run.source.partitions("train"), run.source.partitions("valid")
    folders = {
        p: resolve(run.examples_path(p), "examples", made_by="`recsys prepare`") for p in [*training, *validation]
    }
    fit = ExampleStream(
        tuple(examples_of(run, training, fitted)),
        schema,
        run.train.batch_size,
        shuffle=True,
        seed=run.train.seed,
        window=run.train.shuffle_window,
        sampled=True,
    )
    valid = ExampleStream(tuple(examples_of(run, validation, fitted)), schema, run.train.batch_size)
    identity = hashlib.sha256(dump_json({p: f.name for p, f in folders.items()})).hexdigest()
    trained = processes.train(
        run.model,
        schema,
        fit,
        valid,
        run.train,
        run.folder / "training",
        device=pick_device(run.device),
        identity=identity,
        on_step=on_step,
    )
    bundle = _bundle(run, fitted, trained)
    say(
        f"{run.name or run.model.name}: best epoch {trained.best_epoch} of {len(trained.history)}, "
        f"{trained.rows_per_second:,.0f} rows/s, bundle {bundle.version}"
    )
    with registry.run(registry.run_of_training(bundle.version), name=run.name or run.model.name) as active:
        mlflow.set_tag("training", bundle.version)
        _log(run, trained, {p: read_manifest(f).about for p, f in folders.items()})
        registered = registry.register(bundle, resolve(run.bundle_path), Path(served.__file__), active.info.run_id)
    say(f"registered {registry.name} version {registered.version} as challenger")
    return trained


def _bundle(run: Run, fitted: FittedPipeline, trained: Trained) -> Bundle:
    schema = run.schema_of(fitted)
    model = load_model(run.model, schema, trained.weights, where=run.folder / "training")
    bundle = Bundle(
        model=model,
        model_config=run.model,
        features=fitted,
        schema=schema,
        settings=run.model_dump(mode="json"),
        metrics={"best_epoch": trained.best_epoch, "history": trained.history, "curve": trained.curve},
        golden=pl.DataFrame(),
    )
    bundle = replace(bundle, calibrators=_calibrators(run, bundle))
    held_out = run.source.checked(run.source.partitions("valid")[0]).filter(pl.col(REASON).is_null())
    raw = held_out.select(bundle.inputs).head(GOLDEN_ROWS).collect()
    return replace(bundle, golden=golden_rows(bundle, raw)).save(run.bundle_path, overwrite=True)


def _calibrators(run: Run, bundle: Bundle) -> dict[str, Calibrator]:
    """One for each output asked for, from rows that the model has not been trained on."""
    if run.calibrate is None:
        return {}
    wanted = run.calibrate.outputs or [o.name for o in bundle.outputs]
    partition = run.calibrate.partition
    scored = scored_table(run, bundle, [partition] if partition else run.source.partitions("valid"))
    fitted: dict[str, Calibrator] = {}
    for output in bundle.outputs:
        if output.name in wanted:
            rows = scored.filter(in_space(scored, output))
            fitted[output.name] = fit_calibrator(
                run.calibrate.method, rows[output.label], rows[output.name], name=output.name
            )
    return fitted


def _log(run: Run, trained: Trained, examples: dict[str, dict[str, Any]]) -> None:
    """Parameters, metrics per epoch, the resolved configuration, and which data it was."""
    settings = run.model_dump(mode="json")
    parameters = {f"{part}.{key}": value for part in ("model", "train") for key, value in settings[part].items()}
    mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})
    for entry in trained.history:
        mlflow.log_metrics({k: v for k, v in entry.items() if k != "epoch"}, step=int(entry["epoch"]))
    mlflow.log_metrics({"best_epoch": trained.best_epoch})
    if trained.rows_per_second:
        mlflow.log_metric("rows_per_second", trained.rows_per_second)
    mlflow.log_dict(settings, "config.json")
    mlflow.log_dict(examples, "data.json")
    for partition, about in examples.items():
        context = "training" if partition in run.source.partitions("train") else "validation"
        source = HTTPDatasetSource(f"file://{Path(about['raw']['path']).absolute()}")
        digest = about["raw"]["sha256"][:36]
        mlflow.log_input(MetaDataset(source, name=partition, digest=digest), context, {"rows": str(about["rows"])})
