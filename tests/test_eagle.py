"""EAGLE drafters: files of every layout, hidden states of every pass, and the tokens of plain decoding all the same."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from architectures import build
from safetensors.torch import save_file
from test_speculative import GREEDY, SAMPLED, drafted, generate, prompts
from torch.nn import functional

from hf_llmopt import Engine, KVCacheConfig, LLMOptConfig, SpeculativeConfig
from hf_llmopt.errors import InvalidCheckpoint, InvalidOption
from hf_llmopt.speculative import DraftModelDrafter
from hf_llmopt.speculative.eagle import Follower, load_eagle
from hf_llmopt.speculative.eagle.follower import Seen

HIDDEN, VOCABULARY, LAYERS, FEED = 64, 112, 6, 48
HEADS, KEY_HEADS, WIDTH = 4, 2, 16
LAYER_CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": WIDTH,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.usefixtures("cheap_guesses")


class Files(NamedTuple):
    """A drafter's files, and what the reference needs to know of them."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    needs: tuple[int, ...]
    flags: frozenset[str] = frozenset()
    binary: bool = False

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.binary:
            torch.save(self.tensors, folder / "pytorch_model.bin")
        else:
            save_file(self.tensors, folder / "model.safetensors")
        return str(folder)


def tensors_of(first: str, count: int, draft_vocabulary: int, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Random tensors of a drafter whose first layer's names begin with `first`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}

    def put(name: str, *shape: int) -> None:
        drawn = torch.randn(shape, generator=generator)
        found[name] = drawn * 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * drawn

    put("fc.weight", HIDDEN, count * HIDDEN)
    put("norm.weight", HIDDEN)
    put("lm_head.weight", draft_vocabulary, HIDDEN)
    for prefix in [first, *(f"layers.{index}." for index in range(1, options.get("layers", 1)))]:
        inputs = 2 * HIDDEN if prefix == first else HIDDEN
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            put(f"{prefix}self_attn.{name}_proj.weight", heads * WIDTH, inputs)
            if options.get("bias"):
                put(f"{prefix}self_attn.{name}_proj.bias", heads * WIDTH)
        put(f"{prefix}self_attn.o_proj.weight", HIDDEN, HEADS * WIDTH)
        for name in ("gate", "up"):
            put(f"{prefix}mlp.{name}_proj.weight", FEED, HIDDEN)
        put(f"{prefix}mlp.down_proj.weight", HIDDEN, FEED)
        put(f"{prefix}input_layernorm.weight", HIDDEN)
        put(f"{prefix}post_attention_layernorm.weight", HIDDEN)
    put(f"{first}hidden_norm.weight", HIDDEN)
    if draft_vocabulary < VOCABULARY:
        targets = torch.randperm(VOCABULARY, generator=generator)[:draft_vocabulary].sort().values
        found["d2t"] = targets - torch.arange(draft_vocabulary)
        found["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, targets, True)
    for name, shape in options.get("more", {}).items():
        put(name, *shape)
    return found


def files_of(layout: str) -> Files:
    """A drafter in one of the layouts that are about."""
    if layout == "SafeAI":
        config = {**LAYER_CONFIG, "architectures": ["LlamaForCausalLM"], "draft_vocab_size": 80}
        return Files(config, tensors_of("midlayer.", 3, 80), (2, 3, 3), binary=True)
    if layout == "speculators":
        flags = ("norm_before_residual", "norm_before_fc", "norm_output")
        config = {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3"},
            "transformer_layer_config": {**LAYER_CONFIG, "num_hidden_layers": 2},
            "draft_vocab_size": 90,
            "eagle_aux_hidden_state_layer_ids": None,
            **dict.fromkeys(flags, True),
        }
        more = {"input_norm.weight": (3 * HIDDEN,), "embed_tokens.weight": (VOCABULARY, HIDDEN)}
        return Files(config, tensors_of("layers.0.", 3, 90, layers=2, more=more), (2, 3, 3), frozenset(flags))
    if layout == "DeepSpec":
        config = {**LAYER_CONFIG, "model_type": "qwen3", "target_layer_ids": [0, 1, 2, 4, 5]}
        more = {f"layers.0.self_attn.{name}_norm.weight": (WIDTH,) for name in "qk"}
        return Files(config, tensors_of("layers.0.", 5, VOCABULARY, more=more), (1, 2, 3, 5, 6))
    if layout == "SpecForge":
        config = {**LAYER_CONFIG, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 5]}, "fc_norm": True}
        more = {f"fc_norm.{index}.weight": (HIDDEN,) for index in range(2)}
        return Files(config, tensors_of("midlayer.", 2, 100, bias=True, more=more), (0, 5), frozenset({"fc_norm"}))
    assert layout == "EAGLE-1"
    tensors = tensors_of("layers.0.", 2, VOCABULARY, more={"fc.bias": (HIDDEN,)})
    for name in ("norm", "lm_head", "layers.0.hidden_norm", "layers.0.input_layernorm"):
        del tensors[f"{name}.weight"]
    for name in "qkv":
        tensors[f"layers.0.self_attn.{name}_proj.weight"] = tensors[f"layers.0.self_attn.{name}_proj.weight"][
            :, :HIDDEN
        ]
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return Files({**LAYER_CONFIG, "bias": True}, tensors, (LAYERS,), frozenset({"first"}))


