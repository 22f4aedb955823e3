"""The benchmark runs, its methods compute the same thing, and the page is what it measured."""

import json
import re
import subprocess
import sys
from itertools import groupby

import pytest
import torch

from benchmarks import page, run
from benchmarks.methods import ADAPTED, layers, threes
from lora_lib.experiments.sweep import read, select, write
from lora_lib.experiments.timing import in_turn

PAGE = page.BOOK / "speed.md"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("make", [layers, threes])
def test_the_methods_compute_the_same(make, dtype, tolerance):
    modules, x = make(32, 4, dtype=dtype), run.inputs(10, 32, dtype)
    outs = {name: torch.cat(y if isinstance(y, tuple) else (y,))
            for name, module in modules.items() for y in [module(x)]}
    for name in ADAPTED:
        torch.testing.assert_close(outs[name], outs["formula"], rtol=tolerance, atol=tolerance)
    assert torch.equal(outs["full"], outs["frozen"])
    assert not torch.allclose(outs["formula"], outs["frozen"], atol=0.1)


def test_a_step_leaves_no_gradient_behind():
    module, x = layers(16, 2)["lora_lib"], run.inputs(4, 16, torch.float32)
    before = module.A.detach().clone()
    run.step_of(module, x, optimizer=True)()
    assert x.grad is None and all(p.grad is None for p in module.parameters())
    assert not torch.equal(module.A, before)


def test_the_whole_command_on_small_points(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--quick", "--out", str(tmp_path)])
    run.main()
    rows = read(tmp_path / "times.csv")
    assert {row["what"] for row in rows} >= {"step", "forward", "optimizer", "shared", "inference",
                                             "model", "files", "numpy", "import"}
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in rows)
    base = [row for row in select(rows, method="frozen") if row["what"] != "model"]
    assert base and all(row["ratio"] == 1 for row in base)
    kept = read(tmp_path / "bytes.csv")
    bytes_of = {name: sum(row["bytes"] for row in select(kept, dtype="bfloat16", size=512,
                                                         method=name)) for name in ADAPTED}
    assert bytes_of["lora_lib"] == 256 * (512 + 3 * 8) * 2
    assert bytes_of["PEFT"] > 5 * bytes_of["lora_lib"]
    assert (tmp_path / "machine.json").exists()


def test_an_unknown_part_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "layers"])
    with pytest.raises(SystemExit):
        run.main()
    assert "got 'layers'" in capsys.readouterr().err


def test_the_page_is_what_was_measured():
    assert PAGE.read_text("utf8") == page.page(page.newest(), page.newest("cuda"),
                                               page.newest_runs())


def test_a_gpus_run_gets_a_section(tmp_path):
    """Of made-up figures: no GPU is at hand."""
    source, folder = page.newest(), tmp_path / "2030-01-01-made-up"
    folder.mkdir()
    text = (source / "times.csv").read_text().replace("bfloat16", "float16")
    header, *lines = text.splitlines()
    lines += [line.replace(",lora_lib,", ",kernel,") for line in lines if ",lora_lib," in line]
    graphs = [re.sub(r"^(\w+),", r"\1 graph,", line) for line in lines]
    (folder / "times.csv").write_text("\n".join([header, *lines, *graphs]))
    about = page.about(source) | {"device": "cuda", "hardware": "made up"}
    (folder / "machine.json").write_text(json.dumps(about))
    assert page.newest("cuda", tmp_path) == folder and page.newest("cpu", tmp_path) is None
    made = page.page(source, folder)
    assert "None has been measured" in page.page(source)
    assert "None has been measured" not in made and "`made up`" in made


def test_whole_runs_are_judged_by_the_rows(tmp_path):
    """Of made-up figures, of which each target is reached or missed."""
    row = lambda method, round, step, s, gb: {"method": method, "round": round, "step": step,
                                              "loss": 1.0, "seconds": s, "peak": gb, "above": gb / 2}
    about = page.about(page.newest()) | {"shared": 0.6, "learned": 0.2}
    (tmp_path / "about.json").write_text(json.dumps(about))
    few, trainer = ", 2 rows at a time", "PEFT, Trainer"
    for shares, reached in (((0.3, 0.2), 6), ((0.9, 0.5), 1), ((0.5, 0.3), 4), ((0.9, 0.8), 0)):
        taken = dict(zip(("lora_lib", "lora_lib" + few), shares)) | {trainer: 1.0,
                                                                      trainer + few: 0.5}
        write(tmp_path / "runs.csv", [row(m, i, step, 10 * s, 1e9 * s) for i in range(3)
                                      for m, s in taken.items() for step in range(2)])
        text = page.runs(tmp_path)
        assert text.count(", yes") == reached and text.count(", **no**") == 6 - reached
        assert f"the time is `{shares[1] / 0.5:.2f}` of Trainer's" in text
    assert "Not measured yet" in page.runs(None)


def test_a_whole_run_of_two_steps(tmp_path):
    """Ours and Trainer's, two processes: the same losses, step by step."""
    found = {}
    for method in ("lora_lib", "PEFT, Trainer"):
        command = [sys.executable, "-m", "benchmarks.runs", "--child", method, "--steps", "2"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=page.BOOK.parent)
        assert done.returncode == 0, done.stderr[-2000:]
        found[method] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found.values()
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-3)
    assert all(0 < run["above"] < run["peak"] for run in found.values())


def test_targets_are_judged_by_the_rows():
    folder = page.newest()
    rows, kept = read(folder / "times.csv"), read(folder / "bytes.csv")
    held = [ok for *_, ok in page.targets(rows, kept)]
    for row in select(rows, method="lora_lib"):
        row["ratio"], row["ratio_low"], row["seconds"] = 9, 9, 9
    for row in select(rows, method="lora_lib.numpy") + select(rows, method="merged and replaced"):
        row["ratio"] = 9
    for row in select(kept, method="lora_lib"):
        row["bytes"] *= 9
    assert any(held) and not any(ok for *_, ok in page.targets(rows, kept))


def test_functions_are_timed_in_turn():
    calls = []
    times = in_turn({name: lambda name=name: (calls.append(name), torch.ones(10**6).sum())
                     for name in "ab"}, rounds=4, warmup=1)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert all((t > 0).all() for t in times.values())
    turns = [name for name, _ in groupby(calls)]
    assert turns.count("a") >= 3 <= turns.count("b")        # not all of one, then all of the other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(graph):
    x = torch.randn(512, 512, device="cuda")
    times = in_turn({"product": lambda: x @ x}, rounds=3, device="cuda", graph=graph)
    assert (times["product"] > 0).all()
