"""Prompts that leave the device: host memory, files, and handles."""

import json
import os
import time
from pathlib import Path

import fresh
import pytest
import torch
from architectures import build
from safetensors.torch import save

import hf_llmopt
from hf_llmopt import errors
from hf_llmopt.prompt_cache import tree as tree_module
from hf_llmopt.prompt_cache.store import DiskTier
from hf_llmopt.sealed import read, write

KW = {"pad_token_id": 0, "eos_token_id": None}
PAGE = 4
NAMES = ["llama", "gemma3_text", "llama4_text"]


@pytest.fixture(autouse=True)
def loading_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models compute a page faster than a file is opened; the tests are about what is loaded."""
    monkeypatch.setattr(tree_module, "compute_seconds", lambda model, tokens: 1.0)


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def config(**prompt_cache) -> dict:
    return {"kv_cache": {"page_size": PAGE}, "prompt_cache": prompt_cache}


def run(model, prompt: torch.Tensor, llmopt, new: int = 8) -> int:
    """How many of the prompt's tokens were found; fails if stock generates others."""
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "do_sample": False, **KW}
    ours = model.generate(prompt, **arguments, llmopt=llmopt)
    assert model.llmopt.stats.served_by == "llmopt"
    assert ours.tolist() == model.generate(prompt, **arguments, llmopt=False).tolist()
    return model.llmopt.stats.cached_tokens


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("name", NAMES)
def test_another_engine_finds_what_is_on_disk(name: str, tmp_path: Path) -> None:
    """The same weights in a new model: whole pages come from the folder, and nothing else does."""
    assert run(build(name), text(22), config(path=tmp_path)) == 0
    model = build(name)
    assert run(model, text(22), config(path=tmp_path)) == 20
    assert model.llmopt.prompt_cache.disk_loads >= 5
    assert run(model, torch.cat([text(13), text(9, 1)], dim=1), config(path=tmp_path)) == 13
    for other, differs in (
        (build(name, seed=1), config(path=tmp_path)),
        (build(name, dtype=torch.float64), config(path=tmp_path)),
        (build(name), config(path=tmp_path, salt="tenant")),
        (build(name), {**config(path=tmp_path), "kv_cache": {"page_size": 2}}),
    ):
        assert run(other, text(22), differs) == 0


def test_new_weights_write_under_another_name(tmp_path: Path) -> None:
    model = build("llama")
    run(model, text(22), config(path=tmp_path))
    count = len(files(tmp_path))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.llmopt.weights_changed()
    assert run(model, text(22), config(path=tmp_path)) == 0
    assert len(files(tmp_path)) == 2 * count
    assert run(build("llama"), text(22), config(path=tmp_path)) == 20, "the old ones are still theirs"


def test_hooks_share_no_files(tmp_path: Path) -> None:
    """What a hook does is nothing that a file's name can say."""
    for _ in range(2):
        model = build("llama")
        model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output / 2)
        assert run(model, text(22), config(path=tmp_path)) == 0
        assert run(model, text(22), config(path=tmp_path)) == 21, "its own it finds"
    assert run(build("llama"), text(22), config(path=tmp_path)) == 0


def damage_nothing_left(path: Path) -> None:
    path.write_bytes(b"")


def damage_torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def damage_other_page(path: Path) -> None:
    path.write_bytes(files(path.parent.parent)[0].read_bytes())


@pytest.mark.parametrize(
    "damage", [damage_nothing_left, damage_torn, damage_flipped, damage_foreign, damage_other_page]
)
def test_damaged_files_are_ignored_with_a_warning(damage, tmp_path: Path) -> None:
    run(build("llama"), text(22), config(path=tmp_path))
    model = build("llama")
    run(model, text(3, 7), config(path=tmp_path))
    cache = model.llmopt.engine.prompts
    nodes, _ = cache.path(cache.name(None), text(22)[0].tolist())
    assert len(nodes) == 5
    chosen = next(n for n in nodes[1:4] if cache.trees.disk.path(n.digest) != files(tmp_path)[0])
    before = nodes.index(chosen)
    damage(cache.trees.disk.path(chosen.digest))
    fresh = build("llama")
    with pytest.warns(UserWarning, match="is ignored"):
        assert run(fresh, text(22), config(path=tmp_path)) == PAGE * before
    run(build("llama"), text(22), config(path=tmp_path))  # it was written again: no warning, all is found
    assert run(build("llama"), text(22), config(path=tmp_path)) == 20


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    model, bound = build("llama"), 60_000
    for seed in range(6):
        run(model, text(22, seed), config(path=tmp_path, disk_bytes=bound))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= bound
    fresh = build("llama")
    assert run(fresh, text(22, 5), config(path=tmp_path, disk_bytes=bound)) == 20, "the newest stay"
    assert run(fresh, text(22, 0), config(path=tmp_path, disk_bytes=bound)) == 0


