"""The processes of the state machine. A ``Place`` is what one process has; the test has one itself, the others live in forks of it.

Commands and answers are plain values; fences, buffers and sync_files stay where they are and are known by number. What goes from one
process to another does so by ``dmabuf.send``. A command that raises OSError answers with its errno.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import socket
import threading
import warnings
from typing import Any

import dmabuf
from dmabuf import DmaBuf, DmaFence, Usage
from tests.support.steps import fork, reap


class Place:
    """What one process has."""

    def __init__(self, bufs: list[DmaBuf]) -> None:
        self.bufs = bufs
        self.timelines: dict[int, dmabuf.Timeline] = {}
        self.fences: dict[int, DmaFence] = {}
        self.files: dict[int, dmabuf.SyncFile] = {}
        self.waits: dict[int, tuple[threading.Thread, list[int]]] = {}
        self.calls: dict[int, threading.Event] = {}
        self.kept: list[Any] = []

    def command(self, op: str, arguments: tuple[Any, ...]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # a drop is told
                return getattr(self, op)(*arguments)
        except OSError as e:
            return f"errno {e.errno}"

    # ---- timelines and fences ----

    def timeline(self, key: int) -> None:
        self.timelines[key] = dmabuf.Timeline(f"timeline {key}")

    def close(self, key: int) -> None:
        self.timelines[key].close()

    def fence(self, key: int, timeline: int) -> int:
        self.fences[key] = self.timelines[timeline].fence()
        return self.fences[key].seqno

    def signal(self, key: int, error: int) -> None:
        self.fences[key].signal(error)

    def drop(self, key: int) -> None:
        del self.fences[key]
        gc.collect()

    def array(self, key: int, members: list[int], any: bool, enable: bool) -> None:
        self.fences[key] = dmabuf.DmaFenceArray([self.fences[member] for member in members], any)
        if enable:
            self.fences[key].enable_signaling()

    def chain(self, key: int, prev: int | None, fence: int, seqno: int) -> None:
        self.fences[key] = dmabuf.DmaFenceChain(None if prev is None else self.fences[prev], self.fences[fence], seqno)

    def merge(self, key: int, members: list[int]) -> tuple[str, list[int]]:
        return self._took(key, dmabuf.merge(*(self.fences[member] for member in members)))

    def singleton(self, key: int, buf: int, usage: int) -> tuple[str, list[int]] | None:
        found = self.bufs[buf].resv.singleton(Usage(usage))
        return None if found is None else self._took(key, found)

    def _took(self, key: int, fence: DmaFence) -> tuple[str, list[int]]:
        self.fences[key] = fence
        kind = "array" if isinstance(fence, dmabuf.DmaFenceArray) else "fence" if not fence.is_signaled() else "done"
        return kind, self.leaves(key)

    def leaves(self, key: int) -> list[int]:
        """The known numbers of the pending leaves, sorted."""
        pending = {leaf for leaf in dmabuf.unwrap(self.fences[key]) if not leaf.is_signaled()}
        return sorted(next(n for n, fence in sorted(self.fences.items()) if fence == leaf) for leaf in pending)

    def enable(self, key: int) -> None:
        self.fences[key].enable_signaling()

    def statuses(self, keys: list[int]) -> list[int]:
        return [self.fences[key].status for key in keys]

    def ended(self, keys: list[int]) -> list[int]:
        """What these ended with; they must end by themselves."""
        for key in keys:
            self.fences[key].wait()
        return [self.fences[key].status for key in keys]

    def poll_wait(self, key: int) -> bool:
        return self.fences[key].wait(0) > 0

    # ---- waits and callbacks that stay ----

    def begin_wait(self, key: int) -> None:
        fence, seen = self.fences[key], list[int]()

        def wait() -> None:
            fence.wait()
            seen.append(fence.status)

        thread = threading.Thread(target=wait)
        self.waits[key] = thread, seen
        thread.start()

    def end_wait(self, key: int) -> int:
        thread, seen = self.waits.pop(key)
        thread.join()
        return seen[0]

    def callback(self, key: int) -> None:
        called = threading.Event()
        self.fences[key].add_callback(lambda _: called.set())
        self.calls[key] = called

    def called(self, key: int) -> bool:
        return self.calls.pop(key).wait()

    # ---- reservation objects ----

    def add(self, buf: int, key: int, usage: int) -> None:
        resv = self.bufs[buf].resv
        with resv.locked():
            resv.reserve(1)
            resv.add(self.fences[key], Usage(usage))

    def replace(self, buf: int, context_of: int, key: int, usage: int) -> None:
        resv = self.bufs[buf].resv
        with resv.locked():
            resv.replace(self.fences[context_of].context, self.fences[key], Usage(usage))

    def copy(self, target: int, source: int) -> None:
        resv = self.bufs[target].resv
        with resv.locked():
            resv.copy(self.bufs[source].resv)

    def lock(self, buf: int) -> None:
        self.bufs[buf].resv.lock()

    def resv(self, buf: int) -> tuple[list[tuple[tuple[int, int], int]], list[bool]]:
        """((context, seqno), usage) of what is pending, and for each usage whether nothing is."""
        resv = self.bufs[buf].resv
        found = [((fence.context, fence.seqno), int(usage)) for fence, usage, _ in resv.iterate_unlocked(Usage.BOOKKEEP)]
        return sorted(found), [resv.test_signaled(usage) for usage in Usage]

    def identity(self, key: int) -> tuple[int, int]:
        return self.fences[key].context, self.fences[key].seqno

    def poll(self, buf: int) -> int:
        return self.bufs[buf].poll(select.POLLIN | select.POLLOUT)

    # ---- sync_files ----

    def sync_file(self, key: int, fence: int) -> None:
        self.files[key] = dmabuf.SyncFile(self.fences[fence])

    def export(self, key: int, buf: int, write: bool) -> None:
        self.files[key] = self.bufs[buf].export_sync_file(write)

    def import_(self, buf: int, key: int, write: bool) -> None:
        self.bufs[buf].import_sync_file(self.files[key], write)

    def file_merge(self, key: int, one: int, other: int) -> None:
        self.files[key] = self.files[one].merge(self.files[other])

    def ready(self, key: int, wait: bool) -> bool:
        """Is it readable now; with ``wait``, once it is."""
        poll = select.poll()
        poll.register(self.files[key].fileno(), select.POLLIN)
        return bool(poll.poll(None if wait else 0))

    def close_file(self, key: int) -> None:
        self.files.pop(key).close()

    # ---- travel ----

    def send(self, sock: socket.socket, kind: str, key: int) -> None:
        dmabuf.send(sock, self.fences[key] if kind == "fence" else self.files[key])

    def recv(self, sock: socket.socket, kind: str, key: int) -> None:
        (thing,) = dmabuf.recv(sock)
        if kind == "fence":
            self.fences[key] = thing
        else:
            self.files[key] = thing

    def end(self) -> None:
        """Everything that is left goes."""
        for file in self.files.values():
            file.close()
        for timeline in self.timelines.values():
            timeline.close()
        for thread, _ in self.waits.values():
            thread.join()
        self.fences.clear()
        self.files.clear()
        self.timelines.clear()
        self.kept.clear()
        gc.collect()


class Local:
    """The test's own place, spoken to like the others."""

    def __init__(self, bufs: list[DmaBuf]) -> None:
        self.place = Place(bufs)
        self.here, self.there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __call__(self, op: str, *arguments: Any) -> Any:
        return self.place.command(op, arguments)

    def give(self, kind: str, key: int, other: Local | Remote, new: int) -> None:
        if isinstance(other, Local):
            other.place.send(self.here, kind, key)
            self.place.recv(self.there, kind, new)
        else:
            self.place.send(other.sock, kind, key)
            other("take", kind, new)

    def close(self) -> None:
        self.place.end()
        self.here.close()
        self.there.close()


class Remote:
    """Another process: a fork of this one, with the same buffers and nothing else."""

    def __init__(self, bufs: list[DmaBuf]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # commands
        self.commands = ours
        self.sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # things

        def run() -> None:
            ours.close()
            self.sock.close()
            place = Place(bufs)
            while message := theirs.recv(1 << 16):
                op, *arguments = pickle.loads(message)
                if op == "take":
                    answer = place.command("recv", (other, *arguments))
                elif op == "give":
                    answer = place.command("send", (other, *arguments))
                else:
                    answer = place.command(op, tuple(arguments))
                theirs.send(pickle.dumps(answer))
            os._exit(0)

        self.pid = fork(run)
        theirs.close()
        other.close()

    def __call__(self, op: str, *arguments: Any) -> Any:
        self.commands.send(pickle.dumps((op, *arguments)))
        answer = self.commands.recv(1 << 20)
        assert answer, f"process {self.pid} died of {op}{arguments}"
        return pickle.loads(answer)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert reap(self.pid) == -signal.SIGKILL
        self.commands.close()
        self.sock.close()
