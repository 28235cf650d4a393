"""The papers' findings, computed from observations that are made up."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import product
from statistics import mean

import pytest
import torch

from sharpness.lab import data, named, networks
from sharpness.report.panels import draw
from sharpness.reproduce import PAPER_NAMES, PRESETS, runner, serialisation
from sharpness.reproduce.claims import Role, Verdict
from sharpness.reproduce.observations import InterpolationRun, TrackingRun
from sharpness.reproduce.paper import finding, paper_numbers
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import ObservationStore

REPRODUCED, NOT_REPRODUCED = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED
FEW, SOLVER = Verdict.UNDECIDED, Verdict.SOLVER


@pytest.fixture(autouse=True, scope="module")
def _digests_once():
    known = cache(serialisation.digest)
    with pytest.MonkeyPatch.context() as patch:
        for module in (serialisation, runner):
            patch.setattr(module, "digest", known)
        yield


# -- worlds: what would have been found if a paper's claims were true (or false) ---------


def noise(look, which=0):
    """Between -1 and 1, of its own for every observation; there are two of them."""
    return int(serialisation.digest(look)[6 * which :][:6], 16) / 2**23 - 1


def network_of(look):
    return look.training if isinstance(look, TrackingRun) else look.needs[0].training


def keskar(study, look, true, best=None):
    """Facts by the size of the batch: 0 for the small one, 1 for the large one."""
    sign, e = 1 if true else -1, noise(look)
    if isinstance(look, InterpolationRun):
        first, second = (0.1, 10) if true else (10, 0.1)
        alphas = [i / 8 - 1 for i in range(25)]
        values = [first * a * a if a < 0.5 else second * (a - 1) ** 2 for a in alphas]
        values = [
            v * (1 + 0.2 * noise(look, a < 0.5))
            for a, v in zip(alphas, values, strict=True)
        ]
        accuracies = [math.exp(-value) for value in values]
        return {"curve": {"alphas": alphas, "values": values, "accuracies": accuracies}}
    one, about = look.of, look.of.training
    size = math.log(about.batch_size / study.small) / math.log(study.large / study.small)
    epochs, before = one.budget.epochs, one.start.budget.epochs if one.start else 0
    if "measures" not in serialisation.described(look):
        gain = -1 if about.remedy == "adversarial" else 1.5
        gain *= about.remedy != "none" or about.augmentation != "none"
        test = 90 + 0.1 * e + sign * (gain - 2 * size - 3 / epochs + 0.2 * before)
        metrics = {
            "test_accuracy_batch": test / 100,
            "test_accuracy_running": test / 100 - 0.001,
            "train_accuracy_batch": 0.998 + 0.001 * e - (0 if true else 0.05 * size),
            "train_loss_batch": (1 + 0.1 * e) / epochs,
        }
        return {"metrics": metrics}

    def phis(claimed):
        power = (1 if claimed else -1) * (
            size + (size - 0.5) * math.log10(epochs) - 0.15 * before
        )
        return 10 ** (power + 0.01 * e)

    def both(share):
        protocol = share * phis(true)
        found = 1.2 * protocol if best is None else share * phis(best)
        return [{"phi_protocol": protocol / k, "phi": found / k} for k in (1, 4)]

    return {
        "value": 1 / epochs,
        "distance_from_start": (25 if (size == 0) == true else 5) * (1 + 0.01 * e),
        "lambda_max": {"eigenvalues": [phis(true)]},
        "phi": both(1.0),
        "phi_normal": both(0.1),
        "phi_normal_redrawn": [both(share) for share in (0.1, 0.11)],
        "phi_unit": both(0.01),
        "adaptive": {"value": phis(true)},
    }


def masters(study, look, true):
    """The best batch is 4 where it is true, and the largest one otherwise."""
    about = network_of(look)
    size, largest = about.batch_size, study.batch_sizes[-1]
    if about.ghost_batch_size:
        away = abs(math.log2(about.ghost_batch_size / 4))
        percent = 60 - 5 * away if true else 40 + 5 * away
    elif "warmup" in about.schedule:
        percent = 32 if true else 99
    else:
        octaves = math.log2((size if true else largest * 4 / size) / 4)
        trains = math.log2(about.learning_rate) <= -6 - octaves / 2 + 0.1
        percent = 60 - 2 * octaves if trains else 10
    return {"metrics": {"test_accuracy_running": (percent + 0.1 * noise(look)) / 100}}


def smith(study, look, true):
    about, epochs = network_of(look), look.of.budget.epochs
    decays, e = about.schedule.startswith("decay"), noise(look)
    loss = (2 + 0.1 * about.seed + 0.001 * e) / epochs
    other = 0 if true or decays else 5
    metrics = {
        "train_loss_running": loss * (1 + other),
        "test_accuracy_running": 0.9 - other / 100 + 0.001 * e,
    }
    return {"metrics": metrics}


def mishkin(study, look, true):
    about, e = network_of(look), noise(look)
    octaves = math.log2(about.batch_size / study.default)
    if about.scaling == "linear":
        lost = 0 if true else 5
    else:
        lost = (2 if true else -2) * octaves * (octaves > 0)
    return {"metrics": {"test_accuracy_running": 0.7 - lost / 100 + 0.001 * e}}


def dinh(study, look, true):
    points = []
    for factor in look.factors:
        moved = factor * factor if true else 1.0
        phi = [{"phi_protocol": moved, "phi": moved}] * 2
        points.append(
            {
                "factor": factor,
                "drift": 1e-7 if true else 0.1,
                "lambda_max": {"eigenvalues": [moved]},
                "phi": phi,
                "phi_normal": phi,
                "adaptive": {"value": 1.0 if true else factor},
            }
        )
    return {"points": points}


def cohen(study, look, true):
    """Curvature rises to its threshold and stays, or falls from far above it."""
    e, steps = noise(look), list(range(0, 600, 20))
    top = 1.02 + 0.01 * noise(look, 1)
    rising = [min(top, (0.3 + 0.05 * i) * (1 + 0.02 * e)) for i in range(len(steps))]
    falling = [max(2.0, 3 - 0.1 * i) * (1 + 0.02 * e) for i in range(len(steps))]
    return {
        "diverged_at": None,
        "steps": steps,
        "losses": [2 / (1 + i) for i in range(len(steps))],
        "values": [{"value": 50 * share} for share in (rising if true else falling)],
        "thresholds": [50.0] * len(steps),
    }


WORLDS = {
    "keskar2017": keskar,
    "masters2018": masters,
    "smith2018": smith,
    "mishkin2016": mishkin,
    "dinh2017": dinh,
    "cohen2021": cohen,
}


EDGE = ("cohen2021", "reduced")  # where both optimizers are followed


def study_of(paper, name=None, preset="reduced", seeds=None):
    """A study that nothing stands in for, with starting points that nobody has seen."""
    seeds = seeds or 6
    of_preset = [s for s in PAPERS[paper].studies if s.preset == preset]
    name = name or ("tanh-cifar10-1000" if (paper, preset) == EDGE else None)
    study = next(s for s in of_preset if name in (None, s.name))
    everywhere = ("num_seeds", "num_followed", "num_swept", "num_warm", "num_remedied")
    sizes = {name: seeds for name in everywhere if hasattr(study, name)}
    return replace(study, stand_in=None, **sizes)


def record(look, found, diverged=None):
    return {
        "kind": "observation",
        "digest": serialisation.digest(look),
        "found": found,
        "diverged": diverged,
    }


def seen_in(paper, item, study, true=True, keep=lambda look: True, **world):
    """What is there once an item's observations have been made in such a world."""
    looks = [look for look in dict.fromkeys(item.observations(study)) if keep(look)]
    return ObservationStore(
        [record(x, WORLDS[paper](study, x, true, **world)) for x in looks]
    )


