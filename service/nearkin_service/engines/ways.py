"""How engine `mixed` goes about a table on the CPU: one rule for who builds it and who loads its loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AT_ONCE = 2048
"""Classes up to which all products are computed at once, unless their keys are longer than this:"""
LONGEST_AT_ONCE = 2048
_SCANNED, _SHARE_SCANNED = 1_000_000, 1 / 8
"""Elements of all keys from which on a scan is quicker still, if so small a share of them are neighbours."""
_PANEL_ELEMENTS, _PANEL_NEIGHBOURS = 1 << 20, 256  # of fewer neighbours, fewer elements

Way = Literal["at once", "in panels", "by scanning"]


@dataclass(frozen=True, slots=True)
class Job:
    """What a table is built of: classes, elements of a key, neighbours."""

    classes: int
    key_size: int
    k: int


def few(classes: int) -> bool:
    """Whether a table of so many classes takes a moment only."""
    return classes <= AT_ONCE


def way_of(job: Job) -> Way:
    """The quickest: of short keys sieves cost more than computing each product twice."""
    elements = job.classes * job.key_size
    if few(job.classes) and job.key_size <= LONGEST_AT_ONCE:
        scanned = elements >= _SCANNED and job.k <= _SHARE_SCANNED * job.classes
        return "by scanning" if scanned else "at once"
    if elements <= _PANEL_ELEMENTS * min(1.0, (job.k + 32) / _PANEL_NEIGHBOURS):
        return "in panels"
    return "by scanning"
