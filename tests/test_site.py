"""The site is built without a warning, its notebooks run, and its tables are the code's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sharpness.results import Status

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the built pages; every notebook is executed on the way."""
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinx_design"):
        pytest.importorskip(package, exc_type=ImportError)
    pytest.importorskip("sphinxcontrib.programoutput", exc_type=ImportError)
    built = tmp_path_factory.mktemp("site")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going"]
    environment = os.environ | {"PATH": beside, "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [*command, DOCS, built], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return built


def test_every_page_is_reached(site):
    """Sphinx warns of pages in no table of contents; these are the ones it has."""
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert pages <= built


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/[!i]*.md")), ids=str)
def test_a_notebook_shows_what_it_measured(site, notebook):
    """A table of results and a picture each, and no error."""
    page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
    assert "<th>evidence</th>" in page
    assert re.search(r'<img [^>]*src="\.\./_images/[0-9a-f]+\.png"', page)
    assert "Traceback" not in page


def test_the_reference_has_every_public_name(site):
    """Those of `sharpness`, of its results, and the options of each command."""
    import sharpness
    from sharpness import results

    python = (site / "reference" / "python.html").read_text()
    told = (site / "reference" / "results.html").read_text()
    errors = {name for name in sharpness.__all__ if name.endswith("Error")}
    for name in set(sharpness.__all__) - errors:
        assert f'id="sharpness.{name}"' in python, name
    for name in {*results.__all__, *errors} - {"load_result"}:
        assert f'id="sharpness.results.{name}"' in told, name
    commands = (site / "reference" / "commands.html").read_text()
    assert "--num-samples" in commands


def test_troubleshooting_says_what_each_status_says():
    page = (DOCS / "troubleshooting.md").read_text()
    for status in Status:
        assert f"| `{status.value}` | {status.advice} |" in page
