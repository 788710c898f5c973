"""Conversations in the rows that users bring: messages, checked one by one.

What a template makes of them, and whether it takes them, is asked where they are encoded
(`common.data.encoding`); here they are required to be messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from common.data.chat import Message
from common.data.files.values import type_name
from common.errors import DataError

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
Messages = tuple[Message, ...]


def messages_of(value: object, field: str) -> Messages:
    """Return the messages of a field.

    Raises:
        DataError: they are none; names the turn.
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"{field}: is {type_name(value)}; write a list of messages")
    if not value:
        raise DataError(f"{field}: has no messages; fill it or take the line out")
    messages = tuple(_message(each, f"{field}: turn {n}") for n, each in enumerate(value, 1))
    if messages[0]["role"] == "assistant":
        raise DataError(f"{field}: begins with the assistant; begin with the user or the system")
    return messages


def prompt_of(value: object, field: str) -> Messages:
    """Return messages up to where the assistant is to speak; raises as `messages_of`."""
    messages = messages_of(value, field)
    if (last := messages[-1]["role"]) not in ("user", "tool"):
        whose = "inside the assistant's turn" if last == "assistant" else "in a system prompt"
        raise DataError(
            f"{field}: ends {whose}; a prompt ends with a message of the user or a tool"
        )
    return messages


def answered_of(value: object, field: str) -> Messages:
    """Return messages that end with the assistant's; raises as `messages_of`."""
    messages = messages_of(value, field)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{field}: ends without the assistant's turn; add what it should say")
    return messages


def answer_of(value: object, prompt: Messages | None, field: str) -> tuple[Messages, str]:
    """Return prompt and text of an answer: a text, a message, or a conversation that ends so.

    Raises:
        DataError: it is none, or answers another prompt.
    """
    if isinstance(value, str):
        if prompt is None:
            raise DataError(f"{field}: is a text, and there is no 'prompt'; add it as messages")
        return prompt, text_of(value, field)
    if not isinstance(value, list | tuple):
        raise DataError(f"{field}: is {type_name(value)}; write a text or messages")
    messages = tuple(_message(each, f"{field}: turn {n}") for n, each in enumerate(value, 1))
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{field}: ends without the assistant's turn; add what it should say")
    if extra := sorted(messages[-1].keys() - {"role", "content"}):
        raise DataError(f"{field}: its last turn has {extra[0]!r}; only its text is compared")
    before = messages[:-1]
    if prompt is None:
        return prompt_of(before, field), messages[-1]["content"]
    if before not in ((), prompt):
        raise DataError(f"{field}: answers another conversation than 'prompt'; make them equal")
    return prompt, messages[-1]["content"]


def tools_of(value: object, field: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a conversation: a list of JSON schemas, or that as a text.

    Raises:
        DataError: they are none.
    """
    if value is None:
        return ()
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{field}: is a text and no JSON; write a list of schemas") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"{field}: is {type_name(tools)}; write a list of schemas")
    return tuple(_without_null(tools))


def last_user(messages: Sequence[Message]) -> str:
    """Return what the user said last; what stands last where there is no user."""
    said = [str(m["content"]) for m in messages if m["role"] == "user"]
    return said[-1] if said else str(messages[-1].get("content", ""))


def text_of(value: object, field: str) -> str:
    """Return a text that is one. Raises: DataError."""
    if not isinstance(value, str):
        raise DataError(f"{field}: is {type_name(value)}; write a text")
    if not value.strip():
        raise DataError(f"{field}: is empty; fill it or take the line out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field}: holds half a surrogate pair at character {error.start}; "
            "write the character itself"
        ) from error
    return value


def _message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f'{field}: is {type_name(value)}; write {{"role": "user", "content": "..."}}'
        )
    message: dict[str, Any] = _without_null(value)
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"{field}: role {role!r} is unknown; use {', '.join(ROLES[:-1])} or {ROLES[-1]}"
        )
    if message.get("tool_calls") and role == "assistant" and not message.get("content"):
        message["content"] = ""
    else:
        message["content"] = text_of(message.get("content"), f"{field}: content")
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError(f"{field}: holds what is no JSON; write texts and numbers") from error
    return message


def _without_null(value: Any) -> Any:
    """Drop what is null: columns of a table have every key that any of their rows has."""
    if isinstance(value, Mapping):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_null(v) for v in value]
    return value
