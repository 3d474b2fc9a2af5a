"""The commands index, search and serve."""

import re
from dataclasses import fields

import pytest

from lightning_contrast.cli import main
from lightning_contrast.export import export
from tests.served_models import SPEC, image_model, picture, towers


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        (tmp_path / "images" / "town").mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "images" / ("town" if number else "") / f"{number}.png")
    return tmp_path


@pytest.mark.slow
def test_index_and_search(folder, capsys):
    store, images = str(folder / "store"), folder / "images"
    (images / "broken.png").write_bytes(b"x")
    picture(1).save(images / "again.png")
    common = ["--model", str(towers()[0])]
    main(["index", store, str(images), *common, "--duplicates", "0.9999"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "5 images: 5 added, 0 changed, 0 removed, 1 unreadable, 0 unchanged"
    assert out[1].startswith("unreadable: broken.png: The file is not an image")
    assert out[2].endswith("again.png, town/1.png")
    main(["search", store, *common, "--image", str(images / "0.png"), "--k", "2"])
    assert re.fullmatch(r"1\.0000 0\.png\n-?0\.\d{4} \S+\n", capsys.readouterr().out)
    hits = main(["search", store, *common, "--words", "a cat", "--where", "folder = 'town'"])
    assert len(hits) == 3
    with pytest.raises(ValueError, match="one of --words"):
        main(["search", store, *common])
    with pytest.raises(ValueError, match="digest of the index"):
        main(["search", store, "--model", str(image_model()), "--words", "x"])


@pytest.mark.slow
def test_weights_of_a_file_make_an_index(folder, capsys):
    import lightning_contrast as lc

    network = lc.nn.build_backbone("small_convnet").module
    path = export(network, folder / "net.pt", input_spec=SPEC)
    main(["index", str(folder / "store"), str(folder / "images"), "--model", str(path)])
    main(["index", str(folder / "store"), str(folder / "images"), "--model", str(path), "--verify", "true"])
    assert "4 images: 0 added, 0 changed, 0 removed, 0 unreadable, 4 unchanged" in capsys.readouterr().out


@pytest.mark.slow
def test_serve_and_the_page(folder, monkeypatch):
    from lightning_contrast import serving

    served = []
    monkeypatch.setattr(serving, "serve", lambda app, **options: served.append((app.title, options)))
    main(["serve", str(image_model()), "--port", "0", "--limits.max_images", "3"])
    main(["index", str(folder / "store"), str(folder / "images"), "--model", str(image_model())])
    main(["search", str(folder / "store"), "--model", str(image_model()), "--page", "true"])
    local = {"host": "127.0.0.1"}
    assert served == [("Similarity service", local | {"port": 0}), ("Image search", local | {"port": 8000})]


def test_every_limit_is_an_option(monkeypatch):
    from lightning_contrast import serving

    made = []
    monkeypatch.setattr(serving, "create_app", lambda model, **options: made.append(options))
    monkeypatch.setattr(serving, "serve", lambda app, **options: None)
    limits = {each.name: place + 1 for place, each in enumerate(fields(serving.Limits))}
    main(["serve", "net.onnx", *(f"--limits.{name}={value}" for name, value in limits.items()), "--max_batch=3"])
    main(["serve", "net.onnx", "--max_delay=0.5", "--threads=2"])
    assert made == [
        {"limits": serving.Limits(**limits), "max_batch": 3, "max_delay": 0.002, "threads": None},
        {"limits": serving.Limits(), "max_batch": 16, "max_delay": 0.5, "threads": 2},
    ]


def test_bad_input_leaves_no_index(folder):
    arguments = ["index", str(folder / "store"), str(folder / "images"), "--model", str(image_model())]
    for option in ("--batch_size=0", "--duplicates=2"):
        with pytest.raises(ValueError, match=option.partition("=")[0][2:]):
            main([*arguments, option])
    assert not (folder / "store").exists()
