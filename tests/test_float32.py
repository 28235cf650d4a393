"""float32 is float32 while a risk computes, whatever shortcuts are allowed outside."""

from operator import attrgetter

import pytest
import torch
from helpers.problems import directions, tiny_mlp
from torch import nn

from sharpness import EmpiricalRisk

OPERATIONS = ["cuda.matmul", "cudnn.conv", "cudnn.rnn"]
OPERATIONS += ["mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def flags():
    """All that PyTorch says of it; None where the older flags refuse to."""
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        older = None
    kinds = [attrgetter(name)(torch.backends) for name in OPERATIONS] if NEWER else []
    return older, [kind.fp32_precision for kind in kinds]


def with_older_flags(precision, cudnn):
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn


def with_a_newer_flag(name, value):
    if not NEWER:
        pytest.skip("PyTorch before 2.9 has no flag for each operation")
    kind = attrgetter(name)(torch.backends) if name else torch.backends
    kind.fp32_precision = value


OUTSIDE = {
    "as PyTorch starts": lambda: None,
    "matrix products in TF32": lambda: with_older_flags("high", True),
    "matrix products in bfloat16": lambda: with_older_flags("medium", False),
    "one newer flag": lambda: with_a_newer_flag("cuda.matmul", "tf32"),
    "another newer flag": lambda: with_a_newer_flag("mkldnn.matmul", "bf16"),
    "a newer flag beside the older ones": lambda: with_a_newer_flag("mkldnn.conv", "bf16"),
    "a newer flag for all": lambda: with_a_newer_flag("", "tf32"),
}


@pytest.fixture(params=OUTSIDE)
def outside(request):
    """Flags as somebody has set them; put back when the test is over."""
    kinds = [attrgetter(name)(torch.backends) for name in OPERATIONS] if NEWER else []
    before = [kind.fp32_precision for kind in kinds]
    OUTSIDE[request.param]()
    yield request.param
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value
    if NEWER:
        torch.backends.fp32_precision = "none"
    with_older_flags("highest", True)
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


class ObservationStore(torch.autograd.Function):
    """Notes the flags on the way forth and back."""

    notes = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ObservationStore.notes.append(flags())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ObservationStore.notes.append(flags())
        return gradient.clone()


class Noting(nn.Linear):
    def forward(self, x):
        return ObservationStore.apply(super().forward(x))


def noted(**settings):
    """The flags inside a value, a gradient and a product."""
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    risk = EmpiricalRisk(Noting(3, 2), nn.CrossEntropyLoss(), (x, y), **settings)
    ObservationStore.notes.clear()
    risk.value(), risk.gradient(), risk.hvp(torch.ones(risk.n))
    assert len(ObservationStore.notes) >= 5
    return ObservationStore.notes


def test_no_shortcut_is_taken_forth_or_back(outside):
    for older, newer in noted():
        assert older in (("highest", False), None)
        assert older is not None or "newer" in outside
        assert not {"tf32", "bf16"} & set(newer)


def test_the_flags_come_back(outside):
    before = flags()
    noted()
    assert flags() == before


def test_the_flags_come_back_after_an_exception(outside):
    class Failing(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken:
                raise RuntimeError("broken")
            return super().forward(x)

    model, before = Failing(3, 2), flags()
    pair = torch.randn(6, 3), torch.arange(6) % 2
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), pair)
    model.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        risk.value()
    assert flags() == before


def test_who_asks_for_them_gets_the_flags_as_they_are(outside):
    before = flags()
    assert all(found == before for found in noted(tf32=True))


@pytest.mark.parametrize("tf32", [False, True])
def test_the_settings_say_which(tf32):
    risk = tiny_mlp().risk(tf32=tf32)
    assert risk.settings()["tf32"] is tf32
    assert risk.subset([0, 1, 2]).settings()["tf32"] is tf32


@pytest.mark.parametrize("engine", ["kept_graph", "differences"])
def test_a_product_has_the_same_bits_whatever_is_allowed_outside(outside, engine):
    problem, v = tiny_mlp(dtype=torch.float32), directions(1, 44)[0].float()
    found = problem.risk(engine=engine).hvp(v)
    with_older_flags("highest", False)
    assert torch.equal(found, problem.risk(engine=engine).hvp(v))


def test_recurrent_layers_are_measured_whatever_is_allowed_outside(outside):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 2, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    before, enabled = flags(), torch.backends.cudnn.enabled
    x, y = torch.randn(4, 5, 3), torch.arange(4) % 2
    risk = EmpiricalRisk(Last(), nn.CrossEntropyLoss(), (x, y))
    assert risk.hvp(torch.ones(risk.n)).isfinite().all()
    assert (flags(), torch.backends.cudnn.enabled) == (before, enabled)