def found_in(paper, name, true=True, study=None, **world):
    study, item = study or study_of(paper), PAPERS[paper].item(name)
    seen = seen_in(paper, item, study, true, **world)
    return finding(PAPERS[paper], item, study, seen)


def judged(found):
    return [check for check in found.checks if check.role is not Role.BEYOND]


def verdicts(found):
    """By claim; one that begins with a dash belongs to the claim before."""
    told, of = {}, ""
    for check in found.checks:
        belongs = check.claim.startswith("—")
        of = of if belongs else check.claim
        claim = f"{of} {check.claim}" if belongs else of
        assert claim not in told
        told[claim] = check
    judged = {c: one for c, one in told.items() if one.role is not Role.BEYOND}
    return {claim: check.verdict for claim, check in judged.items()}


ITEMS = [(paper, item.name) for paper, p in PAPERS.items() for item in p.items]
UNJUDGED = [("keskar2017", "beyond"), ("keskar2017", "table4-redrawn")]  # not claimed
UNSEEN = ("smith2018", "updates")  # counted, not observed
OBSERVED = [one for one in ITEMS if one != UNSEEN]
CLAIMED = [one for one in OBSERVED if one not in UNJUDGED]


# -- plans -------------------------------------------------------------------------------

STUDIES = [
    pytest.param(paper, study, id=f"{paper}-{study.name}-{study.preset}")
    for paper, p in PAPERS.items()
    for study in p.studies
]
NUM_TRAIN = {
    "mnist5k": 4000,
    "digits": 1433,
    "mnist": 60_000,
    "fashion-mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "spoken-digits": 116_967,
}


def num_train_of(name):
    whole, subset = data._asked(name, data._Subset(None, None, 0))
    return subset.num_train or NUM_TRAIN[whole]


@cache
def plans(paper, study):
    items = [item for item in PAPERS[paper].items if item.applies(study)]
    return [(item, list(item.observations(study))) for item in items]


def every_look(paper, study):
    return list(dict.fromkeys(look for _, looks in plans(paper, study) for look in looks))


def parts_of(look):
    return [look] if isinstance(look, TrackingRun) else look.needs


@pytest.mark.parametrize(("paper", "study"), STUDIES)
def test_every_observation_is_hashable_and_survives_a_record(paper, study):
    looks = every_look(paper, study)
    assert len({serialisation.digest(look) for look in looks}) == len(looks)
    for look in looks[:: 1 + len(looks) // 100]:
        line = json.dumps(serialisation.described(look))
        again = serialisation.restored(json.loads(line))
        assert again == look
        assert hash(again) == hash(look)
        assert json.dumps(serialisation.described(again)) == line


@pytest.mark.parametrize(("paper", "study"), STUDIES)
def test_every_observation_belongs_to_its_study_and_fits_its_training_set(paper, study):
    for item, looks in plans(paper, study):
        assert looks or (paper, item.name) == UNSEEN
    num_train, parts = num_train_of(study.data), set()
    for look in every_look(paper, study):
        assert (getattr(look, "num_samples", None) or 1) <= num_train
        parts |= {(p.data, p.training, p.budget) for p in parts_of(look)}
    assert {name for name, *_ in parts} <= {study.data}
    assert {training.seed for _, training, _ in parts} <= set(range(study.num_seeds))
    for _, training, budget in parts:
        assert budget.num_updates(training.course(num_train)) >= 1


@pytest.mark.parametrize(("paper", "study"), STUDIES)
def test_every_study_names_data_and_a_network_that_exist(paper, study):
    whole, _ = data._asked(study.data, data._Subset(None, None, 0))
    assert whole in named.DATA
    name, arguments = named.parsed(study.network)
    with torch.device("meta"):
        model = networks.build({"name": name, "arguments": arguments})
    assert sum(weights.numel() for weights in model.parameters()) > 100


def test_the_sets_that_need_no_files_have_the_sizes_that_plans_rest_on():
    for name in ("mnist5k", "digits"):
        assert len(data.load(name).train[1]) == NUM_TRAIN[name]


def test_every_paper_has_a_study_for_every_preset_and_items_of_their_own_names():
    for name, paper in PAPERS.items():
        assert paper.name == name
        assert {study.preset for study in paper.studies} == set(PRESETS)
        of = [(study.preset, study.name) for study in paper.studies]
        assert len(set(of)) == len(of)
        names = [item.name for item in paper.items]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("paper", "study"), STUDIES)
