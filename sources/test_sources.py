"""The proof of the sources. Each docstring of a test names the bug that it catches."""

import argparse
import contextlib
import itertools
import os
import pickle
import re
import struct
import wave
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import data

av = pytest.importorskip("av", reason="needs av, the decoder of videos")

from sources import ntu, pickles, video  # noqa: E402


def options(*words):
    parser = argparse.ArgumentParser()
    data.add_flags(parser)
    return parser.parse_args([*map(str, words)])


def all_of(height, width):
    return slice(0, height), slice(0, width)


def cases(names, rows):
    """A test for each row of {id: values}."""
    return pytest.mark.parametrize(names, [*rows.values()], ids=[*rows])


# ---- Videos ----
def write_video(path, pictures, gop=250, skip=0):
    """Encode uint8 (n, h, w, 3) as NTU does: one key frame, and B-frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "1", "bf": "3", "g": str(gop)}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        packets = []
        for picture in pictures:
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24"))
        container.mux([*packets, *stream.encode()][skip:])
    return path


def numbered(n, height=54, width=96):
    """Frames whose red says which they are: 20, 25, 30 and so on."""
    red = np.arange(n) * 5 + 20
    colours = np.stack([red, np.full(n, 120), np.full(n, 70)], -1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (n, height, width, 3)).copy()


def patch(path, turns=0, start=0):
    """Turn an mp4 by quarters to the right, let it begin at a frame, put a cover before its video.

    Boxes are those of ISO 14496-12: `tkhd` has the matrix of the turn, `elst` the beginning.
    """

    def box(kind, content):
        return struct.pack(">I", 8 + len(content)) + kind + content

    content = bytearray(path.read_bytes())
    x, y = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]  # where the x axis of the stored frame points
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(
        ">9i", x << 16, y << 16, 0, -y << 16, x << 16, 0, 0, 0, 1 << 30
    )
    at = content.index(b"elst") + 16
    content[at : at + 4] = struct.pack(">i", (start + 2) * 512)  # 2 for B-frames, 512 ticks a frame
    picture = box(b"covr", box(b"data", struct.pack(">2i", 13, 0) + b"a JPEG"))
    handler = box(b"hdlr", bytes(8) + b"mdir" + bytes(13))
    cover = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", picture)))
    at = content.index(b"moov") - 4
    path.write_bytes(content[:at] + box(b"moov", cover + content[at + 8 :]))


@pytest.mark.parametrize("ending", ["_rgb.avi", ".mp4"])
def test_frames_come_by_number(tmp_path, ending):
    """Catches: frame i - 2 for i, as by seeking in NTU files."""
    path = write_video(tmp_path / f"clip{ending}", numbered(20))
    frames = np.array([0, 3, 3, 17, 18, 19, 20])  # there is no 20
    read, count, shown = video.read_video(path, frames, (27, 48), all_of(27, 48))
    red = read[..., 0].mean((1, 2))
    assert np.array_equal(((red - red[0]) / 5).round(), frames[:-1])
    assert (count, shown) == (20, (54, 96)) and video.video_length(path) == 20


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_frames_are_read_as_they_are_shown(tmp_path, turns):
    """Catches: a phone's video on its side; red for blue, or a crop of another place."""
    ramp = np.add.outer(2 * np.arange(64), np.arange(96)).astype(np.uint8) // 2
    pictures = numbered(4, 64, 96) + ramp[..., None]
    path = write_video(tmp_path / "clip.mp4", pictures)
    patch(path, turns)
    upright = np.rot90(pictures, -turns, (1, 2))
    height, width = upright.shape[1] // 2, upright.shape[2] // 2
    expected = upright.reshape(4, height, 2, width, 2, 3).mean((2, 4))
    read, _, shown = video.read_video(path, np.arange(4), (height, width), np.s_[2:30, 6:28])
    assert abs(read - expected[:, 2:30, 6:28]).max() < 4
    assert shown == upright.shape[1:3]


