"""Damaged and hostile files: the worst that a mutant causes is a ShortcutError or a rejected file."""

import pytest
from fuzz import TARGETS, Material, fuzz  # benchmarks/fuzz.py, which runs ten thousand of each


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_read_or_refused(material, target):
    outcomes = fuzz(material, target, 300, seed=2)
    assert sum(outcomes.values()) == 300
    assert set(outcomes) != {"read"}
    assert not any("crashed" in outcome for outcome in outcomes)
