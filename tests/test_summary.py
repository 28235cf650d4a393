"""All measures of one risk: what runs where, notes, interrupts, and how it is shown."""

from __future__ import annotations

import copy
import json
import math
from functools import cache

import pytest
import torch
from helpers.problems import by_hand, mlp_hessian, mlp_risk, quadratic, second_minimum
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sharpness as sh
from sharpness import results
from sharpness._results import Reading, Result, number
from sharpness._saving import restored
from sharpness.measures import summary as summary_module
from sharpness.measures.registry import DEFAULT_FAMILIES, FAMILIES, MEASURES
from sharpness.measures.summary import RUNS, MeasureSettings, expected_seconds, selected
from sharpness.report.figures import readings_plot
from sharpness.report.tables import readings_text
from sharpness.results import Norms, Summary
from sharpness.risk.empirical import EmpiricalRisk

RULED = [name for name in RUNS if name.startswith(("worst", "average"))]


def samples(num: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(num) % 3
    x = torch.randn((num, 4), generator=draw, dtype=torch.float64)
    return x + 1.5 * torch.eye(3, 4, dtype=torch.float64)[y], y


@cache
def trained(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(3)] if norm else []
        layers = [nn.Linear(4, 3), *norms, nn.ReLU(), nn.Linear(3, 3)]
        network = nn.Sequential(*layers).double()
    x, y = samples()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


def classifier() -> EmpiricalRisk:
    x, y = samples()
    network = copy.deepcopy(trained(norm=True)).float()
    return EmpiricalRisk(network, nn.CrossEntropyLoss(), (x.float(), y))


def regression() -> EmpiricalRisk:
    x, _ = samples()
    target = torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2].cos()], 1)
    return EmpiricalRisk(trained(), nn.MSELoss(), (x, target))


def with_closure() -> EmpiricalRisk:
    x, y = samples()
    batches = [{"x": x[i : i + 20], "y": y[i : i + 20]} for i in (0, 20)]
    return EmpiricalRisk(
        trained(), closure=lambda m, b: cross_entropy(m(b["x"]), b["y"]), data=batches
    )


def one_sample() -> EmpiricalRisk:
    x, y = samples(1)
    return EmpiricalRisk(trained(), nn.CrossEntropyLoss(), (x, y))


KINDS = {
    "classifier": classifier,
    "regression": regression,
    "closure": with_closure,
    "one sample": one_sample,
    "one parameter": lambda: quadratic([2.0], at=torch.tensor([1.5])),
}
OF_CLASSES = {
    "worst_normalised",
    "pac_bayes_sigma",
    "pac_bayes_sigma_magnitude",
    "box_alpha",
    "box_alpha_magnitude",
}
NOISE = {"noise_scale", "batch_sharpness"}
MEANINGLESS = {
    "regression": OF_CLASSES,
    "closure": OF_CLASSES | {"lambda_max_sampling", "noise_scale", "worst_l2_sharded"},
    "one sample": {"lambda_max_sampling", "noise_scale"},
    "one parameter": OF_CLASSES
    | {"lambda_max_sampling", "relative_flatness", "worst_l2_sharded", *NOISE},
}


@cache
def risk_of(kind: str) -> EmpiricalRisk:
    return KINDS[kind]()


