"""An installation is whole: its data, its types, its commands and one number that is known.

It knows nothing of the source tree, so it can be run beside an installed wheel alone.
"""

import json
import subprocess
import sys
from importlib.metadata import requires, version
from importlib.resources import files

import pytest
import torch

import sharpness as sh

pytestmark = pytest.mark.slow  # each command is a process that loads PyTorch
COMMANDS = ["measure", "compare", "train", "reproduce", "batchsize"]


def run(*arguments, **options):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "path",
    [
        "py.typed",
        "lab/published.json",
        "reproduce/paper_numbers/keskar2017.json",
    ],
)
def test_what_is_no_python_is_there_too(path):
    file = files("sharpness") / path
    assert file.is_file()
    if path.endswith(".json"):
        assert json.loads(file.read_text(encoding="utf-8"))


def test_it_has_the_version_that_it_says():
    assert version("sharpness") == sh.__version__
    assert any(line.startswith("torch>=") for line in requires("sharpness"))


def test_eigenvalues_of_a_linear_regression_are_those_of_the_textbook():
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    risk = sh.EmpiricalRisk(model, torch.nn.MSELoss(), (x, x[:, :1]))
    found = sh.eigenpairs(risk, k=4, tol=1e-8).eigenvalues
    expected = torch.linalg.eigvalsh(2 / 50 * x.T @ x).flip(0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_how_it_is_used(command):
    ran = run(f"sharpness.{command}", "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"usage: python -m sharpness.{command}")


def test_a_network_is_trained_and_measured_from_the_shell(tmp_path):
    network = "MLP?width=8&depth=1"
    options = ["--batch-size", "64", "--updates", "3", "--device", "cpu", "--jobs", "1"]
    ran = run(
        "sharpness.train", network, "--data", "digits", *options, "--output", str(tmp_path)
    )
    assert ran.returncode == 0, ran.stderr
    checkpoint = tmp_path / "batch64-seed0.pt"
    measures = ["--measures", "lambda_max", "--num-samples", "100", "--device", "cpu"]
    ran = run("sharpness.measure", str(checkpoint), "--json", *measures)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)["measures"]["lambda_max"][0]
    assert found["status"] == "converged"
    assert found["eigenvalues"][0] > 0
