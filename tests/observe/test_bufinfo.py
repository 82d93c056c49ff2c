"""dmabuf.bufinfo(): the text of debugfs dma_buf/bufinfo."""

import re

import pytest

import dmabuf
from dmabuf import Timeline, Usage
from tests.support.children import Parent, Spawn
from tests.support.facts import FACTS
from tests.support.fences import attach
from tests.support.partners import fences, has, started

HEADER = "\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n"
NO_DEVICES = "\tAttached Devices:\nTotal 0 devices attached\n\n"


def test_without_buffers_it_is_the_kernels_empty_text() -> None:
    assert dmabuf.bufinfo() == HEADER + "\nTotal 0 objects, 0 bytes\n"


def test_lines_are_the_kernels_newest_first() -> None:
    with dmabuf.allocate(12288) as old, dmabuf.allocate(8192, name="named-buf") as new:
        assert dmabuf.bufinfo() == (
            HEADER
            + f"00008192\t00000002\t00000007\t00000001\tmemfd\t{new.ino:08d}\tnamed-buf\n{NO_DEVICES}"
            + f"00012288\t00000002\t00000007\t00000001\tmemfd\t{old.ino:08d}\t<none>\n{NO_DEVICES}"
            + "\nTotal 2 objects, 20480 bytes\n"
        )


@pytest.mark.parametrize(("name", "shown"), [(None, "<none>"), ("", ""), ("a b", "a b"), ("a\nb", "a\nb"), (b"\xff", "\udcff")])
def test_the_name_is_the_last_field(name: str | bytes | None, shown: str) -> None:
    with dmabuf.allocate(4096, name=name) as buf:
        assert f"\t{buf.ino:08d}\t{shown}\n{NO_DEVICES}" in dmabuf.bufinfo()


def test_the_count_is_of_descriptors_and_mappings_everywhere(child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, has, 2, 1)
        assert "00004096\t00000002\t00000007\t00000005\tmemfd\t" in dmabuf.bufinfo()
        other.send()
        other.result()


@pytest.mark.parametrize("usage", [Usage.KERNEL, Usage.WRITE, Usage.READ], ids=lambda usage: usage.name)
def test_a_fence_is_a_line_as_the_kernel_describes_it(child: Spawn, usage: Usage) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, fences, "vgem", "unbound", usage)
        assert f"\t<none>\n\t{usage.name.lower()} fence:vgem unbound seq 1 unsignalled\n{NO_DEVICES}" in dmabuf.bufinfo()
        other.send()
        other.result()


def test_a_bookkeeping_fence_is_not_shown() -> None:
    with dmabuf.allocate(4096) as buf, Timeline("line") as line:
        fence = line.fence()
        attach(buf.resv, fence, Usage.BOOKKEEP)
        assert "fence:" not in dmabuf.bufinfo()
        fence.signal()


def test_it_says_the_same_of_fences_as_the_reservation_object() -> None:
    with dmabuf.allocate(4096) as buf, Timeline("one") as one, Timeline("two") as two:
        made = [one.fence(), two.fence()]
        attach(buf.resv, made[0], Usage.READ)
        attach(buf.resv, made[1], Usage.WRITE)
        made[0].signal()
        with buf.resv.locked():
            described = buf.resv.describe()
        assert described.count("\n") == 2
        assert f"\t<none>\n{described}{NO_DEVICES}" in dmabuf.bufinfo()
        made[1].signal()


def test_the_text_is_the_kernels_to_the_byte() -> None:
    """The recorded text of Linux 6.12, less what user space can't have (docs/homes.md): mode, count, exporter and inode are ours."""
    head, *blocks, _ = re.split(r"(?<=name\n)|(?<=attached\n\n)", FACTS["debugfs/bufinfo"].ret)
    kernel = [block for block in blocks if "\tsystem\t" in block or "\tudmabuf\t" in block]
    with dmabuf.allocate(8192) as attached, dmabuf.allocate(8192, name="named-buf") as named, dmabuf.allocate(12288) as busy:
        with Timeline("python3", driver="sw_sync") as one, Timeline("python3", driver="sw_sync") as two:
            made = [one.fence(), two.fence()]
            attach(busy.resv, made[0], Usage.WRITE)
            attach(busy.resv, made[1], Usage.READ)
            attachment = attached.attach(dmabuf.Device("vgem"))
            expected = [
                re.sub(r"00080007\t\d{8}\t\w+\t\d{8}", f"00000007\t{count:08d}\tmemfd\t{buf.ino:08d}", block)
                for block, buf, count in zip(kernel, (busy, named, attached), (1, 1, 2), strict=True)  # an attachment is a reference
            ]
            text = dmabuf.bufinfo()
            attachment.detach()
            for fence in made:
                fence.signal()
    assert text == head + "".join(expected) + "\nTotal 3 objects, 28672 bytes\n"
    assert text.count("unsignalled") == 2


def prints_two_domains(parent: Parent) -> tuple[str, str]:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(4096, domain=domain):
        return dmabuf.bufinfo(domain=domain), dmabuf.bufinfo()


def test_another_domain_has_a_text_of_its_own(child: Spawn) -> None:
    texts = child(prints_two_domains).result()
    assert [text.rpartition("Total")[2] for text in texts] == [" 1 objects, 4096 bytes\n", " 0 objects, 0 bytes\n"]
