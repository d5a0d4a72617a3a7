"""The flags of `serve`, named as in llama-server."""

from absl import flags

from mla_jax.cli import flags as flags_lib
from mla_jax.cli import host_flags

ALIASES = flags_lib.ALIASES | {
    "a": "alias",
    "cb": "cont_batching",
    "nocb": "nocont_batching",
    "cram": "cache_ram",
    "to": "timeout",
    "sps": "slot_prompt_similarity",
    "mm": "mmproj",
    "md": "model_draft",
    "embeddings": "embedding",
    "reranking": "rerank",
    "typical_p": "typical",
}

_GRAMMARS = "requests bring grammars of their own, in `grammar`, `json_schema` or `response_format`."
REFUSED = {key: why for key, why in flags_lib.REFUSED.items() if key != "parallel"} | {
    "file": "a server is given its prompts by requests.",
    "escape": "a server is given its prompts by requests.",
    "prompt": "a server is given its prompts by requests.",
    "system_prompt": "requests bring a system message of their own.",
    "grammar": _GRAMMARS,
    "grammar_file": _GRAMMARS,
    "json_schema": _GRAMMARS,
    "embedding": "this server generates text and makes no embeddings.",
    "rerank": "this server generates text and ranks none.",
    "pooling": "this server generates text and makes no embeddings.",
    "mmproj": "this server reads text alone.",
    "lora_init_without_apply": "adapters are applied from the start; --lora-scaled FILE 0 leaves one out.",
    "model_draft": "tokens are drawn by the model itself, one at a time.",
    "draft": "tokens are drawn by the model itself, one at a time.",
    "context_shift": "there is no context shift: an answer ends when the context is full.",
    "cache_reuse": "cached tokens are reused at the beginning of a prompt alone, and always are.",
    "slot_prompt_similarity": "a prompt takes what is cached of it in any slot.",
    "path": "the chat page is the only file that is served.",
    "api_prefix": "routes lie at the root; a proxy can move them.",
    "reasoning_budget": 'requests say it by `chat_template_kwargs`, as {"enable_thinking": false}.',
    "log_disable": "only what goes wrong is logged.",
    "verbose": "only what goes wrong is logged, and prompts never are.",
}


def define_server(values: flags.FlagValues) -> None:
    """Defines where and for whom it is served."""
    own = dict(flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at.", **own)
    flags.DEFINE_integer("port", 8080, "0: any that is free.", lower_bound=0, upper_bound=65535, **own)
    flags.DEFINE_multi_string("api_key", [], "key of requests, or several with commas; repeatable.", **own)
    flags.DEFINE_string("api_key_file", None, "file of keys, one a line; $MLA_API_KEY adds one.", **own)
    text = "listen beyond this machine without a key."
    flags.DEFINE_boolean("allow_unauthenticated", False, text, **own)
    text = "Host headers that are taken, with commas; else any, or this machine's."
    flags.DEFINE_string("allowed_hosts", None, text, **own)
    flags.DEFINE_string("cors_origins", None, "origins of pages that may connect, with commas.", **own)
    flags.DEFINE_string("ssl_cert_file", None, "certificate in PEM; with --ssl-key-file: HTTPS.", **own)
    flags.DEFINE_string("ssl_key_file", None, "its key.", **own)
    flags.DEFINE_string("alias", None, "name of the model in answers; else that of the file.", **own)
    flags.DEFINE_boolean("webui", True, "serve the chat page at /.", **own)
    flags.DEFINE_boolean("slots", True, "serve /slots.", **own)
    flags.DEFINE_boolean("metrics", True, "serve /metrics.", **own)
    flags.DEFINE_string("slot_save_path", None, "folder that slots are saved to.", **own)


def define_limits(values: flags.FlagValues) -> None:
    """Defines how much is served at once, and for how long."""
    own = dict(flag_values=values)
    text = "requests computed at once; they share --ctx-size."
    flags.DEFINE_integer("parallel", 4, text, lower_bound=1, upper_bound=256, **own)
    text = "requests that may wait; others are sent away with 429."
    flags.DEFINE_integer("max_waiting", 128, text, lower_bound=0, upper_bound=1 << 16, **own)
    text = "tokens that their prompts may have together."
    flags.DEFINE_integer("max_waiting_tokens", 1 << 20, text, lower_bound=0, **own)
    text = "MiB of the cache that prompts are kept in; 0: none, -1: any."
    flags.DEFINE_integer("cache_ram", -1, text, lower_bound=-1, upper_bound=2**31 - 1, **own)
    flags.DEFINE_boolean("cont_batching", True, "compute requests together; always.", **own)
    flags.DEFINE_integer(
        "timeout", 600, "seconds that a client may leave its answer unread.", lower_bound=1, **own
    )
    flags.DEFINE_integer("max_seconds", 3600, "that a request may take to be answered.", lower_bound=1, **own)
    flags.DEFINE_integer(
        "max_body_bytes", 1 << 20, "of a request.", lower_bound=1024, upper_bound=1 << 30, **own
    )
    text = "that requests may go on for after SIGTERM."
    flags.DEFINE_integer("drain_seconds", 30, text, lower_bound=0, **own)
    text = "without a step of a busy engine: /ready is 503."
    flags.DEFINE_integer("stall_seconds", 120, text, lower_bound=1, **own)
    flags.DEFINE_integer(
        "threads_http", 8, "threads that read prompts.", lower_bound=1, upper_bound=64, **own
    )
    flags.DEFINE_boolean("warmup", True, "compile before the first request.", **own)


def define_chat(values: flags.FlagValues) -> None:
    """Defines how conversations become prompts, and answers messages."""
    own = dict(flag_values=values)
    flags.DEFINE_boolean("jinja", True, "chat templates are jinja; always.", **own)
    flags.DEFINE_string("chat_template", None, "jinja, or the name of a built-in one.", **own)
    flags.DEFINE_string("chat_template_file", None, "file of the chat template.", **own)
    flags.DEFINE_string("chat_template_kwargs", None, "JSON object of variables of the template.", **own)
    text = "auto, deepseek: reasoning beside the content; none: in it."
    flags.DEFINE_string("reasoning_format", "auto", text, **own)


def command_flags() -> flags.FlagValues:
    """Returns the flags of `serve` at their defaults, in the order that help shows."""
    values = flags.FlagValues()
    flags_lib.define_model(values)
    define_server(values)
    define_limits(values)
    define_chat(values)
    flags_lib.define_sampling(values)
    flags_lib.define_run(values)
    host_flags.define_hosts(values)
    flags.DEFINE_boolean("help", False, "show this.", flag_values=values)
    return values
