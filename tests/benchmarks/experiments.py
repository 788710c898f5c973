"""The experiments behind `docs/results.md`: real runs of the quickstart and of its variations.

``python -m tests.benchmarks.experiments OUT [NAME ...]`` runs the named experiments (without a name
all) one after the other and keeps each in its own folder under OUT; what has a summary there is
not run again. Variations start from the supervised policy, reward model and data of the quickstart
of the same seed, so that they differ in what their name says and in nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from common.config.recipe import load_config
from common.config.run import RunConfig
from common.data.prompts import encode_prompts
from deploy.evaluation.answering import answers, apart
from deploy.evaluation.intervals import best_of_n_kl, bootstrap_mean, win_rate
from deploy.evaluation.results import figures_of
from deploy.evaluation.sampling import best_of, policy_weights, sample_scored
from deploy.instruct.pipeline import prepare as prepare_instruct
from deploy.instruct.pipeline import run_instruct
from deploy.quickstart.evaluation import encoded_prompts, evaluate, stripped
from deploy.quickstart.harvest import Pair, prompt_text
from deploy.quickstart.pipeline import run_quickstart
from deploy.quickstart.task import judge_lines
from deploy.reasoning.evaluation import LABEL, verdicts, verifier
from deploy.reasoning.pipeline import prepare as prepare_reasoning
from deploy.reasoning.pipeline import run_reasoning
from deploy.reasoning.task import held_out
from deploy.reasoning.task import with_data as with_tasks
from deploy.run_folder.weights import final_policy
from deploy.stages import policy, preparation, supervised
from deploy.stages.policy import start_pools
from deploy.stages.session import open_session
from tests.benchmarks.bases import SEEDS, derive, recipe, save, task_of

N_VALUES = (1, 2, 4, 8, 16)
KL_COEFS = (0.4, 0.2, 0.05, 0.025)
"""Beside the recipe's own."""
COMPARISONS = (450, 900, 1800, 3600, 7200)
FULL_LRS, BEST_FULL_LR = (1.6e-3,), 1.6e-3
"""Beside the recipe's own, 8e-4."""
LORA_LRS = (8e-4, 1.6e-3, 6.4e-3)
LORA_RANK, LORA_LR = 8, 3.2e-3
LORA_RANKS = (1, LORA_RANK, 64)
INSTRUCT = {
    "grpo": (),
    "rloo": ("train.algorithm=rloo",),
    "ppo": ("train.algorithm=ppo",),
    "ppg": ("train.algorithm=ppo", "train.ppg={n_pi: 5}"),
}
"""What the algorithms on the recipe `instruct` override; the first is the recipe's own."""
SHORT = "train.iterations=8"
"""Of the comparison of algorithms on the recipe `reasoning`: a third of its own."""
REASONING = {
    "grpo": (),
    "grpo-short": (SHORT,),
    "dr-grpo": (SHORT, "train.algorithm=dr_grpo", "train.objective={aggregation: constant}"),
    "dapo": (
        SHORT,
        "train.objective={clip_high: 0.28, aggregation: tokens}",
        "train.dynamic_sampling=4",
    ),
    "gspo": (
        SHORT,
        "train.clip_range=3e-4",
        "train.objective={ratio: sequence, aggregation: sequences, clip_high: 4e-4}",
    ),
    "reinforce-pp": (SHORT, "train.algorithm=reinforce_pp"),
    "ppo": (SHORT, "train.algorithm=ppo"),
    "ppg": (SHORT, "train.algorithm=ppo", "train.ppg={n_pi: 5, e_aux: 3}"),
}
"""Likewise on the recipe `reasoning`."""
JUDGED = (
    "evaluate.every=2",
    "evaluate.metric=component/quality",
    "reward_service.components={model: {kind: model}, quality: {kind: function, "
    "target: 'tests.benchmarks.pushed:quality', evaluation_only: true}}",
)
"""What the pushed policy's recipe overrides so that the labeler judges it while it trains."""
CHAT_RECIPES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "instruct": INSTRUCT,
    "reasoning": REASONING,
}
BEGUN = ("tokenizer", "data", "sft")
"""What other algorithms begin with, as far as the recipe has it."""

console = Console()


@dataclass(frozen=True, slots=True)
class Variation:
    """A policy training that starts from the quickstart run of one seed."""

    name: str
    seed: int
    overrides: tuple[str, ...]


