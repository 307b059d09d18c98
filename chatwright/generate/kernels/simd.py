"""Sixteen numbers at once: the vector instructions that the kernels are written with.

Numba has no vectors of its own. Here a type for sixteen lanes is added and a handful of operations on it,
each a line of LLVM, which turns them into whatever the processor has: one AVX-512 register, two of AVX2, four
of NEON. Only the products of small integers have instructions that LLVM does not find by itself: dots.py.

Arrays are addressed by element; an array of bytes therefore by byte. No bounds are checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

I8, I16, INT32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
WIDE_F32, WIDE_I32 = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)


class _Lanes(types.Type):
    """Sixteen float32 or int32 in registers."""

    def __init__(self, name: str, backend: ir.VectorType) -> None:
        self.backend = backend
        super().__init__(name=name)


F32 = _Lanes("sixteen_float32", WIDE_F32)
I32 = _Lanes("sixteen_int32", WIDE_I32)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.backend)


def address_of(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to array[index]."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.gep(data, [index])


def load_as(builder: Any, pointer: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def copies(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of `lanes` copies of a number."""
    one = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(INT32, 0)
    )
    zeros = ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, one, zeros)


def call_llvm(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


# --- memory -------------------------------------------------------------------------------------------------


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen float32 from array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_as(
            builder, address_of(context, builder, signature.args[0], args[0], args[1]), WIDE_F32, 4
        )

    return F32(array, types.int64), code


@intrinsic
def load_int(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen int32 (or thirty-two bfloat16, two to a lane) from array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_as(
            builder, address_of(context, builder, signature.args[0], args[0], args[1]), WIDE_I32, 2
        )

    return I32(array, types.int64), code


@intrinsic
def load_bf16(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen bfloat16 from array[index] on, as float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        wide = builder.zext(load_as(builder, pointer, ir.VectorType(I16, LANES), 2), WIDE_I32)
        return builder.bitcast(builder.shl(wide, ir.Constant(WIDE_I32, [16] * LANES)), WIDE_F32)

    return F32(array, types.int64), code


@intrinsic
def spread(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen copies of array[index], a float32. `splat(array[index])` would first ask whether the index is
    negative."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        return copies(builder, load_as(builder, pointer, FLOAT, 4), LANES)

    return F32(array, types.int64), code


def _fetching(locality: int) -> Any:
    def declared(typing: Any, array: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(
                address_of(context, builder, signature.args[0], args[0], args[1]), I8.as_pointer()
            )
            numbers = [ir.Constant(INT32, number) for number in (0, locality, 1)]  # to read, how near, data
            call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *numbers])
            return context.get_dummy_value()

        return types.none(array, types.int64), code

    return intrinsic(declared)


fetch_ahead, fetch_nearer = _fetching(3), _fetching(2)
"""Have the cache line of array[index] brought near, `fetch_nearer` not into the first cache; harmless beyond
the array's end."""


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write sixteen float32 to array[index] on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, WIDE_F32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, F32), code


@intrinsic
def read_one(typing: Any, array: Any, index: Any) -> Any:
    """One float32 out of an array of bytes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_as(builder, address_of(context, builder, signature.args[0], args[0], args[1]), FLOAT, 4)

    return types.float32(array, types.int64), code


@intrinsic
def read_one_bf16(typing: Any, array: Any, index: Any) -> Any:
    """One bfloat16 out of an array of bytes, as float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = load_as(builder, address_of(context, builder, signature.args[0], args[0], args[1]), I16, 2)
        return builder.bitcast(builder.shl(builder.zext(half, INT32), ir.Constant(INT32, 16)), FLOAT)

    return types.float32(array, types.int64), code


@intrinsic
def store_one(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one float32 to an array of bytes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32), code


@intrinsic
def store_one_bf16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write one number to an array of bytes as bfloat16, rounded to the nearest, ties to even."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        bits = builder.bitcast(args[2], INT32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(INT32, 0x7FFF)))
        half = builder.trunc(builder.lshr(rounded, ir.Constant(INT32, 16)), I16)
        builder.store(half, builder.bitcast(pointer, I16.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32), code


@intrinsic
def store_rounded8(typing: Any, array: Any, index: Any, rounded: Any) -> Any:
    """Write sixteen results of `rounded` to an array of bytes, as int8."""
    kind = ir.VectorType(I8, LANES)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        builder.store(
            builder.trunc(builder.bitcast(args[2], WIDE_I32), kind),
            builder.bitcast(pointer, kind.as_pointer()),
            align=1,
        )
        return context.get_dummy_value()

    return types.none(array, types.int64, F32), code


@intrinsic
def store_int(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write an int32 into the place of a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address_of(context, builder, signature.args[0], args[0], args[1])
        builder.store(builder.trunc(args[2], INT32), builder.bitcast(pointer, INT32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), code


# --- arithmetic ---------------------------------------------------------------------------------------------


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Sixteen copies of a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return copies(builder, args[0], LANES)

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
    return builder.bitcast(builder.shl(value, ir.Constant(WIDE_I32, [16] * LANES)), WIDE_F32)


def _masked(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.and_(value, ir.Constant(WIDE_I32, [-65536] * LANES)), WIDE_F32)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _scaled_by_power(builder: Any, value: Any, power: Any) -> Any:
    """value * 2^n, where the low bits of `power` (a float32 near 1.5 * 2^23) spell n."""
    shift = builder.shl(builder.bitcast(power, WIDE_I32), ir.Constant(WIDE_I32, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, WIDE_I32), shift), WIDE_F32)


add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2)
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b), 2)
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2)
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b), 2)
larger = _elementwise(_larger, 2)
smaller = _elementwise(_smaller, 2)
fma = _elementwise(lambda builder, *abc: call_llvm(builder, "llvm.fmuladd.v16f32", WIDE_F32, list(abc)), 3)
"""a * b + c"""
even_bf16 = _elementwise(_shifted, 1, kind=I32)
"""The lower bfloat16 of each lane, which is the one at the even address, as float32."""
odd_bf16 = _elementwise(_masked, 1, kind=I32)
"""The upper one."""
to_float = _elementwise(lambda builder, a: builder.sitofp(a, WIDE_F32), 1, kind=I32)
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
        low = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes, 2 * lanes)))
        value = combine(builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high))
    return builder.extract_element(value, ir.Constant(INT32, 0))


