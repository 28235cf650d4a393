"""The frame of every measure's loop: how it ends, and what it has counted then."""

from types import SimpleNamespace

import pytest
import torch
from helpers.problems import mlp_risk, quadratic
from torch import nn

import sharpness as sh
from sharpness import _run
from sharpness._progress import duration
from sharpness._results import NonFiniteProductError, Status
from sharpness._run import Deadline, Run
from sharpness.measures import flatness, traces

LIMITED = {
    "eigenpairs": lambda risk, **o: sh.eigenpairs(risk, 8, **o),
    "layers": lambda risk, **o: sh.layerwise_eigenpairs(risk, **o),
    "density": lambda risk, **o: sh.spectral_density(risk, **o),
    "trace": lambda risk, **o: sh.trace(risk, **o),
    "diagonal": lambda risk, **o: traces.diagonal(risk, **o),
    "phi": lambda risk, **o: sh.epsilon_sharpness(risk, [0.01] * 4, **o),
    "subspace": lambda risk, **o: sh.subspace_sharpness(risk, subspace_dim=2, **o),
    "worst": lambda risk, **o: sh.worst_case_sharpness(risk, [0.01] * 4, **o),
    "average": lambda risk, **o: sh.average_case_sharpness(risk, [0.01] * 4, **o),
    "sigma": lambda risk, **o: flatness.pac_bayes_sigma(risk, **o),
    "flatness": lambda risk, **o: flatness.relative_flatness(risk, **o),
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(_run, "time", fake)
    return now


def test_it_counts_what_was_completed(clock):
    run = Run("steps", progress=False)
    with run:
        for _ in range(3):
            run.step()
        run.step(4)
        clock.seconds = 2.5
    clock.seconds = 9
    assert (run.num_steps, run.seconds, run.status) == (7, 2.5, Status.COMPLETED)


@pytest.mark.parametrize(("least", "done"), [(0, 0), (1, 1), (3, 3)])
def test_no_step_begins_after_the_time(clock, least, done):
    clock.seconds = 1
    run = Run("steps", max_seconds=-1.0, min_steps=least, progress=False)
    with run:
        while True:
            run.step()
    assert (run.num_steps, run.status) == (done, Status.MAX_SECONDS)


def test_no_step_goes_beyond_the_most():
    run = Run("steps", max_steps=5, progress=False)
    with run:
        while True:
            run.step(2)
    assert (run.num_steps, run.status) == (4, Status.MAX_HVPS)


def test_the_step_that_is_interrupted_does_not_count():
    run = Run("steps", progress=False)
    with run:
        run.step()
        run.step()
        raise KeyboardInterrupt
    assert (run.num_steps, run.status) == (1, Status.INTERRUPTED)


def test_a_product_that_is_not_finite_ends_it():
    run = Run("steps", progress=False)
    with run:
        run.step()
        raise NonFiniteProductError
    assert (run.num_steps, run.status) == (1, Status.NON_FINITE)


def test_the_end_of_an_inner_run_is_not_that_of_the_outer():
    outer, inner = Run("outer", progress=False), Run("inner", progress=False)
    with outer:
        outer.step()
        with inner:
            inner.stop(Status.CONVERGED)
        outer.step()
    assert (outer.num_steps, outer.status) == (2, Status.COMPLETED)
    with pytest.raises(_run._Stopped), inner:
        outer.stop(Status.MAX_SECONDS)


@pytest.mark.parametrize("error", [TimeoutError, FloatingPointError, ZeroDivisionError])
def test_what_others_raise_goes_on(error):
    with pytest.raises(error), Run("steps", progress=False):
        raise error("of the model")


def test_a_deadline_is_shared(clock):
    deadline = Deadline(10)
    clock.seconds = 4
    assert deadline.left == 6
    assert Deadline(None).left is None


class Failing(nn.Linear):
    """A model that works until it is told to fail."""

    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [TimeoutError("gateway"), FloatingPointError("trap")])
