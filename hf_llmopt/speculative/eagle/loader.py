"""Drafters from the files of SafeAILab's EAGLE, of SpecForge, DeepSpec and `speculators`.

They name the same tensors a little differently, and so where in the model they read. Whatever is optional (biases,
norms of queries and keys, embeddings, a vocabulary of its own) is there if its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ...errors import InvalidCheckpoint, InvalidOption
from .files import read
from .model import EagleModel, FirstLayer, Shape

# What names the layers whose hidden states are read, and what turns its numbers into indices of `hidden_states`: one
# counts the states before a layer, the other those behind it.
LAYER_IDS = {"eagle_aux_hidden_state_layer_ids": 0, "target_layer_ids": 1}
LAYER_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers differ in what is optional here
NOT_READ = ("d2t", "t2d", "verifier_norm.weight", "verifier_lm_head.weight")


def load_eagle(name: str, target: PreTrainedModel) -> EagleModel:
    """A drafter for a model.

    Args:
        name: Its folder, or its name on the hub.
        target: The model, whose embeddings and head serve where the drafter has none.

    Raises:
        InvalidOption: There is no such drafter, or it was made for another model.
        InvalidCheckpoint: Its files are damaged, or of a kind that is not known.
    """
    options, tensors = read(name)
    where = f"draft_model={name!r}"
    kind = options.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise InvalidCheckpoint(f"{where} is a {kind!r} speculator. Of those, method='eagle' reads 'eagle3' alone.")
    options = {**(options.get("eagle_config") or {}), **options}
    layer: dict[str, Any] = options.get("transformer_layer_config") or options
    if (layer_type := layer.get("model_type", "llama")) not in LAYER_TYPES:
        raise InvalidCheckpoint(f"{where} has layers of {layer_type!r}; known are {', '.join(LAYER_TYPES)}.")
    first = "midlayer." if any(key.startswith("midlayer.") for key in tensors) else "layers.0."
    renamed = {key.replace(first, "layers.0.", 1): tensor for key, tensor in tensors.items()}
    kept = {key: tensor for key, tensor in renamed.items() if not key.endswith("rotary_emb.inv_freq")}
    return _Plan(where, options, layer, kept, first, target).build()


def check_fits(model: EagleModel, target: PreTrainedModel, device: torch.device) -> None:
    """Refuse a drafter that was made for another model.

    Raises:
        InvalidOption: Its sizes are others, or it lies on another device.
    """
    text = target.config.get_text_config(decoder=True)
    made, is_now = (model.shape.target_hidden, model.shape.vocabulary), (text.hidden_size, text.vocab_size)
    if made != is_now:
        raise InvalidOption(
            f"draft_model was made for a model of hidden size {made[0]} with {made[1]} tokens; this one has "
            f"{is_now[0]} and {is_now[1]}."
        )
    if model.fc.weight.device != device:
        raise InvalidOption(f"draft_model lies on {model.fc.weight.device}, the model on {device}.")


class _Parts(NamedTuple):
    """The classes of a drafter's modules."""

    config: Any
    layer: Any
    norm: Any
    rotary: Any


LLAMA = _Parts(LlamaConfig, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding)
QWEN3 = _Parts(Qwen3Config, qwen3.Qwen3DecoderLayer, qwen3.Qwen3RMSNorm, qwen3.Qwen3RotaryEmbedding)


