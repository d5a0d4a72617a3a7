"""What each command on files does with its flags; no model is run."""

import os
import re
import sys

import jax

import checkpoints_tools
from checkpoints_tools import check as check_lib
from checkpoints_tools import convert as convert_lib
from checkpoints_tools import diff as diff_lib
from checkpoints_tools import export as export_lib
from checkpoints_tools import quantize as quantize_lib
from checkpoints_tools import split as split_lib
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.inspect import columns
from checkpoints_tools.model_file import check_model
from checkpoints_tools.plan import is_preset
from mla_jax.cli import mesh as mesh_lib
from mla_jax.cli import paths, placing
from mla_jax.cli.argv import UsageError, spelled
from mla_jax.config import RunConfig
from mla_jax.presets import PRESETS

_SIZE = re.compile(r"([0-9]{1,15})([KMG]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def inspect(values):
    """Prints metadata and tensors of a GGUF file, of any architecture."""
    _write(checkpoints_tools.describe(values.model))


def plan(values):
    """Prints what a model and its cache take in memory, without loading it."""
    if not (is_preset(values.model) or os.path.exists(values.model) or values.model.endswith(".gguf")):
        raise UsageError(f"--model must be a file or one of {', '.join(PRESETS)}, got {values.model!r}.")
    run = RunConfig(
        mla=int(values.mla), cache_type=values.cache_type_k, cache_type_rope=values.cache_type_rope
    )
    planned = [checkpoints_tools.plan(values.model, ctx_size=values.ctx_size, run=run)]
    if mesh_lib.choice(values) is not None:
        for name in ("n_gpu_layers", "ubatch_size", "device_memory"):
            if values[name].present:
                raise UsageError(f"{spelled(name)} must not come with --mesh, of which it says nothing.")
        planned += ["", mesh_lib.plan(values, run)]
    elif placing.is_asked(values):
        planned += ["", placing.plan(values, run)]
    else:
        for name in ("cache_type_k", "ubatch_size", "device_memory", "type"):
            if values[name].present:
                others = "-ot, --cpu-moe, --n-cpu-moe, -mg, --fit or --mesh"
                raise UsageError(f"{spelled(name)} must come with -ngl, {others}.")
    _write("\n".join(planned))


def check(values):
    """Reads a whole file; prints what was checked, or on stderr what is wrong, which is exit code 2."""
    _use_the_cpu()
    findings = check_lib.check(values.model)
    for problem in findings.problems:
        _tell(f"mla-jax: {problem}")
    if findings.problems:
        return 2
    _write(findings.checked)


def quantize(values):
    """Writes a file with its weights in another type, or prints the plan of it."""
    _use_the_cpu()
    out = paths.output_file("OUT", values.out)
    rules = list(values.custom)
    for name, pattern in (("output_tensor_type", "output"), ("token_embedding_type", "token_embd")):
        if values[name].value is not None:
            rules.append(rf"^{pattern}\.weight$={values[name].value}")
    settings = dict(
        type=values.type, custom=rules, imatrix=values.imatrix, allow_requantize=values.allow_requantize
    )
    _plan_or_write(values, out, settings, quantize_lib.plan, quantize_lib.quantize)


def convert(values):
    """Writes a folder of another kind as a GGUF file, or a GGUF file as such a folder."""
    _use_the_cpu()
    if not os.path.exists(values.input):
        raise UsageError(f"INPUT must be a folder or a GGUF file that exists, got {values.input!r}.")
    is_folder = os.path.isdir(values.input)
    to = values.to or ("gguf" if is_folder else "safetensors")
    if not is_folder and values.out.endswith(".gguf"):
        raise UsageError(
            "OUT must be a folder if INPUT is a GGUF file; to change the types in it use quantize."
        )
    if is_folder != (to == "gguf"):
        wanted = "folder" if to == "gguf" else "GGUF file"
        raise UsageError(f"INPUT must be a {wanted} to be converted to {to}, got {values.input!r}.")
    is_checkpoint = is_folder and os.path.exists(os.path.join(values.input, "config.json"))
    uses = {"type": is_checkpoint, "keep_nextn": is_checkpoint, "dtype": to == "safetensors"}
    for name, is_used in uses.items():
        if values[name].present and not is_used:
            raise UsageError(f"{spelled(name)} has no effect on this conversion.")
    if is_checkpoint:
        _from_checkpoint(values)
    elif not is_folder:
        _to_folder(values, to)
    elif os.path.exists(os.path.join(values.input, "gguf.json")):
        _from_orbax(values)
    else:
        raise UsageError(
            "INPUT must be a folder with a config.json, of Hugging Face, or a gguf.json, from convert, "
            f"got {values.input!r}."
        )


def split(values):
    """Writes a file as parts."""
    prefix = paths.output_file("PREFIX", values.prefix)
    limits = dict(max_bytes=_num_bytes(values.max_size), max_tensors=values.max_tensors)
    if not values.dry_run:
        parts = split_lib.split(values.input, prefix, **limits)
        _tell("\n".join(f"wrote {part}" for part in parts))
        return
    rows = [("part", "tensors", "bytes")]
    for part, infos in split_lib.plan(open_gguf(values.input), prefix, **limits).items():
        rows.append((part, str(len(infos)), f"{sum(info.num_bytes for info in infos):,}"))
    _write(columns(rows))


def merge(values):
    """Writes the parts of a split file as one."""
    out = paths.output_file("OUT", values.out)
    if values.dry_run:
        _write(_totals(open_gguf(values.first).tensors.values(), out))
        return
    split_lib.merge(values.first, out, alignment=values.alignment and int(values.alignment))
    _tell(f"wrote {out}")


def diff(values):
    """Prints how far the tensors of two files are apart."""
    _use_the_cpu()
    _write(diff_lib.table(diff_lib.diff(values.first, values.second)))


def _use_the_cpu():
    """Leaves a GPU alone, whose memory may be in use: weights would have to be sent there and back."""
    jax.config.update("jax_platforms", "cpu")


def _plan_or_write(values, out, settings, plan, write):
    """Prints the plan for INPUT if this is a dry run, and carries it out otherwise."""
    if values.dry_run:
        chosen = plan(values.input, **settings)
        _write(f"{chosen.table()}\n\n{chosen.summary()}")
    else:
        chosen = write(values.input, out, **settings)
        _tell(f"{chosen.summary()}\nwrote {out}")


def _file_elsewhere(values):
    """Returns OUT, a file that is not in the folder that is read."""
    if os.path.realpath(values.out).startswith(os.path.realpath(values.input) + os.sep):
        raise UsageError(f"OUT must not lie in the folder that is converted, got {values.out!r}.")
    return paths.output_file("OUT", values.out)


def _from_checkpoint(values):
    out, settings = _file_elsewhere(values), dict(type=values.type, keep_nextn=values.keep_nextn)
    _plan_or_write(values, out, settings, convert_lib.plan, convert_lib.to_gguf)


def _from_orbax(values):
    from checkpoints_tools import orbax_files  # orbax takes half a second to import: not for other commands

    out = _file_elsewhere(values)
    if values.dry_run:
        _write(_totals(orbax_files.load_orbax(values.input).file_tensors.values(), out))
        return
    orbax_files.from_orbax(values.input, out)
    _tell(f"wrote {out}")


def _to_folder(values, to):
    out = paths.output_folder("OUT", values.out)
    if values.dry_run:
        _write(_totals(_tensors_of_folder(values, to), out))
        return
    if to == "orbax":
        from checkpoints_tools import orbax_files  # as above

        orbax_files.to_orbax(values.input, out)
    else:
        export_lib.to_safetensors(values.input, out, dtype=values.dtype)
    _tell(f"wrote {out}")


def _tensors_of_folder(values, to):
    if to == "safetensors":
        return export_lib.plan(values.input, dtype=values.dtype)
    file = open_gguf(values.input)
    check_model(file)
    return file.tensors.values()


def _totals(tensors, out):
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return f"{len(tensors)} tensors of {num_bytes:,} bytes would be written to {out}"


def _num_bytes(text):
    """Returns the number that "4G" or "500M" means, in units of thousands as in llama-gguf-split, or None."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--max-size must be a positive whole number with K, M or G after it, got {text!r}.")
    return int(match[1]) * _UNITS[match[2].upper()]


def _write(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _tell(text):
    print(text, file=sys.stderr, flush=True)
