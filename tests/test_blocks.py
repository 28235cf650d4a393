"""Diagonal blocks of the curvature, Adam's preconditioner, and parts of the data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import (
    Problem,
    assert_near,
    directions,
    flat,
    generator,
    hessian_of,
    normal,
    quadratic,
    tiny_mlp,
)
from torch import Tensor, nn

from sharpness import EmpiricalRisk, NotConvergedError
from sharpness.measures import layers
from sharpness.measures.layers import LayerwiseEigenpairs, layerwise_eigenpairs
from sharpness.measures.preconditioner import adam_preconditioner

EXACT = 1e-10  # against another formula, in float64
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]  # of a `tiny_mlp`
STARTS = dict(zip(NAMES, [(0, 15), (15, 20), (20, 40), (40, 44)], strict=True))
BOTH = {"0": NAMES[:2], "2": NAMES[2:]}


def places(names: list[str]) -> np.ndarray:
    """Where the parameters of a `tiny_mlp` stand in its flat vector."""
    return np.concatenate([np.arange(*STARTS[name]) for name in names])


def logits(problem: Problem, theta: Tensor) -> Tensor:
    w1, b1, w2, b2 = theta.split([15, 5, 20, 4])
    return torch.tanh(problem.data[0] @ w1.view(5, 3).T + b1) @ w2.view(4, 5).T + b2


def dense(problem: Problem, risk: EmpiricalRisk, matrix: str) -> np.ndarray:
    """The whole matrix, from a formula written out again where there is one."""
    theta, y = problem.theta, problem.data[1]
    if matrix == "hessian":
        return hessian_of(problem.f)(theta).numpy()
    if matrix == "sampled_fisher":  # its targets are the library's own draws
        return risk.product(torch.eye(44, dtype=torch.float64), matrix).numpy()
    jacobian = torch.func.jacrev(lambda t: logits(problem, t))(theta)
    p = logits(problem, theta).softmax(1)
    if matrix == "gauss_newton":
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nai,nab,nbj->ij", jacobian, inner, jacobian).numpy() / len(y)
    slopes = torch.einsum("nai,na->ni", jacobian, p - torch.eye(4).double()[y])
    return (slopes.T @ slopes).numpy() / len(y)


def end_of(values: np.ndarray, k: int, which: str) -> np.ndarray:
    values = np.sort(values)[::-1]
    if which == "LM":
        return np.sort(values[np.argsort(-np.abs(values))[:k]])[::-1]
    bottom = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return np.concatenate([values[: k - bottom], values[len(values) - bottom :]])


def assert_blocks_are(
    found: LayerwiseEigenpairs,
    whole: np.ndarray,
    expected: dict[str, list[str]],
    k: int = 2,
    which: str = "LA",
) -> None:
    assert [block.name for block in found.blocks] == list(expected)
    for block in found.blocks:
        at = places(expected[block.name])
        inside = whole[np.ix_(at, at)]
        values = np.linalg.eigvalsh(inside)
        error = np.abs(block.eigenvalues.numpy() - end_of(values, min(k, len(at)), which))
        rounding = len(at) * np.finfo(float).eps * np.abs(values).max() * 10
        assert np.all(error <= block.error_bounds.numpy() + rounding)
        assert block.status == "converged"
        assert block.parameters == tuple(expected[block.name])
        v = block.eigenvectors.numpy()
        assert v.shape == (len(block.eigenvalues), block.n) == (min(k, len(at)), len(at))
        left = np.linalg.norm(inside @ v.T - v.T * block.eigenvalues.numpy(), axis=0)
        proven = block.residuals.numpy() + block.noise_floor + EXACT * np.abs(values).max()
        assert np.all(left <= proven)
    assert found.status == "converged"
    assert found.raise_for_status() is found


def kind(name: str) -> str | None:
    return {"weight": "weights", "bias": None}[name.rpartition(".")[2]]


# -- diagonal blocks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, BOTH),
        (["0.*", "*.bias"], {"0.*": NAMES[:2], "*.bias": NAMES[1::2]}),
        ("*weight", {"*weight": NAMES[::2]}),
        (["*"], {"*": NAMES}),
        (kind, {"weights": NAMES[::2]}),
        (lambda name: name, {name: [name] for name in NAMES}),
        ({"head": NAMES[2:]}, {"head": NAMES[2:]}),
        ({"any order": [NAMES[3], NAMES[0]]}, {"any order": [NAMES[3], NAMES[0]]}),
        ({"one": NAMES[:2], "all": NAMES}, {"one": NAMES[:2], "all": NAMES}),
    ],
)
def test_blocks_of_every_kind_have_the_values_of_the_dense_blocks(blocks, expected):
    problem = tiny_mlp()
    risk = problem.risk()
    found = layerwise_eigenpairs(risk, blocks, k=2, tol=1e-6)
    assert_blocks_are(found, dense(problem, risk, "hessian"), expected)


FOUR = ["hessian", "gauss_newton", "empirical_fisher", "sampled_fisher"]


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("matrix", FOUR)
def test_blocks_of_every_matrix_have_the_dense_values_in_ragged_chunks(matrix, which):
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=10)
    found = layerwise_eigenpairs(risk, k=3, which=which, matrix=matrix, tol=1e-6)
    assert_blocks_are(found, dense(problem, risk, matrix), BOTH, 3, which)
    assert (found.settings["which"], found.settings["matrix"]) == (which, matrix)


@pytest.mark.parametrize("chunk_size", ["auto", 1])
@pytest.mark.parametrize("matrix", FOUR)
def test_blocks_have_the_dense_values_in_chunks_of_any_size(matrix, chunk_size):
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=chunk_size)
    found = layerwise_eigenpairs(risk, k=2, matrix=matrix, tol=1e-6)
    assert_blocks_are(found, dense(problem, risk, matrix), BOTH)


def within(budget: int) -> EmpiricalRisk:
    """A risk in eight chunks that may keep graphs of so many bytes."""
    risk = tiny_mlp().risk(chunk_size=3)
    risk._mean.budget = budget
    return risk


@cache
def least_budget(num_kept: int) -> int:
    kept = lambda budget: within(budget).prepare().num_kept  # noqa: E731
    return bisect_left(range(1 << 20), num_kept, key=kept)


@pytest.mark.parametrize("num_kept", [1, 3, 8])
def test_blocks_do_not_depend_on_how_many_graphs_are_kept(num_kept):
    problem, risk = tiny_mlp(), within(least_budget(num_kept))
    found = layerwise_eigenpairs(risk, k=2, tol=1e-6)
    assert risk.prepare().num_kept == num_kept
    assert risk.prepare().num_chunks == 8
    assert_blocks_are(found, dense(problem, risk, "hessian"), BOTH)


@pytest.mark.parametrize("num_kept", [1, 3, 8])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_a_sweep_builds_the_graph_of_a_chunk_once_however_many_blocks(num_blocks, num_kept):
    risk = within(least_budget(num_kept))
    blocks = [[name] for name in NAMES][:num_blocks]
    vectors = [torch.ones(len(places(block))).double() for block in blocks]
    risk.prepare()
    risk.value()  # nothing is multiplied before f is known to be finite
    calls = []
    risk.model.register_forward_pre_hook(lambda *_: calls.append(0))
    risk.block_products(blocks, vectors)
    first = len(calls)
    risk.block_products(blocks, vectors)
    assert first <= 8
    assert len(calls) - first == 8 - num_kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_from_differences_of_gradients_keep_their_bounds(dtype):
    problem = tiny_mlp(dtype=dtype)
    found = layerwise_eigenpairs(problem.risk(engine="differences"), k=2, tol=1e-9)
    wide = tiny_mlp()
    wide.model.load_state_dict(problem.model.state_dict())
    whole = hessian_of(wide.f)(wide.theta).numpy()
    for block in found.blocks:
        at = places(BOTH[block.name])
        true = end_of(np.linalg.eigvalsh(whole[np.ix_(at, at)]), 2, "LA")
        error = np.abs(block.eigenvalues.numpy() - true)
        assert np.all(error <= block.error_bounds.numpy())


def test_a_block_smaller_than_k_gives_all_it_has():
    problem = tiny_mlp()
    risk = problem.risk()
    blocks = {"small": ["2.bias"], "large": ["0.weight"]}
    found = layerwise_eigenpairs(risk, blocks, k=6, tol=1e-6)
    assert_blocks_are(found, dense(problem, risk, "hessian"), blocks, 6)
    assert [len(block.eigenvalues) for block in found.blocks] == [4, 6]
    assert found["small"].num_hvps == 4


def test_no_block_is_above_the_whole():
    problem = tiny_mlp()
    found = layerwise_eigenpairs(problem.risk(), tol=1e-8)
    top = np.linalg.eigvalsh(hessian_of(problem.f)(problem.theta).numpy())[-1]
    assert all(float(block.eigenvalues[0]) <= top + EXACT for block in found.blocks)


def test_a_block_that_has_converged_is_multiplied_no_more():
    risk, blocks = (
        tiny_mlp().risk(),
        {"small": ["2.bias"], "large": ["0.*", "2.weight"][1:]},
    )
    original, sizes = risk.block_products, []

    def noted(names, vectors, matrix):
        sizes.append([len(v) for v in vectors])
        return original(names, vectors, matrix)

    risk.block_products = noted
    found = layerwise_eigenpairs(risk, blocks, k=3, tol=1e-8)
    assert sizes == [[4, 20]] * 4 + [[20]] * (found.num_sweeps - 4)
    assert found.num_sweeps == len(sizes) > 4
    assert found.num_hvps == sum(map(len, sizes))
    assert [block.num_hvps for block in found.blocks] == [4, found.num_sweeps]


def test_a_parameter_without_a_module_is_a_block_by_its_own_name():
    found = layerwise_eigenpairs(quadratic([3.0, 1.0, -2.0]), k=3)
    assert [block.name for block in found.blocks] == ["theta"]
    assert found["theta"].eigenvalues.tolist() == pytest.approx([3, 1, -2], rel=1e-14)


def test_all_blocks_share_what_the_confidence_leaves(monkeypatch):
    asked = []
    original = layers.Search

    def noted(*arguments, miss, **rest):
        asked.append(miss)
        return original(*arguments, miss=miss, **rest)

    monkeypatch.setattr(layers, "Search", noted)
    risk = tiny_mlp().risk()
    found = layerwise_eigenpairs(risk, k=3, confidence=0.9)
    assert asked == [pytest.approx(0.1 / 6)] * 2
    assert found.settings["confidence"] == 0.9
    assert all(block.hidden == () for block in found.blocks)
    bare = layerwise_eigenpairs(risk, confidence=None)
    assert asked[2:] == [None] * 2
    assert all(block.hidden is None for block in bare.blocks)


def test_a_block_says_where_a_value_may_hide():
    found = layerwise_eigenpairs(tiny_mlp().risk(), max_sweeps=3)
    low, high = found.blocks[0].hidden[-1]
    assert f"others may hide in ({low:.4g}, {high:.4g}) (95 %)" in str(found)


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (
        layerwise_eigenpairs(tiny_mlp().risk(), k=2, seed=seed) for seed in (1, 1, 2)
    )
    for a, b, c in zip(first.blocks, again.blocks, other.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert torch.equal(a.eigenvectors, b.eigenvectors)
        assert not torch.equal(a.eigenvectors, c.eigenvectors)


def interrupted_at(risk: EmpiricalRisk, sweep: int) -> EmpiricalRisk:
    original, calls = risk.block_products, []

    def products(*arguments):
        calls.append(0)
        if len(calls) == sweep:
            raise KeyboardInterrupt
        return original(*arguments)

    risk.block_products = products
    return risk


def test_an_interrupt_returns_what_the_sweeps_have_earned():
    problem = tiny_mlp()
    blocks = {"small": ["2.bias"], "large": ["2.weight"]}
    risk = interrupted_at(problem.risk(), 6)
    found = layerwise_eigenpairs(risk, blocks, k=3, tol=1e-12)
    budget = layerwise_eigenpairs(problem.risk(), blocks, k=3, tol=1e-12, max_sweeps=5)
    assert found.status == "interrupted"
    assert budget.status == "max_hvps"
    assert [block.status for block in found.blocks] == ["converged", "interrupted"]
    assert found.num_sweeps == budget.num_sweeps == 5
    whole = dense(problem, risk, "hessian")
    for one, other in zip(found.blocks, budget.blocks, strict=True):
        assert torch.equal(one.eigenvalues, other.eigenvalues)
        assert torch.equal(one.error_bounds, other.error_bounds)
        at = places(list(one.parameters))
        true = np.linalg.eigvalsh(whole[np.ix_(at, at)])
        apart = np.abs(one.eigenvalues.numpy()[:, None] - true).min(1)
        assert np.all(apart <= one.error_bounds.numpy() + EXACT)
    with pytest.raises(NotConvergedError):
        found.raise_for_status()


def test_an_interrupt_before_the_first_sweep_gives_empty_blocks():
    found = layerwise_eigenpairs(interrupted_at(tiny_mlp().risk(), 1), k=2)
    assert found.status == "interrupted"
    assert (found.num_sweeps, found.num_hvps) == (0, 0)
    for block in found.blocks:
        assert len(block.eigenvalues) == len(block.error_bounds) == 0
        assert block.eigenvectors.shape == (0, block.n)
        assert np.isnan(block.noise_floor)
    assert "interrupted" in str(found)


def test_empty_eigenvectors_have_the_type_of_theta():
    risk = interrupted_at(tiny_mlp().risk(), 1)
    (block, *_) = layerwise_eigenpairs(risk).blocks
    assert block.eigenvectors.dtype == risk.dtype


def test_time_passed_stops_after_one_sweep():
    found = layerwise_eigenpairs(tiny_mlp().risk(), k=3, max_seconds=0)
    assert found.status == "max_seconds"
    assert found.num_sweeps == 1


def test_a_block_that_is_not_finite_says_so_and_the_others_go_on():
    problem = tiny_mlp()
    risk = problem.risk()
    original = risk.block_products

    def products(names, vectors, matrix):
        found = original(names, vectors, matrix)
        return [
            p * np.nan if "2.bias" in n else p for n, p in zip(names, found, strict=True)
        ]

    risk.block_products = products
    found = layerwise_eigenpairs(risk, k=2, tol=1e-6)
    assert [block.status for block in found.blocks] == ["converged", "non_finite"]
    assert found.status == "non_finite"
    assert len(found["2"].eigenvalues) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be at least 1; got 0"),
        ({"k": 1.5}, "`k` must be a whole number; got 1.5"),
        ({"which": "LR"}, "`which` must be .* got 'LR'"),
        ({"confidence": 1}, "`confidence` must lie in"),
        ({"tol": 0.0}, "`tol` must be positive; got 0.0"),
        ({"tol": float("nan")}, "`tol` must be positive; got nan"),
        ({"blocks": {}}, "`blocks` must give at least one block"),
        ({"blocks": []}, "`blocks` must give at least one block"),
        ({"blocks": lambda name: None}, "`blocks` must give at least one block"),
        ({"blocks": ["9.*"]}, r"`blocks` must name .* got '9.\*' with none"),
        ({"blocks": {"a": []}}, "`blocks` must name .* got 'a' with none"),
        ({"blocks": {"a": ["0.bias", "nose"]}}, "got 'a' with nose. They are 0.weight"),
        ({"matrix": "gradient_covariance"}, "`matrix` must be another one"),
        pytest.param({"max_sweeps": 0}, "`max_sweeps` must be at least 1; got 0"),
        ({"matrix": "fisher"}, "`matrix` must be one of hessian, .*; got 'fisher'"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        layerwise_eigenpairs(tiny_mlp().risk(), **options)
    assert "\n" not in str(error.value)


def test_the_readings_are_the_eigenvalues_of_every_block():
    found = layerwise_eigenpairs(tiny_mlp().risk(), lambda name: name, k=2)
    values = [value for block in found.blocks for value in block.eigenvalues.tolist()]
    bounds = [bound for block in found.blocks for bound in block.error_bounds.tolist()]
    readings = found.readings()
    assert [r.value for r in readings] == values
    assert [r.error for r in readings] == bounds
    names = [f"{kind} {name}" for name in NAMES for kind in ("lambda_max", "lambda_2")]
    assert [r.name for r in readings] == names
    assert all("converged" in reading.evidence for reading in readings)
    for reading, block in zip(readings[::2], found.blocks, strict=True):
        assert reading.cost == str(block.cost)
        assert str(reading) in str(found)
        assert found[block.name] is block
        assert block.lambda_max == reading.value
    assert list(found.to_frame()["value"]) == [r.value for r in found.readings()]
    assert "eigenvectors" not in repr(found)
    with pytest.raises(KeyError):
        found["9"]


# -- products with blocks ----------------------------------------------------------


@pytest.mark.parametrize("engine", ["kept_graph", "differences"])
@pytest.mark.parametrize("chunk_size", ["auto", 10])
def test_block_products_are_slices_of_the_dense_hessian(chunk_size, engine):
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=chunk_size, engine=engine)
    whole = hessian_of(problem.f)(problem.theta)
    blocks = [["0.bias"], ["2.bias", "0.weight"], NAMES, ["2.weight"], ["2.weight"]]
    draws = [directions(1, len(places(b)), seed=i)[0] for i, b in enumerate(blocks)]
    found = risk.block_products(blocks, draws)
    rtol = EXACT if engine == "kept_graph" else 1e-6
    for block, v, product in zip(blocks, draws, found, strict=True):
        at = places(block)
        assert_near(product, whole[np.ix_(at, at)] @ v, rtol)
    assert_near(found[2], risk.hvp(draws[2]), rtol)


@pytest.mark.parametrize("matrix", ["gauss_newton", "empirical_fisher", "sampled_fisher"])
def test_block_products_of_other_matrices_are_slices_of_the_whole(matrix):
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=10)
    whole = torch.from_numpy(dense(problem, risk, matrix))
    blocks = [["2.bias", "0.weight"], ["2.weight"]]
    draws = [directions(1, len(places(b)), seed=i)[0] for i, b in enumerate(blocks)]
    for block, v, product in zip(
        blocks, draws, risk.block_products(blocks, draws, matrix), strict=True
    ):
        at = places(block)
        assert_near(product, whole[np.ix_(at, at)] @ v, EXACT)


def test_a_block_without_curvature_has_products_zero():
    model = nn.Sequential(nn.Linear(3, 1, dtype=torch.float64))
    data = normal(generator(0), 7, 3), normal(generator(1), 7, 1)
    risk = EmpiricalRisk(model, lambda z, y: (z * y).mean(), data)
    (found,) = risk.block_products([["0.weight"]], [torch.ones(3).double()])
    assert found.tolist() == [0.0, 0.0, 0.0]
    assert layerwise_eigenpairs(risk)["0"].eigenvalues.tolist() == [0.0]


def test_products_with_blocks_leave_the_vectors_and_the_whole_product_alone():
    problem = tiny_mlp()
    risk = problem.risk(chunk_size=10)
    v = directions(1, 44)[0]
    before, kept = risk.hvp(v), v.clone()
    risk.block_products([NAMES], [v])
    assert torch.equal(v, kept)
    assert torch.equal(risk.hvp(v), before)


# -- Adam's preconditioner ---------------------------------------------------------


def steps_of_adam(
    problem: Problem, optimizer: torch.optim.Optimizer, num_steps: int = 7
) -> list[Tensor]:
    """Real steps on halves of the data, and the gradients they took, (n,) each."""
    x, y = problem.data
    seen = []
    for step in range(num_steps):
        half = slice(step % 2, None, 2)
        optimizer.zero_grad()
        problem.loss(problem.model(x[half]), y[half]).backward()
        grads = [
            p.grad if p.grad is not None else 0 * p for p in problem.model.parameters()
        ]
        seen.append(torch.cat([g.flatten() for g in grads]).clone())
        optimizer.step()
    return seen


def second_moments(gradients: list[Tensor], beta2: float) -> list[Tensor]:
    """v after every step, by the sum written out."""
    return [
        sum((1 - beta2) * beta2 ** (t - i) * gradients[i] ** 2 for i in range(t + 1))
        for t in range(len(gradients))
    ]


ADAMS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam]


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("named", [False, True])
def test_the_preconditioner_is_the_formula_after_real_steps(adam, named):
    problem = tiny_mlp()
    parameters = problem.model.named_parameters() if named else problem.model.parameters()
    optimizer = adam(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-3)
    v = second_moments(steps_of_adam(problem, optimizer), 0.95)[-1]
    p = adam_preconditioner(problem.risk(), optimizer.state_dict())
    assert_near(p, (1 - 0.8**7) * ((v / (1 - 0.95**7)).sqrt() + 1e-3), EXACT)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_step_of_adam_is_the_first_moment_over_the_preconditioner(amsgrad):
    problem = tiny_mlp()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2, amsgrad=amsgrad)
    steps_of_adam(problem, optimizer, 5)
    before = flat(problem.model)
    steps_of_adam(problem, optimizer, 1)
    after, state = flat(problem.model), optimizer.state_dict()
    m = torch.cat([state["state"][i]["exp_avg"].flatten() for i in range(4)])
    p = adam_preconditioner(problem.risk(), state)
    # The step is a difference of parameters, so it carries their rounding.
    torch.testing.assert_close(after - before, -1e-2 * m / p, rtol=1e-10, atol=1e-15)


def test_amsgrad_uses_the_largest_second_moment():
    problem = tiny_mlp()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.3, amsgrad=True)
    optimizer.param_groups[0]["betas"] = (0.9, 0.5)
    every = second_moments(steps_of_adam(problem, optimizer), 0.5)
    largest = torch.stack(every).max(0).values
    p = adam_preconditioner(problem.risk(), optimizer.state_dict())
    assert_near(p, (1 - 0.9**7) * ((largest / (1 - 0.5**7)).sqrt() + 1e-8), EXACT)
    assert not torch.equal(largest, every[-1])


def test_a_part_of_the_parameters_takes_its_part_of_the_preconditioner():
    problem = tiny_mlp()
    optimizer = torch.optim.Adam(problem.model.parameters())
    steps_of_adam(problem, optimizer)
    state = optimizer.state_dict()
    whole = adam_preconditioner(problem.risk(), state)
    part = adam_preconditioner(problem.risk(params="*.weight"), state)
    assert torch.equal(part, whole[places(NAMES[::2])])


def test_named_parameters_in_groups_of_any_order_find_their_places():
    problem = tiny_mlp()
    named = dict(problem.model.named_parameters())
    groups = [
        {"params": [(name, named[name]) for name in NAMES[:1:-1]], "betas": (0.5, 0.9)},
        {"params": [(name, named[name]) for name in NAMES[1::-1]], "eps": 1e-2},
    ]
    optimizer = torch.optim.Adam(groups)
    gradients = steps_of_adam(problem, optimizer)
    p = adam_preconditioner(problem.risk(), optimizer.state_dict())
    last = (1 - 0.5**7) * (
        (second_moments(gradients, 0.9)[-1] / (1 - 0.9**7)).sqrt() + 1e-8
    )
    v = second_moments(gradients, 0.999)[-1]
    first = (1 - 0.9**7) * ((v / (1 - 0.999**7)).sqrt() + 1e-2)
    assert_near(p, torch.cat([first[:20], last[20:]]), EXACT)


def test_names_match_an_optimizer_of_some_parameters():
    problem = tiny_mlp()
    named = [(f"2.{name}", p) for name, p in problem.model[2].named_parameters()]
    optimizer = torch.optim.Adam(named)
    gradients = steps_of_adam(problem, optimizer)
    p = adam_preconditioner(problem.risk(params="2.*"), optimizer.state_dict())
    v = torch.stack([g[20:] for g in gradients])
    v = second_moments(list(v), 0.999)[-1]
    assert_near(p, (1 - 0.9**7) * ((v / (1 - 0.999**7)).sqrt() + 1e-8), EXACT)


def test_the_preconditioner_has_the_type_of_theta():
    problem = tiny_mlp(dtype=torch.float32)
    optimizer = torch.optim.Adam(problem.model.parameters())
    steps_of_adam(problem, optimizer)
    p = adam_preconditioner(problem.risk(), optimizer.state_dict())
    assert (p.dtype, p.shape) == (torch.float32, (44,))
    assert bool((p > 0).all())


def adam_state(change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    problem = tiny_mlp()
    optimizer = torch.optim.Adam(problem.model.parameters())
    steps_of_adam(problem, optimizer, 2)
    state = optimizer.state_dict()
    if change is not None:
        change(state)
    return state


def sgd_state() -> dict[str, Any]:
    problem = tiny_mlp()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    steps_of_adam(problem, optimizer, 2)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (dict, "must be the state_dict of an Adam optimizer .* got keys none"),
        (lambda: {"model": 1, "epoch": 2}, "got keys model, epoch"),
        (
            lambda: torch.optim.Adam(tiny_mlp().model.parameters()).state_dict(),
            "an Adam optimizer that has made steps",
        ),
        (sgd_state, "must hold Adam's second moments; got none for 0.weight"),
        (
            lambda: adam_state(lambda s: s["state"].pop(2)),
            "must hold Adam's second moments; got none for 2.weight",
        ),
        (
            lambda: adam_state(lambda s: s["state"][1].update(exp_avg_sq=torch.ones(6))),
            r"belong to this model; got shape \(6,\) for 0.bias, which has \(5,\)",
        ),
        (
            lambda: adam_state(lambda s: s["param_groups"][0]["params"].pop()),
            r"must hold every parameter of theta; got none for 2.bias \(1 missing\)",
        ),
    ],
)
def test_the_wrong_state_is_refused_in_one_line(state, message):
    with pytest.raises(ValueError, match=message) as error:
        adam_preconditioner(tiny_mlp().risk(), state())
    assert str(error.value).startswith("`optimizer_state` must")
    assert "\n" not in str(error.value)


# -- parts of the data -------------------------------------------------------------


def assert_same_function(one: EmpiricalRisk, other: EmpiricalRisk) -> None:
    v = directions(1, one.n)[0].to(one.dtype)
    assert one.num_samples == other.num_samples
    assert one.num_terms == pytest.approx(other.num_terms, rel=1e-14)
    assert one.value() == pytest.approx(other.value(), rel=1e-12)
    assert_near(one.gradient(), other.gradient(), EXACT)
    assert_near(one.hvp(v), other.hvp(v), EXACT)


INDICES = {
    "a few": [3, 0, 17],
    "one": [5],
    "repeated": [2, 2, 2, 9, 9, 22],
    "all": list(range(23)),
    "bootstrap": np.random.default_rng(0).integers(0, 23, 60).tolist(),
}


@pytest.mark.parametrize("chunk_size", ["auto", 4])
@pytest.mark.parametrize("name", INDICES)
def test_a_subset_is_the_risk_of_the_indexed_data(name, chunk_size):
    problem, index = tiny_mlp(), INDICES[name]
    x, y = problem.data
    part = problem.risk(chunk_size=chunk_size).subset(index)
    direct = EmpiricalRisk(problem.model, problem.loss, (x[index], y[index]))
    assert_same_function(part, direct)
    assert_same_function(problem.risk().subset(torch.tensor(index)), direct)
    assert torch.equal(part.targets, y[index])
    assert part.chunk_size == problem.risk(chunk_size=chunk_size).chunk_size


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_subset_counts_the_terms_that_are_not_ignored_with_their_weights(reduction):
    problem = tiny_mlp()
    x, y = problem.data
    y = y.clone()
    y[::3] = -1
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    loss = nn.CrossEntropyLoss(weight, ignore_index=-1, reduction=reduction)
    index = [0, 1, 1, 4, 6, 22, 9, 10]
    whole = EmpiricalRisk(problem.model, loss, (x, y), chunk_size=3)
    direct = EmpiricalRisk(problem.model, loss, (x[index], y[index]))
    assert_same_function(whole.subset(index), direct)


class Sum(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.layer(a) * b)


@pytest.mark.parametrize("kind_of", [tuple, dict])
def test_a_subset_takes_the_same_samples_of_several_inputs(kind_of):
    a, b = normal(generator(0), 11, 3), normal(generator(1), 11, 4)
    y = torch.arange(11) % 4
    model, loss, index = Sum(), nn.CrossEntropyLoss(), [10, 3, 3, 0]

    def inputs(a: Tensor, b: Tensor):
        return (a, b) if kind_of is tuple else {"a": a, "b": b}

    whole = EmpiricalRisk(model, loss, (inputs(a, b), y), chunk_size=4)
    direct = EmpiricalRisk(model, loss, (inputs(a[index], b[index]), y[index]))
    assert_same_function(whole.subset(index), direct)


class Pooled(nn.Module):
    """A model of sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).sum(1)


