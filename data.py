"""Clips for D3T: a synthetic set that is drawn on the fly, Penn Action, NTU RGB+D 60 and 120, FineGYM, and any pickle
in the form of pyskl with its videos.

`Dataset` samples frames, resizes, crops and flips, for every source alike. An item is a dict:

    video    uint8    (3, T, H, W)   RGB, not normalised: the model does that on its device
    joints   float32  (T, R, 2)      x then y, in pixels of this crop; the centre of its first pixel is (0, 0)
    visible  bool     (T, R)         False for a joint that is absent, hidden, not finite or outside the crop
    label    int
    name     str                     the clip
    bad      list of (str, str)      name and "FILE: reason" of the clips that this one replaces (training only)

A source is a function that returns a `Source`: its clips with their joints, and how to read frames by number.
`python data.py --data NAME --root DIR` checks a data set: counts, frames, visible joints, every problem by name.
"""

import argparse
import functools
import importlib
import io
import math
import os
import pickle
import re
import struct
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

RESIZE = 8 / 7  # frames are scaled so that the crop takes 7/8 of the shorter side, as 224 of 256
MOST_FRAMES = 100_000  # of a clip; what declares more is damaged, and would take all memory


class UsageError(Exception):
    """A flag or a file that cannot be used; the message names it and says what was expected."""


class DataError(Exception):
    """A data set that cannot be used; the message says what was looked for and where."""


class BadClip(DataError):
    """A clip that cannot be read; the message names the file and the reason."""


Size = tuple[int, int]  # height and width
Crop = tuple[slice, slice]  # rows and columns


@dataclass
class Clip:
    name: str
    label: int
    joints: np.ndarray | None  # (n, R, 2) float32, x then y, in pixels of the full frame, first pixel centre (0, 0)
    visible: np.ndarray | None  # (n, R) bool; None until the source's `annotate` has read the joints
    size: Size  # of the frames that the joints refer to
    media: Any  # what the source's `read` needs to find the frames


@dataclass
class Source:
    classes: list[str]
    joint_names: list[str]
    flip_pairs: list[tuple[int, int]]  # joints that trade places in a mirror
    # A clip's media, numbers of frames, the size to scale them to and the crop of that: uint8 (T, H, W, 3)
    read: Callable[[Any, np.ndarray, Size, Crop], np.ndarray]
    # A clip with its joints, one row for each frame of its video; `replace` makes a copy of one that has them
    annotate: Callable[[Clip], Clip] = replace
    clips: dict[str, list[Clip]] = field(default_factory=lambda: {"train": [], "test": []})
    problems: list[str] = field(default_factory=list)  # "FILE: reason" of what the source could not index
    missing: list[str] = field(default_factory=list)  # clips that lack their video or their joints, and are left out


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

    def __init__(self, source: Source, split: str, frames: int, height: int, width: int, seed: int = 0, hide="none"):
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
                bad.append((self.clips[index].name, str(error)))
                if not self.train or len(bad) > 10:
                    raise BadClip("; ".join(why for _, why in bad)) from None
                index = (index + 1) % len(self)

    def load(self, clip: Clip, rng: np.random.Generator) -> dict:
        clip = self.source.annotate(clip)
        T, (H, W), n = self.frames, self.crop, len(clip.joints)
        within = rng.random(T) if self.train else 0.5
        frames = ((np.arange(T) + within) * n / T).astype(int)  # one of each segment; repeats some where n < T

        scale = RESIZE * max(H / clip.size[0], W / clip.size[1])
        h, w = (round(side * scale) for side in clip.size)
        top, left = (rng.integers(h - H + 1), rng.integers(w - W + 1)) if self.train else ((h - H) // 2, (w - W) // 2)
        crop = slice(top, top + H), slice(left, left + W)
        video = self.source.read(clip.media, frames, (h, w), crop)  # of frames scaled to (h, w): (T, H, W, 3)
        stretch = np.float32([w / clip.size[1], h / clip.size[0]])
        joints = (clip.joints[frames] + 0.5) * stretch - 0.5  # what scales is the edge of a pixel, not its centre
        visible = clip.visible[frames]

        joints = joints - np.float32([left, top])
        if self.train and rng.random() < 0.5:
            video = video[:, :, ::-1]
            joints, visible = joints[:, self.mirror], visible[:, self.mirror]
            joints[..., 0] = W - 1 - joints[..., 0]
        inside = (joints >= -0.5) & (joints < np.float32([W, H]) - 0.5)  # false for NaN

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
    """Stack items to a batch; their lists of bad clips become one list.

    In memory the colours of a pixel stay side by side, as decoders write and channels_last_3d convolutions read them.
    """
    bad = [clip for sample in samples for clip in sample["bad"]]
    rest = [{key: value for key, value in sample.items() if key != "bad"} for sample in samples]
    batch = torch.utils.data.default_collate([each | {"video": each["video"].permute(1, 2, 3, 0)} for each in rest])
    return batch | {"video": batch["video"].permute(0, 4, 1, 2, 3), "bad": bad}  # (B, 3, T, H, W)


def need(module: str, package: str, why: str):
    """Import a decoder that only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{package} is needed {why}: pip install {package}") from None


def reason(error: Exception) -> str:
    return str(error) if " " in str(error) else repr(error)  # a word alone says too little


def numbers(array: np.ndarray) -> np.ndarray:
    """Real numbers of any type as float32; ValueError for text, objects, complex numbers and what is no array."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{getattr(array, 'dtype', type(array))} where an array of numbers is expected")
    return array.astype(np.float32)


