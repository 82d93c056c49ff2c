"""The public names: programs are written against them, so none goes, and none comes by accident."""

import ast
import inspect
import subprocess
import sys

import pytest

import dmabuf
from tests.support.budget import budget

NAMES = {
    "BufferRange", "BufferRef", "Color", "ContractError", "ContractWarning", "Device", "Direction", "DiskDevice", "DmaBuf",
    "DmaBufAttachment", "DmaBufError", "DmaFence", "DmaFenceArray", "DmaFenceChain", "DmaResv", "Domain", "Exporter", "FenceOps",
    "Frame", "ImageLayout", "Importer", "IosysMap", "KeptWarning", "PixelFormat", "Plane", "Pool", "RemoteTimeline", "SgTable",
    "SpillHeap", "Stream", "StreamReader", "SwSync", "SyncFile", "TensorLayout", "Timeline", "TimelineSemaphore", "Usage", "View",
    "WwAcquireContext", "access", "allocate", "allocate_planes", "arecv", "asend", "buffers", "bufinfo", "export", "get",
    "get_sync_file", "heaps", "label", "lock_all", "merge", "open", "open_or_allocate", "private_stub", "recv", "send", "serve", "streams",
    "signalling", "sim", "stub_fence", "sync_info", "unwrap", "wait_any", "wait_semaphores",
}  # fmt: skip

METHODS = {
    "DmaBuf": "size ino exp_name name home resv closed fileno dup detach close write read begin_cpu_access end_cpu_access mmap vmap vunmap "
    "poll poll_fd readable writable lseek sync get_dma_buf put dma_mmap vmap_unlocked vunmap_unlocked fdinfo statistics "
    "attach move_notify is_dynamic export_sync_file import_sync_file export_range layout layout_part describe ref",
    "BufferRef": "from_bytes domain dev ino size nonce name",
    "ImageLayout": "linear format is_linear fourcc width height memory_planes modifier coded_width coded_height crop_x crop_y color sizes "
    "check specs planes pack unpack",
    "Plane": "buffer offset stride size end",
    "TensorLayout": "dtype shape strides offset itemsize is_contiguous sizes check specs array pack unpack",
    "PixelFormat": "of from_v4l2 from_gstreamer from_ffmpeg from_opencv from_ros v4l2 v4l2_fourcc gstreamer ffmpeg opencv ros name fourcc "
    "planes",
    "Color": "primaries transfer matrix range from_v4l2",
    "BufferRange": "buf offset length of read write mmap",
    "DmaBufAttachment": "map unmap map_unlocked unmap_unlocked mapped pin unpin detach dev dmabuf importer peer2peer priv attached "
    "is_dynamic statistics",
    "Exporter": "attach detach pin unpin map unmap release begin_cpu_access end_cpu_access mmap vmap vunmap",
    "Importer": "move_notify allow_peer2peer",
    "SgTable": "from_pages from_ranges from_dma nents orig_nents entries dma_entries pages view cpu_array dma_array set_dma size",
    "Device": "map_sgtable unmap_sgtable read write views statistics",
    "DiskDevice": "read_into write_from submit_read submit_write attach power_off power_on close statistics device",
    "DmaFence": "context seqno status error timestamp signal set_error is_signaled wait add_callback remove_callback enable_signaling "
    "set_deadline deadline describe statistics is_later is_later_or_same later match_context signal_timestamp",
    "DmaFenceArray": "fences signal_on_any enabled",
    "DmaFenceChain": "prev fence prev_seqno walk find_seqno enabled",
    "FenceOps": "enable_signaling signaled wait set_deadline release",
    "SyncFile": "from_fd fileno dup close closed fence name merge info set_deadline wait status is_signaled kernel kernel_fileno domain "
    "statistics",
    "SwSync": "from_fd fileno dup close closed name context domain value create_fence inc get_deadline statistics",
    "TimelineSemaphore": "from_fd fileno dup close closed domain signal reset import_fence import_sync_file export_fence export_sync_file "
    "transfer query wait reached eventfd statistics",
    "Timeline": "fence close context statistics",
    "DmaResv": "locked reserve add iterate iterate_unlocked fences replace singleton copy set_deadline test_signaled wait describe "
    "lock trylock unlock lock_slow lock_interruptible is_locked locking_ctx statistics",
    "WwAcquireContext": "done fini",
    "Domain": "default open private",
    "SpillHeap": "allocate statistics close closed budget directory memory_timeout",
    "Usage": "KERNEL WRITE READ BOOKKEEP rw",
    "Direction": "BIDIRECTIONAL TO_DEVICE FROM_DEVICE NONE",
}


