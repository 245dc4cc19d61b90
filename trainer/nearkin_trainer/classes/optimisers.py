"""Row-wise optimisers: they read and write the rows that a step has touched, and no others."""

from typing import Literal

import torch
from torch import nn

from nearkin_trainer.classes.rows import Rows, put, rounded, take

BLOCK_BYTES = 2 * 2**20  # of gradient rows that are used at a time


class RowOptimiser(nn.Module):
    """Updates the rows of a table that a step has touched, and no others.

    Its state is buffers, so that `state_dict` saves it. Rows that are not touched keep row and state as they
    are.
    """

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        """Moves `table[gradient.ids]` against its gradient by learning rate `rate`.

        Block by block, in memory that caches hold; all at once would take two to four times the gradient.
        """
        size = max(1, BLOCK_BYTES // max(1, gradient.values[:1].nbytes))
        parts = zip(torch.split(gradient.ids, size), torch.split(gradient.values, size), strict=True)
        for ids, values in parts:
            self._update(table, Rows(ids, values), rate)

    def _update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        raise NotImplementedError


class RowSGD(RowOptimiser):
    """Stochastic gradient descent; with momentum, each row's velocity moves only when the row does."""

    velocity: torch.Tensor

    def __init__(self, table: torch.Tensor, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("velocity", _zeros(table, *table.shape))

    def _update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        velocity = take(self.velocity, gradient.ids).mul_(self.momentum).add_(gradient.values)
        put(self.velocity, gradient.ids, velocity)
        _move(table, gradient.ids, velocity, rate)


class RowAdagrad(RowOptimiser):
    """Adagrad with one number per row: the sum of the mean squared gradients."""

    squares: torch.Tensor

    def __init__(self, table: torch.Tensor, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("squares", _zeros(table, len(table)))

    def _update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        squares = take(self.squares, gradient.ids).add_(gradient.values.square().flatten(1).mean(1))
        put(self.squares, gradient.ids, squares)
        scale = (squares.sqrt() + self.epsilon).view(-1, 1, 1, 1)
        _move(table, gradient.ids, gradient.values / scale, rate)


class RowAdam(RowOptimiser):
    """Adam whose moments and step count are the row's own: a row that rests does not age."""

    first: torch.Tensor
    second: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self, table: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        super().__init__()
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.register_buffer("first", _zeros(table, *table.shape))
        self.register_buffer("second", _zeros(table, *table.shape))
        self.register_buffer("steps", _zeros(table, len(table)))

    def _update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        ids, values = gradient.ids, gradient.values
        steps = take(self.steps, ids).add_(1)
        first = take(self.first, ids).lerp_(values, 1 - self.beta1)
        second = take(self.second, ids).mul_(self.beta2).addcmul_(values, values, value=1 - self.beta2)
        for table_of, rows in ((self.steps, steps), (self.first, first), (self.second, second)):
            put(table_of, ids, rows)
        steps = steps.double().view(-1, 1, 1, 1)  # 1 - 0.999 ** 1 has few digits left in float32
        deviation = second.div_((1 - self.beta2**steps).float()).sqrt_().add_(self.epsilon)
        scale = (1 - self.beta1**steps).float()
        _move(table, ids, first.div_(deviation).div_(scale), rate)


def _move(table: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, rate: float) -> None:
    """Takes `rate * steps` from some rows, in float32 whatever they are stored as."""
    put(table, ids, rounded(take(table, ids).float().sub_(steps, alpha=rate), table.dtype))


def _zeros(table: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 zeros beside a table, written now: else the first steps would pay for the pages they touch."""
    return torch.empty(shape, device=table.device).zero_()


RowOptimiserName = Literal["sgd", "adagrad", "adam"]
ROW_OPTIMISERS: dict[str, type[RowSGD] | type[RowAdagrad] | type[RowAdam]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "adam": RowAdam,
}
