"""Pictures that do not fit into memory: read from their files by worker processes, batch by batch.

`PictureFiles` stands where a split's tensor of images would stand. Which pictures make a batch, and how each
is moved at random, comes from the generator that `data.epoch_batches` is given, never from the workers: a run
that is resumed finds the same batches, whatever the number of workers.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from errors import UserError, printable
from picture_file import open_picture, read_rgb, to_rgb

SMALLEST_CROP = 0.25  # of a picture's area, when crops are random
MOST_WORKERS = 16
MOST_BROKEN = 100     # pictures one after the other that cannot be read end the run


class PictureFiles:
    """Pictures in files as if they were a uint8 tensor (N, 3, H, W): `len`, `shape`, and indices.

    Args:
        root, paths: the folder and the pictures' names in it.
        size: (H, W) that every picture is brought to.
        device: where `batches` puts them; [number] and [slice] give tensors on the CPU.
        workers: processes that read; None for one less than there are cores, at most 16; 0 reads in this one.
        crop, flip: `batches` take random crops of a picture, and mirror it at random.
    """

    def __init__(self, root: Path, paths: list[str], size: tuple[int, int],
                 device: torch.device | str = "cpu", workers: int | None = None, crop: bool = False,
                 flip: bool = False) -> None:
        self.root = root
        # One block of bytes and not a million strings, which every worker would copy sooner or later.
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.size, self.device = tuple(size), torch.device(device)
        self.workers = default_workers() if workers is None else workers
        from torchvision.transforms import v2  # a second of import, when it is needed

        random_crop = v2.RandomResizedCrop(self.size, scale=(SMALLEST_CROP, 1), antialias=True)
        moves = ([random_crop] if crop else []) + ([v2.RandomHorizontalFlip()] if flip else [])
        self.cropped, self.transform = crop, v2.Compose([*moves, v2.PILToTensor()]) if moves else None
        self.named: set[str] = set()  # broken pictures that a warning has named

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), 3, *self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: int | slice | Tensor) -> Tensor | PictureFiles:
        """(3, H, W) or (b, 3, H, W) uint8, on the CPU, not moved; of a tensor of numbers, those files.

        Raises UserError for a broken picture.
        """
        if isinstance(which, Tensor):
            chosen = copy.copy(self)
            chosen.paths = self.paths[which.cpu().numpy()]
            return chosen
        numbers = range(len(self))[which]
        if isinstance(numbers, int):
            return torch.from_numpy(read_rgb(self.path(numbers), self.size).copy())
        return torch.stack([self[number] for number in numbers])

    def cpu(self) -> PictureFiles:
        """Itself: [number] and [slice] give tensors on the CPU."""
        return self

    def path(self, number: int) -> Path:
        return self.root / os.fsdecode(self.paths[number])

    def batches(self, chunks: list[Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `chunks`, numbers of pictures: (images (b, 3, H, W) uint8, numbers) on the device.

        A broken picture is skipped: the next one that can be read takes its place, and a line on stderr names
        it; at the end they are counted. `seed` decides how each picture is cropped and mirrored.
        """
        reader = _Reader(self, seed)
        loader = DataLoader(reader, batch_sampler=[chunk.tolist() for chunk in chunks], collate_fn=_together,
                            num_workers=self.workers, worker_init_fn=_begin_worker,
                            pin_memory=self.device.type == "cuda",
                            generator=torch.Generator())  # or it draws a number from the run's
        before = len(self.named)
        for images, numbers, broken in _explained(iter(loader)):
            for line in broken:
                if line not in self.named:
                    self.named.add(line)
                    tqdm.write(f"skipped: {printable(line)}", file=sys.stderr)
            yield (images.to(self.device, non_blocking=True), numbers.to(self.device, non_blocking=True))
        if len(self.named) > before:
            tqdm.write(f"{len(self.named):,} of {len(self):,} pictures skipped, because they cannot be read",
                       file=sys.stderr)


class _Reader(torch.utils.data.Dataset):
    """What a worker has of the pictures."""

    def __init__(self, files: PictureFiles, seed: int) -> None:
        self.files, self.seed = files, seed

    def __getitem__(self, number: int) -> tuple[Tensor, int, list[str]]:
        broken = []
        for other in range(number, number + min(MOST_BROKEN, len(self.files))):
            other %= len(self.files)
            try:
                return self._read(other), other, broken
            except UserError as error:
                broken.append(str(error))
        raise RuntimeError(f"no readable picture in {len(broken)}, the last: {broken[-1]}")

    def _read(self, number: int) -> Tensor:
        files = self.files
        if files.transform is None:
            return files[number]
        path, (height, width) = files.path(number), files.size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + number)  # torch.manual_seed sets the GPUs', too
            if files.cropped:
                # The smallest crop has half of the picture's sides.
                return files.transform(to_rgb(open_picture(path, least=(2 * width, 2 * height))))
            return files.transform(Image.fromarray(read_rgb(path, files.size).transpose(1, 2, 0)))


def _together(items: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    images, numbers, broken = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(numbers), [line for lines in broken for line in lines]


def _begin_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    torch.set_num_threads(1)


def _explained(batches: Iterator) -> Iterator:
    """What goes wrong in a worker as one line."""
    try:
        yield from batches
    except RuntimeError as error:
        message = str(error)
        if "no readable picture" in message:
            line = next(line for line in reversed(message.splitlines()) if "no readable picture" in line)
            raise UserError(f"{line.removeprefix('RuntimeError: ')}; are these pictures?") from error
        if "DataLoader worker" in message:
            raise UserError(f"a process that reads pictures ended ({message[:160]}); try --workers 0"
                            ) from error
        raise


def default_workers() -> int:
    """One less than this process's share of the cores, at least 1 and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun says how many processes share them
    return min(MOST_WORKERS, max(1, share - 1))
