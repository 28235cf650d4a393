"""What somebody runs when a GPU is at hand, rehearsed on a CPU."""

import contextlib
import importlib
import io
import json
import sys
import warnings
from itertools import pairwise
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # a rehearsal takes half a minute

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["tests", "products", "top5", "training", "c1", "phi"]
NETWORKS = ["F1", "C1", "ResNet-20", "GPT-2-small"]
OUTCOMES = """
import pytest
def test_one(): pass
def test_two(): pass
def test_three(): assert False
@pytest.mark.skip
def test_four(): pass
"""


@pytest.fixture(scope="module")
def gpu():
    """The script; it turns TF32 off, and here the flags are put back."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("gpu")
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.fixture(scope="module")
def rehearsed(gpu, tmp_path_factory):
    """One rehearsal of all parts, and another on its file; one peer is not there."""
    folder = tmp_path_factory.mktemp("gpu")
    tests, path = folder / "test_outcomes.py", folder / "found" / "gpu.json"
    tests.write_text(OUTCOMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TESTS", tests)
        patch.setitem(sys.modules, "curvlinops", None)
        printed = run(gpu, path)
        text = path.read_text()
        run(gpu, path)
    record = json.loads(text, parse_constant=pytest.fail)
    return SimpleNamespace(record=record, text=text, path=path, printed=printed)


def run(gpu, path, *more):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        gpu.main(["--rehearse", "--output", str(path), *more])
    return printed.getvalue().splitlines()


def steps_of(rehearsed, part):
    return rehearsed.record["parts"][part]["steps"]


def parts_of(path):
    return json.loads(path.read_text())["parts"]


# -- what a rehearsal finds --------------------------------------------------------------


def test_the_record_has_every_part_in_its_documented_shape(gpu, rehearsed):
    record = rehearsed.record
    assert list(record["parts"]) == PARTS
    for key in ("device", "environment", "tf32", "settings", "conventions", "parts"):
        assert f'"{key}"' in gpu.__doc__
        assert record[key]
    assert record["rehearsal"] is True
    assert record["tf32"]["matmul"] is record["tf32"]["cudnn"] is False
    for part in record["parts"].values():
        assert list(part) == ["status", "seconds", "steps"]
        for step in part["steps"].values():
            done = step["status"] == "done"
            assert done or list(step) == ["status"]
            assert {"date", "wall_seconds", "headline"} <= set(step) or not done
            assert "\n" not in step["status"]


def test_a_line_is_printed_for_each_part(rehearsed):
    begin = [line.partition(":")[0] for line in rehearsed.printed]
    assert begin == [*PARTS, "raw numbers"]
    assert "2 passed, 1 failed" in rehearsed.printed[0]


def test_outcomes_of_tests_are_counted(rehearsed):
    found = steps_of(rehearsed, "tests")["CUDA tests"]
    counts = [found[word] for word in ("passed", "failed", "skipped", "error")]
    assert counts == [2, 1, 1, 0]
    assert found["return_code"] == 1
    assert "1 failed" in found["last_lines"][-1]


@pytest.mark.parametrize("network", NETWORKS)
def test_products_are_right_and_timed(rehearsed, network):
    steps = steps_of(rehearsed, "products")
    assert steps[f"{network}: sharpness"]["engine"] == "kept_graph"
    for contender in ("sharpness", "pyhessian"):
        found = steps[f"{network}: {contender}"]
        assert found["relative_error"] < 1e-4
        assert found["wrong"] is False
        for key in ("seconds_per_product", "seconds_per_gradient", "ratio"):
            assert 0 < found[key] < np.inf
        work = 2 * found["flops"]["gradient"] / 1e9
        expected = work / found["seconds_per_product"]
        assert found["gflops_per_second"] == pytest.approx(expected)
        for key in ("share_of_peak", "peak_bytes", "synchronisations"):
            assert found[key] is None  # of a GPU


def test_work_of_a_gradient_is_that_of_its_matrix_products(rehearsed):
    found = steps_of(rehearsed, "products")["F1: sharpness"]
    sizes = [784, 512, 512, 512, 512, 512, 10]
    layers = [a * b for a, b in pairwise(sizes)]
    multiplied = 3 * sum(layers) - layers[0]  # no gradient of the inputs
    assert found["flops"]["gradient"] == 2 * found["samples"] * multiplied


def test_a_missing_peer_is_noted_and_the_others_go_on(rehearsed):
    steps = steps_of(rehearsed, "products")
    for network in NETWORKS:
        assert steps[f"{network}: curvlinops"]["status"].startswith("skipped: no curvl")
    done = [name for name, step in steps.items() if step["status"] == "done"]
    assert done[-1].startswith("GPT-2-small")
    status = rehearsed.record["parts"]["products"]["status"]
    assert status == f"{len(done)} of 16 done"
    assert "curvlinops" not in "".join(done)


@pytest.mark.parametrize("network", NETWORKS)
def test_eigenvalues_stand_with_their_bounds(rehearsed, network):
    pairs = steps_of(rehearsed, "top5")[network]["eigenpairs"]
    values, bounds = pairs["eigenvalues"], pairs["error_bounds"]
    assert len(values) == len(bounds) == 5
    assert values == sorted(values, reverse=True)
    assert values[0] > 0
    assert all(isfinite(bound) and bound >= 0 for bound in bounds)
    assert pairs["status"] in ("converged", "max_hvps")
    assert 0 < pairs["cost"]["products"] <= 10
    assert pairs["cost"]["seconds"] > 0


@pytest.mark.parametrize("name", ["stacked", "one by one"])
def test_trainings_say_how_many_epochs_they_took(rehearsed, name):
    found = steps_of(rehearsed, "training")[name]
    assert (found["runs"], found["epochs"], found["extrapolated"]) == (5, 1, False)
    assert 0 < found["seconds_per_epoch"] <= found["seconds"]


def test_c1_is_trained_and_measured_at_two_batch_sizes(rehearsed):
    steps = steps_of(rehearsed, "c1")
    assert list(steps) == ["batch 10", "batch 20"]
    for found in steps.values():
        assert found["epochs"] == 1
        for mode in ("batch", "running"):
            assert 0 <= found[f"train_accuracy_{mode}"] <= 1
            assert 0 <= found[f"test_accuracy_{mode}"] <= 1
        assert found["measured_samples"] == 5
        assert found["phi"]["phi"] > 0
        assert found["lambda_max"]["eigenpairs"]["eigenvalues"][0] > 0


def test_phi_is_timed_with_and_without_its_gradients(rehearsed):
    steps = steps_of(rehearsed, "phi")
    assert list(steps) == ["F1", "C2"]
    assert steps["F1"]["parameters"] == 1_462_794
    for found in steps.values():
        assert found["evaluations"] == found["phi"]["cost"]["gradients"] > 1
        assert found["phi"]["phi"] > 0
        each = found["seconds_per_gradient"], found["bookkeeping_per_evaluation"]
        assert all(0 < seconds < found["seconds"] for seconds in each)


# -- carrying on -------------------------------------------------------------------------


def test_two_networks_are_also_compiled_in_earnest(gpu):
    sizes = {name: pair[0] for name, pair in gpu.SIZES.items()}
    names = [name for name in gpu.steps_of_products(sizes) if "compiled" in name]
    assert names == ["F1: sharpness compiled", "C1: sharpness compiled"]


def test_a_second_run_does_nothing_again(rehearsed):
    assert rehearsed.path.read_text() == rehearsed.text
    assert not list(rehearsed.path.parent.glob("*.part"))


@pytest.fixture
def calls(gpu, monkeypatch):
    """Three parts of one step; the list of those that were begun."""
    begun = []

    def step(name):
        def take(bench, seconds):
            begun.append(name)
            return {"headline": name, "number": 1.0}

        return take

    parts = {
        name: (100, lambda sizes, name=name: {name: step(name)}) for name in ("a", "b", "c")
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    return begun


def replaced(gpu, monkeypatch, name, step):
    monkeypatch.setitem(gpu.PARTS, name, (100, lambda sizes: {name: step}))


def test_a_failing_step_is_one_line_and_later_parts_still_run(
    gpu, calls, monkeypatch, tmp_path
):
    def fail(bench, seconds):
        raise RuntimeError("too bad\nand more of it")

    replaced(gpu, monkeypatch, "b", fail)
    printed = run(gpu, tmp_path / "gpu.json")
    parts = parts_of(tmp_path / "gpu.json")
    assert parts["b"]["status"] == "failed: RuntimeError: too bad"
    assert printed[1] == "b: failed: RuntimeError: too bad, 0 s"
    assert calls == ["a", "c"]
    assert parts["c"]["status"] == "done"


def test_a_kill_keeps_what_is_finished_and_the_next_run_does_the_rest(
    gpu, calls, monkeypatch, tmp_path
):
    path, whole = tmp_path / "gpu.json", dict(gpu.PARTS)

    def killed(bench, seconds):
        raise KeyboardInterrupt

    replaced(gpu, monkeypatch, "b", killed)
    with pytest.raises(KeyboardInterrupt):
        run(gpu, path)
    before = parts_of(path)
    assert list(before) == ["a"]
    monkeypatch.setattr(gpu, "PARTS", whole)
    run(gpu, path)
    assert calls == ["a", "b", "c"]
    assert parts_of(path)["a"] == before["a"]


def test_what_the_time_does_not_reach_is_not_run_and_done_the_next_time(
    gpu, calls, tmp_path
):
    path = tmp_path / "gpu.json"
    run(gpu, path, "--limit", "0")
    every = [part["status"] for part in parts_of(path).values()]
    assert every == ["not run: out of time"] * 3
    assert not calls
    run(gpu, path)
    assert calls == ["a", "b", "c"]


def test_a_part_has_no_more_than_its_share_of_the_time(gpu, calls, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.PARTS, "a", (0, gpu.PARTS["a"][1]))
    run(gpu, tmp_path / "gpu.json")
    assert calls == ["b", "c"]


def test_only_takes_some_parts_and_leaves_the_others_as_they_are(gpu, calls, tmp_path):
    path = tmp_path / "gpu.json"
    run(gpu, path, "--only", "c", "a")
    run(gpu, path, "--only", "b")
    assert calls == ["a", "c", "b"]
    assert set(parts_of(path)) == {"a", "b", "c"}


@pytest.mark.parametrize("where", ["environment.git_revision", "device.name"])
def test_another_revision_or_card_begins_afresh(gpu, calls, tmp_path, where):
    path = tmp_path / "gpu.json"
    run(gpu, path, "--only", "a", "b")
    record = json.loads(path.read_text())
    group, _, key = where.partition(".")
    record[group][key] = "another"
    path.write_text(json.dumps(record))
    run(gpu, path, "--only", "a")
    assert calls == ["a", "b", "a"]
    assert list(parts_of(path)) == ["a"]


def test_a_rehearsal_does_not_overwrite_a_measurement(gpu, calls, monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    run(gpu, path)
    record = json.loads(path.read_text()) | {"rehearsal": False}
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="must not be a measurement's file"):
        run(gpu, path)
    assert json.loads(path.read_text()) == record
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu, "TARGET", path)
    gpu.main(["--rehearse"])  # by default into a folder of its own
    assert json.loads(path.read_text()) == record
    assert len(list(tmp_path.glob("rehearsal-*/gpu.json"))) == 1


def test_without_cuda_it_ends_with_one_line_and_writes_nothing(
    gpu, calls, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "TARGET", tmp_path / "gpu.json")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--data-dir", str(tmp_path)])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert len(printed.err.splitlines()) == 1
    assert "CUDA" in printed.err
    assert not calls
    assert not printed.out
    assert not list(tmp_path.iterdir())


# -- data --------------------------------------------------------------------------------


def test_a_missing_data_set_is_noted_and_later_parts_still_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.PARTS, "phi", (9, lambda sizes: {"x": lambda *_: {}}))
    path = tmp_path / "gpu.json"
    run(gpu, path, "--only", "training", "c1", "phi", "--data-dir", str(tmp_path / "no"))
    parts = parts_of(path)
    where = f"in {tmp_path / 'no'}"
    expected = f"skipped: mnist needs train-images-idx3-ubyte {where}"
    assert parts["training"]["status"] == expected
    assert parts["c1"]["status"] == f"skipped: cifar10 needs data_batch_1.bin {where}"
    assert parts["phi"]["status"] == "done"


def test_without_a_folder_a_measurement_skips_what_needs_data(gpu):
    bench = gpu.Bench(rehearsal=False, data_dir=None)
    found = gpu.outcome(gpu.stacked, bench, 1.0)
    assert found == {
        "status": "skipped: mnist is read from a folder, and --data-dir names none"
    }


def test_data_are_read_from_the_folder(gpu, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    (tmp_path / "mnist").mkdir()
    for part in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            path = tmp_path / "mnist" / f"{part}-{kind}-ubyte"
            path.write_bytes(head + values.tobytes())
    x, y = gpu.Bench(rehearsal=True, data_dir=tmp_path).dataset("mnist").train
    assert x.shape == (20, 1, 28, 28)
    assert torch.bincount(y).tolist() == [2] * 10
    own = torch.from_numpy(pixels).float().div(255)[:, None]
    assert all(any(torch.equal(image, other) for other in own) for image in x)


# -- what only a GPU shows ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 67.0),
        ("NVIDIA H100 PCIe", 51.0),
        ("NVIDIA H200", 67.0),
        ("NVIDIA A100-SXM4-80GB", 19.5),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_the_published_one_or_none(gpu, monkeypatch, card, peak):
    monkeypatch.setattr(gpu.products, "processor", lambda device: card)
    assert gpu.peak_of(torch.device("cuda")) == peak
    found = gpu.rates([2.0, 4.0, 3.0], [1.0, 1.0, 2.0], 10**13, torch.device("cuda"))
    assert found["ratio"] == 2.0
    assert found["gflops_per_second"] == pytest.approx(2e4 / 3)
    expected = None if peak is None else pytest.approx(20 / 3 / peak)
    assert found["share_of_peak"] == expected


def test_waits_and_memory_of_one_call_are_counted(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70)

    def work():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = gpu.on_a_gpu(work, 20, torch.device("cuda"))
    assert found == {"peak_bytes": 50, "synchronisations": 3}
    assert modes == ["warn", "default"]


def test_the_language_model_has_the_shape_of_gpt_2_small(gpu):
    def parameters(vocabulary, length, width, depth, heads):
        block = 12 * width**2 + 13 * width
        return vocabulary * (width + 1) + length * width + depth * block + 2 * width

    full, tiny = gpu.SIZES["gpt"]
    problem = gpu.built("GPT-2-small", gpu.Bench(rehearsal=True, data_dir=None))
    assert problem.v.numel() == parameters(**tiny)
    # The published 124 439 808 (Radford et al. 2019), and the biases of the head.
    assert parameters(**full) == 124_439_808 + full["vocabulary"]


# -- a training that takes too long ------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "epochs", "total"),
    [(13, 3, 10 + 99 * 2), (5, 1, 100 * 10), (999, 100, 208)],
)
def test_a_training_that_takes_too_long_is_extrapolated(
    gpu, monkeypatch, seconds, epochs, total
):
    now = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def train(on_epoch):
        for epoch in range(1, 101):
            now[0] += 10 if epoch == 1 else 2
            on_epoch(epoch, 1.0)

    found = gpu.timed_epochs(train, 100, seconds)
    assert found["epochs"] == epochs
    assert found["seconds"] == total
    assert found["extrapolated"] == (epochs < 100)
