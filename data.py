"""Clips for D3T: a synthetic set that is drawn on the fly, and Penn Action.

`Dataset` samples frames, resizes, crops and flips, for every source alike. An item is a dict:

    video    uint8    (3, T, H, W)   RGB, not normalised: the model does that on its device
    joints   float32  (T, R, 2)      x then y, in pixels of this crop; the centre of its first pixel is (0, 0)
    visible  bool     (T, R)         False for a joint that is absent, hidden, not finite or outside the crop
    label    int
    name     str                     the clip
    bad      list of str             "FILE: reason" of the clips that this one replaces (training only)

A source is a function that returns a `Source`: its clips with their joints, and how to read frames by number.
`python data.py --data NAME --root DIR` checks a data set: counts, frames, visible joints, every problem by name.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

RESIZE = 8 / 7  # frames are scaled so that the crop takes 7/8 of the shorter side, as 224 of 256


class DataError(Exception):
    """A data set that cannot be used; the message says what was looked for and where."""


class BadClip(DataError):
    """A clip that cannot be read; the message names the file and the reason."""


@dataclass
class Clip:
    name: str
    label: int
    joints: np.ndarray  # (n, R, 2) float32, x then y, in pixels of the full frame, first pixel centre (0, 0)
    visible: np.ndarray  # (n, R) bool
    size: tuple[int, int]  # height and width of the frames that the joints refer to
    media: Any  # what the source's `read` needs to find the frames


@dataclass
class Source:
    classes: list[str]
    joint_names: list[str]
    flip_pairs: list[tuple[int, int]]  # joints that trade places in a mirror
    edges: list[tuple[int, int]]  # joints to connect in a drawing
    read: Callable[[Clip, np.ndarray, tuple[int, int]], np.ndarray]  # clip, frames, size -> uint8 (T, h, w, 3)
    clips: dict[str, list[Clip]] = field(default_factory=lambda: {"train": [], "test": []})
    problems: list[str] = field(default_factory=list)  # "FILE: reason" of what the source could not index


class Dataset(torch.utils.data.Dataset):
    """The clips of one split, as items of the form above.

    source        what one of the functions in `SOURCES` returned
    split         "train" or "test"
    frames        T
    height, width of the crop, pixels
    seed          of everything random: frames, crop and flip of item i in epoch e depend on (seed, e, i) alone, not
                  on the worker, the rank or what was read before
    hide          "joints" marks all of them invisible, "video" blanks the frames: what is left for the other modality?

    An item is asked for by its number, or by (epoch, number). Training takes a random frame of each of T equal
    segments, a random crop, and mirrors half of the clips; testing takes the middle frames and the middle crop. A
    clip that cannot be read is replaced by the next one in training, and raises `BadClip` in testing.
    """

    def __init__(self, source: Source, split: str, frames: int, height: int, width: int, seed: int = 0, hide: str = ""):
        self.source, self.clips, self.train = source, source.clips[split], split == "train"
        self.frames, self.crop, self.seed, self.hide = frames, (height, width), seed, hide
        self.mirror = np.arange(len(source.joint_names))
        for a, b in source.flip_pairs:
            self.mirror[[a, b]] = b, a

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, index))
        bad = []
        while True:
            try:
                return self.load(self.clips[index], rng) | {"bad": bad}
            except BadClip as error:
                bad.append(str(error))
                if not self.train or len(bad) > 10:
                    raise BadClip("; ".join(bad)) from None
                index = (index + 1) % len(self)

    def load(self, clip: Clip, rng: np.random.Generator) -> dict:
        T, (H, W), n = self.frames, self.crop, len(clip.joints)
        within = rng.random(T) if self.train else 0.5
        frames = ((np.arange(T) + within) * n / T).astype(int)  # one of each segment; repeats some where n < T

        scale = RESIZE * max(H / clip.size[0], W / clip.size[1])
        h, w = (round(side * scale) for side in clip.size)
        video = self.source.read(clip, frames, (h, w))  # (T, h, w, 3)
        stretch = np.float32([w / clip.size[1], h / clip.size[0]])
        joints = (clip.joints[frames] + 0.5) * stretch - 0.5  # what scales is the edge of a pixel, not its centre
        visible = clip.visible[frames]

        top, left = (rng.integers(h - H + 1), rng.integers(w - W + 1)) if self.train else ((h - H) // 2, (w - W) // 2)
        video = video[:, top : top + H, left : left + W]
        joints = joints - np.float32([left, top])
        if self.train and rng.random() < 0.5:
            video = video[:, :, ::-1]
            joints, visible = joints[:, self.mirror], visible[:, self.mirror]
            joints[..., 0] = W - 1 - joints[..., 0]
        inside = (joints >= -0.5) & (joints < np.float32([W, H]) - 0.5)  # false for NaN

        if self.hide == "video":
            video = np.full_like(video, 128)
        return {
            "video": torch.from_numpy(np.ascontiguousarray(video.transpose(3, 0, 1, 2))),
            "joints": torch.from_numpy(joints),
            "visible": torch.from_numpy(visible & inside.all(-1) & (self.hide != "joints")),
            "label": clip.label,
            "name": clip.name,
        }


def collate(samples: list[dict]) -> dict:
    """Stack items to a batch; their lists of bad clips become one list."""
    bad = [name for sample in samples for name in sample.pop("bad")]
    return torch.utils.data.default_collate(samples) | {"bad": bad}


def need(module: str, package: str, why: str):
    """Import a decoder that only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{package} is needed {why}: pip install {package}") from None