@pytest.mark.parametrize("name", [n for n in LIMITED if n != "flatness"])
def test_an_error_of_the_model_is_the_models(name, error):
    model = Failing(3, 2)
    risk = sh.EmpiricalRisk(
        model, nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.arange(8) % 2)
    )
    model.error = error
    with pytest.raises(type(error), match=str(error)):
        LIMITED[name](risk, progress=False)


@pytest.mark.parametrize("name", LIMITED)
def test_the_time_is_that_of_the_whole_call(name, monkeypatch):
    """With a clock that ticks at each product, gradient and value."""
    ticks, limit = [], 6
    for method in ("product", "value_and_gradient", "value", "block_products", "accuracy"):
        original = getattr(sh.EmpiricalRisk, method)

        def counting(self, *arguments, original=original, **options):
            ticks.append(0)
            return original(self, *arguments, **options)

        monkeypatch.setattr(sh.EmpiricalRisk, method, counting)
    risk = mlp_risk().unchecked()
    ticks.clear()
    fake = SimpleNamespace(monotonic=lambda: float(len(ticks)))
    monkeypatch.setattr(_run, "time", fake)
    found = LIMITED[name](risk, max_seconds=limit + 0.5, progress=False)
    results = found if isinstance(found, list) else [found]
    assert any(one.status == "max_seconds" for one in results)
    # What is begun is ended, and each of four radii looks at the risk itself once.
    assert len(ticks) <= limit + 6


def test_a_search_without_any_time_still_makes_a_product():
    found = sh.eigenpairs(quadratic([1.0, 2.0, 3.0]), max_seconds=0, progress=False)
    assert (found.num_hvps, found.status) == (1, "max_seconds")


def test_draws_that_had_no_time_do_not_count(monkeypatch):
    """With a clock that ticks at each gradient, and time for two draws and a bit."""
    ticks, original = [], sh.EmpiricalRisk.value_and_gradient

    def counting(self, *arguments):
        ticks.append(0)
        return original(self, *arguments)

    monkeypatch.setattr(sh.EmpiricalRisk, "value_and_gradient", counting)
    risk, options = mlp_risk(20), {"subspace_dim": 3, "solver": "ascent", "progress": False}
    whole = sh.subspace_sharpness(risk, 0.05, num_draws=5, **options)
    first, second = (draw.num_evals for draw in whole.draws[:2])
    ticks.clear()
    monkeypatch.setattr(_run, "time", SimpleNamespace(monotonic=lambda: float(len(ticks))))
    limit = first + second + 0.5
    found = sh.subspace_sharpness(risk, 0.05, num_draws=5, max_seconds=limit, **options)
    assert found.status == "max_seconds"
    assert [draw.phi for draw in found.draws] == [draw.phi for draw in whole.draws[:2]]
    assert found.phi == pytest.approx(sum(draw.phi for draw in whole.draws[:2]) / 2)


def test_a_bar_that_was_never_entered_is_never_shown(capsys):
    with pytest.raises(ValueError, match="matrix"):
        sh.lambda_max_sampling(mlp_risk(), matrix="nonsense", progress=True)
    assert "folds" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "progress", "said"),
    [(0.5, None, "800 products: about 7 minutes"), (0.01, None, ""), (0.5, False, "")],
)
def test_what_takes_long_says_so_after_its_first_step(
    seconds, progress, said, monkeypatch, capsys
):
    now = [0.0]
    monkeypatch.setattr("sharpness._run.time.monotonic", lambda: now[0])
    with Run("products", total=800, progress=progress) as run:
        for _ in range(3):
            run.step()
            now[0] += seconds
    err = capsys.readouterr().err
    assert err.count("about") == bool(said)
    assert said in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.6, "8 s"), (59, "59 s"), (61, "1 minute"), (140, "2 minutes")],
)
def test_a_duration_is_grammatical(seconds, text):
    assert duration(seconds) == f"about {text}"
