"""What kernels do with the heads of a few tokens, each in three parts.

The one thing to know: of the channels of a head the first `HALF` and the next `HALF` turn together,
the rest pass; Triton's blocks are powers of two, so each part is loaded under a mask.
"""

import triton
import triton.language as tl

__all__ = [
    "inverse_norm",
    "load_angles",
    "load_head",
    "load_weight",
    "norm_gradient",
    "store_head",
    "store_total",
]


@triton.jit
def load_head(
    pointer,
    rows,
    is_token,
    stride,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """The first, the second and the remaining channels of a head, float32 [tokens, ...]."""
    half = tl.arange(0, BLOCK_HALF)
    places = pointer + rows[:, None] * stride + half[None, :]
    mask = is_token[:, None] & (half < HALF)[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
    rest = tl.zeros((rows.shape[0], BLOCK_REST), dtype=tl.float32)
    if HAS_REST:
        others = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest = tl.load(
            pointer + rows[:, None] * stride + others[None, :],
            mask=is_token[:, None] & (others < HEAD_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
    return first, second, rest


@triton.jit
def store_head(
    pointer,
    rows,
    is_token,
    stride,
    first,
    second,
    rest,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """Writes a head of each token."""
    half = tl.arange(0, BLOCK_HALF)
    places = pointer + rows[:, None] * stride + half[None, :]
    mask = is_token[:, None] & (half < HALF)[None, :]
    tl.store(places, first, mask=mask)
    tl.store(places + HALF, second, mask=mask)
    if HAS_REST:
        others = 2 * HALF + tl.arange(0, BLOCK_REST)
        tl.store(
            pointer + rows[:, None] * stride + others[None, :],
            rest,
            mask=is_token[:, None] & (others < HEAD_DIM)[None, :],
        )


@triton.jit
def load_weight(
    pointer,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_ZERO_CENTERED: tl.constexpr,
):
    """Factors of the norm in three parts, float32 [1, ...]."""
    half = tl.arange(0, BLOCK_HALF)
    others = 2 * HALF + tl.arange(0, BLOCK_REST)
    first = tl.load(pointer + half, mask=half < HALF, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    rest = tl.load(pointer + others, mask=others < HEAD_DIM, other=0.0).to(tl.float32)
    if IS_ZERO_CENTERED:
        first, second, rest = first + 1.0, second + 1.0, rest + 1.0
    return first[None, :], second[None, :], rest[None, :]


@triton.jit
def load_angles(
    cosines,
    sines,
    rows,
    is_token,
    batch,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SHARES_ANGLES: tl.constexpr,
):
    """Cosines and sines [tokens, half]; both halves of a head have the same."""
    angles = rows // batch if SHARES_ANGLES else rows
    half = tl.arange(0, BLOCK_HALF)
    places = angles[:, None] * (2 * HALF) + half[None, :]
    mask = is_token[:, None] & (half < HALF)[None, :]
    return (
        tl.load(cosines + places, mask=mask, other=1.0),
        tl.load(sines + places, mask=mask, other=0.0),
    )


@triton.jit
def inverse_norm(first, second, rest, eps, HEAD_DIM: tl.constexpr):
    """One over the root of the mean square of each head, [tokens, 1]."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
    return tl.rsqrt(squares / HEAD_DIM + eps)[:, None]


@triton.jit
def norm_gradient(
    first, second, rest, first_input, second_input, rest_input, inverse, HEAD_DIM: tl.constexpr
):
    """The gradient in front of a root-mean-square norm.

    The first three are gradients times the weight, the next three the normed input.
    """
    dot = tl.sum(first * first_input, 1) + tl.sum(second * second_input, 1)
    mean = ((dot + tl.sum(rest * rest_input, 1)) / HEAD_DIM)[:, None]
    return (
        inverse * (first - first_input * mean),
        inverse * (second - second_input * mean),
        inverse * (rest - rest_input * mean),
    )


@triton.jit
def store_total(
    pointer,
    first,
    second,
    rest,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """Writes the sums over the tokens."""
    half = tl.arange(0, BLOCK_HALF)
    others = 2 * HALF + tl.arange(0, BLOCK_REST)
    first, second, rest = tl.sum(first, 0), tl.sum(second, 0), tl.sum(rest, 0)
    tl.store(pointer + half, first, mask=half < HALF)
    tl.store(pointer + HALF + half, second, mask=half < HALF)
    if HAS_REST:
        tl.store(pointer + others, rest, mask=others < HEAD_DIM)
