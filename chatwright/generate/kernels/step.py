"""The whole model for a few tokens at once, as one compiled function that every thread runs.

Threads share the work of each product and meet before its result is read. What is cheap (norms, rounding)
each thread does for itself while there are few rows, which saves a meeting; with many rows they share that as
well.

A row is a token of any sequence: decoding of many sequences, a piece of a prompt, and guesses to be checked
all look alike. The keys and values of all rows are stored before any row looks at them, and a row looks at
what stands before it.
"""

from __future__ import annotations

import numpy as np
from numba import typeof, types

from chatwright.generate.kernels.attention import attend, norm_whole, part, place
from chatwright.generate.kernels.barrier import meet
from chatwright.generate.kernels.compiling import entry, inlined, inner
from chatwright.generate.kernels.dots import GROUP
from chatwright.generate.kernels.layout import (
    ACTIVATION,
    ALONE,
    ATTENTION_NORM,
    ATTENTION_OUT_NORM,
    BRANCH_SCALE,
    DOWN,
    EMBED_SCALE,
    EPS,
    GEGLU,
    GELU,
    HEAD_STRIDE,
    HEADS,
    KV_HEADS,
    LAYER,
    LAYERS,
    LOGIT_CAP,
    LOGIT_STRIDE,
    MATRICES,
    MLP_NORM,
    MLP_OUT_NORM,
    MLP_STRIDE,
    NORM,
    OUTPUT,
    PARALLEL,
    POSITIONS,
    QK_NORM,
    QKV,
    QKV_STRIDE,
    RELU2,
    STRIDE,
    SWIGLU,
    UP,
    WHOLE_QK_NORM,
    WIDTH,
    WINDOW,
)
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
    capped,
    fma,
    gelu,
    keep_first,
    larger,
    load,
    multiply,
    read_one,
    read_one_bf16,
    sigmoid,
    splat,
    store,
    subtract,
    total,
)


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
def _normalise(thread, threads, sync, dims, numbers, x, which, count, vectors, norm, out):
    """Rows which[0] to which[count - 1] of x, normalised (as they are where `norm` is -1), to the rows of
    out[slot]; the slot."""
    shared = count > ALONE and threads > 1
    slot = 0 if shared else thread
    first, last = part(count, thread, threads) if shared else (0, count)
    stride, eps = dims[STRIDE], numbers[EPS]
    for row in range(first, last):
        if norm >= 0:
            _row_norm(
                dims[NORM], x, which[row] * stride, dims[WIDTH], eps, vectors, norm, out[slot], row * stride
            )
        else:
            for i in range(0, stride, LANES):
                store(out[slot], row * stride + i, load(x, which[row] * stride + i))
    if shared:
        meet(sync, threads)
    return slot


@inner
def _add_normed(thread, threads, sync, dims, numbers, branch, rows, vectors, norm, x):
    """Normalise what a branch gave, in place, and add it to the residual stream."""
    first, last = part(rows, thread, threads)
    stride = dims[STRIDE]
    for row in range(first, last):
        at = row * stride
        _row_norm(dims[NORM], branch, at, dims[WIDTH], numbers[EPS], vectors, norm, branch, at)
        for i in range(at, at + dims[WIDTH], LANES):
            store(x, i, add(load(x, i), load(branch, i)))
    meet(sync, threads)


@inner
def _embed(matrix, dims, scale, arena, vectors, ids, positions, first, last, x):
    """Rows `first` to `last` of x: a row of the token table each, times `scale`, plus one of the position
    table."""
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
            value *= scale
            if dims[POSITIONS] >= 0:
                value += vectors[dims[POSITIONS] + positions[row] * dims[STRIDE] + i]
            x[at + i] = value


@inlined
def _gelu_tanh(x):
    """0.5 x (1 + tanh u) = x sigmoid(2 u): arXiv:1606.08415, section 2"""
    inner = multiply(x, fma(multiply(x, x), splat(np.float32(0.044715)), splat(np.float32(1.0))))
    return multiply(x, sigmoid(multiply(inner, splat(np.float32(1.5957691216057308)))))


@inner
def _activate(kind, scale, raw, raw_stride, rows, first, last, hidden, stride):
    """The non-linearity of the hidden tiles `first` to `last`, times `scale`. With a gate, tiles of `raw`
    come in pairs: gate, up."""
    gated = kind in (SWIGLU, GEGLU)
    for row in range(rows):
        for tile in range(first, last):
            if gated:
                at = row * raw_stride + 2 * tile * LANES
                x = load(raw, at)
                x = _gelu_tanh(x) if kind == GEGLU else multiply(x, sigmoid(x))
                x = multiply(x, load(raw, at + LANES))
            else:
                x = load(raw, row * raw_stride + tile * LANES)
                if kind == RELU2:
                    x = larger(x, splat(np.float32(0.0)))
                    x = multiply(x, x)
                elif kind == GELU:
                    x = gelu(x)
                else:
                    x = _gelu_tanh(x)
            if scale != np.float32(1.0):
                x = multiply(x, splat(scale))
            store(hidden, row * stride + tile * LANES, x)


