"""Which proxy a request to an endpoint goes through, by the environment's variables.

``http_proxy``, ``https_proxy`` and ``all_proxy`` name one, ``no_proxy`` the hosts that need none,
in either case. They are read here and not by httpx, which takes an address range for a URL and
fails on a proxy that it cannot speak to, even for hosts that need none.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Mapping

import httpx

from common.errors import ConfigError

_SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_of(url: httpx.URL, environment: Mapping[str, str] = os.environ) -> httpx.Proxy | None:
    """Return the proxy for an endpoint; None where there is none, and for this machine always.

    Raises:
        ConfigError: it cannot be used; names the variable, and never a password in it.
    """
    for variable in (f"{url.scheme}_proxy", "all_proxy"):
        name, value = _lookup(environment, variable)
        if value:
            break
    else:
        return None
    if _needs_none(url, _lookup(environment, "no_proxy")[1]):
        return None
    return _proxy(url, name, value if "://" in value else f"http://{value}")


def _lookup(environment: Mapping[str, str], variable: str) -> tuple[str, str]:
    """Return a variable's name as it is set, and its value; lower case wins."""
    for name in (variable, variable.upper()):
        if environment.get(name, "").strip():
            return name, environment[name].strip()
    return variable, ""


def _proxy(url: httpx.URL, variable: str, value: str) -> httpx.Proxy:
    where = f"reward endpoint '{url.scheme}://{url.host}': the proxy in {variable}"
    advice = "correct it, unset it, or name the endpoint's host in NO_PROXY"
    try:
        address = httpx.URL(value)
    except httpx.InvalidURL:
        raise ConfigError(f"{where} is not a URL; {advice}") from None
    if address.scheme not in _SCHEMES or not address.host:
        raise ConfigError(f"{where} is no URL of http, https or socks5; {advice}")
    if address.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(
            f"{where} speaks {address.scheme}, which needs a package: pip install 'httpx[socks]'; "
            f"or {advice}"
        )
    return httpx.Proxy(address)


def _needs_none(url: httpx.URL, no_proxy: str) -> bool:
    """Whether a host is this machine, or is named: itself, a domain above it, or a range."""
    host = url.host.lower().rstrip(".")
    address = _address(host)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    if address is not None and address.is_loopback:
        return True
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    return any(
        entry == "*" or _matches(entry.lower(), host, address, port)
        for entry in no_proxy.replace(",", " ").split()
    )


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _matches(entry: str, host: str, address: Address | None, port: int) -> bool:
    entry = entry.rpartition("://")[2]
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        return address is not None and address in network
    name, colon, number = entry.rpartition(":")
    if colon and number.isdigit():
        if int(number) != port:
            return False
        entry = name.strip("[]")
    entry = entry.removeprefix("*").strip(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
