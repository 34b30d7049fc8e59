"""The report page: what it says, that it stands alone, and that nothing in it is taken for markup."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import date, timedelta
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow.tracking import MlflowClient

from base.config import parse_config
from base.errors import ArtefactError, ConfigError
from base.storage import resolve
from features.readers.synthetic import SyntheticConfig, day_frame
from features.schema import Output
from pipelines import plots
from pipelines.config import Evaluation, Run
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.report import _cells, _relation, _residual, _settings, report
from pipelines.train import train
from recsys.bundle import Bundle

NASTY = "<b>&$x$_日本"
FEATURES = (
    *({"kind": "vocabulary", "column": c} for c in ("device", "category", "country", "placement")),
    {"kind": "vocabulary", "column": "tags", "multi": True},
    {"kind": "hash", "column": "item_id", "buckets": 50},
    {"kind": "log", "column": "price"},
)
AUTOINT = {"name": "autoint", "dim": 4, "layers": 2, "heads": 2, "attention_dim": 4}


def run_of(folder: Path, model: dict[str, object], **evaluate: object) -> Run:
    measured = {"slices": ["device"], "pairs": [["device", "hour"]], **evaluate}
    tree = {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": {"click": "click", "cheap": "COALESCE(price, 0) < 4"},
            "time": "day",
            "split": {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03", "test": "2026-03-04"},
        },
        "features": FEATURES,
        "model": model,
        "train": {"batch_size": 256, "epochs": 1},
        "evaluate": measured,
    }
    return parse_config(Run, tree, source="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    config = SyntheticConfig(rows_per_day=1500, users=500, items=200)
    for i in range(4):
        day = config.start + timedelta(days=i)
        frame = day_frame(config, day).drop("day")
        frame = frame.with_columns(pl.col("device").replace({"tv": NASTY, "watch": None}))
        (folder / f"log/day={day}").mkdir(parents=True)
        frame.write_parquet(folder / f"log/day={day}/part.parquet")
    prepare(run_of(folder, AUTOINT), say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """AutoInt, with the truth of one of its two labels, its report written."""
    run = run_of(folder, AUTOINT, truth={"p_click": "click_probability"}, user="user_id")
    train(run, say=lambda _: None)
    evaluate(run)
    report(run)
    return run


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return (run.report_path / "index.html").read_text()


class Page(HTMLParser):
    """Which elements are open, and every id and reference."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif found := re.search(r"#([^)\"]+)", str(value)) if name in ("href", "clip-path") else None:
                self.references.add(found[1])


def test_says_what_was_measured(page: str, run: Run) -> None:
    for feature in run.features:
        assert f"<td>{feature.output}</td>" in page
        assert page.count(f">{feature.output}</text>") >= 2 * 3  # both axes of the attention, whole and by layer
    for output in ("p_click", "p_cheap"):
        assert f"Quality of {output}" in page
        assert f"{output} by device" in page
    for value in ("phone", "desktop", "tablet", "(missing)", "1,500 held-out rows", "ctr version 1"):
        assert value in page
    assert resolve(run.bundle_path).name.partition("@")[2] in page
    assert page.count("known truth</th>") == 1  # of click, not of cheap
    assert page.count("planted truth beside what was learned, p_click") == 1
    assert page.count("observed beside what was predicted, p_cheap") == 1
    assert "not what causes" in page


def test_stands_alone(page: str) -> None:
    for outside in ("http", "src=", "<script", "<link", "@import", "url(//"):
        assert outside not in page
    assert set(re.findall(r'href="(#|data:|.)', page)) <= {"#", "data:"}
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_is_well_formed(page: str) -> None:
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.references <= set(parsed.ids)


def test_values_are_escaped(page: str, run: Run) -> None:
    assert escape(NASTY) in page
    assert "<b>&" not in page
    for svg in (run.report_path / "plots").iterdir():
        texts = [e.text for e in ElementTree.parse(svg).iter() if e.tag.endswith("text")]
        assert (NASTY in texts) == ("device" in svg.name and "scatter" not in svg.name), svg.name


def test_no_password_of_an_old_bundle_is_drawn() -> None:
    found = _settings(
        {"mlflow": {"uri": "http://u:S3cret@h:5000/x", "model": "ctr"}, "path": "postgresql://h/x?password=S3cret"}
    )
    assert "S3cret" not in found
    assert '"uri": "http://…@h:5000/x"' in found


