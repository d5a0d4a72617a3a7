"""The scheduler over a device of canaries: nothing is lost, crossed, leaked or written by two."""

import hypothesis
import numpy as np
import pytest
from canary import CanaryDevice, check_pages, kill_the_rest, lone_text, rows_of
from hypothesis import stateful
from hypothesis import strategies as st

from mla_jax import steps
from mla_jax.cache import PoolExhausted
from mla_jax.sampler import SamplingParams
from mla_jax.serve import scheduler as scheduler_lib
from mla_jax.serve.device import Part, Row
from mla_jax.serve.prefix import page_keys
from mla_jax.serve.request import Request
from mla_jax.serve.scheduler import Job, Scheduler

PAGE_SIZE = 4
PROMPTS = st.tuples(st.integers(1, 18), st.integers(0, 40))  # length, and the place of another token
ABOUT = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2),
        root=st.sampled_from("aab"),
        reuse_prefix=st.sampled_from([True, True, True, False]),
        num_logprobs=st.sampled_from([None, None, 0]),
    )
)


class Broken(Exception):
    """What a planned fault raises."""


def make_job(prompt, max_tokens, *, seed=0, root="a", **about):
    request = Request(prompt=tuple(prompt), sampling=SamplingParams(seed=seed), **about)
    return Job(request=request, root=root, tokens=list(prompt), limit=len(prompt) + max_tokens)


