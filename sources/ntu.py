"""NTU RGB+D 60 and 120 (Shahroudy et al., CVPR 2016; Liu et al., TPAMI 2019)."""

import os
import re
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import LENGTHS_DIFFER, BadClip, Clip, DataError, reason
from sources.video import VIDEOS, VideoSource, find_files, video_length

NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
NTU_SIZE = (1080, 1920)  # of the colour camera, in whose pixels the joints are
NTU_JOINTS = [
    "spine base", "spine middle", "neck", "head", "left shoulder", "left elbow", "left wrist",
    "left hand", "right shoulder", "right elbow", "right wrist", "right hand", "left hip",
    "left knee", "left ankle", "left foot", "right hip", "right knee", "right ankle", "right foot",
    "spine top", "left hand tip", "left thumb", "right hand tip", "right thumb",
]  # fmt: skip
NTU_PAIRS = [
    (4, 8), (5, 9), (6, 10), (7, 11), (12, 16), (13, 17), (14, 18), (15, 19), (21, 23), (22, 24),
]  # fmt: skip
# Performers for training, cross-subject
NTU60_TRAIN = {1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38}
NTU120_TRAIN = NTU60_TRAIN | {
    45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89,
    91, 92, 93, 94, 95, 97, 98, 100, 103,
}  # fmt: skip
# Who is no person, by pyskl's ntu_preproc.py and CTR-GCN's get_raw_denoised_data.py
GHOST_FRAMES, GHOST_SPREAD, GHOST_SHARE = 11, 0.8, 0.7


class NTU(VideoSource):
    """*.skeleton and *_rgb.avi (or .mp4, with or without _rgb) anywhere below the roots.

    Two persons, R = 50. A subclass is a protocol: it says who is for training.
    """

    squeezed = True  # many re-encode the videos to 340 x 256

    def __init__(self, roots: list[Path]):
        classes = [f"A{action:03d}" for action in range(1, self.actions + 1)]
        joints = [f"{joint} {person}" for person in (1, 2) for joint in NTU_JOINTS]
        pairs = NTU_PAIRS + [(a + 25, b + 25) for a, b in NTU_PAIRS]
        super().__init__(classes, joints, pairs)
        skeletons, videos = find_files(roots, (".skeleton",)), find_files(roots, VIDEOS)
        names = sorted(filter(NTU_NAME.fullmatch, skeletons.keys() | videos.keys()))
        if not skeletons.keys() & names or not videos.keys() & names:
            where = f"{[*map(str, roots)]}: looked for S001C001P001R001A001.skeleton, .avi"
            get = "get it from rose1.ntu.edu.sg/dataset/actionRecognition, or pass --root"
            raise DataError(f"no NTU RGB+D in {where}; {get}")
        excluded = self.without_skeleton(roots)
        for name in names:
            setup, camera, performer, _, action = map(int, NTU_NAME.fullmatch(name).groups())
            if name in excluded or action > self.actions:
                continue
            if name not in skeletons or name not in videos:
                lacking = "skeleton" if name in videos else "video"
                self.missing.append(f"{name} has no {lacking}")
                continue
            split = "train" if self.is_training(setup, camera, performer) else "test"
            media = sorted(videos[name], key=os.path.getsize), skeletons[name][0]
            self.clips[split].append(Clip(name, action - 1, None, None, NTU_SIZE, media))

    def without_skeleton(self, roots: list[Path]) -> set[str]:
        """The samples that the authors' list leaves out, if it lies below the roots."""
        found = find_files(roots, ("samples_with_missing_skeletons.txt",))
        lists = [path for paths in found.values() for path in paths]
        number = "" if self.actions == 60 else "120"  # the list of NTU 120 holds that of NTU 60
        if not any(number in path.name for path in lists):
            what = f"no NTU_RGBD{number}_samples_with_missing_skeletons.txt"
            stay = "the samples that it would name stay in"
            print(f"warning: there is {what}: {stay}", file=sys.stderr)
        text = " ".join(path.read_text(errors="replace") for path in lists)
        return {match.group() for match in NTU_NAME.finditer(text)}

    def find_joints(self, clip: Clip) -> Clip:
        """With the joints of its skeleton, and the smallest of its videos that fits them."""
        videos, path = clip.media
        try:
            joints, visible = two_persons(*parse_skeleton(path.read_bytes()))
        except (OSError, ValueError, IndexError) as error:
            raise BadClip(f"{path}: {reason(error)}") from None
        video = videos[-1]
        for smaller in videos[:-1]:
            with suppress(BadClip):
                if abs(video_length(smaller) - len(joints)) <= LENGTHS_DIFFER * len(joints):
                    video = smaller
                    break
        return replace(clip, joints=joints, visible=visible, media=video)


