"""How quantized weights enter a model: while it is loaded, when a quantized file is read, or afterwards.

transformers asks one function which quantizer a model has, `get_hf_quantizer`. Inside `from_pretrained(llmopt=...)` our
answer takes the place of its own (`hooks.py`): for files in a format of ours, and where a method is asked for that
sees only the weights, which are then quantized one tensor at a time as they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.utils.logging import tqdm
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import EIGHT_BITS, LLMOptConfig, QuantizationConfig
from ..errors import InvalidCheckpoint, UnsupportedQuantization
from ..kernels.arguments import Grid
from . import awq, formats, gptq, smoothquant
from .blocks import quantize_blocks
from .calibration import pack
from .experts import conversions, keep_apart, names_in_files, unfuse
from .formats import Recipe, Scheme
from .grid import make_float8_grid, make_grid
from .linear import QuantizedHead, QuantizedLinear
from .plan import ADAPTER, AS_LINEAR, GROUP_SIZES, HEAD, STOPPED, Plan, inputs_and_outputs, plan

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")  # the quant_method of files that we read
CALIBRATED = ("gptq", "awq", "smoothquant")  # methods that see activations: they begin with the whole model
LOADING: ContextVar[LLMOptConfig | None] = ContextVar("hf_llmopt_loading", default=None)


class WeightConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a model whose weights are ours; written to files in their format's own words.

    Args:
        recipe: The format; unknown until the model is there, if it is quantized while it is loaded.
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.quant_method: Any = "llmopt"  # a name of transformers' would switch on its rules for another library
        self.recipe = recipe

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {} if self.recipe is None else self.recipe.to_dict()


@dataclass
class QuantizationReport:
    """What was quantized, `model.llmopt.quantization`.

    Attributes:
        config: The entry `quantization_config` that files of the model have.
        quantized: Names of the modules.
        skipped: Why other products are not.
        bytes: Of the quantized modules' weights now, scales included.
        bytes_before: Of the same weights in the model's number format.
        head_bytes: Of the output head's quantized copy, which is there beside its weight (`head_bits`).

    Example:
        >>> from hf_llmopt import demo
        >>> import hf_llmopt
        >>> model, _ = demo.load()
        >>> report = hf_llmopt.optimize(model, llmopt="int4").llmopt.quantization
        >>> len(report.quantized), report.bytes < 0.3 * report.bytes_before
        (56, True)
    """

    config: dict[str, Any]
    quantized: list[str]
    skipped: dict[str, str]
    bytes: int
    bytes_before: int
    head_bytes: int


class Quantizer(HfQuantizer):
    """Quantized modules in a model that transformers loads, saves and moves.

    Args:
        quantization_config: The format.
        asked: What the user asked for.
        pre_quantized: The files are quantized already.
    """

    quantization_config: WeightConfig

    def __init__(self, quantization_config: WeightConfig, asked: QuantizationConfig, pre_quantized: bool) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.asked = asked
        self.plan: Plan | None = None
        self.names: set[str] = set()  # of the modules that are ours
        self.element_sizes: dict[str, int] = {}  # bytes of what they store as `weight`, which is full until it is read
        self.bytes_before = 0
        self._loading: PreTrainedModel | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        recipe: Any = self.quantization_config.recipe
        fused = unfuse(model, lambda name: recipe is None or recipe.scheme_of(name, AS_LINEAR) is not None)
        self._loading = model
        if not self.pre_quantized:
            self.use(plan(model, self.asked, fused))
        chosen = self._stored(model, kwargs.get("checkpoint_files")) if self.plan is None else self.plan.chosen
        for name, scheme in chosen.items():
            self._swap(model, name, model.get_submodule(name), scheme)

    def _stored(self, model: PreTrainedModel, files: list[str] | None) -> dict[str, Scheme]:
        """How the files hold each product that they hold quantized."""
        recipe: Any = self.quantization_config.recipe
        in_file = names_in_files(model)
        products = [name for name, module in model.named_modules() if inputs_and_outputs(module) is not None]
        in_files = {name: in_file(name) for name in products}
        found = {name: recipe.scheme_of(in_files[name], AS_LINEAR) for name in products}
        schemes = {in_files[name]: scheme for name, scheme in found.items() if scheme is not None}
        names: set[str] = set()
        for file in files or ():
            if str(file).endswith(".safetensors"):
                try:
                    with safe_open(file, "pt") as tensors:
                        names.update(tensors.keys())
                except SafetensorError as error:
                    raise InvalidCheckpoint(f"{file} cannot be read: {error}.") from error
        modules = {name.rpartition(".")[0] for name in names}
        # What transformers renames while it loads is found incomplete afterwards, if it is.
        known = {name: scheme for name, scheme in schemes.items() if name in modules}
        here = formats.stored_in(names, known)
        held = {name for name in schemes if name in here or name not in known}
        return {name: scheme for name, scheme in found.items() if scheme is not None and in_files[name] in held}

    def use(self, plan: Plan) -> None:
        """Follow a plan."""
        self.plan = plan
        self.quantization_config.recipe = plan.recipe

    def _swap(self, model: PreTrainedModel, name: str, module: Any, scheme: Scheme) -> None:
        inputs, outputs = inputs_and_outputs(module) or (0, 0)
        with torch.device("meta"):
            new = QuantizedLinear(inputs, outputs, scheme, module.bias is not None, module.weight.dtype)
        if not self.pre_quantized:
            # The full weight in the file finds its module by this, and is not cast before it is quantized.
            self.element_sizes[name] = int("weight" in new._parameters)
            new._parameters["weight"] = nn.Parameter(module.weight.detach(), requires_grad=False)
        model.set_submodule(name, new)
        self.names.add(name)
        self.bytes_before += module.weight.numel() * module.weight.element_size()

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Of the model, without the merging of experts. Older versions of transformers do not hand over the model."""
        found = super().update_weight_conversions(weight_conversions, *model)
        return found if self._loading is None else conversions(found, self._loading)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:  # noqa: D102
        name, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and name in self.names

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is loaded; the other tensors that a module stores are counted too."""
        name, _, leaf = param_name.rpartition(".")
        return self.element_sizes.get(name, 0) if leaf == "weight" and name in self.names else param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Of a tensor that is read: a quantized module's as the file has it, but for the bias."""
        name, _, leaf = converter.target_patterns[0].rpartition(".")
        return None if name in self.names and leaf != "bias" else dtype

    def get_quantize_ops(self) -> ConversionOps:  # noqa: D102
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._loading = None
        keep_apart(model)
        for name in sorted(self.names):
            module: Any = model.get_submodule(name)
            _require_all(name, module)
            module.requires_grad_(False)
            module.activations = self.asked.activations == "auto"
            module.prepare()
        head = model.get_output_embeddings()
        if self.asked.head_bits and type(head) is nn.Linear:
            name = next(name for name, module in model.named_modules() if module is head)
            group_size = -1 if self.asked.head_bits == 8 else _dividing(head.in_features)
            model.set_submodule(name, QuantizedHead.of(head, self.asked.head_bits, group_size))
        expected = ADAPTER, HEAD, STOPPED
        odd = {name: why for name, why in (self.plan.skipped if self.plan else {}).items() if why not in expected}
        if odd and not self.asked.skip:
            name, why = next(iter(odd.items()))
            warnings.warn(
                f"llmopt: {len(odd)} product(s) stay as they are, as {name}: {why}. "
                "model.llmopt.quantization lists all.",
                UserWarning,
                stacklevel=2,
            )

    def report(self, model: PreTrainedModel) -> QuantizationReport:
        """What was quantized."""
        skipped, held, head = dict(self.plan.skipped) if self.plan else {}, 0, 0
        for name, module in model.named_modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if isinstance(module, QuantizedLinear):
                held += sum(t.numel() * t.element_size() for leaf, t in own if leaf != "bias")
            elif isinstance(module, QuantizedHead):
                head = sum(t.numel() * t.element_size() for t in module.buffers())
                skipped[name] = (
                    f"multiplies with a copy of {module.bits} bits, made at run time; files keep it as it is"
                )
        config = self.quantization_config.to_dict()
        return QuantizationReport(config, sorted(self.names), skipped, held, self.bytes_before, head)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # of a config that was saved
            dtype = getattr(torch, dtype)
        modules = list(model.named_modules())  # adapters may have taken the places of ours, and hold them inside
        trains = not any(name.endswith(".base_layer") for name, _ in modules)
        for name, module in modules:
            if not isinstance(module, QuantizedLinear):
                continue
            with torch.device("meta"):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight = nn.Parameter(module.dense(dtype or model.dtype), trains)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach(), trains)
            model.set_submodule(name, dense.train(module.training))
        return model

    def is_serializable(self) -> bool:  # noqa: D102
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside quantized weights are; transformers itself refuses to train without any."""
        return True


class _Quantize(ConversionOps):
    """A full weight, as it comes from a file, becomes what its module stores."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert self.quantizer.plan is not None
        made: dict[str, Tensor] = {}
        for key in list(input_dict):  # one, or all experts of a layer
            weight = input_dict.pop(key)
            weight = weight[0] if isinstance(weight, list) else weight
            name = key.rpartition(".")[0]
            if name not in self.quantizer.names:
                made[key] = nn.Parameter(weight, requires_grad=False)
                continue
            module: Any = model.get_submodule(name)
            shape = module.out_features, module.in_features
            if weight.shape != shape and weight.T.shape == shape:
                weight = weight.T  # GPT-2's Conv1D
            stored = formats.pack(make(weight, self.quantizer.plan, module.scheme), module.scheme, weight.dtype)
            if "weight" not in stored:
                del module._parameters["weight"]
                missing_keys.discard(key)
            made |= {f"{name}.{leaf}": nn.Parameter(tensor, requires_grad=False) for leaf, tensor in stored.items()}
        return made


