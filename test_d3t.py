"""The proof of D3T. Each docstring of a test names the bug that it catches.

The first part holds slow loops in float64 that were written from the sentences of the paper, not from `d3t.py`. They
take numpy arrays, name every token, and share no code with the model. The model has to agree with them.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
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
README = (HERE / "README.md").read_text()
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
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


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
    video = torch.ones(1, 3, 1, 52, 60, dtype=torch.float64, requires_grad=True)
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
            block.fuse.weight.data = torch.eye(16, dtype=torch.float64)[8:]  # the second M'_CLS, as it is
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
    """Catches: weights of another initial scale, which decides whether the two-minute run learns; constants saved."""
    model = D3T(Settings(channels=16, blocks=2, frames=4, height=40, width=40, kernel=3, pose_embedding=True))
    assert all("trunk" in name for name in model.state_dict().keys() - dict(model.named_parameters()).keys())
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
        ("video", torch.Tensor.numpy, ["torch tensor", "ndarray"]),
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
    stated = re.findall(r"^\| .* \| `(.+?)` \| `\(([\d, ]+)\)` \|", README, re.MULTILINE)  # symbol, shape
    assert len(stated) >= 15
    for symbol, shape in stated:
        assert shapes[symbol] == tuple(map(int, shape.split(","))), symbol


# ---- Data ----------------------------------------------------------------------------------------------------------
def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "joints", "visible")) and a["label"] == b["label"]


def all_of(height, width):
    return slice(0, height), slice(0, width)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("body", ["PENN", "NTU", "COCO"])
def test_joints_stay_on_their_pixels(body, split):
    """Catches: joints, visibility or pixels sampled, scaled, cropped or mirrored differently, or not evenly."""
    shapes = {"PENN": ((60, 90), (32, 32), 50), "NTU": ((90, 60), (24, 56), 2), "COCO": ((33, 47), (41, 35), 12)}
    (size, crop, n), names = shapes[body], getattr(data, f"{body}_JOINTS")

    def read(media, frames, scaled, crop):  # pixels say where they are from: column, row and number of the frame
        frame, row, column = np.meshgrid(frames, *map(np.arange, scaled), indexing="ij")
        return data.Frames(np.stack([column, row, frame], -1)[:, crop[0], crop[1]].astype(np.uint8))

    source, swap = data.Source(["a"], names, getattr(data, f"{body}_PAIRS"), read), {"left": "right", "right": "left"}
    assert [a for a, _ in source.flip_pairs] == [i for i, name in enumerate(names) if "left" in name]
    partner = [names.index(" ".join(swap.get(word, word) for word in name.split())) for name in names]
    places = np.random.default_rng(0).uniform(0, size[::-1], (n, len(names), 2)).astype(np.float32)
    known = (np.arange(n)[:, None] + np.arange(len(names))) % 3 > 0  # not the same joints in each frame
    source.clips[split] = [data.Clip("clip", 0, places, known, size, None)] * 20
    dataset, drawn = data.Dataset(source, split, 5, *crop), []
    h, w = (round(side * 8 / 7 * max(crop[0] / size[0], crop[1] / size[1])) for side in size)
    for key in itertools.product(range(20), range(20)):
        item = dataset[key]
        column, row, frame = item["video"][:, :, 0].int().numpy()  # (T, W) each, of the first row
        step, frame = column[0, 1] - column[0, 0], frame[:, :1]
        of = partner if step < 0 else range(len(names))
        whole = (places[frame, of] + 0.5) * [w / size[1], h / size[0]] - 0.5
        joints = (whole - np.stack([column[:, :1], row[:, :1]], -1)) * [step, 1]
        assert abs(item["joints"].numpy() - joints).max() < 1e-3
        inside = (joints >= -0.5) & (joints < [crop[1] - 0.5, crop[0] - 0.5])
        assert np.array_equal(item["visible"], inside.all(-1) & known[frame, of])
        drawn.append((step, row[0, 0], column.min(), *frame[:, 0]))
    rows, columns = h - crop[0], w - crop[1]  # that the crop leaves out
    if split == "test":
        assert {*drawn} == {(1, rows // 2, columns // 2, *(int((t + 0.5) * n / 5) for t in range(5)))}
    else:
        steps, tops, lefts, *frames = zip(*drawn)
        assert {*tops} == {*range(rows + 1)} and {*lefts} == {*range(columns + 1)} and 160 < steps.count(-1) < 240
        segments = [{*range(t * n // 5, math.ceil((t + 1) * n / 5))} for t in range(5)]
        assert [{*each} for each in frames] == segments and len({*zip(*frames)}) >= n  # each of them draws its own


def test_items_depend_on_seed_epoch_and_index_alone():
    """Catches: augmentation that depends on other items or on the global generator; the other modality hidden."""
    make = functools.partial(data.Dataset, data.synthetic(train=6, test=3), "train", 4, 24, 32)
    first = {key: make()[key] for key in itertools.product((0, 1), range(6))}
    state, again = (np.random.get_state()[1].copy(), torch.get_rng_state()), make()
    assert all(same(first[key], again[key]) for key in reversed(first)) and same(first[0, 2], again[2])
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    assert not same(first[0, 1], first[1, 1]) and not same(first[0, 1], make(seed=1)[0, 1])
    assert same(data.Dataset(data.synthetic(train=9, test=2), "train", 4, 24, 32)[1, 5], first[1, 5])
    assert not same(data.Dataset(data.synthetic(train=6, test=3, seed=1), "train", 4, 24, 32)[0, 0], first[0, 0])
    hidden = make(hide="joints")[0], make(hide="video")[0]
    assert [(item["visible"].any(), (item["video"] != 128).any()) for item in hidden] == [(False, True), (True, False)]


def test_synthetic_clips():
    """Catches: a label that joints or order give away, or of the other figure; figures that are drawn elsewhere."""
    swing, (start, end) = np.linspace(0, 1, 9), np.array(data.PENN_EDGES).T
    poses = np.concatenate([data.pose(action, swing, side) for action in range(4) for side in (0, 1)])
    lengths = np.linalg.norm(poses[:, start] - poses[:, end], axis=-1)
    assert np.allclose(lengths, lengths[0]) and (poses[:, data.TORSO] == poses[0, data.TORSO]).all()
    moving = {(1, 0): "wave", (2, 0): "flap", (2, 2): "jumping jack", (0, 1): "kick"}  # wrists and ankles
    (clips, (other, _)), cells = data.synthetic(train=400, test=2).clips.values(), []
    assert not np.array_equal(clips[0].joints, other.joints)
    for clip in clips:
        (actor,) = (i for i, figure in enumerate(clip.media[0]) if np.array_equal(np.float32(figure), clip.joints))
        cells.append(clip.label + 4 * actor)
        moves = np.ptp(clip.joints - clip.joints[:, 7:8], axis=0).max(-1) > 5
        assert data.SYNTHETIC_ACTIONS[clip.label] == moving[moves[[5, 6]].sum(), moves[[11, 12]].sum()]
    assert np.bincount(cells, minlength=8).min() > 30  # of about 50
    seen = np.mean([clip.visible for clip in clips], (0, 1))
    assert (np.flatnonzero(seen) == data.TORSO).all() and (seen[data.TORSO] > 0.9).all() and seen.max() < 1
    frames = np.array([1, 6, 14])
    for clip in clips[:8]:
        video = data.draw(clip.media, frames, (96, 160), all_of(96, 160)).video.astype(int)
        assert np.array_equal(data.draw(clip.media, frames, (96, 160), np.s_[5:60, 9:80]).video, video[:, 5:60, 9:80])
        figure = clip.media[0][1][frames]  # the one in front
        middles = ((figure[:, start] + figure[:, end]) / 2 + 0.5) * [160 / 64, 96 / 64] - 0.5
        t, limb = ((middles > 1) & (middles < [158, 94])).all(-1).nonzero()
        x, y = middles[t, limb].round().astype(int).T
        assert len(t) > 15 and abs(video[t, y, x] - clip.media[1][1]).max() <= 1


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


def test_flags_that_cannot_be_used(tmp_path):
    """Catches: a flag that is ignored; a missing data set without what was looked for and where to get it."""
    refused = {
        "--data pennaction --root {0}/nowhere": "--root: there is no folder {0}/nowhere",
        "--data pennaction --root {0}": "{0}/labels/0001.mat .*dreamdragon.github.io/PennAction",
        "--data ntu60-xsub --root {0}": "no NTU RGB.D in .'{0}'.: .*rose1",
        "--root {0}": "--root: the synthetic clips are drawn",
        "--data pyskl --root {0}": "--data pyskl needs --annotations",
        "--data pyskl --root {0} --annotations {0}/no.pkl": "--data pyskl needs .* not {0}/no.pkl",
        "--data finegym --split-val test": "--split-val is not for --data finegym",
    }
    for words, said in refused.items():
        with pytest.raises(data.UsageError if said.startswith("--") else data.DataError, match=said.format(tmp_path)):
            data.load(options(*words.format(tmp_path).split()))


def write_penn_clip(root, i, **changes):
    """Clip i + 1 in the layout of Penn Action; red, green and blue dots at the first three joints."""
    savemat = pytest.importorskip("scipy.io", reason="needs scipy, the decoder of Penn Action's labels").savemat
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    (height, width), rng = (48, 36) if i == 2 else (30, 44), np.random.default_rng(i)  # one portrait clip
    kind = np.uint8 if i % 2 else np.float64
    x, y = (rng.integers(1, side + 1, (8, 13)) for side in (width, height))
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
    """A small Penn Action root: 2 x 60 clips of 8 frames."""
    for i in range(120):
        write_penn_clip(tmp_path, i)
    return tmp_path


def test_penn_action(penn):
    """Catches: splits, classes, sizes, colours or joints that are wrong; a damaged label that is taken as it is."""
    (penn / "labels" / "._0001.mat").write_bytes(b"left there by macOS")
    source = data.penn_action([penn])
    assert not source.problems and source.classes == sorted(source.classes) and len(source.classes) == 15
    clips = source.clips["test"] + source.clips["train"]
    assert [clip.name for clip in clips] == [f"{i:04d}" for first in (1, 2) for i in range(first, 121, 2)]
    for clip in clips:
        assert clip.label == (int(clip.name) - 1) % 15 and clip.joints.dtype == np.float32
        assert clip.size == ((48, 36) if clip.name == "0003" else (30, 44))
        video = source.read(clip.media, np.arange(8), clip.size, all_of(*clip.size)).video
        for t, c in np.ndindex(8, 3):
            assert np.unravel_index(video[t, ..., c].argmax(), clip.size) == tuple(clip.joints[t, c, ::-1])
    joints = [(1, 1, 0), (1.52, 1.52, 0), (0, 0, 0), (np.nan, 20, 1), (20, np.inf, 1)]  # x, y, visible: all are absent
    joints += [(9, 9, 0), (1, 1.5, 0), (5, 7, 0), (1, 1, 1), *[(20, 23, 1)] * 4]  # some are occluded
    x, y, visible = np.transpose(joints)[:, None]
    write_penn_clip(penn, 0, x=x, y=y, visibility=visible)
    write_penn_clip(penn, 1, action="juggling")
    (penn / "labels" / "0003.mat").write_bytes((penn / "labels" / "0005.mat").read_bytes()[:-100])
    source = data.penn_action([penn])
    assert source.clips["test"][0].visible.tolist() == [[False] * 5 + [True] * 8]
    (action, cut), labels = source.problems, f"{penn}/labels"
    assert action == f"{labels}/0002.mat: 'juggling' is not in list" and cut.startswith(f"{labels}/0003.mat: ")


def test_penn_action_frames_are_scaled_and_cropped(tmp_path):
    """Catches: a crop of another place or size; a decoder that rounds up the sides of a smaller frame."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    row, column = np.mgrid[:270, :481]
    ramps = np.stack([250 * column / 481, 250 * row / 270, 0 * row], -1).round().astype(np.uint8)
    image.fromarray(ramps).save(tmp_path / "000001.jpg", quality=100, subsampling=0)
    for part in (2.3, 4.1, 8.2):
        h, w = round(270 / part), round(481 / part)
        rows, columns = slice(h // 3, h - 1), slice(w // 4, w - 1)
        red, green, _ = data.read_jpegs(tmp_path, np.array([0]), (h, w), (rows, columns)).video[0].transpose(2, 0, 1)
        assert abs(red.mean(0) - 250 * ((np.arange(w)[columns] + 0.5) / w - 0.5 / 481)).max() < 1
        assert abs(green.mean(1) - 250 * ((np.arange(h)[rows] + 0.5) / h - 0.5 / 270)).max() < 1


def test_bad_clips(tmp_path):
    """Catches: a bad frame that is taken, ends training or is not told; a clip missing in a test; a traceback."""
    for i in range(6):
        write_penn_clip(tmp_path, i)
    source, line = data.penn_action([tmp_path]), ""
    training, testing = (data.Dataset(source, split, 8, 24, 24) for split in source.clips)
    gone, cut, png, test = (tmp_path / "frames" / f"{i:04d}" / "000005.jpg" for i in (2, 4, 6, 3))
    gone.unlink()
    other, item = training[0, 1], training[0, 0]
    batch = data.collate([other, item])
    assert item["name"] == other["name"] == "0004" and batch["label"].tolist() == [3, 3] and not other["bad"]
    assert [(name, why.startswith(f"{gone}: ")) for name, why in batch["bad"]] == [("0002", True)]
    assert torch.equal(batch["video"], torch.stack([other["video"], item["video"]]))
    assert batch["video"].is_contiguous(memory_format=torch.channels_last_3d)
    cut.write_bytes(cut.read_bytes()[:-100])
    pytest.importorskip("PIL.Image").open(png).save(png, "PNG")
    with pytest.raises(data.BadClip, match=f"{gone}: .*No such file.*; {cut}: .*truncated.*; {png}: cannot identify"):
        training[0, 0]
    test.unlink()
    try:
        list(torch.utils.data.DataLoader(testing, num_workers=1))
    except data.BadClip as error:
        line = str(error)
        error.__traceback__ = None  # is in a cycle with the loader, which takes 5 s to end when that is collected
    assert line.startswith(f"{test}: ") and "\n" not in line


def body(x, y, wide=0.4, wobble=0.0):
    """25 joints as .skeleton holds them: a column of a person at x, y of the colour image, 3 m away."""
    at = np.linspace(-0.5, 0.5, 25)
    place = np.stack([at * wide + (x - 960) / 300 + wobble, at * -1.7, np.full(25, 3.0)], -1)
    colour = np.stack([x + at * 60 + 300 * wobble, y + at * 300], -1)
    return np.concatenate([place, colour / 4, colour, np.zeros((25, 4)), 1 + np.arange(25)[:, None] % 2], 1)


def skeleton(frames):
    """The text of a .skeleton file of frames [[(id, body), ...], ...]: CRLF, 10 fields a body, 12 a joint."""
    lines = [len(frames)]
    for bodies in frames:
        lines.append(len(bodies))
        for identity, joints in bodies:
            lines += [f"{identity} 0 1 1 1 1 0 0.027 0.057 2", 25]
            lines += [" ".join(f"{value:.7g}" for value in row) for row in joints]
    return "".join(f"{line}\r\n" for line in lines).encode()


def persons(frames):
    return data.two_persons(*data.parse_skeleton(skeleton(frames)))


def test_ntu_persons_keep_their_slots():
    """Catches: ids as floats, slots that swap, frames dropped, not the two who move most; lost joints visible."""
    left, right = ([body(x, 500, wobble=w * (t % 5)) for t in range(40)] for x, w in ((500, 0.05), (700, 0.02)))
    kinect, frames = 72057594037944738, []  # ids lie near 2^56, where a float64 tells only multiples of 16 apart
    for t in range(40):
        right[t][:3, 5], right[t][3:6, 6] = (np.nan, 1920, -3), (np.nan, 1080, -1)  # joints that are lost
        right[t][6, 11], right[t][7, :11], right[t][8, :2] = 0, 0, np.nan  # the last one in metres, which is no loss
        pair = [(kinect + 16 * (10 <= t < 15), left[t]), (kinect - 4 if t < 20 else kinect + 32, right[t])]
        still, twice = (1, body(1300, 500) * (t not in (8, 9))), (pair[0][0], body(50, 50))
        frames.append([still, *pair[:: 1 if t % 2 else -1], twice])
    left[3][0, 0] = np.nan
    frames[25:28] = [], [], []
    joints, visible = persons(frames)
    expected = np.ones((40, 50), bool)
    expected[:, 25:33], expected[25:28] = False, False
    assert np.array_equal(visible, expected) and joints.dtype == np.float32 and not persons([[]] * 4)[1].any()
    assert np.allclose(joints[visible], np.concatenate([left, right], 1)[visible][:, 5:7], atol=0.01)


def test_ntu_ghosts_and_renamed_persons():
    """Catches: a chair taken for a person, by the rules of pyskl and CTR-GCN; a new id nearby for somebody else."""
    walker = [body(900, 500, wobble=0.03 * (t % 4)) for t in range(30)]
    cases = (1, 11, 0.4, 0), (0, 12, 0.4, 0), (1, 30, 1.4, 21), (0, 30, 1.4, 20), (0, 30, 1.3, 30)
    for ghost, seen, wide, often in cases:
        chair = [[(2, body(1500, 600, wide if t < often else 0.4, wobble=0.1 * (t % 3)))] for t in range(seen)]
        frames = [[(1, walker[t])] + sum(chair[t : t + 1], []) for t in range(30)]
        assert persons(frames)[1][:, 25:].any() != ghost
        assert persons(chair)[1].any()  # better a ghost than nobody
    for metres, renamed in ((0.9, True), (1.1, False)):  # from where the first id ends
        frames = [[(1, body(300 + 50 * t, 500)) if t < 15 else (2, body(1000 + 300 * metres, 500))] for t in range(30)]
        visible = persons(frames)[1]
        assert visible[:15, :25].all() and visible[15:, :25].all() == renamed


def test_ntu_skeletons_that_are_damaged(tmp_path):
    """Catches: a damaged skeleton that ends a worker, is read as if nothing were wrong, or is not named."""
    path, good = tmp_path / "a.skeleton", skeleton([[(1, body(900, 500))]] * 2)
    for said, content in {"it breaks off": good[:-100], "'z'": good.replace(b" 3 ", b" z ", 1)}.items():
        path.write_bytes(content)
        with pytest.raises(data.BadClip, match=f"a.skeleton: .*{said}"):
            data.ntu_annotate(data.Clip("a", 0, None, None, (9, 9), ([path], path)))


def test_ntu_protocols():
    """Catches: a performer, camera or setup on the wrong side of a split."""
    performers = {3, 6, 7, 10, 11, 12, *range(20, 25), 26, 29, 30, 32, 33, 36, 37, *range(39, 45), 48, 51}
    performers |= {*range(60, 70), 71, 72, 73, 75, 76, 77, 79, 87, 88, 90, 96, 99, 101, 102, 104, 105, 106}
    for s, c, p in itertools.product(range(1, 33), (1, 2, 3), range(1, 107)):
        tested = {"xsub": p in performers, "xview": c == 1, "xset": s % 2 == 1}
        for name, (actions, trains, *_) in data.NTU_PROTOCOLS.items():
            assert (actions == 60 and p > 40) or trains(s, c, p) != tested[name.split("-")[1]]


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
        path.write_bytes(skeleton([[(1, joints)] for joints in walker[: 13 if i == 1 else 14]]))
    return [tmp_path / "rgb", tmp_path / "skeletons 0", tmp_path / "skeletons 1"]


def test_ntu_pairs_videos_and_skeletons(ntu, capsys):
    """Catches: clips paired wrongly, a label from 1, a half that is missing, joints elsewhere; a list unread."""
    (ntu[1] / "S003C001P001R001A001.skeleton").write_bytes(skeleton([[]]))
    write_video(ntu[0] / "S003C001P001R001A002_rgb.avi", numbered(2))
    source = data.ntu(ntu, "ntu120-xsub")
    assert "no NTU_RGBD120_samples" in capsys.readouterr().err and source.classes[::119] == ["A001", "A120"]
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
    for name, protocol, warned in (("", "60-xsub", False), ("", "120-xsub", True), ("120", "120-xset", False)):
        (ntu[2] / f"ntu_rgbd{name}_samples_with_missing_skeletons.txt").write_text("\n".join(["Prose", *SAMPLES[2:]]))
        source = data.ntu(ntu, f"ntu{protocol}")
        assert ("warning" in capsys.readouterr().err) == warned
        assert [clip.name for clips in source.clips.values() for clip in clips] == SAMPLES[:2]


@pytest.mark.parametrize("n, taken", [(13, True), (12, False), (16, False)])
def test_ntu_videos_beside_each_other(ntu, n, taken):
    """Catches: a video that broke off taken for the original, because it is smaller; a good one not taken."""
    path = write_video(ntu[1] / f"{SAMPLES[0]}.mp4", numbered(n, 36, 64))
    source = data.ntu(ntu, "ntu60-xsub")
    assert (source.annotate(source.clips["train"][0]).media == path) == taken
    (ntu[0] / "S001" / f"{SAMPLES[0]}_rgb.avi").unlink()
    bad = data.Dataset(data.ntu(ntu, "ntu60-xsub"), "train", 14, 24, 24)[0]["bad"]
    why = f"{path}: {SAMPLES[0]} has joints of 14 frames, but {n} frames are in the video"
    assert bad == ([] if taken else [(SAMPLES[0], why)])


def write_video(path, pictures, gop=250, skip=0):
    """Encode uint8 (n, h, w, 3) as NTU does: one key frame, B-frames, and in AVI no time stamps of their order."""
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "bf": "3", "g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        packets = [stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")) for picture in pictures]
        container.mux([*itertools.chain(*packets), *stream.encode()][skip:])
    return path


