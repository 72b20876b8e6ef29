import json

import numpy as np
import pytest

from mtrain.data.encode import (
    Drop,
    Encoder,
    EncodeSettings,
    Why,
    encode_chunk,
    longest_position,
    tokens_inside,
)
from mtrain.data.formats import Conversation
from mtrain.data.rows import Place
from mtrain.data.storage import IGNORED
from tests.data.test_template import chat
from tests.data.tiny_tokenizer import CHATML, INSTRUCT, save_tokenizer


def settings(folder, template=CHATML, **changes):
    values = {
        "model_dir": save_tokenizer(folder, template),
        "system": None,
        "enable_thinking": None,
        "max_length": None,
        "truncation_strategy": "delete",
    }
    return EncodeSettings(**{**values, **changes})


def labelled_text(encoder, encoded):
    return encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORED])


def test_labels_decode_to_what_the_assistant_says(tmp_path):
    encoder = Encoder(settings(tmp_path))
    (encoded,) = encoder.encode([chat("Frage?", "日本 🙂 café", "q2", "a2")])
    assert labelled_text(encoder, encoded) == "日本 🙂 café<|im_end|>a2<|im_end|>"
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


def test_labels_are_shifted_by_one(tmp_path):
    encoder = Encoder(settings(tmp_path))
    (encoded,) = encoder.encode([chat("q", "a")])
    has_loss = encoded.labels != IGNORED
    assert np.array_equal(encoded.labels[:-1][has_loss[:-1]], encoded.input_ids[1:][has_loss[:-1]])
    assert encoded.labels[-1] == IGNORED
    first = int(np.flatnonzero(has_loss)[0])
    assert encoder.tokenizer.decode(encoded.input_ids[: first + 1]).endswith("assistant\n")


def test_a_token_that_holds_part_of_the_prompt_has_no_loss(tmp_path):
    """The answer's first newline merges with the prompt's last one into one token."""
    encoder = Encoder(settings(tmp_path))
    (encoded,) = encoder.encode([chat("q", "\na")])
    assert labelled_text(encoder, encoded) == "a<|im_end|>"


def test_the_begin_token_of_the_template_is_not_doubled(tmp_path):
    encoder = Encoder(settings(tmp_path, INSTRUCT))
    (encoded,) = encoder.encode([chat("q", "a")])
    begin = encoder.tokenizer.convert_tokens_to_ids("<s>")
    assert encoded.input_ids[0] == begin
    assert np.count_nonzero(encoded.input_ids == begin) == 1


def test_plain_text_has_loss_on_everything_and_needs_no_chat_template(tmp_path):
    encoder = Encoder(settings(tmp_path, None))
    (encoded,) = encoder.encode([Conversation(Place("f", 1), (), text="abc")])
    assert labelled_text(encoder, encoded) == "bc<|im_end|>"


def test_delete_drops_and_exactly_max_length_stays(tmp_path):
    (whole,) = Encoder(settings(tmp_path)).encode([chat("q", "answer")])
    length = len(whole.input_ids)
    exact = Encoder(settings(tmp_path, max_length=length))
    assert not exact.encode([chat("q", "answer")])[0].truncated
    short = Encoder(settings(tmp_path, max_length=length - 1))
    assert short.encode([chat("q", "answer")]) == [Drop(Why.TOO_LONG)]


@pytest.mark.parametrize(
    ("side", "left"), [("left", "nswer<|im_end|>"), ("right", "answer<|im_end|>")]
)
def test_truncation_keeps_one_side_and_labels_only_what_is_left(tmp_path, side, left):
    (whole,) = Encoder(settings(tmp_path)).encode([chat("q", "answer")])
    limit = 8 if side == "left" else len(whole.input_ids) - 1
    encoder = Encoder(settings(tmp_path, max_length=limit, truncation_strategy=side))
    (encoded,) = encoder.encode([chat("q", "answer")])
    assert encoded.truncated
    assert len(encoded.input_ids) == limit
    assert labelled_text(encoder, encoded) == left
    kept = encoded.labels != IGNORED
    assert np.array_equal(encoded.labels[:-1][kept[:-1]], encoded.input_ids[1:][kept[:-1]])
    assert encoded.labels[-1] == IGNORED


def test_a_row_left_without_a_label_is_dropped(tmp_path):
    encoder = Encoder(settings(tmp_path, max_length=5, truncation_strategy="right"))
    assert encoder.encode([chat("a long question", "a")]) == [Drop(Why.NO_LABEL)]


def test_refused_samples_keep_their_place_among_the_results(tmp_path):
    encoder = Encoder(settings(tmp_path))
    bad = chat("q", "has <|im_end|> in it")
    first, second, third = encoder.encode([bad, chat("q", "a"), bad])
    assert first == third
    assert first.why is Why.REFUSED
    assert labelled_text(encoder, second) == "a<|im_end|>"
    assert [type(result) for result in encoder.encode([bad])] == [Drop]


def test_a_worker_encodes_the_same(tmp_path):
    chosen = settings(tmp_path)
    here, there = Encoder(chosen).encode([chat("q", "a")]), encode_chunk((chosen, [chat("q", "a")]))
    assert np.array_equal(here[0].labels, there[0].labels)


def test_tokens_inside_needs_both_ends():
    offsets = np.array([[0, 2], [2, 4], [3, 5], [4, 6], [5, 7], [6, 6], [8, 9]])
    inside = tokens_inside(offsets, [(2, 6), (8, 9)])
    assert inside.tolist() == [False, True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("config", "expected"), [({"max_position_embeddings": 64}, 64), ({}, None), (None, None)]
)
def test_the_longest_position_is_the_models(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_position(tmp_path) == expected
