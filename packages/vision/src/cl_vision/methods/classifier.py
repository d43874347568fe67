"""An encoder and a linear classifier, trained with labels: from scratch, or from what another method has learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core.method import Method
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_encoder, check_labels

if TYPE_CHECKING:
    from cl_vision.data import Views


class Classifier(Method):
    """Cross entropy of a linear layer on the encoder, over one or more random views of labelled images.

    With scores s = W encoder(view) + b of V views of N images and labels y, the loss is

        1 / (V N) sum_v sum_i -log softmax(s_vi)[y_i]

    Fine-tuning starts from a trained run, of which the encoder fits by name:

        cl-vision fit --config finetune/digits --init_from RUN

    Args:
        encoder: what is trained and kept. Its attribute ``lr_scale`` is set, or its parameters are held still.
        num_classes: classes of the labels.
        encoder_lr_scale: rate of the encoder as a multiple of the classifier's, at least 0. With 0 the encoder stays as
            it is, batch statistics included: a linear evaluation with augmented images.
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1].
    """

    def __init__(
        self, encoder: Encoder, num_classes: int, encoder_lr_scale: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        _checks.count("num_classes", num_classes, at_least=2)
        _checks.number("encoder_lr_scale", encoder_lr_scale, at_least=0)
        _checks.number("label_smoothing", label_smoothing, at_least=0)
        if label_smoothing > 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}.")
        self.encoder, self.num_classes = encoder, num_classes
        self.encoder_lr_scale, self.label_smoothing = encoder_lr_scale, label_smoothing
        self.head = nn.Linear(encoder.dim, num_classes)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        if encoder_lr_scale == 0:
            encoder.requires_grad_(False)
        else:
            encoder.lr_scale = encoder_lr_scale
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode of all but an encoder that is held still."""
        super().train(mode)
        if self.encoder_lr_scale == 0:
            self.encoder.eval()
        return self

    def loss(self, batch: Views) -> dict[str, Tensor]:
        """Loss and accuracy of one or more views with their labels, scalars."""
        if not batch.views:
            raise ValueError(
                "Classifier needs a batch of at least 1 view, got none: pass --data.num_views 1."
            )
        check_labels(self, batch.labels, self.num_classes)
        scores = torch.cat([self.classify(view) for view in batch.views])
        labels = batch.labels.repeat(len(batch.views))
        right = (scores.detach().argmax(dim=1) == labels).float()
        return {"loss": self.criterion(scores, labels), "accuracy": right.mean()}

    def classify(self, images: Tensor) -> Tensor:
        """Scores of images (N, C, H, W) for every class, shape (N, num_classes)."""
        return self.head(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)