def numbered(n, height=54, width=96):
    """Frames whose red says which they are."""
    colours = np.stack([np.arange(n) * 5 + 20, np.full(n, 120), np.full(n, 70)], -1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (n, height, width, 3)).copy()


def box(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


def patch(path, turns=0, start=0):
    """Let an mp4 be shown turned by quarters to the right, from a frame on; put a cover picture before its video."""
    content, (x, y) = bytearray(path.read_bytes()), [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # of the stored x axis
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", x << 16, y << 16, 0, -y << 16, x << 16, 0, 0, 0, 1 << 30)
    at = content.index(b"elst") + 16
    content[at : at + 4] = struct.pack(">i", (start + 2) * 512)  # 2 for the B-frames, 512 ticks a frame
    cover = box(b"ilst", box(b"covr", box(b"data", struct.pack(">2i", 13, 0) + b"a JPEG")))
    cover = box(b"udta", box(b"meta", bytes(4) + box(b"hdlr", bytes(8) + b"mdir" + bytes(13)) + cover))
    at = content.index(b"moov") - 4
    path.write_bytes(content[:at] + box(b"moov", cover + content[at + 8 :]))


@pytest.mark.parametrize("ending, turns", [("_rgb.avi", 0), (".mp4", 0), (".mp4", 1), (".mp4", 2), (".mp4", 3)])
def test_frames_are_read_as_they_are_shown(tmp_path, ending, turns):
    """Catches: frame i - 2 for i, as by seeking; red for blue; a phone's video on its side; its cover for the video."""
    ramp = np.add.outer(2 * np.arange(64), np.arange(96)).astype(np.uint8) // 2
    pictures, frames = numbered(20, 64, 96) + ramp[..., None], np.array([0, 3, 3, 17, 18, 19, 20])  # there is no 20
    path = write_video(tmp_path / f"clip{ending}", pictures)
    if ending == ".mp4":
        patch(path, turns)
    upright = np.rot90(pictures, -turns, (1, 2))[frames[:-1]]
    size, crop = (upright.shape[1] // 2, upright.shape[2] // 2), (slice(2, 30), slice(6, 28))
    video, count, shown = data.read_video(path, frames, size, all_of(*size))
    assert abs(video - upright.reshape(6, size[0], 2, size[1], 2, 3).mean((2, 4))).max() < 4
    assert np.array_equal(data.read_video(path, frames, size, crop).video, video[:, crop[0], crop[1]])
    assert (count, shown) == (20, upright.shape[1:3]) and data.video_length(path) == 20


@pytest.mark.parametrize("part, said", [(0, "Invalid data"), (0.75, "it breaks off")])
def test_a_video_that_breaks_off(tmp_path, part, said):
    """Catches: what is left of a file taken for a shorter video, over which the joints are then spread."""
    path = write_video(tmp_path / "clip.avi", numbered(40))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    for read in (data.video_length, lambda path: data.read_video(path, np.array([0]), (27, 48), all_of(27, 48))):
        with pytest.raises(data.BadClip, match=f"clip.avi: .*{said}"):
            read(path)


def clip_of(path, joints, size, **more):
    """A source and its only clip, for testing, all of whose joints are known."""
    clip = data.Clip("own", 0, np.float32(joints), np.full(joints.shape[:2], True), size, path)
    return data.Source(["walk"], ["nose"] * joints.shape[1], [], data.read_video, clips=dict(test=[clip]), **more), clip


@pytest.mark.parametrize("T", [6, 8, 12, 40])
@pytest.mark.parametrize("ending, first", [("mp4", 17), ("avi", 16), ("mkv", 16)])
def test_joints_follow_a_video_that_was_cut(tmp_path, ending, first, T):
    """Catches: frames chosen by a number of packets, of which a decoder shows fewer: joints drift from the picture."""
    path = write_video(tmp_path / f"cut.{ending}", numbered(40), gop=16, skip=0 if ending == "mp4" else 11)
    if ending == "mp4":  # it marks the packets that it hides; the others lack a key frame
        patch(path, start=17)
    assert (data.video_length(path) == 40 - first) == (ending == "mp4")
    joints = np.arange(first, 40).repeat(2).reshape(-1, 1, 2)  # at the number of the frame
    for spread in (True, False):
        source, clip = clip_of(path, joints, (54, 96), length=data.video_length, spread=spread)
        video, read, _ = data.read_clip(source, clip, lambda n: np.arange(T) * n // T, (54, 96), all_of(54, 96))
        assert abs(video[..., 0].mean((1, 2)) - 20 - 5 * read[:, 0, 0]).max() < 2.5


@pytest.mark.parametrize(
    "shape, turns, said",
    [
        ((60, 100), 0, None),
        ((122, 200), 2, None),
        ((100, 60), 1, None),
        ((100, 60), 0, "own refer to frames of .100, 60., .* has .60, 100. "),
        ((60, 100), 3, "own refer to frames of .60, 100., .* has .100, 60. "),
        ((60, 105), 0, "own refer to frames of .60, 105., .* has .60, 100. "),
    ],
)
def test_joints_of_another_frame(tmp_path, shape, turns, said):
    """Catches: sides exchanged; joints for a video that was turned after they were found."""
    path = write_video(tmp_path / "own.mp4", numbered(8, 60, 100))
    patch(path, turns)
    source, _ = clip_of(path, np.random.default_rng(0).uniform(5, 55, (8, 17, 2)), shape)
    with pytest.raises(data.BadClip, match=f"own.mp4: .*{said}") if said else contextlib.nullcontext():
        data.Dataset(source, "test", 4, 24, 24)[0]


def entry(name, n=8, persons=1, joints=17, **changes):
    """An annotation of pyskl's form, in float16 as in its files."""
    rng = np.random.default_rng(n)
    keypoint = rng.uniform(5, 55, (persons, n, joints, 2)).astype(np.float16)
    score = rng.uniform(0.1, 0.9, (persons, n, joints)).astype(np.float16)
    return dict(frame_dir=name, label=3, img_shape=(60, 100), keypoint=keypoint, keypoint_score=score) | changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_hold_the_arrays_that_were_written(tmp_path, protocol):
    """Catches: an array of another order, type or shape; the names of numpy 1 or of a protocol that are refused."""
    plain, path = np.random.default_rng(0).random((2, 3, 4)), tmp_path / "own.pkl"
    objects = np.array([{"a": 1}, None, "text", [2]], object).reshape(2, 2)
    arrays = [plain, plain.T, plain.astype("f2"), plain.astype(">f4"), plain.transpose(1, 0, 2), plain[:0], plain > 0.5]
    arrays += [np.float32(1.5), np.array(["ab", "c"]), np.asfortranarray(plain), objects, objects.T]
    one = np.array([dict(frame_dir="x", all=arrays, raw=[b"", b"\xff", {1}])], object)
    split = defaultdict(list, a=np.array(["x"], object), b=np.array([], str))
    content = pickle.dumps(dict(split=split, annotations=one), protocol)
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core") if protocol < 4 else content)
    _, entries, train, test = data.read_pickle(path, ("a", "b"))
    assert (train, test) == ({"x"}, set()) and entries["x"][1]["raw"] == [b"", b"\xff", {1}]
    for array, read in zip(arrays, entries["x"][1]["all"], strict=True):
        assert np.array_equal(read, array) and read.dtype.str[1:] == array.dtype.str[1:]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.system, eval, open, itertools.starmap, pickle.loads, getattr])
def test_pickles_that_run_code_are_refused(tmp_path, function, protocol):
    """Catches: an unpickler that finds what can run code: os.system and the ways around a ban of it."""
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(dict(split={}, annotations=[function]), protocol))
    with pytest.raises(data.DataError, match=rf"evil.pkl: .*it wants \w+\.{function.__name__}, "):
        data.read_pickle(tmp_path / "evil.pkl", ("train", "val"))


@pytest.mark.parametrize("least", [0, 0.5])
@pytest.mark.parametrize("file, k", [("gym_hrnet.pkl", 17), ("gym_2d.pkl", 3)])
def test_pyskl(tmp_path, file, k, least):
    """Catches: persons padded with zeros or joints of a low score visible, scores exchanged, names that do not fit."""
    for name in ("c_024_035_03_05", "two", "three_rgb", "one"):
        write_video(tmp_path / "subactions" / f"{name}.mp4", numbered(12, 60, 100))
    shapes = {"c_E_024_035_A_03_05": (8, 0), "two.avi": (8, 2), "three": (12, 3), "one": (9, 1)}  # frames, persons
    entries = [entry(name, n, persons, k) for name, (n, persons) in shapes.items()]
    scores = [each["keypoint_score"] for each in entries]
    two, three = entries[1:3]
    two["keypoint"][0, 2, 2], two["keypoint"][1, 5:], two["keypoint"][0, 4, 0] = np.nan, 0, (0, 9)
    two["keypoint_score"][0, 0, :3], two["keypoint_score"][1, 1, 1] = (0, 0.5, 0.6), np.nan
    three["keypoint"] = np.concatenate([three["keypoint"], three.pop("keypoint_score")[..., None]], -1)
    split = dict(train={"c_E_024_035_A_03_05", "two.avi"}, val=["three", "one", "gone", "ghost"])
    content = dict(split=split, annotations=[entry("gone", joints=k, label=5), *entries, entry("unlisted", joints=k)])
    names, pairs = data.COCO_JOINTS, data.COCO_PAIRS
    if k == 3:
        names, pairs = ["left ear", "tail", "right ear"], [(0, 2)]
        content |= dict(joint_names=names, flip_pairs=pairs, label_names=np.array([*"abcdef"]))
    (tmp_path / file).write_bytes(pickle.dumps(content))
    source = data.load(options("--data", "finegym", "--root", tmp_path, "--min-score", least))
    assert source.missing == ["gone has no video", f"ghost has no annotation in {tmp_path}/{file}"]
    assert source.classes == [*("abcdef" if k == 3 else "012345")] and not source.problems
    assert {*map(type, source.classes + source.joint_names)} == {str}  # a checkpoint refuses those of numpy
    assert source.joint_names == [*names, *(f"{name} 2" for name in names)]
    assert source.flip_pairs == [(a + person, b + person) for person in (0, k) for a, b in pairs]
    assert [len(clips) for clips in source.clips.values()] == [2, 2]
    for clip, each, score in zip(sum(source.clips.values(), []), entries, scores):
        assert (clip.name, clip.label, clip.size) == (each["frame_dir"], 3, (60, 100))
        video, joints, visible = data.read_clip(source, clip, np.arange, (60, 100), all_of(60, 100))
        assert len(video) == 12 and joints.shape == (12, 2 * k, 2) and joints.dtype == np.float32
        for p, t, j in np.ndindex(2, 12, k):
            seen, at = False, (p, round(t * (score.shape[1] - 1) / 11), j)  # the rows are spread over the frames
            if p < len(score):
                x, y = each["keypoint"][at][:2]
                seen = score[at] > least and not np.isnan(x) and (x, y) != (0, 0)
                assert np.array_equal(joints[t, p * k + j], (x, y), equal_nan=True)
            assert visible[t, p * k + j] == seen


@pytest.mark.parametrize(
    "changes, said",
    [
        (b'{"split": {}}', "expected a pickle .*it is JSON"),
        (b"\x1f\x8b\x08", "expected a pickle .*it is gzipped"),
        (pickle.dumps(entry("two")).replace(b"\x8c\x02f2", b"\x8c\x02O8"), "cannot reshape array"),
        (pickle.dumps(np.array([None] * 10), 2).replace(b"N" * 10, b""), "cannot reshape array"),  # numpy would crash
        (dict(split=dict(train="o", val=[])), "no clip can be used: o has no annotation"),
        (dict(split=dict(train=["two"], val=["two.mp4"])), "training and test alike, such as two"),
        (dict(split=dict(train=["a/../two"], val=[])), "'a/../two': expected a name below"),
        (dict(split=dict(xsub=[], val=[])), r"no train or val; its splits are \['xsub', 'val'\]"),
        (dict(annotations=[entry("two"), entry("two.avi")]), "two of its entries have one name"),
        (dict(annotations=[entry("/data/two")]), "'/data/two': expected a name below"),
        (dict(joint_names=["hip", "knee"], flip_pairs=[(1, 2)]), "flip_pairs"),
        (dict(label=-1), "label -1"),
        (dict(label_names=["run"]), "two: label 3, expected a whole number below 1"),
        (dict(keypoint=np.full((1, 8, 25, 2), 9.0), keypoint_score=None), "25 joints, expected 17"),
        (dict(keypoint=np.ones((1, 0, 17, 2))), "keypoint is .1, 0, 17, 2., expected .persons, "),
        (dict(keypoint=np.full((1, 8, 17, 2), 0.5)), "within 0..1, expected pixels"),
        (dict(keypoint_score=np.ones((1, 7, 17))), "keypoint_score is .1, 7, 17., expected .1, 8, 17"),
    ],
)
def test_pickles_that_do_not_fit(tmp_path, changes, said):
    """Catches: a damaged file that crashes, a clip to train and test on, an entry of another shape, unit or label."""
    content, path = changes, tmp_path / "own.pkl"
    if isinstance(changes, dict):  # of the file, or of its entry
        own = dict(split=dict(train=["two"], val=["x"]), annotations=[entry("two", **changes)])
        content = pickle.dumps(own | changes)
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=f"own.pkl.*{said}"):
        data.pyskl([tmp_path], path)


