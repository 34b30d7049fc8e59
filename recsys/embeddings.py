"""One vector per field: table rows for ids, a scaled vector for numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from base.errors import ConfigError
from features.schema import Schema
from recsys.batch import Batch

# Shape suffixes: B = batch, F = fields (sparse, then dense), S = sparse, N = dense fields, D = embedding dimension,
# C = copies.

WIDTH_UNIT = 4
"""fbgemm's rows are multiples of four floats."""


class Embeddings(nn.Module):
    """embedding_BFD of a batch, fields in the schema's order.

    Initially normal with `init_std`: at 0.01 AutoInt learned slower (synthetic log, 2 epochs: AUC .675, not .710).
    Ids: the mean of the rows in a bag, 0 for an empty one (AutoInt, equations 2 and 3). Numbers: v_m x_m (equation 4).
    `copies` names independent sets of tables for tasks that share nothing; `separate` gives one embedding for each.
    """

    def __init__(
        self,
        schema: Schema,
        dim: int,
        table_device: torch.device,
        init_std: float = 0.1,
        copies: Sequence[str] = ("",),
    ) -> None:
        super().__init__()
        if dim % WIDTH_UNIT:
            raise ConfigError(f"model.dim = {dim}: fbgemm needs a multiple of {WIDTH_UNIT}; try {-(-dim // 4) * 4}")
        if not schema.sparse:
            raise ConfigError(
                "features: none gives ids; add a vocabulary, hash, cross, boundaries or quantiles feature"
            )
        self.dim = dim
        self.init_std = init_std
        self.copies = len(copies)
        tables = [(f, f"{f.name}@{copy}" if copy else f.name) for copy in copies for f in schema.sparse]
        self.table_names = [table for _, table in tables]
        # TorchRec names the embedding of a feature that several tables share `feature@table`.
        self.names = [f"{f.name}@{table}" if len(copies) > 1 else f.name for f, table in tables]
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table,
                    feature_names=[f.name],
                    num_embeddings=f.rows,
                    embedding_dim=dim,
                    pooling=PoolingType.MEAN,
                )
                for f, table in tables
            ],
            device=table_device,
        )
        self.numeric_ND = nn.Parameter(torch.randn(self.copies * len(schema.dense), dim) * init_std)
        """One copy after the other."""

    def forward(self, batch: Batch) -> Tensor:
        return self.separate(batch)[:, 0]

    def separate(self, batch: Batch) -> Tensor:
        """embedding_BCFD: one per copy."""
        pooled_BCSD = in_order(self.tables(batch.sparse), self.names, self.dim).unflatten(1, (self.copies, -1))
        vectors_CND = self.numeric_ND.view(self.copies, batch.dense_BN.shape[1], self.dim)
        numbers_BCND = batch.dense_BN[:, None, :, None] * vectors_CND
        return torch.cat([pooled_BCSD, numbers_BCND], dim=2)


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


def feature_of(table: str) -> str:
    """The feature whose rows a table holds; copies are called `feature@copy`."""
    return table.partition("@")[0]


def normal_rows(rows_K: Tensor, dim: int, seed: int) -> Tensor:
    """Standard normal values_KD that follow from each row's number alone, however many rows there are."""
    cells_KD = rows_K.numpy().astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)
    first_KD, second_KD = (_uniform(cells_KD * np.uint64(2) + np.uint64(i), seed) for i in (0, 1))
    return torch.from_numpy(np.sqrt(-2 * np.log(first_KD)) * np.cos(2 * np.pi * second_KD))  # Box and Muller 1958


def _uniform(counter: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """In (0, 1]: SplitMix64 (Steele et al., OOPSLA 2014) of a counter."""
    with np.errstate(over="ignore"):
        z = (counter + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
