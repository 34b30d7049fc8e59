"""train --day: go on from the state of the day before, or with --full begin anew; then bundle and register.

One training at a time works in an output folder, and days are trained in their order, whatever order runs come in: a
run trains all days that are missing up to its own; a run whose day lies behind what is trained is superseded.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from base.errors import ConfigError, DataError, Superseded
from base.storage import dump_json, exclusive, is_published, publish, read_manifest, resolve, verify, version_name
from features.pipeline import FittedPipeline, changed_rows
from pipelines.config import Run
from pipelines.daily import prepare_day
from pipelines.examples import examples_of
from pipelines.line import Line, adopt, current_line, line_of
from pipelines.measure import check_outputs
from pipelines.rankings import ranking_of, write_ranking
from pipelines.sparse_tables import described, sentence
from pipelines.tracking import registry_of
from pipelines.train import corpus_of, fit_window, make_bundle, register
from recsys import processes
from recsys.bundle import Bundle, Origin
from recsys.checkpoint import WarmStart
from recsys.data import ExampleStream
from recsys.device import pick_device
from recsys.registry import Registered
from recsys.retrieval import Ranking
from recsys.tensors import load_tensors
from recsys.trainer import Progress, Trained

Say = Callable[[str], None]
OnStep = Callable[[Progress], None]


def train_day(run: Run, *, on_step: OnStep = lambda _: None, say: Say = print) -> Registered:
    """Train to two days before the run's day, calibrate on the day before it, register as challenger.

    A retrieval model has nothing to calibrate: that day chooses the epoch of a full training, and measures the others.
    Raises Superseded if later days are trained already, ArtefactError or DataError if a day is not prepared.
    """
    check_outputs(run)
    if run.sparsity is not None and run.sparsity.soup is not None:
        raise ConfigError("sparsity.soup: a daily model goes on from one training, not from a mean; leave it out")
    registry = registry_of(run)  # first: hours of training should not end in a refused connection
    with exclusive(run.output / "training", say), exclusive(run.training_lock, say):
        bundle = _made(run)
        if bundle is None:
            bundle = _make(run, on_step, say)
        else:
            say(f"{run.key}: bundle {bundle.version} is made already")
        line = Line(run.output / "lines" / str(bundle.origin.line))
        if run.full and current_line(run) is None:
            adopt(run, line)  # the first: there is nothing that it could be worse than
        state = line.state_path(run.trained_to)
        if not is_published(state):
            return registry.of_training(bundle.version)  # cleaned since: it was registered long ago
        trained, examples = _read(resolve(state))
        return register(run, registry, bundle, trained, examples, say)


def _made(run: Run) -> Bundle | None:
    """The day's bundle, if it was made with the same settings: what was registered once stays what it is."""
    if not is_published(run.bundle_path):
        return None
    bundle = Bundle.load(run.bundle_path)
    return bundle if _decisive(bundle.settings) == _decisive(run.model_dump(mode="json")) else None


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("data", "tables", "features", "derive", "model", "train", "sparsity", "ssl", "sampling", "calibrate")
    retrieval = settings.get("retrieval") or {}
    slices = ("head", "torso")  # these only say what is told of it
    return {n: settings.get(n) for n in names} | {n: v for n, v in retrieval.items() if n not in slices}


def _make(run: Run, on_step: OnStep, say: Say) -> Bundle:
    if not run.full:
        prepare_day(run, say=say)  # nothing is left to do, unless the line has changed since
    line = line_of(run)
    _refuse_others(run, line)
    state = _full(run, line, on_step, say) if run.full else _in_order(run, line, on_step, say)
    calibrated_on = str(run.data.day_before(run.on_day))
    origin = Origin(day=run.day, line=line.name, trained_to=str(run.trained_to), calibrated_on=calibrated_on)
    bundle = make_bundle(run, line.features(run.trained_to), _read(state)[0], line.examples_path, origin)
    beside = "calibrated" if run.retrieval is None else "measured"
    say(f"{run.key}: trained to {run.trained_to}, {beside} on {calibrated_on}, bundle {bundle.version}")
    if found := described(bundle):
        say(f"{run.key}: {sentence(found)}")
    return bundle


def _refuse_others(run: Run, line: Line) -> None:
    """Two models would go on from each other's states."""
    for day in line.days("states")[-1:]:
        owner = read_manifest(resolve(line.state_path(day), "state")).about["model"]
        if owner != _name(run):
            raise DataError(
                f"line {line.name} in {run.output} is trained as {owner!r}, this run is {_name(run)!r}: give each "
                "daily model an output folder of its own"
            )


def _name(run: Run) -> str:
    return run.name or run.model.name


