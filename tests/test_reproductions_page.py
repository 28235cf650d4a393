"""docs/reproductions.md is what the committed records say."""

import re
import shutil
from pathlib import Path

import pytest

from sharpness.record import read_records
from sharpness.reproduce import answer, page
from sharpness.reproduce.claims import Role, Verdict
from sharpness.reproduce.columns import accuracy, metric, pairs, phi, read, table
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.serialisation import digest, restored

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reproductions"
PAGE = ROOT / "docs" / "reproductions.md"
RECORDS = [r for file in sorted(FOLDER.glob("*.jsonl")) for r in read_records(file)]


@pytest.fixture(scope="module")
def seen():
    return page.recorded(FOLDER)


@pytest.fixture(scope="module")
def findings(seen):
    return page.findings(seen)


@pytest.fixture(scope="module")
def made(seen, findings):
    """The page's items as the records have them."""
    return page.items_text(seen, findings)


def part(marker):
    begin, end = (f"<!-- {marker}:{at} -->" for at in ("begin", "end"))
    return PAGE.read_text().split(begin)[1].split(end)[0].strip()


@pytest.fixture(scope="module")
def commentary():
    """What is written by hand, between the answer and the items."""
    text = PAGE.read_text().split(f"<!-- {page.ANSWER}:end -->")[1]
    return " ".join(text.split(f"<!-- {page.ITEMS}:begin -->")[0].split())


def study_of(paper, name, preset="reduced"):
    return next(s for s in PAPERS[paper].studies if (s.name, s.preset) == (name, preset))


def test_the_page_is_not_stale(seen, findings, made):
    assert part(page.ITEMS) == made
    assert part(page.ANSWER) == page.answer_text(seen, findings)


# -- the first screen ----------------------------------------------------------------------


def test_the_page_begins_with_six_sentences_a_picture_and_a_table(seen):
    lines = part(page.ANSWER).splitlines()
    assert lines[0] == answer.lead(seen)
    told = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    assert told == answer.sentences(seen)
    assert len(told) == 6
    for sentence in told:
        assert re.match(r"\*\*[^*]+\?\*\* .*[^.]\.$", sentence)
        assert "n = " in sentence
    text = PAGE.read_text()
    assert text.index("- **") < text.index("answer.png") < text.index("| paper |")
    assert text.index("| paper |") < text.index("## What disagrees")
    for name in PAPERS:
        assert f"| [{name}](#{name}) |" in part(page.ANSWER)


def test_every_number_of_the_first_screen_stands_in_the_tables(seen, made):
    tables = made.replace("Premise, ", "")
    for sentence in answer.sentences(seen):
        for number in re.findall(r"[\d.e+-]+×|[+-]\d+\.\d+", sentence):
            assert number in tables, number


def test_sentences_follow_the_records(seen):
    """Without a study's records it is in none of the sentences."""
    full = [r for r in RECORDS if r["observation"].get("of", {}).get("data") == "mnist"]
    without = page.ObservationStore([r for r in RECORDS if r not in full])
    before, after = answer.sentences(seen), answer.sentences(without)
    assert "F1 on 60000 MNIST images" in before[0]
    assert "F1 on 60000 MNIST images" not in "".join(after)
    assert "Not known yet" in after[0]
    assert before[1] == after[1]
    assert len(after) == 6
    assert "F1 on 60000 MNIST images" in answer.lead(seen)
    assert "nothing is known yet" in answer.lead(without)


def test_an_answer_counts_verdicts(seen):
    for group in answer.groups(seen):
        assert set(group.findings) == {"table2", "table3", "table4", "distance"}
    outcomes = [g.findings["table3"].outcome for g in answer.groups(seen)[1:]]
    yes = outcomes.count(Verdict.REPRODUCED)
    assert f"Yes on {yes} of {len(outcomes)}" in answer.sentences(seen)[1]
    assert f"sharper by φ on {yes} of {len(outcomes)} networks" in answer.lead(seen)


