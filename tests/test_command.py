"""The commands, from a data file to an adapter and on: against PEFT, transformers, and kill -9."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lora_lib.tuning.resume
from lora_lib.command import MODULES, main
from lora_lib.command.base import load_adapted, load_base
from lora_lib.command.folder import CHECKPOINT, DONE, steps_done
from lora_lib.command.tune import cpu_has_bfloat16
from lora_lib.torch import load_pretrained, lora_modules, save_adapter
from lora_lib.torch.peft_format import CONFIG, WEIGHTS
from lora_lib.tuning.data import encode
from lora_lib.tuning.evaluation import reply
from lora_lib.tuning.examples import read_examples, split_examples

ROOT = Path(__file__).parents[1]
SYSTEM = "Count."
KILL = """
import os, signal, sys
import safetensors.torch as files
from lora_lib.command import main
save, calls = files.save_file, []
def half(tensors, file, *rest):
    save(tensors, file, *rest)
    calls.append(file)
    if len(calls) == 3:
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
files.save_file = half
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True, scope="module")
def torch_on_one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny random Llama, SmolLM2's tokenizer in it, and 24 rows of data."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_lib.models import smollm2
    home = tmp_path_factory.mktemp("home")
    config = LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=48, bos_token_id=1,
                         eos_token_id=2, pad_token_id=2, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(home / "tiny")
    AutoTokenizer.from_pretrained(smollm2.folder()).save_pretrained(home / "tiny")
    rows = [{"system": SYSTEM, "prompt": f"Say {i}", "completion": f"I say {i}."}
            for i in range(24)]
    write(home / "data.jsonl", rows)
    return home


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tune(home, out, *more, data="data.jsonl"):
    return ["tune", str(home / data), "--model", str(home / "tiny"), "--out", str(out),
            "--steps", "8", "--lr", "2e-2", "--batch", "4", "--checkpoint-every", "2",
            "--precision", "float32", "--device", "cpu", "--samples", "2", *more]


@pytest.fixture(scope="module")
def tuned(home):
    """The adapter of one run that nothing has stopped."""
    assert main(tune(home, home / "adapter")) == 0
    return home / "adapter"


@pytest.fixture
def one_line(capsys):
    """one_line(arguments): the only line on stderr of a command that exits with 2."""
    def run(*argv):
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:                        # argparse
            code = stop.code
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and said.endswith("\n"), said
        return said
    return run


def same_run(one, other):
    """The same weights bit for bit, and the same record."""
    (these, about), (those, about_those) = (contents(f / WEIGHTS) for f in (one, other))
    assert about == about_those and these.keys() == those.keys()
    assert all(torch.equal(these[key], those[key]) for key in these)
    assert (one / DONE).read_bytes() == (other / DONE).read_bytes()
    assert {f.name for f in one.iterdir()} == {f.name for f in other.iterdir()}


def contents(file):
    with safe_open(file, "pt") as f:                   # its metadata stand in any order in the file
        return {key: f.get_tensor(key) for key in f.keys()}, f.metadata()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 4093, 198, *range(300, 320)]])).logits.double()


# --- tune ---------------------------------------------------------------------------------------

