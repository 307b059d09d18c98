"""Matrix products: packed weights (packing.py) times a few rows of activations.

A tile is sixteen outputs, one per lane, so nothing is ever added across lanes. Weights are read once, in the
order in which they lie in memory, and each tile serves four rows of activations before the next is touched.
The plain reference of every form is `Packed.matrix(...) @ activations`, with activations rounded as
`quantise` does where weights are integers (tests).

Each format's loops are written out, for one row and for four: Numba keeps no compiled function that was made
by another function, and vectors cannot be put into arrays to be looped over.
"""

from __future__ import annotations

import numpy as np

from chatwright.generate.kernels.compiling import inlined, inner
from chatwright.generate.kernels.dots import (
    GROUP,
    add_bf16,
    dots4,
    dots8,
    four_dots4,
    four_dots8,
    rounds_bf16,
    store_bf16,
    store_words,
)
from chatwright.generate.kernels.simd import (
    LANES,
    add,
    even_bf16,
    fetch_ahead,
    fetch_nearer,
    fma,
    larger,
    largest,
    load,
    load_bf16,
    load_int,
    multiply,
    odd_bf16,
    rounded,
    splat,
    spread,
    store,
    store_int,
    store_rounded8,
    subtract,
    to_float,
    total,
    unrounded,
)

F32_WEIGHTS, BF16_WEIGHTS, INT8_WEIGHTS, INT4_WEIGHTS = range(4)
FORMAT, WEIGHTS, SCALES, BIAS, TILES, GROUPS, TOGETHER, ADDS, PLAN_COLUMNS = range(9)
"""Columns of a plan, one row per matrix: format, byte offsets in the arena, place of the bias (-1: none),
sizes; how many neighbouring tiles one thread must compute (2 where a gate and what it gates take turns),
whether the product is added to what is there already (1) or replaces it (0). These two are no arguments
because Numba compiles a function anew for each constant."""

WORD_LIMITS = (127.0, 32_512.0)
"""Largest whole number that an activation becomes: before it meets int4 weights, int8 weights. The upper one
is 256 * 127: cut into two signed bytes (dots.py), it needs no third."""
AHEAD = 2048
"""How many bytes before they are used weights are asked for: the processor itself looks ahead no further than
a page. With many rows the next tile is asked for while this one is used (`_share`), or memory would rest
meanwhile."""


@inlined
def _start(vectors, bias, tile, out, at, adding):
    """What the sums of a tile begin with: the bias, and what is there already when the product is added to
    it."""
    value = splat(np.float32(0.0))
    if bias >= 0:
        value = load(vectors, bias + tile * LANES)
    if adding:
        value = add(value, load(out, at))
    return value


@inlined
def takes_words(path, kind):
    """Whether a product with weights of a format wants its activations as `quantise` leaves them."""
    return kind >= INT8_WEIGHTS or (kind == BF16_WEIGHTS and rounds_bf16(path))


@inner
def quantise(path, kind, x, x_stride, first, last, groups, words, factors, sums):
    """Round rows `first` to `last` of x, as weights of a format want them.

    Before integer weights, to whole numbers and a factor per group of 32: x ~ factor * word; before bfloat16
    ones, where the processor multiplies these, to bfloat16. Words take two bytes, before int4 weights one.
    Those of row r begin at words[r * groups * 32 * bytes of a word], its factors at factors[r * groups]. At
    sums[r * groups] lies the sum of each group's words; before int8 weights -128 times that, an int32 in
    float32's place (dots.py tells what for).
    """
    limit = np.float32(WORD_LIMITS[1] if kind == INT8_WEIGHTS else WORD_LIMITS[0])
    for row in range(first, last):
        for group in range(groups):
            at = row * x_stride + group * GROUP
            place = row * groups + group
            a, b = load(x, at), load(x, at + LANES)
            if kind == BF16_WEIGHTS:
                store_bf16(path, words, 2 * place * GROUP, a)
                store_bf16(path, words, 2 * (place * GROUP + LANES), b)
                continue
            zero = splat(np.float32(0.0))
            top = largest(larger(larger(a, subtract(zero, a)), larger(b, subtract(zero, b))))
            inverse = limit / top if top > np.float32(1e-30) else np.float32(0.0)
            factors[place] = top / limit
            a, b = rounded(multiply(a, splat(inverse))), rounded(multiply(b, splat(inverse)))
            both = total(add(unrounded(a), unrounded(b)))
            if kind == INT8_WEIGHTS:
                store_words(path, words, 2 * place * GROUP, 0, a)
                store_words(path, words, 2 * place * GROUP, 1, b)
                store_int(sums, place, -128 * np.int32(both))
            else:
                store_rounded8(words, place * GROUP, a)
                store_rounded8(words, place * GROUP + LANES, b)
                sums[place] = both


