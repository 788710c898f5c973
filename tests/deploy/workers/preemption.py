"""A cluster of its own whose nodes are drained and killed; run as a program, prints JSON.

Ray is one cluster per process, and the suite's has one node: hence a program.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from deploy.workers.placement import leaving_nodes
from deploy.workers.worker import ClusterQueries, Worker
from tests.deploy.control.simulated import Rig

SPOT = {"ray.io/market-type": "spot"}
QUERIES = ClusterQueries(leaving_nodes=leaving_nodes)


def rig(size: int, **settings: Any) -> Rig:
    """Actors that take a spot node's only core each."""
    options: dict[str, Any] = {"num_cpus": 1, "label_selector": SPOT}
    return Rig(size, options=lambda name: options, cluster=QUERIES, **settings)


def drain(worker: Worker, seconds: float) -> float:
    """Announce that a worker's node will be taken away; returns when (unix seconds)."""
    deadline = time.time() + seconds
    gcs = ray._private.worker.global_worker.gcs_client
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = gcs.drain_node(worker.node, reason, "a test", int(deadline * 1000))
    assert accepted, why
    return deadline


def a_notice_is_heeded(cluster: Cluster) -> dict[str, Any]:
    """Work that ends in time ends on the draining node; a replacement goes on elsewhere."""
    here = rig(2, seconds_per_token=0.02)
    here.issue(0, 120)
    here.pump_until(lambda: len(here.working()) == 2 and here.ledger.count("committed") > 0)
    victim = next(iter(here.pool.workers.values()))
    deadline = drain(victim, 15.0)
    here.pump_until(lambda: victim.state == "draining")
    cluster.add_node(num_cpus=1, labels=SPOT)
    here.pump_until(lambda: victim.name not in here.pool.workers)
    in_time = time.time() < deadline
    here.pump_until(lambda: len(here.working()) == 2)
    elsewhere = all(w.node != victim.node for w in here.pool.workers.values())
    here.everything_once(120)
    found = {"left": here.pool.left, "lost": here.pool.failures}
    here.pool.stop()
    return found | {"in_time": in_time, "elsewhere": elsewhere}


def work_that_takes_too_long_is_handed_back() -> dict[str, Any]:
    here = rig(1, seconds_per_token=2.0)
    here.issue(0, 4)
    here.pump_until(lambda: here.ledger.count("leased") == 4)
    victim = next(iter(here.pool.workers.values()))
    deadline = drain(victim, 5.0)
    here.pump_until(lambda: here.pool.failures == 1)
    in_time = time.time() < deadline
    found = {"losses": dict(here.pool.losses), "counted": len(here.pool._losses.recent)}
    here.pool.stop()
    return found | {"in_time": in_time, "reissued": here.ledger.reissued}


def a_table_that_dies_with_its_node_is_sampled_again(cluster: Cluster) -> dict[str, Any]:
    """Looked for only after Ray has given the tables up and laid errors in their place."""
    here = rig(1, text="x" * 100_000, seconds_per_token=0.2)
    here.issue(0, 8)
    here.pump_until(lambda: here.ledger.pending(0) == 0)
    (worker,) = here.pool.workers.values()
    node = next(n for n in cluster.worker_nodes if n.node_id == worker.node)
    cluster.add_node(num_cpus=1, labels=SPOT)
    here.issue(1, 4)
    here.pump_until(lambda: here.ledger.count("leased") == 4)
    cluster.remove_node(node, allow_graceful=False)
    begin = time.monotonic()
    tables = [scored.table for scored in here.collector.batches.waiting]
    here.pump_until(lambda: here.pool.failures == 1)
    blamed = len(here.ledger._failures)
    here.pump_until(lambda: all(map(laid_in_its_place, tables)), within_s=120)
    batch = None
    while batch is None or not here.ledger.resampled:
        assert time.monotonic() < begin + 120, here.events
        here.collector.batches.waiting += batch or []
        batch = here.collector.take(0, oldest=0, stale="wait")
        here.collector.pump(0.05)
    rows = sum(len(ray.get(s.table)) for s in batch)
    here.ledger.train(i for s in batch for i in s.rollout_ids)
    here.ledger.check()
    found = {"rows": rows, "resampled": dict(here.ledger.resampled), "blamed": blamed}
    found |= {"lost": dict(here.pool.losses), "reissued": here.ledger.reissued}
    return found | {"trained": here.ledger.trained, "seconds": time.monotonic() - begin}


def laid_in_its_place(table: Any) -> bool:
    (facts,) = ray.experimental.get_object_locations([table]).values()
    return facts["node_ids"] == [ray.get_runtime_context().get_node_id()]


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, labels=SPOT)
    ray.init(
        address=cluster.address,
        namespace="talipot",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    found = {
        "notice": a_notice_is_heeded(cluster),
        "too_long": work_that_takes_too_long_is_handed_back(),
        "table": a_table_that_dies_with_its_node_is_sampled_again(cluster),
    }
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
