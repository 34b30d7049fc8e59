"""A synthetic log for retrieval: a catalogue with a long tail, who was shown what, and the truth of every pair.

Every random number is a hash, as in the log of `synthetic`: a day is generated alone, the chunk size changes nothing,
and an item has its features without a table, among a thousand items or a million.

Items belong to themes, users are interested in a few of these and are shown mostly their items, the popular ones of a
theme far more often than its tail. How likely somebody is shown an item, and clicks on it then, are closed forms, so
that the best ranking that there can be is known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Final, Self, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, model_validator

from base.config import Config
from base.errors import ConfigError
from features.readers.hashes import Floats, Ints, flat_popularity, key_of, normal, sigmoid, uniform
from features.readers.synthetic import LEVELS

# Shape suffixes: N = rows, U = users, I = items, T = themes, G = groups, V = numbers of a vector.

Matrix: TypeAlias = NDArray[np.float32]

KEY: Final = "impression_id"
USER_FEATURES: Final = ("segment", "age", "country", "device")
LABEL: Final = "click"
TRUTH: Final = "click_probability"  # what no model may see
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "kind": ("department", "category", "shelf", "tags"),
    "make": ("brand", "series", "line", "seller"),
    "look": ("colour", "material", "pattern", "words"),
    "offer": ("price_band", "delivery", "warranty", "price"),
}
"""Item features. Those of a group all tell, each with noise of its own, which value of the group the item has."""
ITEM_FEATURES: Final = tuple(name for names in GROUPS.values() for name in names)

_VALUES: Final[Mapping[str, int]] = {"kind": 160, "make": 400, "look": 48, "offer": 8}  # of each group
_NESTED: Final[Mapping[str, int]] = {  # levels that are ranges of the group's values
    **{"department": 16, "category": 80, "shelf": 160},
    **{"brand": 50, "series": 200, "line": 400},
    **{"price_band": 8, "delivery": 4, "warranty": 2},
}
_SCATTERED: Final[Mapping[str, int]] = {"seller": 60, "colour": 12, "material": 16, "pattern": 8}
_BAGS: Final[Mapping[str, tuple[int, int]]] = {"tags": (4, 50), "words": (3, 30)}  # slots, and levels of each
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "department": (
        *("audio", "baby", "bath", "bed", "books", "camping", "cooking", "cycling"),
        *("garden", "lighting", "music", "office", "pets", "sports", "tools", "toys"),
    ),
    "colour": (
        *("black", "white", "grey", "red", "orange", "yellow"),
        *("green", "teal", "blue", "purple", "pink", "brown"),
    ),
    "material": (
        *("aluminium", "bamboo", "ceramic", "cork", "cotton", "felt", "glass", "leather"),
        *("linen", "oak", "paper", "pine", "plastic", "silk", "steel", "wool"),
    ),
    "pattern": ("plain", "striped", "dotted", "checked", "floral", "marbled", "woven", "printed"),
    "delivery": ("same day", "next day", "standard", "freight"),
    "warranty": ("one year", "five years"),
}
_NOISE: Final = 0.1  # how often a feature shows any of its levels
_MISSING: Final[Mapping[str, float]] = {
    **{"tags": 0.03, "series": 0.03, "seller": 0.05, "material": 0.10, "price": 0.05},
    "age": 0.10,
}
_LIKE_ITS_THEME: Final = 0.7  # how often an item has its theme's value of a group
_PERSONAS: Final = 24
_THEMES_OF_A_PERSONA: Final = 8
_LIKE_THEIR_PERSONA: Final = 0.7  # how often an interest is one of the persona's themes
_WEIGHTS: Final = np.array([0.5, 0.3, 0.2])  # of a user's interests
_EXPLORED: Final = 0.25  # share of the impressions that have nothing to do with interests
_PLATEAU: Final = 5  # so many items of a theme are about as popular as its first
_BIRTHS: Final = 0.01  # ids born a day, as a share of the first population
_REFERENCE_ROWS: Final = 1 << 17
# Of effects on the logit: standard deviations, and what an interest adds.
_DISPOSITION_SD: Final = 0.3  # the user's
_GROUP_QUALITY_SD: Final = 0.4  # of each group's value
_OWN_QUALITY_SD: Final = 0.3  # the item's, which no feature shows
_GROUP_MATCH_SD: Final = 0.55  # of user and each group's value
_OWN_MATCH_SD: Final = 0.3
_INTEREST: Final = 0.8
_TASTE_DIM: Final = 4  # of each group
_TASTE_OF_PERSONA: Final = 0.75  # share of the variance of a user's taste that the persona has


class CatalogueConfig(Config):
    """What the log looks like. Two equal configurations give equal logs.

    `users` and `items` count the ids that exist before `start` (0 .. items-1); every day the next hundredth as many
    are born. Of a day's impressions, `new_user_share` come from users born that day, and `new_item_share` show an item
    born that day, as far as its theme has any. `click_rate` is the mean of the click probabilities, met to about 0.005.
    With more `themes` there are fewer items to a theme, more to be learned, and more that can be.
    """

    rows_per_day: int = Field(default=100_000, ge=1, lt=1 << 32)
    users: int = Field(default=20_000, ge=100, le=1 << 40)
    items: int = Field(default=20_000, ge=100, le=1 << 40)
    themes: int = Field(default=400, ge=10, le=100_000)
    click_rate: float = Field(default=0.2, gt=0, lt=1)
    new_user_share: float = Field(default=0.03, ge=0, le=1)
    new_item_share: float = Field(default=0.05, ge=0, le=1)
    seed: NonNegativeInt = 0
    start: date = date(2026, 3, 1)

    @model_validator(mode="after")
    def _themes_have_items(self) -> Self:
        if self.items < self.themes:
            raise ValueError(f"themes = {self.themes}: there are {self.items} items; ask for fewer themes")
        return self

    def index_of(self, day: date) -> int:
        """Days since `start`. Raises ConfigError if `day` lies before it."""
        if day < self.start:
            raise ConfigError(f"day = {day}: the log begins at start = {self.start}; ask for that day or a later one")
        return (day - self.start).days

    def items_by(self, day: date) -> int:
        """How many items exist at the end of `day`: 0 .. items-1."""
        return self.items + (self.index_of(day) + 1) * _births(self.items)


def generate_items(config: CatalogueConfig, day: date, *, chunk_rows: int = 250_000) -> Iterator[pl.DataFrame]:
    """Every item that exists at the end of `day`, in frames of `chunk_rows`; memory is that of one frame.

    Columns: `item_id` (Int64) and ITEM_FEATURES: `tags` and `words` are lists, `price` is in currency units, the rest
    is text. Rows depend neither on `chunk_rows` nor, but for their number, on `day`. Raises as `generate_day`.
    """
    number = config.items_by(day)
    _require_chunk(chunk_rows)
    return (
        item_frame(config, np.arange(begin, min(begin + chunk_rows, number))) for begin in range(0, number, chunk_rows)
    )


def generate_day(config: CatalogueConfig, day: date, *, chunk_rows: int = 250_000) -> Iterator[pl.DataFrame]:
    """The `rows_per_day` impressions of `day` in frames of `chunk_rows`; memory is that of one frame.

    Columns: `impression_id` (Int64, unique over all days), `day` (Date), `user_id` (Int64), USER_FEATURES, `item_id`
    (Int64), `click` (Int8, 0 or 1) and the `click_probability` it was drawn from (Float64; what no model may see).
    Rows depend neither on `chunk_rows` nor on other days.

    Raises ConfigError if `day` lies before `config.start`, or `chunk_rows` is below 1.
    """
    index = config.index_of(day)
    _require_chunk(chunk_rows)
    return _chunks(config, day, index, chunk_rows)


def day_frame(config: CatalogueConfig, day: date) -> pl.DataFrame:
    """The whole of `generate_day` as one frame."""
    return pl.concat(generate_day(config, day), rechunk=True)


def click_probability(config: CatalogueConfig, user_N: Ints, item_N: Ints) -> Floats:
    """That a user who is shown an item clicks on it, for each pair; the same on every day."""
    return sigmoid(_intercept(config) + _pair_logit(config, user_N, item_N))


class Truth:
    """What is true of users and all the items given, on the day `day_index` days after `start`."""

    def __init__(self, config: CatalogueConfig, item_I: Ints, day_index: int) -> None:
        self.config = config
        self._items = _items(config, item_I)
        self._vectors_VI = self._items.vectors_NV.T.astype(np.float32)
        self._share_I = _share_of_theme(config, item_I, day_index).astype(np.float32)

    def click_probabilities(self, user_U: Ints) -> Matrix:
        """That a user who is shown an item clicks on it, (U, I)."""
        users = _users(self.config, user_U)
        logit_UI = users.vectors_NV.astype(np.float32) @ self._vectors_VI
        logit_UI += (_intercept(self.config) + users.disposition_N)[:, None].astype(np.float32)
        logit_UI += self._items.quality_N.astype(np.float32)
        interested_UT = _interest_shares(self.config, users.interests_NX) > 0
        logit_UI += np.float32(_INTEREST) * interested_UT[:, self._items.theme_N]
        np.negative(logit_UI, out=logit_UI)
        np.exp(logit_UI, out=logit_UI)
        logit_UI += 1
        return np.reciprocal(logit_UI, out=logit_UI)

    def exposures(self, user_U: Ints) -> Matrix:
        """That an impression of a user shows an item, (U, I)."""
        own_UT = _interest_shares(self.config, _users(self.config, user_U).interests_NX)
        themes = self.config.themes
        of_theme_T = np.diff(np.sqrt(np.arange(themes + 1) / themes))  # as `flat_popularity` draws
        share_UT = _EXPLORED * of_theme_T + (1 - _EXPLORED) * own_UT
        return share_UT.astype(np.float32)[:, self._items.theme_N] * self._share_I

    def expected_clicks(self, user_U: Ints) -> Matrix:
        """Clicks on an item per impression of a user, (U, I): in this order nothing ranks logged clicks better."""
        found_UI = self.click_probabilities(user_U)
        found_UI *= self.exposures(user_U)
        return found_UI


# Who is interested in what, and what makes them click.


@dataclass(frozen=True, slots=True)
class _Users:
    interests_NX: Ints  # themes, by weight; one may stand there twice
    disposition_N: Floats
    vectors_NV: Floats
    persona_N: Ints


@dataclass(frozen=True, slots=True)
class _Items:
    theme_N: Ints
    quality_N: Floats
    vectors_NV: Floats
    """Its inner product with a user's is how well they match."""


