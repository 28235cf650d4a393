"""A tracker's points in a CSV file, in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import csv
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.problems import softmax_regression

import sharpness as sh
from sharpness.track_writers import csv_writer, tensorboard_writer, wandb_writer


def followed(*writers, updates: int = 2) -> sh.SharpnessTracker:
    problem = softmax_regression()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    tracker = sh.SharpnessTracker(
        problem.model,
        problem.loss,
        problem.data,
        optimizer=optimizer,
        every=1,
        measures=("lambda_max", "phi"),
        on_point=writers,
    )
    for _ in range(updates):
        tracker.step()
    return tracker


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_file_has_a_row_for_each_point_and_is_appended_to(tmp_path):
    path = tmp_path / "deep" / "points.csv"
    tracker = followed(csv_writer(path))
    found = rows(path)
    assert [int(row["update"]) for row in found] == [0, 1, 2]
    for row, point in zip(found, tracker.history, strict=True):
        assert float(row["loss"]) == point.loss
        assert float(row["lambda_max"]) == point.lambda_max.value
        assert float(row["lambda_max_error"]) == point.lambda_max.error
        assert row["lambda_max_status"] == "converged"
        assert float(row["lambda_max_threshold"]) == pytest.approx(20)
        assert row["phi_error"] == ""  # a lower bound
        assert row["noise_scale"] == ""  # not asked for
    followed(csv_writer(path), updates=0)
    assert [int(row["update"]) for row in rows(path)] == [0, 1, 2, 0]


class Board:
    def __init__(self, folder=None) -> None:
        self.folder, self.scalars, self.flushed = folder, [], 0

    def add_scalar(self, name, number, step):
        self.scalars.append((name, number, step))

    def flush(self):
        self.flushed += 1


def test_tensorboard_gets_scalars_at_their_updates():
    board = Board()
    tracker = followed(tensorboard_writer(board))
    last = tracker.history[-1]
    assert ("sharpness/lambda_max", last.lambda_max.value, 2) in board.scalars
    assert ("sharpness/lambda_max_threshold", pytest.approx(20), 2) in board.scalars
    assert ("sharpness/loss", last.loss, 2) in board.scalars
    assert board.flushed == 3


def test_a_folder_becomes_a_writer_of_tensorboard(monkeypatch, tmp_path):
    stand_in = ModuleType("torch.utils.tensorboard")
    made = []
    stand_in.SummaryWriter = lambda folder: made.append(Board(folder)) or made[0]
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    followed(tensorboard_writer(tmp_path))
    assert made[0].folder == tmp_path
    assert made[0].scalars


@pytest.mark.parametrize("own", [True, False])
def test_weights_and_biases_gets_a_dict_for_each_point(monkeypatch, own):
    logged = []
    stand_in = SimpleNamespace(log=logged.append)
    if not own:
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
    tracker = followed(wandb_writer(stand_in if own else None))
    assert [each["sharpness/update"] for each in logged] == [0, 1, 2]
    assert logged[-1]["sharpness/phi"] == tracker.history[-1].phi.value


@pytest.mark.parametrize(
    ("writer", "name"), [(tensorboard_writer, "tensorboard"), (wandb_writer, "wandb")]
)
def test_what_is_not_installed_is_one_line(writer, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        writer()


def test_several_functions_are_called_in_their_order():
    seen: list[tuple[str, int]] = []
    first, second = (lambda p, n=n: seen.append((n, p.step)) for n in "ab")
    followed(first, second, updates=1)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
