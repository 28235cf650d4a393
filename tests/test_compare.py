"""`compare`: two checkpoints or two groups, pair by pair; its statistics against SciPy."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers.checkpoints import saved, trained, user_folder
from scipy import stats

from sharpness import (
    EmpiricalRisk,
    checkpoint,
    compare,
    measure,
    measurement,
    read_records,
    statistics,
)
from sharpness._json import as_plain
from sharpness.checkpoint import Checkpoint
from sharpness.lab import networks
from sharpness.record import SCHEMA, append_record
from sharpness.report.tables import comparison_notes
from sharpness.statistics import compare_readings

MORE = """
class Drifting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)

def drifting():
    return Drifting(5, 3)

def relu():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

def other_points():
    return points(seed=3)
"""
OPTIONS = ["--data", "nets.py:splits", "--measures", "norms", "--device", "cpu"]
CALL = ["--network", "nets.py:mlp", *OPTIONS]


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Two groups of three trained networks: a0, a1, a2 and b0, b1, b2."""
    with user_folder(tmp_path, monkeypatch, MORE) as module:
        for group, scale in (("a", 1.0), ("b", 3.0)):
            for i in range(3):
                torch.manual_seed(i)
                model = trained(module.mlp(), module.points())
                with torch.no_grad():
                    model[2].weight.mul_(scale)
                saved(model, f"{group}{i}.pt")
        yield module


@pytest.fixture
def measured(monkeypatch):
    """The paths that were really measured, in order."""
    found, original = [], measurement.measured

    def counting(subject, *arguments, **options):
        result = original(subject, *arguments, **options)
        found.append(subject.path)
        return result

    monkeypatch.setattr(measurement, "measured", counting)
    return found


@pytest.fixture
def compared(nets, capsys):
    """What `--json` prints."""

    def call(first, second, *options, common=CALL, code=0):
        assert compare.main([first, second, *common, *options, "--json"]) == code
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        found = json.loads(out, parse_constant=pytest.fail)
        return found["checkpoints"], {row["name"]: row for row in found["comparisons"]}

    return call


