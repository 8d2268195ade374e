"""The proof of D3T. Each docstring of a test names the bug that it catches.

The first part holds slow loops in float64 that were written from the sentences of the paper, not from `d3t.py`. They
take numpy arrays, name every token, and share no code with the model. The model has to agree with them.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import d3t
import data
import train
from d3t import D3T, Settings

HERE = Path(__file__).parent

DOUBLE = torch.float64

torch.set_num_threads(1)  # more gain nothing here, and then sums are the same in all processes


# ---- The oracle: plain loops, float64, from the paper --------------------------------------------------------------
def weights(module) -> dict:
    """Parameters of a module as numpy arrays by name."""
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def part(w: dict, prefix: str) -> dict:
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def layer_norm(x, w, name):
    x = x - x.mean()
    return x / math.sqrt((x**2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def loop_joint_tokens(F_a, joints, visible, sigma):
    """P_t = ||_r sum_j sum_i F_a,t(i, j) H_t,r(i, j), H the Gaussian around (x_t,r, y_t,r) on the map of F_a."""
    B, C, T, h, w = F_a.shape
    P = np.zeros((B, T, joints.shape[2], C))
    for b, t, r in np.ndindex(P.shape[:3]):
        if not visible[b, t, r]:
            continue
        x, y = joints[b, t, r] / 2  # cell i of the map is centred on pixel 2i, as a test below shows
        for j, i in np.ndindex(h, w):
            P[b, t, r] += F_a[b, :, t, j, i] * math.exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * sigma**2))
    return P


def loop_search(Z, w, k):
    """3DTS of one clip, Z (T, h, w, D): offsets from two convolutions move regular points; Z is read there."""
    T, h, W, D = Z.shape
    kt, kh, kw = min(k, T), min(k, h), min(k, W)
    out = np.zeros((T - kt + 1, h - kh + 1, W - kw + 1, D))
    points = np.zeros((*out.shape[:3], 3))
    for t, y, x in np.ndindex(out.shape[:3]):
        seen = w["conv.bias"].copy()
        for a, b, c in np.ndindex(kt, kh, kw):
            seen += w["conv.weight"][:, 0, a, b, c] * Z[t + a, y + b, x + c]
        seen = gelu(layer_norm(seen, w, "norm"))
        for axis, (o, size) in enumerate(((t, kt), (y, kh), (x, kw))):
            delta = math.tanh(w["offset.weight"][axis] @ seen + w["offset.bias"][axis])
            points[t, y, x, axis] = o + (size - 1) / 2 + delta * (size - 1) / 2
        out[t, y, x] = read_between(Z, points[t, y, x])
    return out, points


def read_between(Z, point):
    """Trilinear: every token within one step of the point, weighted by how near it is along each axis."""
    value = np.zeros(Z.shape[-1])
    for n in np.ndindex(Z.shape[:3]):
        near = [max(0.0, 1 - abs(p - m)) for p, m in zip(point, n)]
        value += near[0] * near[1] * near[2] * Z[n]
    return value


def loop_attention(X, X_, w, heads):
    """X + MSA(X Wq, X~ Wk, X~ Wv), then X + FFN(LN(X)); X (n, D), X~ (m, D)."""
    n, D = X.shape
    d = D // heads
    out = np.zeros((n, D))
    for i in range(n):
        q, mixed = w["Wq.weight"] @ X[i], np.zeros(D)
        for head in range(heads):
            s = slice(head * d, (head + 1) * d)
            score = np.array([q[s] @ (w["Wk.weight"] @ x)[s] for x in X_]) / math.sqrt(d)
            share = np.exp(score - score.max())
            share /= share.sum()
            for a, x in zip(share, X_):
                mixed[s] += a * (w["Wv.weight"] @ x)[s]
        x = X[i] + w["Wo.weight"] @ mixed + w["Wo.bias"]  # Eq. (6)
        hidden = gelu(w["ffn.0.weight"] @ layer_norm(x, w, "norm") + w["ffn.0.bias"])
        out[i] = x + w["ffn.2.weight"] @ hidden + w["ffn.2.bias"]  # Eq. (7)
    return out


def loop_deformable(Z, m_rgb, m_cls, w, heads, grid, k):
    """Z (T, N, D), modal tokens (T, D): queries are all of them, keys are the selected tokens and the modal ones."""
    T, N, D = Z.shape
    selected, _ = loop_search(Z.reshape(*grid, D), part(w, "search."), k)
    X = np.concatenate([Z.reshape(-1, D), m_rgb, m_cls])
    X_ = np.concatenate([selected.reshape(-1, D), m_rgb, m_cls])
    X = loop_attention(X, X_, part(w, "attention."), heads)
    return X[: T * N].reshape(T, N, D), X[T * N : T * N + T], X[T * N + T :]


def loop_starts(length, window, stride):
    """Slide a window until it reaches the end; the last step is shortened so that it ends there."""
    starts = [0]
    while starts[-1] + window < length:
        starts.append(min(starts[-1] + stride, length - window))
    return starts


def loop_joint_stride(P, m_cls, m_pose, w, heads, window, stride):
    """P (T, R, D): a window of joints, over all frames, attends within itself and the two modal tokens of a frame."""
    T, R, D = P.shape
    copies = {(t, r): [] for t, r in np.ndindex(T, R)}
    cls_copies, pose_copies = [], []
    for start in loop_starts(R, window, stride):
        places = [(t, r) for t in range(T) for r in range(start, start + window)]
        X = np.concatenate([[P[place] for place in places], m_cls, m_pose])
        X = loop_attention(X, X, part(w, "attention."), heads)
        for place, x in zip(places, X):
            copies[place].append(x)
        cls_copies.append(X[-2 * T : -T])
        pose_copies.append(X[-T:])
    P = np.array([[np.mean(copies[t, r], 0) for r in range(R)] for t in range(T)])
    return P, np.mean(cls_copies, 0), np.mean(pose_copies, 0)


def loop_temporal_stride(X, w, heads, window, stride):
    """X (T, N, D): all tokens of the frames of a window attend to each other."""
    T, N, D = X.shape
    copies = {t: [] for t in range(T)}
    for start in loop_starts(T, window, stride):
        tokens = X[start : start + window].reshape(-1, D)
        out = loop_attention(tokens, tokens, part(w, "attention."), heads)
        for t, frame in zip(range(start, start + window), out.reshape(window, N, D)):
            copies[t].append(frame)
    return np.array([np.mean(copies[t], 0) for t in range(T)])


def loop_block(Z, P, m_rgb, m_cls, m_pose, w, s):
    """Fig. 2a: 3D deformable attention, joint stride attention, one CLS from the two, temporal stride attention."""
    Z, m_rgb, cls_3d = loop_deformable(Z, m_rgb, m_cls, part(w, "deformable."), s.heads, s.grid, s.kernel)
    P, cls_joint, m_pose = loop_joint_stride(
        P, cls_3d, m_pose, part(w, "joint."), s.heads, s.joint_window, s.joint_stride
    )
    m_cls = np.array([w["fuse.weight"] @ np.concatenate(pair) + w["fuse.bias"] for pair in zip(cls_3d, cls_joint)])
    N, R = Z.shape[1], P.shape[1]
    X = np.concatenate([Z, P, m_rgb[:, None], m_cls[:, None], m_pose[:, None]], axis=1)
    X = loop_temporal_stride(X, part(w, "temporal."), s.heads, s.temporal_window, s.temporal_stride)
    return X[:, :N], X[:, N : N + R], X[:, -3], X[:, -2], X[:, -1]


# ---- The model against the oracle ----------------------------------------------------------------------------------
def randomize(module, scale=0.3):
    """Every parameter random, so that nothing is right because it is zero or one; in float64."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module.double().eval()


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def close(a, b, tolerance=1e-10):
    """Largest difference, relative to the largest value, below the tolerance."""
    a, b = (x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (a, b))
    assert a.shape == b.shape and np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def small(**changes) -> Settings:
    """Settings of a model that computes in milliseconds; no two of its lengths are equal."""
    base = dict(
        classes=6, joints=7, frames=5, height=24, width=34, channels=2, blocks=2, heads=2, kernel=3,
        joint_window=4, joint_stride=2, temporal_window=3, temporal_stride=2,
    )  # fmt: skip
    return Settings(**(base | changes))


def clip_for(s: Settings, B=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (B, 3, s.frames, s.height, s.width), dtype=torch.uint8, generator=g)
    joints = torch.rand(B, s.frames, s.joints, 2, generator=g) * torch.tensor([s.width, s.height])
    return video, joints, torch.rand(B, s.frames, s.joints, generator=g) < 0.8


def normalised(video, joints, visible):
    """The same clips in float64, the video normalised with the mean and deviation of Kinetics-400."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) * 255 for v in ([0.432, 0.395, 0.376], [0.228, 0.221, 0.217]))
    return (video - mean.double()) / std.double(), joints.double(), visible


GRIDS = [((3, 5, 4), 3), ((6, 3, 7), 3), ((4, 7, 2), 5)]  # T, h, w and k; the last has axes shorter than k


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (3, 2, 4, 9, 6), (2, 5, 1, 7, 11)])
def test_joint_tokenizer_is_eq_1_and_2(shape):
    """Catches: x and y swapped, a normalised Gaussian, a wrong sigma, frames or joints mixed."""
    B, C, T, h, w = shape
    F_a, joints = randn(*shape), randn(B, T, 6, 2).abs() * torch.tensor([w, h])
    visible = torch.arange(B * T * 6).view(B, T, 6) % 4 > 0
    for sigma in (0.6, 1.0, 2.3):
        expected = loop_joint_tokens(F_a.numpy(), joints.numpy(), visible.numpy(), sigma)
        close(d3t.joint_tokens(F_a, joints, visible, sigma), expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_token_search_is_eq_3(grid, k):
    """Catches: a wrong reference point, offset range, axis order or interpolation."""
    search = randomize(d3t.TokenSearch(6, grid, k), 0.5)
    Z = randn(2, *grid, 6)
    points, out = search.points(Z), search(Z)
    for b in range(2):
        expected, expected_points = loop_search(Z[b].numpy(), weights(search), k)
        close(points[b], expected_points)
        close(out[b], expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_deformable_attention_is_eq_4_to_7(grid, k):
    """Catches: modal tokens of the wrong frame, selected tokens as queries, an output split at the wrong place."""
    T, h, w = grid
    module = randomize(d3t.DeformableAttention(8, 2, grid, k))
    Z, M = randn(2, T, h * w, 8), randn(2, T, 2, 8) * 2
    out_Z, out_M = module(Z, M)
    for b in range(2):
        clip = Z[b].numpy(), M[b, :, 0].numpy(), M[b, :, 1].numpy()
        z, *modal = loop_deformable(*clip, weights(module), 2, grid, k)
        close(out_Z[b], z)
        close(out_M[b], np.stack(modal, 1))


@pytest.mark.parametrize("T, R, window, stride", [(2, 7, 3, 2), (3, 5, 5, 1), (1, 8, 3, 3), (2, 6, 4, 3)])
def test_joint_stride_attention_is_fig_4a(T, R, window, stride):
    """Catches: a joint left out at the end, copies summed, windows over frames, modal tokens of one window only."""
    module = randomize(d3t.JointStrideAttention(8, 2, R, window, stride))
    P, M = randn(2, T, R, 8), randn(2, T, 2, 8) * 2
    out_P, out_M = module(P, M)
    for b in range(2):
        clip = P[b].numpy(), M[b, :, 0].numpy(), M[b, :, 1].numpy()
        p, *modal = loop_joint_stride(*clip, weights(module), 2, window, stride)
        close(out_P[b], p)
        close(out_M[b], np.stack(modal, 1))


@pytest.mark.parametrize("queries", [None, 1, 2])
@pytest.mark.parametrize("T, N, window, stride", [(7, 3, 3, 2), (5, 4, 5, 5), (6, 2, 4, 1), (8, 3, 3, 3)])
def test_temporal_stride_attention_is_fig_4b(T, N, window, stride, queries):
    """Catches: a frame left out at the end, copies summed, a window that attends to another, the wrong queries."""
    module, X = randomize(d3t.TemporalStrideAttention(8, 2, T, window, stride)), randn(2, T, N, 8)
    expected = [loop_temporal_stride(X[b].numpy(), weights(module), 2, window, stride) for b in range(2)]
    close(module(X, queries), np.array(expected)[:, :, -queries if queries else 0 :])


@pytest.mark.parametrize(
    "changes",
    [{}, dict(frames=4, width=20, heads=4), dict(height=9, blocks=1, temporal_window=5, sigma=2, pose_embedding=True)],
)
def test_model_is_fig_2a(changes):
    """Catches: modal tokens sent to the wrong attention, no CLS fusion, a missing norm, a wrong mean of the bytes."""
    s = small(**changes)
    model, clip = randomize(D3T(s)), clip_for(s)
    video, joints, visible = normalised(*clip)
    logits = model(clip[0], joints, visible)
    close(model(video, joints, visible), logits, 1e-12)
    F_a, F_b = model.trunk(video)
    w, P = weights(model), loop_joint_tokens(F_a.detach().numpy(), joints.numpy(), visible.numpy(), s.sigma)
    for b in range(2):
        Z = F_b[b].detach().numpy().transpose(1, 2, 3, 0).reshape(s.frames, -1, 4 * s.channels)
        Z = Z + w["position_t"] + w["position_s"]
        Z = np.array([[layer_norm(z, w, "norm_rgb") for z in frame] for frame in Z])
        p = np.array([[layer_norm(w["embed_pose.weight"] @ j, w, "norm_pose") for j in frame] for frame in P[b]])
        p = p + w.get("position_p", 0.0)
        m = w["modal"].transpose(1, 0, 2)
        for i in range(s.blocks):
            Z, p, *m = loop_block(Z, p, *m, part(w, f"blocks.{i}."), s)
        expected = w["head.weight"] @ np.concatenate([token.mean(0) for token in m]) + w["head.bias"]
        close(logits[b], expected)


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_last_block_asks_with_the_modal_tokens_alone(modal):
    """Catches: logits that change because the last block leaves out tokens, or a last block that computes them all."""
    s, asked = small(modal_tokens=modal), []
    model, clip = randomize(D3T(s)), normalised(*clip_for(s))
    for block in model.blocks:
        block.temporal.attention.register_forward_pre_hook(lambda _, X: asked.append([x.shape[1] for x in X]))
    logits = model(*clip)
    every = s.temporal_window * (math.prod(s.grid[1:]) + s.joints + modal)
    assert asked == [[every, every], [s.temporal_window * modal or every, every]]
    model.blocks[-1].queries = None
    close(model(*clip), logits, 1e-12)


def test_head_without_modal_tokens():
    """Catches: "No tokens" of Table 5 read by another rule than the mean RGB token beside the mean pose token."""
    model, tokens = randomize(D3T(small(modal_tokens=0))), []
    model.blocks[-1].register_forward_hook(lambda block, inputs, out: tokens.extend(out))
    logits = model(*normalised(*clip_for(model.settings)))
    close(logits, model.head(torch.cat([x.mean((1, 2)) for x in tokens[:2]], dim=1)))


# ---- What the oracle does not show: known mistakes of others, gradients, ablations, settings, precision, batches ---
@pytest.mark.parametrize("push", [-1, 0, 1])
@pytest.mark.parametrize("grid, k", [((5, 9, 7), 3), ((7, 8, 9), 7), ((1, 5, 8), 3)])
def test_search_without_weights_returns_an_exact_crop(grid, k, push):
    """Catches: time and width swapped, positions scaled by n - 1, clamped points, a point outside the volume."""
    search = d3t.TokenSearch(4, grid, k).double()  # untrained, it does not move a point
    torch.nn.init.constant_(search.offset.weight, 0.0)
    torch.nn.init.constant_(search.offset.bias, 1e9 * push)
    Z = randn(2, *grid, 4)
    starts = [(min(k, n) - 1) * (1 + push) // 2 for n in grid]
    t, y, x = (slice(start, start + n - min(k, n) + 1) for start, n in zip(starts, grid))
    close(search(Z), Z[:, t, y, x], 1e-14)


def test_absent_joints_do_not_swamp_the_gradient():
    """Catches: a bias before the norm of pose tokens, whose gradient grows by 1/sqrt(eps) for an absent joint."""
    s = small(blocks=1)
    torch.manual_seed(0)
    model = D3T(s)
    video, joints, visible = clip_for(s)
    norms = []
    for seen in (torch.ones_like(visible), torch.ones_like(visible)):
        seen[..., 0] = not norms  # then without the first joint
        model.zero_grad()
        F.cross_entropy(model(video, joints, seen), torch.arange(len(video))).backward()
        norms.append(max(parameter.grad.norm() for parameter in model.embed_pose.parameters()))
    assert norms[1] < 2 * norms[0]


def test_joints_lie_on_the_cells_that_see_them():
    """Catches: joints placed on F_a by another rule than the trunk's, half a pixel off at stride 2."""
    trunk = d3t.Trunk(4).double().eval()
    for p in trunk.parameters():  # with equal weights, the gradient of a cell of F_a is its receptive field
        torch.nn.init.constant_(p, 0.01 if p.ndim > 1 else 1.0)
    video = torch.ones(1, 3, 1, 52, 60, dtype=DOUBLE, requires_grad=True)
    trunk.layer1(trunk.stem(video))[0, :, 0, 10, 13].sum().backward()
    field = video.grad.sum((0, 1, 2)) / video.grad.sum()
    pixel = torch.stack([field.sum(0) @ torch.arange(60.0).double(), field.sum(1) @ torch.arange(52.0).double()])
    here = torch.ones(1, 1, 1, dtype=torch.bool)
    heatmap = d3t.joint_heatmaps(pixel.view(1, 1, 1, 2), here, (26, 30), 2, 1.0)[0, 0, 0]
    assert heatmap.argmax() == 10 * 30 + 13 and abs(heatmap.max() - 1) < 1e-9


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda F_a: d3t.joint_tokens(F_a, randn(1, 2, 3, 2), torch.ones(1, 2, 3) > 0, 1.0), [(1, 2, 2, 3, 4)]),
        # Z moves the points, too. They lie between the tokens, where the interpolation has no kink.
        (randomize(d3t.TokenSearch(3, (3, 4, 5), 3), 0.5), [(1, 3, 4, 5, 3)]),
        (randomize(d3t.DeformableAttention(4, 2, (2, 3, 4), 2)), [(1, 2, 12, 4), (1, 2, 2, 4)]),
        (randomize(d3t.JointStrideAttention(4, 2, 5, 3, 2)), [(2, 2, 5, 4), (2, 2, 2, 4)]),
        (randomize(d3t.TemporalStrideAttention(4, 2, 5, 3, 2)), [(2, 5, 3, 4)]),
    ],
)
def test_gradcheck(function, shapes):
    """Catches: points without a gradient, tokens whose gradient is lost on the way through windows and means."""
    assert torch.autograd.gradcheck(function, [randn(*shape).requires_grad_() for shape in shapes], atol=1e-6)