def test_the_picture_shows_every_ratio_with_its_interval(seen, monkeypatch):
    drawn = {}

    def keep(path, panels, **options):
        drawn.update(options, panels=panels)

    monkeypatch.setattr(answer, "draw_forest", keep)
    answer.draw_answer(Path("unused.png"), seen)
    ratios, gaps, distances = drawn["panels"]
    assert ratios.lines == (1, 10)
    assert distances.band == (3, 10)
    groups = answer.groups(seen)
    assert len(ratios.estimates) == sum(len(group.ratios) for group in groups)
    assert len(gaps.estimates) == sum(len(group.gaps) for group in groups)
    for one in ratios.estimates:
        middle, low, high = one.edges
        assert low <= middle <= high
    for group, (heading, _) in zip(groups, drawn["groups"], strict=True):
        assert heading.startswith(f"{group.name}: ")
        assert heading.endswith(f"n = {group.n}")
    unfit = [group for group in groups if not group.fits]
    assert len(gaps.hatched) == len(unfit) > 0
    assert any(one.label.startswith("the paper") for one in ratios.estimates)


def test_the_readme_shows_the_picture():
    assert "](docs/reproductions/answer.png)" in (ROOT / "README.md").read_text()


# -- the items -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_changed_record_makes_the_page_stale(tmp_path, made):
    lines = (FOLDER / "quick.jsonl").read_text()
    changed = re.sub(r'"phi_protocol": 0\.0\d+', '"phi_protocol": 9.9', lines)
    assert changed != lines
    for file in FOLDER.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    store = page.recorded(tmp_path)
    assert page.items_text(store, page.findings(store)) == made
    (tmp_path / "quick.jsonl").write_text(changed)
    store = page.recorded(tmp_path)
    assert page.items_text(store, page.findings(store)) != made
    assert page.answer_text(store, page.findings(store)) != part(page.ANSWER)


def test_every_record_stands_under_the_digest_of_its_plan():
    assert len(RECORDS) > 100
    assert all(digest(restored(r["observation"])) == r["digest"] for r in RECORDS)
    assert len({r["digest"] for r in RECORDS}) == len(RECORDS)


def test_every_picture_is_there_and_shown():
    text = (ROOT / "docs" / "reproductions.md").read_text()
    shown = set(re.findall(r"\]\(reproductions/([\w.-]+\.png)\)", text))
    assert shown == {file.name for file in FOLDER.glob("*.png")}


def test_a_stand_in_is_never_called_reproduced(findings):
    verdicts = [found for *_, found in findings]
    assert any(found.stand_in for found in verdicts)
    for found in verdicts:
        text = found.verdict_text.removeprefix("so far ")
        assert not (found.stand_in and text.startswith("reproduced"))


def test_no_verdict_rests_on_fewer_than_three_starting_points(findings):
    decided = (Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.SOLVER)
    for _, item, _, found in findings:
        for check in found.checks:
            if check.verdict in decided and item.name != "updates":
                assert check.decided_by >= 3, check


def test_holm_stands_beside_every_primary_p(findings):
    for paper in PAPERS:
        family = [
            check
            for *_, found in findings
            for check in found.checks
            if found.paper == paper and check.role is Role.PRIMARY and check.p is not None
        ]
        assert all(check.holm >= check.p for check in family)
        if family:
            least = min(family, key=lambda check: check.p)
            assert least.holm == pytest.approx(min(1, least.p * len(family)))


def test_what_is_not_run_says_what_it_would_take(made):
    assert "### keskar2017: not run" in made
    assert re.search(r"\| C1-cifar10, full \| table2, .* \| \d+ \| \d+ \|", made)


# -- what is written by hand ---------------------------------------------------------------


def test_numbers_in_the_commentary_are_those_of_the_tables(commentary, made):
    measured = re.findall(r"[\d.e+-]+ ± [\d.]*\d|[\d.]+×", commentary)
    assert len(measured) > 4
    assert [number for number in measured if number not in made] == []


def test_what_is_said_of_phi_along_training_is_in_the_records(seen, commentary):
    study = study_of("keskar2017", "F1-mnist")
    along = table(seen, study.phi, phi(0), study.followed("small")).mean()
    updates = table(seen, accuracy, lambda facts: facts["updates"], study.followed("small"))
    first, last = (f"{along[epoch]:.3g} %" for epoch in (1, 20))
    begin = f"from {first} after one epoch, {updates[1].max():g} updates"
    assert f"{begin}, to {last} after 20, {updates[20].max():g}" in commentary
    swept = [study.network_at(32, seed, 40) for seed in range(3)]
    after = sum(read(seen, study.curvature_and_phi(n), phi(0)) for n in swept) / 3
    assert f"to {after:.3g} % after 40" in commentary
    full = study_of("keskar2017", "F1-mnist", "full").at("small", 0)
    number = int(read(seen, accuracy(full), lambda facts: facts["updates"]))
    assert f"{number:,} updates of the small batch".replace(",", " ") in commentary


