"""Conversations as a model reads them: its own template, rendered once, to ids.

::

    messages --guard--> template --name control tokens--> text --encode--> ids

The template is rendered by `transformers`, in its sandbox. What it writes itself (its control
tokens, BOS among them) becomes tokens; what users, systems and tools wrote stays text, whatever it
spells; the assistant's text may hold the tokens that models write (``<think>``), and none that ends
a turn. Nothing is put before or behind what the template writes.

What is learnt is what the model has to write: all between a generation prompt and the end of that
turn. The text is cut there, so that a prompt in training has the very ids that it has in sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Protocol

from jinja2.exceptions import TemplateSyntaxError

from common.data.control_tokens import ControlTokens, unused_mark
from common.errors import DataError
from common.files import one_line

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what a template reads besides."""

_PROBE: Final = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"})
_ROLES: Final = ("system", "user", "assistant", "tool")


class Encoder(Protocol):
    """Text with named control tokens to ids."""

    def encode_named(self, text: str, *, follows: bool = False) -> list[int]:
        """Encode a text; `follows`: another stands before it, so no blank is put there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt."""

    text: str
    """As the template wrote it."""
    ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What stands before a turn of the assistant, and the turn."""

    before: list[int]
    """Of the first turn of a row the whole prompt; of a later one what lies between."""
    learnt: list[int]
    """The assistant's, with the token that ends it."""


