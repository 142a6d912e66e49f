"""The contestants of bench/stream.py: this stream and its peers, each giving batches of the same shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.stream_data import BATCH, FEATURE_BATCH, count
from bench.stream_decoders import CROP_AREA, CROP_RATIO, SIZE, decoder, planes, transform
from cmgan_dist.config.fields import StreamConfig

if TYPE_CHECKING:  # torch takes seconds to import, and --help waits
    from torch import Tensor

RESUME_AT = 0.9
Batches = Iterator[tuple["Tensor", list[str]]]
"""uint8 [64, 3, 224, 224] and the keys (empty where a shuffled loader gives none)."""


class Ours:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        from cmgan_dist.data.stream import Stream

        self.stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH, augment=train), seed=0)

    def batches(self) -> Batches:
        for batch in itertools.islice(self.stream.batches(0), self.stream.epoch_samples // BATCH):
            assert not batch.bad, batch.bad
            yield batch.image[..., :3].movedim(-1, 1), batch.keys

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        from cmgan_dist.data.stream import Stream

        def first() -> object:
            stream = Stream(str(place / "shards"), StreamConfig(global_batch=BATCH), seed=0)
            return next(stream.batches(int(RESUME_AT * stream.epoch_samples) // BATCH * BATCH))

        return first


def _record(sample: dict[str, Any]) -> tuple[Tensor, str]:
    return sample["jpg"], sample["__key__"]


class WebDataset:
    def __init__(self, place: Path, how: str, train: bool, skip: int = 0) -> None:
        wds: Any = import_module("webdataset")
        tars = sorted(str(p) for p in (place / "shards").glob("*.tar"))
        change, decode = transform(train), decoder(how, train)
        to_tensor = import_module("torchvision.transforms.v2.functional").pil_to_tensor
        data = wds.WebDataset(tars, shardshuffle=len(tars) if train else False, seed=0)
        data = data.slice(skip, None) if skip else data
        data = data.shuffle(1000) if train else data
        if how == "PIL":
            data = data.decode("pil").map_dict(jpg=lambda image: to_tensor(change(image)))
        else:
            data = data.decode(wds.handle_extension("jpg", decode))
        self.loader = wds.WebLoader(data.map(_record), batch_size=BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, keys in self.loader:
            yield planes(image), list(keys)

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        samples = int(RESUME_AT * count(place)) // BATCH * BATCH
        return lambda: next(WebDataset(place, "torchvision", train=True, skip=samples).batches())


class Mosaicml:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        streaming: Any = import_module("streaming")
        decode = decoder(how, train)

        class Decoded(streaming.StreamingDataset):
            def __getitem__(self, at: int) -> tuple[Tensor, str]:
                sample = super().__getitem__(at)
                return decode(sample["image"]), sample["key"]

        self.data = Decoded(local=str(place / "mds"), shuffle=train, batch_size=BATCH, num_canonical_nodes=1)
        self.loader = streaming.StreamingDataLoader(self.data, batch_size=BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, keys in self.loader:
            yield image, list(keys)

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        before = Mosaicml(place, "torchvision", train=True)
        for _ in itertools.islice(before.loader, int(RESUME_AT * count(place)) // BATCH):
            pass
        state = before.loader.state_dict()
        del before
        import_module("streaming.base.util").clean_stale_shared_memory()

        def first() -> object:
            again = Mosaicml(place, "torchvision", train=True)
            again.loader.load_state_dict(state)
            return next(iter(again.loader))

        return first


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class ImageFolder:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        import torch

        tv: Any = import_module("torchvision")
        change = transform(train)

        def load(path: str) -> Tensor:
            tensor: Tensor = tv.io.decode_image(path, mode=tv.io.ImageReadMode.RGB)
            return tensor

        if how == "PIL":
            to_tensor = tv.transforms.v2.PILToTensor()
            self.data = tv.datasets.ImageFolder(place / "folder", tv.transforms.v2.Compose([change, to_tensor]))
        elif how == "torchvision":
            self.data = tv.datasets.ImageFolder(place / "folder", change, loader=load)
        else:
            self.data = tv.datasets.ImageFolder(place / "folder", decoder(how, train), loader=read_bytes)
        self.shuffled = train
        self.loader = torch.utils.data.DataLoader(
            self.data, BATCH, shuffle=train, drop_last=True, generator=torch.Generator().manual_seed(0)
        )

    def batches(self) -> Batches:
        keys = [Path(path).stem for path, _ in self.data.samples]
        for i, (image, _) in enumerate(self.loader):
            yield planes(image), [] if self.shuffled else keys[i * BATCH : (i + 1) * BATCH]

    @staticmethod
    def resume(place: Path) -> Callable[[], object]:
        batches = int(RESUME_AT * count(place)) // BATCH
        return lambda: next(itertools.islice(ImageFolder(place, "torchvision", True).batches(), batches, None))


class Dali:
    """NVIDIA's pipeline on CPU: decodes the crop only, INTERP_LINEAR without antialiasing is its fastest."""

    def __init__(self, place: Path, how: str, train: bool) -> None:
        fn: Any = import_module("nvidia.dali.fn")
        types: Any = import_module("nvidia.dali.types")
        self.files = sorted(str(path) for path in (place / "folder" / "all").iterdir())
        self.pipeline = import_module("nvidia.dali").Pipeline(BATCH, num_threads=1, device_id=None, seed=0)
        way = {"interp_type": types.INTERP_LINEAR, "antialias": False}
        with self.pipeline:
            numbers = list(range(len(self.files)))
            data, label = fn.readers.file(files=self.files, labels=numbers, random_shuffle=train, name="files")
            if train:
                crop = {"random_area": CROP_AREA, "random_aspect_ratio": CROP_RATIO}
                image = fn.decoders.image_random_crop(data, output_type=types.RGB, **crop)
                image = fn.flip(fn.resize(image, size=[SIZE, SIZE], **way), horizontal=fn.random.coin_flip())
            else:
                image = fn.resize(fn.decoders.image(data, output_type=types.RGB), resize_shorter=SIZE, **way)
                image = fn.crop(image, crop=(SIZE, SIZE))
            self.pipeline.set_outputs(image, label)
        self.pipeline.build()

    def batches(self) -> Batches:
        import torch

        for _ in range(len(self.files) // BATCH):
            image, label = self.pipeline.run()
            keys = [Path(self.files[i]).stem for i in np.asarray(label.as_array()).ravel()]
            yield planes(torch.from_numpy(image.as_array().copy())), keys


CONTESTANTS: dict[str, tuple[Any, str]] = {
    "ours": (Ours, ""),
    "webdataset + PIL": (WebDataset, "PIL"),
    "webdataset + torchvision": (WebDataset, "torchvision"),
    "webdataset + OpenCV": (WebDataset, "OpenCV"),
    "mosaicml + PIL": (Mosaicml, "PIL"),
    "mosaicml + torchvision": (Mosaicml, "torchvision"),
    "ImageFolder + PIL": (ImageFolder, "PIL"),
    "ImageFolder + torchvision": (ImageFolder, "torchvision"),
    "ImageFolder + OpenCV": (ImageFolder, "OpenCV"),
    "ImageFolder + OpenCV area": (ImageFolder, "OpenCV area"),
    "ImageFolder + kornia_rs": (ImageFolder, "kornia_rs"),
    "DALI": (Dali, ""),
}
NEEDS = {"mosaicml": ("mosaicml-streaming", "streaming"), "DALI": ("nvidia-dali-cuda130", "nvidia.dali")} | {
    "ImageFolder + kornia_rs": ("kornia_rs", "kornia_rs")
}
"""Start of a contestant's name -> the package that it needs, which is no dependency of this project, and its module."""


class OurFeatures:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        from cmgan_dist.data.stream import Stream

        self.stream = Stream(str(place / "shards"), StreamConfig(global_batch=FEATURE_BATCH), seed=0)

    def batches(self) -> Batches:
        for batch in itertools.islice(self.stream.batches(0), self.stream.epoch_samples // FEATURE_BATCH):
            assert not batch.bad, batch.bad
            yield batch.image, batch.keys


class WebDatasetFeatures:
    def __init__(self, place: Path, how: str, train: bool) -> None:
        wds: Any = import_module("webdataset")
        tars = sorted(str(p) for p in (place / "shards").glob("*.tar"))
        rng = np.random.default_rng(0)

        def drawn(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
            texts = sample["text.npy"]
            return sample["image.npy"], texts[rng.integers(len(texts))], sample["__key__"]

        data = wds.WebDataset(tars, shardshuffle=False).decode().map(drawn)
        self.loader = wds.WebLoader(data, batch_size=FEATURE_BATCH, num_workers=0, drop_last=True)

    def batches(self) -> Batches:
        for image, _, keys in self.loader:
            yield image, list(keys)


FEATURE_CONTESTANTS: dict[str, tuple[Any, str]] = {"ours": (OurFeatures, ""), "webdataset": (WebDatasetFeatures, "")}
RESUMING: dict[str, Any] = {
    "ours": Ours,
    "webdataset": WebDataset,
    "mosaicml": Mosaicml,
    "ImageFolder": ImageFolder,
}
