"""The same training with every backend, and a head that does not learn to prefer the unlike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nearkin_trainer.losses import softmax_loss
from nearkin_trainer.matching import SparseQAConv
from nearkin_trainer.matching.pairwise import pairwise_maxima
from torch import Tensor, nn

CLASSES, CHANNELS = 40, 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny convolutions on several threads spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Learner:
    """A small network, class maps and a head, learning to tell noisy pictures apart."""

    def __init__(self, backend: str, *, rate: float = 1e-2, monotone: bool = True) -> None:
        torch.manual_seed(0)
        self.pictures = torch.randn(CLASSES, 3, 12, 12)
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1)
        )
        self.matcher = SparseQAConv(CLASSES, CHANNELS, 3, 3, backend=backend)
        dense = [*self.network.parameters(), *self.matcher.head.parameters()]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(dense, rate, momentum=0.9),
            torch.optim.SGD(self.matcher.classes.parameters(), rate),
        ]
        self.monotone = monotone

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(CLASSES, (16,), generator=generator)
        noise = torch.randn(16, 3, 12, 12, generator=generator)
        neighbours = torch.randint(CLASSES, (CLASSES, 6), generator=generator)
        scores = self.matcher(self.network(self.pictures[labels] + 0.3 * noise), labels, neighbours)
        loss = softmax_loss(scores)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        torch.autograd.backward(loss)
        for optimiser in self.optimisers:
            optimiser.step()
        if self.monotone:
            self.matcher.head.keep_monotone()
        return float(loss.detach())

    def features(self, seed: int) -> Tensor:
        noise = torch.randn(self.pictures.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found: Tensor = self.network.eval()(self.pictures + 0.3 * noise)
        return found


def test_fifty_steps_give_the_same_loss_curve_on_every_backend() -> None:
    plain, cpu = Learner("plain"), Learner("cpu")
    curves = torch.tensor([[plain.step(number), cpu.step(number)] for number in range(50)])
    assert curves[-10:].mean() < curves[:10].mean()
    # float32 rounding grows as training goes on: a millionth at first, well under a thousandth at step 50.
    torch.testing.assert_close(curves[:5, 0], curves[:5, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(curves[:, 0], curves[:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("monotone", [True, False])
def test_a_head_born_upside_down_learns_dissimilarity_unless_kept_monotone(monotone: bool) -> None:
    # Random weights, as the published Linear(2·h·w → 1) starts with, sum to less than 0 half of the time.
    learner = Learner("cpu", rate=5e-2, monotone=monotone)
    with torch.no_grad():
        learner.matcher.head.fc.weight.neg_()
    if monotone:
        learner.matcher.head.fc.weight.data.add_(0.2)
        learner.matcher.head.keep_monotone()
    losses = [learner.step(number) for number in range(150)]
    assert losses[-1] < 0.8 * losses[0]
    head = learner.matcher.head.eval()
    first, second = learner.features(1), learner.features(2)
    right = torch.arange(CLASSES)
    by_maxima = (pairwise_maxima(first, second).sum(dim=2).argmax(dim=1) == right).float().mean()
    by_head = (head.pairwise(first, second).argmax(dim=1) == right).float().mean()
    assert by_maxima > 0.8
    assert (by_head > 0.8) if monotone else (by_head < 0.1)
