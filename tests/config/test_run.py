"""Defaults that depend on other flags, and the mapping that is saved as args.json."""

import json

import pytest

from mtrain.config import (
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    ExportOptions,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SftConfig,
    TemplateConfig,
    TrainingConfig,
    TunerConfig,
    config_to_dict,
    resolve_export,
    resolve_sft,
)


@pytest.mark.parametrize(
    ("tuner_type", "given", "lr"),
    [("full", None, 1e-5), ("lora", None, 1e-4), ("full", 0.0, 0.0), ("lora", 3e-4, 3e-4)],
)
def test_the_learning_rate_follows_the_kind_of_training(tuner_type, given, lr) -> None:
    config = SftConfig(
        tuner=TunerConfig(tuner_type=tuner_type), optimizer=OptimizerConfig(lr=given)
    )
    assert resolve_sft(config).optimizer.lr == lr


def test_zero_is_no_interval_of_evaluation() -> None:
    zero = resolve_sft(SftConfig(training=TrainingConfig(eval_steps=0)))
    assert zero.training.eval_steps == 0, "the checks refuse it; it must not become the default"


def test_evaluation_follows_saving_and_iterations_win_over_epochs() -> None:
    config = SftConfig(
        checkpoint=CheckpointConfig(save_steps=70),
        training=TrainingConfig(num_train_epochs=3, train_iters=5),
    )
    training = resolve_sft(config).training
    assert (training.eval_steps, training.num_train_epochs, training.train_iters) == (70, None, 5)
    training = resolve_sft(SftConfig(training=TrainingConfig(num_train_epochs=3))).training
    assert (training.eval_steps, training.num_train_epochs) == (500, 3)


@pytest.mark.parametrize(
    ("tp", "given", "expected"),
    [(1, None, False), (1, True, False), (2, None, True), (2, True, True), (2, False, False)],
)
def test_sequence_parallel_is_on_when_there_is_something_to_split(tp, given, expected) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=given)
    assert resolve_sft(SftConfig(parallel=parallel)).parallel.sequence_parallel is expected
    assert resolve_export(ExportConfig(parallel=parallel)).parallel.sequence_parallel is expected


@pytest.mark.parametrize(("given", "expected"), [(None, True), (True, True), (False, False)])
def test_an_export_merges_unless_told_and_a_run_does_not(given, expected) -> None:
    tuner = TunerConfig(merge_lora=given)
    assert resolve_export(ExportConfig(tuner=tuner)).tuner.merge_lora is expected
    assert resolve_sft(SftConfig(tuner=tuner)).tuner.merge_lora is bool(given)


@pytest.mark.parametrize("adapter", ["run/checkpoint-5", "run/checkpoint-5/"])
def test_an_export_is_named_after_its_adapter(adapter) -> None:
    config = ExportConfig(tuner=TunerConfig(adapters=(adapter,)))
    assert resolve_export(config).checkpoint.output_dir == "run/checkpoint-5-hf"
    assert resolve_export(ExportConfig()).checkpoint.output_dir is None


@pytest.mark.parametrize("to_mcore", [False, True])
@pytest.mark.parametrize(
    ("model", "tuner", "name"),
    [
        # A model may be on a hub, or where nobody should write: only its name is taken.
        ({"model": "owner/name"}, {}, "name"),
        ({"model": "/models/tiny/"}, {}, "tiny"),
        ({"model": "owner/name", "mcore_model": "out/mcore/"}, {}, "out/mcore"),
        ({"mcore_model": "out/mcore"}, {"mcore_adapter": "out/adapter"}, "out/adapter"),
        ({"model": "owner/name"}, {"adapters": ("out/adapter/",)}, "out/adapter"),
    ],
)
def test_an_export_is_named_after_what_it_converts_and_its_format(
    model, tuner, name, to_mcore
) -> None:
    config = ExportConfig(
        model=ModelConfig(**model),
        tuner=TunerConfig(**tuner),
        export=ExportOptions(to_hf=not to_mcore, to_mcore=to_mcore),
    )
    ending = "mcore" if to_mcore else "hf"
    assert resolve_export(config).checkpoint.output_dir == f"{name}-{ending}"


