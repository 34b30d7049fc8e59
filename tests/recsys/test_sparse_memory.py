"""What is not active does not exist: no tensor of rows x dim, at any moment; and ten million rows in 2 GiB."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from features.pipeline import FeaturePipeline
from features.transforms import Hash
from recsys import checkpoint
from recsys.bundle import Bundle, golden_rows, load_model
from recsys.checkpoint import WarmStart
from recsys.data import ExampleStream
from recsys.models.fm import FMConfig
from recsys.sparsity.config import Schedule, Sparsity
from recsys.trainer import TrainConfig, train

ROWS, DIM = 300_000, 64
CONFIG = FMConfig(dim=DIM - 1)
TRAIN = TrainConfig(batch_size=100, epochs=1, threads=1, checkpoint_every=4)
KINDS = {
    "within rows": Sparsity(density=0.1, schedule=Schedule(interval=4, window=2)),
    "between rows, element": Sparsity(
        density=0.1, state="element", allocation="popularity", schedule=Schedule(interval=4, window=2, redistribute=1.0)
    ),
    "er": Sparsity(density=0.1, allocation="er", schedule=Schedule(interval=4, window=2, grow="random")),
}


class Largest(TorchDispatchMode):
    """The most bytes that any tensor had which an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor) and tensor.nbytes > self.bytes:
                self.bytes, self.operation = tensor.nbytes, str(func)
        return found


@contextmanager
def nothing_dense() -> Iterator[None]:
    """No tensor has half the bytes of rows x dim. A tenth is active, and chunks of rows are sorted."""
    with Largest() as largest:
        yield
    assert 0 < largest.bytes < ROWS * DIM * 4 / 2, f"{largest.operation}: {largest.bytes} bytes"


def test_the_watch_sees_a_dense_table() -> None:
    with pytest.raises(AssertionError, match="aten"), nothing_dense():
        torch.zeros(ROWS, DIM)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_ever_as_large_as_the_dense_table(kind: str, tmp_path: Path, examples: Any) -> None:
    """In initialisation, training, checkpoints, going on after growth, Bundles and scoring."""
    sparsity, rng = KINDS[kind], np.random.default_rng(0)
    raw = pl.DataFrame({"item": [f"i{n}" for n in rng.integers(0, 10**6, 1600)], "@click": rng.integers(0, 2, 1600)})
    features = FeaturePipeline((Hash(column="item", buckets=ROWS),)).fit(raw.lazy())
    schema = features.schema([], ["click"])
    table = features.transform(raw.lazy(), keep=("@click",)).collect().with_columns(pl.col("@click").cast(pl.Int8))
    path = tmp_path / "examples.parquet"
    table.write_parquet(path)
    fit = ExampleStream((path,), schema, 100)
    with nothing_dense():
        trained = train(CONFIG, schema, fit, fit, TRAIN, tmp_path / "state", sparsity=sparsity)
    feature = schema.sparse[0]
    larger = schema.model_copy(update={"sparse": (feature.model_copy(update={"rows": ROWS + 70_000}),)})
    fresh = {feature.name: np.arange(ROWS - 5, ROWS + 70_000)}
    with nothing_dense():
        warm = WarmStart(trained.state, fresh)
        train(
            CONFIG,
            larger,
            ExampleStream((path,), larger, 100),
            None,
            TRAIN,
            tmp_path / "on",
            warm=warm,
            sparsity=sparsity,
        )
    with nothing_dense():
        model = load_model(CONFIG, schema, trained.weights, where=tmp_path, sparsity=sparsity)
        parts = (model, CONFIG, features, schema, {}, {})
        bundle = Bundle(*parts, raw.head(0), sparsity=sparsity)
        saved = Bundle(*parts, golden_rows(bundle, raw.head(8)), sparsity=sparsity).save(tmp_path / "bundle")
        saved.check_golden()
        scores = pl.concat(saved.predict(raw.lazy()))
    assert scores["p_click"].n_unique() > 100
    assert checkpoint.stands_at(tmp_path / "state").step == 16


CHILD = """
import json, resource, sys
from pathlib import Path
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import numpy as np, polars as pl, torch
from features.schema import Schema, Sparse
from recsys import checkpoint
from recsys.bundle import load_model
from recsys.data import ExampleStream
from recsys.models.fm import FMConfig
from recsys.sparsity.config import Schedule, Sparsity
from recsys.trainer import TrainConfig, train

ROWS, DIM, folder = 10_000_000, 64, Path(sys.argv[1])
try:
    torch.zeros(ROWS, DIM)
    dense = "fits"
except RuntimeError as error:
    dense = str(error)
schema = Schema(keys=(), dense=(), sparse=(Sparse(name="item", rows=ROWS),), labels=("click",))
rng = np.random.default_rng(0)
frame = {"item": rng.integers(0, ROWS, 8000), "@click": rng.integers(0, 2, 8000)}
pl.DataFrame(frame, schema={"item": pl.Int32, "@click": pl.Int8}).write_parquet(folder / "fit.parquet")
fit = ExampleStream((folder / "fit.parquet",), schema, 1000)
sparsity = Sparsity(density=0.1, schedule=Schedule(interval=2, window=2, redistribute=0.2, stop=1))
config = TrainConfig(batch_size=1000, epochs=1, threads=1, checkpoint_every=3)
arguments = (FMConfig(dim=DIM - 1), schema, fit, None, config, folder / "state")

class Stopped(Exception):
    pass

def stop(progress):
    if progress.step == 5:
        raise Stopped

try:
    train(*arguments, sparsity=sparsity, on_step=stop)
except Stopped:
    pass
trained = train(*arguments, sparsity=sparsity)
model = load_model(FMConfig(dim=DIM - 1), schema, trained.weights, where=folder, sparsity=sparsity)
sizes_R = trained.weights["embed.tables.sizes_R"]
weights = {n: t.numel() * t.element_size() for n, t in trained.weights.items()}
print(json.dumps({
    "dense": dense,
    "resumed_at": trained.resumed_at,
    "budget": int(sizes_R.sum(dtype=torch.int64)),
    "none": int((sizes_R == 0).sum()),
    "bytes": sum(weights.values()),
    "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


@pytest.mark.slow
def test_ten_million_rows_train_in_2_gib(tmp_path: Path) -> None:
    """RLIMIT_DATA: all private writable memory that the process may map, used or not, its own code's data included.

    The dense table alone, 2.56 GB, cannot be had there; the sparse one is trained, moved, stopped, resumed, loaded.
    """
    # Arrow's own allocator maps a GiB before it is asked for anything.
    memory = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", **memory}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(2 * 2**30)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    print(found)
    assert "allocate" in found["dense"]
    assert found["resumed_at"] == 3
    assert found["budget"] == 64_000_000
    assert found["none"] > 0
    assert found["bytes"] < 0.15 * 10_000_000 * 64 * 4
    assert found["resident"] < 2 * 2**30
