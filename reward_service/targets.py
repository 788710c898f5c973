"""What can be told of a reward's target before any worker starts: a typo, a token that is not set.

A user's module is read and not imported: importing it may load a model, or take what is only there
in a worker. What reading does not tell (an import that fails, a name that is made by a call), the
first worker tells, and its refusal ends the run (`deploy.workers.hosted`).
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.config.rewards import EndpointComponent, FunctionComponent, RewardComponent
from common.errors import ConfigError
from reward_service.http_settings import require_url, token_of


def require_targets(components: Mapping[str, RewardComponent], *, here: bool) -> None:
    """Refuse components that no worker could start with.

    Args:
        components: of the score, by name.
        here: workers will have this process's environment, as those of a local cluster have.

    Raises:
        ConfigError: of the first such component.
    """
    for name, component in components.items():
        try:
            if isinstance(component, EndpointComponent):
                require_url(component.target)
                if here and component.token_env:
                    token_of(component.token_env)
            elif isinstance(component, FunctionComponent) and here:
                require_function(component.target)
        except ConfigError as error:
            raise ConfigError(f"reward_service.components.{name}: {error}") from None


def require_function(target: str, role: str = "reward function") -> None:
    """Refuse ``package.module:function`` where it can be read that there is no such function.

    Raises:
        ConfigError: no such module or name, or the module is no Python.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{role} '{target}': write it as package.module:function")
    try:
        source = source_of(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{role} '{target}': {error}") from None
    if source is None or source.suffix != ".py":
        return
    try:
        tree = ast.parse(source.read_bytes(), str(source))
    except SyntaxError as error:
        place = f"{source}:{error.lineno or 1}"
        raise ConfigError(f"{role} '{target}': {place}: {error.msg}") from None
    except OSError:
        return  # a worker says why it cannot be read
    names = set(_bound(tree.body))
    if name not in names and not names & {"*", "__getattr__"} and not _makes_names(tree):
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"{role} '{target}': {module_name} ({source}) has no '{name}'{hint}")


def source_of(module: str) -> Path | None:
    """Find a module's file without importing it or its packages; None where it has none.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    places: Sequence[str] | None = None
    origin: str | None = None
    names = module.split(".")
    for depth in range(len(names)):
        name = ".".join(names[: depth + 1])
        found = (finder.find_spec(name, places) for finder in sys.meta_path)
        spec = next(filter(None, found), None)
        if spec is None:
            raise ModuleNotFoundError(
                f"no module named '{name}' in the working folder or on Python's path"
            )
        places, origin = spec.submodule_search_locations or [], spec.origin
    return Path(origin) if origin and Path(origin).is_file() else None


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Yield every name that a module's statements bind, inside `if`, `try`, `with` and loops too.

    ``*`` stands for whatever another module has.
    """
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield (alias.asname or alias.name).partition(".")[0]
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
            for inner in ast.iter_child_nodes(statement):
                yield from _bound_in(inner)
            for field in ("body", "orelse", "finalbody"):
                yield from _bound(getattr(statement, field, []))


def _bound_in(node: ast.AST) -> Iterator[str]:
    """Yield what the handlers of a `try` and the cases of a `match` bind."""
    if isinstance(node, ast.ExceptHandler | ast.match_case):
        yield from _bound(node.body)


def _makes_names(tree: ast.Module) -> bool:
    """Whether a module may bind names that are nowhere written in it."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    made = {"globals", "exec", "setattr", "vars", "eval"}
    return any(isinstance(called, ast.Name) and called.id in made for called in calls)
