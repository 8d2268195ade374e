"""Write a checkpoint as ONNX and compare its logits with the model's.

python -m tools.export runs/pennaction/best.pt d3t.onnx    # takes onnx, onnxscript, onnxruntime
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import data
from tools.common import tool
from tools.explain import load_model

NAMES = ["video", "joints", "visible"]


def random_clips(s, B: int) -> tuple:
    """Inputs of a forward, with a hidden joint and one that is NaN."""
    video = torch.randint(0, 256, (B, 3, s.frames, s.height, s.width), dtype=torch.uint8)
    joints = torch.rand(B, s.frames, s.joints, 2) * torch.tensor([s.width, s.height])
    visible = torch.ones(B, s.frames, s.joints, dtype=torch.bool)
    visible[0, 0, 0], joints[0, 0, 1] = False, torch.nan
    return video, joints, visible


def export(model, path: Path):
    """Write the model, from an example of two clips: a batch of one would be a constant."""
    data.need("onnxscript", "onnx onnxscript", "to write ONNX")
    how = {"input_names": NAMES, "dynamic_shapes": [{0: torch.export.Dim("batch")}] * 3}
    clips = random_clips(model.settings, 2)
    torch.onnx.export(model, clips, path, opset_version=20, **how)  # GridSample takes a volume


@torch.no_grad()
def compare(model, path: Path) -> float:
    """The largest difference of logits, for 1, 2 and 5 clips."""
    session = data.need("onnxruntime", "onnxruntime", "to compare").InferenceSession(path)
    largest = []
    for clips in (random_clips(model.settings, B) for B in (1, 2, 5)):
        inputs = {name: each.numpy() for name, each in zip(NAMES, clips)}
        (logits,) = session.run(None, inputs)
        largest.append(np.abs(logits - model(*clips).numpy()).max())
    return max(largest)


@tool("tools.export")
def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    options = parser.parse_args(words)
    model = load_model(options.checkpoint)[0]
    export(model, options.onnx)
    print(f"{options.onnx}: largest difference of logits {compare(model, options.onnx):.1e}")


if __name__ == "__main__":
    sys.exit(main())