class ChatTemplate:
    """A template, with the tokenizer that it is for."""

    def __init__(
        self,
        source: str,
        name: str,
        *,
        variables: Mapping[str, str],
        controls: ControlTokens,
        encoder: Encoder,
    ) -> None:
        """Take a template.

        Args:
            source: what it is.
            name: the file that it stands in, for errors.
            variables: tokens that it knows by name: bos_token, eos_token.
            controls: the tokenizer's control tokens.
            encoder: the tokenizer.

        Raises:
            DataError: it is no template.
        """
        self.source, self.name = source, name
        self._variables, self._controls, self._encoder = variables, controls, encoder
        self._stops: Mapping[str, int] = {}
        self._eos_id = -1
        rendered(source, [], False, name, variables)

    def ends_with(self, stops: Mapping[str, int], eos_id: int) -> None:
        """Tell it the tokens that end a turn, by their spelling."""
        self._stops, self._eos_id = stops, eos_id

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token that it writes behind what an assistant says, if any."""
        try:
            text = self._render(_PROBE, (), generation=False)
        except DataError:
            return None
        found = self._controls.name.search(text, text.rindex("yes") if "yes" in text else len(text))
        return None if found is None else self._controls.spelled(found[0])

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Rendered:
        """Render a conversation up to where the assistant is to speak.

        Raises:
            DataError: the template refuses it.
        """
        text = self._render(messages, tools, generation=True)
        return Rendered(text=self._controls.spelled(text), ids=self._encoder.encode_named(text))

    def answer(self, messages: Sequence[Message], answer: str, tools: Sequence[Any] = ()) -> Turn:
        """Render an answer to a conversation; raises as `rows`."""
        said = [*messages, {"role": "assistant", "content": answer}]
        prompt = self._render(messages, tools, generation=True)
        whole = self._render(said, tools, generation=False)
        turn, ended = self._turn(prompt, whole, len(messages))
        return Turn(
            before=self._encoder.encode_named(prompt),
            learnt=self._encoder.encode_named(turn, follows=True) + [self._eos_id] * (not ended),
        )

    def rows(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[list[Turn]]:
        """Render a conversation to learn every turn of the assistant.

        A turn stands in the row of the one before it as long as the template writes that one in
        history as it wrote it when it was the last. Where it does not (thinking that is dropped
        from earlier turns), the turn begins a row of its own, with the history as it is then.

        Raises:
            DataError: the template refuses it, or its generation prompt is not how it begins the
                turn that follows.
        """
        rows: list[list[Turn]] = []
        history = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], tools, generation=True)
            whole = self._render(messages[: index + 1], tools, generation=False)
            turn, ended = self._turn(prompt, whole, index)
            if history and prompt.startswith(history):
                before = self._between(history, prompt)
            else:
                before = self._encoder.encode_named(prompt)
                rows.append([])
            learnt = self._encoder.encode_named(turn, follows=True)
            rows[-1].append(Turn(before=before, learnt=learnt + [self._eos_id] * (not ended)))
            history = prompt + turn if ended else ""
        return rows

    def _between(self, history: str, prompt: str) -> list[int]:
        """Encode what a prompt has behind the token that ended the turn before."""
        *_, last = self._controls.name.finditer(history)
        return self._encoder.encode_named(prompt[last.start() :])[1:]

    def _turn(self, prompt: str, whole: str, index: int) -> tuple[str, bool]:
        """Return what the assistant is to write, with the token that ends it, if there is one."""
        if not whole.startswith(prompt):
            raise DataError(
                f"field 'messages': turn {index + 1} does not begin with the generation prompt of "
                f"{self.name}; give a template that writes it in tokenizer.chat_template"
            )
        written = whole[len(prompt) :]
        for found in self._controls.name.finditer(written):
            if self._controls.spelled(found[0]) in self._stops:
                return written[: found.end()], True
        return written, False

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], *, generation: bool
    ) -> str:
        """Render with secret names for the control tokens that the template wrote.

        Raises:
            DataError: the template refuses it.
        """
        content = json.dumps([messages, tools], ensure_ascii=False, default=str)
        mark = unused_mark(self.source, content)
        guarded = [self._guarded(message, mark) for message in messages]
        given = self._controls.guarded(tools, mark, model=False)
        try:
            text = rendered(self.source, guarded, generation, self.name, self._variables, given)
        except DataError as error:
            raise self._refusal(messages, tools, error) from error
        return self._controls.named(text, mark)

    def _guarded(self, message: Message, mark: str) -> dict[str, Any]:
        model = message["role"] == "assistant"
        values = {key: value for key, value in message.items() if value is not None}
        guarded: dict[str, Any] = self._controls.guarded(values, mark, model=model)
        if not model and isinstance(guarded.get("content"), str):
            guarded["content"] = self._controls.framed(guarded["content"], mark)
        return guarded

    def _refusal(
        self, messages: Sequence[Message], tools: Sequence[Any], error: DataError
    ) -> DataError:
        """Say why the template refused a conversation, as far as that can be told."""
        roles = [message["role"] for message in messages]
        advice = "change the messages, or give another template in tokenizer.chat_template"
        if "system" in roles and self._takes([m for m in messages if m["role"] != "system"], tools):
            advice = "it takes no system prompt: put that at the head of the first user message"
        else:
            spoken = [role for role in roles if role in ("user", "assistant")]
            if any(a == b for a, b in pairwise(spoken)):
                advice = "let user and assistant alternate: join turns of one side"
        return DataError(f"field 'messages': {error}; {advice}")

    def _takes(self, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
        try:
            rendered(self.source, messages, False, self.name, self._variables, tools)
        except DataError:
            return False
        return True


def rendered(
    source: str,
    messages: Sequence[Message],
    generation: bool,
    name: str,
    variables: Mapping[str, str],
    tools: Sequence[Any] = (),
) -> str:
    """Render messages by a template of a file `name`; without messages only read the template.

    Raises:
        DataError: it is no template, or it refuses the messages.
    """
    # The library takes seconds to import, which plain data does without.
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # annotated as one text
    try:
        texts, _ = render(
            conversations=[list(messages)] if messages else [],
            tools=list(tools) or None,
            chat_template=source,
            add_generation_prompt=generation,
            **variables,
        )
    except TemplateSyntaxError as error:
        raise DataError(
            f"{name}:{error.lineno}: no chat template ({one_line(error.message)}); mend it or give "
            "another one in tokenizer.chat_template"
        ) from error
    except Exception as error:  # a template may do anything that raises
        raise DataError(f"refused by {name} ({one_line(error)})") from error
    return str(texts[0]) if texts else ""


def written_by(source: str, name: str, variables: Mapping[str, str], tokens: set[str]) -> set[str]:
    """Return those of the tokens that a template writes, in its text or put together from roles.

    Of a pair, such as ``<think>`` and ``</think>``, either stands for both.
    """
    found = {token for token in tokens if token in source}
    for role in _ROLES:
        try:
            text = rendered(source, [{"role": role, "content": "x"}], True, name, variables)
        except DataError:
            continue
        found |= {token for token in tokens if token in text}
    stems = {token.replace("/", "") for token in found}
    return {token for token in tokens if token.replace("/", "") in stems}
