"""Losses that look like PyTorch's and are not, and batches whose rows are not plain."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import generator, normal
from torch import nn

from sharpness import EmpiricalRisk
from sharpness.risk.loss_terms import num_rows

X = normal(generator(0), 12, 3)
CLASSES = torch.arange(12) % 3


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        each = F.cross_entropy(outputs, targets, weight=self.weight, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


class Scaled(nn.MSELoss):
    """A sum over the outputs of a row, whatever its base would divide by."""

    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2).sum(1).mean()


class Summed(nn.NLLLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs.log_softmax(1), targets).mul(len(outputs))


SUBCLASSES = {
    "focal": (Focal(weight=torch.tensor([1.0, 5.0, 0.2]).double()), CLASSES, 1),
    "scaled": (Scaled(), normal(generator(1), 12, 3), 1),
    "summed": (Summed(), CLASSES, 12),
}


@pytest.mark.parametrize("chunk_size", ["auto", 1, 5, 12])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_is_what_it_computes(name, chunk_size):
    loss, y, divisor = SUBCLASSES[name]
    model = nn.Linear(3, 3, dtype=torch.float64)
    risk = EmpiricalRisk(model, loss, (X, y), chunk_size=chunk_size)
    expected = loss(model(X), y) / divisor
    slope = torch.autograd.grad(expected, list(model.parameters()))
    assert risk.value() == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(risk.gradient(), torch.cat([g.flatten() for g in slope]))


ELEMENTWISE = [
    nn.MSELoss(),
    nn.L1Loss(),
    nn.HuberLoss(reduction="sum"),
    nn.BCEWithLogitsLoss(),
    F.mse_loss,
    F.smooth_l1_loss,
]


@pytest.mark.parametrize("loss", ELEMENTWISE, ids=lambda f: getattr(f, "__name__", str(f)))
@pytest.mark.parametrize(("outputs", "shape"), [(1, (12,)), (3, (12, 1)), (1, (12, 3))])
def test_targets_that_would_be_broadcast_are_refused(loss, outputs, shape):
    with pytest.raises(ValueError, match=r"`data` must have targets.*broadcast") as error:
        EmpiricalRisk(nn.Linear(3, outputs), loss, (X.float(), torch.zeros(shape)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", ELEMENTWISE, ids=lambda f: getattr(f, "__name__", str(f)))
def test_targets_of_the_outputs_shape_are_taken(loss):
    risk = EmpiricalRisk(nn.Linear(3, 1), loss, (X.float(), torch.ones(12, 1)))
    assert risk.num_terms == 12


def test_a_pair_is_no_list_of_batches_for_a_closure():
    def closure(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    model = nn.Linear(3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"`data` must be a list of batches") as error:
        EmpiricalRisk(model, closure=closure, data=(X, X))
    assert "\n" not in str(error.value)
    risk = EmpiricalRisk(model, closure=closure, data=[(X[:7], X[:7]), (X[7:], X[7:])])
    assert risk.value() == pytest.approx(float(closure(model, (X, X)).detach()))


IMAGES = [torch.zeros(3, 5, 5), torch.zeros(3, 7, 6)]
BATCHES = [
    (torch.zeros(4, 2), 4),
    ((torch.zeros(4, 2), torch.zeros(4)), 4),
    ([torch.zeros(4, 2), torch.zeros(4)], 4),  # as a loader collates a pair
    ({"step": torch.tensor(3), "x": torch.zeros(4, 2), "y": torch.zeros(4)}, 4),
    ({"edges": torch.zeros(2, 9), "x": torch.zeros(4, 2), "y": torch.zeros(4)}, 4),
    ((IMAGES, [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}]), 2),
    ({"images": IMAGES, "labels": torch.zeros(2)}, 2),
    (([torch.zeros(4, 2), torch.zeros(4, 7)], torch.zeros(4)), 4),  # two inputs
    ({"several": [torch.zeros(4, 2), torch.zeros(4, 7)]}, 4),
    ((torch.zeros(4, 2), torch.zeros(6)), 4),  # no two agree: the first
    (torch.tensor(1.0), 1),
]


@pytest.mark.parametrize(("batch", "rows"), BATCHES)
def test_rows_are_the_length_that_most_parts_have(batch, rows):
    assert num_rows(batch) == rows


def test_batches_of_a_closure_weigh_by_their_samples():
    parts = [{"step": torch.tensor(1), "x": X[s]} for s in (slice(9), slice(9, 12))]
    model = nn.Linear(3, 1, dtype=torch.float64)

    def closure(model, batch):
        return model(batch["x"]).square().mean()

    risk = EmpiricalRisk(model, closure=closure, data=parts)
    assert risk.value() == pytest.approx(float(model(X).square().mean().detach()))
    assert risk.num_samples == 12


class Masked(nn.CrossEntropyLoss):
    """Nothing of its own but a setting."""

    def __init__(self):
        super().__init__(ignore_index=0)


@pytest.mark.parametrize("chunk_size", ["auto", 1, 5])
def test_a_subclass_that_only_sets_its_base_is_its_base(chunk_size):
    model = nn.Linear(3, 3, dtype=torch.float64)
    found, expected = (
        EmpiricalRisk(model, loss, (X, CLASSES.sort().values), chunk_size=chunk_size)
        for loss in (Masked(), nn.CrossEntropyLoss(ignore_index=0))
    )
    assert found.num_terms == expected.num_terms == 8
    assert found.value() == expected.value()
    v = torch.ones(found.n, dtype=torch.float64)
    assert torch.equal(
        found.product(v, "sampled_fisher"), expected.product(v, "sampled_fisher")
    )


@pytest.mark.parametrize("terms", [None, len])
def test_a_later_batch_is_not_broadcast_either(terms):
    data = [(X[:4].float(), torch.zeros(4, 1)), (X[4:].float(), torch.zeros(8))]
    with pytest.raises(ValueError, match="which would be broadcast"):
        EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data, terms=terms).value()
