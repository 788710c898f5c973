"""The environment's proxies: used where meant, never for this machine, named where broken."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import pytest

from common.errors import ConfigError
from reward_service.proxies import proxy_of
from tests.reward_service.endpoint import Endpoint, fine
from tests.reward_service.samples import requests, scorer

PROXY = "http://proxy:3128"


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("http://host/x", {}, None),
        ("http://host/x", {"http_proxy": PROXY}, PROXY),
        ("http://host/x", {"HTTP_PROXY": "proxy:3128"}, PROXY),
        ("http://host/x", {"HTTP_PROXY": "http://other:1", "http_proxy": PROXY}, PROXY),
        ("https://host/x", {"http_proxy": PROXY}, None),
        ("https://host/x", {"ALL_PROXY": PROXY}, PROXY),
        ("https://host/x", {"ALL_PROXY": "http://other:1", "https_proxy": PROXY}, PROXY),
        ("http://host/x", {"http_proxy": " "}, None),
    ],
)
def test_which_proxy(url: str, environment: Mapping[str, str], expected: str | None) -> None:
    found = proxy_of(httpx.URL(url), environment)
    assert (None if found is None else str(found.url)) == expected


@pytest.mark.parametrize(
    ("host", "no_proxy", "needs_none"),
    [
        ("127.0.0.1", "", True),
        ("127.1.2.3", "", True),
        ("[::1]", "", True),
        ("localhost", "", True),
        ("api.localhost", "", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "192.168.0.0/16,10.1.2.3", True),
        ("[fd00::5]", "fd00::/8", True),
        ("[fe80::5]", "fd00::/8 , [fe80::]/10", False),
        ("host", "*", True),
        ("a.example.com", "example.com", True),
        ("a.example.com", ".example.com", True),
        ("a.example.com", "*.example.com", True),
        ("example.com", ".example.com", True),
        ("notexample.com", "example.com", False),
        ("A.Example.COM", "b, EXAMPLE.com", True),
        ("host", "host:80", True),
        ("host", "host:8080", False),
        ("host:8080", "host:8080", True),
        ("host", "10.0.0.0/99, :, ,.", False),
    ],
)
def test_which_hosts_need_none(host: str, no_proxy: str, needs_none: bool) -> None:
    environment = {"http_proxy": PROXY, "NO_PROXY": no_proxy}
    assert (proxy_of(httpx.URL(f"http://{host}/x"), environment) is None) == needs_none


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ALL_PROXY", "socks5://me:s3cret@proxy:1080", r"httpx\[socks\]"),
        ("all_proxy", "socks5h://me:s3cret@proxy:1080", r"httpx\[socks\]"),
        ("HTTP_PROXY", "ftp://me:s3cret@proxy", "no URL of http"),
        ("http_proxy", "http://me:s3cret@proxy:port", "not a URL"),
    ],
)
def test_a_proxy_that_cannot_be_used(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=says) as refused:
        scorer("http://example.invalid/score")
    assert f"the proxy in {variable}" in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_this_machine_is_asked_directly_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,fe80::/10")
    with Endpoint(fine) as endpoint:
        results = scorer(endpoint.url).score(requests(2))
    assert [r.error for r in results] == [None, None]


def test_a_proxy_is_asked_for_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    with Endpoint(fine) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        results = scorer("http://example.invalid/score").score(requests(1))
    assert [r.error for r in results] == [None]


def test_certificates_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        scorer("https://example.invalid/score")
