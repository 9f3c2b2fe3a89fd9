"""One frozen dataclass per part of the series: what can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

from ..errors import InvalidOption
from .section import Section, option, short_repr

LEAST_KEPT = 64  # tokens that eviction leaves at least: with fewer, what is always kept would leave no choice


@dataclass(frozen=True)
class KVCacheConfig(Section):
    """Part 1, the paged KV cache. Exact, unless `dtype` or `eviction` say otherwise.

    Args:
        page_size: Tokens per page.
        dtype: Numbers in pages. `"auto"`: the model's own. `"int8"`, `"fp8"` and `"int4"`: about half and a quarter of
            bfloat16's bytes, at a small loss of quality; written so, and read so by the kernels.
        max_tokens: Most tokens the pages of one model may hold, `None` for as many as the memory allows.
        memory_fraction: Share of the memory that is free when pages are made which they may fill, in (0, 1].
        eviction: Give up tokens in layers of full attention. `"sink"` (Xiao et al. 2023) keeps the first tokens and the
            last ones, in constant memory however long a text becomes. The others give up part of the prompt, each key
            head its own, once it is computed: `"snapkv"` (Li et al. 2024) keeps what its end attends to, `"h2o"` (Zhang
            et al. 2023) what all of it attends to, `"expected"` (Devoto et al. 2025) what queries distributed like its
            last ones would attend to, `"kvzip"` (Kim et al. 2025) what is needed to repeat it, for a second pass over
            the prompt.
        keep_tokens: Most tokens that eviction keeps, of the text with `"sink"` (1024 by default), of the prompt with
            the others; at least 64.
        keep_ratio: Share of the prompt that is kept instead, in (0, 1]; a half by default. Not with `"sink"`.
        offload: Keep the pages of layers with full attention in host memory, for contexts larger than a GPU's memory:
            a pass fetches those it reads, a layer ahead. Every step moves all keys of its requests over the bus.

    Example:
        >>> from hf_llmopt import KVCacheConfig
        >>> KVCacheConfig(page_size=32).page_size
        32
    """

    main: ClassVar[str | None] = "dtype"
    page_size: int = option(16, kind=int, low=1, high=4096)
    dtype: str = option("auto", choices=("auto", "int8", "fp8", "int4"))
    max_tokens: int | None = option(None, kind=int, low=1)
    memory_fraction: float = option(0.9, kind=float, low=0.01, high=1.0)
    eviction: str | None = option(None, choices=(None, "sink", "snapkv", "h2o", "expected", "kvzip"), own="eviction")
    keep_tokens: int | None = option(None, kind=int, low=LEAST_KEPT)
    keep_ratio: float | None = option(None, kind=float, low=0.01, high=1.0)
    offload: bool = option(False, choices=(False, True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and self.eviction is not None:
            raise InvalidOption(
                f"KVCacheConfig: offload=True moves whole pages, eviction={self.eviction!r} rows between them. "
                "Give one of the two."
            )
        named = [name for name in ("keep_tokens", "keep_ratio") if getattr(self, name) is not None]
        if named and self.eviction is None:
            raise InvalidOption(
                f"KVCacheConfig({named[0]}=...) says how much eviction keeps, and eviction=None evicts nothing. "
                "Choose eviction='sink', 'snapkv', 'h2o', 'expected' or 'kvzip'."
            )
        if len(named) == 2:
            raise InvalidOption(
                f"KVCacheConfig: keep_tokens={self.keep_tokens} and keep_ratio={self.keep_ratio} both say how much "
                "eviction keeps. Give one."
            )
        if self.eviction == "sink" and self.keep_ratio is not None:
            raise InvalidOption(
                f"KVCacheConfig(keep_ratio={self.keep_ratio}): 'sink' keeps a number of tokens, however long the text "
                "becomes. Give keep_tokens=..., or choose 'snapkv', 'h2o', 'expected' or 'kvzip', which keep a share "
                "of the prompt."
            )
        if self.eviction == "sink" and (self.keep_tokens or 1024) < 3 * self.page_size:
            raise InvalidOption(
                f"KVCacheConfig: 'sink' keeps the first page, and two for the last tokens: with page_size="
                f"{self.page_size} keep_tokens is at least {3 * self.page_size}, got {self.keep_tokens or 1024}."
            )


@dataclass(frozen=True)
class AttentionConfig(Section):
    """How a span reads its pages. Exact.

    Args:
        backend: `"cpu"` reads pages where they lie, in C; `"triton"` likewise on a GPU; `"sdpa"` through torch's scaled
            dot product attention; `"reference"` is the plain-torch definition of what correct means, and slow. `"auto"`
            takes "cpu" on the CPU, where the kernels were built; on a GPU the fastest for each kind of pass, other
            packages included, measured once and remembered; else "sdpa".

    Example:
        >>> from hf_llmopt import AttentionConfig
        >>> AttentionConfig("reference").backend
        'reference'
    """

    main: ClassVar[str | None] = "backend"
    backend: str = option("auto", choices=("auto", "cpu", "triton", "sdpa", "reference"), own="attention")


@dataclass(frozen=True)
class BatchingConfig(Section):
    """Part 6, continuous batching: how the spans of a step are chosen, and who waits. Exact.

    Args:
        policy: Which waiting request starts next. `"fcfs"`: who came first; `"priority"`: of the highest priority;
            `"fair"`: of the tenant for which the fewest tokens were computed.
        max_batch_tokens: Most tokens one forward pass computes; longer prompts are prefilled in several steps.
        max_requests: Most requests that hold pages at one time; others wait their turn.
        max_waiting: Most requests that may wait; `submit` raises `EngineFull` beyond.
        aging: Later arrivals that outweigh one level of priority, so that nobody waits for ever.
        swap_bytes: Most bytes of host memory for the keys of requests that lost their pages to others. Where copying
            is slower than computing them again, or with 0, they are computed again.
        overlap: Launch the next step of submitted requests before the tokens of the last one are read; a request that
            ends is noticed one step late. `None`: where the model is not on the CPU.
        continuous: A text-generation pipeline submits its inputs as requests that come and go, instead of one padded
            batch after the other. `None`: where this section is given in any form, `llmopt="continuous_batching"` among
            them; `llmopt=True` alone keeps the stock class.

    Example:
        >>> from hf_llmopt import BatchingConfig
        >>> BatchingConfig("fair", max_batch_tokens=512)
        BatchingConfig(policy='fair', max_batch_tokens=512)
    """

    main: ClassVar[str | None] = "policy"
    policy: str = option("fcfs", choices=("fcfs", "priority", "fair"))
    max_batch_tokens: int = option(2048, kind=int, low=1)
    max_requests: int = option(256, kind=int, low=1)
    max_waiting: int = option(10_000, kind=int, low=1)
    aging: int = option(256, kind=int, low=1)
    swap_bytes: int = option(2**30, kind=int)
    overlap: bool | None = option(None, choices=(False, True))
    continuous: bool | None = option(None, choices=(False, True))


@dataclass(frozen=True)
class PromptCacheConfig(Section):
    """Part 2, prompt caching: pages are found instead of computed. Exact.

    Args:
        path: Folder in which prompts outlive the process, `None` for none. Processes may share it.
        max_bytes: Most bytes of pages on the model's device that are kept though no request holds them; `None` for an
            eighth of the memory that is free when the engine is made.
        host_bytes: Most bytes of host memory for pages that had to leave the device; `None` for an eighth of what is
            free if the model is on an accelerator, else 0.
        disk_bytes: Most bytes of files in `path`.
        ttl: Seconds after its last use at which a page is given up, `None` for no such limit.
        salt: Only prompts with the same salt share pages; `None` is a salt like any other.

    Example:
        >>> from hf_llmopt import PromptCacheConfig
        >>> PromptCacheConfig(salt="tenant 7")
        PromptCacheConfig(salt='tenant 7')
    """

    main: ClassVar[str | None] = "path"
    path: str | Path | None = option(None)  # noqa: RUF009 - a field, like the others
    max_bytes: int | None = option(None, kind=int)
    host_bytes: int | None = option(None, kind=int)
    disk_bytes: int = option(16 * 2**30, kind=int)
    ttl: float | None = option(None, kind=float)
    salt: str | None = option(None)

    def __post_init__(self) -> None:
        if isinstance(self.path, Path):
            object.__setattr__(self, "path", str(self.path))
        super().__post_init__()


@dataclass(frozen=True)
class SpeculativeConfig(Section):
    """Part 5, speculative decoding: guesses are computed along with the last token, and kept if they are right. Exact.

    Args:
        method: Who guesses. `"suffix"`: what followed when the last tokens stood in the text before. `"draft_model"`: a
            smaller model. `"layer_skip"`: the model's own first layers, where it was trained for that. `"eagle"`: a
            drafter that was trained for this very model and reads its hidden states. `"mtp"`: such a layer in the
            model's own files. `"auto"`: the draft model if there is one, else `"suffix"`.
        draft_model: A model on the same device, or its name; for `"eagle"` the drafter.
        tokenizer: The tokenizer of the model that generates, or its name, where the draft model has another.
        draft_tokenizer: The draft model's.
        exit_layer: The layer behind which `"layer_skip"` guesses, counted from 1; `None` for about a quarter of all.
        num_tokens: Guesses of a request in each step; `None` for as many as pay, none among them: by what passes of
            different lengths take here, and how often guesses were right.

    Example:
        >>> from hf_llmopt import SpeculativeConfig
        >>> SpeculativeConfig(num_tokens=4)
        SpeculativeConfig(num_tokens=4)
    """

    main: ClassVar[str | None] = "method"
    method: str = option("auto", choices=("auto", "suffix", "draft_model", "layer_skip", "eagle", "mtp"), own="drafter")
    draft_model: Any = option(None, kind=object)  # noqa: RUF009 - a field, like the others
    tokenizer: Any = option(None, kind=object)  # noqa: RUF009 - a field, like the others
    draft_tokenizer: Any = option(None, kind=object)  # noqa: RUF009 - a field, like the others
    exit_layer: int | None = option(None, kind=int, low=1)
    num_tokens: int | None = option(None, kind=int, low=1, high=64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.effective_method in ("draft_model", "eagle")) != (self.draft_model is not None):
            raise InvalidOption(
                f"SpeculativeConfig(method={self.method!r}, draft_model={type(self.draft_model).__name__}): methods "
                "'draft_model' and 'eagle' need draft_model=, a model or its name, and no other method takes one."
            )
        if isinstance(self.draft_model, PathLike):
            object.__setattr__(self, "draft_model", fspath(self.draft_model))
        if not (self.draft_model is None or isinstance(self.draft_model, str) or hasattr(self.draft_model, "forward")):
            raise InvalidOption(f"draft_model is a model or its name, got {type(self.draft_model).__name__}.")
        for name in ("tokenizer", "draft_tokenizer"):
            given = getattr(self, name)
            if not (given is None or isinstance(given, str) or hasattr(given, "get_vocab")):
                raise InvalidOption(f"{name} is a tokenizer or its name, got {type(given).__name__}.")
        tokenizers = [given for given in (self.tokenizer, self.draft_tokenizer) if given is not None]
        if tokenizers and (len(tokenizers) < 2 or self.effective_method != "draft_model"):
            raise InvalidOption(
                "SpeculativeConfig(tokenizer=..., draft_tokenizer=...): the model's tokenizer and the draft model's "
                "come together, and with draft_model=. Leave both out where they are the same."
            )
        if self.exit_layer is not None and self.method != "layer_skip":
            raise InvalidOption(
                f"SpeculativeConfig(method={self.method!r}, exit_layer={self.exit_layer}): only method 'layer_skip' "
                "leaves layers out."
            )

    @property
    def effective_method(self) -> str:
        """The method that `"auto"` stands for."""
        if self.method != "auto":
            return self.method
        return "suffix" if self.draft_model is None else "draft_model"


@dataclass(frozen=True)
class QuantizationConfig(Section):
    """Part 3, quantization: another number format for the weights of products. Lossy.

    Args:
        method: How codes are found; `None` for `"int4"` (`"int8"` where `bits` is 8), or for whatever quantized files
            hold. `"int4"` rounds to the nearest code of ranges with the least squared error, `"int8"` likewise, `"fp8"`
            casts to float8_e4m3; these see only the weights. `"gptq"` (Frantar et al. 2022), `"awq"` (Lin et al. 2023)
            and `"smoothquant"` (Xiao et al. 2022) also see what the layers read, on `calibration`.
        bits: Of a code: 2, 3, 4 or 8. `None`: 8 for int8, fp8 and smoothquant, 4 for the others.
        group_size: Inputs that share a scale; -1 for all inputs of an output. `None`: -1 for int8, fp8 and
            smoothquant, else that of 128, 64 and 32 which divides the inputs of most weights.
        symmetric: No zeros: codes stand around the middle. `None`: no zeros, but for awq.
        act_order: GPTQ rounds the inputs with the largest activations first.
        damping: GPTQ adds this share of the Hessian's mean diagonal to its diagonal.
        clip: Search the range of each group for the least error, instead of taking the largest weight.
        skip: Modules that stay as they are: names, or ends of names.
        head_bits: Quantize the output head too: 4 or 8. At run time only; files keep the head as it is.
        calibration: Texts, or token ids, for the methods that need them; `None` for texts from the documentation of
            Python's standard library.
        samples: Sequences of the calibration set that are used.
        length: Tokens of a sequence.
        resume: Folder in which the blocks that are done lie until all are, so that a calibration that was stopped goes
            on.
        activations: `"auto"` rounds what a product reads to int8 where that is faster, a scale for each token and
            group of inputs; `"none"` never does.
        format: Of files that are saved: a name of `hf_llmopt.register`; `None` for the one that most readers know.

    Example:
        >>> from hf_llmopt import QuantizationConfig
        >>> QuantizationConfig("gptq", bits=3)
        QuantizationConfig(method='gptq', bits=3)
    """

    main: ClassVar[str | None] = "method"
    method: str | None = option(None, choices=(None, "int4", "int8", "fp8", "gptq", "awq", "smoothquant"))
    bits: int | None = option(None, choices=(None, 2, 3, 4, 8))
    group_size: int | None = option(None, kind=int, low=-1)
    symmetric: bool | None = option(None, choices=(None, False, True))
    act_order: bool = option(True, choices=(False, True))
    damping: float = option(0.01, kind=float, low=1e-6, high=1.0)
    clip: bool = option(True, choices=(False, True))
    skip: tuple[str, ...] = option((), kind=tuple)
    head_bits: int | None = option(None, choices=(None, 4, 8))
    calibration: Any = option(None, kind=object)  # noqa: RUF009 - a field, like the others
    samples: int = option(128, kind=int, low=1)
    length: int = option(512, kind=int, low=2)
    resume: str | Path | None = option(None)  # noqa: RUF009 - a field, like the others
    activations: str = option("auto", choices=("auto", "none"))
    format: str | None = option(None, choices=(None,), own="format")

    def __post_init__(self) -> None:
        if isinstance(self.resume, Path):
            object.__setattr__(self, "resume", str(self.resume))
        skip: Any = self.skip
        if isinstance(skip, (str, list)):
            object.__setattr__(self, "skip", (skip,) if isinstance(skip, str) else tuple(skip))
        super().__post_init__()
        if self.method in EIGHT_BITS and self.bits not in (None, 8):
            raise InvalidOption(f"QuantizationConfig: {self.method!r} has 8 bits, got bits={self.bits}.")
        if self.method == "int4" and self.bits == 8:
            raise InvalidOption("QuantizationConfig: 'int4' has 2, 3 or 4 bits, got bits=8. Use 'int8'.")
        if self.method == "fp8" and (self.group_size not in (None, -1) or self.symmetric is False):
            raise InvalidOption(
                "QuantizationConfig: 'fp8' casts with one scale for all inputs of an output and no zeros, got "
                f"group_size={self.group_size}, symmetric={self.symmetric}. Leave both out, or use 'int8'."
            )
        for each in fields(self) if self.method not in CALIBRATED else ():
            if each.name in FOR_CALIBRATED and self.names(each.name):
                raise InvalidOption(
                    f"QuantizationConfig({each.name}=...): {self.effective_method!r} sees only the weights and "
                    f"calibrates on nothing. Leave it out, or use {', '.join(map(repr, CALIBRATED))}."
                )
        if self.group_size == 0:
            raise InvalidOption("QuantizationConfig(group_size=...) is a number of inputs, -1 for all, or None, got 0.")

    @property
    def effective_method(self) -> str:
        """The method for full weights."""
        return self.method or ("int8" if self.bits == 8 else "int4")


FOR_CALIBRATED = ("calibration", "samples", "length", "resume")  # options
CALIBRATED = ("gptq", "awq", "smoothquant")  # methods that see activations: they begin with the whole model
EIGHT_BITS = ("int8", "fp8", "smoothquant")  # methods


for _class in (
    KVCacheConfig,
    AttentionConfig,
    BatchingConfig,
    PromptCacheConfig,
    SpeculativeConfig,
    QuantizationConfig,
):
    _class.__repr__ = short_repr  # type: ignore[method-assign]
