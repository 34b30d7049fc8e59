"""Quality on MovieLens-1M by AutoInt's protocol: our models and FuxiCTR's AutoInt, on one split, over seeds.

    python -m bench.quality --data PATH/ml-1m              one half of the table, 5 seeds; --fields ids: the other
    python -m bench.quality --data PATH/ml-1m --quick      one seed, one epoch, a tenth of the rows
    python -m bench.quality --table                        print the table from the records

Settings were chosen on the validation rows; the test rows are read once per seed and setting, by the best weights.
FuxiCTR runs in an environment of its own (`make peer`), on the identical encoded rows.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import torch

from base.config import load_config
from base.storage import publish, resolve
from bench import records
from features.pipeline import FittedPipeline
from features.schema import Schema, carried
from features.source import REASON
from pipelines.config import Run
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from recsys import trainer
from recsys.bundle import load_model
from recsys.data import ExampleStream, batches, to_columns
from recsys.metrics import log_loss, roc_auc
from recsys.models import Model, ModelConfig

ROOT = Path(__file__).parent.parent
RUN = ROOT / "pipelines" / "runs" / "ml-1m.toml"
RECORDS = records.FOLDER / "quality.jsonl"
PEER = ROOT / ".venv-peer" / "bin" / "python"
SEEDS = 5
IDS = [{"kind": "vocabulary", "column": "user_id"}, {"kind": "vocabulary", "column": "movie_id"}]

_AUTOINT = {"name": "autoint", "dim": 16, "layers": 3, "heads": 2, "attention_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "LR": {"name": "lr"},
    "FM": {"name": "fm", "dim": 16},
    "DCN-v2": {"name": "dcn", "dim": 16, "cross_layers": 3, "hidden": [400, 400]},
    "AutoInt": _AUTOINT,
    "AutoInt, L2 of tables": _AUTOINT,
    "AutoInt+": {**_AUTOINT, "deep": [400, 400]},
    "AutoInt, as in the paper": {**_AUTOINT, "variant": "paper"},
    "AutoInt, as in the official code": {**_AUTOINT, "variant": "official"},
}
TRAIN: dict[str, dict[str, Any]] = {
    "LR": {"table_learning_rate": 0.1},
    "FM": {"table_learning_rate": 0.1},
    "DCN-v2": {"table_learning_rate": 0.3},
    "AutoInt, L2 of tables": {"table_l2": 1e-4, "epochs": 20, "patience": 3, "monitor": "auc"},
}
"""What differs from the run file, chosen on the validation rows of one seed."""
ON_IDS: dict[str, dict[str, Any]] = {
    "AutoInt": {"table_accumulator": 1e-6, "epochs": 15, "monitor": "auc"},
    "AutoInt, L2 of tables": {"table_accumulator": 1e-6, "table_l2": 3e-5},
}
"""What differs besides with user and movie ids, chosen likewise: from a sum of 0 the first steps of a rare id are too
long, and shorter ones take more epochs."""
FEWER_SEEDS = {"AutoInt, as in the paper": 2, "AutoInt, as in the official code": 2}
PEERS = {
    "FuxiCTR 2.3.10 AutoInt": [],
    "FuxiCTR 2.3.10 AutoInt, L2 of tables": ["--embedding-regularizer", "1e-3"],
}
"""The best of 1e-5, 1e-4 and 1e-3 on the validation rows of one seed."""
RIVALS = dict(zip(("AutoInt", "AutoInt, L2 of tables"), PEERS, strict=True))
PEER_OPTIONS = ["--embedding-dim", "16", "--attention-layers", "3", "--heads", "2", "--attention-dim", "64"]


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of MovieLens-1M")
    parser.add_argument("--work", type=Path, default=Path("build/bench/ml-1m"), help="where examples are prepared")
    parser.add_argument("--fields", choices=("paper", "ids"), default="paper", help="ids: user and movie ids as well")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", default="2h", help="e.g. 90m or 2h")
    parser.add_argument("--only", help="names of rows, separated by /")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    file = options.work / "quick.jsonl" if options.quick else RECORDS  # quick figures are no measurements
    if not options.table:
        if options.data is None:
            parser.error("--data is needed: the folder of MovieLens-1M")
        folder = options.work / (f"{options.fields}-quick" if options.quick else options.fields)
        jobs = _jobs(options.data, folder, options.fields, quick=options.quick)
        if options.only:
            jobs = [j for j in jobs if j.name.split(" | ")[1] in options.only.split("/")]
        records.run_jobs(file, jobs, budget_seconds=records.seconds(options.budget))
    print(table(file))


def table(file: Path = RECORDS) -> str:
    """The README's table, from the records."""
    lines = ["| fields | model | AUC | log loss | seeds |", "|---|---|---|---|---|"]
    names = [f"{f} | {m}" for f in ("paper", "ids") for m in (*MODELS, *PEERS)]
    for row in records.summary(file, names, ["auc", "log_loss"]):
        fields, model = row["name"].split(" | ")
        auc, loss = (
            f"{row[k]:.4f}" + (f" ± {row[k + '_sd']:.4f}" if row["n"] > 1 else "") for k in ("auc", "log_loss")
        )
        lines.append(f"| {fields} | {model} | {auc} | {loss} | {row['n']} |")
    return "\n".join([*lines, "", *_against_peer(file)])


