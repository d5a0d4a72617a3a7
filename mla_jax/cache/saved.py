"""A sequence's rows in a safetensors file, to go on from later as if nothing had happened in between.

Tensors `tokens` i32[T] and `layers.I.PART` [T, ...], a part being a leaf of the layer's rows; bfloat16 and
float8 as their bits. Metadata: `format`, `model` (a fingerprint), the settings that decide what a row means,
and `sha256` over all the rest.
"""

import hashlib
import json
import os
import pathlib
import stat
import tempfile

import jax
import numpy as np
import safetensors
import safetensors.numpy

from cpu_kernels import panels
from mla_jax import quant
from mla_jax.cache.rows import Cache
from mla_jax.config import MLAMode, ModelConfig, RunConfig

_FORMAT = "mla-jax cache 1"
_SAMPLES = 4096  # numbers of each weight that a fingerprint looks at
_HEADER_UPPER = 1 << 20  # bytes beside the rows: names, shapes, settings


def fingerprint(config: ModelConfig, params) -> str:
    """Returns a digest that tells models apart.

    It covers the config and, of each weight, its place, shape, dtype and 4,096 numbers at places drawn once
    for all: a fine-tune shows, a single altered number may not.
    """
    digest = hashlib.sha256(repr(config).encode())
    in_panels = lambda leaf: isinstance(leaf, quant.PanelTensor)
    for path, weight in jax.tree_util.tree_leaves_with_path(params, is_leaf=in_panels):
        for name, leaf, shape in _arrays(weight):
            values = np.asarray(leaf).reshape(-1)
            places = np.random.default_rng(0).integers(
                values.size, size=_SAMPLES
            )  # a stride would meet blocks
            if name == ".blocks":
                places = panels.places(places, shape, format=weight.format)
            digest.update(f"{jax.tree_util.keystr(path)}{name} {shape} {leaf.dtype}".encode())
            digest.update(values[places].tobytes())
    return digest.hexdigest()


def _arrays(weight):
    """Yields the end of the path, the array and the shape in blocks of a leaf, or of each part of panels."""
    if not isinstance(weight, quant.PanelTensor):
        yield "", weight, weight.shape
        return
    block_bytes = quant.FORMATS[weight.format].block_bytes
    yield ".blocks", weight.panels, (*weight.shape[:-1], weight.panels.shape[-2], block_bytes)
    if weight.header is not None:
        yield ".header", weight.header, weight.header.shape


def save(
    path: str | os.PathLike,
    cache: Cache,
    tokens,
    *,
    model: str,
    run: RunConfig,
    expert_reduction: str = "off",
    sequence: int = 0,
    pages=None,
) -> int:
    """Writes the rows of a sequence's first tokens; the file is there whole or not at all.

    Args:
      path: the file, replaced if it exists.
      cache: contiguous or paged.
      tokens: ids of the rows to keep, T of them, at most as many as the sequence has.
      model: its `fingerprint`.
      run: how the rows came to be.
      expert_reduction: Smart Expert Reduction in force then, in words.
      sequence: which of the batch.
      pages: i32[M] its pages in a paged cache.

    Returns:
      Bytes written.

    Raises:
      ValueError: for more tokens than rows, or a run with edits.
      OSError: if the file cannot be written.
    """
    tokens = np.asarray(tokens, np.int32)
    places = _places(cache, tokens.size, sequence, pages)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have one axis, got {tokens.ndim}.")
    if tokens.size > int(cache.length[sequence]):
        raise ValueError(f"tokens must be at most the {cache.length[sequence]} rows, got {tokens.size}.")
    parts = {name: _bits(np.asarray(part[places])) for name, part in _named_parts(cache)}
    parts["tokens"] = tokens
    about = {"format": _FORMAT, "model": model} | _settings(run, expert_reduction)
    data = safetensors.numpy.save(parts, about | {"sha256": _digest(parts, about)})
    _write_whole(pathlib.Path(path), data)
    return len(data)


