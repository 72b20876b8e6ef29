"""What is reported while training.

The one thing to know: console and `logging.jsonl` are always written, `report_to` adds to them.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["LoggingConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Log lines and experiment trackers."""

    logging_steps: int = flag(5, "Steps between two log lines.", minimum=1)
    report_to: tuple[str, ...] = flag(
        ("tensorboard",),
        "Trackers that get the numbers of every log line.",
        choices=("tensorboard", "wandb", "swanlab", "none"),
    )
    tensorboard_dir: str | None = flag(None, "Folder of event files; default: runs/ of the run.")
    tensorboard_queue_size: int = flag(50, "Events kept in memory before writing.", minimum=1)
    wandb_project: str = flag("mtrain", "Project of Weights & Biases.")
    wandb_exp_name: str | None = flag(None, "Name of the run in Weights & Biases.")
    swanlab_project: str = flag("mtrain", "Project of SwanLab.")
    swanlab_exp_name: str | None = flag(None, "Name of the run in SwanLab.")
