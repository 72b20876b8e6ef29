import pytest

from mtrain.data.self_cognition import self_cognition_rows


def test_there_are_about_sixty_pairs_a_language_without_repetition():
    rows = list(self_cognition_rows(names=["N"], authors=["A"]))
    assert len(rows) == 120
    assert len({row["query"] for row in rows}) == 120
    assert all(row["query"].strip() and row["response"].strip() for row in rows)


def test_two_values_are_chinese_then_english():
    rows = list(self_cognition_rows(names=["小白", "Snow"], authors=["某人", "{name} & Co"]))
    everything = [row["query"] + row["response"] for row in rows]
    assert sum("小白" in text for text in everything[:60]) > 30
    assert sum("Snow" in text for text in everything[60:]) > 30
    assert not any("小白" in text for text in everything[60:])
    assert any("某人" in text for text in everything[:60])


def test_no_placeholder_is_left():
    rows = self_cognition_rows(names=["N"], authors=["A"])
    assert not any("{" in row["query"] + row["response"] for row in rows)


@pytest.mark.parametrize("names", [[], ["a", "b", "c"]])
def test_other_numbers_of_names_are_refused(names):
    with pytest.raises(ValueError, match="--model_name takes one value, or two"):
        list(self_cognition_rows(names=names, authors=["A"]))
