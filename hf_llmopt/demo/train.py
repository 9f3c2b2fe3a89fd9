"""Trains the embedded pair from the standard library of a Python: `python -m hf_llmopt.demo.train --minutes 120`.

One byte-level BPE tokenizer, one Llama-architecture target, and a draft model about ten times smaller that is distilled
from it. The folder it writes has the layout of the package data, with a log and the measured quality beside the models.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ..bench import quality
from ..bench.sample import Sample
from . import corpus
from .tokens import CONTEXT, pack, train_tokenizer, windows

_SHAPES: dict[str, dict[str, Any]] = {
    "target": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "draft": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
    },
}

# The loss of windows [batch, CONTEXT + 1], and what becomes of a record of the training log.
Loss = Callable[[torch.Tensor], torch.Tensor]
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        learning_rate: The peak; reached after a short warm-up, then lowered along a cosine to nearly zero.
        weight_decay: For the matrices. A corpus this small is read many times over: decay and dropout answer for that.
        dropout: On what attention and feed-forward add to the residual stream.
        share: Its part of the whole budget, in time or in steps.
    """

    learning_rate: float
    weight_decay: float
    dropout: float
    share: float

    def rate(self, progress: float) -> float:
        """The learning rate after a part of the training."""
        return self.learning_rate * min(1.0, (progress + 1e-3) / 0.02) * (0.505 + 0.495 * math.cos(math.pi * progress))


RECIPES = {
    "target": Recipe(learning_rate=3e-3, weight_decay=0.4, dropout=0.1, share=0.72),
    "draft": Recipe(learning_rate=4e-3, weight_decay=0.1, dropout=0.0, share=0.28),
}


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many seconds or so many steps, whichever is given."""

    seconds: float = math.inf
    steps: float = math.inf

    def __mul__(self, share: float) -> Budget:
        return Budget(self.seconds * share, self.steps * share)

    def progress(self, seconds: float, steps: int) -> float:
        """The part that is used up, at most 1."""
        return min(1.0, max(seconds / self.seconds, steps / self.steps))


def build(name: str, tokenizer: Any, dropout: float = 0.0) -> LlamaForCausalLM:
    """Builds the untrained target or draft model; dropout exists in training only and leaves no trace in its files."""
    config = LlamaConfig(
        **_SHAPES[name],
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,  # near 1 / sqrt(width); the usual 0.02 suits wider models and starts slowly here
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if dropout:
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.register_forward_hook(lambda module, _, output: F.dropout(output, dropout, module.training))
    return model


def language_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next token over windows `[batch, CONTEXT + 1]`."""
    return F.cross_entropy(_logits(model, batch), batch[:, 1:].flatten())


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Divergence from the target's distribution (Hinton et al. 2015, arXiv 1503.02531) and a little cross entropy."""
    with torch.no_grad():
        teacher = _logits(target, batch).log_softmax(-1)
    student = _logits(draft, batch).log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return 0.9 * divergence + 0.1 * F.nll_loss(student, batch[:, 1:].flatten())


