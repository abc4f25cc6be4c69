"""The offline protocol: what can be said of samples without any pretrained network.

A support vector classifier fitted to real images tells whether a sample shows the class that it
was asked for; the spread within a class and recall tell whether the samples differ among
themselves; the Frechet distance is taken on principal components of the pixels. Recall and
precision are ADM's, on the classifier's decision values, and for comparison on pixels. None of it
is comparable with an Inception FID, and it does not bear that name.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cat_ray.evaluation.distance import frechet_distance, moments
from cat_ray.evaluation.precision_recall import Balls

if TYPE_CHECKING:
    from sklearn.svm import SVC

HELD_OUT_SHARE = 0.2
REGULARISATION = 10.0
SHARPNESS = 2.0
COMPONENTS = 64


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images, in [-1, 1], `[N, d]` flat.

    Attributes:
        pixels: the real images.
        labels: their classes, `[N]`.
        classifier: fitted to four fifths of them.
        held_out_accuracy: of the classifier, on the other fifth.
        components: principal directions of the pixels, `[d, COMPONENTS]`.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classifier: "SVC"
    held_out_accuracy: float
    components: np.ndarray


def fit_reference(pixels: np.ndarray, labels: np.ndarray) -> Reference:
    """Fits the classifier and the components to real images `[N, d]` of classes `[N]`."""
    # Imported here: a worker that is to start fast must not wait for it.
    from sklearn.svm import SVC

    held_out = int(len(pixels) * HELD_OUT_SHARE)
    gamma = SHARPNESS / (pixels.shape[1] * pixels.var())
    classifier = SVC(C=REGULARISATION, gamma=gamma).fit(pixels[held_out:], labels[held_out:])
    accuracy = float(classifier.score(pixels[:held_out], labels[:held_out]))
    centred = pixels - pixels.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2]
    return Reference(pixels, labels, classifier, accuracy, directions[:COMPONENTS].T)


def measure(reference: Reference, samples: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The protocol's figures for samples `[M, d]` in [-1, 1] that were asked to be of `labels`.

    Returns:
        `class_accuracy`: share of samples in which the classifier finds the intended class;
        `within_class_spread`: per-pixel standard deviation within a class, as a ratio to the
        reals'; `recall` and `precision` (Kynkaanniemi et al., 3 neighbours, against as many reals
        as samples) on the classifier's decision values, and `recall_pixels` on pixels;
        `frechet_pixel_pca`; and the classifier's own `held_out_accuracy`.
    """
    real = reference.pixels[: len(samples)]
    decide = reference.classifier.decision_function
    real_features, features = decide(real), decide(samples)
    real_moments = moments(reference.pixels @ reference.components)
    spread = within_class_spread(samples, labels)
    return {
        "class_accuracy": float((reference.classifier.predict(samples) == labels).mean()),
        "within_class_spread": spread / within_class_spread(reference.pixels, reference.labels),
        "recall": coverage(real_features, features),
        "precision": coverage(features, real_features),
        "recall_pixels": coverage(real, samples),
        "frechet_pixel_pca": frechet_distance(
            real_moments, moments(samples @ reference.components)
        ),
        "held_out_accuracy": reference.held_out_accuracy,
    }


def within_class_spread(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviation of each pixel within each class, averaged over both."""
    return float(np.mean([pixels[labels == label].std(axis=0) for label in np.unique(labels)]))


def coverage(points: np.ndarray, manifold: np.ndarray) -> float:
    """Share of `points` inside a ball round a point of `manifold` that reaches its 3rd neighbour.

    With reals as points and fakes as the manifold this is recall, the other way round precision.
    """
    return Balls.round(torch.from_numpy(manifold)).share_inside(torch.from_numpy(points))
