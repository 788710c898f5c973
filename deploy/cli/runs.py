"""Commands that take a run's folder: they look at it, steer it, or use what it has trained.

Heavy imports stand inside the commands, so that `talipot --help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.config.effects import require_evaluated
from common.errors import ConfigError
from deploy.cli.shared import (
    AddressOption,
    CheckpointOption,
    Overrides,
    RunArgument,
    app,
    console,
    note,
    of_run,
    print_numbers,
)
from deploy.screen import Part, keep_shown, say, show


@app.command()
def replay(run: RunArgument, address: AddressOption = None) -> None:
    """Train again on a finished run's trajectory log; the weights must come out the same."""
    from deploy.stages.replay import replay_run

    found = replay_run(of_run(run, None, address), console)
    shown = {"weights": "the same as the run's, bit for bit", "iterations": found["iterations"]}
    print_numbers("replay", shown | {"hash": found["replayed_hash"]})


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
    config = of_run(run, overrides, address)
    print_numbers("evaluation", figures_of(evaluate_run(config, console, checkpoint)))


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
    config = config_of_exported(run, overrides) if weights else of_run(run, overrides, None)
    sampler = Sampler(config, sft=sft, checkpoint=checkpoint, exported=weights)
    note(sampler.note)
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

    sampler = Sampler(of_run(run, None, None), sft=sft, checkpoint=checkpoint)
    note(sampler.note)
    conversation = Conversation(sampler, system, seed)
    say(console, ("an empty line or Ctrl-D ends", "dim"))
    for line in sys.stdin:
        if not line.strip():
            return
        show(console, conversation.say(line.rstrip("\n")))


@app.command()
def samples(
    run: RunArgument,
    iteration: Annotated[
        int | None, typer.Option(min=0, help="Which iteration; left out, the newest.")
    ] = None,
    order: Annotated[
        str, typer.Option(help="What comes first: best, worst, kl, longest, first or random.")
    ] = "random",
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many.")] = 4,
    rollout: Annotated[str, typer.Option(help="This one alone, by its name.")] = "",
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object each.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order random.")] = 0,
) -> None:
    """Show responses that a run was trained on; needs its folder alone."""
    from common.data.tokenizer import load_tokenizer
    from deploy.samples import COLUMNS, head_of, iteration_of, read_iteration, rows_of
    from deploy.screen import table

    config = of_run(run, None, None)
    if rollout and iteration is None:
        iteration = iteration_of(rollout)
    logged = read_iteration(config, iteration)
    tokenizer = load_tokenizer(config.folder.tokenizer) if tokens else None
    chosen = (
        [logged.sample(rollout, tokenizer)]
        if rollout
        else logged.samples(order=order, number=number, seed=seed, tokenizer=tokenizer)
    )
    for sample in chosen:
        if as_json:
            show(console, json.dumps(asdict(sample)))
            continue
        say(console, *head_of(sample))
        show(console, sample.prompt, "dim")
        if tokens:
            table(console, COLUMNS, rows_of(sample))
        else:
            show(console, sample.response)
        say(console)


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until the run ends.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Ask the run's controller, in its cluster, too.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """Show how far a run is, by its folder: live while it works. Asks no cluster without --live."""
    from deploy.standing import lines_of, standing_of

    config = of_run(run, None, None)
    if watch and (as_json or live):
        raise ConfigError(f"give {'--json' if as_json else '--live'} or --watch, not both")
    if address and not live:
        raise ConfigError("--address says where --live asks; give both")
    if live:
        from deploy.commands import ask_standing

        standing = ask_standing(config, address)
    elif not watch:
        standing = standing_of(config)
    if as_json:
        show(console, json.dumps(asdict(standing)))
    elif watch:

        def look() -> tuple[list[list[Part]], bool]:
            standing = standing_of(config)
            return lines_of(standing), standing.state != "running"

        with suppress(KeyboardInterrupt):  # the way to leave it
            keep_shown(console, look)
    else:
        for line in lines_of(standing):
            say(console, *line)


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or one they lie in.", metavar="RUN...")
    ],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Left out, the first free one from 8990.")
    ] = None,
) -> None:
    """Show runs on a live page, by their folders alone; Ctrl-C ends it."""
    import asyncio

    from deploy.watch.server import runs_in, serve

    watched = runs_in(runs, note)
    say(console, f"watching {', '.join(run.name for run in watched)}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):  # the way to leave it
        asyncio.run(serve(watched, host, port, lambda url: say(console, (url, "bold"))))


@app.command()
def monitor(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder; left out, this machine's cluster.")
    ] = None,
    address: AddressOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 9090,
) -> None:
    """Start Prometheus over a cluster, with Talipot's rules; Ctrl-C ends it."""
    from deploy.monitoring.monitor import monitor as watch_over

    config = None if run is None else of_run(run, None, None)
    with suppress(KeyboardInterrupt):  # the way to leave it
        watch_over(config, address, port, lambda text: say(console, text))


@app.command()
def scale(
    run: RunArgument,
    actors: Annotated[int | None, typer.Option(min=1, help="Rollout actors.")] = None,
    reward_replicas: Annotated[int | None, typer.Option(min=1, help="Reward workers.")] = None,
    address: AddressOption = None,
) -> None:
    """Change the number of workers of a run while it runs; returns at once."""
    from deploy.commands import scale_run

    for change in scale_run(of_run(run, None, None), actors, reward_replicas, address):
        say(console, f"{change.kind} workers: {change.was} -> {change.will_be}")


@app.command()
def report(run: RunArgument) -> None:
    """Write a run's report.html."""
    from deploy.evaluation.report import write_report
    from deploy.tasks import task_of

    config = of_run(run, None, None)
    say(console, f"report: {write_report(config.run_dir, task_of(config).report(config), config)}")


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

    comparison = compare_runs([of_run(run, None, None) for run in runs])
    table(console, COLUMNS, list(comparison.rows()))
    fields_of_runs(console, comparison.names, comparison.differences)
    page = output or Path(os.path.expanduser(runs[0])).absolute().parent / "compare.html"
    write_comparison(comparison, page)
    say(console, "curves: ", (str(page), "bold"))


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

    facts = export_run(of_run(run, None, None), target, checkpoint, to, precision)
    print_numbers(str(target), facts)
