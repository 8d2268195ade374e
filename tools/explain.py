"""See what a trained D3T attends to: Figures 5 and 6 of the paper for chosen clips, as pictures and as arrays.

    python -m tools.explain runs/synthetic/best.pt --clips 0 17

writes to --out, for each clip of the test split: NAME-tokens.png (Fig. 5: attention on the tokens that 3DTS selected,
placed back where they were read, and the points), NAME-joints.png (Fig. 6: attention on each joint in each frame),
NAME-overview.png (attention between frames, the Gaussian of a joint, the classes) and NAME.npz with the arrays; and
curve.png, the loss and accuracy of the run.

    python -m tools.explain runs/synthetic/best.pt --boxes 100

measures on the synthetic clips, where two figures act, whether the attention goes to the one that the joints follow.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import train
from d3t import D3T, Settings, joint_heatmaps


def load_model(path: Path, options: argparse.Namespace) -> tuple[D3T, data.Source, data.Dataset]:
    """The model of a checkpoint and the clips it is tested on; UsageError or DataError where they do not fit."""
    saved = train.load_checkpoint(path)
    options.data = options.data or saved["data"]
    source = data.load(options)
    settings = Settings(**saved["settings"])
    if (settings.classes, settings.joints) != (len(source.classes), len(source.joint_names)):
        raise train.UsageError(
            f"{path} knows {settings.classes} classes and {settings.joints} joints, {options.data} has "
            f"{len(source.classes)} and {len(source.joint_names)}: use --data {saved['data']}"
        )
    model = D3T(settings)
    with train.blame(f"{path} does not fit"):
        model.load_state_dict(saved["model"])
    clips = data.Dataset(source, "test", settings.frames, settings.height, settings.width)
    return model.eval(), source, clips


def draw_tokens(plt, item: dict, said: dict, path: Path):
    """Fig. 5: a row for each block and one for their mean; points are drawn in the frame that is nearest in time."""
    frames, size = item["video"].shape[1], item["video"].shape[2:]
    rows = [(f"block {i + 1}", m) for i, m in enumerate(said["tokens"])] + [("mean", said["tokens"].mean(0))]
    figure, axes = plt.subplots(len(rows), frames, figsize=(1.6 * frames + 0.6, 1.7 * len(rows) + 0.4), squeeze=False)
    image = None
    for row, (name, maps) in enumerate(rows):
        for t, axis in enumerate(axes[row]):
            axis.imshow(item["video"][:, t].permute(1, 2, 0), extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5))
            h, w = maps.shape[1:]
            edges = (-4.5, 8 * w - 4.5, 8 * h - 4.5, -4.5)  # token i is centred on pixel 8 i, as the trunk sees it
            image = axis.imshow(maps[t], extent=edges, cmap="cividis", alpha=0.55, vmin=0, vmax=maps.max(), zorder=1)
            axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5), xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"frame {t}", fontsize=8)
            if name != "mean":
                points = said["points"][row].reshape(-1, 3)
                near = points[np.rint(points[:, 0]) == t]
                axis.scatter(
                    8 * near[:, 2], 8 * near[:, 1], s=12, c="white", edgecolors="black", linewidths=0.6, zorder=2
                )
        axes[row, 0].set_ylabel(name, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention").set_ticks([])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_joints(plt, item: dict, said: dict, names: list[str], path: Path):
    """Fig. 6: joint names x frames as a heat map, and the joints on the frames in the same colours."""
    share, visible = said["joints"].mean(0), item["visible"].numpy()
    frames = len(share)
    figure = plt.figure(figsize=(1.6 * frames + 2.5, 1.9 + 0.2 * len(names)))
    grid = figure.add_gridspec(2, frames, height_ratios=(1.6, 0.2 * len(names)))
    for t in range(frames):
        axis = figure.add_subplot(grid[0, t])
        axis.imshow(item["video"][:, t].permute(1, 2, 0))
        x, y = item["joints"][t, visible[t]].T
        axis.scatter(x, y, s=30, c=share[t, visible[t]], cmap="cividis", vmin=0, vmax=share.max(), edgecolors="white")
        axis.set_title(f"frame {t}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    axis = figure.add_subplot(grid[1, :])
    image = axis.imshow(np.where(visible, share, np.nan).T, cmap="cividis", vmin=0, vmax=share.max(), aspect="auto")
    axis.set_facecolor("lightgrey")  # a joint that is not visible
    axis.set(yticks=range(len(names)), xticks=range(frames), xlabel="frame (grey: not visible)")
    axis.set_yticklabels(names, fontsize=7)
    figure.colorbar(image, ax=axis, label="attention")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_overview(plt, item: dict, said: dict, model: D3T, source: data.Source, path: Path):
    """Attention between frames, the Gaussian of a visible joint over F_a, and the likeliest classes."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    if "frames" in said:
        image = axes[0].imshow(said["frames"].mean(0), cmap="cividis", vmin=0)
        figure.colorbar(image, ax=axes[0])
    axes[0].set(title="attention between frames", xlabel="to frame", ylabel="from frame")
    joint = int(item["visible"][0].float().argmax())
    size = [-(-side // 2) for side in item["video"].shape[2:]]
    heat = joint_heatmaps(item["joints"][None], item["visible"][None], size, 2, model.settings.sigma)[0, 0, joint]
    axes[1].imshow(item["video"][:, 0].permute(1, 2, 0))
    axes[1].imshow(heat, extent=(-1.5, 2 * size[1] - 1.5, 2 * size[0] - 1.5, -1.5), cmap="cividis", alpha=0.6)
    axes[1].set_title(f"Eq. (2), {source.joint_names[joint]}, frame 0", fontsize=10)
    axes[1].set(xticks=[], yticks=[], xlim=(-0.5, 2 * size[1] - 1.5), ylim=(2 * size[0] - 1.5, -0.5))
    best = said["probabilities"].argsort()[::-1][:5]
    axes[2].barh([source.classes[i] for i in best][::-1], said["probabilities"][best][::-1], color="tab:blue")
    axes[2].set(xlim=(0, 1), xlabel="probability", title=f"label: {source.classes[item['label']]}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def box_shares(model: D3T, clips: data.Dataset, count: int) -> dict[str, np.ndarray]:
    """Share of what the model attends to in the box of the actor and in that of the other figure: (2 * count, 2) each.

    Each clip is shown twice, with the joints on the one and on the other of its two figures. The pixels are the same,
    so a difference between the boxes is due to the joints alone.
    """
    shares = {}
    for clip in clips.clips[:count]:
        whole = [replace(clip, joints=np.float32(f), visible=np.ones(f.shape[:2], bool)) for f in clip.media[0]]
        crops = [clips.load(figure, np.random.default_rng(0))["joints"] for figure in whole]  # all joints of both
        low, high = (torch.stack([f(crop, 1) for crop in crops]).numpy() for f in (torch.amin, torch.amax))  # (2, T, 2)

        def inside(places, t, low=low, high=high):  # x, y of places in frames t: whether they lie in the boxes, (2, n)
            return ((places >= low[:, t]) & (places <= high[:, t])).all(-1)

        for actor in (0, 1):
            item = clips.load(replace(clip, joints=whole[actor].joints), np.random.default_rng(0))
            said = model.explain(item["video"][None], item["joints"][None], item["visible"][None])
            found = {}
            for block in range(model.settings.blocks):
                if said.tokens is not None:
                    tokens = said.tokens[0, block].numpy()
                    down, across = (  # the part of each token, centred on pixel 8 i, in the boxes: (2, T, h), (2, T, w)
                        (np.minimum(high[..., a, None], 8 * n + 4) - np.maximum(low[..., a, None], 8 * n - 4)).clip(0)
                        for a, n in zip((1, 0), map(np.arange, tokens.shape[1:]))
                    )
                    within = np.einsum("fth, ftw, thw -> f", down / 8, across / 8, tokens) / tokens.sum()
                    found[f"token attention, block {block + 1}"] = within
                    t, y, x = said.points[0, block].reshape(-1, 3).numpy().T
                    within = inside(8 * np.stack([x, y], -1), np.rint(t).astype(int)).mean(-1)
                    found[f"points, block {block + 1}"] = within
                if said.joints is not None:
                    given, seen = said.joints[0, block].numpy(), item["visible"].numpy()
                    within = inside(item["joints"].numpy()[seen], np.nonzero(seen)[0]) @ given[seen] / given.sum()
                    found[f"joint attention, block {block + 1}"] = within
            for name, within in found.items():
                shares.setdefault(name, []).append(within[[actor, 1 - actor]])
    return {name: np.array(values) for name, values in shares.items()}


def print_boxes(model: D3T, source: data.Source, clips: data.Dataset, count: int):
    """A markdown table of `box_shares`, with weights as they are drawn from seed 0 and as they were trained."""
    if source.read is not data.draw:
        raise train.UsageError("--boxes needs --data synthetic: only there the place of the other figure is known")
    torch.manual_seed(0)
    untrained = box_shares(D3T(model.settings).eval(), clips, count)
    trained = box_shares(model, clips, count)
    print("| share in the box of the | before: actor | other | after: actor | other | difference ± standard error |")
    print("|---" * 6 + "|")
    for name, after in trained.items():
        gap = (after[:, 0] - after[:, 1]).reshape(-1, 2).mean(1)  # a clip is shown twice
        cells = [f"{value:.3f}" for value in (*untrained[name].mean(0), *after.mean(0))]
        print(f"| {name} | {' | '.join(cells)} | {gap.mean():+.3f} ± {gap.std() / len(gap) ** 0.5:.3f} |")


def draw_curve(plt, log: Path, path: Path):
    """Loss of every tenth step and accuracy after each epoch of the run that the checkpoint is from."""
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        losses, steps = [loss for line in lines for loss in line["losses"]], [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise train.UsageError(f"{log} is no log of train.py: {train.one_line(error)}") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    left.plot(10 * np.arange(1, len(losses) + 1), losses, marker=".")
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    right.plot(steps, [100 * line["top1"] for line in lines], marker="o", label="top-1")
    right.plot(steps, [100 * line["mean_class"] for line in lines], marker="x", linestyle="--", label="mean class")
    right.set(xlabel="step", ylabel="test accuracy (%)", xlim=left.get_xlim(), ylim=(0, 103))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clips", type=int, nargs="+", default=[0], metavar="N", help="numbers in the test split [0]")
    parser.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="DIR", help="folder of the pictures [explained]"
    )
    parser.add_argument("--boxes", type=int, metavar="N", help="measure the first N test clips instead")
    data.add_flags(parser)
    parser.set_defaults(data=None)
    options = parser.parse_args(words)
    try:
        model, source, clips = load_model(options.checkpoint, options)
        if options.boxes is not None:
            if not 1 <= options.boxes <= len(clips):
                raise train.UsageError(f"--boxes {options.boxes}: the test split has {len(clips)} clips")
            print_boxes(model, source, clips, options.boxes)
            return 0
        for number in options.clips:
            if not 0 <= number < len(clips):
                raise train.UsageError(f"--clips {number}: the test split has the clips 0 to {len(clips) - 1}")
        explain(options, model, source, clips)
        return 0
    except (train.UsageError, data.DataError, OSError) as error:
        print(f"tools.explain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def explain(options: argparse.Namespace, model: D3T, source: data.Source, clips: data.Dataset):
    plt = data.need("matplotlib.pyplot", "matplotlib", "to draw the pictures")
    plt.switch_backend("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    for number in options.clips:
        item = clips[number]
        found = model.explain(item["video"][None], item["joints"][None], item["visible"][None])
        said = {name: value[0].numpy() for name, value in vars(found).items() if value is not None}
        said["probabilities"] = found.logits[0].softmax(-1).numpy()
        stem = options.out / item["name"].replace(" ", "-").replace("/", "-")
        np.savez(f"{stem}.npz", label=item["label"], **said)
        if "tokens" in said:
            draw_tokens(plt, item, said, Path(f"{stem}-tokens.png"))
        if "joints" in said:
            draw_joints(plt, item, said, source.joint_names, Path(f"{stem}-joints.png"))
        draw_overview(plt, item, said, model, source, Path(f"{stem}-overview.png"))
        guess, label = said["probabilities"].argmax(), item["label"]
        sure = said["probabilities"][guess]
        print(f"{item['name']}: {source.classes[guess]} ({sure:.1%}), label {source.classes[label]}")
    log = options.checkpoint.parent / "log.jsonl"
    if log.exists() and log.stat().st_size:
        draw_curve(plt, log, options.out / "curve.png")


if __name__ == "__main__":
    sys.exit(main())
