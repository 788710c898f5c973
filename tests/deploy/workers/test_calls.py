"""Calls of actors by the method itself, and what is read out of Ray's messages."""

from __future__ import annotations

import time

import pytest
import ray

from common.errors import RewardError
from deploy.workers.calls import (
    Handle,
    as_argument,
    kill,
    lost_objects,
    own_error,
    start,
    start_function,
    start_pair,
    summary,
)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int, *, times: int = 1) -> int:
        self.count += number * times
        return self.count

    def halves(self, text: str) -> tuple[int, str]:
        return len(text), text

    def refuse(self) -> None:
        raise RewardError("no")


class Doubling(Counter):
    """Another class with the same methods: calls name a method, and the actor has its own."""

    def add(self, number: int, *, times: int = 1) -> int:
        return super().add(2 * number, times=times)


def actor(kind: type[Counter]) -> Handle:
    return ray.remote(kind).options(num_cpus=0).remote()


def test_calls_name_the_method_and_arguments_may_be_references(cluster: None) -> None:
    for kind, sums in ((Counter, [3, 9]), (Doubling, [6, 18])):
        one = actor(kind)
        three = as_argument(ray.put(3))
        calls = [start(one, Counter.add, three), start(one, Counter.add, three, times=2)]
        assert ray.get(calls) == sums
        length, text = start_pair(one, Counter.halves, "word")
        assert (ray.get(length), ray.get(text)) == (4, "word")
        assert ray.get(start_function(one, lambda counter: counter.count)) == sums[-1]
        kill(one)


def test_an_error_of_ours_comes_out_of_rays_wrapper(cluster: None) -> None:
    one = actor(Counter)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(start(one, Counter.refuse))
    assert isinstance(own_error(raised.value), RewardError)
    under_way = start_function(one, lambda _: time.sleep(60))
    kill(one)  # ends it a moment later: until then it answers new calls
    with pytest.raises(ray.exceptions.RayError) as dead:
        ray.get(under_way)
    assert own_error(dead.value) is dead.value


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("one line", "one line"),
        ("first\n\n  middle\n last\n", "first last"),
        ("died\nlost. Some common causes include: (1) memory", "died lost."),
    ],
)
def test_a_long_message_is_read_without_its_guesses(message: str, expected: str) -> None:
    assert summary(Exception(message)) == expected


def test_what_ray_keeps_with_its_owner_is_not_lost_whatever_its_size(cluster: None) -> None:
    """Ray tells an inlined object a few bytes larger than it is, so beyond what it inlines.

    A table of just that size was sampled again and again, for ever, because it came out the same.
    """
    one = actor(Counter)
    limit = 100 * 1024
    refs = [start_pair(one, Counter.halves, "x" * (limit - missing))[1] for missing in range(60)]
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    told = ray.experimental.get_object_locations(refs)
    assert any(f["object_size"] > limit and not f["node_ids"] for f in told.values()), "moot"
    assert lost_objects(refs) == set()
    kill(one)
