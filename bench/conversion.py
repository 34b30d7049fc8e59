"""Post-click conversion: the funnel models on a synthetic log whose truth is known and on Coat, gates on Census-Income.

    python -m bench.conversion --data PATH                 everything, 5 seeds; PATH holds coat/ and census-income-kdd/
    python -m bench.conversion --data PATH --quick         one seed on little data
    python -m bench.conversion --part synthetic            one of synthetic, coat, census
    python -m bench.conversion --table                     print the tables from the records

All methods of a part run with the same sizes, learning rates and epochs: those of the run files, the synthetic log with
batches of 2,048. Three learning rates of the tables were tried on validation rows, for BASE and ESMM, on the synthetic
log and for BASE, ESMM and ESCM²-IPS on Coat; on Census-Income none. Loss weights and caps keep their defaults.
Every seed has a synthetic log of its own, so that the spread over seeds includes that of the log; on Coat and
Census-Income it is that of training alone.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from torch import Tensor

from base.config import load_config
from bench import records
from features.pipeline import FittedPipeline
from features.readers.synthetic import SyntheticConfig
from features.schema import Schema, carried
from features.source import REASON
from pipelines.config import Run
from pipelines.examples import examples_of
from pipelines.generate import generate
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from recsys import trainer
from recsys.bundle import load_model
from recsys.data import ExampleStream, batches, to_columns
from recsys.experts import active_per_row
from recsys.losses import ips_loss, log_loss_of_product, mean_log_loss
from recsys.metrics import calibration_ratio, log_loss, normalized_entropy, roc_auc
from recsys.models import Model
from recsys.models.escm2 import ESCM2
from recsys.models.multitask import MultiTask

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "pipelines" / "runs"
RECORDS = records.FOLDER / "conversion.jsonl"
SEEDS = 5
DAYS = 10

METHODS: dict[str, dict[str, Any]] = {
    "BASE": {"name": "base"},
    "DIVISION": {"name": "division"},
    "ESMM-NS": {"name": "esmm", "shared_embeddings": False},
    "ESMM": {"name": "esmm"},
    "ESCM²-IPS": {"name": "escm2"},
    "ESCM²-DR": {"name": "escm2", "risk": "dr"},
    "NISE": {"name": "nise"},
}
TOLD = "ESCM²-IPS, told the true propensities"
"""No method: what inverse propensities would do if the click were known as well as a synthetic log knows it."""
_EXPERTS = {"count": 8, "hidden": [32]}
CENSUS: dict[str, dict[str, Any]] = {
    "single task": {"shared_embeddings": False, "tower": {"kind": "mlp", "hidden": [128, 16]}},
    "shared bottom": {"bottom": [256]},
    "MMoE, softmax": {"experts": {**_EXPERTS, "gate": "softmax"}},
    "MMoE, top-2": {"experts": {**_EXPERTS, "gate": "top_k", "k": 2}},
    "MMoE, 2 trees": {"experts": {**_EXPERTS, "gate": "tree", "k": 2, "entropy": 0.001}},
}

GATES: dict[str, dict[str, Any]] = {
    "softmax": {"gate": "softmax"},
    "top-2": {"gate": "top_k", "k": 2},
    "2 trees": {"gate": "tree", "k": 2, "entropy": 0.001},
}


@dataclass(frozen=True)
class Log:
    """One setting of the synthetic funnel."""

    taste: float
    confounding: float

    @property
    def name(self) -> str:
        return f"taste {self.taste:g}, confounding {self.confounding:g}"

    @property
    def slug(self) -> str:
        return f"taste{self.taste:g}-confounding{self.confounding:g}"


LOGS = (Log(0, 0), Log(1, 0), Log(2, 0), Log(1, 1))


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with coat/ and census-income-kdd/")
    parser.add_argument("--work", type=Path, default=Path("build/bench/conversion"), help="where examples are prepared")
    parser.add_argument("--part", choices=("synthetic", "coat", "census"), help="by default all three")
    parser.add_argument("--only", help="names of methods, separated by /")
    parser.add_argument("--logs", help="numbers of synthetic logs, e.g. 0,2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", default="2h", help="e.g. 90m or 2h")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    file = options.work / "quick.jsonl" if options.quick else RECORDS  # quick figures are no measurements
    if not options.table:
        parts = [options.part] if options.part else ["synthetic", "coat", "census"]
        if options.data is None and parts != ["synthetic"]:
            parser.error("--data is needed: the folder that holds coat/ and census-income-kdd/")
        jobs: list[records.Job] = []
        if "synthetic" in parts:
            numbers = [int(n) for n in options.logs.split(",")] if options.logs else range(len(LOGS))
            for log in (LOGS[n] for n in numbers):
                jobs += synthetic_jobs(log, options.work, quick=options.quick)
        data = options.data or Path()
        if "coat" in parts:
            jobs += coat_jobs(data / "coat", options.work, quick=options.quick)
        if "census" in parts:
            jobs += census_jobs(data / "census-income-kdd/census-income.test.gz", options.work, quick=options.quick)
        if options.only:
            jobs = [j for j in jobs if j.name.rpartition(" | ")[2] in options.only.split("/")]
        records.run_jobs(file, jobs, budget_seconds=records.seconds(options.budget))
    print(tables(file))


# --- the three parts -------------------------------------------------------------------------------------------------


def funnel_config(log: Log, *, quick: bool) -> SyntheticConfig:
    """2M impressions of 20,000 users and 4,000 items in ten days."""
    return SyntheticConfig(
        rows_per_day=10_000 if quick else 200_000,
        users=2_000 if quick else 20_000,
        items=500 if quick else 4_000,
        click_rate=0.03,
        conversion_rate=0.1,
        taste=log.taste,
        confounding=log.confounding,
    )


def funnel_key(config: SyntheticConfig) -> dict[str, Any]:
    """What decides the log of a seed."""
    generator = hashlib.sha256((ROOT / "features/readers/synthetic.py").read_bytes()).hexdigest()[:12]
    return {"log": json.loads(config.model_dump_json()), "generator": generator}


def funnel_run(config: SyntheticConfig, folder: Path) -> Run:
    """ESMM on a log in `folder`."""
    days = [config.start + timedelta(days=n) for n in range(DAYS)]
    return load_config(Run, RUNS / "esmm.toml", _settings(folder, days))


def funnel_log(config: SyntheticConfig, folder: Path, seed: int) -> tuple[Run, FittedPipeline, pl.DataFrame]:
    """A seed's log in place of what was in `folder`, prepared; and the test rows with their truth."""
    shutil.rmtree(folder, ignore_errors=True)
    days = [config.start + timedelta(days=n) for n in range(DAYS)]
    generate(config.model_copy(update={"seed": seed}), days, folder / "logs", say=lambda _: None)
    run = funnel_run(config, folder)
    fitted = prepare(run, say=lambda _: None)
    truth = ("would_convert", "click_probability", "conversion_probability", "click_and_conversion_probability")
    return run, fitted, _rows(run, fitted, run.source.partitions("test"), truth)


