from __future__ import annotations

import pytest
import torch
from nearkin_trainer.matching import QAConv, location_maxima
from torch import Tensor

from tests.trainer.matching.published import Published, shaken

SHAPE = (6, 3, 4)  # channels, height, width


def maps(count: int, seed: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_like(published: Published) -> QAConv:
    head = QAConv(SHAPE[1], SHAPE[2]).double()
    head.load_published(published.state_dict())
    return head


@pytest.mark.parametrize("doubled", [False, True], ids=["per direction", "both at once"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_scores_and_gradients_are_the_published_ones(doubled: bool, training: bool) -> None:
    published = shaken(Published(12, doubled=doubled).double(), 0)
    published.train(training)
    head = head_like(published).train(training)
    probes, gallery = maps(5, 1).requires_grad_(), maps(7, 2).requires_grad_()
    theirs = published(probes, gallery)
    weights = torch.randn_like(theirs)
    expected = torch.autograd.grad((theirs * weights).sum(), [probes, gallery, *published.parameters()])
    if training:
        ours = head.pairwise(probes, gallery)
    else:
        ours = head(location_maxima(probes, gallery, torch.arange(7).expand(5, -1), sparse_gradient=False))
        torch.testing.assert_close(head.pairwise(probes, gallery), ours)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad((ours * weights).sum(), [probes, gallery, *head.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(dict(head.state_dict()), dict(published.state_dict()))


def test_few_candidates_score_as_their_columns_of_all_pairs() -> None:
    published = shaken(Published(12).double(), 3)
    published.eval()
    probes, gallery = maps(5, 1), maps(9, 2)
    candidates = torch.tensor([[0, 8], [3, 3], [1, 2], [7, 0], [4, 5]])
    scores = head_like(published).eval()(location_maxima(probes, gallery, candidates))
    torch.testing.assert_close(scores, published(probes, gallery).gather(1, candidates))


def test_evaluation_in_blocks_agrees_across_block_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearkin_trainer.matching.pairwise.BLOCK_PROBES", 3)
    monkeypatch.setattr("nearkin_trainer.matching.pairwise.BLOCK_GALLERY", 4)
    published = shaken(Published(12).double(), 3)
    published.eval()
    head, probes, gallery = head_like(published).eval(), maps(7, 1), maps(9, 2)
    torch.testing.assert_close(head.pairwise(probes, gallery), published(probes, gallery))


def test_masked_candidates_leave_no_trace_in_training() -> None:
    candidates = torch.tensor([[0, -1, 2], [-1, 4, 1]])
    probes, classes = maps(2, 1), maps(5, 2).requires_grad_()
    head, plain = QAConv(3, 4).double(), QAConv(3, 4).double()
    scores = head(location_maxima(probes, classes, candidates), candidates >= 0)
    assert torch.equal(scores.isneginf(), candidates < 0)
    kept = location_maxima(probes, classes, candidates)[candidates >= 0]
    torch.testing.assert_close(scores[candidates >= 0], plain(kept[:, None])[:, 0])
    torch.testing.assert_close(dict(head.state_dict()), dict(plain.state_dict()))
    total = scores.masked_fill(candidates < 0, 0.0).square().sum()
    (gradient,) = torch.autograd.grad(total, [classes])
    assert gradient.coalesce().values().isfinite().all()


def test_slopes_are_the_evaluation_score_s_derivatives() -> None:
    for doubled in (False, True):
        head = head_like(shaken(Published(12, doubled=doubled).double(), 5)).eval()
        maxima = torch.rand(1, 1, 24, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(head(maxima).sum(), [maxima])
        torch.testing.assert_close(head.slopes(), expected.flatten())


def test_a_monotone_head_never_scores_a_better_match_lower() -> None:
    head = head_like(shaken(Published(12, doubled=True).double(), 6)).eval()
    assert (head.slopes() < 0).any()
    head.keep_monotone()
    assert (head.slopes() >= 0).all()
    assert (head.slopes() > 0).any()


def test_a_head_that_scores_dissimilarity_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    head = QAConv(3, 4).double().eval()
    head.pairwise(maps(2, 1), maps(2, 2))
    assert not caplog.records
    with torch.no_grad():
        head.fc.weight.neg_()
    head.pairwise(maps(2, 1), maps(2, 2))
    assert "scores dissimilar maps higher" in caplog.text


def test_nothing_to_score() -> None:
    masked = torch.zeros(2, 3, dtype=torch.bool)
    assert QAConv(3, 4)(torch.zeros(2, 3, 24), masked).isneginf().all()


def test_a_version_1_2_checkpoint_has_the_gallery_half_first() -> None:
    published = shaken(Published(12, doubled=True).double(), 0).eval()
    swapped = dict(published.state_dict())
    swapped["fc.weight"] = swapped["fc.weight"].roll(12, dims=1)
    head = QAConv(3, 4).double().eval()
    head.load_published({f"matcher.{name}": value for name, value in swapped.items()}, gallery_first=True)
    torch.testing.assert_close(head.pairwise(maps(3, 1), maps(4, 2)), published(maps(3, 1), maps(4, 2)))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"fc.weight is \[1, 9\]"):
        QAConv(3, 4).load_published(Published(9).state_dict())
    with pytest.raises(ValueError, match="found prefixes"):
        QAConv(3, 4).load_published({})
    with pytest.raises(ValueError, match="maxima must end in 24"):
        QAConv(3, 4)(torch.zeros(2, 3, 12))
    with pytest.raises(ValueError, match="height and width"):
        QAConv(0, 4)
