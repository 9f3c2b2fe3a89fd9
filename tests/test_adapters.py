"""LoRA adapters per request: whoever shares the passes, each request gives what its own adapter gives alone."""

import copy
import threading
import warnings

import peft
import pytest
import torch
from architectures import build

import hf_llmopt
from hf_llmopt import Engine, errors
from hf_llmopt.adapters import LoraLayers
from hf_llmopt.fusion import Replacement

KW = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}
# GPT-2's products are Conv1D; with the output layer, adapters also meet the tokens whose logits are wanted, alone.
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "lm_head"],
    "qwen2": ["k_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "mixtral": ["q_proj", "o_proj"],
}
NAMES = ["a", "b", "__base__", None]


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **options):
    """A model with the adapters `a` and `b`, of different ranks; `b` is active."""
    model = build(name)
    options = {"target_modules": TARGETS[name], "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (adapter, rank) in enumerate((("a", 4), ("b", 6))):
            torch.manual_seed(seed)
            model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=4 * rank, **options), adapter)
    return model.to(dtype).eval()


def alone(model, ids: list[int], adapter: str | None, **arguments) -> list[int]:
    """What stock generates with this adapter, leaving `b` active."""
    if adapter == "__base__":
        model.disable_adapters()
    else:
        model.set_adapter(adapter or "b")
    try:
        return model.generate(torch.tensor([ids]), **{**KW, **arguments})[0, len(ids) :].tolist()
    finally:
        model.enable_adapters()
        model.set_adapter("b")


def passes_of(engine: Engine) -> list[set[str | None]]:
    """Which adapters shared each pass, filled while the engine runs."""
    seen: list[set[str | None]] = []
    engine.loop.on_step = lambda plan, began: seen.append({request.adapter for request, _ in plan.spans})
    return seen


@pytest.mark.parametrize("options", [True, "kv_cache", {"batching": {"max_batch_tokens": 5}}], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_each_request_has_its_own(name: str, options) -> None:
    model = adapted(name)
    prompts = [prompt(3 + 2 * index, index) for index in range(8)]
    expected = [alone(model, ids, NAMES[index % 4]) for index, ids in enumerate(prompts)]
    assert len({tuple(alone(model, prompts[0], adapter)) for adapter in NAMES[:3]}) == 3, "adapters change nothing"
    with Engine(model, options) as engine:
        seen = passes_of(engine)
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, adapter=NAMES[index % 4], **KW) for index, ids in enumerate(prompts)]
        assert [handle.result() for handle in handles] == expected
    assert max(map(len, seen)) >= 3, "different adapters never shared a pass"


def test_sampled_by_seed() -> None:
    model, ids = adapted(), prompt(9)
    expected = []
    for adapter in NAMES:
        torch.manual_seed(7)
        expected.append(alone(model, ids, adapter, do_sample=True, top_k=20))
    with Engine(model) as engine:
        handles = [engine.submit(ids, adapter=adapter, seed=7, do_sample=True, top_k=20, **KW) for adapter in NAMES]
        assert [handle.result() for handle in handles] == expected


def test_prompts_are_found_under_their_own_adapter() -> None:
    """Switching an adapter on for the whole model finds what requests with that adapter computed."""
    model, ids = adapted(), prompt(40)
    with Engine(model, {"prompt_cache": True, "kv_cache": {"page_size": 4}}) as engine:
        for found in (0, 39):
            for adapter in NAMES[:3]:
                handle = engine.submit(ids, adapter=adapter, **KW)
                assert handle.result() == alone(model, ids, adapter)
                assert handle.stats.cached_tokens == found, adapter
        handle = engine.submit(ids, **KW)
        assert (handle.result(), handle.stats.cached_tokens) == (alone(model, ids, "b"), 39)


@pytest.mark.parametrize("swap_bytes", [0, 2**30])
def test_preempted(swap_bytes: int) -> None:
    model = adapted()
    config = {"kv_cache": {"page_size": 4, "max_tokens": 60}, "batching": {"swap_bytes": swap_bytes}}
    prompts = [prompt(12, index) for index in range(6)]
    with Engine(model, config) as engine:
        long = {**KW, "max_new_tokens": 24}
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids, adapter=NAMES[index % 4], **long) for index, ids in enumerate(prompts)]
        tokens = [handle.result() for handle in handles]
        assert sum(handle.stats.preemptions for handle in handles), "nobody lost its pages"
    assert tokens == [alone(model, ids, NAMES[index % 4], max_new_tokens=24) for index, ids in enumerate(prompts)]


def test_half_precision_base_with_float32_adapters() -> None:
    """PEFT adds such adapters in float32 and rounds once."""
    model = adapted(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ids = torch.tensor([prompt(6)])
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 6, layer.in_features).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        layers = LoraLayers()
        layers.refresh(model)
        with layers.entered(["b"] * 5 + ["a"], [5], torch.device("cpu")):
            assert isinstance(vars(layer)["forward"], Replacement)
            mixed = layer(x)
        assert torch.equal(mixed[:, :5], expected[:, :5])
        model.set_adapter("a")
        assert torch.equal(mixed[:, 5:], layer(x)[:, 5:])
    assert "forward" not in vars(layer)
    with Engine(model) as engine:
        assert len(engine.submit(ids, adapter="b", **KW).result()) == 8


