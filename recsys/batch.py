"""A batch of examples as tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

# Shape suffixes: B = examples in the batch, N = dense features, T = tasks (labels).


@dataclass
class Batch(Pipelineable):
    """What a ranking model sees: numbers, bags of ids by feature name, and labels."""

    dense_BN: Tensor
    """float32; N may be 0."""
    sparse: KeyedJaggedTensor
    """int64 ids, one key per sparse feature of the schema, in its order."""
    labels_BT: Tensor
    """float32: 0, 1, or NaN for a label that is not known yet; T is 0 in scoring."""

    def __len__(self) -> int:
        return self.dense_BN.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(
            self.dense_BN.to(device, non_blocking=non_blocking),
            self.sparse.to(device, non_blocking=non_blocking),
            self.labels_BT.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        return Batch(self.dense_BN.pin_memory(), self.sparse.pin_memory(), self.labels_BT.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.dense_BN, self.sparse, self.labels_BT):
            tensor.record_stream(stream)  # pyright: ignore[reportArgumentType]  (stubs ask for a CUDA stream)


def part_of(rows: int, rank: int, world: int) -> range:
    """The rows of a batch that are `rank`'s: as many for every rank, so that those of the last ones may overlap.

    Every rank gets at least one; a row belongs to the first rank that has it.
    """
    size = -(-rows // world)
    start = min(rank * size, rows - size)
    return range(start, start + size)
