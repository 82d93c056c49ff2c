"""The debug layer: hidden pages, brackets, made-up deadlocks, signalling sections (semantics 6.7, 6.8, 3.11)."""

import asyncio
import errno
import logging

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, Direction, DmaBuf, DmaBufAttachment, DmaResv, SgTable, Usage, WwAcquireContext
from dmabuf.core.base import debug
from dmabuf.core.fence.signalling import in_signalling
from dmabuf.core.resv.ww_mutex import inject_deadlocks
from tests.support.drivers import PAGE, Static
from tests.support.errnos import raises_errno
from tests.support.logs import logged
from tests.support.waiting import Background

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
SIZE = 4 * PAGE


def test_it_is_on_in_tests() -> None:
    assert debug.enabled


@pytest.mark.parametrize("cache", [False, True], ids=["mapped", "kept"])
def test_an_importer_sees_no_pages_and_the_exporter_sees_them_again(static: Static, dev: Device, cache: bool) -> None:
    seen: list[int] = []
    static.during["unmap"] = lambda _: seen.append(len(static.tables[0].entries))
    with dmabuf.export(static, SIZE, cache_sgt_mapping=cache) as buf:
        att = buf.attach(dev)
        with att.mapped(TO) as sgt:
            with pytest.raises(ContractError, match="pages"):
                _ = sgt.entries
            assert dev.read(sgt.dma_entries[0].address, 1) == b"\0"
        att.detach()
    assert seen == [1]


def test_off_the_pages_are_seen(static: Static, dev: Device) -> None:
    with debug.debugging(False), dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO) as sgt:
            assert len(sgt.entries) == 1
        att.detach()


def test_dma_side_without_whole_pages_is_logged(dev: Device) -> None:
    class Odd(Static):
        def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
            return SgTable.from_dma([(0x1010, 100)])

        def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
            pass

    exporter = Odd()
    with logged(logging.DEBUG) as log, dmabuf.export(exporter, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO):
            pass
        att.detach()
    assert any("not whole pages" in text for text in log.texts)
    exporter.close()


def test_a_vmap_used_outside_of_a_bracket_names_the_place_that_made_it(buf: DmaBuf) -> None:
    map_ = buf.vmap_unlocked()
    with pytest.warns(ContractWarning, match=r"vmap made at .*test_debug\.py:\d+"):
        map_.rd(0, "u8")
    buf.begin_cpu_access(TO)
    map_.wr(0, "u8", 1)
    map_.copy().memset(0, 1, 4)
    buf.end_cpu_access(TO)
    with buf.write(), buf.resv.locked():
        map_.wr(0, "u8", 1)
    with pytest.warns(ContractWarning):
        map_.copy().memset(0, 1, 4)
    buf.vunmap_unlocked(map_)


def test_off_a_vmap_watches_nothing(buf: DmaBuf) -> None:
    with debug.debugging(False):
        map_ = buf.vmap_unlocked()
        map_.wr(0, "u8", 1)
        buf.vunmap_unlocked(map_)


# -- made-up deadlocks


def test_made_up_deadlocks_are_answered_as_real_ones() -> None:
    resv = DmaResv()
    with inject_deadlocks(1), WwAcquireContext() as ctx:
        with raises_errno(errno.EDEADLK):
            resv.lock(ctx)
        assert not resv.is_locked()
        assert (ctx.contended, ctx.acquired) == (resv, 0)
        resv.lock_slow(ctx)
        resv.unlock()


def test_lock_all_gets_through_made_up_deadlocks() -> None:
    resvs = [DmaResv() for _ in range(5)]
    with inject_deadlocks(3):
        for _ in range(20):
            with dmabuf.lock_all(resvs):
                assert all(resv.is_locked() for resv in resvs)
    assert not any(resv.is_locked() for resv in resvs)


def test_locks_without_a_context_are_left_alone() -> None:
    resv = DmaResv()
    with inject_deadlocks(1), resv.locked():
        pass


# -- an exporter that keeps its table for itself


def test_one_table_for_two_maps_warns(static: Static, dev: Device) -> None:
    table = SgTable.from_dma([(PAGE, PAGE)])
    exporter = type("Keeps", (Static,), {"map": lambda self, att, way: table, "unmap": lambda self, att, sgt, way: None})()
    with dmabuf.export(exporter, SIZE) as buf:
        one, two = buf.attach(dev), buf.attach(dev)
        with one.mapped(TO):
            pass
        with one.mapped(TO), pytest.warns(ContractWarning, match="a new one each time"), two.mapped(TO):
            pass
        one.detach()
        two.detach()
    exporter.close()


# -- signalling sections


@pytest.mark.parametrize("call", ["lock", "lock under a context", "locked", "lock_interruptible"])
def test_lock_in_signalling_section_warns_and_is_taken(call: str) -> None:
    resv, ctx = DmaResv(), WwAcquireContext()
    block = resv.locked()
    take = {"locked": block.__enter__, "lock under a context": lambda: resv.lock(ctx)}.get(call) or getattr(resv, call)
    with dmabuf.signalling(), pytest.warns(ContractWarning, match="signalling"):
        take()
    assert resv.is_locked()
    resv.unlock()
    ctx.fini()


@pytest.mark.parametrize("call", ["read", "write", "access"])
def test_access_in_signalling_section_warns_and_is_granted(buf: DmaBuf, call: str) -> None:
    block = dmabuf.access(write=[buf]) if call == "access" else getattr(buf, call)()
    with dmabuf.signalling(), pytest.warns(ContractWarning, match="signalling") as told:
        block.__enter__()
    assert len(told) == 1
    assert call == "access" or told[0].filename == __file__
    block.__exit__(None, None, None)


def test_async_access_in_signalling_section_warns_and_is_granted(buf: DmaBuf) -> None:
    async def main() -> None:
        with dmabuf.signalling(), pytest.warns(ContractWarning, match="signalling"):
            async with buf.write():
                pass

    asyncio.run(main())


def test_an_access_refused_by_the_warning_leaves_nothing(buf: DmaBuf) -> None:
    block = buf.write()
    with dmabuf.signalling(), pytest.raises(ContractWarning):  # warnings are errors in this suite
        block.__enter__()
    assert buf.statistics().accesses == 0
    assert not buf.resv.fences(Usage.BOOKKEEP)


def test_a_trylock_in_a_signalling_section_is_fine() -> None:
    resv = DmaResv()
    with dmabuf.signalling():
        assert resv.trylock()
        resv.unlock()


def test_the_section_ends_with_its_block_and_nests() -> None:
    resv = DmaResv()
    with dmabuf.signalling():
        with dmabuf.signalling():
            pass
        assert in_signalling()
    assert not in_signalling()
    with resv.locked():
        pass


def test_the_section_is_of_its_thread() -> None:
    resv = DmaResv()

    def other() -> None:
        with resv.locked():
            pass

    with dmabuf.signalling(), Background(other) as job:
        job.result()


def test_the_section_is_of_its_task() -> None:
    resv = DmaResv()

    async def section(inside: asyncio.Event, over: asyncio.Event) -> None:
        with dmabuf.signalling():
            inside.set()
            await over.wait()

    async def main() -> None:
        inside, over = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(section(inside, over))
        await inside.wait()
        with resv.locked():
            over.set()
        await task

    asyncio.run(main())
