"""The processes of one training job: who I am, and the few exchanges between us.

The same code runs as 1 process or as N: with a world of one every function here returns its input. Exchanges
move dense tensors only; sparse collectives differ between backends and versions.

Legend: R processes (world size), n rows of this process, m rows of the longest process.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger("nearkin.trainer.distributed")

_BUCKET_ELEMENTS = 8 * 2**20
_ELSEWHERE_ROWS = 4096
_MAX_TEXT_BYTES = 4096


@dataclass(frozen=True)
class World:
    """This process among the others, as torchrun describes it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node_group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None  # of all, for what lies on the CPU; None: the usual one

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or not 0 <= self.local_rank < self.local_size <= self.size:
            raise ValueError(
                f"RANK={self.rank}, WORLD_SIZE={self.size}, LOCAL_RANK={self.local_rank}, "
                f"LOCAL_WORLD_SIZE={self.local_size} contradict each other; start the processes with torchrun"
            )

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the progress of the whole job."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this process does what is done once per machine."""
        return self.local_rank == 0

    @property
    def spans_nodes(self) -> bool:
        """Whether the job runs on more than one machine."""
        return self.local_size < self.size

    def share(self, count: int) -> slice:
        """This rank's contiguous share of `count` things; shares differ by at most one in length."""
        return self.share_of(self.rank, count)

    def share_of(self, rank: int, count: int) -> slice:
        """Any rank's share of `count` things."""
        base, extra = divmod(count, self.size)
        start = rank * base + min(rank, extra)
        return slice(start, start + base + (rank < extra))


@contextlib.contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Joins the other processes of the job and leaves them at the end.

    Args:
        device: `auto` (CUDA when there is one), `cpu` or `cuda`.

    Raises:
        ValueError: `cuda` was asked for and there is none, or the environment contradicts itself.
    """
    rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", rank)
    local_size = _from_environment("LOCAL_WORLD_SIZE", size)
    chosen = choose_device(device, local_rank)
    threads = limit_threads(local_size)
    if size == 1:
        logger.info("one process on %s, %d threads", chosen, threads)
        yield World(device=chosen)
        return
    World(rank, size, local_rank, local_size)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        group = _node_group(rank, size, local_rank, local_size)
        host_group = dist.new_group(backend="gloo") if backend == "nccl" else None
        logger.info("process %d of %d on %s (%s), %d threads", rank, size, chosen, backend, threads)
        yield World(rank, size, local_rank, local_size, chosen, group, host_group)
        dist.barrier()  # whoever leaves first would break the connections that others still use
    finally:
        dist.destroy_process_group()


def end_process(status: int) -> None:
    """Ends this process at once if it is one of several; all is done, and nothing is left open.

    An interpreter that comes to its end beside gloo's threads is aborted now and then, it seems: they drop
    the tensors of the last exchanges, for which they need it.
    """
    if _from_environment("WORLD_SIZE", 1) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process: one GPU per local rank, or the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r}: this machine has no usable CUDA device; use device='cpu' or 'auto'"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "start at most that many processes here, or use device='cpu'"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def limit_threads(local_size: int) -> int:
    """Divides this machine's cores among its processes: more threads than cores slow all of them."""
    threads = max(1, cores() // local_size)
    torch.set_num_threads(threads)
    return threads


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}={text!r} in the environment is not a number; unset it or start with torchrun"
        ) from None


def _node_group(rank: int, size: int, local_rank: int, local_size: int) -> dist.ProcessGroup | None:
    """The processes of this machine. Every process takes part in making every machine's group."""
    mine = None
    first = rank - local_rank
    for start in range(0, size, local_size):
        ranks = list(range(start, min(start + local_size, size)))
        group = dist.new_group(ranks, backend="gloo")
        mine = group if start == first else mine
    return mine


def barrier(world: World) -> None:
    """Waits for every process."""
    if world.size > 1:
        dist.barrier()


def tell_node(world: World, text: str | None) -> str:
    """What the machine's first process says, on every process of that machine. The others pass None."""
    if world.local_size == 1:
        assert text is not None
        return text
    return _broadcast_text(
        text, source=world.rank - world.local_rank, group=world.node_group, device=torch.device("cpu")
    )


def tell_all(world: World, text: str | None) -> str:
    """What rank 0 says, on every process. The others pass None."""
    if world.size == 1:
        assert text is not None
        return text
    return _broadcast_text(text, source=0, group=None, device=world.device)


class OtherProcessFailed(RuntimeError):  # noqa: N818 - says what happened; the failing process has the error
    """Another process of the job could not go on; the message has its number and its reason."""


