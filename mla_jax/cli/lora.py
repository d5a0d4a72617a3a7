"""What `mla-jax export-lora` does with its flags."""

import jax

from checkpoints_tools import lora_merge
from mla_jax.cli import loading, paths
from mla_jax.cli.argv import UsageError


def export_lora(values):
    """Writes a model with adapters merged in and prints what encoding costs, or prints the plan of it."""
    jax.config.update("jax_platforms", "cpu")  # a GPU's memory may be in use
    for name in ("model", "out"):
        if values[name].value is None:
            raise UsageError(f"--{name} must be given.")
    out, adapters = paths.output_file("--out", values.out), loading.adapters(values)
    if not adapters:
        raise UsageError("--lora must be given, or --lora-scaled: there would be nothing to merge.")
    paths.check_not_read("--out", out, [path for path, _ in adapters])
    if values.dry_run:
        loading.write(lora_merge.plan(values.model, adapters, type=values.type).table() + "\n")
        return
    losses = lora_merge.merge(values.model, out, adapters, type=values.type)
    loading.write(lora_merge.table(losses) + "\n")
    worst = max(losses, key=lambda loss: loss.share)
    loading.tell(f"encoding costs {worst.share:.1%} of the update of {worst.name}, and no other weight more")
    loading.tell(f"wrote {out}")
