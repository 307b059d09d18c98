"""The whole model for a few tokens at once, as one compiled function that every thread runs.

Threads share the work of each product and meet before its result is read. What is cheap (norms, rounding)
each thread does for itself while there are few rows, which saves a meeting; with many rows they share that as
well.

A row is a token of any sequence: decoding of many sequences, a piece of a prompt, and guesses to be checked
all look alike. The keys and values of all rows are stored before any row looks at them, and a row looks at
what stands before it.

Keys lie so that one vector has sixteen tokens of one page, values so that it has sixteen features of one
token; a page is sixteen tokens. As bfloat16 two neighbours share a lane: keys feature 2 i with 2 i + 1,
values i with 16 + i of thirty-two.
"""

from __future__ import annotations

import numpy as np
from numba import typeof, types

from chatwright.generate.kernels.barrier import meet
from chatwright.generate.kernels.compiling import entry, inlined, inner
from chatwright.generate.kernels.dots import GROUP
from chatwright.generate.kernels.products import (
    BF16_WEIGHTS,
    F32_WEIGHTS,
    FORMAT,
    GROUPS,
    SCALES,
    TILES,
    TOGETHER,
    WEIGHTS,
    product,
    quantise,
    takes_words,
)
from chatwright.generate.kernels.simd import (
    LANES,
    add,
    divide,
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
    read_one,
    read_one_bf16,
    splat,
    spread,
    store,
    store_one,
    store_one_bf16,
    subtract,
    total,
)

(
    WIDTH,
    STRIDE,
    LAYERS,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    HEAD_STRIDE,
    MLP_STRIDE,
    QKV_STRIDE,
    LOGIT_STRIDE,
    NORM,
    ACTIVATION,
    QK_NORM,
    ROTARY,
    PAGES,
    BF16_CACHE,
    POSITIONS,
    DIMS,
) = range(18)
"""Indices into `dims`. Strides are widths rounded up to 32, heads apart. POSITIONS is the place of the
position table in `vectors`, -1 without one."""
RMS, LAYER = range(2)
SWIGLU, GELU_TANH, RELU2 = range(3)
QKV, OUTPUT, UP, DOWN, MATRICES = range(5)
"""Matrices of a layer in the plan; then follow the output matrix and the token table (once more, where they
are one)."""
ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM, NORMS = range(5)
"""Norm vectors of a layer: places in `vectors`. The last row of the table has the final norm."""
ALONE = 4
"""Up to so many rows every thread normalises and rounds all of them for itself."""


@inlined
def _part(count, thread, threads):
    """This thread's share of `count` things: from, to."""
    return count * thread // threads, count * (thread + 1) // threads


