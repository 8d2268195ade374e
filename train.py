"""Train D3T on one machine or many, on CPU or CUDA.

    python train.py  # synthetic clips, on a laptop in two minutes
    torchrun --nproc_per_node=4 train.py --data pennaction  # the paper's training

A run writes `last.pt`, `best.pt` and `log.jsonl` to its folder. After Ctrl-C,
SIGTERM or a crash the same command with `--resume` goes on, also in the middle of an epoch. What is
random follows from seed, epoch and clip: on a CPU a resumed run ends with the same weights.
"""

import argparse
import ctypes
import io
import json
import math
import os
import pickle
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from d3t import D3T, Ablation, build, setting
from data import DataError, UsageError

RANK = int(os.environ.get("RANK", 0))  # of this process, from torchrun
RANKS = int(os.environ.get("WORLD_SIZE", 1))
DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.PickleError)
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ASKED = []  # signals that ask to stop: the step ends and is saved
BAR = {"leave": False, "disable": True if RANK else None}  # None: only in a terminal


# ---- What a run is ----
@dataclass(frozen=True)
class Recipe:
    """The defaults are the paper's (Sec. 4), or ours (ours 22)."""

    epochs: int = setting(90, "passes over the clips")
    warmup: float = setting(5.0, "epochs of linear warm-up")
    batch: int = setting(32, "clips of a step, over all ranks")
    lr: float = setting(5e-4, "peak learning rate")
    weight_decay: float = setting(0.05, "of matrices, but for embeddings")
    clip: float = setting(1.0, "largest norm of the gradient")
    seed: int = setting(0, "of weights, order and augmentation")


FIELDS = fields(Recipe) + fields(Ablation)[2:]  # the data set knows classes and joints
MAY_BE_ZERO = ("warmup", "weight_decay", "seed", "modal_tokens")
SMALL = dict(frames=8, height=96, width=96, heads=2, lr=1.5e-3, epochs=24, warmup=2.0)
TINY = dict(frames=6, height=40, width=40, kernel=3, lr=1e-3, epochs=2, warmup=0.5)
BOTH = dict(channels=16, blocks=2, batch=16)
PRESETS = {"paper": {}, "small": SMALL | BOTH, "tiny": TINY | BOTH}


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0  # of the optimizer, in all
    log: list[dict] = field(default_factory=list)  # a line of each epoch
    seen: int = 0  # clips of this epoch that are done
    loss: float = 0.0  # sum over them
    seconds: float = 0.0  # spent on them
    bad_clips: dict[str, str] = field(default_factory=dict)  # of this epoch, and why


@dataclass
class Run:
    """What the functions below share; a checkpoint holds all but flags and clips."""

    options: argparse.Namespace
    source: data.Source
    recipe: Recipe
    model: D3T
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress

    def dataset(self, split):
        s = self.model.settings
        return data.Dataset(self.source, split, s.frames, s.height, s.width, self.recipe.seed)


def make_model(settings, recipe, options):
    torch.manual_seed(recipe.seed)
    model = build(settings)
    if options.checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    model = model.to(memory_format=torch.channels_last_3d)  # in which convolutions are faster
    return model.to(options.device)


def make_optimizer(model, recipe):
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        table = name.startswith(("position", "modal"))
        (rest if table or parameter.ndim == 1 else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, recipe.lr, fused=True)


# ---- What a step needs ----
def load_batches(dataset, batches, options):
    how = {"num_workers": options.workers, "pin_memory": options.device == "cuda"}
    how |= {"collate_fn": data.collate, "worker_init_fn": leave_group}
    if options.device == "cuda" and options.workers:  # a fork beside NCCL may hang
        how["multiprocessing_context"] = "forkserver"
    return DataLoader(dataset, batch_sampler=batches, **how)


def leave_group(worker):
    if hasattr(os, "setpgrp"):  # Ctrl-C is for the rank alone; Windows has no groups
        os.setpgrp()


