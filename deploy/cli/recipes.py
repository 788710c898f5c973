"""Commands that take a recipe: they begin a run, or look at what would begin.

Heavy imports stand inside the commands, so that `talipot --help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.cli.shared import (
    AddressOption,
    ConfigOption,
    Overrides,
    app,
    console,
    load,
    of_run,
    place,
    print_numbers,
    recipe_file,
    run_stage,
)
from deploy.screen import at_work, say, show

if TYPE_CHECKING:
    from deploy.stages.session import Session

ResumeOption = Annotated[Path | None, typer.Option(help="Carry on with this run's folder.")]


@app.command()
def quickstart(
    overrides: Overrides = None, config: ConfigOption = "quickstart", address: AddressOption = None
) -> None:
    """Run a whole pipeline on data that it makes itself; takes some minutes."""
    from deploy.stages.session import open_session
    from deploy.tasks import task_of
    from deploy.workers.preflight import require_scorers, require_trainable

    resolved = load(config, overrides, address)
    if resolved.evaluate.every:
        raise ConfigError(
            "evaluate.every has no effect on talipot quickstart, whose own data has no held-out "
            "prompts for it: it evaluates at the end; leave it out"
        )
    task = task_of(resolved)
    task.prepare(resolved, console)
    require_trainable(resolved)
    require_scorers(resolved)
    with open_session(resolved, console, writer="quickstart") as session:
        task.run(session)
        say(console, "report: ", (str(session.folder.report), "bold"))


@app.command()
def sft(
    overrides: Overrides = None,
    config: ConfigOption = None,
    address: AddressOption = None,
    resume: ResumeOption = None,
) -> None:
    """Train the supervised policy on demonstrations; goes on where it was interrupted."""
    from deploy.stages.supervised import run_sft

    run_stage("sft", run_sft, _chosen(config, resume, overrides, address), writer="sft")


@app.command()
def reward(
    overrides: Overrides = None,
    config: ConfigOption = None,
    address: AddressOption = None,
    resume: ResumeOption = None,
) -> None:
    """Train the reward model on comparisons, on top of the run's supervised policy.

    Goes on where it was interrupted.
    """
    from deploy.stages.supervised import run_reward

    run_stage("reward", run_reward, _chosen(config, resume, overrides, address), writer="reward")


def _chosen(
    config: str | None, resume: Path | None, overrides: list[str] | None, address: str | None
) -> RunConfig:
    """Return the recipe that was named, or that of the run to go on with."""
    if resume is None:
        return load(config, overrides, address)
    if config:
        raise ConfigError("--resume takes all from the run itself: leave --config out")
    return of_run(resume, overrides, address)


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    address: AddressOption = None,
    resume: ResumeOption = None,
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
        resolved = reused_from(source, recipe_file(config), overrides or [], place(address))
    elif resume is not None:
        resolved = of_run(resume, overrides, address)
    else:
        resolved = load(config, overrides, address)
    resumption = resumption_of(resolved)
    if at_work(resolved.run_dir) is None:
        require_scorers(resolved)
        tell(console, resolved, resumption)
    if resumption.facts is None:
        # The command may only attach to a run that is at work, and then it writes nothing.

        def train_it(session: Session, config: RunConfig) -> dict[str, Any]:
            facts = run_train(session, config, stop_after=stop_after, resumption=resumption)
            return outcome_of(session.config, facts)

        run_stage("train", train_it, resolved, attach=True, address=address)


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

    resolved = load(config, overrides, address)
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
def plan(
    overrides: Overrides = None,
    config: ConfigOption = None,
    gpu: Annotated[
        str, typer.Option(help="Every worker has one: a100, h100, h200, b200 or l40s.")
    ] = "",
    prompt: Annotated[
        float | None, typer.Option(help="Mean tokens of a prompt; default what there is room for.")
    ] = None,
    response: Annotated[
        float | None, typer.Option(help="Mean tokens of a response; default the most allowed.")
    ] = None,
    json_too: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Estimate memory and seconds of a recipe, on GPUs that you name or on this machine."""
    import json

    from deploy.planning.hardware import CARDS, this_processor
    from deploy.planning.plan import plan_of

    if gpu and gpu not in CARDS:
        raise ConfigError(f"--gpu {gpu}: is one of {', '.join(CARDS)}")
    resolved = load(config, overrides, None)
    device = CARDS[gpu] if gpu else this_processor()
    made = plan_of(resolved, device, prompt=prompt, response=response)
    if json_too:
        show(console, json.dumps(made.as_json(), indent=1))
        return
    for line in made.lines():
        say(console, ("✓", "green"), f" {line}")
    for advice in made.advice:
        say(console, ("!", "yellow"), f" {advice}")


@app.command()
def validate(
    overrides: Overrides = None, config: ConfigOption = None, address: AddressOption = None
) -> None:
    """Check a recipe, its data and all that it names, in seconds and without a cluster."""
    from deploy.validation.validate import validate as look

    findings = look(recipe_file(config), overrides or [], place(address))
    for fact in findings.facts:
        say(console, ("✓", "green"), f" {fact}")
    for finding in findings.found:
        color = "bold red" if finding.severity == "error" else "yellow"
        say(console, (finding.severity, color), f" {finding}")
    if wrong := len(findings.errors()):
        raise ConfigError(f"{wrong} thing{'s' if wrong > 1 else ''} to mend before this can run")
    say(console, ("✓", "green"), " nothing stands in the way")


@app.command("config")
def show_config(overrides: Overrides = None, config: ConfigOption = None) -> None:
    """Print a recipe with every default filled in, and what its checkpoints say as comments."""
    from common.config.recipe import dump_config
    from deploy.exchange.checkpoint_facts import lines_of

    resolved = load(config, overrides, None)
    show(console, dump_config(resolved).rstrip("\n"))
    for line in lines_of(resolved):
        show(console, f"# {line}")


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
    print_numbers(str(target), facts)
