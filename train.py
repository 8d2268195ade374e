"""Train D3T on one machine or many, on CPU or CUDA.

    python train.py                                          # synthetic clips, a laptop, about two minutes
    torchrun --nproc_per_node=4 train.py --data pennaction   # the paper's training
    python train.py --data pennaction --eval runs/pennaction/best.pt

A run writes `last.pt`, `best.pt` and `log.jsonl` (a line an epoch) to its folder. Stopped by Ctrl-C, SIGTERM or a
crash, it goes on with the same command and `--resume`, also in the middle of an epoch. Nothing random depends on what
came before: every draw is a function of (seed, epoch, clip). So a resumed run on CPU ends with the very weights of a
run that was never stopped, and a checkpoint needs no state of a random generator.

Exit status: 0 done, 1 the run could not go on, 2 a flag or file that cannot be used, 128 + n stopped by signal n.
"""

import argparse
import ctypes
import functools
import io
import json
import math
import os
import pickle
import signal
import sys
import textwrap
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from d3t import D3T, Settings, check_types, setting
from data import UsageError

with suppress(ImportError):  # not on Windows, where nothing keeps two runs out of one folder
    import fcntl


class RunError(Exception):
    """A run that cannot go on; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the paper's (Sec. 4), or ours where the paper is silent ("open")."""

    epochs: int = setting(90, "passes over the training clips")
    warmup: float = setting(5.0, "epochs of linear warm-up before the cosine")
    batch: int = setting(32, "clips of a step, over all processes (open)")
    accumulate: int = setting(1, "parts into which each process divides its share of the batch, to save memory")
    lr: float = setting(5e-4, "peak learning rate of AdamW (open)")
    weight_decay: float = setting(0.05, "of the matrices; norms, biases and embeddings have none (open)")
    clip: float = setting(1.0, "largest norm of the gradient (open)")
    seed: int = setting(0, "of the weights, the order of the clips and their augmentation")
    hide: str = setting("none", "joints or video: what the other modality does alone")

    def __post_init__(self):
        check_types(self)
        for name in ("epochs", "batch", "accumulate", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be 0 or more and less than 2^63, not {getattr(self, name)}")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup = {self.warmup} is not less than epochs = {self.epochs}")
        if self.hide not in ("none", "joints", "video"):
            raise ValueError(f"hide must be none, joints or video, not {self.hide}")


PRESETS = {  # what differs from the paper's
    "paper": {},
    "small": dict(
        frames=8, height=96, width=96, channels=16, blocks=2, heads=2, batch=16, lr=1.5e-3, epochs=24, warmup=2.0
    ),
    "tiny": dict(
        frames=6, height=40, width=40, channels=16, blocks=2, heads=4, kernel=3, batch=16, lr=1e-3, epochs=2, warmup=0.5
    ),
}
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # of this process on its machine, by torchrun
RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))  # after which torchrun gives up
FILES = ("last.pt", "best.pt", "log.jsonl")  # of a run, in its folder


def preset(name: str) -> dict:
    """Recipe and settings by name, but for what the data set knows."""
    defaults = {f.name: f.default for kind in (Recipe, Settings) for f in fields(kind)}
    return {k: v for k, v in defaults.items() if k not in ("classes", "joints")} | PRESETS[name]


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The processes of a run, as torchrun started them; one without it. CPU tensors travel by gloo, CUDA's by NCCL."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        if RESTARTS and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
            raise UsageError(  # pytorch issue 135712: restarted processes look for each other where they were before
                "torchrun --max-restarts works only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
            )
        if size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        return cls(rank, size, torch.device(device))

    def sum(self, values) -> torch.Tensor:
        """Sum over the processes; on the CPU, so that it never waits for the device."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of their ranks."""
        lists = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def from_first(self, function):
        """What `function()` returns or raises on rank 0, on every rank: a data set is indexed once."""
        try:
            box = [function() if self.rank == 0 else None]
        except (data.DataError, UsageError, OSError) as error:
            box = [error]
        if self.size > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]


