"""Models: a conformance suite that every model of the union inherits, then each against a few lines of numpy."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedTensor

from base.errors import ArtefactError, ConfigError
from features.pipeline import FeaturePipeline
from features.schema import Schema, Sparse, carried
from features.transforms import Standardise, Vocabulary
from recsys import checkpoint
from recsys.batch import Batch
from recsys.bundle import Bundle, golden_rows, load_model
from recsys.data import IdCount, to_columns
from recsys.distributed import Sharded, reset_tables, shard
from recsys.embeddings import Embeddings, in_order
from recsys.losses import log_loss
from recsys.metrics import log_loss as measured_log_loss
from recsys.models import AutoIntConfig, Model, ModelConfig, build_model
from recsys.models.autoint import AutoInt, Interacting
from recsys.models.dcn import DCNConfig
from recsys.models.fm import FMConfig
from recsys.models.lr import LRConfig
from recsys.trainer import TrainConfig, train

CPU = torch.device("cpu")
Array = NDArray[np.float64]

SMALL: dict[str, Any] = {"dim": 8, "layers": 2, "heads": 2, "attention_dim": 4}
MODELS: dict[str, ModelConfig] = {
    "autoint": AutoIntConfig(**SMALL),
    "autoint-paper": AutoIntConfig(**SMALL, variant="paper"),
    "autoint-official": AutoIntConfig(**SMALL, variant="official"),
    "autoint-deep": AutoIntConfig(**SMALL, deep=(16, 8)),
    "dcn": DCNConfig(dim=8, cross_layers=2, hidden=(16, 8)),
    "dcn-deep-only": DCNConfig(dim=8, cross_layers=0, hidden=(16,)),
    "fm": FMConfig(dim=8),
    "lr": LRConfig(),
}
EVERY = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
TASKS = pytest.mark.parametrize("tasks", [1, 2])


def plain(config: ModelConfig, schema: Schema, seed: int = 0, spread: float = 1.0) -> Model:
    """An unsharded model whose embeddings are large enough for everything to matter."""
    torch.manual_seed(seed)
    model = build_model(config, schema)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed." in name or "bias" in name:
                parameter.copy_(torch.randn_like(parameter) * spread)
    return model.eval()


def logits(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch)


def trainable(config: ModelConfig, schema: Schema, seed: int = 0, **adagrad: float) -> tuple[Model, Sharded]:
    torch.manual_seed(seed)
    model = build_model(config, schema, table_device="meta")
    sharded = shard(model, CPU, {"lr": 0.1, "eps": 1e-8, **adagrad}, batch_size=64)
    reset_tables(sharded, seed)
    return model, sharded


def step(model: Model, sharded: Sharded, batch: Batch) -> None:
    model.loss(sharded.module(batch), batch.labels_BT).backward()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- conformance: what every model promises --------------------------------------------------------------------------


def test_every_model_of_the_union_is_tested() -> None:
    kinds = set(get_args(get_args(ModelConfig)[0]))
    assert kinds == {type(c) for c in MODELS.values()}
    assert len(kinds) >= 4
    variants = {c.variant for c in MODELS.values() if isinstance(c, AutoIntConfig)}
    assert variants == set(get_args(AutoIntConfig.model_fields["variant"].annotation))


@EVERY
@TASKS
def test_logits_and_probabilities_are_by_task(config: ModelConfig, tasks: int, examples: Any) -> None:
    schema = examples.schema(tasks)
    model, batch = plain(config, schema), examples.batch(schema, examples.frame(schema, 30))
    found_BT = logits(model, batch)
    assert found_BT.shape == (30, tasks)
    assert [(o.name, o.label) for o in model.outputs] == [(f"p_{label}", label) for label in schema.labels]
    np.testing.assert_allclose(model.probabilities(found_BT), 1 / (1 + np.exp(-found_BT.numpy())), rtol=1e-5)
    assert found_BT.std(0).min() > 0.03  # the tests below would not see much of a constant
    if tasks == 2:
        assert (found_BT[:, 0] - found_BT[:, 1]).abs().max() > 0.1


@EVERY
@TASKS
def test_scores_do_not_depend_on_neighbours(config: ModelConfig, tasks: int, examples: Any) -> None:
    schema = examples.schema(tasks)
    model, frame = plain(config, schema).train(), examples.frame(schema, 40)  # dropout is 0: training must not mix rows
    whole_BT = logits(model, examples.batch(schema, frame))
    alone_BT = torch.cat([logits(model, examples.batch(schema, row)) for row in frame.iter_slices(1)])
    torch.testing.assert_close(alone_BT, whole_BT, atol=1e-5, rtol=1e-5)
    order = np.random.default_rng(0).permutation(40)
    others = pl.concat([frame[order], examples.frame(schema, 25, seed=9)])
    shuffled_BT = logits(model, examples.batch(schema, others))[:40]
    torch.testing.assert_close(shuffled_BT, whole_BT[torch.from_numpy(order)], atol=1e-5, rtol=1e-5)


@EVERY
def test_the_order_inside_a_bag_does_not_matter(config: ModelConfig, examples: Any) -> None:
    schema = examples.schema()
    model, frame = plain(config, schema), examples.frame(schema, 40)
    turned = frame.with_columns(pl.col("tags", "genres").list.reverse())
    assert not turned.equals(frame)
    before_BT, after_BT = (logits(model, examples.batch(schema, f)) for f in (frame, turned))
    torch.testing.assert_close(after_BT, before_BT, atol=1e-6, rtol=1e-6)
    different = frame.with_columns(pl.col("tags").list.eval((pl.element() + 1) % 23))
    assert (logits(model, examples.batch(schema, different)) - before_BT).abs().max() > 0.01


@EVERY
@TASKS
def test_one_step_moves_what_was_touched_and_nothing_else(config: ModelConfig, tasks: int, examples: Any) -> None:
    schema = examples.schema(tasks)
    batch = examples.batch(schema, examples.frame(schema, 50, seed=2))
    model, sharded = trainable(config, schema)
    for table in sharded.tables.values():
        table.weights_RD.normal_(std=0.1)  # from equal weights, gradients of a row may add up to nothing
    before = copies(checkpoint.weights(sharded))
    assert set(sharded.tables) == {f.name for f in schema.sparse}
    assert set(before) == set(model.state_dict()) == set(build_model(config, schema).state_dict())
    step(model, sharded, batch)
    for name, parameter in sharded.dense.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.equal(before[name]), name  # Adam has not stepped yet
    for name, table in sharded.tables.items():
        touched = sorted(set(batch.sparse[name].values().tolist()))
        changed_RD = table.weights_RD != before[checkpoint.TABLE.format(name)]
        assert changed_RD.any(1).nonzero().flatten().tolist() == touched, name
        assert (table.state_R > 0).nonzero().flatten().tolist() == touched, name
        assert table.weights_RD.isfinite().all()
    assert len(set(batch.sparse["word"].values().tolist())) < 60


@EVERY
def test_empty_bags_are_scored(config: ModelConfig, examples: Any) -> None:
    schema = examples.schema()
    model, frame = plain(config, schema), examples.frame(schema, 10, empty=1.0)
    assert frame["tags"].list.len().sum() == 0
    found_BT = logits(model, examples.batch(schema, frame))
    assert found_BT.isfinite().all()
    only_bags = Schema(keys=(), dense=(), sparse=(Sparse(name="tags", rows=5, multi=True),), labels=("click",))
    nothing = pl.DataFrame({"tags": [[], []], "@click": [0, 1]}, schema={"tags": pl.List(pl.Int32), "@click": pl.Int8})
    batch = examples.batch(only_bags, nothing)
    assert logits(plain(config, only_bags), batch).isfinite().all()
    trained, sharded = trainable(config, only_bags)
    before = sharded.tables["tags"].weights_RD.clone()
    step(trained, sharded, batch)
    assert sharded.tables["tags"].weights_RD.equal(before)


@EVERY
@TASKS
def test_sharded_it_computes_the_same(config: ModelConfig, tasks: int, examples: Any) -> None:
    schema = examples.schema(tasks)
    batch = examples.batch(schema, examples.frame(schema, 40))
    model, sharded = trainable(config, schema, lr=1.0)
    for _ in range(2):
        step(model, sharded, batch)  # away from the beginning, where all embeddings are small
    loaded = load_model(config, schema, copies(checkpoint.weights(sharded)), where=Path("here"))
    with torch.no_grad():
        sharded_BT = sharded.module.eval()(batch)
    torch.testing.assert_close(logits(loaded, batch), sharded_BT, atol=1e-5, rtol=1e-5)


@EVERY
def test_gradients_are_those_of_the_plain_model(config: ModelConfig, examples: Any) -> None:
    """And row-wise Adagrad is its formula: state += mean(g²); w -= lr g / (√state + eps)."""
    schema = examples.schema(2)
    rate, eps = 0.05, 1e-8
    model, sharded = trainable(config, schema, lr=rate, eps=eps)
    state_R = {f.name: np.zeros(f.rows) for f in schema.sparse}
    for seed in (1, 2, 3):
        batch = examples.batch(schema, examples.frame(schema, 30, seed=seed))
        before = copies(checkpoint.weights(sharded))
        reference = load_model(config, schema, copies(before), where=Path("here"))
        reference.requires_grad_(True)
        reference.loss(reference(batch), batch.labels_BT).backward()
        sharded.module.zero_grad()
        step(model, sharded, batch)
        gradients = {name: p.grad for name, p in reference.named_parameters()}
        for name, parameter in sharded.dense.items():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
        for name, table in sharded.tables.items():
            g_RD = gradients[checkpoint.TABLE.format(name)]
            assert g_RD is not None
            g = g_RD.double().numpy()
            state_R[name] += (g**2).mean(1)
            expected = before[checkpoint.TABLE.format(name)].double().numpy() - rate * g / (
                np.sqrt(state_R[name])[:, None] + eps
            )
            np.testing.assert_allclose(table.state_R.numpy(), state_R[name], rtol=1e-3, atol=1e-12)
            np.testing.assert_allclose(table.weights_RD.numpy(), expected, rtol=1e-3, atol=1e-4)


@EVERY
def test_a_model_with_other_weights_is_refused(config: ModelConfig, examples: Any) -> None:
    schema = examples.schema()
    weights = plain(config, schema).state_dict()
    name = checkpoint.TABLE.format("tags")
    for wrong in (
        {k: v for k, v in weights.items() if k != name},
        {**weights, name: weights[name][:-1]},
    ):
        with pytest.raises(ArtefactError, match=r"there: embed\.tables\.embedding_bags\.tags\.weight is"):
            load_model(config, schema, wrong, where=Path("there"))
    with pytest.raises(ArtefactError, match=r"there: extra is \(1,\), the model needs none"):
        load_model(config, schema, {**weights, "extra": torch.zeros(1)}, where=Path("there"))


@EVERY
def test_tables_may_be_tiny_or_large(config: ModelConfig, examples: Any) -> None:
    schema = Schema(
        keys=(),
        dense=(),
        sparse=(Sparse(name="large", rows=200_000), Sparse(name="tiny", rows=1)),
        labels=("click",),
    )
    frame = pl.DataFrame(
        {"large": [0, 199_999, 5, 5], "tiny": [0] * 4, "@click": [0, 1, 1, 1]},
        schema={"large": pl.Int32, "tiny": pl.Int32, "@click": pl.Int8},
    )
    batch = examples.batch(schema, frame)
    model, sharded = trainable(config, schema)
    before = sharded.tables["large"].weights_RD.clone()
    step(model, sharded, batch)
    moved = (sharded.tables["large"].weights_RD != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 5, 199_999]


@EVERY
def test_initial_tables_follow_seed_and_name_alone(config: ModelConfig, examples: Any) -> None:
    schema = examples.schema()
    twin = Sparse(name="twin of word", rows=4_000)
    schema = schema.model_copy(update={"sparse": (*schema.sparse, twin)})
    fewer = schema.model_copy(update={"sparse": schema.sparse[2:][::-1]})
    std = build_model(config, schema).embed.init_std
    tables = {
        key: {n: t.weights_RD.clone() for n, t in trainable(config, s, seed)[1].tables.items()}
        for key, s, seed in (("first", schema, 3), ("fewer", fewer, 3), ("seed", schema, 4))
    }
    for name in ("word", "color"):
        assert tables["first"][name].equal(tables["fewer"][name])
        assert tables["first"][name].equal(tables["seed"][name]) == (std == 0)
    assert tables["first"]["word"].equal(tables["first"][twin.name]) == (std == 0)
    assert tables["first"]["word"].std().item() == pytest.approx(std, rel=0.05)


# --- bundles ---------------------------------------------------------------------------------------------------------

RAW = pl.DataFrame(
    {
        "user": [f"u{n % 17}" for n in range(200)],
        "tags": [[f"t{n % 5}"] * (n % 3) for n in range(200)],
        "price": [None if n % 11 == 0 else (n * 37 % 101) / 7 for n in range(200)],
        "age": [n % 60 for n in range(200)],
    }
)
AGAIN = """
import sys
from pathlib import Path
import polars as pl
import torch
torch.set_num_threads(1)
from recsys.bundle import Bundle
raw, *folders = map(Path, sys.argv[1:])
for folder in folders:
    bundle = Bundle.load(folder)
    bundle.check_golden()
    scores = pl.concat(bundle.predict(pl.read_parquet(raw).lazy(), batch_size=64))
    scores.write_parquet(f"{folder}.scores.parquet")