class Bench:
    """A scheduler, canaries, and the few lines that lie between them."""

    def __init__(self, *, num_slots=3, num_pages=9, width=8, **settings):
        sizes = dict(num_pages=num_pages, page_size=PAGE_SIZE, widths=steps.buckets(width))
        self.scheduler = Scheduler(num_slots=num_slots, **sizes, **settings)
        self.device = CanaryDevice(max_rows=num_slots, **sizes)
        self.ended, self.known = [], {}

    def step(self, num_steps=1, fails=None):
        """Takes a step; `fails` is (phase, which call of it in this step). Returns the plan."""
        kill_the_rest(self.device, [self.scheduler])
        calls = dict(self.device.calls)
        plan = self.scheduler.plan(lambda: num_steps)
        if plan is None:
            assert not self.scheduler.running and not self.scheduler.waiting
            return None
        at_work = []

        def enter(phase, jobs):
            at_work[:] = jobs
            if fails == (phase, self.device.calls[phase] - calls.get(phase, 0)):
                raise Broken

        try:
            self._carry_out(plan, enter)
        except Broken:
            for job in at_work:
                self.discard(job)
            self.scheduler.settle()
        return plan

    def discard(self, job):
        """Has the scheduler discard a job, whose rows nobody may find from then on."""
        table = self.scheduler.table
        pages = set() if job.pages is None else set(table.pages(job.pages))
        self.scheduler.discard(job)
        kept = [slot.kept.pages for slot in self.scheduler.slots if slot.kept]
        for found in [self.scheduler.prefix._pages.values(), *map(table.pages, kept)]:
            assert not pages.intersection(found)

    def check(self):
        check_pages(self.scheduler)
        pool, table = self.device.pool.reshape(-1, 3), self.scheduler.table
        owned = [(job.pages, job.tokens[: job.num_rows], job.root) for job in self.scheduler.running]
        kept = [slot.kept for slot in self.scheduler.slots if slot.kept]
        for job in self.scheduler.running:
            assert table.length(job.pages) == max(job.num_rows, job.num_prompt - 1)
        assert all(len(it.tokens) == table.length(it.pages) for it in kept)
        for name, tokens, root in [*owned, *((it.pages, it.tokens, it.root) for it in kept)]:
            slots = np.arange(len(tokens))
            places = np.asarray(table.pages(name), int)[slots // PAGE_SIZE] * PAGE_SIZE + slots % PAGE_SIZE
            assert np.array_equal(pool[places], rows_of(tokens, root))
        for key, page in self.scheduler.prefix._pages.items():
            assert np.array_equal(self.device.pool[page], self.known[key])
        for slot in self.scheduler.slots:
            assert slot.job is None or (slot.job.slot == slot.id and slot.kept is None)

    def learn(self, tokens, root):
        """Notes what the full pages of a text hold."""
        keys = page_keys(tokens, PAGE_SIZE, root)
        pages = rows_of(tokens, root)[: len(keys) * PAGE_SIZE].reshape(len(keys), PAGE_SIZE, 3)
        self.known.update(zip(keys, pages, strict=True))

    def end_all(self):
        for _ in range(1000):
            if self.step(num_steps=3) is None:
                break
            self.check()
        assert not self.scheduler.running and not self.scheduler.waiting
        self.check()
        self.scheduler.forget()
        assert self.scheduler.table.num_free == self.scheduler.table.num_pages

    def _carry_out(self, plan, enter):
        table = self.scheduler.table
        for job, pages in plan.leaving:
            job.swapped = self.device.take(pages)
        assert all(table.num_owners(target) == 1 for _, target in plan.copies)
        self.device.copy(plan.copies)
        for job, pages in plan.coming:
            self.device.put(pages[: table.pages_for(job.num_rows)], job.swapped)
            job.swapped = None
        for piece in plan.prefill:
            enter("prefill", [piece.job])
            self._owns(piece.job, piece.start, len(piece.tokens))
            pages = table.pages(piece.job.pages)
            part = Part(tokens=piece.tokens, start=piece.start, pages=pages, reduction=piece.job.root)
            self.device.prefill([part], piece.width)
            self.learn(piece.job.tokens[: piece.job.num_prompt - 1], piece.job.root)
            self.scheduler.wrote(piece)
        for group, num_steps in ((False, plan.num_steps), (True, 1)):
            jobs = [job for job in plan.decode if (job.request.num_logprobs is not None) == group]
            if jobs:
                enter("decode", jobs)
                self._decode(jobs, num_steps)

    def _decode(self, jobs, num_steps):
        rows = []
        for job in jobs:
            self._owns(job, job.num_rows, min(num_steps, job.limit - len(job.tokens)))
            row = dict(tokens=job.tokens, pages=self.scheduler.table.pages(job.pages), reduction=job.root)
            rows.append(Row(sampling=job.request.sampling, **row))
        for job, drawn in zip(jobs, self.device.decode(rows, num_steps), strict=True):
            job.tokens += drawn[: job.limit - len(job.tokens)]
            self.scheduler.drew(job)
            self.learn(job.tokens[: job.num_rows], job.root)
            if len(job.tokens) == job.limit:
                self.scheduler.finish(job)
                self.ended.append(job)
                seed = job.request.sampling.seed
                about = dict(seed=seed, reduction=job.root, vocab_size=self.device.vocab_size)
                lone = lone_text(job.request.prompt, job.limit - job.num_prompt, **about)
                assert job.tokens == [*job.request.prompt, *lone]

    def _owns(self, job, start, count):
        pages = self.scheduler.table.pages(job.pages)
        for slot in range(start, start + count):
            assert self.scheduler.table.num_owners(pages[slot // PAGE_SIZE]) == 1


class Requests(stateful.RuleBasedStateMachine):
    """Requests that begin alike come, run, are given up and fail, in a pool that is too small for them."""

    @stateful.initialize(
        num_pages=st.sampled_from([5, 6, 9, 14]),
        width=st.sampled_from([3, 8]),
        keep_drawn=st.booleans(),
        prefix_limit=st.sampled_from([None, None, 0, 3]),
    )
    def make(self, num_pages, **settings):
        self.bench, self.jobs = Bench(num_pages=num_pages, **settings), []
        self.saved = []
        self.capacity = num_pages * PAGE_SIZE

    @stateful.rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=3), max_tokens=st.integers(1, 14), about=ABOUT
    )
    def submit(self, prompts, max_tokens, about):
        for length, changed in prompts:
            prompt = [7 + i % 3 for i in range(length)]
            if changed < length:
                prompt[changed] = 4
            job = make_job(prompt, min(max_tokens, self.capacity + 1 - length), **about)
            self.bench.scheduler.submit(job)
            self.jobs.append(job)

    @stateful.precondition(lambda self: any(job.slot is not None for job in self.jobs))
    @stateful.rule(data=st.data(), seed=st.integers(0, 2), more=st.lists(st.integers(3, 5), max_size=3))
    def go_on_with_a_chat(self, data, seed, more):
        """Submits the tokens of a running request, and some more, as the next turn of a chat does."""
        running = [job for job in self.jobs if job.slot is not None]
        tokens = [*data.draw(st.sampled_from(running)).tokens, *more][: self.capacity]
        job = make_job(tokens, 1, seed=seed)
        self.bench.scheduler.submit(job)
        self.jobs.append(job)

    @stateful.rule(num_steps=st.integers(1, 4))
    def step(self, num_steps):
        self.bench.step(num_steps)

    @stateful.rule(num_steps=st.integers(1, 4))
    def go_on(self, num_steps):
        for _ in range(5):
            self.bench.step(num_steps)
            self.bench.check()

    @stateful.rule(phase=st.sampled_from(["prefill", "decode"]), call=st.integers(0, 1))
    def fail(self, phase, call):
        self.bench.step(2, fails=(phase, call))

    @stateful.precondition(lambda self: self.bench.scheduler.running or self.bench.scheduler.waiting)
    @stateful.rule(data=st.data(), how=st.sampled_from(["finish", "finish", "discard"]))
    def give_up(self, data, how):
        scheduler = self.bench.scheduler
        job = data.draw(st.sampled_from([*scheduler.running, *scheduler.waiting]))
        self.bench.discard(job) if how == "discard" else scheduler.finish(job)

    @stateful.precondition(lambda self: any(slot.kept for slot in self.bench.scheduler.slots))
    @stateful.rule(data=st.data())
    def save(self, data):
        slot = data.draw(st.sampled_from([slot for slot in self.bench.scheduler.slots if slot.kept]))
        pages = self.bench.scheduler.table.pages(slot.kept.pages)
        self.saved.append((slot.kept.tokens, slot.kept.root, self.bench.device.take(pages)))

    @stateful.precondition(lambda self: self.saved and self._idle())
    @stateful.rule(data=st.data())
    def restore(self, data):
        tokens, root, rows = data.draw(st.sampled_from(self.saved))
        try:
            pages = self.bench.scheduler.keep(data.draw(st.sampled_from(self._idle())), tokens, root)
        except PoolExhausted:
            return
        assert all(self.bench.scheduler.table.num_owners(page) == 1 for page in pages)
        self.bench.device.put(pages, rows)

    @stateful.precondition(lambda self: self._idle())
    @stateful.rule(data=st.data())
    def erase(self, data):
        slot = data.draw(st.sampled_from(self._idle()))
        num_kept = len(slot.kept.tokens) if slot.kept else 0
        assert self.bench.scheduler.erase(slot) == num_kept and slot.kept is None

    @stateful.rule()
    def forget(self):
        self.bench.scheduler.forget()
        assert not any(slot.kept for slot in self.bench.scheduler.slots)
        assert len(self.bench.scheduler.prefix) == 0

    @stateful.invariant()
    def all_is_well(self):
        if hasattr(self, "bench"):
            self.bench.check()

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.end_all()

    def _idle(self):
        return [slot for slot in self.bench.scheduler.slots if slot.job is None]


def test_whatever_comes(monkeypatch):
    monkeypatch.setattr(scheduler_lib, "_BESIDE_DECODE", 8)
    settings = hypothesis.settings(max_examples=150, stateful_step_count=50, deadline=None)
    stateful.run_state_machine_as_test(Requests, settings=settings)


def _run(bench, jobs):
    for job in jobs:
        bench.scheduler.submit(job)
    bench.end_all()
    return bench.ended


@pytest.mark.parametrize("length", [1, 4, 5], ids=["one token", "a page", "a page and a token"])
def test_a_prompt_whose_rows_are_all_there_runs_at_once(length):
    bench = Bench()
    for count in (1, 2):
        bench.scheduler.submit(make_job(range(5, 5 + length), 1))
        while bench.step() is not None:
            pass
        assert len(bench.ended) == count
    assert bench.ended[1].num_cached == length - 1


def test_requests_come_in_order_and_those_that_came_last_leave_first():
    bench = Bench(num_pages=6)
    jobs = [make_job([i, i, i], 15, seed=i) for i in range(4)]
    for job in jobs:
        bench.scheduler.submit(job)
    came, left = [], []
    while (plan := bench.step()) is not None:
        came += [job for job in bench.scheduler.running if job not in came]
        left += [job for job, _ in plan.leaving]
        running = [jobs.index(job) for job in bench.scheduler.running]
        waiting = [jobs.index(job) for job in bench.scheduler.waiting]
        assert running + waiting == sorted(running + waiting)
    assert came == jobs and left and jobs[0] not in left
    assert bench.scheduler.num_preemptions == len(left)
    bench.end_all()


def test_a_request_that_needs_the_whole_pool_runs_alone_and_is_not_passed_by():
    bench = Bench(num_pages=6)
    whole = make_job(range(3, 23), 5)
    ended = _run(bench, [make_job([9], 8), whole, make_job([8], 1), make_job([7], 1)])
    assert [job.num_prompt for job in ended] == [1, 20, 1, 1]


def test_prompts_leave_room_for_those_who_draw():
    bench = Bench(num_pages=400, width=512)
    bench.scheduler.submit(make_job([5], 60))
    bench.step()
    bench.scheduler.submit(make_job(range(1000), 1))
    widths = []
    while (plan := bench.step(num_steps=9)) is not None and len(bench.scheduler.running) == 2:
        assert plan.num_steps == 1 or not plan.prefill
        widths.append(sum(piece.width for piece in plan.prefill))
    assert widths == [128] * 8


def test_tokens_are_drawn_in_a_row_only_while_nobody_waits():
    bench = Bench(num_slots=1)
    for seed in (0, 1):
        bench.scheduler.submit(make_job([5, 6], 6, seed=seed))
    counts = []
    while (plan := bench.step(num_steps=4)) is not None:
        counts.append(plan.num_steps if plan.decode else 0)
    assert counts == [0, 1, 1, 1, 1, 1, 1, 4, 2]  # the row of the second prompt is kept from the first


@pytest.mark.parametrize(
    ("prompt", "slot", "num_cached"),
    [([1, 2, 3, 4, 5, 9], 0, 5), ([1, 2, 8, 8], 1, 3), ([7, 7], 2, 0)],
    ids=["the longest beginning", "the other", "none"],
)
def test_a_request_goes_where_its_beginning_is_kept(prompt, slot, num_cached):
    bench = Bench(prefix_limit=0)
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 8, 9]):
        bench.scheduler.submit(make_job(tokens, 1))
    while bench.step() is not None:
        pass
    job = make_job(prompt, 9)
    bench.scheduler.submit(job)
    bench.step()
    assert job.slot == slot
    bench.end_all()
    assert job.num_cached == num_cached


