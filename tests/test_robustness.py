"""What once broke it, each as a test: other requests, the model and the process must come out as they went in."""

import asyncio
import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from architectures import build
from transformers import LlamaForCausalLM, LogitsProcessor

from hf_llmopt import Engine, errors

IDS = torch.arange(5, 17)[None]
KW = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}


def tokens(model, ids=IDS, **kwargs):
    return model.generate(ids, **{**KW, **kwargs})


def clean(model) -> None:
    """The model is as transformers left it."""
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_two_engines_and_other_configs_on_one_model() -> None:
    model = build("llama")
    expected = tokens(model)[0, 12:].tolist()
    with Engine(model) as first, Engine(model, {"kv_cache": {"page_size": 4}}) as second:
        tokens(model, llmopt={"kv_cache": {"page_size": 8}})
        model.llmopt.release()
        assert [engine.submit(IDS, **KW).result(20) for engine in (first, second)] == [expected] * 2


def test_model_cast_between_requests() -> None:
    model = build("llama")
    with Engine(model) as engine:
        engine.submit(IDS, **KW).result(20)
        model.to(torch.float64)
        assert engine.submit(IDS, **KW).result(20) == tokens(model)[0, 12:].tolist()


def test_crop_behind_what_a_window_has_passed_is_refused() -> None:
    """The pages are gone; stock's own cache refuses the same."""
    model, ids = build("mistral"), torch.arange(5, 25)[None]
    how = {"llmopt": {"kv_cache": {"page_size": 4}}, **KW, "max_new_tokens": 12}
    cache = model.generate(ids, return_dict_in_generate=True, **how).past_key_values
    length = cache.get_seq_length()
    with pytest.raises(errors.InvalidRequest, match="cannot go back to 19 tokens"):
        cache.crop(19 - length)
    assert cache.get_seq_length() == length
    cache.crop(-1)
    assert cache.get_seq_length() == length - 1


def test_cache_of_another_model_is_refused() -> None:
    model, other = build("llama"), build("llama", num_hidden_layers=2)
    out = other.generate(IDS, return_dict_in_generate=True, **KW)
    full = torch.cat([IDS, IDS], dim=1)
    with Engine(model) as engine:
        with pytest.raises(errors.InvalidRequest, match="another model"):
            engine.submit(full, past_key_values=out.past_key_values, **KW)
        assert engine.submit(IDS, **KW).result(20)
    with pytest.raises(errors.InvalidRequest, match="another model"):
        tokens(model, full, past_key_values=out.past_key_values, llmopt=True)


def _with_last(value: int) -> dict:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, -1], mask[0, -1] = value, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "bad",
    [
        _with_last(99999),
        _with_last(-1),
        {"input_ids": torch.zeros(1, 0, dtype=torch.long), "inputs_embeds": torch.randn(1, 5, 63)},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long), "inputs_embeds": torch.randn(1, 5, 64).double()},
        {"input_ids": IDS, "position_ids": torch.arange(3)[None]},
        {"input_ids": IDS, "prefill_chunk_size": 0},
        {"input_ids": IDS, "num_return_sequences": 2, "do_sample": True, "guidance_scale": 1.5},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    ],
)
def test_a_bad_request_is_refused_before_it_meets_others(bad: dict) -> None:
    model = build("llama")
    with Engine(model) as engine:
        good = engine.submit(IDS, **{**KW, "max_new_tokens": 40})
        with pytest.raises(errors.InvalidRequest):
            engine.submit(**{**KW, **bad})
        assert good.result(20) == tokens(model, max_new_tokens=40)[0, 12:].tolist()


class Widens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.cat([scores, scores + 1], dim=-1)


