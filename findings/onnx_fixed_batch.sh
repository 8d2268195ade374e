#!/usr/bin/env bash
# torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2 (Python 3.11, CPU).
#
# Guess: torch.onnx.export with a dynamic batch either writes a file with a dynamic batch, or raises, as
# torch.export.export does with the same arguments where a model takes len(x) of an input.
# Seen: it raises nothing, warns of nothing and reports success at each stage, and the file takes the two
# clips of the example alone: onnxruntime then refuses any other batch. x.shape[0] in place of len(x) keeps
# the batch dynamic. So read the input shapes of the file, not the exporter's report. Output:
#
#     len(x)      torch.export: UserError    torch.onnx.export: [[2, 3], [2, 5]]
#     x.shape[0]  torch.export: ok           torch.onnx.export: [['batch', 3], ['batch', 5]]
#
# Exit status 0: as described. 1: something has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install -q torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/run.py" <<'PYTHON'
import sys
import warnings

import torch

warnings.simplefilter("ignore")


class Sum(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x, y):
        n = self.count(x)
        assert [tuple(x.shape), tuple(y.shape)] == [(n, 3), (n, 5)]
        return x.sum(1) + y.sum(1)


def shapes(program):
    inputs = program.model_proto.graph.input
    dims = [each.type.tensor_type.shape.dim for each in inputs]
    return [[dim.dim_param or dim.dim_value for dim in each] for each in dims]


found = []
for name, count in (("len(x)", len), ("x.shape[0]", lambda x: x.shape[0])):
    batch = torch.export.Dim("batch")
    model, example = Sum(count).eval(), (torch.ones(2, 3), torch.ones(2, 5))
    how = {"dynamic_shapes": ({0: batch}, {0: batch})}
    try:
        torch.export.export(model, example, **how)
        plain = "ok"
    except Exception as error:
        plain = type(error).__name__
    program = torch.onnx.export(model, example, input_names=["x", "y"], verbose=False, **how)
    found.append((plain, shapes(program)))
    print(f"{name:12}torch.export: {plain:13}torch.onnx.export: {found[-1][1]}")
expected = [("UserError", [[2, 3], [2, 5]]), ("ok", [["batch", 3], ["batch", 5]])]
sys.exit(found != expected)
PYTHON
"$folder/environment/bin/python" "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
