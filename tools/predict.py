"""Tell the action in a video of one's own, from its joints and a checkpoint of `train.py`.

    python -m tools.predict runs/pennaction/best.pt VIDEO JOINTS.npz --out predicted

prints the likeliest classes. With --out it also draws the frames that the model saw, with the
joints on them: look there first when a label is wrong. JOINTS.npz holds

    keypoint        (M, n, K, 2)  x, y of the K joints of M persons in each of the n frames, in
                                  pixels of the frame as it is shown; a third column is the score
    keypoint_score  (M, n, K)     optional: a joint with a score of 0 is absent

The joints are those of the checkpoint's data set, in its order; persons may be left out.
"""

import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data
from tools.common import file_name, make_parser, tool
from tools.explain import clips_to_test, load_model, show_frame

SHOWN, COLUMNS = 5, 4  # classes that are printed, frames in a row of the picture


def read_joints(path):
    """`keypoint`, and `keypoint_score` or None, of an .npz file; UsageError for another file."""
    try:
        with np.lib.npyio.NpzFile(path) as arrays:  # which refuses pickles
            return arrays["keypoint"], arrays.get("keypoint_score")
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        what = "expected an .npz file with keypoint (M, frames, K, 2 or 3)"
        raise data.UsageError(f"{path}: {what}: {data.reason(error)}") from None


def one_clip(video, keypoint, score, joint_names):
    """A source with one test clip of unknown label (-1), for a checkpoint with these joints."""
    from sources import pickles  # needs the decoder
    from sources.video import VideoSource, read_video

    try:
        joints, visible = pickles.as_joints(keypoint, score)
    except ValueError as error:
        raise data.UsageError(f"the joints of {video}: {error}") from None
    n, persons, k, _ = joints.shape
    second = joint_names[0].removesuffix(" 1") + " 2"  # the first joint of a second person
    if persons * k > len(joint_names) or joint_names[k : k + 1] not in ([], [second]):
        what = f"{persons} persons with {k} joints"
        known = ", ".join(joint_names)
        raise data.UsageError(f"the joints of {video}: {what}; the checkpoint knows {known}")
    size = read_video(video, np.array([0]), (8, 8), (slice(0, 8), slice(0, 8))).size
    joints, visible = joints.reshape(n, -1, 2), visible.reshape(n, -1)
    source = VideoSource([], joint_names, [])
    source.clips["test"] = [data.Clip(Path(video).stem, -1, joints, visible, size, video)]
    return source


def draw(item, path):
    """The frames with their joints; a joint has the same colour in all of them."""
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the joints")
    T, R = item["visible"].shape
    rows = -(-T // COLUMNS)
    figure = plots.Figure((3 * COLUMNS, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    colours = {"cmap": "turbo", "vmin": 0, "vmax": R, "edgecolors": "white"}
    for t, (visible, axis) in enumerate(zip(item["visible"].numpy(), axes)):
        show_frame(axis, item, t)
        x, y = item["joints"].numpy()[t, visible].T
        axis.scatter(x, y, s=25, c=np.flatnonzero(visible), **colours)
        axis.set_title(f"frame {t}: {visible.sum()} of {R} joints", fontsize=9)
    for axis in axes[T:]:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"joints drawn to {path}")


@tool("tools.predict")
@torch.no_grad()
def main(words=None):
    parser = make_parser("tools.predict", __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("joints", type=Path, metavar="JOINTS.npz")
    parser.add_argument("--out", type=Path, help="folder: draw the joints to a file there")
    options = parser.parse_args(words)
    model, saved = load_model(options.checkpoint)
    source = one_clip(options.video, *read_joints(options.joints), saved["joint_names"])
    item = clips_to_test(source, saved)[0]
    logits = model(item["video"][None], item["joints"][None], item["visible"][None])[0]
    likeliest = logits.softmax(-1).topk(min(SHOWN, len(logits)))
    for probability, label in zip(*likeliest):
        print(f"{probability:6.1%}  {saved['classes'][label]}")
    if options.out:
        draw(item, options.out / f"{file_name(str(options.video))}-joints.png")


if __name__ == "__main__":
    sys.exit(main())
