"""`shoal checkpoint`: what a user types, what comes back, and with which exit code."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from checkpoint_world import spec_of, write_stages

from shoal.node import paths
from shoal.node.cli.app import main
from shoal.node.exporting import Exports
from shoal.training import spec_file
from shoal.training.checkpoint.manifest import MANIFEST, SPEC
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.spec import RunSpec


class Answer(NamedTuple):
    code: int
    out: str
    errors: str


class Shoal(Protocol):
    def __call__(self, *arguments: object) -> Answer: ...


@pytest.fixture
def shoal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shoal:
    """Runs `shoal checkpoint ...` in a data folder of its own."""
    monkeypatch.setenv(paths.ENVIRONMENT_KEY, str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["shoal", "checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, errors = capsys.readouterr()
        return Answer(int(exit_.value.code or 0), out, errors)

    return run


def peer_folder(tmp_path: Path, number: int = 0) -> Path:
    return tmp_path / "data" / f"peer-{number}" / "0123456789abcdef" / "checkpoints"


@pytest.fixture
def whole(tmp_path: Path) -> Checkpoint:
    return write_stages(peer_folder(tmp_path), spec_of(2))


def test_the_page_exports_the_newest_checkpoint_that_is_whole_and_says_where(
    tmp_path: Path, whole: Checkpoint
) -> None:
    (write_stages(peer_folder(tmp_path), spec_of(2)).path / "embedding.safetensors").unlink()
    write_stages(peer_folder(tmp_path), spec_of(2), "stage-1", range(1, 2))

    async def exported(folder: Path) -> dict[str, Any]:
        async with Exports(folder) as exports:
            assert await exports.actions["checkpoint_export"]({}) == {"running": True}
        told = await exports.actions["checkpoint_exported"]({})  # once it has ended
        assert isinstance(told, dict)
        return told

    made = asyncio.run(exported(peer_folder(tmp_path).parent))
    assert Path(made["path"]).name == whole.path.name
    assert made["bytes"] == sum(file.stat().st_size for file in Path(made["path"]).iterdir())
    assert asyncio.run(exported(peer_folder(tmp_path).parent)) == made, "it is there already"
    assert "no whole checkpoint" in asyncio.run(exported(tmp_path))["why_not"]


def test_list_shows_what_is_here_and_what_is_damaged(shoal: Shoal, tmp_path: Path, whole: Checkpoint) -> None:
    part = write_stages(peer_folder(tmp_path, 1), spec_of(2), "stage-1", range(1, 2))
    (write_stages(peer_folder(tmp_path), spec_of(2)).path / "embedding.safetensors").unlink()
    rows = {row["path"]: row for row in json.loads(shoal("list", "--json").out)}
    assert len(rows) == 3
    good = rows[str(whole.path)]
    assert (good["state"], good["whole"], good["heights"], good["digest"]) == (
        "good",
        True,
        [8, 9],
        whole.digest,
    )
    assert (rows[str(part.path)]["whole"], rows[str(part.path)]["stages"]) == (False, [1])
    (damaged,) = (row for row in rows.values() if row["state"] == "damaged")
    assert "embedding.safetensors: it is missing" in damaged["fault"]
    table = shoal("list")
    assert "000001-whole" in table.out
    assert "damaged" in table.out
    assert "embedding.safetensors" in table.errors


@pytest.mark.parametrize("how", ["path", "name", "digest", "newest"])
def test_verify_reads_to_the_last_byte(shoal: Shoal, whole: Checkpoint, how: str) -> None:
    names: dict[str, list[object]] = {
        "path": [whole.path],
        "name": [whole.path.name],
        "digest": [whole.digest[:8]],
        "newest": [],
    }
    which = names[how]
    answer = shoal("verify", *which, "--json")
    assert answer.code == 0
    assert json.loads(answer.out) | {"verified": True, "digest": whole.digest} == json.loads(answer.out)
    file = whole.path / "layers.3.feedforward.up.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    answer = shoal("verify", *which)
    assert answer.code == 20
    assert "layers.3.feedforward.up.safetensors" in answer.errors
    assert "shoal checkpoint list" in answer.errors


def test_export_takes_the_newest_whole_one(shoal: Shoal, tmp_path: Path, whole: Checkpoint) -> None:
    write_stages(peer_folder(tmp_path, 1), spec_of(2), "stage-1", range(1, 2))
    answer = shoal("export", "--to", tmp_path / "hf", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["digest"] == whole.digest
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_import_writes_a_run_that_starts_from_it(shoal: Shoal, tmp_path: Path, whole: Checkpoint) -> None:
    shoal("export", "--to", tmp_path / "hf")
    answer = shoal("import", tmp_path / "hf", "--to", tmp_path / "run.toml", "--stages", 4, "--json")
    assert answer.code == 0
    spec = spec_file.load(tmp_path / "run.toml")
    assert spec.checkpoint.start == json.loads(answer.out)["digest"]
    assert spec.stages.count == 4
    assert spec.model.width == whole.spec.model.width
    again = shoal("import", tmp_path / "hf", "--to", tmp_path / "again.toml", "--stages", 4, "--json")
    assert json.loads(again.out)["path"] == json.loads(answer.out)["path"], "it is kept once"


def test_a_checkpoint_is_taken_in_with_all_that_was_counted(shoal: Shoal, tmp_path: Path) -> None:
    elsewhere = write_stages(tmp_path / "usb", spec_of(2))
    answer = shoal("import", elsewhere.path, "--json")
    assert json.loads(answer.out)["digest"] == elsewhere.digest
    assert spec_file.load(Path("run.toml")).checkpoint.start == elsewhere.digest
    bare = shoal("import", elsewhere.path, "--weights-only", "--to", "bare.toml", "--json")
    assert json.loads(bare.out)["log_tokens"] == 0


def test_a_checkpoint_that_names_a_path_for_its_tokenizer_gets_nothing_written_there(
    shoal: Shoal, tmp_path: Path
) -> None:
    """What was: a file of its own, copied to any place that the user may write to."""
    target = tmp_path / "home" / SPEC
    target.parent.mkdir()
    values = spec_of(2).model_dump()
    values["data"] |= {"tokenizer": str(target), "tokenizer_blake3": "0" * 64}
    hostile = write_stages(tmp_path / "usb", RunSpec.model_validate(values))
    answer = shoal("import", hostile.path)
    assert answer.code == 0
    assert not target.exists()


@pytest.mark.parametrize("command", ["verify", "import"])
def test_a_name_that_no_file_can_have_is_no_bug_of_ours(shoal: Shoal, command: str) -> None:
    answer = shoal(command, "x" * 300)
    assert answer.code == 2
    assert "bug" not in answer.errors


def test_what_a_hostile_folder_is_called_does_not_reach_the_terminal(shoal: Shoal, whole: Checkpoint) -> None:
    (whole.path / "\x1b]0;mine\x07\u202e").touch()
    (whole.path / os.fsdecode(b"\xff")).touch()
    for command in ("verify", "list"):
        answer = shoal(command, *([whole.path] if command == "verify" else []))
        assert "it was not written with the checkpoint" in answer.errors
        assert (answer.out + answer.errors).replace("\n", "").isprintable()


def test_parts_on_this_machine_make_a_whole(shoal: Shoal, tmp_path: Path) -> None:
    spec = spec_of(2)
    for number in (0, 1):
        write_stages(peer_folder(tmp_path, number), spec, f"stage-{number}", range(number, number + 1))
    answer = shoal("gather", "--json")
    assert answer.code == 0
    made = json.loads(answer.out)
    assert (made["whole"], made["heights"]) == (True, [8, 9])
    assert made["digest"] == write_stages(tmp_path / "other", spec).digest
    assert shoal("verify").code == 0


def test_who_waits_for_a_peer_that_was_started_anew_is_told(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: it waited for ever, for nobody knew any more what it had asked for."""
    known = {"asked": 4, "finished": 3, "done_bytes": 0, "total_bytes": 0, "result": {}}

    async def one_peer(*_: object) -> list[tuple[Path, dict[str, str]]]:
        return [(tmp_path, {"name": "ann", "peer": "1"})]

    async def ask(path: Path, what: str) -> dict[str, object]:
        if what == "checkpoint":
            return {"number": 4}
        told = dict(known)
        known.update({"asked": 0, "finished": 0})
        return told

    monkeypatch.setattr("shoal.node.cli.checkpoint.daemons", one_peer)
    monkeypatch.setattr("shoal.node.control.ask", ask)
    answer = shoal("now")
    assert answer.code == 11
    assert "started anew" in answer.errors


