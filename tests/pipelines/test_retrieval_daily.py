"""Two towers from day to day: each day brings items that nothing has learned; late, killed, out of order, or odd."""

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from base.config import parse_config
from base.errors import DataError, Superseded
from base.storage import is_published, published, read_manifest, resolve
from pipelines import cli
from pipelines.check import check
from pipelines.clean import clean
from pipelines.config import Run
from pipelines.daily import prepare_day
from pipelines.diff import diff
from pipelines.evaluate import evaluate
from pipelines.index import index
from pipelines.line import current_line, line_of
from pipelines.profile import profile_of
from pipelines.promote import promote
from pipelines.rankings import ask
from pipelines.recommend import recommend
from pipelines.report import report
from pipelines.rollback import rollback
from pipelines.score import score
from pipelines.tracking import registry_of
from pipelines.train_day import train_day
from recsys.bundle import Bundle
from recsys.gate import Comparison
from recsys.retrieval import COUNT, ITEM, RELEVANT, SEEN, USER
from recsys.tensors import load_tensors
from recsys.trainer import Progress
from serving.index import ItemIndex
from tests.marks import quick
from tests.pipelines import test_promote_retrieval

USERS, KINDS, FIRST_ITEMS, NEW = 90, 3, 48, 6
FIRST = date(2026, 3, 4)
"""The full training: it learns from 1 and 2, its epoch is chosen on 3, it is judged on 4."""
GATE = {"retrieval": {"min_slice_users": 20, "suspicious_gain": "1000%", "margins": {"slice_recall": "60%"}}}


def quiet(_: str) -> None:
    """Says nothing."""


def day(number: int) -> date:
    return date(2026, 3, number)


def catalogue(items: int) -> pl.DataFrame:
    """Item i is of genre i mod KINDS."""
    names = [f"i{i:03}" for i in range(items)]
    return pl.DataFrame(
        {"item": names, "genre": [f"g{i % KINDS}" for i in range(items)], "price": [float(i % 7) for i in range(items)]}
    )


def born(number: int) -> int:
    """How many items there are on a day."""
    return FIRST_ITEMS + NEW * number


def write(folder: Path, number: int, *, likes: bool = True) -> None:
    """A day on which users look at items, the day's own among them, and like those of their genre."""
    rng = np.random.default_rng(number)
    rows: list[dict[str, Any]] = []
    for user in range(USERS):
        new = born(number - 1) + np.arange(NEW)
        shown = {*rng.choice(born(number), 7, replace=False).tolist(), *rng.choice(new, 1).tolist()}
        rows += [{"user": user, "item": f"i{i:03}", "liked": int(likes and i % KINDS == user % KINDS)} for i in shown]
    frame = pl.DataFrame(rows).with_row_index("row").with_columns(group=pl.format("k{}", pl.col("user") % KINDS))
    path = folder / f"log/day={day(number)}"
    path.mkdir(parents=True)
    frame.with_columns(row=pl.col("row").cast(pl.Int64) + number * 100_000).write_parquet(path / "part.parquet")


def tree_of(folder: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["row"],
            "labels": ["liked"],
            "time": "day",
        },
        "tables": [{"path": str(folder / "items.parquet"), "on": "item"}],
        "daily": {"window_days": 2, "accumulator_decay": 0.9},
        "features": [
            {"kind": "vocabulary", "column": "user"},
            {"kind": "vocabulary", "column": "group"},
            {"kind": "vocabulary", "column": "item"},
            {"kind": "vocabulary", "column": "genre"},
            {"kind": "standardise", "column": "price"},
        ],
        "model": {"name": "two_tower", "query": ["user", "group"], "item": ["item", "genre", "price"], "dim": 8},
        "train": {"batch_size": 128, "epochs": 2, "monitor": "recall", "threads": 1, "checkpoint_every": 2},
        "retrieval": {"user": "user", "item": "item", "items": str(folder / "items.parquet"), "k": [10]},
        "gate": GATE,
        "mlflow": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part] = {**tree[part], name: value} if name else value
    return tree


def run_of(folder: Path, **changes: Any) -> Run:
    return parse_config(Run, tree_of(folder, **changes), source="test")


def begin(folder: Path, **changes: Any) -> Run:
    """Four days of log, and the full training of the fourth."""
    catalogue(born(12)).write_parquet(folder / "items.parquet")
    for number in range(1, 5):
        write(folder, number)
    run = run_of(folder, **changes)
    full = run.on(FIRST, full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)
    return run


