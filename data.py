"""Clips for D3T: a synthetic set drawn on the fly, Penn Action, NTU RGB+D 60 and 120, FineGYM, and pyskl's pickles.

`Dataset` samples frames, resizes, crops and mirrors, in the same way for every source. An item is a dict:

    video    uint8    (3, T, H, W)   RGB, not normalised: the model does that on its device
    joints   float32  (T, R, 2)      x then y, in pixels of this crop; the centre of its first pixel is (0, 0)
    visible  bool     (T, R)         False for a joint without a known position, or outside the crop
    label    int
    name     str                     the clip
    bad      list of (str, str)      name and "FILE: reason" of the clips that this one replaces (training only)

`SOURCES` holds for each data set a function that takes folders and returns a `Source`: its clips with their joints, and
how to read a crop of frames by number. A clip is bad if its joints and its video differ by more than a tenth in length
(not in pickles, whose joints are spread), or in the shape of the frames (not in NTU, whose videos are often squeezed).
To add one, write such a function. This one reads ROOT/CLASS/NAME.mp4 and ROOT/CLASS/NAME.npy, joints (frames, 2, 2):

    def two_hands(roots):
        source = Source(["clap", "wave"], ["left hand", "right hand"], [(0, 1)], read_video)
        for path in sorted(roots[0].glob("*/*.mp4")):
            joints = np.load(path.with_suffix(".npy")).astype(np.float32)  # a row for each frame, NaN where absent
            visible, label = np.isfinite(joints).all(-1), source.classes.index(path.parent.name)
            name, split = f"{path.parent.name}/{path.stem}", "test" if path.stem.endswith("0") else "train"
            source.clips[split].append(Clip(name, label, joints, visible, (360, 640), path))
        return source

    SOURCES["two_hands"] = (two_hands, ["datasets/two_hands"])

`python -m tools.check --data NAME` checks a data set: counts, frames, visible joints, every problem by name.
"""

import argparse
import functools
import importlib
import inspect
import os
import pickle
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

RESIZE = 8 / 7  # frames are scaled so that the crop takes 7/8 of the shorter side, as 224 of 256
LENGTHS_DIFFER = 0.1  # of the rows of joints: a video that is longer or shorter by more is another one
SHAPES_DIFFER = 0.02  # of the side ratio that the joints refer to: more is no rounding of an encoder


class UsageError(Exception):
    """A flag or a file that cannot be used; the message names it and says what was expected."""


class DataError(Exception):
    """A data set that cannot be used; the message says what was looked for and where."""


class BadClip(DataError):
    """A clip that cannot be read; the message names the file and the reason."""

    def __init__(self, text: str):  # a loader's worker sends its whole traceback, which ends with the message
        super().__init__(text.split("data.BadClip: ")[-1].strip())


Size = tuple[int, int]  # height and width
Crop = tuple[slice, slice]  # rows and columns


@dataclass
class Clip:
    name: str
    label: int
    # (n, R, 2) float32, x then y, in pixels of the full frame, first pixel centre (0, 0); with fewer joints than the
    # source has names, the last ones are absent
    joints: np.ndarray | None
    visible: np.ndarray | None  # (n, R) bool; both are None until the source's `annotate` has read the joints
    size: Size  # of the frames that the joints refer to
    media: Any  # what the source's `read` needs to find the frames


class Frames(NamedTuple):
    """What the `read` of a source returns. What it says about the whole file is compared with the clip."""

    video: np.ndarray  # uint8 (T, H, W, 3), of the frames that are there
    count: int | None = None  # of all frames; None: as many as there are rows of joints
    size: Size | None = None  # of a whole frame as it is shown; None: that of the clip


@dataclass
class Source:
    classes: list[str]
    joint_names: list[str]
    flip_pairs: list[tuple[int, int]]  # joints that trade places in a mirror
    # read(media, numbers of frames, size to scale them to, crop of the scaled frame) -> Frames
    read: Callable[[Any, np.ndarray, Size, Crop], Frames]
    # annotate(clip) -> a copy with its joints, one row for each frame; the default is for clips that have them
    annotate: Callable[[Clip], Clip] = replace
    # length(media) -> a first guess of the frames; without it, as many as there are rows of joints
    length: Callable[[Any], int] | None = None
    spread: bool = False  # the rows of joints are spread over the frames; otherwise the longer of both is cut
    squeezed: bool = False  # frames may have another shape than those that the joints refer to
    clips: dict[str, list[Clip]] = field(default_factory=lambda: {"train": [], "test": []})
    problems: list[str] = field(default_factory=list)  # "FILE: reason" of what the source could not index
    missing: list[str] = field(default_factory=list)  # clips that lack their video or their joints, and are left out


def need(module: str, package: str, why: str):
    """Import a decoder that only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{package} is needed {why}: pip install {package}") from None


def reason(error: Exception) -> str:
    """What an exception says, in one line; with its type where that is a single word."""
    text = re.split(" This file can| In PyTorch", " ".join(str(error).split()))[0]  # torch advises to trust it
    return text[:300] if " " in text else repr(error)


@contextmanager
def errors_as(kind: type[Exception], what: str):
    """Turn any exception into one of this kind that begins with `what`: a damaged file can raise anything."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {reason(error)}") from None


