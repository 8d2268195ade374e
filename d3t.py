"""D3T, the 3D deformable transformer: RGB video and body joints in one transformer, for action recognition.

Every component of *Cross-Modal Learning with 3D Deformable Attention for Action Recognition* (Kim, Ahn, Ko, ICCV
2023), bottom-up and in the paper's symbols. Read it beside Figure 2: each of its boxes is a class or function below.

    B     clips in the batch            F_a   trunk features for the joints       (B, C, T, H/2, W/2)
    T     frames of a clip              F_b   trunk features for the RGB tokens   (B, D, T, h, w)
    H, W  height and width, pixels      Z     RGB tokens                          (B, T, h*w, D)
    h, w  token grid, H/8 and W/8       P     pose tokens                         (B, T, R, D)
    C     width of the trunk            M     cross-modal tokens: RGB, CLS, pose  (B, T, 3, D)
    D     width of a token, 4C          Z_    Z~, the tokens that 3DTS selected   (B, T~, h~, w~, D)
    R     joints of all persons         X     [Z | M_RGB | M_CLS], the queries    (B, T*(h*w + 2), D)
    L     transformer blocks            X_    X~ = [Z~ | M_RGB | M_CLS], keys and values
    k     kernel of 3DTS, the 3D token search; T~ = T - k + 1, h~ and w~ likewise
    p     the reference points of 3DTS, in tokens (t, h, w); 3DTS reads Z at p + delta p
    M'    M'_CLS, the CLS token between 3D deformable attention and the fusion

Between the modules, Z, P and M have the layout (B, T, N, D), N tokens in each frame. n counts stride windows.

Where the paper is silent, this file decides as follows. The README's table "Where the paper is silent" gives for each
decision the reason and the alternative.
  - trunk: R(2+1)D-18 without temporal strides and without layer4; F_a is the output of layer1, F_b that of layer3
  - tokenizer: a joint at pixel x lies at x / 2 on F_a; sigma is one cell of F_a
  - video: normalised with the mean and deviation of Kinetics-400
  - pose tokens: no embedding of their own (`pose_embedding` adds one); the token of an absent joint has no content,
    but stays in the sequence: it is not masked
  - one LayerNorm on Z and on P where they are embedded; none before an attention, as in Eq. (6)
  - position embedding: a temporal table plus a spatial table
  - 3DTS: a depthwise convolution with kernel k and stride 1, then a pointwise one; one search for all heads
  - reference points: the centre of what the convolution sees, so an untrained search does not read the outer
    (k - 1)/2 tokens; on an axis shorter than k, k is the length of the axis
  - offsets: tanh(.) * (k - 1)/2 tokens, so a point stays inside the window its offset was computed from
  - MSA ends in a linear layer; an FFN is 4D wide inside; no dropout
  - stride attentions: they have the block of Eq. (6) and (7), too; "cross attention" is read as attention across
    modalities: all tokens of a window attend to all tokens of the same window
  - windows: of one size and one stride; the last one is moved back to end with the series; a token in several windows
    becomes the mean of its copies; joints are in one series, person after person, so a window may straddle persons
  - blocks: Z, P and M pass from block to block, each block has its own weights; in the last block only the modal
    tokens are queries of temporal stride attention, because the head reads nothing else
  - fusion: one linear layer on both M'_CLS; head: one linear layer on the mean of the modal tokens over T
  - Table 4: a disabled attention is skipped; without 3D deformable or joint attention, M'_CLS is not fused; row 2, 3D
    deformable attention alone, never looks at the joints, so M_pose is the same for every clip
  - Table 5: a single token takes all three roles; without modal tokens the head gets the mean RGB token and the mean
    pose token, concatenated
  - mixed precision: autocast; the points of 3DTS, the heat maps and the sum of Eq. (1) stay in float32
  - initial weights: see `D3T.initialize_weights`
"""

