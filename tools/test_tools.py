"""Tests of the tools. Each docstring names the bug that the test catches."""

import argparse
import dataclasses
import math
import subprocess
import time
from collections import defaultdict
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

import data
import train
from d3t import D3T, Ablation, build
from test_d3t import (
    SMALL,
    clip_for,
    close,
    few_clips,
    loop_search,
    loop_starts,
    randomize,
    small,
    weights,
)
from tools import ablate, bench, check, explain, predict, search
from tools.common import file_name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of `few_clips`."""
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "synthetic", (few_clips, []))
        assert train.main([*SMALL.split(), "--stop-after", "1", "--out", f"{run}"]) == 0
        saved = torch.load(run / "last.pt", weights_only=True)
        del saved["model"]["head.bias"]
        torch.save(saved, run / "lacks.pt")
        yield run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    plots = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    figures = []

    def save(figure, path, **how):
        figures.append(figure)
        open(path, "w").close()

    monkeypatch.setattr(plots.Figure, "savefig", save)
    return figures


def run(tool, words):
    """Its status."""
    try:
        return tool.main(words.split())
    except SystemExit as end:
        return end.code


# ---- explain ----
@pytest.mark.parametrize("modal", [3, 1, 0])
def test_explanation_is_the_attention_of_the_modal_tokens(modal):
    """Catches: maps of other weights than the model's, a share lost on the way back to tokens."""
    s, two = small(modal_tokens=modal), min(modal, 2)
    model = randomize(build(s)).requires_grad_(False)
    video, joints, visible = clip_for(s)
    inputs = video.double() / 255, joints.double(), visible
    said = explain.explain(model, *inputs)
    logits, calls = explain.record_inputs(model, *inputs)

    def given(attention, call, b, frames, asking):
        """By the last tokens of each frame: mean over these and the heads."""
        w, (X, X_) = weights(attention), (x[b].numpy() for x in calls[attention][call])
        Q, K = (np.split(x @ w[f"W{n}.weight"].T, s.heads, 1) for x, n in ((X, "q"), (X_, "k")))
        score = np.stack([q @ k.T / math.sqrt(q.shape[1]) for q, k in zip(Q, K)])
        share = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        return share.mean(0).reshape(frames, -1, len(X_))[:, -asking:].mean(1)

    for (i, block), b in zip(enumerate(model.blocks), (1, 0)):  # both blocks and both clips
        deformable, joint, temporal = block.deformable, block.joint, block.temporal
        (Z,) = calls[deformable.search][0]
        _, points = loop_search(Z[b].numpy(), weights(deformable.search), s.kernel)
        close(said.points[b, i], points)
        share = given(deformable.attention, 0, b, s.frames, two).mean(0)
        share = share[: points[..., 0].size].reshape(points.shape[:3])
        close(said.selected[b, i], share)
        tokens = np.stack(np.indices(s.grid), -1).reshape(-1, 3)
        near = (1 - abs(points[..., None, :] - tokens)).clip(0).prod(-1)
        close(said.tokens[b, i], np.tensordot(share, near, 3).reshape(s.grid))

        starts = loop_starts(s.joints, s.joint_window, s.joint_stride)
        seen = np.full((len(starts), s.frames, s.joints), np.nan)
        for n, start in enumerate(starts):
            share = given(joint.attention, n, b, s.frames, two).mean(0).reshape(s.frames, -1)
            seen[n][:, start : start + s.joint_window] = share[:, : s.joint_window]
        close(said.joints[b, i], np.nanmean(seen, 0))

        window = s.temporal_window
        starts = loop_starts(s.frames, window, s.temporal_stride)
        seen = np.full((len(starts), s.frames, s.frames), np.nan)
        for n, start in enumerate(starts):
            share = given(temporal.attention, n, b, window, modal).reshape(window, window, -1)
            seen[n, start : start + window] = 0
            seen[n, start : start + window, start : start + window] = share.sum(-1)
        close(said.frames[b, i], np.nanmean(seen, 0))


