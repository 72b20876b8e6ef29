"""Two runs of one model compared, layer by layer, and the verdict.

The one thing to know: every figure is taken of a token first, and differences are relative to the
largest number of that token's own vector. Real models have tokens with numbers a thousand times
those of others; relative to the largest of all, nothing else would ever depart.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mtrain.verify.texts import TokenText


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutputs:
    """What a model makes of one text.

    Attributes:
        hidden_states: float32 [layers, tokens, hidden], after each decoder layer; the last is
            before the final norm.
        logits: float32 [tokens, vocab].
        router_margins: float32 [layers, tokens], how near each router is to a tie; infinite in
            layers without a router. Only the Hugging Face side has it.
    """

    hidden_states: torch.Tensor
    logits: torch.Tensor
    router_margins: torch.Tensor | None = None


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
        name: "layer 0" (after the first decoder layer), ..., "logits".
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
        layer: Where the token departs, for the first time.
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
        rows: First without the loss mask, then with it; in each, layers in order, then logits.
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

    def to_json(self) -> dict[str, Any]:
        """For precision.json; numbers that are not finite are None."""
        fields = asdict(self)
        fields["rows"] = [
            {name: _finite(value) for name, value in row.items()} for row in fields["rows"]
        ]
        return fields

    def table(self) -> list[str]:
        """Lines to print."""
        lines = [
            f"Megatron against Hugging Face in {self.dtype}: {self.num_texts} texts, "
            f"{self.num_tokens} tokens, {self.num_loss_tokens} of them with a loss",
            _line("all tokens", _COLUMNS),
            *(_row_line(row) for row in self.rows if not row.with_loss_mask),
            _line("with the loss mask", _COLUMNS),
            *(_row_line(row) for row in self.rows if row.with_loss_mask),
        ]
        for tie in self.excused.ties[:1]:
            verdict = "excused" if self.excused.is_accepted else "TOO MANY to be excused"
            lines.append(
                f"{verdict}: {self.excused.num_tokens} tokens at or after router ties, as in text "
                f"{tie.text}, token {tie.token}, layer {tie.layer} (margin {tie.margin:.1e})"
            )
        bounds = ", ".join(
            f"{name} {value:g}" for name, value in asdict(self.thresholds).items() if value
        )
        if self.passed:
            return [*lines, f"passed ({bounds})"]
        return [*lines, f"FAILED ({bounds}); the first that departs: {self.first_departure}"]


_COLUMNS = ("mean", "largest", "relative", "cosine", "lowest", "departed", "excused", "top-1", "KL")


def compare_outputs(
    megatron: Sequence[ModelOutputs],
    hugging_face: Sequence[ModelOutputs],
    texts: Sequence[TokenText],
    *,
    dtype: torch.dtype,
) -> PrecisionReport:
    """Compares what two models make of the same texts.

    Args:
        megatron: Outputs of the model under test, one a text.
        hugging_face: Outputs of the judge, of the same shapes, with margins of its routers.
        texts: The texts.
        dtype: What both were computed in; it says how near they must be.

    Raises:
        ValueError: The models have another number of layers or other sizes.
    """
    for ours, theirs in zip(megatron, hugging_face, strict=True):
        shapes = [(tuple(o.hidden_states.shape), tuple(o.logits.shape)) for o in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Megatron and Hugging Face give outputs of other sizes: {shapes[0]}, {shapes[1]}"
            )
    thresholds = thresholds_for(dtype)
    loss_mask = torch.cat([text.loss_mask for text in texts])
    masks = (torch.ones_like(loss_mask), loss_mask)
    pairs = list(zip(megatron, hugging_face, strict=True))
    figures = _figures(pairs)
    excused, is_excused = _excused(pairs, figures, masks, thresholds)
    rows = [
        _row(
            name,
            {figure: values[mask & ~is_excused[index]] for figure, values in of_tokens.items()},
            thresholds,
            depth=min(index + 1, len(figures) - 1),
            with_loss_mask=mask is loss_mask,
            num_excused=int((mask & is_excused[index]).sum()),
        )
        for mask in masks
        for index, (name, of_tokens) in enumerate(figures.items())
    ]
    departed = {row.name for row in rows if not thresholds.passed(row)}
    return PrecisionReport(
        passed=not departed,
        first_departure=next((name for name in figures if name in departed), None),
        dtype=str(dtype).removeprefix("torch."),
        thresholds=thresholds,
        num_texts=len(texts),
        num_tokens=len(loss_mask),
        num_loss_tokens=int(loss_mask.sum()),
        excused=excused,
        rows=tuple(rows),
    )


def _figures(pairs: list[tuple[ModelOutputs, ModelOutputs]]) -> dict[str, dict[str, torch.Tensor]]:
    """Row name -> figure -> [tokens of all texts]."""
    num_layers = len(pairs[0][0].hidden_states)
    figures = {
        f"layer {layer}": _joined(
            [_distances(a.hidden_states[layer], b.hidden_states[layer]) for a, b in pairs]
        )
        for layer in range(num_layers)
    }
    figures["logits"] = _joined(
        [_distances(a.logits, b.logits) | _likeness(a.logits, b.logits) for a, b in pairs]
    )
    return figures


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _distances(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures [tokens] of two tensors [tokens, width]."""
    difference = (ours - theirs).abs()
    largest = difference.amax(dim=-1)
    return {
        "mean": difference.mean(dim=-1),
        "largest": largest,
        "relative": largest / theirs.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny),
        "cosine": F.cosine_similarity(ours.double(), theirs.double(), dim=-1),
    }