from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# ---- Backbone: R(2+1)D (Sec. 3.1, [45]) ----------------------------------------------------------------------------
def conv2plus1d(inputs: int, middle: int, outputs: int, stride: int = 1, k: int = 3) -> nn.Sequential:
    """A 3 x k x k convolution, factored into one over space and one over time; `stride` is spatial."""
    return nn.Sequential(
        nn.Conv3d(inputs, middle, (1, k, k), stride=(1, stride, stride), padding=(0, k // 2, k // 2), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False),
    )


class ResidualBlock(nn.Module):
    """Two factored convolutions and a shortcut, named as in torchvision's `BasicBlock`."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # With this width, conv1 has as many weights as a 3 x 3 x 3 convolution that is not factored.
        middle = inputs * outputs * 27 // (inputs * 9 + outputs * 3)
        self.conv1 = nn.Sequential(conv2plus1d(inputs, middle, outputs, stride), nn.BatchNorm3d(outputs))
        self.conv2 = nn.Sequential(conv2plus1d(outputs, middle, outputs), nn.BatchNorm3d(outputs))
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv3d(inputs, outputs, 1, stride=(1, stride, stride), bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        return F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)) + shortcut)


class Trunk(nn.Module):
    """R(2+1)D-18 up to layer3: video (B, 3, T, H, W) -> F_a (B, C, T, H/2, W/2), F_b (B, 4C, T, H/8, W/8).

    Sizes that are not a multiple of 8 round up. At C = 64 the parameters have the names and shapes of torchvision's
    `r2plus1d_18` (stem, layer1..3), so its weights load with `load_state_dict(weights, strict=False)`.
    """

    def __init__(self, C: int = 64):
        super().__init__()
        middle = max(1, 45 * C // 64)  # 45 at C = 64, as in torchvision
        self.stem = nn.Sequential(*conv2plus1d(3, middle, C, stride=2, k=7), nn.BatchNorm3d(C), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(ResidualBlock(C, C, 1), ResidualBlock(C, C, 1))
        self.layer2 = nn.Sequential(ResidualBlock(C, 2 * C, 2), ResidualBlock(2 * C, 2 * C, 1))
        self.layer3 = nn.Sequential(ResidualBlock(2 * C, 4 * C, 2), ResidualBlock(4 * C, 4 * C, 1))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        F_a = self.layer1(self.stem(video))  # (B, C, T, H/2, W/2)
        F_b = self.layer3(self.layer2(F_a))  # (B, 4C, T, H/8, W/8)
        return F_a, F_b


# ---- Pose modality: the Gaussian joint tokenizer (Sec. 3.1) --------------------------------------------------------
def joint_heatmaps(joints: Tensor, visible: Tensor, size: tuple[int, int], stride: int, sigma: float) -> Tensor:
    """Eq. (2): a Gaussian of height 1 around each joint, on a map of one cell every `stride` pixels.

    joints   (B, T, R, 2), x then y, in pixels of the input; the centre of the first pixel is (0, 0)
    visible  (B, T, R) bool; a joint that is not visible or not finite is absent: its map is zero
    size     height and width of the map
    sigma    standard deviation in cells of the map
    returns  (B, T, R, height, width)
    """
    present = visible & joints.isfinite().all(-1)
    joints = torch.where(present[..., None], joints, 0.0)  # NaN times zero would be NaN
    # A convolution with odd kernel k and padding (k - 1)/2 centres its cell i on pixel i * stride.
    x, y = (joints / stride).unbind(-1)
    j, i = (torch.arange(cells, device=joints.device) for cells in size)
    row = torch.exp(-((i - x[..., None]) ** 2) / (2 * sigma**2))  # (B, T, R, width)
    column = torch.exp(-((j - y[..., None]) ** 2) / (2 * sigma**2))  # (B, T, R, height)
    column = column * present[..., None]
    return column[..., :, None] * row[..., None, :]  # Eq. (2): the exponential of a sum is a product


def joint_tokens(F_a: Tensor, joints: Tensor, visible: Tensor, sigma: float) -> Tensor:
    """Eq. (1): for each joint the sum over the map of F_a times the joint's Gaussian, not normalised.

    F_a (B, C, T, H/2, W/2), joints and visible as in `joint_heatmaps` -> (B, T, R, C), float32 or wider.
    """
    with torch.autocast(F_a.device.type, enabled=False):  # 16 bits are too few for positions and for a sum over a map
        F_a = F_a.to(torch.promote_types(F_a.dtype, torch.float32))
        heatmaps = joint_heatmaps(joints.to(F_a.dtype), visible, F_a.shape[-2:], 2, sigma)  # (B, T, R, H/2, W/2)
        return torch.einsum("bcthw, btrhw -> btrc", F_a, heatmaps)  # Eq. (1)


# ---- 3D deformable attention (Sec. 3.2, Fig. 2b, Fig. 3) -----------------------------------------------------------
class AttentionBlock(nn.Module):
    """Eq. (6) and (7), in all three attentions: queries X (B, Q, D), keys and values X~ (B, S, D) -> (B, Q, D)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.Wq = nn.Linear(D, D, bias=False)
        self.Wk = nn.Linear(D, D, bias=False)
        self.Wv = nn.Linear(D, D, bias=False)
        self.Wo = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q or S, D / heads)

    def msa(self, X: Tensor, X_: Tensor) -> Tensor:
        """MSA(X Wq, X~ Wk, X~ Wv): multi-head attention, scaled by 1/sqrt(D / heads)."""
        q, k, v = self.split(self.Wq(X)), self.split(self.Wk(X_)), self.split(self.Wv(X_))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.Wo(out.transpose(1, 2).flatten(2))  # (B, Q, D)

    def forward(self, X: Tensor, X_: Tensor) -> Tensor:
        X = X + self.msa(X, X_)  # Eq. (6)
        return X + self.ffn(self.norm(X))  # Eq. (7)


def reference_points(grid: tuple[int, int, int], kernel: tuple[int, int, int]) -> Tensor:
    """The regular points p of Fig. 3, in tokens (t, h, w): (T~, h~, w~, 3), where T~ = T - k + 1, h~ and w~ likewise.

    Cell i of a convolution without padding sees the tokens i .. i + k - 1. Its point is their centre.
    """
    axes = [torch.arange(length - k + 1) + (k - 1) / 2 for length, k in zip(grid, kernel)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def sample_tokens(Z: Tensor, points: Tensor) -> Tensor:
    """Trilinear interpolation of Z (B, T, h, w, D) at points (B, ..., 3), in tokens (t, h, w) -> (B, ..., D)."""
    T, h, w = Z.shape[1:4]
    t, y, x = points.unbind(-1)
    # grid_sample wants x, y, z. With align_corners=False, -1 and 1 are the outer edges of the first and last cell. All
    # points lie inside the volume; padding with "border" keeps a rounded point at the edge from mixing in zeros.
    at = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1, (2 * t + 1) / T - 1], dim=-1)
    volume = Z.to(points.dtype).permute(0, 4, 1, 2, 3)  # (B, D, T, h, w)
    at = at.flatten(1, -2)[:, None, None]  # (B, 1, 1, N, 3), N points
    out = F.grid_sample(volume, at, padding_mode="border", align_corners=False)  # (B, D, 1, 1, N)
    return out[:, :, 0, 0].transpose(1, 2).unflatten(1, points.shape[1:-1])  # (B, ..., D)


