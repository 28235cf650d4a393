"""The training loop: its updates, when it stops, what it saves and how it carries on."""

import copy
import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import FOUR, NETWORK, RUN, bits, generators, kill_at, tiny
from torch import nn

from sharpness import checkpoint
from sharpness.lab import data, networks
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training, default_batch_sizes

SMALL = Training(network="F1", batch_size=256, seed=3)


@pytest.fixture(scope="module")
def images():
    return tiny()


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture
def saving_always(monkeypatch):
    monkeypatch.setattr("sharpness.lab.run._SAVE_EVERY", -1.0)


def finite(state):
    return all(bool(t.isfinite().all()) for t in state.values())


class Watched:
    """An `on_update` that keeps the start, and what went into every update."""

    def __init__(self):
        self.updates, self.batches, self.rates, self._inputs = [], [], [], []

    def __call__(self, update, model, optimizer):
        if not self.updates:
            self.start = copy.deepcopy(model)
            self.optimizer_at_start = copy.deepcopy(optimizer.state_dict())
            model.register_forward_pre_hook(lambda _, x: self._inputs.append(x[0].clone()))
        else:
            self.batches.append(self._inputs[0])
        self.rates.append(optimizer.param_groups[0]["lr"])  # of the update that follows
        self.updates.append(update)
        self._inputs = []

    @property
    def indices(self):
        return [(x[:, 0, 0, 0] * 64).round().long() for x in self.batches]


# -- what an update is -------------------------------------------------------------------


def test_both_batch_sizes_leave_from_the_same_point(digits, tmp_path):
    small, large, other = (
        train(run, StoppingCriteria(updates=2), digits, tmp_path / f"{i}.pt")
        for i, run in enumerate(
            [SMALL, replace(SMALL, batch_size=64), replace(SMALL, seed=4)]
        )
    )
    assert small.start["sha256"] == large.start["sha256"] != other.start["sha256"]
    assert bits(small) != bits(large)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(images, tmp_path):
    orders = []
    for i, seed in enumerate([3, 3, 4]):
        watched = Watched()
        path = tmp_path / f"{i}.pt"
        saved = train(replace(RUN, seed=seed), FOUR, images, path, on_update=watched)
        orders.append((torch.cat(watched.indices).tolist(), bits(saved)))
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[2][0]


def test_every_sample_is_seen_once_an_epoch_and_the_order_changes(images, tmp_path):
    """Batches are cut from one stream, across the borders of epochs."""
    watched = Watched()
    train(RUN, FOUR, images, tmp_path / "a.pt", on_update=watched)
    assert [len(batch) for batch in watched.indices] == [16] * 10
    epochs = torch.cat(watched.indices).view(4, 40).tolist()
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def clip(parameters, longest):
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
    for p in parameters:
        p.grad *= min(1, longest / norm)


