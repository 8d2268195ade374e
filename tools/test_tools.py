"""Tests of the tools. Each docstring names the bug that the test catches."""

import argparse
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import time
from functools import partial
from math import ceil, prod

import numpy as np
import pytest
import torch

import data
import test_d3t
import train
from d3t import D3T, AttentionBlock, Settings, TokenSearch
from test_d3t import SMALL, checkpoint, clip_for, close, loop_search, loop_starts, python, randomize, small, weights
from tools import ablate, bench, check, explain, search

fit, penn = test_d3t.fit, test_d3t.penn  # fixtures, by assignment: the arguments of tests would hide imported names
CPU = torch.device("cpu")


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


def loop_place_back(given, points, grid):
    """Every value goes to the tokens within one step of its point, in the shares in which they were read there."""
    back = np.zeros(grid)
    for o in np.ndindex(given.shape):
        for n in np.ndindex(back.shape):
            back[n] += given[o] * np.prod([max(0.0, 1 - abs(a - c)) for a, c in zip(points[o], n)])
    return back


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_explanation_is_the_attention_of_the_modal_tokens(modal):
    """Catches: maps of other weights or tokens than the model attends with, or that lose a share on the way back."""
    s = small(modal_tokens=modal)
    model, kept = randomize(D3T(s)), {}
    for module in model.modules():
        if isinstance(module, (AttentionBlock, TokenSearch)):
            module.register_forward_pre_hook(
                lambda module, inputs: kept.update({module: [x.detach().numpy() for x in inputs]})
            )
    video, joints, visible = clip_for(s)
    inputs = ((video - model.mean) / model.std).double(), joints.double(), visible
    said, two = explain.explain(model, *inputs), min(modal, 2)
    assert torch.equal(said.logits, model(*inputs))
    T, R, per_token = s.frames, s.joints, prod(s.grid[1:])

    def given(attention, b, asks):  # by the tokens of a frame from `asks` on: (frames, tokens that ask, keys)
        X, X_ = (x[b] for x in kept[attention])
        return loop_weights(X, X_, weights(attention), s.heads).reshape(asks, -1, len(X_))

    for (i, block), b in ((pair, b) for pair in enumerate(model.blocks) for b in range(2)):
        selected, points = loop_search(kept[block.deformable.search][0][b], weights(block.deformable.search), s.kernel)
        close(said.points[b, i], points)
        share = given(block.deformable.attention, b, T)[:, -two:].mean((0, 1))[: points[..., 0].size]
        close(said.selected[b, i], share.reshape(points.shape[:3]))
        close(said.tokens[b, i], loop_place_back(share.reshape(points.shape[:3]), points, s.grid))

        shares, starts = {place: [] for place in np.ndindex(T, R)}, loop_starts(R, s.joint_window, s.joint_stride)
        for n, start in enumerate(starts):
            share = given(block.joint.attention, b * len(starts) + n, T)[:, -two:].mean((0, 1)).reshape(T, -1)
            for t, r in np.ndindex(T, s.joint_window):
                shares[t, start + r].append(share[t, r])
        close(said.joints[b, i].flatten(), [np.mean(shares[place]) for place in np.ndindex(T, R)])

        rows, starts = {t: [] for t in range(T)}, loop_starts(T, s.temporal_window, s.temporal_stride)
        for n, start in enumerate(starts):
            share = given(block.temporal.attention, b * len(starts) + n, s.temporal_window)[:, -modal:].mean(1)
            for t, row in enumerate(share.reshape(s.temporal_window, s.temporal_window, -1).sum(-1)):
                rows[start + t].append(np.pad(row, (start, T - start - s.temporal_window)))
        close(said.frames[b, i], [np.mean(rows[t], 0) for t in range(T)])
        asking = modal if modal and i == 1 else per_token + R + modal
        assert kept[block.temporal.attention][0].shape[1] == s.temporal_window * asking


def test_explanation_of_an_ablation():
    """Catches: maps invented for a disabled attention, hooks that stay, averages of batch norms that move."""
    s = small(joint_attention=False, temporal_attention=False)
    model, clip = D3T(s).eval(), clip_for(s)
    expected = model(*clip)
    model._compiled_call_impl = lambda *_: pytest.fail("a compiled graph has no hooks")  # as model.compile() sets it
    said = explain.explain(model, *clip)
    assert said.joints is None and said.frames is None and said.points.shape == (2, 2, 3, 1, 3, 3)
    close(said.logits, expected, 1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="eval"):
        explain.explain(model.train(), *clip)