@pytest.mark.parametrize("part, said", [(0, "Invalid data"), (0.75, "it breaks off")])
def test_a_video_that_breaks_off(tmp_path, part, said):
    """Catches: what is left of a file taken for a shorter video, over which joints are spread."""
    path = write_video(tmp_path / "clip.avi", numbered(40))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(data.BadClip, match=f"^{path}: .*{said}"):
        video.video_length(path)
    with pytest.raises(data.BadClip, match=f"^{path}: .*{said}"):
        video.read_video(path, np.array([0]), (27, 48), all_of(27, 48))


def test_files_without_a_picture(tmp_path):
    """Catches: a file of sound alone, or without a key frame, that ends a worker."""
    sound = tmp_path / "sound.mp4"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    with pytest.raises(data.BadClip, match="sound.mp4: no video in it"):
        video.video_length(sound)
    cut = write_video(tmp_path / "cut.mkv", numbered(20), skip=1)
    with pytest.raises(data.BadClip, match="cut.mkv: no frame in it"):
        video.read_video(cut, np.array([0]), (27, 48), all_of(27, 48))


def clip_of(path, joints, size):
    """A source and its only clip."""
    source = video.VideoSource(["walk"], ["nose"] * joints.shape[1], [])
    clip = data.Clip("own", 0, np.float32(joints), True, size, path)
    source.clips["test"] = [clip]
    return source, clip


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("T", [6, 12, 40])
@pytest.mark.parametrize("ending, first", [("mp4", 17), ("avi", 16), ("mkv", 16)])
def test_joints_follow_a_video_that_was_cut(tmp_path, ending, first, T, spread):
    """Catches: frames chosen by a number of packets, of which a decoder shows fewer."""
    cut = 0 if ending == "mp4" else 11
    path = write_video(tmp_path / f"cut.{ending}", numbered(40), gop=16, skip=cut)
    if ending == "mp4":  # it marks the packets that it hides; in the others, a key frame is lacking
        patch(path, start=17)
    joints = np.arange(first, 40).repeat(2).reshape(-1, 1, 2)  # at the number of the frame
    source, clip = clip_of(path, joints, (54, 96))
    source.spread = spread
    assert (source.length(clip) == 40 - first) == (ending == "mp4")
    choose = lambda n: np.arange(T) * n // T  # noqa: E731
    read, joints, _ = data.read_clip(source, clip, choose, (54, 96), all_of(54, 96))
    assert abs(read[..., 0].mean((1, 2)) - 20 - 5 * joints[:, 0, 0]).max() < 2.5


@cases(
    "shape, turns, said",
    {
        "fits": ((60, 100), 0, None),
        "rounded": ((122, 200), 2, None),
        "sides exchanged": ((100, 60), 0, "frames of .100, 60., .* has .60, 100. "),
        "turned later": ((60, 100), 3, "frames of .60, 100., .* has .100, 60. "),
        "too wide": ((60, 105), 0, "frames of .60, 105., .* has .60, 100. "),
    },
)
def test_joints_of_another_frame(tmp_path, shape, turns, said):
    """Catches: sides exchanged; joints for a video that was turned after they were found."""
    path = write_video(tmp_path / "own.mp4", numbered(8, 60, 100))
    patch(path, turns)
    source, _ = clip_of(path, np.full((8, 17, 2), 9), shape)
    match = f"^{path}: the joints of own refer to {said}"
    with pytest.raises(data.BadClip, match=match) if said else contextlib.nullcontext():
        data.Dataset(source, "test", 4, 24, 24)[0]


@pytest.mark.parametrize(
    "name, key",
    [
        ("./walk//v1.MP4", "walk/v1"),
        ("S001C001P001R001A001_rgb.avi", "S001C001P001R001A001"),
        ("0LtLS9wROrk_E_002407_002435_A_0003_0005", "0LtLS9wROrk_002407_002435_0003_0005"),
        ("v1.2", "v1.2"),
    ],
)
def test_names_that_mean_one_clip(name, key):
    """Catches: a suffix of a data set or a file that keeps a clip from its video."""
    assert video.clip_key(name) == key