def _users(config: CatalogueConfig, user_N: Ints) -> _Users:
    def draw(*what: str) -> Floats:
        return uniform(key_of(config.seed, "user", *what), user_N)

    persona_N = (_PERSONAS * draw("persona")).astype(np.int64)
    interests: list[Ints] = []
    for which in range(len(_WEIGHTS)):
        place_N = persona_N * _THEMES_OF_A_PERSONA + (_THEMES_OF_A_PERSONA * draw("place", f"{which}")).astype(np.int64)
        of_persona_N = flat_popularity(uniform(key_of(config.seed, "persona", "theme"), place_N), config.themes)
        is_own_N = draw("own interest", f"{which}") >= _LIKE_THEIR_PERSONA
        interests.append(np.where(is_own_N, flat_popularity(draw("interest", f"{which}"), config.themes), of_persona_N))
    vectors = [
        np.sqrt(_TASTE_OF_PERSONA) * normal(key_of(config.seed, "persona", "taste", f"{axis}"), persona_N)
        + np.sqrt(1 - _TASTE_OF_PERSONA) * normal(key_of(config.seed, "user", "taste", f"{axis}"), user_N)
        for axis in range((len(GROUPS) + 1) * _TASTE_DIM)
    ]
    disposition_N = _DISPOSITION_SD * normal(key_of(config.seed, "user", "disposition"), user_N)
    return _Users(np.stack(interests, axis=1), disposition_N, np.stack(vectors, axis=1), persona_N)


