"""PyHessian's interface beside PyHessian itself; what a risk shows of its model."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    Point,
    generator,
    hessian_of,
    normal,
    softmax_regression,
    tiny_mlp,
)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import sharpness as sh
from sharpness.compat import hessian
from sharpness.measures.perturbation import NormalisedLogits

CE = nn.CrossEntropyLoss()


@pytest.fixture
def reference(monkeypatch):
    """PyHessian's class; its density needs a function that PyTorch has dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("pyhessian")

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, 0 * values], 1), vectors

    monkeypatch.setattr(torch, "eig", eig, raising=False)
    return module.hessian


class Spread(nn.Module):
    """A model whose loss `diagonal(h)` has the Hessian diag(h) in two parameters."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64))
        self.rest = nn.Parameter(torch.ones(n - 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cat([self.first, self.rest])


def diagonal(h) -> hessian:
    h = torch.as_tensor(h, dtype=torch.float64)

    def loss(z: Tensor, _: Tensor) -> Tensor:
        return 0.5 * (h * z**2).sum(1).mean()

    data = torch.ones(4, len(h), dtype=torch.float64), torch.zeros(4)
    return hessian(Spread(len(h)), loss, data, cuda=False)


def computed(**how) -> hessian:
    problem = tiny_mlp()
    return hessian(problem.model, CE, problem.data, cuda=False, **how)


def exact() -> Tensor:
    problem = tiny_mlp()
    return hessian_of(problem.f)(problem.theta)


def loader(size: int = 10) -> DataLoader:
    return DataLoader(TensorDataset(*tiny_mlp().data), batch_size=size, shuffle=True)


# -- PyHessian's interface ----------------------------------------------------------


@pytest.mark.parametrize("top_n", [1, 2, 5])
def test_eigenvalues_are_those_of_the_dense_hessian_by_modulus(top_n):
    values, vectors = computed().eigenvalues(tol=1e-8, top_n=top_n)
    h = exact()
    dense = torch.linalg.eigvalsh(h)
    dense = dense[dense.abs().argsort(descending=True)]
    assert values == pytest.approx(dense[:top_n].tolist(), rel=1e-7)
    for value, vector in zip(values, vectors, strict=True):
        v = torch.cat([part.flatten() for part in vector])
        assert float(v.norm()) == pytest.approx(1, rel=1e-10)
        assert float((h @ v - value * v).norm()) <= 1e-3 * abs(value)


def test_a_negative_eigenvalue_comes_before_a_smaller_positive_one():
    h = [-5.0, 4.0, 3.0, -2.0, 1.0, 0.5, -0.1, 0.0]
    values, vectors = diagonal(h).eigenvalues(tol=1e-10, top_n=4)
    assert values == pytest.approx(h[:4], rel=1e-9)
    for i, vector in enumerate(vectors):
        assert [part.shape for part in vector] == [(3,), (5,)]
        assert abs(float(torch.cat(vector)[i])) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("maxIter", [1, 3, 7])
@pytest.mark.parametrize("top_n", [1, 2])
def test_at_most_max_iter_products_a_value_are_made(maxIter, top_n):
    h = computed()
    calls = counted(h)
    values, _ = h.eigenvalues(maxIter=maxIter, tol=1e-15, top_n=top_n)
    assert len(values) == top_n
    assert sum(calls) <= max(2, maxIter) * top_n


def counted(h: hessian) -> list[int]:
    """The number of directions in every product."""
    calls, product = [], h.risk.product

    def counting(v, *rest):
        calls.append(1 if v.ndim == 1 else len(v))
        return product(v, *rest)

    h.risk.product = counting
    return calls


@pytest.mark.parametrize(("maxIter", "num"), [(1, 1), (4, 4), (10, 10), (35, 35)])
def test_the_trace_makes_as_many_samples_as_it_may(maxIter, num):
    h = computed()
    calls = counted(h)
    samples = h.trace(maxIter=maxIter, tol=1e-9)
    assert len(samples) == sum(calls) == num
    assert all(type(sample) is float for sample in samples)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_the_trace_is_within_its_own_error(seed):
    samples = np.array(computed(seed=seed).trace(maxIter=200, tol=0.03))
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    trace = float(exact().trace())
    assert abs(samples.mean() - trace) <= 4 * error
    assert error <= 0.03 * abs(samples.mean()) or len(samples) == 200
    assert error < 0.15 * trace


def test_the_trace_of_a_diagonal_needs_ten_samples():
    assert diagonal(range(8)).trace(tol=1e-6) == pytest.approx([28.0] * 10)


@pytest.mark.parametrize("n_v", [1, 3])
@pytest.mark.parametrize("steps", [2, 15])
def test_nodes_lie_in_the_spectrum_and_weights_sum_to_one(n_v, steps):
    nodes, weights = computed().density(iter=steps, n_v=n_v)
    low, high = torch.linalg.eigvalsh(exact())[[0, -1]].tolist()
    assert [len(run) for run in nodes] == [len(run) for run in weights] == [steps] * n_v
    for run, shares in zip(nodes, weights, strict=True):
        assert sum(shares) == pytest.approx(1, rel=1e-12)
        assert min(shares) >= 0
        assert low - 1e-10 <= min(run) <= max(run) <= high + 1e-10
        assert all(type(each) is float for each in (*run, *shares))


def test_the_density_of_many_starts_has_the_moments_of_the_spectrum():
    """The variance of z^T F z is at most 2 tr(F^2) / n^2 for z on the sphere."""
    h = exact()
    nodes, weights = (np.array(part) for part in computed().density(iter=20, n_v=60))
    for power in (1, 2):
        f = torch.linalg.matrix_power(h, power)
        found = float((weights * nodes**power).sum() / 60)
        error = math.sqrt(2 * float((f @ f).trace()) / 60) / len(h)
        assert abs(found - float(f.trace()) / len(h)) <= 4 * error


def test_every_start_has_as_many_nodes_as_the_others():
    """Scripts make an array of them; half of the eigenvalues here are zero."""
    model = nn.Linear(10, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.stack([0 * torch.arange(10), torch.arange(1, 11)]))
    data = torch.eye(10).double(), torch.ones(10, dtype=torch.long)
    nodes, weights = hessian(model, CE, data, cuda=False).density(n_v=3)
    assert len({len(run) for run in nodes}) == 1
    assert [len(run) for run in nodes] == [len(run) for run in weights]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["data", "dataloader"])
def test_shapes_and_values_are_those_of_pyhessian(reference, how):
    problem = tiny_mlp(dtype=torch.float32)
    given = problem.data if how == "data" else [problem.data]
    ours, theirs = (
        build(problem.model, CE, cuda=False, **{how: given})
        for build in (hessian, reference)
    )
    (values, vectors), (peers, peer_vectors) = (
        h.eigenvalues(maxIter=2000, tol=1e-6, top_n=2) for h in (ours, theirs)
    )
    assert type(values) is type(peers)
    assert values == pytest.approx(peers, rel=1e-2)
    assert [[part.shape for part in v] for v in vectors] == [
        [part.shape for part in v] for v in peer_vectors
    ]
    for a, b in zip(vectors[0], peer_vectors[0], strict=True):
        assert a.dtype == b.dtype
    dot = sum(
        float((a * b).sum()) for a, b in zip(vectors[0], peer_vectors[0], strict=True)
    )
    assert abs(dot) > 0.99
    both = [np.array(h.trace(maxIter=12, tol=0)) for h in (ours, theirs)]
    assert both[0].shape == both[1].shape == (12,)
    both = [h.density(iter=8, n_v=3) for h in (ours, theirs)]
    assert [np.array(part).shape for part in both[0]] == [(3, 8), (3, 8)]
    assert [np.array(part).shape for part in both[1]] == [(3, 8), (3, 8)]


@pytest.mark.parametrize("size", [1, 10, 23])
def test_ragged_batches_of_a_loader_count_by_their_samples(size):
    found = hessian(tiny_mlp().model, CE, dataloader=loader(size), cuda=False)
    whole = computed()
    assert found.eigenvalues(tol=1e-8)[0] == pytest.approx(
        whole.eigenvalues(tol=1e-8)[0], rel=1e-9
    )
    assert found.trace(10) == pytest.approx(whole.trace(10), rel=1e-9)


def test_the_same_seed_gives_the_same_bits_and_no_generator_moves():
    built = [computed(seed=seed) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    one, again, other = ((h.trace(10), h.density(5), h.eigenvalues()[0]) for h in built)
    assert one == again
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_stays_in_train_mode_and_is_measured_in_evaluation_mode():
    problem = tiny_mlp(batchnorm=True)
    model = problem.model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    h = hessian(model, CE, problem.data, cuda=False)
    dense = torch.linalg.eigvalsh(hessian_of(problem.f)(problem.theta))
    assert h.eigenvalues(tol=1e-8)[0] == pytest.approx([float(dense[-1])], rel=1e-7)
    h.trace(5)
    h.density(5)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("given", [{}, {"data": 1, "dataloader": 1}])
def test_data_come_one_way(given):
    problem = tiny_mlp()
    given = {key: problem.data for key in given}
    said = "both" if given else "neither"
    with pytest.raises(ValueError, match=f"`data` or `dataloader` must .*got {said}"):
        hessian(problem.model, CE, cuda=False, **given)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = tiny_mlp()
    for how in ({}, {"cuda": True}):
        with pytest.raises(ValueError, match=r"`cuda` must be False .*got True"):
            hessian(problem.model, CE, problem.data, **how)


@pytest.mark.parametrize(
    ("method", "name", "wrong"),
    [
        ("eigenvalues", "top_n", 0),
        ("eigenvalues", "top_n", 100),
        ("eigenvalues", "tol", 0),
        ("density", "n_v", 0),
        ("density", "iter", 0),
    ],
)
def test_a_wrong_argument_is_named_as_the_caller_knows_it(method, name, wrong):
    with pytest.raises(ValueError, match=f"`{name}` must .*got {wrong}"):
        getattr(computed(), method)(**{name: wrong})


@pytest.mark.parametrize("method", ["eigenvalues", "trace", "density"])
def test_an_interrupt_is_not_swallowed_where_no_status_could_tell(method):
    h, calls = computed(), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sh.EmpiricalRisk.product(h.risk, *args)

    h.risk.product = failing
    with pytest.raises(KeyboardInterrupt):
        getattr(h, method)()


@pytest.mark.parametrize("method", ["eigenvalues", "trace", "density"])
def test_nan_gives_nan_or_an_error_and_never_an_empty_list(method):
    problem = tiny_mlp()
    nn.init.constant_(problem.model[0].weight, math.nan)
    h = hessian(problem.model, CE, problem.data, cuda=False)
    try:
        found = getattr(h, method)()
    except (ValueError, FloatingPointError, sh.NotConvergedError):
        return
    first = found[0] if method != "trace" else found
    assert len(first) > 0
    assert np.isnan(np.array(first, float)).all()


# -- the network of a risk ----------------------------------------------------------


def retrain(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("batchnorm", ["running", "recalibrated"])
@pytest.mark.parametrize("change", [lambda _: None, retrain, nn.Module.float, freeze])
def test_a_network_is_the_model_that_is_measured_also_after_a_change(change, batchnorm):
    problem = tiny_mlp(batchnorm=True)
    risk = problem.risk(batchnorm=batchnorm)
    outputs, value = risk.outputs(), risk.value()
    change(problem.model)
    copied = risk.network().eval()
    assert torch.equal(torch.cat([p.flatten() for p in copied.parameters()]), risk.theta)
    assert torch.allclose(copied(problem.data[0]), outputs, rtol=1e-12, atol=0)
    retrain(copied)
    assert risk.value() == value
    assert not set(map(id, copied.parameters())) & set(map(id, problem.model.parameters()))


def test_parameters_held_fixed_are_in_the_network_as_they_were():
    problem = tiny_mlp()
    risk = problem.risk(params="2.*")
    outputs = risk.outputs()
    retrain(problem.model)
    assert torch.allclose(risk.network()(problem.data[0]), outputs, rtol=1e-12, atol=0)


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(3, 3, bias=False).double() for _ in range(2))
        self.last.weight = self.first.weight
        self.register_buffer("shift", normal(generator(1), 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.shift))


def test_tied_weights_stay_tied_and_unsaved_buffers_are_copied():
    model, data = Tied(), (normal(generator(0), 9, 3), torch.arange(9) % 3)
    risk = sh.EmpiricalRisk(model, CE, data)
    outputs = risk.outputs()
    retrain(model)
    copied = risk.network()
    assert copied.first.weight is copied.last.weight
    assert copied.first.weight is not model.first.weight
    assert torch.equal(copied.shift, model.shift / 2)
    assert torch.allclose(copied(data[0]), outputs, rtol=1e-12, atol=0)


def test_a_pruned_model_has_a_network_too():
    problem = tiny_mlp()
    prune.l1_unstructured(problem.model[0], "weight", 0.5)
    risk = problem.risk()
    outputs = risk.outputs()
    assert torch.allclose(risk.network()(problem.data[0]), outputs, rtol=1e-12, atol=0)


# -- the same loss for another network ----------------------------------------------


def test_another_network_is_measured_by_the_same_loss_on_the_same_data():
    problem = tiny_mlp()
    x, y = problem.data
    once = ((x[i : i + 5], y[i : i + 5]) for i in range(0, 23, 5))
    ignoring = nn.CrossEntropyLoss(ignore_index=1, reduction="sum")
    risk = sh.EmpiricalRisk(problem.model, ignoring, once, chunk_size=4)
    other = risk.with_model(NormalisedLogits(risk.network()))
    z = problem.model(x).detach()
    z = z - z.mean(1, keepdim=True)
    z = (z / z.norm(dim=1, keepdim=True))[y != 1]
    assert other.value() == pytest.approx(float(F.cross_entropy(z, y[y != 1])), rel=1e-12)
    assert (other.chunk_size, other.num_terms) == (4, risk.num_terms)
    assert risk.with_model(risk.network()).value() == pytest.approx(risk.value(), rel=1e-14)


def test_parameters_are_chosen_as_before_or_anew():
    risk = tiny_mlp().risk(params="2.*")
    assert risk.with_model(risk.network()).names == ["2.weight", "2.bias"]
    assert risk.with_model(risk.network(), "0.*").names == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="`params` must match"):
        risk.with_model(NormalisedLogits(risk.network()))
    wrapped = risk.with_model(NormalisedLogits(risk.network()), ["*2.weight"])
    assert wrapped.names == ["model.2.weight"]


@pytest.mark.parametrize("batchnorm", ["running", "batch", "recalibrated"])
def test_batchnorm_stays_as_it_was_chosen(batchnorm):
    problem = tiny_mlp(batchnorm=True)
    risk = problem.risk(batchnorm=batchnorm, batchnorm_batch=8)
    other = risk.with_model(problem.model)
    assert other.value() == pytest.approx(risk.value(), rel=1e-12)
    assert other.settings() == risk.settings()
    far = tiny_mlp(batchnorm=True, num_samples=40).risk(batchnorm=batchnorm)
    assert far.value() != risk.value()


def test_a_closure_goes_with_it():
    def closure(model: nn.Module, batch: Tensor) -> Tensor:
        return (model.theta * batch.mean()).square().sum()

    risk = sh.EmpiricalRisk(
        Point(torch.ones(2)), closure=closure, data=[torch.ones(3), 2 * torch.ones(1)]
    )
    other = risk.with_model(Point(torch.full((5,), 2.0)))
    assert other.value() == pytest.approx((3 * 20 + 1 * 80) / 4)


def test_a_subset_keeps_its_samples():
    problem = tiny_mlp()
    part = problem.risk().subset([3, 3, 5])
    x, y = (each[[3, 3, 5]] for each in problem.data)
    expected = F.cross_entropy(problem.model(x), y).item()
    assert part.with_model(part.network()).value() == pytest.approx(expected, rel=1e-12)


# -- what a risk shows of its data --------------------------------------------------


def test_the_whole_data_are_one_batch_however_they_came():
    problem = tiny_mlp()
    x, y = problem.data
    loader = list(zip(x.split(7), y.split(7), strict=True))
    risk = sh.EmpiricalRisk(problem.risk().model, CE, loader, chunk_size=3)
    for whole, part in zip(problem.data, risk.full_batch(), strict=True):
        assert torch.equal(part, whole)


def test_a_loss_is_the_one_it_was_built_with():
    loss = partial(F.cross_entropy, label_smoothing=0.1)
    problem = tiny_mlp()
    assert sh.EmpiricalRisk(problem.model, loss, problem.data).loss is loss


class Sum(nn.Module):
    """Of several inputs, each under one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a + b)