def make(weight: Tensor, plan: Plan, scheme: Scheme) -> Grid:
    """A weight's codes, found from the weight alone."""
    scale_dtype = scheme.scale_dtype(weight.dtype)
    if plan.config.method == "fp8":
        return make_float8_grid(weight, scale_dtype)
    return make_grid(weight, plan.bits, plan.group_size, plan.symmetric, plan.config.clip, scale_dtype)


def quantize(model: PreTrainedModel, asked: QuantizationConfig) -> None:
    """Quantize a loaded model in place.

    Raises:
        UnsupportedQuantization: It is quantized already, or nothing of it can be.
        CalibrationFailed: The method needs texts that there are not.
    """
    require_full(model)
    found = plan(model, asked, unfuse(model))
    quantizer = Quantizer(WeightConfig(found.recipe), asked, pre_quantized=False)
    quantizer.use(found)
    try:
        with torch.no_grad():
            for name, grid in _grids(model, found):
                module: Any = model.get_submodule(name)
                new = QuantizedLinear.from_grid(grid, found.chosen[name], module.bias).train(module.training)
                new.prepare()
                quantizer.names.add(name)
                quantizer.bytes_before += module.weight.numel() * module.weight.element_size()
                model.set_submodule(name, new)
    finally:
        if quantizer.names:  # if it was stopped, the model is what it is now, and its files say so
            quantizer.use(found.only(quantizer.names))
            method = quantizer.quantization_config.quant_method
            vars(model).update(hf_quantizer=quantizer, is_quantized=True, quantization_method=method)
            quantizer.postprocess_model(model)


