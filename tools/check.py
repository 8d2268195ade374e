"""Check a data set: clips by class and split, frames, visible joints, every problem and every missing clip by name.

python -m tools.check --data pennaction --root DIR    # status 1 if there is a problem, 2 if a flag is wrong
"""

import argparse
import functools
import sys

import numpy as np
import torch
from tqdm import tqdm

import data


def read_clip(source: data.Source, clip: data.Clip) -> tuple[int, int, str]:
    """Read every frame of a clip; returns its frames, its visible joints and its problem, "" if there is none."""
    frames = visible = 0
    try:
        clip = source.annotate(clip)
        frames, visible = len(clip.joints), int(clip.visible.sum())
        source.read(clip.media, np.arange(frames), (16, 16), (slice(0, 16), slice(0, 16)))
        return frames, visible, ""
    except data.BadClip as error:
        return frames, visible, str(error)


def check(source: data.Source, workers: int) -> int:
    """Print what is in the data set and all that is wrong with it; returns the exit status."""
    train, test = source.clips["train"], source.clips["test"]
    print(f"{'class':24}{'train':>8}{'test':>8}")
    for label, name in enumerate(source.classes):
        print(f"{name:24}{sum(clip.label == label for clip in train):8}{sum(clip.label == label for clip in test):8}")
    print(f"{'all':24}{len(train):8}{len(test):8}")

    clips, problems, unseen, frames, visible = train + test, source.problems, [], 0, 0
    read = functools.partial(read_clip, source)
    loader = torch.utils.data.DataLoader(clips, batch_size=None, collate_fn=read, num_workers=workers)
    for clip, (n, seen, problem) in zip(clips, tqdm(loader, desc="reading", unit="clip", disable=None)):
        frames, visible = frames + n, visible + seen
        unseen += [clip.name] if n and not seen else []
        problems += [problem] if problem else []
    joints = frames * len(source.joint_names)
    print(f"{frames} frames, {len(source.joint_names)} joints, {visible / max(1, joints):.1%} of them visible")
    print(f"clips without a visible joint: {', '.join(unseen) or 'none'}")
    print(*source.missing, *problems, f"{len(source.missing)} left out, {len(problems)} problems", sep="\n")
    return int(bool(problems) or not clips)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_flags(parser)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read frames [2]")
    options = parser.parse_args(words)
    if options.workers < 0:
        parser.error("--workers must be 0 or more")
    sys.stdout.reconfigure(errors="backslashreplace")  # names may hold characters that the terminal cannot show
    try:
        return check(data.load(options), options.workers)
    except (data.DataError, data.UsageError) as error:
        print(f"tools.check: {error}", file=sys.stderr)
        return 2 if isinstance(error, data.UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
