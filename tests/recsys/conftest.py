"""Examples for the tests of this folder: schemas, frames, files and batches, all small and seeded."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from features.schema import Dense, Schema, Sparse, carried
from recsys.batch import Batch
from recsys.data import ExampleStream, to_columns
from recsys.distributed import join_process_group


@pytest.fixture(scope="session", autouse=True)
def one_process_one_thread() -> Iterator[None]:
    """A process group of this process alone, and arithmetic that repeats bit for bit."""
    join_process_group(torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Examples:
    """Makes schemas, and examples that keep to them."""

    @staticmethod
    def schema(tasks: int = 1, dense: int = 2, *, funnel: bool = False, negative_rate: float = 1.0) -> Schema:
        """Tables of different sizes, one of a single row, two of bags; of a funnel, the labels click and buy.

        Two of them have names that torch refuses: one with a dot, one that an attribute has.
        """
        labels = ("click", "buy") if funnel else ("click", "like", "buy")[:tasks]
        return Schema(
            keys=(),
            dense=tuple(Dense(name=f"number{n}") for n in range(dense)),
            sparse=(
                Sparse(name="type", rows=7),
                Sparse(name="tags", rows=23, multi=True),
                Sparse(name="word", rows=4_000),
                Sparse(name="only", rows=1),
                Sparse(name="genres", rows=12, multi=True),
                Sparse(name="geo.color", rows=5),
            ),
            labels=labels,
            funnel=labels if funnel else (),
            negative_rate=negative_rate,
        )

    @staticmethod
    def frame(schema: Schema, rows: int, seed: int = 0, *, empty: float = 0.2) -> pl.DataFrame:
        """Random examples; a share of `empty` bags holds nothing, and nobody skips a step of the funnel."""
        rng = np.random.default_rng(seed)
        columns: dict[str, pl.Series] = {}
        for feature in schema.sparse:
            if feature.multi:
                sizes = np.where(rng.random(rows) < empty, 0, rng.integers(1, 5, rows))
                bags = [rng.integers(0, feature.rows, size).tolist() for size in sizes]
                columns[feature.name] = pl.Series(bags, dtype=pl.List(pl.Int32))
            else:
                columns[feature.name] = pl.Series(rng.integers(0, feature.rows, rows), dtype=pl.Int32)
        for number in schema.dense:
            columns[number.name] = pl.Series(rng.normal(size=rows), dtype=pl.Float32)
        for label in schema.labels:
            columns[carried(label)] = pl.Series(rng.integers(0, 2, rows), dtype=pl.Int8)
        for before, after in pairwise(map(carried, schema.funnel)):
            columns[after] = columns[after] * columns[before]
        return pl.DataFrame(columns)

    @staticmethod
    def batch(schema: Schema, frame: pl.DataFrame) -> Batch:
        return to_columns(frame, schema, labels=carried(schema.labels[0]) in frame.columns).batch(0, frame.height)

    @staticmethod
    def write(frame: pl.DataFrame, path: Path, row_group: int = 2**17) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path, row_group_size=row_group)
        return path

    @classmethod
    def stream(cls, schema: Schema, frame: pl.DataFrame, path: Path, batch_size: int, **settings: Any) -> ExampleStream:
        """A stream over one file of 500 rows a group."""
        return ExampleStream((cls.write(frame, path, 500),), schema, batch_size, **settings)


@pytest.fixture(scope="session")
def examples() -> type[Examples]:
    return Examples
