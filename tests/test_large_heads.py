"""Cross-entropy behind a linear layer with many classes, without the scores of all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from sharpness import EmpiricalRisk
from sharpness.risk import large_heads, memory
from sharpness.risk.large_heads import Postponed, Scores

CLASSES, ROWS, WIDTH = 700, 150, 6  # blocks of unequal size at the end of both


@pytest.fixture(autouse=True)
def _few_classes_are_many(monkeypatch):
    monkeypatch.setattr(large_heads, "LEAST_CLASSES", 500)


def tensors(dtype=torch.float64, rows=ROWS, classes=CLASSES, width=WIDTH, scale=1.0):
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, width), (classes, width), (classes,)
    h, weight, bias = (
        (torch.randn(s, generator=draw, dtype=torch.float64) * scale).to(dtype)
        for s in shapes
    )
    targets = torch.randint(0, classes, (rows,), generator=draw)
    targets[::7] = -100
    return [t.requires_grad_() for t in (h, weight, bias)], targets


def directions(leaves):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in leaves]


def derivatives(leaves, loss, postponed):
    """Loss, gradient and the Hessian's product with `directions`."""
    with Postponed() if postponed else torch.enable_grad():
        z = F.linear(*leaves)
        assert isinstance(z, Scores) == postponed
        value = loss(z)
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    return value, slopes, torch.autograd.grad(slopes, leaves, directions(leaves))


def assert_same(mine, plain, tol):
    for a, b in zip(mine, plain, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm()) <= tol * float(b.norm())


SETTINGS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"weight": torch.linspace(0, 2, CLASSES, dtype=torch.float64)},
    "ignored": {"ignore_index": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_gradient_and_product_are_those_of_the_scores(name, has_bias):
    leaves, targets = tensors()
    leaves = leaves if has_bias else leaves[:2]
    if name == "ignored":
        targets = targets.clamp(min=5)

    def loss(z):
        return F.cross_entropy(z, targets, **SETTINGS[name])

    plain, mine = (derivatives(leaves, loss, postponed) for postponed in (False, True))
    assert_same([mine[0], *mine[1], *mine[2]], [plain[0], *plain[1], *plain[2]], 1e-12)


def test_weights_of_rows_that_depend_on_parameters_are_differentiated():
    leaves, targets = tensors()

    def loss(z):
        each = F.cross_entropy(z, targets, reduction="none")
        return (each * leaves[0].square().sum(1)).sum()

    plain, mine = (derivatives(leaves, loss, postponed) for postponed in (False, True))
    assert_same(mine[2], plain[2], 1e-12)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # of PyTorch's own
def test_forward_mode_gives_the_same_slope_and_product():
    leaves, targets = tensors()

    def found(postponed):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(t.detach().requires_grad_(), k)
                for t, k in zip(leaves, directions(leaves), strict=True)
            ]
            with Postponed() if postponed else torch.enable_grad():
                value = F.cross_entropy(F.linear(*dual), targets)
            slopes = torch.autograd.grad(value, dual, create_graph=True)
            return [forward_ad.unpack_dual(t).tangent for t in (value, *slopes)]

    assert_same(found(True), found(False), 1e-12)


def test_a_saturated_softmax_keeps_its_digits_in_float32():
    """Widened to float64 behind float32 scores; beside the same numbers in float64."""
    leaves, _ = tensors(torch.float32, rows=40, scale=3.0)
    targets = F.linear(*leaves).argmax(1)

    def loss(z):
        return F.cross_entropy(z.double(), targets)

    assert 0 < float(loss(F.linear(*leaves)).detach()) < 1
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = derivatives(wide, loss, False)
    mine = derivatives(leaves, loss, True)
    plain = derivatives(leaves, loss, False)
    for a, b, c in zip(mine[2], plain[2], exact[2], strict=True):
        size = float(c.norm())
        assert float((a - c).norm()) <= 3 * float((b - c).norm()) + 1e-6 * size


MOVES = {
    "transpose": lambda z: z.transpose(1, 2),
    "movedim": lambda z: z.movedim(-1, 1),
    "permute": lambda z: z.permute(2, 0, 1),
    "rows": lambda z: z[:, :-1],
    "ellipsis": lambda z: z[..., 1:, :],
    "view": lambda z: z.view(-1, CLASSES),
    "view by a list": lambda z: z.view((6, 5, CLASSES)),
    "inferred": lambda z: z.reshape(30, -1),
    "flatten": lambda z: z.flatten(0, 1),
    "double": lambda z: z.double(),
    "to": lambda z: z.to(torch.float64).contiguous(),
}
USES = {
    "all": lambda z: z * 2,
    "some classes": lambda z: z[..., :10],
    "one class": lambda z: z[0, 0, 3],
    "softmax": lambda z: z.softmax(-1),
    "best": lambda z: z.argmax(-1),
    "classes first": lambda z: z.reshape(CLASSES, -1),
    "added": lambda z: torch.ones(()) + z,
}


