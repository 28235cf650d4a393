"""docs/reproductions.md and README's table are what the committed records say."""

import re
import shutil
from pathlib import Path

import pytest

from sharpness.record import read_records
from sharpness.reproduce import page
from sharpness.reproduce.serialisation import digest, restored

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reproductions"
RECORDS = [r for file in sorted(FOLDER.glob("*.jsonl")) for r in read_records(file)]


@pytest.fixture(scope="module")
def seen():
    return page.recorded(FOLDER)


@pytest.fixture(scope="module")
def findings(seen):
    return list(page.findings(seen))


@pytest.fixture(scope="module")
def made(seen):
    """The page as the records have it."""
    return page.page_text(seen)


def test_the_page_is_not_stale(made):
    text = (ROOT / "docs" / "reproductions.md").read_text()
    assert page.between(text, page.MARKER, made) == text


def test_the_readme_is_not_stale(seen):
    text = (ROOT / "README.md").read_text()
    assert page.between(text, page.MARKER, page.readme_text(seen)) == text


@pytest.mark.slow
def test_a_changed_record_makes_the_page_stale(tmp_path, made):
    lines = (FOLDER / "quick.jsonl").read_text()
    changed = re.sub(r'"phi_protocol": 0\.0\d+', '"phi_protocol": 9.9', lines)
    assert changed != lines
    for file in FOLDER.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    assert page.page_text(page.recorded(tmp_path)) == made
    (tmp_path / "quick.jsonl").write_text(changed)
    assert page.page_text(page.recorded(tmp_path)) != made


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
        assert not (found.stand_in and found.verdict_text.startswith("reproduced"))


def test_numbers_in_the_commentary_are_those_of_the_tables():
    text = (ROOT / "docs" / "reproductions.md").read_text()
    commentary, tables = text.split(f"<!-- {page.MARKER}:begin -->")
    measured = re.findall(r"[\d.e+-]+ ± [\d.]*\d|[\d.]+×", commentary)
    assert len(measured) > 5
    assert [number for number in measured if number not in tables] == []


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
    markers = f"before\n<!-- {page.MARKER}:begin -->\n<!-- {page.MARKER}:end -->\nafter\n"
    for path in (tmp_path / "README.md", tmp_path / "docs" / "reproductions.md"):
        path.write_text(markers)
    run = tmp_path / "reproduce-quick"
    run.mkdir()
    shutil.copy(FOLDER / "quick.jsonl", run / "records.jsonl")
    assert page.main([str(run), "--root", str(tmp_path)]) == 0
    assert "0 observations added" in capsys.readouterr().out
    text = (tmp_path / "docs" / "reproductions.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "Table 3" in text
    assert (folder / "figure6-MLP-digits-quick.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "of-an-item-that-was.png").exists()
