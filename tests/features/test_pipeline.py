"""The pipeline: derived columns, checks before anything is computed, what is kept, what is stored."""

import json
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from base.errors import ArtefactError, ConfigError, DataError
from base.storage import publish, resolve
from features.columns import sql
from features.pipeline import FeaturePipeline, FittedPipeline
from features.schema import Dense, Schema, Sparse
from features.transforms import Cross, Hash, Log, Quantiles, Standardise, Vocabulary

LOG = pl.DataFrame(
    {
        "row": [1, 2, 3, 4],
        "user_id": ["a", "b", "a", "c"],
        "price": [1.0, 4.0, None, 16.0],
        "tags": [["x"], ["x", "y"], None, []],
        "shown": [10, 20, 30, 40],
    }
)


def columns(frame: pl.LazyFrame) -> dict[str, list[object]]:
    return frame.collect().to_dict(as_series=False)


# Derived columns


def test_derived_columns_are_sql_over_one_row() -> None:
    pipeline = FeaturePipeline(
        (Vocabulary(column="dear"), Cross(columns=("dear", "user_id"), buckets=9), Standardise(column="unit")),
        {"dear": "price > 3", "unit": "price / shown"},
    )
    assert pipeline.inputs == ("price", "shown", "user_id")
    fitted = pipeline.fit(LOG.lazy())
    assert fitted.kinds == {"dear": "boolean", "user_id": "text", "unit": "float"}
    found = columns(fitted.transform(LOG.lazy()))
    assert found["dear"] == [2, 1, 0, 1]
    assert found["unit"] == pytest.approx([-1.069045, -0.267261, 0.0, 1.336306], abs=1e-5)
    with_it = LOG.with_columns(dear=pl.col("price") > 3)
    by_hand = FeaturePipeline((Cross(columns=("dear", "user_id"), buckets=9),)).fit(with_it.lazy())
    assert found["dear_x_user_id"] == columns(by_hand.transform(with_it.lazy()))["dear_x_user_id"]


def test_a_derived_column_that_no_feature_reads_needs_nothing() -> None:
    """Labels may be derived from columns that rows to score do not have."""
    pipeline = FeaturePipeline((Vocabulary(column="user_id"),), {"liked": "price > 3", "far": "nowhere + 1"})
    assert pipeline.inputs == ("user_id",)
    fitted = pipeline.fit(LOG.lazy())
    assert columns(fitted.transform(LOG.select("user_id").lazy())) == {"user_id": [1, 2, 1, 3]}


@pytest.mark.parametrize(
    "expression",
    [
        "price > 3 AND user_id IS NOT NULL",
        "CASE WHEN shown > 15 THEN 'much' ELSE 'little' END",
        "COALESCE(price, 0) / shown",
        "user_id IN ('a', 'b')",
        "NOT shown IN (10, 20)",
        "CAST(shown AS TEXT) || user_id",
        "ROUND(price, 1)",
    ],
)
def test_row_wise_expressions_are_accepted(expression: str) -> None:
    whole = LOG.select(x=sql(expression, where="derive.x"))
    parts = pl.concat([row.select(x=sql(expression, where="derive.x")) for row in LOG.iter_slices(1)])
    assert_frame_equal(whole, parts)


@pytest.mark.parametrize(
    "expression",
    [
        "AVG(price)",
        "price - AVG(price)",
        "shown / SUM(shown)",
        "CASE WHEN price > MAX(price) THEN 1 ELSE 0 END",
        "shown + COUNT(*)",
        "SUM(shown) OVER (PARTITION BY user_id)",
        "shown - LAG(shown) OVER (ORDER BY row)",
        "ROUND(price - AVG(price), 1)",
        "SUM(shown) OVER (PARTITION BY user_id) IN (1, 2)",
        "1 + 1",
    ],
)
def test_expressions_over_more_or_less_than_a_row_are_refused(expression: str) -> None:
    with pytest.raises(ConfigError, match=r"derive\.x = .*: must be computed from columns of one row") as raised:
        sql(expression, where="derive.x")
    assert expression in str(raised.value)


def test_text_that_is_not_sql_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.where = 'price >': not a SQL expression"):
        sql("price >", where="data.where")


# Checks


def test_a_missing_column_is_named_with_the_nearest() -> None:
    pipeline = FeaturePipeline((Vocabulary(column="user_id"), Standardise(column="cost")), {"cost": "price + 1"})
    fitted = pipeline.fit(LOG.lazy())
    renamed = LOG.rename({"user_id": "userid"}).lazy()
    for use in (pipeline.fit, fitted.transform, fitted.extend):
        with pytest.raises(DataError, match="column 'user_id' is missing; did you mean 'userid'"):
            use(renamed)
        with pytest.raises(DataError, match=r"column 'price' is missing\.? Present: row, user_id, tags, shown"):
            use(LOG.drop("price").lazy())