def _full(run: Run, line: Line, on_step: OnStep, say: Say) -> Path:
    """The state after a training from nothing on the window."""
    target = line.state_path(run.trained_to)
    if is_published(target) and line.days("features")[-1] > run.trained_to:
        say(f"{run.key}: trained already, and the line has gone on from it")
        return resolve(target)
    fitted = line.features(run.trained_to)
    folders = [
        resolve(line.examples_path(p), "examples", made_by="`recsys prepare --full`").name
        for p in (*run.source.partitions("train"), *run.source.partitions("valid"))
    ]
    decides: dict[str, Any] = {part: getattr(run, part).model_dump(mode="json") for part in ("model", "train")}
    if run.sparsity is not None:
        decides["sparsity"] = run.sparsity.model_dump(mode="json")
    if run.ssl is not None:
        decides["ssl"] = run.ssl.model_dump(mode="json")
    if run.retrieval is not None:
        write_ranking(run, fitted, run.source.partitions("valid"), overwrite=True, say=say)
        decides["ranking"] = ranking_of(run, fitted, run.source.partitions("valid")).folder.name
        decides["k"] = run.retrieval.k
    identity = _hash({**decides, "examples": folders, "sampling": run.sampling.negative_rate})
    if is_published(target) and verify(resolve(target, "state")).about["identity"] == identity:
        say(f"{run.key}: trained already")
        return resolve(target)
    trained, examples = fit_window(run, fitted, line.examples_path, on_step=on_step)
    return _keep(run, line, run.trained_to, trained, identity, examples, say)


def _in_order(run: Run, line: Line, on_step: OnStep, say: Say) -> Path:
    """The state of the run's last training day, after one pass over every day that was not trained yet."""
    states = line.days("states")
    if not states:
        raise DataError(
            f"line {line.name}: its full training is not finished; run `recsys train --day {line.name} --full`"
        )
    if run.trained_to < states[-1]:
        raise Superseded(
            f"day {run.day}: its model would be trained to {run.trained_to}, but line {line.name} is trained to "
            f"{states[-1]} already; a later model takes its place"
        )
    if run.trained_to == states[0]:
        raise Superseded(
            f"day {run.day}: the model of the full training that line {line.name} begins with is its model"
        )
    for day in run.data.days(states[-1], run.trained_to):
        if day > states[-1]:
            _pass_over(run, line, day, on_step, say)
    return resolve(line.state_path(run.trained_to), "state", made_by="`recsys train` of a later day")


def _pass_over(run: Run, line: Line, day: date, on_step: OnStep, say: Say) -> None:
    """Train on one day more: one pass, without early stopping, since tomorrow brings the next."""
    partition, before = f"day={day}", line.days("states")[-1]
    state = resolve(line.state_path(before), "state")
    verify(state)
    fitted, known = line.features(day), line.features(before)
    files = examples_of(run, [partition], fitted, line.examples_path)
    schema = run.schema_of(fitted)
    fit = ExampleStream(
        tuple(files),
        schema,
        run.train.batch_size,
        shuffle=True,
        seed=run.train.seed + day.toordinal(),
        window=run.train.shuffle_window,
        sampled=True,
    )
    warm = WarmStart(state, changed_rows(known, fitted), run.daily.new_rows, run.daily.accumulator_decay)
    example = resolve(line.examples_path(partition))
    rule = run.daily.model_dump(mode="json", include={"new_rows", "accumulator_decay"})
    decides = {"state": version_name(state), "examples": example.name, **rule}
    counts, ranking = None, None
    if run.retrieval is not None:
        counts = fitted.counts_of(run.item_feature)
    if run.retrieval is not None and run.ssl is not None:
        ranking = _ranking(run, day, fitted, say)
        decides["ranking"] = ranking.folder.name
    identity = _hash(decides)
    trained = processes.train(
        run.model,
        schema,
        fit,
        None,
        run.train.model_copy(update={"epochs": 1}),
        run.folder / "training",
        device=pick_device(run.device),
        identity=identity,
        warm=warm,
        sparsity=run.sparsity,
        item_counts=counts,
        corpus=corpus_of(run, fit, ranking),
        on_step=on_step,
    )
    _keep(run, line, day, trained, identity, {partition: read_manifest(example).about}, say)


def _ranking(run: Run, day: date, fitted: FittedPipeline, say: Say) -> Ranking:
    """The question that the model of a training day is measured by: whose items are the corpus of that day's [ssl].

    It depends on the day alone, so that days that are caught up are trained as if each had had its turn.
    """
    then = run if day == run.trained_to else run.on(run.data.days(day + timedelta(days=1), run.on_day)[1])
    valid = then.source.partitions("valid")
    write_ranking(then, fitted, valid, overwrite=True, may_be_empty=True, say=say)
    return ranking_of(then, fitted, valid)


def _keep(
    run: Run, line: Line, day: date, trained: Trained, identity: str, examples: Mapping[str, Any], say: Say
) -> Path:
    """Publish a state under its day; training's own copy goes with the next one."""
    about = {
        "identity": identity,
        "model": _name(run),
        "examples": examples,
        "history": trained.history,
        "curve": trained.curve,
        "best_epoch": trained.best_epoch,
        "rows_per_second": trained.rows_per_second,
    }
    target = line.state_path(day)
    with publish(target, "state", overwrite=True, keep=1) as staging:
        for file in read_manifest(trained.state).files:
            shutil.copyfile(trained.state / file, staging / file)
        staging.about.update(about)
    say(f"day={day}: trained, {trained.rows_per_second:,.0f} rows/s, loss {trained.history[-1]['train_loss']:.4f}")
    return resolve(target)


def _read(state: Path) -> tuple[Trained, dict[str, dict[str, Any]]]:
    """What `_keep` published."""
    about = verify(state).about
    trained = Trained(
        weights=load_tensors(state / "weights"),
        state=state,
        history=about["history"],
        curve=[(epoch, loss) for epoch, loss in about["curve"]],
        best_epoch=about["best_epoch"],
        rows_per_second=about["rows_per_second"],
        resumed_at=0,
    )
    return trained, about["examples"]


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(parts)).hexdigest()[:16]
