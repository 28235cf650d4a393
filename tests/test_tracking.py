"""Tracking: the numbers of each moment, the optimizer's limits, a training untouched."""

import io
import math
import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.problems import (
    ONE_SAMPLE,
    Point,
    generator,
    normal,
    softmax_hessian,
    softmax_regression,
    tiny_mlp,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.utils.data import DataLoader

import sharpness as sh
from sharpness import tracking
from sharpness._results import Status
from sharpness.record import append_record, new_record
from sharpness.tracking import stability_thresholds

EVERY_MEASURE = ("lambda_max", "lambda_max_preconditioned", "phi")


def descend(problem, optimizer, tracker, num_updates):
    """Full-batch training."""
    for _ in range(num_updates):
        optimizer.zero_grad()
        problem.loss(problem.model(problem.data[0]), problem.data[1]).backward()
        optimizer.step()
        tracker.step()


def tracked(problem, optimizer=None, **settings):
    return sh.SharpnessTracker(
        problem.model, problem.loss, problem.data, optimizer=optimizer, **settings
    )


def one_weight():
    return nn.Parameter(torch.ones(1, dtype=torch.float64))


# -- the thresholds ----------------------------------------------------------------------

DESCENTS = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "damped": {"momentum": 0.9, "dampening": 0.5},
    "dampening without momentum": {"dampening": 0.5},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize(("share", "diverges"), [(0.98, False), (1.02, True)])
@pytest.mark.parametrize("settings", DESCENTS.values(), ids=DESCENTS)
def test_descent_on_a_parabola_diverges_just_above_its_threshold(settings, share, diverges):
    theta = one_weight()
    optimizer = SGD([theta], lr=0.1, **settings)
    curvature = share * stability_thresholds(optimizer)["lambda_max"]
    for _ in range(400):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    end = theta.detach().abs().item()
    assert end > 1e3 if diverges else end < 1e-3


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("beta", [0.9, 0.5])
@pytest.mark.parametrize(("share", "diverges"), [(0.98, False), (1.02, True)])
def test_adam_with_a_settled_preconditioner_diverges_just_above(
    kind, beta, share, diverges
):
    optimizer = kind([one_weight()], lr=1e-3, betas=(beta, 0.999))
    limit = stability_thresholds(optimizer)["lambda_max_preconditioned"]
    theta, average = 1.0, 0.0
    for _ in range(400):
        average = beta * average + (1 - beta) * share * limit * theta
        theta -= 1e-3 * average
    assert abs(theta) > 1e3 if diverges else abs(theta) < 1e-3


def test_the_usual_adam_has_38_over_its_learning_rate():
    found = stability_thresholds(Adam([one_weight()], lr=1e-3))
    assert found == {"lambda_max_preconditioned": pytest.approx(38e3, rel=1e-12)}


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        RMSprop([one_weight()]),
        SGD([one_weight()], lr=0.0),
        SGD([one_weight()], lr=0.1, maximize=True),
        SGD([one_weight()], lr=0.1, momentum=0.9, dampening=1.0),
        SGD([{"params": [one_weight()], "lr": eta} for eta in (0.1, 0.2)]),
    ],
    ids=["none", "RMSprop", "standstill", "ascent", "damped out", "two rates"],
)
def test_where_no_single_threshold_holds_there_is_none(optimizer):
    assert stability_thresholds(optimizer) == {}


def test_a_point_has_the_threshold_of_the_present_learning_rate():
    problem = softmax_regression()
    optimizer = SGD(problem.model.parameters(), lr=torch.tensor(0.5))
    tracker = tracked(problem, optimizer, every=2)
    optimizer.param_groups[0]["lr"] = 0.25
    descend(problem, optimizer, tracker, 2)
    assert [point.learning_rate for point in tracker.history] == [0.5, 0.25]
    assert [point.thresholds for point in tracker.history] == [
        {"lambda_max": 4.0},
        {"lambda_max": 8.0},
    ]


