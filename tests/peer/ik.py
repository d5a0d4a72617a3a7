"""Runs GGUF files in ik_llama.cpp (package ik-llama-cpp-python), in a process of its own.

A process keeps its log, its threads and its aborts away from the caller, who needs nothing but this file:

    import ik
    logits = ik.logits(path, tokens, mla=3)

Run as a script it is that process: one JSON request a line on stdin, one JSON answer a line on stdout.
"""

import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

_CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q8_KV": 151, "q6_0": 133, "q4_0": 2, "q4_1": 3}
_CACHE_TYPES |= {"q5_0": 6, "q5_1": 7, "iq4_nl": 20}
_CELLS = 256  # with flash attention the context is a whole number of these
_LOG_TAIL = 40_000  # a long trace of the stack may follow the reason


def logits(path, tokens, *, mla=3, step=False, cache_type="f16", lora=None) -> np.ndarray:
    """Returns f32[T, W], the logits after each token, with flash attention unless there is an adapter.

    Args:
      path: GGUF file.
      tokens: [T] ids.
      mla: 0 to 3.
      step: feed one token at a time, as when generating, and not all at once.
      cache_type: as ik_llama.cpp spells it.
      lora: GGUF file of an adapter, which ik_llama.cpp takes without flash attention alone.

    Raises:
      RuntimeError: if ik_llama.cpp refuses the file or the settings; its log is the message.
    """
    settings = dict(mla=mla, ctx_size=len(tokens), cache_type=cache_type, flash=lora is None, lora=lora)
    with tempfile.TemporaryDirectory() as folder, Process(path, **settings) as process:
        out = pathlib.Path(folder) / "logits.npy"
        process.ask("logits", tokens=[int(t) for t in tokens], step=step, out=str(out))
        return np.load(out)


