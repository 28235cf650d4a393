"""Tables of numbers, and the curves that are drawn from them."""

import math

import pytest

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce.columns import accuracy, band, listed, metric, pairs, panel, table
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.runner import ObservationStore
from sharpness.reproduce.serialisation import digest

PICK = metric("loss")


def network(size, seed):
    training = Training(network="F1", batch_size=size, seed=seed)
    budget = StoppingCriteria(epochs=1)
    return ModelSpec(data="digits", training=training, budget=budget)


def store(numbers):
    """Of {(size, seed): loss}; None is a training that diverged."""
    return ObservationStore(
        [
            {
                "kind": "observation",
                "digest": digest(accuracy(network(*key))),
                "found": None if value is None else {"metrics": {"loss": value}},
                "diverged": "the loss is nan" if value is None else None,
            }
            for key, value in numbers.items()
        ]
    )


RUNS = [(size, network(size, seed)) for size in (32, 8, 100) for seed in (1, 0)]


def test_a_table_has_a_row_for_each_starting_point_and_a_column_for_each_x_in_order():
    known = store({(8, 0): 5.0, (8, 1): 6.0, (32, 1): 3.0, (100, 0): math.inf})
    found = table(known, accuracy, PICK, RUNS)
    assert found.columns.tolist() == [8, 32, 100]
    assert found.index.tolist() == [0, 1]
    assert found.fillna(-1).to_numpy().tolist() == [[5, -1, -1], [6, 3, -1]]


def test_a_training_that_diverged_counts_as_what_is_said():
    known = store({(8, 0): 5.0, (8, 1): None})
    assert table(known, accuracy, PICK, RUNS)[8].isna().tolist() == [False, True]
    assert table(known, accuracy, PICK, RUNS, diverged=0.0)[8].tolist() == [5.0, 0.0]


def test_a_pair_counts_where_both_have_a_number():
    networks = [(network(8, seed), network(32, seed)) for seed in range(5)]
    known = {(8, seed): 1.0 + seed for seed in range(5)}
    known |= {(32, 0): 7.0, (32, 2): None, (32, 3): math.inf, (32, 4): 8.0}
    assert pairs(store(known), accuracy, PICK, networks) == ([1.0, 5.0], [7.0, 8.0])
    assert pairs(store({}), accuracy, PICK, networks) == ([], [])


def test_groups_are_drawn_by_mean_and_range_in_order():
    numbers = {(32, 0): 1.0, (8, 0): 5.0, (32, 1): 3.0, (8, 1): 6.0, (100, 1): 7.0}
    found = table(store(numbers), accuracy, PICK, RUNS)
    curve = band("", found)
    assert (curve.x, curve.y) == ([8, 32, 100], [5.5, 2.0, 7.0])
    assert (curve.low, curve.high) == ([5, 1, 7], [6, 3, 7])
    assert listed(found) == "5.5 (8), 2 (32), 7 (100)"


@pytest.mark.parametrize("numbers", [{}, {(8, 0): None}])
def test_a_curve_without_points_is_not_drawn(numbers):
    curve = band("", table(store(numbers), accuracy, PICK, RUNS))
    assert panel("x", "y", [curve]).curves == []