def synthetic_jobs(log: Log, work: Path, *, quick: bool) -> list[records.Job]:
    """2M impressions a seed: one pass over eight days; nothing is chosen on the ninth; the tenth is measured on."""
    config, folder = funnel_config(log, quick=quick), work / f"{log.slug}{'-quick' if quick else ''}"
    common = {"bench": "conversion", **funnel_key(config)}

    @lru_cache(maxsize=1)
    def prepared(seed: int) -> tuple[Run, FittedPipeline, pl.DataFrame]:
        """The log of a seed; of the previous one only this cache is left."""
        return funnel_log(config, folder, seed)

    probe = funnel_run(config, folder)

    def job(name: str, model: Mapping[str, Any]) -> records.Job:
        configured = _configured(probe, model)

        def measure(seed: int) -> Mapping[str, Any]:
            run, fitted, test = prepared(seed)
            train = _train_told if name.endswith(TOLD) else _train
            return funnel_figures(train(_configured(run, model), fitted, seed, name), test)

        told = {"told": "click_probability"} if name.endswith(TOLD) else {}
        return records.Job(name, _identity(configured, {**common, **told}, quick), 1 if quick else SEEDS, measure)

    return [job(f"{log.name} | {name}", model) for name, model in {**METHODS, TOLD: METHODS["ESCM²-IPS"]}.items()]


