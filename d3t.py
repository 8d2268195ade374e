r"""D3T, the 3D deformable transformer: RGB video and body joints in one transformer.

All of *Cross-Modal Learning with 3D Deformable Attention for Action Recognition* (Kim, Ahn, Ko,
ICCV 2023), bottom-up and in the paper's symbols. Figure 2a in the names of this file:

    video -- Trunk -- F_b -- + position ------ Z    M_RGB, M_CLS, M_pose: trained
                  \-- F_a, joints -- Eq. (1) -- P
    Block, L times:
      Z, M_RGB, M_CLS            -> DeformableAttention     -> Z, M_RGB, M'_CLS
      P, M'_CLS, M_pose          -> JointStrideAttention    -> P, M'_CLS, M_pose
      M'_CLS of both             -> fuse                    -> M_CLS
      Z, P, M_RGB, M_CLS, M_pose -> TemporalStrideAttention -> the same
    M_RGB, M_CLS, M_pose -- mean over T -- head -- logits

    B     clips of the batch        F_a   trunk features for the joints  (B, C, T, H/2, W/2)
    T     frames of a clip          F_b   features for the RGB tokens    (B, D, T, h, w)
    H, W  height, width, pixels     Z     RGB tokens                     (B, T, h*w, D)
    h, w  H/8 and W/8, tokens       P     pose tokens                    (B, T, R, D)
    C     width of the trunk        M_*   cross-modal tokens, each       (B, T, 1, D)
    D     width of a token, 4C      Z_    Z~, selected by 3DTS           (B, T~, h~, w~, D)
    R     joints of all persons     X     queries, [Z | M_RGB | M_CLS]   (B, T*(h*w + 2), D)
    L     transformer blocks        X_    X~, keys, [Z~ | M_RGB | M_CLS]

"(ours 4)" marks a line where the paper is silent, "(departure 1)" one where it says otherwise: the
README has the reason under that number. `python d3t.py` prints the shapes of a forward.
"""

import argparse
import re
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- Backbone: R(2+1)D-18 without temporal strides and layer4 (Sec. 3.1, [45]; ours 1) ----
def conv2plus1d(inputs, middle, outputs, stride=1, k=3, reach=1):
    """A 3 x k x k convolution, factored, and its norm; `stride` in space, `reach` in frames."""
    edge = k // 2
    # The 2 has no effect where there is one tap, but keeps a CPU on its fast kernel.
    dilation = (reach, 1, 1 if torch.cuda.is_available() else 2)
    factored = nn.Sequential(
        nn.Conv3d(inputs, middle, (1, k, k), (1, stride, stride), (0, edge, edge), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), 1, (reach, 0, 0), dilation, bias=False),
    )
    return nn.Sequential(factored, nn.BatchNorm3d(outputs))


class ResidualBlock(nn.Module):
    """Two factored convolutions and a shortcut, torchvision's `BasicBlock`."""

    def __init__(self, inputs, outputs, stride=1, reach=(1, 1)):
        super().__init__()
        # With this width, conv1 has as many weights as a 3 x 3 x 3 convolution.
        middle = inputs * outputs * 27 // (inputs * 9 + outputs * 3)
        self.conv1 = conv2plus1d(inputs, middle, outputs, stride, reach=reach[0])
        self.conv2 = conv2plus1d(outputs, middle, outputs, reach=reach[1])
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv3d(inputs, outputs, 1, (1, stride, stride), bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(outputs))

    def forward(self, x):
        shortcut = self.downsample(x)
        x = F.relu(self.conv1(x), inplace=True)
        return F.relu(self.conv2(x) + shortcut)


