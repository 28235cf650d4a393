"""Remedies and ghost batches against closed forms in numpy and plain loops in PyTorch."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharpness.lab.ghost import use_ghost_batches
from sharpness.lab.named import from_spec
from sharpness.lab.remedies import (
    ASAM,
    REMEDIES,
    SAM,
    Adversarial,
    Conservative,
    Plain,
    Step,
)
from sharpness.risk.empirical import EmpiricalRisk

RATE, TIGHT = 0.05, 1e-12
EVERY = [Plain(), Conservative(), Adversarial(), SAM(), ASAM()]
TWICE = [Conservative(strength=0.5), Adversarial(), SAM(), ASAM()]
RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(6, 3)), RNG.normal(size=6)
W = np.array([0.7, -1.3, 0.4])
H, B = 2 / 6 * X.T @ X, 2 / 6 * X.T @ T


def slope(w: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    """Of the mean squared error of a linear model."""
    return 2 / 6 * x.T @ (x @ w - T)


def linear(w: np.ndarray = W, rate: float = RATE, dtype=torch.float64, **settings) -> Step:
    """Least squares by a linear model under SGD."""
    model = nn.Linear(3, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w)[None])
    clip_norm, loss = settings.pop("clip_norm", None), settings.pop("loss", nn.MSELoss())
    sgd = torch.optim.SGD(model.parameters(), lr=rate, **settings)
    x, t = torch.tensor(X, dtype=dtype), torch.tensor(T, dtype=dtype)[:, None]
    return Step(model, loss, sgd, x, t, clip_norm)


def network(*, batchnorm: bool = True, dtype: torch.dtype = torch.float64) -> Step:
    """Six samples under a small network, and SGD."""
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(5) if batchnorm else nn.Identity()
    model = nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    x, t = torch.tensor(X, dtype=dtype), torch.tensor(T, dtype=dtype)[:, None]
    return Step(model, nn.MSELoss(), sgd, x, t)


def weights(step: Step) -> np.ndarray:
    flat = [p.detach().reshape(-1) for p in step.model.parameters()]
    return torch.cat(flat).double().numpy()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- updates in closed form --------------------------------------------------------


def test_a_plain_update_is_the_optimizers():
    step = linear(momentum=0.9, weight_decay=0.1)
    Plain()(step)
    first = slope(W) + 0.1 * W
    here = W - RATE * first
    assert weights(step) == pytest.approx(here, rel=TIGHT)
    Plain()(step)
    second = 0.9 * first + slope(here) + 0.1 * here
    assert weights(step) == pytest.approx(here - RATE * second, rel=TIGHT)


@pytest.mark.parametrize("remedy", [Plain(), SAM(rho=2)], ids=str)
@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 1e6])
def test_the_gradient_of_an_update_is_shortened_to_the_clip_norm(remedy, clip_norm):
    step = linear(clip_norm=clip_norm, weight_decay=0.1)
    remedy(step)
    there = W + (2 * slope(W) / np.linalg.norm(slope(W)) if isinstance(remedy, SAM) else 0)
    length = np.linalg.norm(slope(there))
    moved = slope(there) * min(1, clip_norm / length) + 0.1 * W
    # PyTorch adds 1e-6 to the length.
    assert weights(step) == pytest.approx(W - RATE * moved, rel=1e-6 / length)
    assert (length > clip_norm) == (clip_norm < 2)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize("inner_steps", [1, 2, 3, 400])
def test_a_conservative_update_descends_to_the_solution_of_the_proximal_problem(
    strength, inner_steps
):
    """Every inner step contracts towards it by I - rate (H + lambda I)."""
    step, here = linear(rate=0.3), W
    stiff = H + strength * np.eye(3)
    shrink = np.linalg.matrix_power(np.eye(3) - 0.3 * stiff, inner_steps)
    for _ in range(2):
        Conservative(strength=strength, inner_steps=inner_steps)(step)
        solution = np.linalg.solve(stiff, B + strength * here)
        here = solution + shrink @ (here - solution)
        assert weights(step) == pytest.approx(here, rel=1e-10)


def test_a_conservative_update_keeps_the_moments_of_adam_from_batch_to_batch():
    step = linear()
    adam = torch.optim.Adam(step.model.parameters(), lr=1e-2)
    step = replace(step, optimizer=adam)
    here, first, second, count = W, 0.0, 0.0, 0
    for _ in range(3):
        Conservative(strength=0.7, inner_steps=4)(step)
        anchor = here
        for _ in range(4):
            g, count = slope(here) + 0.7 * (here - anchor), count + 1
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            root = np.sqrt(second / (1 - 0.999**count)) + 1e-8
            here = here - 1e-2 * first / (1 - 0.9**count) / root
        assert weights(step) == pytest.approx(here, rel=1e-10)


def test_an_adversarial_update_of_a_network_is_that_of_a_plain_loop():
    step, twin = network(), network()
    Adversarial(epsilon=0.3, share=0.4)(step)
    x = twin.inputs.clone().requires_grad_()
    clean = (twin.model(x) - twin.targets).square().mean()
    moved = x.detach() + 0.3 * torch.autograd.grad(clean, x, retain_graph=True)[0].sign()
    loss = 0.6 * clean + 0.4 * (twin.model(moved) - twin.targets).square().mean()
    parameters = list(twin.model.parameters())
    slopes = torch.autograd.grad(loss, parameters)
    for found, p, g in zip(step.model.parameters(), parameters, slopes, strict=True):
        assert torch.allclose(found, p - RATE * g, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rho", [0.05, 0.5, 10])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_a_sam_update_takes_the_gradient_on_the_sphere(rho, weight_decay):
    step = linear(weight_decay=weight_decay)
    SAM(rho=rho)(step)
    there = slope(W + rho * slope(W) / np.linalg.norm(slope(W)))
    assert weights(step) == pytest.approx(W - RATE * (there + weight_decay * W), rel=TIGHT)


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("rho", [0.5, 1])
def test_an_asam_update_takes_the_gradient_on_the_stretched_sphere(rho, eta):
    step = linear()
    ASAM(rho=rho, eta=eta)(step)
    g, stretch = slope(W), np.abs(W) + eta
    there = W + rho * stretch**2 * g / np.linalg.norm(stretch * g)
    assert weights(step) == pytest.approx(W - RATE * slope(there), rel=TIGHT)


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_both_sams_of_a_network_are_those_of_a_plain_loop(adaptive, batchnorm):
    step, twin = network(batchnorm=batchnorm), network(batchnorm=batchnorm)
    (ASAM if adaptive else SAM)(rho=0.7)(step)
    here = {n: p.detach().clone() for n, p in twin.model.named_parameters()}

    def gradient(point: dict[str, Tensor]) -> dict[str, Tensor]:
        point = {n: p.clone().requires_grad_() for n, p in point.items()}
        loss = (functional_call(twin.model, point, twin.inputs) - twin.targets).square()
        slopes = torch.autograd.grad(loss.mean(), list(point.values()))
        return dict(zip(point, slopes, strict=True))

    g = gradient(here)
    stretched = {
        n: p.abs() + 0.01 if adaptive and n.endswith("weight") else torch.ones_like(p)
        for n, p in here.items()
    }
    length = math.sqrt(sum(float((stretched[n] * g[n]).square().sum()) for n in g))
    there = gradient({n: here[n] + 0.7 * stretched[n] ** 2 * g[n] / length for n in g})
    for name, p in step.model.named_parameters():
        assert torch.allclose(p, here[name] - RATE * there[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("remedy", [SAM(rho=0.3), ASAM(rho=0.3, eta=0)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float64, k) for k in (-700, 0, 200)]
    + [(torch.float32, k) for k in (-90, 0, 60)],
)
def test_where_sam_looks_does_not_depend_on_the_scale_of_the_loss(remedy, dtype, exponent):
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2.0**exponent * nn.functional.mse_loss(outputs, targets)

    step, looked = linear(loss=loss, rate=0, dtype=dtype), []
    step.model.register_forward_pre_hook(lambda *_: looked.append(weights(step)))
    remedy(step)
    stretch = np.abs(W) if isinstance(remedy, ASAM) else np.ones(3)
    g = slope(W)
    there = W + 0.3 * stretch**2 * g / np.linalg.norm(stretch * g)
    eps = torch.finfo(dtype).eps
    assert looked[0] == pytest.approx(W, rel=eps)
    assert looked[1] == pytest.approx(there, rel=100 * eps)


# -- what every remedy keeps -------------------------------------------------------


@pytest.mark.parametrize("remedy", [SAM(rho=1e3), ASAM(rho=7.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_are_back_bit_for_bit_before_the_update(remedy, dtype, monkeypatch):
    step, seen = network(dtype=dtype), []
    before = weights(step)
    monkeypatch.setattr(step.optimizer, "step", lambda: seen.append(weights(step)))
    remedy(step)
    assert len(seen) == 1
    assert np.array_equal(seen[0], before)


@pytest.mark.parametrize("ghost", [None, 3])
@pytest.mark.parametrize("remedy", EVERY, ids=str)
def test_running_averages_move_once_with_the_clean_batch_at_the_first_weights(
    remedy, ghost
):
    step = network()
    inner = step.model[0](step.inputs).detach().numpy()
    if ghost:
        use_ghost_batches(step.model, ghost)
    remedy(step)
    mean, var = np.zeros(5), np.ones(5)
    parts = [inner[:3], inner[3:]] if ghost else [inner]
    for part in parts:
        mean = 0.9 * mean + 0.1 * part.mean(0)
        var = 0.9 * var + 0.1 * part.var(0, ddof=1)
    norm = step.model[1]
    assert norm.running_mean.numpy() == pytest.approx(mean, rel=1e-11)
    assert norm.running_var.numpy() == pytest.approx(var, rel=1e-11)
    assert int(norm.num_batches_tracked) == len(parts)
    assert norm.track_running_stats
    assert norm.training


COST = [(Plain(), 1), (Conservative(inner_steps=5), 5)] + [(r, 2) for r in EVERY[2:]]


@pytest.mark.parametrize(("remedy", "gradients"), COST, ids=str)
def test_an_update_costs_the_gradients_it_says_and_tells_the_loss_before(remedy, gradients):
    values = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        values.append(nn.functional.mse_loss(outputs, targets))
        return values[-1]

    found = remedy(linear(loss=loss))
    assert len(values) == gradients
    assert torch.equal(found, values[0])
    assert (found.shape, found.requires_grad) == ((), False)
    assert found.item() == pytest.approx(np.mean((X @ W - T) ** 2), rel=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("remedy", [*EVERY, SAM(rho=10), ASAM(rho=10)], ids=str)
def test_a_loss_without_slope_moves_nothing(remedy, dtype):
    step = linear(dtype=dtype, loss=lambda outputs, targets: 0 * outputs.square().sum())
    before = weights(step)
    assert remedy(step).item() == 0
    assert np.array_equal(weights(step), before)


@pytest.mark.parametrize("remedy", EVERY, ids=str)
def test_parameters_that_are_unused_or_frozen_stay(remedy):
    step = network()
    step.model.register_parameter("spare_weight", nn.Parameter(torch.ones(2)))
    step.model[3].weight.requires_grad_(False)
    step.optimizer.add_param_group({"params": [step.model.spare_weight]})
    frozen, first = step.model[3].weight.clone(), step.model[0].weight.clone()
    remedy(step)
    assert torch.equal(step.model.spare_weight, torch.ones(2))
    assert torch.equal(step.model[3].weight, frozen)
    assert not torch.equal(step.model[0].weight, first)
    assert step.model[3].weight.grad is None


@pytest.mark.parametrize("remedy", EVERY, ids=str)
def test_the_batch_stays_and_a_gradient_left_over_does_not_count(remedy):
    clean, dirty = linear(), linear()
    dirty.model.weight.grad = torch.full((1, 3), 1e6, dtype=torch.float64)
    for step in (clean, dirty):
        remedy(step)
        assert np.array_equal(step.inputs.numpy(), X)
        assert (step.inputs.requires_grad, step.inputs.grad) == (False, None)
        assert np.array_equal(step.targets.numpy()[:, 0], T)
    assert np.array_equal(weights(clean), weights(dirty))


@pytest.mark.parametrize("remedy", TWICE, ids=str)
def test_a_failure_leaves_batchnorm_tracking(remedy):
    step, calls = network(), []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return nn.functional.mse_loss(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        remedy(replace(step, loss=loss))
    assert step.model[1].track_running_stats
    assert int(step.model[1].num_batches_tracked) == 1


WRONG = {
    (SAM, "rho"): (0, -1, math.nan, math.inf, "1", (1,), None, True),
    (ASAM, "rho"): (0, math.nan),
    (ASAM, "eta"): (-0.01, math.nan, "0"),
    (Adversarial, "epsilon"): (0, -0.1, math.nan),
    (Adversarial, "share"): (0, 1, 1.5, math.nan),
    (Conservative, "strength"): (-1e-3, math.nan, "0"),
    (Conservative, "inner_steps"): (0, 2.5, True),
}


@pytest.mark.parametrize(
    ("make", "name", "value"), [(*key, value) for key in WRONG for value in WRONG[key]]
)
def test_what_is_no_remedy_is_refused(make, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must ") as error:
        make(**{name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_tokens_have_no_adversary(dtype):
    step = network()
    tokens = torch.zeros(6, 3, dtype=dtype)
    with pytest.raises(ValueError, match=f"`remedy` .*got {dtype}") as error:
        Adversarial()(replace(step, inputs=tokens))
    assert "\n" not in str(error.value)


# -- by name -----------------------------------------------------------------------


def test_a_remedy_has_a_name_with_arguments():
    assert from_spec("remedy", "none", REMEDIES) == Plain()
    assert from_spec("remedy", "asam?eta=0", REMEDIES) == ASAM(rho=0.5, eta=0)
    text = "conservative?strength=1e-2&inner_steps=5"
    assert from_spec("remedy", text, REMEDIES) == Conservative(strength=0.01, inner_steps=5)
    defaults = [SAM(rho=0.05), Adversarial(epsilon=0.25, share=0.5)]
    assert [
        from_spec("remedy", name, REMEDIES) for name in ("sam", "adversarial")
    ] == defaults


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SAM", "got 'SAM'. Did you mean sam?"),
        ("conservatve?strength=1", "got 'conservatve'. Did you mean conservative?"),
        ("", "none, conservative, adversarial, sam, asam; got ''."),
        ("sam?radius=0.1", "radius"),
        ("sam?rho=wide", "`rho` must be positive; got wide"),
        ("sam?rho=(1,2)", "`rho` must be positive; got (1, 2)"),
        ("sam?rho", "got 'sam?rho'"),
        (SAM(), "got SAM(rho=0.05)"),
    ],
)
def test_a_name_that_means_nothing_is_refused_in_one_line(text, says):
    with pytest.raises((ValueError, TypeError), match="`remedy` must ") as error:
        from_spec("remedy", text, REMEDIES)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# -- ghost batches -----------------------------------------------------------------

RAGGED = [(6, 6, [6]), (6, 100, [6]), (6, 3, [3, 3]), (7, 3, [3, 2, 2]), (10, 4, [4, 3, 3]),
          (9, 8, [5, 4]), (4, 2, [2, 2])]  # fmt: skip


def norm_of(dims: int) -> nn.Module:
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return kinds[dims](3, dtype=torch.float64)


def samples(num: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return 2 + torch.randn(num, 3, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("num", "size", "counts"), RAGGED)
@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 3, 2)])
def test_each_ghost_batch_has_its_own_statistics(shape, num, size, counts):
    layer, x = norm_of(len(shape)), samples(num, *shape)
    use_ghost_batches(layer, size)
    axes, mean, var, wanted = (0, *range(2, x.ndim)), 0, 1, []
    for part in np.split(x.numpy(), np.cumsum(counts)[:-1]):
        m, v = part.mean(axes, keepdims=True), part.var(axes, keepdims=True)
        wanted.append((part - m) / np.sqrt(v + 1e-5))
        count = part.size / 3
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * count / (count - 1)
    assert layer(x).detach().numpy() == pytest.approx(np.concatenate(wanted), abs=1e-11)
    assert layer.running_mean.numpy() == pytest.approx(mean.ravel(), rel=1e-12)
    assert layer.running_var.numpy() == pytest.approx(var.ravel(), rel=1e-12)
    assert int(layer.num_batches_tracked) == len(counts)


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"track_running_stats": False}]
)
def test_a_network_with_ghost_batches_is_the_network_on_split_batches(settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, **settings), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 5), nn.BatchNorm1d(5, **settings), nn.Linear(5, 1),
    ).double()  # fmt: skip
    plain, x = copy.deepcopy(model), samples(10, 4, 3)
    use_ghost_batches(model, 4)
    found, wanted = model(x), torch.cat([plain(part) for part in x.split([4, 3, 3])])
    assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-13)
    for output in (found, wanted):
        output.square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    assert buffers(model).keys() == buffers(plain).keys()
    for name, buffer in plain.named_buffers():
        assert torch.allclose(buffers(model)[name], buffer, rtol=1e-12)
    assert torch.allclose(model.eval()(x), plain.eval()(x), rtol=1e-11, atol=1e-13)


def test_ghost_batches_leave_evaluation_names_and_state():
    ghosted, plain, x = network().model, network().model, torch.from_numpy(X)
    use_ghost_batches(ghosted, 2)
    for trained, other in ((plain, ghosted), (ghosted, plain)):
        trained.train()(x)
        other.load_state_dict(trained.state_dict())
        assert same(ghosted.state_dict(), plain.state_dict())
        assert torch.equal(ghosted.eval()(x), plain.eval()(x))
        assert same(ghosted.state_dict(), plain.state_dict())
    assert str(ghosted) == str(plain)
    assert [n for n, _ in ghosted.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize("mode", ["running", "batch", "recalibrated"])
def test_ghost_batches_leave_the_risk(mode):
    """A checkpoint is measured without them: it must give what training wrote down."""
    step, twin = network(), network()
    use_ghost_batches(step.model, 3)
    risks = [
        EmpiricalRisk(s.model, nn.MSELoss(), (s.inputs, s.targets), batchnorm=mode)
        for s in (step, twin)
    ]
    assert risks[0].value() == pytest.approx(risks[1].value(), rel=1e-12)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_ghost_batches_and_owes_nothing_to_the_original(again):
    original, plain, x = norm_of(0), norm_of(0), samples(6)
    use_ghost_batches(original, 3)
    other = again(original)
    for layer in (plain, other):
        nn.init.constant_(layer.weight, 2)
    assert torch.equal(other(x), torch.cat([plain(part) for part in x.split(3)]))
    assert same(buffers(other), buffers(plain))
    assert same(buffers(original), buffers(norm_of(0)))
    use_ghost_batches(other, 2)
    other(x)
    assert int(other.num_batches_tracked) == 2 + 3


@pytest.mark.parametrize("num", [3, 5, 7])
def test_ghost_batches_of_two_leave_no_sample_alone(num):
    layer, x = norm_of(1), samples(num)
    use_ghost_batches(layer, 2)
    assert layer(x).isfinite().all()
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [(nn.BatchNorm1d(3), size, "be at least 2") for size in (1, 0, -4)]
    + [(model, 4, "be None") for model in (nn.LayerNorm(3), nn.InstanceNorm1d(3))],
)
def test_a_ghost_batch_of_one_and_one_without_batchnorm_are_refused(model, size, says):
    with pytest.raises(ValueError, match=f"`ghost_batch_size` must {says}") as error:
        use_ghost_batches(model, size)
    assert f"got {size}" in str(error.value)
    assert "\n" not in str(error.value)
