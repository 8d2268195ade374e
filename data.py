"""Clips for D3T: the record, the Dataset, Penn Action, a synthetic set, the registry of all sets.

An item of `Dataset` is a dict, alike for every source:

    video    uint8    (3, T, H, W)  RGB, not normalised: the model does that on its device
    joints   float32  (T, R, 2)     x, y in pixels of this crop; its first pixel's centre is (0, 0)
    visible  bool     (T, R)        False for a joint of unknown position, or outside the crop
    label    int
    name     str                    of the clip
    bad      list of (str, str)     name and "FILE: reason" of the clips that it replaces

To add a data set, write a `Source` and name it in `SOURCES`. `sources/two_hands.py` would be, for
ROOT/CLASS/NAME.mp4 with joints (frames, 2, 2) in NAME.npy,

    import numpy as np
    from data import Clip
    from sources.video import VideoSource

    class TwoHands(VideoSource):  # which reads the video whose path is `media`
        def __init__(self, roots):
            super().__init__(["clap", "wave"], ["left hand", "right hand"], [(0, 1)])
            for path in sorted(roots[0].glob("*/*.mp4")):
                joints = np.load(path.with_suffix(".npy")).astype(np.float32)
                label = self.classes.index(path.parent.name)
                split = "test" if path.stem.endswith("0") else "train"
                self.clips[split].append(Clip(path.stem, label, joints, True, (360, 640), path))

    # and in `SOURCES`, at the end of this file:
    SOURCES["two_hands"] = ("sources.two_hands:TwoHands", ["datasets/two_hands"])
"""

import importlib
import inspect
import pkgutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

RESIZE = 8 / 7  # frames are scaled so that the crop takes 7/8 of the shorter side, as 224 of 256
LENGTHS_DIFFER = 0.1  # of the rows of joints: more is another video
SHAPES_DIFFER = 0.02  # of the aspect ratio: more is no encoder's rounding


class UsageError(Exception):
    """A flag or a file that cannot be used; says what was expected."""


class DataError(Exception):
    """A data set that cannot be used; says what was looked for."""


class BadClip(DataError):
    """A clip that cannot be read; names the file and the reason."""

    def __init__(self, text: str):
        # A loader's worker sends its whole traceback, which ends with the message.
        super().__init__(text.split("data.BadClip: ")[-1].strip())


