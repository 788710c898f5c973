"""The labelling page's server: who is let in, what is sent, what is stored; no browser."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path

import httpx
import pytest

from common.data.records import Comparison
from common.errors import DataError
from common.run_folder import RunFolder
from deploy.feedback.access import Access
from deploy.feedback.desk import Desk
from deploy.feedback.propose import known_pairs
from deploy.feedback.rounds import close_round
from deploy.feedback.store import Store
from tests.deploy.feedback.rounds import invited, plain, round_in, served


def field(page: str, name: str) -> str:
    """A hidden field's value."""
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page
    return found[1]


def sign_in(client: httpx.Client, link: str) -> None:
    token = link.partition("token=")[2]
    page = client.get(link)
    assert page.status_code == 200 and "Begin" in page.text
    entered = client.post("/enter", data={"token": token})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")


def test_a_pair_is_answered_without_a_script(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(3), overlap_share=0.0, repeat_share=0.0)
    with served(tmp_path, made) as address, httpx.Client(base_url=address) as client:
        sign_in(client, invited(tmp_path, address, "ann"))
        for step in ("0", "3", "skip"):
            page = client.get("/").text
            said = {name: field(page, name) for name in ("form", "key")}
            form = {**said, "step": step, "skip": "broken", "why": "since", "flagged": "on"}
            assert client.post("/answer", data=form).status_code == 303
        assert "Nothing is left" in client.get("/").text
        page = client.get("/").text
        form = {name: field(page, name) for name in ("form", "last")}
        for _ in range(2):
            assert client.post("/undo", data=form).status_code == 303, "twice is once"
        assert "2 answered" in client.get("/").text
    store = Store(made.answers)
    first, second = store.standing()
    assert (abs(first.preference or 0), second.preference) == (3, 0)
    assert (first.why, first.flagged, first.labeler) == ("since", True, "ann")
    assert [row["kind"] for row in store.history()] == ["answer", "answer", "skip", "undo"]
    assert store.history()[2]["why"] == "broken: since"
    store.close()


def test_only_who_was_invited_is_let_in(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(2))
    with served(tmp_path, made) as address:
        link = invited(tmp_path, address, "ann")
        token = link.partition("token=")[2]
        with httpx.Client(base_url=address) as stranger:
            assert stranger.get("/").status_code == 403
            assert stranger.get("/enter?token=wrong").status_code == 403
            assert stranger.post("/enter", data={"token": "wrong"}).status_code == 403
            assert stranger.post("/answer", data={"step": "1"}).status_code == 403
        with httpx.Client(base_url=address) as client, httpx.Client(base_url=address) as second:
            assert client.get(link).status_code == 200
            assert client.get(link).status_code == 200, "a program that looks uses nothing up"
            entered = client.post("/enter", data={"token": token})
            cookie = entered.headers["set-cookie"]
            assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Secure" not in cookie
            assert client.get("/").status_code == 200
            assert client.get(link).headers["location"] == "/", "who is signed in comes in"
            assert second.get(link).status_code == 403, "used in another browser"
            assert second.post("/enter", data={"token": token}).status_code == 403

            page = client.get("/").text
            form = {"form": field(page, "form"), "key": field(page, "key"), "step": "0"}
            for site in ("cross-site", "same-site"):
                other = client.post("/answer", data=form, headers={"Sec-Fetch-Site": site})
                assert other.status_code == 403
            assert client.post("/answer", data={**form, "form": "guess"}).status_code == 403
            assert client.post("/answer", data=form).status_code == 303
            assert client.post("/answer", data=form).status_code == 303, "sent twice"

            access = Access(RunFolder(tmp_path).labelers)
            later = access.invite("ann")
            assert [who.name for who in access.all()] == ["ann"]
            assert access.revoke("ann") >= 2
            access.close()
            assert client.get("/").status_code == 403
            assert second.post("/enter", data={"token": later}).status_code == 403
    store = Store(made.answers)
    assert len(store.standing()) == 1
    store.close()
    stored = RunFolder(tmp_path).labelers.read_bytes()
    assert token.encode() not in stored and later.encode() not in stored


def test_nothing_is_sent_that_could_sway(tmp_path: Path) -> None:
    gold = [plain(9)[8]]
    known = [type(pair)(**{**_fields(pair), "gold": 3, "uid": ""}) for pair in gold]
    made = round_in(tmp_path, plain(6), known, overlap=2, overlap_share=1.0)
    with served(tmp_path, made) as address:
        seen = []
        for name in ("ann", "bob"):
            with httpx.Client(base_url=address) as client:
                sign_in(client, invited(tmp_path, address, name))
                while "Nothing is left" not in (page := client.get("/")).text:
                    form = {n: field(page.text, n) for n in ("form", "key")}
                    shown = page.text + str(page.headers)
                    for drawn in form.values():  # at random, so it may hold any word
                        shown = shown.replace(drawn, "")
                    seen.append(shown)
                    client.post("/answer", data={**form, "step": "1", "why": f"{name} thinks"})
                policy = page.headers["Content-Security-Policy"]
    assert len(seen) == 14
    for word in ("secret", "0.123", "0.654", "gold", "policy_", "thinks", "sft"):
        assert not any(word in text for text in seen), word
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def _fields(pair: object) -> dict[str, object]:
    return {name: getattr(pair, name) for name in pair.__slots__}  # type: ignore[attr-defined]