# --------------------------------------------------------------------------------------------------------------------
# The 13 joints of Penn Action, which the synthetic figures share
# --------------------------------------------------------------------------------------------------------------------

PENN_JOINTS = [
    "head", "left shoulder", "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist",
    "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle",
]  # fmt: skip
PENN_PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
PENN_EDGES = [
    (0, 1),
    (0, 2),
    (1, 2),
    (1, 3),
    (3, 5),
    (2, 4),
    (4, 6),
    (1, 7),
    (2, 8),
    (7, 8),
    (7, 9),
    (9, 11),
    (8, 10),
    (10, 12),
]


# --------------------------------------------------------------------------------------------------------------------
# Synthetic: two figures act, the joints say which of them is meant
# --------------------------------------------------------------------------------------------------------------------

SYNTHETIC_ACTIONS = ["wave", "flap", "jumping jack", "kick"]
SYNTHETIC_SIZE = 64  # nominal pixels of a side; frames are drawn at the size that is asked for
TORSO = [0, 1, 2, 7, 8]  # head, shoulders and hips: the joints that are annotated, and that no action moves


def pose(action: int, swing: np.ndarray, side: int) -> np.ndarray:
    """Joints (n, 13, 2) of a figure whose hips are at (0, 0), y down, at `swing` (n,) in 0..1 of its action.

    The figure is 1 high; angles are in radians from hanging down, outwards.
    """
    arm, forearm, thigh, shin = (np.full((2, len(swing)), angle) for angle in (0.25, 0.2, 0.1, 0.1))  # left, right
    if action == 0:  # wave: one arm is up, its forearm swings
        arm[side], forearm[side] = 2.0, 2.3 + 1.4 * swing
    elif action in (1, 2):  # flap, jumping jack: both arms go up and down
        arm[:], forearm[:] = 0.3 + 2.3 * swing, 0.3 + 2.5 * swing
    if action == 2:  # jumping jack: and the legs open and close
        thigh[:] = shin[:] = 0.05 + 0.5 * swing
    elif action == 3:  # kick: one leg swings up sideways
        thigh[side], shin[side] = 0.1 + 1.3 * swing, 0.1 + 1.5 * swing
    joints = np.zeros((len(swing), 13, 2))
    joints[:, 0] = 0, -0.45
    for s, sign in enumerate((-1, 1)):  # odd columns are the viewer's left
        joints[:, 1 + s], joints[:, 7 + s] = (sign * 0.1, -0.32), (sign * 0.07, 0)
        limbs = (1, 3, arm, 0.17), (3, 5, forearm, 0.17), (7, 9, thigh, 0.25), (9, 11, shin, 0.25)
        for start, end, angle, length in limbs:
            step = np.stack([sign * np.sin(angle[s]), np.cos(angle[s])], -1)
            joints[:, end + s] = joints[:, start + s] + length * step
    return joints


