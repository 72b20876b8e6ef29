"""From conversations to token ids and labels.

The one thing to know: `labels[t]` is the token that position t predicts (so labels are shifted
here, once, and nowhere else), -100 where there is no loss.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from mtrain.data.formats import Conversation
from mtrain.data.storage import IGNORED, Encoded
from mtrain.data.template import ChatTemplate, Rendered, SampleRefused, load_tokenizer

__all__ = [
    "Drop",
    "EncodeSettings",
    "Encoded",
    "Encoder",
    "Why",
    "encode_chunk",
    "longest_position",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """All that decides about ids and labels beside the conversation itself.

    `max_length` is in tokens (None: no limit), `truncation_strategy` delete, left or right.
    """

    model_dir: Path
    system: str | None
    enable_thinking: bool | None
    max_length: int | None
    truncation_strategy: str


class Why(Enum):
    """What became of a conversation that is not a sample."""

    REFUSED = "refused"
    TOO_LONG = "too long"
    NO_LABEL = "no label left"


@dataclass(frozen=True, slots=True)
class Drop:
    """A conversation that is left out; `reason` is for REFUSED."""

    why: Why
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RenderedChunk:
    """Texts of some conversations, or why there is none, and where they stand."""

    places: tuple[str, ...]
    rendered: list[Rendered | Drop]


class Encoder:
    """Holds the tokenizer; the chat template is looked at when the first conversation needs it."""

    def __init__(self, settings: EncodeSettings) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: It cannot be loaded or has no character offsets.
        """
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model_dir)
        self._template: ChatTemplate | None = None

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | Drop]:
        """Encode a few hundred conversations, one result for each, in order.

        Raises:
            ValueError: The tokenizer has no usable chat template.
        """
        return self.tokenise(self.render(conversations))

    def render(self, conversations: Sequence[Conversation]) -> RenderedChunk:
        """The first half of `encode`, Python that one thread at a time may run.

        Raises:
            ValueError: The tokenizer has no usable chat template.
        """
        rendered = [self._render(conversation) for conversation in conversations]
        return RenderedChunk(tuple(str(row.place) for row in conversations), rendered)

    def tokenise(self, chunk: RenderedChunk) -> list[Encoded | Drop]:
        """The second half, which computes outside of Python most of the time."""
        rendered = chunk.rendered
        texts = [item.text for item in rendered if isinstance(item, Rendered)]
        if not texts:
            return [item for item in rendered if isinstance(item, Drop)]
        # Templates write the begin-of-text token themselves: adding special tokens would double it.
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokenised = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        results: list[Encoded | Drop] = []
        for place, item in zip(chunk.places, rendered, strict=True):
            if isinstance(item, Drop):
                results.append(item)
                continue
            ids, offsets = next(tokenised)
            has_loss = tokens_inside(_as_array(offsets), item.spans)
            results.append(self._cut(np.asarray(ids, dtype=np.int32), has_loss, place))
        return results

    def _render(self, conversation: Conversation) -> Rendered | Drop:
        if conversation.text is not None:
            begin, end = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
            text = f"{begin}{conversation.text}{end}"
            return Rendered(text, ((0, len(text)),))
        if self._template is None:
            self._template = ChatTemplate(
                self.tokenizer,
                system=self.settings.system,
                enable_thinking=self.settings.enable_thinking,
            )
        try:
            return self._template.render(conversation)
        except SampleRefused as error:
            return Drop(Why.REFUSED, str(error))

    def _cut(self, ids: np.ndarray, has_loss: np.ndarray, place: str) -> Encoded | Drop:
        """Apply max_length, then shift, so that no label refers to a token that was cut off."""
        limit = self.settings.max_length
        truncated = limit is not None and len(ids) > limit
        if truncated:
            if self.settings.truncation_strategy == "delete":
                return Drop(Why.TOO_LONG)
            keep = (
                slice(-limit, None) if self.settings.truncation_strategy == "left" else slice(limit)
            )
            ids, has_loss = ids[keep], has_loss[keep]
        labels = np.full_like(ids, IGNORED)
        labels[:-1] = np.where(has_loss[1:], ids[1:], IGNORED)
        if (labels == IGNORED).all():
            return Drop(Why.NO_LABEL)
        return Encoded(ids, labels, place, truncated)


def _as_array(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 [num_pairs, 2]; numpy takes twice as long to find out by itself."""
    numbers = chain.from_iterable(pairs)
    return np.fromiter(numbers, dtype=np.int64, count=2 * len(pairs)).reshape(-1, 2)


def tokens_inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie entirely in one of the spans.

    A token that straddles the start of a span also holds text of the prompt, which the model is
    not to be taught, so it has no loss. No token straddles an end: there stands one of its own.

    Args:
        offsets: Character ranges of the tokens, int [num_tokens, 2].
        spans: Sorted, disjoint character ranges.

    Returns:
        bool [num_tokens].
    """
    starts, ends = np.asarray(spans).T
    index = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    return (index >= 0) & (offsets[:, 0] < ends[index]) & (offsets[:, 1] <= ends[index])


def longest_position(model_dir: Path) -> int | None:
    """`max_position_embeddings` of config.json: documents cannot be longer. None: not known."""
    path = model_dir / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) else None


@lru_cache(maxsize=1)
def _worker_encoder(settings: EncodeSettings) -> Encoder:
    return Encoder(settings)


def encode_chunk(
    task: tuple[EncodeSettings, Sequence[Conversation]],
) -> list[Encoded | Drop]:
    """`Encoder.encode` for a worker process, which loads its tokenizer once."""
    settings, conversations = task
    return _worker_encoder(settings).encode(conversations)
