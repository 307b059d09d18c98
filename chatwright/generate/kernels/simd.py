"""Sixteen numbers at once: the vector instructions that the kernels are written with.

Numba has no vectors of its own. Here a type for sixteen lanes is added and a handful of operations on it, each a line of
LLVM, which turns them into whatever the processor has: one AVX-512 register, two of AVX2, four of NEON. Only the
products of small integers have instructions that LLVM does not find by itself; `dots8` and `dots4` therefore have a form
per processor (paths.py) and a plain one that runs everywhere. Integer sums are exact, so all forms give equal results.

Arrays are addressed by element; an array of bytes therefore by byte. No bounds are checked.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_I8, _I16, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WIDE_F32, _WIDE_I32 = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


class _Lanes(types.Type):
    """Sixteen float32 or int32 in registers."""

    def __init__(self, name: str, backend: ir.VectorType) -> None:
        self.backend = backend
        super().__init__(name=name)


F32 = _Lanes("sixteen_float32", _WIDE_F32)
I32 = _Lanes("sixteen_int32", _WIDE_I32)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.backend)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to array[index]."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.gep(data, [index])


def _load(builder: Any, pointer: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of `lanes` copies of a number."""
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_I32, 0)
    )
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, one, zeros)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


# --- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen float32 from array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature.args[0], args[0], args[1]), _WIDE_F32, 4)

    return F32(array, types.int64), code


@intrinsic
def load_int(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen int32 (or thirty-two bfloat16, two to a lane) from array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature.args[0], args[0], args[1]), _WIDE_I32, 2)

    return I32(array, types.int64), code


@intrinsic
def load_bf16(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen bfloat16 from array[index] on, as float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        wide = builder.zext(_load(builder, pointer, ir.VectorType(_I16, LANES), 2), _WIDE_I32)
        return builder.bitcast(builder.shl(wide, ir.Constant(_WIDE_I32, [16] * LANES)), _WIDE_F32)

    return F32(array, types.int64), code


@intrinsic
def fetch_ahead(typing: Any, array: Any, index: Any) -> Any:
    """Have the cache line of array[index] brought near; harmless beyond the array's end."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(_address(context, builder, signature.args[0], args[0], args[1]), _I8.as_pointer())
        numbers = [ir.Constant(_I32, number) for number in (0, 3, 1)]  # to read, to keep, data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *numbers])
        return context.get_dummy_value()

    return types.none(array, types.int64), code


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write sixteen float32 to array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, _WIDE_F32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, F32), code


@intrinsic
def read_one(typing: Any, array: Any, index: Any) -> Any:
    """One float32 out of an array of bytes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature.args[0], args[0], args[1]), _FLOAT, 4)

    return types.float32(array, types.int64), code


