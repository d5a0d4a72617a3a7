"""What the commands that measure do with their flags."""

import importlib.util
import itertools
import math
import os
import pathlib
import shlex
import sys
import time

import jax

from mla_jax import corpus, divergence, measure_plots, perplexity, result_files, speed
from mla_jax import expert_reduction as reduction_lib
from mla_jax import ser_sweep as sweep_lib
from mla_jax.cli import argv, loading, measure_flags, paths
from mla_jax.cli import measure_tables as tables
from mla_jax.cli.argv import UsageError
from mla_jax.config import RunConfig
from mla_jax.perplexity import Network
from mla_jax.saved_logits import SavedLogits

_OF_A_BASE = "model mla flash_attn cache_type_k cache_type_rope k_cache_hadamard hadamard_size".split()
_OF_A_BASE += "attention_max_batch grouped_expert_routing smart_expert_reduction ser_layers".split()


def measure_perplexity(values):
    """Prints the perplexity of a text window by window, or how far a model is from a base."""
    _check_base_flags(values)
    _check_out(values.out)
    if values.kl_divergence_base is not None and not values.kl_divergence:
        read = [values.model, values.file, values.ser_layers, *(path for path, _ in loading.adapters(values))]
        paths.check_not_read("--kl-divergence-base", values.kl_divergence_base, read)
    text = None if values.file is None else corpus.read_text(values.file)
    saved = SavedLogits.open(values.kl_divergence_base) if _reads_base(values) else None
    if saved is not None:
        _take_window(values, saved)
    base_values = None if values.against is None else _base_values(values)
    model = loading.load(values, on_one_device=True)
    size = model.ctx_size
    if text is None and saved is None:
        text = "".join(corpus.standard_library().held_out)
    if text is None:
        bos_id = perplexity.bos_id(model)
        windows = saved.windows if bos_id is None else perplexity.begun(saved.windows, bos_id)
    else:
        windows = perplexity.windows_of(model, text, size, limit=values.chunks)
    how = dict(batch=max(1, values.batch_size // size), ubatch=min(values.batch_size, values.ubatch_size))
    loading.tell(f"{len(windows)} windows of {size} tokens, {min(how['batch'], len(windows))} at a time")
    progress = _Progress(len(windows), how["batch"])
    if saved is not None:
        found = divergence.measure_saved(saved, model, windows, **how, report=progress.of_divergence)
    elif base_values is not None:
        base = _base_network(base_values, values, model)
        found = divergence.measure(base, model, windows, **how, report=progress.of_divergence)
    elif values.kl_divergence_base is not None:
        path = values.kl_divergence_base
        found = divergence.save_base(path, model, windows, **how, report=progress.of_perplexity)
    else:
        found = perplexity.measure(model, windows, **how, report=progress.of_perplexity)
    _tell_perplexity(found, values, model)


def sweep_bench(values):
    """Prints the speed of prompts and of drawing at growing depths, as llama-sweep-bench does."""
    _check_out(values.out)
    model = loading.load(values, cache_ram=0)
    prompt = min(values.batch_size, values.ubatch_size, model.ctx_size)
    predict = values.n_gen or max(1, prompt // 4)
    threads = _threads(values)
    about = dict(n_kv_max=model.ctx_size, n_batch=values.batch_size, n_ubatch=prompt)
    about |= dict(flash_attn=int(model.run.flash), n_gpu_layers=values.n_gpu_layers)
    about |= dict(n_threads=threads, n_threads_batch=threads)
    loading.tell(", ".join(f"{name} = {value}" for name, value in about.items()))
    rows, is_table = [], values.output_format == "table"
    for row in speed.sweep(model, prompt=prompt, predict=predict):
        if is_table and not rows:
            loading.write(tables.SWEEP_HEADER + "\n")
        rows.append(row)
        line = tables.sweep_line(row) + "\n"
        loading.write(line if is_table else tables.json_lines([tables.sweep_record(row, about)]))
    if values.out is not None:
        records = [tables.sweep_record(row, about | _about(values, model)) for row in rows]
        name = pathlib.Path(values.model).name
        _keep(values.out, "sweep-bench", records, records, measure_plots.of_sweeps({name: rows}))


def bench(values):
    """Prints the mean speed of some kinds of requests, as llama-bench does."""
    _check_out(values.out, has_plot=False)
    prompts, predicts = _counts("--n-prompt", values.n_prompt), _counts("--n-gen", values.n_gen)
    depths = _counts("--n-depth", values.n_depth, least=0)
    if not prompts and not predicts:
        raise UsageError("--n-prompt and --n-gen must not both be 0: there would be nothing to measure.")
    if values.ctx_size is None:
        values["ctx_size"].value = max(depths) + max(prompts + predicts)
    model = loading.load(values, cache_ram=0)
    sizes = dict(prompts=prompts, predicts=predicts, depths=depths, repetitions=values.repetitions)
    tell = lambda result: loading.tell(f"{result.name}: {result.mean:.2f} tokens/s")
    results = speed.bench(model, **sizes, report=tell)
    about = _about(values, model) | _sizes(values, model)
    records = [tables.bench_record(result, about) for result in results]
    printed = {
        "md": lambda: tables.bench_table(results, about) + "\n",
        "csv": lambda: result_files.csv_bytes(tables.bench_csv_rows(records)).decode(),
        "json": lambda: result_files.json_bytes(records).decode(),
        "jsonl": lambda: tables.json_lines(records),
    }
    loading.write(printed[values.output]())
    if values.out is not None:
        files = {f"bench.{kind}": printed[kind]().encode() for kind in ("json", "csv", "md")}
        result_files.write(values.out, files)


def ser_sweep(values):
    """Prints perplexity, kept experts and speed for a grid of expert reductions."""
    if values.smart_expert_reduction or values.ser_layers:
        raise UsageError("-ser must not be given: ser-sweep tries settings of its own.")
    _check_out(values.out)
    documents = [corpus.read_text(values.text)] if values.text else corpus.standard_library().held_out
    model = loading.load(values, on_one_device=True)
    tokens = list(itertools.chain.from_iterable(map(model.tokenizer.encode, documents)))[: values.tokens + 1]
    used = model.config.moe.num_experts_per_token if model.config.moe else 1
    rows = sweep_lib.sweep(
        model, tokens, sweep_lib.grid(used), window=values.window, decoded=values.predict, report=loading.tell
    )
    loading.write(sweep_lib.table(rows) + "\n")
    if values.out is not None:
        about = dict(model=pathlib.Path(values.model).name, tokens=len(tokens) - 1, window=values.window)
        about |= dict(cores=values.threads or os.cpu_count(), jax=jax.__version__)
        sweep_lib.write(rows, pathlib.Path(values.out), about)


class _Progress:
    """Prints what windows come to as soon as they are done, and once how long the rest will take."""

    def __init__(self, num_windows, batch):
        self._num_windows, self._batch, self._num_done, self._began = num_windows, batch, 0, 0.0

    def of_perplexity(self, found):
        self._tell_rest(before="\n" if sys.stdout.isatty() else "")
        loading.write(
            f"[{self._num_done}]{found.running[-1]:.4f}," + "\n" * (self._num_done == self._num_windows)
        )

    def of_divergence(self, found):
        if self._num_done == 0:
            loading.write(tables.DIVERGENCE_HEADER + "\n")
        self._tell_rest()
        loading.write(tables.divergence_line(found) + "\n")

    def _tell_rest(self, before=""):
        """Windows of a batch come together: what the second one takes tells of all that follow."""
        self._num_done += 1
        if self._num_done == 1:
            self._began = time.perf_counter()
        elif self._num_done == self._batch + 1:
            seconds = (time.perf_counter() - self._began) / self._batch
            rest = seconds * (self._num_windows - self._num_done)
            loading.tell(f"{before}{seconds:.2f} s a window, {rest:.0f} s to go")


def _reads_base(values):
    return values.kl_divergence and values.kl_divergence_base is not None


def _check_base_flags(values):
    base, against = values.kl_divergence_base, values.against
    if base is not None and against is not None:
        raise UsageError("--against must not come with --kl-divergence-base: there is one base.")
    if values.kl_divergence and base is None and against is None:
        raise UsageError(
            "--kl-divergence must come with --kl-divergence-base, the file of a base, or with --against."
        )
    if _reads_base(values) and values.chunks is not None:
        raise UsageError("--chunks must not come with a base that is read: all of its windows are compared.")
    if base is not None and not values.kl_divergence:
        paths.output_file("--kl-divergence-base", base)


def _take_window(values, saved):
    size = saved.windows.shape[1]
    if values["ctx_size"].present and values.ctx_size != size:
        raise UsageError(
            f"--ctx-size must be the {size} tokens of the base's windows, got {values.ctx_size}."
        )
    values["ctx_size"].value = size


def _base_values(values):
    """Returns the flags of the base that `--against` tells of: those of the command line, but for its own."""
    base = measure_flags.command_flags("perplexity")
    try:
        words = shlex.split(values.against)
        argv.parse(words, base, aliases=measure_flags.ALIASES, refused=measure_flags.REFUSED)
    except ValueError as error:
        raise UsageError(f"--against must be flags of a base: {error}") from None
    for name in base:
        if not base[name].present:
            base[name].value = values[name].value
        elif name not in _OF_A_BASE:
            flag = name.replace("_", "-")
            raise UsageError(
                f"--against must be flags of the model, its attention, cache and experts, got --{flag}."
            )
    RunConfig(**loading.run_settings(base))  # it is checked before a model is loaded
    loading.expert_reduction(base)
    return base


def _base_network(base_values, values, model):
    """Returns the base, with the weights of `model` if it is of the same file."""
    if base_values.model != values.model:
        other = loading.load(base_values, on_one_device=True)
        if other.tokenizer.vocabulary.tokens != model.tokenizer.vocabulary.tokens:
            raise UsageError(f"--against must name a model of the same vocabulary, got {base_values.model}.")
        return other
    setting, layers = loading.expert_reduction(base_values)
    return Network(
        params=model.params,
        config=model.config,
        run=RunConfig(**loading.run_settings(base_values)),
        expert_reduction=reduction_lib.per_layer(model.config, setting, layers),
    )


def _tell_perplexity(found, values, model):
    """Prints what was found at the end, and keeps it where `--out` says."""
    is_divergence = isinstance(found, divergence.Divergence)
    if is_divergence:
        loading.write(f"\n{tables.divergence_statistics(found)}\n")
        record, rows = tables.divergence_record(found), tables.divergence_rows(found)
    else:
        loading.write(tables.final_estimate(found) + "\n")
        record, rows = tables.perplexity_record(found), tables.perplexity_rows(found)
    if values.out is None:
        return
    about = _about(values, model) | record
    if is_divergence:
        name = pathlib.Path(values.kl_divergence_base or values.model).name
        about |= dict(base=name if values.against is None else f"{name} {values.against}".strip())
    plot = measure_plots.of_divergence if is_divergence else measure_plots.of_perplexity
    _keep(values.out, "perplexity", about, rows, plot(found))


def _keep(folder, name, record, rows, figure):
    """Writes a record, or lines of them, with a table of rows and a plot."""
    if isinstance(record, list):
        files = {f"{name}.jsonl": tables.json_lines(record).encode()}
    else:
        files = {f"{name}.json": result_files.json_bytes(record)}
    files |= {f"{name}.csv": result_files.csv_bytes(rows), f"{name}.png": result_files.png_bytes(figure)}
    result_files.write(folder, files)


def _about(values, model):
    """Returns how a model is run, with the keys of llama-bench where that has one."""
    run = model.run
    adapters = [f"{pathlib.Path(path).name} x {scale:g}" for path, scale in loading.adapters(values)]
    return dict(
        model_filename=pathlib.Path(values.model).name,
        backend=jax.default_backend().upper(),
        n_threads=_threads(values),
        jax=jax.__version__,
        mla=int(run.mla),
        flash_attn=int(run.flash),
        type_k=run.cache_type,
        type_rope=run.rope_type,
        hadamard_size=run.hadamard_size,
        expert_reduction=reduction_lib.describe(model.expert_reduction),
        lora=", ".join(adapters),
    )


def _sizes(values, model):
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: not isinstance(leaf, dict | tuple))
    return dict(
        model_type=pathlib.Path(values.model).stem,
        model_size=sum(part.nbytes for part in jax.tree.leaves(model.params)),
        model_n_params=sum(math.prod(leaf.shape) for leaf in leaves),
    )


def _threads(values):
    if values.threads is not None:
        return values.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _counts(written, text, least=1):
    """Reads whole numbers with commas between them; 0 is none of them where it must be more."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"{written} must be whole numbers with commas between them, got {text!r}.")
    return [number for number in map(int, parts) if number >= least]


def _check_out(folder, has_plot=True):
    if folder is None:
        return
    if not pathlib.Path(folder).is_dir():
        raise UsageError(f"--out must be a folder that exists, got {folder!r}.")
    if has_plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--out needs matplotlib for its plot; install it, or the extra `notebooks`.")
