"""vLLM on the same prompts, as a program of its own environment (`make vllm`).

``PYTHON vllm_worker.py FOLDER SEQUENCES TOKENS OPTIONS`` loads a checkpoint in bf16, with what else
the engine is told as JSON, and says "ready"; then each line of its input, a list of
[prompt, length] in JSON, is generated from and answered by "done". It imports nothing of ours.
"""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # of its own environment


def main(folder: str, sequences: str, tokens: str, options: str) -> None:
    """Answer until the input ends."""
    said, sys.stdout = sys.stdout, sys.stderr  # the library prints too
    model = LLM(
        model=folder,
        dtype="bfloat16",
        max_num_seqs=int(sequences),
        max_model_len=int(tokens),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
        **json.loads(options),
    )
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        made = model.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asked],
            [
                SamplingParams(
                    max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
                )
                for _, length in asked
            ],
            use_tqdm=False,
        )
        counts = [len(each.outputs[0].token_ids) for each in made]
        assert counts == [length for _, length in asked], counts
        print("done", file=said, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