def keep_memory():
    """Keep what is freed: glibc returns large blocks, and new pages for every tensor take up to a tenth of a step."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself, to be unmapped
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none is returned


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


def training_batches(clips: int, recipe: Recipe, epoch: int, seen: int, world: World) -> list[list[tuple[int, int]]]:
    """This process's micro-batches of (epoch, clip) for what is left of an epoch after `seen` clips.

    The order is a function of (seed, epoch). Each step takes the next `batch` clips and the processes share them;
    clips that do not fill a last step sit this epoch out.
    """
    order = np.random.default_rng((recipe.seed, epoch)).permutation(clips)
    share = recipe.batch // world.size // recipe.accumulate
    batches = []
    for start in range(seen, clips - recipe.batch + 1, recipe.batch):
        mine = [(epoch, int(clip)) for clip in order[start : start + recipe.batch][world.rank :: world.size]]
        batches += [mine[i : i + share] for i in range(0, len(mine), share)]
    return batches


def load_batches(dataset: data.Dataset, batches: list, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_group,
    )


def leave_group(worker: int):
    """Ctrl-C and SIGTERM go to a whole group: they are for the training process, which ends its loaders itself."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def inputs(batch: dict, device: torch.device) -> list[torch.Tensor]:
    return [batch[key].to(device, non_blocking=True) for key in ("video", "joints", "visible", "label")]


# --------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands; with model, optimizer and scaler all that resuming needs."""

    epoch: int = 0
    seen: int = 0  # clips of this epoch that have been trained on
    step: int = 0  # optimizer steps in all
    loss: float = 0.0  # sum over these clips
    losses: list[float] = field(default_factory=list)  # of every tenth step of this epoch, for a curve
    bad_clips: dict[str, str] = field(default_factory=dict)  # clips of this epoch that could not be read, and why
    seconds: float = 0.0  # spent on this epoch
    best: float = -1.0  # top-1


@dataclass
class Run:
    """What the functions below share."""

    world: World
    settings: Settings
    recipe: Recipe
    options: argparse.Namespace
    model: D3T
    net: torch.nn.Module  # the model as it is trained: compiled, wrapped for many processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    clips: str  # that it is trained and tested on, to know them again
    signal: int = 0  # that asked the run to stop

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.amp)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def on_signal(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def learning_rate(recipe: Recipe, epochs: float) -> float:
    """Linear warm-up, then a cosine to zero, after a fractional number of epochs."""
    if epochs <= recipe.warmup:
        return recipe.lr * epochs / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epochs - recipe.warmup) / (recipe.epochs - recipe.warmup)))


