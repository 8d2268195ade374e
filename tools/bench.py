"""Measure D3T on this machine: speed, memory, and what its cost grows with.

The default is the paper's size, with the joints of Penn Action (13) and with those of NTU (two persons, 50).

    python -m tools.bench                               # table: clips/s, share of the peak, memory, time of each part
    python -m tools.bench plain                         # against D3T as one would write it first
    python -m tools.bench all --joints 13 --rounds 9

`scaling` draws cost against T, resolution and joints, `package` compares with the PyPI package deformable-attention,
`loader` with bare decoding, `memory` says what step and blocks hold and which batch fits, `variants` tries
types, layouts, compilation and batches of the step (for CUDA).

What is compared takes turns, A B A B, in one process; a figure is the median of the rounds, of which a first one only
warms up, and a ratio is that of two medians. Operations are those of a forward, two for each multiplication, and a step
counts as three forwards. The peak of the machine is that of a product of two matrices in the same rounds and type, by
its median as all else. A share of the fastest of these products, which gets faster with every round, stands beside it.
Memory is the largest sum of live tensors, which the allocator counts: it repeats, whatever else the machine does.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import d3t
import data
import train
from d3t import D3T, AttentionBlock, Block, DeformableAttention, Settings

JOINTS = [13, 50]  # of Penn Action, and of two persons in NTU
TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWEEPS = {"frames": (8, 12, 16, 24, 32), "resolution": (112, 160, 224, 288), "joints": (13, 26, 50, 100)}
UNMOVED = {("joints", "deformable attention"), ("joints", "full attention"), ("resolution", "joint attention")}
SMALL = (8, 16, 24, 32, 48, 64, 88)  # pixels of a side where full attention might still be the cheaper one

# --------------------------------------------------------------------------------------------------------------------
# What is measured, and how
# --------------------------------------------------------------------------------------------------------------------


class Run:
    """A model as train.py trains it, always of the same weights: a learning rate of zero keeps them so."""

    def __init__(self, s: Settings, device, amp="off", plain=False, layout=True, compiled=False, checkpoints=False):
        torch.manual_seed(0)
        self.model, self.device, self.amp = D3T(s).to(device), device, amp
        if layout and not plain:
            self.model.to(memory_format=torch.channels_last_3d)
        for module in self.model.modules():
            if isinstance(module, d3t.TokenSearch):  # as if trained: the points lie between the tokens
                nn.init.normal_(module.offset.weight, std=0.02)
            if isinstance(module, Block) and checkpoints:  # as train.py --checkpointing
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        self.net = Plain(self.model) if plain else self.model
        self.net = torch.compile(self.net, dynamic=False) if compiled else self.net
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=amp == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, TYPES[self.amp], enabled=self.amp != "off")

    @torch.no_grad()
    def forward(self, batch: list[Tensor]) -> Tensor:
        self.net.eval()
        with self.autocast():
            return self.net(*batch[:3]).float()

    def step(self, batch: list[Tensor]):
        """As in train.train_one_epoch."""
        self.net.train()
        with self.autocast():
            logits = self.net(*batch[:3])
        self.scaler.scale(F.cross_entropy(logits.float(), batch[3])).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def make_batch(s: Settings, clips: int, device: torch.device, layout=True) -> list[Tensor]:
    """Video, joints, visible and label; the video in the layout of `data.collate`, or contiguous."""
    random = np.random.default_rng(0)
    video = random.integers(0, 256, (clips, s.frames, s.height, s.width, 3), dtype=np.uint8)
    video = video.transpose(0, 4, 1, 2, 3)
    video = video if layout else np.ascontiguousarray(video)
    joints = random.random((clips, s.frames, s.joints, 2), dtype=np.float32) * np.float32([s.width, s.height])
    batch = video, joints, random.random(joints.shape[:3]) < 0.9, np.arange(clips) % s.classes
    return [torch.from_numpy(array).to(device) for array in batch]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(options: argparse.Namespace, functions: dict) -> dict[object, np.ndarray]:
    """Seconds of each function in each round, taking turns: what else the machine does meets all of them alike."""
    seconds = {name: [] for name in functions}
    for _ in range(1 + options.rounds):
        for name, function in functions.items():
            begin = clock(options.device)
            function()
            seconds[name].append(clock(options.device) - begin)
    return {name: np.array(times[1:]) for name, times in seconds.items()}


def product(amp: str, options: argparse.Namespace) -> Callable:
    a, b = torch.randn(2, options.matrix, options.matrix, device=options.device).to(TYPES[amp])
    return partial(torch.mm, a, b)


def by_part(run: Run, batch: list[Tensor], meter: Callable) -> dict[str, float]:
    """What `meter` gains in each part of a forward; an attention has its windows, 3D deformable attention no search."""
    gained = defaultdict(float)

    def metered(name, function):
        def call(*args, **kwargs):
            before = meter()
            out = function(*args, **kwargs)
            gained[name] += meter() - before
            return out

        return call

    model = run.model
    places = [("trunk", model.trunk, "forward"), ("joint tokenizer", d3t, "joint_tokens")]
    for b in model.blocks:
        places += [("token search", getattr(b.deformable, "search", None), "forward")]
        places += [(f"{name} attention", getattr(b, name), "forward") for name in ("deformable", "joint", "temporal")]
    places += [("head", model.head, "forward")]
    with ExitStack() as stack:
        for name, owner, call in places:
            if owner is not None:  # Table 4
                stack.enter_context(mock.patch.object(owner, call, metered(name, getattr(owner, call))))
        metered("all", run.forward)(batch)
    gained["deformable attention"] -= gained["token search"]
    gained["rest"] = 2 * gained["all"] - sum(gained.values())
    return {name: gained[name] for name in (*dict.fromkeys(name for name, *_ in places), "rest", "all")}


def operations(run: Run, batch: list[Tensor]) -> dict[str, float]:
    """Of a forward by part: products of matrices, convolutions and attention; trilinear sampling counts as none."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter lacks
    lacking = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    run.model.requires_grad_(False)  # it trips over views of parameters where no gradient is recorded
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        found = by_part(run, batch, counter.get_total_flops)
    run.model.requires_grad_(True)
    return found


