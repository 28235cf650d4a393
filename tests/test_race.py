import json
import math

import numpy as np
import pytest
import torch
from helpers import untouched
from helpers.known_trainings import (
    CURVATURE,
    expected_updates,
    noisy_quadratic,
    regression,
)
from torch import nn

from sharpness._results import Status
from sharpness.batchsize import runs as trainings
from sharpness.batchsize.problem import Problem
from sharpness.batchsize.race import branches, race
from sharpness.batchsize.updates import UpdateTimes, time_per_update
from sharpness.results import load_result
from sharpness.statistics import relative_line

FLOOR = float(np.mean(CURVATURE))  # the quadratic's loss at its minimum
QUICK = {"measure": False, "progress": False}


def times_of(**seconds):
    """As if measured: `b4=0.1` for 0.1 s per update at batch size 4."""
    sizes = np.array([int(name[1:]) for name in seconds])
    ones = np.ones(len(sizes))
    return UpdateTimes(
        batch_sizes=sizes,
        seconds=np.array(list(seconds.values())),
        spread=ones,
        peak_bytes=ones,
        survived=ones > 0,
        reasons=("",) * len(sizes),
        overhead=0.0,
        per_sample=0.0,
        residual=0.0,
        memory="",
        status=Status.COMPLETED,
    )


# -- what theory says ----------------------------------------------------------------------


def test_updates_of_a_noisy_quadratic_are_those_of_its_expected_loss():
    problem = noisy_quadratic(lr=16.0, batch_size=16)
    sizes, target, seeds = [8, 16, 32, 64, 256], 1.06 * FLOOR, range(4)
    found = race(
        problem, sizes, target=target, rule="sqrt", rates=(0.5, 1, 2), seeds=seeds, **QUICK
    )
    expected = [
        expected_updates(
            size, [f * problem.scaled_rate(size, "sqrt") for f in (0.25, 0.5, 1, 2)], target
        )
        for size in sizes
    ]
    for each, updates in zip(found.sizes, expected, strict=True):
        assert abs(each.updates - updates) < 4 * each.updates_error
    theory = relative_line([1 / size for size in sizes], expected)
    assert found.s_min_interval[0] < theory.a < found.s_min_interval[1]
    assert found.e_min_interval[0] < theory.b < found.e_min_interval[1]
    assert found.critical_interval[0] < theory.b / theory.a < found.critical_interval[1]
    assert found.critical == pytest.approx(found.e_min / found.s_min)
    assert found.residual < 0.1
    assert found.status is Status.COMPLETED


def test_where_noise_is_all_there_is_the_critical_size_is_at_least():
    """Three sizes below B_crit: updates fall as 1 / B, and S_min may be 0."""
    problem = noisy_quadratic(lr=2.0, batch_size=2)
    found = race(problem, [1, 2, 4], target=1.1 * FLOOR, seeds=range(2), **QUICK)
    low, high = found.critical_interval
    assert high is None
    assert low >= 0
    assert found.s_min_interval[0] == 0
    assert "critical_batch_size ≥" in found.table()


def test_three_clocks_and_who_is_first_by_each():
    times = times_of(b8=1.0, b32=5.0, b128=6.0)
    problem = noisy_quadratic(lr=16.0, batch_size=16)
    found = race(problem, [8, 32, 128], target=1.1 * FLOOR, times=times, **QUICK)
    for each in (*found.sizes, *found.runs):
        assert each.samples == pytest.approx(each.updates * each.batch_size)
        assert each.seconds == pytest.approx(each.updates * times.of(each.batch_size))
    assert found.best("updates").batch_size == 128
    assert found.best("samples").batch_size == 8
    seconds = {each.batch_size: each.seconds for each in found.sizes}
    assert found.best("seconds").batch_size == min(seconds, key=seconds.get)
    for clock in ("updates", "samples", "seconds"):
        assert clock in found.table()
    with pytest.raises(ValueError, match="`clock` must"):
        found.best("epochs")


def test_without_times_the_updates_of_the_race_are_timed():
    found = race(regression(), [4, 16], **QUICK)
    for each in found.runs:
        assert 0 < each.seconds < found.cost.seconds


