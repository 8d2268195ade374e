"""Pickles in the form of pyskl (Duan et al., CVPR 2022), FineGYM's too (Shao et al., CVPR 2020).

A pickle holds `split`, lists of names by key, and `annotations`, a list of dicts with

    frame_dir or filename     the name of a video
    label, img_shape          int; (height, width) of the frames that the joints refer to
    keypoint, keypoint_score  (M, n, K, 2 or 3), pixels of M persons and K joints; (M, n, K)

It may hold `label_names`, and `joint_names` with `flip_pairs`; otherwise joints are those of COCO.
"""

import pickle
from pathlib import Path

import numpy as np

from data import LIMBS, SIDES, Clip, DataError, UsageError, reason
from sources.video import VIDEOS, VideoSource, clip_key, find_files

COCO_JOINTS = ["nose", *(f"{side} {part}" for part in ("eye", "ear", *LIMBS) for side in SIDES)]
COCO_PAIRS = [(i, i + 1) for i in range(1, 17, 2)]

ALLOWED = {  # of numpy 1 and 2, and plain containers
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("bytes", "list", "set"),
    "__builtin__": ("bytes", "list", "set"),  # in protocols below 3
    "_codecs": ("encode",),  # with which they write bytes
}
KINDS = {b"\x1f": "gzipped", b"{": "JSON", b"[": "JSON"}  # by the first byte
# What a pickle raises that is damaged or of another form
DAMAGE = (
    OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Reads plain containers, numbers, strings, arrays; refuses all else, which may run code."""

    def find_class(self, module: str, name: str):
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no data set needs")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict:
    """What a pickle holds; one of DAMAGE if it holds no dict."""
    with path.open("rb") as file:
        first = file.peek(1)[:1]
        if first in KINDS:
            raise ValueError(f"it is {KINDS[first]}")
        content = Unpickler(file).load()
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
    return content


def list_entries(content: dict, splits: list[str]):
    """{clip key: (name, entry)} of all annotations, and the keys of each split."""
    entries = {}
    for entry in content["annotations"]:
        name = str(entry.get("filename") or entry["frame_dir"])
        if clip_key(name) in entries:
            raise ValueError(f"two of its entries have one name, {name}")
        entries[clip_key(name)] = name, entry
    listed = content["split"]
    if not {*splits} <= listed.keys():
        raise ValueError(f"it has no {' or '.join(splits)}; its splits are {[*listed]}")
    keys = [{clip_key(name) for name in listed[split]} for split in splits]
    both = set.intersection(*keys)
    if both:
        raise ValueError(f"clips are for training and test alike, such as {min(both)}")
    return entries, keys


def list_joints(content: dict):
    """The names of joints, and the pairs that trade places in a mirror."""
    if "joint_names" not in content:
        return [*COCO_JOINTS], [*COCO_PAIRS]
    names = [str(name) for name in content["joint_names"]]  # a checkpoint refuses those of numpy
    pairs = [(int(a), int(b)) for a, b in content["flip_pairs"]]
    if not {joint for pair in pairs for joint in pair} <= {*range(len(names))}:
        raise ValueError(f"flip_pairs {pairs}: expected numbers of the {len(names)} joints")
    return names, pairs


class Pyskl(VideoSource):
    """A pickle and its videos: ROOT/FOLDER/NAME.mp4, or NAME.mp4 anywhere below a root."""

    spread = True

    def __init__(
        self, roots, annotations=None, split_train="train", split_val="val", min_score=0.0
    ):
        if not annotations:
            raise UsageError("--data pyskl needs --annotations PKL")
        try:
            content = read_pickle(annotations)
            entries, (train, test) = list_entries(content, [split_train, split_val])
            super().__init__([*map(str, content.get("label_names", []))], *list_joints(content))
        except DAMAGE as error:
            what = f"expected a pickle {{split, annotations}}: {reason(error)}"
            raise DataError(f"{annotations}: {what}") from None
        videos = find_files(roots, VIDEOS)
        k, labels, persons = len(self.joint_names), 0, 1
        most = len(self.classes) or 10_000  # all numbers below the largest label are classes
        wanted = train | test
        for key, (name, entry) in entries.items():
            if key not in wanted:
                continue
            try:
                clip = pyskl_clip(name, entry, k, most, min_score)
            except (KeyError, TypeError, ValueError) as error:
                self.problems.append(f"{annotations}, {name}: {reason(error)}")
                continue
            labels = max(labels, clip.label + 1)
            if key not in videos:
                self.missing.append(f"{name} has no video")
                continue
            clip.media, *others = videos[key]
            if others:
                both = f"{clip.media} and {others[0]}"
                self.problems.append(f"{both} have one name: leave one of them there")
            persons = max(persons, clip.joints.shape[1] // k)
            self.clips["train" if key in train else "test"].append(clip)
        for key in sorted(wanted - entries.keys()):
            self.missing.append(f"{key} has no annotation in {annotations}")
        if not any(self.clips.values()):
            why = [*self.problems, *self.missing, "none named"][0]
            raise DataError(f"{annotations}: no clip can be used: {why}")
        self.classes = self.classes or [str(label) for label in range(labels)]
        if persons == 2:
            self.joint_names += [f"{name} 2" for name in self.joint_names]
            self.flip_pairs += [(a + k, b + k) for a, b in self.flip_pairs]


def pyskl_clip(name: str, entry: dict, k: int, classes: int, min_score: float):
    """The clip of an entry, without its video; up to two persons."""
    joints, visible = as_joints(entry["keypoint"], entry.get("keypoint_score"), min_score)
    n, _, joint_count, _ = joints.shape
    if joint_count != k:
        what = f"{joint_count} joints, expected {k}: those of joint_names, or of COCO"
        raise ValueError(f"keypoint has {what}")
    label = int(entry["label"])
    if label != entry["label"] or not 0 <= label < classes:
        what = f"{entry['label']!r}, expected a whole number below {classes}"
        raise ValueError(f"label {what}")
    height, width = map(int, entry["img_shape"])
    joints = joints[:, :2].reshape(n, -1, 2)
    visible = visible[:, :2].reshape(n, -1)
    return Clip(name, label, joints, visible, (height, width), None)


def as_joints(keypoint, score, min_score=0.0):
    """Joints (n, M, K, 2) and visible (n, M, K) of `keypoint` and `keypoint_score`; or ValueError.

    A joint that was not found lies at (0, 0), or has a score of 0 or NaN.
    """
    keypoint = np.asarray(keypoint, np.float32)  # float16 in the files, which scales badly
    if keypoint.ndim != 4 or not keypoint.shape[1] or keypoint.shape[3] not in (2, 3):
        what = "expected (persons, frames, joints, 2 or 3)"  # of persons, there may be none
        raise ValueError(f"keypoint is {keypoint.shape}, {what}")
    if score is None:
        score = keypoint[..., 2] if keypoint.shape[3] == 3 else np.ones(keypoint.shape[:3])
    keypoint = keypoint[..., :2]
    score = np.asarray(score, np.float32)
    if score.shape != keypoint.shape[:3]:
        raise ValueError(f"keypoint_score is {score.shape}, expected {keypoint.shape[:3]}")
    visible = (score > min_score) & keypoint.any(-1)
    known = keypoint[visible]
    if known.size and not ((known < 0) | (known > 1)).any():
        raise ValueError("all its joints lie within 0..1, expected pixels")
    return keypoint.swapaxes(0, 1), visible.swapaxes(0, 1)


class FineGym(Pyskl):
    """ROOT/gym_hrnet.pkl of pyskl, or gym_2d.pkl of mmaction2, and ROOT/subactions/NAME.mp4."""

    def __init__(self, roots: list[Path], min_score: float = 0.0):
        path, other = roots[0] / "gym_hrnet.pkl", roots[0] / "gym_2d.pkl"
        if other.exists() and not path.exists():
            path = other
        super().__init__(roots, path, min_score=min_score)
