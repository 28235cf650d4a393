"""Imports point one way, the mathematics is pure, and the door is what it says."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sharpness
from sharpness import _results, results

PACKAGE = Path(sharpness.__file__).parent

# Lowest first; a module imports from its own rank or a lower one.
RANKS = [
    {
        *("_tensors", "_arguments", "_run", "_progress", "_results", "_json", "_saving"),
        *("_ranks", "_launch"),
        *(
            "statistics",
            "report.figures",
            "report.landscapes",
        ),  # of plain numbers, no results
    },
    {"report"},
    {"krylov", "optimize"},
    {"risk", "lab.ghost"},  # a layer of its own, whoever trains
    {"measures", "compat"},
    {"tracking", "track_writers", "batchsize", "results"},
    {"checkpoint", "record", "state_dicts", "foreign_files"},
    {"lab"},
    {"loading", "measurement"},
    {"reproduce"},
    {
        "_command",
        "_pages",
        "measure",
        "compare",
        "landscape",
        "train",
        "batchsize.__main__",
        "reproduce.__main__",
        "reproduce.command",
        "reproduce.page",
        "reproduce.report_page",
        "__main__",
        "__init__",
    },
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
PURE = ("krylov", "optimize")
IMPURE = {"argparse", "json", "pathlib", "time", "random", "os", "sys", "logging"}
COMMANDS = {"measure", "landscape", "train", "reproduce", "compare", "batchsize", "lab"}


@cache
def modules(package: Path) -> dict[str, ast.Module]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name != "__init__":
            name = name.removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def ranked(name: str) -> str | None:
    """The longest beginning of a dotted name that has a rank of its own."""
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return name or None


def rank_of(name: str) -> int:
    found = ranked(name)
    assert found, f"{name} has no rank: add it to RANKS"
    return RANK[found]


def imported(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, without the package's name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {n.removeprefix("sharpness.") for n in names if n.startswith("sharpness.")}


def upward_imports(trees: dict[str, ast.Module]) -> list[str]:
    wrong = []
    for name, tree in trees.items():
        for target in imported(tree):
            found = ranked(target)
            if found and RANK[found] > rank_of(name):
                wrong.append(f"{name} imports {target}")
    return wrong


def test_no_module_imports_from_a_higher_rank():
    assert upward_imports(modules(PACKAGE)) == []


def circles(trees: dict[str, ast.Module]) -> list[str]:
    """Modules that import themselves by way of others."""
    graph = {
        name: {t for target in imported(tree) for t in trees if own(target, t, trees)}
        for name, tree in trees.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def own(target: str, name: str, trees: dict[str, ast.Module]) -> bool:
    """Whether `target`, a module or a name in it, means the module `name`."""
    return target == name or (target.rpartition(".")[0] == name and target not in trees)


def test_no_module_imports_itself_by_way_of_others():
    assert circles(modules(PACKAGE)) == []


def test_the_layer_test_sees_a_circle():
    code = {"risk.a": "from sharpness.risk.b import x", "risk.b": "import sharpness.risk.a"}
    assert set(circles({k: ast.parse(v) for k, v in code.items()})) == {"risk.a", "risk.b"}


def test_the_layer_test_sees_an_upward_import_and_an_unranked_module():
    upward = {"krylov.lanczos": ast.parse("from sharpness.risk.empirical import x")}
    assert upward_imports(upward) == ["krylov.lanczos imports risk.empirical.x"]
    with pytest.raises(AssertionError, match="has no rank"):
        upward_imports({"stray": ast.parse("import sharpness.risk")})


@pytest.mark.parametrize("name", [n for n in modules(PACKAGE) if n.split(".")[0] in PURE])
def test_the_mathematics_knows_no_file_clock_flag_or_print(name):
    tree = modules(PACKAGE)[name]
    used = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    calls = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & IMPURE
    assert "print" not in calls


def loaded_by(code: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys; {code}\nprint(*sys.modules)"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_a_measure_loads_no_lab_no_command_and_nothing_heavy_but_torch():
    loaded = loaded_by("from sharpness import EmpiricalRisk, eigenpairs")
    assert "sharpness.risk.empirical" in loaded
    heavy = {"matplotlib", "pyhessian", "pandas", "sklearn", "mlxtend", "pooch", "rich"}
    heavy |= {"scipy.linalg", "scipy.stats", "scipy.optimize", "scipy.sparse.linalg"}
    assert not loaded & (heavy | {f"sharpness.{name}" for name in COMMANDS})


def test_importing_sharpness_alone_loads_not_even_torch():
    loaded = loaded_by("import sharpness; assert sharpness.__version__")
    assert "sharpness" in loaded
    assert not loaded & {"torch", "numpy", "scipy"}


@pytest.mark.parametrize(
    "name",
    [
        *("measure", "compare", "landscape", "train"),
        *("reproduce.__main__", "batchsize.__main__"),
    ],
)
def test_the_help_of_a_command_loads_not_even_torch(name):
    code = f"""pass
import sharpness.{name}
try:
    sharpness.{name}.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
"""
    assert not loaded_by(code) & {"torch", "scipy", "rich", "matplotlib", "joblib"}


def test_the_list_of_commands_loads_not_even_torch():
    assert not loaded_by("import sharpness.__main__") & {"torch", "numpy", "scipy"}


@pytest.mark.parametrize("name", sharpness.__all__)
def test_a_public_name_is_what_it_is_called(name):
    assert getattr(sharpness, name).__name__ == name
    assert name in dir(sharpness)


def test_no_module_beside_the_public_names_shares_one_with_them():
    exported = set(sharpness.__all__)
    names = {name.split(".")[0] for name in modules(PACKAGE)}
    assert exported
    assert not exported & names


def test_the_changelog_starts_with_the_version():
    """What is not released yet may stand before it."""
    changelog = (PACKAGE.parent / "CHANGELOG.md").read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    released = [line for line in headings if line != "## Unreleased"]
    assert released[0].startswith(f"## {sharpness.__version__} ")
    assert headings.index(released[0]) <= 1


def test_every_error_of_ours_can_be_caught_by_name():
    ours = {
        name
        for name, thing in vars(_results).items()
        if isinstance(thing, type) and issubclass(thing, Exception)
    }
    assert ours >= {"NotAvailableError", "NotConvergedError", "NondeterministicRiskError"}
    assert ours - {"NonFiniteProductError"} <= set(results.__all__)  # becomes a status
