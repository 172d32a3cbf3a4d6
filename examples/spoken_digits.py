"""One trunk for pictures and sound: a noisy MNIST digit, the same digit spoken in noise, the two together.

    python examples/spoken_digits.py             some ten minutes on two cores; needs espeak-ng
    python examples/spoken_digits.py --seeds 1 --output look.json

The digits are spoken by espeak-ng (a package of your system: apt install espeak-ng, brew install espeak-ng)
in several accents, voices, speeds and pitches; the voices of validation and test are never trained on. Sound
becomes log-mel frames, a picture becomes patches; both are tokens of the same width, one after the other in
one sequence. The blocks of VisionMamba2 scan it and know of no kinds, but for a learned vector added to each.

Three models are trained for each seed, alike in everything but what they are given: the same steps, rate and
noise. results/spoken-digits.json holds their accuracies after the last step, on the validation voices and
images, by which the recipe was chosen, and on those of the test.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import statistics
import subprocess
import sys
import wave
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from torch import Tensor, nn
from tqdm import tqdm

import augment
import checkpoint
import data
import evaluate
from benchmarks import timing
from errors import ArgumentParser, UserError, run_script
from mamba_ssm_simple import VisionMamba2

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029")
VOICES = {  # of espeak-ng 1.50 or newer
    "train": ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "adam", "Alicia", "Andy", "antonio",
              "croak", "Denis", "Gene", "Henrique", "Hugo", "klatt2", "Mario", "Mike", "Nguyen", "steph",
              "victor"),
    "val": ("Annie", "Diogo", "klatt", "Lee", "linda", "Michael"),
    "test": ("m7", "m8", "f4", "f5")}
INPUTS = ("image", "sound", "both")

RATE = 8000                       # samples a second
SAMPLES = 8192                    # of a clip, about a second; what is shorter lies somewhere in it
WINDOW, HOP, MELS = 256, 240, 32  # 32 ms windows every 30 ms, in 32 bands
IMAGE_NOISE = 0.6                 # standard deviation of the noise on pixels of 0 to 1
SOUND_NOISE = -4.0                # signal to noise in dB; with it the sound is about as hard as the image
LR = 2e-3
WARM_UP = 0.1001                  # of the steps; with 0.1 PyTorch divides by 0 in a run of ten


# ---- Spoken digits ----------------------------------------------------------------------------------------


def spoken_digits(cache: Path, takes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train", "val", "test"}: clips (N, SAMPLES) float32 of power 1, and labels (N,); synthesised once.

    Raises UserError where espeak-ng is missing or says nothing, and where what is kept is damaged.
    """
    path = cache / f"spoken-digits-{zlib.crc32(repr((ACCENTS, VOICES, takes)).encode()):08x}.npz"
    if not path.exists():
        if shutil.which("espeak-ng") is None:
            raise UserError("this example needs espeak-ng; install it: apt install espeak-ng (Linux), "
                            "brew install espeak-ng (macOS)")
        arrays = {}
        for part, voices in VOICES.items():
            rng = np.random.default_rng(len(voices))
            jobs = [(digit, f"{accent}+{voice}", int(rng.integers(110, 220)), int(rng.integers(10, 90)))
                    for digit, accent, voice, _
                    in itertools.product(range(10), ACCENTS, voices, range(takes))]
            with ThreadPoolExecutor() as pool:
                clips = list(tqdm(pool.map(lambda job: speak(*job), jobs), desc=f"speak ({part})",
                                  total=len(jobs), leave=False, disable=None))
            arrays[part] = np.stack([place(clip, rng) for clip in clips]).astype(np.float16)
            arrays[f"{part}_labels"] = np.array([job[0] for job in jobs])
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npz")
        np.savez(temporary, **arrays)
        temporary.replace(path)
    try:
        with np.load(path) as arrays:
            return {part: (torch.from_numpy(arrays[part].astype(np.float32)),
                           torch.from_numpy(arrays[f"{part}_labels"])) for part in VOICES}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete it, and the digits are spoken "
                        "again") from error


