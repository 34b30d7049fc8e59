"""Sparse tables against dense ones: quality on Gowalla and MovieLens-1M, memory at ten million rows, time of a step.

    python -m bench.sparsity --data PATH                   everything; PATH holds gowalla/ and ml-1m/
    python -m bench.sparsity --data PATH --quick           one seed on little data
    python -m bench.sparsity --part memory                 one of gowalla, ml-1m, memory, time
    python -m bench.sparsity --table                       print the tables from the records

Rivals of a sparse model: the dense one; a dense one of smaller dim, whose tables and optimizer state take no fewer
bytes, on Gowalla also the next smaller one; a fixed random mask; the largest weights of a trained dense model. All
have the run file's settings; what was chosen for sparse models was chosen on validation rows. The best epoch is that
of the validation rows, the test rows are read once. Times are medians of interleaved turns, dense and sparse in one
process; memory is of processes of their own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from base.config import load_config
from base.storage import resolve
from bench import records
from bench.quality import export, predicted, with_ids
from features.pipeline import FittedPipeline
from features.schema import Schema, Sparse, carried
from pipelines.config import Run
from pipelines.examples import examples_of
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.rankings import ranking_of, write_ranking
from recsys import trainer
from recsys.batch import Batch
from recsys.bundle import load_model
from recsys.checkpoint import TABLE
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import Sharded, join_process_group, reset_tables, shard
from recsys.embeddings import Embeddings, TableKind
from recsys.metrics import log_loss, roc_auc
from recsys.models import DCNConfig, Model, ModelConfig, build_model
from recsys.models.fm import FMConfig
from recsys.models.two_tower import TwoTower, TwoTowerConfig
from recsys.retrieval import Ranking, rank_items
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.describe import bytes_of, dense_bytes
from recsys.sparsity.prune import pruned
from recsys.sparsity.schedule import Mover
from recsys.sparsity.tables import SparseTable, SparseTables
from recsys.tensors import load_tensors
from recsys.trainer import TrainConfig

ROOT = Path(__file__).parent.parent
RECORDS = records.FOLDER / "sparsity.jsonl"
RUNS = ROOT / "pipelines" / "runs"
SEEDS = 5
TEST = ["split=test"]
GOWALLA: dict[str, Any] = {"epochs": 16, "evaluate_every": 2, "patience": 3}
BRIEFLY: dict[str, Any] = {"epochs": 1}
MOVIELENS: dict[str, Any] = {"epochs": 10, "monitor": "auc", "table_accumulator": 1e-6}
ON_GOWALLA = Sparsity(
    density=0.2, positions="half", schedule=Schedule(interval=350, window=350, fraction=0.8, stop=0.95)
)
ON_MOVIELENS = Sparsity(
    density=0.2, positions="half", schedule=Schedule(interval=290, window=290, fraction=0.5, stop=0.95)
)
"""How masks move, chosen on validation rows at density 0.2."""
DENSITIES, HEADLINE = (0.2, 0.1, 0.5, 0.05), (0.2, 0.1)
ROWS, DIM = 10_000_000, 64
BATCHES, BATCH = 40, 4096
PARTS = ("weights", "table_states", "dense_states")
KINDS: dict[str, Sparsity | None] = {
    "dense": None,
    "density 0.1": Sparsity(density=0.1, schedule=Schedule(interval=20, window=5)),
    "density 0.1, a sum for each weight": Sparsity(
        density=0.1, state="element", schedule=Schedule(interval=20, window=5)
    ),
}
"""What is measured for memory."""


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that holds gowalla and ml-1m")
    parser.add_argument("--work", type=Path, default=Path("build/bench/sparsity"), help="where examples are prepared")
    parser.add_argument("--part", choices=("gowalla", "ml-1m", "memory", "time"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", default="2h", help="e.g. 90m or 2h")
    parser.add_argument("--only", help="names of rows, separated by /")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task = json.loads(options.child)
        print(json.dumps((_scoring if "state" in task else _training)(**task)))
        return
    file = options.work / "quick.jsonl" if options.quick else RECORDS  # quick figures are no measurements
    if not options.table:
        jobs = _jobs(options, quick=options.quick)
        if options.only:
            jobs = [j for j in jobs if j.name.split(" | ")[1] in options.only.split("/")]
        records.run_jobs(file, jobs, budget_seconds=records.seconds(options.budget))
    for text in tables(file).values():
        print(f"\n{text}")


def _jobs(options: argparse.Namespace, *, quick: bool) -> list[records.Job]:
    wanted = [options.part] if options.part else ["memory", "time", "gowalla", "ml-1m"]
    jobs: list[records.Job] = []
    if "memory" in wanted:
        jobs += memory_jobs(quick=quick)
    if "time" in wanted:
        jobs += time_jobs(quick=quick)
    if "gowalla" in wanted:
        jobs += gowalla_jobs(_data(options), options.work, quick=quick)
    if "ml-1m" in wanted:
        jobs += movielens_jobs(_data(options), options.work, quick=quick)
    return jobs


def _data(options: argparse.Namespace) -> Path:
    if options.data is None:
        raise SystemExit("--data is needed: the folder that holds gowalla/ and ml-1m/")
    return Path(options.data)


def tables(file: Path = RECORDS) -> dict[str, str]:
    """The README's tables, from the records."""
    return {
        "gowalla": _with_landmark(
            quality_table(file, "gowalla", ON_GOWALLA, {"recall": "Recall@20", "ndcg": "NDCG@20"}, below=True)
        ),
        "ml-1m": quality_table(file, "ml-1m", ON_MOVIELENS, {"auc": "AUC", "log_loss": "log loss"}),
        "memory": memory_table(file),
        "time": time_table(file),
    }


