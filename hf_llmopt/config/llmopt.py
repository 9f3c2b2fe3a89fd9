"""`LLMOptConfig`: everything that `llmopt=` can ask for, in every form of the keyword."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InvalidOption, unknown
from .section import Named, Section, alike, choices_of, short_repr
from .sections import (
    AttentionConfig,
    BatchingConfig,
    KVCacheConfig,
    PromptCacheConfig,
    QuantizationConfig,
    SpeculativeConfig,
)

# The names that `llmopt=` accepts, the section that each switches on, and what it sets there.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kv_cache": ("kv_cache", {}),
    "prompt_cache": ("prompt_cache", {}),
    "flash_attention": ("attention", {}),
    "continuous_batching": ("batching", {}),
    "speculative": ("speculative", {}),
    "int8": ("quantization", {"method": "int8"}),
    "int4": ("quantization", {"method": "int4"}),
    "fp8": ("quantization", {"method": "fp8"}),
    "gptq": ("quantization", {"method": "gptq"}),
    "awq": ("quantization", {"method": "awq"}),
    "smoothquant": ("quantization", {"method": "smoothquant"}),
}
# Names for what a user is after, and what each sets in the sections; part names may stand beside one of them.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "latency": {"prompt_cache": {}, "speculative": {}},
    "throughput": {"prompt_cache": {}, "batching": {}},
    "memory": {"kv_cache": {"dtype": "int8"}},
}
SECTIONS: dict[str, type[Section]] = {
    "kv_cache": KVCacheConfig,
    "prompt_cache": PromptCacheConfig,
    "attention": AttentionConfig,
    "batching": BatchingConfig,
    "speculative": SpeculativeConfig,
    "quantization": QuantizationConfig,
}
OPTIONAL = ("prompt_cache", "quantization", "speculative")  # sections that `None` and `False` switch off


@dataclass(frozen=True)
class LLMOptConfig(Named):
    """Everything that `llmopt=` can ask for.

    Args:
        kv_cache: The paged KV cache, see `KVCacheConfig`.
        prompt_cache: Prompt caching, see `PromptCacheConfig`; `None` and `False` for none.
        attention: How pages are read, see `AttentionConfig`.
        batching: How steps are filled, see `BatchingConfig`.
        quantization: Another number format for weights, see `QuantizationConfig`; `None` and `False` for none. Only
            where a model is loaded or optimized.
        speculative: Speculative decoding, see `SpeculativeConfig`; `None` and `False` for none.
        graphs: Replay passes over spans of up to 16 tokens, and over one prompt, from CUDA graphs. `"auto"` does on a
            GPU where it can, and `Stats` say where not; `True` also refuses where no graph can be recorded.
        batch_invariant: Make a request's tokens independent of its neighbours, bit for bit (CPU only): every product
            and every attention adds in one order, whatever is in the batch. Decoding costs nothing, long prompts do.
        strict: Raise `NotServed` where a call would otherwise run on transformers with a warning, or without guesses
            though `speculative` asks for them.

    Each section also takes `True`, a dict, or a string where it has a main field.

    Attributes:
        exact: Whether the tokens are stock's; else quality is lost, to a bound that the part's page states.

    Raises:
        InvalidOption: An option or value does not exist; the message lists what does.

    Example:
        >>> from hf_llmopt import LLMOptConfig
        >>> LLMOptConfig(kv_cache={"page_size": 32}, attention="sdpa")
        LLMOptConfig(kv_cache=KVCacheConfig(page_size=32), attention=AttentionConfig(backend='sdpa'))
    """

    kv_cache: KVCacheConfig = KVCacheConfig()  # noqa: RUF009 - it is frozen
    prompt_cache: PromptCacheConfig | None = None
    attention: AttentionConfig = AttentionConfig()  # noqa: RUF009 - it is frozen
    batching: BatchingConfig = BatchingConfig(continuous=False)  # noqa: RUF009 - it is frozen
    quantization: QuantizationConfig | None = None
    speculative: SpeculativeConfig | None = None
    graphs: bool | str = "auto"
    batch_invariant: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            value = getattr(self, name)
            off = name in OPTIONAL and (value is None or value is False)
            object.__setattr__(self, name, None if off else section.parse(value))
        if self.batching.continuous is None:  # whoever names the part wants it
            object.__setattr__(self, "batching", replace(self.batching, continuous=True))
        if not any(alike(self.graphs, choice) and self.graphs == choice for choice in ("auto", False, True)):
            raise InvalidOption(f"graphs is 'auto', False or True, got {self.graphs!r}.")
        if self.speculative is not None and self.kv_cache.eviction is not None:
            raise InvalidOption(
                f"eviction={self.kv_cache.eviction!r} and speculative= exclude each other: which tokens are given up "
                "would depend on how many guesses a step computes. Choose one of them."
            )
        for name in ("batch_invariant", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidOption(f"{name} is True or False, got {getattr(self, name)!r}.")

    @property
    def exact(self) -> bool:
        """Whether nothing here gives up quality."""
        return self.quantization is None and self.kv_cache.dtype == "auto" and self.kv_cache.eviction is None

    @classmethod
    def parse(cls, value: Any) -> LLMOptConfig | None:
        """Turn any form of the keyword into a config; `False` and `None` mean no config.

        Args:
            value: `True`, `False`, `None`, a name of a part or preset, names joined by commas, a list of names, a dict
                or a config.

        Raises:
            InvalidOption: The value has another type, or names something that does not exist.
        """
        if value is None or value is False:
            return None
        if isinstance(value, cls):
            return value
        if value is True:  # every part that is exact
            return cls(prompt_cache=PromptCacheConfig())
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")]
        if isinstance(value, Section):
            home = next(name for name, section in SECTIONS.items() if type(value) is section)
            return cls._from_dict({home: value})
        if isinstance(value, Mapping):
            return cls._from_dict(value)
        if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
            return cls._from_names(list(value))
        raise InvalidOption(
            f"llmopt= takes True, False, a name, a list of names, a dict or an LLMOptConfig, got {value!r}."
        )

    @classmethod
    def _from_names(cls, names: list[Any]) -> LLMOptConfig:
        allowed = [*PARTS, *PRESETS]
        if not names:
            raise InvalidOption(f"llmopt= got no name. Allowed: {', '.join(map(repr, allowed))}, True or False.")
        for name in names:
            if isinstance(name, (Mapping, Section)):
                raise InvalidOption(
                    f"llmopt= got {name!r} in a list, which takes names. Use one dict for sections: "
                    '{"kv_cache": True, "attention": "sdpa"}, say.'
                )
            if isinstance(name, str) and name in SECTIONS and name not in PARTS:
                raise InvalidOption(f"{name!r} is a section of a dict: llmopt={{{name!r}: ...}}; it is no part's name.")
            if not isinstance(name, str) or name not in allowed:
                if (place := place_of(name)) is not None:
                    raise InvalidOption(f"{name!r} is no part's name; it belongs into a dict: llmopt={place}.")
                raise unknown("llmopt= option", name, allowed)
        presets = [name for name in dict.fromkeys(names) if name in PRESETS]
        if len(presets) > 1:
            raise InvalidOption(
                f"llmopt= got the presets {' and '.join(map(repr, presets))}, which are for different ends. Choose "
                f"one; parts may be named beside it: {presets[0] + ',prompt_cache'!r}."
            )
        sections: dict[str, dict[str, Any]] = {}
        for name in names:
            section, values = PARTS.get(name, ("", {}))
            for home, options in PRESETS.get(name, {section: values}).items():
                for option, value in options.items():
                    if sections.get(home, {}).get(option, value) != value:
                        raise InvalidOption(
                            f"llmopt= got {names!r}, which ask for two values of {home}.{option}: "
                            f"{sections[home][option]!r} and {value!r}. Choose one of them."
                        )
                sections.setdefault(home, {}).update(options)
        return cls._from_dict(sections)

    @classmethod
    def _from_dict(cls, sections: Mapping[str, Any]) -> LLMOptConfig:
        allowed = [option.name for option in fields(cls)]
        for name in sections:
            if name not in allowed:
                if name in PRESETS or name in PARTS:
                    inside = f" or {{{PARTS[name][0]!r}: {PARTS[name][1] or True}}}" if name in PARTS else ""
                    raise InvalidOption(f"{name!r} is a name, and a dict takes sections: llmopt={name!r}{inside}.")
                if (place := place_of(name)) is not None:
                    raise InvalidOption(f"{name!r} belongs to a section: {place}.")
                raise unknown("llmopt= section", name, allowed)
        return cls(**sections)


def place_of(name: Any) -> str | None:
    """Where in the keyword's dict a name belongs that is an option or a value of one, or `None`.

    Example:
        >>> place_of("sink")
        "{'kv_cache': {'eviction': 'sink'}}"
    """
    if name in (each.name for each in fields(LLMOptConfig)):
        return f"{{{name!r}: ...}}"
    for home, section in SECTIONS.items():
        for option in fields(section):
            if name == option.name:
                return f"{{{home!r}: {{{name!r}: ...}}}}"
            if name not in ("auto", "none") and any(name == each and alike(name, each) for each in choices_of(option)):
                return f"{{{home!r}: {{{option.name!r}: {name!r}}}}}"
    return None


LLMOptConfig.__repr__ = short_repr  # type: ignore[method-assign]