def fail_together(world: World, error: BaseException | None) -> None:
    """Raises on every process if any has an error, so that none waits for one that has given up.

    Args:
        world: the job; all processes call this.
        error: what this process failed with, if it did; raised here.

    Raises:
        OtherProcessFailed: on the processes that have no error themselves.
    """
    failed = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    failed[world.rank] = error is not None
    ranks = sum_over_ranks(world, failed).nonzero().flatten().tolist()
    if not ranks:
        return
    if world.size == 1:
        assert error is not None
        raise error
    text = f"{type(error).__name__}: {error}" if world.rank == ranks[0] else None
    reason = _broadcast_text(text, source=ranks[0], group=None, device=world.device)
    raise error or OtherProcessFailed(f"process {ranks[0]} failed: {reason}")


def _broadcast_text(
    text: str | None, source: int, group: dist.ProcessGroup | None, device: torch.device
) -> str:
    buffer = torch.zeros(_MAX_TEXT_BYTES, dtype=torch.uint8)
    if text is not None:
        encoded = text.encode()[: _MAX_TEXT_BYTES - 1]
        buffer[: len(encoded)] = (
            torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else buffer[:0]
        )
    buffer = buffer.to(device)
    dist.broadcast(buffer, src=source, group=group)
    return bytes(buffer.cpu().numpy()).rstrip(b"\0").decode(errors="replace")


def sum_over_ranks(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, in place; the same bits everywhere."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(world: World, rows: torch.Tensor) -> list[torch.Tensor]:
    """Every process's rows, in rank order, on every process.

    Args:
        world: the job.
        rows: `[n, ...]`; n may differ between processes, the rest may not.

    Returns:
        R tensors `[n_r, ...]`.
    """
    if world.size == 1:
        return [rows]
    counts = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    counts[world.rank] = rows.shape[0]
    lengths = [int(n) for n in sum_over_ranks(world, counts)]
    padded = torch.zeros((max(lengths), *rows.shape[1:]), dtype=rows.dtype, device=world.device)
    padded[: rows.shape[0]] = rows
    received = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(received, padded)
    return [part[:n].to(rows.device) for part, n in zip(received, lengths, strict=True)]


def gather_ids(
    world: World, ids: torch.Tensor, room: int | None = None
) -> tuple[list[torch.Tensor], dist.Work | None]:
    """Begins to tell every process this one's ids.

    Args:
        world: the job.
        ids: int64 `[n]`, 0 or greater, on the CPU; n may differ between processes.
        room: at least n, and the same everywhere; by default the processes agree on the largest n first.

    Returns:
        R tensors `[room]`, in rank order, -1 after the last id; and what to wait for before they are read.
    """
    if world.size == 1:
        return [ids], None
    if room is None:
        longest = torch.tensor(len(ids))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=world.host_group)
        room = int(longest)
    padded = torch.full((room,), -1)
    padded[: len(ids)] = ids
    received = [torch.empty_like(padded) for _ in range(world.size)]
    return received, dist.all_gather(received, padded, group=world.host_group, async_op=True)


def swap_rows(world: World, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sends part r of every process to process r.

    Args:
        world: the job.
        parts: R tensors `[n_r, ...]`; the n may differ, the rest and the dtype may not.

    Returns:
        What the processes have sent to this one, in rank order: R tensors.
    """
    assert len(parts) == world.size
    if world.size == 1:
        return parts
    lengths = torch.tensor([len(part) for part in parts], device=world.device)
    coming = torch.empty_like(lengths)
    dist.all_to_all_single(coming, lengths)
    sent = torch.cat(parts).contiguous()
    received = sent.new_empty(int(coming.sum()), *sent.shape[1:])
    splits = coming.tolist()
    # As bytes, because not every backend knows every dtype.
    dist.all_to_all_single(as_bytes(received), as_bytes(sent), splits, lengths.tolist())
    return list(torch.split(received, splits))


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The same memory, contiguous, as uint8 `[n, bytes of a row]`."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def broadcast_module(world: World, module: nn.Module, leave: Container[str] = ()) -> None:
    """Gives every process rank 0's parameters and buffers, but for those named in `leave`."""
    if world.size == 1:
        return
    for name, tensor in module.state_dict().items():
        if name in leave:
            continue
        # What lies elsewhere (class rows in host memory) goes over the device part by part: it may not fit.
        parts = [tensor] if tensor.device == world.device else tensor.split(_ELSEWHERE_ROWS)
        for part in parts:
            sent = part.to(world.device)
            dist.broadcast(sent, src=0)
            part.copy_(sent)


def average_gradients(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each dense gradient by its mean over the processes.

    A parameter without a gradient on one process (its loss term did not occur) counts as zero there.
    """
    if world.size == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        flat /= world.size
        parts = torch.split(flat, [g.numel() for g in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def average_buffers(world: World, module: nn.Module) -> None:
    """Replaces running statistics by their mean, so that every process evaluates and saves the same model."""
    if world.size == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer.div_(world.size)


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket
