import dataclasses
import json
import math
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from sharpness import checkpoint
from sharpness.lab import networks
from sharpness.lab import run as lab_run
from sharpness.lab.data import load
from sharpness.lab.run import DivergedError, TrainingRun, train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.record import read_records
from sharpness.reproduce import serialisation
from sharpness.reproduce.model_spec import Bench, ModelSpec, in_order
from sharpness.reproduce.observations import (
    Accuracy,
    InterpolationRun,
    Measured,
    Observation,
    Rescaled,
    TrackingRun,
)
from sharpness.reproduce.runner import Runner
from sharpness.reproduce.serialisation import described, digest, restored

DATA = "digits[60,test=40]"  # three updates an epoch
MLP = "MLP?width=8&out_features=10"


def net(epochs=1.0, *, until_loss_of=None, start=None, network=MLP, **changes):
    training = Training(**{"network": network, "batch_size": 20, **changes})
    return ModelSpec(
        data=DATA,
        training=training,
        budget=StoppingCriteria(epochs=epochs),
        until_loss_of=until_loss_of,
        start=start,
    )


def normalised(in_features: int = 64, num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_features, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, num_classes),
    )


def wild(epochs):
    """Its first update is the last one with a finite loss."""
    return net(epochs, optimizer="sgd", learning_rate=1e38)


A, B = net(seed=1), net(2.0, seed=2, optimizer="sgd", weight_decay=1e-4)
PLANS = [
    Accuracy(of=A),
    Accuracy(of=net(start=A, until_loss_of=B, remedy="sam?rho=0.1")),
    Measured(of=B, measures=("lambda_max",)),
    Measured(of=B, measures=("phi", "adaptive"), num_samples=None, seed=3),
    Measured(of=B, measures=()),
    InterpolationRun(first=A, second=B),
    InterpolationRun(first=A, second=B, split="test", arc=True, num_samples=None),
    Rescaled(of=A, factors=(1.0, 0.1, 1e-3), measures=("lambda_max",)),
    TrackingRun(data=DATA, training=A.training, budget=StoppingCriteria(epochs=2.5)),
    TrackingRun(
        data=DATA,
        training=B.training,
        budget=StoppingCriteria(updates=7, patience=2),
        measure="lambda_max_preconditioned",
        every=3,
    ),
]


@pytest.fixture(autouse=True, scope="module")
def _read_once():
    load(DATA)  # the first test would wait for the packages that it comes with


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def bench(tmp_path):
    return Bench(folder=tmp_path)


@pytest.fixture
def runner(tmp_path):
    return Runner(folder=tmp_path, jobs=1)


def carried_out(runner, wanted):
    return runner.carry_out(wanted, progress=False)


def updates_of(bench, trained):
    return checkpoint.load(bench.path(trained)).training["updates"]


def directly(trained, path, **changes):
    training = replace(trained.training, **changes)
    return train(training, trained.budget, load(trained.data), path)


