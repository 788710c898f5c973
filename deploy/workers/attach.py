"""Joining a Ray cluster, or starting one here: what stands in the way is said within seconds.

    address -> `_require_joinable`: does Ray answer there, to our token, in our versions, and has
               it a node on this machine?
            -> ray.init

A run that is at work is found at the address that the note of its lock has (`way_to`). Ray's own
"auto" finds the newest cluster of a machine, which may be another run's, so it is used only where a
user names it.

Ray itself tries for minutes where nobody answers, waits without end where something else does, and
prints pages where a token is refused. So it is called only once a call of our own was answered. Ray
has no public call for that: its protocol is spoken here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import check_version_info
from ray.core.generated import (
    gcs_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    ray_client_pb2,
    ray_client_pb2_grpc,
)
from ray.job_config import JobConfig

from common.config.run import RunConfig
from common.errors import ClusterError
from common.files import one_line
from deploy.run_folder.lock import Holder
from deploy.workers.placement import NAMESPACE
from talipot_first import strangers

Answer = TypeVar("Answer")

_ANSWER_S = 5.0
_ASK_S = 30.0
"""Longest time to join a cluster, ask something there and leave it: seconds where it is well."""
_CLIENT = "ray://"
_ADDRESSES = "HOST:PORT, ray://HOST:PORT, auto (what runs on this machine) or local"
_ASKING = "asks a cluster"
_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path that the operating system allows a socket."""


@contextmanager
def cluster_of(config: RunConfig) -> Iterator[str]:
    """Join or start the recipe's cluster, and yield its dashboard's URL.

    It is left at the end, unless this program was in it before.

    Raises:
        ClusterError: no cluster answers, or the local one cannot start.
    """
    joined = ray.is_initialized()
    url = start_cluster(config)
    try:
        yield url
    finally:
        if not joined:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class Way:
    """How to join a cluster."""

    address: str
    ours: bool = False
    """It was started on this machine, and so knows this machine's token."""


def way_to(run_dir: Path, holder: Holder, given: str | None = None) -> Way:
    """Return how to join the cluster that a run is at work on.

    Args:
        run_dir: the run's folder.
        holder: of its lock.
        given: an address that the user gave: another way to the same cluster.

    Raises:
        ClusterError: only another machine reaches it.
    """
    if given:
        return _named_way(given)
    here, host = holder.host == socket.gethostname(), holder.cluster.rpartition(":")[0].strip("[]")
    if host in ("127.0.0.1", "localhost", "::1") and not here:
        raise ClusterError(
            f"{run_dir} is at work on host {holder.host}, in a cluster that only this host "
            "reaches: run the command there"
        )
    return Way(holder.cluster, ours=here)


def ask_cluster(way: Way, ask: Callable[[], Answer]) -> Answer:
    """Join a cluster, ask something there and leave it; no other one is ever asked.

    That is done in a thread, because Ray's calls at a cluster that is dying may last for minutes,
    and neither a deadline nor SIGTERM ends them.

    Raises:
        ClusterError: the cluster does not answer, or not all of it is done in time.
        Exception: whatever `ask` raises.
    """
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(_asked(way, ask))
        except BaseException as error:  # raised again where it is waited for
            answer.set_exception(error)

    with _kept_signal_handlers():
        threading.Thread(target=work, name=_ASKING, daemon=True).start()
        try:
            return answer.result(_ASK_S)
        except TimeoutError:
            if answer.done():
                raise  # by what was asked
            raise ClusterError(
                f"cluster at {way.address} answers and then no more for {_ASK_S:.0f} s: it is "
                "ending, or overloaded; ask again"
            ) from None


def asks() -> bool:
    """Whether a cluster is still being asked, by a call that may never return."""
    return any(thread.name == _ASKING for thread in threading.enumerate())


