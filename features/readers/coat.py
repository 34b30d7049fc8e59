"""Coat shopping (Schnabel et al., ICML 2016): ratings of coats that users chose, and of coats drawn at random."""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from base.errors import DataError

FILES = (
    *("train.ascii", "test.ascii", "user_features.ascii", "item_features.ascii"),
    *("user_features_map.txt", "item_features_map.txt"),
)


def read_coat(folder: Path) -> pl.LazyFrame:
    """Every pair of a user and a coat, user by user.

    Columns: user_id, item_id; rating (1 to 5, null where the user did not choose to rate the coat); random_rating
    (the same of coats drawn at random, null elsewhere); then the features of the user and of the coat by the names of
    the maps, those that both have with the prefix user_ or item_.
    Raises DataError if a file is missing or the shapes do not fit.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing; data.path must be the folder of Coat")
    chosen_UI, random_UI = (_matrix(folder / name) for name in FILES[:2])
    users, items = (_features(folder, kind) for kind in ("user", "item"))
    if chosen_UI.shape != random_UI.shape or chosen_UI.shape != (users.height, items.height):
        shapes = f"{chosen_UI.shape}, {random_UI.shape}, {users.height} users, {items.height} coats"
        raise DataError(f"{folder}: ratings and features do not fit together: {shapes}; restore the files")
    users, items = users.with_row_index("user_id"), items.with_row_index("item_id")
    both = set(users.columns) & set(items.columns)
    pairs = users.rename({c: f"user_{c}" for c in both}).join(
        items.rename({c: f"item_{c}" for c in both}), how="cross", maintain_order="left_right"
    )
    ratings = (pl.Series(n, m.ravel()) for n, m in (("rating", chosen_UI), ("random_rating", random_UI)))
    ratings = (pl.DataFrame([r]).select(pl.when(pl.all() > 0).then(pl.all())).to_series() for r in ratings)
    frame = pairs.with_columns(pl.col("user_id", "item_id").cast(pl.Int64), *ratings)
    first = ["user_id", "item_id", "rating", "random_rating"]
    return frame.select(*first, pl.exclude(first)).lazy()


def _matrix(path: Path) -> NDArray[np.int64]:
    return np.loadtxt(path, dtype=np.int64, ndmin=2)


def _features(folder: Path, kind: str) -> pl.DataFrame:
    """One column of text per feature, from one-hot columns and their map of `feature:value` lines."""
    path = folder / f"{kind}_features_map.txt"
    names = [line.split(":", 1) for line in path.read_text().split("\n") if line.strip()]
    hot = _matrix(folder / f"{kind}_features.ascii")
    if hot.shape[1] != len(names):
        raise DataError(f"{path}: names {len(names)} columns, {kind}_features.ascii has {hot.shape[1]}; restore both")
    columns: dict[str, list[str | None]] = {}
    for feature in dict.fromkeys(name for name, _ in names):
        places = [i for i, (name, _) in enumerate(names) if name == feature]
        columns[feature] = [
            names[places[int(row.argmax())]][1].strip() if row.any() else None for row in hot[:, places]
        ]
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
