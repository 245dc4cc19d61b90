"""What fuzzing has found stays mended; and a little more of the same with every run of the tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_mended(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_random_bytes(name: str) -> None:
    chance = random.Random(name)
    for _ in range(40):
        TARGETS[name](chance.randbytes(chance.randrange(0, 24)))


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FOUND} == set(TARGETS)