@intrinsic
def keep_first(typing: Any, value: Any, count: Any, other: Any) -> Any:
    """The first `count` lanes of `value`, `other` in the rest."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, count, other = args
        lanes = ir.Constant(WIDE_I32, list(range(LANES)))
        inside = builder.icmp_signed("<", lanes, copies(builder, builder.trunc(count, INT32), LANES))
        return builder.select(inside, value, copies(builder, other, LANES))

    return F32(F32, types.int64, types.float32), code


@intrinsic
def drop_first(typing: Any, value: Any, count: Any, other: Any) -> Any:
    """`other` in the first `count` lanes, `value` in the rest."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, count, other = args
        lanes = ir.Constant(WIDE_I32, list(range(LANES)))
        dropped = builder.icmp_signed("<", lanes, copies(builder, builder.trunc(count, INT32), LANES))
        return builder.select(dropped, copies(builder, other, LANES), value)

    return F32(F32, types.int64, types.float32), code


_ROUNDER = np.float32(12_582_912.0)  # 1.5 * 2^23: adding it rounds to a whole number, held in the lowest bits
_PER_LN2, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.4426950408889634),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
_TERMS = tuple(np.float32(1 / n) for n in (720, 120, 24, 6, 2))


@njit(forceinline=True)
def rounded(x):
    """x (within 2^22) rounded to whole numbers, for `store_rounded8`, `dots.store_words` and `unrounded`."""
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


@njit(forceinline=True)
def sigmoid(x):
    """1 / (1 + e^-x)"""
    one = splat(np.float32(1.0))
    return divide(one, add(one, exp(subtract(splat(np.float32(0.0)), x))))


@njit(forceinline=True)
def capped(x, cap):
    """cap tanh(x / cap), as 2 cap sigmoid(2 x / cap) - cap: to about 2e-7 of the cap."""
    bent = sigmoid(multiply(x, splat(np.float32(2.0) / cap)))
    return fma(bent, splat(np.float32(2.0) * cap), splat(-cap))


_ERFC = tuple(np.float32(n) for n in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))


@njit(forceinline=True)
def gelu(x):
    """x Phi(x) (arXiv:1606.08415), as max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, to about 2e-7 of x.

    erfc by Abramowitz and Stegun 1964, eq. 7.1.26.
    """
    size = larger(x, subtract(splat(np.float32(0.0)), x))
    z = multiply(size, splat(np.float32(0.7071067811865476)))
    one = splat(np.float32(1.0))
    t = divide(one, fma(z, splat(np.float32(0.3275911)), one))
    p = splat(_ERFC[0])
    p = fma(p, t, splat(_ERFC[1]))
    p = fma(p, t, splat(_ERFC[2]))
    p = fma(p, t, splat(_ERFC[3]))
    p = fma(p, t, splat(_ERFC[4]))
    tail = multiply(multiply(p, t), exp(subtract(splat(np.float32(0.0)), multiply(z, z))))
    positive = larger(x, splat(np.float32(0.0)))
    return subtract(positive, multiply(multiply(size, splat(np.float32(0.5))), tail))