def test_fewer_starting_points_mean_fewer_observations_and_no_others(paper, study):
    few = study.with_seeds(2)
    assert few.num_seeds == 2
    if study.num_seeds >= 2:
        assert set(every_look(paper, few)) <= set(every_look(paper, study))


def test_every_study_is_named_after_its_network():
    for paper in PAPERS.values():
        for study in paper.studies:
            if not study.network.startswith("MLP"):
                assert study.name.startswith(study.network.partition("?")[0])


# -- verdicts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("paper", "name"), CLAIMED)
def test_a_true_claim_is_reproduced(paper, name):
    found = found_in(paper, name)
    assert judged(found)
    assert set(verdicts(found).values()) == {REPRODUCED}, found.checks
    assert found.verdict is REPRODUCED
    assert not any("observations made so far" in note for note in found.notes)


@pytest.mark.parametrize(("paper", "name"), CLAIMED)
def test_a_false_claim_is_not_reproduced(paper, name):
    found = found_in(paper, name, true=False)
    assert judged(found)
    assert set(verdicts(found).values()) == {NOT_REPRODUCED}, found.checks
    has_premise = bool(found.of(Role.PREMISE))
    assert found.verdict is (Verdict.NO_PREMISE if has_premise else NOT_REPRODUCED)


def test_the_updates_of_smith2018_are_counted_not_trained():
    found = found_in("smith2018", "updates")
    counts = {check.claim.partition(":")[0]: int(check.ours) for check in found.checks}
    assert counts == {
        "decay": 78_125,
        "increase": 29_141,
        "increased-rate": 6_406,
        "increased-momentum": 2_305,
    }
    assert set(verdicts(found).values()) == {REPRODUCED}
    study = replace(study_of("smith2018"), stand_in="digits for CIFAR-10")
    found = found_in("smith2018", "updates", study=study)
    assert (found.verdict, found.stand_in) == (REPRODUCED, None)


PAIRED = [
    *product(
        ["keskar2017"],
        ["table2", "table3", "table4", "distance", "figure2", "figure3", "figure7"],
    ),
    *product(["keskar2017"], ["table6", "table7", "adversarial"]),
    ("mishkin2016", "figure8"),
]


@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize(("paper", "name"), PAIRED)
def test_a_single_pair_decides_nothing(paper, name, true):
    found = found_in(paper, name, true, keep=lambda look: network_of(look).seed == 0)
    assert set(verdicts(found).values()) == {FEW}, found.checks
    assert found.verdict is FEW


def test_table_4_again_is_the_mean_over_subspaces():
    study = study_of("keskar2017")
    assert study.redrawn
    item = PAPERS["keskar2017"].item("table4-redrawn")
    seen = seen_in("keskar2017", item, study)
    means = [
        mean([draw[0]["phi_protocol"] for draw in seen.get(look)["phi_normal_redrawn"]])
        for look in item.observations(study)
        if look.of in [small for small, _ in study.ends()]
    ]
    first = finding(PAPERS["keskar2017"], item, study, seen).checks[0]
    assert first.claim == "phi(1e-3) % at the end"
    assert f"{mean(means):.3g}" in first.ours.split("→")[0]


@pytest.mark.parametrize("name", ["table3", "table6", "table7", "figure3", "figure7"])
@pytest.mark.parametrize("true", [True, False])
def test_two_pairs_decide_no_order(name, true):
    found = found_in("keskar2017", name, true, keep=lambda look: network_of(look).seed < 2)
    orders = [v for claim, v in verdicts(found).items() if "ratio" not in claim]
    assert set(orders) == {FEW}, found.checks


@pytest.mark.parametrize("name", ["gradient-descent", "adam"])
def test_one_descent_does_not_show_what_curvature_does(name):
    found = found_in("cohen2021", name, keep=lambda look: network_of(look).seed == 0)
    assert set(verdicts(found).values()) == {FEW}
    assert found.verdict is FEW


def test_two_pairs_that_gain_do_not_show_that_adversarial_training_is_no_help():
    study = study_of("keskar2017").with_seeds(2)
    item = PAPERS["keskar2017"].item("adversarial")
    seen = seen_in("keskar2017", item, study)
    for look in item.observations(study):
        about = network_of(look)
        facts = seen.get(look)
        if about.remedy == "adversarial" and "metrics" in facts:
            facts["metrics"]["test_accuracy_batch"] = (0.9, 0.97)[about.seed]
    found = finding(PAPERS["keskar2017"], item, study, seen)
    gain = found.checks[0]
    assert "2 of 2 larger" in gain.ours
    assert gain.verdict is not REPRODUCED


@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize("name", ["table3", "table4"])
def test_an_order_that_depends_on_the_solver_decides_nothing(name, true):
    found = found_in("keskar2017", name, true, best=not true)
    assert list(verdicts(found).values()) == [SOLVER] * 2
    assert found.verdict is SOLVER
    assert found.verdict_text == "undecided (solver)"


def test_subspaces_are_judged_by_the_papers_columns():
    found = found_in("keskar2017", "table4")
    told = [(check.claim, check.role) for check in found.checks]
    assert told == [
        ("phi(1e-3) %, normal columns: larger", Role.PRIMARY),
        ("phi(5e-4) %, normal columns: larger", Role.SECONDARY),
        ("phi(1e-3) %, unit columns: larger", Role.BEYOND),
        ("phi(5e-4) %, unit columns: larger", Role.BEYOND),
    ]


def ratio_of(factor, spread, study):
    """What Table 3 finds where phi of the large batch is so many times the small one's."""
    item, records = PAPERS["keskar2017"].item("table3"), []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        large = network_of(look).batch_size == study.large
        value = (factor if large else 1) * 10 ** (spread * noise(look))
        facts["phi"] = [{"phi_protocol": value, "phi": value}] * 2
        records.append(record(look, facts))
    return finding(PAPERS["keskar2017"], item, study, ObservationStore(records))


