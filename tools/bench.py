"""Measure D3T on this machine: speed, memory, and what the time grows with.

    python -m tools.bench             # clips/s and memory of forward and step, the parts of a forward
    python -m tools.bench plain       # the same beside a plain version of the model
    python -m tools.bench memory      # memory of a step beside the plain version, clips that fit in 32 GiB
    python -m tools.bench scaling     # time of each part against frames, resolution and joints, with a plot
    python -m tools.bench loader      # loading clips from JPEG against bare decoding
    python -m tools.bench variants    # layouts, compilation and batches (for CUDA)
    python -m tools.bench all --joints 13

The default is the paper's size, with the joints of Penn Action (13) and with those of two persons in NTU (50).

Versions run in turns, A B A B, in one process. A time is the median of the rounds, after one round that only warms up.
Operations are those of a forward, two for each multiplication; a step counts as three forwards. Their rate is compared
with a product of two matrices in the same rounds and type. Memory is the largest sum of live tensors.
"""

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import d3t
import data
import train
from d3t import Settings
from tools.common import tool

CUDA = torch.cuda.is_available()
TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWEEPS = {"frames": (8, 12, 16, 24, 32), "resolution": (112, 160, 224, 288), "joints": (13, 26, 50, 100)}
ATTENTIONS = ("deformable", "joint", "temporal")
PARTS = ("trunk", "joint tokenizer", "token search", *(f"{name} attention" for name in ATTENTIONS))
GIB = 2**30


# ---- How it is measured --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Version:
    settings: Settings
    amp: str = "off"
    plain: bool = False  # without fused attention, all tokens of the last block
    channels_last: bool = True
    compiled: bool = False
    checkpoints: bool = False


def plain_msa(self, X: Tensor, X_: Tensor) -> Tensor:
    """`AttentionBlock.msa` with an explicit softmax, one window after the other."""
    heads = zip(self.split(self.Wq(X)), self.split(self.Wk(X_)), self.split(self.Wv(X_)))
    out = [(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in heads]
    return self.Wo(torch.stack(out).transpose(1, 2).flatten(2))


class Run:
    """A model that is trained as train.py does, with a learning rate of zero, so that its weights stay the same."""

    def __init__(self, version: Version, device: torch.device):
        self.version, self.device = version, device
        options = argparse.Namespace(device=device, checkpointing=version.checkpoints)
        self.model = train.make_model(version.settings, train.Recipe(), options)
        if not version.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
        for module in self.model.modules():
            if isinstance(module, d3t.TokenSearch):  # the points of a trained search lie between the tokens
                torch.nn.init.normal_(module.offset.weight, std=0.02)
            if isinstance(module, d3t.AttentionBlock) and version.plain:
                module.msa = partial(plain_msa, module)
            if isinstance(module, d3t.Block) and version.plain:
                module.queries = None
        self.net = torch.compile(self.model, dynamic=False) if version.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=version.amp == "fp16")

    def logits(self, batch: list[Tensor]) -> Tensor:
        video, joints, visible, _ = batch
        video = video if self.version.channels_last else video.contiguous()
        with torch.autocast(self.device.type, TYPES[self.version.amp], enabled=self.version.amp != "off"):
            return self.net(video, joints, visible).float()

    @torch.no_grad()
    def forward(self, batch: list[Tensor]) -> Tensor:
        self.net.eval()
        return self.logits(batch)

    def step(self, batch: list[Tensor]):
        """As in train.train_one_epoch."""
        self.net.train()
        self.scaler.scale(F.cross_entropy(self.logits(batch), batch[3])).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def make_batch(s: Settings, clips: int, device: torch.device) -> list[Tensor]:
    """Video, joints, visible and label; the video in the layout of `data.collate`."""
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (clips, s.frames, s.height, s.width, 3), dtype=np.uint8).transpose(0, 4, 1, 2, 3)
    joints = random.random((clips, s.frames, s.joints, 2), dtype=np.float32) * np.float32([s.width, s.height])
    batch = video, joints, random.random(joints.shape[:3]) < 0.9, np.arange(clips) % s.classes
    return [torch.from_numpy(array).to(device) for array in batch]


def clock(device: torch.device) -> float:
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def take_turns(options: argparse.Namespace, work: dict[object, dict[str, Callable]]) -> dict[tuple, float]:
    """Median seconds by (version, name) of the functions of each version; in a round each function is called once.

    A function may return a dict of seconds by name, which are added.
    """
    found = defaultdict(list)
    for _ in range(1 + options.rounds):
        for version, functions in work.items():
            for name, function in functions.items():
                begin = clock(options.device)
                returned = function()
                seconds = clock(options.device) - begin
                parts = returned if isinstance(returned, dict) else {}
                for part, value in {name: seconds, **parts}.items():
                    found[version, part].append(value)
    return {key: np.median(values[1:]) for key, values in found.items()}


