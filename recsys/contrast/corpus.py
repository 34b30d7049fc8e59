"""Items for the self-supervised task: the corpus, and batches drawn from it that follow from the step alone."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from base.errors import ConfigError, DataError, did_you_mean
from features.schema import Dense, Schema, Sparse
from recsys.batch import Batch
from recsys.contrast.config import SelfSupervision
from recsys.contrast.information import mutual_information
from recsys.data import ExampleStream, to_columns

# Shape suffixes: I = items of the corpus, N = items of a batch, R = N or 2 N rows, S = features of the item, V = ids.

_STREAM = 0x55
"""Keeps these draws apart from others with the same seed."""


@dataclass
class ItemBatch:
    """Items, and what their two views see."""

    rows: Batch
    """All items; if values are dropped in a feature that both views see, all of them twice, the first views first."""
    ids_N: Tensor
    """Items with the same number are no negatives of each other."""
    masked_S: Tensor
    """bool: the features that the first view does not see; the second sees these alone. All False without masking."""

    def to(self, device: torch.device) -> "ItemBatch":
        return ItemBatch(self.rows.to(device), self.ids_N.to(device), self.masked_S.to(device))


@dataclass(frozen=True)
class Corpus:
    """Which items there are, and what is done with them."""

    config: SelfSupervision
    stream: ExampleStream
    """Examples that have the items' features; of the others nothing is read."""
    item: tuple[str, ...]
    """Names of the item's features."""
    distinct: bool
    """Whether rows with the same features are one item, as in a log; otherwise each row is one."""

    def frame(self) -> pl.DataFrame:
        """The features of each item, in the order of the files. Raises DataError if there are none."""
        bags = {f.name for f in self.stream.schema.sparse if f.multi}
        found = pl.scan_parquet(list(self.stream.files)).select(
            pl.col(name).list.sort() if name in bags else pl.col(name) for name in self.item
        )
        if self.distinct:
            found = found.unique(maintain_order=True)
        frame = found.collect(engine="streaming")
        if not frame.height:
            raise DataError("the corpus of [ssl] has no items; prepare again")
        return frame


class Items:
    """The corpus in memory; a step's batch follows from `seed` and the step alone."""

    def __init__(self, corpus: Corpus, schema: Schema, batch_size: int, seed: int) -> None:
        self.config, self.schema, self.seed = corpus.config, schema, seed
        self.fields = item_fields(corpus.config, corpus.item, schema)
        frame = corpus.frame()
        own = schema.model_copy(
            update={
                "sparse": tuple(f for f in self.fields if isinstance(f, Sparse)),
                "dense": tuple(f for f in self.fields if isinstance(f, Dense)),
                "labels": (),
            }
        )
        self.columns = to_columns(frame, own, labels=False)
        self.size = min(corpus.config.batch_size or batch_size, len(self))
        self.equal_I: Tensor | None = None
        """By item, the first with the same features; where these are to be no negatives."""
        if self.config.eliminate_false_negatives:
            equal_I = frame.with_row_index("row").select(pl.col("row").first().over(corpus.item))["row"]
            self.equal_I = torch.from_numpy(equal_I.cast(pl.Int64).to_numpy(writable=True))
        self.related_SS: NDArray[np.int64] | None = None
        """By feature the others, those that tell most about it first; ties by their order."""
        if self.config.masks and self.config.masking == "cfm":
            order_SS = np.argsort(-mutual_information(frame, self.fields), axis=1, kind="stable")
            self.related_SS = np.stack([row[row != own] for own, row in enumerate(order_SS)])

    def __len__(self) -> int:
        return len(self.columns)

    def batch(self, step: int) -> ItemBatch:
        """Different items, each of the corpus as likely as any other."""
        rng = np.random.default_rng((self.seed, step, _STREAM))
        rows_N = torch.from_numpy(rng.choice(len(self), self.size, replace=False))
        masked_S = torch.from_numpy(self.mask(rng))
        ids_N = rows_N if self.equal_I is None else self.equal_I[rows_N]
        twice = self.config.drops_values and not self.config.masks
        return ItemBatch(self._examples(torch.cat([rows_N, rows_N]) if twice else rows_N, rng), ids_N, masked_S)

    def mask(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """masked_S: 1 + floor(S / 2) features, but never all, so that the other view sees something."""
        width = len(self.fields)
        masked_S = np.zeros(width, dtype=np.bool_)
        if self.config.masks:
            number = min(1 + width // 2, width - 1)
            if self.related_SS is not None:
                seed = int(rng.integers(width))
                masked_S[[seed, *self.related_SS[seed, : number - 1]]] = True
            else:
                masked_S[rng.permutation(width)[:number]] = True
        return masked_S

    def _examples(self, rows_R: Tensor, rng: np.random.Generator) -> Batch:
        """Examples of the whole schema, in which what is not of the item is empty or 0."""
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        own = {f.name: i for i, f in enumerate(self.columns.schema.sparse)}
        for feature in self.schema.sparse:
            ids_V, lengths_R = torch.empty(0, dtype=torch.int64), torch.zeros(len(rows_R), dtype=torch.int64)
            if feature.name in own:
                ids_V, lengths_R = self._bags(own[feature.name], rows_R, rng)
            values.append(ids_V)
            lengths.append(lengths_R.int())
        dense_RN = torch.zeros(len(rows_R), len(self.schema.dense))
        names = [f.name for f in self.schema.dense]
        for i, field in enumerate(self.columns.schema.dense):
            dense_RN[:, names.index(field.name)] = self.columns.dense_RN[rows_R, i]
        keys = [f.name for f in self.schema.sparse]
        sparse = KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))
        return Batch(dense_RN, sparse, torch.empty(len(rows_R), 0))

    def _bags(self, place: int, rows_R: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Ids and lengths of the rows' bags, without what is dropped."""
        ids_V, offsets = self.columns.ids[place], self.columns.offsets[place]
        if offsets is None:
            return ids_V[rows_R], torch.ones_like(rows_R)
        lengths_R = offsets[rows_R + 1] - offsets[rows_R]
        row_V = torch.repeat_interleave(torch.arange(len(rows_R)), lengths_R)
        within_V = torch.arange(len(row_V)) - (lengths_R.cumsum(0) - lengths_R)[row_V]
        place_V = offsets[rows_R][row_V] + within_V
        if self.config.drops_values:
            kept_V = torch.from_numpy(rng.random(len(row_V)) >= self.config.value_dropout)
            row_V, place_V = row_V[kept_V], place_V[kept_V]
        return ids_V[place_V], torch.bincount(row_V, minlength=len(rows_R))


def item_fields(config: SelfSupervision, item: tuple[str, ...], schema: Schema) -> list[Sparse | Dense]:
    """The item's features. Raises ConfigError where one does not exist, or there is none to mask beside another."""
    known = {f.name: f for f in (*schema.sparse, *schema.dense)}
    require_item(config, item, tuple(known))
    return [known[name] for name in item]


def require_item(config: SelfSupervision, item: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises ConfigError unless `item` names features, each once, and as many as masking needs."""
    for name in item:
        if name not in known:
            hint = did_you_mean(name, known, f"; the features are {', '.join(known)}")
            raise ConfigError(f"ssl.item: {name!r} is no feature{hint}")
    if len(set(item)) < len(item):
        raise ConfigError(f"ssl.item = {list(item)}: name each feature once")
    if config.masks and len(item) == 1:
        (name,) = item
        raise ConfigError(
            f'ssl.masking = "{config.masking}" shares features out between two views, and the item has one alone, '
            f'{name!r}; use masking = "none" with embedding_masking, or a baseline'
        )