# -- how runs end --------------------------------------------------------------------------


def test_a_rate_that_diverges_ends_at_once_and_costs_the_size_nothing():
    problem = noisy_quadratic(lr=16.0, batch_size=16)
    found = race(
        problem,
        [64],
        target=1.1 * FLOOR,
        rule="none",
        rates=(1, 10),
        max_updates=400,
        **QUICK,
    )
    ends = {run.lr: run for run in found.runs}
    assert ends[160.0].end == "diverged"
    assert not ends[160.0].reached
    assert ends[160.0].updates < 100
    assert found.sizes[0].reached
    assert found.sizes[0].lr in (16.0, 8.0)


def test_not_a_number_is_a_divergence():
    problem = regression(lr=1e20, batch_size=8)
    found = race(problem, [8], target=0.1, rates=(1,), max_updates=50, **QUICK)
    assert found.runs[0].end == "diverged"
    assert [run.lr for run in found.runs] == pytest.approx([1e20, 5e19, 2.5e19, 1.25e19])
    assert "diverged" in found.sizes[0].note
    assert found.best("updates") is None
    assert math.isnan(found.s_min)


def test_all_rates_too_low_are_extended_upwards():
    problem = noisy_quadratic(lr=16.0, batch_size=16)
    settings = {"target": 1.1 * FLOOR, "rule": "none", **QUICK}
    found = race(problem, [64], rates=(0.25, 0.5), **settings)
    assert {run.lr for run in found.runs} == {4.0, 8.0, 16.0, 32.0, 64.0}
    assert found.sizes[0].lr in (16.0, 32.0)
    assert not found.sizes[0].at_edge
    low = race(problem, [64], rates=(1 / 32, 1 / 16), **settings).sizes[0]
    assert low.lr == 8.0  # a sixteenth of the anchor's, times two three times
    assert low.at_edge
    assert "end of its grid" in low.note


def test_a_rate_that_has_lost_is_stopped_and_does_not_change_the_best():
    problem = noisy_quadratic(lr=16.0, batch_size=16)
    settings = {"target": 1.06 * FLOOR, "rule": "sqrt", **QUICK}
    found = race(problem, [16], rates=(0.25, 0.5, 1), seeds=(0, 1), **settings)
    assert {run.end for run in found.runs} >= {"reached", "overtaken"}
    best = found.sizes[0]
    for run in found.runs:
        if run.end == "overtaken":
            total = sum(r.updates for r in found.runs if r.lr == run.lr)
            assert total >= 2 * best.updates
    alone = race(problem, [16], rates=(best.lr / 16,), seeds=(0, 1), **settings)
    at_same = [run for run in alone.runs if run.lr == best.lr]
    assert np.mean([run.updates for run in at_same]) == pytest.approx(
        best.updates, rel=0.02
    )


def test_a_size_that_is_too_slow_is_given_up():
    """Sizes are raced from the anchor's on; 32 takes 100 times the seconds an update."""
    times, asked = times_of(b8=1.0, b16=1.0, b32=100.0), []
    found = race(
        regression(),
        [16, 32, 8],
        target=0.1,
        times=times,
        rates=(0.5, 1),
        give_up=10,
        on_run=lambda run: asked.append(run.batch_size),
        **QUICK,
    )
    assert list(dict.fromkeys(asked)) == [8, 16, 32]
    assert [each.reached for each in found.sizes] == [True, True, False]
    soonest = min(each.seconds for each in found.sizes[:2])
    lost = [run for run in found.runs if run.batch_size == 32]
    assert {run.end for run in lost} == {"lost"}
    assert len(lost) == 2  # no rate more is tried
    assert all(run.updates == math.ceil(10 * soonest / 100) for run in lost)
    assert "(lost)" in found.sizes[2].note


