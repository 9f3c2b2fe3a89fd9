"""Where the codes of a weight lie, and how kernels read them back as numbers.

4-bit codes (2 and 3 bits are stored as 4) lie in int32 words `[outputs, blocks * 16]`, a block for 128 inputs: nibble
j of word r is input `128 * block + 16 * j + r`. So nibbles of equal j in neighbouring words are neighbouring inputs: 16
words give 8 tiles `[outputs, 16]`, as deep as a tensor core's step, and no bit moves between threads. 8-bit codes lie
in their natural order, `[outputs, inputs]`, less 128 as int8, or as the bits of float8_e4m3fn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

WORDS, PLANES = 16, 8  # of a block of 4-bit codes
BLOCK = WORDS * PLANES


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 `[outputs, inputs]`, as int32 words `[outputs, ceil(inputs / 128) * 16]`.

    Example:
        >>> import torch
        >>> hex(pack_nibbles(torch.arange(128, dtype=torch.uint8)[None] // 16)[0, 5].item())
        '0x76543210'
    """
    outputs, inputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -inputs % BLOCK), value=8)  # 8 is the number 0
    planes = padded.view(outputs, -1, PLANES, WORDS)
    words = torch.zeros(outputs, planes.shape[1], WORDS, dtype=torch.int32, device=codes.device)
    for j in range(PLANES):
        words |= planes[:, :, j].int() << (4 * j)
    return words.flatten(1)


def unpack_nibbles(words: Tensor, inputs: int) -> Tensor:
    """The codes that `pack_nibbles` packed."""
    blocks = words.unflatten(1, (-1, 1, WORDS))
    shifts = torch.arange(0, 4 * PLANES, 4, dtype=torch.int32, device=words.device)
    return (blocks >> shifts[:, None] & 15).to(torch.uint8).flatten(1)[:, :inputs].contiguous()


@triton.jit
def number(words, j: tl.constexpr, KIND: tl.constexpr):
    """Plane j of words as float32, less 8 or 128: a nibble at bit b of the mantissa of `2**(23 - b)` adds itself."""
    if KIND == "int4":
        BIT: tl.constexpr = 4 * j if j < 5 else 4 * j - 12
        if j >= 5:
            words = words >> 12
        biased = (words & (15 << BIT)) | ((150 - BIT) << 23)
        y = biased.to(tl.float32, bitcast=True) - ((1 << (23 - BIT)) + 8)
    elif KIND == "int8":
        y = words.to(tl.float32)
    else:  # e4m3: sign, exponent and mantissa where float32 has them; the exponents' biases differ by 120
        y = ((words.to(tl.int32) << 20) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return y


def _assembly(number: str, one: str, base: str, less: str) -> str:
    """Eight planes of two words, `$8` and `$9`, as pairs of 16-bit numbers `$0` to `$7`."""
    lines = [".reg .b32 half<2>, t, one, less;", f"mov.b32 one, {one}; mov.b32 less, {less};"]
    lines += ["prmt.b32 half0, $8, $9, 0x5410; prmt.b32 half1, $8, $9, 0x7632;"]
    for j in range(PLANES):
        half = f"half{j // 4}"
        lines += [f"shr.b32 {half}, {half}, 4;"] if j % 4 else []
        lines += [f"lop3.b32 t, {half}, 0x000F000F, {base}, 0xEA; fma.rn.{number} ${j}, t, one, less;"]
    return "{ " + "\n".join(lines) + " }"


# A nibble at bit 0 of the mantissa of 128 (bfloat16) or 1024 (float16) adds itself; 136 or 1032 is subtracted.
_BFLOAT16 = tl.constexpr(_assembly("bf16x2", "0x3F803F80", "0x43004300", "0xC308C308"))
_FLOAT16 = tl.constexpr(_assembly("f16x2", "0x3C003C00", "0x64006400", "0xE408E408"))


@triton.jit
def planes_of(words, KIND: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """All planes of words as numbers of a format, exactly, less 8 or 128.

    Assembly decodes two words at once, three instructions for two codes: the compiler would take seven.
    """
    if ASSEMBLY and tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            _BFLOAT16,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [words],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=2,
        )
    elif ASSEMBLY:
        y = tl.inline_asm_elementwise(
            _FLOAT16,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif KIND == "int4":
        y = (
            number(words, 0, KIND).to(DTYPE),
            number(words, 1, KIND).to(DTYPE),
            number(words, 2, KIND).to(DTYPE),
            number(words, 3, KIND).to(DTYPE),
            number(words, 4, KIND).to(DTYPE),
            number(words, 5, KIND).to(DTYPE),
            number(words, 6, KIND).to(DTYPE),
            number(words, 7, KIND).to(DTYPE),
        )
    else:
        y = (number(words, 0, KIND).to(DTYPE),)
    return y
