"""Tensors on disk: what was written is read, in row ranges too; what is gone or broken is named."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from base.errors import ArtefactError
from base.storage import publish, resolve, verify
from recsys.tensors import load_tensors, save_tensors

TENSORS = {
    "embed.tables.embedding_bags.user id.weight": torch.randn(1000, 8),
    "narrow": torch.arange(500, dtype=torch.int64),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 8),
    "one": torch.tensor([1.0]),
    "wide": torch.randn(3, 4000).double(),
    "deep": torch.randn(50, 4, 5),
}


def stored(tensors: Mapping[str, Tensor], folder: Path, large: int) -> Path:
    with publish(folder / "artefact", "weights") as staging:
        save_tensors(staging, "weights", tensors, large=large)
    return resolve(folder / "artefact") / "weights"


@pytest.mark.parametrize("large", [1, 32, 1_000, 2_000, 10_000, 2**28])
def test_tensors_come_back_as_they_were(large: int, tmp_path: Path) -> None:
    tensors = {name: t for name, t in TENSORS.items() if large > 100 or len(t.shape[:1]) == 0 or t.shape[0] < 100}
    folder = stored(tensors, tmp_path, large)
    loaded = load_tensors(folder)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].equal(tensor), name
    assert {p.suffix for p in folder.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("large", [1, 10**9])
def test_a_name_may_look_like_a_part(large: int, tmp_path: Path) -> None:
    """As that of a tower's own table does, where the tower is called `rows`."""
    tensors = {"embed.user@rows.weight": torch.ones(3, 2), "a@rows000000000000": torch.zeros(1, 2)}
    if large > 1:
        tensors.pop("a@rows000000000000")
    found = load_tensors(stored(tensors, tmp_path, large))
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    wanted = {"wide", "embed.tables.embedding_bags.user id.weight", "one", "unknown"}
    loaded = load_tensors(stored(TENSORS, tmp_path, large=2_000), wanted)
    assert loaded.keys() == wanted - {"unknown"}
    assert all(loaded[name].equal(TENSORS[name]) for name in loaded)


def test_large_tensors_are_cut_by_rows(tmp_path: Path) -> None:
    folder = stored(TENSORS, tmp_path, large=2_000)
    names = {p.name: set(load_file(p)) for p in folder.iterdir()}
    assert names["small.safetensors"] == {"scalar", "empty", "one"}
    table = [key for keys in names.values() for key in keys if key.startswith("embed")]
    assert len(table) == 17  # 62 rows of 32 bytes each in a file
    sizes = [t.numel() * t.element_size() for p in folder.glob("rows-*") for t in load_file(p).values()]
    assert all(size <= 2_000 or size == 32_000 for size in sizes)  # a row is never cut
    assert len(names) == 1 + 17 + 2 + 3 + 2


def test_shared_memory_and_strides_do_not_matter(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "same": base, "transposed": base.T, "slice": base[1:3, ::2]}
    for large in (1, 2**28):
        loaded = load_tensors(stored(tensors, tmp_path / str(large), large))
        assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


def test_gradients_are_not_kept(tmp_path: Path) -> None:
    loaded = load_tensors(stored({"w": torch.nn.Parameter(torch.ones(3))}, tmp_path, 2**28))
    assert not loaded["w"].requires_grad


def test_the_same_tensors_have_the_same_bytes(tmp_path: Path) -> None:
    backwards = dict(reversed(TENSORS.items()))
    folders = [stored(t, tmp_path / n, 2_000) for n, t in (("a", TENSORS), ("b", backwards))]
    assert folders[0].parent.name == folders[1].parent.name  # the name is the hash of the content


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtefactError, match=f"{folder}: holds no weights"):
            load_tensors(folder)


@pytest.mark.parametrize("name", ["small.safetensors", "rows-00003.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_broken_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    folder = stored(TENSORS, tmp_path, 2_000)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"cut": content[:-3], "garbage": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(ArtefactError, match=f"{name}: cannot be read"):
        load_tensors(folder)
    with pytest.raises(ArtefactError, match=f"{name}: differs from its checksum"):
        verify(folder.parent)


def test_a_file_missing_from_the_middle_is_noticed(tmp_path: Path) -> None:
    folder = stored({"table": TENSORS["embed.tables.embedding_bags.user id.weight"]}, tmp_path, 2_000)
    (folder / "rows-00002.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"weights/rows-00002\.safetensors: missing"):
        verify(folder.parent)
    with pytest.raises(ArtefactError, match="rows 124 to 186 of 'table' are missing"):
        load_tensors(folder)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = stored(TENSORS, tmp_path, 2_000)
    path = folder / "rows-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"rows-00000\.safetensors: differs from its checksum"):
        verify(folder.parent)
