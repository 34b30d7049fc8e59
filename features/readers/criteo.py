"""Criteo display ads in the raw format: tab separated, no header; label, 13 counts I1..I13, 26 hashed ids C1..C26."""

from pathlib import Path

import polars as pl

COUNTS = tuple(f"I{i}" for i in range(1, 14))
IDS = tuple(f"C{i}" for i in range(1, 27))


def read_criteo(files: list[Path], row_number: str | None) -> pl.LazyFrame:
    """Columns label and I1..I13 (Int64), C1..C26 (String); empty text is null. `row_number` names a running key."""
    numbers = ("label", *COUNTS)
    schema = {name: pl.Int64() for name in numbers} | {name: pl.String() for name in IDS}
    return pl.scan_csv(
        files, separator="\t", has_header=False, schema=schema, quote_char=None, row_index_name=row_number
    )
