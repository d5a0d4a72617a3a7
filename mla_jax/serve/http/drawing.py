"""How a text is to be drawn, as requests say it: the fields that all routes with completions share."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mla_jax import expert_reduction as reduction_lib
from mla_jax import sampler
from mla_jax.serve.http import schema
from mla_jax.serve.http.api_error import ApiError, invalid
from mla_jax.serve.request import MAX_BIASED, MAX_LOGPROBS

MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_CHOICES = 16  # texts of one request: n times the number of prompts
_INT32_UPPER = 2**31 - 1
_BIAS_UPPER = 100.0


def _token_limit(value, name):
    if type(value) is not int or not (value == -1 or 1 <= value <= _INT32_UPPER):
        raise invalid(name, f"-1 for no limit or a whole number in [1, {_INT32_UPPER}]", value)
    return None if value == -1 else value


def _stop(value, name):
    one = schema.Text(MAX_STOP_CHARS, min_chars=1)
    if isinstance(value, str):
        return (one.read(value, name),)
    if not isinstance(value, list):
        raise invalid(name, "a string or a list of strings", value)
    return schema.ListOf(one, MAX_STOPS).read(value, name)


def _logit_bias(value, name):
    if isinstance(value, list):  # [[id, bias], ...], as llama-server's clients write it
        if not all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in value):
            raise invalid(name, "an object of numbers by token id, or a list of pairs of them", value)
        pairs = [(str(token), bias) for token, bias in value]
    else:
        pairs = list(schema.Object().read(value, name).items())
    if len(pairs) > MAX_BIASED:
        raise ApiError(f"{name} must have at most {MAX_BIASED} token ids, got {len(pairs)}.", param=name)
    biases, number = {}, schema.Number(-_BIAS_UPPER, _BIAS_UPPER)
    for token, bias in pairs:
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= _INT32_UPPER):
            wanted = f"whole numbers in [0, {_INT32_UPPER}]"
            raise invalid(name, wanted, token, part=f"the token ids of {name}")
        biases[int(token)] = number.read(bias, f"{name}[{token}]")
    return tuple(biases.items())


def _ser(value, name):
    text = schema.Text(64).read(value, name)
    try:
        return reduction_lib.parse(text)
    except ValueError:
        raise invalid(name, '"Kmin,t" with whole Kmin from 1 and finite t from 0 on', value) from None


def _schema_object(value, name):
    return ("json_schema", json.dumps(schema.Object().read(value, name)))


def _grammar(value, name):
    return ("grammar", schema.Text(min_chars=1).read(value, name))


def _response_format(value, name):
    form = schema.Object().read(value, name)
    kind = schema.Choice(("text", "json_object", "json_schema")).read(form.get("type"), f"{name}.type")
    if kind == "text":
        return None
    if kind == "json_object" and "schema" not in form:
        return ("json_object", "")
    if kind == "json_object":
        return _schema_object(form["schema"], f"{name}.schema")
    if "json_schema" not in form:  # llama-server takes it without the wrapping
        return _schema_object(form.get("schema"), f"{name}.json_schema")
    inner = schema.Object().read(form["json_schema"], f"{name}.json_schema")
    return _schema_object(inner.get("schema"), f"{name}.json_schema.schema")


def _stream_options(value, name):
    table = {"include_usage": schema.Boolean(), "include_obfuscation": schema.Boolean()}
    return schema.read(table, schema.Object().read(value, name), f"{name}.").get("include_usage", False)


_BAD_BIASES = (
    5,
    "a",
    {"x": 1},
    {"-1": 1},
    {"1": 101},
    {"1": "a"},
    {"1": True},
    {"1.5": 1},
    {str(2**31): 1},
    [[1]],
)
_BAD_FORMATS = (
    "json",
    {},
    {"type": "xml"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": 3},
)
_SAMPLING = {
    "temperature": schema.Number(0, 100),
    "top_p": schema.Number(0, 1, above_lower=True),
    "top_k": schema.Integer(-1, _INT32_UPPER),
    "min_p": schema.Number(0, 1, below_upper=True),
    "typical_p": schema.Number(0, 1, above_lower=True),
    "repeat_penalty": schema.Number(0, 100, above_lower=True),
    "repeat_last_n": schema.Integer(0, sampler.NUM_RECENT),
    "presence_penalty": schema.Number(-2, 2),
    "frequency_penalty": schema.Number(-2, 2),
    "seed": schema.Integer(-1, 2**32 - 1),
}
_OWN_NAMES = {"repeat_last_n": "penalty_last_n"}  # of SamplingParams, where they differ
_LIMIT = schema.Special(_token_limit, bad=(0, -2, 2**31, 1.5, "8", True, [], {}))
TABLE: Mapping[str, schema.Kind] = _SAMPLING | {
    "max_tokens": _LIMIT,
    "max_completion_tokens": _LIMIT,
    "n_predict": _LIMIT,
    "n": schema.Integer(1, MAX_CHOICES),
    "stream": schema.Boolean(),
    "stream_options": schema.Special(_stream_options, bad=(True, [], {"include_usage": 1})),
    "stop": schema.Special(_stop, bad=(5, "", ["a"] * 5, "a" * 257, [""], [1], [["a"]], {}, True)),
    "logit_bias": schema.Special(_logit_bias, bad=(*_BAD_BIASES, {str(i): 1 for i in range(MAX_BIASED + 1)})),
    "ser": schema.Special(
        _ser, bad=("", "6", "0,1", "1,-1", "1,nan", "1,inf", "1,2,3", "a,b", 6, [6, 1], True)
    ),
    "grammar": schema.Special(_grammar, bad=("", 5, [], {}, True)),
    "json_schema": schema.Special(_schema_object, bad=(5, [], "{}", True)),
    "response_format": schema.Special(_response_format, bad=_BAD_FORMATS),
    "ignore_eos": schema.Boolean(),
    "cache_prompt": schema.Boolean(),
    "timings_per_token": schema.Boolean(),
    "id_slot": schema.Neutral((-1,)),
    "model": schema.Text(256),
    "user": schema.Text(1024),
    # Sampling of other servers: their clients send it at values that turn it off.
    "mirostat": schema.Neutral((0,)),
    "dynatemp_range": schema.Neutral((0,)),
    "xtc_probability": schema.Neutral((0,)),
    "dry_multiplier": schema.Neutral((0,)),
    "top_n_sigma": schema.Neutral((-1, 0)),
    "tfs_z": schema.Neutral((1,)),
    "min_keep": schema.Neutral((0,)),
    "n_keep": schema.Neutral((0, -1)),
    "n_discard": schema.Neutral((0,)),
    "n_indent": schema.Neutral((0,)),
    "t_max_predict_ms": schema.Neutral((0, -1)),
    "lora": schema.Neutral(([],)),
    "image_data": schema.Neutral(([],)),
    "samplers": schema.Neutral(()),
}
_LIMIT_NAMES = ("max_completion_tokens", "max_tokens", "n_predict")
_GRAMMAR_NAMES = ("grammar", "json_schema", "response_format")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What every route with completions is asked for.

    Attributes:
      sampling: how to draw; its seed is None if the request has none.
      max_tokens: tokens to draw at most, None for as many as the context holds.
      num_choices: texts to draw for each prompt.
      stop: texts that end an answer.
      logit_bias: (token id, number added to its logit) pairs.
      expert_reduction: (Kmin, t) of all layers, None for the server's.
      grammar: kind and text for `grammar.compile`, None for none.
      ignore_eos: draw on past tokens that end a text.
      reuse_prefix: share the cache with requests that begin alike.
      stream: answer piece by piece.
      include_usage: end the stream with the numbers of tokens.
      timings_per_token: tell in each piece how long it took so far.
    """

    sampling: sampler.SamplingParams
    max_tokens: int | None
    num_choices: int
    stop: tuple[str, ...]
    logit_bias: tuple[tuple[int, float], ...]
    expert_reduction: reduction_lib.Setting | None
    grammar: tuple[str, str] | None
    ignore_eos: bool
    reuse_prefix: bool
    stream: bool
    include_usage: bool
    timings_per_token: bool


