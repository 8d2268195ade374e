"""Tests of the tools. Each docstring names the bug that the test catches."""

import argparse
import dataclasses
import math
import re
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

import data
import test_d3t
import train
from d3t import D3T, Settings
from test_d3t import SMALL, clip_for, close, loop_search, loop_starts, randomize, small, weights
from tools import ablate, bench, check, explain, predict, search
from tools.common import file_name

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of few synthetic clips, for which "synthetic" stands, with a video and joints."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "synthetic", (test_d3t.few_clips, []))
        assert train.main([*SMALL.split(), "--stop-after", "1", "--out", f"{run}"]) == 0
        saved = torch.load(run / "last.pt", weights_only=True)
        del saved["model"]["head.bias"]
        torch.save(saved, run / "lacks.pt")
        for shape in ("1,6,13,2", "2,6,13,2", "1,6,2,2", "6,13,2", "1,8,13,2"):
            np.savez(run / f"{shape}.npz", keypoint=np.full([*map(int, shape.split(","))], 9))
        test_d3t.write_video(run / "v.mp4", np.full((6, 32, 32, 3), 99, np.uint8))
        yield run


@pytest.mark.parametrize("modal", [3, 1, 0])
def test_explanation_is_the_attention_of_the_modal_tokens(modal):
    """Catches: maps of other weights or tokens than the model attends with, or that lose a share on the way back."""
    s, two = small(modal_tokens=modal), min(modal, 2)
    model, (video, joints, visible) = randomize(D3T(s)).requires_grad_(False), clip_for(s)
    inputs = video.double() / 255, joints.double(), visible
    said, (_, kept) = explain.explain(model, *inputs), explain.record_inputs(model, *inputs)
    assert torch.equal(said.logits, model(*inputs))

    def given(attention, b, frames, asking):  # by the last tokens of each frame: mean over these and the heads
        w, (X, X_) = weights(attention), (x[b].numpy() for x in kept[attention])
        Q, K = (np.split(x @ w[name].T, s.heads, 1) for x, name in ((X, "Wq.weight"), (X_, "Wk.weight")))
        score = np.stack([q @ k.T / math.sqrt(q.shape[1]) for q, k in zip(Q, K)])
        share = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        return share.mean(0).reshape(frames, -1, len(X_))[:, -asking:].mean(1)

    for (i, block), b in zip(enumerate(model.blocks), (1, 0)):  # both blocks and both clips
        deformable, joint, temporal = block.deformable, block.joint, block.temporal
        _, points = loop_search(kept[deformable.search][0][b].numpy(), weights(deformable.search), s.kernel)
        close(said.points[b, i], points)
        share = given(deformable.attention, b, s.frames, two).mean(0)[: points[..., 0].size].reshape(points.shape[:3])
        close(said.selected[b, i], share)
        near = 1 - abs(points[..., None, :] - np.stack(np.indices(s.grid), -1).reshape(-1, 3))  # to each token
        close(said.tokens[b, i], np.tensordot(share, near.clip(0).prod(-1), 3).reshape(s.grid))

        seen = np.full((len(joint.index), s.frames, s.joints), np.nan)
        for n, window in enumerate(joint.index.tolist()):
            share = given(joint.attention, b * len(seen) + n, s.frames, two).mean(0).reshape(s.frames, -1)
            seen[n][:, window] = share[:, : len(window)]
        close(said.joints[b, i], np.nanmean(seen, 0))

        seen = np.full((len(temporal.index), s.frames, s.frames), np.nan)
        for n, window in enumerate(temporal.index.tolist()):
            share = given(temporal.attention, b * len(seen) + n, len(window), modal)
            seen[n, window] = 0
            seen[n][np.ix_(window, window)] = share.reshape(len(window), len(window), -1).sum(-1)
        close(said.frames[b, i], np.nanmean(seen, 0))


def test_explanation_of_an_ablation():
    """Catches: maps invented for a disabled attention, hooks that stay, averages of batch norms that move."""
    s = small(joint_attention=False, temporal_attention=False)
    model, clip = D3T(s).eval(), clip_for(s)
    model._compiled_call_impl = lambda *_: pytest.fail("a compiled graph has no hooks")  # as model.compile() sets it
    said = explain.explain(model, *clip)
    assert said.joints is None and said.frames is None and said.points.shape == (2, 2, 3, 1, 3, 3)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="eval"):
        explain.explain(model.train(), *clip)