# -- every measure everywhere --------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_measure_gives_a_number_or_says_why_there_is_none(kind, name):
    found = sh.summary(risk_of(kind), name, epsilon=(1e-3,))
    assert list(found.results) == [name]
    assert found.results[name]
    for result in found.results[name]:
        assert str(result)
        if name in MEANINGLESS.get(kind, ()):
            assert result.status == "not_available"
            assert result.note
            assert "\n" not in result.note
            assert name in str(result)
        else:
            assert result.status in ("completed", "converged", "not_reached")
    for reading in found.readings():
        assert reading.name
        assert reading.evidence
        assert reading.error is None or reading.error >= 0
        assert math.isfinite(reading.value) == all(r.status.ok for r in found.results[name])
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_every_number_has_a_name_of_its_own():
    settings = {"k": 3, "rho": (0.01, 0.05), "max_seconds": 0.05}
    found = sh.summary(risk_of("classifier"), FAMILIES, **settings)
    names = [reading.name for reading in found.readings()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("size", [7, 40])
def test_shards_are_named_apart_from_the_whole(size):
    names = ["worst_l2", "worst_l2_sharded"]
    found = sh.summary(risk_of("classifier"), names, shard_size=size)
    assert len({reading.name for reading in found.readings()}) == 4


@pytest.mark.parametrize("name", ["worst_l2_sharded", "lambda_max_sampling"])
def test_batch_statistics_cannot_be_cut_into_shards_or_folds(name):
    network, loss = trained(norm=True), nn.CrossEntropyLoss()
    risk = EmpiricalRisk(network, loss, samples(), batchnorm="batch")
    found = sh.summary(risk, ["norms", name], shard_size=10)
    assert found[name].status == "not_available"
    assert found["norms"].status.ok


def test_values_are_those_of_formulas_written_out_again():
    risk, start = mlp_risk(), second_minimum()
    found = sh.summary(risk, ["lambda_max", "norms"], k=3, start=start)
    value, accuracy = by_hand(risk.theta.numpy())
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.accuracy == accuracy
    readings = {reading.name: reading for reading in found.readings()}
    top = torch.linalg.eigvalsh(mlp_hessian(risk.theta)).flip(0).tolist()
    for name, expected in zip(["lambda_max", "lambda_2", "lambda_3"], top, strict=False):
        bound = readings[name].error
        assert abs(readings[name].value - expected) <= bound + 1e-12 * top[0]
        assert bound <= 1e-2 * abs(expected)
    length, way = float(risk.theta.norm()), float((risk.theta - start).norm())
    assert readings["parameter_norm"].value == pytest.approx(length, rel=1e-12)
    assert readings["distance_from_start"].value == pytest.approx(way, rel=1e-12)


@pytest.mark.parametrize(
    ("which", "k", "expected"),
    [
        ("LA", 3, {"lambda_max": 5.0, "lambda_2": 3.0, "lambda_3": 1.0}),
        ("SA", 2, {"lambda_n-1": -2.0, "lambda_min": -7.0}),
        ("BE", 3, {"lambda_max": 5.0, "lambda_2": 3.0, "lambda_min": -7.0}),
        ("LM", 2, {"lambda(1 of 2)": 5.0, "lambda(2 of 2)": -7.0}),
    ],
)
def test_eigenvalues_are_named_by_their_place_in_the_spectrum(which, k, expected):
    risk = quadratic([5.0, 3.0, 1.0, -2.0, -7.0])
    found = sh.eigenpairs(risk, k, which=which, tol=1e-8).readings()
    assert [reading.name for reading in found] == list(expected)
    for reading, value in zip(found, expected.values(), strict=True):
        assert reading.value == pytest.approx(value, rel=1e-8)


PUBLIC = [getattr(results, name) for name in results.__all__]
CLASSES = [k for k in PUBLIC if isinstance(k, type) and issubclass(k, Result)]
RESULTS = [kind for kind in CLASSES if kind is not Result]
assert len(RESULTS) > 10


@pytest.mark.parametrize("kind", RESULTS)
def test_every_result_has_readings(kind):
    assert (kind._rows, kind.readings) != (Result._rows, Result.readings)


class Shaped(nn.Module):
    def __init__(self, width: int, shape) -> None:
        super().__init__()
        self.layer, self.shape = nn.Linear(4, width, dtype=torch.float64), shape

    def forward(self, x):
        return self.shape(self.layer(x))


UNUSUAL = {
    "several outputs": (
        Shaped(3, lambda z: (z, z.sum())),
        lambda out, y: cross_entropy(out[0], y),
    ),
    "one output": (
        Shaped(1, lambda z: z[:, 0]),
        lambda out, y: nn.functional.binary_cross_entropy_with_logits(
            out, (y > 0).double()
        ),
    ),
    "classes last": (
        Shaped(15, lambda z: z.view(-1, 5, 3)),
        lambda out, y: cross_entropy(out.flatten(0, 1), y.repeat_interleave(5)),
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_outputs_that_are_no_logits_have_no_accuracy_but_a_curvature(case):
    model, loss = UNUSUAL[case]
    risk = EmpiricalRisk(model, loss, samples(), terms=len)
    found = sh.summary(risk, ["lambda_max", "box_alpha"])
    assert found.accuracy is None
    assert found["lambda_max"].status.ok
    assert found["box_alpha"].status == "not_available"


# -- which ones, with which settings -------------------------------------------------


def test_names_and_families_give_measures_in_the_order_of_the_list():
    assert selected("curvature") == ["lambda_max", "trace"]
    assert selected(("norms", "trace", "norms", "curvature")) == [
        "lambda_max",
        "trace",
        "norms",
    ]
    assert selected(FAMILIES) == list(RUNS)
    families = {MEASURES[name].family for name in selected(None)}
    assert families == {"curvature", "epsilon"}
    assert set(DEFAULT_FAMILIES) == families
    assert selected("all") == selected(["phi", "all"]) == list(RUNS)
    assert not set(FAMILIES) & set(RUNS) - {"norms"}


@pytest.mark.parametrize(
    ("wrong", "close"),
    [
        ("lambda_mx", "lambda_max"),
        ("curvatures", "curvature"),
        ("worst_l2_elementwis", "worst_l2_elementwise"),
        ("xyzzy", None),
    ],
)
def test_an_unknown_name_is_refused_with_a_close_one(wrong, close):
    with pytest.raises(ValueError, match="`measures` must be of") as error:
        sh.summary(risk_of("classifier"), ["norms", wrong])
    with pytest.raises(ValueError, match="`measures` must be of"):
        selected([])
    text = str(error.value)
    assert repr(wrong) in text
    assert "\n" not in text
    assert text.endswith(f"Did you mean {close}?") if close else "Did you mean" not in text


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lambda_max", {"k": 0}),
        ("lambda_max", {"tol": 0.0}),
        ("phi", {"epsilon": (1e-3, 0.0)}),
        ("phi", {"epsilon": -1e-3}),
        ("phi", {"num_starts": 0}),
        ("phi_subspace", {"subspace_dim": 0}),
        ("phi_subspace", {"subspace_dim": -3}),
        ("worst_l2", {"rho": (-1.0,)}),
        ("average", {"rho": math.inf}),
        ("worst_l2_sharded", {"shard_size": 0}),
        ("pac_bayes_sigma", {"accuracy_drop": 1.5}),
        ("norms", {"start": torch.ones(3)}),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(name, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must") as error:
        sh.summary(risk_of("classifier"), name, **settings)
    assert "\n" not in str(error.value)


def test_what_is_measured_by_default_are_at_most_ten_numbers():
    assert len(sh.summary(risk_of("classifier")).readings()) <= 10


def test_numbers_come_as_they_are_done():
    told: list[list[Reading]] = []
    risk, measures = risk_of("classifier"), ["lambda_max", "phi", "norms"]
    found = sh.summary(risk, measures, on_readings=told.append)
    assert [rows[0].name for rows in told] == ["lambda_max", "phi(1e-3)", "gradient_norm"]
    assert [row for rows in told for row in rows] == found.readings()


def test_a_single_radius_is_a_list_of_one():
    found = sh.summary(risk_of("classifier"), ["phi", "worst_l2"], epsilon=1e-4, rho=1)
    assert found.settings["epsilon"] == (1e-4,)
    assert found["phi"].settings["epsilon"] == 1e-4
    assert found["worst_l2"].settings["rho"] == 1
    with pytest.raises(TypeError, match="epsilons"):
        sh.summary(risk_of("classifier"), "norms", epsilons=(1e-3,))


def test_one_result_comes_by_itself_and_several_in_a_list():
    found = sh.summary(risk_of("classifier"), ["phi", "norms"], epsilon=(1e-3, 5e-4))
    assert [result.settings["epsilon"] for result in found["phi"]] == [1e-3, 5e-4]
    assert isinstance(found["norms"], Norms)
    with pytest.raises(KeyError, match=r"'trace' was not measured; there are \['phi'"):
        found["trace"]


def test_the_same_seed_gives_the_same_bits_and_another_one_other_draws():
    risk, names = risk_of("classifier"), ["phi", "average", "pac_bayes_sigma", "lambda_max"]
    first, again, other = (sh.summary(risk, names, seed=s) for s in (1, 1, 2))
    values = [[r.value for r in found.readings()] for found in (first, again, other)]
    assert values[0] == values[1]
    assert first["average"].value != other["average"].value
    assert first["phi"][0].phi_protocol != other["phi"][0].phi_protocol


def test_the_model_and_the_random_generators_are_left_as_they_were():
    x, y = samples()
    network = copy.deepcopy(trained(norm=True)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    sh.summary(EmpiricalRisk(network, nn.CrossEntropyLoss(), (x, y)), max_seconds=0.05)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(m.training for m in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# -- what is refused and what is noted -----------------------------------------------


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_anything_is_measured(wrong):
    (x, y), network = samples(), copy.deepcopy(trained())
    with torch.no_grad():
        network[2].bias[0] = wrong
    risk, estimates = EmpiricalRisk(network, nn.CrossEntropyLoss(), (x, y)), []
    with pytest.raises(ValueError, match=r"`risk` must be finite; got f\(theta\) =") as e:
        sh.summary(risk, on_estimate=estimates.append)
    assert "\n" not in str(e.value)
    assert not estimates


def noted(risk: EmpiricalRisk, text: str, measures=("lambda_max", "norms")) -> bool:
    return any(text in note for note in sh.summary(risk, measures).notes)


def test_a_trained_classifier_has_no_notes():
    risk = EmpiricalRisk(trained(), nn.CrossEntropyLoss(), samples())
    assert sh.summary(risk, ["lambda_max", "norms"]).notes == []


def test_one_sample_is_noted():
    assert noted(risk_of("one sample"), "One sample only")
    assert not noted(risk_of("one sample"), "one class")
    assert not noted(risk_of("classifier"), "One sample only")


@pytest.mark.parametrize("num_ignored", [0, 10])
def test_one_class_is_noted_whatever_is_ignored(num_ignored):
    x, y = samples()
    y = torch.full_like(y, 2)
    y[:num_ignored] = -100
    assert noted(EmpiricalRisk(trained(), nn.CrossEntropyLoss(), (x, y)), "of one class")
    assert not noted(risk_of("classifier"), "of one class")


@pytest.mark.parametrize(
    ("num_right", "near"), [(0, True), (5, True), (6, False), (8, False)]
)
def test_accuracy_near_chance_is_noted(num_right, near):
    model = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    model.weight.data = torch.eye(4, dtype=torch.float64)
    seen = torch.arange(20) % 4  # is what the model answers
    y = torch.where(torch.arange(20) < num_right, seen, (seen + 1) % 4)
    x = torch.eye(4, dtype=torch.float64)[seen]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))
    assert sh.summary(risk, "norms").accuracy == num_right / 20
    assert noted(risk, "near chance for 4 classes") is near


def test_a_loss_that_depends_on_no_parameter_is_noted():
    risk = EmpiricalRisk(trained(), lambda out, y: 0 * out.sum() + 1, samples())
    assert noted(risk, "does not depend on the parameters")


def test_an_exact_minimum_is_not_called_a_constant_loss():
    assert not noted(quadratic([3.0, 1.0]), "does not depend on the parameters")


# f = h/2 t^2, held at t = d: the rise to d + e is h d e + h e^2 / 2, of which the slope
# explains 1 / (1 + e / 2 d); the box of phi is e = epsilon (d + 1).
@pytest.mark.parametrize("share", [0.05, 0.095, 0.105, 0.5, 0.9])
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_a_slope_that_explains_a_tenth_of_a_rise_is_noted(share, offset):
    epsilon = 1e-2
    odds = share / (1 - share) * epsilon / 2  # d / (d + 1)
    risk = quadratic([2.0], at=torch.tensor([odds / (1 - odds)]), offset=offset)
    found = sh.summary(risk, ["lambda_max", "phi"], epsilon=epsilon)
    told = [note for note in found.notes if "Not a minimum" in note]
    assert bool(told) is (share > 0.1)
    if told:
        assert f"explains {share:.0%} of phi(0.01)" in told[0] or share == 0.105
        assert "Train until" in told[0]


def test_a_curvature_without_a_rise_is_noted_only_where_nothing_curves_upwards():
    away = quadratic([2.0], at=torch.ones(1))
    assert not noted(away, "Not a minimum", "lambda_max")
    assert noted(quadratic([-2.0, -1.0], at=torch.ones(2)), "Not a minimum", "lambda_max")
    assert noted(away, "explains 9", ["worst_l2", "norms"])


# -- time and interrupts -------------------------------------------------------------


def test_every_measure_is_expected_to_take_some_time_within_the_limit():
    risk = risk_of("classifier")
    found = expected_seconds(risk, RUNS, MeasureSettings())
    assert list(found) == list(RUNS)
    assert all(0 < seconds < math.inf for seconds in found.values())
    limited = expected_seconds(risk, RUNS, MeasureSettings(max_seconds=1e-6))
    assert set(limited.values()) == {1e-6}


def test_the_estimate_is_told_before_anything_is_measured(monkeypatch):
    told, (run, cost) = [], RUNS["norms"]
    noted = lambda *given: (told.append("norms"), run(*given))[1]  # noqa: E731
    monkeypatch.setitem(RUNS, "norms", (noted, cost))
    sh.summary(risk_of("classifier"), "norms", on_estimate=told.append)
    assert told[0] > 0
    assert told[1:] == ["norms"]


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (["lambda_max"], {"k": 5}),
        (["phi", "phi_subspace"], {"epsilon": (1e-3, 5e-4, 1e-4)}),
        (["phi"], {"num_starts": 3}),
        (RULED, {"rho": (0.1, 0.2)}),
    ],
)
def test_more_work_is_expected_to_take_longer(names, more):
    risk = risk_of("classifier")
    for name in names:
        one, several = (
            sum(vars(RUNS[name][1](risk, s)).values())
            for s in (MeasureSettings(), MeasureSettings(**more))
        )
        assert several > one > 0


def test_what_is_expected_of_fixed_budgets_is_what_is_spent():
    risk, settings = risk_of("classifier"), MeasureSettings()
    for name in ("worst_l2", "worst_linf_elementwise", "average", "average_elementwise"):
        cost = RUNS[name][1](risk, settings)
        spent = sh.summary(risk, name)[name].num_evals
        assert max(cost.forwards, cost.gradients) == spent


METHODS = (
    *("value", "value_and_gradient", "product", "block_products", "outputs"),
    *("gradient_and_product", "value_gradient_and_accuracy", "value_and_accuracy"),
    *("values", "accuracy"),
)


def interrupted(measures, at=math.inf, **settings) -> tuple[Summary | None, int]:
    """A summary with Ctrl-C in the evaluation of this number; how many there were."""
    calls = []

    def counting(method):
        real = getattr(EmpiricalRisk, method)

        def counted(self, *args, **kwargs):
            calls.append(method)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            patch.setattr(EmpiricalRisk, method, counting(method))
        try:
            return sh.summary(risk_of("classifier"), measures, **settings), len(calls)
        except KeyboardInterrupt:
            return None, len(calls)


@cache
def num_calls(*measures: str) -> int:
    with pytest.MonkeyPatch.context() as patch:  # the measures' own, without the notes'
        patch.setattr(summary_module, "_of_the_slope", lambda *_: ())
        interrupted(measures)  # derivatives are checked once
        return interrupted(measures, epsilon=(1e-3,), shard_size=20)[1]


@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_an_interrupt_ends_the_list_with_what_there_is(name, where):
    settings = {"epsilon": (1e-3,), "shard_size": 20}
    before, both = num_calls("lambda_max"), num_calls("lambda_max", name)
    at = before + 1 if where == "first" else (before + both) // 2 + 1
    names = ["lambda_max", name, "lambda_max_sampling"]
    found, num = interrupted(names, at, **settings)
    assert found is not None, "all is lost"
    assert num == at
    assert found.status == "interrupted"
    assert set(found.results) <= {"lambda_max", name}
    assert found["lambda_max"].status.ok
    assert found.table()
    json.loads(found.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["phi", "phi_subspace", "worst_l2", "average"])
def test_an_interrupt_in_the_first_of_several_radii_ends_them_all(name):
    settings = {"epsilon": (1e-3, 5e-4), "rho": (0.01, 0.02)}
    at = num_calls("lambda_max") + 8
    found, num = interrupted(["lambda_max", name], at, **settings)
    assert found is not None, "all is lost"
    assert found.status == "interrupted"
    assert num == at


def test_without_time_every_measure_says_so_and_can_still_be_shown(tmp_path):
    found = sh.summary(risk_of("classifier"), FAMILIES, max_seconds=0.0)
    assert list(found.results) == list(RUNS)
    assert found.status == "max_seconds"
    for name, of_name in found.results.items():
        expected = ("completed",) if name == "norms" else ("max_seconds", "converged")
        assert all(result.status in expected for result in of_name), name
    assert found.table()
    json.loads(found.to_json(), parse_constant=pytest.fail)
    found.plot(tmp_path / "a.png")


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_shows_only_where_it_is_wanted(capsys, shown):
    sh.summary(risk_of("classifier"), ["norms"], progress=shown)
    assert bool(capsys.readouterr().err) is shown


# -- how it is shown -----------------------------------------------------------------


@cache
def everything() -> Summary:
    return sh.summary(risk_of("classifier"), FAMILIES, epsilon=(1e-3,), shard_size=20)


def test_the_table_has_a_row_for_each_number_and_the_notes_below():
    found = sh.summary(risk_of("one sample"), ["phi", "norms", "box_alpha"])
    lines = [line.strip() for line in found.table().splitlines() if line.strip()]
    assert lines[0].split() == ["measure", "value", "evidence", "cost"]
    for reading in found.readings():
        (line,) = [line for line in lines if line.startswith(reading.name + " ")]
        assert reading.value_text in line
    below = " ".join(lines[1 + len(found.readings()) :])
    assert [note for note in found.notes if note not in below] == []
    assert "One sample only" in below
    assert found.table() == readings_text(found.readings(), found.notes)
    assert str(found).startswith("f ")
    assert "One sample only" in str(found)


def numbers(value) -> set[float]:
    """All numbers of nested lists and dicts, and the middles of pairs."""
    if isinstance(value, dict):
        return set().union(*map(numbers, value.values()))
    if isinstance(value, list):
        inner = set().union(*map(numbers, value))
        is_pair = len(value) == 2 and all(isinstance(v, float) for v in value)
        return inner | {sum(value) / 2} if is_pair else inner
    return {value} if isinstance(value, float) else set()


@pytest.mark.parametrize("name", RUNS)
def test_json_holds_the_numbers_of_every_measure(name):
    text = everything().to_json()
    assert "\n" not in text
    found = json.loads(text, parse_constant=pytest.fail)
    assert list(found["results"]) == list(RUNS)
    assert found["value"] == everything().value
    assert found["settings"]["shard_size"] == 20
    assert found["results"][name]
    again = restored(list[Result], found["results"][name])
    for plain, result in zip(again, everything().results[name], strict=True):
        assert plain.readings() == result.readings()


def test_the_plot_has_a_line_for_each_number(tmp_path):
    path = tmp_path / "summary.png"
    figure = everything().plot(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    of = {r.name: r for r in everything().readings() if math.isfinite(r.value)}
    seen = []
    for axes in figure.axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        kinds = {of[label].axis or label for label in labels}
        assert len(kinds) == 1  # what cannot be compared shares no axis
        left, right = axes.get_xlim()
        for label, text in zip(labels, axes.texts, strict=True):
            assert text.get_text().startswith(of[label].value_text)
            assert left <= of[label].value <= right
        if axes.get_xscale() == "linear":
            assert left <= 0 <= right
        seen += labels
    assert sorted(seen) == sorted(of)


def test_numbers_of_other_radii_and_units_have_axes_of_their_own():
    of = {r.name: r.axis for r in everything().readings()}
    assert of["lambda_max"] == of["trace"] != ""
    others = ["worst_l2(0.05)", "worst_linf(5e-4)", "worst_l2_elementwise(0.5)"]
    others += ["average(0.01)", "phi(1e-3)", "lambda_max"]
    assert len({of[name] for name in others}) == len(others)
    assert of["sam_l2(0.05)"] == of["worst_l2(0.05)"]
    assert of["pac_bayes_sigma"] == of["parameter_norm"] == ""  # with nobody


def reading(value: float, error: float | None = None, **facts) -> Reading:
    return Reading(**{"name": "a", "evidence": "seen", **facts}, value=value, error=error)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [reading(math.nan)],
        [reading(0.0), reading(-1.0)],
        [reading(1.0, math.inf)],
        [reading(1.0, math.nan)],
        [reading(1.0, 5.0, bound="≥"), reading(1e-9, 0.0, bound="≤"), reading(math.inf)],
    ],
)
def test_numbers_without_a_place_on_the_axis_are_no_trouble(tmp_path, given):
    figure = readings_plot(given, tmp_path / "a.png")
    num = sum(math.isfinite(r.value) for r in given)
    assert len(figure.axes[0].get_yticklabels()) == num


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0123456, "0.01235"),
        (0.00012345, "0.000123"),
        (1.5, "1.500"),
        (-178.24, "-178.2"),
        (12345.0, "12345"),
        (123456.0, "1.23e+05"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_a_number_has_four_digits(value, text):
    assert number(value) == text


def test_a_value_stands_with_its_bound_unit_and_error():
    found = reading(178.24, 0.0123, bound="≥", unit="%")
    assert found.value_text == "≥ 178.2 %"
    assert found.evidence_text == "± 0.01; seen"
    assert reading(1.0).evidence_text == reading(1.0, math.nan).evidence_text == "seen"


def test_brackets_are_not_taken_for_markup():
    text = readings_text([reading(1.0, name="w[q]", evidence="of [bold]")], ["see [red]"])
    assert "w[q]" in text
    assert "of [bold]" in text
    assert "see [red]" in text
