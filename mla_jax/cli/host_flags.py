"""The flags that share a model out to processes, on one machine or many."""

from absl import flags

NAMES = ("coordinator", "num_processes", "process_id")  # given together, or not at all


def define_hosts(values: flags.FlagValues) -> None:
    """Defines which process this is, and where the others are."""
    own = dict(flag_values=values)
    text = "HOST:PORT of process 0, which has the front end."
    flags.DEFINE_string("coordinator", None, text, **own)
    flags.DEFINE_integer("num_processes", None, "processes of the run.", lower_bound=1, **own)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0 on.", lower_bound=0, **own)
    text = "that the processes may take to find each other."
    flags.DEFINE_integer("join_seconds", 300, text, lower_bound=1, upper_bound=86400, **own)