ATTENTIONS = ("deformable_attention", "joint_attention", "temporal_attention")
TABLE_4 = [(False, True, True), (True, False, False), (True, False, True), (True, True, False), (True, True, True)]


@pytest.mark.parametrize("which", TABLE_4[:-1])
def test_disabled_attention_is_skipped(which):
    """Catches: a row of Table 4 that is not the full model with attentions that add nothing and a fusion of one CLS."""
    on = dict(zip(ATTENTIONS, which), joint_window=4 if which[1] else 99, temporal_window=3 if which[2] else 99)
    full, row = randomize(D3T(small())), D3T(small(**on)).double().eval()
    for block, block_of_row in zip(full.blocks, row.blocks):
        for name in itertools.compress(ATTENTIONS, (not on for on in which)):
            attention = getattr(block, name.removesuffix("_attention")).attention
            for p in (*attention.Wo.parameters(), *attention.ffn[2].parameters()):
                p.data.zero_()
        if not (which[0] and which[1]):
            assert block_of_row.fuse is None
            block.fuse.bias.data.zero_()
            block.fuse.weight.data = torch.eye(16, dtype=DOUBLE)[8:]  # the second M'_CLS, as it is
    assert not row.load_state_dict(full.state_dict(), strict=False).missing_keys
    clip = normalised(*clip_for(full.settings))
    close(row(*clip), full(*clip))


@pytest.mark.parametrize("modal", [3, 1, 0])
@pytest.mark.parametrize("which", TABLE_4)
def test_every_parameter_learns_in_every_ablation(which, modal):
    """Catches: a parameter without effect in a row of Table 4 or 5, a gradient that is not finite."""
    s = small(channels=8, modal_tokens=modal, pose_embedding=True, **dict(zip(ATTENTIONS, which)))
    torch.manual_seed(0)
    model = D3T(s).double()
    for module in model.modules():
        if isinstance(module, d3t.TokenSearch):  # at zero the offset layer would pass no gradient on
            torch.nn.init.normal_(module.offset.weight)
    F.cross_entropy(model(*clip_for(s)), torch.tensor([1, 4])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-13, name  # rounding leaves 1e-18 where there is no gradient, as for a key's bias


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value, seen", [(7.3, False), (math.nan, False), (math.nan, True), (math.inf, True)])
def test_absent_joints_have_no_effect(value, seen, axis):
    """Catches: coordinates of a joint that is hidden or not finite in its token, NaN in the logits or a gradient."""
    s = small()
    model = D3T(s).eval()
    video, joints, visible = clip_for(s)
    here = (0, 1, 2)
    visible[here] = True
    present = model(video, joints, visible)
    visible[here] = False
    absent = model(video, joints, visible)
    visible[here], joints[(*here, axis)] = seen, value
    logits = model(video, joints, visible)
    assert torch.equal(logits, absent) and not torch.equal(absent[0], present[0])
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_attentions_in_16_bits(dtype, monkeypatch):
    """Catches: a model that stays in float32 under autocast, or whose logits are far off."""
    s, seen, attend = small(), [], F.scaled_dot_product_attention
    model, (video, *rest) = D3T(s).eval(), clip_for(s)
    expected = model(video, *rest)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.dtype) or attend(q, k, v))
    with torch.autocast("cpu", dtype):
        close(model(video, *rest).float(), expected, 0.1)
        model(video.to(dtype), *rest)  # a video of the type that the rest computes in
    assert {*seen} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_positions_in_float32(dtype):
    """Catches: heat maps, their sum over F_a, offsets or points in 16 bits, where a position has three digits."""
    F_a, joints = randn(2, 8, 3, 40, 44).to(dtype), randn(2, 3, 7, 2).float().abs() * 30
    visible, search = torch.ones(2, 3, 7, dtype=torch.bool), d3t.TokenSearch(8, (6, 9, 7), 3)
    torch.nn.init.normal_(search.offset.weight)
    with torch.autocast("cpu", dtype):
        tokens = d3t.joint_tokens(F_a, joints, visible, 1.0)
        points = search.points(randn(2, 6, 9, 7, 8).float())
    assert tokens.dtype == points.dtype == torch.float32
    close(tokens.double(), d3t.joint_tokens(F_a.double(), joints.double(), visible, 1.0), 1e-5)
    assert (points - search.reference).unique().numel() > 500  # of 840: not rounded to 16 bits on the way


def test_trunk_has_torchvisions_widths():
    """Catches: another width than that of r2plus1d_18, whose weights then do not load."""
    kernels = [p.shape for p in d3t.Trunk(64).parameters() if p.ndim == 5]
    assert kernels[:2] == [(45, 3, 1, 7, 7), (64, 45, 3, 1, 1)]
    assert [k[0] for k in kernels if k[2:] == (1, 3, 3)] == [144] * 4 + [230] * 2 + [288] * 2 + [460] * 2 + [576] * 2
    assert [k[0] for k in kernels if k[2:] == (3, 1, 1)] == [64] * 5 + [128] * 4 + [256] * 4


def test_trunk_computes_r2plus1d():
    """Catches: an activation, shortcut or norm too few, a stride in time."""
    trunk = randomize(d3t.Trunk(4))
    w, video = trunk.state_dict(), randn(1, 3, 3, 17, 22)

    def conv(x, name, stride=1):
        time, _, space = w[f"{name}.weight"].shape[2:]
        return F.conv3d(x, w[f"{name}.weight"], None, (1, stride, stride), (time // 2, space // 2, space // 2))

    def norm(x, name):
        return F.batch_norm(x, *(w[f"{name}.{of}"] for of in ("running_mean", "running_var", "weight", "bias")))

    def factored(x, name, stride):
        return conv(norm(conv(x, f"{name}.0", stride), f"{name}.1").relu(), f"{name}.3")

    x, maps = norm(factored(video, "stem", 2), "stem.4").relu(), []
    for layer, block in itertools.product((1, 2, 3), (0, 1)):
        name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
        inside = norm(factored(x, f"{name}.conv1.0", stride), f"{name}.conv1.1").relu()
        inside = norm(factored(inside, f"{name}.conv2.0", 1), f"{name}.conv2.1")
        x = (inside + (x if stride == 1 else norm(conv(x, f"{name}.downsample.0", 2), f"{name}.downsample.1"))).relu()
        maps.append(x)
    for found, expected in zip(trunk(video), (maps[1], maps[-1])):
        close(found, expected)


def test_initial_scales():
    """Catches: weights of another initial scale, which decides whether the two-minute run learns."""
    model = D3T(Settings(channels=16, blocks=2, frames=4, height=40, width=40, kernel=3, pose_embedding=True))
    for name, p in model.named_parameters():
        if name.startswith(("position", "modal")):
            std = 0.02
        elif p.ndim == 5:
            std = (2 / (p.shape[0] * p[0, 0].numel())) ** 0.5 if "search" not in name else 27**-0.5
        elif p.ndim == 2 and "offset" not in name:
            added = name.endswith(("Wo.weight", "ffn.2.weight"))  # by six attentions, twice each
            std = (2 / sum(p.shape)) ** 0.5 / (12**0.5 if added else 1)
        else:
            expected = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0  # of a norm; of a bias, the search
            assert (p == expected).all(), name
            continue
        assert abs(p.std() / std - 1) < 4 / p.numel() ** 0.5, name
        assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name


@pytest.mark.parametrize(
    "changes, numbers",
    [
        (dict(joint_window=8), ("8", "7")), (dict(temporal_window=6), ("6", "5")), (dict(heads=3), ("8", "3")),
        (dict(joint_stride=5), ("5", "4")), (dict(modal_tokens=2), ("2",)), (dict(frames=0), ("frames", "positive")),
        (dict(modal_tokens=-1), ("modal_tokens", "0 or more", "-1")), (dict(sigma=math.inf), ("sigma", "2^63", "inf")),
        (dict(kernel=1), ("kernel", "2")), (dict(sigma=math.nan), ("sigma", "positive", "nan")),
        (dict(deformable_attention=False, temporal_attention=False), ("deformable_attention",)),
        (dict(frames=12.0), ("frames", "int", "12.0")), (dict(sigma="1"), ("sigma", "float", "'1'")),
        (dict(pose_embedding=1), ("pose_embedding", "bool")), (dict(classes=np.int64(4)), ("classes", "int")),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes, numbers):
    """Catches: a shape error deep inside the model instead of one line that names the field and both numbers."""
    with pytest.raises((ValueError, TypeError)) as error:
        small(**changes)
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("video", lambda x: x[:, :, :4], ["(2, 3, 4, 24, 34)", "(2, 3, 5, 24, 34)"]),
        ("joints", lambda x: x[:, :, :1], ["(2, 5, 1, 2)", "(2, 5, 7, 2)"]),
        ("visible", lambda x: x[:1], ["(1, 5, 7)", "(2, 5, 7)"]),
        ("visible", lambda x: 2 * x.to(torch.uint8), ["bool"]),  # 2 for visible, as in COCO, would count as hidden
        ("video", torch.Tensor.double, ["uint8, or torch.float32"]),
        ("video", torch.Tensor.int, ["uint8, or torch.float32"]),
        ("video", torch.Tensor.numpy, ["torch tensor", "ndarray"]),
        ("joints", torch.Tensor.tolist, ["torch tensor", "list"]),
        ("visible", lambda x: None, ["torch tensor", "NoneType"]),
    ],
)
def test_inputs_that_do_not_fit(name, change, said):
    """Catches: a clip of another T, size or number of joints that passes by broadcasting, a wrong type not named."""
    clip = dict(zip(("video", "joints", "visible"), clip_for(small())))
    with pytest.raises(TypeError if "torch tensor" in said else ValueError, match=f"^{name} ") as error:
        D3T(small())(**clip | {name: change(clip[name])})
    assert all(word in str(error.value) for word in said)


def test_one_graph_for_any_batch():
    """Catches: a branch on data, a call that splits the graph of torch.compile, a batch size fixed in the graph."""
    s = small(blocks=1)
    model, clip = D3T(s).eval(), clip_for(s)
    # The residual blocks have no sizes in their code and take seconds to trace.
    model.trunk.layer1 = model.trunk.layer2 = torch.nn.Identity()
    model.trunk.layer3 = torch.nn.Conv3d(s.channels, 4 * s.channels, 1, (1, 4, 4))
    for x in clip:
        torch._dynamo.mark_dynamic(x, 0)
    close(torch.compile(model, fullgraph=True, backend="eager")(*clip), model(*clip), 1e-5)


FLOW = r"^\| .* \| `(.+?)` \| `\(([\d, ]+)\)` \|"  # a row of the README: what it is, its symbol, its shape


def test_data_flow_at_the_papers_size(monkeypatch):
    """Catches: a stage or a shape that the README states and the model has not, at T = 12 and 224 x 224."""
    shapes = {}

    def keep(module, *names):
        def hook(_, inputs, out):
            shapes.update(zip(names, [tuple(x.shape) for x in inputs + (out if isinstance(out, tuple) else (out,))]))

        module.register_forward_hook(hook)

    monkeypatch.setattr(D3T, "initialize_weights", lambda model: None)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):  # shapes and types: no memory, no arithmetic
        model = D3T(Settings(blocks=2))
        first, last = model.blocks
        keep(model, "video", "joints", "visible", "logits")
        keep(model.trunk, "normalised", "F_a", "F_b")
        keep(model.embed_pose, "joint tokens", "P, projected")
        keep(first, "Z", "P", "M")
        keep(first.deformable.search, "Z, grid", "Z~")
        keep(first.deformable.attention, "X", "X~")
        keep(first.joint.attention, "joint windows")
        keep(first.temporal.attention, "temporal windows")
        keep(last.temporal.attention, "queries of the last block")
        keep(model.head, "mean of M")
        model(torch.zeros(2, 3, 12, 224, 224, dtype=torch.uint8), torch.zeros(2, 12, 13, 2), torch.ones(2, 12, 13) > 0)
    shapes["points"] = (*shapes["Z~"][:4], first.deformable.search.reference.shape[-1])
    stated = re.findall(FLOW, (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(stated) >= 15
    for symbol, shape in stated:
        assert shapes[symbol] == tuple(map(int, shape.split(","))), symbol


# ---- Data ----------------------------------------------------------------------------------------------------------
def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "joints", "visible")) and a["label"] == b["label"]


def all_of(height, width):
    return slice(0, height), slice(0, width)


