"""Whether the cluster that was joined asks for a password."""

from __future__ import annotations

import contextlib
from typing import Final

import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from deploy.listening import is_local

_ANSWER_S: Final = 2.0


def unguarded(address: str) -> str:
    """Return what to say of a cluster that others reach and that asks nobody for a token.

    Args:
        address: where its GCS listens, as ``host:port``; empty where this program is in none.

    Returns:
        Nothing where it is on this machine alone, or asks for a token.
    """
    host = address.rpartition(":")[0].strip("[]")
    if not host or is_local(host) or not _answers_anyone(address):
        return ""
    return (
        f"the cluster at {address} asks nobody for a token: who reaches it can run any program on "
        "it; start it with RAY_AUTH_MODE=token, or keep its network to yourself"
    )


def _answers_anyone(address: str) -> bool:
    """Whether it answers a question that no token was sent with."""
    channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
    with contextlib.closing(channel):
        try:
            gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel).InternalKVGet(
                gcs_service_pb2.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA"),
                timeout=_ANSWER_S,
            )
        except grpc.RpcError:
            return False
    return True
