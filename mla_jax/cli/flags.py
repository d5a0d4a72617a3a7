"""Every flag of every command, named as in ik_llama.cpp."""

from absl import flags

from mla_jax import config as config_lib
from mla_jax import generate as generate_lib
from mla_jax import sampler
from mla_jax.cli import host_flags, placement_flags
from pallas_kernels import tuning

ALIASES = {
    "m": "model",
    "p": "prompt",
    "n": "predict",
    "n_predict": "predict",
    "c": "ctx_size",
    "mla_use": "mla",
    "fa": "flash_attn",
    "ctk": "cache_type_k",
    "kv_cache_dtype": "cache_type_k",
    "ngl": "n_gpu_layers",
    "gpu_layers": "n_gpu_layers",
    "b": "batch_size",
    "ub": "ubatch_size",
    "t": "threads",
    "s": "seed",
    "temperature": "temp",
    "ger": "grouped_expert_routing",
    "sys": "system_prompt",
    "h": "help",
    "ser": "smart_expert_reduction",
    "khad": "k_cache_hadamard",
    "vhad": "v_cache_hadamard",
    "ctv": "cache_type_v",
    "amb": "attention_max_batch",
    "rtr": "run_time_repack",
    "ot": "override_tensor",
    "cmoe": "cpu_moe",
    "ncmoe": "n_cpu_moe",
    "sm": "split_mode",
    "ts": "tensor_split",
    "mg": "main_gpu",
    "fmoe": "fused_moe",
    "mqkv": "merge_qkv",
    "np": "parallel",
    "tb": "threads_batch",
    "f": "file",
    "e": "escape",
    "thp": "transparent_huge_pages",
    "nkvo": "no_kv_offload",
    "no_fmoe": "no_fused_moe",
    "muge": "merge_up_gate_experts",
    "gr": "graph_reuse",
    "custom_q": "custom",
    "o": "out",
    "split_max_size": "max_size",
    "split_max_tensors": "max_tensors",
}

_NOT_YET = "it has no effect in this version."
REFUSED = {
    "v_cache_hadamard": "values are a part of the latent cache and are not rotated apart.",
    "cache_type_v": "values are a part of the latent cache, so its type is that of --cache-type-k.",
    "split_mode": "devices share out the model by --mesh, and layers by -ot.",
    "tensor_split": "devices have equal parts of the model, by --mesh.",
    "fused_moe": f"the expert product has one form, so {_NOT_YET}",
    "merge_qkv": f"weights are read as the file has them, so {_NOT_YET}",
    "parallel": f"one sequence is generated at a time, so {_NOT_YET}",
    "escape": "the prompt is taken as it is; a shell writes a newline as $'\\n'.",
    "samplers": "the order is fixed: penalties, top-k, typical, top-p, min-p, temperature.",
    "transparent_huge_pages": "weights lie in huge pages already, unless their file is mapped.",
    "no_kv_offload": "rows of a layer lie on the device of its attention; -ot moves both.",
    "no_fused_moe": f"the expert product has one form, so {_NOT_YET}",
    "merge_up_gate_experts": f"weights are read as the file has them, so {_NOT_YET}",
    "graph_reuse": f"every step is one compiled call, so {_NOT_YET}",
    "threads_batch": "prompt and generation use the same threads; give --threads.",
}

_INT32_UPPER = 2**31 - 1
_SEED_UPPER = 2**32 - 1


def define_model(values: flags.FlagValues) -> None:
    """Defines which model is read."""
    default = str(generate_lib.PACKAGED_MODEL)
    flags.DEFINE_string("model", default, "GGUF file; without it, the packaged model.", flag_values=values)


def _size(values):
    own = dict(flag_values=values)
    flags.DEFINE_integer(
        "ctx_size",
        None,
        "tokens of context; 0: the model's own limit; else that or 8192.",
        lower_bound=0,
        upper_bound=_INT32_UPPER,
        **own,
    )
    flags.DEFINE_enum(
        "mla", "3", "0 1 2 3".split(), "0: cache per head, 1: absorbed, 2: mixed, 3: FlashMLA-3.", **own
    )


