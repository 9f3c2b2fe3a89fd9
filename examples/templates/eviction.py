"""An eviction method of your own: keep the tokens that the last query of the prompt attends to (Oren et al. 2024)."""

import torch

import hf_llmopt
from hf_llmopt import demo
from hf_llmopt.kv_cache.eviction import Scored


class LastQuery(Scored):
    """`Scored` keeps, for each key head, the slots with the highest scores when the prompt ends."""

    recent = 8  # last tokens of the prompt that stay whatever their score

    def looks(self, prompt: int) -> range:
        """The tokens whose queries are looked at."""
        return range(prompt - 1, prompt)

    def fold(self, scores: torch.Tensor, seen: torch.Tensor) -> None:
        """Take note of what they pay: scores [kv_heads, slots], seen [kv_heads, heads each, queries, slots]."""
        scores += seen.sum(dim=(1, 2))


hf_llmopt.register("eviction", "last_query", LastQuery)

if __name__ == "__main__":
    model, tokenizer = demo.load()
    prompt = tokenizer(demo.PROMPTS[3] * 4, return_tensors="pt")
    keyword = {"kv_cache": {"eviction": "last_query", "keep_ratio": 0.5}}
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, llmopt=keyword)
    stats, length = model.llmopt.stats, prompt["input_ids"].shape[1]
    assert stats.served_by == "llmopt"
    assert stats.evicted_tokens == length - round(0.5 * length)
    print(f"{stats.evicted_tokens} of the prompt's {length} tokens were given up; it goes on:")
    print(tokenizer.decode(output[0, length:]))
