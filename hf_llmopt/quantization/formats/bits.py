"""Codes of a few bits as a dense stream of bits in int32 words.

Eight codes of b bits fill b bytes. They are moved together as one int64, by halves (as in Warren, Hacker's
Delight): twos of codes, then fours, then all eight become neighbours, each time with one shift.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as words: code i of a row fills the bits from `i * bits` on, lowest first, also across words.

    Three bits are no exception: 32 codes fill three words, and codes 10 and 21 straddle two of them.

    Args:
        codes: uint8 `[rows, n]`, each below `2**bits`.
        bits: 1 to 4, or 8; with 5 to 7 a code would be moved onto itself.

    Returns:
        int32 `[rows, ceil(n * bits / 32)]`; what is left of the last word is zero.

    Example:
        >>> import torch
        >>> [hex(word) for word in pack_bits(torch.arange(8, dtype=torch.uint8)[None], 4)[0]]
        ['0x76543210']
    """
    rows, count = codes.shape
    packed = torch.empty(rows, words(count, bits), dtype=torch.int32, device=codes.device)
    for begin, end in _parts(rows, count):
        part = codes[begin:end]
        # 32 codes fill `bits` whole words.
        flat = (torch.nn.functional.pad(part, (0, -count % 32)) if count % 32 else part).reshape(-1)
        eights = (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64)
        for size in (1, 2, 4):
            moved = eights >> size * (8 - bits)
            eights = moved.bitwise_or_(eights).bitwise_and_(_fields(2 * size, bits))
        # The lowest byte stands first, on every machine that torch runs on.
        full = eights.view(torch.uint8).view(-1, 8)[:, :bits].contiguous().view(end - begin, -1).view(torch.int32)
        packed[begin:end] = full[:, : packed.shape[1]]
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row; undoes `pack_bits`.

    Args:
        packed: int32 `[rows, words]`.
        bits: 1 to 4, or 8; with 5 to 7 a code would be moved onto itself.
        count: Codes of a row.

    Returns:
        uint8 `[rows, count]`.

    Example:
        >>> import torch
        >>> unpack_bits(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 7).tolist()
        [[0, 1, 2, 3, 4, 5, 6]]
    """
    rows, padded = packed.shape[0], count + -count % 32
    codes = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    for begin, end in _parts(rows, count):
        part = packed[begin:end]
        if count % 32:
            part = torch.nn.functional.pad(part, (0, words(padded, bits) - part.shape[1]))
        spread = torch.zeros((end - begin) * padded // 8, 8, dtype=torch.uint8, device=packed.device)
        spread[:, :bits] = part.reshape(-1).view(torch.uint8).view(-1, bits)
        eights = spread.view(-1).view(torch.int64)
        for size in (4, 2, 1):
            moved = eights << size * (8 - bits)
            eights = moved.bitwise_or_(eights).bitwise_and_(_fields(size, bits))
        codes[begin:end] = eights.view(torch.uint8).view(end - begin, padded)[:, :count]
    return codes


def _parts(rows: int, count: int) -> Iterator[tuple[int, int]]:
    """Rows that are moved together: what they need in between stays small, and in the cache."""
    step = max(1, 2**20 // count)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _fields(size: int, bits: int) -> int:
    """An int64 whose ones are the low `size * bits` bits of every `size` bytes."""
    field = (1 << size * bits) - 1
    mask = sum(field << place for place in range(0, 64, 8 * size))
    return mask - (1 << 64) if mask >> 63 else mask


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)
