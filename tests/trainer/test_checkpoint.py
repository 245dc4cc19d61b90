"""Checkpoints come back as they were, or not at all."""

import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearkin_trainer import checkpoint
from nearkin_trainer.report import write_json


def test_a_tree_comes_back(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "weights": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "state": {0: {"step": 1, "on": True}, 1: [0.1, None, "text"]},
    }
    checkpoint.save(tmp_path / "c.npz", tree)
    back = checkpoint.load(tmp_path / "c.npz")
    for name in ("weights", "half", "flags", "scalar"):
        assert torch.equal(back[name], tree[name])
        assert back[name].dtype == tree[name].dtype
    assert back["state"] == tree["state"]


def test_an_optimiser_continues(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimiser: torch.optim.AdamW) -> None:
        optimiser.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()

    layer, optimiser = made()
    step(layer, optimiser)
    checkpoint.save(tmp_path / "c.npz", {"w": dict(layer.state_dict()), "o": optimiser.state_dict()})
    step(layer, optimiser)
    other, other_optimiser = made()
    saved = checkpoint.load(tmp_path / "c.npz")
    other.load_state_dict(saved["w"])
    other_optimiser.load_state_dict(saved["o"])
    step(other, other_optimiser)
    assert torch.equal(layer.weight, other.weight)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.npz", {"epoch": 1})
    with pytest.raises(TypeError, match="cannot hold a object"):
        checkpoint.save(tmp_path / "c.npz", {"epoch": 2, "what": object()})
    with pytest.raises(RuntimeError):
        _write_half(tmp_path / "c.npz")
    assert checkpoint.load(tmp_path / "c.npz") == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_a_disk_that_takes_no_more_is_said(tmp_path: Path) -> None:
    """Files may not grow beyond a mebibyte here, which the system tells as it tells of a full disk."""
    checkpoint.save(tmp_path / "c.npz", {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(ValueError, match=r"c\.npz of 0\.5 GiB cannot be written: .+ --resume"):
            checkpoint.save(tmp_path / "c.npz", {"epoch": 2, "rows": torch.zeros(2**27)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path / "c.npz") == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_a_small_file_that_the_disk_does_not_take_is_said(tmp_path: Path) -> None:
    """It fits into Python's buffer, and fails only at the end."""
    write_json(tmp_path / "m.json", {"rank1": 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(ValueError, match=r"m\.json cannot be written: .+ --resume"):
            write_json(tmp_path / "m.json", {"rank1": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
    assert "0.5" in (tmp_path / "m.json").read_text()


def _write_half(path: Path) -> None:
    with checkpoint.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive", b"hello"])
def test_what_is_not_a_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"c\.npz is not a checkpoint that can be read: File is not a zip file"
    ):
        checkpoint.load(tmp_path / "c.npz")


def test_pickle_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", tree=np.array([object()]))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.load(tmp_path / "c.npz")


def test_seeding_decides_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    checkpoint.seed_everything(1, 2, 3)
    first = draw()
    assert first != draw()
    checkpoint.seed_everything(1, 2, 3)
    assert first == draw()
    checkpoint.seed_everything(1, 2, 4)
    assert first != draw()
