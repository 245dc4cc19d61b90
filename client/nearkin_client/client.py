"""`NeighbourClient`: what a training job needs of a neighbour service.

    begin ─▶ send rows (any rank, any order) ─▶ [commit when the last row is in] ─▶ build ─▶ table, nearest

Dimension letters: n rows given, N classes, k neighbours, Q queries, C·H·W or D the shape of a row.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_client import decoding
from nearkin_client.arrays import Rows, as_rows
from nearkin_client.beginning import begin_parts, begin_request, changed_ranges
from nearkin_client.channel import Certificates, Endpoint
from nearkin_client.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    PushFailed,
    Unimplemented,
    invalid,
)
from nearkin_client.numbers import MOST_INT32, whole_number
from nearkin_client.patience import Deadline, Patience
from nearkin_client.push import Sender
from nearkin_client.queries import ask_nearest, class_batches, vector_batches
from nearkin_client.tables import read_table
from nearkin_client.values import (
    Comparison,
    DTypeName,
    Generation,
    KeyName,
    NearestClasses,
    NeighbourTable,
    Push,
    Retention,
    Run,
    RunEvent,
    ServerInfo,
)
from nearkin_client.watching import watch
from nearkin_client.wire import Wire

log = logging.getLogger("nearkin.client")

_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class NeighbourClient:
    """One run of one service. Safe to use from several threads; make one per process, after forking.

    Every call has a deadline (`Patience`; `timeout=` overrides it), is repeated through lost connections and
    restarts of the service where that is safe, and raises one class per meaning (`nearkin_client.errors`).

    Args:
        address: `unix:///path/to.sock` or `host:port`; by default what NEARKIN_SERVICE holds.
        run: the training job's name, `[a-z0-9][a-z0-9._-]{0,63}`. Without one only `runs`, `delete_run` and
            `server_info` work.
        shared_memory: move rows and tables through shared memory: where both ends can ("auto"), by whatever
            address this host's service was dialled; never (False); always (True, which raises where they
            cannot; rows that somebody else writes just now, or that are there already, are sent to be
            compared).
        token: sent with every call; by default what NEARKIN_TOKEN holds.
        ca_certificate: PEM file of the authority that signed the service's certificate: `host:port` is
            then spoken to over TLS. By default what NEARKIN_CA_CERTIFICATE holds.
        client_certificate, client_key: PEM files for a service that asks who connects (mutual TLS); by
            default what NEARKIN_CLIENT_CERTIFICATE and NEARKIN_CLIENT_KEY hold.
        patience: default deadlines.

    Raises:
        InvalidArgument: no address, or a malformed one; a malformed run name.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        run: str | None = None,
        shared_memory: Literal["auto"] | bool = "auto",
        token: str | None = None,
        ca_certificate: str | os.PathLike[str] | None = None,
        client_certificate: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
        patience: Patience | None = None,
    ) -> None:
        if run is not None and not _RUN_NAME.fullmatch(run):
            invalid("run", run, "does not match [a-z0-9][a-z0-9._-]{0,63}")
        if shared_memory not in ("auto", True, False):
            invalid("shared_memory", shared_memory, 'is not "auto", True or False')
        self._run = run
        self._shared_memory = shared_memory
        self._info: ServerInfo | None = None
        self._wire = Wire(
            Endpoint.resolve(
                address, token, Certificates.resolve(ca_certificate, client_certificate, client_key)
            ),
            patience or Patience(),
        )

    @property
    def address(self) -> str:
        """Where the service is."""
        return self._wire.endpoint.address

    # ------------------------------------------------------------------------------------------ push

    def push(
        self,
        embeddings: Any,
        *,
        epoch: int,
        k: int,
        row_start: int = 0,
        num_classes: int | None = None,
        key: KeyName = "flat",
        engine: str = "auto",
        wire_dtype: DTypeName | None = None,
        absent: Iterable[int] = (),
        commit: bool = True,
        changed_rows: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        base_generation: int | None = None,
        qaconv_candidates: int | None = None,
        qaconv_weights: Sequence[float] | NDArray[np.floating[Any]] | None = None,
        retention: Retention | None = None,
        build_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Push:
        """Send this rank's rows of one epoch; return when the service has them (they survive its death).

        Every rank of an epoch calls this with the same arguments and its own rows, in any order. Once the
        last rank's are in, and all that were sent are what the service has, the build starts. The same rows
        again are harmless.

        Args:
            embeddings: [n, D] or [n, C, H, W]; a NumPy array or a torch tensor on any device, of float32,
                float16, bfloat16 or float64 (sent as float32). Contiguous CPU rows are sent from where they
                lie; leave them unchanged until this returns.
            epoch: 0 or greater.
            k: neighbours per class, 1 to num_classes - 1.
            row_start: the class of the first row given.
            num_classes: of the whole epoch; by default the rows given.
            key: what is compared: "flat" (the cosine of whole rows), "pooled" (of their means over H x W),
                "qaconv" (pooled candidates, re-ranked by the location-wise score).
            engine: what builds the table; "auto" leaves it to the service.
            wire_dtype: convert to this dtype before sending: "float32", "float16" or "bfloat16".
            absent: classes that have no embedding yet, given by any one rank; their rows are ignored.
            commit: start the build with the last rank; False only stores rows (see `commit()`).
            changed_rows: send only these of the rows given (class ids) and take every other class's row from
                `base_generation`. Should that be gone, all rows given are sent, and the log says so. Several
                ranks push with `commit=False`; one of them calls `commit()` once all have.
            base_generation: the generation that `changed_rows` changed from.
            qaconv_candidates: key "qaconv" re-ranks this many classes nearest by pooled key; by default the
                service decides (8 k).
            qaconv_weights: key "qaconv" sums the location maxima by these [2 * H * W] weights of a head
                (probe locations, then class locations) instead of taking their mean.
            retention: what the run keeps from this push on; by default what the service keeps anyway.
            build_timeout: seconds after which the build is given up, and the push fails; by default never.
            timeout: seconds until this rank's rows have to be there; default `Patience.push`.

        Returns:
            The push as it was when the last of these rows was stored.

        Raises:
            InvalidArgument: shape, dtype or a number is wrong, or a row (it is named) holds NaN, Inf or
                only zeros.
            AlreadyExists: the epoch was begun with other arguments, or one of these rows with other bytes.
            PushFailed: the push was aborted, or its build failed, meanwhile.
            Unimplemented: an older service lacks the key, or `changed_rows`; it says which.
            DeadlineExceeded, Unavailable, ResourceExhausted, DataLoss.
        """
        if changed_rows is not None and base_generation is None:
            raise InvalidArgument(
                "base_generation: say which generation changed_rows changed from", field="base_generation"
            )
        if changed_rows is None and base_generation is not None:
            problem = "is only for a push that names its changed_rows; without them every row is sent"
            invalid("base_generation", base_generation, problem)
        rows = as_rows("embeddings", embeddings, wire_dtype)
        request = begin_request(
            rows,
            run=self._named_run(),
            epoch=epoch,
            row_start=row_start,
            num_classes=num_classes,
            k=k,
            key=key,
            engine=engine,
            absent=absent,
            commit=commit,
            shared=self._accepts_shared,
            base_generation=base_generation,
            qaconv_candidates=qaconv_candidates,
            qaconv_weights=qaconv_weights,
            retention=retention,
            build_timeout=build_timeout,
        )
        deadline = Deadline(timeout if timeout is not None else self._wire.patience.push)
        todo = [] if changed_rows is None else changed_ranges(changed_rows, row_start, rows.count)
        if base_generation is not None:
            self._require_feature("base_generation", timeout)
        if key == "qaconv":
            self._require_feature("qaconv", timeout)
        if changed_rows is None:
            return self._push_rows(request, rows, row_start, deadline)
        try:
            push = decoding.push(self._begin(request, rows, row_start, deadline).send(todo))
            return self._commit_changes(push, deadline) if commit else push
        except PushFailed:
            raise
        except FailedPrecondition as gone:
            log.warning("epoch %d: %s; pushing all %d rows", epoch, gone.message, rows.count)
        request.ClearField("base_generation")
        request.commit_when_complete = commit
        return self._push_rows(request, rows, row_start, deadline)

    def _push_rows(
        self, request: pb.BeginPushRequest, rows: Rows, row_start: int, deadline: Deadline
    ) -> Push:
        """All rows given, then their digest, without which nothing is built."""
        commits = request.commit_when_complete
        vouches = commits and "part_digest" in self._limits(deadline.remaining).features
        request.commit_when_complete = commits and not vouches
        sender = self._begin(request, rows, row_start, deadline)
        push = sender.send_all()
        if not vouches:
            return decoding.push(push)
        part = pb.RowRange(start=row_start, count=rows.count)
        digest = sender.digest() if rows.count else None
        return self._vouch(
            pb.CommitPushRequest(push_id=push.push_id, rows_crc32c=digest, part=part), deadline
        )

    def _begin(self, request: pb.BeginPushRequest, rows: Rows, row_start: int, deadline: Deadline) -> Sender:
        def begin() -> pb.BeginPushResponse:
            for part in begin_parts(request):
                begun = self._wire.ask(
                    lambda stub: stub.BeginPush,
                    part,
                    doing=f"beginning epoch {request.epoch} of run {request.run!r}",
                    timeout=deadline.remaining,
                )
            return begun

        return Sender(self._wire, begin, rows, row_start, deadline, shared_memory=self._shared_memory)

    def _vouch(self, request: pb.CommitPushRequest, deadline: Deadline) -> Push:
        """PushFailed: it was aborted meanwhile. DataLoss: not what was sent; nothing is left of the push."""
        try:
            return self._commit(request, deadline.remaining)
        except FailedPrecondition as error:
            raise PushFailed(error.message) from error
        except DataLoss:
            with suppress(FailedPrecondition):  # published before: by others, who had sent the same rows
                self.abort(request.push_id, timeout=deadline.remaining)
            raise

    def _commit_changes(self, push: Push, deadline: Deadline) -> Push:
        """FailedPrecondition: the base went meanwhile; nothing is left of the push then."""
        try:
            return self.commit(push, timeout=deadline.remaining)
        except FailedPrecondition:
            self.abort(push, timeout=deadline.remaining)
            raise

    def push_state(self, push: Push | str, *, timeout: float | None = None) -> Push:
        """What has arrived of a push, and how far it is. NotFound: no such push."""
        request = pb.GetPushRequest(push_id=_push_id(push))
        return decoding.push(
            self._wire.ask(lambda stub: stub.GetPush, request, doing="asking for a push", timeout=timeout)
        )

    def commit(self, push: Push | str, *, timeout: float | None = None) -> Push:
        """Close a push whose rows are all there and start the build; repeating it is harmless.

        Raises:
            InvalidArgument: a row is zero and not declared absent.
            FailedPrecondition: rows are missing (the first range is named); the push was aborted or failed.
            NotFound: no such push.
        """
        return self._commit(pb.CommitPushRequest(push_id=_push_id(push)), timeout)

    def _commit(self, request: pb.CommitPushRequest, timeout: float | None) -> Push:
        return decoding.push(
            self._wire.ask(lambda stub: stub.CommitPush, request, doing="committing a push", timeout=timeout)
        )

    def abort(self, push: Push | str, *, timeout: float | None = None) -> Push:
        """Drop an open push, or cancel its build; repeating it is harmless.

        Raises:
            FailedPrecondition: it is published already.
            NotFound: no such push.
        """
        request = pb.AbortPushRequest(push_id=_push_id(push))
        return decoding.push(
            self._wire.ask(lambda stub: stub.AbortPush, request, doing="aborting a push", timeout=timeout)
        )

    # ----------------------------------------------------------------------------------------- tables

    def table(
        self,
        *,
        epoch: int | None = None,
        generation: int | None = None,
        timeout: float | None = None,
        rows: tuple[int, int] | None = None,
        scores: bool = True,
    ) -> NeighbourTable:
        """Read a neighbour table; every reader of a generation gets the same bytes.

        Args:
            epoch: the newest generation of this epoch or a later one; waits until there is one.
            generation: exactly this one. With neither, the newest there is.
            timeout: seconds to wait and read; default `Patience.table`.
            rows: only these classes, `(start, stop)`.
            scores: also read the scores; without them half the bytes move.

        Raises:
            NotFound: no such run or generation.
            InvalidArgument: the row range does not fit.
            NotReadyInTime: the epoch was not published within `timeout`.
            PushFailed: the push of the awaited epoch was aborted, or its build failed.
            Unavailable, DataLoss.
        """
        request = pb.ReadTableRequest(run=self._named_run(), with_scores=scores)
        if epoch is not None and generation is not None:
            raise InvalidArgument("generation: give an epoch or a generation, not both", field="generation")
        if epoch is not None:
            request.min_epoch = whole_number("epoch", epoch, least=0)
        elif generation is not None:
            request.generation = whole_number("generation", generation)
        if rows is not None:
            start, stop = (whole_number("rows", each, least=0) for each in rows)
            if not start < stop:
                invalid("rows", rows, "is not (start, stop) with 0 <= start < stop")
            request.row_start, request.row_count = start, stop - start
        deadline = Deadline(timeout if timeout is not None else self._wire.patience.table)
        which = f"generation {generation}" if epoch is None else f"epoch {epoch}"
        doing, must_share = f"table of {which} of run {request.run!r}", self._shared_memory is True
        request.accept_shared_memory = must_share or (self._accepts_shared and not self._wire.is_elsewhere)
        request.accept_bulk_lane = True
        return read_table(self._wire, request, deadline, doing, must_share=must_share)

    def nearest(
        self,
        *,
        classes: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        vectors: Any = None,
        k: int | None = None,
        generation: int | None = None,
        timeout: float | None = None,
    ) -> NearestClasses:
        """The nearest classes of classes (never the class itself) or of vectors.

        Args:
            classes: [Q] class ids.
            vectors: [Q, D] or [Q, C, H, W], laid out like the rows of the generation; NumPy or torch. The
                service normalises them.
            k: neighbours per query; default the generation's own k. Any k up to the number of classes.
            generation: which one to ask; default the newest.
            timeout: seconds for all queries; default `Patience.call`.

        Raises:
            NotFound: no such run or generation.
            InvalidArgument: k or a class id out of range, or malformed vectors.
            FailedPrecondition: the generation's embeddings were dropped by its retention.
            DataLoss: they were lost with the machine.
        """
        if (classes is None) == (vectors is None):
            raise InvalidArgument("classes: give either classes or vectors", field="classes")
        request = pb.NearestRequest(run=self._named_run())
        if k is not None:
            request.k = whole_number("k", k, most=MOST_INT32)
        if generation is not None:
            request.generation = whole_number("generation", generation)
        service = self._limits(timeout)
        query = (
            class_batches(classes, k, service) if classes is not None else vector_batches(vectors, k, service)
        )
        return ask_nearest(self._wire, request, query, timeout)

    # -------------------------------------------------------------------------------------- catalogue

    def generation(self, number: int | None = None, *, timeout: float | None = None) -> Generation:
        """One generation, by default the newest. NotFound: no such run or generation."""
        request = pb.GetGenerationRequest(run=self._named_run())
        if number is not None:
            request.generation = whole_number("generation", number)
        return decoding.generation(
            self._wire.ask(
                lambda stub: stub.GetGeneration, request, doing="asking for a generation", timeout=timeout
            )
        )

    def generations(self, *, timeout: float | None = None) -> tuple[Generation, ...]:
        """Every generation of the run, newest first. NotFound: no such run."""
        request = pb.ListGenerationsRequest(run=self._named_run())
        found: list[Generation] = []
        while True:
            page = self._wire.ask(
                lambda stub: stub.ListGenerations, request, doing="listing generations", timeout=timeout
            )
            found.extend(decoding.generation(each) for each in page.generations)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return tuple(found)

    def runs(self, *, timeout: float | None = None) -> tuple[Run, ...]:
        """Every run of the service."""
        request = pb.ListRunsRequest()
        found: list[Run] = []
        while True:
            page = self._wire.ask(lambda stub: stub.ListRuns, request, doing="listing runs", timeout=timeout)
            found.extend(decoding.run(each) for each in page.runs)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return tuple(found)

    def run_info(self, *, timeout: float | None = None) -> Run:
        """This run: its newest generation, and its pushes under way. NotFound: no such run."""
        request = pb.GetRunRequest(run=self._named_run())
        return decoding.run(
            self._wire.ask(lambda stub: stub.GetRun, request, doing="asking for a run", timeout=timeout)
        )

    def delete_generation(self, number: int, *, timeout: float | None = None) -> None:
        """Remove one generation for good; its number is never given again. NotFound: no such generation."""
        request = pb.DeleteGenerationRequest(
            run=self._named_run(), generation=whole_number("generation", number)
        )
        self._wire.ask(
            lambda stub: stub.DeleteGeneration,
            request,
            doing="deleting a generation",
            timeout=timeout,
            repeatable=False,
        )

    def delete_run(self, name: str | None = None, *, timeout: float | None = None) -> None:
        """Remove a run, by default this one, with everything in it. NotFound: no such run."""
        request = pb.DeleteRunRequest(run=self._named_run() if name is None else name)
        self._wire.ask(
            lambda stub: stub.DeleteRun, request, doing="deleting a run", timeout=timeout, repeatable=False
        )

    def pin(
        self, generation: int | None = None, *, pinned: bool = True, timeout: float | None = None
    ) -> Generation:
        """Keep a generation, embeddings included, whatever the run's retention says; or (False) no longer.

        Args:
            generation: its number; default the newest.
            pinned: False gives it back to retention, which applies from the next publication on.
            timeout: seconds; default `Patience.call`.

        Raises:
            NotFound: no such run or generation.
            Unimplemented: the service does not have this yet.
        """
        request = pb.PinGenerationRequest(run=self._named_run(), unpin=not pinned)
        if generation is not None:
            request.generation = whole_number("generation", generation)
        self._require_feature("pin", timeout)
        return decoding.generation(
            self._wire.ask(
                lambda stub: stub.PinGeneration, request, doing="pinning a generation", timeout=timeout
            )
        )

    def compare(
        self,
        base: int | None = None,
        generation: int | None = None,
        *,
        k: int | None = None,
        most_changed: int | None = None,
        timeout: float | None = None,
    ) -> Comparison:
        """How far neighbours and embeddings moved from generation `base` to `generation`.

        Args:
            base: the earlier one; default the one published before `generation`.
            generation: the later one; default the newest.
            k: neighbours compared; default the smaller k of the two.
            most_changed: how many classes to list; default 10.
            timeout: seconds; default `Patience.call`.

        Raises:
            NotFound: no such run or generation.
            FailedPrecondition: the two have different numbers of classes.
        """
        request = pb.CompareGenerationsRequest(run=self._named_run())
        if base is not None:
            request.base_generation = whole_number("base", base)
        if generation is not None:
            request.generation = whole_number("generation", generation)
        if k is not None:
            request.k = whole_number("k", k, most=MOST_INT32)
        if most_changed is not None:
            request.most_changed = whole_number("most_changed", most_changed, most=MOST_INT32)
        return decoding.comparison(
            self._wire.ask(
                lambda stub: stub.CompareGenerations, request, doing="comparing generations", timeout=timeout
            )
        )

    def watch(self, *, timeout: float | None = None) -> Iterator[RunEvent]:
        """The run's state and then every change, as they happen; a run that does not exist yet is waited for.

        Ends after `timeout` seconds, by default never: stop iterating, or close the client. After a lost
        connection a new `RunSnapshot` comes first.
        """
        return watch(self._wire, self._named_run(), timeout)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Version, engines, devices and limits of the service."""
        return decoding.server_info(
            self._wire.ask(
                lambda stub: stub.GetServerInfo,
                pb.GetServerInfoRequest(),
                doing=f"asking {self._wire.endpoint.address}",
                timeout=timeout,
            )
        )

    # --------------------------------------------------------------------------------------- lifetime

    def close(self) -> None:
        """End what is under way and disconnect. Idempotent; the client cannot be used afterwards."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"NeighbourClient({self._wire.endpoint.address!r}, run={self._run!r})"

    def _limits(self, timeout: float | None) -> ServerInfo:
        """Asked for once: what a service allows does not change while it runs."""
        self._info = self._info or self.server_info(timeout=timeout)
        return self._info

    @property
    def _accepts_shared(self) -> bool:
        return self._shared_memory is not False

    def _require_feature(self, name: str, timeout: float | None) -> None:
        """Unimplemented: the service lacks something that was added to the protocol later; says what."""
        info = self._limits(timeout)
        if name not in info.features:
            raise Unimplemented(
                f"the service at {self.address} (version {info.version}) does not have the feature {name!r}; "
                "update it"
            )

    def _named_run(self) -> str:
        if self._run is None:
            raise InvalidArgument("run: this client was made without one; pass run=", field="run")
        return self._run


def _push_id(push: Push | str) -> str:
    return push if isinstance(push, str) else push.push_id
