"""Two runs of one model compared, layer by layer, and the verdict.

The one thing to know: every figure is taken of a token first, and differences are relative to the
largest number of that token's own vector. Real models have tokens with numbers a thousand times
those of others; relative to the largest of all, nothing else would ever depart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mtrain.verify.report import (
    Excused,
    PrecisionReport,
    PrecisionRow,
    RouterTie,
    Thresholds,
    thresholds_for,
)
from mtrain.verify.texts import TokenText


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenOutputs:
    """What the layers of multi-token prediction make of one text.

    Layer n sees the token that is n + 1 further on, so its last n + 1 positions mean nothing.

    Attributes:
        hidden_states: float32 [layers, tokens, hidden], after the decoder layer of each, before its
            norm.
        logits: float32 [layers, tokens, vocab].
        router_margins: As in `ModelOutputs`.
    """

    hidden_states: torch.Tensor
    logits: torch.Tensor
    router_margins: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutputs:
    """What a model makes of one text.

    Attributes:
        hidden_states: float32 [layers, tokens, hidden], after each decoder layer; the last is
            before the final norm.
        logits: float32 [tokens, vocab].
        router_margins: float32 [layers, tokens], how near each router is to a tie; infinite in
            layers without a router. Only the Hugging Face side has it.
        next_tokens: The same of multi-token prediction; None without.
    """

    hidden_states: torch.Tensor
    logits: torch.Tensor
    router_margins: torch.Tensor | None = None
    next_tokens: NextTokenOutputs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where in the model a row is taken.

    Attributes:
        name: Name of the row.
        depth: Layers up to there.
        num_ahead: How much further on than the next token is what it predicts.
        layer: Number of the layer whose output it is; None for logits.
    """

    name: str
    depth: int
    num_ahead: int = 0
    layer: int | None = None


def compare_outputs(
    megatron: Sequence[ModelOutputs],
    hugging_face: Sequence[ModelOutputs],
    texts: Sequence[TokenText],
    *,
    dtype: torch.dtype,
    not_compared: Sequence[str] = (),
) -> PrecisionReport:
    """Compares what two models make of the same texts.

    Args:
        megatron: Outputs of the model under test, one a text.
        hugging_face: Outputs of the judge, of the same shapes, with margins of its routers.
        texts: The texts.
        dtype: What both were computed in; it says how near they must be.
        not_compared: What is left out of the outputs of both, and why.

    Raises:
        ValueError: The models have another number of layers or other sizes.
    """
    pairs = list(zip(megatron, hugging_face, strict=True))
    _check_shapes(pairs)
    thresholds = thresholds_for(dtype)
    places = _places(hugging_face[0])
    figures = _figures(pairs)
    loss_mask = torch.cat([text.loss_mask for text in texts])
    everywhere = torch.ones_like(loss_mask)
    # Per place: the positions that count, without and with the loss mask.
    whole = _masks([torch.ones_like(text.loss_mask) for text in texts], places)
    with_loss = _masks([text.loss_mask for text in texts], places)
    excused, is_excused = _excused(
        pairs, places, figures, thresholds, counted=whole, masks=(everywhere, loss_mask)
    )
    rows = [
        _row(
            place,
            {figure: values[mask & ~excused_here] for figure, values in of_tokens.items()},
            thresholds,
            with_loss_mask=masks is with_loss,
            num_excused=int((mask & excused_here).sum()),
        )
        for masks in (whole, with_loss)
        for place, of_tokens, mask, excused_here in zip(
            places, figures, masks, is_excused, strict=True
        )
    ]
    departed = {row.name for row in rows if not thresholds.passed(row)}
    return PrecisionReport(
        passed=not departed,
        first_departure=next((place.name for place in places if place.name in departed), None),
        dtype=str(dtype).removeprefix("torch."),
        thresholds=thresholds,
        num_texts=len(texts),
        num_tokens=len(loss_mask),
        num_loss_tokens=int(loss_mask.sum()),
        excused=excused,
        rows=tuple(rows),
        not_compared=tuple(not_compared),
    )


def _check_shapes(pairs: Sequence[tuple[ModelOutputs, ModelOutputs]]) -> None:
    for pair in pairs:
        ours, theirs = (_shapes(outputs) for outputs in pair)
        if ours != theirs:
            raise ValueError(
                f"Megatron and Hugging Face give outputs of other sizes: {ours}, {theirs}"
            )


def _shapes(outputs: ModelOutputs) -> tuple[tuple[int, ...], ...]:
    further = outputs.next_tokens
    tensors = [outputs.hidden_states, outputs.logits]
    if further is not None:
        tensors += [further.hidden_states, further.logits]
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _places(outputs: ModelOutputs) -> list[_Place]:
    """Rows of a report, in the order of the model."""
    num_layers = len(outputs.hidden_states)
    places = [
        _Place(name=f"layer {layer}", depth=layer + 1, layer=layer) for layer in range(num_layers)
    ]
    places.append(_Place(name="logits", depth=num_layers))
    num_next = 0 if outputs.next_tokens is None else len(outputs.next_tokens.logits)
    for number in range(num_next):
        depth, ahead = num_layers + number + 1, number + 1
        places += [
            _Place(
                name=f"multi-token prediction layer {number}",
                depth=depth,
                num_ahead=ahead,
                layer=num_layers + number,
            ),
            _Place(name=f"multi-token prediction logits {number}", depth=depth, num_ahead=ahead),
        ]
    return places