def speak(digit: int, voice: str, speed: int, pitch: int) -> np.ndarray:
    """The digit spoken, RATE samples a second, float64; `speed` in words a minute, `pitch` from 0 to 99."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", WORDS[digit]]
    said = subprocess.run(command, capture_output=True)
    try:
        with wave.open(io.BytesIO(said.stdout)) as file:
            samples = np.frombuffer(said.stdout[44:], "<i2").astype(np.float64)  # a pipe has no length
            if not samples.any():
                raise EOFError
            return resample_poly(samples, RATE, file.getframerate())
    except (wave.Error, EOFError) as error:
        raise UserError(f"espeak-ng said nothing as {voice} ({said.stderr.decode()[:100]}); does "
                        f"`espeak-ng -v {voice} one` work?") from error


def place(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip without its silence, its speech of power 1, somewhere in SAMPLES samples."""
    loud = np.flatnonzero(np.abs(clip) > 0.01 * np.abs(clip).max())
    clip = clip[loud[0]:loud[-1] + 1][:SAMPLES]
    placed = np.zeros(SAMPLES)
    start = rng.integers(0, SAMPLES - len(clip) + 1)
    placed[start:start + len(clip)] = clip / np.sqrt(np.mean(clip**2))
    return placed


def log_mel(clips: Tensor) -> Tensor:
    """Clips (b, samples) → log-mel frames (b, frames, MELS) of mean 0 and deviation 1 each."""
    spectra = torch.stft(clips, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False,
                         return_complex=True)
    power = spectra.abs().square().transpose(1, 2)                             # (b, frames, WINDOW / 2 + 1)
    frames = torch.log(power @ mel_bands() + 1e-3)
    mean, deviation = frames.mean((1, 2), keepdim=True), frames.std((1, 2), keepdim=True)
    return (frames - mean) / (deviation + 1e-3)


def mel_bands() -> Tensor:
    """(WINDOW / 2 + 1, MELS): triangles, equally wide and half overlapping on the mel scale (HTK's)."""
    edges = torch.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)                                            # Hz
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


# ---- The model --------------------------------------------------------------------------------------------


class PictureAndSound(VisionMamba2):
    """VisionMamba2 whose blocks scan a sequence of sound frames, of patches, or of one after the other."""

    def __init__(self, d_model: int = 48, num_blocks: int = 2, d_state: int = 4):
        super().__init__(d_model=d_model, num_blocks=num_blocks, d_state=d_state, scan="raster",
                         bidirectional=True)
        self.frames = nn.Linear(MELS, d_model)
        self.kind = nn.Parameter(0.02 * torch.randn(2, d_model))

    def forward(self, images: Tensor | None, sound: Tensor | None) -> Tensor:
        """Images (b, 1, height, width) and frames (b, l, MELS), one of them may be None → logits (b, 10)."""
        tokens = []
        if sound is not None:
            tokens.append(self.frames(sound) + self.kind[0])                   # (b, frames, d)
        if images is not None:
            patches = self.stem(images).flatten(2).transpose(1, 2)
            tokens.append(patches + self.kind[1])                              # (b, patches, d)
        x = torch.cat(tokens, dim=1).unsqueeze(1)                              # (b, 1, l, d): one row
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---- Noise, training, test --------------------------------------------------------------------------------


