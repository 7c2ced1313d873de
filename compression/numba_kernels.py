"""The kernels of int8, int4 and onebit, compiled when this is imported. Only `kernels.warm` imports it.

Each does to the bit what the portable path of its codec does, whose module describes it. Loops are written so
that LLVM vectorises them without reordering a float: minima are taken on integers of the same order, rounding
half to even is an addition, sums of codes are integers. Scales are read byte by byte, for data need not be
aligned. All kernels are in one file because numba's cache does not see that a helper in another one changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic
from numpy.typing import NDArray

_F = TypeVar("_F", bound=Callable[..., Any])
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

if getattr(config, "DISABLE_JIT", False) or sys.byteorder != "little":
    raise ImportError("kernels are for little-endian machines, and compiled ones")


def _kernel(result: Any, *arguments: Any) -> Callable[[_F], _F]:
    """Compiled now, for these types; from the cache on disk where there is one."""

    def compiled(function: _F) -> _F:
        try:
            kernel: Any = njit(result(*arguments), nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no folder that can be written, or the disk is full
            kernel = njit(result(*arguments), nogil=True)(function)
        return cast(_F, kernel)

    return compiled


# Without counts of references: each waits for all that is being written past the cache, which took kernels a
# third to two thirds of their time. There are no slices in their loops for the same reason.
_INLINED: dict[str, Any] = {"nogil": True, "forceinline": True, "_nrt": False}


def _inline(function: _F) -> _F:
    return cast(_F, njit(**_INLINED)(function))


def _any_order(function: _F) -> _F:
    """Inlined, its additions in whatever order is fastest: for norms, whose last bits nobody compares."""
    return cast(_F, njit(**_INLINED, fastmath={"reassoc"})(function))


def _generated(function: Callable[..., Any]) -> Any:
    """An instruction that Python has no words for: the function types it and writes LLVM's code."""
    return cast(Any, intrinsic)(function)


_utils: Any = cgutils
ir = _utils.ir  # llvmlite's
_Typed = tuple[Any, Callable[..., Any]]
_LINE = 16  # floats in a line of the cache
_AHEAD = 32 * _LINE