def test_pictures(fit, tmp_path, capsys):
    """Catches: pictures or arrays of another clip than they name, a flag that is ignored."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, for pictures")
    assert fit("--epochs 1 --blocks 2")[0] == 0
    assert explain.main([f"{tmp_path}/run/best.pt", "--clips", "0", "7", "--out", f"{tmp_path}/out"]) == 0
    names = [f"test-{i}{ending}" for i in (0, 7) for ending in ("-joints.png", "-overview.png", "-tokens.png", ".npz")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    saved, clip = checkpoint(tmp_path / "run", "best.pt"), data.Dataset(data.synthetic(1, 8), "test", 4, 16, 16)[7]
    model = D3T(Settings(**saved["settings"])).eval()
    model.load_state_dict(saved["model"])
    share = model(clip["video"][None], clip["joints"][None], clip["visible"][None]).softmax(-1)[0]
    guess = f"test 7: {data.SYNTHETIC_ACTIONS[share.argmax()]} ({share.max():.1%})"
    assert f"{guess}, label {data.SYNTHETIC_ACTIONS[clip['label']]}" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "test-7.npz") as arrays:
        assert arrays["label"] == clip["label"] and arrays["frames"].shape == (2, 4, 4)
        close(arrays["probabilities"], share, 1e-5)


def test_maps_and_points_lie_on_the_pixels(tmp_path, monkeypatch):
    """Catches: points with x and y exchanged or in another frame, maps that are shifted against the frame."""
    plt, drawn = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib, for pictures"), []
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "close", drawn.append)
    points = np.array([[0.4, 1.0, 2.0], [0.6, 0.5, 1.5]]).reshape(1, 1, 1, 2, 3)  # t, h, w in tokens
    item = {"video": torch.zeros(3, 2, 16, 24, dtype=torch.uint8)}
    explain.draw_tokens(plt, item, {"tokens": np.ones((1, 2, 2, 3)), "points": points}, tmp_path / "tokens.png")
    first, second = drawn[0].axes[:2]
    assert [axis.collections[0].get_offsets().tolist() for axis in (first, second)] == [[[16, 8]], [[12, 4]]]
    assert [*first.images[1].get_extent()] == [-4, 20, 12, -4]
    assert (first.get_xlim(), first.get_ylim()) == ((-0.5, 23.5), (15.5, -0.5))


def test_what_explain_refuses(fit, tmp_path, capsys):
    """Catches: a traceback for a wrong clip, folder or checkpoint, or a checkpoint of other data."""
    assert fit("--epochs 1")[0] == 0
    best, saved = tmp_path / "run" / "best.pt", checkpoint(tmp_path / "run", "best.pt")
    torch.save(saved | {"model": {k: v for k, v in saved["model"].items() if k != "head.bias"}}, tmp_path / "lacks.pt")
    for name, value in (("heads", 3), ("joints", 9), ("classes", 5)):
        torch.save(saved | {"settings": saved["settings"] | {name: value}}, tmp_path / f"{name}.pt")
    for words, said in (
        (f"{best} --clips 11", "0 to 10"),
        (f"{best} --clips -1", "0 to 10"),
        (f"{tmp_path}/gone.pt", "gone.pt"),
        (f"{tmp_path}/lacks.pt", "head.bias"),
        (f"{tmp_path}/heads.pt", "heads = 3"),
        (f"{tmp_path}/joints.pt", "9 joints"),
        (f"{tmp_path}/classes.pt", "5 classes"),
        (f"{best} --out {best}", "best.pt"),
        (f"{best} --data pennaction --root {tmp_path}", "Penn Action"),
    ):
        assert explain.main(words.split()) == 2, words
        errors = capsys.readouterr().err
        assert said in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("off", ["", "deformable", "joint", "temporal"])
@pytest.mark.parametrize("modal", [3, 1, 0])
def test_plain_version_of_the_benchmark(modal, off):
    """Catches: a plain version that computes something else, or that leaves out tokens of the last block."""
    s = small(modal_tokens=modal, pose_embedding=not modal, **({f"{off}_attention": False} if off else {}))
    batch = bench.make_batch(s, 2, CPU)
    ours, plain = (bench.Run(bench.Version(s, plain=plain), CPU) for plain in (False, True))
    expected = ours.forward(batch)
    assert expected.std() > 0.01 and torch.allclose(plain.forward(batch), expected, atol=1e-5)
    assert plain.model.blocks[-1].queries is None


def equations(s: Settings) -> dict[str, float]:
    """Operations of a forward of one clip by part, from the equations."""
    (T, h, w), D, modal = s.grid, 4 * s.channels, min(2, s.modal_tokens)

    def attention(n, m):  # Wq, Wo of n and Wk, Wv of m tokens; n x m twice in Eq. (6); the FFN of Eq. (7)
        return 4 * D**2 * (n + m) + 4 * D * n * m + 16 * D**2 * n

    kernel = [min(s.kernel, n) for n in s.grid]
    selected = prod(n - k + 1 for n, k in zip(s.grid, kernel))
    joint, frame = T * (s.joint_window + modal), h * w + s.joints + s.modal_tokens
    joint_windows = len(loop_starts(s.joints, s.joint_window, s.joint_stride))
    temporal_windows = len(loop_starts(T, s.temporal_window, s.temporal_stride))
    window, last = (s.temporal_window * n for n in (frame, s.modal_tokens or frame))  # queries, in the last block
    linear = T * s.joints * s.channels * D + (s.modal_tokens or 2) * D * s.classes  # after the tokenizer; the head
    return {
        "joint tokenizer": 2 * T * s.joints * s.channels * ceil(s.height / 2) * ceil(s.width / 2),
        "token search": s.blocks * selected * (2 * D * prod(kernel) + 6 * D),
        "deformable attention": s.blocks * attention(T * (h * w + modal), selected + T * modal),
        "joint attention": s.blocks * joint_windows * attention(joint, joint),
        "temporal attention": temporal_windows * ((s.blocks - 1) * attention(window, window) + attention(last, window)),
        "rest": 2 * (linear + s.blocks * T * 2 * D * D * (modal > 0)),  # and the fusion
    }


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_operations_of_the_benchmark(modal):
    """Catches: a part that is not counted or counted twice, or tokens that the last block does not compute."""
    s = small(blocks=3, modal_tokens=modal)
    counted = bench.operations(s, 1, CPU)
    assert {name: counted[name] for name in equations(s)} == equations(s)
    assert counted["trunk"] > 0 and counted["all"] == counted["trunk"] + sum(equations(s).values())


def test_turns_of_the_benchmark():
    """Catches: the warm-up counted as a round, versions that do not alternate, a mean in place of the median."""
    called, parts = [], iter([{"part": seconds} for seconds in (100.0, 1.0, 2.0, 9.0)])
    work = {"a": {"x": lambda: called.append("a")}, "b": {"x": lambda: called.append("b"), "y": lambda: next(parts)}}
    times = bench.take_turns(bench.parse_args(["--rounds", "3", "--device", "cpu"])[0], work)
    assert called == ["a", "b"] * 4 and times["b", "part"] == 2.0
    assert set(times) == {("a", "x"), ("b", "x"), ("b", "y"), ("b", "part")}


def test_flags_of_the_benchmark(capsys):
    """Catches: a size of zero that is taken for the default, settings that cannot be, a flag of the model ignored."""
    for flag in ("--batch", "--batches", "--matrix", "--rounds", "--clips", "--sigma"):
        with pytest.raises(SystemExit):
            bench.parse_args([flag, "0"])
        assert flag[2:] in capsys.readouterr().err.splitlines()[-1]
    several = bench.parse_args(["--preset", "tiny", "--frames", "5", "--no-joint-attention"])[1]
    assert [(s.joints, s.frames, s.channels, s.joint_attention) for s in several] == [(13, 5, 16, 0), (50, 5, 16, 0)]


def test_figures_of_the_benchmark(monkeypatch, capsys):
    """Catches: figures that ignore the batch, a ratio upside down, a step counted as one forward, a wrong limit."""
    seconds = {"product": 0.5, "forward": 2.0, "step": 8.0, "trunk": 1.0}
    measured = {(name, kind): n * took for name, n in (("off", 1), ("plain", 4)) for kind, took in seconds.items()}
    monkeypatch.setattr(bench, "take_turns", lambda *_: measured)
    monkeypatch.setattr(bench, "operations", lambda s, clips, _: {"trunk": 2e9, "joint attention": 0, "all": 5e9})
    held = {False: 3, True: 2}  # GiB of a clip, without and with checkpoints
    monkeypatch.setattr(bench, "step_memory", lambda v, clips, _: (1.5 + held[v.checkpoints] * clips) * 2**30)
    flags = "--device cpu --amp off --batch 2 --matrix 1000 --preset tiny --joints 13"
    options, (s,) = bench.parse_args(flags.split())
    for section in (bench.table, bench.plain, bench.memory):
        section(s, options)
    printed = " | ".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    for expected in (
        "off | product of matrices, TFLOP/s 0.00 | forward, ms a clip 1000.0 | clips/s 1.000",
        "2.50 GFLOP, of product 62.5% | step, ms a clip 4000.0 | clips/s 0.250 | times as fast as off 1.00",
        "7.50 GFLOP, of product 46.9% | trunk, ms a clip 500.0 | 1.00 GFLOP, of product 50.0% | peak memory",
        "of the step, GiB 7.50 | plain off | product of matrices, TFLOP/s 0.00 0.00 | forward, ms a clip 4000.0 1000.0",
        "clips/s 0.250 1.000 | times as fast as plain 1.00 4.00 | 2.50 GFLOP, of product 62.5% 62.5%",
        "one clip, GiB 4.50 4.50 | each further clip, GiB 3.00 3.00 | clips in 32 GiB 10 10",
        "one clip, --checkpointing, GiB 3.50 3.50 | each further clip, GiB 2.00 2.00 | clips in 32 GiB 15 15",
    ):
        assert expected in printed


def test_memory_of_the_benchmark():
    """Catches: a peak without AdamW's averages or the gradients, a batch that takes no memory, checkpoints ignored."""
    s = small(width=64, height=64)
    one, two = (bench.step_memory(bench.Version(s), clips, CPU) for clips in (1, 2))
    assert 4 * 4 * sum(p.numel() for p in D3T(s).parameters()) < one < two
    assert bench.step_memory(bench.Version(s, checkpoints=True), 2, CPU) < two
    assert bench.step_memory(bench.Version(s, plain=True), 2, CPU) > two