def coded(size=(60, 90), n=5, asked=None):
    """A source whose pixels say where they are from: column, row and number of the frame; some joints are hidden."""

    def read(media, frames, scaled, crop):
        (asked if asked is not None else []).append((frames, scaled, crop))
        row, column = np.mgrid[: scaled[0], : scaled[1]]
        video = np.stack([np.stack([column, row, row * 0 + frame], -1) for frame in frames])
        return data.Frames(video[:, crop[0], crop[1]].astype(np.uint8))

    source = data.Source(["a"], ["nose", "left", "right"], [(1, 2)], read)
    joints = np.random.default_rng(0).uniform(0, [size[1], size[0]], (n, 3, 2)).astype(np.float32)
    visible = (np.arange(n)[:, None] + [0, 1, 2]) % 3 > 0  # another joint is hidden in each frame
    clip = data.Clip("clip", 0, joints, visible, size, None)
    source.clips = {"train": [clip] * 20, "test": [clip] * 20}
    return source


def test_items_depend_on_seed_epoch_and_index_alone():
    """Catches: augmentation that depends on the worker, on the items before it or on the global generator."""
    make = functools.partial(data.Dataset, data.synthetic(train=6, test=3), "train", 4, 24, 32)
    np.random.seed(5), torch.manual_seed(5)
    first = {key: make()[key] for key in itertools.product((0, 1), range(6))}
    state, again = (np.random.get_state()[1].copy(), torch.get_rng_state()), make()
    assert all(same(first[key], again[key]) for key in reversed(first)) and same(first[0, 2], again[2])
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    assert not same(first[0, 1], first[1, 1]) and not same(first[0, 1], make(seed=1)[0, 1])
    assert same(data.Dataset(data.synthetic(train=9, test=2), "train", 4, 24, 32)[1, 5], first[1, 5])
    assert not same(data.Dataset(data.synthetic(train=6, test=3, seed=1), "train", 4, 24, 32)[0, 0], first[0, 0])


@pytest.mark.parametrize("size, crop", [((60, 90), (40, 40)), ((90, 60), (24, 56)), ((33, 47), (41, 35))])
@pytest.mark.parametrize("split", ["train", "test"])
def test_joints_stay_on_their_pixels(size, crop, split):
    """Catches: joints, visibility or pixels scaled, cropped, mirrored or sampled differently."""
    source, mirrored = coded(size), set()
    dataset, clip = data.Dataset(source, split, 3, *crop), source.clips[split][0]
    scale = 8 / 7 * max(crop[0] / size[0], crop[1] / size[1])
    h, w = (round(side * scale) for side in size)
    for key in itertools.product(range(2), range(20)):
        item = dataset[key]
        column, row, frame = item["video"].int().numpy()[:, :, 0]  # (T, W) each, of the first row
        step = column[0, 1] - column[0, 0]
        mirrored.add(step)
        for t, r in np.ndindex(3, 3):
            x, y = item["joints"][t, r].tolist()
            from_frame, of = frame[t, 0], (0, 2, 1)[r] if step < 0 else r
            whole = (clip.joints[from_frame, of] + 0.5) * [w / size[1], h / size[0]] - 0.5
            assert [column[t, 0] + step * x, row[t, 0] + y] == pytest.approx(whole, abs=1e-3)
            inside = -0.5 <= x < crop[1] - 0.5 and -0.5 <= y < crop[0] - 0.5
            assert item["visible"][t, r] == (inside and clip.visible[from_frame, of])
    assert mirrored == ({-1, 1} if split == "train" else {1})


def test_crops_and_mirrors():
    """Catches: a crop or mirror that is not anywhere in training, or is random in a test; the other modality hidden."""
    asked = []
    tested = data.Dataset(coded(asked=asked), "test", 4, 32, 32)
    assert same(tested[0], tested[3, 1])  # nothing is random
    hidden = [data.Dataset(tested.source, "test", 4, 32, 32, hide=hide)[0] for hide in ("joints", "video")]
    assert [item["visible"].any().item() for item in hidden] == [False, True]
    assert [(item["video"] == 128).all().item() for item in hidden] == [False, True]
    assert asked[0][1:] == ((37, 55), (slice(2, 34), slice(11, 43)))  # 32 is 7/8 of 37
    training = data.Dataset(coded(asked=asked), "train", 4, 32, 32)
    videos = [training[key]["video"].int() for key in itertools.product(range(20), range(20))]
    assert 160 < sum(bool(video[0, 0, 0, 0] > video[0, 0, 0, 1]) for video in videos) < 240  # of 400
    assert {crop[0].start for *_, crop in asked} == set(range(6))
    assert {crop[1].start for *_, crop in asked} == set(range(24))


@pytest.mark.parametrize("n", [1, 2, 5, 12, 50, 663])
def test_one_frame_of_each_segment(n):
    """Catches: frames out of order, of one end only or the same in each epoch; in a test, not the middle ones."""
    asked = []
    data.Dataset(coded(n=n, asked=asked), "test", 5, 16, 16)[0]
    assert asked[0][0].tolist() == [int((t + 0.5) * n / 5) for t in range(5)]
    training = data.Dataset(coded(n=n, asked=asked), "train", 5, 16, 16)
    for epoch in range(20):
        training[epoch, 0]
        assert all(int(t * n / 5) <= frame <= min((t + 1) * n / 5, n - 1) for t, frame in enumerate(asked[-1][0]))
    assert n < 12 or len({tuple(frames) for frames, *_ in asked}) > 10


@pytest.mark.parametrize("body", ["PENN", "NTU", "COCO"])
def test_flip_pairs(body):
    """Catches: a joint that trades places with another one than its counterpart."""
    names, pairs = getattr(data, f"{body}_JOINTS"), getattr(data, f"{body}_PAIRS")
    left = [name for name in names if "left" in name]
    assert {names[a]: names[b] for a, b in pairs} == {name: name.replace("left", "right") for name in left}


def test_synthetic_clips_need_both_modalities():
    """Catches: a label that the annotated joints or the order of the figures give away, or that is the other one's."""
    swing, actors = np.linspace(0, 1, 9), []
    poses = np.concatenate([data.pose(action, swing, 1) for action in range(4)])
    lengths = np.linalg.norm(np.subtract(*(poses[:, list(ends)] for ends in zip(*data.PENN_EDGES))), axis=-1)
    assert np.allclose(lengths, lengths[0]) and abs(poses).max() < 1  # whatever the figure does
    torsos = [data.pose(action, swing, side)[:, data.TORSO] for action in range(4) for side in (0, 1)]
    assert all((torso == torsos[0]).all() for torso in torsos)
    moving = {(1, 0): "wave", (2, 0): "flap", (2, 2): "jumping jack", (0, 1): "kick"}  # wrists and ankles
    source = data.synthetic(train=400, test=2)
    clips = source.clips["train"]
    assert not np.array_equal(clips[0].joints, source.clips["test"][0].joints)
    for clip in clips:
        actors += [i for i, figure in enumerate(clip.media[0]) if np.allclose(np.float32(figure), clip.joints)]
        moves = np.ptp(clip.joints - clip.joints[:, 7:8], axis=0).max(-1) > 5
        assert data.SYNTHETIC_ACTIONS[clip.label] == moving[moves[[5, 6]].sum(), moves[[11, 12]].sum()]
    seen = np.mean([clip.visible for clip in clips], (0, 1))
    assert (np.flatnonzero(seen) == data.TORSO).all() and (seen[data.TORSO] > 0.9).all() and seen.max() < 1
    assert len(actors) == 400 and 0.4 < np.mean(actors) < 0.6
    assert np.bincount([clip.label for clip in clips], minlength=4).min() > 70


@pytest.mark.parametrize("height, width", [(128, 128), (96, 160)])
def test_synthetic_figures_are_drawn_at_their_joints(height, width):
    """Catches: limbs drawn elsewhere, at other frames or in another colour; a crop of another place."""
    (start, end), frames = np.array(data.PENN_EDGES).T, np.array([1, 6, 14])
    for clip in data.synthetic(train=8, test=1).clips["train"]:
        video = data.draw(clip.media, frames, (height, width), all_of(height, width)).video.astype(int)
        part = data.draw(clip.media, frames, (height, width), np.s_[5:60, 9:80]).video
        assert np.array_equal(part, video[:, 5:60, 9:80])
        figure = clip.media[0][1][frames]  # the one in front
        for t, places in enumerate(np.concatenate([figure, (figure[:, start] + figure[:, end]) / 2], 1)):
            places = (places + 0.5) * [width / 64, height / 64] - 0.5
            x, y = places[((places > 1) & (places < [width - 2, height - 2])).all(1)].round().astype(int).T
            assert len(x) > 5 and abs(video[t, y, x] - clip.media[1][1]).max() <= 1


def options(*words):
    parser = argparse.ArgumentParser()
    data.add_flags(parser)
    return parser.parse_args([*map(str, words)])


def test_the_example_of_a_source(tmp_path, monkeypatch):
    """Catches: a docstring whose example does not run, or is not reached by `--data`."""
    example = data.__doc__.split("joints (frames, 2, 2):")[1].split("`python -m")[0]
    monkeypatch.setattr(data, "SOURCES", data.SOURCES.copy())
    exec(textwrap.dedent(example), vars(data).copy())
    for name in ("clap/10", "wave/11", "wave/12"):
        path = write_video(tmp_path / f"{name}.mp4", numbered(6, 36, 64))
        np.save(path.with_suffix(".npy"), np.full((6, 2, 2), [[320.0, 180], [np.nan, 5]]))
    source = data.load(options("--data", "two_hands", "--root", tmp_path))
    assert [[clip.label for clip in clips] for clips in source.clips.values()] == [[1, 1], [0]]
    assert data.Dataset(source, "test", 4, 24, 24)[0]["visible"].tolist() == [[True, False]] * 4


