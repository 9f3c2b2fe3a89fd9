"""Which modules of a checkpoint are quantized, and how: what `quantization_config` in config.json says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...config import OWN
from . import configs, own
from .scheme import Scheme


@dataclass(frozen=True)
class Recipe:
    """Which modules are quantized, and how.

    Args:
        method: The `quant_method` of config.json: `"gptq"`, `"awq"`, `"compressed-tensors"`, `"fp8"`, or a name of
            `hf_llmopt.register`.
        groups: Names of what is quantized (compressed-tensors: a class, a module, or `re:` and a regular expression),
            and the scheme. Others have one group.
        skipped: Names of what is not: as targets for compressed-tensors, parts of names for GPTQ and AWQ, parts between
            dots for others.
        dynamic: GPTQModel's rules, regular expressions that match from the start; the first that does decides, `None`
            for not quantized.
        only: Ends of names that are quantized, and no others; empty for all.
        head: The output head is quantized too.
        static_groups: The groups were chosen before inputs were put in order, so that act-order left no trace in them.

    Example:
        >>> from torch import nn
        >>> recipe = Recipe.from_dict({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True})
        >>> recipe.scheme_of("model.layers.0.mlp.up_proj", nn.Linear(64, 64))
        Scheme(format='awq', bits=4, group_size=64, symmetric=False, act_order=False, activations=False, rows=1)
        >>> recipe.scheme_of("lm_head", nn.Linear(64, 64)) is None
        True
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    skipped: tuple[str, ...] = ()
    dynamic: tuple[tuple[str, Scheme | None], ...] = ()
    only: tuple[str, ...] = ()
    head: bool = False
    static_groups: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Recipe:
        """Read the `quantization_config` of a config.json, or AutoGPTQ's quantize_config.json.

        Args:
            config: The dict; keys that say how it was made, not what is stored, are ignored.

        Raises:
            InvalidCheckpoint: It lacks a key, or contradicts itself.
            UnsupportedQuantization: It asks for a format that cannot be read; the message says which can.
        """
        registered = config.get("quant_method") in list(OWN["format"])  # of a list, since what is given may be anything
        return cls(**(own if registered else configs).read(config))

    def to_dict(self) -> dict[str, Any]:
        """The entry for config.json, with the keys that other readers know and no others.

        Example:
            >>> recipe = Recipe.for_method("gptq", bits=4, group_size=128, symmetric=True)
            >>> Recipe.from_dict(recipe.to_dict()) == recipe
            True
        """
        return own.write(self) if self.method in OWN["format"] else configs.write(self)

    @classmethod
    def for_method(
        cls,
        method: str,
        bits: int,
        group_size: int,
        symmetric: bool,
        act_order: bool = False,
        skipped: Iterable[str] = (),
        own_format: str | None = None,
    ) -> Recipe:
        """What we write for a method: the format that most readers know and that can hold its codes.

        `fp8` is written as `float-quantized`, `smoothquant` and `int8` without groups as `int-quantized`. For others
        the codes decide: symmetric ones are GPTQ version 1, those of four bits AWQ GEMM, the rest `pack-quantized`.

        Args:
            method: As `QuantizationConfig.method` has it.
            bits: Of a code.
            group_size: Inputs that share a scale; -1 for all.
            symmetric: No zeros.
            act_order: GPTQ put the inputs in order. With static groups, so that the file does not show it.
            skipped: Full names of the linear layers that are not quantized, the output head among them.
            own_format: A registered one that is to be written, whatever the method.

        Example:
            >>> Recipe.for_method("awq", bits=4, group_size=128, symmetric=False).to_dict()["version"]
            'gemm'
        """
        names = tuple(skipped)
        if own_format is not None:
            return cls(own_format, ((configs.LINEAR, Scheme(own_format, bits, group_size, symmetric)),), names)
        if method == "fp8":
            scheme = Scheme("float-quantized", 8, group_size, True, activations=True)
        elif method == "smoothquant" or (method == "int8" and group_size == -1):
            scheme = Scheme("int-quantized", 8, group_size, symmetric, activations=True)
        elif symmetric:
            rules = tuple((f"^{re.escape(name)}$", None) for name in names if in_block(name))
            scheme = Scheme("gptq", bits, group_size, True)
            return cls("gptq", ((configs.LINEAR, scheme),), dynamic=rules, static_groups=act_order and method == "gptq")
        elif bits == 4:
            return cls("awq", ((configs.LINEAR, Scheme("awq", 4, group_size, False)),), names)
        else:
            scheme = Scheme("pack-quantized", bits, group_size, False)
        return cls("compressed-tensors", ((configs.LINEAR, scheme),), names)

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """How a module is stored, or `None` where it is not quantized.

        GPTQ, AWQ and fp8 quantize linear layers in numbered blocks (`model.layers.0.…`), the head only where it is
        said.

        Args:
            name: Full name of the module.
            module: The module, or one of the class that it will have.
        """
        classes = {base.__name__ for base in type(module).__mro__}
        if self.method == "compressed-tensors":
            if any(_targets(name, classes, target) for target in self.skipped):
                return None
            # Names are more specific than regular expressions, and those than classes.
            ranked = [(_targets(name, classes, t), scheme) for targets, scheme in self.groups for t in targets]
            found = [(rank, scheme) for rank, scheme in ranked if rank]
            return min(found, key=lambda ranked: ranked[0])[1] if found else None
        head = name.rpartition(".")[2] == "lm_head"
        if not classes & {"Linear", "Conv1D"} or not (self.head if head else in_block(name)):
            return None
        for pattern, scheme in self.dynamic:
            if re.match(pattern, name):
                return scheme
        dotted = f".{name}."
        if any(part in name if self.method in ("gptq", "awq") else f".{part}." in dotted for part in self.skipped):
            return None
        if self.only and not head and not any(dotted.endswith(f".{end}.") for end in self.only):
            return None
        return self.groups[0][1]


def in_block(name: str) -> bool:
    """Whether a module stands in a numbered block.

    Example:
        >>> in_block("model.layers.0.mlp.up_proj"), in_block("lm_head")
        (True, False)
    """
    return any(part.isdecimal() for part in name.split("."))


def _targets(name: str, classes: set[str], target: str) -> int:
    """How a target of compressed-tensors names a module: 1 by name, 2 by regular expression, 3 by class, 0 not."""
    if target.startswith("re:"):
        return 2 if re.match(target[3:], name) else 0
    return 1 if target == name else 3 if target in classes else 0
