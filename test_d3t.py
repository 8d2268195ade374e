"""The proof of D3T. Each docstring of a test names the bug that it catches.

The first part holds slow loops in float64, written from the sentences of the paper, not from
`d3t.py`. They take numpy arrays, name every token, and share no code with the model.
"""

import argparse
import doctest
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import d3t
import data
import train
from d3t import D3T, Ablation, Settings, Trunk, build

torch.set_num_threads(1)  # the same sums in all processes
HERE = Path(train.__file__).parent
README = (HERE / "README.md").read_text()


# ---- The oracle ----
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
    """P_t = ||_r sum_j sum_i F_a,t(i, j) H_t,r(i, j), H a Gaussian around (x_t,r, y_t,r)."""
    B, C, T, h, w = F_a.shape
    P = np.zeros((B, T, joints.shape[2], C))
    for b, t, r in np.ndindex(P.shape[:3]):
        if not visible[b, t, r]:
            continue
        x, y = (
            joints[b, t, r] / 2
        )  # cell i of the map is centred on pixel 2i, as a test below shows
        for j, i in np.ndindex(h, w):
            P[b, t, r] += F_a[b, :, t, j, i] * math.exp(
                -((i - x) ** 2 + (j - y) ** 2) / (2 * sigma**2)
            )
    return P


def loop_search(Z, w, k):
    """3DTS of Z (T, h, w, D): two convolutions move regular points, where Z is read."""
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
    """Trilinear: every token within one step, weighted by how near it is along each axis."""
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
    """Z (T, N, D), modal tokens (T, D) ask; the selected tokens and the modal ones answer."""
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
    """P (T, R, D): joints of a window, in all frames, and the modal tokens attend to each other."""
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
    """Fig. 2a: 3D deformable attention, joint stride attention, one CLS, temporal attention."""
    of_3d, of_joint, of_time = (part(w, f"{name}.") for name in ("deformable", "joint", "temporal"))
    Z, m_rgb, cls_3d = loop_deformable(Z, m_rgb, m_cls, of_3d, s.heads, s.grid, s.kernel)
    window = s.heads, s.joint_window, s.joint_stride
    P, cls_joint, m_pose = loop_joint_stride(P, cls_3d, m_pose, of_joint, *window)
    pairs = [np.concatenate(pair) for pair in zip(cls_3d, cls_joint)]
    m_cls = np.array([w["fuse.weight"] @ pair + w["fuse.bias"] for pair in pairs])
    N, R = Z.shape[1], P.shape[1]
    X = np.concatenate([Z, P, m_rgb[:, None], m_cls[:, None], m_pose[:, None]], axis=1)
    X = loop_temporal_stride(X, of_time, s.heads, s.temporal_window, s.temporal_stride)
    return X[:, :N], X[:, N : N + R], X[:, -3], X[:, -2], X[:, -1]


# ---- The model against the oracle ----
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


def small(**changes) -> Ablation:
    """Settings of a small model; no two of its lengths are equal."""
    base = dict(classes=6, joints=7, frames=5, height=24, width=34, channels=2, blocks=2, heads=2)
    base |= dict(kernel=3, joint_window=4, joint_stride=2, temporal_window=3, temporal_stride=2)
    return Ablation(**(base | changes))


def clip_for(s: Settings, B=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    shape = B, 3, s.frames, s.height, s.width
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    joints = torch.rand(B, s.frames, s.joints, 2, generator=g) * torch.tensor([s.width, s.height])
    return video, joints, torch.rand(B, s.frames, s.joints, generator=g) < 0.8


def normalised(video, joints, visible):
    """The same in float64, with mean and deviation of Kinetics-400."""
    mean = torch.tensor([0.432, 0.395, 0.376]).view(3, 1, 1, 1) * 255
    std = torch.tensor([0.228, 0.221, 0.217]).view(3, 1, 1, 1) * 255
    return (video - mean.double()) / std.double(), joints.double(), visible


GRIDS = [((3, 5, 4), 3), ((6, 3, 7), 3), ((4, 7, 2), 5)]  # T, h, w; k


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3])
@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (3, 2, 4, 9, 6), (2, 5, 1, 7, 11)])
def test_joint_tokenizer_is_eq_1_and_2(shape, sigma):
    """Catches: x and y swapped, a normalised Gaussian."""
    B, C, T, h, w = shape
    F_a, joints = randn(*shape), randn(B, T, 6, 2).abs() * torch.tensor([w, h])
    visible = torch.arange(B * T * 6).view(B, T, 6) % 4 > 0
    expected = loop_joint_tokens(F_a.numpy(), joints.numpy(), visible.numpy(), sigma)
    close(d3t.joint_tokens(F_a, joints, visible, sigma), expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_token_search_is_eq_3(grid, k):
    """Catches: a wrong reference point or range of the offset, axes exchanged."""
    search = randomize(d3t.TokenSearch(6, grid, k), 0.5)
    Z = randn(2, *grid, 6)
    points, out = search.points(Z), search(Z)
    for b in range(2):
        expected, expected_points = loop_search(Z[b].numpy(), weights(search), k)
        close(points[b], expected_points)
        close(out[b], expected)


@pytest.mark.parametrize("grid, k", GRIDS)
def test_deformable_attention_is_eq_4_to_7(grid, k):
    """Catches: modal tokens of the wrong frame, selected tokens as queries."""
    T, h, w = grid
    module = randomize(d3t.DeformableAttention(8, 2, grid, k))
    Z, M_rgb, M_cls = randn(2, T, h * w, 8), randn(2, T, 1, 8) * 2, -randn(2, T, 1, 8)
    found = module(Z, M_rgb, M_cls)
    for b in range(2):
        clip = Z[b].numpy(), M_rgb[b, :, 0].numpy(), M_cls[b, :, 0].numpy()
        z, m_rgb, m_cls = loop_deformable(*clip, weights(module), 2, grid, k)
        for a, expected in zip(found, (z, m_rgb[:, None], m_cls[:, None])):
            close(a[b], expected)


@pytest.mark.parametrize("T, R, window, stride", [(2, 7, 3, 2), (3, 5, 5, 1), (1, 8, 3, 3)])
def test_joint_stride_attention_is_fig_4a(T, R, window, stride):
    """Catches: copies summed instead of averaged, modal tokens of one window only."""
    module = randomize(d3t.JointStrideAttention(8, 2, window, stride))
    P, M_cls, M_pose = randn(2, T, R, 8), randn(2, T, 1, 8) * 2, -randn(2, T, 1, 8)
    found = module(P, M_cls, M_pose)
    for b in range(2):
        clip = P[b].numpy(), M_cls[b, :, 0].numpy(), M_pose[b, :, 0].numpy()
        p, m_cls, m_pose = loop_joint_stride(*clip, weights(module), 2, window, stride)
        for a, expected in zip(found, (p, m_cls[:, None], m_pose[:, None])):
            close(a[b], expected)


@pytest.mark.parametrize("asked", [None, 1, 2])
@pytest.mark.parametrize("T, N, window, stride", [(7, 3, 3, 2), (5, 4, 5, 5), (6, 2, 4, 1)])
def test_temporal_stride_attention_is_fig_4b(T, N, window, stride, asked):
    """Catches: a window that attends to another, the wrong queries."""
    module, X = randomize(d3t.TemporalStrideAttention(8, 2, window, stride)), randn(2, T, N, 8)
    clips = [loop_temporal_stride(x.numpy(), weights(module), 2, window, stride) for x in X]
    close(module(X, asked or N), np.array(clips)[:, :, -(asked or N) :])


def loop_tokens(model, F_a, F_b, joints, visible):
    """Z, P and the modal tokens of one clip, as they enter the first block."""
    w, s = weights(model), model.settings
    Z = F_b.numpy().transpose(1, 2, 3, 0).reshape(s.frames, -1, 4 * s.channels)
    Z = Z + w["position_t"] + w["position_s"]
    Z = np.array([[layer_norm(z, w, "norm_rgb") for z in frame] for frame in Z])
    (P,) = loop_joint_tokens(F_a.numpy()[None], joints.numpy(), visible.numpy(), s.sigma)
    P = P @ w["embed_pose.weight"].T
    P = np.array([[layer_norm(p, w, "norm_pose") for p in frame] for frame in P])
    return Z, P, *w["modal"].transpose(1, 0, 2)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(frames=4, width=20, heads=4), dict(height=9, blocks=1, temporal_window=5, sigma=2.0)],
    ids=["two blocks", "four heads", "one block"],
)
def test_model_is_fig_2a(changes):
    """Catches: modal tokens sent to the wrong attention, bytes normalised in another way."""
    s = small(**changes)
    model, clip = randomize(D3T(s)), normalised(*clip_for(s))
    logits, w = model(clip_for(s)[0], *clip[1:]), weights(model)  # of a video in bytes
    for b in range(2):
        video, joints, visible = (each[b : b + 1] for each in clip)
        F_a, F_b = (each[0].detach() for each in model.trunk(video))
        tokens = loop_tokens(model, F_a, F_b, joints, visible)
        for i in range(s.blocks):
            tokens = loop_block(*tokens, part(w, f"blocks.{i}."), s)
        mean = np.concatenate([token.mean(0) for token in tokens[2:]])
        close(logits[b], w["head.weight"] @ mean + w["head.bias"])


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_last_block_asks_with_the_modal_tokens_alone(modal):
    """Catches: logits that the fewer queries change, a last block that asks with all tokens."""
    s, asked = small(modal_tokens=modal), []
    model, clip = randomize(build(s)), normalised(*clip_for(s))
    for block in model.blocks:
        attention = block.temporal.attention
        attention.register_forward_pre_hook(lambda _, X: asked.append(X[0].shape[1]))
    logits = model(*clip)
    every = s.temporal_window * (math.prod(s.grid[1:]) + s.joints + modal)
    assert asked == [every] * 2 + [s.temporal_window * modal or every] * 2  # in two windows
    model.blocks[-1].last = False
    close(model(*clip), logits, 1e-12)


