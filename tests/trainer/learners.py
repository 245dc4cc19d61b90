"""A small model and its learner, for every way of keeping the class table."""

from pathlib import Path

import torch
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ROW_OPTIMISERS, Host, shards
from nearkin_trainer.config import EmbeddingConfig, ImageConfig, ModelConfig, TrainConfig
from nearkin_trainer.distributed import World, broadcast_module
from nearkin_trainer.learner import Learner, Question
from nearkin_trainer.model import Model, build_model

WAYS = {
    "memory": ("memory", "adam"),
    "bfloat16": ("learnable", "adam"),
    **{name: ("learnable", name) for name in ROW_OPTIMISERS},
}


def made(
    world: World,
    way: str,
    num_classes: int,
    *,
    sharded: bool,
    backend: str = "plain",
    host: Host | None = None,
) -> tuple[Model, Learner]:
    """For 16 x 16 images; the same weights at every call."""
    keeping, optimiser = WAYS[way]
    config = TrainConfig(
        data=Path("d"),
        out=Path("o"),
        image=ImageConfig(height=16, width=16),
        model=ModelConfig(channels=8, width=4, matching=backend),
        embedding=EmbeddingConfig(keeping=keeping, optimiser=optimiser, sharded=sharded),  # type: ignore[arg-type]
    )
    seed_everything(0)
    model = build_model(
        config.model,
        config.image,
        num_classes,
        keeping=config.embedding.keeping,
        device=world.device,
        sharded_over=world if sharded else None,
        storage=torch.bfloat16 if way == "bfloat16" else torch.float32,
        host=host,
    )
    broadcast_module(world, model, leave=shards.names(model.classes))
    return model.train(), Learner(config, world, model, total_steps=4)


def learn(
    world: World, learner: Learner, num_classes: int, steps: range, *, ahead: bool = True
) -> list[float]:
    """Takes steps whose batches follow from their numbers; their losses.

    Args:
        ahead: tell the learner of each step about the one after it.
    """
    batches = []
    for step in steps:
        seed_everything(1, step, world.rank)
        labels = torch.randint(0, num_classes, (4,)).repeat_interleave(2)
        pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        batches.append((pixels, Question(labels, torch.randint(-1, num_classes, (8, 5)))))
    losses = []
    for i, (pixels, question) in enumerate(batches):
        upcoming = batches[i + 1][1] if ahead and i + 1 < len(batches) else None
        seed_everything(2, steps[i], world.rank)
        losses.append(float(learner.learn(pixels, question.labels, question.neighbours, upcoming)["loss"]))
    return losses
