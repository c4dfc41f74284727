"""Whose files are trusted: those that nobody but this user and root could have written.

What is loaded as code must be such a file, in such a folder.
"""

import os
import stat

_ROOT = 0


def distrust(status: os.stat_result) -> str:
    """Why others could have written a file or folder; empty if they could not.

    The group of this process may write: it is the user's own where groups are private, and in a
    volume of Kubernetes (``fsGroup``).
    """
    if status.st_uid not in (os.geteuid(), _ROOT):
        return f"which belongs to user {status.st_uid}, not to this one or root"
    if status.st_mode & stat.S_IWOTH:
        return "to which every user may write; chmod o-w"
    if status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid():
        return f"to which group {status.st_gid} may write; chmod g-w"
    return ""
