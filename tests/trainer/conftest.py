"""A real neighbour service for the tests that need one."""

from nearkin_client.testing import nearkin, nearkin_server

__all__ = ["nearkin", "nearkin_server"]
