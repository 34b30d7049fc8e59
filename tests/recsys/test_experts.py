"""Experts: each gate against numpy, sparse computation against dense, and trees that are saturated."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from base.config import parse_config
from base.errors import ConfigError
from recsys.experts import Experts, ExpertsConfig, Gate, TopKGate, TreeGate, active_per_row, smooth_step

Array = NDArray[np.float64]
GATES = get_args(Gate)
EVERY = pytest.mark.parametrize("gate", GATES)
SPARSE = pytest.mark.parametrize("gate", ["top_k", "tree"])
X, T, E, K = 6, 2, 8, 2


def make(gate: str, spread: float = 1.0, inputs: int = X, tasks: int = T, **changes: Any) -> Experts:
    """Experts in float64 whose gate is spread so far that trees are partly hard."""
    config = ExpertsConfig.model_validate({"count": E, "hidden": (5, 4), "gate": gate, "k": K, **changes})
    torch.manual_seed(0)
    model = Experts(inputs, tasks, config).double()
    with torch.no_grad():
        for parameter in model.gate.parameters():
            parameter.copy_(torch.randn_like(parameter) * spread)
    return model


def rows(batch: int, inputs: int = X, seed: int = 1) -> Tensor:
    return torch.randn(batch, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(model: Experts, x_BX: Tensor) -> Tensor:
    """mixed_BTH with every expert computed for every row."""
    return torch.einsum("bte,ebh->bth", model.weights(x_BX), torch.stack([expert(x_BX) for expert in model.experts]))


def affine(layer: nn.Module, x_BX: Tensor, *shape: int) -> Array:
    assert isinstance(layer, nn.Linear)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return (x_BX.numpy() @ w.T + b).reshape(len(x_BX), *shape)


def paths(t_N: Array, gamma: float, node: int = 0, p: float = 1.0) -> list[float]:
    """Probability of each leaf below `node`, left to right."""
    if node >= len(t_N):
        return [p]
    t = t_N[node]
    left = float(t > 0) if abs(t) >= gamma / 2 else -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
    return paths(t_N, gamma, 2 * node + 1, p * left) + paths(t_N, gamma, 2 * node + 2, p * (1 - left))


def tree_by_paths(model: Experts, x_BX: Tensor, gamma: float) -> tuple[Array, Array, Array]:
    """weights_BTE, entropy_B and p_BTKE."""
    gate = model.gate
    assert isinstance(gate, TreeGate)
    t_BTKN, a_BTKE = affine(gate.nodes, x_BX, T, K, E - 1), affine(gate.leaves, x_BX, T, K, E)
    p_BTKE = np.apply_along_axis(lambda t_N: np.array(paths(t_N, gamma)), 3, t_BTKN)
    raw_BTKE = p_BTKE * np.exp(a_BTKE)
    entropy_BTK = [[[-sum(p * np.log(p) for p in leaf if p) for leaf in tree] for tree in task] for task in p_BTKE]
    return raw_BTKE.sum(2) / raw_BTKE.sum((2, 3))[..., None], np.mean(entropy_BTK, (1, 2)), p_BTKE


def tree(model: Experts) -> TreeGate:
    assert isinstance(model.gate, TreeGate)
    return model.gate


# Gates.


def test_softmax_gate_is_a_softmax_per_task() -> None:
    model, x_BX = make("softmax"), rows(20)
    assert isinstance(model.gate, TopKGate)
    e_BTE = np.exp(affine(model.gate.logits, x_BX, T, E))
    np.testing.assert_allclose(model.weights(x_BX).detach().numpy(), e_BTE / e_BTE.sum(2, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, E])
def test_top_k_gate_is_a_softmax_over_the_k_largest(k: int) -> None:
    model, x_BX = make("top_k", k=k), rows(20)
    assert isinstance(model.gate, TopKGate)
    logits_BTE = affine(model.gate.logits, x_BX, T, E)
    kept_BTE = np.argsort(np.argsort(-logits_BTE, 2), 2) < k
    e_BTE = np.where(kept_BTE, np.exp(logits_BTE), 0)
    weights_BTE = model.weights(x_BX).detach().numpy()
    np.testing.assert_allclose(weights_BTE, e_BTE / e_BTE.sum(2, keepdims=True), rtol=1e-12)
    assert ((weights_BTE != 0) == kept_BTE).all()


@pytest.mark.parametrize("gamma", [0.5, 3.0, 50.0])
def test_tree_gate_sums_its_leaves_over_trees(gamma: float) -> None:
    model, x_BX = make("tree", gamma=gamma), rows(20)
    weights_BTE, entropy_B, p_BTKE = tree_by_paths(model, x_BX, gamma)
    got_BTE, got_B = model.gate(x_BX)
    np.testing.assert_allclose(got_BTE.detach().numpy(), weights_BTE, rtol=1e-9)
    np.testing.assert_allclose(got_B.detach().numpy(), entropy_B, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(tree(model).leaf_probabilities(x_BX).detach().numpy(), p_BTKE, rtol=1e-9)
    assert ((got_BTE.detach().numpy() != 0) == (p_BTKE != 0).any(2)).all()
    assert (gamma > 10) == bool((weights_BTE != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_step_stays_within_0_and_1_and_rises(dtype: torch.dtype) -> None:
    t = torch.linspace(-1, 1, 100_001, dtype=dtype)
    s = smooth_step(t, 1.5)
    assert (s.diff() >= -torch.finfo(dtype).eps).all()
    assert s.min() == 0
    assert s.max() == 1
    assert (s[t <= -0.75] == 0).all()
    assert (s[t >= 0.75] == 1).all()
    inside = t[t.abs() < 0.75].double().numpy()
    np.testing.assert_allclose(
        s[t.abs() < 0.75].double().numpy(), -2 * (inside / 1.5) ** 3 + inside + 0.5, atol=10 * torch.finfo(dtype).eps
    )


@EVERY
def test_weights_sum_to_one(gate: str) -> None:
    weights_BTE = make(gate).weights(rows(50))
    assert weights_BTE.shape == (50, T, E)
    assert (weights_BTE >= 0).all()
    torch.testing.assert_close(weights_BTE.sum(2), torch.ones(50, T, dtype=torch.float64))


def test_each_task_has_its_own_gate() -> None:
    for gate in GATES:
        weights_BTE = make(gate).weights(rows(50))
        assert not torch.allclose(weights_BTE[:, 0], weights_BTE[:, 1])


@pytest.mark.parametrize("gate", ["softmax", "top_k"])
def test_only_trees_have_entropy(gate: str) -> None:
    assert torch.equal(make(gate)(rows(4))[1], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.01, 10.0])
def test_new_trees_use_every_expert(gamma: float) -> None:
    torch.manual_seed(0)
    model = Experts(100, T, ExpertsConfig(gate="tree", gamma=gamma))
    assert (active_per_row(model.weights(torch.randn(64, 100))) == 8).all()


def test_active_per_row_counts_an_expert_once_for_all_tasks() -> None:
    weights_BTE = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    assert active_per_row(weights_BTE).tolist() == [2, 1]


# Experts.


@EVERY
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_mixture_equals_every_expert_computed_for_every_row(gate: str, spread: float) -> None:
    model, x_BX = make(gate, spread), rows(40).requires_grad_()
    mixed_BTH, _ = model(x_BX)
    expected_BTH = dense(model, x_BX)
    torch.testing.assert_close(mixed_BTH, expected_BTH)
    wanted = (x_BX, *model.parameters())
    upstream = torch.randn_like(expected_BTH)
    got = torch.autograd.grad(mixed_BTH, wanted, upstream, materialize_grads=True)
    expected = torch.autograd.grad(expected_BTH, wanted, upstream, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_gradient_is_that_of_the_mixture_and_entropy(gate: str) -> None:
    model = make(gate, inputs=3, count=4, hidden=(3,))
    assert torch.autograd.gradcheck(model, rows(5, 3).requires_grad_())


@EVERY
def test_rows_do_not_influence_each_other(gate: str) -> None:
    model, x_BX = make(gate), rows(30)
    mixed_BTH, entropy_B = model(x_BX)
    one_by_one = [model(x_X.unsqueeze(0)) for x_X in x_BX]
    torch.testing.assert_close(mixed_BTH, torch.cat([mixed for mixed, _ in one_by_one]))
    torch.testing.assert_close(entropy_B, torch.cat([entropy for _, entropy in one_by_one]))
    x_BX.requires_grad_()
    (grad_BX,) = torch.autograd.grad(model(x_BX)[0][3].sum(), x_BX)
    assert grad_BX[3].any()
    assert not grad_BX[torch.arange(30) != 3].any()


@EVERY
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_an_expert_is_computed_for_the_rows_that_use_it(gate: str, spread: float) -> None:
    model, x_BX = make(gate, spread), rows(200)
    used_BE = (model.weights(x_BX) != 0).any(1)
    seen: list[Tensor] = []
    for expert in model.experts:
        expert.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x_BX)
    assert sum(map(len, seen)) == int(active_per_row(model.weights(x_BX)).sum())
    for x, used_B in zip(seen, used_BE.T, strict=True):
        assert torch.equal(x, x_BX[used_B])


@SPARSE
def test_an_unused_expert_has_zero_gradient(gate: str) -> None:
    model = make(gate)
    with torch.no_grad():
        if gate == "tree":
            tree(model).nodes.bias.add_(100)  # every row goes left
        else:
            model.gate.get_parameter("logits.bias").view(T, E)[:, :2] += 100
    weights_BTE = model.weights(rows(20))
    unused = [e for e in range(E) if not weights_BTE[..., e].any()]
    assert len(unused) == (E - 1 if gate == "tree" else E - 2)
    model(rows(20))[0].sum().backward()
    for e, expert in enumerate(model.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (e not in unused)


@EVERY
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(gate: str, batch: int) -> None:
    model, x_BX = make(gate), rows(batch).requires_grad_()
    mixed_BTH, entropy_B = model(x_BX)
    assert mixed_BTH.shape == (batch, T, 4)
    assert entropy_B.shape == (batch,)
    (mixed_BTH.sum() + entropy_B.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x_BX, *model.parameters()))


@EVERY
def test_repeats_bit_for_bit(gate: str) -> None:
    model = make(gate).float()
    x_BX = rows(100).float().requires_grad_()
    runs = [torch.autograd.grad(model(x_BX)[0].square().sum(), (x_BX, *model.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_acts_in_training_only() -> None:
    model, x_BX = make("top_k", dropout=0.5), rows(20)
    assert not torch.equal(model(x_BX)[0], model(x_BX)[0])
    model.eval()
    assert torch.equal(model(x_BX)[0], model(x_BX)[0])


# Saturated trees.


@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_gradients_are_finite_for_huge_inputs(scale: float) -> None:
    model = make("tree").float()
    x_BX = (rows(64).float() * scale).requires_grad_()
    mixed_BTH, entropy_B = model(x_BX)
    assert (active_per_row(model.weights(x_BX)) <= T * K).all()
    (mixed_BTH.sum() + entropy_B.sum()).backward()
    assert mixed_BTH.isfinite().all()
    assert torch.equal(entropy_B, torch.zeros(64))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x_BX, *model.parameters()))


@pytest.mark.parametrize("edge", [0.5, -0.5, 0.49999997, -0.49999997])
def test_gradients_are_finite_at_the_edges_of_the_smooth_step(edge: float) -> None:
    model = make("tree").float()
    with torch.no_grad():
        tree(model).nodes.weight.zero_()
        tree(model).nodes.bias.fill_(edge)
    mixed_BTH, entropy_B = model(rows(8).float())
    (mixed_BTH.sum() + entropy_B.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("elsewhere", [0.0, 1e4, 1e30])
def test_all_probability_at_one_leaf(elsewhere: float) -> None:
    model, x_BX = make("tree").float(), rows(8).float()
    gate = tree(model)
    with torch.no_grad():
        gate.nodes.bias.fill_(-1e6)  # every row goes right, to the last leaf
        gate.leaves.bias.view(T, K, E)[..., :-1] = elsewhere  # which scores far less than those it cannot reach
    mixed_BTH, entropy_B = model(x_BX)
    one_E = nn.functional.one_hot(torch.tensor(E - 1), E).float()
    torch.testing.assert_close(model.weights(x_BX), one_E.expand(8, T, E))
    torch.testing.assert_close(mixed_BTH, model.experts[-1](x_BX).unsqueeze(1).expand(-1, T, -1))
    assert torch.equal(entropy_B, torch.zeros(8))
    (mixed_BTH.sum() + entropy_B.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not gate.nodes.weight.grad.any()  # type: ignore[union-attr]


def test_descent_on_entropy_leaves_k_experts() -> None:
    torch.manual_seed(0)
    model, x_BX = Experts(X, 1, ExpertsConfig(gate="tree", k=K)), rows(64).float()
    assert (active_per_row(model.weights(x_BX)) == 8).all()
    start = model(x_BX)[1].mean().item()
    assert start == pytest.approx(np.log(8), rel=0.01)
    optimizer = torch.optim.Adam(model.gate.parameters(), 0.05)
    for _ in range(250):
        optimizer.zero_grad()
        model.gate(x_BX)[1].mean().backward()
        optimizer.step()
    assert model(x_BX)[1].mean().item() < 0.01 * start
    assert (active_per_row(model.weights(x_BX)) <= K).all()


# Configuration.


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gate": "top_k", "count": 4, "k": 5}, "k = 5 experts cannot be kept of count = 4; k must be at most count"),
        (
            {"gate": "tree", "count": 12},
            "count = 12, but a tree's leaves are its experts; give it 2, 4, 8, 16 and so on",
        ),
        ({"gate": "tree", "count": 1}, "count = 1, but a tree"),
        ({"hidden": []}, "hidden is empty; give the experts one layer or more"),
        ({"gate": "hash"}, "gate = 'hash'"),
        ({"gamma": 0}, "gamma = 0"),
        ({"entropy": -1}, "entropy = -1"),
        ({"count": 0}, "count = 0"),
    ],
)
def test_refuses(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ExpertsConfig, tree, source="run.toml")


def test_k_and_count_bind_only_the_gates_that_use_them() -> None:
    assert ExpertsConfig(count=3, k=5).gate == "softmax"
    assert ExpertsConfig(count=3, k=3, gate="top_k").k == 3
    assert ExpertsConfig(count=4, k=5, gate="tree").k == 5
