"""`[ssl]` from run file to Bundle: two towers with their corpus, a funnel with the log's items, days that go on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from base.config import load_config
from base.errors import ConfigError
from base.storage import resolve
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.line import line_of
from pipelines.prepare import prepare
from pipelines.report import report
from pipelines.settings import FeatureRun
from pipelines.tracking import registry_of
from pipelines.train import fit_window, train
from recsys.bundle import Bundle
from recsys.checkpoint import BESIDE
from recsys.tensors import load_tensors
from recsys.trainer import Progress
from tests.marks import quick
from tests.pipelines import test_daily, test_retrieval

RUNS = Path(__file__).parents[2] / "pipelines" / "runs"
SPARSITY = {"density": 0.5, "schedule": {"interval": 10, "window": 4}, "soup": {"members": 2}}


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ssl")
    test_retrieval.log().write_parquet(folder / "log.parquet")
    test_retrieval.corpus().write_parquet(folder / "items.parquet")
    return folder


def test_two_towers_train_with_it_and_their_bundle_knows_nothing_of_it(folder: Path) -> None:
    """Also with an item of which nothing is known."""
    run = test_retrieval.run_of(folder, ssl={"alpha": 0.3, "embedding_masking": 0.1})
    prepare(run, say=quiet)
    train(run, say=quiet)
    bundle = Bundle.load(run.bundle_path)
    bundle.check_golden()
    history = bundle.metrics["history"]
    assert all(entry["self_loss"] > 0 for entry in history)
    assert evaluate(run).filter(slice="cold", k=10)["recall"].item() > 0.8
    assert report(run).exists()
    registry = registry_of(run)
    found = mlflow.get_run(registry.find("challenger").run_id)
    assert found.data.params["ssl.masking"] == "cfm"
    assert found.data.metrics["self_loss"] == pytest.approx(history[-1]["self_loss"])
    without = test_retrieval.run_of(folder).model_copy(update={"name": "without"})
    prepare(without, say=quiet)
    train(without, say=quiet)
    other = Bundle.load(without.bundle_path)
    assert other.model.state_dict().keys() == bundle.model.state_dict().keys()


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a training."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_step


@pytest.mark.parametrize("sparsity", quick({"dense": None, "sparse with soup": SPARSITY}, "sparse with soup"))
def test_killed_it_goes_on_and_ends_with_the_same_bits(folder: Path, sparsity: Any) -> None:
    run = test_retrieval.run_of(folder, f"{sparsity is None}", ssl={}, sparsity=sparsity)
    fitted = prepare(run, say=quiet)
    whole, _ = fit_window(run, fitted, run.examples_path, on_step=lambda _: None)
    again = run.model_copy(update={"name": "killed"})
    prepare(again, say=quiet)
    with pytest.raises(Stop):
        fit_window(again, fitted, again.examples_path, on_step=stop_at(22))
    resumed, _ = fit_window(again, fitted, again.examples_path, on_step=lambda _: None)
    assert resumed.resumed_at == 18
    assert resumed.history == whole.history
    assert all(whole.weights[name].equal(tensor) for name, tensor in resumed.weights.items())
    assert ("soup_objective" in whole.history[-1]) == (sparsity is not None)


def test_days_go_on_with_it_without_it_and_with_it_again(tmp_path: Path) -> None:
    """A ranking model's item side: the corpus is each day's items."""
    ssl = {"item": ["item_id", "price"], "projection": [8]}
    model = {"name": "autoint", "dim": 4, "layers": 1, "heads": 1, "attention_dim": 4}
    run = test_daily.begin(tmp_path, ssl=ssl, model=model)
    for number, changes in ((5, {"ssl": ssl}), (6, {}), (7, {"ssl": ssl})):
        test_daily.write(tmp_path, number)
        run = test_daily.run_of(tmp_path, model=model, **changes)
        now = test_daily.live(run, number)
        bundle = Bundle.load(now.bundle_path)
        bundle.check_golden()
        assert ("self_loss" in bundle.metrics["history"][-1]) == bool(changes)
        state = resolve(line_of(now).state_path(now.trained_to))
        assert (state / BESIDE).is_dir() == bool(changes)
        if changes:
            assert set(load_tensors(state / BESIDE)) > {"ssl.default_CSD"}


AUTOINT = {"name": "autoint", "dim": 4}
PLAIN: dict[str, Any] = {"retrieval": None, "train__monitor": "log_loss"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssl": {}, "train__processes": 2}, r"train.processes = 2: the task of \[ssl\] is trained by one process"),
        ({"ssl": {"item": ["item"]}}, "ssl.item: what the item of a two-tower model is, model.item says; leave it out"),
        ({"ssl": {}, "model__item": ["item"]}, "see one alone of the item, 'item'"),
        ({"ssl": {}, "model": AUTOINT, **PLAIN}, r"\[ssl\] needs item = "),
        (
            {"ssl": {"item": ["item", "genre"]}, "model": AUTOINT, **PLAIN},
            "'genre' is no feature; did you mean 'genres'",
        ),
        ({"ssl": {"item": ["item", "genres"]}, "model": {"name": "lr"}, **PLAIN}, '"lr" has no layers over embeddings'),
        ({"ssl": {"masking": "all"}}, "ssl.masking = 'all'"),
        ({"ssl": {"baseline": "spread_out", "masking": "rfm"}}, "leave ssl.masking or it out"),
    ],
)
def test_run_files_that_cannot_be_meant_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        test_retrieval.run_of(folder, "refused", **changes)


def test_the_settings_of_a_run_file_are_those_it_says(folder: Path) -> None:
    run: Run = test_retrieval.run_of(folder, "read", ssl={"baseline": "feature_dropout", "dropout": 0.4})
    assert run.ssl is not None
    assert (run.ssl.baseline, run.ssl.dropout, run.ssl_item) == ("feature_dropout", 0.4, ("item", "genres", "price"))


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.toml")), ids=lambda f: f.name)
def test_the_steps_on_features_read_every_run_file(file: Path) -> None:
    """Settings of models, which they do not read, are no unknown ones to them."""
    assert load_config(FeatureRun, file).features
