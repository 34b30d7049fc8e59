"""diff: what it counts, against pipelines whose history is known; what it prints; what it refuses."""

import json
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from base.errors import ArtefactError
from base.storage import publish
from features.pipeline import FeaturePipeline, FittedPipeline
from features.transforms import Hash, Log, Quantiles, Standardise, Vocabulary
from pipelines.cli import main
from pipelines.diff import Diff, FeatureDiff, Ids, compare, diff, diff_text

START = date(2026, 3, 1)


def log(letters: str, price: float = 1.0) -> pl.LazyFrame:
    return pl.LazyFrame(
        {"x": list(letters), "n": range(len(letters)), "price": [price + i for i in range(len(letters))]}
    )


PIPELINE = FeaturePipeline(
    (
        Vocabulary(column="x", min_count=2, retire_after_days=1),
        *(Hash(column="x", name="h", buckets=4), Standardise(column="price"), Quantiles(column="n", buckets=2)),
    ),
)


def line() -> list[FittedPipeline]:
    """The 3rd day retires b and c, the 4th revives c, the 6th gives the row of b, free for three days, to e."""
    fitted = [PIPELINE.fit(log("aaabbbccd"), day=START)]
    for i, letters in enumerate(["aa", "aag", "aacc", "ac", "aceeefff"], 1):
        fitted.append(fitted[-1].extend(log(letters), day=START + timedelta(days=i), recycle_after_days=3))
    return fitted


def of(found: Diff, feature: str) -> FeatureDiff:
    return next(f for f in found.features if f.feature == feature)


def test_along_a_line_every_id_is_accounted_for() -> None:
    fitted = line()
    same = compare(fitted[0], fitted[0])
    assert same.relation == "same"
    assert {f.change for f in same.features} == {"same"}
    retired = compare(fitted[0], fitted[2])
    assert of(retired, "x").ids == Ids(new=0, examples=(), retired=2, recycled=0, revived=0, waiting=1)
    revived = compare(fitted[2], fitted[3])
    assert of(revived, "x").ids == Ids(new=0, examples=(), retired=0, recycled=0, revived=1, waiting=1)
    whole = compare(fitted[0], fitted[-1])
    expected = Ids(new=2, examples=(("e", 3), ("f", 3)), retired=1, recycled=1, revived=0, waiting=0)
    assert of(whole, "x").ids == expected
    assert of(whole, "x").rows == (4, 5)
    assert (whole.relation, whole.days) == ("extended, with rows recycled", ("2026-03-01", "2026-03-06"))
    assert compare(fitted[3], fitted[4]).relation == "extended"
    assert [f.change for f in whole.features] == ["ids", "same", "same", "same"]
    assert of(whole, "price").scale[0] == of(whole, "price").scale[1]


def test_another_fit_says_what_was_refitted_and_set() -> None:
    a = FeaturePipeline(
        (Vocabulary(column="x"), Standardise(column="price"), Log(column="n"), Hash(column="x", name="h", buckets=4)),
        {"unit": "price / n"},
    ).fit(log("abc"))
    b = FeaturePipeline(
        (
            Vocabulary(column="x"),
            Standardise(column="price"),
            Hash(column="x", name="h", buckets=5),
            Quantiles(column="n"),
        ),
        {"unit": "price / 2"},
    ).fit(log("bbd", price=5.0))
    found = compare(a, b)
    assert found.relation == "another fit"
    assert found.derive == {"unit": ("price / n", "price / 2")}
    assert {f.feature: f.change for f in found.features} == {
        "x": "ids",
        "price": "refitted",
        "h": "settings",
        "n": "settings",
    }
    was, now = of(found, "price").scale
    assert was is not None
    assert now is not None
    assert (was.mean, now.mean) == pytest.approx((2.0, 6.0))
    assert of(found, "h").settings == {"buckets": (4, 5)}
    assert of(found, "h").rows == (5, 6)
    assert of(found, "n").settings["kind"] == ("log", "quantiles")
    assert of(found, "x").ids == Ids(new=1, examples=(("d", 1),), retired=2, recycled=2, revived=0, waiting=0)
    printed = diff_text(found)
    assert "derive.unit: price / n -> price / 2" in printed
    assert "mean 2 -> 6, std 0.8165 -> 0.8165" in printed
    assert "buckets 4 -> 5" in printed


def test_features_come_and_go() -> None:
    a = FeaturePipeline((Vocabulary(column="x"), Standardise(column="price"))).fit(log("ab"))
    b = FeaturePipeline((Vocabulary(column="n"), Standardise(column="price"))).fit(log("ab"))
    found = compare(a, b)
    assert [(f.feature, f.change, f.rows) for f in found.features] == [
        *(("n", "added", (None, 3)), ("price", "same", (None, None)), ("x", "removed", (3, None))),
    ]
    assert of(found, "n").ids == Ids(new=2, examples=((0, 1), (1, 1)), retired=0, recycled=0, revived=0, waiting=0)
    assert of(found, "x").ids == Ids(new=0, examples=(), retired=2, recycled=0, revived=0, waiting=0)
    as_text = FeaturePipeline((Vocabulary(column="n"),), {}).fit(log("ab").with_columns(pl.col("n").cast(pl.String)))
    ids = of(compare(b, as_text), "n").ids
    assert ids is not None
    assert ids.new == 0


def test_the_command_line_reads_features_and_bundles(tmp_path: Path) -> None:
    fitted = line()
    with publish(tmp_path / "before", "features") as staging:
        fitted[0].save(staging)
    with publish(tmp_path / "bundle", "bundle") as staging:
        fitted[-1].save(staging, prefix="features/")
    for after in (tmp_path / "bundle", tmp_path / "bundle" / "features"):
        arguments = ["diff", str(tmp_path / "before"), str(after)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found = compare(fitted[0], fitted[-1])
        assert result.output.splitlines() == diff_text(found).splitlines()
        told = CliRunner().invoke(main, [*arguments, "--json"])
        assert Diff.model_validate_json(told.output) == found
        assert json.loads(told.output)["features"][0]["ids"]["recycled"] == 1
    assert diff_text(found).splitlines() == [
        f"{fitted[0].version} (2026-03-01) -> {fitted[-1].version} (2026-03-06): extended, with rows recycled",
        "feature  kind         change  rows before  rows after  new  retired  recycled  revived  without a row",
        "x        vocabulary   ids               4           5    2        1         1        0              0",
        "h        hash         same              5           5",
        "price    standardise  same",
        "n        quantiles    same              3           3",
        "new in x: e (3 x), f (3 x)",
    ]


def test_what_holds_no_features_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ArtefactError, match="there are no fitted features; give a published folder of features"):
            diff(path, path)
    result = CliRunner().invoke(main, ["diff", str(tmp_path), str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {tmp_path}: there are no fitted features")