def frame_size(sides) -> Size:
    """Height and width as integers; ValueError for what no camera takes, which can ask for all memory."""
    if len(sides) != 2:
        raise ValueError(f"a frame has a height and a width, not {sides}")
    height, width = sides
    size = int(height), int(width)
    if size != (height, width) or not 0 < max(size) <= min(8192, 16 * min(size)):
        raise ValueError(f"frames of {height} x {width} pixels")
    return size


# --------------------------------------------------------------------------------------------------------------------
# The 13 joints of Penn Action, which the synthetic figures share
# --------------------------------------------------------------------------------------------------------------------

PENN_JOINTS = [  # left and right as the viewer sees them: who faces the camera has the right arm on the "left"
    "head", "left shoulder", "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist",
    "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle",
]  # fmt: skip
PENN_PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
PENN_EDGES = [
    (0, 1), (0, 2), (1, 2), (1, 3), (3, 5), (2, 4), (4, 6), (1, 7), (2, 8), (7, 8), (7, 9), (9, 11), (8, 10), (10, 12),
]  # fmt: skip


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
    the two figures apart, so no method can expect to be right in more than 1 of 2 clips. Clip i of a split depends on
    (seed, split, i) alone, and nothing is on disk.
    """
    source = Source(SYNTHETIC_ACTIONS, PENN_JOINTS, PENN_PAIRS, draw)
    time = np.arange(16)
    for s, (split, count) in enumerate((("train", train), ("test", test))):
        for i in range(count):
            rng = np.random.default_rng((seed, s, i, 1))  # not the stream that augments clip i
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


def draw(media: tuple, frames: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """Frames of a synthetic clip: a figure covers the pixels near its limbs, the wall behind is smooth and drifts."""
    figures, colours, wall, drift = media
    scale = np.float32([size[1], size[0]]) / SYNTHETIC_SIZE
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    # the wall: 5 x 5 colours, of which a frame shows 2.5 x 2.5, bilinear between them
    corner = 0.6 + drift * frames[:, None] / 16  # (T, 2)
    across, down = (
        np.maximum(0, 1 - abs(start[:, None, None] + 2.5 * np.arange(n)[:, None] / n - np.arange(5)))  # (T, n, 5)
        for start, n in zip(corner.T, size[::-1])
    )
    video = np.einsum("thj, twi, jic -> thwc", down, across, wall, optimize=True).astype(np.float32)
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
    return video[:, crop[0], crop[1]].round().astype(np.uint8)


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


def penn_action(roots: list[Path]) -> Source:
    """ROOT/labels/0001.mat .. 2326.mat and ROOT/frames/0001/000001.jpg ..; the split is the labels' `train` field."""
    need("scipy.io", "scipy", "to read the labels of Penn Action")
    need("PIL.Image", "pillow", "to read the frames of Penn Action")
    root = roots[0]
    labels = sorted((root / "labels").glob("[!.]*.mat"))
    if not labels or not (root / "frames").is_dir():
        raise DataError(
            f"no Penn Action in {root}: looked for {root}/labels/0001.mat and {root}/frames/0001/000001.jpg. "
            "Get Penn_Action.tar.gz from dreamdragon.github.io/PennAction and unpack it, or pass its folder as --root"
        )
    source = Source(PENN_ACTIONS, PENN_JOINTS, PENN_PAIRS, read_jpegs)
    for path in labels:
        try:
            split, clip = penn_label(read_label(path), root / "frames" / path.stem)
            source.clips[split].append(clip)
        except Exception as error:  # scipy raises many kinds on a damaged file
            source.problems.append(f"{path}: {reason(error)}")
    return source


def mat_elements(raw: bytes):
    """Type and content of each element of a MAT-file of version 5, or of a variable in it."""
    at = 0
    while at < len(raw):
        kind, size = struct.unpack_from("<2I", raw, at)
        at += 8
        if kind > 0xFFFF:  # up to four bytes lie where the size would
            kind, size, at = kind & 0xFFFF, kind >> 16, at - 4
        if at + size > len(raw):
            raise ValueError("it breaks off")
        yield kind, raw[at : at + size]
        at += size + (-(at + size) % 8 if kind != 15 else 0)


