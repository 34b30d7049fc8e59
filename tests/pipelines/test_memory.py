"""prepare and score in processes of their own: what they hold at once hardly grows with the rows of a partition."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

COLUMNS = [f"c{k}" for k in range(60)]
SIZES = (500_000, 2_000_000)
GROUP = 100_000
"""Rows of a Parquet row group, and written at a time."""


def write(path: Path, rows: int) -> None:
    """A partition of integer columns with 500 to 30,000 values each."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(rows)
    writer = None
    for start in range(0, rows, GROUP):
        size = min(GROUP, rows - start)
        columns = {c: rng.integers(0, 500 * (k + 1), size, dtype=np.int16) for k, c in enumerate(COLUMNS)}
        table = pl.DataFrame({"id": np.arange(start, start + size), "click": rng.integers(0, 2, size), **columns})
        writer = writer or pq.ParquetWriter(path, table.to_arrow().schema)
        writer.write_table(table.to_arrow())
    assert writer is not None
    writer.close()


def peak(folder: Path, verb: str, *options: str) -> int:
    """The most bytes that a verb held at once, looked at often; pages of files that it reads are not held."""
    command = [sys.executable, "-m", "pipelines.cli", verb, "--config", str(folder / "run.toml"), *options]
    process, most = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    assert process.returncode == 0
    return most


def project(folder: Path, rows: int) -> Path:
    for day, size in ((1, rows), (2, 10_000), (3, rows)):
        write(folder / f"log/day=2026-03-0{day}/part.parquet", size)
    features = ", ".join(f'{{ kind = "vocabulary", column = "{c}" }}' for c in COLUMNS)
    (folder / "run.toml").write_text(f"""
output = "{folder}/out"
features = [{features}]
model = {{ name = "lr" }}
train = {{ batch_size = 8192, epochs = 1 }}
[data]
path = "{folder}/log/day=*/*.parquet"
key = ["id"]
labels = ["click"]
time = "day"
split = {{ train = "2026-03-01", valid = "2026-03-02", test = "2026-03-03" }}
""")
    return folder


def test_what_a_row_adds_to_the_peak(tmp_path: Path) -> None:
    """As many bytes as 20 int64 ids would take, of rows of 60, keys and all."""
    small, large = (project(tmp_path / str(rows), rows) for rows in SIZES)
    prepared = [peak(folder, "prepare") for folder in (small, large)]
    peak(small, "train")
    bundle = ("--model", str(small / "out/models/lr/bundle"))
    scored = [peak(folder, "score", *bundle) for folder in (small, large)]
    more = {
        verb: (after - before) / (SIZES[1] - SIZES[0])
        for verb, (before, after) in {"prepare": prepared, "score": scored}.items()
    }
    print({"prepare": prepared, "score": scored, "bytes a row": more})
    assert max(more.values()) < 160, more
