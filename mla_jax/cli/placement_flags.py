"""The flags of where a model lies, named as in llama.cpp and ik_llama.cpp."""

from absl import flags

NAMES = ("n_gpu_layers", "override_tensor", "cpu_moe", "n_cpu_moe", "main_gpu", "fit")
FIT = r"on|off|[0-9]{1,9}"  # what `--fit` may be followed by
_GPU_LAYERS = "last layers that are on the GPU, the output as one; 999: all."


def define_placement(values: flags.FlagValues) -> None:
    """Defines what lies on the GPU, beside `--n-gpu-layers`, which is there already."""
    own = dict(flag_values=values)
    values["n_gpu_layers"].help = _GPU_LAYERS
    text = "REGEX=cpu|gpu|gpu:N, ...: where tensors lie; first match counts."
    flags.DEFINE_multi_string("override_tensor", [], text, **own)
    flags.DEFINE_boolean("cpu_moe", False, "all experts on the CPU, the rest as -ngl says.", **own)
    flags.DEFINE_integer(
        "n_cpu_moe", 0, "experts of the first N layers on the CPU.", lower_bound=0, upper_bound=1 << 20, **own
    )
    flags.DEFINE_integer("main_gpu", 0, "which GPU, if there are several.", lower_bound=0, **own)
    text = "on, or MiB to leave free: as much on the GPU as fits it."
    flags.DEFINE_string("fit", "off", text, **own)


def define_mesh(values: flags.FlagValues) -> None:
    """Defines how devices share a model out."""
    own = dict(flag_values=values)
    text = "devices that share the model out: auto, or as data=2,expert=4,model=1."
    flags.DEFINE_string("mesh", None, text, **own)
    flags.DEFINE_boolean("split_cache", False, "on a mesh, cut pages of the cache among devices.", **own)


def define_plan(values: flags.FlagValues) -> None:
    """Defines the same for a plan, which is made without a GPU."""
    own = dict(flag_values=values)
    flags.DEFINE_integer("n_gpu_layers", 0, _GPU_LAYERS, lower_bound=0, **own)
    define_placement(values)
    define_mesh(values)
    text = "MiB of memory that the GPU has, for --fit; without it, what it has free."
    flags.DEFINE_integer("device_memory", None, text, lower_bound=1, upper_bound=1 << 30, **own)
    flags.DEFINE_string("type", "q4_K", "of the weights, if MODEL is the name of a preset.", **own)
