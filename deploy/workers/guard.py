"""Whether the cluster that was joined asks for a password, and who may read that."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from deploy.listening import is_local
from deploy.workers.head import code_of


def unguarded(address: str) -> str:
    """Return what to say of a cluster that others reach and that asks nobody for a token.

    Args:
        address: where its GCS listens, as ``host:port``; empty where this program is in none.

    Returns:
        Nothing where it is on this machine alone, or asks for a token.
    """
    host = address.rpartition(":")[0].strip("[]")
    if not host or is_local(host) or code_of(address) is not grpc.StatusCode.OK:
        return ""
    return (
        f"the cluster at {address} asks nobody for a token: who reaches it can run any program on "
        "it; start it with RAY_AUTH_MODE=token, or keep its network to yourself"
    )


def closed_token() -> str:
    """Take from other users of this machine the right to read this user's token.

    Ray writes it as any file, which most systems let everybody read. A file that
    `RAY_AUTH_TOKEN_PATH` names is its owner's business.

    Returns:
        What to say of it; nothing where others could not read it.
    """
    try:
        path = Path.home() / ".ray" / "auth_token"
        found = path.stat()
        if found.st_uid != os.getuid() or not found.st_mode & 0o077:
            return ""
        path.chmod(0o600)
    except (OSError, RuntimeError):  # no file, no home, or nothing can be changed there
        return ""
    return "other users of this machine could read ~/.ray/auth_token; now only you can"
