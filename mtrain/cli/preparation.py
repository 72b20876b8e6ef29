"""What happens before the ranks train: the model is found and checked, the data prepared.

The one thing to know: the model and its adapter are looked at first, with nothing heavier than
JSON, so one that cannot be trained is refused at once. Fresh data needs a tokenizer, hence
transformers, and data that was prepared before nothing heavy at all. The ranks call `open_inputs`
and find everything in place.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtrain.cli.adapter_source import AdapterSource, open_adapter, saving_notice
from mtrain.cli.model_source import ModelSource, open_source
from mtrain.config import ExportConfig, SftConfig

if TYPE_CHECKING:
    from mtrain.data.tokenize import PreparedData


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run starts from.

    Attributes:
        source: The model.
        adapter: What LoRA trains; None when all weights are trained.
        data: The prepared data.
    """

    source: ModelSource
    adapter: AdapterSource | None
    data: PreparedData


def check_inputs(
    config: SftConfig | ExportConfig, *, world_size: int, show_progress: bool
) -> ModelSource:
    """Finds and checks the model and the adapter.

    Args:
        config: Resolved and checked.
        world_size: Ranks of the run.
        show_progress: Whether this process speaks for its machine.

    Returns:
        The model.

    Raises:
        ValueError: One of them cannot be used, with the reason in one line.
    """
    source, adapter = _open_model(config, world_size=world_size, download=True)
    notice = saving_notice(config.tuner, adapter, source)
    if show_progress and notice is not None:
        print(f"note: {notice}", file=sys.stderr)
    return source


def prepare_data(config: SftConfig, source: ModelSource, *, show_progress: bool) -> str:
    """Prepares the data into the cache.

    Any number of processes may call it at once; one prepares, the others wait for it.

    Args:
        config: Resolved and checked.
        source: The model, from `check_inputs`.
        show_progress: Whether this process speaks for its machine.

    Returns:
        What the prepared data are called in the cache.

    Raises:
        ValueError: The data cannot be used, with the reason in one line.
    """
    data = _prepare_data(config, source, show_progress=show_progress)
    if show_progress:
        for name, report in (("train", data.report.train), ("val", data.report.validation)):
            if report is not None:
                earlier = " (prepared earlier)" if data.report.reused else ""
                print(f"{name} data: {report.summary()}{earlier}", file=sys.stderr)
    return data.train.parent.name


def open_inputs(config: SftConfig, *, world_size: int, data_key: str | None = None) -> Inputs:
    """Model, adapter and data as `check_inputs` and `prepare_data` left them.

    Args:
        config: Resolved and checked.
        world_size: Ranks of the run.
        data_key: What the prepared data are called; None: found by their contents.

    Raises:
        ValueError: They changed since and cannot be used any more.
    """
    source, adapter = _open_model(config, world_size=world_size, download=False)
    # Whoever asked for fresh data has it by now.
    cached = dataclasses.replace(config.data, load_from_cache_file=True)
    config = dataclasses.replace(config, data=cached)
    data = _prepare_data(config, source, show_progress=False, key=data_key)
    return Inputs(source=source, adapter=adapter, data=data)


def open_export_inputs(
    config: ExportConfig, *, world_size: int
) -> tuple[ModelSource, AdapterSource | None]:
    """Model and adapter as `check_inputs` left them; None for no adapter.

    Raises:
        ValueError: They changed since and cannot be used any more.
    """
    return _open_model(config, world_size=world_size, download=False)


def _open_model(
    config: SftConfig | ExportConfig, *, world_size: int, download: bool
) -> tuple[ModelSource, AdapterSource | None]:
    source = open_source(
        config.model,
        config.parallel,
        world_size=world_size,
        download=download,
        keeps_all=isinstance(config, ExportConfig),
    )
    # Refuses a form that it cannot be saved in.
    source.stored_as(keeps_fp8=config.checkpoint.fp8_export)
    # Checked first, and opened again by those who save.
    return source, open_adapter(config, source, is_check=download)


def _prepare_data(
    config: SftConfig, source: ModelSource, *, show_progress: bool, key: str | None = None
) -> PreparedData:
    # Here, not above: they import numpy and pyarrow, which checks do without.
    from mtrain.data.cache import default_cache_dir
    from mtrain.data.tokenize import open_prepared, prepare_datasets

    if key is not None:
        return open_prepared(default_cache_dir(), key)
    data = prepare_datasets(
        config.data,
        config.template,
        model_dir=source.folder,
        cache_dir=default_cache_dir(),
        show_progress=show_progress,
        use_hf=config.model.use_hf,
        hub_token=config.model.hub_token,
    )
    _check_token_ids(data, source)
    return data


def _check_token_ids(data: PreparedData, source: ModelSource) -> None:
    reports = (data.report.train, data.report.validation)
    highest = max(report.max_token_id for report in reports if report is not None)
    vocab_size = source.hf_config["vocab_size"]
    if highest >= vocab_size:
        raise ValueError(
            f"the data has token {highest}, but the embedding of {source.folder} has "
            f"{vocab_size} rows; the tokenizer does not belong to this model"
        )
