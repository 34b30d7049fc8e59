"""index and recommend, from run files: against all scores by brute force, in one stage and two, and bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from base.config import load_config
from base.errors import ArtefactError, ConfigError, DataError, PublishedError
from base.storage import read_manifest, resolve, version_name
from pipelines.cli import main
from pipelines.config import Run
from pipelines.index import index
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.recommend import recommend
from pipelines.tracking import registry_of
from pipelines.train import train
from recsys.bundle import Bundle
from tests.pipelines import test_retrieval
from tests.pipelines.test_retrieval import ITEMS, USERS, corpus, quiet

ROOT = Path(__file__).parents[2]
EAGER, NEW, K = USERS, 1000, 7
"""A user who has seen all items but five, one who stands in test rows alone, and how many items are asked for."""
LEFT = 5

RANKING = """
output = "{folder}/ranking"
derive = {{ cheap = "price < 20" }}
tables = [{{ path = "{folder}/items.parquet", on = "item" }}]
features = [
    {{ kind = "vocabulary", column = "group" }},
    {{ kind = "vocabulary", column = "hour" }},
    {{ kind = "vocabulary", column = "item" }},
    {{ kind = "vocabulary", column = "cheap" }},
    {{ kind = "vocabulary", column = "genres", multi = true }},
]

[data]
path = "{folder}/log.parquet"
key = ["user", "item"]
labels = {{ click = "price > 30 OR hour < 4" }}
where = "price IS NOT NULL"
split = {{ train = 0.8, valid = 0.2 }}

[model]
name = "fm"
dim = 4

[train]
epochs = 3
batch_size = 64
table_learning_rate = 0.3
threads = 1

[mlflow]
uri = "sqlite:///{folder}/mlflow.db"
model = "clicks"
"""


def log() -> pl.DataFrame:
    """With an hour of each row; the last rows are of the eager user, of a new one, and of nobody."""
    rows = test_retrieval.log()
    eager = [{"user": EAGER, "item": f"i{i:02}", "part": "log"} for i in range(ITEMS - LEFT)]
    others = [(EAGER, "i56"), (NEW, "i00"), (None, "i01")]
    more = [{"user": user, "item": item, "part": "new"} for user, item in others]
    added = pl.DataFrame([*eager, *more]).with_columns(group=pl.lit("k9"), liked=pl.lit(1))
    whole = pl.concat([rows, added.select(rows.columns)])
    return whole.with_row_index().with_columns(hour=pl.col("index").cast(pl.Int64) * 7 % 24).drop("index")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recommend")
    log().write_parquet(folder / "log.parquet")
    corpus().write_parquet(folder / "items.parquet")
    (folder / "ranking.toml").write_text(RANKING.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    run = test_retrieval.run_of(folder, recommend={"k": K})
    prepare(run, say=quiet)
    train(run, say=quiet)
    return run


@pytest.fixture(scope="module")
def ranking(folder: Path) -> Bundle:
    """The champion that puts candidates in order."""
    run = load_config(Run, folder / "ranking.toml")
    prepare(run, say=quiet)
    train(run, say=quiet)
    registry = registry_of(run)
    registry.promote(registry.find("challenger"))
    return Bundle.load(run.bundle_path)


def elsewhere(run: Run, name: str, **changes: Any) -> Run:
    """The run under another name, so that its index is its own; its model is the bundle of `run`."""
    tree = {**run.model_dump(mode="json"), "name": name, "output": str(run.output.parent / name), **changes}
    tree["mlflow"]["model"] = name
    return Run.model_validate(tree)


def recommended(run: Run, model: str, **options: Any) -> tuple[pl.DataFrame, dict[str, Any], list[str]]:
    """The table, its manifest's facts, and what was said."""
    said: list[str] = []
    index(run, model=model, if_missing=True, say=said.append)
    (target,) = recommend(run, model=model, say=said.append, **options)
    return pl.read_parquet(target / "part-*.parquet"), read_manifest(resolve(target)).about, said


