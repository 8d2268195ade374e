"""Draw what a trained D3T attends to: Figures 5 and 6 of the paper for chosen clips, as pictures and as arrays.

    python -m tools.explain runs/synthetic/best.pt --clips 0 17

writes to --out, for each clip of the test split:

    NAME-tokens.png    Fig. 5: attention on the tokens that 3DTS selected, placed back where they were read; the points
    NAME-joints.png    Fig. 6: attention on each joint in each frame
    NAME-overview.png  attention between frames, the Gaussian of one joint, the likeliest classes
    NAME.npz           the arrays of `Explanation`, the clip, its label and the probabilities

NAME is the number and the name of the clip, and a checksum that keeps similar names apart. In code,
`explain(model, video, joints, visible)` returns an `Explanation`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import d3t
import data
import train
from d3t import D3T, AttentionBlock, Settings, TokenSearch, mean_of_windows
from tools.common import file_name, tool

CELL = 8  # pixels from one RGB token to the next


# ---- The attention of the modal tokens -----------------------------------------------------------------------------
@dataclass
class Explanation:
    """What the modal tokens attend to in each of the L blocks, mean over heads; None where an attention is disabled.

    Without modal tokens (Table 5) it is what all tokens attend to. A row of `frames` sums to 1. `selected` and `tokens`
    sum to 1 less the share of the modal tokens, and so does `joints` within each window, before the mean over windows.
    """

    logits: Tensor  # (B, classes)
    points: Tensor | None  # (B, L, T~, h~, w~, 3), where 3DTS reads Z, in tokens (t, h, w)
    selected: Tensor | None  # (B, L, T~, h~, w~), attention on the tokens that 3DTS selected
    tokens: Tensor | None  # (B, L, T, h, w), the same placed back on the tokens it was read from (Fig. 5)
    joints: Tensor | None  # (B, L, T, R), attention on each joint, mean over its windows (Fig. 6)
    frames: Tensor | None  # (B, L, T, T), from the modal tokens of a frame to all tokens of each frame


@torch.no_grad()
def explain(model: D3T, video: Tensor, joints: Tensor, visible: Tensor) -> Explanation:
    """Run the model, record the inputs of each attention and token search, and compute the attention maps from them.

    Raises RuntimeError in training mode, where a forward would change the averages of the batch norms. It does not
    work under `torch.inference_mode`, because placing attention back on the tokens takes a gradient.
    """
    if model.training:
        raise RuntimeError("explain needs a model in evaluation mode: call model.eval() first")
    logits, recorded = record_inputs(model, video, joints, visible)
    s = model.settings
    maps = {name: [] for name in ("points", "selected", "tokens", "joints", "frames")}
    for block in model.blocks:
        if block.deformable is not None:
            points, selected = selected_tokens(block.deformable, recorded, s)
            maps["points"].append(points)
            maps["selected"].append(selected)
            maps["tokens"].append(place_back(selected, points, s.grid))
        if block.joint is not None:
            maps["joints"].append(attended_joints(block.joint, recorded, s))
        if block.temporal is not None:
            maps["frames"].append(attended_frames(block.temporal, recorded, s))
    return Explanation(logits, **{name: torch.stack(of, dim=1) if of else None for name, of in maps.items()})


def record_inputs(model: D3T, *inputs: Tensor) -> tuple[Tensor, dict]:
    """Logits, and the inputs of each attention and token search by module."""
    recorded = {}

    def record(module, inputs):
        recorded[module] = inputs

    watched = [module for module in model.modules() if isinstance(module, (AttentionBlock, TokenSearch))]
    hooks = [module.register_forward_pre_hook(record) for module in watched]
    try:
        logits = model.forward(*inputs)  # model(*inputs) of a compiled model would run its graph, without the hooks
    finally:
        for hook in hooks:
            hook.remove()
    return logits, recorded


def attention_map(attention: AttentionBlock, X: Tensor, X_: Tensor) -> Tensor:
    """The weights of Eq. (6), which `msa` does not keep: (B, n, m), mean over the heads; each row sums to 1."""
    q, k = attention.split(attention.Wq(X)), attention.split(attention.Wk(X_))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)


def modal_map(attention: AttentionBlock, recorded: dict, frames: int, modal: int) -> Tensor:
    """Attention map of the last `modal` tokens of each frame, or of all its tokens if modal is 0, as their mean.

    Returns (B, frames, m). In the last block only the modal tokens ask in the temporal attention: there these are all.
    """
    X, X_ = recorded[attention]
    asking = X.unflatten(1, (frames, -1))[:, :, -modal:]  # (B, frames, modal, D)
    return attention_map(attention, asking.flatten(1, 2), X_).unflatten(1, (frames, -1)).mean(2)


def selected_tokens(deformable: d3t.DeformableAttention, recorded: dict, s: Settings) -> tuple[Tensor, Tensor]:
    """Points of 3DTS (B, T~, h~, w~, 3), and the attention of [M_RGB, M_CLS] on the tokens selected there."""
    points = deformable.search.points(*recorded[deformable.search])
    given = modal_map(deformable.attention, recorded, s.frames, min(s.modal_tokens, 2)).mean(1)
    return points, given[:, : points.shape[1:-1].numel()].view(points.shape[:-1])


def place_back(values: Tensor, points: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The transpose of `sample_tokens`: values (B, ...) at points (B, ..., 3) -> (B, T, h, w) with the same sum."""
    with torch.enable_grad():  # sampling is linear in Z, so its gradient is its transpose
        Z = values.new_zeros(len(values), *grid, 1).requires_grad_()
        return torch.autograd.grad(d3t.sample_tokens(Z, points), Z, values[..., None])[0][..., 0]


