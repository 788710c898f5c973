"""The command line: every command; how one ends is in `deploy.exits`.

Heavy imports stand inside the commands, so that `talipot --help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from common.config.effects import require_evaluated
from common.config.recipe import load_config
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.exits import run_to_end
from deploy.screen import (
    Part,
    at_work,
    keep_shown,
    make_console,
    say,
    show,
)

if TYPE_CHECKING:
    from deploy.stages.session import Session

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
Stage = Callable[["Session", RunConfig], Mapping[str, Any]]
"""A stage of a run: trains something in a session, and returns numbers to print."""


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


@app.command()
def quickstart(
    overrides: Overrides = None, config: ConfigOption = "quickstart", address: AddressOption = None
) -> None:
    """Run a whole pipeline on data that it makes itself; takes some minutes."""
    from deploy.stages.session import open_session
    from deploy.tasks import task_of
    from deploy.workers.preflight import require_scorers, require_trainable

    resolved = _load(config, overrides, address)
    task = task_of(resolved)
    task.prepare(resolved, console)
    require_trainable(resolved)
    require_scorers(resolved)
    with open_session(resolved, console, writer="quickstart") as session:
        task.run(session)
        say(console, "report: ", (str(session.folder.report), "bold"))


@app.command()
def sft(
    overrides: Overrides = None, config: ConfigOption = None, address: AddressOption = None
) -> None:
    """Train the supervised policy on demonstrations."""
    from deploy.stages.supervised import run_sft

    _stage("sft", run_sft, _load(config, overrides, address), writer="sft")


@app.command()
def reward(
    overrides: Overrides = None, config: ConfigOption = None, address: AddressOption = None
) -> None:
    """Train the reward model on comparisons; needs the run's supervised policy."""
    from deploy.stages.supervised import run_reward

    _stage("reward", run_reward, _load(config, overrides, address), writer="reward")


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    address: AddressOption = None,
    resume: Annotated[Path | None, typer.Option(help="Carry on with this run's folder.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with this run's tokenizer, supervised policy and reward model, and, "
            "without --config, its recipe; name=NAME is the new run's.",
        ),
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop after this iteration, with a checkpoint.")
    ] = None,
) -> None:
    """Train the policy from prompts and rewards; resumes where the run's checkpoint stands."""
    from deploy.run_folder.lock import at_work
    from deploy.run_folder.reuse import reused_from
    from deploy.stages.policy import outcome_of, resumption_of, run_train, tell
    from deploy.workers.preflight import require_scorers

    if resume is not None and (config or source):
        raise ConfigError("--resume takes all from the run itself: leave --config and --from out")
    if source is not None:
        resolved = reused_from(source, _recipe(config), overrides or [], _place(address))
    elif resume is not None:
        resolved = _of_run(resume, overrides, address)
    else:
        resolved = _load(config, overrides, address)
    resumption = resumption_of(resolved)
    if at_work(resolved.run_dir) is None:
        require_scorers(resolved)
        tell(console, resolved, resumption)
    if resumption.facts is None:
        # The command may only attach to a run that is at work, and then it writes nothing.

        def train_it(session: Session, config: RunConfig) -> dict[str, Any]:
            facts = run_train(session, config, stop_after=stop_after, resumption=resumption)
            return outcome_of(session.config, facts)

        _stage("train", train_it, resolved, attach=True, address=address)


@app.command()
def replay(run: RunArgument, address: AddressOption = None) -> None:
    """Train again on a finished run's trajectory log; the weights must come out the same."""
    from deploy.stages.replay import replay_run

    found = replay_run(_of_run(run, None, address), console)
    shown = {"weights": "the same as the run's, bit for bit", "iterations": found["iterations"]}
    _print_numbers("replay", shown | {"hash": found["replayed_hash"]})


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Overrides = None,
    address: AddressOption = None,
    checkpoint: CheckpointOption = None,
) -> None:
    """Compare a run's trained policy with its supervised one on held-out prompts."""
    from deploy.commands import evaluate_run
    from deploy.evaluation.results import figures_of

    require_evaluated(overrides or [])
    config = _of_run(run, overrides, address)
    _print_numbers("evaluation", figures_of(evaluate_run(config, console, checkpoint)))


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt text; repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, as for train.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.")
    ] = None,
    checkpoint: CheckpointOption = None,
    sft: Annotated[bool, typer.Option("--sft", help="Sample the supervised policy.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    number: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; left out, the recipe's.")
    ] = None,
) -> None:
    """Sample a run's policy, or an exported one, in this process; no cluster needed."""
    from common.data.records import read_prompts
    from deploy.exchange.exported import config_of_exported, exported_policy
    from deploy.sampler import Sampler, prompts_of, write_answers

    if bool(prompt) == (prompts is not None):
        raise ConfigError("give --prompt TEXT, as often as you like, or --prompts FILE")
    overrides = [] if temperature is None else [f"rollout.temperature={temperature}"]
    asked = list(read_prompts([str(prompts)])) if prompts else prompts_of(prompt or [])
    weights = exported_policy(run)
    config = config_of_exported(run, overrides) if weights else _of_run(run, overrides, None)
    sampler = Sampler(config, sft=sft, checkpoint=checkpoint, exported=weights)
    _note(sampler.note)
    answers = sampler.answers(asked, seed, number)
    if output is not None:
        say(console, f"{output}: {write_answers(answers, output)} responses")
        return
    for answer in answers:
        if answer.sample == 0:
            show(console, answer.prompt.text, "dim")
        show(console, answer.response)


