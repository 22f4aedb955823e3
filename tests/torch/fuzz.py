"""Damaged adapter folders by the thousand: each is refused, or does what its files say.

    .venv/bin/python -m tests.torch.fuzz --inputs 10000     a table of the outcomes by mutation
    .venv/bin/python -m tests.torch.fuzz --only 1234 -v     one input again, with what it raises
"""

import argparse
import collections
import functools
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

from lora_lib.torch import load_adapter, peft_format, save_adapter
from lora_lib.torch.inject import inject_each
from tests.torch.conftest import randomize, state
from tests.torch.damage import MUTATIONS
from tests.torch.folder import Folder
from tests.torch.meaning import compare

MEGABYTES, SECONDS = 300, 5          # how much an input may take: memory above the start, CPU time
MESSAGE = 20_000                     # characters: a few long names at most


class Base(nn.Module):
    """Long paths, an alias (`backbone`), a module at two paths (`twin`), buffers, embeddings."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(7, 6)
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({
                "self_attention": nn.ModuleDict({"query_projection": nn.Linear(6, 6),
                                                 "value_projection": nn.Linear(6, 4)})})
                for _ in range(2))})
            self.pooler = nn.Linear(6, 5)
            self.head = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        self.twin = self.pooler
        self.eval()

    @property
    def backbone(self):
        return self.encoder["layers"]

    def get_input_embeddings(self):
        return self.embed


# The ranks and alphas that each of the two folders below is made of.
QUERIES = [f"encoder.layers.{i}.self_attention.query_projection" for i in range(2)]
PLANS = {"ours": {QUERIES[0]: (2, 3.0), QUERIES[1]: (2, 5.0), "pooler": (3, 1.5)},
         "theirs": {QUERIES[0]: (2, 3), QUERIES[1]: (2, 5), "pooler": (3, 3)}}


def adapted(name: str, base_seed: int = 0, seed: int = 0) -> nn.Module:
    """A model with adapters, of other numbers for another seed, that the folder `name` fits."""
    return randomize(inject_each(Base(base_seed), PLANS[name], modules_to_save=["head"], seed=0,
                                 use_rslora=name == "theirs"), seed)


@functools.cache
def originals() -> dict[str, Folder]:
    """A folder that save_adapter wrote and one that PEFT wrote, of two ranks, with modules to save."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(Base(), LoraConfig(
        r=2, lora_alpha=3, target_modules=["query_projection", "pooler"], use_rslora=True,
        rank_pattern={"pooler": 3}, alpha_pattern={r"layers\.1\..*query_projection": 5},
        modules_to_save=["head"]))
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data = torch.randn(p.shape, generator=generator)
    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")          # of scalings that differ, as they should
        save_adapter(adapted("ours"), Path(path, "ours"))
        theirs.save_pretrained(Path(path, "theirs"))
        return {name: Folder.read(Path(path, name)) for name in ("ours", "theirs")}


# --- one input --------------------------------------------------------------------------------------

class TooLong(BaseException):
    """No Exception, so that no code on the way takes it for its own."""


