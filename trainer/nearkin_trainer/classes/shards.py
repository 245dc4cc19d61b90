"""The rows of a sharded table in a checkpoint, which any number of processes can continue.

Each process writes its rows, and what their optimiser keeps for each, to a file of its own; the checkpoint
itself names those files. It is written last, and the files of the checkpoint before are removed after that,
so that a crash at any moment leaves one whole set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nearkin_trainer import checkpoint
from nearkin_trainer.classes.table import ClassEmbeddings, ShardedClassEmbeddings
from nearkin_trainer.distributed import World, barrier

TABLE = "sparse.classes."  # of a model's state
ROW_OPTIMISER = "row_optimiser"  # of a learner's

Parts = dict[str, dict[str, torch.Tensor]]


def names(classes: ClassEmbeddings) -> frozenset[str]:
    """Entries of a model's state that differ between the processes."""
    if not isinstance(classes, ShardedClassEmbeddings):
        return frozenset()
    return frozenset(TABLE + name for name in classes.state_dict())


def save(path: Path, tree: dict[str, Any], epoch: int, world: World, classes: ClassEmbeddings) -> None:
    """Writes a checkpoint; all processes call this.

    Args:
        path: of the checkpoint. Files of shards lie beside it.
        tree: of this process; rank 0's is kept, and everyone's rows.
        epoch: tells the files of this checkpoint from those of the one before.
        world: the job.
        classes: the table of the model in `tree`.
    """
    files = []
    if isinstance(classes, ShardedClassEmbeddings):
        files = [f"{path.stem}-{epoch}-{rank}-of-{world.size}.npz" for rank in range(world.size)]
        mine = {"start": classes.kept.start, "parts": _take_out(tree)}
        checkpoint.save(path.with_name(files[world.rank]), mine)
        tree = {**tree, "shards": files}
        barrier(world)
    if world.leads:
        checkpoint.save(path, tree)
        for old in path.parent.glob(f"{path.stem}-*-*-of-*.npz"):
            if old.name not in files:
                old.unlink()
    barrier(world)


def restore_rows(path: Path, tree: dict[str, Any], kept: slice) -> None:
    """Puts the rows of the classes `kept` in their place in the tree of a checkpoint, however it was written.

    Args:
        path: of the checkpoint.
        tree: what it holds; it may have all rows, or the names of the files that do.
        kept: the classes of this process's table.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or they do not hold all of these rows.
    """
    found: dict[str, dict[str, list[torch.Tensor]]] = {"model": {}, ROW_OPTIMISER: {}}
    for start, parts in _pieces(path, tree):
        for part, entries in parts.items():
            for name, values in entries.items():
                wanted = values[max(kept.start - start, 0) : max(kept.stop - start, 0)]
                # A copy, so that the rest of the piece can go.
                found[part].setdefault(name, []).append(wanted.clone())
    for part, place in (("model", tree["model"]), (ROW_OPTIMISER, tree["learner"][ROW_OPTIMISER])):
        for name, pieces in found[part].items():
            place[name] = torch.cat(pieces)
            if len(place[name]) != kept.stop - kept.start:
                raise ValueError(
                    f"{path} has {len(place[name])} rows of {name} for classes {kept.start} to {kept.stop}: "
                    "files of its shards are missing or belong to another job"
                )


def _pieces(path: Path, tree: dict[str, Any]) -> Iterator[tuple[int, Parts]]:
    if "shards" not in tree:
        yield 0, _take_out(tree)
    for name in tree.get("shards", ()):
        shard = checkpoint.load(path.with_name(name))
        yield shard["start"], shard["parts"]


def _take_out(tree: dict[str, Any]) -> Parts:
    """Removes from a checkpoint's tree what has one row per class, and returns it."""
    model, learner = tree["model"], tree["learner"]
    rows = {name: model.pop(name) for name in [*model] if name.startswith(TABLE)}
    optimiser, learner[ROW_OPTIMISER] = learner[ROW_OPTIMISER], {}
    return {"model": rows, ROW_OPTIMISER: optimiser}