def need(module, package, why):
    """Import a module; DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{package} is needed {why}: pip install {package}") from None


def reason(error):
    """What an exception says, in one line; with its type if it says a single word."""
    text = " ".join(str(error).split())
    return text[:300] if " " in text else repr(error)


Size = tuple[int, int]  # height and width
Crop = tuple[slice, slice]  # rows and columns


@dataclass
class Clip:
    """A clip as a source lists it; joints may be None until `find_joints` has read them."""

    name: str
    label: int
    joints: np.ndarray | None  # (n, R, 2) float32, x, y in pixels of the full frame, whose first
    # pixel's centre is (0, 0); the last of the source's joints may be left out
    visible: np.ndarray | bool | None  # (n, R) or for all; never where a joint is not finite
    size: Size  # of the frames that the joints refer to
    media: object  # what the source's `read` needs to find the frames

    def __post_init__(self):
        """The joints of every source pass here."""
        if self.joints is not None:
            self.visible = self.visible & np.isfinite(self.joints).all(-1)


class Frames(NamedTuple):
    """What `read` returns; the last two are compared with the clip."""

    video: np.ndarray  # uint8 (T, H, W, 3), of the frames that are there
    count: int | None = None  # of all frames; None: as `length` says
    size: Size | None = None  # of a whole frame as it is shown; None: that of the clip


class Source:
    """A data set: what it knows, its clips, and how to read one."""

    spread = False  # the rows of joints are spread over the frames; else the longer of both is cut
    squeezed = False  # frames may have another shape than those that the joints refer to

    def __init__(self, classes, joint_names, flip_pairs):
        self.classes, self.joint_names = classes, joint_names
        self.flip_pairs = flip_pairs  # (a, b): joints that trade places in a mirror
        self.clips = {"train": [], "test": []}
        self.problems = []  # "FILE: reason"
        self.missing = []  # what lacks its video or its joints, and is left out

    def read(self, clip: Clip, frames: np.ndarray, size: Size, crop: Crop) -> Frames:
        """A crop of the frames with these numbers after scaling them to `size`; or BadClip."""
        raise NotImplementedError

    def find_joints(self, clip: Clip) -> Clip:
        """The clip with its joints, if it was listed without; or BadClip."""
        return clip

    def length(self, clip: Clip) -> int:
        """The number of frames, or a guess that `read` corrects."""
        return len(clip.joints)


# ---- Dataset: which frames, which crop, the joints in it ----
def read_clip(source: Source, clip: Clip, choose, size: Size, crop: Crop):
    """Video (T, H, W, 3), joints (T, R, 2), visible (T, R) of frames `choose(n)`; or BadClip."""
    rows, n = len(clip.joints), source.length(clip)
    # Packets are not frames: the length is known after reading, and then frames are read again.
    while True:
        row = np.arange(min(n, rows))  # of the joints, for each frame
        if source.spread:
            row = np.linspace(0, rows - 1, n).round().astype(int)
        frames = choose(len(row))
        video, count, shown = source.read(clip, frames, size, crop)
        if count in (None, n):
            break
        n = count
    if not source.spread and abs(n - rows) > LENGTHS_DIFFER * rows:
        what = f"{clip.name} has joints of {rows} frames, but {n} frames are in the video"
        raise BadClip(f"{clip.media}: {what}")
    height, width = shown or clip.size
    stretch = height * clip.size[1] / (width * clip.size[0])
    if not source.squeezed and abs(stretch - 1) > SHAPES_DIFFER:
        what = f"{clip.size}, but the video has {height, width} (height, width)"
        raise BadClip(f"{clip.media}: the joints of {clip.name} refer to frames of {what}")
    absent = 0, len(source.joint_names) - clip.joints.shape[1]  # persons of other clips
    row = row[frames]
    joints = np.pad(clip.joints[row], [(0, 0), absent, (0, 0)])
    visible = np.pad(clip.visible[row], [(0, 0), absent])
    return video, joints, visible


def place_crop(size: Size, crop: Size, rng=None):
    """The size to scale a frame to, and a crop of that: a random one, or the middle one."""
    height, width = crop
    scale = RESIZE * max(height / size[0], width / size[1])
    h, w = (round(side * scale) for side in size)
    rows, columns = h - height, w - width  # outside the crop
    top, left = rows // 2, columns // 2
    if rng:
        top = rng.integers(rows + 1)
        left = rng.integers(columns + 1)
    crop = slice(top, top + height), slice(left, left + width)
    return (h, w), crop


def rescale(joints, old: Size, new: Size):
    """Joints (..., 2) in a scaled frame: pixel edges scale, so centres shift by half a pixel."""
    scale = np.divide(new, old)[::-1].astype(np.float32)
    return (joints + 0.5) * scale - 0.5


class Dataset(torch.utils.data.Dataset):
    """The clips of one split as items, by number or by (epoch, number).

    "train" takes a random frame of each of `frames` segments and a random crop, and mirrors half of
    the clips; "test" takes the middle ones. What is random depends on (seed, epoch, number) alone.
    A bad clip is replaced by the next one in training, and raises BadClip in testing.
    """

    def __init__(self, source, split, frames, height, width, seed=0):
        self.source, self.clips = source, source.clips[split]
        self.train, self.seed = split == "train", seed
        self.frames, self.crop = frames, (height, width)
        self.partner = np.arange(len(source.joint_names))
        for a, b in source.flip_pairs:
            self.partner[[a, b]] = b, a

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, index)) if self.train else None
        bad = []
        while True:
            clip = self.clips[index]
            try:
                return self.load(clip, rng) | {"bad": bad}
            except BadClip as error:
                bad.append((clip.name, str(error)))
            if not self.train or len(bad) > 10:  # so many: the folder is wrong, not a file
                raise BadClip("; ".join(why for _, why in bad))
            index = (index + 1) % len(self)

    def load(self, clip, rng):
        """The item of one clip, without `bad`; random if there is an `rng`."""
        T = self.frames
        clip = self.source.find_joints(clip)
        # A frame of each of T equal segments, random or in the middle (ours 20).
        place = np.arange(T) + (rng.random(T) if rng else 0.5)
        size, crop = place_crop(clip.size, self.crop, rng)
        video, joints, visible = read_clip(
            self.source, clip, lambda n: (place * n / T).astype(int), size, crop
        )
        joints = rescale(joints, clip.size, size)
        joints -= np.float32([crop[1].start, crop[0].start])
        if rng and rng.random() < 0.5:  # a mirror turns left joints into right ones
            video = video[:, :, ::-1]
            joints = joints[:, self.partner]
            visible = visible[:, self.partner]
            joints[..., 0] = self.crop[1] - 1 - joints[..., 0]
        end = np.float32(self.crop[::-1]) - 0.5
        inside = (joints >= -0.5) & (joints < end)
        video = np.ascontiguousarray(video)  # torch knows no mirrored arrays
        return {
            "video": torch.from_numpy(video).permute(3, 0, 1, 2),
            "joints": torch.from_numpy(joints),
            "visible": torch.from_numpy(visible & inside.all(-1)),
            "label": clip.label,
            "name": clip.name,
        }


def collate(items):
    """A batch of items; their lists of bad clips become one."""
    bad = [clip for item in items for clip in item["bad"]]
    # Colours stay side by side in memory, as decoders write and channels_last_3d reads them.
    items = [item | {"bad": 0, "video": item["video"].permute(1, 2, 3, 0)} for item in items]
    batch = torch.utils.data.default_collate(items)
    return batch | {"bad": bad, "video": batch["video"].permute(0, 4, 1, 2, 3)}  # (B, 3, T, H, W)


# ---- Penn Action (Zhang, Zhu, Derpanis, ICCV 2013) ----
PENN_ACTIONS = [
    "baseball_pitch", "baseball_swing", "bench_press", "bowl", "clean_and_jerk", "golf_swing",
    "jump_rope", "jumping_jacks", "pullup", "pushup", "situp", "squat", "strum_guitar",
    "tennis_forehand", "tennis_serve",
]  # fmt: skip
SIDES = ("left", "right")  # of the picture: left is the right arm of a person who faces the camera
LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
PENN_JOINTS = ["head", *(f"{side} {limb}" for limb in LIMBS for side in SIDES)]
PENN_PAIRS = [(i, i + 1) for i in range(1, 13, 2)]
PENN_EDGES = [(0, 1), (0, 2), (1, 2), (7, 8), (1, 7), (2, 8)]
PENN_EDGES += [(i, i + 2) for i in (1, 2, 3, 4, 7, 8, 9, 10)]  # arms and legs


class PennAction(Source):
    """ROOT/labels/0001.mat and so on, ROOT/frames/0001/000001.jpg and so on."""

    def __init__(self, roots: list[Path]):
        super().__init__(PENN_ACTIONS, PENN_JOINTS, PENN_PAIRS)
        matlab = need("scipy.io.matlab", "scipy", "to read Penn Action")
        need("PIL", "pillow", "to read Penn Action")
        labels = [path for root in roots for path in sorted(root.glob("labels/[!.]*.mat"))]
        if not labels or not (roots[0] / "frames").is_dir():
            files = f"{roots[0]}/labels/0001.mat and frames/0001/000001.jpg"
            get = "get it from dreamdragon.github.io/PennAction, or pass --root"
            raise DataError(f"no Penn Action: looked for {files}; {get}")
        # What scipy raises on a damaged file, or `penn_clip` on what it holds
        damage = (OSError, ValueError, TypeError, LookupError, zlib.error, matlab.MatReadError)
        for path in labels:
            try:
                split, clip = penn_clip(path, matlab.loadmat(path))
                self.clips[split].append(clip)
            except damage as error:
                self.problems.append(f"{path}: {reason(error)}")

    def read(self, clip, frames, size, crop):
        paths = [clip.media / f"{frame + 1:06d}.jpg" for frame in frames]
        return Frames(np.stack([read_jpeg(path, size, crop) for path in paths]))


def penn_clip(path, label):
    """The split and the clip of a label file.

    An occluded joint with a position counts as visible (ours 4); one without is invisible and
    lies at (1, 1) of a picture that was then resized by up to 1.52.
    """
    joints = np.stack([label["x"], label["y"]], -1).astype(np.float32)
    x, y = joints[..., 0], joints[..., 1]
    absent = (label["visibility"] != 1) & (x == y) & (x < 2)
    action = PENN_ACTIONS.index(str(label["action"].item()))
    height, width = label["dimensions"].ravel()[:2].tolist()
    folder = path.parents[1] / "frames" / path.stem
    joints = joints - 1  # MATLAB counts pixels from 1
    split = "train" if label["train"].item() == 1 else "test"
    return split, Clip(path.stem, action, joints, ~absent, (height, width), folder)


def read_jpeg(path, size: Size, crop: Crop):
    """A crop (h, w, 3) of a picture scaled to `size`; or BadClip."""
    from PIL import Image

    rows, columns = crop
    shape = columns.stop - columns.start, rows.stop - rows.start
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            # `draft` lets the decoder drop detail that scaling would drop. The sides it returns are
            # exact; those of `image.size` are rounded up.
            _, (_, _, width, height) = image.draft("RGB", size[::-1])
            x, y = width / size[1], height / size[0]
            box = columns.start * x, rows.start * y, columns.stop * x, rows.stop * y
            return np.asarray(image.convert("RGB").resize(shape, Image.Resampling.BILINEAR, box))
    except (OSError, TypeError) as error:  # Pillow raises both on damaged files
        raise BadClip(f"{path}: {reason(error)}") from None


# ---- Synthetic: two figures act, the joints say which of them is meant ----
SYNTHETIC_ACTIONS = ["wave", "flap", "jumping jack", "kick"]
SYNTHETIC_SIZE = (64, 64)  # of the frames that the joints refer to
SYNTHETIC_FRAMES = 16
TORSO = [0, 1, 2, 7, 8]  # head, shoulders, hips: annotated, and moved by no action


class Synthetic(Source):
    """Two figures act; the joints follow one, whose action is the label.

    The pixels say what is done, the joints by whom: only head, shoulders and hips are annotated,
    which move alike in every action. So joints alone are worth 1 of 4 and, as nothing else tells
    the figures apart, pixels alone 1 of 2.
    """

    def __init__(self, train=2048, test=512, seed=0):
        super().__init__(SYNTHETIC_ACTIONS, PENN_JOINTS, PENN_PAIRS)
        for split, stream, n in (("train", 0, train), ("test", 1, test)):
            clips = [two_figures(f"{split} {i}", (seed, stream, i, 1)) for i in range(n)]
            self.clips[split] = clips

    def read(self, clip, frames, size, crop):
        figures, colours, wall, drift = clip.media
        corner = 0.6 + drift * frames[:, None] / SYNTHETIC_FRAMES  # (T, 2)
        video = draw_wall(wall, corner, size)
        for figure, colour in zip(figures, colours):
            joints = rescale(figure[frames].astype(np.float32), SYNTHETIC_SIZE, size)
            video += (np.float32(colour) - video) * cover(joints, size)[..., None]
        video = video[:, crop[0], crop[1]]
        return Frames(video.round().astype(np.uint8))


synthetic = Synthetic


def two_figures(name, seed):
    """A clip; its media are both figures, their colours, the wall behind and its drift."""
    rng = np.random.default_rng(seed)
    actions = rng.permutation(len(SYNTHETIC_ACTIONS))[:2]
    time = np.arange(SYNTHETIC_FRAMES)
    figures = []
    for figure, action in enumerate(actions):
        turns = time / rng.uniform(8, 14) + rng.random()
        swing = 0.5 - 0.5 * np.cos(2 * np.pi * turns)
        joints = pose(action, swing, rng.integers(2)) * rng.uniform(38, 48)
        turns = time / rng.uniform(6, 12) + rng.random()
        bob = np.sin(2 * np.pi * turns)
        walk = np.stack([rng.uniform(-0.2, 0.2) * (time - 8), bob], -1)  # alike for every action
        hips = [rng.uniform(17, 22) + 25 * figure, rng.uniform(30, 37)]
        figures.append(joints + walk[:, None] + hips)
    actor = rng.integers(2)
    joints = np.float32(figures[actor])
    visible = np.zeros(joints.shape[:2], bool)
    visible[:, TORSO] = rng.random((len(time), len(TORSO))) < 0.95  # annotations have holes
    colours = rng.integers(160, 256, (2, 3))  # bright figures, a dark wall
    wall = rng.integers(0, 100, (5, 5, 3))
    media = np.stack(figures), colours, wall, rng.uniform(-0.5, 0.5, 2)
    return Clip(name, int(actions[actor]), joints, visible, SYNTHETIC_SIZE, media)


def pose(action, swing, side):
    """Joints (n, 13, 2) of a figure at `swing` (n,) in 0..1 of its action, hips at (0, 0), y down.

    The figure is 1 high; angles are in radians from hanging down, outwards.
    """
    action = SYNTHETIC_ACTIONS[action]
    arm, forearm, thigh, shin = np.full((4, 2, len(swing)), 0.1)  # of the left and the right side
    arm[:] = 0.25
    forearm[:] = 0.2
    if action == "wave":  # one arm is up, its forearm swings
        arm[side] = 2.0
        forearm[side] = 2.3 + 1.4 * swing
    if action in ("flap", "jumping jack"):  # both arms go up and down
        arm[:] = 0.3 + 2.3 * swing
        forearm[:] = 0.3 + 2.5 * swing
    if action == "jumping jack":  # and the legs open and close
        thigh[:] = shin[:] = 0.05 + 0.5 * swing
    if action == "kick":  # one leg swings up sideways
        thigh[side] = 0.1 + 1.3 * swing
        shin[side] = 0.1 + 1.5 * swing
    limbs = [(1, 3, arm, 0.17), (3, 5, forearm, 0.17), (7, 9, thigh, 0.25), (9, 11, shin, 0.25)]
    joints = np.zeros((len(swing), 13, 2))
    joints[:, 0] = 0, -0.45
    for s, sign in enumerate((-1, 1)):  # odd joints are the viewer's left
        joints[:, 1 + s] = sign * 0.1, -0.32
        joints[:, 7 + s] = sign * 0.07, 0
        for start, end, angle, length in limbs:
            joints[:, end + s] = joints[:, start + s]
            joints[:, end + s, 0] += sign * length * np.sin(angle[s])
            joints[:, end + s, 1] += length * np.cos(angle[s])
    return joints


def draw_wall(wall, corner, size):
    """Frames (T, h, w, 3): 2.5 x 2.5 of the 5 x 5 colours, from a corner (T, 2), bilinear."""
    weights = []
    for start, n in zip(corner.T, size[::-1]):  # along x, along y
        place = start[:, None, None] + 2.5 * np.arange(n)[:, None] / n  # (T, n, 1)
        weights.append(np.maximum(0, 1 - abs(place - np.arange(5))))
    across, down = weights
    video = np.einsum("thj, twi, jic -> thwc", down, across, wall, optimize=True)
    return video.astype(np.float32)


def cover(joints, size):
    """The share (T, h, w) of each pixel that a figure covers: near its limbs, and in its head."""
    scale = np.float32(size[1] / SYNTHETIC_SIZE[1])
    y, x = np.indices(size, np.float32)
    pixels = np.stack([x, y])[:, None]  # (2, 1, h, w)
    points = joints.transpose(2, 1, 0)[..., None, None]  # (2, 13, T, 1, 1)
    nearest = np.sqrt(((pixels - points[:, 0]) ** 2).sum(0)) - 2.2 * scale  # the head is round
    for start, end in PENN_EDGES:
        limb = points[:, end] - points[:, start]
        place = pixels - points[:, start]
        along = (place * limb).sum(0) / ((limb**2).sum(0) + 1e-6)
        place = place - along.clip(0, 1) * limb  # from the nearest point of the limb
        nearest = np.minimum(nearest, np.sqrt((place**2).sum(0)))
    return (1.1 * scale + 0.5 - nearest).clip(0, 1)


# ---- All data sets ----
NTU_ROOTS = ["datasets/nturgb+d_rgb", "datasets/nturgb+d_skeletons"]
SOURCES = {  # the class, or where to import it from; its folders
    "synthetic": (Synthetic, []),
    "pennaction": (PennAction, ["datasets/Penn_Action"]),
    "ntu60-xsub": ("sources.ntu:NTU60XSub", NTU_ROOTS),
    "ntu60-xview": ("sources.ntu:NTU60XView", NTU_ROOTS),
    "ntu120-xsub": ("sources.ntu:NTU120XSub", NTU_ROOTS),
    "ntu120-xset": ("sources.ntu:NTU120XSet", NTU_ROOTS),
    "finegym": ("sources.pickles:FineGym", ["datasets/gym"]),
    "pyskl": ("sources.pickles:Pyskl", ["datasets/videos"]),
}


def add_flags(parser):
    add = parser.add_argument
    add("--data", choices=SOURCES, default="synthetic", help="data set [synthetic]")
    add("--root", nargs="+", type=Path, metavar="DIR", help="its folders [datasets/ARCHIVE]")
    add("--annotations", type=Path, metavar="PKL", help="pyskl: the pickle")
    add("--split-train", metavar="KEY", help="pyskl: the split to train on [train]")
    add("--split-val", metavar="KEY", help="pyskl: the split to test on [val]")
    add("--min-score", type=float, default=0, metavar="S", help="pyskl, finegym: joints above [0]")


def load(options) -> Source:
    """The source that the flags name; DataError if it is not there."""
    kind, roots = SOURCES[options.data]
    if isinstance(kind, str):
        kind = pkgutil.resolve_name(kind)
    flags = ("annotations", "split_train", "split_val", "min_score")
    given = {flag: getattr(options, flag) for flag in flags if getattr(options, flag)}
    for flag in given.keys() - inspect.signature(kind).parameters.keys():
        raise UsageError(f"--{flag.replace('_', '-')} is not for --data {options.data}")
    if options.root and not roots:
        raise UsageError("--root: the synthetic clips are drawn, there are no files")
    for root in options.root or []:
        if not root.is_dir():
            raise UsageError(f"--root: there is no folder {root}")
    folders = options.root or [Path(root) for root in roots]
    return kind(folders, **given) if roots else kind()


def load_whole(options, training=True, quiet=False) -> Source:
    """`load`; DataError if clips cannot be used, or there are none to train or test on."""
    source = load(options)
    if source.problems:
        what = f"{len(source.problems)} clips cannot be used, `python -m tools.check` names them"
        raise DataError("\n".join([what, *source.problems[:3]]))
    if source.missing and not quiet:
        what = f"{len(source.missing)} clips are left out, such as: {'; '.join(source.missing[:3])}"
        print(f"warning: {what}", file=sys.stderr)
    train, test = map(len, source.clips.values())
    if not test or (training and not train):
        raise DataError(f"{options.data} has {train} training and {test} test clips, needs some")
    return source


def match(source, classes, joint_names):
    """The source with a checkpoint's lists, which must begin with its own; else UsageError."""
    for what, known in (("classes", classes), ("joint_names", joint_names)):
        for i, name in enumerate(getattr(source, what)):
            if known[i : i + 1] != [name]:
                raise UsageError(f"{what} {i}: here {name!r}, in the checkpoint {known[i : i + 1]}")
        setattr(source, what, known)
    return source
