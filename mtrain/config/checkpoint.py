"""What is saved, where and how often.

The one thing to know: a saved folder is a Hugging Face checkpoint, with the state that training
continues from beside the weights unless `no_save_optim` leaves it out.
"""

import re
from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["CheckpointConfig", "parse_byte_size"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_byte_size(text: str) -> int:
    """Bytes in a size such as 5GB (10^9, as Hugging Face counts), 500MB or 2GiB (2^30).

    Raises:
        ValueError: Not a size, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{text}: must be a size such as 5GB or 500MB")
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The output folder and its checkpoints."""

    output_dir: str | None = flag(
        None,
        "sft: folder of runs, default megatron_output/<name of the model>. export: the folder "
        "itself, default <adapter>-hf.",
    )
    add_version: bool = flag(True, "Put every run in its own OUTPUT_DIR/vN-date-time folder.")
    save_strategy: str = flag(
        "steps", "Save every --save_steps, or after every epoch.", choices=("steps", "epoch")
    )
    save_steps: int = flag(500, "Steps between two checkpoints.", minimum=1)
    save_total_limit: int | None = flag(None, "Checkpoints kept; default: all.", minimum=1)
    save_safetensors: bool = flag(True, "Save Hugging Face safetensors.")
    max_shard_size: str = flag("5GB", "Largest safetensors file, e.g. 5GB or 500MB.")
    fp8_export: bool = flag(
        False, "Save 8-bit weights again as 8-bit floats in blocks, not as bfloat16."
    )
    save_missing_weights: bool = flag(
        False, "Copy weights of the source that mtrain does not train into the result."
    )
    create_checkpoint_symlink: bool = flag(False, "Link `last` and `best` to checkpoints.")
    metric_for_best_model: str | None = flag(None, "Metric that decides which one is best.")
    greater_is_better: bool | None = flag(None, "Whether a larger metric is better.")
    async_save: bool = flag(False, "Go on training while a checkpoint is written.")
    save_on_error: str = flag(
        "stop",
        "What follows when a checkpoint cannot be written: stop, or warn and train on.",
        choices=("stop", "warn"),
    )

    finetune: bool = flag(
        True, "Start at step 0; false continues the run of the checkpoint that is loaded."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Continue a run: a checkpoint, or auto for the newest complete one of --output_dir (a new "
        "run when there is none).",
    )
    no_save_optim: bool = flag(False, "Leave out the state that training continues from.")
    no_save_rng: bool = flag(False, "Leave random states out of it.")
    no_load_optim: bool = flag(False, "Continue with a fresh optimizer.")
    no_load_rng: bool = flag(False, "Continue with fresh random states.")
    load_args: bool = flag(False, "Take flags from the args.json of the checkpoint.")
    perform_initialization: bool = flag(False, "Initialise weights that are loaded afterwards.")
    use_cpu_initialization: bool = flag(False, "Initialise weights on the CPU.")

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes; ValueError when it is not a size."""
        return parse_byte_size(self.max_shard_size)
