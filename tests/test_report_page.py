"""Report pages: what stands on them, what repeats them, and what a browser sees."""

import base64
import gzip
import json
import random
import shutil
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.batchsize import by_law, times
from helpers.checkpoints import saved, trained, user_folder
from helpers.problems import softmax_regression
from helpers.studies import TINY_NETWORK, tiny
from matplotlib.figure import Figure

from sharpness import _pages, compare, landscape, loss_plane, measure, read_records
from sharpness import train as train_command
from sharpness._json import as_plain
from sharpness._results import plain
from sharpness.batchsize import __main__ as batchsize
from sharpness.batchsize import advice
from sharpness.lab import data
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.measures.registry import FAMILIES, MEASURES
from sharpness.report import figures, marks, panels, svg
from sharpness.report import page as page_module
from sharpness.report.page import Picture, Section, Table, read_page, write_page
from sharpness.reproduce import __main__ as reproduce
from sharpness.reproduce.claims import Role
from sharpness.reproduce.paper import finding
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import ObservationStore, Runner
from sharpness.reproduce.shown import cells
from sharpness.results import readings_of

MOST_BYTES = 500_000
FEW = ["--num-samples", "50", "--device", "cpu"]
TINIER = replace(tiny(PAPERS["keskar2017"].studies[0]), network=TINY_NETWORK)
KINDS = (
    *("measure", "several", "density", "compare", "plane", "path", "batchsize"),
    *("train", "findings", "answer", "packed"),
)


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
    keskar = replace(PAPERS["keskar2017"], studies=[TINIER])
    tried = ["keskar2017", "--device", "cpu", "--jobs", "1", "--output", str(folder / "r")]
    asked = {
        "answer": (reproduce.main, tried),
        "findings": (reproduce.main, [*tried, "--items", "table2,figure2"]),
        "measure": (measure.main, [nets[0], *FEW]),
        "several": (measure.main, [*nets, "--measures", "curvature,worst_l2", *FEW]),
        "density": (measure.main, [nets[0], "--measures", "density,trace", *FEW]),
        "compare": (compare.main, [*nets, *FEW]),
        "plane": (landscape.main, [nets[0], *plane]),
        "path": (landscape.main, [*nets, *path]),
        "batchsize": (batchsize.main, [nets[0], "--output", str(folder / "advice")]),
        "train": (train_command.main, tracked_run(folder)),
    }
    with pytest.MonkeyPatch.context() as patch:  # nothing is timed, nothing trained
        patch.setattr(advice, "time_per_update", lambda *_, **__: times(sizes))
        patch.setattr(advice, "race", lambda *_, **__: by_law(100, 3200, sizes))
        patch.setitem(PAPERS, "keskar2017", keskar)
        for name, (main, arguments) in asked.items():
            page = str(folder / f"{name}.html")
            assert main([*arguments, "--report", page]) == 0, name
        less = (folder / "compare.html").stat().st_size - 100
        patch.setattr(page_module, "MOST_BYTES", less)
        again = ["--report", str(folder / "packed.html")]
        assert compare.main([*nets, *FEW, *again]) == 0  # nothing is measured again
    return {name: folder / f"{name}.html" for name in KINDS}


def tracked_run(folder):
    call = ["MLP?width=8&depth=1", "--data", "digits", "--batch-size", "256"]
    call += ["--epochs", "2", "--track", "lambda_max,phi", "--track-every", "4"]
    return [*call, "--jobs", "1", "--device", "cpu", "--output", str(folder / "runs")]


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
    drawn = page.all("svg")
    assert all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in drawn)
    assert not page.all("img")
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    assert len(page.all("h1")) == 1
    if kind == "packed":
        assert "What was not measured</a>" in pages[kind].read_text()
    else:
        assert page.titles[-1] == "What was not measured"
        assert len(drawn) == pages[kind].read_text().count('class="marks"') > 0


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
        assert "`--from` must have the functions beside it" in err
        assert "Add --network " in err
        assert "--network nets.py:mlp --data nets.py:points" in err
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
    figure, evil = Figure(), "</script><script>alert(1)</script>\"'&"
    figure.subplots().plot([0, 1], label=evil)
    figure.suptitle(evil)
    figure.legend()
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
    assert len(page.all("script")) == 3  # values of the picture, records, code
    assert page.titles == [evil, evil]
    assert page.all("svg")[0]["aria-label"] == evil
    assert page.cells.count(evil) == 2
    assert "–" in page.cells


