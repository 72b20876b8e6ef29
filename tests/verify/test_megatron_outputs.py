"""T42: every layer of every family equals Hugging Face's, on every kind of layout."""

from functools import cache

import pytest
import torch

from mtrain.parallel import ParallelLayout
from mtrain.verify.hf_outputs import hf_outputs
from mtrain.verify.megatron_outputs import megatron_outputs
from mtrain.verify.precision import compare_outputs
from mtrain.verify.texts import TokenText, encode_texts
from tests.adapters import attached, plan_of, random_factors
from tests.lora.peft_folders import write_adapter
from tests.megatron import SINGLE, load_model
from tests.next_tokens import (
    make_checkpoint_with_next_tokens,
    names_left_out,
    with_second_layer,
)
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

VOCAB = 131
MOE = ("qwen3_moe", "qwen3_moe_mixed")
FAMILIES = ("llama3_tied", "qwen2", "qwen3", *MOE)
LAYOUTS = {
    "single": SINGLE,
    "tp2": ParallelLayout(world_size=2, tp_size=2),
    "pp2_vpp2": ParallelLayout(world_size=2, pp_size=2, vpp_size=2),
}
EXPERT_LAYOUTS = {
    "tp2_ep2": ParallelLayout(world_size=2, tp_size=2, ep_size=2),
    "tp2_ep2_pp2": ParallelLayout(world_size=4, tp_size=2, pp_size=2, ep_size=2),
    "dp2_etp2": ParallelLayout(world_size=2, etp_size=2),
}
CASES = [(name, sizes) for name in FAMILIES for sizes in LAYOUTS]
CASES += [(name, sizes) for name in MOE for sizes in EXPERT_LAYOUTS]
CASES += [(name, "tp2") for name in ("mistral", "deepseek_v2", "glm4", "phi3")]
CASES += [(name, "tp2_ep2_pp2") for name in ("mixtral", "qwen2_moe", "glm4_moe")]


def shortened(texts):
    """Texts of odd lengths, which sequence parallelism has to fill up."""
    return [
        TokenText(input_ids=text.input_ids[:length], loss_mask=text.loss_mask[:length])
        for text, length in zip(texts, (97, 128, 1, 63), strict=False)
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """(folder, texts, what Hugging Face makes of them) of a family in a dtype."""

    @cache
    def checkpoint(name):
        return make_checkpoint(tmp_path_factory.mktemp(name), name)

    @cache
    def judged(name, dtype):
        folder = checkpoint(name)
        texts = shortened(encode_texts(folder, vocab_size=VOCAB))
        return folder, texts, hf_outputs(folder, texts, dtype=dtype, device=torch.device("cpu"))

    return judged


def outputs_of(state, folder, texts, dtype):
    return megatron_outputs(load_model(state, folder, dtype=dtype), texts, state=state)


@pytest.mark.shows("precision")
@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_every_layer_equals_hugging_face(name, sizes, judge):
    folder, texts, theirs = judge(name, torch.float32)
    layout = (LAYOUTS | EXPERT_LAYOUTS)[sizes]
    first, *others = run_ranks(layout, outputs_of, folder, texts, torch.float32)
    report = compare_outputs(first, theirs, texts, dtype=torch.float32)
    assert report.passed, "\n".join(report.table())
    # The stated threshold leaves room for large models; tiny ones are far below.
    assert max(row.max_relative for row in report.rows) < 1e-5
    assert others == [[]] * (layout.world_size - 1)


@pytest.mark.parametrize(
    ("name", "sizes", "dtype"),
    [
        ("qwen3", "tp2", torch.bfloat16),
        ("qwen2", "single", torch.float16),
        ("qwen3_moe", "tp2_ep2", torch.bfloat16),
    ],
)
def test_half_precision_passes(name, sizes, dtype, judge):
    folder, texts, theirs = judge(name, dtype)
    layout = (LAYOUTS | EXPERT_LAYOUTS)[sizes]
    ours = run_ranks(layout, outputs_of, folder, texts, dtype)[0]
    report = compare_outputs(ours, theirs, texts, dtype=dtype)
    assert report.passed, "\n".join(report.table())


def adapted_outputs(state, folder, lora, values, texts):
    return megatron_outputs(attached(state, folder, lora, values), texts, state=state)


@pytest.mark.parametrize(("name", "sizes"), [("qwen2", "pp2_vpp2"), ("qwen3_moe", "tp2_ep2_pp2")])
def test_an_adapted_model_equals_peft(name, sizes, judge, tmp_path):
    folder, texts, plain = judge(name, torch.float32)
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    adapter = write_adapter(tmp_path / "adapter", lora, table, values)
    theirs = hf_outputs(
        folder,
        texts,
        adapter_folder=adapter,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    layout = (LAYOUTS | EXPERT_LAYOUTS)[sizes]
    ours = run_ranks(layout, adapted_outputs, folder, lora, values, texts)[0]
    report = compare_outputs(ours, theirs, texts, dtype=torch.float32)
    assert report.passed, "\n".join(report.table())
    plainly = compare_outputs(ours, plain, texts, dtype=torch.float32)
    assert plainly.first_departure == "layer 0"


def modes_and_hooks(state, folder, texts):
    chunks = load_model(state, folder)
    chunks[0].train()
    chunks[1].eval()
    megatron_outputs(chunks, texts, state=state)
    hooks = [layer._forward_hooks for chunk in chunks for layer in chunk.decoder.layers]
    return [chunk.training for chunk in chunks], any(hooks)


def test_the_model_is_left_as_it_was(judge):
    folder, texts, _ = judge("qwen2", torch.float32)
    results = run_ranks(LAYOUTS["pp2_vpp2"], modes_and_hooks, folder, texts)
    assert results == [([True, False], False)] * 2


NEXT_TOKEN_CASES = [
    *(("deepseek_v3", sizes) for sizes in (*LAYOUTS, "tp2_ep2_pp2")),
    ("glm4_moe", "tp2_ep2_pp2"),
    ("qwen3_next_moe", "pp2_vpp2"),
    ("two_layers", "tp2_ep2_pp2"),
]


def outputs_with_next_tokens(state, folder, texts, num_next_tokens):
    chunks = load_model(state, folder, num_next_tokens=num_next_tokens)
    return megatron_outputs(chunks, texts, state=state)


@pytest.mark.parametrize(("name", "sizes"), NEXT_TOKEN_CASES)
def test_multi_token_prediction_equals_hugging_face(name, sizes, tmp_path):
    """The layers sit on the last stage, with an embedding of their own if there are several."""
    source = "deepseek_v3" if name == "two_layers" else name
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", source)
    number = 1
    if name == "two_layers":
        folder, number = with_second_layer(folder, tmp_path / "two"), 2
    texts = shortened(encode_texts(folder, vocab_size=VOCAB))
    theirs = hf_outputs(
        folder,
        texts,
        dtype=torch.float32,
        left_out=names_left_out(folder),
        num_next_tokens=number,
        device=torch.device("cpu"),
    )
    layout = (LAYOUTS | EXPERT_LAYOUTS)[sizes]
    first, *others = run_ranks(layout, outputs_with_next_tokens, folder, texts, number)
    report = compare_outputs(first, theirs, texts, dtype=torch.float32)
    assert report.passed, "\n".join(report.table())
    rows = [row for row in report.rows if "multi-token" in row.name]
    assert len(rows) == 2 * 2 * number
    assert max(row.max_relative for row in report.rows) < 2e-5
    assert others == [[]] * (layout.world_size - 1)