def test_files_are_found_by_name_and_by_path(tmp_path):
    """Catches: "walk/v1" read for "run/v1"; a folder behind a link left out."""
    elsewhere = tmp_path / "elsewhere"
    for path in (tmp_path / "root/walk/v1.mp4", elsewhere / "v1.avi", elsewhere / "notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "root/run").symlink_to(elsewhere)
    run, walk = tmp_path / "root/run/v1.avi", tmp_path / "root/walk/v1.mp4"
    found = video.find_files([tmp_path / "root"], video.VIDEOS)
    assert found == {"v1": [run, walk], "walk/v1": [walk], "run/v1": [run]}


@pytest.mark.parametrize("name", ["concat:c|d", "100%d #1?", "two\nlines", os.fsdecode(b"caf\xe9")])
def test_names_that_decoders_could_misread(tmp_path, monkeypatch, name):
    """Catches: a name that av takes for a protocol or a pattern."""
    monkeypatch.chdir(tmp_path)
    path = write_video(Path("v.mp4"), numbered(2, 36, 60))
    assert video.video_length(path.rename(f"{name}.mp4")) == 2


# ---- NTU RGB+D ----
def body(x, y, wide=0.4, wobble=0.0):
    """25 joints as in .skeleton: a column of them at x, y of the colour image."""
    at = np.linspace(-0.5, 0.5, 25)
    place = np.stack([at * wide + (x - 960) / 300 + wobble, at * -1.7, np.full(25, 3.0)], -1)
    colour = np.stack([x + at * 60 + 300 * wobble, y + at * 300], -1)
    state = 1 + np.arange(25)[:, None] % 2
    return np.concatenate([place, colour / 4, colour, np.zeros((25, 4)), state], 1)


def skeleton(frames):
    """The text of a .skeleton file of frames [[(id, body), ...], ...]."""
    lines = [len(frames)]
    for bodies in frames:
        lines.append(len(bodies))
        for identity, joints in bodies:
            lines += [f"{identity} 0 1 1 1 1 0 0.027 0.057 2", 25]
            lines += [" ".join(f"{value:.7g}" for value in row) for row in joints]
    return "".join(f"{line}\r\n" for line in lines).encode()


def persons(frames):
    return ntu.two_persons(*ntu.parse_skeleton(skeleton(frames)))


def walkers(n=40):
    """Two who move, the first of them more."""
    left = [body(500, 500, wobble=0.05 * (t % 5)) for t in range(n)]
    right = [body(700, 500, wobble=0.02 * (t % 5)) for t in range(n)]
    return left, right


def test_ntu_persons_keep_their_slots():
    """Catches: ids as floats, equal near 2^56; not the two who move most."""
    (left, right), kinect, frames = walkers(), 72057594037944738, []
    for t in range(40):
        pair = [(kinect, left[t]), (kinect - 4, right[t])]
        still = body(1300, 500) * (t not in (8, 9))  # zeros are nobody
        frames.append([(1, still), *pair[:: 1 if t % 2 else -1]])
    left[3][0, 0] = np.nan  # in metres
    joints, visible = persons(frames)
    expected = np.concatenate([left, right], 1)[..., 5:7]
    assert visible.all() and joints.dtype == np.float32
    assert np.allclose(joints, expected, atol=0.01)


def test_ntu_frames_keep_their_rows():
    """Catches: frames without a body that are dropped."""
    left, _ = walkers()
    frames = [[(1, left[t]), (1, body(50, 50))] for t in range(40)]
    frames[25:28] = [], [], []
    joints, visible = persons(frames)
    seen = np.delete(np.arange(40), [25, 26, 27])
    assert np.array_equal(np.flatnonzero(visible[:, 7]), seen) and not visible[:, 25:].any()
    assert np.allclose(joints[seen, :25], np.array(left)[seen][..., 5:7], atol=0.01)
    assert not persons([[]] * 4)[1].any()


@cases(
    "field, value, lost",
    {
        "nan": (5, np.nan, True),
        "right of the picture": (5, 1920, True),
        "left of the picture": (5, -1, True),
        "below": (6, 1080, True),
        "above": (6, -3, True),
        "not tracked": (11, 0, True),
        "zeros": (slice(5, 7), 0, True),
        "nan in metres": (slice(0, 3), np.nan, False),
    },
)
def test_ntu_joints_that_are_lost(field, value, lost):
    """Catches: a lost joint that is visible; another one that is lost with it."""
    left, _ = walkers(4)
    for each in left:
        each[7, field] = value
    _, visible = persons([[(1, each)] for each in left])
    expected = (np.arange(25) != 7) | (not lost)
    assert np.array_equal(visible[:, :25], [expected] * 4)


@cases(
    "person, seen, wide, often",
    {
        "11 frames": (False, 11, 0.4, 0),
        "12 frames": (True, 12, 0.4, 0),
        "wide in 21 of 30": (False, 30, 1.4, 21),
        "wide in 20 of 30": (True, 30, 1.4, 20),
        "not so wide": (True, 30, 1.3, 30),
    },
)
def test_ntu_ghosts(person, seen, wide, often):
    """Catches: a chair taken for a person; nobody found where there is but a ghost."""
    widths = [wide if t < often else 0.4 for t in range(seen)]
    chair = [[(2, body(1500, 600, widths[t], wobble=0.1 * (t % 3)))] for t in range(seen)]
    frames = [[(1, body(900, 500, wobble=0.03 * (t % 4)))] for t in range(30)]
    both = [frame + more for frame, more in itertools.zip_longest(frames, chair, fillvalue=[])]
    assert persons(both)[1][:, 25:].any() == person
    assert persons(chair)[1].any()


@cases(
    "change, said",
    {
        "no number": (lambda old: old.replace(b" 3 ", b" z ", 1), "'z'"),
        "no id": (lambda old: old.replace(b"1 0 1 1", b" \r\n", 1), ""),
        "cut in a line": (lambda old: old[:-20], ""),
        "cut after a line": (lambda old: old[: old.rindex(b"\r\n", 0, -100)], "breaks off"),
    },
)
def test_ntu_skeletons_that_are_damaged(tmp_path, change, said):
    """Catches: a damaged skeleton that ends a worker, or is read as if it were whole."""
    path = tmp_path / "a.skeleton"
    path.write_bytes(change(skeleton([[(1, body(900, 500))]] * 2)))
    source = object.__new__(ntu.NTU60XSub)
    with pytest.raises(data.BadClip, match=f"^{path}: .*{said}"):
        source.find_joints(data.Clip("a", 0, None, None, (9, 9), ([path], path)))


TESTED = {  # performers
    3, 6, 7, 10, 11, 12, 20, 21, 22, 23, 24, 26, 29, 30, 32, 33, 36, 37, 39, 40, 41, 42, 43, 44, 48,
    51, *range(60, 70), 71, 72, 73, 75, 76, 77, 79, 87, 88, 90, 96, 99, 101, 102, 104, 105, 106,
}  # fmt: skip


@cases(
    "most, tested",
    {
        "NTU60XSub": (40, lambda s, c, p: p in TESTED),
        "NTU60XView": (40, lambda s, c, p: c == 1),
        "NTU120XSub": (106, lambda s, c, p: p in TESTED),
        "NTU120XSet": (106, lambda s, c, p: s % 2 == 1),
    },
)
def test_ntu_protocols(request, most, tested):
    """Catches: a performer, camera or setup on the wrong side of a split."""
    source = object.__new__(getattr(ntu, request.node.callspec.id))
    for sample in itertools.product(range(1, 33), (1, 2, 3), range(1, most + 1)):
        assert source.is_training(*sample) != tested(*sample)


SAMPLES = ["S001C001P001R001A001", "S001C002P003R001A060"]
SAMPLES += ["S018C003P041R002A061", "S002C001P001R003A007"]


@pytest.fixture
def roots(tmp_path):
    """Three roots with four samples, of 14 frames whose joint 3 is a green dot."""
    walker = [body(700 + 40 * t, 500) for t in range(14)]
    row, column = np.mgrid[:108, :140]  # the colour camera is ten times as high; it is squeezed
    dots = np.full((14, 108, 140, 3), 16, np.uint8)
    for t, joints in enumerate(walker):
        x, y = (joints[3, 5:7] + 0.5) * [140 / 1920, 0.1] - 0.5
        dot = 200 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 8)
        dots[t, ..., 1] += dot.astype(np.uint8)
    endings = ("_rgb.avi", ".mp4", "_rgb.mp4", "_rgb.avi")
    for i, (name, ending) in enumerate(zip(SAMPLES, endings)):
        write_video(tmp_path / "rgb" / name[:4] / (name + ending), dots)
        path = tmp_path / f"skeletons {i % 2}" / f"{name}.skeleton"
        path.parent.mkdir(exist_ok=True)
        rows = 13 if i == 1 else 14  # the second skeleton lacks one
        path.write_bytes(skeleton([[(1, joints)] for joints in walker[:rows]]))
    return [tmp_path / "rgb", tmp_path / "skeletons 0", tmp_path / "skeletons 1"]


