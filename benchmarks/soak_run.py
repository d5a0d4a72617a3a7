"""What `benchmarks/soak.py` does: many requests of one engine, and each text beside that of its lone run."""

import collections
import dataclasses
import pathlib
import queue
import random
import statistics
import time
from collections.abc import Callable, Sequence

from mla_jax import expert_reduction as reduction_lib
from mla_jax.config import ModelConfig
from mla_jax.sampler import SamplingParams
from mla_jax.serve.engine import Engine
from mla_jax.serve.request import Failure, Request

_NUM_TRUNKS = 4  # beginnings that half of the prompts share
_LONGEST_TAIL = 40
_REDUCTIONS = (1, 0.5), (2, 0.4)
_QUARTERS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How much is asked for.

    Attributes:
      requests: that are submitted.
      distinct: different ones among them.
      longest: tokens of a prompt, at most.
      usual_text: tokens that most requests draw, at most.
      longest_text: tokens that one request in four draws, at most: more than a page, so that they outgrow
        the room that they were let in with.
      outstanding: requests that wait or run at a time.
      cancelled: share of requests that are cancelled, at a moment that has nothing to do with them.
      growth: MiB of memory that the process may take from the first to the last quarter.
      seed: of all that is random.
    """

    requests: int = 2000
    distinct: int = 300
    longest: int = 1000
    usual_text: int = 60
    longest_text: int = 500
    outstanding: int = 32
    cancelled: float = 0.2
    growth: float = 8.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """What a request has drawn, and why it ended: "failed" where it did not end by itself."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str

    def begins(self, other: "Text") -> bool:
        """Whether it is a beginning of `other`; it may end amid a character, which is no text yet."""
        is_alike = other.tokens[: len(self.tokens)] == self.tokens
        return is_alike and other.text.startswith(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))


class Answer:
    """A request that was submitted; `ended` is given the answer once it has ended."""

    def __init__(self, engine: Engine, index: int, request: Request, ended: Callable[["Answer"], None]):
        self.index, self.is_cancelled = index, False
        self._tokens, self._texts, self._reason, self._ended = [], [], "", ended
        self._ticket = engine.submit(request, self._hear)

    @property
    def text(self) -> Text:
        """What was heard so far."""
        return Text(tuple(self._tokens), "".join(self._texts), self._reason)

    def cancel(self) -> None:
        """Has the engine give it up."""
        self.is_cancelled = True
        self._ticket.cancel()

    def _hear(self, piece):
        if isinstance(piece, Failure):
            self._reason = "failed"
        else:
            self._texts.append(piece.text)
            self._reason = piece.finish_reason
            if self._reason != "cancel":
                self._tokens.append(piece.token)
        if self._reason:
            self._ended(self)


def make_requests(config: ModelConfig, tokens: Sequence[int], work: Work) -> list[Request]:
    """Returns `work.distinct` requests of many kinds, of which half begin alike.

    Args:
      config: the model.
      tokens: ids that prompts are cut from.
      work: sizes.
    """
    chance = random.Random(work.seed)

    def cut(count):
        start = chance.randrange(len(tokens) - count)
        return tuple(tokens[start : start + count])

    trunks = [cut(work.longest) for _ in range(_NUM_TRUNKS)]

    def prompt():
        if chance.random() < 0.5:
            tail = cut(chance.randint(0, _LONGEST_TAIL))
            return chance.choice(trunks)[: chance.randint(1, work.longest - len(tail))] + tail
        is_long = chance.random() < 0.5
        length = chance.uniform(0, work.longest) if is_long else work.longest ** chance.random()
        return cut(max(1, round(length)))

    def request(seed):
        most = work.longest_text if chance.random() < 1 / 4 else work.usual_text
        setting = chance.choice(_REDUCTIONS) if chance.random() < 0.15 else None
        return Request(
            prompt=prompt(),
            max_tokens=chance.randint(1, most),
            sampling=SamplingParams(temperature=chance.choice((0.0, 0.0, 0.7, 1.0)), seed=seed),
            expert_reduction=reduction_lib.per_layer(config, setting),
            stop=("\n\n",) if chance.random() < 0.1 else (),
            num_logprobs=2 if chance.random() < 0.1 else None,
            ignore_eos=chance.random() < 0.5,
            reuse_prefix=chance.random() < 0.9,
            salt=chance.choice("ab"),
        )

    return [request(seed) for seed in range(work.distinct)]


