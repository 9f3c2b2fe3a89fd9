"""Which quantizer a model has that is being loaded, and which models can be quantized at all.

transformers asks one function, `get_hf_quantizer`. Inside `from_pretrained(llmopt=...)` our answer takes the place of
its own (`hooks.py`): for files in a format of ours, and where a method is asked for that sees only the weights, which
are then quantized one tensor at a time as they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from ..config import EIGHT_BITS, LLMOptConfig, QuantizationConfig
from ..errors import UnsupportedQuantization
from .formats import Recipe
from .plan import CALIBRATED
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
        if wanted is None or wanted.method in CALIBRATED:
            return None
        return Quantizer(WeightConfig(), wanted, pre_quantized=False)
    words = entry if isinstance(entry, dict) else entry.to_dict()
    try:
        recipe = Recipe.from_dict(words)
    except UnsupportedQuantization as reason:
        if wanted is not None:
            raise UnsupportedQuantization(_already(entry)) from None
        if words.get("quant_method") in METHODS:  # transformers may know more of it than we do
            if asked.strict:
                raise
            warnings.warn(f"llmopt: transformers loads the weights: {reason}", UserWarning, stacklevel=2)
        return None
    bits = {scheme.bits for _, scheme in recipe.groups}
    if wanted is not None and {wanted.bits or (8 if wanted.method in EIGHT_BITS else 4)} != bits:
        raise UnsupportedQuantization(_already(entry))
    return Quantizer(WeightConfig(recipe), wanted or QuantizationConfig(), pre_quantized=True)


def has(model: PreTrainedModel, asked: QuantizationConfig) -> bool:
    """Whether the model's weights are what is asked for."""
    quantizer = getattr(model, "hf_quantizer", None)
    return isinstance(quantizer, Quantizer) and quantizer.asked == asked


def require_full(model: PreTrainedModel) -> None:
    """Raise if the model's weights are quantized already."""
    entry = getattr(model.config, "quantization_config", None)
    if entry is not None or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedQuantization(_already(entry))


def _already(entry: Any) -> str:
    words = entry if isinstance(entry, dict) else entry.to_dict() if entry is not None else {}
    method = words.get("quant_method")
    return (
        f"The model is quantized already (quant_method {getattr(method, 'value', method)!r}). Load full-precision "
        "weights to quantize them anew, or leave the format out: llmopt=True runs the model as it is."
    )