@pytest.mark.parametrize(
    ("factor", "spread", "text"),
    [
        (167, 0.05, "reproduced; size reproduced"),  # the paper's 205.14 / 1.23
        (16, 0.05, "reproduced; size not reproduced"),
        (1700, 0.05, "reproduced; size not reproduced"),
        (0.1, 0.05, "not reproduced; size not reproduced"),
        (167, 12, "undecided at n = 6"),
    ],
)
def test_the_size_of_a_ratio_is_another_verdict_than_the_order(factor, spread, text):
    study = study_of("keskar2017", "F1-mnist", "full")
    assert ratio_of(factor, spread, study).verdict_text == text


def test_a_smaller_study_is_not_held_to_the_papers_size():
    found = ratio_of(16, 0.05, study_of("keskar2017"))
    assert found.verdict_text == "reproduced"
    assert found.checks[0].paper.startswith("1.23 ± 0.83 → 205.14")


@pytest.mark.parametrize("name", ["figure4", "figure5", "figure6", "table6", "table7"])
def test_every_verdict_on_phi_holds_for_the_best_phi_too(name):
    found = found_in("keskar2017", name, best=False)
    asked = [(c, v) for c, v in verdicts(found).items() if "phi" in c and "not" not in c]
    assert asked
    assert {verdict for _, verdict in asked} == {SOLVER}
    of_phi = "phi" in found.of(Role.PRIMARY)[0].claim
    assert found.verdict is (SOLVER if of_phi else REPRODUCED)


# -- one claim an item, premises, predicates that were changed -----------------------------


@pytest.mark.parametrize(("paper", "name"), CLAIMED)
def test_an_item_has_one_primary_claim(paper, name):
    several = {  # the same for every learning rate, or for every batch size of SGD
        ("masters2018", "bn-batch"): 2,
    }
    primary = found_in(paper, name).of(Role.PRIMARY)
    assert len(primary) == several.get((paper, name), 1)
    assert not any("5e-4" in check.claim for check in primary)


def test_a_large_batch_without_a_deficit_leaves_nothing_to_recover():
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item("figure5")
    records = []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        if "metrics" in facts and look.of.training.batch_size == study.small:
            facts["metrics"]["test_accuracy_batch"] -= 0.05
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    assert found.verdict is Verdict.NO_PREMISE


def test_where_the_small_batch_has_not_fitted_its_generalisation_is_not_judged():
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item("table2")
    records = []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        if network_of(look).batch_size == study.small:
            facts["metrics"]["train_accuracy_batch"] -= 0.05
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    assert found.verdict is Verdict.NO_PREMISE
    assert found.of(Role.PRIMARY)[0].verdict is REPRODUCED


CHANGED = {  # claims whose predicate was changed when numbers had been seen
    "figure4": ["test accuracy falls with batch size, from 500 on"],
    "figure5": [
        "after 20: test accuracy less the small batch's, points: -0.5 or more",
        "after 20: phi(1e-3) over the small batch's: 1 or less",
    ],
    "figure6": [
        "large batch: phi(1e-3), %, first → last: larger",
        "small batch: phi(1e-3), %, first → last: at most half as large again",
    ],
    "table2": [],
    "table3": [],
    "figure3": [],
}


@pytest.mark.parametrize("name", CHANGED)
def test_predicates_that_were_changed_are_marked(name):
    found = found_in("keskar2017", name)
    marked = [check for check in found.checks if check.num_new is not None]
    assert [check.claim for check in marked] == CHANGED[name]
    assert all(check.num_new == 3 and check.n == 6 for check in marked)
    assert all("3 new" in check.count_text for check in marked)


@pytest.mark.parametrize("name", [name for name, claims in CHANGED.items() if claims])
def test_starting_points_that_were_seen_do_not_decide_on_what_was_changed(name):
    found = found_in("keskar2017", name, keep=lambda look: network_of(look).seed < 3)
    for check in found.checks:
        if check.num_new is not None:
            assert (check.num_new, check.n, check.verdict, check.p) == (0, 3, FEW, None)
            assert check.verdict_text == "undecided at n = 0 new starting points"
            assert check.ours != "–"  # all that was seen is shown


def test_curves_of_smith2018_and_edges_of_cohen2021_are_judged_by_new_starting_points():
    found = found_in("smith2018", "schedules")
    marked = [c.claim for c in found.checks if c.num_new == 3]
    assert len(marked) == 2
    assert all("training loss" in claim for claim in marked)
    for name, new in (("tanh-cifar10", 3), ("tanh-cifar10-1000", None)):
        study = study_of("cohen2021", name)
        found = found_in("cohen2021", "gradient-descent", study=study)
        assert [check.num_new for check in found.checks] == [new, None]


@pytest.mark.parametrize("name", ["figure4", "figure5", "figure6"])
def test_a_study_that_was_run_after_the_change_is_judged_by_all_its_starting_points(name):
    study = study_of("keskar2017", "F1-mnist", "full")
    assert study.seen == 0
    found = found_in("keskar2017", name, study=study)
    assert all(check.num_new is None for check in found.checks)


# -- draws ---------------------------------------------------------------------------------


def test_starting_points_have_draws_of_their_own_or_the_study_says_that_they_share_one():
    for study in PAPERS["keskar2017"].studies:
        seeds = {study.sharpness(study.at("small", seed)).seed for seed in study.seeds}
        assert len(seeds) == (1 if study.one_draw else study.num_seeds)
        assert ("are one draw, shared by all starting points" in study.about) == (
            study.one_draw
        )
        assert ("Each starting point has samples" in study.about) != study.one_draw
    fresh = replace(study_of("keskar2017"), one_draw=type(study).one_draw)
    assert not fresh.one_draw  # what is still to be run


@pytest.mark.parametrize(("paper", "name"), CLAIMED)
def test_a_stand_in_is_never_reproduced(paper, name):
    study = replace(study_of(paper), stand_in="something else")
    for true in (True, False):
        found = found_in(paper, name, true, study)
        assert found.verdict is Verdict.STAND_IN
        assert found.stand_in == "something else"
        text = found.verdict_text.removeprefix("stand-in: ")
        assert text != found.verdict_text
        assert text.startswith("reproduced" if true else ("not reproduced", "premise not"))


