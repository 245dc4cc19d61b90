"""The runs that the call being answered may see: set by the gate, asked by what lists runs."""

from __future__ import annotations

from contextvars import ContextVar

_runs: ContextVar[tuple[str, ...]] = ContextVar("runs", default=())


def limit_to(runs: tuple[str, ...]) -> None:
    """For the rest of this call, and no other; empty: all runs."""
    _runs.set(runs)


def reachable(run: str) -> bool:
    """Whether whoever asks may know that this run exists."""
    runs = _runs.get()
    return not runs or run in runs