def _with_landmark(table: str) -> str:
    return table and f"{table}\n{records.LIGHTGCN} | | | |"


# Quality


@dataclass(frozen=True)
class Kind:
    """A way to have tables of fewer bytes."""

    name: str
    density: float
    dim: int = DIM
    sparsity: Sparsity | None = None
    pruned: bool = False
    """Whether a dense model is trained, and its largest weights are kept."""


def kinds(chosen: Sparsity, densities: Sequence[float] = DENSITIES, *, below: bool = False) -> list[Kind]:
    """What is compared, the headline first. `chosen`: the sparsity of the moving mask, at any density.

    `below`: at the first density also the next smaller dim, so that the bytes of sparse tables lie between two rivals'.
    """
    found = [Kind("dense", 1.0)]
    for density in densities:
        moving = chosen.model_copy(update={"density": density})
        fixed = Sparsity(density=density, schedule=Schedule(grow="none"))
        alike = moving.model_copy(update={"schedule": fixed.schedule})
        found += [
            Kind(f"sparse {density:g}", density, sparsity=moving),
            Kind(f"smaller dim, bytes of {density:g}", density, dim=smaller_dim(moving)),
            Kind(f"fixed mask {density:g}", density, sparsity=fixed),
            Kind(f"pruned {density:g}", density, sparsity=moving, pruned=True),
        ]
        if below and density == HEADLINE[0]:
            found.append(Kind(f"smaller dim, fewer bytes than {density:g}", density, dim=smaller_dim(moving) - 4))
        if alike != fixed and density == HEADLINE[0]:  # what moving is worth, apart from where the mask begins
            found.append(Kind(f"fixed mask {density:g}, begun as the moving one", density, sparsity=alike))
    return found


def _kinds(chosen: Sparsity, *, quick: bool, below: bool = False) -> list[Kind]:
    """A quick look is at one density, and has a mask that moves in an epoch of few steps."""
    if not quick:
        return kinds(chosen, below=below)
    sooner = chosen.schedule.model_copy(update={"interval": 20, "window": 20})
    return kinds(chosen.model_copy(update={"schedule": sooner}), DENSITIES[:1])


def smaller_dim(sparsity: Sparsity) -> int:
    """The least dim, in fours, of which dense tables and their sums take no fewer bytes than sparse ones of DIM."""
    rows = 10_000
    tables = SparseTables([SparseTable("item", "item", rows, False, True)], DIM, sparsity, CPU, 0.1)
    wanted = bytes_of(tables).training
    return next(dim for dim in range(4, 2 * DIM, 4) if dense_bytes(rows, dim, 0).training >= wanted)


