"""Products of small integers and of bfloat16, the one thing for which processors differ too much for LLVM to
find the instruction by itself.

There is a form per kind of processor (paths.py) and a plain one that runs everywhere. Integer sums are exact,
so all forms give equal results. bfloat16 weights meet float32 activations, except where the processor
multiplies pairs of bfloat16: there activations are rounded as well.

A group is 32 inputs of 16 outputs. Its integer weights are vectors of 64 bytes, four inputs of each output;
the activations of a row (a token) for the group are 8 words of four whole numbers. Every word is multiplied
with the weights of all outputs at once. bfloat16 weights are 16 vectors of pairs, and words are pairs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chatwright.generate.kernels.simd import (
    F32,
    I8,
    I16,
    I32,
    I64,
    INT32,
    LANES,
    WIDE_F32,
    WIDE_I32,
    address_of,
    call_llvm,
    copies,
    load_as,
)

GROUP = 32
_WORDS = GROUP // 4
_VPDPBUSD = "llvm.x86.avx512.vpdpbusd.512"


def _word(builder: Any, pointer: Any, number: int, bits: int) -> Any:
    """Four activations of 8 or 16 bits as one whole number."""
    kind = ir.IntType(4 * bits)
    return load_as(builder, builder.gep(pointer, [ir.Constant(I64, number * bits // 2)]), kind, bits // 8)


def _bytes(builder: Any, pointer: Any, offset: int, count: int) -> Any:
    return load_as(builder, builder.gep(pointer, [ir.Constant(I64, offset)]), ir.VectorType(I8, count), 1)


def _halves(count: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I16, count), [value] * count)


def _nibbles(builder: Any, packed: Any) -> tuple[Any, Any]:
    """The low and the high four bits of each byte, as bytes 0 to 15."""
    count = packed.type.count
    mask = ir.Constant(packed.type, [15] * count)
    wide = builder.bitcast(packed, ir.VectorType(I16, count // 2))
    high = builder.bitcast(builder.lshr(wide, _halves(count // 2, 4)), packed.type)
    return builder.and_(packed, mask), builder.and_(high, mask)


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors of equal length, one behind the other."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _nibble_vectors(builder: Any, weights: Any, offset: int, count: int) -> list[Any]:
    """For each of the 8 words of a group of 4-bit weights the `count` bytes at `offset` within its 64,
    unpacked."""
    pairs = [
        _nibbles(builder, _bytes(builder, weights, 64 * half + offset, count)) for half in range(_WORDS // 2)
    ]
    return [low for low, _ in pairs] + [high for _, high in pairs]


def _append(lists: list[list[Any]], values: list[Any]) -> None:
    for one, value in zip(lists, values, strict=True):
        one.append(value)


def _neighbours_added(builder: Any, sums: Any) -> Any:
    """Sums of lanes 0 and 1, 2 and 3, ..."""
    count = sums.type.count
    every_other = ir.VectorType(INT32, count // 2)
    even, odd = (ir.Constant(every_other, list(range(first, count, 2))) for first in (0, 1))
    return builder.add(builder.shuffle_vector(sums, sums, even), builder.shuffle_vector(sums, sums, odd))


# --- 8-bit weights, 16-bit activations ----------------------------------------------------------------------
#
# Rounding activations to 8 bits costs SmolLM2 0.34 % of its perplexity, to 12 bits 0.007 %
# (docs/lab/performance.md);
# same instructions. A sum of 32 products, at most 127 * 32512 each, fits into 32 bits.


def _dots8_plain(builder: Any, weights: Any, rows: list[Any], offsets: list[Any]) -> list[Any]:
    """Everywhere: both widened to 32 bits, multiplied, added. On NEON LLVM makes it smlal, which is as good
    as any."""
    wide = ir.VectorType(INT32, 16)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in range(0, 64, 16):  # four outputs
        sums = [ir.Constant(wide, [0] * 16) for _ in rows]
        for number in range(_WORDS):
            vector = builder.sext(_bytes(builder, weights, 64 * number + offset, 16), wide)
            for row, activations in enumerate(rows):
                word = builder.bitcast(
                    copies(builder, _word(builder, activations, number, 16), 4), ir.VectorType(I16, 16)
                )
                sums[row] = builder.add(sums[row], builder.mul(vector, builder.sext(word, wide)))
        _append(parts, sums)
    return [_neighbours_added(builder, _neighbours_added(builder, _joined(builder, part))) for part in parts]


def _dots8_avx2(builder: Any, weights: Any, rows: list[Any], offsets: list[Any]) -> list[Any]:
    """vpmaddwd multiplies 16-bit numbers and adds neighbours: two sums per output, of four outputs in a
    register.

    Two registers of weights at a time share each word of the activations; more would not leave enough for the
    sums.
    """
    kind, room = ir.VectorType(INT32, 8), ir.VectorType(I16, 16)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in (0, 32):
        sums = [[ir.Constant(kind, [0] * 8)] * 2 for _ in rows]
        for number in range(_WORDS):
            places = (64 * number + offset, 64 * number + offset + 16)
            vectors = [builder.sext(_bytes(builder, weights, place, 16), room) for place in places]
            for row, activations in enumerate(rows):
                word = builder.bitcast(copies(builder, _word(builder, activations, number, 16), 4), room)
                products = [
                    call_llvm(builder, "llvm.x86.avx2.pmadd.wd", kind, [vector, word]) for vector in vectors
                ]
                sums[row] = [
                    builder.add(one, product) for one, product in zip(sums[row], products, strict=True)
                ]
        for part, both in zip(parts, sums, strict=True):
            part += both
    return [_neighbours_added(builder, _joined(builder, part)) for part in parts]


def _dots8_vnni(builder: Any, weights: Any, rows: list[Any], offsets: list[Any]) -> list[Any]:
    """vpdpbusd adds four products of unsigned and signed bytes to each 32-bit lane; once for each byte of the
    activations.

    A number is 256 h + l, both signed bytes (`store_words`). Weights become unsigned when 128 is added to
    them; the sums of lower bytes begin with what takes that off again.
    """
    flip = ir.Constant(ir.VectorType(I8, 64), [-128] * 64)
    highs = [ir.Constant(WIDE_I32, [0] * LANES) for _ in rows]
    lows = [copies(builder, load_as(builder, offset, INT32, 4), LANES) for offset in offsets]
    for number in range(_WORDS):
        vector = builder.bitcast(builder.xor(_bytes(builder, weights, 64 * number, 64), flip), WIDE_I32)
        for row, activations in enumerate(rows):
            high, low = (
                copies(builder, _word(builder, activations, place, 8), LANES)
                for place in (number, _WORDS + number)
            )
            highs[row] = call_llvm(builder, _VPDPBUSD, WIDE_I32, [highs[row], vector, high])
            lows[row] = call_llvm(builder, _VPDPBUSD, WIDE_I32, [lows[row], vector, low])
    eight = ir.Constant(WIDE_I32, [8] * LANES)
    return [builder.add(builder.shl(high, eight), low) for high, low in zip(highs, lows, strict=True)]


# --- 4-bit weights, 8-bit activations -----------------------------------------------------------------------


def _dots4_plain(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """Everywhere: each byte widened to 32 bits, multiplied, added."""
    sums = [ir.Constant(WIDE_I32, [0] * LANES) for _ in rows]
    for number, vector in enumerate(_nibble_vectors(builder, weights, 0, 64)):
        wide = builder.bitcast(vector, WIDE_I32)
        for byte in range(4):
            up = ir.Constant(WIDE_I32, [24 - 8 * byte] * LANES)
            down = ir.Constant(WIDE_I32, [24] * LANES)
            a = builder.ashr(builder.shl(wide, up), down)
            for row, activations in enumerate(rows):
                word = copies(builder, _word(builder, activations, number, 8), LANES)
                sums[row] = builder.add(sums[row], builder.mul(a, builder.ashr(builder.shl(word, up), down)))
    return sums


def _dots4_avx2(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits; a whole group fits into
    these."""
    wide, ones = ir.VectorType(I16, 16), _halves(16, 1)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in (0, 32):  # outputs 0 to 7, outputs 8 to 15
        sums = [ir.Constant(wide, [0] * 16) for _ in rows]
        for number, vector in enumerate(_nibble_vectors(builder, weights, offset, 32)):
            for row, activations in enumerate(rows):
                word = builder.bitcast(
                    copies(builder, _word(builder, activations, number, 8), 8), ir.VectorType(I8, 32)
                )
                sums[row] = builder.add(
                    sums[row], call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, [vector, word])
                )
        _append(
            parts,
            [
                call_llvm(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT32, 8), [one, ones])
                for one in sums
            ],
        )
    return [_joined(builder, part) for part in parts]


