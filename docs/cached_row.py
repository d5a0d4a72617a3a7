"""Draws the bytes of a cached row, to scale, and counts them, from the arrays that the cache is made of."""

import jax

from mla_jax import presets
from mla_jax.cache import codec
from mla_jax.config import CACHE_TYPES

_PARTS = ("codes", "high bits", "scales", "offsets")
_LEFT, _TOP, _STEP, _HEIGHT, _GAP = 72, 34, 30, 20, 3  # pixels
_BYTES_A_PIXEL = 2
_LEAST_TOLD = 24  # pixels of a part that has its number in it


def figure() -> str:
    """Returns the figure as SVG, and after it the same as a table."""
    mla = presets.PRESETS["deepseek-v3"].mla
    widths = mla.kv_lora_rank, mla.qk_rope_head_dim
    rows = {name: [_bytes(width, name) for width in widths] for name in CACHE_TYPES}
    rows = dict(sorted(rows.items(), key=lambda row: -_total(row[1])))
    return f"{_svg(rows)}\n\n{_table(rows)}"


def _bytes(width, name):
    """Returns the bytes of codes, high bits, scales and offsets of `width` numbers in a cache type."""
    parts = jax.eval_shape(lambda: codec.parts(codec.empty((width,), name)))
    return [part.size * part.dtype.itemsize for part in parts]


def _total(parts):
    return sum(map(sum, parts))


def _svg(rows):
    rows = {name: parts for name, parts in rows.items() if name != "f32"}  # twice as wide as f16
    width = _LEFT + max(map(_total, rows.values())) // _BYTES_A_PIXEL + 80
    title = "Bytes of a cached row in each cache type, to scale; the table below says the same"
    lines = [
        '<div><svg class="figure" role="img" aria-labelledby="row-title"',
        f'viewBox="0 0 {width} {_TOP + _STEP * len(rows)}"><title id="row-title">{title}</title>',
        *_legend(),
    ]
    for i, (name, parts) in enumerate(rows.items()):
        lines += _bar(name, parts, _TOP + _STEP * i)
    return "\n".join([*lines, "</svg></div>"])


def _legend():
    x = _LEFT
    for kind, part, label in [
        *(("latent", i, f"latent: {part}" if i == 0 else part) for i, part in enumerate(_PARTS)),
        ("rope", 0, "rotary part, in the same order"),
    ]:
        yield f'<rect class="{kind} part{part}" x="{x}" y="4" width="12" height="12"/>'
        yield f'<text x="{x + 17}" y="15">{label}</text>'
        x += 38 + 7 * len(label)


def _bar(name, parts, y):
    x, baseline = _LEFT, y + 15
    yield f'<text x="{x - 8}" y="{baseline}" text-anchor="end">{name}</text>'
    for kind, numbers in zip(("latent", "rope"), parts, strict=True):
        for i, count in enumerate(numbers):
            size = count / _BYTES_A_PIXEL
            if size:
                yield f'<rect class="{kind} part{i}" x="{x:g}" y="{y}" width="{size:g}" height="{_HEIGHT}"/>'
            if size >= _LEAST_TOLD:
                middle = f'x="{x + size / 2:g}" y="{baseline}" text-anchor="middle"'
                yield f'<text class="inside" {middle}>{count:,}</text>'
            x += size
        x += _GAP
    yield f'<text x="{x + 4:g}" y="{baseline}">{_total(parts):,}</text>'


def _table(rows):
    lines = [("`-ctk`", "latent of 512", "rotary part of 64", "bytes"), ("---",) * 4]
    lines += [(f"`{name}`", *map(_sum, parts), f"{_total(parts):,}") for name, parts in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sum(numbers):
    return " + ".join(f"{count:,} {part}" for part, count in zip(_PARTS, numbers, strict=True) if count)
