"""Tests of the tools. Each docstring names the bug that the test catches."""

import argparse
import dataclasses
import io
import math
import re
import subprocess
import sys
import time
from functools import partial
from math import prod
from unittest import mock

import numpy as np
import pytest
import torch

import data
import test_d3t
import train
from d3t import D3T, AttentionBlock, Settings, TokenSearch
from test_d3t import SMALL, clip_for, close, loop_search, loop_starts, randomize, small, weights
from tools import ablate, bench, check, explain, predict, search
from tools.common import file_name

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of few synthetic clips, for which "synthetic" stands, and with an own clip."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "synthetic", (test_d3t.few_clips, []))
        assert train.main([*SMALL.split(), "--stop-after", "1", "--out", f"{run}"]) == 0
        saved = torch.load(run / "last.pt", weights_only=True)
        del saved["model"]["head.bias"]
        torch.save(saved, run / "lacks.pt")
        np.savez(run / "joints.npz", keypoint=np.full((1, 6, 13, 2), 9))
        test_d3t.write_video(run / "v.mp4", np.full((6, 32, 32, 3), 99, np.uint8))
        yield run


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
            module.register_forward_pre_hook(lambda it, inputs: kept.update({it: [x.detach().numpy() for x in inputs]}))
    video, joints, visible = clip_for(s)
    inputs = ((video - model.mean) / model.std).double(), joints.double(), visible
    said, two = explain.explain(model, *inputs), min(modal, 2)
    assert torch.equal(said.logits, model(*inputs))
    T, R, per_token = s.frames, s.joints, prod(s.grid[1:])

    def given(attention, b, asks):  # by the tokens of a frame from `asks` on: (frames, tokens that ask, keys)
        X, X_ = (x[b] for x in kept[attention])
        return loop_weights(X, X_, weights(attention), s.heads).reshape(asks, -1, len(X_))

    for (i, block), b in zip(enumerate(model.blocks), (1, 0)):  # both blocks and both clips
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


