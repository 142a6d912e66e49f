"""What a sentence says to do leads out: each case is a wrong command, its sentence, and that advice followed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmgan_dist.config.cli import parse_arguments
from cmgan_dist.config.load import to_yaml
from cmgan_dist.data.cache import open_store
from cmgan_dist.data.manifest import load_manifest
from cmgan_dist.data.stream import Stream
from cmgan_dist.errors import BadInput
from launchers import embed, evaluate, search, train
from launchers import index as build_index
from launchers.slurm import node
from shards.__main__ import main as shards
from tests.services.faulty_server import FaultyServer
from tests.toy import (
    SHARD_BYTES,
    SMALL,
    body_of,
    call,
    fill_folder,
    make_features,
    make_raw,
    save_untrained,
    shard_of,
    small_config,
)

Case = Callable[[Path], None]


def config_of(*words: str) -> None:
    parse_arguments(["--preset", "smoke", "--data", "data", "--output", "run", *words])


def stream_of(place: Path, *words: str) -> None:
    config, _ = parse_arguments(["--preset", "smoke", "--data", str(place), "--output", "run", *words])
    Stream(config.data, config.stream, seed=0, image_size=32, rank=0, world=1)


def refused(work: Callable[[], object], sentence: str) -> re.Match[str]:
    """The sentence with which work is refused, as `sentence` finds it."""
    with pytest.raises(BadInput) as caught:
        work()
    found = re.search(sentence, str(caught.value))
    assert found, str(caught.value)
    return found


def said_by(main: Callable[[], int | None], sentence: str, *words: object) -> re.Match[str]:
    """The same of a command."""
    code, said = call(main, *map(str, words))
    found = re.search(sentence, said)
    assert code == 2, said
    assert found, said
    return found


def run_shards(*words: object) -> None:
    shards([str(word) for word in words])


def quoted(found: re.Match[str]) -> list[str]:
    """The words of the command of `python -m shards` that a sentence quotes."""
    match = re.search(r"'python -m shards ([^']*)'", found.string)
    assert match, found.string
    return shlex.split(match[1])


# ---------------------------------------------------------------------------------------------- settings


def test_a_split_that_may_not_be_used() -> None:
    usual = refused(lambda: config_of("stream.val_split=test"), "use '(val)'")[1]
    config_of(f"stream.val_split={usual}")


def test_no_loss_term() -> None:
    none = [f"loss.{n}=0" for n in ("intra", "inter", "modality", "classification", "contrastive", "class_contrastive")]
    names = refused(lambda: config_of(*none), "set one of (.*) above 0")[1].split(", ")
    assert len(names) == len(none)
    for name in names:
        config_of(*[word for word in none if not word.startswith(f"{name}=")], f"{name}=0.5")


def test_compilation_with_gradients_of_gradients() -> None:
    words = ["train.compile=true", "loss.r1=1"]
    name, value = refused(lambda: config_of(*words), r"set (train\.compile) to (false)").groups()
    config_of("loss.r1=1", f"{name}={value}")


@pytest.mark.parametrize("word", ["--train.report", "--model.image.trainable", "--model.text.no-trainable"])
def test_a_switch_with_a_value(word: str) -> None:
    for switch in refused(lambda: config_of(word, "true"), r"write (\S+) or (\S+) without a value").groups():
        config_of(switch)


def test_a_name_that_is_nearly_right() -> None:
    assert refused(lambda: config_of("--optim.generator-rl", "1e-3"), r"did you mean (--optim\.generator-lr)")
    config_of("--optim.generator-lr", "1e-3")


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("samples", [13, 7, 31])
def test_a_batch_that_is_larger_than_the_data(samples: int, tmp_path: Path) -> None:
    data = make_features(tmp_path / "data", splits={"train": [samples], "val": [8]})
    most = refused(lambda: stream_of(data, "stream.global_batch=64"), r"set stream\.global_batch to (\d+) or less")[1]
    words = [*SMALL, "--data", data, "--output", tmp_path / "run", f"stream.global_batch={most}", "train.epochs=1"]
    assert call(train.main, *map(str, words)) == (0, "")


def test_a_share_of_a_mixture_that_gives_no_rows(tmp_path: Path) -> None:
    one, two = (make_features(tmp_path / name, splits={"train": [37], "val": [8]}) for name in ("one", "two"))
    words = [f"--data={two}", "stream.global_batch=16"]
    found = refused(lambda: stream_of(one, *words, "stream.weights=1000000,1"), r"data set 2 .* share of ([\d.e-]+) or")
    share = float(found[1])
    stream_of(one, *words, f"stream.weights={1 - share},{share}")


def test_balanced_sampling_of_several_labels(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data", label_kind="multi")
    words = ["stream.global_batch=16", "stream.sampling="]
    kind = refused(lambda: stream_of(data, words[0], f"{words[1]}balanced"), "use (epoch)")[1]
    stream_of(data, words[0], words[1] + kind)


def test_a_shard_that_is_larger_than_the_cache(tmp_path: Path) -> None:
    server = FaultyServer()
    server.files = {"/s-1.tar": body_of(1)}
    try:
        store = open_store(server.url, cache=str(tmp_path), cache_bytes=SHARD_BYTES - 1)
        least = refused(lambda: store.open(shard_of(1)), r"set stream\.cache_gib to (\S+) or more")[1]
        open_store(server.url, cache=str(tmp_path), cache_bytes=int(float(least) * 2**30)).open(shard_of(1))
    finally:
        server.close()


def test_a_split_that_is_missing(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data", splits={"train": [90]})
    words = [*SMALL, "--output", tmp_path / "run", "train.epochs=1", "--data"]
    command = quoted(said_by(train.main, "has no split 'val'", *words, data))
    run_shards(*[word.replace("NEW", str(tmp_path / "new")) for word in command])
    assert call(train.main, *map(str, words), str(tmp_path / "new")) == (0, "")


def damage_sidecar(data: Path) -> None:
    (data / "train-000000.index.npz").write_bytes(b"damaged")


def lose_sidecar(data: Path) -> None:
    (data / "train-000000.index.npz").unlink()


def lose_manifest(data: Path) -> None:
    (data / "manifest.json").unlink()


def damage_manifest(data: Path) -> None:
    (data / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_sidecar, lose_sidecar, lose_manifest, damage_manifest])
def test_a_file_beside_the_shards_that_is_damaged(damage: Callable[[Path], None], tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    damage(data)

    def read() -> None:
        stream_of(data, "stream.global_batch=16")
        list(Stream(str(data), parse_arguments(["--preset", "smoke"])[0].stream, seed=0, image_size=32).readers[0])

    found = refused(read, "'python -m shards index")
    if "remove it and run" in found.string:
        (data / "manifest.json").unlink()
    run_shards(*quoted(found))
    read()


def test_a_manifest_that_is_there_and_one_whose_names_would_be_lost(tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data")
    flag = refused(lambda: run_shards("index", data), "pass (--overwrite) to")[1]
    run_shards("index", data, flag)
    assert load_manifest(data).classes == ["class 0", "class 1", "class 2"]
    damage_manifest(data)
    again = refused(
        lambda: run_shards("index", data, flag), "give them anew by (--classes), or remove (.*) to take what labels say"
    )
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    run_shards("index", data, flag, again[1], tmp_path / "names.txt")
    assert load_manifest(data).classes == ["a", "b", "c"]
    Path(again[2]).unlink()
    run_shards("index", data)
    assert load_manifest(data).classes == ["0", "1", "2"]


def test_a_damaged_shard_and_samples_without_labels(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    path = data / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 100])
    flag = refused(lambda: run_shards("index", data, "--overwrite"), "pass (--skip-bad) to")[1]
    run_shards("index", data, "--overwrite", flag)
    assert "train-000001.tar" not in [shard.name for shard in load_manifest(data).splits["train"]]
    bare = make_features(tmp_path / "bare", label_kind="none")
    shutil.copy(bare / "train-000000.tar", data / "train-000009.tar")
    path.write_bytes(whole)
    flag, value = refused(lambda: run_shards("index", data, "--overwrite"), "pass (--label-kind) (none)").groups()
    run_shards("index", data, "--overwrite", flag, value)
    assert load_manifest(data).label_kind == "none"


def test_an_output_of_other_data_and_shares_that_no_group_fits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill_folder(tmp_path / name, [f"{name}{i}" for i in range(60)])
    words = ["build", "folder", "--output", tmp_path / "data", "--processes", 1, "--val", 0, "--test", 0]
    run_shards(*words, tmp_path / "one")
    flag = refused(lambda: run_shards(*words, tmp_path / "two"), "pass (--overwrite) to")[1]
    run_shards(*words, tmp_path / "two", flag)
    for picture in (tmp_path / "one").glob("*.txt"):
        picture.write_text("the same for all")
    run_shards(*words, tmp_path / "one", flag)
    split = ["split", tmp_path / "data", "--output", tmp_path / "new", "--val", 0.2, "--processes", 1]
    flag, value = refused(lambda: run_shards(*split), "pass (--together) (images)").groups()
    run_shards(*split, flag, value)


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_that_goes_on_otherwise(tmp_path: Path) -> None:
    data, run = make_features(tmp_path / "data"), tmp_path / "run"
    words = [*SMALL, "--data", data, "--output", run, "train.epochs=1"]
    assert call(train.main, *map(str, words)) == (0, "")
    name, value, flag = said_by(
        train.main, r"trained with (\S+) (\S+), not .*: use that value, another --output, or (--resume never)", *words,
        "model.hidden_dim=24",
    ).groups()  # fmt: skip
    assert call(train.main, *map(str, words), f"{name}={value}") == (0, "")
    (run / "config.yaml").unlink()
    copy = said_by(train.main, r"restore it \((\S+) is a copy\), or begin anew by --resume never", *words)[1]
    shutil.copy(run / copy, run / "config.yaml")
    assert call(train.main, *map(str, words)) == (0, "")
    assert call(train.main, *map(str, words), "model.hidden_dim=24", *flag.split()) == (0, "")


def test_data_that_has_moved(tmp_path: Path) -> None:
    data, run = make_features(tmp_path / "data"), tmp_path / "run"
    words = [*SMALL, "--data", str(data), "--output", str(run), "train.epochs=1"]
    assert call(train.main, *words) == (0, "")
    data.rename(tmp_path / "moved")
    flag = said_by(evaluate.main, "name where it is by (--data)", run)[1]
    assert call(evaluate.main, str(run), "--no-baselines", flag, str(tmp_path / "moved")) == (0, "")


def test_word_vectors_of_another_size(tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data")
    words = ["red", "green", "blue", "square", "circle", "dog", "boat"]
    lines = [f"{word} {' '.join(map(str, np.ones(5) * i))}\n" for i, word in enumerate(words)]
    (tmp_path / "words.txt").write_text("".join(lines))
    given = [
        *SMALL,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "train.epochs=1",
        "model.image.name=test_efficientnet",
    ]
    given += ["model.image.image_size=32", "model.text.name=cnn", f"model.text.weights={tmp_path / 'words.txt'}"]
    size = said_by(train.main, r"model\.text\.word_dim is \d+ but .*: set it to (\d+)", *given)[1]
    assert call(train.main, *map(str, given), f"model.text.word_dim={size}") == (0, "")


def older(path: Path) -> None:
    path.write_text(re.sub(r'"version": \d+', '"version": 0', path.read_text()))


@pytest.mark.parametrize("damage", [older, lambda path: path.write_bytes(b"{"), lambda path: path.unlink()])
def test_what_is_damaged_is_embedded_and_indexed_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Sentences on embeddings and indexes say "embed again" and "index again": the commands that made them."""
    data, run, vectors, index = (tmp_path / name for name in ("data", "run", "vectors", "index"))
    save_untrained(run, make_features(data), small_config(8))
    commands = {
        "embed": (embed.main, [str(run), "--data", str(data), "--output", str(vectors), "--processes=1"]),
        "index": (build_index.main, [str(vectors), "--output", str(index)]),
        "search": (search.main, [str(index), "a dog", "--run", str(run)]),
    }
    for main, words in commands.values():
        assert call(main, *words)[0] in (0, 2)
    damaged = [
        (path, r"embed again|launchers/embed\.py", "index", "embed")
        for path in vectors.iterdir()
        if path.suffix == ".json"
    ]
    damaged += [(path, r"index again|launchers/index\.py", "search", "index") for path in index.glob("*.json")]
    for path, sentence, reader, maker in damaged:
        damage(path)
        main, words = commands[reader]
        said_by(main, sentence, *words)
        main, words = commands[maker]
        assert call(main, *words) == (0, ""), path
        main, words = commands[reader]
        assert path.name not in call(main, *words)[1]


