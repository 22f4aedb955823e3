"""What every figure that moves has in common."""

import re

import nbformat
import pytest

import notebooks
from lora_lib import moving, plots
from tests.moving.node import call
from tests.moving.stored import BOOK

NAMES = sorted(path.stem for path in moving.HERE.glob("*.js") if path.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_asks_no_other_address(name):
    found = moving.html(name, {}, label="what is seen")
    assert set(re.findall(r"https?://[^\s\"')]+", found)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|eval)\b\s*\(", found)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_mounted(name):
    assert call(name, "() => typeof mount") == "function"


def test_the_still_picture_stays_without_scripts():
    draw = lambda ax: plots.curves({"loss": [3, 2, 1]}, ax=ax)
    found = moving.html(NAMES[0], {}, label='a "label"', still=draw)
    assert found == moving.html(NAMES[0], {}, label='a "label"', still=draw)
    assert 'alt="a &quot;label&quot;"' in found
    assert found.index("data:image/svg+xml;base64,") < found.index("<script>")


def test_data_cannot_end_the_script():
    assert moving.html(NAMES[0], {"text": "</script>"}, label="").count("</script>") == 1


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ValueError, match="no figure is called 'nothing'"):
        moving.html("nothing", {}, label="")
    with pytest.raises(ValueError):
        moving.html(NAMES[0], {"loss": float("nan")}, label="")


def test_colours_are_those_of_the_pictures():
    found = call(NAMES[0], "() => COLORS")
    assert found == {name: getattr(plots, name.upper()) for name in found}


def test_ticks_are_round_and_inside():
    assert call(NAMES[0], "ticks", 0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert call(NAMES[0], "ticks", -3, 7, 4) == [-2, 0, 2, 4, 6]


def test_a_figure_is_renewed(tmp_path, monkeypatch):
    now = moving.html(NAMES[0], {"a": 1}, label="<b>", still=lambda ax: plots.curves({"a": [1]}, ax=ax))
    assert moving.renewed(now) == now
    for path in moving.HERE.glob("*.*s*"):
        (tmp_path / path.name).write_text(path.read_text("utf8") + "/* later */\n", "utf8")
    monkeypatch.setattr(moving, "HERE", tmp_path)
    later = moving.renewed(now)
    assert later.count("/* later */") == 3 and later.replace("/* later */\n", "") == now
    with pytest.raises(ValueError, match="no figure that moves"):
        moving.renewed("<div></div>")


@pytest.mark.parametrize("path", sorted(BOOK.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_figures_have_the_code_of_today(path):
    notebook = nbformat.read(path, as_version=4)
    notebooks.renew(notebook)                # python scripts/notebooks.py --figures does it
    assert notebook == nbformat.read(path, as_version=4)