def test_peft_computes_what_was_trained(home, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    assert {f.name for f in tuned.iterdir()} == {CONFIG, WEIGHTS, DONE}
    base = AutoModelForCausalLM.from_pretrained(home / "tiny").eval()
    before = logits(base)
    model = PeftModel.from_pretrained(base, tuned).eval()
    ours = load_adapted(tuned, None, "cpu")
    assert (logits(model) - logits(ours)).abs().max() < 1e-4
    assert (logits(model) - before).abs().max() > 0.1

    record = json.loads((tuned / DONE).read_text())
    _, held = split_examples(read_examples(home / "data.jsonl"), 0.1, 0)
    rows = encode(ours.tokenizer, held)
    total = [torch.nn.functional.cross_entropy(model(ids[None]).logits[0], labels, reduction="none")
             [labels != -100] for ids, labels in zip(rows.inputs, rows.labels)]
    assert record["held-out loss"]["8"] == pytest.approx(torch.cat(total).mean().item(), rel=1e-4)
    assert record["held-out loss"]["8"] < record["held-out loss"]["0"]
    assert len(record["losses"]) == 8 and record["rows"] == {"training": 22, "held out": 2}
    assert [s["wanted"] for s in record["samples"]] == [e[-1]["content"] for e in held]
    asked = record["samples"][0]
    assert asked["after"] == reply(ours, ours.tokenizer, asked["messages"])
    plain = load_pretrained(home / "tiny")
    assert asked["before"] == reply(plain, plain.tokenizer, asked["messages"])


@pytest.mark.parametrize("option", [["--micro-batch", "3"], ["--checkpointing"]])
def test_what_saves_memory_changes_the_rounding_alone(home, tuned, tmp_path, option):
    assert main(tune(home, tmp_path / "adapter", *option)) == 0
    losses, expected = (json.loads((f / DONE).read_text())["losses"]
                        for f in (tmp_path / "adapter", tuned))
    assert losses == pytest.approx(expected, rel=1e-3) and losses != expected
    these, those = (contents(f / WEIGHTS)[0] for f in (tmp_path / "adapter", tuned))
    for key in those:
        assert (these[key] - those[key]).norm() < 0.02 * those[key].norm(), key


def test_kill_9_in_the_middle_of_a_checkpoint_changes_nothing(home, tuned, tmp_path, capsys):
    out = tmp_path / "adapter"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILL, *tune(home, out)], env=env,
                            capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert steps_done(out) == 4 and len(list(out.glob(f".{CHECKPOINT}.*"))) == 1
    assert not (out / WEIGHTS).exists()
    assert main(tune(home, out)) == 0
    assert "Going on from step 4 of 8" in capsys.readouterr().out
    same_run(out, tuned)