class Process:
    """A model loaded in another process.

    Args:
      path: GGUF file.
      mla: 0 to 3.
      flash: use flash attention.
      cache_type: a key of `_CACHE_TYPES`.
      ctx_size: tokens that the cache holds at least.
      threads: of the CPU.
      script: what to run; another one may answer the same requests with another engine.
      lora: GGUF file of an adapter, None for none.

    Attributes:
      log: what the process wrote, once it is closed.
    """

    def __init__(
        self,
        path,
        *,
        mla=3,
        flash=True,
        cache_type="f16",
        ctx_size=512,
        threads=1,
        script=__file__,
        lora=None,
    ):
        self.log = ""
        self._stderr = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        settings = dict(mla=mla, flash=flash, cache_type=cache_type, ctx_size=ctx_size, threads=threads)
        self.ask("open", path=str(path), **settings)
        if lora is not None:
            self.ask("adapt", path=str(lora))

    def ask(self, request: str, **arguments):
        """Sends a request and returns the answer.

        Raises:
          RuntimeError: if the process has ended.
        """
        try:
            self._child.stdin.write(json.dumps([request, arguments]) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            raise RuntimeError(f"the process ended at {request!r}:\n{self.log[-_LOG_TAIL:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        if self._stderr.closed:
            return
        try:
            self._child.stdin.close()
        except BrokenPipeError:
            pass  # it has ended by itself, with a request unread
        self._child.wait()
        self._child.stdout.close()
        self._stderr.seek(0)
        self.log = self._stderr.read().decode(errors="replace")
        self._stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Engine:
    """The C API as far as it is needed here; its methods are the requests."""

    def open(self, path, mla, flash, cache_type, ctx_size, threads):
        from ik_llama_cpp import _ctypes_api

        self.api = _ctypes_api
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.mla = mla  # also decides which forms of kv_b are made at loading
        self.model = self.api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            sys.exit(f"cannot load {path}")
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        params = self.api.llama_context_default_params()
        params.n_ctx = -(-ctx_size // _CELLS) * _CELLS
        params.n_batch, params.n_ubatch = params.n_ctx, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn, params.mla_attn = flash, mla
        params.fused_up_gate = params.fused_moe_up_gate = flash  # which pass adapters by
        params.type_k = params.type_v = _CACHE_TYPES[cache_type]
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit("cannot make a context of these settings")

    def adapt(self, path):
        library = self.api._lib  # these are not among the functions that the package binds
        make, use = library.llama_lora_adapter_init, library.llama_lora_adapter_set
        make.argtypes, make.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
        use.argtypes, use.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float], ctypes.c_int32
        adapter = make(self.model, path.encode())
        if not adapter or use(self.context, adapter, 1.0):
            sys.exit(f"cannot use the adapter {path}")

    def logits(self, tokens, step, out):
        self.api.llama_kv_cache_clear(self.context)
        if step:
            rows = [self._decode([token], i, True)[0] for i, token in enumerate(tokens)]
        else:
            rows = self._decode(tokens, 0, True)
        np.save(out, np.stack(rows))

    def generate(self, tokens, predict):
        """Returns greedy tokens and their leads over the runners-up, seconds to the first and of the rest."""
        self.api.llama_kv_cache_clear(self.context)
        drawn, leads, times = [], [], [time.perf_counter()]
        row = self._decode(tokens, 0, False)[0]
        while True:
            second, first = np.partition(row, -2)[-2:]
            leads.append(float(first - second))
            drawn.append(int(row.argmax()))
            times.append(time.perf_counter())
            if len(drawn) == predict:
                prompt_seconds, decode_seconds = times[1] - times[0], times[-1] - times[1]
                return dict(
                    tokens=drawn, leads=leads, prompt_seconds=prompt_seconds, decode_seconds=decode_seconds
                )
            row = self._decode(drawn[-1:], len(tokens) + len(drawn) - 1, False)[0]

    def prefill(self, tokens, start):
        """Puts tokens after the first `start` in the cache; returns the seconds to the greedy next one."""
        self._cut(start)
        batch = self._batch(tokens, start, False)
        began = time.perf_counter()
        self._rows(batch, [len(tokens) - 1])[0].argmax()
        seconds = time.perf_counter() - began
        self.api.llama_batch_free(batch)
        return seconds

    def decode(self, token, start, predict):
        """Goes on greedily from `token` after the first `start` in the cache; returns the seconds."""
        self._cut(start)
        batch = self._batch([token], start, False)  # one for all, so that little but the peer is measured
        began = time.perf_counter()
        for position in range(start, start + predict):
            batch.token[0], batch.pos[0] = token, position
            row = self._rows(batch, [0])[0]
            token = int(row.argmax())
        seconds = time.perf_counter() - began
        self.api.llama_batch_free(batch)
        if np.isnan(row).any():
            sys.exit("the logits are NaN")
        return seconds

    def tokenize(self, text, special):
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self.api.llama_tokenize(self.model, data, len(data), buffer, len(buffer), False, special)
        return list(buffer[:count])

    def _cut(self, length):
        remove = self.api._lib.llama_kv_cache_seq_rm  # not among the functions that the package binds
        remove.argtypes, remove.restype = [ctypes.c_void_p] + [ctypes.c_int32] * 3, ctypes.c_bool
        remove(self.context, 0, length, -1)

    def _decode(self, tokens, position, all_rows):
        batch = self._batch(tokens, position, all_rows)
        wanted = range(len(tokens)) if all_rows else [len(tokens) - 1]
        rows = [row.copy() for row in self._rows(batch, wanted)]
        self.api.llama_batch_free(batch)
        return rows

    def _batch(self, tokens, position, all_rows):
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, all_rows or i == len(tokens) - 1
        return batch

    def _rows(self, batch, wanted):
        """Returns the logits after the tokens at `wanted`, valid until the next call."""
        code = self.api.llama_decode(self.context, batch)
        if code:
            sys.exit(f"llama_decode failed with {code}")
        pointers = [self.api.llama_get_logits_ith(self.context, i) for i in wanted]
        return [np.ctypeslib.as_array(pointer, (self.vocab_size,)) for pointer in pointers]


def serve(engine) -> None:
    """Answers requests from stdin by the methods of `engine`, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    for line in sys.stdin:
        request, arguments = json.loads(line)
        print(json.dumps(getattr(engine, request)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    serve(_Engine())