def sign_in() -> str:
    """Say how to sign in to the dashboard of this process's cluster; empty where nothing is asked.

    The token itself is a password, and stays out of logs.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":  # Ray sets it for a local cluster
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        lies = "it is RAY_AUTH_TOKEN of this environment"
    else:
        lies = f"it lies in {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"
    program = "ray" if shutil.which("ray") else Path(sys.executable).with_name("ray")
    return f"the dashboard asks for a token: `{program} get-auth-token` prints it ({lies})"


def own_address() -> str:
    """Return the address of the cluster that this process is in; empty where it is in none."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""


def start_cluster(config: RunConfig, way: Way | None = None) -> str:
    """Join the cluster that was named, or start one on this machine; returns its dashboard's URL.

    Args:
        config: the recipe.
        way: goes before what recipe and environment name.

    Raises:
        ClusterError: the address does not answer, or the local cluster cannot start.
    """
    named = named_address(config)
    # The dashboard's list of jobs has a column for the first.
    job = JobConfig(metadata={"job_name": f"talipot {config.name}", "run": str(config.run_dir)})
    if way is not None or named is not None:
        return _join(way or _named_way(named or ""), job_config=job)
    if not ray.is_initialized():
        _require_short_paths(config.cluster.dashboard)
    try:
        # Without an address Ray joins what was started on this machine, dead or alive.
        return _init(address="local", include_dashboard=config.cluster.dashboard, job_config=job)
    except Exception as error:  # whatever Ray met while it started
        raise ClusterError(f"the local cluster cannot start: {one_line(error)}") from None


def named_address(config: RunConfig) -> str | None:
    """Return the address that recipe or environment name; None for a cluster of our own."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def _named_way(address: str) -> Way:
    return Way(address, ours=address == "auto")


def _asked(way: Way, ask: Callable[[], Answer]) -> Answer:
    joined = ray.is_initialized()
    _join(way)
    if joined and way.address not in ("auto", own_address()):
        raise ClusterError(f"cluster at {way.address}: this program is in another, {own_address()}")
    try:
        return ask()
    finally:
        if not joined:
            ray.shutdown()


def _join(way: Way, **options: Any) -> str:
    address = way.address
    if address != "auto" or not ray.is_initialized():
        _require_joinable(way)
    try:
        return _init(address=address, **options)
    except Exception as error:  # Ray's own refusal, of many types
        raise ClusterError(
            f"cluster at {address} cannot be joined: {one_line(error.__cause__ or error)}; "
            "check --address and RAY_ADDRESS, or leave both out to start one here"
        ) from None


def _init(**options: Any) -> str:
    """Start Ray in this process; returns the dashboard's URL."""
    # Ray announces a change of a later version in every worker; it says nothing to our users.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if strangers():  # a worker's path starts with the driver's working folder
        options["runtime_env"] = {"worker_process_setup_hook": "talipot_first.ours_first"}
    with _kept_signal_handlers():
        context = ray.init(
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
            **options,
        )
    url = context.dashboard_url
    return f"http://{url}" if url else ""


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray's start replaces by one that aborts the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ asking before joining


def _address_here() -> str:
    """Return the address that Ray finds for "auto". Raises ConnectionError where it finds none."""
    return str(services.get_ray_address_from_environment("auto", None))