def _masks(masks: Sequence[torch.Tensor], places: Sequence[_Place]) -> torch.Tensor:
    """The mask of each text as bool [places, tokens of all texts].

    What predicts a token further on counts where that token does.
    """
    return torch.stack(
        [torch.cat([_moved(mask, place.num_ahead) for mask in masks]) for place in places]
    )


def _moved(mask: torch.Tensor, num_ahead: int) -> torch.Tensor:
    """A mask [tokens] of so many tokens further on; nothing is behind the last one."""
    later = mask[num_ahead:]
    return F.pad(later, (0, len(mask) - len(later)))


def _figures(pairs: Sequence[tuple[ModelOutputs, ModelOutputs]]) -> list[dict[str, torch.Tensor]]:
    """Of each place: figure -> [tokens of all texts]."""
    of_texts = [
        [
            _distances(a, b) | (_likeness(a, b) if is_logits else {})
            for (a, is_logits), (b, _) in zip(_tensors(ours), _tensors(theirs), strict=True)
        ]
        for ours, theirs in pairs
    ]
    return [_joined(parts) for parts in zip(*of_texts, strict=True)]


def _tensors(outputs: ModelOutputs) -> list[tuple[torch.Tensor, bool]]:
    """What is compared at each place, and whether it is logits."""
    found = [(hidden, False) for hidden in outputs.hidden_states]
    found.append((outputs.logits, True))
    further = outputs.next_tokens
    if further is not None:
        for hidden, logits in zip(further.hidden_states, further.logits, strict=True):
            found += [(hidden, False), (logits, True)]
    return found


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
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
    pairs: Sequence[tuple[ModelOutputs, ModelOutputs]],
    places: Sequence[_Place],
    figures: Sequence[dict[str, torch.Tensor]],
    thresholds: Thresholds,
    *,
    counted: torch.Tensor,
    masks: Sequence[torch.Tensor],
) -> tuple[Excused, torch.Tensor]:
    """Who departs because of a router near a tie.

    A token does from the layer on in which it departs for the first time, if the margin of the
    router there is that of a tie. From the next layer on, what comes after it in its text sees it.

    Args:
        pairs: Outputs of both models.
        places: Where they are compared.
        figures: Of each place.
        thresholds: What passes.
        counted: bool [places, tokens of all texts], what can depart.
        masks: bool [tokens of all texts], of which only few may be excused.

    Returns:
        Them, and bool [places, tokens of all texts], True where a token is excused.
    """
    relative = torch.stack([of_tokens["relative"] for of_tokens in figures])
    departs = relative > (thresholds.max_relative or torch.inf)
    for row, of_tokens in enumerate(figures):
        if "top1" in of_tokens:
            departs[row] |= of_tokens["top1"] == 0
    departs &= counted & relative.isfinite()  # infinity and NaN have no excuse
    is_first = departs & (departs.cumsum(dim=0) == 1)
    is_excused = torch.zeros_like(departs)
    ties: list[RouterTie] = []
    start = 0
    for text, (_, theirs) in enumerate(pairs):
        part = slice(start, start := start + len(theirs.logits))
        margins = _margins(theirs, places)
        if margins is None or thresholds.router_tie is None:
            continue
        is_tie = is_first[:, part] & (margins < thresholds.router_tie)
        sees_one = is_tie.cumsum(dim=0).cumsum(dim=1) > 0
        is_excused[1:, part] = sees_one[:-1] & departs[1:, part]
        is_excused[:, part] |= is_tie
        ties += [
            RouterTie(
                text=text, token=token, layer=places[row].layer, margin=margins[row, token].item()
            )
            for row, token in is_tie.nonzero().tolist()
        ]
    is_any = is_excused.any(dim=0)
    is_accepted = all(is_any[mask].sum() <= thresholds.max_excused * mask.sum() for mask in masks)
    found = Excused(num_tokens=int(is_any.sum()), is_accepted=is_accepted, ties=tuple(ties))
    return found, is_excused if is_accepted else torch.zeros_like(is_excused)


def _margins(outputs: ModelOutputs, places: Sequence[_Place]) -> torch.Tensor | None:
    """[places, tokens], infinite where no router is; None of a model without."""
    if outputs.router_margins is None:
        return None
    of_layers = outputs.router_margins
    if outputs.next_tokens is not None and outputs.next_tokens.router_margins is not None:
        of_layers = torch.cat([of_layers, outputs.next_tokens.router_margins])
    none = torch.full_like(of_layers[0], torch.inf)
    return torch.stack([none if p.layer is None else of_layers[p.layer] for p in places])


def _row(
    place: _Place,
    figures: dict[str, torch.Tensor],
    thresholds: Thresholds,
    *,
    with_loss_mask: bool,
    num_excused: int,
) -> PrecisionRow:
    # Written so that NaN departs.
    is_near = torch.ones_like(figures["mean"], dtype=torch.bool)
    if thresholds.max_relative is not None:
        is_near &= figures["relative"] <= thresholds.max_relative
    min_cosine = thresholds.min_cosine(place.depth)
    if min_cosine is not None:
        is_near &= figures["cosine"] >= min_cosine
    return PrecisionRow(
        name=place.name,
        depth=place.depth,
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
