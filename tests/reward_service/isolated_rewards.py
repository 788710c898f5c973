"""Reward functions for `test_isolation`, as badly as code can behave that a policy wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from reward_service.samples import Sample, Score


def strange(samples: list[Sample]) -> list[float | Score]:
    """Do what the response says."""
    (sample,) = samples
    word, _, rest = sample.response.partition(" ")
    match word:
        case "loops":
            while True:
                pass
        case "exits":
            os._exit(int(rest))
        case "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        case "takes":
            return [float(len(bytearray(int(rest) * 2**20)))]
        case "prints":
            print("{}\n" * 1000, file=sys.stderr if rest == "errors" else sys.stdout)
        case "reads":
            return [float(len(sys.stdin.read()))]
        case "starts":
            started = subprocess.Popen(["sleep", "600"])
            Path(rest).write_text(str(started.pid), encoding="utf8")
            os._exit(0)
        case "leaves":
            threading.Timer(0.1, os._exit, (0,)).start()
        case "raises":
            raise ValueError("no such answer")
        case "nothing":
            return [float("nan")]
        case "tells":
            tokens = tuple(float(t) for t in sample.tokens)
            parts = {"finished": float(sample.finished)}
            return [Score(value=0.5, parts=parts, tokens=tokens, reason=repr(sample.columns))]
        case "sleeps":
            time.sleep(float(rest))
            return [float(os.getpid())]
    return [float(len(sample.response))]


async def waits(samples: list[Sample]) -> list[float]:
    return [1.0 for _ in samples]


def texts(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(p == r) for p, r in zip(prompts, responses, strict=True)]


def three(one: object, two: object, more: object) -> list[float]:
    return []
