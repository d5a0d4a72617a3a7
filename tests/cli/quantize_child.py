"""Runs `mla-jax` once per line of stdin, each in a forked process, so that JAX is imported once.

A line holds the arguments as JSON. On stdout follow the process id and the exit code, negative for a signal.
"""

import json
import os
import signal
import sys

from mla_jax.cli import main  # before JAX has a thread, so that forking is safe

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