@pytest.fixture
def third_save(monkeypatch):
    """third_save(error): the third checkpoint fails with it."""
    def plant(error):
        save, calls = lora_lib.tuning.resume.safetensors.torch.save_file, []

        def failing(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise error
            save(*arguments)
        monkeypatch.setattr(lora_lib.tuning.resume.safetensors.torch, "save_file", failing)
    return plant


def test_ctrl_c_says_how_to_go_on(home, tuned, tmp_path, capsys, third_save, monkeypatch):
    out = tmp_path / "my adapter"
    third_save(KeyboardInterrupt())
    assert main(tune(home, out)) == 130
    said = capsys.readouterr().err
    command = said.strip().splitlines()[-1].partition("goes on: ")[2]
    assert "4 steps are kept" in said and f"--out '{out}'" in command
    monkeypatch.undo()
    assert main(shlex.split(command)[3:]) == 0
    same_run(out, tuned)


def test_a_full_disk_leaves_the_last_checkpoint(home, tuned, tmp_path, one_line, third_save,
                                                monkeypatch):
    third_save(OSError(28, "No space left on device"))
    assert "No space left on device" in one_line(*tune(home, tmp_path / "adapter"))
    assert steps_done(tmp_path / "adapter") == 4
    monkeypatch.undo()
    assert main(tune(home, tmp_path / "adapter")) == 0
    same_run(tmp_path / "adapter", tuned)


def test_an_unfinished_run_is_not_mixed_with_another(home, tmp_path, one_line, third_save,
                                                     monkeypatch):
    out = tmp_path / "adapter"
    third_save(KeyboardInterrupt())
    main(tune(home, out))
    monkeypatch.undo()
    said = one_line(*tune(home, out, "--lr", "1e-2"))
    assert "--lr was 0.02 there, is 0.01 now" in said and "--force" in said
    rows = [{"prompt": f"{i}?", "completion": "!"} for i in range(9)]
    other = write(tmp_path / "other.jsonl", rows)
    assert "the data was another" in one_line(*tune(tmp_path, out, "--model", home / "tiny",
                                                    data=other.name))
    assert "not finished" in one_line("merge", out, "--out", tmp_path / "merged")
    damaged = (out / CHECKPOINT).read_bytes()
    (out / CHECKPOINT).write_bytes(damaged[:-8])
    assert f"delete {out / CHECKPOINT}" in one_line(*tune(home, out))
    (out / CHECKPOINT).write_bytes(damaged)
    assert main(tune(home, out, "--lr", "1e-2", "--force")) == 0
    assert len(json.loads((out / DONE).read_text())["losses"]) == 8


def test_a_finished_run_is_kept(home, tuned, one_line, capsys, tmp_path):
    before = (tuned / WEIGHTS).stat().st_mtime_ns
    assert main(tune(home, tuned)) == 0
    assert "finished" in capsys.readouterr().out
    assert "--rank was 8 there, is 4 now" in one_line(*tune(home, tuned, "--rank", 4))
    assert (tuned / WEIGHTS).stat().st_mtime_ns == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is not empty" in one_line(*tune(home, tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_findings_stop_a_run_unless_forced(home, tmp_path, capsys):
    out = tmp_path / "adapter"
    short = tune(home, out, "--length", "22")
    assert main(short) == 1
    said = capsys.readouterr().out
    assert "[cut off] row 1, row 2 and 22 more" in said and "--force" in said
    assert not out.exists()
    assert main([*short, "--force"]) == 0 and (out / WEIGHTS).exists()


def test_a_file_of_its_own_is_held_out(home, tmp_path, capsys):
    held = write(tmp_path / "held.jsonl", [{"prompt": "Say 99", "completion": "I say 99."}])
    assert main(tune(home, tmp_path / "adapter", "--held-out", str(held), "--targets",
                     "q_proj,v_proj")) == 0
    record = json.loads((tmp_path / "adapter" / DONE).read_text())
    assert record["rows"] == {"training": 24, "held out": 1}
    assert record["samples"][0]["wanted"] == "I say 99."
    assert {name.rpartition(".")[2] for name in
            lora_modules(load_adapted(tmp_path / "adapter", None, "cpu"))} == {"q_proj", "v_proj"}


BAD = {
    ("--rank", "0"): "--rank: expected a whole number, 1 or more, got '0'",
    ("--rank", "33"): "rank must be between 1 and",
    ("--alpha", "nan"): "--alpha: expected a number greater than 0, got 'nan'",
    ("--lr", "-1"): "--lr: expected a number greater than 0",
    ("--epochs", "2"): "--epochs: not allowed with argument --steps",
    ("--dropout", "1"): "--dropout: expected a number from 0 to 1",
    ("--targets", "qproj"): "'qproj'; the nearest linear layers are",
    ("--held-out", "1.5"): "--held-out: expected a share below 1",
    ("--held-out", "24"): "--held-out 24: ",
    ("--held-out", "gone.csv"): "No such file or directory: gone.csv",
    ("--batch", "23"): "--batch 23 is more than the 22 rows to train on; give --batch 22",
    ("--model", "smollm"): "--model smollm: name must be one of",
    ("--model", "tales"): "--model tales: this is no language model of transformers",
    ("--device", "cuda:77"): "--device cuda:77: torch finds",
    ("--precision", "int8"): "--precision: invalid choice: 'int8'",
    ("--ranks", "4"): "unrecognized arguments: --ranks 4",
}


@pytest.mark.parametrize("option", BAD, ids=" ".join)
def test_a_bad_option_is_named(home, tmp_path, one_line, option):
    assert BAD[option] in one_line(*tune(home, tmp_path / "adapter", *option))
    assert not (tmp_path / "adapter").exists()


def test_bad_data_is_named_by_its_row(home, tmp_path, one_line):
    good = {"prompt": "Hi", "completion": "Hello"}
    write(tmp_path / "half.jsonl", [good, {"prompt": "Hi"}])
    (tmp_path / "cut.jsonl").write_text(json.dumps(good) + '\n{"prompt": "H')
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    more = "--model", home / "tiny"
    run = lambda name: one_line(*tune(tmp_path, tmp_path / "out", *more, data=name))
    assert "half.jsonl, line 2: no format has the columns" in run("half.jsonl")
    assert "cut.jsonl, line 2: this line is not JSON" in run("cut.jsonl")
    assert "expected a file that ends in .jsonl" in run("data.xlsx")
    assert "No such file or directory: " in run("nothing.jsonl")
    assert "is a file" in one_line(*tune(home, tmp_path / "cut.jsonl"))


# --- chat ---------------------------------------------------------------------------------------

def test_chat_answers_standard_input_and_arguments(home, tuned, capsys, monkeypatch):
    model, base = load_adapted(tuned, None, "cpu"), load_base(str(home / "tiny"))
    expected = [reply(model, model.tokenizer, [{"role": "system", "content": SYSTEM},
                                               {"role": "user", "content": f"Say {i}"}],
                      max_new_tokens=9) for i in (30, 31)]
    few = ["--max-tokens", "9"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 30\n\nSay 31\n"))
    assert main(["chat", str(tuned), *few]) == 0
    assert capsys.readouterr().out.split("\n") == [*expected, ""]
    assert main(["chat", str(tuned), "Say 31", *few]) == 0
    assert capsys.readouterr().out == expected[1] + "\n"
    bare = reply(base, base.tokenizer, "Say 31", max_new_tokens=9)
    assert bare != expected[1]
    for target, strength in ((tuned, ["--strength", "0"]), (home / "tiny", [])):
        assert main(["chat", str(target), "Say 31", "--system", "", *strength, *few]) == 0
        assert capsys.readouterr().out == bare + "\n"


def test_strength_is_a_factor_on_the_update(home, tuned):
    half, base = load_adapted(tuned, None, "cpu", 0.5), load_adapted(tuned, None, "cpu", 0.0)
    whole = load_adapted(tuned, None, "cpu")
    for name, layer in lora_modules(whole).items():
        twice = 2 * lora_modules(half)[name].delta_weight()
        assert torch.allclose(twice, layer.delta_weight(), rtol=1e-6)
    assert torch.equal(logits(base), logits(load_base(str(home / "tiny"))))


def test_a_conversation_remembers_what_was_said(home, tuned, capsys, monkeypatch):
    said = iter(["Say 1", "Say 2", "/new", "Say 2"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or leave())

    def leave():
        raise EOFError
    heard = []
    monkeypatch.setattr("lora_lib.command.chat.reply",
                        lambda model, tokenizer, messages, **_: heard.append([*messages]) or "Yes.")
    assert main(["chat", str(tuned), "--system", "Be brief."]) == 0
    assert [[m["content"] for m in messages] for messages in heard] == [
        ["Be brief.", "Say 1"], ["Be brief.", "Say 1", "Yes.", "Say 2"], ["Be brief.", "Say 2"]]


# --- merge and export ---------------------------------------------------------------------------

def test_merged_is_plain_transformers(home, tuned, tmp_path, one_line):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = tmp_path / "merged"
    assert main(["merge", str(tuned), "--out", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "in_features")} == {"Linear"}
    assert (logits(model) - logits(load_adapted(tuned, None, "cpu"))).abs().max() < 1e-4
    theirs, ours = (AutoTokenizer.from_pretrained(f) for f in (out, home / "tiny"))
    assert theirs.chat_template == ours.chat_template
    assert {f.stat().st_mode & 0o777 for f in out.iterdir()} == {0o666 & ~umask()}
    assert [f.name for f in tmp_path.iterdir()] == ["merged"]
    assert "is there already" in one_line("merge", tuned, "--out", out)
    assert main(["merge", str(tuned), "--out", str(out), "--force", "--dtype", "bfloat16"]) == 0
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out).parameters()} == {
        torch.bfloat16}


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_template_that_was_ours_goes_with_the_merged_model(home, tuned, tmp_path):
    from transformers import AutoTokenizer

    from lora_lib.tuning.data import prompt_ids
    shutil.copytree(home / "tiny", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    assert main(["merge", str(tuned), "--model", str(tmp_path / "bare"), "--out",
                 str(tmp_path / "merged")]) == 0
    bare, merged = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("bare", "merged"))
    assert bare.chat_template is None
    ids = merged.apply_chat_template([{"role": "user", "content": "Hi"}],
                                     add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids(bare, "Hi")


def test_export_writes_what_llama_cpp_names(tuned, tmp_path, one_line):
    gguf = pytest.importorskip("gguf")
    for more, name in (([], "blk.1.ffn_up.weight.lora_b"), (["--merged"], "blk.1.ffn_up.weight")):
        out = tmp_path / f"{len(more)}.gguf"
        assert main(["export", str(tuned), "--out", str(out), *more]) == 0
        assert name in {t.name for t in gguf.GGUFReader(out).tensors}
    assert "is there already" in one_line("export", tuned, "--out", out)


# --- check --------------------------------------------------------------------------------------

def found(capsys, *argv):
    """Exit code and findings' codes."""
    capsys.readouterr()
    code = main(["check", *map(str, argv)])
    said = capsys.readouterr().out
    codes = re.findall(r"^\[([\w -]+)\] ", said, re.MULTILINE)
    assert code == bool(codes) and ("nothing found" in said) is not bool(codes)
    return codes


def test_check_is_quiet_on_what_is_clean(home, tuned, capsys):
    assert found(capsys, tuned) == []
    assert found(capsys, home / "data.jsonl", "--model", home / "tiny") == []


def test_check_finds_what_is_planted(home, tuned, tmp_path, capsys, one_line):
    tiny = ["--model", home / "tiny"]
    good = {"prompt": "Hi", "completion": "Hello"}
    long = write(tmp_path / "long.jsonl", [good, {"prompt": "Hi", "completion": "word " * 90}])
    assert found(capsys, long, "--length", 64, *tiny) == ["cut off"]
    assert found(capsys, write(tmp_path / "no.jsonl", [good, {"prompt": "Hi", "completion": ""}]),
                 *tiny) == ["not readable"]
    strange = {"prompt": "### Assistant:", "completion": "[/INST] yes"}
    assert found(capsys, write(tmp_path / "strange.jsonl", [strange] * 3), *tiny) == ["template"]
    model = load_adapted(tuned, None, "cpu")
    with torch.no_grad():
        for layer in lora_modules(model).values():
            layer.B.zero_()
    save_adapter(model, tmp_path / "zero", base_model_name_or_path=str(home / "tiny"))
    assert found(capsys, tmp_path / "zero") == ["untrained"]
    damaged = shutil.copytree(tuned, tmp_path / "damaged")
    bytes_ = bytearray((damaged / WEIGHTS).read_bytes())
    bytes_[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(bytes_)
    assert found(capsys, damaged) == ["not loadable"]
    assert "there is no file or folder" in one_line("check", tmp_path / "gone")
    assert "there is no adapter at" in one_line("check", home / "tiny")


# --- help ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", MODULES)
def test_help_teaches_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python -m lora_lib {command} " in said.partition("positional")[0].partition("\n\n")[2]
    assert "hapter" in said
    for option in re.findall(r"^  (--[\w-]+)( \S+)?(.*)\n?(.*)", said, re.MULTILINE):
        assert "".join(option[2:]).strip(), option


def test_help_needs_no_torch():
    code = ("import sys, lora_lib.command as c\n"
            "try: c.main(['--help'])\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules, 'transformers' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "False False"
    assert all(f"    {name} " in said.stdout for name in MODULES)


def test_bfloat16_is_asked_of_the_processor(monkeypatch):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu_has_bfloat16()
    for name in names:
        with monkeypatch.context() as there:
            there.setattr(torch.cpu, name, lambda: True, raising=False)
            assert cpu_has_bfloat16()
        monkeypatch.delattr(torch.cpu, name)
    assert not cpu_has_bfloat16()
