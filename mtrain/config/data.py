"""What to train on, and how it becomes tokens.

The one thing to know: everything here is used before training starts, by the process that prepares
the data, and is part of the key of its cache. Only the `dataloader_*` flags matter afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtrain.config.fields import flag

__all__ = ["DataConfig", "TemplateConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Sources, splits, packing and batches."""

    dataset: tuple[str, ...] = flag(
        (),
        "Training data: path-or-id[:subset][#count], several allowed; hf:: or ms:: picks the hub.",
    )
    val_dataset: tuple[str, ...] = flag((), "Evaluation data, written like --dataset.")
    split_dataset_ratio: float = flag(
        0.0,
        "Share of --dataset kept for evaluation when there is no --val_dataset.",
        minimum=0,
        maximum=1,
    )
    cached_dataset: tuple[str, ...] = flag((), "Folders of data tokenised beforehand.")
    cached_val_dataset: tuple[str, ...] = flag((), "Evaluation data tokenised beforehand.")
    data_seed: int = flag(
        42, "Seed of the split, of #count samples and of the shuffle of files.", minimum=0
    )
    dataset_num_proc: int = flag(1, "Processes that tokenise.", minimum=1)
    load_from_cache_file: bool = flag(True, "Reuse data prepared by an earlier run.")
    dataset_shuffle: bool = flag(True, "Shuffle --dataset before splitting it.")
    val_dataset_shuffle: bool = flag(False, "Shuffle --val_dataset.")
    skip_bad_lines: bool = flag(
        False, "Skip lines of a dataset that cannot be used, with a count, instead of refusing."
    )
    columns: Mapping[str, Any] | None = flag(
        None, 'JSON that renames columns, e.g. {"question": "query", "answer": "response"}.'
    )
    model_name: tuple[str, ...] = flag(
        (), "Name that swift/self-cognition teaches (two values: Chinese and English)."
    )
    model_author: tuple[str, ...] = flag(
        (), "Author that swift/self-cognition teaches (two values: Chinese and English)."
    )
    streaming: bool = flag(False, "Read the dataset while training.")
    interleave_prob: tuple[float, ...] = flag((), "Mix datasets with these probabilities.")

    packing: bool = flag(False, "Put several documents in one row, isolated from each other.")
    packing_length: int | None = flag(
        None, "Tokens in a packed row; default: --max_length.", minimum=1
    )
    packing_strategy: str = flag(
        "binpack",
        "binpack fills rows tightly, sequential keeps the order of documents.",
        choices=("binpack", "sequential"),
    )
    packing_num_proc: int = flag(1, "Processes that plan the packing.", minimum=1)
    padding_free: bool = flag(
        True, "Concatenate the documents of a micro-batch instead of padding each of them."
    )
    mlp_padding_free: bool = flag(False, "Drop padding in the MLP only.")
    group_by_length: bool = flag(False, "Put documents of similar length in one batch.")
    data_sharding: bool = flag(False, "Give every data-parallel rank its own part of the data.")

    train_dataloader_shuffle: bool = flag(True, "Shuffle the training rows every epoch.")
    dataloader_num_workers: int = flag(
        1, "Threads that build batches ahead; 0: training builds them itself.", minimum=0
    )
    dataloader_pin_memory: bool = flag(True, "Pin host memory when training on a GPU.")
    dataloader_persistent_workers: bool = flag(True, "Keep the threads between epochs.")
    dataloader_prefetch_factor: int = flag(2, "Steps each of these threads is ahead.", minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateConfig:
    """How a conversation is rendered and cut."""

    max_length: int | None = flag(
        None, "Longest document in tokens; default: what the model can attend to.", minimum=2
    )
    truncation_strategy: str = flag(
        "delete",
        "Documents over --max_length: delete them, or cut tokens on the left or the right.",
        choices=("delete", "left", "right", "split"),
    )
    system: str | None = flag(None, "System message of conversations that have none.")
    enable_thinking: bool | None = flag(
        None, "Passed to the chat template of models that can think before they answer."
    )
    template: str | None = flag(None, "Name of a chat template other than the tokenizer's own.")
    template_backend: str = flag(
        "jinja", "Who renders: the chat template of the tokenizer.", choices=("jinja", "swift")
    )
    use_chat_template: bool | None = flag(None, "Render with the chat template.")
    agent_template: str | None = flag(None, "Style of tool calls.")
    loss_scale: str = flag("default", "Which tokens count in the loss; default: the assistant's.")
    padding_side: str = flag("right", "Side of padding.", choices=("left", "right"))
    response_prefix: str | None = flag(None, "Text put in front of every answer.")
    add_non_thinking_prefix: bool = flag(
        True, "Mark answers without a think block as such, where the chat template does."
    )
    max_pixels: int | None = flag(None, "Largest image in pixels.", minimum=1)
