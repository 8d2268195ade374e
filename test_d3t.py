"""The proof of D3T. Each test's docstring names the bug that it would catch.

The first part holds slow loops in float64 that were written from the paper's sentences, not from `d3t.py`: they take
numpy arrays, name every token, and share no code with the model. The model has to agree with them.
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import functools
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
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import d3t
import data
import train
from d3t import D3T, Settings
from tools import ablate, bench, explain

HERE = Path(__file__).parent
DOUBLE = torch.float64


# --------------------------------------------------------------------------------------------------------------------
# The oracle: plain loops, float64, from the paper
# --------------------------------------------------------------------------------------------------------------------


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
        out = loop_attention(
            X[start : start + window].reshape(-1, D),
            X[start : start + window].reshape(-1, D),
            part(w, "attention."),
            heads,
        )
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


# --------------------------------------------------------------------------------------------------------------------
# The model against the oracle
# --------------------------------------------------------------------------------------------------------------------


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


GRIDS = [((3, 5, 4), 3), ((6, 3, 7), 3), ((4, 7, 2), 5)]  # T, h, w and k; the last has axes shorter than k


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (3, 2, 4, 9, 6), (2, 5, 1, 7, 11)])
def test_joint_tokenizer_is_eq_1_and_2(shape):
    """Swapped x and y, a normalised Gaussian, a wrong sigma, frames or joints mixed."""
    B, C, T, h, w = shape
    F_a, joints = randn(*shape), randn(B, T, 6, 2).abs() * torch.tensor([w, h])
    visible = torch.arange(B * T * 6).view(B, T, 6) % 4 > 0
    for sigma in (0.6, 1.0, 2.3):
        expected = loop_joint_tokens(F_a.numpy(), joints.numpy(), visible.numpy(), sigma)
        close(d3t.joint_tokens(F_a, joints, visible, sigma), expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_token_search_is_eq_3(grid, k):
    """A wrong reference point, offset range, axis order or interpolation."""
    search = randomize(d3t.TokenSearch(6, grid, k), 0.5)
    Z = randn(2, *grid, 6)
    points, out = search.points(Z), search(Z)
    for b in range(2):
        expected, expected_points = loop_search(Z[b].numpy(), weights(search), k)
        close(points[b], expected_points)
        close(out[b], expected)
    assert (points - search.reference).abs().amax((0, 1, 2, 3))[torch.tensor(search.conv.kernel_size) > 1].min() > 0.1


@pytest.mark.parametrize("B, n, m, heads", [(2, 5, 7, 1), (3, 4, 3, 2), (2, 1, 9, 4)])
def test_attention_is_eq_6_and_7(B, n, m, heads):
    """A wrong scale, heads cut along the wrong axis, keys and values exchanged, a LayerNorm too many."""
    attention, X, X_ = randomize(d3t.AttentionBlock(8, heads)), randn(B, n, 8), randn(B, m, 8)
    expected = [loop_attention(X[b].numpy(), X_[b].numpy(), weights(attention), heads) for b in range(B)]
    close(attention(X, X_), expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_deformable_attention_is_eq_4_to_7(grid, k):
    """Modal tokens attached to the wrong frame, selected tokens used as queries, outputs split in the wrong place."""
    T, h, w = grid
    module = randomize(d3t.DeformableAttention(8, 2, grid, k))
    Z, M = randn(2, T, h * w, 8), randn(2, T, 2, 8) * 2
    out_Z, out_M = module(Z, M)
    for b in range(2):
        z, m_rgb, m_cls = loop_deformable(
            Z[b].numpy(), M[b, :, 0].numpy(), M[b, :, 1].numpy(), weights(module), 2, grid, k
        )
        close(out_Z[b], z)
        close(out_M[b], np.stack([m_rgb, m_cls], 1))


@pytest.mark.parametrize("T, R, window, stride", [(2, 7, 3, 2), (3, 5, 5, 1), (1, 8, 3, 3), (2, 6, 4, 3)])
def test_joint_stride_attention_is_fig_4a(T, R, window, stride):
    """A joint left out at the end, copies summed instead of averaged, windows over frames, modal tokens shared."""
    module = randomize(d3t.JointStrideAttention(8, 2, R, window, stride))
    P, M = randn(2, T, R, 8), randn(2, T, 2, 8) * 2
    out_P, out_M = module(P, M)
    for b in range(2):
        p, cls, pose = loop_joint_stride(
            P[b].numpy(), M[b, :, 0].numpy(), M[b, :, 1].numpy(), weights(module), 2, window, stride
        )
        close(out_P[b], p)
        close(out_M[b], np.stack([cls, pose], 1))


@pytest.mark.parametrize("T, N, window, stride", [(7, 3, 3, 2), (5, 4, 5, 5), (6, 2, 4, 1), (8, 3, 3, 3)])
def test_temporal_stride_attention_is_fig_4b(T, N, window, stride):
    """The same for frames: a last frame left out, a wrong mean, tokens of one window that see another."""
    module, X = randomize(d3t.TemporalStrideAttention(8, 2, T, window, stride)), randn(2, T, N, 8)
    expected = [loop_temporal_stride(X[b].numpy(), weights(module), 2, window, stride) for b in range(2)]
    close(module(X), expected)


@pytest.mark.parametrize(
    "changes", [{}, dict(frames=4, width=48, joints=5), dict(height=41, temporal_window=5), dict(pose_embedding=True)]
)
def test_model_is_fig_2a(changes):
    """Modal tokens dispatched to the wrong attention, the CLS fusion forgotten, an embedding or a norm missing."""
    s = small(**changes)
    model = randomize(D3T(s))
    video, joints, visible = clip_for(s)
    video = (video / 255 - 0.4) / 0.2  # a float video counts as normalised
    logits = model(video.double(), joints.double(), visible)
    F_a, F_b = model.trunk(video.double())
    assert F_a.shape[2:] == (s.frames, -(-s.height // 2), -(-s.width // 2)) and F_b.shape[2:] == s.grid
    w, P = weights(model), loop_joint_tokens(F_a.detach().numpy(), joints.double().numpy(), visible.numpy(), s.sigma)
    for b in range(2):
        Z = F_b[b].detach().numpy().transpose(1, 2, 3, 0).reshape(s.frames, -1, 4 * s.channels)
        Z = np.array([[layer_norm(z + w["position_t"][t, 0] + w["position_s"][0, n], w, "norm_rgb")
                       for n, z in enumerate(frame)] for t, frame in enumerate(Z)])  # fmt: skip
        p = np.array([[layer_norm(w["embed_pose.weight"] @ j, w, "norm_pose") for j in frame] for frame in P[b]])
        p = p + w.get("position_p", 0.0)
        m = w["modal"].transpose(1, 0, 2)
        for i in range(s.blocks):
            Z, p, *m = loop_block(Z, p, *m, part(w, f"blocks.{i}."), s)
        expected = w["head.weight"] @ np.concatenate([token.mean(0) for token in m]) + w["head.bias"]
        close(logits[b], expected)


# --------------------------------------------------------------------------------------------------------------------
# Known mistakes of others
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, k", [((5, 9, 7), 3), ((7, 8, 9), 7), ((1, 5, 8), 3)])
def test_untrained_search_returns_the_exact_crop(grid, k):
    """Time and width exchanged, positions scaled by n - 1 for cells and the like: all return something else."""
    search = d3t.TokenSearch(4, grid, k).double()
    torch.nn.init.zeros_(search.offset.weight)
    torch.nn.init.zeros_(search.offset.bias)
    Z = randn(2, *grid, 4)
    t, y, x = (slice((min(k, n) - 1) // 2, n - (min(k, n) - 1) // 2) for n in grid)
    close(search(Z), Z[:, t, y, x], 1e-14)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_step_along_one_axis_moves_that_axis_alone(axis):
    """x, y, z and t, h, w exchanged: a point one token further along an axis reads the next token of that axis."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (3, 5, 4)), indexing="ij"), -1)[None].double()
    points = grid[:, :2, :4, :3].clone()  # Z holds its own coordinates, so a sample says where it was taken
    points[..., axis] += 1
    close(d3t.sample_tokens(grid, points), points, 1e-14)
    points[..., axis] -= 0.7
    close(d3t.sample_tokens(grid, points), points, 1e-14)


def test_axis_of_one_token():
    """Division by n - 1: a single token on an axis gave NaN."""
    Z = randn(1, 1, 1, 1, 3)
    assert torch.equal(d3t.sample_tokens(Z, torch.zeros(1, 2, 3, dtype=DOUBLE)), Z.view(1, 1, 3).expand(1, 2, 3))
    assert torch.equal(d3t.reference_points((1, 1, 4), (1, 1, 4)), torch.tensor([[[[0, 0, 1.5]]]]))


def test_absent_joints_do_not_swamp_the_gradient():
    """A bias before the norm of pose tokens: where the token is zero but for it, its gradient grows by 1/sqrt(eps)."""
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


def test_no_point_starts_dead_and_none_leaves():
    """Clamped positions: outer points got no gradient. Here all get one, and no offset can leave the volume."""
    search = d3t.TokenSearch(4, (4, 5, 6), 3).double()
    Z = randn(1, 4, 5, 6, 4)
    points = search.points(Z).detach().requires_grad_()
    d3t.sample_tokens(Z, points + 1e-3).square().sum().backward()
    assert (points.grad.abs() > 0).all()
    for extreme in (-1e9, 1e9):
        torch.nn.init.constant_(search.offset.bias, extreme)
        p = search.points(Z)
        assert (p >= 0).all() and (p <= torch.tensor([3, 4, 5])).all()
        wanted = 0 if extreme < 0 else 1
        assert torch.equal(
            p.amin((0, 1, 2, 3)) if wanted == 0 else p.amax((0, 1, 2, 3)), wanted * p.new_tensor([3, 4, 5])
        )


def test_joints_lie_on_the_cells_that_see_them():
    """Joints placed on the map by a rule that is not the trunk's: half a pixel off at stride 2, more at a larger one.

    With equal weights everywhere the gradient of a cell of F_a is its receptive field, whose centre is the cell's
    place among the pixels; a joint there must have its Gaussian centred on that cell.
    """
    trunk = d3t.Trunk(4).double().eval()
    for p in trunk.parameters():
        torch.nn.init.constant_(p, 0.01 if p.ndim > 1 else 1.0)
    for row, column in ((10, 13), (15, 11)):
        video = torch.ones(1, 3, 1, 52, 60, dtype=DOUBLE, requires_grad=True)
        trunk.layer1(trunk.stem(video))[0, :, 0, row, column].sum().backward()
        field = video.grad.sum((0, 1, 2))
        y = (field.sum(1) * torch.arange(52)).sum() / field.sum()
        x = (field.sum(0) * torch.arange(60)).sum() / field.sum()
        here = torch.ones(1, 1, 1, dtype=torch.bool)
        heatmap = d3t.joint_heatmaps(torch.stack([x, y]).view(1, 1, 1, 2), here, (26, 30), 2, 1.0)[0, 0, 0]
        assert heatmap.argmax() == row * 30 + column and abs(heatmap.max() - 1) < 1e-9


# --------------------------------------------------------------------------------------------------------------------
# Gradients, settings, precision, batches
# --------------------------------------------------------------------------------------------------------------------


def test_gradcheck():
    """A backward pass that does not belong to its forward pass, points without a gradient."""
    check = functools.partial(torch.autograd.gradcheck, atol=1e-6)
    joints, visible = randn(2, 2, 3, 2).abs() * 6, torch.ones(2, 2, 3, dtype=torch.bool)
    assert check(lambda f: d3t.joint_tokens(f, joints, visible, 1.0), randn(2, 2, 2, 4, 5).requires_grad_())
    search = randomize(d3t.TokenSearch(3, (3, 4, 5), 3), 0.5)  # trained: no point on a token, where sampling has a kink
    assert check(search, randn(1, 3, 4, 5, 3).requires_grad_())
    weight = search.offset.weight.detach().clone().requires_grad_()
    swapped = functools.partial(torch.func.functional_call, search)
    assert check(lambda w: swapped({"offset.weight": w}, (randn(1, 3, 4, 5, 3),)), weight)
    deformable = randomize(d3t.DeformableAttention(4, 2, (2, 3, 4), 2))
    assert check(deformable, (randn(1, 2, 12, 4).requires_grad_(), randn(1, 2, 2, 4).requires_grad_()))
    joint = randomize(d3t.JointStrideAttention(4, 2, 5, 3, 2))
    assert check(joint, (randn(2, 2, 5, 4).requires_grad_(), randn(2, 2, 2, 4).requires_grad_()))
    assert check(randomize(d3t.TemporalStrideAttention(4, 2, 5, 3, 2)), randn(2, 5, 3, 4).requires_grad_())


TABLE_4 = [(False, True, True), (True, False, False), (True, False, True), (True, True, False), (True, True, True)]


