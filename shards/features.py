"""Encoded shards -> shards of precomputed features of the same names, shard by shard, resumable.

Beside each tar lies its record, ``train-000000.features.json``: what it was made from and how. The record is written
last, so a run that was killed goes on behind the last shard whose record agrees with its bytes."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from cmgan_dist.config.fields import Pool
from cmgan_dist.config.paths import find_setting
from cmgan_dist.data.folder import check_output
from cmgan_dist.data.index import index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.files import sha256_of
from cmgan_dist.jobs import ledger
from cmgan_dist.jobs.cores import usable_cores
from cmgan_dist.jobs.local import parallel_map
from cmgan_dist.jobs.lock import owning
from cmgan_dist.jobs.machine import share_of_machine
from cmgan_dist.jobs.ranks import Task, find_task
from cmgan_dist.jobs.staging import remove_leftovers
from shards.assemble import assemble, print_summary, write_manifest
from shards.pairs import drawing, missing_val
from shards.shard_file import has_index, write_shard

if typing.TYPE_CHECKING:
    from shards.extract import Extractor, Options

Made = tuple[ShardInfo | None, list[str]]
"""What was written for a source (None when no sample was good), and a line for each sample left out."""


@dataclass
class FeaturesCommand:
    """Run frozen backbones over a data set once and store what they make of it.

    A modality without a backbone, or one that is stored as features already, is copied. An interrupted run goes on
    where it was; finished shards are kept."""

    data: tyro.conf.Positional[Path]
    """Folder with manifest.json and tars."""
    output: Path
    """Folder for the feature shards and their manifest.json."""
    image_backbone: str = "features"
    """timm model for the images, such as tf_efficientnet_lite0, or a tower of open_clip, such as open_clip:ViT-B-32;
    "features" copies them as they are."""
    image_weights: str = ""
    """"hub", a .pth or .safetensors file, or "package:NAME" for weights in a package; of open_clip "hub:TAG", a file or
    a folder."""
    image_size: int = 224
    """Side of the square that the image backbone sees, in pixels."""
    text_backbone: str = "features"
    """"sentence" for a sentence-transformers model, or a tower of open_clip, such as open_clip:ViT-B-32; "features"
    copies the texts as they are."""
    text_weights: str = ""
    """Folder of the model, "hub:NAME" or "package:NAME"; of open_clip as for images."""
    text_pool: str = "sentence"
    """What of a text's tokens makes its feature, with commas between: "sentence" as the model itself pools them, "max"
    over the tokens, "cls" the first token. sentence,max,cls finds more of the right pictures."""
    max_tokens: int = 64
    """Longer texts are cut."""
    batch_size: int = 64
    """Samples that go through a backbone at a time; each shard starts its own batches."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored features."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbones run; auto takes a GPU if there is one."""
    processes: int | None = None
    """Processes, each with a shard at a time (None: one a core, on a GPU one). The bytes do not depend on it."""
    task: str = ""
    """I/N: every N-th shard from I on, where several machines share the work and --output; a SLURM array and torchrun
    say it by themselves. Whoever finds all shards made writes the manifest."""
    skip_bad: bool = False
    """Leave bad samples out, count and list them, instead of stopping at the first."""
    overwrite: bool = False
    """Make shards anew that came from other data or other options, and remove those that have no source."""

    def run(self) -> None:
        """Write the features. Raises BadInput as `write_features` does."""
        write_features(self)


# ---------------------------------------------------------------------------------------------- settings


def chosen_pools(names: str) -> tuple[Pool, ...]:
    """Return the pools that --text-pool names. Raises BadInput at one that there is not, or that stands twice."""
    chosen = [name.strip() for name in names.split(",")]
    known = typing.get_args(Pool)
    wrong = [name for name in chosen if name not in known]
    if wrong or len(set(chosen)) < len(chosen):
        what = f"'{wrong[0]}' is none" if wrong else "one stands twice"
        raise BadInput(f"--text-pool is '{names}', of which {what}: name some of {', '.join(known)}")
    return tuple(typing.cast("list[Pool]", chosen))


def choose_options(command: FeaturesCommand, manifest: Manifest) -> tuple[Options, int]:
    """Return what a process needs to know, and the number of processes. Raises BadInput naming the flag."""
    if command.batch_size < 1:
        raise BadInput(f"--batch-size is {command.batch_size}: it must be at least 1")
    from cmgan_dist.models.clip import is_open_clip  # here and below: torch takes seconds to import, and --help waits
    from shards.extract import Options

    for flag, number, allowed in (
        ("--image-size", command.image_size, find_setting("model.image.image_size").range),
        ("--max-tokens", command.max_tokens, find_setting("model.text.max_tokens").range),
    ):
        if allowed is not None and number not in allowed:
            raise BadInput(f"{flag} is {number}, expected {allowed}")
    share = share_of_machine(command.device, command.processes)
    image = text = None
    if command.image_backbone != "features" and manifest.image == "encoded":
        if not command.image_weights:
            raise BadInput("--image-weights is empty: features of random weights are of no use, name some weights")
        image = (command.image_backbone, command.image_weights, command.image_size)
    if command.text_backbone != "features" and manifest.text == "utf8":
        if command.text_backbone != "sentence" and not is_open_clip(command.text_backbone):
            raise BadInput(
                f"--text-backbone is '{command.text_backbone}': without training only sentence and open_clip:MODEL work"
            )
        text = (command.text_backbone, command.text_weights, command.max_tokens, chosen_pools(command.text_pool))
    if image is None and text is None:
        raise BadInput(
            f"nothing to do: the images of {command.data} are {manifest.image} and its texts {manifest.text}; "
            "name an --image-backbone or a --text-backbone for what is not features yet"
        )
    options = Options(image, text, command.batch_size, command.dtype, share.device, share.threads, command.skip_bad)
    return options, share.processes


def settings_of(made: Extractor) -> dict[str, Any]:
    """Return what decides the bytes of a feature shard beside its source: the same on every machine, so no paths."""
    from cmgan_dist.models.weights import weights_sha256

    settings: dict[str, Any] = {"batch_size": made.options.batch_size, "dtype": made.options.dtype}
    for side, chosen, backbone, limit in (
        ("image", made.options.image, made.image, "image_size"),
        ("text", made.options.text, made.text, "max_tokens"),
    ):
        if chosen is not None and backbone is not None:
            name, _, size, *pools = chosen
            settings[side] = {
                "backbone": name,
                "weights_sha256": weights_sha256(backbone),
                limit: size,
                "dim": backbone.dim,
            }
            if pools:
                settings[side]["pools"] = list(pools[0])
    return settings


def details_of(made: Extractor, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the place of the weights and the normalisation, for the manifest: enough to build the
    backbones again.

    A place is "hub", "hub:NAME", "package:NAME" or the absolute path of a file or folder."""
    from cmgan_dist.models.backbone import PixelBackbone

    details = dict(settings)
    for side, chosen in (("image", made.options.image), ("text", made.options.text)):
        if chosen is not None:
            weights = chosen[1]
            if weights != "hub" and not weights.startswith(("hub:", "package:")):
                weights = str(Path(weights).absolute())
            details[side] = {"backbone": chosen[0], "weights": weights, **settings[side]}
    if isinstance(made.image, PixelBackbone):
        details["image"] |= {"mean": made.image.mean, "std": made.image.std}
    return details