def test_pictures(trained, tmp_path, monkeypatch, capsys):
    """Catches: files of another clip, the data set's labels, an ignored flag, points or maps elsewhere in a picture."""
    plt, drawn = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib, for pictures"), []
    monkeypatch.setattr(plt, "close", drawn.append)
    source = test_d3t.few_clips()
    wave, kick = (next(clip for clip in source.clips["test"] if clip.label == label) for label in (0, 3))
    clips = [dataclasses.replace(wave, label=1, name="a/b"), dataclasses.replace(kick, label=0, name="a/b")]
    source = dataclasses.replace(source, classes=["kick", "wave"], clips={"test": clips})
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["settings"] |= {"height": 24, "width": 40}
    model = randomize(D3T(Settings(**saved["settings"]))).float()
    for hide, numbers in (("none", "1"), ("joints", "10")):
        saved["recipe"]["hide"], number = hide, int(numbers[-1])
        torch.save(saved | {"model": model.state_dict()}, tmp_path / "new.pt")
        assert explain.main([f"{tmp_path}/new.pt", "--out", f"{tmp_path}/out", "--clips", *numbers]) == 0
        clip = data.Dataset(source, "test", 4, 24, 40, hide=hide)[number]
        share = model(*(clip[key][None] for key in ("video", "joints", "visible"))).softmax(-1)[0]
        guess, label = data.SYNTHETIC_ACTIONS[share.argmax()], ("wave", "kick")[number]
        assert f"a/b: {guess} ({share.max():.1%}), label {label}\n" in capsys.readouterr().out
        with np.load(tmp_path / "out" / f"{file_name(str(number), 'a/b')}.npz") as arrays:
            assert arrays["name"] == "a/b" and arrays["label"] == (0, 3)[number]
            close(arrays["probabilities"], share, 1e-5)
            points = 8 * arrays["points"].reshape(-1, 3)  # t, y, x of pixels
        for t, axis in enumerate(drawn[-3].axes[:4]):  # Fig. 5, which is the first of three
            here = [[x, y] for at, y, x in points.tolist() if round(at / 8) == t]
            assert axis.collections[0].get_offsets().tolist() == here
            assert [*axis.images[1].get_extent(), *axis.get_xlim()] == [-4, 36, 20, -4, -0.5, 39.5]
    assert len([*(tmp_path / "out").glob("*.png")]) == 6


