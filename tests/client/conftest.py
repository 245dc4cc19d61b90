"""The client's tests talk to real services: the shipped fixtures start them."""

from __future__ import annotations

from nearkin_client.testing import nearkin, nearkin_server

__all__ = ["nearkin", "nearkin_server"]