def define_run(values: flags.FlagValues) -> None:
    """Defines how a model is run."""
    own = dict(flag_values=values)
    _size(values)
    flags.DEFINE_enum(
        "flash_attn", "on", ["on", "off", "auto"], "on and auto: attend to the cache in chunks.", **own
    )
    _cache(own)
    flags.DEFINE_integer(
        "attention_max_batch",
        256,
        "MiB that attention holds at a time, by groups of heads; 0: any.",
        lower_bound=0,
        upper_bound=_INT32_UPPER,
        **own,
    )
    flags.DEFINE_integer(
        "batch_size", 2048, "prompt tokens at a time; the smaller of -b and -ub counts.", lower_bound=1, **own
    )
    flags.DEFINE_integer(
        "ubatch_size", generate_lib.DEFAULT_UBATCH, "see --batch-size.", lower_bound=1, **own
    )
    _device(own)
    placement_flags.define_placement(values)
    placement_flags.define_mesh(values)
    text = "weights on the CPU stay in the file. [if they hardly fit into memory]"
    flags.DEFINE_boolean("mmap", None, text, **own)
    flags.DEFINE_boolean("mlock", False, "lock the weights in memory.", **own)
    text = "lay weights out for the CPU kernels, and map none. [unless mapped]"
    flags.DEFINE_boolean("run_time_repack", None, text, **own)
    flags.DEFINE_boolean(
        "grouped_expert_routing", True, "route within expert groups if the file has them.", **own
    )
    flags.DEFINE_string(
        "smart_expert_reduction", None, "Kmin,t: drop experts beyond Kmin below t times the best.", **own
    )
    flags.DEFINE_string("ser_layers", None, 'JSON file of such settings by layer: {"3": [4, 0.2]}.', **own)
    _lora(own)


def _lora(own):
    flags.DEFINE_multi_string("lora", [], "adapter: GGUF file or PEFT folder; several add up.", **own)
    flags.DEFINE_multi_string("lora_scaled", [], "FILE SCALE: an adapter, and what multiplies it.", **own)


def _autotune(own):
    flags.DEFINE_integer(
        "ctx_size",
        None,
        "longest context; without it, the model's own.",
        lower_bound=1,
        upper_bound=_INT32_UPPER,
        **own,
    )
    _ubatch(own)
    _cache_types(own)
    flags.DEFINE_string("type", "q4_K", "of the weights, if MODEL is the name of a preset.", **own)
    flags.DEFINE_string("out", None, f"folder to write to; without it, {tuning.USER_FOLDER}.", **own)


def _ubatch(own):
    text = "prompt tokens at a time."
    flags.DEFINE_integer("ubatch_size", generate_lib.DEFAULT_UBATCH, text, lower_bound=1, **own)


def _rope(own):
    types = config_lib.CACHE_TYPES
    flags.DEFINE_enum("cache_type_rope", None, types, "cache type of the rotary part, if another.", **own)


def _cache_types(own):
    types = config_lib.CACHE_TYPES
    flags.DEFINE_enum("cache_type_k", "f16", types, " ".join(types), **own)
    _rope(own)


def _cache(own):
    _cache_types(own)
    flags.DEFINE_boolean("k_cache_hadamard", False, "rotate before quantising; for low bits.", **own)
    sizes = [str(size) for size in config_lib.HADAMARD_SIZES]
    flags.DEFINE_enum("hadamard_size", None, sizes, "latents that are rotated together; 64.", **own)


def define_sampling(values: flags.FlagValues) -> None:
    """Defines how tokens are drawn."""
    own = dict(flag_values=values)
    flags.DEFINE_integer(
        "predict", -1, "tokens to draw; -1: until the context is full.", lower_bound=-1, **own
    )
    flags.DEFINE_integer(
        "seed",
        -1,
        "same seed, same text; -1: another each time.",
        lower_bound=-1,
        upper_bound=_SEED_UPPER,
        **own,
    )
    flags.DEFINE_float("temp", 0.8, "temperature; 0: always the likeliest token.", lower_bound=0.0, **own)
    flags.DEFINE_integer(
        "top_k",
        40,
        "draw from the k likeliest tokens; 0: off.",
        lower_bound=0,
        upper_bound=_INT32_UPPER,
        **own,
    )
    flags.DEFINE_float("top_p", 0.95, "draw from the likeliest tokens of this probability; 1: off.", **own)
    flags.DEFINE_float("min_p", 0.05, "drop tokens below this share of the likeliest's; 0: off.", **own)
    flags.DEFINE_float("typical", 1.0, "draw from locally typical tokens of this probability; 1: off.", **own)
    flags.DEFINE_float("repeat_penalty", 1.0, "divide the logits of recent tokens; 1: off.", **own)
    flags.DEFINE_integer(
        "repeat_last_n",
        sampler.NUM_RECENT,
        "recent tokens that penalties see.",
        lower_bound=0,
        upper_bound=sampler.NUM_RECENT,
        **own,
    )
    flags.DEFINE_float("presence_penalty", 0.0, "subtract from logits of recent tokens; 0: off.", **own)
    flags.DEFINE_float("frequency_penalty", 0.0, "subtract once per occurrence; 0: off.", **own)