def _pointer(context: Any, builder: Any, to: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


@_generated
def _fetch(_: Any, values: Any, index: Any) -> _Typed:
    """_fetch(values, index): have that line brought into the cache; beyond the end, nothing happens."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number])
        prefetch = _utils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        at = _pointer(context, builder, byte, signature.args[0], *arguments)
        builder.call(prefetch, [at, number(0), number(3), number(1)])  # for reading, all levels, data
        return context.get_dummy_value()

    return types.void(values, index), code


@_generated
def _stream(_: Any, source: Any, i: Any, result: Any, j: Any) -> _Typed:
    """_stream(source, i, result, j): a line of values, written past the cache; result[j] begins a line.

    Other threads see it once this one has let go of a lock, as it does before Python tells them of anything.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, (first, _, second, _) = ir.VectorType(ir.FloatType(), _LINE), signature.args
        values = builder.load(_pointer(context, builder, line, first, *arguments[:2]), align=4)
        at = _pointer(context, builder, line, second, *arguments[2:])
        written = builder.store(values, at, align=4 * _LINE)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(source, i, result, j), code


# Signatures: values in, values out, bytes in, bytes out, numbers.
_VALUES = types.Array(types.float32, 1, "C", readonly=True)
_RESULT = types.float32[::1]
_DATA = types.Array(types.uint8, 1, "C", readonly=True)
_ENCODED = types.uint8[::1]
_INT = types.int64
_VOID, _F32, _F64 = types.void, types.float32, types.float64
# encode(anchor, sent, carried, block, decay, result, remainder): the codes of anchor − sent + carried, and
# what they leave out, times decay; returns the remainder's squared norm (−1: not finite). Empty: not wanted.
_ENCODE = (_F64, _VALUES, _VALUES, _VALUES, _INT, _F32, _ENCODED, _RESULT)
# take(sent, anchor, carried, copy): copy = sent; the squared norm of anchor − sent + carried.
_TAKE = (_F64, _VALUES, _VALUES, _VALUES, _RESULT)
# …_take(sent, anchor, carried, block, copy, result): that, and the codes of it (−1: not finite).
_TAKE_ENCODED = (_F64, _VALUES, _VALUES, _VALUES, _INT, _RESULT, _ENCODED)
# decode(data, block, base, rate, result): base − rate·values; the values themselves where base is empty.
_DECODE = (_VOID, _DATA, _INT, _VALUES, _F32, _RESULT)
# add(data, count, block, first, weight, total): total += weight·values, for the values of the `count` in data
# that begin with block `first`; their squared norm.
_ADD = (_F64, _DATA, _INT, _INT, _INT, _F32, _RESULT)
# copy(source, result): of equal size.
_COPY = (_VOID, _VALUES, _RESULT)

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_SMALLEST = np.float32(np.finfo(np.float32).tiny)
# 1.5 · 2^23: added to a number below 2^22, the sum's last bits are that number, rounded half to even.
_ROUNDER = np.float32(12582912.0)
_ROUNDER_BITS = np.int32(0x4B400000)
_PART = np.float32(1 / 256)
_INVERSE_127 = np.float32(1 / 127)
_INVERSE_RANGE = np.float32(1 / 8.25)
_ZERO, _ONE, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
_SCALE, _CODE, _PADDING = 1, 2, 3  # fused.Fault
_BLOCK = 256  # values copied and squared at a time, and fetched ahead


@_inline
def _at(start: int, i: int) -> Any:
    """The index start + i, which is never counted from the end: unsigned, so that LLVM knows it."""
    return np.uint64(start) + np.uint64(i)


@_inline
def _float(bits: Any) -> np.float32:
    return np.uint32(bits).view(np.float32)


@_inline
def _flushed(bits: Any) -> np.float32:
    """The float of bits; 0 for what is below the smallest normal one, −0 too."""
    value = _float(bits)
    return value if abs(value) >= _SMALLEST else _ZERO


@_inline
def _nearest(value: np.float32) -> np.float32:
    """A float rounded to bfloat16, half to even."""
    bits = np.float32(value).view(np.uint32)
    return _flushed(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    )


@_inline
def _upwards(value: np.float32) -> np.float32:
    """A positive float rounded up to bfloat16."""
    return _flushed((np.float32(value).view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000))


@_inline
def _put_scale(data: Bytes, index: int, value: np.float32) -> None:
    bits = np.float32(value).view(np.uint32)
    data[2 * index] = np.uint8(bits >> np.uint32(16))
    data[2 * index + 1] = np.uint8(bits >> np.uint32(24))


@_inline
def _scale(data: Bytes, index: int) -> np.float32:
    return _float(
        np.uint32(data[2 * index]) << np.uint32(16) | np.uint32(data[2 * index + 1]) << np.uint32(24)
    )


@_inline
def _well_formed(value: np.float32) -> np.bool_:
    """Whether a bfloat16 is +0 or a normal number."""
    bits = np.float32(value).view(np.uint32)
    return bits == np.uint32(0) or (abs(value) >= _SMALLEST and abs(value) < np.inf)


@_inline
def _ordered(bits: np.int32) -> np.int32:
    """Integers in the order of the floats with these bits; its own inverse."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@_inline
def _extremes(bits: Integers, count: int) -> tuple[np.int32, np.int32]:
    """Least and largest of the first values, as ordered integers."""
    low, high = _MAGNITUDE, np.int32(~_MAGNITUDE)
    for i in range(count):
        value = _ordered(bits[i])
        low, high = min(low, value), max(high, value)
    return low, high


@_inline
def _finite(low: np.int32, high: np.int32) -> np.bool_:
    return high < _INFINITY and low > np.int32(~_INFINITY)


@_inline
def _fold(sums: Floats, half: int) -> None:
    for i in range(half):
        sums[i] += sums[i + half]


@_inline
def _near(values: Floats, start: int, count: int) -> None:
    """Ask memory for what comes soon: else it is waited for at every block."""
    for i in range(start + _AHEAD, start + _AHEAD + count, _LINE):
        _fetch(values, i)


@_inline
def _in_lines(result: Floats) -> bool:
    """Whether a line of the cache begins with the first value."""
    return bool(result.ctypes.data % (4 * _LINE) == 0)


@_inline
def _write(x: Floats, first: int, count: int, result: Floats, start: int, in_lines: bool) -> None:
    """result = x[first:][:count] from `start`, a multiple of _LINE, on: past the cache, not needed there."""
    lines = count // _LINE if in_lines else 0
    for i in range(0, lines * _LINE, _LINE):
        _stream(x, first + i, result, start + i)
    for i in range(lines * _LINE, count):
        result[start + i] = x[first + i]


@_inline
def _take_delta(x: Floats, count: int, start: int, anchor: Floats, sent: Floats, carried: Floats) -> None:
    """x[:count] = anchor − sent + carried from `start` on; the last two may be empty."""
    _near(anchor, start, count)
    if sent.size > 0:
        _near(sent, start, count)
        for i in range(count):
            x[i] = anchor[_at(start, i)] - sent[_at(start, i)]
    else:
        for i in range(count):
            x[i] = anchor[_at(start, i)]
    if carried.size > 0:
        _near(carried, start, count)
        for i in range(count):
            x[i] += carried[_at(start, i)]


@_any_order
def _square(x: Floats, count: int) -> float:
    """Σx² of the first values of a block."""
    total = _ZERO
    for i in range(count):
        total += x[i] * x[i]
    return np.float64(total)


@_inline
def _leave(x: Floats, count: int, decoded: Floats, start: int, decay: np.float32, remainder: Floats) -> float:
    """remainder = (x − decoded)·decay from `start` on; its squared norm."""
    for i in range(count):
        decoded[i] = (x[i] - decoded[i]) * decay
        remainder[_at(start, i)] = decoded[i]
    return _square(decoded, count)


@_inline
def _put(x: Floats, count: int, start: int, base: Floats, rate: np.float32, result: Floats) -> None:
    """result = base − rate·x[:count] from `start` on; x itself where `base` is empty."""
    if base.size > 0:
        for i in range(count):
            result[_at(start, i)] = base[_at(start, i)] - np.float32(x[i] * rate)
    else:
        for i in range(count):
            result[_at(start, i)] = x[i]


@_inline
def _int8_put(x: Floats, bits: Integers, count: int, b: int, blocks: int, block: int, result: Bytes) -> bool:
    low_bits, high_bits = _extremes(bits, count)
    if not _finite(low_bits, high_bits):
        return False
    low, high = _float(_ordered(low_bits)), _float(_ordered(high_bits))
    offset = _nearest(low * _HALF + high * _HALF)
    scale = _upwards(max(high - offset, offset - low) * _INVERSE_127)
    if not abs(offset) + np.float32(127.0) * scale < np.inf:
        return False
    _put_scale(result, b, scale)
    _put_scale(result, blocks + b, offset)
    inverse, first = _ONE / scale if scale > _ZERO else _ZERO, 4 * blocks + b * block
    for i in range(count):
        result[_at(first, i)] = np.uint8(np.float32((x[i] - offset) * inverse + _ROUNDER).view(np.uint32))
    return True


@_inline
def _int8_values(data: Bytes, b: int, blocks: int, block: int, x: Floats, count: int) -> None:
    scale, offset, first = _scale(data, b), _scale(data, blocks + b), 4 * blocks + b * block
    for i in range(count):
        x[i] = np.float32(np.int8(data[_at(first, i)])) * scale + offset


@_kernel(*_ENCODE)
def int8_encode(
    anchor: Floats,
    sent: Floats,
    carried: Floats,
    block: int,
    decay: np.float32,
    result: Bytes,
    remainder: Floats,
) -> float:
    blocks, left = -(-anchor.size // block), 0.0
    x, decoded = np.empty(block, np.float32), np.empty(block, np.float32)
    bits = x.view(np.int32)
    for b in range(blocks):
        start, count = b * block, min(block, anchor.size - b * block)
        _take_delta(x, count, start, anchor, sent, carried)
        if not _int8_put(x, bits, count, b, blocks, block, result):
            return -1.0
        if remainder.size > 0:
            _int8_values(result, b, blocks, block, decoded, count)
            left += _leave(x, count, decoded, start, decay, remainder)
    return left


@_kernel(*_TAKE_ENCODED)
def int8_take(
    sent: Floats, anchor: Floats, carried: Floats, block: int, copied: Floats, result: Bytes
) -> float:
    blocks, square, in_lines = -(-sent.size // block), 0.0, _in_lines(copied)
    x = np.empty(block, np.float32)
    bits = x.view(np.int32)
    for b in range(blocks):
        start, count = b * block, min(block, sent.size - b * block)
        _take_delta(x, count, start, anchor, sent, carried)
        if not _int8_put(x, bits, count, b, blocks, block, result):
            return -1.0
        square += _square(x, count)
        _write(sent, start, count, copied, start, in_lines)
    return square


@_kernel(*_TAKE)
def take(sent: Floats, anchor: Floats, carried: Floats, copied: Floats) -> float:
    square, in_lines, x = 0.0, _in_lines(copied), np.empty(_BLOCK, np.float32)
    for start in range(0, sent.size, _BLOCK):
        count = min(_BLOCK, sent.size - start)
        _take_delta(x, count, start, anchor, sent, carried)
        square += _square(x, count)
        _write(sent, start, count, copied, start, in_lines)
    return square


@_kernel(*_COPY)
def copy(source: Floats, result: Floats) -> None:
    lines = source.size // _LINE if _in_lines(result) else 0
    for i in range(0, lines * _LINE, _LINE):
        _fetch(source, i + _AHEAD)
        _stream(source, i, result, i)
    for i in range(lines * _LINE, source.size):
        result[i] = source[i]


@_kernel(_INT, _DATA, _INT, _INT)
def int8_check(data: Bytes, count: int, block: int) -> int:
    blocks = -(-count // block)
    for b in range(blocks):
        scale, offset = _scale(data, b), _scale(data, blocks + b)
        if not (_well_formed(scale) and _well_formed(offset) and scale >= _ZERO):
            return _SCALE
        if not abs(offset) + np.float32(127.0) * scale < np.inf:
            return _SCALE
    codes = data[4 * blocks :].view(np.int8)
    for b in range(blocks):
        least, used = np.int8(0), np.int8(0)
        piece = codes[b * block : (b + 1) * block]
        for i in range(piece.size):
            least, used = min(least, piece[i]), np.int8(used | piece[i])
        if least == -128 or (used != 0 and _scale(data, b) == _ZERO):
            return _CODE
    return 0


@_kernel(*_DECODE)
def int8_decode(data: Bytes, block: int, base: Floats, rate: np.float32, result: Floats) -> None:
    blocks, in_lines = -(-result.size // block), _in_lines(result)
    codes, x = data[4 * blocks :].view(np.int8), np.empty(block, np.float32)
    for b in range(blocks):
        scale, offset = _scale(data, b), _scale(data, blocks + b)
        y, c = result[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        if base.size > 0:
            a = base[b * block : (b + 1) * block]
            for i in range(y.size):
                x[i] = a[i] - np.float32((np.float32(c[i]) * scale + offset) * rate)
            _near(base, b * block, block)
            _write(x, 0, y.size, result, b * block, in_lines)
        else:
            for i in range(y.size):
                y[i] = np.float32(c[i]) * scale + offset


@_kernel(*_ADD)
def int8_add(data: Bytes, count: int, block: int, first: int, weight: np.float32, total: Floats) -> float:
    blocks = -(-count // block)
    codes = data[4 * blocks + first * block :].view(np.int8)
    squares = 0.0
    for b in range(-(-total.size // block)):
        scale, offset = _scale(data, first + b), _scale(data, blocks + first + b)
        x = total[b * block : (b + 1) * block]
        piece = codes[b * block : b * block + x.size]
        sum_1, sum_2 = np.int32(0), np.int32(0)
        for i in range(piece.size):
            code = np.int32(piece[i])
            sum_1, sum_2 = np.int32(sum_1 + code), np.int32(sum_2 + np.int32(code * code))
            x[i] += (np.float32(code) * scale + offset) * weight
        # Σ(o + s·c)² of the block, where only the values' own last rounding is left out.
        o, s = np.float64(offset), np.float64(scale)
        squares += piece.size * o * o + 2.0 * o * s * sum_1 + s * s * sum_2
    return squares


@_inline
def _code4(value: np.float32, inverse: np.float32) -> np.int32:
    code = np.int32(np.float32(value * inverse + _ROUNDER).view(np.int32) - _ROUNDER_BITS)
    return np.int32(min(max(code, np.int32(-8)), np.int32(7)) & np.int32(15))


@_inline
def _int4_put(x: Floats, bits: Integers, count: int, b: int, blocks: int, block: int, result: Bytes) -> bool:
    low_bits, high_bits = _extremes(bits, count)
    if not _finite(low_bits, high_bits):
        return False
    low, high = _float(_ordered(low_bits)), _float(_ordered(high_bits))
    scale = _nearest((high if high >= -low else low) * -_INVERSE_RANGE)
    _put_scale(result, b, scale)
    inverse, first = _ONE / scale if scale != _ZERO else _ZERO, 2 * blocks + b * block // 2
    for i in range(count // 2):
        low4, high4 = _code4(x[2 * i], inverse), _code4(x[2 * i + 1], inverse)
        result[_at(first, i)] = np.uint8(low4 | high4 << np.int32(4))
    if count % 2:
        result[_at(first, count // 2)] = np.uint8(_code4(x[count - 1], inverse))
    return True


@_kernel(_INT, _DATA, _INT, _INT)
def int4_check(data: Bytes, count: int, block: int) -> int:
    blocks = -(-count // block)
    pairs = data[2 * blocks :]
    for b in range(blocks):
        scale = _scale(data, b)
        if not _well_formed(scale) or not abs(np.float32(8.0) * scale) < np.inf:
            return _SCALE
    if count % 2 and pairs[count // 2] >= 16:
        return _PADDING
    for b in range(blocks):
        if _scale(data, b) == _ZERO and pairs[b * block // 2 : (b + 1) * block // 2].any():
            return _CODE
    return 0


@_inline
def _low4(pair: np.uint8) -> np.int32:
    """The first code of a pair."""
    return np.int32((np.int32(pair & np.uint8(15)) ^ np.int32(8)) - np.int32(8))


@_inline
def _high4(pair: np.uint8) -> np.int32:
    return np.int32((np.int32(pair >> np.uint8(4)) ^ np.int32(8)) - np.int32(8))


@_inline
def _int4_values(data: Bytes, b: int, blocks: int, block: int, x: Floats, count: int) -> None:
    scale, first = _scale(data, b), 2 * blocks + b * block // 2
    for i in range(count // 2):
        pair = data[_at(first, i)]
        x[2 * i] = np.float32(_low4(pair)) * scale
        x[2 * i + 1] = np.float32(_high4(pair)) * scale
    if count % 2:
        x[count - 1] = np.float32(_low4(data[_at(first, count // 2)])) * scale


@_kernel(*_ENCODE)
def int4_encode(
    anchor: Floats,
    sent: Floats,
    carried: Floats,
    block: int,
    decay: np.float32,
    result: Bytes,
    remainder: Floats,
) -> float:
    blocks, left = -(-anchor.size // block), 0.0
    x, decoded = np.empty(block, np.float32), np.empty(block, np.float32)
    bits = x.view(np.int32)
    for b in range(blocks):
        start, count = b * block, min(block, anchor.size - b * block)
        _take_delta(x, count, start, anchor, sent, carried)
        if not _int4_put(x, bits, count, b, blocks, block, result):
            return -1.0
        if remainder.size > 0:
            _int4_values(result, b, blocks, block, decoded, count)
            left += _leave(x, count, decoded, start, decay, remainder)
    return left


@_kernel(*_DECODE)
def int4_decode(data: Bytes, block: int, base: Floats, rate: np.float32, result: Floats) -> None:
    blocks, x = -(-result.size // block), np.empty(block, np.float32)
    for b in range(blocks):
        count = min(block, result.size - b * block)
        _int4_values(data, b, blocks, block, x, count)
        _put(x, count, b * block, base, rate, result)


@_kernel(*_ADD)
def int4_add(data: Bytes, count: int, block: int, first: int, weight: np.float32, total: Floats) -> float:
    blocks = -(-count // block)
    squares = 0.0
    for b in range(-(-total.size // block)):
        scale = _scale(data, first + b)
        x, pairs = total[b * block : (b + 1) * block], data[2 * blocks + (first + b) * block // 2 :]
        square = np.int32(0)
        for i in range(x.size // 2):
            low, high = _low4(pairs[i]), _high4(pairs[i])
            square = np.int32(square + np.int32(low * low) + np.int32(high * high))
            x[2 * i] += np.float32(low) * scale * weight
            x[2 * i + 1] += np.float32(high) * scale * weight
        if x.size % 2:
            low = _low4(pairs[x.size // 2])
            square = np.int32(square + low * low)
            x[x.size - 1] += np.float32(low) * scale * weight
        squares += np.float64(scale) * np.float64(scale) * square
    return squares


@_inline
def _mean(x: Floats, sums: Floats) -> np.float32:
    """Mean of 256 |x|, by halves: with constant lengths, each is a few instructions. `sums` is scratch."""
    for i in range(128):
        sums[i] = abs(x[i]) * _PART + abs(x[i + 128]) * _PART
    _fold(sums, 64)
    _fold(sums, 32)
    _fold(sums, 16)
    _fold(sums, 8)
    _fold(sums, 4)
    _fold(sums, 2)
    return np.float32(sums[0] + sums[1])


@_inline
def _onebit_put(x: Floats, count: int, b: int, blocks: int, block: int, sums: Floats, result: Bytes) -> bool:
    """Of a block that is not full, what lies behind x[:count] is overwritten."""
    for i in range(count, block):
        x[i] = _ZERO
    mean = _mean(x, sums)
    if count < block:
        mean *= np.float32(block / count)
    scale = _nearest(mean) if mean < np.inf else mean
    if not scale < np.inf:
        return False
    _put_scale(result, b, scale)
    first = 2 * blocks + b * block // 8
    if scale == _ZERO:
        for j in range(-(-count // 8)):
            result[_at(first, j)] = 0
        return True
    for j in range(count // 8):
        eight = np.uint32(0)
        for place in range(8):
            eight |= np.uint32(x[8 * j + place] < _ZERO) << np.uint32(place)
        result[_at(first, j)] = np.uint8(eight)
    if count % 8:
        rest = np.uint32(0)
        for place in range(count % 8):
            rest |= np.uint32(x[count // 8 * 8 + place] < _ZERO) << np.uint32(place)
        result[_at(first, count // 8)] = np.uint8(rest)
    return True


@_kernel(_INT, _DATA, _INT, _INT)
def onebit_check(data: Bytes, count: int, block: int) -> int:
    blocks = -(-count // block)
    bits = data[2 * blocks :]
    for b in range(blocks):
        scale = _scale(data, b)
        if not _well_formed(scale) or scale < _ZERO:
            return _SCALE
    if count % 8 and bits[count // 8] >> (count % 8):
        return _PADDING
    for b in range(blocks):
        if _scale(data, b) == _ZERO and bits[b * block // 8 : (b + 1) * block // 8].any():
            return _CODE
    return 0


@_inline
def _flipped(magnitude: np.uint32, bits: np.uint8, place: int) -> np.float32:
    """The float with these bits, its sign changed where bit `place` is set."""
    return _float(magnitude ^ (np.uint32(bits) << np.uint32(31 - place) & np.uint32(0x80000000)))


@_inline
def _onebit_values(data: Bytes, b: int, blocks: int, block: int, x: Floats, count: int) -> None:
    magnitude, first = np.float32(_scale(data, b)).view(np.uint32), 2 * blocks + b * block // 8
    for j in range(count // 8):
        for place in range(8):
            x[8 * j + place] = _flipped(magnitude, data[_at(first, j)], place)
    for i in range(count // 8 * 8, count):
        x[i] = _flipped(magnitude, data[_at(first, i // 8)], i % 8)


@_kernel(*_ENCODE)
def onebit_encode(
    anchor: Floats,
    sent: Floats,
    carried: Floats,
    block: int,
    decay: np.float32,
    result: Bytes,
    remainder: Floats,
) -> float:
    blocks, left = -(-anchor.size // block), 0.0
    x, decoded, sums = np.empty(block, np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    for b in range(blocks):
        start, count = b * block, min(block, anchor.size - b * block)
        _take_delta(x, count, start, anchor, sent, carried)
        if not _onebit_put(x, count, b, blocks, block, sums, result):
            return -1.0
        if remainder.size > 0:
            _onebit_values(result, b, blocks, block, decoded, count)
            left += _leave(x, count, decoded, start, decay, remainder)
    return left


@_kernel(*_DECODE)
def onebit_decode(data: Bytes, block: int, base: Floats, rate: np.float32, result: Floats) -> None:
    blocks, x = -(-result.size // block), np.empty(block, np.float32)
    for b in range(blocks):
        count = min(block, result.size - b * block)
        _onebit_values(data, b, blocks, block, x, count)
        _put(x, count, b * block, base, rate, result)


@_kernel(*_ADD)
def onebit_add(data: Bytes, count: int, block: int, first: int, weight: np.float32, total: Floats) -> float:
    blocks = -(-count // block)
    squares = 0.0
    for b in range(-(-total.size // block)):
        scale = _scale(data, first + b)
        # One product for the block: a sign changes nothing in its rounding.
        magnitude = np.float32(scale * weight).view(np.uint32)
        x, bits = total[b * block : (b + 1) * block], data[2 * blocks + (first + b) * block // 8 :]
        for j in range(x.size // 8):
            for place in range(8):
                x[8 * j + place] += _flipped(magnitude, bits[j], place)
        for i in range(x.size // 8 * 8, x.size):
            x[i] += _flipped(magnitude, bits[i // 8], i % 8)
        squares += x.size * np.float64(scale) * np.float64(scale)
    return squares
