"""Report pages: what stands on them, what repeats them, and what a browser sees."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.batchsize import by_law, times
from helpers.checkpoints import saved, trained, user_folder
from matplotlib.figure import Figure

from sharpness import compare, landscape, measure, read_records
from sharpness.batchsize import __main__ as batchsize
from sharpness.batchsize import advice
from sharpness.lab import data
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.measures.registry import FAMILIES, MEASURES
from sharpness.report.page import Picture, Section, Table, read_page, write_page
from sharpness.results import readings_of

MOST_BYTES = 500_000
FEW = ["--num-samples", "50", "--device", "cpu"]
KINDS = ("measure", "several", "density", "compare", "plane", "path", "batchsize")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of every kind, by its name."""
    folder = tmp_path_factory.mktemp("pages")
    nets = [str(folder / f"{seed}.pt") for seed in range(2)]
    for seed, path in enumerate(nets):
        run = Training(network="MLP?width=8&depth=1", batch_size=256, seed=seed)
        train(run, StoppingCriteria(epochs=2), data.load("digits"), path)
    sizes = (8, 32, 128)
    plane = ["--num-points", "3", *FEW]
    path = ["--directions", "path", "--num-steps", "3", *plane]
    asked = {
        "measure": (measure.main, [nets[0], *FEW]),
        "several": (measure.main, [*nets, "--measures", "curvature,worst_l2", *FEW]),
        "density": (measure.main, [nets[0], "--measures", "density,trace", *FEW]),
        "compare": (compare.main, [*nets, *FEW]),
        "plane": (landscape.main, [nets[0], *plane]),
        "path": (landscape.main, [*nets, *path]),
        "batchsize": (batchsize.main, [nets[0], "--output", str(folder / "advice")]),
    }
    with pytest.MonkeyPatch.context() as patch:  # nothing is timed, nothing trained
        patch.setattr(advice, "time_per_update", lambda *_, **__: times(sizes))
        patch.setattr(advice, "race", lambda *_, **__: by_law(100, 3200, sizes))
        for name, (main, arguments) in asked.items():
            page = str(folder / f"{name}.html")
            assert main([*arguments, "--report", page]) == 0, name
    return {name: folder / f"{name}.html" for name in asked}


