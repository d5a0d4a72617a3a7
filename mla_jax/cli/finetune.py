"""What `mla-jax finetune` does with its flags."""

import math
import pathlib

import checkpoints_tools
from checkpoints_tools import lora_files
from mla_jax import finetune as finetune_lib
from mla_jax import finetune_data, lora, tokenizer
from mla_jax.cli import loading, paths
from mla_jax.cli.argv import UsageError
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import lay_out


def finetune(values):
    """Trains adapters on a text and writes them; with `--held-out` tells what that text gained."""
    for name in ("text", "out"):
        if values[name].value is None:
            raise UsageError(f"--{name} must be given.")
    is_file = values.out.endswith(".gguf")
    out = (paths.output_file if is_file else paths.output_folder)("--out", values.out)
    plan = finetune_lib.FinetuneConfig(
        steps=values.steps,
        batch=values.batch,
        window=values.window,
        learning_rate=values.learning_rate,
        warmup_steps=min(finetune_lib.FinetuneConfig.warmup_steps, values.steps // 10),
        rank=values.rank,
        alpha=values.alpha,
        targets=tuple(values.target) or lora.ATTENTION,
        seed=values.seed,
    )
    loading.choose_device(values)
    model = checkpoints_tools.load_gguf(values.model)
    read = [values.text, values.held_out, *{info.path for info in model.file_tensors.values()}]
    paths.check_not_read("--out", out, read)
    words = tokenizer.Tokenizer(tokenizer.Vocabulary.from_metadata(model.metadata))
    stream = finetune_data.read_stream(values.text, words)
    held_out = finetune_data.read_stream(values.held_out, words) if values.held_out is not None else None
    if plan.window > model.config.context_length:
        loading.tell(
            f"windows are longer than the {model.config.context_length} tokens of the model's context"
        )
    run = RunConfig(remat=True, gpu_kernels=None if values.gpu_kernels else False)
    params = lay_out(model.params, run)
    loading.tell(f"{len(stream.tokens)} tokens, of which {stream.counts.sum()} are learned")
    perplexity = lambda adapters: math.exp(
        finetune_lib.held_out_loss(params, adapters, held_out, model.config, window=plan.window, run=run)
    )
    before = perplexity(None) if held_out else None
    folder = pathlib.Path(values.folder)
    adapters = finetune_lib.fit(params, stream, model.config, plan, folder, run=run, report=loading.tell)
    lora_files.save_lora(out, adapters, model.config)
    num_weights = sum(part.a.size + part.b.size for part in adapters.adapters.values())
    loading.tell(f"wrote {out}: {num_weights:,} numbers beside {len(adapters.adapters)} weights")
    if held_out:
        print(f"held-out perplexity {before:.3f} before, {perplexity(adapters):.3f} after")
