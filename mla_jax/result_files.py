"""Results as files: JSON, CSV and plots, all of them there or none."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints_tools import folders


def write(folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder that exists; each is whole, and none is there before all are written.

    Args:
      folder: the folder.
      files: content by name; files of these names are replaced.

    Raises:
      OSError: if one cannot be written.
    """
    folder = pathlib.Path(folder)
    with folders.beside(folder / "results") as temporary:
        unfinished = pathlib.Path(temporary)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        for name in files:
            os.replace(unfinished / name, folder / name)


def json_bytes(record: Any) -> bytes:
    """Returns a line of JSON; numbers must be finite, as JSON has no others, and None is null."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a table of rows with the same keys, which are its first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def png_bytes(figure) -> bytes:
    """Returns a matplotlib figure as an image."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
