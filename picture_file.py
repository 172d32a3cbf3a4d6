"""Picture files as people have them, of every size and mode, opened safely."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import UserError

MAX_PIXELS = 64 * 2**20
# Without MPO: Pillow opens a camera's as the JPEG that it begins with, and has a KeyError for "MPO" itself.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def open_picture(path: Path, least: tuple[int, int] | None = None) -> Image.Image:
    """The picture in a file, turned upright (EXIF), with at most 8 bits a channel.

    With `least`, (width, height), a large JPEG is decoded at half, a quarter or an eighth of its size as long
    as it stays above that, which takes a fraction of the time.
    Raises UserError for a file that is missing, empty, no picture, damaged or above 64 megapixels.
    """
    too_large = UserError(f"{path} has more than {MAX_PIXELS // 2**20} megapixels; make it smaller")
    try:
        if not path.is_file():
            raise UserError(f"{path} is a folder; name the pictures in it" if path.is_dir() else
                            f"there is no picture {path}; check the name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes; we refuse them
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise too_large
                if least is not None:
                    image.draft(None, (max(least), max(least)))
                return _to_8_bits(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        cause = "it is none of a known kind" if unknown else type(error).__name__
        raise UserError(f"{path} cannot be read as a picture ({cause}); use a PNG or JPEG file") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pillow itself would cut off at 255. Stretched are only numbers of no known range: paper stays paper."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        scale = 257 if values.max() > 4095 else 16 if values.max() > 255 else 1  # of 16, 12 or 8 bits
        return Image.fromarray(np.uint8(values // scale))
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    low, high = values.min(), values.max()
    return Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-6)))


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in colour; transparent parts become white, grey ones three times the same."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_rgb(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture file as (3, H, W) uint8 of `size` (H, W): scaled to cover it, the rest cut off evenly.

    Raises UserError as `open_picture` does.
    """
    image = ImageOps.fit(to_rgb(open_picture(path, least=size[::-1])), size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)
