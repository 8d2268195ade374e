"""See what a trained D3T attends to: Figures 5 and 6 of the paper for chosen clips, as pictures and as arrays.

    python -m tools.explain runs/synthetic/best.pt --clips 0 17

writes to --out, for each clip of the test split: NAME-tokens.png (Fig. 5: attention on the tokens that 3DTS selected,
placed back where they were read, and the points), NAME-joints.png (Fig. 6: attention on each joint in each frame),
NAME-overview.png (attention between frames, the Gaussian of a joint, the classes) and NAME.npz with the arrays.

    python -m tools.explain runs/synthetic/best.pt --boxes 100

measures on the synthetic clips, where two figures act, whether the attention goes to the one that the joints follow.
"""

import argparse
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


def box_shares(model: D3T, source: data.Source, clips: data.Dataset, count: int) -> dict[str, np.ndarray]:
    """Share of what the model attends to in the box of the actor and in the box of the other figure.

    Each clip is shown twice, with the joints on the one and on the other of its two figures: the pixels are the same,
    so a difference between the boxes is due to the joints alone. Mean over clips, 2 numbers for each row.
    """
    shares = {}
    for number in range(count):
        clip, item = clips.clips[number], clips[number]
        crops = []  # both figures with all their joints, in pixels of the crop
        for figure in np.float32(clip.media[0]):
            drawn = replace(clip, joints=figure, visible=np.ones(figure.shape[:2], bool))
            crops.append(clips.load(drawn, np.random.default_rng(0))["joints"])
        low, high = (torch.stack([f(crop, 1) for crop in crops]).numpy() for f in (torch.amin, torch.amax))  # (2, T, 2)
        for actor in (0, 1):
            followed = replace(clip, joints=np.float32(clip.media[0][actor]))
            item = clips.load(followed, np.random.default_rng(0))
            said = model.explain(item["video"][None], item["joints"][None], item["visible"][None])
            order = [actor, 1 - actor]
            for block in range(model.settings.blocks):
                if said.tokens is not None:
                    tokens = said.tokens[0, block].numpy()
                    edges = [8 * np.arange(n) - 4 for n in tokens.shape[1:]]  # token i is centred on pixel 8 i
                    rows, columns = (  # the part of each token that lies in the box: (2, T, h) and (2, T, w)
                        (np.minimum(high[..., a, None], e + 8) - np.maximum(low[..., a, None], e)).clip(0) / 8
                        for a, e in zip((1, 0), edges)
                    )
                    inside = np.einsum("fth, ftw, thw -> f", rows, columns, tokens) / tokens.sum()
                    shares.setdefault(f"token attention, block {block + 1}", []).append(inside[order])
                    t, y, x = said.points[0, block].reshape(-1, 3).numpy().T
                    t, places = np.rint(t).astype(int), 8 * np.stack([x, y], -1)
                    inside = ((places >= low[:, t]) & (places <= high[:, t])).all(-1).mean(-1)
                    shares.setdefault(f"points, block {block + 1}", []).append(inside[order])
                if said.joints is not None:
                    joints = said.joints[0, block].numpy() * item["visible"].numpy()
                    places = item["joints"].numpy()
                    inside = ((places >= low[:, :, None]) & (places <= high[:, :, None])).all(-1)  # (2, T, R)
                    inside = (inside * joints).sum((1, 2)) / said.joints[0, block].sum().item()
                    shares.setdefault(f"joint attention, block {block + 1}", []).append(inside[order])
    return {name: np.array(values) for name, values in shares.items()}


def print_boxes(model: D3T, source: data.Source, clips: data.Dataset, count: int):
    """A markdown table of `box_shares`, with weights as they are drawn from seed 0 and as they were trained."""
    if not source.clips["test"] or source.read is not data.draw:
        raise train.UsageError("--boxes needs --data synthetic: only there the place of the other figure is known")
    torch.manual_seed(0)
    untrained = box_shares(D3T(model.settings).eval(), source, clips, count)
    trained = box_shares(model, source, clips, count)
    print("| share in the box of | before: actor | other | after: actor | other |", "|---" * 5 + "|", sep="\n")
    for name, after in trained.items():
        cells = [f"{value:.3f}" for value in (*untrained[name].mean(0), *after.mean(0))]
        gap = after[:, 0] - after[:, 1]
        print(f"| {name} | {' | '.join(cells)} | {gap.mean() / (gap.std() / len(gap) ** 0.5):.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clips", type=int, nargs="+", default=[0], metavar="N", help="numbers in the test split [0]")
    parser.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="DIR", help="folder of the pictures [explained]"
    )
    parser.add_argument("--boxes", type=int, metavar="N", help="measure the first N test clips instead")
    data.add_flags(parser)
    parser.set_defaults(data=None)
    options = parser.parse_args()
    try:
        model, source, clips = load_model(options.checkpoint, options)
        if options.boxes:
            print_boxes(model, source, clips, options.boxes)
            return 0
        data.need("matplotlib", "matplotlib", "to draw the pictures")
        for number in options.clips:
            if not 0 <= number < len(clips):
                raise train.UsageError(f"--clips {number}: the test split has the clips 0 to {len(clips) - 1}")
        explain(options, model, source, clips)
        return 0
    except (train.UsageError, data.DataError) as error:
        print(f"tools.explain: {error}", file=sys.stderr)
        return 2


def explain(options: argparse.Namespace, model: D3T, source: data.Source, clips: data.Dataset):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    options.out.mkdir(parents=True, exist_ok=True)
    for number in options.clips:
        item = clips[number]
        found = model.explain(item["video"][None], item["joints"][None], item["visible"][None])
        said = {name: value[0].numpy() for name, value in vars(found).items() if value is not None}
        said["probabilities"] = found.logits[0].softmax(-1).numpy()
        stem = options.out / item["name"].replace(" ", "-").replace("/", "-")
        np.savez(stem.with_suffix(".npz"), label=item["label"], **said)
        if "tokens" in said:
            draw_tokens(plt, item, said, Path(f"{stem}-tokens.png"))
        if "joints" in said:
            draw_joints(plt, item, said, source.joint_names, Path(f"{stem}-joints.png"))
        draw_overview(plt, item, said, model, source, Path(f"{stem}-overview.png"))
        guess, label = said["probabilities"].argmax(), item["label"]
        sure = said["probabilities"][guess]
        print(f"{item['name']}: {source.classes[guess]} ({sure:.1%}), label {source.classes[label]}")


if __name__ == "__main__":
    sys.exit(main())