def test_pipelines_and_batches_take_an_adapter() -> None:
    model = adapted()
    prompts = [prompt(5), prompt(7, 1)]
    found = hf_llmopt.generate_batch(model, prompts, adapter="a", **KW)
    assert found == [alone(model, ids, "a") for ids in prompts]


def test_a_model_of_peft() -> None:
    """`get_peft_model` wraps; its `generate` takes the keyword, an engine takes the model inside."""
    torch.manual_seed(3)
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "c")
    wrapped.eval()
    ids = torch.tensor([prompt(6)])
    expected = wrapped.generate(input_ids=ids, **KW)
    assert torch.equal(wrapped.generate(input_ids=ids, llmopt=True, **KW), expected)
    assert model.llmopt.stats.served_by == "llmopt"
    with pytest.raises(errors.UnsupportedModel, match="get_base_model"):
        Engine(wrapped)
    with Engine(wrapped.get_base_model()) as engine:
        assert engine.submit(ids, adapter="c", **KW).result() == expected[0, 6:].tolist()
    with pytest.warns(UserWarning, match="adapter_names"):
        mixed = wrapped.generate(input_ids=ids, adapter_names=["__base__"], llmopt=True, **KW)
    with wrapped.disable_adapter():
        assert torch.equal(mixed, wrapped.generate(input_ids=ids, **KW))


def test_leaves_no_trace() -> None:
    """Plain forwards beside a mixed pass, copies made inside one, and the model afterwards are the model's own."""
    model, ids = adapted(), torch.tensor([prompt(6)])
    with torch.no_grad():
        expected = model(ids).logits
    beside, copies = [], []

    def look(module, arguments) -> None:
        def other() -> None:
            with torch.no_grad():
                beside.append(layer(x))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        copies.append(copy.deepcopy(layer))

    layer = model.model.layers[1].self_attn.v_proj
    x = torch.randn(1, 3, layer.in_features)
    own = layer(x)
    hook = model.model.norm.register_forward_pre_hook(look)
    with Engine(model) as engine:
        engine.submit(ids, adapter="a", **KW).result()
    hook.remove()
    assert beside
    assert all(torch.equal(found, own) for found in beside)
    assert all(torch.equal(made(x), own) for made in copies)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gone_while_it_runs() -> None:
    """Deleting an adapter ends the requests that name it, and no other."""
    model = adapted()
    reached, deleted = threading.Event(), threading.Event()

    class Waits:
        tokens = 0

        def put(self, token) -> None:
            self.tokens += 1
            if self.tokens == 3:  # the prompt comes first
                reached.set()
                assert deleted.wait(30)

        def end(self) -> None: ...

    expected = alone(model, prompt(5), "b")
    with Engine(model) as engine:
        lost = engine.submit(prompt(5), adapter="a", streamer=Waits(), **KW)
        stays = engine.submit(prompt(5), adapter="b", **KW)
        assert reached.wait(30)
        model.delete_adapter("a")
        deleted.set()
        with pytest.raises(errors.InvalidRequest, match="'a' does not exist"):
            lost.result()
        assert stays.result() == expected


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is a Embedding"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "is a ModulesToSaveWrapper"),
    ],
    ids=["dora", "embedding", "saved modules"],
)
def test_what_cannot_be_mixed_is_refused(options, wanted: str) -> None:
    model = adapted(**options)
    expected = alone(model, prompt(5), "b")
    with Engine(model) as engine:
        with pytest.raises(errors.InvalidRequest, match=wanted):
            engine.submit(prompt(5), adapter="a", **KW)
        assert engine.submit(prompt(5), **KW).result() == expected


def test_names_are_checked() -> None:
    model = adapted()
    with Engine(model) as engine:
        with pytest.raises(errors.InvalidRequest, match=r"'bb' does not exist. Did you mean 'b'\? .*: 'a', 'b'"):
            engine.submit(prompt(5), adapter="bb", **KW)
        with pytest.raises(errors.InvalidRequest, match="adapter is a string"):
            engine.submit(prompt(5), adapter=3, **KW)
        layer = model.model.layers[0].self_attn.q_proj
        layer.merge()
        with pytest.raises(errors.InvalidRequest, match="merged into its weight"):
            engine.submit(prompt(5), adapter="a", **KW)
        layer.unmerge()
    with Engine(build("llama")) as engine, pytest.raises(errors.InvalidRequest, match="load_adapter"):
        engine.submit(prompt(5), adapter="a", **KW)


@pytest.mark.parametrize("how", ["set_adapter", "disable_adapters"])
def test_an_adapter_that_is_switched_below_a_running_request_leaves_no_keys(how: str) -> None:
    """Its keys are a mixture, which nobody may find once the first adapter is back."""
    model, ids = adapted(), prompt(30)
    with Engine(model, {"prompt_cache": True, "kv_cache": {"page_size": 4}}) as engine:
        handle = engine.submit(ids, **{**KW, "max_new_tokens": 60})
        tokens = iter(handle)
        for _ in range(10):
            next(tokens)
        with engine.loop.lock:
            model.set_adapter("a") if how == "set_adapter" else model.disable_adapters()
        for _ in range(20):
            next(tokens)
        with engine.loop.lock:
            model.enable_adapters()
            model.set_adapter("b")
        text = ids + handle.result(60)
        again = engine.submit(text, **KW)
        assert again.result(60) == alone(model, text, "b")
        assert again.stats.cached_tokens <= len(ids) + 14