def test_what_is_said_of_smith2018_is_in_the_records(seen, commentary):
    """Not "within two per cent of loss", not "one of three networks fails"."""
    study = study_of("smith2018", "ResNet-8-cifar10")
    loss, test = metric("train_loss_running"), metric("test_accuracy_running", 100)
    above, apart = [], []
    for kind in ("hybrid", "increase"):
        networks = list(zip(study.ends("decay"), study.ends(kind), strict=True))
        first, second = pairs(seen, accuracy, loss, networks)
        above += [100 * (b / a - 1) for a, b in zip(first, second, strict=True)]
        first, second = pairs(seen, accuracy, test, networks)
        apart += [abs(b - a) for a, b in zip(first, second, strict=True)]
    assert min(above) > 0
    assert f"{min(above):.1f} to {max(above):.1f} % higher than decaying's" in commentary
    assert f"within {max(apart):.1f} points" in commentary
    networks = zip(study.ends("decay"), study.ends("increase", 5), strict=True)
    first, second = pairs(seen, accuracy, test, networks)
    lost = [a - b for a, b in zip(first, second, strict=True)]
    lose = f"{min(lost):.1f} to {max(lost):.1f} points"
    assert f"all three networks lose accuracy on 2000 images, {lose}" in commentary
    assert "two per cent" not in commentary
    assert "one of three" not in commentary


def test_what_is_said_of_table_4_is_in_the_records(seen, commentary):
    """Not "45-fold"."""
    study = study_of("keskar2017", "F1-mnist")
    large = [study.sharpness(b) for _, b in study.ends()]
    means = [sum(read(seen, o, phi(i, of="phi_normal")) for o in large) / 6 for i in (0, 1)]
    said = f"from {means[0]:.2g} to {means[1]:.2g} %, {means[0] / means[1]:.3g}-fold"
    assert said in commentary
    assert "45-fold" not in commentary


def test_what_is_said_of_figures_3_4_and_5_is_in_the_records(seen, findings, commentary):
    study = study_of("keskar2017", "C1-cifar10")
    largest = study.network_at(study.swept[-1], 0, study.epochs_swept)
    number = int(read(seen, accuracy(largest), lambda facts: facts["updates"]))
    assert f"{number} updates at batch {study.swept[-1]}" in commentary
    assert f"drawn from {study.num_samples} samples of each set" in commentary
    (deficit,) = [
        found.of(Role.PREMISE)[0]
        for _, item, s, found in findings
        if (item.name, s.name, s.preset) == ("figure5", "F1-mnist", "reduced")
    ]
    assert deficit.verdict is not Verdict.REPRODUCED
    assert "has no deficit to recover" in commentary


def test_each_paper_says_what_is_smaller_than_its_own(made):
    text = made
    sizes = "Batch 16 for 15 epochs, 200 for 30; figure 4: 20 epochs; figure 5: 15 after"
    told = f"**C1-cifar10, reduced**: C1 on cifar10[2000,test=2000]. {sizes}"
    assert told in text
    assert "Sharpness on 100 training samples" in text.split(told)[1]
    assert "Reduced: 2000 of CIFAR-10's 50 000" in text.split(told)[1]
    assert "**WRN-16-4-cifar10, full**: WRN-16-4 on cifar10. The paper's sizes." in text
    assert "Stand-in: Fashion-MNIST for MNIST" in text


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="must be marked by <!-- x:begin -->"):
        page.between("no markers", "x", "content")


@pytest.mark.slow
def test_the_command_writes_a_page_of_its_own(tmp_path, capsys):
    folder = tmp_path / "docs" / "reproductions"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "quick.jsonl", folder)
    (folder / "of-an-item-that-was.png").write_bytes(b"")
    parts = [f"<!-- {m}:begin -->\n<!-- {m}:end -->\n" for m in (page.ANSWER, page.ITEMS)]
    (tmp_path / "docs" / "reproductions.md").write_text(f"before\n{''.join(parts)}after\n")
    run = tmp_path / "reproduce-quick"
    run.mkdir()
    shutil.copy(FOLDER / "quick.jsonl", run / "records.jsonl")
    assert page.main([str(run), "--root", str(tmp_path)]) == 0
    assert "0 observations added" in capsys.readouterr().out
    text = (tmp_path / "docs" / "reproductions.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "Table 3" in text
    assert (folder / "answer.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "figure6-MLP-digits-quick.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "of-an-item-that-was.png").exists()
