"""Sync objects on a node whose driver has them: the calls against a server made of the same structures (vgem has none)."""

import ctypes
import errno
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from dmabuf.drivers.drm import DrmNode
from dmabuf.drivers.syncobj import Syncobj
from dmabuf.uapi import call, drm, syncobj, table
from dmabuf.uapi import structures as s
from tests.support.errnos import raises_errno


class Server:
    """Sync objects of semantics 5.14, as far as these calls go: a point is signalled, has a fence, or not yet."""

    def __init__(self) -> None:
        self.objects: dict[int, dict[int, bool]] = {}  # handle: {point: signalled}
        self.asked: list[Any] = []

    def __call__(self, fd: int, number: int, argument: bytes) -> Any:
        ioctl = table.BY_NUMBER.get(number) or next(one for one in table.ALL if one.number == number)
        value = ioctl.layout.unpack(argument)
        self.asked.append(value)
        return ioctl.layout.pack(self.answer(number, value))

    def answer(self, number: int, value: Any) -> Any:
        if number == table.DRM_VERSION.number:
            ctypes.memmove(value.name, b"soft", 4)
            return value._replace(name_len=4)
        if number == table.SYNCOBJ_CREATE.number:
            handle = max(self.objects, default=0) + 1
            self.objects[handle] = {0: True} if value.flags & syncobj.CREATE_SIGNALED else {}
            return value._replace(handle=handle)
        if number == table.SYNCOBJ_DESTROY.number:
            self.known(value.handle, errno.EINVAL)
            del self.objects[value.handle]
            return value
        if number in (table.SYNCOBJ_SIGNAL.number, table.SYNCOBJ_RESET.number):
            for handle in self.u32(value.handles, value.count_handles):
                self.known(handle)
                self.objects[handle] = {0: True} if number == table.SYNCOBJ_SIGNAL.number else {}
            return value
        if number == table.SYNCOBJ_TIMELINE_SIGNAL.number:
            pairs = zip(self.u32(value.handles, value.count_handles), self.u64(value.points, value.count_handles), strict=True)
            for handle, point in pairs:
                self.known(handle)
                self.objects[handle][point] = True
            return value
        if number == table.SYNCOBJ_QUERY.number:
            for at, handle in enumerate(self.u32(value.handles, value.count_handles)):
                self.known(handle)
                ctypes.c_uint64.from_address(value.points + 8 * at).value = max(self.objects[handle], default=0)
            return value
        if number == table.SYNCOBJ_TRANSFER.number:
            self.objects[value.dst_handle][value.dst_point] = self.objects[value.src_handle][value.src_point]
            return value
        waits = (table.SYNCOBJ_WAIT_OLD.number, table.SYNCOBJ_TIMELINE_WAIT_OLD.number)
        assert number in waits
        handles = self.u32(value.handles, value.count_handles)
        points = self.u64(value.points, value.count_handles) if number == waits[1] else [0] * len(handles)
        return value._replace(first_signaled=self.wait(handles, points, value.flags))

    def wait(self, handles: list[int], points: list[int], flags: int) -> int:
        for at, (handle, point) in enumerate(zip(handles, points, strict=True)):
            self.known(handle)
            there = [signalled for one, signalled in self.objects[handle].items() if one >= point]
            if not there and not flags & syncobj.WAIT_FOR_SUBMIT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if any(there):
                return at
        raise OSError(errno.ETIME, os.strerror(errno.ETIME))

    def known(self, handle: int, number: int = errno.ENOENT) -> None:
        if handle not in self.objects:
            raise OSError(number, os.strerror(number))

    @staticmethod
    def u32(address: int, count: int) -> list[int]:
        return list((ctypes.c_uint32 * count).from_address(address))

    @staticmethod
    def u64(address: int, count: int) -> list[int]:
        return list((ctypes.c_uint64 * count).from_address(address))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(call, "system", made)
    return made


@pytest.fixture
def node(server: Server) -> Iterator[DrmNode]:
    with DrmNode(os.devnull) as opened:
        assert opened.driver == "soft"
        yield opened


def test_an_object_begins_empty_or_signalled_and_is_destroyed_once(server: Server, node: DrmNode) -> None:
    with Syncobj(node) as empty, Syncobj(node, signaled=True) as full:
        assert server.objects == {empty.handle: {}, full.handle: {0: True}}
        assert full.wait(timeout=0) > 0
        with raises_errno(errno.EINVAL):
            empty.wait(timeout=0)
        empty.close()
        empty.close()
    assert server.objects == {}


def test_a_point_is_signalled_asked_for_and_awaited(server: Server, node: DrmNode) -> None:
    with Syncobj(node) as timeline:
        timeline.signal(7)
        assert timeline.point() == 7
        assert timeline.wait(5) == math.inf
        assert 0 < timeline.wait(7, timeout=5) <= 5
        assert timeline.wait(8, timeout=0, submit=True) == 0.0
        asked = server.asked[-1]
        assert isinstance(asked, s.SyncobjTimelineWaitOld)
        assert (asked.timeout_nsec, asked.count_handles, asked.flags) == (0, 1, syncobj.WAIT_FOR_SUBMIT)


def test_a_binary_object_is_signalled_and_reset(server: Server, node: DrmNode) -> None:
    with Syncobj(node) as binary:
        binary.signal()
        assert server.objects[binary.handle] == {0: True}
        binary.reset()
        assert binary.wait(timeout=0, submit=True) == 0.0


def test_a_fence_is_transferred(server: Server, node: DrmNode) -> None:
    with Syncobj(node, signaled=True) as binary, Syncobj(node) as timeline:
        binary.transfer(0, timeline, 3)
        assert timeline.point() == 3


@pytest.mark.parametrize("operation", ["signal", "reset", "wait", "point", "export", "export_sync_file"])
def test_a_closed_object_is_ebadf(server: Server, node: DrmNode, operation: str) -> None:
    timeline = Syncobj(node)
    timeline.close()
    with raises_errno(errno.EBADF):
        getattr(timeline, operation)()


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan])
def test_a_timeout_below_zero_is_einval(server: Server, node: DrmNode, timeout: float) -> None:
    with Syncobj(node, signaled=True) as binary, raises_errno(errno.EINVAL):
        binary.wait(timeout=timeout)


def test_a_driver_without_them_says_so(monkeypatch: pytest.MonkeyPatch, server: Server, node: DrmNode) -> None:
    def none(fd: int, number: int, argument: bytes) -> Any:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(call, "system", none)
    with raises_errno(errno.EOPNOTSUPP) as caught:
        Syncobj(node)
    assert "driver of this node has no sync objects" in str(caught.value)


def test_several_handles_are_asked_for_at_once(server: Server, node: DrmNode) -> None:
    with Syncobj(node) as one, Syncobj(node, signaled=True) as other:
        handles = [one.handle, other.handle]
        assert syncobj.wait(node.fileno(), handles, 0, syncobj.WAIT_FOR_SUBMIT) == 1
        syncobj.timeline_signal(node.fileno(), handles, [3, 4])
        assert syncobj.query(node.fileno(), handles) == [3, 4]
        assert drm.CAP_SYNCOBJ_TIMELINE == 0x14  # DRM_CAP_SYNCOBJ_TIMELINE, include/uapi/drm/drm.h