def test_match():
    """Catches: labels by number where a checkpoint has more classes, persons that others lack, a class it lacks."""
    run, jump = (data.Clip("own", label, None, None, (9, 9), None) for label in (0, 1))
    source = data.Source(["run", "jump"], ["hip", "knee"], [], data.draw, clips=dict(train=[run], test=[jump]))
    classes, names = ["jump", "sit", "run"], ["hip", "knee", "hip 2", "knee 2"]
    fitted = data.match(source, classes, names)
    assert (fitted.classes, fitted.joint_names) == (classes, names)
    assert [clips[0].label for each in (fitted, source) for clips in each.clips.values()] == [2, 0, 0, 1]
    for wrong, lacking in (((["run"], names), "jump"), ((classes, names[:1]), "knee"), ((classes, names[::-1]), "hip")):
        with pytest.raises(data.UsageError, match=f"the checkpoint does not know '{lacking}'"):
            data.match(source, *wrong)


def test_names_folders_and_links(tmp_path, monkeypatch):
    """Catches: a name that av takes for a protocol; "walk/v1" of another class; links not followed, or without end."""
    files = ["concat:c|d", "100%d #1?", "two\nlines", os.fsdecode(b"caf\xe9"), "walk/v1", "run/v1", "cafe\u0301/v2"]
    names = [*files[:5], "./run//v1.mp4", "caf\u00e9/v2"]  # composed here, and not on the disk
    video = write_video(tmp_path / "v.mp4", numbered(2, 36, 60)).read_bytes()
    for path in (tmp_path / f"{name}.MP4" for name in [*files, "x/walk/v1"]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video)
    (tmp_path / "run").rename(tmp_path.with_name(f"{tmp_path.name} run"))
    for link, target in {"run": tmp_path.with_name(f"{tmp_path.name} run"), "walk/up": "..", "self": "."}.items():
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    annotations = [entry("other", filename=name) for name in [*names, "v1", "v2"]]
    Path("own.pkl").write_bytes(pickle.dumps(dict(split=dict(train=names, val=["v1", "v2"]), annotations=annotations)))
    source = data.pyskl([Path()], Path("own.pkl"))
    assert source.problems == ["run/v1.MP4 and walk/v1.MP4 have one name: leave one of them there"]
    assert [clip.media for clip in source.clips["train"]] == [Path(f"{name}.MP4") for name in files]
    assert [item["name"] for item in data.Dataset(source, "train", 4, 24, 24)] == names