def backward(run: Run, batches: list[dict]) -> torch.Tensor:
    """Gradient of the mean loss over the global batch: the mean over micro-batches here, over processes by DDP."""
    total = 0.0
    for i, batch in enumerate(batches):
        more = i + 1 < len(batches) and run.world.size > 1
        video, joints, visible, label = inputs(batch, run.world.device)
        with run.net.no_sync() if more else nullcontext():  # the processes exchange gradients once a step
            with run.autocast():
                logits = run.net(video, joints, visible)
            loss = F.cross_entropy(logits.float(), label) / len(batches)
            run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def train_one_epoch(run: Run, dataset: data.Dataset) -> bool:
    """Train on what is left of the epoch; False if the run was asked to stop before its end."""
    world, recipe, progress = run.world, run.recipe, run.progress
    if progress.step >= run.options.stop_after:  # it was reached before
        return False
    run.net.train()
    batches = training_batches(len(dataset), recipe, progress.epoch, progress.seen, world)
    loader = iter(load_batches(dataset, batches, run.options.workers, world.device))
    bar = tqdm(
        desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
        total=len(dataset) // recipe.batch * recipe.batch,
        initial=progress.seen,
        unit="clip",
        leave=False,
        disable=world.rank > 0 or None,  # None: only where somebody watches
    )
    begin = time.time() - progress.seconds
    pending, finite = [], ""  # loss, norm and clips of steps that are not known to be sound; the loss before them

    def check():
        """All processes stop where the loss of one of them was not finite. Only here a process waits for its device."""
        nonlocal finite
        values = torch.stack([value for value, _ in pending]).tolist() if pending else []
        scaled = run.scaler.is_enabled() and run.scaler.get_scale() >= 2**-14  # less: it skipped 30 steps in a row
        for (loss, norm), (_, clips) in zip(values, pending):
            sound = math.isfinite(loss) and (math.isfinite(norm) or scaled)  # fp16 skips such a step
            unsound, total = world.sum([not sound, loss]).tolist()
            if unsound:
                parts = world.gather([(loss, clips)])
                blamed = [part for part in parts if not math.isfinite(part[0])]
                names = ", ".join(name for _, clips in blamed or parts for name in clips)  # a gradient is that of all
                raise RunError(
                    f"the {'loss' if blamed else 'gradient'} is not finite, at a step on {names}{finite}. A checkpoint "
                    "that was written before stays"
                )
            finite = f". The last finite loss was {total / world.size:.4f}"
            progress.loss += recipe.batch * total / world.size
        if pending and progress.step % 10 == 0:
            progress.losses.append(round(total / world.size, 4))
            bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", refresh=False)
        pending.clear()

    def save():
        check()
        progress.seconds = time.time() - begin
        save_checkpoint(run, "last.pt")

    with bar:  # closed before an error is told
        while step := list(islice(loader, recipe.accumulate)):
            rate = learning_rate(recipe, progress.epoch + (progress.seen + recipe.batch) / len(dataset))
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            loss = backward(run, step)
            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip)
            pending.append((torch.stack([loss, norm]), [name for batch in step for name in batch["name"]]))
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            progress.step, progress.seen = progress.step + 1, progress.seen + recipe.batch
            bar.update(recipe.batch)

            bad = [clip for batch in step for clip in batch["bad"]]
            signals, replaced = world.sum([run.signal, len(bad)]).tolist()  # all processes take the same turn
            if replaced:
                note_bad_clips(run, world.gather(bad), len(dataset))
            stop = signals > 0 or progress.step >= run.options.stop_after
            if stop or progress.step % run.options.save_every == 0:
                save()
            elif progress.step % 10 == 0:
                check()
            if stop:
                return False
    save()
    return True


def note_bad_clips(run: Run, bad: list[tuple[str, str]], clips: int):
    """Warn of clips that were replaced by others, each once an epoch; more than 1 % of all clips end the run."""
    known = run.progress.bad_clips
    for name, reason in bad:
        if name not in known:
            known[name] = reason
            if run.world.rank == 0:
                print(f"\nwarning: a clip was replaced by another one: {reason[:500]}", file=sys.stderr, flush=True)
    if len(known) > max(1, clips / 100):
        reasons = "\n".join(known.values())
        raise RunError(f"{len(known)} of {clips} clips, more than 1 %, cannot be read:\n{reasons}")