def test_explanation_of_an_ablation():
    """Catches: maps invented for a disabled attention."""
    model = build(small(joint_attention=False, temporal_attention=False)).eval()
    said = explain.explain(model, *clip_for(model.settings))
    assert said.joints is None and said.frames is None and said.points is not None


def test_explanation_leaves_the_model_as_it_was():
    """Catches: hooks that stay, averages of batch norms that move."""
    model, clip = build(small()).eval(), clip_for(small())
    model._compiled_call_impl = lambda *_: pytest.fail("a graph has no hooks")  # of model.compile()
    explain.explain(model, *clip)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(AssertionError, match="eval"):
        explain.explain(model.train(), *clip)


@pytest.fixture
def explained(trained, tmp_path, monkeypatch, drawn):
    """`explain --clips 10`: the model, the folder and the item."""
    source = few_clips()
    source.clips["test"][10].name = "a/b"
    monkeypatch.setitem(data.SOURCES, "synthetic", (lambda: source, []))
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["settings"] |= {"height": 24, "width": 40}
    model = randomize(build(Ablation(**saved["settings"]))).float()
    torch.save(saved | {"model": model.state_dict()}, tmp_path / "new.pt")
    assert run(explain, f"{tmp_path}/new.pt --out {tmp_path}/out --clips 0 10") == 0
    return model, tmp_path / "out", data.Dataset(source, "test", 4, 24, 40)[10]


def test_explain_writes_the_chosen_clips(explained, capsys):
    """Catches: files or a label of another clip."""
    model, folder, clip = explained
    share = model(*(clip[key][None] for key in ("video", "joints", "visible"))).softmax(-1)[0]
    with np.load(folder / f"{file_name('10', 'a/b')}.npz") as arrays:
        assert arrays["name"] == "a/b" and arrays["label"] == clip["label"]
        close(arrays["probabilities"], share, 1e-5)
    assert len([*folder.glob("*.png")]) == 4


def test_points_are_drawn_where_the_search_reads(explained, drawn):
    """Catches: points or maps elsewhere in Fig. 5, or in another frame."""
    _, folder, clip = explained
    with np.load(folder / f"{file_name('10', 'a/b')}.npz") as arrays:
        points = 8 * arrays["points"].reshape(-1, 3)  # t, y, x of pixels
    for t, axis in enumerate(drawn[2].axes[:4]):  # after both pictures of the first clip
        here = [[x, y] for at, y, x in points.tolist() if round(at / 8) == t]
        assert axis.collections[0].get_offsets().tolist() == here
        assert [*axis.images[1].get_extent(), *axis.get_xlim()] == [-4, 36, 20, -4, -0.5, 39.5]


def test_names_of_files(tmp_path):
    """Catches: one name for two clips, a name that the file system refuses."""
    words = ["a/b", "a-b", "A-B", "../b", "x" * 300, "x" * 299 + "y", "\u4e2d" * 200, "\udce9"]
    names = [file_name("0", word) for word in words]
    for name in names:
        (tmp_path / f"{name}-tokens.png").touch()
    assert len({name.lower() for name in names}) == len(names) and all(map(str.isascii, names))


# ---- bench ----
MODEL = "--preset tiny --channels 4 --height 16 --width 24 --workers 0"
OPTIONS, _ = bench.parse_args([*MODEL.split(), "--joints", "8", "--rounds", "3"])
OPTIONS.device = "cpu"


@pytest.mark.parametrize("off", ["", "deformable", "joint", "temporal"])
@pytest.mark.parametrize("modal", [3, 1, 0])
def test_plain_version_of_the_benchmark(modal, off):
    """Catches: a plain version that computes something else."""
    s = small(modal_tokens=modal, **({f"{off}_attention": False} if off else {}))
    ours, plain = (bench.Version(s, OPTIONS, amp, 2).forward() for amp in ("off", "plain"))
    assert ours.std() > 0.01 and torch.allclose(plain, ours, atol=1e-5)


