"""What `nearkin-train` does, once everything is imported: alone, or as one of several processes."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

import tyro
from nearkin_client.errors import NearkinError
from rich.console import Console
from rich.logging import RichHandler

from nearkin_trainer.config import TrainConfig
from nearkin_trainer.distributed import OtherProcessFailed, cores
from nearkin_trainer.stopping import Stopped, Stopping

MODULE = "nearkin_trainer"
_STARTED_BY = "NEARKIN_TRAIN_PROCESS"  # in the environment of processes that `nearkin-train` starts
_PR_SET_PDEATHSIG = 1


def run(arguments: Sequence[str], stopping: Stopping, *, alone: bool) -> int:
    """Runs the command, `alone` or as one of torchrun's processes; see `cli.main`.

    Raises:
        Stopped: it was asked to end while it had something open.
    """
    rank = os.environ.get("RANK", "0")
    console = Console(stderr=True, highlight=False)
    try:
        config = tyro.cli(TrainConfig, prog="nearkin-train", args=arguments)
        if config.processes > 1 and "RANK" not in os.environ:
            return start_processes(config.processes, arguments, stopping)
        if not alone:
            end_with_parent()
        log_to(console, logging.INFO if rank == "0" else logging.WARNING)
        from nearkin_trainer.train import train

        stopping.wind_up()
        train(config)
    except (ValueError, NearkinError, OtherProcessFailed) as error:
        who = f" (process {rank})" if rank != "0" else ""
        console.print(f"nearkin-train{who}: {error}", style="red", markup=False, soft_wrap=True)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def start_processes(count: int, arguments: Sequence[str], stopping: Stopping) -> int:
    """Runs this command in `count` processes, as `torchrun --standalone` would; they end together."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[_STARTED_BY] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    stopping.wind_up()
    try:
        torchrun(["--standalone", "--nproc-per-node", str(count), "-m", MODULE, *arguments])
    except ChildFailedError as error:
        return max(1, next(iter(error.failures.values())).exitcode)  # the process itself has said why
    except SignalException as stopped:
        raise Stopped(stopped.sigval) from stopped
    finally:
        del os.environ[_STARTED_BY]
    return 0


def end_with_parent() -> None:
    """Has the kernel end this process with the one that started it, however that ends.

    A torchrun that is killed cannot end its processes. They would train on, and write beside the job that
    was started in their place.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ.get(_STARTED_BY, str(os.getppid())) != str(os.getppid()):
            sys.exit(128 + signal.SIGTERM)  # it has ended already, while this one started


def log_to(console: Console, level: int) -> None:
    """Shows what nearkin's own loggers say; other libraries' loggers and the root logger stay as they are."""
    handler = RichHandler(
        console=console, show_path=False, show_level=False, log_time_format="[%H:%M:%S]", markup=False
    )
    handler.setLevel(level)
    logger = logging.getLogger("nearkin")
    logger.addHandler(handler)
    logger.setLevel(level)