def coat_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """Trained on what users chose to rate; measured on that, and on coats drawn at random, never trained on."""
    folder = work / ("coat-quick" if quick else "coat")
    epochs = ["train.epochs=1"] if quick else []
    where = ["data.where=random_rating IS NULL"]
    run = load_config(Run, RUNS / "coat.toml", [f'data.path="{data}"', f'output="{folder}"', *epochs, *where])
    fitted = prepare(run, say=lambda _: None)
    chosen = _rows(run, fitted, ["split=test"], ())
    everything = run.model_copy(update={"data": run.data.model_copy(update={"where": "random_rating IS NOT NULL"})})
    splits = [f"split={role}" for role in ("train", "valid", "test")]
    random = _rows(everything, fitted, splits, ("liked_at_random",))
    common = {"bench": "conversion", "data": "coat", "rows": _rows_hash(run)}
    return [
        _job(f"coat | {name}", run, fitted, model, common, quick, lambda m: coat_figures(m, chosen, random))
        for name, model in METHODS.items()
    ]


def _rows_hash(run: Run) -> str:
    return records.rows_hash(*(run.examples_path(f"split={role}") for role in ("train", "valid")))


def census_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """Two tasks; single-task networks against what they may share."""
    folder = work / ("census-quick" if quick else "census")
    epochs = ["train.epochs=1"] if quick else []
    run = load_config(Run, RUNS / "census.toml", [f'data.path="{data}"', f'output="{folder}"', *epochs])
    fitted = prepare(run, say=lambda _: None)
    test = _rows(run, fitted, ["split=test"], ())
    common = {"bench": "conversion", "data": "census", "rows": _rows_hash(run)}
    plain = {"name": "multitask", "dim": run.model.model_dump()["dim"], "tower": {"kind": "mlp", "hidden": [16]}}
    jobs = [
        _job(f"census | {name}", run, fitted, {**plain, **model}, common, quick, lambda m: census_figures(m, test))
        for name, model in CENSUS.items()
    ]
    brief = run.model_copy(update={"train": run.train.model_copy(update={"epochs": min(2, run.train.epochs)})})
    wide = {
        gate: _configured(brief, {**plain, "experts": {**experts, "count": 16, "hidden": [256]}})
        for gate, experts in GATES.items()
    }

    def times(seed: int) -> Mapping[str, Any]:
        return gate_times({gate: _train(r, fitted, seed, f"16 x 256, {gate}") for gate, r in wide.items()}, test)

    config = {**common, "models": {g: r.model.model_dump() for g, r in wide.items()}, "quick": quick}
    config["train"] = records.settings_of(brief.train)
    return [*jobs, records.Job("gates | 16 experts of 256", config, 1 if quick else SEEDS, times)]


