"""A run's folder: the one place that knows what lies where in it, and under which name.

Paths; nothing is written, and only of the tokenizer is it looked up which kind a run has. The files
inside a checkpoint are named elsewhere, by what writes and reads them
(`deploy.run_folder.checkpoints`, `learner`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PolicyFolder:
    """An exported policy: what a stage leaves, and what the next one or a user loads.

    Of a pretrained model it is a folder like its checkpoint's, with files of the same names.
    """

    path: Path

    @property
    def weights(self) -> Path:
        """All weights of a model of our own; those of an adapter are added to the base's."""
        return self.path / "policy.safetensors"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter alone, in PEFT's layout; only where one was trained."""
        return self.path / "adapter"

    @property
    def shape(self) -> Path:
        """The shape of a model of our own, as `model` in a recipe."""
        return self.path / "model.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a model of our own; only of an exported policy."""
        return self.path / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class RewardModelFolder:
    """The trained reward model; a pretrained one with all weights is a folder of a checkpoint."""

    path: Path

    @property
    def weights(self) -> Path:
        """All weights of a model of our own, or an adapter and the head."""
        return self.path / "reward.safetensors"


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The data that the quickstart makes for itself."""

    path: Path

    @property
    def demonstrations(self) -> Path:
        """Harvested pairs to imitate."""
        return self.path / "demonstrations.jsonl"

    @property
    def comparisons(self) -> Path:
        """Pairs of responses with labels."""
        return self.path / "comparisons.jsonl"

    @property
    def prompts(self) -> Path:
        """Prompts that the policy is trained on."""
        return self.path / "prompts.jsonl"

    @property
    def evaluation(self) -> Path:
        """Harvested pairs that only the judges see."""
        return self.path / "evaluation.jsonl"

    @property
    def harvest(self) -> Path:
        """What was harvested, and from what."""
        return self.path / "harvest.json"


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """A round of feedback: pairs that people compare, and what they said."""

    path: Path

    @property
    def settings(self) -> Path:
        """How it was made and is asked."""
        return self.path / "round.yaml"

    @property
    def pairs(self) -> Path:
        """The pairs, with where each response comes from."""
        return self.path / "pairs.parquet"

    @property
    def practice(self) -> Path:
        """Pairs with their answers that everybody begins with; only where the round has some."""
        return self.path / "practice.parquet"

    @property
    def answers(self) -> Path:
        """What people are asked and said."""
        return self.path / "answers.sqlite"

    @property
    def comparisons(self) -> Path:
        """What a reward model is trained on, by `talipot feedback export`."""
        return self.path / "comparisons.jsonl"

    @property
    def raw(self) -> Path:
        """All that people said, undone answers too, by the same command."""
        return self.path / "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Reused:
    """Results of another run, where they lie; None: the run has its own."""

    tokenizer: Path | None = None
    sft: Path | None = None
    reward_model: Path | None = None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Every path in a run's folder, and what stands in for it in another run's."""

    path: Path
    reused: Reused = Reused()

    # What the run is made from.

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that every stage reads: a file, or a folder of a pretrained model's."""
        if self.reused.tokenizer is not None:
            return self.reused.tokenizer
        folder = self.pretrained_tokenizer
        return folder if folder.is_dir() else self.own_tokenizer

    @property
    def own_tokenizer(self) -> Path:
        """A tokenizer that was trained for the run, or is one of ours."""
        return self.path / "tokenizer.json"

    @property
    def pretrained_tokenizer(self) -> Path:
        """The files of a pretrained model's tokenizer, with its chat template."""
        return self.path / "tokenizer"

    @property
    def inputs(self) -> Path:
        """Fingerprints of what each stage read and wrote."""
        return self.path / "run.json"

    @property
    def data(self) -> DataFolder:
        """Data that the quickstart makes."""
        return DataFolder(self.path / "data")

    @property
    def code(self) -> Path:
        """Copies of the reward functions' sources, as modules."""
        return self.path / "code"

    # What its stages leave.

    @property
    def sft(self) -> PolicyFolder:
        """The supervised policy."""
        return PolicyFolder(self.reused.sft or self.path / "sft")

    @property
    def reward_model(self) -> RewardModelFolder:
        """The reward model."""
        return RewardModelFolder(self.reused.reward_model or self.path / "reward_model")

    def reward_seed(self, seed: int) -> RewardModelFolder:
        """Return one of the reward models of several seeds, where they are kept."""
        return RewardModelFolder(self.reward_seeds / f"{seed:03d}")

    @property
    def reward_seeds(self) -> Path:
        """Folder of the reward models of all seeds; beside the reward model, whose ever it is."""
        reused = self.reused.reward_model
        return (self.path if reused is None else reused.parent) / "reward_seeds"

    @property
    def policy(self) -> PolicyFolder:
        """The trained policy, the run's result."""
        return PolicyFolder(self.path / "policy")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of policy training."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def unfinished(self, stage: str) -> RunFolder:
        """Return where a supervised stage keeps its checkpoints until it is done."""
        return RunFolder(self.path / "unfinished" / stage)

    def trajectories(self, iteration: int) -> Path:
        """Return the log of the trajectories that an iteration was trained on."""
        return self.path / "trajectories" / f"iteration-{iteration:06d}.parquet"

    @property
    def feedback(self) -> Path:
        """Folder of the rounds in which people were asked."""
        return self.path / "feedback"

    @property
    def labelers(self) -> Path:
        """Who may label, and in which browsers they are signed in."""
        return self.feedback / "labelers.sqlite"

    @property
    def labelling_address(self) -> Path:
        """Where the labelling page is reached, while it is served."""
        return self.feedback / "address"

    def round(self, number: int) -> RoundFolder:
        """Return the folder of one round."""
        return RoundFolder(self.feedback / f"round-{number:03d}")

    # What it says of itself.

    @property
    def lock(self) -> Path:
        """The lock of the run's one writer, with a note of who that is."""
        return self.path / "lock"

    @property
    def status(self) -> Path:
        """How far policy training is, written anew each second while it works."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """Metrics of every stage, a line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the same metrics as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        """Ids of the run at the services that its metrics are sent to."""
        return self.path / "trackers.json"

    @property
    def events(self) -> Path:
        """Workers that came, went or failed, a line for each."""
        return self.path / "events.jsonl"

    @property
    def activity(self) -> Path:
        """What workers and learner did and when, a line for each call; the newest part of it."""
        return self.path / "activity.jsonl"

    @property
    def result(self) -> Path:
        """Facts of a finished policy training, the hash of its weights among them."""
        return self.path / "result.json"

    @property
    def evaluation(self) -> Path:
        """Results of the last `talipot evaluate`."""
        return self.path / "evaluation.json"

    def evaluation_of(self, iteration: int) -> Path:
        """Return the results of evaluating the policy of an iteration."""
        return self.path / "evaluations" / f"iteration-{iteration:06d}.json"

    @property
    def summary(self) -> Path:
        """Results of the quickstart."""
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        """Responses of both policies to held-out prompts, side by side; the quickstart's."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The page of `talipot report`."""
        return self.path / "report.html"

    def name_of(self, path: Path) -> str:
        """Return a path as ``run.json`` names it: inside the folder relative to that."""
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)


def writer_of(weights: Path) -> str:
    """Say how weights that are not there are made, by the name of their folder."""
    stages = {"sft": "sft", "reward_model": "reward", "policy": "train"}
    stage = stages.get(weights.parent.name)
    return f"run `talipot {stage}` first, which writes them" if stage else "check the path"