def test_parts_of_the_benchmark(monkeypatch):
    """Catches: a part left out or counted twice."""
    version, times = bench.Version(small(), OPTIONS), iter(range(100))
    monkeypatch.setattr(bench, "clock", lambda _: next(times))  # what calls no other part takes 1
    parts = version.parts()
    expected = [1, 1, 2, 4, 2, 2]  # 2 blocks; from clock to clock, 2 around the search
    assert [parts[name] for name in bench.PARTS] == expected
    assert parts["all"] == next(times) - 1 == sum(expected) + parts["rest"]


def test_medians_of_the_benchmark(monkeypatch):
    """Catches: the warm-up counted, a mean as median."""
    times = iter([now for took in (99, 1, 9, 0.5) for now in (0, took)])
    monkeypatch.setattr(bench, "clock", lambda _: next(times))
    parts = iter([{"part": 99}, {"part": 5}, {"part": 3}, {"part": 100}])
    assert bench.take_turns(OPTIONS, {"a": lambda: next(parts)}) == {"a": 1, ("a", "part"): 5}


def test_figures_of_the_benchmark(monkeypatch, capsys):
    """Catches: figures that ignore the batch, a ratio upside down."""
    seconds = defaultdict(lambda: 8, {("plain", "forward"): 4, ("off", "forward"): 1})
    monkeypatch.setattr(bench, "take_turns", lambda *_: seconds)
    monkeypatch.setattr(bench, "step_memory", lambda *_: 1)
    bench.plain(small(), argparse.Namespace(**vars(OPTIONS) | {"batch": 2, "amp": ["off"]}))
    printed = " | ".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert "forward, ms a clip 2000.0 500.0 | clips/s 0.500 2.000 | times as" in printed
    assert "times as fast as plain 1.00 4.00 | step, ms a clip 4000.0 4000.0" in printed


def test_memory_of_the_benchmark():
    """Catches: a peak without gradients or AdamW's averages."""
    s = small(channels=16, height=16, width=16)
    weights = sum(p.numel() for p in D3T(s).parameters())
    assert bench.step_memory(s, OPTIONS, "off", 1) * 2**30 > 4 * 4 * weights


def test_sections_of_the_benchmark(monkeypatch, capsys):
    """Catches: a section that fails, a disabled part in a table of sizes."""
    pytest.importorskip("PIL", reason="needs pillow")
    monkeypatch.setattr(bench, "SWEEPS", {"frames": (4, 8), "resolution": (16, 24)})
    monkeypatch.setattr(bench, "step_memory", lambda *_: 1)  # it has a test of its own
    monkeypatch.setattr(data, "synthetic", partial(data.synthetic, 1))  # with one clip in training
    monkeypatch.setattr(train, "keep_memory", lambda: None)  # for the life of this process
    words = f"all {MODEL} --joints 8 --rounds 1 --amp off --no-deformable-attention"
    assert run(bench, words) == 0
    out = capsys.readouterr().out
    assert out.count("6 frames of a JPEG clip") == 1
    assert (out.count("  token search "), out.count("  joint attention ")) == (0, 2)


# ---- ablate ----
@pytest.fixture
def starts(monkeypatch):
    """The folders of runs that `ablate` starts, none of which trains."""
    top1 = {4: (0.5, 1), 6: (4, 6), 8: (1.5, 3.5), 12: (2, 3.5)}  # by frames, for two seeds
    started = []

    def start(command, env, stdout, stderr):
        options, given = train.parse_args(command[2:])
        started.append(options.out)
        stderr.write(f"starts\n{env['OMP_NUM_THREADS']} threads\n")
        time.sleep(0.2 if len(started) == 1 else 0.02)  # so that the first one does not end first
        last = top1[given["frames"]][given["seed"] > 1] / 100
        (options.out / "log.jsonl").write_text(f'{{"top1": 0.9}}\n{{"top1": {last}}}\n')
        return subprocess.CompletedProcess(command, int(given.get("batch") == 1))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(ablate.subprocess, "run", start)
    return started


