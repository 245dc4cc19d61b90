"""Keys on a GPU: in float32, and in float16 for products that its matrix units make many times as fast.

Dimension letters: M keys, P keys and what pads them to whole groups, D elements of a key, B keys of a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nearkin_service.engines.mixed.tiles import product_errors

GROUP = 32
"""Products of a row of which first only the largest is looked at."""
BLOCK_BYTES = 1 << 31
"""Of the products of a block of rows."""
_BYTES_PER_ELEMENT = 6  # of a key: float32 and float16
_PART = 2048  # elements that the hardware sums in its own order; these sums are added up in float32
_BLOCK = 1 << 26  # elements that are rounded at once


class HalfKeys:
    """Keys float32 [M, D] on a device of torch, `whole`, and rounded to float16 besides.

    Attributes:
        whole: the keys in float32.
        errors: float64 [M], by how much at most a value of `products` can differ from the true score.
    """

    def __init__(self, whole: Any) -> None:
        import torch

        count, size = whole.shape
        self._parts = [slice(start, start + _PART) for start in range(0, size, _PART)]
        self.whole = whole
        self._halves_PD = torch.zeros(
            math.ceil(count / GROUP) * GROUP, size, dtype=torch.float16, device=whole.device
        )
        lost_M = np.empty(count)
        step = max(1, _BLOCK // max(1, size))
        for start in range(0, count, step):
            some = slice(start, min(count, start + step))
            halves_BD = self._halves_PD[some]
            halves_BD.copy_(self.whole[some])
            away_BD = self.whole[some] - halves_BD.float()  # exact
            lost_M[some] = away_BD.norm(dim=1, dtype=torch.float64).cpu().numpy() * (1 + 1e-9)
        cut_off = 2 * (
            min(size, _PART) + len(self._parts)
        )  # matrix units do not round, which loses twice as much
        self.errors = product_errors(lost_M, cut_off) + self._rounded_away()

    def _rounded_away(self) -> float:
        """What storing parts of a product in float16 takes: a share of |a||b|, or half a least step."""
        return 2.0**-11 * 1.001 + len(self._parts) * 2.0**-24

    def products(self, some: Any) -> Any:
        """Of the keys in some positions with all, float16 or float32 [B, P]; beyond the last key -inf."""
        import torch

        rows_BD, (first, *others) = self._halves_PD[some], self._parts
        products_BP = rows_BD[:, first] @ self._halves_PD[:, first].T
        if others:
            products_BP = products_BP.float()
        for part in others:
            products_BP += rows_BD[:, part] @ self._halves_PD[:, part].T
        products_BP[:, len(self.whole) :] = -torch.inf
        return products_BP

    def bytes_per_row(self) -> int:
        """Of a block's products, while they are made."""
        return len(self._halves_PD) * (2 if len(self._parts) == 1 else 6)


def gpu_lacks(count: int, size: int) -> str | None:
    """What keeps torch's first GPU from building a table of so many keys, or None."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    free, _ = torch.cuda.mem_get_info()
    needed = _BYTES_PER_ELEMENT * count * size + 2 * BLOCK_BYTES
    if needed > free:
        return f"{count} keys of {size} need {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free"
    return None
