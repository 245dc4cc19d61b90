"""Engine `ivf`: FAISS inverted lists in half precision; candidates scored exactly, recall measured.

Dimension letters: M keys, D elements of a key, S sampled keys, k neighbours.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, best, pair_steps, ranks
from nearkin_service.engines.complete import Queries
from nearkin_service.engines.contract import BuildMonitor, BuiltTable, MeasuredRecall
from nearkin_service.engines.flat import FlatIndex, filled_index, nearest, spread
from nearkin_service.engines.installed import faiss_version, load_faiss
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.pacing import BlockSize, Pace, blocks
from nearkin_service.engines.workers import in_threads, worker_count

log = logging.getLogger("nearkin.engines")

_SAMPLED_ROWS = 1000
_TRAINED_PER_LIST = 40
_ITERATIONS = 8
_FIRST_SAMPLED = 1 << 32  # products in the first block of rows that are searched exactly
_PROBES_APART = 16  # lists probed are found to a sixteenth
_SEED = 20261124
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Sample:
    """Some keys' positions and their true neighbours, int64 [S, k]."""

    positions: NDArray[np.int64]
    truth: NDArray[np.int64]


def build_ivf(source: KeyedRows, k: int, target: float, monitor: BuildMonitor) -> BuiltTable:
    """An approximate table whose recall on a sample is at least `target`.

    Two random samples of rows are searched exactly: one to choose how many lists to probe, and an independent
    one to report the recall. Runs on the CPU.
    """
    times = [time.monotonic()]
    index = filled_index(source, "cpu", monitor)
    times.append(time.monotonic())
    lists = _inverted_lists(index.keys_MD, monitor)
    times.append(time.monotonic())
    random = np.random.default_rng(_SEED)
    _tune(lists, index, _sample(index, k, random, monitor), target, monitor)
    report = _sample(index, k, random, monitor)
    times.append(time.monotonic())
    everyone = np.arange(len(index.keys_MD))
    ranks_Mk = _search(lists, index.keys_MD, everyone, k, Pace(monitor, "search", len(everyone)))
    recall = measured_recall(ranks_Mk[report.positions], report.truth)
    times.append(time.monotonic())
    ids, scores = spread(ranks_Mk, source.present(), len(source.rows))
    log.info("ivf: %d lists, %d probed, recall %.4f", lists.nlist, lists.nprobe, recall.value)
    seconds = dict(zip(("keys", "train", "tune", "search"), np.diff(times).tolist(), strict=True))
    versions = {"faiss": faiss_version(), "numpy": np.__version__}
    return BuiltTable(ids, scores, "ivf", "cpu", False, 0, seconds, versions, recall)


def measured_recall(found_Sk: NDArray[np.int64], truth_Sk: NDArray[np.int64]) -> MeasuredRecall:
    """The share of true neighbours found; the 95 % interval is over rows, whose hits hang together."""
    real = (truth_Sk != EMPTY).sum(axis=1)
    hits = np.array([np.isin(a, b[b != EMPTY]).sum() for a, b in zip(found_Sk, truth_Sk, strict=True)])
    shares = hits[real > 0] / real[real > 0]
    if not len(shares):
        return MeasuredRecall(1.0, 0.0, 1.0, 0)
    value = float(shares.mean())
    # even where nothing was missed, the rule of three leaves this much doubt
    half = max(_Z95 * float(shares.std()) / math.sqrt(len(shares)), 3.0 / int(real.sum()))
    return MeasuredRecall(value, max(0.0, value - half), min(1.0, value + half), len(shares))


