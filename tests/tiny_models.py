"""A tiny random model of any architecture that transformers can generate text with, from its config alone.

Most need nothing but small sizes under the names that configs share; a few need an entry of their own. The models of
`architectures.py` keep theirs.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import architectures
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

CAUSAL, IMAGES = "text", "image and text"
MOST_PARAMETERS = 20_000_000

# Sizes under the names that text configs give them.
TEXT: dict[str, Any] = {
    **architectures.SMALL,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 16,
    "sliding_window": 8,
    "use_mamba_kernels": False,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 112,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "decoder_layers": 3,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "ffn_dim": 96,
}
# Of an image tower: four patches a side.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": architectures.HIDDEN_SIZE,
}
SPECIAL = {"image_token_id": 100, "image_token_index": 100, "video_token_id": 101, "video_token_index": 101}


# Whose default config leaves the sections out.
MROPE = ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl", "hunyuan_vl")


def architectures_of(kind: str) -> list[str]:
    """Model types of transformers that generate text from text, or from images and text."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind == CAUSAL else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted(names)


LATENT = {"num_key_value_heads": 4}  # latent attention expands keys for every head
DECODER = {"is_decoder": True}
# Layers that read the keys of earlier layers, of both kinds.
SHARED = {"num_kv_shared_layers": 2, "layer_types": [architectures.SLIDING, architectures.FULL] * 2}
GEMMA4 = {**SHARED, "global_head_dim": 32}
CONV = {"layer_types": ["conv", architectures.FULL, "conv", "conv"]}
IMAGE_WORD = {"vocabulary_map": {"<image>": 100}}
PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}
TILES = {"mm_tokens_per_image": 4}

# What a config needs besides; a name in it may be that of a part.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("dots3_note_text", "mistral4"), LATENT),
    **{name: {"text_config": LATENT} for name in ("dots3_note", "kimi_k25", "mistral_large4")},
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"), DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), DECODER),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), PINPOINTS),
    "bailing_hybrid": {**LATENT, "layer_group_size": 2, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": IMAGE_WORD,
    "codegen": {"rotary_dim": 8},
    "emu3": IMAGE_WORD,
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma3": TILES,
    "gemma3n_text": SHARED,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 16},
    "lfm2_moe": CONV,
    "lfm3": CONV,
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "longcat_flash": {
        **LATENT,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 2,
        "head_dim": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "ovis2": {"hidden_size": architectures.HIDDEN_SIZE},
    "paligemma": {"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {**DECODER, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "shieldgemma2": TILES,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xlnet": {"d_head": 16, "d_inner": 96},
    "xlstm": {"num_heads": 4, "hidden_size": 64},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]},
    "zamba2": {"num_hidden_layers": 5, "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(name: str) -> PreTrainedConfig:
    """The small config of a model type."""
    known = {
        **architectures.ARCHITECTURES,
        **architectures.STATEFUL,
        **architectures.NOT_SERVED,
        **architectures.UNPROVEN,
    }
    if name in known:
        return CONFIG_MAPPING[name](**{**architectures.SMALL, **known[name]})
    cls = CONFIG_MAPPING[name]
    own = dict(OWN.get(name, {}))
    if not cls.sub_configs:
        return cls(**{**_fitting(cls, TEXT), **_rope(cls()), **own})
    values: dict[str, Any] = {**SPECIAL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    default = cls()
    for part in cls.sub_configs:
        sub = getattr(default, part, None)
        if sub is None:
            continue
        sizes = VISION if "vision" in part else TEXT
        values[part] = {"model_type": sub.model_type, **_fitting(type(sub), sizes), **_rope(sub), **own.pop(part, {})}
    return cls(**{**_fitting(cls, {**TEXT, **VISION}), **values, **own})


def _rope(default: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters whose sections for time, height and width fit small heads."""
    rope = getattr(default, "rope_parameters", None) or {}
    if "mrope_section" not in rope and default.model_type.removesuffix("_text") not in MROPE:
        return {}
    half = int(8 * rope.get("partial_rotary_factor", 1))
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **rope, "mrope_section": sections}}


def _fitting(cls: type, sizes: dict[str, Any]) -> dict[str, Any]:
    names = {*cls.__annotations__, *getattr(cls, "attribute_map", {})}
    for base in cls.__mro__:
        names |= set(vars(base).get("__annotations__", {}))
    return {name: value for name, value in sizes.items() if name in names}


def build(name: str, kind: str = CAUSAL) -> PreTrainedModel:
    """The model, in eval mode on the CPU, with weights that are drawn anew from seed 0."""
    auto = AutoModelForCausalLM if kind == CAUSAL else AutoModelForImageTextToText
    config = config_of(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it has {size} parameters: a size of its config is still large")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        architectures._spread_weights(model)
    return model.float().eval()


def with_images(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Arguments of `generate`: three prompts with an image each, of different lengths, padded on the left.

    Raises:
        ValueError: No usual form of an image fits the model.
    """
    generator = torch.Generator().manual_seed(1)
    side = VISION["image_size"]
    patches = (side // VISION["patch_size"]) ** 2
    grid = torch.tensor([[1, side // VISION["patch_size"], side // VISION["patch_size"]]])
    vision = getattr(model.config, "vision_config", None)
    width = 3 * getattr(vision, "temporal_patch_size", 1) * VISION["patch_size"] ** 2
    pixels = torch.rand(3, 3, side, side, generator=generator)
    forms: list[dict[str, torch.Tensor]] = [
        {"pixel_values": pixels},
        {"pixel_values": torch.rand(3 * patches, width, generator=generator), "image_grid_thw": grid.repeat(3, 1)},
        {"pixel_values": pixels[:, None]},
        {"pixel_values": pixels[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": torch.tensor([[side, side]] * 3)},
        {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * 3)},
        {"pixel_values_images": pixels},
        {
            "pixel_values": torch.rand(3, patches, 3 * VISION["patch_size"] ** 2, generator=generator),
            "pixel_attention_mask": torch.ones(3, patches, dtype=torch.long),
            "spatial_shapes": grid[:, 1:].repeat(3, 1),
        },
    ]
    for form in forms:
        with contextlib.suppress(Exception):  # another form, then
            inputs = {**_prompts_with(model, _image_tokens(model, form)), **form}
            model.generate(**inputs, max_new_tokens=2, eos_token_id=None, pad_token_id=0, do_sample=False)
            return inputs
    raise ValueError("no usual form of an image fits the model")


def _image_tokens(model: PreTrainedModel, form: dict[str, torch.Tensor]) -> int:
    """How many tokens an image takes in a prompt."""
    features = model.base_model.get_image_features(**form, return_dict=True).pooler_output
    rows = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    return rows.reshape(-1, rows.shape[-1]).shape[0] // 3


def _prompts_with(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Prompts of text, an image of so many tokens, and text."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    image = getattr(config, "image_token_id", None)
    image = getattr(config, "image_token_index", None) if image is None else image
    assert image is not None
    rows = []
    for before, behind in ((3, 5), (1, 4), (2, 2)):
        text = torch.randint(3, 90, (before + behind,), generator=generator)
        rows.append(torch.cat([text[:before], torch.full((tokens,), image), text[before:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == image).long()
    return inputs
