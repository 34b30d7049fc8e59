"""Training: repeats bit for bit, resumes as if never interrupted, keeps the best weights, stops when it should."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import recsys.trainer
from base.errors import ArtefactError, DataError
from base.storage import resolve, versions_of
from features.schema import Dense, NewRows, Schema, Sparse
from recsys import checkpoint
from recsys.bundle import load_model
from recsys.checkpoint import WarmStart
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import Sharded, reset_tables, shard
from recsys.draws import normal_rows
from recsys.models import AutoIntConfig, ModelConfig, build_model
from recsys.models.autoint import AutoInt
from recsys.models.esmm import ESMMConfig
from recsys.models.fm import FMConfig
from recsys.models.lr import LRConfig
from recsys.network import MLPTower
from recsys.sparsity.config import Schedule, Sparsity
from recsys.tensors import load_tensors
from recsys.trainer import Progress, TrainConfig, Trained, run_hash, train
from tests.marks import quick

SCHEMA = Schema(
    keys=(),
    dense=(Dense(name="x"),),
    sparse=(Sparse(name="a", rows=20), Sparse(name="bag", rows=9, multi=True)),
    labels=("click",),
)
# With dropout, so that resuming has something to repeat beside weights and optimizer states.
AUTOINT = AutoIntConfig(dim=4, layers=1, heads=1, attention_dim=4, attention_dropout=0.3, embedding_dropout=0.2)
FAST = TrainConfig(batch_size=100, epochs=3, learning_rate=0.01, table_learning_rate=0.1, threads=1, patience=10)


Array = NDArray[np.float64]


class InterruptionError(Exception):
    pass


def table(rows: int, seed: int, schema: Schema = SCHEMA) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 20, rows)
    probability = 1 / (1 + np.exp(-np.sin(a) * 2))
    return pl.DataFrame(
        {
            "a": pl.Series(a, dtype=pl.Int32),
            "bag": pl.Series(
                [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 3, rows)], dtype=pl.List(pl.Int32)
            ),
            "x": pl.Series(rng.normal(size=rows), dtype=pl.Float32),
            **{f"@{label}": pl.Series(rng.random(rows) < probability).cast(pl.Int8) for label in schema.labels},
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> tuple[ExampleStream, ExampleStream]:
    return streams(tmp_path / "examples")


def streams(
    folder: Path, rows: int = 730, schema: Schema = SCHEMA, **settings: Any
) -> tuple[ExampleStream, ExampleStream]:
    folder.mkdir(parents=True, exist_ok=True)
    table(rows, 1, schema).write_parquet(folder / "fit.parquet", row_group_size=200)
    table(300, 2, schema).write_parquet(folder / "valid.parquet", row_group_size=100)
    fit = ExampleStream((folder / "fit.parquet",), schema, 100, shuffle=True, seed=4, window=2, **settings)
    return fit, ExampleStream((folder / "valid.parquet",), schema, 128)


def run(
    data: tuple[ExampleStream, ExampleStream],
    folder: Path,
    config: TrainConfig = FAST,
    model: ModelConfig = AUTOINT,
    *,
    stop_at: int | None = None,
    **settings: Any,
) -> Trained:
    """Train; with `stop_at`, be interrupted right after that step."""

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise InterruptionError

    return train(model, SCHEMA, *data, config, folder, on_step=on_step, **settings)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def with_config(**changes: Any) -> TrainConfig:
    return FAST.model_copy(update=changes)


# --- repeating -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(data: Any, tmp_path: Path) -> None:
    first, second = (run(data, tmp_path / n) for n in ("a", "b"))
    assert same(first.weights, second.weights)
    assert first.history == second.history
    assert {"embed.tables.embedding_bags.a.weight", "head.weight", "embed.numeric_ND"} <= first.weights.keys()
    assert first.resumed_at == 0


def test_another_seed_gives_other_weights(data: Any, tmp_path: Path) -> None:
    first, second = (run(data, tmp_path / str(s), with_config(seed=s)) for s in (0, 1))
    assert not any(first.weights[name].equal(second.weights[name]) for name in first.weights if "bias" not in name)


def test_history_has_an_entry_per_epoch_and_learns(data: Any, tmp_path: Path) -> None:
    trained = run(data, tmp_path / "state", model=FMConfig(dim=4))
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3]
    per_epoch = data[0].batches_per_epoch(0)
    assert [entry["step"] for entry in trained.history] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    losses = [entry["train_loss"] for entry in trained.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 0.75
    assert losses[-1] < 0.6
    assert {"p_click.auc", "p_click.log_loss", "objective"} <= trained.history[0].keys()
    assert trained.history[-1]["p_click.auc"] > 0.7
    assert trained.rows_per_second > 0


def test_progress_counts_up_to_all_steps(data: Any, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(LRConfig(), SCHEMA, *data, FAST, tmp_path / "state", on_step=seen.append)
    total = 3 * data[0].batches_per_epoch(0)
    assert [p.step for p in seen] == list(range(1, total + 1))
    assert {(p.steps, p.epochs) for p in seen} == {(total, 3)}
    assert [p.epoch for p in seen] == sorted(p.epoch for p in seen)
    assert seen[-1].eta_seconds == 0
    assert all(0 < p.loss < 3 for p in seen)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", quick({f"{n}": n for n in (1, 2, 5, 7, 8, 9, 10, 17, 23)}, "1", "8", "9", "23"))
def test_resumed_anywhere_is_as_if_never_interrupted(stop_at: int, data: Any, tmp_path: Path) -> None:
    """Bit for bit: weights, measurements. 8 batches an epoch, checkpoints every 2 and at its end."""
    config = with_config(checkpoint_every=2)
    whole = run(data, tmp_path / "whole", config)
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", config, stop_at=stop_at)
    resumed = run(data, tmp_path / "state", config)
    epochs, batches = divmod(stop_at - 1, 8)
    assert resumed.resumed_at == epochs * 8 + batches // 2 * 2
    assert resumed.history == whole.history
    assert same(resumed.weights, whole.weights)
    assert resumed.best_epoch == whole.best_epoch
    assert checkpoint.position_of(tmp_path / "state") == checkpoint.position_of(tmp_path / "whole")


def test_interrupted_again_and_again_it_still_arrives(data: Any, tmp_path: Path) -> None:
    config = with_config(checkpoint_every=1)
    whole = run(data, tmp_path / "whole", config)
    for stop_at in (3, 4, 9, 20):
        with pytest.raises(InterruptionError):
            run(data, tmp_path / "state", config, stop_at=stop_at)
    resumed = run(data, tmp_path / "state", config)
    assert resumed.history == whole.history
    assert same(resumed.weights, whole.weights)


def test_a_finished_run_is_not_trained_again(data: Any, tmp_path: Path) -> None:
    first = run(data, tmp_path / "state")
    again = run(data, tmp_path / "state", stop_at=1)
    assert same(first.weights, again.weights)
    assert again.history == first.history
    assert again.resumed_at == 3 * data[0].batches_per_epoch(0)


CHANGES: dict[str, dict[str, Any]] = {
    name: {name: value}
    for name, value in {
        **{"seed": 1, "learning_rate": 0.02, "table_learning_rate": 0.2, "table_accumulator": 0.1},
        **{"table_accumulator_decay": 0.5, "table_l2": 0.1, "epochs": 4, "batch_size": 99, "threads": 2},
    }.items()
}


def test_every_change_is_another_training() -> None:
    runs = {run_hash(AUTOINT, SCHEMA, with_config(**change), "") for change in ({}, *CHANGES.values())}
    assert len(runs) == len(CHANGES) + 1


@pytest.mark.parametrize("change", quick(CHANGES, "table_l2", "epochs"))
def test_another_configuration_starts_from_the_beginning(change: dict[str, Any], data: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=1), stop_at=5)
    changed = with_config(**change)
    resumed = run(data, tmp_path / "state", changed)
    assert resumed.resumed_at == 0
    assert same(resumed.weights, run(data, tmp_path / "other", changed).weights)
    torch.set_num_threads(1)


def test_another_model_schema_or_data_starts_from_the_beginning(data: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=1), stop_at=5, identity="monday")
    assert run(data, tmp_path / "state", stop_at=None, identity="tuesday").resumed_at == 0
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=1), stop_at=5)
    wider = AUTOINT.model_copy(update={"dim": 8})
    assert run(data, tmp_path / "state", model=wider).resumed_at == 0
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=1), stop_at=5)
    larger = SCHEMA.model_copy(update={"sparse": (Sparse(name="a", rows=21), SCHEMA.sparse[1])})
    assert train(AUTOINT, larger, *data, FAST, tmp_path / "state").resumed_at == 0


def test_how_often_checkpoints_are_made_may_change(data: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=3), stop_at=5)
    resumed = run(data, tmp_path / "state", with_config(checkpoint_every=500))
    assert resumed.resumed_at == 3
    assert same(resumed.weights, run(data, tmp_path / "whole").weights)


def test_an_altered_checkpoint_is_refused_by_name(data: Any, tmp_path: Path) -> None:
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", with_config(checkpoint_every=2), stop_at=5)
    folder = resolve(tmp_path / "state/checkpoint", "checkpoint")
    assert {p.parent.name for p in folder.rglob("*.safetensors")} == {"weights", "table_states", "dense_states"}
    path = folder / "table_states/small.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtefactError, match=r"table_states/small\.safetensors: differs from its checksum"):
        run(data, tmp_path / "state", with_config(checkpoint_every=2))


def test_old_weights_and_checkpoints_are_cleared_away(data: Any, tmp_path: Path) -> None:
    trained = run(data, tmp_path / "state", with_config(epochs=6, checkpoint_every=2))
    assert len(versions_of(tmp_path / "state/checkpoint")) == 1
    assert len(versions_of(tmp_path / "state/best")) <= 2
    position = checkpoint.position_of(tmp_path / "state")
    assert position is not None
    assert position.finished
    assert position.best is not None
    assert same(load_tensors(checkpoint.best_of(tmp_path / "state", position.best) / "weights"), trained.weights)
    with pytest.raises(ArtefactError, match="version 0123 is gone"):
        checkpoint.best_of(tmp_path / "state", "0123")
    assert checkpoint.position_of(tmp_path / "nothing") is None


# --- the best epoch, and when to stop --------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every evaluation give the next of these numbers, and notes the weights it was made of."""

    whole, predict = recsys.trainer.headline, recsys.trainer.predict

    def script(*objectives: float, metric: str = "log_loss") -> list[dict[str, Tensor]]:
        left, seen = list(objectives), []

        def headline(*arguments: Any) -> dict[str, float]:
            return {**whole(*arguments), metric: left.pop(0)}

        def noted(module: Any, model: Any, *rest: Any) -> pl.DataFrame:
            dense = {n: p for n, p in module.named_parameters() if ".tables." not in n}
            seen.append({n: p.detach().clone() for n, p in dense.items()})
            return predict(module, model, *rest)

        monkeypatch.setattr(recsys.trainer, "headline", headline)
        monkeypatch.setattr(recsys.trainer, "predict", noted)
        return seen

    return script