def _logits(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Predicts `batch[:, 1:]`: float32 logits `[batch * CONTEXT, vocabulary]`."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits: torch.Tensor = model(input_ids=batch[:, :-1], use_cache=False).logits
    return logits.float().flatten(0, 1)


def fit(
    model: LlamaForCausalLM,
    loss: Loss,
    batches: Iterator[torch.Tensor],
    validation: torch.Tensor,
    recipe: Recipe,
    budget: Budget,
    log: Log,
) -> None:
    """Trains a model in place and leaves in it the weights that did best on the validation windows.

    Args:
        model: The model, on its device.
        loss: The loss of a batch of windows under the model.
        batches: Windows on the model's device.
        validation: Windows `[n, CONTEXT + 1]` that are not trained on.
        recipe: How to train.
        budget: When to stop.
        log: Receives some forty records.
    """
    compiled: Loss = torch.compile(loss) if model.device.type == "cuda" else loss
    optimizers = _optimizers(model, recipe)
    compiled(next(batches)).backward()  # compiles, which takes no part of the budget
    model.zero_grad()
    best, best_weights = math.inf, model.state_dict()
    start, step, progress, reported, value = time.monotonic(), 0, 0.0, 0.0, torch.tensor(0.0)
    while progress < 1:
        batch = next(batches)
        value = compiled(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = recipe.rate(progress)
            optimizer.step()
        model.zero_grad()
        step += 1
        if step % 10 == 0:
            value.item()  # waits for the device: the clock that ends the training must not run ahead of it
        progress = budget.progress(time.monotonic() - start, step)
        if progress >= min(reported, 1.0):
            reported += 0.025
            score = _validate(model, loss, validation)
            if score < best:
                best, best_weights = score, {name: weight.clone() for name, weight in model.state_dict().items()}
            elapsed = time.monotonic() - start
            log({
                "step": step,
                "loss": round(value.item(), 4),
                "validation": round(score, 4),
                "learning_rate": round(recipe.rate(progress), 6),
                "tokens_per_second": round(step * batch.shape[0] * CONTEXT / elapsed),
                "elapsed": round(elapsed, 1),
            })  # fmt: skip
    model.load_state_dict(best_weights)
    model.eval()


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (as in arXiv 2502.16982), AdamW for embeddings and norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def _validate(model: LlamaForCausalLM, loss: Loss, validation: torch.Tensor) -> float:
    model.eval()
    score = sum(loss(rows).item() * len(rows) for rows in validation.split(16)) / len(validation)
    model.train()
    return score


def train(
    out: Path,
    budget: Budget,
    device: str = "cpu",
    batch_size: int = 8,
    source: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains tokenizer, target and draft, measures them and writes everything into a folder.

    Args:
        out: The folder; it is made if missing, files of an earlier run are replaced.
        budget: For both models together.
        device: Where to train.
        batch_size: Windows of 1,024 tokens in a step.
        source: A folder with a standard library; by default the one of the running Python.
        seed: Of weights, order and dropout.

    Returns:
        The content of `training.json`.
    """
    set_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").unlink(missing_ok=True)
    texts = {split: [document.text for document in corpus.documents(split, source)] for split in corpus.SPLITS}
    tokenizer = train_tokenizer(texts["train"])
    tokens = pack(tokenizer, texts["train"]).to(device)
    validation = pack(tokenizer, texts["validation"]).to(device).unfold(0, CONTEXT + 1, CONTEXT)
    trained: dict[str, LlamaForCausalLM] = {}
    for name, recipe in RECIPES.items():
        with torch.device(device):
            model = build(name, tokenizer, recipe.dropout)
        loss = partial(distillation_loss, model, trained["target"]) if trained else partial(language_loss, model)
        batches = windows(tokens, batch_size, torch.Generator().manual_seed(seed))
        fit(model, loss, batches, validation, recipe, budget * recipe.share, partial(_log, out / "log.jsonl", name))
        trained[name] = _save(model, tokenizer, out / name)
    sample = Sample.cut(trained["target"], tokenizer, texts["held_out"], context=CONTEXT, stride=CONTEXT)
    agreement = quality.compare(trained["draft"], trained["target"], sample)
    report = {
        "torch": torch.__version__,
        "seed": seed,
        "batch_size": batch_size,
        "texts": {split: len(part) for split, part in texts.items()},
        "corpus": corpus.fingerprint(source),
        "training_tokens": len(tokens),
        "recipes": {name: asdict(recipe) for name, recipe in RECIPES.items()},
        "held_out": {name: quality.perplexity(model, sample).to_dict() for name, model in trained.items()},
        "agreement": {"top1": agreement.top1.value, "overlap": agreement.overlap},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _log(path: Path, name: str, record: dict[str, Any]) -> None:
    line = json.dumps({"model": name, **record})
    with path.open("a", encoding="utf-8") as file:
        print(line, file=file)
    print(line, flush=True)


def _save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> LlamaForCausalLM:
    """Writes bfloat16 weights and returns the model as a user will load it: the rounded weights in float32."""
    device = model.device
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device)
    return saved


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m hf_llmopt.demo.train", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=Path("demo-pair"), help="folder to write (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=120.0, help="time for both models (default: %(default)s)")
    budget.add_argument("--steps", type=int, help="steps for both models instead, which makes a run repeatable")
    parser.add_argument("--device", default=device, help="where to train (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64 if device == "cuda" else 8, help="(default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of a standard library (default: this Python's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = Budget(steps=options.steps) if options.steps else Budget(seconds=options.minutes * 60)
    report = train(options.out, chosen, options.device, options.batch_size, options.source, options.seed)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
