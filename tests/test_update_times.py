import math
import random
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import untouched
from helpers.known_trainings import regression
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from sharpness._results import Status
from sharpness.batchsize import updates
from sharpness.batchsize.problem import Problem
from sharpness.batchsize.updates import time_per_update
from sharpness.results import load_result
from sharpness.risk import memory


@pytest.fixture
def clock(monkeypatch):
    """An update takes `cost(batch size)` seconds of a clock that stands still else."""
    passed = [0.0]

    def of(cost):
        def update(problem, model, optimizer, batch):
            passed[0] += cost(len(batch[1]))

        monkeypatch.setattr(Problem, "update", update)
        monkeypatch.setattr(updates, "now", lambda device: passed[0])

    return of


# -- time ----------------------------------------------------------------------------------


def test_overhead_and_cost_of_a_sample_are_found(clock):
    clock(lambda size: 3e-3 + 2e-5 * size)
    found = time_per_update(regression(), [256, 1, 16, 64])
    assert list(found.batch_sizes) == [1, 16, 64, 256]
    assert found.seconds == pytest.approx(3e-3 + 2e-5 * found.batch_sizes)
    assert found.fit == pytest.approx((3e-3, 2e-5))
    assert found.knee == pytest.approx(150)
    assert found.residual < 1e-9
    assert found.spread == pytest.approx(0)
    assert found.largest == 256
    assert found.of(16) == pytest.approx(3e-3 + 32e-5)
    assert math.isnan(found.of(17))  # was not run
    assert found.status is Status.COMPLETED


def test_a_line_that_does_not_fit_says_by_how_much(clock):
    clock(lambda size: max(1e-3, 1e-4 * size))
    found = time_per_update(regression(), [1, 4, 16, 64])
    fitted = found.overhead + found.per_sample * found.batch_sizes
    expected = np.sqrt(np.mean((fitted / found.seconds - 1) ** 2))
    assert found.residual == pytest.approx(expected)
    assert found.residual > 0.05


def test_time_that_does_not_grow_has_no_knee(clock):
    clock(lambda size: 1e-3)
    found = time_per_update(regression(), [1, 4, 16])
    assert found.overhead == pytest.approx(1e-3)
    assert found.knee > 1e6


def test_the_median_withstands_an_update_that_took_long(clock):
    slow = iter([*[False] * 20, True])
    clock(lambda size: 1.0 if next(slow, False) else 0.05)  # a block is one update
    found = time_per_update(regression(), [1, 2, 4], repeats=7)
    assert found.seconds == pytest.approx(0.05)


def test_the_time_of_real_updates_is_that_of_the_whole_loop():
    found = time_per_update(regression(), [1, 64], repeats=2)
    assert (found.seconds > 0).all()
    assert found.cost.seconds > found.seconds.sum()
    assert (found.peak_bytes > 0).all()
    assert "high-water" in found.memory


# -- sizes that cannot be run --------------------------------------------------------------


def test_a_size_beyond_the_rows_is_one_line_and_the_rest_goes_on(clock):
    clock(lambda size: 1e-3 * size)
    found = time_per_update(regression(100), [10, 100, 101, 500])
    assert list(found.survived) == [True, True, False, False]
    assert found.reasons[2] == "larger than the 100 rows"
    assert found.reasons[3] == "not run, as 101 did not survive"
    assert found.largest == 100
    assert np.isnan(found.seconds[2:]).all()
    assert "larger than the 100 rows" in found.table()


def test_out_of_memory_in_the_second_update_is_no_survival(clock):
    seen = []

    def cost(size):
        seen.append(size)
        if size == 64 and seen.count(64) == 2:  # once the optimizer's state is there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB.")
        return 1e-3

    clock(cost)
    found = time_per_update(regression(), [16, 64, 128])
    assert list(found.survived) == [True, False, False]
    assert found.reasons[1] == "out of memory"
    assert found.largest == 16


def test_a_size_that_fails_only_later_has_not_survived(clock):
    made = []

    def cost(size):
        made.append(size)
        if size == 64 and made.count(64) == 3:
            raise MemoryError
        return 0.1

    clock(cost)
    found = time_per_update(regression(), [16, 64])
    assert found.reasons == ("", "out of memory")
    assert math.isnan(found.of(64))


def test_another_error_is_not_taken_for_memory(clock):
    def cost(size):
        raise RuntimeError("a bug")

    clock(cost)
    with pytest.raises(RuntimeError, match="a bug"):
        time_per_update(regression(), [16])


