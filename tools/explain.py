"""Draw what a trained D3T attends to: Figures 5 and 6 of the paper, as pictures and as arrays.

    python -m tools.explain runs/synthetic/best.pt --clips 0 17

writes to --out, for each of these clips of the test split:

    NAME-tokens.png  Fig. 5: attention on the tokens that 3DTS selected, placed back where they
                     were read, and the points where it read them
    NAME-joints.png  Fig. 6: attention on each joint in each frame
    NAME.npz         the arrays of `Explanation`, the clip, its label and the probabilities

NAME is the number and the name of the clip, and a checksum. In code, `explain(model, video, joints,
visible)` returns an `Explanation`.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import d3t
import data
import train
from tools.common import file_name, make_parser, tool

CELL = 8  # pixels from one RGB token to the next


# ---- The attention of the modal tokens ----
@dataclass
class Explanation:
    """What the modal tokens attend to in each of the L blocks, mean over the heads.

    None where an attention is disabled. Without modal tokens, what all tokens attend to. A row of
    `frames` sums to 1; `selected` and `tokens` to 1 less the share of the modal tokens, and so does
    `joints` within each window, before the mean over windows.
    """

    logits: Tensor  # (B, classes)
    points: Tensor | None = None  # (B, L, T~, h~, w~, 3), where 3DTS reads Z, in tokens (t, h, w)
    selected: Tensor | None = None  # (B, L, T~, h~, w~), attention on the tokens it selected
    tokens: Tensor | None = None  # (B, L, T, h, w), the same on the tokens it read (Fig. 5)
    joints: Tensor | None = None  # (B, L, T, R), on each joint, mean over its windows (Fig. 6)
    frames: Tensor | None = None  # (B, L, T, T), from a frame's modal tokens to tokens of a frame


@torch.no_grad()
def explain(model, video, joints, visible):
    """Run the model, and compute the attention maps from the inputs of its attentions.

    It does not work under `torch.inference_mode`: placing attention back takes a gradient.
    """
    assert not model.training, "call model.eval(): a forward would change averages of batch norms"
    logits, calls = record_inputs(model, video, joints, visible)
    maps, s = defaultdict(list), model.settings
    for block in model.blocks:
        if isinstance(block.deformable, d3t.DeformableAttention):
            points, selected = selected_tokens(block.deformable, calls, s)
            maps["points"].append(points)
            maps["selected"].append(selected)
            maps["tokens"].append(place_back(selected, points, s.grid))
        if isinstance(block.joint, d3t.JointStrideAttention):
            maps["joints"].append(attended_joints(block.joint, calls, s))
        if isinstance(block.temporal, d3t.TemporalStrideAttention):
            maps["frames"].append(attended_frames(block.temporal, calls, s))
    return Explanation(logits, **{name: torch.stack(each, dim=1) for name, each in maps.items()})


def record_inputs(model, *inputs):
    """Logits, and by module the inputs of each call of an attention or a token search."""
    calls = defaultdict(list)
    hooks = []
    for module in model.modules():
        if isinstance(module, (d3t.AttentionBlock, d3t.TokenSearch)):
            hook = module.register_forward_pre_hook(lambda module, x: calls[module].append(x))
            hooks.append(hook)
    try:
        logits = model.forward(*inputs)  # model(*inputs), if compiled, runs a graph without hooks
    finally:
        for hook in hooks:
            hook.remove()
    return logits, calls


def modal_map(attention, X, X_, frames, modal):
    """Attention of the last `modal` tokens of a frame, mean over them and heads: (B, frames, S).

    The weights are those of Eq. (6), which `msa` does not keep; each row sums to 1. With modal = 0
    all tokens of a frame ask.
    """
    q, k = attention.Wq(X), attention.Wk(X_)
    q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)  # (B, Q, S)
    return weights.unflatten(1, (frames, -1))[:, :, -modal:].mean(2)


def selected_tokens(deformable, calls, s):
    """Points of 3DTS (B, T~, h~, w~, 3); attention of [M_RGB, M_CLS] on what it read there."""
    (Z,), (X,) = calls[deformable.search], calls[deformable.attention]  # one call each
    points = deformable.search.points(*Z)
    given = modal_map(deformable.attention, *X, s.frames, min(s.modal_tokens, 2)).mean(1)
    return points, given[:, : points.shape[1:-1].numel()].view(points.shape[:-1])


def place_back(values, points, grid):
    """The transpose of `sample_tokens`: (B, ...) at points (B, ..., 3) -> (B, T, h, w)."""
    with torch.enable_grad():  # sampling is linear in Z, so its gradient is its transpose
        Z = values.new_zeros(len(values), *grid, 1).requires_grad_()
        return torch.autograd.grad(d3t.sample_tokens(Z, points), Z, values[..., None])[0][..., 0]


def each_window(module, length, calls):
    """The windows of a stride attention, and the inputs of its attention in each."""
    windows = d3t.windows(length, module.window, module.stride)
    return zip(windows, calls[module.attention], strict=True)


def attended_joints(joint, calls, s):
    """Attention of [M'_CLS, M_pose] on each joint, mean over its windows: (B, T, R)."""
    total, count = 0, torch.zeros(s.joints)
    for window, inputs in each_window(joint, s.joints, calls):
        given = modal_map(joint.attention, *inputs, s.frames, min(s.modal_tokens, 2)).mean(1)
        given = given.unflatten(1, (s.frames, -1))[..., : joint.window]  # (B, T, window)
        total = total + F.pad(given, (window.start, s.joints - window.stop))
        count[window] += 1
    return total / count.to(total)


def attended_frames(temporal, calls, s):
    """Attention of a frame's modal tokens on each frame, mean over its windows: (B, T, T)."""
    total, count = 0, torch.zeros(s.frames, 1)
    for window, inputs in each_window(temporal, s.frames, calls):
        given = modal_map(temporal.attention, *inputs, temporal.window, s.modal_tokens)
        given = given.unflatten(2, (temporal.window, -1)).sum(-1)  # (B, window, window)
        total = total + F.pad(given, (window.start, s.frames - window.stop) * 2)
        count[window] += 1
    return total / count.to(total)


# ---- Pictures ----
def show_frame(axis, item, t):
    axis.imshow(item["video"][:, t].permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[], autoscale_on=False)


def draw_tokens(make_figure, item, found):
    """Fig. 5: a row for each block and one for their mean; points in the frame nearest in time."""
    frames, height, width = item["video"].shape[1:]
    rows = {f"block {i + 1}": maps for i, maps in enumerate(found["tokens"])}
    rows["mean"] = found["tokens"].mean(0)
    figure = make_figure((1.4 * frames + 1.2, 1.4 * len(rows) * height / width + 0.5))
    axes = figure.subplots(len(rows), frames, squeeze=False)
    h, w = found["tokens"].shape[2:]
    edges = CELL * np.array([-0.5, w - 0.5, h - 0.5, -0.5])  # token i is centred on pixel 8i
    colours = {"cmap": "cividis", "alpha": 0.55, "vmin": 0, "vmax": 1}
    for row, (name, maps) in enumerate(rows.items()):
        for t, axis in enumerate(axes[row]):
            show_frame(axis, item, t)
            image = axis.imshow(maps[t] / maps.max(), extent=edges, **colours)
            if name != "mean":
                points = found["points"][row].reshape(-1, 3)
                _, y, x = CELL * points[np.rint(points[:, 0]) == t].T
                axis.scatter(x, y, s=12, c="white", edgecolors="black", linewidths=0.6)
        axes[row, 0].set_ylabel(name, fontsize=8)
    for t, axis in enumerate(axes[0]):
        axis.set_title(f"frame {t}", fontsize=8)
    figure.colorbar(image, ax=axes, aspect=30, label="attention, of the largest in the row")
    return figure


def draw_joints(make_figure, item, found, names):
    """Fig. 6: the joints on the frames; below them joints x frames in the same colours."""
    share, visible = found["joints"].mean(0), item["visible"].numpy()
    frames = len(share)
    colours = {"cmap": "cividis", "vmin": 0, "vmax": share.max()}
    heights = 1.4, 0.17 * len(names)
    figure = make_figure((1.4 * frames + 2.2, sum(heights) + 1))
    widths = [1] * frames + [0.1]
    grid = figure.add_gridspec(2, frames + 1, height_ratios=heights, width_ratios=widths)
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
    return figure


def draw_clip(make_figure, item, model, source, stem):
    """Write the pictures and arrays of one clip, and print what the model takes it for."""
    said = explain(model, item["video"][None], item["joints"][None], item["visible"][None])
    found = {name: value[0].numpy() for name, value in vars(said).items() if value is not None}
    found["probabilities"] = said.logits[0].softmax(-1).numpy()
    np.savez(f"{stem}.npz", name=item["name"], label=item["label"], **found)
    if "tokens" in found:
        draw_tokens(make_figure, item, found).savefig(f"{stem}-tokens.png", dpi=110)
    if "joints" in found:
        figure = draw_joints(make_figure, item, found, source.joint_names)
        figure.savefig(f"{stem}-joints.png", dpi=110)
    guess = source.classes[found["probabilities"].argmax()]
    label = source.classes[item["label"]]
    print(f"{item['name']}: {guess} ({found['probabilities'].max():.1%}), label {label}")


# ---- Command line ----
def load_model(path):
    """The model of a checkpoint, and the checkpoint; UsageError if it is none."""
    saved = train.load_checkpoint(path)
    model = d3t.build(saved["settings"])
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise data.UsageError(f"{path} does not fit: {data.reason(error)}") from None
    return model.eval(), saved


def clips_to_test(source, saved):
    """The test split in the form that the model of a checkpoint takes."""
    s = saved["settings"]
    return data.Dataset(source, "test", s.frames, s.height, s.width)


@tool("tools.explain")
def main(words=None):
    parser = make_parser("tools.explain", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path)
    add("--clips", type=int, nargs="+", default=[0], help="numbers in the test split [0]")
    add("--out", type=Path, default=Path("explained"), help="folder of the files [explained]")
    data.add_flags(parser)
    parser.set_defaults(data=None)  # the data set of the checkpoint
    options = parser.parse_args(words)
    model, saved = load_model(options.checkpoint)
    options.data = options.data or saved["data"]
    source = data.match(data.load(options), saved["classes"], saved["joint_names"])
    clips = clips_to_test(source, saved)
    for number in options.clips:
        if number not in range(len(clips)):
            raise data.UsageError(f"--clips {number}: there are clips 0 to {len(clips) - 1}")
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the pictures")
    make_figure = partial(plots.Figure, layout="constrained")
    options.out.mkdir(parents=True, exist_ok=True)
    for number in options.clips:
        item = clips[number]
        stem = options.out / file_name(str(number), item["name"])
        draw_clip(make_figure, item, model, source, stem)


if __name__ == "__main__":
    sys.exit(main())
