import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearkin.v1 import frames
from nearkin_client.splicing import Splice

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="this system splices nothing")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        yield ours, theirs


def bytes_of(count: int) -> memoryview:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).data


def received(theirs: socket.socket, into: list[bytes]) -> threading.Thread:
    def read() -> None:
        with theirs.makefile("rb") as stream:
            into.append(stream.read())

    reader = threading.Thread(target=read)
    reader.start()
    return reader


def sent(parts: list[memoryview]) -> bytes:
    """What arrives of these parts, the odd ones copied."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    got: list[bytes] = []
    with ours, theirs:
        reader = received(theirs, got)
        with closing(Splice(ours)) as splice:
            for at, part in enumerate(parts):
                (ours.sendall if at % 2 else splice.send)(part)
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    return got[0]


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 70_000)), max_size=8))
def test_all_bytes_arrive_in_order_wherever_they_begin(spans: list[tuple[int, int]]) -> None:
    data = bytes_of(80_000)
    parts = [data[start : start + length] for start, length in spans]
    assert sent(parts) == b"".join(parts)


def test_more_than_a_pipe_and_a_socket_hold() -> None:
    data = bytes_of(9 * MIB + 13)
    assert sent([data[1:]]) == bytes(data[1:])


def test_what_cannot_be_changed_is_sent_as_well() -> None:
    assert sent([memoryview(b"frozen" * 1000)]) == b"frozen" * 1000


@pytest.mark.parametrize("refused_at", [0, 1, 3])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.EFAULT])
def test_a_kernel_that_does_not_splice_gets_copies_and_nothing_twice(
    code: int, refused_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice, calls = os.splice, iter(range(1000))

    def refusing(src: int, dst: int, count: int) -> int:
        if next(calls) >= refused_at:
            raise OSError(code, os.strerror(code))
        return splice(src, dst, min(count, 50_000))

    monkeypatch.setattr(os, "splice", refusing)
    data = bytes_of(3 * MIB)
    assert sent([data, data[:10], data[5:]]) == bytes(data) + bytes(data[:10]) + bytes(data[5:])


def test_a_reader_who_is_gone_is_an_error_as_elsewhere(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    with closing(Splice(ours)) as splice, pytest.raises(BrokenPipeError):
        splice.send(bytes_of(MIB))


def test_a_reader_who_stands_still_is_not_waited_for_forever(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    frames.limit_silence(pair[0], 0.05)
    with closing(Splice(pair[0])) as splice, pytest.raises(BlockingIOError):
        splice.send(bytes_of(8 * MIB))
