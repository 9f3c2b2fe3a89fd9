"""The drafter of EAGLE-3 (Li et al. 2025, arXiv 2503.01840), and that of EAGLE-1 and -2 (arXiv 2401.15077, 2406.16858).

Features of token t are what the model computed for it in some of its layers. From them and from token t + 1 a decoder
layer tells token t + 2. Its output stands in for the features of t + 1, which nobody has computed yet; so it tells
t + 3 as well, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...kv_cache import LayerSpec


@dataclass(frozen=True)
class Shape:
    """What a drafter is, besides its tensors.

    Attributes:
        needs: Indices into the model's `hidden_states`, 0 for the embeddings, of the features.
        target_hidden: Width of one of them.
        vocabulary: Tokens of the model.
        concatenates: EAGLE-3: the first layer attends over embedding and features side by side. Else they are added up
            before it, as in EAGLE-1.
        norm_before_residual: The first layer adds to its normed features.
        norm_output: What is fed back is normed.
    """

    needs: tuple[int, ...]
    target_hidden: int
    vocabulary: int
    concatenates: bool = True
    norm_before_residual: bool = False
    norm_output: bool = False


class FirstLayer(nn.Module):
    """A decoder layer that attends over embedding and features side by side.

    Args:
        layer: A decoder layer whose queries, keys and values are made of twice its width.
        hidden_norm: Of the features.
        norm_before_residual: As in `Shape`.
    """

    def __init__(self, layer: Any, hidden_norm: nn.Module, norm_before_residual: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.hidden_norm = hidden_norm
        self.norm_before_residual = norm_before_residual

    def forward(self, embeds: Tensor, hidden: Tensor, **arguments: Any) -> Tensor:
        """All `[1, tokens, hidden]`; `arguments` are those of a decoder layer."""
        normed = self.hidden_norm(hidden)
        attended, _ = self.self_attn(torch.cat([self.input_layernorm(embeds), normed], dim=-1), **arguments)
        hidden = (normed if self.norm_before_residual else hidden) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleModel(nn.Module):
    """A drafter; `load_eagle` makes one.

    Args:
        config: Of its layers.
        shape: What else it is.
        layers: The first one is a `FirstLayer` where the shape says so.
        embed_tokens: Embeddings; the model's own may serve.
        fc: Makes one feature of all; of embedding and feature in EAGLE-1.
        feature_norm: Of all features side by side, before `fc`.
        feature_norms: Of each feature.
        norm: Before the head; `None` in EAGLE-1.
        lm_head: The model's own may serve.
        rotary: Rotary embedding of the layers.
        targets: The model's id of each of the drafter's tokens, `[draft vocabulary]`; `None` where they are the same.
    """

    def __init__(
        self,
        config: Any,
        shape: Shape,
        layers: Sequence[nn.Module],
        embed_tokens: nn.Module,
        fc: nn.Linear,
        feature_norm: nn.Module | None,
        feature_norms: Sequence[nn.Module],
        norm: nn.Module | None,
        lm_head: nn.Module,
        rotary: nn.Module,
        targets: Tensor | None,
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.layers = nn.ModuleList(layers)
        self.embed_tokens, self.fc, self.norm, self.lm_head = embed_tokens, fc, norm, lm_head
        self.input_norm, self.fc_norm = feature_norm, nn.ModuleList(feature_norms)
        self.rotary_emb = rotary
        self.targets = targets
        self.needs = shape.needs
        self.configs = [config]

    @property
    def specs(self) -> list[LayerSpec]:
        """What each layer stores for a token."""
        own, weight = self.config, self.fc.weight
        sliding = set(getattr(own, "layer_types", None) or ()) == {"sliding_attention"}
        kind, window = ("sliding", own.sliding_window) if sliding else ("full", 0)
        shape = own.num_key_value_heads, own.head_dim, own.head_dim
        return [LayerSpec(kind, window, *shape, weight.dtype, weight.device)] * len(self.layers)

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """What the first layer reads of features, each `[tokens, target hidden]`: `[tokens, hidden]`."""
        if not self.shape.concatenates:
            return features[0]
        if self.fc_norm:
            features = [norm(feature) for norm, feature in zip(self.fc_norm, features, strict=True)]
        joined = torch.cat(list(features), dim=-1)
        return self.fc(joined if self.input_norm is None else self.input_norm(joined))

    def forward(self, ids: Tensor, hidden: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The layers' output.

        Args:
            ids: Tokens, each one place behind its features, `[tokens]`.
            hidden: What `fuse` gives, or what stands in for it, `[tokens, hidden]`.
            positions: Of the features' tokens, `[tokens]`.
            cache: Handed to attention.

        Returns:
            `[tokens, hidden]`: as `hidden`, one place further.
        """
        hidden, embeds = hidden[None], self.embed_tokens(ids)[None].to(hidden.dtype)
        arguments: dict[str, Any] = {
            "position_embeddings": self.rotary_emb(hidden, positions[None]),
            "attention_mask": None,
            "past_key_values": cache,
        }
        first, *others = self.layers
        if self.shape.concatenates:
            hidden = first(embeds, hidden, **arguments)
        else:
            hidden = first(self.fc(torch.cat([embeds, hidden], dim=-1)), **arguments)
        for layer in others:
            hidden = layer(hidden, **arguments)
        if self.shape.norm_output and self.norm is not None:
            hidden = self.norm(hidden)
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the layers' output `[rows, hidden]`, in the model's vocabulary, `[rows, vocabulary]`."""
        if self.norm is not None and not self.shape.norm_output:
            hidden = self.norm(hidden)
        logits: Tensor = self.lm_head(hidden)
        if self.targets is None:
            return logits
        full = logits.new_full((len(logits), self.shape.vocabulary), float("-inf"))
        return full.index_copy_(1, self.targets, logits)
