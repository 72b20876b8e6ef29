"""Built-in texts of the precision test: many scripts, no network.

The one thing to know: each text is a question and an answer, so that figures exist for all
positions and for those that have a loss in training.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MAX_TOKENS = 128
_MAX_PROMPT_TOKENS = 48
# A folder with one of them has a tokenizer, and one that does not load is then an error.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

TEXTS: tuple[tuple[str, str], ...] = (
    (
        "Why does the sky look blue at noon and red at sunset?",
        "Air scatters short waves more than long ones. At noon the light that reaches us from all "
        "sides is the blue part; in the evening it crosses so much air that mostly red is left.",
    ),
    (
        "请用一句话说明为什么冬天要给水管保温。",
        "水结冰时体积会变大，如果水管没有保温，里面的水一旦冻住就可能把管子撑裂，等到天气转暖便会漏水。",
    ),
    (
        "ما الفرق بين النجم والكوكب؟",
        "النجم كرة من الغاز تضيء بنفسها لأن الاندماج النووي يجري في قلبها، أما الكوكب فلا يصدر "
        "ضوءا من عنده بل يعكس ضوء النجم الذي يدور حوله.",
    ),
    (
        "Как хранить хлеб, чтобы он не черствел?",
        "Держите его в льняном мешке или в закрытой хлебнице при комнатной температуре; в "
        "холодильнике хлеб черствеет быстрее, а лишнее лучше нарезать и заморозить.",
    ),
    (
        "भारत में मानसून कब आता है?",
        "मानसून सामान्यतः जून के पहले सप्ताह में केरल पहुँचता है और जुलाई के मध्य तक लगभग पूरे देश में "
        "वर्षा होने लगती है।",
    ),
    (
        "お茶をおいしく淹れるこつを教えてください。",
        "お湯は少し冷まして八十度くらいにし、茶葉を入れた急須に注いで一分ほど待ちます。最後の一滴まで注ぎ切ると、"
        "二煎目もおいしく飲めます。",
    ),
    (
        "Was bedeutet das Sprichwort „Übung macht den Meister“?",
        "Wer etwas oft und mit Geduld wiederholt, wird darin allmählich besser; größtes Können "
        "fällt niemandem über Nacht zu.",
    ),
    (
        "Write a Python function that returns the n-th Fibonacci number.",
        "```python\ndef fibonacci(n: int) -> int:\n    first, second = 0, 1\n    for _ in range(n):"
        "\n        first, second = second, first + second\n    return first\n```",
    ),
    (
        "Solve x² − 5x + 6 = 0 and give ∑ of the roots.",
        "The left side factors as (x − 2)(x − 3), so x₁ = 2 and x₂ = 3. Their sum is 5, which is "
        "−b/a as it must be; √(b² − 4ac) = 1.",
    ),
    (
        "¿Puedes resumir el plan del viaje? ✈️",
        "Sí: el lunes volamos a Córdoba, el martes visitamos la Mezquita a las 9:30, y el "
        "miércoles regresamos en tren (precio: 42,50 €). 한국어 안내도 있습니다 🙂",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One text for the models.

    Attributes:
        input_ids: int64 [seq].
        loss_mask: bool [seq], True where the next word belongs to the answer: the positions that
            have a loss in training.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor


def encode_texts(tokenizer_folder: Path, *, vocab_size: int) -> tuple[TokenText, ...]:
    """The built-in texts as words of a model, at most `MAX_TOKENS` each.

    Args:
        tokenizer_folder: Folder of the tokenizer. Without tokenizer files in it, words stand for
            the bytes of the texts, spread evenly over the vocabulary.
        vocab_size: Words of the model. Numbers of a larger tokenizer start again from 0.

    Raises:
        ValueError: The folder has a tokenizer that does not load.
    """
    if any(Path(tokenizer_folder, name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = _load_tokenizer(tokenizer_folder)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        pairs = [
            (start + _words(tokenizer, f"{question}\n"), _words(tokenizer, answer))
            for question, answer in TEXTS
        ]
    else:
        pairs = [
            (_byte_words(f"{question}\n", vocab_size), _byte_words(answer, vocab_size))
            for question, answer in TEXTS
        ]
    return tuple(_token_text(prompt, answer, vocab_size) for prompt, answer in pairs)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: cannot load the tokenizer: {reason}") from error


def _words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _byte_words(text: str, vocab_size: int) -> list[int]:
    return [byte * vocab_size // 256 for byte in text.encode()]


def _token_text(prompt: list[int], answer: list[int], vocab_size: int) -> TokenText:
    prompt = prompt[:_MAX_PROMPT_TOKENS]
    words = (prompt + answer)[:MAX_TOKENS]
    loss_mask = torch.zeros(len(words), dtype=torch.bool)
    loss_mask[len(prompt) - 1 : -1] = True
    return TokenText(input_ids=torch.tensor(words) % vocab_size, loss_mask=loss_mask)