def test_the_best_epochs_weights_are_kept(scripted: Any, data: Any, tmp_path: Path) -> None:
    seen = scripted(0.6, 0.5, 0.55, 0.52)
    trained = run(data, tmp_path / "state", with_config(epochs=4))
    assert trained.best_epoch == 2
    assert [h["objective"] for h in trained.history] == [0.6, 0.5, 0.55, 0.52]
    assert "head.weight" in seen[0]
    for name in seen[0]:
        assert trained.weights[name].equal(seen[1][name]), name
        assert not trained.weights[name].equal(seen[3][name]), name


def test_training_stops_when_patience_is_over(scripted: Any, data: Any, tmp_path: Path) -> None:
    scripted(0.6, 0.5, 0.55, 0.5, 0.4)
    trained = run(data, tmp_path / "state", with_config(epochs=9, patience=2))
    assert len(trained.history) == 4  # an equal is no improvement
    assert trained.best_epoch == 2
    scripted(0.6, 0.5, 0.55, 0.49, 0.51, 0.52, 0.1)
    later = run(data, tmp_path / "later", with_config(epochs=9, patience=2))
    assert [len(later.history), later.best_epoch] == [6, 4]


def test_an_auc_is_better_when_larger(scripted: Any, data: Any, tmp_path: Path) -> None:
    scripted(0.6, 0.7, 0.65, metric="auc")
    trained = run(data, tmp_path / "state", with_config(monitor="auc"))
    assert trained.best_epoch == 2
    assert [h["objective"] for h in trained.history] == [-0.6, -0.7, -0.65]


