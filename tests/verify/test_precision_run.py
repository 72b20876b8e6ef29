"""T46: the precision test as users run it finds every kind of wrong weight and wrong setting."""

import json
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtrain.parallel import ParallelLayout
from mtrain.verify.precision_run import run_precision_test
from mtrain.verify.texts import encode_texts
from tests.adapters import attached, plan_of, random_factors
from tests.lora.peft_folders import write_adapter
from tests.megatron import SINGLE, load_model
from tests.next_tokens import make_checkpoint_with_next_tokens, names_left_out
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

VOCAB = 131
FOUR_RANKS = ParallelLayout(world_size=4, tp_size=2, pp_size=2, ep_size=2)


def precision(state, chunks, folder, dtype, adapter=None, **options):
    return run_precision_test(
        chunks,
        state=state,
        hf_folder=folder,
        adapter_folder=adapter,
        tokenizer_folder=folder,
        vocab_size=VOCAB,
        dtype=dtype,
        **options,
    )


def plain_run(state, folder, dtype):
    return precision(state, load_model(state, folder, dtype=dtype), folder, dtype)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    # Heads times head_dim is the hidden size, so that the output projection is square.
    return make_checkpoint(tmp_path_factory.mktemp("dense"), "qwen3", head_dim=16)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [SINGLE, FOUR_RANKS], ids=["single", "tp2_ep2_pp2"])
def test_a_right_model_passes_on_every_rank(layout, dtype, moe):
    reports = run_ranks(layout, plain_run, moe, dtype)
    assert len(reports) == layout.world_size
    assert all(report == reports[0] for report in reports)
    assert reports[0].passed, "\n".join(reports[0].table())
    assert reports[0].num_tokens > 1000


def layer_of(chunks, number):
    """A decoder layer by its number in the model, or None on ranks that have it not."""
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return next((layer for layer in layers if layer.layer_number == number + 1), None)


def swap_query_and_key_norm(layer):
    query, key = layer.self_attention.q_layernorm.weight, layer.self_attention.k_layernorm.weight
    query.data, key.data = key.data, query.data


def transpose_the_output_projection(layer):
    weight = layer.self_attention.linear_proj.weight
    weight.data = weight.data.t().contiguous()


def exchange_two_experts(layer):
    for linear in (layer.mlp.experts.linear_fc1, layer.mlp.experts.linear_fc2):
        weight = linear.weight.data
        weight[[0, 1]] = weight[[1, 0]]


def put_in_a_nan(layer):
    layer.self_attention.linear_proj.weight.data[3, 5] = torch.nan


# Model -> (fault of a layer, the layer): what its figures must depart at.
FAULTS = {
    "dense": [
        (swap_query_and_key_norm, 1),
        (transpose_the_output_projection, 2),
        (put_in_a_nan, 3),
    ],
    "moe": [(exchange_two_experts, 1)],
}
# Model -> what Megatron is built with instead; every layer is wrong then.
WRONG_SETTINGS = {
    "dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "moe": {"norm_topk_prob": False},
}


def faulty_runs(state, folder, wrong_settings, dtype, faults):
    """A report for each fault of a layer, then one with the wrong settings."""
    reports = []
    for fault, number in faults:
        chunks = load_model(state, folder, dtype=dtype)
        layer = layer_of(chunks, number)
        if layer is not None:
            with torch.no_grad():
                fault(layer)
        reports.append(precision(state, chunks, folder, dtype))
    chunks = load_model(state, wrong_settings, dtype=dtype)
    return [*reports, precision(state, chunks, folder, dtype)]


@pytest.fixture(scope="module")
def reports_of(dense, moe, tmp_path_factory):
    folders = {"dense": dense, "moe": moe}

    @cache
    def reports(model, dtype):
        other = shutil.copytree(
            folders[model], tmp_path_factory.mktemp("other"), dirs_exist_ok=True
        )
        config = json.loads((other / "config.json").read_text())
        assert config.keys() >= WRONG_SETTINGS[model].keys()
        (other / "config.json").write_text(json.dumps(config | WRONG_SETTINGS[model]))
        job = (folders[model], other, dtype, FAULTS[model])
        return run_ranks(SINGLE, faulty_runs, *job)[0]

    return reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", list(FAULTS))