FLAGS = {
    "--data pennaction --root {0}/nowhere": "--root: there is no folder {0}/nowhere",
    "--data pennaction --root {0}": "{0}/labels/0001.mat .*dreamdragon.github.io/PennAction",
    "--data ntu60-xsub --root {0}": "no NTU RGB.D in {0}: .*rose1",
    "--data finegym --root {0}": "{0}/gym_hrnet.pkl: .* No such file",
    "--root {0}": "--root: the synthetic clips are drawn",
    "--data pyskl --root {0}": "--data pyskl needs --annotations",
    "--data pyskl --root {0} --annotations {0}/no.pkl": "--annotations: there is no file {0}/no.pkl",
    "--annotations a.pkl": "--annotations is not for --data synthetic",
    "--data finegym --split-val test": "--split-val is not for --data finegym",
    "--data ntu60-xsub --min-score 0.5": "--min-score is not for --data ntu60-xsub",
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_that_cannot_be_used(tmp_path, words):
    """Catches: a flag that is ignored; a missing data set without what was looked for and where to get it."""
    said = FLAGS[words].format(tmp_path)
    with pytest.raises(data.UsageError if said.startswith("--") else data.DataError, match=said):
        data.load(options(*words.format(tmp_path).split()))


def test_output_that_a_terminal_cannot_show(monkeypatch):
    """Catches: a name in another script that ends a program at its `print`; a notebook, whose output is another one."""
    for stream in (io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        data.escape_output()
        print("\u4e2d")
    assert stream.getvalue() == "\u4e2d\n"


# Penn Action
def write_penn_clip(root, i, **changes):
    """Clip i + 1 in the layout of Penn Action; red, green and blue dots at the first three joints."""
    savemat = pytest.importorskip("scipy.io", reason="needs scipy, the decoder of Penn Action's labels").savemat
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    (height, width), rng = (48, 36) if i == 2 else (30, 44), np.random.default_rng(i)  # one portrait clip
    x, y = (np.stack([rng.permutation(np.arange(1, side + 1))[:13] for _ in range(8)]) for side in (width, height))
    kind = np.uint8 if i % 2 else np.float64
    label = {
        "action": data.PENN_ACTIONS[i % 15], "train": 1 if i % 2 else -1, "x": x.astype(kind), "y": y.astype(kind),
        "visibility": rng.integers(2, size=(8, 13)).astype(np.uint8), "dimensions": np.uint16([height, width, 8]),
    }  # fmt: skip
    folder = root / "frames" / f"{i + 1:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    savemat(root / "labels" / f"{i + 1:04d}.mat", label | changes)
    for t in range(8):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[y[t, :3] - 1, x[t, :3] - 1, [0, 1, 2]] = 255  # in MATLAB's one-based pixels
        image.fromarray(frame).save(folder / f"{t + 1:06d}.jpg", quality=95, subsampling=0)


@pytest.fixture
def penn(tmp_path):
    """A small Penn Action root: 2 x 60 clips of 8 frames; every joint of 0005 is a placeholder."""
    for i in range(120):
        absent = dict(x=np.ones((8, 13)), y=np.ones((8, 13)), visibility=np.zeros((8, 13)))
        write_penn_clip(tmp_path, i, **absent if i == 4 else {})
    return tmp_path


def test_penn_action_labels(penn):
    """Catches: the other split, another class, portrait sizes exchanged, a file of macOS taken for a label."""
    (penn / "labels" / "._0001.mat").write_bytes(b"left there by macOS")
    source = data.penn_action([penn])
    assert not source.problems and source.classes == sorted(source.classes) and len(source.classes) == 15
    for split, first in (("train", 2), ("test", 1)):
        assert [clip.name for clip in source.clips[split]] == [f"{i:04d}" for i in range(first, 121, 2)]
        for clip in source.clips[split]:
            assert clip.label == (int(clip.name) - 1) % 15 and len(clip.joints) == 8
            assert clip.size == ((48, 36) if clip.name == "0003" else (30, 44))


def test_penn_action_joints_that_are_absent(tmp_path):
    """Catches: occluded joints dropped; placeholders or what is not finite taken for joints."""
    x, visible = np.full((1, 13), 20.0), np.ones((1, 13), np.uint8)
    y = x + 3
    x[0, :7], y[0, :7], visible[0, :6] = [1, 1.52, 0, 9, 1, 5, 1], [1, 1.52, 0, 9, 1.5, 7, 1], 0
    x[0, 7], y[0, 8] = np.nan, np.inf
    write_penn_clip(tmp_path, 0, x=x, y=y, visibility=visible)
    (clip,) = data.penn_action([tmp_path]).clips["test"]
    assert clip.visible.tolist() == [[False] * 3 + [True] * 4 + [False] * 2 + [True] * 4]


@pytest.mark.parametrize("i", [0, 1, 2], ids=["float", "unsigned", "portrait"])
def test_penn_action_dots_lie_at_their_joints(tmp_path, i):
    """Catches: colours exchanged, one-based pixels, unsigned coordinates that wrap, a crop of another place or size."""
    write_penn_clip(tmp_path, i)
    source = data.penn_action([tmp_path])
    (clip,) = source.clips["train"] + source.clips["test"]
    video = source.read(clip.media, np.arange(8), clip.size, all_of(*clip.size)).video
    for t, c in np.ndindex(8, 3):
        assert np.unravel_index(video[t, ..., c].argmax(), clip.size) == tuple(clip.joints[t, c, ::-1])
    assert clip.joints.min() == 0 and clip.joints.dtype == np.float32
    for size in ((90, 120), (23, 17), clip.size):
        scaled = source.read(clip.media, np.arange(8), size, all_of(*size)).video.astype(int)
        for crop in ((slice(5, 16), slice(3, 17)), (slice(size[0] - 7, size[0]), slice(size[1] - 9, size[1]))):
            part = source.read(clip.media, np.array([7, 2]), size, crop).video
            assert abs(part - scaled[[7, 2], crop[0], crop[1]]).max() <= 1


@pytest.mark.parametrize("height, width", [(270, 481), (393, 480)])
def test_frames_whose_sides_the_decoder_cannot_halve(tmp_path, height, width):
    """Catches: a decoder that rounds up the sides of a smaller frame, and so moves pixels away from their joints."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    row, column = np.mgrid[:height, :width]
    x, y = width - 20, height - 20
    dot = 250 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 72)
    image.fromarray(np.repeat(dot[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "000001.jpg", quality=95)
    for part in (2.3, 4.1, 8.2):
        size = round(height / part), round(width / part)
        frame = data.read_jpegs(tmp_path, np.array([0]), size, all_of(*size)).video[0, ..., 0].astype(float)
        frame[frame < 20] = 0
        found = [(frame * axis).sum() / frame.sum() for axis in np.mgrid[: size[0], : size[1]]]
        expected = (y + 0.5) * size[0] / height - 0.5, (x + 0.5) * size[1] / width - 0.5
        assert abs(np.subtract(found, expected)).max() < 0.1


def test_bad_clips_are_replaced_in_training(tmp_path):
    """Catches: a bad frame that ends training, a replacement that nobody is told about, or a search without end."""
    for i in (1, 3, 5):
        write_penn_clip(tmp_path, i)
    (tmp_path / "frames" / "0002" / "000003.jpg").unlink()
    dataset = data.Dataset(data.penn_action([tmp_path]), "train", 8, 24, 24)
    other, item = dataset[0, 1], dataset[0, 0]
    batch = data.collate([other, item])
    assert item["name"] == other["name"] == "0004" and batch["label"].tolist() == [3, 3] and not other["bad"]
    ((name, why),) = batch["bad"]
    assert name == "0002" and why.startswith(f"{tmp_path}/frames/0002/000003.jpg: ")
    assert torch.equal(batch["video"], torch.stack([other["video"], item["video"]]))
    assert batch["video"].is_contiguous(memory_format=torch.channels_last_3d)
    (tmp_path / "frames" / "0004" / "000003.jpg").unlink()
    assert [name for name, _ in dataset[0, 0]["bad"]] == ["0002", "0004"]
    (tmp_path / "frames" / "0006" / "000003.jpg").unlink()
    with pytest.raises(data.BadClip, match="0006/000003.jpg"):
        dataset[0, 0]


@pytest.mark.parametrize("workers, damage", [(0, "PNG"), (1, "cut"), (1, "empty")])
def test_a_bad_clip_ends_a_test_with_one_line(tmp_path, workers, damage):
    """Catches: a damaged frame taken as it is, a clip that vanishes from a test, a worker's traceback for one line."""
    for i in (0, 2):
        write_penn_clip(tmp_path, i)
    path = tmp_path / "frames" / "0003" / "000005.jpg"
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"")
    if damage == "PNG":
        pytest.importorskip("PIL.Image").new("RGB", (36, 48)).save(path, "PNG")
    dataset = data.Dataset(data.penn_action([tmp_path]), "test", 8, 24, 24)
    line, said = "", "truncated" if damage == "cut" else "identify"
    try:
        list(torch.utils.data.DataLoader(dataset, collate_fn=data.collate, num_workers=workers))
    except data.BadClip as error:
        line = str(error)
        error.__traceback__ = None  # is in a cycle with the loader, which takes 5 s to end when that is collected
    assert line.startswith(f"{path}: ") and "\n" not in line and said in line


LABELS = {
    "action 'juggling', train 1: expected one of the 15 actions, and 1 or -1": dict(action="juggling"),
    "train 0: expected one of the 15 actions, and 1 or -1": dict(train=0),
    "visibility (8, 12), expected (frames, 13)": dict(visibility=np.ones((8, 12))),
}


@pytest.mark.parametrize("said", ["", *LABELS])
def test_penn_action_labels_that_are_damaged(tmp_path, said):
    """Catches: a damaged label that ends everything, is read as if nothing were wrong, or is not named."""
    path = tmp_path / "labels" / "0002.mat"
    write_penn_clip(tmp_path, 1, **LABELS.get(said, {}))
    path.write_bytes(path.read_bytes() if said else path.read_bytes()[:-100])
    (problem,) = data.penn_action([tmp_path]).problems
    assert problem.startswith(f"{path}: ") and problem.endswith(said)


# NTU RGB+D
KINECT = 72057594037944738  # ids of the Kinect lie near 2^56, where a float64 tells only multiples of 16 apart


def body(x, y, wide=0.4, high=1.7, wobble=0.0):
    """25 joints as .skeleton holds them: a column of a person at x, y of the colour image, 3 m away."""
    at = np.linspace(-0.5, 0.5, 25)
    place = np.stack([at * wide + (x - 960) / 300 + wobble, -at * high, np.full(25, 3.0)], -1)
    colour = np.stack([x + at * 60 + 300 * wobble, y + at * 300], -1)
    return np.concatenate([place, colour / 4, colour, np.zeros((25, 4)), 1 + np.arange(25)[:, None] % 2], 1)


def skeleton(frames):
    """The text of a .skeleton file of frames [[(id, body), ...], ...]: CRLF, 10 fields a body, 12 a joint."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for identity, joints in bodies:
            lines += [f"{identity} 0 1 1 1 1 0 0.027 0.057 2", "25"]
            lines += [" ".join(f"{v:.7g}" for v in row[:-1]) + f" {row[-1]:.0f}" for row in joints]
    return ("\r\n".join(lines) + "\r\n").encode()


def persons(frames):
    return data.two_persons(*data.parse_skeleton(skeleton(frames)))


def stands(joints, slot, bodies):
    """Whether the person of a slot stands where these bodies do."""
    return np.allclose(joints[:, 25 * slot : 25 * slot + 25], [row[:, 5:7] for row in bodies], atol=0.01)


WALKER = [body(900, 500, wobble=0.03 * (t % 4)) for t in range(30)]

LEFT, RIGHT = ([body(x, 500, wobble=w * (t % 5)) for t in range(40)] for x, w in ((500, 0.02), (1300, 0.05)))

PAIRS = [[(KINECT, left), (KINECT - 4, right)] for left, right in zip(LEFT, RIGHT)]

SLOTS = {
    "steady": PAIRS,
    "order changes": [pair[:: 1 if t % 2 else -1] for t, pair in enumerate(PAIRS)],
    "renamed": PAIRS[:20] + [[(KINECT + 32, right), (KINECT + 16, left)] for (_, left), (_, right) in PAIRS[20:]],
    "named back": [[(KINECT + 16 * (10 <= t < 15), left), right] for t, ((_, left), right) in enumerate(PAIRS)],
    "an id twice": [[*pair, (KINECT, body(50, 50))] for pair in PAIRS],
}


@pytest.mark.parametrize("case", SLOTS)
def test_ntu_bodies_keep_their_slots(case):
    """Catches: ids read as floats, which merge two persons; slots that swap where the order or an id changes."""
    joints, visible = persons(SLOTS[case])
    assert joints.shape == (40, 50, 2) and visible.all() and joints.dtype == np.float32
    assert stands(joints, 0, RIGHT) and stands(joints, 1, LEFT)  # who moves more comes first


def test_ntu_frames_without_a_body_keep_their_place():
    """Catches: empty frames dropped, so that joints no longer match the video; a person taken for two."""
    joints, visible = persons([[] if 10 <= t < 15 else [(1, WALKER[t])] for t in range(30)])
    assert len(joints) == 30 and not visible[10:15].any() and not visible[:, 25:].any()
    assert visible[[*range(10), *range(15, 30)], :25].all() and stands(joints[15:], 0, WALKER[15:])
    assert persons([[]] * 4)[0].shape == (4, 50, 2) and not persons([[]] * 4)[1].any()


GHOSTS = [(1, 11, 0.4, 30), (0, 12, 0.4, 30), (0, 30, 1.3, 30), (1, 30, 1.4, 30), (1, 30, 2.0, 21), (0, 29, 2.0, 20)]


@pytest.mark.parametrize("ghost, seen, wide, often", GHOSTS)
def test_ntu_ghosts(ghost, seen, wide, often):
    """Catches: a chair taken for a person: seen in at most 11 frames, or wider than 0.8 of its height in 7 of 10."""
    chair = [(2, body(1500, 600, wide=wide if t < often else 0.4, wobble=0.1 * (t % 3))) for t in range(seen)]
    joints, visible = persons([[(1, WALKER[t]), *chair[t : t + 1]] for t in range(30)])
    assert visible[:, 25:].any() != ghost and stands(joints, 1 - ghost, WALKER)
    assert persons([chair[t : t + 1] for t in range(30)])[1].any()  # better a ghost than nobody


@pytest.mark.parametrize("metres, renamed", [(0.9, True), (1.1, False)])
def test_ntu_renamed_persons(metres, renamed):
    """Catches: somebody else taken for the same person, or one who was renamed for somebody else."""
    moved = body(1000 + 300 * metres, 500)  # from where the first id ends
    visible = persons([[(1, body(300 + 50 * t, 500))] if t < 15 else [(2, moved)] for t in range(30)])[1]
    assert visible[:15, :25].all() and visible[15:, :25].all() == renamed


def test_ntu_the_two_who_move_most():
    """Catches: persons in the order of the file; one who seems to move because he was lost for a while."""
    many = [[(i, body(100 + 300 * i, 500, wobble=0.01 * i * (t % 3))) for i in range(6)] for t in range(30)]
    many[3][5][1][0, 0] = np.nan
    joints, _ = persons(many)
    assert stands(joints[:1], 0, [body(1600, 500)]) and stands(joints[:1], 1, [body(1300, 500)])
    for t in range(8, 12):
        many[t][0] = 0, np.zeros((25, 12))
    assert np.array_equal(persons(many)[0], joints)


def test_ntu_joints_that_are_lost():
    """Catches: joints visible that are not finite, outside the image, not tracked or a line of zeros."""
    lost = body(900, 500)
    lost[:5, 5] = np.nan, np.inf, -np.inf, 1920, -3
    lost[5:8, 6] = np.nan, 1080, -1
    lost[8, 11], lost[9, :11], lost[10, :2] = 0, 0, np.nan  # a place that is unknown in metres does not matter
    _, visible = persons([[(1, lost)]] * 12)
    assert not visible[:, :10].any() and visible[:, 10:25].all()


WALK = skeleton([[(KINECT, row)] for row in WALKER[:12]])


SKELETONS = {
    "it breaks off": WALK[:-100],
    "24 joints, expected 25": WALK.replace(b"25\r\n", b"24\r\n", 1),
    "'z'": WALK.replace(b" 3 ", b" z ", 1),
    "it has no frame": b"0\n",
}


@pytest.mark.parametrize("said", SKELETONS)
def test_ntu_skeletons_that_are_damaged(tmp_path, said):
    """Catches: a damaged skeleton that ends a worker, is read as if nothing were wrong, or is not named."""
    path = tmp_path / "a.skeleton"
    path.write_bytes(SKELETONS[said])
    with pytest.raises(data.BadClip, match=f"a.skeleton: .*{said}"):
        data.ntu_annotate(data.Clip("a", 0, None, None, (9, 9), ([path], path)))


NTU_TESTED = {3, 6, 7, 10, 11, 12, *range(20, 25), 26, 29, 30, 32, 33, 36, 37, *range(39, 45), 48, 51, *range(60, 70)}
NTU_TESTED |= {71, 72, 73, 75, 76, 77, 79, 87, 88, 90, 96, 99, 101, 102, 104, 105, 106}  # of the performers 1 to 106


@pytest.mark.parametrize("protocol", data.NTU_PROTOCOLS)
def test_ntu_protocols(protocol):
    """Catches: a performer, camera or setup on the wrong side of a split."""
    actions, trains = data.NTU_PROTOCOLS[protocol][:2]
    assert protocol.startswith(f"ntu{actions}-")
    for s, c, p in itertools.product(range(1, 33), (1, 2, 3), range(1, 41 if actions == 60 else 107)):
        tested = {"xsub": p in NTU_TESTED, "xview": c == 1, "xset": s % 2 == 1}[protocol.split("-")[1]]
        assert trains(s, c, p) != tested


# Videos
def write_video(path, pictures, rate=30, gop=250):
    """Encode uint8 (n, h, w, 3) as NTU does: one key frame, B-frames, and in AVI no time stamps of their order."""
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "3", "g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def numbered(n, height=54, width=96):
    """Frames whose red says which they are."""
    colours = np.stack([np.arange(n) * 5 + 20, np.full(n, 120), np.full(n, 70)], -1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (n, height, width, 3)).copy()


def turn(path, turns):
    """Let an mp4 say that it is shown turned by so many quarters to the right."""
    content, (x, y) = bytearray(path.read_bytes()), [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # of the stored x axis
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", x << 16, y << 16, 0, -y << 16, x << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("ending", ["_rgb.avi", ".mp4"])
def test_video_frames_are_counted_in_the_order_they_are_shown(tmp_path, ending):
    """Catches: frames by time stamp or by seeking, where frame i - 2 comes back for i; red and blue exchanged."""
    pictures, frames = numbered(40), np.array([0, 3, 3, 17, 38, 39])
    path = write_video(tmp_path / f"clip{ending}", pictures)
    video, count, size = data.read_video(path, frames, (27, 48), all_of(27, 48))
    assert video.shape == (6, 27, 48, 3) and abs(video - pictures[frames, :27, :48].astype(int)).max() < 4
    assert (count, size) == (40, (54, 96)) and data.video_length(path) == 40
    assert len(data.read_video(path, np.array([2, 40]), (27, 48), all_of(27, 48)).video) == 1


def test_a_video_that_breaks_off(tmp_path):
    """Catches: what is left of a file taken for a shorter video, over which the joints are then spread."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 54, 96, 3), np.uint8)
    path = write_video(tmp_path / "clip.avi", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(data.BadClip, match="empty.mp4: .*Invalid data"):
        data.video_length(tmp_path / "empty.mp4")
    for read in (data.video_length, lambda path: data.read_video(path, np.array([0]), (27, 48), all_of(27, 48))):
        with pytest.raises(data.BadClip, match="clip.avi: it breaks off"):
            read(path)


def cut_video(full, path, start):
    """Leave out packets before one that is no key frame: an mp4 hides them, other formats lose them."""
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    with av.open(str(full)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and (path.suffix == ".mp4" or number >= start):
                if path.suffix == ".mp4":
                    ticks = round(start / 30 / packet.time_base)
                    packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                packet.stream = stream
                new.mux(packet)
    with av.open(str(path)) as container:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])


@pytest.mark.parametrize("ending, start", [("mp4", 17), ("avi", 11), ("mkv", 11)])
@pytest.mark.parametrize("T", [6, 8, 12, 40])
def test_joints_follow_a_video_that_was_cut(tmp_path, ending, start, T):
    """Catches: frames chosen by a number of packets, of which a decoder shows fewer: joints drift from the picture."""
    pictures, t = np.full((40, 128, 192, 3), (20, 60, 90), np.uint8), np.arange(40)
    corners = np.stack([30 + 60 * (t % 2) + t, 10 + 17 * t % 90], -1)  # of a square that jumps
    for picture, (x, y) in zip(pictures, corners):
        picture[y : y + 10, x : x + 10] = 240, 40, 70
    path = tmp_path / f"cut.{ending}"
    left = cut_video(write_video(tmp_path / f"full.{ending}", pictures, gop=16), path, start)
    assert (data.video_length(path) == len(left)) == (ending == "mp4")  # an mp4 marks the packets that it hides
    centres = np.stack([np.argwhere(picture[..., 0] > 130).mean(0)[::-1] for picture in left])
    keypoint = np.repeat(centres[None, :, None], 17, 2)
    own = entry("cut", keypoint=keypoint, keypoint_score=None, img_shape=(128, 192))
    content = dict(split=dict(train=["cut"], val=[]), annotations=[own])
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    source, apart = data.pyskl([tmp_path], tmp_path / "own.pkl"), []
    for source.spread, epoch in itertools.product((True, False), range(4)):
        item = data.Dataset(source, "train", T, 112, 112)[epoch, 0]
        for t in np.flatnonzero(item["visible"][:, 0]):
            at = np.argwhere(item["video"][0, t].numpy() > 130).mean(0)[::-1]
            apart.append(np.linalg.norm(at - item["joints"][t, 0].numpy()))
    assert len(apart) > 3 * T and np.mean(apart) < 1


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_video_that_is_stored_on_its_side(tmp_path, turns):
    """Catches: a phone's video whose frames do not stand upright, as its joints do; a crop of another place."""
    frames = np.full((3, 64, 96, 3), 20, np.uint8)
    frames[:, :20, :30] = 230, 150, 60  # top left as stored
    path = write_video(tmp_path / "phone.mp4", frames)
    turn(path, turns)
    size, crop = (96, 64) if turns % 2 else (64, 96), (slice(10, 50), slice(4, 44))
    video, _, shown = data.read_video(path, np.arange(3), size, all_of(*size))
    upright = np.rot90(frames, -turns, (1, 2)).astype(int)
    assert shown == size and video.shape == upright.shape and abs(video - upright).mean() < 5
    assert np.array_equal(data.read_video(path, np.arange(3), size, crop).video, video[:, crop[0], crop[1]])


def test_a_cover_picture_is_no_video(tmp_path):
    """Catches: the picture of a file's cover read as its only frame, where it is the first video stream."""
    av, path = pytest.importorskip("av", reason="needs av, the decoder of videos"), tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        video, cover = container.add_stream("libx264", rate=30), container.add_stream("mjpeg")
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, form in ((cover, "yuvj420p"), (video, "yuv420p")):
            stream.height, stream.width, stream.pix_fmt = 54, 96, form
        for stream, n in ((cover, 1), (video, 6)):
            for picture in numbered(n):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode())
    content = path.read_bytes()
    start, cover = content.index(b"moov") + 4, content.index(b"udta") - 4  # the cover lies behind the video: exchange
    path.write_bytes(content[:start] + content[cover:] + content[start:cover])
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition == av.stream.Disposition.attached_pic
    assert data.read_video(path, np.arange(6), (54, 96), all_of(54, 96)).count == data.video_length(path) == 6