def test_names_of_files(tmp_path):
    """Catches: one name for two clips or two lists of flags, a name that the file system refuses."""
    words = ["a/b", "a-b", "A-B", "../b", "x" * 300, "x" * 299 + "y", "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 200, "\udce9"]
    names = [file_name("0", word) for word in words] + [file_name("a b", "c"), file_name("a", "b c")]
    for name in names:
        (tmp_path / f"{name}-overview.png").touch()
    assert len({name.lower() for name in names}) == len(words) + 2 and all(map(str.isascii, names))


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
    n = s.temporal_window * (math.prod(s.grid[1:]) + s.joints + modal)
    # Wq, Wo of q and Wk, Wv of n tokens; q x n twice in Eq. (6); the FFN of Eq. (7)
    each = [4 * D**2 * (q + n) + 4 * D * q * n + 16 * D**2 * q for q in (n, n, s.temporal_window * modal or n)]
    counted = bench.operations(s, 1, CPU)
    assert counted["temporal attention"] == windows * sum(each)
    assert counted["all"] == sum(counted[part] for part in (*bench.PARTS, "rest")) and min(counted.values()) > 0


def test_figures_of_the_benchmark(monkeypatch, capsys):
    """Catches: the warm-up counted, a mean as median, figures that ignore the batch, a wrong ratio or limit."""
    seconds = [f * n * kind for f in (99, 1, 9, 0.5) for n in (4, 1) for kind in (0.5, 2, 8)]  # by round and version
    times = iter([now for took in seconds for now in (0, took)])
    monkeypatch.setattr(bench, "clock", lambda _: next(times))
    monkeypatch.setattr(bench, "operations", lambda s, clips, _: {"all": 5e9})
    monkeypatch.setattr(bench, "step_memory", lambda v, clips, _: (1.5 + (3 - v.checkpoints) * clips) * 2**30)
    flags = "--rounds 3 --amp off --batch 2 --matrix 1000 --preset tiny --channels 4 --height 16 --joints 13 50"
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
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot, and with it pillow, for the clips")
    monkeypatch.setattr(bench, "SWEEPS", {"frames": (4, 8), "joints": (8, 16)})
    monkeypatch.setattr(bench, "step_memory", lambda version, clips, _: clips * 2**30)  # it has a test of its own
    monkeypatch.setattr(train, "keep_memory", lambda: None)  # it would last for the life of this process
    monkeypatch.setattr(data, "synthetic", partial(data.synthetic, 1))  # with one clip in training
    flags = "--preset tiny --channels 4 --height 16 --width 24 --joints 8 --rounds 1 --matrix 64 --amp off"
    flags += f" --clips 3 --workers 0 --out {tmp_path}/out --no-temporal-attention"
    for section in bench.SECTIONS:
        assert bench.main([section, *flags.split()]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    (loaded,) = (line for line in printed if " ".join(line).startswith("6 frames of a JPEG clip"))
    assert all(float(figure) > 0 for figure in loaded[-3:])
    grown = [line[-1] for line in printed if line[:2] == ["joint", "tokenizer"] and len(line) == 4]
    assert grown == ["1.00", "1.00"] and ["temporal", "attention"] not in [line[:2] for line in printed]
    assert (tmp_path / "out" / "scaling-8.png").stat().st_size > 10_000


def test_ablation(tmp_path, monkeypatch, capsys):
    """Catches: figures of another row, seed or epoch, a wrong spread or difference, runs that do not go on or end."""
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    top1, started, fails = {4: (0.5, 1), 6: (4, 6), 8: (1.5, 3.5), 12: (2, 3.5)}, [], []  # by frames, for two seeds

    def run(command, env, stdout, stderr):
        options, given = train.parse_args(command[2:])
        started.append(options.out)
        assert options.resume and "lr" in given  # all settings, to compare with a checkpoint
        stderr.write(f"starts\n{env['OMP_NUM_THREADS']} threads\n")
        time.sleep(0.2 if len(started) == 1 else 0.02)  # so that the first one does not end first
        last = top1[given["frames"]][given["seed"] > 1] / 100
        (options.out / "log.jsonl").write_text(f'{{"top1": 0.9}}\n{{"top1": {last}}}\n')
        return subprocess.CompletedProcess(command, len(fails))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(ablate.subprocess, "run", run)
    flags = ["--out", f"{tmp_path}", "--jobs", "3", "--seeds"]
    assert ablate.main(["fig7b", "--frames", "8", *flags, "1", "3"]) == 0 and len({*started}) == len(started)
    (path,) = tmp_path.glob("synthetic-*/fig7b.md")
    assert path.read_text(encoding="utf-8") in capsys.readouterr().out
    assert path.read_text(encoding="utf-8").splitlines()[4:] == [
        "| 4 frames | `--frames 4` | 0.75 ± 0.35 | 0.50 .. 1.00 | -1.75 | yes |  |",
        "| 6 frames | `--frames 6` | 5.00 ± 1.41 | 4.00 .. 6.00 | +2.50 | yes |  |",
        "| 8 frames |  | 2.50 ± 1.41 | 1.50 .. 3.50 |  |  |  |",
        "| 12 frames | `--frames 12` | 2.75 ± 1.06 | 2.00 .. 3.50 | +0.25 | no |  |",
    ]
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert "| 3.50 | 3.50 .. 3.50 |  |  | 9.9 |" in ablate.table([ablate.Row("", "", "9.9")], np.array([[3.5]]))
    fails.append(1)
    assert ablate.main(["table5", "--frames", "4", *flags, *map(str, range(100))]) == 2
    count = len(started)
    time.sleep(0.2)
    assert len(started) <= count + 3 and len({folder.parents[1] for folder in started}) == 2
    assert re.search("0/seed-.* ended with status 1: 2 threads", capsys.readouterr().err)


@pytest.mark.parametrize("frames, stride", [(6, 2), (6, 4), (5, 2), (12, 3)])
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


@pytest.mark.parametrize("workers", [0, 1])
def test_check_counts_what_is_there(workers, monkeypatch, capsys):
    """Catches: counts of the wrong split or class, frames that are not read, a wrong share, status 0 for a problem."""

    def read(media, frames, size, crop):
        if media == "d":
            raise data.BadClip(f"bad: frames {frames.tolist()}")
        return data.Frames(np.zeros((2, 16, 16, 3), np.uint8))

    hidden, shown = np.zeros((2, 2), bool), np.array([[True, False], [True, True]])
    annotate = partial(dataclasses.replace, joints=np.zeros((2, 2, 2)))
    source = data.Source(["x", "y"], ["head", "hand"], [], read, annotate, problems=["broken"], missing=["M is gone"])
    source.clips["train"] = [data.Clip(name, name == "b", None, shown, (9, 9), name) for name in "aab"]
    source.clips["test"] = [data.Clip("c", 1, None, hidden, (9, 9), "c"), data.Clip("d", 1, None, shown, (9, 9), "d")]
    monkeypatch.setattr(data, "load", lambda options: source)
    assert check.main(["--workers", f"{workers}"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == ["x 2 0", "y 1 2", "all 3 2", "8 frames, 2 joints, 56.2% of them visible"]
    assert lines[5:8] == ["clips without a visible joint: c", "M is gone", "broken"]
    assert lines[8:] == ["bad: frames [0, 1]", "1 left out, 2 problems"]
    source.problems, source.clips["test"] = [], []
    assert check.check(source, workers) == 0
    source.clips["train"] = []
    assert check.check(source, workers) == 1


REFUSED = [  # tool, words, what the error names
    (explain, "{run}/last.pt --clips 11", "0 to 10"),
    (explain, "{run}/lacks.pt", "head.bias"),
    (predict, "{run}/last.pt {run}/gone.mp4 {run}/1,6,13,2.npz", "gone.mp4"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/v.mp4", "v.mp4: expected an .npz"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/1,6,13,2.npz --out {run}/last.pt", "last.pt"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/2,6,13,2.npz", "2 persons with 13 joints; the checkpoint knows head, "),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/1,6,2,2.npz", "v.mp4: 1 persons with 2 joints"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/6,13,2.npz", "v.mp4: keypoint is (6, 13, 2), expected"),
    (predict, "{run}/last.pt {run}/v.mp4 {run}/1,8,13,2.npz", "v.mp4: v has joints of 8 frames, but 6 frames"),
    (bench, "--batch 0", "--batch"),
    (bench, "--sigma 0", "sigma"),
    (ablate, "table4 --seed 3", "--seed"),
    (ablate, "table4 --jobs 0", "--jobs"),
    (check, "--workers -1", "--workers"),
    (check, "--data pennaction --root {run}", "looked for"),
    (search, "--noise -1", "--noise"),
    (search, "--seeds -1", "--seeds"),
]


@pytest.mark.parametrize("tool, words, said", REFUSED)
def test_what_the_tools_refuse(tool, words, said, trained, monkeypatch, capsys):
    """Catches: a traceback for a wrong flag, folder or file, an error that does not name it, another status."""
    monkeypatch.setattr(ablate, "train_rows", lambda *_: pytest.fail("it trains"))
    status = tool.main(words.format(run=trained).split())
    assert status == (1 if said == "looked for" else 2)  # 1: there is a folder, and no data set in it
    assert sys.stdout.errors == "backslashreplace"  # as data.escape_output() sets it
    errors = capsys.readouterr().err
    assert said in errors and len(errors.splitlines()) == 1 and errors.startswith(f"{tool.__name__}: ")


def test_predict(trained, tmp_path, monkeypatch, capsys):
    """Catches: names of other classes, scores or rows that are ignored, joints drawn elsewhere than in the model."""
    plots, given, drawn = pytest.importorskip("matplotlib.figure", reason="needs matplotlib, for pictures"), [], []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path.touch())))
    monkeypatch.setattr(D3T, "forward", lambda _, *clip: (given.append(clip), torch.tensor([[0.0, 3, 1, 2, 0, -9]]))[1])
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["settings"] |= {"height": 96, "width": 96, "classes": 6, "joints": 26}
    saved |= {"model": D3T(Settings(**saved["settings"])).state_dict(), "classes": [*"abcdef"]}
    joints = np.random.default_rng(0).integers(60, 100, (1, 9, 13, 2))
    video, score = np.full((9, 200, 160, 3), 40, np.uint8), np.tile(0.5 * (np.arange(13) == 4), (1, 9, 1))
    for frame, (x, y) in zip(video, joints[0, :, 4]):  # the marked joint
        frame[y - 8 : y + 9, x - 8 : x + 9] = 250
    np.savez(tmp_path / "clip.npz", keypoint=joints, keypoint_score=score)
    path = test_d3t.write_video(tmp_path / "clip.mp4", np.rot90(video, 1, (1, 2)))
    test_d3t.patch(path, 1)  # a phone stores an upright video on its side
    for first in ("", " 1"):
        names = [f"{joint}{person}" for person in (first, " 2") for joint in data.PENN_JOINTS]
        torch.save(saved | {"joint_names": names}, tmp_path / "large.pt")
        words = f"{tmp_path}/large.pt {path} {tmp_path}/clip.npz --out {tmp_path}/out"
        assert predict.main(words.split()) == 0
        shares = re.findall(r"(\S+)%  (\w)\n", capsys.readouterr().out)
        assert shares == [("62.4", "b"), ("23.0", "d"), ("8.4", "c"), ("3.1", "a"), ("3.1", "e")]
        (shown, at, visible), axes = given.pop(), drawn.pop()[0].axes
        assert visible[0].sum(0).tolist() == [4 * (joint == 4) for joint in range(26)]  # the second person is absent
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


def test_command_of_the_search(tmp_path, monkeypatch, capsys):
    """Catches: a flag or a seed that is ignored, a table or a picture of other figures, a traceback for Ctrl-C."""
    plots, drawn = pytest.importorskip("matplotlib.figure", reason="needs matplotlib, for pictures"), []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path, **_: drawn.append((figure.axes, path.touch())))
    flags = "--kernel 4 --grid 3 5 4 --steps 2 --batch 3 --noise 0.5 --rate 1 --without-displacement --seeds 4 --out"
    search.main([*flags.split(), f"{tmp_path}/out"])
    size = dict(grid=[3, 5, 4], kernel=4, steps=2, batch=3, noise=0.5, rate=1, scale=0)
    experiments = [search.experiment(argparse.Namespace(**size), 4, frozen) for frozen in (False, True)]
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, name, (figures, _) in zip(lines, ("learned", "frozen"), experiments, strict=True):
        assert line.startswith("| {} | 4 | {:.1%} | {:.2f} | {:.2f} | 2 | ".format(name, *figures))
    ((axes, _),), (label, guess, marked, *points) = drawn, experiments[0][1]
    for (i, t), axis in zip(np.ndindex(3, 3), axes):
        assert t or axis.get_title("left") == f"sample {i}: code {label[i]}, predicted {guess[i]}"
        cells, *dots = axis.collections
        assert np.argwhere(cells.get_array()).tolist() == [cell for at, *cell in [marked[i].tolist()] if at == t]
        for dot, several in zip(dots, points):
            here = [[x, y] for at, y, x in several[i].tolist() if round(at) == t]
            assert dot.get_offsets().tolist() == here
        assert axis.get_ylim() == (4.5, -0.5) and not len(dots[0].get_facecolor())
    near = [search.experiment(argparse.Namespace(**size), seed, False)[0][2] for seed in (4, 5)]
    for other in ({"steps": 3}, {"batch": 4}, {"noise": 0.4}, {"rate": 0.2}, {"scale": 1}):
        near.append(search.experiment(argparse.Namespace(**size | other), 4, False)[0][2])
    assert len({float(distance) for distance in near}) == 7
    monkeypatch.setattr(search, "experiment", mock.Mock(side_effect=KeyboardInterrupt))
    assert search.main(["--out", f"{tmp_path}"]) == 130
    assert capsys.readouterr().err == "tools.search: interrupted\n"