# -- the numbers -------------------------------------------------------------------------


def test_points_are_taken_at_the_start_and_every_so_many_updates():
    problem = softmax_regression()
    tracker = tracked(problem, every=3, measures=())
    returned = [tracker.step() for _ in range(7)]
    assert [point.step for point in tracker.history] == [0, 3, 6]
    assert [i + 1 for i, point in enumerate(returned) if point is not None] == [3, 6]
    assert returned[2] is tracker.history[1]


def test_every_point_has_the_loss_and_lambda_max_of_its_own_parameters():
    problem = softmax_regression()
    optimizer = SGD(problem.model.parameters(), lr=1.0)
    weights = torch.ones(len(problem.data[0]), dtype=torch.float64)
    exact = []

    def look(point):
        hessian = softmax_hessian(problem.model, problem.data[0], weights)
        theta = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
        exact.append((float(problem.f(theta)), float(torch.linalg.eigvalsh(hessian)[-1])))

    tracker = tracked(problem, optimizer, every=5, on_point=look)
    descend(problem, optimizer, tracker, 15)
    assert len(exact) == 4
    for point, (loss, largest) in zip(tracker.history, exact, strict=True):
        assert point.loss == pytest.approx(loss, rel=1e-12)
        assert point.lambda_max.status is Status.CONVERGED
        assert abs(point.lambda_max.value - largest) <= point.lambda_max.error + 1e-12
    first, last = tracker.history[0].lambda_max, exact[-1][1]
    assert abs(first.value - last) > 2 * first.error  # or a stale one would pass


def test_the_next_search_starts_from_the_last_eigenvectors(monkeypatch):
    problem, starts = softmax_regression(), []
    original = tracking.eigenpairs

    def eigenpairs(*arguments, v0, **rest):
        starts.append(v0)
        return original(*arguments, v0=v0, **rest)

    monkeypatch.setattr(tracking, "eigenpairs", eigenpairs)
    tracker = tracked(problem, tol=1e-8)
    vectors = tracker.state_dict()["eigenvectors"]["lambda_max"]
    v = vectors[0]
    hessian, value = problem.hessian, tracker.history[0].lambda_max
    residual = (hessian @ v - value.value * v).norm() / v.norm()
    assert residual <= 1e-6 * value.value
    assert vectors.untyped_storage().nbytes() == vectors.nbytes  # the basis is let go
    tracker.measure()
    assert starts[0] is None
    assert torch.equal(starts[1], vectors)


def test_following_costs_fewer_products_where_no_confidence_is_asked_for():
    tracker = tracked(tiny_mlp(), tol=1e-3, confidence=None)
    assert len(tracker.state_dict()["eigenvectors"]["lambda_max"]) == 2
    again = tracker.measure()
    assert again.lambda_max.num_hvps < tracker.history[0].lambda_max.num_hvps


def test_preconditioned_curvature_divides_by_adams_moments_whatever_their_order():
    problem = softmax_regression()
    weight, bias = problem.model.parameters()
    optimizer = Adam([{"params": [bias]}, {"params": [weight]}], lr=0.05)
    tracker = tracked(problem, optimizer, every=3, measures=EVERY_MEASURE[:2])
    descend(problem, optimizer, tracker, 3)
    assert tracker.history[0].lambda_max_preconditioned is None
    second = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in (weight, bias)])
    p = (1 - 0.9**3) * ((second / (1 - 0.999**3)).sqrt() + 1e-8)
    ones = torch.ones(len(problem.data[0]), dtype=torch.float64)
    hessian = softmax_hessian(problem.model, problem.data[0], ones)
    exact = torch.linalg.eigvalsh(hessian / (p.outer(p)).sqrt())[-1]
    found = tracker.history[1].lambda_max_preconditioned
    assert abs(found.value - float(exact)) <= found.error + 1e-9 * float(exact)
    assert set(tracker.history[1].thresholds) == {"lambda_max_preconditioned"}