def test_a_target_out_of_reach_is_said_and_left_out_of_the_fit():
    found = race(
        noisy_quadratic(lr=16.0, batch_size=16),
        [1, 16, 64, 256],
        target=1.06 * FLOOR,
        rule="sqrt",
        max_updates=30,
        **QUICK,
    )
    assert [each.reached for each in found.sizes] == [False, True, True, True]
    assert "not reached in 30 updates" in found.sizes[0].note
    assert math.isnan(found.sizes[0].updates)
    there = found.sizes[1:]
    line = relative_line([1 / s.batch_size for s in there], [s.updates for s in there])
    assert (found.s_min, found.e_min) == pytest.approx((line.a, line.b))
    assert found.status is Status.COMPLETED


def test_without_a_target_the_anchor_sets_one():
    problem = regression(lr=0.01)
    found = race(problem, [8], max_updates=80, rates=(1,), **QUICK)
    assert found.target_how == "where the anchor stands after 40 updates of 8"
    model = problem.copy()
    optimizer = problem.optimizer_for(model, problem.lr)
    stream = problem.batches(8, 0)
    losses = {}
    for made in range(1, 41):
        problem.update(model, optimizer, next(stream))
        losses[made] = problem.validation_loss(model)[0]
    assert losses[40] < found.target < losses[32]
    first = next(run for run in found.runs if run.lr == problem.lr)
    assert 32 < first.updates < 40


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"target": 100.0}, "`target` must lie below the start's loss"),
        ({"rates": ()}, "`rates` must hold"),
        ({"rule": "cubic"}, "`rule` must be one of linear"),
        ({"confidence": 1.0}, "`confidence` must lie"),
        ({"seeds": ()}, "`seeds` must hold"),
        ({"max_updates": 0}, "`max_updates` must be at least 1"),
    ],
)
def test_a_wrong_call_is_one_line(settings, line):
    with pytest.raises(ValueError, match=line) as caught:
        race(regression(), [8], **settings, **QUICK)
    assert len(str(caught.value)) <= 200


def test_an_anchor_that_diverges_is_one_line():
    with pytest.raises(ValueError, match="`lr` must make the anchor learn") as caught:
        race(regression(lr=50.0), [8], **QUICK)
    assert len(str(caught.value)) <= 200


def test_a_size_beyond_the_rows_is_one_line_and_the_rest_goes_on():
    found = race(regression(100), [8, 16, 128], **QUICK)
    assert [each.reached for each in found.sizes] == [True, True, False]
    assert found.sizes[2].note == "larger than the 100 rows"


