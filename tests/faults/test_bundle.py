"""A Bundle that is incomplete, altered or put together from two runs is refused, and the refusal names the file."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest

from base.errors import ArtefactError
from base.storage import MANIFEST, publish, read_manifest, resolve
from features.pipeline import FeaturePipeline, FittedPipeline
from recsys.bundle import Bundle
from tests.faults.conftest import Platform

FILES = [
    *("features/learned/000.parquet", "features/learned/001.parquet", "features/learned/003.parquet"),
    *("features/learned/004.parquet", "features/recipe.json", "golden.parquet", "metrics.json", "model.json"),
    *("origin.json", "schema.json", "settings.json", "weights/small.safetensors"),
]
DAY = "day=2026-03-02"


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    """The bundle as MLflow keeps it: a plain folder."""
    return Path(shutil.copytree(resolve(bundle_path), tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        Bundle.load(folder)
    return str(caught.value)


def seal(folder: Path, target: Path, **about: str) -> Path:
    """The same files with a manifest of their own, as if they had been published like this."""
    with publish(target, "bundle") as staging:
        for name in FILES:
            shutil.copy(folder / name, staging / name)
        staging.about.update(read_manifest(folder).about, **about)
    return target


def test_these_are_all_its_files(bundle_path: Path) -> None:
    assert sorted(read_manifest(resolve(bundle_path)).files) == FILES


def test_a_copy_scores_bit_for_bit_alike(platform: Platform, bundle_path: Path, copy: Path) -> None:
    raw = platform.run.source.raw(DAY)
    one, two = (pl.concat(Bundle.load(path).predict(raw)) for path in (bundle_path, copy))
    assert one.equals(two)
    assert Bundle.load(copy).version == Bundle.load(bundle_path).version
    Bundle.load(copy).check_golden()


@pytest.mark.parametrize("name", FILES)
def test_one_byte_changed(copy: Path, name: str) -> None:
    path = copy / name
    sound = path.read_bytes()
    for position in (0, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        assert refusal(copy) == f"{path}: differs from its checksum in the manifest; restore or rebuild it"


@pytest.mark.parametrize("name", FILES)
def test_cut_short(copy: Path, name: str) -> None:
    path = copy / name
    sound = path.read_bytes()
    for length in (0, 1, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        assert refusal(copy) == f"{path}: differs from its checksum in the manifest; restore or rebuild it"


@pytest.mark.parametrize("name", FILES)
def test_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert refusal(copy) == f"{copy / name}: missing, though the manifest lists it; restore or rebuild it"


@pytest.mark.parametrize("name", ["surplus", "weights/more.safetensors", "features/learned/002.parquet"])
def test_one_too_many(copy: Path, name: str) -> None:
    shutil.copy(copy / FILES[-1], copy / name)
    assert refusal(copy) == f"{copy / name}: not listed in the manifest; remove it or rebuild the artefact"


def test_no_manifest(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    assert refusal(copy).startswith(f"{copy / MANIFEST}: missing, so this folder is not a complete artefact")


def test_a_manifest_changed_in_any_byte_is_refused_or_says_the_same(copy: Path) -> None:
    path = copy / MANIFEST
    sound, manifest = path.read_bytes(), read_manifest(copy)
    for i in range(0, len(sound), 3):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        with suppress(ArtefactError):
            Bundle.load(copy)
            assert read_manifest(copy) == manifest


def test_files_swapped(copy: Path) -> None:
    a, b = copy / FILES[0], copy / FILES[1]
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    assert refusal(copy) == f"{a}: differs from its checksum in the manifest; restore or rebuild it"


def test_something_else(platform: Platform, tmp_path: Path) -> None:
    run = platform.run
    assert refusal(run.features_path) == f"{run.features_path}: holds 'features', not 'bundle'; check the path"
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'}")


# Sealed again, so that the checksums are right: only what the parts say of each other is wrong.


def test_features_of_another_recipe(platform: Platform, copy: Path, tmp_path: Path) -> None:
    transforms = list(platform.run.pipeline.transforms)
    transforms[2] = transforms[2].model_copy(update={"seed": 1})
    other = FeaturePipeline(tuple(transforms))
    fitted = other.fit(platform.run.source.raw("day=2026-03-01"))
    mine = FittedPipeline.load(copy / "features")
    assert fitted.sparse == mine.sparse
    assert fitted.version != mine.version
    with publish(tmp_path / "features", "features") as staging:
        fitted.save(staging, prefix="features/")
    shutil.rmtree(copy / "features")
    shutil.copytree(tmp_path / "features" / "features", copy / "features")
    target = seal(copy, tmp_path / "mixed")
    folder = resolve(target)
    assert refusal(target) == (
        f"{folder / 'features'}: is version {fitted.version}, but the model was trained with {mine.version}; "
        "take both from the same run"
    )
    claimed = seal(copy, tmp_path / "claimed", features=fitted.version)  # as good as sealed by that other run
    assert Bundle.load(claimed).features.version == fitted.version
    with pytest.raises(ArtefactError, match="p_click of its golden rows differs by"):
        Bundle.load(claimed).check_golden()


def test_one_character_of_the_recipe(copy: Path, tmp_path: Path) -> None:
    path = copy / "features/recipe.json"
    path.write_text(path.read_text().replace('"buckets": 500', '"buckets": 501'))
    target = seal(copy, tmp_path / "mixed")
    assert refusal(target).startswith(f"{resolve(target) / 'features'}: what was learned hashes to ")


def test_one_number_that_was_learned(copy: Path, tmp_path: Path) -> None:
    path = copy / "features/learned/000.parquet"
    table = pl.read_parquet(path)
    table.with_columns(count=pl.col("count") + (pl.int_range(pl.len()) == 7)).write_parquet(path)
    target = seal(copy, tmp_path / "mixed")
    assert refusal(target).startswith(f"{resolve(target) / 'features'}: what was learned hashes to ")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("schema.json", '"rows": 501', '"rows": 502', "schema.json: does not describe the stored features"),
        ("model.json", '"dim": 8', '"dim": 16', "weights: embed.numeric_ND is (1, 8), the model needs (1, 16)"),
        ("model.json", '"layers": 1', '"layers": 2', "the model needs "),
        ("model.json", '"name": "autoint"', '"name": "dcn"', "model.json: cannot be read ("),
    ],
)
def test_a_description_of_something_else(
    copy: Path, tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    target = seal(copy, tmp_path / "mixed")
    found = refusal(target)
    assert message in found
    assert str(resolve(target)) in found


@pytest.mark.parametrize("name", ["model.json", "schema.json", "settings.json", "metrics.json", "origin.json"])
def test_json_that_is_none(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_text("{")
    target = seal(copy, tmp_path / "mixed")
    assert refusal(target).startswith(f"{resolve(target) / name}: cannot be read (")


@pytest.mark.parametrize("name", ["weights/small.safetensors", "golden.parquet", "features/learned/001.parquet"])
def test_a_table_that_is_none(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_bytes(b"PAR1")
    target = seal(copy, tmp_path / "mixed")
    assert str(resolve(target) / name) in refusal(target)


def test_a_table_left_out_is_never_filled_with_random_weights(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "weights/small.safetensors"
    tensors = load_file(path)
    del tensors["embed.tables.embedding_bags.age.weight"]
    save_file(tensors, path)
    target = seal(copy, tmp_path / "mixed")
    assert refusal(target) == (
        f"{resolve(target) / 'weights'}: embed.tables.embedding_bags.age.weight is missing, the model needs (6, 8); "
        "weights and configuration belong to different runs"
    )


def test_golden_rows_guard_the_mathematics(copy: Path, tmp_path: Path) -> None:
    path = copy / "model.json"
    model = json.loads(path.read_text())
    path.write_text(json.dumps({**model, "variant": "paper"}))  # other scores from the same weights
    bundle = Bundle.load(seal(copy, tmp_path / "mixed"))
    with pytest.raises(ArtefactError, match=r"^bundle [0-9a-f]{16}: p_click of its golden rows differs by .*doctor`$"):
        bundle.check_golden()


def test_golden_rows_guard_the_correction_for_sampling(copy: Path, tmp_path: Path) -> None:
    path = copy / "schema.json"
    schema = json.loads(path.read_text())
    assert schema["negative_rate"] == 1
    path.write_text(json.dumps({**schema, "negative_rate": 0.5}))
    bundle = Bundle.load(seal(copy, tmp_path / "mixed"))
    with pytest.raises(ArtefactError, match="p_click of its golden rows differs by"):
        bundle.check_golden()
