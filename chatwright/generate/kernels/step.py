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
