"""One test for each row of the kernel's history of dma-buf.h (semantics 8), in the words of its acceptance test.

A row is named by its test, ``test_F11_…``; ``NOT_YET`` names the rows that need what is not built, and why. ``docs/features.md`` is made of
both by ``tools/features.py``. Rows F35 and later are in test_features_dynamic.py; the rows S of what that history doesn't show are in
test_features_supplement.py.
"""

import errno
import inspect
import os
import re
import subprocess
import sys

import pytest

import dmabuf
from dmabuf import (
    ContractError,
    ContractWarning,
    Device,
    Direction,
    DmaBuf,
    DmaBufAttachment,
    DmaFence,
    DmaResv,
    Domain,
    Exporter,
    IosysMap,
    Timeline,
    Usage,
)
from dmabuf.core.contract import ExporterOps
from dmabuf.core.export.module import Module
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Bare, Dynamic, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.fences import key
from tests.support.waiting import Background, until

IN, OUT = 1, 4  # select.POLLIN, POLLOUT
SIZE = 4 * PAGE

NOT_YET = {
    "F47": "not yet: the statistics tree as files (`dmabuf.buffers()` shows the same)",
    "F50": "not yet: without a statistics tree it has no entries for attachments",
}


def settled(exporter: Static | Bare, op: str = "release") -> None:
    """Until what others may do for us is done."""
    Domain.default().sweep()
    until(lambda: exporter.count(op))


def test_F01_buffers_are_exported_got_attached_and_mapped(static: Static, dev: Device) -> None:
    buf = dmabuf.export(static, SIZE)
    with dmabuf.get(buf.fileno()) as same:
        assert same == buf
        att = same.attach(dev)
        with att.mapped(TO):
            pass
        att.detach()
    read, write = os.pipe()
    with raises_errno(errno.EINVAL):
        dmabuf.get(read)
    os.close(read)
    os.close(write)
    with raises_errno(errno.EBADF):
        dmabuf.get(-1)
    without = type("NoRelease", (Exporter,), {"map": Bare.map, "unmap": Bare.unmap})
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(without(), SIZE)
    buf.put()
    assert static.calls == ["attach", ("map", TO), ("unmap", TO), "detach", "release"]


def test_F02_an_immutable_exporter_works_for_all_calls(static: Static, dev: Device) -> None:
    class Frozen(Exporter):
        __slots__ = ()

        def __setattr__(self, *_: object) -> None:
            raise AssertionError("written to")

    for op, function in inspect.getmembers(Static, inspect.isfunction):
        if op in vars(ExporterOps) and function is not vars(ExporterOps)[op]:
            setattr(Frozen, op, (lambda do: lambda self, *arguments: do(static, *arguments))(function))
    with dmabuf.export(Frozen(), SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO), buf.write():
            pass
        buf.mmap().close()
        buf.vunmap_unlocked(buf.vmap_unlocked())
        att.detach()
    assert static.count("release") == 1


@pytest.mark.parametrize("direction", [BIDIR, TO, FROM], ids=lambda direction: direction.name)
def test_F03_unmap_hears_the_direction_of_map(static: Static, dev: Device, direction: Direction) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(direction):
            pass
        att.detach()
    assert static.calls[1:3] == [("map", direction), ("unmap", direction)]


