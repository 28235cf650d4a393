import itertools

import pytest
import torch

from sharpness import checkpoint
from sharpness.lab import data
from sharpness.lab.training import (
    Budget,
    Training,
    _Run,
    default_batch_sizes,
    train,
)

SMALL = Training(network="F1", batch_size=256, seed=3)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def state(path):
    return checkpoint.load(path).state_dict


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_both_batch_sizes_leave_from_the_same_point(digits, tmp_path):
    other = Training(network="F1", batch_size=64, seed=3)
    a = train(SMALL, Budget(epochs=1), digits, tmp_path / "a.pt")
    b = train(other, Budget(epochs=1), digits, tmp_path / "b.pt")
    third = Training(network="F1", batch_size=256, seed=4)
    c = train(third, Budget(epochs=1), digits, tmp_path / "c.pt")
    assert a.start["sha256"] == b.start["sha256"] != c.start["sha256"]
    assert not equal(a.state_dict, b.state_dict)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_killed_run_ends_with_the_same_bits(digits, tmp_path, monkeypatch, suffix):
    whole = train(SMALL, Budget(epochs=3), digits, tmp_path / f"whole{suffix}")
    killed = tmp_path / f"killed{suffix}"

    def kill(epoch, loss):
        if epoch == 2:
            raise KeyboardInterrupt

    # Save after every epoch; the run dies before it saves the second.
    monkeypatch.setattr("sharpness.lab.training._SAVE_EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, Budget(epochs=3), digits, killed, on_epoch=kill)
    left = checkpoint.load(killed).training
    assert (left["epoch"], left["finished"]) == (1, False)
    train(SMALL, Budget(epochs=3), digits, killed)
    assert equal(state(killed), whole.state_dict)
    assert checkpoint.load(killed).training["history"] == whole.training["history"]


def test_dropout_too_is_the_same_after_a_kill(tmp_path, monkeypatch):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    tiny = data.Dataset(
        name="tiny",
        train=(images, labels),
        test=(images, labels),
        num_classes=10,
        source="",
    )
    run = Training(network="C1", batch_size=10)
    whole = train(run, Budget(epochs=2), tiny, tmp_path / "whole.pt")
    train(run, Budget(epochs=1), tiny, tmp_path / "half.pt")
    torch.rand(7)  # the global generator stands elsewhere now
    half = train(run, Budget(epochs=2), tiny, tmp_path / "half.pt")
    assert equal(half.state_dict, whole.state_dict)


def test_a_finished_run_is_not_trained_again(digits, tmp_path):
    path = tmp_path / "a.pt"
    train(SMALL, Budget(epochs=1), digits, path)
    before = path.read_bytes()
    epochs = []
    train(SMALL, Budget(epochs=1), digits, path, on_epoch=lambda e, _: epochs.append(e))
    assert epochs == []
    assert path.read_bytes() == before


def test_training_stops_after_the_first_epoch_at_or_below_the_loss(digits, tmp_path):
    path = tmp_path / "a.pt"
    budget = Budget(epochs=50, until_loss=0.03)
    trained = train(SMALL, budget, digits, path).training
    assert trained["metrics"]["train_loss_batch"] <= 0.03
    earlier = train(SMALL, Budget(epochs=trained["epoch"] - 1), digits, tmp_path / "b.pt")
    assert earlier.training["metrics"]["train_loss_batch"] > 0.03


def test_a_checkpoint_of_another_training_is_not_overwritten(digits, tmp_path):
    path = tmp_path / "a.pt"
    train(SMALL, Budget(epochs=1), digits, path)
    before = path.read_bytes()
    other = Training(network="F1", batch_size=256, seed=3, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"got learning_rate=0\.001 \(asked for 0\.5\)"):
        train(other, Budget(epochs=1), digits, path)
    assert path.read_bytes() == before


def test_every_sample_is_seen_once_an_epoch_and_the_order_changes(digits, tmp_path):
    run = _Run(SMALL, digits, tmp_path / "a.pt", torch.device("cpu"))
    seen = [[], []]
    run._update = lambda index: seen[run.epoch].append(index) or torch.zeros(())
    for _ in range(2):
        run.epoch_of_updates()
    first, second = (torch.cat(batches) for batches in seen)
    everything = torch.arange(len(digits.train[0]))
    assert torch.equal(first.sort().values, everything)
    assert torch.equal(second.sort().values, everything)
    assert not torch.equal(first, second)


def test_the_loop_is_keras_adam_on_the_mean_cross_entropy(digits, tmp_path):
    """Two epochs by hand, with the unfused optimizer, give the same losses."""
    run = _Run(SMALL, digits, tmp_path / "a.pt", torch.device("cpu"))
    hand = _Run(SMALL, digits, tmp_path / "b.pt", torch.device("cpu"))
    adam = torch.optim.Adam(
        hand.model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, foreach=False
    )
    x, y = digits.train
    orders = []
    update = run._update
    run._update = lambda index: orders.append(index) or update(index)
    for _ in range(2):
        run.epoch_of_updates()
    hand.model.train()
    losses = []
    for index in orders:
        adam.zero_grad()
        logits = hand.model(x[index]).log_softmax(1)
        loss = -logits[torch.arange(len(index)), y[index]].mean()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()) * len(index))
    half = len(orders) // 2
    expected = [sum(losses[:half]) / len(x), sum(losses[half:]) / len(x)]
    assert run.history == pytest.approx(expected, rel=1e-4)


def test_metrics_are_those_of_the_trained_network(digits, tmp_path):
    trained = train(SMALL, Budget(epochs=2), digits, tmp_path / "a.pt")
    model = _Run(SMALL, digits, tmp_path / "b.pt", torch.device("cpu")).model
    model.load_state_dict(trained.state_dict)
    metrics = trained.training["metrics"]
    x, y = digits.test
    for mode, training_mode in (("running", False), ("batch", True)):
        model.train(training_mode)
        with torch.no_grad():
            share = (model(x).argmax(1) == y).double().mean().item()
        assert metrics[f"test_accuracy_{mode}"] == pytest.approx(share, abs=1e-9)
        model.load_state_dict(trained.state_dict)


def test_default_batch_sizes_shrink_with_the_training_set():
    assert default_batch_sizes(60_000) == (256, 6000)
    assert default_batch_sizes(10_000) == (256, 1000)
    assert default_batch_sizes(4000) == (32, 400)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: Training(network="F1", batch_size=1), "got 1"),
        (lambda: Training(network="F1", batch_size=8, learning_rate=0.0), "got 0.0"),
        (lambda: Budget(epochs=0), "got 0"),
    ],
)
def test_impossible_trainings_are_refused(make, got):
    with pytest.raises(ValueError, match=got):
        make()


def test_a_diverging_run_says_so_and_leaves_no_checkpoint(digits, tmp_path):
    wild = Training(network="F1", batch_size=256, learning_rate=float("1e38"))
    with pytest.raises(ValueError, match="`learning_rate` must keep the loss finite"):
        train(wild, Budget(epochs=5), digits, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_epochs_of_different_seeds_have_different_orders():
    from sharpness.lab.training import _epoch_seed

    seeds = {_epoch_seed(s, e) for s, e in itertools.product(range(20), range(20))}
    assert len(seeds) == 400
