"""What a stage says at its end, and when it warns that it moved little."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy.stages.sizing import say_moved, say_trained


def console() -> Console:
    return Console(file=io.StringIO(), width=400)


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def supervised(before: float, after: float, **more: float) -> dict[str, float]:
    sizes = {"tokens": 52_000.0, "epochs": 1.5}
    return sizes | {"heldout_loss_before": before, "heldout_loss": after} | more


def test_steps_tokens_epochs_and_loss_are_told() -> None:
    screen = console()
    say_moved(screen, "sft", 600, supervised(7.6, 3.1), pretrained=False)
    told = text_of(screen)
    for fact in ("600 optimizer steps", "52,000 tokens", "1.5 passes", "7.600 -> 3.100"):
        assert fact in told
    assert "warning" not in told


@pytest.mark.parametrize(
    ("stage", "steps", "metrics", "reason"),
    [
        ("sft", 26, supervised(7.6, 5.1), "only 26 optimizer steps"),
        ("sft", 600, supervised(3.0, 2.99), "a held-out loss that was 3.000 and is 2.990"),
        ("reward", 80, supervised(0.8, 0.6, accuracy_heldout=0.51), "accuracy of 51.0%"),
    ],
)
def test_a_stage_that_moved_little_warns_in_one_line(
    stage: str, steps: int, metrics: dict[str, float], reason: str
) -> None:
    screen = console()
    say_moved(screen, stage, steps, metrics, pretrained=False)
    [warning] = [line for line in text_of(screen).splitlines() if line.startswith("warning")]
    assert reason in warning
    assert "docs/sizing.md" in warning


def test_policy_training_is_told_from_its_log() -> None:
    log = {
        step: {"policy_steps": 8.0, "score": 0.1 * step, "kl": 0.2 * step} for step in range(1, 11)
    }
    screen = console()
    say_trained(screen, log, prompts=100, asked=50, pretrained=False)
    told = text_of(screen)
    for fact in ("10 iterations", "80 optimizer steps", "5 passes over 100 prompts"):
        assert fact in told
    assert "score 0.300 -> 0.800 (means of 5 iterations) · KL 2.00" in told
    assert "warning" not in told
    still = console()
    say_trained(
        still, {1: {"policy_steps": 8.0, "kl": 0.01}}, prompts=100, asked=50, pretrained=False
    )
    assert "only 8 optimizer steps and a KL to the reference of 0.01 nats" in text_of(still)


def test_few_steps_of_a_pretrained_model_are_no_reason() -> None:
    screen = console()
    say_moved(screen, "sft", 44, supervised(3.4, 3.07), pretrained=True)
    log = {1: {"policy_steps": 2.0, "kl": 0.0}, 2: {"policy_steps": 2.0, "kl": 3.2}}
    say_trained(screen, log, prompts=100, asked=50, pretrained=True)
    assert "warning" not in text_of(screen)
    say_moved(screen, "sft", 44, supervised(3.4, 3.39), pretrained=True)
    [warning] = [line for line in text_of(screen).splitlines() if line.startswith("warning")]
    assert "held-out loss that was 3.400 and is 3.390" in warning and "44" not in warning