def _against_peer(file: Path) -> list[str]:
    """Ours less FuxiCTR's: the difference of means, and Welch's t of it over the seeds of each."""
    lines = ["| fields | ours less FuxiCTR's | AUC | t | log loss | t |", "|---|---|---|---|---|---|"]
    for fields, (ours, theirs) in product(("paper", "ids"), RIVALS.items()):
        rows = records.summary(file, [f"{fields} | {ours}", f"{fields} | {theirs}"], ["auc", "log_loss"])
        match [row for row in rows if row["n"] > 1]:
            case [a, b]:
                cells = [f"{d:+.4f} | {t:.1f}" for d, t in (_difference(a, b, k) for k in ("auc", "log_loss"))]
                lines.append(f"| {fields} | {ours} | {' | '.join(cells)} |")
    return lines


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], figure: str) -> tuple[float, float]:
    difference, spread = a[figure] - b[figure], math.hypot(*(r[f"{figure}_sd"] / math.sqrt(r["n"]) for r in (a, b)))
    return difference, difference / spread if spread else math.nan


def _jobs(data: str, work: Path, fields: str, *, quick: bool) -> list[records.Job]:
    settings = [f"data.path={data}", f"output={work}"]
    run = load_config(Run, RUN, settings)
    if fields == "ids":
        run = with_ids(run, settings)
    fitted = prepare(run)
    folder = export(run, fitted, work, share=0.1 if quick else 1.0)
    common = {"bench": "quality", "fields": fields, "rows": records.rows_hash(folder), "quick": quick}
    seeds = 1 if quick else SEEDS
    jobs: list[records.Job] = []
    for name, model in MODELS.items():
        chosen = TRAIN.get(name, {}) | (ON_IDS.get(name, {}) if fields == "ids" else {})
        train = {**run.train.model_dump(), **chosen, **({"epochs": 1} if quick else {})}
        tree = {**run.model_dump(mode="json"), "model": model, "train": train}
        configured = Run.model_validate(tree)
        config = {
            **common,
            "model": configured.model.model_dump(),
            "train": records.settings_of(configured.train),
        }

        def measure(seed: int, run: Run = configured, name: str = name) -> Mapping[str, Any]:
            return _ours(run, fitted, folder, seed, name)

        jobs.append(records.Job(f"{fields} | {name}", config, min(seeds, FEWER_SEEDS.get(name, seeds)), measure))
    if PEER.exists():
        epochs = ["--epochs", "1" if quick else "50", "--batch-size", str(run.train.batch_size)]
        for name, more in PEERS.items():
            options = [*PEER_OPTIONS, *more, *epochs]

            def compare(seed: int, options: list[str] = options) -> Mapping[str, Any]:
                return _peer(folder, seed, options)

            jobs.append(records.Job(f"{fields} | {name}", {**common, "peer": options}, seeds, compare))
    else:
        print("FuxiCTR is left out: run `make peer` first", file=sys.stderr)
    return jobs