def refused(capsys, *arguments):
    try:
        code = compare.main([*arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    return err


# -- the command -------------------------------------------------------------------------

FIRST, SECOND = ["a0.pt", "a1.pt", "a2.pt"], ["b0.pt", "b1.pt", "b2.pt"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a*.pt", "b*.pt"),
        ("a0.pt,a1.pt,a2.pt", "b?.pt"),
        ("a[01].pt,a2.pt", "b0.pt,b[12].pt"),
    ],
)
def test_groups_by_glob_and_by_commas_give_the_numbers_of_their_records(
    compared, first, second
):
    checkpoints, rows = compared(first, second)
    assert checkpoints == [FIRST, SECOND]
    records = {r["checkpoint"]["path"]: r for r in read_records("records.jsonl")}
    assert len(records) == 6
    a, b = (
        np.array([records[p]["measures"]["norms"][0]["parameter_norm"] for p in group])
        for group in (FIRST, SECOND)
    )
    row, logs = rows["parameter_norm"], np.log10(b) - np.log10(a)
    assert row["first"] == pytest.approx([a.mean(), a.std(ddof=1)], rel=1e-12)
    assert row["second"] == pytest.approx([b.mean(), b.std(ddof=1)], rel=1e-12)
    assert row["ratios"] == pytest.approx(b / a, rel=1e-12)
    expected = stats.ttest_1samp(logs, 0, alternative="greater").pvalue
    assert row["p_value"] == pytest.approx(expected, rel=1e-9)
    gaps = [records[p]["generalisation"]["accuracy_gap"] for p in FIRST + SECOND]
    tau = stats.kendalltau([*a, *b], gaps).statistic
    assert row["kendall_tau"] == (pytest.approx(tau) if math.isfinite(tau) else None)


def test_one_pair_is_told_by_its_errors_and_not_by_a_test(nets, compared, capsys):
    options = ["--measures", "lambda_max,norms"]
    _, rows = compared("a0.pt", "b0.pt", *options)
    row = rows["lambda_max"]
    assert row["num_pairs"] == 1
    assert row["beyond_error"] is True
    assert row["p_value"] is None
    assert rows["parameter_norm"]["beyond_error"] is None
    assert compare.main(["a0.pt", "b0.pt", *CALL, *options]) == 0
    out = capsys.readouterr().out
    assert "not a statistical test" in out
    assert "(no error known)" in out
    assert "a0.pt" in out
    assert "b0.pt" in out


def test_what_was_measured_is_not_measured_again(nets, compared, measured):
    before = compared("a*.pt", "b*.pt")
    assert measured == FIRST + SECOND
    assert compared("a*.pt", "b*.pt") == before
    assert len(measured) == 6
    assert len(read_records("records.jsonl")) == 6
    compared("b*.pt", "a0.pt,a1.pt,a2.pt")
    assert len(measured) == 6


def test_records_of_the_command_measure_are_taken(nets, compared, measured, capsys):
    assert measure.main(["a0.pt", *CALL]) == 0
    capsys.readouterr()
    compared("a0.pt", "b0.pt")
    assert measured == ["a0.pt", "b0.pt"]


CHANGES = ["--seed 1", "--num-samples 9", "--split test", "--dtype float64", "--rho 0.3"]
CHANGES += ["--measures norms,average", "--data nets.py:points", "--network nets.py:relu"]
CHANGES += ["--data nets.py:other_points", "--loss torch.nn:MultiMarginLoss"]
CHANGES += ["--output elsewhere.jsonl"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_measured_anew(nets, compared, measured, change):
    compared("a0.pt", "b0.pt")
    compared("a0.pt", "b0.pt", *change.split())
    assert measured == ["a0.pt", "b0.pt"] * 2


def test_another_file_of_the_same_name_is_measured_anew(nets, compared, measured):
    compared("a0.pt", "b0.pt")
    saved(nets.mlp(), "a0.pt")
    compared("a0.pt", "b0.pt")
    assert measured == ["a0.pt", "b0.pt", "a0.pt"]


def test_other_arrays_in_the_same_npz_file_are_measured_anew(nets, compared, measured):
    values = []
    for seed in (0, 1):
        x, y = nets.points(seed=seed)
        np.savez("d.npz", x=x.numpy(), y=y.numpy())
        _, rows = compared("a0.pt", "b0.pt", "--data", "d.npz")
        values.append(rows["gradient_norm"]["first"][0])
    assert values[0] != values[1]
    assert len(measured) == 4


def test_lines_of_others_in_the_record_file_are_passed_over(nets, compared, measured):
    for checkpoint_facts in ("x", None, [], {}):
        append_record("records.jsonl", {"schema": SCHEMA, "checkpoint": checkpoint_facts})
    with open("records.jsonl", "a") as file:
        file.write('{"schema": 1, "torn')
    compared("a0.pt", "b0.pt")
    compared("a0.pt", "b0.pt")
    assert measured == ["a0.pt", "b0.pt"]


def test_an_interrupted_measurement_is_not_taken_for_a_whole_one(
    nets, compared, measured, monkeypatch, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EmpiricalRisk, "product", interrupt)
        options = ["--measures", "lambda_max,norms"]
        assert compare.main(["a0.pt", "b0.pt", *CALL, *options]) != 0
    capsys.readouterr()
    assert measured == ["a0.pt"]
    _, rows = compared("a0.pt", "b0.pt", *options)
    assert set(rows) == {"lambda_max", "gradient_norm", "parameter_norm", "fisher_rao"}


def native(nets, monkeypatch, seeds, name):
    monkeypatch.setitem(networks.NETWORKS, "M", nets.mlp)
    facts = {"network": {"name": "M", "arguments": {}}, "data": {"name": "digits"}}
    for i, seed in enumerate(seeds):
        training = {"seed": seed, "batch_size": 8, "epoch": 1}
        own = {"state_dict": nets.mlp().state_dict(), "training": training, "start": {}}
        checkpoint.save(f"{name}{i}.pt", Checkpoint(**facts, **own))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [3, 1, 2], ["d1.pt", "d2.pt", "d0.pt"]),
        ([1, 2, 3], [3, 1, 4], ["d0.pt", "d1.pt", "d2.pt"]),
        ([1, 1, 3], [3, 1, 1], ["d0.pt", "d1.pt", "d2.pt"]),
        ([1, None, 3], [3, 1, None], ["d0.pt", "d1.pt", "d2.pt"]),
    ],
)
def test_pairs_share_a_seed_where_the_checkpoints_tell_it(
    nets, compared, monkeypatch, first, second, expected
):
    native(nets, monkeypatch, first, "c")
    native(nets, monkeypatch, second, "d")
    checkpoints, _ = compared("c?.pt", "d?.pt", common=OPTIONS)
    assert checkpoints == [["c0.pt", "c1.pt", "c2.pt"], expected]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a*.pt", "b0.pt", "got 3 and 1"),
        ("a*.pt", "b*.pt,a0.pt", "got 3 and 4"),
        ("a0.pt", "gone.pt", "gone.pt"),
        ("a0.pt", "gone*.pt", "'gone*.pt'"),
        ("a0.pt", "", "second"),
        (",", ",", "first"),
    ],
)
def test_wrong_groups_are_one_line_before_anything_is_measured(
    nets, tmp_path, capsys, measured, first, second, expected
):
    assert expected in refused(capsys, first, second, *CALL)
    assert measured == []
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--measures", "sharpnes"], "'sharpnes'"),
        (["--figure", "a0.pt/x.png"], "--figure"),
        (["--figure", "x.nothing"], "--figure"),
        (["--network", "nets.py:gone"], "'gone'"),
        (["--audit"], "--audit"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_measured(
    nets, capsys, measured, options, expected
):
    assert expected in refused(capsys, "a0.pt", "b0.pt", *CALL, *options)
    assert measured == []


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [("a*.pt", "b*.pt", "c.png"), ("a0.pt", "a0.pt", "new/folder/c.png")],
)
def test_a_figure_is_a_png(nets, tmp_path, capsys, first, second, name):
    assert compare.main([first, second, *CALL, "--figure", name]) == 0
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / name).stat().st_size > 5000