@app.command()
def chat(
    run: RunArgument,
    system: Annotated[str, typer.Option(help="Begin with these instructions.")] = "",
    checkpoint: CheckpointOption = None,
    sft: Annotated[bool, typer.Option("--sft", help="Talk to the supervised policy.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
) -> None:
    """Talk to a run's policy, a line each; an empty line or Ctrl-D ends."""
    from deploy.sampler import Conversation, Sampler

    sampler = Sampler(_of_run(run, None, None), sft=sft, checkpoint=checkpoint)
    _note(sampler.note)
    conversation = Conversation(sampler, system, seed)
    say(console, ("an empty line or Ctrl-D ends", "dim"))
    for line in sys.stdin:
        if not line.strip():
            return
        show(console, conversation.say(line.rstrip("\n")))


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the run ends.")] = False,
) -> None:
    """Show how far a run is, by its folder: live while it works. Asks no cluster."""
    from deploy.standing import lines_of, standing_of

    config = _of_run(run, None, None)
    if as_json and watch:
        raise ConfigError("give --json or --watch, not both")
    if as_json:
        show(console, json.dumps(asdict(standing_of(config))))
    elif watch:

        def look() -> tuple[list[list[Part]], bool]:
            standing = standing_of(config)
            return lines_of(standing), standing.state != "running"

        with suppress(KeyboardInterrupt):  # the way to leave it
            keep_shown(console, look)
    else:
        for line in lines_of(standing_of(config)):
            say(console, *line)


@app.command()
def scale(
    run: RunArgument,
    actors: Annotated[int | None, typer.Option(min=1, help="Rollout actors.")] = None,
    reward_replicas: Annotated[int | None, typer.Option(min=1, help="Reward workers.")] = None,
    address: AddressOption = None,
) -> None:
    """Change the number of workers of a run while it runs; returns at once."""
    from deploy.commands import scale_run

    for change in scale_run(_of_run(run, None, None), actors, reward_replicas, address):
        say(console, f"{change.kind} workers: {change.was} -> {change.will_be}")


@app.command()
def report(run: RunArgument) -> None:
    """Write a run's report.html."""
    from deploy.evaluation.report import write_report
    from deploy.tasks import task_of

    config = _of_run(run, None, None)
    say(console, f"report: {write_report(config.run_dir, task_of(config).report, config)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN RUN...")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; compare.html beside the runs.")
    ] = None,
) -> None:
    """Compare runs: outcome, seconds, KL, and what differs; also as a page with curves."""
    from deploy.evaluation.several import COLUMNS, compare_runs, write_comparison
    from deploy.screen import fields_of_runs, table

    comparison = compare_runs([_of_run(run, None, None) for run in runs])
    table(console, COLUMNS, list(comparison.rows()))
    fields_of_runs(console, comparison.names, comparison.differences)
    page = output or Path(os.path.expanduser(runs[0])).absolute().parent / "compare.html"
    write_comparison(comparison, page)
    say(console, "curves: ", (str(page), "bold"))


@app.command()
def preflight(
    overrides: Overrides = None, config: ConfigOption = None, address: AddressOption = None
) -> None:
    """Explain what a recipe needs against what the cluster has."""
    import ray

    from deploy.tasks import task_of
    from deploy.workers.attach import cluster_of
    from deploy.workers.memory import needs
    from deploy.workers.preflight import explain, require_scorers, require_trainable

    resolved = _load(config, overrides, address)
    require_trainable(resolved)
    require_scorers(resolved)
    missing = task_of(resolved).missing(resolved)
    with cluster_of(resolved):
        resources_now: dict[str, float] = ray.cluster_resources()
        for line in explain(resolved, resources_now, sized=not missing):
            say(console, ("✓", "green"), f" {line}")
    for need in [] if missing else needs(resolved, "train"):
        say(console, ("✓", "green"), f" memory of {need}")
    if missing:
        say(console, ("!", "yellow"), f" {missing}")


