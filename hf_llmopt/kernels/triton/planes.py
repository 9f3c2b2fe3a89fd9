"""Codes of quantized pages in registers.

Two bytes of a head are read as one number of 16 bits, which holds two codes of 8 bits or four of 4. Codes that lie at
the same bits of all numbers are a plane, a half or a quarter of the head. With 8 bits plane j holds elements `2 r + j`;
with 4, where byte i holds elements i and i + width / 2, elements `2 r + j // 2 + j % 2 * width / 2`.

A register of a tensor core's operand holds two neighbouring numbers of 16 bits, of a key along its width or of values
from key to key. So planes are operands as they are, and no code changes its place; bytes of values, which lie in
different rows, would have to be gathered one by one.

4-bit keys were multiplied by a Hadamard matrix before they were rounded (`PageFormat`), so queries are too.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLANES = {"": 1, "int8": 2, "fp8": 2, "int4": 4}  # of each format, "": numbers


def _assembly(number: str, shift: int, planes: list[str], constants: dict[str, str]) -> str:
    """Planes, the outputs, of two numbers, the last operand: `both` has a plane's code where that of the first lies."""
    lines = [f".reg .b32 both, a, b, {', '.join(constants)};", f"mov.b32 both, ${len(planes)};"]
    lines += [f"mov.b32 {name}, {value};" for name, value in constants.items()]
    for j, plane in enumerate(planes):
        lines += [f"shr.b32 both, both, {shift};"] if j and shift else []
        lines += [plane.format(out=f"${j}", number=number)]
    return "{ " + "\n".join(lines) + " }"


# A code below 16 in the mantissa of 128 (bfloat16) or 1024 (float16) adds itself; that and 8 are taken away.
_NIBBLE = "lop3.b32 {out}, both, 0x000F000F, base, 0xEA; fma.rn.{number} {out}, {out}, one, less;"
_INT4_BF16 = tl.constexpr(
    _assembly("bf16x2", 4, [_NIBBLE] * 4, {"base": "0x43004300", "one": "0x3F803F80", "less": "0xC308C308"})
)
_INT4_F16 = tl.constexpr(
    _assembly("f16x2", 4, [_NIBBLE] * 4, {"base": "0x64006400", "one": "0x3C003C00", "less": "0xE408E408"})
)
# bfloat16 has no room for 8 bits: the lower 7 beside 128, less 128, or 256 where the sign's bit raises the exponent.
_SIGNED = (
    "lop3.b32 a, both, 0x007F007F, base, 0xEA; lop3.b32 b, both, 0x00800080, base, 0xEA; "
    "fma.rn.{number} {out}, b, minus, a;"
)
_INT8_BF16 = tl.constexpr(_assembly("bf16x2", 8, [_SIGNED] * 2, {"base": "0x43004300", "minus": "0xBF80BF80"}))
_BYTE = "lop3.b32 {out}, both, 0x00FF00FF, base, 0x6A; fma.rn.{number} {out}, {out}, one, less;"
_INT8_F16 = tl.constexpr(
    _assembly("f16x2", 8, [_BYTE] * 2, {"base": "0x64806480", "one": "0x3C003C00", "less": "0xE480E480"})
)
# e4m3: sign, exponent and mantissa where the format has them, times what the biases differ by; "zero" is -0.
_FLOAT8 = (
    "{shift}and.b32 b, a, 0x80008000; shr.b32 a, a, {down}; lop3.b32 a, a, {mask}, b, 0xEA; "
    "fma.rn.{{number}} {{out}}, a, power, zero;"
)


def _float8(down: int, mask: str) -> list[str]:
    return [_FLOAT8.format(shift=s, down=down, mask=mask) for s in ("shl.b32 a, both, 8; ", "mov.b32 a, both; ")]


_FP8_BF16 = tl.constexpr(
    _assembly("bf16x2", 0, _float8(4, "0x07F007F0"), {"power": "0x7B807B80", "zero": "0x80008000"})
)
_FP8_F16 = tl.constexpr(_assembly("f16x2", 0, _float8(1, "0x3F803F80"), {"power": "0x5C005C00", "zero": "0x80008000"}))


@triton.jit
def numbers(codes, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """The planes of 16-bit numbers, exactly; those of 4 bits less 8."""
    if FORM == "int4":
        y = _four(codes, DTYPE)
    elif tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _INT8_BF16 if FORM == "int8" else _FP8_BF16,
            "=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _INT8_F16 if FORM == "int8" else _FP8_F16,
            "=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = codes.to(tl.int32)
        y = (_wide(wide << 24 >> 24, FORM), _wide(wide >> 8, FORM))
    return y


@triton.jit
def _four(codes, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _INT4_BF16,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _INT4_F16,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        y = (
            (codes & 15).to(tl.float32) - 8,
            (codes >> 4 & 15).to(tl.float32) - 8,
            (codes >> 8 & 15).to(tl.float32) - 8,
            (codes >> 12 & 15).to(tl.float32) - 8,
        )
    return y


@triton.jit
def _wide(codes, FORM: tl.constexpr):
    """Codes of 8 bits, sign-extended, as float32."""
    if FORM == "int8":
        y = codes.to(tl.float32)
    else:  # the sign is bit 31, exponent and mantissa end at bit 20
        y = (codes << 20 & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return y


@triton.jit
def columns(r, j: tl.constexpr, DIM: tl.constexpr, FORM: tl.constexpr):
    """Which elements of a head numbers r hold in plane j, of DIM elements."""
    if FORM == "int4":
        d = 2 * r + j // 2 + j % 2 * (2 * DIM)
    else:
        d = 2 * r + j
    return d


@triton.jit
def picked(x, places):
    """Columns of `x` `[rows, columns]`: `places` is `[1, *]`, the same in each row."""
    return tl.gather(x, tl.broadcast_to(places, [x.shape[0], places.shape[1]]), 1)


@triton.jit
def turned(x, DIM: tl.constexpr):
    """`reference.hadamard` of the first DIM columns of `x`, float32 `[rows, columns]`."""
    WIDTH: tl.constexpr = DIM & -DIM
    d = tl.arange(0, x.shape[1])[None, :]
    for bit in tl.static_range(8):
        if 1 << bit < WIDTH:
            other = picked(x, d ^ (1 << bit))
            x = tl.where((d & (1 << bit)) == 0, x + other, other - x)
    return x * (WIDTH**-0.5)


@triton.jit
def plane(x, j: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORM: tl.constexpr):
    """Plane j, of DIM elements, of heads `[rows, planes * BLOCK_D]`: `[rows, BLOCK_D]`, behind DIM 0."""
    r = tl.arange(0, BLOCK_D)[None, :]
    return tl.where(r < DIM, picked(x, tl.minimum(columns(r, j, DIM, FORM), x.shape[1] - 1)), 0.0)
