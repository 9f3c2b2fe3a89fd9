"""Which quantizer a model has that is being loaded, and which models can be quantized at all.

transformers asks one function, `get_hf_quantizer`. Inside `from_pretrained(llmopt=...)` our answer takes the place of
its own (`hooks.py`): for files in a format of ours, and where a method is asked for that sees only the weights, which
are then quantized one tensor at a time as they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationMethod

from ..config import CALIBRATED, LLMOptConfig, QuantizationConfig
from ..errors import InvalidCheckpoint, UnsupportedQuantization
from .experts import can_unfuse
from .formats import Recipe
from .formats.fields import REMEDY
from .product import is_offloaded
from .quantizer import Quantizer, WeightConfig

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")  # the quant_method of files that we read
LOADING: ContextVar[LLMOptConfig | None] = ContextVar("hf_llmopt_loading", default=None)


def answering(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `get_hf_quantizer`, with our answer while a model is loaded with `llmopt=`."""

    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, *args: Any, gguf_file: Any = None, **kwargs: Any
    ) -> Any:
        asked = LOADING.get()
        ours = None
        if asked is not None and gguf_file is None and quantization_config is None:
            ours = _quantizer_for(config, asked)
        if ours is None:
            return original(config, quantization_config, device_map, *args, gguf_file=gguf_file, **kwargs)
        config.quantization_config = ours.quantization_config
        return ours, config, device_map

    return get_hf_quantizer


def require_entry(config: Any) -> None:
    """Raise if the `quantization_config` of a config.json is neither null nor an object.

    Raises:
        InvalidCheckpoint: It is something else.
    """
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if entry is not None and not isinstance(entry, dict) and not hasattr(entry, "to_dict"):
        raise InvalidCheckpoint(
            f"The quantization_config of config.json is an object with a quant_method, or null, got {entry!r}. {REMEDY}"
        )


def stored_quantized(config: Any) -> bool:
    """Whether a model's config says that its files are quantized; `None` says nothing."""
    return config is not None and _entry(config) is not None


def _entry(config: Any) -> Any:
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )


def _quantizer_for(config: Any, asked: LLMOptConfig) -> Quantizer | None:
    """Our quantizer for a model that is to be loaded, or `None` to leave it to transformers."""
    entry = _entry(config)
    wanted = asked.quantization
    if entry is None:
        _require_config_in_place(config)
        if wanted is None or wanted.method in CALIBRATED:
            return None
        _require_whole(config)
        return Quantizer(WeightConfig(), replace(wanted, method=wanted.effective_method), pre_quantized=False)
    words = entry if isinstance(entry, dict) else entry.to_dict()
    try:
        recipe = Recipe.from_dict(words)
    except UnsupportedQuantization as reason:
        method = words.get("quant_method")
        known = [*METHODS, *AUTO_QUANTIZATION_CONFIG_MAPPING, *(each.value for each in QuantizationMethod)]
        if isinstance(method, str) and method not in known:  # transformers would load it as if it were full weights
            raise InvalidCheckpoint(
                f"The quantization_config of config.json has quant_method {method!r}, which nobody knows. "
                f"Known: {', '.join(sorted({*known}))}."
            ) from None
        if wanted is not None:
            raise UnsupportedQuantization(f"{reason} {_already(entry)}") from None
        if words.get("quant_method") in METHODS:  # transformers may know more of it than we do
            if asked.strict:
                raise
            warnings.warn(f"llmopt: transformers loads the weights: {reason}", UserWarning, stacklevel=2)
        return None
    if wanted is not None and (why := _contradiction(recipe, wanted, wanted.method)) is not None:
        raise UnsupportedQuantization(f"{why} {_already(entry)}")
    _require_whole(config)
    return Quantizer(WeightConfig(recipe), wanted or QuantizationConfig(), pre_quantized=True)


def _require_config_in_place(config: Any) -> None:
    """Raise if files of AutoGPTQ's first years lie where transformers takes them for full weights that are missing."""
    folder = getattr(config, "name_or_path", None)
    if folder and Path(folder, "quantize_config.json").is_file():
        raise InvalidCheckpoint(
            f"{str(folder)!r} has a quantize_config.json and no quantization_config in config.json, where it is looked "
            'for. Copy it there, with "quant_method": "gptq" (docs/formats.md, Coming over); if the weights are full, '
            "remove the file."
        )


def has(model: PreTrainedModel, asked: QuantizationConfig) -> bool:
    """Whether the model's weights are what is asked for. What is not named does not count."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Quantizer) or quantizer.quantization_config.recipe is None:
        return False
    held = quantizer.asked
    if asked is held:
        return True
    told = {"bits", "group_size", "symmetric"}  # by the recipe
    counts = {"head_bits", "activations"} if quantizer.pre_quantized else {o.name for o in fields(asked)} - told
    # What was quantized here knows its method; the files' format alone does not tell: GPTQ with zeros is stored as AWQ.
    method = asked.method if quantizer.pre_quantized else None
    return _contradiction(quantizer.quantization_config.recipe, asked, method) is None and all(
        getattr(asked, name) is getattr(held, name)
        or (name != "calibration" and getattr(asked, name) == getattr(held, name))
        for name in counts
        if asked.names(name)
    )


def _contradiction(recipe: Recipe, asked: QuantizationConfig, method: str | None) -> str | None:
    """What of that which is named, and of the method if it is to be told by the files, is not so; or `None`."""
    for _, scheme in recipe.groups:
        integer = scheme.format not in ("float-quantized", "fp8")
        fits = {
            "int4": integer and scheme.bits == (asked.bits or 4),
            "int8": integer and scheme.bits == 8,
            "fp8": not integer,
            "gptq": recipe.method in ("gptq", "compressed-tensors") and integer,
            "awq": integer and (recipe.method != "gptq" or asked.symmetric is True),
            "smoothquant": scheme.format == "int-quantized" and scheme.bits == 8,
        }
        if method is not None and not fits[method]:
            return f"method={method!r} contradicts the files' {scheme.format!r} of {scheme.bits} bits."
        for name in ("bits", "group_size", "symmetric"):
            if asked.names(name) and getattr(asked, name) != getattr(scheme, name):
                return f"{name}={getattr(asked, name)} contradicts the files' {getattr(scheme, name)}."
    return None


def require_full(model: PreTrainedModel) -> None:
    """Raise if the model's weights are quantized already, or cannot be reached one product after the other."""
    _require_whole(model.config)
    if any(can_unfuse(module) and is_offloaded(module) for module in model.modules()):
        raise UnsupportedQuantization(
            "The experts are offloaded, all of a layer in one tensor. Quantize them while they are loaded, "
            "from_pretrained(..., llmopt=..., device_map=...), or load the model without offloading."
        )
    entry = getattr(model.config, "quantization_config", None)
    if entry is not None or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedQuantization(_already(entry))


def _require_whole(config: Any) -> None:
    if getattr(config, "distributed_config", None) is not None:
        raise UnsupportedQuantization(
            "The weights are sharded over processes (tp_plan=, distributed_config=), and ours are quantized in one. "
            "Leave the method out, or load the model into one process."
        )


def _already(entry: Any) -> str:
    words = entry if isinstance(entry, dict) else entry.to_dict() if entry is not None else {}
    method = words.get("quant_method")
    return (
        f"The model is quantized already (quant_method {getattr(method, 'value', method)!r}). Load full-precision "
        "weights to quantize them anew, or leave the format out: llmopt=True runs the model as it is."
    )
