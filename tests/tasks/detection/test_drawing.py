"""Drawn boxes: pixels of the outline, and labels that do not cover each other."""

import itertools

import numpy as np
from PIL import Image

from mdistiller.tasks.detection.deployment import class_color, draw_boxes, place_labels


def test_the_outline_is_where_the_box_is():
    image = Image.new("RGB", (800, 400))
    drawn = draw_boxes(image, [(200, 120, 600, 320)], [""], [(255, 0, 0)])
    red = np.array(drawn)[:, :, 0] == 255
    assert red[120, 220:600].all()
    assert red[120:320, 200].all()
    assert red[120:321, 600].all()
    assert not red[130:310, 220:580].any()
    assert not red[:60].any()
    assert not np.array(image).any()


def test_a_small_image_is_enlarged_so_that_labels_leave_the_objects_visible():
    image = Image.new("RGB", (96, 64))
    drawn = draw_boxes(image, [(30, 20, 60, 50), (64, 20, 90, 50)], ["platelet 0.93"] * 2, [(255, 0, 0)] * 2)
    assert drawn.size == (480, 320)
    red = np.array(drawn)[:, :, 0] == 255
    assert red[100, 150:300].all()
    assert not red[105:245, 155:295].any()
    assert not red[105:245, 325:445].any()
    assert red[:100].any(), "labels above the boxes"


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
    assert places == [(10, 12), (10, 50), (10, 20)]


def test_colors_of_classes_differ():
    colors = np.array([class_color(k) for k in range(12)], float)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distance[~np.eye(12, dtype=bool)].min() > 30
