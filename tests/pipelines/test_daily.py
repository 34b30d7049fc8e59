"""Days, one after another: features grow, training goes on, the gate decides; in any order, however often repeated."""

import shutil
from datetime import date
from pathlib import Path
from threading import Thread
from typing import Any

import polars as pl
import pytest
import torch

import pipelines.train_day
from base.config import parse_config
from base.errors import ArtefactError, ConfigError, DataError, Superseded
from base.storage import exclusive, is_published, published, read_manifest, resolve
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.check import check
from pipelines.clean import clean
from pipelines.config import Run
from pipelines.daily import count, encode, fit, plan, prepare_day
from pipelines.line import Line, current_line, line_of
from pipelines.promote import promote
from pipelines.report import report
from pipelines.rollback import rollback
from pipelines.score import score
from pipelines.tracking import registry_of
from pipelines.train_day import train_day
from recsys.bundle import Bundle
from recsys.registry import Registered
from recsys.tensors import load_tensors

ROWS = 1500
FIRST = date(2026, 3, 4)
"""The full training: it learns from 1 and 2, calibrates on 3, is judged on 4."""


def day(number: int) -> date:
    return date(2026, 3, number)


def quiet(_: str) -> None:
    """Says nothing."""


def tree_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": ["click"],
            "time": "day",
        },
        "daily": {"window_days": 2, "accumulator_decay": 0.9},
        "features": (
            {"kind": "vocabulary", "column": "user_id"},
            {"kind": "vocabulary", "column": "item_id", "min_count": 2},
            {"kind": "vocabulary", "column": "device"},
            {"kind": "log", "column": "price"},
        ),
        "model": {"name": "fm", "dim": 4},
        "train": {"batch_size": 250, "epochs": 2, "threads": 1},
        "calibrate": {"method": "platt"},
        "gate": {"calibration": [0.3, 3.0], "max_normalized_entropy": 1.2},
        "mlflow": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        **changes,
    }


def run_of(folder: Path, **changes: Any) -> Run:
    return parse_config(Run, tree_of(folder, **changes), source="test")


def write(folder: Path, number: int, rows: int = ROWS, **config: Any) -> None:
    path = folder / f"log/day={day(number)}"
    path.mkdir(parents=True)
    settings = SyntheticConfig(rows_per_day=rows, users=800, items=200, **config)
    day_frame(settings, day(number)).drop("day").write_parquet(path / "part.parquet")


def begin(folder: Path, **changes: Any) -> Run:
    """Four days of log, and the full training of the fourth."""
    for number in range(1, 5):
        write(folder, number)
    run = run_of(folder, **changes)
    full = run.on(FIRST, full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)
    return run


