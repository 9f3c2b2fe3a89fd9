"""Quantized modules in a model that transformers loads, saves, moves and makes dense: its `HfQuantizer`.

Which model gets one is decided in `loading.py`; a model that is loaded already, in `in_place.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import QuantizationConfig
from ..errors import InvalidCheckpoint, UnsupportedQuantization, about
from . import formats
from .expert_files import conversions, keep_apart, keep_whole, names_in_files
from .experts import Experts, unfuse
from .formats import Recipe, Scheme
from .head import QuantizedHead
from .heap import Freed
from .linear import QuantizedLinear
from .offload import rewrite
from .plan import ADAPTER, AS_LINEAR, HEAD, ROUTER, STOPPED, Plan, dividing_group, inputs_and_outputs, plan
from .product import Product, is_offloaded
from .report import QuantizationReport

# What safetensors calls the types of codes; transformers may cast others to these without a word.
KINDS = {torch.int8: ["I8"], torch.int32: ["I32"], torch.int64: ["I64"], torch.float8_e4m3fn: ["F8_E4M3"]}
SCALES = ["F16", "BF16", "F32", "F64"]


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
        self.experts: set[str] = set()  # names of `Experts`; all of one may come from one tensor
        self.transposed: set[str] = set()  # of those, GPT-2's Conv1D, whose full weight is the transposed one
        self.element_sizes: dict[str, int] = {}  # bytes of what they store as `weight`, which is full until it is read
        self.bytes_before = 0
        self.notes: dict[str, str] = {}  # what a calibration could not do for some of them
        self.freed = Freed()
        self._loading: PreTrainedModel | None = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        experts = unfuse(model)
        self._loading = model
        shapes = _shapes(kwargs.get("checkpoint_files") or ())
        if self.pre_quantized:
            chosen = self._stored(model, shapes)
        else:
            self.use(found := plan(model, self.asked, experts.left))
            chosen = found.chosen
            formats.stored_in(shapes, {}, map(names_in_files(model), chosen))  # that the files are full
        experts.undo(model, unless=chosen)
        self.experts = {name for name, module in model.named_modules() if isinstance(module, Experts)}
        for name, scheme in chosen.items():
            self._swap(model, name, model.get_submodule(name), scheme)

    def _stored(self, model: PreTrainedModel, shapes: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, Scheme]:
        """How the files, with tensors of these shapes and types, hold each product that they hold quantized."""
        recipe: Any = self.quantization_config.recipe
        in_file = names_in_files(model)
        products = [name for name, module in model.named_modules() if inputs_and_outputs(module) is not None]
        in_files = {name: in_file(name) for name in products}
        found = {name: recipe.scheme_of(in_files[name], AS_LINEAR) for name in products}
        schemes = {in_files[name]: scheme for name, scheme in found.items() if scheme is not None}
        modules = {name.rpartition(".")[0] for name in shapes}
        # What transformers renames while it loads is found incomplete afterwards, if it is.
        known = {name: scheme for name, scheme in schemes.items() if name in modules}
        here = formats.stored_in(shapes, known, [in_files[name] for name in products if found[name] is None])
        held = {name for name in schemes if name in here or name not in known}
        chosen = {name: scheme for name, scheme in found.items() if scheme is not None and in_files[name] in held}
        for name, scheme in chosen.items():
            inputs, outputs = inputs_and_outputs(model.get_submodule(name)) or (0, 0)
            for leaf, (shape, dtype) in formats.tensors(scheme, outputs, inputs, torch.float16).items():
                key = f"{in_files[name]}.{leaf}"
                if key not in shapes:
                    continue
                there, kind = shapes[key]
                if there != tuple(shape):
                    says = f"{scheme.format}, {scheme.bits} bits, group size {scheme.group_size}"
                    raise InvalidCheckpoint(
                        f"{key} is {list(there)} in the files. Of a weight [{outputs}, {inputs}] as "
                        f"their quantization_config says ({says}) it is {list(shape)}. One of them belongs to another "
                        "checkpoint."
                    )
                kinds = KINDS.get(dtype, SCALES if dtype.is_floating_point else [kind])
                if kind not in kinds:
                    raise InvalidCheckpoint(
                        f"{key} is in {kind} in the files; {scheme.format!r} has it in {' or '.join(kinds)}. "
                        "They are damaged, or belong to another config.json."
                    )
        return chosen

    def use(self, plan: Plan) -> None:
        """Follow a plan."""
        self.plan = plan
        self.quantization_config.recipe = plan.recipe

    def _swap(self, model: PreTrainedModel, name: str, module: Any, scheme: Scheme) -> None:
        inputs, outputs = inputs_and_outputs(module) or (0, 0)
        with torch.device("meta"):
            new = QuantizedLinear(inputs, outputs, scheme, module.bias is not None, module.weight.dtype)
        if type(module) is Conv1D:
            self.transposed.add(name)
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
        ours = name in self.names or name.rsplit(".", 2)[0] in self.experts
        return not self.pre_quantized and leaf == "weight" and ours

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
            if self.element_sizes.get(name) and is_offloaded(module) and module.weight.is_meta:
                # What is offloaded to disk is read from the full file, if that has a tensor of this name.
                rewrite(module, "weight", partial(self._codes, name, model))
            _require_all(name, module)
            module.requires_grad_(False)
            module.activations = self.asked.activations == "auto"
            with about(name):
                module.prepare()
            self.freed.after(module.in_features * module.out_features)
        head = model.get_output_embeddings()
        if self.asked.head_bits and type(head) is nn.Linear:
            name = next(name for name, module in model.named_modules() if module is head)
            group_size = -1 if self.asked.head_bits == 8 else dividing_group(head.in_features)
            model.set_submodule(name, QuantizedHead.of(head, self.asked.head_bits, group_size))
        expected = ADAPTER, HEAD, ROUTER, STOPPED
        odd = {name: why for name, why in (self.plan.skipped if self.plan else {}).items() if why not in expected}
        if odd and not self.asked.skip:
            name, why = next(iter(odd.items()))
            warnings.warn(
                f"llmopt: {len(odd)} product(s) stay as they are, as {name}: {why}. "
                "model.llmopt.quantization lists all.",
                UserWarning,
                stacklevel=2,
            )

    def quantized(self, name: str, weight: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
        """What a module stores of a full weight, as it comes from a file."""
        assert self.plan is not None
        module: Any = model.get_submodule(name)
        weight = weight.T if name in self.transposed else weight
        with about(name):
            return formats.pack(self.plan.grid(weight, module.scheme), module.scheme, weight.dtype)

    def _codes(self, name: str, model: PreTrainedModel, weight: Tensor) -> Tensor:
        return weight if weight.element_size() == 1 else self.quantized(name, weight, model)["weight"]

    def report(self, model: PreTrainedModel) -> QuantizationReport:
        """What was quantized."""
        skipped = self.plan.skipped if self.plan else {}
        config = self.quantization_config.to_dict()
        return QuantizationReport.of(model, config, self.names, skipped, self.notes, self.bytes_before)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # of a config that was saved
            dtype = getattr(torch, dtype)
        modules = list(model.named_modules())  # adapters may have taken the places of ours, and hold them inside
        trains = not any(name.endswith(".base_layer") for name, _ in modules)
        for name, module in modules:
            if not isinstance(module, Product):
                continue
            weight: Any = module.weight
            bias, inputs, outputs = module.bias, module.in_features, module.out_features
            as_conv1d = name in self.transposed
            if isinstance(module, QuantizedLinear):
                full = module.dense(dtype or model.dtype)
                weight = nn.Parameter(full.T.contiguous() if as_conv1d else full, trains)
                bias = None if bias is None else nn.Parameter(bias.detach(), trains)
            with torch.device("meta"):
                dense = Conv1D(outputs, inputs) if as_conv1d else nn.Linear(inputs, outputs, bias is not None)
            dense._parameters.update(weight=weight, bias=bias)
            model.set_submodule(name, dense.train(module.training))
        for name, module in modules:
            if isinstance(module, Experts) and all(type(part) is nn.Linear for part in module.products()):
                model.set_submodule(name, module.fuse().requires_grad_(trains).train(module.training))
                keep_whole(model)
        return model

    def is_serializable(self) -> bool:  # noqa: D102
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside quantized weights are; transformers itself refuses to train without any."""
        return True


