"""The flags of `serve`: what they become, what is refused before a model is read, and what is told."""

import os
import socket

import pytest

from mla_jax import chat, generate
from mla_jax.cli import argv, serve_flags
from mla_jax.cli import flags as flags_lib
from mla_jax.serve.http import access, server


@pytest.fixture
def served(run, monkeypatch):
    """Returns a function that serves a command line up to the point where it listens: (settings, more)."""
    found = {}

    def load(path, **options):
        found["options"] = options
        model = real(path)
        monkeypatch.setattr(
            model.engine, "warm_up", lambda progress: found.setdefault("warm", progress(1, 2, "x"))
        )
        return model

    real = generate.load
    monkeypatch.setattr(generate, "load", load)
    monkeypatch.setattr(
        server, "run", lambda service, bound, **more: found.update(more, service=service) or True
    )

    def served(*args):
        found.clear()
        code, out, err = run("serve", "--port", "0", *args)
        assert (code, out) == (0, ""), err
        return found, err

    return served


def parse(*args):
    values = serve_flags.command_flags()
    argv.parse(args, values, aliases=serve_flags.ALIASES, refused=serve_flags.REFUSED)
    return values


def test_defaults(served):
    found, err = served()
    settings = found["service"].settings
    assert (settings.alias, settings.file_name) == ("python-stdlib-15m-q8_0", "python-stdlib-15m-q8_0.gguf")
    assert settings.hosts == ("localhost", "127.0.0.1", "[::1]", "127.0.0.1") and not settings.origins
    assert not settings.api_keys and settings.max_tokens is None and settings.chat_template is None
    options = found["options"]
    assert (options["parallel"], options["cache_ram"], options["keep_drawn"]) == (4, None, False)
    assert found["drain_seconds"] == 30 and "compiling 1 of 2: x" in err


def test_flags_reach_what_they_are_for(served, tmp_path):
    keys, template = tmp_path / "keys", tmp_path / "template"
    keys.write_text("\nkey-of-a-file-0001\n  key-of-a-file-0002 \n")
    template.write_text("{{ messages[0].content }}")
    found, err = served(
        *["-np", "2", "-cram", "0", "-a", "toy", "--temp", "0.5", "-n", "9", "-to", "7", "--no-webui"],
        *["--api-key", "key-of-a-flag-0001,key-of-a-flag-0002", "--api-key", "key-of-a-flag-0003"],
        *["--api-key-file", str(keys), "--chat-template-file", str(template), "--no-warmup"],
        *[
            "--chat-template-kwargs",
            '{"who": "me"}',
            "--cors-origins",
            "https://a.example, https://b.example",
        ],
        *["--slot-save-path", str(tmp_path), "--reasoning-format", "none", "--drain-seconds", "3"],
    )
    settings = found["service"].settings
    assert settings.api_keys == tuple(
        f"key-of-a-{place}" for place in ("flag-0001", "flag-0002", "flag-0003", "file-0001", "file-0002")
    )
    assert (settings.alias, settings.sampling.temperature, settings.max_tokens) == ("toy", 0.5, 9)
    assert settings.origins == ("https://a.example", "https://b.example")
    assert settings.chat_template == "{{ messages[0].content }}" and settings.template_kwargs == {"who": "me"}
    assert (settings.send_seconds, settings.has_page, settings.reasoning_format) == (7.0, False, "none")
    assert settings.slot_folder == tmp_path.resolve() and found["drain_seconds"] == 3
    assert (found["options"]["parallel"], found["options"]["cache_ram"]) == (2, 0)
    assert "compiling" not in err and "key-of" not in err


def test_a_key_of_the_environment(served, monkeypatch):
    monkeypatch.setenv("MLA_API_KEY", "short")
    found, err = served("--host", "0.0.0.0", "--no-warmup")
    assert found["service"].settings.api_keys == ("short",) and found["service"].settings.hosts == ()
    assert "an API key has fewer than 16 characters" in err and "short" not in err


def test_an_open_server_says_so(served):
    found, err = served("--host", "0.0.0.0", "--allow-unauthenticated", "--no-warmup")
    assert "anyone who can reach this machine can use the model" in err
    hosts = (access.ADDRESSES, "localhost", socket.gethostname(), "0.0.0.0")
    assert found["service"].settings.hosts == hosts  # a name that an attacker owns can point here as well
    found, _ = served("--host", "0.0.0.0", "--allow-unauthenticated", "--allowed-hosts", "a.example, b")
    assert found["service"].settings.hosts == ("a.example", "b")
    found, _ = served("--host", "0.0.0.0", "--api-key", "key-of-a-flag-0001")
    assert found["service"].settings.hosts == ()


def test_a_template_by_its_name(served):
    found, _ = served("--no-warmup", "--chat-template", "kimi-k2")
    assert found["service"].settings.chat_template == chat.BUILTIN_TEMPLATES["kimi-k2"]