def by_part(run: Run, batch: list[Tensor], meter: Callable) -> dict[str, float]:
    """What `meter` gains in each part of a forward, in the rest and in all of it."""
    gained = defaultdict(float)

    def metered(name, function):
        def call(*args, **kwargs):
            gained[name] -= meter()
            out = function(*args, **kwargs)
            gained[name] += meter()
            return out

        return call

    parts = [("trunk", run.model.trunk, "forward"), ("joint tokenizer", d3t, "joint_tokens")]
    for block in run.model.blocks:
        parts += [("token search", block.deformable and block.deformable.search, "forward")]
        parts += [(f"{name} attention", getattr(block, name), "forward") for name in ATTENTIONS]
    with ExitStack() as stack:
        for name, owner, call in parts:
            if owner is not None:  # a disabled attention
                stack.enter_context(mock.patch.object(owner, call, metered(name, getattr(owner, call))))
        metered("all", run.forward)(batch)
    gained["deformable attention"] -= gained["token search"]  # which is called inside it
    gained["rest"] = 2 * gained["all"] - sum(gained.values())
    return {name: gained[name] for name in (*PARTS, "rest", "all")}


def operations(s: Settings, clips: int, device: torch.device) -> dict[str, float]:
    """Operations of a forward by part: products of matrices, convolutions, attention; no trilinear sampling."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter lacks
    run = Run(Version(s), device)
    run.model.requires_grad_(False)  # the counter fails on views of parameters where no gradient is recorded
    lacking = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        return by_part(run, make_batch(s, clips, device), counter.get_total_flops)


@cache
def step_memory(version: Version, clips: int, device: torch.device) -> int:
    """The most bytes of live tensors in a training step, with the weights, AdamW's averages and the batch."""

    def two_steps():  # the second one has the averages
        run, batch = Run(version, device), make_batch(version.settings, clips, device)
        run.step(batch)
        run.step(batch)

    gc.collect()  # with checkpoints, what a block computes again is in a reference cycle
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        two_steps()
        return torch.cuda.max_memory_allocated() - before
    os.environ["KINETO_LOG_LEVEL"] = "99"  # keeps the profiler from printing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        two_steps()
    events = watched.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def row(name: str, *cells, form: str = "{}"):
    print(f"{name:36}" + "".join(f"{form.format(cell):>16}" for cell in cells), flush=True)


# ---- Sections ------------------------------------------------------------------------------------------------------
def speed(versions: dict[str, Version], clips: int, options: argparse.Namespace, parts: bool = False):
    """Print time, rate and memory of forward and step of each version, and of the parts of a forward."""
    device, (first, *_), work = options.device, versions, {}
    batch = make_batch(versions[first].settings, clips, device)
    for name, version in versions.items():
        run, matrices = Run(version, device), torch.randn(2, options.matrix, options.matrix, device=device)
        product = partial(torch.mm, *matrices.to(TYPES[version.amp]))
        work[name] = {"product": product, "forward": partial(run.forward, batch), "step": partial(run.step, batch)}
        work[name] |= {"all": partial(by_part, run, batch, partial(clock, device))} if parts else {}
    times = take_turns(options, work)
    counts = {part: n for part, n in operations(versions[first].settings, clips, device).items() if n}
    rates = [options.product / times[name, "product"] for name in versions]
    row("", *versions)
    row("product of matrices, TFLOP/s", *(rate / 1e12 for rate in rates), form="{:.2f}")
    whole = counts.pop("all")
    for kind, count in {"forward": whole, "step": 3 * whole, **(counts if parts else {})}.items():
        took = [times[name, kind] for name in versions]
        row(f"{kind}, ms a clip", *(1e3 * t / clips for t in took), form="{:.1f}")
        if kind in ("forward", "step"):
            row("  clips/s", *(clips / t for t in took), form="{:.3f}")
            row(f"  times as fast as {first}", *(took[0] / t for t in took), form="{:.2f}")
        of_product = [count / t / rate for t, rate in zip(took, rates)]
        row(f"  {count / clips / 1e9:.2f} GFLOP, of product", *of_product, form="{:.1%}")
    held = [step_memory(version, clips, device) / GIB for version in versions.values()]
    row("peak memory of the step, GiB", *held, form="{:.2f}")


def table(s: Settings, options: argparse.Namespace):
    """Speed and memory of each type, with the parts of a forward."""
    speed({amp: Version(s, amp) for amp in options.amp}, options.batch, options, parts=True)