def _inverted_lists(keys_MD: NDArray[np.float32], monitor: BuildMonitor) -> Any:
    """FAISS IVF over the keys, vectors in float16; trained and filled block by block."""
    faiss = load_faiss()
    count, size = keys_MD.shape
    lists = max(1, min(count // _TRAINED_PER_LIST, int(2 * math.sqrt(count))))
    quantizer = faiss.IndexFlatIP(size)
    centres = _centres(keys_MD, lists, monitor)
    quantizer.add(centres)
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(quantizer, size, lists, half, faiss.METRIC_INNER_PRODUCT, False)
    index.train(centres[:1])  # the lists' centres are there; float16 has nothing to learn
    for some in blocks(count, _first_block(), Pace(monitor, "add", count)):
        index.add(keys_MD[some])
    return index


def _centres(keys_MD: NDArray[np.float32], lists: int, monitor: BuildMonitor) -> NDArray[np.float32]:
    """Directions [lists, D] that divide the keys: spherical k-means on a sample.

    FAISS's own training cannot be stopped, and takes minutes for wide keys.
    """
    faiss = load_faiss()
    random = np.random.default_rng(_SEED)
    chosen = np.sort(random.permutation(len(keys_MD))[: _TRAINED_PER_LIST * lists])
    if not len(chosen):
        return np.zeros((lists, keys_MD.shape[1]), np.float32)
    centres: NDArray[np.float32] = keys_MD[np.sort(random.choice(chosen, lists, replace=False))]
    pace = Pace(monitor, "train", len(chosen) * _ITERATIONS)
    for iteration in range(_ITERATIONS):
        nearest_centre = faiss.IndexFlatIP(keys_MD.shape[1])
        nearest_centre.add(centres)
        sums = np.zeros(centres.shape, np.float64)
        for some in blocks(len(chosen), _first_block(), pace, iteration * len(chosen)):
            keys = keys_MD[chosen[some]]
            owner = nearest_centre.search(keys, 1)[1][:, 0]
            order = np.argsort(owner, kind="stable")
            owners, starts = np.unique(owner[order], return_index=True)
            sums[owners] += np.add.reduceat(keys[order].astype(np.float64), starts, axis=0)
        lengths = np.linalg.norm(sums, axis=1)
        empty = np.flatnonzero(lengths == 0)
        sums[empty], lengths[empty] = keys_MD[random.choice(chosen, len(empty))], 1.0
        centres = (sums / lengths[:, None]).astype(np.float32)
    return centres


def _first_block() -> BlockSize:
    return BlockSize(256, 1 << 15)


def _sample(index: FlatIndex, k: int, random: np.random.Generator, monitor: BuildMonitor) -> Sample:
    count = len(index.keys_MD)
    positions = np.sort(random.choice(count, min(count, _SAMPLED_ROWS), replace=False))
    truth_Sk = np.full((len(positions), k), EMPTY)
    block = BlockSize(max(1, _FIRST_SAMPLED // max(1, index.keys_MD.size)), len(positions))
    done = 0
    while done < len(positions):
        block.start()
        own = positions[done : done + block.rows]
        truth_Sk[done : done + len(own)], _ = nearest(index, Queries(index.keys_MD[own], own), k, monitor)
        monitor.check()
        done += len(own)
        block.finish()
    return Sample(positions, truth_Sk)


def _tune(lists: Any, index: FlatIndex, sample: Sample, target: float, monitor: BuildMonitor) -> None:
    """Probe twice as many lists until the sample's recall reaches the target, then as few as still do."""

    def reached(probed: int) -> bool:
        lists.nprobe = probed
        pace = Pace(monitor, "tune", len(sample.positions))
        found = _search(lists, index.keys_MD, sample.positions, sample.truth.shape[1], pace)
        recall = measured_recall(found, sample.truth)
        log.debug("ivf: %d of %d lists probed, recall %.4f", probed, lists.nlist, recall.value)
        return recall.low >= target

    too_few, enough = 0, min(4, lists.nlist)
    while not reached(enough) and enough < lists.nlist:
        too_few, enough = enough, min(lists.nlist, 2 * enough)
    while enough - too_few > max(1, enough // _PROBES_APART):
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if reached(middle) else (middle, enough)
    lists.nprobe = enough


def _search(
    lists: Any, keys_MD: NDArray[np.float32], own: NDArray[np.int64], k: int, pace: Pace
) -> NDArray[np.int64]:
    """Ranks int64 [len(own), k], every candidate scored exactly."""
    ranks_Sk = np.full((len(own), k), EMPTY)
    count = min(k + 1 + max(8, k // 4), len(keys_MD))
    for some in blocks(len(own), _first_block(), pace):
        _, found = lists.search(keys_MD[own[some]], count)
        _rescore(keys_MD, own[some], found, ranks_Sk[some])
    return ranks_Sk


def _rescore(
    keys_MD: NDArray[np.float32],
    own: NDArray[np.int64],
    found: NDArray[np.int64],
    out_Sk: NDArray[np.int64],
) -> None:
    step = math.ceil(len(own) / worker_count())

    def work(start: int) -> None:
        some = slice(start, start + step)
        others = np.where(found[some] == own[some, None], -1, found[some])
        packed = ranks(pair_steps(keys_MD[own[some]], keys_MD, others), others)
        out_Sk[some] = best(packed, out_Sk.shape[1])

    in_threads(work, range(0, len(own), step))