def training_batches(count, recipe, parts, progress):
    """What is left of an epoch, in batches of this rank, `parts` a step: lists of (epoch, clip).

    The order depends on seed and epoch alone. The ranks share a step; a part of a step is dropped.
    """
    order = np.random.default_rng((recipe.seed, progress.epoch)).permutation(count).tolist()
    size = recipe.batch // RANKS // parts
    batches = []
    for start in range(progress.seen, count - recipe.batch + 1, recipe.batch):
        mine = order[start : start + recipe.batch][RANK::RANKS]
        step = [(progress.epoch, clip) for clip in mine]
        for i in range(0, len(step), size):
            batches.append(step[i : i + size])
    return batches


def training_steps(run, clips):
    """The batches of each step that is left of an epoch."""
    parts = run.options.accumulate
    batches = training_batches(len(clips), run.recipe, parts, run.progress)
    loader = iter(load_batches(clips, batches, run.options))
    steps = zip(*[loader] * parts)  # takes the parts of a step from the same iterator
    total = len(batches) // parts
    return tqdm(steps, f"epoch {run.progress.epoch + 1}", total, **BAR)


def learning_rate(recipe, epochs):
    """Linear warm-up, then a cosine to zero."""
    if epochs <= recipe.warmup:
        return recipe.lr * epochs / recipe.warmup
    part = (epochs - recipe.warmup) / (recipe.epochs - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * part))


def forward(net, batch, options):
    """Logits in float32 and labels, on the device."""
    tensors = (batch[name] for name in ("video", "joints", "visible", "label"))
    *clip, label = (each.to(options.device, non_blocking=True) for each in tensors)
    dtype = AMP[options.amp]
    with torch.autocast(options.device, dtype=dtype, enabled=dtype is not None):
        return net(*clip).float(), label


def say(*words, **how):
    if RANK == 0:
        print(*words, **how, flush=True)


def sum_over_ranks(*numbers):
    total = torch.tensor(numbers, dtype=torch.float64)
    if RANKS > 1:
        dist.all_reduce(total)
    return total.tolist()


def gather(items):
    """The items of all ranks, in the order of the ranks."""
    lists = [items] * RANKS
    if RANKS > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])


def report_bad(clips, run, count):
    """Name bad clips once an epoch; DataError if they are over 1 %."""
    bad = run.progress.bad_clips
    for name, why in gather(clips):
        if name not in bad:
            say(f"\nwarning: a clip was replaced by another: {why[:500]}", file=sys.stderr)
        bad[name] = why
    if len(bad) > max(1, count / 100):
        reasons = "\n".join(bad.values())
        raise DataError(f"{len(bad)} of {count} clips, over 1 %, cannot be read:\n{reasons}")


