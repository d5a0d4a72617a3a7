"""The runs of `benchmarks/serve.py`: what is asked of servers, in which order, and what a client saw."""

import dataclasses
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks import serve_client, serve_process
from benchmarks.serve_process import Server

_PREFIX_PREDICT = 4  # tokens after a shared prefix; the first alone is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What every server is asked for.

    Attributes:
      tokens: ids that prompts are cut from.
      prompts: tokens of a prompt, a cell of the grid each.
      streams: requests at a time, a cell of the grid each.
      predict: tokens to draw, at least 2.
      requests: texts of a run, whatever the number of streams.
      rounds: that count, after one that warms up.
      prefix: tokens that two prompts share; 0 measures none.
      tail: tokens of these prompts after what they share.
    """

    tokens: Sequence[int]
    prompts: tuple[int, ...] = (64, 256)
    streams: tuple[int, ...] = (1, 4, 16)
    predict: int = 128
    requests: int = 16
    rounds: int = 5
    prefix: int = 2048
    tail: int = 32

    def __post_init__(self):
        longest = max(*self.prompts, self.prefix + 2 * self.tail)
        if len(self.tokens) < 2 * longest:
            raise ValueError(f"tokens must be at least {2 * longest}, got {len(self.tokens)}.")
        if self.requests < max(self.streams):
            raise ValueError(f"requests must be at least {max(self.streams)}, got {self.requests}.")

    def bodies(self, round_: int, prompt: int) -> list[dict]:
        """Returns the requests of a round: prompts that no other round has, and none from the cache."""
        chance = random.Random(f"{round_} {prompt}")
        return [_body(self._cut(chance, prompt), self.predict, False) for _ in range(self.requests)]

    def pair(self, round_: int) -> list[dict]:
        """Returns two requests of a round that begin alike; the second can use what the first computed."""
        chance = random.Random(f"{round_} prefix")
        tokens = self._cut(chance, self.prefix + 2 * self.tail)
        shared, tails = tokens[: self.prefix], tokens[self.prefix :]
        tails = tails[: self.tail], tails[self.tail :]
        return [_body(shared + tail, _PREFIX_PREDICT, True) for tail in tails]

    def _cut(self, chance, count):
        start = chance.randrange(len(self.tokens) - count)
        return list(self.tokens[start : start + count])


def _body(prompt, max_tokens, cache_prompt):
    drawing = dict(temperature=0, ignore_eos=True, cache_prompt=cache_prompt)
    stream = dict(stream=True, stream_options=dict(include_usage=True))
    return dict(prompt=prompt, max_tokens=max_tokens, **drawing, **stream)


def measure(servers: Sequence[Server], work: Work) -> Iterator[dict]:
    """Yields the runs of all rounds, as they are done.

    Cells come in another order each round, and so do servers in each cell; only one run goes on at a time.

    Returns:
      Of a run of a cell: `engine`, `round`, `prompt`, `streams`; `tokens_per_second` of all streams, and
      `decode_tokens_per_second`, by what a stream takes after its first token; in seconds `first` (to the
      first text) and `per_token` (mean after the first) of each request and `gaps` between events of a
      request; `events_per_token`, `client_cpu_share`, `server_cores` that were busy, and `texts`. Of a run
      of the prefix: `engine`, `round`, `cold` and `warm` (seconds to the first text), `num_cached`.

    Raises:
      RuntimeError: if a server does not draw what it is asked for.
    """
    cells = list(itertools.product(work.prompts, work.streams))
    for round_ in range(-1, work.rounds):
        chance = random.Random(round_)
        jobs = [*cells, *([None] if work.prefix else [])]
        for cell in chance.sample(jobs, len(jobs)):
            for server in chance.sample(list(servers), len(servers)):
                found = (
                    _run_prefix(server, work, round_) if cell is None else _run(server, work, round_, *cell)
                )
                if round_ >= 0:
                    yield dict(engine=server.name, round=round_) | found


def client_alone(work: Work) -> float:
    """Returns the tokens per second that the client takes from a server that computes nothing.

    The most streams of the grid are open. The stub is written in Python too, so the client could take more.
    """
    child, port = serve_process.stub()
    try:
        bodies = work.bodies(0, min(work.prompts))
        answer = _ask_client("127.0.0.1", port, bodies, max(work.streams))
    finally:
        child.terminate()
        child.communicate()
    return work.requests * work.predict / answer["seconds"]


def _ask_client(host, port, bodies, num_streams):
    request = json.dumps(dict(host=host, port=port, bodies=bodies, num_streams=num_streams))
    command = [sys.executable, serve_client.__file__]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the client fails: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _ask(server, bodies, num_streams):
    try:
        return _ask_client(server.host, server.port, bodies, num_streams)
    except RuntimeError:
        server.check()
        raise


def _run(server, work, round_, prompt, streams):
    cpu_began = server.cpu_seconds()
    answer = _ask(server, work.bodies(round_, prompt), streams)
    cpu_ended = server.cpu_seconds()
    texts, seconds = answer["texts"], answer["seconds"]
    for text in texts:
        _check(server, text, work.predict)
    gaps = [after - before for text in texts for before, after in itertools.pairwise(text["times"])]
    num_tokens = work.requests * work.predict
    per_token = [(text["times"][-1] - text["times"][0]) / (work.predict - 1) for text in texts]
    return dict(
        prompt=prompt,
        streams=streams,
        tokens_per_second=num_tokens / seconds,
        decode_tokens_per_second=streams / statistics.median(per_token),
        first=[text["times"][0] - text["began"] for text in texts],
        per_token=per_token,
        gaps=gaps,
        events_per_token=sum(len(text["times"]) for text in texts) / num_tokens,
        client_cpu_share=answer["cpu_seconds"] / seconds,
        server_cores=None if cpu_began is None else (cpu_ended - cpu_began) / seconds,
        texts=[text["text"] for text in texts],
    )


def _run_prefix(server, work, round_):
    cold, warm = [_ask(server, [body], 1)["texts"][0] for body in work.pair(round_)]
    for text in (cold, warm):
        _check(server, text, _PREFIX_PREDICT)
    first = lambda text: text["times"][0] - text["began"]
    return dict(cold=first(cold), warm=first(warm), num_cached=warm["num_cached"])


def _check(server, text, num_tokens):
    # ik_llama.cpp's server says "stop" of every text, so that the number of tokens must do.
    if text["num_tokens"] != num_tokens or not text["times"]:
        drawn = text["num_tokens"], text["finish_reason"]
        raise RuntimeError(f"{server.name} must draw {num_tokens} tokens of text, got {drawn}.")
