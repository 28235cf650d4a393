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


# -- in a browser ------------------------------------------------------------------------

SEEN = [
    "index",
    "getting_started",
    "concepts/which_measure",
    "howto/compare",
    "troubleshooting",
]


@pytest.fixture
def opened(browser, site):
    """Opens a page of the site; what it asks of the network is not given."""
    contexts = []

    def call(name, scheme="light", width=1400):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        contexts.append(context)
        page = context.new_page()
        page.route(re.compile("^https?:"), lambda route: route.abort())
        page.goto((site / f"{name}.html").as_uri())
        return page

    yield call
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", [*SEEN, "decisions", "notebooks/spectrum"])
@pytest.mark.parametrize("width", [390, 1400])
def test_a_page_of_the_site_fits_the_window(opened, name, width):
    page = opened(name, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_site(opened, name, scheme):
    sync = pytest.importorskip(
        "axe_playwright_python.sync_playwright", exc_type=ImportError
    )
    found = sync.Axe().run(opened(name, scheme)).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
