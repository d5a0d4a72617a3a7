"""Measures a server over HTTP: tokens per second, time to the first token, time between tokens.

    python benchmarks/serve.py --out benchmarks/results/serve-packaged.json      # the packaged model
    taskset -c 0 python benchmarks/serve.py --model a.gguf --peer_bin llama-server

Starts `mla-jax serve -np 16` and asks it by `/v1/completions`, streaming and greedy, for 128 tokens after
prompts of token ids, from the sources of Python's argparse. Each round draws the same 16 texts one, four and
16 at a time, in an order that changes, and none from the cache; the client is a process of its own, whose
share of a core is told, and so is what it takes from a server that computes nothing.

tokens/s  drawn tokens of a run / its seconds, reading the prompts included
decode    streams / the seconds a token of a text that has begun, the median over its requests; a stream
          waits meanwhile for prompts of others
TTFT      from before the connection to the first event that has text
ITL       between two events with text, of one request; a server may send several tokens at a time, and may
          wait with a token whose characters are not complete
prefix    the time to the first token of a prompt whose first 2,048 tokens were asked for before, and of that
          one before

With `--peer_bin` another server of the same interface, a `llama-server` of llama.cpp or ik_llama.cpp, is
started beside it on the same file; with `--peer_url` one that runs already. Servers take turns and only one
works at a time. Cores are those of this process.

Prints tables of medians over rounds, and as its last line one JSON object. With `--out` it is written, its
plot (by matplotlib, extra `notebooks`) beside it.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
import shutil
import sys
import time
import urllib.parse

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine, serve_measure, serve_process, serve_report  # noqa: E402
from benchmarks.serve_report import OURS, PEER  # noqa: E402
from checkpoints_tools import open_gguf  # noqa: E402
from mla_jax.tokenizer import Tokenizer, Vocabulary  # noqa: E402

_PACKAGED = ROOT / "mla_jax" / "models" / "python-stdlib-15m-q8_0.gguf"
_MODEL = flags.DEFINE_string("model", str(_PACKAGED), "GGUF file; the packaged model by default.")
_PROMPTS = flags.DEFINE_list("prompts", ["64", "256"], "tokens of prompts.")
_STREAMS = flags.DEFINE_list("streams", ["1", "4", "16"], "requests at a time.")
_PREDICT = flags.DEFINE_integer("predict", 128, "tokens to draw.", lower_bound=2)
_REQUESTS = flags.DEFINE_integer("requests", 16, "texts of a run.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds, after one that warms up.", lower_bound=1)
_PREFIX = flags.DEFINE_integer("prefix", 2048, "tokens that two prompts share; 0 for none.", lower_bound=0)
_CTX_SIZE = flags.DEFINE_integer("ctx_size", 8192, "tokens that all requests share.", lower_bound=1)
_FLAGS = flags.DEFINE_string("serve_flags", "", "further flags of `mla-jax serve`, in one string.")
_PEER_BIN = flags.DEFINE_string("peer_bin", None, "llama-server to start beside it.")
_PEER_FLAGS = flags.DEFINE_string("peer_flags", "", "its further flags, in one string.")
_PEER_URL = flags.DEFINE_string("peer_url", None, "http://HOST:PORT of one that runs already.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write as well; its plot gets the suffix .png.")

_PACKAGES = ("jax", "jaxlib", "uvicorn", "starlette")
_BEGAN = time.monotonic()


def _about():
    facts = machine.about("benchmarks/serve.py", sys.argv[1:], _PACKAGES)
    return dict(model=pathlib.Path(_MODEL.value).name, **facts)


def _number(flag, text):
    if not text.isdecimal() or text == "0":
        raise app.UsageError(f"--{flag} must be positive whole numbers, got {text!r}.")
    return int(text)


def _work():
    tokenizer = Tokenizer(Vocabulary.from_metadata(open_gguf(_MODEL.value).metadata))
    try:
        return serve_measure.Work(
            tokens=tokenizer.encode(pathlib.Path(argparse.__file__).read_text(), add_special=False),
            prompts=tuple(_number("prompts", text) for text in _PROMPTS.value),
            streams=tuple(_number("streams", text) for text in _STREAMS.value),
            predict=_PREDICT.value,
            requests=_REQUESTS.value,
            rounds=_ROUNDS.value,
            prefix=_PREFIX.value,
        )
    except ValueError as error:
        raise app.UsageError(f"--prompts, --streams, --requests and --prefix do not fit: {error}") from None


def _servers(stack, work):
    """Starts the servers; `stack` ends them."""
    sizes = dict(slots=max(work.streams), ctx_size=_CTX_SIZE.value)
    ours = serve_process.ours(OURS, _MODEL.value, **sizes, more=shlex.split(_FLAGS.value))
    servers = [stack.enter_context(ours)]
    if _PEER_BIN.value:
        more = shlex.split(_PEER_FLAGS.value)
        peer = serve_process.peer(PEER, _PEER_BIN.value, _MODEL.value, **sizes, more=more)
        servers.append(stack.enter_context(peer))
    elif _PEER_URL.value:
        url = urllib.parse.urlsplit(_PEER_URL.value)
        peer = serve_process.Server(PEER, url.hostname, url.port or 80)
        servers.append(stack.enter_context(peer))
    else:
        print("there is no --peer_bin or --peer_url: this project is measured without a peer.")
    return servers


def _check_flags():
    if not pathlib.Path(_MODEL.value).is_file():
        raise app.UsageError(f"--model must be a file, got {_MODEL.value}.")
    if _PEER_BIN.value and _PEER_URL.value:
        raise app.UsageError("--peer_bin must not come with --peer_url, which is another peer.")
    if _PEER_BIN.value and shutil.which(_PEER_BIN.value) is None:
        raise app.UsageError(f"--peer_bin must be a program, got {_PEER_BIN.value}.")
    if _PEER_URL.value and not urllib.parse.urlsplit(_PEER_URL.value).hostname:
        raise app.UsageError(f"--peer_url must be http://HOST:PORT, got {_PEER_URL.value}.")


def _measure(servers, work):
    runs = []
    for run in serve_measure.measure(servers, work):
        runs.append(run)
        done, place = (
            f"round {run['round'] + 1} of {work.rounds}, {time.monotonic() - _BEGAN:.0f} s",
            run["engine"],
        )
        if "cold" in run:
            found = f"prefix {1e3 * run['cold']:.1f} ms, then {1e3 * run['warm']:.1f} ms"
        else:
            found = f"{run['prompt']} x {run['streams']}: {run['tokens_per_second']:.1f} tokens/s"
        print(f"{done}: {place} {found}", file=sys.stderr)
    return runs


def main(argv):
    """Starts the servers, measures them and prints what was found."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    _check_flags()
    work, result = _work(), _about()
    settings = dict(rounds=work.rounds, requests=work.requests, predict=work.predict)
    result |= settings | dict(prefix_tokens=work.prefix, ctx_size=_CTX_SIZE.value)
    result["client_alone_tokens_per_second"] = round(serve_measure.client_alone(work))
    with contextlib.ExitStack() as stack:
        servers = _servers(stack, work)
        result["start_seconds"] = {server.name: server.start_seconds for server in servers}
        compiled = servers[0].num_compiled()
        result |= serve_report.summarise(_measure(servers, work))
        result["compiled_meanwhile"] = servers[0].num_compiled() - compiled
    serve_report.print_tables(result)
    line = json.dumps(result)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
        serve_report.save_plot(result, pathlib.Path(_OUT.value).with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    app.run(main)