# ---------------------------------------------------------------------------------------------- jobs of SLURM


@pytest.fixture
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("outside_slurm")
def test_what_a_node_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--preset", "smoke", "--data", "data", "--output", "run"]
    flag, value = refused(
        lambda: node.read_job([*words, "--processes-per-node", "0"]), "(--proc.*) is 0, .* whole number from (1) on"
    ).groups()
    node.read_job([*words, flag, value])
    monkeypatch.setattr("sys.argv", ["node", "start"])
    known = refused(node.main, "must be one of (check, run, rank)$")
    assert known[1].split(", ") == ["check", "run", "rank"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    refused(lambda: node.read_job([*words, "train.seed=1"]), "so is a job array, .* drop one")
    assert node.read_job(words).config.train.seed == 3
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert node.read_job([*words, "train.seed=1"]).config.train.seed == 1


@pytest.mark.usefixtures("outside_slurm")
def test_a_node_with_fewer_gpus_than_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--preset", "smoke", "--data", "data", "--output", str(tmp_path / "run"), "--processes-per-node"]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(node, "start", lambda *_: subprocess.Popen(["true"]))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        refused(lambda: node.run(node.read_job([*words, "2"])), "node 0 has 1 GPUs: take fewer processes or more GPUs")
        assert node.run(node.read_job([*words, "1"])) == 0
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
        assert node.run(node.read_job([*words, "2"])) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.mark.usefixtures("outside_slurm")
def test_a_job_whose_output_cannot_be_written(tmp_path: Path) -> None:
    data = make_features(tmp_path / "data")
    words = [*SMALL, "--data", str(data), "--output"]
    (tmp_path / "file").touch()
    refused(lambda: node.check(node.read_job([*words, str(tmp_path / "file" / "run")])), "name another folder")
    assert node.check(node.read_job([*words, str(tmp_path / "run")])) == 0


@pytest.mark.usefixtures("outside_slurm")
def test_a_job_that_has_begun_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = make_features(tmp_path / "data"), tmp_path / "run"
    words = [*SMALL, "--data", str(data), "--output", str(run), "--resume", "never", "train.seed="]

    def checked(job: str, restarts: int, seed: int) -> int:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        return node.check(node.read_job([*words[:-1], f"{words[-1]}{seed}"]))

    checked("7", 0, 3)
    config, _ = parse_arguments([*words[:-1], "train.seed=3"])
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "checkpoints" / "samples-000000000016").mkdir(parents=True)
    refused(lambda: checked("7", 1, 4), "job 7 has begun already: for --resume never submit a new one")
    assert checked("8", 0, 4) == 0
    assert (run / "earlier-1" / "checkpoints").is_dir()


