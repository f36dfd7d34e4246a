"""Values that break a parser, or grow without end, are a line with its place and no traceback."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.study import source, words
from tests.conftest import SMALL, Harness

VALUES = {
    "no such day": "2001-13-45",
    "no number": "!!int foo",
    "no number at all": "!!int ''",
    "no fraction": "!!float foo",
    "neither yes nor no": "!!bool foo",
    "no time": "!!timestamp foo",
    "six thousand digits": "1" * 6000,
    "as many in hexadecimal": "0x" + "f" * 6000,
}


def study(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def line_of(error: pytest.ExceptionInfo[UserError]) -> str:
    (line,) = str(error.value).splitlines()
    assert len(line) < 400
    return line


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("place", ["question: {}", "question: [a, {}]", "{}: 1"])
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, value: str, place: str) -> None:
    text = "name: small\n" + place.format(value if place[0] == "q" else f"? {value}\n")
    with pytest.raises(UserError) as error:
        source.load(study(tmp_path, text))
    assert "study.yaml:2: " in line_of(error)


@pytest.mark.parametrize(
    "value", [*VALUES.values(), "[" * 2000, "{a: " * 2000, "[" * 50 + "]" * 50]
)
def test_a_value_of_the_command_line_that_cannot_be_read_is_a_line(value: str) -> None:
    with pytest.raises(UserError) as error:
        source.parse_value(value)
    line_of(error)


def test_a_text_repeated_by_references_is_refused_before_it_is_large(tmp_path: Path) -> None:
    text = f"leaf: {'x' * 100_000}\nname: '{'${leaf}' * 3000}'\n"
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        source.load(study(tmp_path, text))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "too much text after interpolation" in line_of(error)
    assert most < 30_000_000


def test_references_that_double_at_every_level_are_refused(tmp_path: Path) -> None:
    levels = [f"a{n}: '${{a{n - 1}}}${{a{n - 1}}}'" for n in range(1, 30)]
    with pytest.raises(UserError) as error:
        source.load(study(tmp_path, "\n".join(["a0: xxxxxxxx", *levels])))
    assert "too much" in line_of(error)


def test_a_long_chain_of_references_is_a_line(tmp_path: Path) -> None:
    levels = [f"a{n}: ${{a{n - 1}}}" for n in range(1, 1000)]
    with pytest.raises(UserError) as error:
        source.load(study(tmp_path, "\n".join(["a0: x", *reversed(levels)])))
    assert all("references, one to the next" in line for line in str(error.value).splitlines())


def nested(levels: int) -> str:
    """Aliases of aliases: tenfold a level once it is printed."""
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(rows)


@pytest.mark.parametrize("text", [nested(40), "cat: 2001-13-45", "cat: !!int foo", "[" * 2000])
def test_files_of_words_are_read_or_refused_in_a_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "words.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        words.read_names("words.yaml", [tmp_path])
    line_of(error)
    (tmp_path / "words.yaml").write_text(text + f"\ntemplates: [{'*a39' if '&a' in text else 1}]")
    with pytest.raises(UserError) as error:
        words.read_templates("words.yaml", [tmp_path])
    line_of(error)


def test_the_command_says_it_in_a_line_and_ends_with_2(
    tmp_path: Path, study_file: Callable[..., Path], harness: Harness
) -> None:
    done = harness("grid", study_file(SMALL + "question: 2001-13-45\n"), check=2)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