@pytest.mark.parametrize(("paper", "name"), OBSERVED)
def test_nothing_observed_is_not_run(paper, name):
    item = PAPERS[paper].item(name)
    for stand_in in (None, "something else"):
        study = replace(study_of(paper), stand_in=stand_in)
        found = finding(PAPERS[paper], item, study, ObservationStore([]))
        assert found.checks == []
        assert found.verdict is Verdict.NOT_RUN
        assert found.verdict_text == "not run"


@pytest.mark.parametrize(("paper", "name"), UNJUDGED)
def test_what_no_claim_is_judged_of_was_run_all_the_same(paper, name):
    found = found_in(paper, name)
    assert len(found.checks) >= 6
    assert found.verdict is not Verdict.NOT_RUN


@pytest.mark.parametrize(("paper", "name"), OBSERVED)
def test_with_some_missing_the_finding_says_how_many(paper, name):
    item, study = PAPERS[paper].item(name), study_of(paper)
    looks = list(dict.fromkeys(item.observations(study)))
    missing = set(looks[::3])
    found = found_in(paper, name, keep=lambda look: look not in missing)
    there = len(looks) - len(missing)
    if there:
        expected = f"unfinished ({there} of {len(looks)} observations)"
        assert found.verdict_text.endswith(expected)
        assert found.verdict_text == expected or found.verdict_text.startswith("so far ")


def diverged_in(paper, name, one_of, study=None):
    item, study = PAPERS[paper].item(name), study or study_of(paper)
    looks = list(dict.fromkeys(item.observations(study)))
    lost = set(looks[::one_of])
    records = [
        record(look, None, "the loss is nan")
        if look in lost
        else record(look, WORLDS[paper](study, look, True))
        for look in looks
    ]
    return (
        finding(PAPERS[paper], item, study, ObservationStore(records)),
        ObservationStore(records),
        lost,
    )


@pytest.mark.parametrize(("paper", "name"), OBSERVED)
def test_diverged_runs_are_neither_missing_nor_numbers(paper, name):
    found, seen, lost = diverged_in(paper, name, 3)
    assert all(look in seen for look in lost)
    assert all(seen.diverged(look) and seen.get(look) is None for look in lost)
    assert not any("made so far" in note for note in found.notes)


@pytest.mark.parametrize(
    ("paper", "name"), [one for one in OBSERVED if one[0] != "masters2018"]
)
def test_if_every_run_diverged_nothing_is_reproduced(paper, name):
    found, _, _ = diverged_in(paper, name, 1)
    assert found.verdict is not REPRODUCED
    assert judged(found) == []


def test_a_finding_says_how_many_runs_diverged():
    found, _, lost = diverged_in("keskar2017", "table2", 3)
    assert found.notes == [f"{len(lost)} of 12 observations: training diverged."]


def test_pairs_of_which_one_diverged_are_not_counted():
    study = study_of("keskar2017")
    item = PAPERS["keskar2017"].item("table3")
    looks = list(dict.fromkeys(item.observations(study)))
    lost = [x for x in looks if network_of(x).seed == 4][:1]
    records = [
        record(x, None, "the loss is nan")
        if x in lost
        else record(x, keskar(study, x, True))
        for x in looks
    ]
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    assert {check.n for check in found.checks} == {5}


# -- predicates, one by one --------------------------------------------------------------


def test_a_run_that_diverged_counts_as_0_percent_for_masters2018():
    study, item = study_of("masters2018"), PAPERS["masters2018"].item("grid")
    looks = item.observations(study)
    small = [x for x in looks if network_of(x).batch_size <= 32]
    records = [
        record(x, None, "the loss is nan")
        if x in small
        else record(x, masters(study, x, True))
        for x in looks
    ]
    found = finding(PAPERS["masters2018"], item, study, ObservationStore(records))
    assert found.checks[0].verdict is NOT_REPRODUCED
    assert found.checks[0].ours.startswith("best at 64: 0 (4), 0 (16)")


def test_if_every_run_of_the_grid_diverged_no_batch_size_is_best():
    found, _, _ = diverged_in("masters2018", "grid", 1)
    assert REPRODUCED not in verdicts(found).values()


def test_the_best_batchnorm_batch_is_that_of_the_mean():
    study = study_of("masters2018", seeds=3)
    item = PAPERS["masters2018"].item("bn-batch")
    records = []
    for look in item.observations(study):
        about = network_of(look)
        facts = masters(study, look, about.seed < 2)  # the last one says the opposite
        if about.seed < 2:
            facts["metrics"]["test_accuracy_running"] += 0.3
        records.append(record(look, facts))
    found = finding(PAPERS["masters2018"], item, study, ObservationStore(records))
    assert set(verdicts(found).values()) == {REPRODUCED}


def test_one_batchnorm_batch_is_not_the_best_of_several():
    def only_four(look):
        return network_of(look).ghost_batch_size == 4

    found = found_in("masters2018", "bn-batch", true=False, keep=only_four)
    assert REPRODUCED not in verdicts(found).values()


def test_a_question_that_every_batchnorm_batch_answers_is_not_asked():
    study = study_of("masters2018", "AlexNet-cifar10", "full")
    study = replace(study, batch_sizes_ghost=(8, 64, 256))  # of 8 all are 8 or less
    found = found_in("masters2018", "bn-batch", study=study)
    asked = [check.claim.partition(":")[0] for check in found.checks]
    assert asked == ["SGD batch 64", "SGD batch 256"]


@pytest.mark.parametrize("name", ["grid", "stable-range"])
@pytest.mark.parametrize("lost", [0, 5, -1])
def test_nothing_is_judged_before_the_whole_grid_was_run(name, lost):
    study, item = study_of("masters2018", seeds=2), PAPERS["masters2018"].item(name)
    missing = item.observations(study)[lost]
    found = found_in("masters2018", name, study=study, keep=lambda look: look != missing)
    assert found.checks == []
    assert found.verdict is Verdict.NOT_RUN