@pytest.mark.parametrize("confidence", [0.95, None])
def test_an_eigenvalue_that_overtakes_the_one_that_was_followed_is_seen(confidence):
    h = torch.linspace(0.5, 1.0, 40, dtype=torch.float64)
    model, scale = Point(torch.zeros(40, dtype=torch.float64)), torch.ones(40).double()
    scale[3], scale[7] = 10.0, 9.0
    tracker = sh.SharpnessTracker(
        model,
        closure=lambda m, _: 0.5 * (scale * h * m.theta**2).sum(),
        data=ONE_SAMPLE,
        confidence=confidence,
    )
    for growth in torch.linspace(1.0, 1.5, 9).tolist():
        scale[7] = 9.0 * growth
        found = tracker.measure().lambda_max
        assert abs(found.value - float((scale * h).max())) <= found.error + 1e-12


def test_phi_is_that_of_the_protocol_in_closed_form():
    h = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    tracker = sh.SharpnessTracker(
        Point(torch.zeros(3, dtype=torch.float64)),
        closure=lambda model, _: 0.5 * (h * model.theta**2).sum(),
        data=ONE_SAMPLE,
        measures="phi",
        epsilon=1e-2,
    )
    phi = tracker.history[0].phi  # at the corner of a box of half-width epsilon
    assert phi.value == pytest.approx(100 * 0.5 * 8 * 1e-4, rel=1e-6)
    assert phi.error is None
    assert 1 <= phi.num_evals <= 30


def test_a_loader_is_run_through_once_and_stays_what_it_was():
    problem = softmax_regression()
    x, y = problem.data
    tracker = sh.SharpnessTracker(
        problem.model, problem.loss, iter([(x[:9], y[:9]), (x[9:], y[9:])]), measures=()
    )
    expected = float(problem.f(problem.theta))
    x.zero_()
    assert tracker.measure().loss == pytest.approx(expected, rel=1e-12)


def test_layers_may_be_thawed_on_the_way():
    problem = tiny_mlp()
    problem.model[0].requires_grad_(False)
    tracker = tracked(problem)
    problem.model[0].requires_grad_(True)
    assert tracker.measure().status is Status.COMPLETED
    assert tracker.state_dict()["eigenvectors"]["lambda_max"].shape == (1, 44)


def test_every_point_draws_anew_also_where_nothing_has_moved(monkeypatch):
    asked = []
    original = tracking.eigenpairs

    def eigenpairs(*arguments, seed, confidence, **rest):
        asked.append((seed, confidence))
        return original(*arguments, seed=seed, confidence=confidence, **rest)

    monkeypatch.setattr(tracking, "eigenpairs", eigenpairs)
    for seed in (0, 1):
        tracker = tracked(tiny_mlp(), every=1, seed=seed, confidence=0.9)
        tracker.step()
        tracker.step()
    seeds, confidences = zip(*asked, strict=True)
    assert len(set(seeds)) == 6
    assert set(confidences) == {0.9}


def test_a_loss_below_minus_one_has_no_phi_and_does_not_end_the_training():
    problem = softmax_regression()
    optimizer = Adam(problem.model.parameters())
    loss, data = lambda o, y: nn.functional.cross_entropy(o, y) - 9, problem.data
    tracker = sh.SharpnessTracker(
        problem.model, loss, data, optimizer=optimizer, measures=["phi", "lambda_max"]
    )
    values = tracker.measure().values()
    assert values["phi"].status is Status.NOT_AVAILABLE
    assert math.isnan(values["phi"].value)
    assert values["lambda_max"].status.ok


def test_a_diverged_training_is_reported_and_not_stopped():
    problem = softmax_regression()
    optimizer = Adam(problem.model.parameters())
    tracker = tracked(problem, optimizer, every=1, measures=EVERY_MEASURE, at_start=False)
    descend(problem, optimizer, tracker, 1)
    with torch.no_grad():
        problem.model.weight.fill_(math.nan)
    point = tracker.step()
    assert point.status is Status.NON_FINITE
    assert math.isnan(point.loss)
    assert set(point.values()) == set(EVERY_MEASURE)
    assert "lambda_max unknown (non_finite)" in str(point)
    assert tracker.history[0].status is Status.COMPLETED