def _items(config: CatalogueConfig, item_N: Ints) -> _Items:
    quality_N = _OWN_QUALITY_SD * normal(key_of(config.seed, "item", "quality"), item_N)
    scale = 1 / np.sqrt(_TASTE_DIM)
    vectors = [
        _OWN_MATCH_SD * scale * normal(key_of(config.seed, "item", "match", f"{axis}"), item_N)
        for axis in range(_TASTE_DIM)
    ]
    for group, size in _VALUES.items():
        value_N = group_values(config, group, item_N)
        every = np.arange(size)
        quality_N += _GROUP_QUALITY_SD * normal(key_of(config.seed, group, "quality"), every)[value_N]
        for axis in range(_TASTE_DIM):
            match = normal(key_of(config.seed, group, "match", f"{axis}"), every)
            vectors.append(_GROUP_MATCH_SD * scale * match[value_N])
    return _Items(item_N % config.themes, quality_N, np.stack(vectors, axis=1))


def group_values(config: CatalogueConfig, group: str, item_N: Ints) -> Ints:
    """Which value of a group of GROUPS each item has: what its features tell, and its appeal follows."""
    size = _VALUES[group]
    of_theme_N = (size * uniform(key_of(config.seed, "theme", group), item_N % config.themes)).astype(np.int64)
    own_N = (size * uniform(key_of(config.seed, "item", group), item_N)).astype(np.int64)
    return np.where(uniform(key_of(config.seed, "item", "own", group), item_N) < _LIKE_ITS_THEME, of_theme_N, own_N)


