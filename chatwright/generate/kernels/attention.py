"""Attention over paged keys and values: queries and keys are normalised and rotated, keys and values stored,
then every head of every row looks at what stands before it.

Keys lie so that one vector has sixteen tokens of one page, values so that it has sixteen features of one
token; a page is sixteen tokens. As bfloat16 two neighbours share a lane: keys feature 2 i with 2 i + 1,
values i with 16 + i of thirty-two.
"""

from __future__ import annotations

import numpy as np

from chatwright.generate.kernels.compiling import inlined, inner
from chatwright.generate.kernels.layout import (
    ALONE,
    ANGLE_ROWS,
    ANGLES,
    BF16_CACHE,
    BRANCH_SCALE,
    EPS,
    HEAD_DIM,
    HEAD_QK_NORM,
    HEAD_STRIDE,
    HEADS,
    KEY_NORM,
    KV_HEADS,
    PAGES,
    PAIRS,
    QK_NORM,
    QKV_STRIDE,
    QUERY_NORM,
    SCORE_CAP,
    SCORE_SCALE,
)
from chatwright.generate.kernels.simd import (
    LANES,
    add,
    capped,
    drop_first,
    even_bf16,
    exp,
    fetch_ahead,
    fma,
    keep_first,
    larger,
    largest,
    load,
    load_int,
    multiply,
    odd_bf16,
    splat,
    spread,
    store,
    store_one,
    store_one_bf16,
    subtract,
    total,
)


@inlined
def part(count, thread, threads):
    """This thread's share of `count` things: from, to."""
    return count * thread // threads, count * (thread + 1) // threads


@inlined
def _features_norm(x, at, size, eps, vectors, norm):
    """RMS norm of `size` features of queries or keys, in place."""
    squares = np.float32(0.0)
    for i in range(size):
        squares += x[at + i] * x[at + i]
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
    for i in range(size):
        x[at + i] = x[at + i] * scale * vectors[norm + i]


@inlined
def _rotate(x, at, half, cos, sin, angle):
    """Turn the pairs (i, i + half): Su et al. 2021, arXiv:2104.09864, eq. 15."""
    for i in range(half):
        a, b = x[at + i], x[at + half + i]
        c, s = cos[angle + i], sin[angle + i]
        x[at + i] = a * c - b * s
        x[at + half + i] = b * c + a * s


@inner
def norm_whole(dims, numbers, vectors, blocks, layer, first, last, qkv):
    """Normalise the queries of rows `first` to `last` over all heads together, and the keys."""
    queries, keys = dims[HEADS] * dims[HEAD_DIM], dims[KV_HEADS] * dims[HEAD_DIM]
    for row in range(first, last):
        at = row * dims[QKV_STRIDE]
        _features_norm(qkv, at, queries, numbers[EPS], vectors, blocks[layer, QUERY_NORM])
        _features_norm(qkv, at + queries, keys, numbers[EPS], vectors, blocks[layer, KEY_NORM])


