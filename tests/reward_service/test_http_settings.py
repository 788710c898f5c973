"""What the HTTP scorer refuses before it asks, and how it keeps its token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.reward_service.endpoint import DOWN, Endpoint, Reply, always, fine
from tests.reward_service.samples import requests, scorer


@pytest.mark.parametrize("stored", ["s3cret-T0ken", "s3cret-T0ken\n"])
@pytest.mark.parametrize("failure", [Reply(status=401), DOWN, Reply(hang_up=True)])
def test_the_token_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: str, failure: Reply
) -> None:
    monkeypatch.setenv("TALIPOT_TEST_TOKEN", stored)
    file = tmp_path / "dead.jsonl"
    with Endpoint(always(failure)) as endpoint:
        made = scorer(
            endpoint.url, token_env="TALIPOT_TEST_TOKEN", dead_letter_path=file, max_retries=1
        )
        results = made.score(requests(1))
    assert {call.authorization for call in endpoint.calls} == {"Bearer s3cret-T0ken"}
    assert results[0].score is None
    for shown in (repr(results), repr(made.settings), file.read_text(encoding="utf8")):
        assert "s3cret" not in shown


def test_no_token_is_sent_when_none_is_named() -> None:
    with Endpoint(fine) as endpoint:
        scorer(endpoint.url).score(requests(1))
    assert endpoint.calls[0].authorization is None


def test_the_token_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALIPOT_TEST_TOKEN", "s3cret")
    with Endpoint(fine) as other:
        moved = Reply(status=307, headers={"Location": other.url})
        with Endpoint(always(moved)) as endpoint:
            made = scorer(endpoint.url, token_env="TALIPOT_TEST_TOKEN")
            assert [r.error for r in made.score(requests(1))] == ["HTTP 307"]
        assert other.calls == []


@pytest.mark.parametrize("stored", [None, "", " \n"])
def test_a_token_variable_without_a_token_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, stored: str | None
) -> None:
    monkeypatch.delenv("TALIPOT_TEST_TOKEN", raising=False)
    if stored is not None:
        monkeypatch.setenv("TALIPOT_TEST_TOKEN", stored)
    where = socket.gethostname()
    with pytest.raises(
        ConfigError, match=f"TALIPOT_TEST_TOKEN is not set on host {where}; workers"
    ):
        scorer("http://localhost/score", token_env="TALIPOT_TEST_TOKEN")


@pytest.mark.parametrize("stored", ["s3cret\nT0ken", "s3crét", "s3cret\x07"])
def test_a_token_that_no_header_can_carry_is_a_config_error_without_it(
    monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    monkeypatch.setenv("TALIPOT_TEST_TOKEN", stored)
    with pytest.raises(ConfigError, match="TALIPOT_TEST_TOKEN") as caught:
        scorer("http://localhost/score", token_env="TALIPOT_TEST_TOKEN")
    assert "s3cr" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "score",
        "ftp://host/score",
        "http://",
        "localhost:80/score",
        "http://h:abc/",
        "http://h\n",
    ],
)
def test_a_bad_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"http\(s\)://host/path") as caught:
        scorer(url)
    assert "\n" not in str(caught.value)


def test_a_dead_letter_file_that_cannot_be_is_a_config_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "dead.jsonl"
    with pytest.raises(ConfigError, match=r"dead\.jsonl"):
        scorer("http://localhost/score", dead_letter_path=path)