def test_rows_of_the_least_used_slot_make_room_first():
    bench = Bench(num_pages=6, prefix_limit=0)
    for tokens in ([1] * 6, [2] * 6):
        _run_one(bench, tokens)
    kept = [slot.kept.tokens[0] for slot in bench.scheduler.slots if slot.kept]
    assert kept == [1, 2]
    _run_one(bench, [3] * 16)
    assert [slot.kept.tokens[0] for slot in bench.scheduler.slots if slot.kept] == [2, 3]


def _run_one(bench, tokens):
    bench.scheduler.submit(make_job(tokens, 1))
    while bench.step() is not None:
        bench.check()


def test_pages_of_a_text_that_is_computed_now_are_taken_by_those_who_wait_for_it():
    bench = Bench(num_slots=2, num_pages=20, width=8)
    jobs = [make_job(range(17), 1), make_job(range(17), 1, seed=1)]
    _run(bench, jobs)
    assert [job.num_cached for job in jobs] == [0, 16] and bench.device.calls["prefill"] == 2


@pytest.mark.parametrize(
    "about", [dict(root="b"), dict(reuse_prefix=False)], ids=["another root", "unwilling"]
)
def test_rows_are_not_shared_with(about):
    bench = Bench(num_pages=20)
    job = make_job(range(9), 1, **about)
    _run_one(bench, range(9))
    bench.scheduler.submit(job)
    bench.end_all()
    assert job.num_cached == 0