class NTU60XSub(NTU):
    actions = 60

    def is_training(self, setup, camera, performer):
        return performer in NTU60_TRAIN


class NTU60XView(NTU):
    actions = 60

    def is_training(self, setup, camera, performer):
        return camera != 1


class NTU120XSub(NTU):
    actions = 120

    def is_training(self, setup, camera, performer):
        return performer in NTU120_TRAIN


class NTU120XSet(NTU):
    actions = 120

    def is_training(self, setup, camera, performer):
        return setup % 2 == 0


def parse_skeleton(text: bytes):
    """The frames of a .skeleton file, and the fields (25, 12) of each body by id and frame.

    Ids are near 2^56, where two could be equal as floats. The fields of a joint are x y z, depth
    x y, colour x y, a quaternion and its state: 0 not tracked, 1 inferred, 2 tracked.
    """
    lines, bodies = iter(text.splitlines()), defaultdict(dict)
    try:
        frames = int(next(lines))
        for frame in range(frames):
            for _ in range(int(next(lines))):
                identity = int(next(lines).split()[0])
                next(lines)  # the number of joints, which is always 25
                words = [next(lines).split() for _ in range(25)]
                fields = np.array(words, float).reshape(25, 12)
                place = fields[:, :3]  # metres
                place[~np.isfinite(place)] = 0
                if place.any():  # a body of zeros is nobody
                    bodies[identity].setdefault(frame, fields)  # an id twice in a frame: the first
    except StopIteration:
        raise ValueError("it breaks off") from None
    return frames, bodies


def two_persons(frames: int, bodies: dict):
    """Joints (frames, 50, 2) and visible (frames, 50) of the two persons who move most.

    A frame without a body keeps its row.
    """
    # Of each body, in order of appearance, its frames and its fields (frames, 25, 12)
    tracks = [([*track], np.stack([*track.values()])) for track in bodies.values()]
    persons = [track for track in tracks if is_person(*track)]
    persons = persons or tracks  # better a ghost than nobody
    persons.sort(key=lambda person: -person[1][..., :3].var(0).sum())
    joints = np.zeros((frames, 2, 25, 2), np.float32)
    visible = np.zeros((frames, 2, 25), bool)
    for slot, (when, fields) in enumerate(persons[:2]):
        colour = fields[..., 5:7]
        tracked = np.isin(fields[..., 11], (1, 2))
        inside = (colour >= 0) & (colour < NTU_SIZE[::-1])  # false for NaN
        joints[when, slot] = colour
        visible[when, slot] = tracked & inside.all(-1) & colour.any(-1)
    return joints.reshape(frames, 50, 2), visible.reshape(frames, 50)


def is_person(when, fields):
    """Whether a body is no ghost, such as a chair: it is seen for long and is seldom wide."""
    width, height, _ = np.ptp(fields[..., :3], axis=1).T  # (frames,) each
    wide = np.mean(width > GHOST_SPREAD * height)
    return len(when) > GHOST_FRAMES and wide < GHOST_SHARE
