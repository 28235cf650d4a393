"""A training followed by a tracker: what stands in its records."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.training import RUN, bits, tiny

from sharpness import read_records, train
from sharpness.lab.data import Dataset
from sharpness.lab.following import Following
from sharpness.lab.run import train as train_network
from sharpness.lab.training import StoppingCriteria, Training


def points(folder):
    records = read_records(folder / "records.jsonl")
    return [r["point"] for r in records if r["kind"] == "tracking"]


def test_a_point_has_the_rate_of_the_update_that_follows(tmp_path):
    """Warm-up, scaling and a drop in closed form: 200 samples, batches of 50."""
    run = Training(
        network="MLP", batch_size=50, optimizer="sgd", learning_rate=2.0**-8,
        scaling="linear", base_batch_size=1,
        schedule="decay?drops=(2,)&factor=10&warmup=1&warmup_start=0.5",
    )  # fmt: skip
    path, images = tmp_path / "a.pt", tiny(200)
    follow = Following(every=2, num_samples=20).of(images, path, 50)
    train_network(run, StoppingCriteria(epochs=3), images, path, on_update=follow)
    full = 50 * 2.0**-8
    expected = {0: full / 2, 2: 0.75 * full, 4: full, 6: full, 8: full / 10, 10: full / 10,
                12: full / 10}  # fmt: skip
    found = {point["step"]: point["learning_rate"] for point in points(tmp_path)}
    assert found == pytest.approx(expected)
    for point in points(tmp_path):
        threshold = 2 / expected[point["step"]]
        assert point["thresholds"]["lambda_max"] == pytest.approx(threshold)


def test_a_run_that_is_followed_ends_with_the_same_bits(tmp_path):
    images = tiny()
    budget = StoppingCriteria(updates=5)
    plain = train_network(RUN, budget, images, tmp_path / "plain.pt")
    path = tmp_path / "followed.pt"
    follow = Following(every=2, num_samples=20).of(images, path, RUN.batch_size)
    followed = train_network(RUN, budget, images, path, on_update=follow)
    assert bits(followed) == bits(plain)
    assert [point["step"] for point in points(tmp_path)] == [0, 2, 4]
    assert all(point["lambda_max"]["value"] > 0 for point in points(tmp_path))


def test_batchnorm_takes_the_statistics_of_the_trainings_batches(tmp_path):
    run, images = replace(RUN, network="ResNet-8"), tiny()
    path = tmp_path / "a.pt"
    follow = Following(num_samples=20).of(images, path, 7)
    train_network(run, StoppingCriteria(updates=1), images, path, on_update=follow)
    (point,) = points(tmp_path)
    assert (point["batchnorm"], point["batchnorm_batch"]) == ("batch", 7)


def test_a_class_too_rare_to_balance_is_no_obstacle(tmp_path):
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    part = x, (torch.arange(60) == 7).long()
    rare = Dataset(name="rare", train=part, test=part, num_classes=2, source="here")
    follow = Following(num_samples=30).of(rare, tmp_path / "a.pt", RUN.batch_size)
    train_network(
        RUN, StoppingCriteria(updates=1), rare, tmp_path / "a.pt", on_update=follow
    )
    assert math.isfinite(points(tmp_path)[0]["loss"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--track", "sharp"], "`measures` must be of lambda_max.*got 'sharp'"),
        (["--track", ","], "`measures` must be at least one"),
        (["--track", "phi", "--track-every", "0"], "`every` must be at least 1; got 0"),
        (["--track", "phi", "--track-every", "-3"], "`every` must be at least 1; got -3"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_training(
    tmp_path, capsys, options, says
):
    call = ["MLP", "--data", "digits", "--updates", "2", "--output", str(tmp_path / "runs")]
    assert train.main([*call, *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(says, err)
    assert not (tmp_path / "runs").exists()


def test_the_command_writes_points_into_the_records(tmp_path, capsys):
    call = ["MLP", "--data", "digits", "--updates", "4", "--batch-size", "64"]
    call += ["--output", str(tmp_path), "--track", "lambda_max,phi", "--track-every", "2"]
    assert train.main(call) == 0
    capsys.readouterr()
    assert [point["step"] for point in points(tmp_path)] == [0, 2, 4]
    assert all(point["phi"]["value"] >= 0 for point in points(tmp_path))