def _settings(folder: Path, days: Sequence[date]) -> list[str]:
    split = f'{{ train = "{days[0]}..{days[-3]}", valid = "{days[-2]}", test = "{days[-1]}" }}'
    return [
        f'output="{folder}"',
        f'data.path="{folder}/logs/day=*/*.parquet"',
        f"data.split={split}",
        "data.matures_after_days={}",
        "train.epochs=1",
        "train.batch_size=2048",
    ]


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A trained model and the contract of its rows."""

    model: Model
    schema: Schema

    def scores(self, rows: pl.DataFrame) -> dict[str, np.ndarray[Any, Any]]:
        """Probabilities of encoded rows by output."""
        columns = to_columns(rows, self.schema, labels=False)
        with torch.no_grad():
            parts = [self.model.probabilities(self.model(batch)) for batch in batches(columns, 8192)]
        p_RO = torch.cat(parts).double().numpy()
        return {o.name: p_RO[:, i] for i, o in enumerate(self.model.outputs)}


def _job(
    name: str, run: Run, fitted: FittedPipeline, model: Mapping[str, Any], common: Mapping[str, Any], quick: bool,
    figures: Callable[[Measured], Mapping[str, float]],
) -> records.Job:  # fmt: skip
    configured = _configured(run, model)
    config = _identity(configured, common, quick)

    def measure(seed: int) -> Mapping[str, Any]:
        return figures(_train(configured, fitted, seed, name))

    return records.Job(name, config, 1 if quick else SEEDS, measure)


def _identity(run: Run, common: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """What a record is keyed by."""
    train = records.settings_of(run.train)
    return {**common, "model": run.model.model_dump(), "train": train, "quick": quick}


def _configured(run: Run, model: Mapping[str, Any]) -> Run:
    """The run with another model of the same dimension, and the same tower unless it has its own."""
    base = run.model.model_dump()
    tree = {"dim": base["dim"], "tower": base["tower"], **model}
    return Run.model_validate({**run.model_dump(mode="json"), "model": tree})


def _train(run: Run, fitted: FittedPipeline, seed: int, name: str) -> Measured:
    schema = run.schema_of(fitted)
    config = run.train.model_copy(update={"seed": seed})
    files = {role: tuple(examples_of(run, run.source.partitions(role), fitted)) for role in ("train", "valid")}
    fit = ExampleStream(files["train"], schema, config.batch_size, shuffle=True, seed=seed, sampled=True)
    valid = ExampleStream(files["valid"], schema, config.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        ticker = Ticker(f"{name} seed {seed}", interval_seconds=60)
        trained = trainer.train(run.model, schema, fit, valid, config, Path(scratch), on_step=ticker.on_step)
    model = load_model(run.model, schema, trained.weights, where=Path(name))
    return Measured(model, schema)


def _train_told(run: Run, fitted: FittedPipeline, seed: int, name: str) -> Measured:
    """The same, each row's loss told its true click probability, which travels as one more label."""
    propensity, schema = "click_probability", run.schema_of(fitted)
    config = run.train.model_copy(update={"seed": seed})

    def loss(self: ESCM2, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        a_B, b_B = logits_BL[:, 0], logits_BL[:, 1]
        o_B, r_B, p_B = labels_BT.unbind(1)
        c = self.config
        counterfactual = ips_loss(b_B, o_B, r_B, p_B, torch.ones_like(p_B), c.floor, c.clip)
        joint = log_loss_of_product(a_B, b_B, r_B)
        return mean_log_loss(a_B, o_B) + c.conversion_weight * counterfactual + c.joint_weight * joint

    with tempfile.TemporaryDirectory() as scratch, patch.object(ESCM2, "loss", loss):
        rows = _rows(run, fitted, run.source.partitions("train"), (propensity,))
        file = Path(scratch) / "train.parquet"
        rows.rename({propensity: carried(propensity)}).write_parquet(file, row_group_size=2**17)
        told = schema.model_copy(update={"labels": (*schema.labels, propensity)})
        fit = ExampleStream((file,), told, config.batch_size, shuffle=True, seed=seed)
        files = tuple(examples_of(run, run.source.partitions("valid"), fitted))
        valid = ExampleStream(files, schema, config.batch_size)
        ticker = Ticker(f"{name} seed {seed}", interval_seconds=60)
        trained = trainer.train(run.model, schema, fit, valid, config, Path(scratch) / "run", on_step=ticker.on_step)
    return Measured(load_model(run.model, schema, trained.weights, where=Path(name)), schema)


def _rows(run: Run, fitted: FittedPipeline, partitions: Sequence[str], keep: Sequence[str]) -> pl.DataFrame:
    """Encoded good rows with their labels and what else is asked for."""
    labels = [carried(label) for label in run.labels]
    good = (run.source.checked(p).filter(pl.col(REASON).is_null()) for p in partitions)
    return pl.concat([fitted.transform(rows, keep=[*labels, *keep]).collect() for rows in good])


def funnel_figures(measured: Measured, test: pl.DataFrame) -> dict[str, float]:
    """Quality in each space; calibration of pCVR against the known truth, everywhere and by propensity."""
    scores = measured.scores(test)
    p, q, both = (scores[n] for n in ("p_click", "p_conversion_given_click", "p_click_and_conversion"))
    click, conversion, potential = (test[n].to_numpy() for n in ("@click", "@conversion", "would_convert"))
    truth, propensity = test["conversion_probability"].to_numpy(), test["click_probability"].to_numpy()
    after_click = test["click_and_conversion_probability"].to_numpy() / propensity
    clicked, rare = click == 1, propensity < np.median(propensity)
    return {
        "ctr_auc": roc_auc(click, p),
        "clicked_auc": roc_auc(conversion[clicked], q[clicked]),
        "clicked_ratio": calibration_ratio(conversion[clicked], q[clicked]),
        "entire_auc": roc_auc(potential, q),
        "entire_ne": normalized_entropy(potential, q),
        "entire_ratio": float(q.mean() / truth.mean()),
        "rare_ratio": float(q[rare].mean() / truth[rare].mean()),
        "ctcvr_auc": roc_auc(conversion, both),
        "ctcvr_ratio": calibration_ratio(conversion, both),
        "floor_entire_auc": roc_auc(potential, truth),
        "floor_clicked_auc": roc_auc(conversion[clicked], after_click[clicked]),
    }


def coat_figures(measured: Measured, chosen: pl.DataFrame, random: pl.DataFrame) -> dict[str, float]:
    """pCVR on rated pairs held out, and on pairs shown at random; pCTCVR on all held-out pairs."""
    scores, at_random = measured.scores(chosen), measured.scores(random)["p_liked_given_rated"]
    rated, liked = chosen["@rated"].to_numpy() == 1, chosen["@liked"].to_numpy()
    potential = random["liked_at_random"].cast(pl.Int8).to_numpy()
    q = scores["p_liked_given_rated"][rated]
    return {
        "ctr_auc": roc_auc(rated, scores["p_rated"]),
        "clicked_auc": roc_auc(liked[rated], q),
        "clicked_ratio": calibration_ratio(liked[rated], q),
        "entire_auc": roc_auc(potential, at_random),
        "entire_ne": normalized_entropy(potential, at_random),
        "entire_ratio": calibration_ratio(potential, at_random),
        "ctcvr_auc": roc_auc(liked, scores["p_rated_and_liked"]),
    }


def census_figures(measured: Measured, test: pl.DataFrame) -> dict[str, float]:
    """AUC and log loss per task; experts that a row uses in some task."""
    scores = measured.scores(test)
    found: dict[str, float] = {}
    for task in ("income", "never_married"):
        labels = test[carried(task)].to_numpy()
        found[f"{task}_auc"] = roc_auc(labels, scores[f"p_{task}"])
        found[f"{task}_log_loss"] = log_loss(labels, scores[f"p_{task}"])
    outside = sum(p.numel() for n, p in measured.model.named_parameters() if ".tables." not in n)
    return {**found, "active_experts": _active(measured, test), "parameters": outside}


def _active(measured: Measured, rows: pl.DataFrame) -> float:
    """Experts that a row uses in some task, on average; 0 without experts."""
    model = measured.model
    assert isinstance(model, MultiTask)
    batch = next(batches(to_columns(rows, measured.schema, labels=False), rows.height))
    with torch.no_grad():
        weights_BTE = model.network.expert_weights(model.embed.separate(batch))
    return 0.0 if weights_BTE is None else float(active_per_row(weights_BTE).double().mean())


def gate_times(trained: Mapping[str, Measured], rows: pl.DataFrame, rounds: int = 30) -> dict[str, float]:
    """Median ms of forward, loss and backward on one batch, all but the tables' gradients; the models in turn."""
    batch = to_columns(rows, next(iter(trained.values())).schema, labels=True).batch(0, min(4096, rows.height))
    times: dict[str, list[float]] = {name: [] for name in trained}
    for measured in trained.values():
        # Training updates the tables by fused kernels, not by dense gradients.
        measured.model.embed.tables.requires_grad_(False)
    for turn in range(rounds + 3):
        for name, measured in trained.items():
            measured.model.zero_grad()
            begun = time.perf_counter()
            measured.model.loss(measured.model(batch), batch.labels_BT).backward()
            if turn >= 3:
                times[name].append(time.perf_counter() - begun)
    found = {f"{name}_ms": 1000 * float(np.median(values)) for name, values in times.items()}
    return found | {f"{name}_active": _active(measured, rows) for name, measured in trained.items()}


# --- tables ----------------------------------------------------------------------------------------------------------

_FUNNEL_COLUMNS = {
    "pCVR AUC, clicked": ("clicked_auc", 4),
    "pCVR AUC, all": ("entire_auc", 4),
    "pCVR / truth, all": ("entire_ratio", 3),
    "pCVR / observed, clicked": ("clicked_ratio", 3),
    "pCVR / truth, rarely clicked half": ("rare_ratio", 3),
    "pCTCVR AUC, all": ("ctcvr_auc", 4),
}
_COAT_COLUMNS = {
    "pCVR AUC, rated by choice": ("clicked_auc", 4),
    "pCVR AUC, drawn at random": ("entire_auc", 4),
    "predicted / observed, drawn at random": ("entire_ratio", 3),
    "NE, drawn at random": ("entire_ne", 3),
    "pCTCVR AUC, all pairs": ("ctcvr_auc", 4),
}
_CENSUS_COLUMNS = {
    "income AUC": ("income_auc", 4),
    "never married AUC": ("never_married_auc", 4),
    "active experts per row": ("active_experts", 2),
    "parameters beside tables": ("parameters", 0),
}


def tables(file: Path = RECORDS) -> str:
    """The README's tables, from the records."""
    parts = [
        _table(file, [f"{log.name} | {m}" for log in LOGS for m in (*METHODS, TOLD)], _FUNNEL_COLUMNS, "log"),
        _pair_table(file),
        _table(file, [f"coat | {m}" for m in METHODS], _COAT_COLUMNS, "data"),
        _table(file, [f"census | {m}" for m in CENSUS], _CENSUS_COLUMNS, "data"),
        _gate_table(file),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(file: Path, names: Sequence[str], columns: Mapping[str, tuple[str, int]], first: str) -> str:
    rows = records.summary(file, names, [figure for figure, _ in columns.values()])
    if not rows:
        return ""
    lines = [f"| {first} | model | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        where, _, model = row["name"].rpartition(" | ")
        cells = [_cell(row, figure, digits) for figure, digits in columns.values()]
        lines.append(f"| {where} | {model} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


_PAIRS = (("ESMM", "BASE"), ("ESMM", "ESMM-NS"), ("ESCM²-IPS", "ESMM"), (TOLD, "ESMM"))
_PAIR_COLUMNS = {
    "pCVR AUC, clicked": "clicked_auc",
    "pCVR AUC, all": "entire_auc",
    "pCVR / truth, all": "entire_ratio",
    "pCTCVR AUC, all": "ctcvr_auc",
}


def _pair_table(file: Path) -> str:
    """Differences within a seed, that is on one log: mean, deviation, and in how many seeds the first is larger."""
    lines = [f"| log | difference | {' | '.join(_PAIR_COLUMNS)} |", "|---" * (len(_PAIR_COLUMNS) + 2) + "|"]
    for log in LOGS:
        for first, second in _PAIRS:
            names = (f"{log.name} | {first}", f"{log.name} | {second}")
            found = records.differences(file, *names, list(_PAIR_COLUMNS.values()))
            if len(found[0]) > 1:
                lines.append(f"| {log.name} | {first} - {second} | {' | '.join(records.told(d) for d in found)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _gate_table(file: Path) -> str:
    figures = [f"{gate}_{what}" for gate in GATES for what in ("ms", "active")]
    rows = records.summary(file, ["gates | 16 experts of 256"], figures)
    if not rows:
        return ""
    row = rows[0]
    lines = [
        "| 16 experts of 256, gate | active experts per row | forward + backward, ms | of softmax | seeds |",
        "|---|---|---|---|---|",
    ]
    for gate in GATES:
        ratio = row[f"{gate}_ms"] / row["softmax_ms"]
        cells = (_cell(row, f"{gate}_active", 2), _cell(row, f"{gate}_ms", 1), f"{ratio:.2f}")
        lines.append(f"| {gate} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], figure: str, digits: int) -> str:
    mean, spread = row[figure], row[f"{figure}_sd"]
    if figure == "active_experts" and mean == 0:
        return ""
    if figure == "parameters":
        return f"{mean:,.0f}"
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if row["n"] > 1 else "")


if __name__ == "__main__":
    main()
