"""The checkpoint to start from: found or downloaded, and checked before anything starts.

All checks here read headers and JSON only. Ranks repeat them, on files that are there by then.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.bridge.families import find_family
from mtrain.bridge.family import Family
from mtrain.bridge.fingerprint import fingerprint
from mtrain.bridge.hf_config import rotary_base
from mtrain.bridge.ledger import check_checkpoint
from mtrain.bridge.plan import plan_rank
from mtrain.bridge.rules import WeightTable, filled, layers_of
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.storage.quantization import fp8_blocks
from mtrain.bridge.storage.stored_as import StoredAs, stored_as, stored_natively
from mtrain.bridge.storage.view import ArrangedWeights, arranged
from mtrain.config import ModelConfig, ParallelConfig
from mtrain.config.model_checks import check_model_folder, read_hf_config
from mtrain.config.path_checks import local_config_folder
from mtrain.lora.base_model import read_base_model
from mtrain.parallel import ParallelLayout

_DTYPES = ("float32", "bfloat16", "float16")
# Never a pickle: .bin and .pt files stay on the hub.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A checkpoint that passed its checks.

    Attributes:
        folder: Where its config.json and its tokenizer are.
        hf_config: Its config.json with the overrides of the user applied.
        family: Its family.
        table: Its weights.
        num_next_tokens: Layers of multi-token prediction among them.
        weights: Its tensors, by their canonical names.
        files: The same with the form that its Hugging Face files hold them in; None for torch_dist.
        mcore_folder: The torch_dist folder that these are in; None for Hugging Face files, which
            are in `folder`.
    """

    folder: Path
    hf_config: dict[str, Any]
    family: Family
    table: WeightTable
    num_next_tokens: int
    weights: StoredWeights
    files: ArrangedWeights | None = None
    mcore_folder: Path | None = None

    def fingerprint(self) -> str:
        """What adapters know the model by."""
        stored = self.mcore_folder and read_base_model(self.mcore_folder)
        return stored or fingerprint(self.weights)

    def stored_as(self, *, keeps_fp8: bool) -> StoredAs:
        """The form to save its weights in: the one that they were loaded from.

        Args:
            keeps_fp8: Whether what was stored in 8-bit floats is stored in them again.

        Raises:
            ValueError: Nothing was.
        """
        if self.files is not None:
            return stored_as(self.files, self.table, keeps_fp8=keeps_fp8)
        if keeps_fp8:
            raise ValueError(
                f"--fp8_export true: {self.mcore_folder} has no weights in 8-bit floats to take "
                "the form from; drop it"
            )
        return stored_natively(self.table)


def parallel_layout(parallel: ParallelConfig, *, world_size: int) -> ParallelLayout:
    """The layout that the flags describe.

    Raises:
        ValueError: The ranks cannot be divided that way.
    """
    return ParallelLayout(
        world_size=world_size,
        tp_size=parallel.tensor_model_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        vpp_size=parallel.virtual_pipeline_model_parallel_size,
        ep_size=parallel.expert_model_parallel_size,
        etp_size=parallel.expert_tensor_parallel_size,
        cp_size=parallel.context_parallel_size,
        num_layers_in_first_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_stage=parallel.decoder_last_pipeline_num_layers,
    )


