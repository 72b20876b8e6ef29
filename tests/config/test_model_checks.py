"""Parallel sizes and tokenizer against config.json."""

import json
from pathlib import Path

import pytest

from mtrain.config import ModelConfig, ParallelConfig
from mtrain.config.model_checks import (
    check_model_folder,
    check_parallel_sizes,
    check_precision,
    read_hf_config,
)

DENSE = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 10,
}
EXPERTS = DENSE | {"num_experts": 6, "moe_intermediate_size": 12, "intermediate_size": 7}


def sizes(*, tp=1, pp=1, vpp=None, ep=1, etp=1, first=None, last=None, sequence=True):
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        sequence_parallel=sequence,
    )


@pytest.mark.parametrize(
    ("hf_config", "parallel"),
    [
        (DENSE, sizes(tp=4, pp=4, vpp=2)),
        (DENSE | {"num_key_value_heads": 2}, sizes(tp=4)),
        (DENSE, sizes(pp=3, first=2, last=2)),
        (DENSE, sizes(pp=2, first=3, last=5)),
        (DENSE, sizes(pp=2, first=6)),
        (DENSE, sizes(pp=3, vpp=2, first=2, last=2)),
        (EXPERTS, sizes(tp=2, ep=3, etp=4)),
        ({"text_config": DENSE}, sizes(tp=4)),
        ({}, sizes(tp=8, pp=8)),
    ],
)
def test_sizes_that_divide_pass(hf_config: dict, parallel: ParallelConfig) -> None:
    check_parallel_sizes(hf_config, parallel)


@pytest.mark.parametrize(
    ("hf_config", "parallel", "message"),
    [
        (DENSE, sizes(tp=3), "num_attention_heads 8 of the model cannot be divided by --tensor_mo"),
        (DENSE | {"num_key_value_heads": 3}, sizes(tp=8), "num_key_value_heads 3 of the model"),
        (DENSE | {"intermediate_size": 25}, sizes(tp=2), "intermediate_size 25 of the model"),
        (EXPERTS | {"mlp_only_layers": [0]}, sizes(tp=2), "intermediate_size 7 of the model"),
        (EXPERTS, sizes(ep=4), "6 experts of the model cannot be divided by --expert_model"),
        (EXPERTS, sizes(etp=5), "moe_intermediate_size 12 of the model cannot be divided by"),
        (EXPERTS, sizes(tp=2, sequence=False), "needs --sequence_parallel true"),
        (DENSE, sizes(ep=2), "--expert_model_parallel_size 2: the model has no experts"),
        (DENSE, sizes(etp=2), "--expert_tensor_parallel_size 2: the model has no experts"),
        (DENSE, sizes(pp=3), "8 layers of the model: the other 8 cannot be divided by 3 pipeline"),
        (DENSE, sizes(pp=4, vpp=3), "4 pipeline stages x 3 virtual stages"),
        (DENSE, sizes(pp=2, first=3, last=4), "3 on the first stage, 4 on the last stage"),
        (DENSE, sizes(pp=3, first=4, last=4), "the other 0 cannot be divided by 1"),
        (DENSE, sizes(pp=2, vpp=2, first=3), "--decoder_first_pipeline_num_layers 3 cannot be div"),
        ({"text_config": DENSE}, sizes(tp=3), "num_attention_heads 8"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(hf_config, parallel, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_parallel_sizes(hf_config, parallel)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hf_config", "torch_dtype", "refused"),
    [
        (EXPERTS, "float16", True),
        (EXPERTS | {"torch_dtype": "float16"}, None, True),
        (EXPERTS | {"dtype": "float16"}, None, True),
        (EXPERTS | {"torch_dtype": "float16"}, "bfloat16", False),
        (EXPERTS, None, False),
        (DENSE, "float16", False),
    ],
)
def test_half_precision_needs_a_model_without_experts(hf_config, torch_dtype, refused) -> None:
    model = ModelConfig(torch_dtype=torch_dtype)
    if not refused:
        check_precision(hf_config, model)
        return
    with pytest.raises(ValueError, match="float16 does not work with experts"):
        check_precision(hf_config, model)


def write_model(folder: Path, tokenizer: dict | None) -> Path:
    (folder / "config.json").write_text(json.dumps(DENSE))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def check_folder(folder: Path) -> None:
    check_model_folder(folder, model=ModelConfig(), parallel=sizes())


def words(number: int) -> dict[str, int]:
    return {f"w{i}": i for i in range(number)}


@pytest.mark.parametrize(
    "tokenizer",
    [
        None,
        {},
        {"model": {"vocab": words(10)}},
        {"model": {"vocab": [["a", -1.0]] * 10}},
        {"model": {"vocab": words(8)}, "added_tokens": [{"id": 8}, {"id": 9}]},
    ],
)
def test_a_vocabulary_within_the_embedding_passes(tmp_path: Path, tokenizer) -> None:
    check_folder(write_model(tmp_path, tokenizer))


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": words(11)}},
        {"model": {"vocab": [["a", -1.0]] * 11}},
        {"model": {"vocab": words(8)}, "added_tokens": [{"id": 10}]},
    ],
)
def test_a_token_without_a_row_is_refused(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"token id 10 has no row .* vocab_size of config.json is 10"
    ):
        check_folder(write_model(tmp_path, tokenizer))


@pytest.mark.parametrize("key", sorted(DENSE))
def test_entries_that_are_no_numbers_are_left_to_the_family(tmp_path: Path, key: str) -> None:
    """The families name what a config.json must hold; no check before them may stumble."""
    folder = write_model(tmp_path, {"model": {"vocab": words(10)}})
    (folder / "config.json").write_text(json.dumps(DENSE | {key: "many"}))
    check_model_folder(folder, model=ModelConfig(), parallel=sizes(tp=2, pp=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "config.json: not a JSON file"),
        ("[]", "config.json: must be a JSON object"),
        (b"\xff\xfe\x00", "config.json: not a JSON file"),
    ],
)
def test_an_unreadable_config_is_named(tmp_path: Path, content, message: str) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_hf_config(tmp_path)