class TokenSearch(nn.Module):
    """3DTS, the 3D token search of Eq. (3) and Fig. 3: Z (B, T, h, w, D) -> Z~ (B, T~, h~, w~, D).

    Offsets are in tokens (t, h, w), from -(k - 1)/2 to (k - 1)/2 with the k of that axis. Together the points reach
    every token, and none can leave the volume. With offsets of zero and odd k, Z~ is Z without its outer tokens.
    """

    def __init__(self, D: int, grid: tuple[int, int, int], k: int):
        super().__init__()
        kernel = tuple(min(k, length) for length in grid)
        self.conv = nn.Conv3d(D, D, kernel, groups=D)
        self.norm = nn.LayerNorm(D)
        self.offset = nn.Linear(D, 3)  # a pointwise Conv3D
        self.register_buffer("reference", reference_points(grid, kernel)[None], persistent=False)  # (1, T~, h~, w~, 3)
        self.register_buffer("reach", torch.tensor([(k - 1) / 2 for k in kernel]), persistent=False)  # (3,)

    def points(self, Z: Tensor) -> Tensor:
        """p + delta p, in tokens (t, h, w): (B, T~, h~, w~, 3), in float32 even under autocast."""
        x = self.conv(Z.permute(0, 4, 1, 2, 3))  # (B, D, T~, h~, w~)
        x = F.gelu(self.norm(x.permute(0, 2, 3, 4, 1)))  # (B, T~, h~, w~, D)
        with torch.autocast(Z.device.type, enabled=False):  # 16 bits would round a point
            offset = self.offset(x.to(self.offset.weight.dtype)).tanh() * self.reach  # delta p
            return self.reference + offset

    def forward(self, Z: Tensor) -> Tensor:
        return sample_tokens(Z, self.points(Z))  # Eq. (3)