def _dots4_vnni(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """vpdpbusd adds four products of unsigned and signed bytes to each 32-bit lane."""
    sums = [ir.Constant(WIDE_I32, [0] * LANES) for _ in rows]
    for number, vector in enumerate(_nibble_vectors(builder, weights, 0, 64)):
        vector = builder.bitcast(vector, WIDE_I32)
        for row, activations in enumerate(rows):
            word = copies(builder, _word(builder, activations, number, 8), LANES)
            sums[row] = call_llvm(builder, _VPDPBUSD, WIDE_I32, [sums[row], vector, word])
    return sums


def _dots4_neon(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """sdot adds four products of signed bytes to each of four 32-bit lanes."""
    four, sixteen = ir.VectorType(INT32, 4), ir.VectorType(I8, 16)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in range(0, 64, 16):
        sums = [ir.Constant(four, [0] * 4) for _ in rows]
        for number, vector in enumerate(_nibble_vectors(builder, weights, offset, 16)):
            for row, activations in enumerate(rows):
                word = builder.bitcast(copies(builder, _word(builder, activations, number, 8), 4), sixteen)
                sums[row] = call_llvm(
                    builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, [sums[row], vector, word]
                )
        _append(parts, sums)
    return [_joined(builder, part) for part in parts]


# --- bfloat16 weights ---------------------------------------------------------------------------------------
#
# Two sums per row, of even and of odd pairs: with four rows that is as many as hide how long an instruction t
# activations to bfloat16 is what all others do with such weights; what it costs: docs/lab/performance.md.


def _add_bf16_pairs(builder: Any, weights: Any, words: list[Any], sums: list[Any]) -> list[Any]:
    """vdpbf16ps multiplies pairs of bfloat16 and adds both products to a float32 lane."""
    sums = list(sums)
    for number in range(GROUP // 2):
        vector = builder.bitcast(_bytes(builder, weights, 64 * number, 64), WIDE_I32)
        for row, activations in enumerate(words):
            place = 2 * row + number % 2
            pair = copies(builder, _word(builder, activations, number, 8), LANES)
            sums[place] = call_llvm(
                builder, "llvm.x86.avx512bf16.dpbf16ps.512", WIDE_F32, [sums[place], vector, pair]
            )
    return sums


DOTS8 = (_dots8_plain, _dots8_avx2, _dots8_vnni, _dots8_plain, _dots8_vnni)
DOTS4 = (_dots4_plain, _dots4_avx2, _dots4_vnni, _dots4_neon, _dots4_vnni)
"""By the number of the path; paths.py has their names."""
_SPLIT = (False, False, True, False, True)
"""Whether int16 activations lie as their upper bytes (of a group), then their lower ones."""
ROUNDS_BF16 = (False, False, False, False, True)
"""Whether activations are rounded to bfloat16 before bfloat16 weights."""


@intrinsic
def rounds_bf16(typing: Any, path: Any) -> Any:
    """Whether activations are rounded to bfloat16 for bfloat16 weights on this path; known when it is
    compiled."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(ROUNDS_BF16[path.count]))

    return types.boolean(path), code


@intrinsic
def store_words(typing: Any, path: Any, words: Any, at: Any, half: Any, value: Any) -> Any:
    """Half a group of activations for int8 weights, sixteen results of `simd.rounded`, into the group's 64
    bytes at words[at]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, words, at, half, value = args
        pointer = address_of(context, builder, signature.args[1], words, at)
        value = builder.bitcast(value, WIDE_I32)

        def put(value: Any, bits: int, offset: Any) -> None:
            kind = ir.VectorType(ir.IntType(bits), LANES)
            place = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
            builder.store(builder.trunc(value, kind), place, align=1)

        if _SPLIT[path.count]:
            half_at = builder.mul(half, ir.Constant(I64, LANES))
            upper = builder.add(value, ir.Constant(WIDE_I32, [128] * LANES))  # the lower byte is signed
            put(builder.ashr(upper, ir.Constant(WIDE_I32, [8] * LANES)), 8, half_at)
            put(value, 8, builder.add(half_at, ir.Constant(I64, GROUP)))
        else:
            put(value, 16, builder.mul(half, ir.Constant(I64, 2 * LANES)))
        return context.get_dummy_value()

    return types.none(path, words, types.int64, types.int64, F32), code


@intrinsic
def store_bf16(typing: Any, path: Any, words: Any, at: Any, value: Any) -> Any:
    """Sixteen float32 as bfloat16 to words[at], an array of bytes. Only where `rounds_bf16`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if ROUNDS_BF16[path.count]:
            kind = ir.VectorType(I16, LANES)
            pointer = builder.bitcast(
                address_of(context, builder, signature.args[1], args[1], args[2]), kind.as_pointer()
            )
            builder.store(
                call_llvm(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind, [args[3]]), pointer, align=1
            )
        return context.get_dummy_value()

    return types.none(path, words, types.int64, F32), code


def _pointers(
    context: Any, builder: Any, array_type: Any, array: Any, at: Any, stride: Any, rows: int
) -> list[Any]:
    """Of array[at], array[at + stride], ..."""
    places = [builder.add(at, builder.mul(stride, ir.Constant(I64, row))) for row in range(rows)]
    return [address_of(context, builder, array_type, array, place) for place in places]


def _dots8(rows: int) -> Any:
    result = types.UniTuple(I32, rows)

    def declared(
        typing: Any, path: Any, weights: Any, at: Any, words: Any, offsets: Any, group: Any, groups: Any
    ) -> Any:
        form = DOTS8[
            path.count
        ]  # the path is a tuple whose length is its number: known when this is compiled

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, weights_type, _, words_type, offsets_type, *_ = signature.args
            _, weights, at, words, offsets, group, groups = args
            size = ir.Constant(I64, 2 * GROUP)
            given = _pointers(
                context, builder, words_type, words, builder.mul(group, size), builder.mul(groups, size), rows
            )
            starts = _pointers(context, builder, offsets_type, offsets, group, groups, rows)
            starts = [builder.bitcast(start, INT32.as_pointer()) for start in starts]
            weight = address_of(context, builder, weights_type, weights, at)
            return context.make_tuple(builder, result, form(builder, weight, given, starts))

        return result(path, weights, types.int64, words, offsets, types.int64, types.int64), code

    return intrinsic(declared)


def _dots4(rows: int) -> Any:
    result = types.UniTuple(I32, rows)

    def declared(typing: Any, path: Any, weights: Any, at: Any, words: Any, group: Any, groups: Any) -> Any:
        form = DOTS4[path.count]

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, weights_type, _, words_type, *_ = signature.args
            _, weights, at, words, group, groups = args
            size = ir.Constant(I64, GROUP)
            given = _pointers(
                context, builder, words_type, words, builder.mul(group, size), builder.mul(groups, size), rows
            )
            weight = address_of(context, builder, weights_type, weights, at)
            return context.make_tuple(builder, result, form(builder, weight, given))

        return result(path, weights, types.int64, words, types.int64, types.int64), code

    return intrinsic(declared)


dots8, four_dots8 = _dots8(1), _dots8(4)
"""dots8(path, weights, at, words, offsets, group, groups): for each of 16 outputs the sum of 32 products of
int8 weights (8 vectors of 64 bytes at weights[at]) and int16 activations (the words of a row's group, as
`store_words` leaves them), as a tuple of one vector; four_dots8 of four, for rows that are `groups` groups
apart: weights are unpacked once for all of them. offsets: `offset_of` each group, in float32's place."""
dots4, four_dots4 = _dots4(1), _dots4(4)
"""The same for weights from 0 to 15 and int8 activations: 4 vectors of 64 bytes; vector j holds word j in its
low and word j + 4 in its high bits."""


@intrinsic
def add_bf16(
    typing: Any, path: Any, weights: Any, at: Any, words: Any, group: Any, groups: Any, sums: Any
) -> Any:
    """Add 32 products of bfloat16 weights and activations to the sums, two of each row. Only where
    `rounds_bf16`."""
    rows = sums.count // 2

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, weights_type, _, words_type, *_ = signature.args
        _, weights, at, words, group, groups, sums = args
        if not ROUNDS_BF16[path.count]:
            return sums
        size = ir.Constant(I64, 2 * GROUP)
        given = _pointers(
            context, builder, words_type, words, builder.mul(group, size), builder.mul(groups, size), rows
        )
        weight = address_of(context, builder, weights_type, weights, at)
        values = _add_bf16_pairs(builder, weight, given, cgutils.unpack_tuple(builder, sums, 2 * rows))
        return context.make_tuple(builder, sums_type, values)

    sums_type = sums
    return sums_type(path, weights, types.int64, words, types.int64, types.int64, sums), code