def noisy(images: Tensor, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (b, 1, H, W) uint8 and clips (b, samples), both in noise, as the model takes them."""
    images = augment.normalize(images, *MNIST_SCALE)
    images = images + IMAGE_NOISE / MNIST_SCALE[1][0] * torch.randn(images.shape, generator=generator)
    noise = 10 ** (-SOUND_NOISE / 20) * torch.randn(clips.shape, generator=generator)
    return images, log_mel(clips + noise)


MNIST_SCALE = data.DATASETS["mnist"].mean, data.DATASETS["mnist"].std


def matching(labels: Tensor, split: data.Split, generator: torch.Generator) -> Tensor:
    """An image of each of the `labels`, (b, 1, H, W) uint8, chosen at random from `split`."""
    chosen = torch.empty_like(labels)
    for label in labels.unique():
        mine, theirs = labels == label, (split.labels == label).nonzero()[:, 0]
        chosen[mine] = theirs[torch.randint(len(theirs), (int(mine.sum()),), generator=generator)]
    return split.images[chosen]


def given(inputs: str, images: Tensor, sound: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a model of that kind is given."""
    return images if inputs != "sound" else None, sound if inputs != "image" else None


def train(inputs: str, seed: int, speech: dict, digits: data.Dataset, steps: int) -> PictureAndSound:
    """A model trained from scratch on `inputs`, to be evaluated."""
    torch.manual_seed(seed)
    model = PictureAndSound()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=WARM_UP)
    clips, labels = speech["train"]
    for _ in tqdm(range(steps), desc=f"seed {seed}, {inputs}", leave=False, disable=None):
        batch = torch.randint(len(labels), (64,), generator=generator)
        images, sound = noisy(matching(labels[batch], digits.train, generator), clips[batch], generator)
        logits = model(*given(inputs, images, sound))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: PictureAndSound, inputs: str, speech: tuple[Tensor, Tensor], images: data.Split) -> float:
    """Accuracy on unseen voices, each clip with two unseen images: the same noise for every model."""
    clips, labels = speech
    generator = torch.Generator().manual_seed(0)
    right = 0
    for batch in torch.arange(len(labels)).repeat(2).split(256):
        pictures = matching(labels[batch], images, generator)
        logits = model(*given(inputs, *noisy(pictures, clips[batch], generator)))
        right += int((logits.argmax(1) == labels[batch]).sum())
    return right / (2 * len(labels))


def main() -> None:
    parser = ArgumentParser("Train on noisy digits: seen, heard, and both.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds from 0 on")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="training steps of 64 pairs")
    parser.add_argument("--takes", type=int, default=2, metavar="N",
                        help="clips of a digit in each accent and voice, of other speeds and pitches")
    parser.add_argument("--data-dir", type=timing.output_folder, default=ROOT / "data", metavar="DIR",
                        help="where MNIST is kept, and the clips are cached")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS, metavar="FILE",
                        help="the JSON file (default: results/spoken-digits.json)")
    settings = parser.parse_args()
    if min(settings.seeds, settings.steps, settings.takes) < 1:
        parser.error("--seeds, --steps and --takes must be 1 or more")
    settings.output = timing.output_of(parser, settings, ROOT / "results" / "spoken-digits.json",
                                       ("seeds", "steps", "takes"))
    speech = spoken_digits(settings.data_dir, settings.takes)
    digits = data.load("mnist", settings.data_dir)
    images = {"val": digits.val, "test": digits.test}
    runs = []
    for seed, inputs in itertools.product(range(settings.seeds), INPUTS):
        model = train(inputs, seed, speech, digits, settings.steps)
        runs.append({"seed": seed, "inputs": inputs,
                     **{f"{part}_accuracy": accuracy(model, inputs, speech[part], images[part])
                        for part in images}})
        print(f"seed {seed}, {inputs:<5}  validation {runs[-1]['val_accuracy']:.2%}  "
              f"test {runs[-1]['test_accuracy']:.2%}", flush=True)
    write(settings, speech, runs)


def write(settings: argparse.Namespace, speech: dict, runs: list[dict]) -> None:
    """Print the means, write the JSON file."""
    found: dict[str, dict] = {"val_accuracy": {}, "test_accuracy": {}}
    for key, inputs in itertools.product(found, INPUTS):
        accuracies = [run[key] for run in runs if run["inputs"] == inputs]
        found[key][inputs] = {"mean": statistics.mean(accuracies),
                              "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None}
    for inputs in INPUTS:
        print(f"{inputs:<5}  {found['test_accuracy'][inputs]['mean']:.2%} of the test on average")
    result = {"machine": timing.machine(evaluate.pick_device("cpu")), "steps": settings.steps,
              "clips": {part: len(labels) for part, (_, labels) in speech.items()},
              "image_noise": IMAGE_NOISE, "sound_noise_db": SOUND_NOISE,
              "parameters": sum(parameter.numel() for parameter in PictureAndSound().parameters()),
              **found, "runs": runs}
    checkpoint.save_json(settings.output, result)
    print(f"written to {settings.output}")


if __name__ == "__main__":
    run_script(main)