def attended_joints(joint: d3t.JointStrideAttention, recorded: dict, s: Settings) -> Tensor:
    """Attention of [M'_CLS, M_pose] on each joint, mean over its windows: (B, T, R)."""
    n, window = joint.index.shape
    given = modal_map(joint.attention, recorded, s.frames, min(s.modal_tokens, 2)).mean(1)  # (B*n, T*(window + 2))
    given = given.view(-1, n, s.frames, window + min(s.modal_tokens, 2))[..., :window]  # (B, n, T, window)
    return mean_of_windows(given, joint.index, dim=2, length=s.joints)


def attended_frames(temporal: d3t.TemporalStrideAttention, recorded: dict, s: Settings) -> Tensor:
    """Attention of the modal tokens of a frame on all tokens of each frame, mean over the windows: (B, T, T)."""
    n, window = temporal.index.shape
    given = modal_map(temporal.attention, recorded, window, s.modal_tokens)  # (B*n, window, window*N)
    given = given.unflatten(2, (window, -1)).sum(-1).unflatten(0, (-1, n))  # (B, n, window, window)
    rows = given.new_zeros(*given.shape[:3], s.frames)
    rows = rows.scatter(3, temporal.index[None, :, None].expand_as(given), given)  # (B, n, window, T)
    return mean_of_windows(rows, temporal.index, dim=1, length=s.frames)


# ---- Pictures ------------------------------------------------------------------------------------------------------
def show_frame(axis, item: dict, t: int):
    axis.imshow(item["video"][:, t].permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[], autoscale_on=False)


def cover(axis, cells: np.ndarray, stride: int, **how):
    """Draw a map over a frame; cell i is centred on pixel i * stride, as the odd kernels of the trunk see it."""
    height, width = cells.shape
    edges = np.array([-0.5, width - 0.5, height - 0.5, -0.5]) * stride
    return axis.imshow(cells, extent=edges, cmap="cividis", **how)


