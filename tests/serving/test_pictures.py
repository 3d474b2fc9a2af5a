"""Image files of every kind: the right vector, or a status 4xx with a reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from lightning_contrast.data import read_rgb
from lightning_contrast.serving import Limits, RefusedImageError, create_app, decode_image
from tests.served_models import encoded, expected, image_model, picture
from tests.tolerances import FORMULA, f32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Palette images with Transparency")
CODES = {413: {"too_many_pixels", "file_too_large"}, 415: {"not_an_image", "unsupported_pixels"}}
CODES[422] = {"damaged_image", "empty_image", "too_elongated", "invalid_request"}


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(image_model(), threads=1, max_delay=0, limits=Limits(max_pixels=200_000))) as made:
        yield made


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(header, rows, more=b""):
    """Return a PNG file of given header values, rows of bytes, and chunks before them."""
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *header))
        + more
        + chunk(b"IDAT", packed)
        + (chunk(b"IEND", b""))
    )


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def alpha():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FRAMES = [picture(seed) for seed in range(3)]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:], "duration": 50}
FILES = {
    "png": encoded(picture()),
    "jpeg": encoded(picture(), "JPEG"),
    "progressive jpeg": encoded(picture(), "JPEG", progressive=True),
    "webp": encoded(picture(), "WEBP"),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "cmyk jpeg": encoded(picture().convert("CMYK"), "JPEG"),
    "cmyk tiff": encoded(picture().convert("CMYK"), "TIFF"),
    "gray": encoded(picture().convert("L")),
    "two colors": encoded(picture().convert("1")),
    "palette": encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=17)),
    "palette with transparency": encoded(picture().quantize(9), transparency=bytes([0, 40, 90, 200, 255])),
    "alpha": encoded(alpha()),
    "gray with alpha": encoded(alpha().convert("LA")),
    "animated gif": encoded(FRAMES[0].convert("P"), "GIF", **ANIMATED),
    "animated png": encoded(FRAMES[0], "PNG", **ANIMATED),
    "animated webp": encoded(FRAMES[0], "WEBP", **ANIMATED),
    "16-bit rgb": png((7, 5, 16, 2, 0, 0, 0), [bytes(range(row, row + 42)) for row in range(5)]),
    "one pixel": encoded(picture(size=(1, 1))),
}
FILES |= {f"turned {n}": encoded(picture(), "JPEG", quality=95, exif=with_orientation(n)) for n in range(1, 9)}


def post(client, data, name="x"):
    return client.post("/embed", files={"image": (name, data)})


@pytest.mark.parametrize("kind", FILES)
def test_the_vector_is_that_of_the_decoded_image(client, kind):
    answer = post(client, FILES[kind])
    assert answer.status_code == 200, answer.text
    found = torch.tensor(answer.json()["embedding"])
    torch.testing.assert_close(found, torch.tensor(expected(read_rgb(io.BytesIO(FILES[kind])))), **f32(FORMULA))


def test_pixels_are_those_of_pillow_and_upright():
    """Against Pillow's own functions, since the test above compares two uses of one reader."""
    from PIL import ImageOps

    for kind, data in FILES.items():
        image = Image.open(io.BytesIO(data))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), np.asarray(upright)), kind
    shapes = {tuple(decode_image(FILES[f"turned {n}"]).shape[1:]) for n in (1, 6)}
    assert shapes == {(30, 40), (40, 30)}
    first = decode_image(FILES["animated png"]).permute(1, 2, 0).numpy()
    assert np.array_equal(first, np.asarray(FRAMES[0]))


REFUSED = {
    "nothing": (b"", 422, "empty_image"),
    "text": (b"not an image", 415, "not_an_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not_an_image"),
    "truncated": (FILES["png"][:-40], 422, "damaged_image"),
    "16-bit gray": (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16))), 415, "unsupported_pixels"),
    "floats": (encoded(Image.new("F", (9, 9)), "TIFF"), 415, "unsupported_pixels"),
    "bomb": (png((60_000, 60_000, 8, 2, 0, 0, 0), [b""]), 413, "too_many_pixels"),
    "more pixels than allowed": (encoded(Image.new("1", (501, 400))), 413, "too_many_pixels"),
    "elongated": (encoded(Image.new("L", (1, 5000))), 422, "too_elongated"),
    "text that is a bomb": (
        png((4, 4, 8, 0, 0, 0, 0), [b"abcd"] * 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**25)))),
        415,
        "not_an_image",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_reason(client, kind):
    data, status, code = REFUSED[kind]
    answer = post(client, data)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert len(answer.json()["error"]["message"]) > 10
    assert answer.json()["error"]["field"] == "image"


def test_an_elongated_image_would_need_more_pixels_than_allowed():
    """1 x 5,000 pixels cover 20 x 24 pixels only as 24 x 120,000."""
    line = encoded(Image.new("L", (1, 5000)))
    assert decode_image(line).shape == (3, 5000, 1)
    with pytest.raises(RefusedImageError, match="elongated"):
        decode_image(line, size=(20, 24), max_pixels=24 * 120_000 - 1)
    assert decode_image(line, size=(20, 24), max_pixels=24 * 120_000 + 1).shape == (3, 5000, 1)


def broken_files(count):
    """Yield files that are truncated, changed in some bytes, joined from two, or random."""
    chance, kinds = random.Random(0), list(FILES.values())
    for number in range(count):
        data = bytearray(chance.choice(kinds))
        if number % 4 == 0:
            del data[chance.randrange(len(data)) :]
        elif number % 4 == 1:
            for _ in range(chance.choice((1, 3, 20))):
                data[chance.randrange(len(data))] = chance.randrange(256)
        elif number % 4 == 2:  # headers: sizes, numbers of frames, offsets
            data[4 : 4 + 2 * chance.randrange(1, 16)] = chance.randbytes(2 * chance.randrange(1, 16))
        else:
            cut = chance.randrange(4, 60)
            data = data[:cut] + chance.choice(kinds)[cut:] if number % 8 == 3 else data[:cut] + chance.randbytes(300)
        yield bytes(data)


@pytest.mark.slow
def test_500_broken_uploads(client):
    """None crashes the service: each gets the vector of its pixels, or a reason."""
    seen = {}
    for number, data in enumerate(broken_files(500)):
        answer = post(client, data, name="../" * number + "/etc/passwd")
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        if answer.status_code == 200:
            found = torch.tensor(answer.json()["embedding"])
            torch.testing.assert_close(found, torch.tensor(expected(read_rgb(io.BytesIO(data)))), **f32(FORMULA))
        else:
            assert answer.json()["error"]["code"] in CODES[answer.status_code], answer.text
    assert seen[200] > 20
    assert seen[415] > 20
    assert seen[422] > 100
    assert post(client, FILES["png"]).status_code == 200  # it still works
