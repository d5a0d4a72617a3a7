"""Rules of the house that a reviewer should not have to check by eye."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [  # a module imports from earlier lines, or from its own
    ("pallas_kernels", "cpu_kernels"),
    (
        "mla_jax.config",
        "mla_jax.completion",
        "mla_jax.presets",
        "mla_jax.pretokenize",
        "mla_jax.tokenizer",
        "mla_jax.chat",
    ),
    ("mla_jax.quant",),
    ("mla_jax.cache", "mla_jax.sampler", "mla_jax.logits"),
    ("mla_jax.nn", "mla_jax.sharding"),
    ("mla_jax.steps", "mla_jax.taps"),
    (
        "mla_jax.sharding_plan",
        "mla_jax.expert_reduction",
        "mla_jax.ser_sweep",
        "mla_jax.perplexity",
        "mla_jax.divergence",
        "mla_jax.saved_logits",
        "mla_jax.speed",
        "mla_jax.measure_plots",
        "mla_jax.result_files",
        "mla_jax.generate",
        "mla_jax.placement",
        "mla_jax.segment_calls",
        "mla_jax.segments",
        "mla_jax.serve",
        "mla_jax.corpus",
        "mla_jax.train",
        "mla_jax.lora",
        "mla_jax.rotation",
        "mla_jax.finetune",
        "mla_jax.finetune_data",
        "mla_jax.autotune",
        "mla_jax.autotune_cases",
        "checkpoints_tools",
    ),
    ("mla_jax.serve.http",),
    ("mla_jax.cli", "mla_jax.__main__"),
]
PACKAGES = ("mla_jax", "pallas_kernels", "cpu_kernels", "checkpoints_tools")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MAX_FILE, MAX_FUNCTION = 400, 60

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def _module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer_of(module):
    found = [
        (len(name), height)
        for height, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def _imported(tree):
    """Yields (line, module) of every import, also inside functions; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def import_mistakes(module, source):
    """Lists imports that do not point down. The package's own `__init__` is the menu, above everything."""
    own = len(LAYERS) if module == "mla_jax" else _layer_of(module)
    if own is None:
        return [f"{module} is in no layer"]
    mistakes = []
    for line, name in _imported(ast.parse(source)):
        is_ours = name.startswith((".", *PACKAGES))
        layer = _layer_of(name)
        if is_ours and (layer is None or layer > own):
            mistakes.append(f"{module}:{line} imports {name}")
    return mistakes


def _axes(node):
    """Returns the axes in the name of an operand, also in `x_BTD.astype(dtype)`; None if it names none."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "astype":
        node = node.func.value
    match = re.fullmatch(r"\w+_([A-Za-z]*[A-Z][A-Za-z]*)", getattr(node, "id", ""))
    return match[1] if match else None


def einsum_mistakes(source):
    """Lists einsums whose letters differ from the axes in the names of their operands or of their result."""
    tree, mistakes, target_of = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            target_of[node.value] = node.targets[0] if isinstance(node, ast.Assign) else node.target
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "einsum"):
            continue
        operands, result = ast.literal_eval(node.args[0]).split("->")
        named = [*zip(operands.split(","), node.args[1:], strict=True), (result, target_of.get(node))]
        mistakes += [
            f"line {node.lineno}: {letters} for {ast.unparse(operand)}"
            for letters, operand in named
            if _axes(operand) not in (None, letters)
        ]
    return mistakes


def size_mistakes(source):
    """Lists files and functions that are too long to be read in one go."""
    num_lines = len(source.splitlines())
    mistakes = [f"{num_lines} lines"] if num_lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            mistakes += [f"{node.name}: {length} lines"] if length > MAX_FUNCTION else []
    return mistakes


@each_file
def test_imports_point_down(path):
    assert import_mistakes(_module_of(path), path.read_text()) == []


@each_file
def test_einsum_letters_are_those_of_the_names(path):
    assert einsum_mistakes(path.read_text()) == []


@each_file
def test_files_and_functions_are_short(path):
    assert size_mistakes(path.read_text()) == []


@each_file
def test_nothing_is_left_to_do(path):
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", path.read_text()) == []


@each_file
def test_errors_are_not_bare_asserts(path):
    """`python -O` drops an assert, and its message is no sentence."""
    assert [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)] == []


@each_file
def test_flags_are_defined_by_the_command_line_alone(path):
    imported = [name for _, name in _imported(ast.parse(path.read_text()))]
    reads_flags = any(name == "absl" or name.startswith("absl.flags") for name in imported)
    assert not reads_flags or _module_of(path).startswith("mla_jax.cli")


def test_every_einsum_letter_is_in_the_legend():
    legend = ast.get_docstring(ast.parse((ROOT / "mla_jax/nn/__init__.py").read_text()))
    letters = set(re.findall(r"(?:^|\s\s)([A-Z]) [\w/]", legend, re.MULTILINE))
    used = {
        letter
        for path in FILES
        for equation in re.findall(r'einsum\("([^"]+)"', path.read_text())
        for letter in equation
        if letter.isalpha()
    }
    assert used and used <= letters


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mla_jax.nn.mla", "import checkpoints_tools"),
        ("mla_jax.nn.mla", "def f():\n    from mla_jax import steps"),
        ("mla_jax.quant.matmul", "from mla_jax.cache.rows import Cache"),
        ("mla_jax.steps", "from mla_jax import load"),
        ("mla_jax.steps", "import mla_jax"),
        ("mla_jax.nn.mla", "from . import layers"),
        ("pallas_kernels.dispatch", "import mla_jax.config"),
        ("mla_jax.serve.engine", "from mla_jax.serve.http import server"),
        ("mla_jax.helpers", ""),
    ],
)
def test_planted_import_is_found(module, source):
    assert len(import_mistakes(module, source)) == 1


@pytest.mark.parametrize(
    "source", ["from mla_jax import config", "import jax", "from mla_jax.cache import Cache"]
)
def test_downward_import_is_fine(source):
    assert import_mistakes("mla_jax.nn.mla", source) == []


@pytest.mark.parametrize(
    "source",
    [
        'jnp.einsum("BTD,ND->BTN", x_BTR, w_ND)',
        'jnp.einsum("BTD,ND->BTN", x_BTD, w_DN.astype(f32))',
        'y_BNT = jnp.einsum("BTD,ND->BTN", x, w)',
        'y_BNT += jnp.einsum("BTD,ND->BTN", x, w)',
    ],
)
def test_planted_einsum_is_found(source):
    assert len(einsum_mistakes(source)) == 1


def test_planted_lengths_are_found():
    body = "    pass\n"
    assert size_mistakes("def f():\n" + body * 59) == []
    assert size_mistakes("def f():\n" + body * 60) == ["f: 61 lines"]
    assert size_mistakes("x = 1\n" * 401) == ["401 lines"]
