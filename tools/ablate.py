"""Run an ablation of the paper: Table 4 (attentions), Table 5 (modal tokens), Fig. 7a (windows) or Fig. 7b (frames).

    python -m tools.ablate table4                                       # the synthetic set
    python -m tools.ablate fig7b --data pennaction --preset small       # flags of train.py, for every row

Every row is trained by `train.py` with the same budget and seeds, in a folder of its own; a row that two ablations
share is trained once. The same command goes on where it was interrupted. At the end it writes a table in markdown and,
for Fig. 7, a plot. A figure is the top-1 after the last epoch, not of the best one.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import data
import train
from d3t import Settings, window_index
from tools.common import file_name, tool

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
}
FIGURES = {"fig7a": "stride", "fig7b": "frames"}  # and what is drawn along x


@dataclass
class Row:
    name: str
    flags: str
    paper: str = ""
    line: str = ""  # of the plot
    x: int = 0


def rows_of(ablation: str, settings: Settings) -> list[Row]:
    """In Fig. 7a, of several strides that make the same windows, and so the same model, one has a row."""
    if ablation in TABLES:
        return [Row(*row) for row in TABLES[ablation]]
    if ablation == "fig7b":
        lengths = sorted({4, 6, 8, 12, settings.frames})
        return [Row(f"{T} frames", "" if settings.frames == T else f"--frames {T}", x=T) for T in lengths]
    unchanged, rows = (settings.temporal_window, settings.temporal_stride), {}
    pairs = {(window, stride) for window in (2, 4, 6) for stride in (1, window // 2, window)} | {unchanged}
    for window, stride in sorted(pairs, key=lambda pair: (pair != unchanged, pair)):  # the unchanged model first
        if window <= settings.frames:
            flags = "" if (window, stride) == unchanged else f"--temporal-window {window} --temporal-stride {stride}"
            windows = str(window_index(settings.frames, window, stride).tolist())
            rows.setdefault(windows, Row(f"window {window}, stride {stride}", flags, line=f"window {window}", x=stride))
    return sorted(rows.values(), key=lambda row: (row.line, row.x))


def train_row(folder: Path, words: list[str], jobs: int) -> float:
    """Start `train.py` in this folder or go on with its run; returns the top-1 after the last epoch, in percent."""
    command = [sys.executable, train.__file__, *words, "--out", str(folder), "--resume"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # unless it is set
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(command, env=threads | os.environ, stdout=output, stderr=output)
    if done.returncode:
        lines = (folder / "output.txt").read_text().strip().splitlines()
        raise data.UsageError(f"{folder} ended with status {done.returncode}: {lines[-1] if lines else ''}")
    top1 = 100 * json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["top1"]
    print(f"{folder}: {top1:.2f}", flush=True)
    return top1


def train_rows(rows: list[Row], place: Path, shared: list[str], seeds: list[int], jobs: int) -> np.ndarray:
    """Top-1 (rows, seeds). After an error no other run starts; on Ctrl-C those that train save and stop."""
    pool, runs = ThreadPoolExecutor(jobs), []
    for row, seed in itertools.product(rows, seeds):
        folder = place / (row.flags.replace("--", "").replace(" ", "-") or "as-it-is") / f"seed-{seed}"
        runs.append(pool.submit(train_row, folder, [*shared, *row.flags.split(), "--seed", str(seed)], jobs))
    try:
        found = {run: run.result() for run in as_completed(runs)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return np.array([found[run] for run in runs]).reshape(len(rows), len(seeds))


def table(rows: list[Row], found: np.ndarray) -> str:
    """A difference is beyond the spread if the seeds of both rows do not overlap."""
    base = next(top1 for row, top1 in zip(rows, found) if not row.flags)
    lines = ["| row | flags | top-1, mean ± sd | lowest .. highest | difference | beyond the spread | paper |"]
    lines.append("| --- " * 7 + "|")
    for row, top1 in zip(rows, found):
        sd = f" ± {top1.std(ddof=1):.2f}" if len(top1) > 1 else ""
        spread = [f"{top1.mean():.2f}{sd}", f"{top1.min():.2f} .. {top1.max():.2f}"]
        apart = "yes" if top1.min() > base.max() or top1.max() < base.min() else "no"
        compared = [f"{top1.mean() - base.mean():+.2f}", apart] if row.flags else ["", ""]
        cells = [row.name, f"`{row.flags}`" if row.flags else "", *spread, *compared, row.paper]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], found: np.ndarray, x: str, path: Path):
    """Fig. 7: mean over the seeds, bars from the lowest to the highest."""
    figure = data.need("matplotlib.figure", "matplotlib", "to draw the plot").Figure((5, 3.2), layout="constrained")
    axis = figure.subplots()
    for line, marker in zip(dict.fromkeys(row.line for row in rows), "os^v"):
        chosen = [number for number, row in enumerate(rows) if row.line == line]
        mean, low, high = found[chosen].mean(1), found[chosen].min(1), found[chosen].max(1)
        at = [rows[number].x for number in chosen]
        axis.errorbar(at, mean, (mean - low, high - mean), marker=marker, capsize=3, label=line)
    axis.set(xlabel=x, ylabel="top-1 (%)", xticks=sorted({row.x for row in rows}))
    axis.grid(alpha=0.3)
    if rows[0].line:
        axis.legend()
    figure.savefig(path, dpi=110)


@tool("tools.ablate")
def main(words: list[str] | None = None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("what", choices=[*TABLES, *FIGURES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores [1]")
    parser.add_argument("--out", type=Path, default=Path("ablations"), metavar="DIR", help="[ablations]")
    options, shared = parser.parse_known_args(words)
    if options.jobs < 1:
        raise data.UsageError(f"--jobs must be 1 or more, not {options.jobs}")
    flags, given = train.parse_args(shared)
    if "seed" in given or flags.resume or flags.overwrite or flags.eval or flags.stop_after < math.inf:
        raise data.UsageError("--seed, --resume, --overwrite, --eval and --stop-after: not here; there is --seeds")
    values = train.PRESETS[flags.preset] | given
    with data.errors_as(data.UsageError, "a model of these flags cannot be made"):
        settings = Settings(**{f.name: values[f.name] for f in fields(Settings) if f.name in values})
    place = options.out / file_name(flags.data, *shared)
    shared = ["--preset", flags.preset, *shared]  # so that --resume compares all settings with the checkpoint's
    rows = rows_of(options.what, settings)
    found = train_rows(rows, place, shared, options.seeds, options.jobs)
    text = f"`python -m tools.ablate {' '.join(words or sys.argv[1:])}`\n\n{table(rows, found)}\n"
    (place / f"{options.what}.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"\n{text}\nin {place}")
    if options.what in FIGURES:
        plot(rows, found, FIGURES[options.what], place / f"{options.what}.png")


if __name__ == "__main__":
    sys.exit(main())