def peak_memory(device: torch.device, function: Callable) -> int:
    """The most bytes of live tensors at any time of `function`, beyond those that were alive before."""
    gc.collect()  # a block that computes itself again is in a cycle with its forward
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler talks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        function()
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


@functools.cache
def step_memory(s: Settings, clips: int, device: torch.device, **how) -> int:
    """Peak of a training step, with weights, AdamW's averages and batch: all is made in here."""

    def first_step():
        run, batch = Run(s, device, **how), make_batch(s, clips, device)
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()  # makes the averages
        run.optimizer.zero_grad(set_to_none=True)
        run.step(batch)

    return peak_memory(device, first_step)


def row(name: str, *cells, form: str = "{}"):
    print(f"{name:36}" + "".join(f"{form.format(cell):>14}" for cell in cells), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# The plain version: float32, contiguous, explicit softmax, loops over windows
# --------------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The weights of a D3T and none of its forwards: what makes `d3t.py` faster cannot make this faster."""

    def __init__(self, model: D3T):
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, joints: Tensor, visible: Tensor) -> Tensor:
        m, trunk, maps = self.model, self.model.trunk, []
        x = trunk.stem((video.contiguous() - m.mean) / m.std)
        for layer in (*trunk.layer1, *trunk.layer2, *trunk.layer3):
            x = (layer.conv2(layer.conv1(x)) + layer.downsample(x)).relu()
            maps.append(x)
        F_a, F_b = maps[1], maps[-1]
        Z = F_b.permute(0, 2, 3, 4, 1).flatten(2, 3).contiguous()  # (B, T, h*w, D)
        Z = m.norm_rgb(Z + m.position_t + m.position_s)
        P = M = Z[:, :, :0]
        if m.has_pose:
            heatmaps = d3t.joint_heatmaps(joints, visible, F_a.shape[-2:], 2, m.settings.sigma)
            P = m.embed_pose(torch.einsum("bcthw, btrhw -> btrc", F_a, heatmaps))
            P = m.norm_pose(P) if m.position_p is None else m.norm_pose(P) + m.position_p
        if m.modal is not None:
            M = m.modal.expand(len(Z), -1, -1, -1)
        for block in m.blocks:
            Z, P, M = plain_block(block, Z, P, M)
        return m.head(torch.cat([Z.mean((1, 2)), P.mean((1, 2))], -1) if m.modal is None else M.mean(1).flatten(1))


def plain_attention(a: AttentionBlock, X: Tensor, X_: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (a.heads, -1)).transpose(1, 2) for t in (a.Wq(X), a.Wk(X_), a.Wv(X_)))
    share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, n, m)
    X = X + a.Wo((share @ v).transpose(1, 2).flatten(2))
    return X + a.ffn(a.norm(X))