def test_of_a_prompt_its_end_is_removed_first(tmp_path: Path) -> None:
    """A folder for half of a prompt holds its first half, in other processes too; the file system's clock is coarse."""
    run(build("llama"), text(22), config(path=tmp_path))
    page = files(tmp_path)[0].stat().st_size
    for seed in range(1, 4):
        folder = tmp_path / str(seed)
        run(build("llama"), text(82, seed), config(path=folder, disk_bytes=10 * page))
        assert run(build("llama"), text(82, seed), config(path=folder, disk_bytes=10 * page)) >= 8 * PAGE


def test_a_beginning_that_others_use_is_removed_last(tmp_path: Path) -> None:
    """It was written long before what continues it, and found in memory ever since."""
    shared, model = text(20), build("llama")
    run(model, shared, config(path=tmp_path))
    page = files(tmp_path)[0].stat().st_size
    for path in files(tmp_path):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    chat = torch.cat([shared, text(22, 1)], dim=1)
    run(model, chat, config(path=tmp_path))
    DiskTier(tmp_path, 8 * page, None)
    assert len(files(tmp_path)) == 7, "the bound and a tenth of air"
    assert run(build("llama"), chat, config(path=tmp_path)) == 7 * PAGE


def test_ttl_on_disk(tmp_path: Path) -> None:
    run(build("llama"), text(22), config(path=tmp_path, ttl=60.0))
    assert run(build("llama"), text(22), config(path=tmp_path, ttl=60.0)) == 20
    for path in files(tmp_path):
        os.utime(path, (time.time() - 61, time.time() - 61))
    assert run(build("llama"), text(3, 7), config(path=tmp_path, ttl=60.0)) == 0
    assert files(tmp_path)[2:] == [], "a start removes what is too old"


def test_unfinished_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / "old.tmp", tmp_path / "ab" / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    DiskTier(tmp_path, 10**9, None)
    assert files(tmp_path) == [new]


def test_a_full_disk_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    model = build("llama")
    run(model, text(3, 7), config(path=tmp_path))
    monkeypatch.setattr("hf_llmopt.prompt_cache.store.os.replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert run(model, text(22), config(path=tmp_path)) == 0
    assert not [path for path in files(tmp_path) if path.suffix == ".tmp"]
    with pytest.warns(UserWarning, match="No space left"):
        assert run(model, text(22), config(path=tmp_path)) == 21, "in memory it is found all the same"


def test_a_tier_that_loses_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "compute_seconds", lambda model, tokens: 0.0)
    model = build("llama")
    for found in (0, 21):
        assert run(model, text(22), config(path=tmp_path, host_bytes=10**6)) == found
    assert model.llmopt.engine.prompts.trees.host is None
    assert files(tmp_path) == []


WRITER = """
import torch
from architectures import build
import hf_llmopt
from hf_llmopt.prompt_cache import tree

tree.compute_seconds = lambda model, tokens: 1.0
model = build("llama")
for seed in range(10**6):
    prompt = torch.randint(3, 90, (1, 62), generator=torch.Generator().manual_seed(seed))
    model.generate(prompt, max_new_tokens=2, pad_token_id=0, eos_token_id=None, llmopt={llmopt!r})
    print(seed, flush=True)
"""


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """Two processes write into one folder and are killed at random moments: what is there is whole, and right."""
    llmopt = config(path=str(tmp_path / "cache"), disk_bytes=2_000_000)
    script = tmp_path / "writer.py"
    script.write_text(WRITER.format(llmopt=llmopt))
    for delay in (0.05, 0.13):
        said = [tmp_path / f"{delay}-{number}" for number in range(2)]
        for folder in said:
            folder.mkdir()
        writers = [fresh.start(str(script), into=folder) for folder in said]
        while not all((folder / "out").read_text() for folder in said):
            assert all(writer.is_alive() for writer in writers)
            time.sleep(0.001)
        time.sleep(delay)
        for writer in writers:
            writer.kill()
            writer.join()
    whole = [path for path in files(tmp_path) if path.suffix == ".safetensors"]
    assert len(whole) > 4
    for path in whole:
        tensors, metadata = read(path)
        assert tensors["0"].dtype == torch.uint8
        assert len(json.loads(metadata["tokens"])) == PAGE
    prompt = torch.randint(3, 90, (1, 62), generator=torch.Generator().manual_seed(0))
    assert run(build("llama"), prompt, llmopt) == 60


