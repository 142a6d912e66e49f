"""One shard of features: its tar and sidecar, then its record, and whether an earlier run has finished them."""

from __future__ import annotations

from typing import Any

from cmgan_dist.data.index import index_name
from cmgan_dist.data.judge import Judge
from cmgan_dist.data.manifest import ShardInfo
from cmgan_dist.data.output import abandon_record, is_whole, read_record, write_record
from cmgan_dist.data.store import FileStore
from cmgan_dist.data.tar import iter_groups
from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.jobs import ledger
from shards.extract import Options, extractor, feature_samples
from shards.shard_file import check_count, finished_record, opened_source, put_shard, see_verify

Made = tuple[ShardInfo | None, list[str]]
"""What was written for a source (None when no sample was good), and a line for each sample left out."""


class MadeOtherwise(BadInput):
    """A shard is there that was made from other data or with other options."""


def record_name(shard: str) -> str:
    """Return the name of a shard's record: ``train-000000.features.json`` for ``train-000000.tar``."""
    return shard.removesuffix(".tar") + ".features.json"


def make_shard(
    options: Options, judge: Judge, data: str, output: str, source: ShardInfo, settings: dict[str, Any]
) -> Made:
    """Write the features of a shard: its tar and sidecar, then its record. `data`, `output`: folders or URLs.

    Raises BadInput when the source is not what its manifest says, at a bad sample unless the options skip them, and
    when a file cannot be written."""
    store, record = FileStore(output, "--output"), record_name(source.name)
    with opened_source(data, source) as raw:
        left_out: list[str] = []
        try:
            write_record(store, record, ledger.Record(source.sha256, settings))
            groups = iter_groups(raw, source.name)
            samples = feature_samples(extractor(options), judge, groups, source.name, left_out)
            info = put_shard(store, source.name, samples, judge.number_of)
            check_count(source, (info.samples if info else 0) + len(left_out))
            write_record(store, record, finished_record(source.sha256, settings, info, store, left_out))
        except BadSample as error:
            raise BadInput(f"{error}: {see_verify(data)}") from None
        finally:
            abandon_record(store, record, source.name)
    return info, left_out


def is_recorded(output: FileStore, source: ShardInfo, settings: dict[str, Any]) -> bool:
    """Return whether a shard's record says that it is finished, with these settings; what it tells of is not read.

    Raises BadInput when the record cannot be read."""
    record = read_record(output, record_name(source.name))
    return record is not None and record.finished and record.is_of(source.sha256, settings)


def finished_shard(output: FileStore, source: ShardInfo, settings: dict[str, Any], skip_bad: bool) -> Made | None:
    """Return what an earlier run, or another task, wrote for this source with these settings, None when it is to be
    made.

    A tar or sidecar that was damaged since is named on stdout. Raises MadeOtherwise when the tar was made otherwise,
    BadInput when a file cannot be read."""
    record = read_record(output, record_name(source.name))
    ours = record is not None and record.is_of(source.sha256, settings)
    is_there = output.size(source.name) is not None
    if is_there and (not ours or (record is not None and record.left_out and not skip_bad)):
        how = "was made from other data or with other options" if record else "has no record that is whole"
        raise MadeOtherwise(
            f"{output.location(source.name)} {how}: name a new --output, or pass --overwrite to make it anew"
        )
    if record is None or not ours or not record.finished or (record.left_out and not skip_bad):
        return None
    if record.written is None:
        return None, record.left_out
    if is_there and not all(is_whole(output, sidecar) for sidecar in record.beside):
        sidecar = output.location(index_name(source.name))
        print(f"{sidecar} is missing or damaged: {source.name} is made anew\n", end="")  # several threads: whole lines
        return None
    if not is_whole(output, record.written):
        if is_there:
            print(f"{output.location(source.name)} is not what its record says: it is made anew\n", end="")
        return None
    return ShardInfo(**record.written, index_sha256=record.beside[0]["sha256"]), record.left_out