def _pair_logit(config: CatalogueConfig, user_N: Ints, item_N: Ints) -> Floats:
    """But for the intercept."""
    distinct_users, user_at_N = np.unique(user_N, return_inverse=True)
    distinct_items, item_at_N = np.unique(item_N, return_inverse=True)
    users, items = _users(config, distinct_users), _items(config, distinct_items)
    match_N = (users.vectors_NV[user_at_N] * items.vectors_NV[item_at_N]).sum(1)
    interested_N = (users.interests_NX[user_at_N] == items.theme_N[item_at_N][:, None]).any(1)
    return users.disposition_N[user_at_N] + items.quality_N[item_at_N] + match_N + _INTEREST * interested_N


def _interest_shares(config: CatalogueConfig, interests_UX: Ints) -> Floats:
    """Weights of a user's interests by theme, (U, T)."""
    share_UT = np.zeros((len(interests_UX), config.themes))
    for which, weight in enumerate(_WEIGHTS):
        share_UT[np.arange(len(interests_UX)), interests_UX[:, which]] += weight
    return share_UT


def _intercept(config: CatalogueConfig) -> float:
    return _intercept_of(config.model_dump_json(exclude={"rows_per_day"}))


@lru_cache(maxsize=64)
def _intercept_of(text: str) -> float:
    """Solved on a reference sample that is no day of the log, by bisection."""
    config = CatalogueConfig.model_validate_json(text)
    logit = _pair_logit(config, *_shown(config, "reference", 0, np.arange(_REFERENCE_ROWS)))
    low, high = -40.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logit + middle).mean() < config.click_rate else (low, middle)
    return low


# The log: who was shown what.