def test_the_best_survives_an_interruption(scripted: Any, data: Any, tmp_path: Path) -> None:
    seen = scripted(0.5, 0.6, 0.7)
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", stop_at=20)
    trained = run(data, tmp_path / "state")
    assert trained.best_epoch == 1
    assert trained.weights["head.weight"].equal(seen[0]["head.weight"])


def test_learning_rates_decay_on_a_plateau(scripted: Any, data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    scripted(0.6, 0.7, 0.5, 0.5, 0.4)
    rates: list[tuple[float, float]] = []
    set_rates = recsys.trainer._set_rates

    def noted(sharded: Any, optimizer: Any, *rest: Any) -> None:
        set_rates(sharded, optimizer, *rest)
        table_rate = {group["lr"] for group in sharded.module.fused_optimizer.param_groups}
        dense_rate = {group["lr"] for group in optimizer.param_groups}
        rates.append((*table_rate, *dense_rate))

    monkeypatch.setattr(recsys.trainer, "_set_rates", noted)
    run(data, tmp_path / "state", with_config(epochs=5, decay_on_plateau=0.5))
    assert rates == [(0.1, 0.01), (0.1, 0.01), (0.05, 0.005), (0.05, 0.005), (0.025, 0.0025)]


def test_a_decayed_rate_reaches_the_tables(scripted: Any, data: Any, tmp_path: Path) -> None:
    """The kernel itself moves less: after a plateau with rate 0.1 * 1e-6, tables stand still."""

    def tables(trained: Trained) -> Tensor:
        return trained.weights["embed.tables.embedding_bags.a.weight"]

    scripted(0.6, 0.7, 0.5)  # the third epoch, after a plateau, is the best
    still = tables(run(data, tmp_path / "a", with_config(decay_on_plateau=1e-6)))
    scripted(0.7, 0.6)
    second = tables(run(data, tmp_path / "b", with_config(epochs=2)))
    torch.testing.assert_close(still, second, atol=1e-5, rtol=0)
    scripted(0.6, 0.7, 0.5)
    assert (tables(run(data, tmp_path / "c", with_config(decay_on_plateau=1.0))) - second).abs().max() > 0.01


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_error(data: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the loss became (nan|inf) at step \d+: lower train\.table_learning_rate"):
        run(data, tmp_path / "state", with_config(learning_rate=1e30, table_learning_rate=1e30, epochs=5))


def test_too_few_rows_are_an_error(tmp_path: Path) -> None:
    for fit_rows, valid_rows in ((0, 300), (730, 0)):
        folder = tmp_path / f"{fit_rows}"
        fit, valid = streams(folder)
        table(730, 1).head(fit_rows).write_parquet(folder / "fit.parquet")
        table(300, 2).head(valid_rows).write_parquet(folder / "valid.parquet")
        with pytest.raises(DataError, match=f"{fit_rows} training and {valid_rows} validation rows"):
            run((fit, valid), folder / "state")


@pytest.mark.parametrize("monitor", ["auc", "log_loss"])
@pytest.mark.parametrize("only", [0, 1])
def test_validation_rows_of_one_class(monitor: Any, only: int, tmp_path: Path) -> None:
    fit, valid = streams(tmp_path / "examples")
    table(300, 2).with_columns(pl.lit(only, pl.Int8).alias("@click")).write_parquet(tmp_path / "examples/valid.parquet")
    with pytest.raises(DataError, match="label 'click': the validation rows, all impressions, hold one class only"):
        run((fit, valid), tmp_path / "state", with_config(monitor=monitor))


def test_validation_rows_of_clicks_that_none_followed(tmp_path: Path) -> None:
    """The conversion is asked of the clicked rows, and the error says so."""
    fit, valid = funnel_streams(tmp_path / "examples")
    path = tmp_path / "examples/valid.parquet"
    pl.read_parquet(path).with_columns(pl.lit(0, pl.Int8).alias("@buy")).write_parquet(path)
    with pytest.raises(DataError, match="label 'buy': the validation rows, rows with click, hold one class only"):
        train(ESMM, FUNNEL, fit, valid, FAST, tmp_path / "state")


# --- several labels --------------------------------------------------------------------------------------------------

FUNNEL = SCHEMA.model_copy(update={"labels": ("click", "buy"), "funnel": ("click", "buy")})
ESMM = ESMMConfig(dim=4, tower=MLPTower(hidden=(8,), dropout=0.2))


def funnel_streams(
    folder: Path, schema: Schema = FUNNEL, unknown: float = 0.2, **settings: Any
) -> tuple[ExampleStream, ExampleStream]:
    """Of a share of the rows the conversion is not known yet."""
    made = streams(folder, schema=schema, **settings)
    rng = np.random.default_rng(6)
    for name in ("fit", "valid"):
        path = folder / f"{name}.parquet"
        frame = pl.read_parquet(path).with_columns(pl.col("@buy") * pl.col("@click"))
        known = pl.Series(rng.random(frame.height) >= unknown)
        frame.with_columns(pl.when(known).then("@buy")).write_parquet(path, row_group_size=150)
    return made


def test_conversions_are_measured_where_they_are_known_and_asked(tmp_path: Path) -> None:
    fit, valid = funnel_streams(tmp_path / "examples")
    trained = train(ESMM, FUNNEL, fit, valid, FAST, tmp_path / "state")
    last = trained.history[-1]
    outputs = ("p_click", "p_buy_given_click", "p_click_and_buy")
    assert {f"{o}.{m}" for o in outputs for m in ("auc", "log_loss", "calibration_ratio")} <= last.keys()
    assert last["objective"] == pytest.approx(np.mean([last[f"{o}.log_loss"] for o in outputs]))
    model = load_model(ESMM, FUNNEL, trained.weights, where=tmp_path)
    scored = recsys.trainer.predict(model, model, valid, torch.device("cpu"))
    raw = pl.read_parquet(tmp_path / "examples/valid.parquet")
    for label in ("click", "buy"):
        assert scored[label].cast(pl.Int8).to_list() == raw[f"@{label}"].to_list()
    clicked = scored.filter(pl.col("click") == 1).drop_nulls("buy")
    assert 0 < clicked.height < scored["click"].sum()
    p, y = clicked["p_buy_given_click"].to_numpy(), clicked["buy"].to_numpy()
    best = trained.history[trained.best_epoch - 1]
    expected = -np.where(y == 1, np.log(p), np.log(1 - p)).mean()
    assert best["p_buy_given_click.log_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stop_at", quick({f"{n}": n for n in (1, 5, 6, 9)}, "6", "9"))
def test_a_sampled_run_resumes_as_if_never_interrupted(stop_at: int, tmp_path: Path) -> None:
    """Which rows are left out follows from seed and epoch alone."""
    schema = FUNNEL.model_copy(update={"negative_rate": 0.3})
    data = funnel_streams(tmp_path / "examples", schema, rows=750, sampled=True)
    steps = [data[0].batches_per_epoch(epoch) for epoch in range(3)]
    assert all(4 <= n < 8 for n in steps)
    config = with_config(checkpoint_every=2)

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise InterruptionError

    whole = train(ESMM, schema, *data, config, tmp_path / "whole")
    assert [entry["step"] for entry in whole.history] == np.cumsum(steps).tolist()
    with pytest.raises(InterruptionError):
        train(ESMM, schema, *data, config, tmp_path / "state", on_step=on_step)
    resumed = train(ESMM, schema, *data, config, tmp_path / "state")
    assert resumed.resumed_at == max(
        [c for c in (0, steps[0], sum(steps[:2])) if c < stop_at]
        + [start + n for start in (0, steps[0]) for n in (2, 4) if start + n < stop_at and n < steps[0]]
    )
    assert resumed.history == whole.history
    assert same(resumed.weights, whole.weights)
    other = schema.model_copy(update={"negative_rate": 0.31})
    again = train(ESMM, other, *funnel_streams(tmp_path / "other", other, sampled=True), config, tmp_path / "state")
    assert again.resumed_at == 0  # the rate is part of what decides the outcome


def test_a_model_of_sampled_clicks_predicts_the_rate_of_all(tmp_path: Path) -> None:
    """Trained on one non-click in ten, p_click adds up to the truth within 5 %; uncorrected to more than thrice it."""
    rng = np.random.default_rng(0)
    effect = np.linspace(-3.2, -1.2, 20)

    def table(rows: int, name: str) -> Array:
        a = rng.integers(0, 20, rows)
        truth_R = 1 / (1 + np.exp(-effect[a]))
        frame = pl.DataFrame({"a": a, "@click": rng.random(rows) < truth_R}).cast({"a": pl.Int32, "@click": pl.Int8})
        frame.write_parquet(tmp_path / name, row_group_size=10_000)
        return truth_R

    schema = Schema(keys=(), dense=(), sparse=(Sparse(name="a", rows=20),), labels=("click",), negative_rate=0.1)
    table(100_000, "fit.parquet")
    truth_R = table(20_000, "valid.parquet")
    fit = ExampleStream((tmp_path / "fit.parquet",), schema, 200, shuffle=True, sampled=True)
    valid = ExampleStream((tmp_path / "valid.parquet",), schema, 5_000)
    config = with_config(batch_size=200, epochs=2, learning_rate=0.01)
    trained = train(LRConfig(), schema, fit, valid, config, tmp_path / "state")
    assert trained.history[-1]["step"] < 2 * 110  # of 500 batches with all rows
    plain = schema.model_copy(update={"negative_rate": 1.0})
    ratios: list[float] = []
    for contract in (schema, plain):
        model = load_model(LRConfig(), contract, trained.weights, where=tmp_path)
        p_R = recsys.trainer.predict(model, model, valid, torch.device("cpu"))["p_click"].to_numpy()
        ratios.append(float(p_R.mean() / truth_R.mean()))
        assert np.corrcoef(p_R, truth_R)[0, 1] > 0.9
    assert ratios[0] == pytest.approx(1, abs=0.05)
    assert ratios[1] > 3
    best = trained.history[trained.best_epoch - 1]
    assert best["p_click.calibration_ratio"] == pytest.approx(ratios[0], abs=0.06)  # what training reports is corrected


# --- other settings --------------------------------------------------------------------------------------------------


def test_two_labels_are_learned_together(tmp_path: Path) -> None:
    schema = SCHEMA.model_copy(update={"labels": ("click", "like")})
    fit, valid = streams(tmp_path / "examples", schema=schema)
    trained = train(FMConfig(dim=4), schema, fit, valid, FAST, tmp_path / "state")
    last = trained.history[-1]
    assert {"p_click.auc", "p_like.auc", "p_click.log_loss", "p_like.log_loss"} <= last.keys()
    assert last["objective"] == pytest.approx((last["p_click.log_loss"] + last["p_like.log_loss"]) / 2)
    assert min(last["p_click.auc"], last["p_like.auc"]) > 0.7


def test_adagrad_may_begin_with_more_than_it_has_seen(data: Any, tmp_path: Path) -> None:
    """From 0 a row's first step has the learning rate's size; from much it is by its gradient, and small."""

    def moved(accumulator: float) -> Tensor:
        model = build_model(LRConfig(), SCHEMA, table_device="meta")
        sharded = shard(model, torch.device("cpu"), {"lr": 0.1, "eps": 1e-8}, batch_size=100)
        reset_tables(sharded, 0, accumulator)
        table_of_a = sharded.tables["a"]
        assert table_of_a.state_R.eq(accumulator).all()
        batch = next(data[0].epoch(0))
        model.loss(sharded.module(batch), batch.labels_BT).backward()
        return table_of_a.weights_RD[:, 0].abs()

    free, held = moved(0.0), moved(4.0)
    seen = free > 0
    assert seen.sum() > 10
    torch.testing.assert_close(free[seen], torch.full_like(free[seen], 0.2))  # the weight is one of four in its row
    assert held[seen].max() < 0.01
    with_less, with_more = (
        run(data, tmp_path / str(n), with_config(table_accumulator=n), LRConfig()).weights for n in (0.0, 4.0)
    )
    table_name = "embed.tables.embedding_bags.a.weight"
    assert with_more[table_name].abs().mean() < 0.3 * with_less[table_name].abs().mean()


FULL = {s: Sparsity(density=1.0, state=s, schedule=Schedule(grow="none")) for s in ("row", "element")}
"""Sparse tables that hold every weight."""


def after_a_step(sparsity: Sparsity | None, data: Any) -> Sharded:
    model = build_model(FMConfig(dim=7), SCHEMA, table_device="meta", sparsity=sparsity)
    sharded = shard(model, torch.device("cpu"), {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 0)
    batch = next(data[0].epoch(0))
    model.loss(sharded.module(batch), batch.labels_BT).backward()
    return sharded


def test_rows_of_unknown_ids_can_be_silenced() -> None:
    model = build_model(FMConfig(dim=8), SCHEMA, table_device="meta")
    sharded = shard(model, torch.device("cpu"), {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 0)
    sharded.silence_unknown()
    for table in sharded.tables.values():
        assert not table.weights_RD[0].any()
        assert table.weights_RD[1:].any(1).all()


@pytest.mark.parametrize("sparsity", [None, FULL["element"]])
def test_l2_of_tables_moves_each_row_at_its_own_rate(sparsity: Sparsity | None, data: Any) -> None:
    sharded = after_a_step(sparsity, data)
    before = [(weights.double().clone(), sums.double().clone()) for weights, sums in sharded._tables()]
    sharded.decay_tables(0.003)
    for (weights, _), (old, sums) in zip(sharded._tables(), before, strict=True):
        rate = torch.where(sums > 0, torch.exp(-0.003 / sums.sqrt()), 1.0)
        assert (rate < 0.99).any()
        torch.testing.assert_close(weights.double(), old * (rate if rate.ndim == 2 else rate[:, None]))


def test_l2_of_tables_comes_to_rest_where_the_losses_slope_is_minus_lambda_w(data: Any) -> None:
    """On one batch over and over, of which rows have different shares."""
    model = build_model(LRConfig(), SCHEMA, table_device="meta")
    sharded = shard(model, torch.device("cpu"), {"lr": 0.5, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 0)
    batch, table = next(data[0].epoch(0)), sharded.tables["a"]
    assert len(batch.sparse["a"].values().bincount().unique()) > 3
    for _ in range(1500):
        before_R = table.weights_RD[:, 0].clone()
        sums_R = table.state_R.clone()
        model.loss(sharded.module(batch), batch.labels_BT).backward()
        slope_R = (before_R - table.weights_RD[:, 0]) * table.state_R.sqrt() / 0.5
        sharded.decay_tables(0.01 * 0.5)
    seen_R = sums_R > 0
    assert before_R[seen_R].abs().max() > 0.1
    torch.testing.assert_close(slope_R[seen_R], -0.01 * before_R[seen_R], atol=3e-4, rtol=0.02)


@pytest.mark.parametrize("sparsity", [None, *FULL.values()])
def test_adagrads_sums_decay_and_weights_stay(sparsity: Sparsity | None, data: Any) -> None:
    sharded = after_a_step(sparsity, data)
    before = [(weights.clone(), sums.clone()) for weights, sums in sharded._tables()]
    assert any(sums.any() for _, sums in before)
    sharded.decay_sums(0.25)
    for (weights, sums), (old_weights, old_sums) in zip(sharded._tables(), before, strict=True):
        assert torch.equal(weights, old_weights)
        assert torch.equal(sums, old_sums * 0.25)


def test_an_epoch_leaves_its_share_of_adagrads_sums(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    monkeypatch.setattr(Sharded, "decay_sums", lambda _, factor: left.append(factor))
    run(data, tmp_path / "state", with_config(epochs=7, table_accumulator_decay=0.5))
    assert len(left) == 2  # of 56 steps, 8 an epoch, the shares of 50
    assert math.prod(left) == pytest.approx(0.5 ** (50 / 8))
    run(data, tmp_path / "other", with_config(epochs=4))
    assert len(left) == 2


def test_a_row_moves_further_where_adagrad_forgets(data: Any, tmp_path: Path) -> None:
    def moved(decay: float) -> float:
        """How far the table of a is from where it began, over epochs of which none is measured."""
        config = with_config(epochs=10, table_accumulator_decay=decay)
        streams = (data[0], None)
        weights = train(LRConfig(), SCHEMA, *streams, config, tmp_path / str(decay)).weights
        return float(weights["embed.tables.embedding_bags.a.weight"].abs().sum())

    assert moved(0.1) > 1.2 * moved(1.0)


def test_weight_decay_shrinks_dense_weights(data: Any, tmp_path: Path) -> None:
    def size(trained: Trained) -> float:
        return float(sum(w.square().sum() for n, w in trained.weights.items() if ".tables." not in n))

    free, held = (run(data, tmp_path / str(d), with_config(weight_decay=d)) for d in (0.0, 0.3))
    assert size(held) < 0.8 * size(free)


def test_evaluation_is_without_dropout(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    predict = recsys.trainer.predict

    def noted(module: Any, *rest: Any) -> pl.DataFrame:
        modes.append(any(m.training for m in module.modules()))
        return predict(module, *rest)

    monkeypatch.setattr(recsys.trainer, "predict", noted)
    steps: list[bool] = []
    loss = AutoInt.loss

    def watched(self: AutoInt, *rest: Any) -> Tensor:
        steps.append(self.training)
        return loss(self, *rest)

    monkeypatch.setattr(AutoInt, "loss", watched)
    run(data, tmp_path / "state")
    assert modes == [False] * 3
    assert steps == [True] * 24


# --- warm starts -----------------------------------------------------------------------------------------------------


def grown(schema: Schema, more: int) -> Schema:
    return schema.model_copy(
        update={"sparse": tuple(f.model_copy(update={"rows": f.rows + more}) for f in schema.sparse)}
    )


def start(schema: Schema, warm: WarmStart, model: ModelConfig = AUTOINT, seed: int = 0) -> Any:
    """A sharded model that was started from an earlier state, and its optimizer."""
    torch.manual_seed(seed)
    sharded = shard(build_model(model, schema, table_device="meta"), CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    optimizer = torch.optim.Adam(sharded.dense.values())
    reset_tables(sharded, seed)
    checkpoint.start_from(warm, sharded, optimizer, seed=seed, accumulator=0.25)
    return sharded, optimizer


FRESH = {"a": np.array([3, 20, 21], dtype=np.int64), "bag": np.array([9, 10], dtype=np.int64)}


@pytest.mark.parametrize("rule", ["mean", "hash"])
@pytest.mark.parametrize("model", [AUTOINT, ESMMConfig(dim=4, tower=MLPTower(hidden=(4,)), shared_embeddings=False)])
def test_a_warm_start_carries_known_rows_to_the_bit_and_begins_new_ones_by_the_rule(
    model: ModelConfig, rule: NewRows, tmp_path: Path
) -> None:
    esmm = isinstance(model, ESMMConfig)
    schema = FUNNEL if esmm else SCHEMA
    path = tmp_path / "day.parquet"
    table(400, 1, schema).write_parquet(path)
    trained = train(model, schema, ExampleStream((path,), schema, 100), None, FAST, tmp_path / "state")
    warm = WarmStart(trained.state, FRESH, new_rows=rule, accumulator_decay=0.5)
    sharded, optimizer = start(grown(schema, 2), warm, model)
    sums = load_tensors(trained.state / "table_states")
    for name, now in sharded.tables.items():
        before, fresh = trained.weights[checkpoint.TABLE.format(name)], FRESH[name.partition("@")[0]]
        kept = np.setdiff1d(np.arange(len(before)), fresh)
        assert torch.equal(now.weights_RD[kept], before[kept])
        assert torch.equal(now.state_R[kept], sums[name][kept] * 0.5)
        assert (now.state_R[fresh] == 0.25).all()
        if rule == "mean":
            assert torch.equal(now.weights_RD[fresh], before[kept[1:]].mean(0).expand(len(fresh), -1))
        else:
            assert now.weights_RD[fresh].unique().numel() == len(fresh) * before.shape[1]
    for name, parameter in sharded.dense.items():
        assert torch.equal(parameter, trained.weights[name])
        assert optimizer.state[parameter]["step"] > 0


def test_a_drawn_row_follows_from_its_number_alone() -> None:
    many = normal_rows(torch.arange(50_000), 8, 7)
    assert torch.equal(normal_rows(torch.tensor([41, 7]), 8, 7), many[[41, 7]])
    assert not torch.equal(normal_rows(torch.tensor([41, 7]), 8, 8), many[[41, 7]])
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    assert abs(float(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1])) < 0.02


def test_growth_that_the_fresh_rows_do_not_explain_is_refused(data: Any, tmp_path: Path) -> None:
    trained = run(data, tmp_path / "state")
    with pytest.raises(
        ArtefactError, match=r"table 'a' holds \(20, 4\), the model needs \(22, 4\) of which 1 rows are new"
    ):
        start(grown(SCHEMA, 2), WarmStart(trained.state, {**FRESH, "a": np.array([20])}))
    with pytest.raises(ArtefactError, match="train from the start"):
        start(SCHEMA, WarmStart(trained.state, {"a": np.array([]), "bag": np.array([])}), AutoIntConfig(dim=8))


def test_going_on_from_a_state_is_going_on(data: Any, tmp_path: Path) -> None:
    """Two epochs are one epoch and, from its state, another: the same steps on the same rows."""
    plain = replace(data[0], shuffle=False)
    model = AUTOINT.model_copy(update={"attention_dropout": 0.0, "embedding_dropout": 0.0})
    once = FAST.model_copy(update={"epochs": 1})
    twice = train(model, SCHEMA, plain, None, FAST.model_copy(update={"epochs": 2}), tmp_path / "two")
    first = train(model, SCHEMA, plain, None, once, tmp_path / "one")
    warm = WarmStart(first.state, {"a": np.array([], np.int64), "bag": np.array([], np.int64)})
    second = train(model, SCHEMA, plain, None, once, tmp_path / "again", warm=warm, identity="again")
    assert same(second.weights, twice.weights)
    assert not same(second.weights, first.weights)
    assert second.best_epoch == 1
    assert "objective" not in second.history[0]