def test_an_export_goes_where_it_is_told() -> None:
    config = ExportConfig(
        model=ModelConfig(model="owner/name"), checkpoint=CheckpointConfig(output_dir="there")
    )
    assert resolve_export(config).checkpoint.output_dir == "there"


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (ModelConfig(), None),
        (ModelConfig(bf16=True), "bfloat16"),
        (ModelConfig(fp16=True), "float16"),
        (ModelConfig(bf16=True, fp16=False, torch_dtype="bfloat16"), "bfloat16"),
        (ModelConfig(bf16=False, torch_dtype="float32"), "float32"),
    ],
)
def test_precision_switches_become_one_dtype(model: ModelConfig, dtype: str | None) -> None:
    assert resolve_sft(SftConfig(model=model)).model.torch_dtype == dtype


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(bf16=True, fp16=True),
        ModelConfig(bf16=True, torch_dtype="float32"),
        ModelConfig(fp16=True, torch_dtype="bfloat16"),
        ModelConfig(bf16=False, torch_dtype="bfloat16"),
    ],
)
def test_precision_switches_that_contradict_are_refused(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="contradicts"):
        resolve_sft(SftConfig(model=model))


@pytest.mark.parametrize(
    ("max_length", "packing_length", "expected"),
    [(8, None, (8, 8)), (None, 16, (16, 16)), (8, 16, (8, 16)), (None, None, (None, None))],
)
def test_lengths_of_packing_stand_in_for_each_other(max_length, packing_length, expected) -> None:
    config = SftConfig(
        template=TemplateConfig(max_length=max_length),
        data=DataConfig(packing=True, packing_length=packing_length, padding_free=False),
    )
    resolved = resolve_sft(config)
    assert (resolved.template.max_length, resolved.data.packing_length) == expected
    assert resolved.data.padding_free


def test_without_packing_lengths_stay_as_given() -> None:
    resolved = resolve_sft(SftConfig(template=TemplateConfig(max_length=8)))
    assert (resolved.template.max_length, resolved.data.packing_length) == (8, None)


def test_full_recomputation_needs_nothing_else() -> None:
    training = TrainingConfig(recompute_granularity="full")
    resolved = resolve_sft(SftConfig(training=training)).training
    assert (resolved.recompute_method, resolved.recompute_num_layers) == ("uniform", 1)
    resolved = resolve_sft(SftConfig()).training
    assert (resolved.recompute_method, resolved.recompute_num_layers) == (None, None)


@pytest.mark.parametrize(
    ("model", "folder"),
    [("Qwen/Qwen3-4B", "megatron_output/Qwen3-4B"), ("/models/tiny/", "megatron_output/tiny")],
)
def test_the_output_folder_is_named_after_the_model(model: str, folder: str) -> None:
    resolved = resolve_sft(SftConfig(model=ModelConfig(model=model)))
    assert resolved.checkpoint.output_dir == folder


def test_the_output_folder_is_named_after_a_torch_dist_model() -> None:
    resolved = resolve_sft(SftConfig(model=ModelConfig(mcore_model="out/tiny-mcore/")))
    assert resolved.checkpoint.output_dir == "megatron_output/tiny-mcore"


def test_resolving_twice_changes_nothing() -> None:
    config = SftConfig(
        model=ModelConfig(model="a/b", bf16=True),
        data=DataConfig(packing=True),
        template=TemplateConfig(max_length=8),
        training=TrainingConfig(recompute_granularity="full", train_iters=3, num_train_epochs=1),
    )
    once = resolve_sft(config)
    assert resolve_sft(once) == once


def test_the_saved_mapping_is_flat_json_without_the_token() -> None:
    config = SftConfig(
        model=ModelConfig(model="m", hub_token="secret"), data=DataConfig(dataset=("a", "b"))
    )
    mapping = config_to_dict(config)
    assert (mapping["model"], mapping["dataset"], mapping["lr"]) == ("m", ["a", "b"], None)
    assert "secret" not in json.dumps(mapping)