@torch.no_grad()
def evaluate(run, dataset):
    """Accuracy over all clips, each once; names, labels and logits in their order."""
    if RANKS > 1:
        for buffer in run.model.buffers():  # all ranks use the running statistics of rank 0
            dist.broadcast(buffer, 0)
    run.model.eval()
    mine = range(RANK, len(dataset), RANKS)
    size = max(1, run.recipe.batch // RANKS)
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    scores = []
    for batch in tqdm(load_batches(dataset, batches, run.options), "testing", **BAR):
        logits, label = forward(run.model, batch, run.options)
        scores += zip(batch["name"], label.tolist(), logits.cpu().numpy())
    by_number = dict(gather([*zip(mine, scores)]))
    scores = [by_number[number] for number in range(len(dataset))]
    names, labels, logits = map(np.array, zip(*scores))
    right = logits.argmax(1) == labels
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    result = {"top1": float(right.mean()), "mean_class": float(np.mean(by_class))}
    result["clips"] = len(labels)
    return result, {"names": names, "labels": labels, "logits": logits}


# ---- What a run writes ----
def log_epoch(run, result):
    """Print the line of an epoch, and write log.jsonl with it."""
    done = run.progress
    line = {"epoch": done.epoch + 1, "step": done.step, "loss": done.loss / done.seen, **result}
    line["lr"] = run.optimizer.param_groups[0]["lr"]
    line["bad"] = len(done.bad_clips)
    line["seconds"] = done.seconds
    line["clips_per_second"] = done.seen / done.seconds
    done.log.append(line)
    say("  ".join(f"{name} {value:.6g}" for name, value in line.items()))
    if RANK == 0:
        lines = [json.dumps(each) + "\n" for each in done.log]
        (run.options.out / "log.jsonl").write_text("".join(lines))


def save_checkpoint(run, name):
    """Write and rename a file: a checkpoint is always whole."""
    if RANK > 0:
        return
    source, state = run.source, {"data": run.options.data}
    state["settings"] = asdict(run.model.settings)
    for part in ("recipe", "progress"):
        state[part] = asdict(getattr(run, part))
    for part in ("model", "optimizer", "scaler"):
        state[part] = getattr(run, part).state_dict()
    state |= {"classes": source.classes, "joint_names": source.joint_names}
    state["clips"] = [*map(len, source.clips.values())]
    buffer = io.BytesIO()
    torch.save(state, buffer)  # torch.save to a file aborts the process when the disk is full
    path = run.options.out / name
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    os.replace(path.with_suffix(".tmp"), path)


def load_file(path):
    """What torch.save wrote, without code; or UsageError."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except DAMAGE as error:
        what = str(error).split(". ")[0]  # then comes bad advice
        raise UsageError(f"{path} cannot be loaded: {what}") from None


def load_checkpoint(path):
    saved = load_file(path)
    try:
        for part, kind in (("recipe", Recipe), ("settings", Ablation), ("progress", Progress)):
            saved[part] = kind(**saved[part])
    except (KeyError, TypeError) as error:  # of another version
        raise UsageError(f"{path} is no checkpoint of this train.py: {error!r}") from None
    return saved


def load_weights(model, path):
    """Start from a checkpoint, or the trunk from r2plus1d_18; names what is left out."""
    saved, own = load_file(path), model.state_dict()
    weights = saved.get("model")
    dilated = saved.get("settings", {"dilated": True})["dilated"]
    if weights is None:  # of torchvision
        weights = {f"trunk.{name}": value for name, value in saved.items()}
    assert model.settings.dilated == dilated, f"--weights {path} takes dilated = {dilated}"
    fitting = {}
    for name in weights.keys() & own.keys():
        if weights[name].shape == own[name].shape:
            fitting[name] = weights[name]
    rest = [name for name in own if name not in fitting]
    if any(name.startswith("trunk.") for name in rest):
        raise UsageError(f"--weights {path} does not fit: it has no {rest[0]} of this shape")
    model.load_state_dict(fitting, strict=False)
    if "model" in saved and rest:
        say("weights that keep their first values, because none fit:", *rest)


# ---- The loop ----
def train(run):
    """Train to the last epoch, or until asked to stop; returns the exit status."""
    options, recipe, progress = run.options, run.recipe, run.progress
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    net = DistributedDataParallel(model) if RANKS > 1 else model
    net = torch.compile(net) if options.compile else net
    clips, test = run.dataset("train"), run.dataset("test")
    while progress.epoch < recipe.epochs:
        net.train()
        begin = time.time() - progress.seconds
        for parts in training_steps(run, clips):
            epochs = progress.epoch + (progress.seen + recipe.batch) / len(clips)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epochs)
            loss, bad = 0.0, []
            for i, part in enumerate(parts):
                sync = RANKS == 1 or i + 1 == len(parts)  # DDP averages in the last part alone
                with nullcontext() if sync else net.no_sync():
                    logits, label = forward(net, part, options)
                    part_loss = F.cross_entropy(logits, label) / len(parts)  # (ours 21)
                    scaler.scale(part_loss).backward()
                loss += part_loss.item()
                bad += part["bad"]
            scaler.unscale_(optimizer)  # before the gradients are clipped
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss, stop, bad_clips = sum_over_ranks(loss / RANKS, len(ASKED), len(bad))
            # With fp16 gradients may overflow: then the scaler skips the step.
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise FloatingPointError(f"step {progress.step + 1}: loss {loss}, gradient {norm}")
            if bad_clips:
                report_bad(bad, run, len(clips))
            progress.step += 1
            progress.seen += recipe.batch
            progress.loss += recipe.batch * loss
            progress.seconds = time.time() - begin
            stop = stop or progress.step >= options.stop_after
            last = progress.seen + recipe.batch > len(clips)
            if stop or last or progress.step % options.save_every == 0:
                save_checkpoint(run, "last.pt")
            if stop:
                say(f"stopped after step {progress.step}; go on with --resume")
                return 128 + ASKED[0] if ASKED else 0
        result, _ = evaluate(run, test)
        best = max([line["top1"] for line in progress.log], default=-1)
        log_epoch(run, result)
        progress = run.progress = Progress(progress.epoch + 1, progress.step, progress.log)
        for name in ("best.pt", "last.pt") if result["top1"] > best else ("last.pt",):
            save_checkpoint(run, name)
    best = max(line["top1"] for line in progress.log)
    say(f"best top-1 {best:.2%}; all in {options.out}")
    return 0


# ---- Flags, ranks and signals ----
def number(kind, zero=False):
    def parse(text):
        value = kind(text)
        if 0 < value < 2**63 or (zero and value == 0):
            return value
        raise argparse.ArgumentTypeError(f"{text} is not positive")

    parse.__name__ = kind.__name__
    return parse


def parse_args(words):
    """The flags, and what they give of recipe and settings."""
    parser = argparse.ArgumentParser(description="[defaults]", usage=argparse.SUPPRESS)
    data.add_flags(parser.add_argument_group("data"))
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, help="[paper; synthetic tiny]")
    add("--out", type=Path, help="[runs/DATA]")
    add("--resume", action="store_true", help="go on in --out, or start there")
    add("--overwrite", action="store_true", help="start anew")
    add("--eval", type=Path, help="test it")
    add("--scores", type=Path, help="npz")
    add("--weights", type=Path, help="a checkpoint, or r2plus1d_18")
    add("--accumulate", type=number(int), default=1, help="parts of a step, saves memory [1]")
    add("--checkpointing", action="store_true", help="saves memory")
    add("--compile", action="store_true", help="by torch.compile")
    add("--device", choices=("cpu", "cuda"), help="[cuda]")
    add("--amp", choices=AMP, help="[CUDA bf16, fp16 before Ampere; CPU off]")
    add("--workers", type=number(int, zero=True), help="of a rank [2; synthetic 1]")
    add("--save-every", type=number(int), default=500, help="steps between last.pt [500]")
    add("--stop-after", type=number(int), default=math.inf, help="step, as by Ctrl-C [never]")
    add = parser.add_argument_group("recipe and model").add_argument
    for f in FIELDS:
        text = f"{f.metadata['help']} [{f.default}"
        for name, preset in PRESETS.items():
            if f.name in preset:
                text += f"; {name} {preset[f.name]}"
        how = {"help": text + "]", "default": argparse.SUPPRESS}
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = number(f.type, f.name in MAY_BE_ZERO)
        add("--" + f.name.replace("_", "-"), **how)
    options = parser.parse_args(words)
    if options.scores and not options.eval:
        parser.error("--scores goes with --eval")
    given = {f.name: getattr(options, f.name) for f in FIELDS if f.name in options}
    given = PRESETS.get(options.preset, {}) | given
    synthetic = options.data == "synthetic"
    options.out = options.out or Path("runs", options.data)
    options.preset = options.preset or ("tiny" if synthetic else "paper")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.workers is None:
        options.workers = 1 if synthetic else 2
    amp = "off"
    if options.device == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    options.amp = options.amp or amp
    return options, given


def make(kind, values):
    names = [f.name for f in fields(kind) if f.name in values]
    return kind(**{name: values[name] for name in names})


def configure(options, given, source, saved):
    """Which values win: the checkpoint's, else the flags', else the preset's."""
    known = {"classes": len(source.classes), "joints": len(source.joint_names)}
    values = PRESETS[options.preset] | known | given
    if saved:
        values = asdict(saved["recipe"]) | asdict(saved["settings"])
        values["batch"] = vars(options).get("batch", values["batch"])  # may change
    for name, value in given.items():
        assert values[name] == value, f"{name} is {values[name]} in the checkpoint, not {value}"
    recipe, settings = make(Recipe, values), make(Ablation, values)
    unit = RANKS * options.accumulate
    most = len(source.clips["train"])
    fits = options.eval or recipe.batch in range(0, most + 1, unit)
    assert fits, f"batch = {recipe.batch}: at most {most} (clips), by {unit} (ranks x accumulate)"
    return recipe, settings


def prepare(options, given):
    saved, path = None, options.eval or options.out / "last.pt"
    if options.eval or (options.resume and path.exists()):
        saved = load_checkpoint(path)
    elif path.exists() and not options.overwrite:
        raise UsageError(f"{options.out} holds a run: use --resume, --overwrite or another --out")
    source = data.load_whole(options, training=not options.eval, quiet=RANK > 0)
    if saved:
        trained = saved["data"], saved["clips"]
        here = options.data, [*map(len, source.clips.values())]
        assert trained == here or options.eval, f"the checkpoint is of {trained}, not {here}"
        source = data.match(source, saved["classes"], saved["joint_names"])
    recipe, settings = configure(options, given, source, saved)
    model = make_model(settings, recipe, options)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
    run = Run(options, source, recipe, model, optimizer, scaler, Progress())
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())  # empty where it was off
        run.progress = saved["progress"]
    elif options.weights:
        load_weights(model, options.weights)
    return run