@pytest.mark.parametrize("name", [*MOVES, *USES])
def test_whatever_is_done_with_scores_gives_what_it_gives_of_real_ones(name):
    (h, weight, bias), _ = tensors(torch.float32)
    h = h[:30].view(5, 6, WIDTH)
    do = (MOVES | USES)[name]
    expected = do(F.linear(h, weight, bias))
    with Postponed():
        found = do(F.linear(h, weight, bias))
    assert isinstance(found, Scores) == (name in MOVES)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.requires_grad == expected.requires_grad
    whole = found.whole() if isinstance(found, Scores) else found
    assert torch.allclose(whole, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.1}, {"reduction": "nothing"}, {}], ids=str
)
def test_what_is_not_foreseen_is_what_pytorch_makes_of_it(settings):
    leaves, targets = tensors()
    targets = targets if settings else targets + CLASSES  # no such classes

    def outcome(z):
        try:
            return F.cross_entropy(z, targets, **settings)
        except (ValueError, IndexError, RuntimeError) as error:
            return type(error), str(error)

    with Postponed():
        found = outcome(F.linear(*leaves))
    assert found == outcome(F.linear(*leaves))


# -- in a risk ---------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model in small: one matrix embeds and scores; (N, V, T)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.inner(self.embedding(x)).tanh()).transpose(1, 2)


def tokens():
    draw = torch.Generator().manual_seed(2)
    x = torch.randint(0, CLASSES, (9, 12), generator=draw)
    y = torch.randint(0, CLASSES, (9, 12), generator=draw)
    y[:4, 5:] = -100
    return x, y


def built(**settings):
    torch.manual_seed(0)
    return EmpiricalRisk(Tied(), **({"loss": "cross_entropy", "data": tokens()} | settings))


def of_a_closure():
    def closure(model, batch):
        x, y = batch
        return F.cross_entropy(model(x).movedim(1, -1).reshape(-1, CLASSES), y.reshape(-1))

    x, y = tokens()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    return built(
        loss=None, data=data, closure=closure, terms=lambda b: float((b[1] >= 0).sum())
    )


@pytest.mark.parametrize("build", [built, of_a_closure, lambda: built(chunk_size=2)])
def test_a_tied_models_products_are_those_of_its_scores_and_these_are_not_made(
    build, monkeypatch
):
    made = []
    whole = Scores.whole
    risk = build()
    monkeypatch.setattr(Scores, "whole", lambda z: [made.append(z), whole(z)][1])
    v = torch.randn(risk.n, generator=torch.Generator().manual_seed(3))
    mine = risk.value(), risk.gradient(), risk.hvp(v)
    assert not made
    monkeypatch.setattr(large_heads, "LEAST_CLASSES", CLASSES + 1)
    plain = build()
    assert mine[0] == pytest.approx(plain.value(), rel=1e-6)
    assert_same(mine[1:], (plain.gradient(), plain.hvp(v)), 1e-5)


class Taken(torch.autograd.Function):
    """Somebody's own loss, which sees scores where no gradient is recorded."""

    @staticmethod
    def forward(ctx, z, y):
        p = z.softmax(1)
        ctx.save_for_backward(p, y)
        return -p[torch.arange(len(y)), y].log().mean()

    @staticmethod
    def backward(ctx, g):
        p, y = ctx.saved_tensors
        return (p - F.one_hot(y, p.shape[1])) * g / len(y), None


def test_a_function_of_ones_own_gets_scores_with_their_gradient():
    def closure(model, batch):
        x, y = batch
        return Taken.apply(model(x).movedim(1, -1).reshape(-1, CLASSES), y.flatten())

    x, y = tokens()
    data = [(x, y.clamp(min=0))]
    risk = built(loss=None, data=data, closure=closure, check=False)
    plain = built(loss="cross_entropy", data=data[0], check=False)
    assert_same([risk.gradient()], [plain.gradient()], 1e-5)


def test_accuracy_of_chunks_is_that_of_all_rows():
    risk, (x, y) = built(chunk_size=2), tokens()
    right = Tied()(x).argmax(1) == y
    assert risk.accuracy() == float(right[y >= 0].double().mean())