def test_ntu_pairs_videos_and_skeletons(roots):
    """Catches: clips paired wrongly or a label from 1; a half that is missing without a word."""
    (roots[1] / "S003C001P001R001A001.skeleton").write_bytes(skeleton([[]]))
    write_video(roots[0] / "S003C001P001R001A002_rgb.avi", numbered(2))
    source = ntu.NTU120XSub(roots)
    found = [[(clip.name, clip.label) for clip in clips] for clips in source.clips.values()]
    train, test = [(SAMPLES[0], 0), (SAMPLES[3], 6)], [(SAMPLES[1], 59), (SAMPLES[2], 60)]
    assert found == [train, test]
    lacking = ["S003C001P001R001A001 has no video", "S003C001P001R001A002 has no skeleton"]
    assert source.missing == lacking and not source.problems
    assert source.classes[::119] == ["A001", "A120"]


def test_ntu_names_both_persons(roots):
    """Catches: pairs of a mirror that exchange persons, or are those of one."""
    source = ntu.NTU60XView(roots)
    names = source.joint_names
    assert names[::25] == ["spine base 1", "spine base 2"]
    left = [i for i, name in enumerate(names) if "left" in name]
    pairs = [(i, names.index(names[i].replace("left", "right"))) for i in left]
    assert sorted(source.flip_pairs) == pairs


