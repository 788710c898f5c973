"""The architecture as rules over the source: who may import whom, and what nobody may."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": set[str](),
    "actors": {"common"},
    "learner": {"common"},
    "reward_service": {"common"},
    "deploy": {"common", "actors", "learner", "reward_service"},
}
LAYERS: dict[str, list[set[str]]] = {
    "common": [
        {"errors", "metric_facts", "randomness", "unfinished"},
        {"reasoning_tasks"},
        {
            "endings",
            "files",
            "live_metrics",
            "metric_catalogue",
            "native_code",
            "pages",
            "run_folder",
        },
        {"metric_names", "metrics", "out_of_memory"},
        {"config"},
        {"batching", "devices", "logprobs"},
        {"wire"},
        {"data", "models"},
        {"native"},
    ],
    "actors": [{"generation"}, {"rollout_actor"}],
    "learner": [
        {"algorithms"},
        {"zero"},
        {"batch"},
        {"checkpointing", "optimisation", "start_weights"},
        {"objectives", "supervised"},
        {"actor_critic", "targets"},
        {"learner"},
        {"rank"},
    ],
    "reward_service": [
        {"http_answers", "http_settings", "proxies", "samples"},
        {"scorers"},
        {"http_scorer", "isolation", "models", "reasoning", "targets"},
        {"judge"},
        {"service"},
    ],
    "deploy": [
        {"gauges", "listening", "screen", "trackers"},
        {"exits", "run_folder"},
        {"exchange", "health", "workers"},
        {"control", "lanes", "planning", "standing", "validation"},
        {"evaluation", "stages"},
        {"commands", "config_docs", "instruct", "metric_docs", "monitoring", "quickstart"}
        | {"reasoning", "recipes", "sampler", "samples", "scorer"},
        {"feedback", "tasks"},
        {"watch"},
        {"cli"},
    ],
}
"""Rooms (folders) and files of a package from the lowest upwards. Each imports from itself and from
lower layers; two of one layer do not know each other."""
ELASTIC = ("actors.rollout_actor", "reward_service.service", "deploy.workers.hosted")
READING = ("deploy.evaluation.report", "deploy.evaluation.several", "deploy.watch.runs")
"""Of commands that read what runs have left."""
LIBRARY = {
    *(f"common.models.pretrained.{name}" for name in ("attention", "checks", "decoder", "falcon")),
    *("common.models.pretrained.families", "common.models.pretrained.gguf"),
    "common.native.llama_blocks",
    *("deploy.exchange.importing", "deploy.exchange.packaged"),
    *("deploy.instruct.elsewhere", "deploy.instruct.evaluation", "deploy.instruct.pipeline"),
    "deploy.reasoning.pipeline",
}
"""What imports `transformers` as it is imported: parts of pretrained models, and who needs them."""
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    """``a/b.py`` -> ``a.b``; a package's ``__init__.py`` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf8")
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(source: str) -> Iterator[str]:
    """Every imported name, dotted in full, wherever the import stands (functions too)."""
    for node in ast.walk(ast.parse(source)):
        yield from imported(node)


