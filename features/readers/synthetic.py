"""A synthetic impression log with known click probabilities: the noise floor of every metric is known too.

Every random number is a hash: of (seed, day, row, what it decides) for the log, of (seed, field, id) for the
truth. So a day is generated alone, the chunk size changes nothing, an id has its effect without a table, and a
draw added later moves no draw made before.

With `conversion_rate` set, the log is a funnel: every impression also has the conversion that would follow its
click, and three known probabilities, of the click, of the conversion if clicked, and of both.

With `drift` set, taste moves from day to day and ids fade: a model is worth less the older it is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial
from typing import Final, Self, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, model_validator

from base.config import Config
from base.errors import ConfigError
from features.readers.hashes import Floats, Ints, flat_popularity, key_of, normal, sigmoid, uniform, zipf_popularity

Popularity: TypeAlias = Callable[[Floats, int], Ints]  # uniform draws, number of ids -> ids

KEY: Final = "impression_id"
FEATURES: Final = (
    *("user_id", "item_id", "advertiser", "category", "device", "country"),
    *("placement", "hour", "tags", "price", "age", "recency_hours"),
)
LABEL: Final = "click"
TRUTH: Final = "click_probability"  # what no model may see
CONVERSION: Final = "conversion"  # what a log shows of it: after a click, arrived in time
POTENTIAL: Final = "would_convert"  # this and all below: what no model may see
DELAY: Final = "conversion_delay_days"
CONVERSION_TRUTH: Final = "conversion_probability"  # of converting, if clicked
BOTH_TRUTH: Final = "click_and_conversion_probability"
FUNNEL: Final = (CONVERSION, POTENTIAL, DELAY, CONVERSION_TRUTH, BOTH_TRUTH)
INTERACTIONS: Final = (("device", "category"), ("country", "placement"))

LEVELS: Final[Mapping[str, tuple[str, ...]]] = {
    "category": (
        *("arts", "autos", "baby", "beauty", "books", "business", "dating", "education"),
        *("fashion", "fitness", "food", "games", "garden", "health", "home", "jobs"),
        *("movies", "music", "news", "pets", "politics", "sports", "tech", "travel"),
    ),
    "device": ("phone", "desktop", "tablet", "tv", "watch"),
    "country": (
        *("US", "IN", "BR", "ID", "GB", "DE", "FR", "MX", "JP", "ES"),
        *("IT", "TR", "PH", "CA", "VN", "TH", "PL", "AR", "CO", "KR"),
        *("AU", "NL", "EG", "PK", "NG", "BD", "MY", "RO", "ZA", "UA"),
        *("CL", "PE", "SE", "BE", "CZ", "PT", "GR", "HU", "AT", "DK"),
    ),
    "placement": ("feed", "search", "story", "video", "sidebar", "banner"),
    "advertiser": tuple(f"a{i}" for i in range(500)),
    "tags": tuple(f"t{i}" for i in range(200)),
}
_SHARES: Final[Mapping[str, Floats]] = {  # how often each level is drawn
    "category": np.full(24, 1 / 24),
    "device": np.array([0.32, 0.26, 0.18, 0.14, 0.10]),
    "country": np.arange(1, 41) ** -1.0 / np.sum(np.arange(1, 41) ** -1.0),
    "placement": np.array([0.30, 0.22, 0.16, 0.13, 0.11, 0.08]),
    "hour": (1.2 + np.sin((np.arange(24) - 10) * np.pi / 12)) / (24 * 1.2),  # quiet at 4, busy at 16
}
# Standard deviations of effects on the logit. Main effects are small, so that most of the signal can be learned.
_INTERACTION_SD: Final = 1.0
_MAIN_SD: Final[Mapping[str, float]] = {
    "user_id": 0.25,
    "item_id": 0.25,
    "advertiser": 0.15,
    "category": 0.15,
    "device": 0.15,
    "country": 0.15,
    "placement": 0.15,
    "tags": 0.10,  # of each tag
}
_CONVERSION_MAIN_SD: Final[Mapping[str, float]] = {  # larger, for conversions are few
    "user_id": 0.20,
    "item_id": 0.30,
    "advertiser": 0.30,
    "category": 0.40,
    "device": 0.40,
    "country": 0.40,
    "placement": 0.40,
    "tags": 0.15,  # of each tag
}
# The affinity's parts; their squares add up to 1. An item is shown far more often than a user comes, and a pair hardly
# twice: so most of the affinity lies where a log of millions of rows can teach it.
_QUALITY_SD: Final = 0.80
_DISPOSITION_SD: Final = 0.48
_MATCH_SD: Final = 0.36
_TASTE_DIM: Final = 4
_NODES: Final = 16  # of the quadrature over the hidden normal
_BIRTHS: Final = 0.01  # ids born a day, as a share of the first population
_MISSING: Final[Mapping[str, float]] = {"price": 0.05, "age": 0.10, "advertiser": 0.02, "tags": 0.03}
_TAG_SLOTS: Final = 5
_REFERENCE_ROWS: Final = 1 << 18


class SyntheticConfig(Config):
    """What the log looks like. Two equal configurations give equal logs.

    `users` and `items` count the ids that exist before `start` (0 .. users-1); every day the next `users`/100 and
    `items`/100 ids are born, and appear from that day on. Of a day's impressions, `new_user_share` come from
    users born that day and `new_item_share` show an item born that day. `click_rate` is the mean of the click
    probabilities, met to about 0.002.

    `conversion_rate` turns the funnel on: it is the mean over all impressions of the probability of converting if
    clicked, met as well. Conversions follow the fields by effects of their own. Two dials tie clicks and conversions
    together, and work on clicks alone too: `taste` is the weight in both logits of the `affinity` of user and item,
    which no column shows but the ids can teach; `confounding` that of a standard normal drawn for each impression,
    which nothing can teach. The probabilities of the log do not know that normal: they are means over it, by
    quadrature to 1e-8 at confounding 1, 3e-5 at 2, 1e-3 at 3.

    `drift` is the share of taste that a day forgets: every effect of an id, of a pair of levels and of the affinity
    moves on a path of its own, whose spread stays and whose correlation over t days is exp(-drift t) (the match of
    user and item, a product of two, moves twice as fast); slopes of numbers and hours stay. With it, ids fade too,
    as many a day as are born, the popular ones no less than others; an id born on that day takes the place of one that
    fades, so that popularity stays. The rates are met on every day, and `start` is the same day as without drift.

    A conversion arrives `conversion_delay_days` after its impression's day, in the mean of an exponential
    distribution; whole days count. The log shows what has arrived by the end of the day `observed_until`.
    """

    rows_per_day: int = Field(default=100_000, ge=1, lt=1 << 32)
    users: int = Field(default=150_000, ge=100, le=1 << 40)
    items: int = Field(default=20_000, ge=100, le=1 << 40)
    click_rate: float = Field(default=0.2, gt=0, lt=1)
    new_user_share: float = Field(default=0.03, ge=0, le=1)
    new_item_share: float = Field(default=0.02, ge=0, le=1)
    seed: NonNegativeInt = 0
    start: date = date(2026, 3, 1)
    conversion_rate: float | None = Field(default=None, gt=0, lt=1)
    taste: float = Field(default=0.0, ge=0, le=10)
    confounding: float = Field(default=0.0, ge=0, le=3)
    drift: float = Field(default=0.0, ge=0, le=1)
    conversion_delay_days: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    observed_until: date | None = None

    @model_validator(mode="after")
    def _funnel_is_whole(self) -> Self:
        delay, last = self.conversion_delay_days, self.observed_until
        if self.conversion_rate is None:
            for name, value, is_given in (
                ("conversion_delay_days", delay, delay > 0),
                ("observed_until", last, last is not None),
            ):
                if is_given:
                    raise ValueError(f"{name} = {value}: there are no conversions; set conversion_rate, e.g. to 0.1")
        if last is not None and last < self.start:
            raise ValueError(f"observed_until = {last}: the log begins at start = {self.start}; give a later day")
        return self


def generate_day(config: SyntheticConfig, day: date, *, chunk_rows: int = 250_000) -> Iterator[pl.DataFrame]:
    """The `rows_per_day` impressions of `day` in frames of `chunk_rows`; memory is that of one frame.

    Columns: `impression_id` (Int64, unique over all days), `day` (Date), the twelve FEATURES, `click` (Int8, 0 or
    1) and the `click_probability` it was drawn from (Float64; what no model may see). `price` is in currency
    units, `age` in years, `recency_hours` the time since the user's last visit. Rows are in no order of time. The
    rows depend neither on `chunk_rows` nor on other days.

    With `conversion_rate`, the columns of FUNNEL follow: `conversion` (Int8: clicked, converted, and arrived by
    `observed_until`), and what no model may see: `would_convert` (Int8), the conversion if clicked, known of every
    impression; `conversion_delay_days` (Float64), null unless clicked and converted; and the Float64 probabilities
    `conversion_probability` of `would_convert` and `click_and_conversion_probability` of it with a click, which is
    their product where `confounding` is 0. All probabilities are the best that the ids and columns could tell.

    Raises ConfigError if `day` lies before `config.start`, or `chunk_rows` is below 1.
    """
    if day < config.start:
        raise ConfigError(f"day = {day}: the log begins at start = {config.start}; ask for that day or a later one")
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows = {chunk_rows}: a chunk holds at least one row")
    return _chunks(config, day, chunk_rows)


def day_frame(config: SyntheticConfig, day: date) -> pl.DataFrame:
    """The whole of `generate_day` as one frame."""
    return pl.concat(generate_day(config, day), rechunk=True)


def id_effect(config: SyntheticConfig, field: str, ids: Ints, day_index: int = 0) -> Floats:
    """Main effect of each id on the click logit, shape of `ids`, `day_index` days after `start`.

    `field` is user_id, item_id or one of LEVELS; an id is the number in a user's name, an item's id, or an index
    into LEVELS[field]. Without drift, it is the same on every day.
    """
    return _MAIN_SD[field] * _moving(config, day_index, ids, "effect", field)


def conversion_effect(config: SyntheticConfig, field: str, ids: Ints, day_index: int = 0) -> Floats:
    """As `id_effect`, on the conversion logit; independent of it."""
    return _CONVERSION_MAIN_SD[field] * _moving(config, day_index, ids, "conversion effect", field)


def affinity(config: SyntheticConfig, user_N: Ints, item_N: Ints, day_index: int = 0) -> Floats:
    """What `config.taste` weighs: mean 0 and standard deviation 1 over pairs of ids, `day_index` days after `start`.

    Of its variance, 64% is the item's quality, 23% the user's disposition, and 13% their match: the scalar product
    of two vectors of four normals. Over a log, in which a few items take most of the rows, it varies with the seed.
    """

    def taste(owner: str, axis: int, ids: Ints) -> Floats:
        return _moving(config, day_index, ids, "taste", owner, f"{axis}")

    quality = _moving(config, day_index, item_N, "quality")
    disposition = _moving(config, day_index, user_N, "disposition")
    match = sum((taste("user", axis, user_N) * taste("item", axis, item_N) for axis in range(_TASTE_DIM)), start=0.0)
    return _QUALITY_SD * quality + _DISPOSITION_SD * disposition + _MATCH_SD / np.sqrt(_TASTE_DIM) * match


def planted_effects(config: SyntheticConfig, pair: tuple[str, str], day_index: int = 0) -> pl.DataFrame:
    """Effect on the click logit of every pair of levels: columns pair[0], pair[1] and `effect` (Float64).

    `pair` is one of INTERACTIONS; the day is `day_index` days after `start`. Over its log, the effect has mean 0 at
    every level of either field and standard deviation 1, but for sampling error.
    """
    matrix = _world(config, day_index).interactions[pair]
    first, second = (LEVELS[field] for field in pair)
    cells = [(a, b, matrix[i, j]) for i, a in enumerate(first) for j, b in enumerate(second)]
    return pl.DataFrame(cells, schema={pair[0]: pl.String, pair[1]: pl.String, "effect": pl.Float64}, orient="row")


def _moving(config: SyntheticConfig, day_index: int, ids: Ints, *what: str) -> Floats:
    """Standard normals that turn, each at a speed of its own; Cauchy's speeds make their correlation exponential."""
    first = normal(key_of(config.seed, *what), ids)
    if not config.drift * day_index:
        return first
    speed = np.tan(np.pi * (uniform(key_of(config.seed, "speed", *what), ids) - 0.5)).clip(-1e6, 1e6)
    angle = config.drift * day_index * speed
    return np.cos(angle) * first + np.sin(angle) * normal(key_of(config.seed, "turned", *what), ids)