def test_ntu_joints_lie_on_their_pixels(roots):
    """Catches: joints of another frame, or not scaled with a squeezed video."""
    item = data.Dataset(ntu.NTU120XSub(roots), "test", 14, 80, 120)[0]
    assert item["visible"][:, 3].any() and not item["visible"][:, 25:].any()
    for t in np.flatnonzero(item["visible"][:, 3]):
        row, column = divmod(item["video"][1, t].argmax().item(), 120)
        assert abs(item["joints"][t, 3].numpy() - [column, row]).max() < 1.5


@cases(
    "number, protocol, warned, listed",
    {
        "60": ("", "60XSub", 0, SAMPLES[3:]),
        "120 without": ("", "120XSub", 1, SAMPLES[2:]),
        "120": ("120", "120XSet", 0, SAMPLES[2:]),
    },
)
def test_ntu_leaves_out_what_has_no_skeleton(roots, capsys, number, protocol, warned, listed):
    """Catches: the list of the authors unread; an action of NTU 120 alone in NTU 60."""
    name = f"NTU_RGBD{number}_samples_with_missing_skeletons.txt"
    (roots[2] / name).write_text("\n".join(["Prose", *listed]))
    source = getattr(ntu, f"NTU{protocol}")(roots)
    assert {clip.name for clips in source.clips.values() for clip in clips} == {*SAMPLES[:2]}
    assert capsys.readouterr().err.count("warning: there is no NTU_RGBD120_samples") == warned