# --------------------------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize("name", NAMES)
def test_evicted_pages_come_back_from_host_memory(name: str) -> None:
    llmopt = {
        "kv_cache": {"page_size": PAGE, "max_tokens": 44},
        "prompt_cache": {"host_bytes": 10**7},
    }
    model = build(name)
    assert run(model, text(22), llmopt) == 0
    for seed in range(1, 4):
        run(model, text(22, seed), llmopt)
    figures = model.llmopt.prompt_cache
    assert figures.evictions > 0 < figures.host_bytes
    assert run(model, text(22), llmopt) >= 20
    assert model.llmopt.prompt_cache.host_loads > 0


def test_host_memory_is_bounded() -> None:
    page_bytes = PAGE * 3 * 2 * 2 * 16 * 4
    llmopt = {
        "kv_cache": {"page_size": PAGE, "max_tokens": 44},
        "prompt_cache": {"host_bytes": 6 * page_bytes},
    }
    model = build("llama")
    for seed in range(5):
        run(model, text(22, seed), llmopt)
        assert model.llmopt.prompt_cache.host_bytes <= 6 * page_bytes
    assert model.llmopt.prompt_cache.host_bytes > 0


# ------------------------------------------------------------------------------------------------------------- handles


@pytest.fixture
def model():
    return hf_llmopt.optimize(
        build("gemma3_text"), {"kv_cache": {"page_size": PAGE, "max_tokens": 64}, "prompt_cache": True}
    )


def test_a_pinned_prompt_survives_every_squeeze(model) -> None:
    prompt = model.llmopt.cache_prompt(text(18))
    assert (prompt.pinned, prompt.cached_tokens) == (True, 18)
    for seed in range(1, 6):
        run(model, text(20, seed), None)
    assert run(model, torch.cat([text(18), text(6, 9)], dim=1), None) >= 16
    assert model.llmopt.engine.store.pages_used > 0
    prompt.unpin()
    assert model.llmopt.engine.store.pages_used == 0
    for seed in range(1, 6):
        run(model, text(30, seed), None)
    assert prompt.cached_tokens < 18
    prompt.pin()
    assert prompt.cached_tokens == 18


def test_delete_forgets_the_prompt_and_what_continues_it(model) -> None:
    shared = model.llmopt.cache_prompt(text(8)[0].tolist())
    prompt = model.llmopt.cache_prompt(text(18))
    run(model, torch.cat([text(18), text(6, 9)], dim=1), None)
    prompt.delete()
    assert (prompt.pinned, prompt.cached_tokens) == (False, 8), "what another prompt holds stays"
    assert shared.cached_tokens == 8
    shared.delete()
    assert model.llmopt.prompt_cache.device_bytes == 0
    shared.delete()
    assert model.llmopt.engine.store.pages_used == 0


def test_ttl_ends_a_pin(model, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tree_module, "monotonic", lambda: now[0])
    prompt = model.llmopt.cache_prompt(text(18), ttl=300)
    now[0] += 299
    assert run(model, torch.cat([text(18), text(3, 9)], dim=1), None) == 18
    now[0] += 299
    assert prompt.pinned
    assert prompt.cached_tokens == 18
    now[0] += 301
    run(model, text(5, 3), None)
    assert not prompt.pinned
    assert model.llmopt.engine.store.pages_used == 0
    with pytest.raises(errors.InvalidOption, match="positive number"):
        prompt.ttl = 0


def test_new_weights_unpin(model) -> None:
    prompt = model.llmopt.cache_prompt(text(18))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.9)
    assert not prompt.pinned
    assert prompt.cached_tokens == 0
    prompt.pin()
    assert run(model, torch.cat([text(18), text(3, 9)], dim=1), None) == 18


@pytest.mark.parametrize("how", ["release", "moved"])
def test_a_handle_follows_the_model(model, how: str) -> None:
    """Engines are given up and exchanged; a handle acts on the cache that calls use."""
    prompt = model.llmopt.cache_prompt(text(18), ttl=300)
    old = model.llmopt.engine
    if how == "release":
        model.llmopt.release()
    else:
        model.to(torch.float64)
    assert not prompt.pinned
    assert old.store.pages_used == 0
    assert run(model, torch.cat([text(18), text(3, 9)], dim=1), None) == 0
    assert prompt.cached_tokens == 18
    prompt.pin()
    assert prompt.pinned
    assert model.llmopt.engine is not old
    assert model.llmopt.engine.store.pages_used > 0
    assert run(model, torch.cat([text(18), text(3, 8)], dim=1), None) == 18
    prompt.delete()
    assert prompt.cached_tokens == 0
    prompt.pin()
    held = model.llmopt.engine.store
    del prompt
    assert held.pages_used == 0


