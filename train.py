"""Train D3T on one machine or many, on CPU or CUDA.

    python train.py                                          # synthetic clips, a laptop, about two minutes
    torchrun --nproc_per_node=4 train.py --data pennaction   # the paper's training
    python train.py --data pennaction --eval runs/pennaction/best.pt

A run writes `last.pt`, `best.pt` and `log.jsonl` (one line an epoch) to its folder. After Ctrl-C, SIGTERM or a crash,
the same command with `--resume` goes on, also in the middle of an epoch. Each random draw has a generator of its own,
made from the seed, the epoch and the clip. So a checkpoint needs no random state, and on a CPU a resumed run ends with
the same weights as a run that was never stopped.
"""

import argparse
import ctypes
import functools
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from d3t import D3T, Settings, check_fields, setting
from data import DataError, UsageError, errors_as

# Of this process, from torchrun: its number, its number on this machine, and how many there are.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
RANKS = int(os.environ.get("WORLD_SIZE", 1))
# Ctrl-C, and what batch systems send before they end a job; Windows has the first two.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
FILES = ("last.pt", "best.pt", "log.jsonl")  # of a run, in its folder
BAR = {"leave": False, "disable": True if RANK else None}  # None: only in a terminal


class RunError(Exception):
    """A run that cannot go on; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the paper's (Sec. 4), or ours where the paper is silent ("open")."""

    epochs: int = setting(90, "passes over the training clips")
    warmup: float = setting(5.0, "epochs of linear warm-up before the cosine", zero=True)
    batch: int = setting(32, "clips of a step, over all ranks (open)")
    accumulate: int = setting(1, "parts into which each rank divides its share of the batch, to save memory")
    lr: float = setting(5e-4, "peak learning rate of AdamW (open)")
    weight_decay: float = setting(0.05, "of matrices; norms, biases and embeddings have none (open)", zero=True)
    clip: float = setting(1.0, "largest norm of the gradient (open)")
    seed: int = setting(0, "of the weights, the order of the clips and their augmentation", zero=True)
    hide: str = setting("none", "joints or video: train and test without that modality")

    def __post_init__(self):
        check_fields(self)
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup = {self.warmup} is not less than epochs = {self.epochs}")
        if self.hide not in ("none", "joints", "video"):
            raise ValueError(f"hide must be none, joints or video, not {self.hide}")


DATA_KNOWS = ("classes", "joints")  # no flags set these
DEFAULTS = {f.name: f.default for kind in (Recipe, Settings) for f in fields(kind) if f.name not in DATA_KNOWS}
PRESETS = {
    "paper": DEFAULTS,
    "small": DEFAULTS
    | dict(frames=8, height=96, width=96, channels=16, blocks=2, heads=2, batch=16, lr=1.5e-3, epochs=24, warmup=2.0),
    "tiny": DEFAULTS
    | dict(frames=6, height=40, width=40, channels=16, blocks=2, kernel=3, batch=16, lr=1e-3, epochs=2, warmup=0.5),
}


# ---- Ranks and batches ---------------------------------------------------------------------------------------------
def gather(items: list) -> list:
    """The items of all ranks, in the order of the ranks."""
    lists = [items] * RANKS
    if RANKS > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(function):
    """Call the function on rank 0 alone; every rank returns its result or raises its error."""
    try:
        box = [function() if RANK == 0 else None]
    except (DataError, UsageError, OSError) as error:
        box = [error]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def training_batches(count: int, recipe: Recipe, epoch: int, seen: int) -> list[list[tuple[int, int]]]:
    """The parts of this rank's batches, after `seen` of the `count` clips of an epoch; an item is (epoch, clip).

    The order depends on seed and epoch alone. The ranks share each batch. Clips that do not fill the last are dropped.
    """
    order = np.random.default_rng((recipe.seed, epoch)).permutation(count)
    size = recipe.batch // RANKS // recipe.accumulate
    batches = []
    for start in range(seen, count - recipe.batch + 1, recipe.batch):
        mine = [(epoch, int(clip)) for clip in order[start : start + recipe.batch][RANK::RANKS]]
        batches += [mine[i : i + size] for i in range(0, len(mine), size)]
    return batches


def load_batches(dataset: data.Dataset, batches: list, workers: int, device: str) -> DataLoader:
    how = {"num_workers": workers, "pin_memory": device == "cuda", "worker_init_fn": leave_group}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=data.collate, **how)


