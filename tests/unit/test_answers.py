"""What the types of the C extension's dicts say is what it returns."""

import dmabuf
from dmabuf.answers import FenceInfo, RecordInfo
from dmabuf.core.buffer.handle import handle_of


def test_record_info_has_the_fields_of_its_type() -> None:
    with dmabuf.allocate(4096) as buf:
        assert handle_of(buf).shared.info().keys() == RecordInfo.__annotations__.keys()


def test_fence_info_has_the_fields_of_its_type() -> None:
    fence = dmabuf.Timeline("camera").fence()
    info = fence.shm.fence_info(fence.handle)
    assert info is not None
    assert info.keys() == FenceInfo.__annotations__.keys()
    fence.signal()
