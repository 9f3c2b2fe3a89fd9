"""The scheduler alone, without a model: who starts, who gives way, and that everybody ends."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt.engine.policy import Fair, FirstCome, Policy, Priority
from hf_llmopt.engine.request import Request
from hf_llmopt.engine.scheduler import Plan, Scheduler
from hf_llmopt.kv_cache.pool import BlockTable, PagePool

PAGE = 4
POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FirstCome, "priority": lambda: Priority(8), "fair": Fair}


@dataclass
class Saved:
    """Stands for keys in host memory."""

    passed: list[int]


@dataclass
class World:
    """A scheduler over one pool, and a model that takes no time."""

    policy: Policy
    pages: int
    budget: int = 16
    places: int = 8
    saves: Callable[[Request], bool] = lambda request: False
    goals: dict[Request, int] = field(default_factory=dict)
    order: list[Request] = field(default_factory=list)  # in which requests ended
    started: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        self.scheduler = Scheduler(
            [self.pool],
            self.policy,
            self.budget,
            self.places,
            lambda request: [BlockTable(self.pool, PAGE, request.rooms[0])],
            lambda pages: None,
            lambda request: self.saves(request),
        )

    def submit(self, prompt: int, new: int, **arguments) -> Request:
        room = -(-(prompt + new) // PAGE)
        assert room <= self.pages
        request = Request(list(range(prompt)), list(range(prompt)), prompt, [room], **arguments)
        self.goals[request] = prompt + new
        self.scheduler.add(request)
        return request

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.check(plan)
        for request, _ in plan.saves:
            request.swapped = Saved([0])
        for request in plan.restores:
            request.swapped = None
        for request, length in plan.spans:
            if request not in self.started:
                self.started.append(request)
            request.computed += length
            if not request.remaining:
                if len(request.tokens) == self.goals[request]:
                    self.scheduler.remove(request)
                    self.order.append(request)
                else:
                    request.append(0)
        return plan

    def check(self, plan: Plan) -> None:
        running = self.scheduler.running
        assert sum(length for _, length in plan.spans) <= self.budget
        assert len({request for request, _ in plan.spans}) == len(plan.spans)
        assert len(running) <= self.places
        assert not set(running) & set(self.scheduler.line)
        held = 0
        for request, length in plan.spans:
            assert request in running
            assert len(request.tables[0].pages) * PAGE >= request.computed + length
        for request in running:
            held += request.pages_held
        assert held == self.pool.used  # nobody outside holds a page, and nothing is shared here
        saved = {request for request in running if request.swapped is not None}
        assert saved == set(plan.restores)

    def run(self, limit: int = 10_000) -> int:
        """Step until everybody has ended; how many steps that took."""
        steps = 0
        while len(self.order) < len(self.goals):
            self.step()
            steps += 1
            assert steps < limit, "somebody waits for ever"
        assert self.pool.used == 0
        assert not self.scheduler.running
        assert not len(self.scheduler.line)
        return steps


REQUESTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 12), st.integers(-2, 2), st.sampled_from("abc"), st.integers(0, 12)),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.integers(8, 20), st.integers(1, 24), st.integers(1, 6), st.integers(0, 2))
def test_everybody_ends(name: str, plans, pages: int, budget: int, places: int, saving: int) -> None:
    """Random requests that come at random steps, over pools that hold hardly one of them."""
    flips = iter([saving == 1] * 5 + [saving > 0] * 10_000)
    world = World(POLICIES[name](), pages, budget, places, lambda request: next(flips))
    for prompt, new, priority, tenant, after in plans:
        world.submit(prompt, new, priority=priority, tenant=tenant)
        for _ in range(after):
            world.step()
    world.run()
    assert sum(request.swaps for request in world.goals) <= sum(request.preemptions for request in world.goals)


def test_nobody_passes_a_large_request() -> None:
    """The large one does not fit beside the first; the small ones behind it would, and wait all the same."""
    world = World(FirstCome(), pages=10)
    first = world.submit(8, 16)
    large = world.submit(36, 1)
    small = [world.submit(1, 1) for _ in range(20)]
    world.run()
    assert world.order[:2] == [first, large]
    assert world.order[2:] == small


def test_urgent_requests_pass_and_take_places() -> None:
    world = World(Priority(aging=256), pages=10, places=2)
    slow = [world.submit(4, 20) for _ in range(3)]
    world.step()
    urgent = world.submit(4, 4, priority=1)
    world.run()
    assert world.order[0] is urgent
    assert max(request.preemptions for request in slow) == 1


def test_nobody_gives_way_in_vain() -> None:
    """A call that cannot be preempted holds so much that the urgent request has to wait for its end anyway."""
    world = World(Priority(aging=256), pages=24)
    slow = [world.submit(4, 20) for _ in range(2)]
    world.step()
    call = Request(list(range(40)), list(range(40)), 40, [11], protected=True)
    call.tables = [BlockTable(world.pool, PAGE, 11)]
    world.goals[call] = 44
    world.scheduler.add(call)
    while call.remaining > 1:
        world.step()
    urgent = world.submit(58, 1, priority=1)
    while call not in world.order:
        world.step()
        assert urgent not in world.started
        assert not any(request.preemptions for request in slow)
    world.run()


@pytest.mark.parametrize("gap", [1, 2])
def test_a_stream_of_urgent_requests_starves_nobody(gap: int) -> None:
    """With one urgent request after the other, the others go on after at most `aging` of them per level."""
    world = World(Priority(aging=8), pages=6, places=1)
    patient = world.submit(4, 2, priority=-1)
    while patient not in world.started:
        world.submit(4, 1, priority=2)
        for _ in range(gap):
            world.step()
        assert len(world.started) <= 3 * 8 + 1, "three levels of eight arrivals each"
    assert len(world.started) > 8
    world.run()


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    world = World(Fair(), pages=40, budget=64, places=2)
    flood = [world.submit(8, 4, tenant="flood") for _ in range(100)]
    for _ in range(20):
        world.step()
    guest = [world.submit(8, 4, tenant="guest") for _ in range(10)]
    world.run()
    # From its arrival on, the guest's requests end at least as often as the flood's.
    last = world.order.index(guest[-1])
    before = world.order.index(guest[0])
    assert sum(request in flood for request in world.order[before : last + 1]) <= len(guest) + 2


def test_fair_shares_count_tokens_not_requests() -> None:
    """A tenant of long requests gets as many tokens as one of short ones, not as many requests."""
    world = World(Fair(), pages=40, budget=64, places=1)
    for _ in range(40):
        world.submit(30, 1, tenant="long")
        world.submit(4, 1, tenant="short")
    for _ in range(60):
        world.step()
    served = {
        tenant: sum(request.charged for request in world.goals if request.tenant == tenant)
        for tenant in ("long", "short")
    }
    assert abs(served["long"] - served["short"]) <= 2 * 31


@pytest.mark.parametrize("name", POLICIES)
def test_who_is_added_first_goes_first(name: str) -> None:
    """Whenever it was made: each rank of a sharded model makes requests in an order of its own, and must plan alike."""
    world = World(POLICIES[name](), pages=12)
    requests = [Request([5, 6, 7], [0, 1, 2], 3, [2]) for _ in range(4)]
    requests = [requests[place] for place in (2, 0, 3, 1)]
    for request in requests:
        world.scheduler.add(request)
    assert [request for request, _ in world.scheduler.schedule().spans] == requests
    for request in requests:
        request.computed = 3
        request.append(0)
    assert [request for request, _ in world.scheduler.schedule().spans] == requests


def test_a_line_can_be_measured_while_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Engine.submit` asks how many wait while the engine's thread lets others in."""
    line, tenants = Fair(), iter("abcdefgh")

    def measured(self) -> int:
        line.push(Request([1], [0], 1, [1], tenant=next(tenants)))
        return 1

    for _ in range(3):
        line.push(Request([1], [0], 1, [1], tenant=next(tenants)))
    monkeypatch.setattr(FirstCome, "__len__", measured)
    assert len(line) == 3


