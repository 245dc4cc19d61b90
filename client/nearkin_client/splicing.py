"""Bytes into a unix socket without a copy: the kernel lends the reader our pages (vmsplice(2), splice(2)).

A socket's buffers are memory like any other, and on a virtual machine that gives free memory back to its host
each fresh page of them may cost more than the copy into it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import socket

import numpy as np

log = logging.getLogger("nearkin.client.splicing")

_PIPE_BYTES = 1 << 20  # what anybody may have
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EFAULT)
"""The last one: memory of a device's driver, which can be read and not be lent."""


class Splice:
    """Sends over one connection, from memory that stays as it is until its reader has answered."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._vmsplice = ctypes.CDLL(None, use_errno=True).vmsplice
        self._vmsplice.argtypes = [ctypes.c_int, ctypes.POINTER(_Span), ctypes.c_ulong, ctypes.c_uint]
        self._vmsplice.restype = ctypes.c_ssize_t
        self._out, self._in = os.pipe()
        try:
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError as error:
            log.debug("a pipe of %d bytes cannot be had: %s", _PIPE_BYTES, error)
        self._able = True

    @staticmethod
    def suits(connection: socket.socket) -> bool:
        """Whether this is quicker than a copy: TCP cuts such pages into smaller packets than its own."""
        return connection.family == socket.AF_UNIX and hasattr(os, "splice")

    def send(self, data: memoryview) -> None:
        """All of it. The errors are those of `sendall`."""
        done = self._spliced(data) if self._able else 0
        if done < len(data):
            self._connection.sendall(data[done:])

    def _spliced(self, data: memoryview) -> int:
        """How much went; less than all where the kernel does not do it."""
        start, done = np.frombuffer(data, np.uint8).ctypes.data, 0
        try:
            while done < len(data):
                waiting = self._lend(_Span(start + done, len(data) - done))
                while waiting:
                    went = os.splice(self._out, self._connection.fileno(), waiting)
                    waiting, done = waiting - went, done + went
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            log.info("rows are copied into the socket: splicing them: %s", error.strerror)
            self._able = False
        return done

    def _lend(self, span: _Span) -> int:
        while (lent := self._vmsplice(self._in, ctypes.byref(span), 1, 0)) < 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return int(lent)

    def close(self) -> None:
        """The pages that are still under way stay lent until they are read."""
        os.close(self._in)
        os.close(self._out)


class _Span(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
