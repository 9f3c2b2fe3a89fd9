"""The kinds of modules that are recognised: products, norms, activations, gated MLPs.

A recogniser returns the module's replacement and the modules inside it that need none of their own, or `None`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels import cpu, reference
from ..kernels.arguments import Norm
from ..kernels.arguments import Product as ProductOf
from ..quantization.linear import QuantizedLinear
from ..walk import forward_hooks

Forward = Callable[[Tensor], Tensor]
Rows = Callable[[nn.Module], int]
Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Found = tuple[Forward, Iterable[nn.Module]]


class _Inside(threading.local):
    """Whether this thread runs an engine step: a plain forward in another thread must not meet replacements.

    Attributes:
        best: Of each row of logits only the place of the largest counts in this step.
        given: What the output head gave in it, and how often that had been written to.
    """

    now = False
    best = False
    given: tuple[Tensor, int] | None = None


inside = _Inside()


def is_plain(module: nn.Module) -> bool:
    """No hook, no adapter, no replaced forward: nothing but the class's own code runs when it is called."""
    return not (
        forward_hooks(module)
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or hasattr(module, "parametrizations")
        or hasattr(module, "_hf_hook")
    )


def is_library_code(module: nn.Module) -> bool:
    """Only code that transformers or torch came with, or our own: code of users may do what no trial shows."""
    kind = type(module)
    if kind is QuantizedLinear and "forward" not in vars(module):
        return True
    wrapped = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return not wrapped and all(
        str(where).startswith(("transformers.", "torch.")) for where in (kind.__module__, kind.forward.__module__)
    )


def fits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the C kernels take this input now."""
    return (
        inside.now
        and x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and (weight is None or weight.dtype == x.dtype)
        and not torch.is_grad_enabled()
    )


def plain_linear(module: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """`nn.Linear` (or another kind) itself, with nothing attached, where our kernels can read its weight."""
    return (
        type(module) is kind
        and is_plain(module)
        and type(module.weight) in (nn.Parameter, Tensor)  # the numbers of other classes lie elsewhere
        and module.weight.device.type in ("cpu", "cuda")
        and module.weight.dtype in cpu.DTYPES
        and module.weight.is_contiguous()
    )


def quantized_linear(module: Any) -> bool:
    """Our quantized product with nothing attached, in the layout of a kernel of ours."""
    if type(module) is not QuantizedLinear or not is_plain(module):
        return False
    module.prepare()
    return hasattr(module.kernel, "rows")


def product_of(module: Any, rows: slice = slice(None), factor: float = 1.0) -> ProductOf:
    """What a product module multiplies with; `rows` are the outputs that are meant.

    Raises:
        ValueError: They do not begin and end where a quantized weight can be cut.
    """
    bias = None if module.bias is None else module.bias[rows]
    if not quantized_linear(module):
        return ProductOf(module.weight[rows], bias, factor)
    start, stop, _ = rows.indices(module.out_features)
    weight = module.kernel.rows(start, stop)
    return ProductOf(weight, bias, factor, weight.share if module.activations else 0)


def linear(module: nn.Module, rows: Rows) -> Found | None:
    """`nn.Linear` or GPT-2's `Conv1D` itself, not a subclass: quantizers and adapters bring their own."""
    if not plain_linear(module) and not plain_linear(module, Conv1D):
        return None
    product = PRODUCTS[type(module)][0]
    eager: Forward = module.forward
    parameters = module._parameters
    limit = rows(module)
    if not limit:
        return None
    inputs = parameters["weight"].shape[type(module) is nn.Linear]  # type: ignore[union-attr]

    def forward(x: Tensor) -> Tensor:
        weight: Any = parameters["weight"]
        if x.numel() > limit * inputs or not fits(x, weight):
            return eager(x)
        return product(x if x.is_contiguous() else x.contiguous(), weight, parameters["bias"])

    return forward, ()


# Modules whose weight multiplies their input: our product and torch's.
PRODUCTS: dict[type[nn.Module], tuple[Product, Product]] = {
    nn.Linear: (cpu.linear, nn.functional.linear),
    Conv1D: (cpu.conv1d, reference.conv1d),
}


