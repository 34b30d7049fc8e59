"""The reader of interactions, a user and their items a line."""

from pathlib import Path

import polars as pl
import pytest

from base.config import parse_config
from base.errors import DataError
from features.readers.interactions import read_interactions
from features.source import Data, Source


def test_a_row_for_each_item_of_each_user(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0 5 3\n1 3 \n\n2\n")
    (tmp_path / "test.txt").write_text("0 9\n")
    frame = read_interactions([tmp_path / "train.txt", tmp_path / "test.txt"]).collect()
    assert frame.schema == {"user_id": pl.Int64, "item_id": pl.Int64, "part": pl.String, "interaction": pl.Int8}
    assert frame.rows() == [(0, 5, "train", 1), (0, 3, "train", 1), (1, 3, "train", 1), (0, 9, "test", 1)]


def test_a_source_reads_them_by_part(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"{u} {' '.join(map(str, range(u, u + 10)))}\n" for u in range(8)))
    (tmp_path / "test.txt").write_text("3 99\n")
    tree = {
        "path": str(tmp_path / "*.txt"),
        "format": "interactions",
        "key": ["user_id", "item_id"],
        "labels": ["interaction"],
        "split": {"per_user": "user_id", "train": 0.9, "valid": 0.1, "test_where": "part = 'test'"},
    }
    source = Source(parse_config(Data, tree, source="test"))
    rows = {role: source.checked(f"split={role}").collect() for role in ("train", "valid", "test")}
    assert rows["test"].select("user_id", "item_id").rows() == [(3, 99)]
    assert rows["valid"]["user_id"].sort().to_list() == list(range(8))
    assert rows["train"].height == 72


def test_what_is_no_integer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0 5 x\n")
    with pytest.raises(DataError, match=r"train\.txt: .*every line must be `user item item …`"):
        read_interactions([tmp_path / "train.txt"])
