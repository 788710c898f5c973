"""Ray's dashboard calls jobs and actors by the run: what its pages are made of, asked signed in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, os, ray, httpx
from pathlib import Path
from common.config.run import RunConfig
from deploy.workers.attach import start_cluster
from deploy.workers.told import Identity, Told

class Plain:
    def answer(self): return 1

class Actor(Told, Plain): pass

url = start_cluster(RunConfig(name="titles", cluster={"dashboard": True}))
identity = Identity(run="titles", role="rollout", worker="rollout-0")
actor = ray.remote(Actor).options(name="titles:rollout-0", num_cpus=0).remote(identity)
ray.get(actor.answer.remote())
token = Path("~/.ray/auth_token").expanduser().read_text().strip()
ask = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
refused = httpx.get(f"{url}/api/jobs/", timeout=60).status_code
jobs = ask.get("/api/jobs/").json()
actors = ask.get("/api/v0/actors?detail=1").json()["data"]["result"]["result"]
print(json.dumps([refused, [j["metadata"] for j in jobs], [a["repr_name"] for a in actors]]))
ray.shutdown()
"""


@pytest.mark.slow
def test_jobs_and_actors_carry_the_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, jobs, actors = json.loads(done.stdout.splitlines()[-1])
    assert refused in (401, 403), "only who is signed in is answered"
    assert jobs == [{"job_name": "talipot titles", "run": "runs/titles"}]
    assert actors == ["titles:rollout-0"]
