"""Sparse model soup through the train verb: its members, whether their mean is taken, and what a kill changes."""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys.sparsity.soup
from base.config import parse_config
from base.errors import ConfigError
from base.storage import resolve
from features.pipeline import FittedPipeline
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines.config import Run
from pipelines.examples import examples_of
from pipelines.prepare import prepare
from pipelines.train import fit_window, train
from pipelines.train_day import train_day
from recsys import checkpoint
from recsys.bundle import Bundle, load_model
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.metrics import evaluate
from recsys.sparsity.config import Soup, Sparsity
from recsys.tensors import load_tensors
from recsys.trainer import Progress, Trained, predict
from tests.marks import quick
from tests.pipelines import test_retrieval

SPARSITY = {"density": 0.5, "schedule": {"interval": 4, "window": 2}}
SOUP = {"members": 3, "epochs": 2}
STEPS, EPOCHS = 6, 3
"""Of an epoch; of the training that comes before."""
TABLES = "embed.tables."


class Killed(Exception):  # noqa: N818
    pass


def quiet(_: str) -> None:
    """Says nothing."""


def read(run: Run) -> Run:
    prepare(run, say=quiet)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Prepared; without a soup."""
    folder = tmp_path_factory.mktemp("soup")
    config = SyntheticConfig(rows_per_day=750, users=300, items=120)
    for i in range(4):
        day = config.start + timedelta(days=i)
        (folder / f"log/day={day}").mkdir(parents=True)
        day_frame(config, day).drop("day").write_parquet(folder / f"log/day={day}/part.parquet")
    tree = {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": {"click": "click"},
            "time": "day",
            "split": {"train": "2026-03-01..2026-03-02", "valid": "2026-03-03", "test": "2026-03-04"},
        },
        "features": [
            *({"kind": "vocabulary", "column": c} for c in ("device", "category", "item_id")),
            {"kind": "vocabulary", "column": "tags", "multi": True},
        ],
        "model": {"name": "autoint", "dim": 8, "layers": 1, "heads": 1, "attention_dim": 4, "attention_dropout": 0.1},
        "sparsity": SPARSITY,
        "train": {"batch_size": 256, "epochs": EPOCHS, "threads": 1, "checkpoint_every": 1, "patience": 9},
    }
    return read(parse_config(Run, tree, source="test"))


def called(run: Run, name: str, soup: dict[str, Any] | None = SOUP, **sparsity: Any) -> Run:
    """The same run with a folder of its own."""
    found = Sparsity.model_validate({**SPARSITY, **sparsity, "soup": soup})
    return run.model_copy(update={"name": name, "sparsity": found})


def trained(run: Run, *, stop_at: int | None = None) -> tuple[Trained, list[Progress]]:
    """The verb's training, and its steps; with `stop_at`, killed after so many."""
    steps: list[Progress] = []

    def on_step(progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == stop_at:
            raise Killed

    fitted = FittedPipeline.load(resolve(run.features_path))
    return fit_window(run, fitted, run.examples_path, on_step=on_step)[0], steps


def of_member(run: Run, number: int) -> dict[str, Tensor]:
    """Weights that a member ended with."""
    state = run.folder / f"training/soup-{number}"
    return load_tensors(checkpoint.best_of(state, str(checkpoint.stands_at(state).best)) / "weights")


def mean_of(run: Run) -> dict[str, Tensor]:
    """Of the members' weights in double precision."""
    assert run.sparsity is not None
    assert run.sparsity.soup is not None
    members = [of_member(run, n + 1) for n in range(run.sparsity.soup.members)]
    return {
        name: torch.stack([m[name].double() for m in members]).mean(0).float() if t.is_floating_point() else t
        for name, t in members[0].items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n].float(), b[n].float(), rtol=1e-6, atol=1e-7) for n in a)


def bias(by: float) -> Callable[..., dict[str, float]]:
    """What measures a mean, with so much added to its objective."""
    exact = recsys.sparsity.soup.measured

    def found(*arguments: Any) -> dict[str, float]:
        figures = exact(*arguments)
        return figures | {"objective": figures["objective"] + by}

    return found


# --- the members ------------------------------------------------------------------------------------------------------


def test_members_go_on_from_the_best_weights_with_their_mask_and_differ(run: Run) -> None:
    mine = called(run, "members")
    found, steps = trained(mine)
    assert [p.step for p in steps] == [*range(1, EPOCHS * STEPS + 1), *[*range(1, 2 * STEPS + 1)] * 3]
    before = load_tensors(found.state / "weights")
    members = [of_member(mine, n) for n in (1, 2, 3)]
    values = [n for n in before if n.startswith(f"{TABLES}values")]
    assert values
    for number, member in enumerate(members):
        assert member.keys() == before.keys()
        for name in before:
            if name in values:
                others = [before, *members[:number]]
                assert all((member[name] != o[name]).float().mean() > 0.5 for o in others)
            elif name.startswith(TABLES):
                assert member[name].equal(before[name])  # sizes, positions
        near = sum(float((member[n] - before[n]).square().sum()) for n in values)
        assert near < sum(float(before[n].square().sum()) for n in values)  # not from nothing


# --- the mean ---------------------------------------------------------------------------------------------------------