def oracle(bundle: Bundle, k: int, seen_parts: Sequence[str] = ("log",)) -> pl.DataFrame:
    """The first `k` unseen items of each test user, by the similarity that the bundle gives every pair of them."""
    first = log().filter(pl.col("part") == "new", pl.col("user").is_not_null()).unique("user", keep="first")
    pairs = first.drop("item", "part", "liked").join(corpus(), how="cross")
    similarity = pl.concat(bundle.predict(pairs.lazy()))["similarity"]
    seen = log().filter(pl.col("part").is_in(seen_parts)).select("user", "item")
    unseen = pairs.with_columns(similarity).join(seen, on=["user", "item"], how="anti")
    order = unseen.sort("user", "similarity", "item", descending=[False, True, False])
    return order.group_by("user", maintain_order=True).head(k)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_it_is_what_all_scores_say(trained: Run, kind: str) -> None:
    run = elsewhere(trained, f"all-{kind}", index={"kind": kind, "min_recall": 1})
    table, about, said = recommended(run, str(trained.bundle_path))
    expected = oracle(Bundle.load(trained.bundle_path), K)
    assert table.columns == ["user", "place", "item", "similarity", "model_version"]
    assert table["user"].to_list() == expected["user"].to_list()
    np.testing.assert_allclose(table["similarity"], expected["similarity"], atol=1e-6)
    assert table["item"].to_list() == expected["item"].to_list()
    for _, rows in table.group_by("user"):
        assert rows["place"].to_list() == list(range(1, rows.height + 1))
    users = log().filter(part="new")["user"].drop_nulls().n_unique()
    assert table["user"].n_unique() == users == about["users"]
    assert table.filter(user=EAGER).height == LEFT
    assert table.filter(user=NEW).height == K  # nobody knows them: everything is unknown
    assert (about["fewer_than_k"], about["without_any"], about["rows_without_user"]) == (1, 0, 1)
    assert about["rows"] == table.height == users * K - (K - LEFT)
    assert (about["index"]["kind"], about["index"]["recall"], about["seen_in"]) == (
        kind,
        1.0,
        ["split=train", "split=valid"],
    )
    assert f"split=test: {users} users, 7 of 60 items each by version bundle-{about['bundle']}; 1 got fewer" in said[-1]
    assert f"{kind}, 60 items, recall@7 1.0000 of exact search on" in said[0]


def test_two_stages_order_candidates_as_the_ranking_scores_the_pairs(
    folder: Path, trained: Run, ranking: Bundle
) -> None:
    second = {"config": str(folder / "ranking.toml"), "by": "p_click"}
    run = elsewhere(trained, "two-stages", recommend={"k": K, "candidates": 20, "ranking": second})
    table, about, said = recommended(run, str(trained.bundle_path))
    assert table.columns == ["user", "place", "item", "similarity", "p_click", "model_version", "ranking_model_version"]
    candidates = oracle(Bundle.load(trained.bundle_path), 20)
    scores = pl.concat(ranking.predict(candidates.lazy()))["p_click"]
    order = candidates.with_columns(scores).sort("user", "p_click", descending=[False, True], maintain_order=True)
    expected = order.group_by("user", maintain_order=True).head(K)
    assert expected["p_click"].n_unique() > 50
    np.testing.assert_allclose(table["p_click"], expected["p_click"], atol=1e-6)
    paired = table.join(candidates.with_columns(scores.alias("expected")), on=["user", "item"], validate="1:1")
    assert paired.height == table.height
    np.testing.assert_allclose(paired["p_click"], paired["expected"], atol=1e-6)
    np.testing.assert_allclose(paired["similarity"], paired["similarity_right"], atol=1e-6)
    assert table["ranking_model_version"].unique().to_list() == ["1"]
    assert table["model_version"].unique().to_list() == [f"bundle-{about['bundle']}"]
    assert about["depth"] == 20
    assert about["ranking"] == {
        "bundle": ranking.version,
        "model_version": "1",
        "by": "p_click",
        "from_items": ["genres", "item", "price"],
        "from_users": ["group", "hour"],
    }
    assert "ordered by p_click of version 1" in said[-1]


