"""The KV cache: the same tokens three ways, without a cache, with the stock cache, and with pages (`llmopt=`)."""

import time

import torch

import hf_llmopt  # noqa: F401 - adds the keyword
from hf_llmopt import demo

NEW_TOKENS = 128

model, tokenizer = demo.load()
inputs = tokenizer(demo.PROMPTS[3], return_tensors="pt")
ways = {
    "no cache": {"use_cache": False},
    "stock cache": {},
    "llmopt": {"llmopt": "kv_cache"},
}

tokens, seconds = {}, {}
for name, arguments in ways.items():
    model.generate(**inputs, max_new_tokens=4, **arguments)  # the first call of each way sets itself up
    start = time.perf_counter()
    tokens[name] = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **arguments
    )
    seconds[name] = time.perf_counter() - start

print(tokenizer.decode(tokens["llmopt"][0]), "\n")
for name in ways:
    assert torch.equal(tokens[name], tokens["no cache"]), f"{name} gives other tokens"
    print(f"{name:12} {seconds[name]:6.3f} s  {NEW_TOKENS / seconds[name]:7.1f} tokens/s  same tokens")

stats = model.llmopt.stats
assert stats.served_by == "llmopt"
print(stats)