def read_label(path: Path) -> dict:
    """The variables of a label file. One that is not a plain array is refused: scipy takes any memory, or crashes."""
    from scipy.io import loadmat

    raw = path.read_bytes()
    if raw[:6] != b"MATLAB" or raw[124:128] != b"\0\1IM":
        raise ValueError("not a MAT-file of version 5")
    for kind, variable in mat_elements(raw[128:]):
        if kind == 15:  # packed
            kind, variable = next(mat_elements(zlib.decompressobj().decompress(variable, 2**20)))
        (tag, info), (_, shape), _, (kind, values) = mat_elements(variable)
        plain = info[0] in (4, *range(6, 16)) and not info[1] & 8  # text, or numbers that are not complex
        if (tag, len(info)) != (6, 8) or not plain or kind not in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16):
            raise ValueError("it holds more than plain arrays")
        if math.prod(struct.unpack("<2i", shape)) > len(values):
            raise ValueError("it breaks off")
    return loadmat(io.BytesIO(raw))


def penn_label(label: dict, folder: Path) -> tuple[str, Clip]:
    """The clip of one label file. `bbox` is not used, so the two clips where it is a row short need no care."""
    action = str(label["action"].item())
    action = PENN_SPELLINGS.get(action, action)
    if action not in PENN_ACTIONS:
        raise ValueError(f"unknown action {action!r}")
    train = label["train"].item()
    if train not in (1, -1):
        raise ValueError(f"train is {train!r}, not 1 or -1")
    # some files hold unsigned integers, which wrap around below zero; MATLAB's first pixel is (1, 1)
    joints = numbers(np.stack([label["x"], label["y"]], -1)) - 1
    visible = numbers(label["visibility"]) == 1  # joints that were never annotated sit at the first pixel, invisible
    if not len(joints) or joints.shape[1:] != (13, 2) or visible.shape != joints.shape[:2]:
        raise ValueError(f"x, y have shape {joints.shape[:2]}, visibility {visible.shape}, expected (frames, 13)")
    size = frame_size(label["dimensions"].ravel()[:2])
    clip = Clip(folder.name, PENN_ACTIONS.index(action), joints, visible, size, folder)
    return ("train" if train == 1 else "test"), clip


def read_jpegs(folder: Path, frames: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """A crop of frames FOLDER/000001.jpg .. scaled to `size` (height, width); what lies outside is not scaled."""
    from PIL import Image

    (top, bottom), (left, right) = ((edge.start, edge.stop) for edge in crop)
    video = np.empty((len(frames), bottom - top, right - left, 3), np.uint8)
    for t, frame in enumerate(frames):
        path = folder / f"{frame + 1:06d}.jpg"
        try:
            with Image.open(path, formats=["JPEG"]) as image:
                frame_size(image.size[::-1])
                # Lets the decoder drop the detail that scaling would drop. The sides it returns are exact; those of
                # `image.size` are rounded up, and the last row and column then reach beyond the picture.
                (_, (_, _, width, height)), (h, w) = image.draft("RGB", size[::-1]), size
                box = left * width / w, top * height / h, right * width / w, bottom * height / h
                picture = image.convert("RGB")
                video[t] = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box)
        except Exception as error:  # pillow raises many kinds on a damaged file
            raise BadClip(f"{path}: {reason(error)}") from None
    return video


# --------------------------------------------------------------------------------------------------------------------
# Video files
# --------------------------------------------------------------------------------------------------------------------


def clip_key(name: str) -> str:
    """A name that is the same with and without suffixes such as `_rgb`, `.mp4`, and FineGYM's `_E_` and `_A_`."""
    name = re.sub(r"\.(avi|mp4|mkv|webm|mov)$", "", name, flags=re.IGNORECASE).removesuffix("_rgb")
    return re.sub(r"_E_(\d+_\d+)_A_(\d+_\d+)$", r"_\1_\2", name)


