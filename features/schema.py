"""What a training example is made of: the one contract shared by features, models and scoring."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from base.config import Config

EVERYWHERE = "all impressions"
"""The space of a probability that is given of nothing."""


NewRows = Literal["mean", "hash"]
"""How the row of a new id begins: at the mean of its table, or at a draw that follows from its number."""


def carried(name: str) -> str:
    """The name under which a key or label travels beside features, which may have the same name."""
    return f"@{name}"


class Dense(Config):
    """A number per example; missing values are already filled."""

    name: str


class Sparse(Config):
    """A bag of ids per example, looked up in one embedding table and mean-pooled."""

    name: str
    rows: PositiveInt
    """Rows in the embedding table, including row 0 for unknown ids."""
    multi: bool = False
    """Whether the bag is a list column of any length; otherwise it is a column with exactly one id."""


class Output(Config):
    """A probability that a model gives, and the label that it is the probability of."""

    name: str
    """Column of the probability in a scored table."""
    label: str
    given: str | None = None
    """The label that it presupposes: a conversion given a click is measured on the clicked rows only."""

    @property
    def space(self) -> str:
        """The rows that it speaks of, in words."""
        return EVERYWHERE if self.given is None else f"rows with {self.given}"


class Schema(Config):
    """An example: columns to carry, columns to learn from, columns to predict."""

    keys: tuple[str, ...]
    """Carried through to the scored table, never seen by a model."""
    dense: tuple[Dense, ...]
    sparse: tuple[Sparse, ...]
    labels: tuple[str, ...]
    funnel: tuple[str, ...] = ()
    """Labels of which each presupposes the one before it, as a conversion does a click."""
    negative_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rows without the first label that training keeps; probabilities are corrected for it."""

    item: str | None = None
    """In retrieval, the sparse feature that tells items apart: it has a row for each that was trained on."""

    @property
    def sampled_label(self) -> str:
        """The label whose negatives are down-sampled: the first of the funnel."""
        return (self.funnel or self.labels)[0]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the F fields in the order in which models see them: sparse, then dense."""
        return tuple(f.name for f in (*self.sparse, *self.dense))