def live(run: Run, number: int) -> Run:
    """One day: features, training, the gate."""
    now = run.on(day(number))
    prepare_day(now, say=quiet)
    train_day(now, say=quiet)
    return now


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A full training and two days; read only."""
    folder = tmp_path_factory.mktemp("history")
    run = begin(folder)
    assert promote(run.on(FIRST, full=True)).promoted
    for number in (5, 6):
        write(folder, number)
        now = live(run, number)
        promote(now)
    return folder, run


@pytest.fixture
def begun(history: tuple[Path, Run], tmp_path: Path) -> tuple[Path, Run]:
    """The same, to be changed."""
    shutil.copytree(history[0], tmp_path / "copy", symlinks=True)
    return tmp_path / "copy", run_of(tmp_path / "copy")


# What each day does


def test_a_day_is_trained_to_two_days_before_calibrated_on_the_next_and_judged_on_itself(
    history: tuple[Path, Run],
) -> None:
    run = history[1]
    for number, full in ((4, True), (5, False), (6, False)):
        now = run.on(day(number), full=full)
        origin = Bundle.load(now.bundle_path).origin
        assert (origin.day, origin.line) == (str(day(number)), str(FIRST))
        assert (origin.trained_to, origin.calibrated_on) == (str(day(number - 2)), str(day(number - 1)))
        verdict = read_manifest(resolve(now.gate_path(f"day={day(number)}"), "verdict")).about
        assert verdict["bundle"] == Bundle.load(now.bundle_path).version
    line = current_line(run)
    assert line is not None
    assert line.days("states") == [day(2), day(3), day(4)]
    assert line.days("features") == [day(n) for n in (2, 3, 4, 5, 6)]


def test_features_grow_and_old_ids_keep_their_rows_and_unseen_rows_their_bits(history: tuple[Path, Run]) -> None:
    line = current_line(history[1])
    assert line is not None
    for before, after in ((2, 3), (3, 4)):
        old, new = line.features(day(before)), line.features(day(after))
        ids = [dict(f.learned[0].drop_nulls("id").select("value", "id").iter_rows()) for f in (old, new)]
        assert ids[0].items() <= ids[1].items()
        assert len(ids[1]) > len(ids[0])
        tables = [load_tensors(resolve(line.state_path(day(n))) / "weights") for n in (before, after)]
        table = [t["embed.tables.embedding_bags.user_id.weight"] for t in tables]
        examples = pl.read_parquet(resolve(line.examples_path(f"day={day(after)}")) / "part-*.parquet")
        touched = set(examples["user_id"].to_list())
        still = [r for r in range(len(table[0])) if r not in touched]
        assert still
        assert torch.equal(table[1][still], table[0][still])
        assert not torch.equal(table[1][: len(table[0])], table[0])
        sums = [load_tensors(resolve(line.state_path(day(n))) / "table_states")["user_id"] for n in (before, after)]
        assert torch.allclose(sums[1][still], sums[0][still] * 0.9)


def test_the_report_of_a_day_shows_the_gate_and_what_the_lag_costs(history: tuple[Path, Run]) -> None:
    now = history[1].on(day(6))
    page = report(now).read_text(encoding="utf-8")
    assert "What the gate said" in page
    assert "What the lag costs" in page


# Repeated, late, out of order


def test_every_step_may_be_repeated(begun: tuple[Path, Run]) -> None:
    _, run = begun
    now = live(run, 6)  # a bundle names its folder, and this one has been copied
    promote(now)
    line = line_of(now)
    paths = [line.features_path(day(6)), line.state_path(day(4)), line.examples_path(f"day={day(6)}"), now.bundle_path]
    before = [resolve(p) for p in paths]
    version = registry_of(now).of_training(read_manifest(before[-1]).version)
    champion = registry_of(now).champion()
    assert plan(now).model_dump() == {"count": (), "encode": ()}
    live(run, 6)
    promote(now)
    assert [resolve(p) for p in paths] == before
    assert registry_of(now).of_training(Bundle.load(now.bundle_path).version) == version
    assert registry_of(now).champion() == champion


def test_missed_days_are_made_up_for_in_order_and_then_superseded(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    for number in (7, 8, 9):
        write(folder, number)
    now = run.on(day(9))
    assert plan(now).count == tuple(f"day={day(n)}" for n in (7, 8, 9))
    live(run, 9)
    line = line_of(now)
    assert line.days("states")[-3:] == [day(5), day(6), day(7)]
    late = run.on(day(8))
    assert plan(late).count == ()
    with pytest.raises(Superseded, match="line 2026-03-04 is trained to 2026-03-07 already; a later model takes its"):
        train_day(late, say=quiet)


def test_catching_up_gives_the_same_model_as_every_day_in_turn(begun: tuple[Path, Run], tmp_path: Path) -> None:
    folder, run = begun
    for number in (7, 8):
        write(folder, number)
    shutil.copytree(folder, tmp_path / "other", symlinks=True)
    other = run_of(tmp_path / "other")
    live(run, 8)
    for number in (7, 8):
        live(other, number)
    ours, theirs = (Bundle.load(r.on(day(8)).bundle_path) for r in (run, other))
    assert ours.features.version == theirs.features.version
    for (name, a), (_, b) in zip(ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_late_day_is_waited_for_unless_it_never_comes(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    write(folder, 8)
    now = run.on(day(8))
    with pytest.raises(DataError, match="no files for day 2026-03-07; check the path"):
        prepare_day(now, say=quiet)
    data = {**tree_of(folder)["data"], "without_log": ["2026-03-07"]}
    without = run_of(folder, data=data)
    assert without.on(day(8)).trained_to == day(5)
    live(without, 8)
    assert line_of(now).days("features")[-2:] == [day(6), day(8)]
    assert line_of(now).days("states")[-1] == day(5)


def test_machines_may_count_and_encode_apart(begun: tuple[Path, Run], tmp_path: Path) -> None:
    folder, run = begun
    for number in (7, 8):
        write(folder, number)
    shutil.copytree(folder, tmp_path / "other", symlinks=True)
    now, other = run.on(day(8)), run_of(tmp_path / "other").on(day(8))
    work = plan(now)
    with pytest.raises(ArtefactError, match=r"counts/day=2026-03-07: nothing is published there; run `recsys count"):
        fit(now, say=quiet)
    for partition in reversed(work.count):
        count(now, partition, say=quiet)
    fitted = fit(now, say=quiet)
    for partition in reversed(work.encode):
        encode(now, partition, say=quiet)
    assert prepare_day(other, say=quiet).version == fitted.version
    for partition in work.encode:
        ours, theirs = (resolve(line_of(r).examples_path(partition)) / "part-00000.parquet" for r in (now, other))
        assert ours.read_bytes() == theirs.read_bytes()


def test_labels_that_mature_publish_their_day_again(tmp_path: Path) -> None:
    funnel = {
        "labels": ["click", "conversion"],
        "funnel": ["click", "conversion"],
        "matures_after_days": {"conversion": 1},
    }
    data = {**tree_of(tmp_path)["data"], **funnel}
    tower = {"name": "esmm", "dim": 4, "tower": {"kind": "mlp", "hidden": [4]}}
    for number in range(1, 6):
        write(tmp_path, number, click_rate=0.4, conversion_rate=0.4, conversion_delay_days=0.5)
    run = run_of(tmp_path, data=data, model=tower, calibrate=None)
    full = run.on(FIRST, full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)

    def unknown(number: int) -> int:
        path = line_of(full).examples_path(f"day={day(number)}")
        return pl.read_parquet(resolve(path) / "part-*.parquet")["@conversion"].null_count()

    prepare_day(run.on(day(4)), say=quiet)
    assert (unknown(3), unknown(4)) == (0, ROWS)
    assert plan(run.on(day(5))).encode == ("day=2026-03-04", "day=2026-03-05")
    prepare_day(run.on(day(5)), say=quiet)
    assert (unknown(4), unknown(5)) == (0, ROWS)
    train_day(run.on(day(5)), say=quiet)
    later = run_of(tmp_path, data=data, model=tower, calibrate=None, daily={"window_days": 2, "observed_days": 1})
    assert later.on(day(5)).data.observed_until == "2026-03-06"


def test_a_training_is_registered_before_another_may_begin(
    begun: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = begun
    registered: list[str] = []
    waiting: list[Thread] = []

    def enter(waits: list[str]) -> None:
        with exclusive(run.output / "training", waits.append):
            pass

    def register(now: Run, *_: Any) -> None:
        waits: list[str] = []
        other = Thread(target=enter, args=(waits,))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert waits
        waiting.append(other)
        registered.append(str(now.key))

    monkeypatch.setattr(pipelines.train_day, "register", register)
    write(folder, 7)
    now = run.on(day(7))
    prepare_day(now, say=quiet)
    train_day(now, say=quiet)
    assert registered == ["2026-03-07"]
    waiting[0].join(10)
    assert not waiting[0].is_alive()


# The gate's days


def promoted(run: Run, number: int) -> Registered:
    """A day's version made the champion, whatever the gate would say."""
    registry = registry_of(run)
    version = registry.of_training(read_manifest(resolve(run.on(day(number)).bundle_path)).version)
    registry.promote(version)
    return version


