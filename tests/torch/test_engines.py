"""The page on Trainer, accelerate, DDP and llama.cpp runs as it stands."""

import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "book" / "engines.md"


def test_the_blocks_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("gguf")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf8"), re.DOTALL)
    whole = [block for block in blocks if "\n...\n" not in block]   # FSDP, a large file
    assert len(whole) == len(blocks) - 2 == 6
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in whole:
        exec(block, names)
    said = capsys.readouterr().out
    before, after = (float(re.search(rf"{word} +([\d.]+)", said)[1]) for word in ("before", "after"))
    assert after < 0.9 * before
    full, sent = (int(n.replace(",", "")) for n in re.search(r": ([\d,]+) .*: ([\d,]+)", said).groups())
    assert sent < full / 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "LoRAExperts(experts=4, in_features=64, out_features=32, rank=4" in said
    assert len(json.loads((tmp_path / "experts" / "adapter_config.json").read_text())
               ["target_parameters"]) == 2
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"