@pytest.mark.parametrize("n, fits", [(13, True), (12, False), (16, False)])
def test_ntu_videos_of_another_length(roots, n, fits):
    """Catches: a smaller video that does not fit taken."""
    path = write_video(roots[1] / f"{SAMPLES[0]}.mp4", numbered(n, 36, 64))
    source = ntu.NTU60XSub(roots)
    assert (source.find_joints(source.clips["train"][0]).media == path) == fits
    (roots[0] / "S001" / f"{SAMPLES[0]}_rgb.avi").unlink()
    bad = data.Dataset(ntu.NTU60XSub(roots), "train", 14, 24, 24)[0]["bad"]
    why = f"{path}: {SAMPLES[0]} has joints of 14 frames, but {n} frames are in the video"
    assert bad == ([] if fits else [(SAMPLES[0], why)])


# ---- Pickles ----
def entry(name, n=8, persons=1, joints=17, **changes):
    """An annotation of pyskl's form, in float16 as in its files."""
    rng = np.random.default_rng(n)
    keypoint = rng.uniform(5, 55, (persons, n, joints, 2)).astype(np.float16)
    score = rng.uniform(0.1, 0.9, (persons, n, joints)).astype(np.float16)
    own = dict(frame_dir=name, label=3, img_shape=(60, 100), keypoint=keypoint)
    return own | dict(keypoint_score=score) | changes


def read_own(root, annotations, train=(), val=(), **changes):
    """The source of a pickle ROOT/own.pkl with these entries and splits."""
    content = dict(split=dict(train=train, val=val)) | changes
    write_own(root, content | dict(annotations=annotations))
    return pickles.Pyskl([root], root / "own.pkl")


def write_own(root, content):
    (root / "own.pkl").write_bytes(pickle.dumps(content))


@pytest.fixture
def videos(tmp_path):
    """A root with four videos of 12 frames."""
    path = write_video(tmp_path / "subactions/one.mp4", numbered(12, 60, 100))
    for name in ("two", "three_rgb", "c_024_035_03_05"):
        path.with_name(f"{name}.mp4").write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.filterwarnings("ignore:numpy.core")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_hold_the_arrays_that_were_written(tmp_path, protocol):
    """Catches: a name of numpy 1, of numpy 2 or of an old protocol that is refused."""
    plain = np.random.default_rng(0).random((2, 3, 4))
    arrays = [plain, plain.T, plain.astype("f2"), plain.astype(">f4"), plain > 0.5, np.float32(1.5)]
    arrays += [np.array(["ab", "c"]), np.array([{"a": 1}, None, "text", [2]], object).reshape(2, 2)]
    more = [b"", b"\xff", {1}, defaultdict(list, a=[1])]
    content = pickle.dumps(dict(arrays=arrays, more=more), protocol)
    path = tmp_path / "own.pkl"
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core") if protocol < 4 else content)
    assert pickles.Unpickler(path.open("rb")).find_class("numpy.core.numeric", "_frombuffer")
    read = pickles.read_pickle(path)
    assert read["more"] == more
    for array, own in zip(arrays, read["arrays"], strict=True):
        assert np.array_equal(own, array) and own.dtype.str[1:] == array.dtype.str[1:]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "function", [os.system, eval, open, itertools.starmap, pickle.loads, getattr]
)
def test_pickles_that_run_code_are_refused(tmp_path, function, protocol):
    """Catches: an unpickler that finds what can run code: os.system and ways around a ban of it."""
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([function], protocol))
    with pytest.raises(data.DataError, match=rf"evil.pkl: .*it wants \w+\.{function.__name__}, "):
        pickles.Pyskl([tmp_path], path)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("least", [0, 0.5])