def test_a_handle_that_is_dropped_holds_nothing(model) -> None:
    prompt = model.llmopt.cache_prompt(text(18))
    assert model.llmopt.engine.store.pages_used > 0
    del prompt
    assert model.llmopt.engine.store.pages_used == 0


@pytest.mark.parametrize("length", [3, 16, 18])
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name: str, length: int, tmp_path: Path) -> None:
    first = hf_llmopt.optimize(build(name), config())
    first.llmopt.cache_prompt(text(length)).save(tmp_path / "prompt.safetensors")
    second = hf_llmopt.optimize(build(name), config())
    prompt = second.llmopt.load_prompt(tmp_path / "prompt.safetensors")
    assert (prompt.tokens, prompt.pinned, prompt.cached_tokens) == (text(length)[0].tolist(), True, length)
    assert run(second, torch.cat([text(length), text(6, 9)], dim=1), None) == length
    again = second.llmopt.load_prompt(tmp_path / "prompt.safetensors")
    assert again.cached_tokens == length
    assert files(tmp_path) == [tmp_path / "prompt.safetensors"]


def test_what_is_loaded_must_be_the_models_own(model, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    model.llmopt.cache_prompt(text(18)).save(path)
    other = hf_llmopt.optimize(build("gemma3_text", seed=1), model.llmopt.config)
    with pytest.raises(errors.InvalidPromptCache, match="saved with another model or other weights"):
        other.llmopt.load_prompt(path)
    with pytest.raises(errors.InvalidPromptCache, match="with another salt"):
        model.llmopt.load_prompt(path, llmopt={"prompt_cache": {"salt": "x"}, "kv_cache": model.llmopt.config.kv_cache})
    for section, says in ({"dtype": "int8", "page_size": 4}, "format of pages"), ({"page_size": 8}, "page size"):
        with pytest.raises(errors.InvalidPromptCache, match=rf"saved with another {says} \("):
            model.llmopt.load_prompt(path, llmopt={"prompt_cache": True, "kv_cache": section})
    coarse = hf_llmopt.optimize(build("gemma3_text").bfloat16(), model.llmopt.config)
    with pytest.raises(errors.InvalidPromptCache, match=r"another dtype \(float32, here bfloat16\)\."):
        coarse.llmopt.load_prompt(path)
    with pytest.raises(FileNotFoundError, match=r"no such folder.*missing'$"):
        model.llmopt.cache_prompt(text(18)).save(tmp_path / "missing" / "prompt.safetensors")
    for foreign in (save({"x": torch.zeros(3)}), save({"x": torch.zeros(3)}, {"format": "pt"}), b"hello"):
        (tmp_path / "foreign").write_bytes(foreign)
        with pytest.raises(errors.InvalidPromptCache, match="no saved prompt"):
            model.llmopt.load_prompt(tmp_path / "foreign")
    damage_flipped(path)
    with pytest.raises(errors.InvalidPromptCache, match="checksum"):
        model.llmopt.load_prompt(path)
    write(path, {"x": torch.zeros(3)}, {})
    with pytest.raises(errors.InvalidPromptCache, match="no saved prompt"):
        model.llmopt.load_prompt(path)
    with pytest.raises(FileNotFoundError):
        model.llmopt.load_prompt(tmp_path / "nothing")


def test_handles_say_what_is_wrong(model) -> None:
    with pytest.raises(errors.InvalidOption, match="has no prompt cache"):
        model.llmopt.cache_prompt([5, 6], llmopt="kv_cache")
    with pytest.raises(errors.EmptyPrompt):
        model.llmopt.cache_prompt([])
    with pytest.raises(errors.InvalidRequest, match=r"shape \[2, 2\]"):
        model.llmopt.cache_prompt([[5, 6], [7, 8]])
    with pytest.raises(errors.InvalidRequest, match="got a object"):
        model.llmopt.cache_prompt(object())
    with pytest.raises(errors.OutOfPages):
        model.llmopt.cache_prompt(text(80))
    with pytest.raises(errors.InvalidOption, match="optimize"):
        hf_llmopt.ModelHandle().cache_prompt([5])
