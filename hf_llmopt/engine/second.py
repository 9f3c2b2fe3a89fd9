"""A second model that follows the requests of an engine, in an engine of its own: it drafts for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..config import SpeculativeConfig
from ..errors import InvalidOption, PromptTooLong
from ..prompt_cache import Prefix
from ..speculative import Reading, Text, Translation
from ..stats import Stats
from .probe import input_device, position_limit
from .request import Request, Share

if TYPE_CHECKING:
    from .engine import EngineLoop


def second_model(asked: SpeculativeConfig, model: PreTrainedModel) -> tuple[PreTrainedModel, Translation | None]:
    """The model that is to draft, and what its tokens are to the other, unless they are the same.

    Args:
        asked: Names it, and the tokenizers.
        model: The one that it drafts for.

    Raises:
        InvalidOption: It has another vocabulary and no tokenizers say which, or lies on another device.
    """
    given, device = asked.draft_model, input_device(model)
    if isinstance(given, str):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(given, dtype=model.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidOption(
                f"draft_model={given!r} cannot be loaded: {error} An EAGLE drafter needs method='eagle'."
            ) from error
        given = loaded.to(device).eval()
    if not isinstance(given, PreTrainedModel):
        raise InvalidOption(f"draft_model is a transformers PreTrainedModel or its name, got {type(given).__name__}.")
    if given.get_output_embeddings() is None:
        raise InvalidOption(
            f"draft_model is a {type(given).__name__}, which has no head and so gives no logits. Load it with "
            "AutoModelForCausalLM."
        )
    if input_device(given) != device:
        raise InvalidOption(
            f"draft_model lies on {input_device(given)}, the model on {device}. Move it: draft_model.to('{device}')."
        )
    size, draft_size = (each.config.get_text_config().vocab_size for each in (model, given))
    if asked.tokenizer is not None:
        own, theirs = (
            AutoTokenizer.from_pretrained(each) if isinstance(each, str) else each
            for each in (asked.tokenizer, asked.draft_tokenizer)
        )
        if size != draft_size or own.get_vocab() != theirs.get_vocab():
            return given, Translation(own, theirs, (size, draft_size))
    elif size != draft_size:
        raise InvalidOption(
            f"draft_model knows {draft_size} tokens, the model {size}: their tokenizers differ, or their logits are "
            "padded to different sizes. Give both tokenizers, tokenizer= and draft_tokenizer=, or take a smaller model "
            "of the same family, or method='suffix', which needs none."
        )
    return given, None


@dataclass(eq=False)
class _Copy(Request):
    """The second model's request for a text.

    Attributes:
        sure: How many of its first tokens are the text's and stay; those behind may be guesses, or be cut anew.
    """

    sure: int = 0

    @property
    def known(self) -> int:
        """Tokens that are computed and stay: others may find them."""
        return min(self.computed, self.sure)


class _Twin:
    """A group of its own for each copy of a text, so that its failure is nobody else's.

    Args:
        text: What is copied.
        translation: What the text's tokens are to the second model; `None` where they are the same.
    """

    only_best = False  # drafts come with their probabilities

    def __init__(self, text: Text, translation: Translation | None) -> None:
        self.thread, self.submitted, self.stats = get_ident(), False, Stats()
        self._reading = None if translation is None else Reading(translation)
        self.copy = _Copy([], [], 0, [], keeps_passed=True)  # windows go back too
        self.requests: list[Request] = [self.copy]
        self.copy.salt = text.salt
        if translation is None:
            self.copy.left_padding = text.left_padding
        self.read(text)

    def read(self, text: Text) -> None:
        """Take over what was added to the text, and forget guesses that it does not have. The last token is due."""
        copy = self.copy
        if self._reading is None:
            kept = copy.sure
            tokens, positions, copy.next_position = text.tokens[kept:], text.positions[kept:], text.next_position
            copy.sure = len(text.tokens)
        else:
            kept, tokens = self._reading.extend(text.tokens)
            copy.sure = self._reading.fixed
            copy.next_position = kept + len(tokens)
            positions = list(range(kept, copy.next_position))
        last = min(len(copy.tokens) - kept, len(tokens) - 1)  # the last one is computed anew, for its logits
        same = 0
        while same < last and copy.tokens[kept + same] == tokens[same]:
            same += 1
        copy.tokens[kept:] = tokens
        copy.positions[kept:] = positions
        copy.computed = min(copy.computed, kept + same)
        copy.proven = min(copy.proven, copy.computed)
        copy.logits = None

    def account(self, seconds: float, paths: set[str], share: Share) -> None:
        """Its passes are nobody's figures."""

    def notice(self) -> None:
        """Whoever waits looks by itself."""