@pytest.mark.parametrize("modal", [3, 1, 0])
@pytest.mark.parametrize("which", TABLE_4)
def test_every_parameter_learns_in_every_ablation(which, modal):
    """A parameter that no output depends on, in one row of Tables 4 and 5; a gradient that is not finite."""
    names = ("deformable_attention", "joint_attention", "temporal_attention")
    s = small(channels=8, modal_tokens=modal, pose_embedding=True, **dict(zip(names, which)))
    torch.manual_seed(0)
    model = D3T(s).double()
    for module in model.modules():
        if isinstance(module, d3t.TokenSearch):  # at zero the offset layer would pass no gradient on
            torch.nn.init.normal_(module.offset.weight)
    F.cross_entropy(model(*clip_for(s)), torch.tensor([1, 4])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-13, name  # rounding leaves 1e-18 where there is no gradient, as for a key's bias


def test_hidden_joints_have_no_effect():
    """A hidden joint's coordinates leak into its token, or NaN passes through a product with zero."""
    s = small()
    model = D3T(s).eval()
    video, joints, visible = clip_for(s)
    visible[0, 0, 0] = visible[1, 3, 2] = False
    logits = model(video, joints, visible)
    for value in (0.0, 7.3, float("nan"), float("inf"), -float("inf"), 1e38):
        changed = joints.clone()
        changed[~visible] = value
        assert torch.equal(model(video, changed, visible), logits)
    shown = visible.clone()
    shown[0, 0, 0] = True
    assert not torch.equal(model(video, joints, shown)[0], logits[0])
    model.train()
    joints[~visible] = float("nan")
    model(video, joints, visible).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for part in (joints[..., 1], joints):  # said to be visible, but not finite: absent as well
        part[visible] = float("nan")
        assert model(video, joints, visible).isfinite().all()


def test_clips_of_a_batch_do_not_mix():
    """A reshape that mixes the batch with windows or frames."""
    s = small()
    model = randomize(D3T(s))
    video, joints, visible = clip_for(s, B=3)
    inputs = ((video - model.mean) / model.std).double(), joints.double(), visible
    logits = model(*inputs)
    close(torch.cat([model(*(x[b : b + 1] for x in inputs)) for b in range(3)]), logits, 1e-12)
    order = torch.tensor([2, 0, 1])
    close(model(*(x[order] for x in inputs)), logits[order], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_positions_in_float32(dtype, monkeypatch):
    """Sampling points or heat maps rounded to 16 bits: a 3-digit coordinate is then off by up to half a pixel."""
    s = small()
    torch.manual_seed(0)
    model = D3T(s).eval()
    torch.nn.init.normal_(model.blocks[0].deformable.search.offset.weight)
    seen, offsets = {}, []
    for block in model.blocks:  # whose sum with the points is float32 even where they are not
        block.deformable.search.offset.register_forward_hook(lambda *words: offsets.append(words[2].dtype))

    def spy(module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            out = function(*args, **kwargs)
            seen.setdefault(name, []).append((out.dtype, [a.dtype for a in args if isinstance(a, torch.Tensor)]))
            return out

        monkeypatch.setattr(module, name, wrapped)

    spy(d3t, "joint_heatmaps")
    spy(d3t, "sample_tokens")
    spy(d3t.TokenSearch, "points")
    spy(F, "scaled_dot_product_attention")
    with torch.autocast("cpu", dtype):
        logits = model(*clip_for(s))
    assert logits.isfinite().all()
    assert {out for out, _ in seen["joint_heatmaps"]} == {torch.float32}
    assert {out for out, _ in seen["points"]} == {*offsets} == {torch.float32}
    assert all(inputs[1] == torch.float32 for _, inputs in seen["sample_tokens"])
    assert {out for out, _ in seen["scaled_dot_product_attention"]} == {dtype}  # while the rest is in 16 bits
    close(logits.float(), model(*clip_for(s)), 0.1)


def test_trunk_is_torchvisions():
    """A renamed or reshaped parameter: the Kinetics weights of r2plus1d_18 would not load."""
    expected = {}

    def conv(name, outputs, inputs, *kernel):
        expected[f"{name}.weight"] = (outputs, inputs, *kernel)

    def norm(name, channels):
        for what in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{what}"] = (channels,)
        expected[f"{name}.num_batches_tracked"] = ()

    conv("stem.0", 45, 3, 1, 7, 7), norm("stem.1", 45), conv("stem.3", 64, 45, 3, 1, 1), norm("stem.4", 64)
    for layer, inputs, outputs, first, second in (
        (1, 64, 64, 144, 144),
        (2, 64, 128, 230, 288),
        (3, 128, 256, 460, 576),
    ):
        for block, wide, middle in ((0, inputs, first), (1, outputs, second)):
            for half, width in ((1, wide), (2, outputs)):
                name = f"layer{layer}.{block}.conv{half}"
                conv(f"{name}.0.0", middle, width, 1, 3, 3), norm(f"{name}.0.1", middle)
                conv(f"{name}.0.3", outputs, middle, 3, 1, 1), norm(f"{name}.1", outputs)
        if layer > 1:
            (
                conv(f"layer{layer}.0.downsample.0", outputs, inputs, 1, 1, 1),
                norm(f"layer{layer}.0.downsample.1", outputs),
            )
    assert {name: tuple(v.shape) for name, v in d3t.Trunk(64).state_dict().items()} == expected


def test_trunk_computes_r2plus1d():
    """An activation, a shortcut or a norm too few, or a stride in time: the names of the weights stay torchvision's."""
    trunk = randomize(d3t.Trunk(4))
    w, video = trunk.state_dict(), randn(1, 3, 3, 17, 22)

    def conv(x, name, stride=1):
        time, _, space = w[f"{name}.weight"].shape[2:]
        return F.conv3d(x, w[f"{name}.weight"], None, (1, stride, stride), (time // 2, space // 2, space // 2))

    def norm(x, name):
        mean, var, scale, shift = (
            w[f"{name}.{of}"].view(-1, 1, 1, 1) for of in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

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


def test_trunk_equals_torchvisions():
    """Weights that load into another network: the answers are compared with those of torchvision's, where it is."""
    try:
        from torchvision.models.video import r2plus1d_18
    except (ImportError, RuntimeError) as error:  # RuntimeError: one of another torch
        pytest.skip(f"needs torchvision: {error}")
    theirs, ours, video = randomize(r2plus1d_18()), d3t.Trunk(64).double(), randn(1, 3, 5, 42, 50)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("layer4", "fc"))})
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.stride = (1, *module.stride[1:])  # what this project changes: no stride in time
    for training in (False, True):
        F_a, F_b = ours.train(training)(video)
        a = theirs.train(training).layer1(theirs.stem(video))
        close(F_a, a)
        close(F_b, theirs.layer3(theirs.layer2(a)))


def test_bytes_are_normalised():
    """A mean of another scale or order than the pixels'."""
    s = small()
    model = D3T(s).eval()
    video, *rest = clip_for(s)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ([0.432, 0.395, 0.376], [0.228, 0.221, 0.217]))
    close(model(video, *rest), model((video / 255 - mean) / std, *rest), 1e-5)


def test_a_new_model():
    """A search that does not start at the regular grid; modal tokens that all start alike."""
    model = D3T(small())
    assert not any(p.any() for block in model.blocks for p in block.deformable.search.offset.parameters())
    assert model.modal.std() > 0.01


@pytest.mark.parametrize(
    "changes, numbers",
    [
        (dict(joint_window=8), ("8", "7")), (dict(temporal_window=6), ("6", "5")), (dict(heads=3), ("8", "3")),
        (dict(joint_stride=5), ("5", "4")), (dict(modal_tokens=2), ("2",)), (dict(frames=0), ("0",)),
        (dict(kernel=1), ("kernel", "2")), (dict(sigma=float("nan")), ("sigma", "nan")),
        (dict(deformable_attention=False, temporal_attention=False), ("deformable_attention",)),
        (dict(frames=12.0), ("frames", "int", "12.0")), (dict(sigma="1"), ("sigma", "float", "'1'")),
        (dict(pose_embedding=1), ("pose_embedding", "bool")), (dict(classes=np.int64(4)), ("classes", "int")),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes, numbers):
    """A shape error deep inside the model instead of one line that names both numbers."""
    assert small(sigma=2).sigma == 2  # an integer may stand for a float
    with pytest.raises((ValueError, TypeError)) as error:
        small(**changes)
    assert all(number in str(error.value) for number in numbers)


def test_inputs_that_do_not_fit():
    """A clip of another T, size or number of joints that passes by broadcasting."""
    s = small()
    model = D3T(s)
    video, joints, visible = clip_for(s)
    for bad, name, found, expected in (
        ((video[:, :, :4], joints, visible), "video", (2, 3, 4, 24, 34), (2, 3, 5, 24, 34)),
        ((video[..., :32], joints, visible), "video", (2, 3, 5, 24, 32), (2, 3, 5, 24, 34)),
        ((video, joints[:, :, :1], visible), "joints", (2, 5, 1, 2), (2, 5, 7, 2)),
        ((video, joints, visible[:1]), "visible", (1, 5, 7), (2, 5, 7)),
    ):
        with pytest.raises(ValueError) as error:
            model(*bad)
        assert all(str(word) in str(error.value) for word in (name, found, expected))
    with pytest.raises(ValueError, match="bool"):  # 2 for visible, as in COCO, would count as hidden
        model(video, joints, 2 * visible.to(torch.uint8))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(video.bfloat16(), joints, visible).isfinite().all()
    for other in (video.double(), video.int()):
        with pytest.raises(ValueError, match="uint8, or torch.float32"):
            model(other, joints, visible)


def test_windows():
    """A joint in no window, a window beyond the end, a mean that forgets how many copies there are."""
    for length, window, stride in itertools.product(range(1, 9), range(1, 9), range(1, 9)):
        if stride <= window <= length:
            index = d3t.window_index(length, window, stride)
            assert index[:, 0].tolist() == loop_starts(length, window, stride)
            assert set(index.flatten().tolist()) == set(range(length))
            for dim, x in ((1, randn(2, length, 3, 2)), (2, randn(2, 3, length, 2))):
                close(d3t.mean_of_windows(d3t.take_windows(x, index, dim), index, dim, length), x, 1e-14)


def loop_weights(X, X_, w, heads):
    """Attention of each query on each key, mean over heads: what `loop_attention` mixes the values with."""
    d, rows = X.shape[1] // heads, []
    for x in X:
        row = np.zeros(len(X_))
        for head in range(heads):
            s = slice(head * d, (head + 1) * d)
            score = np.array([(w["Wq.weight"] @ x)[s] @ (w["Wk.weight"] @ key)[s] for key in X_]) / math.sqrt(d)
            row += np.exp(score - score.max()) / np.exp(score - score.max()).sum() / heads
        rows.append(row)
    return np.array(rows)


def test_explanation_is_the_attention_of_the_modal_tokens():
    """A map of other weights than the model attends with, of the wrong tokens, or that loses some on its way back."""
    s = small(blocks=1)
    model = randomize(D3T(s))
    video, joints, visible = clip_for(s)
    inputs = ((video - model.mean) / model.std).double(), joints.double(), visible
    said = model.explain(*inputs)
    assert torch.equal(said.logits, model(*inputs)) and not model.blocks[0].deformable.attention._forward_pre_hooks
    T, R, D, (_, h, w_), w = s.frames, s.joints, 4 * s.channels, s.grid, weights(model)
    F_a, F_b = model.trunk(inputs[0])
    P = model.norm_pose(model.embed_pose(d3t.joint_tokens(F_a, *inputs[1:], s.sigma)))
    Z = model.norm_rgb(F_b.permute(0, 2, 3, 4, 1).flatten(2, 3) + model.position_t + model.position_s)
    for b in range(2):
        z, p, m = Z[b].detach().numpy(), P[b].detach().numpy(), [w["modal"][:, i] for i in range(3)]
        selected, points = loop_search(z.reshape(T, h, w_, D), part(w, "blocks.0.deformable.search."), s.kernel)
        asking = np.concatenate([m[0], m[1]])
        keys = np.concatenate([selected.reshape(-1, D), asking])
        given = loop_weights(asking, keys, part(w, "blocks.0.deformable.attention."), s.heads).mean(0)
        given = given[: points[..., 0].size].reshape(points.shape[:3])
        close(said.points[b, 0], points)
        close(said.selected[b, 0], given)
        back = np.zeros((T, h, w_))
        for o in np.ndindex(given.shape):
            for n in np.ndindex(back.shape):
                back[n] += given[o] * np.prod([max(0.0, 1 - abs(a - c)) for a, c in zip(points[o], n)])
        close(said.tokens[b, 0], back)
        z, rgb, cls_3d = loop_deformable(z, m[0], m[1], part(w, "blocks.0.deformable."), s.heads, s.grid, s.kernel)
        shares = {place: [] for place in np.ndindex(T, R)}
        for start in loop_starts(R, s.joint_window, s.joint_stride):
            places = [(t, r) for t in range(T) for r in range(start, start + s.joint_window)]
            asking = np.concatenate([cls_3d, m[2]])
            keys = np.concatenate([[p[place] for place in places], asking])
            given = loop_weights(asking, keys, part(w, "blocks.0.joint.attention."), s.heads).mean(0)
            for place, share in zip(places, given):
                shares[place].append(share)
        close(said.joints[b, 0], np.array([[np.mean(shares[t, r]) for r in range(R)] for t in range(T)]))
        block = part(w, "blocks.0.")
        p, cls_joint, pose = loop_joint_stride(
            p, cls_3d, m[2], part(block, "joint."), s.heads, s.joint_window, s.joint_stride
        )
        fused = np.array(
            [block["fuse.weight"] @ np.concatenate(c) + block["fuse.bias"] for c in zip(cls_3d, cls_joint)]
        )
        frames = [np.concatenate([z[t], p[t], [rgb[t], fused[t], pose[t]]]) for t in range(T)]
        rows = {t: [] for t in range(T)}
        for start in loop_starts(T, s.temporal_window, s.temporal_stride):
            window = range(start, start + s.temporal_window)
            for t in window:
                given = loop_weights(frames[t][-3:], np.concatenate([frames[u] for u in window]),
                                     part(block, "temporal.attention."), s.heads).mean(0)  # fmt: skip
                row = np.zeros(T)
                row[window] = given.reshape(len(window), -1).sum(1)
                rows[t].append(row)
        close(said.frames[b, 0], np.array([np.mean(rows[t], 0) for t in range(T)]))
    close(said.frames.sum(-1), np.ones((2, 1, T)))
    without = D3T(small(modal_tokens=0, joint_attention=False)).eval().explain(video, joints, visible)
    assert without.joints is None and without.frames.shape == (2, 2, T, T)
    with pytest.raises(RuntimeError, match="eval"):  # it would move the averages of the batch norms
        model.train().explain(*inputs)


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_explanation_with_other_modal_tokens(modal):
    """Attention of other tokens than the modal ones, where there are fewer of them, or of some where there are none."""
    s = small(blocks=1, modal_tokens=modal)
    model, kept = D3T(s).eval(), {}
    block = model.blocks[0]
    for name in ("deformable", "temporal"):
        attention = getattr(block, name).attention
        attention.register_forward_pre_hook(lambda module, inputs, name=name: kept.update({name: inputs}))
    said, N = model.explain(*clip_for(s)), math.prod(s.grid[1:])
    X, X_ = kept["deformable"]
    asks = torch.arange(X.shape[1]) % (N + min(modal, 2)) >= (N if modal else 0)
    expected = block.deformable.attention.attention_map(X, X_)[:, asks].mean(1)
    close(said.selected[:, 0].flatten(1), expected[:, : said.selected[0, 0].numel()], 1e-5)

    X, (n, window) = kept["temporal"][0], block.temporal.index.shape
    tokens = N + s.joints + modal
    given = block.temporal.attention.attention_map(X, X).view(2, n, window, tokens, window, tokens).sum(-1)
    given = given[:, :, :, N + s.joints :] if modal else given
    copies = {t: [] for t in range(s.frames)}
    for i, t in itertools.product(range(n), range(window)):
        row = torch.zeros(2, s.frames)
        row[:, block.temporal.index[i]] = given[:, i, t].mean(1).detach()
        copies[block.temporal.index[i, t].item()].append(row)
    close(said.frames[:, 0], torch.stack([torch.stack(rows).mean(0) for rows in copies.values()], 1), 1e-5)


def test_one_graph_for_the_compiler():
    """A data-dependent branch or a call that splits the graph of torch.compile."""
    s = small()
    model = D3T(s).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(*clip_for(s)), model(*clip_for(s)), 1e-5)
    with torch.no_grad():
        expected = model(*clip_for(s))
        model.compile(backend="eager")  # whose graph knows no hooks
        close(model(*clip_for(s)), expected, 1e-5)
        close(model.explain(*clip_for(s)).logits, expected, 1e-5)
    model = D3T(s).eval().to(memory_format=torch.channels_last_3d)  # a buffer of four axes would refuse
    any_batch = torch.export.export(model, clip_for(s), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 3).module()
    three = [torch.cat([x, x[:1]]) for x in clip_for(s)]
    close(any_batch(*three), model(*three), 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "joints", "visible")) and a["label"] == b["label"]


def test_items_depend_on_seed_epoch_and_index_alone():
    """Augmentation that depends on the worker, on what was read before or on the global generator, or changes that."""
    source = data.synthetic(train=6, test=3)
    make = functools.partial(data.Dataset, source, "train", 4, 24, 32)
    np.random.seed(5), torch.manual_seed(5)
    first = {key: make()[key] for key in itertools.product((0, 1), range(6))}
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = make()
    for key in reversed(list(first)):
        assert same(first[key], again[key])
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    assert not same(first[0, 1], first[1, 1]) and not same(first[0, 1], make(seed=1)[0, 1])
    tested = data.Dataset(source, "test", 4, 24, 32)
    assert same(tested[2], tested[7, 2])  # nothing random in a test
    assert same(data.Dataset(data.synthetic(train=6, test=3), "test", 4, 24, 32)[2], tested[2])
    item = first[0, 0]
    assert item["video"].dtype == torch.uint8 and item["video"].shape == (3, 4, 24, 32)
    assert item["joints"].dtype == torch.float32 and item["visible"].dtype == torch.bool


def all_of(height, width):
    return slice(0, height), slice(0, width)


def marks(size=(60, 90), n=5):
    """A source whose frames are black but for a white dot at each of three joints, which move from frame to frame."""
    rng = np.random.default_rng(0)
    joints = (rng.uniform(0.1, 0.9, (n, 3, 2)) * [size[1], size[0]]).round().astype(np.float32)
    visible = np.ones((n, 3), bool)

    def read(media, frames, target, crop):
        y, x = np.mgrid[: target[0], : target[1]]
        video = np.zeros((len(frames), *target, 3), np.uint8)
        for t, frame in enumerate(frames):
            for r, (px, py) in enumerate(joints[frame]):  # a dot of the full frame, drawn at the target's scale
                cx, cy = (px + 0.5) * target[1] / size[1] - 0.5, (py + 0.5) * target[0] / size[0] - 0.5
                video[t, ..., r] = 255 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2)
        return video[:, crop[0], crop[1]]

    source = data.Source(["a"], ["nose", "left", "right"], [(1, 2)], read)
    for split in source.clips:
        source.clips[split] = [data.Clip(f"{split} {i}", 0, joints, visible, size, None) for i in range(8)]
    return source


@pytest.mark.parametrize("size, crop", [((60, 90), (40, 40)), ((90, 60), (24, 56)), ((33, 47), (41, 35))])
@pytest.mark.parametrize("split", ["train", "test"])
def test_joints_stay_on_their_pixels(size, crop, split):
    """Joints and frames resized, cropped or mirrored differently; left and right not exchanged; wrong frames."""
    dataset = data.Dataset(marks(size), split, 3, *crop)
    flips = set()
    for key in itertools.product(range(3), range(8)):
        item = dataset[key]
        for t, r in np.ndindex(item["visible"].shape):
            x, y = item["joints"][t, r].tolist()
            assert item["visible"][t, r] == (-0.5 <= x < crop[1] - 0.5 and -0.5 <= y < crop[0] - 0.5)
            if 2 <= x < crop[1] - 3 and 2 <= y < crop[0] - 3:  # the centre of the dot, to a tenth of a pixel
                blob = item["video"][:, t].double()
                channel = r  # after a mirror the joint named "left" lies on the dot that was drawn for "right"
                mirrored = split == "train" and r and blob[r, round(y), round(x)] < 100
                if r:
                    flips.add(bool(mirrored))
                channel = 3 - r if mirrored else r
                near = torch.exp(
                    -(((torch.arange(crop[1]) - x) ** 2)[None] + ((torch.arange(crop[0]) - y) ** 2)[:, None]) / 2
                )
                window = blob[channel] * (near > 0.05)
                assert (window - 255 * near * (near > 0.05)).abs().max() < 2
    assert split == "test" or flips == {False, True}


def test_half_of_the_clips_are_mirrored():
    """A mirror that is hardly ever used, or nearly always."""
    source = marks(n=1)

    def leans(joints):  # to which side of the others the nose is
        return bool(joints[0, 0, 0] > joints[0, 1:, 0].mean())

    dataset, before = data.Dataset(source, "train", 1, 40, 40), leans(source.clips["train"][0].joints)
    mirrored = [leans(dataset[key]["joints"]) != before for key in itertools.product(range(50), range(8))]
    assert 160 < sum(mirrored) < 240  # of 400


def test_crops():
    """A crop that is not random in training or not the middle in a test, or that takes the whole frame."""
    where, source = [], marks((60, 90))

    def read(media, frames, size, crop):
        where.append((size, crop[0].start, crop[1].start))
        return np.zeros((len(frames), 32, 32, 3), np.uint8)

    source.read = read
    data.Dataset(source, "test", 4, 32, 32)[0]
    assert where == [((37, 55), 2, 11)]  # 32 is 7/8 of 37
    train_set = data.Dataset(source, "train", 4, 32, 32)
    for epoch in range(200):
        train_set[epoch, 0]
    assert {top for _, top, _ in where} == set(range(6)) and {left for *_, left in where} == set(range(24))


def test_flip_pairs():
    """A joint that trades places with another one than its counterpart."""
    for names, pairs in (
        (data.PENN_JOINTS, data.PENN_PAIRS), (data.NTU_JOINTS, data.NTU_PAIRS), (data.COCO_JOINTS, data.COCO_PAIRS),
    ):  # fmt: skip
        left = [name for name in names if "left" in name]
        assert {names[a]: names[b] for a, b in pairs} == {name: name.replace("left", "right") for name in left}


def test_one_frame_of_each_segment():
    """Frames out of order or of one end only; clips shorter than T; the middle frames in a test."""
    seen = []

    def spy(media, frames, size, crop):
        seen.append(frames)
        return np.zeros((len(frames), 16, 16, 3), np.uint8)

    for n in (1, 2, 5, 12, 50, 663):
        source = marks(n=n)
        source.read = spy
        data.Dataset(source, "test", 5, 16, 16)[0]
        assert seen[-1].tolist() == [int((t + 0.5) * n / 5) for t in range(5)]
        for epoch in range(20):
            data.Dataset(source, "train", 5, 16, 16)[epoch, 0]
            assert all(int(t * n / 5) <= frame <= int((t + 1) * n / 5) for t, frame in enumerate(seen[-1]))
            assert seen[-1].max() < n


def test_synthetic_clips_need_both_modalities():
    """A label that the order of the figures or the joints give away: then there is nothing to fuse."""
    swing = np.linspace(0, 1, 9)
    torsos = [data.pose(action, swing, side)[:, data.TORSO] for action in range(4) for side in (0, 1)]
    assert all((torso == torsos[0]).all() for torso in torsos)  # the annotated joints are the same in every action
    others = [j for j in range(13) if j not in data.TORSO]
    limbs = [data.pose(action, swing, 0)[:, others] for action in range(4)]
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(limbs, 2))  # the others are not

    source = data.synthetic(train=400, test=2)
    actions, sides = [], []
    for clip in source.clips["train"]:
        actor = [np.allclose(np.float32(figure), clip.joints) for figure in clip.media[0]]
        assert sum(actor) == 1  # the joints follow one of two figures
        assert not clip.visible[:, others].any() and 0.8 < clip.visible[:, data.TORSO].mean() <= 1
        sides.append(actor[1])
        actions.append(clip.label)
    assert 0.4 < np.mean(sides) < 0.6
    assert np.bincount(actions, minlength=4).min() > 70
    item = data.Dataset(source, "train", 4, 64, 64, hide="joints")[0, 0]
    assert not item["visible"].any()
    assert (data.Dataset(source, "train", 4, 64, 64, hide="video")[0, 0]["video"] == 128).all()


