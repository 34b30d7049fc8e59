"""Records of measurements: one JSON line per (configuration, seed), with the commit it was measured at."""

import gc
import hashlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.config import Config
from base.storage import read_manifest

FOLDER = Path(__file__).parent / "records"
LIGHTGCN = "| LightGCN, as its PyTorch repository reports | .1824 | .1547"
"""Recall@20 and NDCG@20 on Gowalla, a table's row as far as that."""
CODE = ("base", "features", "recsys")
"""What a result depends on: the commit of a record is the last one that touched these."""


def commit() -> str:
    """Short hash of the last commit that touched the measured code, `+` if it has changed since."""
    root = Path(__file__).parent.parent
    last = _git(root, "log", "-1", "--format=%h", "--", *CODE)
    return last + ("+" if _git(root, "status", "--porcelain", "--", *CODE) else "")


def config_hash(config: Mapping[str, Any]) -> str:
    """Key of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def settings_of(table: Config, *also: str) -> dict[str, Any]:
    """What of `[train]` or `[ssl]` decides a result. Settings younger than some records count once they are used."""
    unused = {k for k, v in _YOUNGER.items() if getattr(table, k, v) == v}
    return table.model_dump(mode="json", exclude={"processes", *unused, *also})


_YOUNGER = {"table_l2": 0.0, "evaluate_every": 1, "table_accumulator_decay": 1.0, "masked": None, "hidden": ()}


def rows_hash(*folders: Path) -> str:
    """What published Parquet files hold, whoever made them: the data part of a configuration's key."""
    files = [
        (name, file.sha256)
        for folder in folders
        for name, file in sorted(read_manifest(folder.resolve()).files.items())
        if name.endswith(".parquet")
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One configuration to measure for several seeds."""

    name: str
    config: Mapping[str, Any]
    seeds: int
    measure: Callable[[int], Mapping[str, Any]]
    """Seed to figures."""


def run_jobs(file: Path, jobs: Sequence[Job], *, budget_seconds: float) -> None:
    """Measure what is not recorded yet until the budget is spent: seed by seed, first the jobs that have most seeds.

    A record of an earlier commit counts: to measure anew after a change that matters, remove its lines.
    """
    at, started = commit(), time.perf_counter()
    done = {(r["config_hash"], r["seed"]) for r in read(file)}
    durations: dict[str, float] = {}
    waiting = [(s, j) for j in jobs for s in range(1, j.seeds + 1) if (config_hash(j.config), s) not in done]
    waiting.sort(key=lambda both: (-both[1].seeds, both[0]))  # stable: a seed's jobs in their order
    for i, (seed, job) in enumerate(waiting):
        spent = time.perf_counter() - started
        if spent + durations.get(job.name, 0) > budget_seconds:
            print(f"{job.name} seed {seed}: left out, the budget of {budget_seconds:.0f} s would not suffice")
            continue
        gc.collect()  # models refer to themselves in circles; waiting for the collector, tables of several jobs pile up
        begun = time.perf_counter()
        figures = job.measure(seed)
        durations[job.name] = time.perf_counter() - begun
        record = {"name": job.name, "config_hash": config_hash(job.config), "commit": at, "seed": seed}
        append(file, {**record, "config": job.config, "seconds": round(durations[job.name], 1), **figures})
        eta = sum(durations.get(j.name, durations[job.name]) for _, j in waiting[i + 1 :])
        shown = ", ".join(f"{k} {v:.5f}" for k, v in figures.items() if isinstance(v, float))
        print(
            f"[{i + 1}/{len(waiting)}] {job.name} seed {seed}: {shown} ({durations[job.name]:.0f} s, ETA {eta:.0f} s)",
            flush=True,
        )


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(record, sort_keys=True) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All records, oldest first; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def by_seed(file: Path, name: str) -> dict[int, dict[str, Any]]:
    """The records of the newest configuration recorded for a name, the last of each seed."""
    mine = [r for r in read(file) if r["name"] == name]
    return {r["seed"]: r for r in mine if r["config_hash"] == mine[-1]["config_hash"]}


def summary(file: Path, names: Iterable[str], figures: Sequence[str]) -> list[dict[str, Any]]:
    """Per name: mean and standard deviation over the seeds of the newest configuration recorded for it.

    A figure that there was nothing for is nan.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        mine = list(by_seed(file, name).values())
        if not mine:
            continue
        row: dict[str, Any] = {"name": name, "n": len(mine), "commits": sorted({r["commit"] for r in mine})}
        for figure in figures:
            values = [float("nan") if r[figure] is None else r[figure] for r in mine]
            row[figure] = statistics.mean(values)
            row[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else float("nan")
        rows.append(row)
    return rows


def differences(file: Path, name: str, base: str, figures: Sequence[str]) -> list[list[float]]:
    """Per figure, that of `name` less that of `base`, within each seed that both have, trained in the same way."""
    ours, theirs = by_seed(file, name), by_seed(file, base)
    seeds = [
        seed
        for seed in sorted(ours.keys() & theirs.keys())
        if ours[seed]["config"].get("train") == theirs[seed]["config"].get("train")
    ]
    return [[ours[seed][figure] - theirs[seed][figure] for seed in seeds] for figure in figures]


def told(differences: Sequence[float]) -> str:
    """Mean, standard deviation, and of how many it is a gain."""
    gains = sum(d > 0 for d in differences)
    return f"{statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f} ({gains}/{len(differences)})"


def seconds(text: str) -> float:
    """Seconds of `90m`, `2h` or `30s`."""
    units = {"s": 1, "m": 60, "h": 3600}
    return float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