def test_joints_that_were_not_found(videos, least, column):
    """Catches: zeros that pad, NaN or a low score visible; a third column unread."""
    own = entry("two", 8, 2)
    keypoint, score = own["keypoint"], own["keypoint_score"]
    keypoint[0, 2, 2], keypoint[1, 5:], keypoint[0, 4, 0] = np.nan, 0, (0, 9)
    score[0, 0, :3], score[1, 1, 1] = (0, 0.5, 0.6), np.nan
    if column:
        own["keypoint"] = np.concatenate([keypoint, own.pop("keypoint_score")[..., None]], -1)
    write_own(videos, dict(split=dict(train=["two"], val=[]), annotations=[own]))
    (clip,) = pickles.Pyskl([videos], videos / "own.pkl", min_score=least).clips["train"]
    lost = np.isnan(keypoint).any(-1) | (keypoint == 0).all(-1)
    expected = ~lost & (score > least)
    assert np.array_equal(clip.visible, expected.swapaxes(0, 1).reshape(8, 34))
    known = keypoint.swapaxes(0, 1).reshape(8, 34, 2)[clip.visible]
    assert clip.joints.dtype == np.float32 and np.array_equal(clip.joints[clip.visible], known)


@pytest.mark.parametrize("file", ["gym_hrnet.pkl", "gym_2d.pkl"])
def test_pyskl_pairs_entries_and_videos(videos, file):
    """Catches: names that do not fit; a missing video that is not told."""
    names = ["c_E_024_035_A_03_05", "two.avi", "three", "one", "gone", "unlisted"]
    annotations = [entry(name, persons=i % 4) for i, name in enumerate(names)]
    split = dict(train={*names[:2]}, val=[*names[2:5], "ghost"])
    write_own(videos, dict(split=split, annotations=annotations))
    (videos / "own.pkl").rename(videos / file)
    source = data.load(options("--data", "finegym", "--root", videos, "--min-score", 0.5))
    found = {split: [clip.name for clip in clips] for split, clips in source.clips.items()}
    assert found == {"train": names[:2], "test": names[2:4]} and not source.problems
    assert source.missing == ["gone has no video", f"ghost has no annotation in {videos}/{file}"]
    media = [clip.media.stem for clips in source.clips.values() for clip in clips]
    assert media == ["c_024_035_03_05", "two", "three_rgb", "one"]


def test_rows_of_joints_are_spread_over_the_frames(videos):
    """Catches: rows of joints cut at the length of a video; a second person that some lack."""
    source = read_own(videos, [entry("one", 9), entry("two", 8, 3)], ["one", "two"])
    one, _ = source.clips["train"]
    _, joints, visible = data.read_clip(source, one, np.arange, (60, 100), all_of(60, 100))
    rows = [round(t * 8 / 11) for t in range(12)]
    assert np.array_equal(joints[:, :17], one.joints[rows])
    assert joints.shape == (12, 34, 2) and not visible[:, 17:].any()


def test_pickles_without_names(videos):
    """Catches: joints that are not those of COCO for each person; a class that is not counted."""
    source = read_own(videos, [entry("one", label=4), entry("two", 8, 2)], ["one"], ["two"])
    assert source.classes == [*"01234"]
    assert source.joint_names == [*pickles.COCO_JOINTS, *(f"{n} 2" for n in pickles.COCO_JOINTS)]
    pairs = pickles.COCO_PAIRS
    assert source.flip_pairs == [*pairs, *((a + 17, b + 17) for a, b in pairs)]


def test_pickles_with_names(videos):
    """Catches: names of one's own that are not used; those of numpy, which a checkpoint refuses."""
    names, pairs = ["left ear", "tail", "right ear"], [(0, 2)]
    more = dict(label_names=np.array([*"abcdef"]), joint_names=np.array(names), flip_pairs=pairs)
    own = entry("one", joints=3, filename="two.mp4")
    source = read_own(videos, [own], ["two"], **more)
    assert (source.classes, source.joint_names, source.flip_pairs) == ([*"abcdef"], names, pairs)
    assert {*map(type, source.classes + source.joint_names)} == {str}
    assert [clip.name for clip in source.clips["train"]] == ["two.mp4"]


@cases(
    "content, said",
    {
        "JSON": (b'{"split": {}}', "it is JSON"),
        "gzip": (b"\x1f\x8b\x08", "it is gzipped"),
        "empty": (b"", "Ran out of input"),
        "breaks off": (pickle.dumps([1] * 99)[:-20], "truncated"),
        "a list": (pickle.dumps([entry("two")]), "it is a list"),
        "lacks a key": (pickle.dumps({"split": {}}), "annotations"),
    },
)
def test_files_that_are_no_pickle_of_this_form(tmp_path, content, said):
    """Catches: a damaged file that ends in a traceback, or is not named."""
    (tmp_path / "own.pkl").write_bytes(content)
    with pytest.raises(data.DataError, match=f"^{tmp_path}/own.pkl: expected a .*: .*{said}"):
        pickles.Pyskl([tmp_path], tmp_path / "own.pkl")


