"""What the user may ask for: `LLMOptConfig`, and a section per part of the series."""

from .llmopt import PARTS, PRESETS, LLMOptConfig, place_of
from .own import guarded, register
from .section import OWN
from .sections import (
    CALIBRATED,
    EIGHT_BITS,
    AttentionConfig,
    BatchingConfig,
    KVCacheConfig,
    PromptCacheConfig,
    QuantizationConfig,
    SpeculativeConfig,
)

__all__ = [
    "CALIBRATED",
    "EIGHT_BITS",
    "OWN",
    "PARTS",
    "PRESETS",
    "AttentionConfig",
    "BatchingConfig",
    "KVCacheConfig",
    "LLMOptConfig",
    "PromptCacheConfig",
    "QuantizationConfig",
    "SpeculativeConfig",
    "guarded",
    "place_of",
    "register",
]
