"""Draw views of every domain's policy, of images that `domain_images` makes: one row for each policy."""

import argparse
from pathlib import Path

import torch
from domain_images import EDGE, brains, cells, chests, fields, plates, slices, tiles
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor

from lightning_contrast.augment import domains
from lightning_contrast.callbacks.visualization.images import Display, Row, Tile, grid

VIEWS = 5
SEED = 2


def drawn(count: int, kind: str) -> torch.Tensor:
    """Roads ("road"), birds ("bird") or pages ("page"), drawn with random colors and places; RGB."""
    made = []
    for _ in range(count):
        r = torch.randint(0, 256, (24,)).tolist()
        draw = ImageDraw.Draw(image := Image.new("RGB", (EDGE, EDGE), "white"))
        if kind == "road":
            draw.rectangle((0, 0, 96, 45), fill=(130, 170, 220))
            draw.rectangle((0, 45, 96, 96), fill=(80, 120, 60))
            draw.polygon([(44, 45), (52, 45), (92, 96), (4, 96)], fill=(90, 90, 95))
            x, y = 16 + r[0] // 8, 52 + r[1] // 16
            draw.rectangle((x, y, x + 26, y + 16), fill=(r[2], r[3] // 2, r[4] // 2))
        elif kind == "bird":
            draw.rectangle((0, 0, 96, 96), fill=(190, 210, 190))
            draw.ellipse((18, 34, 74, 78), fill=(r[0] // 2 + 60, r[1] // 2 + 40, 60))
            draw.ellipse((56, 18, 86, 48), fill=(r[0] // 2 + 90, r[1] // 2 + 40, 60))
            draw.ellipse((70, 27, 76, 33), fill="black")
            for k in range(24, 48, 7):
                draw.arc((k, 44, k + 20, 70), 60, 300, fill=(r[2] // 2, 40, r[3] // 2), width=2)
        else:
            for line in range(8):
                text = "".join(chr(97 + (r[k] + 7 * line) % 26) if (k + line) % 6 else " " for k in range(14))
                draw.text((6, 4 + 11 * line), text, fill=(20, 20, 40))
        made.append(pil_to_tensor(image))
    return torch.stack(made)


torch.manual_seed(SEED)
WEATHER = dict.fromkeys(("rain", "snow", "fog", "flare", "motion"), 0.3)
RGB, FALSE_COLORS = [0, 1, 2], [3, 2, 1]
SATELLITE = domains.satellite_views(EDGE, channels=4, scale=(0, 10_000), clouds=0.5)
ROWS = [  # name, policy, images, the channels shown as red, green and blue
    ("histology", domains.histology_views(EDGE), tiles(1), RGB),
    ("satellite,\nclouds on", SATELLITE, fields(1), FALSE_COLORS),
    ("chest X-ray", domains.chest_xray_views(EDGE), chests(1), [0]),
    ("CT, lung\nwindow", domains.ct_views(EDGE, window="lung"), slices(1), [0]),
    ("MRI", domains.mri_views(EDGE), brains(1), [0]),
    ("microscopy,\n3 of 5\nchannels", domains.microscopy_views(EDGE, drop=0.3), cells(1), [1, 2, 0]),
    ("industrial", domains.industrial_views(EDGE), plates(1), RGB),
    ("synthetic\ndefects", domains.SyntheticDefects(p=1.0), plates(1), RGB),
    ("driving, more\nweather", domains.driving_views(EDGE, **WEATHER), drawn(1, "road"), RGB),
    ("fine-grained", domains.fine_grained_views(EDGE), drawn(1, "bird"), RGB),
    ("documents", domains.document_views(EDGE), drawn(1, "page"), RGB),
]


def row(name: str, policy: torch.nn.Module, images: torch.Tensor, channels: list[int]) -> Row:
    """Return tiles of the image as in an evaluation, and of views of it."""
    copies = images.expand(VIEWS, -1, -1, -1)
    if isinstance(policy, domains.SyntheticDefects):
        first, views = images, policy(copies).images
    else:
        first, views = policy.eval_transform(images), policy(copies)[0]
    shown = torch.cat([first, views])[:, channels]
    return Row([Tile(tile) for tile in Display().pixels(shown)], name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("domains.png"))
    picture = grid([row(*each) for each in ROWS], ["image", *(f"view {n}" for n in range(1, VIEWS + 1))], EDGE)
    picture.quantize(256, kmeans=2).save(parser.parse_args().output, optimize=True)
