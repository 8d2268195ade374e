"""Check a data set: clips by class and split, frames, visible joints, every problem by name.

python -m tools.check --data pennaction --root DIR

The status is 1 if there is a problem, 2 if a flag is wrong.
"""

import sys
from collections import Counter
from functools import partial

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import train
from tools.common import make_parser, tool


def read_clip(source, clip):
    """Read every frame of a clip: their number, the visible joints in them, and what is wrong."""
    crop = slice(0, 16), slice(0, 16)
    try:
        clip = source.find_joints(clip)
        _, _, visible = data.read_clip(source, clip, np.arange, (16, 16), crop)
        return len(visible), int(visible.sum()), ""
    except data.BadClip as error:
        return 0, 0, str(error)


def check(source, workers):
    """Print what is in the data set and what is wrong with it; returns the exit status."""
    line = "{:24}{:>8}{:>8}".format
    print(line("class", "train", "test"))
    counts = [Counter(clip.label for clip in part) for part in source.clips.values()]
    for label, name in enumerate(source.classes):
        print(line(name, *(count[label] for count in counts)))
    print(line("all", *(count.total() for count in counts)))

    clips = sum(source.clips.values(), [])
    how = {"batch_size": None, "collate_fn": partial(read_clip, source), "num_workers": workers}
    found = list(tqdm(DataLoader(clips, **how), "reading", unit="clip", disable=None))
    frames = sum(n for n, _, _ in found)
    joints = len(source.joint_names)
    share = sum(seen for _, seen, _ in found) / max(1, frames * joints)
    unseen = [clip.name for clip, (n, seen, _) in zip(clips, found) if n and not seen]
    problems = source.problems + [problem for _, _, problem in found if problem]
    print(f"{frames} frames, {joints} joints, {share:.1%} of them visible")
    print(f"clips without a visible joint: {', '.join(unseen) or 'none'}")
    said = f"{len(source.missing)} left out, {len(problems)} problems"
    print(*source.missing, *problems, said, sep="\n")
    return int(bool(problems) or not clips)


@tool("tools.check", bad_data=1)
def main(words=None):
    parser = make_parser("tools.check", __doc__)
    data.add_flags(parser)
    count = train.number(int, zero=True)
    parser.add_argument("--workers", type=count, default=2, help="that read frames [2]")
    options = parser.parse_args(words)
    return check(data.load(options), options.workers)


if __name__ == "__main__":
    sys.exit(main())