def _begins_with(other: Request, request: Request) -> bool:
    """Whether all tokens of a request but its last are the first of another one's, in the same places."""
    last = len(request.tokens) - 1
    return (
        not other.finished
        and other.left_padding == request.left_padding
        and (other.adapter, other.salt) == (request.adapter, request.salt)
        and other.tokens[:last] == request.tokens[:last]
        and other.positions[:last] == request.positions[:last]
    )


class SecondModel:
    """Follows texts.

    Args:
        model: The second model; one that was loaded by its name is nobody else's.
        loop: Its engine, which nobody else uses.
        translation: What its tokens are to the texts; `None` where they are the same.
        adapters: It has the adapters that requests name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loop: EngineLoop,
        translation: Translation | None = None,
        adapters: bool = False,
    ) -> None:
        self._model = model  # the engine holds it weakly
        self._loop = loop
        self._translation = translation
        self._adapters = adapters
        self._positions = position_limit(model)
        self._twins: dict[Text, _Twin] = {}

    def follow(self, texts: Sequence[Text]) -> None:
        """Know the tokens of these texts, and nothing behind them. What was computed of right guesses is kept."""
        with self._loop.lock:
            for text in texts:
                twin = self._twins.get(text)
                if twin is None:
                    self._begin(text)
                elif twin.copy.error is None:
                    twin.read(text)

    def _begin(self, text: Text) -> None:
        """Read a text, from behind what another one has in common with it."""
        self._loop.refresh()
        twin = _Twin(text, self._translation)
        copy, length = twin.copy, len(twin.copy.tokens)
        copy.rooms = self._loop.budget.rooms(length, length, keeps_passed=True)
        copy.adapter = text.adapter if self._adapters else None
        copy.parent = next((each.copy for each in self._twins.values() if _begins_with(each.copy, copy)), None)
        if text.prefix is not None and self._loop.prompts is not None:
            copy.prefix = Prefix(length, text.salt, copy.adapter)
        self._twins[text] = twin
        self._loop.add(twin)

    def logits(self, texts: Sequence[Text]) -> list[Tensor | None]:
        """Behind all tokens of each text, `[vocabulary]`; `None` where the model failed, or has no room for it."""
        requests = [self._twins[text].copy for text in texts]
        with self._loop.lock:
            for text, request in zip(texts, requests, strict=True):
                # A GPU that is asked for a position behind the table is lost. The last one stays free, for a guess that
                # is computed though nobody goes on from it.
                if self._positions is not None and request.next_position >= self._positions:
                    request.error = PromptTooLong("The draft model has too few positions for this text.")
                    self._loop.remove(self._twins[text])
            while any(request.logits is None and request.error is None for request in requests):
                if not self._loop.step():
                    break
        found = [request.logits for request in requests]
        if self._translation is not None:
            return [None if logits is None else self._translation.logits(logits) for logits in found]
        return found

    def append(self, text: Text, token: int) -> None:
        """A guess follows."""
        own = token if self._translation is None else self._translation.token(token)
        self._twins[text].copy.append(own)

    def forget(self, text: Text) -> None:
        """The text has ended."""
        twin = self._twins.pop(text, None)
        if twin is not None:
            with self._loop.lock:
                self._loop.remove(twin)
