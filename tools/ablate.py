"""Rerun an ablation of the paper: Table 4 (attentions), Table 5 (modal tokens), Fig. 7a (windows), Fig. 7b (frames).

    python -m tools.ablate table4                                       # the synthetic set
    python -m tools.ablate fig7b --data pennaction --preset small       # flags of train.py, for every row

Every row is trained by `train.py` with the same budget and the same seeds, in a folder of its own; rows that two
tables share are trained once. The same command goes on where it was interrupted. It ends with a table (markdown) and,
for Figure 7, a plot. A figure is the top-1 of the last epoch, not of the best.
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
from statistics import mean, stdev

import data
import train
from d3t import Settings, window_index

ABLATIONS = ("table4", "table5", "fig7a", "fig7b")


@dataclass
class Row:
    name: str
    flags: str  # of train.py; none for the model as it is, with which the others are compared
    paper: str = ""  # top-1 on Penn Action, where the paper gives a number
    line: str = ""  # of the plot
    x: float = 0.0


def rows_of(ablation: str, settings: Settings) -> list[Row]:
    if ablation == "table4":
        return [
            Row("1 no 3D deformable attention", "--no-deformable-attention", "94.8"),
            Row("2 3D deformable attention alone", "--no-joint-attention --no-temporal-attention", "97.9"),
            Row("3 no joint stride attention", "--no-joint-attention", "98.2"),
            Row("4 no temporal stride attention", "--no-temporal-attention", "98.5"),
            Row("all three", "", "99.7"),
        ]
    if ablation == "table5":
        return [
            Row("no tokens", "--modal-tokens 0", "92.2"),
            Row("single token", "--modal-tokens 1", "97.0"),
            Row("cross-modal tokens", "", "99.7"),
        ]
    if ablation == "fig7b":
        lengths = sorted({4, 6, 8, 12, settings.frames})
        return [Row(f"{T} frames", "" if settings.frames == T else f"--frames {T}", x=T) for T in lengths]
    own = settings.temporal_window, settings.temporal_stride
    pairs = {(window, stride) for window in (2, 4, 6) for stride in (1, window // 2, window)} | {own}
    rows = {}  # by the windows they make: where these are the same, so is the model
    for window, stride in sorted(pairs, key=lambda pair: (pair != own, pair)):
        if window <= settings.frames:
            flags = "" if (window, stride) == own else f"--temporal-window {window} --temporal-stride {stride}"
            row = Row(f"window {window}, stride {stride}", flags, line=f"window {window}", x=stride)
            rows.setdefault(str(window_index(settings.frames, window, stride).tolist()), row)
    return sorted(rows.values(), key=lambda row: (row.line, row.x))


def train_row(folder: Path, words: list[str], jobs: int) -> float:
    """Run `train.py`, or what is left of that run, in this folder; top-1 after its last epoch, in percent."""
    go_on = "--resume" if (folder / "last.pt").exists() else "--overwrite"  # the same if it is finished; else an error
    command = [sys.executable, train.__file__, *words, "--out", str(folder), go_on]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # unless it is set
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run(command, env=threads | os.environ, stdout=output, stderr=output)
    if done.returncode:
        said = (folder / "output.txt").read_text().strip().splitlines()
        raise train.UsageError(f"{folder} ended with status {done.returncode}: {said[-1] if said else ''}")
    top1 = 100 * json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["top1"]
    print(f"{folder}: {top1:.2f}", flush=True)
    return top1


def train_rows(rows: list[Row], place: Path, shared: list[str], seeds: list[int], jobs: int) -> list[list[float]]:
    """Top-1 by row and seed."""
    pool, found = ThreadPoolExecutor(jobs), []
    for row in rows:
        folder = place / (row.flags.replace("--", "").replace(" ", "-") or "as-it-is")
        runs = ((folder / f"seed-{seed}", [*shared, *row.flags.split(), "--seed", str(seed)]) for seed in seeds)
        found.append([pool.submit(train_row, *run, jobs) for run in runs])
    try:
        for future in as_completed(itertools.chain(*found)):
            future.result()
    finally:  # no other run is started after one that failed, which is told at once; on Ctrl-C they save themselves
        pool.shutdown(wait=False, cancel_futures=True)
    return [[future.result() for future in row] for row in found]


def table(rows: list[Row], found: list[list[float]]) -> str:
    """A difference counts as beyond the spread where the seeds of both rows do not overlap."""
    base = next(top1 for row, top1 in zip(rows, found) if not row.flags)
    cells = [["row", "flags", "top-1, mean ± sd", "lowest .. highest", "difference", "beyond the spread", "paper"]]
    cells.append(["---"] * len(cells[0]))
    for row, top1 in zip(rows, found):
        sd = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
        spread = [f"{mean(top1):.2f}{sd}", f"{min(top1):.2f} .. {max(top1):.2f}"]
        apart = "yes" if min(top1) > max(base) or max(top1) < min(base) else "no"
        compared = [f"{mean(top1) - mean(base):+.2f}", apart] if row.flags else ["", ""]
        cells.append([row.name, f"`{row.flags}`" if row.flags else "", *spread, *compared, row.paper])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def plot(rows: list[Row], found: list[list[float]], x: str, path: Path):
    """Fig. 7: mean over the seeds, bars from the lowest to the highest."""
    plt = data.need("matplotlib.pyplot", "matplotlib", "to draw the plot")
    plt.switch_backend("agg")
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for line, marker in zip(dict.fromkeys(row.line for row in rows), "os^v"):
        some = [(row.x, top1) for row, top1 in zip(rows, found) if row.line == line]
        middle = [mean(top1) for _, top1 in some]
        reach = [[m - min(t) for m, (_, t) in zip(middle, some)], [max(t) - m for m, (_, t) in zip(middle, some)]]
        axis.errorbar([x for x, _ in some], middle, reach, marker=marker, capsize=3, label=line)
    axis.set(xlabel=x, ylabel="top-1 (%)", xticks=sorted({row.x for row in rows}))
    axis.grid(alpha=0.3)
    if rows[0].line:
        axis.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=ABLATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores [1]")
    parser.add_argument("--out", type=Path, default=Path("ablations"), metavar="DIR", help="[ablations]")
    options, shared = parser.parse_known_args(words)
    try:
        if options.jobs < 1:
            raise train.UsageError(f"--jobs must be 1 or more, not {options.jobs}")
        if options.what.startswith("fig"):
            data.need("matplotlib", "matplotlib", "to draw the plot")
        flags, given = train.parse_args(shared)
        values = train.preset(flags.preset) | given
        if values["seed"] or flags.resume or flags.overwrite or flags.eval or flags.stop_after < math.inf:
            raise train.UsageError("--seed, --resume, --overwrite, --eval and --stop-after: not here; there is --seeds")
        try:
            settings = Settings(**{f.name: values[f.name] for f in fields(Settings) if f.name in values})
        except ValueError as error:
            raise train.UsageError(str(error)) from None
        place = options.out / "-".join([flags.data, *shared]).replace("--", "").replace("/", "_")
        rows = rows_of(options.what, settings)
        shared = ["--preset", flags.preset, *shared]  # so that --resume compares all but the batch with what is there
        found = train_rows(rows, place, shared, options.seeds, options.jobs)
        text = f"`python -m tools.ablate {' '.join(words or sys.argv[1:])}`\n\n{table(rows, found)}\n"
        (place / f"{options.what}.md").write_text(text)
        print(f"\n{text}")
        if options.what.startswith("fig"):
            plot(rows, found, "stride" if options.what == "fig7a" else "frames", place / f"{options.what}.png")
        print(f"in {place}")
        return 0
    except (train.UsageError, data.DataError, OSError) as error:
        print(f"tools.ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
