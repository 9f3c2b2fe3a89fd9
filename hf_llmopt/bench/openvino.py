"""OpenVINO on the very same model, without optimum-intel, which asks for an older transformers.

The model is traced with its keys and values as inputs and outputs, which OpenVINO then keeps as its own state: the form
in which optimum-intel exports models, and for which OpenVINO has its fused attention.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class Peer:
    """A model in OpenVINO on the CPU.

    Args:
        model: Whose layers all keep keys and values of one shape for all tokens.
        threads: For its operations.
    """

    def __init__(self, model: PreTrainedModel, threads: int) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        self._openvino = openvino
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        self._heads = config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // heads
        past = [torch.zeros(2, self._heads, 3, self._width) for _ in range(2 * config.num_hidden_layers)]
        example = {
            "input_ids": torch.ones(2, 4, dtype=torch.long),
            "position_ids": torch.arange(3, 7).repeat(2, 1),
            "mask": torch.zeros(2, 1, 4, 7),
            "past": past,
        }
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of branches on what is the same in every step
            traced = openvino.convert_model(_Stepped(copy.deepcopy(model).float()), example_input=example)
        names = ["input_ids", "position_ids", "mask", *(f"past.{number}" for number in range(len(past)))]
        for name, port in zip(names, traced.inputs, strict=True):
            port.get_tensor().set_names({name})
        for number, port in enumerate(traced.outputs):
            port.get_tensor().set_names({"logits" if number == 0 else f"present.{number - 1}"})
        kept = [-1, self._heads, -1, self._width]
        shapes = {"input_ids": [-1, -1], "position_ids": [-1, -1], "mask": [-1, 1, -1, -1]}
        traced.reshape({name: openvino.PartialShape(shapes.get(name, kept)) for name in names})
        apply_make_stateful_transformation(traced, {f"past.{n}": f"present.{n}" for n in range(len(past))})
        numbers = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(model.dtype, "f32")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": numbers,
            "KV_CACHE_PRECISION": numbers,
        }
        self._request = openvino.Core().compile_model(traced, "CPU", settings).create_infer_request()

    def generate(self, ids: Tensor, new_tokens: int) -> tuple[list[list[int]], float, float]:
        """Decode greedily behind prompts of one length.

        Args:
            ids: `[rows, tokens]`.
            new_tokens: For each row.

        Returns:
            The new tokens of each row, the seconds of the call, and those to the first token.
        """
        began = perf_counter()
        rows = len(ids)
        self._request.reset_state()
        for state in self._request.query_state():
            state.state = self._openvino.Tensor(np.zeros((rows, self._heads, 0, self._width), np.float32))
        following, start, first = ids.numpy(), 0, 0.0
        found: list[np.ndarray[Any, Any]] = []
        while len(found) < new_tokens:
            count = following.shape[1]
            end = start + count
            mask = np.triu(np.full((count, end), np.finfo(np.float32).min, np.float32), start + 1)
            given = {
                "input_ids": following,
                "position_ids": np.arange(start, end)[None].repeat(rows, 0),
                "mask": np.broadcast_to(mask, (rows, 1, count, end)).copy(),
            }
            logits = self._request.infer(given, share_outputs=True)["logits"]
            following, start = logits[:, -1].argmax(-1)[:, None], end
            found.append(following)
            first = first or perf_counter() - began
        return np.concatenate(found, 1).tolist(), perf_counter() - began, first


class _Stepped(nn.Module):
    """A model as a function of tokens and past keys and values, which gives the last logits and all keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor, past: Sequence[Tensor]) -> tuple[Any, ...]:
        """Logits `[rows, 1, vocabulary]`, then keys and values of each layer."""
        cache: Any = DynamicCache()
        cache.layers = []
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer: Any = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return (output.logits[:, -1:], *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))