def from_fields(
    fields: Mapping[str, Any], defaults: sampler.SamplingParams, max_tokens: int | None
) -> Drawing:
    """Returns how to draw.

    Args:
      fields: what `schema.read` made of a body with a table that includes `TABLE`.
      defaults: of fields of sampling that are not there.
      max_tokens: if there is none.

    Raises:
      ApiError: for two limits of tokens that differ, or two grammars.
    """
    changes = {_OWN_NAMES.get(name, name): fields[name] for name in _SAMPLING if name in fields}
    if changes.get("top_k") == -1:
        changes["top_k"] = 0
    if changes.get("seed") == -1:
        changes["seed"] = None
    limits = [fields[name] for name in _LIMIT_NAMES if name in fields]
    if len(set(limits)) > 1:
        raise ApiError("max_tokens must be given once, got several that differ.", param="max_tokens")
    grammars = [(name, fields[name]) for name in _GRAMMAR_NAMES if fields.get(name) is not None]
    if len(grammars) > 1:
        names = " and ".join(name for name, _ in grammars)
        raise ApiError(
            f"only one of {', '.join(_GRAMMAR_NAMES)} must be given, got {names}.", param=grammars[1][0]
        )
    return Drawing(
        sampling=dataclasses.replace(defaults, **changes),
        max_tokens=limits[0] if limits else max_tokens,
        num_choices=fields.get("n", 1),
        stop=fields.get("stop", ()),
        logit_bias=fields.get("logit_bias", ()),
        expert_reduction=fields.get("ser"),
        grammar=grammars[0][1] if grammars else None,
        ignore_eos=fields.get("ignore_eos", False),
        reuse_prefix=fields.get("cache_prompt", True),
        stream=fields.get("stream", False),
        include_usage=fields.get("stream_options", False),
        timings_per_token=fields.get("timings_per_token", False),
    )


LOGPROBS = schema.Integer(0, MAX_LOGPROBS)
