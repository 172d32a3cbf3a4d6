"""Train VisionMamba2.

    python train_mamba.py                                MNIST, 20 epochs
    python train_mamba.py --preset gpu                   the same for a CUDA device; presets.py has more
    python train_mamba.py --dataset digits --epochs 3    a minute's try, no download
    python train_mamba.py --resume                       go on where the newest run stopped
    torchrun --nproc-per-node=4 train_mamba.py           on four GPUs
    tensorboard --logdir runs

Choices are made on the validation split (the last 5,000 of MNIST's training images); the test set is
only reported. checkpoints/<run-name>.pt is the best on validation, <run-name>.last.pt the newest.
"""

from __future__ import annotations

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)
from errors import UserError, as_flag, run_script  # isort: skip  (Ctrl-C is one line from here on)

import argparse
import contextlib
import random
import shlex
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
import distributed
import evaluate
import explain
import memory
import profile_step
from baselines import ARCHITECTURES, matched_config
from flags import MAY_CHANGE_ON_RESUME, fill_in, parse_arguments
from run_log import NoLog, RunLog, claim, is_begun, owner
from training import StopRequest, Training

# ---- Command line -----------------------------------------------------------------------------------------


def read_settings() -> tuple[argparse.Namespace, dict | None]:
    """The run's settings, and the checkpoint it goes on from, if any; nothing is written.

    A resumed run keeps the settings it began with; asking for others is an error, not a silent change.
    """
    settings = parse_arguments()
    if settings.resume is None:
        fill_in(settings)
        if settings.run_name is None:
            settings.run_name = time.strftime(f"{settings.dataset}-%Y%m%d-%H%M%S")
        check_paths(settings)
        return settings, None
    path = settings.resume
    if path == Path("newest"):
        path = checkpoint.newest(settings.checkpoints_dir, unfinished=True)
    resumed = checkpoint.load_good(path)
    if "optimizer" not in resumed:
        raise UserError(f"{path} holds no state of training to go on from; resume a .last.pt")
    saved = {name: Path(str(value)) if name.endswith("_dir") else value
             for name, value in resumed["settings"].items()} | {"checkpoints_dir": path.parent}
    try:
        kept = parse_arguments([], saved)
    except UserError as error:
        raise UserError(f"the settings in {path} do not fit this version: {error}") from error
    settings = parse_arguments(saved=saved)
    for name, value in vars(kept).items():  # also those newer than the run
        if name not in MAY_CHANGE_ON_RESUME and getattr(settings, name) != value:
            flag = as_flag(name)
            raise UserError(f"{flag} is {value} in {path}; a resumed run keeps its settings, so leave {flag} "
                            "out or as it is")
    settings.resume = path
    fill_in(settings)
    check_paths(settings)
    if not settings.profile:
        check_own(settings, resumed)
    return settings, resumed