def test_of_a_small_corpus_all_items_are_candidates(folder: Path, trained: Run, ranking: Bundle) -> None:
    """10 × 7 are more than the 60 there are; and who has seen all but five still gets these."""
    run = elsewhere(trained, "small", recommend={"k": K, "ranking": {"config": str(folder / "ranking.toml")}})
    table, about, _ = recommended(run, str(trained.bundle_path))
    assert about["depth"] == ITEMS
    assert table.filter(user=EAGER)["item"].sort().to_list() == [f"i{i}" for i in range(ITEMS - LEFT, ITEMS)]
    best = oracle(Bundle.load(trained.bundle_path), ITEMS)
    scores = best.with_columns(pl.concat(ranking.predict(best.lazy()))["p_click"])
    top = scores.group_by("user").agg(pl.col("p_click").max()).sort("user")
    np.testing.assert_allclose(table.filter(place=1)["p_click"], top["p_click"], atol=1e-6)


def test_cut_into_other_chunks_it_is_the_same(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = elsewhere(trained, "chunks")
    whole, _, _ = recommended(run, str(trained.bundle_path))
    monkeypatch.setattr("serving.recommend.CHUNK", 4 * K)
    done: list[int] = []
    cut, _, _ = recommended(run, str(trained.bundle_path), overwrite=True, on_users=lambda n, _: done.append(n))
    assert done == [*range(0, 47, 4), 47]
    assert len(list(resolve(run.recommendations_path("split=test")).glob("part-*"))) == 12
    assert cut.drop("similarity").equals(whole.drop("similarity"))
    np.testing.assert_allclose(cut["similarity"], whole["similarity"], atol=1e-6)


@pytest.mark.slow
def test_a_fresh_process_publishes_the_same_bytes(trained: Run, tmp_path: Path) -> None:
    run = elsewhere(trained, "fresh", index={"kind": "hnsw"})
    recommended(run, str(trained.bundle_path))
    (tmp_path / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    code = (
        "import json, sys; from pathlib import Path; from pipelines.config import Run; "
        "from pipelines.recommend import recommend; tree = json.loads(Path(sys.argv[1]).read_text()); "
        "recommend(Run.model_validate(tree), model=sys.argv[2], overwrite=True)"
    )
    before = version_name(resolve(run.recommendations_path("split=test")))
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run.json"), str(trained.bundle_path)]
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert version_name(resolve(run.recommendations_path("split=test"))) == before


def test_what_is_there_is_refused_skipped_or_replaced(trained: Run) -> None:
    run, model = elsewhere(trained, "there"), str(trained.bundle_path)
    recommended(run, model)
    made = resolve(run.index_path)
    for step in (index, recommend):
        with pytest.raises(PublishedError, match="already published"):
            step(run, model=model, say=quiet)
    said: list[str] = []
    index(run, model=model, if_missing=True, say=said.append)
    assert recommend(run, model=model, if_missing=True, say=said.append) == []
    bundle = Bundle.load(trained.bundle_path)
    assert said == [f"index of version bundle-{bundle.version}: there already", "split=test: recommended already"]
    assert resolve(run.index_path) == made
    index(elsewhere(trained, "there", index={"kind": "hnsw"}), model=model, if_missing=True, say=quiet)
    assert read_manifest(resolve(run.index_path)).about["kind"] == "hnsw"  # it was of other settings
    recommend(run, model=model, overwrite=True, say=quiet)
    assert read_manifest(resolve(run.recommendations_path("split=test"))).about["index"]["kind"] == "hnsw"


def test_an_index_of_another_bundle_is_refused_and_replaced(trained: Run) -> None:
    other = elsewhere(trained, "other", train={**trained.train.model_dump(), "seed": 5, "epochs": 1})
    prepare(other, say=quiet)
    train(other, say=quiet)
    index(other, model=str(trained.bundle_path), say=quiet)
    old, new = Bundle.load(trained.bundle_path).version, Bundle.load(other.bundle_path).version
    with pytest.raises(ArtefactError, match=f"is the index of bundle {old}, the model is bundle {new}; build its own"):
        recommend(other, model=str(other.bundle_path), say=quiet)
    index(other, model=str(other.bundle_path), if_missing=True, say=quiet)
    assert recommend(other, model=str(other.bundle_path), say=quiet) == [other.recommendations_path("split=test")]


def test_an_approximate_index_says_how_deep_it_was_measured(trained: Run) -> None:
    model = str(trained.bundle_path)
    index(elsewhere(trained, "deep", index={"kind": "hnsw"}), model=model, say=quiet)
    with pytest.raises(
        ArtefactError, match=r"measured for the first 7 items, \[recommend\] asks for 9; build it again"
    ):
        recommend(elsewhere(trained, "deep", recommend={"k": 9}), model=model, say=quiet)


def test_by_the_command_line_through_mlflow(folder: Path, trained: Run) -> None:
    config = folder / "run.toml"
    config.write_text(TWO_TOWER_RUN.format(folder=folder))
    called = [
        CliRunner().invoke(main, [*arguments, "--config", str(config), "--model", "challenger"])
        for arguments in (["index"], ["recommend", "--partition", "split=test"], ["index", "--if-missing"])
    ]
    assert [c.exit_code for c in called] == [0, 0, 0], [c.output for c in called]
    assert "index of version 1: exact, 60 items, recall@3 1.0000" in called[0].output
    told = "split=test: 47 users, 3 of 60 items each by version 1; rows without a user, left out: 1; in "
    assert told in called[1].output
    assert "users/s" not in called[1].stdout  # the ticker says it
    assert "recommend: 47/47 users" in called[1].stderr
    assert "index of version 1: there already" in called[2].output
    table = pl.read_parquet(trained.output / "recommendations/split=test/part-*.parquet")
    assert table["model_version"].unique().to_list() == ["1"]
    both = CliRunner().invoke(main, ["recommend", "--config", str(config), "--overwrite", "--if-missing"])
    assert both.exit_code == 2
    assert "contradict each other" in both.output


def test_the_tickers_clock_starts_with_the_first_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 60.0, 62.0, 62.0])  # made, nobody yet, all: due, told
    monkeypatch.setattr("pipelines.progress.time.perf_counter", lambda: next(times))
    ticker = Ticker("recommend", rows="users")
    ticker.on_rows(0, 10)
    ticker.on_rows(10, 10)
    assert "recommend: 10/10 users  5 users/s  ETA 0:00" in capsys.readouterr().err


