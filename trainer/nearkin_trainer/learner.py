"""One step of learning: from a batch's pixels to updated weights and class embeddings.

Legend: B images, C channels, H x W feature map, k neighbours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nearkin_trainer.classes import RowOptimiser, class_means
from nearkin_trainer.config import EmbeddingConfig, OptimiseConfig, TrainConfig
from nearkin_trainer.data import Augment
from nearkin_trainer.distributed import World, average_gradients
from nearkin_trainer.model import Model, cosine_loss


@dataclass(frozen=True)
class Question:
    """What a batch is scored against.

    labels: int64 `[B]`.
    neighbours: the labels' rows of the table, integers `[B, k]`.
    """

    labels: torch.Tensor
    neighbours: torch.Tensor


class Learner:
    """A model with what changes it.

    Args:
        config: augmentation, losses, optimisers and schedule.
        world: the job; every process learns from its own batch, and all end each step with the same weights.
        model: what learns.
        total_steps: steps of the whole training; the schedule is spread over them.

    Attributes:
        steps: how many have been taken.
    """

    def __init__(self, config: TrainConfig, world: World, model: Model, total_steps: int) -> None:
        self.steps = 0
        self._world, self._model, self._total = world, model, total_steps
        self._losses, self._cosine = config.loss, config.cosine
        self._embedding, self._optimise = config.embedding, config.optimise
        self._augment = Augment(config.augment)
        self._dense = model.dense_parameters()
        self._optimiser = make_optimiser(config.optimise, model)
        self._row_optimiser = make_row_optimiser(config.embedding, model)
        model.classes.join(world)
        self._announced = False  # whether the next step's classes are

    def plan(self, total_steps: int) -> None:
        """Makes the schedule end after `total_steps`, those already taken included."""
        self._total = total_steps

    def learn(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        neighbours: torch.Tensor,
        upcoming: Question | None = None,
    ) -> dict[str, torch.Tensor]:
        """Takes one step; all processes take it together.

        Args:
            pixels: uint8 `[B, 3, height, width]`.
            labels: int64 `[B]`.
            neighbours: the labels' rows of the table, integers `[B, k]`.
            upcoming: labels and neighbours of the step after this one, if there is one and all processes
                know theirs: its rows then travel early. The results are the same.

        Returns:
            The loss and its parts, unweighted, as scalars on the device.
        """
        device = self._world.device
        self._announce(Question(labels, neighbours), upcoming)
        labels, neighbours = labels.to(device), neighbours.to(device)
        features = self._model(self._augment(pixels, device))
        if self._row_optimiser is None:
            self._model.classes.send_means(class_means(features, labels))
        loss, parts = self._model.losses(features, labels, neighbours, self._losses)
        if self._cosine.weight:
            cosine = cosine_loss(features, labels, self._cosine.scale)
            loss = loss + self._cosine.weight * cosine
            parts["cosine"] = cosine.detach()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._model.classes.send_gradient()
        factor = self._optimise.factor(self.steps / self._total)
        self._update_weights(factor)
        self._update_classes(factor)
        self._model.classes.set_out()
        self.steps += 1
        return {"loss": loss.detach(), **parts}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model."""
        rows = self._row_optimiser
        return {
            "steps": self.steps,
            "optimiser": self._optimiser.state_dict(),
            "row_optimiser": dict(rows.state_dict()) if rows else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state`."""
        self.steps = state["steps"]
        self._optimiser.load_state_dict(state["optimiser"])
        if self._row_optimiser:
            self._row_optimiser.load_state_dict(state["row_optimiser"])

    def _announce(self, this: Question, upcoming: Question | None) -> None:
        """Sends this step's rows on their way, unless they are, and says which the next one needs."""
        classes = self._model.classes
        if self._row_optimiser is None:
            classes.expect_means(this.labels)
        if not self._losses.needs_sparse:
            return
        if not self._announced:
            classes.expect(this.labels, this.neighbours)
            classes.set_out()
        if upcoming is not None:
            classes.expect(upcoming.labels, upcoming.neighbours)
        self._announced = upcoming is not None

    def _update_weights(self, factor: float) -> None:
        average_gradients(self._world, self._dense)
        if self._optimise.clip:
            nn.utils.clip_grad_norm_(self._dense, self._optimise.clip)
        for group in self._optimiser.param_groups:
            group["lr"] = self._optimise.rate * factor
        self._optimiser.step()
        self._model.head.keep_monotone()

    def _update_classes(self, factor: float) -> None:
        classes = self._model.classes
        if self._row_optimiser is None:
            classes.remember(classes.take_means(self._world), self._embedding.momentum)
            return
        gradient = classes.take_gradient(self._world)
        if gradient is not None:
            classes.update(self._row_optimiser, gradient, self._embedding.rate * factor)


def make_optimiser(config: OptimiseConfig, model: Model) -> torch.optim.AdamW:
    """AdamW for all but the class table; norms, biases and the head do not decay towards zero."""
    backbone = list(model.backbone.parameters())
    still = [p for p in backbone if p.ndim <= 1] + list(model.head.parameters())
    groups = [
        {"params": [p for p in backbone if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": still, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=(config.beta1, config.beta2))


def make_row_optimiser(config: EmbeddingConfig, model: Model) -> RowOptimiser | None:
    """The class table's optimiser; None when its rows follow features instead of gradients."""
    if config.keeping == "memory":
        return None
    return model.classes.optimiser(config.optimiser)
