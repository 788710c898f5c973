"""The manifests against a schema, the lock file, the command line and the recipe they run."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from common.config.recipe import load_config
from common.config.run import RunConfig
from deploy.workers.preflight import explain
from tests.deploy.commands import parse

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
Manifest = dict[str, Any]


def shape(required: str, optional: str = "", **known: Manifest) -> Manifest:
    """An object with these keys and no others."""
    names = [*required.split(), *optional.split()]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": {name: known.get(name, {}) for name in names},
    }


TEXTS: Manifest = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Manifest = {"type": "string", "pattern": r"^[0-9]+(m|Mi|Gi)?$"}
AMOUNTS = shape("cpu memory", cpu=QUANTITY, memory=QUANTITY)
RESOURCES = shape("requests limits", requests=AMOUNTS, limits=AMOUNTS)
COUNT: Manifest = {"type": "integer", "minimum": 0}
PORT = shape("name containerPort", containerPort={"type": "integer"})
CONTAINER = shape(
    "name image resources securityContext volumeMounts",
    "ports",
    resources=RESOURCES,
    securityContext=shape("allowPrivilegeEscalation", allowPrivilegeEscalation={"const": False}),
    volumeMounts={"type": "array", "items": shape("name mountPath", "readOnly")},
    ports={"type": "array", "items": PORT},
)
POD = shape(
    "containers volumes securityContext nodeSelector",
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
    volumes={"type": "array", "items": shape("name", "persistentVolumeClaim configMap")},
    securityContext=shape(
        "runAsNonRoot runAsUser fsGroup",
        runAsNonRoot={"const": True},
        runAsUser={"type": "integer", "minimum": 1},
    ),
    nodeSelector=TEXTS,
)
TEMPLATE = shape("spec", spec=POD)
WORKERS = shape(
    "groupName replicas minReplicas maxReplicas labels rayStartParams template",
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_CLUSTER = shape(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=shape("name"),
    spec=shape(
        "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec "
        "workerGroupSpecs",
        rayVersion={"type": "string"},
        authOptions=shape("mode", mode={"const": "token"}),
        enableInTreeAutoscaling={"const": True},
        autoscalerOptions=shape(
            "version upscalingMode idleTimeoutSeconds resources",
            version={"const": "v2"},
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            idleTimeoutSeconds=COUNT,
            resources=RESOURCES,
        ),
        headGroupSpec=shape(
            "serviceType rayStartParams template",
            serviceType={"const": "ClusterIP"},
            rayStartParams=TEXTS,
            template=TEMPLATE,
        ),
        workerGroupSpecs={"type": "array", "minItems": 1, "items": WORKERS},
    ),
)
RAY_JOB = shape(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=shape("name"),
    spec=shape(
        "clusterSelector submissionMode entrypoint",
        clusterSelector=shape("ray.io/cluster"),
        submissionMode={"enum": ["K8sJobMode", "HTTPMode"]},
        entrypoint={"type": "string", "minLength": 1},
    ),
)


def manifest(name: str) -> Manifest:
    found: Manifest = yaml.safe_load((KUBERNETES / name).read_text(encoding="utf8"))
    return found


def pinned(package: str) -> Version:
    """The version in requirements.lock."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf8")
    found = re.search(rf"^{re.escape(package)}==(\S+)$", lock, re.MULTILINE)
    assert found is not None, package
    return Version(found[1])


@pytest.fixture
def cluster() -> Manifest:
    return manifest("raycluster.yaml")


@pytest.fixture
def groups(cluster: Manifest) -> dict[str, Manifest]:
    return {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}


@pytest.fixture
def recipe() -> RunConfig:
    return load_config(KUBERNETES / "recipe.yaml")


def pods(cluster: Manifest) -> list[Manifest]:
    spec = cluster["spec"]
    every = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in every]


def cores(group: Manifest) -> int:
    container = group["template"]["spec"]["containers"][0]
    return int(container["resources"]["limits"]["cpu"])


