"""What each command does with its flags."""

import dataclasses
import pathlib
import sys

import checkpoints_tools
from mla_jax import corpus, presets
from mla_jax.cli import expert_stats, hosts, loading, paths
from mla_jax.cli.argv import UsageError, spelled


def generate(values):
    """Streams the continuation of a prompt to stdout, and its speed to stderr."""
    if hosts.is_follower(values):
        hosts.follow(values, "generate")
        return
    prompt = _prompt(values)
    if values.expert_stats and values.mesh is not None:
        raise UsageError(
            "--expert-stats counts experts on one device alone, so it must not come with --mesh."
        )
    drawing, prompt_cache = _drawing(values), _prompt_cache(values)
    with hosts.leading(values, "generate") as programs:
        _generate(values, loading.load(values, programs=programs), prompt, drawing, prompt_cache)


def _prompt(values):
    if values.file is None:
        if not values.prompt:
            raise UsageError("--prompt must be given and not be empty: it is the text to continue.")
        return values.prompt
    if values.prompt is not None:
        raise UsageError("--file must not come with --prompt: each gives the text to continue.")
    text = corpus.read_text(values.file).removesuffix("\n").removesuffix("\r")
    if not text:
        raise UsageError(f"--file must hold the text to continue, but there is none in {values.file}.")
    return text


def _generate(values, model, prompt, drawing, prompt_cache):
    if values.expert_stats and model.config.moe is None:
        raise UsageError("--expert-stats must be given for a model with experts, and this one has none.")
    ids = model.tokenizer.encode(prompt)
    held = model.load_cache(prompt_cache) if prompt_cache and prompt_cache.exists() else []
    pieces = model.stream_generate(ids, reuse_prefix=True, **drawing)
    if prompt_cache and (values.prompt_cache_all or not (values.prompt_cache_ro or held[: len(ids)] == ids)):
        pieces = _keeping(pieces, model, prompt_cache, None if values.prompt_cache_all else len(ids))
    if values.display_prompt:
        loading.write(prompt)
    drawn = _print_stream(pieces)
    loading.write("\n")
    _report(model, drawn)
    if values.expert_stats:
        routed, _ = model.routing(ids + [piece.token for piece in drawn[:-1]])
        loading.tell(expert_stats.describe(routed, model.config))


def chat(values):
    """Reads turns from stdin until it ends; the cache keeps what earlier turns computed."""
    drawing = _drawing(values)
    model = loading.load(values)
    if model.tokenizer.vocabulary.chat_template is None:
        loading.tell(
            "the file has no chat template, so turns are written in plain words or as its family does"
        )
    messages = []
    if values.system_prompt:
        messages.append({"role": "system", "content": values.system_prompt})
    while True:
        if sys.stdin.isatty():
            loading.write("> ")
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        pieces = model.stream_generate(model.encode_chat(messages), reuse_prefix=True, **drawing)
        drawn = _print_stream(pieces)
        loading.write("\n")
        _report(model, drawn)
        messages.append({"role": "assistant", "content": "".join(piece.text for piece in drawn)})


def train(values):
    """Trains the packaged model's architecture on the standard library and writes it as Q8_0 GGUF."""
    if values.out is None:
        raise UsageError("--out must be given: the GGUF file to write.")
    out = paths.output_file("--out", values.out)
    from mla_jax import train as train_lib  # orbax takes half a second to import: not for other commands

    defaults, tenth = train_lib.TrainConfig(), values.steps // 10
    plan = train_lib.TrainConfig(
        steps=values.steps,
        long_steps=values.long_steps if values["long_steps"].present else min(defaults.long_steps, tenth),
        warmup_steps=min(defaults.warmup_steps, tenth),
        batch=values.batch,
        window=values.window,
        learning_rate=values.learning_rate,
        seed=values.seed,
    )
    documents = corpus.standard_library()
    vocabulary = corpus.train_vocabulary(documents.train, presets.PACKAGED.vocab_size)
    stream = corpus.encode_documents(vocabulary, documents.train)
    loading.tell(f"{stream.size} tokens of {len(documents.train)} files to train on")
    params = train_lib.fit(stream, presets.PACKAGED, plan, pathlib.Path(values.folder), report=loading.tell)
    checkpoints_tools.export_gguf(
        out,
        params,
        presets.PACKAGED,
        tokenizer_metadata=corpus.vocabulary_metadata(vocabulary) | {"general.name": out.stem},
        weight_type="q8_0",
    )
    loading.tell(f"wrote {out}")
    stream = corpus.encode_documents(vocabulary, documents.held_out)
    num_bytes = sum(len(text.encode()) for text in documents.held_out)
    params = checkpoints_tools.load_gguf(out).params
    bits = train_lib.bits_per_byte(params, stream, num_bytes, presets.PACKAGED)
    loading.tell(
        f"{bits:.3f} bits per byte on {len(documents.held_out)} held-out sources of {num_bytes} bytes"
    )


def _prompt_cache(values):
    """Returns the file that keeps the cache between runs, or None."""
    if values.prompt_cache is None:
        for name in ("prompt_cache_all", "prompt_cache_ro"):
            if values[name].value:
                raise UsageError(f"{spelled(name)} must come with --prompt-cache, which names the file.")
        return None
    if values.prompt_cache_all and values.prompt_cache_ro:
        raise UsageError("--prompt-cache-all writes the file, so it must not come with --prompt-cache-ro.")
    path = paths.output_file("--prompt-cache", values.prompt_cache)
    if values.prompt_cache_ro and not path.exists():
        raise UsageError(f"--prompt-cache must exist with --prompt-cache-ro, got {str(path)!r}.")
    return path


def _keeping(pieces, model, path, num_tokens):
    """Passes a stream on and keeps the cache: of `num_tokens` after the first piece, or all at the end."""
    for done, piece in enumerate(pieces):
        if num_tokens is not None and done == 0:
            model.save_cache(path, num_tokens)
        yield piece
    if num_tokens is None:
        model.save_cache(path)


def _drawing(values):
    """Returns how to draw as keywords of `stream_generate`, checked before a model is loaded for it."""
    if values.predict == 0:
        raise UsageError("--predict must be positive, or -1 for no limit, got 0.")
    return dict(dataclasses.asdict(loading.sampling_params(values)), max_tokens=values.predict)


def _print_stream(pieces):
    """Writes a stream as it comes, and returns its pieces."""
    drawn = []
    for piece in pieces:
        loading.write(piece.text)
        drawn.append(piece)
    return drawn


def _report(model, drawn):
    timings = model.timings
    speed = timings.decoded_tokens / timings.decode_seconds if timings.decoded_tokens else 0.0
    cached = f" ({timings.cached_tokens} of them cached)" if timings.cached_tokens else ""
    loading.tell(
        f"{timings.prompt_tokens} prompt tokens{cached}, first token after {timings.prompt_seconds:.2f} s, "
        f"then {timings.decoded_tokens} at {speed:.1f} tokens/s; finished: {drawn[-1].finish_reason}"
    )
