"""The routes of the search page without a browser."""

import pytest
from fastapi.testclient import TestClient

from lightning_contrast.search import ImageIndex, create_search_app
from lightning_contrast.serving import Limits
from tests.served_models import encoded, image_model, picture


@pytest.fixture
def index(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.bmp")
    made = ImageIndex(tmp_path / "store", image_model(), tmp_path / "images")
    made.update()
    return made


def test_a_query_keeps_the_limit_of_pixels(index):
    with TestClient(create_search_app(index, limits=Limits(max_pixels=1300))) as client:
        hits = client.post("/search", files={"image": encoded(picture(1))}).json()["hits"]
        assert hits[0]["path"] == "1.bmp"
        answer = client.post("/search", files={"image": encoded(picture(1, size=(30, 50)))})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_pixels")


def test_a_file_that_changed_is_not_served_under_its_old_digest(index):
    (hit,) = index.search(index.folder / "1.bmp", 1)
    with TestClient(create_search_app(index)) as client:
        assert client.get(f"/images/{hit.digest}").status_code == 200
        picture(7).save(index.folder / hit.path)
        for answer in (client.get(f"/images/{hit.digest}"), client.post("/search", data={"digest": hit.digest})):
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == "The file has changed; update the index."


def test_metrics_are_of_requests(index):
    with TestClient(create_search_app(index)) as client:
        assert client.get("/health").json() == {"status": "ok"}
        text = client.get("/metrics").text
    assert "http_requests" in text
    assert "images_at_work" not in text
