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


ENCODE = """
import sys
from pathlib import Path
import polars as pl
from features.pipeline import FittedPipeline
folder = Path(sys.argv[1])
fitted = FittedPipeline.load((folder / "out/features").resolve())
log = pl.scan_parquet(folder / "log/day=2026-03-03/part.parquet")
fitted.transform(log, keep=["click"]).sink_parquet(folder / "encoded.parquet", row_group_size=2**17)
"""


def peak(*arguments: str) -> int:
    """The most bytes that a command held at once, looked at often; pages of files that it reads are not held."""
    process, most = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL), 0
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
    """Its 60 ids are 240 bytes. Encoding holds less of a row than that, as it is streamed, whole steps half as much
    again, since keys are compared with one another."""
    small, large = (project(tmp_path / str(rows), rows) for rows in SIZES)

    def verb(name: str, folder: Path, *options: str) -> int:
        return peak("-m", "pipelines.cli", name, "--config", str(folder / "run.toml"), *options)

    prepared = [verb("prepare", folder) for folder in (small, large)]
    encoded = [peak("-c", ENCODE, str(folder)) for folder in (small, large)]
    verb("train", small)
    scored = [verb("score", f, "--model", str(small / "out/models/lr/bundle")) for f in (small, large)]
    peaks = {"encode": encoded, "prepare": prepared, "score": scored}
    more = {step: (after - before) / (SIZES[1] - SIZES[0]) for step, (before, after) in peaks.items()}
    print(peaks, more)
    assert more["encode"] < 240, more
    assert max(more.values()) < 360, more
