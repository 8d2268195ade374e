"""Run an ablation: of the paper, or without one of the modalities.

    python -m tools.ablate table4     # Table 4, attentions; the synthetic set
    python -m tools.ablate table5     # Table 5, cross-modal tokens
    python -m tools.ablate fig7a      # Fig. 7a, temporal windows
    python -m tools.ablate fig7b --data pennaction --preset small  # Fig. 7b, frames
    python -m tools.ablate modality   # joints hidden, frames grey

Every row is trained by `train.py`, whose flags may be added, with the same seeds, in a folder of
its own; the same command goes on where it was interrupted. It ends with a table in markdown and,
for Fig. 7, a plot. A figure is the top-1 after the last epoch, not the best one. `python -m
tools.ablate --hide joints` (or video) is `train.py` without that modality.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

import data
import train
from d3t import Ablation, windows
from tools.common import file_name, make_parser, tool

TABLES = {  # row, flags of train.py ("" for the unchanged model), the paper's top-1 on Penn Action
    "table4": (
        ("1 no 3D deformable attention", "--no-deformable-attention", "94.8"),
        ("2 3D deformable attention alone", "--no-joint-attention --no-temporal-attention", "97.9"),
        ("3 no joint stride attention", "--no-joint-attention", "98.2"),
        ("4 no temporal stride attention", "--no-temporal-attention", "98.5"),
        ("all three", "", "99.7"),
    ),
    "table5": (
        ("no tokens", "--modal-tokens 0", "92.2"),
        ("single token", "--modal-tokens 1", "97.0"),
        ("cross-modal tokens", "", "99.7"),
    ),
    "modality": (
        ("joints hidden", "--hide joints"),
        ("frames blank", "--hide video"),
        ("both there", ""),
    ),
}
FIGURES = {"fig7a": "stride", "fig7b": "frames"}  # and what is drawn along x
HEAD = "| row | flags | top-1 ± sd | lowest .. highest | difference | beyond the spread | paper |"


@dataclass
class Row:
    name: str
    flags: str
    paper: str = ""
    line: str = ""  # of the plot
    x: int = 0


def rows_of(ablation, settings):
    """The rows of an ablation; one of them, without flags, is the unchanged model."""
    T = settings.frames
    if ablation in TABLES:
        return [Row(*row) for row in TABLES[ablation]]
    if ablation == "fig7b":
        lengths = sorted({4, 6, 8, 12, T})
        return [Row(f"{n} frames", f"--frames {n}" if n != T else "", x=n) for n in lengths]
    unchanged = settings.temporal_window, settings.temporal_stride
    pairs = [(window, stride) for window in (2, 4, 6) for stride in (1, window // 2, window)]
    rows = {}  # by the windows: strides that make the same ones make the same model
    for window, stride in [unchanged, *pairs]:
        if window > T:
            continue
        flags = f"--temporal-window {window} --temporal-stride {stride}" if rows else ""
        row = Row(f"window {window}, stride {stride}", flags, "", f"window {window}", stride)
        rows.setdefault(str(windows(T, window, stride)), row)
    return sorted(rows.values(), key=lambda row: (row.line, row.x))


class HidingDataset(data.Dataset):
    """Clips with all joints invisible, or all frames grey."""

    def __init__(self, hide, *how):
        super().__init__(*how)
        self.hide = hide

    def load(self, clip, rng):
        item = super().load(clip, rng)
        if self.hide == "joints":
            item["visible"][:] = False
        else:
            item["video"][:] = 128
        return item


def train_hidden(words):
    """`train.py` with the flag --hide."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--hide", choices=("joints", "video"), required=True)
    options, words = parser.parse_known_args(words)
    with mock.patch.object(data, "Dataset", partial(HidingDataset, options.hide)):
        return train.main(words)


