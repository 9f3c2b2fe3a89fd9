"""Quantized models as transformers handles them: loaded, run, saved, moved, copied, refused."""

import copy
import gc
import json
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import accelerate
import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import hf_llmopt
from hf_llmopt import LLMOptConfig, QuantizationConfig, QuantizedLinear
from hf_llmopt.config import CALIBRATED
from hf_llmopt.demo.tokens import train_tokenizer
from hf_llmopt.errors import CalibrationFailed, InvalidCheckpoint, InvalidOption, UnsupportedQuantization
from hf_llmopt.kernels.reference import dequantize
from hf_llmopt.prompt_cache.epoch import fingerprint
from hf_llmopt.quantization.plan import plan

EXACT = {"activations": "none"}
METHODS = ("int4", "int8", "fp8")


def config(method: str, **options) -> LLMOptConfig:
    return LLMOptConfig(quantization=QuantizationConfig(method, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk, in float32."""
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """The same with a tokenizer."""
    path = tmp_path_factory.mktemp("words")
    build("llama", vocab_size=304).save_pretrained(path)
    train_tokenizer(["def f(x):\n    return x + 1\n" * 40], vocabulary=300).save_pretrained(path)
    return path


def load(path, llmopt, **options):
    return AutoModelForCausalLM.from_pretrained(path, llmopt=llmopt, dtype=options.pop("dtype", "auto"), **options)


def quantized(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def ids(*shape) -> torch.Tensor:
    return torch.randint(3, 112, shape or (2, 9))


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(ids()).logits


def greedy(model, llmopt=None):
    torch.manual_seed(0)
    return model.generate(ids(), max_new_tokens=12, do_sample=False, llmopt=llmopt).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_weight_only_gives_the_tokens_of_the_same_dequantized_weights(folder, method):
    model = load(folder, config(method, **EXACT))
    assert len(quantized(model)) == 21, "seven products in each of three layers"
    full, bound = load(folder, None), 0.15 if method == "int4" else 0.04
    for name, module in quantized(model).items():
        weight = full.get_submodule(name).weight
        assert (dequantize(module.grid()) - weight).norm() < bound * weight.norm()
    dense = copy.deepcopy(model).dequantize()
    assert not quantized(dense)
    assert (logits(model) - logits(dense)).abs().max() < 1e-4
    assert greedy(model) == greedy(dense, llmopt=False)
    assert model.llmopt.stats.served_by == "llmopt"
    assert model.llmopt.stats.attention


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_after_running_is_loaded_bit_for_bit(folder, tmp_path, method, dtype):
    model = load(folder, config(method), dtype=dtype)
    first, tokens = logits(model), greedy(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path, True)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(first, logits(again))
    assert tokens == greedy(again)


def test_an_equal_config_asks_for_what_is_there():
    """GPTQ with zeros is stored as AWQ, which the model must not be told apart by."""
    model, calibration = build("llama"), torch.randint(3, 100, (4, 64))

    def asked():
        return config("gptq", symmetric=False, group_size=32, calibration=calibration, samples=4, length=64)

    hf_llmopt.optimize(model, llmopt=asked())
    assert greedy(model, llmopt=asked()) == greedy(model)


def test_a_shard_that_is_missing_is_named(folder, tmp_path):
    load(folder, "int4").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InvalidCheckpoint, match=shard.name):
        load(tmp_path, True)


def test_files_name_a_standard_format_and_nothing_of_ours(folder, tmp_path):
    expected = {"int4": "gptq", "int8": "compressed-tensors", "fp8": "compressed-tensors"}
    for method, standard in expected.items():
        path = tmp_path / method
        load(folder, method).save_pretrained(path)
        entry = AutoConfig.from_pretrained(path).quantization_config
        assert entry["quant_method"] == standard
        assert "llmopt" not in (path / "config.json").read_text()


def test_a_loaded_model_is_quantized_as_while_it_is_loaded(folder):
    loaded = load(folder, "int4")
    later = hf_llmopt.optimize(load(folder, None), llmopt="int4")
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in later.state_dict().items()
    }
    assert torch.equal(logits(loaded), logits(later))
    assert loaded.llmopt.quantization == later.llmopt.quantization
    assert loaded.is_quantized
    assert later.is_quantized


def test_nothing_is_kept_twice(folder):
    model = load(folder, "int4")
    logits(model)
    for module in quantized(model).values():
        held = [*module.parameters(), *module.buffers()]
        assert module.kernel is not None
        # 4 bits, and at most 6 bytes of scales and zeros for 32 inputs
        assert sum(t.numel() * t.element_size() for t in held) <= module.in_features * module.out_features * (
            0.5 + 6 / 32
        )
    report = model.llmopt.quantization
    assert report.bytes < 0.18 * report.bytes_before
    assert set(report.skipped) == {"lm_head"}


def test_conv1d_of_gpt2_is_quantized(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    model = load(tmp_path, config("int4", **EXACT))
    assert len(quantized(model)) == 12
    assert torch.allclose(logits(model), logits(copy.deepcopy(model).dequantize()), atol=1e-4)
    same = hf_llmopt.optimize(build("gpt2"), llmopt=config("int4", **EXACT))
    assert torch.equal(logits(same), logits(model)), "square weights too are transposed in the file"


def test_scales_survive_a_cast_and_a_move(folder):
    model = load(folder, "int4", dtype=torch.bfloat16)
    grids = {name: module.grid() for name, module in quantized(model).items()}
    model.to(torch.float32)
    assert model.lm_head.weight.dtype is torch.float32
    stored = {name: (module.restore(), module.state_dict())[1] for name, module in quantized(model).items()}
    model.to(torch.bfloat16)
    for name, module in quantized(model).items():
        assert all(torch.equal(tensor, stored[name][key]) for key, tensor in module.state_dict().items())
        assert torch.equal(module.grid().scales.float(), grids[name].scales.float())
    module.kernel = None
    assert module.to("meta").scales.device.type == "meta"


def test_copies_and_pickles_carry_the_weights(folder):
    model = load(folder, "int4")
    expected = logits(model)
    assert torch.equal(expected, logits(copy.deepcopy(model)))
    assert torch.equal(expected, logits(pickle.loads(pickle.dumps(model))))


def test_weights_can_be_loaded_into_a_model_that_has_run(folder):
    one, other = load(folder, "int4"), load(folder, config("int4", clip=False))
    expected = logits(one)
    assert not torch.equal(expected, logits(other))
    other.load_state_dict(one.state_dict())
    assert torch.equal(expected, logits(other))


@pytest.mark.parametrize("places", [("cpu", "disk"), ("disk", "disk")])
@pytest.mark.parametrize("prequantized", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_models_run_and_save(folder, tmp_path, places, prequantized, method):
    reference = load(folder, config(method, **EXACT))
    source, llmopt = folder, config(method, **EXACT)
    if prequantized:
        reference.save_pretrained(tmp_path / "quantized")
        source = tmp_path / "quantized"
    plan = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    plan |= {f"model.layers.{index}": place for index, place in enumerate((*places, "cpu"))}
    model = load(source, llmopt, device_map=plan, offload_folder=tmp_path / "offload")
    assert (logits(model) - logits(reference)).abs().max() < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that offloaded models need memory to be saved
        model.save_pretrained(tmp_path / "saved")
    again, expected = load(tmp_path / "saved", True).state_dict(), reference.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("name", "method"), [("gpt2", "int8"), ("gpt_oss", "fp8")])
def test_disk_takes_transposed_weights_and_experts(tmp_path, name, method):
    build(name).save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full", config(method, **EXACT))
    loaded.save_pretrained(tmp_path / "quantized")
    for source in ("full", "quantized"):
        asked = config(method, **EXACT) if source == "full" else {"quantization": EXACT}
        model = load(tmp_path / source, asked, device_map={"": "disk"}, offload_folder=tmp_path / "disk")
        assert (logits(model) - logits(loaded)).abs().max() < 1e-4


@pytest.mark.parametrize("options", [{"method": "int4"}, {"method": "gptq", "samples": 8, "length": 32}], ids=str)
def test_a_model_that_accelerate_offloads_is_quantized(options):
    asked = {**options, **EXACT}
    if options["method"] == "gptq":
        asked["calibration"] = torch.randint(3, 112, (8, 32))
    here, away = build("qwen2"), accelerate.cpu_offload(build("qwen2"), execution_device="cpu")  # with biases
    for model in (here, away):
        hf_llmopt.optimize(model, llmopt={"quantization": asked})
    assert (logits(here) - logits(away)).abs().max() < 1e-4
    experts = accelerate.cpu_offload(build("mixtral"), execution_device="cpu")
    with pytest.raises(UnsupportedQuantization, match=r"experts are offloaded.* while they are loaded"):
        hf_llmopt.optimize(experts, llmopt={"quantization": asked})


def test_gradients_reach_what_stands_before(folder):
    model = load(folder, config("int4", **EXACT))
    module = quantized(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(3, module.in_features, requires_grad=True)
    module(x).sum().backward()
    dense = dequantize(module.grid())
    assert torch.allclose(x.grad, dense.sum(0).expand_as(x), atol=1e-5)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_has_a_quantized_copy_that_no_file_sees(tmp_path, bits, tied):
    build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", config("int4", head_bits=bits))
    plain = load(tmp_path / "full", "int4")
    assert not torch.equal(logits(model), logits(plain))
    assert greedy(model)
    assert model.llmopt.stats.served_by == "llmopt"
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", True)), logits(plain))
    before = logits(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    if not tied:
        assert torch.allclose(logits(model), 2 * before, rtol=1e-2, atol=1e-2), "the copy follows its weight"


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_copy_follows_writes_that_torch_does_not_count(tmp_path, tied):
    build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load(tmp_path, config("int4", head_bits=8))
    x = torch.randn(3, model.lm_head.in_features)
    with torch.no_grad():
        model.lm_head(x)
        other = torch.randn_like(model.lm_head.weight)
        model.get_input_embeddings().weight.data.copy_(other)
        model.lm_head.weight.data.copy_(other)
        assert torch.allclose(model.lm_head(x), x @ other.T, rtol=5e-2, atol=0.2)
        unseen = next(i for i in range(other.numel()) if i not in model.lm_head._places.tolist())
        model.lm_head.weight.data.view(-1)[unseen] += 1000
        model.llmopt.weights_changed()
        assert torch.allclose(model.lm_head(x), x @ model.lm_head.weight.T, rtol=5e-2, atol=10)


def test_the_heads_copy_is_counted_and_goes_where_the_model_goes(tmp_path):
    build("llama").save_pretrained(tmp_path)
    plain, model = load(tmp_path, "int4"), load(tmp_path, config("int4", head_bits=8))
    weight = model.lm_head.weight
    size = model.get_memory_footprint() - plain.get_memory_footprint()
    assert weight.numel() < size < 1.5 * weight.numel()
    report = model.llmopt.quantization
    assert (report.head_bytes, report.bytes) == (size, plain.llmopt.quantization.bytes)
    assert plain.llmopt.quantization.head_bytes == 0
    assert "the head in" in str(report)
    assert "not quantized" not in str(report)
    assert "not quantized" in str(plain.llmopt.quantization)
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)
    half = model.to(torch.bfloat16)
    assert all(buffer.dtype != torch.bfloat16 for buffer in half.lm_head.buffers())
    assert logits(half).dtype == torch.bfloat16
    assert half.get_memory_footprint() < plain.get_memory_footprint()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_head_that_trains_gets_its_gradient(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = load(tmp_path, config("int4", head_bits=8))
    model.requires_grad_(False).lm_head.requires_grad_(True)
    model(ids()).logits.sum().backward()
    assert bool(model.lm_head.weight.grad.any())


def test_modules_that_do_not_fit_stay_and_are_listed(tmp_path):
    build("llama", intermediate_size=72).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="3 product"):
        model = load(tmp_path, "int4")
    assert set(model.llmopt.quantization.skipped) == {"lm_head"} | {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    assert "72 inputs" in model.llmopt.quantization.skipped["model.layers.0.mlp.down_proj"]
    assert str(model.llmopt.quantization).endswith(
        "; not quantized: lm_head, model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj and 1 more"
    )
    kept = load(tmp_path, config("int4", skip=["down_proj", "layers.0"]))
    assert all("layers.0" not in name and "down_proj" not in name for name in quantized(kept))
    assert logits(kept).isfinite().all()


def test_errors_come_before_work_is_lost(folder, tmp_path):
    with pytest.raises(UnsupportedQuantization, match=r"no multiple of the group size 40.* divisor of 32, as 32\."):
        load(folder, config("int4", group_size=40))
    model = load(folder, "int4")
    for again in ("int8", "int4", "gptq"):
        if again != "int4":
            with pytest.raises(UnsupportedQuantization, match="quantized already"):
                hf_llmopt.optimize(model, llmopt=again)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedQuantization, match="quantized already"):
        load(tmp_path, "int8")
    assert quantized(load(tmp_path, "int4")), "the same number of bits is what the file holds"
    with pytest.raises(InvalidOption, match="from_pretrained"):
        load(folder, True).generate(ids(), llmopt="int4", max_new_tokens=2)
    assert greedy(model, llmopt="int4")
    with pytest.raises(InvalidOption, match="'int8' has 8 bits"):
        QuantizationConfig("int8", bits=4)
    with pytest.raises(InvalidOption, match="'int4' has 2, 3 or 4 bits"):
        QuantizationConfig("int4", bits=8)
    for options in ({"group_size": 128}, {"symmetric": False}):
        with pytest.raises(InvalidOption, match="'fp8' casts with one scale"):
            QuantizationConfig("fp8", **options)
    QuantizationConfig("fp8", group_size=-1, symmetric=True)
    for options in ({"bits": 4.0}, {"bits": True}, {"clip": 1}, {"symmetric": 0.0}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            QuantizationConfig(**options)


@pytest.mark.parametrize(
    ("method", "llmopt"),
    [("int4", True), ("int4", "int4"), ("int4", "kv_cache"), ("int8", "continuous_batching"), ("fp8", True)],
)
def test_a_pipeline_loads_quantized_files(words_folder, tmp_path, method, llmopt):
    """transformers gives the keyword to the pipeline's class, when the model is loaded."""
    made, files = load(words_folder, config(method, **EXACT)), tmp_path / "files"
    made.save_pretrained(files)
    tokenizer = AutoTokenizer.from_pretrained(words_folder)
    complete = pipeline("text-generation", model=str(files), tokenizer=tokenizer, llmopt=llmopt)
    assert quantized(complete.model).keys() == quantized(made).keys()
    assert complete.model.state_dict().keys() == made.state_dict().keys()
    assert complete("def f(x):", max_new_tokens=8, do_sample=False)[0]["generated_text"].startswith("def f(x):")
    if llmopt == "continuous_batching":
        complete.close()


def test_a_pipelines_keyword_reaches_no_other_model(words_folder, tmp_path):
    load(words_folder, "int4").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(words_folder)
    with pytest.raises(InvalidOption, match="'kv_cache'"):
        pipeline("text-generation", model=str(words_folder), tokenizer=tokenizer, llmopt="kv_cahce")
    for llmopt in (None, False):
        with pytest.raises((ImportError, ValueError)):  # transformers' own: it needs other packages
            pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer, llmopt=llmopt)
    full = pipeline("text-generation", model=str(words_folder), tokenizer=tokenizer, llmopt="int4")
    assert quantized(full.model)


def test_files_with_missing_tensors_are_refused(folder, tmp_path):
    load(folder, "int4").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for change, what in (
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "up_proj lacks scales"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.qweight": torch.zeros(3, 5, dtype=torch.int32)}), "qweight"),
    ):
        broken = dict(tensors)
        change(broken)
        save_file(broken, file, metadata={"format": "pt"})
        # transformers finds tensors of another shape itself from some version on
        with pytest.raises((InvalidCheckpoint, RuntimeError), match=f"{what}|ignore_mismatched_sizes"):
            load(tmp_path, True)


def test_a_damaged_tensor_is_named(folder, tmp_path):
    load(folder, "int4").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for leaf, wrong in (("qweight", torch.float32), ("scales", torch.int32)):
        name = f"model.layers.1.mlp.up_proj.{leaf}"
        save_file(tensors | {name: tensors[name].to(wrong)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InvalidCheckpoint, match=rf"^model\.layers\.1\.mlp\.up_proj\.{leaf} is in \w+ in"):
            load(tmp_path, True)


@pytest.mark.parametrize("method", METHODS)
def test_quantized_files_whose_config_does_not_say_so_are_not_quantized_again(folder, tmp_path, method):
    """Codes of int8 were taken for weights, and the model said nothing but nonsense."""
    load(folder, method).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    words = json.loads(path.read_text())
    del words["quantization_config"]
    path.write_text(json.dumps(words))
    for again in METHODS:
        with pytest.raises(InvalidCheckpoint, match=r"21 weights are quantized in the files, .* It is missing"):
            load(tmp_path, again)


@pytest.mark.parametrize("llmopt", [True, "int4"])
def test_a_config_where_auto_gptq_left_it_is_named(folder, tmp_path, llmopt):
    """With `llmopt=True` the model had random weights, as stock's has."""
    load(folder, "int4").save_pretrained(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(words.pop("quantization_config")))
    (tmp_path / "config.json").write_text(json.dumps(words))
    with pytest.raises(InvalidCheckpoint, match=r"has a quantize_config.json .* if the weights are full, remove"):
        load(tmp_path, llmopt)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    for quantize in (lambda: load(tmp_path, "int8"), lambda: hf_llmopt.optimize(model, llmopt="int8")):
        with pytest.raises(UnsupportedQuantization, match=r"^model\.layers\.1\.mlp\.up_proj: A weight has NaN"):
            quantize()


@pytest.mark.parametrize("entry", [{"bits": "4"}, {"group_size": 0}, {"sym": "yes"}], ids=str)
def test_an_odd_config_json_is_refused_by_the_name_of_its_field(folder, tmp_path, entry):
    load(folder, "int4").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    written["quantization_config"] |= entry
    path.write_text(json.dumps(written))
    with pytest.raises(InvalidCheckpoint, match=f"'{next(iter(entry))}' is .* correct it"):
        load(tmp_path, True)


def test_without_the_keyword_nothing_changes(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not quantized(model)
    assert type(model.lm_head) is nn.Linear
    assert getattr(model, "hf_quantizer", None) is None


def test_gptq_calibrates_while_it_walks(folder, tmp_path):
    samples = torch.randint(3, 112, (16, 32))
    full, nearest = load(folder, None), load(folder, config("int4", **EXACT))
    asked = config("gptq", calibration=samples, samples=16, length=32, **EXACT)
    model = load(folder, asked)
    assert len(quantized(model)) == 21
    with torch.no_grad():
        truth, near, ours = (each(samples).logits for each in (full, nearest, model))
    assert (ours - truth).norm() < 0.9 * (near - truth).norm()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, True)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "gptq"
    assert not any(isinstance(value, list) for value in entry.values()), "no calibration set in the file"


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"bits": 8}, r"qweight is \[8, 64\] in the files\. .* \(gptq, 8 bits, group size 32\) it is \[16, 64\]"),
        ({"quant_method": "gptqq"}, r"'gptqq', which nobody knows\. Known: .*gptq"),
        ({"modules_to_not_convert": ["q_proj"]}, "q_proj has g_idx, qweight, qzeros, scales"),
    ],
)
def test_a_config_of_other_files_is_refused(folder, tmp_path, says, why):
    """transformers would fill the gaps with random numbers, or fail far from the cause."""
    load(folder, config("int4", group_size=32)).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())
    entry["quantization_config"] |= says
    (tmp_path / "config.json").write_text(json.dumps(entry))
    with pytest.raises(InvalidCheckpoint, match=why):
        load(tmp_path, True)


