"""Show that the 3D token search (3DTS, Fig. 3) finds a token that the regular grid does not read.

In a volume of noise, one token outside the regular grid, the marked one, holds one of four codes: the label. Three
channels of every token hold the displacement (t, h, w) to it. 3D deformable attention and a linear layer learn from
labels alone; the search learns, too, or is frozen at the regular grid. Printed are, on new samples, top-1 and the mean
distance of the nearest point to the marked token, in tokens. The default takes 25 seconds; the paper's size is
`python -m tools.search --kernel 7 --grid 12 28 28 --batch 16 --rate 0.003 --steps 4000 --seeds 0`.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from d3t import DeformableAttention
from tools.common import tool

WIDTH, CODES, TESTS, SHOWN = 16, 4, 256, 3  # D, labels, samples of a test, samples in the picture
SCALE, CLIP = 14, 0.2  # of the displacement, at the longest axis; largest norm of the gradient


class Reader(nn.Module):
    """3D deformable attention and a linear layer on the mean modal token: Z (B, T, h, w, D) -> logits (B, CODES)."""

    def __init__(self, grid: list[int], k: int, frozen: bool):
        super().__init__()
        self.deformable = DeformableAttention(WIDTH, 1, grid, k)
        self.modal = nn.Parameter(0.02 * torch.randn(grid[0], 2, WIDTH))
        self.head = nn.Linear(WIDTH, CODES)
        for parameter in self.deformable.search.offset.parameters():  # as in D3T, the search starts at the regular grid
            nn.init.zeros_(parameter).requires_grad_(not frozen)

    def forward(self, Z: Tensor) -> Tensor:
        M = self.modal.expand(len(Z), -1, -1, -1).flatten(1, 2)  # (B, 2T, D)
        X_ = torch.cat([self.deformable.search(Z).flatten(1, 3), M], dim=1)  # Eq. (5)
        return self.head(self.deformable.attention(M, X_).mean(1))  # nobody reads what the RGB tokens would get


def draw_samples(options: argparse.Namespace, count: int, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens Z (count, T, h, w, D), labels (count,) and marked tokens (count, 3)."""
    tokens, length = torch.cartesian_prod(*map(torch.arange, options.grid)), torch.tensor(options.grid)
    first = (length.clamp(max=options.kernel) - 1) / 2  # the regular grid: first, first + 1, .., length - 1 - first
    outside = tokens[((tokens <= first - 1) | (tokens >= length - first)).any(1)]
    marked, label = outside[torch.randint(len(outside), (count,))], torch.randint(CODES, (count,))
    Z = options.noise * torch.randn(count, *options.grid, WIDTH)
    Z[..., :3] += options.scale / max(options.grid) * (marked[:, None] - tokens).unflatten(1, options.grid)
    Z[torch.arange(count), *marked.T, 3:] += codes[label]
    return Z, label, marked


def experiment(options: argparse.Namespace, seed: int, frozen: bool) -> tuple[list, list[Tensor]]:
    """Train once: [top-1, distance before, after, seconds], [label, prediction, marked token, points before, after]."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = Reader(options.grid, options.kernel, frozen)
    codes = torch.randn(CODES, WIDTH - 3).sign()
    Z, label, marked = draw_samples(options, TESTS, codes)
    before = model.deformable.search.points(Z).detach().flatten(1, 3)  # (TESTS, T~*h~*w~, 3)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, betas=(0.9, 0.95))
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.rate * min(1, 10 * step / options.steps)  # warm-up: a tenth
        batch, target, _ = draw_samples(options, options.batch, codes)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    with torch.no_grad():
        guess, after = model(Z).argmax(1), model.deformable.search.points(Z).flatten(1, 3)
    near = [(points - marked[:, None]).norm(dim=2).amin(1).mean() for points in (before, after)]
    return [(guess == label).float().mean(), *near, time.perf_counter() - start], [label, guess, marked, before, after]


def draw(plots, options: argparse.Namespace, found: list[Tensor]):
    """A row for each sample, a column for each frame; a point is drawn in the frame that is nearest in time."""
    T, h, w = options.grid
    figure = plots.Figure(figsize=(2 * T, 2.3 * SHOWN), layout="constrained")
    for i, (axes, label, guess, marked, *points) in enumerate(zip(figure.subplots(SHOWN, T, squeeze=False), *found)):
        for t, axis in enumerate(axes):
            cells = [[[t, y, x] == marked.tolist() for x in range(w)] for y in range(h)]
            axis.pcolormesh(range(w), range(h), cells, cmap="Oranges", vmax=2, edgecolors="lightgrey")
            for at, face, name in zip(points, ("none", "tab:blue"), ("points before", "and after training")):
                _, y, x = at[at[:, 0].round() == t].T
                axis.scatter(x, y, s=20, c=face, edgecolors="tab:blue", label=name)
            axis.set(xticks=[], yticks=[], ylim=(h - 0.5, -0.5), aspect="equal", xlabel=f"frame {t}")
        axes[0].set_title(f"sample {i}: code {label}, predicted {guess}", loc="left")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", title="orange: the marked token")
    figure.savefig(options.out / "search.png", dpi=110)


@tool("tools.search")
def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser("tools.search", usage=argparse.SUPPRESS, description=__doc__)
    add = parser.add_argument
    add("--grid", type=int, nargs=3, default=[3, 7, 7], metavar=("T", "H", "W"), help="of the volume, tokens [3 7 7]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    add("--without-displacement", dest="scale", action="store_const", const=0, default=SCALE, help="leave it out")
    add("--out", type=Path, default=Path("searched"), metavar="DIR", help="of search.png [searched]")
    for name, value in (("kernel", 3), ("steps", 400), ("batch", 32), ("noise", 0.2), ("rate", 0.01)):
        add(f"--{name}", type=type(value), default=value, metavar="N", help=f"[{value}]")
    options = parser.parse_args(words)
    allowed = min(options.rate, options.steps, options.batch, *options.grid) > 0 <= min(options.noise, *options.seeds)
    if not allowed or min(options.kernel, max(options.grid)) < 3 or max(options.seeds) >= 2**64:
        raise data.UsageError("--kernel and an axis of --grid are 3 or more, --noise and --seeds 0 or more, others > 0")
    options.out.mkdir(parents=True, exist_ok=True)
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the picture")
    print("| search | seed | top-1 | distance before | after | steps | seconds |\n" + "| --- " * 7 + "|")
    for seed, search in itertools.product(options.seeds, ("learned", "frozen")):
        (top1, before, after, seconds), tested = experiment(options, seed, search == "frozen")
        print(f"| {search} | {seed} | {top1:.1%} | {before:.2f} | {after:.2f} | {options.steps} | {seconds:.0f} |")
        if (seed, search) == (options.seeds[0], "learned"):
            draw(plots, options, tested)


if __name__ == "__main__":
    sys.exit(main())