"""


def bundle(config: ModelConfig, tasks: int = 1) -> Bundle:
    features = FeaturePipeline(
        (
            Vocabulary(column="user", min_count=2),
            Vocabulary(column="tags", multi=True),
            Standardise(column="price"),
            Standardise(column="age"),
        )
    ).fit(RAW.lazy())
    schema = features.schema([], ("click", "like")[:tasks])
    made = Bundle(plain(config, schema), config, features, schema, {}, {}, RAW.head(0))
    return Bundle(made.model, config, features, schema, {"a": 1}, {"m": 0.5}, golden_rows(made, RAW.head(7)))


def test_a_bundle_loaded_in_another_process_scores_bit_for_bit(tmp_path: Path) -> None:
    RAW.write_parquet(tmp_path / "raw.parquet")
    expected: dict[str, pl.DataFrame] = {}
    for tasks in (1, 2):
        for name, config in MODELS.items():
            target = tmp_path / f"{name}-{tasks}"
            saved = bundle(config, tasks).save(target)
            expected[target.name] = pl.concat(saved.predict(RAW.lazy(), batch_size=64))
            assert expected[target.name].equals(pl.concat(bundle(config, tasks).predict(RAW.lazy(), batch_size=64)))
    command = [sys.executable, "-W", "ignore", "-c", AGAIN, tmp_path / "raw.parquet", *(tmp_path / n for n in expected)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    for name, scores in expected.items():
        found = pl.read_parquet(tmp_path / f"{name}.scores.parquet")
        assert found.columns == (["p_click"] if name.endswith("1") else ["p_click", "p_like"])
        assert found.schema.dtypes() == [pl.Float32] * found.width
        assert found.equals(scores), name
        assert scores["p_click"].n_unique() > 30


def test_a_bundle_scores_every_row_in_order_whatever_the_batches() -> None:
    made = bundle(MODELS["autoint"], tasks=2)
    whole = pl.concat(made.predict(RAW.lazy()))
    for batch_size in (1, 64, 200):
        parts = list(made.predict(RAW.lazy(), batch_size=batch_size))
        assert [p.height for p in parts[:-1]] == [batch_size] * (len(parts) - 1)
        np.testing.assert_allclose(pl.concat(parts).to_numpy(), whole.to_numpy(), atol=1e-6)
    examples = made.features.transform(RAW.lazy()).collect()
    columns = to_columns(examples, made.schema, labels=False)
    with torch.no_grad():
        p_BO = made.model.probabilities(made.model(columns.batch(0, 200)))
    assert whole.to_numpy().tolist() == p_BO.tolist()
    assert list(made.predict(RAW.head(0).lazy())) == []


def test_ids_outside_a_bundles_tables_follow_the_policy() -> None:
    made = bundle(LRConfig())
    examples = made.features.transform(RAW.lazy()).collect()
    wrong = examples.with_columns(user=pl.col("user") + 10**6)
    with pytest.raises(Exception, match="feature 'user': id"):
        list(made.predict_examples(wrong, batch_size=64))
    count = IdCount()
    found = pl.concat(made.predict_examples(wrong, batch_size=64, policy="unknown", count=count))
    assert count.replaced == 200
    unknown = pl.concat(made.predict_examples(examples.with_columns(user=pl.lit(0)), batch_size=64))
    assert found.equals(unknown)


def test_golden_rows_that_are_not_reproduced_are_refused() -> None:
    made = bundle(FMConfig(dim=8))
    made.check_golden()
    with torch.no_grad():
        made.model.get_parameter("bias_T").add_(1e-4)
    with pytest.raises(ArtefactError, match="p_click of its golden rows differs by"):
        made.check_golden()
    with torch.no_grad():
        made.model.get_parameter("bias_T").fill_(float("nan"))
    with pytest.raises(Exception, match="not finite; do not publish"):
        made.check_golden()


# --- the planted signal ----------------------------------------------------------------------------------------------

LEVELS = 12


def planted(rows: int, seed: int, *, interaction: bool) -> tuple[pl.DataFrame, Array]:
    """Clicks that follow an interaction of two fields alone, or main effects alone; and their probabilities."""
    world, rng = np.random.default_rng(7), np.random.default_rng(seed)
    a, b, c = (rng.integers(0, LEVELS, rows) for _ in range(3))
    left, right = (np.sign(world.normal(size=(LEVELS, 2))) for _ in range(2))
    effect = left @ right.T
    effect = effect - effect.mean(0)
    effect = effect - effect.mean(1, keepdims=True)
    main = world.normal(size=(2, LEVELS))
    logit = 1.5 * effect[a, b] if interaction else 1.5 * (main[0][a] + main[1][b])
    truth = 1 / (1 + np.exp(-logit))
    columns = {"a": a, "b": b, "c": c}
    frame = pl.DataFrame({k: pl.Series(v, dtype=pl.Int32) for k, v in columns.items()}).with_columns(
        pl.Series("number", rng.normal(size=rows), dtype=pl.Float32),
        pl.Series(carried("click"), rng.random(rows) < truth).cast(pl.Int8),
    )
    return frame, truth


def share_learned(config: ModelConfig, folder: Path, examples: Any, *, interaction: bool) -> float:
    """(base - model) / (base - floor), in log loss on rows that were not trained on."""
    schema = examples.schema(dense=0).model_copy(
        update={"sparse": tuple(Sparse(name=n, rows=LEVELS) for n in "abc"), "dense": examples.schema(dense=1).dense}
    )
    frame, _ = planted(20_000, 1, interaction=interaction)
    held, truth = planted(8_000, 2, interaction=interaction)
    rename = {"number": "number0"}
    fit = examples.stream(schema, frame.rename(rename), folder / "fit.parquet", 250, shuffle=True, window=40)
    valid = examples.stream(schema, held.rename(rename), folder / "valid.parquet", 1_000)
    settings = TrainConfig(batch_size=250, epochs=5, learning_rate=5e-3, table_learning_rate=0.2, threads=1)
    trained = train(config, schema, fit, valid, settings, folder / "state")
    found = min(entry["p_click.log_loss"] for entry in trained.history)
    clicks = held[carried("click")].to_numpy()
    rate = clicks.mean()
    base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    floor = measured_log_loss(clicks, truth)
    assert base - floor > 0.15
    return (base - found) / (base - floor)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "lr"])
def test_a_planted_interaction_is_learned(name: str, tmp_path: Path, examples: Any) -> None:
    assert 0.9 < share_learned(MODELS[name], tmp_path, examples, interaction=True) < 1.02


def test_linear_regression_learns_main_effects_only(tmp_path: Path, examples: Any) -> None:
    assert 0.9 < share_learned(LRConfig(), tmp_path / "main", examples, interaction=False) < 1.02
    assert abs(share_learned(LRConfig(), tmp_path / "interaction", examples, interaction=True)) < 0.1


# --- embeddings and losses against their equations -------------------------------------------------------------------


def numpy_weights(model: Model) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def numpy_embeddings(weights: Mapping[str, Array], schema: Schema, frame: pl.DataFrame) -> Array:
    """e_BFD: the mean of a bag's rows, nothing for an empty bag (equations 2 and 3); v x for a number (equation 4)."""
    width = weights["embed.numeric_ND"].shape[1]
    e_BFD = np.zeros((frame.height, len(schema.fields), width))
    for i, row in enumerate(frame.iter_rows(named=True)):
        for f, feature in enumerate(schema.sparse):
            bag = row[feature.name] if feature.multi else [row[feature.name]]
            for value in bag:
                e_BFD[i, f] += weights[checkpoint.TABLE.format(feature.name)][value] / len(bag)
        for n, field in enumerate(schema.dense):
            e_BFD[i, len(schema.sparse) + n] = weights["embed.numeric_ND"][n] * row[field.name]
    return e_BFD


