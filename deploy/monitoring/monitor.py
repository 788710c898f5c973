"""A Prometheus over a cluster, started where it is installed: `talipot monitor`.

Ray keeps a file of all addresses that hand out metrics in its session's folder, on the head's
machine; it goes on as nodes come and go.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

import ray
import yaml
from ray._private import worker
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from common.config.run import RunConfig
from common.errors import ClusterError, ConfigError
from common.files import one_line
from deploy.run_folder.lock import at_work
from deploy.workers.attach import Way, ask_cluster, way_to

PORT: Final = 9090
_END_S: Final = 20.0
_EVERY_S: Final = 10
"""As often as Ray passes values on."""


def monitor(
    config: RunConfig | None, address: str | None, port: int, say: Callable[[str], None]
) -> None:
    """Start a Prometheus and wait until it, or this command, is ended.

    Args:
        config: of a run whose cluster it is; None: that of `address`, or of this machine.
        address: of the cluster.
        port: where it listens, on this machine alone.
        say: is told where it is.

    Raises:
        ConfigError: there is no Prometheus, or something listens at the port.
        ClusterError: no cluster answers, its head is on another machine, or Prometheus ended.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise ConfigError(
            "prometheus is not installed: `apt-get install prometheus`, `brew install prometheus`, "
            "or a release from prometheus.io on the PATH"
        )
    session = ask_cluster(_way(config, address), _session_folder)
    targets = session / PROMETHEUS_SERVICE_DISCOVERY_FILE
    if not targets.exists():
        raise ClusterError(
            f"{targets} is not there: the cluster's head is on another machine (run the command on "
            "that one), or was started without its dashboard"
        )
    _require_free(port)
    folder = session / "metrics" / "talipot"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "prometheus.yaml"
    rules = resources.files("deploy.monitoring") / "rules.yaml"
    settings = {
        "global": {"scrape_interval": f"{_EVERY_S}s", "evaluation_interval": f"{_EVERY_S}s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}],
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf8")
    log = folder / "prometheus.log"
    with log.open("w", encoding="utf8") as file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={recipe}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    try:
        say(f"Prometheus at http://127.0.0.1:{port}, alerts at http://127.0.0.1:{port}/alerts")
        code = process.wait()
    finally:
        _end(process)
    raise ClusterError(f"Prometheus ended with code {code}; {log} says why")


def _way(config: RunConfig | None, address: str | None) -> Way:
    if config is None:
        return Way(address or "auto", ours=address is None)
    holder = at_work(config.run_dir)
    if holder is None or not holder.cluster:
        raise ClusterError(f"{config.run_dir} is not at work on any cluster; name one by --address")
    return way_to(config.run_dir, holder, address)


def _session_folder() -> Path:
    """Return the folder of this process's cluster, as this machine has it."""
    node = worker._global_node
    assert ray.is_initialized() and node is not None
    return Path(node.get_session_dir_path())


def _require_free(port: int) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return
    except OSError as error:
        raise ConfigError(
            f"--port {port}: cannot listen there ({one_line(error)}); another Prometheus may: name "
            "another port, or let that one read the rules in deploy/monitoring"
        ) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what was started, whatever it is at."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
