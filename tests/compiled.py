"""Compiles the kernels of a decoder layer, and of attention over long spans, for GPUs that need not be there: what the
interpreter takes, a compiler may not. Run without TRITON_INTERPRET; prints how many it compiled."""

import itertools
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from hf_llmopt.kernels.triton import argmax, extend, few, gated, hopper, int_linear, leaders, norm, rotary, wide

CAPABILITIES = (80, 90)
POINTERS = {"slots": "*i64", "where": "*i32", **dict.fromkeys(("best", "spreads", "error"), "*fp32")} | dict.fromkeys(
    ("first", "second", "third"), "*bf16"
)
WORDS = (
    dict.fromkeys(("first", "second", "third"), "*i32")
    | {f"{name}_zeros": "*u8" for name in ("first", "second", "third")}
    | {"words": "*i32"}
)
FLOATS = {"epsilon": "fp32", "query_epsilon": "fp32", "key_epsilon": "fp32", "factor": "fp32", "slack": "fp32"}


def compile_for(capability: int, kernel: Any, warps: int = 4, **constants: Any) -> str:
    """PTX of a kernel. Every pointer is of bfloat16, every number an int32, unless the tables above say otherwise."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        else:
            known = {**POINTERS, **(WORDS if kernel in (int_linear._deep, int_linear._tiles, wide._wide) else {})}
            if constants.get("KIND") == "int8":
                known |= dict.fromkeys(("first", "second", "third"), "*i8")
            if kernel is wide._wide:
                known |= {"x": f"tensordesc<bf16[{constants['BLOCK_M']},128]>"}
            types[name] = known.get(name) or FLOATS.get(name) or ("i32" if name.isupper() else "*bf16")
    early = capability >= 90
    aligned = [at for at, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name == "W"]
    divisible: Any = {(at,): [["tt.divisibility", 16]] for at in aligned} if kernel is wide._wide else {}
    source = ASTSource(kernel, types | {"EARLY": "constexpr"}, {**constants, "EARLY": early}, divisible)
    options = {"num_warps": warps, **({"launch_pdl": True} if early else {})}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def cases() -> Any:
    """Kernels and their constants."""
    yield argmax._parts, {"BLOCK": 2048}
    yield argmax._join, {"BLOCK": 64}
    yield leaders._bounds, {"BLOCK": 2048, "BLOCK_K": 4096, "SPACING": 2**-7}
    for rows, (outputs, inputs, _, stages) in ((1, leaders.SINGLE), (16, leaders.SEVERAL)):
        yield leaders._settle, {
            "EVEN": True, "BLOCK_M": rows, "OUTPUTS": 64, "BLOCK_N": outputs, "BLOCK_K": inputs, "BLOCK_P": 64,
            "STAGES": stages, "SPACING": 2**-7, "TINY": 0.0, "DTYPE": triton.language.bfloat16,
        }  # fmt: skip
    for centre, variant, weight in ((False, 0, {}), (False, 2, {}), (True, 1, {"weight": None, "bias": None})):
        yield norm._norm, {"GROUPS": 1, "WIDTH": 24, "BLOCK": 32, "CENTRE": centre, "VARIANT": variant, **weight}
    for kind, up in itertools.product(("silu", "gelu_tanh", "gelu", "relu2"), ({}, {"up": None})):
        yield gated._gated, {"KIND": kind, "BLOCK": 1024, **up}
    heads = {"HEADS": 4, "KV_HEADS": 2, "KEY_DIM": 64, "VALUE_DIM": 48, "BLOCK_D": 64, "BLOCK_V": 64}
    none = {"query_weight": None, "query_bias": None, "key_weight": None, "key_bias": None}
    for pairs, normed, paged in itertools.product((0, 1, 2), (False, True), (False, True)):
        yield rotary._place, {
            **heads, "ROTATED": 32, "PAIRS": pairs, "EXACT": normed, "QUERY_NORM": normed, "KEY_NORM": normed,
            "CENTRE": False, "VARIANT": 0, **({"query_bias": None, "key_bias": None} if normed else none),
            **({} if paged else {"keys": None, "values": None}),
        }  # fmt: skip
    yield rotary._place, {
        **heads, **none, "ROTATED": 0, "PAIRS": 0, "EXACT": False, "QUERY_NORM": False, "KEY_NORM": False,
        "CENTRE": False, "VARIANT": 0, "cosine": None, "sine": None,
    }  # fmt: skip
    biases = {"first_bias": None, "second_bias": None, "third_bias": None}
    single = {"third": None, "second": None}
    for rows, more in itertools.product(
        (1, 16),
        (
            {"KIND": None, "residual": None, "factor": None},
            {"KIND": None, **biases, **single, "EVEN": True},
            {"KIND": "silu", **biases, "third": None, "residual": None, "factor": None, "EVEN": True},
            {"KIND": "gelu", "third_bias": None, "second_bias": None, **single, "residual": None, "factor": None},
        ),
    ):
        constants = {"EVEN": False, "BLOCK_M": rows, "BLOCK_N": 16, "BLOCK_K": 128, "STAGES": 3}
        yield few._few, {**constants, "DTYPE": triton.language.bfloat16, **more}

    none = {f"{name}_zeros": None for name in ("first", "second", "third")}
    for rows, more in itertools.product(
        (1, 8),
        (
            {"ACTIVATION": None, **none, **biases, "residual": None, "factor": None},
            {"ACTIVATION": "silu", "third": None, "third_scales": None, "third_zeros": None, "third_bias": None},
        ),
    ):
        tile = {"KIND": "int4", "PLANES": 8, "WORDS": 16, "SETS": 1, "EVEN": True, "ASSEMBLY": True}
        constants = {"BLOCK_M": rows, "BLOCK_N": 16, "DEPTH": 4, "STAGES": 3, "DTYPE": triton.language.bfloat16}
        yield int_linear._deep, {**tile, **constants, **more}
    tile = {"KIND": "int4", "PLANES": 8, "WORDS": 16, "SETS": 1, "EVEN": True, "ASSEMBLY": True, "zeros": None}
    constants = {"BLOCK_M": 128, "BLOCK_N": 128, "SPLIT": 2, "STAGES": 3, "DTYPE": triton.language.bfloat16}
    yield int_linear._tiles, {**tile, **constants}


def hopper_cases() -> Any:
    """Kernels, their constants, and their warps, of one kind of GPU."""
    none = {f"{name}_{what}": None for name in ("second", "third") for what in ("scales", "zeros", "bias")}
    single = {**none, "second": None, "third": None, "first_bias": None, "residual": None, "factor": None}
    whole = {"KIND": "int8", "WORDS": 128, "SETS": 1, "SCALED": False, "WHOLE": True, "first_zeros": None}
    groups = {"KIND": "int4", "WORDS": 16, "SETS": 1, "SCALED": True, "WHOLE": False, "first_zeros": None}
    constants = {"BLOCK_M": 128, "STAGES": 3, "DTYPE": triton.language.bfloat16, "ASSEMBLY": True, "DIRECT": True}
    yield wide._wide, {**groups, **constants, **single, "BLOCK_N": 128}, 8
    yield wide._wide, {**groups, **constants, **single, "BLOCK_N": 64, "SCALED": False}, 4
    yield wide._wide, {**groups, **constants, "BLOCK_N": 64, "SETS": 4, "second_zeros": None, "third_zeros": None}, 4
    yield wide._wide, {**whole, **constants, **single, "BLOCK_N": 64}, 4
    biases = {"second_bias": None, "third_bias": None, "residual": None, "factor": None}
    yield wide._join, {"PARTS": 1, "SPLIT": 4, "BLOCK_N": 512, **biases}, 4


def compile_attention(capability: int, kernel: Any, **constants: Any) -> None:
    """Of long spans. Heads lie apart by numbers that are known only at the launch, as those of dense keys do."""
    known = dict.fromkeys(("table", "items", "tiles"), "*i32") | dict.fromkeys(("factor", "cap"), "fp32")
    if kernel is hopper._extend:
        known |= dict.fromkeys(("keys", "values"), f"tensordesc<bf16[128, 128],{gl.NVMMASharedLayout(128, 16)!r}>")
    types, divisible = {}, {}
    for at, name in enumerate(kernel.arg_names):
        types[name] = "constexpr" if name in constants else known.get(name) or ("i32" if name.isupper() else "*bf16")
        if types[name].startswith("*") or name in ("QUERY_TOKEN", "QUERY_HEAD"):
            divisible[at,] = [["tt.divisibility", 16]]
    source = GluonASTSource if kernel is hopper._extend else ASTSource
    triton.compile(source(kernel, types, constants, divisible), target=GPUTarget("cuda", capability, 32))


def attention_cases() -> Any:
    """Capabilities, kernels and their constants."""
    heads = {"KV_HEADS": 8, "GROUP": 4, "PAGE": 1, "KEY_DIM": 128, "VALUE_DIM": 128, "DTYPE": triton.language.bfloat16}
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_V": 128, "STAGES": 3}
    pages = {"KEY_SLOT": 128, "VALUE_SLOT": 128, "KEY_SCALES": 0, "VALUE_SCALES": 0, "FORM": ""}
    none = {"key_scales": None, "value_scales": None, "tree": None}
    for windowed, more in itertools.product((False, True), ({"sinks": None, "cap": None}, {})):
        for capability in CAPABILITIES:
            yield capability, extend._extend, {**heads, **tile, **pages, **none, **more, "WINDOWED": windowed}
        fixed = {"DTYPE": gl.bfloat16, "BLOCK_N": hopper.KEYS, "STAGES": hopper.STAGES, "WINDOWED": windowed}
        yield 90, hopper._extend, {**heads, **fixed, **more}


count = 0
for capability, kernel, constants in attention_cases():
    compile_attention(capability, kernel, **constants)
    count += 1
for capability, (kernel, constants) in itertools.product(CAPABILITIES, cases()):
    compile_for(capability, kernel, **constants)
    count += 1
for kernel, constants, warps in hopper_cases():
    ptx = compile_for(90, kernel, warps, **constants)
    if kernel is wide._wide:
        # Codes are decoded into registers that the tensor cores read: none may be read still when a turn begins.
        assert "wgmma.mma_async" in ptx
        assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"0"}
        assert "st.shared" not in ptx.split("stmatrix")[0], "they reach them without shared memory"
    count += 1
print(count)
