"""What the tests of several processes do on every rank, told by a file of orders; and the same in one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from features.schema import Schema
from recsys import checkpoint
from recsys.checkpoint import WarmStart
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import Sharded, join_process_group, reset_tables, shard
from recsys.models import ModelConfig, build_model
from recsys.trainer import Progress, TrainConfig, learn
from tests.recsys.conftest import Examples

SCHEMAS = {
    "plain": Examples.schema(),
    "two": Examples.schema(tasks=2),
    "funnel": Examples.schema(funnel=True, negative_rate=0.5),
    "items": Examples.schema().model_copy(update={"item": "word"}),
}
ROWS = 1_401
"""In groups of 200, two a window: the last window ends in a batch of one row, of which the second rank has no own."""


class InterruptionError(Exception):
    """On all ranks after the same step."""


def write_examples(root: Path) -> None:
    """Of every schema; a tenth of the labels is not known yet."""
    for kind, schema in SCHEMAS.items():
        for seed, (name, rows, group) in enumerate((("fit", ROWS, 200), ("valid", 301, 100))):
            frame = Examples.frame(schema, rows, seed)
            unknown = pl.Series(np.random.default_rng(seed).random(rows) < 0.1)
            last = f"@{schema.labels[-1]}"
            frame = frame.with_columns(pl.when(~unknown).then(last).alias(last)) if len(schema.labels) > 1 else frame
            Examples.write(frame, root / kind / f"{name}.parquet", group)


def streams(root: Path, kind: str, batch_size: int) -> tuple[ExampleStream, ExampleStream]:
    schema = SCHEMAS[kind]
    fit = ExampleStream(
        (root / kind / "fit.parquet",), schema, batch_size, shuffle=True, seed=4, window=2, sampled=True
    )
    return fit, ExampleStream((root / kind / "valid.parquet",), schema, 128)


def config_of(**settings: Any) -> TrainConfig:
    plain = {"batch_size": 100, "epochs": 2, "learning_rate": 0.01, "table_learning_rate": 0.1, "patience": 10}
    return TrainConfig.model_validate(plain | {"threads": 1, "processes": dist.get_world_size()} | settings)


def trained(
    root: str, folder: str, kind: str, model: dict[str, Any], stop_at: int | None = None, **settings: Any
) -> int | None:
    """Train in `folder`, or until all ranks are interrupted after a step; returns the step it was resumed at."""

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise InterruptionError

    config, schema = config_of(**settings), SCHEMAS[kind]
    fit, valid = streams(Path(root), kind, config.batch_size)
    items = {f.name: np.arange(f.rows) % 9 for f in schema.sparse if f.name == schema.item}
    options: dict[str, Any] = {"on_step": on_step, "item_counts": items.get(schema.item or "")}
    try:
        pace = learn(_model(model), schema, fit, None if items else valid, config, Path(folder), **options)
    except InterruptionError:
        return None
    return pace.resumed_at


def published_again(folder: str, again: str, kind: str, model: dict[str, Any]) -> dict[str, int]:
    """Restore a checkpoint, and publish it elsewhere as a state; returns which rank had which table."""
    sharded, optimizer = _sharded(SCHEMAS[kind], model)
    checkpoint.restore(Path(folder), sharded, optimizer)
    checkpoint.save_best(Path(again), sharded, optimizer)
    return {name: place.rank for name, place in sharded.places.items()}


def started_from(state: str, folder: str, kind: str, model: dict[str, Any], rule: Any) -> None:
    """Start tables that have grown by two rows from a state, and publish what they are then."""
    schema = SCHEMAS[kind]
    fresh = {f.name: np.array([f.rows // 2, f.rows, f.rows + 1]) for f in schema.sparse}
    grown = tuple(f.model_copy(update={"rows": f.rows + 2}) for f in schema.sparse)
    sharded, optimizer = _sharded(schema.model_copy(update={"sparse": grown}), model)
    warm = WarmStart(Path(state), fresh, new_rows=rule, accumulator_decay=0.5)
    checkpoint.start_from(warm, sharded, optimizer, seed=3, accumulator=0.25)
    checkpoint.save_best(Path(folder), sharded, optimizer)


def _sharded(schema: Schema, model: dict[str, Any]) -> tuple[Sharded, torch.optim.Optimizer]:
    torch.manual_seed(9)
    plain = build_model(_model(model), schema, table_device="meta")
    sharded = shard(plain, CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 9)
    return sharded, torch.optim.Adam(sharded.dense.values())


def _model(tree: dict[str, Any]) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(tree)


ORDERS = {function.__name__: function for function in (trained, published_again, started_from)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group(CPU)
    assert dist.get_rank() == int(os.environ["RANK"])
    orders = Path(sys.argv[1])
    results = [ORDERS[name](**arguments) for name, arguments in json.loads(orders.read_text())]
    if dist.get_rank() == 0:
        orders.with_suffix(".results").write_text(json.dumps(results))
    dist.destroy_process_group()