def test_rows_of_a_request_that_failed_are_found_nowhere():
    bench = Bench(num_pages=20)
    jobs = [make_job(range(9), 1), make_job(range(9), 9, seed=1)]
    for job in jobs:
        bench.scheduler.submit(job)
    while jobs[0] not in bench.ended:
        bench.step()
    assert [slot.kept is not None for slot in bench.scheduler.slots] == [True, False, False]
    bench.discard(jobs[1])
    assert bench.scheduler.table.num_free == 20


def test_a_request_waits_for_pages_that_only_seemed_to_be_shared():
    """Its beginning is kept twice: on the pages of one who runs, and on others of an idle slot."""
    scheduler = Scheduler(num_slots=2, num_pages=24, page_size=4, widths=(32,))
    beginning = list(range(22))
    first = make_job(beginning, 8)
    scheduler.submit(first)
    for piece in scheduler.plan(lambda: 1).prefill:
        scheduler.wrote(piece)
    scheduler.keep(scheduler.slots[1], [*beginning[:-1], 7, 8], first.root)
    second = make_job([*beginning, 7, 8, *range(50, 106)], 4)
    scheduler.submit(second)
    plan = scheduler.plan(lambda: 1)
    assert plan.decode == [first] and second.pages is None and list(scheduler.waiting) == [second]
    scheduler.finish(first)
    assert scheduler.plan(lambda: 1).prefill[0].job is second


def test_what_cannot_be_restored_costs_nobody_their_rows():
    scheduler = Scheduler(num_slots=3, num_pages=12, page_size=4, widths=(32,))
    scheduler.keep(scheduler.slots[2], range(8), "r")
    scheduler.submit(make_job(range(100, 116), 8))
    scheduler.plan(lambda: 1)
    with pytest.raises(PoolExhausted):
        scheduler.keep(scheduler.slots[1], range(40), "r")
    assert scheduler.slots[2].kept.tokens == list(range(8))