def assert_same_bits(found, expected):
    assert found.training["updates"] == expected.training["updates"]
    assert found.training["history"] == expected.training["history"]
    assert found.training["metrics"] == expected.training["metrics"]
    assert found.training["finished"]
    for ours, theirs in (
        (found.state_dict, expected.state_dict),
        (found.optimizer, expected.optimizer),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def counted(monkeypatch):
    """How many updates have been made."""
    made, one_update = [], TrainingRun.one_update

    def counting(self):
        made.append(self.update)
        one_update(self)

    monkeypatch.setattr(TrainingRun, "one_update", counting)
    return made


def kill_at(monkeypatch, update):
    """Let training end like a killed process before an update, once."""
    one_update = TrainingRun.one_update

    def killed(self):
        if self.update == update:
            monkeypatch.setattr(TrainingRun, "one_update", one_update)
            raise KeyboardInterrupt
        one_update(self)

    monkeypatch.setattr(TrainingRun, "one_update", killed)


# -- plans as plain values -------------------------------------------------------------


def test_plans_of_every_kind_are_tried_here():
    assert {type(plan) for plan in PLANS} == set(get_args(Observation))


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_comes_back_from_a_line_of_text(plan):
    again = restored(json.loads(json.dumps(described(plan), allow_nan=False)))
    assert again == plan
    assert type(again) is type(plan)
    assert digest(again) == digest(plan)
    assert len({plan, again}) == 1


def test_what_stands_in_a_record_leaves_defaults_out():
    assert described(Accuracy(of=A)) == {
        "kind": "Accuracy",
        "of": {
            "kind": "Trained",
            "data": DATA,
            "training": {"kind": "Training", "network": MLP, "batch_size": 20, "seed": 1},
            "budget": {"kind": "Budget", "epochs": 1},
        },
    }


def test_digests_are_what_records_on_disk_hold():
    assert digest(net()) == "7f2a57e0b75ef7a0"
    assert digest(PLANS[5]) == "afb27e69386a1d0f"


def test_a_digest_does_not_depend_on_defaults_or_on_fields_to_come(monkeypatch):
    explicit = Measured(of=B, measures=("lambda_max",), num_samples=1000, seed=0)
    assert digest(explicit) == digest(PLANS[2])
    later = dataclasses.make_dataclass(
        "Later", [("epochs", float), ("stop_early", bool, dataclasses.field(default=False))]
    )
    monkeypatch.setitem(serialisation._NAMES, later, "Budget")
    assert digest(later(2.0)) == digest(StoppingCriteria(epochs=2.0))
    assert digest(later(2.0, stop_early=True)) != digest(StoppingCriteria(epochs=2.0))


def test_plans_that_differ_anywhere_have_digests_that_differ():
    others = [
        replace(PLANS[5], arc=True),
        replace(PLANS[5], first=B, second=A),
        replace(PLANS[5], first=replace(A, data="digits[60]")),
        replace(PLANS[5], first=net(seed=1, momentum=0.8)),
        replace(PLANS[5], first=net(2.0, seed=1)),
        replace(PLANS[5], first=net(seed=1, start=B)),
        replace(PLANS[5], first=net(seed=1, until_loss_of=B)),
    ]
    digests = [digest(plan) for plan in (*PLANS, *others)]
    assert len(set(digests)) == len(PLANS) + len(others)
    assert all(re.fullmatch("[0-9a-f]{16}", number) for number in digests)


def test_equal_plans_have_equal_digests():
    assert net(2) == net(2.0)
    assert digest(net(2)) == digest(net(2.0))
    line = json.dumps(described(net(2.0, learning_rate=1.0)))
    assert line == json.dumps(described(net(2, learning_rate=1)))
    assert ".0" not in line
    assert digest(net(2.5)) != digest(net(2))


def test_an_unknown_kind_is_refused_in_one_line():
    for plain in ({"kind": "Smelled", "of": None}, {"of": None}):
        with pytest.raises(ValueError, match=r"one of Accuracy, .*; got .*\. Use the ver"):
            restored(plain)
    nested = described(PLANS[0])
    nested["of"]["training"]["kind"] = "Dressage"
    with pytest.raises(ValueError, match="got 'Dressage'") as caught:
        restored(nested)
    assert "\n" not in str(caught.value)


# -- which network it is ---------------------------------------------------------------

NETWORKS = [
    net(),
    net(2.0),
    net(seed=1),
    net(batch_size=30),
    net(network="F1"),
    net(learning_rate=0.01),
    net(start=A),
    net(start=B),
    net(until_loss_of=A),
    replace(net(), data="digits[70,test=40]"),
    replace(net(), budget=StoppingCriteria(updates=3)),
]


def test_every_network_has_a_file_of_its_own_with_a_plain_name():
    files = [trained.file for trained in NETWORKS]
    assert len(set(files)) == len(files)
    for trained in NETWORKS:
        assert re.fullmatch(r"[\w-]+(\.\d+)?[\w-]*\.pt", trained.file)
        assert trained.file.endswith(f"{digest(trained)}.pt")
        assert f"-s{trained.training.seed}-" in trained.file
        assert f"-b{trained.training.batch_size}-" in trained.file
        assert ("-e1-" in trained.file) == (trained.budget.epochs == 1)
        assert ("-warm-" in trained.file) == (trained.start is not None)
        assert ("-matched-" in trained.file) == (trained.until_loss_of is not None)
    assert "-e2.5-" in net(2.5).file


def test_moments_of_one_run_differ_in_their_epochs_alone():
    assert net().run == net(2.0).run == net(0.5).run
    assert len({trained.run for trained in NETWORKS}) == len(NETWORKS) - 1
    assert replace(net(), budget=StoppingCriteria(epochs=1.0, patience=2)).run != net().run


def test_a_network_is_told_in_a_line():
    text = str(net(2.5, seed=3))
    assert text == f"{MLP} on {DATA}, batch_size 20, seed 3, 2.5 epochs"
    assert str(replace(net(), budget=StoppingCriteria(updates=3))).endswith("by updates")


def test_stages_hold_what_later_ones_need():
    warm = net(start=A)
    matched = net(seed=5, until_loss_of=warm)
    late, other = replace(A, budget=StoppingCriteria(epochs=3.0)), net(seed=7)
    stages = in_order([matched, late, other])
    found = [{frozenset(run) for run in stage} for stage in stages]
    assert found == [
        {frozenset({A, late}), frozenset({other})},
        {frozenset({warm})},
        {frozenset({matched})},
    ]
    assert sum(len(run) for stage in stages for run in stage) == 5


def test_what_is_wanted_twice_is_trained_once():
    assert in_order([A, A, net(seed=1)]) == [[[A]]]


# -- having it trained -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "momentum", "augmentation": "keskar"},
        {"network": "normalised", "batch_size": 30},
    ],
    ids=["adam", "draws", "batchnorm"],
)
def test_moments_have_the_bits_of_runs_that_ended_there(
    bench, tmp_path, monkeypatch, changes
):
    monkeypatch.setitem(networks.NETWORKS, "normalised", networks.Network(normalised))
    moments = [net(epochs, **changes) for epochs in (2.0, 0.5, 1.0)]
    bench.train_missing(moments)
    for i, moment in enumerate(moments):
        expected = directly(moment, tmp_path / f"direct-{i}.pt")
        assert_same_bits(checkpoint.load(bench.path(moment)), expected)
    assert not list(tmp_path.glob("*.copy"))