def test_sections_of_the_benchmark(tmp_path, monkeypatch, capsys):
    """Catches: a section that fails, a loader whose clips cannot be read, a wrong exponent, a disabled part drawn."""
    for package in ("PIL", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}, for the clips and the plot")
    read = set()  # with what the frames were read
    monkeypatch.setattr(bench, "SWEEPS", {"frames": (4, 8), "resolution": (16, 32), "joints": (8, 16)})
    monkeypatch.setattr(bench, "step_memory", lambda *_: 2**30)  # it has a test of its own
    monkeypatch.setattr(train, "keep_memory", lambda: None)  # it would last for the life of this process
    monkeypatch.setattr(data, "synthetic", partial(data.synthetic, 1))  # with one clip in training
    for name, function, said in (("bare_decoding", bench, "bare"), ("read_jpegs", data, "cropped")):
        spied = partial(lambda work, said, *args: (read.add(said), work(*args))[1], getattr(function, name), said)
        monkeypatch.setattr(function, name, spied)
    flags = "--preset tiny --channels 4 --height 16 --width 24 --joints 8 --rounds 1 --matrix 64 --amp off"
    flags += f" --clips 2 --workers 0 --out {tmp_path} --no-temporal-attention"
    for section in ("loader", "scaling", "variants"):
        assert bench.main([section, *flags.split()]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert read == {"bare", "cropped"}
    (loaded,) = (line for line in lines if line.startswith("6 frames of a JPEG clip"))
    assert all(float(figure) > 0 for figure in loaded.split()[-3:])
    grown = [line.split()[-1] for line in lines if line.startswith("joint tokenizer")]
    assert grown == ["1.00", "2.00", "1.00"] and not any(line.startswith("temporal attention") for line in lines)
    assert (tmp_path / "scaling-8.png").stat().st_size > 10_000


def test_a_run_of_an_ablation_that_fails(tmp_path, monkeypatch):
    """Catches: parallel runs that each use all cores, the reason of a failure lost, other runs started after it."""
    started = []

    def run(command, env, stdout, stderr):
        started.append(command)
        time.sleep(0.05)
        stderr.write(f"starts\n{env['OMP_NUM_THREADS']} threads\n")
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(ablate.subprocess, "run", run)
    with pytest.raises(train.UsageError, match="a/seed-. ended with status 3: 2 threads"):
        ablate.train_rows([ablate.Row("a", "--a")], tmp_path, [], seeds=[*range(10)], jobs=3)
    time.sleep(0.3)
    assert len(started) < 10


def test_the_figure_of_a_run_is_that_of_its_last_epoch(tmp_path, monkeypatch):
    """Catches: the top-1 of the first or of the best epoch."""
    (tmp_path / "log.jsonl").write_text('{"top1": 0.5}\n{"top1": 0.75}\n{"top1": 0.25}\n')
    monkeypatch.setattr(ablate.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    assert ablate.train_row(tmp_path, [], 1) == 25


def test_ablation(fit, tmp_path, monkeypatch, capsys):
    """Catches: rows of other settings than they say; runs that are trained twice, or go on with other settings."""

    def run(command, env, stdout, stderr):  # trains in this process
        assert command[:2] == [sys.executable, train.__file__]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            return subprocess.CompletedProcess(command, train.main(command[2:]))

    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # only a main thread may set handlers
    command = ["table5", *SMALL.split(), "--epochs", "1", "--seeds", "0", "3", "--out", str(tmp_path)]
    assert ablate.main(command) == 0
    printed, (folder,) = capsys.readouterr().out, tmp_path.glob("synthetic-*")
    for (name, tokens), seed in ((row, seed) for row in (("as-it-is", 3), ("modal-tokens-0", 0)) for seed in (0, 3)):
        saved = checkpoint(folder / name / f"seed-{seed}")
        assert saved["settings"]["modal_tokens"] == tokens and saved["recipe"]["seed"] == seed
    last = [json.loads(path.read_text())["top1"] for path in folder.glob("modal-tokens-0/seed-*/log.jsonl")]
    table = (folder / "table5.md").read_text()
    assert f"| {50 * sum(last):.2f} ± " in table and table in printed

    path = folder / "as-it-is" / "seed-3" / "last.pt"  # of the last run that is started
    before = path.read_bytes()
    assert ablate.main(command) == 0 and table in capsys.readouterr().out and path.read_bytes() == before
    saved = checkpoint(path.parent)
    torch.save(saved | {"recipe": saved["recipe"] | {"lr": 1.0}}, path)
    assert ablate.main(command) == 2
    assert "lr is 1.0, not 0.001" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--seed 3", "--no-such", "--stop-after 3", "--overwrite", "--sigma 0", "--jobs 0"])
def test_flags_that_an_ablation_refuses(words, tmp_path, monkeypatch, capsys):
    """Catches: a flag that would change what the rows compare, or a traceback for a wrong one."""
    monkeypatch.setattr(ablate, "train_rows", lambda *_: pytest.fail("it trains"))
    assert ablate.main(["table4", "--out", str(tmp_path), *words.split()]) == 2
    errors = capsys.readouterr().err
    assert words.split()[0][2:] in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("frames, stride", [(6, 2), (6, 4), (8, 2), (12, 3)])
@pytest.mark.parametrize("what", ablate.ABLATIONS)
def test_rows_of_the_ablations(what, frames, stride):
    """Catches: a row that the command line refuses, two rows that are the same model, no row to compare with."""
    settings, models = Settings(frames=frames, temporal_stride=stride), []
    rows = ablate.rows_of(what, settings)
    for row in rows:
        model = dataclasses.replace(settings, **train.parse_args(row.flags.split())[1])
        assert (model == settings) == (not row.flags)
        starts = loop_starts(model.frames, model.temporal_window, model.temporal_stride)  # by these, not by the stride
        models.append((dataclasses.replace(model, temporal_stride=1), starts))
    assert sum(not row.flags for row in rows) == 1 and all(models.count(model) == 1 for model in models)


def test_table_and_plot_of_an_ablation(tmp_path):
    """Catches: a difference of the wrong sign, a spread that is none, rows compared with another than the unchanged."""
    rows = [ablate.Row("a", "--x", "94.8"), ablate.Row("b", "--y", line="l", x=2), ablate.Row("c", "")]
    found = np.array([[2.0, 3.5], [4.0, 6.0], [1.5, 3.0]])
    lines = ablate.table(rows, found).splitlines()
    assert lines[2] == "| a | `--x` | 2.75 ± 1.06 | 2.00 .. 3.50 | +0.50 | no | 94.8 |"
    assert lines[3] == "| b | `--y` | 5.00 ± 1.41 | 4.00 .. 6.00 | +2.75 | yes |  |"
    assert lines[4] == "| c |  | 2.25 ± 1.06 | 1.50 .. 3.00 |  |  |  |"
    assert "| 0.50 | 0.50 .. 0.50 | -2.50 | yes |" in ablate.table(rows[1:], np.array([[0.5], [3.0]]))
    assert "| 1.00 .. 2.00 | -0.75 | no |" in ablate.table(rows[1:], np.array([[1.0, 2.0], [1.5, 3.0]]))
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    ablate.plot(rows, found, "stride", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize("workers", [0, 1])
def test_check_counts_what_is_there(workers, capsys):
    """Catches: counts of the wrong split or class, frames that are not read, a wrong share of visible joints."""

    def read(media, frames, size, crop):
        if media == "bad":
            raise data.BadClip(f"{media}: frames {frames.tolist()}")

    shown, hidden = np.array([[True, False], [True, True]]), np.zeros((2, 2), bool)
    train = [data.Clip(name, name == "b", np.zeros((2, 2, 2)), shown, (9, 9), "") for name in "ab"]
    test = [data.Clip("c", 1, np.zeros((2, 2, 2)), hidden, (9, 9), "bad")]
    source = data.Source(["x", "y"], ["head", "hand"], [], read, clips={"train": train, "test": test})
    source.problems, source.missing = ["P: broken"], ["M has no video"]
    assert check.check(source, workers) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == ["x 1 0", "y 1 1", "all 2 1", "6 frames, 2 joints, 50.0% of them visible"]
    assert lines[5] == "clips without a visible joint: c"
    assert lines[6:] == ["M has no video", "P: broken", "bad: frames [0, 1]", "1 left out, 2 problems"]
    source.problems.clear()
    source.clips["test"] = []
    assert check.check(source, workers) == 0
    source.clips["train"] = []
    assert check.check(source, workers) == 1


def test_check_of_a_data_set_with_problems(penn, monkeypatch):
    """Catches: a check that stops at the first problem, does not read every frame, or fails at a name in a message."""
    (penn / "frames" / "0002" / "000008.jpg").unlink()
    (penn / "frames" / "0003" / "000001.jpg").write_bytes(b"")
    (penn / "\N{CJK UNIFIED IDEOGRAPH-4E2D}").symlink_to(penn)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = python("-m", "tools.check", "--data", "pennaction", "--root", penn / "\N{CJK UNIFIED IDEOGRAPH-4E2D}")
    assert done.returncode == 1, done.stderr
    for words in ("bowl", "60      60", "0 left out, 2 problems", "\\u4e2d/frames/0002/000008.jpg", "000001.jpg"):
        assert words in done.stdout


@pytest.mark.parametrize("folder, status, said", [("nowhere", 2, "no folder"), ("labels", 1, "looked for")])
def test_check_of_what_is_not_there(folder, status, said, penn, capsys):
    """Catches: a traceback or a success where the data set is not found."""
    assert check.main(["--data", "pennaction", "--root", str(penn / folder)]) == status
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == 1


SEARCH = dict(grid=[3, 7, 7], kernel=3, steps=250, batch=32, noise=0.2, rate=0.01, scale=search.SCALE)


def test_search_reads_what_the_regular_grid_does_not():
    """Catches: a search that cannot learn where to read, points outside the volume, a frozen search that moves."""
    options = argparse.Namespace(**SEARCH)
    (top1, before, after, _), (label, guess, marked, _, points) = search.experiment(options, 3, False)
    near = [min(math.dist(p, at) for p in several) for several, at in zip(points.tolist(), marked.tolist())]
    assert top1 == (label == guess).float().mean() and top1 >= 0.95
    assert abs(np.mean(near) - after) < 1e-5 and after < 0.5 and before > 1
    assert ((points >= 0) & (points <= torch.tensor([2, 6, 6]))).all()
    (top1, before, after, _), _ = search.experiment(options, 3, True)
    assert top1 <= 0.4 and before == after > 1


def test_samples_of_the_search():
    """Catches: a marked token the regular grid reads in part, a displacement to another token, a code elsewhere."""
    options = argparse.Namespace(**SEARCH | {"grid": [2, 5, 6], "kernel": 5, "noise": 0})
    torch.manual_seed(0)
    Z, label, marked = search.draw_samples(options, 400, torch.arange(1.0, 53).view(4, 13))
    for z, code, at in zip(Z, 13 * label, marked.tolist()):
        assert all(max(abs(a - p) for a, p in zip(at, point)) >= 1 for point in [(0.5, 2, 2), (0.5, 2, 3)])
        for n in np.ndindex(2, 5, 6):
            assert z[n][:3].tolist() == [search.SCALE * (a - i) for a, i in zip(at, n)]
            assert z[n][3:].tolist() == [code + i + 1 if [*n] == at else 0 for i in range(13)]
    assert len(marked.unique(dim=0)) == 2 * (5 * 6 - 2)


def test_picture_of_the_search(tmp_path, monkeypatch):
    """Catches: points with x and y exchanged or in another frame, before and after exchanged, another token marked."""
    plots, drawn = pytest.importorskip("matplotlib.figure", reason="needs matplotlib, for pictures"), []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **how: drawn.append(figure))
    marked, before = torch.tensor([[1, 2, 0]] * 3), torch.tensor([[[0.4, 1.0, 2.0], [0.9, 0.5, 1.5]]] * 3)
    found = torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3]), marked, before, before.flip(2) / 4 + 0.3
    search.draw(plots, argparse.Namespace(grid=[2, 3, 4], out=tmp_path), found)
    for axis, hollow, filled in zip(drawn[0].axes[2:4], ([2, 1], [1.5, 0.5]), ([], [[0.4, 0.55], [0.525, 0.425]])):
        assert np.array(axis.collections[1].get_offsets()).tolist() == [hollow]
        close(np.append(axis.collections[2].get_offsets(), 1), np.append(filled, 1), 1e-6)
        assert axis.get_ylim() == (2.5, -0.5) and not len(axis.collections[1].get_facecolor())
    assert np.argwhere(axis.collections[0].get_array()).tolist() == [[2, 0]]
    assert drawn[0].axes[2].get_title("left") == "sample 1: code 2, predicted 0"