@cases(
    "changes, said",
    {
        "nothing": (dict(split=dict(train="o", val=[])), "used: o has no annotation"),
        "both splits": (dict(split=dict(train=["one"], val=["one.mp4"])), "alike, such as one"),
        "no split": (dict(split=dict(xsub=[], val=[])), r"train or val; .* \['xsub', 'val'\]"),
        "two of a name": (dict(annotations=[entry("two"), entry("two.avi")]), "have one name"),
        "pairs": (dict(joint_names=["hip", "knee"], flip_pairs=[(1, 2)]), "flip_pairs"),
    },
)
def test_pickles_that_do_not_fit(videos, changes, said):
    """Catches: a clip to train and test on; a pickle without one that can be used."""
    with pytest.raises(data.DataError, match=f"^{videos}/own.pkl: .*{said}"):
        read_own(videos, **dict(train=["two"], annotations=[entry("two")]) | changes)


@cases(
    "changes, said",
    {
        "label below 0": (dict(label=-1), "label -1"),
        "label too large": (dict(label=6), "label 6, expected a whole number below 6"),
        "half a label": (dict(label=1.5), "label 1.5"),
        "no size": (dict(img_shape=None), "NoneType"),
        "joints": (dict(keypoint=np.full((1, 8, 25, 3), 9.0), keypoint_score=None), "25 joints"),
        "no frames": (dict(keypoint=np.ones((1, 0, 17, 2))), "is .1, 0, 17, 2., expected .persons"),
        "unit": (dict(keypoint=np.full((1, 8, 17, 2), 0.5)), "within 0..1, expected pixels"),
        "scores": (dict(keypoint_score=np.ones((1, 7, 17))), "is .1, 7, 17., expected .1, 8, 17"),
    },
)
def test_entries_that_do_not_fit(videos, changes, said):
    """Catches: an entry of another shape, unit or label that is taken, or that hides others."""
    annotations = [entry("two", **changes), entry("one")]
    source = read_own(videos, annotations, ["two"], ["one"], label_names=[*"abcdef"])
    (problem,) = source.problems
    assert re.match(f"{videos}/own.pkl, two: .*{said}", problem)
    assert len(source.clips["test"]) == 1


def test_two_videos_of_one_name(videos):
    """Catches: one of two videos taken without a word."""
    (videos / "one.avi").touch()
    source = read_own(videos, [entry("one")], ["one"])
    both = f"{videos}/one.avi and {videos}/subactions/one.mp4"
    assert source.problems == [f"{both} have one name: leave one of them there"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("ntu60-xsub --root {0}", "no NTU RGB.D in .'{0}'.: looked for .*rose1"),
        ("finegym --split-val test", "--split-val is not for --data finegym"),
        ("finegym --root {0}", "{0}/gym_hrnet.pkl: .*No such file"),
        ("pyskl", "--data pyskl needs --annotations PKL"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, words, said):
    """Catches: a flag that is ignored; a missing data set without what was looked for."""
    with pytest.raises((data.UsageError, data.DataError), match=said.format(tmp_path)):
        data.load(options("--data", *words.format(tmp_path).split()))


def test_splits_by_flag(videos):
    """Catches: the split of a flag that is not read."""
    split = dict(a=["one"], b=["two"], train=[], val=[])
    write_own(videos, dict(split=split, annotations=[entry("one"), entry("two")]))
    words = ["--annotations", videos / "own.pkl", "--split-train", "b", "--split-val", "a"]
    source = data.load(options("--data", "pyskl", "--root", videos, *words))
    assert [[clip.name for clip in clips] for clips in source.clips.values()] == [["two"], ["one"]]