# -- a training untouched ----------------------------------------------------------------


def trained(with_tracker, batchnorm):
    """Nine updates with dropout, BatchNorm and draws from every generator."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    x, y = normal(generator(1), 40, 3).float(), torch.arange(40) % 4
    layers = [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)]
    model, loss = nn.Sequential(*layers), nn.CrossEntropyLoss()
    model[3].eval()  # every layer keeps its own mode
    optimizer = Adam(model.parameters(), lr=0.01)
    tracker = None
    if with_tracker:
        tracker = sh.SharpnessTracker(
            model,
            loss,
            (x, y),
            optimizer=optimizer,
            every=2,
            measures=EVERY_MEASURE,
            batchnorm=batchnorm,
        )
    for _ in range(9):
        rows = torch.randint(40, (8,))
        shift = random.random() + np.random.rand()  # noqa: NPY002
        optimizer.zero_grad()
        loss(model(x[rows] + shift), y[rows]).backward()
        optimizer.step()
        if tracker:
            tracker.step()
    if tracker:
        tracker.measure()
        assert all(point.status is Status.COMPLETED for point in tracker.history)
    bits = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    bits += [s for state in optimizer.state.values() for s in state.values()]
    bits += [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1])]  # noqa: NPY002
    return bits, [m.training for m in model.modules()], random.getstate()


@pytest.mark.parametrize("batchnorm", ["running", "batch", "recalibrated"])
def test_a_training_ends_with_the_same_bits_as_without_a_tracker(batchnorm):
    bits, *others = trained(True, batchnorm)
    expected, *other_expected = trained(False, batchnorm)
    assert len(bits) == len(expected)
    for found, wanted in zip(bits, expected, strict=True):
        assert torch.equal(found, wanted)
    assert others == other_expected


# -- stopped and gone on -----------------------------------------------------------------


def without_seconds(history):
    def still(value):
        return (
            None if value is None else replace(value, cost=replace(value.cost, seconds=0.0))
        )

    return [
        replace(
            point,
            cost=replace(point.cost, seconds=0.0),
            **{name: still(getattr(point, name)) for name in EVERY_MEASURE},
        )
        for point in history
    ]


def test_a_resumed_training_is_tracked_with_the_same_numbers():
    def begun(**settings):
        problem = tiny_mlp()
        optimizer = Adam(problem.model.parameters(), lr=0.05)
        tracker = tracked(problem, optimizer, every=2, measures=EVERY_MEASURE, **settings)
        return problem, optimizer, tracker

    problem, optimizer, whole = begun()
    descend(problem, optimizer, whole, 3)
    file = io.BytesIO()
    parts = (problem.model, optimizer, whole)
    torch.save([part.state_dict() for part in parts], file)
    descend(problem, optimizer, whole, 3)

    problem, optimizer, resumed = begun(at_start=False)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for part, state in zip((problem.model, optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    descend(problem, optimizer, resumed, 3)
    assert [point.step for point in resumed.history] == [0, 2, 4, 6]
    assert without_seconds(resumed.history) == without_seconds(whole.history)


def interrupting(monkeypatch, at):
    """Ctrl-C in the product number `at`."""
    original, calls = sh.EmpiricalRisk.product, []

    def product(self, *arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(sh.EmpiricalRisk, "product", product)


def test_an_interrupt_keeps_what_was_earned_and_stops_the_loop(monkeypatch):
    problem, seen = tiny_mlp(), []
    tracker = tracked(
        problem, every=1, measures=EVERY_MEASURE, at_start=False, on_point=seen.append
    )
    interrupting(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        tracker.step()
    (point,) = tracker.history
    assert seen == [point]
    assert point.status is point.lambda_max.status is Status.INTERRUPTED
    assert point.lambda_max.num_hvps == 3
    assert point.lambda_max.error > 0
    assert point.phi is None
    assert tracker.num_updates == 1
    assert "(interrupted)" in tracker.table()
    assert tracker.step().status is Status.COMPLETED  # whoever caught it may go on


def test_an_interrupt_before_anything_was_earned_leaves_no_point(monkeypatch):
    tracker = tracked(tiny_mlp(), measures=())

    def value(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(sh.EmpiricalRisk, "value", value)
    with pytest.raises(KeyboardInterrupt):
        tracker.measure()
    assert len(tracker.history) == 1


# -- what is shown and written -----------------------------------------------------------


@pytest.fixture
def run():
    problem = softmax_regression()
    optimizer = SGD(problem.model.parameters(), lr=0.5)
    tracker = tracked(problem, optimizer, every=2, measures=("lambda_max", "phi"))
    descend(problem, optimizer, tracker, 6)
    return tracker


def test_the_table_and_the_line_hold_every_number(run):
    lines = run.table().splitlines()
    header = "update loss lambda_max phi threshold products gradients s"
    assert " ".join(lines[0].split()) == header
    for line, point in zip(lines[1:], run.history, strict=True):
        assert line.split()[0] == str(point.step)
        for number in (point.loss, point.lambda_max.value, point.phi.value, 4.0):
            assert f"{number:.4g}" in line
    assert len({len(line) for line in lines}) == 1
    products = sum(point.lambda_max.num_hvps for point in run.history)
    assert "4 points in 6 updates" in str(run)
    assert f"{products} products" in str(run)
    assert "(threshold 4)" in str(run.history[0])
    assert str(run) in repr(run)


def test_the_figure_draws_every_number_and_its_threshold(run, tmp_path):
    path = tmp_path / "deep" / "run.png"
    figure = run.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    curvature, phi, loss = figure.axes
    drawn = {line.get_label(): line for line in curvature.get_lines()}
    (limit,) = [line for name, line in drawn.items() if name == "stability threshold"]
    assert list(limit.get_ydata()) == [4.0] * 4
    for axes, numbers in (
        (curvature, [point.lambda_max.value for point in run.history]),
        (phi, [point.phi.value for point in run.history]),
        (loss, [point.loss for point in run.history]),
    ):
        assert list(axes.get_lines()[0].get_xdata()) == [0, 2, 4, 6]
        assert list(axes.get_lines()[0].get_ydata()) == numbers


@pytest.mark.parametrize("broken", [math.nan, 0.0])
def test_a_figure_of_doubtful_or_no_points_is_still_drawn(run, tmp_path, broken):
    unknown = replace(run.history[0].lambda_max, value=math.nan, error=math.nan)
    run.history[1] = replace(run.history[1], loss=broken, lambda_max=unknown)
    run.plot(tmp_path / "some.png")
    run.history.clear()
    run.plot(tmp_path / "none.png")
    assert run.table().splitlines()[0].startswith("update")


def test_points_can_be_appended_to_a_record_file(tmp_path):
    path = tmp_path / "run.jsonl"

    def write(point):
        append_record(path, new_record("tracking", point=point))

    tracker = tracked(softmax_regression(), every=1, on_point=write)
    tracker.step()
    read = [record["point"] for record in sh.read_records(path)]
    assert [point["step"] for point in read] == [0, 1]
    assert read[1]["lambda_max"]["value"] == tracker.history[1].lambda_max.value
    assert read[1]["lambda_max"]["status"] == "converged"


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"every": 0}, ValueError, "`every` must be at least 1; got 0"),
        ({"every": 2.5}, ValueError, "`every` must be a whole number; got 2.5"),
        ({"measures": ("lambda",)}, ValueError, "got 'lambda'. Did you mean lambda_max?"),
        ({"measures": "trace"}, ValueError, "`measures` must be of lambda_max, .*'trace'"),
        ({"epsilon": 0}, ValueError, "`epsilon` must be positive; got 0"),
        ({"tol": -1.0}, ValueError, "`tol` must be positive; got -1.0"),
        ({"on_point": "run.jsonl"}, TypeError, "`on_point` must be a function.*got str"),
        ({"optimizer": "sgd"}, TypeError, "`optimizer` must be a torch.*got str"),
        ({"batchnorm": "best"}, ValueError, "`batchnorm` must be .*got 'best'"),
        (
            {"optimizer": SGD([one_weight()]), "measures": "lambda_max_preconditioned"},
            ValueError,
            "`optimizer` must be Adam, AdamW or NAdam .*got SGD",
        ),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(settings, error, match):
    with pytest.raises(error, match=match) as caught:
        tracked(softmax_regression(), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"model": 1}, {"num_updates": 1}, None, [3]])
def test_a_foreign_state_is_refused(state):
    tracker = tracked(softmax_regression(), measures=())
    with pytest.raises(ValueError, match="`state` must come from a tracker's") as caught:
        tracker.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert len(tracker.history) == 1


# -- other people's loops ----------------------------------------------------------------


def waiting():
    """A tracker for a callback, and the optimizer that the trainer will bring along."""
    problem = softmax_regression()
    tracker = tracked(problem, every=2, at_start=False)
    return tracker, SGD(problem.model.parameters(), lr=0.5)


def test_the_transformers_callback_measures_from_the_first_update_on():
    transformers = pytest.importorskip("transformers")
    tracker, optimizer = waiting()
    callback = tracker.transformers_callback()
    assert isinstance(callback, transformers.TrainerCallback)
    wrapped = SimpleNamespace(optimizer=optimizer)  # as Accelerate does
    state = transformers.TrainerState(global_step=10)
    callback.on_train_begin(None, state, None, optimizer=wrapped, model=None)
    for _ in range(4):
        callback.on_step_end(None, state, None, optimizer=wrapped)
    assert [point.step for point in tracker.history] == [10, 12, 14]
    assert tracker.history[0].thresholds == {"lambda_max": 4.0}
    state.is_world_process_zero = False
    for _ in range(4):
        callback.on_step_end(None, state, None)
    assert len(tracker.history) == 3


def test_a_transformers_trainer_runs_with_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = torch.randint(11, (6, 8))
    tracker = sh.SharpnessTracker(
        model,
        data=[{"input_ids": rows, "labels": rows}],
        closure=lambda model, batch: model(**batch).loss,
        every=2,
        at_start=False,
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[tracker.transformers_callback()],
    )
    trainer.train()
    assert [point.step for point in tracker.history] == [0, 2, 4]
    assert all(point.status is Status.COMPLETED for point in tracker.history)
    assert set(tracker.history[1].thresholds) == {"lambda_max_preconditioned"}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_lightning_callback_counts_updates_and_not_batches(monkeypatch, package):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    stand_in = ModuleType(package)
    stand_in.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, package, stand_in)
    tracker, optimizer = waiting()
    callback = tracker.lightning_callback()
    assert isinstance(callback, stand_in.Callback)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, optimizers=[optimizer])
    callback.on_train_start(trainer, None)
    for batch in range(8):
        trainer.global_step = (batch + 1) // 2  # gradients of two batches accumulate
        callback.on_train_batch_end(trainer, None, None, None, batch)
    assert [point.step for point in tracker.history] == [0, 2, 4]
    assert tracker.history[0].thresholds == {"lambda_max": 4.0}

    other = waiting()[0]
    other.lightning_callback().load_state_dict(callback.state_dict())
    assert other.history == tracker.history
    trainer.is_global_zero = False
    trainer.global_step += 2
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert tracker.num_updates == 4


@pytest.mark.filterwarnings("ignore")  # of its own use of PyTorch
def test_a_lightning_trainer_runs_with_it(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    problem = softmax_regression()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = problem.model

        def training_step(self, batch, _):
            return problem.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.5)

    tracker = tracked(problem, every=2, at_start=False)
    trainer = lightning.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[tracker.lightning_callback()],
    )
    trainer.fit(Module(), DataLoader([problem.data] * 8, batch_size=None))
    assert [point.step for point in tracker.history] == [0, 2, 4]
    assert tracker.history[1].thresholds == {"lambda_max": 4.0}


@pytest.mark.parametrize(
    ("door", "modules"),
    [
        ("transformers_callback", ["transformers"]),
        ("lightning_callback", ["lightning.pytorch", "pytorch_lightning"]),
    ],
)
def test_a_missing_package_is_named_with_its_installation(monkeypatch, door, modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    tracker, _ = waiting()
    install = f"pip install {door.removesuffix('_callback')}"
    with pytest.raises(ImportError, match=install) as caught:
        getattr(tracker, door)()
    assert "\n" not in str(caught.value)


def test_the_example_tracks_against_its_threshold():
    script = Path(__file__).parent.parent / "examples" / "track.py"
    track = runpy.run_path(str(script))["track"]
    tracker = track(num_updates=4, every=2)
    assert [point.step for point in tracker.history] == [0, 2, 4]
    for point in tracker.history:
        assert 0 < point.lambda_max.value < point.thresholds["lambda_max"]


# -- BatchNorm ---------------------------------------------------------------------------


def lambda_max_of(problem, **settings):
    return sh.eigenpairs(problem.risk(**settings), 2, tol=1e-6, progress=False).lambda_max


def test_in_training_mode_batchnorm_is_on_the_statistics_of_the_loops_batches():
    problem = tiny_mlp(batchnorm=True)
    problem.model.train()
    loader = DataLoader(list(zip(*problem.data, strict=True)), batch_size=8)
    batches = [tuple(part[i : i + 8] for part in problem.data) for i in (0, 8, 16)]
    for data, size in ((loader, 8), (batches, 8), (problem.data, 5000)):
        tracker = sh.SharpnessTracker(problem.model, problem.loss, data, tol=1e-6)
        point = tracker.history[0]
        expected = lambda_max_of(problem, batchnorm="batch", batchnorm_batch=size)
        assert point.lambda_max.value == pytest.approx(expected, rel=1e-5)
        assert (point.batchnorm, point.batchnorm_batch) == ("batch", size)
        assert f"batch statistics of up to {size} samples" in str(point)
        assert f"batch statistics of up to {size} samples" in tracker.table()
        assert f"of up to {size} samples" in tracker.plot().axes[0].get_title()
    problem.model.eval()
    point = tracker.measure()
    expected = lambda_max_of(problem, batchnorm="running")
    assert point.lambda_max.value == pytest.approx(expected, rel=1e-5)
    assert point.statistics == "running statistics"
    title = tracker.plot().axes[0].get_title()
    assert title.endswith("batch statistics of up to 5000 samples, then running statistics")


def test_what_was_asked_for_of_batchnorm_stands():
    problem = tiny_mlp(batchnorm=True)
    problem.model.train()
    for asked in ("running", "batch", "recalibrated"):
        point = tracked(problem, batchnorm=asked, batchnorm_batch=6).history[0]
        risk = problem.risk(batchnorm=asked, batchnorm_batch=6)
        assert point.loss == risk.value()
        assert point.batchnorm == asked


def test_without_batchnorm_nothing_is_said_of_it():
    tracker = tracked(tiny_mlp())
    assert tracker.history[0].batchnorm is None
    assert "statistics" not in str(tracker) + tracker.table()
    assert tracker.plot().axes[0].get_title() == ""


def test_of_a_closure_the_batches_are_those_that_were_given():
    problem = tiny_mlp(batchnorm=True)
    problem.model.train()
    x, y = problem.data
    tracker = sh.SharpnessTracker(
        problem.model,
        closure=lambda m, b: problem.loss(m(b[0]), b[1]),
        data=[(x[:12], y[:12]), (x[12:], y[12:])],
    )
    assert tracker.history[0].statistics == "batch statistics"
