"""What is printed is run: code blocks, commands, links and the quickstart."""

import ast
import importlib
import json
import re
import runpy
import shlex
import string
import subprocess
from pathlib import Path

import pytest
from helpers.pages import (
    COMMANDS,
    PAGES,
    ROOT,
    blocks_of,
    checkpoints,
    commands_of,
    is_installing,
    runs_well,
    user_files,
    with_tiny_studies,
)

import sharpness
from sharpness.reproduce.papers import PAPERS

_CALL = re.compile(r"(?:python|torchrun [^`\n]*?) -m (sharpness\.\w+)( [^`\n]*)")
PARSERS = {name: module._parser() for name, module in COMMANDS.items()}
FAST = {"getting_started.md", "transformers.md"}  # pages whose commands take seconds
ALONE = FAST | {"README.md"}  # those that name no file but what they write


def runs(page, *languages):
    return [block for block in blocks_of(page, *languages) if not block.not_run]


def session_before(page):
    """What a reader has typed in before: nothing, or the blocks of another page."""
    session = {}
    for name in {block.after for block in runs(page, "python")} - {""}:
        for block in runs(ROOT / name, "python"):
            exec(compile(block.text, name, "exec"), session)
    return session


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p, "python")], ids=str)
def test_python_blocks_run(page, capsys, monkeypatch, tmp_path):
    """In one session a page, as a reader types them in; each prints numbers."""
    monkeypatch.chdir(tmp_path)
    session = session_before(page)
    for block in runs(page, "python"):
        exec(compile(block.text, str(page), "exec"), session)
    assert re.search(r"lambda_max|accuracy|\d [sG]", capsys.readouterr().out)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=() if p.name in FAST else pytest.mark.slow, id=str(p))
        for p in PAGES
        if runs(p, "sh")
    ],
)
def test_commands_run(page, monkeypatch, tmp_path, capsys):
    """Beside the files that the page's Python writes, in a cheap setting.

    A reproduction takes most of a minute all the same: README's is run, and is the same.
    """
    monkeypatch.chdir(tmp_path)
    paper = with_tiny_studies(PAPERS["keskar2017"])
    monkeypatch.setitem(PAPERS, "keskar2017", paper)
    if page.name not in ALONE:
        user_files(tmp_path)
        checkpoints(tmp_path)
    session = session_before(page)
    for block in runs(page, "python", "sh"):
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), session)
        else:
            for words in commands_of(block.text):
                elsewhere = page.name in FAST and "sharpness.reproduce" in words
                assert is_installing(words) or elsewhere or runs_well(words), words
    if page.name == "getting_started.md":
        check_getting_started()


def check_getting_started():
    """A newcomer ends with a record and a page of a checkpoint of their own."""
    (record,) = sharpness.read_records("records.jsonl")
    assert record["checkpoint"]["path"].endswith("digits.pt")
    assert "lambda_max" in Path("digits.html").read_text()


def test_what_cannot_be_run_is_understood():
    """Blocks that say why they are not run are Python, or shell, all the same."""
    for page in PAGES:
        for block in blocks_of(page, "python", "sh"):
            if block.not_run and block.language == "python":
                ast.parse(block.text)
            elif block.not_run:
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("name", ["README.md", "docs/getting_started.md"])
def test_the_numbers_shown_are_those_printed(name, capsys, monkeypatch, tmp_path):
    """Up to the rounding of another number of threads, which training enlarges."""
    monkeypatch.chdir(tmp_path)
    row = re.compile(r"^ (\S+) +(?:≥ )?([\d.]+)(?: %)?  ", re.MULTILINE)
    session = session_before(ROOT / name)
    for block in runs(ROOT / name, "python"):
        exec(compile(block.text, name, "exec"), session)
    printed = dict(row.findall(capsys.readouterr().out))
    shown = dict(row.findall(blocks_of(ROOT / name, "text")[0].text))
    assert list(shown) == ["lambda_max", "trace", "phi(1e-3)", "phi(5e-4)"]
    for measure, value in shown.items():
        assert float(printed[measure]) == pytest.approx(float(value), rel=0.2), measure


