import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb_interleave as turn_deepseek,
)
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen3_next import modeling_qwen3_next

from mtrain.bridge.family import LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from mtrain.model.rope import RotaryEmbedding, llama3_frequencies, rotary_frequencies, rotate
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")
# Of Phi-4-mini-instruct; its short factors are all 1.
LONG_FACTORS = (
    *(1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817),
    *(2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687),
    *(4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894),
    *(8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252),
    *(16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884),
    *(32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97),
    *(33.28, 33.49, 33.5, 44.16, 47.77),
)
SHORT_FACTORS = (1.0,) * 48


def llama(head_dim, **rope_parameters):
    return LlamaConfig(
        hidden_size=16 * head_dim,
        num_attention_heads=16,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=rope_parameters,
    )


def phi4_mini():
    return Phi3Config(
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "long_factor": list(LONG_FACTORS),
            "short_factor": list(SHORT_FACTORS),
            "original_max_position_embeddings": 4096,
        },
    )


LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEEPSEEK_YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
GPT_OSS_YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
PHI_LONG = LongRope(
    short_factor=SHORT_FACTORS,
    long_factor=LONG_FACTORS,
    attention_factor=1.1902380714238083,
    original_max_position_embeddings=4096,
)
CASES = {
    "gemma3": (
        Rope(base=1e6, dim=256, scaling=LinearRope(factor=8.0)),
        llama(256, rope_type="linear", rope_theta=1e6, factor=8.0),
    ),
    "llama3.1": (
        Rope(
            base=500000.0,
            dim=128,
            scaling=Llama3Rope(**LLAMA_3_1, original_max_position_embeddings=8192),
        ),
        llama(
            128,
            rope_type="llama3",
            rope_theta=500000.0,
            **LLAMA_3_1,
            original_max_position_embeddings=8192,
        ),
    ),
    "deepseek_v3": (
        Rope(
            base=10000.0,
            dim=64,
            scaling=YarnRope(
                **DEEPSEEK_YARN,
                attention_factor=1.0,
                original_max_position_embeddings=4096,
                rounds=True,
            ),
        ),
        DeepseekV3Config(
            max_position_embeddings=163840,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                **DEEPSEEK_YARN,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "gpt_oss": (
        Rope(
            base=150000.0,
            dim=64,
            scaling=YarnRope(
                **GPT_OSS_YARN,
                attention_factor=1.3465735902799727,
                original_max_position_embeddings=4096,
                rounds=False,
            ),
        ),
        GptOssConfig(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                **GPT_OSS_YARN,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "phi4_mini": (Rope(base=10000.0, dim=96, scaling=PHI_LONG), phi4_mini()),
}


@pytest.mark.parametrize("longest", [None, 4096, 4097])
@pytest.mark.parametrize("name", CASES)
def test_scaled_frequencies_have_the_bits_of_transformers(name, longest):
    rope, config = CASES[name]
    kind = config.rope_parameters["rope_type"]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=longest)
    frequencies, factor = rotary_frequencies(rope, longest=longest)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, expected)
    assert factor == expected_factor


@pytest.mark.parametrize(("base", "dim"), [(10000.0, 128), (1e6, 64), (5e6, 96)])
def test_plain_frequencies_have_the_bits_of_transformers(base, dim):
    config = llama(dim, rope_type="default", rope_theta=base)
    frequencies, factor = rotary_frequencies(Rope(base=base, dim=dim))
    assert torch.equal(frequencies, LlamaRotaryEmbedding(config).inv_freq)
    assert factor == 1.0


def test_yarn_without_a_blend_has_the_bits_of_transformers():
    """Both bounds are dimension 20, and there is no width to divide by."""
    yarn = {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 2.2}
    config = llama(
        64,
        rope_type="yarn",
        rope_theta=10000.0,
        **yarn,
        attention_factor=1.0,
        original_max_position_embeddings=4096,
    )
    scaling = YarnRope(
        **yarn, attention_factor=1.0, original_max_position_embeddings=4096, rounds=True
    )
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    frequencies, _ = rotary_frequencies(Rope(base=10000.0, dim=64, scaling=scaling))
    assert frequencies.isfinite().all()
    assert torch.equal(frequencies, expected)


def test_llama3_frequencies_are_those_of_the_hugging_face_model():
    rope = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    expected = LlamaRotaryEmbedding(LlamaConfig(**tiny_config("llama3_tied"))).inv_freq
    assert torch.equal(llama3_frequencies(rope, base=10000.0, head_dim=16), expected)


@pytest.mark.parametrize("longest", [4096, 4097])
def test_cosines_and_sines_equal_hugging_face_on_both_sides_of_the_original_length(longest):
    rope, config = CASES["phi4_mini"]
    positions = torch.tensor([0, 1, 7, longest - 1])
    ours = RotaryEmbedding(rope, CPU)(positions, longest=longest)
    theirs = Phi3RotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert ours.shape == (2, 4, 1, 1, 96)
    assert torch.equal(ours[:, :, 0, 0], torch.cat(theirs))


def test_positions_come_as_tokens_rows_or_all_in_order():
    rotary = RotaryEmbedding(Rope(base=10000.0, dim=8), CPU)
    all_of_them = rotary(slice(None), longest=6)
    assert torch.equal(all_of_them, rotary(torch.arange(6), longest=6))
    assert torch.equal(rotary(slice(2, 5), longest=6), all_of_them[:, 2:5])
    rows = torch.tensor([[0, 1, 2], [3, 4, 5]])
    of_rows = rotary(rows, longest=6)
    assert of_rows.shape == (2, 3, 2, 1, 8)
    assert torch.equal(of_rows[:, :, 1:], all_of_them[:, 3:6])


def test_a_cast_of_the_model_leaves_frequencies_alone():
    rotary = RotaryEmbedding(Rope(base=10000.0, dim=8), CPU)
    expected = rotary(slice(None), longest=300)
    model = torch.nn.ModuleDict({"rotary": rotary}).to(torch.bfloat16)
    assert torch.equal(model["rotary"](slice(None), longest=300), expected)
    assert not model.state_dict()
    assert not list(model.parameters())


def turned(state, rope, head_dim):
    """Queries, keys, their rotation, and the cosines and sines `[1, seq, dim]` it was made with."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(7, 1, heads, head_dim, generator=generator) for heads in (4, 2))
    cosines_and_sines = RotaryEmbedding(rope, CPU)(slice(None), longest=7)
    rotated = rotate(query, key, cosines_and_sines, rope.is_interleaved)
    return (query, key), rotated, cosines_and_sines.squeeze(3).transpose(1, 2)


def heads_second(*tensors):
    return [tensor.permute(1, 2, 0, 3) for tensor in tensors]


@pytest.mark.parametrize(
    ("judge", "dim", "is_interleaved"),
    [
        (apply_rotary_pos_emb, 16, False),
        (modeling_qwen3_next.apply_rotary_pos_emb, 4, False),
        (modeling_glm4.apply_rotary_pos_emb, 8, True),
        (modeling_glm4.apply_rotary_pos_emb, 16, True),
    ],
    ids=["llama", "qwen3_next", "glm4", "glm4_whole"],
)
def test_rotation_has_the_bits_of_the_hugging_face_model(judge, dim, is_interleaved):
    rope = Rope(base=10000.0, dim=dim, is_interleaved=is_interleaved)
    [(heads, rotated, (cosines, sines))] = run_ranks(ParallelLayout(), turned, rope, 16)
    if is_interleaved:
        # Hugging Face repeats the halves and has them interleaved inside.
        cosines, sines = (torch.cat([x[..., ::2]] * 2, dim=-1) for x in (cosines, sines))
    expected = judge(*heads_second(*heads), cosines, sines)
    for ours, theirs in zip(heads_second(*rotated), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_interleaved_rotation_of_deepseek_differs_by_a_permutation_alone():
    """Hugging Face puts the even dimensions before the odd ones while it rotates."""
    rope = Rope(base=10000.0, dim=16, is_interleaved=True)
    [(heads, rotated, (cosines, sines))] = run_ranks(ParallelLayout(), turned, rope, 16)
    cosines, sines = (torch.cat([x[..., ::2]] * 2, dim=-1) for x in (cosines, sines))
    expected = turn_deepseek(*heads_second(*heads), cosines, sines)
    for ours, theirs in zip(heads_second(*rotated), expected, strict=True):
        assert torch.equal(torch.cat([ours[..., 0::2], ours[..., 1::2]], dim=-1), theirs)


def turned_in_half_precision(state):
    rope = Rope(base=10000.0, dim=8)
    heads = torch.randn(5, 1, 2, 16, dtype=torch.bfloat16)
    return rotate(heads, heads, RotaryEmbedding(rope, CPU)(slice(None), longest=5))[0], heads


def test_half_precision_is_rounded_once():
    [(rotated, heads)] = run_ranks(ParallelLayout(), turned_in_half_precision)
    cosines, sines = RotaryEmbedding(Rope(base=10000.0, dim=8), CPU)(slice(None), longest=5)
    first, second = heads[..., :8].double().chunk(2, dim=-1)
    exact = heads[..., :8].double() * cosines + torch.cat([-second, first], dim=-1) * sines
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated[..., 8:], heads[..., 8:])
    assert torch.equal(rotated[..., :8], exact.float().bfloat16())
