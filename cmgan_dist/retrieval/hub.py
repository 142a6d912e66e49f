"""A model as a folder that can be given away, and on the Hugging Face hub.

The folder is a copy of best/ with a model card and what an evaluation found:

    model.json ...      the files of best/, as models/saved.py lists them; its config names no paths of this machine
    evaluation.json     metrics and baselines, where the run was evaluated
    README.md           the model card
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cmgan_dist.config.fields import CONFIG_NAME, Config
from cmgan_dist.config.load import to_yaml
from cmgan_dist.config.paths import get_value, with_values
from cmgan_dist.data.folder import checked_path
from cmgan_dist.errors import BadInput
from cmgan_dist.files import read_bytes, sha256_of, write_atomic
from cmgan_dist.jobs.staging import staging
from cmgan_dist.models.saved import BEST, SPEC_NAME, Saved, spec_json, whole_file
from cmgan_dist.models.weights import first_line
from cmgan_dist.retrieval.evaluate import RECORD_NAME, is_of_model, parse_record, record_json
from cmgan_dist.retrieval.headline import headline

log = logging.getLogger(__name__)

CARD_NAME = "README.md"
TAGS = ["cross-modal-retrieval", "image-text-retrieval", "gan"]
PATTERNS = ["*.json", "*.safetensors", CONFIG_NAME, "backbones/**"]
"""What of a repository is fetched: others may keep exported files beside it."""
EVALUATION_FIELDS = ("metrics", "ends", "baselines", "frontiers", "scoring", "split", "manifest", "model", "checkpoint")
"""What of an evaluation goes along: all but paths of this machine."""


# ---------------------------------------------------------------------------------------------- the model card


def find_evaluation(saved: Saved) -> dict[str, Any]:
    """Return what RUN/evaluation.json, or one beside the model, says of this very model; {} where there is none."""
    for folder in (saved.folder, saved.folder.parent):
        try:
            record = parse_record(read_bytes(folder / RECORD_NAME))
        except OSError:
            continue
        except ValueError as error:
            path = folder / RECORD_NAME
            log.warning("%s is not as it was written (%s), and left out: evaluate the run again", path, error)
            continue
        if is_of_model(record, saved.spec):
            return {name: record[name] for name in EVALUATION_FIELDS if name in record}
    return {}


def _line(text: object) -> str:
    """Return a value as one line of Markdown that is no markup: names and attributions are other people's."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*[]|" else letter for letter in plain)


@functools.cache
def _cards() -> Environment:
    environment = Environment(
        loader=PackageLoader("cmgan_dist.retrieval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["line"] = _line
    return environment


def model_card(saved: Saved, evaluation: dict[str, Any], name: str, license: str = "") -> str:
    """Return the model card, Markdown with the hub's metadata in front.

    `name`: what `from_pretrained` takes. `license`: an identifier of the hub such as "cc-by-4.0"; "" names none."""
    spec = saved.spec
    front: dict[str, Any] = {"library_name": "cmgan_dist", "pipeline_tag": "feature-extraction", "tags": TAGS}
    columns, rows = headline(evaluation) if evaluation else ([], [])
    return (
        _cards()
        .get_template("model_card.md")
        .render(
            front=yaml.safe_dump(front | ({"license": license} if license else {}), sort_keys=False),
            title=name.rpartition("/")[2],
            name=name,
            dim=saved.dim,
            backbones={"image": spec.image, "text": spec.text},
            columns=columns,
            rows=rows,
            split=evaluation.get("split", ""),
            data_name=spec.data_name,
            attribution=spec.attribution,
            classes=spec.data.classes,
            license=license,
        )
    )


# ---------------------------------------------------------------------------------------------- a folder


def _without_paths(config: Config) -> Config:
    """Return the config without paths of this machine; of a file of weights its base name stays."""
    paths = ("model.image.weights", "model.text.weights")
    kept = {path: get_value(config, path) for path in paths}
    named = {k: v if v.startswith(("hub", "package:")) else Path(v).name for k, v in kept.items()}
    return with_values(config, {"data": "", "output": "", "stream.cache": "", **named})


def save_pretrained(saved: Saved, folder: str | Path, *, name: str = "", license: str = "") -> Path:
    """Write a model with its model card to a folder and return its path. `Model.from_pretrained` reads it.

    `name`: what the card calls the model; "" is the folder's. `license`: as of `model_card`. model.json is written
    last: a folder that is not whole is refused by whoever reads it. Raises BadInput when a file of the model is
    damaged, or the folder is the model's own or cannot be written."""
    folder = checked_path(folder, "folder")
    if folder.resolve() in (saved.folder.resolve(), saved.folder.resolve().parent) or (folder / BEST).exists():
        raise BadInput(f"{folder} is a run's own folder: name another")
    evaluation, config = find_evaluation(saved), to_yaml(_without_paths(saved.config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as aside:
            for file, checksum in saved.spec.files.items():
                if file != CONFIG_NAME:
                    shutil.copyfile(whole_file(saved.folder, file, checksum), aside / "file")
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(aside / "file", folder / file)
        write_atomic(folder / CONFIG_NAME, config)
        files = saved.spec.files | {CONFIG_NAME: sha256_of(folder / CONFIG_NAME)}
        if evaluation:
            write_atomic(folder / RECORD_NAME, record_json(evaluation))
        write_atomic(folder / CARD_NAME, model_card(saved, evaluation, name or folder.resolve().name, license))
        write_atomic(folder / SPEC_NAME, spec_json(dataclasses.replace(saved.spec, files=files)))
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}): free space there or name another") from None
    return folder


# ---------------------------------------------------------------------------------------------- the hub


def push_to_hub(saved: Saved, name: str, *, private: bool = False, license: str = "") -> str:
    """Upload a model to the Hugging Face hub as the repository `name`, which is made where there is none.

    Returns the URL of the commit. Who uploads is whom ``hf auth login`` or HF_TOKEN names. Raises BadInput with what
    the hub says."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(library_name="cmgan_dist")
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            save_pretrained(saved, folder, name=repository, license=license)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model")
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"the hub did not take {name} ({first_line(error)}): see 'hf auth whoami', HF_ENDPOINT and the name"
        ) from None
    return str(done.commit_url)


def fetch_pretrained(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model on the hub, fetched where it is not in the hub's cache yet.

    `revision`: a branch, tag or commit; None is the newest. Raises BadInput when it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, library_name="cmgan_dist"))
    except (HTTPError, OSError, ValueError) as error:
        raise BadInput(
            f"{name} is no folder here, and the hub does not give it ({first_line(error)}): name a folder with "
            f"{SPEC_NAME}, or a model as 'owner/name'"
        ) from None
