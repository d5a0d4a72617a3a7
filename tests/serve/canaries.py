"""An engine over canaries, and requests whose texts are known beforehand."""

import functools

import numpy as np
from canary import CanaryDevice, check_pages, kill_the_rest, lone_text
from synthetic import vocabulary

from mla_jax import tokenizer as tokenizer_lib
from mla_jax.sampler import SamplingParams
from mla_jax.serve.engine import Engine
from mla_jax.serve.request import Failure, Request

EOS = 1
REDUCTIONS = ((1, 0.0),), ((2, 0.5),)


@functools.cache
def tokenizer():
    metadata = {"general.architecture": "deepseek2"} | vocabulary(320)
    return tokenizer_lib.Tokenizer(tokenizer_lib.Vocabulary.from_metadata(metadata))


def make_request(prompt, max_tokens=8, *, seed=0, **about):
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, sampling=SamplingParams(seed=seed), **about)


def make_engine(*, num_pages=40, num_slots=4, num_groups=1, widths=(8,), **settings):
    """Returns an engine whose device is a `CanaryDevice` of pages of 4 tokens, as many for each group."""
    sizes = dict(num_pages=num_groups * num_pages, max_rows=4, num_groups=num_groups, widths=widths)
    device = CanaryDevice(eog_ids=tokenizer().eog_ids, **sizes)
    settings = dict(expert_reduction=REDUCTIONS[0], num_slots=num_slots) | settings
    return Engine(device, tokenizer(), ctx_size=4 * num_pages, **settings)


def tokens_alone(request, ctx_size=160):
    """Returns the tokens that a request must draw."""
    room = ctx_size - len(request.prompt) + 1
    return lone_text(
        request.prompt,
        min(request.max_tokens or room, room),
        seed=request.sampling.seed,
        reduction=request.expert_reduction or REDUCTIONS[0],
        vocab_size=320,
        bias=request.logit_bias,
        ends=frozenset() if request.ignore_eos else tokenizer().eog_ids,
    )


class Answer:
    """What is heard of a request: pieces, and the last, which may be a failure."""

    def __init__(self, engine, request):
        self.request, self.heard = request, []
        self.ticket = engine.submit(request, self.heard.append)

    @property
    def text(self):
        return "".join(piece.text for piece in self.heard)

    @property
    def tokens(self):
        return [piece.token for piece in self.heard]

    @property
    def failed(self):
        return bool(self.heard) and isinstance(self.heard[-1], Failure)

    def check(self, ctx_size=160):
        """Checks that it is the text of a request that is alone in the world."""
        expected = tokens_alone(self.request, ctx_size)
        assert self.tokens == expected
        reasons = [piece.finish_reason for piece in self.heard]
        is_stopped = expected[-1] == EOS and not self.request.ignore_eos
        assert reasons == [None] * (len(expected) - 1) + ["stop" if is_stopped else "length"]
        assert self.text == tokenizer().decode(expected)


def run(engine, *, limit=10_000):
    """Takes steps until nothing is left to do; canaries watch every one."""
    for _ in range(limit):
        kill_the_rest(engine._device, engine._loop.scheduler.schedulers)
        is_over = not engine.step()
        check_all_pages(engine)
        if is_over:
            assert engine._loop.scheduler.is_idle
            return
    raise AssertionError(f"{limit} steps, and no end")


def check_all_pages(engine):
    """Checks the pages of every group."""
    for scheduler in engine._loop.scheduler.schedulers:
        check_pages(scheduler)


def assert_nothing_is_left(engine):
    """Checks that all pages come back once nothing is kept."""
    engine.forget()
    stats = engine.stats()
    assert stats.pages_free == stats.pages_total and stats.num_running == stats.num_waiting == 0
    assert stats.waiting_tokens == 0 and stats.seconds_since_step is None


def mixed_requests(count, *, seed=0, longest=40):
    """Returns requests of many lengths and kinds, of which some begin alike."""
    rng = np.random.default_rng(seed)
    trunks = rng.integers(3, 320, (3, longest))
    requests = []
    for i in range(count):
        prompt = trunks[i % 3][: rng.integers(1, longest)].tolist()
        if rng.random() < 0.3:
            prompt += rng.integers(3, 320, 3).tolist()
        about = dict(
            expert_reduction=REDUCTIONS[int(rng.integers(2))],
            num_logprobs=2 if rng.random() < 0.2 else None,
            ignore_eos=bool(rng.random() < 0.5),
            reuse_prefix=bool(rng.random() < 0.8),
            salt=str(rng.integers(2)),
        )
        requests.append(make_request(prompt, int(rng.integers(1, 30)), seed=i, **about))
    return requests
