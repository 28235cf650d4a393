"""Seeds trained as one stacked model are the seeds trained one by one."""

from dataclasses import replace

import pytest
import torch
from helpers.training import RUN, bits, tiny

from sharpness import checkpoint
from sharpness.lab import run as loop
from sharpness.lab.run import train
from sharpness.lab.stacked import Stack, can_be_stacked, train_together
from sharpness.lab.sweep import ExecutionSettings, Run, sweep
from sharpness.lab.training import StoppingCriteria, Training

# A learning rate at which rounding is not amplified; see tests/test_sweep.py.
SLOW = {"optimizer": "momentum", "learning_rate": 1e-3}
KINDS = {
    "features": Training(network="F1", batch_size=8, **SLOW),
    "images": Training(network="ResNet-8", batch_size=8, weight_decay=0.1, **SLOW),
    "growing": Training(
        network="MLP", batch_size=4, schedule="increase?drops=(1,)&warmup=0.5", **SLOW
    ),
    "adam": Training(network="MLP", batch_size=8),
}
TEN = StoppingCriteria(updates=10)


@pytest.fixture(scope="module")
def images():
    return tiny()


def seeds(training, num=3):
    return [replace(training, seed=seed) for seed in range(num)]


def paths(folder, num=3):
    return [folder / f"{seed}.pt" for seed in range(num)]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k == "features" else [pytest.mark.slow]) for k in KINDS],
)
def test_a_stack_makes_the_updates_that_each_seed_makes_alone(images, tmp_path, kind):
    trainings = seeds(KINDS[kind])
    together = train_together(trainings, TEN, images, paths(tmp_path))
    for i, training in enumerate(trainings):
        alone = train(training, TEN, images, tmp_path / f"alone{i}.pt")
        stacked = together[i]
        assert stacked.start == alone.start
        torch.testing.assert_close(
            stacked.progress["losses"], alone.progress["losses"], rtol=1e-4, atol=1e-6
        )
        for name, tensor in alone.state_dict.items():
            torch.testing.assert_close(
                stacked.state_dict[name], tensor, rtol=1e-3, atol=1e-5, msg=name
            )
        for key in ("updates", "epoch", "finished", "network", "seed", "num_threads"):
            assert stacked.training[key] == alone.training[key]
        assert stacked.training["metrics"].keys() == alone.training["metrics"].keys()
        ours, theirs = (c.optimizer["state"] for c in (stacked, alone))
        assert ours.keys() == theirs.keys()
        for i, state in theirs.items():
            assert ours[i].keys() == state.keys()
            assert all(ours[i][k].shape == v.shape for k, v in state.items())


def test_seeds_of_a_stack_differ(images, tmp_path):
    losses = [
        c.progress["losses"]
        for c in train_together(seeds(KINDS["features"]), TEN, images, paths(tmp_path))
    ]
    assert not torch.allclose(losses[0], losses[1], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features", "adam"])
def test_a_stack_that_was_killed_ends_with_the_same_bits(
    images, tmp_path, monkeypatch, kind
):
    trainings = seeds(KINDS[kind])
    whole = train_together(trainings, TEN, images, paths(tmp_path))
    (tmp_path / "killed").mkdir()
    killed = paths(tmp_path / "killed")
    monkeypatch.setattr(loop, "_SAVE_EVERY", -1.0)
    update = Stack.one_update
    for number in (3, 4, 7):
        with monkeypatch.context() as patch:

            def dying(stack, number=number):
                if stack.runs[0].update == number:
                    raise KeyboardInterrupt
                update(stack)

            patch.setattr(Stack, "one_update", dying)
            with pytest.raises(KeyboardInterrupt):
                train_together(trainings, TEN, images, killed)
    again = train_together(trainings, TEN, images, killed)
    assert [bits(c) for c in again] == [bits(c) for c in whole]


@pytest.mark.slow
def test_a_run_that_was_stacked_can_go_on_alone(images, tmp_path):
    trainings = seeds(KINDS["features"])
    train_together(trainings, TEN, images, paths(tmp_path))
    longer = StoppingCriteria(updates=15)
    gone_on = train(trainings[1], longer, images, tmp_path / "1.pt")
    alone = train(trainings[1], longer, images, tmp_path / "alone.pt")
    assert gone_on.training["updates"] == 15
    torch.testing.assert_close(
        gone_on.progress["losses"], alone.progress["losses"], rtol=1e-3, atol=1e-6
    )


def test_a_stack_keeps_the_checkpoints_of_epochs(images, tmp_path):
    budget = StoppingCriteria(epochs=2)
    train_together(seeds(RUN, 2), budget, images, paths(tmp_path, 2), keep_every=1)
    assert {p.name for p in tmp_path.glob("*-epoch*.pt")} == {
        f"{seed}-epoch{epoch}.pt" for seed in (0, 1) for epoch in (1, 2)
    }


@pytest.mark.parametrize(
    "change",
    [
        {"remedy": "sam"},
        {"augmentation": "crop-flip"},
        {"clip_norm": 1.0},
        {"network": "ResNet-8", "ghost_batch_size": 4},
    ],
    ids=str,
)
def test_what_is_done_to_one_network_is_not_stacked(images, tmp_path, change):
    trainings = seeds(replace(RUN, **change))
    assert not can_be_stacked(trainings, TEN)
    with pytest.raises(ValueError, match="`trainings` must differ in their seed alone"):
        train_together(trainings, TEN, images, paths(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "budget", [{"until_loss": 0.1}, {"until_accuracy": 0.5}, {"patience": 2}], ids=str
)
def test_budgets_that_end_each_run_elsewhere_are_not_stacked(budget):
    assert not can_be_stacked(seeds(RUN), StoppingCriteria(epochs=9, **budget))


def test_other_settings_than_the_seed_are_not_stacked():
    assert can_be_stacked(seeds(RUN), TEN)
    assert not can_be_stacked([RUN, replace(RUN, learning_rate=0.5)], TEN)


def test_dropout_and_runs_out_of_step_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="without dropout to be stacked; got C1"):
        train_together(seeds(replace(RUN, network="C1")), TEN, images, paths(tmp_path))
    train(replace(RUN, seed=1), StoppingCriteria(updates=2), images, tmp_path / "1.pt")
    with pytest.raises(ValueError, match="got updates 0 to 2"):
        train_together(seeds(RUN), TEN, images, paths(tmp_path))


@pytest.mark.slow
def test_a_sweep_stacks_seeds_and_falls_back_to_single_runs(tmp_path):
    place = ExecutionSettings(data="digits", jobs=1, stacked=True)
    runs = [
        Run(
            training=t,
            budget=StoppingCriteria(updates=3),
            path=tmp_path / f"{t.network}{t.seed}.pt",
        )
        for network in ("MLP", "C1")
        for t in seeds(Training(network=network, batch_size=16), 2)
    ]
    wild = replace(runs[0].training, seed=7, optimizer="sgd", learning_rate=1e39)
    runs.append(replace(runs[0], training=wild, path=tmp_path / "wild.pt"))
    outcomes = {o.run.path.name: o for o in sweep(runs, place)}
    assert {name for name, o in outcomes.items() if o.failure} == {"wild.pt"}
    assert all(checkpoint.load(r.path).training["finished"] for r in runs[:4])
    assert outcomes["MLP0.pt"].seconds == outcomes["MLP1.pt"].seconds  # as one
    assert outcomes["C10.pt"].seconds != outcomes["C11.pt"].seconds  # dropout: each alone
