"""The class-embedding table: one feature map per class, and what changes it.

table       where the rows lie: all of them on every process, or each process its own
host        rows in host memory or in a file, those of recent steps on the device
owners      which process keeps which rows, and how they travel
snapshot    rows as they were, while training goes on
rows        some rows of a table: means of a batch, sums over processes
optimisers  how a gradient moves rows
shards      rows in a checkpoint, for any number of processes
"""

from nearkin_trainer.classes.host import Host
from nearkin_trainer.classes.optimisers import (
    ROW_OPTIMISERS,
    RowAdagrad,
    RowAdam,
    RowOptimiser,
    RowOptimiserName,
    RowSGD,
)
from nearkin_trainer.classes.rows import Rows, class_means, exchange
from nearkin_trainer.classes.snapshot import Snapshot
from nearkin_trainer.classes.table import ClassEmbeddings, Keeping, ShardedClassEmbeddings

__all__ = [
    "ROW_OPTIMISERS",
    "ClassEmbeddings",
    "Host",
    "Keeping",
    "RowAdagrad",
    "RowAdam",
    "RowOptimiser",
    "RowOptimiserName",
    "RowSGD",
    "Rows",
    "ShardedClassEmbeddings",
    "Snapshot",
    "class_means",
    "exchange",
]