def _prompt_cache(own):
    flags.DEFINE_string("prompt_cache", None, "file that keeps the prompt's cache for the next run.", **own)
    flags.DEFINE_boolean("prompt_cache_all", False, "keep the cache of what was drawn as well.", **own)
    flags.DEFINE_boolean("prompt_cache_ro", False, "read the file and leave it as it is.", **own)


def _sweep(own):
    flags.DEFINE_string("text", None, "file to read; without it, held-out sources of Python.", **own)
    flags.DEFINE_integer("tokens", 16384, "tokens of the text to predict.", lower_bound=2, **own)
    flags.DEFINE_integer("window", 512, "tokens of context.", lower_bound=1, **own)
    flags.DEFINE_integer("predict", 32, "tokens to draw per round, for the speed.", lower_bound=2, **own)
    flags.DEFINE_string("out", None, "folder to write ser-sweep.json and ser-sweep.png to.", **own)


def _train(values):
    from mla_jax import train as train_lib  # orbax takes half a second to import: not for other commands

    own, plan = dict(flag_values=values), train_lib.TrainConfig()
    flags.DEFINE_string("out", None, "GGUF file to write.", **own)
    flags.DEFINE_string("folder", "runs/train", "checkpoints; a run resumes from the newest there.", **own)
    flags.DEFINE_integer("steps", plan.steps, "optimiser steps.", lower_bound=1, **own)
    flags.DEFINE_integer("batch", plan.batch, "windows per step.", lower_bound=1, **own)
    flags.DEFINE_integer("window", plan.window, "tokens per window.", lower_bound=1, **own)
    flags.DEFINE_integer(
        "long_steps", plan.long_steps, "last steps, with windows of 2048 tokens.", lower_bound=0, **own
    )
    flags.DEFINE_float("learning_rate", plan.learning_rate, "peak learning rate.", lower_bound=0.0, **own)
    flags.DEFINE_integer(
        "seed", plan.seed, "of weights and batches.", lower_bound=0, upper_bound=_SEED_UPPER, **own
    )


def _finetune(values):
    from mla_jax import finetune as finetune_lib  # as above

    own, plan = dict(flag_values=values), finetune_lib.FinetuneConfig()
    define_model(values)
    flags.DEFINE_string("text", None, "what is learned: a text, or JSON lines (.jsonl).", **own)
    flags.DEFINE_string("held_out", None, "the same, to tell the perplexity before and after.", **own)
    flags.DEFINE_string("out", None, "adapter to write: a GGUF file (.gguf), or a folder for PEFT.", **own)
    flags.DEFINE_string("folder", "runs/finetune", "checkpoints; a run resumes from the newest there.", **own)
    flags.DEFINE_integer("steps", plan.steps, "optimiser steps.", lower_bound=1, **own)
    flags.DEFINE_integer("batch", plan.batch, "windows per step.", lower_bound=1, **own)
    flags.DEFINE_integer("window", plan.window, "tokens per window.", lower_bound=1, **own)
    flags.DEFINE_float("learning_rate", plan.learning_rate, "peak learning rate.", lower_bound=0.0, **own)
    flags.DEFINE_integer("rank", plan.rank, "rank of the adapters.", lower_bound=1, **own)
    flags.DEFINE_float("alpha", plan.alpha, "scale of the adapters, times their rank.", **own)
    own_target = "REGEX of names of weights that get adapters; may be repeated. [those of attention]"
    flags.DEFINE_multi_string("target", [], own_target, **own)
    flags.DEFINE_integer(
        "seed", plan.seed, "of adapters and batches.", lower_bound=0, upper_bound=_SEED_UPPER, **own
    )
    _device(own)


def _device(own):
    flags.DEFINE_integer(
        "n_gpu_layers", 0, "0: run on the CPU; any other number: all on the GPU.", lower_bound=0, **own
    )
    flags.DEFINE_integer("threads", None, "CPU cores to use; without it, all.", lower_bound=1, **own)
    flags.DEFINE_boolean(
        "gpu_kernels", True, "on a GPU, run the kernels of this project; without them XLA does.", **own
    )