def test_moments_cost_one_run(bench, counted):
    moments = [net(epochs) for epochs in (1.0, 2.0, 3.0)]
    bench.train_missing(moments)
    assert counted == list(range(9))
    bench.train_missing(moments)
    assert len(counted) == 9
    assert all(bench.has(moment) for moment in moments)
    assert not bench.has(net(4.0))
    bench.train_missing([*moments, net(4.0)])
    assert counted[9:] == [9, 10, 11]


def test_an_earlier_moment_that_nobody_asked_for_is_carried_on(bench, tmp_path, counted):
    bench.train_missing([net(1.0), net(2.0)])
    bench.train_missing([net(2.0, seed=1)])  # of another run
    del counted[:]
    bench.train_missing([net(1.0), net(3.0)])
    assert counted == [6, 7, 8]
    expected = directly(net(3.0), tmp_path / "direct.pt")
    assert_same_bits(checkpoint.load(bench.path(net(3.0))), expected)
    bench.train_missing([net(0.5)])  # later moments are no beginning
    assert updates_of(bench, net(0.5)) == 2


def test_a_budget_of_updates_is_a_moment_too(bench):
    trained = replace(net(), budget=StoppingCriteria(updates=4))
    bench.train_missing([trained])
    assert updates_of(bench, trained) == 4


def test_a_run_of_counted_updates_is_shared_with_nobody(bench):
    by_updates = replace(net(), budget=StoppingCriteria(updates=5))
    capped = replace(net(), budget=StoppingCriteria(epochs=1.0, updates=5))
    longer = replace(net(), budget=StoppingCriteria(epochs=2.0, updates=5))
    assert len({one.run for one in (net(), by_updates, capped, longer)}) == 4
    (stage,) = in_order([capped, by_updates, net(), longer])
    assert sorted(map(len, stage)) == [1, 1, 1, 1]
    for run in stage:
        bench.train_missing(run)
    made = [updates_of(bench, one) for one in (net(), by_updates, capped, longer)]
    assert made == [3, 5, 3, 5]


def test_a_moment_begun_as_a_copy_is_unfinished_until_it_is_trained(bench, monkeypatch):
    monkeypatch.setattr(lab_run, "_SAVE_EVERY", math.inf)
    kill_at(monkeypatch, 3)  # the first update of the second moment
    with pytest.raises(KeyboardInterrupt):
        bench.train_missing([net(1.0), net(2.0)])
    begun = checkpoint.load(bench.path(net(2.0))).training
    assert (begun["updates"], begun["finished"]) == (3, False)
    assert bench.has(net(1.0))
    assert not bench.has(net(2.0))