# ---------------------------------------------------------------------------------------------- one shard


def record_name(shard: str) -> str:
    """Return the name of a shard's record: ``train-000000.features.json`` for ``train-000000.tar``."""
    return shard.removesuffix(".tar") + ".features.json"


def make_shard(
    options: Options, judge: Judge, data: Path, output: Path, source: ShardInfo, settings: dict[str, Any]
) -> Made:
    """Write the features of a shard: its tar and sidecar, then its record.

    Raises BadInput when the source is not what its manifest says, at a bad sample unless the options skip them, and
    when a file cannot be written."""
    from shards.extract import extractor, feature_samples

    if sha256_of(data / source.name) != source.sha256:
        raise BadInput(f"{data / source.name} is not what its manifest says: see 'python -m shards verify {data}'")
    path = output / record_name(source.name)
    left_out: list[str] = []
    try:
        ledger.write(path, ledger.Record(source.sha256, settings))
        with open(data / source.name, "rb") as raw:
            groups = iter_groups(raw, source.name)
            samples = feature_samples(extractor(options), judge, groups, source.name, left_out)
            info = write_shard(output, source.name, samples)
        ledger.write(path, _finished_record(source, settings, output, info, left_out))
    except BadSample as error:
        raise BadInput(f"{error}: see 'python -m shards verify {data}'") from None
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None
    finally:
        ledger.abandon(path)
    return info, left_out


