"""A moment of a run that ends as soon as its training accuracy is reached."""

from dataclasses import replace

import pytest

from sharpness import checkpoint
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce.model_spec import Bench, ModelSpec

TRAINING = Training(network="MLP?width=8&out_features=10", batch_size=64, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


def at(epochs, accuracy=None):
    budget = StoppingCriteria(epochs=epochs, until_accuracy=accuracy)
    return ModelSpec(data="digits", training=TRAINING, budget=budget)


def about(bench, moment):
    return checkpoint.load(bench.path(moment)).training


def test_it_is_the_first_epoch_whose_accuracy_suffices(folder):
    bench, wanted = Bench(folder=folder), 0.5
    fitted = at(12, wanted)
    bench.train_missing([at(2), fitted, at(12)])
    first = about(bench, fitted)["epoch"]
    reached = []
    for epoch in range(1, first + 1):
        moment = at(epoch)
        bench.train_missing([moment])
        reached.append(about(bench, moment)["metrics"]["train_accuracy_batch"] >= wanted)
    assert 2 < first < 12
    assert reached == [False] * (first - 1) + [True]


def test_the_longer_moment_carries_on_from_it_to_the_same_bits(folder, tmp_path):
    bench, alone = Bench(folder=folder), Bench(folder=tmp_path)
    bench.train_missing([at(12, 0.5), at(12)])
    alone.train_missing([at(12)])
    ours, theirs = (checkpoint.load(b.path(at(12))).state_dict for b in (bench, alone))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_an_earlier_moment_does_not_carry_on_from_it(tmp_path):
    bench = Bench(folder=tmp_path)
    bench.train_missing([at(12, 0.5), at(1)])
    assert about(bench, at(1))["epoch"] == 1
    assert about(bench, at(12, 0.5))["epoch"] > 1


def test_they_are_moments_of_one_run():
    assert at(12, 0.5).run == at(5).run
    assert at(12, 0.5).file != at(12).file
    assert replace(at(12), budget=StoppingCriteria(epochs=12)).file == at(12).file


@pytest.mark.parametrize("accuracy", [0, -0.1, 1.1, float("nan")])
def test_an_accuracy_that_cannot_be_is_refused(accuracy):
    with pytest.raises(ValueError, match="until_accuracy"):
        StoppingCriteria(epochs=1, until_accuracy=accuracy)
