"""The class-embedding table: one feature map per class, and what changes it.

table       all rows on every process: how a step reads them, how changes reach them
sharded     each process has its own rows
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
from nearkin_trainer.classes.sharded import ShardedClassEmbeddings
from nearkin_trainer.classes.snapshot import Snapshot
from nearkin_trainer.classes.table import ClassEmbeddings, Keeping

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