def test_a_packed_page_holds_what_it_would_hold(pages):
    page, plain = pages["packed"], pages["compare"]
    assert page.stat().st_size < plain.stat().st_size
    packed = read_page(page)
    assert packed == read_page(plain)


def test_a_packed_page_that_was_damaged_is_refused(pages, tmp_path):
    text = pages["packed"].read_text()
    at = text.index(">H4sI", text.index('id="sharpness-records"')) + 60
    broken = tmp_path / "page.html"
    broken.write_text(text[:at] + "AAAA" + text[at + 4 :])
    with pytest.raises(ValueError, match="damaged"):
        read_page(broken)


def test_tracked_points_stand_in_a_table_with_their_evidence(pages):
    page, records = Page(pages["train"]), read_page(pages["train"])
    points = [r["point"] for r in records if r["kind"] == "tracking"]
    assert len(points) >= 3
    for point in points:
        found = point["lambda_max"]
        assert any(c.startswith(f"{found['value']:.4g} ±") for c in page.cells)
        assert any(c.startswith(f"≥ {point['phi']['value']:.4g}") for c in page.cells)
    (ended,) = [r for r in records if r["kind"] == "training"]
    assert f"{ended['training']['metrics']['train_loss_batch']:.2g}" in page.cells


def test_of_points_that_were_measured_again_the_last_counts(pages, tmp_path):
    run = pages["train"].with_name("runs")
    records = read_records(run / "records.jsonl")
    again = deepcopy(next(r for r in records if r["kind"] == "tracking"))
    again["point"]["loss"] = 123.25
    folder = tmp_path / "runs"
    shutil.copytree(run, folder)
    call = [*tracked_run(tmp_path), "--report", str(tmp_path / "page.html")]
    for record in (*records, again):
        record["path"] = str(folder / Path(record["path"]).name)
    lines = "".join(json.dumps(record) + "\n" for record in (*records, again))
    (folder / "records.jsonl").write_text(lines)
    assert train_command.main(call) == 0
    kept = [r["point"] for r in read_page(tmp_path / "page.html") if "point" in r]
    assert [p["step"] for p in kept] == sorted({p["step"] for p in kept})
    assert kept[again["point"]["step"]]["loss"] == 123.25


def test_findings_follow_from_the_records_on_their_page(pages):
    paper = replace(PAPERS["keskar2017"], studies=[TINIER])
    store = ObservationStore(read_page(pages["findings"]))
    page = Page(pages["findings"])
    for name in ("table2", "figure2"):
        found = finding(paper, paper.item(name), TINIER, store)
        claims = [check for check in found.checks if check.role is not Role.PREMISE]
        assert all(set(cells(check)) <= set(page.cells) for check in claims)
    answer = "".join(Page(pages["answer"]).texts)
    store = ObservationStore(read_page(pages["answer"]))
    assert all(line in answer for line in paper.in_short.sentences(TINIER, store))


def test_an_observation_on_a_page_is_made_again(pages, tmp_path):
    record = read_page(pages["findings"])[0]
    again = Runner(folder=tmp_path).again(record)
    metrics = ("train_loss_batch", "test_accuracy_batch")
    old, new = record["found"]["metrics"], again["found"]["metrics"]
    assert [new[name] for name in metrics] == pytest.approx([old[name] for name in metrics])


def test_every_point_of_a_panel_stands_in_the_table(pages):
    store = ObservationStore(read_page(pages["findings"]))
    shown = PAPERS["keskar2017"].item("figure2").drawn(TINIER, store)
    table = Page(pages["findings"]).cells
    values = [y for panel in shown for curve in panel.curves for y in curve.y]
    assert values
    assert {plain(float(y)) for y in values} <= set(table)


# -- sizes -------------------------------------------------------------------------------


def test_pictures_that_make_a_page_too_large_are_left_out_last_first(tmp_path, monkeypatch):
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(0).normal(size=4000))
    table = Table(caption="numbers", columns=("n",), rows=[(1.5,)])
    shown = Picture(figure=figure, alt="x" * 30, table=table)
    sections = [Section(title=str(i), blocks=[shown]) for i in range(8)]
    whole = write_page(tmp_path / "whole.html", "t", sections, [{"a": 1}])
    monkeypatch.setattr(page_module, "MOST_BYTES", whole.stat().st_size - 1)
    size = write_page(whole, "t", sections, [{"a": 1}]).stat().st_size  # packed
    monkeypatch.setattr(page_module, "MOST_BYTES", int(0.6 * size))
    path = write_page(tmp_path / "page.html", "t", sections, [{"a": 1}])
    assert path.stat().st_size <= 0.6 * size
    packed = path.read_text().partition('id="packed">')[2].partition("<")[0]
    main = gzip.decompress(base64.b64decode(packed)).decode()
    assert main.startswith("<p>4 of 8 pictures, the last ones, are left out")
    assert main.count("<svg") == 4
    assert main.count("<table") == 8
    assert read_page(path) == [{"a": 1}]