def test_synthetic_labels():
    """The action of the other figure."""
    moving = {(1, 0): "wave", (2, 0): "flap", (2, 2): "jumping jack", (0, 1): "kick"}  # wrists and ankles
    for clip in data.synthetic(train=40, test=1).clips["train"]:
        actor = next(figure for figure in clip.media[0] if np.allclose(np.float32(figure), clip.joints))
        moves = np.ptp(actor - actor[:, 7:8], axis=0).max(-1) > 5
        assert data.SYNTHETIC_ACTIONS[clip.label] == moving[moves[[5, 6]].sum(), moves[[11, 12]].sum()]


def test_synthetic_figures_are_drawn_at_their_joints():
    """Limbs drawn elsewhere, or at other frames."""
    (start, end), frames = np.array(data.PENN_EDGES).T, np.array([1, 6, 14])
    for clip in data.synthetic(train=8, test=1).clips["train"]:
        video = data.draw(clip.media, frames, (128, 128), all_of(128, 128)).astype(int)
        figure = clip.media[0][1][frames]  # the one in front
        for t, places in enumerate(2 * np.concatenate([figure, (figure[:, start] + figure[:, end]) / 2], 1) + 0.5):
            x, y = places[((places > 1) & (places < 127)).all(1)].round().astype(int).T
            assert len(x) > 5 and abs(video[t, y, x] - clip.media[1][1]).max() <= 1


@pytest.fixture
def penn(tmp_path):
    """A small Penn Action root: the layout and the oddities of the real one, in 2 x 60 clips of 8 frames."""
    savemat = pytest.importorskip("scipy.io", reason="needs scipy, the decoder of Penn Action's labels").savemat
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    rng = np.random.default_rng(0)
    spelled = {"bowl": "bowling", "pullup": "pull_ups", "strum_guitar": "strumming_guitar"}
    (tmp_path / "labels").mkdir()
    for i in range(120):
        height, width = (48, 36) if i == 2 else (30, 44)  # one portrait clip
        n, action = 8, data.PENN_ACTIONS[i % 15]
        x, y = rng.integers(2, width, (n, 13)), rng.integers(2, height, (n, 13))
        visibility = np.ones((n, 13), np.uint8)
        x[:, 3] = y[:, 3] = 1  # never annotated: at the first pixel, invisible
        visibility[:, 3] = 0
        kind = np.uint8 if i % 2 else np.float64
        label = {
            "action": spelled.get(action, action) if i >= 60 else action, "pose": "left",
            "x": x.astype(kind), "y": y.astype(kind), "visibility": visibility * (i != 4),
            "train": np.int32([[1 if i % 2 else -1]]), "bbox": np.ones((n - (i == 5), 4)),
            "dimensions": np.uint16([[height, width, n]]), "nframes": np.uint8([[n]]),
        }  # fmt: skip
        savemat(tmp_path / "labels" / f"{i + 1:04d}.mat", label)
        folder = tmp_path / "frames" / f"{i + 1:04d}"
        folder.mkdir(parents=True)
        for t in range(n):
            frame = np.zeros((height, width, 3), np.uint8)
            frame[y[t, 0] - 1, x[t, 0] - 1] = 255  # the head, in MATLAB's one-based pixels
            image.fromarray(frame).save(folder / f"{t + 1:06d}.jpg", quality=95, subsampling=0)
    return tmp_path


def test_penn_action(penn):
    """Unsigned coordinates that wrap, one-based pixels, placeholder joints seen, spellings, the official split."""
    (penn / "labels" / "._0001.mat").write_bytes(b"left there by macOS")
    source = data.penn_action([penn])
    assert not source.problems and source.classes == sorted(source.classes) and len(source.classes) == 15
    assert [len(source.clips[split]) for split in ("train", "test")] == [60, 60]
    clips = {clip.name: clip for clip in source.clips["train"] + source.clips["test"]}
    assert all(clips[f"{i + 1:04d}"].label == i % 15 for i in range(120))
    assert clips["0003"].size == (48, 36) and clips["0001"].size == (30, 44)
    assert all(
        (clip.joints >= 0).all() and clip.joints.max() < 48 and clip.joints.dtype == np.float32
        for clip in clips.values()
    )
    assert not clips["0005"].visible.any() and not any(clip.visible[:, 3].any() for clip in clips.values())
    assert len(clips["0006"].joints) == 8
    for name in ("0001", "0002", "0003"):  # the head is the brightest pixel of the frame, at full size
        clip = clips[name]
        video = source.read(clip.media, np.arange(8), clip.size, all_of(*clip.size))
        for frame, (x, y) in zip(video.sum(-1, dtype=int), clip.joints[:, 0]):
            assert np.unravel_index(frame.argmax(), frame.shape) == (y, x)
        for size in ((90, 120), (23, 17), clip.size):  # a crop that is scaled alone is that of the whole scaled
            scaled = source.read(clip.media, np.arange(8), size, all_of(*size)).astype(int)
            for crop in ((slice(5, 16), slice(3, 17)), (slice(size[0] - 7, size[0]), slice(size[1] - 9, size[1]))):
                assert abs(source.read(clip.media, np.arange(8), size, crop) - scaled[:, crop[0], crop[1]]).max() <= 1
    for split in ("train", "test"):
        dataset = data.Dataset(source, split, 4, 32, 32)
        assert all(dataset[i]["video"].shape == (3, 4, 32, 32) for i in range(60))


@pytest.mark.parametrize("height, width", [(270, 481), (393, 480)])
def test_frames_whose_sides_the_decoder_cannot_halve(tmp_path, height, width):
    """A decoder that rounds up the sides of a smaller frame, and so moves what it shows away from its joints."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, the decoder of Penn Action's frames")
    row, column = np.mgrid[:height, :width]
    x, y = width - 20, height - 20
    dot = 250 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 72)
    image.fromarray(np.repeat(dot[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "000001.jpg", quality=95)
    for part in (2.3, 4.1, 8.2):
        size = round(height / part), round(width / part)
        frame = data.read_jpegs(tmp_path, np.array([0]), size, all_of(*size))[0, ..., 0].astype(float)
        frame[frame < 20] = 0
        found = [(frame * axis).sum() / frame.sum() for axis in np.mgrid[: size[0], : size[1]]]
        expected = (y + 0.5) * size[0] / height - 0.5, (x + 0.5) * size[1] / width - 0.5
        assert abs(np.subtract(found, expected)).max() < 0.1


def test_bad_clips(penn):
    """A missing or damaged frame that crashes a worker, or a clip that silently vanishes from a test."""
    (penn / "frames" / "0002" / "000003.jpg").unlink()
    jpeg = penn / "frames" / "0003" / "000005.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:300])
    source = data.penn_action([penn])
    train_set, test_set = (data.Dataset(source, split, 8, 24, 24) for split in ("train", "test"))
    item, other = train_set[0, 0], train_set[0, 1]
    assert "0002/000003.jpg" in item["bad"][0][1] and item["label"] == other["label"] and not other["bad"]
    batch = data.collate([item, other])
    assert len(batch["bad"]) == 1 and batch["video"].shape == (2, 3, 8, 24, 24)
    with pytest.raises(data.BadClip, match="0003/000005.jpg"):
        test_set[1]
    (penn / "labels" / "0007.mat").write_bytes(b"not a label")
    (penn / "labels" / "0009.mat").write_bytes((penn / "labels" / "0009.mat").read_bytes()[:200])
    problems = data.penn_action([penn]).problems
    assert len(problems) == 2 and "0007.mat" in problems[0] and "0009.mat" in problems[1]


def test_penn_action_labels_that_cannot_be(penn):
    """A label of another shape or meaning that is read as if nothing were wrong."""
    scipy_io = pytest.importorskip("scipy.io")
    good = {k: v for k, v in scipy_io.loadmat(penn / "labels" / "0001.mat").items() if not k.startswith("__")}
    path = penn / "labels" / "0001.mat"
    for change, said in (
        (dict(action="juggling"), "juggling"), (dict(train=np.int32([[0]])), "train"), (dict(x=good["x"][:-1]), ""),
        (dict(visibility=good["visibility"][:, :12]), "13"), (dict(dimensions=np.uint16([[0, 44, 8]])), "0 x 44"),
        (dict(x=good["x"][:0], y=good["y"][:0], visibility=good["visibility"][:0]), "0, 13"),
    ):  # fmt: skip
        scipy_io.savemat(path, good | change)
        problems = data.penn_action([penn]).problems
        assert len(problems) == 1 and "0001.mat" in problems[0] and said in problems[0]


def test_a_missing_data_set_or_decoder(tmp_path, monkeypatch):
    """A traceback instead of what was looked for, where to get it, which package to install."""
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(data.DataError, match="pip install scipy"):
        data.penn_action([tmp_path])
    monkeypatch.undo()
    pytest.importorskip("scipy.io", reason="needs scipy"), pytest.importorskip("PIL", reason="needs pillow")
    with pytest.raises(data.DataError, match="dreamdragon.github.io/PennAction") as error:
        data.penn_action([tmp_path / "nowhere"])
    assert "labels/0001.mat" in str(error.value) and "nowhere" in str(error.value)


KINECT = 72057594037944738  # ids of the Kinect lie near 2^56, where a float64 tells only multiples of 16 apart


def body(x, y, wide=0.4, high=1.7, wobble=0.0):
    """25 joints as .skeleton holds them: a column of a person at x, y of the colour image, 3 m away."""
    at = np.linspace(-0.5, 0.5, 25)
    place = np.stack([at * wide + (x - 960) / 300 + wobble, -at * high, np.full(25, 3.0)], -1)
    colour = np.stack([x + at * 60 + 300 * wobble, y + at * 300], -1)
    rest = np.zeros((25, 4))
    return np.concatenate([place, colour / 4, colour, rest, np.full((25, 1), 2)], 1)


def skeleton(frames):
    """The text of a .skeleton file of frames [[(id, body), ...], ...]: CRLF, 10 fields a body, 12 a joint."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for identity, joints in bodies:
            lines += [f"{identity} 0 1 1 1 1 0 0.027 0.057 2", "25"]
            lines += [" ".join(f"{v:.7g}" for v in row[:-1]) + f" {int(row[-1])}" for row in joints]
    return ("\r\n".join(lines) + "\r\n").encode()


def persons(frames):
    return data.two_persons(*data.parse_skeleton(skeleton(frames)))


def test_ntu_bodies_keep_their_slots():
    """Ids read as floats merge two persons; slots by order in the file swap when an id ends or the order changes."""
    left = [body(500, 500, wobble=0.02 * (t % 5)) for t in range(40)]
    right = [body(1300, 500, wobble=0.05 * (t % 5)) for t in range(40)]  # moves more: slot 0
    a, b = KINECT, KINECT - 4
    steady = [[(a, left[t]), (b, right[t])] for t in range(40)]
    reordered = [pair[:: 1 if t % 2 else -1] for t, pair in enumerate(steady)]
    renamed = [
        [(a + 16 * (t >= 20), left[t]), (b + 32 * (t >= 20), right[t])][:: 1 if t < 20 else -1] for t in range(40)
    ]
    for frames in (steady, reordered, renamed):
        joints, visible = persons(frames)
        assert joints.shape == (40, 50, 2) and visible.all()
        assert np.allclose(joints[:, :25], [row[:, 5:7] for row in right], atol=0.01)
        assert np.allclose(joints[:, 25:], [row[:, 5:7] for row in left], atol=0.01)


def test_ntu_frames_ghosts_and_lost_joints():
    """Frames without a body dropped, so that joints no longer match the video; a chair taken for a person."""
    walker = [body(900, 500, wobble=0.03 * (t % 4)) for t in range(30)]
    frames = [[] if 10 <= t < 15 else [(1, walker[t])] for t in range(30)]
    joints, visible = persons(frames)
    assert len(joints) == 30 and not visible[10:15].any() and visible[:10, :25].all() and visible[15:, :25].all()
    assert not visible[:, 25:].any()  # nobody else
    assert np.allclose(joints[15, :25], walker[15][:, 5:7], atol=0.01)

    chair = [body(1500, 600, wide=2.0, high=0.5, wobble=0.1 * (t % 3)) for t in range(30)]
    passing = [body(200, 400, wobble=0.5 * (t % 2)) for t in range(30)]
    crowd = [[(2, chair[t]), (1, walker[t])] + [(7, passing[t])] * (t < 8) for t in range(30)]
    joints, visible = persons(crowd)
    assert np.allclose(joints[:, :25], [row[:, 5:7] for row in walker], atol=0.01) and not visible[:, 25:].any()
    assert persons([[(2, chair[t])] for t in range(30)])[1][:, :25].all()  # better a ghost than nobody
    for ghost, seen, wide, often in (
        (True, 11, 0.4, 30), (False, 12, 0.4, 30), (False, 30, 1.3, 30), (True, 30, 1.4, 30), (True, 30, 2.0, 21),
        (False, 30, 2.0, 20),
    ):  # fmt: skip
        other = [(2, body(1500, 600, wide=wide if t < often else 0.4, wobble=0.1 * (t % 3))) for t in range(seen)]
        crowd = [[(1, walker[t]), *other[t : t + 1]] for t in range(30)]
        assert persons(crowd)[1][:, 25:].any() != ghost, (seen, wide, often)
    for metres, same in ((0.9, True), (1.1, False)):  # from where one id ends to where another begins
        moved = body(900 + 300 * (0.06 + metres), 500)
        visible = persons([[(1, walker[t])] if t < 15 else [(2, moved)] for t in range(30)])[1]
        assert visible[:15, :25].all() and visible[15:, :25].all() == same
    many = [[(i, body(100 + 300 * i, 500, wobble=0.01 * i * (t % 3))) for i in range(6)] for t in range(30)]
    assert np.allclose(persons(many)[0][0, :25], body(1600, 500)[:, 5:7], atol=0.01)
    calm, lively = ([body(x, 500, wobble=v * (t % 2)) for t in range(30)] for x, v in ((1000, 0.02), (1500, 0.04)))
    shy = [[(1, body(500, 500)), (2, calm[t]), (3, lively[t])] for t in range(30)]
    for t in range(8, 12):
        shy[t][0] = (1, np.zeros((25, 12)))  # lost for a while: no reason to be the liveliest
    joints, visible = persons(shy)
    assert np.allclose(joints[0, [0, 25]], [body(1500, 500)[0, 5:7], body(1000, 500)[0, 5:7]], atol=0.01)
    back = [[(1 if t < 10 or t >= 15 else 2, walker[t])] for t in range(30)]  # renamed and named back
    assert persons(back)[1][:, :25].all()
    assert not persons([[]] * 4)[1].any() and persons([[]] * 4)[0].shape == (4, 50, 2)

    lost = body(900, 500)
    lost[0, 5], lost[1, 6], lost[2, 5], lost[3, 5], lost[4, 6] = np.nan, np.inf, -np.inf, 1920, -3
    lost[5, 11], lost[6, :] = 0, 0  # not tracked; a line of zeros
    joints, visible = persons([[(1, lost)]] * 12)
    assert not visible[:, :7].any() and visible[:, 7:25].all()


def test_ntu_files_that_break_off():
    """A damaged file that is read as an empty one, or a declared count that takes all memory."""
    whole = skeleton([[(KINECT, body(900, 500))]] * 3)
    fewer, text = whole.replace(b"25\r\n", b"24\r\n", 1), whole.replace(b"3 ", b"z ", 1)
    negative, huge = whole.replace(b"1\r\n", b"-1\r\n", 1), b"99999999999\r\n0\r\n"
    for broken in (b"", b"?", whole[:-400], whole[:500], fewer, text, negative, huge):
        with pytest.raises((ValueError, IndexError)):
            data.two_persons(*data.parse_skeleton(broken))


def write_video(path, pictures, rate=30, gop=250):
    """Encode uint8 (n, h, w, 3) as NTU does: one key frame, B-frames, and in AVI no time stamps of their order."""
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "3", "g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbered(n, height=54, width=96):
    """Frames whose grey says which they are."""
    return np.broadcast_to((np.arange(n) * 5 + 20).astype(np.uint8)[:, None, None, None], (n, height, width, 3)).copy()


