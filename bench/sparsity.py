"""Sparse tables against dense ones: quality on Gowalla and MovieLens-1M, memory at ten million rows, time of a step.

    python -m bench.sparsity --data PATH                   everything; PATH holds gowalla/ and ml-1m/
    python -m bench.sparsity --data PATH --quick           one seed on little data
    python -m bench.sparsity --part memory                 one of gowalla, ml-1m, memory, time
    python -m bench.sparsity --table                       print the tables from the records

Rivals of a sparse model: the dense one; a dense one of smaller dim, whose tables and optimizer state take no fewer
bytes; a fixed random mask; the largest weights of a trained dense model. All have the run file's settings; what was
chosen for sparse models was chosen on validation rows. The best epoch is that of the validation rows, the test rows are
read once. Times are medians of interleaved turns, dense and sparse in one process; memory is of processes of their own.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch
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
from recsys.distributed import join_process_group, reset_tables, shard
from recsys.embeddings import Embeddings, TableKind
from recsys.metrics import log_loss, roc_auc
from recsys.models import DCNConfig, Model, ModelConfig, build_model
from recsys.models.two_tower import TwoTower
from recsys.retrieval import rank_items
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.layout import slots_of
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
GOWALLA: dict[str, Any] = {"epochs": 12, "evaluate_every": 2, "patience": 3}
MOVIELENS: dict[str, Any] = {"epochs": 6}
ON_GOWALLA = Sparsity(density=0.2, positions="half", schedule=Schedule(interval=100, window=100, fraction=0.5))
ON_MOVIELENS = Sparsity(density=0.2)
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
        "gowalla": quality_table(file, "gowalla", {"recall": "Recall@20", "ndcg": "NDCG@20"}),
        "ml-1m": quality_table(file, "ml-1m", {"auc": "AUC", "log_loss": "log loss"}),
        "memory": memory_table(file),
        "time": time_table(file),
    }


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


def kinds(chosen: Sparsity, densities: Sequence[float] = DENSITIES) -> list[Kind]:
    """What is compared, the headline first. `chosen`: the sparsity of the moving mask, at any density."""
    found = [Kind("dense", 1.0)]
    for density in densities:
        moving = chosen.model_copy(update={"density": density})
        fixed = Sparsity(density=density, schedule=Schedule(grow="none"))
        found += [
            Kind(f"sparse {density:g}", density, sparsity=moving),
            Kind(f"smaller dim, bytes of {density:g}", density, dim=smaller_dim(density)),
            Kind(f"fixed mask {density:g}", density, sparsity=fixed),
            Kind(f"pruned {density:g}", density, sparsity=moving, pruned=True),
        ]
    return found


def smaller_dim(density: float) -> int:
    """The least dim, in fours, of which a dense row and its sum take no fewer bytes than a sparse row of DIM."""
    low = max(1, int(density * DIM) // 4 * 4)
    slots = density * DIM if density * DIM >= 4 else 4
    several = 0 if density * DIM == low else 4
    row = 5 * slots + 4 + 1 + several
    return math.ceil((row - 4) / 16) * 4


def quality_table(file: Path, part: str, figures: Mapping[str, str]) -> str:
    """Quality by kind of table, with the bytes of a row."""
    names = [f"{part} | {k.name}" for k in kinds(Sparsity(density=0.5))]
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


def _seeds(kind: Kind, *, quick: bool) -> int:
    return 1 if quick else SEEDS if kind.name == "dense" or kind.density in HEADLINE else 2


def gowalla_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """Matrix factorization with in-batch softmax, by full ranking."""
    settings = [f"data.path={data}/gowalla/*.txt", f"output={work}/gowalla"]
    run = load_config(Run, RUNS / "gowalla.toml", settings)
    run = run.model_copy(update={"train": run.train.model_copy(update=GOWALLA | ({"epochs": 1} if quick else {}))})
    fitted = prepare(run)
    write_ranking(run, fitted, TEST)
    asked = [resolve(run.ranking_path(p)) for p in (["split=valid"], TEST)]
    folders = [resolve(run.examples_path("split=train")), *asked]
    common = {"bench": "sparsity", "part": "gowalla", "rows": records.rows_hash(*folders), "quick": quick}
    jobs: list[records.Job] = []
    for kind in kinds(ON_GOWALLA, DENSITIES[:1] if quick else DENSITIES):

        def measure(seed: int, kind: Kind = kind) -> Mapping[str, Any]:
            return _gowalla(run, fitted, kind, seed)

        jobs.append(
            records.Job(f"gowalla | {kind.name}", common | _config(run, kind), _seeds(kind, quick=quick), measure)
        )
    return jobs


def _gowalla(run: Run, fitted: FittedPipeline, kind: Kind, seed: int) -> Mapping[str, Any]:
    files = tuple(examples_of(run, ["split=train"], fitted, run.examples_path))
    valid, counts = ranking_of(run, fitted, ["split=valid"]), fitted.counts_of(run.item_feature)
    model, history, best = _trained(run, fitted, kind, seed, files, valid, item_counts=counts)
    assert isinstance(model, TwoTower)
    with torch.no_grad():
        found = rank_items(
            lambda s: (x for x, _ in trainer.passed(model, s, CPU)), model, ranking_of(run, fitted, TEST)
        )
    (top,) = found.filter(slice="all", k=20).to_dicts()
    curve = [h["recall_20"] for h in history if "recall_20" in h]
    return {"recall": top["recall"], "ndcg": top["ndcg"], "valid": curve, "best_epoch": best, "bytes": _bytes(model)}


def _config(run: Run, kind: Kind) -> dict[str, Any]:
    """What decides a result."""
    model = run.model.model_copy(update={"dim": kind.dim})
    sparsity = kind.sparsity and kind.sparsity.model_dump(mode="json")
    train = records.settings_of(run.train, "seed")
    return {"model": model.model_dump(mode="json"), "train": train, "sparsity": sparsity, "pruned": kind.pruned}


def _trained(
    run: Run, fitted: FittedPipeline, kind: Kind, seed: int, files: tuple[Path, ...], valid: Any, **options: Any
) -> tuple[Model, list[dict[str, float]], int]:
    """A model with the best weights of a training; pruned if the kind says so."""
    schema, config = run.schema_of(fitted), run.train.model_copy(update={"seed": seed, "threads": 1})
    fit = ExampleStream(files, schema, config.batch_size, shuffle=True, seed=seed)
    model = run.model.model_copy(update={"dim": kind.dim})
    sparsity = None if kind.pruned else kind.sparsity
    with tempfile.TemporaryDirectory() as scratch:
        ticker = Ticker(f"{kind.name} seed {seed}", interval_seconds=60)
        folder = Path(scratch)
        trained = trainer.train(
            model, schema, fit, valid, config, folder, sparsity=sparsity, on_step=ticker.on_step, **options
        )
    weights = trained.weights
    if kind.pruned:
        assert kind.sparsity is not None
        weights = _pruned(model, schema, kind.sparsity, weights)
    plain = load_model(model, schema, weights, where=Path(kind.name), sparsity=kind.sparsity)
    return plain, trained.history, trained.best_epoch


def _pruned(model: ModelConfig, schema: Schema, sparsity: Sparsity, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tables = build_model(model, schema, table_device="meta", sparsity=sparsity).embed.tables
    assert isinstance(tables, SparseTables)
    dense = {t.name: weights[TABLE.format(t.name)] for t in tables.tables}
    others = {name: t for name, t in weights.items() if name not in {TABLE.format(n) for n in dense}}
    return others | {f"embed.tables.{name}": t for name, t in pruned(tables, dense).items()}


def _bytes(model: Model) -> int:
    """Of the tables and row-wise state that training holds."""
    tables = model.embed.tables
    if not isinstance(tables, SparseTables):
        return sum(t.num_embeddings * 4 * (t.embedding_dim + 1) for t in tables.embedding_bag_configs())
    several = 4 if len(tables.groups) > 1 else 0
    return sum(len(g) * (5 * slots_of(g.size) + 4) for g in tables.groups) + tables.rows * (1 + several)


# MovieLens-1M


def movielens_jobs(data: Path, work: Path, *, quick: bool) -> list[records.Job]:
    """AutoInt with user and movie ids."""
    settings = [f"data.path={data}/ml-1m", f"output={work}/ml-1m"]
    run = with_ids(load_config(Run, RUNS / "ml-1m.toml", settings), settings)
    model = run.model.model_copy(update={"dim": DIM})
    train = run.train.model_copy(update=MOVIELENS | ({"epochs": 1} if quick else {}))
    run = run.model_copy(update={"model": model, "train": train})
    fitted = prepare(run)
    folder = export(run, fitted, work / "ml-1m", share=0.1 if quick else 1.0)
    common = {"bench": "sparsity", "part": "ml-1m", "rows": records.rows_hash(folder), "quick": quick}
    jobs: list[records.Job] = []
    for kind in kinds(ON_MOVIELENS, DENSITIES[:1] if quick else DENSITIES):

        def measure(seed: int, kind: Kind = kind) -> Mapping[str, Any]:
            return _movielens(run, fitted, folder, kind, seed)

        jobs.append(
            records.Job(f"ml-1m | {kind.name}", common | _config(run, kind), _seeds(kind, quick=quick), measure)
        )
    return jobs


def _movielens(run: Run, fitted: FittedPipeline, folder: Path, kind: Kind, seed: int) -> Mapping[str, Any]:
    schema = run.schema_of(fitted)
    valid = ExampleStream((folder / "valid.parquet",), schema, run.train.batch_size)
    model, history, best = _trained(run, fitted, kind, seed, (folder / "train.parquet",), valid)
    labels, probabilities = predicted(model, schema, folder / "test.parquet")
    curve = [h[f"p_{run.labels[0]}.auc"] for h in history]
    found = {"auc": roc_auc(labels, probabilities), "log_loss": log_loss(labels, probabilities)}
    return {**found, "valid": curve, "best_epoch": best, "bytes": _bytes(model)}


# Memory


def memory_jobs(*, quick: bool) -> list[records.Job]:
    """A table of ten million rows: trained, its mask moved, written as a checkpoint, read as a model that scores."""
    rows = 200_000 if quick else ROWS
    jobs: list[records.Job] = []
    for name, sparsity in KINDS.items():
        given = None if sparsity is None else sparsity.model_dump(mode="json")
        config = {"bench": "memory", "rows": rows, "dim": DIM, "batches": BATCHES, "batch": BATCH, "sparsity": given}

        def measure(seed: int, given: Any = given) -> Mapping[str, Any]:
            empty, full = _measured(64, None, seed), _measured(rows, given, seed)
            own = {f"{k}_of_tables": full[k] - empty[k] for k in ("resident", "peak", "peak_scoring")}
            return {**own, **full, "tensors": _tensors(rows, given)}

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
    """The most that a process held which scored with stored weights."""
    model_config, schema, parsed = _parts(rows, sparsity)
    weights = load_tensors(Path(state) / "weights")
    model = load_model(model_config, schema, weights, where=Path(state), sparsity=parsed)
    ids_B = torch.from_numpy(np.random.default_rng(seed).integers(0, rows, BATCH))
    with torch.no_grad():
        lengths = torch.ones(BATCH, dtype=torch.int32)
        model(Batch(torch.empty(BATCH, 0), KeyedJaggedTensor(["item"], ids_B, lengths=lengths), torch.empty(BATCH, 0)))
    return {"peak_scoring": _peak()}


def _tensors(rows: int, sparsity: Any) -> int:
    """Bytes of a table and its optimizer's state by the shapes of their tensors."""
    if sparsity is None:
        return rows * (4 * DIM + 4)
    tables = SparseTables(
        [SparseTable("item", "item", rows, False, True)],
        DIM,
        Sparsity.model_validate(sparsity),
        torch.device("meta"),
        0.1,
    )
    sizes_R = tables.first_sizes(None)
    found = 0
    for size, count in zip(*(x.tolist() for x in torch.unique(sizes_R, return_counts=True)), strict=True):
        sums = 4 if sparsity["state"] == "row" else 4 * slots_of(size)
        found += count * (slots_of(size) * 5 + sums)
    several = len(torch.unique(sizes_R)) > 1
    return found + rows * (1 + (4 if several else 0))


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
    """The most that was ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Time


FIELDS, FIELD_ROWS, BATCH_OF_FIELDS = 26, 400_000, 4096


class _Tables(nn.Module):
    """Tables alone, in the shape that models have them."""

    def __init__(self, schema: Schema, sparsity: Sparsity | None) -> None:
        super().__init__()
        self.embed = Embeddings(schema, DIM, TableKind(torch.device("meta"), sparsity))

    def forward(self, batch: Batch) -> Tensor:
        return self.embed(batch)


def time_jobs(*, quick: bool) -> list[records.Job]:
    """Lookup, backward and update of 26 tables; uniform and Zipf ids, one a bag or one to twenty."""
    rows = 20_000 if quick else FIELD_ROWS
    jobs: list[records.Job] = []
    for ids in ("uniform", "Zipf"):
        for bags in ("one id", "1 to 20 ids"):
            config = {"bench": "time", "rows": rows, "dim": DIM, "fields": FIELDS, "batch": BATCH_OF_FIELDS}
            config |= {"ids": ids, "bags": bags, "kinds": sorted(TIMED)}

            def measure(seed: int, ids: str = ids, bags: str = bags) -> Mapping[str, Any]:
                return _timed(rows, ids, bags, seed, turns=3 if quick else 15)

            jobs.append(records.Job(f"time | {ids}, {bags}", config, 1 if quick else SEEDS, measure))
    return jobs


TIMED: dict[str, Sparsity | None] = {
    "dense": None,
    "sparse": Sparsity(density=0.1, schedule=Schedule(grow="none")),
    "moving": Sparsity(density=0.1, schedule=Schedule(interval=100, window=10)),
    "element": Sparsity(density=0.1, state="element", schedule=Schedule(grow="none")),
}


def _timed(rows: int, ids: str, bags: str, seed: int, *, turns: int) -> dict[str, float]:
    """Seconds of a training step of the tables, and of a lookup, by kind: medians of interleaved turns.

    `moving` is a tenth of steps that collect gradients, and a hundredth of an update of the mask.
    """
    torch.set_num_threads(1)
    join_process_group(CPU)
    rng = np.random.default_rng(seed)
    multi = bags != "one id"
    schema = Schema(
        keys=(),
        dense=(),
        sparse=tuple(Sparse(name=f"f{i}", rows=rows, multi=multi) for i in range(FIELDS)),
        labels=("click",),
    )
    batches = [_random_batch(rng, rows, ids, multi) for _ in range(4)]
    models = {}
    for name, sparsity in TIMED.items():
        sharded = shard(_Tables(schema, sparsity), CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=BATCH_OF_FIELDS)
        reset_tables(sharded, seed)
        models[name] = sharded
    gradient_BFD = torch.randn(BATCH_OF_FIELDS, FIELDS, DIM)
    seconds: dict[str, list[float]] = {}

    def clock(name: str, run: Callable[[], None]) -> None:
        begun = time.perf_counter()
        run()
        seconds.setdefault(name, []).append(time.perf_counter() - begun)

    mover = Mover(list(models["moving"].sparse.values()), 1000, seed)
    for turn in range(turns):
        for name, sharded in models.items():
            batch = batches[turn % len(batches)]

            def step(sharded: Any = sharded, batch: Batch = batch) -> None:
                sharded.module(batch).backward(gradient_BFD)

            def look(sharded: Any = sharded, batch: Batch = batch) -> None:
                with torch.no_grad():
                    sharded.module(batch)

            clock(f"{name}_lookup", look)
            if name != "moving":
                clock(f"{name}_step", step)
                continue
            clock("plain", step)
            mover.before_step(99)
            clock("collecting", step)
            clock("update", lambda: mover.after_step(99))
    found = {name: median(values) for name, values in seconds.items()}
    found["moving_step"] = 0.9 * found.pop("plain") + 0.1 * found.pop("collecting") + 0.01 * found.pop("update")
    found.pop("moving_lookup")
    return found


def _random_batch(rng: np.random.Generator, rows: int, ids: str, multi: bool) -> Batch:
    sizes = (
        rng.integers(1, 21, FIELDS * BATCH_OF_FIELDS) if multi else np.ones(FIELDS * BATCH_OF_FIELDS, dtype=np.int64)
    )
    total = int(sizes.sum())
    drawn = rng.integers(0, rows, total) if ids == "uniform" else np.minimum(rng.zipf(1.2, total), rows) - 1
    keys = [f"f{i}" for i in range(FIELDS)]
    sparse = KeyedJaggedTensor(keys, torch.from_numpy(drawn), lengths=torch.from_numpy(sizes.astype(np.int32)))
    return Batch(torch.empty(BATCH_OF_FIELDS, 0), sparse, torch.empty(BATCH_OF_FIELDS, 0))


def time_table(file: Path = RECORDS) -> str:
    """Time of the tables at density 0.1 by that of dense ones in the same run."""
    figures = [
        f"{kind}_{what}" for what in ("step", "lookup") for kind in TIMED if (kind, what) != ("moving", "lookup")
    ]
    names = [f"time | {ids}, {bags}" for ids in ("uniform", "Zipf") for bags in ("one id", "1 to 20 ids")]
    rows = records.summary(file, names, figures)
    if not rows:
        return ""
    head = ["ids", "dense step", "fixed mask", "moving mask", "a sum for each weight", "dense lookup", "sparse lookup"]
    lines = [f"| {' | '.join([*head, 'runs'])} |", "|" + "---|" * (len(head) + 1)]
    for row in rows:
        step, look = row["dense_step"], row["dense_lookup"]
        cells = [row["name"].split(" | ")[1], f"{step * 1e3:.1f} ms"]
        cells += [f"{row[f'{kind}_step'] / step:.2f}" for kind in ("sparse", "moving", "element")]
        cells += [f"{look * 1e3:.1f} ms", f"{row['sparse_lookup'] / look:.2f}", str(row["n"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
