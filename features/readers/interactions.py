"""Interactions as graph recommenders publish them: a text file of lines `user item item …`, integers all."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from base.errors import DataError


def read_interactions(files: Sequence[Path]) -> pl.LazyFrame:
    """A row per interaction: user_id, item_id (Int64), part (the file's name without its ending), interaction (1).

    Rows are in the order of the files; a user without items gives none. Raises DataError on what is no integer.
    """
    return pl.concat([_read(file) for file in files]).lazy()


def _read(file: Path) -> pl.DataFrame:
    lines = pl.DataFrame({"line": file.read_text(encoding="utf-8").splitlines()})
    words = lines.select(pl.col("line").str.strip_chars().str.split(" ")).filter(pl.col("line").list.first() != "")
    try:
        ids = words.select(pl.col("line").cast(pl.List(pl.Int64)))["line"]
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"{file}: {str(error).splitlines()[0]}; every line must be `user item item …`") from None
    table = pl.DataFrame({"user_id": ids.list.first(), "item_id": ids.list.slice(1)})
    return table.explode("item_id", empty_as_null=False, keep_nulls=False).with_columns(
        part=pl.lit(file.stem), interaction=pl.lit(1, pl.Int8)
    )
