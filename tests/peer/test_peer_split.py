"""A file that was split or merged here is the same model in ik_llama.cpp."""

import numpy as np
import pytest
from synthetic import write_deepseek2

from checkpoints_tools.split import merge, split

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik

pytestmark = pytest.mark.peer


def test_peer_loads_the_parts(tmp_path):
    whole, tokens = tmp_path / "whole.gguf", range(3, 35)
    write_deepseek2(whole, size="full", weight_type="Q8_0")
    parts = split(whole, tmp_path / "m", max_tensors=20)
    assert len(parts) == 3
    np.testing.assert_array_equal(ik.logits(parts[0], tokens), ik.logits(whole, tokens))


def test_peer_loads_tensors_that_were_moved(tmp_path):
    old, new, tokens = tmp_path / "32.gguf", tmp_path / "4096.gguf", range(3, 35)
    write_deepseek2(old, size="full", weight_type="Q8_0", alignment=None)
    merge(old, new, alignment=4096)
    np.testing.assert_array_equal(ik.logits(new, tokens), ik.logits(old, tokens))