@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize("kind", [tuple, dict])
def test_probe_inputs_are_the_first_samples_as_the_model_takes_them(kind, most):
    a, b = normal(generator(0), 9, 3), normal(generator(1), 9, 3)
    inputs = (a, b) if kind is tuple else {"a": a, "b": b}
    risk = sh.EmpiricalRisk(Sum(), CE, (inputs, torch.arange(9) % 2), chunk_size=2)
    found = risk.probe_inputs(most)
    assert type(found) is kind
    parts = found if kind is tuple else (found["a"], found["b"])
    assert torch.equal(parts[0], a[:most])
    assert torch.equal(parts[1], b[:most])
    single = tiny_mlp().risk().probe_inputs()
    assert torch.equal(single, tiny_mlp().data[0][:16])


@pytest.mark.parametrize("what", ["loss", "probe_inputs", "targets", "accuracy", "outputs"])
def test_a_closure_hides_what_it_alone_knows(what):
    risk = sh.EmpiricalRisk(
        Point(torch.ones(2)), closure=lambda m, _: m.theta.sum(), data=[torch.ones(3)]
    )
    with pytest.raises(TypeError, match="must come from a risk with a `loss`"):
        getattr(risk, what)()
    with pytest.raises(TypeError, match="`data` must come"):
        risk.full_batch()


