"""Encoded shards -> shards of precomputed features of the same names, shard by shard, resumable.

Beside each tar lies its record, ``train-000000.features.json``: what it was made from and how. The record is written
last, so a run that was killed goes on behind the last shard whose record agrees with its bytes."""

from __future__ import annotations

import dataclasses
import re
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cmgan_dist.config.fields import ImageBackboneConfig, Pool, TextBackboneConfig
from cmgan_dist.config.paths import find_setting
from cmgan_dist.data.index import index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import MANIFEST_NAME, Manifest, ShardInfo
from cmgan_dist.data.origin import origin_of
from cmgan_dist.data.output import clear_leftovers, owning_output
from cmgan_dist.data.reader import open_data_set
from cmgan_dist.data.source import public_url
from cmgan_dist.data.store import FileStore, ShardStore
from cmgan_dist.errors import BadInput
from cmgan_dist.jobs.local import threaded_map
from cmgan_dist.jobs.machine import Share, absolute, find_share
from cmgan_dist.jobs.ranks import Task, find_task
from cmgan_dist.models.backbone import PixelBackbone
from cmgan_dist.models.backbones import image_size_of
from cmgan_dist.models.clip import is_open_clip, made_for
from cmgan_dist.models.weights import weights_sha256
from shards.assemble import assemble, print_summary, say_unfilled
from shards.extract import Extractor, Options, extractor
from shards.feature_options import FeatureOptions
from shards.feature_shard import Made, MadeOtherwise, finished_shard, is_recorded, make_shard, record_name
from shards.pairs import drawing, missing_val
from shards.shard_file import tars_among
from shards.unfit import warnings_of

# ---------------------------------------------------------------------------------------------- settings

_FLAGS = {
    "image": "--image-backbone",
    "image.name": "--image-backbone",
    "image.weights": "--image-weights",
    "image.image_size": "--image-size",
    "text": "--text-backbone",
    "text.name": "--text-backbone",
    "text.weights": "--text-weights",
    "text.pools": "--text-pool",
    "text.max_tokens": "--max-tokens",
}
"""Fields of a config's `model` -> what they are called here."""


def _in_flags(sentence: str) -> str:
    """Return what a backbone says against its config with the flags that set it."""
    fields = re.compile(r"(?<![\w./-])model\.((?:image|text)(?:\.[a-z_]+)?)(?![\w/-])")
    return fields.sub(lambda found: _FLAGS.get(found[1], found[0]), sentence)


def chosen_pools(names: str) -> tuple[Pool, ...]:
    """Return the pools that --text-pool names. Raises BadInput at one that there is not, or that stands twice."""
    chosen = [name.strip() for name in names.split(",")]
    known = typing.get_args(Pool)
    wrong = [name for name in chosen if name not in known]
    if wrong or len(set(chosen)) < len(chosen):
        what = f"'{wrong[0]}' is none" if wrong else "one stands twice"
        raise BadInput(f"--text-pool is '{names}', of which {what}: name some of {', '.join(known)}")
    return tuple(typing.cast("list[Pool]", chosen))


def choose_options(command: FeatureOptions, manifest: Manifest) -> tuple[Options, Share]:
    """Return what a process needs to know, and where the processes are. Raises BadInput naming the flag."""
    if command.batch_size < 1:
        raise BadInput(f"--batch-size is {command.batch_size}: it must be at least 1")
    for flag, number, allowed in (
        ("--image-size", command.image_size, find_setting("model.image.image_size").range),
        ("--max-tokens", command.max_tokens, find_setting("model.text.max_tokens").range),
    ):
        if allowed is not None and number is not None and number not in allowed:
            raise BadInput(f"{flag} is {number}, expected {allowed}")
    image = text = None
    if command.image_backbone != "features" and manifest.image == "encoded":
        _check_weights("--image-weights", command.image_weights)
        weights = _from_anywhere(command.image_weights)
        size = command.image_size or _own_size(ImageBackboneConfig(command.image_backbone, weights))
        image = (command.image_backbone, weights, size)
    if command.text_backbone != "features" and manifest.text == "utf8":
        if command.text_backbone != "sentence" and not is_open_clip(command.text_backbone):
            raise BadInput(
                f"--text-backbone is '{command.text_backbone}': without training only sentence and open_clip:MODEL work"
            )
        _check_weights("--text-weights", command.text_weights)
        pools = chosen_pools(command.text_pool)
        weights = _from_anywhere(command.text_weights)
        tokens = command.max_tokens or _own_tokens(TextBackboneConfig(command.text_backbone, weights))
        text = (command.text_backbone, weights, tokens, pools)
    if image is None and text is None:
        raise BadInput(
            f"nothing to do: the images of {public_url(command.data)} are {manifest.image}, its texts {manifest.text}; "
            "name an --image-backbone or a --text-backbone for what is not features yet"
        )
    share = find_share(command.device, command.processes, command.ray)
    options = Options(image, text, command.batch_size, command.dtype, share.device, share.threads, command.skip_bad)
    return options, share


