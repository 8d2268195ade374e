"""Video files, found by name and read frame by frame."""

import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from data import BadClip, Crop, Frames, Size, Source, need, reason

av = need("av", "av", "to read videos")

VIDEOS = (".avi", ".mp4", ".mkv", ".webm", ".mov")
# What a damaged file raises: the decoder's errors, tags that are no text, and our own below.
DAMAGE = (av.FFmpegError, ValueError)


def clip_key(name: str) -> str:
    """A name without `.mp4` and the like, `_rgb`, and the _E_ and _A_ of FineGYM."""
    name = str(PurePosixPath(name))  # without "./" and "//"
    if name.lower().endswith(VIDEOS):
        name = name[: name.rindex(".")]
    return re.sub(r"_E_(\d+_\d+)_A_(\d+_\d+)$", r"_\1_\2", name.removesuffix("_rgb"))


def find_files(roots: list[Path], endings: tuple) -> dict[str, list[Path]]:
    """Files below the roots by `clip_key`: that of their name, and that of their path."""
    found = defaultdict(list)
    for root in roots:
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            for file in sorted(files):
                path = Path(folder, file)
                if file.lower().endswith(endings):
                    below = str(path.relative_to(root).with_suffix(""))
                    for key in {clip_key(path.stem), clip_key(below)}:
                        found[key].append(path)
    return dict(found)


def packets(path: Path):
    """The packets of the first video in a file; ValueError if it breaks off."""
    # Without "file:", a colon in the name would make a protocol of it.
    with av.open(f"file:{path}") as container:
        cover = av.stream.Disposition.attached_pic  # a picture that a player shows for the file
        streams = [each for each in container.streams.video if not each.disposition & cover]
        if not streams or not streams[0].codec_context:
            raise ValueError("no video in it")
        # On one thread, because a loader already has several processes.
        streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
        for packet in container.demux(streams[0]):
            if packet.is_corrupt:
                raise ValueError("it breaks off")
            yield packet


def video_length(path: Path) -> int:
    """Packets of a video: a first guess of its frames, not all of which a decoder shows."""
    try:
        return sum(bool(packet.size) and not packet.is_discard for packet in packets(path))
    except DAMAGE as error:
        raise BadClip(f"{path}: {reason(error)}") from None


def read_video(path: Path, frames: np.ndarray, size: Size, crop: Crop) -> Frames:
    """A crop of frames of a video by number, scaled to `size`; BadClip for a file that breaks off.

    Frames are counted as the decoder puts them out, from the first: NTU's AVI files have one key
    frame and wrong time stamps, so seeking gains nothing and time stamps name the wrong frame.
    """
    shape = [edge.stop - edge.start for edge in crop]
    video = np.empty((len(frames), *shape, 3), np.uint8)
    n, shown = 0, None
    scaler = av.video.reformatter.VideoReformatter()  # one for all, because it is slow to set up
    try:
        for packet in packets(path):
            for picture in packet.decode():
                if n in frames:
                    whole, shown = read_upright(scaler, picture, size)
                    video[frames == n] = whole[crop]
                n += 1
    except DAMAGE as error:
        raise BadClip(f"{path}: {reason(error)}") from None
    if not n:
        raise BadClip(f"{path}: no frame in it")
    return Frames(video[frames < n], n, shown)


def read_upright(scaler, picture, size: Size):
    """A frame scaled to `size`, and its own size, as it is shown."""
    turns = round(picture.rotation / 90)  # to the left: a phone may store its videos on their side
    order = -1 if turns % 2 else 1
    height, width = size[::order]
    shown = (picture.height, picture.width)[::order]
    picture = scaler.reformat(picture, width, height, "rgb24", interpolation="BILINEAR")
    return np.rot90(picture.to_ndarray(), turns), shown


class VideoSource(Source):
    """Its clips have the path of a video file as their media."""

    def read(self, clip, frames, size, crop):
        return read_video(clip.media, frames, size, crop)

    def length(self, clip):
        return video_length(clip.media)