def train_row(folder, words, jobs):
    """Start a run in this folder or go on with it; its top-1 after the last epoch, in percent."""
    program = ["-m", "tools.ablate"] if "--hide" in words else [train.__file__]
    command = [sys.executable, *program, *words, "--out", str(folder), "--resume"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # unless it is set
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(command, env=threads | os.environ, stdout=output, stderr=output)
    if done.returncode:
        *_, last = ["", *(folder / "output.txt").read_text().strip().splitlines()]
        raise data.UsageError(f"{folder} ended with status {done.returncode}: {last}")
    *_, last = (folder / "log.jsonl").read_text().splitlines()
    top1 = 100 * json.loads(last)["top1"]
    print(f"{folder}: {top1:.2f}", flush=True)
    return top1


def train_rows(rows, place, shared, seeds, jobs):
    """Top-1 (rows, seeds). After an error no other run starts; on Ctrl-C those that train save."""
    pool, runs = ThreadPoolExecutor(jobs), []
    for row, seed in itertools.product(rows, seeds):
        name = row.flags.replace("--", "").replace(" ", "-") or "as-it-is"
        words = [*shared, *row.flags.split(), "--seed", str(seed)]
        runs.append(pool.submit(train_row, place / name / f"seed-{seed}", words, jobs))
    try:
        found = {run: run.result() for run in as_completed(runs)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return np.array([found[run] for run in runs]).reshape(len(rows), len(seeds))


def table(rows, found):
    """A difference is beyond the spread if the seeds of both rows do not overlap."""
    base = next(top1 for row, top1 in zip(rows, found) if not row.flags)
    lines = [HEAD, "| --- " * 7 + "|"]
    for row, top1 in zip(rows, found):
        flags, difference, apart = "", "", ""
        if row.flags:
            flags, difference = f"`{row.flags}`", f"{top1.mean() - base.mean():+.2f}"
            apart = "yes" if top1.min() > base.max() or top1.max() < base.min() else "no"
        sd = f" ± {top1.std(ddof=1):.2f}" if len(top1) > 1 else ""
        spread = f"{top1.min():.2f} .. {top1.max():.2f}"
        mean = f"{top1.mean():.2f}{sd}"
        cells = row.name, flags, mean, spread, difference, apart, row.paper
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows, found, x, path):
    """Fig. 7: mean over the seeds, bars from lowest to highest."""
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the plot")
    figure = plots.Figure((5, 3.2), layout="constrained")
    axis = figure.subplots()
    for line, marker in zip(dict.fromkeys(row.line for row in rows), "os^v"):
        chosen = [number for number, row in enumerate(rows) if row.line == line]
        mean, low, high = found[chosen].mean(1), found[chosen].min(1), found[chosen].max(1)
        bars = mean - low, high - mean
        at = [rows[number].x for number in chosen]
        axis.errorbar(at, mean, bars, marker=marker, capsize=3, label=line)
    axis.set(xlabel=x, ylabel="top-1 (%)", xticks=sorted({row.x for row in rows}))
    axis.grid(alpha=0.3)
    if rows[0].line:
        axis.legend()
    figure.savefig(path, dpi=110)


@tool("tools.ablate")
def main(words=None):
    words = sys.argv[1:] if words is None else words
    if "--hide" in words:
        return train_hidden(words)
    parser = make_parser("tools.ablate", __doc__)
    add = parser.add_argument
    add("what", choices=[*TABLES, *FIGURES])
    add("--seeds", type=train.number(int, zero=True), nargs="+", default=[0, 1, 2], help="[0 1 2]")
    add("--jobs", type=train.number(int), default=1, help="runs at a time [1]")
    add("--out", type=Path, default=Path("ablations"), help="[ablations]")
    options, shared = parser.parse_known_args(words)
    flags, given = train.parse_args(shared)
    if "seed" in given or flags.resume or flags.eval or flags.stop_after < math.inf:
        raise data.UsageError("--seed (there is --seeds), --resume, --eval, --stop-after: not here")
    values = {"joints": 100} | train.PRESETS[flags.preset] | given  # the data set knows the joints
    rows = rows_of(options.what, train.make(Ablation, values))
    place = options.out / file_name(flags.data, *shared)
    shared = ["--preset", flags.preset, *shared]  # for --resume to compare with the checkpoint
    found = train_rows(rows, place, shared, options.seeds, options.jobs)
    text = f"`python -m tools.ablate {' '.join(words)}`\n\n{table(rows, found)}\n"
    path = place / f"{options.what}.md"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"\n{text}\nin {place}")
    if options.what in FIGURES:
        plot(rows, found, FIGURES[options.what], path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
