"""What of data parallelism's communication overlaps, from what was given and how many ranks are."""

import pytest

from mtrain.config.parallel import ParallelConfig, resolve_overlaps


def resolved(reduces, gathers, *, shares: bool = True, num_ranks: int) -> tuple[bool, bool]:
    parallel = ParallelConfig(
        overlap_grad_reduce=reduces,
        overlap_param_gather=gathers,
        use_distributed_optimizer=shares,
    )
    answer = resolve_overlaps(parallel, num_ranks=num_ranks)
    return answer.overlap_grad_reduce, answer.overlap_param_gather


@pytest.mark.parametrize(
    ("reduces", "gathers", "alone", "together"),
    [
        (None, None, (False, False), (True, True)),
        (None, False, (False, False), (True, False)),
        (None, True, (True, True), (True, True)),
        (False, None, (False, False), (False, False)),
        (False, False, (False, False), (False, False)),
        (True, None, (True, False), (True, True)),
        (True, False, (True, False), (True, False)),
        (True, True, (True, True), (True, True)),
    ],
)
def test_overlaps_are_on_with_several_ranks_unless_told(reduces, gathers, alone, together) -> None:
    assert resolved(reduces, gathers, num_ranks=1) == alone
    assert resolved(reduces, gathers, num_ranks=2) == together


def test_parameters_are_only_gathered_where_ranks_share_out_the_optimizer() -> None:
    assert resolved(None, None, shares=False, num_ranks=2) == (True, False)


@pytest.mark.parametrize(
    ("reduces", "shares", "message"),
    [
        (False, True, "needs --overlap_grad_reduce true: drop one of them"),
        (None, False, "needs --use_distributed_optimizer true"),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_contradictions_are_refused(reduces, shares, message, num_ranks) -> None:
    with pytest.raises(ValueError, match=f"^--overlap_param_gather true {message}$"):
        resolved(reduces, True, shares=shares, num_ranks=num_ranks)