def variations() -> list[Variation]:
    """List every variation."""
    rloo = ("train.ppg=null", "train.prompts_per_iteration=64", "train.samples_per_prompt=4")
    kinds: dict[str, tuple[str, ...]] = {
        "ppo": ("train.ppg=null",),
        "rloo": (*rloo, "train.algorithm=rloo"),
        "grpo": (*rloo, "train.algorithm=grpo"),
        "beta-clone-0": ("train.ppg.beta_clone=0",),
        "shared-value": ("train.value_network=shared",),
    }
    listed = [
        Variation(f"kl-{coef}", 0, ("train.ppg=null", f"train.kl_coef={coef}")) for coef in KL_COEFS
    ]
    pushed = ("train.ppg=null", "train.kl_coef=0", "train.iterations=60", "train.lr=1.5e-3")
    listed.append(Variation("pushed", 0, (*pushed, *JUDGED)))
    kinds |= {f"lora-r{rank}": lora(rank, LORA_LR) for rank in LORA_RANKS}
    kinds["full-best"] = rates(BEST_FULL_LR)
    listed += [Variation(f"{k}-s{s}", s, o) for s in SEEDS for k, o in kinds.items()]
    listed += [Variation(f"full-lr-{lr}", 0, rates(lr)) for lr in FULL_LRS]
    listed += [Variation(f"lora-lr-{lr}", 0, lora(LORA_RANK, lr)) for lr in LORA_LRS]
    return listed


def rates(lr: float) -> tuple[str, ...]:
    """Set all three learning rates, in the recipe's proportion."""
    return (f"train.lr={lr}", f"train.value_lr={1.25 * lr}", f"train.ppg.lr={0.375 * lr}")


def lora(rank: int, lr: float) -> tuple[str, ...]:
    """Put adapters on policy and value network."""
    return (f"train.lora={{rank: {rank}, alpha: {2 * rank}}}", *rates(lr))


def quickstart(out: Path, seed: int, *overrides: str, name: str = "") -> None:
    """Run the recipe as it is, from harvest to judges."""
    config = recipe(out, name or f"quickstart-s{seed}", f"seed={seed}", *overrides)
    with open_session(config, console) as session:
        run_quickstart(session)


def vary(out: Path, variation: Variation) -> None:
    """Train and judge a variation on the base of its seed."""
    base = out / f"quickstart-s{variation.seed}"
    config = derive(base, out / variation.name, variation.overrides)
    begin = time.perf_counter()
    with open_session(config, console) as session:
        pools = start_pools(session, config)
        trained = policy.run_train(session, config, pools)
        judged = evaluate(session, config, task_of(config), pools).figures()
    save(config.run_dir, {**trained, **judged, "seconds_pipeline": time.perf_counter() - begin})


def with_chat_model(out: Path, kind: str, name: str, seed: int, overrides: tuple[str, ...]) -> None:
    """Run a recipe with a chat model by another algorithm, or seed; its model is imported once.

    Other algorithms begin with the taught policy of the recipe's own run of the same seed.
    """
    start = f"model.start={out / 'SmolLM2-135M-Instruct'}"
    config = recipe(out, name, start, f"seed={seed}", *overrides, kind=kind)
    (prepare_instruct if kind == "instruct" else prepare_reasoning)(config, console)
    base = out / f"{kind}-{next(iter(CHAT_RECIPES[kind]))}-s{seed}"
    if overrides and (base / "summary.json").exists():
        for part in BEGUN:
            if (base / part).exists():
                shutil.copytree(base / part, config.run_dir / part)
    with open_session(config, console) as session:
        if kind == "instruct":
            run_instruct(session)
        else:
            run_reasoning(session)


