"""How texts become tokens, and tokens the batches that the embedded pair is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTEXT = 1024
VOCABULARY = 4096
SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains a lossless byte-level BPE tokenizer (Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2).

    Args:
        texts: The texts to learn merges from.
        vocabulary: Tokens, the 256 bytes and two special tokens among them.

    Returns:
        The tokenizer. It adds no special token by itself: a prompt is the middle of a document.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    # The model completes code and knows no roles: a conversation is its messages, one after the other.
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def pack(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Joins texts to one run of token ids `[n]`, a separator before each."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (tokenizer.eos_token_id, *ids)])


def windows(tokens: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields batches `[batch_size, CONTEXT + 1]` for ever; every pass cuts elsewhere and has another order.

    Raises:
        ValueError: The tokens do not fill one batch.
    """
    if len(tokens) <= (batch_size + 1) * CONTEXT:
        raise ValueError(f"{len(tokens)} tokens are too few for a batch of {batch_size} windows; lower --batch-size")
    span = torch.arange(CONTEXT + 1)
    while True:
        shift = int(torch.randint(CONTEXT, (), generator=generator))
        starts = torch.arange(shift, len(tokens) - CONTEXT, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts[: len(starts) // batch_size * batch_size].view(-1, batch_size):
            yield tokens[(chosen[:, None] + span).to(tokens.device)]
