"""What is printed is run: code blocks, commands, links and the quickstart."""

import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

import sharpness
from sharpness import compare, landscape, measure, train
from sharpness.batchsize import __main__ as batchsize
from sharpness.reproduce import __main__ as reproduce

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PARSERS = {
    "sharpness.measure": measure._parser(),
    "sharpness.compare": compare._parser(),
    "sharpness.landscape": landscape._parser(),
    "sharpness.train": train._parser(),
    "sharpness.reproduce": reproduce._parser(),
    "sharpness.batchsize": batchsize._parser(),
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=str)
def test_python_blocks_run(page, capsys, monkeypatch, tmp_path):
    """In one session a page, as a reader types them in; each prints numbers."""
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), session)
    if page.name == "getting_started.md":
        run_measure(page)
    assert re.search(r"lambda_max|accuracy", capsys.readouterr().out)


def run_measure(page):
    """The page's command on the checkpoint that its Python has written."""
    (line,) = re.findall(r"python -m sharpness.measure (.*)", page.read_text())
    assert measure.main(shlex.split(line)) == 0
    (record,) = sharpness.read_records("records.jsonl")
    assert record["checkpoint"]["path"].endswith("digits.pt")
    assert "lambda_max" in Path("digits.html").read_text()


def test_the_quickstart_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    out = capsys.readouterr().out
    assert "5 of 5 converged" in out
    assert "phi(1e-3) ≥" in out


def test_commands_in_the_docs_are_understood():
    seen = 0
    for page in PAGES:
        for line in re.findall(r"python -m (sharpness\.\w+)( [^`\n]*)", page.read_text()):
            name, arguments = line[0], shlex.split(line[1].split("&&")[0], comments=True)
            if arguments != ["--help"]:  # what it says stands on the site
                PARSERS[name].parse_args(arguments)
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


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


def test_the_numbers_of_the_gpu_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    record = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    between = page.split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert "C1, 1024" in between
    assert between.strip() == gpu.page(record)


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
    cells = spectra.load()
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    between = page.split("<!-- spectra:begin -->")[1].split("<!-- spectra:end -->")[0]
    assert "F1, top-5" in between
    assert between.strip() == f"{spectra.table(cells)}\n\n{spectra.caption(cells)}"
