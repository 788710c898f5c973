"""What came of a call to a worker, and of the object that it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from common.errors import TalipotError
from deploy.workers.gang import plain
from deploy.workers.pool import Pool, last_words

_INLINE = 100 * 1024
"""Ray keeps smaller objects with their owner, out of any node's object store."""
_ANSWER_S = 10.0


_NODE_DIED = "its node has died"
"""What Ray's message says of an actor that did not end by itself."""


class ArgumentLost(Exception):
    """A call could not begin: what it was to work on went down with a node."""


class WorkerLost(Exception):
    """A call's worker was lost: in this call, or earlier or with its node (`by_itself` False)."""

    def __init__(self, words: str, *, by_itself: bool) -> None:
        super().__init__(words)
        self.by_itself = by_itself


def result(ref: ray.ObjectRef[Any], pool: Pool, worker: str) -> Any:
    """A finished call's result; the pool is told what came of it.

    Raises:
        WorkerLost: the worker is no more.
        ArgumentLost: what it was to work on is no more; the worker itself is well.
        TalipotError: what the worker raised.
    """
    try:
        found = ray.get(ref)
    except (ray.exceptions.RayTaskError, ray.exceptions.ObjectLostError) as error:
        pool.succeeded(worker)
        ours = plain(error)
        if isinstance(ours, TalipotError):
            raise ours from None
        causes = (error, getattr(error, "cause", None))
        if any(isinstance(cause, ray.exceptions.ObjectLostError) for cause in causes):
            raise ArgumentLost from None
        raise
    except ray.exceptions.RayError as error:
        words = last_words(error)
        cause = pool.lost(worker, "died", words)
        # Of a process that ended Ray soon knows the death; of a node that is gone it may not yet.
        unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        elsewhere = unreachable or _NODE_DIED in str(error)
        raise WorkerLost(words, by_itself=cause == "died" and not elsewhere) from None
    pool.succeeded(worker)
    return found


def gone(refs: Sequence[ray.ObjectRef[Any]]) -> set[ray.ObjectRef[Any]]:
    """Those of our objects whose only copies went down with their nodes.

    A moment after Ray has noticed it tries to make the object again, and what it lays in its place,
    on our own node, is the error of not being able to. What lies here is looked at only once a
    node has died: to look is to fetch, and a controller is not to hold what workers made.
    """
    here = ray.get_runtime_context().get_node_id()
    lost, doubtful = set(), []
    for ref, facts in ray.experimental.get_object_locations(list(refs)).items():
        if (facts["object_size"] or 0) <= _INLINE or facts["did_spill"]:
            continue
        if not facts["node_ids"]:
            lost.add(ref)
        elif here in facts["node_ids"]:
            doubtful.append(ref)
    if doubtful and not all(node["Alive"] for node in ray.nodes()):
        lost |= {ref for ref in doubtful if _is_an_error(ref)}
    return lost


def _is_an_error(ref: ray.ObjectRef[Any]) -> bool:
    try:
        ray.get(ref, timeout=_ANSWER_S)
    except ray.exceptions.ObjectLostError:
        return True
    except ray.exceptions.GetTimeoutError:
        pass  # evicted from here meanwhile: the next look will tell
    return False