def norm(module: nn.Module, rows: Rows) -> Found | None:
    """LayerNorm or RMSNorm by any name: which of their variants it is, it must prove."""
    how = norm_of(module)
    if how is None or epsilon_of(module) is None:
        return None
    eager: Forward = module.forward
    parameters = module._parameters

    def forward(x: Tensor) -> Tensor:
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if not fits(x, weight) or x.shape[-1] != how.width:
            return eager(x)
        return cpu.norm(x if x.is_contiguous() else x.contiguous(), how._replace(weight=weight, bias=bias))

    return forward, ()


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that is nearest to what a module computes; `None` if it has other parameters than one."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    shape: Any = getattr(module, "normalized_shape", ()) if weight is None else weight.shape
    if len(shape) != 1 or list(module.children()) or set(parameters) - {"weight", "bias"}:
        return None
    dtype = torch.float32 if weight is None else weight.dtype
    device = torch.device("cpu") if weight is None else weight.device
    if dtype not in cpu.DTYPES or device.type == "meta":
        return None
    epsilon = epsilon_of(module)
    found = Norm(weight, bias, shape[0], 1e-5 if epsilon is None else epsilon)  # OLMo writes it into its forward
    generator = torch.Generator("cpu").manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    x = draw(4, found.width).to(device, dtype) + 1
    # A copy with weights that show: of zeros, say, every variant gives the same.
    shown = copy.deepcopy(module)
    own = [None if p is None else draw(found.width).to(device, dtype) for p in (weight, bias)]
    with torch.no_grad():
        for parameter, values in zip(
            (shown._parameters.get("weight"), shown._parameters.get("bias")), own, strict=True
        ):
            if parameter is not None and values is not None:
                parameter.copy_(values)
        eager = shown(x).float()
        kinds = ((False, 0), (False, 1), (False, 2), (True, 0), (True, 1))
        trial = found._replace(weight=own[0], bias=own[1])
        ways = [reference.norm(x, trial._replace(centre=c, variant=v)).float() for c, v in kinds]
        errors = [(way - eager).abs().sum() for way in ways]
    centre, variant = kinds[int(torch.stack(errors).argmin())]
    return found._replace(centre=centre, variant=variant)


def epsilon_of(module: nn.Module) -> float | None:
    """The epsilon of a norm module, by the names that transformers gives it; `None` for other modules."""
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    return epsilon if isinstance(epsilon, float) and not list(module.children()) else None


def activation(module: nn.Module, rows: Rows) -> Found | None:
    """An activation module without parameters."""
    kind = activation_kind(module)
    if kind is None:
        return None
    eager: Forward = module.forward

    def forward(x: Tensor) -> Tensor:
        return cpu.gated(x, None, kind) if x.is_contiguous() and fits(x, None) else eager(x)

    return forward, ()


_KINDS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def activation_kind(module: Any) -> str | None:
    """Name of the activation that a module is, as `cpu.gated` knows it, or `None`."""
    if not isinstance(module, nn.Module) or not is_plain(module) or list(module.parameters()):
        return None
    return _KINDS.get(type(module).__name__)


def gated_mlp(module: nn.Module, rows: Rows) -> Found | None:
    """`down(act(gate(x)) * up(x))`, with gate and up apart or joined in `gate_up_proj`."""
    children = module._modules
    act_name = next((name for name in ("act_fn", "activation_fn", "act") if name in children), None)
    kind = activation_kind(children[act_name]) if act_name else None
    products = [name for name in children if name != act_name]
    joined = sorted(products) == ["down_proj", "gate_up_proj"]
    if kind is None or not (joined or sorted(products) == ["down_proj", "gate_proj", "up_proj"]):
        return None
    linears: list[Any] = [children[name] for name in products]
    if not all(map(plain_linear, linears)) or len({linear.weight.dtype for linear in linears}) != 1:
        return None
    limit = min(rows(linear) for linear in linears)
    if not limit:
        return None
    eager: Forward = module.forward
    by_name: dict[str, Any] = dict(zip(products, (linear._parameters for linear in linears), strict=True))
    down = by_name["down_proj"]
    first = by_name["gate_up_proj" if joined else "gate_proj"]
    second = None if joined else by_name["up_proj"]
    inputs = next(linear for name, linear in zip(products, linears, strict=True) if name != "down_proj").in_features

    def forward(x: Tensor) -> Tensor:
        if x.numel() > limit * inputs or not fits(x, first["weight"]):
            return eager(x)
        x = x if x.is_contiguous() else x.contiguous()
        gate = cpu.linear(x, first["weight"], first["bias"])
        if second is None:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = cpu.linear(x, second["weight"], second["bias"])
        return cpu.linear(cpu.gated(gate, up, kind), down["weight"], down["bias"])

    # Above the limit the eager forward runs, and its parts have no replacement: they would not be used there either.
    return forward, [*linears, children[act_name]]  # type: ignore[list-item,index]


RECOGNISERS: dict[str, Callable[[nn.Module, Rows], Found | None]] = {
    "gated MLP": gated_mlp,
    "product": linear,
    "norm": norm,
    "activation": activation,
}