def _grids(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Grid]]:
    """The chosen products, one after the other; who takes one may exchange its module."""
    if plan.config.method in CALIBRATED:
        yield from _calibrated(model, plan)
        return
    for name in tqdm(list(plan.chosen), desc="Quantizing weights"):
        module: Any = model.get_submodule(name)
        weight = module.weight.T if type(module) is Conv1D else module.weight
        yield name, make(weight, plan, plan.chosen[name])


def _calibrated(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, Grid]]:
    """Likewise, by a method that sees what the products read."""
    asked, scheme = plan.config, next(iter(plan.chosen.values()))
    options: dict[str, Any] = {
        "bits": plan.bits, "group_size": plan.group_size, "symmetric": plan.symmetric, "clip": asked.clip,
        "scale_dtype": scheme.scale_dtype(model.dtype),
    }  # fmt: skip
    if asked.method == "gptq":
        options |= {"act_order": asked.act_order, "damping": asked.damping}
    methods: dict[str, Any] = {"gptq": gptq, "awq": awq, "smoothquant": smoothquant}
    quantize_block = methods[asked.method].quantize_block
    tokens = _calibration_tokens(model, asked)
    chosen: dict[str, nn.Module] = {name: model.get_submodule(name) for name in plan.chosen}
    walk = quantize_blocks(
        model, partial(quantize_block, **options), lambda weight: make(weight, plan, scheme), tokens, chosen,
        resume=asked.resume, settings=repr((asked.method, options)),
    )  # fmt: skip
    for name, grid in walk:
        del chosen[name]
        yield name, grid