class Unloadable(BaseException):
    """Carries an error out of transformers, which would collect it, load the rest and point to a table.

    Attributes:
        error: What is to be raised instead.
    """

    def __init__(self, error: UnsupportedQuantization) -> None:
        super().__init__(error)
        self.error = error


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
        made: dict[str, Tensor] = {}
        for key in list(input_dict):  # one, or all experts of a layer
            weight = input_dict.pop(key)
            weight = weight[0] if isinstance(weight, list) else weight
            name = key.rpartition(".")[0]
            if name not in self.quantizer.names:
                made[key] = nn.Parameter(weight, requires_grad=False)
                continue
            try:
                stored = self.quantizer.quantized(name, weight, model)
            except UnsupportedQuantization as error:
                raise Unloadable(error) from error
            if "weight" not in stored:
                del model.get_submodule(name)._parameters["weight"]
                missing_keys.discard(key)
            made |= {f"{name}.{leaf}": nn.Parameter(tensor, requires_grad=False) for leaf, tensor in stored.items()}
            self.quantizer.freed.after(weight.numel())
        return made


def _shapes(files: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor in safetensors files."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            try:
                with safe_open(file, "pt") as tensors:
                    parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                    shapes |= {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
            except (SafetensorError, OSError) as error:  # torn, or one of several that is missing
                raise InvalidCheckpoint(f"{file} cannot be read: {error}. Download or save it again.") from error
    return shapes


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
