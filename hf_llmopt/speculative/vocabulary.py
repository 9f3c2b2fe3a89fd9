"""A draft model with another tokenizer: which tokens mean the same, and what a text is in its tokens.

Token-level intersection (TLI, Timor et al. 2025, arXiv 2502.05202): the draft model's logits count for the tokens that
both vocabularies have, all others get minus infinity. From there on it is a draft model like any other: the guess is
the model's own choice with these scores and its own noise. The paper's other exact way, string-level exact match
(SLEM), cuts what the draft model wrote into the model's tokens. Its guesses are drawn with noise that is not the
model's, and two draws without common noise agree far less often; so it is not offered, and vocabularies that share next
to nothing are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidOption

LEAST_SHARED = 0.01  # of the smaller vocabulary; the bytes that byte-level tokenizers have in common are fewer
BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands in for a character that has no token
BROKEN = "\ufffd"  # decoded from a part of a character

LOOK_BEHIND = 32  # tokens at a text's end that are encoded in each step
LONGEST = 96  # as many as these, rather, before the beginning moves on
AGREE = 8  # tokens that two encodings must have in common at their ends to be taken for the same


class Translation:
    """Between the tokens of a model and those of its draft model.

    Args:
        tokenizer: The model's.
        draft_tokenizer: The draft model's.
        sizes: Logits of the model, and of the draft model.

    Raises:
        InvalidOption: A tokenizer has more tokens than its model, or the two share next to none.
    """

    def __init__(self, tokenizer: Any, draft_tokenizer: Any, sizes: tuple[int, int]) -> None:
        pairs = zip(("tokenizer", "draft_tokenizer"), (tokenizer, draft_tokenizer), sizes, strict=True)
        for name, each, size in pairs:
            if each.vocab_size > size:
                raise InvalidOption(
                    f"{name} has {each.vocab_size} tokens and its model {size}: it belongs to another model. "
                    "tokenizer= is that of the model that generates, draft_tokenizer= that of draft_model."
                )
        own, theirs = (_by_text(each, size) for each, size in zip((tokenizer, draft_tokenizer), sizes, strict=True))
        shared = {own[text]: token for text, token in theirs.items() if text in own}
        ends = tokenizer.eos_token_id, draft_tokenizer.eos_token_id
        if None not in ends and all(end < size for end, size in zip(ends, sizes, strict=True)):
            shared[ends[0]] = ends[1]
        if len(shared) < LEAST_SHARED * min(len(own), len(theirs)):
            raise InvalidOption(
                f"tokenizer and draft_tokenizer have {len(shared)} tokens in common, of {len(own)} and {len(theirs)}: "
                "nothing could be guessed. Take a draft model with a similar tokenizer, or method='suffix', which has "
                "none."
            )
        self._tokenizer, self._draft_tokenizer, self._size = tokenizer, draft_tokenizer, sizes[0]
        self._token = shared
        self._own, self._theirs = torch.tensor(list(shared)), torch.tensor(list(shared.values()))
        self._silent = set(tokenizer.all_special_ids) - set(shared)  # nothing that the draft model would understand
        bos = draft_tokenizer.bos_token_id
        self._begin = [bos] if bos is not None and draft_tokenizer.encode("")[:1] == [bos] else []

    def logits(self, found: Tensor) -> Tensor:
        """The draft model's logits as the model's, `[draft vocabulary]` to `[vocabulary]`."""
        if self._own.device != found.device:
            self._own, self._theirs = self._own.to(found.device), self._theirs.to(found.device)
        own = found.new_full((self._size,), -float("inf"))
        own[self._own] = found[self._theirs]
        return own

    def token(self, token: int) -> int:
        """The draft model's token for one of the model's that has a finite logit."""
        return self._token[token]

    def encode(self, tokens: Sequence[int], start: int) -> list[int]:
        """What tokens of the model are to the draft model, from place `start` of a text on."""
        text = self._tokenizer.decode(
            [token for token in tokens[start:] if token not in self._silent], clean_up_tokenization_spaces=False
        )
        found: list[int] = self._draft_tokenizer.encode(text.rstrip(BROKEN), add_special_tokens=False, verbose=False)
        if start:
            return found
        return [*self._begin, *found] or [0]  # a text of tokens that mean nothing: something has to be read


class Reading:
    """A growing text in the draft model's tokens.

    Only its end is encoded in each step: what is known of a text is `fixed` tokens, and from a later place on an
    encoding whose first `skip` tokens are among them. That place moves on once the encoding from there ends like the
    one before: however a tokenizer begins, some tokens later it cuts as it would have anyway.
    """

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self.fixed = 0
        self._start = 0
        self._skip = 0
        self._longest = LONGEST

    def extend(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Read on.

        Args:
            tokens: All tokens of the text, those of the last call and some more.

        Returns:
            How many of the draft model's tokens are as they were, and all that follow them.
        """
        found = self._translation.encode(tokens, self._start)
        fixed, end = self.fixed, found[self._skip :]
        if len(tokens) - self._start > self._longest:
            self._move(tokens, found)
        return fixed, end

    def _move(self, tokens: Sequence[int], found: list[int]) -> None:
        """Begin later, if both encodings end alike."""
        start = len(tokens) - LOOK_BEHIND
        later = self._translation.encode(tokens, start)
        most, same = min(len(found) - self._skip, len(later)), 0
        while same < most and found[-1 - same] == later[-1 - same]:
            same += 1
        if same < AGREE:
            self._longest *= 2  # tried again, but seldom enough to cost little
            return
        self.fixed += len(found) - self._skip - same
        self._start, self._skip, self._longest = start, len(later) - same, LONGEST


def _by_text(tokenizer: Any, size: int) -> dict[str, int]:
    """The token for each text, of those with a logit; the text is what a token adds behind a letter."""
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    # Of several tokens for one text the tokenizer uses the first that is no byte: it comes last, and stays.
    entries = [(name, token) for name, token in tokenizer.get_vocab().items() if token < size]
    entries.sort(key=lambda entry: (BYTE.fullmatch(entry[0]) is None, -entry[1]))
    texts = tokenizer.batch_decode([[*letter, token] for _, token in entries], clean_up_tokenization_spaces=False)
    before = tokenizer.decode(letter, clean_up_tokenization_spaces=False)
    return {
        text.removeprefix(before): token
        for text, (_, token) in zip(texts, entries, strict=True)
        if text.startswith(before) and text != before and BROKEN not in text
    }
