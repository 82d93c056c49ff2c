"""Whether a device node can be used, and what to do if not. No node is opened, because opening may load a module."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A device node.

    ``usable``: it exists, and this user may read and write it. ``denied``: it exists, and this user may not. ``detail`` and ``remedy``:
    in words, ``remedy`` "" if none is needed.
    """

    usable: bool
    detail: str
    remedy: str = ""
    denied: bool = False


def examine(node: Path, gives: str, remedy: str) -> Node:
    """Return what is known of a node. ``gives``: what it makes; ``remedy``: what would make it appear."""
    try:
        st = os.stat(node)
    except FileNotFoundError:
        return Node(False, f"no {node}: no {gives}", remedy)
    except OSError as e:
        return Node(False, f"{node}: {e.strerror}", "ask for access to its directory")
    owner = f"{stat.filemode(st.st_mode)} {user(st.st_uid)}:{group(st.st_gid)}"
    if os.access(node, os.R_OK | os.W_OK, effective_ids=True):
        return Node(True, f"{node} {owner}: {gives}")
    return Node(False, f"{node} {owner}: no permission", _permission(st, node), denied=True)


def _permission(st: os.stat_result, node: Path) -> str:
    """Return how to get the rights: from the node's group, or from the group that distributions give such nodes to."""
    if st.st_gid and st.st_mode & 0o060 == 0o060:
        return _join(group(st.st_gid))
    helpful = "kvm" if node.name == "udmabuf" else "render" if node.name.startswith("renderD") else "video"
    give = f"as root: chgrp {helpful} {node} && chmod 660 {node} (a udev rule keeps it)"
    return give if _member(helpful) else f"{give}; {_join(helpful)}"


def _join(group: str) -> str:
    return f"usermod -aG {group} {user(os.geteuid())}, then log in again"


def _member(group: str) -> bool:
    try:
        return grp.getgrnam(group).gr_gid in (os.getegid(), *os.getgroups())
    except KeyError:
        return False


def user(uid: int) -> str:
    """Return a user's name, or the number in words."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group(gid: int) -> str:
    """Return a group's name, or the number in words."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def why_not(node: Node) -> str | None:
    """Return why a node can't be used and what to do, in one line; None if it can."""
    return None if node.usable else f"{node.detail}; {node.remedy}"
