"""Renders conversations with the tokenizer's own chat template and finds what the assistant says.

The one thing to know: the loss is on exactly the text that the model has to produce after the
generation prompt: the answer with its reasoning and tool calls, up to and including the
end-of-turn token. Each such span is located in the final rendering of the whole conversation and
must be proven (see `ChatTemplate._turn_start` and `_turn_end`); otherwise the sample is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from mtrain.data.formats import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Rendered", "SampleRefused", "load_tokenizer"]

# Never part of anybody's text, so it is found where the template put it.
_PLACEHOLDER = "\ue000placeholder\ue001"
_PROBE = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": _PLACEHOLDER},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": _PLACEHOLDER},
)


class SampleRefused(Exception):
    """The conversation cannot be turned into a training sample; the message says why."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text to tokenise once, as a whole, and its (start, end) character spans with loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, running no code of it.

    Raises:
        ValueError: The folder has no tokenizer with character offsets (tokenizer.json).
    """
    # Here, not above: data that is found in the cache needs no tokenizer.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{model_dir}: cannot load the tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{model_dir}: the tokenizer has no tokenizer.json, which mtrain needs")
    return tokenizer


@contextmanager
def _refusing_bad_messages() -> Iterator[None]:
    """A template is a program of the model's author: what it raises is about the messages."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SampleRefused(f"the chat template rejects the messages: {reason}") from error


class ChatTemplate:
    """The chat template of one tokenizer with the settings of one run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        """Probe the template for its end-of-turn tokens and its assistant header.

        Raises:
            ValueError: There is no chat template, or it does not end turns with a token.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?); "
                "use the tokenizer files of the instruct model"
            )
        self._tokenizer = tokenizer
        self._system = system
        self._settings: dict[str, Any] = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        self._marks_generation = bool(
            re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
        )
        try:
            self._end_tokens = self._probe_end_tokens()
            self._header, self._header_behind_prompt = self._probe_header()
        except SampleRefused as error:
            raise ValueError(f"{tokenizer.name_or_path}: {error}") from error

    def _probe_end_tokens(self) -> tuple[str, ...]:
        """The tokens behind an assistant message, in the middle and at the end of a text."""
        _, *tails = self._text(_PROBE).split(_PLACEHOLDER)
        longest_first = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        found = {
            token
            for tail in tails
            if (token := next((t for t in longest_first if tail.lstrip().startswith(t)), None))
        }
        if not found:
            raise SampleRefused("the chat template ends no assistant turn with a special token")
        return tuple(sorted(found))

    def _probe_header(self) -> tuple[str, str]:
        """What announces an assistant turn, and the part of it that the prompt lacks.

        The second is empty unless the template knows no generation prompt.
        """
        without = self._text(_PROBE[:1])
        prompt = self._text(_PROBE[:1], prompt=True)
        before = self._text(_PROBE).partition(_PLACEHOLDER)[0]
        if prompt == without and before.startswith(prompt) and before[len(prompt) :].strip():
            return before[len(prompt) :], before[len(prompt) :]
        announced = prompt.removeprefix(without)
        sizes = range(len(announced), 0, -1)
        size = next((size for size in sizes if before.endswith(announced[:size])), 0)
        return announced[:size], ""

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation and find the spans that the loss is on.

        What follows the last assistant message cannot be learnt from and is left out.

        Raises:
            SampleRefused: The template rejects the messages, or a span cannot be proven.
        """
        messages = list(conversation.messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if self._system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        tools = conversation.tools
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._marks_generation:
            text, spans = self._marked_spans(messages, tools)
            if len(spans) != len(turns):
                raise SampleRefused("the template marks another number of turns than there are")
        else:
            text = self._text(messages, tools)
            starts = [self._turn_start(text, messages, tools, turn) for turn in turns]
            limits = [*starts[1:], len(text)]
            spans = [
                (start, self._turn_end(text, messages, tools, turn, start=start, limit=limit))
                for turn, start, limit in zip(turns, starts, limits, strict=True)
            ]
        chosen = []
        for turn, span in zip(turns, spans, strict=True):
            if messages[turn].get("loss", True):
                self._check_span(text[slice(*span)], messages[turn])
                chosen.append(span)
        if not chosen:
            raise SampleRefused("no assistant message with loss")
        return Rendered(text, tuple(chosen))

    def _turn_start(
        self, text: str, messages: list[Message], tools: Sequence[dict], turn: int
    ) -> int:
        """Where the model starts to speak: right behind the generation prompt.

        Proof 1: the text continues the prompt that the model would be given at this turn (with
        the run's settings or the template's defaults), so the rest is what it has to say.
        Proof 2, for templates that rewrite history: with this message replaced, the text is the
        same up to the replacement, and there stands the header of an assistant turn.
        """
        for settings in (self._settings, {}) if self._settings else ({},):
            prompt = self._text(messages[:turn], tools, settings=settings, prompt=True)
            prompt += self._header_behind_prompt
            if text.startswith(prompt):
                return len(prompt)
        replaced = [*messages]
        replaced[turn] = {"role": "assistant", "content": _PLACEHOLDER}
        before, found, _ = self._text(replaced, tools).partition(_PLACEHOLDER)
        if found and self._header and text.startswith(before) and before.endswith(self._header):
            return len(before)
        raise SampleRefused("the template rewrites the conversation before an assistant message")

    def _turn_end(
        self,
        text: str,
        messages: list[Message],
        tools: Sequence[dict],
        turn: int,
        *,
        start: int,
        limit: int,
    ) -> int:
        """End of a turn, behind its end-of-turn token.

        Proof 1: nothing comes later, in this text or in the text cut off after this turn.
        Proof 2: it is the first end-of-turn token, and the message itself contains none
        (`_check_span` sees to that).
        """
        is_last = turn == len(messages) - 1
        whole = text if is_last else self._text(messages[: turn + 1], tools)
        if text.startswith(whole) and whole.rstrip().endswith(self._end_tokens):
            return len(whole.rstrip())
        ends = [
            position + len(token)
            for token in self._end_tokens
            if (position := text.find(token, start, limit)) >= 0
        ]
        if not ends:
            raise SampleRefused("an assistant message is not followed by an end-of-turn token")
        return min(ends)

    def _check_span(self, span: str, message: Message) -> None:
        """The message is in its span and brings no end-of-turn token of its own."""
        said = message["content"].rpartition("</think>")[2].strip()
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if any(part not in span for part in [said, *calls]):
            raise SampleRefused("the template leaves out text of an assistant message")
        everything = json.dumps(message, ensure_ascii=False)
        for token in self._end_tokens:
            if token in everything:
                raise SampleRefused(f"an assistant message contains the end-of-turn token {token}")

    def _marked_spans(
        self, messages: list[Message], tools: Sequence[dict]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Spans of a template that says itself what the assistant generates."""
        # As above.
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusing_bad_messages():
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=list(tools) or None,
                chat_template=self._tokenizer.get_chat_template(tools=list(tools) or None),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._settings},
            )
        text = texts[0]
        return text, [(start, self._with_end_token(text, end)) for start, end in spans[0]]

    def _with_end_token(self, text: str, end: int) -> int:
        """A model that never sees the loss on its end-of-turn token would never stop."""
        token = next((token for token in self._end_tokens if text.startswith(token, end)), "")
        return end + len(token)

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict] = (),
        *,
        settings: dict[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        with _refusing_bad_messages():
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                **(self._settings if settings is None else settings),
            )