def _likeness(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures [tokens] of logits [tokens, vocab]."""
    chosen = theirs.gather(-1, ours.argmax(dim=-1, keepdim=True)).squeeze(-1)
    expected, actual = theirs.double().log_softmax(dim=-1), ours.double().log_softmax(dim=-1)
    return {
        "top1": (chosen == theirs.amax(dim=-1)).float(),
        "kl": (expected.exp() * (expected - actual)).sum(dim=-1),
    }


def _excused(
    pairs: list[tuple[ModelOutputs, ModelOutputs]],
    figures: dict[str, dict[str, torch.Tensor]],
    masks: Sequence[torch.Tensor],
    thresholds: Thresholds,
) -> tuple[Excused, torch.Tensor]:
    """Who departs because of a router near a tie.

    A token does from the layer on in which it departs for the first time, if the margin of the
    router there is that of a tie. From the next layer on, what comes after it in its text sees it.

    Returns:
        Them, and bool [rows of `figures`, tokens of all texts], True where a token is excused.
    """
    relative = torch.stack([of_tokens["relative"] for of_tokens in figures.values()])
    departs = relative > (thresholds.max_relative or torch.inf)
    departs[-1] |= figures["logits"]["top1"] == 0
    departs &= relative.isfinite()  # infinity and NaN have no excuse
    is_first = departs & (departs.cumsum(dim=0) == 1)
    is_excused = torch.zeros_like(departs)
    ties: list[RouterTie] = []
    start = 0
    for text, (_, theirs) in enumerate(pairs):
        part = slice(start, start := start + len(theirs.logits))
        margins = theirs.router_margins
        if margins is None or thresholds.router_tie is None:
            continue
        is_tie = is_first[:-1, part] & (margins < thresholds.router_tie)
        sees_one = is_tie.cumsum(dim=0).cumsum(dim=1) > 0
        is_excused[1:, part] = sees_one & departs[1:, part]
        is_excused[:-1, part] |= is_tie
        ties += [
            RouterTie(text=text, token=token, layer=layer, margin=margins[layer, token].item())
            for layer, token in is_tie.nonzero().tolist()
        ]
    is_any = is_excused.any(dim=0)
    is_accepted = all(is_any[mask].sum() <= thresholds.max_excused * mask.sum() for mask in masks)
    found = Excused(num_tokens=int(is_any.sum()), is_accepted=is_accepted, ties=tuple(ties))
    return found, is_excused if is_accepted else torch.zeros_like(is_excused)


def _row(
    name: str,
    figures: dict[str, torch.Tensor],
    thresholds: Thresholds,
    *,
    depth: int,
    with_loss_mask: bool,
    num_excused: int,
) -> PrecisionRow:
    # Written so that NaN departs.
    is_near = torch.ones_like(figures["mean"], dtype=torch.bool)
    if thresholds.max_relative is not None:
        is_near &= figures["relative"] <= thresholds.max_relative
    min_cosine = thresholds.min_cosine(depth)
    if min_cosine is not None:
        is_near &= figures["cosine"] >= min_cosine
    return PrecisionRow(
        name=name,
        depth=depth,
        with_loss_mask=with_loss_mask,
        mean_difference=figures["mean"].mean().item(),
        max_difference=figures["largest"].amax().item(),
        max_relative=figures["relative"].amax().item(),
        mean_cosine=figures["cosine"].mean().item(),
        min_cosine=figures["cosine"].amin().item(),
        departed=(~is_near).float().mean().item(),
        excused=num_excused,
        top1_agreement=figures["top1"].mean().item() if "top1" in figures else None,
        mean_kl=figures["kl"].mean().item() if "kl" in figures else None,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<18}" + "".join(f"{cell:>11}" for cell in cells)


def _row_line(row: PrecisionRow) -> str:
    differences = (row.mean_difference, row.max_difference, row.max_relative)
    cells = [f"{difference:.2e}" for difference in differences]
    cells += [f"{row.mean_cosine:.6f}", f"{row.min_cosine:.6f}"]
    cells += [f"{row.departed:.2%}", f"{row.excused}"]
    if row.top1_agreement is not None and row.mean_kl is not None:
        cells += [f"{row.top1_agreement:.2%}", f"{row.mean_kl:.2e}"]
    return _line(row.name, cells)
