"""llama.cpp on a model of the same shape, through llama-cpp-python: how fast it decodes, beside us in the same process.

Both formats quantize the output head too. Weights are random: blocks of a valid format with arbitrary codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from hf_llmopt import LLMOptConfig

from .measure import generate, interleave, paired_ratio, summary
from .quantized import METHODS, quantize
from .workloads import SHAPES, Workload, build, ragged_prompts

FORMATS = {"Q4_0": "int4, head too", "Q8_0": "int8, head too"}  # and what it is compared with
ROWS = (1, 16)
GOALS = {1: 1.0, 16: 1.5}
PROMPT, STEPS = 16, 16
NEEDED = ("llama_cpp", "gguf")


def measure(
    shapes: Sequence[str], repeats: int, quick: bool = False, on_run: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Milliseconds of a decode step, llama.cpp's and ours, interleaved; greedy, each prompt of its own sequence.

    Args:
        shapes: Names in `workloads.SHAPES`.
        repeats: Timed runs of each way, after one that is not timed.
        quick: The shapes' miniatures.
        on_run: Called after each run.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return {"skipped": f"{', '.join(missing)} not installed; pip install llama-cpp-python gguf"}
    begin()
    cases = []
    with TemporaryDirectory() as folder:
        for shape in shapes:
            if SHAPES[shape]["model_type"] in KNOWN:
                for kind in FORMATS:
                    cases += _cases(shape, kind, Path(folder) / "model.gguf", repeats, quick, on_run)
    from importlib.metadata import version

    return {"version": version("llama-cpp-python"), "threads": torch.get_num_threads(), "cases": cases}


@cache
def begin() -> object:
    """Initialize llama.cpp, and tell it to be silent; what is returned has to live as long as that is to hold."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return silence


def runs_of(shapes: Sequence[str], repeats: int) -> int:
    """How often `measure` calls `on_run`, where the packages are there."""
    known = sum(SHAPES[shape]["model_type"] in KNOWN for shape in shapes)
    return (
        0 if any(find_spec(name) is None for name in NEEDED) else known * len(FORMATS) * len(ROWS) * 2 * (repeats + 1)
    )


def _cases(
    shape: str, kind: str, path: Path, repeats: int, quick: bool, on_run: Callable[[str], None]
) -> list[dict[str, Any]]:
    full = build(shape, torch.bfloat16, miniature=quick)
    write(path, full.config, kind)
    model = quantize(full, METHODS[FORMATS[kind]])
    keyword = LLMOptConfig(quantization=METHODS[FORMATS[kind]])
    del full
    cases = []
    for rows in ROWS:
        inputs = ragged_prompts(Workload("", rows, STEPS + 1, PROMPT, PROMPT), model.config.vocab_size)
        arguments = {"max_new_tokens": STEPS + 1, "do_sample": False, "eos_token_id": None}
        with Peer(path, rows, torch.get_num_threads()) as peer:
            ways: dict[str, Callable[[], float]] = {
                "llama.cpp": partial(peer.ms_per_step, inputs["input_ids"].numpy()),
                "llmopt": lambda inputs=inputs, arguments=arguments: (
                    generate(  # type: ignore[misc]
                        model, inputs, llmopt=keyword, **arguments
                    ).ms_per_step
                ),
            }
            for name, way in ways.items():
                way()
                on_run(f"{shape}, {kind}, {rows} rows: {name}")
            times = interleave(ways, repeats, lambda name, rows=rows: on_run(f"{shape}, {kind}, {rows} rows: {name}"))  # type: ignore[misc]
        ratio = paired_ratio(times["llama.cpp"], times["llmopt"])
        cases.append(
            {
                "shape": shape,
                "format": kind,
                "method": FORMATS[kind],
                "rows": rows,
                "ms": {name: summary(found) for name, found in times.items()},
                "ratio": {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high},
                "goal": GOALS[rows],
            }
        )
    return cases