def test_counters_of_tenants_are_forgotten() -> None:
    policy = Fair()
    world = World(policy, pages=10)
    for index in range(500):
        world.submit(2, 1, tenant=str(index))
        world.run()
    assert len(policy._counters) <= 2


def test_a_preempted_request_goes_on_before_later_ones() -> None:
    world = World(FirstCome(), pages=8, places=4)
    first, second = world.submit(12, 12), world.submit(12, 8)
    while not second.preemptions:
        world.step()
    later = world.submit(1, 1)
    while later not in world.started:
        world.step()
    assert second.tables or second.finished
    assert not first.preemptions


def test_saved_keys_are_not_computed_again() -> None:
    computed = {}
    for saves in (False, True):
        world = World(FirstCome(), pages=8, places=4, saves=lambda request, saves=saves: saves)
        requests = [world.submit(12, 12), world.submit(12, 8)]
        spans = 0
        while len(world.order) < len(requests):
            spans += sum(length for _, length in world.step().spans)
        computed[saves] = spans
        assert requests[1].preemptions
        assert requests[1].swaps == (requests[1].preemptions if saves else 0)
    assert computed[True] == 24 + 20
    assert computed[False] > computed[True]


def test_decodes_are_not_stalled_by_a_long_prompt() -> None:
    world = World(FirstCome(), pages=40, budget=8)
    decoding = [world.submit(2, 10) for _ in range(3)]
    world.step()
    world.submit(60, 1)
    for _ in range(5):
        spans = dict(world.step().spans)
        assert all(spans[request] == 1 for request in decoding)
        assert sum(spans.values()) == 8
