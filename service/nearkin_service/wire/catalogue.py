"""ListRuns, GetRun, ListGenerations, GetGeneration, DeleteRun, DeleteGeneration, Pin…, GetServerInfo."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version

from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.access import reachable
from nearkin_service.operations import Administering, Core, Reading
from nearkin_service.wire import convert
from nearkin_service.wire.handlers import Context

_FEATURES = ("shared_memory", "bulk_lane", "base_generation", "pin", "qaconv", "part_digest")
_PACKAGES = ("grpcio", "numpy", "protobuf", "nearkin-protos")


class CatalogueMethods:
    """The RPCs that list, look up and remove."""

    def __init__(self, core: Core, administering: Administering, reading: Reading) -> None:
        self._core = core
        self._administering = administering
        self._reading = reading
        self._started = time.time()
        # Read once: who is asked while files run out still answers.
        self._version = version("nearkin-service")
        self._versions = {name: version(name) for name in _PACKAGES}

    async def ListRuns(self, request: pb.ListRunsRequest, _context: Context) -> pb.ListRunsResponse:
        views, token = self._administering.runs(request.page_size, request.page_token, reachable)
        return pb.ListRunsResponse(runs=map(convert.run, views), next_page_token=token)

    async def GetRun(self, request: pb.GetRunRequest, _context: Context) -> pb.Run:
        return convert.run(self._administering.run(request.run))

    async def ListGenerations(
        self, request: pb.ListGenerationsRequest, _context: Context
    ) -> pb.ListGenerationsResponse:
        found, token = self._administering.generations(request.run, request.page_size, request.page_token)
        return pb.ListGenerationsResponse(generations=map(convert.generation, found), next_page_token=token)

    async def GetGeneration(self, request: pb.GetGenerationRequest, _context: Context) -> pb.Generation:
        return convert.generation(self._reading.generation(request.run, request.generation))

    async def DeleteRun(self, request: pb.DeleteRunRequest, _context: Context) -> pb.DeleteRunResponse:
        await self._administering.delete_run(request.run)
        return pb.DeleteRunResponse()

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, _context: Context
    ) -> pb.DeleteGenerationResponse:
        await self._administering.delete_generation(request.run, request.generation)
        return pb.DeleteGenerationResponse()

    async def PinGeneration(self, request: pb.PinGenerationRequest, _context: Context) -> pb.Generation:
        return convert.generation(
            await self._administering.pin(request.run, request.generation, pinned=not request.unpin)
        )

    async def GetServerInfo(self, _request: pb.GetServerInfoRequest, _context: Context) -> pb.ServerInfo:
        return pb.ServerInfo(
            version=self._version,
            engines=[
                pb.EngineInfo(name=e.name, available=e.available, reason=e.reason, exact=e.exact)
                for e in self._core.known_engines
            ],
            devices=[self._core.device],
            limits=pb.Limits(**asdict(self._core.config.limits)),
            chunk_bytes=self._core.config.suiting_bytes,
            features=_FEATURES,
            versions=self._versions,
            started=convert.timestamp(self._started),
        )