# ---------------------------------------------------------------------------------------------------------- its model

KNOWN = ("llama", "qwen2")  # architectures that the file is written for
_BLOCK = 32  # numbers that share a float16 scale, in both formats
_BYTES = {"Q4_0": 18, "Q8_0": 34}  # of a block, the scale first


def write(path: Path, config: Any, kind: str) -> None:
    """Write a GGUF file with random weights.

    Args:
        path: The file.
        config: Of a Llama or Qwen2 model with a tied head.
        kind: `"Q4_0"` or `"Q8_0"`.
    """
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, config.model_type)
    width = config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def product(name: str, outputs: int, inputs: int) -> None:
        blocks = rng.integers(0, 256, (outputs, inputs // _BLOCK, _BYTES[kind]), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.02 / (8 if kind == "Q4_0" else 127)).tobytes(), np.uint8)
        blocks = blocks.reshape(outputs, -1)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * width
    product("token_embd.weight", config.vocab_size, hidden)
    vector("output_norm.weight", hidden, 1.0)
    for number in range(config.num_hidden_layers):
        at = f"blk.{number}"
        vector(f"{at}.attn_norm.weight", hidden, 1.0)
        vector(f"{at}.ffn_norm.weight", hidden, 1.0)
        for name, outputs in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            product(f"{at}.{name}.weight", outputs, hidden)
            if config.model_type == "qwen2":
                vector(f"{at}.{name}.bias", outputs, 0.0)
        product(f"{at}.attn_output.weight", hidden, hidden)
        product(f"{at}.ffn_gate.weight", inner, hidden)
        product(f"{at}.ffn_up.weight", inner, hidden)
        product(f"{at}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """A model in llama.cpp with room for some sequences; a context manager.

    Args:
        path: The GGUF file.
        rows: Sequences.
        threads: For products.
        tokens: Most tokens of a sequence, its prompt included.
    """

    def __init__(self, path: Path, rows: int, threads: int, tokens: int = PROMPT + STEPS) -> None:
        import llama_cpp

        begin()
        self._c = llama_cpp
        self.rows = rows
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * 2 * tokens
        settings.n_batch = settings.n_ubatch = max(64, rows * tokens)
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {rows} sequences")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def ms_per_step(self, ids: np.ndarray[Any, Any]) -> float:
        """Decode greedily behind the prompts `[rows, tokens]`; the mean time of a step, the prompts left out."""
        _, seconds, first = self.generate(ids, STEPS + 1)
        return 1e3 * (seconds - first) / STEPS

    def generate(self, ids: np.ndarray[Any, Any], new_tokens: int) -> tuple[list[list[int]], float, float]:
        """Decode greedily behind prompts of one length.

        Args:
            ids: `[rows, tokens]`.
            new_tokens: For each row.

        Returns:
            The new tokens of each row, the seconds of the call, and those to the first token.
        """
        began = perf_counter()
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        found = [self._decode(ids, 0)]
        first = perf_counter() - began
        for step in range(new_tokens - 1):
            found.append(self._decode(found[-1], ids.shape[1] + step))
        return np.concatenate(found, 1).tolist(), perf_counter() - began, first

    def _decode(self, ids: np.ndarray[Any, Any], start: int) -> np.ndarray[Any, Any]:
        """The tokens `[rows, 1]` that come behind `ids`, `[rows, tokens]`, which begin at position `start`."""
        batch = self._batch
        batch.n_tokens = ids.size
        last = []
        for place, (row, column) in enumerate(np.ndindex(ids.shape)):
            batch.token[place] = int(ids[row, column])
            batch.pos[place] = start + column
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = column == ids.shape[1] - 1
            if batch.logits[place]:
                last.append(place)
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp failed to decode")
        rows = (self._c.llama_get_logits_ith(self._context, place) for place in last)
        best = [int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax()) for row in rows]
        return np.array(best)[:, None]
