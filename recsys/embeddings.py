"""One vector per field: table rows for ids, a scaled vector for numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from base.errors import ConfigError, did_you_mean
from features.schema import Schema, Sparse
from recsys.batch import Batch
from recsys.sparsity.config import Sparsity
from recsys.sparsity.tables import SparseTable, SparseTables

# Shape suffixes: B = batch, F = fields (sparse, then dense), S = sparse, N = dense fields, D = embedding dimension,
# C = copies.

WIDTH_UNIT = 4
"""fbgemm's rows are multiples of four floats."""


@dataclass(frozen=True)
class TableKind:
    """What tables are made of."""

    device: torch.device
    """With the meta device they take no memory until they are sharded or loaded."""
    sparsity: Sparsity | None = None
    """None for dense ones."""


class Embeddings(nn.Module):
    """embedding_BFD of a batch, fields in the schema's order.

    Initially normal with `init_std`: at 0.01 AutoInt learned slower (synthetic log, 2 epochs: AUC .675, not .710).
    Ids: the mean of the rows in a bag, 0 for an empty one (AutoInt, equations 2 and 3). Numbers: v_m x_m (equation 4).
    `copies` names independent sets of tables for tasks that share nothing; `separate` gives one embedding for each.
    With `padded` any `dim` will do: what dense tables have more, nothing reads.
    """

    def __init__(
        self,
        schema: Schema,
        dim: int,
        tables: TableKind,
        init_std: float = 0.1,
        copies: Sequence[str] = ("",),
        *,
        padded: bool = False,
    ) -> None:
        super().__init__()
        if dim % WIDTH_UNIT and not padded:
            raise ConfigError(f"model.dim = {dim}: fbgemm needs a multiple of {WIDTH_UNIT}; try {-(-dim // 4) * 4}")
        if not schema.sparse:
            raise ConfigError(
                "features: none gives ids; add a vocabulary, hash, cross, boundaries or quantiles feature"
            )
        self.init_std = init_std
        self.dropped: tuple[Sequence[int], float] | None = None
        """Places of fields that training leaves out of a row, each with this probability."""
        self.copies = len(copies)
        named = [(f, table_name(f.name, copy)) for copy in copies for f in schema.sparse]
        self.table_names = [table for _, table in named]
        # TorchRec names the embedding of a feature that several tables share `feature@table`.
        self.names = [f"{f.name}@{table}" if len(copies) > 1 else f.name for f, table in named]
        self.tables: EmbeddingBagCollection | SparseTables
        if tables.sparsity is None:
            self.dim = -(-dim // WIDTH_UNIT) * WIDTH_UNIT
            self.tables = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=table,
                        feature_names=[f.name],
                        num_embeddings=f.rows,
                        embedding_dim=self.dim,
                        pooling=PoolingType.MEAN,
                    )
                    for f, table in named
                ],
                device=tables.device,
            )
        else:
            self.dim = dim
            self.tables = SparseTables(
                _sparse_tables(schema, named, tables.sparsity), dim, tables.sparsity, tables.device, init_std
            )
        self.numeric_ND = nn.Parameter(torch.randn(self.copies * len(schema.dense), self.dim) * init_std)
        """One copy after the other."""

    def forward(self, batch: Batch) -> Tensor:
        embedding_BCFD = self.separate(batch)
        # A view also on the way back, where a selection would be written out among zeros.
        return embedding_BCFD.squeeze(1) if self.copies == 1 else embedding_BCFD[:, 0]

    def separate(self, batch: Batch) -> Tensor:
        """embedding_BCFD: one per copy."""
        pooled = self.tables(batch.sparse)
        pooled_BSD = pooled if isinstance(pooled, Tensor) else in_order(pooled, self.names, self.dim)
        e_BCFD = pooled_BSD.unflatten(1, (self.copies, -1))
        # In training, DistributedDataParallel, which is around dense tables, wants all parameters used.
        if batch.dense_BN.shape[1] or (torch.is_grad_enabled() and not isinstance(pooled, Tensor)):
            vectors_CND = self.numeric_ND.view(self.copies, batch.dense_BN.shape[1], self.dim)
            e_BCFD = torch.cat([e_BCFD, batch.dense_BN[:, None, :, None] * vectors_CND], dim=2)
        if self.dropped is None or not self.training:
            return e_BCFD
        places, probability = self.dropped
        kept_BF = e_BCFD.new_ones(e_BCFD.shape[0], e_BCFD.shape[2])
        kept_BF[:, places] = (torch.rand(len(kept_BF), len(places), device=kept_BF.device) >= probability).float()
        return e_BCFD * kept_BF[:, None, :, None]


def _sparse_tables(schema: Schema, named: Sequence[tuple[Sparse, str]], sparsity: Sparsity) -> list[SparseTable]:
    order = [f.name for f in schema.sparse]
    for name in sparsity.features or ():
        if name not in order:
            hint = did_you_mean(name, order, f"; they are {', '.join(order)}")
            raise ConfigError(f"sparsity.features: {name!r} is no feature with a table{hint}")
    chosen = set(order if sparsity.features is None else sparsity.features)
    return [SparseTable(table, f.name, f.rows, f.multi, f.name in chosen) for f, table in named]


def in_order(pooled: KeyedTensor, names: list[str], dim: int) -> Tensor:
    """pooled_BSD in the order of `names`: a sharded collection gives its keys in an order of its own."""
    pooled_BSD = pooled.values().view(-1, len(names), dim)
    keys = pooled.keys()
    if keys == names:
        return pooled_BSD
    return pooled_BSD[:, [keys.index(name) for name in names]]


def reset_table(weights_RD: Tensor, std: float, generator: torch.Generator) -> None:
    """Initialise a table in place, by blocks, so that no second copy of a large one is made."""
    for block in weights_RD.split(2**20):
        block.copy_(torch.randn(block.shape, generator=generator) * std)


_DOT = "@@"
"""For a dot, which torch's module names cannot hold. Names hold no "@", so that a single one begins the copy."""
_FEATURE = re.compile(f"(?:[^@]|{_DOT})*")
_TAKEN = nn.ModuleDict()
"""Tables are in one, and cannot be called like its own attributes, as a column `type` is."""


def table_name(feature: str, copy: str = "") -> str:
    """The table with a feature's rows, or with one task's copy of them: `feature`, `feature@copy`."""
    name = feature.replace(".", _DOT)
    return f"{name}@{copy.replace('.', _DOT)}" if copy or hasattr(_TAKEN, name) else name


def feature_of(table: str) -> str:
    """The feature whose rows a table holds."""
    return table[: _end(table)].replace(_DOT, ".")


def shown(table: str) -> str:
    """A table's name for people: that of its feature, with the copy if it is one."""
    copy = table[_end(table) + 1 :].replace(_DOT, ".")
    return f"{feature_of(table)}@{copy}" if copy else feature_of(table)


def _end(table: str) -> int:
    found = _FEATURE.match(table)
    assert found is not None  # it matches nothing at all as well
    return found.end()