def quality_table(file: Path, part: str, chosen: Sparsity, figures: Mapping[str, str], *, below: bool = False) -> str:
    """Quality by kind of table, with the bytes of tables and state."""
    names = [f"{part} | {k.name}" for k in kinds(chosen, below=below)]
    trained = {name: _how(file, name) for name in names}
    names = [name for name in names if trained[name] == trained[names[0]]]  # shares of another dense one mean nothing
    rows = records.summary(file, names, [*figures, "bytes"])
    if not rows:
        return ""
    lines = [f"| tables | {' | '.join(figures.values())} | of dense | bytes of tables and state | seeds |"]
    lines.append("|" + "---|" * (len(figures) + 4))
    first = next(iter(figures))
    dense = next((r for r in rows if r["name"].endswith("| dense")), rows[0])
    for row in rows:
        shown = [f"{row[k]:.4f}" + (f" ± {row[k + '_sd']:.4f}" if row["n"] > 1 else "") for k in figures]
        share = [f"{row[first] / dense[first]:.3f}", f"{row['bytes'] / 2**20:.1f} MiB", str(row["n"])]
        lines.append(f"| {' | '.join([row['name'].split(' | ')[1], *shown, *share])} |")
    return "\n".join(lines)


def _how(file: Path, name: str) -> Any:
    """On what, and how, a row was trained: what all rows of a table have in common. None where there is no record."""
    found = list(records.by_seed(file, name).values())
    return [found[0].get("config", {}).get(key) for key in ("rows", "train", "quick")] if found else None


def _seeds(kind: Kind, *, quick: bool) -> int:
    return 1 if quick else SEEDS if kind.name == "dense" or kind.density in HEADLINE else 2


@dataclass
class _Trainings:
    """Trains models of every kind on one data set."""

    run: Run
    fitted: FittedPipeline
    files: tuple[Path, ...]
    valid: ExampleStream | Ranking
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dense: tuple[int, trainer.Trained] | None = None
    """The last seed's, which is pruned to every density."""

    def model(self, kind: Kind, seed: int) -> tuple[Model, trainer.Trained]:
        """With the best weights of a training, pruned if the kind says so."""
        schema, config = self.run.schema_of(self.fitted), self.run.model.model_copy(update={"dim": kind.dim})
        trained = self._trained(kind, seed, schema, config)
        weights = trained.weights
        if kind.pruned:
            assert kind.sparsity is not None
            weights = _pruned(config, schema, kind.sparsity, weights)
        return load_model(config, schema, weights, where=Path(kind.name), sparsity=kind.sparsity), trained

    def _trained(self, kind: Kind, seed: int, schema: Schema, model: ModelConfig) -> trainer.Trained:
        dense = kind.pruned or (kind.sparsity is None and kind.dim == DIM)
        if dense and self.dense is not None and self.dense[0] == seed:
            return self.dense[1]
        config = self.run.train.model_copy(update={"seed": seed, "threads": 1})
        fit = ExampleStream(self.files, schema, config.batch_size, shuffle=True, seed=seed)
        ticker = Ticker(f"{kind.name} seed {seed}", interval_seconds=60)
        options = {"sparsity": None if dense else kind.sparsity, "on_step": ticker.on_step, **self.options}
        with tempfile.TemporaryDirectory() as scratch:
            trained = trainer.train(model, schema, fit, self.valid, config, Path(scratch), **options)
        if dense:
            self.dense = seed, trained
        return trained


