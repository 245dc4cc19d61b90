"""Nearest and CompareGenerations."""

# ruff: noqa: N802 - the protocol's method names

from __future__ import annotations

import numpy as np
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.engines.contract import Neighbours
from nearkin_service.errors import InvalidArgumentError
from nearkin_service.operations import Comparing, Comparison, Core, Reading, Searching
from nearkin_service.values import DTYPES, Generation
from nearkin_service.wire import convert, requests
from nearkin_service.wire.handlers import Context


class NearestMethods:
    """The RPCs that compute an answer."""

    def __init__(self, core: Core, reading: Reading, searching: Searching, comparing: Comparing) -> None:
        self._core = core
        self._reading = reading
        self._searching = searching
        self._comparing = comparing

    async def Nearest(self, asked: requests.Nearest, _context: Context) -> bytes:
        request = asked.message
        generation = self._reading.generation(request.run, request.generation)
        match request.WhichOneof("query"):
            case "classes":
                found = await self._of_classes(generation, request)
            case "vectors":
                found = await self._of_vectors(generation, request.vectors, asked.payload, request.k)
            case _:
                raise InvalidArgumentError("query", "neither classes nor vectors are given")
        return await self._core.compute(convert.nearest_response, generation, found)

    async def _of_classes(self, generation: Generation, request: pb.NearestRequest) -> Neighbours:
        self._searching.require_few(len(request.classes.ids))  # before any of them is looked at
        ids = np.fromiter(request.classes.ids, np.int64, len(request.classes.ids))
        return await self._searching.nearest_to_classes(generation, ids, request.k)

    async def _of_vectors(
        self, generation: Generation, vectors: pb.Vectors, payload: memoryview, k: int
    ) -> Neighbours:
        elements = generation.spec.row_elements
        dtype = DTYPES[convert.dtype_name("vectors.dtype", vectors.dtype)]
        expected = vectors.count * elements * dtype.itemsize
        if vectors.count < 0 or payload.nbytes != expected:
            raise InvalidArgumentError(
                "vectors.payload",
                f"{payload.nbytes} bytes; {vectors.count} vectors of {list(generation.spec.row_shape)} "
                f"{dtype.name} are {expected}",
            )
        vectors_QR = np.frombuffer(payload, dtype).reshape(vectors.count, elements)
        return await self._searching.nearest_to_vectors(generation, vectors_QR, k)

    async def CompareGenerations(
        self, request: pb.CompareGenerationsRequest, _context: Context
    ) -> pb.CompareGenerationsResponse:
        for field in ("generation", "base_generation"):
            if (number := getattr(request, field)) < 0:
                raise InvalidArgumentError(field, f"{number} is negative")
        found = await self._comparing.compare(
            request.run, request.generation, request.base_generation, request.k, request.most_changed
        )
        return _comparison(found)


def _comparison(found: Comparison) -> pb.CompareGenerationsResponse:
    overlap, movement = found.overlap, found.movement
    some = len(overlap) > 0
    return pb.CompareGenerationsResponse(
        generation=found.later.number,
        base_generation=found.earlier.number,
        k=found.k,
        classes_compared=len(overlap),
        mean_overlap=float(overlap.mean()) if some else 0.0,
        overlap_deciles=np.quantile(overlap, np.linspace(0, 1, 11)).tolist() if some else [],
        mean_movement=float(movement.mean()) if some and movement is not None else None,
        most_changed=[
            pb.ClassChange(
                class_id=int(found.classes[i]),
                overlap=float(overlap[i]),
                movement=None if movement is None else float(movement[i]),
            )
            for i in found.most_changed
        ],
    )