def test_command_of_the_search(tmp_path, capsys):
    """Catches: a flag or a seed that is ignored, a table of other figures, a wrong flag that is a traceback."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, for pictures")
    flags = "--kernel 4 --grid 2 5 4 --steps 2 --batch 3 --noise 0.5 --rate 0.1 --without-displacement --seeds 4 --out"
    search.main([*flags.split(), f"{tmp_path}/out"])
    size = dict(grid=[2, 5, 4], kernel=4, steps=2, batch=3, noise=0.5, rate=0.1, scale=0)
    for line, name in zip(capsys.readouterr().out.splitlines()[2:], ("learned", "frozen"), strict=True):
        top1, before, after, _ = search.experiment(argparse.Namespace(**size), 4, name == "frozen")[0]
        assert line.startswith(f"| {name} | 4 | {top1:.1%} | {before:.2f} | {after:.2f} | 2 | ")
    assert (tmp_path / "out" / "search.png").stat().st_size
    near = [search.experiment(argparse.Namespace(**size), seed, False)[0][2] for seed in (4, 5)]
    for other in ({"steps": 3}, {"batch": 4}, {"noise": 0.4}, {"rate": 0.2}, {"scale": 1}):
        near.append(search.experiment(argparse.Namespace(**size | other), 4, False)[0][2])
    assert len({float(distance) for distance in near}) == 7
    for words in ("--kernel 2", "--grid 2 2 2", "--grid 3 0 7", "--steps 0", "--noise -1", "--rate 0", "--seeds -1"):
        with pytest.raises(SystemExit, match="2"):
            search.main(words.split())
        assert len(capsys.readouterr().err.splitlines()) == 1