def _shown(config: CatalogueConfig, stream: str, day_index: int, row: Ints) -> tuple[Ints, Ints]:
    """user_N and item_N of rows of a stream (a day, or the reference sample)."""

    def draw(what: str) -> Floats:
        return uniform(key_of(config.seed, stream, what), row)

    births = _births(config.users)
    before = config.users + day_index * births
    newcomer_N = before + (births * draw("user")).astype(np.int64)
    user_N = np.where(draw("new user") < config.new_user_share, newcomer_N, flat_popularity(draw("user"), before))
    distinct, at_N = np.unique(user_N, return_inverse=True)
    which_N = np.searchsorted(np.cumsum(_WEIGHTS)[:-1], draw("interest"), side="right")
    interest_N = _users(config, distinct).interests_NX[at_N, which_N]
    theme_N = np.where(draw("explored") < _EXPLORED, flat_popularity(draw("theme"), config.themes), interest_N)
    known_N, first_N, born_N = _of_themes(config, theme_N, day_index)
    old_N = theme_N + config.themes * _rank(draw("item"), known_N)
    new_N = first_N + config.themes * (born_N * draw("item")).astype(np.int64)
    is_new_N = (draw("new item") < config.new_item_share) & (born_N > 0)
    return user_N, np.where(is_new_N, new_N, old_N)


def _rank(draw_N: Floats, count_N: Ints) -> Ints:
    """Places in the order of popularity among so many, with a share of about 1 / (place + _PLATEAU): Zipf's tail."""
    rank_N = _PLATEAU * np.expm1(draw_N * np.log1p(count_N / _PLATEAU))
    return np.minimum(rank_N.astype(np.int64), count_N - 1)


