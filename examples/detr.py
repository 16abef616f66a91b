"""RT-DETR of transformers, distilled at the levels of its encoder; needs `pip install '.[transformers]'`.

    mdistiller train small.teacher.rt_detr --plugin examples/detr.py --data.root DIR \
        --optim.name adamw --optim.lr 1e-4 --student.options weights PekingU/rtdetr_r50vd
    mdistiller train small.pkd.rt_detr --plugin examples/detr.py --data.root DIR \
        --optim.name adamw --optim.lr 1e-4 --teacher RUN_OF_ANY_DETECTOR

A transformer's queries stand for no place in the image, and which of them finds an object differs from model
to model. So logits and boxes have no rows that two detectors share, and methods that compare them are an
error; those that compare levels (pkd, fgd, mgd, fgfi, fitnet, reviewkd) need the encoder's maps only.

In Python, `Detr(RTDetrForObjectDetection.from_pretrained(…), size)` is a detector for `DetectionDistiller`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from mdistiller import DetectorAdapter, DetectorPass, Level, register_detector


class Detr(nn.Module):
    """An RTDetrForObjectDetection as a detector of torchvision's form, on images scaled to squares."""

    def __init__(self, detr, size):
        super().__init__()
        self.detr, self.size = detr, size
        self.detector_adapter = DetrAdapter

    def forward(self, images, targets=None):
        adapter = DetrAdapter(self)
        if self.training:
            return adapter.train(images, targets)[0]
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "ONNX cannot scale images; export the module `detr`, which takes squares"
            )
        out = self.detr(adapter.prepare(images).tensors)
        logits, boxes = out.logits.float(), box_convert(out.pred_boxes.float(), "cxcywh", "xyxy")
        # The best pairs of a query and a class, as many as there are queries, as in transformers.
        scores, pairs = logits.sigmoid().flatten(1).topk(logits.shape[1])
        queries, classes = pairs // logits.shape[2], pairs % logits.shape[2]
        found = []
        for i, image in enumerate(images):
            places = scaled(boxes[i, queries[i]], image.shape[2], image.shape[1])
            places = clip_boxes_to_image(places, image.shape[1:])
            found.append({"boxes": places, "labels": classes[i] + 1, "scores": scores[i]})
        return found


def scaled(boxes, x, y):
    """Boxes [N, 4] with their coordinates times `x` and `y`."""
    return boxes * boxes.new_tensor([x, y, x, y])


class DetrAdapter(DetectorAdapter):
    """Where distillation finds what it reads."""

    activation = None  # logits are of queries

    @property
    def levels(self):
        config = self.model.detr.config
        return {f"stride{s}": Level(s, config.encoder_hidden_dim) for s in config.feat_strides}

    def prepare(self, images):
        """Scales each image to the square that the detector takes, without normalisation."""
        size = (self.model.size, self.model.size)
        squares = [F.interpolate(i[None], size, mode="bilinear", antialias=True) for i in images]
        return ImageList(torch.cat(squares), [size] * len(images))

    def features(self, images):
        """The encoder's maps, as the decoder gets them; the decoder does not run."""
        detr, mask = self.model.detr.model, torch.ones_like(images.tensors[:, 0])
        maps = detr.backbone(images.tensors, mask)
        maps = [project(x) for project, (x, _) in zip(detr.encoder_input_proj, maps, strict=True)]
        return dict(zip(self.levels, detr.encoder(maps).last_hidden_state, strict=True))

    def train(self, images, targets):
        prepared, size = self.prepare(images), self.model.size
        objects = [
            scaled(target["boxes"], size / image.shape[2], size / image.shape[1])
            for image, target in zip(images, targets, strict=True)
        ]
        labels = [
            {"class_labels": target["labels"] - 1, "boxes": box_convert(boxes / size, "xyxy", "cxcywh")}
            for boxes, target in zip(objects, targets, strict=True)
        ]
        out = self.model.detr(prepared.tensors, labels=labels)
        losses = {}
        for name, value in out.loss_dict.items():  # loss_bbox, loss_bbox_aux_0, loss_bbox_dn_0, …
            kind = "_".join(name.split("_")[:2])
            losses[kind] = losses.get(kind, 0) + value
        maps = dict(zip(self.levels, out.encoder_last_hidden_state, strict=True))
        return losses, DetectorPass(
            images=prepared,
            features=maps,
            strides={name: level.stride for name, level in self.levels.items()},
            logits=None,
            labels=None,
            objects=objects,
            anchors=[self.squares(maps)] * len(images),
            per_position=(1,) * len(maps),
        )

    def squares(self, maps):
        """A square around each cell, four strides wide: by these, FGFI finds the cells near objects."""
        found = []
        for x, (stride, _) in zip(maps.values(), self.levels.values(), strict=True):
            rows, columns = ((torch.arange(n, device=x.device) + 0.5) * stride for n in x.shape[2:])
            centres = torch.cartesian_prod(rows, columns).flip(1)
            found.append(torch.cat([centres - 2 * stride, centres + 2 * stride], 1))
        return torch.cat(found)


@register_detector
def rt_detr(num_classes, weights=None, size=640, width=256, queries=300, decoder_layers=3):
    """RT-DETR of `weights`, a folder or a name on the Hub; or a new one, by default as large as its R18."""
    if weights is not None:
        options = {"num_labels": num_classes - 1, "ignore_mismatched_sizes": True}
        return Detr(RTDetrForObjectDetection.from_pretrained(weights, **options), size)
    channels = [width // 4, width // 2, width, 2 * width]
    backbone = RTDetrResNetConfig(
        embedding_size=width // 4,
        hidden_sizes=channels,
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        num_labels=num_classes - 1,
        num_queries=queries,
        d_model=width,
        encoder_hidden_dim=width,
        encoder_in_channels=channels[1:],
        encoder_ffn_dim=4 * width,
        decoder_in_channels=[width] * 3,
        decoder_ffn_dim=4 * width,
        decoder_layers=decoder_layers,
        hidden_expansion=0.5,
    )
    detr = RTDetrForObjectDetection(config)
    for module in detr.modules():
        if isinstance(module, nn.BatchNorm2d):  # transformers draws scales near 0, of which little is learned
            nn.init.ones_(module.weight)
    return Detr(detr, size)