def _quantize(own):
    flags.DEFINE_string("input", None, "GGUF file to read, or the first part of a split one.", **own)
    flags.DEFINE_string("out", None, "GGUF file to write; it may be INPUT.", **own)
    flags.DEFINE_string("type", None, "Q8_0, Q4_K, ...; in any case, or Q4_K_M and the like.", **own)
    flags.DEFINE_multi_string(
        "custom",
        [],
        "REGEX=TYPE, ...: types by name of tensor; may be repeated.",
        **own,
    )
    flags.DEFINE_string("output_tensor_type", None, "type of output.weight.", **own)
    flags.DEFINE_string("token_embedding_type", None, "type of token_embd.weight.", **own)
    flags.DEFINE_string("imatrix", None, "file of what columns matter, for types of few bits.", **own)
    flags.DEFINE_boolean("allow_requantize", False, "encode anew what is quantised already.", **own)
    _dry_run(own)


def _convert(own):
    flags.DEFINE_string("input", None, "folder of a checkpoint, or GGUF file.", **own)
    flags.DEFINE_string("out", None, "GGUF file to write, or folder.", **own)
    kinds = ["gguf", "safetensors", "orbax"]
    flags.DEFINE_enum("to", None, kinds, "without it, gguf of a folder and safetensors of a file.", **own)
    flags.DEFINE_string("type", "bf16", "of weight matrices in a GGUF file, as for quantize.", **own)
    nextn = "keep layers that predict a second token: not for ik_llama.cpp."
    flags.DEFINE_boolean("keep_nextn", True, nextn, **own)
    dtypes = ["bfloat16", "float16", "float32"]
    flags.DEFINE_enum("dtype", "bfloat16", dtypes, "of safetensors: float32, float16 or bfloat16.", **own)
    _dry_run(own)


def _split(own):
    flags.DEFINE_string("input", None, "GGUF file to read, or the first part of a split one.", **own)
    flags.DEFINE_string("prefix", None, "path of the parts: PREFIX-00001-of-0000N.gguf.", **own)
    flags.DEFINE_string("max_size", None, "bytes of tensors in a part: 4G, 500M, ...", **own)
    flags.DEFINE_integer(
        "max_tensors", None, "tensors in a part; 128 if there is no --max-size.", lower_bound=1, **own
    )
    _dry_run(own)


def _merge(own):
    flags.DEFINE_string("first", None, "first part of a split GGUF file, or a whole one.", **own)
    flags.DEFINE_string("out", None, "GGUF file to write.", **own)
    text = "tensors begin at multiples of it, else as in the parts; 64: for --mmap."
    flags.DEFINE_enum("alignment", None, ["32", "64", "4096"], text, **own)
    _dry_run(own)


def _diff(own):
    flags.DEFINE_string("first", None, "GGUF file that errors are relative to.", **own)
    flags.DEFINE_string("second", None, "GGUF file to compare with it.", **own)


def _export_lora(own):
    flags.DEFINE_string("model", None, "GGUF file to read, or the first part of a split one.", **own)
    _lora(own)
    flags.DEFINE_string("out", None, "GGUF file to write; it may be the model.", **own)
    flags.DEFINE_string("type", None, "of weights that are changed, as for quantize; else their own.", **own)
    _dry_run(own)


def _dry_run(own):
    flags.DEFINE_boolean("dry_run", False, "print what would be written, and write nothing.", **own)


def command_flags(command: str) -> flags.FlagValues:
    """Returns the flags of `command` at their defaults, in the order that help shows."""
    values = flags.FlagValues()
    on_files = {"quantize": _quantize, "convert": _convert, "split": _split, "merge": _merge, "diff": _diff}
    on_files["export-lora"] = _export_lora
    if command in on_files:
        on_files[command](dict(flag_values=values))
    elif command in ("train", "finetune"):
        (_train if command == "train" else _finetune)(values)
    else:
        define_model(values)
    if command == "generate":
        flags.DEFINE_string("prompt", None, "text to continue.", flag_values=values)
        flags.DEFINE_string("file", None, "file with the text, in place of --prompt.", flag_values=values)
    if command == "chat":
        flags.DEFINE_string("system_prompt", None, "first message of the chat.", flag_values=values)
    if command == "ser-sweep":
        _sweep(dict(flag_values=values))
    if command in ("generate", "chat"):
        define_sampling(values)
    if command in ("generate", "chat", "ser-sweep"):
        define_run(values)
    if command == "plan":
        _size(values)
        _cache_types(dict(flag_values=values))
        _ubatch(dict(flag_values=values))
        placement_flags.define_plan(values)
    if command == "autotune":
        _autotune(dict(flag_values=values))
    if command == "generate":
        host_flags.define_hosts(values)
        _prompt_cache(dict(flag_values=values))
        flags.DEFINE_boolean("expert_stats", False, "tell which experts were used.", flag_values=values)
        flags.DEFINE_boolean("display_prompt", True, "print the prompt first.", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this.", flag_values=values)
    return values