def test_head_without_modal_tokens():
    """Catches: "No tokens" of Table 5 by another rule than both mean tokens side by side."""
    model, tokens = randomize(build(small(modal_tokens=0))), []
    model.blocks[-1].register_forward_hook(lambda block, inputs, out: tokens.extend(out))
    logits = model(*normalised(*clip_for(model.settings)))
    close(logits, model.head(torch.cat([x.mean((1, 2)) for x in tokens[:2]], dim=1)))


# ---- What the oracle does not show ----
@pytest.mark.parametrize("push", [-1, 0, 1])
@pytest.mark.parametrize("grid, k", [((5, 9, 7), 3), ((7, 8, 9), 7), ((1, 5, 8), 3)])
def test_search_without_weights_returns_an_exact_crop(grid, k, push):
    """Catches: positions scaled by n - 1, a point outside the volume."""
    search = d3t.TokenSearch(4, grid, k).double()  # untrained, it does not move a point
    torch.nn.init.constant_(search.offset.weight, 0.0)
    torch.nn.init.constant_(search.offset.bias, 1e9 * push)
    Z = randn(2, *grid, 4)
    starts = [(min(k, n) - 1) * (1 + push) // 2 for n in grid]
    t, y, x = (slice(start, start + n - min(k, n) + 1) for start, n in zip(starts, grid))
    close(search(Z), Z[:, t, y, x], 1e-14)


def test_joints_lie_on_the_cells_that_see_them():
    """Catches: joints on F_a by another rule than the trunk's, half a pixel off at stride 2."""
    trunk = d3t.Trunk(4).double().eval()
    for p in trunk.parameters():  # with equal weights, a cell's gradient is its receptive field
        torch.nn.init.constant_(p, 0.01 if p.ndim > 1 else 1.0)
    video = torch.ones(1, 3, 1, 52, 60, dtype=torch.float64, requires_grad=True)
    trunk.layer1(trunk.stem(video))[0, :, 0, 10, 13].sum().backward()
    field = video.grad.sum((0, 1, 2)) / video.grad.sum()
    x = field.sum(0) @ torch.arange(60.0).double()
    y = field.sum(1) @ torch.arange(52.0).double()
    here = torch.ones(1, 1, 1, dtype=torch.bool)
    heatmap = d3t.joint_heatmaps(torch.stack([x, y])[None, None, None], here, (26, 30), 1.0)
    assert heatmap.argmax() == 10 * 30 + 13 and abs(heatmap.max() - 1) < 1e-9


CASES = {  # a function, and the shapes of its inputs
    "tokenizer": (
        lambda F_a: d3t.joint_tokens(F_a, randn(1, 2, 3, 2), torch.ones(1, 2, 3) > 0, 1.0),
        [(1, 2, 2, 3, 4)],
    ),
    # Z moves the points, too. They lie between the tokens, where interpolation has no kink.
    "search": (randomize(d3t.TokenSearch(3, (3, 4, 5), 3), 0.5), [(1, 3, 4, 5, 3)]),
    "deformable": (
        randomize(d3t.DeformableAttention(4, 2, (2, 3, 4), 2)),
        [(1, 2, 12, 4), (1, 2, 1, 4), (1, 2, 1, 4)],
    ),
    "joint": (
        randomize(d3t.JointStrideAttention(4, 2, 3, 2)),
        [(2, 2, 5, 4), (2, 2, 1, 4), (2, 2, 1, 4)],
    ),
    "temporal": (
        lambda X: randomize(d3t.TemporalStrideAttention(4, 2, 3, 2))(X, 3),
        [(2, 5, 3, 4)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    """Catches: points without a gradient, a gradient lost on the way through windows and means."""
    function, shapes = CASES[name]
    inputs = [randn(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


KINDS = ("deformable", "joint", "temporal")
TABLE_4 = [(False, True, True), (True, False, False), (True, False, True), (True, True, False)]
TABLE_4 += [(True, True, True)]
ROWS = [dict(zip([f"{kind}_attention" for kind in KINDS], on)) for on in TABLE_4]


@pytest.mark.parametrize("row", ROWS[:-1])
def test_disabled_attention_is_skipped(row):
    """Catches: a row of Table 4 that is not the full model with an attention that adds nothing."""
    full, ablated = randomize(D3T(small())), build(small(**row)).double().eval()
    for block in full.blocks:
        for kind in KINDS:
            if not row[f"{kind}_attention"]:
                attention = getattr(block, kind).attention
                for p in (*attention.Wo.parameters(), *attention.ffn[2].parameters()):
                    p.data.zero_()
        if not (row["deformable_attention"] and row["joint_attention"]):
            block.fuse.bias.data.zero_()
            block.fuse.weight.data = torch.eye(16).double()[8:]  # the second M'_CLS, as it is
    assert not ablated.load_state_dict(full.state_dict(), strict=False).missing_keys
    clip = normalised(*clip_for(full.settings))
    close(ablated(*clip), full(*clip))


@pytest.mark.parametrize("modal", [3, 1, 0])
@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_learns_in_every_ablation(row, modal):
    """Catches: a parameter without effect in a row of Table 4 or 5."""
    s = small(channels=8, modal_tokens=modal, **row)
    torch.manual_seed(0)
    model = build(s).double()
    for module in model.modules():
        if isinstance(module, d3t.TokenSearch):  # at zero the offsets would pass no gradient on
            torch.nn.init.normal_(module.offset.weight)
    F.cross_entropy(model(*clip_for(s)), torch.tensor([1, 4])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-13, name  # rounding leaves 1e-18 where there is no gradient


@pytest.mark.parametrize("row", [*ROWS, {"modal_tokens": 1}, {"modal_tokens": 0}])
def test_meta_device(row):
    """Catches: a tensor that is made on the CPU, which CUDA would refuse."""
    with torch.device("meta"):
        model = build(small(blocks=1, **row))
    logits = model(*(each.to("meta") for each in clip_for(model.settings)))
    logits.sum().backward()
    assert {each.device.type for each in (logits, *model.buffers())} == {"meta"}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value, seen", [(7.3, False), (math.nan, False), (math.nan, True)])
def test_absent_joints_have_no_effect(value, seen, axis):
    """Catches: coordinates of an absent joint in its token, NaN in the logits or a gradient."""
    s, here = small(), (0, 1, 2)
    model = D3T(s).eval()
    video, joints, visible = clip_for(s)
    visible[here] = False
    absent = model(video, joints, visible)
    visible[here], joints[(*here, axis)] = seen, value
    logits = model(video, joints, visible)
    assert torch.equal(logits, absent)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_positions_in_float32(dtype):
    """Catches: heat maps or points in 16 bits, where a position has three digits."""
    F_a, joints = randn(2, 8, 3, 40, 44).to(dtype), randn(2, 3, 7, 2).float().abs() * 30
    visible, search = torch.ones(2, 3, 7, dtype=torch.bool), d3t.TokenSearch(8, (6, 9, 7), 3)
    torch.nn.init.normal_(search.offset.weight)
    expected = d3t.joint_tokens(F_a.double(), joints.double(), visible, 1.0)
    with torch.autocast("cpu", dtype):
        close(d3t.joint_tokens(F_a, joints, visible, 1.0).double(), expected, 1e-5)
        points = search.points(randn(2, 6, 9, 7, 8).float())
    assert points.dtype == torch.float32
    assert (points - search.reference).unique().numel() > 500  # of 840, not rounded on the way


def test_trunk_has_torchvisions_widths():
    """Catches: another width than that of r2plus1d_18, whose weights then do not load."""
    kernels = [p.shape for p in d3t.Trunk(64).parameters() if p.ndim == 5]
    space = [k[0] for k in kernels if k[2] == 1 and k[3] > 1]
    assert space == [45] + [144] * 4 + [230] * 2 + [288] * 2 + [460] * 2 + [576] * 2
    assert [k[0] for k in kernels if k[2] == 3] == [64] * 5 + [128] * 4 + [256] * 4


@pytest.mark.parametrize("dilated", [False, True])
def test_trunk_computes_r2plus1d(dilated):
    """Catches: a norm or shortcut too few; with dilations, features that torchvision has not."""
    trunk = randomize(d3t.Trunk(4, dilated))
    for name, statistics in trunk.named_buffers():
        if "running" in name:
            statistics.uniform_(0.5, 2)
    w, video = trunk.state_dict(), randn(1, 3, 16, 17, 22)

    def conv(x, name, space=1, time=1):
        taps, _, side = w[f"{name}.weight"].shape[2:]
        padding = taps // 2, side // 2, side // 2
        return F.conv3d(x, w[f"{name}.weight"], None, (time, space, space), padding)

    def norm(x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{of}"] for of in names))

    def factored(x, name, space=1, time=1):
        return conv(norm(conv(x, f"{name}.0", space), f"{name}.1").relu(), f"{name}.3", 1, time)

    x, maps = norm(factored(video, "stem", 2), "stem.4").relu(), []
    for layer, block in itertools.product((1, 2, 3), (0, 1)):
        name, space = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
        strides = space, space if dilated else 1  # of torchvision, also in time
        inside = norm(factored(x, f"{name}.conv1.0", *strides), f"{name}.conv1.1").relu()
        inside = norm(factored(inside, f"{name}.conv2.0"), f"{name}.conv2.1")
        if space == 2:
            x = norm(conv(x, f"{name}.downsample.0", *strides), f"{name}.downsample.1")
        x = (inside + x).relu()
        maps.append(x)
    F_a, F_b = trunk(video)
    close(F_a, maps[1])
    close(F_b[:, :, :: 4 if dilated else 1], maps[-1])


def initial_std(name, p):
    """The standard deviation that a parameter starts with; None for one that is constant."""
    if name.startswith(("position", "modal")):
        return 0.02
    if p.ndim == 5 and "search" in name:
        return 27**-0.5
    if p.ndim == 5:
        return (2 / (p.shape[0] * p[0, 0].numel())) ** 0.5
    if p.ndim == 2 and "offset" not in name:
        added = name.endswith(("Wo.weight", "ffn.2.weight"))  # by six attentions, twice each
        return (2 / sum(p.shape)) ** 0.5 / (12**0.5 if added else 1)
    return None


def test_initial_scales():
    """Catches: weights of another initial scale."""
    model = D3T(Settings(channels=16, blocks=2, frames=4, height=40, width=40, kernel=3))
    for name, p in model.named_parameters():
        std = initial_std(name, p)
        if std is None:
            norm = p.ndim == 1 and name.endswith("weight")
            assert (p == float(norm)).all(), name  # else a bias, or the search
        else:
            assert abs(p.std() / std - 1) < 4 / p.numel() ** 0.5, name
            assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name


REFUSED = [
    (dict(joint_window=8), "joint_stride <= joint_window <= joints"),
    (dict(temporal_window=6), "temporal_stride <= temporal_window <= frames"),
    (dict(heads=3), "D = 4C = 8 does not divide by heads = 3"),
    (dict(modal_tokens=2), "modal_tokens = 2"),
    (dict(kernel=1), "kernel = 1"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_settings_that_cannot_be(changes, said):
    """Catches: an error deep inside the model instead of one that names the fields."""
    with pytest.raises(AssertionError, match=said):
        small(**changes)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("video", lambda x: x[:, :, :4], ["(2, 3, 4, 24, 34)", "(2, 3, 5, 24, 34)"]),
        ("joints", lambda x: x[:, :, :1], ["(2, 5, 1, 2)", "(2, 5, 7, 2)"]),
        ("visible", lambda x: x[:1], ["(1, 5, 7)", "(2, 5, 7)"]),
        ("visible", lambda x: 2 * x.to(torch.uint8), ["bool", "uint8"]),  # 2 is visible in COCO
    ],
)
def test_inputs_that_do_not_fit(name, change, said):
    """Catches: a clip of another T or number of joints that passes by broadcasting."""
    clip = dict(zip(("video", "joints", "visible"), clip_for(small())))
    with pytest.raises(AssertionError, match=name) as error:
        D3T(small())(**clip | {name: change(clip[name])})
    assert all(word in str(error.value) for word in said)


# ---- Data ----
def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("video", "joints", "visible"))


class Numbered(data.Source):
    """Its pixels say where they are from: column, row and number of the frame."""

    def read(self, clip, frames, size, crop):
        if clip.media:
            raise data.BadClip(clip.media)
        frame, row, column = np.meshgrid(frames, *map(np.arange, size), indexing="ij")
        pixels = np.stack([column, row, frame], -1)[:, crop[0], crop[1]]
        return data.Frames(pixels.astype(np.uint8))


def numbered(split: str, size=(60, 90), n=50, media="") -> Numbered:
    """20 times a clip with joints at random places, a third of them unknown in each frame."""
    source = Numbered(["a"], data.PENN_JOINTS, data.PENN_PAIRS)
    places = np.random.default_rng(0).uniform(0, size[::-1], (n, 13, 2)).astype(np.float32)
    known = (np.arange(n)[:, None] + np.arange(13)) % 3 > 0
    source.clips[split] = [data.Clip("clip", 0, places, known, size, media)] * 20
    return source


@pytest.mark.parametrize("size, crop, n", [((60, 90), (32, 32), 50), ((90, 60), (24, 56), 2)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_joints_stay_on_their_pixels(split, size, crop, n):
    """Catches: joints scaled, cropped or mirrored in another way than pixels."""
    source, names = numbered(split, size, n), [name.split() for name in data.PENN_JOINTS]
    clip, swap = source.clips[split][0], {"left": "right", "right": "left"}
    partner = [names.index([swap.get(word, word) for word in name]) for name in names]
    h, w = (round(side * 8 / 7 * max(crop[0] / size[0], crop[1] / size[1])) for side in size)
    for item in data.Dataset(source, split, 5, *crop):
        column, row, frame = item["video"][:, :, 0].int().numpy()  # (T, W) each, of the first row
        step, frame = column[0, 1] - column[0, 0], frame[:, :1]
        of = partner if step < 0 else range(13)
        whole = (clip.joints[frame, of] + 0.5) * [w / size[1], h / size[0]] - 0.5
        joints = (whole - np.stack([column[:, :1], row[:, :1]], -1)) * [step, 1]
        assert abs(item["joints"].numpy() - joints).max() < 1e-3
        inside = (joints >= -0.5) & (joints < [crop[1] - 0.5, crop[0] - 0.5])
        assert np.array_equal(item["visible"], inside.all(-1) & clip.visible[frame, of])


def draws(split: str, epochs: int) -> list[tuple]:
    """Direction, top, left and the five frames of items of 32 x 32 pixels."""
    drawn, dataset = [], data.Dataset(numbered(split), split, 5, 32, 32)
    for key in itertools.product(range(epochs), range(20)):
        column, row, frame = dataset[key]["video"][:, :, 0].int().numpy()
        drawn.append((column[0, 1] - column[0, 0], row[0, 0], column.min(), *frame[:, 0]))
    return drawn


def test_training_draws_evenly():
    """Catches: a crop, a mirror or a frame of a segment that is never drawn, or too often."""
    steps, tops, lefts, *frames = zip(*draws("train", 20))
    h, w = 37, 55  # 60 x 90 scaled so that 32 is 7/8 of the shorter side
    assert {*tops} == {*range(h - 31)} and {*lefts} == {*range(w - 31)}
    assert 160 < steps.count(-1) < 240
    assert [{*each} for each in frames] == [{*range(10 * t, 10 * t + 10)} for t in range(5)]
    assert len({*zip(*frames)}) > 300  # of 400: each frame is drawn for itself


def test_testing_takes_the_middle():
    """Catches: an evaluation that is random, or off the middle."""
    assert {*draws("test", 2)} == {(1, 2, 11, 5, 15, 25, 35, 45)}


def test_items_depend_on_seed_epoch_and_index_alone():
    """Catches: augmentation that depends on other items, or changes the global generator."""
    make = functools.partial(data.Dataset, data.Synthetic(train=6, test=0), "train", 4, 24, 32)
    first, again = {key: make()[key] for key in itertools.product((0, 1), range(6))}, make()
    state = np.random.get_state()[1].copy()
    assert all(same(first[key], again[key]) for key in reversed(first))
    assert same(first[0, 2], again[2]) and (np.random.get_state()[1] == state).all()
    assert not same(first[0, 1], first[1, 1]) and not same(first[0, 1], make(seed=1)[0, 1])


def options(*words):
    parser = argparse.ArgumentParser()
    data.add_flags(parser)
    return parser.parse_args([*map(str, words)])


def test_the_example_of_a_source(tmp_path, monkeypatch):
    """Catches: a docstring whose example does not run, or is not reached by `--data`."""
    pytest.importorskip("av", reason="needs av, the decoder of videos")
    example = types.ModuleType("sources.two_hands")
    example.SOURCES = data.SOURCES.copy()
    monkeypatch.setitem(sys.modules, example.__name__, example)
    monkeypatch.setattr(data, "SOURCES", example.SOURCES)
    exec(textwrap.dedent(data.__doc__[data.__doc__.index("    import numpy") :]), vars(example))
    for name in ("clap/10", "wave/11", "wave/12"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.mp4").touch()
        np.save(tmp_path / f"{name}.npy", np.full((6, 2, 2), [[320.0, 180], [np.nan, 5]]))
    clips = data.load(options("--data", "two_hands", "--root", tmp_path)).clips
    assert [[clip.label for clip in clips[split]] for split in clips] == [[1, 1], [0]]
    assert clips["test"][0].visible.tolist() == [[True, False]] * 6


@pytest.mark.parametrize(
    "words, said",
    [
        ("--data pennaction --root nowhere", "--root: there is no folder nowhere"),
        ("--data pennaction --split-val x", "--split-val is not for --data pennaction"),
    ],
)
def test_flags_that_cannot_be_used(words, said):
    """Catches: a flag that is ignored."""
    with pytest.raises(data.UsageError, match=said):
        data.load(options(*words.split()))


def write_penn_clip(root, i, **changes):
    """Clip i + 1 as in Penn Action; dots of three colours at its first joints."""
    savemat = pytest.importorskip("scipy.io", reason="needs scipy, for Penn's labels").savemat
    image = pytest.importorskip("PIL.Image", reason="needs pillow, for Penn's frames")
    rng, kind = np.random.default_rng(i), np.uint8 if i % 2 else np.float64  # it has both
    x, y = (rng.integers(1, side + 1, (8, 13)) for side in (44, 30))
    label = dict(action=data.PENN_ACTIONS[i % 15], train=1 if i % 2 else -1, x=x.astype(kind))
    label |= dict(y=y.astype(kind), visibility=x > 0, dimensions=np.uint16([30, 44, 8]))
    folder = root / "frames" / f"{i + 1:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    savemat(root / "labels" / f"{i + 1:04d}.mat", label | changes)
    for t in range(8):
        frame = np.zeros((30, 44, 3), np.uint8)
        frame[y[t, :3] - 1, x[t, :3] - 1, [0, 1, 2]] = 255  # in MATLAB's one-based pixels
        image.fromarray(frame).save(folder / f"{t + 1:06d}.jpg", quality=95, subsampling=0)


@pytest.fixture
def penn(tmp_path):
    """A small Penn Action root: 16 clips of 8 frames."""
    for i in range(16):
        write_penn_clip(tmp_path, i)
    return tmp_path


def test_penn_action_lists_its_clips(penn):
    """Catches: a clip in the other split, or with the label of another class."""
    (penn / "labels" / "._0001.mat").write_bytes(b"left there by macOS")
    source = data.load(options("--data", "pennaction", "--root", penn))
    found = [[(int(clip.name), clip.label) for clip in clips] for clips in source.clips.values()]
    clips = [(i + 1, i % 15) for i in range(16)]
    assert found == [clips[1::2], clips[::2]] and not source.problems


def test_penn_action_joints_lie_on_their_pixels(penn):
    """Catches: joints that count from 1; sides, colours or frames exchanged."""
    source = data.PennAction([penn])
    for clip in source.clips["test"] + source.clips["train"]:
        whole = slice(0, 30), slice(0, 44)
        video = source.read(clip, np.arange(8), (30, 44), whole).video
        for t, c in np.ndindex(8, 3):
            brightest = np.unravel_index(video[t, ..., c].argmax(), clip.size)
            assert brightest == tuple(clip.joints[t, c, ::-1]) and clip.joints.dtype == np.float32


def test_penn_action_joints_without_a_position(tmp_path):
    """Catches: the place of absent joints taken for a position; occluded joints left out."""
    absent = [(1, 1, 0), (1.52, 1.52, 0), (0, 0, 0), (np.nan, 20, 1), (20, np.inf, 1)]
    known = [(9, 9, 0), (1, 1.5, 0), (5, 7, 0), (1, 1, 1), *[(20, 23, 1)] * 4]
    x, y, visible = np.transpose(absent + known)[:, None]
    write_penn_clip(tmp_path, 0, x=x, y=y, visibility=visible)
    (clip,) = data.PennAction([tmp_path]).clips["test"]
    assert clip.visible.tolist() == [[False] * 5 + [True] * 8]


def test_penn_action_labels_that_are_damaged(penn):
    """Catches: a damaged label that hides the others, or is not named."""
    write_penn_clip(penn, 1, action="juggling")
    _, action, cut, empty, *_ = sorted((penn / "labels").iterdir())
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    source = data.PennAction([penn])
    named = [problem.split(": ")[0] for problem in source.problems]
    assert named == [str(action), str(cut), str(empty)]
    assert [len(clips) for clips in source.clips.values()] == [6, 7]


@pytest.mark.parametrize("part", [2.3, 4.1, 8.2])
def test_penn_action_frames_are_scaled_and_cropped(tmp_path, part):
    """Catches: a crop of another place; a decoder that rounds up the sides."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow, for Penn's frames")
    row, column = np.mgrid[:270, :481]
    ramps = np.stack([row, column, column], -1) / 2
    image.fromarray(ramps.astype(np.uint8)).save(tmp_path / "1.jpg", quality=100, subsampling=0)
    h, w = round(270 / part), round(481 / part)
    y, x = np.arange(h)[h // 3 : -1], np.arange(w)[w // 4 : -1]
    crop = slice(h // 3, h - 1), slice(w // 4, w - 1)
    picture = data.read_jpeg(tmp_path / "1.jpg", (h, w), crop)
    assert abs(picture[..., 0].mean(1) - ((y + 0.5) * 270 / h - 1) / 2).max() < 1
    assert abs(picture[..., 1].mean(0) - ((x + 0.5) * 481 / w - 1) / 2).max() < 1


@pytest.mark.parametrize("said", ["truncated", "cannot identify", "No such file"])
def test_frames_that_are_damaged(penn, said):
    """Catches: what is left of a picture taken for it; a bad clip that ends training."""
    path = penn / "frames" / "0002" / "000005.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    if said == "cannot identify":
        pytest.importorskip("PIL.Image").new("RGB", (44, 30)).save(path, "PNG")
    if said == "No such file":
        path.unlink()
    training = data.Dataset(data.PennAction([penn]), "train", 8, 24, 24)
    item, other = training[0, 0], training[0, 1]
    ((name, why),) = item["bad"]
    assert name == "0002" and why.startswith(f"{path}: ") and said in why
    assert item["name"] == other["name"] == "0004" and not other["bad"]


def test_batches():
    """Catches: lists of bad clips that are lost; a layout in memory that convolutions copy."""
    items = [data.Dataset(data.Synthetic(2, 0), "train", 4, 24, 32)[i] for i in range(2)]
    items[1]["bad"] = [("a", "b")]
    batch = data.collate(items)
    assert batch["bad"] == [("a", "b")] and batch["name"] == ["train 0", "train 1"]
    assert torch.equal(batch["video"], torch.stack([item["video"] for item in items]))
    assert batch["video"].is_contiguous(memory_format=torch.channels_last_3d)


def test_match_takes_the_longer_lists():
    """Catches: persons that only the checkpoint has which are not absent; its lists not taken."""
    names = [*data.PENN_JOINTS, *(f"{name} 2" for name in data.PENN_JOINTS)]
    source = data.match(numbered("test"), ["a", "b"], names)
    visible = data.Dataset(source, "test", 4, 24, 24)[0]["visible"]
    assert (source.classes, source.joint_names) == (["a", "b"], names)
    assert visible[:, :13].any() and not visible[:, 13:].any()


@pytest.mark.parametrize(
    "classes, names, said",
    [
        (["b", "a"], data.PENN_JOINTS, r"classes 0: here 'a', in the checkpoint \['b'\]"),
        (["a"], data.PENN_JOINTS[:-1], r"joint_names 12: here 'right ankle', .* \[\]"),
        (["a"], data.PENN_JOINTS[::-1], r"joint_names 0: here 'head', .* \['right ankle'\]"),
    ],
)
def test_match_names_what_differs(classes, names, said):
    """Catches: labels or joints by number where a checkpoint has others."""
    with pytest.raises(data.UsageError, match=said):
        data.match(numbered("test"), classes, names)


# ---- Training ----
SMALL = "--channels 4 --height 16 --width 16 --frames 4 --heads 2 --blocks 1"
SMALL += " --batch 8 --epochs 2 --warmup 0.5 --workers 0"  # 5 steps an epoch


def few_clips():
    return data.synthetic(train=43, test=11)


@pytest.fixture
def swap(monkeypatch):
    return monkeypatch.setattr


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """`fit(flags)` trains on `fit.source`, on the CPU: exit status, what was printed."""

    def run(flags=""):
        capsys.readouterr()
        try:
            status = train.main([*SMALL.split(), "--out", "run", *flags.split()])
        except SystemExit as end:
            status = end.code
        return status, "".join(capsys.readouterr())

    run.source = few_clips()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: run.source, []))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(train, "forward", train.forward)
    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def whole(fit, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    assert folder.exists() or fit(f"--out {folder}")[0] == 0
    return folder


def checkpoint(folder="run", name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def log_of(folder="run"):
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [line | {"seconds": 0, "clips_per_second": 0} for line in lines]


def tensors(folder, name):
    """Those of model and optimizer."""
    state = checkpoint(folder, name)
    moments = [each.values() for each in state["optimizer"]["state"].values()]
    return itertools.chain(state["model"].values(), *moments)


def same_run(whole):
    """The run ended with the weights, state of AdamW and log of `whole`."""
    for name in ("last.pt", "best.pt"):
        assert all(map(torch.equal, tensors("run", name), tensors(whole, name)))
    assert log_of() == log_of(whole)


def in_forward(number, change):
    """The forward of this number will return `change(logits)`."""
    forward, calls = train.forward, itertools.count(1)

    def changed(*words):
        logits, label = forward(*words)
        return change(logits) if next(calls) == number else logits, label

    train.forward = changed


def damage(fit, name):
    """The clip of this name can no longer be read."""

    def find_joints(clip):
        if clip.name == name:
            raise data.BadClip(f"{name}.avi: damaged")
        return clip

    fit.source.find_joints = find_joints


PASSES = [("", 2), ("--checkpointing", 4), ("--compile", 3), ("--accumulate 2", 4)]


@pytest.mark.parametrize("flags, passes", PASSES)
def test_flags_reach_the_model(flags, passes, fit, swap):
    """Catches: a flag that is forgotten."""
    calls, forward = [], d3t.Block.forward
    swap(d3t.Block, "forward", lambda *words: calls.append(1) or forward(*words))
    swap(torch, "compile", lambda net: calls.append(1) or net)
    fit(f"--stop-after 2 {flags}")
    assert len(calls) == passes


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_schedule_and_clip(amp, fit):
    """Catches: another schedule; a clip before the unscaling."""
    flags = f"--epochs 4 --warmup 1.5 --batch 16 --clip 0.01 --amp {amp} --out run"
    fit(flags)
    assert prepared(f"{flags} --resume").scaler.state_dict() == checkpoint()["scaler"]
    ends = np.arange(4) + 32 / 43  # of the last step of each epoch
    shares = np.minimum(ends / 1.5, 0.5 + 0.5 * np.cos(np.pi * (ends - 1.5) / 2.5))
    assert [line["lr"] for line in log_of()] == pytest.approx(1e-3 * shares)
    states = checkpoint()["optimizer"]["state"].values()
    steps = max(state["step"].item() for state in states)
    assert (1 < steps < 8) if amp == "fp16" else steps == 8  # the first ones overflow
    squares = sum(state["exp_avg_sq"].sum() for state in states)  # 0.001 of each
    assert squares == pytest.approx(0.01**2 * (1 - 0.999**steps), rel=1e-3)


WRONG = {  # what happens to the logits, flags, last words
    "loss": (lambda x: x * math.nan, "", "step 4: loss nan"),
    "loss, fp16": (lambda x: x * math.nan, "--amp fp16", "step 4: loss nan"),
    "gradient": (lambda x: x.register_hook(lambda g: g * math.inf) and x, "", "step 4: loss 1"),
    "disk": (lambda x: Path("run/last.tmp").mkdir() or x, "", "[Errno 21] Is a directory"),
}


@pytest.mark.parametrize("change, flags, said", WRONG.values(), ids=WRONG)
def test_what_ends_a_run(change, flags, said, fit):
    """Catches: a checkpoint that is spoiled or lost."""
    in_forward(4, change)
    status, printed = fit(f"--save-every 2 {flags}")
    assert status == 1 and f"train.py: {said}" in printed
    assert checkpoint()["progress"]["step"] == 2


def test_bad_clip_in_training(fit):
    """Catches: a bad clip that is not told or logged."""
    damage(fit, "train 3")
    assert fit("--batch 43")[1].count("warning: a clip was replaced by another: train 3.avi") == 2
    assert [line["bad"] for line in log_of()] == [1, 1]


def test_bad_clip_in_a_test(fit):
    """Catches: a test that leaves out a clip; an epoch lost with its test."""
    damage(fit, "test 3")
    status, printed = fit()
    assert status == 1 and printed.endswith("train.py: test 3.avi: damaged\n")
    assert checkpoint()["progress"]["step"] == 5


def prepared(flags):
    """The run of these flags before its first step."""
    return train.prepare(*train.parse_args([*SMALL.split(), *flags.split()]))


def test_seed(fit):
    """Catches: a seed of weights or data alone."""
    a, b, c = (prepared(f"--seed {seed}") for seed in (3, 4, 3))
    first, other, again = (run.model.head.weight for run in (a, b, c))
    assert first.equal(again) and not first.equal(other) and b.dataset("train").seed == 4


def test_weight_decay(fit):
    """Catches: decay of norms, biases, embeddings."""
    run = prepared("--weight-decay 0.3")
    a, b = run.optimizer.param_groups
    for name, p in run.model.named_parameters():
        group = b if p.ndim == 1 or name.startswith(("position", "modal")) else a
        assert p in {*group["params"]}, name
    assert (a["weight_decay"], b["weight_decay"]) == (0.3, 0)


@pytest.mark.parametrize("tops, best", [([0.25, 0.75, 0.5, 0.75], 2), ([0.0, 0.0], 1)])
def test_best(tops, best, fit, swap):
    """Catches: a later epoch kept as best; none where no clip is right."""
    swap(train, "evaluate", lambda run, _: ({"top1": tops[run.progress.epoch]}, 0))
    assert f"best top-1 {max(tops):.2%}" in fit(f"--epochs {len(tops)} --batch 40")[1]
    assert checkpoint(name="best.pt")["progress"]["epoch"] == best


@pytest.mark.parametrize("stop, workers", [(3, 2), (5, 0), (8, 1)])
def test_resume(stop, workers, fit, whole):
    """Catches: what a checkpoint forgets; an epoch logged twice."""
    fit(f"--stop-after {stop}")
    state = checkpoint()
    state["progress"]["seconds"] += 1000
    torch.save(state, "run/last.pt")
    shutil.copy(whole / "log.jsonl", "run")  # killed then
    assert fit(f"--resume --weights gone --workers {workers}")[0] == 0
    same_run(whole)
    assert sum(line["seconds"] for line in checkpoint()["progress"]["log"]) > 1000


def order(swap, seed, epoch, rank=0, ranks=1, seen=0):
    """The batches of a rank: 50 clips, 12 a step in two parts."""
    swap(train, "RANK", rank)
    swap(train, "RANKS", ranks)
    recipe, progress = train.Recipe(batch=12, seed=seed), train.Progress(epoch, seen=seen)
    return train.training_batches(50, recipe, 2, progress)


def test_order_of_clips(swap):
    """Catches: a clip that comes twice; an order without seed or epoch."""
    orders = [sum(order(swap, *key), []) for key in ((0, 0), (0, 1), (1, 1))]
    assert [(len({*items}), items[0][0]) for items in orders] == [(48, 0), (48, 1), (48, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a[1] == b[1] for a, b in zip(one, other)) < 10  # one in chance


def test_ranks_share_the_order(swap):
    """Catches: a clip of two ranks; an order that a resume changes."""
    alone, *shared = (order(swap, 0, 1, *each) for each in ((0, 1), (0, 3), (1, 3), (2, 3)))
    for rank, mine in enumerate(shared):
        assert sum(mine, []) == sum(alone, [])[rank::3] and len(mine[0]) == 2
    assert order(swap, 0, 1, 2, 3, seen=24) == shared[2][4:]


def test_too_many_bad_clips(capsys):
    """Catches: a run on under 99 % of the clips; a bad clip told twice."""
    run = train.Run(*[None] * 6, train.Progress())
    for name in "abb":
        train.report_bad([(name, name)], run, 200)
    assert capsys.readouterr().err.count("warning") == 2
    with pytest.raises(data.DataError, match="2 of 199 clips, over 1 %, .*:\na\nb"):
        train.report_bad([], run, 199)


def test_what_a_source_lacks(fit):
    """Catches: clips left out in silence; a run on others."""
    fit.source.missing = ["gone"]
    assert "1 clips are left out, such as: gone\n" in fit("--stop-after 1")[1]
    fit.source.clips["test"].pop()
    assert "[43, 11]), not ('synthetic', [43, 10])" in fit("--resume")[1]


def test_scores(fit, whole):
    """Catches: scores of another accuracy; a class without clips."""
    kept = [clip for clip in fit.source.clips["test"] for _ in range(clip.label)]
    fit.source.classes, fit.source.clips = ["wave"], {"train": [], "test": kept}
    printed = fit(f"--eval {whole}/last.pt --scores scores.npz")[1]
    classes, names, labels, logits = np.load("scores.npz").values()
    assert [*zip(names, labels)] == [(clip.name, clip.label) for clip in kept]
    assert [*classes] == data.SYNTHETIC_ACTIONS
    right = logits.argmax(1) == labels
    by_class = np.mean([right[labels == label].mean() for label in (1, 2, 3)])
    result = {"top1": right.mean(), "mean_class": by_class, "clips": len(kept)}
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(result)


USAGE = {
    "": "run holds a run",
    "--resume --channels 8": "channels is 4 in the checkpoint, not 8",
    "--resume --preset small": "lr is 0.001 in the checkpoint",
    "--resume --accumulate 3": "batch = 8: at most 43 .*, by 3 ",
    "--eval other.pt": "other.pt is no checkpoint of this",
    "--eval evil.pt": "evil.pt cannot be loaded: Weights only load failed$",
    "--eval torn.pt": "torn.pt cannot be loaded",
    "--out new --weights w.pt": "w.pt takes dilated = True",
    "--out new --dilated --weights w.pt": "w.pt does not fit",
    "--out new --dilated --weights run/last.pt": "last.pt takes dilated = False",
    "--out new --weights w.csv": "w.csv cannot be loaded",
    "--scores s.npz": "--scores goes with --eval",
    "--out new --batch 44": "at most 43",
    "--out new --heads 3": "by heads = 3",
    "--batch 8.5": "--batch: invalid int value",
    "--lr 0": "--lr: 0 is not positive",
}


@pytest.mark.parametrize("flags", USAGE)
def test_usage_errors(flags, fit, whole):
    """Catches: a traceback; a run that is overwritten."""
    shutil.copytree(whole, "run")
    torch.save({"weight": torch.zeros(1)}, "w.pt")
    Path("w.csv").write_text("a,b")
    torch.save(checkpoint() | {"recipe": {"more": 0}}, "other.pt")
    Path("evil.pt").write_bytes(pickle.dumps(os.system, protocol=2))
    Path("torn.pt").write_bytes(Path("run/last.pt").read_bytes()[:-99])
    status, printed = fit(flags)
    assert status == 2 and re.search(USAGE[flags], printed) and printed.count("\n") == 1, printed
    assert Path("run/last.pt").read_bytes() == (whole / "last.pt").read_bytes()
    assert not Path("new").exists()


def test_weights_of_a_checkpoint(fit, whole, capsys):
    """Catches: other classes or sizes that fail; weights that are forgotten."""
    fit.source.classes = [*fit.source.classes, "bow"]
    model = prepared(f"--frames 6 --height 32 --weights {whole}/last.pt").model.state_dict()
    said = capsys.readouterr().out.split("none fit: ")[1].split()
    conv = "blocks.0.deformable.search.conv.weight"  # h was shorter than k
    assert said == ["position_t", "position_s", "modal", conv, "head.weight", "head.bias"]
    for name, value in checkpoint(whole)["model"].items():
        assert name in said or torch.equal(model[name], value), name


def test_weights_of_torchvision(fit):
    """Catches: weights that load in part."""
    weights = {name: value + 1 for name, value in Trunk(4).state_dict().items()}
    torch.save(weights | {"fc.bias": torch.zeros(400)}, "w.pt")
    trunk = prepared("--dilated --weights w.pt").model.trunk.state_dict()
    assert all(torch.equal(trunk[name], value) for name, value in weights.items())


@pytest.mark.parametrize("cuda, bf16, amp", [(0, 0, "off"), (1, 1, "bf16"), (1, 0, "fp16")])
def test_defaults(cuda, bf16, amp, swap):
    """Catches: bf16 that CUDA emulates; a zero that is refused."""
    swap("torch.cuda.is_available", lambda: cuda)
    name = "torch.cuda.is_bf16_supported"
    swap(name, lambda including_emulation: including_emulation or bf16)
    flags = "--data pennaction --no-joint-attention --warmup 0 --weight-decay 0 --seed 0"
    options, given = train.parse_args([*flags.split(), "--modal-tokens=0"])
    assert (options.amp, options.preset) == (amp, "paper") and [*given.values()] == [0] * 5


# ---- Training in several processes ----
def statuses(flags, ranks=1):
    """Fork a process a rank to do `fit(flags)`: their exit statuses."""
    if torch.cuda.device_count():
        pytest.skip("autograd cannot fork after CUDA")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = f"{free.getsockname()[1]}"
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(60)  # for one that waits
            os.setpgrp()
            train.RANK, train.RANKS = rank, ranks
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{ranks}", GROUP=f"{os.getpid()}")
            if rank > 0:
                os.replace = Path.write_text = np.savez = None  # these ranks write nothing
            try:
                os._exit(train.main([*SMALL.split(), "--out", "run", *flags.split()]))
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_ranks_take_the_same_step(fit, whole, swap):
    """Catches: sums in place of means; bad clips of rank 0 alone."""
    # In training, batch norms use the statistics of each rank.
    swap(D3T, "train", lambda model, _=True: torch.nn.Module.train(model, False))
    damage(fit, f"train {np.random.default_rng((0, 0)).permutation(43)[1]}")  # on rank 1
    steps = []
    for ranks, parts in ((1, 1), (1, 4), (2, 2), (4, 1)):
        flags = f"--weights {whole}/last.pt --clip 1e9 --stop-after 1 --accumulate {parts}"
        assert statuses(f"{flags} --out {ranks}x{parts}", ranks) == [0] * ranks
        state = checkpoint(f"{ranks}x{parts}")
        gradients = [each["exp_avg"] for each in state["optimizer"]["state"].values()]
        steps.append([state["progress"]["loss"], len(state["progress"]["bad_clips"]), *gradients])
        torch.testing.assert_close(steps[-1], steps[0], rtol=1e-4, atol=1e-7)
    assert steps[0][1] == 1


def test_ranks_test_every_clip_once(fit, whole, swap):
    """Catches: clips tested twice or never; statistics of several ranks."""
    evaluate, flags = train.evaluate, f"--eval {whole}/last.pt --batch 2 --scores"

    def spoiled(run, dataset):
        for statistics in run.model.buffers():  # differ after a step
            statistics += train.RANK
        return evaluate(run, dataset)

    swap(train, "evaluate", spoiled)
    assert statuses(f"{flags} shared.npz", 3) == [0] * 3
    fit(f"{flags} alone.npz")
    shared, alone = np.load("shared.npz"), np.load("alone.npz")
    assert [*shared["names"]] == [f"test {i}" for i in range(11)]
    np.testing.assert_allclose(shared["logits"], alone["logits"], rtol=0, atol=1e-5)


STOPS = {  # signals, status of the last rank, step of the checkpoint, ranks, flags, others
    "two ranks": ("SIGINT", 130, 3, 2, "", "--amp fp16 --batch 16"),
    "second Ctrl-C": ("SIGINT SIGINT", -2, 2, 1, "", ""),
    "kill -9": ("SIGKILL", -9, 2, 1, "", ""),
    "a failing rank": ("KeyError", 1, 2, 2, "--workers 1", "--amp bf16 --accumulate 2"),
}


@pytest.mark.parametrize("names, status, step, ranks, flags, others", STOPS.values(), ids=STOPS)
def test_a_stopped_run_goes_on(names, status, step, ranks, flags, others, fit, whole):
    """Catches: steps that are lost; a rank that waits for another."""
    here = os.getpid()

    def interrupt(logits):
        for name in names.split() if os.getpid() != here and ranks == train.RANK + 1 else ():
            os.killpg(0, signal.Signals[name])
        return logits

    in_forward(3, interrupt)
    ended = statuses(f"--save-every 2 {flags}", ranks)
    assert ended[-1] == status and -signal.SIGALRM not in ended
    assert checkpoint()["progress"]["step"] == step
    assert fit(f"--resume {others}")[0] == 0
    if ranks == 1:  # two have their own batch statistics
        same_run(whole)


def test_a_signal_while_a_worker_loads(fit, whole):
    """Catches: a worker that dies of a signal to its rank."""

    def find_joints(clip):
        if torch.utils.data.get_worker_info() and clip.name == "train 3":
            os.killpg(int(os.environ["GROUP"]), signal.SIGTERM)
        return clip

    fit.source.find_joints = find_joints
    assert statuses("--workers 1") == [143]
    assert fit("--resume")[0] == 0
    same_run(whole)


FEW = """
import atexit, data, runpy
atexit.register(print, "at exit")
data.SOURCES["synthetic"] = lambda: data.synthetic(43, 11), []
runpy.run_module("train", run_name="__main__")
"""


def test_torchrun(fit):
    """Catches: wrapped names in a checkpoint; an exit that may abort."""
    Path("few.py").write_text(FEW)
    words = f"-m torch.distributed.run --standalone --nproc_per_node 2 few.py {SMALL} --out run"
    env = os.environ | {"PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.check_output([sys.executable, *words.split()], env=env, text=True)
    assert printed.count("\nepoch 1 ") == 1 and "at exit" not in printed
    assert not any("module." in key for key in checkpoint()["model"])
    assert 1 < log_of()[0]["loss"] < 2  # about ln 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_cuda(amp, fit, swap):
    """Catches: a tensor left on the CPU."""
    swap(torch.cuda, "is_available", lambda: True)
    for flags in ("--stop-after 3", "--resume --checkpointing", "--eval run/best.pt"):
        assert fit(f"--amp {amp} {flags}")[0] == 0


# ---- The README ----
def test_examples_of_docstrings():
    """Catches: a number in a docstring of the model that is wrong."""
    assert doctest.testmod(d3t).failed == 0


def test_shapes_of_the_readme():
    """Catches: a stage or a shape in the README's table that the model has not."""
    rows = re.findall(r"^\| `(\S+)` \| `([^`]* -> [^`]*)` \|", README, re.MULTILINE)
    assert rows == [*d3t.trace(d3t.Settings()).items()]


def test_code_of_the_readme(tmp_path, monkeypatch, capsys):
    """Catches: code that fails or states another shape; a path from videos to labels that ends."""
    pytest.importorskip("av", reason="needs av, the decoder of videos")
    monkeypatch.chdir(tmp_path)
    own_clips = (HERE / "tools/README.md").read_text().partition("\n## Speed")[0]
    pattern = r"```python\n(.*?)```|^    python ([^\n]*)$"
    names, printed = {}, ""
    for block, command in re.findall(pattern, README + own_clips, re.DOTALL | re.MULTILINE):
        if command:
            script, *words = command.removeprefix("-m ").split()
            main = importlib.import_module(script.removesuffix(".py")).main
            assert main(words) == 0, capsys.readouterr()
            printed += capsys.readouterr().out
        exec(block.replace("224", "32"), names)  # the paper's size takes long
        for name, shape in re.findall(r"^\s*(\w+) = .*# \(([\d, ]+)\)", block, re.MULTILINE):
            assert tuple(names[name].shape) == tuple(map(int, shape.split(","))), name
    assert "because none fit: head.weight head.bias" in printed
    assert re.search(r"\d%  (walk|jump)\n", printed) and names["confusion"].sum() == 1


def test_commands_of_the_readme(capsys):
    """Catches: a command in the README with a flag that does not exist."""
    for script, text in re.findall(r"(train|tools\.\w+)(?:\.py)? ([^`\n&|#]*-[^`\n&|#]*)", README):
        for name in {"train", script}:  # tools.ablate hands flags on
            with pytest.raises(SystemExit):
                importlib.import_module(name).main(["-h"])
        known = capsys.readouterr().out
        for flag in {word for word in text.split() if word.startswith("-")}:
            assert re.search(rf"{flag}\b", known), (script, text)
