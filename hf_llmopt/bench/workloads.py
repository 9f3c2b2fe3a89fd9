"""What the benchmarks generate from: seeded ragged batches, and models of a known shape with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {  # Qwen2-0.5B
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "0.6b-qwen3": {  # Qwen3-0.6B
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "8b-llama": {  # Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "8b-qwen3": {  # Qwen3-8B
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "1.2b-llama": {  # Llama-3.2-1B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "opt-125m": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
    },
    "gpt2-small": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
"""Shapes of models that are too large to ship: the speed of a step does not depend on what the weights say."""


@dataclass(frozen=True)
class Workload:
    """A batch of prompts and how much to generate from it.

    Attributes:
        name: Says it in a table.
        rows: Prompts in the batch.
        new_tokens: Tokens to generate for every row.
        shortest: Fewest tokens of a prompt.
        longest: Most tokens of a prompt.
    """

    name: str
    rows: int
    new_tokens: int
    shortest: int = 32
    longest: int = 256


def ragged_prompts(
    workload: Workload, vocabulary: int, texts: Sequence[list[int]] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Make the batch of a workload: prompts of different lengths, padded on the left.

    Args:
        workload: How many prompts, and how long they may be.
        vocabulary: Token ids of the model: 0 to `vocabulary - 1`.
        texts: Tokenized texts to cut prompts from; random ids if `None`.
        seed: Chooses lengths and places.

    Returns:
        `input_ids` and `attention_mask`, both `[rows, longest drawn]`.

    Raises:
        ValueError: No text is as long as a prompt.

    Example:
        >>> batch = ragged_prompts(Workload("two", rows=2, new_tokens=8, shortest=4, longest=6), vocabulary=100)
        >>> batch["attention_mask"].sum(1).tolist()
        [6, 5]
    """
    rng = np.random.default_rng([seed, workload.rows, workload.new_tokens])
    lengths = rng.integers(workload.shortest, workload.longest + 1, size=workload.rows)
    width = int(lengths.max())
    ids = torch.zeros(workload.rows, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths.tolist()):
        if texts is None:
            prompt = rng.integers(0, vocabulary, size=length)
        else:
            long_enough = [text for text in texts if len(text) >= length]
            if not long_enough:
                raise ValueError(f"no text has {length} tokens, the length of a prompt of {workload.name!r}")
            text = long_enough[rng.integers(len(long_enough))]
            start = rng.integers(len(text) - length + 1)
            prompt = np.asarray(text[start : start + length])
        ids[row, width - length :] = torch.as_tensor(prompt)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def held_out_ids(tokenizer: Any, texts: int = 24) -> list[list[int]]:
    """Real text that the embedded pair was not trained on, tokenized.

    Args:
        tokenizer: Any tokenizer.
        texts: How many documents to take.
    """
    from ..demo.corpus import held_out_texts

    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in held_out_texts()[:texts]]


# The same structure in miniature, to see that a benchmark runs; heads stay as many as they are.
MINIATURE = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 96, "ffn_dim": 96}


def build(
    shape: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    miniature: bool = False,
    device: str = "cpu",
    ranks: int = 1,
) -> PreTrainedModel:
    """Make a model of a known shape with random weights.

    Args:
        shape: A name in `SHAPES`.
        dtype: The type of the weights.
        seed: Of the weights.
        miniature: Narrow and with few layers, to see that something runs.
        device: Where the weights are drawn; other devices draw others.
        ranks: Processes of torch.distributed over which it is sharded, with a head of its own; each of them makes it.

    Raises:
        InvalidOption: There is no such shape.
    """
    if shape not in SHAPES:
        from ..errors import unknown

        raise unknown("shape", shape, SHAPES)
    settings = dict(SHAPES[shape])
    if miniature:
        width = 16 * settings["num_attention_heads"]
        small = {**MINIATURE, "hidden_size": width, "word_embed_proj_dim": width}
        settings |= {name: value for name, value in small.items() if name in settings}
    if ranks > 1:
        settings["tie_word_embeddings"] = False  # shared weights are sharded while they are loaded
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=dtype)
    if ranks > 1:  # as `from_pretrained` does it, which random weights have no file for
        from transformers.distributed import DistributedConfig

        kind: Any = type(model)
        plan, _, mesh = kind.prepare_distribute_model(DistributedConfig(tp_size=ranks, tp_plan="auto"))
        model = kind.maybe_distribute_model(model, plan, mesh)
    return model.eval()