def plain_search(search: nn.Module, Z: Tensor) -> Tensor:
    """Z (B, T, h, w, D) -> the selected tokens (B, T~*h~*w~, D)."""
    volume = Z.permute(0, 4, 1, 2, 3).contiguous()
    x = F.gelu(search.norm(search.conv(volume).permute(0, 2, 3, 4, 1)))
    points = search.reference + search.offset(x).tanh() * search.reach  # (B, T~, h~, w~, 3)
    at = ((2 * points + 1) / torch.tensor(Z.shape[1:4], device=Z.device) - 1).flip(-1)
    return F.grid_sample(volume, at, padding_mode="border", align_corners=False).flatten(2).transpose(1, 2)


def plain_windows(a: AttentionBlock, tokens: Tensor, M: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One window after the other, each with a copy of M; the means of all copies."""
    N, total, modal = tokens.shape[2] if dim == 1 else index.shape[1], torch.zeros_like(tokens), []
    for window in index:
        X = torch.cat([tokens.index_select(dim, window), M], dim=2)
        X = plain_attention(a, X.flatten(1, 2), X.flatten(1, 2)).view(X.shape)
        total = total.index_add(dim, window, X[:, :, :N])
        modal.append(X[:, :, N:])
    count = index.flatten().bincount()
    return total / count.view(-1, *[1] * (3 - dim)), torch.stack(modal).mean(0)


def plain_block(block: Block, Z: Tensor, P: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (T, N), rgb_cls, rest = Z.shape[1:3], M[:, :, :2], M[:, :, 2:]
    if block.deformable is not None:
        Z_ = plain_search(block.deformable.search, Z.unflatten(2, block.deformable.grid[1:]))
        X, X_ = torch.cat([Z, rgb_cls], 2).flatten(1, 2), torch.cat([Z_, rgb_cls.flatten(1, 2)], 1)
        Z, rgb_cls = plain_attention(block.deformable.attention, X, X_).unflatten(1, (T, -1)).tensor_split([N], dim=2)
    cls_pose = torch.cat([rgb_cls, rest], dim=2)[:, :, -2:]
    if block.joint is not None:
        P, cls_pose = plain_windows(block.joint.attention, P, cls_pose, block.joint.index, dim=2)
    cls = cls_pose[:, :, :1]
    if block.fuse is not None:
        cls = block.fuse(torch.cat([rgb_cls[:, :, -1:], cls], dim=-1))
    M = torch.cat([rgb_cls[:, :, :-1], cls, cls_pose[:, :, 1:]], dim=2)
    if block.temporal is not None:
        X, index = torch.cat([Z, P, M], dim=2), block.temporal.index
        X, _ = plain_windows(block.temporal.attention, X, X[:, : index.shape[1], :0], index, dim=1)
        Z, P, M = X.tensor_split([N, N + P.shape[2]], dim=2)
    return Z, P, M


def plain(s: Settings, options: argparse.Namespace):
    """Speed and logits against it."""
    batch, runs = make_batch(s, options.batch, options.device), {"plain": Run(s, options.device, plain=True)}
    runs |= {amp: Run(s, options.device, amp) for amp in options.amp}
    logits = [run.forward(batch) for run in runs.values()]
    apart = [(other - logits[0]).abs().max() for other in logits]
    speed(options, runs, batch, operations(Run(s, options.device), batch)["all"])
    row("largest difference of logits", *apart, form="{:.1e}")
    row("  of the largest logit", *(d / logits[0].abs().max() for d in apart), form="{:.1e}")


# --------------------------------------------------------------------------------------------------------------------
# Speed and memory
# --------------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, runs: dict[str, Run], batch: list[Tensor], flops: float) -> dict:
    """Forward and step side by side; the medians."""
    work = {("product", run.amp): product(run.amp, options) for run in runs.values()}
    for kind in ("forward", "step"):
        work |= {(kind, name): partial(getattr(run, kind), batch) for name, run in runs.items()}
    seconds = alternate(options, work)
    median = {key: np.median(times) for key, times in seconds.items()}
    peak = {name: 2 * options.matrix**3 / median["product", run.amp] for name, run in runs.items()}
    fastest = {name: 2 * options.matrix**3 / seconds["product", run.amp].min() for name, run in runs.items()}
    row("", *runs)
    row("peak of the machine, TFLOP/s", *(peak[name] / 1e12 for name in runs), form="{:.2f}")
    for kind, forwards in (("forward", 1), ("step", 3)):
        row(f"{kind}, clips/s", *(options.batch / median[kind, name] for name in runs), form="{:.3f}")
        for what, best in (("peak", peak), ("fastest product", fastest)):
            row(f"  share of the {what}", *(forwards * flops / median[kind, n] / best[n] for n in runs), form="{:.1%}")
        if "plain" in runs:
            row("  times the plain version", *(median[kind, "plain"] / median[kind, n] for n in runs), form="{:.2f}")
    return median


def table(s: Settings, options: argparse.Namespace):
    """Forward and step of each type, memory, loader, and the parts of a forward."""
    amps, B, device = options.amp, options.batch, options.device
    batch, runs = make_batch(s, B, device), {amp: Run(s, device, amp) for amp in amps}
    count = operations(runs[amps[0]], batch)
    median = speed(options, runs, batch, count["all"])
    row("peak memory of the step, GiB", *(step_memory(s, B, device, amp=amp) / 2**30 for amp in amps), form="{:.2f}")
    row("  clips in 32 GiB", *(largest_batch(s, device, amp=amp)[0] for amp in amps))
    row("  clips in 32 GiB, checkpoints", *(largest_batch(s, device, amp=amp, checkpoints=True)[0] for amp in amps))
    loaded = jpeg_loader(s, options, options.workers)["loader"]
    row(f"loader, {options.workers} workers, clips/s", *[loaded] * len(amps), form="{:.1f}")
    row("  times what the step needs", *(loaded * median["step", amp] / B for amp in amps), form="{:.1f}")

    parts, products = {amp: [] for amp in amps}, {amp: product(amp, options) for amp in amps}
    for _ in range(options.rounds):
        for amp, run in runs.items():
            begin = clock(device)
            products[amp]()
            took = clock(device) - begin
            parts[amp].append(by_part(run, batch, partial(clock, device)) | {"product": took})
    print()
    row("a forward, per clip", "GFLOP", *(f"{amp} {what}" for amp in amps for what in ("ms", "share", "of peak")))
    for part, flops in count.items():
        cells = []
        for amp in amps:
            took, whole, best = (np.median([one[name] for one in parts[amp]]) for name in (part, "all", "product"))
            peak = 2 * options.matrix**3 / best
            of_peak = flops / took / peak if took else 0.0  # Table 4: a part that is not there
            cells += [f"{1e3 * took / B:.1f}", f"{took / whole:.1%}", f"{of_peak:.1%}"]
        row(part, f"{flops / B / 1e9:.2f}", *cells)


def largest_batch(s: Settings, device: torch.device, **how) -> tuple[int, float, float]:
    """Clips that fit in the 32 GiB of the paper's V100; bytes of a step at any batch, and bytes for each clip."""
    one, two = (step_memory(s, clips, device, **how) for clips in (1, 2))
    return max(0, int((32 * 2**30 - one) // (two - one)) + 1), 2 * one - two, two - one


def memory(s: Settings, options: argparse.Namespace):
    """What the step and its transformer blocks hold, and the largest batch."""
    device, B, (T, h, w), amps = options.device, options.batch, s.grid, options.amp

    def train_blocks(run):
        sizes = h * w, s.joints, s.modal_tokens
        tokens = [torch.randn(B, T, n, 4 * s.channels, device=device, requires_grad=True) for n in sizes]
        with run.autocast():
            for block in run.model.blocks:
                tokens = plain_block(block, *tokens) if isinstance(run.net, Plain) else block(*tokens)
        sum(x.float().sum() for x in tokens).backward()
        run.optimizer.zero_grad(set_to_none=True)

    hows = [{"plain": True}, *({"amp": amp} for amp in amps)]
    blocks = [peak_memory(device, partial(train_blocks, Run(s, device, **how))) for how in hows]
    steps = [step_memory(s, B, device, **how) for how in hows]
    row("", "plain", *amps)
    for name, held in (("blocks, forward and backward", blocks), ("step", steps)):
        row(f"{name}, GiB", *(m / 2**30 for m in held), form="{:.3f}")
        row("  of the plain version", *(m / held[0] for m in held), form="{:.1%}")
    print("\nclips of a step in 32 GiB; GiB of any step and of each clip, extrapolated from batches of 1 and 2 here")
    row("", *(f"{amp} {what}" for amp in amps for what in ("clips", "fixed", "a clip")))
    for name, how in (("without checkpoints", {}), ("with checkpoints", {"checkpoints": True})):
        found = [largest_batch(s, device, amp=amp, **how) for amp in amps]
        row(name, *(cell for n, *held in found for cell in (n, *(f"{m / 2**30:.3f}" for m in held))))


def variants(s: Settings, options: argparse.Namespace):
    """Type, layout and compilation of the step, each with the batch that is fastest without compilation."""
    torch._dynamo.config.recompile_limit = 64  # each variant is compiled for itself
    device, work, chosen, short = options.device, {}, {}, argparse.Namespace(rounds=2, device=options.device)
    for amp, layout in itertools.product(options.amp, (False, True)):
        run, rates = Run(s, device, amp, layout=layout), {}
        for clips in options.batches:
            try:
                step = partial(run.step, make_batch(s, clips, device, layout))
                rates[clips] = clips / np.median(alternate(short, {0: step})[0])
            except torch.OutOfMemoryError:
                run.optimizer.zero_grad(set_to_none=True)
                break
        clips, work["product", amp] = max(rates, key=rates.get), product(amp, options)
        for compiled in (False, True) if options.compile else (False,):
            how = dict(amp=amp, layout=layout, compiled=compiled)
            name = f"{amp} {'channels last ' * layout}{'compiled' * compiled}"
            step = partial(Run(s, device, **how).step, make_batch(s, clips, device, layout))
            try:
                step()
            except torch.OutOfMemoryError:
                print(f"{name}: no memory for {clips} clips beside the other variants")
                continue
            work[name], chosen[name] = step, (clips, how)
    flops, seconds = operations(Run(s, device), make_batch(s, 1, device))["all"], alternate(options, work)
    row("step", "best batch", "ms", "clips/s", "MFU", "peak GiB")
    for name, (clips, how) in chosen.items():
        took, peak = np.median(seconds[name]), 2 * options.matrix**3 / np.median(seconds["product", how["amp"]])
        cells = f"{1e3 * took:.1f}", f"{clips / took:.2f}", f"{3 * flops * clips / took / peak:.1%}"
        row(name, clips, *cells, f"{step_memory(s, clips, device, **how) / 2**30:.2f}")


# --------------------------------------------------------------------------------------------------------------------
# What the cost grows with
# --------------------------------------------------------------------------------------------------------------------


def equations(s: Settings) -> dict[str, float]:
    """Operations of each module for one clip, from the equations."""
    (T, h, w), D, modal = s.grid, 4 * s.channels, min(2, s.modal_tokens)

    def attention(n, m):  # Wq, Wo of n and Wk, Wv of m tokens; n x m twice in Eq. (6); the FFN of Eq. (7)
        return 4 * D**2 * (n + m) + 4 * D * n * m + 16 * D**2 * n

    kernel = [min(s.kernel, n) for n in s.grid]
    selected = prod(n - k + 1 for n, k in zip(s.grid, kernel))
    X, joint, temporal = T * (h * w + modal), T * (s.joint_window + modal), h * w + s.joints + s.modal_tokens
    joint_windows = len(d3t.window_index(s.joints, s.joint_window, s.joint_stride))
    temporal_windows = len(d3t.window_index(T, s.temporal_window, s.temporal_stride))
    return {
        "joint tokenizer": 2 * T * s.joints * s.channels * ceil(s.height / 2) * ceil(s.width / 2),
        "deformable attention": selected * (2 * D * prod(kernel) + 6 * D) + attention(X, selected + T * modal),
        "full attention": attention(X, X),
        "joint attention": joint_windows * attention(joint, joint),
        "temporal attention": temporal_windows * attention(*[s.temporal_window * temporal] * 2),
    }


def modules(s: Settings, device: torch.device) -> dict[str, Callable]:
    """The same modules, each on random tokens of one clip."""
    (T, h, w), D = s.grid, 4 * s.channels
    block, full = Block(s).to(device), AttentionBlock(D, s.heads).to(device)
    block.deformable.search.conv.to(memory_format=torch.channels_last_3d)
    Z, P, M = (torch.randn(1, T, n, D, device=device) for n in (h * w, s.joints, s.modal_tokens))
    X = torch.cat([Z, M[:, :, :2]], dim=2).flatten(1, 2)
    F_a = torch.randn(1, s.channels, T, ceil(s.height / 2), ceil(s.width / 2), device=device)
    _, joints, visible, _ = make_batch(s, 1, device)
    return {
        "joint tokenizer": lambda: d3t.joint_tokens(F_a, joints, visible, s.sigma),
        "deformable attention": lambda: block.deformable(Z, M[:, :, :2]),
        "full attention": lambda: full(X, X),
        "joint attention": lambda: block.joint(P, M[:, :, -2:]),
        "temporal attention": lambda: block.temporal(torch.cat([Z, P, M], dim=2)),
    }


@torch.no_grad()
def scaling(s: Settings, options: argparse.Namespace):
    """A forward of each module in float32 against T, resolution and joints, and where full attention is cheaper."""
    s, work, flops = replace(s, deformable_attention=True, joint_attention=True, temporal_attention=True), {}, {}
    for axis, values in (*SWEEPS.items(), ("small", SMALL)):
        for value in values:
            changed = replace(s, **({axis: value} if hasattr(s, axis) else {"height": value, "width": value}))
            for name, function in modules(changed, options.device).items():
                pair = name in ("deformable attention", "full attention")
                if pair if axis == "small" else (axis, name) not in UNMOVED:
                    work[axis, name, value], flops[axis, name, value] = function, equations(changed)[name]
    seconds = {key: np.median(times) for key, times in alternate(options, work).items()}

    row("cost ~ size ^ exponent", "measured", "equations")
    slopes = {}
    for axis, values in SWEEPS.items():
        print(f"  {axis} {', '.join(map(str, values))}")
        for name in dict.fromkeys(name for where, name, _ in work if where == axis):
            costs = [[cost[axis, name, value] for value in values] for cost in (seconds, flops)]
            slopes[axis, name] = [np.polyfit(np.log(values), np.log(cost), 1)[0] for cost in costs]
            row(f"    {name}", *slopes[axis, name], form="{:.2f}")

    print()
    row("deformable : full attention", "measured", "equations")
    ratios = {}
    for axis, name, value in work:
        if name == "full attention":
            key = axis, "deformable attention", value
            ratio = [cost[key] / cost[axis, name, value] for cost in (seconds, flops)]
            row(f"  T = {value}" if axis == "frames" else f"  {value} x {value}", *ratio, form="{:.2f}")
            ratios |= {value: ratio} if axis != "frames" else {}
    for name, column in zip(("measured", "equations"), zip(*ratios.values())):
        dearer = max((value for value, ratio in zip(ratios, column) if ratio >= 1), default=None)
        where = f"up to {dearer} x {dearer}" if dearer else "nowhere"
        print(f"  {name}: at T = {s.frames} full attention is the cheaper one {where}")
    draw_scaling(s, seconds, flops, slopes, dict(sorted(ratios.items())), options.out / f"scaling-{s.joints}.png")


def draw_scaling(s: Settings, seconds: dict, flops: dict, slopes: dict, ratios: dict, path: Path):
    """Measured solid; dashed the operations of the equations, moved to the same mean."""
    plt = data.need("matplotlib.pyplot", "matplotlib", "to draw the plot")
    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.4))
    for (axis, name), (measured, expected) in slopes.items():
        values, plot, colour = SWEEPS[axis], axes[[*SWEEPS].index(axis)], f"C{[*equations(s)].index(name)}"
        took, count = (np.array([cost[axis, name, value] for value in values]) for cost in (seconds, flops))
        plot.plot(values, 1e3 * took, "o-", c=colour, label=f"{name}: {measured:.2f} ({expected:.2f})")
        plot.plot(values, 1e3 * count * np.exp(np.log(took / count).mean()), "--", c=colour, alpha=0.6)
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms", title="exponents measured (equations)")
        plot.set_xticks(values, values)
        plot.minorticks_off()
    for style, name, ratio in zip(("o-", "--"), ("measured", "equations"), zip(*ratios.values())):
        axes[3].plot(list(ratios), ratio, style, c="C1", label=name)
    axes[3].set(xlabel="resolution", ylabel="deformable : full attention", title=f"T = {s.frames}", yscale="log")
    axes[3].axhline(1, c="grey", lw=0.8)
    for plot in axes:
        plot.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}")


