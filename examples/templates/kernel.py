"""An attention kernel of your own, in Triton: a program for each query token and head reads the pages of its request.

Without a GPU it runs in Triton's interpreter, slowly, and gives the same numbers.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports triton

import triton
import triton.language as tl
from transformers import LlamaConfig, LlamaForCausalLM

import hf_llmopt
from hf_llmopt.attention.paths import sdpa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _attend(
    query, out, keys, values, table, items, scaling, PAGES,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(items + token * 3)  # whose pages
    first = tl.load(items + token * 3 + 1)  # its first visible token: 0, but for windows
    end = tl.load(items + token * 3 + 2)
    lane = tl.arange(0, DIM)
    q = tl.load(query + (token * HEADS + head) * DIM + lane) * scaling
    largest, weight, total = float("-inf"), 0.0, tl.zeros([DIM], tl.float32)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = place < end
        page = tl.load(table + row * PAGES + place // PAGE, mask=seen, other=0).to(tl.int64)
        offset = ((page * PAGE + place % PAGE) * KV_HEADS + head // (HEADS // KV_HEADS)) * DIM
        k = tl.load(keys + offset[:, None] + lane[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(values + offset[:, None] + lane[None, :], mask=seen[:, None], other=0.0)
        score = tl.where(seen, tl.sum(q[None, :] * k, 1), float("-inf"))
        above = tl.maximum(largest, tl.max(score, 0))
        factor, share = tl.exp(largest - above), tl.exp(score - above)
        total = total * factor + tl.sum(share[:, None] * v, 0)
        weight = weight * factor + tl.sum(share, 0)
        largest = above
    tl.store(out + (token * HEADS + head) * DIM + lane, total / weight)


def attend(step, call):
    """Called in every layer: the contract is `hf_llmopt.attention.Attend`, the definition `reference.paged_attention`.

    The new keys and values are in their pages already.
    """
    seen = step.seen(call.layer, call.scaling, device=call.query.device)
    (kv_heads, width, value_width), dtype = seen.shape, call.query.dtype
    simple = call.is_plain and seen.form is None and seen.tree is None and width == value_width
    if not (simple and dtype == torch.float32 and width & (width - 1) == 0):
        return sdpa(step, call)  # softcaps, sinks, quantized pages, trees of drafts: torch's attention
    step.note("mine")  # stands in stats.attention
    query = call.query[0].transpose(0, 1).contiguous()  # [tokens, heads, width]
    out = torch.empty_like(query)
    _attend[(query.shape[0], query.shape[1])](
        query, out, seen.keys, seen.values, seen.table, seen.items, call.scaling, seen.table.shape[1],
        HEADS=query.shape[1], KV_HEADS=kv_heads, PAGE=seen.page_size, DIM=width, BLOCK=32,
    )  # fmt: skip
    return out[None]


hf_llmopt.register("attention", "mine", attend)

if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    prompts = torch.randint(128, (2, 9), device=DEVICE)
    stock = model.generate(prompts, max_new_tokens=6, do_sample=False)
    ours = model.generate(prompts, max_new_tokens=6, do_sample=False, llmopt={"attention": "mine"})
    stats = model.llmopt.stats
    assert stats.served_by == "llmopt"
    assert stats.attention == ("mine",)
    assert torch.equal(ours, stock)
    print("the same tokens, by", stats.attention)