TWO_TOWER_RUN = """
output = "{folder}/out"
tables = [{{ path = "{folder}/items.parquet", on = "item" }}]
features = [
    {{ kind = "vocabulary", column = "user" }},
    {{ kind = "vocabulary", column = "item" }},
]

[data]
path = "{folder}/log.parquet"
key = ["user", "item"]
labels = ["liked"]
split = {{ per_user = "user", train = 0.8, valid = 0.2, test_where = "part = 'new'" }}

[retrieval]
user = "user"
item = "item"
items = "{folder}/items.parquet"

[recommend]
k = 3

[model]
name = "two_tower"
query = ["user"]
item = ["item"]

[train]
monitor = "recall"

[mlflow]
uri = "sqlite:///{folder}/mlflow.db"
"""


def test_the_registered_model_gives_the_similarity(trained: Run) -> None:
    registry_of(trained)
    model = mlflow.pyfunc.load_model("models:/ctr@challenger")
    raw = log().filter(pl.col("user").is_not_null()).join(corpus(), on="item", how="left").head(50)
    found = model.predict(raw.drop("part", "liked", "hour").to_pandas())
    expected = pl.concat(Bundle.load(trained.bundle_path).predict(raw.lazy()))["similarity"]
    assert list(found.columns) == ["similarity"]
    np.testing.assert_allclose(found["similarity"], expected, atol=1e-6)


# Days without roles


