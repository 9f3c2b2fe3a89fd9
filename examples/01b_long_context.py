"""Long contexts: pages of fewer bytes, what they cost in quality, and tokens that are given up."""

import torch

from hf_llmopt import demo, optimize
from hf_llmopt.bench.quality import perplexity
from hf_llmopt.bench.sample import Sample
from hf_llmopt.demo.corpus import held_out_texts

model, tokenizer = demo.load()
model.bfloat16()
text = "\n\n".join(held_out_texts())
ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :900]
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}

# 1. The same prompt with keys and values of 16, 8 and 4 bits. 4-bit pages hold 3.5 times as many tokens.
sample = Sample.cut(model, tokenizer, [text], context=512, tokens=2_000)
expected = model.generate(**inputs, **settings)
size, quality = {}, {}
for dtype in ("auto", "int8", "int4"):
    output = model.generate(**inputs, **settings, llmopt={"kv_cache": {"dtype": dtype}})
    stats = model.llmopt.stats
    assert stats.served_by == "llmopt"
    size[dtype] = stats.page_bytes
    optimize(
        model, llmopt={"kv_cache": {"dtype": dtype}}
    )  # from here on the model's default, which perplexity reads with
    quality[dtype] = perplexity(model, sample)
    same = int((output == expected)[0, ids.shape[1] :].long().cumprod(0).sum())
    worse = 100 * (quality[dtype].over(quality["auto"]).value - 1)
    print(
        f"{dtype:4}  {size[dtype] / ids.shape[1] / 1024:5.2f} KiB a token, {stats.tokens_per_second:6.1f} tokens/s, "
        f"perplexity {worse:+.2f} %, the first {same} tokens as stock's"
    )
assert size["int8"] < 0.53 * size["auto"]
assert size["int4"] < 0.29 * size["auto"]
assert quality["int8"].over(quality["auto"]).value < 1.01

# 2. A second question about the same text finds its pages, whatever their format.
config = {"kv_cache": {"dtype": "int8"}, "prompt_cache": True}
for _ in range(2):
    model.generate(**inputs, **settings, llmopt=config)
    stats = model.llmopt.stats
    print(f"{stats.cached_tokens} tokens were there, the first new one after {stats.time_to_first_token:.3f} s")
assert model.llmopt.stats.cached_tokens > 0.9 * ids.shape[1]

# 3. Eviction gives tokens up for good. "sink" keeps the first ones and the last ones: memory stays as it is.
for eviction in ({"eviction": "snapkv", "keep_ratio": 0.5}, {"eviction": "sink", "keep_tokens": 128}):
    model.generate(**inputs, **settings, llmopt={"kv_cache": eviction})
    stats = model.llmopt.stats
    assert stats.served_by == "llmopt"
    assert stats.evicted_tokens >= ids.shape[1] // 2
    print(f"{eviction['eviction']}: {stats.evicted_tokens} of {ids.shape[1] + 31} tokens given up")
