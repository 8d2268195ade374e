"""Measure D3T on this machine: speed, memory, and what the time grows with.

    python -m tools.bench           # clips/s, memory, parts of a forward
    python -m tools.bench plain     # the same beside a plain version of the model
    python -m tools.bench scaling   # time of each part against frames, pixels and joints
    python -m tools.bench loader    # loading clips from JPEG

The default is the paper's size, with 13 and 50 joints. The model's flags are those of train.py.

Versions run in turns. A time is the median of the rounds after a warm-up round.
"""

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections import defaultdict, deque
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import d3t
import data
import train
from tools.common import make_parser, tool

CUDA = torch.cuda.is_available()
SWEEPS = {"frames": (8, 12, 16, 24), "resolution": (112, 160, 224), "joints": (13, 26, 50, 100)}
ATTENTIONS = ("deformable", "joint", "temporal")
PARTS = ("trunk", "pose tokens", "token search", *(f"{name} attention" for name in ATTENTIONS))
EPOCHS = 8  # of eight clips, loaded in a round
GIB = 2**30


# ---- How it is measured ----
def plain_msa(attention, *qkv):
    """`AttentionBlock.msa` with an explicit softmax."""
    q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in qkv)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return attention.Wo((weights @ v).transpose(1, 2).flatten(2))


def make_batch(s, clips, device):
    """A batch in the layout of `data.collate`."""
    video = torch.randint(256, (clips, s.frames, s.height, s.width, 3), dtype=torch.uint8)
    joints = torch.rand(clips, s.frames, s.joints, 2)
    batch = {"video": video.permute(0, 4, 1, 2, 3), "visible": joints[..., 0] < 0.9}
    batch["joints"] = joints * torch.tensor([s.width, s.height])
    batch["label"] = torch.arange(clips) % s.classes
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Version:
    """A model that is trained as in train.py, at a learning rate of zero, and its batch.

    "plain" is as one would write it first: float32, contiguous tensors, an explicit softmax, all
    tokens of the last block.
    """

    def __init__(self, s, options, amp="off", clips=1):
        self.options = argparse.Namespace(**vars(options) | {"amp": amp})
        model = self.model = train.make_model(s, train.Recipe(), options)
        self.optimizer = train.make_optimizer(model, train.Recipe(lr=0.0))
        self.batch = make_batch(s, clips, options.device)
        self.watching = False
        self.watch("trunk", model.trunk, "forward")
        self.watch("pose tokens", model, "pose_tokens")
        for block in model.blocks:
            if isinstance(block.deformable, d3t.DeformableAttention):
                search = block.deformable.search
                self.watch("token search", search, "forward")
                # Once trained, it reads between the tokens.
                torch.nn.init.normal_(search.offset.weight, std=0.02)
            for name in ATTENTIONS:
                self.watch(f"{name} attention", getattr(block, name), "forward")
        if amp == "plain":
            self.options.amp = "off"
            self.batch["video"] = self.batch["video"].contiguous()
            model.to(memory_format=torch.contiguous_format).blocks[-1].last = False
            for module in model.modules():
                if isinstance(module, d3t.AttentionBlock):
                    module.msa = partial(plain_msa, module)

    def watch(self, part, owner, name):
        """Add the seconds of a function to those of its part."""
        function = getattr(owner, name)

        def watched(*inputs):
            if not self.watching:
                return function(*inputs)
            begin = clock(self.options.device)
            out = function(*inputs)
            self.seconds[part] += clock(self.options.device) - begin
            return out

        setattr(owner, name, watched)

    def parts(self):
        """Seconds of each part of a forward, of the rest and of all of it."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.watching, begin = True, clock(self.options.device)
        self.forward()
        self.watching, whole = False, clock(self.options.device) - begin
        self.seconds["deformable attention"] -= self.seconds["token search"]  # called inside it
        return self.seconds | {"rest": whole - sum(self.seconds.values()), "all": whole}

    @torch.no_grad()
    def forward(self):
        self.model.eval()
        return train.forward(self.model, self.batch, self.options)[0]

    def step(self):
        """As in `train.train`, without a scaler."""
        self.model.train()
        F.cross_entropy(*train.forward(self.model, self.batch, self.options)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def clock(device):
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def take_turns(options, work):
    """Median seconds of functions by key, and of the parts that one returns by (key, part)."""
    found = defaultdict(list)
    for _ in range(1 + options.rounds):
        for key, function in work.items():
            begin = clock(options.device)
            parts = function()
            found[key].append(clock(options.device) - begin)
            for part in parts if isinstance(parts, dict) else ():
                found[key, part].append(parts[part])
    return {key: np.median(seconds[1:]) for key, seconds in found.items()}


def step_memory(s, options, amp, clips):
    """The most GiB of live tensors in a step, with weights, AdamW's averages and the batch."""
    gc.collect()  # with checkpoints, what a block computes again is in a reference cycle
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # keeps the profiler from printing
    on_cpu = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with nullcontext() if cuda else on_cpu as watched:
        version = Version(s, options, amp, clips)
        version.step()
        version.step()  # this one has the averages
    if cuda:
        return (torch.cuda.max_memory_allocated() - before) / GIB
    events = watched.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) / GIB


# ---- Sections ----
def row(name, cells, form="{}"):
    print(f"{name:36}" + "".join(f"{form.format(cell):>14}" for cell in cells), flush=True)