def test_F04_descriptors_are_inherited_by_exec_only_when_asked(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        kept, inherited = buf.dup(cloexec=True), buf.dup(cloexec=False)
        code = "import os, sys\nfor fd in map(int, sys.argv[1:]):\n try: os.fstat(fd); print('open')\n except OSError: print('closed')"
        told = subprocess.run(
            [sys.executable, "-c", code, str(kept), str(inherited)], capture_output=True, text=True, close_fds=False, check=True
        )
        assert told.stdout.split() == ["closed", "open"]
        os.close(kept)
        os.close(inherited)


def test_F05_a_reference_more_keeps_the_buffer(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    more = buf.get_dma_buf()
    buf.close()
    assert static.calls == []
    more.put()
    assert static.calls == ["release"]


def test_F06_the_framework_has_no_lock_of_its_own_around_map_and_attach(static: Static, dev: Device) -> None:
    """Another buffer's whole cycle runs inside of attach and map, from another thread too."""
    other = Static()

    def cycle() -> None:
        with dmabuf.export(other, SIZE) as inner:
            att = inner.attach(Device("inner"))
            with att.mapped(TO):
                pass
            att.detach()

    def both(_: object) -> None:
        cycle()
        with Background(cycle) as job:
            job.result()

    static.during = {"attach": both, "map": both}
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO):
            pass
        att.detach()
    assert other.count("map") == 4
    other.close()


def test_F07_cpu_access_hooks_are_called_and_begin_may_fail(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        buf.begin_cpu_access(FROM)
        buf.end_cpu_access(FROM)
        assert static.calls == [("begin", FROM), ("end", FROM)]
        static.fails["begin"] = errno.ENOMEM
        with raises_errno(errno.ENOMEM):
            buf.begin_cpu_access(FROM)
        with raises_errno(errno.ENOMEM), buf.write():
            raise AssertionError("accessed")


def test_F08_user_space_maps_within_the_size(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        whole, redirected = buf.mmap(), buf.dma_mmap(0, SIZE)
        whole[SIZE - 1] = 42
        assert static.whole[SIZE - 1] == redirected[SIZE - 1] == 42
        assert static.count("begin") == 0
        with raises_errno(errno.EINVAL):
            buf.mmap(SIZE, PAGE)
        with raises_errno(errno.EINVAL):
            buf.mmap(0, SIZE + PAGE)
        with raises_errno(errno.EOVERFLOW):
            buf.dma_mmap((1 << 64) - PAGE, 2 * PAGE)
        whole.close()
        redirected.close()


def test_F09_vmap_without_the_op_fails_with_a_null_map(bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf:
        stale = IosysMap.init_vaddr(bytearray(8))
        with raises_errno(errno.EINVAL):
            buf.vmap_unlocked(stale)
        assert stale.is_null()


def test_F10_an_unsupported_platform_fails_at_import() -> None:
    code = "import sys; sys.platform = 'darwin'; import dmabuf"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert "ImportError: dmabuf works on Linux only" in told.stderr


def test_F11_vmaps_are_counted_by_the_framework(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    one, two = buf.vmap_unlocked(), buf.vmap_unlocked()
    assert one == two
    assert static.calls == ["vmap"]
    buf.vunmap_unlocked(one)
    assert static.calls == ["vmap"]
    buf.vunmap_unlocked(two)
    assert static.calls == ["vmap", "vunmap"]
    with pytest.raises(ContractError):
        buf.vunmap_unlocked(two)
    buf.vmap_unlocked()
    with pytest.raises(ContractError):
        buf.close()


def test_F12_the_exporter_has_a_name(static: Static) -> None:
    with dmabuf.export(static, SIZE, exp_name="vram") as named, dmabuf.export(static, SIZE) as unnamed:
        assert "exp_name:\tvram\n" in named.fdinfo()
        assert unnamed.exp_name == "drivers"
        text = dmabuf.bufinfo()
        assert "\tvram\t" in text
        assert "\tdrivers\t" in text


def test_F13_the_listing_shows_a_buffer_until_it_is_released(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    ino = f"\t{buf.ino:08d}\t"
    assert ino in dmabuf.bufinfo()
    buf.close()
    assert static.calls == ["release"]
    assert ino not in dmabuf.bufinfo()


def test_F14_attached_devices_are_listed_under_their_buffer(static: Static) -> None:
    with dmabuf.export(static, SIZE, exp_name="first") as one, dmabuf.export(static, SIZE, exp_name="second") as two:
        atts = [one.attach(Device("gpu0")), two.attach(Device("npu0")), two.attach(Device("isp0"))]
        second, first = re.split(r"(?=\d{8}\t\d{8}\t\d{8}\t\d{8}\tfirst)", dmabuf.bufinfo())
        assert "\tAttached Devices:\n\tisp0\n\tnpu0\nTotal 2 devices attached\n" in second
        assert "\tAttached Devices:\n\tgpu0\nTotal 1 devices attached\n" in first
        for att in atts:
            att.detach()


def test_F15_a_reservation_object_is_the_exporters_or_the_buffers_own(static: Static, tl: Timeline) -> None:
    resv, fence = DmaResv(), tl.fence()
    with dmabuf.export(static, SIZE, resv=resv) as given, dmabuf.export(static, SIZE) as own:
        assert given.resv is resv
        assert own.resv is not resv
        add(resv, fence, Usage.WRITE)
    assert [key(f) for f in resv.fences(Usage.WRITE)] == [key(fence)]
    fence.signal()


def test_F16_poll_in_waits_for_writers_and_out_for_all(static: Static, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        write, read = tl.fence(), tl.fence()
        assert buf.poll(IN | OUT) == IN | OUT
        add(buf.resv, read, Usage.READ)
        assert buf.poll(IN | OUT) == IN
        other = dmabuf.Timeline("writer")
        write = other.fence()
        add(buf.resv, write, Usage.WRITE)
        assert buf.poll(IN | OUT) == 0
        write.signal()
        read.signal()
        assert buf.poll(IN | OUT) == IN | OUT
        other.close()


def test_F17_export_takes_options_by_name_with_defaults() -> None:
    parameters = list(inspect.signature(dmabuf.export).parameters.values())
    assert [p.name for p in parameters[:2]] == ["exporter", "size"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[2:])


def test_F18_an_owner_cannot_go_while_a_buffer_or_a_mapping_lives(static: Static) -> None:
    module = Module("vram")
    buf = dmabuf.export(static, SIZE, owner=module)
    mapping = buf.mmap()
    buf.close()
    with raises_errno(errno.EBUSY):
        module.unload()
    mapping.close()
    settled(static)
    until(lambda: not module.references)
    module.unload()
    with raises_errno(errno.ENOENT):
        dmabuf.export(static, SIZE, owner=module)


def test_F19_begin_and_end_take_no_range() -> None:
    for call in (DmaBuf.begin_cpu_access, DmaBuf.end_cpu_access, Exporter.begin_cpu_access, Exporter.end_cpu_access):
        assert not {"offset", "start", "length", "len", "size"} & set(inspect.signature(call).parameters)


@pytest.mark.parametrize(("op", "flags"), [("begin", 2), ("end", 6)])
def test_F20_sync_tells_the_exporters_errors(static: Static, op: str, flags: int) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails[op] = errno.EINTR
        with raises_errno(errno.EINTR):
            buf.sync(flags)


def test_F21_there_is_no_helper_for_debug_files(buf: DmaBuf) -> None:
    assert not [name for name in dir(dmabuf) if "debugfs" in name]
    assert f"\t{buf.ino:08d}\t" in dmabuf.bufinfo()


def test_F22_fences_are_dma_fences() -> None:
    assert dmabuf.DmaFence is DmaFence
    assert not [name for name in dmabuf.__all__ if name.lower() == "fence"]


def test_F23_without_a_bracket_what_one_sees_may_be_stale() -> None:
    class Cached(Static):
        """A device's memory behind a cache: begin brings it in, end writes it back."""

        device = bytearray(SIZE)

        def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
            self.whole[:SIZE] = bytes(self.device)

        def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
            self.device[:] = self.whole[:SIZE]

    exporter = Cached()
    with dmabuf.export(exporter, SIZE) as buf, buf.mmap() as mapping:
        exporter.device[0] = 1
        assert mapping[0] == 0
        buf.begin_cpu_access(BIDIR)
        assert mapping[0] == 1
        mapping[0] = 2
        assert exporter.device[0] == 1
        buf.end_cpu_access(BIDIR)
        assert exporter.device[0] == 2
    exporter.close()


def test_F24_no_op_is_named_kmap() -> None:
    assert not [name for cls in (Exporter, DmaBuf) for name in dir(cls) if "kmap" in name]


def test_F25_polled_events_are_a_mask_of_in_and_out(buf: DmaBuf) -> None:
    assert buf.poll(IN | OUT | 0x1018) == IN | OUT
    with raises_errno(errno.EINVAL):
        buf.poll_fd(0x1018)


def test_F26_three_mandatory_ops_are_enough(bare: Bare) -> None:
    dmabuf.export(bare, SIZE).close()
    assert bare.calls == ["release"]


def test_F27_attach_reaches_the_device_through_the_attachment(static: Static, dev: Device) -> None:
    seen: list[tuple[Device, DmaBuf]] = []
    static.during["attach"] = lambda att: seen.append((att.dev, att.dmabuf))
    with dmabuf.export(static, SIZE) as buf:
        buf.attach(dev).detach()
        assert seen == [(dev, buf)]
    assert list(inspect.signature(Exporter.attach).parameters) == ["self", "attachment"]


def test_F28_there_is_no_atomic_page_mapping() -> None:
    assert not [name for cls in (Exporter, DmaBuf, DmaBufAttachment) for name in dir(cls) if "atomic" in name]


def test_F29_a_table_may_be_kept_by_attachment(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf:
        att = buf.attach(dev)
        one, two = att.map_unlocked(TO), att.map_unlocked(TO)
        assert one is two
        att.unmap_unlocked(one, TO)
        assert static.calls == ["attach", ("map", TO)]
        with raises_errno(errno.EBUSY):
            att.map_unlocked(FROM)
        att.detach()
        assert static.calls[2:] == [("unmap", TO), "detach"]


def test_F30_users_name_buffers(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        buf.name = "cam"
        assert "name:\tcam\n" in buf.fdinfo()
        assert dmabuf.bufinfo().count("\tcam\n") == 1
        with raises_errno(errno.EINVAL):
            buf.name = "x" * 32
        assert buf.name == "cam"


def test_F31_reservation_objects_are_dma_resvs(buf: DmaBuf) -> None:
    assert isinstance(buf.resv, dmabuf.DmaResv)
    assert not [name for name in dmabuf.__all__ if "reservation" in name.lower()]


def test_F32_where_the_sides_disagree_one_map_at_attach_serves_all(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev)
        assert dynamic.calls == ["attach", "pin", ("map", BIDIR)]
        for direction in (TO, FROM, BIDIR):
            with att.mapped(direction):
                pass
        assert dynamic.count("map") == 1
        att.detach()


def test_F33_F34_there_are_no_page_by_page_mappings() -> None:
    ops = {name for name in vars(ExporterOps) if not name.startswith("_")}
    wanted = "attach detach pin unpin map unmap release begin_cpu_access end_cpu_access mmap vmap vunmap"
    assert ops == set(wanted.split())
    assert not [name for name in dir(DmaBuf) if re.match(r"k(un)?map|(un)?map_page", name)]
