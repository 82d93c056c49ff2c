"""``Importer``: the base class of importers in programs, whose ops are handed attachments as ``DmaBuf.attach`` returns them."""

from __future__ import annotations

from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.contract import ImporterOps


class Importer(ImporterOps[DmaBufAttachment]):
    """Base class of what makes an attachment dynamic.

    ``allow_peer2peer``: the importer copes with memory that has no pages, such as another device's.
    """

    __slots__ = ()