def test_pictures(trained, tmp_path, capsys):
    """Catches: pictures or arrays of another clip than they name, a flag that is ignored."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, for pictures")
    assert explain.main([f"{trained}/last.pt", "--clips", "7", "--out", f"{tmp_path}/out"]) == 0
    names = [file_name("7", "test 7") + end for end in ("-joints.png", "-overview.png", "-tokens.png", ".npz")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    saved, clip = train.load_checkpoint(trained / "last.pt"), data.Dataset(test_d3t.few_clips(), "test", 4, 16, 16)[7]
    model = D3T(Settings(**saved["settings"])).eval()
    model.load_state_dict(saved["model"])
    share = model(clip["video"][None], clip["joints"][None], clip["visible"][None]).softmax(-1)[0]
    guess = f"test 7: {data.SYNTHETIC_ACTIONS[share.argmax()]} ({share.max():.1%})"
    assert f"{guess}, label {data.SYNTHETIC_ACTIONS[clip['label']]}" in capsys.readouterr().out
    with np.load(tmp_path / "out" / names[-1]) as arrays:
        assert arrays["label"] == clip["label"] and arrays["frames"].shape == (1, 4, 4) and arrays["name"] == "test 7"
        close(arrays["probabilities"], share, 1e-5)


def test_clips_of_some_of_the_classes(trained, tmp_path, monkeypatch, capsys):
    """Catches: labels by the order of the data set, files of one clip for two, joints that training did not have."""

    def kick_and(other):
        source = test_d3t.few_clips()
        source.clips = {"train": [], "test": [clip for clip in source.clips["test"] if clip.label in (0, 3)]}
        for clip, clip.name in zip(source.clips["test"], ("a/b", "a-b", "A-b", "a-b")):
            clip.label = int(clip.label == 0)  # in the checkpoint, kick is 3 and wave 0
        return dataclasses.replace(source, classes=["kick", other])

    found = []
    monkeypatch.setattr(explain, "draw_clip", lambda plt, item, model, source, stem: found.append((item, source, stem)))
    monkeypatch.setitem(data.SOURCES, "synthetic", (partial(kick_and, "wave"), []))
    saved = torch.load(trained / "last.pt", weights_only=True)
    torch.save(saved | {"recipe": saved["recipe"] | {"hide": "joints"}}, tmp_path / "hidden.pt")
    for path in (trained / "last.pt", tmp_path / "hidden.pt"):
        assert explain.main([f"{path}", "--clips", "0", "1", "2", "3", "--out", f"{tmp_path}"]) == 0
    labels = [clip.label for clip in test_d3t.few_clips().clips["test"] if clip.label in (0, 3)][:4]
    assert [item["label"] for item, _, _ in found] == 2 * labels and {*labels} == {0, 3}
    assert all(source.classes == data.SYNTHETIC_ACTIONS for _, source, _ in found)
    assert [bool(item["visible"].any()) for item, _, _ in found] == 4 * [True] + 4 * [False]
    assert len({str(stem).lower() for _, _, stem in found}) == 4 and {stem.parent for *_, stem in found} == {tmp_path}
    monkeypatch.setitem(data.SOURCES, "synthetic", (partial(kick_and, "sneeze"), []))
    assert explain.main([f"{trained}/last.pt"]) == 2 and "sneeze" in capsys.readouterr().err


def test_names_of_files(tmp_path, monkeypatch):
    """Catches: one name for two clips or two lists of flags, a name that the file system refuses."""
    words = ["a/b", "a-b", "A-B", "../b", "x" * 300, "x" * 299 + "y", "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 200, "\udce9"]
    monkeypatch.setattr(ablate, "train_rows", lambda rows, place, *_: (place.mkdir(parents=True), np.ones((3, 1)))[1])
    for word in words:
        assert ablate.main(["table5", "--out", str(tmp_path), "--root", word]) == 0
        (tmp_path / f"{file_name('0', word)}-overview.png").touch()
    names = [path.name.lower() for path in tmp_path.iterdir()]
    assert len({*names}) == 2 * len(words) and all(name.isascii() for name in names)
    assert file_name("a b", "c") != file_name("a", "b c")


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


@pytest.mark.parametrize("off", ["", "deformable", "joint", "temporal"])
@pytest.mark.parametrize("modal", [3, 1, 0])
def test_plain_version_of_the_benchmark(modal, off):
    """Catches: a plain version that computes something else, or that leaves out tokens of the last block."""
    s = small(modal_tokens=modal, pose_embedding=not modal, **({f"{off}_attention": False} if off else {}))
    batch = bench.make_batch(s, 2, CPU)
    ours, plain = (bench.Run(bench.Version(s, plain=plain, channels_last=not plain), CPU) for plain in (False, True))
    expected = ours.forward(batch)
    assert expected.std() > 0.01 and torch.allclose(plain.forward(batch), expected, atol=1e-5)
    assert plain.model.blocks[-1].queries is None


@pytest.mark.parametrize("modal", [3, 0])
def test_operations_of_the_benchmark(modal):
    """Catches: operations that are not counted or counted twice, or tokens that the last block does not compute."""
    s = small(blocks=3, modal_tokens=modal)
    D, windows = 4 * s.channels, len(loop_starts(s.frames, s.temporal_window, s.temporal_stride))
    n = s.temporal_window * (prod(s.grid[1:]) + s.joints + modal)
    # Wq, Wo of q and Wk, Wv of n tokens; q x n twice in Eq. (6); the FFN of Eq. (7)
    each = [4 * D**2 * (q + n) + 4 * D * q * n + 16 * D**2 * q for q in (n, n, s.temporal_window * modal or n)]
    counted = bench.operations(s, 1, CPU)
    assert counted["temporal attention"] == windows * sum(each)
    assert counted["all"] == sum(counted[part] for part in (*bench.PARTS, "rest")) and min(counted.values()) > 0


def test_turns_of_the_benchmark():
    """Catches: the warm-up counted as a round, versions that do not alternate, a mean in place of the median."""
    called, parts = [], iter([{"part": seconds} for seconds in (100.0, 1.0, 2.0, 9.0)])
    work = {"a": {"x": lambda: called.append("a")}, "b": {"x": lambda: called.append("b"), "y": lambda: next(parts)}}
    times = bench.take_turns(bench.parse_args(["--rounds", "3", "--device", "cpu"])[0], work)
    assert called == ["a", "b"] * 4 and times["b", "part"] == 2.0
    assert set(times) == {("a", "x"), ("b", "x"), ("b", "y"), ("b", "part")}


def test_figures_of_the_benchmark(monkeypatch, capsys):
    """Catches: figures that ignore the batch, a ratio upside down, a step counted as one forward, a wrong limit."""
    seconds = {"product": 0.5, "forward": 2.0, "step": 8.0}
    measured = {(name, kind): n * took for name, n in (("off", 1), ("plain", 4)) for kind, took in seconds.items()}
    monkeypatch.setattr(bench, "take_turns", lambda *_: measured)
    monkeypatch.setattr(bench, "operations", lambda s, clips, _: {"all": 5e9})
    monkeypatch.setattr(bench, "step_memory", lambda v, clips, _: (1.5 + (3 - v.checkpoints) * clips) * 2**30)
    flags = "--amp off --batch 2 --matrix 1000 --preset tiny --joints 13 50"
    options, (_, s) = bench.parse_args(flags.split())
    assert (s.joints, s.frames) == (50, 6)
    bench.plain(s, options)
    bench.memory(s, options)
    printed = " | ".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    for expected in (
        "forward, ms a clip 4000.0 1000.0 | clips/s 0.250 1.000 | times as fast as plain 1.00 4.00 | 2.50 GFLOP",
        "step, ms a clip 16000.0 4000.0 | clips/s 0.062 0.250 | times as fast as plain 1.00 4.00 | 7.50 GFLOP, of",
        "product 46.9% 46.9% | peak memory of the step, GiB 7.50 7.50",
        "one clip, --checkpointing, GiB 3.50 3.50 | each further clip, GiB 2.00 2.00 | clips in 32 GiB 15 15",
    ):
        assert expected in printed


def test_memory_of_the_benchmark():
    """Catches: a peak without AdamW's averages or the gradients, a batch that takes no memory, checkpoints ignored."""
    s = small(width=40, height=40)
    one, two = (bench.step_memory(bench.Version(s), clips, CPU) for clips in (1, 2))
    assert 12 * sum(p.numel() for p in D3T(s).parameters()) < 2 * one - two < one < two  # weights and two averages
    assert one < bench.step_memory(bench.Version(s, checkpoints=True), 2, CPU) < two