def _own_size(config: ImageBackboneConfig) -> int:
    """Return the side of the square that an image backbone sees where nobody says it. Raises BadInput."""
    return image_size_of(config) or config.image_size


def _own_tokens(config: TextBackboneConfig) -> int:
    """Return at how many tokens texts are cut where nobody says it. Raises BadInput."""
    return made_for(config, "model.text") if is_open_clip(config.name) else config.max_tokens


def _taken(command: FeatureOptions, options: Options) -> Iterator[str]:
    """Yield a line for each option that a model was asked for, or that it is not made for."""
    if options.image is not None:
        name, weights, size = options.image
        own = image_size_of(ImageBackboneConfig(name, weights))
        if own is not None and command.image_size is None:
            yield f"pictures are scaled to {size} pixels, which {name} is made for (--image-size)"
        elif own not in (None, size):
            yield f"warning: --image-size is {size}, and {name} is made for {own}: leave the flag away for that"
    if options.text is not None and is_open_clip(options.text[0]) and command.max_tokens is None:
        yield f"texts are cut at {options.text[2]} tokens, which {options.text[0]} takes (--max-tokens)"


def _check_weights(flag: str, weights: str) -> None:
    if not weights:
        raise BadInput(f"{flag} is empty: features of random weights are of no use, name some weights")


def _from_anywhere(weights: str) -> str:
    """Return the place of weights, "hub", "hub:NAME", "package:NAME" or a path, as it is called from any folder."""
    return weights if weights == "hub" or weights.startswith(("hub:", "package:")) else absolute(weights)


def settings_of(made: Extractor) -> dict[str, Any]:
    """Return what decides the bytes of a feature shard beside its source: the same on every machine, so no paths."""
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
    details = {name: value for name, value in settings.items() if name != "classes"}
    for side, chosen in (("image", made.options.image), ("text", made.options.text)):
        if chosen is not None:
            details[side] = {"backbone": chosen[0], "weights": chosen[1], **settings[side]}
    if isinstance(made.image, PixelBackbone):
        details["image"] |= {"mean": made.image.mean, "std": made.image.std}
    return details


# ---------------------------------------------------------------------------------------------- the whole output


def _sources(command: FeatureOptions, data: ShardStore, manifest: Manifest) -> list[ShardInfo]:
    """Return the shards of a data set. Raises BadInput when one is missing, or the output is the data set itself."""
    output = FileStore(command.output, "--output")
    output.check_output(MANIFEST_NAME)
    if output.is_at(command.data):
        raise BadInput(f"--output {public_url(command.output)} is the data set itself: name another place")
    sources = [shard for shards in manifest.splits.values() for shard in shards]
    data.check(sources)
    for side, asked, stored in (
        ("images", command.image_backbone, manifest.image),
        ("texts", command.text_backbone, manifest.text),
    ):
        if asked != "features" and stored == "features":
            print(f"the {side} of {public_url(command.data)} are features already: copied as they are", flush=True)
    return sources


def _remove(output: FileStore, shard: str) -> None:
    """Remove a shard; its record goes last, so that what is left of it is known as the job's own."""
    for name in (shard, index_name(shard), record_name(shard)):
        output.remove(name)


def _remove_foreign(output: FileStore, names: set[str], overwrite: bool) -> None:
    """Remove the tars that have no source in this data set. Raises BadInput rather than do that unasked."""
    foreign = [name for name in tars_among(output.names()) if name not in names]
    if foreign and not overwrite:
        raise BadInput(
            f"{public_url(output.url)} holds another data set ({foreign[0]} has no source): "
            "name a new --output, or pass --overwrite to remove it"
        )
    for name in foreign:
        _remove(output, name)


@dataclass
class _Plan:
    """What a run is to do."""

    command: FeatureOptions
    manifest: Manifest
    """Of the data set that features are made of."""
    sources: list[ShardInfo]
    """All its shards."""
    task: Task
    data: ShardStore
    options: Options
    share: Share
    made: Extractor
    settings: dict[str, Any]
    output: FileStore
    """Where features go."""


