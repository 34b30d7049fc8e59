"""train: prepared examples in; a bundle, an MLflow run and a registered challenger out."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset

import serving.pyfunc as served
from base.errors import DataError
from base.storage import dump_json, exclusive, read_manifest, resolve
from features.pipeline import FittedPipeline
from features.source import REASON
from features.split import DaySplit, days_of
from pipelines.config import Run
from pipelines.examples import examples_of
from pipelines.measure import check_outputs, scored_table
from pipelines.profile import reference_of
from pipelines.rankings import ranking_of, write_ranking
from pipelines.sparse_tables import described, figures, sentence, with_description
from pipelines.tracking import registry_alone, registry_of
from recsys import processes
from recsys.bundle import NOWHERE, Bundle, Origin, golden_rows, load_model, log_odds_of
from recsys.calibration import Calibrator, fit_calibrator
from recsys.contrast.corpus import Corpus
from recsys.data import ExampleStream
from recsys.device import pick_device
from recsys.metrics import evaluate, headline, in_space
from recsys.registry import TRAINING, ModelRegistry, Registered
from recsys.retrieval import Ranking
from recsys.sparsity.soup import soup_of
from recsys.trainer import Progress, Trained, measured

GOLDEN_ROWS = 64


def train(
    run: Run, *, on_step: Callable[[Progress], None] = lambda _: None, say: Callable[[str], None] = print
) -> Trained:
    """Train, bundle, register. A killed run resumes from its last checkpoint; a finished one is only registered.

    One training at a time works in a model's folder: of two at once, the second waits, and finds it finished.
    Raises ArtefactError or DataError if nothing suitable is prepared, RegistryError if MLflow does not answer.
    """
    check_outputs(run)
    registry = registry_of(run)  # first: hours of training should not end in a refused connection
    fitted = FittedPipeline.load(resolve(run.features_path, "features", made_by="`recsys prepare`"))
    if fitted.recipe != run.pipeline:
        raise DataError(
            f"{run.features_path}: fitted from other [[features]] or [derive]; run `recsys prepare --overwrite`"
        )
    with exclusive(run.training_lock, say):
        trained, examples = fit_window(run, fitted, run.examples_path, on_step=on_step)
        split = run.data.split
        origin = Origin(trained_to=str(days_of(split.train)[-1])) if isinstance(split, DaySplit) else NOWHERE
        bundle = make_bundle(run, fitted, trained, run.examples_path, origin)
        _say(run, trained, bundle, say)
        register(run, registry, bundle, trained, examples, say)
    return trained


def fit_window(
    run: Run, fitted: FittedPipeline, path_of: Callable[[str], Path], *, on_step: Callable[[Progress], None]
) -> tuple[Trained, dict[str, dict[str, Any]]]:
    """Train from nothing on the training partitions; also what is known of the examples, by partition."""
    training, validation = run.source.partitions("train"), run.source.partitions("valid")
    folders = {p: resolve(path_of(p), "examples", made_by="`recsys prepare`") for p in [*training, *validation]}
    schema = run.schema_of(fitted)
    fit = ExampleStream(
        tuple(examples_of(run, training, fitted, path_of)),
        schema,
        run.train.batch_size,
        shuffle=True,
        seed=run.train.seed,
        window=run.train.shuffle_window,
        sampled=True,
    )
    counts = None
    if run.retrieval is None:
        valid = ExampleStream(tuple(examples_of(run, validation, fitted, path_of)), schema, run.train.batch_size)
    else:
        valid, counts = ranking_of(run, fitted, validation), fitted.counts_of(run.item_feature)
        folders["ranking"] = valid.folder
    decides: dict[str, Any] = {p: f.name for p, f in folders.items()}
    if run.retrieval is not None:
        decides["k"] = run.retrieval.k  # the first chooses the epoch
    options: Any = {
        "device": pick_device(run.device),
        "identity": hashlib.sha256(dump_json(decides)).hexdigest(),
        "item_counts": counts,
        "corpus": corpus_of(run, fit, valid),
        "on_step": on_step,
    }
    arguments = (run.model, schema, fit, valid, run.train, run.folder / "training")
    # Without what comes after it, so that a finished training can have a soup later.
    sparsity = run.sparsity and run.sparsity.model_copy(update={"soup": None})
    trained = processes.train(*arguments, sparsity=sparsity, **options)
    if run.sparsity is not None and run.sparsity.soup is not None:
        trained = soup_of(trained, *arguments, run.sparsity, run.sparsity.soup, **options)
    return trained, {p: read_manifest(folders[p]).about for p in [*training, *validation]}


def corpus_of(run: Run, fit: ExampleStream, valid: ExampleStream | Ranking | None) -> Corpus | None:
    """Items for [ssl]: those that are ranked, or else the distinct ones of the training rows."""
    if run.ssl is None:
        return None
    if isinstance(valid, Ranking):
        return Corpus(run.ssl, valid.items, run.ssl_item, distinct=False)
    return Corpus(run.ssl, fit, run.ssl_item, distinct=True)


def register(
    run: Run,
    registry: ModelRegistry,
    bundle: Bundle,
    trained: Trained,
    examples: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None],
) -> Registered:
    """Log the run to MLflow and register its bundle as the challenger; once, whatever retries happen."""
    name, tags = run.name or run.model.name, {TRAINING: bundle.version}
    with registry_alone(run, say):
        known = registry.run_of_training(bundle.version)
        with registry.run(known, name=f"{name} {run.key}" if run.key else name, tags=tags) as active:
            _log(run, trained, bundle.metrics["history"], examples)
            if found := described(bundle):
                mlflow.log_metrics(_named(figures(found)))
            registered = registry.register(bundle, resolve(run.bundle_path), Path(served.__file__), active.info.run_id)
    say(f"registered {registry.name} version {registered.version} as challenger")
    return registered


def make_bundle(
    run: Run,
    fitted: FittedPipeline,
    trained: Trained,
    path_of: Callable[[str], Path],
    origin: Origin = NOWHERE,
) -> Bundle:
    """Calibrate, describe sparse tables, take golden rows, publish. Without validation rows in training, they are
    measured here."""
    schema = run.schema_of(fitted)
    where = run.folder / "training"
    model = load_model(run.model, schema, trained.weights, where=where, sparsity=run.sparsity)
    bundle = Bundle(
        model=model,
        model_config=run.model,
        features=fitted,
        schema=schema,
        settings=run.model_dump(mode="json"),
        metrics={"best_epoch": trained.best_epoch, "history": trained.history, "curve": trained.curve},
        golden=pl.DataFrame(),
        origin=origin,
        sparsity=run.sparsity,
    )
    if trained.history and "objective" not in trained.history[-1]:
        last = trained.history[-1] | _measured(run, bundle)
        bundle = replace(bundle, metrics={**bundle.metrics, "history": [*trained.history[:-1], last]})
    bundle = with_description(run, bundle, path_of)
    bundle = replace(bundle, calibrators=_calibrators(run, bundle))
    bundle = replace(bundle, profile=reference_of(run, bundle, path_of))
    held_out = run.source.checked(run.source.partitions("valid")[0]).filter(pl.col(REASON).is_null())
    raw = held_out.select(bundle.inputs).head(GOLDEN_ROWS).collect()
    return replace(bundle, golden=golden_rows(bundle, raw)).save(run.bundle_path, overwrite=True)


def _measured(run: Run, bundle: Bundle) -> dict[str, float]:
    """Metrics on the validation rows; of a retrieval model none where nobody is left to ask."""
    valid = run.source.partitions("valid")
    if run.retrieval is None:
        found = evaluate(scored_table(run, bundle, valid), bundle.outputs)
        return {f"{o.name}.{k}": v for o in bundle.outputs for k, v in headline(found, o.name).items()}
    write_ranking(run, bundle.features, valid, overwrite=True, may_be_empty=True, say=lambda _: None)
    ranking = ranking_of(run, bundle.features, valid)
    if not ranking.rows():
        return {}
    found = measured(bundle.model, ranking, bundle.model, run.train, bundle.device)
    return {name: value for name, value in found.items() if name != "objective"}


def _say(run: Run, trained: Trained, bundle: Bundle, say: Callable[[str], None]) -> None:
    say(
        f"{run.name or run.model.name}: best epoch {trained.best_epoch} of {len(trained.history)}, "
        f"{trained.rows_per_second:,.0f} rows/s, bundle {bundle.version}"
    )
    if found := described(bundle):
        say(sentence(found))


def _calibrators(run: Run, bundle: Bundle) -> dict[str, Calibrator]:
    """One for each output asked for, from rows that the model has not been trained on."""
    if run.calibrate is None:
        return {}
    wanted = run.calibrate.outputs or [o.name for o in bundle.outputs]
    partition = run.calibrate.partition
    scored = scored_table(run, bundle, [partition] if partition else run.source.partitions("valid"), log_odds=True)
    fitted: dict[str, Calibrator] = {}
    for output in bundle.outputs:
        if output.name in wanted:
            rows = scored.filter(in_space(scored, output))
            odds = rows[log_odds_of(output.name)]
            fitted[output.name] = fit_calibrator(
                run.calibrate.method, rows[output.label], rows[output.name], odds, name=output.name
            )
    return fitted


def _log(
    run: Run, trained: Trained, history: Sequence[Mapping[str, float]], examples: Mapping[str, Mapping[str, Any]]
) -> None:
    """Parameters, metrics per epoch, the resolved configuration, and which data it was."""
    settings = run.model_dump(mode="json")
    parameters = {
        f"{part}.{key}": value
        for part in ("model", "train", "sparsity", "ssl")
        for key, value in (settings[part] or {}).items()
    }
    mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})
    for entry in history:
        mlflow.log_metrics(_named({k: v for k, v in entry.items() if k != "epoch"}), step=int(entry["epoch"]))
    mlflow.log_metrics({"best_epoch": trained.best_epoch})
    if trained.rows_per_second:
        mlflow.log_metric("rows_per_second", trained.rows_per_second)
    mlflow.log_dict(settings, "config.json")
    mlflow.log_dict(dict(examples), "data.json")
    for partition, about in examples.items():
        context = "training" if partition in run.source.partitions("train") else "validation"
        source = HTTPDatasetSource(f"file://{Path(about['raw']['path']).absolute()}")
        digest = about["raw"]["sha256"][:36]
        mlflow.log_input(MetaDataset(source, name=partition, digest=digest), context, {"rows": str(about["rows"])})


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """With the letters that MLflow takes: a table of one task among several is called `field@task`."""
    return {re.sub(r"[^\w\-. /]", "_", name): value for name, value in metrics.items()}
