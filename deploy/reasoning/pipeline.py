"""The recipe `reasoning`: a pretrained chat model learns tasks whose answers a library verifies.

import -> names of tasks -> sft on answers of the library's -> policy (its verifier as the reward)
       -> its verifier on held-out seeds
"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec

from rich.console import Console

from common.config.run import RunConfig
from common.errors import ConfigError
from common.files import write_atomic
from deploy.evaluation.memory import Resident
from deploy.evaluation.report import write_report
from deploy.exchange.packaged import bring_model, to_import
from deploy.reasoning.evaluation import evaluate
from deploy.reasoning.outcome import Outcome, presentation
from deploy.reasoning.task import held_out, require_tasks, taught, with_data
from deploy.screen import say
from deploy.stages import policy, preparation, supervised
from deploy.stages.session import Session


def prepare(config: RunConfig, console: Console) -> None:
    """Make what has to be there before a session opens: the model, where it is not there yet.

    Raises:
        ConfigError: the library, the model or the package that brings it is not there.
        DataError: a family or an option is none of the library's.
    """
    if without := _without_library():
        raise ConfigError(without)
    require_tasks(config)
    bring_model(config, console)


def missing(config: RunConfig) -> str:
    """Say what is not there yet and what brings it; empty where all is."""
    return _without_library() or to_import(config)


def _without_library() -> str:
    if find_spec("reasoning_gym") is not None:
        return ""
    return (
        "quickstart.kind=reasoning: needs the package reasoning-gym; run "
        "`pip install 'talipot[reasoning]'`"
    )


def run_reasoning(session: Session) -> Outcome:
    """Run every stage; writes summary.json, samples.jsonl and report.html."""
    begin = time.perf_counter()
    session.lock("quickstart")
    config, console = with_data(session.config), session.console
    with Resident() as memory:
        with session.stage("data", "made tasks"):
            asked = held_out(config)
            config = preparation.prepare_tokenizer(session, config)
        for part in asked:
            out = f" ({part.overlapping} are in training too)" if part.overlapping else ""
            say(console, f"  {part.family}: {len(part.prompts)} held-out questions{out}")
        if taught(config):
            with session.stage("sft", "trained the supervised policy"):
                sft = supervised.once(session, config, "sft")
                say(console, f"  held-out loss {sft['heldout_loss']:.3f} nats per token")
        pools = policy.start_pools(session, config)
        with session.stage("train", "trained the policy"):
            resumption = policy.resumption_of(config)
            policy.tell(console, config, resumption)
            trained = resumption.facts or policy.run_train(session, config, pools)
        session.lock("quickstart")
        found = evaluate(session, config, asked, pools)
    outcome = Outcome(
        evaluation=found,
        trained=trained,
        resident_gb=memory.peak_gb,
        seconds={**session.seconds, "pipeline": time.perf_counter() - begin},
    )
    write_atomic(session.folder.summary, [json.dumps(outcome.figures(), indent=1).encode()])
    write_report(session.run_dir, presentation(list(found.rise)), config)
    return outcome