def test_a_figure_without_a_positive_measure_is_drawn(nets, tmp_path, capsys):
    """The gradient of a constant network is zero, and so is its Fisher-Rao norm."""
    model = nets.mlp()
    torch.nn.init.zeros_(model[2].weight)
    saved(model, "zero.pt")
    call = ["zero.pt", "zero.pt", *CALL, "--measures", "average", "--figure", "c.png"]
    assert compare.main(call) == 0
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_group_compared_with_itself_differs_nowhere(nets, compared, capsys):
    _, rows = compared("a*.pt", "a*.pt")
    for row in rows.values():
        assert row["first"] == row["second"]
        assert row["num_larger"] == 0
        assert row["p_value"] is None
        assert row["sign_flip_p"] == 1.0
        assert row["effect_size"] is None
    assert compare.main(["a*.pt", "a*.pt", *CALL]) == 0
    out = capsys.readouterr().out
    assert out.count("no difference shown") == len(rows)
    assert compare.main(["a0.pt", "a0.pt", *CALL]) == 0
    assert "within the errors" in capsys.readouterr().out


def test_time_that_ran_out_exits_1(nets, capsys):
    options = ["--measures", "lambda_max", "--max-seconds", "1e-9"]
    assert compare.main(["a0.pt", "b0.pt", *CALL, *options]) == 1


# -- the statistics ----------------------------------------------------------------------


def readings(values, error=None, name="m"):
    return [{name: {"value": value, "error": error}} for value in values]


def compare_values(a, b, gaps=None, error=None):
    gaps = [None] * (len(a) + len(b)) if gaps is None else gaps
    [row] = compare_readings(readings(a, error), readings(b, error), gaps)
    return row