@inner
def place(dims, numbers, vectors, blocks, layer, first, last, qkv, cos, sin, positions, pages, keys, values):
    """Normalise queries and keys per head, and rotate them; write keys and values into their pages. A unit is
    a head of a row."""
    heads, groups, size, room = dims[HEADS], dims[KV_HEADS], dims[HEAD_DIM], dims[HEAD_STRIDE]
    narrow = dims[BF16_CACHE] != 0
    item = 2 if narrow else 4
    pairs, angles = dims[PAIRS], blocks[layer, ANGLES]
    for unit in range(first, last):
        row, head = unit // (heads + groups), unit % (heads + groups)
        at = row * dims[QKV_STRIDE] + head * size
        if dims[QK_NORM] == HEAD_QK_NORM:
            norm = blocks[layer, QUERY_NORM if head < heads else KEY_NORM]
            _features_norm(qkv, at, size, numbers[EPS], vectors, norm)
        if angles >= 0:
            _rotate(qkv, at, pairs, cos, sin, (angles * dims[ANGLE_ROWS] + positions[row]) * pairs)
        if head < heads:
            continue
        position = positions[row]
        token = position % LANES
        base = (
            ((layer * dims[PAGES] + pages[row, position // LANES]) * groups + head - heads)
            * room
            * LANES
            * item
        )
        value_at = at + groups * size
        for i in range(size):
            if narrow:
                store_one_bf16(keys, base + (i // 2 * 32 + token * 2 + i % 2) * 2, qkv[at + i])
            else:
                store_one(keys, base + (i * LANES + token) * 4, qkv[at + i])
        for i in range(room):  # the padding is read with the rest: whatever lies there now might be no number
            value = qkv[value_at + i] if i < size else np.float32(0.0)
            if narrow:
                lane = i // 32 * 32 + i % 16 * 2 + i % 32 // 16
                store_one_bf16(values, base + (token * room + lane) * 2, value)
            else:
                store_one(values, base + (token * room + i) * 4, value)


@inlined
def _similarities(narrow, keys, base, qkv, query, size, values, ahead):
    """q k for the sixteen tokens of the page at `base`. Meanwhile the page at `ahead`, unless that is -1, is
    brought near."""
    a = b = c = d = splat(np.float32(0.0))  # sums apart, because an addition must wait for the one before
    if narrow:
        for i in range(0, size - 2, 4):
            if ahead >= 0:
                fetch_ahead(keys, ahead + i * 32)
                fetch_ahead(keys, ahead + i * 32 + 64)
                fetch_ahead(values, ahead + i * 32)
                fetch_ahead(values, ahead + i * 32 + 64)
            pair = load_int(keys, base + i * 32)
            a = fma(even_bf16(pair), spread(qkv, query + i), a)
            b = fma(odd_bf16(pair), spread(qkv, query + i + 1), b)
            pair = load_int(keys, base + i * 32 + 64)
            c = fma(even_bf16(pair), spread(qkv, query + i + 2), c)
            d = fma(odd_bf16(pair), spread(qkv, query + i + 3), d)
        if size % 4:
            pair = load_int(keys, base + (size - 2) * 32)
            a = fma(even_bf16(pair), spread(qkv, query + size - 2), a)
            b = fma(odd_bf16(pair), spread(qkv, query + size - 1), b)
    else:
        for i in range(0, size, 2):
            a = fma(load(keys, base + i * 64), spread(qkv, query + i), a)
            b = fma(load(keys, base + i * 64 + 64), spread(qkv, query + i + 1), b)
    return add(add(a, b), add(c, d))


@inlined
def _page_ahead(pages, positions, row, next_row, rows, number, head, together):
    """The page that a head asks for while it looks at its own page `number`, of those that `next_row` needs;
    -1 for none.

    The heads that share keys share the asking. What the row before has as well is near already: in a prompt
    that is every page.
    """
    if next_row >= rows or number % together != head % together or number * LANES > positions[next_row]:
        return -1
    page = pages[next_row, number]
    return -1 if next_row > 0 and pages[next_row - 1, number] == page else page


@inner
def attend(
    thread,
    threads,
    dims,
    numbers,
    layer,
    window,
    rows,
    qkv,
    positions,
    pages,
    keys,
    values,
    scores,
    attended,
):
    """softmax(q k^T / sqrt(K)) v: this thread's share of all heads of all rows.

    window: how many tokens a row looks at, itself included; 0: all. A page that lies before the window is not
    read; of the one in which it begins, the tokens before it count nothing.

    Many rows are dealt out in turn, because in a prompt the later ones have more to look at.
    """
    heads, groups, size, room = dims[HEADS], dims[KV_HEADS], dims[HEAD_DIM], dims[HEAD_STRIDE]
    narrow, together = dims[BF16_CACHE] != 0, heads // groups
    page_bytes = room * LANES * (2 if narrow else 4)
    scale, cap = splat(numbers[SCORE_SCALE]), numbers[SCORE_CAP]
    start, step = (thread, threads) if rows > ALONE else (0, 1)
    first, last = (
        (0, (rows - thread + threads - 1) // threads * heads)
        if rows > ALONE
        else part(rows * heads, thread, threads)
    )
    for unit in range(first, last):
        row, head = start + unit // heads * step, unit % heads
        group = head // together
        query = row * dims[QKV_STRIDE] + head * size
        tokens = positions[row] + 1
        used = (tokens + LANES - 1) // LANES
        low = max(tokens - window, 0) if window > 0 else 0
        begun, outside = low // LANES, low % LANES
        edge = begun if outside else -1  # the page in which the window begins, unless it begins with it
        next_row, next_group = (row, group + 1) if group + 1 < groups else (row + step, 0)
        tops = splat(np.float32(-np.inf))
        for number in range(begun, used):
            base = ((layer * dims[PAGES] + pages[row, number]) * groups + group) * page_bytes
            ahead = _page_ahead(pages, positions, row, next_row, rows, number, head, together)
            if ahead >= 0:
                ahead = ((layer * dims[PAGES] + ahead) * groups + next_group) * page_bytes
            a = _similarities(narrow, keys, base, qkv, query, size, values, ahead)
            a = multiply(a, scale)
            if cap > np.float32(0.0):
                a = capped(a, cap)
            a = keep_first(a, tokens - number * LANES, np.float32(-np.inf))
            if number == edge:
                a = drop_first(a, outside, np.float32(-np.inf))
            store(scores, number * LANES, a)
            tops = larger(tops, a)
        top = splat(largest(tops))
        sums = splat(np.float32(0.0))
        for number in range(begun, used):
            weight = exp(subtract(load(scores, number * LANES), top))
            weight = keep_first(weight, tokens - number * LANES, np.float32(0.0))
            if number == edge:
                weight = drop_first(weight, outside, np.float32(0.0))
            store(scores, number * LANES, weight)
            sums = add(sums, weight)
        inverse = splat(numbers[BRANCH_SCALE] / total(sums))
        out = (row * heads + head) * room
        for chunk in range(0, room, 32):
            a = b = c = d = splat(np.float32(0.0))
            for number in range(begun, used):
                base = ((layer * dims[PAGES] + pages[row, number]) * groups + group) * page_bytes
                inside = min(LANES, tokens - number * LANES)
                if narrow:
                    at, line = base + chunk * 2, room * 2
                    for token in range(0, inside - 1, 2):
                        pair, weight = (
                            load_int(values, at + token * line),
                            spread(scores, number * LANES + token),
                        )
                        a, b = fma(even_bf16(pair), weight, a), fma(odd_bf16(pair), weight, b)
                        pair, weight = (
                            load_int(values, at + (token + 1) * line),
                            spread(scores, number * LANES + token + 1),
                        )
                        c, d = fma(even_bf16(pair), weight, c), fma(odd_bf16(pair), weight, d)
                    if inside % 2:
                        pair, weight = (
                            load_int(values, at + (inside - 1) * line),
                            spread(scores, number * LANES + inside - 1),
                        )
                        a, b = fma(even_bf16(pair), weight, a), fma(odd_bf16(pair), weight, b)
                else:
                    for token in range(inside):
                        at = base + (token * room + chunk) * 4
                        weight = spread(scores, number * LANES + token)
                        a, b = fma(load(values, at), weight, a), fma(load(values, at + 64), weight, b)
            store(attended, out + chunk, multiply(add(a, c), inverse))
            store(attended, out + chunk + LANES, multiply(add(b, d), inverse))
