"""Pages of 4 bits in registers.

Byte i of a head holds its elements i and, in the high half, i + width / 2, so 16 bits hold four: nibble j of number r
is element `2 r + j // 2 + j % 2 * width / 2`. Nibbles of equal j are a plane, a quarter of the head. A register of a
tensor core's operand holds two neighbouring numbers of 16 bits, of a key along its width or of values from key to key:
their planes are operands as they are, and no code changes its place.

Keys were multiplied by a Hadamard matrix before they were rounded (`PageFormat`), so queries are too.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLANES = 4


def _assembly(number: str, one: str, base: str, less: str) -> str:
    """Planes `$0` to `$3` of two numbers `$4`: a code in the mantissa of `base` adds itself; `base` and 8 are taken."""
    lines = [".reg .b32 both, one, less;", f"mov.b32 both, $4; mov.b32 one, {one}; mov.b32 less, {less};"]
    for j in range(PLANES):
        lines += ["shr.b32 both, both, 4;"] if j else []
        lines += [f"lop3.b32 ${j}, both, 0x000F000F, {base}, 0xEA; fma.rn.{number} ${j}, ${j}, one, less;"]
    return "{ " + "\n".join(lines) + " }"


_BFLOAT16 = tl.constexpr(_assembly("bf16x2", "0x3F803F80", "0x43004300", "0xC308C308"))  # 128, 136
_FLOAT16 = tl.constexpr(_assembly("f16x2", "0x3C003C00", "0x64006400", "0xE408E408"))  # 1024, 1032


@triton.jit
def numbers(codes, DTYPE: tl.constexpr):
    """The planes of 16-bit numbers, exactly, less 8."""
    if tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _BFLOAT16,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _FLOAT16,
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
def columns(r, j: tl.constexpr, DIM: tl.constexpr):
    """Which elements of a head, 4 DIM wide, numbers r hold in nibble j."""
    return 2 * r + j // 2 + j % 2 * (2 * DIM)


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
def quarter(x, j: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Plane j of heads `[rows, 4 BLOCK_D]` of which 4 DIM columns count, `[rows, BLOCK_D]`; behind DIM 0."""
    r = tl.arange(0, BLOCK_D)[None, :]
    return tl.where(r < DIM, picked(x, tl.minimum(columns(r, j, DIM), 4 * BLOCK_D - 1)), 0.0)