@torch.no_grad()
def evaluate(run: Run, dataset: data.Dataset) -> dict:
    """Top-1 and mean class accuracy over all clips, each counted once: rank r takes every size-th clip from r on."""
    world, classes = run.world, run.settings.classes
    if world.size > 1:
        for buffer in run.model.buffers():  # after the last step, batch norms differ by what each rank saw in it
            dist.broadcast(buffer, 0)
    run.model.eval()
    mine = list(range(len(dataset)))[world.rank :: world.size]
    size = max(1, run.recipe.batch // world.size)
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    right, total = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    bar = tqdm(
        load_batches(dataset, batches, run.options.workers, world.device),
        desc="testing", unit="batch", leave=False, disable=world.rank > 0 or None,
    )  # fmt: skip
    with bar:  # closed before an error is told
        for batch in bar:
            if run.signal:  # the epoch was saved before its test
                if world.rank == 0:
                    print("stopped in a test; go on with --resume")
                raise SystemExit(128 + run.signal)
            video, joints, visible, label = inputs(batch, world.device)
            with run.autocast():
                hit = run.model(video, joints, visible).argmax(-1) == label
            total += torch.bincount(batch["label"], minlength=classes)
            right += torch.bincount(batch["label"][hit.cpu()], minlength=classes)
    right, total = world.sum(torch.stack([right, total]))
    present = total > 0
    return {
        "top1": (right.sum() / total.sum()).item(),
        "mean_class": (right[present] / total[present]).mean().item(),
        "clips": int(total.sum()),
    }


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


def claim(options: argparse.Namespace) -> bool:
    """Lock the folder of a run while this process lives, then see what it holds: True if that run is to go on."""
    folder, last = options.out, options.out / "last.pt"
    # torchrun starts the first time, too, with the command that it starts again with
    if options.resume and not last.exists() and not RESTARTS:
        raise UsageError(f"--resume: there is no {last}; a run that has not saved yet starts without --resume")
    with blame(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_WRONLY, 0o666)  # closed by the end of the process alone
    with suppress(NameError, OSError):  # Windows, or a file system without locks
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loading processes
        except (BlockingIOError, PermissionError):
            raise UsageError(f"another run is at work in {folder}: use another --out") from None
    resume = options.resume and last.exists()
    if not (resume or options.overwrite) and any((folder / name).exists() for name in FILES):
        raise UsageError(f"{folder} holds a run: --resume goes on with it, --overwrite starts anew, or use --out")
    return resume


def save_checkpoint(run: Run, name: str):
    """Written beside and renamed, so that a file of that name is always whole."""
    if run.world.rank > 0:
        return
    path = run.options.out / name
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
        "settings": asdict(run.settings),
        "recipe": asdict(run.recipe),
        "data": run.options.data,
        "clips": run.clips,
    }
    beside, buffer = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(state, buffer)  # not to the file: left halfway, torch writes on when it is closed, and aborts
    try:
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # the disk is full
        beside.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written, the one before it stays: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:300]}"