BY_HAND = {
    "adam": ({}, lambda p: torch.optim.Adam(p, 1e-3, (0.9, 0.999), 1e-8, foreach=False)),
    "decay": (
        {"weight_decay": 0.3, "learning_rate": 0.03},
        lambda p: torch.optim.Adam(p, 0.03, weight_decay=0.3, foreach=False),
    ),
    "sgd": (
        {"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": 0.2},
        lambda p: torch.optim.SGD(p, 0.5, foreach=False),
    ),
    "momentum": (
        {"optimizer": "momentum", "momentum": 0.5, "learning_rate": 0.1},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, foreach=False),
    ),
    "nesterov": (
        {"optimizer": "nesterov", "learning_rate": 0.1},
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=False),
    ),
    "adagrad": (
        {"optimizer": "adagrad", "learning_rate": 0.1},
        lambda p: torch.optim.Adagrad(p, 0.1, foreach=False),
    ),
    "scaled": (
        {"optimizer": "sgd", "scaling": "linear", "base_batch_size": 4,
         "learning_rate": 0.02},
        lambda p: torch.optim.SGD(p, 0.08, foreach=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loop_is_the_optimizer_on_the_mean_cross_entropy(images, tmp_path, name):
    """The same updates by hand, in float64 and unfused, have the same losses."""
    settings, make = BY_HAND[name]
    watched = Watched()
    run = replace(RUN, **settings)
    saved = train(run, FOUR, images, tmp_path / "a.pt", on_update=watched)
    model = watched.start.double()
    parameters = list(model.parameters())
    optimizer, losses = make(parameters), []
    for x, index in zip(watched.batches, watched.indices, strict=True):
        optimizer.zero_grad()
        logits = model(x.double()).log_softmax(1)
        loss = -logits[torch.arange(len(x)), images.train[1][index]].mean()
        loss.backward()
        if run.clip_norm is not None:
            clip(parameters, run.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert saved.progress["losses"].tolist() == pytest.approx(losses, rel=1e-4)
    ends = [0, 3, 5, 8, 10]
    means = [np.mean(losses[a:b]) for a, b in itertools.pairwise(ends)]
    assert saved.training["history"] == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "sizes", "rates"),
    [
        ("constant?warmup=1&warmup_start=0.5", [8] * 15,
         [0.5 + 0.1 * u for u in range(5)] + [1.0] * 10),
        ("decay?drops=(1,2)&factor=10", [8] * 15, [1.0] * 5 + [0.1] * 5 + [0.01] * 5),
        ("increase?drops=(1,2)&factor=2", [8] * 5 + [16] * 3 + [32], [1.0] * 9),
        ("hybrid?drops=(1,2)&factor=2", [8] * 5 + [16] * 5, [1.0] * 8 + [0.5] * 2),
    ],
)  # fmt: skip
def test_batches_and_rates_follow_the_schedule(images, tmp_path, schedule, sizes, rates):
    watched = Watched()
    run = replace(RUN, batch_size=8, optimizer="sgd", learning_rate=1.0, schedule=schedule)
    train(run, StoppingCriteria(epochs=3), images, tmp_path / "a.pt", on_update=watched)
    assert [len(batch) for batch in watched.batches] == sizes
    assert watched.rates[:-1] == pytest.approx(rates)


def test_callbacks_hear_of_every_update_and_every_epoch(images, tmp_path):
    watched, epochs = Watched(), []
    saved = train(RUN, FOUR, images, tmp_path / "a.pt", on_update=watched,
                  on_epoch=lambda epoch, loss: epochs.append((epoch, loss)))  # fmt: skip
    assert watched.updates == list(range(11))
    assert epochs == [(i + 1, loss) for i, loss in enumerate(saved.training["history"])]
    later = Watched()
    train(RUN, StoppingCriteria(updates=12), images, tmp_path / "a.pt", on_update=later)
    assert later.updates == [11, 12]


@pytest.mark.parametrize("settings", [{}, {"ghost_batch_size": 4}])
def test_metrics_are_those_of_the_trained_network(images, tmp_path, settings):
    run = replace(RUN, network="ResNet-8", **settings)
    saved = train(run, StoppingCriteria(updates=4), images, tmp_path / "a.pt")
    x, y = images.test
    for mode, training_mode in (("running", False), ("batch", True)):
        model = networks.build(saved.network).train(training_mode)
        model.load_state_dict(saved.state_dict)
        with torch.no_grad():
            logits = model(x)
        share = (logits.argmax(1) == y).double().mean().item()
        loss = -float(logits.double().log_softmax(1)[torch.arange(len(y)), y].mean())
        for part in ("train", "test"):
            metrics = saved.training["metrics"]
            assert metrics[f"{part}_accuracy_{mode}"] == pytest.approx(share, abs=1e-9)
            assert metrics[f"{part}_loss_{mode}"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
@pytest.mark.parametrize("remedy", ["none", "sam", "asam", "conservative", "adversarial"])
def test_a_constant_loss_moves_nothing(tmp_path, optimizer, remedy):
    """One sample of one class: the loss is 0 everywhere."""
    run = replace(RUN, batch_size=1, optimizer=optimizer, remedy=remedy)
    watched, budget = Watched(), StoppingCriteria(epochs=5, until_loss=0.0)
    path = tmp_path / "a.pt"
    saved = train(run, budget, tiny(1, 1), path, on_update=watched)
    assert saved.progress["losses"].tolist() == [0.0]
    start = watched.start.state_dict()
    assert all(torch.equal(start[name], t) for name, t in saved.state_dict.items())


def tokens():
    x = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))
    part = x, x.roll(-1, 1)
    return data.Dataset(name="t", train=part, test=part, num_classes=7, source="")


