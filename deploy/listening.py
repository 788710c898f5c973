"""Listening for browsers: at a port that is free, and under a name that others know."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import suppress
from typing import Final

from common.errors import ConfigError
from common.files import one_line

_TRIED: Final = 20
"""Ports that are tried, where none is asked for."""
_EVERYWHERE: Final = ("0.0.0.0", "::")


def listen(host: str, port: int | None, first: int) -> socket.socket:
    """Listen at a port, or at the first free one from `first` on.

    Raises:
        ConfigError: it cannot listen there, or something else does.
    """
    tried = [port] if port is not None else list(range(first, first + _TRIED))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in tried:
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"--host {host} --port {candidate}: cannot listen there ({one_line(error)})"
                ) from None
    which = f"port {port}" if port is not None else f"ports {tried[0]} to {tried[-1]}"
    raise ConfigError(f"{which} of {host} in use; give another one with --port")


def address_of(host: str, port: int) -> str:
    """Return the address to open, for whoever listens at a host; without a path."""
    named = _own_name() if host in _EVERYWHERE else host
    return f"http://[{named}]:{port}/" if ":" in named else f"http://{named}:{port}/"


def is_local(host: str) -> bool:
    """Whether this name is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_name() -> str:
    """Return a name that other machines may know this one by: what means all addresses is none."""
    name = socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    return "127.0.0.1"
