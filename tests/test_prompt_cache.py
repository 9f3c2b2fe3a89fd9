"""The prompt cache: what it finds is what would be computed, whatever happened before."""

import copy
import gc
import sys
import warnings
import weakref
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LogitsProcessor

import hf_llmopt
from hf_llmopt import BatchingConfig, Engine, LLMOptConfig, PromptCacheConfig, errors
from hf_llmopt.engine import EngineLoop, Request
from hf_llmopt.engine.mover import Mover
from hf_llmopt.engine.policy import Fair, FirstCome, Priority
from hf_llmopt.engine.scheduler import Scheduler
from hf_llmopt.kv_cache import LayerSpec, PagedStore
from hf_llmopt.prompt_cache import Prefix, PromptCache
from hf_llmopt.prompt_cache import tree as tree_module
from hf_llmopt.prompt_cache.index import Node, common, longest
from hf_llmopt.prompt_cache.store import HostTier

KW = {"pad_token_id": 0, "eos_token_id": None}
PAGE = 4
SMALL = {"kv_cache": {"page_size": PAGE}, "prompt_cache": True}


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens])


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def run(model, prompt: torch.Tensor, llmopt=SMALL, new: int = 8) -> tuple[list[int], int]:
    """The new tokens, and how many of the prompt's were found; fails if stock generates others."""
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": new, "do_sample": False, **KW}
    ours = model.generate(prompt, **arguments, llmopt=llmopt)
    assert model.llmopt.stats.served_by == "llmopt"
    assert ours.tolist() == model.generate(prompt, **arguments, llmopt=False).tolist()
    return ours[0, prompt.shape[1] :].tolist(), model.llmopt.stats.cached_tokens


# ---------------------------------------------------------------------------------------------------------- the config


def test_which_keywords_switch_it_on() -> None:
    assert LLMOptConfig.parse(True).prompt_cache == PromptCacheConfig()
    assert LLMOptConfig.parse("prompt_cache").prompt_cache == PromptCacheConfig()
    assert LLMOptConfig.parse("kv_cache").prompt_cache is None
    assert LLMOptConfig.parse("kv_cache,prompt_cache").prompt_cache == PromptCacheConfig()
    assert LLMOptConfig.parse({"prompt_cache": False}).prompt_cache is None
    assert LLMOptConfig.parse({"prompt_cache": "folder"}).prompt_cache == PromptCacheConfig(path="folder")
    assert PromptCacheConfig(path=Path("folder")).path == "folder"
    with pytest.raises(errors.InvalidOption, match="KVCacheConfig is made from"):
        LLMOptConfig(kv_cache=None)
    with pytest.raises(errors.InvalidOption, match="Did you mean 'salt'"):
        LLMOptConfig.parse({"prompt_cache": {"slat": "x"}})
    with pytest.raises(errors.InvalidOption, match="at least 0"):
        PromptCacheConfig(max_bytes=-1)
    with pytest.raises(errors.InvalidOption, match="takes a string"):
        PromptCacheConfig(salt=3)