def log_loss(run: Run, weights: dict[str, Tensor]) -> float:
    """On the validation rows."""
    fitted = FittedPipeline.load(resolve(run.features_path))
    schema = run.schema_of(fitted)
    files = tuple(examples_of(run, run.source.partitions("valid"), fitted, run.examples_path))
    model = load_model(run.model, schema, weights, where=Path("mean"), sparsity=run.sparsity)
    scored = predict(model, model, ExampleStream(files, schema, 256), CPU)
    return float(evaluate(scored, model.outputs)["log_loss"][0])


def test_the_mean_is_measured_on_the_validation_rows_and_taken_only_if_better(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = called(run, "mean")
    found, _ = trained(mine)
    mean, before = mean_of(mine), load_tensors(found.state / "weights")
    best = found.history[found.best_epoch - 1]
    assert found.history[-1]["soup_objective"] == pytest.approx(log_loss(mine, mean), rel=1e-5)
    assert best["objective"] == pytest.approx(log_loss(mine, before), rel=1e-5)
    better = found.history[-1]["soup_objective"] < best["objective"]
    assert close(found.weights, mean if better else before)
    for by, taken in ((-10.0, mean), (10.0, before)):
        monkeypatch.setattr(recsys.sparsity.soup, "measured", bias(by))
        again, steps = trained(mine)
        assert steps == []  # all is trained
        assert close(again.weights, taken)
        monkeypatch.undo()
    assert not close(mean, before)
    assert [{k: v for k, v in e.items() if k != "soup_objective"} for e in found.history] == [
        {k: v for k, v in e.items() if k != "soup_objective"} for e in again.history
    ]


@pytest.mark.parametrize("by", [-10.0, 10.0])
def test_the_bundle_has_the_weights_that_were_taken(run: Run, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = called(run, "mean")
    monkeypatch.setattr(recsys.sparsity.soup, "measured", bias(by))
    found = train(mine, say=quiet)
    bundle = Bundle.load(mine.bundle_path)
    wanted = mean_of(mine) if by < 0 else load_tensors(found.state / "weights")
    assert close(dict(bundle.model.state_dict()), wanted)
    assert bundle.metrics["history"][-1]["soup_objective"] == found.history[-1]["soup_objective"]
    assert bundle.sparsity == mine.sparsity


# --- killed, and run again --------------------------------------------------------------------------------------------


DONE = {"first step": 1, "first done": 2 * STEPS - 1, "in the second": 2 * STEPS + 5, "third begun": 4 * STEPS + 1}


@pytest.mark.parametrize("done", quick(DONE, "first step", "in the second"))
def test_killed_in_a_member_and_resumed_it_is_as_if_never_killed(run: Run, done: int) -> None:
    whole, mine = called(run, "whole"), called(run, f"killed-{done}")
    expected, _ = trained(whole)
    with pytest.raises(Killed):
        trained(mine, stop_at=EPOCHS * STEPS + done)
    found, steps = trained(mine)
    assert len(steps) == 3 * 2 * STEPS - done + 1  # the last step before was not in a checkpoint yet
    assert same(found.weights, expected.weights)
    assert found.history == expected.history
    assert all(same(of_member(mine, n), of_member(whole, n)) for n in (1, 2, 3))


def test_a_finished_training_can_have_a_soup_later(run: Run) -> None:
    expected, _ = trained(called(run, "whole"))
    plain, steps = trained(called(run, "later", None))
    assert len(steps) == EPOCHS * STEPS
    assert "soup_objective" not in plain.history[-1]
    found, steps = trained(called(run, "later"))
    assert len(steps) == 3 * 2 * STEPS
    assert same(found.weights, expected.weights)
    more, steps = trained(called(run, "later", {"members": 4, "epochs": 2}))
    assert len(steps) == 2 * STEPS
    assert more.history[-1]["soup_objective"] != found.history[-1]["soup_objective"]


def test_members_of_an_earlier_training_are_no_obstacle(run: Run) -> None:
    """Of another density, and of other settings: they are neither resumed nor refused, and not in the mean."""
    with pytest.raises(Killed):
        trained(called(run, "changed"), stop_at=EPOCHS * STEPS + 2 * STEPS + 3)
    found, steps = trained(called(run, "changed", density=0.25))
    expected, _ = trained(called(run, "quarter", density=0.25))
    assert len(steps) == EPOCHS * STEPS + 3 * 2 * STEPS
    assert same(found.weights, expected.weights)


# --- other models, and what is refused --------------------------------------------------------------------------------


def test_a_retrieval_model_has_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_retrieval.log().write_parquet(tmp_path / "log.parquet")
    test_retrieval.corpus().write_parquet(tmp_path / "items.parquet")
    sparsity = {**SPARSITY, "soup": {"members": 2}}
    mine = read(test_retrieval.run_of(tmp_path, sparsity=sparsity))
    monkeypatch.setattr(recsys.sparsity.soup, "measured", bias(-10.0))
    found, _ = trained(mine)
    assert -11 < found.history[-1]["soup_objective"] < -10.3  # recall
    assert close(found.weights, mean_of(mine))


def test_daily_training_refuses_a_soup(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"sparsity\.soup: a daily model goes on from one training, .*; leave it out"):
        train_day(called(run, "daily").on(date(2026, 3, 4)), say=quiet)
    assert not called(run, "daily").folder.exists()


@pytest.mark.parametrize("wrong", [{"members": 1}, {"members": 0}, {"epochs": 0}, {"member": 3}])
def test_soups_that_cannot_be_meant_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        parse_config(Soup, wrong, source="run.toml")
