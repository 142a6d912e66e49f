"""What ``save_to_disk`` of Hugging Face's datasets writes beside its tables: which of the files there are the data set.

It may be called twice on one folder, and leaves there what the first call wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmgan_dist.errors import BadInput
from cmgan_dist.files import parse_json_once, read_bytes

STATE, SPLITS = "state.json", "dataset_dict.json"


def listed_by_datasets(top: Path, tables: list[Path]) -> list[Path]:
    """Return those of the tables in and below `top` that are of its data sets: where a folder holds state.json those
    that it lists, and below dataset_dict.json those of its splits.

    Raises BadInput when such a file is damaged or lists what is not there."""
    folders = {parent for table in tables for parent in table.parents if parent == top or top in parent.parents}
    files_of = {folder: _files_of(folder) for folder in folders}
    splits_of = {folder: _splits_of(folder) for folder in folders}

    def is_listed(table: Path) -> bool:
        files = files_of[table.parent]
        return (files is None or table.name in files) and all(
            splits is None or table.relative_to(folder).parts[0] in splits
            for folder, splits in splits_of.items()
            if splits is not None and folder in table.parents
        )

    return [table for table in tables if is_listed(table)]


def _files_of(folder: Path) -> set[str] | None:
    """Return the names of the tables of a data set; None where the folder does not say. Raises BadInput."""
    listed = _record(folder / STATE).get("_data_files")
    if not isinstance(listed, list):
        return None
    names = {str(each.get("filename")) for each in listed if isinstance(each, dict)}
    return _there(folder, names, STATE)


def _splits_of(folder: Path) -> set[str] | None:
    """Return the names of the folders of a data set's splits; None where the folder does not say. Raises BadInput."""
    listed = _record(folder / SPLITS).get("splits")
    if not isinstance(listed, list):
        return None
    names = _there(folder, set(map(str, listed)), SPLITS)
    for name in names:  # a split of which all tables are lost is in no other way missed
        _files_of(folder / name)
    return names


def _there(folder: Path, names: set[str], record: str) -> set[str]:
    """Return names that a record lists. Raises BadInput at one that is not there."""
    lost = next((name for name in sorted(names) if not (folder / name).exists()), None)
    if lost is not None:
        raise BadInput(f"{folder / record} lists {lost}, which is not there: restore it, or save the data set anew")
    return names


def _record(path: Path) -> dict[str, Any]:
    """Return the record in a JSON file, {} where there is none. Raises BadInput when it cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = parse_json_once(read_bytes(path))
    except (OSError, ValueError):
        raise BadInput(f"{path} cannot be read as JSON: save the data set anew, or remove it") from None
    return found if isinstance(found, dict) else {}