REFUSALS: dict[str, tuple[list[object], int, list[str]]] = {
    "nothing here": (["verify"], 2, ["no whole checkpoint", "shoal checkpoint now"]),
    "no such": (["verify", "000009-whole"], 2, ["000009-whole", "shoal checkpoint list"]),
    "nobody runs": (["now"], 11, ["shoal join"]),
    "no parts": (["gather"], 2, ["parts of no run", "PART..."]),
    "no model": (["import", "/tmp"], 2, ["neither a checkpoint", "config.json"]),
    "no folder": (["import", "/nowhere"], 2, ["/nowhere"]),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_names_the_cause_and_what_to_do(shoal: Shoal, kind: str) -> None:
    arguments, code, told = REFUSALS[kind]
    answer = shoal(*arguments)
    assert answer.code == code
    for text in told:
        assert text in answer.errors
    assert "Traceback" not in answer.errors


def test_refusals_about_what_is_there(shoal: Shoal, tmp_path: Path, whole: Checkpoint) -> None:
    (tmp_path / "hf").mkdir()
    answer = shoal("export", "--to", tmp_path / "hf")
    assert (answer.code, "exists and is left as it is" in answer.errors) == (2, True)
    (tmp_path / "run.toml").write_text("mine")
    answer = shoal("import", whole.path)
    assert (answer.code, "run.toml exists" in answer.errors) == (2, True)
    assert not (tmp_path / "data" / "checkpoints").exists(), "refused before anything was copied"
    answer = shoal("import", whole.path, "--to", "new.toml", "--stages", 9)
    assert (answer.code, "stages.count = 9" in answer.errors) == (2, True)


def test_a_stage_that_nobody_saved_is_named(shoal: Shoal, tmp_path: Path) -> None:
    write_stages(peer_folder(tmp_path), spec_of(2), "stage-0", range(1))
    answer = shoal("gather")
    assert answer.code == 2
    assert "no part has layer" in answer.errors
    other = spec_of(4)
    write_stages(peer_folder(tmp_path, 1), other, "stage-1", range(1, 2))
    answer = shoal("gather")
    assert answer.code == 2
    assert "name the parts" in answer.errors


def test_an_interrupted_write_is_no_checkpoint(shoal: Shoal, tmp_path: Path, whole: Checkpoint) -> None:
    (whole.path / MANIFEST).unlink()
    shutil.copytree(whole.path, whole.path.with_name(".partial-x-whole"))
    answer = shoal("verify", whole.path)
    assert answer.code == 20
    assert "manifest.json: it is missing" in answer.errors
    assert len(json.loads(shoal("list", "--json").out)) == 1
