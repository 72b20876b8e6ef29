"""The result of a precision test: its bounds, its figures and how they are printed.

The one thing to know: a row is one layer, or one set of logits; a report passes where every row is
within the bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What passes; None where a figure does not count.

    Attributes:
        max_relative: Bound of the relative difference of a token.
        router_tie: Margin of a router below which a token that departs is excused: its experts
            are chosen by the last bits.
        max_excused: Share of the tokens that may be.
        cosine_loss: Bound of 1 - mean cosine before the first layer.
        cosine_loss_a_layer: What every layer adds to that bound: rounding errors add up.
        min_top1: Lower bound of the top-1 agreement.
        max_kl: Upper bound of the mean divergence.
    """

    max_relative: float | None = None
    router_tie: float | None = None
    max_excused: float = 0.0
    cosine_loss: float | None = None
    cosine_loss_a_layer: float = 0.0
    min_top1: float
    max_kl: float | None = None

    def min_cosine(self, depth: int) -> float | None:
        """Lower bound of the mean cosine after so many layers."""
        if self.cosine_loss is None:
            return None
        return 1 - self.cosine_loss - depth * self.cosine_loss_a_layer

    def passed(self, row: "PrecisionRow") -> bool:
        """Whether a row is within all bounds; NaN is within none."""
        min_cosine = self.min_cosine(row.depth)
        bounds = [
            math.isfinite(row.mean_difference),
            self.max_relative is None or row.departed == 0,
            min_cosine is None or row.mean_cosine >= min_cosine,
            row.top1_agreement is None or row.top1_agreement >= self.min_top1,
            self.max_kl is None or row.mean_kl is None or row.mean_kl <= self.max_kl,
        ]
        return all(bounds)


def thresholds_for(dtype: torch.dtype) -> Thresholds:
    """What passes in a dtype. docs/precision.md has the measurements behind the numbers."""
    if dtype == torch.float32:
        return Thresholds(max_relative=1e-3, router_tie=1e-5, max_excused=0.1, min_top1=1.0)
    # Half precision rounds after every operation, in another order in each implementation; every
    # token differs, so the bounds are on means.
    return Thresholds(cosine_loss=4e-4, cosine_loss_a_layer=4e-5, min_top1=0.9, max_kl=0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRow:
    """Figures of one layer or of the logits, over the tokens of all texts that are not excused.

    Attributes:
        name: "layer 0" (after the first decoder layer), ..., "logits", then of each layer of
            multi-token prediction "multi-token prediction layer 0" and "... logits 0".
        depth: Layers that came before: 1 for "layer 0".
        with_loss_mask: Whether only positions with a loss count.
        mean_difference: Mean absolute difference.
        max_difference: Largest absolute difference.
        max_relative: Largest difference of a token, relative to the largest number of its vector.
        mean_cosine: Mean over tokens.
        min_cosine: The lowest of a token.
        departed: Share of tokens that are out of bounds on their own.
        excused: How many tokens are left out of these figures.
        top1_agreement: Logits: share of tokens whose likeliest word in Megatron has the highest
            logit of Hugging Face, which several words may share.
        mean_kl: Logits: mean divergence KL(Hugging Face || Megatron), in nats.
    """

    name: str
    depth: int
    with_loss_mask: bool
    mean_difference: float
    max_difference: float
    max_relative: float
    mean_cosine: float
    min_cosine: float
    departed: float
    excused: int
    top1_agreement: float | None = None
    mean_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTie:
    """A token that departs in a layer whose router could as well have chosen other experts.

    Attributes:
        text: Number of the text.
        token: Position in it.
        layer: Where the token departs, for the first time; layers of multi-token prediction count
            on behind the last decoder layer.
        margin: Of the Hugging Face router, relative to its largest logit.
    """

    text: int
    token: int
    layer: int
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Excused:
    """Tokens that depart because of routers near a tie.

    Attributes:
        num_tokens: Those with a tie, and those after them in the same text that depart later.
        is_accepted: Whether they are few enough; if not, none of them is excused.
        ties: The reasons, text by text.
    """

    num_tokens: int
    is_accepted: bool
    ties: tuple[RouterTie, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionReport:
    """The result of a precision test.

    Attributes:
        passed: Whether every row is within the thresholds.
        first_departure: Name of the first row in the order of the model that is not, or None.
        dtype: Name of the dtype, such as "float32".
        thresholds: What was asked for.
        num_texts: Texts.
        num_tokens: Tokens of all texts.
        num_loss_tokens: Those of them with a loss.
        excused: Tokens that may depart.
        rows: First without the loss mask, then with it; in each, layers in order, then logits, then
            multi-token prediction.
        not_compared: What the Megatron model has and nothing was there to compare with, and why.
    """

    passed: bool
    first_departure: str | None
    dtype: str
    thresholds: Thresholds
    num_texts: int
    num_tokens: int
    num_loss_tokens: int
    excused: Excused
    rows: tuple[PrecisionRow, ...]
    not_compared: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For precision.json; numbers that are not finite are None."""
        fields = asdict(self)
        fields["rows"] = [
            {name: _finite(value) for name, value in row.items()} for row in fields["rows"]
        ]
        return fields

    def table(self) -> list[str]:
        """Lines to print."""
        width = max(_NAME_WIDTH, *(len(row.name) for row in self.rows))
        lines = [
            f"Megatron against Hugging Face in {self.dtype}: {self.num_texts} texts, "
            f"{self.num_tokens} tokens, {self.num_loss_tokens} of them with a loss",
            _line("all tokens", _COLUMNS, width),
            *(_row_line(row, width) for row in self.rows if not row.with_loss_mask),
            _line("with the loss mask", _COLUMNS, width),
            *(_row_line(row, width) for row in self.rows if row.with_loss_mask),
        ]
        for tie in self.excused.ties[:1]:
            verdict = "excused" if self.excused.is_accepted else "TOO MANY to be excused"
            lines.append(
                f"{verdict}: {self.excused.num_tokens} tokens at or after router ties, as in text "
                f"{tie.text}, token {tie.token}, layer {tie.layer} (margin {tie.margin:.1e})"
            )
        lines += [f"NOT compared: {what}" for what in self.not_compared]
        bounds = ", ".join(
            f"{name} {value:g}" for name, value in asdict(self.thresholds).items() if value
        )
        if self.passed:
            return [*lines, f"passed ({bounds})"]
        return [*lines, f"FAILED ({bounds}); the first that departs: {self.first_departure}"]


_NAME_WIDTH = 18
_COLUMNS = ("mean", "largest", "relative", "cosine", "lowest", "departed", "excused", "top-1", "KL")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(name: str, cells: Sequence[str], width: int) -> str:
    return f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells)


def _row_line(row: PrecisionRow, width: int) -> str:
    differences = (row.mean_difference, row.max_difference, row.max_relative)
    cells = [f"{difference:.2e}" for difference in differences]
    cells += [f"{row.mean_cosine:.6f}", f"{row.min_cosine:.6f}"]
    cells += [f"{row.departed:.2%}", f"{row.excused}"]
    if row.top1_agreement is not None and row.mean_kl is not None:
        cells += [f"{row.top1_agreement:.2%}", f"{row.mean_kl:.2e}"]
    return _line(row.name, cells, width)