# ---- Dataset: which frames, which crop, the joints in it -----------------------------------------------------------
def read_clip(source: Source, clip: Clip, choose: Callable[[int], np.ndarray], size: Size, crop: Crop):
    """Video (T, H, W, 3), joints (T, R, 2) and visible (T, R) of the frames `choose(n)` of a clip of n frames.

    The length of a file is known after reading it: if the guess was wrong, frames are chosen and read again.
    """
    rows = len(clip.joints)
    n = source.length(clip.media) if source.length else rows
    while True:
        row = np.linspace(0, rows - 1, n).round().astype(int) if source.spread else np.arange(min(n, rows))
        frames = choose(len(row))
        video, count, shown = source.read(clip.media, frames, size, crop)
        if count is None or count == n:  # the guess was right
            break
        n = count
    if not source.spread and abs(n - rows) > LENGTHS_DIFFER * rows:
        raise BadClip(f"{clip.media}: {clip.name} has joints of {rows} frames, but {n} frames are in the video")
    height, width = shown or clip.size
    if not source.squeezed and abs(height * clip.size[1] / (width * clip.size[0]) - 1) > SHAPES_DIFFER:
        sizes = f"frames of {clip.size}, but the video has {height, width} (height, width)"
        raise BadClip(f"{clip.media}: the joints of {clip.name} refer to {sizes}")
    absent = (0, len(source.joint_names) - clip.joints.shape[1])  # persons that others have
    joints = np.pad(clip.joints[row[frames]], ((0, 0), absent, (0, 0)))
    return video, joints, np.pad(clip.visible[row[frames]], ((0, 0), absent))


