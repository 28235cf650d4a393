"""`python -m sharpness.reproduce`, in process: plans, refusals, and tiny real runs."""

import os
import re
from dataclasses import replace

import pytest
from helpers.studies import TINY_NETWORK, tiny

from sharpness import read_records
from sharpness.lab import data
from sharpness.reproduce import __main__ as reproduce
from sharpness.reproduce import runner, serialisation
from sharpness.reproduce.claims import effect_of, moves
from sharpness.reproduce.keskar2017 import in_short
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import Runner

KESKAR = PAPERS["keskar2017"]
TINY = tiny(KESKAR.studies[0])
TINIER = replace(TINY, name="tinier", network=TINY_NETWORK)
CALL = ["keskar2017", "--device", "cpu", "--jobs", "1", "--output"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """In an empty folder, on a machine with one core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def studies(monkeypatch):
    """Gives a paper other studies."""

    def give(*wanted, paper="keskar2017"):
        other = replace(PAPERS[paper], studies=wanted)
        monkeypatch.setitem(PAPERS, paper, other)

    return give


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def words(text):
    """What was printed, without the breaks of lines and columns."""
    return " ".join(text.split())


def undone(text):
    """The same without the line that says what remained to be done."""
    lines = text.splitlines()
    kept = [line for line in lines if not line.startswith("To do: ")]
    assert len(kept) < len(lines)
    return kept


# -- what does nothing -------------------------------------------------------------------


@pytest.mark.parametrize("paper", sorted(PAPERS))
def test_list_names_every_item_and_study_and_does_nothing(paper, tmp_path, capsys):
    assert reproduce.main([paper, "--list"]) == 0
    out, err = capsys.readouterr()
    assert words(PAPERS[paper].citation) in words(out)
    for item in PAPERS[paper].items:
        assert item.name in out
        assert item.title in out
    for study in PAPERS[paper].studies:
        line = f"{study.name} {study.preset} {study.network} on {study.data}"
        assert line in words(out)
    assert err == ""
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_would_be_done_and_does_nothing(tmp_path, capsys, studies):
    studies(TINIER)
    assert (
        reproduce.main(["keskar2017", "--items", "table2", "--plan", "--device", "cpu"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "tinier, preset quick: MLP?width=8&depth=1&out_features=10 on digits[" in out
    assert "Reduced: everything." in out
    assert "Items: table2." in out
    assert "To do: 4 training runs, 4 of 4 observations; under a minute." in out
    assert "Verdict" not in out
    assert err == ""
    assert not list(tmp_path.iterdir())


def test_a_plan_of_everything_counts_each_network_and_observation_once(capsys, studies):
    studies(TINIER)
    assert reproduce.main(["keskar2017", "--items", "all", "--plan"]) == 0
    out = capsys.readouterr().out
    # Tables and distance: 4 accuracies and 4 looks; beyond: 4 looks and 2 at matched
    # networks; figures 2 and 6: 2 more accuracies and 4 phi; 3 and 7: 2 joinings each.
    assert "To do: 6 training runs, 24 of 24 observations" in out


def test_without_items_quick_leaves_out_what_takes_long(capsys, studies):
    studies(replace(TINIER, swept=(10, 60), epochs_swept=1, epochs_warm=1))
    assert reproduce.main(["keskar2017", "--items", "all", "--plan"]) == 0
    assert (
        "Items: table2, table3, table4, beyond, distance, figure2, figure3, figure6, "
        in words(capsys.readouterr().out)
    )
    assert (
        reproduce.main(["keskar2017", "--items", "figure4,table7,figure4", "--plan"]) == 0
    )
    assert "Items: figure4, table7." in capsys.readouterr().out


def test_a_plan_with_fewer_starting_points_is_shorter(capsys, studies):
    studies(replace(TINIER, num_seeds=6))
    lines = {}
    for seeds in ("2", "3", "6"):
        assert (
            reproduce.main(["keskar2017", "--items", "table2", "--plan", "--seeds", seeds])
            == 0
        )
        lines[seeds] = capsys.readouterr().out
    for seeds, out in lines.items():
        assert f"To do: {2 * int(seeds)} training runs" in out


def test_a_plan_names_what_stands_in(capsys, studies):
    studies(replace(TINIER, stand_in="digits for MNIST"), TINIER)
    assert reproduce.main(["keskar2017", "--items", "table2", "--plan"]) == 0
    assert capsys.readouterr().out.count("Stand-in: digits for MNIST.") == 1


# -- what is refused ---------------------------------------------------------------------

REFUSED = [
    (["nobody2020"], "invalid choice: 'nobody2020'"),
    (["keskar2017", "--items", "table9"], "`--items` must be of table2, table3"),
    (["keskar2017", "--items", "table2,table9"], "got 'table9'"),
    (["keskar2017", "table2"], "unrecognized arguments: table2"),
    (["keskar2017", "--study", "nowhere"], "`--study` must be of F1-mnist"),
    (["keskar2017", "--study", "C1-cifar10"], "(preset quick); got C1-cifar10"),
    (["keskar2017", "--seeds", "1"], "at least 2 for a paired comparison; got 1"),
    (["keskar2017", "--seeds", "0"], "at least 2 for a paired comparison; got 0"),
    (["keskar2017", "--seeds", "x"], "invalid int value: 'x'"),
    (["keskar2017", "--jobs", "0"], "`--jobs` must be at least 1; got 0"),
    (["keskar2017", "--jobs", "-3"], "`--jobs` must be at least 1; got -3"),
    (["keskar2017", "--preset", "huge"], "invalid choice: 'huge'"),
    (["keskar2017", "--device", "abacus"], "got 'abacus'"),
    (["keskar2017", "--frobnicate"], "unrecognized arguments: --frobnicate"),
]


def refused(arguments, folder, capsys):
    """Run a command that must fail: exit 2, one line, nothing written."""
    before = files(folder)
    try:
        code = reproduce.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(("sharpness.reproduce: ", "python -m sharpness.reproduce: "))
    assert "Traceback" not in err
    assert files(folder) == before
    return err


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_a_wrong_call_is_one_line_and_writes_nothing(arguments, expected, tmp_path, capsys):
    assert expected in refused(arguments, tmp_path, capsys)
    assert not (tmp_path / "runs").exists()


def test_a_preset_that_a_paper_has_no_study_for_is_refused(tmp_path, capsys, studies):
    studies(TINIER)
    err = refused(["keskar2017", "--preset", "full"], tmp_path, capsys)
    assert "`--preset` must be one of quick for keskar2017; got full" in err


def test_an_item_that_no_study_of_the_preset_has_is_refused(tmp_path, capsys, studies):
    studies(TINIER)
    err = refused(["keskar2017", "--items", "figure4"], tmp_path, capsys)
    assert "`--items` must be part of this preset's studies; got figure4" in err


# -- the question in short ---------------------------------------------------------------


def test_without_a_paper_the_papers_are_listed(capsys):
    for arguments in ([], ["--list"]):
        assert reproduce.main(arguments) == 0
        lines = capsys.readouterr().out
        assert all(f"{name}: " in lines for name in PAPERS)


def test_quick_answers_the_question_in_its_first_lines(tmp_path, capsys, studies):
    studies(replace(TINIER, num_seeds=3), TINY)
    assert reproduce.main([*CALL, str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    answer = out.splitlines()[:6]
    assert answer[0].startswith("By Keskar's phi(1e-3) the large batch is ")
    assert answer[1].startswith("By lambda_max it is ")
    assert answer[2].startswith("Test accuracy: ")
    assert "Three pairs decide " in " ".join(answer)
    assert err.count("sharpness.reproduce: trained ") == 6  # piped: a line a network
    assert "made 12 of 12 observations" in err
    table = out[out.index("small batch") :]
    rows = [line for line in table.splitlines() if "→" in line or " – " in f"{line} "]
    assert 7 <= len(rows) <= 10
    assert (tmp_path / "run/keskar2017-tinier.png").read_bytes().startswith(PNG)
    assert "tiny:" not in out  # the first study alone
    assert "--items all" in out
    records = read_records(tmp_path / "run/records.jsonl")
    assert {record["observation"]["kind"] for record in records} == {"Accuracy", "Measured"}


def test_the_answer_says_what_the_numbers_say():
    rises = [2.0, 4.0, 8.0], [20.0, 40.0, 80.0]
    assert in_short._compared(*rises) == "sharper in 3 of 3 pairs, 10 times on average"
    assert in_short._compared(*rises[::-1]).startswith("flatter in 3 of 3 pairs, 10 times")
    mixed = in_short._compared([1.0, 2.0, 3.0], [2.0, 4.0, 2.9])
    assert mixed.startswith("sharper in 2 of 3 pairs, 1.57 times")
    assert in_short._compared([-1.0, 2.0], [1.0, 4.0]) == "sharper in 2 of 2 pairs"
    assert in_short._gap([90.0, 91.0, 92.0], [91.0, 90.5, 92.2]).startswith("no difference")
    fell = in_short._gap([90.0, 91.0, 92.0], [88.0, 88.9, 90.1])
    assert fell == "the large batch's is lower (-2.00 points, 95 % interval -2.25 to -1.75)"
    effect = effect_of(*moves(*rises, True))
    assert in_short._how_sure(3, effect).startswith("Three pairs decide the order")
    assert "nothing" in in_short._how_sure(2, effect)
    wide = effect_of(*moves([1.0, 1.0, 1.0], [9.0, 0.5, 1.1], True))
    assert in_short._how_sure(3, wide).startswith("Three pairs decide not even the order")


# -- what is done ------------------------------------------------------------------------


def test_a_tiny_reproduction_from_end_to_end(tmp_path, capsys, studies):
    studies(TINIER)
    folder = tmp_path / "run"
    items = ["table2", "figure2", "figure3"]
    call = ["keskar2017", "--items", ",".join(items), *CALL[1:], str(folder)]
    assert reproduce.main(call) == 0
    first, err = capsys.readouterr()
    assert all(line.startswith("sharpness.reproduce: ") for line in err.splitlines())
    said = words(first)
    assert "To do: 4 training runs, 8 of 8 observations" in said
    assert said.count("Verdict: ") == len(items)
    for item in items:
        assert f"{KESKAR.item(item).title} · tinier" in said
        assert f"Claim: {words(KESKAR.item(item).claim)}" in said
    assert f"Written to {folder}." in said

    names = {path.name for path in folder.iterdir()}
    pictures = {f"keskar2017-{item}-tinier-quick.png" for item in ("figure2", "figure3")}
    assert {name for name in names if name.endswith(".png")} == pictures
    assert all((folder / name).read_bytes()[:8] == PNG for name in pictures)
    assert len(list((folder / "networks").glob("*.pt"))) == 6

    records = read_records(folder / "records.jsonl")
    looks = [serialisation.restored(record["observation"]) for record in records]
    wanted = [look for item in items for look in KESKAR.item(item).observations(TINIER)]
    assert len(records) == 8
    assert set(looks) == set(wanted)
    for one, look in zip(records, looks, strict=True):
        assert one["kind"] == "observation"
        assert one["digest"] == serialisation.digest(look)
        assert one["diverged"] is None
        assert one["seconds"] >= 0
    assert names == {*pictures, "networks", "records.jsonl", "records.jsonl.lock"}

    before = files(folder)
    assert reproduce.main(call) == 0
    second = capsys.readouterr().out
    assert "To do: 0 training runs, 0 of 8 observations" in second
    assert undone(second) == undone(first)
    after = files(folder)
    for name in ("records.jsonl", *(n for n in before if n.startswith("networks"))):
        assert after[name] == before[name]


def interrupting(monkeypatch, target, name, after):
    """Stops everything, as Ctrl-C does, at one call more than `after`."""
    calls, real = [], getattr(target, name)

    def wrapped(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapped)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "after", "kept"),
    [(runner.Bench, "train_missing", 2, (3, 0)), (runner, "append_record", 5, (6, 5))],
)
def test_an_interrupted_run_carries_on(
    target, name, after, kept, tmp_path, capsys, studies
):
    studies(TINIER)
    items = ["table2", "figure2", "figure6"]
    whole = ["keskar2017", "--items", ",".join(items), *CALL[1:], str(tmp_path / "whole")]
    assert reproduce.main(whole) == 0
    expected = capsys.readouterr().out

    folder = tmp_path / "run"
    call = [*whole[:-1], str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, target, name, after)
        assert reproduce.main(call) == 130
    out, err = capsys.readouterr()
    *progress, last = err.splitlines()
    assert all(re.search(r": (trained|made) ", line) for line in progress)
    assert "interrupted; the same command carries on where it stopped" in last
    assert "Verdict" not in out
    networks = {p.name: p.read_bytes() for p in (folder / "networks").glob("*.pt")}
    there = folder / "records.jsonl"
    records = there.read_text() if there.exists() else ""
    assert (len(networks), records.count("\n")) == kept

    assert reproduce.main(call) == 0
    shown = capsys.readouterr().out
    assert undone(shown.replace(str(folder), str(tmp_path / "whole"))) == undone(expected)
    digests = [record["digest"] for record in read_records(there)]
    assert len(digests) == len(set(digests)) == 10
    assert there.read_text().startswith(records)
    for network, was in networks.items():
        assert (folder / "networks" / network).read_bytes() == was


def test_what_one_item_made_is_not_made_again_for_another(tmp_path, capsys, studies):
    studies(TINIER)
    folder = tmp_path / "run"
    assert reproduce.main([*CALL[:1], "--items", "table3", *CALL[1:], str(folder)]) == 0
    before = (folder / "records.jsonl").read_bytes()
    capsys.readouterr()
    assert reproduce.main([*CALL[:1], "--items", "table4", *CALL[1:], str(folder)]) == 0
    assert "To do: 0 training runs, 0 of 4 observations" in capsys.readouterr().out
    assert (folder / "records.jsonl").read_bytes() == before


def test_a_stand_in_is_said_to_be_one_and_no_verdict_says_reproduced_alone(
    tmp_path, capsys, studies
):
    studies(replace(TINIER, stand_in="digits for MNIST"))
    call = [*CALL[:1], "--items", "table2,figure2", *CALL[1:], str(tmp_path / "run")]
    assert reproduce.main(call) == 0
    out = capsys.readouterr().out
    assert "Stand-in: digits for MNIST." in out
    told = [line for line in out.splitlines() if line.startswith("Verdict: ")]
    assert len(told) == 2
    assert all(line.startswith("Verdict: stand-in: ") for line in told)


def test_a_record_can_be_made_again_to_the_same_numbers(tmp_path, capsys, studies):
    studies(TINIER)
    call = [*CALL[:1], "--items", "table3", *CALL[1:], str(tmp_path / "run")]
    assert reproduce.main(call) == 0
    capsys.readouterr()
    record = read_records(tmp_path / "run" / "records.jsonl")[0]
    again = Runner(folder=tmp_path / "again", jobs=1).again(record)
    assert again["digest"] == record["digest"]
    for name in ("value", "distance_from_start", "accuracy"):
        assert again["found"][name] == record["found"][name]
    for name in ("lambda_max", "phi", "phi_normal", "adaptive"):
        numbers = [
            made["found"][name]["eigenvalues"]
            if name == "lambda_max"
            else made["found"][name]["value"]
            if name == "adaptive"
            else [one["phi_protocol"] for one in made["found"][name]]
            for made in (again, record)
        ]
        assert numbers[0] == numbers[1]


def test_runs_that_diverge_are_recorded_once_and_count_as_0_percent(
    tmp_path, capsys, studies
):
    quick = PAPERS["masters2018"].studies[0]
    study = replace(
        quick,
        network=TINIER.network,
        data=TINY.data,
        stand_in=None,
        batch_sizes=(4, 16, 60),
        rates=(2.0**-4, 1e30),
        epochs=2,
        num_seeds=1,
    )
    studies(study, paper="masters2018")
    folder = tmp_path / "run"
    call = ["masters2018", "--items", "grid", *CALL[1:], str(folder)]
    assert reproduce.main(call) == 0
    first = capsys.readouterr().out
    records = read_records(folder / "records.jsonl")
    lost = [record for record in records if record["diverged"]]
    assert (len(records), len(lost)) == (6, 3)
    for record in lost:
        assert record["found"] is None
        assert record["observation"]["of"]["training"]["learning_rate"] == 1e30
    picture = folder / "masters2018-grid-ResNet-8-digits-quick.png"
    assert picture.read_bytes()[:8] == PNG
    before = (folder / "records.jsonl").read_bytes()
    assert reproduce.main(call) == 0
    second = capsys.readouterr().out
    assert "To do: 0 training runs, 0 of 6 observations" in second
    assert undone(second) == undone(first)
    assert (folder / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("study", ["F1-mnist", "F2-spoken-digits"])
def test_a_plan_needs_no_data(tmp_path, capsys, monkeypatch, study):
    def absent(*arguments):
        raise FileNotFoundError("no data here")

    monkeypatch.setattr(data, "_folder", absent)
    monkeypatch.setattr(data, "_spoken_digits", absent)
    monkeypatch.chdir(tmp_path)
    call = ["keskar2017", "--preset", "full", "--study", study, "--plan"]
    call += ["--items", "table2"]
    assert reproduce.main([*call, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"To do: 12 training runs, 12 of 12 observations; about \d+ min", out)
    assert not list(tmp_path.iterdir())