def find_files(roots: list[Path], endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files below the roots by `clip_key`, whatever folders they are in."""
    found, visited, errors = defaultdict(list), set(), []
    for root in filter(Path.exists, roots):
        for folder, folders, files in os.walk(root, followlinks=True, onerror=errors.append):
            real = os.path.realpath(folder)
            if real in visited:  # a link back, or a root within a root
                folders.clear()
                continue
            visited.add(real)
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(endings):
                    path = Path(folder, file)
                    found[clip_key(path.stem)].append(path)
    if errors:
        raise errors[0]
    return dict(found)


VIDEOS = (".avi", ".mp4", ".mkv", ".webm", ".mov")
VIDEO_LIMITS = {"max_pixels": str(8192**2), "format_whitelist": "avi,mov,matroska,mpegts,flv"}  # none is a playlist


def open_video(path: Path):
    """The container of a file and its video, which is decoded on one thread: each loading process is one."""
    import av

    container = av.open(f"file:{path}", options=VIDEO_LIMITS)  # without file: a colon in the name makes a protocol
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    stream.codec_context.options = VIDEO_LIMITS
    frame_size((stream.height, stream.width))
    return container, stream


def video_length(path: Path) -> int:
    """Frames that the decoder puts out, by the packets of a video, or by its header if it ends within one."""
    try:
        container, stream = open_video(path)
        with container:
            packets = [packet for packet in container.demux(stream) if packet.size]
            n = sum(not packet.is_discard for packet in packets)  # those that an edit list hides are discarded
            if not packets or packets[-1].is_corrupt:
                n = stream.frames or n
        if not 0 < n <= MOST_FRAMES:
            raise ValueError(f"{n} frames")
        return n
    except Exception as error:  # av raises many kinds on a damaged file
        raise BadClip(f"{path}: {reason(error)}") from None


def read_video(path: Path, frames: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """A crop of frames of a video by number, scaled to `size` (height, width).

    Frames are counted as the decoder puts them out, from the first: NTU's AVI files have one key frame and wrong time
    stamps, so seeking gains nothing and time stamps name the wrong frame. Only the frames asked for are converted,
    and scaled while they are. A file that breaks off gives the frames before the break.
    """
    from av.video.reformatter import VideoReformatter

    wanted, pictures, count, why = set(frames.tolist()), {}, 0, "it has no more"
    scaler = VideoReformatter()  # one for all frames: setting it up costs more than scaling
    try:
        container, stream = open_video(path)
        with container:
            for picture in container.decode(stream):
                if count in wanted:
                    turns = round(picture.rotation / 90)  # to the left: phones store on its side what is upright
                    height, width = size[:: -1 if turns % 2 else 1]
                    picture = scaler.reformat(picture, width, height, "rgb24", interpolation="BILINEAR")
                    pictures[count] = np.rot90(picture.to_ndarray(), turns)[crop]
                count += 1
                if len(pictures) == len(wanted):
                    break
    except Exception as error:  # av raises many kinds on a damaged file
        why = reason(error)
    if len(pictures) < len(wanted):
        raise BadClip(f"{path}: frame {min(wanted - pictures.keys())} of {count} readable ones was asked for: {why}")
    return np.stack([pictures[frame] for frame in frames.tolist()])


# --------------------------------------------------------------------------------------------------------------------
# NTU RGB+D 60 and 120 (Shahroudy et al., CVPR 2016; Liu et al., TPAMI 2019)
# --------------------------------------------------------------------------------------------------------------------

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
NTU_PROTOCOLS = {  # actions, whether (setup, camera, performer) trains, samples to expect with and without the lists
    "ntu60-xsub": (60, lambda s, c, p: p in NTU60_TRAIN, "40,091 and 16,487", "40,320 and 16,560"),
    "ntu60-xview": (60, lambda s, c, p: c != 1, "37,646 and 18,932", "37,920 and 18,960"),
    "ntu120-xsub": (120, lambda s, c, p: p in NTU120_TRAIN, "63,026 and 50,919", "63,360 and 51,120"),
    "ntu120-xset": (120, lambda s, c, p: s % 2 == 0, "54,468 and 59,477", "54,720 and 59,760"),
}
NTU_LISTS = {  # by the number of actions
    60: "NTU_RGBD_samples_with_missing_skeletons.txt",
    120: "NTU_RGBD120_samples_with_missing_skeletons.txt",
}


def ntu_split(name: str, protocol: str) -> str | None:
    """ "train" or "test" for a sample such as S001C001P001R001A001; None if it is not of that data set."""
    setup, camera, performer, _, action = map(int, NTU_NAME.fullmatch(name).groups())
    actions, trains = NTU_PROTOCOLS[protocol][:2]
    if action > actions:
        return None
    return "train" if trains(setup, camera, performer) else "test"


def ntu(roots: list[Path], protocol: str) -> Source:
    """*.skeleton and *_rgb.avi (or .mp4, with or without _rgb) anywhere below the roots; two persons, R = 50."""
    need("av", "av", "to read the videos of NTU RGB+D")

    def smallest(paths):  # of the videos of a sample, some may be re-encoded
        return min(paths, key=lambda path: path.stat().st_size) if len(paths) > 1 else paths[0]

    found = find_files(roots, (".skeleton",)), find_files(roots, VIDEOS)
    skeletons, videos = ({n: smallest(p) for n, p in each.items() if NTU_NAME.fullmatch(n)} for each in found)
    if not skeletons or not videos:
        raise DataError(
            f"no NTU RGB+D in {', '.join(map(str, roots))}: {len(skeletons)} files like S001C001P001R001A001.skeleton "
            f"and {len(videos)} like S001C001P001R001A001_rgb.avi. Ask for the data set at "
            "rose1.ntu.edu.sg/dataset/actionRecognition, unpack it, and pass its folders as --root DIR DIR"
        )
    lists = sum(find_files(roots, tuple(file.lower() for file in NTU_LISTS.values())).values(), [])
    excluded = {match.group() for path in lists for match in NTU_NAME.finditer(path.read_text(errors="replace"))}
    actions, _, without, everything = NTU_PROTOCOLS[protocol]
    longer = NTU_LISTS[120]  # holds the other one
    if not {NTU_LISTS[actions].lower(), longer.lower()} & {path.name.lower() for path in lists}:
        print(
            f"warning: no {NTU_LISTS[actions]} in {', '.join(map(str, roots))}: samples it would name stay in. "
            f"Expect {everything} training and test samples in the whole data set, {without} without them",
            file=sys.stderr,
        )
    source = Source(
        [f"A{a:03d}" for a in range(1, actions + 1)],
        [f"{joint} {person}" for person in (1, 2) for joint in NTU_JOINTS],
        [(a + p, b + p) for p in (0, 25) for a, b in NTU_PAIRS],
        read_video,
        ntu_annotate,
    )
    for name in sorted(skeletons.keys() | videos.keys()):
        split = ntu_split(name, protocol)
        if name in excluded or split is None:
            continue
        if name not in skeletons or name not in videos:
            source.missing.append(f"{name} has no {'skeleton' if name in videos else 'video'}")
            continue
        media = videos[name], skeletons[name]
        source.clips[split].append(Clip(name, int(name[-3:]) - 1, None, None, NTU_SIZE, media))
    return source


def ntu_annotate(clip: Clip) -> Clip:
    """A clip with the joints of its skeleton file, as long as the shorter of video and skeleton."""
    video, path = clip.media
    try:
        if path.stat().st_size > 2**25:  # six bodies in each of 2,000 frames
            raise ValueError("too large for a skeleton")
        joints, visible = two_persons(*parse_skeleton(path.read_bytes()))
    except IndexError:
        raise BadClip(f"{path}: it breaks off") from None
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise BadClip(f"{path}: {reason(error)}") from None
    n = min(len(joints), video_length(video))
    return replace(clip, joints=joints[:n], visible=visible[:n], media=video)


def parse_skeleton(text: bytes) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """A .skeleton file: frames, and of its m bodies the frame (m,), the id (m,) and the fields (m, 25, 12).

    Ids lie near 2^56, where a float would make one of two persons: they are read as integers. The fields of a joint
    are x y z, depth x y, colour x y, a quaternion and the tracking state.
    """
    lines = text.split(b"\n")
    frames, at = int(lines[0]), 1
    if not 0 < frames <= MOST_FRAMES:
        raise ValueError(f"{frames} frames")
    when, ids, rows = [], [], []
    for frame in range(frames):
        bodies, at = int(lines[at]), at + 1
        if bodies < 0:
            raise ValueError(f"line {at}: {bodies} bodies")
        for _ in range(bodies):
            if int(lines[at + 1]) != 25:
                raise ValueError(f"line {at + 2}: {int(lines[at + 1])} joints, expected 25")
            when.append(frame)
            ids.append(int(lines[at].split(None, 1)[0]))
            joints = [line.split() for line in lines[at + 2 : at + 27]]
            if [len(words) for words in joints] != [12] * 25:
                raise ValueError(f"line {at + 3}: expected 25 lines of 12 numbers")
            rows += [[float(word) for word in words] for words in joints]
            at += 27
    if len(set(ids)) > 256:  # the search for persons compares them all; the Kinect sees six at once
        raise ValueError(f"{len(set(ids))} different bodies")
    return frames, np.array(when, int), np.array(ids, np.int64), np.array(rows).reshape(len(ids), 25, 12)


def two_persons(frames: int, when: np.ndarray, ids: np.ndarray, fields: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints (frames, 50, 2) and visibility of the two persons who move most; frames without a body keep their place.

    A person is a chain of ids: where one ends and another begins within a metre, the Kinect has renamed the person.
    Its ghosts (chairs, tables) are told by their shape, wider than high, or are seen for at most 11 frames; they are
    left out as long as somebody else is there.
    """
    place = np.nan_to_num(fields[..., :3], posinf=0, neginf=0)  # metres
    found = place.any((1, 2))  # a body of zeros is nobody
    when, ids, fields, place = when[found], ids[found], fields[found], place[found]
    centre = place.mean(1)
    persons = []  # each the numbers of its bodies, in the order of the frames
    for identity in dict.fromkeys(ids.tolist()):
        rows = np.flatnonzero(ids == identity)
        rows = rows[np.unique(when[rows], return_index=True)[1]]  # an id twice in a frame: the first
        apart = []  # how far from each person, at the nearest frame; at infinity if both are in one frame
        for person in persons:
            nearest = person[np.argmin(abs(when[person] - when[rows[0]]))]
            together = np.isin(when[rows], when[person]).any()
            apart.append(np.inf if together else np.linalg.norm(centre[nearest] - centre[rows[0]]))
        if apart and min(apart) < 1:
            k = int(np.argmin(apart))
            both = np.concatenate([persons[k], rows])
            persons[k] = both[np.argsort(when[both])]
        else:
            persons.append(rows)

    def real(rows):
        spread = np.ptp(place[rows], axis=1)  # (frames, 3)
        return len(rows) > 11 and np.mean(spread[:, 0] > 0.8 * spread[:, 1]) < 0.7

    persons = [rows for rows in persons if real(rows)] or persons
    persons.sort(key=lambda rows: -place[rows].var(0).sum())  # stable: ties in order of appearance
    joints, visible = np.zeros((frames, 50, 2), np.float32), np.zeros((frames, 50), bool)
    for slot, rows in enumerate(persons[:2]):
        colour = fields[rows][..., 5:7]
        with np.errstate(over="ignore"):
            joints[when[rows], 25 * slot : 25 * slot + 25] = colour
        inside = (colour >= 0) & (colour < NTU_SIZE[::-1]) & np.isin(fields[rows][..., 11:], (1, 2))  # false for NaN
        visible[when[rows], 25 * slot : 25 * slot + 25] = inside.all(-1) & colour.any(-1)
    return joints, visible


# --------------------------------------------------------------------------------------------------------------------
# Pickles in the form of pyskl, FineGYM's among them (Duan et al., CVPR 2022; Shao et al., CVPR 2020)
# --------------------------------------------------------------------------------------------------------------------

COCO_JOINTS = [
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
]  # fmt: skip
COCO_PAIRS = [(i, i + 1) for i in range(1, 17, 2)]


def buffer_array(raw, kind, shape, order, axes=None) -> np.ndarray:
    """What numpy's `_frombuffer` returns; since 2.4 the axes may have been exchanged after they had this shape."""
    array = np.frombuffer(raw, kind).reshape(shape, order="C" if axes else order)
    return array.transpose(axes) if axes else array


class ArrayUnpickler(pickle._Unpickler):
    """Reads plain containers, numbers, strings and numpy arrays, and refuses all else: a pickle can run any code.

    It is Python's: the one in C takes the memory that the number of a damaged object asks for.
    """

    known = {
        "numpy.ndarray": "named, and never called",
        "numpy.dtype": lambda code, *_: np.dtype(code),
        "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0),
        "numpy.core.multiarray.scalar": lambda kind, raw: np.frombuffer(raw, kind)[0],
        "numpy.core.numeric._frombuffer": buffer_array,
        "collections.OrderedDict": dict,
        "collections.defaultdict": lambda *_: {},
        "_codecs.encode": lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes,
        **dict.fromkeys(("__builtin__.bytes", "builtins.bytes"), lambda: b""),  # and none
        **{f"{module}.{kind.__name__}": kind for module in ("__builtin__", "builtins") for kind in (list, set)},
    }

    def find_class(self, module: str, name: str):
        known = self.known.get(f"{module}.{name}".replace("numpy._core", "numpy.core"))  # numpy 2 and numpy 1
        if known is None:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no data set needs")
        return known

    def load_build(self):  # a damaged dtype, or an array of objects, makes numpy's own `__setstate__` crash
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, np.ndarray) and not made.size and not state[2].hasobject:
            made.__setstate__(state)
        elif isinstance(made, np.dtype) and state[1] == ">":
            raise pickle.UnpicklingError("an array in it is big-endian")

    def load_bytearray8(self):  # Python's takes the memory that it is told of before it reads
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build, pickle.BYTEARRAY8[0]: load_bytearray8}


