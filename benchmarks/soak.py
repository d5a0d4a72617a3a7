"""Draws 2,000 texts, more at a time than the pool has room for, and compares each with that of its lone run.

    python benchmarks/soak.py --out benchmarks/results/soak-packaged.json        # some five minutes

The packaged model through its engine: prompts of 1 to 1,000 tokens, half of which begin alike, greedy ones
and others, some with experts left out, with logprobs, with a stop text, or not from the cache; a fifth is
cancelled at a moment that has nothing to do with it. 300 different requests come again and again in random
order. A second engine, with nothing beside or before them, tells what they must draw; what was cancelled must
be a beginning of that. No page is lost, nothing is compiled after the warm-up, and memory stays what it is.

Prints a report, and as its last line one JSON object; the exit status is 1 if anything is wrong. With `--out`
the object is written as well.
"""

import argparse
import json
import pathlib
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cpu_kernels  # noqa: E402
import mla_jax  # noqa: E402
from benchmarks import machine, soak_run  # noqa: E402

_REQUESTS = flags.DEFINE_integer("requests", 2000, "requests to submit.", lower_bound=4)
_DISTINCT = flags.DEFINE_integer("distinct", 300, "different ones among them.", lower_bound=1)
_PARALLEL = flags.DEFINE_integer("parallel", 8, "requests that run at a time.", lower_bound=1)
_CTX_SIZE = flags.DEFINE_integer("ctx_size", 1536, "tokens that all requests share.", lower_bound=1400)
_SEED = flags.DEFINE_integer("seed", 0, "of all that is random.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write as well.")


def _about():
    facts = machine.about("benchmarks/soak.py", sys.argv[1:], ("jax", "jaxlib"))
    return dict(model=mla_jax.generate.PACKAGED_MODEL.name, cpu_kernels=cpu_kernels.available(), **facts)


def _progress(what, count):
    """Returns a function that tells each twentieth of `count`."""

    def told(done):
        if done * 20 // count != (done - 1) * 20 // count:
            print(f"{what}: {done} of {count}, {soak_run.rss_mib():.0f} MiB", file=sys.stderr)

    return told


def _print_report(result):
    tokens = [f"{result[f'tokens_{name}']} {name}" for name in ("drawn", "read", "cached")]
    running = f"{result['most_running']} at a time at most"
    print(f"{result['requests']} requests in {result['seconds']:g} s, {running}")
    print(f"ended: {', '.join(f'{reason} {count}' for reason, count in result['ended'].items())}")
    print(f"tokens: {', '.join(tokens)}")
    pages = f"{result['pages']} pages, {result['fewest_pages_free']} free at least"
    print(f"{pages}, {result['pages_lost']} lost; swapped out {result['preemptions']} times")
    print(f"median memory of each quarter: {', '.join(f'{value:.1f}' for value in result['rss_mib'])} MiB")
    print(f"compiled after the warm-up: {result['compiled_meanwhile']}")
    print(f"texts that differ from their lone runs: {len(result['texts_that_differ'])}")


def main(argv):
    """Draws lone texts, then all together, and tells what was found."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    work = soak_run.Work(requests=_REQUESTS.value, distinct=_DISTINCT.value, seed=_SEED.value)
    sizes = dict(ctx_size=_CTX_SIZE.value, progress=lambda *_: None)
    lone, model = (mla_jax.load(parallel=count, keep_drawn=False, **sizes) for count in (1, _PARALLEL.value))
    tokens = model.tokenizer.encode(pathlib.Path(argparse.__file__).read_text(), add_special=False)
    requests, result = soak_run.make_requests(model.config, tokens, work), _about()
    expected = soak_run.lone_texts(lone.engine, requests, _progress("alone", len(requests)))
    model.engine.warm_up(lambda done, count, name: name and print(f"compiling {name}", file=sys.stderr))
    model.engine.start()
    told = _progress("together", work.requests)
    found = soak_run.soak(model.engine, requests, expected, work, told)
    model.engine.stop()
    result |= dict(requests=work.requests, distinct=work.distinct, parallel=_PARALLEL.value)
    result |= dict(ctx_size=_CTX_SIZE.value) | found
    wrong = soak_run.faults(found, work)
    _print_report(result)
    line = json.dumps(result)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    app.run(main)