def _calibration_tokens(model: PreTrainedModel, asked: QuantizationConfig) -> Tensor:
    tokenizer = None
    with suppress(Exception):  # token ids need none; for texts, `pack` says that there is none
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    embedding: Any = model.get_input_embeddings()
    return pack(asked.calibration, tokenizer, asked.samples, asked.length, embedding.weight.shape[0])


def has(model: PreTrainedModel, asked: QuantizationConfig) -> bool:
    """Whether the model's weights are what is asked for."""
    quantizer = getattr(model, "hf_quantizer", None)
    return isinstance(quantizer, Quantizer) and quantizer.asked == asked


def require_full(model: PreTrainedModel) -> None:
    """Raise if the model's weights are quantized already."""
    entry = getattr(model.config, "quantization_config", None)
    if entry is not None or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedQuantization(_already(entry))


def _already(entry: Any) -> str:
    words = entry if isinstance(entry, dict) else entry.to_dict() if entry is not None else {}
    method = words.get("quant_method")
    return (
        f"The model is quantized already (quant_method {getattr(method, 'value', method)!r}). Load full-precision "
        "weights to quantize them anew, or leave the format out: llmopt=True runs the model as it is."
    )


def answering(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `get_hf_quantizer`, with our answer while a model is loaded with `llmopt=`."""

    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, *args: Any, gguf_file: Any = None, **kwargs: Any
    ) -> Any:
        asked = LOADING.get()
        ours = None
        if asked is not None and gguf_file is None and quantization_config is None:
            ours = _quantizer_for(config, asked)
        if ours is None:
            return original(config, quantization_config, device_map, *args, gguf_file=gguf_file, **kwargs)
        config.quantization_config = ours.quantization_config
        return ours, config, device_map

    return get_hf_quantizer


def _quantizer_for(config: Any, asked: LLMOptConfig) -> Quantizer | None:
    """Our quantizer for a model that is to be loaded, or `None` to leave it to transformers."""
    entry = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    wanted = asked.quantization
    if entry is None:
        if wanted is None or wanted.method in CALIBRATED:
            return None
        return Quantizer(WeightConfig(), wanted, pre_quantized=False)
    words = entry if isinstance(entry, dict) else entry.to_dict()
    try:
        recipe = Recipe.from_dict(words)
    except UnsupportedQuantization as reason:
        if wanted is not None:
            raise UnsupportedQuantization(_already(entry)) from None
        if words.get("quant_method") in METHODS:  # transformers may know more of it than we do
            if asked.strict:
                raise
            warnings.warn(f"llmopt: transformers loads the weights: {reason}", UserWarning, stacklevel=2)
        return None
    bits = {scheme.bits for _, scheme in recipe.groups}
    if wanted is not None and {wanted.bits or (8 if wanted.method in EIGHT_BITS else 4)} != bits:
        raise UnsupportedQuantization(_already(entry))
    return Quantizer(WeightConfig(recipe), wanted or QuantizationConfig(), pre_quantized=True)


def _require_all(name: str, module: QuantizedLinear) -> None:
    """Every tensor of a quantized module came from a file: transformers fills in those that did not, and warns."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
            continue
        if leaf in formats.OPTIONAL:
            del module._parameters[leaf]
        else:
            raise InvalidCheckpoint(
                f"The files hold no {name}.{leaf}, which the format {module.scheme.format!r} of their config.json "
                "needs. They are incomplete, or belong to another config.json."
            )


def _dividing(inputs: int) -> int:
    return next((size for size in GROUP_SIZES if inputs % size == 0), -1)
