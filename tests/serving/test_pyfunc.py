"""The registered model on what pandas, and a server's JSON, make of a row: the same numbers as batch scoring."""

import json
from collections.abc import Callable
from datetime import date, datetime
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import infer_and_parse_data

import serving.pyfunc as served
from base.storage import resolve
from features.pipeline import FeaturePipeline
from features.transforms import Hash, Log, Standardise, Vocabulary
from recsys.bundle import Bundle, golden_rows
from recsys.models import build_model
from recsys.models.lr import LRConfig
from recsys.registry import signature_of
from serving.score import score

LOG = pl.DataFrame(
    {
        "user": [5, 19, 5, 7],
        "big": pl.Series([2**63 + 5, 1, 2, 3], dtype=pl.UInt64),
        "site": ["a", "b", "a", "c"],
        "tags": [[1, 2], [2], [3], [1]],
        "words": [["x"], ["y", "x"], ["y"], ["z"]],
        "price": [1.5, 2.5, 0.5, 9.0],
        "count": [1, 2, 3, 40],
        "member": [True, False, True, True],
        "day": [date(2026, 3, n) for n in (1, 2, 3, 4)],
        "at": [datetime(2026, 3, 1, h) for h in (1, 5, 9, 20)],
        "age": [20, 31, 42, 53],
    }
)
ROWS = json.loads(LOG.with_columns(pl.col("day", "at").cast(pl.String)).write_json())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model to which every column matters, given or missing."""
    ids = (Hash(column=c, buckets=50) for c in ("big", "member", "day"))
    words = (Vocabulary(column=c, multi=True) for c in ("tags", "words"))
    derived = (Vocabulary(column="hour"), Vocabulary(column="decade"))
    numbers = (Standardise(column="price"), Log(column="count"))
    derive = {"hour": "extract(hour from at)", "decade": "age // 10"}
    known = (Vocabulary(column="user"), Vocabulary(column="site"))
    fitted = FeaturePipeline((*known, *ids, *words, *derived, *numbers), derive).fit(LOG.lazy())
    schema = fitted.schema((), ("click",))
    model = build_model(LRConfig(), schema)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    plain = Bundle(model.eval(), LRConfig(), fitted, schema, settings={}, metrics={}, golden=LOG.clear())
    target = tmp_path_factory.mktemp("bundle") / "bundle"
    return Bundle(model, LRConfig(), fitted, schema, {}, {}, golden_rows(plain, LOG)).save(target)


@pytest.fixture(scope="module")
def model(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> mlflow.pyfunc.PyFuncModel:
    """As MLflow loads it, with the signature that it is registered with."""
    folder = tmp_path_factory.mktemp("model")
    bundle.save(folder / "bundle")
    stored = resolve(folder / "bundle")
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=served.__file__,
        artifacts={"bundle": str(stored)},
        signature=signature_of(bundle),
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(folder / "model"))


def expected(bundle: Bundle, rows: list[dict[str, Any]]) -> list[float]:
    """What batch scoring says of the rows."""
    table = pl.DataFrame(rows, schema={c: pl.String if t.is_temporal() else t for c, t in LOG.schema.items()})
    typed = table.with_columns(pl.col("day").str.to_date(), pl.col("at").str.to_datetime(time_unit="us"))
    return pl.concat(score(bundle, typed.lazy(), carry=["site"]))["p_click"].to_list()


def of_records(rows: list[dict[str, Any]], model: mlflow.pyfunc.PyFuncModel) -> pd.DataFrame:
    return pd.DataFrame(rows)


def of_json(rows: list[dict[str, Any]], model: mlflow.pyfunc.PyFuncModel) -> pd.DataFrame:
    """As `mlflow models serve` reads a body."""
    found = infer_and_parse_data(json.loads(json.dumps({"dataframe_records": rows})), model.metadata.get_input_schema())
    assert isinstance(found, pd.DataFrame)
    return found


@pytest.mark.parametrize("parse", [of_records, of_json])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("column", LOG.columns)
def test_a_missing_value_is_what_it_is_in_batch(
    column: str, rows: int, parse: Callable[..., pd.DataFrame], bundle: Bundle, model: mlflow.pyfunc.PyFuncModel
) -> None:
    """Alone, a value is an object; beside others, an integer becomes a float."""
    given = [{**ROWS[0], column: None}, *ROWS[1:]][:rows]
    found = model.predict(parse(given, model))
    assert found["p_click"].to_list() == expected(bundle, given)
    assert found["p_click"][0] != expected(bundle, ROWS[:1])[0]


@pytest.mark.parametrize("parse", [of_records, of_json])
def test_rows_without_anything_and_empty_lists(
    parse: Callable[..., pd.DataFrame], bundle: Bundle, model: mlflow.pyfunc.PyFuncModel
) -> None:
    nothing: dict[str, Any] = dict.fromkeys(LOG.columns)
    empty = {**ROWS[1], "tags": [], "words": []}
    gaps = {**ROWS[2], "tags": [3, None], "words": [None]}
    for given in ([nothing], [nothing, nothing], [empty], [empty, nothing], [gaps], [*ROWS[1:], empty, gaps, nothing]):
        assert model.predict(parse(given, model))["p_click"].to_list() == expected(bundle, given)


def test_integers_beyond_2_to_the_63_beside_a_missing_one(bundle: Bundle, model: mlflow.pyfunc.PyFuncModel) -> None:
    """As floats they may be others, and are refused."""
    given = [ROWS[0], {**ROWS[1], "big": None}]
    frame = pd.DataFrame(given)
    with pytest.raises(MlflowException, match=r"'big' holds 9\.22.* ids must not pass through float"):
        model.predict(frame)
    frame["big"] = pd.array([2**63 + 5, None], dtype="UInt64")
    assert model.predict(frame)["p_click"].to_list() == expected(bundle, given)


def test_frames_of_pandas_own_types(bundle: Bundle, model: mlflow.pyfunc.PyFuncModel) -> None:
    frame = LOG.to_pandas().convert_dtypes()
    frame["user"] = pd.array([5, None, 5, 7], dtype="Int64")
    frame["site"] = frame["site"].astype("category").astype(object)
    frame["tags"] = [np.array([1.0, 2.0]), np.array([2.0, np.nan]), None, [1]]
    given = [{**row} for row in ROWS]
    given[1] |= {"user": None, "tags": [2, None]}
    given[2] |= {"tags": None}
    assert model.predict(frame)["p_click"].to_list() == expected(bundle, given)


def test_the_index_is_kept_and_no_rows_give_no_rows(model: mlflow.pyfunc.PyFuncModel) -> None:
    frame = LOG.to_pandas()
    frame.index = pd.Index(["w", "x", "y", "z"], name="row")
    whole, none = model.predict(frame), model.predict(frame.head(0))
    assert whole.index.equals(frame.index)
    assert (none.columns.tolist(), len(none), none.index.name) == (["p_click"], 0, "row")
    assert none.dtypes.equals(whole.dtypes)
    split = {"dataframe_split": {"columns": LOG.columns, "data": []}}
    parsed = infer_and_parse_data(split, model.metadata.get_input_schema())
    assert model.predict(parsed).columns.tolist() == ["p_click"]
    for parse in (of_records, of_json):  # nothing says which columns there would be
        assert model.predict(parse([], model)).columns.tolist() == ["p_click"]
    with pytest.raises(MlflowException, match="column 'user' is missing"):
        model.predict(frame.drop(columns="user"))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("user", "5348", "column 'user' holds '5348' where the model takes integer: send integer, and null"),
        ("user", 5.5, "column 'user' holds 5.5 where the model takes integer: send integer"),
        ("user", float("inf"), "column 'user' holds inf where the model takes integer: send integer"),
        ("user", 2.0**53, "column 'user' holds 9007199254740992.0 where the model takes integer: send integer"),
        ("age", "x", "column 'age' holds 'x' where the model takes integer"),
        ("price", "1.5", "column 'price' holds '1.5' where the model takes float: send float, and null"),
        ("tags", [1, 2.5], "column 'tags' holds [1, 2.5] where the model takes integers: send integers"),
        ("tags", ["a"], "column 'tags' holds ['a'] where the model takes integers"),
        ("tags", 3, "column 'tags' holds 3 where the model takes integers"),
        ("words", [1], "column 'words' holds [1] where the model takes texts: send texts, and null"),
        ("member", "yes", "column 'member' holds 'yes' where the model takes boolean"),
        ("day", "2026-03-01 10:00", "column 'day' holds '2026-03-01 10:00' where the model takes date"),
        ("at", "noon", "column 'at' holds 'noon' where the model takes Datetime"),
    ],
)
def test_what_the_log_could_not_hold_is_refused_by_name_and_value(
    column: str, value: Any, message: str, model: mlflow.pyfunc.PyFuncModel
) -> None:
    for rows in ([{**ROWS[0], column: value}], [ROWS[0], {**ROWS[1], column: value}, {**ROWS[2], column: None}]):
        with pytest.raises(MlflowException) as caught:
            model.predict(of_records(rows, model))
        assert caught.value.message.startswith(message)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
