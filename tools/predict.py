"""Tell the action in a video of one's own, from the video, its joints and a checkpoint of `train.py`.

    python -m tools.predict runs/pennaction/best.pt VIDEO JOINTS.npz --out predicted

prints the likeliest classes. With --out it also draws the frames that the model saw with the joints on them: joints
that do not fit the picture are the first thing to look for when a label is wrong. JOINTS.npz holds

    keypoint        (M, n, K, 2)  x then y of the K joints of M persons in each of the n frames of the video, in pixels
                                  of the frame as it is shown; with a third column, this is the score
    keypoint_score  (M, n, K)     optional: a joint with a score of 0 is absent

The joints are those of the checkpoint's data set, in its order. Persons that the file does not hold are absent.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import data
from tools.common import file_name, tool
from tools.explain import clips_to_test, load_model, show_frame

SHOWN, COLUMNS = 5, 4  # classes that are printed, frames in a row of the picture


def read_joints(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`keypoint` and `keypoint_score` of an .npz file; UsageError if it is none or lacks `keypoint`."""
    what = f"{path}: expected an .npz file with keypoint (M, frames, K, 2 or 3)"
    with data.errors_as(data.UsageError, what), np.lib.npyio.NpzFile(path) as arrays:  # which refuses pickles
        return arrays["keypoint"], arrays.get("keypoint_score")


def one_clip(video: Path, keypoint: np.ndarray, score: np.ndarray | None, joint_names: list[str]) -> data.Source:
    """A source with one test clip, its label unknown (-1), for a checkpoint with these names of all persons' joints."""
    data.need("av", "av", "to read a video")
    with data.errors_as(data.UsageError, f"the joints of {video}"):
        joints, visible = data.as_joints(keypoint, score)
        n, persons, k = visible.shape
        second = joint_names[0].removesuffix(" 1") + " 2"  # the first joint of the second person, if there is one
        if persons * k > len(joint_names) or joint_names[k : k + 1] not in ([], [second]):
            raise ValueError(f"{persons} persons with {k} joints; the checkpoint knows {', '.join(joint_names)}")
    size = data.read_video(video, np.array([0]), (8, 8), (slice(0, 8), slice(0, 8))).size
    clip = data.Clip(Path(video).stem, -1, joints.reshape(n, -1, 2), visible.reshape(n, -1), size, video)
    return data.Source([], joint_names, [], data.read_video, clips={"test": [clip]})


def draw(item: dict, path: Path):
    """The frames with their joints; a joint has the same colour in all of them."""
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the joints")
    T, R = item["visible"].shape
    rows = -(-T // COLUMNS)
    figure = plots.Figure(figsize=(3 * COLUMNS, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for t, (visible, axis) in enumerate(zip(item["visible"].numpy(), axes)):
        show_frame(axis, item, t)
        x, y = item["joints"].numpy()[t, visible].T
        axis.scatter(x, y, s=25, c=np.flatnonzero(visible), cmap="turbo", vmin=0, vmax=R, edgecolors="white")
        axis.set_title(f"frame {t}: {visible.sum()} of {R} joints", fontsize=9)
    for axis in axes[T:]:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"joints drawn to {path}")


@tool("tools.predict")
@torch.no_grad()
def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("joints", type=Path, metavar="JOINTS.npz")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the joints on the frames, to a file there")
    options = parser.parse_args(words)
    model, saved = load_model(options.checkpoint)
    source = one_clip(options.video, *read_joints(options.joints), saved["joint_names"])
    item = clips_to_test(source, saved)[0]
    probabilities = model(item["video"][None], item["joints"][None], item["visible"][None])[0].softmax(-1)
    for probability, label in zip(*probabilities.topk(min(SHOWN, len(probabilities)))):
        print(f"{probability:6.1%}  {saved['classes'][label]}")
    if options.out:
        draw(item, options.out / f"{file_name(str(options.video))}-joints.png")


if __name__ == "__main__":
    sys.exit(main())
