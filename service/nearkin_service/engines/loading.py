"""Whether the compiled loops of engine `mixed` are there yet.

The first use in a process imports numba and loads machine code, or compiles it where no folder
keeps it: seconds. A table that FAISS builds in less does not wait for that; it is built by `flat`, the same
bytes, while a thread loads the loops for the next ones.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from nearkin_service.engines.pacing import Silence
from nearkin_service.engines.ways import Job, way_of

log = logging.getLogger("nearkin.engines")

_WORTH_WAITING = 1e11  # products: FAISS takes a second or more
_loaded = {"at once": threading.Event(), "scan": threading.Event()}
_loading: set[str] = set()
_failed: set[str] = set()
_ended = threading.Condition()


def ready(job: Job) -> bool:
    """Whether `mixed` is to build this; if not, it is being loaded from now on."""
    need = _need(job)
    if need in _failed:
        return False
    if _loaded[need].is_set() or job.classes**2 * job.key_size > _WORTH_WAITING:
        return True
    with _ended:
        if need not in _loading and not _loaded[need].is_set() and need not in _failed:
            _loading.add(need)
            try:
                threading.Thread(target=_load, args=(need,), name="nearkin-loading", daemon=True).start()
            except RuntimeError:  # there are as many as there may be
                _loading.discard(need)
    return False


@contextmanager
def first_use(job: Job) -> Iterator[None]:
    """Around a build by `mixed`: one that breaks before its loops were there is the last to try them.

    An import that memory ran out for stays half done as long as the process lives.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        if not _loaded[_need(job)].is_set():
            _give_up(_need(job), error)
        raise


def built(job: Job) -> None:
    """A table was built by `mixed`, so its loops are there; panels need the least of them."""
    if way_of(job) != "in panels":
        _loaded[_need(job)].set()


def wait(job: Job) -> None:
    """Return once `ready` says yes, or what it waits for has failed."""
    if not ready(job):
        with _ended:
            _ended.wait_for(lambda: _need(job) not in _loading)


def _need(job: Job) -> str:
    return "at once" if way_of(job) == "at once" else "scan"


def _load(need: str) -> None:
    try:
        _build_all(need)
        _loaded[need].set()
    except (OSError, MemoryError, RuntimeError) as error:  # the latter where there are no threads
        log.warning("engine mixed could not be loaded, which is tried again: %s", error)
    except Exception as error:
        _give_up(need, error)
    finally:
        with _ended:
            _loading.discard(need)
            _ended.notify_all()


def _give_up(need: str, error: Exception) -> None:
    """AttributeError comes after an import that came half way; what else than such is a mistake of ours."""
    expected = isinstance(error, ImportError | AttributeError | OSError)
    level, trace = (logging.WARNING, None) if expected else (logging.ERROR, error)
    log.log(level, "engine mixed cannot be loaded; auto takes flat from now on: %s", error, exc_info=trace)
    _failed.add(need)


def _build_all(need: str) -> None:
    """Build tables so small that loading is all it takes, one for each kind of loop."""
    from nearkin_service.engines.keys import KeyedRows
    from nearkin_service.engines.mixed.cpu import build_mixed, in_panels, mixed_self_join
    from nearkin_service.engines.mixed.scan import keys_for_tiles

    for size, k in ((8, 3), (8, 40), (2048, 3)):
        rows = np.random.default_rng(0).standard_normal((100, size), dtype=np.float32)
        source = KeyedRows(rows, (size,), "flat", np.empty(0, np.int64))
        if need == "at once":
            build_mixed(source, k, Silence())
        else:
            in_panels(source.keys_of(rows, np.arange(len(rows))), k, Silence())
            mixed_self_join(*keys_for_tiles(source, source.present(), Silence()), k, Silence())