def test_table_of_an_ablation(starts, tmp_path, drawn):
    """Catches: figures of another row, seed or epoch, a wrong spread."""
    assert run(ablate, f"fig7b --frames 8 --out {tmp_path} --jobs 3 --seeds 1 3") == 0
    (path,) = tmp_path.glob("synthetic-*/fig7b.md")
    assert path.read_text(encoding="utf-8").splitlines()[4:] == [
        "| 4 frames | `--frames 4` | 0.75 ± 0.35 | 0.50 .. 1.00 | -1.75 | yes |  |",
        "| 6 frames | `--frames 6` | 5.00 ± 1.41 | 4.00 .. 6.00 | +2.50 | yes |  |",
        "| 8 frames |  | 2.50 ± 1.41 | 1.50 .. 3.50 |  |  |  |",
        "| 12 frames | `--frames 12` | 2.75 ± 1.06 | 2.00 .. 3.50 | +0.25 | no |  |",
    ]


def test_an_ablation_ends_with_a_run_that_fails(starts, tmp_path, capsys):
    """Catches: hours of runs after a flag that none of them takes."""
    seeds = " ".join(map(str, range(100)))
    words = f"table5 --frames 4 --batch 1 --out {tmp_path} --jobs 3 --seeds {seeds}"
    assert run(ablate, words) == 2
    time.sleep(0.2)
    assert len(starts) < 10
    assert "ended with status 1: 2 threads" in capsys.readouterr().err


@pytest.mark.parametrize("frames, stride", [(6, 2), (6, 4), (5, 2), (12, 3)])
@pytest.mark.parametrize("what", ["table4", "table5", "fig7a", "fig7b"])
def test_rows_of_the_ablations(what, frames, stride):
    """Catches: two rows that are the same model, no row of the unchanged model."""
    settings, models = Ablation(frames=frames, temporal_stride=stride), []
    for row in ablate.rows_of(what, settings):
        model = dataclasses.replace(settings, **train.parse_args(row.flags.split())[1])
        assert (model == settings) == (not row.flags)
        starts = loop_starts(model.frames, model.temporal_window, model.temporal_stride)
        models.append((dataclasses.replace(model, temporal_stride=1), starts))
    assert all(models.count(model) == 1 for model in models)


@pytest.mark.parametrize("hide", ["joints", "video"])
def test_a_hidden_modality(hide, tmp_path, monkeypatch):
    """Catches: a modality that is seen in training or in the test."""
    monkeypatch.setitem(data.SOURCES, "synthetic", (few_clips, []))
    seen, forward = [], D3T.forward
    monkeypatch.setattr(D3T, "forward", lambda *x: (seen.append(x[1:]), forward(*x))[1])
    assert run(ablate, f"--hide {hide} {SMALL} --epochs 1 --out {tmp_path}/run") == 0
    for video, _, visible in seen:
        assert (len(video.unique()) == 1) == (hide == "video")
        assert visible.any() == (hide == "video")