@contextmanager
def limited(seconds: float):
    """Raise TooLong when the process has used so much CPU time; regular expressions notice it."""
    def ring(*_):
        raise TooLong(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak(again: bool = False) -> float:
    """The most memory that this process has held, in MB; on Linux since the last `again`."""
    try:
        if again:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    except OSError:                              # no Linux, or it does not let us
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def attempt(rng: random.Random, kinds: list[str], path: Path) -> tuple[str, str, float]:
    """Damage a folder in these ways and load it: "refused", "loaded" or "FINDING", why, and MB."""
    name = rng.choice(list(originals()))
    folder = originals()[name].copy()
    over, check_base, stale = (rng.random() < p for p in (0.4, 0.6, 0.2))
    for i, kind in enumerate(kinds):
        with suppress(Exception if i else ()):   # what is damaged may be past more damage
            MUTATIONS[kind](rng, folder)
    whole = kinds in (["reorder"], ["another_base"])
    if not stale and not whole:
        folder.metadata.pop("lora_lib_sha256", None)     # else every change is seen, and at once
    folder.write(path)
    base = Base(folder.base_seed)
    model = adapted(name, folder.base_seed, seed=5) if over else Base(folder.base_seed)
    before, start = state(model), peak(again=True)
    must_fail = kinds == ["another_base"] and check_base and name == "ours"
    try:
        with (limited(SECONDS), patch.object(peft_format, "PATIENCE", 0.3),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")
            load_adapter(model, path, check_base=check_base)
    except (ValueError, TypeError, OSError) as error:
        outcome = "refused", f"{type(error).__name__}: {error}"
        if not str(error):
            outcome = "FINDING", f"{type(error).__name__} without a message"
        elif state(model) != before:
            outcome = "FINDING", f"the model is another one after {outcome[1]}"
        elif whole and not must_fail:
            outcome = "FINDING", f"a folder without a fault is refused: {error}"
    except (Exception, TooLong) as error:
        outcome = "FINDING", "".join(traceback.format_exception(error)[-3:]).strip()
    else:
        outcome = "loaded", ""
        if must_fail:
            outcome = "FINDING", "loaded into another base"
        else:
            try:
                compare(model, path, base)
            except Exception as error:
                outcome = "FINDING", f"loaded, though {type(error).__name__}: {error}"
    if len(outcome[1]) > MESSAGE:
        outcome = "FINDING", f"a message of {len(outcome[1])} characters: {outcome[1][:200]}"
    rise = peak() - start
    if rise > MEGABYTES:
        outcome = "FINDING", f"memory rose by {rise:.0f} MB; {outcome[1]}"
    return *outcome, rise


def kinds_of(rng: random.Random) -> list[str]:
    """One mutation, sometimes two or three on one folder."""
    return rng.choices(list(MUTATIONS), k=rng.choice([1, 1, 1, 1, 2, 3]))


def run(numbers, verbose: bool = False) -> tuple[dict, dict, float]:
    """Outcomes counted by first mutation, {number: (mutations, what was found)}, the most MB."""
    counts, findings, most = collections.defaultdict(collections.Counter), {}, 0.0
    originals()
    with tempfile.TemporaryDirectory() as path:
        for number in tqdm(numbers, unit=" inputs", disable=None):
            rng = random.Random(number)
            kinds = kinds_of(rng)
            begin = time.process_time()
            outcome, text, rise = attempt(rng, kinds, Path(path))
            most = max(most, rise)
            counts[kinds[0]][outcome] += 1
            if outcome == "FINDING":
                findings[number] = kinds, text
            if verbose:
                print(f"{number} {', '.join(kinds)}: {outcome} {text}",
                      f"({time.process_time() - begin:.2f} s, {rise:.0f} MB)")
    return counts, findings, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="how many, numbered from --first")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input, to try it again")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what each input raised")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(args.first, args.first + args.inputs) if args.only is None else [args.only]
    begin = time.perf_counter()
    counts, findings, most = run(numbers, args.verbose or args.only is not None)
    outcomes = ("refused", "loaded", "FINDING")
    print(f"{'mutation':24}" + "".join(f"{o:>9}" for o in outcomes))
    for kind, row in sorted(counts.items()):
        print(f"{kind:24}" + "".join(f"{row[o]:9}" for o in outcomes))
    print(f"{'all':24}" + "".join(f"{sum(row[o] for row in counts.values()):9}" for o in outcomes))
    print(f"{time.perf_counter() - begin:.0f} s; one input took at most {most:.0f} MB, of "
          f"{MEGABYTES} allowed")
    for number, (kinds, text) in findings.items():
        print(f"\n{', '.join(kinds)} (again: python -m tests.torch.fuzz --only {number})\n{text[-900:]}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
