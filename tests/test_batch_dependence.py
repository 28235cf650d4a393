"""f is defined by the batches that were given: cut and joined only where it may be."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import filled, generator, normal
from torch import nn
from torch.func import functional_call

from sharpness import EmpiricalRisk, NondeterministicRiskError, NotAvailableError
from sharpness.risk import batches, memory

CLASSES = 3


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def by_hand(model, f):
    """f(call), its gradient, and a product with a direction, on one graph."""
    names = [name for name, _ in model.named_parameters()]
    leaves = [p.detach().requires_grad_() for p in model.parameters()]
    moved = dict(zip(names, leaves, strict=True))
    value = f(lambda *x: functional_call(model, moved, x))
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    flat = torch.cat([slope.flatten() for slope in slopes])
    v = normal(generator(8), len(flat))
    if not flat.requires_grad:
        return value.detach(), flat.detach(), v, torch.zeros_like(v)
    found = torch.autograd.grad(flat @ v, leaves, materialize_grads=True)
    return value.detach(), flat.detach(), v, torch.cat([h.flatten() for h in found])


def assert_defined_by(risk, model, f):
    value, slope, v, product = by_hand(model, f)
    if value.isnan():  # a mean over no terms: there is nothing to differentiate
        assert math.isnan(risk.value())
        return
    near = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.full_like(value, risk.value()), value, **near)
    torch.testing.assert_close(risk.gradient(), slope, **near)
    torch.testing.assert_close(risk.hvp(v), product, **near)


# -- losses at random --------------------------------------------------------------------


def squares(o, t):
    return (o - t) ** 2


def with_classes(function):
    """For a loss of class numbers, where targets are scores."""
    return lambda o, t: function(o, t.argmax(1))


def masked(o, t):
    kept = t > 0.3
    return squares(o, t)[kept].sum() / kept.sum()


def ranked(o, t):
    return F.softplus(-(o[:, None] - o) * (t[:, None] - t).sign()).mean()


def contrastive(o, t):
    scores = F.normalize(o, dim=1) @ F.normalize(t, dim=1).T
    return F.cross_entropy(scores / 0.5, torch.arange(len(o)))


def dice(o, t):
    p, q = o.sigmoid(), (t > 0).double()
    return 1 - 2 * (p * q).sum() / (p.sum() + q.sum())


WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
# Losses and what adds up over batches: means of the rows or terms, or sums.
LOSSES = {
    "mean": (lambda o, t: squares(o, t).mean(), "mean", None),
    "mean of sums": (lambda o, t: squares(o, t).sum(1).mean(), "mean", None),
    "log cosh": (lambda o, t: (o - t).cosh().log().mean(), "mean", None),
    "class mean": (with_classes(F.cross_entropy), "mean", None),
    "mean and a constant": (lambda o, t: squares(o, t).mean() + 3, "mean", None),
    "mean of shape (1,)": (lambda o, t: squares(o, t).mean().reshape(1), "mean", None),
    "hinge": (lambda o, t: F.relu(0.2 - o * t.sign()).square().mean(), "mean", None),
    "sum": (lambda o, t: squares(o, t).sum(), "sum", None),
    "a batch size by heart": (lambda o, t: squares(o, t).sum() / 32, "sum", None),
    "rows": (lambda o, t: squares(o, t).sum(1), "sum", None),
    "elements": (squares, "sum", None),
    "sum by terms": (lambda o, t: squares(o, t).sum(), "sum", torch.numel),
    "masked": (masked, "mean", None),
    "masked by terms": (masked, "mean", lambda t: (t > 0.3).sum()),
    "masked, terms of rows": (masked, "mean", len),
    "weighted": (with_classes(nn.CrossEntropyLoss(weight=WEIGHTS)), "mean", None),
    "weighted by terms": (
        with_classes(nn.CrossEntropyLoss(weight=WEIGHTS)),
        "mean",
        lambda t: WEIGHTS[t.argmax(1)].sum(),
    ),
    "ignored": (with_classes(nn.CrossEntropyLoss(ignore_index=0)), "mean", None),
    "root": (lambda o, t: squares(o, t).mean().sqrt(), "mean", None),
    "root by terms": (lambda o, t: squares(o, t).mean().sqrt(), "mean", lambda t: 2.0),
    "over the root of N": (lambda o, t: squares(o, t).sum() / len(o) ** 0.5, "mean", None),
    "Dice": (dice, "mean", None),
    "contrastive": (contrastive, "mean", None),
    "ranked": (ranked, "mean", None),
    "neighbours": (lambda o, t: (o[1:] - o[:-1]).square().mean(), "mean", None),
    "variance": (lambda o, t: squares(o, t).mean() + o.var(0).sum(), "mean", None),
    "largest": (lambda o, t: squares(o, t).max(), "mean", None),
    "flooded": (lambda o, t: (squares(o, t).mean() - 1).abs(), "mean", None),
}
OWN = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "smooth": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    "smooth, one weighs nothing": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 0.0, 2.0]).double(), label_smoothing=0.2, ignore_index=2
    ),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
}


def check_one_at_random(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(2, 25) for _ in range(draw.randint(1, 5))]
    x = normal(generator(seed), sum(sizes), 4)
    t = normal(generator(seed + 1), sum(sizes), CLASSES)
    if draw.random() < 0.3:
        t = t[t.argmax(1).argsort()]  # like with like
    chunk_size = draw.choice(["auto", 1, 5, 7, 50])
    model, name = network(), draw.choice([*LOSSES, *OWN])
    if name in OWN:
        classes = t.argmax(1)
        pairs = list(zip(x.split(sizes), classes.split(sizes), strict=True))
        risk = EmpiricalRisk(model, OWN[name], pairs, chunk_size=chunk_size)
        assert not risk.notes
        assert_defined_by(risk, model, lambda call: OWN[name](call(x), classes))
        return
    loss, how, terms = LOSSES[name]
    pairs = list(zip(x.split(sizes), t.split(sizes), strict=True))
    risk = EmpiricalRisk(model, loss, pairs, chunk_size=chunk_size, terms=terms)
    weights = [float((terms or len)(b)) for _, b in pairs]
    of_each = [1.0] * len(pairs) if how == "sum" else weights
    assert_defined_by(
        risk,
        model,
        lambda call: (
            sum(
                w * loss(call(a), b).sum()
                for w, (a, b) in zip(of_each, pairs, strict=True)
                if w
            )
            / sum(weights)
        ),
    )


@pytest.mark.parametrize("seed", range(20))
def test_f_is_what_the_given_batches_say(seed):
    check_one_at_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(a, a + 50) for a in range(1000, 1500, 50)])
def test_f_is_what_the_given_batches_say_in_500_of_500(seeds):
    for seed in seeds:
        check_one_at_random(seed)


# -- what is said ------------------------------------------------------------------------

X, T = normal(generator(0), 40, 4), normal(generator(1), 40, CLASSES)
BATCHES = [(X[:25], T[:25]), (X[25:], T[25:])]
DEPENDS = "f depends on how the data are batched: "


def root(o, t):
    return squares(o, t).mean().sqrt()


def test_a_risk_says_where_f_depends_on_the_batches():
    risk = EmpiricalRisk(network(), root, BATCHES)
    assert risk.notes == [
        DEPENDS + "2 batches as given "
        "(the loss was not seen to be a mean or a sum over rows)"
    ]
    assert risk.settings()["notes"] == risk.notes
    assert risk.chunk_size is None
    assert "1 batch as given" in EmpiricalRisk(network(), root, (X, T)).notes[0]


def test_a_dependence_that_only_the_curvature_has_is_seen():
    # Where all errors are of one size, a root of a mean and its gradient are those of
    # any part; its curvature couples all rows.
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    t = T[:, :1].sign()
    risk = EmpiricalRisk(model, root, (X, t), chunk_size=7)
    assert risk.notes
    assert_defined_by(risk, model, lambda call: root(call(X), t))


def test_a_part_for_batchnorm_is_a_batch():
    model = nn.Sequential(nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES)).double()
    settings = {"batchnorm": "batch", "batchnorm_batch": 25}
    (note,) = EmpiricalRisk(model, nn.MSELoss(), BATCHES, **settings).notes
    assert "2 batches given were joined and cut for BatchNorm, into 2 of up to 20" in note
    halves = [(X[:20], T[:20]), (X[20:], T[20:])]
    assert not EmpiricalRisk(model, nn.MSELoss(), halves, **settings).notes
    risk = EmpiricalRisk(model, root, BATCHES, **settings)
    assert "2 parts for BatchNorm (the loss was not seen" in risk.notes[1]
    parts = [(X[:20], T[:20]), (X[20:], T[20:])]
    expected = sum(root(model(x), t) / 2 for x, t in parts)
    assert risk.value() == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("loss", [root, contrastive, masked])
def test_what_needs_samples_of_their_own_is_not_available(loss):
    risk = EmpiricalRisk(network(), loss, BATCHES)
    assert not risk.can_be_cut
    with pytest.raises(ValueError, match="`loss` must be a mean or a sum over rows"):
        risk.subset([0, 1])
    v = torch.ones(risk.n, dtype=torch.float64)
    for matrix in ("empirical_fisher", "gradient_covariance"):
        with pytest.raises(NotAvailableError, match=r"`loss` must .* couples"):
            risk.product(v, matrix)
    assert torch.isfinite(risk.product(v, "gauss_newton")).all()


def test_a_batch_that_must_be_whole_and_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(batches, "_OF_A_TENSOR", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * (X.nbytes + T.nbytes))
    with pytest.raises(ValueError, match=r"`data` must come in .*; got 40") as error:
        EmpiricalRisk(network(), root, (X, T))
    assert "\n" not in str(error.value)
    EmpiricalRisk(network(), nn.MSELoss(), (X, T))


def test_an_early_look_spares_the_pass_over_the_data():
    seen = []
    model = network()
    model.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    x, t = normal(generator(0), 3000, 4), normal(generator(1), 3000, CLASSES)
    EmpiricalRisk(model, contrastive, (x, t))
    early = sum(seen)
    assert early < 1000
    seen.clear()
    EmpiricalRisk(model, lambda o, t: squares(o, t).mean(), (x, t))
    assert 3000 < sum(seen) < 3000 + 6000
    seen.clear()
    EmpiricalRisk(model, nn.MSELoss(), (x, t))
    assert sum(seen) < 3000


# -- forward passes that couple rows -----------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.cells, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.head(self.cells(x)[0])


SPEECH = [
    (normal(generator(n), 7, n, 3), normal(generator(n + 50), 7, n, 2)) for n in (6, 2)
]


def mean_square(o, t):
    return squares(o, t).mean()


HOW = {
    "own": {"loss": nn.MSELoss()},
    "function": {"loss": mean_square},
    "sum": {"loss": lambda o, t: squares(o, t).sum()},
    "closure": {"closure": lambda m, b: mean_square(m(b[0]), b[1])},
}


@pytest.mark.parametrize("how", HOW)
def test_where_time_comes_first_samples_are_the_second_dimension(how):
    model = TimeFirst()
    risk = EmpiricalRisk(model, data=SPEECH, chunk_size=3, **HOW[how])
    assert_defined_by(
        risk,
        model,
        lambda call: sum(squares(call(x), t).sum() for x, t in SPEECH) / (7 * 8 * 2),
    )
    assert risk.num_samples == 8


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x - x.mean(0))


def named(loss) -> str:
    """A test's name must be the same in every process."""
    return getattr(loss, "__name__", type(loss).__name__)