@intrinsic
def read_one_bf16(typing: Any, array: Any, index: Any) -> Any:
    """One bfloat16 out of an array of bytes, as float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = _load(builder, _address(context, builder, signature.args[0], args[0], args[1]), _I16, 2)
        return builder.bitcast(builder.shl(builder.zext(half, _I32), ir.Constant(_I32, 16)), _FLOAT)

    return types.float32(array, types.int64), code


@intrinsic
def store_one(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one float32 to an array of bytes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, _FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32), code


@intrinsic
def store_one_bf16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one number to an array of bytes as bfloat16, rounded to the nearest, ties to even."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        bits = builder.bitcast(args[2], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        half = builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)
        builder.store(half, builder.bitcast(pointer, _I16.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32), code


@intrinsic
def store_rounded(typing: Any, array: Any, index: Any, rounded: Any) -> Any:
    """Write sixteen results of `rounded` to an array of bytes, as int8."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        kind = ir.VectorType(_I8, LANES)
        value = builder.trunc(builder.bitcast(args[2], _WIDE_I32), kind)
        builder.store(value, builder.bitcast(pointer, kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, F32), code


# --- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Sixteen copies of a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], LANES)

    return F32(types.float32), code


def _elementwise(operation: Any, operands: int, result: Any = F32, kind: Any = F32) -> Any:
    """An intrinsic of `operands` vectors whose code is `operation(builder, *values)`."""

    def declared(typing: Any, *given: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return operation(builder, *args)

        return result(*[kind] * operands), code

    if operands == 1:
        return intrinsic(lambda typing, a: declared(typing, a))
    if operands == 2:
        return intrinsic(lambda typing, a, b: declared(typing, a, b))
    return intrinsic(lambda typing, a, b, c: declared(typing, a, b, c))


def _shifted(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(value, ir.Constant(_WIDE_I32, [16] * LANES)), _WIDE_F32)


def _masked(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.and_(value, ir.Constant(_WIDE_I32, [-65536] * LANES)), _WIDE_F32)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _scaled_by_power(builder: Any, value: Any, power: Any) -> Any:
    """value * 2^n, where the low bits of `power` (a float32 near 1.5 * 2^23) spell n."""
    shift = builder.shl(builder.bitcast(power, _WIDE_I32), ir.Constant(_WIDE_I32, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, _WIDE_I32), shift), _WIDE_F32)


add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2)
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b), 2)
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2)
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b), 2)
larger = _elementwise(_larger, 2)
smaller = _elementwise(_smaller, 2)
fma = _elementwise(lambda builder, *abc: _call(builder, "llvm.fmuladd.v16f32", _WIDE_F32, list(abc)), 3)
"""a * b + c"""
even_bf16 = _elementwise(_shifted, 1, kind=I32)
"""The lower bfloat16 of each lane, which is the one at the even address, as float32."""
odd_bf16 = _elementwise(_masked, 1, kind=I32)
"""The upper one."""
to_float = _elementwise(lambda builder, a: builder.sitofp(a, _WIDE_F32), 1, kind=I32)
_scale_by_power = _elementwise(_scaled_by_power, 2)


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of the sixteen, added in halves."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], lambda a, b: builder.fadd(a, b))

    return types.float32(F32), code


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest of the sixteen."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], lambda a, b: _larger(builder, a, b))

    return types.float32(F32), code