def test_a_batch_that_does_not_fit_is_one_line_and_the_rest_goes_on(monkeypatch):
    plain = Problem.update

    def update(problem, model, optimizer, batch):
        if len(batch[1]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(problem, model, optimizer, batch)

    monkeypatch.setattr(Problem, "update", update)
    found = race(regression(), [8, 16, 32], **QUICK)
    assert [each.reached for each in found.sizes] == [True, True, False]
    assert "no memory" in found.sizes[2].note
    assert [run.batch_size for run in found.runs].count(32) == 1


# -- what is kept --------------------------------------------------------------------------


def results_of(found):
    return [
        {**vars(each), "measures": {k: str(v) for k, v in each.measures.items()}}
        for each in found.sizes
    ]


@pytest.mark.parametrize("measure", [False, True])
def test_a_race_that_was_interrupted_goes_on_where_it_was(tmp_path, measure):
    times = times_of(b4=1.0, b16=1.0)
    settings = {"times": times, "measure": measure, "seeds": (0, 1), "progress": False}
    whole = race(regression(), [4, 16], **settings)

    seen = []

    def interrupt(run):
        seen.append(run)
        if len(seen) == 4:
            raise KeyboardInterrupt

    folder = tmp_path / "race"
    broken = race(regression(), [4, 16], folder=folder, on_run=interrupt, **settings)
    assert broken.status is Status.INTERRUPTED
    assert broken.runs == whole.runs[:4]
    assert broken.sizes[1].note == "not run"
    trained = []
    plain = trainings.Racers.trained

    def counted(racers, *args):
        trained.append(args)
        return plain(racers, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings.Racers, "trained", counted)
        again = race(regression(), [4, 16], folder=folder, **settings)
        num_again = len(trained)
        finished = race(regression(), [4, 16], folder=folder, **settings)
    assert again.runs == finished.runs == whole.runs
    assert results_of(again) == results_of(finished) == results_of(whole)
    assert 0 < num_again < len(whole.runs)
    assert len(trained) == num_again  # the last one trained nothing


def test_time_that_is_up_leaves_what_was_done(tmp_path):
    found = race(regression(), [4, 16], max_seconds=1e-9, **QUICK)
    assert found.status is Status.MAX_SECONDS
    assert [each.note for each in found.sizes] == ["not run", "not run"]
    assert found.runs == ()


def test_a_folder_of_another_race_is_refused(tmp_path):
    race(regression(), [8], folder=tmp_path, rates=(1,), **QUICK)
    with pytest.raises(ValueError, match="hold runs of the same race; got num_rows=256"):
        race(regression(255), [8], folder=tmp_path, rates=(1,), **QUICK)
    (tmp_path / "anchor.json").write_text("{}")
    with pytest.raises(ValueError, match=r"anchor\.json, which is damaged"):
        race(regression(), [8], folder=tmp_path, rates=(1,), **QUICK)


def test_files_of_runs_are_small_and_plain(tmp_path):
    found = race(regression(), [8], folder=tmp_path, rates=(1,), **QUICK)
    files = sorted(tmp_path.glob("8-*.json"))
    assert len(files) == len(found.runs)
    plain = json.loads(files[0].read_text())
    assert plain["batch_size"] == 8
    assert all(path.stat().st_size < 10_000 for path in tmp_path.iterdir())


def test_it_is_kept_in_a_file(tmp_path):
    found = race(regression(), [4, 16, 64, 300], rates=(0.5, 1), progress=False)
    found.save(tmp_path / "race.safetensors")
    again = load_result(tmp_path / "race.safetensors")
    assert str(again) == str(found)
    assert again.table() == found.table()
    assert [str(run) for run in again.runs] == [str(run) for run in found.runs]


def test_model_and_generators_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    model(torch.randn(5, 3)).sum().backward()
    before, states = untouched.fingerprint(model), untouched.random_states()
    problem = regression(model=model, optimizer="adam", lr=0.01, batchnorm_batch=4)
    found = race(problem, [4, 16], rates=(1,), max_updates=60, progress=False)
    branches(problem, None, (1, 2), progress=False)
    untouched.assert_same(before, untouched.fingerprint(model))
    untouched.assert_states(states, untouched.random_states())
    assert len(found.runs) >= 2


# -- sharpness at the end ------------------------------------------------------------------


def test_sharpness_at_each_end_is_that_of_the_quadratic():
    found = race(
        noisy_quadratic(lr=16.0, batch_size=16), [8, 64], target=1.1 * FLOOR, progress=False
    )
    for each in found.sizes:
        curvature = 2 * CURVATURE.max() / len(CURVATURE)
        value = each.measures["lambda_max"]
        assert abs(value.value - curvature) < value.error + 1e-5
        assert 0 < each.measures["batch_sharpness"].value < curvature
        assert each.measures["phi"].value > 0
        assert "lambda_max" in found.table()


# -- from a checkpoint ---------------------------------------------------------------------


def test_where_curvature_is_known_the_largest_branch_that_keeps_up_is():
    """Full-batch descent at a rate scaled linearly: k = 8 is beyond 2 / lambda_max."""
    problem = noisy_quadratic(lr=10.0, batch_size=16)
    found = branches(problem, None, (1, 2, 4, 8), samples=16 * 8 * 40, tolerance=0.2)
    assert found.batch_sizes == (16, 32, 64, 128)
    assert found.rates == pytest.approx((10, 20, 40, 80))  # stable below 40
    assert found.updates == (320, 160, 80, 40)
    assert found.critical in (16, 32)
    assert not found.is_lower_bound
    assert found.losses[3] > 2 * found.losses[0]
    assert found.errors[0] == 0


def test_branches_that_all_keep_up_are_at_least():
    problem = noisy_quadratic(lr=2.0, batch_size=8)
    found = branches(problem, None, (2, 4), tolerance=0.5)
    assert found.factors == (1, 2, 4)
    assert found.critical == 32
    assert found.is_lower_bound
    assert "critical_batch_size ≥ 32" in str(found)


def test_a_branch_begins_at_the_checkpoint():
    problem = noisy_quadratic(lr=1.0, batch_size=8)
    state = {**problem.model.state_dict(), "theta": torch.full((len(CURVATURE),), 10.0)}
    far, near = (branches(problem, at, (1, 2), samples=64) for at in (state, None))
    assert far.losses[0] > 10 * near.losses[0]
    assert problem.model.theta.eq(1).all()


def test_a_branch_takes_over_the_state_of_the_optimizer_but_not_its_rate():
    problem = regression(optimizer="adam", lr=0.01)
    model = problem.copy()
    optimizer = problem.optimizer_for(model, 123.0)
    problem.update(model, optimizer, next(problem.batches(8)))
    kept = optimizer.state_dict()
    with_state = branches(problem, None, (1, 2), optimizer_state=kept)
    without = branches(problem, None, (1, 2))
    assert with_state.losses != without.losses
    assert with_state.losses[0] < 3 * without.losses[0]  # 123 would have diverged


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"factors": (0.5,)}, "`factors` must be at least 1"),
        ({"factors": (1, 100)}, "at most the 256 rows"),
        ({"tolerance": 0}, "`tolerance` must be positive"),
        ({"samples": 10}, "`samples` must be at least"),
    ],
)
def test_wrong_branches_are_one_line(settings, line):
    with pytest.raises(ValueError, match=line):
        branches(regression(), **settings)


