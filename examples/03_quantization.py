"""Quantization: the same model in 16, 8 and 4 bits: how large, how fast, how good, and how to keep it."""

import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_llmopt  # noqa: F401 - adds the keyword
from hf_llmopt import demo
from hf_llmopt.bench import quality
from hf_llmopt.bench.sample import Sample
from hf_llmopt.demo.corpus import held_out_texts

logging.disable_progress_bar()
NEW_TOKENS = 64

full, tokenizer = demo.load(dtype="bfloat16")
inputs = tokenizer(demo.PROMPTS[3], return_tensors="pt")
sample = Sample.cut(full, tokenizer, held_out_texts(), context=256, tokens=2048)
baseline = quality.perplexity(full, sample)
print(f"bfloat16: perplexity {baseline.value:.3f} on {sample.tokens} tokens")

for method in ("int8", "int4"):
    model = AutoModelForCausalLM.from_pretrained(demo.path(), llmopt=method)  # quantized while it is loaded
    model.generate(**inputs, max_new_tokens=4)  # sets itself up
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    seconds = time.perf_counter() - start
    assert model.llmopt.stats.served_by == "llmopt"
    report = model.llmopt.quantization
    print(
        f"{method}: products {report.bytes / report.bytes_before:.2f} times as large, perplexity "
        f"{quality.perplexity(model, sample).over(baseline)} times, {NEW_TOKENS / seconds:.0f} tokens/s"
    )

print(tokenizer.decode(tokens[0]), "\n")

# A standard format: other programs read it too, and `llmopt=True` reads it without another package.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, llmopt=True)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
with torch.no_grad():
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
print("saved and loaded again:", again.config.quantization_config.to_dict()["quant_method"])