@contextmanager
def blame(what: str):
    """Whatever goes wrong in here is the fault of a file, which `what` names."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    except pickle.UnpicklingError:  # whose text is an advice to trust the file
        raise UsageError(f"{what}: it holds something other than tensors and plain values, or is damaged") from None
    except Exception as error:
        raise UsageError(f"{what}: {one_line(error)}") from None


def load_checkpoint(path: Path) -> dict:
    with blame(f"{path} is no checkpoint of this train.py"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", "scaler", "progress", "settings", "recipe", "data", "clips"} - set(state)
        if missing:
            raise UsageError(f"it lacks {', '.join(sorted(missing))}")
        for part, kind in (("settings", Settings), ("recipe", Recipe), ("progress", Progress)):
            differ = {f.name for f in fields(kind)} ^ set(state[part])
            if differ:
                raise UsageError(f"it is of another version, {part} differ in {', '.join(differ)}")
            kind(**state[part])  # ValueError or TypeError for values that cannot be
        return state


def load_trunk(model: D3T, path: Path):
    """Weights in torchvision's naming, such as `r2plus1d_18`'s, into the trunk; layer4 and fc are not needed."""
    with blame(f"--weights {path} does not fit the trunk"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {key: value for key, value in weights.items() if not key.startswith(("layer4.", "fc."))}
        model.trunk.load_state_dict(weights)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def parse_args(words: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Options, and those settings of model and recipe that were given on the command line."""
    parser = argparse.ArgumentParser(
        description="Train D3T, the 3D deformable transformer for action recognition.",
        epilog="In brackets: the default, or that of preset paper; then those of the presets that differ.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )

    def fail(message):
        raise UsageError(message)

    parser.error = fail
    group = parser.add_argument_group("data")
    data.add_flags(group)
    add = group.add_argument
    add("--workers", type=int, metavar="N", help="processes that load clips, for each rank [2; synthetic 1]")

    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, help="the defaults of training and model [paper; for synthetic clips tiny]")
    add("--out", type=Path, metavar="DIR", help="folder of the run [runs/DATA]")
    add("--resume", action="store_true", help="go on with the run in that folder")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--save-every", type=int, default=500, metavar="N", help="steps between two last.pt in an epoch [500]")
    add("--stop-after", type=int, default=math.inf, metavar="N", help="stop at this step, as by Ctrl-C [never]")
    add("--eval", type=Path, metavar="CKPT", help="only test this checkpoint")
    text = "start the trunk from torchvision's r2plus1d_18 weights; a run that goes on has its own"
    add("--weights", type=Path, metavar="PATH", help=text)
    add("--device", choices=("cpu", "cuda"), help="[cuda where there is one]")
    add("--amp", choices=("off", "bf16", "fp16"), help="mixed precision [fp16 with CUDA, off without]")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--checkpointing", action="store_true", help="compute the blocks again in the backward pass, to save memory")

    for title, kind in (("training", Recipe), ("model", Settings)):
        add = parser.add_argument_group(title, kind.__doc__).add_argument
        for f in fields(kind):
            if f.name in ("classes", "joints"):
                continue  # the data set knows
            defaults = [str(f.default)] + [f"{name} {p[f.name]}" for name, p in PRESETS.items() if f.name in p]
            how = {"type": f.type, "metavar": "WHAT" if f.type is str else "N"}
            how = {"action": argparse.BooleanOptionalAction} if f.type is bool else how
            text = f"{f.metadata['help']} [{'; '.join(defaults)}]"
            add("--" + f.name.replace("_", "-"), **how, default=argparse.SUPPRESS, help=text)

    options = vars(parser.parse_args(words))
    given = {f.name: options.pop(f.name) for kind in (Recipe, Settings) for f in fields(kind) if f.name in options}
    options = argparse.Namespace(**options)
    if options.eval and (options.preset or options.resume or options.overwrite or options.weights):
        raise UsageError("--eval tests a checkpoint: it does not go with --preset, --resume, --overwrite or --weights")
    synthetic = options.data == "synthetic"
    options.out = options.out or Path("runs", options.data)
    if options.resume and options.preset:  # asks for all that it fixes, so that a clash with the run is found
        given = {k: v for k, v in preset(options.preset).items() if k not in ("batch", "accumulate")} | given
    options.preset = options.preset or ("tiny" if synthetic else "paper")
    options.workers = (1 if synthetic else 2) if options.workers is None else options.workers
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.amp = options.amp or ("fp16" if options.device == "cuda" else "off")
    if options.workers < 0 or options.save_every < 1 or options.stop_after < 1:
        raise UsageError("--workers must be 0 or more, --save-every and --stop-after 1 or more")
    if options.amp == "fp16" and options.device == "cpu":
        raise UsageError("--amp fp16 needs CUDA; on a CPU use bf16 or off")
    if options.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        raise UsageError(f"--device cuda: torch sees {torch.cuda.device_count()} CUDA devices, too few for this run")
    if options.overwrite and (options.resume or RESTARTS):
        raise UsageError("--overwrite starts anew: it goes neither with --resume nor with torchrun --max-restarts")
    return options, given