def pyskl(roots: list[Path], annotations: list[Path], splits: tuple[str, str] = ("train", "val")) -> Source:
    """A pickle {split, annotations}, or two plain lists for train and test; videos are named by frame_dir."""
    need("av", "av", "to read the videos of this data set")
    videos = find_files(roots, VIDEOS)
    source, persons, labels = Source([], [], [], read_video, pyskl_annotate), 1, 0
    for path, only in zip(annotations, source.clips):
        try:
            with path.open("rb") as file:
                content = ArrayUnpickler(file).load()
            listed, wanted = content, {only: None}
            if not isinstance(content, list):
                if len(annotations) > 1:
                    raise ValueError("of two files each must be a plain list of entries, this one has splits")
                listed, known = list(content["annotations"]), content["split"]
                if not {*splits} <= known.keys():
                    raise ValueError(f"it has no {' or '.join(splits)}; its splits are {[*known]}")
                wanted = {}
                for split, listed_as in zip(source.clips, splits):
                    wanted[split] = {clip_key(name): name for name in known[listed_as]}
        except FileNotFoundError:
            raise DataError(f"no annotations at {path}: expected a pickle in the form of pyskl") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(f"{path}: {reason(error)}") from None
        found = set()
        for number, entry in enumerate(listed):
            name = f"entry {number}"
            try:
                given = entry.get("filename") or entry["frame_dir"]
                key, name = clip_key(given), str(given)  # TypeError for what is no text
                chosen = [split for split, names in wanted.items() if names is None or key in names]
                if key in found:
                    raise ValueError("it is there twice")
                found.add(key)
                if not chosen:
                    continue
                clip = pyskl_clip(name, entry)
            except Exception as error:  # what is missing, or of another type
                source.problems.append(f"{path}, {name}: {reason(error)}")
                continue
            labels, persons = max(labels, clip.label + 1), max(persons, clip.joints.shape[1] // 17)
            if key not in videos:
                source.missing.append(f"{name} has no video")
                continue
            if len(videos[key]) > 1:
                source.problems.append(f"{videos[key][0]} and {videos[key][1]} have one name: leave one of them there")
            for split in chosen:
                source.clips[split].append(replace(clip, media=videos[key][0]))
        for names in wanted.values():
            lacking = [name for key, name in (names or {}).items() if key not in found]
            source.missing += [f"{name} has no annotation in {path}" for name in lacking]
    both = {clip.media for clip in source.clips["train"]} & {clip.media for clip in source.clips["test"]}
    if both:
        raise DataError(f"{annotations[-1]}: {len(both)} clips are for training and test alike, such as {min(both)}")
    if not videos:
        raise DataError(f"no videos in {', '.join(map(str, roots))}: looked for NAME.mp4 as named in {annotations[0]}")
    source.classes = [str(label) for label in range(labels)]
    for p in range(persons):
        source.joint_names += [f"{joint} {p + 1}" if persons > 1 else joint for joint in COCO_JOINTS]
        source.flip_pairs += [(a + 17 * p, b + 17 * p) for a, b in COCO_PAIRS]
    for clip in source.clips["train"] + source.clips["test"]:  # as many joints in every clip
        absent = 17 * persons - clip.joints.shape[1]
        clip.joints = np.pad(clip.joints, ((0, 0), (0, absent), (0, 0)))
        clip.visible = np.pad(clip.visible, ((0, 0), (0, absent)))
    return source


def pyskl_clip(name: str, entry: dict) -> Clip:
    """A clip of `keypoint` (M, n, 17, 2), `keypoint_score` (M, n, 17), `label` and `img_shape`; up to two persons."""
    keypoint = numbers(entry["keypoint"])  # float16 in the files, which scales badly
    if keypoint.ndim != 4 or keypoint.shape[2:] != (17, 2) or not 0 < keypoint.shape[1] <= MOST_FRAMES:
        raise ValueError(f"keypoint has shape {keypoint.shape}, expected (persons, frames, 17, 2)")
    score = numbers(entry.get("keypoint_score", np.ones(keypoint.shape[:3])))
    if score.shape != keypoint.shape[:3]:
        raise ValueError(f"keypoint_score has shape {score.shape}, keypoint {keypoint.shape}")
    keypoint, score = keypoint[:2], score[:2]
    label, size = int(entry["label"]), frame_size(entry["img_shape"])
    if label != entry["label"] or not 0 <= label < 10_000:  # each label below the largest is a class
        raise ValueError(f"label {entry['label']}")
    visible = np.isfinite(keypoint).all(-1) & np.isfinite(score) & (score > 0) & keypoint.any(-1)  # (0, 0) is nobody
    persons, n = visible.shape[:2]  # M may be 0: nobody was found
    joints = keypoint.transpose(1, 0, 2, 3).reshape(n, 17 * persons, 2)
    return Clip(name, label, joints, visible.transpose(1, 0, 2).reshape(n, 17 * persons), size, None)


def pyskl_annotate(clip: Clip) -> Clip:
    """A clip with one row of joints for each frame of its video: the cut of a video may have more or fewer."""
    have = len(clip.joints)
    n = video_length(clip.media)
    row = np.round(np.arange(n) * (have - 1) / max(1, n - 1)).astype(int)
    return replace(clip, joints=clip.joints[row], visible=clip.visible[row])


def finegym(roots: list[Path]) -> Source:
    """ROOT/gym_hrnet.pkl of pyskl, or gym_2d.pkl as mmaction2 names it, and the videos ROOT/subactions/NAME.mp4."""
    path, other = (roots[0] / name for name in ("gym_hrnet.pkl", "gym_2d.pkl"))
    return pyskl(roots, [other if other.exists() and not path.exists() else path])


# --------------------------------------------------------------------------------------------------------------------
# All data sets
# --------------------------------------------------------------------------------------------------------------------

NTU_ROOTS = ["datasets/nturgb+d_rgb", "datasets/nturgb+d_skeletons"]
SOURCES = {  # and where to look
    "synthetic": (synthetic, []),
    "pennaction": (penn_action, ["datasets/Penn_Action"]),
    **{name: (functools.partial(ntu, protocol=name), NTU_ROOTS) for name in NTU_PROTOCOLS},
    "finegym": (finegym, ["datasets/gym"]),
    "pyskl": (pyskl, ["datasets/videos"]),
}


def add_flags(parser) -> None:
    """The flags that name a data set."""
    parser.add_argument("--data", choices=SOURCES, default="synthetic", help="data set [synthetic]")
    parser.add_argument(
        "--root", nargs="+", type=Path, metavar="DIR", help="its folders [datasets/NAME OF THE ARCHIVE]"
    )
    text = "pyskl: the pickle, or two lists for train and test"
    parser.add_argument("--annotations", nargs="+", type=Path, metavar="PKL", help=text)
    parser.add_argument("--split-train", metavar="KEY", help="pyskl: the split to train on [train]")
    parser.add_argument("--split-val", metavar="KEY", help="pyskl: the split to test on [val]")


def load(options: argparse.Namespace) -> Source:
    """The data set that the flags name, indexed; DataError if it is not there, UsageError for the flags."""
    function, roots = SOURCES[options.data]
    roots = options.root or [Path(root) for root in roots]
    words = [roots] if roots else []
    if options.root and options.data == "synthetic":
        raise UsageError("--root: the synthetic clips are drawn, there are no files")
    if options.data == "pennaction" and len(roots) > 1:
        raise UsageError("--root: Penn Action has one folder")
    for root in options.root or []:
        if not root.is_dir():
            raise UsageError(f"--root: there is no folder {root}")
    if options.data == "pyskl":
        if not options.annotations or len(options.annotations) > 2:
            raise UsageError("--data pyskl needs --annotations PKL, or two of them, for train and test")
        words += [options.annotations, (options.split_train or "train", options.split_val or "val")]
    elif options.annotations or options.split_train or options.split_val:
        raise UsageError("--annotations, --split-train and --split-val are for --data pyskl")
    try:
        return function(*words)
    except OSError as error:  # a folder or a list that may not be read
        raise DataError(f"{error.filename}: {error.strerror}") from None


def check(source: Source, clip: Clip) -> tuple[int, int, str]:
    """Frames, visible joints and problem of a clip, of which every frame is read."""
    n, visible, problem = 0, 0, ""
    try:
        clip = source.annotate(clip)
        n, visible = len(clip.joints), int(clip.visible.sum())
        source.read(clip.media, np.arange(n), (16, 16), (slice(0, 16), slice(0, 16)))
    except BadClip as error:
        problem = str(error)
    return n, visible, problem


def main():
    parser = argparse.ArgumentParser(description="Check a data set: counts, frames, visible joints, every problem.")
    add_flags(parser)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read frames [2]")
    options = parser.parse_args()
    if options.workers < 0:
        parser.error("--workers must be 0 or more")
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    try:
        source = load(options)
    except (DataError, UsageError) as error:
        sys.exit(f"data.py: {error}")

    print(f"{'class':24}{'train':>8}{'test':>8}")
    for label, name in enumerate(source.classes):
        train, test = (sum(clip.label == label for clip in source.clips[split]) for split in ("train", "test"))
        print(f"{name:24}{train:8}{test:8}")
    print(f"{'all':24}{len(source.clips['train']):8}{len(source.clips['test']):8}")

    clips, one = source.clips["train"] + source.clips["test"], functools.partial(check, source)
    loader = torch.utils.data.DataLoader(clips, batch_size=None, collate_fn=one, num_workers=options.workers)
    frames = seen = 0
    unseen, problems = [], source.problems
    for clip, (n, visible, problem) in zip(clips, tqdm(loader, desc="reading", unit="clip", disable=None)):
        frames, seen = frames + n, seen + visible
        if n and not visible:
            unseen.append(clip.name)
        if problem:
            problems.append(problem)
    R = len(source.joint_names)
    print(f"{frames} frames, {R} joints, {seen / max(1, frames * R):.1%} of them visible")
    if unseen:
        print(f"without a visible joint: {', '.join(unseen)}")
    print(*source.missing, *problems, f"{len(source.missing)} left out, {len(problems)} problems", sep="\n")
    sys.exit(bool(problems) or not clips)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
