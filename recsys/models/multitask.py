"""Several labels from one network: shared bottom, or MMoE (Ma et al., KDD 2018) with one of three gates."""

from typing import Literal

from torch import Tensor

from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import TableKind
from recsys.models.base import PerLabel
from recsys.network import Network, NetworkConfig, embeddings

# Shape suffixes: B = batch, L = logits, T = tasks (labels).


class MultiTaskConfig(NetworkConfig):
    """`bottom` makes it a shared-bottom model, `experts` an MMoE; with neither, only the embeddings are shared."""

    name: Literal["multitask"] = "multitask"


class MultiTask(PerLabel):
    """A tower per label over what the tasks share; the log losses are added up."""

    def __init__(self, config: MultiTaskConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(schema)
        self.embed = embeddings(config, schema, schema.labels, tables)
        self.network = Network(config, schema, schema.labels)

    def forward(self, batch: Batch) -> Tensor:
        return self.network(self.embed.separate(batch))

    def loss(self, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        return super().loss(logits_BL, labels_BT) + self.network.penalty(logits_BL)
