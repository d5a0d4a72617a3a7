"""Where and how a benchmark was run, for its results: nothing in it tells of folders or people."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """Returns what the processor calls itself."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def version(package: str) -> str | None:
    """Returns the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Returns the commit of the checkout, with "-dirty" where tracked files were altered."""

    def git(*words):
        done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def command(script: str, arguments: Sequence[str]) -> str:
    """Returns a command line, without where files lie on this machine."""
    return shlex.join(["python", script, *map(_without_folders, arguments)])


def about(script: str, arguments: Sequence[str], packages: Sequence[str]) -> dict:
    """Returns where and how `script` runs, with the versions of some packages."""
    return dict(
        cpu=cpu_name(),
        cores=sorted(os.sched_getaffinity(0)),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        commit=commit(),
        command=command(script, arguments),
    )


def _without_folders(argument):
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    names = [pathlib.Path(part).name if os.path.isabs(part) else part for part in value.split(",")]
    return flag + equals + ",".join(names)
