"""The quickstart's labeler as a judge of evaluations while a policy is pushed too far.

Its reward model is what the policy is trained on; the labeler that it was trained from is asked in
evaluations alone, of held-out signatures, and nothing is learnt from what it says.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.config.quickstart import DocstringsConfig
from deploy.quickstart.harvest import harvest, prompt_text
from deploy.quickstart.labeler import quality as quality_of
from deploy.quickstart.task import make_task

SETTINGS = DocstringsConfig(demonstrations=18_000, held_out=1000)
"""As in the recipe `quickstart`."""
TASK = make_task(harvest(workers=1), SETTINGS, 0)
"""Made as the module is imported: no call is to wait for it."""
PAIRS = {prompt_text(pair): pair for pair in (*TASK.held_out, *TASK.train)}


def quality(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The labeler's opinion of lines, in [0, 1]; by the task of seed 0."""
    return [
        quality_of(response.strip(), PAIRS[prompt], TASK.verbs)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
