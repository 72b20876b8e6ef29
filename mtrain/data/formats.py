"""Turns rows of the usual dataset layouts into conversations: lists of role and content.

The one thing to know: a file has one layout, found from the keys of its first usable row; a later
row that does not fit it is a bad row, never silently read as another layout.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtrain.data.rows import BadRow, Place, Row

__all__ = ["Conversation", "Message", "read_conversations"]

Message = dict[str, Any]

_QUERY_KEYS = ("query", "prompt", "question", "problem")
_RESPONSE_KEYS = ("response", "answer", "completion", "solution")
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "tool_call",
    "tool_call": "tool_call",
}
_KEPT_KEYS = ("reasoning_content", "reasoning", "tool_call_id", "name")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training document: messages for the chat template, or plain text without any.

    `messages` hold role and content, and where present tool_calls, reasoning_content and `loss`
    (false keeps an assistant message out of the loss). `tools` are JSON schemas.
    """

    place: Place
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


class _Unusable(Exception):
    """The row does not fit its layout; the message is the reason shown to the user."""


def read_conversations(
    rows: Iterable[Row | BadRow], *, columns: Mapping[str, str] | None = None
) -> Iterator[Conversation | BadRow]:
    """Normalise the rows of one file.

    Args:
        rows: Rows in file order; bad ones are handed through.
        columns: Renames, from the file's column to the standard one.

    Raises:
        ValueError: The keys of the first row fit no known layout.
    """
    renames = dict(columns or {})
    layout: tuple[str, ...] | None = None
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        values = {renames.get(key, key): value for key, value in row.columns.items()}
        if layout is None:
            layout = _detect_layout(values)
            if layout is None:
                raise ValueError(_unknown_layout(row.place, values))
        try:
            if missing := [key for key in layout if key not in values]:
                raise _Unusable(f"no {missing[0]!r} column, unlike the file's first row")
            conversation = _CONVERTERS[layout](values, row.place)
            _check_characters(conversation)
        except _Unusable as error:
            yield BadRow(row.place, str(error))
        else:
            yield conversation


def _check_characters(conversation: Conversation) -> None:
    """JSON can spell half of a surrogate pair; tokenizers take UTF-8, which cannot."""
    everything = (conversation.messages, conversation.tools, conversation.text)
    try:
        json.dumps(everything, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise _Unusable("holds half of a surrogate pair, which is no text") from None


def _detect_layout(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The first layout whose columns are all there."""
    return next((keys for keys in _CONVERTERS if all(key in values for key in keys)), None)


def _unknown_layout(place: Place, values: Mapping[str, Any]) -> str:
    return (
        f"{place}: no known layout has the columns {', '.join(map(repr, values)) or '(none)'}; "
        "use messages, conversations, instruction + output, query + response or text, "
        """or rename with --columns '{"yours": "standard"}'"""
    )


def _from_messages(values: Mapping[str, Any], place: Place) -> Conversation:
    key = "messages" if "messages" in values else "conversations"
    turns = _parsed(values[key], key)
    if not isinstance(turns, list) or not turns:
        raise _Unusable(f"{key} must be a non-empty list, found {_kind(turns)}")
    messages = [_read_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
    return _conversation(values, place, messages)


def _read_turn(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _Unusable(f"{where} must be an object, found {_kind(turn)}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise _Unusable(f"{where}.{role_key} is {role!r}; known are {', '.join(_ROLES)}")
    role = _ROLES[role]
    if role == "tool_call":
        calls = _parsed(_text(turn.get(content_key), f"{where}.{content_key}"), where)
        return {"role": "assistant", "content": "", "tool_calls": _read_calls(calls, where)}
    message: Message = {"role": role}
    calls = turn.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _read_calls(_parsed(calls, f"{where}.tool_calls"), where)
    content = turn.get(content_key)
    message["content"] = "" if content is None and calls else _text(content, f"{where}.content")
    message.update({key: turn[key] for key in _KEPT_KEYS if isinstance(turn.get(key), str)})
    if isinstance(turn.get("loss"), bool):
        message["loss"] = turn["loss"]
    return message


def _read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Accept {name, arguments}, or the same under "function", one or a list of them."""
    calls = calls if isinstance(calls, list) else [calls]
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Unusable(f"{where}: a tool call needs a name and arguments, found {call!r:.80}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}: arguments of {function['name']}") or {}
        result.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return result


def _from_alpaca(values: Mapping[str, Any], place: Place) -> Conversation:
    instruction = _text(values["instruction"], "instruction")
    extra = _optional_text(values, "input")
    query = f"{instruction}\n{extra}" if extra else instruction
    return _from_pairs(values, place, query, _text(values["output"], "output"))


def _from_query_response(values: Mapping[str, Any], place: Place) -> Conversation:
    query_key = next(key for key in _QUERY_KEYS if key in values)
    response_key = next(key for key in _RESPONSE_KEYS if key in values)
    query = _text(values[query_key], query_key)
    return _from_pairs(values, place, query, _text(values[response_key], response_key))


def _from_pairs(values: Mapping[str, Any], place: Place, query: str, answer: str) -> Conversation:
    history = _parsed(values.get("history"), "history") or []
    if not isinstance(history, list) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in history
    ):
        raise _Unusable("history must be a list of [query, response] pairs")
    messages: list[Message] = []
    for old_query, old_answer in [*history, (query, answer)]:
        messages.append({"role": "user", "content": _text(old_query, "history")})
        messages.append({"role": "assistant", "content": _text(old_answer, "history")})
    return _conversation(values, place, messages)


def _from_text(values: Mapping[str, Any], place: Place) -> Conversation:
    text = _text(values["text"], "text")
    if not text:
        raise _Unusable("text is empty")
    return Conversation(place, messages=(), text=text)


def _conversation(values: Mapping[str, Any], place: Place, messages: list[Message]) -> Conversation:
    """Add the system column and the tools, and check what every layout needs."""
    for key in _MEDIA_KEYS:
        if values.get(key):
            raise _Unusable(f"has {key}; only text can be trained on")
    system = _optional_text(values, "system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not any(
        message["role"] == "assistant" and (message["content"] or message.get("tool_calls"))
        for message in messages
    ):
        raise _Unusable("no assistant message that says anything")
    tools = _parsed(values.get("tools") or [], "tools")
    if not isinstance(tools, list) or any(not isinstance(tool, dict) for tool in tools):
        raise _Unusable(f"tools must be a list of objects, found {_kind(tools)}")
    wrapped = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return Conversation(place, tuple(messages), tuple(wrapped))


def _parsed(value: object, where: str) -> Any:
    """CSV cells, and some JSON files, hold lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Unusable(f"{where} is not valid JSON: {error}") from None


def _text(value: object, where: str) -> str:
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _Unusable(f"{where} must be text, found {_kind(value)}")
    return value


def _optional_text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return "" if value is None else _text(value, key)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


_Converter = Callable[[Mapping[str, Any], Place], Conversation]
_CONVERTERS: dict[tuple[str, ...], _Converter] = {
    ("messages",): _from_messages,
    ("conversations",): _from_messages,
    ("instruction", "output"): _from_alpaca,
    **{
        (query, response): _from_query_response
        for query in _QUERY_KEYS
        for response in _RESPONSE_KEYS
    },
    ("text",): _from_text,
}