@pytest.mark.parametrize("index", [[0, 6, 9], [8, 1, 5, 5, 2], [3, 4], [9, 0, 9]])
def test_a_subset_of_batches_of_uneven_length_finds_samples_by_their_number(index):
    lengths = {0: 3, 3: 5, 5: 2, 6: 7}
    sizes, draw = [3, 2, 1, 4], generator(0)
    xs = [normal(draw, n, t, 2) for n, t in zip(sizes, lengths.values(), strict=True)]
    ys = list((torch.arange(10) % 4).split(sizes))
    model, loss = Pooled(), nn.CrossEntropyLoss()
    whole = EmpiricalRisk(model, loss, list(zip(xs, ys, strict=True)))
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in zip(xs, ys, strict=True)
               for i in range(len(y))]  # fmt: skip
    direct = EmpiricalRisk(model, loss, [samples[i] for i in index])
    assert_same_function(whole.subset(index), direct)


def test_a_subset_of_a_subset_counts_in_the_smaller_one():
    problem = tiny_mlp()
    x, y = problem.data
    twice = problem.risk().subset([4, 8, 15, 16]).subset([3, 0, 0])
    index = [16, 4, 4]
    assert_same_function(
        twice, EmpiricalRisk(problem.model, problem.loss, (x[index], y[index]))
    )