def load(
    path: str | os.PathLike,
    cache: Cache,
    *,
    model: str,
    run: RunConfig,
    expert_reduction: str = "off",
    sequence: int = 0,
    pages=None,
) -> tuple[Cache, list[int]]:
    """Reads what `save` wrote into a sequence of `cache`, whatever it held.

    Args:
      path: the file.
      cache: of the same model and settings; contiguous or paged, whatever it was saved from.
      model: its `fingerprint`.
      run: how the rows will be used.
      expert_reduction: the setting, in the words of `save`.
      sequence: which of the batch.
      pages: i32[M] its pages in a paged cache, which no other sequence shares.

    Returns:
      The cache, in NumPy arrays, and the token ids that it now holds.

    Raises:
      ValueError: for a file that is truncated, altered, of another model or other settings, or has more
        tokens than the sequence has room; or for a run with edits.
      OSError: if the file cannot be read.
    """
    num_slots = cache.layers[0].at(None if pages is None else np.asarray(pages)[None]).num_slots
    per_token = sum(part.nbytes // (part.shape[0] * part.shape[1]) for _, part in _named_parts(cache))
    data = _read_whole(path, upper=_HEADER_UPPER + num_slots * (per_token + 4))
    try:
        parts = safetensors.numpy.load(data)
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got one with {error}.") from None
    _check_about(path, about, {"format": _FORMAT, "model": model} | _settings(run, expert_reduction))
    if about.pop("sha256", None) != _digest(parts, about):
        raise ValueError(f"{path} must be as it was written, but its sha256 differs.")
    tokens = parts.pop("tokens", np.zeros(0))
    if tokens.dtype != np.int32 or tokens.ndim != 1:
        raise ValueError(f"{path}: tokens must be int32 of one axis, got {tokens.dtype}{list(tokens.shape)}.")
    if tokens.size > num_slots:
        raise ValueError(f"{path} must have at most {num_slots} tokens, got {tokens.size}.")
    places = _places(cache, tokens.size, sequence, pages)
    layers = _filled(path, cache, parts, places)
    length = np.array(cache.length)
    length[sequence] = tokens.size
    return Cache(layers=layers, length=length), tokens.tolist()


def _named_parts(cache):
    for i, rows in enumerate(cache.layers):
        for path, part in jax.tree_util.tree_leaves_with_path(rows):
            yield f"layers.{i}{jax.tree_util.keystr(path)}", part


def _places(cache, count, sequence, pages):
    """Returns the index arrays (page, place) of a sequence's first `count` slots."""
    if not 0 <= sequence < cache.length.shape[0]:
        raise ValueError(f"sequence must be in [0, {cache.length.shape[0]}), got {sequence}.")
    num_pages, page_size = jax.tree.leaves(cache.layers)[0].shape[:2]
    pages = np.asarray([sequence] if pages is None else pages, np.int32)[: -(-count // page_size)]
    if pages.size * page_size < count or np.any((pages < 0) | (pages >= num_pages)):
        raise ValueError(f"pages must have room for {count} tokens, got {pages.tolist()} of {num_pages}.")
    slots = np.arange(count, dtype=np.int32)
    return pages[slots // page_size], slots % page_size


def _filled(path, cache, parts, places):
    layers, leaves = cache.layers, []
    for name, part in _named_parts(cache):
        wanted = (len(places[0]), *part.shape[2:])
        found = parts.pop(name, None)
        if found is None or found.shape != wanted or found.dtype != _bits_dtype(part.dtype):
            got = "none" if found is None else f"{found.dtype}{list(found.shape)}"
            raise ValueError(f"{path}: tensor {name} must be {part.dtype}{list(wanted)}, got {got}.")
        leaves.append(np.array(part))
        leaves[-1][places] = found.view(part.dtype)
    if parts:
        raise ValueError(f"{path}: there must be no tensor {min(parts)} for this cache.")
    return jax.tree.unflatten(jax.tree.structure(layers), leaves)


def _settings(run, expert_reduction):
    """Returns what decides the meaning of a row, by name, which no function that edits it has in a file."""
    if run.taps is not None and run.taps.edits:
        edited = ", ".join(name for name, _ in run.taps.edits)
        raise ValueError(f"a cache in a file must be of a model without edits, got edits of {edited}.")
    return {
        "rows": "keys and values per head" if run.mla == MLAMode.EXPANDED else "latents",
        "cache_type": run.cache_type,
        "cache_type_rope": run.rope_type,
        "rotation": f"{run.latent_rotation}, {run.rope_rotation}",
        "group_routing": str(run.group_routing),
        "expert_reduction": expert_reduction,
    }


def _check_about(path, about, wanted):
    if about.get("format") != wanted["format"]:
        raise ValueError(f"{path} must be a cache saved by this program, got a file of another kind.")
    if about.get("model") != wanted["model"]:
        raise ValueError(f"{path} must be of this model, but was saved from another.")
    for name, value in wanted.items():
        if about.get(name) != value:
            raise ValueError(f"{path}: {name} must be {value!r} as in this run, got {about.get(name)!r}.")


def _digest(parts, about):
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].dtype} {parts[name].shape}".encode())
        digest.update(np.ascontiguousarray(parts[name]))
    return digest.hexdigest()


def _bits_dtype(dtype):
    """Returns `dtype`, or the unsigned integer of its size if numpy itself has no such type."""
    return dtype if np.dtype(dtype).isbuiltin == 1 else np.dtype(f"u{np.dtype(dtype).itemsize}")


def _bits(values):
    return np.ascontiguousarray(values).view(_bits_dtype(values.dtype))


def _write_whole(path, data):
    """Writes beside `path` and renames; the file is readable by this user alone."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".mla-jax-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise


def _read_whole(path, upper):
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
        raise ValueError(f"{path} must be a regular file.")
    with open(path, "rb") as file:
        data = file.read(upper + 1)
    if len(data) > upper:
        raise ValueError(f"{path} must be at most {upper} bytes for this context, got more.")
    return data
