"""``RemoteImporter``: the importer of an attachment that another process made. It is notified there, and waited for."""

from __future__ import annotations

import contextlib
import errno

from dmabuf.core.attach.attachment import DmaBufAttachment, resv_at
from dmabuf.core.contract import Attachment, RevocableImporter
from dmabuf.core.resv.lock import holding
from dmabuf.errors import DmaBufError
from dmabuf.sharing.client import Client, client_of
from dmabuf.sharing.lending import regain
from dmabuf.sharing.messages import Body, flag
from dmabuf.sharing.server import Session


class RemoteImporter(RevocableImporter):
    """An importer in the process that asked for the attachment; it is told there, and waited for."""

    def __init__(self, session: Session, body: Body) -> None:
        self.session, self.body = session, body
        self.allow_peer2peer = flag(body, "peer2peer")
        self.client: Client | None = None

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        if self.client is None:
            self.client = client_of(self.session.domain, self.session.life, self)
        resv = resv_at(attachment)
        held, life = holding(resv), self.session.domain.shm.life
        try:
            self.client.call("moved", {**self.body, "holder": held.word}, operation="move_notify", locked=True)
        except DmaBufError as e:
            if e.errno != errno.ENODEV:  # dead, or about to be: its attachment goes with its session
                raise
        finally:  # what it asked of this process in it ends first
            regain(resv, held, held.word, life)

    def revoke(self, attachment: Attachment) -> None:
        if self.client is not None:  # it was told of the move
            with contextlib.suppress(DmaBufError):  # dead: so is its device
                self.client.call("revoked", self.body, operation="move")

    def close(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.leave(self)