@pytest.fixture(scope="module")
def days(folder: Path, trained: Run) -> Run:
    """The same log by day, with a model that was trained on its first two days."""
    rows = log().filter(part="log").with_columns(day=pl.col("hour") % 4 + 1).drop("part")
    for day in range(1, 5):
        path = folder / f"days/day=2026-03-0{day}"
        path.mkdir(parents=True)
        rows.filter(day=day).drop("day").write_parquet(path / "log.parquet")
    split = {"train": "2026-03-01", "valid": "2026-03-02"}
    data = {"path": f"{folder}/days/day=*/*.parquet", "key": ["user", "item"], "labels": ["liked"], "time": "day"}
    run = elsewhere(trained, "days", data={**data, "split": split})
    prepare(run, say=quiet)
    train(run, say=quiet)
    return elsewhere(trained, "days", data=data)


def test_where_days_have_no_roles_all_earlier_ones_have_been_seen(days: Run) -> None:
    bundle = Bundle.load(days.bundle_path)
    table, about, _ = recommended(days, str(days.bundle_path), partition="day=2026-03-04")
    assert about["seen_in"] == ["day=2026-03-01", "day=2026-03-02", "day=2026-03-03"]
    raw = log().filter(part="log").with_columns(day=pl.col("hour") % 4 + 1)
    seen = raw.filter(pl.col("day") < 4).select("user", "item")
    assert table["user"].unique().sort().equals(raw.filter(day=4)["user"].unique().sort())
    assert table.join(seen, on=["user", "item"], how="semi").height == 0
    asked = raw.filter(day=4).unique("user", keep="first").select("user", "group")
    pairs = asked.join(corpus(), how="cross").join(seen, on=["user", "item"], how="anti")
    best = pairs.with_columns(pl.concat(bundle.predict(pairs.lazy()))["similarity"])
    expected = best.sort("user", "similarity", "item", descending=[False, True, False]).group_by(
        "user", maintain_order=True
    ).head(K)  # fmt: skip
    np.testing.assert_allclose(table["similarity"], expected["similarity"], atol=1e-6)
    index_about = read_manifest(resolve(days.index_path)).about
    assert index_about["queries"] == raw.filter(day=1)["user"].n_unique()  # of the last day that the bundle has seen


def test_of_days_with_roles_those_before_have_been_seen(days: Run) -> None:
    """Test days as well: what was liked yesterday is not recommended today."""
    split = {"train": "2026-03-01", "valid": "2026-03-02", "test": "2026-03-03..2026-03-04"}
    data = {**days.data.model_dump(mode="json"), "split": split}
    for day, seen_in in ((4, [1, 2, 3]), (3, [1, 2]), (2, [1])):
        run = elsewhere(days, f"roles-{day}", data=data)
        _, about, _ = recommended(run, str(days.bundle_path), partition=f"day=2026-03-0{day}")
        assert about["seen_in"] == [f"day=2026-03-0{d}" for d in seen_in]


def test_seen_days_limit_what_counts_as_seen(days: Run) -> None:
    run = elsewhere(days, "two-days", recommend={"k": K, "seen_days": 2})
    table, about, _ = recommended(run, str(days.bundle_path), partition="day=2026-03-04")
    assert about["seen_in"] == ["day=2026-03-02", "day=2026-03-03"]
    raw = log().filter(part="log").with_columns(day=pl.col("hour") % 4 + 1)
    pairs = {d: raw.filter(day=d).select("user", "item") for d in (1, 2, 3)}
    assert table.join(pl.concat([pairs[2], pairs[3]]), on=["user", "item"], how="semi").height == 0
    assert table.join(pairs[1], on=["user", "item"], how="semi").height > 0
    _, about, _ = recommended(run, str(days.bundle_path), partition="day=2026-03-01")
    assert (about["seen_in"], about["seen"]) == ([], 0)