def _require_joinable(way: Way) -> None:
    """Find out in seconds what would keep Ray from joining.

    Raises:
        ClusterError: nothing answers, something else does, it wants another token, has other
            versions, or has no node on this machine.
    """
    address = way.address
    if "://" in address and not address.startswith(_CLIENT):
        raise ClusterError(f"cluster at {address}: an address is {_ADDRESSES}")
    deadline = time.monotonic() + _ANSWER_S
    logging.getLogger("ray").setLevel(logging.ERROR)
    if way.ours:
        # Ray does so too for "auto": what runs on this machine has this machine's token.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        if address.startswith(_CLIENT):
            _ask_client_server(address.removeprefix(_CLIENT), deadline)
            return
        where = _address_here() if address == "auto" else address
        versions, nodes = _ask(where, deadline)
    except ray.exceptions.AuthenticationError:
        raise ClusterError(
            "RAY_AUTH_MODE=token, but there is no token: set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, or write the cluster's token to ~/.ray/auth_token"
        ) from None
    except grpc.RpcError as error:
        raise ClusterError(f"cluster at {address} {_why(error)}") from None
    except (ConnectionError, ValueError, OSError) as error:
        raise ClusterError(
            f"cluster at {address} cannot be found ({one_line(error)}); an address is {_ADDRESSES}"
        ) from None
    if versions:
        _require_same_versions(address, versions)
    if not nodes & set(services.find_node_ids()):
        raise ClusterError(
            f"cluster at {address} has no node on this machine: run the command on one of its "
            "nodes, or submit it with `ray job submit`"
        )


def _ask(where: str, deadline: float) -> tuple[dict[str, Any], set[str]]:
    """Return the versions that a cluster was started with, and the ids of its living nodes.

    Raises:
        grpc.RpcError: no answer by the deadline, or a refusal.
        ray.exceptions.AuthenticationError: a token is to be sent, and there is none.
    """
    channel = init_grpc_channel(where, [("grpc.enable_http_proxy", 0)])
    with contextlib.closing(channel):
        stored = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(
            gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA"),
            timeout=max(0.1, deadline - time.monotonic()),
        )
        answer = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
            gcs_service_pb2.GetAllNodeInfoRequest(
                state_filter=gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
            ),
            timeout=max(0.1, deadline - time.monotonic()),
        )
    versions: dict[str, Any] = json.loads(stored.value or b"{}")
    return versions, {node.node_id.hex() for node in answer.node_info_list}


def _ask_client_server(where: str, deadline: float) -> None:
    """Raise grpc.RpcError where no server for Ray's remote clients answers by the deadline."""
    channel = init_grpc_channel(where, [("grpc.enable_http_proxy", 0)])
    with contextlib.closing(channel):
        ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(
            ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING),
            timeout=max(0.1, deadline - time.monotonic()),
        )


def _why(error: grpc.RpcError) -> str:
    code, details = error.code(), str(error.details())
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return (
            "wants another token than it was sent: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token) to the cluster's own"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        reason = f"nothing that speaks Ray's protocol within {_ANSWER_S:.0f} s"
    elif "HTTP/2" in details or code is grpc.StatusCode.UNIMPLEMENTED:
        reason = "what listens there is not Ray"
    elif "Connection refused" in details:
        reason = "connection refused"
    else:
        reason = one_line(Exception(details))
    return (
        f"does not answer ({reason}); check --address and RAY_ADDRESS, or leave both out to start "
        "one here"
    )


def _require_same_versions(address: str, theirs: dict[str, Any]) -> None:
    try:
        check_version_info(theirs, "this machine")
    except RuntimeError:
        raise ClusterError(
            f"cluster at {address} runs Ray {theirs['ray_version']} on Python "
            f"{theirs['python_version']}, this command Ray {ray.__version__} on Python "
            f"{platform.python_version()}: run it with the cluster's versions"
        ) from None


def _require_short_paths(dashboard: bool) -> None:
    """Refuse a temporary folder that is too long for the sockets that Ray makes below it."""
    folder = get_default_ray_temp_dir()
    session = f"session_0000-00-00_00-00-00_000000_{os.getpid()}"
    name = "dash_TaskEventsHead" if dashboard else "plasma_store"
    excess = len(os.fsencode(Path(folder) / session / "sockets" / name)) - _SOCKET_BYTES
    if excess > 0:
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ClusterError(
            f"{variable}={os.environ.get(variable)} is {excess} bytes too long: paths of Ray's "
            f"sockets below it may have {_SOCKET_BYTES} bytes; set RAY_TMPDIR to a shorter folder, "
            "such as /tmp"
        )
