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
from nearkin_trainer.classes import mapped
from nearkin_trainer.classes.sharded import ShardedClassEmbeddings
from nearkin_trainer.classes.table import ClassEmbeddings
from nearkin_trainer.distributed import World, barrier

TABLE = "sparse.classes."  # of a model's state
ROW_OPTIMISER = "row_optimiser"  # of a learner's

Parts = dict[str, dict[str, Any]]


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


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, but for the rows: they stay in their file until `restore_rows` reads them.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint.load`.
    """
    return checkpoint.load(path, leave=_has_rows)


def restore_rows(
    path: Path, tree: dict[str, Any], classes: ClassEmbeddings, row_optimiser: dict[str, torch.Tensor]
) -> None:
    """Reads the rows of a checkpoint, however it was written, into a table and what its optimiser keeps.

    They are read piece by piece: memory holds no second copy of them.

    Args:
        path: of the checkpoint.
        tree: what `load` has found. The table and the optimiser's state take the rows' place in it.
        classes: the table; of a sharded one, the rows of this process are read.
        row_optimiser: the state of its optimiser, empty if it has none.

    Raises:
        ValueError: a file is missing or damaged, or they do not hold all of these rows.
    """
    tables = {
        "model": {TABLE + name: table for name, table in classes.state_dict().items()},
        ROW_OPTIMISER: row_optimiser,
    }
    found = {part: dict.fromkeys(entries, 0) for part, entries in tables.items()}
    for start, parts in _pieces(path, tree):
        for part, entries in parts.items():
            for name, stored in entries.items():
                found[part][name] += stored.read_into(
                    tables[part][name], start - classes.kept.start, mapped.put_block
                )
    wanted = classes.kept.stop - classes.kept.start
    for counts in found.values():
        for name, count in counts.items():
            if count != wanted:
                raise ValueError(
                    f"{path} has {count} rows of {name} for classes {classes.kept.start} to "
                    f"{classes.kept.stop}: files of its shards are missing or belong to another job"
                )
    tree["model"].update(tables["model"])
    tree["learner"][ROW_OPTIMISER] = row_optimiser


def _pieces(path: Path, tree: dict[str, Any]) -> Iterator[tuple[int, Parts]]:
    if "shards" not in tree:
        yield 0, _take_out(tree)
    for name in tree.get("shards", ()):
        try:
            shard = checkpoint.load(path.with_name(name), leave=_has_rows)
        except FileNotFoundError as error:
            raise checkpoint.unreadable(path, f"{name} is not beside it") from error
        yield shard["start"], shard["parts"]


def _has_rows(keys: checkpoint.Keys) -> bool:
    """Whether what lies there has one row per class."""
    if keys[0] == "model":
        return str(keys[1]).startswith(TABLE)
    return keys[0] == "parts" or keys[:2] == ("learner", ROW_OPTIMISER)


def _take_out(tree: dict[str, Any]) -> Parts:
    """Removes from a checkpoint's tree what has one row per class, and returns it."""
    model, learner = tree["model"], tree["learner"]
    rows = {name: model.pop(name) for name in [*model] if name.startswith(TABLE)}
    optimiser, learner[ROW_OPTIMISER] = learner[ROW_OPTIMISER], {}
    return {"model": rows, ROW_OPTIMISER: optimiser}