class Page(HTMLParser):
    """Tags with their attributes, and the cells of all tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells, self.titles, self.texts = [], [], [], []
        self._into = self.texts
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        kinds = {"td": self.cells, "th": self.cells, "h1": self.titles, "h2": self.titles}
        self._into = kinds.get(tag, [] if tag in ("script", "style") else self.texts)
        if tag in kinds:
            self._into.append("")

    def handle_data(self, text):
        if self._into is self.texts:
            self.texts.append(text)
        elif self._into:
            self._into[-1] += text.rstrip("\n")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_but_itself(pages, kind):
    page = Page(pages[kind])
    assert pages[kind].stat().st_size <= MOST_BYTES
    links = [a.get(name, "") for _, a in page.tags for name in ("src", "href")]
    assert all(link.startswith(("", "data:", "#")[1:]) for link in filter(None, links))
    assert not page.all("link")
    (policy,) = [a for a in page.all("meta") if "http-equiv" in a]
    assert policy["content"].startswith("default-src 'none'")
    assert "http" not in "".join(a.get("style", "") for _, a in page.tags)
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert len(page.all("h1")) == 1
    assert page.titles[-1] == "What was not measured"


@pytest.mark.parametrize("kind", ["measure", "several", "density", "compare"])
def test_every_reading_stands_in_a_table_with_its_evidence(pages, kind):
    page, records = Page(pages[kind]), read_page(pages[kind])
    readings = [reading for record in records for reading in readings_of(record)]
    assert len(readings) >= 2
    for reading in readings:
        shown = (reading.name, reading.value_text, reading.evidence_text)
        assert set(shown) <= set(page.cells)


def test_every_point_of_a_plane_stands_in_a_table(pages):
    (record,) = read_page(pages["plane"])
    values = [v for row in record["landscape"]["values"] for v in row]
    assert len(values) == 9
    cells = Page(pages["plane"]).cells
    assert all(any(abs(_float(c) - v) < 1e-3 * v for c in cells) for v in values)


def _float(text):
    try:
        return float(text)
    except ValueError:
        return float("nan")


def test_sizes_stand_in_a_table_with_what_was_raced(pages):
    cells = Page(pages["batchsize"]).cells
    at = cells.index("32")  # its updates by the law 100 + 3200 / 32
    assert float(cells[at + 1]) == 200


def test_definitions_and_caveats_stand_beside_the_numbers(pages):
    text = "".join(Page(pages["measure"]).texts)
    for name in ("lambda_max", "trace", "phi"):
        assert MEASURES[name].definition[1:] in text
        assert MEASURES[name].caveat in text


def test_what_was_not_measured_is_named(pages):
    text = pages["measure"].read_text().partition(">What was not measured</h2>")[2]
    listed = text.partition("</dl>")[0]
    every = {name for names in FAMILIES.values() for name in names}
    there = {name for name in every if f"<dt>{name}</dt>" in listed}
    assert there == every - {"lambda_max", "trace", "phi"}


def test_what_is_not_available_is_named_with_its_reason(pages, tmp_path, monkeypatch):
    with user_folder(tmp_path, monkeypatch) as module:
        saved(trained(module.mlp(3, 2), module.regression()))
        call = ["net.pt", "--network", "nets.py:mlp?width=3&outputs=2", "--data"]
        call += ["nets.py:regression", "--measures", "norms,pac_bayes_sigma"]
        assert measure.main([*call, "--report", "page.html"]) == 0
        text = Path("page.html").read_text().partition(">What was not measured</h2>")[2]
        assert "<dt>pac_bayes_sigma</dt>" in text.partition("Not asked for")[0]


def test_the_record_is_the_one_that_was_kept(pages):
    folder = pages["measure"].parent
    assert read_page(pages["measure"])[0] in read_records(folder / "records.jsonl")


def test_from_a_page_the_measurement_is_repeated(pages, tmp_path, capsys):
    output = ["--output", str(tmp_path / "records.jsonl")]
    assert measure.main(["--from", str(pages["measure"]), "--device", "cpu", *output]) == 0
    assert "not as on the page" not in capsys.readouterr().err
    (old,), (new,) = read_page(pages["measure"]), read_records(output[1])
    assert measure.question_of(new) == measure.question_of(old)
    pairs = zip(readings_of(old), readings_of(new), strict=True)
    assert all(a.value == pytest.approx(b.value, rel=1e-4) for a, b in pairs)


def test_what_is_given_beside_a_page_goes_before(pages, tmp_path):
    output = ["--output", str(tmp_path / "records.jsonl")]
    call = ["--from", str(pages["compare"]), "--measures", "norms", "--seed", "3"]
    assert measure.main([*call, *output]) == 0
    records = read_records(output[1])
    assert [record["settings"]["measures"] for record in records] == [["norms"]] * 2
    assert records[0]["settings"]["num_samples"] == 50
    assert records[0]["settings"]["of_measures"]["seed"] == 3


def test_another_file_under_the_name_is_told(pages, tmp_path, capsys):
    records = read_page(pages["measure"])
    records[0]["checkpoint"]["sha256"] = "0" * 64
    page = write_page(tmp_path / "page.html", "other", [], records)
    call = ["--from", str(page), "--output", str(tmp_path / "records.jsonl")]
    assert measure.main([*call, "--measures", "norms"]) == 0
    err = capsys.readouterr().err
    assert "not as on the page: sha256, settings of" in err


def test_a_page_runs_no_code(tmp_path, monkeypatch, capsys):
    with user_folder(tmp_path, monkeypatch) as module:
        saved(trained(module.mlp(), module.points()))
        source = ["--network", "nets.py:mlp", "--data", "nets.py:points"]
        call = ["net.pt", *source, "--measures", "norms", "--report", "page.html"]
        assert measure.main(call) == 0
        assert measure.main(["--from", "page.html"]) == 2
        err = capsys.readouterr().err
        assert "`--network` must be given again" in err
        assert "It was nets.py:mlp" in err
        assert measure.main(["--from", "page.html", *source]) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<p>nothing</p>", "must be a report page; got a file of another kind"),
        ('<script type="application/json" id="sharpness-records">[1,</script>', "damaged"),
        ('<script type="application/json" id="sharpness-records">[{}]</script>', "None"),
    ],
)
def test_what_is_no_page_of_a_measurement_is_refused(tmp_path, capsys, text, says):
    path = tmp_path / "page.html"
    path.write_text(text)
    assert measure.main(["--from", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_page_of_another_kind_is_refused(pages, capsys):
    assert measure.main(["--from", str(pages["plane"])]) == 2
    assert "records of landscape" in capsys.readouterr().err


@pytest.mark.parametrize("main", [measure.main, landscape.main])
def test_a_page_that_cannot_be_written_is_refused_at_once(pages, tmp_path, main, capsys):
    net = str(pages["measure"].with_name("0.pt"))
    assert main([net, *FEW, "--report", str(tmp_path / "page.pdf")]) == 2
    assert "`--report` must end in .html" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_whatever_is_written_stays_text(tmp_path):
    figure = Figure()
    figure.subplots().plot([0, 1])
    evil = "</script><script>alert(1)</script>\"'&"
    table = Table(
        caption=evil, columns=(evil, "n"), rows=[(evil, 1.5), ("b", float("nan"))]
    )
    blocks = [
        evil,
        [evil],
        {evil: evil},
        table,
        Picture(figure=figure, alt=evil, table=table),
    ]
    records = [{"evil": evil, "numbers": [1.5, None]}]
    path = write_page(
        tmp_path / "new" / "page.html", evil, [Section(title=evil, blocks=blocks)], records
    )
    assert read_page(path) == records
    page = Page(path)
    assert len(page.all("script")) == 2
    assert page.titles == [evil, evil]
    assert page.all("img")[0]["alt"] == evil
    assert page.cells.count(evil) == 2
    assert "–" in page.cells


# -- in a browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, pages):
    """Opens a page from disk; afterwards nothing was asked for and nothing went wrong."""
    contexts, wrong = [], []

    def call(kind, scheme="light", width=1400):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        contexts.append(context)
        page, own = context.new_page(), pages[kind].as_uri()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda r: r.url.startswith((own, "data:")) or wrong.append(r.url)
        )
        page.goto(own)
        return page

    yield call
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_the_window(opened, kind):
    for width in (360, 1400):
        page = opened(kind, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        images = "[...document.images].every(i => i.complete && i.naturalWidth > 100)"
        assert page.evaluate(images)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"density"}))  # 1000 rows: minutes
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, kind, scheme):
    sync = pytest.importorskip(
        "axe_playwright_python.sync_playwright", exc_type=ImportError
    )
    found = sync.Axe().run(opened(kind, scheme)).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


def test_the_two_themes_differ(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened("measure", s).evaluate(ground) for s in ("light", "dark"))
    assert light == "rgb(255, 255, 255)"
    assert light != dark


@pytest.mark.parametrize("kind", ["measure", "plane"])
def test_a_table_is_sorted_by_its_numbers(opened, kind):
    page = opened(kind)
    table = page.locator("table").first
    column = 1 if kind == "measure" else 2
    values = f"""table => [...table.tBodies[0].rows].map(row => row.cells[{column}])
        .map(cell => parseFloat(cell.dataset.value ?? cell.textContent))"""
    before = table.evaluate(values)
    head = table.locator("thead th").nth(column)
    for turn, end in (("ascending", False), ("descending", True)):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == turn
        assert table.evaluate(values) == sorted(before, reverse=end)


@pytest.mark.parametrize("kind", ["measure", "compare", "plane", "batchsize"])
def test_the_arrow_keys_reach_every_value(opened, kind):
    page = opened(kind)
    for figure in page.locator("figure").all():
        walked = figure.locator(".wide").all()
        cells = figure.locator("tbody").evaluate(
            "body => [...body.rows].map(row => [...row.cells].map(c => c.textContent))"
        )
        walked[0].focus()
        page.keyboard.press("Home")
        said = set()
        for _ in range(len(cells[0])):  # to the first column
            page.keyboard.press("ArrowLeft")
        for column in range(len(cells[0])):
            page.keyboard.press("Home")
            for row in cells:
                live = figure.locator("[aria-live=polite]").inner_text()
                assert live.endswith((row[column] or "nothing").strip())
                said.add((row[0], column))
                page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowRight")
        assert len(said) == len({row[0] for row in cells}) * len(cells[0])


def test_tab_reaches_every_table_and_picture(opened):
    page = opened("measure")
    wanted, reached = page.locator(".wide, thead button").count(), 0
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        reached += page.evaluate("document.activeElement.matches('.wide, thead button')")
        if page.evaluate("document.activeElement === document.body"):
            break
    assert reached == wanted


def test_the_records_of_a_page_are_json_to_the_browser_too(opened, pages):
    script = "JSON.parse(document.getElementById('sharpness-records').textContent)"
    assert opened("measure").evaluate(script) == json.loads(
        json.dumps(read_page(pages["measure"]))
    )
