"""Tiny random models, one per architecture, built from configs: no hub, a few milliseconds each.

`build("llama")` returns a model in eval mode whose greedy tokens vary and whose best two logits stay well apart, so
that a test on tokens cannot pass by accident (one token repeated) nor fail by rounding (a near tie).

The sizes are chosen so that what an architecture adds really takes part in a test of 20 to 40 tokens: windows of 6 to
8 tokens, chunks of 8, soft caps that bend, multipliers that are not 1, key and value widths that differ.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

HIDDEN_SIZE = 64

# Shared by every architecture; the entries below win over it. 4 query heads of width 16 on 2 key-value heads.
SMALL = {
    "vocab_size": 112,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SLIDING, FULL = "sliding_attention", "full_attention"

# Weights are drawn with standard deviation GAIN / sqrt(inputs): large enough that the context decides the next token.
GAIN = 2.0

# Added to the seed: from here on, seeds 0, 1 and 2 decode 30 greedy tokens from random prompts without a near tie
# (gap of the best two logits above 3e-4) and without falling into a short cycle (6 different tokens at the least).
SEED_OFFSET: dict[str, int] = {
    "llama": 2,
    "qwen2": 3,
    "gpt2": 10,
    "gemma3_text": 4,
    "phi": 6,
    "phi3": 1,
    "opt": 1,
    "gpt_neox": 61,
    "stablelm": 1,
    "olmo": 2,
    "olmo2": 16,
    "cohere": 4,
    "cohere2": 6,
    "glm": 1,
    "nemotron": 4,
    "glm4": 1,
    "gpt_oss": 1,
    "mixtral": 2,
    "exaone4": 1,
    "persimmon": 6,
    "ernie4_5": 1,
    "seed_oss": 3,
    "llama4_text": 6,
    "biogpt": 6,
}

# name = model type -> what its config needs on top of SMALL.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gpt2": {"n_inner": 96},
    "gemma": {"head_dim": 16, "tie_word_embeddings": False},
    # transformers 5.17 chooses sdpa, which silently drops the soft cap; 5.23 chooses eager itself.
    "gemma2": {
        "attn_implementation": "eager",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL, SLIDING],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 7,
        "layer_types": [SLIDING, FULL, SLIDING],
        "tie_word_embeddings": False,
    },
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN_SIZE},
    "gpt_neox": {},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING]},
    "granite": {
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.8,
        "embedding_multiplier": 1.5,
        "logits_scaling": 1.25,
    },
    "cohere": {"logit_scale": 0.75, "tie_word_embeddings": False},
    "cohere2": {"sliding_window": 6, "logit_scale": 0.75, "layer_types": [SLIDING, FULL, SLIDING]},
    "starcoder2": {"sliding_window": 8, "tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    # The pattern has four places: three sliding layers, then a full one without rotary embedding.
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "sliding_window_pattern": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    },
    "helium": {"head_dim": 16},
    "nemotron": {},
    "persimmon": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    # Three chunked layers with rotary embedding, then a full one without it whose queries are scaled by position.
    "llama4_text": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 1, 1, 0],
        "floor_scale": 8,
    },
    "biogpt": {"scale_embedding": False},
    # Keys are 8 + 8 wide, values 12.
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}

_SEQ2SEQ = {"decoder_start_token_id": 1, "is_encoder_decoder": True}

# Models that keep recurrent states beside keys.
STATEFUL: dict[str, dict] = {
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "falcon_h1": {
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "position_embedding_type": "rope",
    },
    "lfm2": {"layer_types": ["conv", FULL, "conv"], "block_multiple_of": 32},
}

# Models that run stock: no registered attention, recurrent state, or an encoder.
NOT_SERVED: dict[str, dict] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": HIDDEN_SIZE, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "expansion_ratio": 2},
    "xglm": {"scale_embedding": False, "d_model": HIDDEN_SIZE, "ffn_dim": 96, "attention_heads": 4, "num_layers": 3},
    "mamba": {"state_size": 8, "expand": 2, "use_mambapy": False},
    "t5": dict(d_model=HIDDEN_SIZE, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **_SEQ2SEQ),
    "bart": dict(
        d_model=HIDDEN_SIZE,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        **_SEQ2SEQ,
    ),
}

# Found out by running them: attention that is more than the attention interface is told of.
UNPROVEN: dict[str, dict] = {"diffllama": {}, "doge": {}, "bert": {}}


def ragged() -> dict[str, torch.Tensor]:
    """Three prompts of 13 columns, one padded on the left."""
    torch.manual_seed(3)
    ids = torch.randint(3, 90, (3, 13))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def build(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **overrides,
) -> PreTrainedModel:
    """Builds the tiny model called `name` in eval mode on the CPU; the global random state is left as it was.

    The same `(name, seed, overrides)` gives the same weights; `dtype` rounds them.

    Args:
        name: A key of `ARCHITECTURES`, `STATEFUL`, `NOT_SERVED` or `UNPROVEN`.
        seed: Chooses the weights.
        dtype: The parameters' dtype.
        attn_implementation: As in `from_pretrained`; `None` is the entry's, else transformers' own choice.
        **overrides: Config values that win over the architecture's.
    """
    architecture = {**ARCHITECTURES, **STATEFUL, **NOT_SERVED, **UNPROVEN}[name]
    if attn_implementation is not None:
        overrides["attn_implementation"] = attn_implementation
    config = AutoConfig.for_model(name, **{**SMALL, **architecture, **overrides})
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + SEED_OFFSET.get(name, 0))
        model = auto_class.from_config(config)
        _spread_weights(model)
    return model.to(dtype).eval()


@torch.no_grad()
def _spread_weights(model: PreTrainedModel) -> None:
    """Redraws the weights so that activations keep a size near 1 and logits one near 3.

    transformers' `initializer_range=0.02` makes a tiny model's layers add almost nothing to the embedding: greedy
    decoding then repeats one token and the best two logits nearly tie. Recurrences, convolutions and buffers keep
    their own values.
    """
    head = model.get_output_embeddings()
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    # Gemma multiplies what it looks up by sqrt(hidden_size).
    scaled = HIDDEN_SIZE**0.5 if model.config.model_type.startswith("gemma") else 1.0
    transposed = {module.weight for module in model.modules() if isinstance(module, Conv1D)}
    recurrent = ("A_log", "conv", "dt_", "mamba.D", ".D")
    for name, parameter in model.named_parameters():
        if any(part in name for part in recurrent):
            continue
        if head is not None and parameter is head.weight:
            # One matrix as embedding and as head: between the two sizes.
            parameter.normal_(std=0.4)
        elif any(parameter is weight for weight in embeddings):
            parameter.normal_(std=0.7 / scaled)
        elif parameter.ndim >= 2:
            # [out, in], or [in, out] in a Conv1D
            fan_in = parameter.shape[-2 if parameter in transposed else -1]
            parameter.normal_(std=GAIN / fan_in**0.5)
        else:
            # Norms, biases, attention sinks: around the value that transformers chose.
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