SAVED, NOT_SAVED = -1.0, math.inf  # seconds of work that a kill may cost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "save_every"),
    [
        (2, SAVED),
        (2, NOT_SAVED),
        (3, SAVED),
        (4, SAVED),
        (4, NOT_SAVED),
    ],
)
def test_a_run_that_was_killed_carries_on(bench, tmp_path, monkeypatch, update, save_every):
    monkeypatch.setattr(lab_run, "_SAVE_EVERY", save_every)
    moments = [net(1.0), net(2.0)]
    kill_at(monkeypatch, update)
    with pytest.raises(KeyboardInterrupt):
        bench.train_missing(moments)
    assert not bench.has(moments[1])
    bench.train_missing(moments)
    for i, moment in enumerate(moments):
        expected = directly(moment, tmp_path / f"direct-{i}.pt")
        assert_same_bits(checkpoint.load(bench.path(moment)), expected)


def test_half_a_file_is_not_a_network(bench):
    bench.train_missing([A])
    assert bench.has(A)
    content = bench.path(A).read_bytes()
    bench.path(A).write_bytes(content[: len(content) // 2])
    assert not bench.has(A)


def test_a_run_that_diverged_leaves_a_note(bench):
    with pytest.raises(DivergedError, match=r"finite; got inf in update 2 .*Lower it"):
        directly(wild(2.0), bench.folder / "direct.pt")
    first, last = wild(1 / 3), wild(2.0)
    bench.train_missing([first, last])
    assert bench.diverged(first) is None
    assert updates_of(bench, first) == 1
    assert "finite; got inf in update 2" in bench.diverged(last)
    assert not bench.path(last).exists()
    assert bench.has(first)
    assert bench.has(last)


def test_what_has_diverged_is_not_tried_again(bench, counted):
    bench.train_missing([wild(2.0)])
    made = len(counted)
    assert made > 0
    bench.train_missing([wild(2.0)])
    assert len(counted) == made


def test_what_rests_on_a_diverged_network_cannot_begin(bench, counted):
    lost = wild(2.0)
    bench.train_missing([lost])
    made = len(counted)
    for dependent in (net(start=lost), net(until_loss_of=lost)):
        bench.train_missing([dependent])
        assert bench.diverged(dependent).endswith("diverged, so this one cannot begin.")
        assert not bench.path(dependent).exists()
    assert len(counted) == made


def test_other_errors_are_no_divergence(bench):
    with pytest.raises(ValueError, match="batch_size"):
        bench.train_missing([net(batch_size=61)])
    assert bench.diverged(net(batch_size=61)) is None
    assert not bench.has(net(batch_size=61))


def test_training_stops_at_the_loss_of_another_network(bench, tmp_path):
    twin = net(4.0, learning_rate=0.01)
    matched = net(50.0, seed=1, batch_size=30, learning_rate=0.01, until_loss_of=twin)
    bench.train_missing([twin])
    bench.train_missing([matched])
    loss = checkpoint.load(bench.path(twin)).training["metrics"]["train_loss_batch"]
    found = checkpoint.load(bench.path(matched)).training
    epochs = found["updates"] / 2
    assert 1 < epochs < 50
    assert found["metrics"]["train_loss_batch"] <= loss
    before = replace(
        matched, budget=StoppingCriteria(epochs=epochs - 1), until_loss_of=None
    )
    earlier = directly(before, tmp_path / "before.pt")
    assert earlier.training["metrics"]["train_loss_batch"] > loss


def test_a_network_has_its_own_loss_as_soon_as_it_has_it(bench):
    matched = net(9.0, until_loss_of=net(2.0))
    for stage in in_order([matched]):
        for run in stage:
            bench.train_missing(run)
    assert updates_of(bench, matched) == updates_of(bench, net(2.0)) == 6


def test_training_starts_from_the_parameters_of_another_network(bench, tmp_path):
    still = {"optimizer": "sgd", "learning_rate": 1e-30}
    warm = net(seed=3, start=A, **still)
    bench.train_missing([A])
    bench.train_missing([warm])
    start, found = (checkpoint.load(bench.path(one)) for one in (A, warm))
    torch.testing.assert_close(found.state_dict, start.state_dict, rtol=0, atol=0)
    cold = directly(net(seed=3, **still), tmp_path / "cold.pt")
    assert found.start["sha256"] != cold.start["sha256"]


def test_moments_of_a_warm_start_are_one_run(bench, counted):
    bench.train_missing([A])
    moments = [net(epochs, seed=3, start=A) for epochs in (1.0, 2.0)]
    bench.train_missing(moments)
    assert counted == [0, 1, 2, 0, 1, 2, 3, 4, 5]


def test_a_folder_that_was_moved_can_be_added_to(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    moments = [net(epochs, seed=3, start=A) for epochs in (1.0, 2.0)]
    Bench(folder=before).train_missing([A])
    Bench(folder=before).train_missing(moments[:1])
    before.rename(after)
    Bench(folder=after).train_missing(moments)
    assert updates_of(Bench(folder=after), moments[1]) == 6


# -- the runner ----------------------------------------------------------------------

LOOK, LOOK_AT_B = Accuracy(of=A), Accuracy(of=B)
SHARP = Measured(of=A, measures=("lambda_max",), num_samples=50)
LINE = InterpolationRun(first=A, second=B, num_samples=None)


def of_the_numbers(found, *others):
    """Without times; a file that is written again holds them too."""
    if isinstance(found, dict):
        rest = {k: v for k, v in found.items() if k not in ("seconds", *others)}
        return {k: of_the_numbers(v) for k, v in rest.items()}
    return [of_the_numbers(item) for item in found] if isinstance(found, list) else found


def test_a_plan_is_carried_out(runner):
    stages, missing = runner.lacking([LOOK, LINE, LOOK])
    assert [{frozenset(run) for run in stage} for stage in stages] == [
        {frozenset({A}), frozenset({B})}
    ]
    assert missing == [LOOK, LINE]
    threads = torch.get_num_threads()
    store = carried_out(runner, [LOOK, LINE, LOOK])
    assert torch.get_num_threads() == threads
    assert len(store) == 2
    assert LOOK in store
    assert LOOK_AT_B not in store
    assert store.get(LOOK_AT_B) is None
    assert not store.diverged(LOOK_AT_B)
    about = checkpoint.load(runner.bench.path(A)).training
    assert store.get(LOOK)["metrics"] == about["metrics"]
    assert runner.lacking([LOOK, LINE]) == ([], [])


def test_nothing_is_done_twice(runner, counted, monkeypatch):
    carried_out(runner, [LOOK, SHARP])
    before, made = runner.records.read_bytes(), len(counted)
    monkeypatch.setattr(Accuracy, "found", lambda *a: pytest.fail("looked at again"))
    store = carried_out(runner, [LOOK, SHARP])
    assert len(store) == 2
    assert runner.records.read_bytes() == before
    assert len(counted) == made == 3


def test_new_observations_are_added_to_what_is_known(runner, counted):
    first = carried_out(runner, [LOOK])
    before = runner.records.read_bytes()
    assert runner.lacking([LOOK, SHARP]) == ([], [SHARP])
    second = carried_out(runner, [SHARP, LOOK])
    assert runner.records.read_bytes().startswith(before)
    assert len(counted) == 3
    assert second.get(LOOK) == first.get(LOOK)
    assert second.get(SHARP)["lambda_max"]["eigenvalues"][0] > 0


def test_records_outlive_their_networks(runner, counted):
    store = carried_out(runner, [LOOK])
    runner.bench.path(A).unlink()
    assert runner.lacking([LOOK]) == ([], [])
    assert carried_out(runner, [LOOK]).get(LOOK) == store.get(LOOK)
    assert len(counted) == 3


def test_what_was_found_before_a_kill_is_kept(runner, monkeypatch):
    found = Accuracy.found
    monkeypatch.setattr(
        Accuracy, "found", lambda self, b: found(self, b) if self == LOOK else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        carried_out(runner, [LOOK, LOOK_AT_B])
    monkeypatch.undo()
    store = runner.store()
    assert LOOK in store
    assert LOOK_AT_B not in store
    assert len(carried_out(runner, [LOOK, LOOK_AT_B])) == 2


def test_a_torn_line_is_looked_at_again(runner):
    carried_out(runner, [LOOK, LOOK_AT_B])
    whole = runner.records.read_bytes()
    runner.records.write_bytes(whole[:-40])
    assert runner.lacking([LOOK, LOOK_AT_B]) == ([], [LOOK_AT_B])
    assert len(carried_out(runner, [LOOK, LOOK_AT_B])) == 2


def test_other_records_in_the_file_are_passed_over(runner):
    carried_out(runner, [LOOK])
    with runner.records.open("a") as file:
        file.write('{"schema": 2, "kind": "findings", "findings": []}\n')
    assert len(runner.store()) == 1


def test_networks_are_trained_after_those_they_need(runner):
    warm = net(seed=3, start=A)
    matched = net(9.0, seed=4, until_loss_of=warm)
    looks = [Accuracy(of=one) for one in (matched, warm)]
    store = carried_out(runner, looks)
    losses = [store.get(look)["metrics"]["train_loss_batch"] for look in looks]
    assert losses[0] <= losses[1]
    assert runner.bench.has(A)
    assert Accuracy(of=A) not in store


def test_a_diverged_network_is_recorded_as_diverged(runner, counted):
    lost = wild(2.0)
    looks = [
        Accuracy(of=lost),
        Measured(of=lost, measures=("lambda_max",), num_samples=50),
        InterpolationRun(first=A, second=lost, num_samples=None),
        Accuracy(of=net(start=lost)),
    ]
    store = carried_out(runner, [*looks, LOOK])
    made = len(counted)
    for look in looks:
        assert look in store
        assert store.diverged(look)
        assert store.get(look) is None
    assert not store.diverged(LOOK)
    assert store.get(LOOK) is not None
    records = {record["digest"]: record for record in read_records(runner.records)}
    assert "finite; got inf" in records[digest(looks[2])]["diverged"]
    assert records[digest(looks[0])]["found"] is None
    assert runner.lacking([*looks, LOOK]) == ([], [])
    assert len(carried_out(runner, looks)) == 5
    assert len(counted) == made


def test_a_record_tells_the_plan_and_the_circumstances(runner):
    carried_out(runner, [LINE])
    (record,) = read_records(runner.records)
    assert restored(record["observation"]) == LINE
    assert record["digest"] == digest(LINE)
    assert (record["kind"], record["device"], record["diverged"]) == (
        "observation",
        "cpu",
        None,
    )
    assert record["threads"] >= 1
    assert record["seconds"] >= 0
    assert record["environment"]["torch"] == torch.__version__


def test_the_same_machine_finds_the_same_bits_again(tmp_path):
    followed = TrackingRun(
        data=DATA, training=A.training, budget=A.budget, num_samples=60, every=2
    )
    looks = [LOOK, SHARP, LINE, followed]
    here, there = (Runner(folder=tmp_path / name, jobs=1) for name in ("a", "b"))
    carried_out(here, looks)
    before, records = here.records.read_bytes(), read_records(here.records)
    assert len(records) == len(looks)
    for record in records:
        with_networks, from_nothing = here.again(record), there.again(record)
        assert of_the_numbers(with_networks["found"]) == of_the_numbers(record["found"])
        ours, theirs = (
            of_the_numbers(r["found"], "sha256") for r in (from_nothing, record)
        )
        assert ours == theirs
        assert with_networks["digest"] == from_nothing["digest"] == record["digest"]
    assert here.records.read_bytes() == before
    assert not there.records.exists()


def test_what_diverged_diverges_again(runner, tmp_path):
    carried_out(runner, [Accuracy(of=wild(2.0))])
    (record,) = read_records(runner.records)
    again = Runner(folder=tmp_path / "other").again(record)
    assert again["diverged"] == record["diverged"] is not None


def test_an_observation_is_made_again_with_as_many_threads(runner):
    carried_out(runner, [LOOK])
    (record,) = read_records(runner.records)
    record["threads"] = torch.get_num_threads() + 1
    assert runner.again(record)["threads"] == record["threads"]


def test_what_is_no_record_of_an_observation_is_refused(runner):
    for record in ({"kind": "findings"}, {}):
        with pytest.raises(ValueError, match="of an observation; got kind"):
            runner.again(record)
    unknown = {"kind": "observation", "observation": {"kind": "Smelled"}}
    with pytest.raises(ValueError, match="got 'Smelled'") as caught:
        runner.again(unknown)
    assert "\n" not in str(caught.value)


def test_an_empty_plan_is_carried_out_at_once(runner):
    assert len(carried_out(runner, [])) == 0
    assert runner.lacking([]) == ([], [])