def test_branches_that_diverge_are_not_finite_and_have_no_critical_size():
    found = branches(regression(lr=1e20), None, (1, 2))
    assert found.status is Status.NON_FINITE
    assert found.critical is None


# -- the line ------------------------------------------------------------------------------


def test_a_line_through_exact_points_is_found():
    x = np.array([1 / 8, 1 / 64, 1 / 512])
    line = relative_line(x, 40 + 3000 * x)
    assert (line.a, line.b) == pytest.approx((40, 3000))
    assert line.residual < 1e-12
    low, high = line.ratio_interval
    assert low == pytest.approx(75)
    assert high == pytest.approx(75)


@pytest.mark.parametrize("shape", ["rising", "falling"])
def test_a_line_keeps_from_being_negative(shape):
    x = np.array([1.0, 2.0, 4.0])
    y = {"rising": x**2, "falling": 1 / x}[shape]
    line = relative_line(x, y)
    kept, zero = (line.b, line.a) if shape == "rising" else (line.a, line.b)
    assert zero == 0
    basis = x if shape == "rising" else np.ones(3)
    cost = lambda c: np.sum((c * basis / y - 1) ** 2)  # noqa: E731
    assert cost(kept) < min(cost(0.99 * kept), cost(1.01 * kept))


def test_of_two_points_nothing_is_known_of_the_error():
    line = relative_line([0.1, 1.0], [5.0, 10.0])
    assert line.interval(0) == (0, math.inf)
    assert line.ratio_interval == (0, None)


def test_intervals_of_the_line_cover():
    rng, sizes, num = np.random.default_rng(0), 2.0 ** np.arange(3, 10), 400
    hits = np.zeros(3)
    for _ in range(num):
        y = (40 + 3000 / sizes) * (1 + 0.05 * rng.normal(size=len(sizes)))
        line = relative_line(1 / sizes, y)
        low, high = line.ratio_interval
        spans = (line.interval(0), line.interval(1), (low, high or math.inf))
        hits += [a <= v <= b for (a, b), v in zip(spans, (40, 3000, 75), strict=True)]
    assert (hits / num > 0.95 - 3 * math.sqrt(0.95 * 0.05 / num)).all()


def test_time_and_race_go_together():
    problem = regression()
    times = time_per_update(problem, [4, 16, 64], repeats=2)
    found = race(problem, [4, 16, 64], times=times, rates=(1,), **QUICK)
    for each in found.sizes:
        assert each.seconds == pytest.approx(each.updates * times.of(each.batch_size))
