"""Drawn boxes: pixels of the outline, and labels that do not cover each other."""

import itertools

import numpy as np
from PIL import Image

from mdistiller.tasks.detection.drawing import class_colour, draw_boxes, place_labels


def test_the_outline_is_where_the_box_is():
    image = Image.new("RGB", (200, 100))
    drawn = draw_boxes(image, [(50, 30, 150, 80)], [""], [(255, 0, 0)])
    red = np.array(drawn)[:, :, 0] == 255
    assert red[30, 60:150].all()
    assert red[30:80, 50].all()
    assert red[30:81, 150].all()
    assert not red[35:75, 60:140].any()
    assert not red[:15].any()
    assert not np.array(image).any()


def test_labels_of_a_dense_image_do_not_overlap():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 80, (60, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 40, (60, 2))], 1).tolist()
    places = place_labels(boxes, [25.0] * 60, 8.0, (120, 120))
    found = [p for p in places if p is not None]
    assert 15 < len(found) < 60
    assert places[0] is not None  # the likeliest chooses first
    for (x, y), (u, v) in itertools.combinations(found, 2):
        assert abs(x - u) >= 25 or abs(y - v) >= 8
    assert all(0 <= x <= 95 and 0 <= y <= 112 for x, y in found)


def test_a_label_goes_below_a_box_whose_top_is_taken():
    places = place_labels([(10, 20, 60, 50), (10, 20, 60, 50), (10, 20, 60, 50)], [40] * 3, 8, (100, 100))
    assert places == [(10, 12), (10, 20), (10, 50)]


def test_colours_of_classes_differ():
    colours = np.array([class_colour(k) for k in range(12)], float)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1)
    assert distance[~np.eye(12, dtype=bool)].min() > 30
