"""This process as others of the domain see it: what they call it, and whether they reach its descriptors through /proc."""

from __future__ import annotations

import errno
import os
from typing import Final

from dmabuf.domain import lives, place
from dmabuf.domain.domain import Domain, every
from dmabuf.domain.local import Local
from dmabuf.errors import fail

FIRST_NAMESPACE: Final = 0xEFFFFFFC  # the inode of the PID namespace of the machine (PROC_PID_INIT_INO, include/linux/proc_ns.h)


# ---- labels ----


def label(text: str | bytes) -> None:
    """Name this process for ``dmabuf ls`` and for the messages of other processes, instead of by the kernel's name of it.

    Forked children inherit the label. An empty label is none.

    Args:
        text: At most 15 bytes, like the kernel's name of a process.

    Raises:
        InvalidError: The label is longer, or has a NUL (EINVAL).
        TypeError: The label is neither str nor bytes.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"label: a label is str or bytes, not {type(text).__name__}")
    raw = os.fsencode(text)
    if len(raw) > lives.LABEL_BYTES or b"\0" in raw:
        what = "the label has a NUL" if b"\0" in raw else f"the label has {len(raw)} bytes"
        remedy = f"use at most {lives.LABEL_BYTES} bytes, without a NUL"
        raise fail(errno.EINVAL, "label", repr(os.fsdecode(raw)), remedy, what=what)
    lives.labels[:] = [raw] if raw else []
    for domain in every():
        with domain.lock:  # a life that ends meanwhile leaves its slot to another process
            if domain.shm.life:
                lives.store_label(domain.shm)


# ---- who can reach this process ----


class _Reach:
    """Whether processes of the domain may not reach this process's descriptors through /proc. It is looked at once in each life."""

    def __init__(self, domain: Domain) -> None:
        self.life = domain.life
        self.barred = _is_barred(domain)


_REACH: Final[Local[_Reach]] = Local(_Reach)


def barred(domain: Domain) -> bool:
    """Return True if other processes of the domain may have no way to this process's descriptors in /proc.

    That is a process whose /proc/PID/fd belongs to root, because it changed its user (PR_GET_DUMPABLE(2const)). And it is a process in a
    PID namespace other than the machine's, in a domain whose directory was named on purpose: there processes of other containers are
    expected.
    """
    found = _REACH.of(domain)
    if found.life != domain.life:
        found = _REACH.renew(domain, found)
    return found.barred


def _is_barred(domain: Domain) -> bool:
    try:
        if os.stat("/proc/self/fd").st_uid != os.geteuid():
            return True
        if os.stat("/proc/self/ns/pid").st_ino == FIRST_NAMESPACE:
            return False
    except OSError:
        return False
    return domain.path is not None and domain.path not in place.usual_places()