def test_an_older_model_never_follows_a_newer_one(begun: tuple[Path, Run]) -> None:
    _, run = begun
    champion = promoted(run, 6)
    with pytest.raises(
        Superseded, match="trained to 2026-03-03, the champion to 2026-03-04: a later day has been promo"
    ):
        promote(run.on(day(5)))
    assert registry_of(run).champion() == champion


def test_no_model_is_judged_on_a_day_that_it_has_learned_from(begun: tuple[Path, Run]) -> None:
    _, run = begun
    promoted(run, 5)
    for number, how in ((5, "candidate has been calibrated on days to 2026-03-05"), (4, "candidate has been trained")):
        with pytest.raises(DataError, match=how):
            promote(run.on(day(6)), partition=f"day={day(number)}")


def test_a_version_that_was_rolled_back_stays_back_though_its_step_is_repeated(begun: tuple[Path, Run]) -> None:
    _, run = begun
    promoted(run, 5)
    left = promoted(run, 6)
    restored = rollback(run, say=quiet)
    verdict = promote(run.on(day(6)))
    assert verdict.decision == "refused"
    assert f"version {left.version} was rolled back" in str(verdict.reasons[0])
    champion = registry_of(run).champion()
    assert champion is not None
    assert champion.version == restored.version != left.version


def test_a_day_is_checked_beside_what_the_champion_has_seen(begun: tuple[Path, Run]) -> None:
    _, run = begun
    promoted(run, 5)
    found = check(run, partition="day=2026-03-06", say=quiet)["day=2026-03-06"]
    assert {f.what for f in found} >= {"psi", "unknown", "missing", "label_rate", "volume"}
    assert all(f.verdict != "stop" for f in found)