SAMPLES = ["S001C001P001R001A001", "S001C002P003R001A060", "S018C003P041R002A061", "S002C001P001R003A007"]


@pytest.fixture
def ntu(tmp_path):
    """Three roots with four samples, of 14 frames whose joint 3 is a green dot; the second skeleton has 13."""
    walker = [body(700 + 40 * t, 500) for t in range(14)]
    row, column = np.mgrid[:108, :140]  # the colour camera is ten times as high, the frames are squeezed
    dots = np.full((14, 108, 140, 3), 16, np.uint8)
    for t, (x, y) in enumerate((joints[3, 5:7] + 0.5) * [140 / 1920, 0.1] - 0.5 for joints in walker):
        dots[t, ..., 1] += (200 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 8)).astype(np.uint8)
    for i, (name, ending) in enumerate(zip(SAMPLES, ("_rgb.avi", ".mp4", "_rgb.mp4", "_rgb.avi"))):
        write_video(tmp_path / "rgb" / name[:4] / (name + ending), dots)
        path = tmp_path / f"skeletons {i % 2}" / f"{name}.skeleton"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(skeleton([[(KINECT, joints)] for joints in walker[: 13 if i == 1 else 14]]))
    return [tmp_path / "rgb", tmp_path / "skeletons 0", tmp_path / "skeletons 1"]


def test_ntu_pairs_videos_and_skeletons(ntu, capsys):
    """Catches: clips paired wrongly, a label that counts from 1, a half that is missing unnoticed, joints elsewhere."""
    (ntu[1] / "S003C001P001R001A001.skeleton").write_bytes(skeleton([[]]))
    write_video(ntu[0] / "S003C001P001R001A002_rgb.avi", numbered(2))
    source = data.ntu(ntu, "ntu120-xsub")
    assert "63,360 and 51,120" in capsys.readouterr().err and len(source.classes) == 120
    assert [(clip.name, clip.label) for clip in source.clips["train"]] == [(SAMPLES[0], 0), (SAMPLES[3], 6)]
    assert [(clip.name, clip.label) for clip in source.clips["test"]] == [(SAMPLES[1], 59), (SAMPLES[2], 60)]
    assert source.missing == ["S003C001P001R001A001 has no video", "S003C001P001R001A002 has no skeleton"]
    assert source.joint_names[:50:25] == ["spine base 1", "spine base 2"] and not source.problems
    assert source.flip_pairs == [(a + person, b + person) for person in (0, 25) for a, b in data.NTU_PAIRS]
    for item in (data.Dataset(source, split, 14, 80, 120)[0] for split in source.clips):
        assert item["visible"][:, 3].any() and not item["visible"][:, 25:].any()
        for t in np.flatnonzero(item["visible"][:, 3]):
            row, column = divmod(item["video"][1, t].argmax().item(), 120)
            assert (item["joints"][t, 3] - torch.tensor([column, row])).abs().max() < 1.5


@pytest.mark.parametrize("n, taken", [(13, True), (12, False), (16, False)])
def test_ntu_videos_beside_each_other(ntu, n, taken):
    """Catches: a video that broke off taken for the original, because it is smaller; a good one not taken."""
    path = write_video(ntu[1] / f"{SAMPLES[0]}.mp4", numbered(n, 36, 64))
    source = data.ntu(ntu, "ntu60-xsub")
    assert (source.annotate(source.clips["train"][0]).media == path) == taken
    (ntu[0] / "S001" / f"{SAMPLES[0]}_rgb.avi").unlink()
    (clip, _), said = data.ntu(ntu, "ntu60-xsub").clips["train"], contextlib.nullcontext()
    if not taken:
        said = pytest.raises(data.BadClip, match=f"{path}: {SAMPLES[0]} has joints of 14 frames, but {n} frames")
    source.clips["test"] = [clip]
    with said:
        assert data.Dataset(source, "test", 14, 24, 24)[0]["video"].shape[1] == 14


@pytest.mark.parametrize("actions, warned", [(60, {60: False, 120: True}), (120, {60: False, 120: False})])
def test_ntu_lists_of_missing_skeletons(ntu, capsys, actions, warned):
    """Catches: a list that is not read, or the shorter one taken for the longer; a sample of the other data set."""
    path = ntu[2] / f"ntu_rgbd{'' if actions == 60 else 120}_samples_with_missing_skeletons.txt"
    path.write_text(f"Some prose.\n\n{SAMPLES[2]}\n{SAMPLES[3]}\n")
    for of, expected in warned.items():
        source = data.ntu(ntu, f"ntu{of}-xsub")
        assert ("warning" in capsys.readouterr().err) == expected
        assert [clip.name for clips in source.clips.values() for clip in clips] == SAMPLES[:2]


# Pickles
LONG = "0LtLS9wROrk_E_002407_002435_A_0003_0005"


def entry(name, n=8, persons=1, **changes):
    """An annotation of pyskl's form, in float16 as in its files."""
    rng = np.random.default_rng(n)
    keypoint = rng.uniform(5, 55, (persons, n, 17, 2)).astype(np.float16)
    score = rng.uniform(0.1, 0.9, (persons, n, 17)).astype(np.float16)
    return dict(frame_dir=name, label=3, img_shape=(60, 100), keypoint=keypoint, keypoint_score=score) | changes


def write_gym(root, annotations, train, val, **more):
    """Entries, their splits and their videos, of 12 frames, in FineGYM's layout."""
    for name in ("0LtLS9wROrk_002407_002435_0003_0005", "two", "S001C001P001R001A001_rgb"):
        write_video(root / "subactions" / f"{name}.mp4", numbered(12, 60, 100))
    content = dict(split=dict(train=train, val=val), annotations=annotations) | more
    (root / "gym_hrnet.pkl").write_bytes(pickle.dumps(content))
    return data.finegym([root])


class Gadget:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


# numpy itself crashes at an array of ten objects whose list is empty
FEW = Gadget(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (10,), np.dtype("O"), False, []))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_hold_the_arrays_that_were_written(tmp_path, protocol):
    """Catches: an array of another order, type or shape; the names of numpy 1 or of a protocol that are refused."""
    plain, path = np.random.default_rng(0).random((2, 3, 4)), tmp_path / "own.pkl"
    objects = np.array([{"a": 1}, None, "text", [2]], object).reshape(2, 2)
    arrays = [plain, plain.T, plain.astype("f2"), plain.astype(">f4"), plain.transpose(1, 0, 2), plain[:0], plain > 0.5]
    arrays += [np.float32(1.5), np.array(["ab", "c"]), np.asfortranarray(plain), objects, objects.T]
    one = np.array([dict(frame_dir="x", all=arrays, raw=[b"", b"\xff"])], object)
    split = defaultdict(list, a=np.array(["x"], object), b=np.array([], str))
    content = pickle.dumps(dict(split=split, annotations=one), protocol)
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core") if protocol < 4 else content)
    _, entries, train, test = data.read_pickle(path, ("a", "b"))
    assert (train, test) == ({"x"}, set()) and entries["x"][1]["raw"] == [b"", b"\xff"]
    for array, read in zip(arrays, entries["x"][1]["all"], strict=True):
        assert np.array_equal(read, array) and read.shape == array.shape and read.dtype.str[1:] == array.dtype.str[1:]


def test_pyskl(tmp_path):
    """Catches: persons padded with zeros or joints of score 0 or NaN visible, scores exchanged, ids that do not fit."""
    two, third = entry("two.avi", persons=2), entry("S001C001P001R001A001", n=12, persons=3)
    two["keypoint"][0, 2, 4], two["keypoint"][1, 5:] = np.nan, 0
    two["keypoint_score"][0, 0, 0], two["keypoint_score"][1, 1, 3] = 0, np.nan
    nobody = entry(LONG, persons=0)
    annotations = [nobody, two, entry("gone", label=5), third, entry("unlisted")]
    source = write_gym(tmp_path, annotations, {"two.avi", LONG}, ["S001C001P001R001A001", "gone", "ghost"])
    assert [clip.name for clip in source.clips["train"]] == [LONG, "two.avi"] and not source.problems
    assert [clip.name for clip in source.clips["test"]] == ["S001C001P001R001A001"]
    assert source.missing == ["gone has no video", f"ghost has no annotation in {tmp_path}/gym_hrnet.pkl"]
    assert len(source.classes) == 6 and source.joint_names == [*COCO, *(f"{name} 2" for name in COCO)]
    assert source.flip_pairs == [(a + person, b + person) for person in (0, 17) for a, b in data.COCO_PAIRS]
    clip = source.clips["train"][1]
    assert (clip.label, clip.size, clip.joints.dtype) == (3, (60, 100), np.float32)
    assert np.array_equal(clip.joints, np.concatenate(two["keypoint"], 1), equal_nan=True)
    assert np.argwhere(~clip.visible[:5]).tolist() == [[0, 0], [1, 20], [2, 4]] and not clip.visible[5:, 17:].any()
    video, joints, visible = data.read_clip(source, clip, np.arange, (60, 100), all_of(60, 100))  # 8 poses, 12 frames
    row = [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7]
    assert len(video) == 12 and np.array_equal(joints, clip.joints[row], equal_nan=True)
    assert np.array_equal(visible, clip.visible[row]) and source.clips["test"][0].joints.shape == (12, 34, 2)
    assert not data.Dataset(source, "train", 4, 24, 24)[0]["visible"].any()


@pytest.mark.parametrize("least, seen", [("0", [False, True, True]), ("0.5", [False, False, True])])
def test_scores_of_joints(tmp_path, least, seen):
    """Catches: a third column that is no score, or a score below --min-score whose joint counts."""
    keypoint = np.concatenate([entry("two")["keypoint"], np.full((1, 8, 17, 1), 0.9)], -1)
    keypoint[..., :3, 2] = 0, 0.5, 0.6
    own = entry("two", keypoint=keypoint, keypoint_score=None)
    write_gym(tmp_path, [own, entry(LONG, keypoint_score=keypoint[..., 2])], ["two"], [LONG])
    source = data.load(options("--data", "finegym", "--root", tmp_path, "--min-score", least))
    for clip in source.clips["train"] + source.clips["test"]:
        assert (clip.visible[:, :3] == seen).all() and clip.visible[:, 3:].all() and clip.joints.shape == (8, 17, 2)


def test_pyskl_videos_of_one_name(tmp_path):
    """Catches: a video that is one of two; a pickle that has mmaction2's name, or a split of another name."""
    write_gym(tmp_path, [entry(LONG), entry("other", filename="two.mp4")], [LONG], ["two"])
    write_video(tmp_path / "other" / "two.mp4", numbered(3))
    path = (tmp_path / "gym_hrnet.pkl").rename(tmp_path / "gym_2d.pkl")
    one = f"{tmp_path}/other/two.mp4 and {tmp_path}/subactions/two.mp4 have one name: leave one of them there"
    assert data.finegym([tmp_path]).problems == [one]
    words = f"--data pyskl --root {tmp_path} --annotations {path}".split()
    source = data.load(options(*words, "--split-train", "val", "--split-val", "train"))
    assert [[clip.name for clip in clips] for clips in source.clips.values()] == [["two.mp4"], [LONG]]
    with pytest.raises(data.DataError, match=r"no xsub or val; its splits are \['train', 'val'\]"):
        data.load(options(*words, "--split-train", "xsub"))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(split=dict(train=[LONG], val=[f"{LONG}.mp4"])), "training and test alike, such as 0LtL"),
        (dict(annotations=[entry("two"), entry("two.avi")]), "two of its entries have one name"),
        (dict(split=dict(train="two", val=[])), "no clip of it can be used with .*: o has no annotation"),
        (dict(annotations=[entry("x"), entry(LONG, label=-1)]), f"no clip of it can be used .*{LONG}: label -1"),
        (dict(annotations=[entry("/data/two")]), "'/data/two': expected a name below"),
        (dict(split=dict(train=["a/../two"], val=[])), "'a/../two': expected a name below"),
        (dict(joint_names=["hip", "knee"]), "KeyError.'flip_pairs'"),
        (dict(joint_names=["hip", "hip"], flip_pairs=[]), r"\['hip', 'hip'\]"),
        (dict(joint_names=["hip", "knee"], flip_pairs=[(1, 2)]), r"each name once, not .*'knee'"),
        (dict(label_names=["jump", "jump", "run", "sit"]), "each name once, not .*'jump', 'jump'"),
        (dict(label_names=dict.fromkeys("abcd", "run")), "expected lists, .*'a': 'run'"),
        ([1], "expected a pickle {split, annotations}"),
        (b'{"split": {}}', "it is JSON"),
        (b"\x1f\x8b\x08", "it is gzipped"),
        (pickle.dumps(entry("two"))[:-9], "expected a pickle"),
        (pickle.dumps(entry("two")).replace(b"\x8c\x02f2", b"\x8c\x02O8"), "cannot reshape array"),
        (dict(annotations=[FEW]), "cannot reshape array"),
    ],
)
def test_pickles_that_are_not_clear(tmp_path, changes, said):
    """Catches: a clip to train and test on, an entry that counts twice, a data set of "0 clips", names that mix up."""
    content, path = changes, tmp_path / "own.pkl"
    if isinstance(changes, dict):
        content = dict(split=dict(train=["two"], val=[LONG]), annotations=[entry("two"), entry(LONG)]) | changes
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    (tmp_path / "two.mp4").touch()
    with pytest.raises(data.DataError, match=f"own.pkl: .*{said}"):
        data.pyskl([tmp_path], path)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(keypoint=np.full((1, 8, 25, 2), 9.0), keypoint_score=None), "25 joints, expected 17"),
        (dict(keypoint=np.ones((1, 0, 17, 2))), "keypoint is (1, 0, 17, 2), expected (persons, "),
        (dict(keypoint_score=np.ones((1, 7, 17))), "keypoint_score is (1, 7, 17), expected (1, 8, 17)"),
        (dict(keypoint=np.full((1, 8, 17, 2), 0.5)), "within 0..1, expected pixels"),
        (dict(label=4), "label 4, expected a whole number below 4"),
        (dict(label=1.5), "label 1.5"),
        (dict(img_shape=(0, 5)), "img_shape is (0, 5), expected (height, width)"),
        (dict(img_shape=(60, 100, 3)), "too many values"),
    ],
)
def test_entries_that_do_not_fit(changes, said):
    """Catches: an entry of another shape, unit or label that is taken as it is."""
    with pytest.raises(ValueError, match=re.escape(said)):
        data.pyskl_clip("two", entry("two", **changes), 17, 4, 0.0)


