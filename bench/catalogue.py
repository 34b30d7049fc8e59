"""A synthetic catalogue of a million items and a known truth: what towers find of it, how fast it is served."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch

from base.config import load_config
from base.storage import read_manifest, resolve
from bench.rankers import ROOT, K, Kind, Log, asking_fewer, figures, log_of, trained_model
from features.readers.catalogue import CatalogueConfig, Truth
from pipelines.config import Recommend, Run
from pipelines.generate import generate
from pipelines.index import index
from pipelines.train import make_bundle
from recsys.bundle import Bundle, Origin
from recsys.retrieval import ITEM, ITEMS, RELEVANT, SEEN, USER, USERS, Ranking, measure_scores
from recsys.towers import vectors_of
from serving.index import ExactConfig, HNSWConfig, IndexConfig, ItemIndex, IVFPQConfig

RUN = ROOT / "pipelines" / "runs" / "catalogue.toml"
DAYS = 6
ASKED_IN_TRAINING, ASKED = 2_000, 4_000
"""Users whose rankings of all items are measured."""
INDEXES: dict[str, IndexConfig] = {
    "exact": ExactConfig(min_recall=0),
    "hnsw": HNSWConfig(kind="hnsw", min_recall=0),
    "ivf_pq": IVFPQConfig(kind="ivf_pq", min_recall=0),
}
"""Each kind with its own settings, published whatever it finds."""
QUERIES, TURNS = 1_000, 5
_CELLS = 2**22
"""Scores of the truth computed at a time."""
_RECOMMEND = """
import json, sys, time
from pathlib import Path
from bench.catalogue import catalogue_run
from pipelines.recommend import recommend
run = catalogue_run(Path(sys.argv[1]))
begun = time.perf_counter()
recommend(run, model=str(run.bundle_path), overwrite=True, say=lambda _: None)
seconds = time.perf_counter() - begun
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"seconds": seconds, "peak": int(peak.split()[1]) * 1024}))
"""
"""What `recsys recommend` does in a process of its own, and the most memory that it ever held."""


def catalogue_config(*, quick: bool) -> CatalogueConfig:
    """A million items in 2,000 themes, 200,000 clicks a day."""
    if quick:
        return CatalogueConfig(items=12_000, users=2_000, themes=100, rows_per_day=20_000)
    return CatalogueConfig(items=1_000_000, users=20_000, themes=2_000, rows_per_day=1_000_000)


def catalogue_key(config: CatalogueConfig) -> dict[str, Any]:
    """What decides the log of a seed, and what is asked about it."""
    code = b"".join((ROOT / f"features/readers/{n}.py").read_bytes() for n in ("catalogue", "hashes"))
    generator = hashlib.sha256(code).hexdigest()[:12]
    asked = {"asked": ASKED, "asked_in_training": ASKED_IN_TRAINING}
    return {"log": json.loads(config.model_dump_json()), "generator": generator, **asked}


def catalogue_run(folder: Path) -> Run:
    """Two towers on a log in `folder`, whose items are recommended without a second stage."""
    items = f"{folder}/logs/items/*.parquet"
    settings = [
        f'output="{folder}"',
        f'data.path="{folder}/logs/day=*/*.parquet"',
        f'tables=[{{ path = "{items}", on = "item_id" }}]',
        f'retrieval.items="{items}"',
    ]
    return load_config(Run, RUN, settings).model_copy(update={"recommend": Recommend(k=K)})


def catalogue_log(config: CatalogueConfig, run: Run, seed: int) -> Log:
    """A seed's log in place of what was in the folder, prepared; asked are fewer users, for all items."""
    shutil.rmtree(run.output, ignore_errors=True)
    days = [config.start + timedelta(days=n) for n in range(DAYS)]
    generate(config.model_copy(update={"seed": seed}), days, run.output / "logs", say=lambda _: None)
    log = log_of(run, run)
    valid = asking_fewer(log.valid, ASKED_IN_TRAINING, run.output / "asked" / "valid")
    return replace(log, valid=valid, test=asking_fewer(log.test, ASKED, run.output / "asked" / "test"))


def oracle(config: CatalogueConfig, ranking: Ranking, day_index: int) -> dict[str, Any]:
    """Figures of the order by expected clicks: no model's can be better but by luck."""
    items = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM])[ITEM].to_numpy()
    users = pl.read_parquet(ranking.folder / USERS, columns=[USER])[USER].to_numpy()
    truth, size = Truth(config, items, day_index), max(1, _CELLS // len(items))
    chunks = (torch.from_numpy(truth.expected_clicks(users[i : i + size])) for i in range(0, len(users), size))
    pairs = (ranking.pairs(SEEN), ranking.pairs(RELEVANT))
    return figures(measure_scores(chunks, *pairs, ranking.slices(), ranking.cuts.k).table)


# --- serving ---------------------------------------------------------------------------------------------------------


def served(kind: Kind, log: Log, seed: int) -> dict[str, Any]:
    """By kind of index: recall, seconds to build, queries per second; users per second and memory of `recommend`."""
    run = kind.of(log.run)
    model, trained = trained_model(run, log.fitted, log.files, log.valid, seed, kind.name, item_counts=log.counts)
    del model
    last = run.source.partitions("train")[-1].removeprefix("day=")
    bundle = make_bundle(run, log.fitted, trained, run.examples_path, Origin(trained_to=last))
    asked = pl.read_parquet(log.test.folder / USERS, columns=[USER])[USER]
    rows = run.source.raw(run.source.partitions("test")[0]).filter(pl.col("user_id").is_in(asked.implode()))
    users = rows.unique(subset="user_id", keep="first", maintain_order=True).head(QUERIES).collect()
    queries_QD = np.concatenate(list(vectors_of(bundle, users.lazy(), "query")))
    found: dict[str, Any] = {}
    for name, settings in INDEXES.items():
        indexing = run.model_copy(update={"index": settings})
        path = index(indexing, model=str(run.bundle_path), overwrite=True, say=lambda _: None)
        found |= {f"{name}_{what}": value for what, value in _searched(path, bundle, queries_QD, run).items()}
        found |= {f"{name}_{what}": value for what, value in recommended(run).items()}
    return found


def _searched(path: Path, bundle: Bundle, queries_QD: Any, run: Run) -> dict[str, float]:
    loaded, nothing = ItemIndex.load(path, bundle), np.empty(0, dtype=np.int64)
    seconds: list[float] = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        loaded.search(queries_QD, (nothing, nothing), run.recommend.k)
        seconds.append(time.perf_counter() - begun)
    about = {n: float(loaded.about[n]) for n in ("recall", "build_seconds")}
    size = sum(f.stat().st_size for f in path.resolve().iterdir())
    return {**about, "bytes": float(size), "queries_per_second": len(queries_QD) / median(seconds)}


def recommended(run: Run) -> dict[str, float]:
    """Users per second of `recsys recommend`, its start apart, and its peak bytes."""
    command = [sys.executable, "-c", _RECOMMEND, str(run.output)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    (name,) = run.source.partitions("test")
    users = read_manifest(resolve(run.recommendations_path(name))).about["users"]
    return {"users_per_second": users / told["seconds"], "peak": float(told["peak"])}
