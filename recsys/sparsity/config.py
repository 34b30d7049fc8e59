"""`[sparsity]`: which share of the tables' weights exists, and how the choice moves during training."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from base.config import Config
from base.errors import ConfigError


class Schedule(Config):
    """When weights are dropped, and where others grow in their place.

    RigL (Evci et al., ICML 2020) for rows of a table; with `grow = "random"` it is SET (Mocanu et al., 2018).
    """

    grow: Literal["gradient", "random", "none"] = "gradient"
    """Where weights grow: where the loss of a window of batches falls steepest, anywhere, or nowhere: a fixed mask."""
    interval: PositiveInt | None = None
    """Steps between updates of the mask; by default half an epoch, so that most rows are seen in between."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a row's weights that the first update exchanges; it falls to 0 as half a cosine."""
    stop: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the training after which the mask stays as it is."""
    window: PositiveInt | None = None
    """Batches before an update whose summed gradients decide it; by default all since the one before."""
    window_rows: PositiveInt = 2**17
    """Rows whose gradients are kept at most, whatever the window touches: a sample by a hash of the row."""
    begin: Literal["step", "zero"] = "step"
    """What a weight that grows begins at: the step it would have made on the window's gradients, or 0."""
    redistribute: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much of the exchange is between rows, and so between tables: 1 is as much as `fraction` of all weights. Then
    a row may come to hold none."""


class Soup(Config):
    """Further trainings from the best weights, with their mask, whose mean is taken if it is better on validation."""

    members: Annotated[int, Field(ge=2)] = 3
    epochs: PositiveInt = 1
    """Of each member."""


class Sparsity(Config):
    """A sparse table: each row holds a few of its `dim` weights and their positions, and nothing else exists."""

    density: Annotated[float, Field(gt=0, le=1)]
    """Share of all weights that is active; their number is constant."""
    features: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Whose tables are sparse; by default all. The others hold every weight."""
    allocation: Literal["uniform", "er", "popularity"] = "uniform"
    """How the weights are shared out at first. `er`: a table of R rows has a density in proportion to 1/dim + 1/R
    (Erdős-Rényi; Mocanu et al., 2018). `popularity`: a row has weights in proportion to the square root of its
    examples."""
    positions: Literal["random", "nested", "half"] = "random"
    """Which weights of a row are active at first. `nested`: the first ones, so that all rows have them in common;
    `half`: half of them so, the others at random."""
    state: Literal["row", "element"] = "row"
    """Adagrad's sum of squared gradients: one of each row, kept where weights grow while the row has any; or one of
    each active weight, which begins anew with it. A row's is of the mean over its slots, a multiple of 4: rows of 1 to
    3 weights take steps up to twice as long."""
    schedule: Schedule = Schedule()
    soup: Soup | None = None

    @property
    def unequal(self) -> bool:
        """Whether rows may hold none of the weights."""
        return self.allocation == "popularity" or self.schedule.redistribute > 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule.redistribute and self.schedule.grow != "gradient":
            raise ConfigError(
                f"sparsity.schedule.redistribute = {self.schedule.redistribute}: rows compete by their gradients; "
                f'set grow = "gradient", not "{self.schedule.grow}"'
            )
        return self
