"""Model classes that speculate by themselves. Only the package's `__init__` imports this file: it needs the handle."""

from __future__ import annotations

from typing import Any

from ..config import LLMOptConfig
from ..generation import ModelHandle


class SpeculativeGenerationMixin:
    """A model class that inherits it generates as if `llmopt="speculative"` were given.

    `llmopt=` of a call, of `from_pretrained` and of `optimize` goes before it, `llmopt=False` too. `assistant_model=`
    and the like choose who guesses, as always.

    Example:
        >>> from transformers import LlamaForCausalLM
        >>> from hf_llmopt import SpeculativeGenerationMixin, demo
        >>> class Llama(SpeculativeGenerationMixin, LlamaForCausalLM):
        ...     pass
        >>> model = Llama.from_pretrained(demo.path())
        >>> model.llmopt.config
        LLMOptConfig(speculative=SpeculativeConfig())
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> SpeculativeGenerationMixin:
        """Set the default; not in `__init__`, which torch's modules do not call in classes that stand behind them."""
        model = super().__new__(cls)
        vars(model)["llmopt"] = ModelHandle(LLMOptConfig.parse("speculative"))
        return model
