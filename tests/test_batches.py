"""`num_samples=`: reading stops where there are enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sharpness as sh
from sharpness import EmpiricalRisk


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


class Stream:
    """Batches of four without an end; how many were asked for is counted."""

    def __init__(self) -> None:
        self.num = 0

    def __iter__(self):
        while True:
            self.num += 1
            torch.manual_seed(self.num)
            yield torch.randn(4, 3), torch.randint(0, 2, (4,))
            assert self.num < 50, "drained"


@pytest.mark.parametrize(("wanted", "read"), [(1, 1), (4, 1), (5, 2), (8, 2), (10, 3)])
def test_a_stream_is_read_no_further_than_needed(wanted, read):
    stream = Stream()
    risk = EmpiricalRisk(model(), nn.CrossEntropyLoss(), stream, num_samples=wanted)
    assert (risk.num_samples, stream.num) == (wanted, read)


def test_the_first_samples_count():
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    loss, few = nn.CrossEntropyLoss(), (x[:7], y[:7])
    expected = EmpiricalRisk(model(), loss, few).value()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    for data in ((x, y), batches, TensorDataset(x, y), DataLoader(TensorDataset(x, y), 3)):
        risk = EmpiricalRisk(model(), loss, data, num_samples=7)
        assert risk.num_samples == 7
        assert risk.value() == pytest.approx(expected, rel=1e-6)
    assert EmpiricalRisk(model(), loss, (x, y), num_samples=100).num_samples == 20


def test_what_is_left_of_a_large_pair_is_all_that_is_held():
    x, y = torch.randn(1000, 3), torch.randint(0, 2, (1000,))
    risk = EmpiricalRisk(model(), nn.CrossEntropyLoss(), (x, y), num_samples=10)
    inputs, _ = risk.full_batch()
    assert inputs.untyped_storage().nbytes() < 1000


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(3), torch.tensor(1)


def test_a_data_set_without_an_end_stops_too():
    risk = EmpiricalRisk(model(), nn.CrossEntropyLoss(), Endless(), num_samples=300)
    assert risk.num_samples == 300


def test_batches_of_a_closure_are_kept_whole():
    stream = Stream()
    risk = EmpiricalRisk(
        model(),
        closure=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        data=stream,
        num_samples=6,
    )
    assert (risk.num_samples, stream.num) == (8, 2)


def test_a_tracker_stops_reading_too():
    stream = Stream()
    tracker = sh.SharpnessTracker(model(), nn.CrossEntropyLoss(), stream, num_samples=8)
    assert stream.num == 2
    assert len(tracker.history) == 1


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_a_number_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="`num_samples` must be"):
        EmpiricalRisk(model(), nn.CrossEntropyLoss(), Stream(), num_samples=wrong)


def test_the_other_network_of_an_interpolation_is_passed_as_it_is():
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    other = nn.Linear(3, 2)
    risk = EmpiricalRisk(model(), nn.CrossEntropyLoss(), (x, y))
    flat = torch.cat([p.detach().flatten() for p in other.parameters()])
    ways = [other, other.state_dict(), flat, nn.DataParallel(other)]
    found = [sh.interpolation(risk, way, [0.0, 0.5, 1.0]).values for way in ways]
    assert found == found[:1] * 4
    with pytest.raises(ValueError, match="another network"):
        sh.interpolation(risk, nn.Linear(4, 2))