def _folded(builder: Any, value: Any, combine: Any) -> Any:
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes, 2 * lanes)))
        value = combine(builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high))
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def keep_first(typing: Any, value: Any, count: Any, other: Any) -> Any:
    """The first `count` lanes of `value`, `other` in the rest."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, count, other = args
        lanes = ir.Constant(_WIDE_I32, list(range(LANES)))
        inside = builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _I32), LANES))
        return builder.select(inside, value, _splat(builder, other, LANES))

    return F32(F32, types.int64, types.float32), code


_ROUNDER = np.float32(12_582_912.0)  # 1.5 * 2^23: adding it rounds to a whole number, held in the lowest bits
_PER_LN2, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_TERMS = tuple(np.float32(1 / n) for n in (720, 120, 24, 6, 2))


@njit(forceinline=True)
def rounded(x):
    """x (within 2^22) rounded to whole numbers, for `store_rounded` and `unrounded`."""
    return add(x, splat(_ROUNDER))


@njit(forceinline=True)
def unrounded(x):
    """What `rounded` gave, as ordinary numbers."""
    return subtract(x, splat(_ROUNDER))


@njit(forceinline=True)
def exp(x):
    """e^x, to about 2e-7 of its value; x is held within -87 and 88."""
    x = smaller(larger(x, splat(np.float32(-87.0))), splat(np.float32(88.0)))
    power = fma(x, splat(_PER_LN2), splat(_ROUNDER))
    n = subtract(power, splat(_ROUNDER))
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))  # |r| <= ln 2 / 2
    p = splat(_TERMS[0])
    p = fma(p, r, splat(_TERMS[1]))
    p = fma(p, r, splat(_TERMS[2]))
    p = fma(p, r, splat(_TERMS[3]))
    p = fma(p, r, splat(_TERMS[4]))
    p = fma(p, r, splat(np.float32(1.0)))
    p = fma(p, r, splat(np.float32(1.0)))
    return _scale_by_power(p, power)


# --- products of small integers --------------------------------------------------------------------------------------
# A group is 32 inputs of 16 outputs ("rows" of the weight matrix). Its weights are vectors of 64 bytes, four inputs of
# each row; the activations of the group are 8 words of four int8. Every word is multiplied with all rows at once.

GROUP = 32
_WORDS = GROUP // 4


def _word(builder: Any, pointer: Any, number: int) -> Any:
    return _load(builder, builder.gep(pointer, [ir.Constant(_I64, 4 * number)]), _I32, 4)


def _bytes(builder: Any, pointer: Any, offset: int, count: int) -> Any:
    return _load(builder, builder.gep(pointer, [ir.Constant(_I64, offset)]), ir.VectorType(_I8, count), 1)


def _halves(count: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I16, count), [value] * count)


def _nibbles(builder: Any, packed: Any) -> tuple[Any, Any]:
    """The low and the high four bits of each byte, as bytes 0 to 15."""
    count = packed.type.count
    mask = ir.Constant(packed.type, [15] * count)
    wide = builder.bitcast(packed, ir.VectorType(_I16, count // 2))
    high = builder.bitcast(builder.lshr(wide, _halves(count // 2, 4)), packed.type)
    return builder.and_(packed, mask), builder.and_(high, mask)


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors of equal length, one behind the other."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
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
    sums = ir.Constant(_WIDE_I32, [0] * LANES)
    for number, vector in enumerate(_vectors(builder, weights, bits, 0, 64)):
        wide = builder.bitcast(vector, _WIDE_I32)
        word = _splat(builder, _word(builder, activations, number), LANES)
        for byte in range(4):
            up = ir.Constant(_WIDE_I32, [24 - 8 * byte] * LANES)
            down = ir.Constant(_WIDE_I32, [24] * LANES)
            a = builder.ashr(builder.shl(wide, up), down)
            b = builder.ashr(builder.shl(word, up), down)
            sums = builder.add(sums, builder.mul(a, b))
    return sums


def _dots_avx2(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, which may overflow for 8-bit weights:
    these go in as |x| times w with x's sign, at most 2 * 127 * 127. Sums of 4-bit weights fit into 16 bits for a whole group.
    """
    wide, ones = ir.VectorType(_I16, 16), _halves(16, 1)
    eight = ir.VectorType(_I32, 8)

    def in_pairs(a: Any, b: Any) -> Any:
        return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, [a, b])

    def widened(a: Any) -> Any:
        return _call(builder, "llvm.x86.avx2.pmadd.wd", eight, [a, ones])

    parts = []
    for offset in (0, 32):  # rows 0 to 7, rows 8 to 15
        sums = None
        for number, vector in enumerate(_vectors(builder, weights, bits, offset, 32)):
            word = builder.bitcast(_splat(builder, _word(builder, activations, number), 8), ir.VectorType(_I8, 32))
            if bits == 4:
                products = in_pairs(vector, word)
            else:
                size = _call(builder, "llvm.abs.v32i8", word.type, [word, ir.Constant(ir.IntType(1), 0)])
                signed = _call(builder, "llvm.x86.avx2.psign.b", vector.type, [vector, word])
                products = widened(in_pairs(size, signed))
            sums = products if sums is None else builder.add(sums, products)
        parts.append(widened(sums) if bits == 4 else sums)
    return _joined(builder, parts)