LAYOUTS = ("SafeAI", "speculators", "DeepSpec", "SpecForge", "EAGLE-1")


class Reference:
    """A drafter as the papers describe it: all of a text at once, with a mask, and nothing kept."""

    def __init__(self, files: Files, target: torch.nn.Module) -> None:
        self.flags, self.needs, self.target = files.flags, files.needs, target
        self.t = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in files.tensors.items()}
        self.t.setdefault("embed_tokens.weight", target.get_input_embeddings().weight)

    def norm(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.t[f"{name}.weight"]

    def linear(self, x, name):
        return functional.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def attend(self, x, name):
        def heads(which, count):
            y = self.linear(x, f"{name}.{which}_proj").view(len(x), count, WIDTH)
            return self.norm(y, f"{name}.{which}_norm") if f"{name}.{which}_norm.weight" in self.t else y

        def turn(y):
            angles = self.positions[:, None] * 500.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
            cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
            first, second = y.chunk(2, dim=-1)
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

        query, key, value = turn(heads("q", HEADS)), turn(heads("k", KEY_HEADS)), heads("v", KEY_HEADS)
        key, value = (y.repeat_interleave(HEADS // KEY_HEADS, dim=1) for y in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return self.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1), f"{name}.o_proj")

    def layer(self, index, x, residual):
        name = f"layers.{index}"
        x = residual + self.attend(x, f"{name}.self_attn")
        y = self.norm(x, f"{name}.post_attention_layernorm")
        gated = functional.silu(self.linear(y, f"{name}.mlp.gate_proj")) * self.linear(y, f"{name}.mlp.up_proj")
        return x + self.linear(gated, f"{name}.mlp.down_proj")

    def layers(self, ids, g):
        embedded = self.t["embed_tokens.weight"][ids]
        if "first" in self.flags:
            x = self.linear(torch.cat([embedded, g], -1), "fc")
            return self.layer(0, x, x)
        normed = self.norm(g, "layers.0.hidden_norm")
        x = torch.cat([self.norm(embedded, "layers.0.input_layernorm"), normed], -1)
        x = self.layer(0, x, normed if "norm_before_residual" in self.flags else g)
        if "layers.1.input_layernorm.weight" in self.t:
            x = self.layer(1, self.norm(x, "layers.1.input_layernorm"), x)
        return x

    def fuse(self, features):
        if "first" in self.flags:
            return features[0]
        if "fc_norm" in self.flags:
            features = [self.norm(feature, f"fc_norm.{index}") for index, feature in enumerate(features)]
        joined = torch.cat(features, -1)
        return self.linear(self.norm(joined, "input_norm") if "norm_before_fc" in self.flags else joined, "fc")

    @torch.no_grad()
    def guesses(self, tokens, count, start=0, positions=None) -> tuple[list[int], torch.Tensor]:
        """What follows the tokens, if features are known from `start` on, and the logits of each."""
        places = list(range(len(tokens))) if positions is None else list(positions)
        asked = {}
        if places != list(range(len(tokens))):  # transformers takes positions that go back for another text
            mask = torch.ones(1, 1, len(tokens), len(tokens)).tril() > 0
            asked = {"position_ids": torch.tensor([places]), "attention_mask": mask}
        states = self.target(torch.tensor([tokens]), output_hidden_states=True, **asked).hidden_states
        g = self.fuse([states[index][0, start:-1] for index in self.needs])
        tokens, rows = list(tokens), []
        for _ in range(count):
            self.positions = torch.tensor(places[start:-1])
            x = self.layers(torch.tensor(tokens[start + 1 :]), g)[-1:]
            if "first" in self.flags:
                logits = self.target.get_output_embeddings()(x)[0]
            else:
                normed = self.norm(x, "norm")
                x = normed if "norm_output" in self.flags else x
                logits = self.linear(normed, "lm_head")[0]
            if "d2t" in self.t:
                own = torch.full((VOCABULARY,), -torch.inf)
                own[torch.arange(len(logits)) + self.t["d2t"]] = logits
                logits = own
            rows.append(logits)
            tokens.append(int(logits.argmax()))
            g = torch.cat([g, x])
            places.append(places[-1] + 1)
        return tokens[-count:], torch.stack(rows)


@pytest.fixture(scope="module")
def target():
    return build("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def watched():
    """The same model; `output_hidden_states` leaves hooks behind, with which layers are not joined."""
    return build("llama", num_hidden_layers=LAYERS)


@pytest.fixture
def seen(monkeypatch):
    """Texts that somebody guessed for, their positions, the guesses, and the first token whose features were known."""
    found: list[tuple[list[int], list[int], list[int], int]] = []
    propose = DraftModelDrafter.propose

    def recorded(self, texts, limits, odds):
        known = self._second._texts
        starts = [known[text].start if text in known else -1 for text in texts]
        before = [(list(text.tokens), list(text.positions)) for text in texts]
        drafts = propose(self, texts, limits, odds)
        for (tokens, positions), draft, start in zip(before, drafts, starts, strict=True):
            if draft.tokens:
                found.append((tokens, positions, draft.tokens, start))
        return drafts

    monkeypatch.setattr(DraftModelDrafter, "propose", recorded)
    return found


def check(seen, files: Files, watched, every: int = 1) -> None:
    """Guesses are those of the reference."""
    reference = Reference(files, watched)
    for tokens, positions, guesses, start in seen[::every]:
        assert guesses == reference.guesses(tokens, len(guesses), start, positions)[0]


def eagle(folder, num_tokens: int | None = 3, **options: Any) -> dict[str, Any]:
    return {"speculative": {"method": "eagle", "draft_model": folder, "num_tokens": num_tokens}, **options}


@pytest.mark.parametrize(("layout", "rows"), [("SafeAI", 1), *((layout, 3) for layout in LAYOUTS)])
def test_guesses_are_those_of_the_drafter_read_in_one_go(target, watched, tmp_path, seen, layout, rows):
    files, inputs = files_of(layout), prompts(rows)
    expected = generate(target, inputs, None, **GREEDY)
    assert generate(target, inputs, eagle(files.save(tmp_path)), **GREEDY) == expected
    assert drafted(target).drafted_tokens > 0
    assert len(seen) > 5 * rows
    check(seen, files, watched)
    assert {start for *_, start in seen} == {0}


def right_drafter(first: int, named: str, ids: list[int]) -> tuple[torch.nn.Module, Files]:
    """A model whose next token follows from the last, and a drafter that knows how, if it reads the right layers.

    A token's hidden state is a single number at place z, which every layer moves to place `turn[z]`. The drafter finds
    the token in what layer `first` reads, and its own layer moves it to the token that comes next.
    """
    size, places = HIDDEN, 40
    generator = torch.Generator().manual_seed(1)
    cycle = torch.randperm(places, generator=generator)
    turn = torch.empty(places, dtype=torch.long)
    turn[cycle] = cycle.roll(1)  # one cycle: no place stays, however often it turns
    powers = [torch.arange(places)]
    for _ in range(LAYERS):
        powers.append(turn[powers[-1]])
    follows = turn[powers[LAYERS]]  # the next token
    model = build(
        "llama", num_hidden_layers=LAYERS, vocab_size=places, intermediate_size=places, tie_word_embeddings=False
    )
    root, eye = size**0.5, torch.eye(places, size)

    def mover(to: torch.Tensor) -> torch.Tensor:
        """`down_proj` that moves a one at z to `to[z]`, behind a gate and an up of size `root` there."""
        gave = functional.silu(torch.tensor(root)) * root
        return (torch.eye(size)[:, to] - torch.eye(size)[:, torch.arange(places)]) / gave

    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(eye)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate_proj.weight.copy_(eye)
            layer.mlp.up_proj.weight.copy_(eye)
            layer.mlp.down_proj.weight.copy_(mover(turn))
            layer.post_attention_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[follows, powers[LAYERS]] = 1.0
    tensors = tensors_of("midlayer.", 3, places)
    fc = torch.zeros(size, 3 * size)
    fc[torch.arange(places), powers[first]] = 1.0  # back to the token's own place
    head = torch.zeros(places, size)
    head[follows, torch.arange(places)] = 1.0
    tensors |= {
        "fc.weight": fc,
        "lm_head.weight": head,
        "norm.weight": torch.ones(size),
        "midlayer.post_attention_layernorm.weight": torch.ones(size),
        "midlayer.self_attn.o_proj.weight": torch.zeros(size, HEADS * WIDTH),
        "midlayer.mlp.gate_proj.weight": eye.clone(),
        "midlayer.mlp.up_proj.weight": eye.clone(),
        "midlayer.mlp.down_proj.weight": mover(follows),
    }
    config = {**LAYER_CONFIG, "vocab_size": places, "intermediate_size": places, named: ids}
    del tensors["d2t"], tensors["t2d"]
    return model, Files(config, tensors, ())


@pytest.mark.parametrize(
    ("named", "ids", "right"),
    [
        ("eagle_aux_hidden_state_layer_ids", None, True),
        ("eagle_aux_hidden_state_layer_ids", [2, 4, 5], True),
        ("eagle_aux_hidden_state_layer_ids", [1, 4, 5], False),
        ("eagle_aux_hidden_state_layer_ids", [3, 4, 5], False),
        ("target_layer_ids", [1, 3, 4], True),
        ("target_layer_ids", [2, 3, 4], False),
    ],
)
def test_a_drafter_that_knows_what_follows_is_right_if_it_reads_the_right_layers(tmp_path, named, ids, right):
    model, files = right_drafter(2, named, ids)
    inputs, arguments = prompts(3), {**GREEDY, "eos_token_id": None}
    expected = generate(model, inputs, None, **arguments)
    assert generate(model, inputs, eagle(files.save(tmp_path)), **arguments) == expected
    stats = drafted(model)
    assert any("x decoder layer" in line and "eager" not in line for line in model.llmopt.engine.runner.fused)
    assert stats.accepted_tokens == (stats.drafted_tokens if right else 0)
    assert generate(model, inputs, eagle(files.save(tmp_path), None), **arguments) == expected
    record = model.llmopt.engine.speculator._record.items()
    likeliest = [found for grounds, found in record if grounds[0] == 0]
    assert all(count == (tried if right else 0) for count, tried in likeliest), "beside others, as branches of a tree"
    assert not right or any(grounds[0] == 1 for grounds, _ in record)
    assert stats.drafted_tokens > 10
    if right:
        assert stats.steps <= 1 + -(-24 // 4) + 1


@pytest.mark.parametrize("num_tokens", [2, None])
@pytest.mark.parametrize("rows", [1, 3])
def test_sampled_tokens_are_those_of_stock(tmp_path, rows, num_tokens):
    model, files = right_drafter(2, "target_layer_ids", [1, 3, 4])
    expected = generate(model, prompts(rows), None, **SAMPLED)
    assert generate(model, prompts(rows), eagle(files.save(tmp_path), num_tokens), **SAMPLED) == expected
    stats = drafted(model)
    assert stats.accepted_tokens > 0 or num_tokens is None


def rows_of(rows: int, seed: int = 0) -> list[torch.Tensor]:
    inputs = prompts(rows, seed)
    return [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def submit(model, llmopt, rows, **arguments):
    """Results, figures, and the loop, which serves nobody any more."""
    with Engine(model, llmopt) as engine:
        with engine.loop.lock:  # all are there before the first step
            handles = [engine.submit(row, seed=index, **arguments) for index, row in enumerate(rows)]
        return [handle.result() for handle in handles], [handle.stats for handle in handles], engine.loop


def test_features_come_from_chunks_of_prompts_too(target, watched, tmp_path, monkeypatch, seen):
    monkeypatch.setattr("hf_llmopt.speculative.eagle.follower.WAITING", 1)
    files = files_of("SafeAI")
    config = eagle(files.save(tmp_path), kv_cache={"page_size": 4}, batching={"max_batch_tokens": 12})
    rows = [torch.cat([row, row]) for row in rows_of(3)]
    expected, _, _ = submit(target, True, rows, max_new_tokens=12, **GREEDY)
    found, stats, loop = submit(target, config, rows, max_new_tokens=12, **GREEDY)
    assert found == expected
    assert all(each.drafted_tokens for each in stats)
    check(seen, files, watched, every=3)
    assert {start for *_, start in seen} == {0}
    follower = loop.speculator.drafter._second
    assert follower.store.pages_used == 0, "pages go back with their texts"
    assert not follower._texts


def test_a_masked_last_token_is_no_feature(target, watched, tmp_path, monkeypatch, seen):
    monkeypatch.setattr("hf_llmopt.speculative.eagle.follower.WAITING", 1)
    files, mask = files_of("SafeAI"), torch.tensor([[1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 9]]), "attention_mask": mask}
    expected = generate(target, inputs, None, **GREEDY)
    assert generate(target, inputs, eagle(files.save(tmp_path)), **GREEDY) == expected
    assert drafted(target).drafted_tokens > 0
    check(seen, files, watched, every=2)


class Text:
    """What a drafter sees of a request."""

    left_padding, salt = 0, None

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    @property
    def positions(self) -> list[int]:
        return list(range(len(self.tokens)))

    @property
    def next_position(self) -> int:
        return len(self.tokens)


@pytest.mark.parametrize("waiting", [1, 256])
@torch.no_grad()
def test_wrong_guesses_gaps_and_tokens_that_are_computed_again(watched, tmp_path, monkeypatch, waiting):
    monkeypatch.setattr("hf_llmopt.speculative.eagle.follower.WAITING", waiting)
    files, wrong = files_of("SafeAI"), [7, 8, 9]
    reference = Reference(files, watched)
    follower = Follower(load_eagle(files.save(tmp_path), watched), LLMOptConfig(kv_cache={"page_size": 4}))
    tokens = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    text = Text(tokens[:10])

    def observe(computed: list[int], start: int, known: int, text: Text = text) -> None:
        states = watched(torch.tensor([computed]), output_hidden_states=True).hidden_states
        found = [states[index][0, start:] for index in files.needs]
        follower.observe([Seen(text, start, len(computed) - start, known)], found)

    def expect(start: int = 0, text: Text = text) -> None:
        follower.follow([text])
        guesses, rows = reference.guesses(text.tokens, 3, start)
        for token, logits in zip(guesses, rows, strict=True):
            (found,) = follower.logits([text])
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
            follower.append(text, token)

    observe(tokens[:10], 0, 9)
    text.tokens = tokens[:11]
    observe(tokens[:11] + wrong, 10, 10)  # and nobody asks for guesses
    text.tokens = tokens[:12]
    observe(tokens[:12] + wrong, 11, 11)
    text.tokens = tokens[:13]
    expect()
    expect()
    observe(tokens[:13], 12, 12)  # with two guesses in the pages
    observe(tokens[:6], 0, 12)  # its pages were taken away
    observe(tokens[:13], 6, 12)
    text.tokens = tokens[:14]
    expect()
    # Another one has nine tokens in common with it, found for it, which end inside a page.
    other = Text([*tokens[:9], 50, 51, 52])
    observe(other.tokens[:11], 8, 10, other)
    expect(text=other)
    observe(tokens[:14], 13, 13)
    text.tokens = tokens[:15]
    expect()
    expect(text=other)
    follower.forget(other)
    text.tokens = tokens[:23]
    assert follower.logits([text, Text([1, 2])])[1] is None, "a text that was never seen"
    follower.follow([text])
    assert follower.logits([text]) == [None], "features are missing"
    observe(tokens[:23], 19, 22)  # the tokens before were found
    text.tokens = tokens[:24]
    expect(start=19)
    follower.forget(text)
    assert follower.store.pages_used == 0


@torch.no_grad()
def test_features_that_wait_do_not_hold_those_of_others(target, tmp_path):
    follower = Follower(load_eagle(files_of("SafeAI").save(tmp_path), target), LLMOptConfig())
    long, short = Text([5] * 101), Text([6, 7])
    follower.observe([Seen(short, 0, 1, 1), Seen(long, 0, 100, 100)], [torch.randn(101, HIDDEN)] * 3)
    for text, kept in ((short, 1), (long, 101)):
        (waiting,) = follower._texts[text].waiting
        assert waiting.untyped_storage().nbytes() == 4 * kept * HIDDEN


def test_found_prompts_have_no_features_and_are_drafted_for_all_the_same(target, watched, tmp_path, seen):
    files = files_of("speculators")
    config = eagle(files.save(tmp_path), prompt_cache=True, kv_cache={"page_size": 4})
    rows = rows_of(3)
    expected, _, _ = submit(target, True, rows, max_new_tokens=12, **SAMPLED)
    with Engine(target, config) as engine:
        for _ in range(2):
            handles = [engine.submit(row, seed=index, max_new_tokens=12, **SAMPLED) for index, row in enumerate(rows)]
            assert [handle.result() for handle in handles] == expected
            assert all(handle.stats.drafted_tokens for handle in handles)
        cached = {handle.stats.cached_tokens for handle in handles}
    starts = {start for *_, start in seen}
    assert min(cached) > 0
    assert starts == {0} | cached
    # Sampled guesses use the noise of their place; that of the first one shows whether its logits are right.
    reference = Reference(files, watched)
    for tokens, positions, guesses, start in seen[-6:]:
        assert reference.guesses(tokens, 1, start, positions)[1][0][guesses[0]] > -torch.inf


def test_rows_with_the_same_prompt_have_its_features_in_common(target, watched, tmp_path, seen):
    files, inputs = files_of("SafeAI"), {name: tensor.repeat(3, 1) for name, tensor in prompts(1).items()}
    config = eagle(files.save(tmp_path), kv_cache={"page_size": 4})
    for arguments in (SAMPLED, GREEDY):
        seen.clear()
        expected = generate(target, inputs, None, **arguments)
        assert generate(target, inputs, config, **arguments) == expected
        assert drafted(target).drafted_tokens > 0
        assert {start for *_, start in seen} == {0}
    check(seen, files, watched, every=2)
    assert target.llmopt.engine.speculator.drafter._second.store.pages_used == 0


@pytest.mark.parametrize("swap_bytes", [0, 2**20])
def test_requests_that_lose_their_pages_draft_again(target, watched, tmp_path, monkeypatch, seen, swap_bytes):
    monkeypatch.setattr("hf_llmopt.engine.mover.Costs.favour_copy", lambda *args: True)
    files = files_of("DeepSpec")
    batching = {"max_batch_tokens": 16, "swap_bytes": swap_bytes}
    config = eagle(files.save(tmp_path), kv_cache={"max_tokens": 96, "page_size": 4}, batching=batching)
    rows = list(prompts(4)["input_ids"])
    expected, _, _ = submit(target, True, rows, max_new_tokens=24, **GREEDY)
    found, stats, _ = submit(target, config, rows, max_new_tokens=24, **GREEDY)
    assert found == expected
    assert sum(each.preemptions for each in stats) > 0
    assert (sum(each.swaps for each in stats) > 0) == (swap_bytes > 0)
    check(seen, files, watched, every=2)
    assert len(seen) > 20


def test_a_drafter_without_pages_gives_up_texts_not_tokens(target, watched, tmp_path, monkeypatch, seen):
    files = files_of("SafeAI")
    config = eagle(files.save(tmp_path), kv_cache={"page_size": 4})
    rows = rows_of(3)
    expected, _, _ = submit(target, True, rows, max_new_tokens=16, **GREEDY)
    monkeypatch.setattr(
        "hf_llmopt.speculative.eagle.follower.KVCacheConfig", lambda **limits: KVCacheConfig(4, max_tokens=48)
    )
    found, stats, _ = submit(target, config, rows, max_new_tokens=16, **GREEDY)
    assert found == expected
    assert sum(each.drafted_tokens for each in stats) > 0
    assert any(start for *_, start in seen), "some began anew"
    check(seen, files, watched, every=2)


def test_a_drafter_that_fails_harms_nobody(target, tmp_path, monkeypatch):
    inputs, config = prompts(2), eagle(files_of("SafeAI").save(tmp_path))
    expected = generate(target, inputs, None, **GREEDY)
    for name, says in (("fuse", "hidden states are not read"), ("logits", "nothing is guessed")):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_llmopt.speculative.eagle.model.EagleModel.{name}", lambda *args: 1 / 0)
            target.llmopt.release()
            with pytest.warns(UserWarning, match=f"{says} any more: ZeroDivisionError"):
                assert generate(target, inputs, config, **GREEDY) == expected
    target.llmopt.release()
    assert all("forward" not in vars(module) for module in target.modules())


def test_loading_changes_neither_the_model_nor_the_generator(target, tmp_path):
    before = [(name, id(p), p.requires_grad) for name, p in target.named_parameters()]
    torch.manual_seed(5)
    drafter = load_eagle(files_of("EAGLE-1").save(tmp_path), target)
    assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(5)))
    assert [(name, id(p), p.requires_grad) for name, p in target.named_parameters()] == before
    assert drafter.lm_head is target.lm_head
    config = {"speculative": SpeculativeConfig("eagle", drafter, num_tokens=2)}
    assert generate(target, prompts(), config, **GREEDY) == generate(target, prompts(), None, **GREEDY)
    assert drafted(target).drafted_tokens > 0
    other = build("llama", vocab_size=32)
    with pytest.raises(InvalidOption, match="112 tokens; this one has 64 and 32"):
        generate(other, prompts(), config, **GREEDY)


def without(name):
    return lambda config, tensors: tensors.pop(name)


def renamed(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def options(**changes):
    return lambda config, tensors: config.update(changes)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (without("fc.weight"), InvalidCheckpoint, "no fc.weight"),
        (without("norm.weight"), InvalidCheckpoint, "missing are norm.weight"),
        (without("midlayer.mlp.up_proj.weight"), InvalidCheckpoint, "missing are midlayer.mlp.up_proj.weight"),
        (without("lm_head.weight"), InvalidCheckpoint, "no lm_head.weight"),
        (without("d2t"), InvalidCheckpoint, "knows 80 of the model's 112 tokens"),
        (renamed("norm.weight", "norm.gain"), InvalidCheckpoint, "missing are norm.weight; unknown are norm.gain"),
        (lambda config, tensors: tensors["d2t"].add_(1), InvalidCheckpoint, "do not name the same 80 of 112"),
        (
            options(intermediate_size=50),
            InvalidCheckpoint,
            r"midlayer.mlp.down_proj.weight is \(64, 48\), expected \(64, 50\)",
        ),
        (options(hidden_size=32), InvalidCheckpoint, "does not fit"),
        (options(vocab_size=50), InvalidOption, "made for a model of 50 tokens; this one has 112"),
        (options(model_type="gemma3_text"), InvalidCheckpoint, "layers of 'gemma3_text'; known are llama"),
        (options(speculators_model_type="dflash"), InvalidCheckpoint, "'dflash' speculator.*'eagle3' alone"),
        (options(eagle_aux_hidden_state_layer_ids=[1, 2]), InvalidOption, r"reads 3 of this model's layers.*\[1, 2\]"),
        (options(eagle_aux_hidden_state_layer_ids=[1, 2, 9]), InvalidOption, "of which it has 6"),
        (lambda c, t: t.update({"fc.weight": torch.zeros(64, 100)}), InvalidOption, "fc.weight reads 100 numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused(target, tmp_path, change, error, says):
    files = files_of("SafeAI")
    change(files.config, files.tensors)
    with pytest.raises(error, match=says):
        load_eagle(files.save(tmp_path), target)


def test_files_that_are_damaged_or_not_there_are_refused(target, tmp_path):
    with pytest.raises(InvalidOption, match="neither a folder nor a name on the hub"):
        load_eagle(str(tmp_path / "nowhere"), target)
    folder = files_of("SpecForge").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InvalidCheckpoint, match="cannot be read: SafetensorError"):
        load_eagle(folder, target)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidOption, match=r"holds no model\.safetensors nor"):
        load_eagle(folder, target)


def test_options_that_do_not_fit_are_refused(target, tmp_path):
    with pytest.raises(InvalidOption, match="need draft_model="):
        SpeculativeConfig("eagle")
    with pytest.raises(InvalidOption, match=r"takes an EAGLE drafter.*got LlamaForCausalLM"):
        generate(target, prompts(), eagle(target), **GREEDY)


def test_shards_are_put_together(target, tmp_path):
    files = files_of("speculators")
    folder, whole = files.save(tmp_path), load_eagle(files.save(tmp_path), target).state_dict()
    (tmp_path / "model.safetensors").unlink()
    halves = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, tensor) in enumerate(files.tensors.items()):
        halves[("a.safetensors", "b.safetensors")[index % 2]][name] = tensor
    for file, tensors in halves.items():
        save_file(tensors, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in halves.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_eagle(folder, target).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"names .*b\.safetensors"):
        load_eagle(folder, target)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_other_models_hand_out_their_states_as_well(architecture, tmp_path, seen):
    windows = {"layer_types": ["sliding_attention", "full_attention"] * 3} if architecture == "gemma3_text" else {}
    model = build(architecture, num_hidden_layers=LAYERS, **windows)
    files, inputs = files_of("SpecForge"), prompts(2)
    expected = generate(model, inputs, None, **GREEDY)
    assert generate(model, inputs, eagle(files.save(tmp_path)), **GREEDY) == expected
    assert drafted(model).drafted_tokens > 0
    check(seen, files, build(architecture, num_hidden_layers=LAYERS, **windows), every=4)