# -- memory ------------------------------------------------------------------------------


def extra_bytes(rows, classes, width=8):
    """Peak of a product beside its inputs, the gradient and the result."""
    (h, weight, _), targets = tensors(torch.float32, rows, classes, width)
    towards = directions([h, weight])

    def build():
        with Postponed():
            value = F.cross_entropy(F.linear(h, weight).double(), targets)
        slopes = torch.autograd.grad(value, [h, weight], create_graph=True)
        return lambda: torch.autograd.grad(slopes, [h, weight], towards, retain_graph=True)

    return memory.footprint(build).peak - 2 * (h.nbytes + weight.nbytes)


def test_memory_beside_inputs_and_results_does_not_grow_with_the_rows():
    few, many = (extra_bytes(rows, 5000) for rows in (128, 1024))
    assert many <= 1.05 * few


@pytest.mark.slow
def test_memory_at_the_size_of_gpt2s_head_is_below_an_eighth_of_the_scores():
    few, many = (extra_bytes(rows, 50257) for rows in (128, 1024))
    assert many <= 1.05 * few
    assert few < 128 * 50257 * 4 / 8


# -- what is written to --------------------------------------------------------------------


class Changed(nn.Module):
    """A network that does something to its scores, or to what they are made of."""

    def __init__(self, change, dtype=torch.float64):
        super().__init__()
        self.body, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.change = change
        self.to(dtype)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.change(self, h, self.head(h))


def padded(model, h, z):
    z[:, 600:] = float("-inf")
    return z


def seen_from_elsewhere(model, h, z):
    shown = z.view(-1, CLASSES)
    z[:, 3].mul_(2.0)
    return shown


def made_of_something_else(model, h, z):
    with torch.no_grad():
        model.head.bias.mul_(1.0)  # the version counts, whatever is written
    return z


def hooked(model, h, z):
    if z.requires_grad:
        z.register_hook(lambda g: g / 2)
    return z


CHANGES = {
    "padding": padded,
    "a product in place": lambda model, h, z: z.mul_(0.5),
    "a statement": lambda model, h, z: z.add_(h.sum(1, keepdim=True)),
    "what a view sees": lambda model, h, z: (z.view(-1, CLASSES).clamp_(-0.1, 0.1), z)[1],
    "what a column sees": lambda model, h, z: (z[:, 5].mul_(3.0), z)[1],
    "another's rows": seen_from_elsewhere,
    "its data": lambda model, h, z: (z.data.mul_(2.0), z)[1],
    "in place by name": lambda model, h, z: F.relu(z, inplace=True),
    "its parts": made_of_something_else,
    "a hook": hooked,
}


def risk_of(change, monkeypatch, postponed, dtype=torch.float64):
    monkeypatch.setattr(large_heads, "LEAST_CLASSES", 500 if postponed else 10**9)
    torch.manual_seed(0)
    model = Changed(change, dtype)
    x, y = torch.randn(12, 5).to(dtype), torch.randint(0, 100, (12,))
    risk = EmpiricalRisk(model, F.cross_entropy, (x, y), check=False)
    v = torch.randn(risk.n, generator=torch.Generator().manual_seed(2)).to(risk.theta)
    return risk.value(), risk.gradient(), risk.hvp(v)


@pytest.mark.parametrize("name", CHANGES)
def test_scores_that_are_written_to_are_not_postponed(name, monkeypatch):
    mine = risk_of(CHANGES[name], monkeypatch, True)
    plain = risk_of(CHANGES[name], monkeypatch, False)
    assert mine[0] == pytest.approx(plain[0], rel=1e-12)
    assert_same(mine[1:], plain[1:], 1e-10)


def test_a_class_that_cannot_be_leaves_the_loss_finite(monkeypatch):
    def impossible(model, h, z):
        bias = model.head.bias + torch.zeros(CLASSES).index_fill(
            0, torch.tensor([600]), float("-inf")
        )
        return F.linear(input=h, weight=model.head.weight, bias=bias)

    mine, plain = (risk_of(impossible, monkeypatch, which) for which in (True, False))
    assert mine[0] == pytest.approx(plain[0], rel=1e-12)
    assert_same(mine[1:2], plain[1:2], 1e-10)


def test_narrow_types_are_not_summed_over_blocks(monkeypatch):
    mine, plain = (
        risk_of(lambda model, h, z: z, monkeypatch, which, torch.bfloat16)
        for which in (True, False)
    )
    assert mine[0] == plain[0]
    assert_same(mine[1:2], plain[1:2], 1e-6)
