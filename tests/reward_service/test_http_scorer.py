from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from reward_service.http_scorer import HttpScorer
from reward_service.http_settings import HttpScorerSettings
from reward_service.samples import Sample
from tests.reward_service.endpoint import DOWN, Endpoint, Reply, Rows, always, fine, first, scores
from tests.reward_service.samples import requests, scorer


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/score"


# ------------------------------------------------------------------ all is well


def test_the_endpoint_gets_what_was_agreed_in_batches() -> None:
    asked = [
        Sample(rollout_id="r0", prompt='ä "q"\n', response="7"),
        *requests(5)[1:],
    ]
    with Endpoint(fine) as endpoint:
        results = scorer(endpoint.url, batch_size=2, max_concurrency=1).score(asked)
    assert [call.ids for call in endpoint.calls] == [["r0", "r1"], ["r2", "r3"], ["r4"]]
    assert endpoint.calls[0].body == {
        "requests": [
            {"rollout_id": "r0", "prompt": 'ä "q"\n', "response": "7"},
            {"rollout_id": "r1", "prompt": "ask 1", "response": "1"},
        ]
    }
    assert [r.score for r in results] == [7.0, 1.0, 2.0, 3.0, 4.0]


def test_results_keep_the_order_of_requests_though_answers_do_not() -> None:
    def behave(number: int, rows: Rows) -> Reply:
        body = scores([(r["rollout_id"], float(r["response"])) for r in reversed(rows)]).body
        return Reply(body=body, silent_s=0.1 if rows[0]["rollout_id"] == "r0" else 0.0)

    with Endpoint(behave) as endpoint:
        made = scorer(endpoint.url, batch_size=3, max_concurrency=4)
        results = made.score(requests(12))
    assert [r.rollout_id for r in results] == [f"r{i}" for i in range(12)]
    assert [r.score for r in results] == [float(i) for i in range(12)]
    assert made.stats() == {"requests": 4}


def test_nothing_to_score_is_no_request() -> None:
    with Endpoint(fine) as endpoint:
        assert scorer(endpoint.url).score([]) == []
    assert endpoint.calls == []


@pytest.mark.parametrize(("cap", "batches"), [(1, 4), (3, 12), (120, 120)])
def test_requests_under_way_reach_the_cap_and_never_pass_it(cap: int, batches: int) -> None:
    together = threading.Barrier(cap)

    def behave(number: int, rows: Rows) -> Reply:
        together.wait(timeout=20)  # Answers only once as many as allowed have arrived.
        return fine(number, rows)

    with Endpoint(behave) as endpoint:
        made = scorer(endpoint.url, batch_size=1, max_concurrency=cap)
        results = made.score(requests(batches))
    assert [r.score for r in results] == [float(i) for i in range(batches)]
    assert endpoint.peak == cap
    assert made.stats() == {"requests": batches}


def test_a_closed_scorer_sends_nothing() -> None:
    with Endpoint(fine) as endpoint:
        made = scorer(endpoint.url)
        made.close()
        with pytest.raises(RuntimeError, match="closed"):
            made.score(requests(1))
    assert endpoint.calls == []