def test_the_best_rate_of_a_batch_size_is_that_of_each_starting_point():
    study, item = study_of("masters2018", seeds=3), PAPERS["masters2018"].item("grid")
    records = []
    for look in item.observations(study):
        about, facts = network_of(look), masters(study, look, True)
        best = study.rates[about.seed]  # another one for each
        scaled = about.learning_rate == best
        size = about.batch_size
        facts["metrics"]["test_accuracy_running"] = (0.9 if scaled else 0.5) - size / 1e4
        records.append(record(look, facts))
    found = finding(PAPERS["masters2018"], item, study, ObservationStore(records))
    assert f"{90 - 0.01 * study.batch_sizes[0]:.3g} (" in found.checks[0].ours
    assert found.checks[0].n == 3
    assert found.checks[1].n == 3
    assert set(verdicts(found).values()) == {REPRODUCED}


def test_a_grid_without_small_batches_decides_nothing():
    found = found_in("masters2018", "grid", keep=lambda x: network_of(x).batch_size > 32)
    assert judged(found) == []


@pytest.mark.parametrize("lost", [{1000}, {4, 16}])
def test_warm_up_waits_for_the_grid(lost):
    def keep(look):
        about = network_of(look)
        return about.batch_size not in lost or "warmup" in about.schedule

    assert judged(found_in("masters2018", "warm-up", keep=keep)) == []


def test_schedules_that_part_after_the_first_drop_are_not_one_curve():
    study = study_of("smith2018", seeds=3)
    item = PAPERS["smith2018"].item("schedules")
    records = []
    for look in item.observations(study):
        about, epochs = network_of(look), look.of.budget.epochs
        if epochs <= study.drops[0]:  # the schedules do the same, the seeds differ
            loss = 1.0 + 0.5 * about.seed
        else:  # the seeds agree to 1 %, the schedules differ by a factor
            loss = 0.01 + 0.0001 * about.seed
            loss *= 1 if about.schedule.startswith("decay") else 5
        metrics = {"train_loss_running": loss, "test_accuracy_running": 0.9}
        records.append(record(look, {"metrics": metrics}))
    found = finding(PAPERS["smith2018"], item, study, ObservationStore(records))
    curves = {v for claim, v in verdicts(found).items() if "training loss" in claim}
    assert REPRODUCED not in curves


@pytest.mark.parametrize("name", ["gradient-descent", "adam"])
def test_curvature_that_stays_far_below_its_threshold_does_not_reproduce(name):
    study, item = study_of("cohen2021"), PAPERS["cohen2021"].item(name)
    records = []
    for look in item.observations(study):
        facts = cohen(study, look, True)
        facts["thresholds"] = [500.0] * len(facts["steps"])  # the share is 0.1 at most
        records.append(record(look, facts))
    found = finding(PAPERS["cohen2021"], item, study, ObservationStore(records))
    assert set(verdicts(found).values()) == {NOT_REPRODUCED}


def test_a_single_descent_that_never_reaches_its_threshold_is_enough():
    study = study_of("cohen2021")
    item = PAPERS["cohen2021"].item("gradient-descent")
    records = []
    for look in item.observations(study):
        facts, about = cohen(study, look, True), network_of(look)
        if about.seed == 3 and about.learning_rate == study.rates[0]:
            facts["thresholds"] = [500.0] * len(facts["steps"])
        records.append(record(look, facts))
    checks = finding(PAPERS["cohen2021"], item, study, ObservationStore(records)).checks
    assert checks[0].verdict is NOT_REPRODUCED
    assert checks[0].ours.endswith("; 5 of 6 runs reach it")
    assert checks[1].verdict is REPRODUCED
    assert [check.n for check in checks] == [6, 5]


def empty_curve(look):
    return {"diverged_at": "nan", "steps": [], "losses": [], "values": [], "thresholds": []}


def test_a_descent_that_diverged_at_once_is_left_out_of_the_checks():
    study = study_of("cohen2021")
    item = PAPERS["cohen2021"].item("gradient-descent")
    looks = item.observations(study)
    records = [
        record(x, empty_curve(x) if network_of(x).seed == 0 else cohen(study, x, True))
        for x in looks
    ]
    found = finding(PAPERS["cohen2021"], item, study, ObservationStore(records))
    assert {check.n for check in found.checks} == {5}


def test_a_descent_that_diverged_at_once_is_left_out_of_the_picture():
    study = study_of("cohen2021")
    item = PAPERS["cohen2021"].item("gradient-descent")
    seen = ObservationStore([record(x, empty_curve(x)) for x in item.observations(study)])
    assert not any(curve.x for panel in item.drawn(study, seen) for curve in panel.curves)


def with_a_phi_of_0(lost):
    """What dinh2017 finds if L-BFGS-B stops at once for some starting points."""
    study, item = study_of("dinh2017", seeds=3), PAPERS["dinh2017"].item("rescaling")
    records = []
    for look in item.observations(study):
        facts = dinh(study, look, True)
        if network_of(look).seed in lost:
            facts["points"][0]["phi"] = [{"phi_protocol": 0.0, "phi": 0.0}] * 2
        records.append(record(look, facts))
    found = finding(PAPERS["dinh2017"], item, study, ObservationStore(records))
    return next(
        check for check in found.checks if check.claim.startswith("phi(1e-3), full")
    )


def test_a_phi_of_0_is_no_crash_for_dinh2017():
    assert with_a_phi_of_0({0, 1, 2}).verdict is not REPRODUCED


def test_a_phi_of_0_counts_the_same_whichever_starting_point_it_is_of():
    checks = [with_a_phi_of_0({seed}) for seed in (0, 1, 2)]
    assert len({check.verdict for check in checks}) == 1
    assert not any("nan" in check.ours for check in checks)