def plain(s: Settings, options: argparse.Namespace):
    """Speed, memory and logits of each type beside the plain version in float32."""
    versions = {"plain": Version(s, plain=True, channels_last=False)} | {amp: Version(s, amp) for amp in options.amp}
    speed(versions, options.batch, options)
    batch = make_batch(s, options.batch, options.device)
    first, *_ = logits = [Run(version, options.device).forward(batch) for version in versions.values()]
    apart = [((other - first).abs().max() / first.abs().max()).item() for other in logits]
    row("difference of logits, of the largest", *apart, form="{:.1e}")


def memory(s: Settings, options: argparse.Namespace):
    """Memory of a step, and the clips that fit in the 32 GiB of the paper's V100, from batches of 1 and 2."""
    versions = {"plain": Version(s, plain=True, channels_last=False)} | {amp: Version(s, amp) for amp in options.amp}
    row("", *versions)
    for checkpoints in (False, True):
        ways = [replace(version, checkpoints=checkpoints) for version in versions.values()]
        one, two = ([step_memory(way, clips, options.device) / GIB for way in ways] for clips in (1, 2))
        row(f"one clip{', --checkpointing' * checkpoints}, GiB", *one, form="{:.2f}")
        row("  each further clip, GiB", *(b - a for a, b in zip(one, two)), form="{:.2f}")
        row("  clips in 32 GiB", *(max(0, 1 + int((32 - a) / (b - a))) for a, b in zip(one, two)))


def variants(s: Settings, options: argparse.Namespace):
    """Layouts, and with --compile compilation, for each batch and type."""
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # each variant is compiled for itself
    for clips, amp in itertools.product(options.batches or [options.batch], options.amp):
        print(f"{clips} clips, {amp}")
        versions = {"channels last": Version(s, amp), "channels first": Version(s, amp, channels_last=False)}
        versions |= {"compiled": Version(s, amp, compiled=True)} if options.compile else {}
        try:
            speed(versions, clips, options)
        except torch.OutOfMemoryError:
            print("  out of memory")


def scaling(s: Settings, options: argparse.Namespace):
    """Time of each part of a float32 forward against frames, resolution and joints, beside its operations."""
    plots = data.need("matplotlib.figure", "matplotlib", "to draw the plot")
    device, work, flops = options.device, {}, {}
    for axis, size in ((axis, size) for axis, sizes in SWEEPS.items() for size in sizes):
        changed = replace(s, **({"height": size, "width": size} if axis == "resolution" else {axis: size}))
        run, batch = Run(Version(changed), device), make_batch(changed, 1, device)
        work[axis, size] = {"all": partial(by_part, run, batch, partial(clock, device))}
        flops |= {((axis, size), part): count for part, count in operations(changed, 1, device).items()}
    times = take_turns(options, work)

    figure = plots.Figure(figsize=(14, 4.4), layout="constrained")
    row("time ~ size ^ exponent", "measured", "operations")
    for plot, (axis, sizes) in zip(figure.subplots(1, len(SWEEPS)), SWEEPS.items()):
        print(f"  {axis} {', '.join(map(str, sizes))}")
        for part in PARTS[1:]:
            took, count = (np.array([cost[(axis, size), part] for size in sizes]) for cost in (times, flops))
            if count.all():  # not a disabled attention
                exponents = [np.polyfit(np.log(sizes), np.log(cost), 1)[0] for cost in (took, count)]
                row(f"    {part}", *exponents, form="{:.2f}")
                (line,) = plot.plot(sizes, 1e3 * took, "o-", label="{}: {:.2f} ({:.2f})".format(part, *exponents))
                scaled = count * np.exp(np.log(took / count).mean())  # to the same mean as the times
                plot.plot(sizes, 1e3 * scaled, "--", c=line.get_color(), alpha=0.6)
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms", title="exponents: measured (operations)")
        plot.set_xticks(sizes, sizes)
        plot.minorticks_off()
        plot.legend(fontsize=7)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / f"scaling-{s.joints}.png", dpi=110)
    print(f"drawn to {options.out}")


def bare_decoding(folder: Path, frames: np.ndarray, size: data.Size, crop: data.Crop) -> data.Frames:
    """In place of `data.read_jpegs`: decode and scale the same frames as a whole, and keep nothing of them."""
    image_module = data.need("PIL.Image", "pillow", "to read frames")
    for frame in frames:
        with image_module.open(folder / f"{frame + 1:06d}.jpg") as image:
            image.draft("RGB", size[::-1])
            np.asarray(image.convert("RGB").resize(size[::-1], image_module.Resampling.BILINEAR))
    return data.Frames(np.empty((0, 0, 0, 3), np.uint8))


