"""Items for the self-supervised task: the corpus, and batches drawn from it that follow from the step alone."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from base.errors import ConfigError, DataError, did_you_mean
from features.schema import Dense, Schema, Sparse, carried
from recsys.batch import Batch
from recsys.contrast.config import SelfSupervision
from recsys.contrast.information import mutual_information
from recsys.data import ExampleStream, to_columns

# Shape suffixes: I = items of the corpus, N = items of a batch, R = N or 2 N rows, S = features of the item, T = those
# that views may see, V = ids.

_STREAM = 0x55
"""Keeps these draws apart from others with the same seed."""
_ROW = carried("row")


@dataclass
class ItemBatch:
    """Items, and what their two views see."""

    rows: Batch
    """All items; if values are dropped in a feature that both views see, all of them twice, the first views first."""
    ids_N: Tensor
    """Items with the same number are no negatives of each other."""
    masked_2S: Tensor
    """bool: by view, the features that it does not see."""

    def to(self, device: torch.device) -> "ItemBatch":
        return ItemBatch(self.rows.to(device), self.ids_N.to(device), self.masked_2S.to(device))


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
        self.hidden_S = np.array([f.name in self.config.hidden for f in self.fields])
        shown = self.config.shown(corpus.item)
        self.equal_I: Tensor | None = None
        """By item, the first that looks the same; where these are to be no negatives."""
        if self.config.eliminate_false_negatives:
            row = pl.col(_ROW).first().over(shown)
            equal_I = frame.with_row_index(_ROW).select(row)[_ROW]
            self.equal_I = torch.from_numpy(equal_I.cast(pl.Int64).to_numpy(writable=True))
        self.related_TT: NDArray[np.int64] | None = None
        """By feature that is shown the others, those that tell most about it first; ties by their order."""
        if self.config.masks and self.config.masking == "cfm":
            information_TT = mutual_information(frame, [f for f in self.fields if f.name in shown])
            order_TT = np.argsort(-information_TT, axis=1, kind="stable")
            self.related_TT = np.stack([row[row != own] for own, row in enumerate(order_TT)])

    def __len__(self) -> int:
        return len(self.columns)

    def batch(self, step: int) -> ItemBatch:
        """Different items, each of the corpus as likely as any other."""
        rng = np.random.default_rng((self.seed, step, _STREAM))
        rows_N = torch.from_numpy(rng.choice(len(self), self.size, replace=False))
        first_S = self.mask(rng)
        masked_2S = torch.from_numpy(np.stack([first_S, ~first_S if self.config.masks else first_S]) | self.hidden_S)
        ids_N = rows_N if self.equal_I is None else self.equal_I[rows_N]
        twice = self.config.drops_values and not self.config.masks
        return ItemBatch(self._examples(torch.cat([rows_N, rows_N]) if twice else rows_N, rng), ids_N, masked_2S)

    def mask(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """first_S: a feature and floor(T / 2) more, or `masked`, of those shown; never all."""
        first_S = np.zeros(len(self.fields), dtype=np.bool_)
        if self.config.masks:
            shown_T = np.flatnonzero(~self.hidden_S)
            width = len(shown_T)
            number = min(1 + (width // 2 if self.config.masked is None else self.config.masked), width - 1)
            if self.related_TT is not None:
                seed = int(rng.integers(width))
                first_S[shown_T[[seed, *self.related_TT[seed, : number - 1]]]] = True
            else:
                first_S[shown_T[rng.permutation(width)[:number]]] = True
        return first_S

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
    for name in config.hidden:
        if name not in item:
            hint = did_you_mean(name, item, f"; they are {', '.join(item)}")
            raise ConfigError(f"ssl.hidden: {name!r} is no feature of the item{hint}")
    shown = config.shown(item)
    if not shown:
        raise ConfigError(f"ssl.hidden = {list(config.hidden)}: the views see nothing of the item; leave a feature out")
    if config.masks and len(shown) == 1:
        raise ConfigError(
            f'ssl.masking = "{config.masking}" shares features out between two views, which see one alone of the item, '
            f'{shown[0]!r}; use masking = "none" with embedding_masking, or a baseline'
        )
    if config.masked is not None and config.masked > len(shown) - 2:
        raise ConfigError(
            f"ssl.masked = {config.masked}: of the {len(shown)} features that views may see, one is drawn and one left "
            f"to the other view; {f'use {len(shown) - 2} at most' if len(shown) > 2 else 'leave it out'}"
        )