def numbers():
    x = torch.linspace(-1, 1, 24).view(12, 2)
    part = x, x.sum(1, keepdim=True)
    return data.Dataset(name="n", train=part, test=part, num_classes=None, source="")


@pytest.mark.parametrize(
    ("network", "dataset"), [("GPT?width=8&depth=1&heads=2", tokens), ("MLP", numbers)]
)
def test_tokens_and_numbers_are_learnt_too(tmp_path, network, dataset):
    run = Training(network=network, batch_size=4, learning_rate=0.01)
    saved = train(run, StoppingCriteria(epochs=20), dataset(), tmp_path / "a.pt")
    model = networks.build(saved.network)
    model.load_state_dict(saved.state_dict)
    x, y = dataset().train
    outputs = model(x).double()
    criterion = nn.MSELoss() if dataset is numbers else nn.CrossEntropyLoss()
    target = y.double() if dataset is numbers else y
    expected = float(criterion(outputs, target).detach())
    assert saved.training["metrics"]["train_loss_batch"] == pytest.approx(
        expected, rel=1e-5
    )
    assert expected < 0.7 * saved.training["history"][0]


# -- how long ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 12, 40])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_budget_of_epochs_is_so_many_epochs(images, tmp_path, batch_size, epochs):
    run, path = replace(RUN, batch_size=batch_size), tmp_path / "a.pt"
    saved = train(run, StoppingCriteria(epochs=epochs), images, path, keep_every=1).training
    assert abs(saved["updates"] - epochs * 40 / batch_size) <= 0.5
    kept = {p.name for p in tmp_path.glob("a-*")}
    assert (saved["epoch"], len(saved["history"])) == (epochs, epochs)
    assert kept == {f"a-epoch{i + 1}.pt" for i in range(epochs)}


@pytest.mark.parametrize(
    ("budget", "updates"),
    [
        (StoppingCriteria(updates=7), 7),
        (StoppingCriteria(updates=7, epochs=2), 5),
        (StoppingCriteria(updates=4, epochs=2.0), 4),
        (StoppingCriteria(epochs=0.4), 1),
        (StoppingCriteria(epochs=1e-9), 1),
    ],
)
def test_a_budget_ends_at_what_comes_first(images, tmp_path, budget, updates):
    saved = train(RUN, budget, images, tmp_path / "a.pt")
    assert saved.training["updates"] == len(saved.progress["losses"]) == updates


def test_training_stops_after_the_first_epoch_at_or_below_the_loss(images, tmp_path):
    run, path = replace(RUN, learning_rate=0.03), tmp_path / "a.pt"
    saved = train(
        run, StoppingCriteria(epochs=60, until_loss=1.2), images, path, keep_every=1
    )
    losses = [
        checkpoint.load(tmp_path / f"a-epoch{i + 1}.pt").training["metrics"][
            "train_loss_batch"
        ]
        for i in range(saved.training["epoch"])
    ]
    assert len(losses) > 2
    assert all(loss > 1.2 for loss in losses[:-1])
    assert saved.training["metrics"]["train_loss_batch"] == losses[-1] <= 1.2


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_run_that_no_longer_improves(images, tmp_path, patience):
    still = replace(RUN, batch_size=20, optimizer="sgd", learning_rate=1e-9)
    budget = StoppingCriteria(epochs=20, patience=patience)
    saved = train(still, budget, images, tmp_path / "still.pt")
    assert saved.training["epoch"] == 1 + patience
    # Falls for three epochs and is constant from then on, as epoch 4 is the first to show.
    falling = replace(
        RUN, batch_size=20, learning_rate=0.03, schedule="decay?drops=(3,)&factor=1e9"
    )
    saved = train(falling, budget, images, tmp_path / "falling.pt")
    assert saved.training["epoch"] == 4 + patience


