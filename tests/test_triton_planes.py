"""The assembly that reads codes of pages, which no interpreter runs: emulated here, instruction by instruction."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from hf_llmopt.kernels.triton import planes

PAIRS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
ASSEMBLY = {
    ("int4", torch.bfloat16): planes._INT4_BF16,
    ("int4", torch.float16): planes._INT4_F16,
    ("int8", torch.bfloat16): planes._INT8_BF16,
    ("int8", torch.float16): planes._INT8_F16,
    ("fp8", torch.bfloat16): planes._FP8_BF16,
    ("fp8", torch.float16): planes._FP8_F16,
}
EVERY = np.arange(1 << 16, dtype=np.uint32)


def halves(words: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Two numbers of each word, float64 `[words, 2]`, the lower half first."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int16).reshape(-1, 2)).view(dtype).double()


def run(text: str, words: np.ndarray, outputs: int) -> list[np.ndarray]:
    """What a block of assembly leaves in its outputs."""
    registers: dict[str, np.ndarray] = {f"${outputs}": words}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(words, int(name, 0))

    for line in text.strip("{ }").replace("\n", " ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, rest = line.split(maxsplit=1)
        target, *given = re.split(r",\s*", rest.strip())
        name, number = operation.split(".")[0], operation.split(".")[-1]
        if name == "lop3":
            a, b, c = (value(each) for each in given[:3])
            found = np.zeros_like(words)
            for row in range(8):
                if int(given[3], 0) >> row & 1:
                    bits = [part if row >> place & 1 else ~part for part, place in ((a, 2), (b, 1), (c, 0))]
                    found |= bits[0] & bits[1] & bits[2]
        elif name == "fma":
            a, b, c = (halves(value(each), PAIRS[number]) for each in given)
            rounded = (a * b + c).to(PAIRS[number])
            found = rounded.view(torch.int16).numpy().reshape(-1).view(np.uint32)
        else:
            sources = [value(each) for each in given]
            found = {
                "mov": lambda a: a,
                "and": lambda a, b: a & b,
                "shr": lambda a, b: a >> b,
                "shl": lambda a, b: a << b,
            }[name](*sources)
        registers[target] = found
    return [registers[f"${j}"] for j in range(outputs)]


def meant(form: str) -> list[torch.Tensor]:
    """The planes of all numbers of 16 bits, float64."""
    if form == "int4":
        return [torch.from_numpy((EVERY >> 4 * j & 15).astype(np.float64)) - 8 for j in range(4)]
    number = torch.int8 if form == "int8" else torch.float8_e4m3fn
    codes = [torch.from_numpy((EVERY >> 8 * j & 255).astype(np.uint8)).view(number) for j in range(2)]
    return [part.double() for part in codes]


@pytest.mark.parametrize(("form", "dtype"), ASSEMBLY, ids=str)
def test_every_code_of_a_plane(form: str, dtype: torch.dtype) -> None:
    """Beside another number in the upper half, in each half."""
    other = EVERY[::-1].copy()
    found = run(ASSEMBLY[form, dtype].value, EVERY | other << 16, planes.PLANES[form])
    assert len(found) == len(meant(form)) == planes.PLANES[form]
    for ours, expected in zip(found, meant(form), strict=True):
        lower, upper = halves(ours, dtype).unbind(1)
        seen = ~expected.isnan()  # no page holds NaN
        assert torch.equal(lower[seen], expected[seen])
        assert torch.equal(upper.flip(0)[seen], expected[seen])