def imported(node: ast.AST) -> Iterator[str]:
    """What one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_once(source: str) -> Iterator[str]:
    """What is imported as the module is: nothing in functions, nothing for types alone."""
    waiting: list[ast.AST] = [*ast.parse(source).body]
    for node in waiting:
        yield from imported(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def reaching(library: str, sources: Mapping[str, str]) -> set[str]:
    """The modules whose import imports a library, by themselves or by others of ours."""
    named = {module: set(imports_at_once(source)) for module, source in sources.items()}
    found = {m for m, names in named.items() if any(n.split(".")[0] == library for n in names)}
    before = set[str]()
    while found != before:
        before = set(found)
        for module, names in named.items():
            if any(name in found or name.rpartition(".")[0] in found for name in names):
                found.add(module)
    return found


def against_direction(module: str, source: str) -> list[str]:
    """Imports of our own packages that go sideways or up."""
    package = module.split(".")[0]
    allowed = MAY_IMPORT[package] | {package}
    tops = {name: name.split(".")[0] for name in imports(source)}
    return [name for name, top in tops.items() if top in MAY_IMPORT and top not in allowed]


def against_layers(module: str, source: str) -> list[str]:
    """Imports inside a package that go to a room beside or above."""
    package, room = module.split(".")[:2]
    height = {name: h for h, names in enumerate(LAYERS[package]) for name in names}
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == package and other != room and height[other] >= height[room]:
            found.append(name)
    return found


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> those of our modules that it imports."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = set(imports(source))
        # `from a import b` names a module a.b, or something inside the module a.
        known = {n if n in sources else n.rpartition(".")[0] for n in names}
        found[module] = (known & sources.keys()) - {module}
    return found


def unsafe_loads(source: str) -> list[str]:
    """Imports of unpicklers, torch.load without weights_only=True, numpy with allow_pickle."""
    # A PickleBuffer hands bytes to a transport and loads nothing.
    named = set(imports(source)) - {"pickle.PickleBuffer"}
    found = [name for name in sorted(named) if name.split(".")[0] in UNPICKLERS]
    found += [name for name in imports(source) if name == "torch.load"]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        true = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value}
        if ast.unparse(node.func) == "torch.load" and "weights_only" not in true:
            found.append(ast.unparse(node))
        if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards(module: str) -> None:
    assert against_direction(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if "." in name])
def test_rooms_import_downwards(module: str) -> None:
    assert against_layers(module, SOURCES[module]) == []


@pytest.mark.parametrize("package", LAYERS)
def test_every_room_has_one_layer(package: str) -> None:
    rooms = {name.split(".")[1] for name in SOURCES if name.startswith(f"{package}.")}
    listed = [name for layer in LAYERS[package] for name in layer]
    assert sorted(listed) == sorted(rooms)


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_unpickled(module: str) -> None:
    assert unsafe_loads(SOURCES[module]) == []


def test_there_are_no_import_cycles() -> None:
    edges = graph(SOURCES)
    assert sum(map(len, edges.values())) > 100  # The graph is read at all.
    list(TopologicalSorter(edges).static_order())


def test_deepspeed_has_one_home() -> None:
    users = {
        module
        for module, source in SOURCES.items()
        if any(name.split(".")[0] == "deepspeed" for name in imports(source))
    }
    assert users == {"learner.zero.engine"}


def test_packages_have_empty_inits() -> None:
    folders = {path.parent for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    for folder in folders:
        assert (folder / "__init__.py").read_bytes() == b"", folder


def test_config_and_errors_import_without_torch_and_ray() -> None:
    assert loaded("import common.config.run, common.errors", "torch", "ray") == "set()\n"


def test_what_reads_runs_needs_neither_torch_nor_ray() -> None:
    assert loaded(f"import {', '.join(READING)}", "torch", "ray") == "set()\n"


def test_an_elastic_worker_of_palm_starts_without_compiler_and_library() -> None:
    """PyTorch's own functions import its compiler where nobody expects it."""
    code = """
from common.config.model import PalmConfig
from common.models.build import build_policy, build_scalar
import actors.generation.decoder_generator, actors.rollout_actor, reward_service.service
small = PalmConfig(vocab_size=9, dim=8, layers=1, heads=1, head_dim=8, context=8)
build_policy(small, empty=True), build_scalar(small, empty=True)
"""
    assert loaded(code, "torch._dynamo", "transformers", "deepspeed") == "set()\n"


def loaded(code: str, *names: str) -> str:
    """Which of some modules a process has that ran the code, as it prints them."""
    program = f"import sys\n{code}\nprint({{*{names}}} & {{*sys.modules}})"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_what_takes_seconds_is_imported_where_it_is_used() -> None:
    """A run of PaLM does without `transformers` in each of its processes."""
    assert reaching("transformers", SOURCES) == LIBRARY
    assert not reaching("deepspeed", SOURCES) & {*ELASTIC, *READING, "deploy.sampler"}
    for library in ("torch", "ray"):
        assert not reaching(library, SOURCES) & {*READING, "deploy.cli.main"}, library


def test_the_rule_of_what_is_imported_finds_what_breaks_it() -> None:
    sources = {
        "a": "from b import e",
        "b": "import b.c",
        "b.c": "class X:\n    import ray.util",
        "d": "if TYPE_CHECKING:\n    import ray\nelse:\n    import b",
        "e": "try:\n    from b import c\nexcept ImportError:\n    pass",
        "f": "def f():\n    import ray\nif TYPE_CHECKING:\n    from ray import x",
    }
    assert reaching("ray", sources) == {"a", "b", "b.c", "d", "e"}


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("common.x", "from deploy import cli", "deploy.cli"),
        ("actors.x", "def f():\n    import learner.algorithms.ppo", "learner.algorithms.ppo"),
        (
            "reward_service.x",
            "from actors.generation.engine import GenerationEngine",
            "actors.generation.engine.GenerationEngine",
        ),
        ("learner.x", "import deploy", "deploy"),
    ],
)
def test_the_direction_rule_finds_what_breaks_it(module: str, source: str, named: str) -> None:
    assert against_direction(module, source) == [named]


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("deploy.workers.x", "from deploy.control.ledger import Ledger", "Ledger"),
        ("deploy.stages.x", "def f():\n    import deploy.cli", "deploy.cli"),
        ("deploy.stages.x", "from deploy.evaluation import report", "report"),
        ("common.errors", "from common.wire.weights import Slice", "Slice"),
    ],
)
def test_the_room_rule_finds_what_breaks_it(module: str, source: str, named: str) -> None:
    (found,) = against_layers(module, source)
    assert found.endswith(named)
    assert not against_layers("deploy.stages.x", "from deploy.stages.y import z")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_pickle_rule_finds_what_breaks_it(source: str) -> None:
    assert unsafe_loads(source)
    assert not unsafe_loads("import torch\ntorch.load('x', weights_only=True)")


def test_the_cycle_rule_finds_a_cycle() -> None:
    with pytest.raises(CycleError):
        list(
            TopologicalSorter(
                graph({"a": "", "a.x": "from a import y", "a.y": "from a.x import f"})
            ).static_order()
        )
