"""hf_llmopt: one keyword makes transformers generate like a serving engine, with the same tokens.

>>> import hf_llmopt
>>> from hf_llmopt import demo
>>> model, tokenizer = demo.load()
>>> ids = model.generate(**tokenizer("import", return_tensors="pt"), llmopt=True, max_new_tokens=4)
"""

from __future__ import annotations

__version__ = "0.1.0"

import os

from . import errors
from .batching import BatchingPipeline, Engine, RequestHandle, generate_batch
from .config import (
    AttentionConfig,
    BatchingConfig,
    KVCacheConfig,
    LLMOptConfig,
    PromptCacheConfig,
    QuantizationConfig,
    SpeculativeConfig,
    register,
)
from .generation import ModelHandle
from .hooks import install, optimize, uninstall
from .kv_cache import PagedCache
from .prompt_cache import PromptHandle
from .quantization import QuantizationReport, QuantizedLinear
from .speculative.mixin import SpeculativeGenerationMixin
from .stats import PromptCacheStats, Stats

__all__ = [
    "AttentionConfig",
    "BatchingConfig",
    "BatchingPipeline",
    "Engine",
    "KVCacheConfig",
    "LLMOptConfig",
    "ModelHandle",
    "PagedCache",
    "PromptCacheConfig",
    "PromptCacheStats",
    "PromptHandle",
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedLinear",
    "RequestHandle",
    "SpeculativeConfig",
    "SpeculativeGenerationMixin",
    "Stats",
    "errors",
    "generate_batch",
    "install",
    "optimize",
    "register",
    "uninstall",
]

if os.environ.get("HF_LLMOPT_INSTALL", "1") != "0":
    install()
