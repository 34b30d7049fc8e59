"""What a run with sparse tables says of them: in the terminal, in MLflow, and on the report's page."""

from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from base.config import parse_config
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.plots import Plot
from pipelines.prepare import prepare
from pipelines.report import report
from pipelines.sparse_page import section
from pipelines.sparse_tables import described, sentence, size_of
from pipelines.train import train
from recsys.bundle import Bundle

# Tables of their own for each label, so that their names are `device@click`.
MODEL = {"name": "multitask", "dim": 8, "shared_embeddings": False, "tower": {"kind": "mlp", "hidden": [8]}}
SPARSITY = {
    "density": 0.5,
    "features": ["item_id", "category", "tags"],
    "schedule": {"interval": 4, "window": 2, "fraction": 0.5, "redistribute": 1.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sparse")
    config = SyntheticConfig(rows_per_day=1500, users=500, items=200)
    for i in range(4):
        day = config.start + timedelta(days=i)
        (folder / f"log/day={day}").mkdir(parents=True)
        day_frame(config, day).drop("day").write_parquet(folder / f"log/day={day}/part.parquet")
    tree = {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": {"click": "click", "cheap": "COALESCE(price, 0) < 4"},
            "time": "day",
            "split": {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03", "test": "2026-03-04"},
        },
        "features": [
            *({"kind": "vocabulary", "column": c} for c in ("device", "category", "item_id")),
            {"kind": "vocabulary", "column": "tags", "multi": True},
        ],
        "model": MODEL,
        "sparsity": SPARSITY,
        "train": {"batch_size": 256, "epochs": 2},
    }
    run = parse_config(Run, tree, source="test")
    prepare(run, say=lambda _: None)
    return run


@pytest.fixture(scope="module")
def said(run: Run) -> list[str]:
    lines: list[str] = []
    train(run, say=lines.append)
    return lines


@pytest.fixture(scope="module")
def bundle(run: Run, said: list[str]) -> Bundle:
    return Bundle.load(run.bundle_path)


def test_training_says_what_the_tables_take(said: list[str], bundle: Bundle) -> None:
    found = described(bundle)
    assert found is not None
    (line,) = [line for line in said if line.startswith("sparse tables")]
    assert line == sentence(found)
    for number in (f"{found.budget:,} of {found.cells:,}", size_of(found.sparse.training), "(50.0%)"):
        assert number in line
    assert f"{found.share_not_sparse:.1%} of all parameters are not sparse" in line


def test_the_bundle_keeps_what_was_found(bundle: Bundle) -> None:
    found = described(bundle)
    assert found is not None
    assert found.budget == found.cells // 2 // 4 * 4  # in units of four
    rows = 2 * 1500 * 2  # two days, two tables of each field
    assert sum(x.lookups for t in found.tables if t.field == "category" for x in t.tenths) == rows
    assert [t.sparse for t in found.tables if t.field == "device"] == [False, False]
    assert {s.field for s in found.strengths()} == {"device", "category", "item_id", "tags"}
    assert all(s.spread is not None for s in found.strengths())


def test_mlflow_has_densities_and_bytes(run: Run, bundle: Bundle) -> None:
    client = MlflowClient(run.tracking_uri)
    (version,) = client.search_model_versions(f"name = '{run.mlflow.model}'")
    logged = client.get_run(str(version.run_id)).data.metrics
    found = described(bundle)
    assert found is not None
    assert logged["sparse.weights"] == found.budget
    assert logged["sparse.bytes_in_training"] == found.sparse.training
    assert logged["spread.item_id"] == pytest.approx({s.field: s.spread for s in found.strengths()}["item_id"])
    steps = client.get_metric_history(str(version.run_id), "density.item_id_click")
    assert [m.step for m in steps] == [1, 2]
    assert [m.value for m in steps] == [e["density.item_id@click"] for e in bundle.metrics["history"]]
    assert "density_tenth.10" in logged


class Open(HTMLParser):
    """Which elements are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_draws_where_the_weights_are(run: Run, bundle: Bundle) -> None:
    evaluate(run)
    page = report(run).read_text()
    found = described(bundle)
    assert found is not None
    drawn: list[Plot] = []
    part = section(bundle, drawn)
    assert "<h2>Sparse tables</h2>" in part
    assert part in page
    assert [p.name for p in drawn] == [
        "sparse-by-popularity",
        "sparse-over-time",
        "sparse-tenths-over-time",
        "sparse-fields",
    ]
    share = f"{found.share_not_sparse:.1%} are not sparse at all"
    for text in (f"{found.budget:,} of {found.cells:,}", share, "kept dense", "item_id@cheap"):
        assert text in part
    for bytes_of in (found.sparse.weights, found.sparse.state, found.dense.checkpoint, found.sparse.bundle):
        assert f">{size_of(bytes_of)}<" in part
    assert (run.report_path / "plots/sparse-fields.svg").is_file()
    parsed = Open()
    parsed.feed(part)
    assert parsed.open == []


def test_without_what_training_found_the_tables_still_speak(bundle: Bundle) -> None:
    drawn: list[Plot] = []
    part = section(replace(bundle, metrics={}), drawn)
    found = described(bundle)
    assert found is not None
    assert f"{found.budget:,} of {found.cells:,}" in part
    assert drawn == []


def test_dense_tables_have_no_section(run: Run, tmp_path: Path) -> None:
    dense = run.model_copy(update={"sparsity": None, "name": "dense"})
    lines: list[str] = []
    train(dense, say=lines.append)
    drawn: list[Plot] = []
    assert section(Bundle.load(dense.bundle_path), drawn) == ""
    assert not drawn
    assert not any("sparse" in line for line in lines)


def test_sizes_are_short() -> None:
    sizes = [0, 999, 12_345, 999_960, 2_500_000, 3_210_000_000, 4_500_000_000_000]
    written = ["0 B", "999 B", "12.3 kB", "1,000.0 kB", "2.5 MB", "3.2 GB", "4,500.0 GB"]
    assert [size_of(s) for s in sizes] == written
