"""Products of small integers, the one thing for which processors differ too much for LLVM to find the instruction by itself.

There is a form per kind of processor (paths.py) and a plain one that runs everywhere. Integer sums are exact, so all forms give
equal results.

A group is 32 inputs of 16 outputs. Its weights are vectors of 64 bytes, four inputs of each output; the activations of a row (a
token) for the group are 8 words of four whole numbers. Every word is multiplied with the weights of all outputs at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from chatwright.generate.kernels.simd import (
    I8,
    I16,
    I32,
    I64,
    INT32,
    LANES,
    WIDE_I32,
    address_of,
    call_llvm,
    copies,
    load_as,
)

GROUP = 32
_WORDS = GROUP // 4


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
    """For each of the 8 words of a group of 4-bit weights the `count` bytes at `offset` within its 64, unpacked."""
    pairs = [_nibbles(builder, _bytes(builder, weights, 64 * half + offset, count)) for half in range(_WORDS // 2)]
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


# --- 8-bit weights, 16-bit activations --------------------------------------------------------------------------------
#
# Rounding activations to 8 bits costs SmolLM2 0.34 % of its perplexity, to 12 bits 0.007 % (docs/performance.md); 16 take the
# same instructions. A sum of 32 products, at most 127 * 32767 each, fits into 32 bits.


def _dots8_plain(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """Everywhere: both widened to 32 bits, multiplied, added. On NEON LLVM makes it smlal, which is as good as any."""
    wide = ir.VectorType(INT32, 16)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in range(0, 64, 16):  # four outputs
        sums = [ir.Constant(wide, [0] * 16) for _ in rows]
        for number in range(_WORDS):
            vector = builder.sext(_bytes(builder, weights, 64 * number + offset, 16), wide)
            for row, activations in enumerate(rows):
                word = builder.bitcast(copies(builder, _word(builder, activations, number, 16), 4), ir.VectorType(I16, 16))
                sums[row] = builder.add(sums[row], builder.mul(vector, builder.sext(word, wide)))
        _append(parts, sums)
    return [_neighbours_added(builder, _neighbours_added(builder, _joined(builder, part))) for part in parts]


def _dots8_pairs(builder: Any, weights: Any, rows: list[Any], outputs: int, instruction: str) -> list[Any]:
    """vpmaddwd multiplies 16-bit numbers and adds neighbours: two sums per output, of `outputs` in a register.

    Two registers of weights at a time share each word of the activations; more would not leave enough for the sums.
    """
    kind, room = ir.VectorType(INT32, 2 * outputs), ir.VectorType(I16, 4 * outputs)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in range(0, 64, 8 * outputs):
        sums = [[ir.Constant(kind, [0] * 2 * outputs)] * 2 for _ in rows]
        for number in range(_WORDS):
            places = (64 * number + offset, 64 * number + offset + 4 * outputs)
            vectors = [builder.sext(_bytes(builder, weights, place, 4 * outputs), room) for place in places]
            for row, activations in enumerate(rows):
                word = builder.bitcast(copies(builder, _word(builder, activations, number, 16), outputs), room)
                products = [call_llvm(builder, instruction, kind, [vector, word]) for vector in vectors]
                sums[row] = [builder.add(one, product) for one, product in zip(sums[row], products, strict=True)]
        for part, both in zip(parts, sums, strict=True):
            part += both
    return [_neighbours_added(builder, _joined(builder, part)) for part in parts]


def _dots8_avx2(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """256 bits."""
    return _dots8_pairs(builder, weights, rows, 4, "llvm.x86.avx2.pmadd.wd")


def _dots8_vnni(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """512 bits. Where it pays, LLVM adds in the same instruction, vpdpwssd."""
    return _dots8_pairs(builder, weights, rows, 8, "llvm.x86.avx512.pmaddw.d.512")


# --- 4-bit weights, 8-bit activations ---------------------------------------------------------------------------------


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
    """vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits; a whole group fits into these."""
    wide, ones = ir.VectorType(I16, 16), _halves(16, 1)
    parts: list[list[Any]] = [[] for _ in rows]
    for offset in (0, 32):  # outputs 0 to 7, outputs 8 to 15
        sums = [ir.Constant(wide, [0] * 16) for _ in rows]
        for number, vector in enumerate(_nibble_vectors(builder, weights, offset, 32)):
            for row, activations in enumerate(rows):
                word = builder.bitcast(copies(builder, _word(builder, activations, number, 8), 8), ir.VectorType(I8, 32))
                sums[row] = builder.add(sums[row], call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, [vector, word]))
        _append(parts, [call_llvm(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT32, 8), [one, ones]) for one in sums])
    return [_joined(builder, part) for part in parts]


def _dots4_vnni(builder: Any, weights: Any, rows: list[Any]) -> list[Any]:
    """vpdpbusd adds four products of unsigned and signed bytes to each 32-bit lane."""
    sums = [ir.Constant(WIDE_I32, [0] * LANES) for _ in rows]
    for number, vector in enumerate(_nibble_vectors(builder, weights, 0, 64)):
        vector = builder.bitcast(vector, WIDE_I32)
        for row, activations in enumerate(rows):
            word = copies(builder, _word(builder, activations, number, 8), LANES)
            sums[row] = call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", WIDE_I32, [sums[row], vector, word])
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
                sums[row] = call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, [sums[row], vector, word])
        _append(parts, sums)
    return [_joined(builder, part) for part in parts]


DOTS8 = (_dots8_plain, _dots8_avx2, _dots8_vnni, _dots8_plain)
DOTS4 = (_dots4_plain, _dots4_avx2, _dots4_vnni, _dots4_neon)
"""By the number of the path; paths.py has their names."""


def _dots(forms: tuple[Any, ...], rows: int) -> Any:
    def declared(typing: Any, path: Any, weights: Any, at: Any, activations: Any, word_at: Any, stride: Any) -> Any:
        form = forms[path.count]  # the path is a tuple whose length is its number: known when this is compiled
        result = types.UniTuple(I32, rows)

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, weights_type, _, activations_type, *_ = signature.args
            weight = address_of(context, builder, weights_type, args[1], args[2])
            places = [builder.add(args[4], builder.mul(args[5], ir.Constant(I64, row))) for row in range(rows)]
            words = [address_of(context, builder, activations_type, args[3], place) for place in places]
            return context.make_tuple(builder, result, form(builder, weight, words))

        return result(path, weights, types.int64, activations, types.int64, types.int64), code

    return intrinsic(declared)


dots8, four_dots8 = _dots(DOTS8, 1), _dots(DOTS8, 4)
"""dots8(path, weights, at, activations, word_at, stride): for each of 16 outputs the sum of 32 products of int8 weights and int16
activations, as a tuple of one vector; four_dots8 of four, for rows of activations that lie `stride` bytes apart: weights are
unpacked once for all of them. Weights: 8 vectors of 64 bytes."""
dots4, four_dots4 = _dots(DOTS4, 1), _dots(DOTS4, 4)
"""The same for weights from 0 to 15 and int8 activations: 4 vectors of 64 bytes; vector j holds word j in its low and word
j + 4 in its high bits."""