def synthetic(train: int = 2048, test: int = 512, seed: int = 0) -> Source:
    """Two figures perform two different actions side by side; the joints follow one, and its action is the label.

    The pixels say what is done, the joints say by whom. Only head, shoulders and hips are annotated, and they move
    alike in every action, so the joints alone say nothing of the label (chance: 1 of 4). Without them nothing tells
    the two figures apart, so no method can be right in more than 1 of 2 clips. Clip i of a split depends on
    (seed, split, i) alone, and nothing is on disk.
    """
    source = Source(SYNTHETIC_ACTIONS, PENN_JOINTS, PENN_PAIRS, PENN_EDGES, draw)
    time = np.arange(16)
    for s, (split, count) in enumerate((("train", train), ("test", test))):
        for i in range(count):
            rng = np.random.default_rng((seed, s, i))
            actions = rng.permutation(len(SYNTHETIC_ACTIONS))[:2]
            figures = []
            for figure, action in enumerate(actions):
                swing = 0.5 - 0.5 * np.cos(2 * np.pi * (time / rng.uniform(8, 14) + rng.random()))
                joints = pose(action, swing, rng.integers(2)) * rng.uniform(38, 48)
                bob = np.sin(2 * np.pi * (time / rng.uniform(6, 12) + rng.random()))
                walk = np.stack([rng.uniform(-0.2, 0.2) * (time - 8), bob], -1)  # the same for every action
                figures.append(joints + walk[:, None] + [rng.uniform(17, 22) + 25 * figure, rng.uniform(30, 37)])
            actor = rng.integers(2)
            joints = np.float32(figures[actor])
            visible = np.zeros(joints.shape[:2], bool)
            visible[:, TORSO] = rng.random((len(time), len(TORSO))) < 0.95  # real annotations have holes
            colours = rng.integers(160, 256, (2, 3))  # bright figures, a dark wall
            media = np.stack(figures), colours, rng.integers(0, 100, (5, 5, 3)), rng.uniform(-0.5, 0.5, 2)
            size = (SYNTHETIC_SIZE, SYNTHETIC_SIZE)
            source.clips[split].append(Clip(f"{split} {i}", int(actions[actor]), joints, visible, size, media))
    return source


