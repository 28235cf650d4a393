"""Whole numbers are taken from NumPy too; True and 3.0 are none."""

import re

import numpy as np
import pytest
from helpers.problems import mlp_data, mlp_risk, trained_mlp
from torch import nn

import sharpness as sh
from sharpness._json import to_line
from sharpness.lab import data
from sharpness.measures import flatness

COUNTS = {
    "k": lambda n: sh.eigenpairs(mlp_risk(), n, progress=False),
    "k of a layer": lambda n: sh.layerwise_eigenpairs(mlp_risk(), k=n, progress=False),
    "max_hvps": lambda n: sh.eigenpairs(mlp_risk(), max_hvps=n, progress=False),
    "seed": lambda n: sh.eigenpairs(mlp_risk(), seed=n, progress=False),
    "seed of layers": lambda n: sh.layerwise_eigenpairs(mlp_risk(), seed=n, progress=False),
    "seed of phi": lambda n: sh.epsilon_sharpness(mlp_risk(), seed=n, progress=False),
    "seed of a trace": lambda n: sh.trace(mlp_risk(), tol=0.3, seed=n, progress=False),
    "seed of draws": lambda n: sh.average_case_sharpness(
        mlp_risk(), 0.1, seed=n, progress=False
    ),
    "subspace_dim": lambda n: sh.epsilon_sharpness(
        mlp_risk(), subspace_dim=n, progress=False
    ),
    "num_starts": lambda n: sh.epsilon_sharpness(mlp_risk(), num_starts=n, progress=False),
    "num_steps": lambda n: sh.worst_case_sharpness(
        mlp_risk(), 0.1, num_steps=n, progress=False
    ),
    "shard_size": lambda n: sh.worst_case_sharpness(
        mlp_risk(), 0.1, shard_size=n, progress=False
    ),
    "num_draws": lambda n: flatness.pac_bayes_sigma(
        mlp_risk(), num_draws=n, progress=False
    ),
    "density": lambda n: sh.spectral_density(
        mlp_risk(), num_starts=n, num_steps=n, grid=n, seed=n, progress=False
    ),
}
REFUSED = {
    "max_hvps": "`max_hvps` must",
    "k": "`k` must",
    "k of a layer": "`k` must",
    "seed": "`seed` must be a whole number",
    "seed of a trace": "`seed` must be a whole number",
    "seed of draws": "`seed` must be a whole number",
    "num_starts": "`num_starts` must be a whole number",
    "num_steps": "`num_steps` must be a whole number",
    "shard_size": "`shard_size` must be a whole number",
}


def timeless(result):
    return re.sub(r"seconds=[\d.e-]+", "", repr(vars(result)))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", COUNTS)
def test_numpys_whole_numbers_are_pythons(name, kind):
    found, expected = COUNTS[name](kind(3)), COUNTS[name](3)
    assert timeless(found).replace(f"np.{kind.__name__}(3)", "3") == timeless(expected)
    assert to_line({"found": found})


@pytest.mark.parametrize("value", [True, 3.0, "3", None])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_number_is_refused_in_one_line(name, value):
    if value is None and name in ("shard_size", "max_hvps"):
        value = 2.5  # None has a meaning there
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        COUNTS[name](value)
    assert "\n" not in str(error.value)


def test_chunks_and_samples_are_counted_by_numpy_too():
    risk, loss = trained_mlp(), nn.CrossEntropyLoss()
    built = sh.EmpiricalRisk(risk, loss, mlp_data(), chunk_size=np.int64(7))
    assert built.chunk_size == 7
    assert len(data.load("digits", num_train=np.int64(20)).train[1]) == 20
    with pytest.raises(ValueError, match="`chunk_size` must"):
        sh.EmpiricalRisk(risk, loss, mlp_data(), chunk_size=True)


def test_a_seed_at_the_end_of_its_type_does_not_wrap():
    found, expected = COUNTS["seed of phi"](np.uint8(255)), COUNTS["seed of phi"](255)
    assert timeless(found) == timeless(expected)