def test_a_wrong_weight_fails_in_its_layer(model, dtype, reports_of):
    """T46: norms of queries and keys, a transposed square matrix, NaN; exchanged experts."""
    for (_, number), report in zip(FAULTS[model], reports_of(model, dtype)[:-1], strict=True):
        assert not report.passed
        assert report.first_departure == f"layer {number}", "\n".join(report.table())
        json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", list(WRONG_SETTINGS))
def test_a_wrong_setting_fails_from_the_first_layer_on(model, dtype, reports_of):
    """T46: the base of the rotary embedding; a router that does not normalise its weights."""
    report = reports_of(model, dtype)[-1]
    assert not report.passed
    assert report.first_departure == "layer 0", "\n".join(report.table())


def faulty_run(state, folder):
    chunks = load_model(state, folder)
    layer = layer_of(chunks, 3)
    if layer is not None:
        with torch.no_grad():
            exchange_two_experts(layer)
    return precision(state, chunks, folder, torch.float32)


def test_a_wrong_weight_fails_in_its_layer_on_every_layout(moe):
    """T46: the experts are two of one expert-parallel rank of the second stage."""
    reports = run_ranks(FOUR_RANKS, faulty_run, moe)
    assert {report.first_departure for report in reports} == {"layer 3"}


RARE_LAYER = 1


def make_rare_expert(folder, target):
    """Scales a row of a router until one token is at a tie, and no other chooses the expert.

    Returns:
        The folder, the expert, and the factor of the row at which a second token is at a tie.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    router = model.model.layers[RARE_LAYER].mlp.gate
    router.register_forward_hook(lambda *call: found.append(call[2][0]))
    with torch.no_grad():
        for text in encode_texts(folder, vocab_size=VOCAB):
            model(text.input_ids[None])
    logits = torch.cat(found)
    best = None
    for expert in range(logits.shape[1]):
        others = logits.clone()
        others[:, expert] = -torch.inf
        border = others.topk(router.top_k).values[:, -1]
        assert (border > 0).all()
        # With the row times this, the token is at a tie.
        factors = torch.where(logits[:, expert] > 0, border / logits[:, expert], torch.inf)
        first, second = factors.sort().values[:2].tolist()
        if best is None or second / first > best[2] / best[1]:
            best = (expert, first, second)
    expert, first, second = best
    assert second / first > 1.02
    shutil.copytree(folder, target, dirs_exist_ok=True)
    scale_row(target, expert, first)
    return target, expert, second / first


def scale_row(folder, expert, factor):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{RARE_LAYER}.mlp.gate.weight"][expert] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rare_run(state, folder, expert, factor, overwritten):
    """Megatron with a row of a router scaled; the expert may get the weights of its neighbour."""
    chunks = load_model(state, folder)
    mlp = layer_of(chunks, RARE_LAYER).mlp
    with torch.no_grad():
        mlp.router.weight[expert] *= factor
        if overwritten:
            for linear in (mlp.experts.linear_fc1, mlp.experts.linear_fc2):
                linear.weight[expert] = linear.weight[expert - 1]
    return precision(state, chunks, folder, torch.float32)


@pytest.fixture
def rare(tmp_path):
    """What `make_rare_expert` returns; enough experts for all last chosen logits to be positive."""
    source = make_checkpoint(
        tmp_path / "source", "qwen3_moe", num_experts=32, moe_intermediate_size=32
    )
    return make_rare_expert(source, tmp_path / "rare")


def test_a_wrong_expert_that_a_single_token_uses_fails(rare):
    """T46: it is no tie, so one token of more than a thousand is enough."""
    folder, expert, up_to = rare
    scale_row(folder, expert, up_to**0.5)
    right, wrong = (run_ranks(SINGLE, rare_run, *rare[:2], 1, bad)[0] for bad in (False, True))
    assert right.passed, "\n".join(right.table())
    assert wrong.first_departure == f"layer {RARE_LAYER}", "\n".join(wrong.table())
    assert wrong.rows[RARE_LAYER].departed == pytest.approx(1 / wrong.num_tokens)
    assert wrong.excused.num_tokens == 0


def test_a_token_at_a_tie_may_go_to_another_expert(rare):
    """The same token passes where the last bits of the router's weights decide."""
    folder, expert, up_to = rare
    scale_row(folder, expert, 1 - 2e-6)
    (report,) = run_ranks(SINGLE, rare_run, folder, expert, 1 + 4e-6, False)
    assert report.passed, "\n".join(report.table())
    (tie,) = report.excused.ties
    assert tie.layer == RARE_LAYER
    assert tie.margin < 4e-6
    assert report.rows[RARE_LAYER].excused == 1
    # A weight that is wrong by more than rounding is another matter.
    scale_row(folder, expert, up_to**-0.25)
    (report,) = run_ranks(SINGLE, rare_run, folder, expert, up_to**0.5, False)
    assert report.first_departure == f"layer {RARE_LAYER}"


