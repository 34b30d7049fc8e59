"""From prepared examples to batches: Parquet row groups in, shuffled in windows, cut into batches; no worker processes.

Rows are shuffled within a window of row groups (2^17 rows each) whose order is shuffled too: a global shuffle for up to
`window` groups, and bounded memory above. Everything follows from (seed, epoch), so a position is just a batch number.
Where negatives are down-sampled, a row group keeps its positives and a seeded draw of its negatives, anew each epoch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from base.errors import DataError, IdError
from features.schema import Schema, Sparse, carried
from recsys.batch import Batch, part_of

# Shape suffixes: R = rows of a table, B = batch, N = dense features, T = tasks, V = ids.

ROW_GROUP = 2**17
"""Rows per Parquet row group of prepared examples: the unit of reading and shuffling."""

IdPolicy = Literal["error", "unknown"]
"""What to do with an id outside its table: refuse, or use row 0 and count."""


@dataclass
class IdCount:
    """How many ids lay outside their table and were replaced by row 0."""

    replaced: int = 0


def check_ids(ids_V: Tensor, feature: Sparse, policy: IdPolicy, count: IdCount) -> Tensor:
    """Ids that are safe to look up; fbgemm itself would silently read row 0.

    Returns `ids_V` untouched if all lie in [0, rows), else a corrected copy under policy `unknown`.
    Raises IdError naming the feature and an id under policy `error`.
    """
    if ids_V.numel() == 0:
        return ids_V
    low, high = torch.aminmax(ids_V)
    if low >= 0 and high < feature.rows:
        return ids_V
    outside_V = (ids_V < 0) | (ids_V >= feature.rows)
    if policy == "error":
        raise IdError(
            f"feature {feature.name!r}: id {int(ids_V[outside_V][0])} is outside its table of {feature.rows} rows "
            f"({int(outside_V.sum())} such ids): the examples were made by another pipeline; prepare them again"
        )
    count.replaced += int(outside_V.sum())
    return ids_V.masked_fill(outside_V, 0)


@dataclass
class Columns:
    """A table of examples as tensors, ready to be cut into batches."""

    schema: Schema
    dense_RN: Tensor
    labels_RT: Tensor
    ids: list[Tensor]
    """Per sparse feature: int64 ids of all rows, one after the other."""
    offsets: list[Tensor | None]
    """Per sparse feature: where each row's ids begin, R + 1 long; None where each row has exactly one."""

    def __len__(self) -> int:
        return self.dense_RN.shape[0]

    def batch(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) as a batch."""
        rows = stop - start
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        one_B = torch.ones(rows, dtype=torch.int32)
        for ids_V, offsets in zip(self.ids, self.offsets, strict=True):
            if offsets is None:
                values.append(ids_V[start:stop])
                lengths.append(one_B)
            else:
                window = offsets[start : stop + 1]
                values.append(ids_V[int(window[0]) : int(window[-1])])
                lengths.append((window[1:] - window[:-1]).int())
        sparse = KeyedJaggedTensor(
            keys=[f.name for f in self.schema.sparse], values=torch.cat(values), lengths=torch.cat(lengths)
        )
        return Batch(self.dense_RN[start:stop], sparse, self.labels_RT[start:stop])


def to_columns(
    frame: pl.DataFrame, schema: Schema, *, labels: bool, policy: IdPolicy = "error", count: IdCount | None = None
) -> Columns:
    """Turn a frame of examples into tensors, checking every id; labels not known yet (null) become NaN.

    Raises DataError on a missing value or column.
    """
    count = count if count is not None else IdCount()
    needed = [f.name for f in (*schema.sparse, *schema.dense)] + [carried(n) for n in schema.labels if labels]
    if absent := [name for name in needed if name not in frame.columns]:
        raise DataError(f"column {absent[0]!r} is missing from the examples; prepare them again")
    ids: list[Tensor] = []
    offsets: list[Tensor | None] = []
    for feature in schema.sparse:
        column = frame[feature.name]
        if feature.multi:
            lengths = column.list.len().fill_null(0).to_numpy()
            flat = column.explode(empty_as_null=False, keep_nulls=False)
            bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=bounds[1:])
            if bounds[-1] != flat.len():
                raise DataError(f"feature {feature.name!r}: bags hold {bounds[-1]} ids, exploding gave {flat.len()}")
            column = flat
            offsets.append(torch.from_numpy(bounds))
        else:
            offsets.append(None)
        if column.null_count():
            raise DataError(
                f"feature {feature.name!r}: {column.null_count()} ids are missing; prepare the examples again"
            )
        ids_V = torch.from_numpy(column.cast(pl.Int64).to_numpy(writable=True))
        ids.append(check_ids(ids_V, feature, policy, count))
    dense = [f.name for f in schema.dense]
    names = [carried(label) for label in schema.labels] if labels else []
    known = frame.with_columns(pl.col(name).cast(pl.Float32).fill_null(float("nan")) for name in names)
    return Columns(schema, _matrix(frame, dense), _matrix(known, names), ids, offsets)


def _matrix(frame: pl.DataFrame, names: Sequence[str]) -> Tensor:
    matrix_RC = np.empty((frame.height, len(names)), dtype=np.float32)
    for i, name in enumerate(names):
        column = frame[name]
        if column.null_count():
            raise DataError(f"column {name!r}: {column.null_count()} values are missing; prepare the examples again")
        matrix_RC[:, i] = column.to_numpy()
    return torch.from_numpy(matrix_RC)


def batches(columns: Columns, batch_size: int) -> Iterator[Batch]:
    """All rows in order; the last batch may be smaller."""
    for start in range(0, len(columns), batch_size):
        yield columns.batch(start, min(start + batch_size, len(columns)))


@dataclass(frozen=True)
class ExampleStream:
    """Prepared examples as an endless supply of epochs; each rank of `world` sees its `part_of` every batch."""

    files: tuple[Path, ...]
    schema: Schema
    batch_size: int
    """Rows of a batch, all ranks together."""
    shuffle: bool = False
    seed: int = 0
    window: int = 8
    """Row groups that are shuffled together."""
    rank: int = 0
    world: int = 1
    policy: IdPolicy = "error"
    count: IdCount = field(default_factory=IdCount)
    sampled: bool = False
    """Whether to keep only the schema's `negative_rate` of the rows whose first label (of the funnel) is 0."""

    def rows(self) -> int:
        """All rows, before sampling."""
        return sum(rows for _, _, rows in self._groups)

    def row_counts(self) -> dict[str, Tensor]:
        """By sparse feature, how often each row of its table is looked up in the files: counts_R, before sampling.

        Raises IdError for an id outside its table.
        """
        found = {f.name: torch.zeros(f.rows, dtype=torch.int64) for f in self.schema.sparse}
        for file, group, _ in self._groups:
            for feature in self.schema.sparse:
                column = pl.Series(pq.ParquetFile(file).read_row_group(group, columns=[feature.name]).column(0))
                ids = column.explode(empty_as_null=False, keep_nulls=False) if feature.multi else column
                ids_V = check_ids(
                    torch.from_numpy(ids.cast(pl.Int64).to_numpy(writable=True)), feature, "error", self.count
                )
                found[feature.name] += torch.bincount(ids_V, minlength=feature.rows)
        return found

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches in an epoch; with uneven row groups or sampling it differs a little between epochs."""
        return len(self.batch_rows(epoch))

    def batch_rows(self, epoch: int) -> list[int]:
        """Rows of each batch of an epoch, all ranks together."""
        return [n for rows in self._window_rows(epoch) for n in self._cut(rows)]

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's part of each batch of an epoch, from batch number `start` on."""
        windows = self._windows(epoch)
        passed = 0
        with ThreadPoolExecutor(1) as reader:  # reads ahead; pyarrow and Polars release the interpreter lock
            pending = None
            for i, window in enumerate(windows):
                sizes = [len(self._part(n)) for n in self._cut(sum(self._kept(group, epoch) for group in window))]
                if passed + len(sizes) <= start:
                    passed += len(sizes)
                    continue
                columns = (pending or reader.submit(self._read, window, epoch, i)).result()
                following = windows[i + 1] if i + 1 < len(windows) else None
                pending = reader.submit(self._read, following, epoch, i + 1) if following else None
                first = max(start - passed, 0)
                position = sum(sizes[:first])
                for size in sizes[first:]:
                    yield columns.batch(position, position + size)
                    position += size
                passed += len(sizes)

    def _cut(self, rows: int) -> list[int]:
        """The sizes of the batches of a window."""
        return [min(self.batch_size, rows - start) for start in range(0, rows, self.batch_size)]

    def _part(self, rows: int) -> range:
        return part_of(rows, self.rank, self.world)

    def _mine(self, rows: int) -> NDArray[np.int64]:
        """Positions, among the rows of a window, of this rank's parts of its batches."""
        starts = range(0, rows, self.batch_size)
        parts = [start + np.asarray(self._part(n)) for start, n in zip(starts, self._cut(rows), strict=True)]
        return np.concatenate(parts) if parts else np.arange(0)

    @cached_property
    def _groups(self) -> list[tuple[Path, int, int]]:
        found: list[tuple[Path, int, int]] = []
        for file in self.files:
            metadata = pq.read_metadata(file)
            found += [(file, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
        return found

    def _windows(self, epoch: int) -> list[list[tuple[Path, int, int]]]:
        groups = self._groups
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(groups))
            groups = [groups[i] for i in order]
        return [groups[i : i + self.window] for i in range(0, len(groups), self.window)]

    def _window_rows(self, epoch: int) -> list[int]:
        return [sum(self._kept(group, epoch) for group in window) for window in self._windows(epoch)]

    @property
    def _sampled_label(self) -> str | None:
        """Column of the label whose negatives are thinned out, if any."""
        if not self.sampled or self.schema.negative_rate == 1:
            return None
        return carried(self.schema.sampled_label)

    @cached_property
    def _negatives(self) -> dict[tuple[Path, int], int]:
        """Negatives of each row group, where they are sampled."""
        label = self._sampled_label
        if label is None:
            return {}
        found: dict[tuple[Path, int], int] = {}
        for file, i, _ in self._groups:
            column = pq.ParquetFile(file).read_row_group(i, columns=[label]).column(0)
            found[file, i] = int((pl.Series(column) == 0).sum())
        return found

    def _draw(self, group: tuple[Path, int, int], epoch: int) -> tuple[np.random.Generator, int]:
        """The group's own generator, and how many negatives to keep: the rate exactly, rounded at random."""
        number = self._groups.index(group)
        rng = np.random.default_rng((self.seed, epoch, number, 1))
        return rng, int(self.schema.negative_rate * self._negatives[group[:2]] + rng.random())

    def _kept(self, group: tuple[Path, int, int], epoch: int) -> int:
        if self._sampled_label is None:
            return group[2]
        return group[2] - self._negatives[group[:2]] + self._draw(group, epoch)[1]

    def _read_group(self, group: tuple[Path, int, int], epoch: int, names: list[str]) -> pl.DataFrame:
        frame = pl.from_arrow(pq.ParquetFile(group[0]).read_row_group(group[1], columns=names))
        assert isinstance(frame, pl.DataFrame)
        label = self._sampled_label
        if label is None:
            return frame
        rng, keep = self._draw(group, epoch)
        negative_R = (frame[label] == 0).fill_null(False).to_numpy()
        kept_R = ~negative_R
        kept_R[rng.choice(np.flatnonzero(negative_R), keep, replace=False)] = True
        return frame.filter(kept_R)

    def _read(self, window: list[tuple[Path, int, int]], epoch: int, index: int) -> Columns:
        names = [f.name for f in (*self.schema.sparse, *self.schema.dense)] + [carried(n) for n in self.schema.labels]
        frame = pl.concat([self._read_group(group, epoch, names) for group in window])
        if self.shuffle or self.world > 1:
            order = np.arange(frame.height)
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch, index)).permutation(frame.height)
            if self.world > 1:
                order = order[self._mine(frame.height)]
            frame = frame[order]
        return to_columns(frame, self.schema, labels=True, policy=self.policy, count=self.count)