class DeformableAttention(nn.Module):
    """3D deformable attention (Fig. 2b): Z (B, T, h*w, D) and [M_RGB, M_CLS] (B, T, 2, D) -> both, updated."""

    def __init__(self, D: int, heads: int, grid: tuple[int, int, int], k: int):
        super().__init__()
        self.grid = grid
        self.search = TokenSearch(D, grid, k)
        self.attention = AttentionBlock(D, heads)

    def forward(self, Z: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        T, h, w = self.grid
        Z_ = self.search(Z.unflatten(2, (h, w)))  # (B, T~, h~, w~, D)
        X = torch.cat([Z, M], dim=2).flatten(1, 2)  # Eq. (4), frame by frame: (B, T*(h*w + 2), D)
        X_ = torch.cat([Z_.flatten(1, 3), M.flatten(1, 2)], dim=1)  # Eq. (5): (B, T~*h~*w~ + 2T, D)
        X = self.attention(X, X_)  # Eq. (6), (7)
        return X.unflatten(1, (T, -1)).split([h * w, M.shape[2]], dim=2)  # Z, [M_RGB, M'_CLS]


# ---- Stride attention (Sec. 3.2, Fig. 4) ---------------------------------------------------------------------------
def window_index(length: int, window: int, stride: int) -> Tensor:
    """Positions in each of n windows, (n, window): one every `stride`, the last moved back to end with the series."""
    starts = [*range(0, length - window, stride), length - window]
    return torch.tensor(starts)[:, None] + torch.arange(window)


def take_windows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Windows of x (B, T, N, D) over frames (dim 1) or joints (dim 2): (B, n, window, N, D) or (B, n, T, window, D)."""
    return x.index_select(dim, index.flatten()).unflatten(dim, index.shape).movedim(dim, 1)


def mean_of_windows(windows: Tensor, index: Tensor, dim: int, length: int) -> Tensor:
    """The inverse of `take_windows`: each token becomes the mean of its copies, (B, T, N, D)."""
    copies = windows.movedim(1, dim).flatten(dim, dim + 1)  # (B, T, n*window, D) for joints
    shape = [*copies.shape[:dim], length, *copies.shape[dim + 1 :]]
    total = copies.new_zeros(shape).index_add_(dim, index.flatten(), copies)
    count = copies.new_zeros(length).index_add_(0, index.flatten(), copies.new_ones(index.numel()))
    return total / count.view([length] + [1] * (total.ndim - dim - 1))


class JointStrideAttention(nn.Module):
    """Local joint stride attention (Fig. 4a): P (B, T, R, D) and [M'_CLS, M_pose] (B, T, 2, D) -> both, updated.

    A window holds some joints in all frames and a copy of all modal tokens. Its tokens attend to each other.
    """

    def __init__(self, D: int, heads: int, joints: int, window: int, stride: int):
        super().__init__()
        self.attention = AttentionBlock(D, heads)
        self.register_buffer("index", window_index(joints, window, stride), persistent=False)  # (n, window)

    def forward(self, P: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        n, window = self.index.shape
        windows = take_windows(P, self.index, dim=2)  # (B, n, T, window, D)
        windows = torch.cat([windows, M[:, None].expand(-1, n, -1, -1, -1)], dim=3)  # (B, n, T, window + 2, D)
        tokens = windows.flatten(2, 3).flatten(0, 1)  # (B*n, T*(window + 2), D)
        windows = self.attention(tokens, tokens).view(windows.shape)
        joints, modal = windows.split([window, M.shape[2]], dim=3)
        return mean_of_windows(joints, self.index, dim=2, length=P.shape[2]), modal.mean(1)


class TemporalStrideAttention(nn.Module):
    """Temporal stride attention (Fig. 4b): X = [Z | P | M] (B, T, N, D) -> X, updated.

    A window holds all tokens of some frames. Its tokens attend to each other. With `queries`, only the last `queries`
    tokens of each frame attend to all of them and are returned: (B, T, queries, D).
    """

    def __init__(self, D: int, heads: int, frames: int, window: int, stride: int):
        super().__init__()
        self.attention = AttentionBlock(D, heads)
        self.register_buffer("index", window_index(frames, window, stride), persistent=False)  # (n, window)

    def forward(self, X: Tensor, queries: int | None = None) -> Tensor:
        windows = take_windows(X, self.index, dim=1)  # (B, n, window, N, D)
        asking = windows if queries is None else windows[:, :, :, -queries:]  # (B, n, window, queries, D)
        tokens = windows.flatten(2, 3).flatten(0, 1)  # (B*n, window*N, D)
        asked = self.attention(asking.flatten(2, 3).flatten(0, 1), tokens).view(asking.shape)
        return mean_of_windows(asked, self.index, dim=1, length=X.shape[1])


# ---- The model (Fig. 2a) -------------------------------------------------------------------------------------------
def setting(default, text: str, zero: bool = False):
    """A field of a dataclass with its line of help. A number has to be positive; with `zero` it may also be 0."""
    return field(default=default, metadata={"help": text, "zero": zero})


def check_fields(settings):
    """TypeError for a field of the wrong type (an int may stand for a float), ValueError for a number out of range."""
    for f in fields(settings):
        value, zero = getattr(settings, f.name), f.metadata["zero"]
        if type(value) is not f.type and (type(value), f.type) != (int, float):
            raise TypeError(f"{f.name} must be {f.type.__name__}, not {value!r}")
        if f.type in (int, float) and not (0 <= value < 2**63 and (value > 0 or zero)):  # nor NaN, inf
            raise ValueError(f"{f.name} must be {'0 or more' if zero else 'positive'} and below 2^63, not {value}")


@dataclass(frozen=True)
class Settings:
    """What defines a model. The defaults are the paper's, or ours where the paper is silent ("open")."""

    classes: int = setting(15, "actions to tell apart, from the data set")
    joints: int = setting(13, "R, joints of all persons, from the data set")
    frames: int = setting(12, "T, frames of a clip")
    height: int = setting(224, "H, pixels")
    width: int = setting(224, "W, pixels")
    channels: int = setting(64, "C, channels of the trunk; D = 4C (open)")
    blocks: int = setting(4, "L, transformer blocks (open)")
    heads: int = setting(4, "attention heads; at C = 64 they have 64 channels each, as in ViT (open)")
    kernel: int = setting(7, "k of the 3D token search, tokens")
    sigma: float = setting(1.0, "sigma of Eq. (2), cells of F_a (open)")
    # At R = 13, windows of 8 every 4 begin at 0, 4 and 5: the last one shares 7 of its 8 joints with the one before.
    joint_window: int = setting(8, "joints in a window of joint stride attention (open)")
    joint_stride: int = setting(4, "joints from one window to the next (open)")
    temporal_window: int = setting(4, "frames in a window of temporal stride attention (open)")
    temporal_stride: int = setting(2, "frames from one window to the next, about half a window (Fig. 7a)")
    modal_tokens: int = setting(3, "modal tokens of a frame: 3 cross-modal, 1 single, 0 none (Table 5)", zero=True)
    deformable_attention: bool = setting(True, "with 3D deformable attention (Table 4)")
    joint_attention: bool = setting(True, "with local joint stride attention (Table 4)")
    temporal_attention: bool = setting(True, "with temporal stride attention (Table 4)")
    pose_embedding: bool = setting(False, "add a learnable (T, R) embedding to the pose tokens (open)")

    def __post_init__(self):
        check_fields(self)
        if 4 * self.channels % self.heads:
            raise ValueError(f"D = 4 * channels = {4 * self.channels} does not divide by heads = {self.heads}")
        if self.kernel < 2:
            raise ValueError("kernel must be at least 2: with 1 a point could not move from its token")
        if self.modal_tokens not in (0, 1, 3):
            raise ValueError(f"modal_tokens must be 3, 1 or 0 (Table 5), not {self.modal_tokens}")
        if not (self.deformable_attention or self.temporal_attention):
            raise ValueError("without deformable_attention and temporal_attention no attention sees the RGB tokens")
        for kind, total in (("joint", "joints"), ("temporal", "frames")):
            low, window, high = (getattr(self, name) for name in (f"{kind}_stride", f"{kind}_window", total))
            if getattr(self, f"{kind}_attention") and not low <= window <= high:  # a larger stride would leave gaps
                raise ValueError(f"{kind}_window = {window} must be between {kind}_stride = {low} and {total} = {high}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """T, h, w: how many tokens Z has along each axis."""
        return self.frames, -(-self.height // 8), -(-self.width // 8)


class Block(nn.Module):
    """One of the L transformer blocks (Fig. 2a): Z (B, T, h*w, D), P (B, T, R, D), M (B, T, 3, D) -> the same shapes.

    M is [M_RGB, M_CLS, M_pose]. With a single token (Table 5), `rgb_cls`, `cls_pose` and `cls` are all that token and
    the other slices are empty. Without modal tokens all are empty.
    """

    def __init__(self, s: Settings, last: bool):
        super().__init__()
        D = 4 * s.channels
        self.queries = s.modal_tokens if last and s.modal_tokens else None
        self.deformable = self.joint = self.temporal = self.fuse = None
        if s.deformable_attention:
            self.deformable = DeformableAttention(D, s.heads, s.grid, s.kernel)
        if s.joint_attention:
            self.joint = JointStrideAttention(D, s.heads, s.joints, s.joint_window, s.joint_stride)
        if s.deformable_attention and s.joint_attention and s.modal_tokens:
            self.fuse = nn.Linear(2 * D, D)
        if s.temporal_attention:
            self.temporal = TemporalStrideAttention(D, s.heads, s.frames, s.temporal_window, s.temporal_stride)

    def forward(self, Z: Tensor, P: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rgb_cls, pose = M[:, :, :2], M[:, :, 2:]  # [M_RGB, M_CLS], [M_pose]
        if self.deformable is not None:
            Z, rgb_cls = self.deformable(Z, rgb_cls)  # Z, [M_RGB, M'_CLS]
        cls_pose = torch.cat([rgb_cls, pose], dim=2)[:, :, -2:]  # the last two: [M'_CLS, M_pose]
        if self.joint is not None:
            P, cls_pose = self.joint(P, cls_pose)  # P, [M'_CLS, M_pose]
        cls, pose = cls_pose[:, :, :1], cls_pose[:, :, 1:]  # the second M'_CLS, M_pose
        if self.fuse is not None:
            cls = self.fuse(torch.cat([rgb_cls[:, :, -1:], cls], dim=-1))  # M'_CLS of both attentions -> M_CLS
        M = torch.cat([rgb_cls[:, :, :-1], cls, pose], dim=2)  # [M_RGB, M_CLS, M_pose]
        if self.temporal is None:
            return Z, P, M
        X = torch.cat([Z, P, M], dim=2)  # (B, T, h*w + R + 3, D)
        if self.queries is not None:  # the last block: the head reads the modal tokens alone
            return Z, P, self.temporal(X, self.queries)
        return self.temporal(X).split([Z.shape[2], P.shape[2], M.shape[2]], dim=2)


class D3T(nn.Module):
    """The 3D deformable transformer (Fig. 2a).

    video    (B, 3, T, H, W) uint8, RGB; or float, normalised by the caller: (v - model.mean) / model.std, v in 0..255
    joints   (B, T, R, 2) float, x then y, in pixels of the video
    visible  (B, T, R) bool; the coordinates of a joint that is not visible have no effect
    returns  logits (B, classes)
    raises   TypeError for what is not a tensor, ValueError for a wrong dtype or a shape that differs from the settings
    """

    def __init__(self, settings: Settings):
        super().__init__()
        s = self.settings = settings
        T, h, w = s.grid
        D = 4 * s.channels
        self.trunk = Trunk(s.channels)

        self.position_t = nn.Parameter(torch.zeros(T, 1, D))
        self.position_s = nn.Parameter(torch.zeros(1, h * w, D))
        self.norm_rgb = nn.LayerNorm(D)

        self.has_pose = s.joint_attention or s.temporal_attention or not s.modal_tokens
        if self.has_pose:  # row 2 of Table 4, 3D deformable attention alone, never looks at the joints
            # No bias: an absent joint is exactly zero here. With a small bias, LayerNorm would divide by almost zero,
            # and these tokens would get a very large gradient.
            self.embed_pose = nn.Linear(s.channels, D, bias=False)
            self.norm_pose = nn.LayerNorm(D)
            self.position_p = nn.Parameter(torch.zeros(T, s.joints, D)) if s.pose_embedding else None

        self.modal = nn.Parameter(torch.zeros(T, s.modal_tokens, D)) if s.modal_tokens else None
        self.blocks = nn.ModuleList(Block(s, last=i + 1 == s.blocks) for i in range(s.blocks))
        self.head = nn.Linear((s.modal_tokens or 2) * D, s.classes)

        mean, std = torch.tensor([[0.432, 0.395, 0.376], [0.228, 0.221, 0.217]]) * 255  # of Kinetics-400
        self.register_buffer("mean", mean.view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1, 1), persistent=False)
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Conv3d):  # as in R(2+1)D: a ReLU then keeps the variance of the gradient
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):  # ViT's normal(0.02) learns far slower at C = 16
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Conv3d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, TokenSearch):  # the search starts at the regular grid
                nn.init.kaiming_normal_(module.conv.weight, nonlinearity="linear")  # depthwise: the fan is k^3
                nn.init.zeros_(module.offset.weight)
        attentions = [module for module in self.modules() if isinstance(module, AttentionBlock)]
        for attention in attentions:  # as in GPT-2: what all residual branches add does not grow with their number
            for last in (attention.Wo, attention.ffn[2]):
                last.weight.data /= (2 * len(attentions)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("position", "modal")):
                nn.init.trunc_normal_(parameter, std=0.02)  # as in ViT [18]

    def forward(self, video: Tensor, joints: Tensor, visible: Tensor) -> Tensor:
        self.check(video, joints, visible)
        if not video.is_floating_point():
            video = (video - self.mean) / self.std
        F_a, F_b = self.trunk(video)  # (B, C, T, H/2, W/2), (B, D, T, h, w)

        # RGB modality (Sec. 3.1)
        Z = F_b.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, h*w, D)
        Z = self.norm_rgb(Z + self.position_t + self.position_s)

        # Pose modality (Sec. 3.1)
        P = Z[:, :, :0]  # (B, T, 0, D)
        if self.has_pose:
            P = joint_tokens(F_a, joints, visible, self.settings.sigma)  # (B, T, R, C)
            P = self.norm_pose(self.embed_pose(P))  # (B, T, R, D)
            if self.position_p is not None:  # after the norm, which would blow it up for an absent joint
                P = P + self.position_p

        # Cross-modal tokens (Sec. 3.2)
        M = Z[:, :, :0] if self.modal is None else self.modal.expand(Z.shape[0], -1, -1, -1)  # (B, T, 3, D)
        for block in self.blocks:
            Z, P, M = block(Z, P, M)

        if self.modal is not None:
            return self.head(M.mean(1).flatten(1))  # (B, T, 3, D) -> (B, 3 * D) -> (B, classes)
        return self.head(torch.cat([Z.mean((1, 2)), P.mean((1, 2))], dim=-1))  # Table 5, "No tokens"

    def check(self, video: Tensor, joints: Tensor, visible: Tensor):
        s = self.settings
        for name, tensor, clip in (
            ("video", video, (3, s.frames, s.height, s.width)),
            ("joints", joints, (s.frames, s.joints, 2)),
            ("visible", visible, (s.frames, s.joints)),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch tensor, not {type(tensor).__name__}")
            expected = (*video.shape[:1], *clip)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the settings ask for {expected}")
        if video.dtype not in (torch.uint8, self.mean.dtype) and not torch.is_autocast_enabled(video.device.type):
            raise ValueError(f"video must be uint8, or {self.mean.dtype} as the weights are, not {video.dtype}")
        if visible.dtype != torch.bool:
            raise ValueError(f"visible must be bool, not {visible.dtype}")