@pytest.mark.slow
def test_the_largest_measurement_stays_below_the_limit(pages, tmp_path, monkeypatch):
    found, radii = [], "1e-2,5e-3,2e-3,1e-3,5e-4"
    real = _pages.measurement_page
    monkeypatch.setattr(
        _pages, "measurement_page", lambda path, all: found.extend(all) or real(path, all)
    )
    call = [str(pages["measure"].with_name("0.pt")), "--measures", "all", "--k", "20", *FEW]
    call += [
        "--epsilon",
        radii,
        "--rho",
        radii,
        "--output",
        str(tmp_path / "records.jsonl"),
    ]
    path = tmp_path / "page.html"
    assert measure.main([*call, "--report", str(path)]) in (0, 1)
    sizes = [path.stat().st_size]
    sizes.append(real(path, found * 8).stat().st_size)
    assert max(sizes) <= MOST_BYTES


def test_the_largest_plane_stays_below_the_limit(pages, tmp_path):
    (record,) = read_page(pages["plane"])
    found = loss_plane(softmax_regression().risk(), num_points=51)
    record["landscape"] = as_plain(found)
    path = _pages.landscape_page(tmp_path / "page.html", found, record, "a command")
    assert path.stat().st_size <= MOST_BYTES


def test_many_long_tracks_stay_below_the_limit(pages, tmp_path):
    records, draw = read_page(pages["train"]), random.Random(0)
    (ended,) = [r for r in records if r["kind"] == "training"]
    first = next(r for r in records if r["kind"] == "tracking")
    many = []
    for run in range(8):
        many.append(ended | {"path": f"{run}.pt"})
        for step in range(100):
            new = deepcopy(first) | {"path": f"{run}.pt"}
            new["point"] |= {"step": step, "loss": draw.random()}
            for name in ("lambda_max", "phi"):
                new["point"][name] |= {"value": draw.random(), "error": draw.random()}
            many.append(new)
    empty = Table(caption="", columns=(), rows=[])
    path = _pages.training_page(tmp_path / "page.html", empty, {}, many, "a command")
    assert path.stat().st_size <= MOST_BYTES


# -- pictures ----------------------------------------------------------------------------


def test_marks_lie_where_the_picture_has_them():
    x, y = [1.0, 2.0, 4.0], [3.0, 5.0, 4.0]
    curve = ("phi ≥", y, [2.5, 4.0, float("nan")], [3.5, 6.0, float("nan")])
    figure = figures.points_plot(x, [curve], labels=("epsilon", "phi, %"))
    drawn = ElementTree.fromstring(svg.text_of(svg.drawn(figure)))
    ((names, shown),) = marks.marks(figure)
    assert names == ["phi ≥", "epsilon", "phi, %"]
    told = [["", "1", "3 (2.500 to 3.500)"], ["", "2", "5 (4 to 6)"], ["", "4", "4"]]
    assert [each[2:] for each in shown] == told
    places = {(e.get("x"), e.get("y")) for e in drawn.iter("use")}
    used = np.array([[float(a), float(b)] for a, b in places])
    for px, py, *_ in shown:
        assert np.abs(used - [px, py]).max(axis=1).min() <= 0.15


def test_a_bar_is_told_with_its_name_and_the_text_beside_it():
    figure = figures.bars_plot(["a", "b"], [2.0, 0.5], [0.1, 0.0], label="loss")
    svg.drawn(figure)
    ((names, shown),) = marks.marks(figure)
    assert names[1] == "loss"
    assert [each[2:4] for each in shown] == [["a", "2"], ["b", "0.5"]]
    assert shown[0][0] > shown[1][0]  # the longer bar ends further right
    assert shown[0][1] < shown[1][1]  # and stands above


def test_every_cell_of_a_map_is_told():
    found = loss_plane(softmax_regression().risk(), num_points=3)
    figure = found.plot()
    svg.drawn(figure)
    first = marks.marks(figure)[0]
    assert first[0][2] == "loss"
    told = {each[4] for each in first[1]}
    assert len(first[1]) == 9
    assert told == {plain(v) for v in found.values.ravel().tolist()}


