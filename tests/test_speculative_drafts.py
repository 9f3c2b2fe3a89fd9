"""The model's own first layers draft: the tokens of plain decoding, and a model that stays as it is."""

from __future__ import annotations

import copy
import gc
import weakref

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig, SpeculativeConfig
from hf_llmopt.engine.request import Request
from hf_llmopt.engine.second import _begins_with
from hf_llmopt.errors import InvalidOption
from hf_llmopt.speculative.layer_skip import first_layers

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
NEW = 20
pytestmark = pytest.mark.usefixtures("cheap_guesses")


def prompts(rows: int = 1) -> dict[str, torch.Tensor]:
    """Ragged, padded on the left."""
    ids = torch.randint(3, 20, (rows, 12), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, inputs, llmopt, **kwargs):
    """The sequences, and a random number drawn afterwards."""
    torch.manual_seed(11)
    output = model.generate(**inputs, llmopt=llmopt, **{"max_new_tokens": NEW, "pad_token_id": 0, **kwargs})
    return output.tolist(), float(torch.rand(()))


def drafted(model):
    stats = model.llmopt.stats
    assert (stats.served_by, stats.undrafted) == ("llmopt", None)
    assert stats.drafted_tokens > 0
    return stats


def skipping(exit_layer=None, **options):
    return {"speculative": {"method": "layer_skip", "exit_layer": exit_layer, "num_tokens": 3, **options}}


def silenced(model, kept):
    """The model with layers that add nothing from place `kept` on: what leaves there is right."""
    with torch.no_grad():
        for layer in model.model.layers[kept:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


# ------------------------------------------------------------------------------------------------------- first layers


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_the_first_layers_draft(architecture, arguments):
    model, inputs = build(architecture), prompts(3)
    expected = generate(model, inputs, None, **arguments)
    assert generate(model, inputs, skipping(2), **arguments) == expected
    drafted(model)
    assert generate(model, inputs, None, **arguments) == expected, "the model itself is as before"


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_first_layers_behind_which_nothing_happens_are_always_right(arguments):
    model, inputs, arguments = silenced(build("llama"), 1), prompts(2), {**arguments, "eos_token_id": None}
    expected = generate(model, inputs, None, **arguments)
    assert generate(model, inputs, skipping(1), **arguments) == expected
    stats = drafted(model)
    assert stats.accepted_tokens == stats.drafted_tokens
    assert stats.steps <= 2 + -(-NEW // 4)
    with torch.no_grad():  # the drafter has the very same weights: it follows
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    changed = generate(model, inputs, None, **arguments)
    assert changed != expected
    assert generate(model, inputs, skipping(1), **arguments) == changed
    assert model.llmopt.stats.accepted_tokens == model.llmopt.stats.drafted_tokens


def test_the_first_layers_are_the_models_own():
    model = build("llama")
    hooks, seen = [model, model.model], []
    for module in hooks:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    before, modules, config = copy.deepcopy(model.state_dict()), list(model.modules()), model.config.to_dict()
    view = first_layers(model, 2)
    mine = dict(model.named_parameters())
    assert {name for name in mine if "layers.2." in name} == set(mine) - set(dict(view.named_parameters()))
    assert all(parameter is mine[name] for name, parameter in view.named_parameters())
    view(input_ids=torch.tensor([[3, 4]]))
    assert not seen, "who watches the model does not see its drafts"
    assert generate(model, prompts(), skipping(2))
    assert list(model.modules()) == modules
    assert len(model.model.layers) == 3
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_whose_layers_draft_can_be_deleted_copied_and_moved():
    model = build("llama")
    expected = generate(model, prompts(), skipping(2))
    assert generate(copy.deepcopy(model), prompts(), skipping(2)) == expected
    generate(model.to(torch.float64), prompts(), skipping(2))
    drafted(model)
    weight = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    del model
    gc.collect()
    assert weight() is None


def test_quantized_layers_draft():
    model = hf_llmopt.optimize(silenced(build("llama"), 1), llmopt="int8")
    expected = generate(model, prompts(2), "kv_cache", **GREEDY)
    assert generate(model, prompts(2), skipping(1), **GREEDY) == expected
    assert drafted(model).accepted_tokens > 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_first_layers_draft_with_the_adapter_that_a_request_names():
    """Only with it are they right: nothing follows them."""
    model, ids = silenced(build("llama"), 1), prompts()["input_ids"][0]
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}
        model.add_adapter(peft.LoraConfig(**options, init_lora_weights=False), name)
    model.eval()
    arguments = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **GREEDY}
    found = []
    for llmopt in (True, LLMOptConfig(**skipping(1), prompt_cache=True)):
        with Engine(model, llmopt) as engine:
            handles = [engine.submit(ids, adapter=name, **arguments) for name in ("a", "b", None, "__base__", "a")]
            found.append([handle.result() for handle in handles])
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == 3, "adapters change something"
    for handle in handles:
        assert handle.stats.accepted_tokens == handle.stats.drafted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_of_every_architecture_draft(architecture):
    model, inputs = build(architecture), prompts(2)
    expected = generate(model, inputs, None, **SAMPLED)
    assert generate(model, inputs, skipping(2), **SAMPLED) == expected
    drafted(model)


@pytest.mark.parametrize("rows", [1, 3])
def test_assistant_early_exit_chooses_the_first_layers(rows):
    model, inputs = build("llama"), prompts(rows)
    expected = generate(model, inputs, None, **GREEDY)
    assert generate(model, inputs, True, **GREEDY, assistant_early_exit=2) == expected
    assert model.llmopt.stats.served_by == "llmopt"
    assert model.llmopt.engine.config.speculative == SpeculativeConfig("layer_skip", exit_layer=2)


def test_a_quarter_of_the_layers_draft_if_nobody_says_how_many():
    for layers, kept in ((2, 1), (3, 1), (9, 2)):
        assert len(first_layers(build("llama", num_hidden_layers=layers), None).model.layers) == kept


def test_layers_that_do_not_exist_are_refused():
    model = build("llama")
    with pytest.raises(InvalidOption, match=r"exit_layer=3: LlamaForCausalLM has 3 layer\(s\).*below 3"):
        generate(model, prompts(), skipping(3))
    with pytest.raises(InvalidOption, match="has 3 layer"):
        generate(model, prompts(), True, assistant_early_exit=7)
    with pytest.raises(InvalidOption, match=r"exit_layer=\.\.\.\) must be at least 1"):
        generate(model, prompts(), True, assistant_early_exit=0)
    with pytest.raises(InvalidOption, match="must be at least 1"):
        SpeculativeConfig("layer_skip", exit_layer=0)
    with pytest.raises(InvalidOption, match="only method 'layer_skip'"):
        LLMOptConfig(speculative={"exit_layer": 2})
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(InvalidOption, match="has 0 such lists"):
        first_layers(model, 2)
    with pytest.raises(InvalidOption, match="has 1 layer"):
        first_layers(build("llama", num_hidden_layers=1), None)


def test_what_a_draft_model_read_is_not_shared_across_salts():
    tokens = list(range(5))

    def copy(salt):
        return Request(tokens, tokens, 5, [], salt=salt)

    assert _begins_with(copy("a"), copy("a"))
    assert not _begins_with(copy("a"), copy("b"))
