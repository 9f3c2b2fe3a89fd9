"""What transformers serves: one warning with the reason and stock's result, or an error for who is strict."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from architectures import NOT_SERVED, build
from compare import assert_equal, assert_falls_through, prompts, stock
from transformers import DynamicCache, StaticCache

from hf_llmopt.errors import NotServed

NEW = 6
ONE, RAGGED = prompts(9), prompts(4, 11, 7)
ARGUMENTS = {**RAGGED, "eos_token_id": 9999, "max_new_tokens": NEW}
DICT = {"return_dict_in_generate": True}


@cache
def tiny(name: str, **arguments):
    return build(name, **arguments)


@pytest.fixture
def llama():
    return tiny("llama")


REASONS = dict.fromkeys(("bloom", "mpt", "xglm"), "attention interface")
REASONS["mamba"] = "recurrent state"
REASONS |= dict.fromkeys(("t5", "bart"), "encoder-decoder")


@pytest.mark.parametrize("name", NOT_SERVED)
def test_architectures(name):
    inputs = ONE if name == "mamba" else RAGGED
    assert_falls_through(tiny(name), {**inputs, "max_new_tokens": NEW}, REASONS[name])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_hidden_states": True, **DICT}, "output_hidden_states"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments(llama, arguments, reason):
    assert_falls_through(llama, {**ARGUMENTS, **arguments}, reason)


def test_output_attentions():
    model = tiny("llama", attn_implementation="eager")
    assert_falls_through(model, {**ARGUMENTS, **DICT, "output_attentions": True}, "output_attentions")


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_assisted_generation(llama, sampling):
    """With an argument that the engine does not serve; nor are the assistant's own generate calls served."""
    arguments = {**ONE, "max_new_tokens": NEW, **sampling, "assistant_model": tiny("llama", seed=1)}
    assert_falls_through(llama, {**arguments, "use_cache": True, "output_hidden_states": True}, "output_hidden_states")


def test_custom_generate(llama):
    def last_token_again(model, input_ids, **kwargs):
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    assert_falls_through(llama, {**ARGUMENTS, "custom_generate": last_token_again}, "custom_generate")


def test_static_cache_of_the_user(llama):
    def arguments():
        return {**ARGUMENTS, "past_key_values": StaticCache(llama.config, max_cache_len=32)}

    assert_falls_through(llama, arguments, "StaticCache")


def test_cache_that_holds_the_whole_prompt(llama):
    """Stock then computes something of its own, and not the same in every version."""

    def arguments():
        cache_ = DynamicCache(config=llama.config)
        llama(ONE["input_ids"], past_key_values=cache_)
        return {**ONE, "max_new_tokens": NEW, "past_key_values": cache_}

    assert_falls_through(llama, arguments, "no new token")


@pytest.mark.parametrize("filled", [False, True])
def test_compressed_cache_of_the_user(filled):
    """DeepSeek's caches hold latents; pages hold the keys made from them."""
    model = tiny("deepseek_v3")

    def arguments():
        cache = DynamicCache(config=model.config)
        if filled:
            model(
                ARGUMENTS["input_ids"][:, :-1],
                attention_mask=ARGUMENTS["attention_mask"][:, :-1],
                past_key_values=cache,
            )
        return {**ARGUMENTS, "past_key_values": cache}

    assert_falls_through(model, arguments, "compressed states")


def test_synced_gpus(llama, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_falls_through(llama, {**ARGUMENTS, "synced_gpus": True}, "synced_gpus")
    finally:
        torch.distributed.destroy_process_group()


def test_training():
    model = build("llama").train()
    assert_falls_through(model, ARGUMENTS, "training mode")
    assert_equal(model.eval(), ARGUMENTS)


def test_autocast(llama):
    with torch.autocast("cpu", torch.bfloat16):
        assert_falls_through(llama, ARGUMENTS, "autocast")


def test_other_model_inputs():
    types = torch.tensor([[3, 4] * 4 + [5]])
    assert_falls_through(tiny("gpt2"), {**ONE, "token_type_ids": types, "max_new_tokens": NEW}, "'token_type_ids'")


def test_replaced_forward():
    model = build("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert_falls_through(model, ARGUMENTS, "forward")


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama4_text"])
def test_holes_where_columns_count(name):
    """Windows and chunks count masked columns too; see test_architectures.py for right padding."""
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 3:5] = 0
    assert_falls_through(
        tiny(name), {**ONE, "attention_mask": mask, "max_new_tokens": NEW}, "masked tokens behind real"
    )


ROPE = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}, 16),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0 + 0.5 * i for i in range(8)],
            "original_max_position_embeddings": 16,
        },
        64,
    ),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rope_of_the_whole_batch(kind):
    """Past the original length the frequencies follow the longest row; up to it they do not."""
    name, rope, positions = ROPE[kind]
    more = {"original_max_position_embeddings": 16} if name == "phi3" else {}
    model = build(name, rope_parameters=rope, max_position_embeddings=positions, **more)
    short, long = {**ONE, "eos_token_id": 9999, "max_new_tokens": 7}, {**ONE, "eos_token_id": 9999, "max_length": 30}
    assert_equal(model, short)
    assert_equal(model, {**RAGGED, "eos_token_id": 9999, "max_length": 16})
    assert_falls_through(model, long, "rotary embedding")
    assert_equal(model, short)  # dynamic frequencies come back


@pytest.mark.parametrize("implementation", ["quantized", "offloaded"])
def test_caches_that_need_more_than_a_cpu(llama, implementation, monkeypatch):
    """The cache itself is replaced by an ordinary one: that stock's preparation is reached is what matters."""
    original, reached = type(llama)._prepare_cache_for_generation, []

    def prepare(self, generation_config, *args, **kwargs):
        reached.append(generation_config.cache_implementation)
        generation_config.cache_implementation = None
        original(self, generation_config, *args, **kwargs)
        generation_config.cache_implementation = reached[-1]

    monkeypatch.setattr(type(llama), "_prepare_cache_for_generation", prepare)
    arguments = {**ARGUMENTS, "cache_implementation": implementation}
    assert_falls_through(llama, arguments, f"cache_implementation='{implementation}'")
    assert reached[0] == implementation


def test_continuous_batching_of_transformers(llama, monkeypatch):
    """Its own loop is replaced: it takes most of the machine's memory for its pages."""
    request = SimpleNamespace(prompt_ids=[5, 6], generated_tokens=[7, 8, 9])
    monkeypatch.setattr(type(llama), "generate_batch", lambda self, inputs, **_: {"req_0": request})
    assert_falls_through(llama, {**ONE, "max_new_tokens": NEW, "cache_implementation": "paged"}, "'paged'")


def test_a_strict_error_leaves_nothing_behind(llama):
    """The next call, strict or not, is served."""
    with pytest.raises(NotServed):
        llama.generate(**ARGUMENTS, num_beams=2, llmopt={"strict": True})
    assert_equal(llama, ARGUMENTS, llmopt={"strict": True})
    assert stock(llama, **ARGUMENTS).shape == (3, 11 + NEW)