def test_on_a_cpu_the_memory_of_a_batch_is_predicted(monkeypatch):
    problem = regression(4096, 200)
    known = [updates._counted(problem, size, 0) for size in (4, 32)]
    there = updates._counted(problem, 2048, 0)
    assert known[1].at(2048, known[0], (4, 32)).peak == pytest.approx(there.peak, rel=0.05)
    monkeypatch.setattr(memory, "budget_bytes", lambda device: there.peak)
    found = time_per_update(problem, [64, 1024, 4096], repeats=2)
    assert list(found.survived) == [True, True, False]
    assert "(predicted)" in found.reasons[2]


def test_no_time_is_said():
    found = time_per_update(regression(), [1, 2], max_seconds=1e-9)
    assert found.status is Status.MAX_SECONDS
    assert found.reasons == ("not run", "not run")
    assert found.largest is None


@pytest.mark.parametrize(
    ("sizes", "line"),
    [([], "`batch_sizes` must hold"), ([0], "got 0"), ([1.5], "got 1.5")],
)
def test_sizes_that_are_none(sizes, line):
    with pytest.raises(ValueError, match=line):
        time_per_update(regression(), sizes)


def test_it_is_kept_in_a_file(tmp_path):
    found = time_per_update(regression(100), [1, 50, 200], repeats=2)
    found.save(tmp_path / "times.safetensors")
    again = load_result(tmp_path / "times.safetensors")
    assert np.array_equal(again.seconds, found.seconds, equal_nan=True)
    assert (again.reasons, again.fit) == (found.reasons, found.fit)
    assert str(again) == str(found)


# -- the problem ---------------------------------------------------------------------------


def test_model_and_generators_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    model(torch.randn(5, 3)).sum().backward()
    model.eval()
    before, states = untouched.fingerprint(model), untouched.random_states()
    problem = regression(model=model, optimizer="adam")
    time_per_update(problem, [2, 8], repeats=2)
    problem.validation_loss(problem.copy())
    untouched.assert_same(before, untouched.fingerprint(model))
    untouched.assert_states(states, untouched.random_states())


def rows_of(problem, size, num, seed=0):
    stream = islice(problem.batches(size, seed), num)
    return torch.cat([x for x, _ in stream])


def test_all_sizes_see_the_same_rows_in_the_same_order():
    problem = regression(100)
    expected = rows_of(problem, 1, 240)
    assert torch.equal(rows_of(problem, 12, 20), expected)  # across ends of epochs
    assert torch.equal(rows_of(problem, 60, 4), expected)
    assert not torch.equal(rows_of(problem, 60, 4, seed=1), expected)
    for epoch in (expected[:100], expected[100:200]):
        assert torch.equal(epoch.sort(0).values, problem.data[0].sort(0).values)
    assert not torch.equal(expected[:100], expected[100:200])


def test_rows_too_many_to_be_ordered_are_drawn(monkeypatch):
    monkeypatch.setattr("sharpness.batchsize.problem._MOST_ORDERED", 10)
    problem = regression(100)
    drawn = rows_of(problem, 50, 4)
    assert 80 < len(drawn.unique(dim=0)) < 95  # 100 (1 - e^-2) = 86


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[int(i)].numpy(), float(self.y[int(i)])


@pytest.mark.parametrize("kind", ["memmap", "tensors", "items", "batches", "table"])
def test_any_data_give_the_same_batches(kind, tmp_path):
    plain = regression(50)
    x, y = plain.data
    given = {"tensors": TensorDataset(x, y), "items": Items(x, y), "batches": [(x, y)]}
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x.numpy())
        np.save(tmp_path / "y.npy", y.numpy())
        names = ("x.npy", "y.npy")
        given[kind] = tuple(np.load(tmp_path / name, mmap_mode="r") for name in names)
    if kind == "table":
        np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
        given[kind] = tmp_path / "data.npz"
    if kind == "items":
        loss = lambda outputs, y: ((outputs.squeeze(1) - y) ** 2).mean()  # noqa: E731
        problem = Problem(plain.model, loss, given[kind], lr=0.1, batch_size=5)
    else:
        problem = regression(data=given[kind])
    assert problem.num_rows == 50
    ours, theirs = next(problem.batches(20)), next(plain.batches(20))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1].reshape(20, 1).float(), theirs[1])
    over_the_end = rows_of(problem, 40, 3)  # a row may be in a batch twice
    assert torch.equal(over_the_end, rows_of(plain, 40, 3))


def test_rows_with_nan_are_left_out_with_a_line():
    x, y = (part.clone() for part in regression(50).data)
    x[7, 1], y[9] = math.nan, math.inf
    problem = regression(data=(x, y))
    assert problem.num_rows == 48
    line = "data: 2 of 50 rows hold NaN or infinity, the first in row 7: left out"
    assert line in problem.notes
    assert rows_of(problem, 48, 1).isfinite().all()
    with pytest.raises(ValueError, match="all 50"):
        regression(data=(torch.full_like(x, math.nan), y))


