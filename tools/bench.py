"""Measure D3T on this machine: speed, memory, and what the time grows with.

    python -m tools.bench             # clips/s and memory of forward and step, the parts of a forward
    python -m tools.bench plain       # the same beside a plain version of the model
    python -m tools.bench memory      # memory of a step beside the plain version, clips that fit in 32 GiB
    python -m tools.bench scaling     # time of each part against frames, resolution and joints, with a plot
    python -m tools.bench loader      # loading clips against bare decoding, and against the steps that need them
    python -m tools.bench variants    # layouts, compilation and batches (for CUDA)
    python -m tools.bench all --joints 13 --rounds 9

The default is the paper's size, with the joints of Penn Action (13) and with those of two persons in NTU (50).

Versions that are compared run in turns, A B A B, in one process. A time is the median of the rounds, after one round
that only warms up; a ratio is that of two medians. Operations are those of a forward, two for each multiplication; a
step counts as three forwards. Their rate is compared with a product of two matrices in the same rounds and type.
Memory is the largest sum of live tensors that the allocator counts, so it does not depend on other programs.
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
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MethodType
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import d3t
import data
import train
from d3t import D3T, Settings

CUDA = torch.cuda.is_available()
TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SWEEPS = {"frames": (8, 12, 16, 24, 32), "resolution": (112, 160, 224, 288), "joints": (13, 26, 50, 100)}
GIB = 2**30

# --------------------------------------------------------------------------------------------------------------------
# How it is measured
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    settings: Settings
    amp: str = "off"
    plain: bool = False  # as one would write it first: contiguous, an explicit softmax, all tokens of the last block
    layout: bool = True  # channels last
    compiled: bool = False
    checkpoints: bool = False


def plain_msa(self, X: Tensor, X_: Tensor) -> Tensor:
    q, k, v = self.split(self.Wq(X)), self.split(self.Wk(X_)), self.split(self.Wv(X_))
    share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, Q, S)
    return self.Wo((share @ v).transpose(1, 2).flatten(2))


class Run:
    """A model that is trained as train.py does, with a learning rate of zero, so that its weights stay the same."""

    def __init__(self, version: Version, device: torch.device):
        torch.manual_seed(0)
        self.version, self.device = version, device
        self.model = D3T(version.settings).to(device)
        if version.layout:
            self.model.to(memory_format=torch.channels_last_3d)
        for module in self.model.modules():
            if isinstance(module, d3t.TokenSearch):  # the points of a trained search lie between the tokens
                torch.nn.init.normal_(module.offset.weight, std=0.02)
            if isinstance(module, d3t.AttentionBlock) and version.plain:
                module.msa = MethodType(plain_msa, module)
            if isinstance(module, d3t.Block) and version.plain:
                module.queries = None
            if isinstance(module, d3t.Block) and version.checkpoints:  # as train.py --checkpointing
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        self.net = torch.compile(self.model, dynamic=False) if version.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=version.amp == "fp16")

    def logits(self, batch: list[Tensor]) -> Tensor:
        video, joints, visible, _ = batch
        video = video if self.version.layout else video.contiguous()
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
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(options: argparse.Namespace, work: dict) -> dict:
    """Median seconds of each function of `work` over the rounds; in a round each is called once."""
    seconds = defaultdict(list)
    for _ in range(1 + options.rounds):
        for name, function in work.items():
            begin = clock(options.device)
            function()
            seconds[name].append(clock(options.device) - begin)
    return {name: np.median(times[1:]) for name, times in seconds.items()}


def by_part(run: Run, batch: list[Tensor], meter: Callable, gained: dict[str, float]):
    """Add to `gained` what `meter` gains in each part of a forward, in the rest and in all of it."""
    inside = defaultdict(float)

    def metered(name, function):
        def call(*args, **kwargs):
            before = meter()
            out = function(*args, **kwargs)
            inside[name] += meter() - before
            return out

        return call

    parts = [("trunk", run.model.trunk, "forward"), ("joint tokenizer", d3t, "joint_tokens")]
    for b in run.model.blocks:
        parts += [("token search", b.deformable and b.deformable.search, "forward")]
        parts += [(f"{name} attention", getattr(b, name), "forward") for name in ("deformable", "joint", "temporal")]
    parts += [("head", run.model.head, "forward")]
    with ExitStack() as stack:
        for name, owner, call in parts:
            if owner is not None:  # a disabled attention
                stack.enter_context(mock.patch.object(owner, call, metered(name, getattr(owner, call))))
        metered("all", run.forward)(batch)
    gained["deformable attention"] -= gained["token search"]  # it is called inside


def row(name: str, *cells, form: str = "{}"):
    print(f"{name:36}" + "".join(f"{form.format(cell):>14}" for cell in cells), flush=True)