class _Plan:
    """What a drafter's files hold, and the modules that are made of them.

    Args:
        where: Which drafter, for messages.
        options: Its config.
        layer: The part of it that describes the layers.
        tensors: By names in which the first layer is `layers.0.`.
        first: What it is in the files.
        target: The model.
    """

    def __init__(
        self,
        where: str,
        options: dict[str, Any],
        layer: dict[str, Any],
        tensors: dict[str, Tensor],
        first: str,
        target: Any,
    ) -> None:
        self.where, self.options, self.tensors, self.first, self.target = where, options, tensors, first, target
        text = target.config.get_text_config(decoder=True)
        self.target_hidden, self.vocabulary = text.hidden_size, text.vocab_size
        self.target_layers = text.num_hidden_layers
        if (known := layer.get("vocab_size", self.vocabulary)) != self.vocabulary:
            raise InvalidOption(f"{where} was made for a model of {known} tokens; this one has {self.vocabulary}.")
        self.parts = QWEN3 if any(key.endswith(".q_norm.weight") for key in tensors) else LLAMA
        named = {key: value for key, value in layer.items() if key not in ("model_type", "architectures")}
        count = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
        self.config = self.parts.config(**{**named, "num_hidden_layers": count, "attn_implementation": "sdpa"})
        self.hidden: int = self.config.hidden_size
        self.concatenates = any(key.endswith("hidden_norm.weight") for key in tensors)

    def build(self) -> EagleModel:
        """The drafter.

        Raises:
            InvalidOption: It was made for another model.
            InvalidCheckpoint: Tensors are missing, unknown, or of another shape.
        """
        if "fc.weight" not in self.tensors or not self.config.num_hidden_layers:
            raise InvalidCheckpoint(
                f"{self.where} is no EAGLE drafter: it has no fc.weight, or no layer (midlayer.*, layers.0.*)."
            )
        width = self.tensors["fc.weight"].shape[-1]
        count = self._features(width)
        shape = Shape(
            self._needs(count),
            self.target_hidden,
            self.vocabulary,
            self.concatenates,
            bool(self.options.get("norm_before_residual")),
            bool(self.options.get("norm_output")),
        )
        device, dtype = self.target.get_input_embeddings().weight.device, self.target.dtype
        with torch.device("meta"):  # nothing is drawn: the user's seed must not notice
            layers = [self._layer(index, shape) for index in range(self.config.num_hidden_layers)]
            fc = nn.Linear(width, self.hidden, bias="fc.bias" in self.tensors)
            whole = self._norm(width) if self._has("norm_before_fc", "input_norm.weight") else None
            single = self._has("fc_norm", "fc_norm.0.weight")
            own = [self._norm(self.target_hidden) for _ in range(count if single else 0)]
            norm = self._norm(self.hidden) if self.concatenates else None
            embeddings, head = self._embeddings(), self._head()
        rotary = self.parts.rotary(self.config).to(device)
        targets = self._targets(device)
        model = EagleModel(self.config, shape, layers, embeddings, fc, whole, own, norm, head, rotary, targets)
        self._fill(model, device, dtype)
        return model

    def _features(self, width: int) -> int:
        """How many features `fc` reads, by its width."""
        count, rest = divmod(width, self.target_hidden)
        if not self.concatenates:  # the embedding is one of both
            count, rest = count - 1, rest + (count != 2 or self.hidden != self.target_hidden)
        if rest or not count:
            raise InvalidOption(
                f"{self.where}: fc.weight reads {width} numbers, and this model's hidden states have "
                f"{self.target_hidden}: the drafter was made for another model."
            )
        return count

    def _needs(self, count: int) -> tuple[int, ...]:
        layers = self.target_layers
        if not self.concatenates:
            return (layers,)
        named = [name for name in LAYER_IDS if self.options.get(name) is not None]
        name = named[0] if named else "the usual layers"
        ids = self.options[name] if named else (2, layers // 2, layers - 3)
        needs = tuple(int(index) + LAYER_IDS.get(name, 0) for index in ids)
        if len(needs) != count or not all(0 <= index <= layers for index in needs):
            raise InvalidOption(
                f"{self.where} reads {count} of this model's layers, of which it has {layers}, and {name} are "
                f"{list(ids)}: the drafter was made for another model, or its config is not complete."
            )
        return needs

    def _has(self, option: str, tensor: str) -> bool:
        return bool(self.options.get(option)) or tensor in self.tensors

    def _norm(self, width: int) -> Any:
        return self.parts.norm(width, eps=self.config.rms_norm_eps)

    def _layer(self, index: int, shape: Shape) -> Any:
        layer = self.parts.layer(self.config, index)
        first = index == 0
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                wide = first and shape.concatenates and name.split(".")[-1] in ("q_proj", "k_proj", "v_proj")
                bias = f"layers.{index}.{name}.bias" in self.tensors
                product = nn.Linear(module.in_features * (1 + wide), module.out_features, bias)
                layer.set_submodule(name, product)
        if first and shape.concatenates:
            return FirstLayer(layer, self._norm(self.hidden), shape.norm_before_residual)
        if first:
            layer.input_layernorm = nn.Identity()
        return layer

    def _embeddings(self) -> Any:
        if "embed_tokens.weight" in self.tensors:
            return nn.Embedding(self.vocabulary, self.hidden)
        return self._borrowed("embed_tokens.weight", self.target.get_input_embeddings())

    def _head(self) -> Any:
        if (weight := self.tensors.get("lm_head.weight")) is not None:
            return nn.Linear(self.hidden, len(weight), bias=False)
        return self._borrowed("lm_head.weight", self.target.get_output_embeddings())

    def _borrowed(self, name: str, module: Any) -> Any:
        if self.hidden != self.target_hidden or (name == "lm_head.weight" and "d2t" in self.tensors):
            raise InvalidCheckpoint(f"{self.where} has no {name}, and the model's own does not fit it.")
        return module

    def _targets(self, device: torch.device) -> Tensor | None:
        """The model's id of each token of the drafter."""
        head, offsets = self.tensors.get("lm_head.weight"), self.tensors.get("d2t")
        rows = self.vocabulary if head is None else len(head)
        if offsets is None:
            if rows != self.vocabulary:
                raise InvalidCheckpoint(
                    f"{self.where} knows {rows} of the model's {self.vocabulary} tokens, and no d2t says which."
                )
            return None
        targets = torch.arange(len(offsets)) + offsets.long()
        inside = torch.zeros(self.vocabulary, dtype=torch.bool)
        fits = len(offsets) == rows and bool(((targets >= 0) & (targets < self.vocabulary)).all())
        if fits:
            inside[targets] = True
            marked = self.tensors.get("t2d", inside).bool()
            fits = int(inside.sum()) == rows and torch.equal(marked, inside)
        if not fits:
            raise InvalidCheckpoint(
                f"{self.where}: d2t, t2d and lm_head.weight do not name the same {rows} of {self.vocabulary} tokens."
            )
        return targets.to(device)

    def _fill(self, model: EagleModel, device: torch.device, dtype: torch.dtype) -> None:
        borrowed = ("embed_tokens.", "lm_head.")
        wanted = {
            key: tensor.shape
            for key, tensor in model.state_dict().items()
            if key in self.tensors or not key.startswith(borrowed)
        }
        given = {key: tensor.shape for key, tensor in self.tensors.items() if key not in NOT_READ}
        if wanted != given:
            raise InvalidCheckpoint(
                f"{self.where} does not hold what its config describes: "
                f"{_difference(self._as_in_files(wanted), self._as_in_files(given))}"
            )
        own = {key: self.tensors[key].to(device, dtype) for key in wanted}
        model.load_state_dict(own, strict=False, assign=True)
        for key, parameter in model.named_parameters():
            if key in own:  # what is borrowed stays as it is
                parameter.requires_grad_(False)

    def _as_in_files(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """The same under the names that the files have, or would have."""
        return {key.replace("layers.0.", self.first, 1): shape for key, shape in shapes.items()}


def _difference(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is missing, what is too much, and what has another shape; a few of each."""
    found = []
    for what, names in (
        ("missing are", wanted.keys() - given.keys()),
        ("unknown are", given.keys() - wanted.keys()),
    ):
        if names:
            found.append(f"{what} {', '.join(sorted(names)[:4])}{' and others' * (len(names) > 4)}")
    for key in sorted(wanted.keys() & given.keys()):
        if wanted[key] != given[key]:
            found.append(f"{key} is {tuple(given[key])}, expected {tuple(wanted[key])}")
    return "; ".join(found[:6]) + "."
