from mtrain.bridge.storage.forms import StorageForm, stacked_experts, transposed, without_prefix


def test_stacked_experts_have_gate_and_up_in_one_tensor():
    gate_up, down = stacked_experts("m.{layer}.experts.")
    assert gate_up == StorageForm(
        stored="m.{layer}.experts.gate_up_proj",
        parts=(
            "m.{layer}.experts.{expert}.gate_proj.weight",
            "m.{layer}.experts.{expert}.up_proj.weight",
        ),
    )
    assert (down.stored, down.parts) == (
        "m.{layer}.experts.down_proj",
        ("m.{layer}.experts.{expert}.down_proj.weight",),
    )
    assert gate_up.has_experts
    assert down.has_experts


def test_experts_may_have_other_names_one_by_one():
    gate_up, down = stacked_experts("a.", canonical="b.", gate="w1", up="w3", down="w2")
    assert gate_up.stored == "a.gate_up_proj"
    assert gate_up.parts == ("b.{expert}.w1.weight", "b.{expert}.w3.weight")
    assert (down.stored, down.parts) == ("a.down_proj", ("b.{expert}.w2.weight",))


def test_biases_are_interleaved_like_rows_and_have_nothing_to_transpose():
    forms = stacked_experts(
        "e.", order="interleaved", is_transposed=True, is_native=True, has_bias=True
    )
    facts = {form.stored: (form.order, form.is_transposed, form.is_native) for form in forms}
    assert facts == {
        "e.gate_up_proj": ("interleaved", True, True),
        "e.gate_up_proj_bias": ("interleaved", False, True),
        "e.down_proj": ("concatenated", True, True),
        "e.down_proj_bias": ("concatenated", False, True),
    }


def test_a_transposed_weight_keeps_its_name():
    first, second = transposed("a.weight", "b.weight")
    assert (first.stored, first.parts, first.is_transposed) == ("a.weight", ("a.weight",), True)
    assert second.stored == "b.weight"
    assert not first.has_experts


def test_names_without_their_prefix_keep_the_form_of_what_has_it():
    names = ("t.a.{layer}.weight", "t.b", "head.weight", "t.b")
    forms = transposed("t.a.{layer}.weight")
    assert without_prefix("t.", names, forms) == (
        StorageForm(stored="b", parts=("t.b",)),
        StorageForm(stored="a.{layer}.weight", parts=("t.a.{layer}.weight",), is_transposed=True),
    )
