"""What tiles are multiplied in on this processor."""

from __future__ import annotations

import logging
import time
from functools import cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.installed import processor_flags
from nearkin_service.engines.mixed.fixed import FixedKeys
from nearkin_service.engines.mixed.rounded import RoundedKeys

log = logging.getLogger("nearkin.engines")

_INSTRUCTION = "amx_bf16"
_ROWS, _SIZE, _TRIALS = 1024, 512, 7  # two blocks
_WORTH_ROUNDING = 1.2


@cache
def fastest_products() -> str:
    """Either "int16", or "bfloat16" where that gains something; says at INFO which, and why.

    Processors with AMX multiply bfloat16 several times as fast as anything else that is as precise, through
    torch. Others do not, and int16 leaves fewer rows in doubt.
    """
    chosen, why = _fastest()
    log.info("tiles are multiplied in %s: %s", chosen, why)
    return chosen


def _fastest() -> tuple[str, str]:
    if _INSTRUCTION not in processor_flags():
        return "int16", f"this processor does not have {_INSTRUCTION}"
    if find_spec("torch") is None:
        return "int16", "bfloat16 needs torch (pip install 'nearkin-service[torch]'), and is quicker here"
    keys_MD = np.random.default_rng(0).standard_normal((_ROWS, _SIZE), np.float32)
    ratio = _tile_seconds(FixedKeys(_ROWS, _SIZE), keys_MD) / _tile_seconds(
        RoundedKeys(_ROWS, _SIZE), keys_MD
    )
    chosen = "bfloat16" if ratio > _WORTH_ROUNDING else "int16"
    return chosen, f"bfloat16 is {ratio:.1f} times as fast as int16 here"


def _tile_seconds(keys: FixedKeys | RoundedKeys, keys_MD: NDArray[np.float32]) -> float:
    keys.put(0, keys_MD)
    times = []
    with keys.computing():
        multiplier = keys.multiplier()
        for _ in range(_TRIALS):
            began = time.perf_counter()
            multiplier.tile(0, 1)
            times.append(time.perf_counter() - began)
    return min(times)