# ---- check ----
class Two(data.Source):
    """Clips of two frames; "d" is damaged."""

    def __init__(self):
        super().__init__(["x", "y"], ["head", "hand"], [])
        self.problems, self.missing = ["broken"], ["M is gone"]
        for name, split in zip("aabcd", ["train"] * 3 + ["test"] * 2):
            visible = np.array([[True, False], [True, True]]) & (name != "c")
            clip = data.Clip(name, int(name > "a"), None, visible, (9, 9), name)
            self.clips[split].append(clip)

    def find_joints(self, clip):
        return dataclasses.replace(clip, joints=np.zeros((2, 2, 2)))

    def read(self, clip, frames, size, crop):
        if clip.name == "d":
            raise data.BadClip(f"bad: frames {frames.tolist()}")
        return data.Frames(np.zeros((2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("workers", [0, 1])
def test_check_counts_what_is_there(workers, monkeypatch, capsys):
    """Catches: counts of another split or class, frames that are not read."""
    monkeypatch.setattr(data, "load", lambda options: Two())
    assert run(check, f"--workers {workers}") == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == ["x 2 0", "y 1 2", "all 3 2", "8 frames, 2 joints, 56.2% of them visible"]
    assert lines[5:8] == ["clips without a visible joint: c", "M is gone", "broken"]
    assert lines[8:] == ["bad: frames [0, 1]", "1 left out, 2 problems"]


def test_status_of_check():
    """Catches: status 1 for a data set without a problem."""
    assert check.check(few_clips(), 0) == 0


# ---- What is refused ----
REFUSED = [  # tool, words, what the error names
    (explain, "{run}/last.pt --clips 11", "0 to 10"),
    (explain, "{run}/lacks.pt", "head.bias"),
    (predict, "{run}/last.pt gone.mp4 {run}/last.pt", "last.pt: expected an .npz"),
    (bench, "--batch 0", "--batch"),
    (bench, "--kernel 1", "kernel = 1"),
    (ablate, "table4 --seed 3", "--seed"),
    (check, "--root {run}/gone", "--root"),
    (search, "--kernel 2", "--kernel"),
]


@pytest.mark.parametrize("tool, words, said", REFUSED)
def test_what_the_tools_refuse(tool, words, said, trained, monkeypatch, capsys):
    """Catches: a traceback for a wrong flag or file, an error that does not name it."""
    monkeypatch.setattr(ablate, "train_rows", lambda *_: pytest.fail("it trains"))
    assert run(tool, words.format(run=trained)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# ---- predict ----
@pytest.fixture(scope="module")
def videos():
    pytest.importorskip("av", reason="needs av, for videos")
    from sources import test_sources

    return test_sources


BAD_JOINTS = [
    ((2, 6, 13, 2), "2 persons with 13 joints; the checkpoint knows head, "),
    ((6, 13, 2), "v.mp4: keypoint is (6, 13, 2), expected"),
    ((1, 8, 13, 2), "v.mp4: v has joints of 8 frames, but 6 frames"),
]


@pytest.mark.parametrize("shape, said", BAD_JOINTS)
def test_joints_that_do_not_fit(shape, said, trained, videos, tmp_path, capsys):
    """Catches: joints of another data set or video that are taken."""
    path = videos.write_video(tmp_path / "v.mp4", np.full((6, 32, 32, 3), 99, np.uint8))
    np.savez(tmp_path / "v.npz", keypoint=np.full(shape, 9))
    assert run(predict, f"{trained}/last.pt {path} {tmp_path}/v.npz") == 2
    assert said in capsys.readouterr().err


def test_predict(trained, videos, drawn, tmp_path, monkeypatch, capsys):
    """Catches: names of other classes, joints drawn elsewhere than in the model."""
    given, logits = [], torch.tensor([[0.0, 3, 1, 2, 0, -9]])
    monkeypatch.setattr(D3T, "forward", lambda _, *clip: (given.append(clip), logits)[1])
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["settings"] |= {"height": 96, "width": 96, "classes": 6, "joints": 26}
    names = [f"{joint} {person}" for person in (1, 2) for joint in data.PENN_JOINTS]
    saved |= {"classes": [*"abcdef"], "joint_names": names}
    saved["model"] = build(Ablation(**saved["settings"])).state_dict()
    torch.save(saved, tmp_path / "large.pt")
    joints = np.random.default_rng(0).integers(60, 100, (1, 9, 13, 2))
    video = np.full((9, 200, 160, 3), 40, np.uint8)
    score = np.tile(0.5 * (np.arange(13) == 4), (1, 9, 1))
    for frame, (x, y) in zip(video, joints[0, :, 4]):  # the marked joint
        frame[y - 8 : y + 9, x - 8 : x + 9] = 250
    np.savez(tmp_path / "clip.npz", keypoint=joints, keypoint_score=score)
    path = videos.write_video(tmp_path / "clip.mp4", video)
    words = f"{tmp_path}/large.pt {path} {tmp_path}/clip.npz --out {tmp_path}/out"
    assert run(predict, words) == 0
    assert capsys.readouterr().out.startswith(" 62.4%  b\n 23.0%  d\n  8.4%  c\n")
    ((shown, at, visible),) = given
    assert visible[0].sum(0).tolist() == [4 * (joint == 4) for joint in range(26)]
    for t, axis in enumerate(drawn[0].axes):
        marked = np.argwhere(shown[0, 0, t].numpy() > 140).mean(0)[::-1]
        assert np.abs(at[0, t, 4].numpy() - marked).max() < 0.5
        close(axis.collections[0].get_offsets().data, at[0, t, 4:5], 1e-5)


# ---- search ----
SEARCH = dict(grid=[2, 5, 7], kernel=3, steps=200, batch=32, noise=0.2, rate=0.01, scale=14)


def test_search_reads_what_the_regular_grid_does_not():
    """Catches: a search that cannot learn where to read, points outside the volume."""
    options = argparse.Namespace(**SEARCH)
    (top1, before, after, _), tested = search.experiment(options, 3, False)
    assert top1 >= 0.95
    assert after < 0.5 and before > 1
    assert ((tested[4] >= 0) & (tested[4] <= torch.tensor([1, 4, 6]))).all()


def test_samples_of_the_search():
    """Catches: a marked token that the regular grid reads, a displacement to another token."""
    options = argparse.Namespace(**SEARCH | {"grid": [2, 5, 6], "kernel": 5, "noise": 0})
    torch.manual_seed(0)
    Z, label, marked = search.draw_samples(options, 400, torch.arange(1.0, 53).view(4, 13))
    for z, code, at in zip(Z, 13 * label, marked.tolist()):
        for point in ((0.5, 2, 2), (0.5, 2, 3)):
            assert max(abs(a - p) for a, p in zip(at, point)) >= 1
        for n in np.ndindex(2, 5, 6):
            assert z[n][:3].tolist() == pytest.approx([14 / 6 * (a - i) for a, i in zip(at, n)])
            assert z[n][3:].tolist() == [code + i + 1 if [*n] == at else 0 for i in range(13)]
    assert len(marked.unique(dim=0)) == 2 * (5 * 6 - 2)


def test_command_of_the_search(tmp_path, drawn, capsys):
    """Catches: a frozen search that learns, points drawn elsewhere."""
    flags = "--kernel 4 --grid 3 5 4 --steps 2 --batch 3 --noise 0.5 --rate 1 --seeds 4"
    assert run(search, f"{flags} --without-displacement --out {tmp_path}/out") == 0
    size = dict(grid=[3, 5, 4], kernel=4, steps=2, batch=3, noise=0.5, rate=1.0, scale=0)
    figures, tested = search.experiment(argparse.Namespace(**size), 4, False)
    *_, line, frozen = capsys.readouterr().out.splitlines()
    assert line.startswith("| learned | 4 | {:.1%} | {:.2f} | {:.2f} | 2 | ".format(*figures))
    assert frozen.split()[7] == frozen.split()[9]  # the distance before and after
    for t, axis in enumerate(drawn[0].axes[:3]):  # the first sample
        here = [[x, y] for at, y, x in tested[4][0].tolist() if round(at) == t]
        assert axis.collections[2].get_offsets().tolist() == here


def test_ctrl_c(monkeypatch):
    """Catches: a traceback for Ctrl-C."""
    monkeypatch.setattr(data, "load", mock.Mock(side_effect=KeyboardInterrupt))
    assert run(check, "") == 130