@pytest.mark.parametrize("says", [{"quant_method": "bitsandbytes"}, {}], ids=["named", "of the first years"])
def test_weights_of_bitsandbytes_are_left_to_transformers(folder, tmp_path, monkeypatch, says):
    """Whose entry for them has another name than files have."""

    class Stored(HfQuantizer):
        def _process_model_before_weight_loading(self, model, **kwargs):
            pass

        is_trainable, is_serializable = False, lambda self: False

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Stored)
    words = json.loads((folder / "config.json").read_text())
    words["quantization_config"] = {**says, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(words))
    shutil.copy(folder / "model.safetensors", tmp_path)
    for llmopt in (True, "kv_cache", "speculative"):
        model = load(tmp_path, llmopt)
        assert isinstance(model.hf_quantizer, Stored)
        assert greedy(model) == greedy(load(folder, None))
        assert model.llmopt.stats.served_by == "llmopt"
    with pytest.raises(UnsupportedQuantization, match=r"'bitsandbytes' cannot be read\. .* quantized already"):
        load(tmp_path, "int4")


@pytest.mark.parametrize("entry", [[{"quant_method": "gptq"}], [], "gptq", 4, True], ids=repr)
def test_a_config_of_another_type_is_refused(folder, tmp_path, entry):
    """transformers fails on it while it prints the config."""
    words = {**json.loads((folder / "config.json").read_text()), "quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(words))
    for llmopt in (True, "int8"):
        with pytest.raises(InvalidCheckpoint, match=r"is an object with a quant_method, or null, got .* was edited"):
            load(tmp_path, llmopt)
        with pytest.raises(InvalidCheckpoint, match="is an object with a quant_method"):
            LlamaForCausalLM.from_pretrained(tmp_path, llmopt=llmopt)


@pytest.mark.parametrize("calibration", [[], ["text"], [[1, 2, 500]], torch.zeros(0, dtype=torch.long)])
def test_a_calibration_set_that_cannot_serve_is_refused_before_anything_is_changed(folder, calibration):
    model = load(folder, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationFailed):
        hf_llmopt.optimize(model, llmopt=config("gptq", calibration=calibration, samples=1, length=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert greedy(model, llmopt=True)


def test_what_the_file_format_cannot_tell_apart_from_a_skipped_module_stays_too(folder, tmp_path):
    """AWQ files name what is not quantized by parts of names."""
    with torch.device("meta"):
        model = build("llama")
    model.model.layers[0].mlp.gate = nn.Linear(64, 64)
    found = plan(model, QuantizationConfig("awq", skip=["mlp.gate"]))
    assert set(found.skipped) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"}
    assert "contains that of one that stays" in found.skipped["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize(
    ("held", "fits", "contradicts"),
    [
        ("int8", [{"head_bits": 4}, {"method": "int8"}, {"group_size": -1}, {}],
         [{"method": "int4"}, {"method": "fp8"}, {"bits": 4}, {"symmetric": False}, {"group_size": 32}]),
        ("int4", [{"activations": "none"}, {"method": "gptq"}, {"bits": 4}],
         [{"method": "int8"}, {"method": "awq"}, {"method": "smoothquant"}, {"bits": 8}]),
        ("fp8", [{"method": "fp8"}, {"head_bits": 8}], [{"method": "int8"}, {"method": "smoothquant"}]),
    ],
    ids=["int8", "int4", "fp8"],
)  # fmt: skip
def test_what_is_named_must_be_what_the_files_hold(folder, tmp_path, held, fits, contradicts):
    made = load(folder, held)
    made.save_pretrained(tmp_path)
    for asked in fits:
        again = load(tmp_path, {"quantization": asked})
        assert quantized(again).keys() == quantized(made).keys()
        assert greedy(again, llmopt={"quantization": asked})
    for asked in contradicts:
        with pytest.raises(UnsupportedQuantization, match=rf"{next(iter(asked))}=.* contradicts"):
            load(tmp_path, {"quantization": asked})


def test_the_report_outlives_a_model_that_nobody_kept(folder):
    handle = load(folder, "int4").llmopt
    gc.collect()
    assert handle._model() is None
    assert len(handle.quantization.quantized) == 21
    assert load(folder, True).llmopt.quantization is None


@pytest.mark.parametrize(
    "option", [{"calibration": ["text"]}, {"samples": 8}, {"length": 9}, {"resume": "here"}], ids=str
)
@pytest.mark.parametrize("method", [*METHODS, None])
def test_options_of_a_calibration_are_refused_where_there_is_none(method, option):
    with pytest.raises(InvalidOption, match=f"{next(iter(option))}=.*sees only the weights.*'gptq'"):
        QuantizationConfig(method, **option)
    QuantizationConfig("gptq", **option)


def test_it_is_said_that_a_calibration_set_is_small():
    asked = config("gptq", calibration=torch.randint(3, 100, (3, 48)), samples=7, length=48)
    with pytest.warns(UserWarning, match="fills 3 of 7 samples of 48 tokens"):
        hf_llmopt.optimize(build("llama"), llmopt=asked)


def test_the_name_of_a_file_is_no_calibration(words_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):")
    with pytest.raises(CalibrationFailed, match="name of a file"):
        load(words_folder, config("gptq", calibration=str(path)))


def test_every_method_is_a_name_of_the_keyword():
    methods = {option.name: option.metadata for option in fields(QuantizationConfig)}["method"]["choices"]
    for method in filter(None, methods):
        assert LLMOptConfig.parse(method).quantization == QuantizationConfig(method)
    assert set(CALIBRATED) < set(methods)


def test_names_that_contradict_or_do_not_exist(folder):
    with pytest.raises(InvalidOption, match=r"two values of quantization\.method"):
        LLMOptConfig.parse(["int4", "int8"])
    with pytest.raises(InvalidOption, match="Did you mean 'down_proj'"):
        load(folder, config("int4", skip=["down_prj"]))
    model = load(folder, config("int4", head_bits=8))
    assert "copy of 8 bits" in model.llmopt.quantization.skipped["lm_head"]


def test_inputs_that_no_kernel_can_read_get_torchs_own_answer(folder):
    model = load(folder, config("int4", **EXACT))
    module = quantized(model)["model.layers.0.mlp.up_proj"]
    for wrong in (torch.randn(1, 128), torch.randn(1, 63), torch.tensor(1.0), torch.ones(1, 64, dtype=torch.long)):
        with pytest.raises(RuntimeError):
            module(wrong)
    x = torch.randn(3, 64)
    assert torch.allclose(module(torch._neg_view(x)), module(-x), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is torch.bfloat16
    assert torch.equal(module.weight, dequantize(module.grid()))


def test_a_model_whose_quantization_was_stopped_is_what_its_files_say(folder, tmp_path):
    model = load(folder, None)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedQuantization):
        hf_llmopt.optimize(model, llmopt="int4")
    assert 0 < len(quantized(model)) < 21
    model.save_pretrained(tmp_path)
    again = load(tmp_path, True)
    assert quantized(again).keys() == quantized(model).keys()
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


def test_a_saved_model_is_dequantized_and_runs(folder, tmp_path):
    model = load(folder, config("int4", **EXACT))
    tokens = greedy(model)
    model.save_pretrained(tmp_path)
    model.dequantize()
    assert greedy(model) == tokens


def test_threads_may_meet_a_module_that_is_not_ready(folder):
    model = load(folder, config("int4", **EXACT))
    expected = logits(model)
    torch.manual_seed(0)
    same = ids()
    for _ in range(5):
        for module in quantized(model).values():
            module.restore()
        with ThreadPoolExecutor(4) as pool, torch.no_grad():
            found = list(pool.map(lambda _: model(same).logits, range(4)))
        assert all((expected - each).abs().max() < 1e-4 for each in found)


def test_prompts_on_disk_know_whether_activations_are_rounded(folder):
    one, other = load(folder, "int4"), load(folder, config("int4", **EXACT))
    assert fingerprint(one) == fingerprint(load(folder, "int4")) != fingerprint(other)
