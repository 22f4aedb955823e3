"""The README's example runs as it stands, and leaves an adapter behind."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert {f.name for f in (tmp_path / "my-adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}
    types = {type(m).__name__ for m in names["served"].modules()}
    assert "Linear" in types and "LoRALinear" not in types


def test_the_layout_is_what_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (ROOT / link).exists(), link
