"""The dialects of `quantization_config`: AutoGPTQ, GPTQModel, AutoAWQ, compressed-tensors, fine-grained fp8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import InvalidCheckpoint, UnsupportedQuantization
from . import fields
from .scheme import Scheme

if TYPE_CHECKING:
    from .recipe import Recipe

READABLE = (
    "These can be read: gptq (formats gptq, gptq_v2), awq (versions gemm, gemv), compressed-tensors (pack-quantized, "
    "int-quantized, float-quantized) and fp8 (float8_e4m3fn in blocks)."
)
LINEAR = ("Linear",)


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Recipe` from a `quantization_config`."""
    given = fields.get(config, "quant_method", "a string", lambda value: isinstance(value, str)) or _guessed(config)
    method = str(getattr(given, "value", given)).lower()
    readers = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed, "fp8": _read_fp8}
    if method not in readers:
        raise UnsupportedQuantization(f"Checkpoints of quant_method {method!r} cannot be read. {READABLE}")
    return {"method": method, **readers[method](config)}


def write(recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` of a `Recipe`."""
    writers = {"gptq": _write_gptq, "awq": _write_awq, "compressed-tensors": _write_compressed, "fp8": _write_fp8}
    return {"quant_method": recipe.method, **writers[recipe.method](recipe)}


def _guessed(config: Mapping[str, Any]) -> str:
    """The method of a config that does not name it, as those of the first years."""
    if "config_groups" in config:
        return "compressed-tensors"
    if "w_bit" in config or "zero_point" in config:
        return "awq"
    if "bits" in config:
        return "gptq"
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    raise InvalidCheckpoint(
        f"The quantization_config has no quant_method, only {', '.join(config) or 'nothing'}. "
        f"{fields.REMEDY} {READABLE}"
    )


def _one_of(what: str, given: object, allowed: Mapping[str, str]) -> str:
    """The format that a name stands for."""
    if str(given).lower() not in allowed:
        raise UnsupportedQuantization(f"{what} {given!r} cannot be read. {READABLE}")
    return allowed[str(given).lower()]


# ------------------------------------------------------------------------------------------------------- GPTQ and AWQ


def _read_gptq(config: Mapping[str, Any]) -> dict[str, Any]:
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    stored = "marlin" if fields.flag(config, "is_marlin_format") else stored
    known = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    scheme = flat(_one_of("GPTQ's format", stored, known), config, fields.flag(config, "sym", True))
    name = "modules_in_block_to_quantize"
    only = fields.get(config, name, "a list of names, or of lists of them", _is_nested)
    return _named(scheme, config) | {
        "only": tuple(_flattened(only or ())),
        "head": fields.flag(config, "lm_head"),
        "static_groups": fields.flag(config, "static_groups"),
    }


def _read_awq(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {"gemm": "awq", "gemv": "awq_gemv"}
    stored = config.get("version") or config.get("format") or "gemm"
    scheme = flat(_one_of("AWQ's version", stored, known), config, not fields.flag(config, "zero_point", True))
    return _named(scheme, config)


def flat(stored: str, config: Mapping[str, Any], symmetric: bool) -> Scheme:
    """The scheme of a config that has one for all modules."""
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedQuantization(f"Codes packed in {config['pack_dtype']!r} cannot be read, only in 'int32'.")
    size = fields.size(config, fields.need(config, "group_size", "q_group_size"))
    act_order = fields.flag(config, "desc_act") and size != -1
    return Scheme(stored, fields.bits(config, fields.need(config, "bits", "w_bit")), size, symmetric, act_order)


def _named(scheme: Scheme, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what is quantized."""
    rules = []
    dynamic = fields.mapping(config, "dynamic")
    for pattern in dynamic:
        sign, text = (pattern[:2], pattern[2:]) if pattern[:2] in ("-:", "+:") else ("+:", pattern)
        rules.append(
            (fields.pattern(text), None if sign == "-:" else _changed(scheme, fields.mapping(dynamic, pattern)))
        )
    return {
        "groups": ((LINEAR, scheme),),
        "skipped": fields.names(config, "modules_to_not_convert"),
        "dynamic": tuple(rules),
    }


# What a rule of GPTQModel may change of what is stored: its keys, and those of a scheme.
CHANGES = {"bits": "bits", "group_size": "group_size", "sym": "symmetric", "desc_act": "act_order"}


def _changed(scheme: Scheme, changes: Mapping[str, Any]) -> Scheme:
    """A scheme after a rule; keys that say how it was made are ignored."""
    readers = {"bits": fields.bits, "group_size": fields.size, "sym": fields.flag, "desc_act": fields.flag}
    given = [key for key in changes if key in CHANGES and changes[key] is not None]
    values: dict[str, Any] = {CHANGES[key]: readers[key](changes, key) for key in given}
    changed = replace(scheme, **values)
    return replace(changed, act_order=changed.act_order and changed.group_size != -1)


def _is_nested(names: Any) -> bool:
    return fields.is_list(names) and all(isinstance(name, str) or _is_nested(name) for name in names)


def _flattened(names: Any) -> Iterator[str]:
    """Names in lists of lists."""
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flattened(name)


def _write_gptq(recipe: Recipe) -> dict[str, Any]:
    ((_, scheme),) = recipe.groups
    only = {"modules_in_block_to_quantize": [[name] for name in recipe.only]} if recipe.only else {}
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.act_order,
        "sym": scheme.symmetric,
        "static_groups": recipe.static_groups,
        "lm_head": recipe.head,
        "checkpoint_format": scheme.format,
        **only,
        **_names(recipe),
    }


def _write_awq(recipe: Recipe) -> dict[str, Any]:
    ((_, scheme),) = recipe.groups
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": not scheme.symmetric,
        "version": "gemm" if scheme.format == "awq" else "gemv",
        "modules_to_not_convert": None,
        **_names(recipe),
    }


def _names(recipe: Recipe) -> dict[str, Any]:
    """What `_named` reads."""
    ((_, scheme),) = recipe.groups
    rules = {
        f"-:{pattern}" if changed is None else f"+:{pattern}": {
            key: getattr(changed, field)
            for key, field in CHANGES.items()
            if changed is not None and getattr(changed, field) != getattr(scheme, field)
        }
        for pattern, changed in recipe.dynamic
    }
    skipped = {"modules_to_not_convert": list(recipe.skipped)} if recipe.skipped else {}
    return ({"dynamic": rules} if rules else {}) | skipped


# -------------------------------------------------------------------------------------------------- compressed-tensors

KINDS = {"pack-quantized": "int", "int-quantized": "int", "float-quantized": "float"}  # format: type of its codes


def _read_compressed(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("sparsity_config", "transform_config"):
        inner = fields.mapping(config, name)
        if inner.get("config_groups") or inner.get("format", "dense") != "dense":
            raise UnsupportedQuantization(f"Checkpoints with a {name} cannot be read: {inner}. {READABLE}")
    groups = []
    for name, group in fields.mapping(config, fields.need(config, "config_groups")).items():
        if not isinstance(group, Mapping):
            raise UnsupportedQuantization(f"config_groups names the preset {name!r}; only groups in full can be read.")
        if group.get("weights") is not None:
            stored = group.get("format") or config.get("format")
            targets = tuple(map(_target, fields.names(group, fields.need(group, "targets"))))
            inputs = None if group.get("input_activations") is None else fields.mapping(group, "input_activations")
            groups.append((targets, _compressed_scheme(stored, fields.mapping(group, "weights"), inputs)))
    if not groups:
        raise InvalidCheckpoint(f"The quantization_config has no group with weights. {fields.REMEDY}")
    return {"groups": tuple(groups), "skipped": tuple(map(_target, fields.names(config, "ignore")))}


def _target(target: str) -> str:
    if target.startswith("re:"):
        fields.pattern(target[3:])
    return target


def _compressed_scheme(stored: Any, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    kind = weights.get("type") or "int"
    if stored == "naive-quantized":  # the two plain formats, before they had names of their own
        stored = f"{kind}-quantized"
    name = _one_of("compressed-tensors' format", stored, {name: name for name in KINDS})
    if kind != KINDS[name] or (inputs is not None and fields.bits(inputs, "num_bits", 8) != 8):
        given = f"weights {dict(weights)} and input_activations {inputs}"
        raise UnsupportedQuantization(f"{name} of {given} cannot be read. {READABLE}")
    size, rows = _extent(weights)
    act_order = weights.get("actorder") in ("group", "dynamic")
    symmetric = fields.flag(weights, "symmetric", True)
    return Scheme(name, fields.bits(weights, "num_bits", 8), size, symmetric, act_order, inputs is not None, rows)


def _extent(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Inputs and outputs that share a scale."""
    size = None if weights.get("group_size") is None else fields.size(weights, "group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "block":
        rows, size = _block(weights, fields.need(weights, "block_structure")) or (-1, -1)
        return size, rows
    if strategy == "group":
        return fields.size(weights, fields.need(weights, "group_size")), 1
    if strategy in ("channel", "tensor"):
        return -1, 1 if strategy == "channel" else -1
    raise UnsupportedQuantization(f"compressed-tensors' strategy {strategy!r} cannot be read. {READABLE}")


def _block(config: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Outputs and inputs of the blocks that share a scale."""

    def fits(value: Any) -> bool:
        return fields.is_list(value) and len(value) == 2 and all(fields.is_integer(part) and part > 0 for part in value)

    found = fields.get(config, name, "two positive integers, outputs and inputs of a block, or null", fits)
    return None if found is None else (found[0], found[1])


def _write_compressed(recipe: Recipe) -> dict[str, Any]:
    formats = {scheme.format for _, scheme in recipe.groups}
    groups = {
        f"group_{number}": _compressed_group(targets, scheme) | ({"format": scheme.format} if len(formats) > 1 else {})
        for number, (targets, scheme) in enumerate(recipe.groups)
    }
    return {
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(recipe.skipped),
    }


def _compressed_group(targets: tuple[str, ...], scheme: Scheme) -> dict[str, Any]:
    kind = {"num_bits": scheme.bits, "type": KINDS[scheme.format]}
    size = scheme.group_size
    shared: dict[str, Any] = {"strategy": "token"}
    if scheme.rows > 1:
        extent: dict[str, Any] = {"strategy": "block", "block_structure": [scheme.rows, size]}
        shared = {"strategy": "group", "group_size": size}
    elif size != -1:
        extent = {"strategy": "group", "group_size": size}
    else:
        extent = {"strategy": "tensor" if scheme.rows == -1 else "channel"}
    inputs = {**kind, "num_bits": 8, **shared, "symmetric": True, "dynamic": True} if scheme.activations else None
    order = {"actorder": "group"} if scheme.act_order else {}
    weights = {**kind, **extent, **order, "symmetric": scheme.symmetric, "dynamic": False}
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None}


# ----------------------------------------------------------------------------------------------------- fine-grained fp8


def _read_fp8(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, allowed in (("fmt", ("e4m3",)), ("expert_dtype", ("fp8",)), ("scale_fmt", ("float", "ue8m0"))):
        if (config.get(name) or allowed[0]) not in allowed:
            raise UnsupportedQuantization(f"fp8 with {name}={config[name]!r} cannot be read, only with {allowed}.")
    rows, size = _block(config, "weight_block_size") or (-1, -1)
    skipped = fields.names(config, "modules_to_not_convert") or fields.names(config, "ignored_layers")
    scheme = Scheme("fp8", 8, size, True, activations=True, rows=rows)
    return {"groups": ((LINEAR, scheme),), "skipped": skipped}


def _write_fp8(recipe: Recipe) -> dict[str, Any]:
    ((_, scheme),) = recipe.groups
    return {
        "activation_scheme": "dynamic",
        "weight_block_size": None if scheme.rows == -1 else [scheme.rows, scheme.group_size],
        "modules_to_not_convert": list(recipe.skipped) or None,
    }