# ---- Training, in this process -------------------------------------------------------------------------------------
SMALL = "--channels 4 --height 16 --width 16 --frames 4 --heads 2 --blocks 1 --device cpu"
SMALL += " --batch 8 --epochs 2 --warmup 0.5 --workers 0"  # 5 steps an epoch on the 43 clips of `fit`


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


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert statuses(folder) == [0], (folder / "0").read_text()
    return folder / "run"


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "clips_per_second")} for line in lines]


def same_runs(one, other):
    """The same weights, state of AdamW, best epoch and log."""
    for name in ("last.pt", "best.pt"):
        a, b = checkpoint(one, name), checkpoint(other, name)
        assert a["progress"] == b["progress"]
        for part in ("model", "optimizer"):
            torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert log_of(one) == log_of(other)


def before_each_step(monkeypatch, change):
    """Call `change(run)` between the gradient and the update; what it returns, if anything, multiplies the loss."""
    backward = train.backward

    def changed(run, batches):
        loss = backward(run, batches)
        return loss * (change(run) or 1)

    monkeypatch.setattr(train, "backward", changed)


def test_flags_that_are_accepted_and_forgotten(fit, tmp_path, monkeypatch):
    """Catches: a run that says it hides a modality, compiles or saves memory, and does not."""
    calls, forward, counts, losses = [], d3t.Block.forward, [], []
    monkeypatch.setattr(d3t.Block, "forward", lambda self, *tokens: calls.append(1) or forward(self, *tokens))
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(1) or net)
    for flags in ("", "--checkpointing", "--compile", "--hide joints", "--hide video", "--amp bf16", "--seed 1"):
        calls.clear()
        assert fit(f"--stop-after 2 --overwrite {flags}")[0] == 0
        counts.append(len(calls))
        losses.append(checkpoint(tmp_path / "run")["progress"]["loss"])
    assert counts == [2, 4, 3, 2, 2, 2, 2]
    assert losses[:3] == losses[:1] * 3 and losses[0] not in losses[3:]  # the second follows from the first gradient


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_training_step(amp, fit, monkeypatch):
    """Catches: another schedule or none, gradients that are not clipped, or clipped before they are unscaled."""
    rates, norms, step = [], [], torch.optim.AdamW.step

    def spy(self, *words, **more):
        assert getattr(self, "grad_scale", None) is None  # the step would unscale them, after they were clipped
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *words, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert fit(f"--stop-after 7 --clip 0.01 --amp {amp}")[0] == 0
    ends = [step // 5 + (step % 5 + 1) * 8 / 43 for step in range(7)]  # of the steps, in epochs
    assert rates == pytest.approx([1e-3 * min(2 * e, 0.5 + 0.5 * math.cos(math.pi * (e - 0.5) / 1.5)) for e in ends])
    finite = [norm for norm in norms if math.isfinite(norm)]  # with fp16 the first ones overflow
    assert len(finite) > 1 and finite == pytest.approx([0.01] * len(finite), rel=1e-3)


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("loss, gradient", [(math.nan, 1), (1, math.inf)])
def test_a_step_that_is_not_finite(loss, gradient, amp, fit, tmp_path, monkeypatch):
    """Catches: NaN in the last good checkpoint; with fp16, an overflow that ends the run, a scale that is not saved."""

    def spoil(run):
        if run.progress.step == 3:
            run.model.head.bias.grad[0] *= gradient
            return loss

    before_each_step(monkeypatch, spoil)
    status, printed = fit(f"--save-every 2 --stop-after 7 --amp {amp}")
    state = checkpoint(tmp_path / "run")
    assert all(value.isfinite().all() for value in state["model"].values())
    if loss == 1 and amp == "fp16":
        assert status == 0 and fit("--resume --amp fp16 --stop-after 8")[0] == 0
        assert checkpoint(tmp_path / "run")["scaler"]["scale"] <= state["scaler"]["scale"] < 2**16
        return
    assert status == 1 and state["progress"]["step"] == 2
    assert "not finite at step 4. The 24 clips" in printed and "mean loss of 1." in printed


def test_what_the_flags_reach(fit, tmp_path):
    """Catches: a seed of weights or data alone, a modality not hidden in a test, decay of norms, biases, embeddings."""
    heads = []
    for seed in ("3", "4", "3"):
        torch.rand(len(heads))  # what was drawn before has no effect
        flags = f"{SMALL} --out {tmp_path} --seed {seed} --hide joints --weight-decay 0.3 --pose-embedding"
        run = train.Run(*train.parse_args(flags.split()))
        heads.append(run.model.head.weight)
        for made, training in ((run.dataset("train"), True), (run.dataset("test"), False)):
            assert (made.train, made.seed, made.hide) == (training, int(seed), "joints")
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    decayed, rest = ({id(p) for p in group["params"]} for group in run.optimizer.param_groups)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.3, 0.0]
    for name, p in run.model.named_parameters():
        assert id(p) in (rest if p.ndim == 1 or name.startswith(("position", "modal")) else decayed), name


