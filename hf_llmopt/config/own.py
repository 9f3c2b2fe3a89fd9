"""Names of one's own, beside those that come with the package, in four options of the configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import CallbackFailed, InvalidOption, LLMOptError, unknown
from .section import OWN, Section
from .sections import AttentionConfig, KVCacheConfig, QuantizationConfig, SpeculativeConfig

OPTIONS: dict[str, tuple[type[Section], str]] = {  # the option that each kind is a value of
    "attention": (AttentionConfig, "backend"),
    "drafter": (SpeculativeConfig, "method"),
    "eviction": (KVCacheConfig, "eviction"),
    "format": (QuantizationConfig, "format"),
}
FUNCTIONS = ("layout", "pack", "unpack", "obstacle")  # of a format
# `quant_method` and formats of the files that can be read as it is.
FORMATS = (
    "awq",
    "awq_gemv",
    "compressed-tensors",
    "float-quantized",
    "fp8",
    "gptq",
    "gptq_v2",
    "int-quantized",
    "pack-quantized",
)


def register(kind: str, name: str, made: Any) -> None:
    """Give a name to a drafter, an eviction method, an attention kernel or a file format of your own.

    From then on, in this process, configs take the name. A name of yours may be given again, to something else; engines
    that run keep what they have until `model.llmopt.release()`. The guides have a template for each kind.

    Args:
        kind: `"eviction"`: a subclass of `hf_llmopt.kv_cache.eviction.Eviction`, for `KVCacheConfig(eviction=name)`.
            `"drafter"`: called with the model that generates, gives a `hf_llmopt.speculative.Drafter`, for
            `SpeculativeConfig(name)`. `"attention"`: a `hf_llmopt.attention.Attend`, called in every layer, for
            `AttentionConfig(name)`. `"format"`: a `hf_llmopt.quantization.formats.Format`, for files whose
            `quant_method` is the name, and for `QuantizationConfig(format=name)`.
        name: Of your own.
        made: What the kind says.

    Raises:
        InvalidOption: There is no such kind, the name belongs to the package, or what is given cannot be called.

    Example:
        >>> import hf_llmopt
        >>> from hf_llmopt.kv_cache.eviction import Eviction
        >>> hf_llmopt.register("eviction", "everything", Eviction)   # the base class keeps all
        >>> hf_llmopt.KVCacheConfig(eviction="everything")
        KVCacheConfig(eviction='everything')
    """
    if kind not in OPTIONS:
        raise unknown("register: kind", kind, OPTIONS)
    section, option = OPTIONS[kind]
    taken = section.__dataclass_fields__[option].metadata["choices"] + (FORMATS if kind == "format" else ())
    if not isinstance(name, str) or not name or name in taken:
        raise InvalidOption(
            f"register({kind!r}, {name!r}): the name is a text that {section.__name__}({option}=...) does not "
            f"know yet; it knows {', '.join(repr(choice) for choice in taken if choice is not None)}."
        )
    lacking = [part for part in FUNCTIONS if not callable(getattr(made, part, None))]
    if kind == "format" and lacking:
        raise InvalidOption(
            f"register('format', {name!r}) takes a Format, got {type(made).__name__}: it has no function "
            f"{', '.join(lacking)}."
        )
    if kind != "format" and not callable(made):
        raise InvalidOption(f"register({kind!r}, {name!r}) takes what can be called, got {type(made).__name__}.")
    OWN[kind][name] = made


def guarded(kind: str, name: str, what: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function of something registered returns; where it raises, the error says whose it is.

    Raises:
        CallbackFailed: It raised; what it raised is the cause.
    """
    try:
        return function(*args)
    except LLMOptError:
        raise
    except Exception as error:
        raise CallbackFailed(f"{kind} {name!r}: {what} raised {type(error).__name__}: {error}") from error
