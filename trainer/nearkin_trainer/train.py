"""Putting a training job together: processes, data, model, service.

join the processes ─▶ read the data ─▶ make the model ─▶ connect to the service ─▶ run the epochs (job.py)
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nearkin_client import NeighbourClient
from nearkin_client.errors import Unavailable
from nearkin_client.local import LocalService
from torch import nn

from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import Host
from nearkin_trainer.config import TrainConfig
from nearkin_trainer.data import read_data
from nearkin_trainer.distributed import World, join_world, tell_all
from nearkin_trainer.folder import claim
from nearkin_trainer.job import CHECKPOINT, Job, Parts
from nearkin_trainer.model import build_model
from nearkin_trainer.neighbours import Neighbours
from nearkin_trainer.report import Report

logger = logging.getLogger("nearkin.trainer.train")


def train(config: TrainConfig, backbone: nn.Module | None = None) -> dict[str, Any]:
    """Trains, and returns what `metrics.json` holds. Every process of the job calls this.

    Args:
        config: everything that can be set.
        backbone: any module from images to feature maps, instead of the configured one; the same on every
            process.

    Raises:
        ValueError: something in the configuration or the data is wrong; the message names it and the way out.
        nearkin_client.errors.NearkinError: the service refused or could not be reached.
    """
    with join_world(config.device) as world, claim(world, config.out):
        start = _choose_start(config, world)
        data = read_data(config.data, validation_share=config.image.validation_share)
        seed_everything(config.seed)
        model = build_model(
            config.model,
            config.image,
            len(data.classes),
            keeping=config.embedding.keeping,
            device=world.device,
            sharded_over=world if config.embedding.sharded else None,
            storage=getattr(torch, config.embedding.storage),
            host=_host(config, len(data.classes)),
            backbone=backbone,
        )
        with (
            _service_address(config, world) as address,
            NeighbourClient(address, run=config.run) as client,
            Neighbours(world, client, config.neighbour, len(data.classes), config.table_lag) as neighbours,
            Report(config.out, speaks=world.leads, tensorboard=config.tensorboard) as report,
        ):
            return Job(Parts(config, world, data, model, neighbours, report)).run(start)


def _host(config: TrainConfig, num_classes: int) -> Host | None:
    """Where the class table lies, if not on the device."""
    embedding = config.embedding
    if embedding.place == "device":
        return None
    folder = config.out if embedding.place == "file" else None
    return Host(min(embedding.device_cache_rows, num_classes), folder)


def _choose_start(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint to continue from, or None; all processes come to the same answer."""
    path = config.out / CHECKPOINT
    exists = tell_all(world, str(path.exists()) if world.leads else None) == "True"
    if exists and not (config.resume or config.overwrite):
        raise ValueError(
            f"out={config.out} holds a checkpoint: continue with --resume, or replace it with --overwrite"
        )
    if world.leads:
        if config.overwrite:
            path.unlink(missing_ok=True)
        if config.resume and not exists:
            logger.info("resume: no checkpoint in %s yet, starting from the beginning", config.out)
    return path if exists and config.resume else None


@contextlib.contextmanager
def _service_address(config: TrainConfig, world: World) -> Iterator[str]:
    """The address of the named service, or of one that the job's first process starts for it."""
    named = config.service or os.environ.get("NEARKIN_SERVICE")
    if named:
        yield named
    elif world.spans_nodes:
        raise ValueError(
            "a job on several machines needs a service that all of them reach: "
            "name it with --service or NEARKIN_SERVICE"
        )
    elif world.leads:
        with _private_service(config, world) as service:
            yield tell_all(world, service.address)
    else:
        address = tell_all(world, None)
        if not address:
            raise Unavailable("the job's first process could not start a service")
        yield address


def _private_service(config: TrainConfig, world: World) -> LocalService:
    service = LocalService(config.out / "service", log_path=config.out / "service.log")
    try:
        return _start(service)
    except BaseException as error:  # then nobody else stops it
        service.stop()
        if isinstance(error, Exception):
            tell_all(world, "")  # the others wait for an address
        raise


def _start(service: LocalService) -> LocalService:
    try:
        return service.start()
    except OSError as error:
        raise ValueError(f"out={service.data_dir.parent} takes no service's data: {error}") from error