def set_up(config: ModelConfig, examples: Any, tasks: int = 1, dense: int = 2) -> tuple[dict[str, Array], Array, Array]:
    """A model's weights, the embeddings of a few examples, and its logits on them."""
    schema = examples.schema(tasks, dense)
    model, frame = plain(config, schema), examples.frame(schema, 12)
    weights = numpy_weights(model)
    found = logits(model, examples.batch(schema, frame)).double().numpy()
    return weights, numpy_embeddings(weights, schema, frame), found


@pytest.mark.parametrize("dense", [0, 2])
def test_embeddings_are_means_of_bags_and_scaled_vectors(dense: int, examples: Any) -> None:
    schema = examples.schema(dense=dense)
    model, frame = plain(FMConfig(dim=7), schema), examples.frame(schema, 25, empty=0.4)
    assert 0 < frame["tags"].list.len().eq(0).sum() < 25
    with torch.no_grad():
        found = model.embed(examples.batch(schema, frame)).double().numpy()
    assert found.shape == (25, 6 + dense, 8)
    np.testing.assert_allclose(found, numpy_embeddings(numpy_weights(model), schema, frame), atol=1e-6)
    np.testing.assert_array_equal(found[:, 1][frame["tags"].list.len().eq(0).to_numpy()], 0)


