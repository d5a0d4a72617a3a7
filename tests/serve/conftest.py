import contextlib

import pytest
from fake_engine import fake_model
from starlette.testclient import TestClient

from mla_jax.serve.http.application import application
from mla_jax.serve.http.service import Service, Settings


@pytest.fixture
def serve():
    """Returns a function that serves an engine by script: (client, engine, service)."""
    with contextlib.ExitStack() as stack:

        def serve(*, engine=None, host="127.0.0.1:8080", **settings):
            model = fake_model(**(engine or {}))
            model.engine.start()
            stack.callback(model.engine.stop)
            service = Service(model, Settings(alias="toy", file_name="toy.gguf", **settings))
            client = TestClient(
                application(service), base_url=f"http://{host}", raise_server_exceptions=False
            )
            return stack.enter_context(client), model.engine, service

        yield serve
