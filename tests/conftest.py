"""Property tests: the same examples at every run, so that a failure is one of the change at hand.

`HYPOTHESIS_PROFILE=random pytest` looks for new ones.
"""

import os

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture
def from_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients and services of this process meet over TCP as if they were on two hosts."""
    monkeypatch.setattr("nearkin_client.doors._why_unproven", lambda _: "another host")
    monkeypatch.setattr("nearkin_service.wire.origin._is_ours", lambda _: False)
