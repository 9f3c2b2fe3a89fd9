"""What the answers of `bench serve` are compared with."""

from __future__ import annotations

from typing import Any

from .serve_load import Ask, Reply


class Expected:
    """What `generate` of transformers answers, computed when asked for the first time.

    Args:
        model: The model that is served.
        tokenizer: The model's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._texts: dict[Ask, str] = {}

    def same(self, ask: Ask, reply: Reply) -> bool:
        """Whether a reply has the text of `generate`'s tokens, but for bytes at the end that are no character yet."""
        if reply.error is not None:
            return False
        if ask not in self._texts:
            inputs = self._tokenizer(ask.prompt, return_tensors="pt", return_token_type_ids=False)
            inputs = inputs.to(self._model.device)
            output = self._model.generate(**inputs, max_new_tokens=ask.new, do_sample=False, llmopt=False)
            tokens = output[0, inputs["input_ids"].shape[1] :]
            self._texts[ask] = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return reply.text.rstrip("\ufffd") == self._texts[ask].rstrip("\ufffd")
