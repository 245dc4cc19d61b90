"""The protocol against one written plainly, query by query."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_trainer.data.values import JUNK, NO_CAMERA, ImageList
from nearkin_trainer.distributed import World
from nearkin_trainer.evaluate import (
    Identities,
    cosine_scores,
    euclidean_scores,
    extract,
    identities,
    qaconv_scores,
    retrieve,
)
from nearkin_trainer.matching import QAConv


@dataclass
class Picture:
    label: int
    camera: int
    file: int


def _plainly(scores: list[list[float]], queries: list[Picture], gallery: list[Picture]) -> dict[str, float]:
    firsts, precisions = [], []
    for query, row in zip(queries, scores, strict=True):
        counted = []
        for score, picture in zip(row, gallery, strict=True):
            same_camera = picture.camera == query.camera and picture.camera != NO_CAMERA
            if picture.label == JUNK or picture.file == query.file:
                continue
            if picture.label == query.label and same_camera:
                continue
            counted.append((score, picture.label == query.label))
        counted.sort(key=lambda pair: -pair[0])
        places = [i for i, (_, right) in enumerate(counted) if right]
        if places:
            firsts.append(places[0])
            precisions.append(sum((n + 1) / (place + 1) for n, place in enumerate(places)) / len(places))
    judged = len(firsts)
    ranks = {f"rank{r}": sum(f < r for f in firsts) / judged if judged else math.nan for r in (1, 5, 10)}
    return {**ranks, "mAP": sum(precisions) / judged if judged else math.nan, "queries": judged}


picture = st.builds(Picture, st.integers(-1, 4), st.integers(-1, 2), st.integers(0, 40))


def _identities(pictures: list[Picture]) -> Identities:
    return Identities(
        torch.tensor([p.label for p in pictures], dtype=torch.int64),
        torch.tensor([p.camera for p in pictures], dtype=torch.int64),
        torch.tensor([p.file for p in pictures], dtype=torch.int64),
    )


@given(
    st.lists(picture, min_size=1, max_size=25),
    st.lists(picture, max_size=25),
    st.integers(0, 2**31),
    st.integers(2, 50),
)
@settings(deadline=None)
def test_against_the_plain_protocol(
    queries: list[Picture], gallery: list[Picture], seed: int, levels: int
) -> None:
    queries = [Picture(abs(q.label), q.camera, q.file) for q in queries]
    # Few levels make ties; both sides keep the gallery's order among equals.
    scores = torch.randint(
        0, levels, (len(queries), len(gallery)), generator=torch.Generator().manual_seed(seed)
    )
    rows = iter(torch.split(scores.float(), 64))
    found = retrieve(
        World(),
        torch.zeros(len(queries), 1),
        _identities(queries),
        _identities(gallery),
        lambda _: next(rows),
    )
    expected = _plainly(scores.tolist(), queries, gallery)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, nan_ok=True), name
    assert found.left_out == len(queries) - expected["queries"]


def test_the_same_file_never_matches_itself(tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"{i}" for i in range(4))
    both = ImageList(paths, np.array([0, 0, 1, 1]), np.full(4, NO_CAMERA))
    query, gallery = identities(both, both)
    features = torch.eye(4)
    found = retrieve(World(), features, query, gallery, cosine_scores(features))
    assert found.rank1 == pytest.approx(0.5)  # all others tie; the gallery's order decides


def test_nan_scores_are_an_error() -> None:
    who = _identities([Picture(0, -1, 0), Picture(0, -1, 1)])
    with pytest.raises(ValueError, match="NaN"):
        retrieve(World(), torch.zeros(2, 1), who, who, lambda q: torch.full((len(q), 2), torch.nan))


def test_qaconv_scores_find_shifted_patterns() -> None:
    torch.manual_seed(0)
    patterns = torch.randn(6, 8, 3, 3)
    gallery = patterns.roll(1, dims=3) + 0.05 * torch.randn_like(patterns)
    who_asks = _identities([Picture(i, -1, i) for i in range(6)])
    who_answers = _identities([Picture(i, -1, 10 + i) for i in range(6)])
    head = QAConv(3, 3)
    found = retrieve(World(), patterns, who_asks, who_answers, qaconv_scores(head, gallery))
    assert found.rank1 == 1.0
    assert retrieve(World(), patterns, who_asks, who_answers, cosine_scores(gallery)).rank1 < 1.0


def test_euclidean_scores_rank_by_distance() -> None:
    gallery = torch.tensor([[0.0, 3.0], [1.0, 0.0], [5.0, 5.0]])
    assert euclidean_scores(gallery)(torch.tensor([[0.0, 0.0]])).argsort(descending=True).tolist() == [
        [1, 0, 2]
    ]


def test_extract_uses_evaluation_mode_and_leaves_training_mode_alone() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).train()
    images = torch.randn(5, 3, 4, 4)
    features = extract(World(), network, lambda numbers: images[numbers], 5, batch=2)
    assert network.training
    assert network[1].num_batches_tracked == 0
    assert torch.allclose(features, network.eval()(images), atol=1e-6)
