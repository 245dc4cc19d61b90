"""Engine `mixed` on a GPU, through torch: products in float16, and exact scores of what they cannot rule out.

A block of rows is multiplied with all keys. Products lie in groups, of which first only the largest is looked
at: the k-th largest of these is no larger than the k-th product. The members of the most promising groups are
ordered, and those that may be among the k best are scored in float64. What was left out has a value that is
known, so it is proved per row that nobody is missing; rows without proof look at more, then at everybody.

Dimension letters: M keys, D elements of a key, Q rows of a block, C candidates of a row, k neighbours.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.canonical import EMPTY, STEPS, doubtful_distance, settle_doubt
from nearkin_service.engines.complete import Queries, exact_ranks
from nearkin_service.engines.contract import BuildMonitor, BuiltTable
from nearkin_service.engines.flat import spread
from nearkin_service.engines.keys import KeyedRows
from nearkin_service.engines.mixed.cpu import search_again
from nearkin_service.engines.mixed.halves import BLOCK_BYTES, GROUP, HalfKeys, gpu_lacks
from nearkin_service.engines.mixed.held import KeptKeys, Keys
from nearkin_service.engines.mixed.rerank import cut_at
from nearkin_service.engines.mixed.upload import keys_on
from nearkin_service.engines.mixed.versions import versions
from nearkin_service.engines.pacing import Pace, Silence

log = logging.getLogger("nearkin.engines")

_MOST_ROWS, _FEWER_ROWS = 4096, 256  # the second where more groups are looked at
_SCORED_BYTES = 1 << 28
_SUMMED = 4096  # elements that are summed in any order; these sums are added up one by one
_MORE, _WIDER = 16, 4  # groups beyond the neighbours; times as many for rows without proof


def build_on_gpu(source: KeyedRows, k: int, monitor: BuildMonitor, device: str = "cuda") -> BuiltTable:
    """The exact neighbour table [N, k], on torch's first GPU.

    Raises:
        ValueError: the keys do not fit into the GPU's memory, or torch has none.
        RuntimeError: the GPU's answer to a small question is wrong.
    """
    import torch

    began = time.monotonic()
    present = source.present()
    lacking = gpu_lacks(len(present), source.key_size) if device == "cuda" else None
    if lacking:
        raise ValueError(f"engine: mixed cannot be used on cuda: {lacking}; use engine flat, or device cpu")
    _check_answers(device)
    keys, on_device_MD = keys_on(device, source, present, monitor)
    keyed = time.monotonic()
    ranks_Mk, redone, seconds = self_join(keys, on_device_MD, k, monitor)
    del on_device_MD
    torch.cuda.empty_cache()  # FAISS may want it
    ids, scores = spread(ranks_Mk, present, len(source.rows))
    seconds = {"keys": keyed - began, **seconds}
    return BuiltTable(ids, scores, "mixed", device, True, redone, seconds, versions(by_torch=True))


def self_join(
    keys: Keys, on_device_MD: Any, k: int, monitor: BuildMonitor
) -> tuple[NDArray[np.int64], int, dict[str, float]]:
    """Ranks int64 [M, k], how many rows needed the second path, and seconds by stage.

    The keys are given as the host has them, and on the device.
    """
    count = keys.shape[0]
    ranks_Mk = np.full((count, k), EMPTY)
    if not count:
        return ranks_Mk, 0, {}
    times = [time.monotonic()]
    with _summing_in_float32():
        halves = HalfKeys(on_device_MD)
        times.append(time.monotonic())
        search = _Search(halves, keys)
        everybody = np.arange(count)
        search.run(everybody, k + _MORE, ranks_Mk, Pace(monitor, "search", count))
        times.append(time.monotonic())
        redo = _unproved(ranks_Mk, k)
        if len(redo):
            search.run(redo, _WIDER * (k + _MORE), ranks_Mk, Pace(monitor, "second path", len(redo)))
    left = _unproved(ranks_Mk, k)
    if len(left):
        search_again(left, keys.whole(), ranks_Mk, monitor)
    times.append(time.monotonic())
    names = ("rounding", "search", "second path")
    return ranks_Mk, len(redo), dict(zip(names, np.diff(times).tolist(), strict=True))


class _Search:
    """Ranks of rows, as far as they are proved."""

    def __init__(self, halves: HalfKeys, keys: Keys) -> None:
        self._halves, self._keys = halves, keys

    def run(self, rows: NDArray[np.int64], groups: int, ranks_Mk: NDArray[np.int64], pace: Pace) -> None:
        """Write the ranks of these rows, found among so many groups; `EMPTY` where that proves nothing."""
        most = _MOST_ROWS if len(rows) == len(ranks_Mk) else _FEWER_ROWS
        step = max(1, min(most, BLOCK_BYTES // self._halves.bytes_per_row()))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            found_Qk, reach_Q = self._best(some, groups, ranks_Mk.shape[1])
            ranks_Mk[some] = cut_at(reach_Q, found_Qk)
            pace.done(start + len(some))

    def _best(
        self, rows: NDArray[np.int64], groups: int, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k best candidates' ranks [Q, k], and the greatest score that anybody else can have [Q]."""
        import torch

        device = self._halves.whole.device
        own_Q = torch.from_numpy(rows).to(device)
        errors_Q = torch.from_numpy(self._halves.errors[rows]).to(device)
        products_QM = self._halves.products(own_Q)
        products_QM[torch.arange(len(rows), device=device), own_Q] = -torch.inf
        values_QC, positions_QC, outside_Q = _most_promising(products_QM, groups)
        kth_Q = values_QC.topk(min(k, values_QC.shape[1]), dim=1).values[:, -1].double()
        wanted = int((values_QC.double() >= (kth_Q - 2 * errors_Q)[:, None]).sum(1).max())
        if wanted < values_QC.shape[1]:
            values_QC, chosen_QC = values_QC.topk(wanted + 1, dim=1)
            outside_Q = torch.maximum(outside_Q, values_QC[:, wanted])
            values_QC = values_QC[:, :wanted]
            positions_QC = positions_QC.gather(1, chosen_QC[:, :wanted])
        packed_QC = self._ranks(rows, own_Q, positions_QC.clamp(max=self._keys.shape[0] - 1))
        packed_QC[values_QC == -torch.inf] = int(EMPTY)  # itself, or beyond the last key
        best_Qk = torch.sort(packed_QC, dim=1).values[:, :k].cpu().numpy()
        missing = k - best_Qk.shape[1]
        best_Qk = np.pad(best_Qk, ((0, 0), (0, missing)), constant_values=EMPTY)
        return best_Qk, (outside_Q.double() + errors_Q).cpu().numpy()

    def _ranks(self, rows: NDArray[np.int64], own_Q: Any, positions_QC: Any) -> Any:
        """Canonical ranks int64 [Q, C]; the few products next to half a step are summed again on the host."""
        import torch

        products_QC = self._scores(own_Q, positions_QC)
        whole_QC = products_QC.clamp(-1.0, 1.0) * STEPS
        steps_QC = whole_QC.round()
        size = self._keys.shape[1]
        terms = min(size, _SUMMED) + math.ceil(size / _SUMMED)
        doubtful = (whole_QC - steps_QC).abs() > 0.5 - doubtful_distance(terms)
        packed_QC = (-steps_QC.long() << 32) | positions_QC
        places = doubtful.nonzero().cpu().numpy()
        if len(places):
            others = positions_QC[doubtful].cpu().numpy()
            pairs = (self._keys, rows[places[:, 0]]), (self._keys, others)
            steps = settle_doubt(products_QC[doubtful].cpu().numpy(), terms, *pairs)
            packed_QC[doubtful] = torch.from_numpy((-steps << 32) | others).to(packed_QC.device)
        return packed_QC

    def _scores(self, own_Q: Any, positions_QC: Any) -> Any:
        """Products float64 [Q, C] of the float32 keys."""
        import torch

        keys_MD, candidates = self._halves.whole, positions_QC.shape[1]
        size = keys_MD.shape[1]
        part = min(size, _SUMMED)
        step = max(1, _SCORED_BYTES // (8 * part * max(1, candidates)))
        scores_QC = torch.zeros(positions_QC.shape, dtype=torch.float64, device=keys_MD.device)
        for left in range(0, size, part):
            columns_ME = keys_MD[:, left : left + part]
            for top in range(0, len(own_Q), step):
                some = slice(top, top + step)
                others_QCE = columns_ME[positions_QC[some]].double()
                queries_QE1 = columns_ME[own_Q[some]].double().unsqueeze(2)
                scores_QC[some] += torch.bmm(others_QCE, queries_QE1).squeeze(2)
        return scores_QC


def _most_promising(products_QM: Any, groups: int) -> tuple[Any, Any, Any]:
    """The best groups' values [Q, C], in no order, their positions, and the largest of other groups [Q]."""
    import torch

    count = (
        products_QM.shape[1] // GROUP
    )  # a group's members lie this far apart: neighbours are read together
    grouped = products_QM.view(-1, GROUP, count)
    largest_QG, chosen_QG = grouped.amax(1).topk(min(groups + 1, count), dim=1)
    outside_Q = torch.full_like(largest_QG[:, 0], -torch.inf)
    if groups < count:
        outside_Q, chosen_QG = largest_QG[:, groups], chosen_QG[:, :groups]
    members = chosen_QG[:, None, :].expand(-1, GROUP, -1)
    values_QC = grouped.gather(2, members).flatten(1)
    offsets = torch.arange(GROUP, device=products_QM.device)[None, :, None] * count
    return values_QC, (members + offsets).flatten(1), outside_Q


def _unproved(ranks_Mk: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return np.flatnonzero(ranks_Mk[:, k - 1] == EMPTY)


@contextmanager
def _summing_in_float32() -> Iterator[None]:
    """CUDA's library may add up in float16 by default."""
    import torch

    options = torch.backends.cuda.matmul
    before = options.allow_fp16_reduced_precision_reduction
    options.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        options.allow_fp16_reduced_precision_reduction = before


@cache
def _check_answers(device: str) -> None:
    """A GPU and libraries that do not fit each other can return wrong numbers rather than fail."""
    import torch

    keys_MD = np.random.default_rng(7).standard_normal((300, 24), dtype=np.float32)
    keys_MD /= np.linalg.norm(keys_MD, axis=1, keepdims=True)
    found, _, _ = self_join(KeptKeys(keys_MD), torch.from_numpy(keys_MD).to(device), 5, Silence())
    queries = Queries(keys_MD, np.arange(len(keys_MD)))
    if not np.array_equal(found, exact_ranks(queries, keys_MD, 5, Silence())):
        raise RuntimeError(
            f"torch on {device} returned wrong neighbours in the start-up check; its libraries do not fit "
            "this machine: reinstall torch, or use engine flat"
        )