def test_guidelines_are_read_once(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(2), guidelines="Prefer what is <true>.")
    with (
        served(tmp_path, made) as address,
        httpx.Client(base_url=address) as client,
    ):
        sign_in(client, invited(tmp_path, address, "ann"))
        page = client.get("/").text
        assert "Prefer what is &lt;true&gt;." in page and "Which response" not in page
        client.post("/read", data={"form": field(page, "form")})
        assert "Which response is better" in client.get("/").text


def test_practice_comes_first_and_tells_its_answers(tmp_path: Path) -> None:
    known = [
        Comparison(prompt="Practise <b>?", chosen=f"good {i}", rejected=f"bad {i}") for i in (1, 2)
    ]
    begin = known_pairs(known, 0, "practice")
    made = round_in(tmp_path, plain(2), practice=begin, repeat_share=0.0)
    with served(tmp_path, made) as address, httpx.Client(base_url=address) as client:
        sign_in(client, invited(tmp_path, address, "ann"))
        for number in (1, 2):
            page = client.get("/").text
            assert f"practice {number} of 2" in page and "Practise &lt;b&gt;?" in page
            assert "The better one" not in page
            form = {n: field(page, n) for n in ("form", "number")}
            assert client.post("/practice", data={**form, "step": "8"}).status_code == 303
            said = client.post("/practice", data={**form, "step": "0"}).text
            good_is_left = page.index("good") < page.index("bad")
            side = "left" if good_is_left else "right"
            assert f"The better one is the {side} response" in said
            assert ("That is right" in said) == good_is_left
            again = client.post("/practice", data={**form, "step": "0"})
            assert again.status_code == 303, "sent twice, it is answered once"
        assert "Which response is better" in client.get("/").text
    store = Store(made.answers)
    assert store.standing() == []
    store.close()


def test_a_closed_round_asks_and_takes_nothing(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(2), repeat_share=0.0, guidelines="Read.")
    with served(tmp_path, made) as address, httpx.Client(base_url=address) as client:
        sign_in(client, invited(tmp_path, address, "ann"))
        close_round(made)
        assert "This round is closed" in client.get("/").text, "nothing is to be read any more"
        close_round(made, reopen=True)
        client.post("/read", data={"form": field(client.get("/").text, "form")})
        page = client.get("/").text
        form = {n: field(page, n) for n in ("form", "key")}
        close_round(made)
        close_round(made)
        late = client.post("/answer", data={**form, "step": "1"})
        assert late.status_code == 409 and "this round is closed" in late.text
        assert "This round is closed" in client.get("/").text
        close_round(made, reopen=True)
        assert client.post("/answer", data={**form, "step": "1"}).status_code == 303
        time.sleep(0.2)  # counts are of a moment ago
        page = client.get("/").text
        assert "Which response is better" in page and "50 %" in page


def test_who_comes_too_late_is_told(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(1))
    with served(tmp_path, made) as address, httpx.Client(base_url=address) as client:
        sign_in(client, invited(tmp_path, address, "ann"))
        page = client.get("/").text
        form = {n: field(page, n) for n in ("form", "key")}
        late = client.post(
            "/answer", data={**form, "key": "another", "step": "2", "why": "my <reason>"}
        )
        assert late.status_code == 409 and "others have answered" in late.text
        assert "my &lt;reason&gt;" in late.text, "what was written is still there"
        for step in ("", "9", "1" * 5000, "٣"):
            wrong = client.post("/answer", data={**form, "step": step, "skip": "broken"})
            assert wrong.status_code == 409 and "choose one" in wrong.text


def test_behind_a_proxy_that_ends_tls(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(1))
    seen = {"Origin": "https://label.example", "X-Forwarded-Proto": "https"}
    with served(tmp_path, made) as address, httpx.Client(base_url=address, headers=seen) as client:
        token = invited(tmp_path, address, "ann").partition("token=")[2]
        entered = client.post("/enter", data={"token": token})
        assert "Secure" in entered.headers["set-cookie"]
        secret = entered.headers["set-cookie"].partition(";")[0]
        page = client.get("/", headers={"Cookie": secret}).text
        form = {"form": field(page, "form"), "key": field(page, "key"), "step": "3"}
        assert client.post("/answer", data=form, headers={"Cookie": secret}).status_code == 303


def test_a_damaged_file_is_said_and_nothing_is_acknowledged(tmp_path: Path) -> None:
    made = round_in(tmp_path, plain(2))
    said: list[str] = []
    with (
        served(tmp_path, made, complain=said.append) as address,
        httpx.Client(base_url=address) as client,
    ):
        sign_in(client, invited(tmp_path, address, "ann"))
        page = client.get("/").text
        form = {"form": field(page, "form"), "key": field(page, "key"), "step": "3"}
        with sqlite3.connect(made.answers) as db:
            db.execute("DROP TABLE due")
        db.close()
        answer = client.post("/answer", data=form)
        assert answer.status_code == 503 and "NOT stored" in answer.text
        assert "default-src" in answer.headers["Content-Security-Policy"]
    (text,) = said
    assert "answers.sqlite: damaged" in text
    made.answers.unlink()
    with pytest.raises(DataError, match="is not there"):
        Desk(made, 60.0)
    Store(made.answers, make=True).close()
    with pytest.raises(DataError, match="of other pairs"):
        Desk(made, 60.0)


@pytest.mark.parametrize("path", ["/page/none.js", "/page/pair.html.j2", "/page/..%2fserver.py"])
def test_only_its_own_files_are_handed_out(tmp_path: Path, path: str) -> None:
    made = round_in(tmp_path, plain(1))
    with served(tmp_path, made) as address:
        assert httpx.get(address.rstrip("/") + path).status_code == 404
        assert httpx.get(address + "page/label.css").status_code == 200
