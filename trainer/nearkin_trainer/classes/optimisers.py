"""Row-wise optimisers: they read and write the rows that a step has touched, and no others."""

from typing import Literal

import torch
from torch import nn

from nearkin_trainer.classes.rows import Rows, rounded


class RowOptimiser(nn.Module):
    """Updates the rows of a table that a step has touched, and no others.

    Its state is buffers, so that `state_dict` saves it. Rows that are not touched keep row and state as they
    are.
    """

    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        """Moves `table[gradient.ids]` against its gradient by learning rate `rate`."""
        raise NotImplementedError


class RowSGD(RowOptimiser):
    """Stochastic gradient descent; with momentum, each row's velocity moves only when the row does."""

    velocity: torch.Tensor

    def __init__(self, table: torch.Tensor, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("velocity", torch.zeros_like(table, dtype=torch.float32, requires_grad=False))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        velocity = self.momentum * self.velocity[gradient.ids] + gradient.values
        self.velocity[gradient.ids] = velocity
        _move(table, gradient.ids, velocity, rate)


class RowAdagrad(RowOptimiser):
    """Adagrad with one number per row: the sum of the mean squared gradients."""

    squares: torch.Tensor

    def __init__(self, table: torch.Tensor, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("squares", torch.zeros(table.shape[0], device=table.device))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        squares = self.squares[gradient.ids] + gradient.values.square().flatten(1).mean(1)
        self.squares[gradient.ids] = squares
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
        self.register_buffer("first", torch.zeros_like(table, dtype=torch.float32, requires_grad=False))
        self.register_buffer("second", torch.zeros_like(table, dtype=torch.float32, requires_grad=False))
        self.register_buffer("steps", torch.zeros(table.shape[0], device=table.device))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        ids, values = gradient.ids, gradient.values
        steps = self.steps[ids] + 1
        first = self.first[ids].lerp_(values, 1 - self.beta1)
        second = self.second[ids].mul_(self.beta2).addcmul_(values, values, value=1 - self.beta2)
        self.steps[ids], self.first[ids], self.second[ids] = steps, first, second
        steps = steps.double().view(-1, 1, 1, 1)  # 1 - 0.999 ** 1 has few digits left in float32
        deviation = second.div_((1 - self.beta2**steps).float()).sqrt_().add_(self.epsilon)
        scale = (1 - self.beta1**steps).float()
        _move(table, ids, first.div_(deviation).div_(scale), rate)


def _move(table: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, rate: float) -> None:
    """Takes `rate * steps` from some rows, in float32 whatever they are stored as."""
    if table.dtype == torch.float32:
        table.index_add_(0, ids, steps, alpha=-rate)
    else:
        table[ids] = rounded(table[ids].float().sub_(steps, alpha=rate), table.dtype)


RowOptimiserName = Literal["sgd", "adagrad", "adam"]
ROW_OPTIMISERS: dict[str, type[RowSGD] | type[RowAdagrad] | type[RowAdam]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "adam": RowAdam,
}