def test_a_column_of_another_kind_than_when_fitted_is_refused() -> None:
    fitted = FeaturePipeline((Vocabulary(column="shown"), Hash(column="user_id", buckets=5))).fit(LOG.lazy())
    as_text = LOG.with_columns(pl.col("shown").cast(pl.String)).lazy()
    for use in (fitted.transform, fitted.extend):
        with pytest.raises(DataError, match="column 'shown' holds text, but held integer when features were fitted"):
            use(as_text)
        with pytest.raises(DataError, match="column 'user_id' holds integer, but held text"):
            use(LOG.with_columns(user_id=pl.col("row")).lazy())
        with pytest.raises(DataError, match="column 'shown' holds float"):
            use(LOG.with_columns(pl.col("shown").cast(pl.Float64)).lazy())
    narrow = LOG.with_columns(pl.col("shown").cast(pl.UInt8)).lazy()  # still integers
    assert_frame_equal(fitted.transform(narrow).collect(), fitted.transform(LOG.lazy()).collect())


def test_numbers_may_change_their_type() -> None:
    fitted = FeaturePipeline((Standardise(column="shown"), Quantiles(column="shown", name="q", buckets=2))).fit(
        LOG.lazy()
    )
    expected = fitted.transform(LOG.lazy()).collect()
    as_float = LOG.with_columns(pl.col("shown").cast(pl.Float64)).lazy()
    assert_frame_equal(fitted.transform(as_float).collect(), expected)
    # ... unless an id is made of the same column
    mixed = FeaturePipeline((Standardise(column="shown"), Hash(column="shown", name="h", buckets=2))).fit(LOG.lazy())
    with pytest.raises(DataError, match="column 'shown' holds float"):
        mixed.transform(as_float)


def test_partitions_must_agree_on_kinds() -> None:
    pipeline = FeaturePipeline((Vocabulary(column="shown"),))
    with pytest.raises(DataError, match="column 'shown' holds integer in one partition and text in another"):
        pipeline.fit([LOG.lazy(), LOG.with_columns(pl.col("shown").cast(pl.String)).lazy()])


def test_two_features_of_one_name_and_none_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="two of them are called 'price'"):
        FeaturePipeline((Standardise(column="price"), Quantiles(column="price")))
    with pytest.raises(ConfigError, match="two of them are called 'user_id_x_row'"):
        FeaturePipeline(
            (Cross(columns=("user_id", "row"), buckets=2), Hash(column="row", name="user_id_x_row", buckets=2))
        )
    FeaturePipeline((Standardise(column="price"), Quantiles(column="price", name="price_bucket")))
    with pytest.raises(ConfigError, match="there are none"):
        FeaturePipeline(())


# Transforming


def test_a_feature_may_be_called_like_a_column_that_another_reads() -> None:
    pipeline = FeaturePipeline(
        (
            Standardise(column="shown", name="price"),
            Log(column="price", name="shown", standardise=False),
            Standardise(column="row"),
            Quantiles(column="row", name="user_id", buckets=2),
        )
    )
    found = columns(pipeline.fit(LOG.lazy()).transform(LOG.lazy(), keep=["tags"]))
    assert list(found) == ["tags", "price", "shown", "row", "user_id"]
    assert found["price"] == pytest.approx([-1.341641, -0.447214, 0.447214, 1.341641], abs=1e-5)
    assert found["shown"] == pytest.approx([1.0, 1.921812, 0.0, 7.687248], abs=1e-5)
    assert found["user_id"] == [1, 1, 2, 2]


def test_kept_columns_come_first_unchanged() -> None:
    fitted = FeaturePipeline((Vocabulary(column="user_id", name="user"), Standardise(column="price"))).fit(LOG.lazy())
    found = fitted.transform(LOG.lazy(), keep=["tags", "user_id"]).collect()
    assert found.columns == ["tags", "user_id", "user", "price"]
    assert_frame_equal(found.select("tags", "user_id"), LOG.select("tags", "user_id"))
    assert fitted.transform(LOG.lazy()).collect().columns == ["user", "price"]


def test_columns_that_cannot_be_kept_are_refused() -> None:
    fitted = FeaturePipeline((Vocabulary(column="user_id"),)).fit(LOG.lazy())
    with pytest.raises(ConfigError, match="'user_id' is also a column to keep; give the feature another name"):
        fitted.transform(LOG.lazy(), keep=["row", "user_id"])
    with pytest.raises(DataError, match="column 'rows' is missing; did you mean 'row'"):
        fitted.transform(LOG.lazy(), keep=["rows"])