# ------------------------------------------------------------------ failures that pass


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(DOWN, id="500"),
        pytest.param(Reply(status=503), id="503"),
        pytest.param(Reply(status=408), id="408"),
        pytest.param(Reply(status=429), id="429"),
        pytest.param(Reply(hang_up=True), id="hang up"),
        pytest.param(Reply(body=b'{"scores": [', missing=50), id="torn"),
        pytest.param(Reply(body=b"plain", headers={"Content-Encoding": "gzip"}), id="not gzip"),
    ],
)
def test_a_failure_that_passes_is_retried(failure: Reply) -> None:
    with Endpoint(first(failure, failure)) as endpoint:
        made = scorer(endpoint.url)
        results = made.score(requests(2))
    assert [(r.score, r.error) for r in results] == [(0.0, None), (1.0, None)]
    assert made.stats() == {"requests": 3, "failures": 2, "retries": 2}
    assert [call.ids for call in endpoint.calls] == [["r0", "r1"]] * 3


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        pytest.param(b"<html>busy</html>", "the answer is not", id="no JSON"),
        pytest.param(b"\xff\xfe\xff", "the answer is not", id="no text"),
        pytest.param(b"[" * 100_000, "the answer is not", id="deep"),
        pytest.param(b"[1, 2]", "the answer is not", id="a list"),
        pytest.param(b'{"scores": null}', "the answer is not", id="null"),
        pytest.param(b'{"scores": [{"rollout_id": "r0"}]}', "the answer is not", id="no score"),
        pytest.param(scores([("r0", None), ("r1", 1)]).body, "the answer is not", id="score null"),
        pytest.param(scores([(["r0"], 1), ("r1", 1)]).body, "the answer is not", id="id a list"),
        pytest.param(scores([("r0", 1), ("r1", 10**400)]).body, "the answer is not", id="huge"),
        pytest.param(scores([("r0", 1), ("r1", float("nan"))]).body, "r1 is nan", id="NaN"),
        pytest.param(scores([("r0", float("-inf")), ("r1", 1)]).body, "r0 is -inf", id="-inf"),
        pytest.param(scores([("r0", 1), ("r0", 1), ("r1", 1)]).body, "twice", id="doubled"),
        pytest.param(b"<html>busy</html>", "no JSON but b'<html>busy</html>'", id="what it is"),
        pytest.param(scores([("r0", "1"), ("r1", 1)]).body, 'of r0 is "1"', id="score a text"),
        pytest.param(b'{"scores": [0.5, 1]}', "an entry is 0.5", id="bare numbers"),
        pytest.param(scores([("r0", 1)]).body, "asked for: r1", id="missing"),
        pytest.param(scores([]).body, "asked for: r0", id="none"),
        pytest.param(scores([("r0", 1), ("x9", 1)]).body, "asked for: r1", id="wrong"),
        pytest.param(
            scores([("r0", 1), ("r1", 1), ("x9", 1)]).body, "asked for: x9", id="one more"
        ),
        pytest.param(
            scores([("r0", 1), ("r1", 1), (7, 1), ("x9", 1)]).body, "asked for: ", id="mixed ids"
        ),
    ],
)
def test_an_answer_that_was_not_agreed_is_a_failed_try(answer: bytes, named: str) -> None:
    with Endpoint(first(Reply(body=answer))) as endpoint:
        made = scorer(endpoint.url)
        assert [r.score for r in made.score(requests(2))] == [0.0, 1.0]
    assert made.stats() == {"requests": 2, "failures": 1, "retries": 1}
    with Endpoint(always(Reply(body=answer))) as endpoint:
        results = scorer(endpoint.url, max_retries=1).score(requests(2))
    assert [r.score for r in results] == [None, None]
    assert named in str(results[0].error)


def test_a_silent_endpoint_is_left_after_the_timeout() -> None:
    with Endpoint(first(Reply(silent_s=60))) as endpoint:
        begin = time.monotonic()
        made = scorer(endpoint.url, timeout_s=0.4)
        results = made.score(requests(2))
        assert time.monotonic() - begin < 20
    assert [r.score for r in results] == [0.0, 1.0]
    assert made.stats()["retries"] >= 1


def test_the_timeout_is_waited_for() -> None:
    with Endpoint(always(Reply(silent_s=60))) as endpoint:
        begin = time.monotonic()
        (result,) = scorer(endpoint.url, timeout_s=0.4, max_retries=0).score(requests(1))
        assert 0.4 <= time.monotonic() - begin < 20
    assert result.error == "no whole answer within 0.4 s"