# ---------------------------------------------------------------------------------------------- what is not one thing


def test_indexing_that_is_asked_for_in_part_or_twice(tmp_path: Path) -> None:
    data, run, vectors, index = (tmp_path / name for name in ("data", "run", "vectors", "index"))
    save_untrained(run, make_features(data), small_config(8))
    assert call(embed.main, str(run), "--data", str(data), "--output", str(vectors), "--processes=1") == (0, "")
    said_by(build_index.main, "more than one of --output, .* give one", vectors, "--output", index, "--add", vectors)
    assert call(build_index.main, str(vectors), "--output", str(index)) == (0, "")
    words = [index, "--query-encoders", "--remove", "test0-0000"]
    said_by(build_index.main, "--query-encoders goes with --output or alone", *words)
    assert call(build_index.main, *(str(word) for word in words if word != "--query-encoders")) == (0, "")


def test_a_run_on_other_data(tmp_path: Path) -> None:
    one, two = make_features(tmp_path / "one"), make_features(tmp_path / "two", seed=1)
    data, run = tmp_path / "data", tmp_path / "run"
    words = [*SMALL, "--data", str(data), "--output", str(run), "train.epochs=1"]
    data.symlink_to(one)
    assert call(train.main, *words) == (0, "")
    data.unlink()
    data.symlink_to(two)
    flag = said_by(train.main, "use the same data, another --output, or (--resume never)", *words)[1]
    assert call(train.main, *words, "--output", str(tmp_path / "another")) == (0, "")
    data.unlink()
    data.symlink_to(one)
    assert call(train.main, *words) == (0, "")
    data.unlink()
    data.symlink_to(two)
    assert call(train.main, *words, *flag.split()) == (0, "")
