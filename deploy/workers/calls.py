"""Typed calls at Ray actors, and what came of a call and of the object that it left behind.

Ray finds a method by its name and answers with anything. Here a call names the method itself
(``LearnerRank.policy_phase``), so that a type checker sees its arguments and its answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import ray
from ray.actor import ActorHandle, ActorProxy

from common.errors import TalipotError

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
First = TypeVar("First")
Second = TypeVar("Second")

Handle = ActorProxy[Any]
"""An actor as Ray hands it out; what it can do is said by the class that a call names."""

_INLINE_BYTES = 100 * 1024
"""Ray keeps smaller objects with their owner, out of any node's object store."""
_NEAR_BYTES = 1024
"""More than Ray's note of what an object is: the size that it tells counts that too, and what it
keeps with the owner may be told as a few bytes more than it keeps there."""
_ANSWER_S = 10.0
_OWN_S = 0.1
"""What the owner keeps itself is there at once."""
_GUESSES = " Some common causes include"
"""Where Ray's message of a death begins to guess."""


class ArgumentLost(Exception):
    """A call could not begin: what it was to work on was lost with a node."""


class WorkerLost(Exception):
    """A call's worker was lost: in this call, or earlier or with its node (`by_itself` False)."""

    def __init__(self, reason: str, *, by_itself: bool) -> None:
        super().__init__(reason)
        self.by_itself = by_itself


# ------------------------------------------------------------------ calls


def actor_name(run: str, worker: str) -> dict[str, str]:
    """Return Ray's options of an actor that its dashboard and logs call by run and worker.

    Nobody finds it by that name: each has a namespace of its own, as Ray frees a name only some
    time after its holder's death, and successors and other runs may want the same.
    """
    return {"name": f"{run}:{worker}", "namespace": f"talipot-{secrets.token_hex(6)}"}


def start(
    actor: Handle,
    method: Callable[Concatenate[Any, Arguments], Answer],
    *args: Arguments.args,
    **named: Arguments.kwargs,
) -> ray.ObjectRef[Answer]:
    """Start a method of an actor's class; returns the reference to its answer."""
    answer: ray.ObjectRef[Answer] = getattr(actor, method.__name__).remote(*args, **named)
    return answer


def start_pair(
    actor: Handle,
    method: Callable[Concatenate[Any, Arguments], tuple[First, Second]],
    *args: Arguments.args,
    **named: Arguments.kwargs,
) -> tuple[ray.ObjectRef[First], ray.ObjectRef[Second]]:
    """Start a method that answers with a pair; returns a reference to each half.

    Who fetches the first half, which is small, leaves the second in the object store.
    """
    call = getattr(actor, method.__name__).options(num_returns=2)
    first: ray.ObjectRef[First]
    second: ray.ObjectRef[Second]
    first, second = call.remote(*args, **named)
    return first, second


def start_function(actor: Handle, function: Callable[[Any], Answer]) -> ray.ObjectRef[Answer]:
    """Start a function in an actor's process, with the actor's object as its argument."""
    answer: ray.ObjectRef[Answer] = actor.__ray_call__.remote(function)
    return answer


def as_argument(reference: ray.ObjectRef[Answer]) -> Answer:
    """Type a reference as the argument that a method receives: Ray replaces it by its value."""
    return cast(Answer, reference)


def kill(actor: Handle) -> None:
    """End an actor's process at once, though it be stopped (SIGSTOP)."""
    ray.kill(cast(ActorHandle[Any], actor))


# ------------------------------------------------------------------ what came of them


def own_error(error: ray.exceptions.RayError) -> Exception:
    """Return the TalipotError that a worker raised out of Ray's wrapper, else the error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, TalipotError) else error


def summary(error: Exception) -> str:
    """Return what happened out of Ray's long message: its first line, its last, and no guesses."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    whole = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return whole.partition(_GUESSES)[0]


def lost_objects(refs: Sequence[ray.ObjectRef[Any]]) -> set[ray.ObjectRef[Any]]:
    """Return those of our objects whose only copies were lost with their nodes.

    A moment after Ray has noticed, it tries to make the object again; in its place, on our own
    node, it then puts the error of not being able to. Objects on this node are fetched only once a
    node has died, because a controller is not to hold what workers produced.
    """
    here = ray.get_runtime_context().get_node_id()
    lost, doubtful = set(), []
    for ref, facts in ray.experimental.get_object_locations(list(refs)).items():
        if (facts["object_size"] or 0) <= _INLINE_BYTES or facts["did_spill"]:
            continue
        if not facts["node_ids"]:
            near = facts["object_size"] <= _INLINE_BYTES + _NEAR_BYTES
            if not (near and _has_come(ref, _OWN_S)):
                lost.add(ref)
        elif here in facts["node_ids"]:
            doubtful.append(ref)
    if doubtful and not all(node["Alive"] for node in ray.nodes()):
        # One that is not there in time was evicted from this node: the next look will tell.
        lost |= {ref for ref in doubtful if _has_come(ref, _ANSWER_S) is False}
    return lost


def _has_come(ref: ray.ObjectRef[Any], timeout_s: float) -> bool | None:
    """Whether an object can be had; False: it is lost; None: it has not come in time."""
    try:
        ray.get(ref, timeout=timeout_s)
    except ray.exceptions.ObjectLostError:
        return False
    except ray.exceptions.GetTimeoutError:
        return None
    return True