def test_the_timeout_holds_for_the_whole_answer_not_for_each_byte() -> None:
    drip = Reply(body=fine(0, [{"rollout_id": "r0", "response": "0"}]).body, drip_s=0.1)
    with Endpoint(always(drip)) as endpoint:
        begin = time.monotonic()
        (result,) = scorer(endpoint.url, timeout_s=0.4, max_retries=0).score(requests(1))
        assert time.monotonic() - begin < 3, "the whole answer takes four seconds"
    assert result.score is None
    assert result.error == "no whole answer within 0.4 s"


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_the_timeout_holds_before_the_answer_begins(said: bytes) -> None:
    """A header that never ends, and promises to go on that never do."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with suppress(OSError), listening.accept()[0] as connection:
                while True:
                    connection.sendall(said)
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        begin = time.monotonic()
        (result,) = scorer(url, timeout_s=0.4, max_retries=0).score(requests(1))
        assert time.monotonic() - begin < 3
    assert result.error == "no whole answer within 0.4 s"


# ------------------------------------------------------------------ how long it waits


def test_retry_after_is_obeyed() -> None:
    busy = Reply(status=429, headers={"Retry-After": "0.3"})
    with Endpoint(first(busy)) as endpoint:
        (result,) = scorer(endpoint.url, max_backoff_s=5.0).score(requests(1))
    assert result.score == 0.0
    assert endpoint.gaps[0] >= 0.3


@pytest.mark.parametrize("asked", ["3600", "inf", "nan", "-5", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_retry_after_never_asks_for_more_than_the_longest_backoff(asked: str) -> None:
    with Endpoint(first(Reply(status=503, headers={"Retry-After": asked}))) as endpoint:
        begin = time.monotonic()
        (result,) = scorer(endpoint.url, max_backoff_s=0.05).score(requests(1))
        assert time.monotonic() - begin < 5
    assert result.score == 0.0


def test_backoff_doubles_with_full_jitter_up_to_its_ceiling() -> None:
    drawn = random.Random(5)
    waits = [drawn.uniform(0.0, ceiling) for ceiling in (0.1, 0.2, 0.3, 0.3)]
    with Endpoint(first(DOWN, DOWN, DOWN, DOWN)) as endpoint:
        settings = HttpScorerSettings(
            url=endpoint.url, backoff_s=0.1, max_backoff_s=0.3, open_after=99
        )
        HttpScorer(settings, seed=5).score(requests(1))
    assert all(gap >= wait for gap, wait in zip(endpoint.gaps, waits, strict=True))
    assert sum(endpoint.gaps) < sum(waits) + 2


def test_retries_without_end_do_not_overflow_the_backoff() -> None:
    made = scorer(closed_port(), max_retries=1100, max_backoff_s=0.0)
    (result,) = made.score(requests(1))
    assert result.score is None
    assert made.stats()["requests"] == 1101


# ------------------------------------------------------------------ failures that stay


@pytest.mark.parametrize("status", [400, 401, 404, 422, 204, 302])
def test_a_refusal_is_not_retried(status: int) -> None:
    with Endpoint(always(Reply(status=status))) as endpoint:
        made = scorer(endpoint.url)
        results = made.score(requests(2))
    assert [(r.rollout_id, r.score, r.error) for r in results] == [
        ("r0", None, f"HTTP {status}"),
        ("r1", None, f"HTTP {status}"),
    ]
    assert made.stats() == {"requests": 1, "failures": 1, "dead_letters": 2}


def test_an_answer_that_is_too_large_is_refused() -> None:
    with Endpoint(always(Reply(body=b" " * 200_000))) as endpoint:
        made = scorer(endpoint.url, max_response_bytes=1000)
        (result,) = made.score(requests(1))
    assert result.error == "answer over 1000 bytes"
    assert len(endpoint.calls) == 1


def test_an_endpoint_that_stays_down_costs_dead_letters_and_no_exception(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "dead.jsonl"
    made = scorer(closed_port(), batch_size=2, max_retries=2, dead_letter_path=file)
    results = made.score(requests(3))
    assert [(r.rollout_id, r.score) for r in results] == [("r0", None), ("r1", None), ("r2", None)]
    assert all("ConnectError" in str(r.error) for r in results)
    assert made.stats() == {"requests": 6, "failures": 6, "retries": 4, "dead_letters": 3}
    made.score(requests(1))
    lines = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    assert sorted(line["rollout_id"] for line in lines[:3]) == ["r0", "r1", "r2"]
    assert lines[3] == {
        "rollout_id": "r0",
        "prompt": "ask 0",
        "response": "0",
        "error": results[0].error,
    }
    assert made.stats()["dead_letters"] == len(lines) == 4


def test_one_poisoned_batch_leaves_the_others_alone() -> None:
    def behave(number: int, rows: Rows) -> Reply:
        poisoned = any(row["rollout_id"] == "r3" for row in rows)
        return Reply(status=400) if poisoned else fine(number, rows)

    with Endpoint(behave) as endpoint:
        results = scorer(endpoint.url, batch_size=2).score(requests(7))
    assert [r.score for r in results] == [0.0, 1.0, None, None, 4.0, 5.0, 6.0]
    assert [r.rollout_id for r in results] == [f"r{i}" for i in range(7)]


def test_a_batch_that_is_too_old_is_given_up() -> None:
    with Endpoint(always(Reply(status=500, silent_s=0.2))) as endpoint:
        made = scorer(endpoint.url, give_up_after_s=0.1, max_retries=100)
        (result,) = made.score(requests(1))
    assert result.error == "HTTP 500"
    assert len(endpoint.calls) == 1


# ------------------------------------------------------------------ circuit breaker


def test_the_circuit_opens_and_waits_for_its_cool_down() -> None:
    with Endpoint(first(DOWN, DOWN)) as endpoint:
        made = scorer(endpoint.url, open_after=2, cool_down_s=0.8)
        (result,) = made.score(requests(1))
        assert result.score == 0.0
        begin = time.monotonic()
        made.score(requests(4))
        assert time.monotonic() - begin < 0.8, "one success closes it"
    assert endpoint.gaps[1] >= 0.8
    assert made.stats()["circuit_opened"] == 1


def test_failures_that_are_not_in_a_row_leave_the_circuit_closed() -> None:
    def behave(number: int, rows: Rows) -> Reply:
        return fine(number, rows) if number % 2 else DOWN

    with Endpoint(behave) as endpoint:
        made = scorer(endpoint.url, open_after=2, cool_down_s=60, batch_size=1, max_concurrency=1)
        made.score(requests(5))
    assert made.stats() == {"requests": 10, "failures": 5, "retries": 5}


def test_half_open_lets_one_request_try_for_all() -> None:
    together = threading.Barrier(4)
    wait = Reply(status=503, headers={"Retry-After": "0.6"})

    def behave(number: int, rows: Rows) -> Reply:
        if number < 4:
            together.wait(timeout=20)
        return wait if number < 6 else fine(number, rows)

    with Endpoint(behave) as endpoint:
        made = scorer(
            endpoint.url,
            batch_size=1,
            max_concurrency=4,
            open_after=4,
            cool_down_s=0.8,
            max_backoff_s=0.6,
        )
        results = made.score(requests(4))
    assert [r.score for r in results] == [0.0, 1.0, 2.0, 3.0]
    # Four fail together and open it; then one try in each cool-down, until one succeeds.
    assert all(gap >= 0.8 for gap in endpoint.gaps[3:6])
    assert made.stats() == {"requests": 10, "failures": 6, "retries": 6, "circuit_opened": 1}


def test_no_batch_waits_for_the_circuit_past_its_age() -> None:
    with Endpoint(always(DOWN)) as endpoint:
        made = scorer(
            endpoint.url,
            batch_size=1,
            max_concurrency=1,
            open_after=2,
            cool_down_s=60,
            give_up_after_s=5,
        )
        begin = time.monotonic()
        results = made.score(requests(2))
        assert time.monotonic() - begin < 5
    assert len(endpoint.calls) == 2
    assert [r.error for r in results] == [
        "circuit open; last failure: HTTP 500",
        "circuit open; last failure: never tried",
    ]
    assert made.stats()["dead_letters"] == 2
