"""Records in ids: plain text as it is, conversations by the model's template.

plain    prefix (BOS) + ids of the prompt | ids of the response + EOS
chat     what the template writes up to the generation prompt | the turn, with its end
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.data.chat import ChatTemplate, Rendered, Turn
from common.data.records import Comparison, Demonstration, Prompt
from common.data.tokenizer import Tokenizer
from common.errors import DataError


def prompts_in_ids(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[Rendered]:
    """Encode prompts; of a conversation the text is what the template wrote.

    Raises:
        DataError: there is no template, or it refuses one; names the place.
    """
    plain = iter(_plain([p.prompt for p in prompts if not p.messages], tokenizer))
    encoded = []
    for prompt in prompts:
        if not prompt.messages:
            encoded.append(Rendered(text=prompt.prompt, ids=next(plain)))
            continue
        with _chat(tokenizer, prompt.place) as chat:
            encoded.append(chat.prompt(prompt.messages, prompt.tools))
    return encoded


def rows_in_ids(records: Sequence[Demonstration], tokenizer: Tokenizer) -> list[list[list[Turn]]]:
    """Encode demonstrations, each as rows of turns; raises as `prompts_in_ids`."""
    plain = [record for record in records if not record.messages]
    prompts = iter(_plain([r.prompt for r in plain], tokenizer))
    responses = iter(tokenizer.encode_batch([r.response for r in plain], follows=True))
    rows: list[list[list[Turn]]] = []
    for record in records:
        if not record.messages:
            learnt = [*next(responses), tokenizer.eos_id]
            rows.append([[Turn(before=next(prompts), learnt=learnt)]])
            continue
        with _chat(tokenizer, record.place) as chat:
            if record.messages[-1]["role"] == "assistant":
                rows.append(chat.rows(record.messages, record.tools))
            else:
                rows.append([[chat.answer(record.messages, record.response, record.tools)]])
    return rows


def comparisons_in_ids(
    records: Sequence[Comparison], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int], list[int]]]:
    """Encode comparisons: prompt, chosen, rejected; raises as `prompts_in_ids`."""
    plain = [record for record in records if not record.messages]
    prompts = iter(_plain([r.prompt for r in plain], tokenizer))
    texts = [text for r in plain for text in (r.chosen, r.rejected)]
    sides = iter(tokenizer.encode_batch(texts, follows=True))
    encoded = []
    for record in records:
        if not record.messages:
            chosen, rejected = ([*next(sides), tokenizer.eos_id] for _ in range(2))
            encoded.append((next(prompts), chosen, rejected))
            continue
        with _chat(tokenizer, record.place) as chat:
            first, second = (
                chat.answer(record.messages, answer, record.tools)
                for answer in (record.chosen, record.rejected)
            )
            encoded.append((first.before, first.learnt, second.learnt))
    return encoded


def _plain(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.prefix_ids, *ids] for ids in tokenizer.encode_batch(texts)]


@contextmanager
def _chat(tokenizer: Tokenizer, place: str) -> Iterator[ChatTemplate]:
    """Give the template; what it refuses is named by the record's place."""
    where = f"{place}: " if place else ""
    if tokenizer.chat is None:
        raise DataError(
            f"{where}field 'messages': {tokenizer.chat_missing}; give a template in "
            "tokenizer.chat_template, or write 'prompt' as a text"
        )
    try:
        yield tokenizer.chat
    except DataError as error:
        raise DataError(f"{where}{error}") from error
