"""Speculative decoding: guesses from the text and from a smaller model, the same tokens in fewer passes (`llmopt=`)."""

import time

import torch

import hf_llmopt  # noqa: F401 - adds the keyword
from hf_llmopt import demo

NEW_TOKENS = 96

model, tokenizer = demo.load()
draft, _ = demo.load(draft=True)
code = "".join(
    f"def read_{name}(path):\n    with open(path) as file:\n        return file.read()\n\n\n" for name in "abcd"
)
prompt = tokenizer(code + "def read_e(path):\n", return_tensors="pt")
ways = {
    "stock": False,
    "plain": "kv_cache",
    "suffix": "speculative",
    "draft model": {"speculative": {"draft_model": draft}},
}

for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7}):
    print("greedy" if not sampling["do_sample"] else "\nsampled, temperature 0.7")
    tokens = {}
    for name, way in ways.items():
        model.generate(**prompt, max_new_tokens=8, llmopt=way)  # the first call of each way sets itself up
        torch.manual_seed(0)
        start = time.perf_counter()
        tokens[name] = model.generate(**prompt, max_new_tokens=NEW_TOKENS, llmopt=way, **sampling)
        seconds = time.perf_counter() - start
        assert torch.equal(tokens[name], tokens["stock"]), f"{name} gives other tokens"
        guesses = ""
        if way:
            stats = model.llmopt.stats
            guesses = f"{stats.accepted_tokens} of {stats.drafted_tokens} guesses right, {stats.steps} passes"
        print(f"{name:12} {seconds:6.3f} s  same tokens  {guesses}")
