"""What `make bench` names is there: it would show only after the others have run for an hour."""

import importlib.util

import pytest

from tests.bench.__main__ import BENCHMARKS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_named_benchmarks_exist(name: str) -> None:
    assert importlib.util.find_spec(f"tests.bench.{name}") is not None