@app.command()
def validate(
    overrides: Overrides = None, config: ConfigOption = None, address: AddressOption = None
) -> None:
    """Check a recipe, its data and all that it names, in seconds and without a cluster."""
    from deploy.validation.validate import validate as look

    findings = look(_recipe(config), overrides or [], _place(address))
    for fact in findings.facts:
        say(console, ("✓", "green"), f" {fact}")
    for finding in findings.found:
        color = "bold red" if finding.severity == "error" else "yellow"
        say(console, (finding.severity, color), f" {finding}")
    if wrong := len(findings.errors()):
        raise ConfigError(f"{wrong} thing{'s' if wrong > 1 else ''} to mend before this can run")
    say(console, ("✓", "green"), " nothing stands in the way")


@app.command("import")
def import_model(
    source: Annotated[
        str, typer.Argument(help="A GGUF file, a folder, or a name in the Hub's cache here.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    precision: Annotated[
        str | None, typer.Option(help="Number type of the weights: fp32, bf16 or fp16.")
    ] = None,
) -> None:
    """Make a folder that `model.start` takes out of a pretrained model; fetches nothing."""
    from deploy.exchange.importing import import_model as make

    with at_work(console, f"importing {source}"):
        facts = make(source, target, precision)
    _print_numbers(str(target), facts)


@app.command()
def export(
    run: RunArgument,
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    checkpoint: CheckpointOption = None,
    to: Annotated[
        str, typer.Option(help="folder: as policy/; merged: all weights alone; adapter: PEFT's.")
    ] = "folder",
    precision: Annotated[
        str | None, typer.Option(help="Number type of the weights: fp32, bf16 or fp16.")
    ] = None,
) -> None:
    """Write a policy of a run for others, from any of its checkpoints; no cluster needed."""
    from deploy.exchange.exporting import export_run

    facts = export_run(_of_run(run, None, None), target, checkpoint, to, precision)
    _print_numbers(str(target), facts)


@app.command("config")
def show_config(overrides: Overrides = None, config: ConfigOption = None) -> None:
    """Print a recipe with every default filled in, and what its checkpoints say as comments."""
    from common.config.recipe import dump_config
    from deploy.exchange.checkpoint_facts import lines_of

    resolved = _load(config, overrides, None)
    show(console, dump_config(resolved).rstrip("\n"))
    for line in lines_of(resolved):
        show(console, f"# {line}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, and turn errors into one line and an exit code."""
    run_to_end(app, arguments, errors)


# -------------------------------------------------------------------------- helpers


def _stage(
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
        with session.stage("tokenizer", "tokenizer"):
            resolved = prepare_tokenizer(session, session.config)
        with session.stage(name, name):
            numbers = run(session, resolved)
    _print_numbers(f"{resolved.run_dir}: {name}", numbers)


def _load(config: str | None, overrides: list[str] | None, address: str | None) -> RunConfig:
    """Load a recipe, a path or a built-in's name, and apply overrides and the address."""
    return load_config(_recipe(config), overrides or [], _place(address))


def _recipe(config: str | None) -> Path | None:
    """Return the file of a recipe; of a built-in one by its name."""
    path = None if config is None else Path(os.path.expanduser(config))
    if path is not None and not path.exists():
        built_in = resources.files("deploy.recipes") / f"{config}.yaml"
        path = Path(str(built_in)) if built_in.is_file() else path
    return path


def _of_run(run: Path, overrides: list[str] | None, address: str | None) -> RunConfig:
    from deploy.run_folder.folder import config_of

    return config_of(run, overrides or [], _place(address))


def _note(text: str) -> None:
    """Tell the user something beside the output, which stays what was asked for."""
    if text:
        say(errors, (text, "yellow"))


def _place(address: str | None) -> dict[str, str]:
    return {"cluster.address": address} if address else {}


def _print_numbers(title: str, numbers: Mapping[str, Any]) -> None:
    say(console, (title, "italic"))
    width = max((len(key) for key in numbers), default=0)
    for key, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        say(console, f" {key:<{width}}  ", (shown, "bold"))


if __name__ == "__main__":
    main()
