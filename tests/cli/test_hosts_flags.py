"""The flags of runs with several processes: what is refused before anything is read or waited for."""

import pytest

from mla_jax.cli import flags as flags_lib
from mla_jax.cli import hosts, serve_flags
from mla_jax.serve.hosts import gathering

AT = ("--coordinator", "127.0.0.1:1234")
RUN = (*AT, "--num-processes", "2", "--process-id", "0")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (AT, "--coordinator must come with --num-processes."),
        ((*AT, "--process-id", "0"), "--coordinator must come with --num-processes."),
        (("--num-processes", "2"), "--num-processes must come with --coordinator."),
        (("--process-id", "1"), "--process-id must come with --coordinator."),
        (("--join-seconds", "9"), "--join-seconds must come with --coordinator."),
        (
            (*AT, "--num-processes", "2", "--process-id", "2"),
            "--process-id must be in [0, 2) with --num-processes 2, got 2.",
        ),
        (
            ("--coordinator", "here", "--num-processes", "2", "--process-id", "0"),
            "--coordinator must be HOST:PORT, got 'here'.",
        ),
        (
            ("--coordinator", "http://here:80", "--num-processes", "2", "--process-id", "0"),
            "--coordinator must be HOST:PORT, got 'http://here:80'.",
        ),
        (
            ("--coordinator", "here:65536", "--num-processes", "2", "--process-id", "0"),
            "--coordinator must be HOST:PORT, got 'here:65536'.",
        ),
        ((*RUN, "--num-processes", "0"), "--num-processes must be a positive integer, got '0'."),
        (
            (*RUN, "--cpu-moe"),
            "--cpu-moe places a model within one process, so it must not come with --coordinator.",
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_bad_places_are_refused(run, command, args, sentence):
    more = ("-p", "x") if command == "generate" else ("--port", "0")
    assert run(command, *more, *args) == (2, "", f"mla-jax: {sentence}\n")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("generate", "-p", "x", "--expert-stats"), "--expert-stats counts experts in one process alone"),
        (("generate", "-p", "x", "--prompt-cache", "a"), "--prompt-cache knows a model by weights"),
        (("serve", "--port", "0", "--slot-save-path", "."), "--slot-save-path knows a model by weights"),
    ],
    ids=["expert stats", "prompt cache", "slots"],
)
def test_what_needs_one_process_is_refused(run, args, sentence):
    code, out, err = run(*args, *RUN)
    assert (code, out) == (2, "") and err.startswith(f"mla-jax: {sentence}")


def test_a_follower_needs_no_prompt_and_a_leader_does(run):
    code, _, err = run("generate", *RUN)
    assert code == 2 and "--prompt must be given" in err
    code, _, err = run("generate", *AT, "--num-processes", "2", "--process-id", "1", "--join-seconds", "1")
    assert code == 2 and err.startswith("mla-jax: process 0 must be at 127.0.0.1:1234 within 1 seconds")


def test_addresses_have_hosts_of_every_kind():
    for written, host in [
        ("[::1]:80", "::1"),
        ("node-0.cluster:80", "node-0.cluster"),
        ("10.0.0.1:80", "10.0.0.1"),
    ]:
        values = flags_lib.command_flags("generate")
        values.coordinator, values.num_processes, values.process_id = written, 2, 1
        values.mark_as_parsed()
        place = hosts._place(values)
        assert (place.host, place.port, place.address) == (host, 80, written)


def test_what_decides_texts_is_compared_and_what_is_of_one_machine_is_not(tmp_path):
    def about(*, model=None, **more):
        values = serve_flags.command_flags()
        values.coordinator, values.num_processes, values.process_id = "a:1", 2, 0
        values.mark_as_parsed()
        for name, value in more.items():
            values[name].value = value
        if model is not None:
            values.model = str(model)
        return hosts._about(values, "serve", hosts._place(values))

    plain = about()
    assert about(threads=1, port=0, temp=0.1, smart_expert_reduction="1,1") == plain
    for name, value in dict(ctx_size=256, cache_type_k="q8_0", parallel=2, mla="1").items():
        changed = about(**{name: value})
        assert {key for key in plain if changed[key] != plain[key]} == {f"--{name.replace('_', '-')}"}
    copy = tmp_path / "copy.gguf"
    blob = bytearray((hosts.pathlib.Path(serve_flags.command_flags()["model"].default)).read_bytes())
    copy.write_bytes(blob)
    assert about(model=copy) == plain
    blob[len(blob) // 2] ^= 1
    copy.write_bytes(blob)
    assert {key for key in plain if about(model=copy)[key] != plain[key]} == {"the model"}


@pytest.mark.parametrize(
    ("kernels", "gpu_layers", "told"),
    [
        (("avx512", "avx2"), 0, "the CPU by kernels for avx512"),
        ((), 0, "the CPU without kernels"),
        (("avx2",), 999, "a GPU"),
    ],
    ids=["kernels", "none", "gpu"],
)
def test_what_computes_is_compared(monkeypatch, kernels, gpu_layers, told):
    monkeypatch.setattr(hosts.cpu_kernels, "instruction_sets", lambda: kernels)
    values = flags_lib.command_flags("generate")
    values.mark_as_parsed()
    values.n_gpu_layers = gpu_layers
    assert hosts._computes(values) == told


@pytest.mark.parametrize(
    ("given", "direct"),
    [
        ({}, None),
        ({"no_grpc_proxy": "a"}, "a"),
        ({"HTTPS_PROXY": "http://p"}, "127.0.0.1"),
        ({"grpc_proxy": "http://p", "no_grpc_proxy": "a"}, "a,127.0.0.1"),
        ({"http_proxy": "http://p", "no_proxy": "b"}, "b,127.0.0.1"),
    ],
    ids=["none", "kept", "upper case", "appended", "of all programs"],
)
def test_a_proxy_is_passed_by_where_there_is_one(monkeypatch, given, direct):
    monkeypatch.setattr(hosts.os, "environ", dict(given))
    monkeypatch.setattr(hosts.gathering, "join_jax", lambda *args: None)
    monkeypatch.setattr(hosts.jax.config, "update", lambda *args: None)
    values = flags_lib.command_flags("generate")
    values.mark_as_parsed()
    hosts._join_jax(None, gathering.Gathered((), "a:1"), values)
    assert hosts.os.environ.get("no_grpc_proxy") == direct