def test_the_public_names_are_these_and_no_others() -> None:
    assert set(dmabuf.__all__) == NAMES
    assert all(hasattr(dmabuf, name) for name in NAMES)


@pytest.mark.parametrize("cls", METHODS)
def test_every_documented_method_is_there(cls: str) -> None:
    made_in_init = {
        "context",
        "device",
        "closed",
        "domain",
        "name",
        "budget",
        "directory",
        "memory_timeout",
    }  # attributes that instances have
    missing = [name for name in METHODS[cls].split() if not hasattr(getattr(dmabuf, cls), name) and name not in made_in_init]
    assert missing == []


@pytest.mark.parametrize("name", sorted(n for n in NAMES if callable(getattr(dmabuf, n, None))))
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(dmabuf, name))


@pytest.mark.parametrize("cls", ["DmaBuf", "DmaBufAttachment", "DmaFence"])
def test_objects_of_the_kernel_have_no_public_constructor(cls: str) -> None:
    with pytest.raises(TypeError):
        getattr(dmabuf, cls)()


def test_type_checkers_see_each_name_where_it_is_imported_from() -> None:
    tree = ast.parse(inspect.getsource(dmabuf))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    places = {(module, name) for module, names in dmabuf._PLACES.items() for name in names}
    assert seen == places | {("dmabuf", name) for name in dmabuf._MODULES}
    assert {name for _, name in seen} - {"errors"} == NAMES


def test_import_of_dmabuf_alone_loads_no_other_module_of_it() -> None:
    code = "import sys, dmabuf; print([name for name in sys.modules if name.startswith('dmabuf.')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


FOUND_FIRST = """
import importlib, os, sys

def forked(function):
    here, there = os.pipe()
    pid = os.fork()
    if not pid:
        function(there)
        os._exit(0)
    os.close(there)
    with open(here) as answer:
        told = answer.read()
    assert os.waitpid(pid, 0)[1] == 0
    return told

def tell_imports(to):
    import dmabuf
    for name in dmabuf.__all__:
        getattr(dmabuf, name)
    os.write(to, " ".join(name for name in sys.modules if name.partition(".")[0] not in ("dmabuf", "__main__")).encode())

def find(names):
    import dmabuf
    for name in names:
        found = getattr(dmabuf, name)
        assert getattr(dmabuf, name) is found and name in dir(dmabuf)
        print(name, type(found).__name__, flush=True)

if sys.argv[1] == "quick":
    for name in forked(tell_imports).split():
        importlib.import_module(name)
alone, groups = int(sys.argv[2]), sys.argv[3:]
for i, names in enumerate(groups):
    if i == alone:
        import dmabuf
        for needed in dmabuf._WITH_OBJECTS:
            importlib.import_module(needed)
    forked(lambda _: find(names.split()))
"""
ALL = [*sorted(NAMES), "errors"]


def test_each_public_name_is_found_first() -> None:
    """In a process that has imported nothing of dmabuf, and with the full budget nothing at all.

    With the quick one the names of a module share a process, which starts with what each of them would import before all else.
    """
    alone, others = [[name] for name in ALL], list[list[str]]()
    if budget() == "quick":
        alone = [list(names) for module, names in dmabuf._PLACES.items() if module.startswith(dmabuf._WITHOUT_OBJECTS)]
        others = [list(names) for names in dmabuf._PLACES.values() if list(names) not in alone]
        alone += [[name] for name in dmabuf._MODULES] + others[:1]
    command = [sys.executable, "-c", FOUND_FIRST, budget(), str(len(alone)), *map(" ".join, [*alone, *others])]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = dict(line.split() for line in ran.stdout.splitlines())
    assert found == {name: type(getattr(dmabuf, name)).__name__ for name in ALL}


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dmabuf' has no attribute 'alocate'"):
        getattr(dmabuf, "alocate")  # noqa: B009
