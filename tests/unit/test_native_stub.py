"""What the stub of the C extension says of the dicts that it returns is what it returns."""

import ast
from pathlib import Path

import dmabuf
from dmabuf import _native
from dmabuf.core.buffer.handle import handle_of

STUB = Path(_native.__file__).with_name("_native.pyi")


def fields(name: str) -> set[str]:
    """Return the names of the fields of a TypedDict of the stub."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


def test_record_info_has_the_fields_of_the_stub() -> None:
    with dmabuf.allocate(4096) as buf:
        assert handle_of(buf).shared.info().keys() == fields("RecordInfo")


def test_fence_info_has_the_fields_of_the_stub() -> None:
    fence = dmabuf.Timeline("camera").fence()
    info = fence.shm.fence_info(fence.handle)
    assert info is not None
    assert info.keys() == fields("FenceInfo")
    fence.signal()
