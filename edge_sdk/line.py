"""One of many sockets behind a selector, plain or encrypted, for a client that reads byte by byte."""

from __future__ import annotations

import os
import selectors
import socket
import ssl

_READ_BYTES = 16_384


class Line:
    """A socket as paho wants it: watched by the selector, read in large pieces, given out in small ones."""

    __slots__ = (
        "_at", "_buffer", "_selector", "_socket", "_watched", "bytes_received", "bytes_sent", "is_open", "may_read",
    )  # fmt: skip

    def __init__(self, line: socket.socket, selector: selectors.BaseSelector, owner: object) -> None:
        self._socket, self._selector = line, selector
        self._buffer, self._at = b"", 0
        self.bytes_sent = self.bytes_received = 0
        self.is_open, self.may_read = True, False
        self._watched = selectors.EVENT_WRITE  # which a socket is once it is connected
        selector.register(line, self._watched, owner)

    def error(self) -> OSError | None:
        """Why no connection came about."""
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return OSError(number, os.strerror(number)) if number else None

    def watch(self, *, write: bool) -> None:
        """Have the selector tell when there is something to read, and when there is room to write."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        if wanted != self._watched:
            self._watched = wanted
            owner = self._selector.get_key(self._socket).data
            self._selector.modify(self._socket, wanted, owner)

    def shake_hands(self, context: ssl.SSLContext, host: str) -> bool:
        """Go on with agreeing on encryption; whether that is done.

        Raises:
            OSError: The broker is not whom we trust, or does not speak TLS.
        """
        if not isinstance(self._socket, ssl.SSLSocket):
            owner = self._selector.unregister(self._socket).data
            try:
                self._socket = context.wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
            finally:
                self._selector.register(self._socket, self._watched, owner)
        wanted = selectors.EVENT_READ
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            wanted = selectors.EVENT_WRITE
        else:
            return True
        if wanted != self._watched:
            self._watched = wanted
            self._selector.modify(self._socket, wanted, self._selector.get_key(self._socket).data)
        return False

    def _decrypted(self) -> bool:
        """Whether there is something to read of which the selector knows nothing."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    @property
    def holds_more(self) -> bool:
        """Whether bytes were read that paho has not asked for."""
        return self._at < len(self._buffer) or self._decrypted()

    def recv(self, buffer_size: int) -> bytes:
        """Bytes from memory; the socket is asked once for each time that the selector found it readable."""
        if self._at == len(self._buffer):
            if not self.may_read and not self._decrypted():
                raise BlockingIOError
            self.may_read = False
            try:
                self._buffer, self._at = self._socket.recv(_READ_BYTES), 0
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                raise BlockingIOError from error
            self.bytes_received += len(self._buffer)
        piece = self._buffer[self._at : self._at + buffer_size]
        self._at += len(piece)
        if self._at == len(self._buffer):
            self._buffer, self._at = b"", 0
        return piece

    def send(self, buffer: bytes | bytearray) -> int:
        """As a socket does."""
        try:
            count = self._socket.send(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error
        self.bytes_sent += count
        return count

    def close(self) -> None:
        """Stop watching, and close."""
        if self.is_open:
            self.is_open = False
            self._selector.unregister(self._socket)
            self._socket.close()

    def fileno(self) -> int:
        """The socket's number."""
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001 - as paho calls it
        """It never blocks."""