def _find_done(plan: _Plan, sources: list[ShardInfo]) -> dict[str, Made]:
    """Return what earlier runs finished of some shards, by name; with `overwrite`, what of this task's was made
    otherwise is removed."""
    own = {plan.sources[i].name for i in plan.task.share(len(plan.sources))}

    def find(shard: ShardInfo) -> Made | None:
        try:
            return finished_shard(plan.output, shard, plan.settings, plan.command.skip_bad)
        except MadeOtherwise:
            if not plan.command.overwrite:
                raise
            if shard.name in own:
                _remove(plan.output, shard.name)
            return None

    found = zip(sources, threaded_map(find, sources, title="comparing finished shards"), strict=True)
    return {shard.name: made for shard, made in found if made is not None}


def _make_shards(plan: _Plan, todo: list[ShardInfo]) -> dict[str, Made]:
    """Make the shards of `todo` and print the rate; returns what was made of each, by name."""
    # Until the new manifest is written, the folder is not a data set.
    plan.output.remove(MANIFEST_NAME)
    count, done = sum(shard.samples for shard in todo), len(plan.task.share(len(plan.sources))) - len(todo)
    print(f"{done} shards are there already, {len(todo)} are to be made of {count} samples", flush=True)
    for line in _taken(plan.command, plan.options):
        print(line, flush=True)
    for line in warnings_of(plan.made.text, plan.data, plan.sources):
        print(f"warning: {line}", flush=True)
    begun, judge = time.monotonic(), Judge.of(plan.manifest)
    data, output = absolute(plan.command.data), absolute(plan.command.output)
    made = plan.share.map(
        make_shard,
        [(plan.options, judge, data, output, shard, plan.settings) for shard in todo],
        title="features",
        unit_counts=[shard.samples for shard in todo],
    )
    seconds = time.monotonic() - begun
    print(f"{count} samples in {seconds:.0f} s, {count / seconds:.1f} samples/s", flush=True)
    return {shard.name: one for shard, one in zip(todo, made, strict=True)}


def write_features(command: FeatureOptions) -> Manifest | None:
    """Write the feature shards of `command`, this task's share of them, and when all are there their manifest.

    Returns the manifest, None while other tasks have shards to make. Raises BadInput, also when another process is
    writing the same share."""
    task = find_task(command.task)
    data, manifest = open_data_set(command.data)
    sources = _sources(command, data, manifest)
    try:
        options, share = choose_options(command, manifest)
        # This process needs their checksum and sizes only, where others work.
        made = extractor(dataclasses.replace(options, device="cpu") if share.cluster else options)
    except BadInput as error:
        raise BadInput(_in_flags(str(error))) from None
    output = FileStore(command.output, "--output")
    settings = settings_of(made)
    if manifest.labels == "names":  # whose numbers sidecars hold
        settings["classes"] = manifest.classes
    plan = _Plan(command, manifest, sources, task, data, options, share, made, settings, output)
    with owning_output(output, task.lock("features")):
        return _write_share(plan)


def _write_share(plan: _Plan) -> Manifest | None:
    output, sources = plan.output, plan.sources
    clear_leftovers(output)
    _remove_foreign(output, {shard.name for shard in sources}, plan.command.overwrite)
    own = [sources[i] for i in plan.task.share(len(sources))]
    done = _find_done(plan, own)
    todo = [shard for shard in own if shard.name not in done]
    if todo:
        done |= _make_shards(plan, todo)
    rest = [shard for shard in sources if shard.name not in done]
    left = [shard for shard in rest if not is_recorded(output, shard, plan.settings)]  # before files are read for it
    if not left:
        done |= _find_done(plan, rest)
        left = [shard for shard in rest if shard.name not in done]
    if left:
        print(f"task {plan.task} is done; {len(left)} of {len(sources)} shards are left to other tasks")
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
        labels=manifest.labels,
        splits={split: [done[shard.name][0] for shard in shards] for split, shards in manifest.splits.items()},
        image_dim=manifest.image_dim if made.image is None else made.image.dim,
        text_dim=manifest.text_dim if made.text is None else made.text.dim,
        attribution=manifest.attribution,
        details={
            **origin_of(plan.command.data, manifest),
            **details_of(made, plan.settings),
            "left_out": len(left_out),
            "raw": manifest.details,
        },
        left_out=left_out,
    )
    output.write(MANIFEST_NAME, written.to_json())
    place = public_url(plan.command.output)
    headline = f"wrote {place}" if new else f"already written: {place}"
    notes = [*missing_val(written.splits, drawing(place)), *say_unfilled(output, written, left_out)]
    print_summary(headline, written, notes=notes, left_out=left_out)
    return written
