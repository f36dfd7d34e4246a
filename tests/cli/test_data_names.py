"""`harness data`: names from elsewhere, and mistakes, in one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from harness.cli.main import command_line
from harness.data.pack import pack

ODD = "a\x1b[2J\x07b\x9b31mc"


def run(*arguments: object, check: int = 0) -> Result:
    done = CliRunner().invoke(command_line(), [str(a) for a in arguments])
    assert done.exit_code == check, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set whose keys and classes hold what a terminal obeys, and new lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_ROOT", str(tmp_path / "runs"))
    with open("m.jsonl", "w") as file:
        for number in range(6):
            Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(f"{number}.png")
            row = {"path": f"{number}.png", "key": f"{number}{ODD}", "class": f"{ODD}\nx"}
            file.write(json.dumps({**row, "split": "pretrain" if number < 4 else "test"}) + "\n")
    pack("m.jsonl", tmp_path / "set")
    return tmp_path / "set"


def test_no_name_of_a_set_speaks_to_the_terminal(odd: Path) -> None:
    (shard,) = (odd / "test").glob("*.tar")
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"IHDR") + 6] ^= 1
    shard.write_bytes(raw)
    outputs = [
        run("data", "sample", odd, "--count", 3).output,
        run("data", "sample", odd, "--count", 3, "--json").output,
        run("data", "verify", odd, check=1).output,
        run("data", "verify", odd, "--json", check=1).output,
        run("data", "show", odd, "--out", "sheet.png").output,
        run("data", "show", odd, "--out", "sheet.png", "--label", "xx", check=2).output,
        run("data", "overlap", odd, odd, "--split-b", "test", check=1).output,
    ]
    for text in outputs:
        assert not {c for c in text if c != "\n" and not c.isprintable()}, text
    shown = "a\\x1b[2J\\x07b\\x9b31mc"
    assert outputs[0].count(shown) == 3 and len(outputs[0].splitlines()) == 4
    assert f"sample 4{shown}: " in outputs[2] or f"sample 5{shown}: " in outputs[2]
    assert all(key.endswith(ODD) for key in json.loads(outputs[1])["keys"])


@pytest.mark.parametrize("value", ["1e12", "nan", "inf", "0.5"])
def test_a_resampling_beyond_all_measure_is_a_mistake_in_one_line(value: str, odd: Path) -> None:
    done = run("data", "sample", odd, "--resample", value, check=2)
    assert "1" in done.stderr and "1000" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["torchvision:CIFAR10", "food-101"])
def test_a_layout_in_place_of_a_folder_is_told_where_it_goes(name: str, tmp_path: Path) -> None:
    done = run("data", "pack", name, "--out", tmp_path / "z", check=4)
    assert f"harness data pack FOLDER --layout {name}" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "z").exists()