def open_source(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    download: bool,
    keeps_all: bool = False,
) -> ModelSource:
    """Finds the checkpoint and checks that it can be trained in this layout.

    Args:
        model: Which checkpoint, and overrides of its config.json.
        parallel: Parallel sizes.
        world_size: Ranks of the run.
        download: Whether a hub may be asked; ranks find the files in its cache.
        keeps_all: Whether multi-token prediction belongs to the model where nothing is said about
            it, because the checkpoint holds it.

    Raises:
        ValueError: With the reason, in one line.
    """
    folder = local_config_folder(model)
    if folder is None:
        config_only = _fetch(model, patterns=["config.json"], download=download)
        find_family(_overridden(read_hf_config(config_only), model))
        folder = _fetch(model, patterns=_files(model), download=download)
        check_model_folder(folder, model=model, parallel=parallel)
    hf_config = _overridden(read_hf_config(folder), model)
    family = find_family(hf_config)
    mcore_folder = None if model.mcore_model is None else Path(model.mcore_model).expanduser()
    num_next_tokens = model.mtp_num_layers or 0
    checkpoint = open_checkpoint(folder) if mcore_folder is None else None
    if keeps_all and model.mtp_num_layers is None:
        num_next_tokens = _stored_next_tokens(family, hf_config, checkpoint or mcore_folder)
    table = family.weight_table(hf_config, num_next_tokens)
    layout = parallel_layout(parallel, world_size=world_size)
    for pp_rank in range(layout.pp_size):
        rank = pp_rank * (world_size // layout.pp_size)
        plan_rank(table, layout=layout, rank=rank)
    files: ArrangedWeights | None = None
    if checkpoint is not None:
        files = arranged(checkpoint, table, blocks=fp8_blocks(hf_config))
    weights = files if mcore_folder is None else _open_torch_dist(mcore_folder, table)
    assert weights is not None, "one of the two"
    check_checkpoint(table, weights)
    return ModelSource(
        folder=folder,
        hf_config=hf_config,
        family=family,
        table=table,
        num_next_tokens=num_next_tokens,
        weights=weights,
        files=files,
        mcore_folder=mcore_folder,
    )


def _stored_next_tokens(
    family: Family, hf_config: dict[str, Any], checkpoint: StoredWeights | Path
) -> int:
    """Layers of multi-token prediction that a checkpoint holds: all of its config, or none.

    Args:
        family: Its family.
        hf_config: Its config.json.
        checkpoint: Its Hugging Face files, or its torch_dist folder.
    """
    number = family.num_next_tokens(hf_config)
    if number == 0:
        return 0
    last = f"mtp.layers.{number - 1}.eh_proj.weight"
    if isinstance(checkpoint, Path):
        # Here, not above: they import torch.
        from mtrain.checkpoint.torch_dist.folder import iteration_folder
        from mtrain.checkpoint.torch_dist.metadata import read_metadata

        return number if last in read_metadata(iteration_folder(checkpoint)) else 0
    (rule,) = (
        rule for rule in family.weight_table(hf_config, number).rules if rule.megatron == last
    )
    return number if rule.hf[0].name in checkpoint.tensors else 0


def _open_torch_dist(mcore_folder: Path, table: WeightTable) -> StoredWeights:
    # Here, not above: it imports torch, which the process that starts ranks does without.
    from mtrain.checkpoint.torch_dist.folder import open_torch_dist_model

    return open_torch_dist_model(mcore_folder, table)


def stored_dtype_name(hf_config: Mapping[str, Any]) -> str:
    """Precision that the checkpoint says it has."""
    return hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"


def dtype_name(model: ModelConfig, hf_config: Mapping[str, Any]) -> str:
    """Precision of the weights: what was asked for, or else the checkpoint's.

    Raises:
        ValueError: The checkpoint's is none that can be computed in.
    """
    name = model.torch_dtype or stored_dtype_name(hf_config)
    if name not in _DTYPES:
        raise ValueError(f"config.json: dtype {name!r} cannot be trained in; give --torch_dtype")
    return name


def base_name(model: ModelConfig) -> str:
    """What an adapter calls its base: an absolute path, or an id on a hub."""
    folder = local_config_folder(model)
    if folder is not None:
        return str(folder.absolute())
    assert model.model is not None, "what is on no disk has an id"
    return model.model


def hf_names(table: WeightTable) -> dict[str, tuple[str, ...]]:
    """Hugging Face names of every Megatron parameter of the whole model."""
    plan = plan_rank(table, layout=ParallelLayout(), rank=0)
    return {
        parameter.name: tuple(dict.fromkeys(piece.hf_name for piece in parameter.pieces))
        for parameter in plan
    }


def stored_names(table: WeightTable) -> dict[str, str]:
    """Names in Megatron-LM's checkpoints of the parameters that have others in our chunks."""
    return {
        filled(rule.plain, layer=layer): filled(rule.megatron, layer=layer)
        for rule in table.rules
        if rule.plain is not None
        for layer in layers_of(rule)
    }


def _files(model: ModelConfig) -> list[str]:
    """What is fetched of a model; without weights where these are in another folder."""
    return list(_SMALL_FILES) if model.mcore_model else ["*.safetensors", *_SMALL_FILES]


def _overridden(hf_config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """config.json with `--model_type` and `--rope_scaling` applied; it is also what is saved."""
    result = dict(hf_config)
    if model.model_type is not None and model.model_type != hf_config.get("model_type"):
        result["model_type"] = model.model_type
        # They name classes of the other type.
        result.pop("architectures", None)
    if model.rope_scaling is not None:
        theta = rotary_base(hf_config)
        # One spelling only, so that nobody reads the old values under the other one.
        old = result.pop("rope_scaling", None), result.pop("rope_parameters", None)
        if old[1]:
            # transformers 5 keeps the base of the rotary embedding among these parameters.
            result["rope_parameters"] = {"rope_theta": theta, **model.rope_scaling}
        else:
            result |= {"rope_theta": theta, "rope_scaling": dict(model.rope_scaling)}
    return result


def _fetch(model: ModelConfig, *, patterns: list[str], download: bool) -> Path:
    """Downloads files of a model into the hub's own cache and returns their folder."""
    use_hf = model.use_hf
    try:
        if use_hf:
            from huggingface_hub import snapshot_download
        else:
            from modelscope import snapshot_download
        path = snapshot_download(
            model.model,
            revision=model.model_revision,
            token=model.hub_token,
            allow_patterns=patterns,
            local_files_only=not download,
        )
    except (OSError, ValueError, RuntimeError) as error:
        hub = "Hugging Face" if use_hf else "ModelScope (--use_hf true for Hugging Face)"
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise ValueError(
            f"--model {model.model}: no such folder, and it could not be fetched from {hub}: "
            f"{reason}"
        ) from error
    return Path(path)
