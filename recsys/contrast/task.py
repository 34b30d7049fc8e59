"""The self-supervised task of a model in training: two views of an item are to find each other among other items'."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from base.errors import ConfigError
from features.schema import Schema
from recsys.contrast.corpus import Corpus, ItemBatch, Items, item_fields
from recsys.layers import MLP
from recsys.losses import in_batch_softmax
from recsys.models import Model, ModelConfig
from recsys.models.fm import FMConfig
from recsys.models.lr import LRConfig
from recsys.models.two_tower import TwoTower

# Shape suffixes: B = rows looked up, N = items, C = copies of the embeddings, F = fields, S = features of the item,
# D = embedding dimension, Z = width of the vectors compared.


class SelfTask(nn.Module):
    """What training alone needs: vectors for masked features, and a projection where the model has no item tower.

    A masked feature has a learned vector of its own, the paper's default embedding: 0 is what an empty bag and a
    number at its mean have, and says something of the item. Everything else is the model's, tables and tower.
    """

    def __init__(self, corpus: Corpus, model: Model, schema: Schema, batch_size: int, seed: int) -> None:
        super().__init__()
        self.config = corpus.config
        self.items = Items(corpus, schema, batch_size, seed)
        fields = model.fields if isinstance(model, TwoTower) else schema.fields
        self.places = [fields.index(f.name) for f in self.items.fields]
        embed = model.embed
        shape_CSD = (embed.copies, len(self.places), embed.dim)
        self.default_CSD: nn.Parameter | None = None
        if corpus.config.masks or corpus.config.hidden:
            self.default_CSD = nn.Parameter(torch.randn(shape_CSD) * embed.init_std)
        self.projection: MLP | None = None
        if not isinstance(model, TwoTower):
            *hidden, width = corpus.config.projection
            self.projection = MLP(embed.copies * len(self.places) * embed.dim, hidden, width)

    def loss(self, model: Model, step: int, device: torch.device) -> Tensor:
        """-1/N Σ log softmax of cos(z, z') / τ over the views z' of a batch's items (equation 3). Scalar."""
        batch = self.items.batch(step).to(device)
        first_NZ, second_NZ = self._views(model, batch)
        return in_batch_softmax(first_NZ, second_NZ, batch.ids_N, self.config.temperature)

    def _views(self, model: Model, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        two_tower = isinstance(model, TwoTower)
        e_BCFD = model.embedded(batch.rows).unsqueeze(1) if two_tower else model.embed.separate(batch.rows)
        e_BCSD = e_BCFD[:, :, self.places]
        number = len(batch.ids_N)
        one_NCSD, other_NCSD = (e_BCSD[:number], e_BCSD[number:]) if len(e_BCSD) > number else (e_BCSD, e_BCSD)
        if self.config.baseline == "spread_out":
            z_NZ = self._vectors(model, one_NCSD)
            return z_NZ, z_NZ
        first_S, second_S = batch.masked_2S
        return self._view(model, one_NCSD, first_S), self._view(model, other_NCSD, second_S)

    def _view(self, model: Model, e_NCSD: Tensor, masked_S: Tensor) -> Tensor:
        if self.default_CSD is not None:
            e_NCSD = torch.where(masked_S[:, None], self.default_CSD, e_NCSD)
        if self.config.embedding_masking:
            e_NCSD = e_NCSD * (torch.rand_like(e_NCSD) >= self.config.embedding_masking)
        return self._vectors(model, e_NCSD)

    def _vectors(self, model: Model, e_NCSD: Tensor) -> Tensor:
        """z_NZ of length 1."""
        if isinstance(model, TwoTower):
            z_NZ = model.item.vectors(e_NCSD[:, 0])
        else:
            assert self.projection is not None
            z_NZ = self.projection(e_NCSD.flatten(1))
        return functional.normalize(z_NZ, dim=1)


def drop_features(corpus: Corpus, model: Model, schema: Schema) -> None:
    """Have the main task's rows lack features of the item from now on, if that is the baseline."""
    if corpus.config.baseline != "feature_dropout":
        model.embed.dropped = None
        return
    fields = model.fields if isinstance(model, TwoTower) else schema.fields
    places = [fields.index(f.name) for f in item_fields(corpus.config, corpus.item, schema)]
    model.embed.dropped = (places, corpus.config.dropout)


def require_trainable(model: ModelConfig, processes: int) -> None:
    """Raises ConfigError for a model whose embeddings are no vectors of the item, and for more than one process."""
    if isinstance(model, LRConfig | FMConfig):
        raise ConfigError(
            f'model.name = "{model.name}" has no layers over embeddings that [ssl] could teach; leave [ssl] out, or '
            "choose another model"
        )
    if processes > 1:
        raise ConfigError(
            f"train.processes = {processes}: the task of [ssl] is trained by one process; set it to 1, or leave [ssl] "
            "out"
        )
