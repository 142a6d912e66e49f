"""Passwords and signatures in URLs stay where they were given: in no report, no record and no message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cmgan_dist.data.source import public_data
from cmgan_dist.errors import BadInput
from cmgan_dist.report.run import write_report
from cmgan_dist.retrieval.pictures import open_pictures
from launchers import embed, evaluate, index, train
from tests.services.faulty_server import FaultyServer
from tests.toy import SMALL, call, save_untrained, small_config
from tune.options import Arguments
from tune.search import make_plan

SECRET = "secretword"


def signed(address: str) -> str:
    return f"{address.replace('://', f'://user:{SECRET}@')}?sig={SECRET}"


def test_the_secrets_of_a_url_are_written_nowhere(
    feature_data: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, config, server = feature_data(), small_config(8), FaultyServer()
    config.stream.cache = str(tmp_path / "cache")
    server.files = {f"/data/{path.name}": path.read_bytes() for path in data.iterdir()}
    url, run, made = signed(f"{server.url}/data"), tmp_path / "run", tmp_path / "made"
    try:
        save_untrained(run, data, config)
        assert call(evaluate.main, str(run), "--data", url, "--no-baselines") == (0, "")
        assert call(embed.main, str(run), "--data", url, "--output", str(made / "emb"), "--processes=1") == (0, "")
        assert call(index.main, str(made / "emb"), "--output", str(made / "index")) == (0, "")
        save_untrained(tmp_path / "other", feature_data("wide", dims=(9, 7)), config)
        code, said = call(evaluate.main, str(tmp_path / "other"), "--data", url)
        assert code == 2
    finally:
        server.close()
    written = [path for path in (*run.rglob("*"), *made.rglob("*")) if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert f"{server.url}/data" in (run / "evaluation.json").read_text()
    assert f"{server.url}/data" in (made / "emb" / "embeddings.json").read_text()
    assert f"{server.url}/data" in said
    assert SECRET not in said + "".join(capfd.readouterr())


def test_the_config_in_a_report_has_its_urls_without_secrets(tmp_path: Path) -> None:
    one, two = signed("https://one.org/a"), signed("s3://two/b")
    (tmp_path / "config.yaml").write_text(f'data: "{one}\\n{two}"\nname: {one}\n')
    page = write_report(tmp_path).read_text()
    assert SECRET not in page
    assert "https://one.org/a\\ns3://two/b" in page


def test_a_search_keeps_urls_without_secrets(
    feature_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.search.check_data", lambda *_: (1, {}))
    urls = [signed("https://one.org/a"), signed("s3://two/b")]
    assert public_data("\n".join(urls)) == "https://one.org/a\ns3://two/b"
    plan = make_plan(Arguments(preset="smoke", data="\n".join(urls), output=str(tmp_path / "search")))
    assert plan.identity["data"] == "https://one.org/a\ns3://two/b"
    assert plan.config.data == "\n".join(urls)


@pytest.fixture
def guarded(feature_data: Callable[..., Path]) -> Iterator[FaultyServer]:
    """A data set at a URL that asks for the password SECRET."""
    server = FaultyServer()
    server.files = {f"/data/{path.name}": path.read_bytes() for path in feature_data().iterdir()}
    server.password = SECRET
    yield server
    server.close()


def test_a_run_keeps_no_password_and_goes_on_when_it_is_given_again(
    guarded: FaultyServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, url = tmp_path / "run", signed(f"{guarded.url}/data")
    words = [*SMALL, "--output", str(run), "train.tracker=tensorboard", f"stream.cache={tmp_path / 'cache'}"]
    assert call(train.main, *words, "--data", url, "train.epochs=1") == (0, "")
    written = [path for path in run.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert any("tfevents" in path.name for path in written)
    assert f"data: {guarded.url}/data\n" in (run / "config.yaml").read_text()
    assert call(train.main, *words, "--data", url, "train.epochs=2") == (0, "")
    assert call(train.main, *words, "--data", url, "--dry-run") == (0, "")
    for shard in (tmp_path / "cache").iterdir():
        shard.unlink()
    for main, given in ((train.main, [*words, f"--data={guarded.url}/data"]), (evaluate.main, [str(run)])):
        code, said = call(main, *given)
        assert code == 2
        assert "may not be read (HTTP 401): check the credentials; a run and an index keep none" in said
    assert call(evaluate.main, str(run), "--data", url, "--no-baselines") == (0, "")
    assert SECRET not in "".join(capfd.readouterr())


def test_pictures_at_a_url_with_a_password_are_served_when_it_is_given(
    guarded: FaultyServer, raw_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    guarded.files = {f"/data/{path.name}": path.read_bytes() for path in raw_data().iterdir()}
    place = f"{guarded.url}/data"
    with pytest.raises(BadInput, match=r"keeps no password or signature of a URL: name the data by --data"):
        open_pictures("shards", place)
    pictures = open_pictures("shards", place, signed(place))
    assert pictures is not None
    assert pictures.read("train-000000", 0, "train0").startswith(b"\xff\xd8")
