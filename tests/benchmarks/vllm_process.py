"""vLLM beside us: a process of its own that generates when it is asked, and is idle otherwise."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.wire.trajectory import RolloutRequest

Generate = Callable[[Sequence[RolloutRequest], Sequence[int]], None]
"""Generates so many tokens from each prompt."""

_QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def vllm(
    folder: Path,
    sequences: int,
    tokens: int,
    *,
    python: Path,
    environment: Mapping[str, str],
    options: Mapping[str, object] | None = None,
) -> Iterator[Generate]:
    """Start vLLM on a checkpoint, compiled.

    Args:
        folder: the checkpoint.
        sequences: that are generated at once.
        tokens: of a prompt with its response, at most.
        python: of an environment that has it.
        environment: of its process.
        options: what else its engine is told.
    """
    said = folder.parent / "vllm.txt"
    worker = Path(__file__).with_name("vllm_worker.py")
    told = json.dumps({} if options is None else dict(options))
    with (
        said.open("w") as log,
        subprocess.Popen(
            [str(python), str(worker), str(folder), str(sequences), str(tokens), told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environment, **_QUIET},
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        asking, answers = process.stdin, process.stdout
        try:
            if answers.readline().strip() != "ready":
                raise RuntimeError(f"vLLM did not start: {said.read_text()[-2000:]}")

            def generate(asked: Sequence[RolloutRequest], lengths: Sequence[int]) -> None:
                pairs = [[list(a.prompt_ids), n] for a, n in zip(asked, lengths, strict=True)]
                asking.write(json.dumps(pairs) + "\n")
                asking.flush()
                if answers.readline().strip() != "done":
                    raise RuntimeError(f"vLLM stopped: {said.read_text()[-2000:]}")

            yield generate
        finally:
            process.kill()