def test_pickles_with_joints_and_classes_of_their_own(tmp_path):
    """Catches: names or pairs of COCO for another skeleton, also for its second person; classes as numbers."""
    own = [entry(name, keypoint=np.full((m, 8, 3, 2), 9.0), keypoint_score=None, label=1) for name, m in GROUPS]
    names = dict(joint_names=["tail", "left ear", "right ear"], flip_pairs=[[1, 2]], label_names=["sit", "run"])
    source = write_gym(tmp_path, own, ["two"], [LONG], **names)
    assert source.joint_names == ["tail", "left ear", "right ear", "tail 2", "left ear 2", "right ear 2"]
    assert [tuple(pair) for pair in source.flip_pairs] == [(1, 2), (4, 5)] and source.classes == ["sit", "run"]
    assert data.Dataset(source, "test", 4, 56, 90)[0]["visible"].tolist() == [[True] * 3 + [False] * 3] * 4
    with pytest.raises(data.DataError, match=f"{LONG}: label 2, expected a whole number below 2"):
        write_gym(tmp_path, [own[0] | dict(label=2)], [], [LONG], **names)


GROUPS = [(LONG, 1), ("two", 2)]  # names and their persons


@pytest.mark.parametrize("shape, turns", [((60, 100), 0), ((122, 200), 2), ((100, 60), 1)])
@pytest.mark.parametrize("change", ["none", "sides", "stretched"])
def test_pyskl_compares_the_shape_of_frames(tmp_path, shape, turns, change):
    """Catches: sides exchanged, or joints of a landscape picture for a video that is stored on its side."""
    shape = {"none": shape, "sides": shape[::-1], "stretched": (shape[0], round(shape[1] * 1.05))}[change]
    source = write_gym(tmp_path, [entry("two", img_shape=shape)], ["two"], [])
    turn(tmp_path / "subactions" / "two.mp4", turns)
    source.clips["test"], said = source.clips["train"], contextlib.nullcontext()
    if change != "none":
        sizes = ["{} x {}".format(*size) for size in (shape, (100, 60) if turns % 2 else (60, 100))]
        said = pytest.raises(data.BadClip, match=f"two.mp4: .*two refer to frames of {sizes[0]}, .* has {sizes[1]} ")
    with said:
        data.Dataset(source, "test", 4, 24, 24)[0]


@pytest.mark.parametrize("scale, fits", [(1, True), (1.5, True), (3, False)])
def test_joints_of_a_larger_frame(tmp_path, scale, fits):
    """Catches: joints of the original video for one that was scaled down, which then are all outside; some may be."""
    large = entry("two")
    large["keypoint"] *= np.float16(scale)
    source = write_gym(tmp_path, [large], ["two"], [])
    source.clips["test"], said = source.clips["train"], contextlib.nullcontext()
    if not fits:
        said = pytest.raises(data.BadClip, match=r"two.mp4: most joints of two lie outside its \(60, 100\)")
    with said:
        data.Dataset(source, "test", 4, 24, 24)[0]


COCO = data.COCO_JOINTS


def test_match(tmp_path):
    """Catches: labels by number where a checkpoint has more classes, persons that others lack, a class it lacks."""
    own = [entry("two", label=0), entry(LONG, label=1)]
    source = write_gym(tmp_path, own, ["two"], [LONG], label_names=["run", "jump"])
    fitted = data.match(source, ["jump", "sit", "run"], [*COCO, *(f"{name} 2" for name in COCO)])
    assert fitted.classes == ["jump", "sit", "run"] and source.clips["test"][0].label == 1
    item = data.Dataset(fitted, "test", 4, 56, 90)[0]
    assert item["label"] == 0 and item["visible"][:, :17].any() and not item["visible"][:, 17:].any()
    assert item["joints"].shape == (4, 34, 2) and fitted.clips["train"][0].label == 2
    for classes, names, lacking in (
        (["run"], COCO, "jump"), (["run", "jump"], COCO[:16], "right ankle"), (["run", "jump"], COCO[::-1], "nose"),
    ):  # fmt: skip
        with pytest.raises(data.UsageError, match=f"the checkpoint does not know '{lacking}'"):
            data.match(source, classes, names)


@pytest.mark.parametrize("first, second", [("", None), ("", " 2"), (" 1", " 2")])
def test_one_clip(tmp_path, first, second):
    """Catches: a video of one's own with its joints elsewhere, hidden joints shown, or sides exchanged."""
    path = write_video(tmp_path / "own.mp4", numbered(8, 60, 100))
    turn(path, 1)
    own = entry("own")
    own["keypoint_score"][0, :, 4] = 0
    names = [name + person for person in (first, second) if person is not None for name in COCO]
    source = data.one_clip(path, own["keypoint"], own["keypoint_score"], names)
    item = data.Dataset(source, "test", 8, 70, 42)[0]  # of 100 x 60
    expected = (own["keypoint"][0].astype(np.float32) + 0.5) * 0.8 - [3.5, 5.5]
    assert np.allclose(item["joints"][:, :17], expected, atol=0.01) and item["name"] == "own"
    inside = ((expected >= -0.5) & (expected < [41.5, 69.5])).all(-1) & (np.arange(17) != 4)
    assert np.array_equal(item["visible"][:, :17], inside) and not item["visible"][:, 17:].any()


ONE_CLIP = {
    "2 persons with 17 joints; the checkpoint knows nose, ": dict(persons=2),
    "1 persons with 2 joints": dict(keypoint=np.full((1, 8, 2, 2), 9.0)),
    r"keypoint is \(8, 17, 2\), expected": dict(keypoint=np.ones((8, 17, 2))),
    "joints of 9 frames, but 8 frames": dict(n=9),
}


@pytest.mark.parametrize("said", ONE_CLIP)
def test_one_clip_that_does_not_fit(tmp_path, said):
    """Catches: persons, joints or rows that are not those of the checkpoint and the video, taken as they are."""
    path = write_video(tmp_path / "own.mp4", numbered(8, 60, 100))
    with pytest.raises((data.UsageError, data.BadClip), match=f"own.mp4: .*{said}"):
        source = data.one_clip(path, entry("own", **ONE_CLIP[said])["keypoint"], None, COCO)
        data.Dataset(source, "test", 4, 24, 24)[0]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_that_run_code_are_refused(tmp_path, protocol):
    """Catches: an unpickler that calls what the file names: os.system and the ways around a ban of it."""
    proof, path = tmp_path / "ran", tmp_path / "evil.pkl"
    touch, line = f"touch {proof}", f"open({str(proof)!r}, 'w')"
    calls = [(os.system, touch), (eval, line), (open, str(proof), "w"), (itertools.starmap, os.system, [(touch,)])]
    calls += [(pickle.loads, pickle.dumps(Gadget(os.system, (touch,)))), (getattr, functools.partial, "func")]
    for gadget in (Gadget(function, tuple(words)) for function, *words in calls):
        for content in (gadget, dict(split={}, annotations=[gadget]), np.array([gadget], dtype=object)):
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(data.DataError, match="evil.pkl: .*it wants"):
                data.read_pickle(path, ("train", "val"))
            assert not proof.exists()


def test_names_folders_and_links(tmp_path, monkeypatch):
    """Catches: a name that av takes for a protocol; "walk/v1" with the video of another class; a loop of links."""
    names = ["a:b", "concat:c|d", "100%d #1?", "quote\"'\\", "two\nlines", "-i", "動画", os.fsdecode(b"caf\xe9")]
    names += ["walk/v1", "run/v1", "./run//v2", "caf\u00e9/v1"]  # composed here, and not on the disk
    files = [*names[:-1], "cafe\u0301/v1", "walk/v3", "x/walk/v1"]
    for name in files:
        write_video(tmp_path / "v.mp4", numbered(2, 36, 60))
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v.mp4").rename(tmp_path / f"{name}.MP4")
    for link, target in {"walk/up": "..", "loop": ".", "self": "self", "gone": "nowhere", "far": "walk"}.items():
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    content = dict(split=dict(train=names, val=["v3.mp4"]), annotations=[entry(name) for name in [*names, "v3.mp4"]])
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    source = data.pyskl([Path(), tmp_path / "walk"], Path("own.pkl"))
    assert not source.problems and [clip.media for clip in source.clips["test"]] == [Path("walk/v3.MP4")]
    assert [clip.media for clip in source.clips["train"]] == [Path(f"{name}.MP4") for name in files[: len(names)]]
    dataset = data.Dataset(source, "train", 4, 24, 24)
    assert [dataset[0, i]["name"] for i in range(len(names))] == names


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """Catches: a folder without permission that is taken for an empty one."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.DataError, match=f"Permission denied: '{tmp_path}'"):
        data.load(options("--data", "ntu60-xsub", "--root", tmp_path))


# ---- Training, in this process -------------------------------------------------------------------------------------
TINY = "--channels 4 --height 16 --width 16 --frames 4 --heads 2 --blocks 1 --device cpu"

SMALL = TINY + " --batch 8 --epochs 2 --warmup 0.5 --workers 0"  # 5 steps an epoch on the 43 clips of `fit`


def few_clips():
    return data.synthetic(train=43, test=11)


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """`fit(flags, out=...)` runs train.main in this process on 43 synthetic clips: its status and what it printed."""
    monkeypatch.setitem(data.SOURCES, "synthetic", (few_clips, []))

    def run(flags="", out="run"):
        capsys.readouterr()
        status = train.main([*SMALL.split(), "--out", str(tmp_path / out), *flags.split()])
        return status, "".join(capsys.readouterr())

    return run


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "clips_per_second")} for line in lines]


def same_runs(one, other):
    """The same weights, averages of AdamW, best epoch and log."""
    for name in ("last.pt", "best.pt"):
        a, b = checkpoint(one, name), checkpoint(other, name)
        assert a["model"].keys() == b["model"].keys()
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        moments = [[s["exp_avg_sq"] for s in state["optimizer"]["state"].values()] for state in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
        assert a["progress"] == b["progress"] | {"seconds": a["progress"]["seconds"]}
    assert log_of(one) == log_of(other)


def with_scaler(monkeypatch):
    """Make the gradient scaler of fp16 work on a CPU, too."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))


def before_each_step(monkeypatch, change):
    """Call `change(run)` between the gradient and the update; what it returns, if anything, is the loss."""
    backward = train.backward

    def changed(run, batches):
        loss = backward(run, batches)
        other = change(run)
        return loss if other is None else loss * other

    monkeypatch.setattr(train, "backward", changed)


@pytest.mark.parametrize(
    "flags, computed, changes",
    [
        ("--hide joints", 1, True), ("--hide video", 1, True), ("--amp bf16", 1, True), ("--seed 1", 1, True),
        ("--checkpointing", 2, False), ("--compile", 2, False),
    ],
)  # fmt: skip
def test_flags_that_are_accepted_and_forgotten(flags, computed, changes, fit, tmp_path, monkeypatch):
    """Catches: a run that says it hides a modality, compiles or saves memory, and does not."""
    calls, forward = [], d3t.Block.forward
    monkeypatch.setattr(d3t.Block, "forward", lambda self, *tokens: calls.append(1) or forward(self, *tokens))
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(1) or net)
    assert fit(f"--stop-after 2 {flags}")[0] == 0 and len(calls) == 2 * computed - (flags == "--compile")
    assert fit("--stop-after 2", out="plain")[0] == 0
    losses = [checkpoint(tmp_path / out)["progress"]["loss"] for out in ("run", "plain")]
    assert (losses[0] != losses[1]) == changes  # the second loss follows from the gradient of the first


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step(scaled, fit, monkeypatch):
    """Catches: a schedule that is not used, gradients that are not clipped, or clipped before they are unscaled."""
    rates, norms, step = [], [], torch.optim.AdamW.step

    def spy(self, *words, **more):
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *words, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    if scaled:
        with_scaler(monkeypatch)
    assert fit("--stop-after 3 --clip 0.01")[0] == 0
    recipe = train.Recipe(epochs=2, warmup=0.5, lr=1e-3)
    assert rates == [train.learning_rate(recipe, 8 * n / 43) for n in (1, 2, 3)]
    assert np.allclose(norms, 0.01, rtol=1e-3)


def test_batch_statistics_in_training_alone(fit, tmp_path):
    """Catches: a model that is trained in evaluation mode, also after a test, or that learns from the test clips."""
    assert fit("--epochs 3")[0] == 0
    state = checkpoint(tmp_path / "run")
    assert state["model"]["trunk.stem.1.num_batches_tracked"] == state["progress"]["step"] == 15


def test_weights_follow_the_seed():
    """Catches: a seed that does not reach the weights, or weights that depend on what was drawn before."""
    options = argparse.Namespace(device="cpu", checkpointing=False)
    heads = []
    for seed in (3, 4, 3):
        torch.rand(len(heads))
        heads.append(train.make_model(small(), train.Recipe(seed=seed), options).head.weight)
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_weight_decay():
    """Catches: decay of norms, biases and embeddings, or no decay of matrices."""
    model = D3T(small(pose_embedding=True))
    optimizer = train.make_optimizer(model, train.Recipe(weight_decay=0.3))
    decayed, rest = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, p in model.named_parameters():
        assert id(p) in (rest if p.ndim == 1 or name.startswith(("position", "modal")) else decayed), name


def test_best(fit, tmp_path, monkeypatch):
    """Catches: the last epoch kept as the best one, or the later one of two that tie."""
    tops = iter([0.25, 0.75, 0.75, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"top1": next(tops), "mean_class": 0.1, "clips": 11}, {}))
    status, printed = fit("--epochs 4")
    assert status == 0 and "best top-1 75.00%" in printed
    assert checkpoint(tmp_path / "run", "best.pt")["progress"]["epoch"] == 2
    assert checkpoint(tmp_path / "run")["progress"] == dataclasses.asdict(train.Progress(epoch=4, step=20, best=0.75))