def test_best(fit, tmp_path, monkeypatch):
    """Catches: the last epoch kept as the best one, or the later one of two that tie."""
    tops = iter([0.25, 0.75, 0.75, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"top1": next(tops), "mean_class": 0.1, "clips": 11}, {}))
    status, printed = fit("--epochs 4 --batch 40")
    assert status == 0 and "best top-1 75.00%" in printed
    assert checkpoint(tmp_path / "run", "best.pt")["progress"]["epoch"] == 2
    assert checkpoint(tmp_path / "run")["progress"] == dataclasses.asdict(train.Progress(epoch=4, step=4, best=0.75))


@pytest.mark.parametrize("stop, workers", [(3, 2), (5, 0), (8, 1)])
def test_a_resumed_run_is_the_uninterrupted_run(stop, workers, fit, tmp_path, whole):
    """Catches: what a checkpoint forgets; an epoch logged twice; batch statistics of tests, or of no training."""
    status, printed = fit(f"--stop-after {stop}")
    assert status == 0 and f"stopped after step {stop}; go on with --resume" in printed
    state = checkpoint(tmp_path / "run")
    state["progress"]["seconds"] += 1000
    for number in (0, workers):  # the second time, as if the first one had been killed before it wrote a checkpoint
        torch.save(state, tmp_path / "run" / "last.pt")
        status, printed = fit(f"--resume --workers {number}")
        assert status == 0 and f"D3T goes on at step {stop}" in printed and "epoch 2  step 10  loss" in printed
        same_runs(tmp_path / "run", whole)
    seconds = re.findall('"seconds": ([0-9.]+)', (tmp_path / "run" / "log.jsonl").read_text())
    assert 1000 < sum(map(float, seconds)) < 1100
    assert checkpoint(whole)["model"]["trunk.stem.1.num_batches_tracked"] == 10