# The log: who saw what.


@dataclass(frozen=True, slots=True)
class _Impressions:
    """N impressions before anyone clicked. Whatever is missing adds nothing to the logit."""

    row: Ints  # (N,) within the day
    ids: Mapping[str, Ints]  # (N,) each: an id, or an index into LEVELS; one past its end where missing
    hour: Ints  # (N,)
    bag: Ints  # (N,) which of the M bags of tags, -1 where missing
    bag_tags: Ints  # (M, _TAG_SLOTS), of which a bag holds the first `bag_size`
    bag_size: Ints  # (M,)
    price_z: Floats  # (N,) standardised logarithm of the price, NaN where missing
    age: Floats  # (N,) years, NaN where missing
    recency: Floats  # (N,) exponential, mean 1: the tail of the recency's logarithm


def _impressions(config: SyntheticConfig, stream: str, day_index: int, row: Ints) -> _Impressions:
    """Rows `row` of a stream (a day, or the reference sample), with the ids that are alive on `day_index`."""

    def draw(what: str) -> Floats:
        return uniform(key_of(config.seed, stream, what), row)

    def missing(field: str) -> NDArray[np.bool_]:
        return draw(f"missing {field}") < _MISSING[field]

    def alive(what: str, first: int, new_share: float, popularity: Popularity) -> Ints:
        """Ids 0 .. first-1 exist from the start; the next `births` are born, and first seen, every day."""
        births = max(1, round(first * _BIRTHS))
        before = first + day_index * births
        born_today = before + (draw(what) * births).astype(np.int64)
        if not config.drift:
            return np.where(draw(f"new {what}") < new_share, born_today, popularity(draw(what), before))
        known = _heirs(config, what, popularity(draw(what), first), day_index, first, births)
        return np.where(draw(f"new {what}") < new_share, born_today, known)

    user = alive("user", config.users, config.new_user_share, flat_popularity)
    item = alive("item", config.items, config.new_item_share, zipf_popularity)

    def of_user(what: str) -> Floats:
        return uniform(key_of(config.seed, "user", what), user)

    def of_item(what: str, items: Ints = item) -> Floats:
        return uniform(key_of(config.seed, "item", what), items)

    distinct, bag = np.unique(item, return_inverse=True)  # far fewer bags than rows
    advertiser = flat_popularity(of_item("advertiser"), len(LEVELS["advertiser"]))
    price_of_item = normal(key_of(config.seed, "item", "price"), item)
    price_z = 0.8 * price_of_item + 0.6 * normal(key_of(config.seed, stream, "price"), row)
    age = 18 + np.floor(62 * of_user("age") ** 1.5)
    return _Impressions(
        row=row,
        ids={
            "user_id": user,
            "item_id": item,
            "advertiser": np.where(missing("advertiser"), len(LEVELS["advertiser"]), advertiser),
            "category": _level("category", of_item("category")),
            "device": _level("device", draw("device")),
            "country": _level("country", of_user("country")),
            "placement": _level("placement", draw("placement")),
        },
        hour=_level("hour", draw("hour")),
        bag=np.where(missing("tags"), -1, bag),
        bag_tags=np.stack([_tag(slot, of_item(f"tag {slot}", distinct)) for slot in range(_TAG_SLOTS)], axis=1),
        bag_size=(of_item("tags", distinct) * (_TAG_SLOTS + 1)).astype(np.int64),
        price_z=np.where(missing("price"), np.nan, price_z),
        age=np.where(of_user("missing age") < _MISSING["age"], np.nan, age),
        recency=-np.log1p(-draw("recency")),
    )


