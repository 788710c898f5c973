"""Results as records, by their keys in a run's files, and in the report's table."""

from __future__ import annotations

from deploy.evaluation.intervals import Interval
from deploy.evaluation.presentation import EVALUATION, Cell, Measure, Presentation
from deploy.evaluation.results import PolicyComparison, PolicyFigures, figure, figures_of
from deploy.quickstart.outcome import IN_REPORT, Evaluation, Outcome, Verdict


def policy(score: float) -> PolicyFigures:
    return PolicyFigures(
        judge_score=2 * score, score=score, nll=3.5, response_length=20.0, distinct=0.5
    )


COMPARISON = PolicyComparison(
    pairs_judged=9,
    pairs_asked=10,
    win_rate=Interval(mean=0.75, low=0.5, high=0.875),
    ties_share=0.0,
    kl=1.5,
    sft=policy(0.0),
    policy=policy(1.0),
)
WRITTEN = {
    "pairs_judged": 9,
    "pairs_asked": 10,
    "win_rate": 0.75,
    "win_rate_low": 0.5,
    "win_rate_high": 0.875,
    "ties_share": 0.0,
    "kl": 1.5,
    "judge_score_sft": 0.0,
    "judge_score_policy": 2.0,
    "score_sft": 0.0,
    "score_policy": 1.0,
    "nll_sft": 3.5,
    "nll_policy": 3.5,
    "response_length_sft": 20.0,
    "response_length_policy": 20.0,
    "distinct_sft": 0.5,
    "distinct_policy": 0.5,
}


def verdict(share: float, quality: float | None) -> Verdict:
    return Verdict(
        judge_conformance=Interval(mean=share, low=share - 0.1, high=share + 0.1),
        rouge_l=Interval(mean=0.1, low=0.0, high=0.2),
        distinct=0.9,
        quality=quality,
    )


def test_a_comparison_has_the_keys_that_files_always_had() -> None:
    assert figures_of(COMPARISON) == WRITTEN


def test_figures_are_read_back_as_they_were() -> None:
    assert figure(WRITTEN, "win_rate") == COMPARISON.win_rate
    assert figure(WRITTEN, "score", "sft") == COMPARISON.sft.score
    assert figure(WRITTEN, "score", "human") is None
    assert figure({"win_rate": 0.5}, "win_rate") == 0.5, "of a version that knew no intervals"


def test_a_quickstart_has_one_key_for_each_figure_of_each_side() -> None:
    evaluation = Evaluation(
        comparison=COMPARISON, verdicts={"sft": verdict(0.5, 0.25), "human": verdict(0.75, None)}
    )
    outcome = Outcome(
        reward_model_accuracy=0.7,
        sft_heldout_loss=3.0,
        comparisons=100,
        comparison_ties=5,
        trained={"rollouts_trained": 32},
        evaluation=evaluation,
        seconds={"sft": 1.0, "pipeline": 2.0},
    )
    figures = outcome.figures()
    assert figures.keys() - WRITTEN.keys() == {
        "reward_model_accuracy",
        "sft_heldout_loss",
        "comparisons",
        "comparison_ties",
        "rollouts_trained",
        "seconds_sft",
        "seconds_pipeline",
        "quality_sft",
        "distinct_human",
        *(f"{name}{end}_{side}" for name in ("judge_conformance", "rouge_l")
          for end in ("", "_low", "_high") for side in ("sft", "human")),
    }  # fmt: skip
    assert figures["distinct_sft"] == 0.9, "the judges' figure stands, as on the screen"
    shown = IN_REPORT.table(figures)
    assert shown.columns == ["people's lines", "supervised", "trained policy"]
    rows = dict(shown.rows)
    assert rows["PEP 257 conformance (ruff)"][1] == Cell("50.0%", "40.0% to 60.0%")
    assert rows["labeler's quality"] == [Cell(), Cell("0.250"), Cell()]


def test_a_zero_is_shown_and_what_nobody_measured_is_not() -> None:
    assert dict(EVALUATION.table({"score_sft": 0.0}).rows) == {
        "score by the run's own reward": [Cell("0.000")]
    }
    assert EVALUATION.table({}).rows == []
    assert EVALUATION.tiles_of({"kl": 2.0}) == [("2.0", "KL to the reference policy, nats")]


def test_a_task_shows_a_measure_of_its_own() -> None:
    rhymes = Measure("rhymes", "lines that rhyme", "{:.0%}")
    poems = Presentation(sides={"policy": "poet"}, rows=(rhymes,), tiles=())
    shown = poems.table({"rhymes_policy": 0.5, "rhymes_sft": 0.1})
    assert (shown.columns, shown.rows) == (["poet"], [("lines that rhyme", [Cell("50%")])])