def table(s, options):
    """Time, rate and memory of forward and step in each type, and of the parts of a forward."""
    names, clips = options.amp, options.batch
    versions = {name: Version(s, options, name, clips) for name in names}
    work = {}
    for name, version in versions.items():
        work[name, "forward"], work[name, "step"] = version.forward, version.step
        work[name] = version.parts
    times = take_turns(options, work)
    row("", names)
    for kind in ("forward", "step", *PARTS, "rest"):
        took = [times[name, kind] for name in names]
        row(f"{kind}, ms a clip", [1e3 * seconds / clips for seconds in took], "{:.1f}")
        if kind in ("forward", "step"):
            row("  clips/s", [clips / seconds for seconds in took], "{:.3f}")
            row(f"  times as fast as {names[0]}", [took[0] / each for each in took], "{:.2f}")
    held = [step_memory(s, options, name, clips) for name in names]
    row("peak memory of the step, GiB", held, "{:.2f}")
    first, *_ = logits = [version.forward() for version in versions.values()]
    apart = [((each - first).abs().max() / first.abs().max()).item() for each in logits]
    row("difference of logits, of the largest", apart, "{:.1e}")


def plain(s, options):
    """`table` beside the plain version."""
    table(s, argparse.Namespace(**vars(options) | {"amp": ["plain", *options.amp]}))


def scaling(s, options):
    """Time of each part of a float32 forward, and the exponent by which it grows."""
    work = {}
    for axis, sizes in SWEEPS.items():
        for size in sizes:
            change = {"height": size, "width": size} if axis == "resolution" else {axis: size}
            work[axis, size] = Version(replace(s, **change), options).parts
    times = take_turns(options, work)
    for axis, sizes in SWEEPS.items():
        row(f"{axis}, ms", [*sizes, "exponent"])
        for part in (*PARTS, "all"):
            took = [times[(axis, size), part] for size in sizes]
            if all(took):  # not without a token search
                exponent = np.polyfit(np.log(sizes), np.log(took), 1)[0]
                row(f"  {part}", [*(1e3 * seconds for seconds in took), exponent], "{:.2f}")


def write_jpegs(root):
    """Eight synthetic clips as frames of 480 x 270, with noise for the bytes of a photograph."""
    image = data.need("PIL.Image", "pillow", "to write frames")
    source, size = data.synthetic(8, 1), (270, 480)
    noise = np.random.default_rng(0).normal(0, 10, (16, *size, 3))
    for clip in source.clips["train"]:
        video = source.read(clip, np.arange(16), size, (slice(0, 270), slice(0, 480))).video
        clip.media, clip.size = root / clip.name, size
        clip.media.mkdir()
        for t, frame in enumerate((video + noise).clip(0, 255).astype(np.uint8)):
            image.fromarray(frame).save(clip.media / f"{t + 1:06d}.jpg")
    source.read = partial(data.PennAction.read, source)
    return source


def loader(s, options):
    """Loading clips from JPEG, in training."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_jpegs(Path(folder))
        clips = data.Dataset(source, "train", s.frames, s.height, s.width)
        batches = [[(epoch, i) for i in range(len(clips))] for epoch in range(EPOCHS)]
        loads = train.load_batches(clips, batches, options)
        times = take_turns(options, {"": partial(deque, loads, maxlen=0)})  # keeps none
    name = f"{s.frames} frames of a JPEG clip, clips/s"
    row(name, [EPOCHS * len(clips) / times[""]], "{:.1f}")


# ---- Command line ----
SECTIONS = {f.__name__: f for f in (table, plain, scaling, loader)}


def parse_args(words):
    """Options, with those of train.py, and the settings for each number of joints."""
    parser = make_parser("tools.bench", __doc__)
    number, types = train.number(int), [*train.AMP][: 2 + CUDA]
    add = parser.add_argument
    add("what", choices=[*SECTIONS, "all"], help="[table]")
    add("--joints", type=number, nargs="+", default=[13, 50], help="R [13 50]")
    add("--batch", type=number, default=8 if CUDA else 1, help="clips of a step [1; CUDA 8]")
    add("--amp", nargs="+", choices=train.AMP, default=types, help="[off bf16; CUDA and fp16]")
    add("--rounds", type=number, default=5, help="of each measurement [5]")
    words = sys.argv[1:] if words is None else words
    named = words and not words[0].startswith("-")
    options, rest = parser.parse_known_args(words if named else ["table", *words])
    known, given = train.parse_args(["--preset", "paper", "--workers", "2", *rest])
    options = argparse.Namespace(**vars(known) | vars(options))
    return options, [train.make(d3t.Ablation, given | {"joints": R}) for R in options.joints]


@tool("tools.bench")
def main(words=None):
    options, several = parse_args(words)
    train.keep_memory()
    # In training, convolutions may use TF32.
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    for s, (title, section) in itertools.product(several, SECTIONS.items()):
        if options.what in (title, "all"):
            size = f"T={s.frames} {s.height}x{s.width} C={s.channels} L={s.blocks} R={s.joints}"
            how = f"batch {options.batch}, {options.rounds} rounds"
            print(f"\n{title}: {size}, {how}, {name}, torch {torch.__version__}")
            section(s, options)


if __name__ == "__main__":
    sys.exit(main())
