"""`[ssl]`: how views of an item are made, and how much telling items apart counts beside the main task."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from base.config import Config
from base.errors import ConfigError

_OF_VIEWS = ("masking", "masked", "hidden", "value_dropout", "embedding_masking")


class SelfSupervision(Config):
    """loss = main + alpha x self, self being the softmax in which an item's one view finds its other in a batch.

    Yao et al., CIKM 2021, equations 3 and 5. The items of the batch are drawn uniformly from the corpus, not from the
    log, so that one that nobody has looked at counts as much as any other.
    """

    alpha: PositiveFloat = 0.1
    """What the self-supervised loss is multiplied by."""
    temperature: PositiveFloat = 0.1
    """τ of its softmax, which is over cosine / τ."""
    masking: Literal["cfm", "rfm", "none"] = "cfm"
    """Which features a view does not see; the other view sees these alone. `cfm`: one drawn anew for each batch, and
    those that tell most about it (mutual information over the corpus); `rfm`: as many, any of them."""
    masked: PositiveInt | None = None
    """How many features are masked beside the one drawn; by default half of those not hidden, as in that paper."""
    hidden: tuple[str, ...] = ()
    """Features that neither view sees. An id tells most about all others, so that `cfm` masks it, and what is nearest
    to it, in nearly every batch; hidden, it leaves the views to what a new item has as well."""
    value_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the single values of multi-valued features that a view leaves out."""
    embedding_masking: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the numbers of its embeddings that a view has set to 0, for each item anew (CL4CVR, SIGIR 2023)."""
    eliminate_false_negatives: bool = False
    """Whether items with the same features are no negatives of each other (CL4CVR)."""
    baseline: Literal["spread_out", "feature_dropout"] | None = None
    """In the place of views. `spread_out`: both are the item as it is, so that items only keep apart (Zhang et al.,
    ICCV 2017); `feature_dropout`: no such task, the main one is trained with features of items left out (Volkovs et
    al., NIPS 2017)."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of `feature_dropout`: the probability with which a training row lacks each feature of its item."""
    batch_size: PositiveInt | None = None
    """Items at a time; by default as many as examples. Of a smaller corpus all."""
    item: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of features of the item alone, where the model does not say them as a two-tower model does: then the corpus
    is the distinct items of the training rows."""
    projection: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 64)
    """Where there is no item tower: widths of the network from the item's embeddings to the vector compared."""

    @property
    def masks(self) -> bool:
        """Whether features are shared out between the views."""
        return self.baseline is None and self.masking != "none"

    @property
    def drops_values(self) -> bool:
        return self.baseline is None and self.value_dropout > 0

    def shown(self, item: Sequence[str]) -> list[str]:
        """Those of the item's features that a view may see."""
        return [name for name in item if name not in self.hidden]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [n for n in _OF_VIEWS if getattr(self, n) != type(self).model_fields[n].default]
        if self.baseline is not None and given:
            raise ConfigError(
                f'ssl.baseline = "{self.baseline}" takes the place of views; leave ssl.{given[0]} or it out'
            )
        if self.baseline is None and not (self.masks or self.value_dropout or self.embedding_masking):
            raise ConfigError(
                'ssl.masking = "none" without value_dropout and embedding_masking: both views would be the item as it '
                'is; choose one of them, or say baseline = "spread_out"'
            )
        if self.masked is not None and not self.masks:
            raise ConfigError(f'ssl.masked = {self.masked}: masking = "none" masks nothing; leave one of them out')
        return self