def package(s: Settings, options: argparse.Namespace):
    """Search, projections and attention on the same grid, without FFN and modal tokens.

    The package selects other and fewer points, so what compares is the cost of a pair of query and key. It has its
    defaults, but for offsets that all heads share: those of each head would cost it more time and memory.
    """
    D, device = 4 * s.channels, options.device
    ours = DeformableAttention(D, s.heads, s.grid, s.kernel).to(device)
    ours.search.conv.to(memory_format=torch.channels_last_3d)
    Z = torch.randn(1, *s.grid, D, device=device, requires_grad=True)
    nets = {"ours": lambda: ours.attention.msa(Z.flatten(1, 3), ours.search(Z).flatten(1, 3))}
    pairs = {"ours": prod(s.grid) * prod(ours.search.reference.shape[1:4]) / 1e6}
    try:
        from deformable_attention import DeformableAttention3D

        how = dict(downsample_factor=(4, 4, 4), offset_kernel_size=(6, 6, 6), offset_groups=1)
        theirs = DeformableAttention3D(dim=D, dim_head=D // s.heads, heads=s.heads, **how).to(device)
        nets["package"] = lambda: theirs(Z.permute(0, 4, 1, 2, 3))
        pairs["package"] = prod(s.grid) * prod((n + 2 - 6) // 4 + 1 for n in s.grid) / 1e6
    except ImportError:
        print("its column stays blank without it: pip install deformable-attention")

    def both(net):
        net().sum().backward()
        Z.grad = None

    work = {("forward", name): torch.no_grad()(net) for name, net in nets.items()}
    work |= {("forward and backward", name): partial(both, net) for name, net in nets.items()}
    seconds = alternate(options, work)
    found = {"million pairs of query and key": pairs}
    for kind in ("forward", "forward and backward"):
        found[f"{kind}, ms"] = {name: 1e3 * np.median(seconds[kind, name]) for name in nets}
    found["peak memory, MiB"] = {name: peak_memory(device, work[kind, name]) / 2**20 for name in nets}
    row("float32, one clip", "ours", "package", "ratio")
    for what, values in found.items():
        for label, unit in ((what, 1), ("  for a million pairs", pairs)):
            if unit is not pairs or values is not pairs:
                cells = [values[name] / (pairs[name] if unit is pairs else 1) for name in nets]
                row(label, *cells, *[cells[-1] / cells[0]] * (len(nets) - 1), form="{:.2f}")


# --------------------------------------------------------------------------------------------------------------------
# The loader
# --------------------------------------------------------------------------------------------------------------------


def bare_decoding(folder: Path, frames: np.ndarray, size: data.Size, crop: data.Crop) -> np.ndarray:
    """In place of `data.read_jpegs`: the same frames, decoded and scaled as a whole, and nothing kept of them."""
    from PIL import Image

    for frame in frames:
        with Image.open(folder / f"{frame + 1:06d}.jpg") as image:
            image.draft("RGB", size[::-1])
            np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))
    return np.empty((0, 0, 0, 3), np.uint8)


