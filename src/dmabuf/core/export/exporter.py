"""``Exporter``: the base class of exporters in programs, whose ops are handed buffers and attachments as programs have them."""

from __future__ import annotations

from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.contract import ExporterOps
from dmabuf.core.dma_buf import DmaBuf


class Exporter(ExporterOps[DmaBuf, DmaBufAttachment]):
    """Base class of exporters: override what the exporter can do.

    ``dmabuf.core.contract`` says which locks are held, and what an exporter and the framework promise each other.
    """

    __slots__ = ()