@inner
def _multiply(
    path, thread, threads, sync, arena, matrix, x, x_stride, words, factors, sums, rows, out, stride, vectors
):
    """This thread's part of a product, once x is whole. Most weights first have their input rounded."""
    shared = rows > ALONE and threads > 1
    slot = 0 if shared else thread
    if takes_words(path, matrix[FORMAT]):
        first, last = part(rows, thread, threads) if shared else (0, rows)
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
    first, last = part(matrix[TILES] // together, thread, threads)
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


@inner
def _cap(cap, rows, first, last, logits, stride):
    """The soft cap on the tiles `first` to `last` of the logits."""
    for row in range(rows):
        for tile in range(first, last):
            at = row * stride + tile * LANES
            store(logits, at, capped(load(logits, at), cap))


@inner
def _up(
    path,
    thread,
    threads,
    sync,
    dims,
    numbers,
    arena,
    matrix,
    vectors,
    norm,
    every,
    x,
    rows,
    normed,
    words,
    factors,
    sums,
    raw,
    hidden,
):
    """The first half of the MLP, from the residual stream to its hidden features."""
    slot = _normalise(thread, threads, sync, dims, numbers, x, every, rows, vectors, norm, normed)
    raw_stride = matrix[TILES] * LANES
    _multiply(
        path,
        thread,
        threads,
        sync,
        arena,
        matrix,
        normed[slot],
        dims[STRIDE],
        words,
        factors,
        sums,
        rows,
        raw,
        raw_stride,
        vectors,
    )
    # the tiles that this thread has just made
    a, b = part(matrix[TILES] // matrix[TOGETHER], thread, threads)
    _activate(dims[ACTIVATION], numbers[BRANCH_SCALE], raw, raw_stride, rows, a, b, hidden, dims[MLP_STRIDE])
    meet(sync, threads)


@entry
def forward(
    path,
    thread,
    threads,
    sync,
    dims,
    numbers,
    arena,
    plan,
    vectors,
    blocks,
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
    order; positions and pages are theirs in the end. every: 0, 1, 2, ... cos, sin: (tables, ANGLE_ROWS,
    PAIRS), flat. keys, values: bytes. logits: (wanted, LOGIT_STRIDE), flat. The rest is for what is computed
    on the way; normed, words, factors, sums and scores have a first dimension of threads.
    """
    rows, count = len(ids), len(wanted)
    stride, layers = dims[STRIDE], dims[LAYERS]
    heads_stride = dims[HEADS] * dims[HEAD_STRIDE]
    units = rows * (dims[HEADS] + dims[KV_HEADS])
    a, b = part(rows, thread, threads)
    _embed(plan[layers * MATRICES + 1], dims, numbers[EMBED_SCALE], arena, vectors, ids, positions, a, b, x)
    meet(sync, threads)
    for layer in range(layers):
        matrix = plan[layer * MATRICES + QKV]
        slot = _normalise(
            thread,
            threads,
            sync,
            dims,
            numbers,
            x,
            every,
            rows,
            vectors,
            blocks[layer, ATTENTION_NORM],
            normed,
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
        if dims[QK_NORM] == WHOLE_QK_NORM:
            a, b = part(rows, thread, threads)
            norm_whole(dims, numbers, vectors, blocks, layer, a, b, qkv)
            meet(sync, threads)
        a, b = part(units, thread, threads)
        place(dims, numbers, vectors, blocks, layer, a, b, qkv, cos, sin, positions, pages, keys, values)
        meet(sync, threads)
        if (
            layer == layers - 1 and count < rows
        ):  # all keys and values are there: what follows is asked for a few rows only
            if thread == 0:
                _move_up(wanted, x, stride, qkv, dims[QKV_STRIDE], positions, pages)
            meet(sync, threads)
            rows, wanted = count, every
        attend(
            thread,
            threads,
            dims,
            numbers,
            layer,
            blocks[layer, WINDOW],
            rows,
            qkv,
            positions,
            pages,
            keys,
            values,
            scores[thread],
            attended,
        )
        meet(sync, threads)
        up, norm = plan[layer * MATRICES + UP], blocks[layer, MLP_NORM]
        if dims[PARALLEL]:  # before attention's part is added to x
            _up(
                path,
                thread,
                threads,
                sync,
                dims,
                numbers,
                arena,
                up,
                vectors,
                norm,
                every,
                x,
                rows,
                normed,
                words,
                factors,
                sums,
                raw,
                hidden,
            )
        # Where a norm stands behind a branch, its output first goes to normed[0], which rests meanwhile.
        behind = blocks[layer, ATTENTION_OUT_NORM]
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            plan[layer * MATRICES + OUTPUT],
            attended,
            heads_stride,
            words,
            factors,
            sums,
            rows,
            x if behind < 0 else normed[0],
            stride,
            vectors,
        )
        meet(sync, threads)
        if behind >= 0:
            _add_normed(thread, threads, sync, dims, numbers, normed[0], rows, vectors, behind, x)
        if not dims[PARALLEL]:
            _up(
                path,
                thread,
                threads,
                sync,
                dims,
                numbers,
                arena,
                up,
                vectors,
                norm,
                every,
                x,
                rows,
                normed,
                words,
                factors,
                sums,
                raw,
                hidden,
            )
        behind = blocks[layer, MLP_OUT_NORM]
        _multiply(
            path,
            thread,
            threads,
            sync,
            arena,
            plan[layer * MATRICES + DOWN],
            hidden,
            dims[MLP_STRIDE],
            words,
            factors,
            sums,
            rows,
            x if behind < 0 else normed[0],
            stride,
            vectors,
        )
        meet(sync, threads)
        if behind >= 0:
            _add_normed(thread, threads, sync, dims, numbers, normed[0], rows, vectors, behind, x)
    if count:
        matrix = plan[layers * MATRICES]
        slot = _normalise(
            thread, threads, sync, dims, numbers, x, wanted, count, vectors, blocks[layers, 0], normed
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
        if numbers[LOGIT_CAP] > np.float32(0.0):
            a, b = part(matrix[TILES], thread, threads)  # the tiles that this thread has just made
            _cap(numbers[LOGIT_CAP], count, a, b, logits, dims[LOGIT_STRIDE])


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
            one[real],
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