def draw(clip: Clip, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames of a synthetic clip: a figure covers the pixels near its limbs, the wall behind is smooth and drifts."""
    figures, colours, wall, drift = clip.media
    scale = np.float32([size[1], size[0]]) / SYNTHETIC_SIZE
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    # the wall: 5 x 5 colours, of which a frame shows 2.5 x 2.5, bilinear between them
    origin = 0.6 + drift * frames[:, None] / 16  # (T, 2)
    across, down = (
        np.maximum(
            0, 1 - abs(origin[:, k, None] + 2.5 * np.arange(size[1 - k]) / size[1 - k] - np.arange(5)[:, None, None])
        )
        for k in (0, 1)
    )  # weight of each wall colour, (5, T, w) and (5, T, h)
    video = np.einsum("jth, itw, jic -> thwc", down, across, wall, optimize=True).astype(np.float32)
    start, end = np.array(PENN_EDGES).T
    for figure, colour in zip(figures, colours):
        points = ((figure[frames].astype(np.float32) + 0.5) * scale - 0.5)[..., None, None]  # (T, 13, 2, 1, 1)
        x0, y0 = points[:, start, 0], points[:, start, 1]  # (T, edges, 1, 1)
        dx, dy = points[:, end, 0] - x0, points[:, end, 1] - y0
        along = (((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6)).clip(0, 1)  # nearest point of the limb
        limb = np.sqrt(((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2).min(1))  # distance (T, h, w)
        head = np.sqrt((x - points[:, 0, 0]) ** 2 + (y - points[:, 0, 1]) ** 2) - 2.2 * scale[0]
        cover = (1.1 * scale[0] + 0.5 - np.minimum(limb, head)).clip(0, 1)[..., None]
        video += (np.float32(colour) - video) * cover
    return video.round().astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------------
# Penn Action (Zhang, Zhu, Derpanis, ICCV 2013)
# --------------------------------------------------------------------------------------------------------------------

PENN_ACTIONS = [
    "baseball_pitch", "baseball_swing", "bench_press", "bowl", "clean_and_jerk", "golf_swing", "jump_rope",
    "jumping_jacks", "pullup", "pushup", "situp", "squat", "strum_guitar", "tennis_forehand", "tennis_serve",
]  # fmt: skip
PENN_SPELLINGS = {  # the archive's README and its label files disagree on six names
    "bowling": "bowl", "pull_ups": "pullup", "push_ups": "pushup", "sit_ups": "situp", "squats": "squat",
    "strumming_guitar": "strum_guitar",
}  # fmt: skip


def penn_action(root: Path) -> Source:
    """ROOT/labels/0001.mat .. 2326.mat and ROOT/frames/0001/000001.jpg ..; the split is the labels' `train` field."""
    loadmat = need("scipy.io", "scipy", "to read the labels of Penn Action").loadmat
    need("PIL.Image", "pillow", "to read the frames of Penn Action")
    labels = sorted((root / "labels").glob("*.mat"))
    if not labels or not (root / "frames").is_dir():
        raise DataError(
            f"no Penn Action in {root}: looked for {root}/labels/0001.mat and {root}/frames/0001/000001.jpg. "
            "Get Penn_Action.tar.gz from dreamdragon.github.io/PennAction and unpack it, or pass its folder as --root"
        )
    source = Source(PENN_ACTIONS, PENN_JOINTS, PENN_PAIRS, PENN_EDGES, read_jpegs)
    for path in labels:
        try:
            split, clip = penn_label(loadmat(path), root / "frames" / path.stem)
            source.clips[split].append(clip)
        except Exception as error:  # scipy raises many kinds on a damaged file
            source.problems.append(f"{path}: {error}")
    return source


def penn_label(label: dict, folder: Path) -> tuple[str, Clip]:
    """The clip of one label file. `bbox` is not used, so the two clips where it is a row short need no care."""
    for key in ("action", "x", "y", "visibility", "train", "dimensions"):
        if key not in label:
            raise ValueError(f"no field {key!r}")
    action = str(label["action"].item())
    action = PENN_SPELLINGS.get(action, action)
    if action not in PENN_ACTIONS:
        raise ValueError(f"unknown action {action!r}")
    train = label["train"].item()
    if train not in (1, -1):
        raise ValueError(f"train is {train!r}, not 1 or -1")
    # some files hold unsigned integers, which wrap around below zero; MATLAB's first pixel is (1, 1)
    joints = np.stack([label["x"], label["y"]], -1).astype(np.float32) - 1
    visible = label["visibility"].astype(bool)  # joints that were never annotated sit at the first pixel, invisible
    if not len(joints) or joints.shape[1:] != (13, 2) or visible.shape != joints.shape[:2]:
        raise ValueError(
            f"x, y of shape {joints.shape[:2]}, visibility of shape {visible.shape}, expected (frames, 13)"
        )
    height, width = (int(side) for side in label["dimensions"].ravel()[:2])
    if min(height, width) < 1:
        raise ValueError(f"frames of {height} x {width} pixels")
    return ("train" if train == 1 else "test"), Clip(
        folder.name, PENN_ACTIONS.index(action), joints, visible, (height, width), folder
    )


def read_jpegs(clip: Clip, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames FOLDER/000001.jpg .. of a clip, scaled to `size` (height, width)."""
    from PIL import Image

    video = np.empty((len(frames), *size, 3), np.uint8)
    for t, frame in enumerate(frames):
        path = clip.media / f"{frame + 1:06d}.jpg"
        try:
            with Image.open(path) as image:
                image.draft("RGB", size[::-1])  # lets the decoder drop the detail that scaling would drop
                video[t] = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        except Exception as error:  # pillow raises many kinds on a damaged file
            raise BadClip(f"{path}: {error}") from None
    return video


# --------------------------------------------------------------------------------------------------------------------
# All data sets
# --------------------------------------------------------------------------------------------------------------------

SOURCES = {"synthetic": (synthetic, None), "pennaction": (penn_action, "datasets/Penn_Action")}  # and where to look


def load(name: str, root: str | None = None) -> Source:
    """The source of a data set, indexed. `root` defaults to the folder in `SOURCES`; DataError if it is not there."""
    function, default = SOURCES[name]
    return function(Path(root or default)) if default else function()


class Frames(torch.utils.data.Dataset):
    """Every frame of every clip, read one by one: item i is the list of problems of clip i."""

    def __init__(self, source: Source, clips: list[Clip]):
        self.source, self.clips = source, clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip, problems = self.clips[index], []
        for frame in range(len(clip.joints)):
            try:
                self.source.read(clip, np.array([frame]), clip.size)
            except BadClip as error:
                problems.append(str(error))
        return problems


def main():
    parser = argparse.ArgumentParser(description="Check a data set: counts, frames, visible joints, every problem.")
    parser.add_argument("--data", choices=SOURCES, default="synthetic")
    parser.add_argument(
        "--root", help="its folder; the default is " + ", ".join(f"{r} for {n}" for n, (_, r) in SOURCES.items() if r)
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read frames (default: 2)")
    args = parser.parse_args()
    try:
        source = load(args.data, args.root)
    except DataError as error:
        sys.exit(f"data.py: {error}")

    print(f"{'class':24}{'train':>8}{'test':>8}")
    for label, name in enumerate(source.classes):
        train, test = (sum(clip.label == label for clip in source.clips[split]) for split in ("train", "test"))
        print(f"{name:24}{train:8}{test:8}")
    print(f"{'all':24}{len(source.clips['train']):8}{len(source.clips['test']):8}")
    clips = source.clips["train"] + source.clips["test"]
    frames = sum(len(clip.joints) for clip in clips)
    seen = sum(clip.visible.sum() for clip in clips) / max(1, sum(clip.visible.size for clip in clips))
    print(f"{frames} frames, {len(source.joint_names)} joints, {seen:.1%} of them visible")
    unseen = [clip.name for clip in clips if not clip.visible.any()]
    if unseen:
        print(f"without a visible joint: {', '.join(unseen)}")

    problems = source.problems
    loader = torch.utils.data.DataLoader(Frames(source, clips), batch_size=None, num_workers=args.workers)
    for found in tqdm(loader, desc="reading frames", unit="clip"):
        problems += found
    print(*problems, f"{len(problems)} problems", sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