def _of_themes(config: CatalogueConfig, theme_N: Ints, day_index: int) -> tuple[Ints, Ints, Ints]:
    """Items of a theme that existed before the day; the first that is born on it, and how many are."""
    births = _births(config.items)
    before = config.items + day_index * births
    known_N = before // config.themes + (theme_N < before % config.themes)
    first_N = theme_N + config.themes * known_N
    born_N = np.maximum(0, -(-(before + births - first_N) // config.themes))
    return known_N, first_N, born_N


def _share_of_theme(config: CatalogueConfig, item_I: Ints, day_index: int) -> Floats:
    """That an impression of its theme shows an item, as `_shown` draws it; 0 before it is born."""
    rank_I = item_I // config.themes
    known_I, first_I, born_I = _of_themes(config, item_I % config.themes, day_index)
    new_share_I = np.where(born_I > 0, config.new_item_share, 0.0)
    old_I = (1 - new_share_I) * np.log1p(1 / (rank_I + _PLATEAU)) / np.log1p(known_I / _PLATEAU)
    is_born_I = (item_I >= first_I) & (item_I < first_I + config.themes * born_I)
    return np.where(rank_I < known_I, old_I, np.where(is_born_I, new_share_I / np.maximum(born_I, 1), 0.0))


def _births(first: int) -> int:
    return max(1, round(first * _BIRTHS))


def _require_chunk(chunk_rows: int) -> None:
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows = {chunk_rows}: a chunk holds at least one row")


# The frames.


def _chunks(config: CatalogueConfig, day: date, day_index: int, chunk_rows: int) -> Iterator[pl.DataFrame]:
    for begin in range(0, config.rows_per_day, chunk_rows):
        row = np.arange(begin, min(begin + chunk_rows, config.rows_per_day))
        user_N, item_N = _shown(config, day.isoformat(), day_index, row)
        probability_N = click_probability(config, user_N, item_N)
        click_N = uniform(key_of(config.seed, day.isoformat(), "click"), row) < probability_N
        yield pl.DataFrame({KEY: (day.toordinal() << 32) + row}).with_columns(
            pl.lit(day).alias("day"),
            *user_frame(config, user_N),
            pl.Series("item_id", item_N),
            pl.Series(LABEL, click_N.astype(np.int8)),
            pl.Series(TRUTH, probability_N),
        )


def user_frame(config: CatalogueConfig, user_N: Ints) -> pl.DataFrame:
    """`user_id` and USER_FEATURES: `segment` tells the persona with noise, `age` (years) something of it."""

    def draw(what: str) -> Floats:
        return uniform(key_of(config.seed, "user", what), user_N)

    persona_N = _users(config, user_N).persona_N
    segment_N = _noisy(persona_N, draw("segment"), _PERSONAS)
    age_N = np.floor(22 + 2 * persona_N + 6 * normal(key_of(config.seed, "user", "age"), user_N)).clip(16, 90)
    age = pl.Series("age", age_N.astype(np.int64)).set(pl.Series(draw("missing age") < _MISSING["age"]), None)
    levels = {"country": LEVELS["country"], "device": LEVELS["device"]}
    text = [_text(name, flat_popularity(draw(name), len(of)), of) for name, of in levels.items()]
    segments = tuple(f"segment {i + 1}" for i in range(_PERSONAS))
    return pl.DataFrame([pl.Series("user_id", user_N), _text("segment", segment_N, segments), age, *text])


def item_frame(config: CatalogueConfig, item_N: Ints) -> pl.DataFrame:
    """`item_id` and ITEM_FEATURES of items."""

    def draw(*what: str) -> Floats:
        return uniform(key_of(config.seed, "item", *what), item_N)

    columns = [pl.Series("item_id", item_N)]
    for group, names in GROUPS.items():
        value_N = group_values(config, group, item_N)
        for name in names:
            if name == "price":
                spread_N = normal(key_of(config.seed, "item", name), item_N)
                column = pl.Series(name, np.exp(1 + 0.4 * value_N + 0.3 * spread_N).round(2))
            elif name in _BAGS:
                column = _bag(config, name, value_N, item_N)
            else:
                column = _single(config, name, group, value_N, draw("shown", name))
            missing = draw("missing", name) < _MISSING.get(name, 0.0)
            columns.append(column.zip_with(pl.Series(~missing), pl.Series([None], dtype=column.dtype)))
    return pl.DataFrame(columns)


def _single(config: CatalogueConfig, name: str, group: str, value_N: Ints, draw_N: Floats) -> pl.Series:
    if name in _NESTED:
        levels = _NESTED[name]
        level_N = value_N * levels // _VALUES[group]
    else:
        levels = _SCATTERED[name]
        level_N = (levels * uniform(key_of(config.seed, "level", name), value_N)).astype(np.int64)
    names = _NAMES.get(name) or tuple(f"{name.removeprefix('price_')} {i + 1}" for i in range(levels))
    return _text(name, _noisy(level_N, draw_N, levels), names)


def _bag(config: CatalogueConfig, name: str, value_N: Ints, item_N: Ints) -> pl.Series:
    """Up to as many texts as there are slots, of which each has levels of its own: so no bag holds one twice."""
    slots, levels = _BAGS[name]
    shown: list[pl.Series] = []
    for slot in range(slots):
        level_N = (levels * uniform(key_of(config.seed, "level", name, f"{slot}"), value_N)).astype(np.int64)
        level_N = _noisy(level_N, uniform(key_of(config.seed, "item", "shown", name, f"{slot}"), item_N), levels)
        names = tuple(f"{name[:-1]} {slot + 1 + slots * i}" for i in range(levels))
        shown.append(_text(f"{slot}", level_N, names))
    size = (uniform(key_of(config.seed, "item", "size", name), item_N) * (slots + 1)).astype(np.int64)
    lists = pl.DataFrame(shown).select(pl.concat_list(pl.all()).list.head(pl.lit(pl.Series(size))))
    return lists.to_series().alias(name)


def _noisy(level_N: Ints, draw_N: Floats, levels: int) -> Ints:
    """Mostly the level itself; where the draw says so, any."""
    return np.where(draw_N < _NOISE, (levels * draw_N / _NOISE).astype(np.int64), level_N)


def _text(name: str, level_N: Ints, levels: tuple[str, ...]) -> pl.Series:
    return pl.Series(levels, dtype=pl.String).gather(pl.Series(level_N)).alias(name)