def _heirs(config: SyntheticConfig, what: str, ids: Ints, day_index: int, first: int, births: int) -> Ints:
    """Who is there on `day_index` in the place of each id: itself, or one born on the day it faded, and so on."""
    ids = ids.copy()
    while True:
        born = np.maximum((ids - first) // births, 0)
        life = -np.log1p(-uniform(key_of(config.seed, what, "life"), ids)) / _BIRTHS
        faded = born + 1 + np.minimum(life, day_index).astype(np.int64)
        gone = faded <= day_index
        if not gone.any():
            return ids
        heir = (uniform(key_of(config.seed, what, "heir"), ids[gone]) * births).astype(np.int64)
        ids[gone] = first + faded[gone] * births + heir


def _level(field: str, draw: Floats) -> Ints:
    return np.searchsorted(np.cumsum(_SHARES[field])[:-1], draw, side="right")


def _tag(slot: int, draw: Floats) -> Ints:
    """Each slot of a bag has tags of its own, a few of them popular; so no bag holds a tag twice."""
    return slot + _TAG_SLOTS * flat_popularity(draw, len(LEVELS["tags"]) // _TAG_SLOTS)


# The truth: what makes them click and convert.


@dataclass(frozen=True, slots=True)
class _World:
    """What all rows of a day share; without drift, all days."""

    day_index: int

    interactions: Mapping[tuple[str, str], Floats]  # (levels of the first field, levels of the second)
    click_intercept: float
    conversion_intercept: float  # 0 where there is no funnel


def _world(config: SyntheticConfig, day_index: int) -> _World:
    text = config.model_dump_json(exclude={"rows_per_day", "conversion_delay_days", "observed_until"})
    return _world_of(text, day_index if config.drift else 0)


@lru_cache(maxsize=64)
def _world_of(text: str, day_index: int) -> _World:
    """Centres the interactions and solves the intercept on a reference sample that is no day of the log."""
    config = SyntheticConfig.model_validate_json(text)
    sample = _impressions(config, "reference", day_index, np.arange(_REFERENCE_ROWS))
    interactions = {pair: _interaction(config, sample, pair, day_index) for pair in INTERACTIONS}
    world = _World(day_index, interactions, 0.0, 0.0)
    taste = _taste(config, world, sample)
    click = _intercept(_click_logit(config, world, sample, taste), config.click_rate, config.confounding)
    if config.conversion_rate is None:
        return _World(day_index, interactions, click, 0.0)
    logit = _conversion_logit(config, world, sample, taste)
    return _World(day_index, interactions, click, _intercept(logit, config.conversion_rate, config.confounding))


def _interaction(config: SyntheticConfig, sample: _Impressions, pair: tuple[str, str], day_index: int) -> Floats:
    """Random, then centred by row and by column, so that no sum of main effects can explain any of it."""
    sizes = [len(LEVELS[field]) for field in pair]
    rows, columns = (np.bincount(sample.ids[field], minlength=len(LEVELS[field])) / _REFERENCE_ROWS for field in pair)
    matrix = _moving(config, day_index, np.arange(sizes[0] * sizes[1]), "interaction", *pair).reshape(sizes)
    matrix = matrix - (matrix @ columns)[:, None]
    matrix = matrix - rows @ matrix
    return matrix * (_INTERACTION_SD / np.sqrt(rows @ matrix**2 @ columns))


def _taste(config: SyntheticConfig, world: _World, seen: _Impressions) -> Floats:
    if not config.taste:
        return np.zeros(len(seen.row))
    return config.taste * affinity(config, seen.ids["user_id"], seen.ids["item_id"], world.day_index)


def _click_logit(config: SyntheticConfig, world: _World, seen: _Impressions, taste: Floats) -> Floats:
    logit = _field_effects(world.click_intercept, seen, partial(id_effect, config, day_index=world.day_index))
    for (first, second), matrix in world.interactions.items():
        logit += matrix[seen.ids[first], seen.ids[second]]
    logit += 0.15 * np.cos((seen.hour - 20) * np.pi / 12)
    logit -= 0.25 * np.nan_to_num(seen.price_z)
    logit -= 0.10 * np.nan_to_num((seen.age - 42) / 15)
    logit -= 0.15 * (seen.recency - 1)
    return logit + taste


def _conversion_logit(config: SyntheticConfig, world: _World, seen: _Impressions, taste: Floats) -> Floats:
    """Of converting, if clicked."""
    logit = _field_effects(
        world.conversion_intercept, seen, partial(conversion_effect, config, day_index=world.day_index)
    )
    logit -= 0.50 * np.nan_to_num(seen.price_z)
    return logit + taste


def _field_effects(intercept: float, seen: _Impressions, effect: Callable[[str, Ints], Floats]) -> Floats:
    """`intercept` and the main effects of the ids and tags."""
    logit = np.full(len(seen.row), intercept)
    for field, ids in seen.ids.items():
        is_known = ids < len(LEVELS[field]) if field in LEVELS else True
        logit += np.where(is_known, effect(field, ids), 0.0)
    is_tag = np.arange(_TAG_SLOTS) < seen.bag_size[:, None]
    of_bag = np.where(is_tag, effect("tags", seen.bag_tags), 0.0).sum(axis=1)
    logit += np.where(seen.bag >= 0, of_bag[seen.bag], 0.0)
    return logit


def _probability(confounding: float, *logits: Floats) -> Floats:
    """That all of the events happen whose `logits` these are, as the mean over the hidden normal they share."""
    if not confounding:
        return np.prod([sigmoid(logit) for logit in logits], axis=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    total = np.zeros_like(logits[0])
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        total += weight * np.prod([sigmoid(logit + confounding * node) for logit in logits], axis=0)
    return total


def _intercept(logit: Floats, rate: float, confounding: float) -> float:
    """What to add to `logit` for the mean probability to be `rate`, by bisection."""
    count = None
    if confounding:  # fifty quadratures over every row would take seconds
        count, edges = np.histogram(logit, 1 << 14)
        logit = (edges[:-1] + edges[1:]) / 2
    low, high = -40.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = np.average(_probability(confounding, logit + middle), weights=count)
        low, high = (middle, high) if mean < rate else (low, middle)
    return low


# The frames.


def _chunks(config: SyntheticConfig, day: date, chunk_rows: int) -> Iterator[pl.DataFrame]:
    day_index, stream = (day - config.start).days, day.isoformat()
    world = _world(config, day_index)
    for begin in range(0, config.rows_per_day, chunk_rows):
        row = np.arange(begin, min(begin + chunk_rows, config.rows_per_day))
        seen = _impressions(config, stream, day_index, row)
        yield _feature_frame(day, seen).with_columns(_outcomes(config, world, day, seen))


def _outcomes(config: SyntheticConfig, world: _World, day: date, seen: _Impressions) -> list[pl.Series]:
    def key(what: str) -> int:
        return key_of(config.seed, day.isoformat(), what)

    taste = _taste(config, world, seen)
    hidden = config.confounding * normal(key("hidden"), seen.row)
    click_logit = _click_logit(config, world, seen, taste)
    click = uniform(key("click"), seen.row) < sigmoid(click_logit + hidden)
    probability = _probability(config.confounding, click_logit)
    outcomes = [pl.Series(LABEL, click.astype(np.int8)), pl.Series(TRUTH, probability)]
    if config.conversion_rate is None:
        return outcomes
    logit = _conversion_logit(config, world, seen, taste)
    would_convert = uniform(key("conversion"), seen.row) < sigmoid(logit + hidden)
    converts = click & would_convert
    delay = config.conversion_delay_days * -np.log1p(-uniform(key("delay"), seen.row))
    last = config.observed_until or date.max
    is_seen = converts & (np.floor(delay) <= (last - day).days)
    return [
        *outcomes,
        pl.Series(CONVERSION, is_seen.astype(np.int8)),
        pl.Series(POTENTIAL, would_convert.astype(np.int8)),
        pl.Series(DELAY, np.where(converts, delay, np.nan), nan_to_null=True),
        pl.Series(CONVERSION_TRUTH, _probability(config.confounding, logit)),
        pl.Series(BOTH_TRUTH, _probability(config.confounding, click_logit, logit)),
    ]


def _feature_frame(day: date, seen: _Impressions) -> pl.DataFrame:
    names = {field: pl.Series([*levels, None], dtype=pl.String) for field, levels in LEVELS.items()}
    text = {field: names[field].gather(pl.Series(ids)) for field, ids in seen.ids.items() if field in LEVELS}
    numbers = {
        KEY: (day.toordinal() << 32) + seen.row,  # below 2^53: no float can spoil it
        "item_id": seen.ids["item_id"],
        "hour": seen.hour,
        "price": np.exp(1.5 + 0.8 * seen.price_z),
        "age": seen.age,
        "recency_hours": np.expm1(seen.recency / 1.2),  # a Pareto tail: a mean, but no variance
    }
    return (
        pl.DataFrame({**numbers, **text, "user_id": seen.ids["user_id"], "tags": _tag_lists(seen)})
        .select(
            KEY,
            pl.lit(day).alias("day"),
            pl.concat_str(pl.lit("u"), pl.col("user_id").cast(pl.String)).alias("user_id"),
            *FEATURES[1:],
        )
        .with_columns(pl.col("price").fill_nan(None), pl.col("age").fill_nan(None).cast(pl.Int64))
    )


def _tag_lists(seen: _Impressions) -> pl.Series:
    names = pl.Series(LEVELS["tags"])
    slots = pl.DataFrame({f"{slot}": names.gather(pl.Series(seen.bag_tags[:, slot])) for slot in range(_TAG_SLOTS)})
    bags = slots.select(pl.concat_list(pl.all()).list.head(pl.lit(pl.Series(seen.bag_size)))).to_series()
    bag = pl.Series(seen.bag)
    return bags.gather(bag.set(bag < 0, None))