# ------------------------------------------------------------------------------------------------------------ the tree

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=20)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), st.data())
def test_closest_child_has_the_longest_common_beginning(texts, wanted, data) -> None:
    root = Node.root(None, b"", 1)
    for tokens in dict.fromkeys(texts):
        root.add(tokens)
    for gone in data.draw(st.lists(st.sampled_from(list(root.children)), unique=True)) if root.children else ():
        root.children[gone].detach()
    found = root.closest(wanted)
    best = max((common(tokens, wanted) for tokens in root.children), default=0)
    assert (common(found.tokens, wanted) if found is not None else 0) == best


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_hit_ends_where_every_group_has_its_pages(data) -> None:
    layers = [
        LayerSpec(*kind, 1, 1, 1, torch.float32, torch.device("cpu"))
        for kind in (("full", 0), ("sliding", 6), ("chunked", 8))
    ]
    groups = PagedStore(layers, hf_llmopt.KVCacheConfig(page_size=PAGE)).groups
    found = data.draw(st.integers(0, 32))
    nodes = [Node.root(None, b"", 3) for _ in range(-(-found // PAGE))]
    pages = {
        (node, group): data.draw(st.integers(0, 9)) > group * 2 // (place + 1)
        for place, node in enumerate(nodes)
        for group in range(3)
    }

    def fits(count: int) -> bool:
        seen = [range(group.first_visible(count) // PAGE, -(-count // PAGE)) for group in groups]
        return all(pages[nodes[page], index] for index, its in enumerate(seen) for page in its)

    candidates = [found, *range((found - 1) // PAGE * PAGE, 0, -PAGE)] if found else []
    best = next((count for count in candidates if fits(count)), 0)
    assert longest(nodes, found, PAGE, groups, lambda node, group: pages[node, group]) == best


# ----------------------------------------------------------------- engine, scheduler, pools and cache, without a model


class Weights(nn.Module):
    """What the cache asks a model for: tensors and a config."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.config = self

    def get_text_config(self, decoder: bool) -> nn.Module:
        return self


class Traffic(RuleBasedStateMachine):
    """Random requests over tiny pools: they share, wait, give way, go to host memory and come back.

    A token's key is a number made from all tokens before it and the weights: a page that holds anything but what would
    be computed is seen at once, in every group.
    """

    @initialize(
        pages=st.integers(3, 14),
        budget=st.integers(1, 9),
        most=st.integers(0, 14),
        host=st.sampled_from([0, 3, 1000]),
        policy=st.sampled_from([FirstCome, Fair, lambda: Priority(2)]),
        swaps=st.sampled_from([lambda request: False, lambda request: True, lambda request: request.arrival % 2 == 0]),
    )
    def begin(self, pages: int, budget: int, most: int, host: int, policy, swaps) -> None:
        kinds = [("full", 0), ("sliding", 6), ("chunked", 8)]
        layers = [LayerSpec(*kind, 1, 1, 1, torch.float64, torch.device("cpu")) for kind in kinds]
        self.store = PagedStore(layers, hf_llmopt.KVCacheConfig(page_size=PAGE, max_tokens=pages * PAGE))
        self.model = Weights()
        page_bytes = sum(self.store.page_bytes(group) for group in range(3))
        self.cache = PromptCache(self.model, self.store, PromptCacheConfig(max_bytes=most * page_bytes))
        if host:
            self.cache.trees.host = HostTier(host * page_bytes // 3, self.cache.trees.prune)
        self.pools = [group.pool for group in self.store.groups]
        self.loop = loop = object.__new__(EngineLoop)
        loop.store, loop.prompts, loop.mover = self.store, self.cache, Mover(self.store, BatchingConfig(), None)
        loop.evictor = loop.speculator = None
        loop.lock = SimpleNamespace(notify_all=lambda: None)
        self.scheduler = loop.scheduler = Scheduler(
            self.pools, policy(), budget, 4, loop.mover.tables, loop._grow, swaps, loop.mover.move, self.cache
        )
        self.keys: dict[Request, list[float]] = {}  # what each request computed or found
        self.forks: list[tuple[list, list[int], list[float]]] = []  # tables, tokens and keys of kept forks

    def key(self, tokens: list[int]) -> float:
        seed = repr((self.model.weight[0].item(), tokens)).encode()
        return float(int.from_bytes(blake2b(seed, digest_size=6).digest(), "little") + 1)

    # Mostly the same text, so that much is shared; sometimes another one.
    PROMPTS = st.builds(
        lambda shared, tail: [number % 3 % 2 for number in range(shared)] + tail,
        st.integers(0, 24),
        st.lists(st.integers(0, 1), min_size=1, max_size=5),
    )
    SALTS = st.sampled_from([None, None, None, "b"])
    LEVELS = st.integers(-2, 2)

    @property
    def requests(self) -> list[Request]:
        """Those that run, then those that wait."""
        return [*self.scheduler.running, *sorted(self.scheduler.line, key=lambda request: request.arrival)]

    @rule(tokens=PROMPTS, salt=SALTS, level=LEVELS, new=st.integers(1, 4))
    def serve(self, tokens: list[int], salt: str | None, level: int, new: int) -> None:
        """A request from its first step to its end, while others run."""
        request = self.add(tokens, salt, level)
        for count in range(new + 1):
            for _ in range(40):
                if request is not None and request.remaining:
                    self.step()
            if request is None or request.remaining:
                return
            if count < new:
                request.append(count % 2)
        self.loop.finish(request)

    @rule(tokens=PROMPTS, salt=SALTS, level=LEVELS, copies=st.sampled_from([1, 1, 2]))
    def submit(self, tokens: list[int], salt: str | None, level: int, copies: int) -> None:
        first = self.add(tokens, salt, level)
        if first is not None and copies > 1:
            self.add(tokens, salt, level).parent = first

    def add(self, tokens: list[int], salt: str | None, level: int) -> Request | None:
        total, budget = self.store.limits()[0] * PAGE, self.scheduler.max_batch_tokens
        if len(tokens) + 8 > total:
            return None
        rooms = [group.pages_for(total, PAGE, budget) for group in self.store.groups]
        request = Request(list(tokens), [], 0, rooms, priority=level, tenant=str(level))
        request.prefix = Prefix(len(tokens), salt)
        self.scheduler.add(request)
        self.keys[request] = []
        return request

    @rule()
    def step(self) -> None:
        self.cache.begin_step()
        plan = self.scheduler.schedule()
        if all(request.remaining for request in self.requests) and self.requests and not self.forks:
            assert plan.spans or plan.preempted, "kept pages must never keep a request from running"
        self.loop.mover.move(plan)
        for request, length in plan.spans:
            keys, start, stop = self.keys[request], request.computed, request.computed + length
            if len(keys) != start:  # found, or preempted and found again
                keys[:] = [self.key([*request.tokens[: i + 1], salt_of(request)]) for i in range(start)]
            keys += [self.key([*request.tokens[: i + 1], salt_of(request)]) for i in range(start, stop)]
            for index, table in enumerate(request.tables):
                slots = self.store.slots(table, start, stop)
                new = torch.tensor(keys[start:], dtype=torch.float64).view(-1, 1, 1)
                self.store.write(index, slots, new, -new)
        self.loop._settle(plan.spans)
        for request, _ in plan.spans:
            request.logits = None if request.remaining else "logits"

    def pick(self, number: int) -> Request | None:
        return self.requests[number % len(self.requests)] if self.requests else None

    @rule(number=st.integers(0, 9), token=st.integers(0, 1), times=st.integers(1, 3))
    def sample(self, number: int, token: int, times: int) -> None:
        """The request has its logits: a token is appended, and perhaps computed."""
        for _ in range(times):
            request = self.pick(number)
            if request is None or request.remaining or len(request.tokens) >= self.store.limits()[0] * PAGE:
                return
            request.append(token)
            self.step()

    @rule(number=st.integers(0, 9))
    def finish(self, number: int) -> None:
        request = self.pick(number)
        if request is not None and request.tables and request.remaining <= 1:
            self.loop.finish(request)

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        request = self.pick(number)
        if request is not None:
            self.loop._abandon(request)

    @rule(number=st.integers(0, 9))
    def fork(self, number: int) -> None:
        """Somebody keeps a request's tables, as a returned cache does."""
        request = self.pick(number)
        if request is not None and request.tables and len(self.forks) < 2:
            tables = [table.fork() for table in request.tables]
            self.forks.append((tables, request.tokens[: request.computed], self.keys[request][: request.computed]))

    @precondition(lambda self: self.forks)
    @rule(back=st.integers(0, 5))
    def rewrite(self, back: int) -> None:
        """The fork is cut short and goes on with other keys: nobody else may see them."""
        tables, tokens, keys = self.forks[-1]
        length = max(0, len(keys) - back)
        if any(table.passed * PAGE > length for table in tables):
            return
        for index, table in enumerate(tables):
            table.crop(length)
            if table.missing(length, length + 2) > self.pools[index].free:
                return self.drop()
            copies = table.reserve(length, length + 2)
            if copies:
                self.store.copy_pages(index, copies)
            new = torch.tensor([[[-1.0]], [[-2.0]]], dtype=torch.float64)
            self.store.write(index, self.store.slots(table, length, length + 2), new, -new)
        self.forks[-1] = (tables, tokens[:length], [*keys[:length], -1.0, -2.0])

    @precondition(lambda self: self.forks)
    @rule()
    def drop(self) -> None:
        tables, _, _ = self.forks.pop()
        for table in tables:
            table.clear()

    @rule(seen_by_torch=st.booleans())
    def train(self, seen_by_torch: bool) -> None:
        if seen_by_torch:
            with torch.no_grad():
                self.model.weight += 1
        else:
            self.model.weight.data += 1
        for request in self.requests:  # the keys of running requests are of both weights
            self.loop._abandon(request)

    @rule(group=st.integers(0, 2), count=st.integers(1, 4))
    def evict(self, group: int, count: int) -> None:
        self.pools[group].evict(count)

    @invariant()
    def contents_are_right(self) -> None:
        for request in self.scheduler.running if hasattr(self, "store") else ():
            keys = self.keys[request][: request.computed]
            if len(keys) == request.computed:  # else found, and not run yet
                self.check(request.tables, keys)
        for tables, _, keys in self.forks if hasattr(self, "store") else ():
            self.check(tables, keys)

    def check(self, tables: list, keys: list[float]) -> None:
        for index, (group, table) in enumerate(zip(self.store.groups, tables, strict=True)):
            first = max(group.first_visible(len(keys)), table.passed * PAGE)
            if first < len(keys):
                slots = self.store.slots(table, first, len(keys))
                assert self.store.keys[index][slots, 0, 0].tolist() == keys[first:]
                assert self.store.values[index][slots, 0, 0].tolist() == [-key for key in keys[first:]]

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "store"):
            return
        assert not any(request.tables for request in self.scheduler.line), "who waits holds no pages"
        assert self.loop.mover.swapped_bytes == sum(r.swapped.nbytes for r in self.requests if r.swapped is not None)
        nodes = [node for root in self.cache.trees.roots.values() for node in root.subtree()]
        for index, pool in enumerate(self.pools):
            refs = [0] * (pool.num_pages + 1)
            tables = [request.tables[index] for request in self.scheduler.running]
            for table in [*tables, *(tables[index] for tables, _, _ in self.forks)]:
                for page in table.pages:
                    refs[page] += bool(page)
            assert refs == [pool.refs(page) for page in range(pool.num_pages + 1)]
            assert pool.used == sum(map(bool, refs))
            assert all(node.claim is None or node.claim[0] in self.scheduler.running for node in nodes)
            findable = {node.pages[index]: node for node in nodes if node.pages[index]}
            assert findable == self.cache.trees.owners[index]
            assert set(pool.kept) == {page for page in findable if not refs[page]}
            assert pool.used + len(pool.kept) + pool.blank == pool.num_pages
            assert len(pool.kept) <= pool.most_kept
        assert all(name.epoch == self.cache._seen for name in self.cache.trees.roots)
        for index, pool in enumerate(self.pools):
            findable = self.cache.trees.owners[index]
            assert all(pool.shared(page) for page in findable)
        if self.cache.trees.host is not None:
            rows = [copy.numel() for node in nodes for copy in node.copies if copy is not None]
            assert self.cache.trees.host.bytes == sum(rows) <= self.cache.trees.host.max_bytes
        for node in nodes:
            assert node.parent is None or not node.bare, "nothing is left behind"
            assert node.parent is None or len(node.tokens) == PAGE or not node.children


def salt_of(request: Request) -> int:
    return -1 if request.prefix.salt is None else -2


Traffic.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestTraffic = Traffic.TestCase


# ------------------------------------------------------------------------------------------------------------- weights


def sgd(model) -> None:
    step(model, torch.optim.SGD(model.parameters(), lr=0.5))


def fused_adam(model) -> None:
    step(model, torch.optim.AdamW(model.parameters(), lr=0.05, fused=True))


def step(model, optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def other_weights() -> dict[str, torch.Tensor]:
    return build("llama", seed=1).state_dict()


def swap_parameter(model) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach() * -1)


def one_hidden_element(model) -> None:
    """Too little for anybody to see, so the user says it."""
    model.model.embed_tokens.weight.data[5, :] = 1.0
    model.llmopt.weights_changed()


class Halved(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / 2


def replace_forward(model) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = lambda x, eager=layer.forward: eager(x) / 2


def hook_all(model) -> None:
    """As long as the test runs; only modules of this model are changed."""
    values = {layer.self_attn.v_proj for layer in model.model.layers}
    hooks.append(register_module_forward_hook(lambda m, inputs, output: -output if m in values else None))


hooks: list = []  # on every module


@pytest.fixture(autouse=True)
def _no_hooks_are_left():
    yield
    while hooks:
        hooks.pop().remove()


WRITES = {
    "optimizer": sgd,
    "fused optimizer": fused_adam,
    "load_state_dict": lambda model: model.load_state_dict(other_weights()),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(other_weights(), assign=True),
    "in place": lambda model: [parameter.detach().mul_(-0.9) for parameter in model.parameters()],
    ".data in place": lambda model: [parameter.data.mul_(-0.9) for parameter in model.parameters()],
    ".data of one layer": lambda model: model.model.layers[1].self_attn.v_proj.weight.data.mul_(-1),
    ".data exchanged": lambda model: setattr(model.model.layers[0].mlp.up_proj.weight, "data", torch.randn(96, 64)),
    "another parameter": swap_parameter,
    "weights_changed": one_hidden_element,
    "hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda m, inputs, output: output / 2),
    "hook before": lambda model: model.model.layers[0].mlp.register_forward_pre_hook(lambda m, inputs: inputs[0] / 2),
    "hook on all modules": hook_all,
    "replaced forward": replace_forward,
    "another class": lambda model: setattr(model.model.layers[0].self_attn.k_proj, "__class__", Halved),
    "another module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
}


@pytest.mark.parametrize("write_weights", WRITES.values(), ids=WRITES)
def test_new_weights_find_nothing(write_weights) -> None:
    """The fault of stale keys: the same prompt after an update must not meet what the old weights computed."""
    model, prompt = build("llama"), torch.cat([ids(5), text(20)], dim=1)
    old, _ = run(model, prompt)
    assert run(model, prompt) == (old, 20)
    engine = model.llmopt.engine
    write_weights(model)
    new, found = run(model, prompt)
    assert (new != old, found) == (True, 0), "the update must change the tokens, or stale keys would not show"
    assert run(model, prompt) == (new, 20)
    assert model.llmopt.prompt_cache.invalidations == 1 or model.llmopt.engine is not engine


def test_recorded_hidden_states_change_nothing() -> None:
    """transformers hooks the layers for good, and notes that on the model, when a pass is first asked for them."""
    model = build("llama")
    run(model, text(20))
    model(text(20), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks, "else this test is of no use"
    assert run(model, text(20))[1] == 19


def test_weights_of_other_models_change_nothing() -> None:
    model, other = build("llama"), build("llama", seed=1)
    run(model, text(20))
    fused_adam(other)
    assert run(model, text(20))[1] == 19


def test_a_fused_step_is_seen_though_torch_counts_nothing() -> None:
    """Holds the reason for the hook: neither versions nor sampled elements may be relied on alone."""
    model = build("llama")
    run(model, text(20))
    cache = model.llmopt.engine.prompts
    before = cache._epoch.number
    sgd(model)
    assert cache._epoch.number == before + 1, "known before anybody looks at the weights"


def test_engine_requests_meet_new_weights() -> None:
    """Train while generating: what is submitted after an update gets the new weights' tokens."""
    model, prompt = build("gemma3_text"), text(20)
    with Engine(model, SMALL) as engine:
        for _ in range(3):
            for found in (0, 19):
                handle = engine.submit(prompt, max_new_tokens=8, **KW)
                tokens = handle.result(60)
                assert tokens == model.generate(prompt, max_new_tokens=8, **KW)[0, 20:].tolist()
                assert handle.stats.cached_tokens == found
            fused_adam(model)


def test_an_update_in_the_middle_of_a_request_enters_nothing_stale() -> None:
    class Trains(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 24:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(-0.9)
            return scores

    model, prompt = build("llama"), text(20)
    out = model.generate(prompt, max_new_tokens=12, logits_processor=[Trains()], llmopt=SMALL, **KW)
    assert run(model, out)[1] == 0


def test_adapters_have_entries_of_their_own() -> None:
    """load_adapter, set_adapter, disable and delete: each state finds its own pages and nobody else's."""
    peft = pytest.importorskip("peft")
    model, prompt = build("llama"), text(20)
    base, _ = run(model, prompt)
    for name in ("a", "b"):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        model.add_adapter(peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False), name)
    model.eval()
    seen = {tuple(base)}
    for name in ("a", "b"):
        model.set_adapter(name)
        tokens, found = run(model, prompt)
        assert found == 0
        seen.add(tuple(tokens))
    assert len(seen) == 3, "adapters that change nothing would prove nothing"
    for name in ("a", "b"):
        model.set_adapter(name)
        assert run(model, prompt)[1] == 19, "switching back finds what was computed before"
    model.disable_adapters()
    assert run(model, prompt) == (base, 0)
    for name in ("a", "b"):
        model.enable_adapters()
        model.set_adapter(name)
        assert run(model, prompt)[1] == 19, "off and on again is a switch too"
    model.disable_adapters()
    assert run(model, prompt) == (base, 19)
    assert model.llmopt.prompt_cache.invalidations == 0


# ------------------------------------------------------------------------------------------------- isolation, eviction


def test_salts_share_nothing() -> None:
    model, prompt = build("llama"), text(20)
    tenants = [{**SMALL, "prompt_cache": {"salt": salt}} for salt in ("a", "b")]
    assert [run(model, prompt, tenant)[1] for tenant in tenants] == [0, 0]
    assert run(model, prompt)[1] == 0, "no salt is a tenant too"
    engine = model.llmopt.engine
    assert [run(model, prompt, tenant)[1] for tenant in tenants] == [19, 19]
    assert model.llmopt.engine is engine, "tenants share an engine, and its memory"


def test_engine_requests_carry_their_salt() -> None:
    model, prompt = build("llama"), text(20)
    with Engine(model, SMALL) as engine:
        found = []
        for salt in ("a", "b", "a", None):
            handle = engine.submit(prompt, salt=salt, max_new_tokens=4, **KW)
            handle.result(60)
            found.append(handle.stats.cached_tokens)
    assert found == [0, 0, 19, 0]


def test_eviction_takes_the_least_recently_used_ends() -> None:
    """A prompt in use survives the squeeze that drops one that is not, page by page from its end."""
    model = build("llama")
    config = {"kv_cache": {"page_size": PAGE, "max_tokens": 80}, "prompt_cache": True}
    used, idle = text(20, 1), text(20, 2)
    run(model, idle, config, new=1)
    run(model, used, config, new=1)
    for turn in range(6):
        assert run(model, used, config, new=1)[1] >= 16
        run(model, text(12, 10 + turn), config, new=1)
    found = run(model, idle, config, new=1)[1]
    assert found < 16
    assert model.llmopt.prompt_cache.evictions > 0
    cache = model.llmopt.engine.prompts
    pool = model.llmopt.engine.store.groups[0].pool
    lengths = []
    while pool.kept:
        lengths.append(cache.path(cache.name(None), used[0].tolist())[1])
        pool.evict(1)
    assert lengths == sorted(lengths, reverse=True), "a beginning outlives what continues it"
    assert len(set(lengths)) > 3, "never everything at once"


def test_max_bytes_bounds_what_is_kept() -> None:
    model = build("llama")
    page_bytes = PAGE * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, width, float32
    config = {"kv_cache": {"page_size": PAGE}, "prompt_cache": {"max_bytes": 7 * page_bytes}}
    for seed in range(5):
        run(model, text(20, seed), config)
        assert 0 < model.llmopt.prompt_cache.device_bytes <= 7 * page_bytes
    assert run(model, text(20, 4), config)[1] == 19
    assert run(model, text(20, 0), config)[1] == 0
    nothing = {"kv_cache": {"page_size": PAGE}, "prompt_cache": {"max_bytes": 0}}
    assert [run(model, text(20), nothing)[1] for _ in range(2)] == [0, 0]


def test_a_budget_without_a_page_to_spare() -> None:
    """A found page that cannot be copied is computed instead: what fits cold must fit warm."""
    model = build("llama")
    config = {"kv_cache": {"page_size": PAGE, "max_tokens": 20}, "prompt_cache": True}
    assert run(model, text(18), config, new=2)[1] == 0
    assert run(model, text(18), config, new=2)[1] == 16
    assert run(model, torch.cat([text(15), text(3, 5)], dim=1), config, new=2)[1] == 12


def test_ttl(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tree_module, "monotonic", lambda: now[0])
    model = build("llama")
    config = {**SMALL, "prompt_cache": {"ttl": 60.0}}
    run(model, text(20), config)
    for wait, found in ((50, 19), (50, 19), (70, 0), (10, 19)):
        now[0] += wait
        assert run(model, text(20), config)[1] == found, "each use begins the time anew"


def test_figures() -> None:
    model = build("llama")
    run(model, text(20))
    run(model, text(20))
    figures = model.llmopt.prompt_cache
    assert (figures.requests, figures.prompt_tokens, figures.cached_tokens) == (2, 40, 19)
    assert figures.hit_rate == figures.to_dict()["hit_rate"] == 19 / 40
    store = model.llmopt.engine.store
    assert figures.device_bytes == 7 * store.page_bytes(0), "20 tokens and 7 of 8 new ones: seven pages"
    assert store.pages_used == 0
    model.llmopt.release()
    assert model.llmopt.prompt_cache is None


def test_nan_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose keys are NaN fails; nothing of it is found, and no page keeps a NaN, which masks let through."""
    model = build("gemma3_text")
    clean = text(20)
    poison = torch.cat([clean[:, :9], ids(99), clean[:, 9:]], dim=1)
    model.model.embed_tokens.weight.data[99] = float("nan")
    config = {**SMALL, "batching": {"max_batch_tokens": 7}}
    for _ in range(2):
        with pytest.raises(errors.InvalidLogits):
            model.generate(poison, max_new_tokens=4, llmopt=config, **KW)
        store = model.llmopt.engine.store
        assert store.pages_used == 0
        assert model.llmopt.prompt_cache.device_bytes == 0
    run(model, clean, config)
    assert all(torch.isfinite(tensor).all() for group in (0, 1) for tensor in store._tensors(group))


def test_cancelled_requests_leave_what_is_proven() -> None:
    model, prompt = build("llama"), text(20)
    with Engine(model, SMALL) as engine:
        long = engine.submit(prompt, max_new_tokens=200, **KW)
        tokens = iter(long)
        seen = [next(tokens) for _ in range(9)]
        long.cancel()
        assert not engine.loop.store.pages_used
        again = engine.submit(prompt, max_new_tokens=12, **KW)
        assert again.result(60)[:9] == seen
        assert again.stats.cached_tokens == 19


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_over_shared_prompts(model, name: str, data: st.DataObject) -> None:
    """Submit, cancel, preempt and evict at random over tiny pools: tokens stay stock's, pages return."""
    served = model(name)
    config = {
        "kv_cache": {"page_size": PAGE, "max_tokens": 64},
        "prompt_cache": {"salt": str(data.draw(st.integers(0, 1)))},
        "batching": {"max_batch_tokens": data.draw(st.integers(1, 16)), "max_requests": data.draw(st.integers(1, 5))},
    }
    plans = data.draw(
        st.lists(
            st.tuples(st.integers(0, 24), st.integers(1, 6), st.integers(1, 10), st.booleans()), min_size=2, max_size=9
        )
    )
    with Engine(served, config) as engine:
        submitted = []
        for index, (shared, own, count, cancelled) in enumerate(plans):
            prompt = torch.cat([text(shared, 1), text(own, index)], dim=1) if shared else text(own, index)
            handle = engine.submit(prompt, max_new_tokens=count, **KW)
            if cancelled:
                handle.cancel()
            submitted.append((handle, prompt, count, cancelled))
        for handle, prompt, count, cancelled in submitted:
            if not cancelled:
                ours = handle.result(60)
                theirs = served.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **KW)
                assert ours == theirs[0, prompt.shape[1] :].tolist()
        assert engine.loop.store.pages_used == 0
        for pool in engine.loop.scheduler.pools:
            assert pool.free == pool.num_pages == pool.blank + len(pool.kept)


def test_calls_beside_a_full_engine_count_shared_pages_once() -> None:
    """A generate call is promised only pages that giving way really frees."""
    model, shared = build("llama"), text(24)
    config = {"kv_cache": {"page_size": PAGE, "max_tokens": 96}, "prompt_cache": True}
    batch = torch.cat([text(12, 7), text(12, 8)])
    with Engine(model, config) as engine:
        engine.submit(shared, max_new_tokens=1, **KW).result(60)
        handles = [engine.submit(shared, max_new_tokens=30, **KW) for _ in range(3)]
        ours = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=30, llmopt=config, **KW)
        theirs = model.generate(shared, max_new_tokens=30, **KW)[0, 24:].tolist()
        assert [handle.result(60) for handle in handles] == [theirs] * 3
    assert torch.equal(ours, model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=30, **KW))


def test_a_dropped_model_takes_its_pages_along() -> None:
    model = build("llama")
    run(model, text(20))
    cache = model.llmopt.engine.prompts
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    gc.collect()  # what other tests left
    count = len(hooks)
    gone = weakref.ref(cache)
    del model, cache
    gc.collect()
    assert gone() is None
    assert len(hooks) == count - 1, "its hook is removed"


def test_copies_of_a_model_share_nothing() -> None:
    model = hf_llmopt.optimize(build("llama"), SMALL)
    run(model, text(20))
    twin = copy.deepcopy(model)
    assert twin.llmopt.prompt_cache is None
    assert run(twin, text(20))[1] == 0