def ask_to_stop(number, _):
    ASKED.append(number)
    if number == signal.SIGINT:  # a second Ctrl-C ends the run at once
        signal.signal(number, signal.SIG_DFL)


def keep_memory():
    """Stop glibc from returning freed memory: page faults cost 10 % of a step."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: all comes from the heap
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: it never shrinks


def main(words=None):
    """Train or test as the flags say; returns the exit status."""
    keep_memory()
    ASKED.clear()
    options, given = parse_args(words)
    try:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if RANKS > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
        run = prepare(options, given)
        values = vars(options) | asdict(run.recipe) | asdict(run.model.settings)
        say(f"D3T, torch {torch.__version__}, {RANKS} ranks, step {run.progress.step}:", values)
        if options.eval:
            result, scores = evaluate(run, run.dataset("test"))
            say(json.dumps(result))
            if RANK == 0 and options.scores:
                np.savez(options.scores, classes=run.source.classes, **scores)
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGINT, ask_to_stop)
        signal.signal(signal.SIGTERM, ask_to_stop)
        return train(run)
    except (UsageError, AssertionError) as error:
        status, what = 2, str(error)
    except (DataError, ArithmeticError, OSError) as error:
        status, what = 1, str(error)
    except torch.AcceleratorError as error:  # such as a GPU that is too old for this torch
        status, what = 1, str(error).splitlines()[0]
    except torch.OutOfMemoryError as error:
        status, what = 1, f"{error}. --accumulate and --checkpointing save memory"
    sys.stderr.write(f"train.py: {what}\n")  # one call: the lines of ranks do not mix
    return status


if __name__ == "__main__":
    status = main()
    if RANKS > 1:
        # A thread of gloo that waits for the interpreter's lock at its end would abort the process.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