def write_jpegs(root: Path) -> data.Source:
    """Synthetic clips as JPEG frames of 480 x 270, with noise until a frame has the bytes of a photograph."""
    image = data.need("PIL.Image", "pillow", "to write frames")
    source, whole = data.synthetic(8, 1), (slice(0, 270), slice(0, 480))
    noise = np.random.default_rng(0).normal(0, 10, (16, 270, 480, 3))
    for clip in source.clips["train"]:
        folder = root / clip.name
        folder.mkdir()
        for t, frame in enumerate(data.draw(clip.media, np.arange(16), (270, 480), whole).video + noise):
            image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(folder / f"{t + 1:06d}.jpg")
        clip.media, clip.size = folder, (270, 480)
    return source


def loader(s: Settings, options: argparse.Namespace):
    """Loading clips from JPEG against bare decoding by as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        source, loads = write_jpegs(Path(folder)), {}
        order = [divmod(i, len(source.clips["train"])) for i in range(options.clips)]  # (epoch, clip)
        batches = [order[i : i + 16] for i in range(0, options.clips, 16)]
        for name, read in (("bare", bare_decoding), ("loader", data.read_jpegs)):
            dataset = data.Dataset(replace(source, read=read), "train", s.frames, s.height, s.width)
            loaded = train.load_batches(dataset, batches, options.workers, "cpu")
            loads[name] = partial(deque, loaded, maxlen=0)  # takes them all and keeps none
        times = take_turns(options, {"": loads})
    bare, ours = (options.clips / times["", name] for name in loads)
    row(f"{options.workers} workers", *loads, "ratio")
    row(f"{s.frames} frames of a JPEG clip, clips/s", bare, ours, ours / bare, form="{:.2f}")


SECTIONS = {f.__name__: f for f in (table, plain, memory, scaling, loader, variants)}


def parse_args(words: list[str] | None) -> tuple[argparse.Namespace, list[Settings]]:
    """Options, and the settings for each number of joints."""
    shape = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=118)
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("what", nargs="?", choices=[*SECTIONS, "all"], default="table", help="[table]")
    add("--preset", choices=train.PRESETS, default="paper", help="the defaults of the model [paper]")
    add("--joints", type=int, nargs="+", default=[13, 50], metavar="N", help="R, joints of all persons [13 50]")
    add("--batch", type=int, default=8 if CUDA else 1, metavar="N", help="clips of forward and step [1; CUDA 8]")
    add("--batches", type=int, nargs="+", metavar="N", help="variants: batches to try [--batch]")
    add("--compile", action="store_true", help="variants: compiled ones, too")
    add("--amp", nargs="+", choices=TYPES, default=[*TYPES][: 2 + CUDA], help="types [off bf16; CUDA off bf16 fp16]")
    add("--device", choices=("cpu", "cuda"), default="cuda" if CUDA else "cpu", help="[cuda where there is one]")
    add("--rounds", type=int, default=5, metavar="N", help="of each measurement [5]")
    add("--matrix", type=int, default=8192 if CUDA else 4096, metavar="N", help="rows of a matrix [4096; CUDA 8192]")
    add("--workers", type=int, default=2, metavar="N", help="processes that load clips [2]")
    add("--clips", type=int, default=64, metavar="N", help="that they load in a round [64]")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="folder of the plots [bench]")
    add = parser.add_argument_group("model", Settings.__doc__).add_argument
    for f in fields(Settings):
        if f.name != "joints":
            how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "N"}
            text = f"{f.metadata['help']} [{f.default}]"
            add("--" + f.name.replace("_", "-"), **how, default=argparse.SUPPRESS, help=text)
    options = parser.parse_args(words)
    if min(options.batch, options.matrix, options.rounds, options.clips, *(options.batches or [])) < 1:
        raise data.UsageError("--batch, --batches, --matrix, --rounds and --clips must be 1 or more")
    options.device, options.product = torch.device(options.device), 2 * options.matrix**3  # operations of the product
    values = train.PRESETS[options.preset] | vars(options)
    values = {f.name: values[f.name] for f in fields(Settings) if f.name in values}
    with data.errors_as(data.UsageError, "a model of these flags cannot be made"):
        return options, [Settings(**values | {"joints": R}) for R in options.joints]


@tool("tools.bench")
def main(words: list[str] | None = None):
    options, several = parse_args(words)
    train.keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # the same float32 as in the product of matrices; in training it is True
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    for s, (title, section) in itertools.product(several, SECTIONS.items()):
        if options.what in (title, "all"):
            size = f"T={s.frames} {s.height}x{s.width} C={s.channels} L={s.blocks} R={s.joints}, batch {options.batch}"
            print(f"\n{title}: {size}, {options.rounds} rounds, {name}, torch {torch.__version__}")
            section(s, options)


if __name__ == "__main__":
    sys.exit(main())
