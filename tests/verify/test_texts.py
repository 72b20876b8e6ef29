import unicodedata

import pytest
import torch

from mtrain.verify.texts import MAX_TOKENS, TEXTS, encode_texts
from tests.data.tiny_tokenizer import make_tokenizer, save_tokenizer

SCRIPTS = {"LATIN", "CJK", "ARABIC", "CYRILLIC", "DEVANAGARI", "HIRAGANA", "HANGUL"}


def test_texts_are_of_many_scripts():
    letters = [letter for pair in TEXTS for letter in "".join(pair) if letter.isalpha()]
    found = {unicodedata.name(letter).split()[0] for letter in letters}
    assert found >= SCRIPTS


@pytest.mark.parametrize("vocab_size", [131, 151936])
def test_without_a_tokenizer_words_cover_the_vocabulary(vocab_size, tmp_path):
    texts = encode_texts(tmp_path, vocab_size=vocab_size)
    words = torch.cat([text.input_ids for text in texts])
    assert words.min() >= 0
    assert words.max() < vocab_size
    # Every quarter of the vocabulary, so that each tensor-parallel rank's part is looked at.
    assert set((4 * words // vocab_size).tolist()) == {0, 1, 2, 3}
    again = encode_texts(tmp_path, vocab_size=vocab_size)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(texts, again, strict=True))


def test_texts_are_cut_and_have_answers(tmp_path):
    for text in encode_texts(tmp_path, vocab_size=131):
        assert text.input_ids.shape == text.loss_mask.shape
        assert len(text.input_ids) <= MAX_TOKENS
        assert text.loss_mask.any()
        assert not text.loss_mask[-1]
        assert not text.loss_mask.all()


def test_the_loss_mask_is_on_the_words_before_those_of_the_answer(tmp_path):
    texts = encode_texts(save_tokenizer(tmp_path), vocab_size=300)
    tokenizer = make_tokenizer()
    for text, (question, answer) in zip(texts, TEXTS, strict=True):
        predicted = text.input_ids[1:][text.loss_mask[:-1]].tolist()
        expected = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert predicted == expected[: len(predicted)]
        start = tokenizer(question, add_special_tokens=False)["input_ids"][:40]
        assert text.input_ids[: len(start)].tolist() == start


def test_numbers_above_the_vocabulary_of_the_model_start_again(tmp_path):
    larger = encode_texts(save_tokenizer(tmp_path), vocab_size=300)
    smaller = encode_texts(tmp_path, vocab_size=100)
    for one, other in zip(larger, smaller, strict=True):
        assert torch.equal(one.input_ids % 100, other.input_ids)


def test_a_tokenizer_that_does_not_load_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        encode_texts(tmp_path, vocab_size=131)