def test_same_run_same_bytes(run: Run) -> None:
    before = resolve(run.report_path)
    assert resolve(report(run).parent) == before  # a version's name is the hash of its content


def test_is_logged(run: Run) -> None:
    client = MlflowClient(run.tracking_uri)
    (version,) = client.search_model_versions(f"name = '{run.mlflow.model}'")
    logged = [a.path for f in ("report", "plots") for a in client.list_artifacts(str(version.run_id), f)]
    assert {"report/index.html", "plots/attention.svg", "plots/p_click-roc.svg"} <= set(logged)


def test_asks_for_an_evaluation_that_fits(folder: Path, run: Run) -> None:
    with pytest.raises(ArtefactError, match="run `recsys evaluate` first"):
        report(run.model_copy(update={"name": "another"}))
    with pytest.raises(ArtefactError, match=r"without 'country'.* run `recsys evaluate` again"):
        report(run.model_copy(update={"evaluate": Evaluation(slices=("country",))}))
    with pytest.raises(ConfigError, match="name two columns"):
        report(run.model_copy(update={"evaluate": Evaluation(pairs=(("device", "device"),))}))


def test_without_attention_truth_user_slices_and_pairs(folder: Path) -> None:
    run = run_of(folder, {"name": "lr"}, slices=[], pairs=[])
    train(run, say=lambda _: None)
    evaluate(run)
    page = report(run).read_text()
    assert "Quality of p_click" in page
    for absent in ("attend", "truth</th>", "Where it is good", "user AUC", "×"):
        assert absent not in page
    replace(Bundle.load(run.bundle_path), metrics={}).save(run.bundle_path, overwrite=True)
    with pytest.raises(ArtefactError, match="is of bundle"):
        report(run)


def test_residual_leaves_only_the_interaction() -> None:
    random = np.random.default_rng(0)
    weight = random.integers(0, 50, (6, 4)).astype(np.float64)
    additive = random.normal(size=(6, 1)) + random.normal(size=(1, 4))
    assert np.nanmax(np.abs(_residual(additive, weight))) < 1e-9
    joint = random.normal(size=(6, 4))
    left = _residual(additive + joint, weight)
    assert np.array_equal(np.isnan(left), weight == 0)
    kept = np.nan_to_num(left) * weight
    np.testing.assert_allclose([*kept.sum(axis=0), *kept.sum(axis=1)], 0, atol=1e-9)
    assert _relation(left, 0.5 * left, weight) == pytest.approx((1.0, 0.5))
    assert np.isnan(_relation(left, 0 * left, weight)[0])


def test_cells_are_those_of_the_most_frequent_values() -> None:
    common = pl.DataFrame({"a": [None, "x", "x", "x"] * 3, "b": [7, 7, 5, 5] * 3})
    rare = pl.DataFrame({"a": [f"r{i}" for i in range(20)], "b": 5}, schema_overrides={"b": pl.Int64})
    scored = pl.concat([common, rare]).with_columns(click=pl.int_range(32) % 2, p=pl.lit(0.5), true=pl.lit(0.2))
    cells, shown = _cells(scored, ("a", "b"), Output(name="p", label="click"), "true")
    head = cells.head(3).select("a", "b", "rows", "known rate", "model rate").rows()
    assert [row[:3] for row in head] == [("x", "5", 6), ("x", "7", 3), ("(missing)", "7", 3)]
    assert [row[3:] for row in head] == [pytest.approx((0.2, 0.5))] * 3
    assert cells.height == 13
    assert shown == pytest.approx(22 / 32)
    assert cells["known"].to_list() == pytest.approx([np.log(0.2 / 0.8)] * 13)
    assert cells["model"].to_list() == pytest.approx([0.0] * 13)
    of_labels = _cells(scored, ("a", "b"), Output(name="p", label="click"), None)[0]
    assert of_labels.row(0, named=True)["known"] == pytest.approx(np.log((3 + 0.5) / (3 + 0.5)))


def test_labels_are_short_and_printable() -> None:
    assert plots.short("a\x00b\nc") == "a�b�c"
    assert plots.short("x" * 40) == "x" * 17 + "…"


def test_a_large_map_stays_a_small_file() -> None:
    names = [f"field_{i}" for i in range(60)]
    matrix = np.random.default_rng(0).random((60, 60))
    plot = plots.heat("map", "A map", matrix, ("", names), ("", names), span=(0, 1), quantity="share")
    assert len(plot.inline) < 200_000  # 600,000 as paths
    assert "http" not in plot.inline
    assert date.today().isoformat() not in plot.svg