def test_manifests_have_the_shape_of_their_kinds(cluster: Manifest) -> None:
    jsonschema.validate(cluster, RAY_CLUSTER)
    jsonschema.validate(manifest("rayjob.yaml"), RAY_JOB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "authOptions", "mode"), "disabled"),
        (("spec", "headGroupSpec", "serviceType"), "LoadBalancer"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources"), {}),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 3),
    ],
)
def test_the_schema_finds_what_breaks_it(
    cluster: Manifest, path: tuple[Any, ...], value: Any
) -> None:
    broken = copy.deepcopy(cluster)
    node: Any = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAY_CLUSTER)


def test_versions_are_those_of_the_project(cluster: Manifest) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    ray = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    assert Version(cluster["spec"]["rayVersion"]) == pinned("ray")
    assert pinned("ray") in ray.specifier
    images = {pod["containers"][0]["image"] for pod in pods(cluster)}
    assert images == {f"talipot:{project['version']}"}


def test_requests_equal_limits_and_every_pod_sees_the_shared_folder(cluster: Manifest) -> None:
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["shared"] == "/shared"
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}


def test_the_learner_stays_and_rollouts_are_elastic(groups: dict[str, Manifest]) -> None:
    learner, elastic = groups["learner"], groups["elastic"]
    assert learner["labels"] == {"ray.io/market-type": "on-demand"}
    assert learner["minReplicas"] == learner["replicas"] == learner["maxReplicas"]
    assert elastic["labels"] == {"ray.io/market-type": "spot"}
    assert elastic["minReplicas"] <= elastic["replicas"] < elastic["maxReplicas"]
    for group in (learner, elastic):
        selector = group["template"]["spec"]["nodeSelector"]
        assert list(selector.values()) == [group["labels"]["ray.io/market-type"]]


def test_the_job_runs_a_command_that_exists_on_the_recipe_that_is_mounted(
    cluster: Manifest,
) -> None:
    job = manifest("rayjob.yaml")["spec"]
    assert job["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    name, parameters = parse(job["entrypoint"])
    assert name == "train"
    path = Path(parameters["config"])
    (head,) = pods(cluster)[0]["containers"]
    assert str(path.parent) in {mount["mountPath"] for mount in head["volumeMounts"]}
    load_config(KUBERNETES / path.name, parameters["overrides"] or [])


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--confg"):
        parse("talipot train --confg recipe.yaml")


def test_the_recipe_fits_and_keeps_learner_and_elastic_workers_apart(
    groups: dict[str, Manifest], recipe: RunConfig
) -> None:
    learner, elastic = cores(groups["learner"]), cores(groups["elastic"])
    most = learner + groups["elastic"]["maxReplicas"] * elastic
    explain(recipe, {"CPU": most})
    assert recipe.learner.ranks * recipe.learner.cpus_per_rank == learner
    for share in (recipe.rollout.cpus_per_actor, recipe.reward_service.cpus_per_replica):
        assert share <= elastic


def test_the_recipe_chooses_nodes_by_labels_that_the_groups_have(
    groups: dict[str, Manifest], recipe: RunConfig
) -> None:
    assert dict(recipe.learner.labels) == groups["learner"]["labels"]
    assert dict(recipe.rollout.labels) == groups["elastic"]["labels"]
    assert dict(recipe.reward_service.labels) == groups["elastic"]["labels"]
    assert recipe.cluster.autoscales


def test_the_recipe_lives_on_the_shared_folder_and_can_carry_on(recipe: RunConfig) -> None:
    data = recipe.data
    for path in (recipe.output, *data.demonstrations, *data.comparisons, *data.prompts):
        assert path.startswith("/shared/")
    assert recipe.train.checkpoint_every > 0


def test_the_image_is_pinned_ordered_and_not_root() -> None:
    lines = (KUBERNETES / "Dockerfile").read_text(encoding="utf8").splitlines()
    text = "\n".join(lines)
    assert "FROM python:3.11-slim" in lines
    steps = [
        text.index(f"pip install --no-cache-dir torch=={pinned('torch')}"),
        text.index("-r /opt/talipot/requirements.lock"),
        text.index("--no-deps"),
        text.index("\nUSER "),
    ]
    assert steps == sorted(steps)
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user not in ("0", "root")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.split(".")[0] for pattern in patterns}
    copied = {line.split()[1] for line in lines if line.startswith("COPY ")}
    assert packages <= copied