def lone_texts(engine: Engine, requests: Sequence[Request], told: Callable[[int], None]) -> list[Text]:
    """Returns what each request draws when nothing is beside or before it; `told` hears how many are done."""
    texts = []
    for request in requests:
        engine.forget()
        answers = []
        Answer(engine, 0, request, answers.append)
        while not answers:
            engine.step()
        texts.append(answers[0].text)
        told(len(texts))
    return texts


def soak(
    engine: Engine,
    requests: Sequence[Request],
    expected: Sequence[Text],
    work: Work,
    told: Callable[[int], None],
) -> dict:
    """Has an engine, whose thread runs, draw `work.requests` texts, and compares each with its lone run.

    Args:
      engine: warmed up.
      requests: to be drawn from.
      expected: text of each of them.
      work: how many, and how they come.
      told: hears how many have ended.

    Returns:
      `seconds`; counts: `ended` by reason, `tokens_drawn`, `tokens_read`, `tokens_cached`, `steps`,
      `preemptions`, `pages`, `pages_lost`, `compiled_meanwhile`; `fewest_pages_free`, `most_running`; the
      median `rss_mib` of each quarter, since what is swapped out comes and goes; `texts_that_differ`, indices
      of their requests.
    """
    chance, began, before = random.Random(f"{work.seed} soak"), time.perf_counter(), engine.stats()
    done, live, ended, differ = queue.SimpleQueue(), [], collections.Counter(), []
    rss, free, running = [[] for _ in range(_QUARTERS)], before.pages_free, 0

    def take():
        answer = done.get()
        live.remove(answer)
        ended[answer.text.finish_reason] += 1
        if not _is_right(answer, expected[answer.index]):
            differ.append(answer.index)
        told(ended.total())
        quarter = (ended.total() - 1) * _QUARTERS // work.requests
        rss[quarter].append(rss_mib())

    for _ in range(work.requests):
        while len(live) == work.outstanding or not done.empty():
            take()
        index = chance.randrange(len(requests))
        live.append(Answer(engine, index, requests[index], done.put))
        if chance.random() < work.cancelled and (others := [it for it in live if not it.is_cancelled]):
            chance.choice(others).cancel()
        stats = engine.stats()
        free, running = min(free, stats.pages_free), max(running, stats.num_running)
    while live:
        take()
    engine.forget()
    return dict(
        seconds=round(time.perf_counter() - began, 1),
        ended=dict(sorted(ended.items())),
        most_running=running,
        fewest_pages_free=free,
        **_counts(before, engine.stats()),
        rss_mib=[round(statistics.median(values), 1) for values in rss],
        texts_that_differ=sorted(set(differ)),
    )


def _counts(before, after):
    gone = lambda name: getattr(after, name) - getattr(before, name)
    return dict(
        tokens_drawn=gone("drawn_tokens"),
        tokens_read=gone("prompt_tokens"),
        tokens_cached=gone("cached_tokens"),
        steps=gone("steps"),
        preemptions=gone("preemptions"),
        pages=after.pages_total,
        pages_lost=after.pages_total - after.pages_free,
        compiled_meanwhile=gone("compiles"),
    )


def faults(found: dict, work: Work) -> list[str]:
    """Returns what is wrong with the result of `soak`, a sentence each."""
    ended, rss = found["ended"], found["rss_mib"]
    checks = [
        (sum(ended.values()) == work.requests, f"{work.requests} requests must end, got {ended}."),
        ("failed" not in ended, f"no request must fail, got {ended.get('failed')}."),
        (
            not found["texts_that_differ"],
            f"requests {found['texts_that_differ']} differ from their lone runs.",
        ),
        (found["preemptions"] > 0, "requests must be swapped out, got none: the pool is too large."),
        (found["pages_lost"] == 0, f"all pages must come back, got {found['pages_lost']} lost."),
        (found["compiled_meanwhile"] == 0, f"nothing must be compiled, got {found['compiled_meanwhile']}."),
        (rss[-1] - rss[0] <= work.growth, f"memory must grow by at most {work.growth:g} MiB, got {rss}."),
    ]
    return [sentence for holds, sentence in checks if not holds]


def rss_mib() -> float:
    """Returns the MiB of memory that the process holds."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def _is_right(answer, lone):
    text = answer.text
    if text.finish_reason == "cancel":
        return answer.is_cancelled and text.begins(lone)
    return text == lone
