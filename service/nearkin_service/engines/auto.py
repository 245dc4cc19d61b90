"""The rule of engine `auto`, in one place.

`mixed` where it is known to win, else `flat`:

- its packages are installed (`nearkin-service[mixed]`) and the processor has AVX2: such multiply int16
  quicker than float32, others were not measured;
- the device is the CPU, or torch (`nearkin-service[torch]`) sees a GPU whose memory holds the keys of more
  than 2,048 classes: unlike `flat`, it scores what it found there, too;
- keys have at most 2,048 elements, or there are 512 classes at least: among fewer, most of the time goes into
  reading the rows, which `flat` does less often;
- there are few enough classes to compute all products at once, or k is at most a quarter of them: above, the
  k-th neighbour's similarity is near or below zero, where its sieve does not work, and little is left to
  leave out.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from nearkin_service.engines.installed import processor_flags
from nearkin_service.engines.ways import LONGEST_AT_ONCE, Job, few

ENGINES = ("auto", "flat", "mixed", "ivf")
_WORTH_A_SCAN = 512
_PACKAGES = {"numba": "mixed"}  # and the extra that brings it
_PACKAGES_ON_GPU = {**_PACKAGES, "torch": "torch"}
_INSTRUCTION = "avx2"


def choose(wanted: str, job: Job, device: str) -> tuple[str, str]:
    """The engine that builds, and why.

    Raises:
        ValueError: it was asked for by name and cannot be used here.
    """
    if wanted == "mixed" and (missing := mixed_packages_missing(device)):
        raise ValueError(f"engine: mixed cannot be used on {device}: {missing}; use engine auto or flat")
    if wanted != "auto":
        return wanted, "asked for"
    if device != "cpu":
        return _choose_on_gpu(job, device)
    if lacking := mixed_lacks():
        return "flat", f"auto, since {lacking}"
    if job.key_size > LONGEST_AT_ONCE and job.classes < _WORTH_A_SCAN:
        return "flat", "auto, since there are few classes of many elements"
    if not few(job.classes) and 4 * job.k > job.classes:
        return "flat", "auto, since k is more than a quarter of the classes"
    return "mixed", "auto, since it computes each product once"


def _choose_on_gpu(job: Job, device: str) -> tuple[str, str]:
    if missing := mixed_packages_missing(device):
        return "flat", f"auto, since {missing}"
    if few(job.classes):
        return "flat", "auto, since there are few classes"
    from nearkin_service.engines.mixed.halves import gpu_lacks

    if lacking := gpu_lacks(job.classes, job.key_size):
        return "flat", f"auto, since {lacking}"
    return "mixed", "auto, since torch sees a GPU"


@cache
def mixed_lacks() -> str | None:
    """What keeps `mixed` from paying on the CPU, or None."""
    return mixed_packages_missing() or _instructions_missing()


def mixed_packages_missing(device: str = "cpu") -> str | None:
    """What to install before `mixed` can be used there, or None."""
    needed = _PACKAGES if device == "cpu" else _PACKAGES_ON_GPU
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(needed[name] for name in missing))
        return f"{' and '.join(missing)} not installed (pip install 'nearkin-service[{extras}]')"
    return None


def _instructions_missing() -> str | None:
    flags = processor_flags()
    if not flags:
        return "the processor's instructions are unknown"
    return None if _INSTRUCTION in flags else f"this processor does not have {_INSTRUCTION}"
