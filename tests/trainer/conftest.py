"""What several tests need: a real neighbour service, or a single thread."""

from collections.abc import Iterator

import pytest
import torch
from nearkin_client.testing import nearkin, nearkin_server

__all__ = ["nearkin", "nearkin_server"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other; on a busy machine, very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