def test_targets_that_are_all_the_same_are_said():
    x, y = regression(50).data
    assert "data: all targets are the same, so there is nothing to learn" in (
        regression(data=(x, torch.ones_like(y))).notes
    )
    assert not [note for note in regression().notes if "same" in note]


def test_float64_data_and_columns_of_classes_are_taken():
    x, y = regression(50).data
    classes = (y > 0).to(torch.int32)
    problem = Problem(
        nn.Linear(3, 2), "cross_entropy", (x.double(), classes), lr=0.1, batch_size=5
    )
    batch = next(problem.batches(10))
    assert batch[0].dtype == torch.float32
    assert (batch[1].dtype, batch[1].shape) == (torch.int64, (10,))
    model = problem.copy()
    assert problem.update(model, problem.optimizer_for(model, 0.1), batch).isfinite()


def test_an_update_is_a_step_along_the_mean_whatever_the_reduction():
    x, y = regression().data
    ends = []
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="none")):
        problem = Problem(regression().model, loss, (x, y), lr=0.1, batch_size=8)
        model = problem.copy()
        problem.update(model, problem.optimizer_for(model, 0.1), (x, y))
        ends.append(model.weight.detach())
    by_hand = 0.2 * (y * x).mean(0, keepdim=True)  # all parameters are 0
    for end in ends:
        torch.testing.assert_close(end, by_hand)


def test_the_error_of_the_validation_loss_is_that_of_a_mean():
    x, y = regression(50).data
    problem = regression(validation=(x, y))
    model = problem.copy()
    mean, error = problem.validation_loss(model)
    losses = ((model(x) - y) ** 2).detach().double().numpy()
    assert mean == pytest.approx(losses.mean(), rel=1e-6)
    assert error == pytest.approx(losses.std(ddof=1) / math.sqrt(50), rel=1e-6)
    assert model.training


def test_of_many_validation_rows_some_are_looked_at():
    problem = regression(10_000, validation=regression(10_000).data)
    model = problem.copy()
    x, y = problem.data
    losses = ((model(x) - y) ** 2).detach()
    mean, error = problem.validation_loss(model)
    assert error == pytest.approx(float(losses.std()) / math.sqrt(4096), rel=0.4)
    assert abs(mean - float(losses.mean())) < 4 * error


def test_the_batch_of_batchnorm_is_apart_from_that_of_the_update():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    problem = regression(model=model, batchnorm_batch=8)
    copied = problem.copy()
    problem.update(copied, problem.optimizer_for(copied, 0.1), next(problem.batches(64)))
    assert int(copied[1].num_batches_tracked) == 8  # 64 / 8 ghost batches
    assert "forward" not in vars(model[1])


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("sgd", "linear"),
        ("momentum", "linear"),
        ("adamw", "sqrt"),
        (torch.optim.Adam, "sqrt"),
    ],
)
def test_the_rule_is_that_of_the_optimizer(optimizer, rule):
    problem = regression(optimizer=optimizer, lr=0.1, batch_size=10)
    assert problem.rule == rule
    times = {"linear": 4, "sqrt": 2}[rule]
    assert problem.scaled_rate(40) == pytest.approx(0.1 * times)
    assert problem.scaled_rate(40, "none") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ({"optimizer": "sdg"}, ValueError, "Did you mean sgd"),
        ({"optimizer": lambda p, lr: lr}, TypeError, "got float"),
        (
            {"optimizer": lambda p, lr: torch.optim.SGD(p, 1.0)},
            ValueError,
            "take the learning rate 0.05; got 1",
        ),
        ({"lr": 0.0}, ValueError, "`lr` must be positive"),
        ({"batch_size": 257}, ValueError, "at most the 256 training rows; got 257"),
        ({"data": (torch.zeros(3, 3), torch.zeros(2, 1))}, ValueError, "as many targets"),
        ({"data": (torch.zeros(0, 3), torch.zeros(0, 1))}, ValueError, "at least one row"),
        ({"batchnorm_batch": 4}, ValueError, "without BatchNorm"),
    ],
)
def test_a_wrong_problem_is_one_line(settings, error, line):
    with pytest.raises(error, match=line) as caught:
        regression(**settings)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def test_outputs_and_targets_that_would_be_broadcast_are_refused():
    x, y = regression().data
    with pytest.raises(ValueError, match="broadcast"):
        regression(data=(x, y.squeeze(1)))


def test_what_a_data_set_draws_is_not_seen_outside():
    class Noisy(Items):
        def __getitem__(self, i):
            return self.x[int(i)].numpy() + random.random(), self.y[int(i)].numpy()

    states = untouched.random_states()
    time_per_update(regression(data=Noisy(*regression(40).data)), [4, 8], repeats=2)
    untouched.assert_states(states, untouched.random_states())
