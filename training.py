"""What a training run does and remembers: the step, the learning rate's schedule, an epoch, the whole state.

    training = Training(model, dataset, settings, device)
    while training.epoch < settings.epochs:
        training.run_epoch(log, stop, save)

`Training.update` is the part of a step that runs on the device alone: nothing in it waits for the device or
depends on a number of Python's that changes from step to step.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import augment
import data
import distributed
import rng
from captured import CapturedStep
from errors import UserError
from run_log import RunLog

GRADIENT_NORM = 1.0     # gradients are clipped to this Euclidean norm
LAST_LR = 0.01          # the cosine ends at this fraction of the peak
LOG_EVERY = 10          # steps between looks at the device: bar, TensorBoard, check for NaN


class Training:
    """A model, its optimiser and how far they have come; all of it goes into a checkpoint and back."""

    def __init__(self, model: nn.Module, dataset: data.Dataset, settings: argparse.Namespace,
                 device: torch.device):
        self.model, self.dataset, self.settings, self.device = model, dataset, settings, device
        self.network = distributed.wrap(model)  # in a single process the model itself
        if settings.compile:
            self.network = torch.compile(self.network)
        # A tensor, where the device reads it, so that a new rate is no new step to a captured CUDA graph.
        self.rate = torch.tensor(settings.lr, device=device) if device.type == "cuda" else settings.lr
        self.optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=self.rate,
                                           fused=device.type in ("cpu", "cuda"),
                                           capturable=device.type == "cuda")
        amp = settings.amp if settings.amp != "auto" else "bf16" if device.type == "cuda" else "off"
        self.amp_dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.steps_an_epoch = data.num_batches(dataset.train, settings.batch_size)
        self.epoch = 0           # epochs finished
        self.step = 0            # steps finished, of all epochs
        self.best_accuracy = -1.0
        # The order of an epoch comes from seed and epoch, so that a resumed run finds it again.
        self.augmentation = torch.Generator(device).manual_seed(settings.seed)
        # Gradient checkpointing looks at the random numbers' state, which a capture forbids.
        captured = device.type == "cuda" and distributed.size() == 1 and not settings.gradient_checkpointing
        self.device_step = CapturedStep(self.update, [self.augmentation]) if captured else self.update
        # Of this epoch so far: sums of loss and hits over its images, their number, seconds spent.
        precise = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=precise, device=device)
        self.images, self.seconds = 0, 0.0
        self.metrics: dict = {}  # of the last epoch finished
        self.saved = "none yet"  # the last good checkpoint, for a person to read
        # The weights' exponential moving average; those of batch normalisation's statistics with them.
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval() if settings.ema else None
        self.average_weight = torch.zeros((), device=device)  # of the newest weights; a tensor as the rate is

    def prepare(self) -> None:
        """Compile what the steps will run, by steps of a copy: nothing of this training changes.

        Else the first epoch's time would be the compilers'. torch.compile's is still in it.
        """
        settings = argparse.Namespace(**vars(self.settings) | {"compile": False})
        before = rng.state(self.device)
        trial = Training(copy.deepcopy(self.model), self.dataset, settings, self.device)
        trial.model.train()
        size, images = self.settings.batch_size, len(self.dataset.train.labels)
        for count in {min(size, images), images % size or size}:
            trial.update(torch.zeros(count, *self.dataset.shape, dtype=torch.uint8, device=self.device),
                         torch.zeros(count, dtype=torch.int64, device=self.device))
        rng.restore(before, self.device)

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to keep: the average of the weights where one is made."""
        return self.model if self.averaged is None else self.averaged

    def run_epoch(self, log: RunLog, stop: StopRequest, save: Callable[[], None]) -> bool:
        """Train to the end of the epoch; False where a stop was asked for before.

        `save` is called where settings.checkpoint_every says: after so many steps ("500") or, looked at every
        LOG_EVERY steps, seconds ("300s").
        """
        done = self.step - self.epoch * self.steps_an_epoch
        if done == 0:
            self.sums.zero_()
            self.images, self.seconds = 0, 0.0
        order = torch.Generator(self.device).manual_seed(self.settings.seed * 100_003 + self.epoch)
        self.model.train()
        every, by_the_clock = self.settings.checkpoint_every, self.settings.checkpoint_every.endswith("s")
        saved = time.monotonic()
        started = time.perf_counter() - self.seconds  # as if the epoch had not been interrupted
        quiet = None if distributed.is_writer() else True
        with tqdm(total=self.steps_an_epoch, initial=done, unit="step", disable=quiet, leave=False,
                  desc=f"epoch {self.epoch + 1}/{self.settings.epochs}") as bar:
            batches = data.epoch_batches(self.dataset.train, self.settings.batch_size, order, start=done,
                                         part=lambda size: distributed.part(size).images)
            reading = None
            for index, (images, labels) in enumerate(batches, start=done):
                loss, norm = self.train_step(images, labels)
                if reading is not None:  # of the step before: meanwhile the device has this one to work on
                    self.report(reading, started, log, bar)
                    reading = None
                bar.update()
                last = index + 1 == self.steps_an_epoch
                look = self.step % LOG_EVERY == 0 or last
                stopping = stop.asked_of_any(look)
                look = look or stopping
                due = (look and time.monotonic() - saved >= int(every[:-1]) if by_the_clock
                       else self.step % int(every) == 0)
                if look or due:
                    reading = Reading(self, loss / len(labels), norm)
                # Several processes must see at the same step that a loss is no number.
                if reading is not None and (last or stopping or due or distributed.size() > 1):
                    self.report(reading, started, log, bar)
                    reading = None
                if stopping and not last:
                    return False
                if due and not last:
                    save()
                    saved = time.monotonic()
        self.epoch += 1
        return True

    def report(self, reading: Reading, started: float, log: RunLog, bar: tqdm) -> None:
        """Check and tell what a step came to, of an epoch that began at `started` of time.perf_counter()."""
        loss, norm, rate, _, hits = reading.wait()
        self.seconds = time.perf_counter() - started
        self.check_finite(loss, norm, reading.step, rate)
        log.step(reading.step, loss, rate, norm)
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {hits / reading.images:.2%}, "
                            f"{reading.images / self.seconds:,.0f} images/s")

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on images (b, C, H, W) uint8 and labels (b,); the sum of losses and the gradient norm."""
        self.set_rates()
        distributed.draw_apart(self.settings.seed, self.step)
        loss, norm = self.device_step(images, labels)
        self.images += len(labels)
        self.step += 1
        return loss, norm

    def update(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the device does in a step: augment, forward, backward, clip, update, add to the sums."""
        settings, part = self.settings, distributed.part(len(labels))
        if self.dataset.streamed:  # each process reads its own part, and the workers have moved it
            images = augment.augment(images, "none", self.augmentation, erase=settings.erase,
                                     batch=len(labels), part=part.images)
        else:
            images = augment.augment(images, settings.augment, self.augmentation, settings.augment_strength,
                                     settings.flip, settings.erase)[part.images]
        images = augment.normalize(images, self.dataset.mean, self.dataset.std)
        labels = labels[part.images]
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.network(images)
            loss = F.cross_entropy(logits, self.targets(images, labels))
        self.optimizer.zero_grad()
        self.scaler.scale(part.loss(loss)).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            average(self.averaged, self.model, self.average_weight)
        hits = (logits.argmax(1) == labels).sum()
        sums = part.total(torch.stack([loss.detach() * len(labels), hits]).to(self.sums.dtype))
        self.sums += sums
        return sums[0], norm

    @torch.no_grad()
    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the network is to say of images (b, C, H, W): the labels (b,), or probabilities (b, K).

        These are the labels' and, by the share settings.mean_teacher, those of the averaged weights (arXiv
        1703.01780), which err less than the weights of the moment.
        """
        if not self.settings.mean_teacher:
            return labels
        said = self.averaged(images).float().softmax(dim=-1)
        return torch.lerp(F.one_hot(labels, said.shape[1]).float(), said, self.settings.mean_teacher)

    def set_rates(self) -> None:
        """Give the optimiser, and the average, the rate of the step to come."""
        # An average of few steps follows faster, or it would long be that of the random weights.
        self.average_weight.fill_(1 - min(self.settings.ema, (1 + self.step) / (10 + self.step)))
        rate = self.learning_rate()
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def learning_rate(self) -> float:
        """Linear warm-up over settings.warm_up steps (a twentieth of all, 500 at most), then a cosine."""
        total = self.settings.epochs * self.steps_an_epoch
        warm_up = min(500, max(1, total // 20)) if self.settings.warm_up is None else self.settings.warm_up
        if self.step < warm_up:
            return self.settings.lr * (self.step + 1) / warm_up
        progress = (self.step - warm_up) / max(1, total - warm_up)
        return self.settings.lr * (LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress)))

    def check_finite(self, loss: float, norm: float = 0.0, step: int | None = None,
                     rate: float | None = None) -> None:
        """Raises UserError where the loss, or the gradient's norm, of a step is no number.

        `step` and its learning rate are those to name; None is the last one.
        """
        if self.scaler.is_enabled():
            norm = 0.0  # the scaler looks for itself, and leaves such a step out
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            rate = float(self.optimizer.param_groups[0]["lr"]) if rate is None else rate
            step = self.step if step is None else step
            raise UserError(f"the {what} at step {step} with learning rate {rate:.3g}; the last good "
                            f"state is {self.saved}; begin a new run with a lower --lr than "
                            f"{self.settings.lr:g} or with --amp off")

    def summary(self) -> dict:
        """Mean loss and accuracy over the epoch's images so far (augmented, as they were trained on)."""
        loss, hits = (self.sums / max(1, self.images)).tolist()
        return {"train_loss": loss, "train_accuracy": hits,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def lay_out_moments(self) -> None:
        """Let the optimiser's moments lie in memory as their weights do, which another device lays otherwise.

        The fused AdamW goes through both as they lie, and would give a weight the moments of another.
        """
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)

    def state(self) -> dict:
        """Everything that a run interrupted here needs to go on as if it had not been."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "averaged": None if self.averaged is None else self.averaged.state_dict(),
                "scaler": self.scaler.state_dict(), "rng": rng.state(self.device),
                "augmentation": self.augmentation.get_state(), "epoch": self.epoch, "step": self.step,
                "best_accuracy": self.best_accuracy, "sums": self.sums, "images": self.images,
                "seconds": self.seconds, "metrics": self.metrics}

    def load(self, contents: dict) -> None:
        """Go back to a `state`. Raises UserError where it does not fit the model."""
        try:
            self.model.load_state_dict(contents["model"])
            options = [{name: value for name, value in group.items() if name != "params"}
                       for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(contents["optimizer"])
            self.lay_out_moments()
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group.update(own)  # the kind of optimiser that this device takes, not the saved one's
            if self.averaged is not None:
                self.averaged.load_state_dict(contents["averaged"])
            self.scaler.load_state_dict(contents["scaler"])
            rng.restore(contents["rng"], self.device)
            self.augmentation.set_state(contents["augmentation"])
            self.sums = contents["sums"].to(self.device)
            self.epoch, self.step, self.images = contents["epoch"], contents["step"], contents["images"]
            self.best_accuracy, self.seconds = contents["best_accuracy"], contents["seconds"]
            self.metrics = contents["metrics"]
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"the state in {self.settings.resume} does not fit this version or device "
                            f"({type(error).__name__}: {str(error)[:160]}); train anew") from error


class Reading:
    """Figures of a step on their way from the device; on CUDA only `wait` waits for them."""

    def __init__(self, training: Training, loss: Tensor, norm: Tensor) -> None:
        """loss, norm: () of the step just made, on its device."""
        self.step, self.images = training.step, training.images
        dtype, device = training.sums.dtype, training.device
        rate = torch.as_tensor(training.optimizer.param_groups[0]["lr"], dtype=dtype, device=device)
        figures = torch.stack([figure.to(dtype) for figure in (loss, norm, rate, *training.sums)])
        on_cuda = device.type == "cuda"
        self.figures = figures.to("cpu", non_blocking=on_cuda)
        self.there = torch.cuda.Event() if on_cuda else None
        if self.there is not None:
            self.there.record()

    def wait(self) -> list[float]:
        """Its loss, gradient norm and learning rate; of its epoch until then the sums of losses and hits."""
        if self.there is not None:
            self.there.synchronize()
        return self.figures.tolist()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and filters decay; A_log, D, biases and norms do not: zero is no natural value for them."""
    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.endswith("A_log")

    named = list(model.named_parameters())
    return [{"params": [parameter for name, parameter in named if decays(name, parameter)],
             "weight_decay": weight_decay},
            {"params": [parameter for name, parameter in named if not decays(name, parameter)],
             "weight_decay": 0.0}]


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """Move `averaged` towards `model`, buffers included, by the fraction `weight`: () on their device.

    torch.optim.swa_utils.AveragedModel would wait for the device at every step.
    """
    ours, theirs = ([*module.parameters(), *module.buffers()] for module in (averaged, model))
    moving = [ours_.is_floating_point() for ours_ in ours]
    means, news = ([tensor for tensor, moves in zip(tensors, moving, strict=True) if moves]
                   for tensors in (ours, theirs))
    steps = torch._foreach_sub(news, means)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(means, steps)
    for mean, new, moves in zip(ours, theirs, moving, strict=True):
        if not moves:  # how many batches the statistics have seen
            mean.copy_(new)


class StopRequest:
    """Whether Ctrl-C was pressed. Within `with`, the first one asks; a second one stops at once, unsaved."""

    asked = False

    def __enter__(self) -> StopRequest:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)

    def asked_of_any(self, now: bool) -> bool:
        """Whether to stop. Several processes must stop at the same step, so they look where `now` is True."""
        if distributed.size() == 1:
            return self.asked
        return now and distributed.agreed(self.asked)

    def _ask(self, *_) -> None:
        if self.asked:
            if distributed.size() == 1:
                raise KeyboardInterrupt
            return  # torchrun hands one Ctrl-C on a second time
        self.asked = True
        if distributed.is_writer():
            again = "; Ctrl-C again stops at once, unsaved" if distributed.size() == 1 else ""
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\nstopping as soon as the state can be saved{again}\n".encode())