def test_a_longer_budget_ends_with_the_bits_of_one_long_run(images, tmp_path):
    long = train(RUN, StoppingCriteria(updates=11), images, tmp_path / "long.pt")
    for budget in (
        StoppingCriteria(updates=2),
        StoppingCriteria(epochs=1),
        StoppingCriteria(updates=4),
        FOUR,
    ):
        short = train(RUN, budget, images, tmp_path / "short.pt")
        assert short.training["finished"]
    assert bits(short) != bits(long)
    again = train(RUN, StoppingCriteria(updates=11), images, tmp_path / "short.pt")
    assert bits(again) == bits(long)


def test_a_finished_run_is_not_trained_again(images, tmp_path):
    path = tmp_path / "a.pt"
    train(RUN, FOUR, images, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    watched = Watched()
    for budget in (
        FOUR,
        StoppingCriteria(epochs=1),
        StoppingCriteria(epochs=9, until_loss=100.0),
    ):
        again = train(RUN, budget, images, path, on_update=watched)
        assert again.training["updates"] == 10
    assert watched.updates == []
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_default_batch_sizes_shrink_with_the_training_set():
    assert default_batch_sizes(60_000) == (256, 6000)
    assert default_batch_sizes(10_000) == (256, 1000)
    assert default_batch_sizes(4000) == (32, 400)


# -- carrying on -------------------------------------------------------------------------


def test_kept_checkpoints_are_those_of_runs_that_ended_there(images, tmp_path):
    train(RUN, FOUR, images, tmp_path / "a.pt", keep_every=2)
    assert {p.name for p in tmp_path.glob("a-*")} == {"a-epoch2.pt", "a-epoch4.pt"}
    for epoch, updates in ((2, 5), (4, 10)):
        kept = checkpoint.load(tmp_path / f"a-epoch{epoch}.pt")
        there = train(
            RUN, StoppingCriteria(updates=updates), images, tmp_path / f"{epoch}.pt"
        )
        assert bits(kept) == bits(there)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("spoiled", ["half", "text", "empty", "bare"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(images, tmp_path, suffix, spoiled):
    path = tmp_path / f"a{suffix}"
    state = train(RUN, StoppingCriteria(updates=1), images, path).state_dict
    content = path.read_bytes()
    if spoiled == "bare":
        torch.save(state, path)
    else:
        half = content[: len(content) // 2]
        path.write_bytes({"half": half, "text": b"sharp\n", "empty": b""}[spoiled])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^`{path}` must .*; got [^\n]*$"):
        train(RUN, FOUR, images, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 0.5}, r"got learning_rate=0\.001 \(asked for 0\.5\)"),
        ({"seed": 4}, r"got seed=3 \(asked for 4\)"),
        ({"network": "MLP"}, r"got network='MLP\?.*' \(asked for 'MLP'\)"),
        ({"remedy": "sam"}, r"got remedy='none' \(asked for 'sam'\)"),
        ({"clip_norm": 1.0}, r"got clip_norm=None \(asked for 1\.0\)"),
    ],
)
def test_a_checkpoint_of_another_training_is_not_overwritten(
    images, tmp_path, changes, expected
):
    path = tmp_path / "a.pt"
    train(RUN, StoppingCriteria(updates=1), images, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=expected):
        train(replace(RUN, **changes), FOUR, images, path)
    with pytest.raises(ValueError, match="got data="):
        train(RUN, FOUR, tiny(41), path)
    assert path.read_bytes() == before


def test_a_run_starts_from_another_runs_parameters_and_buffers(images, tmp_path):
    run, watched = replace(RUN, network="ResNet-8"), Watched()
    first = train(run, StoppingCriteria(updates=3), images, tmp_path / "first.pt")
    again = replace(run, seed=9, start_from=str(tmp_path / "first.pt"))
    path = tmp_path / "second.pt"
    second = train(again, StoppingCriteria(updates=1), images, path, on_update=watched)
    state = watched.start.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in first.state_dict.items())
    assert watched.optimizer_at_start["state"] == {}
    flat = b"".join(p.detach().numpy().tobytes() for p in watched.start.parameters())
    digest = hashlib.sha256(flat).hexdigest()
    assert second.start == {"seed": 9, "sha256": digest, "from": again.start_from}
    other = replace(again, network=NETWORK)
    with pytest.raises(ValueError, match=r"`start_from` must hold parameters [^\n]*$"):
        train(other, FOUR, images, tmp_path / "third.pt")
    missing = replace(again, start_from=str(tmp_path / "missing.pt"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        train(missing, FOUR, images, tmp_path / "third.pt")


# -- what goes wrong ---------------------------------------------------------------------


def test_the_callers_random_generators_are_untouched(images, tmp_path):
    run, before = replace(RUN, network="C1"), generators()
    train(run, StoppingCriteria(updates=2), images, tmp_path / "a.pt")
    assert generators() == before
    train(run, StoppingCriteria(updates=3), images, tmp_path / "a.pt")
    assert generators() == before
    with pytest.raises(KeyboardInterrupt):
        train(run, FOUR, images, tmp_path / "a.pt", on_update=kill_at(4))
    assert generators() == before


def test_a_diverging_run_says_so_and_leaves_no_checkpoint(images, tmp_path):
    wild = replace(RUN, network="F1", learning_rate=1e38)
    with pytest.raises(ValueError, match=r"`learning_rate` must keep [^\n]*$"):
        train(wild, StoppingCriteria(epochs=5), images, tmp_path / "a.pt")
    assert list(tmp_path.glob("*.pt")) == []


def test_parameters_that_are_not_finite_are_no_result(images, tmp_path):
    """The last loss is finite, but it is that of the point before the last update."""
    wild = replace(RUN, optimizer="sgd", learning_rate=1e39)
    with pytest.raises(ValueError, match=r"`learning_rate` must keep"):
        train(wild, StoppingCriteria(updates=1), images, tmp_path / "a.pt")
    assert list(tmp_path.glob("*.pt")) == []


def test_the_last_sound_checkpoint_survives_divergence(
    images, tmp_path, saving_always, monkeypatch
):
    from sharpness.lab.schedules import Course

    path, at, sound = tmp_path / "a.pt", Course.at, []
    rate = replace(RUN, optimizer="sgd", learning_rate=0.1)

    def wild(self, update):
        batch_size, learning_rate = at(self, update)
        return batch_size, learning_rate if update < 5 else 1e39

    def look(update, model, optimizer):
        if update == 6:  # which is not saved yet
            sound.append(path.read_bytes())

    monkeypatch.setattr(Course, "at", wild)
    with pytest.raises(ValueError, match=r"`learning_rate` must keep"):
        train(rate, FOUR, images, path, on_update=look)
    left = checkpoint.load(path)
    assert finite(left.state_dict)
    assert left.training["updates"] == 5
    assert path.read_bytes() == sound[0]


def test_data_that_are_not_finite_fail_in_the_first_epoch(images, tmp_path):
    x, y = images.train[0].clone(), images.train[1]
    x[7, 0, 3, 3] = float("nan")
    spoiled = replace(images, train=(x, y))
    with pytest.raises(ValueError, match=r"finite; got nan in update [123] [^\n]*$"):
        train(RUN, FOUR, spoiled, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 41}, r"at most the 40 training samples; got 41"),
        ({"schedule": "increase?drops=(1,)"}, r"got 80, grown from 16"),
        ({"network": "ResNet-8", "batch_size": 1}, r"at least 2 .*BatchNorm; got 1"),
        ({"ghost_batch_size": 8}, r"without BatchNorm; got 8"),
        ({"network": "MLP?width=0"}, r"`width` must .*; got 0"),
        ({"network": "MLP?breadth=3"}, r"breadth"),
        ({"network": "F9"}, r"`network` must be one of .*; got 'F9'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_update(
    images, tmp_path, changes, expected
):
    watched = Watched()
    with pytest.raises(ValueError, match=rf"{expected}[^\n]*$"):
        train(replace(RUN, **changes), FOUR, images, tmp_path / "a.pt", on_update=watched)
    assert watched.updates == []
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"network": "F9"}, r"`network` must be one of .*; got 'F9'"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1; got 0"),
        ({"batch_size": 8.0}, r"`batch_size` must be a whole number; got 8.0"),
        ({"batch_size": True}, r"`batch_size` must be a whole number; got True"),
        ({"seed": -1}, r"`seed` must be at least 0; got -1"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be positive; got 0.0"),
        ({"learning_rate": math.nan}, r"`learning_rate` must be positive; got nan"),
        ({"learning_rate": math.inf}, r"`learning_rate` must be positive; got inf"),
        ({"learning_rate": (0.1, 0.2)}, r"`learning_rate` must be positive; got \(0.1"),
        ({"optimizer": "adamw"}, r"`optimizer` must be one of .*; got 'adamw'"),
        ({"optimizer": ["adam"]}, r"`optimizer` must be one of .*; got \['adam'\]"),
        ({"momentum": 1}, r"`momentum` must be below 1; got 1"),
        ({"weight_decay": -1e-4}, r"`weight_decay` must .*; got -0.0001"),
        ({"scaling": "cubic"}, r"`scaling` must be none, linear or sqrt; got 'cubic'"),
        ({"base_batch_size": 0}, r"`base_batch_size` must be at least 1; got 0"),
        ({"clip_norm": 0}, r"`clip_norm` must be positive; got 0"),
        ({"ghost_batch_size": 1}, r"`ghost_batch_size` must be at least 2; got 1"),
        ({"schedule": "cosine"}, r"`schedule` must be one of .*; got 'cosine'"),
        ({"schedule": "decay"}, r"`schedule` must .*; got 'decay'"),
        ({"schedule": "decay?drops=(2,1)"}, r"`schedule` must .*; got 'decay\?drops"),
        ({"augmentation": "mixup"}, r"`augmentation` must be one of .*; got 'mixup'"),
        ({"remedy": "sum"}, r"`remedy` must be one of .*; got 'sum'. Did you mean"),
        ({"remedy": "sam?rho=0"}, r"`remedy` must .*; got 'sam\?rho=0'"),
        ({"remedy": "sam?radius=1"}, r"`remedy` must .*; got 'sam\?radius=1'"),
    ],
)
def test_impossible_trainings_are_refused(changes, expected):
    with pytest.raises(ValueError, match=rf"^{expected}[^\n]*$"):
        replace(RUN, **changes)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({}, "`epochs` must be given, or `updates`; got None"),
        ({"until_loss": 0.1}, "`epochs` must be given, or `updates`; got None"),
        ({"epochs": 0}, "`epochs` must be positive; got 0"),
        ({"epochs": math.inf}, "`epochs` must be positive; got inf"),
        ({"updates": 0}, "`updates` must be at least 1; got 0"),
        ({"updates": 1.5}, "`updates` must be a whole number; got 1.5"),
        ({"epochs": 1, "patience": 0}, "`patience` must be at least 1; got 0"),
        ({"epochs": 1, "until_loss": math.nan}, "`until_loss` must .*; got nan"),
        ({"epochs": 1, "until_loss": "0.1"}, "`until_loss` must .*; got '?0.1'?"),
    ],
)
def test_impossible_budgets_are_refused(budget, expected):
    with pytest.raises(ValueError, match=rf"^{expected}[^\n]*$"):
        StoppingCriteria(**budget)


@pytest.mark.parametrize("every", [-1, 0, 1.5])
def test_keeping_every_so_many_epochs_needs_a_whole_number(images, tmp_path, every):
    with pytest.raises(ValueError, match=rf"`keep_every` must .*; got {every}"):
        train(RUN, StoppingCriteria(updates=1), images, tmp_path / "a.pt", keep_every=every)


def test_numbers_of_numpy_are_numbers(images, tmp_path):
    """Seeds come from `np.arange`, rates from `np.geomspace`."""
    theirs = replace(
        RUN,
        batch_size=np.int64(16),
        seed=np.int64(3),
        learning_rate=np.float64(1e-3),
        weight_decay=np.float32(0),
    )
    plain = train(RUN, FOUR, images, tmp_path / "a.pt")
    assert bits(train(theirs, FOUR, images, tmp_path / "b.pt")) == bits(plain)