class Trunk(nn.Module):
    """Video (B, 3, T, H, W) -> F_a (B, C, T, H/2, W/2), F_b (B, 4C, T, H/8, W/8), rounded up.

    At C = 64 its parameters are those of torchvision's `r2plus1d_18` (stem, layer1..3). For its
    weights, `dilated` trades that network's temporal strides for dilations.
    """

    def __init__(self, C=64, dilated=False):
        super().__init__()
        middle = max(1, 45 * C // 64)  # 45 at C = 64, as in torchvision
        factored, norm = conv2plus1d(3, middle, C, stride=2, k=7)
        self.stem = nn.Sequential(*factored, norm, nn.ReLU(inplace=True))
        c, d = 2 * C, 4 * C
        a, b = (2, 4) if dilated else (1, 1)
        self.layer1 = nn.Sequential(ResidualBlock(C, C), ResidualBlock(C, C))
        self.layer2 = nn.Sequential(ResidualBlock(C, c, 2, (1, a)), ResidualBlock(c, c, 1, (a, a)))
        self.layer3 = nn.Sequential(ResidualBlock(c, d, 2, (a, b)), ResidualBlock(d, d, 1, (b, b)))

    def forward(self, video):
        F_a = self.layer1(self.stem(video))  # (B, C, T, H/2, W/2)
        F_b = self.layer3(self.layer2(F_a))  # (B, 4C, T, H/8, W/8)
        return F_a, F_b


# ---- Pose modality: the Gaussian joint tokenizer (Sec. 3.1) ----
def full_precision(x):
    """Nothing in it is cast to 16 bits (ours 18)."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def joint_heatmaps(joints, visible, size, sigma):
    """Eq. (2): a Gaussian of height 1 around each joint, on the map of F_a.

    joints (B, T, R, 2), x then y, pixels; visible (B, T, R); size: height and width of F_a; sigma
    in cells of F_a -> (B, T, R, height, width). A joint that is not visible or not finite has a
    map of zeros; that of a joint at pixel x = 10, y = 6 peaks in row 3 and column 5:

    >>> H = joint_heatmaps(torch.tensor([[[[10.0, 6.0]]]]), torch.tensor([[[True]]]), (8, 12), 1.0)
    >>> (H[0, 0, 0] == 1).nonzero()
    tensor([[3, 5]])
    """
    present = visible & joints.isfinite().all(-1)
    joints = joints.where(present[..., None], 0.0)  # NaN times zero would be NaN
    # The trunk's odd kernels centre cell i of F_a on pixel 2i (ours 2).
    x, y = (joints / 2)[..., None, None].unbind(-3)  # (B, T, R, 1, 1) each
    height, width = size
    i = torch.arange(width, device=joints.device)
    j = torch.arange(height, device=joints.device)[:, None]
    H = torch.exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * sigma**2))  # Eq. (2) (ours 3)
    return H * present[..., None, None]


def joint_tokens(F_a, joints, visible, sigma):
    """Eq. (1): for each joint the sum over the map of F_a times the joint's Gaussian.

    F_a (B, C, T, H/2, W/2), joints and visible as in `joint_heatmaps` -> (B, T, R, C). The token of
    an absent joint is zero, and stays in the sequence (ours 4).
    """
    with full_precision(F_a):  # 16 bits are too few for positions and for a sum over a map
        F_a = F_a.to(torch.promote_types(F_a.dtype, torch.float32))
        H = joint_heatmaps(joints.to(F_a.dtype), visible, F_a.shape[-2:], sigma)
        return torch.einsum("bctji, btrji -> btrc", F_a, H)  # Eq. (1)


# ---- 3D deformable attention (Sec. 3.2, Fig. 2b, Fig. 3) ----
class AttentionBlock(nn.Module):
    """Eq. (6) and (7), in all three attentions: X (B, Q, D) asks X~ (B, S, D) -> (B, Q, D)."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.Wq = nn.Linear(D, D, bias=False)
        self.Wk = nn.Linear(D, D, bias=False)
        self.Wv = nn.Linear(D, D, bias=False)
        self.Wo = nn.Linear(D, D)  # (ours 5)
        self.norm = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def msa(self, *qkv):
        """Multi-head attention, scaled by 1/sqrt(D / heads): q (B, Q, D), k and v (B, S, D)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, Q, D / heads)
        return self.Wo(out.transpose(1, 2).flatten(2))  # (B, Q, D)

    def forward(self, X, X_):
        X = X + self.msa(self.Wq(X), self.Wk(X_), self.Wv(X_))  # Eq. (6)
        return X + self.ffn(self.norm(X))  # Eq. (7)


def reference_points(grid, kernel):
    """The regular points p of Fig. 3, in tokens (t, h, w): (T~, h~, w~, 3), T~ = T - k + 1.

    Cell o of a convolution without padding sees the tokens o .. o + k - 1. Its point is their
    centre, so an untrained search does not read the outer (k - 1)/2 tokens (ours 6).

    >>> reference_points((12, 28, 28), (7, 7, 7))[0, 0, 0]
    tensor([3., 3., 3.])
    """
    axes = [torch.arange(length - k + 1) + (k - 1) / 2 for length, k in zip(grid, kernel)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def sample_tokens(Z, points):
    """Z (B, T, h, w, D), trilinear at points (B, ..., 3), in tokens (t, h, w) -> (B, ..., D)."""
    T, h, w = Z.shape[1:4]
    t, y, x = points.unbind(-1)
    # With align_corners=False, -1 and 1 are the outer edges of the first and last cell.
    # "border" keeps a point that rounding moved past an edge from mixing in zeros.
    at = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1, (2 * t + 1) / T - 1], dim=-1)
    at = at.flatten(1, -2)[:, None, None]  # (B, 1, 1, n, 3), n points
    volume = Z.to(points.dtype).permute(0, 4, 1, 2, 3)  # (B, D, T, h, w)
    out = F.grid_sample(volume, at, padding_mode="border", align_corners=False)
    out = out[:, :, 0, 0].transpose(1, 2)  # (B, n, D)
    return out.unflatten(1, points.shape[1:-1])  # (B, ..., D)


class TokenSearch(nn.Module):
    """3DTS, the 3D token search of Eq. (3) and Fig. 3: Z (B, T, h, w, D) -> Z~ (B, T~, h~, w~, D).

    Offsets are in tokens (t, h, w), from -(k - 1)/2 to (k - 1)/2: a point stays inside the window
    its offset was computed from, and together they reach every token (ours 7).
    """

    def __init__(self, D, grid, k):
        super().__init__()
        kernel = tuple(min(k, length) for length in grid)
        # "a two-layered Conv3D with kernel k": two of k = 7 would need T = 13 (departure 1).
        self.conv = nn.Conv3d(D, D, kernel, groups=D)  # depthwise (ours 8)
        self.norm = nn.LayerNorm(D)
        self.offset = nn.Linear(D, 3)  # a pointwise Conv3D
        reach = torch.tensor([(k - 1) / 2 for k in kernel])
        self.register_buffer("reach", reach, persistent=False)  # (3,)
        reference = reference_points(grid, kernel)[None]
        self.register_buffer("reference", reference, persistent=False)  # (1, T~, h~, w~, 3)

    def points(self, Z):
        """p + delta p, in tokens (t, h, w): (B, T~, h~, w~, 3), in float32 even under autocast."""
        x = self.conv(Z.permute(0, 4, 1, 2, 3))  # (B, D, T~, h~, w~)
        x = F.gelu(self.norm(x.permute(0, 2, 3, 4, 1)))  # (B, T~, h~, w~, D)
        with full_precision(Z):  # 16 bits would round a point
            offset = self.offset(x.to(self.offset.weight.dtype)).tanh()
            return self.reference + offset * self.reach

    def forward(self, Z):
        return sample_tokens(Z, self.points(Z))  # Eq. (3)


class DeformableAttention(nn.Module):
    """3D deformable attention (Fig. 2b): Z (B, T, h*w, D), M_RGB and M_CLS -> the same, updated."""

    def __init__(self, D, heads, grid, k):
        super().__init__()
        self.grid = grid
        self.search = TokenSearch(D, grid, k)
        self.attention = AttentionBlock(D, heads)

    def forward(self, Z, M_rgb, M_cls):
        T, h, w = self.grid
        sizes = [h * w, M_rgb.shape[2], M_cls.shape[2]]
        Z_ = self.search(Z.unflatten(2, (h, w)))  # (B, T~, h~, w~, D)
        X = torch.cat([Z, M_rgb, M_cls], dim=2)  # Eq. (4): (B, T, h*w + 2, D)
        M = [M_rgb.flatten(1, 2), M_cls.flatten(1, 2)]  # (B, T, D) each
        X_ = torch.cat([Z_.flatten(1, 3), *M], dim=1)  # Eq. (5): (B, T~*h~*w~ + 2T, D)
        X = self.attention(X.flatten(1, 2), X_)  # Eq. (6), (7)
        return X.unflatten(1, (T, -1)).split(sizes, dim=2)  # Z, M_RGB, M'_CLS


# ---- Stride attention (Sec. 3.2, Fig. 4) ----
def windows(length, window, stride):
    """One window every `stride`; the last one is moved back to end with the series (ours 9).

    >>> [(each.start, each.stop) for each in windows(13, window=8, stride=4)]
    [(0, 8), (4, 12), (5, 13)]
    """
    starts = [*range(0, length - window, stride), length - window]
    return [slice(start, start + window) for start in starts]


class StrideAttention(nn.Module):
    """Attention in windows; what is in several of them becomes the mean of its copies (ours 9)."""

    def __init__(self, D, heads, window, stride):
        super().__init__()
        self.attention = AttentionBlock(D, heads)
        self.window, self.stride = window, stride


class JointStrideAttention(StrideAttention):
    """Local joint stride attention (Fig. 4a): P (B, T, R, D), M'_CLS, M_pose -> updated.

    "All tokens in each sliding window are flattened and then concatenated with M_pose and M'_CLS":
    a window holds some joints in all frames, and a copy of all modal tokens.
    """

    def forward(self, P, M_cls, M_pose):
        R = P.shape[2]
        M = torch.cat([M_cls, M_pose], dim=2)  # (B, T, 2, D)
        total, count, copies = torch.zeros_like(P), P.new_zeros(R, 1), []
        for joints in windows(R, self.window, self.stride):
            X = torch.cat([P[:, :, joints], M], dim=2)  # (B, T, window + 2, D)
            tokens = X.flatten(1, 2)  # all of them attend to all of them (ours 10)
            X = self.attention(tokens, tokens).view_as(X)
            total[:, :, joints] += X[:, :, : self.window]
            count[joints] += 1
            copies.append(X[:, :, self.window :])
        M = torch.stack(copies).mean(0)  # (B, T, 2, D)
        M_cls, M_pose = M.split([M_cls.shape[2], M_pose.shape[2]], dim=2)
        return total / count, M_cls, M_pose


class TemporalStrideAttention(StrideAttention):
    """Temporal stride attention (Fig. 4b): X (B, T, N, D) -> its last `queries` tokens, updated.

    "This window traverses all tokens and specifies the query, key, and value tokens": it holds all
    tokens of some frames.
    """

    def forward(self, X, queries):
        T = X.shape[1]
        asking = X[:, :, -queries:]  # (B, T, queries, D)
        total, count = torch.zeros_like(asking), X.new_zeros(T, 1, 1)
        for frames in windows(T, self.window, self.stride):
            tokens = X[:, frames].flatten(1, 2)  # (B, window*N, D)
            asked = self.attention(asking[:, frames].flatten(1, 2), tokens)  # (ours 10)
            total[:, frames] += asked.unflatten(1, (self.window, queries))
            count[frames] += 1
        return total / count  # (B, T, queries, D)


# ---- The model (Fig. 2a) ----
def setting(default, text):
    """A field of a dataclass with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What defines a model; defaults are the paper's, or ours where it is silent (ours 11)."""

    classes: int = setting(15, "actions, from the data set")
    joints: int = setting(13, "R, joints of all persons, from the data set")
    frames: int = setting(12, "T, frames of a clip")
    height: int = setting(224, "H, pixels")
    width: int = setting(224, "W, pixels")
    channels: int = setting(64, "C, channels of the trunk; D = 4C")
    dilated: bool = setting(False, "trunk for weights of r2plus1d_18")
    blocks: int = setting(4, "L, transformer blocks")
    heads: int = setting(4, "attention heads")
    kernel: int = setting(7, "k of the 3D token search, tokens")
    sigma: float = setting(1.0, "sigma of Eq. (2), cells of F_a")
    joint_window: int = setting(8, "joints in a window (Fig. 4a)")
    joint_stride: int = setting(4, "joints from one to the next")
    temporal_window: int = setting(4, "frames in a window (Fig. 4b)")
    temporal_stride: int = setting(2, "frames from one to the next, half a window (Fig. 7a)")

    def __post_init__(self):
        D = 4 * self.channels
        assert D % self.heads == 0, f"D = 4C = {D} does not divide by heads = {self.heads}"
        assert self.kernel > 1, "kernel = 1: a point could not move from its token"
        joints = self.joint_stride <= self.joint_window <= self.joints
        assert joints, f"expected joint_stride <= joint_window <= joints in {self}"
        frames = self.temporal_stride <= self.temporal_window <= self.frames
        assert frames, f"expected temporal_stride <= temporal_window <= frames in {self}"

    @property
    def grid(self):
        """T, h, w: the tokens of Z along each axis."""
        return self.frames, -(-self.height // 8), -(-self.width // 8)


class Block(nn.Module):
    """One of the L blocks of Fig. 2a: the five kinds of tokens -> the same."""

    def __init__(self, s: Settings, last):
        super().__init__()
        D = 4 * s.channels
        self.last = last
        self.deformable = DeformableAttention(D, s.heads, s.grid, s.kernel)
        self.joint = JointStrideAttention(D, s.heads, s.joint_window, s.joint_stride)
        self.fuse = nn.Linear(2 * D, D)  # (ours 12)
        self.temporal = TemporalStrideAttention(D, s.heads, s.temporal_window, s.temporal_stride)

    def forward(self, Z, P, M_rgb, M_cls, M_pose):
        Z, M_rgb, cls_3d = self.deformable(Z, M_rgb, M_cls)  # Fig. 2b, Eq. (3) to (7)
        P, cls_joint, M_pose = self.joint(P, cls_3d, M_pose)  # Fig. 4a
        # Both M'_CLS "are projected together into a new single M_CLS".
        M_cls = self.fuse(torch.cat([cls_3d, cls_joint], dim=-1))
        tokens = [Z, P, M_rgb, M_cls, M_pose]
        sizes = [each.shape[2] for each in tokens]  # h*w, R, 1, 1, 1
        X = torch.cat(tokens, dim=2)  # (B, T, h*w + R + 3, D)
        if self.last:  # the head reads the modal tokens alone, so only they ask (ours 13)
            return Z, P, *self.temporal(X, sum(sizes[2:])).split(sizes[2:], dim=2)
        return self.temporal(X, sum(sizes)).split(sizes, dim=2)  # Fig. 4b


class D3T(nn.Module):
    """The 3D deformable transformer (Fig. 2a).

    video    (B, 3, T, H, W) uint8, RGB; or float: (v - model.mean) / model.std, v in 0..255
    joints   (B, T, R, 2) float, x then y, in pixels of the video
    visible  (B, T, R) bool; the coordinates of a joint that is not visible have no effect
    returns  logits (B, classes)
    """

    def __init__(self, settings: Settings):
        super().__init__()
        s = self.settings = settings
        T, h, w = s.grid
        D = 4 * s.channels
        self.trunk = Trunk(s.channels, s.dilated)
        self.position_t = nn.Parameter(torch.zeros(T, 1, D))
        self.position_s = nn.Parameter(torch.zeros(1, h * w, D))
        # Eq. (6) has no norm before the attention. These two give the tokens one scale (ours 15).
        self.norm_rgb = nn.LayerNorm(D)
        self.norm_pose = nn.LayerNorm(D)
        # Without bias an absent joint is exactly zero. With a small one the norm would divide by
        # almost zero, which makes a very large gradient.
        self.embed_pose = nn.Linear(s.channels, D, bias=False)
        self.modal = nn.Parameter(torch.zeros(T, 3, D))  # M_RGB, M_CLS, M_pose of each frame
        self.blocks = nn.ModuleList(Block(s, i == s.blocks - 1) for i in range(s.blocks))
        self.head = nn.Linear(3 * D, s.classes)
        mean, std = torch.tensor([[0.432, 0.395, 0.376], [0.228, 0.221, 0.217]]) * 255
        self.register_buffer("mean", mean.view(1, 3, 1, 1, 1), persistent=False)  # (ours 19)
        self.register_buffer("std", std.view(1, 3, 1, 1, 1), persistent=False)
        self.initialize_weights()

    def initialize_weights(self):  # (ours 17)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):  # as in R(2+1)D
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, TokenSearch):  # the search starts at the regular grid
                nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")  # fan: k^3
                nn.init.zeros_(module.offset.weight)
        attentions = [module for module in self.modules() if isinstance(module, AttentionBlock)]
        for attention in attentions:  # as in GPT-2: the sum of all branches keeps its scale
            for branch in (attention.Wo, attention.ffn[2]):
                branch.weight.data /= (2 * len(attentions)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("position", "modal")):
                nn.init.trunc_normal_(parameter, std=0.02)  # as in ViT [18]

    def rgb_tokens(self, F_b):
        """RGB modality: F_b "is fused with the position embedding", the sum of a table over time
        and one over space (ours 14)."""
        Z = F_b.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, h*w, D)
        return self.norm_rgb(Z + self.position_t + self.position_s)

    def pose_tokens(self, F_a, joints, visible):
        """Pose modality. A token holds what lies at a joint, not where: the paper embeds no
        position in P (ours 16)."""
        P = joint_tokens(F_a, joints, visible, self.settings.sigma)  # (B, T, R, C)
        return self.norm_pose(self.embed_pose(P))  # (B, T, R, D)

    def cross_modal_tokens(self, B):
        """Cross-modal tokens (Sec. 3.2): M_RGB, M_CLS and M_pose, (B, T, 1, D) each."""
        return self.modal.expand(B, -1, -1, -1).split(1, dim=2)

    def classify(self, Z, P, *M):
        """Head (Sec. 3.2): "we concatenate the cross-modal tokens only along with the channel
        dimension", each as its mean over T (departure 2)."""
        M = torch.cat(M, dim=2).mean(1)  # (B, 3, D)
        return self.head(M.flatten(1))

    def forward(self, video, joints, visible):
        self.check(video, joints, visible)
        if not video.is_floating_point():
            video = (video - self.mean) / self.std
        F_a, F_b = self.trunk(video)  # (B, C, T, H/2, W/2), (B, D, T, h, w)
        Z = self.rgb_tokens(F_b)  # (B, T, h*w, D)
        P = self.pose_tokens(F_a, joints, visible)  # (B, T, R, D)
        M = self.cross_modal_tokens(Z.shape[0])  # three of (B, T, 1, D)
        for block in self.blocks:  # each with weights of its own (ours 13)
            Z, P, *M = block(Z, P, *M)
        return self.classify(Z, P, *M)

    def check(self, video, joints, visible):
        """Assert the shapes, as slices and broadcasting would let others pass."""
        s, B = self.settings, video.shape[0]
        T, R = s.frames, s.joints
        expected = [(B, 3, T, s.height, s.width), (B, T, R, 2), (B, T, R)]
        found = [tuple(each.shape) for each in (video, joints, visible)]
        assert found == expected, f"video, joints, visible: shapes {found}, expected {expected}"
        assert visible.dtype == torch.bool, f"visible must be bool, not {visible.dtype}"


