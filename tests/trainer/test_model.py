"""Backbones, the model, and the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nearkin_trainer.backbone import CompactResNet, choose_precision, map_shape
from nearkin_trainer.config import (
    BatchConfig,
    EmbeddingConfig,
    ImageConfig,
    ModelConfig,
    OptimiseConfig,
    TrainConfig,
)
from nearkin_trainer.distributed import World
from nearkin_trainer.losses import WeightedLosses
from nearkin_trainer.model import build_model, make_backbone
from nearkin_trainer.neighbours import NeighbourConfig
from torch import nn

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "shape"), [((64, 64), (4, 4)), ((128, 64), (8, 4)), ((30, 50), (2, 4))])
def test_compact_network_makes_maps(size: tuple[int, int], shape: tuple[int, int]) -> None:
    network = CompactResNet(channels=10, width=4, blocks=2)
    assert map_shape(network, *size) == (10, *shape)
    assert network.training
    loss = network(torch.randn(2, 3, *size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_what_is_not_a_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone Flatten returned \(1, 192\)"):
        map_shape(nn.Flatten(), 8, 8)
    with pytest.raises(ValueError, match="cannot be imported"):
        make_backbone(ModelConfig(backbone="nowhere.at_all:make"))
    with pytest.raises(ValueError, match=r"not an nn\.Module"):
        make_backbone(ModelConfig(backbone="builtins:dict"))
    with pytest.raises(ValueError, match="neither 'compact' nor"):
        ModelConfig(backbone="resnet")


def test_a_backbone_of_ones_own() -> None:
    config = ModelConfig(backbone="tests.trainer.test_model:strided")
    model = build_model(config, ImageConfig(height=16, width=8), 5, keeping="learnable", device=CPU)
    assert tuple(model.classes.weight.shape) == (5, 6, 4, 2)


def strided() -> nn.Module:
    return nn.Conv2d(3, 6, 4, stride=4)


def test_losses_reach_network_and_touched_classes() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(channels=8, width=4), ImageConfig(height=16, width=16), 9, keeping="learnable", device=CPU
    )
    labels = torch.tensor([0, 0, 4, 4])
    neighbours = torch.tensor([[1, 2], [1, 2], [5, 0], [5, 0]])
    loss, parts = model.losses(
        model(torch.randn(4, 3, 16, 16)), labels, neighbours, WeightedLosses(softmax=1, batch_softmax=0.5)
    )
    assert loss.item() == pytest.approx(parts["softmax"].item() + 0.5 * parts["batch_softmax"].item())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.dense_parameters())
    gradient = model.classes.take_gradient(World())
    assert gradient is not None
    assert gradient.ids.tolist() == [0, 1, 2, 4, 5]


def test_precision_is_a_choice() -> None:
    assert choose_precision("float32", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    model = build_model(
        ModelConfig(channels=8, width=4, precision="bfloat16"),
        ImageConfig(height=16, width=16),
        3,
        keeping="memory",
        device=CPU,
    )
    assert model(torch.randn(2, 3, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize("schedule", ["cosine", "constant", "steps"])
def test_schedules_rise_and_never_exceed_one(schedule: str) -> None:
    config = OptimiseConfig(schedule=schedule, warmup=0.1)  # type: ignore[arg-type]
    factors = [config.factor(i / 100) for i in range(101)]
    assert factors[0] == 0
    assert max(factors) == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_configurations_are_checked_when_made() -> None:
    def made(**changes: Any) -> TrainConfig:
        return TrainConfig(data=Path("d"), out=Path("o"), **changes)

    with pytest.raises(ValueError, match="epochs=0"):
        made(epochs=0)
    with pytest.raises(ValueError, match="nothing else trains"):
        made(loss=WeightedLosses(triplet=1))
    made(loss=WeightedLosses(triplet=1), embedding=EmbeddingConfig(keeping="memory"))
    with pytest.raises(ValueError, match=r"neighbour\.k=4 is less than the graph sampler reads \(15"):
        made(neighbour=NeighbourConfig(k=4))
    made(neighbour=NeighbourConfig(k=4), batch=BatchConfig(kin=4, classes=16))
    with pytest.raises(ValueError, match="contradict"):
        made(resume=True, overwrite=True)
    with pytest.raises(ValueError, match="run_name='No Spaces'"):
        made(run_name="No Spaces")


@pytest.mark.parametrize(("out", "name"), [("runs/Demo 1", "demo-1"), ("_x", "x"), ("日本", "training")])
def test_run_names_are_made_from_the_folder(out: str, name: str) -> None:
    assert TrainConfig(data=Path("d"), out=Path(out)).run == name
