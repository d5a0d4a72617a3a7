"""Run as a process: the real server over an engine by script. Its argument is JSON; it prints its address."""

import json
import os
import sys
import time

from fake_engine import fake_model

from mla_jax.serve.http import server
from mla_jax.serve.http.connections import Connection
from mla_jax.serve.http.service import Service, Settings


def main():
    told = json.loads(sys.argv[1])
    model = fake_model(**told.get("engine", {}))
    model.engine.say(told.get("text", "Hello there."))
    Connection.head_seconds = told.get("head_seconds", 30.0)
    service = Service(model, Settings(alias="toy", file_name="toy.gguf", **told.get("settings", {})))
    bound = server.bind("127.0.0.1", 0)
    secure = told.get("secure", {})
    started = lambda: print(server.url(bound, is_secure=bool(secure)), flush=True)
    if told.get("is_wedged"):
        model.engine.drain = model.engine.stop = lambda *args: time.sleep(3600)
    drain_seconds = told.get("drain_seconds", 5.0)
    told_of = dict(started=started, stopping=lambda: None)
    if not server.run(service, bound, drain_seconds=drain_seconds, **told_of, **secure):
        os._exit(1)


if __name__ == "__main__":
    main()
