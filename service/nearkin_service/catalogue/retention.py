"""What a run no longer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nearkin_service.values import Generation, Retention


@dataclass(frozen=True, slots=True)
class Sweep:
    """Generations to remove, and generations that only lose their embeddings."""

    remove: tuple[Generation, ...]
    drop_embeddings: tuple[Generation, ...]


def sweep(generations: Sequence[Generation], policy: Retention) -> Sweep:
    """Applies a policy to all generations of a run, given oldest first. The newest is never touched."""
    age = {generation.number: len(generations) - 1 - i for i, generation in enumerate(generations)}
    movable = [g for g in generations if age[g.number] and not _stays(g, policy)]
    remove = [g for g in movable if policy.keep_tables and age[g.number] >= policy.keep_tables]
    drop = [
        g for g in movable if g not in remove and g.has_embeddings and age[g.number] >= policy.keep_embeddings
    ]
    return Sweep(tuple(remove), tuple(drop))


def _stays(generation: Generation, policy: Retention) -> bool:
    return generation.pinned or (policy.keep_every > 0 and generation.number % policy.keep_every == 0)
