"""The part of a run file that is read without torch: names that are none, and features of one name."""

import re
from typing import Any

import pytest

from base.config import parse_config
from base.errors import ConfigError
from pipelines.settings import FeatureRun

PRICE = {"kind": "log", "column": "price"}


def run_of(*features: dict[str, Any], labels: Any = ("click",), **settings: Any) -> FeatureRun:
    data = {"path": "log.csv", "key": ["id"], "labels": labels, "split": {"train": 0.8, "valid": 0.1, "test": 0.1}}
    tree = {"output": "out", "data": data, "features": features or (PRICE,), "model": {}, **settings}
    return parse_config(FeatureRun, tree, source="run.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "../../x"}, "run.toml: name: '../../x' holds '/', which a name cannot"),
        ({"name": "/x"}, "run.toml: name: '/x' holds '/', which a name cannot"),
        ({"name": ""}, "run.toml: name: '' is empty; give it"),
        ({"name": ".."}, "run.toml: name: '..' begins with a dot"),
        ({"name": "a\0b"}, r"run.toml: name: 'a\x00b' holds '\x00', which a name cannot"),
        ({"name": "ä" * 76}, f"run.toml: name: '{'ä' * 76}' is longer than 150 bytes"),
        ({"labels": {"../x": "click"}}, "run.toml: data.labels.../x: '../x' holds '/'"),
        ({"features": [{**PRICE, "name": "../x"}]}, "run.toml: features: log of price: '../x' holds '/'"),
        ({"features": [{**PRICE, "column": "a/b"}]}, "run.toml: features: log of a/b: 'a/b' holds '/'"),
    ],
)
def test_what_is_no_name_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        run_of(**settings)


@pytest.mark.parametrize("second", [PRICE, {"kind": "hash", "column": "price", "buckets": 5}])
def test_two_features_of_one_name_are_refused(second: dict[str, Any]) -> None:
    message = "features: two of them are called 'price'; leave one out, or give it a name of its own: name = \"…\""
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        run_of(PRICE, second)
    assert [f.output for f in run_of(PRICE, {**second, "name": "second"}).features] == ["price", "second"]


def test_a_column_may_be_called_as_its_log_does() -> None:
    columns = ("geo.country", "type", "p(x) %", "größe")
    run = run_of(*({**PRICE, "column": c} for c in columns), labels=["geo.click", "clicked on", "click"], name="v1.2")
    assert run.pipeline.inputs == tuple(sorted(columns))
    assert run.data.labels == {"geo.click": '"geo.click"', "clicked on": '"clicked on"', "click": "click"}
