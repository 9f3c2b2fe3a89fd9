"""Continuous batching: requests of different lengths share every step, and each gets the tokens it would get alone."""

import time

from transformers import pipeline

import hf_llmopt
from hf_llmopt import Engine, demo

model, tokenizer = demo.load()
prompts = [tokenizer(text)["input_ids"] for text in demo.PROMPTS] * 4
lengths = [8 + 8 * (index % 6) for index in range(len(prompts))]  # a padded batch would run to the longest

# 1. One by one with stock generate, then all at once through an engine.
alone = []
start = time.perf_counter()
for ids, count in zip(prompts, lengths, strict=True):
    inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
    alone.append(model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist())
seconds = time.perf_counter() - start

with Engine(model, llmopt="continuous_batching") as engine:
    engine.submit(prompts[0], max_new_tokens=2).result()  # the first request sets the engine up
    start = time.perf_counter()
    handles = [
        engine.submit(ids, max_new_tokens=count, do_sample=False) for ids, count in zip(prompts, lengths, strict=True)
    ]
    together = [handle.result() for handle in handles]
    ours = time.perf_counter() - start
    assert together == alone, "the same tokens"
    total = sum(map(len, together))
    print(f"one by one {total / seconds:7.1f} tokens/s")
    print(f"together   {total / ours:7.1f} tokens/s, the same tokens")

    # 2. Requests may ask for different things in the same steps, and one may be cancelled at any moment.
    sampled = engine.submit(prompts[0], max_new_tokens=16, do_sample=True, temperature=0.8, seed=7, logprobs=2)
    long = engine.submit(prompts[1], max_new_tokens=500)
    next(iter(long))
    long.cancel()
    print(tokenizer.decode(sampled.result()))
    print("its first token:", sampled.logprobs[0])

# 3. The pipeline: an iterator in, an iterator out; results come while later inputs still wait.
complete = pipeline("text-generation", model=model, tokenizer=tokenizer, llmopt="continuous_batching")
texts = (text for text in demo.PROMPTS)
for number, outputs in complete.as_completed(texts, max_new_tokens=12, do_sample=False):
    print(number, repr(outputs[0]["generated_text"][-30:]))
complete.close()

# 4. Token ids in, token ids out.
assert hf_llmopt.generate_batch(model, prompts[:3], max_new_tokens=8, do_sample=False) == [
    tokens[:8] for tokens in alone[:3]
]
