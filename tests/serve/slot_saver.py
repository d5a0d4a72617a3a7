"""Run as a process: says what a slot's file holds, then saves two slots to it in turn until it is killed.

Arguments: the model, the file, a folder for compiled code. Prints a line of JSON for each thing it has done.
"""

import itertools
import json
import pathlib
import sys

import mla_jax
from mla_jax.sampler import SamplingParams
from mla_jax.serve.request import Request

PROMPTS = tuple(tuple(first + i * 7 % 300 for i in range(count)) for first, count in ((3, 1500), (4, 3000)))
NEXT = 5  # goes on after what was saved


def draw(engine, prompt, count=8):
    """Returns the tokens that follow a prompt, and how many of it were known."""
    sampling = SamplingParams(temperature=0.0, seed=0)
    request = Request(prompt=tuple(prompt), max_tokens=count, sampling=sampling, ignore_eos=True)
    heard = []
    ticket = engine.submit(request, heard.append)
    while engine.step():
        pass
    return [piece.token for piece in heard], ticket.num_cached


def _say(**what):
    print(json.dumps(what), flush=True)


def main():
    model_path, path, compiled = map(pathlib.Path, sys.argv[1:])
    sizes = dict(ctx_size=8192, ubatch=512, parallel=2, keep_drawn=False, progress=lambda *_: None)
    engine = mla_jax.load(model_path, compilation_cache=compiled, **sizes).engine
    if path.exists():
        tokens = engine.restore_slot(0, path)
        text, num_cached = draw(engine, [*tokens, NEXT])
        _say(restored=tokens, text=text, num_cached=num_cached)
    else:
        for prompt in PROMPTS:
            _say(cold=prompt[:-1], text=draw(engine, [*prompt[:-1], NEXT])[0])
    engine.forget()
    for prompt in PROMPTS:
        draw(engine, prompt, 1)
    for slot in itertools.cycle((0, 1)):
        _say(saved=engine.save_slot(slot, path)[0])


if __name__ == "__main__":
    main()