def test_a_run_goes_on(fit, tmp_path, monkeypatch):
    """Catches: --resume that needs a run, its batch, parts or precision; a checkpoint lost to a full disk."""
    status, printed = fit("--resume --stop-after 2 --accumulate 4")
    assert status == 0 and printed.startswith("D3T starts")
    (tmp_path / "run" / "last.tmp").mkdir()  # no file of that name can be written
    status, printed = fit("--resume")
    assert status == 1 and "last.pt cannot be written" in printed.splitlines()[-1] and "Is a directory" in printed
    (tmp_path / "run" / "last.tmp").rmdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    status, printed = fit("--overwrite --preset tiny --stop-after 2")
    assert status == 0 and printed.startswith("D3T goes on at step 2") and " accumulate=1 " in printed
    assert fit("--resume --batch 16 --amp bf16")[0] == 0
    assert [(line["epoch"], line["step"]) for line in log_of(tmp_path / "run")] == [(1, 3), (2, 5)]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert fit("--overwrite --stop-after 1")[1].startswith("D3T starts")


def test_the_order_of_clips(monkeypatch):
    """Catches: a clip seen twice or by two ranks; an order that ranks or a resume change, or not seed and epoch."""
    orders = [[*range(50)]]
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        recipe, listed = train.Recipe(batch=12, accumulate=2, seed=seed), []
        for rank, ranks, seen in ((0, 1, 0), (0, 3, 0), (1, 3, 0), (2, 3, 0), (2, 3, 24)):
            monkeypatch.setattr(train, "RANK", rank)
            monkeypatch.setattr(train, "RANKS", ranks)
            listed.append(train.training_batches(50, recipe, epoch, seen))
        alone, *shared, rest = listed
        items = sum(alone, [])
        assert len({*items}) == 48 and {number for number, _ in items} == {epoch}
        assert [len(part) for part in alone + shared[0]] == [6] * 8 + [2] * 8
        assert [sum(mine, []) for mine in shared] == [items[rank::3] for rank in range(3)] and rest == shared[2][4:]
        orders.append([clip for _, clip in items])
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other)) < 10  # one in chance


SENT = [("SIGINT", "backward", 3, 3), ("SIGUSR1", "backward", 3, 3), ("SIGTERM", "gather", 3, 4)]
SENT += [("SIGHUP", "load_batches", 2, 5)]  # in the call of that number, and the step after which the run stops


@pytest.mark.parametrize("name, function, call, step", SENT)
def test_a_signal_ends_the_step_and_saves(name, function, call, step, fit, tmp_path, monkeypatch, request):
    """Catches: a signal that is lost or loses a step, a second one that kills (but for Ctrl-C), handlers that stay."""
    number, original, handlers = getattr(signal, name), getattr(train, function), []
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, or in the background, some are ignored
    request.addfinalizer(lambda: signal.signal(number, before))

    def interrupted(*words):
        for _ in range((1 if name == "SIGINT" else 2) if len(handlers) + 1 == call else 0):
            os.kill(os.getpid(), number)
        handlers.append(signal.getsignal(number))
        return original(*words)

    monkeypatch.setattr(train, function, interrupted)
    status, printed = fit()
    assert status == 128 + number and signal.getsignal(number) == signal.SIG_DFL
    assert f"stopped {'in a test' if step == 5 else f'after step {step}'}; go on with --resume\n" in printed
    assert checkpoint(tmp_path / "run")["progress"]["step"] == step
    assert (handlers.pop() == signal.default_int_handler) == (name == "SIGINT")
    handlers.clear()
    signal.signal(number, signal.SIG_IGN)  # as under nohup
    assert fit("--overwrite --stop-after 4")[0] == 0 and {*handlers} == {signal.SIG_IGN}


def test_bad_clips_of_a_run(fit, tmp_path, monkeypatch, capsys):
    """Catches: bad clips not told, or told twice an epoch; the rule of two and 1 %; a test that leaves out a clip."""
    load = data.Dataset.load

    def damaged(self, clip, rng):
        if clip.name.endswith(" 3"):
            raise data.BadClip(f"{clip.name}.avi: damaged")
        return load(self, clip, rng)

    monkeypatch.setattr(data.Dataset, "load", damaged)
    status, printed = fit("--batch 43")
    assert status == 1 and printed.splitlines()[-1] == "train.py: test 3.avi: damaged"
    assert printed.count("warning: a clip was replaced by another one: train 3.avi: damaged\n") == 1
    monkeypatch.setattr(train, "evaluate", lambda *_: ({"top1": 0.5}, {}))
    status, printed = fit("--batch 43 --resume")
    assert printed.count("warning") == 1 and [line["bad"] for line in log_of(tmp_path / "run")] == [1, 1]
    run = train.Run(*train.parse_args([*SMALL.split(), "--out", str(tmp_path / "other")]))
    for batch in ([("a", "frame 1"), ("a", "frame 2")], [("b", "frame 7")]):
        train.count_step(run, 1.0, 1.0, [{"bad": batch}], 200)
    assert capsys.readouterr().err.count("warning") == 2  # of a and b
    with pytest.raises(train.RunError, match="2 of 199 clips, more than 1 %, cannot be read:\nframe 1\nframe 7"):
        train.count_step(run, 1.0, 1.0, [{"bad": []}], 199)


