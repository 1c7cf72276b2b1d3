"""Checks that the folder of the journals belongs to this user."""

from __future__ import annotations

import os
import shlex
import stat

#: Mode bits by which others than the owner and root can write.
OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotOurs(OSError):
    """A folder for journals that others can write to, or that others chose."""


def check_own_folder(folder: str) -> None:
    """Raise NotOurs unless the existing `folder` belongs to this user and nobody else but root can write to it.

    The default name in /tmp can be guessed. So anybody may have made it first, or have made a link to a folder where
    journals would replace this user's files.
    """
    user = os.geteuid()
    entry = os.lstat(folder)
    if stat.S_ISLNK(entry.st_mode) and entry.st_uid not in (user, 0):
        raise NotOurs(f"it is a link made by user {entry.st_uid}")
    information = os.stat(folder)
    if not stat.S_ISDIR(information.st_mode):
        raise NotOurs("it is not a folder")
    if information.st_uid != user:
        raise NotOurs(f"it belongs to user {information.st_uid}, and this is user {user}")
    if information.st_mode & OTHERS:
        mode = stat.S_IMODE(information.st_mode)
        raise NotOurs(f"others can write it (mode {mode:04o}); chmod go-w {shlex.quote(folder)}")