@pytest.mark.parametrize("frames", [3, 8, 10, 17, 38])
def test_a_video_that_was_cut_without_encoding_it_again(tmp_path, frames):
    """Frames before the cut, which are still in the file or in its header, but which no decoder puts out."""
    full, path = write_video(tmp_path / "full.mp4", numbered(40), gop=8), tmp_path / "cut.mp4"
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    with av.open(str(full)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                cut = round(frames / 30 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                new.mux(packet)
    with av.open(str(path)) as container:
        left = [picture.to_ndarray(format="rgb24").mean() for picture in container.decode(video=0)]
    assert data.video_length(path) == len(left) <= 40 - frames
    video = data.read_video(path, np.array([0, len(left) - 1]), (27, 48), all_of(27, 48))
    assert (abs(video.mean((1, 2, 3)) - [left[0], left[-1]]) < 2.5).all()


@pytest.mark.parametrize("ending", ["_rgb.avi", ".mp4"])
def test_video_frames_are_counted_in_the_order_they_are_shown(tmp_path, ending):
    """Frames by time stamp or by seeking: NTU's AVI has wrong stamps, and frame i - 2 comes back for i."""
    path = write_video(tmp_path / f"clip{ending}", numbered(40))
    frames = np.array([0, 3, 3, 17, 38, 39])
    video = data.read_video(path, frames, (27, 48), all_of(27, 48))
    assert video.shape == (6, 27, 48, 3) and (abs(video.mean((1, 2, 3)) - (frames * 5 + 20)) < 2.5).all()
    part = data.read_video(path, frames, (27, 48), (slice(3, 20), slice(8, 48)))
    assert np.array_equal(part, video[:, 3:20, 8:48])
    assert data.video_length(path) == 40
    with pytest.raises(data.BadClip, match="frame 40 of 40"):
        data.read_video(path, np.array([40]), (27, 48), all_of(27, 48))
    if ending == "_rgb.avi":  # an mp4 without its end has no index at all
        noise = np.random.default_rng(0).integers(0, 255, (40, 54, 96, 3), dtype=np.uint8)
        path = write_video(path, noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert data.read_video(path, np.array([0, 5]), (27, 48), all_of(27, 48)).shape == (2, 27, 48, 3)
        with pytest.raises(data.BadClip, match="clip_rgb.avi"):
            data.read_video(path, np.array([0, 39]), (27, 48), all_of(27, 48))
    path.write_bytes(b"no video")
    with pytest.raises(data.BadClip, match="clip"):
        data.video_length(path)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_video_that_is_stored_on_its_side(tmp_path, turns):
    """A phone's video whose frames do not stand upright, as its joints do."""
    frames = np.full((3, 64, 96, 3), 20, np.uint8)
    frames[:, :20, :30] = 230  # top left as stored
    path = write_video(tmp_path / "phone.mp4", frames)
    x, y = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # where the stored x axis points to, y down
    matrix = struct.pack(">9i", x << 16, y << 16, 0, -y << 16, x << 16, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = matrix
    path.write_bytes(content)
    size = (96, 64) if turns % 2 else (64, 96)
    video = data.read_video(path, np.arange(3), size, all_of(*size))
    upright = np.rot90(frames, -turns, (1, 2)).astype(int)
    assert video.shape == upright.shape and abs(video - upright).mean() < 5
    crop = slice(10, 50), slice(4, 44)
    assert np.array_equal(data.read_video(path, np.arange(3), size, crop), video[:, crop[0], crop[1]])


def test_an_avi_that_declares_frames_it_does_not_have(tmp_path):
    """The length of a header: dropped frames count there, and no decoder puts them out."""
    av = pytest.importorskip("av", reason="needs av, the decoder of videos")
    path = write_video(tmp_path / "full.avi", numbered(40), gop=8)
    with av.open(str(path)) as old, av.open(str(tmp_path / "part.avi"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and number >= 16:
                packet.stream = stream
                new.mux(packet)
    with av.open(str(tmp_path / "part.avi")) as container:
        declared, left = container.streams.video[0].frames, sum(1 for _ in container.decode(video=0))
    assert data.video_length(tmp_path / "part.avi") == left < declared


def test_ntu(tmp_path, capsys):
    """Joints in the pixels of another size, clips paired wrongly, a missing list that is not read, wrong lengths."""
    dot = np.full((14, 108, 192, 3), 16, np.uint8)
    walker = []
    for t in range(14):  # one joint is drawn; the colour camera is ten times as large as this video
        joints = body(700 + 40 * t, 500)
        x, y = joints[3, 5:7]
        grid = np.mgrid[:108, :192]
        dot[t] += (200 * np.exp(-((grid[0] - (y + 0.5) / 10 + 0.5) ** 2 + (grid[1] - (x + 0.5) / 10 + 0.5) ** 2) / 8))[
            ..., None
        ].astype(np.uint8)
        walker.append([(KINECT, joints)])
    roots = [tmp_path / "nturgb+d_rgb", tmp_path / "skeletons one", tmp_path / "skeletons two"]
    for i, name in enumerate(
        ("S001C001P001R001A001", "S001C002P003R001A060", "S018C003P041R002A061", "S002C001P003R001A007")
    ):
        ending = ("_rgb.avi", ".mp4", "_rgb.mp4", "_rgb.avi")[i]
        write_video(roots[0] / name[:4] / (name + ending), dot)
        roots[1 + i % 2].mkdir(exist_ok=True)
        length = (14, 12, 14, 14)[i]  # the second skeleton is shorter than its video
        (roots[1 + i % 2] / f"{name}.skeleton").write_bytes(skeleton(walker[:length]))
    (roots[1] / "S003C001P001R001A001.skeleton").write_bytes(skeleton(walker))
    with pytest.raises(data.DataError, match="rose1"):
        data.ntu([tmp_path / "nowhere"], "ntu60-xsub")
    source = data.ntu(roots, "ntu120-xsub")
    assert "63,360 and 51,120" in capsys.readouterr().err
    assert {s: [(c.name, c.label) for c in clips] for s, clips in source.clips.items()} == {
        "train": [("S001C001P001R001A001", 0)],
        "test": [("S001C002P003R001A060", 59), ("S002C001P003R001A007", 6), ("S018C003P041R002A061", 60)],
    }
    assert source.missing == ["S003C001P001R001A001 has no video"] and len(source.joint_names) == 50
    assert len(source.annotate(source.clips["test"][0]).joints) == 12
    write_video(roots[0] / "S001" / "S001C001P001R001A001_rgb.avi", dot[:9])
    assert len(source.annotate(source.clips["train"][0]).joints) == 9
    write_video(roots[0] / "S001" / "S001C001P001R001A001_rgb.avi", dot)
    assert source.flip_pairs == [(a + person, b + person) for person in (0, 25) for a, b in data.NTU_PAIRS]
    again = write_video(roots[1] / "S001C001P001R001A001.mp4", dot[:, ::2, ::2])  # re-encoded, beside the original
    assert data.ntu(roots, "ntu120-xsub").clips["train"][0].media[0] == again
    again.unlink()
    capsys.readouterr()
    path = roots[2] / data.NTU_LISTS[120].lower()
    path.write_text("Some prose.\nMore.\n\nS018C003P041R002A061\nS002C001P003R001A007\n")
    source = data.ntu(roots, "ntu60-xview")
    assert not capsys.readouterr().err
    assert [c.name for c in source.clips["train"] + source.clips["test"]] == [
        "S001C002P003R001A060",
        "S001C001P001R001A001",
    ]
    dataset = data.Dataset(source, "test", 6, 80, 120)
    item = dataset[0]
    for t in range(6):
        x, y = item["joints"][t, 3].tolist()
        assert item["visible"][t, :25].any() and not item["visible"][t, 25:].any()
        if 3 < x < 116:
            picture = item["video"][:, t].float().mean(0)
            row, column = divmod(picture.argmax().item(), 120)
            assert abs(column - x) < 1.5 and abs(row - y) < 1.5


NTU_ROSTER = """
1:1-8 2:3,7-14 3:1,2,7,8,15-19 4:3,7,8,20 5:4,10,13,15-18,21 6:1,7,8,15-17,19,22-24 7:1,7,8,15-19,25-28
8:1,7,8,15,19,25,29-36 9:7,8,15-17,19,25 10:7,8,13,15-19,21,25 11:1,2,7,8,15-19,25,27,28,38 12:7,8,15-19,25,27,28,37
13:7,8,15-19,25,27,28,37 14:7,8,15,17,19,25,27,37,39 15:7,8,15-17,19,25,37 16:7,8,19,21,25,39,40 17:3,7-9,15-17,20
18:8,41-45 19:8,41,42,46-51 20:8,41,43,44,52-54 21:55-60 22:61-67 23:55-68 24:57,60-64,67 25:55,56,58,59,65,66,68
26:8,41,44,49-51,69-72,74-77 27:6,8,11,41,43,44,78-86 28:8,41-43,46,48,70,73,87
29:6,8,41,43,44,48,49,51,67,74,75,80,88-90 30:8,11,41,43,44,48,67,75,76,81,85,88,91-96
31:6,8,41-44,51,67,82,85,96-101 32:8,41,43,44,67,102-106
"""  # the performers of each setup; every one with 3 cameras, 2 replications and 60 actions

NTU_MISSING = """
1/2 5.2:8 6.1:8  1/3 2.1:55 2.2:12 5.2:4-6 6.2:8  2/2 11.2:30  2/3 8.1:20 10.2:10 11.2:7,11 14.2:7  3/1 19.1:55  3/2
2.2:55 18.2:55  3/3 2.1:55 16.1:55 18.2:24  4/2 3.1:13 8.1:9 20.1:3-4,12,20-21,36  5/2 4.1:1,3 10.1:16-17,48-49
16.1:9-10 18.1:3,28-29  5/3 16.2:9 18.2:13 21.2:57  6/1 1.2:55  6/2 7.1:5-6 16.1:43,51-52 22.1:12 23.1:20-23
24.1:18-19  6/3 1.2:13 7.2:9-10,25 16.1:60 17.1:55 17.2:13-15 22.2:13  7/1 18.2:50 25.2:51 28.1:50-52  7/2 8.2:8
15.2:55 26.1:8-12,50 27.1:11,13 28.2:55  7/3 7.1:2,4 19.1:60 27.2:1-13  8/2 1.1:9-10,14-16,18-19 8.2:59 25.1:60
29.1:4 31.1:5-6 32.1:18 34.1:18-19 35.1:59 35.2:2,5  8/3 7.1:9,16-23,25-26,28-29 7.2:3 8.2:50
25.2:2,11-12,16,20,22-23,30-33,49,60 31.1:1 31.2:4,14-17 32.2:13 33.2:1,11-12 34.2:1,12,22-24,44-45 35.2:16-21  9/2
7.1:1,3,14 8.1:14 15.2:50 16.1:2 17.1:28-29  9/3 17.2:30 25.2:54  10/1 7.2:20  10/2 16.2:55 17.1:5,18-19 19.1:1
25.1:12  10/3 7.2:43 8.2:3 16.1:55 17.2:55  11/1 2.1:8 18.2:50  11/2 8.2:59 16.2:55 17.1:20-21 18.2:55 27.1:9-10,37
11/3 1.1:55 2.1:55 8.2:12 15.1:55 16.1:55 19.1:55 25.1:55 28.2:55  12/1 19.1:60 19.2:60  12/2 15.1:55 17.2:12
25.1:60  12/3 8.1:57 15.1:55 15.2:55 16.1:55 17.2:55 18.1:55,57 19.2:11-12 25.1:55 27.1:55 27.2:9 28.1:35 28.2:55
13/1 15.1:54 17.2:54 18.1:16 28.1:40  13/2 15.1:54 17.2:54 28.1:40  13/3 8.2:59 15.1:54 17.2:54 25.2:22 27.1:55
28.1:40  14/1 27.2:40  14/2 15.1:3 19.1:29 25.2:59 27.2:40 39.1:50  14/3 7.2:59 15.2:55 19.2:55 25.1:48 27.2:40
15/1 8.2:40 16.1:55 17.1:55 17.2:55  15/2 7.1:59 8.1:3-4 8.2:40 15.1:2 16.1:1 16.2:55  15/3 8.2:7,11-12,28,40
25.2:12,17,20-21,30,33-34,36-37,44  16/1 19.2:40 25.1:11-12,60 40.1:55 40.2:55  16/2 8.1:11 19.2:40 25.2:12  16/3
8.1:11 8.2:2-4,6,9 19.2:40 39.2:16  17/1 16.2:31  17/2 7.1:13 8.1:9 15.1:42 16.2:31,55  17/3 7.2:13 8.1:59 16.2:31
17.1:55 20.1:59  19/1 46.1:75  19/2 42.1:94-102 49.2:74,79 51.1:61  19/3 46.1:61 46.2:61-62  20/2 41.1:63-64
44.1:63-64,66,84 54.1:81  21/1 59.1:108  21/2 55.1:65,92-93 57.1:64 58.1:63-64 59.1:74-79  21/3 57.2:78-79,94  22/2
61.1:113  22/3 61.2:61-62 63.2:61-64,78 64.2:61-62 65.2:61-62,119 67.2:64  23/2 55.1:114 55.2:92 59.1:75 63.1:75
23/3 55.2:93-94 61.2:61 64.1:92  24/1 63.1:109  24/2 62.2:74 67.1:100-103  24/3 62.2:74 63.2:61-62  25/1 55.2:119
25/3 56.2:119 59.2:115  26/2 44.1:61-62 70.1:92  26/3 69.2:75 74.2:61-62 75.1:117-118  27/1 82.1:63  27/2 44.2:92
79.1:61-64 82.1:92 84.1:61-62 86.1:61  27/3 41.2:87 80.2:61 82.2:61-62 86.2:61-62  28/1 87.1:61  28/2 41.1:91
87.1:61  28/3 42.2:64 46.2:63,66-72,74-75,77,81-84 48.2:61-62,73 73.2:73 87.1:61 87.2:61-62  29/1 43.2:92 44.2:92
48.1:73 89.1:63  29/2 41.1:74,84 44.1:91 48.1:75,81 74.1:81,95-96 80.1:91 88.1:66 89.1:65 90.1:67  29/3 8.2:65,67
41.1:89 43.1:80,92,105 43.2:85-86 44.2:106 48.1:65 48.2:73-76,92,94 51.2:73-86,110 67.1:98 74.2:110 80.2:66 88.2:78
89.1:75 89.2:61-63 90.2:92,95  30/2 91.2:91-105  30/3 44.2:65,81,84  31/2 42.1:111 51.1:61-62 67.1:67-72 82.1:75
82.2:117 97.1:61-62  31/3 43.2:74-75 44.2:94 82.2:67-73,75-77,84-86  32/2 67.1:92  32/3 67.2:66-67,75-77
"""  # the official 302 and 535 samples with missing skeletons, as setup/camera performer.replication:actions


def numbers(text):
    """The numbers of "1,2,7-9"."""
    ranges = [part.partition("-") for part in text.split(",")]
    return [n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)]


def test_ntu_protocols():
    """A performer, camera or setup on the wrong side; a list of missing samples that is not the official one."""
    name = "S{:03d}C{:03d}P{:03d}R{:03d}A{:03d}".format
    roster = {int(s): numbers(performers) for s, performers in (word.split(":") for word in NTU_ROSTER.split())}
    grid = [
        name(s, c, p, r, a)
        for s, performers in roster.items() for c in (1, 2, 3) for p in performers for r in (1, 2)
        for a in (range(1, 61) if s <= 17 else range(61, 121))
    ]  # fmt: skip
    missing = set()
    for word in NTU_MISSING.split():
        if "/" in word:
            s, c = map(int, word.split("/"))
        else:
            who, actions = word.split(":")
            missing |= {name(s, c, *map(int, who.split(".")), a) for a in numbers(actions)}
    assert len(set(grid)) == len(grid) == 114480 and len(missing) == 535 and missing <= set(grid)
    assert sum(n < "S018" for n in grid) == 56880 and sum(n < "S018" for n in missing) == 302
    for protocol, everything, without in (
        ("ntu60-xsub", (40320, 16560), (40091, 16487)), ("ntu60-xview", (37920, 18960), (37646, 18932)),
        ("ntu120-xsub", (63360, 51120), (63026, 50919)), ("ntu120-xset", (54720, 59760), (54468, 59477)),
    ):  # fmt: skip
        for left_out, expected in ((set(), everything), (missing, without)):
            splits = [data.ntu_split(n, protocol) for n in grid if n not in left_out]
            assert (splits.count("train"), splits.count("test")) == expected
            assert "{:,} and {:,}".format(*expected) in data.NTU_PROTOCOLS[protocol]


COCO = dict(label=3, img_shape=(60, 100), original_shape=(60, 100), total_frames=8)


def entry(name, n=8, persons=1, **changes):
    keypoint = np.random.default_rng(n).uniform(5, 55, (persons, n, 17, 2)).astype(np.float16)
    return (
        COCO | dict(frame_dir=name, keypoint=keypoint, keypoint_score=np.ones((persons, n, 17), np.float16)) | changes
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pyskl_pickles(tmp_path, protocol):
    """float16 kept, persons padded with zeros or NaN seen, lengths that differ, ids with and without _E_ and _A_."""
    long = "0LtLS9wROrk_E_002407_002435_A_0003_0005"
    for name in ("0LtLS9wROrk_002407_002435_0003_0005", "two", "S001C001P001R001A001_rgb"):
        write_video(tmp_path / "subactions" / f"{name}.mp4", numbered(12, 60, 100))
    two = entry("two.avi", persons=2)
    two["keypoint"][0, 2, 4], two["keypoint"][1, 5:] = np.nan, 0
    two["keypoint_score"][0, 0, 0] = 0
    exchanged = np.ascontiguousarray(two["keypoint"].transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2)  # the same, strided
    assert np.array_equal(exchanged, two["keypoint"], equal_nan=True) and not exchanged.flags.c_contiguous
    two["keypoint"] = exchanged
    annotations = [entry(long), two, entry("gone", label=5), entry("S001C001P001R001A001", n=1)]
    split = defaultdict(list, train={"two.avi", long}, val=["S001C001P001R001A001", "gone"])
    content = {"split": split, "annotations": annotations}
    old_numpy = pickle.dumps(content, protocol)
    if protocol == 2:  # as numpy 1 names its modules
        old_numpy = old_numpy.replace(b"numpy._core", b"numpy.core")
        assert b"numpy.core" in old_numpy
    (tmp_path / "gym_hrnet.pkl").write_bytes(old_numpy)
    source = data.finegym([tmp_path])
    assert [clip.name for clip in source.clips["train"]] == [long, "two.avi"] and len(source.clips["test"]) == 1
    assert source.missing == ["gone has no video"] and len(source.classes) == 6 and len(source.joint_names) == 34
    clip = source.clips["train"][1]
    assert clip.joints.shape == (8, 34, 2) and clip.joints.dtype == np.float32
    assert np.array_equal(clip.joints[:, 17:], two["keypoint"][1])
    assert (
        not clip.visible[2, 4]
        and not clip.visible[0, 0]
        and not clip.visible[5:, 17:].any()
        and clip.visible[:5, 17:].all()
    )
    assert not source.clips["train"][0].visible[:, 17:].any()  # one person
    assert source.flip_pairs == [(a + person, b + person) for person in (0, 17) for a, b in data.COCO_PAIRS]
    clip = source.annotate(source.clips["train"][0])  # 8 poses for 12 frames
    assert np.array_equal(clip.joints, source.clips["train"][0].joints[[0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7]])
    assert len(source.annotate(source.clips["test"][0]).joints) == 12
    item = data.Dataset(source, "train", 4, 48, 48)[0]
    assert item["video"].shape == (3, 4, 48, 48) and item["joints"].shape == (4, 34, 2) and not item["bad"]

    lists = tmp_path / "train.pkl", tmp_path / "val.pkl"
    for path, some in zip(lists, (annotations[:2], annotations[3:])):
        path.write_bytes(pickle.dumps(some, protocol))
    source = data.pyskl([tmp_path], list(lists))
    assert [len(source.clips[split]) for split in ("train", "test")] == [2, 1]
    lists[1].write_bytes(pickle.dumps([annotations[0] | {"frame_dir": f"{annotations[0]['frame_dir']}.mp4"}], protocol))
    with pytest.raises(data.DataError, match="1 clips are for training and test alike"):  # by another spelling
        data.pyskl([tmp_path], list(lists))
    with pytest.raises(data.DataError, match="gym_hrnet.pkl: of two files"):  # whose clips would count twice
        data.pyskl([tmp_path], [tmp_path / "gym_hrnet.pkl"] * 2)
    with pytest.raises(data.DataError, match="xsub_train.*'train', 'val'"):
        data.pyskl([tmp_path], [tmp_path / "gym_hrnet.pkl"], ("xsub_train", "xsub_val"))
    changes = (
        dict(keypoint=np.zeros((1, 8, 25, 3))), dict(keypoint=np.zeros((0, 8, 17, 2))), dict(label=-1),
        dict(keypoint_score=np.ones(3)), dict(img_shape=(0, 5)), dict(img_shape=(60, 100, 3)),
        dict(keypoint=np.zeros((8, 17, 2))),
    )  # fmt: skip
    bad = [entry(f"two {i}", **change) for i, change in enumerate(changes)]
    lists[0].write_bytes(pickle.dumps([*bad, annotations[1], annotations[1]], protocol))
    problems = data.pyskl([tmp_path], list(lists)).problems
    assert len(problems) == 8 and problems[-1] == f"{lists[0]}, two.avi: it is there twice"
    assert "(60, 100, 3)" in problems[-3] and "(8, 17, 2)" in problems[-2]
    write_video(tmp_path / "other" / "two.mp4", numbered(3))  # which of two videos is meant?
    (tmp_path / "gym_hrnet.pkl").rename(tmp_path / "gym_2d.pkl")
    (problem,) = data.finegym([tmp_path]).problems
    assert "other/two.mp4 and " in problem and "subactions/two.mp4 have one name" in problem


class Gadget:
    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_that_run_code_are_refused(tmp_path, protocol):
    """An unpickler that calls what the file names: os.system and the ways around a ban of it."""
    pytest.importorskip("av", reason="needs av, the decoder of videos")
    proof = tmp_path / "ran"
    line = f"open({str(proof)!r}, 'w')"
    gadgets = [
        Gadget(os.system, f"touch {proof}"), Gadget(eval, line), Gadget(exec, line), Gadget(open, str(proof), "w"),
        Gadget(subprocess.Popen, ["touch", str(proof)]), Gadget(__import__, "os"), Gadget(getattr, os, "system"),
        Gadget(functools.partial, os.system, "true"), Gadget(np.fromfile, str(proof)), Gadget(np.save, str(proof), 1),
        Gadget(pickle.loads, pickle.dumps(Gadget(os.system, f"touch {proof}"))), Gadget(np.load, str(proof)),
        Gadget(itertools.starmap, os.system, [(f"touch {proof}",)]), Gadget(data.importlib.import_module, "os"),
    ]  # fmt: skip
    path = tmp_path / "evil.pkl"
    for gadget in gadgets:
        for content in (gadget, {"split": {}, "annotations": [gadget]}, np.array([gadget], dtype=object)):
            try:
                path.write_bytes(pickle.dumps(content, protocol))
            except (TypeError, pickle.PicklingError):  # a module or a C function that this protocol cannot write
                continue
            with pytest.raises(data.DataError, match="evil.pkl: it wants"):
                data.pyskl([tmp_path], [path])
            assert not proof.exists()
    for damaged in (b"", b"\x80", pickle.dumps({"split": 1}), pickle.dumps([1, 2])[:-2], pickle.dumps(3)):
        path.write_bytes(damaged)
        with pytest.raises(data.DataError, match="evil.pkl"):
            data.pyskl([tmp_path], [path])


def python(*words, timeout=120, **kwargs):
    """Run a script of the project as a user would."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **kwargs)


def test_check_of_a_data_set(penn):
    """A check that stops at the first problem, or does not name it."""
    (penn / "frames" / "0002" / "000003.jpg").unlink()
    (penn / "frames" / "0003" / "000005.jpg").write_bytes(b"")
    done = python(HERE / "data.py", "--data", "pennaction", "--root", penn)
    assert done.returncode == 1
    for words in (
        "bowl",
        "60      60",
        "960 frames",
        "without a visible joint: 0005",
        "2 problems",
        "000003.jpg",
        "000005.jpg",
    ):
        assert words in done.stdout
    for roots, said in (([penn, penn / "labels"], "one folder"), ([penn / "nowhere"], "no folder")):
        done = python(HERE / "data.py", "--data", "pennaction", "--root", *roots)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and said in done.stderr
    done = python(HERE / "data.py", "--data", "pennaction", "--root", penn / "labels")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "looked for" in done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Damaged files
# --------------------------------------------------------------------------------------------------------------------


def guarded(work, seconds=60):
    """`work()` in a process of its own: what it returned and the MiB it took; or what went wrong, and None.

    Memory is watched, not limited: a limit turns a file that asks for all of it into a polite error.
    """

    def resident(process):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() >> 20

    def run():
        before = resident("self")
        try:
            answer = work(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before
        except BaseException:
            answer = traceback.format_exc(limit=-1), None
        theirs.send(answer)

    fork, start, end = multiprocessing.get_context("fork"), resident("self"), time.time() + seconds
    ours, theirs = fork.Pipe(False)
    child = fork.Process(target=run)
    child.start()
    theirs.close()
    while not ours.poll(0.005):
        if time.time() > end or resident(child.pid) - start > 2048:
            child.kill()
            return f"more than {seconds} s or 2 GiB", None
    try:
        return ours.recv()
    except EOFError:
        return f"crashed with exit status {child.join() or child.exitcode}", None


def break_file(path, rng):
    """One of the ways in which any file breaks."""
    good = np.frombuffer(path.read_bytes(), np.uint8)
    n, (a, b) = len(good), np.sort(rng.integers(len(good), size=2))

    def flip(count, start=0, end=None):
        bad, at = good.copy(), rng.choice(np.arange(n)[start:end], count)
        bad[at] ^= np.uint8(1) << rng.integers(8, size=count).astype(np.uint8)
        return bad

    ways = [
        flip(1), flip(10), flip(n // 50), flip(1, 0, 200), flip(5, 0, 200), flip(3, -400), good[:0], good[:a],
        good[: -rng.integers(1, 9)], np.tile(good, 2), rng.integers(256, size=n), np.delete(good, np.s_[a:b]),
        np.where(np.arange(n) // 32 == a // 32, 0, good),
        path.mkdir, lambda: path.symlink_to(path.name), lambda: path.symlink_to("nowhere"),
    ]  # fmt: skip
    way = ways[rng.integers(len(ways))]
    path.unlink()
    way() if callable(way) else path.write_bytes(way.astype(np.uint8).tobytes())


def written(content):
    return lambda path, _: path.write_bytes(content)


def rewritten(change):
    return lambda path, _: path.write_bytes(change(path.read_bytes()))


def put(tag, offset, value, form=">I"):
    """Overwrite the number that lies `offset` bytes after a tag."""
    new = struct.pack(form, value)
    return rewritten(lambda old: old[: old.index(tag) + offset] + new + old[old.index(tag) + offset + len(new) :])


def some(value):
    """`value` in place of every third number."""
    return lambda x: np.where(np.arange(x.size).reshape(x.shape) % 3 == 0, value, x.astype(float))


OBJECTS, TEXT = np.array([[1, "a"]], object), np.array([["1"] * 13] * 8)


def label_ways():
    def change(key, value):
        def way(path, _):
            label = {k: v for k, v in scipy_io.loadmat(path).items() if k[0] != "_"}
            scipy_io.savemat(path, label | {key: value(label[key]) if callable(value) else value})

        return way

    def mat(kind, dims, body, size=None):  # a variable x that declares what it likes
        head = struct.pack("<6I2i2I8s", 6, 8, kind, 0, 5, 8, *dims, 1, 1, b"x")
        return struct.pack("<2I", 14, len(head + body) if size is None else size) + head + body

    scipy_io, sparse = pytest.importorskip("scipy.io"), pytest.importorskip("scipy.sparse")
    number, pack = struct.pack("<2Id", 9, 8, 1), zlib.compressobj(9)
    packed = pack.compress(mat(6, (8, 13), struct.pack("<2I", 9, 2**29))) + pack.flush(zlib.Z_FULL_FLUSH)
    packed += (pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)) * 480
    nested, head = mat(6, (1, 1), number), len(mat(1, (1, 1), b""))
    nested = b"".join(mat(1, (1, 1), b"", head * i - 8 + len(nested)) for i in range(50000, 0, -1)) + nested
    variables = [
        mat(6, (10**9, 10**9), number), mat(1, (10**9, 1), b""), mat(2, (10**9, 1), struct.pack("<3I", 5, 4, 8)),
        mat(6, (8, 13), struct.pack("<2I", 9, 2**32 - 16)), struct.pack("<2I", 15, len(packed)) + packed, nested,
        mat(6, (1, 1), struct.pack("<2Id", 4105, 8, 1)), mat(4, (1, 10**9), struct.pack("<2I", 16, 0)),
    ]  # fmt: skip
    changes = {
        "x": [some(np.nan), some(np.inf), some(-1e300), some(1j), TEXT, OBJECTS, {"a": 1}, np.transpose, np.ravel,
              lambda x: x[..., None], lambda x: x[:, :12], lambda x: x[:1], np.zeros((0, 13)), sparse.csc_array],
        "visibility": [*map(some, (np.nan, np.inf, 2, -1, 0.5, 255, 1j)), TEXT, OBJECTS],
        "dimensions": [[1e9, 1e9, 8], [1, 8192, 8], [65535, 1, 8], [0, 0, 0], [-30, -44, 8], [np.nan] * 3, [np.inf] * 3,
                       [30], [30.5, 44, 8], [30j, 44, 8], "30 44 8", OBJECTS],
        "train": [0, np.nan, [1, 1], "1", OBJECTS], "action": [3, "", ["bowl", "squat"], OBJECTS],
    }  # fmt: skip
    start = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<2H", 0x100, 0x4D49)
    return [change(k, v) for k, values in changes.items() for v in values] + [written(start + v) for v in variables]


def frame_ways():
    def saved(form, mode="RGB", size=(44, 30), **options):
        return lambda path, _: image.new(mode, size, 1).save(path, form, **options)

    def declares(width, height, progressive):  # a picture that is larger than it is
        tag, number = b"\xff\xc2" if progressive else b"\xff\xc0", height * 65536 + width
        return lambda *where: (saved("JPEG", progressive=progressive)(*where), put(tag, 5, number)(*where))

    image = pytest.importorskip("PIL.Image")
    sizes = [(65500, 65500), (12000, 12000), (8192, 8192), (65500, 1), (0, 30), (44, 0), (1, 1), (500, 300)]
    return [
        *(declares(*size, progressive) for size in sizes for progressive in (False, True)),
        *(saved(form) for form in ("PNG", "GIF", "BMP", "TIFF", "WEBP")), saved("PNG", size=(11000, 11000)),
        *(saved("JPEG", mode) for mode in ("L", "CMYK", "YCbCr", "1")), saved("JPEG", size=(3, 700)),
    ]  # fmt: skip


def skeleton_ways():
    def swap(old, new, count=1):
        return rewritten(lambda text: re.sub(old, new, text, count=count))

    def token(field, value):  # of every other joint, so that something is left to see
        def change(text):
            rows = [line.split(b" ") for line in text.split(b"\r\n")]
            for row in rows[1::2]:
                row[field:] = [value, *row[field + 1 :]] if len(row) == 12 else row[field:]
            return b"\r\n".join(b" ".join(row) for row in rows)

        return rewritten(change)

    numbers = [b"nan", b"inf", b"-inf", b"1e400", b"1e300", b"-5", b"1.5.2", b"0x10", b"1_0", b"", b"1 2", b"a", b"\0"]
    counts = [b"1000000000000", b"-1", b"0", b"2", b"24", b"2.5", b"nan", b"", b"9" * 5000]
    crowd = skeleton([[(i + 1000 * t, body(100 + i, 500)) for i in range(6)] for t in range(50)])
    return [
        *(token(5, value) for value in numbers), token(6, b"nan"), token(0, b"inf"), token(2, b"1e300"),
        *(token(11, value) for value in (b"nan", b"inf", b"-1", b"0", b"3", b"1.5")),
        *(swap(old, n) for old in (rb"^\d+", rb"(?<=\n)1(?=\r)", rb"(?<=\n)25(?=\r)") for n in counts),
        *(swap(str(KINECT).encode(), n) for n in (b"1" * 30, b"-1", b"1.5", b"nan")), written(b"1\r\n" * 1000),
        written(b"3000000\r\n" + b"0\n" * 3_000_000), written(crowd), rewritten(lambda old: str(old).encode("utf16")),
        swap(rb" (\S+)\r\n(\S+ \S+ )", rb"\r\n\1 \2", 40), swap(rb"\r\n", rb"\r", 0), swap(rb"\r\n", rb"\n", 0),
    ]  # fmt: skip


def video_ways(avi):
    tags = "stts 12 stts 16 stsz 8 stsz 12 stsc 16 stco 8 mvhd 16 avc1 28 avc1 80 tkhd 80 moov -4 mdat -4 avcC 9"
    if avi:
        tags = "avih 24 avih 40 strh 28 strh 40 strf 12 strf 16 movi -8 idx1 4 idx1 16 00dc 4 RIFF 4"
    pairs, form = list(zip(tags.split()[::2], tags.split()[1::2])), "<I" if avi else ">I"
    sound = struct.pack("<4sI8sI2H2I2H4sI", b"RIFF", 136, b"WAVEfmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 100)
    session = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    return [
        *(put(tag.encode(), int(at), value, form) for tag, at in pairs for value in (0, 7, 10**9, 2**32 - 1)),
        lambda path, _: path.write_text(f"ffconcat version 1.0\nfile '{path.name}'\n"), written(session),
        lambda path, _: path.write_text(f"#EXTM3U\n#EXTINF:5,\n{path.name}\n"), written(sound + bytes(100)),
        lambda path, _: write_video(path, numbered(2, 64, 16000)), lambda path, _: write_video(path, numbered(0)),
        lambda path, _: write_video(path, numbered(1)), lambda path, _: write_video(path, numbered(30)),
    ]  # fmt: skip


def dump(path, content):
    plain = content["annotations"] if content["plain"] else content
    path.write_bytes(pickle.dumps(plain, content["protocol"]))


def pickle_ways():
    def change(key, value):
        def way(path, content):
            one = content["annotations"][1]
            one[key] = value(one[key]) if callable(value) else value
            dump(path, content)

        return way

    def replace(*keys, value):
        def way(path, content):
            functools.reduce(lambda inside, key: inside[key], keys[:-1], content)[keys[-1]] = value
            dump(path, content)

        return way

    laughs, huge = "ha", Gadget(np.ndarray)
    huge.call = (np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (10**9,), np.dtype("O"), False, []))
    spread = Gadget(np.ndarray, (1, 10**7, 17, 2), "f4", bytes(4), 0, (0, 0, 0, 0))
    for _ in range(40):
        laughs = (laughs, laughs)
    arrays = [*map(some, (np.nan, np.inf, -np.inf, 1e300, 0, -3, 1j)), lambda k: k[0], lambda k: k[:, :0],
              lambda k: k[:0], lambda k: k.astype(str), lambda k: k.astype(object), lambda k: k.astype("f4,f4"),
              lambda k: k.astype(">f4"), lambda k: k.tolist(), np.int8, np.asfortranarray, spread, huge, laughs, None,
              lambda k: k[..., :1]]  # fmt: skip
    sides = [(10**9, 10**9), (1, 8192), (65535, 1), (np.nan, 9), (np.inf, 9), "64", (40, 60, 3), (0, 0), (-40, -60),
             (40.5, 60), None, laughs]  # fmt: skip
    changes = {
        "keypoint": arrays, "keypoint_score": arrays, "img_shape": sides,
        "label": [10**9, 2**70, -1, np.nan, "1", 1.5, None, [1], laughs, np.int64(1), np.float32(1)],
        "frame_dir": [None, 7, laughs, "a" * 10**6, "gone", "\ud800", b"clip"],
    }  # fmt: skip
    opcodes = [(b"\x8e", "<Q", 2**40), (b"\x8e", "<Q", 2**33), (b"\x96", "<Q", 2**33), (b"\x95", "<Q", 2**40),
               (b"]r", "<I", 2**29), (b"\x8b", "<i", 2**31 - 1), (b"]" * 10**6, "<I", 0)]  # fmt: skip
    return [
        *(change(key, value) for key, values in changes.items() for value in values),
        *(replace("annotations", 1, value=v) for v in (None, [], {}, "clip")),
        *(replace("annotations", value=v) for v in ({}, None, laughs)),
        *(replace("split", "train", value=v) for v in ("abc", None, [laughs], ["clip é 0", "clip é 1", "ghost"])),
        replace("split", "train", value=np.array(["clip é 0", "clip é 1", "clip é 2"])),
        *(replace("split", value=v) for v in ({}, None, laughs, [1])), written(b"N."),
        rewritten(lambda old: re.sub(rb"((J\xff{4}){2}K)\0", rb"\1?", old)),  # the flags of a dtype: it holds objects
        *(written(b"\x80\x05" + code + struct.pack(form, value) + b"a.") for code, form, value in opcodes),
    ]  # fmt: skip


def read_penn(clip, root, content):
    io = pytest.importorskip("scipy.io")
    label = io.loadmat(root / "labels" / f"{clip.name}.mat", variable_names=["x", "y", "visibility"])
    x, y, seen = (label[key] for key in ("x", "y", "visibility"))
    assert not np.iscomplexobj([x, y, seen])
    return np.stack([np.float32(x) - 1, np.float32(y) - 1, seen == 1], -1)[:, None]


def read_skeleton(clip, root, content):
    """Bodies line by line and word by word, as Python reads numbers."""
    lines, frames = iter((root / f"{clip.name}.skeleton").read_bytes().decode("latin1").split("\n")), []
    for _ in range(int(next(lines))):
        frames.append(np.zeros((6, 25, 3)))
        for person in range(int(next(lines))):
            next(lines), next(lines)
            for joint in range(25):
                words = [float(word) for word in next(lines).split()]
                assert len(words) == 12
                frames[-1][person, joint] = *words[5:7], words[11] in (1, 2)
    return np.array(frames)


def read_entry(clip, root, content):
    one = next(e for e in content["annotations"] if isinstance(e, dict) and e.get("frame_dir") == clip.name)
    x, y = np.moveaxis(one["keypoint"], -1, 0)
    seen = (one["keypoint_score"] > 0) & np.isfinite(one["keypoint_score"]) & ((x != 0) | (y != 0))
    return np.stack([x, y, seen], -1).swapaxes(0, 1)


def examine(options, name, file, declared):
    """What a data set makes of a damaged file: "loaded", "replaced" in training, or an "error". All else fails."""
    try:
        source = data.load(options)
    except data.DataError as error:
        assert file in str(error)
        return "error"
    told = [line for line in source.problems + source.missing if name in line]
    assert len(source.clips["train"] + source.clips["test"]) + len(told) >= 6, "a clip is gone without a word"
    assert len(source.classes) <= 10**4
    fates, R = {"error"} if told else set(), len(source.joint_names)
    for split in ("train", "test"):
        dataset = data.Dataset(source, split, 24, 24, 24)
        for i, clip in enumerate(dataset.clips):
            try:
                item = dataset[0, i]
            except data.BadClip as error:
                assert name in str(error) and (split == "test" or len(dataset) == 1)
                fates.add("error")
                continue
            video, joints, visible = item["video"], item["joints"], item["visible"]
            assert (video.dtype, joints.dtype, visible.dtype) == (torch.uint8, torch.float32, torch.bool)
            assert video.shape == (3, 24, 24, 24) and joints.shape == (24, R, 2) and visible.shape == (24, R)
            assert ((joints[visible] >= -0.5) & (joints[visible] < 23.5)).all() and item["label"] < len(source.classes)
            assert all(name in reason for _, reason in item["bad"])
            if item["bad"]:
                fates.add("replaced")
            elif declared:
                clip, truth = source.annotate(clip), declared(clip)  # (frames, persons, joints, x y seen)
                for f, r in np.argwhere(clip.visible & np.isfinite(clip.joints).all(-1)):
                    rows = truth[[f]] if len(truth) == len(clip.joints) else truth
                    x, y, seen = np.moveaxis(rows[..., r % truth.shape[2], :], -1, 0).astype(np.float32)
                    assert ((x == clip.joints[f, r, 0]) & (y == clip.joints[f, r, 1]) & (seen == 1)).any(), (f, r)
    return "replaced" if "replaced" in fates else max(fates, default="loaded")


DAMAGE = {  # the data set, which of its files, how they are damaged, and who else can read the joints
    "label": ("pennaction", "labels/*.mat", label_ways, read_penn),
    "frame": ("pennaction", "frames/*/*.jpg", frame_ways, read_penn),
    "skeleton": ("ntu60-xsub", "*.skeleton", skeleton_ways, read_skeleton),
    "avi": ("ntu60-xsub", "*.avi", lambda: video_ways(avi=True), read_skeleton),
    "mp4": ("finegym", "subactions/*", lambda: video_ways(avi=False), read_entry),
    "pickle": ("pyskl", "gym_hrnet.pkl", pickle_ways, read_entry),
}


@pytest.fixture
def healthy(request, tmp_path):
    """A function of a source: a root with three clips for training and three for testing, and what its pickle says."""

    def write(source):
        root, names, content = tmp_path / source, [f"clip é {i}" for i in range(6)], {}
        for i, name in enumerate(names):
            if source == "pennaction":
                penn, number = request.getfixturevalue("penn"), f"{i + 1:04d}"
                shutil.copytree(penn / "frames" / number, root / "frames" / number)
                (root / "labels").mkdir(exist_ok=True)
                shutil.copy(penn / "labels" / f"{number}.mat", root / "labels")
            elif source == "ntu60-xsub":
                sample = f"S001C001P00{1 if i < 3 else 3}R001A00{i + 1}"
                write_video(root / f"{sample}_rgb.avi", numbered(12, 40, 60))
                walk = [[(KINECT, body(900, 500, wobble=0.02 * t))] * (t != 5) for t in range(12)]
                (root / f"{sample}.skeleton").write_bytes(skeleton(walk))
            else:
                write_video(root / "subactions" / f"{name}.mp4", numbered(12, 40, 60))
                content["split"] = {"train": names[:3], "val": names[3:]}
                content.setdefault("annotations", []).append(entry(name, n=12, label=i, img_shape=(40, 60)))
        return root, content

    return write


def flags(source, root):
    annotations = [root / "gym_hrnet.pkl"] if source == "pyskl" else None
    return argparse.Namespace(data=source, root=[root], annotations=annotations, split_train=None, split_val=None)


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(kind, share, healthy, tmp_path):
    """A worker that crashes, hangs or takes all memory; an error that names no file; joints seen that are not there."""
    source, pattern, ways, declared = DAMAGE[kind]
    (root, pristine), ways, fates, most, failed = healthy(source), ways(), Counter(), 0, []
    for number in range(0, len(ways) + 30, share):
        rng, folder = np.random.default_rng(number), tmp_path / f"Kopie – 動作 {number}"
        shutil.copytree(root, folder)
        content = copy.deepcopy(pristine) | {"protocol": (2, 4, 5)[number % 3], "plain": number % 7 == 6}
        if pristine:
            dump(folder / "gym_hrnet.pkl", content)
        path = rng.choice(sorted(folder.glob(pattern)))
        ways[number](path, content) if number < len(ways) else break_file(path, rng)
        read = (
            functools.partial(declared, root=folder, content=content)
            if kind != "pickle" or number < len(ways)
            else None
        )
        name = "" if kind == "pickle" else path.stem.removesuffix("_rgb")  # of an entry, only its name is known
        fate, used = guarded(functools.partial(examine, flags(source, folder), name, path.stem, read))
        shutil.rmtree(folder)
        if used is None:
            failed.append(f"{kind} {number}: {fate}")
        else:
            fates[fate], most = fates[fate] + 1, max(most, used)
    print(f"{kind}: {dict(fates)}, {len(failed)} failed, up to {most} MiB")
    assert not failed, "\n".join(failed)


def test_what_may_not_be_read(healthy):
    """A folder without permission that is taken for an empty one; a PermissionError that ends a worker."""

    def look(source, root, closed):
        if os.geteuid() == 0:  # whom no permission stops
            os.setuid(65534)
        return examine(flags(source, root), Path(closed).stem or root.name, Path(closed).stem or root.name, None)

    for source, fates in {
        "pennaction": {"labels": "error", "labels/0001.mat": "error", "frames/0002": "replaced"},
        "ntu60-xsub": {".": "error", "S001C001P001R001A001.skeleton": "replaced", data.NTU_LISTS[60]: "error"},
        "finegym": {
            ".": "error",
            "subactions": "error",
            "gym_hrnet.pkl": "error",
            "subactions/clip é 1.mp4": "replaced",
        },
    }.items():
        original, content = healthy(source)
        (original / data.NTU_LISTS[60]).touch()
        if content:
            dump(original / "gym_hrnet.pkl", content | {"protocol": 4, "plain": False})
        for closed, fate in fates.items():
            with tempfile.TemporaryDirectory() as folder:
                Path(folder).chmod(0o755)
                root = shutil.copytree(original, Path(folder, "root"))
                (root / closed).chmod(0)
                assert guarded(functools.partial(look, source, root, closed))[0] == fate
                (root / closed).chmod(0o755)


def test_names_and_links(tmp_path, monkeypatch):
    """A link back that is followed for ever; a name that av takes for a protocol, or that no terminal can show."""
    names = ["a:b", "concat:c|d", "100%d #1?", "quote\"'\\", "two\nlines", "-i", "vidéo 動画", os.fsdecode(b"caf\xe9")]
    (tmp_path / "deep").mkdir()
    for name in names:
        write_video(tmp_path / "deep" / "v.mp4", numbered(12, 40, 60)).rename(tmp_path / f"{name}.mp4")
    for link, target in (
        ("deep/up", ".."),
        ("loop", "."),
        ("self", "self"),
        ("a", "b"),
        ("b", "a"),
        ("gone", "nowhere"),
    ):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "broken.mp4").symlink_to("broken.mp4")
    entries = [entry(name, img_shape=(40, 60)) for name in [*names, "broken"]]
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(entries))
    monkeypatch.chdir(tmp_path)
    dataset = data.Dataset(data.pyskl([Path()], [Path("own.pkl")]), "train", 4, 24, 24)
    assert [dataset[0, i]["name"] for i in range(len(names))] == names and dataset[0, len(names)]["bad"]
    (tmp_path / f"{names[-1]}.mp4").write_bytes(b"")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = python(HERE / "data.py", "--data", "pyskl", "--root", tmp_path, "--annotations", "own.pkl")
    assert done.returncode == 1 and "2 problems" in done.stdout and "caf\\udce9.mp4" in done.stdout


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------

TINY = "--channels 4 --height 16 --width 16 --frames 4 --heads 2 --device cpu"
SMALL = TINY + " --batch 8 --epochs 2 --warmup 0.5 --workers 0"


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """`fit(flags, out=...)` runs train.main in this process on 43 synthetic clips: its status and what it printed."""
    sources = {**data.SOURCES, "synthetic": (functools.partial(data.synthetic, train=43, test=11), [])}
    monkeypatch.setattr(data, "SOURCES", sources)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(flags="", out="run"):
        capsys.readouterr()
        status = train.main([*SMALL.split(), "--out", str(tmp_path / out), *flags.split()])
        return status, "".join(capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "clips_per_second")} for line in lines]


def test_checkpointing_changes_nothing(fit, tmp_path):
    """Blocks that are computed again with other numbers."""
    assert fit("--stop-after 3")[0] == 0 and fit("--stop-after 3 --checkpointing", out="again")[0] == 0
    plain, again = checkpoint(tmp_path / "run")["model"], checkpoint(tmp_path / "again")["model"]
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_flags_that_are_accepted_and_forgotten(fit, tmp_path, monkeypatch):
    """A run that says it hides, compiles or saves memory, and does not."""
    losses, computed, forward = {}, [], d3t.Block.forward
    monkeypatch.setattr(d3t.Block, "forward", lambda self, *tokens: computed.append(1) or forward(self, *tokens))
    monkeypatch.setattr(torch, "compile", lambda net: computed.append("compile") or net)
    for flags in ("", "--hide joints", "--hide video", "--amp bf16", "--seed 1", "--checkpointing", "--compile"):
        computed.clear()
        assert fit(f"--stop-after 1 --blocks 1 {flags}", out=f"run {flags}")[0] == 0
        losses[flags] = checkpoint(tmp_path / f"run {flags}")["progress"]["loss"]
        assert len(computed) == (2 if flags in ("--checkpointing", "--compile") else 1)
    assert losses.pop("") == losses.pop("--checkpointing") == losses.pop("--compile")
    assert len(losses) == len({round(loss, 6) for loss in losses.values()})


def test_a_training_step(fit, monkeypatch):
    """Clipping or a schedule that is computed and not used."""
    rates, norms, step = [], [], torch.optim.AdamW.step

    def spy(self, *words, **more):
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *words, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    assert fit("--stop-after 3 --clip 0.01")[0] == 0
    recipe = train.Recipe(epochs=2, warmup=0.5, lr=1e-3)
    assert rates == [train.learning_rate(recipe, 8 * n / 43) for n in (1, 2, 3)] and max(norms) < 0.0101


def test_weight_decay(tmp_path):
    """Decay of norms, biases and embeddings, or of nothing else."""
    run, _ = train.build(*train.parse_args([*SMALL.split(), "--out", str(tmp_path), "--pose-embedding"]))
    decayed, rest = ({id(p) for p in group["params"]} for group in run.optimizer.param_groups)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.05, 0.0]
    for name, p in run.model.named_parameters():
        assert id(p) in (rest if p.ndim == 1 or name.startswith(("position", "modal")) else decayed), name


def test_evaluation():
    """The least likely class; a mean over clips that is told as that over classes."""
    dataset = data.Dataset(data.synthetic(train=1, test=30), "test", 2, 16, 16)
    labels = np.array([dataset[i]["label"] for i in range(30)])
    model = torch.nn.Module()
    model.forward = lambda video, joints, visible: F.one_hot(torch.zeros(len(video), dtype=torch.long), 4).float()
    run = argparse.Namespace(
        world=train.World(0, 1, torch.device("cpu")), settings=argparse.Namespace(classes=4), model=model, signal=0,
        recipe=train.Recipe(batch=8), options=argparse.Namespace(workers=0), autocast=contextlib.nullcontext,
    )  # fmt: skip
    assert train.evaluate(run, dataset) == {"top1": (labels == 0).mean(), "mean_class": 0.25, "clips": 30}


def test_best(fit, tmp_path):
    """The last epoch in place of the best one."""
    assert fit("--epochs 4")[0] == 0
    tops = [line["top1"] for line in log_of(tmp_path / "run")]
    assert max(tops) != tops[-1]  # else this tells nothing
    assert checkpoint(tmp_path / "run", "best.pt")["progress"]["epoch"] == 1 + tops.index(max(tops))


def test_a_gradient_that_is_not_finite(fit, tmp_path, monkeypatch):
    """Weights of NaN after a loss that was sound."""
    backward = train.backward

    def spoiled(run, batches):
        loss = backward(run, batches)
        run.model.head.bias.grad[0] = torch.nan
        return loss

    monkeypatch.setattr(train, "backward", spoiled)
    status, printed = fit("--stop-after 1")
    assert status == 1 and "the gradient is not finite" in printed and printed.count("train ") >= 8
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("stop, workers", [(1, 0), (3, 2), (5, 1), (8, 0)])
def test_a_resumed_run_is_the_uninterrupted_run(fit, tmp_path, stop, workers):
    """Anything that a checkpoint forgets: the place in the epoch, the optimizer, the schedule, the best result."""
    assert fit(out="whole")[0] == 0
    status, printed = fit(f"--stop-after {stop}")
    assert status == 0 and f"stopped after step {stop}" in printed
    assert checkpoint(tmp_path / "run")["progress"]["step"] == stop
    status, printed = fit(f"--resume --workers {workers}")
    assert status == 0 and "epoch   2" in printed
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    assert whole["model"].keys() == resumed["model"].keys() and not any("module." in key for key in whole["model"])
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run") and len(log_of(tmp_path / "run")) == 2
    moments = [[state["exp_avg_sq"] for state in c["optimizer"]["state"].values()] for c in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*moments))
    best = [checkpoint(tmp_path / out, "best.pt") for out in ("whole", "run")]
    assert all(torch.equal(best[0]["model"][key], best[1]["model"][key]) for key in best[0]["model"])


def test_batches_cover_an_epoch_once():
    """A clip seen twice or by two processes; an order that depends on the number of processes or on a resume."""
    recipe = train.Recipe(batch=12, accumulate=2, seed=4)
    alone = train.training_batches(50, recipe, 3, 0, train.World(0, 1, torch.device("cpu")))
    assert [len(batch) for batch in alone] == [6] * 8 and len({clip for batch in alone for clip in batch}) == 48
    worlds = [train.World(rank, 3, torch.device("cpu")) for rank in range(3)]
    shared = [train.training_batches(50, recipe, 3, 0, world) for world in worlds]
    assert [len(batch) for batch in shared[0]] == [2] * 8
    for step in range(4):
        together = [clip for rank in shared for batch in rank[2 * step : 2 * step + 2] for clip in batch]
        assert sorted(together) == sorted(clip for batch in alone[2 * step : 2 * step + 2] for clip in batch)
    assert train.training_batches(50, recipe, 3, 24, worlds[1]) == shared[1][4:]
    assert train.training_batches(50, recipe, 4, 0, worlds[1]) != shared[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    """Settings of the C library that it ignores. A block may not fit where the one before it was, but soon all do."""
    code = """
import resource, torch, train
train.keep_memory()
faults = []
for _ in range(20):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""
    assert int(python("-c", code, cwd=HERE).stdout) < 100  # of 10 * 16,384 pages


def test_learning_rate():
    """A schedule stepped per epoch, a warm-up that jumps, a cosine that does not end at zero."""
    recipe = train.Recipe(epochs=90, warmup=5.0, lr=1.0)
    assert train.learning_rate(recipe, 2.5) == 0.5 and train.learning_rate(recipe, 5) == 1.0
    assert abs(train.learning_rate(recipe, 47.5) - 0.5) < 1e-12 and train.learning_rate(recipe, 90) < 1e-12
    assert train.learning_rate(train.Recipe(epochs=2, warmup=1.0, lr=1.0), 0.75) == 0.75
    with pytest.raises(ValueError, match="warmup = 5.0 is not less than epochs = 5"):  # it would end at the peak
        train.Recipe(epochs=5)
    assert train.learning_rate(recipe, 60.1) < train.learning_rate(recipe, 60.0)


def test_seed_and_hide_reach_the_data(fit, monkeypatch):
    """A seed of the weights alone; a modality that is hidden in training and not in the test."""
    made = []

    class Dataset(data.Dataset):
        def __init__(self, *words):
            super().__init__(*words)
            made.append((self.train, self.seed, self.hide))

    monkeypatch.setattr(data, "Dataset", Dataset)
    assert fit("--seed 7 --hide joints --stop-after 1")[0] == 0
    assert made == [(True, 7, "joints"), (False, 7, "joints")]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_one_of_several_processes_ends_at_once(processes, monkeypatch):
    """A rank whose interpreter ends under a thread of gloo, which aborts it: a run that is done is told as failed."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    done = python("-v", HERE / "train.py", "-h")
    assert done.returncode == 0 and "--epochs" in done.stdout
    assert ("# clear sys.path" in done.stderr) == (processes == "1")  # what the interpreter says of its end


GRADIENT = """
import sys, torch, train
run, source = train.build(*train.parse_args(sys.argv[2:]))
s = run.settings
dataset = train.data.Dataset(source, "train", s.frames, s.height, s.width)
torch.nn.init.normal_(run.model.blocks[0].deformable.search.offset.weight)
run.model.eval()  # batch norms use their running statistics
batches = train.training_batches(len(dataset), run.recipe, 0, 0, run.world)[: run.recipe.accumulate]
loss = train.backward(run, [train.data.collate([dataset[key] for key in keys]) for keys in batches])
loss = run.world.sum(loss.item()) / run.world.size
if run.world.rank == 0:
    torch.save([loss.float()] + [p.grad for p in run.model.parameters()], sys.argv[1])
train.leave(0)
"""


def torchrun(processes, *words, **kwargs):
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words, **kwargs)


def test_one_two_and_four_processes_take_the_same_step(tmp_path):
    """Gradients summed instead of averaged, clips that two processes share, parts of a batch weighted wrongly.

    With gloo, and batch norms in evaluation mode: their batch statistics are those of one process on a CPU.
    """
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT)
    flags = [*SMALL.split(), "--out", tmp_path / "none"]
    results = []
    for processes, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        out = tmp_path / f"{processes}-{accumulate}.pt"
        done = torchrun(processes, script, out, *flags, "--accumulate", accumulate)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9


def test_the_script_on_two_processes(tmp_path):
    """What only the real thing shows: a hang in an evaluation, wrapped names in a checkpoint, clips counted twice."""
    flags = f"{TINY} --batch 64 --epochs 1 --workers 1".split()
    done = torchrun(2, HERE / "train.py", *flags, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr  # gradients in another layout than their weights are copied at every step
    (line,) = log_of(tmp_path)
    assert line["clips"] == 512 and line["step"] == 32 and line["bad"] == 0
    assert 1 < line["loss"] < 2  # ln 4 at first, not the sum over processes
    for command in (python, functools.partial(torchrun, 3)):
        done = command(HERE / "train.py", "--eval", tmp_path / "best.pt", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["clips"] == 512
        assert abs(result["top1"] - line["top1"]) < 1e-9 and abs(result["mean_class"] - line["mean_class"]) < 1e-9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    """A run that Ctrl-C or a preempted node throws away; its loading processes ended by the same signal."""
    flags = f"{TINY} --epochs 50 --workers 2".split()
    command = [sys.executable, HERE / "train.py", *flags, "--save-every", "10", "--out", tmp_path]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen(command, **quiet, start_new_session=True)
    for _ in range(600):
        if (tmp_path / "last.pt").exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal, torchrun and a batch system do
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "go on with --resume" in printed
    assert f"stopped after step {checkpoint(tmp_path)['progress']['step']};" in printed


def test_an_epoch_is_kept_before_it_is_tested(penn, fit, tmp_path):
    """A test that fails, or takes longer than a batch system waits, throws away the epoch before it."""
    frame = penn / "frames" / "0003" / "000001.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(b"")
    flags = f"--data pennaction --root {penn} --frames 8 --batch 60 --epochs 1"
    assert fit(flags)[0] == 1 and checkpoint(tmp_path / "run")["progress"] | {"seconds": 0, "loss": 0} == {
        "epoch": 0, "seen": 60, "step": 1, "loss": 0, "losses": [], "bad_clips": {}, "seconds": 0, "best": -1.0
    }  # fmt: skip
    frame.write_bytes(whole)
    assert fit(f"{flags} --resume")[0] == 0
    assert fit(flags, out="whole")[0] == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_a_bad_clip_counts_once(penn):
    """A clip that counts again, whenever it was to stand in for another one or other frames of it were drawn."""
    for name in ("0002", "0004"):
        shutil.rmtree(penn / "frames" / name)
    dataset = data.Dataset(data.penn_action([penn]), "train", 2, 24, 24)
    bad = [clip for epoch in range(4) for i in (0, 1) for clip in dataset[epoch, i]["bad"]]
    assert len(set(bad)) > 2
    run = argparse.Namespace(progress=train.Progress(), world=argparse.Namespace(rank=1))
    train.note_bad_clips(run, bad, 200)
    assert list(run.progress.bad_clips) == ["0002", "0004"]


def test_bad_clips_in_training(penn, fit, tmp_path):
    """Bad clips that are not counted, or that replace so many others that the run means nothing."""
    flags = f"--data pennaction --root {penn}"
    (penn / "frames" / "0002" / "000003.jpg").write_bytes(b"")
    status, printed = fit(f"{flags} --frames 8 --batch 60 --epochs 2")
    assert status == 0 and [line["bad"] for line in log_of(tmp_path / "run")] == [1, 1]
    assert printed.count("warning: a clip was replaced") == 2 and "0002/000003.jpg" in printed  # once an epoch
    (penn / "frames" / "0004" / "000004.jpg").write_bytes(b"")
    status, printed = fit(f"{flags} --frames 8 --batch 60", out="other")
    assert status == 1 and "2 of 60 clips, more than 1 %" in printed and "0004/000004.jpg" in printed
    (penn / "frames" / "0003" / "000001.jpg").unlink()
    for workers in (0, 1):
        status, printed = fit(
            f"--data pennaction --root {penn} --frames 8 --eval {tmp_path}/run/best.pt --workers {workers}"
        )
        assert status == 1 and printed.splitlines()[-1].startswith("train.py: ") and "0003/000001.jpg" in printed


def test_training_on_videos(fit, tmp_path):
    """A source whose joints are read in the loading processes; a video that breaks off before its header says."""
    names = [f"clip {i}" for i in range(31)]
    for i, name in enumerate(names):
        write_video(tmp_path / f"{name}.avi", numbered(12, 40, 60)[:: 1 if i % 2 else -1])
    annotations = [entry(name, label=i % 2, img_shape=(40, 60)) for i, name in enumerate([*names, "gone"])]
    content = {"split": {"a": names[:20], "b": [*names[20:30], "gone"]}, "annotations": annotations}
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    flags = f"--data pyskl --root {tmp_path} --annotations {tmp_path}/own.pkl --split-train a --split-val b --epochs 1"
    for workers in (0, 1):
        status, printed = fit(f"{flags} --workers {workers} --preset tiny", out=f"run {workers}")
        assert status == 0 and "1 clips are left out: gone has no video" in printed
    assert log_of(tmp_path / "run 0") == log_of(tmp_path / "run 1") and log_of(tmp_path / "run 0")[0]["clips"] == 10
    content["split"] |= {"c": names[21:], "both": names[15:25]}
    (tmp_path / "own.pkl").write_bytes(pickle.dumps(content))
    status, printed = fit(f"{flags} --split-val c --epochs 2 --resume", out="run 0")
    assert status == 2 and "of other clips: 20 training and 10 test clips" in printed
    for split, shared in (("a", 20), ("both", 5)):
        status, printed = fit(f"{flags} --split-val {split}", out="same")
        assert status == 1 and f"own.pkl: {shared} clips are for training and test alike, such as" in printed
    for name in (names[0], names[25]):
        path = tmp_path / f"{name}.avi"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, printed = fit(flags, out="cut")
    assert status == 1 and "clip 25.avi" in printed and "a clip was replaced by another one" in printed
    done = python(HERE / "data.py", *flags.split()[:-2])
    assert done.returncode == 1 and "1 left out, 2 problems" in done.stdout and "20      10" in done.stdout


# --------------------------------------------------------------------------------------------------------------------
# Faults, injected into real runs
# --------------------------------------------------------------------------------------------------------------------

FAULTY = """
import os, sys, time, torch, data, train
from torch.optim.optimizer import register_optimizer_step_post_hook

def index():
    if fault == "slow index":
        open(os.environ["STEPS"] + " index", "w").close()
        time.sleep(8)
    return data.synthetic(train=96, test=24)

data.SOURCES["synthetic"] = index, []
rank, fault, steps, loads = os.environ.get("RANK", "0"), os.environ.get("FAULT"), 0, 0
forward, load, fsync = train.D3T.forward, data.Dataset.load, os.fsync

def count(*_):
    global steps
    steps += 1
    if rank == "0":
        with open(os.environ["STEPS"], "a") as file:
            print(steps, file=file)

def faulty_forward(self, *inputs):
    if steps == 3 and rank == "1" and fault == "model":
        raise KeyError("no such luck")
    if steps == 3 and rank == "1" and fault == "memory":
        torch.empty(2**50)
    if fault == "slow step" and steps == 3 or fault == "slow test" and not self.training:
        time.sleep(2)
    return forward(self, *inputs) * (float("nan") if steps == 3 and rank == "1" and fault == "loss" else 1)

def faulty_load(self, clip, rng):
    global loads
    loads += 1
    if rank == "1" and fault == "loader" and loads == 13:
        raise ZeroDivisionError(f"no luck with {clip.name}")
    return load(self, clip, rng)

def slow_fsync(file):  # many kills come between the writing of a checkpoint and its renaming
    time.sleep(0.03)
    fsync(file)

train.D3T.forward, data.Dataset.load, os.fsync = faulty_forward, faulty_load, slow_fsync
register_optimizer_step_post_hook(count)
train.leave(train.record(train.main)(sys.argv[1:]))
"""


SEPARATE_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Faulty:
    """`train.py` on 96 synthetic clips, 12 steps an epoch, with a fault; rank 0 writes a line for each step."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.script, self.steps, self.run = folder / "faulty.py", folder / "steps", folder / "run"
        self.script.write_text(FAULTY)
        self.steps.touch()

    def start(self, *flags, ranks: int = 1, agent=(), fault: str = "", **options) -> subprocess.Popen:
        launch = []
        if ranks > 1 or agent:
            launch = ["-m", "torch.distributed.run", *(agent or ["--standalone"]), f"--nproc_per_node={ranks}"]
        words = [sys.executable, *launch, self.script, *SMALL.split(), "--out", self.run, *flags]
        environment = {"PYTHONPATH": HERE, "OMP_NUM_THREADS": 1, "STEPS": self.steps, "FAULT": fault} | SEPARATE_STORES
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([*map(str, words)], env=environment, **pipes, **options)

    def finish(self, *flags, **how) -> tuple[int, str]:
        """Its status and what it printed; every fault has to end a run within a minute."""
        process = self.start(*flags, **how)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def taken(self) -> int:
        return len(self.steps.read_text().splitlines())


@pytest.fixture
def faulty(tmp_path):
    return Faulty(tmp_path)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_while_it_trains(faulty: Faulty, process: subprocess.Popen, target: str, rng: np.random.Generator) -> bool:
    """`kill -9` of the run itself or of one of its children, up to half a second after a step; False if it ended."""
    before = faulty.taken()
    while faulty.taken() == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    if process.poll() is not None:
        return False
    victims = [process.pid] if target == "run" else children(process.pid)
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
    return bool(victims)


def run_with_kills(faulty: Faulty, target: str, most: int, rng: np.random.Generator) -> tuple[int, int]:
    """A run that is killed up to `most` times and always goes on: kills, and those while a checkpoint was written."""
    flags = ["--epochs", 6, "--save-every", 2, "--workers", 2 if target == "loader" else 0]
    kills = saving = 0
    if target == "rank":  # torchrun starts them again
        agent = ["--standalone", f"--max-restarts={most}"]
        process = faulty.start(*flags, "--resume", ranks=2, agent=agent)
        while kills < most and kill_while_it_trains(faulty, process, target, rng):
            kills += 1
            time.sleep(1)  # until the other rank has ended, too
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        return kills, 0
    while True:
        process = faulty.start(*flags, "--resume" if (faulty.run / "last.pt").exists() else "--overwrite")
        killed = kills < most and kill_while_it_trains(faulty, process, target, rng)
        printed, _ = process.communicate(timeout=120)
        kills += killed
        saving += killed and (faulty.run / "last.tmp").exists()
        if process.returncode == 0:
            return kills, saving
        # not always on a line of its own: the other loading process may be writing that it lost its connection
        lost = process.returncode == 1 and "train.py: lost a loading process" in printed
        assert killed and (process.returncode == -signal.SIGKILL or lost), printed


def check_kills(tmp_path: Path, target: str, wanted: int, seed: int) -> str:
    """Runs of 72 steps with kills at random moments end as undisturbed ones, and repeat at most --save-every steps."""
    ranks, rng = 2 if target == "rank" else 1, np.random.default_rng(seed)
    whole = Faulty(tmp_path / "whole")
    status, printed = whole.finish("--epochs", 6, ranks=ranks)
    assert status == 0 and whole.taken() == 72, printed
    kills = saving = repeated = 0
    for number in itertools.count():
        if kills >= wanted:
            return f"{target}: {kills} kills in {number} runs, {saving} while saving, {repeated} steps repeated"
        faulty = Faulty(tmp_path / str(number))
        some, while_saving = run_with_kills(faulty, target, min(5, wanted - kills), rng)
        assert 0 <= faulty.taken() - 72 <= 2 * some
        kills, saving, repeated = kills + some, saving + while_saving, repeated + faulty.taken() - 72
        ours, theirs = (checkpoint(f.run)["model"] for f in (faulty, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert log_of(faulty.run) == log_of(whole.run)


def test_a_killed_run_goes_on(tmp_path):
    """A half-written checkpoint, steps that are lost or taken twice, a lock that outlives its run."""
    check_kills(tmp_path, "run", wanted=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["run", "loader", "rank"])
def test_thirty_kills(tmp_path, target):
    """The same of loading processes and ranks, and of many more moments."""
    print(check_kills(tmp_path, target, wanted=30, seed=1))


@pytest.mark.parametrize("fault, reason", [
    ("model", "KeyError: 'no such luck'"), ("memory", "can't allocate memory"), ("loader", "no luck with train "),
])  # fmt: skip
def test_one_rank_fails(faulty, fault, reason):
    """Other ranks that wait for ever, or whose tracebacks bury the reason."""
    status, printed = faulty.finish("--workers", 1 if fault == "loader" else 0, ranks=2, fault=fault)
    assert status == 1 and reason in printed
    assert "rank 0 lost another one" in printed and "[rank0]: Traceback" not in printed


@pytest.mark.slow
def test_a_node_that_is_lost_and_comes_back(tmp_path):
    """The README's two commands, with two agents on this machine: one dies with its process, and is started again."""
    faulty, whole = (Faulty(tmp_path / name) for name in ("two", "whole"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = ["--nnodes=2", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    how = dict(ranks=1, agent=agent)
    flags = ["--epochs", 20, "--save-every", 2, "--resume"]
    first = faulty.start(*flags, **how)
    time.sleep(3)  # it holds the rendezvous, and may not be the one that is lost
    second = faulty.start(*flags, **how)
    while not faulty.taken():
        time.sleep(0.01)
    time.sleep(1)
    for pid in (*children(second.pid), second.pid):
        os.kill(pid, signal.SIGKILL)
    time.sleep(5)
    again = faulty.start(*flags, **how)
    printed = ""
    for process in (first, again):
        printed += process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
    assert "resume=True" in printed and "epoch  20" in printed
    status, printed = whole.finish("--epochs", 20, ranks=2)
    assert status == 0, printed
    assert 0 <= faulty.taken() - whole.taken() <= 2 and whole.taken() == 240
    ours, theirs = (checkpoint(f.run)["model"] for f in (faulty, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("every", [1, 12])
def test_a_loss_that_is_not_finite_ends_the_run(faulty, every):
    """Weights of NaN in the last good checkpoint; ranks that disagree; a message that does not name the clips."""
    status, printed = faulty.finish("--save-every", every, ranks=2, fault="loss")
    assert status == 1
    reason = re.search(r"train.py: the loss is not finite.*?stays", printed).group()
    assert reason.count("train ") == 4 and "last finite loss was 1." in reason
    order = train.training_batches(96, train.Recipe(batch=8), 0, 24, train.World(1, 2, torch.device("cpu")))[0]
    assert all(f"train {clip}" in reason for _, clip in order)
    if every > 1:  # it is noticed at the tenth step, before anything is written
        assert faulty.taken() == 10 and not (faulty.run / "last.pt").exists()
        return
    state = checkpoint(faulty.run)
    assert state["progress"]["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def test_another_machine(faulty):
    """A checkpoint that needs as many processes, or the same precision, as it was written with."""
    assert faulty.finish("--stop-after", 3, ranks=4)[0] == 0
    assert faulty.finish("--resume", "--stop-after", 7, "--amp", "bf16", "--workers", 1, ranks=2)[0] == 0
    status, printed = faulty.finish("--resume", "--batch", 16, "--save-every", 3)
    assert status == 0, printed
    assert [(line["epoch"], line["step"]) for line in log_of(faulty.run)] == [(1, 9), (2, 15)]


def test_a_full_disk(faulty):
    """The last good checkpoint lost to one that did not fit; a file that is left behind; a status of 0."""
    assert faulty.finish("--stop-after", 2)[0] == 0
    before = (faulty.run / "last.pt").read_bytes()
    limit = (len(before) // 2, len(before) // 2)
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    status, printed = faulty.finish("--resume", preexec_fn=full)
    assert status == 1 and "last.pt cannot be written" in printed.splitlines()[-1] and "Traceback" not in printed
    assert "OSError" in printed.splitlines()[-1]  # what torch.save makes of it says nothing about a disk
    assert (faulty.run / "last.pt").read_bytes() == before and not (faulty.run / "last.tmp").exists()


@pytest.mark.parametrize("always", [False, True])
def test_gradients_that_overflow(always, fit, tmp_path, monkeypatch):
    """With fp16: a step that is skipped ends the run, or a run that skips all steps goes on and nobody is told."""
    scaler, backward = torch.amp.GradScaler, train.backward

    def spoiled(run, batches):
        loss = backward(run, batches)
        if always or run.progress.step == 3:
            run.model.head.weight.grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(train, "backward", spoiled)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))  # on a CPU, too
    status, printed = fit("--epochs 10 --save-every 1000")
    if always:
        assert status == 1 and "train.py: the gradient is not finite" in printed
        assert checkpoint(tmp_path / "run")["progress"]["step"] == 30  # after which the scale is too small
    else:
        assert status == 0 and checkpoint(tmp_path / "run")["scaler"]["scale"] == 2**15


def test_a_file_system_without_locks(fit, monkeypatch):
    """No run at all on a disk that cannot lock, as if another run were at work there."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", lockf)
    assert fit("--stop-after 1")[0] == 0


def test_resuming_what_is_at_its_end(fit, tmp_path):
    """A step beyond --stop-after; a batch that a preset takes back."""
    assert fit("--stop-after 2 --accumulate 4")[0] == 0
    status, printed = fit("--resume --preset tiny --stop-after 2")
    assert status == 0 and "stopped after step 2" in printed and "accumulate=4" in printed


@pytest.mark.parametrize("then", ["", "unexpected pos"])
def test_a_loading_process_that_is_lost_during_a_save(then, fit, tmp_path, monkeypatch):
    """A killed loading process that is told as a full disk, also where torch.save has an error of its own on top."""

    def save(*_):
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        finally:
            if then:
                raise RuntimeError(then)

    monkeypatch.setattr(torch, "save", save)
    status, printed = fit("--stop-after 2")
    assert status == 1 and printed.splitlines()[-1].startswith("train.py: lost a loading process")
    assert not (tmp_path / "run" / "last.tmp").exists()


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), EOFError(), RuntimeError("Pin memory thread exited")]
)
def test_a_loading_process_that_is_lost_while_it_sends(error, fit, monkeypatch):
    """A connection that breaks before torch sees that the process is gone, told as "reset by peer" and no more."""

    def load_batches(*_):
        raise error

    monkeypatch.setattr(train, "load_batches", load_batches)
    status, printed = fit("--stop-after 2")
    assert status == 1 and printed.splitlines()[-1].startswith("train.py: lost a loading process")


def test_damaged_checkpoints(fit, tmp_path):
    """A traceback, or a run that starts from half of its state."""
    assert fit("--stop-after 2")[0] == 0
    path = tmp_path / "run" / "last.pt"
    whole, state = path.read_bytes(), checkpoint(tmp_path / "run")
    cases = [(whole[: len(whole) * tenth // 10], "no checkpoint") for tenth in range(10)]
    for part, change, said in (
        ("settings", {"dropout": 0.1}, "settings differ in dropout"), ("settings", {"sigma": None}, "sigma"),
        ("recipe", {"momentum": 0.9}, "momentum"), ("progress", {"seen": None}, "seen"),
        ("settings", {"classes": 5}, "classes is 5, not 4"), ("settings", {"sigma": "1"}, "be float"),
        ("settings", {"joint_window": 7.5}, "be int"), ("recipe", {"batch": 8.5}, "be int"),
        ("model", {"head.bias": torch.zeros(3)}, "head.bias"), ("model", {"head.bias": None}, "head.bias"),
        ("optimizer", {"param_groups": []}, "does not fit"),
    ):  # fmt: skip
        changed = {key: value for key, value in (state[part] | change).items() if value is not None}
        file = io.BytesIO()
        torch.save(state | {part: changed}, file)
        cases.append((file.getvalue(), said))
    for content, said in cases:
        path.write_bytes(content)
        status, printed = fit("--resume")
        assert status == 2 and said in printed and len(printed.splitlines()) == 1, printed
        assert path.read_bytes() == content


@pytest.mark.parametrize("fault, signals, status", [
    ("slow step", 2, -signal.SIGTERM), ("slow test", 1, 128 + signal.SIGTERM),
])  # fmt: skip
def test_when_a_signal_ends_it(faulty, fault, signals, status):
    """A second signal that is ignored as well; a test that goes on for longer than a preempted node has."""
    process = faulty.start("--save-every", 1, fault=fault)
    while faulty.taken() < (3 if fault == "slow step" else 12):
        time.sleep(0.01)
    for _ in range(signals):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    begin = time.time()
    assert process.wait(30) == status and (signals == 1 or time.time() - begin < 2)
    seen = 96 if fault == "slow test" else 24  # the step in flight is given up
    assert checkpoint(faulty.run)["progress"]["seen"] == seen
    assert not (faulty.run / "log.jsonl").exists()


def test_two_runs_in_one_folder(faulty):
    """Two runs that overwrite each other's checkpoints."""
    process = faulty.start("--epochs", 1000)
    while not faulty.taken():
        time.sleep(0.01)
    for flags in ("--overwrite", "--resume"):
        if flags == "--overwrite" or (faulty.run / "last.pt").exists():
            status, printed = faulty.finish("--epochs", 1000, flags)
            assert status == 2 and printed.splitlines()[-1].startswith("train.py: another run is at work in"), printed
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


def test_a_run_that_ends_while_another_one_starts(faulty):
    """A folder that is looked at before it is locked: the run that starts deletes what the other one has trained."""
    slow = faulty.start("--epochs", 1, fault="slow index")
    while not faulty.steps.with_name("steps index").exists():
        time.sleep(0.01)
    status, printed = faulty.finish("--epochs", 1)
    assert status == 2 and "another run is at work in" in printed
    assert slow.wait(60) == 0 and faulty.taken() == 12
    before = (faulty.run / "last.pt").read_bytes()
    status, printed = faulty.finish("--epochs", 1)
    assert status == 2 and "holds a run" in printed and (faulty.run / "last.pt").read_bytes() == before


def test_usage_errors(fit, tmp_path, monkeypatch):
    """A traceback, or a run that starts with other settings than were asked for."""
    assert fit("--stop-after 2")[0] == 0
    with monkeypatch.context() as torchrun:
        torchrun.setattr(train, "RESTARTS", 3)  # the second time, the same command would delete the first one's run
        status, printed = fit("--overwrite")
        assert status == 2 and "--max-restarts" in printed
    before = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "cut.pt").write_bytes(before[: len(before) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(d3t.Trunk(8).state_dict(), tmp_path / "wide.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(functools.partial(os.system, "touch evil")))
    for flags, said in (
        ("", "--resume"), ("--resume --channels 8", "channels is 4, not 8"),
        ("--resume --lr 1", "lr is 0.001, not 1"),
        ("--overwrite --batch 0", "batch"), ("--overwrite --epochs -1", "epochs"),
        ("--overwrite --workers -1", "--workers"), ("--overwrite --stop-after 0", "--stop-after"),
        ("--overwrite --seed 99999999999999999999", "seed"), ("--overwrite --channels 10000000", "cannot be made"),
        ("--overwrite --annotations x", "--data pyskl"), ("--overwrite --split-val x", "--data pyskl"),
        (f"--eval {tmp_path}/run/last.pt --weights {tmp_path}/wide.pt", "--weights"),
        (f"--eval {tmp_path}/run/last.pt --preset small", "--preset"),
        ("--resume --out nowhere", "nowhere"), ("--overwrite --batch 7 --accumulate 2", "--batch 7"),
        ("--overwrite --temporal-window 5", "temporal_window = 5"), ("--overwrite --amp fp16", "fp16"),
        ("--resume --data pennaction", "--data synthetic"), ("--resume --hide joints", "hide is none, not joints"),
        ("--resume --overwrite", "--overwrite"), ("--resume --preset small", "kernel is 3, not 7"),
        ("--overwrite --hide me", "joints"),
        ("--overwrite --root x", "--root"), ("--overwrite --seed -1", "seed"), ("--overwrite --lr nan", "lr"),
        ("--frames many", "--frames"), ("--no-such", "--no-such"), (f"--out {tmp_path}/noise.pt", "noise.pt"),
        (f"--eval {tmp_path}/empty.pt", "empty.pt"), (f"--overwrite --weights {tmp_path}/empty.pt", "empty.pt"),
        (f"--overwrite --weights {tmp_path}/wide.pt", "wide.pt"),
        ("--overwrite --batch 64", "43"), ("--overwrite --warmup 2", "warmup"),
        (f"--eval {tmp_path}/gone.pt", "gone.pt"), (f"--eval {tmp_path}/noise.pt", "noise.pt"),
        (f"--eval {tmp_path}/cut.pt", "cut.pt"), (f"--eval {tmp_path}/other.pt", "lacks"),
        (f"--eval {tmp_path}/evil.pt", "evil.pt is no checkpoint of this train.py: it holds something"),
        (f"--overwrite --weights {tmp_path}/noise.pt", "--weights"),
    ):  # fmt: skip
        status, printed = fit(flags)
        assert status == 2 and said in printed and len(printed.splitlines()) == 1 and len(printed) < 600, printed
        assert "weights_only" not in printed
        assert (tmp_path / "run" / "last.pt").read_bytes() == before and not Path("evil").exists(), flags


def test_trunk_weights(fit, tmp_path):
    """Weights that load in part and in silence; a command that cannot go on with --resume."""
    weights = {name: value + 1 for name, value in d3t.Trunk(4).state_dict().items()}
    torch.save(weights | {"layer4.0.conv1.0.0.weight": torch.zeros(1), "fc.bias": torch.zeros(400)}, tmp_path / "w.pt")
    flags = [*SMALL.split(), "--out", str(tmp_path / "run"), "--weights", str(tmp_path / "w.pt")]
    run, _ = train.build(*train.parse_args(flags))
    assert all(torch.equal(run.model.trunk.state_dict()[key], value) for key, value in weights.items())
    assert fit(f"--weights {tmp_path}/w.pt --stop-after 1")[0] == 0
    del weights["stem.0.weight"]
    torch.save(weights, tmp_path / "w.pt")
    assert fit(f"--weights {tmp_path}/w.pt --stop-after 2 --resume")[0] == 0
    status, printed = fit(f"--weights {tmp_path}/w.pt", out="other")
    assert status == 2 and "stem.0.weight" in printed


def test_every_setting_is_a_flag():
    """A field of the dataclasses that the command line, or its help, forgot."""
    done = python(HERE / "train.py", "-h")
    assert done.returncode == 0
    for kind in (train.Recipe, Settings):
        for f in dataclasses.fields(kind):
            assert f.name in ("classes", "joints") or f"--{f.name.replace('_', '-')}" in done.stdout
    for words in ("data:", "run:", "training:", "model:", "[224; small", "[12; small 8; tiny 6]"):
        assert words in done.stdout
    options, given = train.parse_args(["--no-joint-attention", "--sigma=2", "--data=pennaction", "--out=x"])
    assert given == {"joint_attention": False, "sigma": 2.0} and options.preset == "paper"


def test_it_learns():
    """A gradient that does not reach what it should: eight clips have to be learnt by heart."""
    torch.manual_seed(0)
    source = data.synthetic(train=8, test=1)
    dataset = data.Dataset(source, "train", 4, 32, 32)
    batch = data.collate([dataset[i] for i in range(8)])
    model = D3T(Settings(classes=4, frames=4, height=32, width=32, channels=8, blocks=2, heads=4, kernel=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(batch["video"], batch["joints"], batch["visible"]), batch["label"])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.2


def test_pictures(fit, tmp_path, capsys):
    """A tool that draws another clip than it names, or meets a wrong clip or checkpoint with a traceback."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, for pictures")
    assert fit("--epochs 1 --blocks 2")[0] == 0
    best, out = tmp_path / "run" / "best.pt", tmp_path / "out"
    done = python("-m", "tools.explain", best, "--clips", 0, 7, "--out", out, cwd=HERE)
    assert done.returncode == 0 and "test 7: " in done.stdout, done.stderr
    assert explain.main([str(best), "--boxes", "2"]) == 0 and "joint attention, block 2" in capsys.readouterr().out
    names = [f"test-{i}{ending}" for i in (0, 7) for ending in ("-joints.png", "-overview.png", "-tokens.png", ".npz")]
    assert sorted(path.name for path in out.iterdir()) == ["curve.png", *names]
    clip = data.Dataset(data.synthetic(train=1, test=8), "test", 4, 16, 16)[7]
    with np.load(out / "test-7.npz") as arrays:
        assert arrays["label"] == clip["label"] and arrays["frames"].shape == (2, 4, 4)
        assert abs(arrays["probabilities"].sum() - 1) < 1e-5
        assert np.allclose(arrays["tokens"].sum((1, 2, 3)), arrays["selected"].sum((1, 2, 3)), atol=1e-5)
    state, lacking, log = checkpoint(best.parent, "best.pt"), tmp_path / "lacking.pt", tmp_path / "log" / "log.jsonl"
    log.parent.mkdir()
    shutil.copy(best, log.with_name("best.pt"))
    log.write_text('{"loss": 1}\n')
    del state["model"]["head.bias"]
    torch.save(state, lacking)
    torch.save(state | {"settings": state["settings"] | {"heads": 3}}, tmp_path / "heads.pt")
    for words, said in (
        ((best, "--clips", 11), "0 to 10"), ((tmp_path / "gone.pt",), "gone.pt"), ((best, "--boxes", 0), "--boxes 0"),
        ((lacking,), "head.bias"), ((tmp_path / "heads.pt",), "heads = 3"), ((log.with_name("best.pt"),), "log.jsonl"),
        ((best, "--out", best), "best.pt"),
        ((best, "--data", "pennaction", "--root", tmp_path), "Penn Action"),
    ):  # fmt: skip
        assert explain.main(["--out", str(out), *map(str, words)]) == 2, words
        errors = capsys.readouterr().err
        assert said in errors and len(errors.splitlines()) == 1


def test_shares_of_the_boxes():
    """Boxes of the wrong figure, frame or axis; half a token off."""
    torch.manual_seed(0)
    source = data.synthetic(train=1, test=3)
    model = D3T(Settings(**{**dataclasses.asdict(small(blocks=2)), "joints": 13, "classes": 4})).eval()
    torch.nn.init.normal_(model.blocks[0].deformable.search.offset.weight)
    clips = data.Dataset(source, "test", 5, 24, 34)
    shares = explain.box_shares(model, clips, 3)
    assert np.array_equal(shares["token attention, block 1"][::2], shares["token attention, block 1"][1::2, ::-1])
    for number, clip in enumerate(source.clips["test"]):
        figures = [dataclasses.replace(clip, joints=np.float32(figure)) for figure in clip.media[0]]
        item = clips.load(figures[1], None)  # the second figure acts
        said = model.explain(item["video"][None], item["joints"][None], item["visible"][None])
        expected = np.zeros((3, 2))
        for column, figure in enumerate(figures[::-1]):
            whole = dataclasses.replace(figure, visible=np.ones((16, 13), bool))
            low, high = (lambda j: (j.amin(1).numpy(), j.amax(1).numpy()))(clips.load(whole, None)["joints"])
            for t, h, w in np.ndindex(5, 3, 5):
                y, x = (8 * at - 4 + 8 * (np.arange(100) + 0.5) / 100 for at in (h, w))
                part = ((y >= low[t, 1]) & (y <= high[t, 1])).mean() * ((x >= low[t, 0]) & (x <= high[t, 0])).mean()
                expected[0, column] += said.tokens[0, 1, t, h, w] / said.tokens[0, 1].sum() * part
            points = said.points[0, 1].reshape(-1, 3).tolist()
            for t, h, w in points:
                at = round(t)
                inside = low[at, 0] <= 8 * w <= high[at, 0] and low[at, 1] <= 8 * h <= high[at, 1]
                expected[1, column] += inside / len(points)
            for t, r in np.argwhere(item["visible"].numpy()):
                x, y = item["joints"][t, r].tolist()
                inside = low[t, 0] <= x <= high[t, 0] and low[t, 1] <= y <= high[t, 1]
                expected[2, column] += inside * said.joints[0, 1, t, r] / said.joints[0, 1].sum()
        for name, values in zip(("token attention", "points", "joint attention"), expected):
            assert np.allclose(shares[f"{name}, block 2"][2 * number + 1], values, atol=0.01), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"modal_tokens": 1}, {"modal_tokens": 0, "pose_embedding": True}, {"deformable_attention": False},
     {"joint_attention": False}, {"temporal_attention": False}],
    ids=str,
)  # fmt: skip
def test_plain_version_of_the_benchmark(changes):
    """A baseline that computes something else: then being faster than it says nothing."""
    s, cpu = small(**changes), torch.device("cpu")
    batch = bench.make_batch(s, 2, cpu)
    ours, plain = (bench.Run(s, cpu, plain=plain) for plain in (False, True))
    expected = ours.forward(batch)
    assert expected.std() > 0.01 and torch.allclose(plain.forward(batch), expected, atol=1e-5)


def test_operations_of_the_benchmark():
    """Modules that are left out of the count, or counted twice: the share of the peak would be wrong."""
    s, cpu = small(), torch.device("cpu")
    run, batch = bench.Run(s, cpu), bench.make_batch(s, 1, cpu)
    counted, expected = bench.operations(run, batch), bench.equations(s)
    D = 4 * s.channels
    expected["token search"] = expected["deformable attention"] - counted["deformable attention"] / s.blocks
    for name in ("token search", "joint attention", "temporal attention"):
        assert counted[name] == s.blocks * expected[name], name
    assert counted["joint tokenizer"] == expected["joint tokenizer"]
    assert counted["head"] == 2 * 3 * D * s.classes
    # what no part has: the linear layers behind the joint tokenizer and of the M_CLS fusion
    assert counted["rest"] == 2 * s.frames * (s.joints * s.channels * D + s.blocks * 2 * D * D)


def test_sizes_of_the_benchmark(capsys):
    """A size of zero that is taken for the default."""
    for flag in ("--batch", "--matrix", "--rounds", "--clips"):
        with pytest.raises(SystemExit):
            bench.parse_args([flag, "0"])
        assert flag in capsys.readouterr().err.splitlines()[-1]
    options, several = bench.parse_args(["--device", "cpu"])
    assert (options.batch, options.matrix) == (1, 4096) and [s.joints for s in several] == [13, 50]


def test_loader_of_the_benchmark():
    """A benchmark whose clips the loader cannot read."""
    for package in ("scipy", "PIL"):
        pytest.importorskip(package, reason=f"needs {package}, for the clips")
    options = argparse.Namespace(clips=6, rounds=1, device=torch.device("cpu"))
    assert all(speed > 0 for speed in bench.jpeg_loader(small(), options, workers=1).values())


def test_ablation(penn, tmp_path, capsys):
    """Rows with other settings than they say; runs that are trained twice, or taken for those of other settings."""
    flags = ["--data", "pennaction", "--root", penn, *SMALL.split(), "--epochs", "1", "--frames", "4"]

    def run(what, *words):
        status = ablate.main([what, "--out", str(tmp_path), *map(str, words), *map(str, flags)])
        return status, *capsys.readouterr()

    command = ["table5", "--seeds", 0, "--jobs", 2]
    status, printed, errors = run(*command)
    assert status == 0, errors
    (folder,) = tmp_path.glob("pennaction-*")
    for name, tokens in (("as-it-is", 3), ("modal-tokens-1", 1), ("modal-tokens-0", 0)):
        assert checkpoint(folder / name / "seed-0")["settings"]["modal_tokens"] == tokens
    assert (folder / "table5.md").read_text().count("| 99.7 |") == 1
    path = folder / "as-it-is" / "seed-0" / "last.pt"
    before = path.read_bytes()
    again = run(*command)
    assert again[0] == 0 and again[1].splitlines()[-9:] == printed.splitlines()[-9:] and path.read_bytes() == before
    state = checkpoint(path.parent)
    state["recipe"]["lr"] = 1.0
    torch.save(state, path)
    for words, said in (
        (command, "lr is 1.0, not 0.0005"), (["table4", "--seed", 3], "--seeds"),
        (["table4", "--no-such"], "--no-such"), (["table4", "--jobs", 0], "--jobs"),
        (["table4", "--stop-after", 3], "--stop-after"), (["table4", "--sigma", 0], "sigma must"),
        (["table4", "--out", path], "last.pt"),
    ):  # fmt: skip
        status, _, errors = run(*words)
        assert status == 2 and said in errors and len(errors.splitlines()) == 1


def test_rows_of_the_ablations():
    """A row that the command line refuses, two rows that are the same model, a spread that is none."""
    for frames in (6, 8, 12):
        settings = Settings(frames=frames)
        for what in ablate.ABLATIONS:
            rows = ablate.rows_of(what, settings)
            for row in rows:
                given = train.parse_args([*row.flags.split(), "--out", "none"])[1]
                assert dataclasses.replace(settings, **given) == settings or row.flags
            assert sum(not row.flags for row in rows) == 1 and len({row.flags for row in rows}) == len(rows)
    names = [row.name for row in ablate.rows_of("fig7a", Settings(frames=6))]
    assert "window 4, stride 4" not in names and "window 6, stride 3" not in names  # same windows as 4, 2 and 6, 1
    rows = [ablate.Row("a", "--x"), ablate.Row("b", "--y"), ablate.Row("c", "")]
    lines = ablate.table(rows, [[1.0, 2.0], [4.0, 6.0], [1.5, 3.0]]).splitlines()
    assert "| 1.50 ± 0.71 | 1.00 .. 2.00 | -0.75 | no |" in lines[2] and "| +2.75 | yes |" in lines[3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_cuda(fit, tmp_path, amp):
    """A tensor left on the CPU, a scaler that is not saved."""
    assert fit(f"--device cuda --amp {amp} --stop-after 3")[0] == 0
    assert fit(f"--device cuda --amp {amp} --resume --accumulate 2 --checkpointing")[0] == 0
    assert fit(f"--eval {tmp_path}/run/best.pt")[0] == 0