def test_fields_keep_the_schemas_order_whatever_the_order_of_keys() -> None:
    a, b, c = (torch.full((2, 4), float(n)) for n in (1, 2, 3))
    mixed = KeyedTensor(keys=["c", "a", "b"], length_per_key=[4, 4, 4], values=torch.cat([c, a, b], dim=1))
    assert in_order(mixed, ["a", "b", "c"], 4)[0, :, 0].tolist() == [1.0, 2.0, 3.0]
    sorted_already = KeyedTensor(keys=["a", "b", "c"], length_per_key=[4, 4, 4], values=torch.cat([a, b, c], dim=1))
    assert in_order(sorted_already, ["a", "b", "c"], 4)[1, :, 3].tolist() == [1.0, 2.0, 3.0]


def test_fbgemms_widths_and_models_without_ids_are_explained(examples: Any) -> None:
    schema = examples.schema()
    with pytest.raises(ConfigError, match=r"model\.dim = 6: fbgemm needs a multiple of 4; try 8"):
        build_model(AutoIntConfig(dim=6), schema)
    with pytest.raises(ConfigError, match="features: none gives ids; add a vocabulary"):
        Embeddings(schema.model_copy(update={"sparse": ()}), 8, CPU)
    for dim in (1, 3, 5):
        batch = examples.batch(schema, examples.frame(schema, 3))
        assert logits(plain(FMConfig(dim=dim), schema), batch).shape == (3, 1)