@pytest.mark.parametrize("loss", [nn.MSELoss(), mean_square, root], ids=named)
def test_a_layer_that_mixes_rows_sees_the_batches_as_given(loss):
    model = Centred()
    risk = EmpiricalRisk(model, loss, BATCHES, chunk_size=7)
    assert_defined_by(
        risk, model, lambda call: sum(len(t) * loss(call(x), t) for x, t in BATCHES) / 40
    )
    assert risk.notes == [DEPENDS + "2 batches as given (the forward pass couples rows)"]


def test_rows_that_are_the_same_at_first_hide_no_layer_that_mixes_them():
    x = torch.cat([torch.zeros(100, 4).double(), normal(generator(0), 10, 4)])
    risk = EmpiricalRisk(Centred(), nn.MSELoss(), (x, normal(generator(1), 110, CLASSES)))
    assert "couples rows" in risk.notes[0]


def test_single_rows_have_nothing_to_depend_on():
    model = network()
    for data in ((X[:1], T[:1]), [(X[i : i + 1], T[i : i + 1]) for i in range(5)]):
        risk = EmpiricalRisk(model, mean_square, data)
        assert not risk.notes


class Pair(nn.Module):
    """Several outputs, and one that belongs to no row."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        out = self.inner(x)
        return {"scores": out, "twice": (2 * out, out.tanh()), "scale": torch.tensor(0.5)}


def test_a_model_may_return_several_tensors():
    def loss(o, t):
        return o["scale"] * mean_square(o["scores"] + o["twice"][1], t)

    model = Pair()
    risk = EmpiricalRisk(model, loss, BATCHES, chunk_size=7)
    assert not risk.notes
    assert_defined_by(risk, model, lambda call: loss(call(X), T))


def test_a_model_may_return_several_places_a_row():
    tokens = torch.arange(60).reshape(12, 5) % 7
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.Flatten(0, 1)).double()

    def loss(o, t, **settings):
        return F.cross_entropy(o, t.flatten(), **settings)

    risk = EmpiricalRisk(model, loss, (tokens, tokens), chunk_size=5)
    assert not risk.notes
    assert_defined_by(risk, model, lambda call: loss(call(tokens), tokens))
    ignoring = partial(loss, ignore_index=0)
    risk = EmpiricalRisk(model, ignoring, (tokens, tokens), chunk_size=5)
    assert risk.notes
    assert_defined_by(risk, model, lambda call: ignoring(call(tokens), tokens))


# -- random draws ------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, drawn):
        super().__init__()
        self.inner, self.drawn = network(), drawn

    def forward(self, x):
        return self.inner(x) + self.drawn(x)


DRAWS = {
    "model": (Noisy(lambda x: torch.rand(len(x), 1)), nn.MSELoss()),
    "dropout": (Noisy(lambda x: F.dropout(x[:, :1])), mean_square),
    "NumPy": (Noisy(lambda x: np.random.rand()), nn.MSELoss()),  # noqa: NPY002
    "loss": (network(), lambda o, t: (torch.rand(len(o), 1) * squares(o, t)).mean()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_draws_are_the_same_in_chunks_of_any_size(name):
    model, loss = DRAWS[name]
    risks = [EmpiricalRisk(model, loss, BATCHES, chunk_size=c) for c in ("auto", 3, 40)]
    assert risks[0].notes == [DEPENDS + "2 batches as given (random numbers are drawn)"]
    v = torch.ones(risks[0].n, dtype=torch.float64)
    for risk in risks[1:]:
        assert risk.value() == risks[0].value()
        assert torch.equal(risk.gradient(), risks[0].gradient())
        assert torch.equal(risk.hvp(v), risks[0].hvp(v))


def test_draws_that_cannot_be_repeated_are_refused():
    own = generator(0)
    model = Noisy(lambda x: torch.randn(len(x), 1, generator=own))
    with pytest.raises(NondeterministicRiskError, match="got two evaluations") as error:
        EmpiricalRisk(model, nn.MSELoss(), (X, T))
    assert error.value.first != error.value.second
    assert "\n" not in str(error.value)


def test_a_model_that_changes_from_call_to_call_is_noted():
    calls = []

    def drift(x):
        calls.append(1)
        return 0.01 * len(calls)

    risk = EmpiricalRisk(Noisy(drift), nn.MSELoss(), (X, T))
    assert "the same rows twice give two values" in risk.notes[0]


# -- broadcasts --------------------------------------------------------------------------

STRETCHED = {
    "squares": lambda o, t: ((o - t) ** 2).mean(),
    "root": lambda o, t: ((t - o) ** 2).mean().sqrt(),
    "functional": lambda o, t: F.mse_loss(o, t),
    "sum": lambda o, t: (t * o).cosh().sum(),
    "largest": lambda o, t: torch.maximum(o.tanh(), t).mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("flat", ["outputs", "targets"])
def test_a_function_that_broadcasts_is_refused(name, flat):
    layers = [nn.Linear(4, 1), *([nn.Flatten(0)] if flat == "outputs" else [])]
    model = nn.Sequential(*layers).double()
    targets = T[:, 0] if flat == "targets" else T[:, :1]
    with pytest.raises(ValueError, match=r"`data` must have targets.*broadcast") as error:
        EmpiricalRisk(model, STRETCHED[name], (X, targets))
    assert "\n" not in str(error.value)


def test_shapes_that_a_loss_brings_together_itself_are_no_broadcast():
    model = nn.Linear(4, 1).double()

    def ranked_column(o, t):
        return F.softplus(-(o - o.T) * (t[:, None] - t).sign()).mean()

    for loss in (ranked_column, lambda o, t: squares(o[:, 0], t).mean()):
        risk = EmpiricalRisk(model, loss, (X, T[:, 0]), chunk_size=7)
        assert_defined_by(risk, model, lambda call, loss=loss: loss(call(X), T[:, 0]))


# -- parts that cannot be evaluated ------------------------------------------------------


def test_weights_by_the_place_in_the_batch_keep_it_whole():
    w = normal(generator(4), 40, 1).abs()
    model, y = network(), (T > 0).double()
    for loss in (
        lambda o, t: (w * squares(o, t)).mean(),
        nn.BCEWithLogitsLoss(weight=w),
        partial(F.binary_cross_entropy_with_logits, weight=w),
    ):
        risk = EmpiricalRisk(model, loss, (X, y), chunk_size=7)
        assert_defined_by(risk, model, lambda call, loss=loss: loss(call(X), y))
        assert risk.notes
    few = nn.BCEWithLogitsLoss(weight=w[:10])  # as many as an early look takes, or fewer
    risk = EmpiricalRisk(model, few, (X[:10], y[:10]), chunk_size=1)
    assert_defined_by(risk, model, lambda call: few(call(X[:10]), y[:10]))


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 1025])
@pytest.mark.parametrize("loss", [nn.MSELoss(), mean_square], ids=named)
def test_no_chunk_has_a_single_row(rows, loss):
    model = Squeezed(4, 1).double()
    x, t = normal(generator(0), rows, 4), normal(generator(1), rows)
    risk = EmpiricalRisk(model, loss, (x, t))
    assert_defined_by(risk, model, lambda call: loss(call(x), t))


def test_a_loss_that_is_zero_and_flat_is_told_from_other_pairings():
    t = torch.ones(40, 1, dtype=torch.float64)
    t[30:] = -1
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 0, 0, 0]]))
        model.bias.zero_()
    x = X.clone()
    x[:, 0] = t[:, 0]
    for name, loss in {
        "mean": lambda o, t: F.relu(1 - o * t).square().mean(),
        "sum": lambda o, t: F.relu(1 - o * t).square().sum(),
    }.items():
        risk = EmpiricalRisk(model, loss, (x, t), chunk_size=7)
        assert risk.value() == 0
        assert ["adds up" in note for note in risk.notes] == [True] * (name == "sum")
        away = -risk.theta
        expected = F.relu(1 + model(x) * t).square().mean()
        assert risk.value(away) == pytest.approx(float(expected.detach())), name
    nothing = EmpiricalRisk(model, lambda o, t: (0 * o).sum(), (x, t), chunk_size=7)
    assert nothing.value() == 0
    assert nothing.chunk_size is None


# -- closures ----------------------------------------------------------------------------


def closure_of(loss):
    return lambda model, batch: loss(model(batch["x"]), batch["y"])


DICTS = [{"step": torch.tensor(3), "x": x, "y": t} for x, t in BATCHES]


@pytest.mark.parametrize(
    "terms", [None, lambda batch: (batch["y"] > 0.3).sum()], ids=["none", "kept"]
)
def test_a_closure_that_is_no_mean_over_rows_says_so(terms):
    model, closure = network(), closure_of(masked)
    risk = EmpiricalRisk(model, closure=closure, data=DICTS, terms=terms)
    assert bool(risk.notes) == (terms is None)
    weights = [float((terms or (lambda b: len(b["y"])))(b)) for b in DICTS]
    assert_defined_by(
        risk,
        model,
        lambda call: (
            sum(
                w * masked(call(b["x"]), b["y"])
                for w, b in zip(weights, DICTS, strict=True)
            )
            / sum(weights)
        ),
    )
    if terms is None:
        assert risk.notes == [
            DEPENDS + "2 batches as given (the closure was not seen to be a mean over rows)"
        ]


def test_a_closure_over_rows_or_over_one_batch_has_nothing_to_say():
    model = network()
    assert not EmpiricalRisk(model, closure=closure_of(mean_square), data=DICTS).notes
    assert not EmpiricalRisk(model, closure=closure_of(root), data=DICTS[:1]).notes


def test_lists_of_samples_are_cut_sample_by_sample():
    model = nn.Linear(3, 1).double()
    images = [[normal(generator(n), n, 3) for n in sizes] for sizes in ((4, 5, 3), (6,))]
    data = [(some, torch.zeros(len(some))) for some in images]

    def closure(model, batch):
        return torch.stack([model(image).square().mean() for image in batch[0]]).mean()

    risk = EmpiricalRisk(model, closure=closure, data=data)
    every = [image for some in images for image in some]
    assert risk.num_samples == 4
    assert not risk.notes
    assert_defined_by(
        risk, model, lambda call: sum(call(image).square().mean() for image in every) / 4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_dependence_and_hides_none(dtype):
    x, t = (normal(generator(n), 3000, k).to(dtype) for n, k in ((0, 4), (1, CLASSES)))
    model = network().to(dtype)
    assert not EmpiricalRisk(model, mean_square, (x, t)).notes
    assert EmpiricalRisk(model, root, (x, t)).notes


@pytest.mark.parametrize("shape", [(30, 16), (30, 1, 4, 4), (30, 1)])
def test_a_closure_that_is_no_mean_weighs_batches_by_rows_whatever_the_shape(shape):
    """A second dimension of one, such as the channel of grey images, is no time."""
    x, targets = normal(generator(0), *shape), torch.arange(30) % 3
    size = x[0].numel()
    model = nn.Sequential(nn.Flatten(), filled(nn.Linear(size, 3), generator(1))).double()
    weight = torch.tensor([1.0, 5.0, 0.2]).double()
    batches = list(zip(x.split([8, 8, 14]), targets.split([8, 8, 14]), strict=True))

    def closure(m, batch):
        return F.cross_entropy(m(batch[0].double()), batch[1], weight=weight)

    risk = EmpiricalRisk(model, closure=closure, data=batches)
    expected = sum(float(closure(model, b).detach()) * len(b[1]) for b in batches) / 30
    assert risk.value() == pytest.approx(expected, rel=1e-6)
    assert risk.num_samples == 30
    assert any("as given" in note for note in risk.notes)