@pytest.mark.parametrize("every, saved", [("1", 3), ("500", None)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_is_not_saved(what, every, saved, fit, tmp_path, monkeypatch):
    """Catches: weights of NaN in the last good checkpoint, a message without the step or the last finite loss."""

    def spoil(run):
        if run.progress.step == 3 and what == "loss":
            return torch.nan
        if run.progress.step == 3:
            run.model.head.bias.grad[0] = torch.nan

    before_each_step(monkeypatch, spoil)
    status, printed = fit(f"--save-every {every}")
    assert status == 1 and f"the gradient is not finite after step {4 if saved else 5}. " in printed
    assert ("was 1." if saved else "was nan.") in printed
    assert (tmp_path / "run" / "last.pt").exists() == bool(saved)
    if saved:
        state = checkpoint(tmp_path / "run")
        assert state["progress"]["step"] == saved and all(value.isfinite().all() for value in state["model"].values())


def test_an_overflow_is_skipped(fit, tmp_path, monkeypatch):
    """Catches: a run with fp16 that ends at the first step whose gradients overflow, a scale that is not saved."""

    def overflow(run):
        if run.progress.step == 3:
            run.model.head.weight.grad[0, 0] = torch.inf

    before_each_step(monkeypatch, overflow)
    with_scaler(monkeypatch)
    assert fit("--stop-after 7")[0] == 0
    assert checkpoint(tmp_path / "run")["scaler"]["scale"] == 2**15
    assert fit("--resume")[0] == 0 and checkpoint(tmp_path / "run")["scaler"]["scale"] == 2**15


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "synthetic", (few_clips, []))
        assert train.main([*SMALL.split(), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("stop, workers", [(1, 0), (3, 2), (5, 0), (8, 1)])
def test_a_resumed_run_is_the_uninterrupted_run(stop, workers, fit, tmp_path, whole):
    """Catches: what a checkpoint forgets: the place in the epoch, the optimizer, the schedule, the best result."""
    status, printed = fit(f"--stop-after {stop}")
    assert status == 0 and f"stopped after step {stop}" in printed
    assert checkpoint(tmp_path / "run")["progress"]["step"] == stop
    status, printed = fit(f"--resume --workers {workers}")
    assert status == 0 and f"D3T goes on at step {stop}" in printed and "epoch   2" in printed
    same_runs(tmp_path / "run", whole)


def test_an_epoch_is_logged_once(fit, tmp_path, whole):
    """Catches: two lines for an epoch that ended after the last checkpoint, or the seconds before it forgotten."""
    assert fit("--stop-after 8")[0] == 0
    before = checkpoint(tmp_path / "run")
    before["progress"]["seconds"] += 1000
    assert fit("--resume")[0] == 0
    torch.save(before, tmp_path / "run" / "last.pt")  # as if the run had been killed before it was written again
    assert fit("--resume")[0] == 0
    same_runs(tmp_path / "run", whole)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 < seconds[0] < 100 and 1000 < seconds[1] < 1100


def test_another_batch_and_precision(fit, tmp_path):
    """Catches: a checkpoint that needs the batch, the parts or the precision it was written with."""
    assert fit("--stop-after 2 --accumulate 4")[0] == 0
    status, printed = fit("--resume --preset tiny --stop-after 2")
    assert status == 0 and "stopped after step 2" in printed and "accumulate=4" in printed
    assert fit("--resume --batch 16 --amp bf16")[0] == 0
    assert [(line["epoch"], line["step"]) for line in log_of(tmp_path / "run")] == [(1, 3), (2, 5)]


def batches_of(recipe, epoch=0, seen=0, rank=0, size=1):
    return train.training_batches(50, recipe, epoch, seen, argparse.Namespace(rank=rank, size=size))


def test_batches_cover_an_epoch_once():
    """Catches: a clip seen twice or by two ranks, an order that depends on the number of ranks or on a resume."""
    recipe = train.Recipe(batch=12, accumulate=2, seed=4)
    alone = batches_of(recipe, 3)
    assert [len(batch) for batch in alone] == [6] * 8 and len({clip for batch in alone for clip in batch}) == 48
    shared = [batches_of(recipe, 3, 0, rank, 3) for rank in range(3)]
    assert [len(batch) for batch in shared[0]] == [2] * 8
    for step in range(4):
        together = [clip for rank in shared for batch in rank[2 * step : 2 * step + 2] for clip in batch]
        assert sorted(together) == sorted(clip for batch in alone[2 * step : 2 * step + 2] for clip in batch)
    assert batches_of(recipe, 3, 24, 1, 3) == shared[1][4:]


@pytest.mark.parametrize("epoch, seed", [(1, 0), (0, 1)])
def test_every_epoch_and_seed_has_its_own_order(epoch, seed):
    """Catches: the same order of clips in every epoch or with every seed, or the order of the data set."""
    first, other = batches_of(train.Recipe(batch=10)), batches_of(train.Recipe(batch=10, seed=seed), epoch)
    orders = [[clip for batch in batches for _, clip in batch] for batches in (first, other)]
    assert {at for batch in other for at, _ in batch} == {epoch}
    assert sum(a == b for a, b in zip(*orders)) < 10  # of 50; one in chance
    assert sum(a == b for a, b in zip(orders[0], range(50))) < 10


def test_learning_rate():
    """Catches: a schedule stepped per epoch, a warm-up that jumps, a cosine that does not end at zero."""
    recipe = train.Recipe(epochs=90, warmup=5.0, lr=1.0)
    assert train.learning_rate(recipe, 2.5) == 0.5 and train.learning_rate(recipe, 5) == 1.0
    assert abs(train.learning_rate(recipe, 47.5) - 0.5) < 1e-12 and train.learning_rate(recipe, 90) < 1e-12
    assert train.learning_rate(recipe, 26.25) == pytest.approx(0.5 + 0.5**1.5)
    assert train.learning_rate(train.Recipe(epochs=2, warmup=1.0, lr=1.0), 0.75) == 0.75


def test_seed_and_hide_reach_the_data(fit, tmp_path):
    """Catches: a seed of the weights alone, a modality that is hidden in training and not in the test."""
    words = [*SMALL.split(), "--out", tmp_path, "--seed", 7, "--hide", "joints"]
    run = train.Run(*train.parse_args([*map(str, words)]))
    made = [run.dataset(split) for split in ("train", "test")]
    assert [(each.train, each.seed, each.hide) for each in made] == [(True, 7, "joints"), (False, 7, "joints")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_step_and_saves(name, fit, tmp_path, monkeypatch, request):
    """Catches: steps that Ctrl-C or a batch system throws away, a signal sent twice that kills, handlers that stay."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, or in the background, some are ignored
    request.addfinalizer(lambda: signal.signal(number, before))

    def interrupt(run):
        if run.progress.step == 2:
            for _ in range(1 if name == "SIGINT" else 2):
                os.kill(os.getpid(), number)
            assert run.signal == number
            assert signal.getsignal(number) == (signal.default_int_handler if name == "SIGINT" else run.on_signal)

    before_each_step(monkeypatch, interrupt)
    status, printed = fit()
    assert status == 128 + number and "stopped after step 3; go on with --resume" in printed
    assert checkpoint(tmp_path / "run")["progress"]["step"] == 3
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_during_the_exchange(fit, tmp_path, monkeypatch):
    """Catches: a signal that comes while the ranks exchange theirs, and is forgotten."""
    gather, calls = train.Ranks.gather, []

    def interrupted(self, items):
        calls.append(items)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return gather(self, items)

    monkeypatch.setattr(train.Ranks, "gather", interrupted)
    assert fit()[0] == 128 + signal.SIGTERM and checkpoint(tmp_path / "run")["progress"]["step"] == 4


def test_a_signal_that_is_ignored(fit, monkeypatch):
    """Catches: a run under nohup that ends when its terminal is closed."""
    before_each_step(monkeypatch, lambda run: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert fit("--stop-after 2")[0] == 0 and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_signal_in_a_test(fit, tmp_path, monkeypatch, whole):
    """Catches: an epoch that is lost when a signal comes in its test, a test that goes on to its end."""
    load = data.Dataset.load

    def interrupted(self, clip, rng):
        if clip.name == "test 0":
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, clip, rng)

    monkeypatch.setattr(data.Dataset, "load", interrupted)
    status, printed = fit()
    assert status == 128 + signal.SIGTERM and "stopped in a test" in printed
    assert checkpoint(tmp_path / "run")["progress"]["seen"] == 40 and not (tmp_path / "run" / "log.jsonl").exists()
    monkeypatch.setattr(data.Dataset, "load", load)
    assert fit("--resume")[0] == 0
    same_runs(tmp_path / "run", whole)


def test_a_bad_clip_counts_once():
    """Catches: a clip that counts again when other frames of it were drawn; the rule of more than one and 1 %."""
    run = argparse.Namespace(progress=train.Progress(), ranks=argparse.Namespace(rank=1))
    train.note_bad_clips(run, [("a", "frame 1"), ("a", "frame 2"), ("b", "frame 7")], 200)
    assert run.progress.bad_clips == {"a": "frame 1", "b": "frame 7"}
    train.note_bad_clips(argparse.Namespace(progress=train.Progress(), ranks=run.ranks), [("a", "frame 1")], 60)
    with pytest.raises(train.RunError, match="2 of 199 clips, more than 1 %, cannot be read:\nframe 1\nframe 7"):
        train.note_bad_clips(run, [], 199)


def test_bad_clips_of_a_run(penn, fit, tmp_path):
    """Catches: bad clips that are not counted or told, a test that leaves out a clip."""
    flags = f"--data pennaction --root {penn} --frames 8 --batch 60"
    (penn / "frames" / "0002" / "000003.jpg").write_bytes(b"")
    status, printed = fit(f"{flags} --epochs 2")
    assert status == 0 and [line["bad"] for line in log_of(tmp_path / "run")] == [1, 1]
    assert printed.count("warning: a clip was replaced") == 2 and "0002/000003.jpg" in printed  # once an epoch
    (penn / "frames" / "0003" / "000001.jpg").unlink()
    status, printed = fit(f"{flags} --eval {tmp_path}/run/best.pt")
    assert status == 1 and printed.splitlines()[-1].startswith("train.py: ") and "0003/000001.jpg" in printed


def test_scores(fit, tmp_path, whole, monkeypatch):
    """Catches: scores that are not those of the accuracy, a file overwritten, a result lost with a file not written."""
    path = tmp_path / "scores.npz"
    status, printed = fit(f"--eval {whole}/last.pt --scores {path}")
    assert status == 0
    with np.load(path) as scores:
        names, labels, logits, classes = (scores[key] for key in ("names", "labels", "logits", "classes"))
    assert classes.tolist() == data.SYNTHETIC_ACTIONS and names.tolist() == [f"test {i}" for i in range(11)]
    assert labels.tolist() == [clip.label for clip in few_clips().clips["test"]] and logits.shape == (11, 4)
    right = logits.argmax(1) == labels
    by_class = [right[labels == label].mean() for label in {*labels.tolist()}]
    expected = {"top1": right.mean(), "mean_class": np.mean(by_class), "clips": 11}
    result = json.loads(printed.splitlines()[-1])
    assert result == pytest.approx(expected) and result["top1"] != result["mean_class"]
    assert log_of(whole)[-1] == log_of(whole)[-1] | result
    assert fit(f"--eval {whole}/last.pt --scores {path}")[0] == 2

    def full(*_, **scores):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    status, printed = fit(f"--eval {whole}/last.pt --scores {tmp_path}/other.npz")
    assert status == 1 and f'"top1": {result["top1"]}' in printed


def test_a_class_without_clips(fit, whole, monkeypatch):
    """Catches: a class of which there is no test clip counted as wrong in the mean over classes."""
    source = few_clips()
    source.clips["test"] = [clip for clip in source.clips["test"] if clip.label == 1]
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    result = json.loads(fit(f"--eval {whole}/last.pt")[1].splitlines()[-1])
    assert result["mean_class"] == result["top1"]


def test_a_full_disk(fit, tmp_path, stopped, monkeypatch):
    """Catches: the last good checkpoint lost to one that did not fit, a status of 0."""
    shutil.copytree(stopped, tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, printed = fit("--resume")
    assert status == 1 and "last.pt cannot be written" in printed.splitlines()[-1] and "No space left" in printed
    assert (tmp_path / "run" / "last.pt").read_bytes() == (stopped / "last.pt").read_bytes()


def test_resume_starts_where_there_is_no_run(fit, monkeypatch):
    """Catches: a command for torchrun --max-restarts that fails the first time, or that deletes what it has trained."""
    status, printed = fit("--resume --stop-after 2")
    assert status == 0 and printed.startswith("D3T starts")
    for restarts, began in (("1", "D3T goes on at step 2"), ("0", "D3T starts")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        status, printed = fit("--overwrite --stop-after 3")
        assert status == 0 and printed.startswith(began)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after two steps; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "synthetic", (few_clips, []))
        assert train.main([*SMALL.split(), "--out", str(folder), "--stop-after", "2"]) == 0
    return folder


MISFITS = {  # what changes in a checkpoint, and what is said
    "settings of another version": ("settings", dict(dropout=0.1), "no checkpoint of this train.py: .*dropout"),
    "a recipe of another version": ("recipe", dict(momentum=0.9), "no checkpoint of this train.py: .*momentum"),
    "progress of another version": ("progress", dict(losses=[]), "no checkpoint of this train.py: .*losses"),
    "settings that cannot be": ("settings", dict(heads=3), "no checkpoint of this train.py: .*heads = 3"),
    "weights of another shape": ("model", {"head.bias": torch.zeros(3)}, "does not fit: .*head.bias"),
    "no state of the optimizer": ("optimizer", dict(param_groups=[]), "does not fit"),
    "no joint names": ("joint_names", None, "no checkpoint of this train.py: .*joint_names"),
    "cut": (None, 0.6, "no checkpoint of this train.py"),
    "empty": (None, 0, "no checkpoint of this train.py"),
}


@pytest.mark.parametrize("part, change, said", MISFITS.values(), ids=[*MISFITS])
def test_checkpoints_that_do_not_fit(part, change, said, stopped, fit, tmp_path):
    """Catches: a traceback, a run that starts from half of its state, a file that is overwritten."""
    shutil.copytree(stopped, tmp_path / "run")
    path, state = tmp_path / "run" / "last.pt", checkpoint(stopped)
    if part is None:
        path.write_bytes(path.read_bytes()[: int(change * path.stat().st_size)])
    else:
        values = state.pop(part)
        torch.save(state | ({part: values | change} if change else {}), path)
    before = path.read_bytes()
    status, printed = fit("--resume")
    assert status == 2 and re.search(said, printed) and len(printed.splitlines()) == 1, printed
    assert path.read_bytes() == before


USAGE = [
    ("", "--resume"), ("--resume --channels 8", "channels is 4, not 8"), ("--resume --lr 1", "lr is 0.001, not 1"),
    ("--resume --preset small", "kernel is 3, not 7"), ("--resume --data pennaction", "use --data synthetic"),
    ("--resume --overwrite", "--overwrite"), ("--eval RUN/last.pt --weights WIDE", "--weights"),
    ("--eval RUN/last.pt --preset small", "--preset"), ("--eval RUN/last.pt --channels 8", "channels is 4, not 8"),
    ("--eval RUN/gone.pt", "gone.pt"), ("--eval NOISE", "noise.pt"),
    ("--eval EVIL", "evil.pt is no checkpoint of this train.py: it holds more"),
    ("--eval RUN/last.pt --scores x.csv", ".npz"), ("--overwrite --scores x.npz", "--eval"),
    ("--overwrite --weights NOISE", "--weights"), ("--overwrite --weights WIDE", "wide.pt"),
    ("--overwrite --channels 8 --weights RUN/last.pt", "last.pt does not fit: "), ("--out NOISE", "noise.pt"),
    ("--overwrite --batch 7 --accumulate 2", "--batch 7"), ("--overwrite --batch 64", "43"),
    ("--overwrite --epochs -1", "epochs"), ("--overwrite --warmup 2", "warmup"), ("--overwrite --hide me", "joints"),
    ("--overwrite --warmup nan", "warmup"), ("--overwrite --seed 99999999999999999999", "seed"),
    ("--overwrite --workers -1", "--workers"), ("--overwrite --stop-after 0", "--stop-after"),
    ("--overwrite --save-every 0", "--save-every"), ("--overwrite --channels 1000000000000", "cannot be made"),
    ("--overwrite --temporal-window 5", "temporal_window = 5"), ("--overwrite --amp fp16", "fp16"),
    ("--overwrite --annotations x", "--annotations is not for"), ("--frames many", "--frames"), ("--no", "--no"),
]  # fmt: skip


@pytest.mark.parametrize("flags, said", USAGE, ids=[flags or "no flag" for flags, _ in USAGE])
def test_usage_errors(flags, said, stopped, fit, tmp_path):
    """Catches: a traceback, a run that starts with other settings than were asked for, a run that is overwritten."""
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(functools.partial(os.system, f"touch {tmp_path}/evil")))
    torch.save(d3t.Trunk(8).state_dict(), tmp_path / "wide.pt")
    for name in ("RUN", "NOISE", "EVIL", "WIDE"):
        flags = flags.replace(name, str(tmp_path / (name.lower() + ".pt" * (name != "RUN"))))
    status, printed = fit(flags)
    assert status == 2 and said in printed and len(printed.splitlines()) == 1 and len(printed) < 600, printed
    assert "weights_only" not in printed and not (tmp_path / "evil").exists()
    assert (tmp_path / "run" / "last.pt").read_bytes() == (stopped / "last.pt").read_bytes()


def test_weights_of_torchvision(fit, tmp_path):
    """Catches: weights that load in part and in silence, a command that cannot go on with --resume."""
    weights = {name: value + 1 for name, value in d3t.Trunk(4).state_dict().items()}
    torch.save(weights | {"layer4.0.conv1.0.0.weight": torch.zeros(1), "fc.bias": torch.zeros(400)}, tmp_path / "w.pt")
    model = D3T(small(channels=4))
    assert train.load_weights(model, tmp_path / "w.pt", []) == []
    assert all(torch.equal(model.trunk.state_dict()[key], value) for key, value in weights.items())
    flags = f"--weights {tmp_path}/w.pt --lr 1e-9"
    assert fit(f"{flags} --stop-after 1")[0] == 0
    trained = checkpoint(tmp_path / "run")["model"]["trunk.layer3.1.conv2.0.3.weight"]
    assert torch.allclose(trained, weights["layer3.1.conv2.0.3.weight"], atol=1e-6)
    del weights["stem.0.weight"]
    torch.save(weights, tmp_path / "w.pt")
    assert fit(f"{flags} --stop-after 2 --resume")[0] == 0
    status, printed = fit(flags, out="other")
    assert status == 2 and "stem.0.weight" in printed


def test_weights_of_a_checkpoint(fit, tmp_path, whole):
    """Catches: fine-tuning with other classes or another size that fails, forgets weights, or bends a table."""
    flags = f"--frames 6 --height 32 --weights {whole}/last.pt --lr 1e-9 --stop-after 1"
    source = few_clips()
    source.classes = [*source.classes[1:], "bow"]  # as many
    data.SOURCES["synthetic"] = lambda: source, []  # until the fixture puts back the old one
    status, printed = fit(flags)
    conv = "blocks.0.deformable.search.conv.weight"  # h was shorter than k
    assert status == 0 and f"has none: {conv}, head.weight, head.bias\n" in printed
    old, new = checkpoint(whole)["model"], checkpoint(tmp_path / "run")["model"]
    assert new["position_t"].shape[0] == new["modal"].shape[0] == 6 and new["position_s"].shape == (1, 4 * 2, 16)
    for key in old.keys() - {"position_t", "position_s", "modal", conv, "head.weight", "head.bias"}:
        assert "running" in key or "num_batches" in key or torch.allclose(old[key], new[key], atol=1e-6), key
    assert torch.allclose(new["modal"][[0, -1]], old["modal"][[0, -1]], atol=1e-6)  # beyond the old centres
    assert torch.allclose(new["modal"][1], 0.5 * (old["modal"][0] + old["modal"][1]), atol=1e-6)  # 1.5 * 4 / 6 - 0.5
    rows, before = new["position_s"].view(4, 2, 16), old["position_s"].view(2, 2, 16)
    assert torch.allclose(rows[1], 0.75 * before[0] + 0.25 * before[1], atol=1e-6)


def test_training_on_videos(fit, tmp_path):
    """Catches: joints that differ with the workers, a resume with other clips, a checkpoint that knows more refused."""
    names = [f"clip {i}" for i in range(16)]
    for i, name in enumerate(names):
        write_video(tmp_path / f"{name}.avi", numbered(12, 40, 60)[:: 1 if i % 2 else -1])
    annotations = [entry(name, persons=1 + (i > 12), label=i % 2, img_shape=(40, 60)) for i, name in enumerate(names)]
    content = {"split": {"a": names[:10], "b": [*names[10:15], "gone"]}, "annotations": annotations}
    content["label_names"] = np.array(["sit", "stand"])
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    flags = f"--data pyskl --root {tmp_path} --annotations {tmp_path}/own.pkl --split-train a --split-val b"
    for workers in (0, 1):
        status, printed = fit(f"{flags} --epochs 1 --workers {workers} --preset tiny", out=f"run-{workers}")
        assert status == 0 and "1 clips are left out: gone has no annotation" in printed
    same_runs(tmp_path / "run-0", tmp_path / "run-1")
    assert len(checkpoint(tmp_path / "run-0")["joint_names"]) == 34
    assert checkpoint(tmp_path / "run-0")["classes"] == ["sit", "stand"]
    content["split"]["b"] = names[10:]
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    status, printed = fit(f"{flags} --resume --epochs 1", out="run-0")
    assert status == 2 and "clips is [10, 5], not [10, 6]" in printed
    content["split"]["b"] = [names[10], names[12]]  # clips of the first class, of one person
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    status, printed = fit(f"{flags} --eval {tmp_path}/run-0/last.pt")
    assert status == 0 and json.loads(printed.splitlines()[-1])["clips"] == 2


def test_every_setting_is_a_flag(fit):
    """Catches: a field of the dataclasses that the command line, or its help, forgot."""
    status, printed = fit("-h")
    assert status == 0 and all(f"--{name.replace('_', '-')}" in printed for name in train.DEFAULTS)
    assert "[224; small" in printed and "[12; small 8; tiny 6]" in printed
    options, given = train.parse_args(["--no-joint-attention", "--sigma=2", "--data=pennaction", "--out=x"])
    assert given == {"joint_attention": False, "sigma": 2.0} and options.preset == "paper"


def test_a_terminal_that_is_not_utf8(fit, monkeypatch):
    """Catches: a run that ends because its terminal lacks a letter of the folder's name."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert fit("--stop-after 1", out="Übung")[0] == 0


@pytest.mark.parametrize("has_bf16, amp", [(True, "bf16"), (False, "fp16")])
def test_precision_on_cuda(has_bf16, amp, monkeypatch):
    """Catches: fp16 on a device that has bf16, or bf16 that a device without it emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    options, _ = train.parse_args([])
    assert (options.device, options.amp) == ("cuda", amp)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    with pytest.raises(train.UsageError, match="torch sees 1 CUDA devices"):
        train.parse_args([])


# ---- Training, in processes of its own -----------------------------------------------------------------------------
SERVER = multiprocessing.get_context("forkserver")  # imports torch once and forks each process below

SERVER.set_forkserver_preload(["test_d3t", "torch._dynamo"])


def process(function, words, log, environment):
    """What runs in a process: `function(words)` on 43 clips, printing to a file; its result is the exit status."""
    os.setpgrp()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as in a run of one's own
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    data.SOURCES["synthetic"] = few_clips, []
    sys.exit(function([*SMALL.split(), *map(str, words)]))


def start(folder, *words, function=train.main, ranks=1):
    """A process for each rank, without torchrun; rank r prints to FOLDER/r."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        how = (function, words, str(folder / str(rank)), address | {"RANK": str(rank)})
        started.append(SERVER.Process(target=process, args=how))
        started[-1].start()
    return started


def statuses(started):
    """The exit statuses of processes; None for one that has not ended after a minute, and is killed."""
    for each in started:
        each.join(60)
    ended = [each.exitcode for each in started]
    for each in started:
        each.kill()
    return ended


def save_gradient(words):
    """Save loss and gradient of the first step, the share of a rank in one and in several parts."""
    parts, out, *words = words[-2:] + words[:-2]
    run = train.Run(*train.parse_args([*words, "--out", out]))
    dataset = run.dataset("train")
    torch.nn.init.normal_(run.model.blocks[0].deformable.search.offset.weight)
    run.model.eval()  # batch norms use their running statistics
    for accumulate in map(int, parts.split(",")):
        recipe = dataclasses.replace(run.recipe, accumulate=accumulate)
        batches = train.training_batches(len(dataset), recipe, 0, 0, run.ranks)[:accumulate]
        run.model.zero_grad()
        loss = train.backward(run, [data.collate([dataset[key] for key in keys]) for keys in batches])
        loss = torch.tensor(run.ranks.gather([loss.item()])).mean()
        if run.ranks.rank == 0:
            torch.save([loss] + [p.grad for p in run.model.parameters()], f"{out}/{accumulate}.pt")
    return 0


def test_one_two_and_four_ranks_take_the_same_step(tmp_path):
    """Catches: gradients summed instead of averaged, clips that two ranks share, micro-batches with wrong weights.

    With gloo, and batch norms in evaluation mode: on a CPU, their batch statistics are those of one rank.
    """
    results = []
    for ranks, parts in ((1, "1,4"), (2, "1,2"), (4, "1")):
        out = tmp_path / f"run {ranks}"
        assert statuses(start(tmp_path, parts, out, function=save_gradient, ranks=ranks)) == [0] * ranks
        results += [torch.load(out / f"{part}.pt") for part in parts.split(",")]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9


def test_three_ranks_test_every_clip_once(tmp_path, whole):
    """Catches: clips counted twice or left out where they do not divide by the ranks, a result printed by each rank."""
    path = tmp_path / "scores.npz"
    assert statuses(start(tmp_path, "--eval", whole / "last.pt", "--scores", path, ranks=3)) == [0] * 3
    printed, *others = ((tmp_path / str(rank)).read_text() for rank in range(3))
    result = json.loads(printed.splitlines()[-1])
    assert log_of(whole)[-1] == log_of(whole)[-1] | result and others == ["", ""]
    assert np.load(path)["names"].tolist() == [f"test {i}" for i in range(11)]


def fail_on_rank_1(words):
    def fail(run):
        if run.ranks.rank == 1 and run.progress.step == 3:
            raise KeyError("no such luck")

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, fail)
        return train.main(words)


def test_one_rank_fails(tmp_path):
    """Catches: other ranks that wait for ever, a reason that is not printed."""
    assert 0 not in statuses(
        start(tmp_path, "--workers", 1, "--out", tmp_path / "run", function=fail_on_rank_1, ranks=2)
    )
    assert "KeyError: 'no such luck'" in (tmp_path / "1").read_text()


def slow(words):
    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, lambda run: time.sleep(0.1))
        return train.main(words)


def start_slow(folder, *words, ranks=1):
    """Processes that have saved a step and are still training."""
    started = start(folder, "--save-every", 2, "--out", folder / "run", *words, function=slow, ranks=ranks)
    end = time.time() + 60
    while not (folder / "run" / "last.pt").exists():
        assert time.time() < end and started[0].is_alive(), (folder / "0").read_text()
        time.sleep(0.02)
    return started


@pytest.mark.parametrize("name, workers", [("SIGUSR1", 1), ("SIGTERM", 1), ("SIGKILL", 0)])
def test_a_run_that_is_stopped_goes_on(name, workers, fit, tmp_path, whole):
    """Catches: workers that a signal to the group ends, a half-written checkpoint, steps lost or taken twice."""
    (started,), number = start_slow(tmp_path, "--workers", workers), getattr(signal, name)
    os.killpg(started.pid, number)  # as a terminal does
    assert statuses([started]) == [-number if name == "SIGKILL" else 128 + number]
    assert 2 <= checkpoint(tmp_path / "run")["progress"]["step"] < 10
    assert fit("--resume")[0] == 0
    same_runs(tmp_path / "run", whole)


def signal_a_worker(words):
    for number in train.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    train.leave_group(0)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        os.kill(os.getpid(), getattr(signal, name))


def test_workers_ignore_signals(tmp_path):
    """Catches: loading processes that end where a batch system signals every process of a job."""
    assert statuses(start(tmp_path, function=signal_a_worker)) == [0]


def test_a_signal_to_one_rank_stops_all(tmp_path):
    """Catches: ranks that take different branches after a signal, and wait for each other for ever."""
    started = start_slow(tmp_path, ranks=2)
    os.kill(started[1].pid, signal.SIGTERM)
    assert statuses(started) == [128 + signal.SIGTERM] * 2


def test_the_script_under_torchrun(tmp_path):
    """Catches: a test that hangs, wrapped names in a checkpoint, a loss summed over ranks, a failure at the end."""
    script = "import runpy, data\ndata.SOURCES['synthetic'] = lambda: data.synthetic(train=43, test=11), []\n"
    (tmp_path / "few.py").write_text(script + "runpy.run_module('train', run_name='__main__')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    words = [str(tmp_path / "few.py"), *SMALL.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients in another layout than their weights are copied at every step
    assert not any("module." in key for key in checkpoint(tmp_path / "run")["model"])
    first, last = log_of(tmp_path / "run")
    assert (first["clips"], first["step"], last["step"], last["bad"]) == (11, 5, 10, 0)
    assert 1 < first["loss"] < 2  # ln 4 at first, not the sum over ranks


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_one_of_several_ranks_ends_at_once(ranks, monkeypatch):
    """Catches: a rank that a thread of gloo aborts at the end, so that a finished run counts as failed."""
    ended = []
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(sys, "argv", ["train.py", "-h"])
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    assert ended == [0] * (ranks == "2")


def count_faults(words):
    """Whether freed memory is used again; the first blocks may not fit."""
    train.keep_memory()
    for _ in range(20):
        torch.ones(2**24)
        if _ == 9:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 100  # of 10 * 16,384 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again(tmp_path):
    """Catches: settings of the C library that it ignores."""
    assert statuses(start(tmp_path, function=count_faults)) == [0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_cuda(fit, tmp_path, amp):
    """Catches: a tensor left on the CPU, a scaler that is not saved."""
    assert fit(f"--device cuda --amp {amp} --stop-after 3")[0] == 0
    assert fit(f"--device cuda --amp {amp} --resume --accumulate 2 --checkpointing")[0] == 0
    assert fit(f"--eval {tmp_path}/run/best.pt")[0] == 0


# ---- The README ----------------------------------------------------------------------------------------------------
README = (HERE / "README.md").read_text()


def test_python_of_the_readme(monkeypatch):
    """Catches: code in the README that fails, or that states another shape than it has."""
    monkeypatch.setattr(D3T, "initialize_weights", lambda model: None)
    for block in re.findall(r"```python\n(.*?)```", README.split("## Your own clips")[0], re.DOTALL):
        with FakeTensorMode():  # at the paper's size, the shapes are enough
            run_block(block, {})


def run_block(block, names):
    """Run Python of the README; every shape that it states must be the one that it has."""
    exec(block, names)
    for name, shape in re.findall(r"^\s*(\w+) = .*# \(([\d, ]+)\)", block, re.MULTILINE):
        assert tuple(names[name].shape) == tuple(map(int, shape.split(","))), name


def test_own_clips_of_the_readme(tmp_path, monkeypatch, capsys):
    """Catches: a newcomer's path from four videos to a label, to other classes and to scores that breaks off."""
    pytest.importorskip("av", reason="needs av, the decoder of videos")
    monkeypatch.chdir(tmp_path)
    section, names, printed = README.split("## Your own clips")[1].split("\n## ")[0], {}, ""
    for block, command in re.findall(r"```python\n(.*?)```|^    python ([^\n]*)$", section, re.DOTALL | re.MULTILINE):
        if block:
            run_block(block, names)
            continue
        script, *words = command.removeprefix("-m ").split()
        with contextlib.suppress(SystemExit):
            assert importlib.import_module(script.removesuffix(".py")).main(words) == 0, capsys.readouterr()
        printed += capsys.readouterr().out
    assert "has none: head.weight, head.bias" in printed and re.search(r"\d%  (walk|jump)\n", printed)
    assert len([*(tmp_path / "predicted").iterdir()]) == 1 and names["confusion"].sum() == 1


def commands():
    """The train.py and tools commands of the README that have arguments."""
    found = re.findall(r"(?:train\.py|-m tools\.\w+)(?: [^`\n&|]*)?", README)
    return sorted({words.split("  #")[0].strip() for words in found if " -" in words and " -h" not in words})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme(command, capsys):
    """Catches: a command in the README with a flag that does not exist."""
    script, *words = command.removeprefix("-m ").split()
    if script == "train.py":
        train.parse_args(words)
        return
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["-h"])
    with contextlib.suppress(SystemExit):
        train.main(["-h"])  # tools.ablate hands flags on
    known = capsys.readouterr().out
    assert all(word in known for word in words if word.startswith("-"))