def sign_flips(d):
    """Share of all sign patterns whose mean is at least the one seen."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(d))))
    means = (signs * d).mean(1)
    return float((means >= d.mean() - 1e-12 * abs(d.mean())).mean())


def drawn(case):
    rng = np.random.default_rng(case)
    num = int(rng.integers(2, 11))
    a = np.exp(rng.normal(size=num))
    return a, a * np.exp(rng.normal(rng.choice([-0.5, 0, 0.5]), 0.5, num)), rng


@pytest.mark.parametrize("case", range(12))
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_every_number_is_that_of_scipy_and_of_enumeration(case, shift):
    a, b, rng = drawn(case)
    a, b = a - shift, b - shift
    gaps = rng.normal(size=2 * len(a))
    positive = min(a.min(), b.min()) > 0
    d = np.log10(b) - np.log10(a) if positive else b - a
    row = compare_values(a, b, gaps.tolist())
    tau = stats.kendalltau(np.concatenate([a, b]), gaps)
    assert row.scale == ("log10" if positive else "linear")
    assert row.num_pairs == len(a)
    assert row.num_larger == sum(y > x for x, y in zip(a, b, strict=True))
    assert row.first == pytest.approx((a.mean(), a.std(ddof=1)), rel=1e-12)
    assert row.effect_size == pytest.approx(d.mean() / d.std(ddof=1), rel=1e-9)
    expected = stats.ttest_1samp(d, 0, alternative="greater").pvalue
    assert row.p_value == pytest.approx(expected, rel=1e-9)
    assert row.sign_flip_p == pytest.approx(sign_flips(d), rel=1e-12)
    assert row.sign_flip_smallest == 0.5 ** len(a)
    assert row.beyond_error is None
    assert row.kendall_tau == pytest.approx(tau.statistic, abs=1e-12)
    assert row.kendall_p == pytest.approx(tau.pvalue, rel=1e-9)
    if positive:
        assert row.ratio == pytest.approx(stats.gmean(b / a), rel=1e-12)
        assert row.ratios == pytest.approx(tuple(b / a), rel=1e-15)
    else:
        assert row.ratios == ()
        assert math.isnan(row.ratio)


@pytest.mark.parametrize("num", [1, 2, 5, 13, 16])
def test_the_least_sign_flip_p_is_reached_where_all_pairs_agree(num):
    a = np.linspace(1, 2, num)
    row = compare_values(a, a * np.linspace(2, 3, num))
    assert row.sign_flip_smallest == (0.5**num if num <= 13 else 1e-4)
    assert row.sign_flip_p == pytest.approx(row.sign_flip_smallest, rel=1e-9)


@pytest.mark.parametrize("b", [[0, 2, 4], [-2, -3, -5], [0, 0, 0]])
def test_values_without_a_logarithm_are_compared_as_they_are(b):
    row = compare_values([1e-300, 0, 3], b, [0.1 * i for i in range(6)])
    assert (row.scale, row.ratios) == ("linear", ())
    assert isinstance(row.verdict, str)
    json.dumps(as_plain(row), allow_nan=False)


@pytest.mark.parametrize(
    ("a", "b", "error", "beyond", "verdict"),
    [
        (1.0, 2.0, 0.4, True, "second larger"),
        (2.0, 1.0, 0.4, True, "second smaller"),
        (1.0, 2.0, 0.6, False, "within the errors"),
        (1.0, 2.0, None, None, "second larger (no error known)"),
        (2.0, 1.0, None, None, "second smaller (no error known)"),
        (1.0, 1.0, None, None, "within the errors"),
        (1.0, 1.0, 0.0, False, "within the errors"),
        (-1.0, 1.0, 0.0, True, "second larger"),
    ],
)
def test_one_pair_is_judged_by_both_errors(a, b, error, beyond, verdict):
    row = compare_values([a], [b], error=error)
    assert row.beyond_error is beyond
    assert row.verdict == verdict
    assert math.isnan(row.p_value)
    assert row.kendall_tau is None


def test_verdicts_say_larger_or_smaller_and_where():
    low, high = np.array([1.0, 1.1, 0.9, 1.0]), np.array([2.0, 2.3, 1.7, 2.2])
    assert compare_values(low, high).verdict == "second larger in every pair"
    assert compare_values(high, low).verdict == "second smaller in every pair"
    assert compare_values(low, low[::-1]).verdict == "no difference shown"
    mostly = np.array([2.0, 2.1, 2.2, 1.9, 2.0, 2.3, 0.95])
    row = compare_values(np.ones(7), mostly)
    assert (row.num_larger, row.verdict) == (6, "second larger")
    assert compare_values(mostly, np.ones(7)).verdict == "second smaller"


@pytest.mark.parametrize("num", [2, 4, 5, 6, 7, 15])
@pytest.mark.parametrize("change", ["times 2", "times 0.5", "minus 7", "none"])
def test_differences_without_a_spread_are_judged_by_their_signs(num, change):
    a = np.linspace(1, 3, num)
    b = {"times 2": 2 * a, "times 0.5": a / 2, "minus 7": a - 7, "none": a}[change]
    side = "larger" if change == "times 2" else "smaller"
    is_shown = num >= 6 and change != "none"  # 2 ** -6 is below 2.5 %
    said = f"second {side} in every pair" if is_shown else "no difference shown"
    if num == 2 and change != "none":
        said = f"second {side} in both pairs, too few to test"
    assert compare_values(a, b).verdict == said


def test_two_pairs_are_told_alike_however_like_their_differences_are():
    """A t test of two differences finds what is alike, not what is large."""
    alike, apart = ([0.5, 0.50001], [0.5, 0.01])
    said = {compare_values([1.0, 1.0], b).verdict for b in (alike, apart)}
    assert said == {"second smaller in both pairs, too few to test"}
    assert compare_values([1.0, 1.0], [0.5, 2.0]).verdict == "no difference shown"


def test_a_bound_keeps_its_sign_in_a_comparison():
    low = [{"phi": {"value": 2.0, "error": None, "bound": "≥"}}]
    (row,) = compare_readings(low, low, [None, None])
    assert (row.first_text, row.second_text) == ("≥ 2", "≥ 2")
    assert row.verdict == "the same was found"


@pytest.mark.parametrize("num", [1, 2, 6])
def test_two_bounds_have_no_order(num):
    """phi of 4 % more is what the same search found, not a sharper network."""
    low, high = ([{"phi": {"value": v, "error": None, "bound": "≥"}}] for v in (2.0, 2.08))
    (row,) = compare_readings(low * num, high * num, [None] * 2 * num)
    said = {1: ", bounds have no order", 2: " in both pairs, too few to test"}
    assert row.verdict == f"second found larger{said.get(num, ' in every pair')}"
    assert any("true value may be" in n for n in comparison_notes([row], [None] * 2 * num))


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_tie_is_neither_larger_nor_smaller(factor):
    b = np.array([1.0, *np.linspace(0.97, 1.03, 7) * factor])
    row = compare_values(np.ones(8), b)
    assert min(row.p_value, 1 - row.p_value) < 0.025
    assert row.verdict == f"second {'larger' if factor > 1 else 'smaller'}"


def test_a_ratio_that_is_the_same_everywhere_has_no_effect_size_of_rounding():
    a = np.array([0.1, 0.7, 1.3, 2.9, 11.0])
    row = compare_values(a, 1.1 * a)
    assert row.num_larger == 5
    assert not 1e6 < abs(row.effect_size) < math.inf


def test_verdicts_err_in_one_case_of_twenty_where_nothing_differs(monkeypatch):
    monkeypatch.setattr(statistics, "sign_flip", lambda d: math.nan)  # slow, not used
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.normal(size=(2, 1000, 5)))
    said = [compare_values(x, y).verdict for x, y in zip(a, b, strict=True)]
    wrong = sum(verdict != "no difference shown" for verdict in said)
    assert wrong <= stats.binom.ppf(0.999, 1000, 0.05)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("case", range(5))
def test_with_ties_the_p_of_tau_is_the_share_of_all_orders(num, case):
    rng = np.random.default_rng(case)
    values, gaps = rng.integers(1, 4, (2, 2 * num)).astype(float)
    values[0], values[1], gaps[:2] = 1, 1, (0, 9)  # at least one tie, never all alike
    values[2] = 4

    def concordance(order):
        pairs = itertools.combinations(range(2 * num), 2)
        moved = values[list(order)]
        return sum(np.sign((moved[i] - moved[j]) * (gaps[i] - gaps[j])) for i, j in pairs)

    row = compare_values(values[:num], values[num:], gaps.tolist())
    orders = [concordance(o) for o in itertools.permutations(range(2 * num))]
    share = np.mean(np.abs(orders) >= abs(concordance(range(2 * num))))
    assert row.kendall_p == pytest.approx(share, rel=1e-12)
    assert row.kendall_tau == pytest.approx(stats.kendalltau(values, gaps).statistic)


def test_beyond_eight_checkpoints_orders_are_drawn():
    values = np.repeat([1.0, 2.0], 6)
    row = compare_values(values[:6], values[6:], np.arange(12.0).tolist())
    fewest = 2 / math.comb(12, 6)  # two of the ways to place six ones
    assert row.kendall_p == pytest.approx(fewest, abs=5e-4)


def test_gaps_that_are_unknown_are_left_out_of_tau():
    a, b = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    row = compare_values(a, b, [0.3, None, 0.1, 0.2, None, 0.5])
    expected = stats.kendalltau([1, 3, 4, 6], [0.3, 0.1, 0.2, 0.5])
    assert row.kendall_tau == pytest.approx(expected.statistic)
    assert compare_values(a, b, [0.3, None, None, 0.2, None, 0.5]).kendall_tau is None
    assert compare_values(a, b, [0.5] * 6).kendall_tau is None


@pytest.mark.parametrize("absent", [None, math.nan])
def test_a_measure_that_some_checkpoint_lacks_is_left_out(absent):
    first = [{**r, "n": {"value": 1.0, "error": None}} for r in readings([1.0, 2.0])]
    second = [{**r, "n": {"value": absent, "error": None}} for r in readings([3.0, 4.0])]
    assert [r.name for r in compare_readings(first, second, [None] * 4)] == ["m"]
    assert compare_readings(first, readings([1.0, 2.0], name="o"), [None] * 4) == []


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, 2.0], [])])
def test_groups_that_do_not_pair_are_refused(a, b):
    with pytest.raises(ValueError, match=f"got {len(a)} and {len(b)}"):
        compare_readings(readings(a), readings(b), [None] * (len(a) + len(b)))


@pytest.mark.parametrize("num", [1, 3, 5])
def test_gaps_that_are_too_few_or_too_many_are_refused_by_name(num):
    with pytest.raises(ValueError, match="`gaps`"):
        compare_readings(readings([1.0, 2.0]), readings([2.0, 3.0]), [0.1] * num)
