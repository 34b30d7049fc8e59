"""MovieLens-1M as GroupLens distributes it: ratings, users.dat and movies.dat in one folder, `::` between fields."""

from pathlib import Path

import polars as pl

from base.errors import DataError


def read_movielens_1m(folder: Path) -> pl.LazyFrame:
    """All ratings with their user's and movie's columns, in the order of the ratings file.

    Columns: user_id, movie_id, rating, then gender, age, occupation, zip; title, year (in the title's parentheses),
    genres (list). `ratings.dat` gives a timestamp as well; `ratings.parquet` gives whatever columns it has.
    Raises DataError if a file is missing.
    """
    for name in ("users.dat", "movies.dat"):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing; data.path must be the folder of MovieLens-1M")
    if (folder / "ratings.parquet").is_file():
        ratings = pl.scan_parquet(folder / "ratings.parquet")
    elif (folder / "ratings.dat").is_file():
        ratings = _table(folder / "ratings.dat", ["user_id", "movie_id", "rating", "timestamp"]).cast(pl.Int64).lazy()
    else:
        raise DataError(f"{folder / 'ratings.dat'}: missing; data.path must be the folder of MovieLens-1M")
    users = _table(folder / "users.dat", ["user_id", "gender", "age", "occupation", "zip"])
    movies = _table(folder / "movies.dat", ["movie_id", "title", "genres"])
    ids = ratings.collect_schema()
    users = users.with_columns(pl.col("user_id").cast(ids["user_id"]))
    movies = movies.with_columns(
        pl.col("movie_id").cast(ids["movie_id"]),
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year"),
        pl.col("genres").str.split("|"),
    )
    joined = ratings.join(users.lazy(), on="user_id", how="left", maintain_order="left")
    return joined.join(movies.lazy(), on="movie_id", how="left", maintain_order="left")


def _table(path: Path, names: list[str]) -> pl.DataFrame:
    """All columns as text: zip codes begin with zeros."""
    lines = pl.Series("line", path.read_text(encoding="latin-1").splitlines()).to_frame()
    fields = pl.col("line").str.split_exact("::", len(names) - 1)
    return lines.select(fields.struct.rename_fields(names).alias("fields")).unnest("fields")