def live(run: Run, number: int, **options: Any) -> Run:
    now = run.on(day(number))
    prepare_day(now, say=quiet)
    train_day(now, say=quiet, **options)
    return now


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A full training and two days; read only."""
    folder = tmp_path_factory.mktemp("retrieval_days")
    run = begin(folder)
    assert promote(run.on(FIRST, full=True)).promoted
    for number in (5, 6):
        write(folder, number)
        verdict = promote(live(run, number))
        assert verdict.promoted, verdict
    return folder, run


@pytest.fixture
def begun(history: tuple[Path, Run], tmp_path: Path) -> tuple[Path, Run]:
    """The same, to be changed."""
    shutil.copytree(history[0], tmp_path / "copy", symlinks=True)
    return tmp_path / "copy", run_of(tmp_path / "copy")


def positives(folder: Path, number: int) -> pl.DataFrame:
    return pl.read_parquet(folder / f"log/day={day(number)}/part.parquet").filter(liked=1).select("user", "item")


# What each day does


def test_each_day_learns_is_measured_and_judged_on_days_of_their_own(history: tuple[Path, Run]) -> None:
    folder, run = history
    for number, full in ((4, True), (5, False), (6, False)):
        now = run.on(day(number), full=full)
        bundle = Bundle.load(now.bundle_path)
        bundle.check_golden()
        assert (bundle.origin.trained_to, bundle.origin.calibrated_on) == (str(day(number - 2)), str(day(number - 1)))
        last = bundle.metrics["history"][-1]
        assert 0 < last["recall_10"] <= 1
        assert ("objective" in last) == full  # it chooses the epoch; later days have one
        assert bundle.golden["item"].to_list() == positives(folder, number - 1)["item"].head(64).to_list()
        about = read_manifest(resolve(now.gate_path(f"day={day(number)}"), "verdict")).about
        assert about["bundle"] == bundle.version
    line = current_line(run)
    assert line is not None
    assert line.days("states") == [day(2), day(3), day(4)]


def test_the_question_of_a_day_is_what_its_users_like_beyond_the_windows_days(history: tuple[Path, Run]) -> None:
    folder, run = history
    now = run.on(day(6))
    ranking = resolve(now.ranking_path([f"day={day(6)}"]), "ranking")
    about = read_manifest(ranking).about
    assert [p["partition"] for p in about["seen"]] == [f"day={day(n)}" for n in (4, 5)]
    items = pl.read_parquet(ranking / "items.parquet")
    fitted = line_of(now).features(day(4))
    assert about["asked"][0]["pipeline"] == fitted.version
    assert items[ITEM].to_list() == catalogue(born(12))["item"].to_list()
    counted = pl.concat([positives(folder, n) for n in (1, 2, 3, 4)])["item"]
    expected = counted.value_counts()
    found = items.filter(pl.col(COUNT) > 0).select(item=ITEM, count=pl.col(COUNT).cast(pl.UInt32))
    assert found.sort("item").equals(expected.sort("item"))
    users = pl.read_parquet(ranking / "users.parquet")
    seen = pl.concat([positives(folder, 4), positives(folder, 5)]).unique()
    wanted = positives(folder, 6).unique().join(seen, on=["user", "item"], how="anti")
    for column, pairs in ((SEEN, seen.filter(pl.col("user").is_in(users[USER].implode()))), (RELEVANT, wanted)):
        shown = users.select(user=USER, place=column).explode("place", empty_as_null=False, keep_nulls=False)
        named = shown.select("user", item=items[ITEM].gather(shown["place"]))
        assert named.sort("user", "item").equals(pairs.sort("user", "item"))


def test_corrections_are_for_how_often_an_item_stood_in_the_positive_rows_of_the_softmax(
    begun: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = begun
    write(folder, 7)
    taken: list[np.ndarray] = []
    learn = pytest.importorskip("recsys.processes").train

    def watched(*arguments: Any, **options: Any) -> Any:
        taken.append(options["item_counts"])
        return learn(*arguments, **options)

    monkeypatch.setattr("recsys.processes.train", watched)
    now = live(run, 7)
    (counts,) = taken
    assert counts.tolist() == line_of(now).features(day(5)).counts_of("item").tolist()
    assert counts.sum() == sum(positives(folder, n).height for n in range(1, 6))


def test_items_that_no_training_has_seen_are_cold_and_found_by_their_features(history: tuple[Path, Run]) -> None:
    _, run = history
    now = run.on(day(6))
    table = pl.read_parquet(resolve(now.evaluation_path(f"day={day(6)}")) / "metrics.parquet")
    rows = {r["slice"]: r for r in table.iter_rows(named=True)}
    assert rows["cold"]["items"] == born(12) - born(4)  # the features of day 6 model were extended to day 4
    assert rows["cold"]["users"] > 30
    assert rows["cold"]["recall"] > 0
    verdict = (resolve(now.gate_path(f"day={day(6)}")) / "comparisons.parquet").resolve()
    found = [Comparison(**row) for row in pl.read_parquet(verdict).iter_rows(named=True)]
    assert {"all", "items = cold"} <= {c.slice for c in found}
    assert found[0].candidate == pytest.approx(rows["all"]["recall"])


def test_the_logs_own_items_are_the_same_to_the_gate_and_the_index(begun: tuple[Path, Run]) -> None:
    """Of the positive rows of the last day and of the window before it, not of all days."""
    folder, _ = begun
    run = run_of(folder, retrieval__items=None)
    path = folder / f"log/day={day(1)}/part.parquet"
    rows = pl.read_parquet(path)
    pl.concat([rows, rows.filter(liked=1)[:1].with_columns(item=pl.lit("i110"))]).write_parquet(path)
    liked = [positives(folder, n)["item"] for n in range(1, 7)]
    window, whole = (pl.concat(days).unique().sort().to_list() for days in (liked[-3:], liked))
    assert window != whole
    index(run, say=quiet)
    bundle = Bundle.load(run.on(day(6)).bundle_path)
    (question,) = ask(run.on(day(6)), bundle, None, [f"day={day(6)}"])
    assert pl.read_parquet(question.folder / "items.parquet")[ITEM].to_list() == window
    assert ItemIndex.load(run.index_path, bundle).items["item"].to_list() == window


# Around the model


def test_checks_scores_reports_and_differences_take_it(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    live(run, 6)
    found = check(run, partition=f"day={day(6)}", say=quiet)[f"day={day(6)}"]
    assert {f.what for f in found} >= {"psi", "unknown", "missing", "label_rate", "volume"}
    (path,) = score(run, partition=f"day={day(6)}", say=quiet)
    scores = pl.read_parquet(path / "part-*.parquet")
    assert scores.columns == ["row", "similarity", "model_version"]
    assert {"score_psi"} <= {f.what for f in check(run, partition=f"day={day(6)}", say=quiet)[f"day={day(6)}"]}
    now = run.on(day(6))
    promote(now)
    page = report(now).read_text(encoding="utf-8")
    for piece in (
        "What the gate said",
        "What the lag costs",
        "recall@10",
        "The first 10",
        "on the day after it",
        "cold",
    ):
        assert piece in page
    line = line_of(now)
    assert diff(line.features_path(day(5)), line.features_path(day(6))) != diff(now.bundle_path, now.bundle_path)
    bundle = Bundle.load(now.bundle_path)
    assert bundle.profile is not None
    score(run, partition=f"day={day(6)}", model=str(now.bundle_path), overwrite=True, say=quiet)
    profile = profile_of(now, bundle, bundle.profile, f"day={day(6)}")
    assert profile.rows == sum(profile.scores["similarity"]) == positives(folder, 6).height < scores.height


def test_a_day_is_evaluated_again_from_the_command_line(begun: tuple[Path, Run], tmp_path: Path) -> None:
    _, run = begun
    live(run, 6)
    config = tmp_path / "run.toml"
    tree = run.model_dump(mode="json", exclude_none=True)
    del tree["data"]["split"]
    config.write_text(test_promote_retrieval.toml(tree))
    before = pl.read_parquet(resolve(run.on(day(6)).evaluation_path(f"day={day(6)}")) / "metrics.parquet")
    found = CliRunner().invoke(
        cli.main, ["evaluate", "--config", str(config), "--day", "2026-03-06"], catch_exceptions=False
    )
    assert found.exit_code == 0, found.output
    assert f"{before['recall'][0]:.4f}" in found.output
    again = pl.read_parquet(resolve(run.on(day(6)).evaluation_path(f"day={day(6)}")) / "metrics.parquet")
    assert again.equals(before)
    for step in (["evaluate", "--partition", "day=2026-03-06"], ["evaluate"], ["report"]):
        missing = CliRunner().invoke(cli.main, [*step, "--config", str(config)])
        assert missing.exit_code == 2
        assert "there is no trained model there, each day has its own; pass --day" in missing.output


def test_a_rollback_returns_and_the_same_step_does_not_come_back(begun: tuple[Path, Run]) -> None:
    _, run = begun
    registry = registry_of(run)
    left = registry.champion()
    restored = rollback(run, say=quiet)
    assert registry.champion() == restored != left
    verdict = promote(run.on(day(6)))
    assert verdict.decision == "refused"
    assert "was rolled back" in str(verdict.reasons[0])


def test_cleaning_takes_old_questions_too(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    for number in (7, 8):
        write(folder, number)
        promote(live(run, number))
    before = {p.name for p in published(run.output / "rankings/two_tower")}
    assert before == {f"day={day(n)}" for n in (4, 5, 6, 7, 8)}
    assert clean(run, keep=2, say=quiet) > 0
    for folder_name in ("two_tower", "two_tower-champion"):
        assert {p.name for p in published(run.output / "rankings" / folder_name)} == {f"day={day(n)}" for n in (7, 8)}
    assert not published(run.output / "rankings/two_tower-full")
    write(folder, 9)
    assert promote(live(run, 9)).decision in ("promoted", "refused")


# Late, killed, out of order


SSL = {"ssl": {"alpha": 0.2}, "retrieval__items": None}


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a training."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_step


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_tensors(resolve(p) / "weights") for p in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_caught_up_is_every_day_in_turn_also_with_ssl_and_the_logs_own_items(tmp_path: Path) -> None:
    run = begin(tmp_path, **SSL)
    for number in (5, 6, 7):
        write(tmp_path, number)
    shutil.copytree(tmp_path, tmp_path / "other", symlinks=True)
    other = run_of(tmp_path / "other", **SSL)
    for number in (5, 6, 7):
        live(other, number)
    now = live(run, 7)
    line, theirs = line_of(now), line_of(other.on(day(7)))
    assert line.days("states") == theirs.days("states") == [day(n) for n in (2, 3, 4, 5)]
    assert all(same_weights(line.state_path(day(n)), theirs.state_path(day(n))) for n in (2, 3, 4, 5))
    assert Bundle.load(now.bundle_path).metrics["history"][-1]["self_loss"] > 0
    corpus = pl.read_parquet(resolve(now.ranking_path([f"day={day(6)}"])) / "items.parquet")[ITEM]
    liked = [positives(tmp_path, n)["item"] for n in (4, 5, 6)]
    assert corpus.to_list() == pl.concat(liked).unique().sort().to_list()  # the window's items, and those asked about
    with pytest.raises(Superseded, match="is trained to 2026-03-05 already"):
        train_day(run.on(day(6)), say=quiet)


@pytest.mark.parametrize("changes", quick({"plain": {}, "ssl": {"ssl": {"alpha": 0.2}}}, "plain"))
def test_killed_it_goes_on_and_ends_with_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "train__batch_size": 40}
    (tmp_path / "whole").mkdir()
    whole = begin(tmp_path / "whole", **changes)
    write(tmp_path / "whole", 5)
    shutil.copytree(tmp_path / "whole/log", tmp_path / "killed/log")
    shutil.copy(tmp_path / "whole/items.parquet", tmp_path / "killed/items.parquet")
    killed = run_of(tmp_path / "killed", **changes)
    full = killed.on(FIRST, full=True)
    prepare_day(full, say=quiet)
    with pytest.raises(Stop):
        train_day(full, on_step=stop_at(15), say=quiet)
    train_day(full, say=quiet)
    with pytest.raises(Stop):
        live(killed, 5, on_step=stop_at(3))
    resumed: list[int] = []
    live(killed, 5, on_step=lambda p: resumed.append(p.step))
    assert resumed[0] == 3  # there was a checkpoint after the second step
    live(whole, 5)
    for number in (2, 3):
        states = [line_of(r.on(day(5))).state_path(day(number)) for r in (whole, killed)]
        assert same_weights(*states), number


def test_a_full_training_begins_a_line_and_asks_the_same_question(begun: tuple[Path, Run]) -> None:
    _, run = begun
    full = run.on(day(6), full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)
    promote(full)
    partition = f"day={day(6)}"
    ours, theirs = (resolve(r.ranking_path([partition])) / "users.parquet" for r in (full, run.on(day(6))))
    both = [pl.read_parquet(path, columns=[USER, SEEN, RELEVANT]) for path in (ours, theirs)]
    assert both[0].equals(both[1])
    assert is_published(full.ranking_path([partition], of_champion=True))


# Odd days


def test_a_day_on_which_nobody_likes_anything_is_no_log(begun: tuple[Path, Run]) -> None:
    """As a day of which data.where leaves nothing; it is named in data.without_log, and the next one is lived through.

    Recommended to are its users nevertheless, who are those of all its rows.
    """
    folder, run = begun
    write(folder, 7, likes=False)
    sentence = r"has no rows whose label 'liked' is 1, .*; mend the log, or name the day in data\.without_log"
    with pytest.raises(DataError, match=f"day=2026-03-07: .* {sentence}"):
        live(run, 7)
    index(run, say=quiet)
    (target,) = recommend(run, partition=f"day={day(7)}", say=quiet)
    assert pl.read_parquet(target / "part-*.parquet")["user"].n_unique() == USERS
    write(folder, 8)
    known = run_of(folder, data__without_log=[str(day(7))])
    now = live(known, 8)
    assert line_of(now).days("features")[-2:] == [day(6), day(8)]
    assert promote(now).decision in ("promoted", "refused")
    assert report(now).exists()


def test_a_day_on_which_nobody_likes_anything_new_is_lived_through(begun: tuple[Path, Run]) -> None:
    """It is judged on by nobody, and measures nothing."""
    folder, run = begun
    write(folder, 7)
    path = folder / f"log/day={day(7)}/part.parquet"
    seen = pl.read_parquet(folder / f"log/day={day(6)}/part.parquet").with_columns(pl.col("row") + 500_000)
    seen.write_parquet(path)
    champion = registry_of(run).champion()
    verdict = promote(live(run, 7))
    assert verdict.decision == "refused"
    assert "only 0 users have something to find" in str(verdict.reasons[0])
    assert registry_of(run).champion() == champion
    assert report(run.on(day(7))).exists()
    write(folder, 8)
    now = live(run, 8)
    assert "recall_10" not in Bundle.load(now.bundle_path).metrics["history"][-1]
    assert promote(now).decision in ("promoted", "refused")
    assert report(now).exists()
    with pytest.raises(DataError, match=r"day=2026-03-07: nobody has a positive row whose item they have not seen"):
        evaluate(run.on(day(7)))
    late = run.on(day(8), full=True)
    prepare_day(late, say=quiet)
    with pytest.raises(DataError, match="nobody has a positive row"):  # an epoch must be chosen by somebody
        train_day(late, say=quiet)


def test_a_day_of_items_that_no_model_knows_is_judged_by_cold_items_alone(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    write(folder, 7)
    path = folder / "log/day=2026-03-07/part.parquet"
    item = pl.format("n{}", pl.col("item").str.slice(1))
    pl.read_parquet(path).with_columns(item=item).write_parquet(path)
    both = pl.concat([catalogue(born(12)), catalogue(born(12)).with_columns(item=item)])
    now = live(run, 7)
    with pytest.raises(
        DataError, match=r"day=2026-03-07: \d+ items of \d+ of \d+ positive rows are not in the corpus, as item 'n0"
    ):
        promote(now)
    both.write_parquet(folder / "items.parquet")
    promote(now)
    table = pl.read_parquet(resolve(now.evaluation_path(f"day={day(7)}")) / "metrics.parquet")
    rows = {r["slice"]: r for r in table.iter_rows(named=True)}
    assert rows["cold"]["users"] == rows["all"]["users"] > 50
    assert [rows[s]["users"] for s in ("head", "torso", "tail")] == [0, 0, 0]


def test_items_that_have_left_the_catalogue_are_set_aside(begun: tuple[Path, Run]) -> None:
    """Of what has been seen any number; of what is asked about up to data.max_bad_share."""
    folder, _ = begun
    asked, seen = positives(folder, 6)["item"], positives(folder, 5)["item"]
    gone = [*sorted(set(seen) - set(asked))[:5], asked.value_counts().sort("count", "item")["item"][0]]
    catalogue(born(12)).filter(~pl.col("item").is_in(gone)).write_parquet(folder / "items.parquet")
    with pytest.raises(
        DataError, match=rf"1 items of \d+ of \d+ positive rows are not in the corpus, as item '{gone[-1]}'"
    ):
        evaluate(run_of(folder, data__max_bad_share=0.0).on(day(6)))
    now = run_of(folder, data__max_bad_share=0.2).on(day(6))
    promote(live(run_of(folder, data__max_bad_share=0.2), 6))
    about = read_manifest(resolve(now.ranking_path([f"day={day(6)}"]))).about
    assert about["items"] == born(12) - len(gone)
    assert about["lost"] == asked.value_counts().filter(item=gone[-1])["count"].item()