def test_what_a_source_lacks(fit, monkeypatch):
    """Catches: clips left out without a word, a run on a part of the clips, or that goes on with others."""
    source = few_clips()
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    source.missing = ["gone has no video"]
    assert "warning: 1 clips are left out, such as: gone has no video\n" in fit("--stop-after 1")[1]
    source.clips["test"].pop()
    assert "the checkpoint does not fit: clips is [43, 11], not [43, 10]" in fit("--resume")[1]
    source.clips["train"].clear()
    assert "synthetic has 0 training and 10 test clips" in fit("--overwrite")[1]
    source.problems = ["walk.avi: damaged"]
    status, printed = fit("--overwrite")
    assert status == 1 and "1 clips cannot be used" in printed and "walk.avi: damaged" in printed


def test_scores(fit, tmp_path, whole, monkeypatch):
    """Catches: scores that are not those of the accuracy, classes by number, one without clips counted, a file lost."""
    source, path = few_clips(), tmp_path / "scores.npz"
    kept = [clip for clip in source.clips["test"] if clip.label < 3]
    turned = [dataclasses.replace(clip, label=2 - clip.label) for clip in kept]
    source.classes, source.clips = data.SYNTHETIC_ACTIONS[2::-1], {"train": [], "test": turned}
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    printed = fit(f"--eval {whole}/last.pt --scores {path}")[1]
    names, labels, logits, classes = (np.load(path)[key] for key in ("names", "labels", "logits", "classes"))
    assert classes.tolist() == data.SYNTHETIC_ACTIONS and logits.shape == (len(kept), 4)
    assert [*zip(names, labels)] == [(clip.name, clip.label) for clip in kept]
    right = logits.argmax(1) == labels
    by_class = [right[labels == label].mean() for label in range(3)]
    result = json.loads(printed.splitlines()[-1])
    assert result == pytest.approx({"top1": right.mean(), "mean_class": np.mean(by_class), "clips": len(kept)})
    assert result["top1"] != result["mean_class"] and fit(f"--eval {whole}/last.pt --scores {path}")[0] == 2
    status, again = fit(f"--eval {whole}/last.pt --scores {tmp_path}/no/scores.npz")
    assert status == 1 and printed.splitlines()[-1] in again and "No such file" in again


USAGE = {
    "--out {0}/run": "holds a run", "--resume --overwrite": "not allowed", "--out {0}/evil.pt": "--out .*evil.pt: ",
    "--resume --out {0}/run --channels 8": "channels is 4, not 8", "--resume --out {0}/run --lr 1": "lr is 0.001",
    "--resume --out {0}/run --preset small": "kernel is 3", "--resume --out {0}/run --data pyskl": "--data synthetic",
    "--resume --out {0}/settings": "no checkpoint .*more", "--resume --out {0}/recipe": "no checkpoint .*more",
    "--resume --out {0}/progress": "no checkpoint .*more", "--resume --out {0}/model": "does not fit: .*Missing key",
    "--resume --out {0}/optimizer": "does not fit: .*group", "--eval {0}/gone.pt": "gone.pt",
    "--eval {0}/evil.pt": "evil.pt is no checkpoint of this train.py: Weights only load failed",
    "--eval {0}/run/last.pt --channels 8": "channels is 4, not 8", "--eval {0}/run/last.pt --preset tiny": "--preset",
    "--eval {0}/run/last.pt --weights x": "--weights", "--eval {0}/run/last.pt --scores x.csv": ".npz",
    "--scores x.npz": "--eval", "--weights {0}/evil.pt": "--weights .*evil.pt does not fit: Weights only load failed",
    "--channels 8 --weights {0}/run/last.pt": "--weights .*last.pt does not fit: ", "--batch 7 --accumulate 2": "of 2 ",
    "--out {0}/run --overwrite --batch 64": "most 43", "--warmup 2": "warmup = 2", "--warmup nan": "warmup must be",
    "--hide me": "joints", "--workers -1": "--workers", "--save-every 0": "--save-every", "--device cuda": "cuda: ",
}  # fmt: skip


def test_usage_errors(fit, whole, tmp_path, monkeypatch):
    """Catches: a traceback, a run that starts with other settings than were asked for, a run that is overwritten."""
    for part in ("run", "settings", "recipe", "progress", "model", "optimizer"):
        (tmp_path / part).mkdir()
        torch.save(checkpoint(whole) | {part: {"more": 0}}, tmp_path / part / "last.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system, protocol=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(train, "LOCAL_RANK", 99)  # no machine has so many devices
    for flags, said in USAGE.items():
        status, printed = fit(flags.format(tmp_path), out="new")
        assert status == 2 and re.search(said, printed), flags
        assert not re.search("\n.|weights_only", printed), flags  # torch advises to trust the file
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}, flags


def test_weights_of_a_checkpoint(fit, tmp_path, whole, monkeypatch):
    """Catches: fine-tuning with other classes or another size that fails, forgets weights, or bends a table."""
    source = few_clips()
    source.classes = [*source.classes[1:], "bow"]  # as many
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    status, printed = fit(f"--frames 6 --height 32 --weights {whole}/last.pt --lr 1e-9 --stop-after 1")
    new = ["blocks.0.deformable.search.conv.weight", "head.weight", "head.bias"]  # h was shorter than k
    assert status == 0 and f"has none that fit: {', '.join(new)}\n" in printed
    before, after = checkpoint(whole)["model"], checkpoint(tmp_path / "run")["model"]
    for key in before.keys() - {"position_t", "position_s", "modal", *new}:
        assert "running" in key or "num_batches" in key or torch.allclose(before[key], after[key], atol=1e-6), key
    assert after["position_t"].shape == (6, 1, 16) and not torch.equal(before["head.weight"], after["head.weight"])
    a, b, _, d = before["modal"]
    expected = torch.stack([a, 0.5 * (a + b), d])  # 1.5 * 4 / 6 - 0.5 = 0.5; the ends lie beyond the old centres
    assert torch.allclose(after["modal"][[0, 1, 5]], expected, atol=1e-6)
    a, b = before["position_s"].view(2, 2, 16)
    assert torch.allclose(after["position_s"].view(4, 2, 16)[1], 0.75 * a + 0.25 * b, atol=1e-6)


def test_weights_of_torchvision(fit, tmp_path):
    """Catches: weights that load in part and in silence, a command that cannot go on with --resume."""
    weights = {name: value + 1 for name, value in d3t.Trunk(4).state_dict().items()}
    flags, path = f"--weights {tmp_path}/w.pt --lr 1e-9 --stop-after", tmp_path / "w.pt"
    torch.save(weights | {"layer4.0.conv1.0.0.weight": torch.zeros(1), "fc.bias": torch.zeros(400)}, path)
    assert fit(f"{flags} 1")[0] == 0
    trained = checkpoint(tmp_path / "run")["model"]
    for name, _ in d3t.Trunk(4).named_parameters():
        assert torch.allclose(trained[f"trunk.{name}"], weights.pop(name), atol=1e-6)
    torch.save(weights, path)  # without any parameter
    status, printed = fit(f"{flags} 1", out="other")
    assert status == 2 and "stem.0.weight" in printed and fit(f"{flags} 2 --resume")[0] == 0


@pytest.mark.parametrize("has_bf16, amp", [(True, "bf16"), (False, "fp16")])
def test_the_command_line(has_bf16, amp, fit, monkeypatch):
    """Catches: a field of the dataclasses that flags or help forgot; fp16 where CUDA has bf16, or bf16 it emulates."""
    status, printed = fit("-h")
    assert status == 0 and all(f"--{name.replace('_', '-')}" in printed for name in train.DEFAULTS)
    assert "[224; small" in printed and "[12; small 8; tiny 6]" in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    options, given = train.parse_args(["--no-joint-attention", "--sigma=2", "--data=pennaction"])
    assert given == {"joint_attention": False, "sigma": 2.0} and options.preset == "paper"
    assert (options.device, options.amp) == ("cuda", amp)


SERVER = multiprocessing.get_context("forkserver")  # imports torch once and forks each process below
SERVER.set_forkserver_preload(["test_d3t", "torch._dynamo"])