def configure(options: argparse.Namespace, given: dict, source: data.Source, saved: dict | None, world: World):
    """Settings and recipe: from the checkpoint, else from the preset and the flags. UsageError where they clash."""
    values = PRESETS[options.preset]
    given = given | {"classes": len(source.classes), "joints": len(source.joint_names)}
    if saved:
        values = saved["recipe"] | saved["settings"]
        free = saved["recipe"] if options.eval else ("batch", "accumulate")  # may differ from the run so far
        clash = [f"{k} is {values.get(k)}, not {v}" for k, v in given.items() if values.get(k) != v and k not in free]
        if clash:
            raise UsageError("the checkpoint does not fit: " + "; ".join(clash))
    values = values | given
    try:
        settings = Settings(**{f.name: values[f.name] for f in fields(Settings) if f.name in values})
        recipe = Recipe(**{f.name: values[f.name] for f in fields(Recipe) if f.name in values})
    except ValueError as error:
        raise UsageError(str(error)) from None
    parts, clips = world.size * recipe.accumulate, len(source.clips["train"])
    if recipe.batch % parts and not options.eval:
        raise UsageError(f"--batch {recipe.batch} does not divide by {parts}, the processes times --accumulate")
    if recipe.batch > clips and not options.eval:
        raise UsageError(f"--batch {recipe.batch} is more than the {clips} training clips")
    return settings, recipe


def build(options: argparse.Namespace, given: dict) -> tuple[Run, data.Source]:
    """Everything a run needs, in the state that it starts or goes on from."""
    world = World.join(options.device)
    if not options.eval:  # before anything is read there: from now on, what the folder holds is this run's alone
        options.resume = world.from_first(lambda: claim(options))
    path = options.eval or options.out / "last.pt"
    saved = load_checkpoint(path) if options.eval or options.resume else None
    if saved and saved["data"] != options.data:
        raise UsageError(f"{path} was trained on {saved['data']}, not {options.data}: use --data {saved['data']}")
    source = world.from_first(lambda: data.load(options))
    train, test = len(source.clips["train"]), len(source.clips["test"])
    if source.problems:
        some = "\n".join(source.problems[:3])
        raise data.DataError(f"{len(source.problems)} clips cannot be used, `python data.py` names them all:\n{some}")
    if source.missing and world.rank == 0:
        print(
            f"warning: {len(source.missing)} clips are left out: {'; '.join(source.missing[:3])} ...", file=sys.stderr
        )
    if not test or not (train or options.eval):
        raise data.DataError(f"{options.data} has {train} training and {test} test clips there, which is not enough")
    names = [(clip.name, clip.label) for split in source.clips.values() for clip in split]
    clips = f"{train} training and {test} test clips, checksum {zlib.crc32(repr(names).encode()):08x}"
    if options.resume and saved["clips"] != clips:
        raise UsageError(f"{path} is of other clips: {saved['clips']}. Here are {clips}")
    settings, recipe = configure(options, given, source, saved, world)

    torch.manual_seed(recipe.seed)
    try:
        model = D3T(settings)
    except (RuntimeError, MemoryError) as error:  # too large
        raise UsageError(f"a model of these settings cannot be made: {one_line(error)}") from None
    model.to(world.device, memory_format=torch.channels_last_3d)  # in which convolutions are faster
    if options.checkpointing:
        for block in model.blocks:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    if saved:
        with blame(f"{path} does not fit"):
            model.load_state_dict(saved["model"])
    elif options.weights:
        load_trunk(model, options.weights)
    net = DistributedDataParallel(model) if world.size > 1 and not options.eval else model
    if options.compile:
        net = torch.compile(net)

    decay, rest = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.startswith(("position", "modal"))
        (decay if matrix else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
    progress = Progress()
    if options.resume:
        with blame(f"{path} does not fit"):
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:  # empty where it was off; where it is off now, this does nothing
                scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])

    if world.rank == 0:
        count = sum(p.numel() for p in model.parameters())
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
        print(f"D3T, {count:,} parameters, {world.size} x {where}, torch {torch.__version__}")
        values = vars(options) | asdict(recipe) | asdict(settings)
        del values["preset"]  # a run that goes on may have had another
        print(textwrap.fill("  ".join(f"{name}={value}" for name, value in values.items()), 118), flush=True)
    return Run(world, settings, recipe, options, model, net, optimizer, scaler, progress, clips), source


