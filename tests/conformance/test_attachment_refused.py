"""Attachments: arguments that are refused, and the lock table (semantics 2.19)."""

import errno

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, DmaBuf, Importer
from tests.support.drivers import BIDIR, PAGE, TO, Dynamic, Mover, Static
from tests.support.errnos import raises_errno
from tests.support.waiting import Background

SIZE = 4 * PAGE

# -- arguments


def test_attach_without_a_device_warns_and_is_einval(either: Static) -> None:
    with dmabuf.export(either, SIZE) as buf, pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        buf.attach(None)  # type: ignore[arg-type]
    assert "attach" not in either.calls


def test_attach_of_what_is_no_device_is_a_type_error(buf: DmaBuf) -> None:
    with pytest.raises(TypeError):
        buf.attach("npu0")  # type: ignore[arg-type]


def test_an_importer_without_move_notify_warns_and_is_einval(either: Static, dev: Device) -> None:
    with dmabuf.export(either, SIZE) as buf, pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        buf.attach(dev, Importer())
    assert "attach" not in either.calls


def test_attach_of_a_closed_buffer_is_ebadf(dev: Device) -> None:
    buf = dmabuf.allocate(PAGE)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.attach(dev)


def test_unmap_of_none_warns_and_does_nothing(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with pytest.warns(ContractWarning):
            att.unmap_unlocked(None, TO)
        assert static.count("unmap") == 0
        att.detach()


def test_unmap_twice_is_a_contract_error(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        sgt = att.map_unlocked(TO)
        att.unmap_unlocked(sgt, TO)
        with pytest.raises(ContractError):
            att.unmap_unlocked(sgt, TO)
        assert static.count("unmap") == 1
        att.detach()


@pytest.mark.parametrize("exported", [True, False], ids=["exported", "plain"])
def test_unmap_with_another_direction_is_a_contract_error(static: Static, buf: DmaBuf, dev: Device, exported: bool) -> None:
    with dmabuf.export(static, SIZE) if exported else buf.get_dma_buf() as one:
        att = one.attach(dev)
        sgt = att.map_unlocked(TO)
        with pytest.raises(ContractError, match="mapped TO_DEVICE"):
            att.unmap_unlocked(sgt, BIDIR)
        assert (att.statistics().mapped, dev.statistics().windows) == (1, 1)
        att.unmap_unlocked(sgt, TO)
        assert (att.statistics().mapped, dev.statistics().windows) == (0, 0)
        att.detach()


def test_map_with_no_direction_is_einval(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with raises_errno(errno.EINVAL):
            att.map_unlocked(17)
        att.detach()


def test_detach_twice_warns_and_does_nothing(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        att.detach()
        with pytest.warns(ContractWarning):
            att.detach()
        assert static.count("detach") == 1


@pytest.mark.parametrize("call", ["map_unlocked", "pin", "unpin"])
def test_a_detached_attachment_is_of_no_use(static: Static, dev: Device, call: str) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        att.detach()
        arguments = (TO,) if call == "map_unlocked" else ()
        with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
            getattr(att, call)(*arguments)


def test_detach_with_a_mapping_left_is_told_by_the_debug_layer(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        sgt = att.map_unlocked(TO)
        with pytest.warns(ContractWarning, match="still mapped"):
            att.detach()
        static.tables.clear()
        dev.unmap_sgtable(sgt, TO)


def test_a_device_may_attach_twice_and_lists_are_shared_between_handles(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf, buf.get_dma_buf() as other:
        one, two = buf.attach(dev), other.attach(dev)
        assert buf.statistics().attachments == other.statistics().attachments == 2
        one.detach()
        two.detach()
        assert buf.statistics().attachments == 0


# -- the lock table (2.19)

LOCKED = {
    "map": lambda buf, att, sgt: att.map(TO),
    "unmap": lambda buf, att, sgt: att.unmap(sgt, TO),
    "pin": lambda buf, att, sgt: att.pin(),
    "unpin": lambda buf, att, sgt: att.unpin(),
    "vmap": lambda buf, att, sgt: buf.vmap(),
    "vunmap": lambda buf, att, sgt: buf.vunmap(dmabuf.IosysMap()),
    "move_notify": lambda buf, att, sgt: buf.move_notify(),
}
UNLOCKED = {
    "attach": lambda buf, att, sgt: buf.attach(att.dev),
    "detach": lambda buf, att, sgt: att.detach(),
    "map_unlocked": lambda buf, att, sgt: att.map_unlocked(TO),
    "unmap_unlocked": lambda buf, att, sgt: att.unmap_unlocked(sgt, TO),
    "mapped": lambda buf, att, sgt: att.mapped(TO).__enter__(),
    "vmap_unlocked": lambda buf, att, sgt: buf.vmap_unlocked(),
    "vunmap_unlocked": lambda buf, att, sgt: buf.vunmap_unlocked(dmabuf.IosysMap()),
    "begin_cpu_access": lambda buf, att, sgt: buf.begin_cpu_access(TO),
    "end_cpu_access": lambda buf, att, sgt: buf.end_cpu_access(TO),
    "mmap": lambda buf, att, sgt: buf.mmap(),
    "dma_mmap": lambda buf, att, sgt: buf.dma_mmap(0, PAGE),
    "read": lambda buf, att, sgt: buf.read().__enter__(),
    "write": lambda buf, att, sgt: buf.write().__enter__(),
    "export": lambda buf, att, sgt: dmabuf.export(Static.__new__(Static), PAGE, resv=buf.resv),
}


@pytest.mark.parametrize("call", list(LOCKED))
@pytest.mark.usefixtures("move_notify")
def test_locked_call_without_the_lock_is_a_contract_error(dynamic: Dynamic, dev: Device, call: str) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        sgt = att.map_unlocked(TO)
        asked = list(dynamic.calls)
        with pytest.raises(ContractError):
            LOCKED[call](buf, att, sgt)
        assert dynamic.calls == asked
        att.unmap_unlocked(sgt, TO)
        att.detach()


@pytest.mark.parametrize("call", list(UNLOCKED))
@pytest.mark.usefixtures("move_notify")
def test_with_the_lock_an_unlocked_call_warns_and_is_edeadlk(dynamic: Dynamic, dev: Device, call: str) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        sgt = att.map_unlocked(TO)
        asked = list(dynamic.calls)
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            UNLOCKED[call](buf, att, sgt)
        assert dynamic.calls == asked
        assert not buf.resv.is_locked()
        att.unmap_unlocked(sgt, TO)
        att.detach()


def test_the_lock_of_another_thread_is_not_ones_own(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with buf.resv.locked(), Background(lambda: att.map(TO)) as job, pytest.raises(ContractError):
            job.result()
        att.detach()


def test_every_op_is_called_with_the_lock_that_its_table_says(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev)
        with buf.read():
            pass
        buf.mmap().close()
        buf.vunmap_unlocked(buf.vmap_unlocked())
        att.detach()
    held = {"pin", "unpin", "map", "unmap", "vmap", "vunmap"}
    free = {"attach", "detach", "release", "begin", "end", "mmap"}
    assert {op for op, locked in dynamic.locked.items() if locked} == held
    assert {op for op, locked in dynamic.locked.items() if not locked} == free
