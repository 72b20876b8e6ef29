"""Kernels of causal attention in packs of short documents.

The one thing to know: a program works for the query heads of one key head at once. Its rows are the
queries of a few tokens, (token, head) with heads fastest, so a block that lies on the diagonal is
narrow in tokens, keys are loaded once for all its heads, and gradients of keys are sums over them.

Shapes: R = BLOCK_ROWS rows, T = R / QUERIES tokens, K = BLOCK_KEYS keys, D = HEAD_DIM. Positions
count within a document. A block may reach into the next document: what its rows and keys find there
is not stored, and of the scores only those of later keys are masked, as all that a token sees lies
before the end. `num_tokens` and strides are those of tensors; blocks that a loop streams come by
descriptors [tokens, heads, D], which keeps addresses out of registers.
"""

import triton
import triton.language as tl

__all__ = ["forward_kernel", "key_gradient_kernel", "query_gradient_kernel"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_places(
    token_stride, head_stride, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, R: tl.constexpr
):
    """[R, D], where rows lie from the first token of their block."""
    rows = tl.arange(0, R)
    of_rows = rows // QUERIES * token_stride + rows % QUERIES * head_stride
    return of_rows[:, None] + tl.arange(0, HEAD_DIM)[None, :]


# fmt: off
@triton.jit
def _attend(
    query, tokens, total, highest, denominator, key, value, begin, start, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):
    """One block of keys more: total [R, D], highest score and denominator [R]."""
    keys = key.load([begin + start, group, 0]).reshape(BLOCK_KEYS, HEAD_DIM)
    values = value.load([begin + start, group, 0]).reshape(BLOCK_KEYS, HEAD_DIM)
    scores = tl.dot(query, tl.trans(keys))
    positions = start + tl.arange(0, BLOCK_KEYS)
    scores = tl.where(tokens[:, None] >= positions[None, :], scores, -float("inf"))
    raised = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores * scale - (raised * scale)[:, None])
    shrink = tl.exp2((highest - raised) * scale)
    denominator = denominator * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None])
    return total, raised, denominator


@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def forward_kernel(
    query, key, value, output, logarithms, blocks, num_tokens, num_groups,
    query_token, query_head, scale,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Output and logarithms of the queries of some tokens."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_ROWS // QUERIES
    block = blocks + tl.program_id(0) // num_groups * 4
    group = tl.program_id(0) % num_groups
    length = tl.load(block + 1)
    first = tl.load(block + 2)
    if first >= length:
        return
    begin = tl.load(block)
    place = (begin + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_ROWS)
    tokens = first + rows // QUERIES
    heads = group * QUERIES
    is_row = tokens < length
    queries = tl.load(
        query + place * query_token + heads * query_head
        + _row_places(query_token, query_head, QUERIES, HEAD_DIM, BLOCK_ROWS),
        mask=is_row[:, None], other=0.0)
    total = tl.zeros((BLOCK_ROWS, HEAD_DIM), dtype=tl.float32)
    highest = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
    denominator = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in tl.range(0, tl.minimum(first + BLOCK_TOKENS, length), BLOCK_KEYS):
        total, highest, denominator = _attend(
            queries, tokens, total, highest, denominator, key, value, begin, start, group,
            scale, HEAD_DIM, BLOCK_KEYS)
    total = total / denominator[:, None]
    row = num_groups * QUERIES * HEAD_DIM
    tl.store(
        output + place * row + heads * HEAD_DIM
        + _row_places(row, HEAD_DIM, QUERIES, HEAD_DIM, BLOCK_ROWS),
        total.to(output.dtype.element_ty), mask=is_row[:, None])
    tl.store(
        logarithms + begin + (heads + rows % QUERIES).to(tl.int64) * num_tokens + tokens,
        highest * scale * LN_2 + tl.log2(denominator) * LN_2, mask=is_row)


@triton.jit
def _query_gradient(
    query, grad, logarithm, mean, tokens, total, key, value, begin, start, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):
    """[R, D] with one block of keys more, before the scale."""
    keys = key.load([begin + start, group, 0]).reshape(BLOCK_KEYS, HEAD_DIM)
    values = value.load([begin + start, group, 0]).reshape(BLOCK_KEYS, HEAD_DIM)
    scores = tl.dot(query, tl.trans(keys)) * scale - logarithm[:, None]
    positions = start + tl.arange(0, BLOCK_KEYS)
    scores = tl.where(tokens[:, None] >= positions[None, :], scores, -float("inf"))
    grad_weights = tl.dot(grad, tl.trans(values))
    grad_scores = tl.exp2(scores) * (grad_weights - mean[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, total)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "width"])