def test_sections_of_the_benchmark(tmp_path, monkeypatch, capsys):
    """Catches: a section that fails, a loader that does not read the clips, a wrong exponent, a disabled part drawn."""
    pytest.importorskip("PIL", reason="needs pillow, for the clips")
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    monkeypatch.setattr(bench, "SWEEPS", {"frames": (4, 8), "joints": (8, 16)})
    monkeypatch.setattr(bench, "step_memory", lambda *_: 2**30)  # it has a test of its own
    monkeypatch.setattr(train, "keep_memory", lambda: None)  # it would last for the life of this process
    monkeypatch.setattr(data, "synthetic", partial(data.synthetic, 1))  # with one clip in training
    monkeypatch.setattr(data, "draw", lambda media, frames, size, crop: data.Frames(np.zeros((16, *size, 3))))
    flags = "--preset tiny --channels 4 --height 16 --width 24 --joints 8 --rounds 1 --matrix 64 --amp off"
    flags += f" --clips 3 --workers 0 --out {tmp_path} --no-temporal-attention"
    for section in ("loader", "scaling", "variants"):
        assert bench.main([section, *flags.split()]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (loaded,) = (line for line in printed if line.startswith("6 frames of a JPEG clip"))
    assert all(float(figure) > 0 for figure in loaded.split()[-3:])
    grown = [line.split()[-1] for line in printed if line.startswith("joint tokenizer")]
    assert grown == ["1.00", "1.00"] and not any(line.startswith("temporal attention") for line in printed)
    assert (tmp_path / "scaling-8.png").stat().st_size > 10_000


def test_ablation(tmp_path, monkeypatch, capsys):
    """Catches: figures of another row, seed or epoch, runs that do not go on, a failure without reason or end."""
    started, fails = [], []

    def run(command, env, stdout, stderr):
        options, given = train.parse_args(command[2:])
        started.append((given["modal_tokens"], given["seed"]))
        assert options.resume and given["frames"] == 4 and "lr" in given  # all settings, to compare with a checkpoint
        stderr.write(f"starts\n{env['OMP_NUM_THREADS']} threads\n")
        time.sleep(0.2 if len(started) == 1 else 0.02)  # so that the first one does not end first
        top1 = given["modal_tokens"] / 10 + given["seed"] / 100
        (options.out / "log.jsonl").write_text(f'{{"top1": 0.9}}\n{{"top1": {top1}}}\n')
        return subprocess.CompletedProcess(command, len(fails))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(ablate.subprocess, "run", run)
    command = ["table5", "--frames", "4", "--out", f"{tmp_path}", "--jobs", "3", "--seeds"]
    assert ablate.main([*command, "1", "3"]) == 0
    assert sorted(started) == [(tokens, seed) for tokens in (0, 1, 3) for seed in (1, 3)]
    printed, (path,) = capsys.readouterr().out, tmp_path.glob("synthetic-*/table5.md")
    for figures in ("2.00 ± 1.41 | 1.00 .. 3.00 | -30.00", "12.00 ± 1.41 | 11.00 .. 13.00 | -20.00", "32.00 ± 1.41"):
        assert figures in path.read_text(encoding="utf-8") and figures in printed
    fails.append(started.clear())
    assert ablate.main([*command, *map(str, range(100))]) == 2
    time.sleep(0.2)
    count = len(started)
    time.sleep(0.2)
    assert len(started) == count < 300 and re.search(
        "0/seed-.* ended with status 1: 2 threads", capsys.readouterr().err
    )


@pytest.mark.parametrize("frames, stride", [(6, 2), (6, 4), (8, 2), (12, 3)])
@pytest.mark.parametrize("what", [*ablate.TABLES, *ablate.FIGURES])
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
    assert ablate.table(rows, found).splitlines()[2:] == [
        "| a | `--x` | 2.75 ± 1.06 | 2.00 .. 3.50 | +0.50 | no | 94.8 |",
        "| b | `--y` | 5.00 ± 1.41 | 4.00 .. 6.00 | +2.75 | yes |  |",
        "| c |  | 2.25 ± 1.06 | 1.50 .. 3.00 |  |  |  |",
    ]
    assert "| 0.50 | 0.50 .. 0.50 | -2.50 | yes |" in ablate.table(rows[1:], np.array([[0.5], [3.0]]))
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    ablate.plot(rows, found, "stride", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize("workers", [0, 1])
def test_check_counts_what_is_there(workers, monkeypatch):
    """Catches: counts of the wrong split or class, frames that are not read, a wrong share, a name that fails."""

    def read(media, frames, size, crop):
        if media == "bad":
            raise data.BadClip(f"{media}: frames {frames.tolist()}")
        return data.Frames(np.zeros((2, 16, 16, 3), np.uint8), size=media)

    joints, shown, hidden = np.zeros((2, 2, 2)), np.array([[True, False], [True, True]]), np.zeros((2, 2), bool)
    train = [data.Clip(name, name == "b", None, shown, (9, 9), (18, 18)) for name in "ab"]
    test = [data.Clip("c", 1, None, hidden, (9, 9), (9, 9)), data.Clip("d", 1, None, shown, (9, 9), "bad")]
    test.append(data.Clip("e", 1, None, shown, (9, 16), (16, 9)))
    source = data.Source(
        ["\N{LATIN SMALL LETTER E WITH ACUTE}", "y"],
        ["head", "hand"],
        [],
        read,
        lambda clip: dataclasses.replace(clip, joints=joints),
    )
    source.problems, source.missing, source.clips = ["P: broken"], ["M has no video"], {"train": train, "test": test}
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(data, "load", lambda options: source)
    assert check.main(["--workers", f"{workers}"]) == 1
    out.flush()
    lines = [" ".join(line.split()) for line in out.buffer.getvalue().decode().splitlines()]
    assert lines[1:5] == ["\\xe9 1 0", "y 1 3", "all 2 3", "6 frames, 2 joints, 50.0% of them visible"]
    assert lines[5] == "clips without a visible joint: c"
    assert lines[6:9] == ["M has no video", "P: broken", "bad: frames [0, 1]"]
    assert "e refer to frames of 9 x 16" in lines[9] and lines[10:] == ["1 left out, 3 problems"]
    source.problems, source.clips["test"] = [], []
    assert check.check(source, workers) == 0
    source.clips["train"] = []
    assert check.check(source, workers) == 1


REFUSED = [  # tool, words, what the error names
    (explain, "{run}/last.pt --clips 11", "0 to 10"),
    (explain, "{run}/lacks.pt", "head.bias"),
    (explain, "{run}/last.pt --out {run}/last.pt", "last.pt"),
    (predict, "{run}/last.pt {run}/gone.mp4 {run}/joints.npz", "gone.mp4"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/v.mp4", "v.mp4: expected an .npz"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/joints.npz --out {run}/last.pt", "last.pt"),
    (bench, "--batch 0", "--batch"),
    (bench, "--sigma 0", "sigma"),
    (ablate, "table4 --seed 3", "--seed"),
    (ablate, "table4 --no-such", "--no-such"),
    (ablate, "table4 --jobs 0", "--jobs"),
    (check, "--workers -1", "--workers"),
    (check, "--data pennaction --root {run}/gone", "no folder"),
    (check, "--data pennaction --root {run}", "looked for"),
    (search, "--noise -1", "--noise"),
    (search, "--seeds -1", "--seeds"),
    (search, "--seeds 18446744073709551616", "--seeds"),
]


@pytest.mark.parametrize("tool, words, said", REFUSED)
def test_what_the_tools_refuse(tool, words, said, trained, monkeypatch, capsys):
    """Catches: a traceback for a wrong flag, folder or file, an error that does not name it, another status."""
    monkeypatch.setattr(ablate, "train_rows", lambda *_: pytest.fail("it trains"))
    status = tool.main(words.format(run=trained).split())
    assert status == (1 if said == "looked for" else 2)  # 1: there is a folder, and no data set in it
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == 1 and errors.startswith(f"{tool.__name__}: ")


def test_predict(trained, tmp_path, monkeypatch, capsys):
    """Catches: names of other classes, scores or rows that are ignored, joints drawn elsewhere than in the model."""
    plots, given, drawn = pytest.importorskip("matplotlib.figure", reason="needs matplotlib, for pictures"), [], []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path.touch())))
    monkeypatch.setattr(D3T, "forward", lambda _, *clip: (given.append(clip), torch.tensor([[0.0, 3, 1, 2, 0, -9]]))[1])
    saved = torch.load(trained / "last.pt", weights_only=True)
    settings = saved["settings"] | {"height": 96, "width": 96, "classes": 6}
    saved |= {"settings": settings, "model": D3T(Settings(**settings)).state_dict(), "classes": [*"abcdef"]}
    torch.save(saved, tmp_path / "large.pt")
    video, score = np.full((9, 160, 200, 3), 40, np.uint8), np.zeros((1, 9, 13, 1))
    joints = np.random.default_rng(0).integers(60, 100, (1, 9, 13, 2))
    score[0, :, 4] = 0.5
    for frame, (x, y) in zip(video, joints[0, :, 4]):  # the marked joint
        frame[y - 8 : y + 9, x - 8 : x + 9] = 250
    np.savez(tmp_path / "one.npz", keypoint=joints, keypoint_score=score[..., 0])
    np.savez(tmp_path / "two.npz", keypoint=np.concatenate([joints, score], -1))
    path = test_d3t.write_video(tmp_path / "clip.mp4", video)
    for name in ("one", "two"):
        words = [f"{tmp_path}/large.pt", f"{path}", f"{tmp_path}/{name}.npz", "--out", f"{tmp_path}/out"]
        assert predict.main(words) == 0
        shares = re.findall(r"(\S+)%  (\w)\n", capsys.readouterr().out)
        assert shares == [("62.4", "b"), ("23.0", "d"), ("8.4", "c"), ("3.1", "a"), ("3.1", "e")]
        (shown, at, visible), axes = given.pop(), drawn.pop()[0].axes
        assert visible[0].sum(0).tolist() == [4 * (joint == 4) for joint in range(13)]
        for t, axis in enumerate(axes):
            marked = np.argwhere(shown[0, 0, t].numpy() > 140).mean(0)[::-1]
            assert np.abs(at[0, t, 4].numpy() - marked).max() < 0.5
            close(axis.collections[0].get_offsets().data, at[0, t, 4:5], 1e-5)
            assert np.array_equal(axis.images[0].get_array(), shown[0, :, t].permute(1, 2, 0))


