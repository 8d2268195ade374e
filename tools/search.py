"""Show that the 3D token search (3DTS, Fig. 3) finds a token that the regular grid does not read.

In a volume of noise, one token outside the regular grid, the marked one, holds one of four codes:
the label. Three channels of every token hold the displacement (t, h, w) to it. 3D deformable
attention and a linear layer learn from labels alone; the search learns, too, or is frozen at the
regular grid. Printed are, on new samples, top-1 and the mean distance of the nearest point to the
marked token, in tokens. The default takes 25 seconds; the paper's size is

    python -m tools.search --kernel 7 --grid 12 28 28 --batch 16 --rate 0.003 --steps 4000 --seeds 0
"""

import itertools
import sys
import time
from pathlib import Path

import torch
from torch import nn

import data
from d3t import DeformableAttention
from tools.common import make_parser, tool
from train import number

WIDTH, CODES, TESTS, SHOWN = 16, 4, 256, 3  # D, labels, samples of a test, those in the picture
SCALE, CLIP = 14, 0.2  # of the displacement, at the longest axis; largest norm of the gradient


class Reader(nn.Module):
    """3D deformable attention, and a linear layer: Z (B, T, h, w, D) -> logits (B, CODES)."""

    def __init__(self, grid, k, frozen):
        super().__init__()
        self.deformable = DeformableAttention(WIDTH, 1, grid, k)
        self.modal = nn.Parameter(0.02 * torch.randn(grid[0], 2, WIDTH))
        self.head = nn.Linear(WIDTH, CODES)
        for parameter in self.deformable.search.offset.parameters():
            nn.init.zeros_(parameter)  # as in D3T, the search starts at the regular grid
            parameter.requires_grad_(not frozen)

    def forward(self, Z):
        M = self.modal.expand(len(Z), -1, -1, -1).flatten(1, 2)  # (B, 2T, D)
        X_ = torch.cat([self.deformable.search(Z).flatten(1, 3), M], dim=1)  # Eq. (5)
        # Only the modal tokens ask: nobody reads what the RGB tokens would get.
        return self.head(self.deformable.attention(M, X_).mean(1))


def draw_samples(options, count, codes):
    """Tokens Z (count, T, h, w, D), labels (count,) and marked tokens (count, 3)."""
    tokens = torch.cartesian_prod(*map(torch.arange, options.grid))
    length = torch.tensor(options.grid)
    first = (length.clamp(max=options.kernel) - 1) / 2  # of the regular grid
    outside = tokens[((tokens <= first - 1) | (tokens >= length - first)).any(1)]
    marked = outside[torch.randint(len(outside), (count,))]
    label = torch.randint(CODES, (count,))
    Z = options.noise * torch.randn(count, *options.grid, WIDTH)
    displacement = (marked[:, None] - tokens).unflatten(1, options.grid)
    Z[..., :3] += options.scale / max(options.grid) * displacement
    Z[torch.arange(count), *marked.T, 3:] += codes[label]
    return Z, label, marked


def experiment(options, seed, frozen):
    """Train once: [top-1, distance before, after, seconds]; of test samples [label, prediction,
    marked token, points before, after]."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = Reader(options.grid, options.kernel, frozen)
    search = model.deformable.search
    codes = torch.randn(CODES, WIDTH - 3).sign()
    Z, label, marked = draw_samples(options, TESTS, codes)
    before = search.points(Z).detach().flatten(1, 3)  # (TESTS, T~*h~*w~, 3)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, betas=(0.9, 0.95))
    for step in range(options.steps):
        warm_up = min(1, 10 * step / options.steps)
        optimizer.param_groups[0]["lr"] = options.rate * warm_up
        batch, target, _ = draw_samples(options, options.batch, codes)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    with torch.no_grad():
        guess, after = model(Z).argmax(1), search.points(Z).flatten(1, 3)
    near = [(points - marked[:, None]).norm(dim=2).amin(1).mean() for points in (before, after)]
    top1 = (guess == label).float().mean()
    seconds = time.perf_counter() - start
    return [top1, *near, seconds], [label, guess, marked, before, after]


def draw(plots, options, found):
    """A row for each sample, a column for each frame; points in the frame nearest in time."""
    T, h, w = options.grid
    figure = plots.Figure((2 * T, 2.3 * SHOWN), layout="constrained")
    rows = figure.subplots(SHOWN, T, squeeze=False)
    for i, (axes, label, guess, marked, *points) in enumerate(zip(rows, *found)):
        for t, axis in enumerate(axes):
            cells = torch.zeros(options.grid)
            cells[tuple(marked)] = 1
            how = {"cmap": "Oranges", "vmax": 2, "edgecolors": "lightgrey"}
            axis.pcolormesh(range(w), range(h), cells[t], **how)
            colours = {"points before": "none", "and after training": "tab:blue"}
            for at, (name, face) in zip(points, colours.items()):
                _, y, x = at[at[:, 0].round() == t].T
                axis.scatter(x, y, s=20, c=face, edgecolors="tab:blue", label=name)
            edge = h - 0.5, -0.5
            axis.set(xticks=[], yticks=[], ylim=edge, aspect="equal", xlabel=f"frame {t}")
        axes[0].set_title(f"sample {i}: code {label}, predicted {guess}", loc="left")
    names = axis.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", title="orange: the marked token")
    figure.savefig(options.out / "search.png", dpi=110)


@tool("tools.search")
def main(words=None):
    parser = make_parser("tools.search", __doc__)
    add = parser.add_argument
    grid = {"nargs": 3, "default": [3, 7, 7], "metavar": ("T", "H", "W")}
    add("--grid", type=number(int), **grid, help="of the volume, tokens [3 7 7]")
    add("--seeds", type=number(int, zero=True), nargs="+", default=[0, 1, 2], help="[0 1 2]")
    add("--noise", type=number(float, zero=True), default=0.2, help="[0.2]")
    for name, value in {"kernel": 3, "steps": 400, "batch": 32, "rate": 0.01}.items():
        add(f"--{name}", type=number(type(value)), default=value, help=f"[{value}]")
    add("--without-displacement", dest="scale", action="store_const", const=0, default=SCALE)
    add("--out", type=Path, default=Path("searched"), help="folder of search.png [searched]")
    options = parser.parse_args(words)
    if min(options.kernel, max(options.grid)) < 3:
        raise data.UsageError("--kernel and an axis of --grid must be 3 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the picture")
    print("| search | seed | top-1 | distance before | after | steps | seconds |")
    print("| --- " * 7 + "|")
    for seed, search in itertools.product(options.seeds, ("learned", "frozen")):
        figures, tested = experiment(options, seed, search == "frozen")
        top1, before, after, seconds = figures
        cells = f"{top1:.1%} | {before:.2f} | {after:.2f} | {options.steps} | {seconds:.0f}"
        print(f"| {search} | {seed} | {cells} |", flush=True)
        if (seed, search) == (options.seeds[0], "learned"):
            draw(plots, options, tested)


if __name__ == "__main__":
    sys.exit(main())