def place_crop(size: Size, crop: Size, rng: np.random.Generator | None) -> tuple[Size, Crop]:
    """The size to scale a frame to, and a crop of that: a random one, or the middle one."""
    scale = RESIZE * max(crop[0] / size[0], crop[1] / size[1])
    h, w = (round(side * scale) for side in size)
    rows, columns = h - crop[0], w - crop[1]  # that the crop leaves out
    top, left = (rng.integers(rows + 1), rng.integers(columns + 1)) if rng else (rows // 2, columns // 2)
    return (h, w), (slice(top, top + crop[0]), slice(left, left + crop[1]))


def rescale(joints: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """Joints (..., 2) of a frame that is scaled from `old` to `new`: pixel edges scale, so centres shift by a half."""
    return (joints + 0.5) * np.float32([new[1] / old[1], new[0] / old[0]]) - 0.5


class Dataset(torch.utils.data.Dataset):
    """The clips of one split, as items of the form above, by number or by (epoch, number).

    source        what one of the functions in `SOURCES` returned
    split         "train": a random frame of each segment, a random crop, half of the clips mirrored
                  "test": the middle frames, the middle crop
    frames        T
    height, width of the crop, pixels
    seed          of everything random: item i of epoch e depends on (seed, e, i) alone, not on the worker or the rank
    hide          "joints" marks all joints invisible, "video" makes the frames grey

    A clip that cannot be read is replaced by the next one in training, and raises `BadClip` in testing.
    """

    def __init__(self, source: Source, split: str, frames: int, height: int, width: int, seed: int = 0, hide="none"):
        self.source, self.clips, self.train = source, source.clips[split], split == "train"
        self.frames, self.crop, self.seed, self.hide = frames, (height, width), seed, hide
        self.partner = np.arange(len(source.joint_names))
        for a, b in source.flip_pairs:
            self.partner[[a, b]] = b, a

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
                bad.append((str(self.clips[index].name), str(error)))
                if not self.train or len(bad) > 10:  # so many in a row: the folder is wrong, not a file
                    raise BadClip("; ".join(why for _, why in bad)) from None
                index = (index + 1) % len(self)

    def load(self, clip: Clip, rng: np.random.Generator) -> dict:
        """The item of one clip, without `bad`; `rng` is used in training only."""
        T = self.frames
        clip = self.source.annotate(clip)
        # One frame of each of T equal segments of n frames (some twice if n < T): a random one, or the middle one.
        place = np.arange(T) + (rng.random(T) if self.train else 0.5)
        size, crop = place_crop(clip.size, self.crop, rng if self.train else None)
        video, joints, visible = read_clip(self.source, clip, lambda n: (place * n / T).astype(int), size, crop)
        joints = rescale(joints, clip.size, size) - np.float32([crop[1].start, crop[0].start])
        if self.train and rng.random() < 0.5:  # as a mirror shows it: joints trade places with their partners
            video, joints, visible = video[:, :, ::-1], joints[:, self.partner], visible[:, self.partner]
            joints[..., 0] = self.crop[1] - 1 - joints[..., 0]
        inside = (joints >= -0.5) & (joints < np.float32(self.crop[::-1]) - 0.5)  # false for NaN
        if self.hide == "video":
            video = np.full_like(video, 128)
        return {
            "video": torch.from_numpy(np.ascontiguousarray(video)).permute(3, 0, 1, 2),
            "joints": torch.from_numpy(joints),
            "visible": torch.from_numpy(visible & inside.all(-1) & (self.hide != "joints")),
            "label": clip.label,
            "name": clip.name,
        }


def collate(samples: list[dict]) -> dict:
    """Stack items to a batch; their lists of bad clips become one list."""
    bad = [clip for sample in samples for clip in sample["bad"]]
    rest = [{key: value for key, value in sample.items() if key != "bad"} for sample in samples]
    # The colours of a pixel stay side by side in memory, as decoders write and channels_last_3d convolutions read them.
    batch = torch.utils.data.default_collate([each | {"video": each["video"].permute(1, 2, 3, 0)} for each in rest])
    return batch | {"video": batch["video"].permute(0, 4, 1, 2, 3), "bad": bad}  # (B, 3, T, H, W)


# ---- Synthetic: two figures act, the joints say which of them is meant ---------------------------------------------
SIDES = ("left", "right")  # of the picture in Penn Action: left is the right arm of a person who faces the camera
LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
PENN_JOINTS = ["head", *(f"{side} {limb}" for limb in LIMBS for side in SIDES)]
PENN_PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
PENN_EDGES = [
    (0, 1), (0, 2), (1, 2), (1, 3), (3, 5), (2, 4), (4, 6), (1, 7), (2, 8), (7, 8), (7, 9), (9, 11), (8, 10), (10, 12),
]  # fmt: skip
SYNTHETIC_ACTIONS = ["wave", "flap", "jumping jack", "kick"]
SYNTHETIC_SIZE = (64, 64)  # of the frames that the joints refer to; they are drawn at the size that is asked for
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

    The pixels say what is done, the joints say by whom. Only head, shoulders and hips are annotated, which move alike
    in every action, so the joints alone say nothing about the label (chance: 1 of 4). Without them nothing tells the
    two figures apart, so no method can expect more than 1 of 2. Clip i of a split depends on (seed, split, i) alone.
    """
    source, time = Source(SYNTHETIC_ACTIONS, PENN_JOINTS, PENN_PAIRS, draw), np.arange(16)
    for split, i in [("train", i) for i in range(train)] + [("test", i) for i in range(test)]:
        rng = np.random.default_rng((seed, int(split == "test"), i, 1))  # not the stream that augments clip i
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
        clip = Clip(f"{split} {i}", int(actions[actor]), joints, visible, SYNTHETIC_SIZE, media)
        source.clips[split].append(clip)
    return source


def draw(media: tuple, frames: np.ndarray, size: Size, crop: Crop) -> Frames:
    """Frames of a synthetic clip: a figure covers the pixels near its limbs, the wall behind is smooth and drifts."""
    figures, colours, wall, drift = media
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    # The wall has 5 x 5 colours, of which a frame shows 2.5 x 2.5, bilinear between them.
    corner = 0.6 + drift * frames[:, None] / 16  # (T, 2)
    across, down = (
        np.maximum(0, 1 - abs(start[:, None, None] + 2.5 * np.arange(n)[:, None] / n - np.arange(5)))  # (T, n, 5)
        for start, n in zip(corner.T, size[::-1])
    )
    video = np.einsum("thj, twi, jic -> thwc", down, across, wall, optimize=True).astype(np.float32)
    start, end = np.array(PENN_EDGES).T
    scale = np.float32(size[1] / SYNTHETIC_SIZE[1])
    for figure, colour in zip(figures, colours):
        points = rescale(figure[frames].astype(np.float32), SYNTHETIC_SIZE, size)[..., None, None]  # (T, 13, 2, 1, 1)
        x0, y0 = points[:, start, 0], points[:, start, 1]  # (T, edges, 1, 1)
        dx, dy = points[:, end, 0] - x0, points[:, end, 1] - y0
        along = (((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2 + 1e-6)).clip(0, 1)  # nearest point of the limb
        limb = np.sqrt(((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2).min(1))  # distance (T, h, w)
        head = np.sqrt((x - points[:, 0, 0]) ** 2 + (y - points[:, 0, 1]) ** 2) - 2.2 * scale
        cover = (1.1 * scale + 0.5 - np.minimum(limb, head)).clip(0, 1)[..., None]
        video += (np.float32(colour) - video) * cover
    return Frames(video[:, crop[0], crop[1]].round().astype(np.uint8))


# ---- Penn Action (Zhang, Zhu, Derpanis, ICCV 2013) -----------------------------------------------------------------
PENN_ACTIONS = [
    "baseball_pitch", "baseball_swing", "bench_press", "bowl", "clean_and_jerk", "golf_swing", "jump_rope",
    "jumping_jacks", "pullup", "pushup", "situp", "squat", "strum_guitar", "tennis_forehand", "tennis_serve",
]  # fmt: skip


def penn_action(roots: list[Path]) -> Source:
    """ROOT/labels/0001.mat .. 2326.mat and ROOT/frames/0001/000001.jpg ..; the split is the labels' `train` field."""
    need("scipy.io", "scipy", "to read the labels of Penn Action")
    need("PIL.Image", "pillow", "to read the frames of Penn Action")
    labels = [path for root in roots for path in sorted((root / "labels").glob("[!.]*.mat"))]
    if not labels or not (roots[0] / "frames").is_dir():
        get = "get Penn_Action.tar.gz from dreamdragon.github.io/PennAction, or pass its folder as --root"
        raise DataError(f"no Penn Action: looked for {roots[0]}/labels/0001.mat and frames/0001/000001.jpg; {get}")
    source = Source(PENN_ACTIONS, PENN_JOINTS, PENN_PAIRS, read_jpegs)
    for path in labels:
        try:
            split, clip = penn_label(path)
            source.clips[split].append(clip)
        except Exception as error:  # scipy raises many kinds on a damaged file
            source.problems.append(f"{path}: {reason(error)}")
    return source


def penn_label(path: Path) -> tuple[str, Clip]:
    """The split and the clip of one label file.

    A joint that is occluded but has a position counts as visible. One without annotation is marked invisible and stored
    at the first pixel of the original picture; after the clip was resized, this is at most (1.52, 1.52).
    """
    from scipy.io import loadmat

    label = loadmat(path)
    joints, action = np.stack([label["x"], label["y"]], -1).astype(np.float32), str(label["action"].item())
    absent = (label["visibility"] != 1) & (joints[..., 0] == joints[..., 1]) & (joints[..., 0] < 2)
    visible = np.isfinite(joints).all(-1) & ~absent
    size, folder = tuple(label["dimensions"].ravel()[:2].tolist()), path.parents[1] / "frames" / path.stem
    clip = Clip(path.stem, PENN_ACTIONS.index(action), joints - 1, visible, size, folder)  # MATLAB starts at 1
    return ("train" if label["train"].item() == 1 else "test"), clip


def read_jpegs(folder: Path, frames: np.ndarray, size: Size, crop: Crop) -> Frames:
    """A crop of frames FOLDER/000001.jpg .. scaled to `size` (height, width); what lies outside is not scaled."""
    from PIL import Image

    (top, bottom), (left, right) = ((edge.start, edge.stop) for edge in crop)
    video = np.empty((len(frames), bottom - top, right - left, 3), np.uint8)
    for t, frame in enumerate(frames):
        path = folder / f"{frame + 1:06d}.jpg"
        with errors_as(BadClip, path), Image.open(path, formats=["JPEG"]) as image:
            # `draft` lets the decoder drop the detail that scaling would drop. The sides it returns are exact; those
            # of `image.size` are rounded up, and the last row and column then reach beyond the picture.
            _, (_, _, width, height) = image.draft("RGB", size[::-1])
            box = left * width / size[1], top * height / size[0], right * width / size[1], bottom * height / size[0]
            video[t] = image.convert("RGB").resize(video.shape[2:0:-1], Image.Resampling.BILINEAR, box)
    return Frames(video)


# ---- Video files ---------------------------------------------------------------------------------------------------
VIDEOS = (".avi", ".mp4", ".mkv", ".webm", ".mov")
VIDEO_FORMATS = {"format_whitelist": "avi,mov,matroska,mpegts,flv"}  # none is a playlist, which could open an address


def clip_key(name: str) -> str:
    """A name that is the same with and without suffixes such as `_rgb`, `.mp4`, FineGYM's `_E_` and `_A_`; in NFC."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r}: expected a name below the folders of the videos")
    name = unicodedata.normalize("NFC", str(path))
    name = re.sub(r"\.(avi|mp4|mkv|webm|mov)$", "", name, flags=re.IGNORECASE).removesuffix("_rgb")
    return re.sub(r"_E_(\d+_\d+)_A_(\d+_\d+)$", r"_\1_\2", name)


def find_files(roots: list[Path], endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files below the roots by `clip_key`, that of their name and that of their path; not by links back."""
    found = defaultdict(list)
    for root in roots:
        for folder, folders, files in os.walk(root, followlinks=True):
            here = Path(folder).resolve()
            folders[:] = sorted(each for each in folders if (here / each).resolve() not in (here, *here.parents))
            for path in (Path(folder, file) for file in sorted(files) if file.lower().endswith(endings)):
                for key in {clip_key(path.stem), clip_key(str(path.relative_to(root).with_suffix("")))}:
                    found[key].append(path)
    return dict(found)


def packets(path: Path):
    """The packets of a video file, decoded on one thread, because a loader already has several processes."""
    import av

    # Without "file:", a colon in the name would make a protocol of it.
    with av.open(f"file:{path}", options=VIDEO_FORMATS) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise ValueError("no video in it")
        streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
        for packet in container.demux(streams[0]):
            if packet.is_corrupt:
                raise ValueError("it breaks off")
            yield packet


def video_length(path: Path) -> int:
    """Packets of a video: a first guess of its frames, because some packets hold none that a decoder puts out."""
    with errors_as(BadClip, path):
        return sum(bool(packet.size) and not packet.is_discard for packet in packets(path))


def read_video(path: Path, frames: np.ndarray, size: Size, crop: Crop) -> Frames:
    """A crop of frames of a video by number, scaled to `size`; BadClip for a file that breaks off.

    Frames are counted as the decoder puts them out, from the first: NTU's AVI files have one key frame and wrong time
    stamps, so seeking gains nothing and time stamps name the wrong frame.
    """
    from av.video.reformatter import VideoReformatter

    video = np.empty((len(frames), *(edge.stop - edge.start for edge in crop), 3), np.uint8)
    n, shown = 0, None
    scaler = VideoReformatter()  # one for all frames: setting it up costs more than scaling
    with errors_as(BadClip, path):
        for n, picture in enumerate((each for packet in packets(path) for each in packet.decode()), start=1):
            if n - 1 in frames:
                turns = round(picture.rotation / 90)  # to the left: a phone may store an upright video on its side
                height, width = size[:: -1 if turns % 2 else 1]
                shown = (picture.height, picture.width)[:: -1 if turns % 2 else 1]
                picture = scaler.reformat(picture, width, height, "rgb24", interpolation="BILINEAR")
                video[frames == n - 1] = np.rot90(picture.to_ndarray(), turns)[crop]
        if not n:
            raise ValueError("no frame in it")
    return Frames(video[frames < n], n, shown)


# ---- NTU RGB+D 60 and 120 (Shahroudy et al., CVPR 2016; Liu et al., TPAMI 2019) ------------------------------------
NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
NTU_SIZE = (1080, 1920)  # of the colour camera, in whose pixels the skeleton files give the joints
NTU_JOINTS = [
    "spine base", "spine middle", "neck", "head", "left shoulder", "left elbow", "left wrist", "left hand",
    "right shoulder", "right elbow", "right wrist", "right hand", "left hip", "left knee", "left ankle", "left foot",
    "right hip", "right knee", "right ankle", "right foot", "spine top", "left hand tip", "left thumb",
    "right hand tip", "right thumb",
]  # fmt: skip
NTU_PAIRS = [(4, 8), (5, 9), (6, 10), (7, 11), (12, 16), (13, 17), (14, 18), (15, 19), (21, 23), (22, 24)]
NTU60_TRAIN = {1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38}  # performers of XSub
NTU120_TRAIN = NTU60_TRAIN | {
    45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94,
    95, 97, 98, 100, 103,
}  # fmt: skip
NTU_PROTOCOLS = {  # actions, and whether a sample (setup, camera, performer) is for training
    "ntu60-xsub": (60, lambda s, c, p: p in NTU60_TRAIN),
    "ntu60-xview": (60, lambda s, c, p: c != 1),
    "ntu120-xsub": (120, lambda s, c, p: p in NTU120_TRAIN),
    "ntu120-xset": (120, lambda s, c, p: s % 2 == 0),
}
# Who is not a person: the rules of pyskl (ntu_preproc.py) and CTR-GCN (get_raw_denoised_data.py: a share of 0.69754).
GHOST_FRAMES, GHOST_SPREAD, GHOST_SHARE = 11, 0.8, 0.7
RENAME_DISTANCE = 1.0  # metres from where one id ends to where another begins, below which it is the same person (ours)


def ntu(roots: list[Path], protocol: str) -> Source:
    """*.skeleton and *_rgb.avi (or .mp4, with or without _rgb) anywhere below the roots; two persons, R = 50."""
    need("av", "av", "to read the videos of NTU RGB+D")
    found = find_files(roots, (".skeleton",)), find_files(roots, VIDEOS)
    skeletons, videos = ({name: paths for name, paths in each.items() if NTU_NAME.fullmatch(name)} for each in found)
    if not skeletons or not videos:
        get = "get it from rose1.ntu.edu.sg/dataset/actionRecognition, or pass its folders as --root DIR DIR"
        raise DataError(f"no NTU RGB+D in {[*map(str, roots)]}: looked for S001C001P001R001A001.skeleton, .avi; {get}")
    actions, trains = NTU_PROTOCOLS[protocol]
    lists = sum(find_files(roots, ("samples_with_missing_skeletons.txt",)).values(), [])
    excluded = {match.group() for path in lists for match in NTU_NAME.finditer(path.read_text(errors="replace"))}
    if not any(actions == 60 or "120" in path.name for path in lists):  # the list of NTU 120 holds that of NTU 60
        name = f"NTU_RGBD{'120' * (actions == 120)}_samples_with_missing_skeletons.txt"
        print(f"warning: there is no {name}: the samples that it would name stay in", file=sys.stderr)
    names = [f"{joint} {person}" for person in (1, 2) for joint in NTU_JOINTS]
    pairs = NTU_PAIRS + [(a + 25, b + 25) for a, b in NTU_PAIRS]
    source = Source([f"A{a:03d}" for a in range(1, actions + 1)], names, pairs, read_video, ntu_annotate, video_length)
    source.squeezed = True  # many re-encode the videos to 340 x 256
    for name in sorted(skeletons.keys() | videos.keys()):
        setup, camera, performer, _, action = map(int, NTU_NAME.fullmatch(name).groups())
        if name in excluded or action > actions:
            continue
        if name not in skeletons or name not in videos:
            source.missing.append(f"{name} has no {'skeleton' if name in videos else 'video'}")
            continue
        split = "train" if trains(setup, camera, performer) else "test"
        media = sorted(videos[name], key=os.path.getsize), skeletons[name][0]
        source.clips[split].append(Clip(name, action - 1, None, None, NTU_SIZE, media))
    return source


def ntu_annotate(clip: Clip) -> Clip:
    """A clip with the joints of its skeleton file, and the smallest of its videos whose length fits them."""
    videos, path = clip.media
    with errors_as(BadClip, path):
        joints, visible = two_persons(*parse_skeleton(path.read_bytes()))

    def fits(video):
        with suppress(BadClip):
            return abs(video_length(video) - len(joints)) <= LENGTHS_DIFFER * len(joints)

    video = next(filter(fits, videos[:-1]), videos[-1])
    return replace(clip, joints=joints, visible=visible, media=video)


def parse_skeleton(text: bytes) -> tuple[int, dict[int, dict[int, np.ndarray]]]:
    """The number of frames of a .skeleton file, and the fields (25, 12) of each body by its id and its frame.

    Ids are near 2^56, where two of them could be equal as floats. The fields of a joint are x y z, depth x y, colour
    x y, a quaternion and the tracking state: 0 not tracked, 1 inferred, 2 tracked.
    """
    lines, bodies = iter(text.splitlines()), defaultdict(dict)
    try:
        frames = int(next(lines))
        for frame in range(frames):
            for _ in range(int(next(lines))):
                identity = int(next(lines).split()[0])
                next(lines)  # the number of joints, which is always 25
                fields = np.array([[float(word) for word in next(lines).split()] for _ in range(25)]).reshape(25, 12)
                place = fields[:, :3]  # metres
                place[~np.isfinite(place)] = 0
                if place.any():  # a body of zeros is nobody
                    bodies[identity].setdefault(frame, fields)  # an id twice in a frame: the first
    except StopIteration:
        raise ValueError("it breaks off") from None
    return frames, bodies


def two_persons(frames: int, bodies: dict[int, dict[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Joints (frames, 50, 2) and visibility of the two persons who move most; a frame without a body keeps its row."""
    persons = [(sorted(person), np.array([person[t] for t in sorted(person)])) for person in join_renamed(bodies)]

    def is_person(when, fields):  # and no ghost, such as a chair
        width, height, _ = np.ptp(fields[..., :3], axis=1).T  # (frames,)
        return len(when) > GHOST_FRAMES and np.mean(width > GHOST_SPREAD * height) < GHOST_SHARE

    persons = [person for person in persons if is_person(*person)] or persons  # better a ghost than nobody
    persons.sort(key=lambda person: -person[1][..., :3].var(0).sum())  # stable: ties in order of appearance
    joints, visible = np.zeros((frames, 2, 25, 2), np.float32), np.zeros((frames, 2, 25), bool)
    for slot, (when, fields) in enumerate(persons[:2]):
        colour, tracked = fields[..., 5:7], np.isin(fields[..., 11], (1, 2))
        inside = (colour >= 0) & (colour < NTU_SIZE[::-1])  # false for NaN
        joints[when, slot] = colour
        visible[when, slot] = tracked & inside.all(-1) & colour.any(-1)
    return joints.reshape(frames, 50, 2), visible.reshape(frames, 50)


def join_renamed(bodies: dict[int, dict[int, np.ndarray]]) -> list[dict[int, np.ndarray]]:
    """The fields of each person by frame: where one id ends and another begins nearby, the Kinect has renamed it."""
    persons = []
    for track in bodies.values():
        start, gaps = min(track), []  # metres from each person to where the track starts
        for person in persons:
            nearest = min(person, key=lambda frame: (abs(frame - start), frame))
            apart = (person[nearest][:, :3] - track[start][:, :3]).mean(0)
            gaps.append(np.inf if person.keys() & track.keys() else np.linalg.norm(apart))
        if min(gaps, default=np.inf) < RENAME_DISTANCE:
            persons[np.argmin(gaps)].update(track)
        else:
            persons.append(track)
    return persons


# ---- Pickles in the form of pyskl, FineGYM's among them (Duan et al., CVPR 2022; Shao et al., CVPR 2020) -----------
COCO_JOINTS = ["nose", *(f"{side} {part}" for part in ("eye", "ear", *LIMBS) for side in SIDES)]
COCO_PAIRS = [(i, i + 1) for i in range(1, 17, 2)]


class Kind:
    """Stands for numpy.dtype: in a damaged pickle, numpy's own can claim to hold objects, and crash."""

    def __init__(self, code: str, *_):
        self.code = code

    def __setstate__(self, state):
        self.code = state[1] + self.code  # the order of its bytes


def build_array(content, kind: Kind, shape, order: str, axes=None) -> np.ndarray:
    """An array from its bytes or its list of objects, as numpy's `_frombuffer`; ValueError if their count is wrong."""
    if "O" in kind.code:
        return np.fromiter(content, object).reshape(shape)  # numpy writes these row by row, whatever their order
    array = np.frombuffer(content, kind.code).reshape(shape, order="C" if axes else order)
    return array.transpose(axes) if axes else array  # numpy 2.4 writes a transposed array with the order of its axes


class Array(np.ndarray):
    """Stands for numpy.ndarray: numpy's own `__setstate__` crashes on a list of objects that is too short."""

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        super().__setstate__(build_array(content, kind, shape, "F" if fortran else "C").__reduce__()[2])


class Unpickler(pickle.Unpickler):
    """Reads plain containers, numbers, strings and numpy arrays, and refuses all else: a pickle can run any code."""

    plain = {"collections.OrderedDict", "collections.defaultdict", "_codecs.encode"}  # protocol 2 encodes bytes
    plain |= {f"{module}.{kind}" for module in ("__builtin__", "builtins") for kind in ("bytes", "list", "set")}
    known = {
        "numpy.ndarray": Array,
        "numpy.dtype": Kind,
        "numpy.core.multiarray._reconstruct": lambda *_: Array(0),
        "numpy.core.multiarray.scalar": lambda kind, content: build_array(content, kind, (), "C")[()],
        "numpy.core.numeric._frombuffer": build_array,
    }

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" in self.plain:
            return super().find_class(module, name)
        known = self.known.get(f"{module}.{name}".replace("numpy._core", "numpy.core"))  # numpy 2 and numpy 1
        if known is None:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no data set needs")
        return known


def read_pickle(path: Path, splits: tuple[str, str]) -> tuple[Source, dict, set[str], set[str]]:
    """A source without its clips, their {clip key: (name, entry)}, and the keys for training and for testing."""
    with errors_as(DataError, f"{path}: expected a pickle {{split, annotations}}"), path.open("rb") as file:
        if kind := {b"\x1f": "gzipped", b"{": "JSON", b"[": "JSON"}.get(file.peek(1)[:1]):
            raise ValueError(f"it is {kind}")
        content = Unpickler(file).load()
        listed, annotations = content["split"], content["annotations"]
        if not {*splits} <= listed.keys():
            raise ValueError(f"it has no {' or '.join(splits)}; its splits are {[*listed]}")
        train, test = ({clip_key(name) for name in listed[split]} for split in splits)
        names = [entry.get("filename") or entry["frame_dir"] for entry in annotations]
        entries = {clip_key(name): (name, entry) for name, entry in zip(names, annotations)}
        if len(entries) < len(annotations):
            raise ValueError("two of its entries have one name")
        if train & test:
            raise ValueError(f"clips are for training and test alike, such as {min(train & test)}")
        own = "joint_names" in content
        joints, pairs = (content["joint_names"], content["flip_pairs"]) if own else (COCO_JOINTS, COCO_PAIRS)
        if not {joint for pair in pairs for joint in pair} <= {*range(len(joints))}:
            raise ValueError(f"flip_pairs {pairs}: expected numbers of the {len(joints)} joints")
        classes, joints = [*map(str, content.get("label_names", []))], [*map(str, joints)]  # checkpoints need plain str
    return Source(classes, joints, [*pairs], read_video, length=video_length, spread=True), entries, train, test


def pyskl(roots: list[Path], annotations: Path, split_train="train", split_val="val", min_score=0.0) -> Source:
    """A pickle in pyskl's form, and the videos that its entries name: ROOT/FOLDER/NAME.mp4, or NAME.mp4 anywhere below.

    It may hold `label_names`, and `joint_names` with `flip_pairs`; without them, joints are those of COCO.
    """
    need("av", "av", "to read the videos of this data set")
    source, entries, train, test = read_pickle(annotations, (split_train, split_val))
    videos = find_files(roots, VIDEOS)
    k, persons, labels = len(source.joint_names), 1, 0
    for key in [key for key in entries if key in train or key in test]:
        name, entry = entries[key]
        try:
            clip = pyskl_clip(name, entry, k, len(source.classes) or 10_000, min_score)
        except Exception as error:  # what is missing, or of another type
            source.problems.append(f"{annotations}, {name}: {reason(error)}")
            continue
        labels = max(labels, clip.label + 1)
        if key not in videos:
            source.missing.append(f"{name} has no video")
            continue
        clip.media, *others = videos[key]
        if others:
            source.problems.append(f"{clip.media} and {others[0]} have one name: leave one of them there")
        persons = max(persons, clip.joints.shape[1] // k)
        source.clips["train" if key in train else "test"].append(clip)
    source.missing += [f"{key} has no annotation in {annotations}" for key in sorted((train | test) - entries.keys())]
    if not any(source.clips.values()):
        raise DataError(f"{annotations}: no clip can be used: {[*source.problems, *source.missing, 'none named'][0]}")
    source.classes = source.classes or [str(label) for label in range(labels)]
    source.joint_names += [f"{name} {p + 1}" for p in range(1, persons) for name in source.joint_names]
    source.flip_pairs += [(a + k * p, b + k * p) for p in range(1, persons) for a, b in source.flip_pairs]
    return source


def pyskl_clip(name: str, entry: dict, k: int, class_count: int, min_score: float) -> Clip:
    """A clip of an entry with `keypoint`, `keypoint_score`, `label` and `img_shape`; up to two persons."""
    joints, visible = as_joints(entry["keypoint"], entry.get("keypoint_score"), min_score)
    if joints.shape[2] != k:
        raise ValueError(f"keypoint has {joints.shape[2]} joints, expected {k}: those of joint_names, or of COCO")
    label, (height, width), n = int(entry["label"]), map(int, entry["img_shape"]), len(joints)
    if label != entry["label"] or not 0 <= label < class_count:  # each number below the largest label is a class, too
        raise ValueError(f"label {entry['label']!r}, expected a whole number below {class_count}")
    joints, visible = joints[:, :2].reshape(n, -1, 2), visible[:, :2].reshape(n, -1)
    return Clip(name, label, joints, visible, (height, width), None)


def as_joints(keypoint, score, min_score: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Joints (n, M, K, 2) and visible (n, M, K) of pixels (M, n, K, 2) with a score (M, n, K) or as a third column.

    A joint that was not found lies at (0, 0), or has a score of 0 or NaN.
    """
    keypoint = np.asarray(keypoint, np.float32)  # float16 in the files, which scales badly
    if keypoint.ndim != 4 or not keypoint.shape[1] or keypoint.shape[3] not in (2, 3):  # nobody may be found: M = 0
        raise ValueError(f"keypoint is {keypoint.shape}, expected (persons, frames, joints, 2 or 3)")
    if score is None:
        score = keypoint[..., 2] if keypoint.shape[3] == 3 else np.ones(keypoint.shape[:3])
    keypoint, score = keypoint[..., :2], np.asarray(score, np.float32)
    if score.shape != keypoint.shape[:3]:
        raise ValueError(f"keypoint_score is {score.shape}, expected {keypoint.shape[:3]}")
    visible = np.isfinite(keypoint).all(-1) & (score > min_score) & keypoint.any(-1)
    if visible.any() and keypoint[visible].min() >= 0 and keypoint[visible].max() <= 1:
        raise ValueError("all its joints lie within 0..1, expected pixels")
    return keypoint.swapaxes(0, 1), visible.swapaxes(0, 1)


def finegym(roots: list[Path], min_score: float = 0.0) -> Source:
    """ROOT/gym_hrnet.pkl of pyskl, or gym_2d.pkl as mmaction2 names it, and the videos ROOT/subactions/NAME.mp4."""
    path, other = (roots[0] / name for name in ("gym_hrnet.pkl", "gym_2d.pkl"))
    return pyskl(roots, other if other.exists() and not path.exists() else path, min_score=min_score)


# ---- All data sets -------------------------------------------------------------------------------------------------
NTU_ROOTS = ["datasets/nturgb+d_rgb", "datasets/nturgb+d_skeletons"]
SOURCES = {  # the function of each, and where to look
    "synthetic": (synthetic, []),
    "pennaction": (penn_action, ["datasets/Penn_Action"]),
    **{name: (functools.partial(ntu, protocol=name), NTU_ROOTS) for name in NTU_PROTOCOLS},
    "finegym": (finegym, ["datasets/gym"]),
    "pyskl": (pyskl, ["datasets/videos"]),
}


def add_flags(parser) -> None:
    parser.add_argument("--data", choices=SOURCES, default="synthetic", help="data set [synthetic]")
    parser.add_argument("--root", nargs="+", type=Path, metavar="DIR", help="its folders [datasets/ARCHIVE]")
    parser.add_argument("--annotations", type=Path, metavar="PKL", help="pyskl: the pickle")
    parser.add_argument("--split-train", metavar="KEY", help="pyskl: the split to train on [train]")
    parser.add_argument("--split-val", metavar="KEY", help="pyskl: the split to test on [val]")
    parser.add_argument("--min-score", type=float, default=0.0, metavar="S", help="pyskl, finegym: joints above it [0]")


def load(options: argparse.Namespace) -> Source:
    """The data set that the flags name, indexed; DataError if it is not there, UsageError for the flags."""
    function, roots = SOURCES[options.data]
    given = {k: v for k in ("annotations", "split_train", "split_val", "min_score") if (v := getattr(options, k))}
    for name in given.keys() - inspect.signature(function).parameters.keys():
        raise UsageError(f"--{name.replace('_', '-')} is not for --data {options.data}")
    if options.root and not roots:
        raise UsageError("--root: the synthetic clips are drawn, there are no files")
    for root in options.root or []:
        if not root.is_dir():
            raise UsageError(f"--root: there is no folder {root}")
    if options.data == "pyskl" and not (options.annotations and options.annotations.is_file()):
        raise UsageError(f"--data pyskl needs --annotations PKL, a file that exists, not {options.annotations}")
    roots = options.root or [Path(root) for root in roots]
    return function(roots, **given) if roots else function(**given)


def match(source: Source, classes: list[str], joint_names: list[str]) -> Source:
    """The source in the classes and joints of a checkpoint, which may know more; UsageError if it does not know one."""
    unknown = [name for name in source.classes if name not in classes]
    unknown += [name for i, name in enumerate(source.joint_names) if joint_names[i : i + 1] != [name]]
    if unknown:
        known = f"classes are {', '.join(classes)}; its joints, in this order, {', '.join(joint_names)}"
        raise UsageError(f"the checkpoint does not know {unknown[0]!r}: its {known}")
    label = [classes.index(name) for name in source.classes]
    clips = {split: [replace(c, label=label[c.label]) for c in clips] for split, clips in source.clips.items()}
    return replace(source, classes=classes, joint_names=joint_names, clips=clips)


def escape_output() -> None:
    """Let names be printed that the terminal's encoding lacks: as escapes."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")