def test_the_schema_is_what_models_see() -> None:
    pipeline = FeaturePipeline(
        (
            Standardise(column="price"),
            Vocabulary(column="tags", multi=True),
            Log(column="shown"),
            Hash(column="user_id", buckets=7),
        )
    )
    schema = pipeline.fit(LOG.lazy()).schema(["row"], ["click"])
    assert schema == Schema(
        keys=("row",),
        dense=(Dense(name="price"), Dense(name="shown")),
        sparse=(Sparse(name="tags", rows=3, multi=True), Sparse(name="user_id", rows=8)),
        labels=("click",),
    )
    assert schema.fields == ("tags", "user_id", "price", "shown")
    assert (schema.funnel, schema.negative_rate) == ((), 1.0)
    fitted = pipeline.fit(LOG.lazy())
    funnel = fitted.schema(["row"], ["click", "buy"], funnel=["click", "buy"], negative_rate=0.1)
    assert (funnel.labels, funnel.funnel, funnel.negative_rate) == (("click", "buy"), ("click", "buy"), 0.1)
    assert Schema.model_validate_json(funnel.model_dump_json()) == funnel
    for rate in (0.0, -0.1, 1.1):
        with pytest.raises(ValidationError, match="negative_rate"):
            fitted.schema(["row"], ["click"], negative_rate=rate)


# Storing


def saved(fitted: FittedPipeline, folder: Path) -> Path:
    with publish(folder / "features", "features", overwrite=True) as staging:
        fitted.save(staging)
    return resolve(folder / "features", "features")


def a_pipeline() -> FeaturePipeline:
    return FeaturePipeline(
        (Vocabulary(column="user_id"), Hash(column="row", buckets=5), Log(column="unit")), {"unit": "price / shown"}
    )


def test_a_stored_pipeline_keeps_everything(tmp_path: Path) -> None:
    fitted = a_pipeline().fit(LOG.lazy()).extend(LOG.with_columns(user_id=pl.lit("new")).lazy())
    loaded = FittedPipeline.load(saved(fitted, tmp_path))
    assert loaded.recipe == a_pipeline()
    assert (loaded.version, loaded.lineage, loaded.accepts) == (fitted.version, fitted.lineage, fitted.accepts)
    assert len(loaded.lineage) == 1
    assert_frame_equal(loaded.transform(LOG.lazy()).collect(), fitted.transform(LOG.lazy()).collect())
    again = LOG.with_columns(user_id=pl.lit("newer"))
    assert loaded.extend(again.lazy()).version == fitted.extend(again.lazy()).version


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = saved(a_pipeline().fit(LOG.lazy()), tmp_path / "a")
    second = saved(a_pipeline().fit(LOG[::-1].lazy()), tmp_path / "b")
    assert first.name == second.name  # the name is the hash of the content


def test_versions_depend_on_what_is_derived() -> None:
    fitted = a_pipeline().fit(LOG.lazy())
    other = FeaturePipeline(a_pipeline().transforms, {"unit": "price / (shown + 0)"}).fit(LOG.lazy())
    assert fitted.version != other.version


@pytest.mark.parametrize("damage", ["not json", "kind", "field", "count", "gone"])
def test_a_damaged_recipe_is_refused(damage: str, tmp_path: Path) -> None:
    folder = saved(a_pipeline().fit(LOG.lazy()), tmp_path)
    path = folder / "recipe.json"
    recipe = json.loads(path.read_text())
    if damage == "kind":
        recipe["transforms"][0]["kind"] = "vocabularies"
    if damage == "field":
        del recipe["derive"]
    if damage == "count":
        recipe["transforms"][0]["min_count"] = 2
    path.write_text("{" if damage == "not json" else json.dumps(recipe))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ArtefactError) as raised:
        FittedPipeline.load(folder)
    assert str(folder) in str(raised.value)
    assert ("restore or fit again" if damage == "count" else "fit the features again") in str(raised.value)


# Parts of a pipeline


def test_a_part_makes_its_features_from_its_own_columns() -> None:
    pipeline = FeaturePipeline(
        (Vocabulary(column="user_id"), Vocabulary(column="tags", multi=True), Standardise(column="twice")),
        {"twice": "price * 2"},
    )
    fitted = pipeline.fit(LOG.lazy())
    part = fitted.only(["twice", "tags"])
    assert part.recipe.inputs == ("price", "tags")
    found = part.transform(LOG.select("price", "tags", "row").lazy(), keep=["row"]).collect()
    assert_frame_equal(found, fitted.transform(LOG.lazy(), keep=["row"]).collect().drop("user_id"))


def test_counts_by_id_are_those_of_the_rows() -> None:
    fitted = FeaturePipeline((Vocabulary(column="tags", multi=True), Vocabulary(column="user_id", min_count=2)))
    assert fitted.fit(LOG.lazy()).counts_of("tags").tolist() == [0, 2, 1]
    assert fitted.fit(LOG.lazy()).counts_of("user_id").tolist() == [2, 2]  # b and c have no id of their own
