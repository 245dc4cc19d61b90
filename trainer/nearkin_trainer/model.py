"""The network: a backbone, the class-embedding table, and the QAConv head that scores one against the other.

Legend: B images, C channels, H x W feature map, k neighbours.
"""

import contextlib
import importlib

import torch
import torch.nn.functional as F
from torch import nn

from nearkin_trainer.backbone import CompactResNet, choose_precision, map_shape
from nearkin_trainer.classes import ClassEmbeddings, Host, Keeping, ShardedClassEmbeddings
from nearkin_trainer.config import ImageConfig, ModelConfig
from nearkin_trainer.distributed import World
from nearkin_trainer.losses import WeightedLosses, batch_softmax_loss
from nearkin_trainer.matching import QAConv, SparseQAConv


class Model(nn.Module):
    """What is trained and saved.

    Args:
        backbone: images to feature maps.
        sparse: scores of feature maps against few classes; owns the head and the class table.
        precision: what the backbone computes in; its output is float32 again.
    """

    def __init__(
        self, backbone: nn.Module, sparse: SparseQAConv, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sparse = sparse
        self.precision = precision

    @property
    def classes(self) -> ClassEmbeddings:
        """The class-embedding table."""
        table = self.sparse.classes
        assert isinstance(table, ClassEmbeddings)
        return table

    @property
    def head(self) -> QAConv:
        """The head, shared by class scores, in-batch scores and evaluation."""
        return self.sparse.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 `[B, C, H, W]` of images `[B, 3, height, width]` in -1..1."""
        images = images.contiguous(memory_format=torch.channels_last)
        half = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision) if half else contextlib.nullcontext():
            features: torch.Tensor = self.backbone(images)
        return features.float()

    def losses(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        neighbours: torch.Tensor,
        weighted: WeightedLosses,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum and its parts; features `[B, C, H, W]`, labels `[B]`, neighbours `[B, k]`."""
        sparse = (
            self.sparse(features, labels, neighbours, one_row_per="sample") if weighted.needs_sparse else None
        )
        pairs = None
        if weighted.needs_pairs:
            pairs = self.head.pairwise(features, features, backend=self.sparse.backend)
        return weighted(sparse, pairs, labels)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Everything that has an ordinary gradient: all but the class table."""
        return [p for name, p in self.named_parameters() if not name.startswith("sparse.classes.")]


def cosine_loss(features: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """In-batch softmax over the cosines of flattened features `[B, C, H, W]`, times `scale`."""
    flat = F.normalize(features.flatten(1), dim=1)
    return batch_softmax_loss(scale * (flat @ flat.T), labels)


def build_model(
    config: ModelConfig,
    image: ImageConfig,
    num_classes: int,
    *,
    keeping: Keeping,
    device: torch.device,
    sharded_over: World | None = None,
    storage: torch.dtype = torch.float32,
    host: Host | None = None,
    backbone: nn.Module | None = None,
) -> Model:
    """A new model on `device`.

    Args:
        config: the network.
        image: the size of its input.
        num_classes: rows of the class table.
        keeping: how the rows are kept, `learnable` or `memory`.
        device: where it lives.
        sharded_over: the job among whose processes the class table is shared out; by default each has all.
        storage: what the rows of the class table are stored as.
        host: keeps the class table in host memory; by default it is on `device`.
        backbone: used instead of the configured one.

    Raises:
        ValueError: the backbone cannot be imported or does not return feature maps.
    """
    backbone = (backbone or make_backbone(config)).to(device)
    # The order in which convolutions are fastest, on CPUs too: 1.4x (AMD EPYC, Zen 5, 2026-11-24).
    backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    channels, height, width = map_shape(backbone, image.height, image.width)
    shape = (num_classes, channels, height, width)
    if sharded_over is None:
        classes = ClassEmbeddings(*shape, keeping, storage, host=host, device=device)
    else:
        classes = ShardedClassEmbeddings(sharded_over, *shape, keeping, storage, host=host)
    sparse = SparseQAConv(num_classes, channels, height, width, classes=classes, backend=config.matching)
    nn.init.constant_(sparse.head.logit_bn.weight, config.score_scale)
    return Model(backbone, sparse.to(device), choose_precision(config.precision, device))


def make_backbone(config: ModelConfig) -> nn.Module:
    """The configured backbone, new.

    Raises:
        ValueError: it cannot be imported, or is not an `nn.Module`.
    """
    if config.backbone == "compact":
        return CompactResNet(config.channels, config.width, config.blocks)
    module_name, _, function_name = config.backbone.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.backbone={config.backbone!r} cannot be imported: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(  # noqa: TRY004 - a wrong option
            f"model.backbone={config.backbone!r} returned a {type(made).__name__}, not an nn.Module"
        )
    return made
