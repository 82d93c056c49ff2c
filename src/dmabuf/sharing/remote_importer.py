"""``RemoteImporter``: the importer of an attachment that another process made. It is notified there, and waited for."""

from __future__ import annotations

import contextlib
import errno

from dmabuf.core.attach.attachment import DmaBufAttachment, resv_at
from dmabuf.core.attach.importer import Importer
from dmabuf.core.contract import RevocableImporter
from dmabuf.core.resv.lock import holding
from dmabuf.errors import DmaBufError
from dmabuf.sharing.client import Client, client_of
from dmabuf.sharing.lending import regain
from dmabuf.sharing.messages import Body, flag
from dmabuf.sharing.server import Session


class RemoteImporter(Importer, RevocableImporter[DmaBufAttachment]):
    """The proxy of an importer in a client. The client runs its ``move_notify``, and this process waits."""

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
            if e.errno != errno.ENODEV:  # it is dead, or about to be: its attachment ends with its session
                raise
        finally:  # after the calls that it made to this process meanwhile
            regain(resv, held, held.word, life)

    def revoke(self, attachment: DmaBufAttachment) -> None:
        if self.client is not None:  # it was notified of the move
            with contextlib.suppress(DmaBufError):  # it is dead, and so is its device
                self.client.call("revoked", self.body, operation="move")

    def close(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.leave(self)