SEARCH = dict(grid=[2, 5, 7], kernel=3, steps=200, batch=32, noise=0.2, rate=0.01, scale=search.SCALE)


def test_search_reads_what_the_regular_grid_does_not():
    """Catches: a search that cannot learn where to read, points outside the volume, a frozen search that moves."""
    options = argparse.Namespace(**SEARCH)
    (top1, before, after, _), (label, guess, marked, _, points) = search.experiment(options, 3, False)
    near = [min(math.dist(p, at) for p in several) for several, at in zip(points.tolist(), marked.tolist())]
    assert top1 == (label == guess).float().mean() and top1 >= 0.95
    assert abs(np.mean(near) - after) < 1e-5 and after < 0.5 and before > 1
    assert ((points >= 0) & (points <= torch.tensor([1, 4, 6]))).all()
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
            assert z[n][:3].tolist() == pytest.approx([search.SCALE / 6 * (a - i) for a, i in zip(at, n)])
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


def test_command_of_the_search(tmp_path, monkeypatch, capsys):
    """Catches: a flag or a seed that is ignored, a table of other figures, a traceback for Ctrl-C."""
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
    monkeypatch.setattr(search, "experiment", mock.Mock(side_effect=KeyboardInterrupt))
    assert search.main(["--out", f"{tmp_path}"]) == 130
    assert capsys.readouterr().err == "tools.search: interrupted\n"