@inlined
def _row_norm(kind, x, at, width, eps, vectors, norm, out, out_at):
    """RMS norm (arXiv:1910.07467) or layer norm (arXiv:1607.06450) of one row; layer norm's bias follows its
    weight."""
    zero = splat(np.float32(0.0))
    mean = np.float32(0.0)
    if kind == LAYER:
        sums = zero
        for i in range(0, width, LANES):
            sums = add(sums, keep_first(load(x, at + i), width - i, np.float32(0.0)))
        mean = total(sums) / np.float32(width)
    squares = zero
    for i in range(0, width, LANES):
        value = keep_first(subtract(load(x, at + i), splat(mean)), width - i, np.float32(0.0))
        squares = fma(value, value, squares)
    scale = np.float32(1.0) / np.sqrt(total(squares) / np.float32(width) + eps)
    for i in range(0, width, LANES):
        value = multiply(
            multiply(subtract(load(x, at + i), splat(mean)), splat(scale)), load(vectors, norm + i)
        )
        if kind == LAYER:
            value = add(value, load(vectors, norm + (width + LANES - 1) // LANES * LANES + i))
        store(out, out_at + i, keep_first(value, width - i, np.float32(0.0)))


@inner
def _normalise(thread, threads, sync, dims, eps, x, which, count, vectors, norm, out):
    """Rows which[0] to which[count - 1] of x, normalised, to the rows of out[slot]; the slot."""
    shared = count > ALONE and threads > 1
    slot = 0 if shared else thread
    first, last = _part(count, thread, threads) if shared else (0, count)
    stride = dims[STRIDE]
    for row in range(first, last):
        _row_norm(
            dims[NORM], x, which[row] * stride, dims[WIDTH], eps, vectors, norm, out[slot], row * stride
        )
    if shared:
        meet(sync, threads)
    return slot


@inlined
def _head_norm(x, at, size, eps, vectors, norm):
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
def _embed(matrix, dims, arena, vectors, ids, positions, first, last, x):
    """Rows `first` to `last` of x: a row of the token table each, and of the position table."""
    kind, weights, scales, groups = matrix[FORMAT], matrix[WEIGHTS], matrix[SCALES], matrix[GROUPS]
    for row in range(first, last):
        tile, lane = ids[row] // LANES, ids[row] % LANES
        at = row * dims[STRIDE]
        for i in range(dims[WIDTH]):
            group = tile * groups + i // GROUP
            if kind == F32_WEIGHTS:
                value = read_one(arena, weights + ((tile * groups * GROUP + i) * LANES + lane) * 4)
            elif kind == BF16_WEIGHTS:
                pair = (tile * groups * GROUP + i) // 2
                value = read_one_bf16(arena, weights + ((pair * LANES + lane) * 2 + i % 2) * 2)
            else:  # int8: the token table is never rounded to four bits
                word = i % GROUP // 4
                whole = np.int8(arena[weights + group * 512 + word * 64 + lane * 4 + i % 4])
                value = np.float32(whole) * read_one_bf16(arena, scales + (group * LANES + lane) * 2)
            if dims[POSITIONS] >= 0:
                value += vectors[dims[POSITIONS] + positions[row] * dims[STRIDE] + i]
            x[at + i] = value


@inner
def _place(dims, eps, vectors, norms, layer, first, last, qkv, cos, sin, positions, pages, keys, values):
    """Normalise and rotate queries and keys; write keys and values into their pages. A unit is a head of a
    row."""
    heads, groups, size, room = dims[HEADS], dims[KV_HEADS], dims[HEAD_DIM], dims[HEAD_STRIDE]
    narrow = dims[BF16_CACHE] != 0
    item = 2 if narrow else 4
    for unit in range(first, last):
        row, head = unit // (heads + groups), unit % (heads + groups)
        at = row * dims[QKV_STRIDE] + head * size
        if dims[QK_NORM]:
            _head_norm(qkv, at, size, eps, vectors, norms[layer, QUERY_NORM if head < heads else KEY_NORM])
        if dims[ROTARY]:
            _rotate(qkv, at, size // 2, cos, sin, positions[row] * (size // 2))
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
def _attend(thread, threads, dims, layer, rows, qkv, positions, pages, keys, values, scores, attended):
    """softmax(q k^T / sqrt(K)) v: this thread's share of all heads of all rows.

    Many rows are dealt out in turn, because in a prompt the later ones have more to look at.
    """
    heads, groups, size, room = dims[HEADS], dims[KV_HEADS], dims[HEAD_DIM], dims[HEAD_STRIDE]
    narrow, together = dims[BF16_CACHE] != 0, heads // groups
    page_bytes = room * LANES * (2 if narrow else 4)
    scale = splat(np.float32(1.0) / np.sqrt(np.float32(size)))
    start, step = (thread, threads) if rows > ALONE else (0, 1)
    first, last = (
        (0, (rows - thread + threads - 1) // threads * heads)
        if rows > ALONE
        else _part(rows * heads, thread, threads)
    )
    for unit in range(first, last):
        row, head = start + unit // heads * step, unit % heads
        group = head // together
        query = row * dims[QKV_STRIDE] + head * size
        tokens = positions[row] + 1
        used = (tokens + LANES - 1) // LANES
        next_row, next_group = (row, group + 1) if group + 1 < groups else (row + step, 0)
        tops = splat(np.float32(-np.inf))
        for number in range(used):
            base = ((layer * dims[PAGES] + pages[row, number]) * groups + group) * page_bytes
            ahead = _page_ahead(pages, positions, row, next_row, rows, number, head, together)
            if ahead >= 0:
                ahead = ((layer * dims[PAGES] + ahead) * groups + next_group) * page_bytes
            a = _similarities(narrow, keys, base, qkv, query, size, values, ahead)
            a = keep_first(multiply(a, scale), tokens - number * LANES, np.float32(-np.inf))
            store(scores, number * LANES, a)
            tops = larger(tops, a)
        top = splat(largest(tops))
        sums = splat(np.float32(0.0))
        for number in range(used):
            weight = exp(subtract(load(scores, number * LANES), top))
            weight = keep_first(weight, tokens - number * LANES, np.float32(0.0))
            store(scores, number * LANES, weight)
            sums = add(sums, weight)
        inverse = splat(np.float32(1.0) / total(sums))
        out = (row * heads + head) * room
        for chunk in range(0, room, 32):
            a = b = c = d = splat(np.float32(0.0))
            for number in range(used):
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


@inlined
def _sigmoid(x):
    one = splat(np.float32(1.0))
    return divide(one, add(one, exp(subtract(splat(np.float32(0.0)), x))))


@inner
def _activate(kind, raw, raw_stride, rows, first, last, hidden, stride):
    """The non-linearity of the hidden tiles `first` to `last`. With a gate, tiles of `raw` come in pairs:
    gate, up."""
    for row in range(rows):
        for tile in range(first, last):
            if kind == SWIGLU:
                at = row * raw_stride + 2 * tile * LANES
                x = load(raw, at)
                x = multiply(multiply(x, _sigmoid(x)), load(raw, at + LANES))
            elif kind == RELU2:
                x = larger(load(raw, row * raw_stride + tile * LANES), splat(np.float32(0.0)))
                x = multiply(x, x)
            else:  # 0.5 x (1 + tanh u) = x sigmoid(2 u): arXiv:1606.08415, section 2
                x = load(raw, row * raw_stride + tile * LANES)
                inner = multiply(x, fma(multiply(x, x), splat(np.float32(0.044715)), splat(np.float32(1.0))))
                x = multiply(x, _sigmoid(multiply(inner, splat(np.float32(1.5957691216057308)))))
            store(hidden, row * stride + tile * LANES, x)


@inner
def _multiply(
    path, thread, threads, sync, arena, matrix, x, x_stride, words, factors, sums, rows, out, stride, vectors
):
    """This thread's part of a product, once x is whole. Most weights first have their input rounded."""
    shared = rows > ALONE and threads > 1
    slot = 0 if shared else thread
    if takes_words(path, matrix[FORMAT]):
        first, last = _part(rows, thread, threads) if shared else (0, rows)
        quantise(
            path,
            matrix[FORMAT],
            x,
            x_stride,
            first,
            last,
            matrix[GROUPS],
            words[slot],
            factors[slot],
            sums[slot],
        )
        if shared:
            meet(sync, threads)
    together = matrix[TOGETHER]
    first, last = _part(matrix[TILES] // together, thread, threads)
    product(
        path,
        arena,
        matrix,
        first * together,
        last * together,
        x,
        x_stride,
        words[slot],
        factors[slot],
        sums[slot],
        rows,
        out,
        stride,
        vectors,
    )


@inner
def _move_up(wanted, x, x_stride, qkv, qkv_stride, positions, pages):
    """Make some rows, which are given in order, the first ones; the others are lost."""
    for to in range(len(wanted)):
        row = wanted[to]
        positions[to] = positions[row]
        for number in range(pages.shape[1]):
            pages[to, number] = pages[row, number]
        for column in range(x_stride):
            x[to * x_stride + column] = x[row * x_stride + column]
        for column in range(qkv_stride):
            qkv[to * qkv_stride + column] = qkv[row * qkv_stride + column]


@entry
def forward(
    path,
    thread,
    threads,
    sync,
    dims,
    eps,
    arena,
    plan,
    vectors,
    norms,
    ids,
    positions,
    pages,
    wanted,
    every,
    x,
    normed,
    words,
    factors,
    sums,
    qkv,
    attended,
    raw,
    hidden,
    scores,
    cos,
    sin,
    keys,
    values,
    logits,
):
    """One thread's part of the forward pass of some tokens ("rows").

    ids, positions: (rows,). pages: (rows, most) page numbers. wanted: rows whose logits are asked for, in
    order; positions and pages are theirs in the end. every: 0, 1, 2, ... cos, sin: (positions, K / 2), flat.
    keys, values: bytes. logits: (wanted, LOGIT_STRIDE), flat. The rest is for what is computed on the way;
    normed, words, factors, sums and scores have a first dimension of threads.
    """
    rows, count = len(ids), len(wanted)
    stride, layers = dims[STRIDE], dims[LAYERS]
    heads_stride = dims[HEADS] * dims[HEAD_STRIDE]
    units = rows * (dims[HEADS] + dims[KV_HEADS])
    a, b = _part(rows, thread, threads)
    _embed(plan[layers * MATRICES + 1], dims, arena, vectors, ids, positions, a, b, x)
    meet(sync, threads)
    for layer in range(layers):
        matrix = plan[layer * MATRICES + QKV]
        slot = _normalise(
            thread, threads, sync, dims, eps, x, every, rows, vectors, norms[layer, ATTENTION_NORM], normed
        )
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            matrix,
            normed[slot],
            stride,
            words,
            factors,
            sums,
            rows,
            qkv,
            dims[QKV_STRIDE],
            vectors,
        )
        meet(sync, threads)
        a, b = _part(units, thread, threads)
        _place(dims, eps, vectors, norms, layer, a, b, qkv, cos, sin, positions, pages, keys, values)
        meet(sync, threads)
        if (
            layer == layers - 1 and count < rows
        ):  # all keys and values are there: what follows is asked for a few rows only
            if thread == 0:
                _move_up(wanted, x, stride, qkv, dims[QKV_STRIDE], positions, pages)
            meet(sync, threads)
            rows, wanted = count, every
        _attend(
            thread, threads, dims, layer, rows, qkv, positions, pages, keys, values, scores[thread], attended
        )
        meet(sync, threads)
        matrix = plan[layer * MATRICES + OUTPUT]
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            matrix,
            attended,
            heads_stride,
            words,
            factors,
            sums,
            rows,
            x,
            stride,
            vectors,
        )
        meet(sync, threads)
        matrix = plan[layer * MATRICES + UP]
        slot = _normalise(
            thread, threads, sync, dims, eps, x, every, rows, vectors, norms[layer, MLP_NORM], normed
        )
        raw_stride = matrix[TILES] * LANES
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            matrix,
            normed[slot],
            stride,
            words,
            factors,
            sums,
            rows,
            raw,
            raw_stride,
            vectors,
        )
        a, b = _part(
            matrix[TILES] // matrix[TOGETHER], thread, threads
        )  # the tiles that this thread has just made
        _activate(dims[ACTIVATION], raw, raw_stride, rows, a, b, hidden, dims[MLP_STRIDE])
        meet(sync, threads)
        matrix = plan[layer * MATRICES + DOWN]
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            matrix,
            hidden,
            dims[MLP_STRIDE],
            words,
            factors,
            sums,
            rows,
            x,
            stride,
            vectors,
        )
        meet(sync, threads)
    if count:
        matrix = plan[layers * MATRICES]
        slot = _normalise(
            thread, threads, sync, dims, eps, x, wanted, count, vectors, norms[layers, 0], normed
        )
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            matrix,
            normed[slot],
            stride,
            words,
            factors,
            sums,
            count,
            logits,
            dims[LOGIT_STRIDE],
            vectors,
        )


def compile_for(path: tuple[int, ...]) -> None:
    """Compile `forward` for a path, or read it from the disk, before anything is there to be computed."""
    one = {kind: types.Array(kind, 1, "C") for kind in (types.uint8, types.int64, types.float32)}
    two = {kind: types.Array(kind, 2, "C") for kind in (types.uint8, types.int64, types.float32)}
    byte, whole, real = types.uint8, types.int64, types.float32
    forward.compile(
        (
            typeof(path),
            whole,
            whole,
            one[whole],
            one[whole],
            real,
            one[byte],
            two[whole],
            one[real],
            two[whole],
            one[whole],
            one[whole],
            two[whole],
            one[whole],
            one[whole],
            one[real],
            two[real],
            two[byte],
            two[real],
            two[real],
            one[real],
            one[real],
            one[real],
            one[real],
            two[real],
            one[real],
            one[real],
            one[byte],
            one[byte],
            one[real],
        )
    )