def test_a_long_curve_is_told_at_every_so_many_points():
    figure = Figure()
    figure.subplots().plot(np.arange(1000.0), np.arange(1000.0))
    svg.drawn(figure)
    ((_, shown),) = marks.marks(figure)
    assert [int(each[3]) for each in shown[:3]] == [0, 4, 8]


def _linear(colour):
    """Linear RGB of `#rrggbb`."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _seen(colour, matrix):
    """A colour in CIELAB, as an eye sees it (Machado et al. 2009, severity 1)."""
    linear = np.clip(np.array(matrix) @ _linear(colour), 0, 1)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1, 1.0888]
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array(
        [116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])]
    )


EYES = {
    "usual": np.eye(3).tolist(),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("eye", EYES)
def test_the_colours_of_panels_are_told_apart(eye):
    seen = [_seen(colour, EYES[eye]) for colour in panels.COLOURS]
    pairs = [(a, b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(np.linalg.norm(a - b) for a, b in pairs) > 20


def test_the_colours_of_panels_stand_out_from_white():
    luminances = [_linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in panels.COLOURS]
    assert 1.05 / (max(luminances) + 0.05) >= 3  # WCAG 2.2, 1.4.11


def test_in_grey_every_curve_has_a_mark_of_its_own(tmp_path):
    curves = [panels.Curve(label=str(i), x=[0, 1], y=[i, i], colour=i) for i in range(7)]
    panel = panels.Panel(title="", x_label="x", y_label="y", curves=curves)
    (axes,) = panels.panels_figure([panel], title="t").axes
    assert len({line.get_marker() for line in axes.lines}) == 7


# -- in a browser ------------------------------------------------------------------------


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
        page.wait_for_selector("body[data-ready]")
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
        widths = "svgs => svgs.map(svg => svg.getBoundingClientRect().width)"
        assert min(page.locator("figure svg").evaluate_all(widths)) > 100


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", ["measure", "plane", "batchsize", "train", "packed"])
def test_the_arrow_keys_reach_every_value(opened, kind):
    page = opened(kind)
    for figure in page.locator("figure").all():
        table = figure.locator(".wide").last
        cells = figure.locator("tbody").evaluate(
            "body => [...body.rows].map(row => [...row.cells].map(c => c.textContent))"
        )
        table.focus()
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


MARKS = """figure => JSON.parse(figure.querySelector(".marks").textContent).flatMap(
    ([names, each]) => each.map(([x, y, ...told]) => [x, y, told.filter(Boolean)]))"""


@pytest.mark.parametrize("kind", ["measure", "plane", "train", "findings", "packed"])
def test_the_values_of_every_mark_are_read_by_keys_and_on_hover(opened, kind):
    page = opened(kind)
    for figure in page.locator("figure:has(svg)").all():
        known, live = figure.evaluate(MARKS), figure.locator("[aria-live=polite]")
        figure.locator(".wide").first.focus()
        for x, y, told in known[:30]:
            page.keyboard.press("ArrowRight")
            assert all(text in live.inner_text() for text in told)
            ring = figure.locator(".ring")
            assert [float(ring.get_attribute(a)) for a in ("cx", "cy")] == [x, y]
        page.keyboard.press("End")
        assert all(text in live.inner_text() for text in known[-1][2])
        x, y, _ = known[0]
        place = f"""svg => {{ const p = new DOMPoint({x + 0.5}, {y}).matrixTransform(
            svg.getScreenCTM()); return [p.x, p.y]; }}"""
        drawn = figure.locator("svg")
        drawn.scroll_into_view_if_needed()
        page.keyboard.press("Home")  # scrolls to the first mark
        page.keyboard.press("End" if len(known) > 1 else "Home")
        drawn.evaluate(f"svg => svg.parentNode.scrollTo({{ left: {x} - 100 }})")
        drawn.evaluate(f"""svg => scrollBy(0, ({place})(svg)[1] - innerHeight / 2)""")
        page.mouse.move(*drawn.evaluate(place))
        nearest = [told for a, b, told in known if abs(a - x) < 1 and abs(b - y) < 1]
        said = live.inner_text()
        assert any(all(text in said for text in told) for told in nearest)
        page.mouse.move(0, 0)
        assert figure.locator(".ring").count() == 0


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