# -- accuracy -----------------------------------------------------------------------


class Shift(nn.Module):
    """Outputs are inputs, moved by one parameter that changes no class."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [
        (CE, -100),
        (nn.CrossEntropyLoss(ignore_index=2, reduction="sum"), 2),
        (nn.NLLLoss(ignore_index=0), 0),
        (F.cross_entropy, -100),
        (partial(F.cross_entropy, ignore_index=3), 3),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 100])
@pytest.mark.parametrize("length", [(), (3,)])
def test_ignored_targets_are_neither_right_nor_wrong(loss, ignored, chunk_size, length):
    draw = generator(8)
    logits = normal(draw, 23, 4, *length)
    y = torch.randint(4, (23, *length), generator=draw)
    y[::3] = ignored
    risk = sh.EmpiricalRisk(Shift(), loss, (logits, y), chunk_size=chunk_size)
    pairs = zip(logits.movedim(1, -1).reshape(-1, 4), y.flatten(), strict=True)
    hits = [int(row.argmax()) == int(c) for row, c in pairs if c != ignored]
    assert 0 < sum(hits) < len(hits)
    assert risk.accuracy() == pytest.approx(sum(hits) / len(hits), rel=1e-12)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float32"])
def test_whole_numbers_alone_are_classes(dtype):
    y = (torch.arange(6) % 2).to(getattr(torch, dtype))
    data = normal(generator(0), 6, 2), y
    risk = sh.EmpiricalRisk(Shift(), lambda z, y: F.cross_entropy(z, y.long()), data)
    assert risk.is_classification == ("int" in dtype)
    assert risk.has_outputs


def test_another_theta_has_another_length_or_accuracy():
    problem = softmax_regression()
    risk, (x, y) = problem.risk(), problem.data
    right = ((x @ problem.model.weight.T + problem.model.bias).argmin(1) == y).tolist()
    assert risk.accuracy(-risk.theta) == pytest.approx(sum(right) / 23, rel=1e-12)
    with pytest.raises(ValueError, match=r"`theta` must have shape .*n=16; got \(3,\)"):
        risk.accuracy(torch.ones(3))