def draw_tokens(plt, item: dict, found: dict, path: Path):
    """Fig. 5: a row for each block and one for their mean; points are drawn in the frame that is nearest in time."""
    frames, height, width = item["video"].shape[1:]
    rows = [(f"block {i + 1}", maps) for i, maps in enumerate(found["tokens"])] + [("mean", found["tokens"].mean(0))]
    size = 1.4 * frames + 1.2, 1.4 * len(rows) * height / width + 0.5
    figure, axes = plt.subplots(len(rows), frames, figsize=size, squeeze=False, layout="constrained")
    for row, (name, maps) in enumerate(rows):
        for t, axis in enumerate(axes[row]):
            show_frame(axis, item, t)
            image = cover(axis, maps[t] / maps.max(), CELL, alpha=0.55, vmin=0, vmax=1)
            if name != "mean":
                points = found["points"][row].reshape(-1, 3)
                _, y, x = CELL * points[np.rint(points[:, 0]) == t].T
                axis.scatter(x, y, s=12, c="white", edgecolors="black", linewidths=0.6)
        axes[row, 0].set_ylabel(name, fontsize=8)
    for t, axis in enumerate(axes[0]):
        axis.set_title(f"frame {t}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, aspect=30)
    bar.set_label("attention, of the largest in the row", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_joints(plt, item: dict, found: dict, names: list[str], path: Path):
    """Fig. 6: the joints on the frames, and below them joints x frames as a heat map in the same colours."""
    share, visible = found["joints"].mean(0), item["visible"].numpy()
    frames, colours = len(share), dict(cmap="cividis", vmin=0, vmax=share.max())
    heights = 1.4, 0.17 * len(names)
    figure = plt.figure(figsize=(1.4 * frames + 2.2, sum(heights) + 1), layout="constrained")
    grid = figure.add_gridspec(2, frames + 1, height_ratios=heights, width_ratios=[1] * frames + [0.1])
    for t in range(frames):
        axis = figure.add_subplot(grid[0, t])
        show_frame(axis, item, t)
        x, y = item["joints"].numpy()[t, visible[t]].T
        axis.scatter(x, y, s=30, c=share[t, visible[t]], edgecolors="white", **colours)
        axis.set_title(f"frame {t}", fontsize=8)
    axis = figure.add_subplot(grid[1, :frames])
    image = axis.imshow(np.where(visible, share, np.nan).T, aspect="auto", **colours)
    axis.set_facecolor("lightgrey")
    axis.set(xticks=range(frames), xlabel="frame (grey: the joint is not visible)")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, cax=figure.add_subplot(grid[1, frames]), label="attention")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_overview(plt, item: dict, found: dict, model: D3T, source: data.Source, path: Path):
    """Attention between frames, the Gaussian of a visible joint over F_a, and the likeliest classes."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    if "frames" in found:
        image = left.imshow(found["frames"].mean(0), cmap="cividis", vmin=0)
        figure.colorbar(image, ax=left)
        ticks = range(len(item["joints"]))
        left.set(title="attention between frames", xlabel="to frame", ylabel="from frame", xticks=ticks, yticks=ticks)
    else:
        left.axis("off")

    joint = int(item["visible"][0].float().argmax())
    size = [-(-side // 2) for side in item["video"].shape[2:]]  # of F_a
    heat = d3t.joint_heatmaps(item["joints"][None], item["visible"][None], size, 2, model.settings.sigma)
    show_frame(middle, item, 0)
    cover(middle, heat[0, 0, joint].numpy(), 2, alpha=0.6)
    middle.set(title=f"Eq. (2), {source.joint_names[joint]}, frame 0")

    best = found["probabilities"].argsort()[-5:]  # the likeliest last, which is drawn on top
    right.barh([source.classes[i] for i in best], found["probabilities"][best])
    right.set(xlim=(0, 1), xlabel="probability", title=f"label: {source.classes[item['label']]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_clip(plt, item: dict, model: D3T, source: data.Source, stem: Path):
    """Write the pictures and arrays of one clip, and print what the model takes it for."""
    explanation = explain(model, item["video"][None], item["joints"][None], item["visible"][None])
    found = {name: value[0].numpy() for name, value in vars(explanation).items() if value is not None}
    found["probabilities"] = explanation.logits[0].softmax(-1).numpy()
    np.savez(f"{stem}.npz", name=item["name"], label=item["label"], **found)
    if "tokens" in found:
        draw_tokens(plt, item, found, Path(f"{stem}-tokens.png"))
    if "joints" in found:
        draw_joints(plt, item, found, source.joint_names, Path(f"{stem}-joints.png"))
    draw_overview(plt, item, found, model, source, Path(f"{stem}-overview.png"))
    guess, label = source.classes[found["probabilities"].argmax()], source.classes[item["label"]]
    print(f"{item['name']}: {guess} ({found['probabilities'].max():.1%}), label {label}")


# ---- Command line --------------------------------------------------------------------------------------------------
def load_model(path: Path) -> tuple[D3T, dict]:
    """The model of a checkpoint, and the checkpoint; UsageError if it is none."""
    saved = train.load_checkpoint(path)
    with data.errors_as(data.UsageError, f"{path} does not fit"):
        model = D3T(Settings(**saved["settings"]))
        model.load_state_dict(saved["model"])
    return model.eval(), saved


def clips_to_test(source: data.Source, saved: dict) -> data.Dataset:
    """The test split in the form that the model of a checkpoint takes."""
    s = saved["settings"]
    return data.Dataset(source, "test", s["frames"], s["height"], s["width"], hide=saved["recipe"]["hide"])


@tool("tools.explain")
def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clips", type=int, nargs="+", default=[0], metavar="N", help="numbers in the test split [0]")
    parser.add_argument("--out", type=Path, default=Path("explained"), metavar="DIR", help="of the files [explained]")
    data.add_flags(parser)
    parser.set_defaults(data=None)  # the data set of the checkpoint
    options = parser.parse_args(words)
    model, saved = load_model(options.checkpoint)
    options.data = options.data or saved["data"]
    source = data.match(data.load(options), saved["classes"], saved["joint_names"])
    clips = clips_to_test(source, saved)
    for number in options.clips:
        if not 0 <= number < len(clips):
            raise data.UsageError(f"--clips {number}: the test split has the clips 0 to {len(clips) - 1}")
    plt = data.need("matplotlib.pyplot", "matplotlib", "to draw the pictures")
    plt.switch_backend("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    for number in options.clips:
        item = clips[number]
        draw_clip(plt, item, model, source, options.out / file_name(str(number), item["name"]))


if __name__ == "__main__":
    sys.exit(main())
