"""Figures of captions and images that find each other, and of reconstructions."""

import pytest
import torch

from lightning_contrast.evaluation import caption_strips, reconstruction_grid


def test_the_hits_of_both_directions_are_marked():
    similarity = torch.eye(6)
    similarity[1] = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.6, 0.5])  # text 1 does not find its image among five
    images, captions = torch.zeros(6, 3, 4, 4, dtype=torch.uint8), [f"text {i}" for i in range(6)]
    figure = caption_strips(images, captions, similarity, [0, 1])
    framed = [[spine.get_visible() for spine in axes.spines.values()] for axes in figure.axes]
    assert len(framed) == 12  # five images and the counterpart per row
    assert framed[0] == [True] * 4  # text 0 finds image 0 first
    assert not any(any(frame) for frame in framed[1:])
    green = [text.get_text() for text in figure.texts if text.get_color() == "green"]
    assert [text for text in green if "text 0" in text]
    assert sum("text 1" in text.get_text() for text in figure.texts) >= 1


def test_the_shape_of_the_similarity_is_checked():
    with pytest.raises(ValueError, match="`similarity` must have one row per text"):
        caption_strips(torch.zeros(2, 3, 4, 4), ["a", "b"], torch.zeros(2, 3), [0])


def test_hidden_patches_are_gray_and_statistics_are_undone():
    images, filled = torch.full((2, 3, 4, 8), 1.0), torch.full((2, 3, 4, 8), -1.0)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, 5] = True
    figure = reconstruction_grid(images, filled, mask, mean=(0.5,) * 3, std=(0.25,) * 3)
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    assert len(drawn) == 6
    assert (drawn[0] == 0.75).all()
    assert (drawn[1] == 0.75).all()
    assert (drawn[2] == 0.25).all()
    assert (drawn[4][2:, 2:4] == 0.5).all()
    assert (drawn[4] == 0.5).sum() == 3 * 4
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "visible", "filled"]


@pytest.mark.parametrize("patches", [7, 64])
def test_the_mask_of_a_reconstruction_is_checked(patches):
    images = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"`mask` must be \(2, patches\) of square patches"):
        reconstruction_grid(images, images, torch.zeros(2, patches, dtype=torch.bool))
    with pytest.raises(ValueError, match="`filled` must have the shape of the images"):
        reconstruction_grid(images, images[:1], torch.zeros(2, 8, dtype=torch.bool))
