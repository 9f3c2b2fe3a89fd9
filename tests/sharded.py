"""Two processes that hold a model together: what `test_tensor_parallel.py` runs in each of them."""

import os
from collections.abc import Callable
from pathlib import Path

import fresh
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

RANKS = 2
PROMPTS = torch.tensor([[0, 0, 0, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28]])  # the first is padded
MASK = (PROMPTS != 0).long()
NEW = 12
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 50}


def run(job: Callable[..., object], folder: Path, *args: object) -> list:
    """What `job(rank, *args)` returns on each rank; `None` for one that does not."""
    folder.mkdir()
    fresh.context()
    torch.multiprocessing.start_processes(_rank, (job, str(folder), *args), RANKS, start_method="forkserver")
    paths = [folder / f"{rank}.pt" for rank in range(RANKS)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _rank(rank: int, job: Callable[..., object], folder: str, *args: object) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = job(rank, *args)
    torch.save(found, Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def load(folder: str, **kwargs: object) -> PreTrainedModel:
    """The part of a saved model that belongs to this rank."""
    config = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **kwargs)


def generate(model: PreTrainedModel, rows: slice = slice(None), seed: int = 7, **kwargs: object) -> torch.Tensor:
    """Tokens of some of the prompts."""
    torch.manual_seed(seed)
    kwargs = {"do_sample": False, "max_new_tokens": NEW, **kwargs}
    return model.generate(PROMPTS[rows], attention_mask=MASK[rows], eos_token_id=None, **kwargs)
