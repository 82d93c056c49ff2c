"""Descriptors that wait for their receivers, and the loop that hands them out, in the sender or after its end.

The sender of a pickled object puts its descriptor into a table, under a random key, and pickles the key and the name of a datagram socket.
The receiver asks there (``fetching``). A descriptor stays in the table until its receiver says that it has it, so a receiver that has no
room for it, is interrupted or is killed loses nothing.

A process that ends in order hands its socket and its table on to a *keeper*: a small process that runs this file and nothing else, and ends
when its table is empty. So this module imports only the standard library.

The socket has an abstract name, to which any process of the machine may write. A message counts if the kernel says that its sender is of
this user, and nothing in it is believed: it has a fixed length, and names a key that exists or doesn't. There is no room for descriptors.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

MAGIC = b"dmabufK\1"  # the last byte is the version
MESSAGE = struct.Struct("=8sI16s")  # magic, what it is, key
FETCH, DONE, WAKE = 1, 2, 3  # of a receiver, of a receiver, of this process
HERE, GONE = 11, 12  # the answers to FETCH
KEY_BYTES = 16
UCRED = struct.Struct("=3i")  # pid, uid, gid (unix(7))
AFTER_END_S = 10.0  # how long a keeper waits for receivers when the process that started its own has ended

_ROW = struct.Struct("=16si")


def credentials(control: list[tuple[int, int, bytes]]) -> tuple[int, int]:
    """Return (pid, uid) of a message's sender, as the kernel says; -1 if it doesn't."""
    for level, kind, raw in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(raw) == UCRED.size:
            pid, uid, _ = UCRED.unpack(raw)
            return pid, uid
    return -1, -1


def answer(sock: socket.socket, descriptor: Callable[[bytes], int], done: Callable[[bytes], object]) -> None:
    """Receive one message and answer it.

    Args:
        sock: The socket of the table. If there is no message, it is waited for.
        descriptor: Returns the descriptor of a key, -1 if there is none.
        done: Called with the key of a descriptor that has been received.
    """
    try:
        # The control buffer has room for the credentials and nothing else, so that no peer can put a descriptor into this process.
        data, control, _, address = sock.recvmsg(MESSAGE.size + 1, socket.CMSG_SPACE(UCRED.size))
    except OSError:
        return
    if len(data) != MESSAGE.size or credentials(control)[1] != os.geteuid():
        return
    magic, what, key = MESSAGE.unpack(data)
    if magic != MAGIC:
        return
    if what == DONE:
        done(key)
    elif what == FETCH and address:
        fd = descriptor(key)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (fd,)))] if fd >= 0 else []
        try:
            message = MESSAGE.pack(MAGIC, HERE if rights else GONE, key)
            sock.sendmsg((message,), rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, address)
        except OSError:
            pass  # its end of the socket is full or closed; if it still wants the descriptor, it asks again


def packed(table: dict[bytes, int]) -> bytes:
    """Return a table for a keeper."""
    return b"".join(_ROW.pack(key, fd) for key, fd in table.items())


def keep(sock: socket.socket, table: dict[bytes, int], parent: int, after_end_s: float = AFTER_END_S) -> None:
    """Hand out the descriptors until none is left, or until the parent has ended and some seconds are over.

    Args:
        sock: The socket of the table.
        table: The descriptors by their keys.
        parent: A pidfd of the process that started the sender, -1 if there is none.
        after_end_s: The seconds.
    """

    def done(key: bytes) -> None:
        fd = table.pop(key, -1)
        if fd >= 0:
            os.close(fd)

    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    end = None if parent >= 0 else time.monotonic() + after_end_s
    if parent >= 0:
        waiting.register(parent, select.POLLIN)
    while table:
        ready = waiting.poll(None if end is None else max(0.0, end - time.monotonic()) * 1000)
        if any(fd == parent for fd, _ in ready):
            waiting.unregister(parent)
            end = time.monotonic() + after_end_s
        elif ready:
            answer(sock, lambda key: table.get(key, -1), done)
        elif end is not None and time.monotonic() >= end:
            return


def main() -> None:
    """Be the keeper: what it keeps is in the arguments."""
    number, parent, rows = map(int, sys.argv[1:4])
    # Nothing of the sender's is kept but its descriptors: not its terminal, its pipes or its directory.
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.setsid()
    os.chdir("/")
    with os.fdopen(rows, "rb") as file:
        file.seek(0)
        table = dict(_ROW.iter_unpack(file.read()))
    keep(socket.socket(fileno=number), table, parent)


if __name__ == "__main__":
    main()
