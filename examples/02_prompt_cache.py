"""Prompt caching: questions on one document, with the document computed every time, and once (`llmopt=`)."""

import time

import torch

import hf_llmopt  # noqa: F401 - adds the keyword
from hf_llmopt import demo

NEW_TOKENS = 24

model, tokenizer = demo.load()
document = "".join(f"def part_{number}(value):\n    return value + {number}\n\n\n" for number in range(24))
questions = ["def total(values):\n", "class Parts:\n", "def test_parts():\n", "PARTS = ["]
prompts = [tokenizer(document + question, return_tensors="pt") for question in questions]
ways = {"stock": False, "computed": "kv_cache", "found": "prompt_cache"}

for way in ways.values():  # the first call of each way sets itself up
    model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=4, llmopt=way)
held = model.llmopt.cache_prompt(document, tokenizer=tokenizer, llmopt="prompt_cache")
print(f"{held}\n")

tokens = {}
for name, way in ways.items():
    start = time.perf_counter()
    tokens[name] = [model.generate(**p, max_new_tokens=NEW_TOKENS, do_sample=False, llmopt=way) for p in prompts]
    seconds = time.perf_counter() - start
    assert all(map(torch.equal, tokens[name], tokens["stock"])), f"{name} gives other tokens"
    print(f"{name:10} {len(prompts)} answers in {seconds:6.3f} s  same tokens")

stats, figures = model.llmopt.stats, model.llmopt.prompt_cache
assert stats.served_by == "llmopt"
assert stats.cached_tokens >= len(held.tokens) - 4  # the last tokens may be cut otherwise before other text
print(f"\nof the last prompt {stats.cached_tokens} of {stats.prompt_tokens} tokens were found")
print(f"of all prompts {figures.hit_rate:.0%}, in {figures.device_bytes / 2**20:.1f} MiB of pages")

held.unpin()  # from now on it may be evicted