def leave_group(worker: int):
    """Keep signals that reach all processes of a terminal or a job from ending the workers."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    for number in SIGNALS:
        if number != signal.SIGTERM:  # with which the rank itself ends one that hangs
            signal.signal(number, signal.SIG_IGN)


# ---- Training and evaluation ---------------------------------------------------------------------------------------
@dataclass
class Progress:
    """Where a run stands: what changes in it, beside the states of model, optimizer and scaler."""

    epoch: int = 0
    seen: int = 0  # clips of this epoch that have been trained on
    step: int = 0  # optimizer steps in all
    loss: float = 0.0  # sum over the clips in `seen`
    bad_clips: dict[str, str] = field(default_factory=dict)  # clips of this epoch that cannot be read, and why
    seconds: float = 0.0  # spent on training this epoch
    best: float = -1.0  # highest top-1 of a test so far


def learning_rate(recipe: Recipe, epochs: float) -> float:
    """Linear warm-up, then a cosine to zero, after a fractional number of epochs."""
    if epochs <= recipe.warmup:
        return recipe.lr * epochs / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epochs - recipe.warmup) / (recipe.epochs - recipe.warmup)))


def backward(run: "Run", parts: list[dict]) -> torch.Tensor:
    """Gradient of the mean loss of a step: the mean over parts here, over ranks by DDP; returns this rank's loss."""
    total = 0.0
    for i, batch in enumerate(parts):
        more = i + 1 < len(parts) and RANKS > 1
        with run.net.no_sync() if more else nullcontext():  # DDP averages gradients in the last backward alone
            label = batch["label"].to(run.options.device, non_blocking=True)
            loss = F.cross_entropy(run.logits(run.net, batch), label) / len(parts)
            run.scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def train_one_epoch(run: "Run", dataset: data.Dataset):
    """Train on what is left of the epoch and save it; SystemExit if the run was asked to stop."""
    options, recipe, progress = run.options, run.recipe, run.progress
    run.net.train()
    if progress.step >= options.stop_after:
        run.stop(f"after step {progress.step}")
    batches = training_batches(len(dataset), recipe, progress.epoch, progress.seen)
    loader = iter(load_batches(dataset, batches, options.workers, options.device))
    steps = zip(*[loader] * recipe.accumulate)  # takes the parts of a step from the same iterator
    bar = tqdm(steps, f"epoch {progress.epoch + 1}", len(batches) // recipe.accumulate, **BAR)
    begin = time.time() - progress.seconds
    for parts in bar:
        rate = learning_rate(recipe, progress.epoch + (progress.seen + recipe.batch) / len(dataset))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        loss = backward(run, parts)
        run.scaler.unscale_(run.optimizer)  # before the gradients are clipped
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

        stop = count_step(run, loss.item(), norm.item(), parts, len(dataset))
        bar.set_postfix(loss=f"{progress.loss / progress.seen:.3f}", refresh=False)
        if stop or progress.step % options.save_every == 0 or progress.seen + recipe.batch > len(dataset):
            progress.seconds = time.time() - begin
            save_checkpoint(run, "last.pt")
        if stop:
            run.stop(f"after step {progress.step}")


def count_step(run: "Run", loss: float, norm: float, parts: list[dict], count: int) -> bool:
    """Count a step, alike on all ranks; returns whether they stop. RunError if it diverged, or many clips are bad."""
    progress, bad = run.progress, [clip for part in parts for clip in part["bad"]]
    losses, signals, bad_of_ranks = zip(*gather([(loss, run.signal, bad)]))  # a later signal counts at the next step
    progress.step += 1
    overflows = run.scaler.is_enabled()  # with fp16, gradients may overflow: the scaler skips such a step
    if not math.isfinite(sum(losses)) or not (math.isfinite(norm) or overflows):
        raise RunError(
            f"the loss or the gradient is not finite at step {progress.step}. The {progress.seen} clips of this epoch "
            f"before it had a mean loss of {progress.loss / max(1, progress.seen):.4f}. An earlier last.pt stays"
        )
    progress.seen += run.recipe.batch
    progress.loss += run.recipe.batch * sum(losses) / RANKS
    for name, why in sum(bad_of_ranks, []):
        if name not in progress.bad_clips and RANK == 0:
            print(f"\nwarning: a clip was replaced by another one: {why[:500]}", file=sys.stderr, flush=True)
        progress.bad_clips.setdefault(name, why)
    if len(progress.bad_clips) > max(1, count / 100):
        reasons = "\n".join(progress.bad_clips.values())
        raise RunError(f"{len(progress.bad_clips)} of {count} clips, more than 1 %, cannot be read:\n{reasons}")
    run.signal = max(run.signal, *signals)
    return max(signals) > 0 or progress.step >= run.options.stop_after


@torch.no_grad()
def evaluate(run: "Run", dataset: data.Dataset) -> tuple[dict, dict]:
    """Accuracy over all clips, each counted once, and the scores: names, labels and logits of the clips in order."""
    if RANKS > 1:
        for buffer in run.model.buffers():  # all ranks use the running statistics of rank 0
            dist.broadcast(buffer, 0)
    run.model.eval()
    mine, size = range(RANK, len(dataset), RANKS), max(1, run.recipe.batch // RANKS)
    batches = [list(mine[i : i + size]) for i in range(0, len(mine), size)]
    scores = []  # of each clip: name, label, logits
    loader = load_batches(dataset, batches, run.options.workers, run.options.device)
    for batch in tqdm(loader, "testing", **BAR):
        if run.signal:
            break
        scores += zip(batch["name"], batch["label"].tolist(), run.logits(run.model, batch).cpu().numpy())
    asked = max(gather([run.signal]))  # a later signal counts at the next step
    if asked:  # on all ranks; nothing is lost, because the epoch was saved before its test
        run.signal = asked
        run.stop("in a test")
    scores = [score for _, score in sorted(gather([*zip(mine, scores)]))]  # in the order of the clips
    names, labels, logits = map(np.array, zip(*scores))
    right = logits.argmax(1) == labels
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    result = {"top1": float(right.mean()), "mean_class": float(np.mean(by_class)), "clips": len(labels)}
    return result, {"names": names, "labels": labels, "logits": logits, "classes": np.array(run.source.classes)}


# ---- Checkpoints, model and optimizer ------------------------------------------------------------------------------
def save_checkpoint(run: "Run", name: str):
    """Write a temporary file and rename it, so that a file of that name is always whole."""
    if RANK > 0:
        return
    path, source = run.options.out / name, run.source
    state = {part: getattr(run, part).state_dict() for part in ("model", "optimizer", "scaler")}
    state |= {part: asdict(getattr(run, part)) for part in ("progress", "settings", "recipe")}
    state |= {"data": run.options.data, "clips": [len(clips) for clips in source.clips.values()]}
    state |= {"classes": source.classes, "joint_names": source.joint_names}
    temporary, buffer = path.with_suffix(".tmp"), io.BytesIO()
    torch.save(state, buffer)  # torch.save to a file aborts the process when the disk is full
    with errors_as(RunError, f"{path} cannot be written, the one before it stays"):
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    with errors_as(UsageError, f"{path} is no checkpoint of this train.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part, kind in (("settings", Settings), ("recipe", Recipe), ("progress", Progress)):
            kind(**saved[part])  # raises for the fields of another version and for invalid values
        rest = ("model", "optimizer", "scaler", "data", "clips", "classes", "joint_names")
        return {part: saved[part] for part in ("settings", "recipe", "progress", *rest)}


def load_weights(model: D3T, path: Path, classes: list[str]):
    """Start from a checkpoint, or the trunk from torchvision's r2plus1d_18; prints what keeps its initial weights.

    The checkpoint may have other classes, joints, T, H and W: tables over T and the token grid are interpolated.
    """
    with errors_as(UsageError, f"--weights {path} does not fit"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if "model" not in saved:  # torchvision's layer4 and fc are not needed
            model.trunk.load_state_dict({k: v for k, v in saved.items() if not k.startswith(("layer4.", "fc."))})
            return
        old, weights, new = Settings(**saved["settings"]), saved["model"], model.state_dict()
        model.trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in weights.items() if k.startswith("trunk.")})
        T, h, w = model.settings.grid
        for key in weights.keys() & {"position_t", "position_p", "modal"}:  # (T, N, D)
            weights[key] = F.interpolate(weights[key].permute(1, 2, 0), T, mode="linear").permute(2, 0, 1)
        table = weights["position_s"].unflatten(1, old.grid[1:]).permute(0, 3, 1, 2)  # (1, D, h, w)
        weights["position_s"] = F.interpolate(table, (h, w), mode="bilinear").flatten(2).transpose(1, 2)
        fitting = {key for key in new.keys() & weights.keys() if new[key].shape == weights[key].shape}
        fitting -= {"head.weight", "head.bias"} if saved["classes"] != classes else set()
        model.load_state_dict({key: weights[key] for key in fitting}, strict=False)
    if RANK == 0 and new.keys() - fitting:
        rest = ", ".join(key for key in new if key not in fitting)
        print(f"weights that keep their initial values, because {path} has none that fit: {rest}")


def must_go_on(options: argparse.Namespace) -> bool:
    """Whether the folder holds a run that goes on; UsageError if it holds one that a new run would overwrite."""
    held = [name for name in FILES if (options.out / name).exists()]
    # torchrun --max-restarts repeats the command; then --overwrite must not delete what the same run has trained.
    restarted = options.overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if "last.pt" in held and (options.resume or restarted):
        return True
    if held and not options.overwrite:
        raise UsageError(f"{options.out} holds a run: use --resume (it needs last.pt), --overwrite or another --out")
    with errors_as(UsageError, f"--out {options.out}"):
        options.out.mkdir(parents=True, exist_ok=True)
    return False


def make_model(settings: Settings, recipe: Recipe, options: argparse.Namespace) -> D3T:
    torch.manual_seed(recipe.seed)
    model = D3T(settings)
    if options.checkpointing:
        for block in model.blocks:
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return model.to(options.device, memory_format=torch.channels_last_3d)  # in this format convolutions are faster


def make_optimizer(model: D3T, recipe: Recipe) -> torch.optim.Optimizer:
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.startswith(("position", "modal"))
        (decay if matrix else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


# ---- Command line --------------------------------------------------------------------------------------------------
def parse_args(words: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The options, and those fields of settings and recipe that were given as flags or by a preset."""
    parser = argparse.ArgumentParser(
        description="Train D3T, the 3D deformable transformer for action recognition.",
        epilog="In brackets: the default, or that of preset paper; then those of the presets that differ.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        usage=argparse.SUPPRESS,  # it would list all flags before each error
    )
    group = parser.add_argument_group("data")
    data.add_flags(group)
    group.add_argument("--workers", type=int, metavar="N", help="loading processes of each rank [2; synthetic 1]")

    add = (group := parser.add_argument_group("run")).add_argument
    add("--preset", choices=PRESETS, help="the defaults of training and model [paper; for synthetic clips tiny]")
    add("--out", type=Path, metavar="DIR", help="folder of the run [runs/DATA]")
    add("--weights", type=Path, metavar="PATH", help="start from a checkpoint, or its trunk from r2plus1d_18")
    add("--save-every", type=int, default=500, metavar="N", help="steps between two last.pt in an epoch [500]")
    add("--stop-after", type=int, default=math.inf, metavar="N", help="stop at this step, as by Ctrl-C [never]")
    add("--scores", type=Path, metavar="FILE.npz", help="with --eval: write names, labels and logits of the test clips")
    add("--device", choices=("cpu", "cuda"), help="[cuda where there is one]")
    add("--amp", choices=("off", "bf16", "fp16"), help="mixed precision [CUDA bf16, fp16 where it has none; CPU off]")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--checkpointing", action="store_true", help="compute the blocks again in the backward pass, to save memory")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in that folder, or start it if there is none")
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    add("--eval", type=Path, metavar="CKPT", help="only test this checkpoint")

    for title, kind in (("training", Recipe), ("model", Settings)):
        add = parser.add_argument_group(title, kind.__doc__).add_argument
        for f in (f for f in fields(kind) if f.name in DEFAULTS):
            others = [f"; {name} {p[f.name]}" for name, p in PRESETS.items() if p[f.name] != f.default]
            text = f"{f.metadata['help']} [{f.default}{''.join(others)}]"
            how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="VALUE")
            add("--" + f.name.replace("_", "-"), **how, default=argparse.SUPPRESS, help=text)

    options = parser.parse_args(words)
    given = PRESETS.get(options.preset, {}) | {name: vars(options)[name] for name in DEFAULTS if name in options}
    if options.eval and (options.preset or options.weights):
        parser.error("--eval tests a checkpoint: it does not go with --preset or --weights")
    if (path := options.scores) and (not options.eval or path.suffix != ".npz" or path.exists()):
        parser.error(f"--scores {path} goes with --eval alone, and is a new file with the ending .npz")
    synthetic = options.data == "synthetic"
    options.workers = (1 if synthetic else 2) if options.workers is None else options.workers
    if options.workers < 0 or options.save_every < 1 or options.stop_after < 1:
        parser.error("--workers must be 0 or more, --save-every and --stop-after 1 or more")
    options.out = options.out or Path("runs", options.data)
    options.preset = options.preset or ("tiny" if synthetic else "paper")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.amp is None and options.device == "cuda":
        options.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    options.amp = options.amp or "off"
    return options, given


def configure(options: argparse.Namespace, given: dict, source: data.Source, saved: dict | None):
    """Settings and recipe: from the checkpoint, else from the preset and the flags. UsageError where they clash."""
    values, clips = PRESETS[options.preset], [len(clips) for clips in source.clips.values()]
    given = given | {"classes": len(source.classes), "joints": len(source.joint_names), "clips": clips}
    if saved:
        values = saved["recipe"] | saved["settings"] | {"clips": saved["clips"]}
        free = {"clips", *saved["recipe"]} if options.eval else {"batch", "accumulate"}  # may differ
        clash = [f"{k} is {values[k]}, not {v}" for k, v in given.items() if values[k] != v and k not in free]
        if clash:
            raise UsageError("the checkpoint does not fit: " + "; ".join(clash))
    values = values | given
    with errors_as(UsageError, "a setting cannot be used"):
        settings, recipe = (kind(**{f.name: values[f.name] for f in fields(kind)}) for kind in (Settings, Recipe))
    parts = RANKS * recipe.accumulate
    if not options.eval and (recipe.batch % parts or recipe.batch > clips[0]):
        limits = f"a multiple of {parts} (ranks x --accumulate), at most {clips[0]} (training clips)"
        raise UsageError(f"--batch {recipe.batch}: expected {limits}")
    return settings, recipe


def load_source(options: argparse.Namespace, saved: dict | None) -> data.Source:
    """The data set, indexed once for all ranks; DataError if it has problems, or no clips to train and test on."""
    source = from_first(lambda: data.load(options))
    if source.problems:
        some = "\n".join(source.problems[:3])
        raise DataError(f"{len(source.problems)} clips cannot be used, `python -m tools.check` names them all:\n{some}")
    if source.missing and RANK == 0:
        some = "; ".join(source.missing[:3])
        print(f"warning: {len(source.missing)} clips are left out, such as: {some}", file=sys.stderr)
    train, test = len(source.clips["train"]), len(source.clips["test"])
    if not test or not (train or options.eval):
        raise DataError(f"{options.data} has {train} training and {test} test clips; at least one of each is needed")
    return data.match(source, saved["classes"], saved["joint_names"]) if saved else source


class Run:
    """What the functions of this file share, in the state from which the run starts or goes on."""

    def __init__(self, options: argparse.Namespace, given: dict):
        self.options, self.signal = options, 0  # the signal that asked the run to stop
        if options.device == "cuda":
            with errors_as(UsageError, "--device cuda"):
                torch.cuda.set_device(LOCAL_RANK)
        if RANKS > 1:  # CPU tensors travel by gloo, CUDA tensors by NCCL
            dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
        if not options.eval:
            options.resume = from_first(lambda: must_go_on(options))
        path = options.eval or options.out / "last.pt"
        saved = load_checkpoint(path) if options.eval or options.resume else None
        if saved and saved["data"] != options.data:
            raise UsageError(f"{path} was trained on {saved['data']}, not {options.data}: use --data {saved['data']}")
        self.source = load_source(options, saved)
        self.settings, self.recipe = configure(options, given, self.source, saved)

        self.model = make_model(self.settings, self.recipe, options)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
        self.progress = Progress()
        if options.weights and not saved:
            load_weights(self.model, options.weights, self.source.classes)
        with errors_as(UsageError, f"{path} does not fit"):
            if saved:
                self.model.load_state_dict(saved["model"])
            if options.resume:
                self.optimizer.load_state_dict(saved["optimizer"])
                self.scaler.load_state_dict(saved["scaler"] or self.scaler.state_dict())  # empty where it was off
                self.progress = Progress(**saved["progress"])
        # The model as it is trained: wrapped for many ranks, compiled.
        self.net = DistributedDataParallel(self.model) if RANKS > 1 else self.model
        self.net = torch.compile(self.net) if options.compile else self.net

    def dataset(self, split: str) -> data.Dataset:
        s, recipe = self.settings, self.recipe
        return data.Dataset(self.source, split, s.frames, s.height, s.width, recipe.seed, recipe.hide)

    def logits(self, net: torch.nn.Module, batch: dict) -> torch.Tensor:
        clip = [batch[key].to(self.options.device, non_blocking=True) for key in ("video", "joints", "visible")]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.amp)
        with torch.autocast(self.options.device, dtype=dtype, enabled=dtype is not None):
            return net(*clip).float()

    def on_signal(self, number, _):
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the run at once; a batch system may send its signal twice
            signal.signal(number, signal.default_int_handler)

    def stop(self, where: str):
        if RANK == 0:
            print(f"stopped {where}; go on with --resume")
        raise SystemExit(self.signal and 128 + self.signal)


def fit(run: Run):
    """Train to the last epoch, with a test, a line of the log and a checkpoint after each."""
    options, log = run.options, run.options.out / "log.jsonl"
    if RANK == 0 and not options.resume:
        for name in FILES:
            (options.out / name).unlink(missing_ok=True)
    elif RANK == 0 and log.exists():  # drop the lines of epochs that ended after the checkpoint
        log.write_text("".join(log.read_text().splitlines(keepends=True)[: run.progress.epoch]))
    train, test = run.dataset("train"), run.dataset("test")
    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = [signal.signal(number, run.on_signal) for number in caught]
    try:
        while run.progress.epoch < run.recipe.epochs:
            train_one_epoch(run, train)
            result, _ = evaluate(run, test)
            done = run.progress
            line = {"epoch": done.epoch + 1, "step": done.step, "loss": done.loss / done.seen, **result}
            line |= {"lr": run.optimizer.param_groups[0]["lr"], "bad": len(done.bad_clips)}
            line |= {"seconds": round(done.seconds, 2), "clips_per_second": round(done.seen / done.seconds, 1)}
            if RANK == 0:
                print("  ".join(f"{name} {value:.6g}" for name, value in line.items()), flush=True)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            run.progress = Progress(epoch=done.epoch + 1, step=done.step, best=max(done.best, result["top1"]))
            for name in ("best.pt", "last.pt") if result["top1"] > done.best else ("last.pt",):
                save_checkpoint(run, name)
    finally:  # a notebook goes on
        for number, handler in zip(caught, before):
            signal.signal(number, handler)
    if RANK == 0:
        print(f"best top-1 {run.progress.best:.2%}; checkpoints and log.jsonl in {options.out}")


def keep_memory():
    """Stop glibc from returning freed memory to the system: page faults cost up to 10 % of a step."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def main(words: list[str] | None = None) -> int:
    """Train or test as the flags say; the exit status."""
    keep_memory()
    data.escape_output()
    try:
        run = Run(*parse_args(words))
        options, step = run.options, run.progress.step
        verb = "tests" if options.eval else f"goes on at step {step}" if options.resume else "starts"
        if RANK == 0:
            values = vars(options) | asdict(run.recipe) | asdict(run.settings)
            listed = " ".join(f"{name}={value}" for name, value in values.items() if name != "preset")
            print(f"D3T {verb}, torch {torch.__version__}, ranks={RANKS} {listed}", flush=True)
        if not options.eval:
            fit(run)
            return 0
        result, scores = evaluate(run, run.dataset("test"))
        if RANK == 0:
            print(json.dumps(result), flush=True)
            if options.scores:
                np.savez(options.scores, **scores)
        return 0
    except (UsageError, RunError, DataError, OSError) as error:
        sys.stderr.write(f"train.py: {error}\n")  # one call: the lines of several ranks do not mix
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:  # before or after training, or the second one in it
        return 128 + signal.SIGINT
    except SystemExit as stop:  # -h, or a run that was asked to stop
        return stop.code


if __name__ == "__main__":
    status = main()
    if RANKS > 1:
        # A thread of gloo frees the tensor of the last exchange, for which it takes the interpreter's lock. If the
        # interpreter ends just then, that aborts the process, and torchrun takes a finished run for a failed one.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
