"""Damaged and hostile files: nothing but a ShortcutError, or a rejected file, comes of a mutant."""

import pytest
from fuzz import Material, fuzz  # benchmarks/fuzz.py, which runs ten thousand of each


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", ["idx", "manifest", "recipe", "checkpoint", "midi", "wav"])
def test_mutants_are_read_or_refused(stranger, target):
    outcomes = fuzz(stranger, target, 300, seed=2)
    assert sum(outcomes.values()) == 300
    assert set(outcomes) != {"read"}
    assert not any("crashed" in outcome for outcome in outcomes)
