"""What the commands share: the command line itself, consoles, options, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.config.recipe import load_config
from common.config.run import RunConfig
from deploy.screen import make_console, say, show

if TYPE_CHECKING:
    from deploy.stages.session import Session

Stage = Callable[["Session", RunConfig], Mapping[str, Any]]
"""A stage of a run: trains something in a session, and returns numbers to print."""

app = typer.Typer(name="talipot", pretty_exceptions_enable=False, invoke_without_command=True)

console = make_console()
errors = make_console(stderr=True)

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="Recipe: a YAML file, or a built-in's name.")
]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster to join.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value ...")]
RunArgument = Annotated[Path, typer.Argument(help="A run's folder.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="Which policy: a checkpoint's iteration, latest, best or final; left out, the final "
        "one or else the latest."
    ),
]


@app.callback()
def talipot(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train language models from human feedback on Ray and DeepSpeed."""
    if version:
        show(console, f"talipot {metadata.version('talipot')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.get_help()  # which prints it


def load(config: str | None, overrides: list[str] | None, address: str | None) -> RunConfig:
    """Load a recipe, a path or a built-in's name, and apply overrides and the address."""
    return load_config(recipe_file(config), overrides or [], place(address))


def recipe_file(config: str | None) -> Path | None:
    """Return the file of a recipe; of a built-in one by its name."""
    path = None if config is None else Path(os.path.expanduser(config))
    if path is not None and not path.exists():
        built_in = resources.files("deploy.recipes") / f"{config}.yaml"
        path = Path(str(built_in)) if built_in.is_file() else path
    return path


def of_run(run: Path, overrides: list[str] | None, address: str | None) -> RunConfig:
    """Load the recipe that a run's folder holds, and apply overrides and the address.

    Raises:
        ConfigError: the folder is no run's.
    """
    from deploy.run_folder.folder import config_of

    return config_of(run, overrides or [], place(address))


def note(text: str) -> None:
    """Tell the user something beside the output, which stays what was asked for."""
    if text:
        say(errors, (text, "yellow"))


def place(address: str | None) -> dict[str, str]:
    """Return what --address sets of a recipe."""
    return {"cluster.address": address} if address else {}


def print_numbers(title: str, numbers: Mapping[str, Any]) -> None:
    """Print what a command found, a number a line."""
    say(console, (title, "italic"))
    width = max((len(key) for key in numbers), default=0)
    for key, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        say(console, f" {key:<{width}}  ", (shown, "bold"))


def run_stage(
    name: str,
    run: Stage,
    config: RunConfig,
    *,
    writer: str = "",
    attach: bool = False,
    address: str | None = None,
) -> None:
    """Run one stage in a session of its own, opened by these options, and print its numbers."""
    from deploy.run_folder.lock import at_work
    from deploy.stages.preparation import prepare_tokenizer
    from deploy.stages.session import open_session
    from deploy.validation.validate import require_stage

    if at_work(config.run_dir) is None:
        require_stage(config, name)
    opened = open_session(config, console, writer=writer, attach=attach, address=address)
    with opened as session:
        with session.stage("tokenizer", "tokenizer", least_s=1.0):
            resolved = prepare_tokenizer(session, session.config)
        with session.stage(name, name):
            numbers = run(session, resolved)
    print_numbers(f"{resolved.run_dir}: {name}", numbers)