# Lines


def test_a_full_training_begins_a_line_that_is_followed_once_it_is_promoted(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    full = run.on(day(6), full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)
    assert current_line(run) == Line(run.output / "lines/2026-03-04")
    lenient = {"margins": {"auc": 1, "log_loss": 9, "normalized_entropy": 9, "calibration": 9}, "max_psi": 99}
    far = {"suspicious_auc_gain": 1, "suspicious_entropy_gain": 9, "max_normalized_entropy": 9, "calibration": [0, 99]}
    assert promote(run_of(folder, gate=lenient | far).on(day(6), full=True)).promoted
    assert current_line(run) == Line(run.output / "lines/2026-03-06")
    write(folder, 7)
    now = live(run, 7)
    assert Bundle.load(now.bundle_path).origin.line == "2026-03-06"
    assert line_of(now).days("features") == [day(n) for n in (4, 5, 6, 7)]
    rollback(run, say=quiet)
    assert current_line(run) == Line(run.output / "lines/2026-03-04")


def test_days_before_a_line_or_without_one_are_refused(begun: tuple[Path, Run], tmp_path: Path) -> None:
    _, run = begun
    with pytest.raises(Superseded, match="2026-03-01: line 2026-03-04 begins with the features of 2026-03-02"):
        plan(run.on(day(1)))
    other = run_of(tmp_path / "nothing").on(day(5))
    with pytest.raises(
        DataError, match="there is no model to go on with for 2026-03-05; begin with `recsys prepare --day"
    ):
        plan(other)


def test_changed_features_ask_for_a_full_training(begun: tuple[Path, Run]) -> None:
    folder, _ = begun
    write(folder, 7)
    features = [*tree_of(folder)["features"], {"kind": "vocabulary", "column": "country"}]
    other = run_of(folder, features=features).on(day(7))
    with pytest.raises(DataError, match=r"fitted from other \[\[features\]\] or \[derive\].* train anew with --full"):
        prepare_day(other, say=quiet)
    wider = run_of(folder, model={"name": "fm", "dim": 8}).on(day(7))
    prepare_day(wider, say=quiet)
    with pytest.raises(ArtefactError, match=r"should be \(1, 12\), found \(1, 8\); train from the start"):
        train_day(wider, say=quiet)


# Bad days


def test_yesterdays_files_under_todays_name_are_refused(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    shutil.copytree(folder / "log/day=2026-03-06", folder / "log/day=2026-03-07")
    with pytest.raises(DataError, match="day=2026-03-07: its files are, byte for byte, those of day=2026-03-06"):
        prepare_day(run.on(day(7)), say=quiet)
    assert line_of(run.on(day(7))).days("features")[-1] == day(6)


def test_an_empty_day_and_one_with_another_schema_are_refused(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    write(folder, 7)
    path = folder / "log/day=2026-03-07/part.parquet"
    whole = pl.read_parquet(path)
    for broken, said in (
        (whole.clear(), "no rows for it"),
        (whole.drop("price"), "column 'price' is missing"),
        (whole.with_columns(pl.col("price").cast(pl.String)), "'price' holds text"),
        (whole.with_columns(pl.col("device").str.len_bytes()), "'device' holds integer, but held text"),
    ):
        broken.write_parquet(path)
        with pytest.raises(DataError, match=said):
            prepare_day(run.on(day(7)), say=quiet)
        assert line_of(run.on(day(7))).days("features")[-1] == day(6)
        assert not is_published(line_of(run.on(day(7))).examples_path("day=2026-03-07"))


def test_a_day_without_clicks_is_never_promoted(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    write(folder, 7)
    path = folder / "log/day=2026-03-07/part.parquet"
    pl.read_parquet(path).with_columns(click=pl.lit(0, pl.Int8)).write_parquet(path)
    now = live(run, 7)
    champion = registry_of(now).champion()
    assert promote(now).decision == "refused"
    assert registry_of(now).champion() == champion


def test_a_log_without_days_has_no_daily_mode(tmp_path: Path) -> None:
    data = {**tree_of(tmp_path)["data"], "split": {"train": 0.8, "valid": 0.2}}
    with pytest.raises(ConfigError, match=r"--day needs a log with data\.time, split by day"):
        run_of(tmp_path, data=data).on(FIRST)


def test_a_day_that_a_check_has_stopped_is_not_learned_from_by_a_later_run(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    promoted(run, 5)
    for number in (7, 8):
        write(folder, number)
    path = folder / "log/day=2026-03-07/part.parquet"
    whole = pl.read_parquet(path)
    whole.with_columns(user_id=pl.lit(None, whole.schema["user_id"])).write_parquet(path)
    with pytest.raises(DataError, match="user_id"):
        check(run, partition="day=2026-03-07", say=quiet)
    with pytest.raises(DataError, match=r"day=2026-03-07: its data check said stop: .*user_id"):
        prepare_day(run.on(day(8)), say=quiet)
    whole.write_parquet(path)
    check(run, partition="day=2026-03-07", say=quiet)
    prepare_day(run.on(day(8)), say=quiet)


def test_a_log_without_day_folders_has_a_daily_mode(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for number in range(1, 6):
        settings = SyntheticConfig(rows_per_day=ROWS, users=800, items=200)
        day_frame(settings, day(number)).write_parquet(tmp_path / f"log/{number}.parquet")
    run = run_of(tmp_path, data={**tree_of(tmp_path)["data"], "path": str(tmp_path / "log/*.parquet")})
    full = run.on(FIRST, full=True)
    prepare_day(full, say=quiet)
    train_day(full, say=quiet)
    now = live(run, 5)
    assert line_of(now).days("features") == [day(n) for n in (2, 3, 4, 5)]


def test_a_trained_day_that_is_named_without_log_leaves_no_gap(begun: tuple[Path, Run]) -> None:
    folder, _ = begun
    for number in (7, 8):
        write(folder, number)
    data = {**tree_of(folder)["data"], "without_log": ["2026-03-04"]}
    run = run_of(folder, data=data)
    live(run, 8)
    assert line_of(run.on(day(8))).days("states") == [day(n) for n in (2, 3, 4, 5, 6)]


def test_two_daily_models_do_not_share_a_folder(begun: tuple[Path, Run]) -> None:
    folder, _ = begun
    write(folder, 7)
    other = run_of(folder, name="other").on(day(7))
    with pytest.raises(DataError, match=r"line 2026-03-04 in .* is trained as 'fm', this run is 'other'"):
        train_day(other, say=quiet)


def test_a_registered_day_is_not_registered_again_for_other_settings_of_the_gate(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    now = live(run, 6)
    version = registry_of(now).of_training(Bundle.load(now.bundle_path).version)
    other = run_of(folder, gate={"min_auc": 0.6}).on(day(6))
    assert train_day(other, say=quiet) == version


# Cleaning


def test_cleaning_keeps_what_is_in_use_and_what_the_next_day_needs(begun: tuple[Path, Run]) -> None:
    folder, run = begun
    for number in (7, 8, 9, 10):
        write(folder, number)
        live(run, number)
    score(run.on(day(9)), partition="day=2026-03-05", say=quiet)
    with pytest.raises(ConfigError, match=r"--keep 1: a full training needs 2 days \(daily.window_days\)"):
        clean(run, keep=1, say=quiet)
    assert clean(run, keep=3, say=quiet) > 0
    line = line_of(run.on(day(10)))
    assert line.days("states") == [day(8)]
    assert [d for d in line.days("features") if d >= day(8)] == [day(8), day(9), day(10)]
    assert line.days("examples") == [day(8), day(9), day(10)]
    assert is_published(run.scores_path("day=2026-03-05"))
    assert not is_published(run.on(day(5)).bundle_path)
    champion = registry_of(run).champion()
    assert champion is not None
    registry_of(run).bundle_of(champion).check_golden()
    assert clean(run, keep=3, say=quiet) == 0
    write(folder, 11)
    now = live(run, 11)
    assert Bundle.load(now.bundle_path).origin.trained_to == str(day(9))


def test_a_bundle_that_is_referred_to_outlives_its_day(tmp_path: Path) -> None:
    registry = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "reference_above_mb": 0.0}
    run = begin(tmp_path, mlflow=registry)
    assert promote(run.on(FIRST, full=True)).promoted
    for number in (5, 6, 7, 8):
        write(tmp_path, number)
        live(run, number)
    clean(run, keep=2, say=quiet)
    champion = registry_of(run).champion()
    assert champion is not None
    registry_of(run).bundle_of(champion).check_golden()
    assert is_published(run.on(FIRST, full=True).bundle_path)
    assert [p.name for p in published(run.output / "models/fm/bundles")] == ["day=2026-03-07", "day=2026-03-08"]