@pytest.mark.parametrize(
    "name", ["table3", "table4", "figure4", "figure5", "figure6", "table6", "table7"]
)
def test_a_number_that_is_not_finite_is_neither_a_crash_nor_a_number(name):
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item(name)
    records = []
    for look in dict.fromkeys(item.observations(study)):
        facts = keskar(study, look, True)
        if network_of(look).seed == 0 and "phi" in facts:
            for kind in ("phi", "phi_normal", "phi_unit"):
                facts[kind] = [{"phi_protocol": None, "phi": None}] * 2
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    phis = [c for c in found.checks if "phi" in c.claim or c.claim.startswith("—")]
    assert phis
    assert not any("nan" in check.ours for check in phis)
    if name.startswith("table"):
        assert {check.n for check in phis} == {5}


def test_a_small_batch_whose_phi_stays_does_not_contradict_figure_6():
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item("figure6")
    records = []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        if network_of(look).batch_size == study.small:
            phi = 1 + 0.1 * noise(look)
            facts["phi"] = [{"phi_protocol": phi, "phi": phi}] * 2
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    (small,) = (v for claim, v in verdicts(found).items() if claim.startswith("small"))
    assert small is not NOT_REPRODUCED


def test_two_points_of_figure_6_decide_nothing():
    study, item = (
        study_of("keskar2017", "F1-mnist", "quick", 2),
        PAPERS["keskar2017"].item("figure6"),
    )
    found = found_in("keskar2017", item.name, False, study)
    assert NOT_REPRODUCED not in verdicts(found).values()


def test_a_large_batch_that_does_not_fit_does_not_reproduce_table_2():
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item("table2")
    records = []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        if network_of(look).batch_size == study.large:
            facts["metrics"]["train_accuracy_batch"] = 0.5 + 0.01 * noise(look)
            facts["metrics"]["test_accuracy_batch"] = 0.45 + 0.01 * noise(look)
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    assert found.verdict is not REPRODUCED


def test_stopping_early_that_closes_the_gap_does_not_reproduce_figure_2():
    study, item = study_of("keskar2017"), PAPERS["keskar2017"].item("figure2")
    records = []
    for look in item.observations(study):
        facts, about = keskar(study, look, True), network_of(look)
        last = study.epochs_large[-1]
        ended = about.batch_size == study.large and look.of.budget.epochs == last
        facts["metrics"]["test_accuracy_batch"] = 0.976 if ended else 0.98
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    assert found.verdict is not REPRODUCED


def test_one_pair_off_its_minimum_does_not_outweigh_five_in_figure_3():
    study = replace(study_of("keskar2017"), num_followed=6)
    item = PAPERS["keskar2017"].item("figure3")
    records = []
    for look in item.observations(study):
        facts = keskar(study, look, True)
        if network_of(look).seed == 0:  # a curve with its bottom beside alpha = 1
            values = facts["curve"]["values"]
            at = facts["curve"]["alphas"].index(1.0)
            values[at - 1], values[at + 1] = 0.0, values[at]
            values[at] += 1e-4
        records.append(record(look, facts))
    found = finding(PAPERS["keskar2017"], item, study, ObservationStore(records))
    (check,) = found.checks
    assert "5 of 6 larger" in check.ours
    assert check.verdict is REPRODUCED


# -- beside the paper's numbers ----------------------------------------------------------


BESIDE = [
    ("table2", "F1", "98.03 ± 0.07 → 97.81 ± 0.07 (-0.22)"),
    ("table2", "F1", "99.66 ± 0.05 → 99.92 ± 0.01 (+0.26)"),
    ("table3", "F1", "1.23 ± 0.83 → 205.14 ± 69.52 (167×)"),
    ("table3", "C1", "28.58 ± 3.13 → 707.23 ± 43.04 (24.7×)"),
    ("table3", "C1", "7.08 ± 0.88 → 227.31 ± 23.23 (32.1×)"),
    ("table4", "F1", "0.05 ± 0 → 9.17 ± 0.14 (183×)"),
    ("table4", "C1", "2.18 ± 0.23 → 137.25 ± 21.6 (63×)"),
    ("table6", "C1", "77.26 ± 0.42 → 82.5 ± 0.67 (+5.24)"),
    ("table6", "C1", "28.58 ± 3.13 → 231.77 ± 30.5 (8.11×)"),
    ("table7", "F1", "97.81 ± 0.07 → 98.12 ± 0.01 (+0.31)"),
    ("table7", "F1", "1.23 ± 0.83 → 232.25 ± 63.81 (189×)"),
]
STUDY_OF = {"F1": "F1-mnist", "C1": "C1-cifar10"}


@pytest.mark.parametrize(("name", "network", "text"), BESIDE)
def test_the_papers_numbers_stand_beside_ours(name, network, text):
    study = study_of("keskar2017", STUDY_OF[network])
    found = found_in("keskar2017", name, study=study)
    begins = text.removesuffix(")")
    assert any(check.paper.startswith(f"{begins}, ") for check in found.checks)


def test_published_numbers_are_kept_as_printed():
    numbers = paper_numbers("keskar2017")
    assert numbers["table3"]["F1"]["0.001"] == [[1.23, 0.83], [205.14, 69.52]]
    assert numbers["table3"]["C4"]["0.0005"] == [[4.07, 0.87], [109.35, 16.57]]
    assert numbers["table4"]["C1"]["0.001"] == [[2.18, 0.23], [137.25, 21.6]]
    assert numbers["table2"]["C3"]["test"] == [[49.58, 0.39], [46.45, 0.43]]
    assert numbers["table6"]["C4"]["test"] == [[63.05, 0.5], [65.88, 0.13]]
    assert numbers["table7"]["C2"]["test"] == [88.495, 0.63]


def test_a_paper_that_did_not_try_a_network_has_no_numbers_beside_ours():
    study = study_of("keskar2017", "MLP-digits", "quick")
    for name in ("table2", "table3", "table4"):
        assert {
            check.paper for check in found_in("keskar2017", name, study=study).checks
        } == {""}


def test_the_papers_numbers_do_not_stand_beside_those_of_other_data():
    stand_in = replace(study_of("keskar2017"), stand_in="Fashion-MNIST for MNIST")
    for name in ("table2", "table3", "table4", "table7", "figure3"):
        checks = found_in("keskar2017", name, study=stand_in).checks
        assert {check.paper for check in checks} == {""}


