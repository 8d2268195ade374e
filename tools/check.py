"""Check a data set: clips by class and split, frames, visible joints, every problem and every missing clip by name.

python -m tools.check --data pennaction --root DIR    # status 1 if there is a problem, 2 if a flag is wrong
"""

import argparse
import sys
from collections import Counter
from functools import partial

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from tools.common import tool


def read_clip(source: data.Source, clip: data.Clip) -> tuple[int, int, str]:
    """Read every frame of a clip; returns its frames, its visible joints and its problem, "" if there is none."""
    try:
        crop = slice(0, 16), slice(0, 16)
        _, _, visible = data.read_clip(source, source.annotate(clip), np.arange, (16, 16), crop)
        return len(visible), int(visible.sum()), ""
    except data.BadClip as error:
        return 0, 0, str(error)


def check(source: data.Source, workers: int) -> int:
    """Print what is in the data set and all that is wrong with it; returns the exit status."""
    clips = source.clips["train"] + source.clips["test"]
    train, test = (Counter(clip.label for clip in part) for part in (source.clips["train"], source.clips["test"]))
    rows = [(name, train[label], test[label]) for label, name in enumerate(source.classes)]
    for row in [("class", "train", "test"), *rows, ("all", train.total(), test.total())]:
        print("{:24}{:>8}{:>8}".format(*row))

    loader = DataLoader(clips, batch_size=None, collate_fn=partial(read_clip, source), num_workers=workers)
    found = list(tqdm(loader, desc="reading", unit="clip", disable=None))
    frames, visible = sum(n for n, _, _ in found), sum(seen for _, seen, _ in found)
    unseen = [clip.name for clip, (n, seen, _) in zip(clips, found) if n and not seen]
    problems = source.problems + [problem for _, _, problem in found if problem]
    share = visible / max(1, frames * len(source.joint_names))
    print(f"{frames} frames, {len(source.joint_names)} joints, {share:.1%} of them visible")
    print(f"clips without a visible joint: {', '.join(unseen) or 'none'}")
    print(*source.missing, *problems, f"{len(source.missing)} left out, {len(problems)} problems", sep="\n")
    return int(bool(problems) or not clips)


@tool("tools.check", bad_data=1)
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_flags(parser)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read frames [2]")
    options = parser.parse_args(words)
    if options.workers < 0:
        raise data.UsageError("--workers must be 0 or more")
    return check(data.load(options), options.workers)


if __name__ == "__main__":
    sys.exit(main())
