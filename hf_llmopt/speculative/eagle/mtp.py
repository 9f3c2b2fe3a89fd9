"""Multi-token prediction: a layer that some models were trained with, and that lies in their own files.

It reads what the head reads, and tells one token more (DeepSeek-V3, arXiv 2412.19437). Fed with its own output it tells
the ones behind as well. transformers knows which models have such layers and what the files call them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers.modeling_layers
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ...attention import configs_of
from ...errors import InvalidCheckpoint, InvalidOption
from ...kv_cache import LayerSpec
from .files import find


class MtpHead(nn.Module):
    """The first of a model's MTP layers, as what a `Follower` follows texts with.

    Args:
        mtp: transformers' `MtpModel`.
        last: What the model's last layer stores for a token.
        layers: How many the model has.
    """

    def __init__(self, mtp: Any, last: LayerSpec, layers: int) -> None:
        super().__init__()
        self.mtp = mtp
        self.needs: tuple[int, ...] = (layers,)
        own = mtp.config
        sliding = (getattr(own, "layer_types", None) or ["full_attention"])[0] == "sliding_attention"
        kind, window = ("sliding", own.sliding_window) if sliding else ("full", 0)
        weight = mtp.layers[0].eh_proj.weight
        shape = last.kv_heads, last.key_dim, last.value_dim
        self._spec = LayerSpec(kind, window, *shape, weight.dtype, weight.device)
        self.configs = configs_of(mtp)

    @property
    def specs(self) -> list[LayerSpec]:
        """What it stores for a token."""
        return [self._spec]

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """What the layer reads: the states themselves, `[tokens, hidden]`."""
        return features[0]

    def forward(self, ids: Tensor, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """As `EagleModel.forward`."""
        mtp, places = self.mtp, positions[None]
        embeds = mtp.embed_tokens(ids)[None].to(hidden.dtype)
        turns = None
        if mtp.rotary_emb is not None:
            named = {"layer_type": mtp.config.layer_types[0]} if mtp.has_per_layer_rope else {}
            turns = mtp.rotary_emb(embeds, position_ids=places, **named)
        found = mtp.layers[0](embeds, hidden[None], turns, None, places, cache)
        return mtp.shared_post_norm(found)[0] if mtp.use_shared_post_norm else found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """As `EagleModel.logits`."""
        logits: Tensor = self.mtp._project_to_logits(hidden)
        return logits


def load_mtp(model: PreTrainedModel, last: LayerSpec, layers: int) -> MtpHead:
    """The MTP layer in a model's files.

    Args:
        model: The model, which was loaded from them.
        last: What its last layer stores for a token.
        layers: How many it has.

    Raises:
        InvalidOption: The model has no MTP layers, or transformers does not know of such.
        InvalidCheckpoint: Its files lack them, or hold them quantized.
    """
    kind = getattr(transformers.modeling_layers, "MtpModel", None)
    if kind is None:
        raise InvalidOption(
            f"method='mtp' needs transformers' MtpModel, which {transformers.__version__} does not have and 5.23 has."
        )
    if not getattr(model.config.get_text_config(), "num_mtp_layers", None):
        raise InvalidOption(
            f"method='mtp': {type(model).__name__} has no num_mtp_layers. Use 'suffix' or 'draft_model'."
        )
    name = model.config.name_or_path
    config = find(name, "config.json") if name else None
    if config is None:
        raise InvalidOption("method='mtp' reads the model's own files, and this one was not loaded from any.")
    if "quantization_config" in json.loads(config.read_text("utf-8")):
        raise InvalidCheckpoint(f"method='mtp': the files of {name} are quantized, and their MTP layers are not read.")
    try:
        with torch.random.fork_rng(devices=[]):  # the user's seed must not notice
            mtp: Any = kind.from_pretrained(model, device_map={"": last.device})
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        why = "the model is quantized, and they are not" if getattr(model, "is_quantized", False) else error
        raise InvalidCheckpoint(f"method='mtp': the MTP layers of {name} cannot be read: {why}") from error
    return MtpHead(mtp, last, layers)