def _finished_record(
    source: ShardInfo, settings: dict[str, Any], output: Path, info: ShardInfo | None, left_out: list[str]
) -> ledger.Record:
    """Return the record of a shard that was written, or of which no sample was good, and of the sidecar beside it."""
    if info is None:
        return ledger.Record(source.sha256, settings, True, None, left_out)
    written = {name: value for name, value in asdict(info).items() if name in ledger.WRITTEN}
    sidecar = output / index_name(info.name)
    beside = {"name": sidecar.relative_to(output).as_posix(), "samples": info.samples, "sha256": info.index_sha256}
    beside["bytes"] = sidecar.stat().st_size
    return ledger.Record(source.sha256, settings, True, written, left_out, [beside])


def finished_shard(output: Path, source: ShardInfo, settings: dict[str, Any], skip_bad: bool) -> Made | None:
    """Return what an earlier run, or another task, wrote for this source with these settings, None when it is to be
    made.

    A tar or sidecar that was damaged since is named on stdout. Raises BadInput when the tar was made otherwise."""
    path = output / source.name
    record = ledger.read(output / record_name(source.name))
    ours = record is not None and record.is_of(source.sha256, settings)
    if path.exists() and (not ours or (record is not None and record.left_out and not skip_bad)):
        how = "was made from other data or with other options" if record else "has no record that is whole"
        raise BadInput(f"{path} {how}: name a new --output, or pass --overwrite to make it anew")
    if record is None or not ours or not record.finished or (record.left_out and not skip_bad):
        return None
    if record.written is None:
        return None, record.left_out
    info = ShardInfo(**record.written, index_sha256=record.beside[0]["sha256"] if record.beside else "")
    if path.exists() and not has_index(output, info):
        print(f"{output / index_name(source.name)} is missing or damaged: {source.name} is made anew")
        return None
    if not ledger.is_done(record, output):
        if path.exists():
            print(f"{path} is not what its record says: it is made anew")
        return None
    return info, record.left_out


# ---------------------------------------------------------------------------------------------- the whole output


def _sources(command: FeaturesCommand, manifest: Manifest) -> list[ShardInfo]:
    """Return the shards of a data set. Raises BadInput when one is missing, or the output is the data set itself."""
    data, output = command.data, command.output
    check_output(output, MANIFEST_NAME)
    if output.resolve() == data.resolve():
        raise BadInput(f"--output {output} is the data set itself: name another folder")
    sources = [shard for shards in manifest.splits.values() for shard in shards]
    for shard in sources:
        if not (data / shard.name).is_file():
            raise BadInput(f"{data / shard.name} is in the manifest but not in the folder: restore it")
    for side, asked, stored in (
        ("images", command.image_backbone, manifest.image),
        ("texts", command.text_backbone, manifest.text),
    ):
        if asked != "features" and stored == "features":
            print(f"the {side} of {data} are features already: copied as they are")
    return sources


def _remove(output: Path, shard: str) -> None:
    for name in (shard, index_name(shard), record_name(shard)):
        (output / name).unlink(missing_ok=True)


def _tars(output: Path) -> Iterator[str]:
    """Give the names of the tars in a folder and those below it, hidden folders apart."""
    for path in sorted(output.rglob("*.tar")):
        name = path.relative_to(output)
        if not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _remove_foreign(output: Path, names: set[str], overwrite: bool) -> None:
    """Remove the tars that have no source in this data set. Raises BadInput rather than do that unasked."""
    foreign = [name for name in _tars(output) if name not in names]
    if foreign and not overwrite:
        raise BadInput(
            f"{output} holds another data set ({foreign[0]} has no source): "
            "name a new --output, or pass --overwrite to remove it"
        )
    for name in foreign:
        _remove(output, name)


@dataclass
class _Plan:
    """What a run is to do."""

    command: FeaturesCommand
    manifest: Manifest
    """Of the data set that features are made of."""
    sources: list[ShardInfo]
    """All its shards."""
    task: Task
    options: Options
    processes: int
    made: Extractor
    settings: dict[str, Any]

    @property
    def output(self) -> Path:
        """Where features go."""
        return self.command.output