@TASKS
def test_log_loss_is_its_formula(tasks: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, tasks)) * 3, rng.integers(0, 2, (20, tasks)).astype(float)
    p = 1 / (1 + np.exp(-x))
    expected = sum(-(y[:, t] * np.log(p[:, t]) + (1 - y[:, t]) * np.log(1 - p[:, t])).mean() for t in range(tasks))
    assert log_loss(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected)
    extreme = log_loss(torch.tensor([[200.0], [-200.0]]), torch.tensor([[0.0], [0.0]]))
    assert extreme.item() == pytest.approx(100.0)


# --- models against their equations ----------------------------------------------------------------------------------


@TASKS
def test_fm_is_the_sum_over_pairs(tasks: int, examples: Any) -> None:
    dim = 5
    weights, rows_BFD, found = set_up(FMConfig(dim=dim), examples, tasks)
    for t in range(tasks):
        for i, rows_FD in enumerate(rows_BFD):
            y = weights["bias_T"][t] + rows_FD[:, t].sum()
            v = rows_FD[:, tasks + t * dim : tasks + (t + 1) * dim]
            for f in range(len(v)):
                for g in range(f + 1, len(v)):
                    y += v[f] @ v[g]
            assert found[i, t] == pytest.approx(y, abs=1e-4)


