"""Pages in host memory. The CPU stands for the device here: it copies what a GPU would fetch, and at once."""

from typing import Any

import pytest
import torch
from architectures import build, ragged

from hf_llmopt import Engine, KVCacheConfig
from hf_llmopt.engine import runner
from hf_llmopt.errors import InvalidOption
from hf_llmopt.kv_cache import PagedCache, Staged, Streams
from hf_llmopt.kv_cache.transfer import pinned_zeros

KW: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that are on the device after each fetch."""
    monkeypatch.setattr(runner, "OFFLOADED", {"cpu"})
    counts, fetch = [], Staged._fetch

    def counted(self: Staged, layer: int) -> Any:
        counts.append(len(self._staged) + 1)
        return fetch(self, layer)

    monkeypatch.setattr(Staged, "_fetch", counted)
    return counts


def config(**options: Any) -> dict[str, Any]:
    return {"strict": True, "kv_cache": {"page_size": 4, "offload": True}, **options}


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_tokens(name: str, backend: str, fetched: list[int]) -> None:
    """Prompts in pieces, then decoding; full layers alone, and beside sliding ones, which stay on the device."""
    model = build(name)
    sampling = {"do_sample": True, "top_k": 20} if backend == "auto" else {}
    torch.manual_seed(1)
    stock = model.generate(**ragged(), **KW, **sampling)
    torch.manual_seed(1)
    llmopt = config(batching={"max_batch_tokens": 9}, attention=backend)
    assert torch.equal(model.generate(**ragged(), **KW, **sampling, llmopt=llmopt), stock)
    stats, store = model.llmopt.stats, model.llmopt.engine.store
    offloaded = sum(layer.offloaded for layer in store.layers)
    assert offloaded == sum(layer.kind == "full" for layer in store.layers) > 0
    assert len(fetched) == stats.steps * offloaded
    assert max(fetched) == min(2, offloaded)
    assert store.pages_used == 0


def test_bytes_that_a_pass_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches the pages of its requests, and writes back its tokens."""
    moved: list[int] = []
    copy = Streams.copy

    def counted(self: Streams, pairs: Any) -> Any:
        moved.append(sum(source.shape[0] for source, _ in pairs))  # slots
        return copy(self, pairs)

    monkeypatch.setattr(Streams, "copy", counted)
    model = build("llama", num_hidden_layers=1)
    inputs = {name: tensor[:1] for name, tensor in ragged().items()}
    model.generate(**inputs, **{**KW, "max_new_tokens": 2}, llmopt=config())
    held = [2 * 4 * (1 + pages) for pages in (4, 4)]  # keys and values of 13 and 14 tokens, and page 0
    assert moved == [held[0], 2 * 13, held[1], 2 * 1]


def test_rows_that_share_pages() -> None:
    model = build("llama")
    inputs = {name: tensor[:1] for name, tensor in ragged().items()}
    arguments = {**KW, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    stock = model.generate(**inputs, **arguments)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **arguments, llmopt=config()), stock)


def test_quantized_pages() -> None:
    model = build("llama")
    pages = {"page_size": 4, "dtype": "int8"}
    expected = model.generate(**ragged(), **KW, llmopt={"kv_cache": pages, "attention": "sdpa"})
    ours = model.generate(**ragged(), **KW, llmopt=config(kv_cache={**pages, "offload": True}, attention="sdpa"))
    assert torch.equal(ours, expected)


def test_found_prompts() -> None:
    model = build("llama")
    for turn in range(2):
        stock = model.generate(**ragged(), **KW)
        assert torch.equal(model.generate(**ragged(), **KW, llmopt=config(prompt_cache=True)), stock)
        assert (model.llmopt.stats.cached_tokens > 0) == bool(turn)


@pytest.mark.parametrize("swaps", [True, False])
def test_requests_that_lose_their_pages(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *_: swaps)
    model = build("llama", num_hidden_layers=2)
    torch.manual_seed(4)
    prompts = [torch.randint(3, 90, (10,)) for _ in range(4)]
    arguments = {**KW, "max_new_tokens": 30}
    with Engine(model, config(kv_cache={"page_size": 4, "max_tokens": 80, "offload": True})) as engine:
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, **arguments) for ids in prompts]
        for ids, handle in zip(prompts, handles, strict=True):
            assert handle.result(60) == model.generate(ids[None], **arguments)[0, len(ids) :].tolist()
        assert sum(handle.stats.preemptions for handle in handles) > 0
        assert (sum(handle.stats.swaps for handle in handles) > 0) == swaps


def test_a_cache_that_is_handed_out() -> None:
    """A plain forward reads and writes its pages, and a later call goes on."""
    model = build("llama")
    given = model.generate(**ragged(), **KW, llmopt=config(), return_dict_in_generate=True)
    stock = model.generate(**ragged(), **KW, return_dict_in_generate=True)
    assert isinstance(given.past_key_values, PagedCache)
    mask = torch.cat([ragged()["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
    for out, llmopt in ((stock, None), (given, config())):
        positions = (mask.cumsum(1) - 1)[:, -1:]
        step = model(
            out.sequences[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values
        )
        out["next"] = step.logits[:, -1]
        out["more"] = model.generate(
            torch.cat([out.sequences, out.next.argmax(-1)[:, None]], dim=1),
            attention_mask=torch.cat([mask, mask[:, -1:]], dim=1),
            past_key_values=out.past_key_values, llmopt=llmopt, **KW,
        )  # fmt: skip
    torch.testing.assert_close(given.next, stock.next)
    assert torch.equal(given.more, stock.more)


def test_copies_lie_in_two_places() -> None:
    """However many layers there are: a host that runs ahead of its device would take memory for each."""
    streams, like = Streams(torch.device("cpu")), torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    found = [streams.place(number, side, like, 16) for number in range(4) for side in range(2)]
    assert all(place.shape == (16, 2, 8) and place.dtype == like.dtype for place in found)
    places = [place.data_ptr() for place in found]
    assert places[:4] == places[4:]
    assert len(set(places)) == 4
    assert streams.place(4, 0, like, 18).data_ptr() == places[0]
    assert len(streams.place(4, 0, like, 19)) == 19


def test_pinned_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last view of it is gone, after what copies there."""
    told: list[Any] = []

    class Driver:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            told.append(("pin", address, nbytes))
            return 2 if nbytes > 10**6 else 0

        def cudaHostUnregister(self, address: int) -> None:
            told.append(("unpin", address))

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append(device))
    tensor = pinned_zeros((3, 5), torch.bfloat16, second := torch.device("cuda", 1))
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.bfloat16
    assert not tensor.any()
    view, address = tensor[1:], tensor.data_ptr()
    del tensor
    view.fill_(1)
    assert told == [("pin", address, 30)]
    del view
    assert told[1:] == [second, ("unpin", address)]
    with pytest.raises(MemoryError, match=r"0\.00 GiB of memory could not be pinned \(CUDA error 2\)"):
        pinned_zeros((1001, 1000), torch.uint8, second)


def test_where_there_is_nothing_to_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "OFFLOADED", {"cuda"})
    with pytest.raises(InvalidOption, match=r"the model is on cpu: there is nothing to offload\. Move the model"):
        build("llama").generate(**ragged(), **KW, llmopt=config())


def test_what_does_not_go_together() -> None:
    with pytest.raises(InvalidOption, match="moves whole pages, eviction='sink' rows between"):
        KVCacheConfig(offload=True, eviction="sink")
