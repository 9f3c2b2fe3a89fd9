"""MTP layers of a model's own files: guesses are those of transformers' own, and tokens those of plain decoding."""

from __future__ import annotations

import json

import pytest
import torch
import transformers.modeling_layers
from architectures import build
from safetensors.torch import load_file, save_file
from test_speculative import GREEDY, SAMPLED, drafted, generate, prompts
from transformers import AutoModelForCausalLM

from hf_llmopt import SpeculativeConfig
from hf_llmopt.errors import InvalidCheckpoint, InvalidOption
from hf_llmopt.speculative import DraftModelDrafter

LAYERS = 3
HAS_MTP = hasattr(transformers.modeling_layers, "MtpModel")
MTP = {"speculative": {"method": "mtp", "num_tokens": 3}}
needs_mtp = pytest.mark.skipif(not HAS_MTP, reason="this transformers has no MtpModel")
pytestmark = pytest.mark.usefixtures("cheap_guesses")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A DeepSeek-V3 with one MTP layer in its files, named as in the published ones."""
    model = build("deepseek_v3", num_mtp_layers=1)
    kind = type(model)
    # Which names are left out when a model is loaded is written down for the published number of layers.
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{LAYERS}.*"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"model.layers.{LAYERS - 1}.")}
    for name, tensor in own.items():
        drawn = 1.5 * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        drawn = drawn if tensor.dim() > 1 or "bias" in name else 1 + drawn
        tensors[name.replace(f"layers.{LAYERS - 1}.", f"layers.{LAYERS}.")] = drawn
    size = model.config.hidden_size
    for name, shape in (
        ("enorm", (size,)),
        ("hnorm", (size,)),
        ("shared_head.norm", (size,)),
        ("eh_proj", (size, 2 * size)),
    ):
        drawn = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        tensors[f"model.layers.{LAYERS}.{name}.weight"] = drawn if len(shape) > 1 else 1 + drawn
    tensors[f"model.layers.{LAYERS}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{LAYERS}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@torch.no_grad()
def own_guesses(model, mtp, tokens: list[int], count: int) -> list[int]:
    """By transformers' forward of the layer, over the whole text each time."""
    hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][:, :-1]
    ids = torch.tensor([tokens[1:]])
    for _ in range(count):
        cache = transformers.DynamicCache(config=mtp.config)
        found = mtp.forward_layer(0, hidden, torch.arange(ids.shape[1])[None], cache, input_ids=ids)
        token = mtp.shared_head(found[:, -1]).argmax(-1, keepdim=True)
        ids, hidden = torch.cat([ids, token], 1), torch.cat([hidden, found[:, -1:]], 1)
    return ids[0, -count:].tolist()


@needs_mtp
@pytest.mark.parametrize("rows", [1, 3])
def test_guesses_are_those_of_transformers_layer(files, monkeypatch, rows):
    seen, propose = [], DraftModelDrafter.propose

    def recorded(self, texts, limits, odds):
        before = [list(text.tokens) for text in texts]
        drafts = propose(self, texts, limits, odds)
        seen.extend((tokens, draft.tokens) for tokens, draft in zip(before, drafts, strict=True) if draft.tokens)
        return drafts

    monkeypatch.setattr(DraftModelDrafter, "propose", recorded)
    model = AutoModelForCausalLM.from_pretrained(files).eval()
    for arguments in (SAMPLED, GREEDY):
        seen.clear()
        expected = generate(model, prompts(rows), None, **arguments)
        assert generate(model, prompts(rows), MTP, **arguments) == expected
        assert drafted(model).drafted_tokens > 0
    mtp = transformers.modeling_layers.MtpModel.from_pretrained(model)
    assert len(seen) > 5 * rows
    for tokens, guesses in seen:
        assert guesses == own_guesses(model, mtp, tokens, len(guesses))


@needs_mtp
def test_use_mtp_chooses_the_drafter_for_any_number_of_rows(files):
    model = AutoModelForCausalLM.from_pretrained(files).eval()
    expected = generate(model, prompts(2), None, **GREEDY)
    assert generate(model, prompts(2), True, use_mtp=True, **GREEDY) == expected  # stock refuses two rows
    assert drafted(model).drafted_tokens > 0
    assert model.llmopt.engine.config.speculative.method == "mtp"


@needs_mtp
def test_what_is_not_there_is_named(files):
    inputs, name = prompts(), "model.safetensors"
    with pytest.raises(InvalidOption, match="LlamaForCausalLM has no num_mtp_layers"):
        generate(build("llama"), inputs, MTP, **GREEDY)
    with pytest.raises(InvalidOption, match="was not loaded from any"):
        generate(build("deepseek_v3", num_mtp_layers=1), inputs, MTP, **GREEDY)
    model = AutoModelForCausalLM.from_pretrained(files).eval()
    tensors = load_file(files / name)
    save_file({key: tensor for key, tensor in tensors.items() if "eh_proj" not in key}, files / name, {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"cannot be read: .*eh_proj"):
        generate(model, inputs, MTP, **GREEDY)
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InvalidCheckpoint, match="are quantized"):
        generate(model, inputs, MTP, **GREEDY)
    with pytest.raises(InvalidOption, match="no other method takes one"):
        SpeculativeConfig("mtp", "somewhere")


def test_an_older_transformers_is_told_what_is_missing(monkeypatch):
    monkeypatch.delattr(transformers.modeling_layers, "MtpModel", raising=False)
    with pytest.raises(InvalidOption, match="needs transformers' MtpModel"):
        generate(build("llama"), prompts(), MTP, **GREEDY)