@TASKS
def test_lr_is_a_weighted_sum(tasks: int, examples: Any) -> None:
    weights, rows_BFD, found = set_up(LRConfig(), examples, tasks)
    np.testing.assert_allclose(found, weights["bias_T"] + rows_BFD[:, :, :tasks].sum(1), atol=1e-5)


def numpy_mlp(x: Array, weights: Mapping[str, Array], name: str, hidden: int) -> Array:
    for layer in range(hidden):
        linear = f"{name}.layers.{3 * layer}"
        x = np.maximum(x @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"], 0)
    return x @ weights[f"{name}.layers.{3 * hidden}.weight"].T + weights[f"{name}.layers.{3 * hidden}.bias"]


@TASKS
def test_dcn_is_crosses_beside_a_network(tasks: int, examples: Any) -> None:
    w, e_BFD, found = set_up(DCNConfig(dim=8, cross_layers=3, hidden=(16, 8)), examples, tasks)
    x0 = x = e_BFD.reshape(len(e_BFD), -1)
    for layer in range(3):
        x = x0 * (x @ w[f"cross.{layer}.weight"].T + w[f"cross.{layer}.bias"]) + x
    expected = x @ w["head.weight"].T + w["head.bias"] + numpy_mlp(x0, w, "deep", 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def numpy_interacting(e_FD: Array, w: Mapping[str, Array], heads: int, variant: str) -> tuple[Array, Array]:
    """One example through one layer, by loops over heads and fields; also the attention a_HFK."""
    official = variant == "official"

    def project(name: str, x: Array) -> Array:
        out = w[f"{name}.weight"] @ x
        return np.maximum(out + w[f"{name}.bias"], 0) if official else out

    fields, width = len(e_FD), w["query.weight"].shape[0]
    size = width // heads
    scale = 1.0 if variant == "paper" else 1 / np.sqrt(size)
    out_FX, a_HFK = np.zeros((fields, width)), np.zeros((heads, fields, fields))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for m in range(fields):
            psi = [scale * project("query", e_FD[m])[part] @ project("key", e_FD[k])[part] for k in range(fields)]
            a_HFK[h, m] = np.exp(psi) / np.exp(psi).sum()  # equation 5
            out_FX[m, part] = sum(a_HFK[h, m, k] * project("value", e_FD[k])[part] for k in range(fields))  # 6 and 7
    for m in range(fields):
        out_FX[m] = np.maximum(out_FX[m] + project("residual", e_FD[m]), 0)  # equation 8
        if official:
            centred = out_FX[m] - out_FX[m].mean()
            out_FX[m] = centred / np.sqrt((centred**2).mean() + 1e-8) * w["norm.weight"] + w["norm.bias"]
    return out_FX, a_HFK


def layer_weights(weights: Mapping[str, Array], layer: int) -> dict[str, Array]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("variant", ["paper", "default", "official"])
def test_an_interacting_layer_is_its_equations(variant: Any) -> None:
    torch.manual_seed(1)
    config = AutoIntConfig(dim=8, heads=3, attention_dim=5, variant=variant)
    layer = Interacting(8, config)
    if variant == "official":
        for parameter in layer.norm.parameters():
            torch.nn.init.normal_(parameter)
    weights = {name: w.double().numpy() for name, w in layer.state_dict().items()}
    assert ("query.bias" in weights) == ("norm.weight" in weights) == (variant == "official")
    x_BFD = torch.randn(4, 6, 8)
    with torch.no_grad():
        found_BFX, a_BHFK = layer(x_BFD), layer.attention(x_BFD)
    assert found_BFX.shape == (4, 6, 15)
    for i in range(4):
        out, attention = numpy_interacting(x_BFD[i].double().numpy(), weights, 3, variant)
        np.testing.assert_allclose(a_BHFK[i], attention, atol=1e-5)
        np.testing.assert_allclose(found_BFX[i], out, atol=1e-4)
    assert a_BHFK.max() > 0.3  # far from uniform


@pytest.mark.parametrize("deep", [(), (16, 8)], ids=["plain", "deep"])
@pytest.mark.parametrize("variant", ["paper", "default", "official"])
def test_autoint_is_its_equations(variant: Any, deep: tuple[int, ...], examples: Any) -> None:
    config = AutoIntConfig(**SMALL, variant=variant, deep=deep)
    w, e_BFD, found = set_up(config, examples, tasks=2)
    for i, e_FD in enumerate(e_BFD):
        x_FD = e_FD
        for layer in range(config.layers):
            x_FD, _ = numpy_interacting(x_FD, layer_weights(w, layer), config.heads, variant)
        y = w["head.weight"] @ x_FD.reshape(-1) + w["head.bias"]  # equation 9
        if deep:
            y = y + numpy_mlp(e_FD.reshape(1, -1), w, "deep", len(deep))[0]
        np.testing.assert_allclose(found[i], y, rtol=1e-3, atol=1e-3)


def test_attention_maps_are_those_of_the_forward_pass(examples: Any) -> None:
    schema = examples.schema()
    model, frame = plain(MODELS["autoint"], schema), examples.frame(schema, 5)
    assert isinstance(model, AutoInt)
    with torch.no_grad():
        a_LBHFK = model.attention(examples.batch(schema, frame)).double().numpy()
    assert a_LBHFK.shape == (2, 5, 2, 8, 8)
    np.testing.assert_allclose(a_LBHFK.sum(-1), 1, atol=1e-6)
    w = numpy_weights(model)
    for i, e_FD in enumerate(numpy_embeddings(w, schema, frame)):
        first, attention = numpy_interacting(e_FD, layer_weights(w, 0), 2, "default")
        np.testing.assert_allclose(a_LBHFK[0, i], attention, atol=1e-5)
        _, attention = numpy_interacting(first, layer_weights(w, 1), 2, "default")
        np.testing.assert_allclose(a_LBHFK[1, i], attention, atol=1e-5)


def test_autoint_has_the_papers_number_of_parameters() -> None:
    """Table 3: 3.9e4 on Criteo, that is on 39 fields, embeddings and biases aside."""
    schema = Schema(keys=(), dense=(), sparse=tuple(Sparse(name=f"c{n}", rows=2) for n in range(39)), labels=("click",))
    model = build_model(AutoIntConfig(variant="paper"), schema)
    outside = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("embed.")}
    assert sum(outside.values()) == 39_361


def test_dropout_is_for_training_only(examples: Any) -> None:
    schema = examples.schema()
    batch = examples.batch(schema, examples.frame(schema, 20))
    dropping = {
        "attention_dropout": AutoIntConfig(**SMALL, attention_dropout=0.5),
        "embedding_dropout": AutoIntConfig(**SMALL, embedding_dropout=0.5),
        "deep_dropout": AutoIntConfig(**SMALL, deep=(16,), deep_dropout=0.5),
        "dcn": DCNConfig(dim=8, hidden=(16,), dropout=0.5),
    }
    for name, config in dropping.items():
        model = plain(config, schema)
        assert logits(model, batch).equal(logits(model, batch)), name
        model.train()
        assert not logits(model, batch).equal(logits(model, batch)), name