def other_algorithm(out: Path, name: str, seed: int, overrides: tuple[str, ...]) -> None:
    """Train the taught policy of the recipe `reasoning` by another algorithm, and verify it.

    What does not depend on the algorithm, the answers before, is taken from the recipe's own run of
    the same seed.
    """
    base = out / f"reasoning-{next(iter(REASONING))}-s{seed}"
    start = f"model.start={out / 'SmolLM2-135M-Instruct'}"
    config = recipe(out, name, start, f"seed={seed}", *overrides, kind="reasoning")
    for part in BEGUN:
        if (base / part).exists():
            shutil.copytree(base / part, config.run_dir / part)
    begin = time.perf_counter()
    with open_session(config, console) as session:
        session.lock("quickstart")
        config = with_tasks(session.config)
        asked = held_out(config)
        config = preparation.prepare_tokenizer(session, config)
        pools = start_pools(session, config)
        trained = policy.run_train(session, config, pools)
        prompts = [prompt for part in asked for prompt in part.prompts]
        encoded, _ = encode_prompts(
            prompts, session.tokenizer(), max_tokens=config.max_prompt_tokens, too_long="error"
        )
        session.end_gang()
        weights = final_policy(config)
        sampled = sample_scored(
            config, policy_weights(config, weights, 1), encoded, *pools, label=LABEL
        )
        session.close()
        session.lock("quickstart")
        greedy = apart(
            config.rollout, answers, config, weights, encoded, label="greedy", greedy=True
        )
        said = dict(zip(sampled.prompts, sampled.responses, strict=True))
        with closing(verifier()) as verifying:
            right = [of.right for of in verdicts(verifying, prompts, greedy.texts)]
            texts = [said.get(i, "") for i in range(len(prompts))]
            right_sampled = [of.right for of in verdicts(verifying, prompts, texts)]
    with (base / "samples.jsonl").open(encoding="utf8") as file:
        before = {row["prompt"]: row["conforms_before"] for row in map(json.loads, file)}
    known = json.loads((base / "summary.json").read_text(encoding="utf8"))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    families = [part.family for part in asked for _ in part.prompts]
    for family in dict.fromkeys(families):
        rows = [i for i, of in enumerate(families) if of == family]
        rise = bootstrap_mean([right[i] - before[prompts[i].prompt] for i in rows], seed)
        found["judge_accuracy_before"][family] = known["judge_accuracy_before"][family]
        found["judge_accuracy_after"][family] = float(np.mean([right[i] for i in rows]))
        for end, value in (("", rise.mean), ("_low", rise.low), ("_high", rise.high)):
            found[f"judge_accuracy_rise{end}"][family] = value
        found["judge_accuracy_sampled_rise"][family] = (
            float(np.mean([right_sampled[i] for i in rows]))
            - known["judge_accuracy_sampled_before"][family]
        )
    seconds = {"seconds_pipeline": time.perf_counter() - begin}
    save(config.run_dir, {**trained, **found, "kl": float(np.mean(sampled.kl)), **seconds})