def test_the_papers_line_is_read_like_ours():
    study = study_of("keskar2017", "C1-cifar10")
    (check,) = found_in("keskar2017", "figure3", study=study).checks
    assert check.paper == "0.00075 → 1.8 (one pair)"
    (check,) = found_in("keskar2017", "figure7", study=study).checks
    assert check.paper == ""


def test_the_numbers_of_mishkin2016_belong_to_its_batch_sizes():
    study = study_of("mishkin2016", preset="full")
    found = found_in("mishkin2016", "figure8", study=study)
    published = {check.claim.partition(" test")[0]: check.paper for check in found.checks}
    assert published == {
        "batch 32 (0.125 times the default), scaled rate: within 1 point of the default": (
            "-0.1 (single runs)"
        ),
        "batch 64 (0.25 times the default), scaled rate: within 1 point of the default": (
            "+0.4 (single runs)"
        ),
        "batch 128 (0.5 times the default), scaled rate: within 1 point of the default": (
            "-0.1 (single runs)"
        ),
        "batch 512 (2 times the default), same rate,": "47.1 → 45.5 (single runs)",
        "batch 512 (2 times the default), scaled rate: within 1 point of the default": (
            "-0.2 (single runs)"
        ),
        "batch 1024 (4 times the default), same rate,": "47.1 → 41.9 (single runs)",
        "batch 1024 (4 times the default), scaled rate: within 1 point of the default": (
            "-0.6 (single runs)"
        ),
        "batch 2048 (8 times the default), same rate,": "",
        "batch 2048 (8 times the default), scaled rate: within 1 point of the default": "",
    }
    told = {check.paper: check.role for check in found.checks}
    assert all((role is Role.BEYOND) == (paper == "") for paper, role in told.items())


def test_the_accuracies_of_smith2018_stand_as_differences_from_decaying():
    found = found_in("smith2018", "schedules")
    published = [c.paper for c in found.checks if "test accuracy" in c.claim]
    assert published == ["+0.1", "", "+0.2"]


@pytest.mark.parametrize("table", ["table3", "table4"])
def test_large_batches_are_sharper_in_every_published_cell(table):
    cells = paper_numbers("keskar2017")[table]
    assert set(cells) == {"F1", "F2", "C1", "C2", "C3", "C4"}
    for row in cells.values():
        for (small, _), (large, _) in row.values():
            assert large > 8 * small


def test_the_published_curves_are_complete_and_end_in_the_published_minima():
    curves = paper_numbers("keskar2017_curves")
    assert curves["alphas"] == [i / 8 - 1 for i in range(25)]
    for name in ("C1", "C2", "C3", "C4"):
        assert {len(values) for values in curves[name].values()} == {25}
    at = curves["alphas"].index
    ends = {
        name: [
            curves[name][key][at(x)]
            for x in (0.0, 1.0)
            for key in ("train_xent", "test_acc")
        ]
        for name in ("C1", "C4")
    }
    assert ends == {
        "C1": [0.0011, 80.52, 0.0004, 77.26],
        "C4": [0.0368, 63.73, 0.0148, 64.31],
    }


# -- what is said and drawn --------------------------------------------------------------


@pytest.mark.parametrize(("paper", "name"), OBSERVED)
def test_ours_is_said_of_every_check(paper, name):
    found = found_in(paper, name)
    assert found.checks
    for check in found.checks:
        assert check.ours
        assert check.n > 0
        assert "nan" not in check.ours


def test_a_findings_command_says_with_how_many_starting_points():
    study = study_of("keskar2017").with_seeds(2)
    assert "--seeds 2" in found_in("keskar2017", "table2", study=study).command


def test_a_findings_command_names_the_paper_the_item_and_the_study():
    found = found_in("keskar2017", "table2")
    assert found.command == (
        "python -m sharpness.reproduce keskar2017 --items table2 --preset reduced "
        "--study F1-mnist"
    )


DRAWN = [(paper, name) for paper, name in ITEMS if PAPERS[paper].item(name).panels]


@pytest.mark.parametrize(("paper", "name"), DRAWN)
def test_an_items_panels_are_curves(paper, name):
    item, study = PAPERS[paper].item(name), study_of(paper)
    panels = item.drawn(study, seen_in(paper, item, study))
    assert panels
    assert all(panel.curves for panel in panels)
    for panel in panels:
        for curve in panel.curves:
            assert len(curve.x) == len(curve.y) > 1


@pytest.mark.parametrize(
    ("paper", "name"), [("keskar2017", "figure3"), ("masters2018", "grid")]
)
def test_an_items_panels_can_be_drawn(paper, name, tmp_path):
    item, study = PAPERS[paper].item(name), study_of(paper)
    panels = item.drawn(study, seen_in(paper, item, study))
    path = draw(tmp_path / "drawn.png", panels, title=item.title)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("paper", "name"), DRAWN)
def test_panels_show_what_is_there_and_no_more(paper, name):
    item, study = PAPERS[paper].item(name), study_of(paper)
    looks = list(dict.fromkeys(item.observations(study)))
    missing = set(looks[::3])
    seen = seen_in(paper, item, study, keep=lambda look: look not in missing)
    for panel in item.drawn(study, seen):
        for curve in panel.curves:
            assert len(curve.x) == len(curve.y)


@pytest.mark.parametrize(("paper", "name"), DRAWN)
def test_nothing_observed_is_nothing_drawn(paper, name):
    item, study = PAPERS[paper].item(name), study_of(paper)
    assert not any(panel.curves for panel in item.drawn(study, ObservationStore([])))


def test_figure_3_shows_the_papers_curve_behind_ours():
    study = study_of("keskar2017", "C1-cifar10")
    item = PAPERS["keskar2017"].item("figure3")
    panels = item.drawn(study, seen_in("keskar2017", item, study))
    labels = [curve.label for curve in panels[0].curves]
    assert labels == ["ours, train", "paper, train", "ours, test", "paper, test"]
    assert [curve.faint for curve in panels[0].curves] == [False, True, False, True]


def test_the_names_that_the_help_lists_are_those_of_the_papers():
    assert tuple(PAPERS) == PAPER_NAMES