@inlined
def _share(lines, rows):
    """How many of the `lines` cache lines of a group each four of `rows` rows ask for in the next tile, while
    they use this one.

    With less than eight rows none, because the processor itself sees what comes next; with many none, because
    memory waits anyway.
    """
    blocks = rows // 4
    return (lines + blocks - 1) // blocks if 2 <= blocks <= 16 else 0


@inlined
def _ask(arena, at, lines, row, share):
    for line in range(min(row // 4 * share, lines), min((row // 4 + 1) * share, lines)):
        fetch_nearer(arena, at + line * 64)


@inner
def _product_f32(arena, weights, groups, first, last, x, x_stride, rows, out, stride, vectors, bias, adding):
    inputs = groups * GROUP
    for tile in range(first, last):
        base = weights + tile * inputs * 64
        row = 0
        while row + 4 <= rows:
            at = row * stride + tile * LANES
            p = row * x_stride
            a = _start(vectors, bias, tile, out, at, adding)
            b = _start(vectors, bias, tile, out, at + stride, adding)
            c = _start(vectors, bias, tile, out, at + 2 * stride, adding)
            d = _start(vectors, bias, tile, out, at + 3 * stride, adding)
            for i in range(inputs):
                w = load(arena, base + i * 64)
                a = fma(w, spread(x, p + i), a)
                b = fma(w, spread(x, p + x_stride + i), b)
                c = fma(w, spread(x, p + 2 * x_stride + i), c)
                d = fma(w, spread(x, p + 3 * x_stride + i), d)
            store(out, at, a)
            store(out, at + stride, b)
            store(out, at + 2 * stride, c)
            store(out, at + 3 * stride, d)
            row += 4
        while row < rows:
            at = row * stride + tile * LANES
            p = row * x_stride
            a = _start(vectors, bias, tile, out, at, adding)
            b = splat(np.float32(0.0))
            for i in range(0, inputs, 2):
                a = fma(load(arena, base + i * 64), spread(x, p + i), a)
                b = fma(load(arena, base + i * 64 + 64), spread(x, p + i + 1), b)
            store(out, at, add(a, b))
            row += 1


@inner
def _product_bf16(arena, weights, groups, first, last, x, x_stride, rows, out, stride, vectors, bias, adding):
    inputs = groups * GROUP
    for tile in range(first, last):
        base = weights + tile * inputs * 32
        row = 0
        while row + 4 <= rows:
            at = row * stride + tile * LANES
            p = row * x_stride
            a = _start(vectors, bias, tile, out, at, adding)
            b = _start(vectors, bias, tile, out, at + stride, adding)
            c = _start(vectors, bias, tile, out, at + 2 * stride, adding)
            d = _start(vectors, bias, tile, out, at + 3 * stride, adding)
            for i in range(0, inputs, 2):
                pair = load_int(arena, base + i * 32)
                w = even_bf16(pair)
                a = fma(w, spread(x, p + i), a)
                b = fma(w, spread(x, p + x_stride + i), b)
                c = fma(w, spread(x, p + 2 * x_stride + i), c)
                d = fma(w, spread(x, p + 3 * x_stride + i), d)
                w = odd_bf16(pair)
                a = fma(w, spread(x, p + i + 1), a)
                b = fma(w, spread(x, p + x_stride + i + 1), b)
                c = fma(w, spread(x, p + 2 * x_stride + i + 1), c)
                d = fma(w, spread(x, p + 3 * x_stride + i + 1), d)
            store(out, at, a)
            store(out, at + stride, b)
            store(out, at + 2 * stride, c)
            store(out, at + 3 * stride, d)
            row += 4
        while row < rows:
            at = row * stride + tile * LANES
            p = row * x_stride
            a = _start(vectors, bias, tile, out, at, adding)
            b = splat(np.float32(0.0))
            for i in range(0, inputs, 2):
                pair = load_int(arena, base + i * 32)
                fetch_ahead(arena, base + i * 32 + AHEAD)
                a = fma(even_bf16(pair), spread(x, p + i), a)
                b = fma(odd_bf16(pair), spread(x, p + i + 1), b)
            store(out, at, add(a, b))
            row += 1


@inner
def _product_bf16_words(
    path, arena, weights, groups, first, last, words, rows, out, stride, vectors, bias, adding
):
    """Each row has the same sums in the same order, alone or with three others."""
    zero = splat(np.float32(0.0))
    share = _share(16, rows)
    for tile in range(first, last):
        base = weights + tile * groups * 1024
        row = 0
        while row + 4 <= rows:
            at = row * stride + tile * LANES
            sums = (
                _start(vectors, bias, tile, out, at, adding),
                zero,
                _start(vectors, bias, tile, out, at + stride, adding),
                zero,
                _start(vectors, bias, tile, out, at + 2 * stride, adding),
                zero,
                _start(vectors, bias, tile, out, at + 3 * stride, adding),
                zero,
            )
            for g in range(groups):
                _ask(arena, base + (groups + g) * 1024, 16, row, share)
                sums = add_bf16(path, arena, base + g * 1024, words, row * groups + g, groups, sums)
            store(out, at, add(sums[0], sums[1]))
            store(out, at + stride, add(sums[2], sums[3]))
            store(out, at + 2 * stride, add(sums[4], sums[5]))
            store(out, at + 3 * stride, add(sums[6], sums[7]))
            row += 4
        while row < rows:
            at = row * stride + tile * LANES
            pair = (_start(vectors, bias, tile, out, at, adding), zero)
            for g in range(groups):
                for line in range(0, 1024, 64):
                    fetch_ahead(arena, base + g * 1024 + AHEAD + line)
                pair = add_bf16(path, arena, base + g * 1024, words, row * groups + g, groups, pair)
            store(out, at, add(pair[0], pair[1]))
            row += 1


@inlined
def _scaled8(arena, s, dots, factors, place, value):
    """value + factor * scale * sum of q x, the sum over one group."""
    return fma(to_float(dots), multiply(load_bf16(arena, s), spread(factors, place)), value)


@inner
def _product_int8(
    path,
    arena,
    weights,
    scales,
    groups,
    first,
    last,
    words,
    factors,
    sums,
    rows,
    out,
    stride,
    vectors,
    bias,
    adding,
):
    share = _share(8, rows)
    for tile in range(first, last):
        base = weights + tile * groups * 512
        scale_at = scales + tile * groups * 32
        row = 0
        while row + 4 <= rows:
            at = row * stride + tile * LANES
            p = row * groups
            a = _start(vectors, bias, tile, out, at, adding)
            b = _start(vectors, bias, tile, out, at + stride, adding)
            c = _start(vectors, bias, tile, out, at + 2 * stride, adding)
            d = _start(vectors, bias, tile, out, at + 3 * stride, adding)
            for g in range(groups):
                _ask(arena, base + (groups + g) * 512, 8, row, share)
                s = scale_at + g * 32
                ad, bd, cd, dd = four_dots8(path, arena, base + g * 512, words, sums, p + g, groups)
                a = _scaled8(arena, s, ad, factors, p + g, a)
                b = _scaled8(arena, s, bd, factors, p + groups + g, b)
                c = _scaled8(arena, s, cd, factors, p + 2 * groups + g, c)
                d = _scaled8(arena, s, dd, factors, p + 3 * groups + g, d)
            store(out, at, a)
            store(out, at + stride, b)
            store(out, at + 2 * stride, c)
            store(out, at + 3 * stride, d)
            row += 4
        while row < rows:
            at = row * stride + tile * LANES
            p = row * groups
            a = _start(vectors, bias, tile, out, at, adding)
            for g in range(groups):
                for line in range(0, 512, 64):
                    fetch_ahead(arena, base + g * 512 + AHEAD + line)
                dots = dots8(path, arena, base + g * 512, words, sums, p + g, groups)[0]
                a = _scaled8(arena, scale_at + g * 32, dots, factors, p + g, a)
            store(out, at, a)
            row += 1


@inlined
def _scaled4(arena, s, dots, factors, sums, place, value):
    """value + factor * (scale * sum of q x + least * sum of x), the sums over one group."""
    factor = spread(factors, place)
    value = fma(load_bf16(arena, s + 32), multiply(factor, spread(sums, place)), value)
    return fma(to_float(dots), multiply(load_bf16(arena, s), factor), value)


@inner
def _product_int4(
    path,
    arena,
    weights,
    scales,
    groups,
    first,
    last,
    words,
    factors,
    sums,
    rows,
    out,
    stride,
    vectors,
    bias,
    adding,
):
    share = _share(4, rows)
    for tile in range(first, last):
        base = weights + tile * groups * 256
        scale_at = scales + tile * groups * 64
        row = 0
        while row + 4 <= rows:
            at = row * stride + tile * LANES
            p = row * groups
            a = _start(vectors, bias, tile, out, at, adding)
            b = _start(vectors, bias, tile, out, at + stride, adding)
            c = _start(vectors, bias, tile, out, at + 2 * stride, adding)
            d = _start(vectors, bias, tile, out, at + 3 * stride, adding)
            for g in range(groups):
                _ask(arena, base + (groups + g) * 256, 4, row, share)
                s = scale_at + g * 64
                ad, bd, cd, dd = four_dots4(path, arena, base + g * 256, words, p + g, groups)
                a = _scaled4(arena, s, ad, factors, sums, p + g, a)
                b = _scaled4(arena, s, bd, factors, sums, p + groups + g, b)
                c = _scaled4(arena, s, cd, factors, sums, p + 2 * groups + g, c)
                d = _scaled4(arena, s, dd, factors, sums, p + 3 * groups + g, d)
            store(out, at, a)
            store(out, at + stride, b)
            store(out, at + 2 * stride, c)
            store(out, at + 3 * stride, d)
            row += 4
        while row < rows:
            at = row * stride + tile * LANES
            p = row * groups
            a = _start(vectors, bias, tile, out, at, adding)
            for g in range(groups):
                for line in range(0, 256, 64):
                    fetch_ahead(arena, base + g * 256 + AHEAD + line)
                dots = dots4(path, arena, base + g * 256, words, p + g, groups)[0]
                a = _scaled4(arena, scale_at + g * 64, dots, factors, sums, p + g, a)
            store(out, at, a)
            row += 1


@inlined
def product(path, arena, matrix, first, last, x, x_stride, words, factors, sums, rows, out, stride, vectors):
    """Tiles `first` to `last` of out = W x + bias, or of out += W x + bias where the plan says so, for `rows`
    rows.

    matrix: a row of the plan. Row r of x begins at x[r * x_stride]; where the format `takes_words` these are
    read instead, as `quantise` leaves them. Row r of out begins at out[r * stride].
    """
    kind, weights, scales, bias, groups = (
        matrix[FORMAT],
        matrix[WEIGHTS],
        matrix[SCALES],
        matrix[BIAS],
        matrix[GROUPS],
    )
    adding = matrix[ADDS]
    if kind == F32_WEIGHTS:
        _product_f32(
            arena, weights, groups, first, last, x, x_stride, rows, out, stride, vectors, bias, adding
        )
    elif kind == BF16_WEIGHTS and rounds_bf16(path):
        _product_bf16_words(
            path, arena, weights, groups, first, last, words, rows, out, stride, vectors, bias, adding
        )
    elif kind == BF16_WEIGHTS:
        _product_bf16(
            arena, weights, groups, first, last, x, x_stride, rows, out, stride, vectors, bias, adding
        )
    elif kind == INT8_WEIGHTS:
        _product_int8(
            path,
            arena,
            weights,
            scales,
            groups,
            first,
            last,
            words,
            factors,
            sums,
            rows,
            out,
            stride,
            vectors,
            bias,
            adding,
        )
    else:
        _product_int4(
            path,
            arena,
            weights,
            scales,
            groups,
            first,
            last,
            words,
            factors,
            sums,
            rows,
            out,
            stride,
            vectors,
            bias,
            adding,
        )