def write_penn(root: Path):
    """Penn Action's layout in 480 x 270: synthetic clips, with noise until a frame has the bytes of a photograph."""
    savemat = data.need("scipy.io", "scipy", "to write labels").savemat
    image = data.need("PIL.Image", "pillow", "to write frames")
    whole = slice(0, 270), slice(0, 480)
    (root / "labels").mkdir()
    for clip in data.synthetic(8, 1).clips["train"]:
        n, folder = len(clip.joints), root / "frames" / clip.name
        folder.mkdir(parents=True)
        noise = np.random.default_rng(0).normal(0, 10, (n, 270, 480, 3))
        for t, frame in enumerate(data.draw(clip.media, np.arange(n), (270, 480), whole) + noise):
            image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(folder / f"{t + 1:06d}.jpg")
        label = {"x": 4 * clip.joints[..., 0], "y": 4 * clip.joints[..., 1], "visibility": clip.visible}
        label |= {"action": "jump_rope", "train": 1, "dimensions": [270, 480, n]}
        savemat(root / "labels" / f"{clip.name}.mat", label)


def drain(dataset: data.Dataset, clips: int, workers: int, size: int = 16):
    order = [(i // len(dataset), i % len(dataset)) for i in range(clips)]  # (epoch, clip)
    batches = [order[i : i + size] for i in range(0, clips, size)]
    for _ in train.load_batches(dataset, batches, workers, torch.device("cpu")):
        pass


def jpeg_loader(s: Settings, options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Clips/s of bare decoding and of the loader, by as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        write_penn(Path(folder))
        source, work = data.penn_action([Path(folder)]), {}
        for name, read in (("bare", bare_decoding), ("loader", data.read_jpegs)):
            clips = data.Dataset(replace(source, read=read), "train", s.frames, s.height, s.width)
            work[name] = partial(drain, clips, options.clips, workers)
        seconds = alternate(options, work)
    return {name: options.clips / np.median(times) for name, times in seconds.items()}


def loader(s: Settings, options: argparse.Namespace):
    """Loading from JPEG against bare decoding; the two-minute run's loader against its steps."""
    row(f"{s.frames} frames of a JPEG clip, clips/s", "bare", "loader", "ratio")
    for workers in sorted({0, options.workers}):
        bare, ours = jpeg_loader(s, options, workers).values()
        row(f"  {workers} workers" if workers else "  one process", bare, ours, ours / bare, form="{:.2f}")

    preset, clips = train.PRESETS["tiny"], 256
    tiny = Settings(classes=4, **{f.name: preset[f.name] for f in fields(Settings) if f.name in preset})
    dataset = data.Dataset(data.synthetic(clips, 1), "train", tiny.frames, tiny.height, tiny.width)
    step = partial(Run(tiny, options.device).step, make_batch(tiny, preset["batch"], options.device))
    seconds = alternate(options, {"step": step, "loader": partial(drain, dataset, clips, 1)})
    needed, loaded = preset["batch"] / np.median(seconds["step"]), clips / np.median(seconds["loader"])
    row("the two-minute run, clips/s", "step", "loader", "ratio")
    row("  one worker", needed, loaded, loaded / needed, form="{:.2f}")


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (table, plain, scaling, package, loader, memory, variants)}


def parse_args(words: list[str] | None) -> tuple[argparse.Namespace, list[Settings]]:
    """Options, and the settings for each number of joints."""
    shape = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=118)
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("what", nargs="?", choices=[*SECTIONS, "all"], default="table", help="[table]")
    add("--preset", choices=train.PRESETS, default="paper", help="the defaults of the model [paper]")
    add("--batch", type=int, metavar="N", help="clips of a forward and of a step [1; CUDA 8]")
    add("--batches", type=int, nargs="+", metavar="N", help="variants: batches to try [--batch; CUDA 1 2 4 .. 128]")
    add("--amp", nargs="+", choices=TYPES, help="types [off bf16; CUDA off bf16 fp16]")
    add("--compile", action=argparse.BooleanOptionalAction, help="variants: compiled ones too [with CUDA]")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=5, metavar="N", help="of each measurement [5]")
    add("--matrix", type=int, metavar="N", help="rows of the matrices that give the peak [4096; CUDA 8192]")
    add("--workers", type=int, default=2, metavar="N", help="processes that load clips [2]")
    add("--clips", type=int, default=64, metavar="N", help="that they load in a round [64]")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="folder of the plots [bench]")
    add = parser.add_argument_group("model", Settings.__doc__).add_argument
    for f in fields(Settings):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "N"}
        how |= {"nargs": "+"} if f.name == "joints" else {}
        default = " ".join(map(str, JOINTS)) if f.name == "joints" else f.default
        text = f"{f.metadata['help']} [{default}]"
        add("--" + f.name.replace("_", "-"), **how, default=argparse.SUPPRESS, help=text)
    options = parser.parse_args(words)
    if any(n is not None and n < 1 for n in (options.batch, options.matrix, options.rounds, options.clips)):
        parser.error("--batch, --matrix, --rounds and --clips must be 1 or more")
    cuda = options.device == "cuda"
    options.device, options.matrix = torch.device(options.device), options.matrix or (8192 if cuda else 4096)
    options.batch = options.batch or (8 if cuda else 1)
    options.compile = cuda if options.compile is None else options.compile
    options.amp = options.amp or [*TYPES][: 3 if cuda else 2]
    options.batches = options.batches or ([2**i for i in range(8)] if cuda else [options.batch])
    values = train.PRESETS[options.preset] | {"joints": JOINTS} | vars(options)
    values = {f.name: values[f.name] for f in fields(Settings) if f.name in values}
    try:
        return options, [Settings(**values | {"joints": R}) for R in values["joints"]]
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    (options, several), failed = parse_args(None), False
    train.keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # float32 as the product of matrices has it; in training it is True
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    for s in several:
        for section in SECTIONS.values() if options.what == "all" else [SECTIONS[options.what]]:
            print(f"\n{section.__name__}: T={s.frames} {s.height}x{s.width} C={s.channels} L={s.blocks} R={s.joints}, "
                  f"batch {options.batch}, {options.rounds} rounds, {name}, torch {torch.__version__}")  # fmt: skip
            try:
                section(s, options)
            except data.DataError as error:  # a package that is not there
                print(f"tools.bench: {error}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
