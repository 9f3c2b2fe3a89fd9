"""A file format of quantized weights of your own: two codes of 4 bits in a byte, the even input in the low half."""

import tempfile

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_llmopt
from hf_llmopt import QuantizationConfig, demo
from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.quantization.formats import Format


def layout(scheme, outputs, inputs, dtype):
    """Shape and dtype of every tensor that a weight `[outputs, inputs]` stores; scales are in `dtype`."""
    return {
        "nibbles": ((outputs, inputs // 2), torch.uint8),
        "scales": ((outputs, scheme.groups(inputs)), dtype),
    }


def pack(grid, scheme, dtype):
    """A `Grid`, `scale * (code - 8)`, to these tensors."""
    return {"nibbles": grid.codes[:, ::2] | grid.codes[:, 1::2] << 4, "scales": grid.scales.to(dtype)}


def unpack(stored, scheme, outputs, inputs):
    """And back, bit for bit."""
    codes = torch.stack([stored["nibbles"] & 15, stored["nibbles"] >> 4], dim=2)
    return Grid(codes.reshape(outputs, inputs), stored["scales"], None, 4)


def obstacle(scheme, outputs, inputs):
    """Why a weight cannot be stored so, or `None`."""
    if scheme.bits != 4 or not scheme.symmetric:
        return "it holds symmetric codes of 4 bits only"
    return (
        "its inputs do not fall into whole groups" if scheme.group_size != -1 and inputs % scheme.group_size else None
    )


hf_llmopt.register("format", "nibbles", Format(layout, pack, unpack, obstacle))

if __name__ == "__main__":
    logging.disable_progress_bar()
    tokenizer = demo.load()[1]
    inputs = tokenizer(demo.PROMPTS[0], return_tensors="pt")
    keyword = {"quantization": QuantizationConfig("int4", format="nibbles")}
    model = AutoModelForCausalLM.from_pretrained(demo.path(), llmopt=keyword)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, llmopt=True)  # config.json says: quant_method nibbles
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    output = again.generate(**inputs, max_new_tokens=16)
    assert again.llmopt.stats.served_by == "llmopt"
    print(again.config.quantization_config.to_dict())
    print(tokenizer.decode(output[0]))