def adapted_runs(state, folder, lora, values, adapter, dtype):
    """Reports against PEFT's model, and against the model without the adapter."""
    chunks = attached(state, folder, lora, values, dtype=dtype)
    return [precision(state, chunks, folder, dtype, judged) for judged in (adapter, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_an_adapter_passes_and_without_it_fails(dtype, dense, tmp_path):
    table, lora = plan_of(dense)
    values = random_factors(table, lora)
    adapter = write_adapter(tmp_path / "adapter", lora, table, values)
    layout = ParallelLayout(world_size=2, tp_size=2)
    for with_it, without in run_ranks(layout, adapted_runs, dense, lora, values, adapter, dtype):
        assert with_it.passed, "\n".join(with_it.table())
        assert without.first_departure == "layer 0"


def run_with_next_tokens(state, folder, lora, values, adapter, adapts_next_tokens):
    chunks = attached(state, folder, lora, values, num_next_tokens=1)
    return precision(
        state,
        chunks,
        folder,
        torch.float32,
        adapter,
        left_out=names_left_out(folder),
        adapts_next_tokens=adapts_next_tokens,
    )


def adapter_of(folder, target, *names):
    """An adapter of the model with multi-token prediction, of linears with these names."""
    table, lora = plan_of(folder, num_next_tokens=1, target_modules=names)
    values = random_factors(table, lora)
    return lora, values, write_adapter(target, lora, table, values)


def test_an_adapter_of_multi_token_prediction_is_not_compared_and_it_is_said(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    job = (folder, *adapter_of(folder, tmp_path / "adapter", "o_proj"), True)
    (report,) = run_ranks(SINGLE, run_with_next_tokens, *job)
    assert report.passed, "\n".join(report.table())
    assert not any("multi-token" in row.name for row in report.rows)
    assert report.table()[-2] == (
        "NOT compared: multi-token prediction, because PEFT leaves out the part of the adapter "
        "that changes it"
    )


def test_multi_token_prediction_behind_an_adapted_model_is_compared(tmp_path):
    """It takes the hidden states that the adapter changed, and the head that it changed."""
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "glm4_moe")
    adapted = adapter_of(folder, tmp_path / "adapter", "embed_tokens", "lm_head")
    (report,) = run_ranks(SINGLE, run_with_next_tokens, folder, *adapted, False)
    assert report.passed, "\n".join(report.table())
    assert any("multi-token" in row.name for row in report.rows)
    assert not report.not_compared


def refused_run(state, folder, broken):
    with pytest.raises(ValueError, match="the precision test cannot be made") as refusal:
        precision(state, load_model(state, folder), broken, torch.float32)
    return str(refusal.value)


def test_what_the_first_rank_cannot_load_is_an_error_on_every_rank(dense, tmp_path):
    layout = ParallelLayout(world_size=2, tp_size=2)
    messages = run_ranks(layout, refused_run, dense, tmp_path)
    assert len(set(messages)) == 1
    (tmp_path / "tokenizer.json").write_text("{}")
    messages = run_ranks(layout, refused_run, dense, tmp_path)
    assert len(set(messages)) == 1
    assert "tokenizer" in messages[0]