def test_the_parent_of_a_subset_is_left_as_it_was():
    problem = tiny_mlp()
    risk, v = problem.risk(chunk_size=4), directions(1, 44)[0]
    before = risk.value(), risk.gradient(), risk.hvp(v), risk.settings()
    covariance = risk.product(v, "gradient_covariance")
    part = risk.subset([1, 1, 2])
    assert part.hvp(v).norm() > 0
    assert torch.equal(part.theta, risk.theta)
    other = part.product(v, "gradient_covariance")
    assert not torch.allclose(other, covariance)
    assert risk.value() == before[0]
    assert torch.equal(risk.gradient(), before[1])
    assert torch.equal(risk.hvp(v), before[2])
    assert torch.equal(risk.product(v, "gradient_covariance"), covariance)
    assert risk.settings()["num_samples"] == before[3]["num_samples"] == 23


def test_a_subset_of_a_closure_is_refused():
    with pytest.raises(TypeError, match="not available for a closure"):
        quadratic([1.0, 2.0]).subset([0])


@pytest.mark.parametrize("batchnorm", ["batch", "recalibrated"])
def test_a_subset_that_would_change_batchnorm_is_refused(batchnorm):
    risk = tiny_mlp(batchnorm=True).risk(batchnorm=batchnorm)
    with pytest.raises(ValueError, match="`batchnorm` must be 'running' for a subset"):
        risk.subset([0, 1, 2])


@pytest.mark.parametrize("batchnorm", ["batch", "recalibrated"])
def test_a_subset_without_batchnorm_layers_may_ask_for_any(batchnorm):
    problem, index = tiny_mlp(), [0, 5, 7]
    x, y = problem.data
    direct = EmpiricalRisk(problem.model, problem.loss, (x[index], y[index]))
    assert_same_function(problem.risk(batchnorm=batchnorm).subset(index), direct)


def test_a_subset_with_running_averages_keeps_them():
    problem, index = tiny_mlp(batchnorm=True), [0, 5, 7, 7]
    x, y = problem.data
    direct = EmpiricalRisk(problem.model, problem.loss, (x[index], y[index]))
    assert_same_function(problem.risk().subset(index), direct)


@pytest.mark.parametrize("index", [[], [0, 23], [-1], [0, -24]])
def test_a_sample_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match="`index` must"):
        tiny_mlp().risk().subset(index)