def fit(run: Run, train: data.Dataset, test: data.Dataset) -> int:
    """Train to the last epoch, with a test, a line of the log and a checkpoint after each; the exit status."""
    world, recipe, options, progress = run.world, run.recipe, run.options, run.progress
    log = options.out / "log.jsonl"
    if world.rank == 0:
        if not options.resume:
            for name in FILES:
                (options.out / name).unlink(missing_ok=True)
        elif log.exists():  # an epoch that ended after the checkpoint is run again
            os.truncate(log, sum(map(len, log.read_bytes().splitlines(keepends=True)[: progress.epoch])))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)

    begin = time.time()
    while progress.epoch < recipe.epochs:
        if not train_one_epoch(run, train):
            if world.rank == 0:
                print(f"stopped after step {progress.step}; go on with --resume")
            return 128 + run.signal if run.signal else 0
        result = evaluate(run, test)
        line = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": progress.loss / progress.seen,
            "losses": progress.losses,
            "lr": run.optimizer.param_groups[0]["lr"],
            **result,
            "bad": len(progress.bad_clips),
            "seconds": round(progress.seconds, 2),
            "clips_per_second": round(progress.seen / progress.seconds, 1),
        }
        better = result["top1"] > progress.best
        best = max(progress.best, result["top1"])
        run.progress = progress = Progress(epoch=progress.epoch + 1, step=progress.step, best=best)
        if world.rank == 0:
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                "epoch {epoch:3}  loss {loss:.4f}  top-1 {top1:.2%}  mean class {mean_class:.2%} of {clips} clips  "
                "{seconds:.0f} s  {clips_per_second:.0f} clips/s  {bad} bad".format(**line), flush=True,
            )  # fmt: skip
        if better:
            save_checkpoint(run, "best.pt")
        save_checkpoint(run, "last.pt")
    if world.rank == 0:
        took = time.time() - begin
        print(f"best top-1 {progress.best:.2%}, {took:.0f} s; checkpoints and log.jsonl in {options.out}")
    return 0


def main(words: list[str] | None = None) -> int:
    keep_memory()
    try:
        run, source = build(*parse_args(words))
        s, options = run.settings, run.options
        train, test = (
            data.Dataset(source, split, s.frames, s.height, s.width, run.recipe.seed, run.recipe.hide)
            for split in ("train", "test")
        )
        if not options.eval:
            return fit(run, train, test)
        result = evaluate(run, test)
        if run.world.rank == 0:
            print(json.dumps(result))
        return 0
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        # A dying loading process closes its connections before torch sees that it is gone, and `torch.save`, which is
        # left halfway, may have an error of its own on top.
        said = f"{error} {error.__context__}"
        if "DataLoader worker" in said or "Pin memory thread" in said or not isinstance(error, RuntimeError):
            lost = "lost a loading process, perhaps to a lack of memory"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            lost = f"rank {os.environ.get('RANK')} lost another one"
        else:
            raise
        sys.stderr.write(f"train.py: {lost}: {one_line(error)}\n")
        return 1
    except (UsageError, RunError, data.DataError, OSError) as error:
        reason = str(error).strip().split("\ndata.BadClip: ")[-1]  # a loading process wraps it in its traceback
        sys.stderr.write(f"train.py: {reason}\n")  # in one piece: several processes may have something to say
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:  # before or after training, which has handlers of its own
        return 128 + signal.SIGINT
    except SystemExit as stop:  # -h, or a signal in a test
        return stop.code


def leave(status: int):
    """End this process; if it is one of several at once, without the end of its interpreter.

    A thread of gloo frees the tensor of the last exchange, for which it takes the interpreter's lock. If the
    interpreter ends just then, that aborts the process, and torchrun takes a run that is done for one that failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(record(main)())  # by `record`, torchrun shows the exception of the rank that failed first
