"""The log line that people read: the numbers of a step with units, in groups.

The one thing to know: it says all that `logging.jsonl` says, rounded, but `tflops_per_gpu` and
`hfu`. A number that has no wording here is shown under its own name at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["console_line"]

# Groups of (name, wording); {} is the number. Order is that of the line.
_GROUPS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("epoch", "epoch {:.2f}"),),
    (
        ("loss", "loss {:.4f}"),
        ("token_accuracy", "accuracy {:.1%}"),
        ("grad_norm", "grad norm {:.3g}"),
        ("learning_rate", "lr {:.2e}"),
        ("skipped_steps", "skipped {}"),
        ("load_balancing_loss", "balance {:.4f}"),
        ("seq_load_balancing_loss", "sequence balance {:.4f}"),
        ("global_load_balancing_loss", "global balance {:.4f}"),
        ("z_loss", "z {:.4f}"),
        ("mtp_loss", "next tokens {:.4f}"),
    ),
    (
        ("tokens_per_second_per_gpu", "{:,.0f} tokens/s/gpu"),
        ("padded_tokens_per_second_per_gpu", "({:,.0f} padded)"),
        ("padding_ratio", "padding {:.1%}"),
        ("mfu", "MFU {:.1%}"),
        ("memory_gib", "{:.1f} GiB"),
    ),
    (("seconds_per_step", "{:.2f} s/step"), ("data_share", "data {:.1%}")),
    (
        ("consumed_samples", "{:,} samples"),
        ("consumed_tokens", "{:,} tokens"),
        ("num_tokens", "{:,} tokens"),
    ),
)
# They say what the head of the line and its end say.
_ELSEWHERE = {"step", "total_steps", "eta_seconds"}
# MFU is enough to watch a run by.
_NOT_SHOWN = {"tflops_per_gpu", "hfu"}


def console_line(
    values: Mapping[str, float | int], *, step: int, total_steps: int, kind: str
) -> str:
    """One line of text.

    Args:
        values: Numbers by name.
        step: Steps done.
        total_steps: Steps of the run.
        kind: "train" or "eval".
    """
    known = {name for group in _GROUPS for name, _ in group} | _ELSEWHERE | _NOT_SHOWN
    groups = [
        [wording.format(values[name]) for name, wording in group if _is_worth(name, values)]
        for group in _GROUPS
    ]
    groups.append([f"{name} {value:.5g}" for name, value in values.items() if name not in known])
    if values.get("eta_seconds"):
        groups.append([f"ETA {_clock(values['eta_seconds'])}"])
    parts = [" ".join(group) for group in groups if group]
    return " | ".join([f"{kind} {step}/{total_steps}", *parts])


def _is_worth(name: str, values: Mapping[str, float | int]) -> bool:
    """Whether a number is there; steps are only skipped in float16, so none is no news."""
    return name in values and not (name == "skipped_steps" and values[name] == 0)


def _clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
