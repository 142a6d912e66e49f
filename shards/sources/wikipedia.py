"""Wikipedia (Rasiwasia et al., ACM MM 2010): 2,866 precomputed image and text features in 10 classes.

Reads a folder with raw_features.mat (I_tr, I_te: SIFT bag of words, 128; T_tr, T_te: LDA topics, 10), categories.list,
and trainset_txt_img_cat.list and testset_txt_img_cat.list (text id, image id, class 1-10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmgan_dist.errors import BadInput, shown
from shards.pack import BuildCommand
from shards.pairs import RawPair, RawPairs, hash_split, make_key
from shards.partitions import Partitions
from shards.sources.flickr8k import read_lines

ATTRIBUTION = (
    "Wikipedia features: N. Rasiwasia et al., A New Approach to Cross-Modal Multimedia Retrieval, ACM MM 2010. "
    "The data come without a licence: use them for research and do not distribute these shards."
)
VAL_SHARE = 0.1
DAMAGED: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
DAMAGED += (RuntimeError, OSError, EOFError, MemoryError, zlib.error, struct.error)
"""What scipy makes of the bytes of a damaged .mat file; its own MatReadError is a plain Exception."""


@dataclass(kw_only=True)
class WikipediaCommand(BuildCommand):
    """Pack the Wikipedia features: image [128] and text [10] float arrays, 10 classes.

    The test split is the published one; a tenth of the training set, by a hash of the text id, is the val split."""

    input: Path = Path("../shared/data/wikipedia_features")
    """Folder with raw_features.mat and the three lists."""

    def pairs(self, rows: Partitions) -> RawPairs:
        """Put in the rows of both parts. Raises BadInput when a file is missing or does not fit the others."""
        classes = [line.strip() for _, line in read_lines(self.input / "categories.list")]
        arrays = _load_arrays(self.input / "raw_features.mat")
        lines = {}
        for part, name in (("tr", "train"), ("te", "test")):
            path = self.input / f"{name}set_txt_img_cat.list"
            lines[part] = [line.split("\t") for _, line in read_lines(path)]
            if any(len(row) != 3 or not row[2].strip().isdigit() for row in lines[part]):
                raise BadInput(f"{path} has a line that is not 'text id, image id, class number' with tabs between")
            if not len(lines[part]) == len(arrays[f"I_{part}"]) == len(arrays[f"T_{part}"]):
                raise BadInput(f"{path} has {len(lines[part])} lines but raw_features.mat another number of rows")

        leaked = {row.tobytes() for row in arrays["I_tr"]} & {row.tobytes() for row in arrays["I_te"]}

        def raw_pairs() -> Iterator[RawPair]:
            first_id: dict[bytes, str] = {}  # training rows with equal image features stay in one split
            index = 0
            for part in ("tr", "te"):
                for i, (text_id, _, label) in enumerate(lines[part]):
                    image = arrays[f"I_{part}"][i]
                    hashed_id = first_id.setdefault(image.tobytes(), text_id)
                    split = "test" if part == "te" else hash_split(hashed_id, val=VAL_SHARE, test=0)
                    yield RawPair(
                        key=make_key(f"{text_id}-{index:04d}"),
                        split=split,
                        image=image,
                        texts=arrays[f"T_{part}"][i],
                        labels=(int(label) - 1,),
                        where=f"line {i + 1} of {'train' if part == 'tr' else 'test'}set_txt_img_cat.list",
                    )
                    index += 1

        rows.add_all(raw_pairs())
        return RawPairs(
            name="wikipedia",
            label_kind="single",
            classes=classes,
            attribution=ATTRIBUTION,
            details={"source": "wikipedia", "val_share": VAL_SHARE},
            expected_splits=("train", "val", "test"),
            notes=[f"{len(leaked)} images of the published test set are in its training set too; they are kept"],
        )


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damaged: tuple[type[Exception], ...] = (MatReadError, *DAMAGED)

    try:
        arrays = loadmat(path, variable_names=["I_tr", "I_te", "T_tr", "T_te"])
        return {name: arrays[name].astype(np.float32) for name in ("I_tr", "I_te", "T_tr", "T_te")}
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: name the folder that holds it with --input") from None
    except KeyError as error:
        raise BadInput(f"{path} has no array {error}") from None
    except NotImplementedError:
        raise BadInput(f"{path} is of MATLAB 7.3, which is not read: save it as version 7 (save -v7)") from None
    except damaged as error:
        raise BadInput(f"{path} is damaged or not a MATLAB file ({shown(repr(error))}): restore it") from None
