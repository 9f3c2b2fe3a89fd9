"""Flash attention: prompts and plain forward passes without a matrix of scores, with the same results as stock."""

import time

import torch

import hf_llmopt  # noqa: F401 - adds the keyword
from hf_llmopt import AttentionConfig, LLMOptConfig, demo

model, tokenizer = demo.load()
text = "\n".join(demo.PROMPTS) * 40
ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : model.config.max_position_embeddings]

# 1. Plain forwards, as evaluation makes them: a name that transformers knows, and nothing else changes.
logits, seconds = {}, {}
former = model.config._attn_implementation
for name in (former, "llmopt"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        model(ids[:, :256])  # the first call looks which way is faster here
        start = time.perf_counter()
        logits[name] = model(ids).logits
        seconds[name] = time.perf_counter() - start
torch.testing.assert_close(logits["llmopt"], logits[former], atol=1e-3, rtol=1e-3)
for name in logits:
    print(f"{ids.shape[1]:,} tokens in a pass, attention {name!r}: {seconds[name]:.3f} s")
model.set_attn_implementation(former)

# 2. `generate` needs no option. A long prompt and the steps behind it take different kernels; both read pages.
inputs = {"input_ids": ids[:, :600], "attention_mask": torch.ones_like(ids[:, :600])}
settings = {"max_new_tokens": 24, "do_sample": False}
expected = model.generate(**inputs, **settings)
assert torch.equal(model.generate(**inputs, **settings, llmopt=True), expected)
assert model.llmopt.stats.served_by == "llmopt"
print("kernels:", ", ".join(model.llmopt.stats.attention))

# 3. A backend by name: "reference" is the definition in plain torch, slow and plain.
config = LLMOptConfig(attention=AttentionConfig("reference"))
short = {name: tensor[:, :40] for name, tensor in inputs.items()}
output = model.generate(**short, **settings, llmopt=config)
assert torch.equal(output, model.generate(**short, **settings))
print("kernels:", ", ".join(model.llmopt.stats.attention))
