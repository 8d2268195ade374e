"""Draw the model (Fig. 2a) with the names in d3t.py and the shapes at the paper's size."""

import argparse
import sys
from pathlib import Path

import data
from tools.common import tool

SIZE = {"frames": 12, "height": 224, "width": 224, "joints": 13, "channels": 64, "kernel": 7}
SIZE |= {"blocks": 4, "classes": 15, "joint_window": 8, "temporal_window": 4}  # of Settings
T, H, W, R, C, k, L, classes, r, t = SIZE.values()
D, h, w = 4 * C, H // 8, W // 8
SHAPES = {"video": (3, T, H, W), "F_a": (C, T, H // 2, W // 2), "F_b": (D, T, h, w)}  # of one clip
SHAPES |= {"joints": (T, R, 2), "joint tokens": (T, R, C), "Z": (T, h * w, D), "P": (T, R, D)}
SHAPES |= {"Z~": (T - k + 1, h - k + 1, w - k + 1, D), "mean of M": (3 * D,), "logits": (classes,)}
SHAPES |= dict.fromkeys(("M_RGB", "M_CLS", "M_pose"), (T, 1, D))
TEXT = {name: f"(B, {', '.join(map(str, shape))})" for name, shape in SHAPES.items()}
GREY, BLUE, PURPLE = "#444444", "#0072B2", "#CC79A7"
LANES = {  # x, colour (Okabe and Ito: for colour-blind readers), y where its arrows begin and end
    "Z": (110, BLUE, 194, 214, 260, 304, 422, 585, 631, 656),
    "M_RGB": (300, "#56B4E9", 194, 214, 260, 304, 422, 585, 631, 678),
    "M_CLS": (450, PURPLE, 194, 214, 260, 304, 422, 452, 498, 522, 568, 585, 631, 678),
    "M_pose": (600, "#E69F00", 194, 214, 260, 452, 498, 585, 631, 678),
    "P": (790, "#D55E00", 194, 214, 260, 452, 498, 585, 631, 656),
}


def draw(plots, path: Path):
    """Draw in pixels of a README 900 wide, y pointing down. The file is 1800 wide."""
    figure = plots.Figure((12, 9.8), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xlim=(0, 900), ylim=(735, 0))

    def text(x, y, words, side="center", color="black"):
        code = {} if " " in words else {"family": "monospace", "weight": "bold"}
        axes.text(x, y, words, size=12, ha=side, va="center", color=color, **code)

    def box(x, y, width, *lines, face="#ECECEC"):
        lines += (TEXT[lines[0]],) if lines[0] in TEXT else ()
        high = 5 + 9 * len(lines)  # half of the height
        axes.bar(x, 2 * high, width, y - high, fc=face, ec=GREY, lw=1.5)
        for i, words in enumerate(lines):
            text(x, y - high + 14 + 18 * i, words, color="white" if face == BLUE else "black")

    def arrow(x, y, to_x, to_y, color=GREY, width=1.6):
        head = {"head_width": 3 * width + 5, "head_length": 9, "length_includes_head": True}
        axes.arrow(x, y, to_x - x, to_y - y, width=width, color=color, lw=0, **head)

    axes.bar(450, 380, 884, 276, fc="none", ec=GREY, lw=1.5, ls="--")
    text(695, 294, f"Block, × L (L = {L})")
    box(110, 33, 180, "video", face="white")
    box(790, 33, 180, "joints", face="white")
    box(110, 105, 180, "Trunk", "R(2+1)D-18, Sec. 3.1")
    box(790, 105, 180, "joint_tokens", f"Eq. (1), (2): {TEXT['joint tokens']}")
    box(110, 180, 180, "+ position embedding")
    box(450, 180, 440, "modal tokens: learned, three for each frame")
    box(790, 180, 180, f"Linear {C} → {D}")
    box(275, 363, 510, "DeformableAttention", "Fig. 2b, Eq. (3) to (7)", *" " * 4)
    box(132, 380, 200, "TokenSearch", f"Eq. (3), kernel {k}: Z~", TEXT["Z~"])
    box(389, 380, 260, "AttentionBlock", "queries Z, M_RGB, M_CLS", "keys, values Z~, M_RGB, M_CLS")
    box(632, 475, 496, "JointStrideAttention", f"Fig. 4a: windows of {r} joints in all frames")
    box(450, 545, 130, "fuse", f"Linear {2 * D} → {D}")
    box(450, 608, 860, "TemporalStrideAttention", f"Fig. 4b: windows of {t} frames, all tokens")
    box(450, 701, 360, f"mean over T, concatenated {TEXT['mean of M']}", "head")
    box(790, 701, 180, "logits", face="white")
    for name, (x, color, *ys) in LANES.items():
        box(x, 237, 136, name, face=color)
        for y, to_y in zip(ys[::2], ys[1::2]):
            arrow(x, y, x, to_y, color, 5)
    axes.plot((450, 350, 350, 375), (431, 431, 545, 545), c=PURPLE, lw=4.8)
    arrow(360, 545, 385, 545, PURPLE, 5)
    for x, y, to_x in ((200, 105, 700), (232, 380, 259), (630, 701, 700)):
        arrow(x, y, to_x, y)
    for x in (110, 790):
        arrow(x, 56, x, 82)
        arrow(x, 128, x, 166)
        text(x + 14, 644, "next block", "left")
    text(450, 94, f"F_a {TEXT['F_a']}")
    text(120, 146, f"F_b {TEXT['F_b']}", "left")
    text(464, 434, "M'_CLS", "left")
    text(464, 509, "M'_CLS", "left")
    figure.savefig(path)
    data.need("PIL.Image", "pillow", "to draw").open(path).convert("RGB").quantize(64).save(path)


@tool("tools.picture")
def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default="assets/model.png", help="[assets/model.png]")
    path = parser.parse_args(words).out
    draw(data.need("matplotlib.figure", "matplotlib", "to draw the picture"), path)


if __name__ == "__main__":
    sys.exit(main())
