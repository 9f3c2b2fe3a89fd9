"""A second model that follows the requests of an engine, in an engine of its own: it drafts for them."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import InvalidOption
from ..speculative.drafter import Text
from .probe import input_device
from .request import Request, Share

if TYPE_CHECKING:
    from .engine import EngineLoop


def second_model(given: Any, model: PreTrainedModel) -> PreTrainedModel:
    """The model that is to draft.

    Args:
        given: It, or its name.
        model: The one that it drafts for.

    Raises:
        InvalidOption: It has another vocabulary, or lies on another device.
    """
    device = input_device(model)
    if isinstance(given, str):
        loaded: Any = AutoModelForCausalLM.from_pretrained(given, dtype=model.dtype)
        given = loaded.to(device).eval()
    if not isinstance(given, PreTrainedModel):
        raise InvalidOption(f"draft_model is a transformers PreTrainedModel or its name, got {type(given).__name__}.")
    sizes = [each.config.get_text_config().vocab_size for each in (given, model)]
    if sizes[0] != sizes[1]:
        raise InvalidOption(
            f"draft_model knows {sizes[0]} tokens, the model {sizes[1]}: a draft model shares the model's tokenizer. "
            "Take a smaller model of the same family, or method='suffix', which needs none."
        )
    if input_device(given) != device:
        raise InvalidOption(
            f"draft_model lies on {input_device(given)}, the model on {device}. Move it: draft_model.to('{device}')."
        )
    return given


class _Twin:
    """The second model's request for a text: a group of its own, so that its failure is nobody else's."""

    def __init__(self, request: Request, known: int) -> None:
        self.requests = [request]
        self.thread = get_ident()
        self.known = known  # tokens that are the text's, not guesses

    def account(self, seconds: float, paths: set[str], share: Share) -> None:
        """Its passes are nobody's figures."""

    def notice(self) -> None:
        """Whoever waits looks by itself."""


class SecondModel:
    """Follows texts.

    Args:
        model: The second model; one that was loaded by its name is nobody else's.
        loop: Its engine, which nobody else uses.
    """

    def __init__(self, model: PreTrainedModel, loop: EngineLoop) -> None:
        self._model = model  # the engine holds it weakly
        self._loop = loop
        self._twins: dict[Text, _Twin] = {}

    def follow(self, texts: Sequence[Text]) -> None:
        """Know the tokens of these texts, and nothing behind them. What was computed of right guesses is kept."""
        with self._loop.lock:
            for text in texts:
                twin = self._twins.get(text)
                if twin is None:
                    self._begin(text)
                elif twin.requests[0].error is None:
                    self._go_on(text, twin)

    def _begin(self, text: Text) -> None:
        self._loop.refresh()
        length = len(text.tokens)
        request = Request(
            list(text.tokens),
            list(text.positions),
            text.next_position,
            self._loop.budget.rooms(length, length, keeps_passed=True),
            left_padding=text.left_padding,
            keeps_passed=True,  # windows go back too
        )
        self._twins[text] = _Twin(request, length)
        self._loop.add(self._twins[text])

    def _go_on(self, text: Text, twin: _Twin) -> None:
        (request,) = twin.requests
        same = twin.known
        last = min(len(request.tokens), len(text.tokens) - 1)  # the last one is computed anew, for its logits
        while same < last and request.tokens[same] == text.tokens[same]:
            same += 1
        request.tokens[same:] = text.tokens[same:]
        request.positions[same:] = text.positions[same:]
        request.next_position = text.next_position
        request.computed = min(request.computed, same)
        request.logits = None
        twin.known = len(text.tokens)

    def logits(self, texts: Sequence[Text]) -> list[Tensor | None]:
        """Behind all tokens of each text, `[vocabulary]`; `None` where the model failed, or has no room for it."""
        requests = [self._twins[text].requests[0] for text in texts]
        with self._loop.lock:
            while any(request.logits is None and request.error is None for request in requests):
                if not self._loop.step():
                    break
        return [request.logits for request in requests]

    def append(self, text: Text, token: int) -> None:
        """A guess follows."""
        self._twins[text].requests[0].append(token)

    def forget(self, text: Text) -> None:
        """The text has ended."""
        twin = self._twins.pop(text, None)
        if twin is not None:
            with self._loop.lock:
                self._loop.remove(twin)