REFUSED = {
    "open host": (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines"),
    "all hosts": (["--host", "::"], "--host :: can be reached from other machines"),
    "no such host": (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 0 cannot be"),
    "no address of ours": (
        ["--port", "1", "--host", "203.0.113.1"],
        "--host 203.0.113.1 --port 1 cannot be listened at",
    ),
    "port": (["--port", "65536"], "--port must be an integer in the range [0, 65535], got '65536'"),
    "parallel": (["-np", "0"], "-np must be an integer in the range [1, 256], got '0'"),
    "reasoning": (["--reasoning-format", "x"], "--reasoning-format must be one of auto, deepseek, none"),
    "batching": (["--no-cont-batching"], "--no-cont-batching cannot be used"),
    "batching, short": (["-nocb"], "--no-cont-batching cannot be used"),
    "jinja": (["--no-jinja"], "--no-jinja cannot be used"),
    "two templates": (["--chat-template", "{{1}}", "--chat-template-file", "x"], "--chat-template must not"),
    "template": (["--chat-template", "llama9"], "--chat-template must be jinja or one of deepseek2"),
    "kwargs": (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs must be a JSON object"),
    "slots": (["--slot-save-path", "/nowhere"], "--slot-save-path must be a folder that exists"),
    "key": (["--api-key", "a b"], "an API key must be made of printable characters"),
    "empty key": (["--api-key", "a,,b"], "an API key must be made of printable characters"),
    "key file": (["--api-key-file", os.devnull], "--api-key-file must hold at least one key"),
    "no key file": (["--api-key-file", "/nowhere"], "/nowhere cannot be used: No such file"),
    "half of TLS": (["--ssl-key-file", "x"], "--ssl-cert-file and --ssl-key-file must be given together"),
    "prompt": (["-p", "x"], "-p cannot be used: a server is given its prompts by requests"),
    "shift": (["--context-shift"], "--context-shift cannot be used: there is no context shift"),
    "reuse": (["--cache-reuse", "256"], "--cache-reuse cannot be used: "),
    "similarity": (["-sps", "0.5"], "-sps cannot be used: "),
    "embedding": (["--embeddings"], "--embeddings cannot be used: "),
    "draft": (["-md", "x.gguf"], "-md cannot be used: "),
    "projector": (["--mmproj", "x.gguf"], "--mmproj cannot be used: "),
    "no flag": (["--parralel", "2"], "there is no flag --parralel. Did you mean --parallel?"),
    "sampling": (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
}


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_a_model_is_read(run, monkeypatch, args, words):
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    port = [] if "--port" in args else ["--port", "0"]
    code, out, err = run("llama-server", *port, *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"mla-jax: {words}") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "args",
    [
        ["--chat-template", "{{ messages.nothing.at.all }}"],
        ["--chat-template-kwargs", '{"messages": []}'],
    ],
    ids=["template", "variables"],
)
def test_a_template_that_fails_is_told_at_the_start(run, monkeypatch, args):
    monkeypatch.setattr(server, "run", lambda *args, **more: pytest.fail("it listens"))
    code, _, err = run("serve", "--port", "0", "--no-warmup", *args)
    assert code == 2 and "template" in err.splitlines()[-1]


def test_certificate_and_key_reach_the_server(served, tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.touch()
    key.touch()
    found, _ = served("--ssl-cert-file", str(certificate), "--ssl-key-file", str(key), "--no-warmup")
    assert (found["ssl_certificate"], found["ssl_key"]) == (str(certificate), str(key))


def test_every_alias_leads_somewhere():
    known = set(serve_flags.command_flags())
    refused = {key for key in serve_flags.REFUSED if "=" not in key}
    own = {alias: flag for alias, flag in serve_flags.ALIASES.items() if alias not in flags_lib.ALIASES}
    assert {flag.removeprefix("no") for flag in own.values()} <= known | refused
    assert not refused & known


@pytest.mark.parametrize("command", ["serve", "llama-server"])
def test_help_fits_a_line(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: mla-jax {command} ")
    assert max(map(len, out.splitlines())) <= 110
    assert "-np,  --parallel N" in out


COMMANDS = """
-mla 3 -fa -ngl 999 --ctx-size 8192 -ctk q8_0
-mla 3 -fa -ngl 999 --ctx-size 8192 -ctk q4_0 --k-cache-hadamard
-mla 3 -fa -ngl 999 --ctx-size 8192
-mla 3 -fa --ctx-size 8192
-mla 3 -fa -ngl 999 --ctx-size 8192 -ser 6,1
""".strip().splitlines()


@pytest.mark.parametrize("line", COMMANDS)
def test_flags_of_the_reference_are_read(line):
    values = parse("--model", "m.gguf", *line.split())
    assert (values.model, values.mla, values.flash_attn, values.ctx_size) == ("m.gguf", "3", "on", 8192)
    assert values.n_gpu_layers == (999 if "-ngl" in line else 0)
    assert values.cache_type_k == (line.split("-ctk ")[1].split()[0] if "-ctk" in line else "f16")
    assert values.k_cache_hadamard == ("hadamard" in line)
    assert values.smart_expert_reduction == ("6,1" if "-ser" in line else None)