def _pruned(model: ModelConfig, schema: Schema, sparsity: Sparsity, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tables = build_model(model, schema, table_device="meta", sparsity=sparsity).embed.tables
    assert isinstance(tables, SparseTables)
    dense = {t.name: weights[TABLE.format(t.name)] for t in tables.tables}
    others = {name: t for name, t in weights.items() if name not in {TABLE.format(n) for n in dense}}
    return others | {f"embed.tables.{name}": t for name, t in pruned(tables, dense).items()}


def gowalla_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """Matrix factorization with in-batch softmax, by full ranking."""
    settings = [f"data.path={data}/gowalla/*.txt", f"output={work}/gowalla"]
    if quick:  # a tenth of the users
        settings = [settings[0], f"output={work}/gowalla-quick", 'data.where="user_id % 10 = 0"']
    run = load_config(Run, RUNS / "gowalla.toml", settings)
    run = run.model_copy(update={"train": run.train.model_copy(update=GOWALLA | (BRIEFLY if quick else {}))})
    fitted = prepare(run)
    write_ranking(run, fitted, TEST)
    asked = [resolve(run.ranking_path(p)) for p in (["split=valid"], TEST)]
    folders = [resolve(run.examples_path("split=train")), *asked]
    common = {"bench": "sparsity", "part": "gowalla", "rows": records.rows_hash(*folders), "quick": quick}
    files = tuple(examples_of(run, ["split=train"], fitted, run.examples_path))
    valid, test = ranking_of(run, fitted, ["split=valid"]), ranking_of(run, fitted, TEST)
    trainings = _Trainings(run, fitted, files, valid, {"item_counts": fitted.counts_of(run.item_feature)})
    jobs: list[records.Job] = []
    for kind in _kinds(ON_GOWALLA, quick=quick, below=True):

        def measure(seed: int, kind: Kind = kind) -> Mapping[str, Any]:
            return _gowalla(trainings, test, kind, seed)

        jobs.append(
            records.Job(f"gowalla | {kind.name}", common | _config(run, kind), _seeds(kind, quick=quick), measure)
        )
    return jobs


def _gowalla(trainings: _Trainings, test: Ranking, kind: Kind, seed: int) -> Mapping[str, Any]:
    model, trained = trainings.model(kind, seed)
    assert isinstance(model, TwoTower)
    with torch.no_grad():
        found = rank_items(lambda s: (x for x, _ in trainer.passed(model, s, CPU)), model, test)
    (top,) = found.filter(slice="all", k=20).to_dicts()
    curve = [h["recall_20"] for h in trained.history if "recall_20" in h]
    return {
        "recall": top["recall"],
        "ndcg": top["ndcg"],
        "valid": curve,
        "best_epoch": trained.best_epoch,
        "bytes": bytes_of(model).training,
    }


def _config(run: Run, kind: Kind) -> dict[str, Any]:
    """What decides a result."""
    model = run.model.model_copy(update={"dim": kind.dim})
    sparsity = kind.sparsity and kind.sparsity.model_dump(mode="json")
    if sparsity and sparsity["schedule"]["grow"] == "none":
        sparsity["schedule"] = {"grow": "none"}  # nothing else of it matters
    train = records.settings_of(run.train, "seed")
    return {"model": model.model_dump(mode="json"), "train": train, "sparsity": sparsity, "pruned": kind.pruned}


# MovieLens-1M


def movielens_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """AutoInt with user and movie ids."""
    settings = [f"data.path={data}/ml-1m", f"output={work}/ml-1m"]
    run = with_ids(load_config(Run, RUNS / "ml-1m.toml", settings), settings)
    model = run.model.model_copy(update={"dim": DIM})
    train = run.train.model_copy(update=MOVIELENS | (BRIEFLY if quick else {}))
    run = run.model_copy(update={"model": model, "train": train})
    fitted = prepare(run)
    folder = export(run, fitted, work / "ml-1m", share=0.1 if quick else 1.0)
    common = {"bench": "sparsity", "part": "ml-1m", "rows": records.rows_hash(folder), "quick": quick}
    valid = ExampleStream((folder / "valid.parquet",), run.schema_of(fitted), run.train.batch_size)
    trainings = _Trainings(run, fitted, (folder / "train.parquet",), valid)
    jobs: list[records.Job] = []
    for kind in _kinds(ON_MOVIELENS, quick=quick):

        def measure(seed: int, kind: Kind = kind) -> Mapping[str, Any]:
            return _movielens(trainings, folder / "test.parquet", kind, seed)

        jobs.append(
            records.Job(f"ml-1m | {kind.name}", common | _config(run, kind), _seeds(kind, quick=quick), measure)
        )
    return jobs


def _movielens(trainings: _Trainings, test: Path, kind: Kind, seed: int) -> Mapping[str, Any]:
    run, (model, trained) = trainings.run, trainings.model(kind, seed)
    labels, probabilities = predicted(model, run.schema_of(trainings.fitted), test)
    curve = [h[f"p_{run.labels[0]}.auc"] for h in trained.history]
    found = {"auc": roc_auc(labels, probabilities), "log_loss": log_loss(labels, probabilities)}
    return {**found, "valid": curve, "best_epoch": trained.best_epoch, "bytes": bytes_of(model).training}


# Memory


def memory_jobs(*, quick: bool) -> list[records.Job]:
    """A table of ten million rows: trained, its mask moved, written as a checkpoint, read as a model that scores."""
    rows = 200_000 if quick else ROWS
    jobs: list[records.Job] = []
    for name, sparsity in KINDS.items():
        given = None if sparsity is None else sparsity.model_dump(mode="json")
        config = {"bench": "memory", "rows": rows, "dim": DIM, "batches": BATCHES, "batch": BATCH, "sparsity": given}
        config |= {"peak": "VmHWM"}

        def measure(seed: int, given: Any = given) -> Mapping[str, Any]:
            empty, full = _measured(64, None, seed), _measured(rows, given, seed)
            own = {f"{k}_of_tables": full[k] - empty[k] for k in ("resident", "peak", "peak_scoring")}
            return {**own, **full}

        jobs.append(records.Job(f"memory | {name}", config, 1 if quick else 3, measure))
    return jobs


def _in_child(**arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.sparsity", "--child", json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def _measured(rows: int, sparsity: Any, seed: int) -> dict[str, int]:
    """Bytes of a training, and of what scores with its weights, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        task = {"rows": rows, "sparsity": sparsity, "seed": seed}
        found = _in_child(folder=scratch, **task)
        return found | _in_child(state=str(resolve(Path(scratch) / "state" / "best")), **task)


def _parts(rows: int, sparsity: Any) -> tuple[DCNConfig, Schema, Sparsity | None]:
    schema = Schema(keys=(), dense=(), sparse=(Sparse(name="item", rows=rows),), labels=("click",))
    return DCNConfig(dim=DIM, cross_layers=1, hidden=()), schema, sparsity and Sparsity.model_validate(sparsity)


def _training(rows: int, sparsity: Any, seed: int, folder: str) -> dict[str, int]:
    """Bytes that this process holds while it trains, held at most, and those of what it stored."""
    torch.set_num_threads(1)
    model, schema, parsed = _parts(rows, sparsity)
    rng, path = np.random.default_rng(seed), Path(folder)
    items = (rng.random(BATCHES * BATCH) ** 4 * rows).astype(np.int32)
    clicks = rng.integers(0, 2, BATCHES * BATCH).astype(np.int8)
    examples = pl.DataFrame({"item": items, carried("click"): clicks})
    examples.write_parquet(path / "examples.parquet", row_group_size=2**15)
    stream = ExampleStream((path / "examples.parquet",), schema, BATCH, window=1)
    resident: list[int] = []
    config = TrainConfig(epochs=1, batch_size=BATCH, checkpoint_every=30, seed=seed)
    watch = lambda _: resident.append(_resident())  # noqa: E731
    trainer.learn(model, schema, stream, None, config, path / "state", sparsity=parsed, on_step=watch)
    state = resolve(path / "state" / "best")
    sizes = {part: sum(f.stat().st_size for f in (state / part).glob("*")) for part in PARTS}
    stored = {"checkpoint": sum(sizes.values()), "bundle_weights": sizes["weights"]}
    return {"resident": int(median(resident)), "peak": _peak(), **stored}


def _scoring(rows: int, sparsity: Any, seed: int, state: str) -> dict[str, int]:
    """The most that a process held which scored with stored weights; what its tables take in training, by shapes."""
    model_config, schema, parsed = _parts(rows, sparsity)
    weights = load_tensors(Path(state) / "weights")
    model = load_model(model_config, schema, weights, where=Path(state), sparsity=parsed)
    ids_B = torch.from_numpy(np.random.default_rng(seed).integers(0, rows, BATCH))
    with torch.no_grad():
        lengths = torch.ones(BATCH, dtype=torch.int32)
        model(Batch(torch.empty(BATCH, 0), KeyedJaggedTensor(["item"], ids_B, lengths=lengths), torch.empty(BATCH, 0)))
    return {"peak_scoring": _peak(), "tensors": bytes_of(model).training}


def memory_table(file: Path = RECORDS) -> str:
    """Bytes at ten million rows of 64, beside dense."""
    names = [f"memory | {name}" for name in KINDS]
    figures = [
        "tensors",
        "resident_of_tables",
        "peak_of_tables",
        "peak",
        "checkpoint",
        "bundle_weights",
        "peak_scoring",
    ]
    rows = records.summary(file, names, figures)
    if not rows:
        return ""
    head = ["table", "tensors", "resident in training", "at most", "whole process", "checkpoint", "Bundle's weights"]
    lines = [f"| {' | '.join([*head, 'process that scores', 'runs'])} |", "|" + "---|" * (len(head) + 2)]
    dense = rows[0]
    for row in rows:
        cells = [f"{row[k] / 2**30:.2f} GiB" + ("" if row is dense else f" ({row[k] / dense[k]:.2f})") for k in figures]
        lines.append(f"| {' | '.join([row['name'].split(' | ')[1], *cells, str(row['n'])])} |")
    return "\n".join(lines)


def _resident() -> int:
    """Bytes of this process's memory that are in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak() -> int:
    """The most that was ever resident; of this program alone, where `ru_maxrss` also counts the one that started it."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


# Time


FIELDS, FIELD_ROWS, BATCH_OF_FIELDS = 26, 400_000, 4096
USERS, ITEMS, BATCH_OF_PAIRS = 29_859, 40_982, 1024
"""Of Gowalla, row 0 included; few are much more popular than others, so ids are uniform."""
ZIPF = 1.2
"""Id r is drawn in proportion to r to minus this power."""
INTERVAL = 100
TIMED: dict[str, Sparsity | None] = {
    "dense": None,
    "sparse": Sparsity(density=0.1, schedule=Schedule(grow="none")),
    "moving": Sparsity(density=0.1, schedule=Schedule(interval=INTERVAL, window=INTERVAL)),
    "element": Sparsity(density=0.1, state="element", schedule=Schedule(grow="none")),
}
WATCHED = 0.1
"""Share of an interval that a window takes where it is not all of it."""
CYCLE = 5
"""Steps between the updates that are timed: enough to fill the window, but for Zipf's single ids, to two thirds."""
STEPS = {
    "sparse_step": "fixed mask",
    "moving_step": "moving, watched for a tenth",
    "watched_step": "moving, always watched",
    "element_step": "fixed, a sum for each weight",
}
LOOKUPS = [(ids, bags) for ids in ("uniform", "Zipf") for bags in ("one id", "1 to 20 ids")]


class _Tables(nn.Module):
    """Tables alone, in the shape that models have them."""

    def __init__(self, schema: Schema, sparsity: Sparsity | None) -> None:
        super().__init__()
        self.embed = Embeddings(schema, DIM, TableKind(torch.device("meta"), sparsity))

    def forward(self, batch: Batch) -> Tensor:
        return self.embed(batch)


def time_jobs(*, quick: bool) -> list[records.Job]:
    """26 tables in training and in scoring; uniform and Zipf ids, one a bag or one to twenty; a step on Gowalla."""
    rows, turns = (20_000, 5) if quick else (FIELD_ROWS, 15)
    shape = {"bench": "time", "rows": rows, "dim": DIM, "fields": FIELDS, "batch": BATCH_OF_FIELDS, "turns": turns}
    shape |= {"watched": WATCHED, "cycle": CYCLE}
    kinds = {name: sparsity and sparsity.model_dump(mode="json") for name, sparsity in TIMED.items()}
    jobs: list[records.Job] = []
    for what, measure in (("time", _timed), ("scoring", _scored)):
        for ids, bags in LOOKUPS:

            def run(seed: int, ids: str = ids, bags: str = bags, measure: Any = measure) -> Mapping[str, Any]:
                return measure(rows, ids, bags == "1 to 20 ids", seed, turns)

            config = {**shape, "what": what, "ids": ids, "bags": bags, "zipf": ZIPF, "kinds": kinds}
            jobs.append(records.Job(f"{what} | {ids}, {bags}", config, 1 if quick else SEEDS, run))
    steps = 20 if quick else 200
    config = {"bench": "time", "what": "step", "rows": [USERS, ITEMS], "dim": DIM, "batch": BATCH_OF_PAIRS}
    config |= {"turns": steps, "kinds": kinds, "watched": WATCHED}
    jobs.append(records.Job("step | Gowalla", config, 1 if quick else SEEDS, lambda seed: _gowalla_steps(seed, steps)))
    return jobs


class Clock:
    """Seconds by what was done: medians of turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, run: Callable[[], object]) -> None:
        """Run and time it."""
        begun = time.perf_counter()
        run()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def medians(self) -> dict[str, float]:
        """By name; of the moving mask, the step on average over an interval."""
        found = {name: median(values) for name, values in self.seconds.items()}
        watched, update = found.pop("moving_step"), found.pop("update")
        found["moving_step"] = step_of(found["sparse_step"], watched, update, WATCHED)
        found["watched_step"] = step_of(found["sparse_step"], watched, update, 1.0)
        return found


def step_of(plain: float, watched: float, update: float, share: float) -> float:
    """Seconds of a step with a moving mask, on average over an interval; updates are beside the steps.

    `share`: of the interval's steps, those whose gradients are watched. The others are as with a fixed mask.
    """
    return (1 - share) * plain + share * watched + update / INTERVAL


def _timed(rows: int, ids: str, multi: bool, seed: int, turns: int) -> dict[str, float]:
    """A training step of the tables, and a lookup in training, by kind; interleaved."""
    torch.set_num_threads(1)
    join_process_group(CPU)
    rng, schema = np.random.default_rng(seed), _fields(rows, multi)
    batches = [_random_batch(rng, rows, ids, multi) for _ in range(4)]
    models = _in_training(lambda sparsity: _Tables(schema, sparsity), BATCH_OF_FIELDS, seed)
    gradient_BFD = torch.randn(BATCH_OF_FIELDS, FIELDS, DIM)
    clock, moves = Clock(), _Moves(models["moving"], seed, CYCLE)
    for turn in range(turns):
        # The rows of a step are not those of the lookup before it: they would be in the cache.
        first, second = batches[turn % 4], batches[(turn + 2) % 4]

        def look(module: nn.Module) -> None:
            with torch.no_grad():
                module(first)  # noqa: B023

        def step(module: nn.Module) -> None:
            module(second).backward(gradient_BFD)  # noqa: B023

        for name, sharded in _from(models, turn):
            with torch.no_grad():  # what it finds, in the cache and of free memory, is not what another kind left
                sharded.module(batches[(turn + 1) % 4])
            clock(f"{name}_lookup", lambda module=sharded.module: look(module))
            with moves(clock, turn) if name == "moving" else nullcontext():
                clock(f"{name}_step", lambda module=sharded.module: step(module))
    found = clock.medians()
    found.pop("moving_lookup")
    return found


def _scored(rows: int, ids: str, multi: bool, seed: int, turns: int) -> dict[str, float]:
    """Scoring a batch with what a Bundle holds, a factorization machine, which adds little to its tables."""
    torch.set_num_threads(1)
    rng, schema, config = np.random.default_rng(seed), _fields(rows, multi), FMConfig(dim=DIM - 1)
    batches = [_random_batch(rng, rows, ids, multi) for _ in range(4)]
    models = {n: build_model(config, schema, sparsity=s).eval() for n, s in TIMED.items() if n in ("dense", "sparse")}
    clock = Clock()

    def score(model: Model, batch: Batch) -> None:
        with torch.no_grad():
            model.probabilities(model(batch))

    for turn in range(turns):
        for name, model in _from(models, turn):
            score(model, batches[(turn + 1) % 4])  # as in `_timed`
            clock(f"{name}_scoring", lambda model=model: score(model, batches[turn % 4]))  # noqa: B023
    return {name: median(values) for name, values in clock.seconds.items()}


def _gowalla_steps(seed: int, turns: int) -> dict[str, float]:
    """Whole training steps of matrix factorization on tables of Gowalla's sizes: forward, loss, backward, updates."""
    torch.set_num_threads(1)
    join_process_group(CPU)
    rng = np.random.default_rng(seed)
    sparse = (Sparse(name="user", rows=USERS), Sparse(name="item", rows=ITEMS))
    schema = Schema(keys=(), dense=(), sparse=sparse, labels=("interaction",), item="item")
    config = TwoTowerConfig(query=("user",), item=("item",), dim=DIM)
    models = _in_training(
        lambda sparsity: build_model(config, schema, table_device="meta", sparsity=sparsity), BATCH_OF_PAIRS, seed
    )
    counts = torch.from_numpy(rng.integers(1, 100, ITEMS))
    inner = {n: next(m for m in s.module.modules() if isinstance(m, TwoTower)) for n, s in models.items()}
    for model in inner.values():
        model.count_items(counts)
    optimizers = {name: torch.optim.Adam(sharded.dense.values()) for name, sharded in models.items()}
    clock, moves = Clock(), _Moves(models["moving"], seed, min(turns, INTERVAL))

    def step(name: str, batch: Batch) -> None:
        loss = inner[name].loss(models[name].module(batch), batch.labels_BT)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    for turn in range(turns):
        ids_2B = np.stack([rng.integers(1, t.rows, BATCH_OF_PAIRS) for t in sparse])
        lengths = torch.ones(2 * BATCH_OF_PAIRS, dtype=torch.int32)
        keyed = KeyedJaggedTensor(["user", "item"], torch.from_numpy(ids_2B).view(-1), lengths=lengths)
        batch = Batch(torch.empty(BATCH_OF_PAIRS, 0), keyed, torch.ones(BATCH_OF_PAIRS, 1))
        for name, _ in _from(models, turn):
            with moves(clock, turn) if name == "moving" else nullcontext():
                clock(f"{name}_step", lambda name=name, batch=batch: step(name, batch))
    return clock.medians()


def _fields(rows: int, multi: bool) -> Schema:
    sparse = tuple(Sparse(name=f"f{i}", rows=rows, multi=multi) for i in range(FIELDS))
    return Schema(keys=(), dense=(), sparse=sparse, labels=("click",))


def _in_training(make: Callable[[Sparsity | None], nn.Module], batch_size: int, seed: int) -> dict[str, Sharded]:
    """Models ready to train, by kind."""
    found: dict[str, Sharded] = {}
    for name, sparsity in TIMED.items():
        found[name] = shard(make(sparsity), CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=batch_size)
        reset_tables(found[name], seed)
    return found


def _from(models: Mapping[str, Any], turn: int) -> list[tuple[str, Any]]:
    """All, another first each turn."""
    items = list(models.items())
    return items[turn % len(items) :] + items[: turn % len(items)]


class _Moves:
    """Lets a mask watch every step, and times its updates, one after each cycle of so many."""

    def __init__(self, sharded: Sharded, seed: int, cycle: int) -> None:
        self.mover, self.cycle = Mover(list(sharded.sparse.values()), 1000, 1000, seed), cycle

    @contextmanager
    def __call__(self, clock: Clock, turn: int) -> Iterator[None]:
        """Around a step."""
        at = INTERVAL - self.cycle + turn % self.cycle
        self.mover.before_step(at)
        yield
        if at == INTERVAL - 1:
            clock("update", lambda: self.mover.after_step(at))


def _random_batch(rng: np.random.Generator, rows: int, ids: str, multi: bool) -> Batch:
    bags = FIELDS * BATCH_OF_FIELDS
    sizes = rng.integers(1, 21, bags) if multi else np.ones(bags, dtype=np.int64)
    total = int(sizes.sum())
    drawn = rng.integers(0, rows, total) if ids == "uniform" else zipf_ids(rng, rows, total)
    keys = [f"f{i}" for i in range(FIELDS)]
    sparse = KeyedJaggedTensor(keys, torch.from_numpy(drawn), lengths=torch.from_numpy(sizes.astype(np.int32)))
    return Batch(torch.empty(BATCH_OF_FIELDS, 0), sparse, torch.empty(BATCH_OF_FIELDS, 0))


def zipf_ids(rng: np.random.Generator, rows: int, total: int) -> NDArray[np.int64]:
    """Ids below `rows`, the first the most frequent."""
    share_R = np.arange(1, rows + 1) ** -ZIPF
    return np.searchsorted(np.cumsum(share_R / share_R.sum())[:-1], rng.random(total), side="right")


def time_table(file: Path = RECORDS) -> str:
    """Time at density 0.1 by that of dense tables in the same run."""
    steps = ["dense_step", *STEPS]
    rows = records.summary(file, [f"time | {i}, {b}" for i, b in LOOKUPS], [*steps, "dense_lookup", "sparse_lookup"])
    rows += records.summary(file, ["step | Gowalla"], steps)
    scoring = records.summary(file, [f"scoring | {i}, {b}" for i, b in LOOKUPS], ["dense_scoring", "sparse_scoring"])
    if not rows:
        return ""
    head = ["what", "dense step", *STEPS.values(), "dense lookup", "sparse"]
    lines = [f"| {' | '.join([*head, 'dense scoring', 'sparse', 'runs'])} |", "|" + "---|" * (len(head) + 3)]
    for row in rows:
        name, step = row["name"].split(" | ")[1], row["dense_step"]
        cells = [name, f"{step * 1e3:.1f} ms"]
        cells += [f"{row[kind] / step:.2f}" for kind in STEPS]
        beside = row | next((s for s in scoring if s["name"].endswith(f"| {name}")), {})
        for what in ("lookup", "scoring"):
            dense = beside.get(f"dense_{what}")
            cells += [f"{dense * 1e3:.1f} ms", f"{beside[f'sparse_{what}'] / dense:.2f}"] if dense else ["", ""]
        lines.append(f"| {' | '.join([*cells, str(row['n'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
