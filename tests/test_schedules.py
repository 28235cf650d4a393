"""Batch sizes and rates of every update against exact fractions; when a budget ends."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sharpness.lab.regimes import REGIMES
from sharpness.lab.run import _Order
from sharpness.lab.schedules import Course, Schedule, scaled_rate
from sharpness.lab.training import StoppingCriteria, Training

CIFAR10, MNIST = 50_000, 60_000
DROPS = {"drops": (60, 120, 160), "factor": 5}
MOST = {**DROPS, "max_batch_size": 5120}
SMITH = {
    "smith2018-decay": 78_125,
    "smith2018-hybrid": 34_375,
    "smith2018-increase": 29_141,
    "smith2018-increased-rate": 6_406,
    "smith2018-increased-momentum": 2_305,
}


def training(batch_size: int, **settings) -> Training:
    return Training(network="F1", batch_size=batch_size, **settings)


def named(regime: str, batch_size: int | None = None) -> Training:
    settings = REGIMES[regime]
    return training(batch_size or settings.batch_size or 128, **settings.training)


def laid_out(num_train=100, batch_size=5, learning_rate=0.8, **schedule) -> Course:
    sizes = {"batch_size": batch_size, "num_train": num_train}
    return Course(Schedule(**schedule), learning_rate=learning_rate, **sizes)


def rates(course: Course, num: int) -> list[float]:
    return [course.at(update)[1] for update in range(num)]


def sizes(course: Course, num: int) -> list[int]:
    return [course.at(update)[0] for update in range(num)]


class Exactly:
    """The rules of a schedule, in fractions: eta / B falls by `factor` at each drop."""

    def __init__(self, kind, drops, factor, batch_size, rate, num_train):
        phases = [(Fraction(0), batch_size, Fraction(rate))]
        for i, drop in enumerate(drops):
            _, batch, rate = phases[-1]
            grows = kind == "increase" or (kind == "hybrid" and i == 0)
            larger = batch * factor if grows else batch
            phases.append((Fraction(drop), larger, rate / batch / factor * larger))
        self.phases, self.num_train = phases, num_train
        self.begins = [self.updates(epoch) for epoch, _, _ in phases]

    def updates(self, epochs) -> Fraction:
        total = Fraction(0)
        ends = [begins for begins, _, _ in self.phases[1:]] + [Fraction(10**9)]
        for (begins, batch, _), end in zip(self.phases, ends, strict=True):
            total += max(min(epochs, end) - begins, 0) * Fraction(self.num_train, batch)
        return total

    def at(self, update: int) -> tuple[int, Fraction]:
        last = max(i for i, begins in enumerate(self.begins) if begins <= update)
        return self.phases[last][1:]


# -- updates and phases ------------------------------------------------------------


@pytest.mark.parametrize(("regime", "updates"), SMITH.items())
def test_smiths_schedules_take_the_updates_of_his_table(regime, updates):
    assert named(regime).course(CIFAR10).num_updates(REGIMES[regime].epochs) == updates


@pytest.mark.parametrize(
    ("kind", "phases"),
    [
        ("constant", [(0, 128, 0.1)]),
        ("decay", [(0, 128, 0.1), (60, 128, 0.02), (120, 128, 0.004), (160, 128, 8e-4)]),
        ("hybrid", [(0, 128, 0.1), (60, 640, 0.1), (120, 640, 0.02), (160, 640, 0.004)]),
        ("increase", [(0, 128, 0.1), (60, 640, 0.1), (120, 3200, 0.1), (160, 5120, 0.032)]),
    ],
)
def test_the_phases_are_those_of_the_paper(kind, phases):
    found = Schedule(kind=kind, **({} if kind == "constant" else MOST)).phases(128, 0.1)
    assert [phase.batch_size for phase in found] == [batch for _, batch, _ in phases]
    assert np.allclose(found, phases, rtol=1e-14, atol=0)
    assert all(type(phase.batch_size) is int for phase in found)


@pytest.mark.parametrize("regime", SMITH)
def test_the_noise_scale_of_smiths_schedules_is_the_same_epoch_by_epoch(regime):
    """In the paper it is eta N / (B (1 - momentum))."""
    run = named(regime)
    course = run.course(CIFAR10)
    for epoch in np.arange(0.5, 200):
        batch_size, rate = course.at(course.num_updates(epoch))
        drops = sum(epoch > drop for drop in (60, 120, 160))
        noise = rate / (batch_size * (1 - run.momentum))
        assert noise == pytest.approx(0.1 / 12.8 / 5**drops, rel=1e-12)


@given(
    kind=st.sampled_from(["increase", "hybrid", "decay"]),
    batch_size=st.integers(1, 300),
    factor=st.floats(1.01, 20),
    drops=st.lists(st.floats(0.01, 300), min_size=1, max_size=5, unique=True).map(sorted),
    spare=st.none() | st.integers(0, 3000),
)
def test_the_noise_scale_falls_by_the_factor_at_every_drop(
    kind, batch_size, factor, drops, spare
):
    most = None if spare is None else batch_size + spare
    schedule = Schedule(kind=kind, drops=drops, factor=factor, max_batch_size=most)
    found = schedule.phases(batch_size, 0.3)
    assert [phase.begins for phase in found] == [0, *drops]
    for i, (before, after) in enumerate(pairwise(found)):
        falls = after.learning_rate / after.batch_size * factor
        assert falls == pytest.approx(before.learning_rate / before.batch_size, rel=1e-13)
        grown = min(before.batch_size * factor, most or math.inf)
        grows = kind == "increase" or (kind == "hybrid" and i == 0)
        assert abs(after.batch_size - (grown if grows else before.batch_size)) <= 0.5
        assert most is None or after.batch_size <= most


@given(
    kind=st.sampled_from(["increase", "hybrid", "decay"]),
    batch_size=st.integers(1, 24),
    factor=st.integers(2, 4),
    drops=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted),
    num_train=st.integers(1600, 2000),
    epochs=st.integers(1, 15),
)
@example("decay", 12, 2, [2, 5], 13, 6)
@example("increase", 7, 2, [1, 2, 3], 100, 4)
def test_updates_are_cut_from_one_stream_and_rounded_once(
    kind, batch_size, factor, drops, num_train, epochs
):
    exact = Exactly(kind, drops, factor, batch_size, 1, num_train)
    schedule = Schedule(kind=kind, drops=tuple(drops), factor=factor)
    course = Course(schedule, batch_size=batch_size, learning_rate=1, num_train=num_train)
    half = Fraction(1, 2)
    assert course.num_updates(epochs) == math.floor(exact.updates(epochs) + half)
    num = min(course.num_updates(epochs), 500)
    assert course.num_samples(num) == sum(course.at(u)[0] for u in range(num))
    for begins in exact.begins:
        for update in range(max(0, math.floor(begins) - 1), math.ceil(begins) + 2):
            found, wanted = course.at(update), exact.at(update)
            assert found[0] == wanted[0]
            assert found[1] == pytest.approx(float(wanted[1]), rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "drops", "batches", "steps"),
    [
        # The first drop falls at update 2.5: update 2 begins before it.
        ("increase", (1,), [4] * 3 + [8] * 3, [0.8] * 6),
        ("decay", (1,), [4] * 6, [0.8] * 3 + [0.4] * 3),
        ("hybrid", (2, 4), [4] * 5 + [8] * 5, [0.8] * 8 + [0.4] * 2),
    ],
)
def test_an_update_is_made_with_what_holds_where_it_begins(kind, drops, batches, steps):
    course = laid_out(10, 4, kind=kind, drops=drops, factor=2)
    assert sizes(course, len(batches)) == batches
    assert rates(course, len(steps)) == pytest.approx(steps, rel=1e-14)


@pytest.mark.parametrize(
    ("num_train", "batch_size", "epochs", "updates"),
    [(10, 4, 1, 3), (10, 4, 3, 8), (9, 4, 1, 2), (10, 4, 0, 0), (100, 100, 7, 7),
     (100, 5, 0.5, 10), (7, 2, 0.29, 1), (1, 1, 3, 3)],
)  # fmt: skip
def test_the_total_is_rounded_half_up(num_train, batch_size, epochs, updates):
    assert laid_out(num_train, batch_size).num_updates(epochs) == updates


# -- warm-up -----------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 1 / 32, 0.25, 1.0])
@pytest.mark.parametrize("warmup", [0.5, 2.0, 2.33])
def test_the_rate_rises_linearly_update_by_update(start, warmup):
    course = laid_out(warmup=warmup, warmup_start=start)
    u = np.arange(80)
    wanted = 0.8 * np.minimum(1, start + (1 - start) * u * 5 / (100 * warmup))
    assert np.allclose(rates(course, 80), wanted, rtol=1e-13, atol=0)
    assert sizes(course, 80) == [5] * 80
    assert course.num_updates(4) == 80


def test_a_warm_up_beyond_a_drop_warms_what_the_drop_left():
    course = laid_out(kind="increase", drops=(1,), factor=2, warmup=2, warmup_start=0)
    assert sizes(course, 40) == [5] * 20 + [10] * 20
    rising = [*np.arange(20) / 40, *(0.5 + np.arange(10) / 20), *[1] * 10]
    assert np.allclose(rates(course, 40), 0.8 * np.array(rising), rtol=1e-13, atol=0)
    decay = laid_out(kind="decay", drops=(1,), factor=4, warmup=2, warmup_start=0)
    assert decay.at(20)[1] == pytest.approx(0.8 / 4 / 2, rel=1e-13)


# -- scaling and stretching --------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 32, 100, 4096])
@pytest.mark.parametrize("base", [1, 128])
def test_a_rate_scales_as_its_name_says(batch_size, base):
    assert scaled_rate(0.1, batch_size, base, "none") == 0.1
    linear = scaled_rate(0.1, batch_size, base, "linear")
    assert linear / batch_size == pytest.approx(0.1 / base, rel=1e-14)
    root = scaled_rate(0.1, batch_size, base, "sqrt")
    assert root**2 / batch_size == pytest.approx(0.01 / base, rel=1e-14)
    for scaling, rate in (("linear", linear), ("sqrt", root), ("none", 0.1)):
        run = training(batch_size, learning_rate=0.1, base_batch_size=base, scaling=scaling)
        assert run.course(5000).at(0) == (batch_size, pytest.approx(rate, rel=1e-14))


@pytest.mark.parametrize(
    ("batch_size", "stretch"), [(1, 1), (128, 1), (129, 2), (256, 2), (4096, 32)]
)
def test_regime_adaptation_lengthens_by_the_batch_size_rounded_up(batch_size, stretch):
    settings = {"base_batch_size": 128, "schedule": "decay?drops=(2,5)&warmup=0.5"}
    adapted = training(batch_size, regime_adaptation=True, **settings)
    assert adapted.stretch == stretch
    assert adapted.laid_out.drops == (2 * stretch, 5 * stretch)
    assert adapted.laid_out.warmup == stretch / 2
    assert adapted.laid_out.warmup_start == 1 / 32
    alone = training(batch_size, **settings)
    assert alone.stretch == 1
    assert alone.laid_out == Schedule(kind="decay", drops=(2, 5), warmup=0.5)


def test_an_adapted_regime_drops_after_as_many_updates_as_the_small_batch():
    small, large = named("hoffer2017-mnist"), named("hoffer2017-mnist", 4096)
    epochs = REGIMES["hoffer2017-mnist"].epochs
    a, b = small.course(MNIST), large.course(MNIST)
    num = a.num_updates(epochs)
    assert num == b.num_updates(epochs * large.stretch) == 23_438
    ratio = np.array(rates(b, num)) / np.array(rates(a, num))
    assert np.allclose(ratio, math.sqrt(32), rtol=1e-12)
    drops = (np.flatnonzero(np.diff(rates(a, num))) + 1).tolist()
    assert drops == [4688, 9375, 14_063]  # of 468.75 an epoch


# -- regimes -----------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_is_a_training_that_can_be_laid_out(regime):
    before = pickle.dumps(REGIMES[regime])
    run = named(regime)
    assert run.course(CIFAR10).num_updates(2) >= 1
    assert pickle.dumps(REGIMES[regime]) == before
    assert "arXiv:" in REGIMES[regime].source
    with pytest.raises(FrozenInstanceError):
        REGIMES[regime].epochs = 3


@pytest.mark.parametrize("batch_size", [2, 32, 100])
def test_masters_rate_is_per_sample_and_falls_at_half_and_three_quarters(batch_size):
    run, num = named("masters2018", batch_size), 82 * CIFAR10 / batch_size
    found = [run.course(CIFAR10).at(round(s * num)) for s in (0.49, 0.51, 0.74, 0.76)]
    for (size, rate), falls in zip(found, (1, 10, 10, 100), strict=True):
        assert size == batch_size
        assert rate == pytest.approx(batch_size * 2**-8 / falls, rel=1e-13)
    assert (run.optimizer, run.weight_decay) == ("sgd", 1e-4)
    assert REGIMES["masters2018"].epochs == 82


@pytest.mark.parametrize(
    ("data", "drops", "epochs"),
    [("mnist", (10, 20, 30), 50), ("cifar", (81, 122, 164), 200)],
)
def test_hoffers_regimes_are_those_of_the_authors_code(data, drops, epochs):
    wanted = {"optimizer": "momentum", "momentum": 0.9, "weight_decay": 1e-4}
    wanted |= {"clip_norm": 5, "ghost_batch_size": 128, "regime_adaptation": True}
    run = named(f"hoffer2017-{data}")
    assert {name: getattr(run, name) for name in wanted} == wanted
    begins, _, falls = zip(*run.laid_out.phases(128, 0.1), strict=True)
    assert begins == (0, *drops)
    assert falls == pytest.approx([0.1, 0.01, 1e-3, 1e-4], rel=1e-13)
    assert REGIMES[f"hoffer2017-{data}"].epochs == epochs


# -- refusals ----------------------------------------------------------------------


NAN, INF = math.nan, math.inf
WRONG = [
    (
        partial(Schedule, kind="decay", drops=(1,)),
        {
            "kind": ("cosine", None, []),
            "drops": ((), (2, 1), (1, 1), 0, (0,), (-1,), ("a",), (NAN,), (INF,), (True,)),
            "factor": (1, 0.5, -5, NAN, INF, "5", (5,), True),
            "max_batch_size": (0, -1, 1.5, True, "64"),
            "warmup": (-1, NAN, INF, "1", (1,)),
            "warmup_start": (-0.1, 1.1, NAN, None),
        },
    ),
    (Schedule, {"drops": ((1.0,), (1, 2))}),
    (
        partial(Training, network="F1", batch_size=64),
        {
            "network": (None,),
            "batch_size": (0, -1, 1.5, "64", (64,), True),
            "seed": (-1, 0.5, None),
            "optimizer": ("lion",),
            "learning_rate": (0, -1, NAN, INF, "0.1", (0.1,)),
            "momentum": (-0.1, 1, NAN),
            "weight_decay": (-1e-4, NAN, "0"),
            "scaling": ("square", None),
            "base_batch_size": (0, 1.5),
            "clip_norm": (0, -1, NAN),
            "ghost_batch_size": (1, 0, 2.5),
            "schedule": ("decay", "nosuch", "increase?drops=(2,1)", "constant?warmup=-1",
                         "decay?drops=None", "decay?drops", "none", None, 3),
            "remedy": ("sam?rho=0", "sam?rho", "nosuch?x=1", "none?x=1", None, 3),
            "augmentation": ("nosuch", "none?x=1", "keskar?crop=-1", None, 3),
        },
    ),
    (partial(training, 64, optimizer="nesterov"), {"momentum": (0,)}),
    (
        partial(StoppingCriteria, epochs=1),
        {
            "epochs": (None, 0, -1, NAN, INF, "2", (1,), True),
            "updates": (0, -3, 1.5, "2", True),
            "patience": (0, 1.5, "2", True),
            "until_loss": (NAN, "0.1", (1,)),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(make, name, v) for make, table in WRONG for name, vs in table.items() for v in vs],
)
def test_what_cannot_be_is_refused_at_once_in_one_line(make, name, value):
    with pytest.raises((ValueError, TypeError), match=f"`{name}` must ") as error:
        make(**{name: value})
    assert str(value).partition("?")[0].strip("(),'") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_above_the_training_set_or_the_largest_is_refused():
    assert laid_out(100, 100).at(3) == (100, 0.8)
    with pytest.raises(
        ValueError, match=r"`batch_size` .* 100 training samples; got 101\."
    ):
        laid_out(100, 101)
    growing = {"kind": "increase", "drops": (1,), "factor": 3}
    assert sizes(laid_out(99, 33, **growing), 4) == [33, 33, 33, 99]
    with pytest.raises(ValueError, match=r"got 102, grown from 34.*`max_batch_size`"):
        laid_out(100, 34, **growing)
    assert sizes(laid_out(100, 34, **growing, max_batch_size=100), 4)[-1] == 100
    with pytest.raises(ValueError, match=r"`max_batch_size` .*got 33 \(batch_size=34\)"):
        laid_out(100, 34, max_batch_size=33)


def test_a_training_survives_pickling_with_its_course():
    run = named("smith2018-increase")
    again = pickle.loads(pickle.dumps(run))
    assert again == run
    assert asdict(again) == asdict(run)
    assert again.course(CIFAR10).num_updates(200) == 29_141
    assert replace(run, schedule="constant").course(CIFAR10).num_updates(200) == 78_125


@pytest.mark.parametrize("drops", ["7", "(7)", "(7,)", "[7]", "(0.7e1,)"])
def test_a_schedule_has_a_name_with_arguments(drops):
    run = training(64, schedule=f"hybrid?drops={drops}&warmup=1e-1")
    assert run.laid_out == Schedule(kind="hybrid", drops=(7,), warmup=0.1)
    assert training(64).laid_out == Schedule(kind="constant")


# -- budget ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "updates", "made"),
    [
        (2, None, 40),
        (0.5, None, 10),
        (1e-6, None, 1),
        (None, 7, 7),
        (2, 70, 40),
        (2, 39, 39),
    ],
)
def test_a_budget_ends_at_what_comes_first_and_makes_an_update(epochs, updates, made):
    found = StoppingCriteria(epochs=epochs, updates=updates).num_updates(laid_out())
    assert found == made
    assert type(found) is int


@pytest.mark.parametrize(
    ("patience", "history", "over"),
    [
        (None, [1, 1, 1], False),
        (1, [1], False), (1, [1, 2], True), (1, [3, 2, 1], False),
        (1, [1, 0.9985], False), (1, [1, 0.9995], True),
        (2, [1, 2], False), (2, [1, 2, 3], True), (2, [1, 2, 0.9], False),
        (2, [1, 0.9, 0.95, 0.92], True), (2, [1, 0.9, 0.95, 0.89], False),
        (2, [1, 0, 0], False), (2, [1, 0, 0, 0], True), (3, [0, 0, 0, 0], True),
    ],
)  # fmt: skip
def test_patience_ends_with_epochs_that_bring_no_improvement(patience, history, over):
    budget = StoppingCriteria(epochs=100, patience=patience)
    assert budget.out_of_patience([float(loss) for loss in history]) == over


# -- the stream of samples ---------------------------------------------------------


def order(num_train: int = 7, seed: int = 0) -> _Order:
    return _Order(num_train, seed, torch.device("cpu"))


def taken(counts: list[int], seed: int = 0) -> list[torch.Tensor]:
    stream, start, found = order(seed=seed), 0, []
    for count in counts:
        found.append(stream.take(start, count))
        start += count
    return found


@pytest.mark.parametrize(
    "counts", [[7] * 6, [1] * 42, [3] * 14, [5, 2, 7, 6, 1] * 2, [4] * 10]
)
def test_batches_are_one_stream_with_every_sample_once_an_epoch(counts):
    parts = taken(counts)
    assert [len(part) for part in parts] == counts
    stream = torch.cat(parts)
    whole = stream[: len(stream) // 7 * 7].reshape(-1, 7)
    assert torch.equal(whole.sort(1).values, torch.arange(7).expand_as(whole))
    assert torch.equal(stream, torch.cat(taken([7] * 6))[: len(stream)])
    assert len({tuple(epoch.tolist()) for epoch in whole}) > len(whole) // 2


def test_the_stream_can_be_entered_anywhere_and_read_again():
    whole, walked = torch.cat(taken([7] * 6)), order()
    for start in (0, 13, 6, 34, 7, 0):
        assert torch.equal(order().take(start, 7), whole[start : start + 7])
        assert torch.equal(walked.take(start, 7), whole[start : start + 7])


def test_the_stream_follows_its_seed_and_no_other_generator():
    before = torch.get_rng_state()
    a, again, b = (torch.cat(taken([7] * 6, seed)) for seed in (3, 3, 4))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert order(1).take(5, 1).tolist() == [0]
