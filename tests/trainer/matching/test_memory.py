"""Blocks of memory that one step leaves to the next."""

from __future__ import annotations

import gc

import torch
from nearkin_trainer.matching import location_maxima
from nearkin_trainer.matching.cpu.memory import Blocks

LARGE = 1 << 20  # float32 values: more than a page of 2 MiB


def test_a_block_is_lent_again_once_nobody_sees_it() -> None:
    blocks = Blocks(kept=2)
    first = blocks.empty(2, LARGE // 2)
    where, row = first.data_ptr(), first[1]
    del first
    gc.collect()
    other = blocks.empty(LARGE)
    assert other.data_ptr() != where, "a view still sees the block"
    row.fill_(1.0)
    del row
    gc.collect()
    assert blocks.empty(LARGE + LARGE // 8).data_ptr() == where, "a little larger than before"


def test_few_blocks_lie_idle_and_none_serves_a_much_smaller_tensor() -> None:
    blocks = Blocks(kept=1)
    small, large = blocks.empty(LARGE), blocks.empty(8 * LARGE)
    large_at = large.data_ptr()
    del small
    del large
    gc.collect()
    other = blocks.empty(LARGE)  # kept, or it would lie idle in the large one's stead
    assert other.data_ptr() != large_at
    assert blocks.empty(8 * LARGE).data_ptr() == large_at


def test_a_gradient_that_is_kept_is_not_written_again() -> None:
    probes, classes = torch.randn(2, 64, 7, 7), torch.randn(200, 64, 7, 7, requires_grad=True)
    ids = torch.arange(400).view(2, 200) % 200
    (kept,) = torch.autograd.grad(location_maxima(probes, classes, ids, "cpu").sum(), [classes])
    before = kept.to_dense()
    (again,) = torch.autograd.grad(location_maxima(-probes, classes, ids, "cpu").sum(), [classes])
    assert torch.equal(kept.to_dense(), before)
    assert not torch.equal(again.to_dense(), before)