def with_ids(run: Run, settings: list[str]) -> Run:
    """With user and movie ids as features too."""
    extra = load_config(Run, RUN, [*settings, f"features={_toml(IDS)}"]).features
    return run.model_copy(update={"features": (*run.features, *extra)})


def export(run: Run, fitted: FittedPipeline, work: Path, *, share: float) -> Path:
    """Encoded rows of the three splits as plain Parquet, the same for every model and for the peer."""
    schema = run.schema_of(fitted)
    about = {
        "label": carried(run.labels[0]),
        "dense": [f.name for f in schema.dense],
        "sparse": [f.model_dump() for f in schema.sparse],
    }
    with publish(work / "encoded", "encoded", overwrite=True, keep=1) as staging:
        for split in ("train", "valid", "test"):
            good = run.source.checked(f"split={split}").filter(pl.col(REASON).is_null())
            rows = fitted.transform(good, keep=[carried(run.labels[0])]).collect()
            rows = rows.sample(fraction=share, seed=0) if share < 1 else rows
            rows.write_parquet(staging / f"{split}.parquet", row_group_size=2**17)
        (staging / "schema.json").write_text(json.dumps(about))
    return resolve(work / "encoded")


def _ours(run: Run, fitted: FittedPipeline, folder: Path, seed: int, name: str) -> Mapping[str, Any]:
    schema = run.schema_of(fitted)
    config = run.train.model_copy(update={"seed": seed})
    fit = ExampleStream((folder / "train.parquet",), schema, config.batch_size, shuffle=True, seed=seed)
    valid = ExampleStream((folder / "valid.parquet",), schema, config.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        ticker = Ticker(f"{name} seed {seed}", interval_seconds=60)
        trained = trainer.train(run.model, schema, fit, valid, config, Path(scratch), on_step=ticker.on_step)
    labels, probabilities = predict(run.model, trained.weights, folder / "test.parquet", fitted, run)
    return {
        "auc": roc_auc(labels, probabilities),
        "log_loss": log_loss(labels, probabilities),
        "valid_auc": max(h[f"p_{run.labels[0]}.auc"] for h in trained.history),
        "best_epoch": trained.best_epoch,
    }


def predict(model: ModelConfig, weights: Any, file: Path, fitted: FittedPipeline, run: Run) -> tuple[Any, Any]:
    """Labels and probabilities of encoded rows, by the plain model."""
    schema = run.schema_of(fitted)
    return predicted(load_model(model, schema, weights, where=file), schema, file)


def predicted(plain: Model, schema: Schema, file: Path) -> tuple[Any, Any]:
    """Labels and probabilities of encoded rows."""
    columns = to_columns(pl.read_parquet(file), schema, labels=True)
    with torch.no_grad():
        parts = [plain.probabilities(plain(batch))[:, 0] for batch in batches(columns, 8192)]
    return columns.labels_RT[:, 0].numpy(), torch.cat(parts).double().numpy()


def _peer(folder: Path, seed: int, options: list[str]) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [PEER, "-m", "bench.fuxictr_peer", "--data", folder, "--seed", seed, "--out", out, *options]
        subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(out.read_text())
    return {
        "auc": result["test"]["auc"],
        "log_loss": result["test"]["logloss"],
        "valid_auc": result["valid"]["auc"],
        "best_epoch": result["best_epoch"],
    }


def _toml(tables: list[dict[str, str]]) -> str:
    return "[" + ", ".join("{" + ", ".join(f'{k} = "{v}"' for k, v in t.items()) + "}" for t in tables) + "]"


if __name__ == "__main__":
    main()
