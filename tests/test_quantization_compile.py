"""Quantized models under torch's compilers: one graph, with the results of eager mode."""

import copy
import pickle

import pytest
import torch
from architectures import build
from torch import nn

import hf_llmopt
from hf_llmopt import LLMOptConfig, QuantizationConfig
from hf_llmopt.errors import UnsupportedQuantization
from hf_llmopt.quantization import traced

WAYS = {"int4": {}, "int8": {"head_bits": 8}, "fp8": {"activations": "none"}}
# aot_eager traces, makes tensors fake and takes gradients apart as the default backend does, and compiles no C++.
BACKEND = {"backend": "aot_eager", "fullgraph": True}


class Logits(nn.Module):
    """From embeddings, for which there are gradients, to logits."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(inputs_embeds=x, use_cache=False).logits


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=WAYS)
def quantized(request):
    config = QuantizationConfig(request.param, **WAYS[request.param])
    model = hf_llmopt.optimize(build("llama", num_hidden_layers=1), llmopt=LLMOptConfig(quantization=config))
    return Logits(model), model.get_input_embeddings()(torch.arange(3, 21).view(2, 9)).detach()


def test_one_graph_gives_what_eager_gives(quantized):
    model, x = quantized
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, **BACKEND)(x), expected)
    assert model.model.llmopt is not None


def test_gradients(quantized):
    model, x = quantized
    found = []
    for run in (model, torch.compile(model, **BACKEND)):
        x = x.detach().clone().requires_grad_()
        run(x).square().sum().backward()
        found.append(x.grad)
    assert bool(found[0].any())
    torch.testing.assert_close(*found)


def test_autocast(quantized):
    model, x = quantized
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert torch.equal(torch.compile(model, **BACKEND)(x), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_program_gives_what_eager_gives_as_long_as_its_model_lives(quantized, strict):
    model, x = quantized
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict).module()
        assert torch.equal(program(x), model(x))


def test_a_program_without_its_model_says_so():
    with pytest.raises(UnsupportedQuantization, match="gone, or that lived in another process"):
        traced.quantized_linear(torch.ones(1, 8), None, -1, 8, False)


def test_copies_multiply_with_their_own_weights():
    module = hf_llmopt.optimize(build("llama"), llmopt="int8").model.layers[0].mlp.up_proj
    other = hf_llmopt.optimize(build("llama", seed=1), llmopt="int8").model.layers[0].mlp.up_proj
    x = torch.randn(2, module.in_features)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        expected = other(x)
        made.load_state_dict(other.state_dict())
        with torch.no_grad():
            assert torch.equal(torch.compile(made, **BACKEND)(x), expected)
            assert not torch.equal(torch.compile(module, **BACKEND)(x), expected)
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what inductor imports
def test_the_default_backend(quantized):
    model, x = quantized
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)
