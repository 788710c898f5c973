"""Talipot in a program: a run's policy, its score, what it was trained on, and its stages.

    import talipot

    run = talipot.load_run("runs/titles")
    policy = run.policy()
    prompts = ["brand: Ardo; item: kettle; colour: red; size: 1.7 l; title:"]
    titles = policy.sample(prompts)
    scores = run.score(prompts, titles)

Everything here does what a command of the same name does, with the same errors: `TalipotError` and
its kinds, whose text is one line. The import alone is quick; what is heavy is loaded by the first
call that needs it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import talipot_first

for _name in talipot_first.OURS:
    _places = getattr(sys.modules.get(_name), "__path__", None)
    if _name in sys.modules and str(Path(talipot_first.ROOT, _name)) not in (_places or ()):
        raise ImportError(
            f"a module '{_name}' of another project is imported already, and Talipot has one of "
            "that name: import talipot before it, or rename yours"
        )
talipot_first.ours_first()

from common.errors import TalipotError  # noqa: E402 the line above says whose `common` this is

if TYPE_CHECKING:
    import pyarrow as pa

    from common.config.run import RunConfig
    from common.wire.trajectory import ScoredTrajectory
    from deploy.sampler import Sampler
    from deploy.scorer import RunScorer

__all__ = ["Policy", "Run", "Score", "TalipotError", "load_policy", "load_run", "run"]

try:
    __version__ = version("talipot")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "unknown"

_INTERRUPTED = 130
"""What a command returns after Ctrl-C."""
Message = Mapping[str, Any]
"""A turn of a conversation, as ``{"role": "user", "content": "..."}``."""
Prompt = str | Sequence[Message]
"""A text to go on from, or a conversation whose next turn is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a run's reward makes of one response."""

    total: float | None
    """The weighted sum of the components; None where one of them gave the response up."""
    components: Mapping[str, float]
    """Each component's own value by its name in the recipe, and that of each part of one."""
    reason: str = ""
    """What the components say of it, or why there is no total."""


class Policy:
    """A policy in this process; `Run.policy` loads one."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def note(self) -> str:
        """Which policy it is, in one line, where `Run.policy` chose; else empty."""
        return self._sampler.note

    def sample(self, prompts: Sequence[Prompt], *, seed: int = 0) -> list[str]:
        """Sample one response to each prompt.

        Args:
            prompts: texts, or conversations for a model with a chat template.
            seed: equal seeds give equal responses to equal prompts, whatever else is asked for.

        Raises:
            DataError: a prompt is empty, does not fit into the context, or is refused by the
                template.
        """
        return [responses[0] for responses in self.sample_many(prompts, 1, seed=seed)]

    def sample_many(
        self, prompts: Sequence[Prompt], number: int, *, seed: int = 0
    ) -> list[list[str]]:
        """Sample `number` responses to each prompt; otherwise as `sample`."""
        from deploy.scorer import asked

        answers = self._sampler.answers(asked(prompts), seed, number)
        found = [answer.response for answer in answers]
        return [found[at : at + number] for at in range(0, len(found), number)]


class Run:
    """A run's folder, wherever it lies; `load_run` opens one."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._scorer: RunScorer | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The folder."""
        return self._config.run_dir

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._config.name

    @property
    def config(self) -> RunConfig:
        """The recipe with every default filled in: ``run.config.train.kl_coef``."""
        return self._config

    def policy(self, which: str | int | None = None) -> Policy:
        """Load a policy of the run.

        Args:
            which: ``final``; ``sft``, what training began with; ``latest``, ``best`` or the number
                of an iteration for a checkpoint, also of a run that is at work. None takes the
                final one, or the newest checkpoint of a run that has not finished.

        Raises:
            ConfigError: no such word.
            CheckpointError: no such checkpoint.
            DataError: training has left no such policy yet.
        """
        from deploy.sampler import Sampler

        sft = which == "sft"
        word = None if sft or which is None else str(which)
        return Policy(Sampler(self._config, sft=sft, checkpoint=word))

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Score]:
        """Score responses by the run's own reward: its model, functions and endpoints.

        Functions are imported from Python's path, as in any program.

        Args:
            prompts: texts or conversations, one for each response.
            responses: texts, without an end token.
            columns: what else stands in each prompt's line of the data, for functions that read it.

        Raises:
            ConfigError: a function cannot be imported.
            CheckpointError: the reward model is not there.
            RewardError: a component cannot score.
        """
        from deploy.scorer import RunScorer, asked

        if self._scorer is None:
            self._scorer = RunScorer(self._config)
        return [
            Score(total=total, components=components, reason=reason)
            for total, components, reason in self._scorer.scores(asked(prompts, columns), responses)
        ]

    def trajectories(self, iterations: Sequence[int] | None = None) -> Iterator[ScoredTrajectory]:
        """Iterate over what the policy was trained on, one record for each response.

        Args:
            iterations: which iterations; None: all that are logged, in their order.

        Raises:
            DataError: a file of the log is missing or damaged.
        """
        from common.wire.trajectory import ScoredTrajectory, from_table
        from learner.batch.trajectory_log import read_log

        for iteration in self._logged(iterations):
            yield from from_table(read_log(self.path, iteration)[0], ScoredTrajectory)

    def trajectory_table(self, iterations: Sequence[int] | None = None) -> pa.Table:
        """Read the same as one Arrow table; ``.to_pandas()`` goes on.

        Beside the records it has `iteration`, and what the learner made of each token: rewards,
        values, advantages, its own log-probabilities.

        Raises:
            DataError: a file of the log is missing or damaged, or nothing is logged.
        """
        import pyarrow as pa

        from common.errors import DataError
        from learner.batch.trajectory_log import read_learnt

        tables = [read_learnt(self.path, iteration)[0] for iteration in self._logged(iterations)]
        if not tables:
            raise DataError(f"{self.path}: no trajectory is logged; `talipot train` writes them")
        return pa.concat_tables(tables)

    def metrics(
        self, stage: Literal["sft", "reward", "train", "held_out"] = "train"
    ) -> list[dict[str, float]]:
        """Read a stage's metrics, one mapping for each step that was logged, with its `step`.

        `held_out` are evaluations while the policy was trained; their step is a policy version.
        Of an iteration that was trained again after a resumption the later line counts.
        """
        from deploy.run_folder.log_lines import read_lines

        lines = read_lines(self._config.folder.metrics).lines
        steps = {line.step: dict(line.metrics) for line in lines if line.stage == stage}
        return [{"step": step, **steps[step]} for step in sorted(steps)]

    def _logged(self, iterations: Sequence[int] | None) -> Sequence[int]:
        """Return the iterations that were asked for, or all there are."""
        if iterations is not None:
            return iterations
        from learner.batch.trajectory_log import logged_iterations

        return logged_iterations(self.path)