def _find_done(plan: _Plan, sources: list[ShardInfo]) -> dict[str, Made]:
    """Return what earlier runs finished of some shards, by name; with `overwrite`, what of this task's was made
    otherwise is removed."""
    own = {plan.sources[i].name for i in plan.task.share(len(plan.sources))}

    def find(shard: ShardInfo) -> Made | None:
        try:
            return finished_shard(plan.output, shard, plan.settings, plan.command.skip_bad)
        except BadInput:
            if not plan.command.overwrite:
                raise
            if shard.name in own:
                _remove(plan.output, shard.name)
            return None
        except OSError as error:
            raise BadInput(f"cannot read {plan.output / shard.name}: {error.strerror}") from None

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = zip(sources, pool.map(find, sources), strict=True)
        return {shard.name: made for shard, made in found if made is not None}


def _make_shards(plan: _Plan, todo: list[ShardInfo]) -> dict[str, Made]:
    """Make the shards of `todo` and print the rate; returns what was made of each, by name."""
    # Until the new manifest is written, the folder is not a data set.
    (plan.output / MANIFEST_NAME).unlink(missing_ok=True)
    begun, judge = time.monotonic(), Judge.of(plan.manifest)
    made = parallel_map(
        make_shard,
        [(plan.options, judge, plan.command.data, plan.output, shard, plan.settings) for shard in todo],
        title="features",
        unit_counts=[shard.samples for shard in todo],
        processes=plan.processes,
    )
    seconds = time.monotonic() - begun
    count = sum(shard.samples for shard in todo)
    print(f"{count} samples in {seconds:.0f} s, {count / seconds:.1f} samples/s")
    return {shard.name: one for shard, one in zip(todo, made, strict=True)}


def write_features(command: FeaturesCommand) -> Manifest | None:
    """Write the feature shards of `command`, this task's share of them, and when all are there their manifest.

    Returns the manifest, None while other tasks have shards to make. Raises BadInput, also when another process is
    writing the same share."""
    from shards.extract import extractor

    task, manifest = find_task(command.task), load_manifest(command.data)
    sources = _sources(command, manifest)
    options, processes = choose_options(command, manifest)
    made = extractor(options)
    plan = _Plan(command, manifest, sources, task, options, processes, made, settings_of(made))
    with owning(plan.output, task.lock("features")):
        return _write_share(plan)


def _write_share(plan: _Plan) -> Manifest | None:
    output, sources = plan.output, plan.sources
    try:
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
    except OSError as error:
        raise BadInput(f"cannot make the output folder {output}: {error.strerror}") from None
    _remove_foreign(output, {shard.name for shard in sources}, plan.command.overwrite)
    own = [sources[i] for i in plan.task.share(len(sources))]
    done = _find_done(plan, own)
    todo = [shard for shard in own if shard.name not in done]
    if todo:
        done |= _make_shards(plan, todo)
    done |= _find_done(plan, [shard for shard in sources if shard.name not in done])
    if len(done) < len(sources):
        left = len(sources) - len(done)
        print(f"task {plan.task} is done; {left} of {len(sources)} shards are left to other tasks")
        return None
    return _finish(plan, done, bool(todo))


def _finish(plan: _Plan, done: dict[str, Made], new: bool) -> Manifest:
    """Write the manifest of all shards and return it; equal for whichever task writes it."""
    manifest, made, output = plan.manifest, plan.made, plan.output
    left_out = [line for shard in plan.sources for line in done[shard.name][1]]
    written = assemble(
        name=manifest.name,
        label_kind=manifest.label_kind,
        classes=manifest.classes,
        splits={split: [done[shard.name][0] for shard in shards] for split, shards in manifest.splits.items()},
        image_dim=manifest.image_dim if made.image is None else made.image.dim,
        text_dim=manifest.text_dim if made.text is None else made.text.dim,
        attribution=manifest.attribution,
        details={
            "source": str(plan.command.data),
            **details_of(made, plan.settings),
            "left_out": len(left_out),
            "raw": manifest.details,
        },
    )
    write_manifest(output, written)
    headline = f"wrote {output}" if new else f"already written: {output}"
    print_summary(headline, written, notes=missing_val(written.splits, drawing(output)), left_out=left_out)
    return written
