"""The proof of D3T. Each test's docstring names the bug that it would catch.

The first part holds slow loops in float64 that were written from the paper's sentences, not from `d3t.py`: they take
numpy arrays, name every token, and share no code with the model. The model has to agree with them.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import d3t
import train
from d3t import D3T, Settings

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
        # a cell of the map is two pixels wide; the first one's centre lies between the pixels 0 and 1, at 0.5
        x, y = (joints[b, t, r, 0] - 0.5) / 2, (joints[b, t, r, 1] - 0.5) / 2
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
    """P (T, R, D): each window of joints, over all frames, attends within itself and the two modal tokens of a frame."""
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
            X[start : start + window].reshape(-1, D), X[start : start + window].reshape(-1, D), part(w, "attention."), heads
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
    attention, X, X_ = randomize(d3t.Attention(8, heads)), randn(B, n, 8), randn(B, m, 8)
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


@pytest.mark.parametrize("changes", [{}, dict(frames=4, width=48, joints=5), dict(height=41, temporal_window=5)])
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
        embed = w["embed_pose.weight"], w["embed_pose.bias"]
        p = np.array([[layer_norm(embed[0] @ joint + embed[1], w, "norm_pose") for joint in frame] for frame in P[b]])
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
        assert torch.equal(p.amin((0, 1, 2, 3)) if wanted == 0 else p.amax((0, 1, 2, 3)), wanted * p.new_tensor([3, 4, 5]))


def test_joints_follow_the_half_pixel_rule():
    """Coordinates divided by the stride alone: a mirrored clip would give other tokens than the clip."""
    F_a, joints = randn(1, 3, 2, 5, 8), randn(1, 2, 4, 2).abs() * 5
    mirrored = joints.clone()
    mirrored[..., 0] = 16 - 1 - joints[..., 0]
    visible = torch.ones(1, 2, 4, dtype=torch.bool)
    close(d3t.joint_tokens(F_a, joints, visible, 1.0), d3t.joint_tokens(F_a.flip(-1), mirrored, visible, 1.0))
    at_border = torch.tensor([[[[0.5, 2.5]]]], dtype=DOUBLE)  # between the first two pixels: the centre of cell 0
    maps = d3t.joint_heatmaps(at_border, visible[:, :1, :1], (3, 4), 2, 1.0)
    assert maps[0, 0, 0, 1, 0] == 1


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
    model = D3T(s)
    for module in model.modules():
        if isinstance(module, d3t.TokenSearch):  # at zero the offset layer would pass no gradient on
            torch.nn.init.normal_(module.offset.weight)
    F.cross_entropy(model(*clip_for(s)), torch.tensor([1, 4])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-7, name


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
    joints[visible] = float("nan")  # said to be visible, but not finite: absent as well
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
    seen = {}

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
    assert {out for out, _ in seen["points"]} == {torch.float32}
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
    for layer, inputs, outputs, first, second in ((1, 64, 64, 144, 144), (2, 64, 128, 230, 288), (3, 128, 256, 460, 576)):
        for block, wide, middle in ((0, inputs, first), (1, outputs, second)):
            for half, width in ((1, wide), (2, outputs)):
                name = f"layer{layer}.{block}.conv{half}"
                conv(f"{name}.0.0", middle, width, 1, 3, 3), norm(f"{name}.0.1", middle)
                conv(f"{name}.0.3", outputs, middle, 3, 1, 1), norm(f"{name}.1", outputs)
        if layer > 1:
            conv(f"layer{layer}.0.downsample.0", outputs, inputs, 1, 1, 1), norm(f"layer{layer}.0.downsample.1", outputs)
    assert {name: tuple(v.shape) for name, v in d3t.Trunk(64).state_dict().items()} == expected


def test_trunk_keeps_every_frame():
    """A temporal stride left in from R(2+1)D: fewer frames than the joints have."""
    F_a, F_b = d3t.Trunk(4)(torch.randn(1, 3, 5, 40, 24))
    assert F_a.shape == (1, 4, 5, 20, 12) and F_b.shape == (1, 16, 5, 5, 3)


@pytest.mark.parametrize(
    "changes, numbers",
    [
        (dict(joint_window=8), ("8", "7")), (dict(temporal_window=6), ("6", "5")), (dict(heads=3), ("8", "3")),
        (dict(joint_stride=5), ("5", "4")), (dict(modal_tokens=2), ("2",)), (dict(frames=0), ("0",)),
        (dict(deformable_attention=False, temporal_attention=False), ("deformable_attention",)),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes, numbers):
    """A shape error deep inside the model instead of one line that names both numbers."""
    with pytest.raises(ValueError) as error:
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


def test_windows():
    """A joint in no window, a window beyond the end, a mean that forgets how many copies there are."""
    for length, window, stride in itertools.product(range(1, 9), range(1, 9), range(1, 9)):
        if stride <= window <= length:
            index = d3t.window_index(length, window, stride)
            assert index[:, 0].tolist() == loop_starts(length, window, stride)
            assert set(index.flatten().tolist()) == set(range(length))
            for dim, x in ((1, randn(2, length, 3, 2)), (2, randn(2, 3, length, 2))):
                close(d3t.mean_of_windows(d3t.take_windows(x, index, dim), index, dim, length), x, 1e-14)


def test_one_graph_for_the_compiler():
    """A data-dependent branch or a call that splits the graph of torch.compile."""
    s = small()
    model = D3T(s).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(*clip_for(s)), model(*clip_for(s)), 1e-5)
