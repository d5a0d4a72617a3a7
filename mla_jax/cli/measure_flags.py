"""The flags of `perplexity`, `sweep-bench` and `bench`, named as in llama.cpp and ik_llama.cpp."""

from absl import flags

from mla_jax.cli import flags as flags_lib

COMMANDS = ("perplexity", "sweep-bench", "bench")

ALIASES = flags_lib.ALIASES | {
    "save_all_logits": "kl_divergence_base",
    "p": "n_prompt",
    "n": "n_gen",
    "predict": "n_gen",
    "n_predict": "n_gen",
    "d": "n_depth",
    "r": "repetitions",
    "o": "output",
    "wb": "warmup_batch",
}

_TEXT_ALONE = "texts are measured, and no questions with answers to choose from."
REFUSED = flags_lib.REFUSED | {
    "ppl_stride": "windows follow each other and do not overlap.",
    "hellaswag": _TEXT_ALONE,
    "winogrande": _TEXT_ALONE,
    "multiple_choice": _TEXT_ALONE,
    "warmup_batch": "each kind of request is made once before it is measured.",
}


def _perplexity(values):
    own = dict(flag_values=values)
    flags.DEFINE_string("file", None, "text to read; without it, held-out sources of Python.", **own)
    flags.DEFINE_integer("chunks", None, "windows at most; without it, all.", lower_bound=1, **own)
    text = "file of saved logits: written, or, with --kl-divergence, read."
    flags.DEFINE_string("kl_divergence_base", None, text, **own)
    flags.DEFINE_boolean("kl_divergence", False, "measure the distance to a base.", **own)
    text = 'flags of a base to run beside it: "-ctk f32"; others as here.'
    flags.DEFINE_string("against", None, text, **own)
    flags.DEFINE_string("out", None, "folder to write perplexity.json, .csv and .png to.", **own)
    flags_lib.define_run(values)
    values.set_default("ctx_size", 512)
    values["ctx_size"].help = "tokens of a window; 0: the model's own limit."
    values["batch_size"].help = "tokens of windows that run together."
    values["ubatch_size"].help = "tokens of a window computed at a time."


def _sweep_bench(values):
    own = dict(flag_values=values)
    text = "tokens to draw at each depth; without it, a quarter of -ub."
    flags.DEFINE_integer("n_gen", None, text, lower_bound=1, **own)
    flags.DEFINE_enum("output_format", "table", ["table", "jsonl"], "of what is printed.", **own)
    flags.DEFINE_string("out", None, "folder to write sweep-bench.jsonl, .csv and .png to.", **own)
    flags_lib.define_run(values)
    values["batch_size"].help = "see --ubatch-size."
    values["ubatch_size"].help = "tokens of a prompt; the smaller of -b and -ub counts."


def _bench(values):
    own = dict(flag_values=values)
    flags.DEFINE_string("n_prompt", "512", "tokens of prompts, with commas; 0: none.", **own)
    flags.DEFINE_string("n_gen", "128", "tokens to draw, with commas; 0: none.", **own)
    flags.DEFINE_string("n_depth", "0", "tokens in the cache before, with commas.", **own)
    flags.DEFINE_integer("repetitions", 5, "runs of each, after one to warm up.", lower_bound=1, **own)
    kinds = ["md", "csv", "json", "jsonl"]
    flags.DEFINE_enum("output", "md", kinds, "of what is printed.", **own)
    flags.DEFINE_string("out", None, "folder to write bench.json, .csv and .md to.", **own)
    flags_lib.define_run(values)
    values["ctx_size"].help = "tokens of context; without it, as many as are needed."


def command_flags(command: str) -> flags.FlagValues:
    """Returns the flags of `command`, one of `COMMANDS`, at their defaults, in the order that help shows."""
    values = flags.FlagValues()
    flags_lib.define_model(values)
    {"perplexity": _perplexity, "sweep-bench": _sweep_bench, "bench": _bench}[command](values)
    flags.DEFINE_boolean("help", False, "show this.", flag_values=values)
    return values