class Calm(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return None


@pytest.mark.parametrize("processor", [Widens, Nothing])
def test_a_processor_that_breaks_the_scores(processor: type) -> None:
    model = build("llama")
    with Engine(model) as engine:
        good = engine.submit(IDS, **{**KW, "max_new_tokens": 40})
        with pytest.raises(errors.CallbackFailed, match="returned"):
            engine.submit(IDS, logits_processor=[processor()], **KW).result(20)
        assert good.result(20) == tokens(model, max_new_tokens=40)[0, 12:].tolist()


def test_one_processor_in_two_live_requests_is_refused() -> None:
    shared = Calm()
    with Engine(build("llama")) as engine:
        engine.submit(IDS, logits_processor=[shared], **{**KW, "max_new_tokens": 200})
        with pytest.raises(errors.InvalidRequest, match="Calm"):
            engine.submit(IDS, logits_processor=[shared], **KW)


def test_models_that_share_a_config_in_two_threads() -> None:
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()
    expected = [tokens(model).tolist() for model in (first, second)]
    wrong: list[object] = []

    def work(model, right) -> None:
        wrong.extend(i for i in range(15) if tokens(model, llmopt=True).tolist() != right)

    threads = [threading.Thread(target=work, args=pair) for pair in zip((first, second), expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    clean(first)


def test_copies_made_during_a_step_are_models_of_their_own() -> None:
    model = build("llama")
    expected = tokens(model)
    copies: list[torch.nn.Module] = []
    hook = model.model.norm.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    tokens(model, llmopt=True)
    hook.remove()
    copies[-1].model.norm._forward_pre_hooks.clear()
    taken = pickle.loads(pickle.dumps(copies[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for own in (copies[-1], taken):
        assert torch.equal(tokens(own, llmopt=False), expected)


def test_exit_with_a_running_engine_is_clean() -> None:
    script = (
        "import sys, torch; sys.path.insert(0, 'tests')\n"
        "from architectures import build\n"
        "from hf_llmopt import Engine\n"
        "engine = Engine(build('llama'))\n"
        "handles = [engine.submit([5, 6, 7], max_new_tokens=200, eos_token_id=None) for _ in range(10)]\n"
        "next(iter(handles[0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_an_engine_that_is_dropped_goes_away() -> None:
    model = build("llama")
    engine = Engine(model)
    engine.submit(IDS, **KW).result(20)
    thread, gone = engine._thread, weakref.ref(engine)
    del engine
    thread.join(10)
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()


class Nests(LogitsProcessor):
    def __init__(self, model, config) -> None:
        self.model, self.config = model, config

    def __call__(self, input_ids, scores):
        tokens(self.model, IDS.repeat(2, 1), llmopt=self.config)
        return scores


def test_a_nested_call_that_cannot_fit_fails_instead_of_waiting_for_itself() -> None:
    model, config = build("llama"), {"kv_cache": {"max_tokens": 64}}
    with pytest.raises(errors.OutOfPages):
        tokens(model, IDS.repeat(2, 1), llmopt=config, logits_processor=[Nests(model, config)])
    roomy = {"kv_cache": {"max_tokens": 128}}
    nested = tokens(model, IDS.repeat(2, 1), llmopt=roomy, logits_processor=[Nests(model, roomy)])
    assert torch.equal(nested, tokens(model, IDS.repeat(2, 1)))


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = build("llama")

    class Interrupts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens(model, llmopt=True, logits_processor=[Interrupts()])
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokens(model, llmopt=True)
    hook.remove()
    clean(model)
    assert model.llmopt.engine.store.pages_used == 0
    assert torch.equal(tokens(model, llmopt=True), tokens(model))


def _another_layer(model) -> None:
    model.model.layers[1] = copy.deepcopy(build("llama", seed=1).model.layers[1])


def _transposed(model) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()


def _epsilon(model) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def _updated(model) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)


def _window(model) -> None:
    model.config.sliding_window = 3
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3


@pytest.mark.parametrize(
    ("name", "change"),
    [("llama", _another_layer), ("llama", _transposed), ("llama", _epsilon), ("llama", _updated), ("mistral", _window)],
)
def test_changes_between_calls_are_seen(name: str, change) -> None:
    model = build(name)
    tokens(model, llmopt=True)
    change(model)
    assert torch.equal(tokens(model, llmopt={"strict": True}), tokens(model))


def test_pages_made_in_inference_mode_serve_outside_it() -> None:
    model = build("llama")
    with torch.inference_mode():
        out = tokens(model, llmopt=True, return_dict_in_generate=True)
    with torch.no_grad():
        model(out.sequences[:, -1:], past_key_values=out.past_key_values)
    assert torch.equal(tokens(model, llmopt=True), tokens(model))


def test_a_plain_forward_with_grad_leaves_no_graph_in_the_pages() -> None:
    model = build("llama")
    out = tokens(model, llmopt=True, return_dict_in_generate=True)
    model(out.sequences[:, -1:], past_key_values=out.past_key_values)
    assert model.llmopt.engine.store.keys[0].grad_fn is None


def test_handles_can_be_read_again_and_lose_nothing() -> None:
    with Engine(build("llama")) as engine:
        handle = engine.submit(IDS, **{**KW, "max_new_tokens": 30})

        async def impatient() -> list[int]:
            stream = aiter(handle)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError, StopAsyncIteration):
                while True:
                    await asyncio.wait_for(anext(stream), 0.003)
            return [token async for token in handle]

        assert list(handle) == list(handle) == handle.result() == asyncio.run(impatient())


def test_a_submitted_request_holds_no_pages_after_its_end() -> None:
    with Engine(build("llama")) as engine:
        handle = engine.submit(IDS, return_dict_in_generate=True, **KW)
        handle.result(20)
        assert engine.loop.store.pages_used == 0


def test_global_hooks_are_called_as_often_as_in_stock() -> None:
    model = build("llama")
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        tokens(model)
        stock = len(calls)
        tokens(model, llmopt=True)
    finally:
        hook.remove()
    assert len(calls) - stock >= stock  # one more pass for the probe


def test_default_device_and_dtype_of_the_user() -> None:
    model = build("llama")
    expected = tokens(model)
    with torch.device("meta"):
        assert torch.equal(tokens(model, llmopt=True), expected)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(tokens(model, llmopt=True), expected)
    finally:
        torch.set_default_dtype(torch.float32)
