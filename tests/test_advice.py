"""Advice on a batch size: what follows from times and a race, in words and a picture."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batchsize import SIZES, by_law, race, size, times, value

import sharpness as sh
from sharpness.batchsize import advice as module
from sharpness.batchsize.choice import chosen, to_race, usual_sizes
from sharpness.results import NotAvailableError, Status, load_result

# -- the arithmetic ----------------------------------------------------------------------


def test_the_soonest_is_near_the_root_of_critical_times_knee():
    """t = a + c B and S = S_min (1 + B_crit / B) give B* = sqrt(B_crit a / c)."""
    sizes = tuple(2**k for k in range(2, 14))
    for critical, knee in ((100, 100), (1000, 40), (50, 3000)):
        t = times(sizes, per_sample=1e-3 / knee)
        best = math.sqrt(critical * knee)
        found = chosen(t, by_law(200, 200 * critical, sizes))
        assert best / 1.5 <= found.batch_size <= best * 1.5
        assert found.how == "fitted"
        at_best = 200 * (1 + critical / best) * (1e-3 + 1e-3 / knee * best)
        assert min(found.seconds) >= at_best
        near = found.seconds <= 1.1 * min(found.seconds)
        assert found.near == tuple(np.array(sizes)[near])


def test_sizes_that_were_timed_between_those_raced_are_compared_and_no_others():
    t = times((8, 16, 32, 64, 256, 512, 1024))
    found = chosen(t, by_law(100, 20_000, (16, 64, 256)))
    assert list(found.batch_sizes) == [16, 32, 64, 256]


def test_a_size_that_did_not_run_or_lost_is_never_advised():
    sizes = (64, 128, 256, 512)
    t = times(sizes, survived=[True, False, True, True])
    results = [size(64, 400.0), size(256, math.nan), size(512, 130.0)]
    found = chosen(t, race(results, 90.0, 20_000.0))
    assert list(found.batch_sizes) == [64, 512]


@pytest.mark.parametrize("law", [{"residual": 0.4}, {"s_min": math.nan}])
def test_where_the_law_does_not_fit_the_counted_updates_decide(law):
    results = [size(16, 300.0), size(64, 280.0), size(256, 60.0), size(1024, 59.0)]
    found = chosen(times(), race(results, law.pop("s_min", 50.0), 5000.0, **law))
    assert found.how == "measured"
    assert found.batch_size == 256
    assert found.of(256) == (60.0, pytest.approx(60 * 3.56e-3))
    assert all(map(math.isnan, found.of(17)))


def test_the_interval_of_the_critical_size_says_which_could_be_soonest():
    t = times(tuple(2**k for k in range(3, 15)))
    law = by_law(100, 10_000, (8, 64, 512, 4096), interval=(10.0, None))
    found = chosen(t, law)
    assert found.could_be == (32, 4096)  # sqrt(10 * 100), and the largest compared
    assert found.batch_size == 128


def test_no_size_is_chosen_where_none_reached_the_target():
    assert chosen(times(), race([size(16, math.nan)], math.nan, math.nan)) is None


def test_what_is_raced_holds_every_size_that_could_be_soonest():
    t = times(tuple(2**k for k in range(3, 15)))
    assert to_race(t, None, 128)[0] == 8
    assert to_race(t, None, 128)[-1] == 1024  # the root of 16 384 times the knee, 100
    near = to_race(t, (90.0, 110.0), 128)
    assert near[0] <= 32  # the root of 90 / 16 times the knee, 100
    assert 256 <= near[-1] <= 1024
    assert 128 in near
    assert len(to_race(t, (1e-3, 2e-3), 8)) >= 3
    assert to_race(times(survived=[False] * 4), None, 16) == []


def test_usual_sizes_are_powers_of_two_up_to_the_rows_and_the_one_in_use():
    assert usual_sizes(100, 20) == [8, 16, 20, 32, 64]
    assert usual_sizes(5, 128) == [5]
    assert max(usual_sizes(10**9, 128)) == 2**18


# -- the advice --------------------------------------------------------------------------


def problem():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    y = x @ torch.tensor([[1.0], [-1.0], [2.0], [0.5]])
    y = y + 0.1 * torch.randn(300, 1, generator=draw)
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1), torch.nn.MSELoss(), (x, y)


def advised(monkeypatch, t, r, **settings):
    """Advice from these times and this race; the noise scale is measured."""
    for name, part in (("time_per_update", t), ("race", r)):
        work = part if callable(part) else lambda *_, part=part, **__: part
        monkeypatch.setattr(module, name, work)
    model, loss, data = problem()
    settings = {"lr": 0.01, "batch_size": 16, "optimizer": "sgd"} | settings
    return module.batch_size_advice(model, loss, data, data, progress=False, **settings)


def test_the_answer_comes_first_and_every_number_says_where_it_comes_from(monkeypatch):
    t = times(tuple(2**k for k in range(3, 13)))
    found = advised(monkeypatch, t, by_law(100, 10_000, (8, 64, 512, 4096)))
    lines = str(found).splitlines()
    assert lines[0].startswith("Use 128 (64 to 128), with a learning rate of")
    assert "a validation loss of 0.5" in lines[0]
    assert "Smaller costs time: 8 takes 3.6 times as long" in lines[1]
    assert "Larger buys nothing: 4096 takes" in lines[1]
    assert "Your 16 takes" in lines[1]
    assert lines[-2].startswith("What this cannot tell: one starting point")
    assert lines[-1] == f"It took {found.cost}."
    for line in lines[2:-2]:
        assert any(mark in line for mark in ("measured", "fitted", "assumed")), line
    for reading in found.readings():
        marks = [m for m in ("measured", "fitted", "assumed") if m in reading.evidence]
        assert marks, reading
    assert found.batch_size == 128
    assert found.status is Status.COMPLETED


def test_a_rate_is_measured_where_raced_and_else_scaled_and_called_assumed(monkeypatch):
    law = by_law(100, 10_000, (8, 64, 512, 4096))
    t = times(tuple(2**k for k in range(3, 13)))
    found = advised(monkeypatch, t, law)
    assert found.learning_rate == pytest.approx(2 * law.sizes[1].lr)  # linear: 64 -> 128
    assert found.learning_rate_how == "assumed, by the linear rule from the best at 64"
    found = advised(monkeypatch, times((8, 64, 512, 4096)), law)
    assert found.batch_size == 64
    assert found.learning_rate == law.sizes[1].lr
    assert found.learning_rate_how.startswith("measured, the best of 3")


def test_where_all_are_as_good_no_difference_is_found(monkeypatch):
    t = times(overhead=1e-3, per_sample=1e-9)
    found = advised(monkeypatch, t, by_law(100, 1e-3))
    assert str(found).startswith("No difference found: every size from 16 to 1024")
    assert found.near == SIZES


def test_stable_rates_are_two_over_the_curvature_at_the_end(monkeypatch):
    measures = {
        "lambda_max": value(10.0),
        "batch_sharpness": value(40.0),
        "phi": value(3, None),
    }
    results = [size(b, 100 + 1e4 / b, measures=measures) for b in SIZES]
    found = advised(monkeypatch, times(), race(results, 100, 1e4))
    assert found.stable_rates == pytest.approx({"lambda_max": 0.2, "batch_sharpness": 0.05})
    assert "lambda_max at the end bears up to 0.2 (measured)" in str(found)
    assert "no difference found" in str(found)
    apart = [replace(results[0], measures=measures | {"lambda_max": value(5.0)})]
    other = race([*apart, *results[1:]], 100, 1e4)
    words = str(advised(monkeypatch, times(), other))
    assert "lambda_max 5.000 ± 0.1 and 10.00 ± 0.1;" in words


def test_no_noise_scale_alone_makes_an_advice(monkeypatch):
    lost = race(
        [size(b, math.nan, note="not there in time") for b in SIZES], *[math.nan] * 2
    )
    found = advised(monkeypatch, times(), lost)
    assert found.batch_size is None
    assert found.noise.noise_scale > 0
    assert found.status is Status.NOT_REACHED
    assert str(found).startswith("No size can be advised: none was seen to reach")
    assert "Batch 16: not there in time (measured)." in str(found)
    assert "no advice by itself" in str(found)
    assert math.isnan(found.readings()[0].value)


def test_an_unbounded_interval_is_said_to_be_at_least(monkeypatch):
    found = advised(monkeypatch, times(), by_law(0, 1e4, interval=(300.0, None)))
    assert "critical batch size at least 300 (fitted)" in str(found)
    free = advised(monkeypatch, times(), by_law(0, 1e4, interval=(0.0, None)))
    assert "critical batch size not known" in str(free)
    (critical,) = [r for r in found.readings() if r.name == "critical_batch_size"]
    assert (critical.value, critical.bound) == (300.0, "≥")


def test_what_did_not_fit_is_named_and_the_rest_stands(monkeypatch):
    t = times(survived=[True, True, True, False])
    found = advised(monkeypatch, t, by_law(100, 1e4, SIZES[:3]))
    assert "Batch 1024 was not run: no memory." in str(found)
    assert found.batch_size == 64


def refused(*_, **__):
    raise NotAvailableError("`risk` must have 8 batches; got 1 (not available).")


def test_a_part_that_cannot_be_done_is_a_line_and_the_rest_stands(monkeypatch):
    monkeypatch.setattr(module, "gradient_noise", refused)
    found = advised(monkeypatch, times(), by_law(100, 1e4))
    assert "Note: no gradient noise scale: `risk` must have 8 batches" in str(found)
    assert found.noise is None
    assert found.batch_size == 64


def test_an_interrupt_keeps_what_there_is_and_ends_the_rest(monkeypatch):
    called = []
    t = times(status=Status.INTERRUPTED)
    found = advised(monkeypatch, t, lambda *_, **__: called.append(1))
    assert called == []
    assert found.status is Status.INTERRUPTED
    assert found.interrupted
    assert found.times is t

    def stop(*_, **__):
        raise KeyboardInterrupt

    assert advised(monkeypatch, times(), stop).interrupted


def test_the_time_is_divided(monkeypatch):
    given = {}

    def timed(*_, max_seconds, **__):
        given["times"] = max_seconds
        return times(status=Status.MAX_SECONDS)

    def raced(_, sizes, *, max_seconds, **__):
        given["race"] = max_seconds
        given["sizes"] = sizes
        return by_law(100, 1e4)

    found = advised(monkeypatch, timed, raced, max_seconds=100.0)
    assert given["times"] == 15
    assert 0 < given["race"] <= 100
    assert 3 <= len(given["sizes"]) <= 5
    assert found.status is Status.COMPLETED
    advised(monkeypatch, timed, raced, batch_sizes=SIZES)
    assert given["sizes"] == SIZES


def test_a_race_goes_on_as_long_as_the_soonest_is_the_last_on_its_side(monkeypatch):
    t = times(tuple(2**k for k in range(3, 15)))  # the knee is at 100
    asked = []

    def raced(_, sizes, *, folder, **__):
        asked.append(list(sizes))
        assert Path(folder).is_dir()
        return by_law(100, 1e7, sizes)  # B_crit is 100 000: the best is near 3200

    monkeypatch.setattr(module, "to_race", lambda *_: [16, 64, 256])
    found = advised(monkeypatch, t, raced)
    assert asked[-1] == [16, 64, 256, 1024, 4096, 16384]
    assert found.batch_size == 4096
    asked.clear()
    advised(monkeypatch, t, raced, batch_sizes=[16, 64, 256])
    assert asked == [[16, 64, 256]]


def test_a_target_out_of_reach_is_replaced_by_an_easier_one_and_that_is_said(monkeypatch):
    asked = []

    def raced(_, sizes, *, target, folder, **__):
        asked.append((list(sizes), target, Path(folder).name))
        if target is not None:
            return race([size(16, math.nan)], math.nan, math.nan)
        return by_law(100, 1e4)

    found = advised(monkeypatch, times(), raced, target=0.01, folder="here")
    assert asked[0] == ([16], 0.01, "here")
    assert all((target, name) == (None, "easier") for _, target, name in asked[1:])
    assert "the target 0.01 is not reached by batch 16 in its share" in str(found)
    assert found.batch_size == 64


def test_one_size_alone_is_no_advice(monkeypatch):
    found = advised(monkeypatch, times(), race([size(16, 300.0)], math.nan, math.nan))
    assert str(found).startswith("No size can be advised: only one was raced.")
    assert found.status is Status.NOT_REACHED


def test_sharpness_is_measured_last_and_only_where_time_is_left(monkeypatch):
    measured = []

    def raced(_, sizes, *, measure, **__):
        measured.append(measure)
        return by_law(100, 1e4)

    advised(monkeypatch, times(), raced)
    assert measured == [False, True]
    measured.clear()
    found = advised(monkeypatch, times(per_sample=1.0), raced)
    assert measured == [False]
    assert "sharpness at the ends was left out" in str(found)


def test_it_is_kept_whole_in_a_file_and_shown_as_every_result(monkeypatch, tmp_path):
    found = advised(monkeypatch, times(), by_law(100, 1e4))
    found.save(tmp_path / "advice.safetensors")
    again = load_result(tmp_path / "advice.safetensors")
    assert str(again) == str(found)
    assert list(found.to_frame()["name"])[:2] == ["batch_size", "learning_rate"]
    assert "<table" in found._repr_html_()


def test_the_picture_has_three_panels_with_what_was_measured_and_fitted(
    monkeypatch, tmp_path
):
    found = advised(monkeypatch, times(), by_law(100, 1e4))
    figure = found.plot(tmp_path / "advice.png")
    assert (tmp_path / "advice.png").stat().st_size > 10_000
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "updates to the target",
        "seconds per update",
        "seconds to the target",
    ]
    updates, seconds, product = figure.axes
    np.testing.assert_allclose(
        np.array(updates.lines[0].get_ydata(), float), [725, 256.25, 139.0625, 109.765625]
    )
    assert "knee 100" in [text.get_text() for text in seconds.get_legend().get_texts()]
    (star,) = [line for line in product.lines if line.get_marker() == "*"]
    assert star.get_xdata() == [64]


def test_a_picture_of_nothing_says_so(monkeypatch):
    lost = race([size(16, math.nan)], math.nan, math.nan)
    figure = advised(monkeypatch, times(), lost).plot()
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert said == ["not measured", "not measured"]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"max_seconds": 0}, "`max_seconds` must be positive; got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"lr": -1.0}, "`lr` must be positive; got -1.0"),
        ({"optimizer": "lion"}, "`optimizer` must be one of"),
    ],
)
def test_a_wrong_call_is_one_line(wrong, expected):
    settings = {"lr": 0.1, "batch_size": 16} | wrong
    with pytest.raises(ValueError, match=expected) as caught:
        sh.batch_size_advice(*problem(), **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