def test_a_day_without_its_log_is_an_error(days: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    for day in (1, 3, 4):
        (tmp_path / f"days/day=2026-03-0{day}").symlink_to(folder / f"days/day=2026-03-0{day}")
    data = {**days.data.model_dump(mode="json"), "path": f"{tmp_path}/days/day=*/*.parquet"}
    run = elsewhere(days, "gap", data=data)
    index(run, model=str(days.bundle_path), say=quiet)
    with pytest.raises(DataError, match="no files for day 2026-03-02"):
        recommend(run, model=str(days.bundle_path), partition="day=2026-03-04", say=quiet)
    known = elsewhere(run, "gap", data={**data, "without_log": ["2026-03-02"]})
    recommend(known, model=str(days.bundle_path), partition="day=2026-03-04", say=quiet)
    about = read_manifest(resolve(known.recommendations_path("day=2026-03-04"))).about
    assert about["seen_in"] == ["day=2026-03-01", "day=2026-03-03"]


def test_a_day_of_users_alone_whose_ids_are_wider_than_the_logs(days: Run, folder: Path, tmp_path: Path) -> None:
    """It has neither key nor label; an id that the older days cannot hold has not been seen in them."""
    (tmp_path / "days/day=2026-03-04").mkdir(parents=True)
    for day in (1, 2, 3):
        older = tmp_path / f"days/day=2026-03-0{day}"
        older.mkdir()
        rows = pl.read_parquet(folder / f"days/day=2026-03-0{day}/log.parquet")
        rows.with_columns(pl.col("user").cast(pl.Int32)).write_parquet(older / "log.parquet")
    today = tmp_path / "days/day=2026-03-04/log.parquet"
    users = pl.DataFrame({"user": [EAGER, 2**31 + EAGER], "group": ["k9", "k9"]})
    users.write_parquet(today)
    data = {**days.data.model_dump(mode="json"), "path": f"{tmp_path}/days/day=*/*.parquet"}
    run, model = elsewhere(days, "wide", data=data), str(days.bundle_path)
    table, _, _ = recommended(run, model, partition="day=2026-03-04")
    assert table["user"].unique().sort().to_list() == users["user"].to_list()
    raw = log().filter(pl.col("part") == "log", user=EAGER).filter(pl.col("hour") % 4 + 1 < 4)
    assert raw.height
    assert not set(table.filter(user=EAGER)["item"]) & set(raw["item"])
    users.with_columns(pl.col("user").cast(pl.String)).write_parquet(today)
    with pytest.raises(
        DataError, match=r"^in day=2026-03-04 'user' holds text, in day=2026-03-01 integer; convert one of them$"
    ):
        recommend(run, model=model, partition="day=2026-03-04", overwrite=True, say=quiet)


def test_days_without_roles_need_a_model_that_knows_its_days(days: Run, trained: Run) -> None:
    with pytest.raises(ConfigError, match=r"does not say which days it has seen, and data\.split names none"):
        index(elsewhere(days, "unknown"), model=str(trained.bundle_path), say=quiet)
    with pytest.raises(ConfigError, match="this log is split by day; write day=2026-03-01"):
        recommended(elsewhere(days, "named"), str(days.bundle_path), partition="split=test")


def test_without_a_table_the_corpus_is_the_logs_with_what_describes_its_items(
    folder: Path, trained: Run, ranking: Bundle
) -> None:
    """Of the features, and of a table whose key is the item."""
    retrieval = {**trained.model_dump(mode="json")["retrieval"], "items": None}
    second = {"config": str(folder / "ranking.toml")}
    run = elsewhere(trained, "own", retrieval=retrieval, recommend={"k": 3, "ranking": second})
    table, about, _ = recommended(run, str(trained.bundle_path))
    assert about["ranking"]["from_items"] == ["genres", "item", "price"]
    assert about["index"]["items"] == log()["item"].n_unique()
    assert set(table["item"]) <= set(log()["item"])


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recommend": {"k": 61}}, r"recommend\.k = 61: the corpus has 60 items; ask for fewer"),
        (
            {"recommend": {"k": 7, "candidates": 61, "ranking": {"config": "ranking.toml"}}},
            r"recommend\.candidates = 61: the corpus has 60 items",
        ),
        ({"index": {"kind": "ivf_pq"}}, "learns its codes from 9,984 items at least; the corpus has 60"),
    ],
)
def test_what_the_corpus_cannot_give(trained: Run, changes: dict[str, Any], message: str) -> None:
    run = elsewhere(trained, "refused", **changes)
    with pytest.raises(ConfigError, match=message):
        index(run, model=str(trained.bundle_path), say=quiet)
    assert not run.index_path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recommend": {"candidates": 30}}, r"recommend\.candidates are what recommend\.ranking chooses from"),
        (
            {"recommend": {"k": 7, "candidates": 6, "ranking": {"config": "x.toml"}}},
            r"recommend\.candidates = 6: fewer than recommend\.k = 7",
        ),
        (
            {"model": {"name": "lr"}, "retrieval": None, "train": {}, "recommend": {"k": 3}},
            'recommend is of two-tower models; model.name is "lr"',
        ),
        (
            {"model": {"name": "lr"}, "retrieval": None, "train": {}, "index": {"kind": "hnsw"}, "recommend": {}},
            'index is of two-tower models; model.name is "lr"',
        ),
    ],
)
def test_run_files_that_cannot_be_meant_are_refused(trained: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        elsewhere(trained, "refused", **changes)


def test_other_models_have_no_index(folder: Path, trained: Run, ranking: Bundle) -> None:
    run = load_config(Run, folder / "ranking.toml")
    for step in (index, recommend):
        with pytest.raises(ConfigError, match=r'is of two-tower models with \[retrieval\]; model\.name is "fm"'):
            step(run, say=quiet)
    with pytest.raises(ConfigError, match=f"bundle {ranking.version} is a model of the kind 'fm'; only two-tower"):
        index(trained, model=str(run.bundle_path), say=quiet)


def ranked(folder: Path, trained: Run, name: str, **second: Any) -> Run:
    run = elsewhere(trained, name, recommend={"k": K, "ranking": {"config": str(folder / "ranking.toml"), **second}})
    index(run, model=str(trained.bundle_path), if_missing=True, say=quiet)
    return run


def test_rankings_that_do_not_fit(folder: Path, trained: Run, ranking: Bundle, tmp_path: Path) -> None:
    model = str(trained.bundle_path)
    with pytest.raises(ConfigError, match=r"recommend\.ranking\.by: 'p_clik' is no output of .*did you mean 'p_click'"):
        recommend(ranked(folder, trained, "by", by="p_clik"), model=model, say=quiet)
    config = folder / "run.toml"
    config.write_text(TWO_TOWER_RUN.format(folder=folder))
    with pytest.raises(ConfigError, match="is of a two-tower model, which finds candidates"):
        recommend(ranked(folder, trained, "towers", config=str(config), model=model), model=model, say=quiet)
    with pytest.raises(ConfigError, match=r"^nope\.toml: no such run file; correct recommend\.ranking\.config$"):
        recommend(ranked(folder, trained, "nope", config="nope.toml"), model=model, say=quiet)
    log().drop("hour").write_parquet(tmp_path / "log.parquet")
    run = ranked(folder, trained, "column")
    data = {**run.data.model_dump(mode="json"), "path": str(tmp_path / "log.parquet")}
    with pytest.raises(
        DataError,
        match=r"it reads column 'hour', which is neither in the rows of split=test nor in the index \(item, gen",
    ):
        recommend(elsewhere(run, "column", data=data), model=model, say=quiet)
    assert not run.recommendations_path("split=test").exists()


def test_partitions_without_users_are_an_error(trained: Run, tmp_path: Path) -> None:
    log().filter(part="log").write_parquet(tmp_path / "log.parquet")
    data = {**trained.data.model_dump(mode="json"), "path": str(tmp_path / "log.parquet")}
    run = elsewhere(trained, "empty", data=data)
    index(run, model=str(trained.bundle_path), say=quiet)
    with pytest.raises(DataError, match=r"split=test: .* has no users to recommend to"):
        recommend(run, model=str(trained.bundle_path), say=quiet)
    with pytest.raises(ConfigError, match=r"seen_days = 3: this log is not split by day"):
        recommend(
            elsewhere(trained, "empty", recommend={"k": 3, "seen_days": 3}), model=str(trained.bundle_path), say=quiet
        )
    with pytest.raises(ArtefactError, match="nothing is published there; run `recsys index`"):
        recommend(elsewhere(trained, "nowhere"), model=str(trained.bundle_path), say=quiet)
