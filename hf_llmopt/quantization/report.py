"""What became of a model's products: `model.llmopt.quantization`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .head import QuantizedHead
from .linear import QuantizedLinear

HEAD_COPY = "multiplies with a copy"  # how the reason of a quantized head begins


@dataclass
class QuantizationReport:
    """What was quantized, `model.llmopt.quantization`.

    Attributes:
        config: The entry `quantization_config` that files of the model have.
        quantized: Names of the modules.
        skipped: Why other products are not.
        notes: Quantized modules for which a calibrated method could not do all that it does for others, and why.
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
        >>> print(report)
        56 products in 3.3 MB instead of 25.2 MB; not quantized: lm_head
    """

    config: dict[str, Any]
    quantized: list[str]
    skipped: dict[str, str]
    notes: dict[str, str]
    bytes: int
    bytes_before: int
    head_bytes: int

    def __str__(self) -> str:
        """A line to print: how much there is less, and what stayed."""
        size = f"{self.bytes / 1e6:.1f} MB instead of {self.bytes_before / 1e6:.1f} MB"
        head = f"; the head in {self.head_bytes / 1e6:.1f} MB more" if self.head_bytes else ""
        kept = [name for name, reason in self.skipped.items() if not reason.startswith(HEAD_COPY)]
        left = f"; not quantized: {', '.join(kept[:3])}" if kept else ""
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        return f"{len(self.quantized)} products in {size}{head}{left}{more}"

    @classmethod
    def of(
        cls, model: nn.Module, config: dict[str, Any], quantized: Iterable[str], skipped: Mapping[str, str],
        notes: Mapping[str, str], before: int,
    ) -> QuantizationReport:  # fmt: skip
        """Of a model, with the bytes that it holds now.

        Args:
            model: The model.
            config: As `QuantizationReport.config`.
            quantized: Names of its quantized modules.
            skipped: Why others are not.
            notes: As `QuantizationReport.notes`.
            before: As `QuantizationReport.bytes_before`.
        """
        found = cls(config, sorted(quantized), dict(skipped), dict(notes), 0, before, 0)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
                found.bytes += _bytes(tensor for leaf, tensor in own if leaf != "bias")
            elif isinstance(module, QuantizedHead):
                found.head_bytes = _bytes(module.buffers(recurse=False))
                found.skipped[name] = f"{HEAD_COPY} of {module.bits} bits, made at run time; files keep it as it is"
        return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
