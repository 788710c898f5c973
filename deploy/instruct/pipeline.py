"""The recipe `instruct`: a pretrained chat model learns to keep to verifiable instructions.

import -> prompts -> answers of the model, rewritten -> sft on them -> policy (a reward of ours)
       -> IFEval's judge -> what it cost elsewhere
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from common.config.model import PretrainedConfig
from common.config.quickstart import InstructConfig
from common.config.run import DataConfig, RunConfig
from common.errors import ConfigError
from common.files import write_atomic
from common.run_folder import DataFolder
from deploy.evaluation.answering import answers, apart
from deploy.evaluation.memory import Resident
from deploy.evaluation.report import write_report
from deploy.exchange.packaged import bring_model
from deploy.instruct import judge
from deploy.instruct.demonstrations import write_demonstrations
from deploy.instruct.evaluation import encoded, evaluate
from deploy.instruct.outcome import IN_REPORT, Outcome
from deploy.instruct.task import Task, make_task, write_prompts
from deploy.screen import say
from deploy.stages import policy, preparation, supervised
from deploy.stages.session import Session


def prepare(config: RunConfig, console: Console) -> None:
    """Make what has to be there before a session opens: the model, where it is not there yet.

    Raises:
        ConfigError: the judge or the model is not there, nor the package that brings it.
    """
    judge.registry()  # what is missing is said before anything begins
    bring_model(config, console)


def run_instruct(session: Session) -> Outcome:
    """Run every stage; writes summary.json, samples.jsonl and report.html."""
    begin = time.perf_counter()
    session.lock("quickstart")
    config, console = session.config, session.console
    settings = config.quickstart
    assert isinstance(settings, InstructConfig)
    with Resident() as memory:
        with session.stage("data", "made prompts"):
            task = make_task(settings, config.seed)
            config = with_data(config, session.folder.data)
            session.folder.data.path.mkdir(parents=True, exist_ok=True)
            write_prompts(session.folder.data.prompts, [ask.text for ask in task.train])
            config = preparation.prepare_tokenizer(session, config)
        say(console, f"  {len(task.train)} prompts")
        if settings.demonstrations:
            _teach(session, config, task)
        pools = policy.start_pools(session, config)
        with session.stage("train", "trained the policy"):
            resumption = policy.resumption_of(config)
            policy.tell(console, config, resumption)
            trained = resumption.facts or policy.run_train(session, config, pools)
        session.lock("quickstart")
        found = evaluate(session, config, task, pools)
    outcome = Outcome(
        evaluation=found,
        trained=trained,
        resident_gb=memory.peak_gb,
        seconds={**session.seconds, "pipeline": time.perf_counter() - begin},
    )
    write_atomic(session.folder.summary, [json.dumps(outcome.figures(), indent=1).encode()])
    write_report(session.run_dir, IN_REPORT, config)
    return outcome


def _teach(session: Session, config: RunConfig, task: Task) -> None:
    """Train on the model's own answers, made to keep to their instructions.

    Raises:
        DataError: hardly any answer could be rewritten.
    """
    settings, path = config.quickstart, session.folder.data.demonstrations
    assert isinstance(settings, InstructConfig) and isinstance(config.model, PretrainedConfig)
    asks = task.train[: settings.demonstrations]
    with session.stage("answer", "made demonstrations of the model's own answers"):
        if not path.exists():
            prompts = encoded(session, config, "asked", [ask.text for ask in asks])
            start = Path(config.model.start)
            said = apart(config.rollout, answers, config, start, prompts, label="answer")
            count = write_demonstrations(path, asks, said.texts)
            say(session.console, f"  {count} of {len(asks)} answers")
    data = DataConfig(demonstrations=(str(path),), too_long="skip")
    with session.stage("sft", "trained the supervised policy"):
        sft = supervised.once(session, config.model_copy(update={"data": data}), "sft")
        say(session.console, f"  held-out loss {sft['heldout_loss']:.3f} nats per token")


def with_data(config: RunConfig, folder: DataFolder) -> RunConfig:
    """Return the config with the prompts that the task writes.

    Raises:
        ConfigError: it names other files, which would not be read.
    """
    data = DataConfig(prompts=(str(folder.prompts),))
    if config.data not in (DataConfig(), data):
        raise ConfigError(
            "data has no effect here: the recipe instruct makes its own; leave it out, or take "
            "your files through `talipot train`"
        )
    return config.model_copy(update={"data": data})