def _dots_vnni(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """vpdpbusd adds four products of unsigned and signed bytes to each 32-bit lane. 8-bit weights become unsigned by
    adding 128, and 128 times the sum of the activations is taken off again."""
    wide = ir.VectorType(_I8, 64)
    sums = excess = ir.Constant(_WIDE_I32, [0] * LANES)
    for number, vector in enumerate(_vectors(builder, weights, bits, 0, 64)):
        word = builder.bitcast(_splat(builder, _word(builder, activations, number), LANES), wide)
        if bits == 8:
            vector = builder.xor(vector, ir.Constant(wide, [-128] * 64))
            offset = ir.Constant(wide, [-128] * 64)  # 128 as an unsigned byte
            excess = _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WIDE_I32, [excess, offset, word])
        sums = _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WIDE_I32, [sums, vector, word])
    return builder.sub(sums, excess)


def _dots_neon(builder: Any, weights: Any, activations: Any, bits: int) -> Any:
    """sdot adds four products of signed bytes to each of four 32-bit lanes."""
    four, sixteen = ir.VectorType(_I32, 4), ir.VectorType(_I8, 16)
    parts = []
    for offset in range(0, 64, 16):
        sums = ir.Constant(four, [0] * 4)
        for number, vector in enumerate(_vectors(builder, weights, bits, offset, 16)):
            word = builder.bitcast(_splat(builder, _word(builder, activations, number), 4), sixteen)
            sums = _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four, [sums, vector, word])
        parts.append(sums)
    return _joined(builder, parts)


DOTS = (_dots_plain, _dots_avx2, _dots_vnni, _dots_neon)
"""By the number of the path; paths.py has their names."""


def _dots(bits: int) -> Any:
    def declared(typing: Any, path: Any, weights: Any, at: Any, activations: Any, word_at: Any) -> Any:
        form = DOTS[path.count]  # the path is a tuple whose length is its number: known when this is compiled

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, weights_type, _, activations_type, _ = signature.args
            weight = _address(context, builder, weights_type, args[1], args[2])
            activation = _address(context, builder, activations_type, args[3], args[4])
            return form(builder, weight, activation, bits)

        return I32(path, weights, types.int64, activations, types.int64), code

    return intrinsic(declared)


dots8 = _dots(8)
"""dots8(path, weights, at, activations, word_at): per row the sum of 32 products of int8 weights and int8 activations.
Weights: 8 vectors of 64 bytes. Neither may be -128."""
dots4 = _dots(4)
"""The same for weights from 0 to 15: 4 vectors of 64 bytes; vector j holds word j in its low and word j + 4 in its high bits."""


# --- threads ---------------------------------------------------------------------------------------------------------


@intrinsic
def atomic_read(typing: Any, array: Any, index: Any) -> Any:
    """array[index] of an int64 array, as other threads left it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(array, types.int64), code


@intrinsic
def atomic_write(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Set array[index] once everything written before is seen by who reads it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, ordering="release", align=8)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), code


@intrinsic
def atomic_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index]; the value before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], ordering="seq_cst")

    return types.int64(array, types.int64, types.int64), code


@intrinsic
def pause(typing: Any) -> Any:
    """A hint that this thread waits in a loop."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith(("x86", "i686")):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif triple.startswith(("aarch64", "arm64")):
            _call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.none(), code


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have the processor, for when there are fewer processors than threads."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            _call(builder, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.none(), code


_ARRIVED, _ROUND = 0, 16  # places in `sync`, on cache lines of their own
SYNC_SIZE = 32
_PATIENCE = 4_000  # turns of the waiting loop before the processor is offered to others


@njit(forceinline=True)
def meet(sync, threads):
    """Wait here until all threads have come."""
    if threads == 1:
        return
    current = atomic_read(sync, _ROUND)
    if atomic_add(sync, _ARRIVED, 1) == threads - 1:
        atomic_write(sync, _ARRIVED, 0)
        atomic_write(sync, _ROUND, current + 1)
        return
    turns = 0
    while atomic_read(sync, _ROUND) == current:
        pause()
        turns += 1
        if turns > _PATIENCE:
            give_way()
