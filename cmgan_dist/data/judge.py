"""Whether a sample is one that its data set can use.

Indexing, verifying, features, training and evaluation all ask here, and `image.decode_image` and `image.check_image`
whether its picture decodes, so that they find the same samples bad, with the same reasons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cmgan_dist.data.manifest import DataSpec, Manifest
from cmgan_dist.data.sample import BadLabel, Sample, parse_sample
from cmgan_dist.errors import BadSample, shown


@dataclass(frozen=True)
class Judge:
    """What a data set says of each of its samples."""

    label_kind: str
    """single, multi or none (LabelKind); with none, what samples say of labels is ignored."""
    classes: int
    """C."""
    image_dim: int | None
    """F_i of image features; None for encoded images."""
    text_dim: int | None
    """F_t of text features; None for texts."""
    names: tuple[str, ...] = ()
    """The classes' names, which labels may be."""

    @classmethod
    def of(cls, data: Manifest | DataSpec) -> Judge:
        """Return the judge of a data set's samples."""
        return cls(data.label_kind, len(data.classes), data.image_dim, data.text_dim, tuple(data.classes))

    @property
    def labelled(self) -> bool:
        """Whether samples have labels."""
        return self.label_kind != "none"

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number_of(self, name: str) -> int:
        """Return the index of the class of that name. Raises BadLabel where there is none."""
        number = self._numbers.get(name)
        if number is None:
            raise BadLabel(f"label '{shown(name[:60])}' is none of the {self.classes} classes")
        return number

    def read(self, key: str, members: dict[str, bytes]) -> Sample:
        """Return the sample of the members (extension -> bytes), whose picture is not decoded.

        Raises BadSample when it cannot be used, or is not as the data set says."""
        sample = parse_sample(key, members, labelled=self.labelled, number_of=self.number_of)
        self.check(sample)
        return sample

    def check(self, sample: Sample) -> None:
        """Raise BadSample when a sample is not as the data set says."""
        _check_dim("image", None if isinstance(sample.image, bytes) else len(sample.image), self.image_dim)
        _check_dim("text", sample.texts.shape[1] if isinstance(sample.texts, np.ndarray) else None, self.text_dim)
        if self.labelled:
            self.check_labels(sample.labels)

    def check_labels(self, labels: tuple[int, ...]) -> None:
        """Raise BadSample when these are no labels for a sample of the data set."""
        if not labels:
            raise BadSample("has no label")
        if self.label_kind == "single" and len(labels) > 1:
            raise BadSample(f"has {len(labels)} labels, expected one")
        wrong = next((label for label in labels if not 0 <= label < self.classes), None)
        if wrong is not None:
            raise BadSample(f"label {wrong} is out of range, there are {self.classes} classes")


def _check_dim(what: str, found: int | None, expected: int | None) -> None:
    if found != expected:
        kinds = ["not features" if dim is None else f"features of size {dim}" for dim in (found, expected)]
        raise BadSample(f"its {what} is {kinds[0]}, the manifest says {kinds[1]}")
