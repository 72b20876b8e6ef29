from dataclasses import replace

import pytest

from mtrain.bridge.sources import TensorShape
from mtrain.bridge.storage.arrangement import (
    Arrangement,
    arrangements,
    as_it_is,
    find_arrangements,
    native_arrangements,
)
from mtrain.bridge.storage.forms import StorageForm, stacked_experts
from tests.bridge.storage.checkpoints import EXPERTS, gpt2_table, gpt_oss_table, qwen3_moe_table


def stored(*found: Arrangement) -> dict[str, TensorShape]:
    return {one.name: TensorShape("F32", one.shape) for one in found}


def test_a_form_is_one_tensor_in_each_layer_that_has_its_parts():
    """Layer 1 of this model has no experts."""
    table = qwen3_moe_table()
    gate_up = arrangements(table, table.forms[0])
    assert [one.name for one in gate_up] == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 2, 3)
    ]
    assert {one.shape for one in gate_up} == {(4, 96, 64)}
    start = "model.layers.2.mlp.experts."
    assert gate_up[1].slabs[3] == (f"{start}3.gate_proj.weight", f"{start}3.up_proj.weight")
    assert [name for name, _ in gate_up[1].canonical][:3] == [
        f"{start}0.gate_proj.weight",
        f"{start}0.up_proj.weight",
        f"{start}1.gate_proj.weight",
    ]


def test_a_form_of_something_that_the_model_does_not_have_is_nowhere():
    form = StorageForm(stored="x", parts=("model.layers.{layer}.unknown.weight",))
    assert arrangements(qwen3_moe_table(), form) == ()


def test_rows_are_where_their_order_says():
    shapes = ((3, 2), (5, 2))
    one = Arrangement(name="x", slabs=(("a", "b"),), part_shapes=shapes)
    assert (one.first_row(0), one.first_row(1), one.row_step) == (0, 3, 1)
    assert (one.shape, one.is_plain) == ((8, 2), False)
    other = replace(one, order="interleaved", part_shapes=((3, 2),) * 2, is_transposed=True)
    assert (other.first_row(0), other.first_row(1), other.row_step) == (0, 1, 2)
    assert other.shape == (2, 6)
    assert as_it_is("x", (3,)).is_plain


def test_only_native_forms_are_written_without_being_asked_for():
    assert native_arrangements(qwen3_moe_table()) == ()
    assert len(native_arrangements(gpt_oss_table())) == 2 * 4
    assert len(native_arrangements(gpt2_table())) == 2 * 4


def test_of_two_native_forms_of_one_name_the_first_is_written():
    table = replace(
        gpt_oss_table(),
        forms=(
            *stacked_experts(EXPERTS, is_transposed=True, is_native=True),
            *stacked_experts(EXPERTS, is_native=True),
        ),
    )
    native = native_arrangements(table)
    assert len(native) == len({one.name for one in native}) == 4
    assert {one.is_transposed for one in native} == {True}


def test_what_is_stored_in_a_form_is_found():
    table = gpt_oss_table()
    native = native_arrangements(table)
    found, faults = find_arrangements(table, stored(*native))
    assert sorted(one.name for one in found) == sorted(one.name for one in native)
    assert faults == {}
    assert find_arrangements(table, {}) == ((), {})


@pytest.mark.parametrize("index", range(8))
def test_each_tensor_of_a_form_is_missed_when_it_alone_is_not_there(index):
    table = gpt_oss_table()
    native = native_arrangements(table)
    _, faults = find_arrangements(table, stored(*native[:index], *native[index + 1 :]))
    assert faults == {"missing": [native[index].name]}


def test_a_layer_may_be_stored_one_by_one_and_another_one_stacked():
    table = qwen3_moe_table()
    all_found = [one for form in table.forms for one in arrangements(table, form)]
    first = [one for one in all_found if ".0." in one.name.split("mlp")[0]]
    rest = {
        name: TensorShape("F32", shape)
        for one in all_found
        if one not in first
        for name, shape in one.canonical
    }
    found, faults = find_arrangements(table, stored(*first) | rest)
    assert (list(found), faults) == (first, {})


def test_a_canonical_tensor_in_two_stored_ones_is_a_fault():
    form = StorageForm(stored="other.{layer}", parts=(f"{EXPERTS}{{expert}}.down_proj.weight",))
    table = qwen3_moe_table()
    table = replace(table, forms=(*table.forms, form))
    every = [one for one_form in table.forms for one in arrangements(table, one_form)]
    _, faults = find_arrangements(table, stored(*every))
    start = "model.layers.0.mlp.experts."
    assert faults["stored twice"][0] == (
        f"{start}0.down_proj.weight (in {start}down_proj and other.0)"
    )