# ---- Rows of Tables 4 and 5, and the shapes of a forward ----
@dataclass(frozen=True)
class Ablation(Settings):
    """A row of Table 4 or 5, for `build`; by default the full model."""

    modal_tokens: int = setting(3, "3 cross-modal, 1 single, 0 none (Table 5)")
    deformable_attention: bool = setting(True, "3D deformable attention (Table 4)")
    joint_attention: bool = setting(True, "local joint stride attention (Table 4)")
    temporal_attention: bool = setting(True, "temporal stride attention (Table 4)")

    def __post_init__(self):
        super().__post_init__()
        assert self.modal_tokens in (0, 1, 3), f"modal_tokens = {self.modal_tokens}: not in Table 5"


def build(s: Ablation) -> D3T:
    """The paper's model, or that of a row of Table 4 or 5."""
    attentions = s.deformable_attention and s.joint_attention and s.temporal_attention
    return D3T(s) if attentions and s.modal_tokens == 3 else AblatedD3T(s)


class Stub(nn.Module):
    """A function in place of a disabled attention (ours 23)."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


class AblatedD3T(D3T):
    """Without weights that nothing uses."""

    def __init__(self, s: Ablation):
        super().__init__(s)
        D = 4 * s.channels
        for block in self.blocks:
            block.last = block.last and s.modal_tokens > 0
            if not s.deformable_attention:
                block.deformable = Stub(lambda *tokens: tokens)
            if not s.joint_attention:
                block.joint = Stub(lambda *tokens: tokens)
            if not s.temporal_attention:
                block.temporal = Stub(lambda X, queries: X[:, :, -queries:])
            if not (s.deformable_attention and s.joint_attention and s.modal_tokens):
                block.fuse = Stub(lambda pair: pair.chunk(2, dim=-1)[1])  # M'_CLS as it is
        if s.modal_tokens and not (s.joint_attention or s.temporal_attention):
            # Row 2 never looks at the joints: P is empty.
            self.embed_pose = Stub(lambda P: P.new_zeros(*P.shape[:2], 0, D))
            self.norm_pose = Stub(lambda P: P)
        self.modal = nn.Parameter(self.modal[:, : s.modal_tokens].detach())
        if not s.modal_tokens:
            self.modal = None
        self.head = nn.Linear((s.modal_tokens or 2) * D, s.classes)
        self.initialize_weights()

    def cross_modal_tokens(self, B):
        """A single token takes all roles as M_CLS; M_RGB and M_pose are empty (ours 24)."""
        if self.settings.modal_tokens == 3:
            return super().cross_modal_tokens(B)
        none = self.position_t.expand(B, -1, -1, -1)[:, :, :0]  # (B, T, 0, D)
        return none, none if self.modal is None else self.modal.expand(B, -1, -1, -1), none

    def classify(self, Z, P, *M):
        """Table 5, "averaging the last RGB and pose tokens": side by side (departure 3)."""
        if self.modal is None:
            return self.head(torch.cat([Z.mean((1, 2)), P.mean((1, 2))], dim=-1))
        return super().classify(Z, P, *M)


def trace(s: Settings):
    """Shapes into and out of each stage, without memory or arithmetic."""
    shapes = {}

    def record(name, _, inputs, out):
        out = out if isinstance(out, tuple) else (out,)
        pair = (", ".join(str(tuple(each.shape)) for each in some) for some in (inputs, out))
        shapes[name] = " -> ".join(pair)

    with torch.device("meta"):
        model = D3T(s)
        video = torch.zeros(2, 3, s.frames, s.height, s.width, dtype=torch.uint8)
        joints = torch.zeros(2, s.frames, s.joints, 2)
    stages = r"trunk|norm_.*|embed_pose|head|blocks.0.(fuse|.*(search|offset|attention))"
    for name, module in model.named_modules():
        if re.fullmatch(stages, name):
            module.register_forward_hook(partial(record, name))
    model(video, joints, joints[..., 0] == 0)
    return shapes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=trace.__doc__)
    for f in fields(Settings):
        if f.type is not bool:
            flag = "--" + f.name.replace("_", "-")
            parser.add_argument(flag, type=f.type, default=f.default)
    for stage, shapes in trace(Settings(**vars(parser.parse_args()))).items():
        print(f"| `{stage}` | `{shapes}` |")