def test_the_quickstart_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    out = capsys.readouterr().out
    assert "5 of 5 converged" in out
    assert "phi(1e-3) ≥" in out


def test_commands_in_the_docs_are_understood():
    """Also where they stand in a sentence."""
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, given in _CALL.findall(text.replace("\\\n", " ")):
            arguments = shlex.split(given.split("&&")[0], comments=True)
            if name in PARSERS and arguments != ["--help"]:  # that stands on the site
                PARSERS[name].parse_args(arguments)
                seen += 1
        for script in re.findall(r"python ((?:examples|benchmarks)/\w+\.py)", text):
            assert (ROOT / script).exists(), script
    assert seen >= 3


def test_flags_in_the_docs_exist():
    known = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    for page in PAGES:
        flags = re.findall(r"`(--[a-z-]+)", page.read_text(encoding="utf-8"))
        assert set(flags) <= known | {"--readme"}, page


def anchors(page):
    """Of its headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    gone = str.maketrans("", "", string.punctuation.replace("-", "").replace("_", "") + "ε")
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head) for head in heads)
    return {head.lower().translate(gone).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            to = page.parent / path if path else page
            assert to.exists(), link
            assert not anchor or anchor in anchors(to), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_of_text_are_short(page):
    if page.name == "reproductions.md":  # written from records
        pytest.skip("its lines are those of the records")
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside ^= line.lstrip().startswith("```")
        longer = line.lstrip().startswith(("|", "!", "$$", "```"))
        assert inside or longer or len(line) <= 120, line


def test_the_readme_installs_with_the_tested_versions():
    for line in re.findall(r"^python3 -m venv.*$", (ROOT / "README.md").read_text(), re.M):
        assert "-c constraints.txt" in line
    pinned = (ROOT / "constraints.txt").read_text().lower()
    declared = re.search(
        r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S
    )
    for name in re.findall(r'^\s+"([\w-]+)', declared[1], re.M):
        assert f"{name.lower()}==" in pinned, name


def test_the_table_of_products_is_that_of_the_raw_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    products = importlib.import_module("products")
    table = products.table(products.load(ROOT / "benchmarks" / "products.json"))
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    between = page.split("<!-- products:begin -->")[1].split("<!-- products:end -->")[0]
    assert "F1, 4096 samples in 4 batches" in table
    assert between.strip() == table.strip()


def test_the_tables_of_where_time_goes_are_those_of_the_raw_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    where = importlib.import_module("where_time_goes")
    record = json.loads((ROOT / "benchmarks" / "where_time_goes.json").read_text())
    page = (ROOT / "docs" / "where_time_goes.md").read_text(encoding="utf-8")
    assert "| box_alpha |" in page
    assert where.page_of(page, record) == page


def test_the_numbers_of_the_gpu_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    record = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    between = page.split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert "C1, 1024" in between
    assert between.strip() == gpu.page(record)


def test_the_table_of_costs_is_that_of_the_raw_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    costs = importlib.import_module("costs")
    page = (ROOT / "docs" / "concepts" / "scale.md").read_text(encoding="utf-8")
    between = page.split(costs.MARKS[0])[1].split(costs.MARKS[1])[0]
    found = costs.stored()
    assert found["cases"].keys() == costs.CASES.keys()
    assert between.strip() == costs.page(found).strip()


def test_the_tables_of_the_advice_are_those_of_the_raw_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    advice = importlib.import_module("advice")
    found = advice.stored(ROOT / "benchmarks" / "advice.json")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    between = page.split("<!-- advice:begin -->")[1].split("<!-- advice:end -->")[0]
    assert len(found["advice"]) == len(advice.SEEDS)
    assert between.strip() == advice.page(found)


def test_the_table_of_spectra_is_that_of_the_raw_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spectra = importlib.import_module("spectra")
    found = spectra.Page(spectra.load())
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    between = page.split("<!-- spectra:begin -->")[1].split("<!-- spectra:end -->")[0]
    assert "F1, top-5" in between
    assert between.strip() == found.whole()