def run_paths(settings: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Where a run writes: its folder, its best checkpoint and its last."""
    name, folder = settings.run_name, settings.checkpoints_dir
    return settings.runs_dir / name, folder / f"{name}.pt", folder / f"{name}.last.pt"


def check_paths(settings: argparse.Namespace) -> None:
    """Raise UserError where the run would overwrite another one, or could not write; leaves no trace."""
    if not checkpoint.is_run_name(settings.run_name):
        raise UserError(f"--run-name {settings.run_name!r} cannot name a folder everywhere; use letters, "
                        "digits, - and _")
    paths = run_paths(settings)
    folder, _, last = paths
    for path, flag in zip(paths, ("--runs-dir", "--checkpoints-dir", "--checkpoints-dir"), strict=True):
        try:
            if settings.resume is None and (is_begun(path) if path == folder else checkpoint.exists(path)):
                go_on = f", or go on with that run by --resume {quoted(last)}"
                raise UserError(f"{path} exists; choose another --run-name"
                                + (go_on if checkpoint.exists(last) else ""))
            with tempfile.TemporaryFile(dir=next(place for place in path.parents if place.exists())):
                pass
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another {flag}"
                            ) from error


def quoted(path: Path) -> str:
    """A path for a command that a person pastes into a shell."""
    return shlex.quote(str(path))


def see_it(path: Path, runs_dir: Path) -> str:
    """The command that shows a model, and puts what it writes beside its curves."""
    folder = "" if runs_dir == Path("runs") else f" --runs-dir {quoted(runs_dir)}"
    return f"see it with: python demo_mamba.py --checkpoint {quoted(path)}{folder}"


def check_own(settings: argparse.Namespace, resumed: dict) -> None:
    """Raise UserError where going on from `resumed` would write over the files of another run."""
    folder, _, last = run_paths(settings)
    path = settings.resume
    if path.name not in (last.name, checkpoint.previous(last).name):
        raise UserError(f"{path} is of the run {settings.run_name}, whose files would be written over; move "
                        f"it, as {last.name}, into a folder of its own and resume it there")
    there, own = owner(folder), resumed.get("run_id")  # None of runs older than these
    if there and own and there != own:
        raise UserError(f"{folder} is of another run than {path}; give another --runs-dir")


# ---- Training ---------------------------------------------------------------------------------------------


def main() -> None:
    with distributed.processes():
        run(*distributed.of_the_first(read_settings))


def run(settings: argparse.Namespace, resumed: dict | None) -> None:
    folder, best, last = run_paths(settings)
    if resumed and resumed["epoch"] >= settings.epochs:
        distributed.say(f"{settings.run_name} has finished its {settings.epochs} epochs; "
                        + see_it(best if best.exists() else settings.resume, settings.runs_dir))
        return
    device = distributed.own_device(evaluate.pick_device(settings.device))
    if settings.batch_size < distributed.size():
        raise UserError(f"--batch-size {settings.batch_size} is less than an image for each of the "
                        f"{distributed.size()} processes, which share it; use at least {distributed.size()}")
    if settings.train_on_all and settings.hold_out is not None:
        raise UserError("--train-on-all holds out no images; leave it out, or --hold-out")
    if settings.mean_teacher and not settings.ema:
        raise UserError("--mean-teacher teaches what averaged weights say; add --ema, 0.999 say")
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("high")

    check_model(settings)
    dataset = distributed.first_alone(
        lambda: data.load(settings.dataset, settings.data_dir, device, settings.limit_train,
                          settings.image_size, settings.memory_budget, settings.workers,
                          settings.augment != "none", settings.flip and settings.augment != "none",
                          hold_out=0 if settings.train_on_all else settings.hold_out))
    if resumed and list(resumed["dataset"]["classes"]) != list(dataset.classes):
        raise UserError(f"{settings.resume} tells {data.names(resumed['dataset']['classes'])} apart, but "
                        f"{settings.data_dir} has {data.names(dataset.classes)}; give the folder that it was "
                        "trained on")
    config, model = build_model(settings, len(dataset.classes), dataset.shape[0], device)
    training = Training(model, dataset, settings, device)
    if resumed:
        training.load(resumed)
        if training.epoch > 0 and not best.exists():
            training.best_accuracy = -1.0
            distributed.say(f"{best} is gone; the best model is sought anew among the epochs to come")
    if settings.profile:
        if distributed.size() > 1:
            raise UserError("--profile looks into one process; run it without torchrun")
        with memory.told_when_full(training):
            profile_step.show(training)
        return
    # What tells this run from another of its name; it goes on with the one that it began with.
    run_id = (resumed or {}).get("run_id") or uuid.uuid4().hex
    about = {"run_id": run_id, "architecture": settings.model, "config": config,
             "dataset": {"name": dataset.name, "classes": list(dataset.classes), "mean": list(dataset.mean),
                         "std": list(dataset.std), "shape": list(dataset.shape)},
             "settings": {name: str(value) if isinstance(value, Path) else value
                          for name, value in vars(settings).items() if name != "resume"}}
    with claim(folder, last, not resumed) if distributed.is_writer() else contextlib.nullcontext():
        if distributed.is_writer():
            if not resumed:  # so that what there is of a run can always be gone on with
                checkpoint.save(last, {**about, **training.state()})
            elif checkpoint.load_good(settings.resume)["step"] != training.step:
                raise UserError(f"{settings.resume} was gone on with in this moment; give --resume once more")
        training.saved = f"{last} (step {training.step})"
        log = RunLog(folder, training.epoch, training.step, run_id) if distributed.is_writer() else NoLog()
        with log, StopRequest() as stop, memory.told_when_full(training):
            if device.type == "cuda" and distributed.size() == 1:
                training.prepare()
            introduce(training)
            train(training, about, log, stop)


def introduce(training: Training) -> None:
    """Say what is trained, on what and where."""
    settings, dataset, count = training.settings, training.dataset, distributed.size()
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    each = f" in each of {count} processes, {settings.batch_size} together" if count > 1 else ""
    distributed.say(f"{settings.run_name}: {dataset.name}, {len(dataset.train.labels):,} training images, "
                    f"{settings.batch_size / count:g} a step{each}, {parameters:,} parameters, "
                    f"{evaluate.device_name(training.device)}, {settings.epochs} epochs")
    if dataset.streamed:
        distributed.say(f"pictures of {dataset.shape[1]}×{dataset.shape[2]} pixels, streamed by "
                        f"{dataset.train.images.workers} workers")
    if dataset.test is dataset.val:
        distributed.say("there is no test set: the accuracy on validation is reported as test, too")


def check_model(settings: argparse.Namespace) -> None:
    """Raise UserError where tokens or model would be too small to be one; before any image is read."""
    height, width = settings.image_size
    if settings.patch_size >= max(height, width):
        raise UserError(f"--patch-size {settings.patch_size} makes one token of an image of {height}×{width} "
                        "pixels, which leaves nothing to scan; lower it, or take larger images")
    if settings.d_model < settings.patch_size // 2:
        raise UserError(f"--d-model {settings.d_model} is too narrow for --patch-size {settings.patch_size}; "
                        f"use at least {settings.patch_size // 2}")


def build_model(settings: argparse.Namespace, num_classes: int, in_channels: int,
                device: torch.device) -> tuple[dict, nn.Module]:
    """The arguments of the model and the model. Raises UserError where they make none."""
    config = {"num_classes": num_classes, "d_model": settings.d_model,
              "num_blocks": settings.num_blocks, "in_channels": in_channels,
              "patch_size": settings.patch_size, "scan": settings.scan,
              "d_state": settings.d_state, "d_conv": settings.d_conv,
              "bidirectional": settings.bidirectional,
              "permute_seed": settings.permute_seed, "drop_path": settings.drop_path,
              "stem_depth": settings.stem_depth, "position_embedding": settings.position_embedding,
              "drop_tokens": settings.drop_tokens, "position_conv": settings.position_conv}
    try:
        config = matched_config(settings.model, config)
        model = evaluate.on_device(ARCHITECTURES[settings.model](**config), device)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"no model can be built with these settings ({str(error)[:160]}); lower --d-model, "
                        "--num-blocks, --d-state or --d-conv") from error
    model.gradient_checkpointing = settings.gradient_checkpointing
    return config, model


def evaluation(training: Training) -> tuple[dict, Tensor | None]:
    """The metrics of the epoch just finished, and the class probabilities of the test images.

    With --train-on-all there are no validation images, and the test set waits for the last epoch.
    """
    settings, dataset = training.settings, training.dataset
    val = test = None
    started = time.perf_counter()

    def predict(split: data.Split) -> Tensor:
        return distributed.compute_in_parts(lambda *part: evaluate.predict(
            training.evaluated, data.Split(*part), dataset, training.device), *split)

    if not settings.train_on_all:
        val = predict(dataset.val)
    if not settings.train_on_all or training.epoch == settings.epochs:
        test = val if dataset.test is dataset.val else predict(dataset.test)
    return {"epoch": training.epoch, **training.summary(),
            "val_loss": None if val is None else evaluate.negative_log_likelihood(val, dataset.val.labels),
            "val_accuracy": None if val is None else evaluate.accuracy(val, dataset.val.labels),
            "test_accuracy": None if test is None else evaluate.accuracy(test, dataset.test.labels),
            "images_per_second": training.images / training.seconds, "seconds": training.seconds,
            "evaluation_seconds": time.perf_counter() - started}, test


def train(training: Training, about: dict, log: RunLog, stop: StopRequest) -> None:
    """Train to the last epoch or, with exit status 130, to where a stop was asked for. Saves either way."""
    settings, model, dataset = training.settings, training.evaluated, training.dataset
    _, best, last = run_paths(settings)

    def save() -> None:
        if not distributed.is_writer():
            return
        log.flush()  # what is logged of the steps until now must not be lost with the process
        checkpoint.save(last, {**about, **training.state()}, keep_previous=True)
        training.saved = f"{last} (step {training.step})"

    known = dataset.train if settings.train_on_all else dataset.val
    chosen = explain.one_of_each_class(known.labels)
    examples, labels = known.images[chosen][:].to(training.device), known.labels[chosen]
    while training.epoch < settings.epochs:
        finished = training.run_epoch(log, stop, save)
        if finished:
            metrics, test = evaluation(training)
            training.metrics = metrics
            loss = metrics["val_loss"]
            if loss is None:  # without validation images these show whether the last step spoiled the weights
                said = evaluate.predict(model, data.Split(examples, labels), dataset, training.device)
                loss = evaluate.negative_log_likelihood(said, labels)
            training.check_finite(loss)
            log.epoch(training.step, metrics)
            draw = settings.draw and log.draws(last=training.epoch == settings.epochs)
            if test is not None:
                log.test(training.step, dataset.test, test, dataset.classes, draw)
            if draw and explain.has_scan(model):
                log.scans(training.step, model, examples, dataset)
            # Without validation images the last epoch is the one that counts.
            if settings.train_on_all or metrics["val_accuracy"] > training.best_accuracy:
                training.best_accuracy = metrics["val_accuracy"]
                if distributed.is_writer():
                    checkpoint.save(best, {**about, "model": model.state_dict(), "epoch": training.epoch,
                                           "metrics": metrics})
        if training.epoch == settings.epochs:  # before the run counts as finished, or a kill could lose it
            log.hparams(training.step, about["settings"], training.metrics)
        save()
        if finished:
            accuracies = "".join(f"{name} {metrics[key]:.2%}  " for name, key in (
                ("validation", "val_accuracy"), ("test", "test_accuracy")) if metrics[key] is not None)
            distributed.say(f"epoch {training.epoch:{len(str(settings.epochs))}}/{settings.epochs}  "
                            f"loss {metrics['train_loss']:.4f}  {accuracies}{training.seconds:.0f} s")
        if (stop.asked_of_any(finished) or not finished) and training.epoch < settings.epochs:
            where = f"after epoch {training.epoch}" if finished else f"in epoch {training.epoch + 1}"
            distributed.say(f"stopped {where}; go on with: python train_mamba.py --resume {quoted(last)}")
            sys.exit(130)
    what = "last epoch" if settings.train_on_all else "best on validation"
    distributed.say(f"{what}: {best}\n{see_it(best, settings.runs_dir)}")


if __name__ == "__main__":
    run_script(main)