def load_policy(path: str | Path, *overrides: str) -> Policy:
    """Load a policy that `talipot export` made of a model of Talipot's own, without its run.

    What it made of a pretrained model, `transformers` loads.

    Args:
        path: the folder.
        *overrides: settings of sampling, as ``"rollout.temperature=0.5"``.

    Raises:
        DataError: it is no such folder, or a damaged one.
        ConfigError: an override that cannot be applied.
    """
    from common.errors import DataError
    from deploy.exchange.exported import config_of_exported, exported_policy
    from deploy.sampler import Sampler

    weights = exported_policy(path)
    if weights is None:
        raise DataError(
            f"{path}: is no exported policy (model.json, policy.safetensors); give the folder that "
            "`talipot export` made, or load_run a run's"
        )
    return Policy(Sampler(config_of_exported(path, overrides), sft=False, exported=weights))


def load_run(path: str | os.PathLike[str], *overrides: str) -> Run:
    """Open a run's folder; nothing is loaded yet.

    Args:
        path: the folder.
        overrides: ``section.field=value`` as on the command line, such as
            ``rollout.temperature=0.7``; the folder keeps its own.

    Raises:
        DataError: there is no run.
        ConfigError: an override that cannot be applied.
    """
    from deploy.run_folder.folder import config_of

    return Run(config_of(os.fspath(path), overrides))


def run(
    stage: Literal["sft", "reward", "train"],
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *overrides: str,
    quiet: bool = False,
) -> Run:
    """Run a stage, as `talipot STAGE` does, and return its run.

    It joins or starts Ray as the recipe says, and leaves it at the end, unless this program was in
    a cluster before. `train` goes on from the run's newest checkpoint, if it has one.

    Args:
        stage: sft, reward or train.
        recipe: a mapping of sections, or the path of a recipe in YAML; None for the defaults.
        overrides: ``section.field=value``, as on the command line.
        quiet: print nothing.

    Raises:
        TalipotError: what the command would end with, as one line.
    """
    from common.config.recipe import load_config
    from deploy.cli.main import app
    from deploy.cli.shared import console
    from deploy.run_folder.paths import anchored

    if stage not in ("sft", "reward", "train"):
        raise ValueError(f"stage '{stage}': should be sft, reward or train")
    with _written(recipe) as path:
        given = [] if path is None else ["--config", str(path)]
        folder = anchored(load_config(path, overrides)).run_dir
        before, console.quiet = console.quiet, quiet
        try:
            if app(args=[stage, *given, *overrides], standalone_mode=False) == _INTERRUPTED:
                raise KeyboardInterrupt
        finally:
            console.quiet = before
    return load_run(folder)


@contextmanager
def _written(recipe: Mapping[str, Any] | str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Give a recipe as a file; errors name a mapping ``recipe``."""
    if not isinstance(recipe, Mapping):
        yield None if recipe is None else Path(recipe)
        return
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf8")
        try:
            yield path
        except TalipotError as error:
            raise type(error)(str(error).replace(str(path), "recipe")) from None
