"""Products of small integers, the one thing for which processors differ too much for LLVM to find the instruction by itself.

There is a form per kind of processor (paths.py) and a plain one that runs everywhere. Integer sums are exact, so all forms give
equal results.

A group is 32 inputs of 16 outputs ("rows" of the weight matrix). Its weights are vectors of 64 bytes, four inputs of each row; the
activations of the group are 8 words of four int8. Every word is multiplied with all rows at once.
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


def _word(builder: Any, pointer: Any, number: int) -> Any:
    return load_as(builder, builder.gep(pointer, [ir.Constant(I64, 4 * number)]), INT32, 4)


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


def _vectors(builder: Any, weights: Any, bits: int, offset: int, count: int) -> list[Any]:
    """For each of the 8 words of a group the `count` weight bytes at `offset` within its 64, unpacked."""
    if bits == 8:
        return [_bytes(builder, weights, 64 * word + offset, count) for word in range(_WORDS)]
    pairs = [_nibbles(builder, _bytes(builder, weights, 64 * half + offset, count)) for half in range(_WORDS // 2)]
    return [low for low, _ in pairs] + [high for _, high in pairs]


def _dots_plain(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """Everywhere: each byte widened to 32 bits, multiplied, added."""
    sums = ir.Constant(WIDE_I32, [0] * LANES)
    for number, vector in enumerate(_vectors(builder, weights, bits, 0, 64)):
        wide = builder.bitcast(vector, WIDE_I32)
        word = copies(builder, _word(builder, activations, number), LANES)
        for byte in range(4):
            up = ir.Constant(WIDE_I32, [24 - 8 * byte] * LANES)
            down = ir.Constant(WIDE_I32, [24] * LANES)
            a = builder.ashr(builder.shl(wide, up), down)
            b = builder.ashr(builder.shl(word, up), down)
            sums = builder.add(sums, builder.mul(a, b))
    return sums


def _dots_avx2(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, which may overflow for 8-bit weights:
    these go in as |x| times w with x's sign, at most 2 * 127 * 127. Sums of 4-bit weights fit into 16 bits for a whole group.
    """
    wide, ones = ir.VectorType(I16, 16), _halves(16, 1)
    eight = ir.VectorType(INT32, 8)

    def in_pairs(a: Any, b: Any) -> Any:
        return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, [a, b])

    def widened(a: Any) -> Any:
        return call_llvm(builder, "llvm.x86.avx2.pmadd.wd", eight, [a, ones])

    parts = []
    for offset in (0, 32):  # rows 0 to 7, rows 8 to 15
        sums = None
        for number, vector in enumerate(_vectors(builder, weights, bits, offset, 32)):
            word = builder.bitcast(copies(builder, _word(builder, activations, number), 8), ir.VectorType(I8, 32))
            if bits == 4:
                products = in_pairs(vector, word)
            else:
                size = call_llvm(builder, "llvm.abs.v32i8", word.type, [word, ir.Constant(ir.IntType(1), 0)])
                signed = call_llvm(builder, "llvm.x86.avx2.psign.b", vector.type, [vector, word])
                products = widened(in_pairs(size, signed))
            sums = products if sums is None else builder.add(sums, products)
        parts.append(widened(sums) if bits == 4 else sums)
    return _joined(builder, parts)


def _dots_vnni(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """vpdpbusd adds four products of unsigned and signed bytes to each 32-bit lane. 8-bit weights become unsigned by
    adding 128, and 128 times the sum of the activations is taken off again."""
    wide = ir.VectorType(I8, 64)
    sums = excess = ir.Constant(WIDE_I32, [0] * LANES)
    for number, vector in enumerate(_vectors(builder, weights, bits, 0, 64)):
        word = builder.bitcast(copies(builder, _word(builder, activations, number), LANES), wide)
        if bits == 8:
            vector = builder.xor(vector, ir.Constant(wide, [-128] * 64))
            offset = ir.Constant(wide, [-128] * 64)  # 128 as an unsigned byte
            excess = call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", WIDE_I32, [excess, offset, word])
        sums = call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", WIDE_I32, [sums, vector, word])
    return builder.sub(sums, excess)


def _dots_neon(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """sdot adds four products of signed bytes to each of four 32-bit lanes."""
    four, sixteen = ir.VectorType(INT32, 4), ir.VectorType(I8, 16)
    parts = []
    for offset in range(0, 64, 16):
        sums = ir.Constant(four, [0] * 4)
        for number, vector in enumerate(_vectors(builder, weights, bits, offset, 16)):
            word = builder.bitcast(copies(builder, _word(builder, activations, number), 4), sixteen)
            sums = call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, [sums, vector, word])
        parts.append(sums)
    return _joined(builder, parts)


DOTS = (_dots_plain, _dots_avx2, _dots_vnni, _dots_neon)
"""By the number of the path; paths.py has their names."""


def _dots(bits: int) -> Any:
    def declared(typing: Any, path: Any, weights: Any, at: Any, activations: Any, word_at: Any) -> Any:
        form = DOTS[path.count]  # the path is a tuple whose length is its number: known when this is compiled

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, weights_type, _, activations_type, _ = signature.args
            weight = address_of(context, builder, weights_type, args[1], args[2])
            activation = address_of(context, builder, activations_type, args[3], args[4])
            return form(builder, weight, activation, bits)

        return I32(path, weights, types.int64, activations, types.int64), code

    return intrinsic(declared)


dots8 = _dots(8)
"""dots8(path, weights, at, activations, word_at): per row the sum of 32 products of int8 weights and int8 activations.
Weights: 8 vectors of 64 bytes. Neither may be -128."""
dots4 = _dots(4)
"""The same for weights from 0 to 15: 4 vectors of 64 bytes; vector j holds word j in its low and word j + 4 in its high bits."""
