"""The judge of `instruct`, which neither the reward nor the policy ever asked: IFEval's checkers.

They ship in `lm-eval` (EleutherAI; the checkers are Google's, Zhou 2023, arXiv 2311.07911). Their
module is imported alone, without the harness and what that needs, and without its download.
`LEFT_OUT` says which of its checkers are not asked, and why.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from common.errors import ConfigError
from common.files import one_line
from deploy.instruct.instructions import Instruction

INSTALL: Final = "pip install --no-deps lm-eval==0.4.13 langdetect==1.0.9 immutabledict==4.3.1"
LEFT_OUT: Final = {
    "length_constraints:number_sentences": "needs nltk's punkt, a download",
    "change_case:capital_word_frequency": "needs nltk's punkt, a download",
    "language:response_language": "the model knows English alone",
    "detectable_format:constrained_response": "an answer of yes or no is about no topic",
    "combination:repeat_prompt": "repeating is what the reward takes points off for",
}
"""Checkers of IFEval that no prompt of this task asks for."""

_Arguments = Callable[[Instruction], dict[str, Any]]
CHECKERS: Final[dict[str, tuple[str, _Arguments]]] = {
    "lowercase": ("change_case:english_lowercase", lambda i: {}),
    "capitals": ("change_case:english_capital", lambda i: {}),
    "no_comma": ("punctuation:no_comma", lambda i: {}),
    "quotes": ("startend:quotation", lambda i: {}),
    "title": ("detectable_format:title", lambda i: {}),
    "bullets": ("detectable_format:number_bullet_lists", lambda i: {"num_bullets": i.number}),
    "paragraphs": (
        "length_constraints:number_paragraphs",
        lambda i: {"num_paragraphs": i.number},
    ),
    "json": ("detectable_format:json_format", lambda i: {}),
    "fewer_words": (
        "length_constraints:number_words",
        lambda i: {"num_words": i.number, "relation": "less than"},
    ),
    "at_least_words": (
        "length_constraints:number_words",
        lambda i: {"num_words": i.number, "relation": "at least"},
    ),
    "ends": ("startend:end_checker", lambda i: {"end_phrase": i.text}),
    "word": ("keywords:existence", lambda i: {"keywords": [i.text]}),
    "word_times": (
        "keywords:frequency",
        lambda i: {"keyword": i.text, "frequency": i.number, "relation": "at least"},
    ),
    "without": ("keywords:forbidden_words", lambda i: {"forbidden_words": [i.text]}),
    "placeholders": (
        "detectable_content:number_placeholders",
        lambda i: {"num_placeholders": i.number},
    ),
    "postscript": ("detectable_content:postscript", lambda i: {"postscript_marker": "P.S."}),
    "highlights": (
        "detectable_format:number_highlighted_sections",
        lambda i: {"num_highlights": i.number},
    ),
    "sections": (
        "detectable_format:multiple_sections",
        lambda i: {"section_spliter": "Section", "num_sections": i.number},
    ),
    "letter": (
        "keywords:letter_frequency",
        lambda i: {"letter": i.text, "let_frequency": i.number, "let_relation": "less than"},
    ),
    "two_answers": ("combination:two_responses", lambda i: {}),
    "first_word": (
        "length_constraints:nth_paragraph_first_word",
        lambda i: {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": i.text},
    ),
}
"""Kind -> IFEval's name of its checker, and what that takes."""


def follows(instruction: Instruction, response: str) -> bool:
    """Ask the checker, strictly: the answer as it is, and an empty one follows nothing.

    Raises:
        ConfigError: the package is not installed.
    """
    name, arguments = CHECKERS[instruction.kind]
    checker = registry()[name](name)
    checker.build_description(**arguments(instruction))
    try:
        return bool(response.strip() and checker.check_following(response))
    except RecursionError:  # its JSON parser on brackets without end
        return False


def verdicts(
    instructions: Sequence[Sequence[Instruction]], responses: Sequence[str]
) -> list[list[bool]]:
    """Judge each response by each instruction of its prompt."""
    return [
        [follows(instruction, response) for instruction in asked]
        for asked, response in zip(instructions, responses, strict=True)
    ]


@cache
def registry() -> dict[str, Any]:
    """Import IFEval's checkers, by their names.

    Raises:
        ConfigError: a package is missing, or does not have them.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError(f"instruct: its judge is not installed; run `{INSTALL}`")
    try:
        with _alone(Path(spec.origin).parent):
            module = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
            importlib.import_module("langdetect").DetectorFactory.seed = 0  # else it draws lots
        logging.getLogger(module.instructions.__name__).disabled = True  # a text too short to tell
        return dict(module.INSTRUCTION_DICT)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"instruct: its judge cannot be imported ({one_line(error)}); run `{INSTALL}`"
        ) from None


@contextmanager
def _alone(package: Path) -> Iterator[None]:
    """Let modules below `package` be imported without its own `__init__` files.

    These import the whole harness. The variable tells IFEval that another process has fetched
    nltk's sentences, which are of no use here.
    """
    names = ("lm_eval", "lm_eval.tasks")
    before = {name: sys.modules.get(name) for name in names}
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    for name in names:
        bare = ModuleType(name)
        bare.__path__ = [str(package.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = bare
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
        del os.environ["LOCAL_RANK"]
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
