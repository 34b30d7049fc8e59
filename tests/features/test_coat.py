"""The reader of Coat shopping, on a folder of three users and two coats."""

from pathlib import Path

import pytest

from base.errors import DataError
from features.readers.coat import FILES, read_coat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "train.ascii": "0 5\n3 0\n0 0\n",
        "test.ascii": "4 0\n0 0\n0 1\n",
        "user_features.ascii": "1 0 1 0\n0 1 0 1\n1 0 0 0\n",
        "item_features.ascii": "1 0 1\n0 1 0\n",
        "user_features_map.txt": "gender:men\ngender:women\nage:20-30\nage:over 60\n",
        "item_features_map.txt": "gender:men\ngender:women\nonfrontpage:yes",
    }
    assert set(files) == set(FILES)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_pair_with_its_ratings_and_features(folder: Path) -> None:
    frame = read_coat(folder).collect()
    assert frame.select("user_id", "item_id").rows() == [(u, i) for u in range(3) for i in range(2)]
    assert frame["rating"].to_list() == [None, 5, 3, None, None, None]
    assert frame["random_rating"].to_list() == [4, None, None, None, None, 1]
    assert frame["user_gender"].to_list() == ["men"] * 2 + ["women"] * 2 + ["men"] * 2
    assert frame["age"].to_list() == ["20-30"] * 2 + ["over 60"] * 2 + [None] * 2  # nothing is hot: missing
    assert frame["item_gender"].to_list() == ["men", "women"] * 3
    assert frame["onfrontpage"].to_list() == ["yes", None] * 3


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing; data.path must be the folder of Coat"):
        read_coat(folder)


def test_files_that_do_not_fit_together_are_refused(folder: Path) -> None:
    (folder / "test.ascii").write_text("4 0\n0 0\n")
    with pytest.raises(DataError, match=r"do not fit together: \(3, 2\), \(2, 2\), 3 users, 2 coats"):
        read_coat(folder)
    (folder / "user_features_map.txt").write_text("gender:men\n")
    with pytest.raises(DataError, match=r"names 1 columns, user_features\.ascii has 4"):
        read_coat(folder)
