"""Whole checkpoints that other packages quantize and save: config.json, model.safetensors, and hashes of the weights.

Of one small random Llama. A weight is what the package's own code reads, as `packages.py` has it; the hash is over its
bytes in float16.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import packages
import torch
from run import FIXTURES, digest
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_llmopt.quantization.formats import Recipe

GROUP = 32
SAMPLES = [torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(16)]


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).half()


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Packages want one beside the model, also where they are given token ids."""
    words = {f"w{n}": n for n in range(96)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0")


def gptqmodel(source: Path, target: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=GROUP, offload_to_disk=False), device="cpu")
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in SAMPLES]
    model.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(target))


def autoawq(source: Path, target: Path) -> None:
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu")
    config = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    # Its search for clips takes outputs by 64, which are more than this model's keys have.
    model.quantize(None, config, calib_data=SAMPLES, max_calib_samples=8, max_calib_seq_len=64, apply_clip=False)
    model.save_quantized(str(target))


def compressed_tensors(source: Path, target: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            grouped = module.weight.unflatten(1, (-1, GROUP))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))


# What quantizes and saves a model, and what reads one weight.
WRITERS: dict[str, tuple[Callable[[Path, Path], None], Callable[..., torch.Tensor]]] = {
    "gptqmodel": (gptqmodel, packages.gptqmodel_read),
    "autoawq": (autoawq, packages.autoawq_read),
    "compressed-tensors": (compressed_tensors, packages.compressed_tensors_read),
}


def write(package: str) -> None:
    quantize, read = WRITERS[package]
    folder = FIXTURES / f"{package}-llama"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as room:
        source, target = Path(room, "source"), Path(room, "target")
        model = small_llama()
        model.save_pretrained(source)
        small_tokenizer().save_pretrained(source)
        with contextlib.chdir(room):  # GPTQModel leaves its log where it stands
            quantize(source, target)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(target / name, folder / name)
    recipe = Recipe.from_dict(AutoConfig.from_pretrained(folder).quantization_config)
    hashes = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name, module in model.named_modules():
            scheme = recipe.scheme_of(name, module)
            if scheme is not None:
                keys = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118 - no mapping
                stored = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in keys}
                weight = read(stored, scheme, module.out_features, module.in_features)
                hashes[name] = digest(weight.half())
    (folder / "weights.json").write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{folder.name}: {len(hashes)} quantized weights")


if __name__ == "__main__":
    for package in WRITERS:
        write(package)