def process(function, words, folder, port, rank, ranks):
    """What runs in a process: `function(words)` on 43 clips, printing to FOLDER/RANK; its result is the exit status."""
    os.setpgrp()
    train.RANK, train.RANKS = rank, ranks
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as in a run of one's own
    for number in (1, 2):
        os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    data.SOURCES["synthetic"] = few_clips, []
    os.replace = os.replace if rank == 0 else None  # the others write nothing
    sys.exit(function([*SMALL.split(), "--out", str(folder / "run"), *map(str, words)]))


def statuses(folder, *words, function=train.main, ranks=1):
    """Run a process for each rank, without torchrun: their exit statuses, None for one that takes over a minute."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [SERVER.Process(target=process, args=(function, words, folder, port, i, ranks)) for i in range(ranks)]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    ended = [each.exitcode for each in started]
    for each in started:
        each.kill()
    return ended


def freeze_statistics(words):
    """Train with batch norms in evaluation mode: on a CPU, their batch statistics are those of one rank."""
    D3T.train = lambda model, mode=True: torch.nn.Module.train(model, False)
    return train.main(words)


def test_one_two_and_four_ranks_take_the_same_step(tmp_path, whole):
    """Catches: gradients summed instead of averaged, clips that two ranks share, micro-batches with wrong weights."""
    states = []
    words = ["--weights", whole / "last.pt", "--clip", 1e9, "--overwrite", "--stop-after", 1, "--accumulate"]
    for ranks, parts in ((1, 1), (1, 4), (2, 2), (4, 1)):
        assert statuses(tmp_path, *words, parts, function=freeze_statistics, ranks=ranks) == [0] * ranks
        states.append(checkpoint(tmp_path / "run"))
    for state in states[1:]:
        assert state["progress"]["loss"] == pytest.approx(states[0]["progress"]["loss"], rel=1e-5)
        for a, b in zip(*(each["optimizer"]["state"].values() for each in (states[0], state)), strict=True):
            assert (a["exp_avg"] - b["exp_avg"]).norm() <= 1e-5 * a["exp_avg"].norm() + 1e-10  # a tenth of the gradient


def spoil_statistics(words):
    """Test where the batch norms of each rank have other running statistics, as after a training step."""
    evaluate = train.evaluate

    def spoiled(run, dataset):
        for statistics in run.model.buffers():
            statistics += train.RANK
        return evaluate(run, dataset)

    train.evaluate = spoiled
    return train.main(words)


def test_three_ranks_test_every_clip_once(tmp_path, whole):
    """Catches: clips counted twice or left out, statistics of several ranks, a result printed by each rank."""
    path, words = tmp_path / "scores.npz", ["--eval", whole / "last.pt", "--scores"]
    assert statuses(tmp_path, *words, path, function=spoil_statistics, ranks=3) == [0] * 3
    printed = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert '"clips": 11}' in printed[0] and printed[1:] == ["", ""]
    assert np.load(path)["names"].tolist() == [f"test {i}" for i in range(11)]
    assert statuses(tmp_path, *words, tmp_path / "alone.npz") == [0]
    close(*(np.load(tmp_path / name)["logits"] for name in ("scores.npz", "alone.npz")), 1e-5)


def interrupt_last_rank(words):
    """Train; in the fourth step of the last rank its group of processes gets a signal, as from a terminal."""
    *words, name = words

    def interrupt(run):
        if run.progress.step == 3 and train.RANK == train.RANKS - 1:
            os.killpg(0, signal.Signals[name])  # KeyError: then this rank fails

    before_each_step(pytest.MonkeyPatch(), interrupt)
    return train.main(words)


STOPS = [("SIGTERM", 143, 4, 1, 1), ("SIGKILL", -9, 2, 1, 0), ("SIGUSR1", 138, 4, 2, 0), ("none", 1, 2, 2, 1)]


@pytest.mark.parametrize("name, status, step, ranks, workers", STOPS)
def test_a_run_that_is_stopped_goes_on(name, status, step, ranks, workers, fit, tmp_path, whole):
    """Catches: steps lost or taken twice, workers that a signal ends, ranks that wait for one that stops or fails."""
    words = ["--save-every", 2, "--workers", workers, name]
    assert statuses(tmp_path, *words, function=interrupt_last_rank, ranks=ranks) == [status] * ranks
    assert checkpoint(tmp_path / "run")["progress"]["step"] == step
    assert ("KeyError: 'none'" in (tmp_path / str(ranks - 1)).read_text()) == (name == "none")
    assert fit("--resume")[0] == 0
    if ranks == 1:  # otherwise each rank had its own batch statistics
        same_runs(tmp_path / "run", whole)


def test_workers_ignore_signals(monkeypatch):
    """Catches: loading processes that end where a batch system signals every process of a job."""
    ignored = []
    monkeypatch.setattr(os, "setpgrp", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append((number.name, handler)))
    train.leave_group(0)
    assert ignored == [(name, signal.SIG_IGN) for name in ("SIGINT", "SIGHUP", "SIGUSR1")]


def test_the_script_under_torchrun(tmp_path):
    """Catches: wrapped names in a checkpoint, a loss summed over ranks, letters that a terminal lacks, a slow exit."""
    script = "import os, runpy, data\ndata.SOURCES['synthetic'] = lambda: data.synthetic(train=43, test=11), []\n"
    script += "leave = os._exit\nos._exit = lambda status: os.write(1, b'at once\\n') and leave(status)\n"
    (tmp_path / "few.py").write_text(script + "runpy.run_module('train', run_name='__main__')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [tmp_path / "few.py", *SMALL.split(), "--out", tmp_path / "Übung"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients in another layout than their weights are copied at every step
    assert done.stdout.count("at once") == 2  # otherwise a thread of gloo may abort the rank
    assert not any("module." in key for key in checkpoint(tmp_path / "Übung")["model"])
    first, last = log_of(tmp_path / "Übung")
    assert (first["clips"], first["step"], last["step"], last["bad"]) == (11, 5, 10, 0)
    assert 1 < first["loss"] < 2  # ln 4 at first, not the sum over ranks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    """Catches: settings of the C library that it ignores."""
    train.keep_memory()
    faults = []
    for _ in range(20):
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[9] < 100  # of 10 * 16,384 pages


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_cuda(fit, tmp_path, amp):
    """Catches: a tensor left on the CPU, a scaler that is not saved."""
    assert fit(f"--device cuda --amp {amp} --stop-after 3")[0] == 0
    assert fit(f"--device cuda --amp {amp} --resume --accumulate 2 --checkpointing")[0] == 0
    assert fit(f"--eval {tmp_path}/run/best.pt")[0] == 0


# ---- The README ----------------------------------------------------------------------------------------------------
def test_code_of_the_readme(tmp_path, monkeypatch, capsys):
    """Catches: code that fails or states another shape; a path from videos to labels and scores that breaks off."""
    pytest.importorskip("av", reason="needs av, the decoder of videos")
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for block, command in re.findall(r"```python\n(.*?)```|^    python ([^\n]*)$", README, re.DOTALL | re.MULTILINE):
        if command:
            script, *words = command.removeprefix("-m ").split()
            with contextlib.suppress(SystemExit):
                assert importlib.import_module(script.removesuffix(".py")).main(words) == 0, capsys.readouterr()
            printed += capsys.readouterr().out
        exec(block.replace("224", "32"), names)  # the paper's size takes long
        for name, shape in re.findall(r"^\s*(\w+) = .*# \(([\d, ]+)\)", block, re.MULTILINE):
            assert tuple(names[name].shape) == tuple(map(int, shape.split(","))), name
    assert "has none that fit: head.weight, head.bias" in printed and re.search(r"\d%  (walk|jump)\n", printed)
    assert len([*(tmp_path / "predicted").iterdir()]) == 1 and names["confusion"].sum() == 1


def test_commands_of_the_readme(capsys):
    """Catches: a command in the README with a flag that does not exist."""
    for script, text in re.findall(r"(train|tools\.\w+)(?:\.py)? ([^`\n&|#]*-[^`\n&|#]*)", README):
        flags = {word for word in text.split() if word.startswith("-")}
        for name in {"train", script}:  # tools.ablate hands flags on
            with contextlib.suppress(SystemExit):
                importlib.import_module(name).main(["-h"])
        known = capsys.readouterr().out
        assert not [flag for flag in flags if not re.search(rf"{flag}\b", known)], (script, text)
