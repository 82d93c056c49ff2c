"""Why a device can't be used here, and who could change that. Each is looked at, not opened: opening may load a module."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

_USUAL = {"udmabuf": "kvm", "dri": "render"}  # which groups distributions give such nodes to; "video" for the rest


@dataclass(frozen=True)
class Node:
    """A device node. ``usable``: it is there, and this user may read and write it. ``detail``, ``remedy``: in words; "" none is needed."""

    usable: bool
    detail: str
    remedy: str = ""


def look(node: Path, gives: str, remedy: str) -> Node:
    """``gives``: what it is good for; ``remedy``: what would make it appear."""
    try:
        st = os.stat(node)
    except FileNotFoundError:
        return Node(False, f"no {node}: no {gives}", remedy)
    except OSError as e:
        return Node(False, f"{node}: {e.strerror}", "ask for access to its directory")
    owner = f"{stat.filemode(st.st_mode)} {user(st.st_uid)}:{group(st.st_gid)}"
    if os.access(node, os.R_OK | os.W_OK, effective_ids=True):
        return Node(True, f"{node} {owner}: {gives}")
    return Node(False, f"{node} {owner}: no permission", _permission(st, node))


def _permission(st: os.stat_result, node: Path) -> str:
    """The group that would help, if there is one that is not root's."""
    if st.st_gid and st.st_mode & 0o060 == 0o060:
        return f"usermod -aG {group(st.st_gid)} {user(os.geteuid())}, then log in again"
    helpful = next((found for part, found in _USUAL.items() if part in node.parts), "video")
    return f"as root: chgrp {helpful} {node} && chmod 660 {node} (a udev rule keeps it)"


def user(uid: int) -> str:
    """Its name, or its number in words."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group(gid: int) -> str:
    """Its name, or its number in words."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def why_not(node: Node) -> str | None:
    """One line for an error or a list: why it can't be used and what to do; None when it can."""
    return None if node.usable else f"{node.detail}; {node.remedy}"