def best_of_n(out: Path) -> None:
    """Judge best-of-N of the supervised policy, and measure its KL.

    KL of best-of-N to its base is E[log N + (N - 1) log F(score)] with F the share of the base's
    samples that score lower; F is measured on samples other than those chosen from. Sampled
    responses tie (the same line twice), which the closed form leaves out.
    """
    config = derive(out / "quickstart-s0", out / "best-of-n", ("rollout.lease_size=256",))
    most, spare, few = max(N_VALUES), 112, 150
    with open_session(config, console) as session:
        pools = start_pools(session, config)
        pairs, prompts = encoded_prompts(session, config, task_of(config).held_out[:few])
        weights = policy_weights(config, session.folder.sft.weights, 0)
        many = sample_scored(config, weights, prompts, *pools, label="many", samples=most + spare)
    scores = np.array(many.scores).reshape(len(prompts), most + spare)
    lines = np.array(stripped(many.responses)).reshape(scores.shape)
    rows = []
    for n in N_VALUES:
        groups = scores[:, :most].reshape(len(prompts), most // n, n)
        best = groups.max(2)
        rest = scores[:, most:, None, None]
        below = (rest < best[:, None, :, None]).mean(1)[:, :, 0]
        equal = (rest == best[:, None, :, None]).mean(1)[:, :, 0]
        share = np.clip(below + equal / 2, 0.5 / spare, 1.0)
        chosen = [str(lines[row, groups[row, 0].argmax()]) for row in range(len(prompts))]
        qualities = task_of(config).qualities(pairs, chosen)
        verdict = figures_of(judge_lines(pairs, chosen, config.seed, qualities))
        kl = float((np.log(n) + (n - 1) * np.log(share)).mean())
        rows.append({"n": n, "kl": kl, "score": float(best.mean()), **verdict})
    save(config.run_dir, {"rows": rows, "prompts": few, "spare": spare})


def best_of_16(out: Path, seed: int) -> None:
    """Judge the best of 16 samples of the supervised policy by the reward model: no training."""
    config = derive(out / f"quickstart-s{seed}", out / f"best-of-16-s{seed}", ())
    task = task_of(config)
    with open_session(config, console) as session:
        pools = start_pools(session, config)
        pairs, prompts = encoded_prompts(session, config, task.held_out[: config.evaluate.prompts])
        sft = policy_weights(config, session.folder.sft.weights, 0)
        single = sample_scored(config, sft, prompts, *pools, label="eval")
        many = sample_scored(config, sft, prompts, *pools, label="best", samples=16)
    before = task.qualities(pairs, stripped(single.responses))
    lines = stripped(best_of(many).responses)
    after = task.qualities(pairs, lines)
    wins = win_rate(after, before, tie_margin=1e-6)
    verdict = figures_of(judge_lines(pairs, lines, config.seed, after), "policy")
    save(config.run_dir, {**verdict, "kl": best_of_n_kl(16), "win_rate": wins.rate.mean})


def reward_data(out: Path) -> None:
    """Measure reward models trained on ever more comparisons, on one held-out set."""
    config = derive(out / "quickstart-s0", out / "reward-data", ())
    rows = []
    with open_session(config, console) as session:
        data = supervised.encoded_comparisons(session, config)
        train, held_out = data.train, data.held_out
        for count in COMPARISONS:
            for seed in SEEDS:
                gang = session.gang()
                gang.advance(
                    gang.begin_reward(
                        config, train[:count], held_out, [], session.folder.sft.weights, seed
                    )
                )
                rows.append({"comparisons": count, "seed": seed, **gang.evaluate()})
                console.print(rows[-1])
    save(config.run_dir, {"rows": rows, "held_out": len(held_out)})


def over_optimisation(out: Path) -> None:
    """Follow score, labeler and judges along the pushed run, from its own trajectory log."""
    folder = out / "pushed"
    config = load_config(folder / "config.yaml", saved=True)
    by_prompt = {prompt_text(pair): pair for pair in task_of(config).train}
    rows = []
    for path in sorted((folder / "trajectories").glob("*.parquet")):
        rows.append(_judge_log(path, config, by_prompt))
    save(out / "over-optimisation", {"rows": rows})


def _judge_log(path: Path, config: RunConfig, by_prompt: Mapping[str, Pair]) -> dict[str, float]:
    table = pq.read_table(path).to_pylist()
    pairs = [by_prompt[row["prompt_text"]] for row in table]
    lines = stripped([row["response_text"] for row in table])
    own = [row.get("unfiltered_logprobs") or row["behavior_logprobs"] for row in table]
    kl = [sum(ours) - sum(row["ref_logprobs"]) for ours, row in zip(own, table, strict=True)]
    qualities = task_of(config).qualities(pairs, lines)
    return {
        "iteration": int(path.stem.split("-")[-1]),
        "kl": float(np.mean(kl)),
        "score": float(np.mean([row["score"] for row in table])),
        **figures_of(judge_lines(pairs, lines, config.seed, qualities)),
    }


def experiments(out: Path) -> dict[str, Callable[[], None]]:
    """List every experiment by its folder's name, each after those that it starts from."""
    every: dict[str, Callable[[], None]] = {}
    for seed in SEEDS:
        every[f"quickstart-s{seed}"] = partial(quickstart, out, seed)
    for stage in (0, 1, 3):
        name = f"zero-{stage}"
        every[name] = partial(quickstart, out, 0, f"learner.zero_stage={stage}", name=name)
    for seed in SEEDS:
        every[f"best-of-16-s{seed}"] = partial(best_of_16, out, seed)
    for one in variations():
        every[one.name] = partial(vary, out, one)
    every["best-of-n"] = partial(best_of_n, out)
    every["reward-data"] = partial(reward_data, out)
    every["over-optimisation"] = partial(over_optimisation, out)
    for kind, algorithms in CHAT_RECIPES.items():
        for algorithm, overrides in algorithms.items():
            for seed in SEEDS if not overrides else SEEDS[:1]:
                name = f"{kind}-{algorithm}-s{seed}"
                if kind == "reasoning" and overrides:
                    every[name] = partial(other_algorithm, out, name, seed, overrides)
                else:
                    every[name] = partial(with_chat_model, out, kind, name, seed, overrides)
    return every


def main(arguments: list[str]) -> None:
    """Run the experiments that are named and have no summary yet."""
    out = Path(arguments[0]).absolute()
    every = experiments(out)
    for name in arguments[1:] or every:
        if (out / name / "summary.json").exists():
            console.print(f"[dim]{name}: done before[/]")
            continue
        console.rule(name)
        shutil.rmtree(out / name, ignore_errors=True)
        every[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