def query_gradient_kernel(
    grad, query, key, value, output, logarithms, statistics, grad_query, blocks, num_tokens,
    num_groups, width, grad_token, grad_head, query_token, query_head, scale,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Gradients of the queries of some tokens.

    Statistics are two numbers of every query that gradients of keys need, each float32
    [groups, width]: the logarithm to base 2 and the mean, output . gradient. The map says where
    those of a document begin, so that descriptors find multiples of 16 bytes.
    """
    BLOCK_TOKENS: tl.constexpr = BLOCK_ROWS // QUERIES
    block = blocks + tl.program_id(0) // num_groups * 4
    group = tl.program_id(0) % num_groups
    length = tl.load(block + 1)
    first = tl.load(block + 2)
    if first >= length:
        return
    begin = tl.load(block)
    place = (begin + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_ROWS)
    tokens = first + rows // QUERIES
    heads = group * QUERIES
    is_row = tokens < length
    queries = tl.load(
        query + place * query_token + heads * query_head
        + _row_places(query_token, query_head, QUERIES, HEAD_DIM, BLOCK_ROWS),
        mask=is_row[:, None], other=0.0)
    grads = tl.load(
        grad + place * grad_token + heads * grad_head
        + _row_places(grad_token, grad_head, QUERIES, HEAD_DIM, BLOCK_ROWS),
        mask=is_row[:, None], other=0.0)
    row = num_groups * QUERIES * HEAD_DIM
    places = _row_places(row, HEAD_DIM, QUERIES, HEAD_DIM, BLOCK_ROWS)
    place = place * row + heads * HEAD_DIM
    outputs = tl.load(output + place + places, mask=is_row[:, None], other=0.0)
    mean = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    of_rows = begin + (heads + rows % QUERIES).to(tl.int64) * num_tokens + tokens
    logarithm = tl.load(logarithms + of_rows, mask=is_row, other=0.0) * LOG2_E
    statistics += group.to(tl.int64) * width + (tl.load(block + 3) + first) * QUERIES
    tl.store(statistics + rows, logarithm, mask=is_row)
    tl.store(statistics + num_groups.to(tl.int64) * width + rows, mean, mask=is_row)
    total = tl.zeros((BLOCK_ROWS, HEAD_DIM), dtype=tl.float32)
    for start in tl.range(0, tl.minimum(first + BLOCK_TOKENS, length), BLOCK_KEYS):
        total = _query_gradient(
            queries, grads, logarithm, mean, tokens, total, key, value, begin, start, group,
            scale * LOG2_E, HEAD_DIM, BLOCK_KEYS)
    tl.store(
        grad_query + place + places,
        (total * scale).to(grad_query.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _key_gradient(
    keys, values, positions, grad_keys, grad_values, grad, query, statistics, num_groups,
    begin, place, start, length, group, scale,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):
    """[K, D] twice with the queries of some tokens more; of keys before the scale."""
    rows = tl.arange(0, BLOCK_ROWS)
    tokens = start + rows // QUERIES
    head = group * QUERIES
    queries = query.load([begin + start, head, 0]).reshape(BLOCK_ROWS, HEAD_DIM)
    grads = grad.load([begin + start, head, 0]).reshape(BLOCK_ROWS, HEAD_DIM)
    row = (place + start) * QUERIES
    logarithm = statistics.load([group, row]).reshape(BLOCK_ROWS)
    mean = statistics.load([num_groups + group, row]).reshape(BLOCK_ROWS)
    scores = tl.dot(keys, tl.trans(queries)) * scale - logarithm[None, :]
    # Beyond the last query anything may lie.
    is_query = tokens < length
    mean = tl.where(is_query, mean, 0.0)
    is_seen = (tokens[None, :] >= positions[:, None]) & is_query[None, :]
    scores = tl.where(is_seen, scores, -float("inf"))
    weights = tl.exp2(scores)
    grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values)
    grad_weights = tl.dot(values, tl.trans(grads))
    grad_scores = weights * (grad_weights - mean[None, :])
    grad_keys = tl.dot(grad_scores.to(queries.dtype), queries, grad_keys)
    return grad_keys, grad_values


@triton.jit(do_not_specialize=["num_groups"])
def key_gradient_kernel(
    grad, query, key, value, statistics, grad_key, grad_value, blocks, num_groups,
    key_token, key_head, value_token, value_head, scale,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Gradients of some keys and values from all their queries."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_ROWS // QUERIES
    block = blocks + tl.program_id(0) // num_groups * 4
    group = tl.program_id(0) % num_groups
    length = tl.load(block + 1)
    first = tl.load(block + 2)
    if first >= length:
        return
    begin = tl.load(block)
    place = (begin + first).to(tl.int64)
    steps = tl.arange(0, BLOCK_KEYS)
    channels = tl.arange(0, HEAD_DIM)[None, :]
    positions = first + steps
    is_key = positions < length
    keys = tl.load(
        key + place * key_token + group * key_head + steps[:, None] * key_token + channels,
        mask=is_key[:, None], other=0.0)
    values = tl.load(
        value + place * value_token + group * value_head + steps[:, None] * value_token + channels,
        mask=is_key[:, None], other=0.0)
    grad_keys = tl.zeros((BLOCK_KEYS, HEAD_DIM), dtype=tl.float32)
    grad_values = tl.zeros((BLOCK_KEYS, HEAD_DIM), dtype=tl.float32)
    of_document = tl.load(block + 3)
    for start in tl.range(first, length, BLOCK_TOKENS):
        grad_keys, grad_values = _key_gradient(
            keys, values, positions, grad_keys, grad_values, grad, query, statistics, num_groups,
            begin, of_document, start, length, group, scale * LOG2_E,
            QUERIES, HEAD_DIM, BLOCK_ROWS)
    places = steps[:, None] * num_groups * HEAD_DIM + channels
    place = (place * num_groups + group) * HEAD_DIM
    tl.store(
        grad_key + place + places, (grad_keys * scale).to(grad_key.dtype.element_ty),
        mask=is_key[:, None])
    tl.store(
        grad_value + place + places, grad_values.to(grad_value.dtype.element_ty),
        mask=is_key[:, None])
