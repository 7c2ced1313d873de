"""run.toml: templates load, mistakes are explained with their lines, the hash names the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.errors import SpecError, StorageError, UsageError
from shoal.protocol.limits import SPEC_BYTES
from shoal.training.spec import InnerSection, ModelSection, RunSection, RunSpec, StagesSection
from shoal.training.spec_file import from_canonical, load, parse, write_template
from shoal.training.spec_text import SECTIONS, render
from shoal.training.templates import TEMPLATES


def problems(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse(text, "run.toml")
    return str(caught.value).split("\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_loads_as_the_spec_it_was_written_from(template: str, tmp_path: Path) -> None:
    write_template(template, tmp_path / "run.toml")
    assert load(tmp_path / "run.toml") == TEMPLATES[template]


def test_every_key_of_a_template_has_a_comment_and_a_description() -> None:
    lines = render(RunSpec()).split("\n")
    for section, kind in SECTIONS.items():
        assert f"[{section}]" in lines
        for key, field in kind.model_fields.items():
            assert field.description, f"{section}.{key}"
            at = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
            assert lines[at - 1].startswith("# May be: ")
            assert lines[at - 2].startswith("# ")


def test_an_empty_file_is_the_default_spec() -> None:
    assert parse("", "run.toml") == RunSpec()


def test_a_template_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        write_template("tiny", path)
    assert path.read_text() == "precious"


def test_an_unknown_template_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiny, small, 125m, 1b"):
        write_template("7b", tmp_path / "run.toml")


def test_an_unknown_key_gets_the_nearest_one_and_its_line() -> None:
    assert problems("[inner]\n# fast\nlearning_rte = 0.1\n") == [
        "run.toml:3: inner.learning_rte is not a key; did you mean learning_rate?"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[inner]\nwidth = 3", "run.toml:2: inner.width is not a key; width belongs under [model]"),
        ("sequence = 64", "run.toml:1: sequence is not a key; sequence belongs under [model]"),
        ("warmup_token = 64", "run.toml:1: warmup_token is not a key; did you mean inner.warmup_tokens?"),
        ("[modle]\nlayers = 2", "run.toml:1: modle is not a section; did you mean model?"),
        ("\nmodel = 3", "run.toml:2: model must be a section: [model] on a line of its own, its keys below"),
        ("[model]\n\nlayers = 0", "run.toml:3: model.layers = 0: must be an integer from 1 to 512"),
        ('model.layers = "4"', 'run.toml:1: model.layers = "4": must be an integer from 1 to 512'),
        ("[inner]\nbeta1 = 1", "run.toml:2: inner.beta1 = 1: must be a number from 0 and below 1"),
        (
            "[inner]\nclip_norm = nan",
            "run.toml:2: inner.clip_norm = NaN: must be a number of at least 0 and finite",
        ),
        ("[model]\ndtype = 'half'", 'run.toml:2: model.dtype = "half": must be one of "float32", "bfloat16"'),
        (
            "[model]\nlayers = 1979-05-27",
            'run.toml:2: model.layers = "1979-05-27": must be an integer from 1 to 512',
        ),
        ("[model]\nwidth = 100\nheads = 3", "run.toml:2: model: width must be heads times an even head size"),
        ("[stages]\n\ncount = 9", "run.toml:3: stages.count = 9 is more than model.layers = 4"),
        ("[stages]\ncount = 2\nfirst_layers = [0]", "run.toml:3: stages.first_layers names 1 stages"),
        ("[stages]\nfirst_layers = [0, 4]", "run.toml:2: stages.first_layers must start at 0 and rise"),
        ("[model]\ntie_embeddings = true", "run.toml:2: model.tie_embeddings needs stages.count = 1"),
        ("[data]\nsource = 'jsonl'", 'run.toml:2: data: source = "jsonl" needs paths'),
        ("[data]\nvocabulary = 256", 'run.toml:2: data: tokenizer = "bytes" needs vocabulary 257'),
        ("[model]\nlayers = 3\nlayers = 4", "run.toml:3: not TOML: Cannot overwrite a value"),
        ("[model", "run.toml:1: not TOML: Expected ']'"),
        ("x = " + "9" * 5000, "run.toml: not TOML that can be read"),
        ("x = " + "[" * 5000, "run.toml: not TOML that can be read"),
        ("x = 0x" + "f" * 9000, "run.toml: not TOML that can be read"),
        ("[data]\npaths = " + "[" * 240 + "]" * 240, "run.toml:1: "),
    ],
)
def test_a_mistake_is_explained(text: str, expected: str) -> None:
    (line,) = problems(text)
    assert line.startswith(expected)


def test_all_mistakes_come_at_once_in_the_order_of_their_lines() -> None:
    data = '[data]\npaths = [\n  "a",\n  3,\n]\nsauce = """\nx = 3\n"""\n'
    text = f"[inner]\nclip_norm = -1\n\n{data}[model]\nlayers = 0\n"
    assert [line.split(" ")[0] for line in problems(text)] == [
        "run.toml:2:",
        "run.toml:5:",
        "run.toml:9:",
        "run.toml:13:",
    ]


def test_the_list_of_mistakes_is_bounded() -> None:
    lines = problems("\n".join(f"{'key' * 500}{number} = {number}" for number in range(40)))
    assert len(lines) == 21
    assert lines[-1] == "and 20 more"
    assert max(map(len, lines)) < 300


def test_a_file_is_refused_that_is_not_there_too_large_or_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(SpecError, match="shoal init"):
        load(path)
    path.write_bytes(b"# " + b"x" * SPEC_BYTES)
    with pytest.raises(SpecError, match="larger than"):
        load(path)
    path.write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(SpecError, match=r"run\.toml:2: not UTF-8"):
        load(path)
    with pytest.raises(StorageError, match="cannot be read"):
        load(tmp_path)


def test_windows_line_ends_do_not_shift_the_lines() -> None:
    assert problems("[model]\r\n\r\nlayers = 0\r\n")[0].startswith("run.toml:3:")


def test_the_hash_names_the_values_not_the_way_they_are_written() -> None:
    one = parse("[inner]\nlearning_rate = 1\n[model]\nlayers = 8", "a")
    other = parse("model.layers = 0x8\ninner.learning_rate = 1.0", "b")
    assert one.run_id() == other.run_id()
    assert one.run_id() != RunSpec().run_id()
    assert len(one.run_id()) == 32


@given(
    name=st.from_regex(r"[A-Za-z0-9 ._-]{1,32}", fullmatch=True),
    seed=st.integers(0, 2**63 - 1),
    learning_rate=st.floats(1e-12, 1e6),
    layers=st.integers(2, 512),
    starts=st.sets(st.integers(1, 511)),
)
def test_a_spec_survives_toml_and_the_network(
    name: str, seed: int, learning_rate: float, layers: int, starts: set[int]
) -> None:
    first_layers = tuple(sorted({0} | {start for start in starts if start < layers})[:256])
    spec = RunSpec(
        run=RunSection(name=name, seed=seed),
        model=ModelSection(layers=layers),
        stages=StagesSection(count=len(first_layers), first_layers=first_layers),
        inner=InnerSection(learning_rate=learning_rate),
    )
    assert parse(render(spec), "run.toml") == spec
    assert from_canonical(spec.canonical()).run_id() == spec.run_id()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 10_000,
        RunSpec().canonical() + b" ",
        RunSpec().canonical().replace(b":4,", b":4.0,"),
        RunSpec().canonical().replace(b'"layers":4', b'"layers":-4'),
        RunSpec().canonical().replace(b'"layers":4', b'"layers":"4"'),
        RunSpec().canonical().replace(b'"layers":4', b'"layers":4,"layers":4'),
        RunSpec().canonical().replace(b'"layers":4', b'"layers":4,"moe":8'),
        RunSpec().canonical().replace(b'"layers":4', b'"layers":NaN'),
        RunSpec().canonical().replace(b'"layers"', b'"\\u001b[31m' + b"x" * 1000 + b'"'),
        b'{"run":"' + b"x" * SPEC_BYTES,
    ],
)
def test_a_spec_from_the_network_is_canonical_or_refused(data: bytes) -> None:
    with pytest.raises(SpecError) as caught:
        from_canonical(data)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_specs_are_refused_cleanly(noise: bytes, at: int) -> None:
    good = RunSpec().canonical()
    damaged = good[:at] + noise + good[at + len(noise) :]
    if damaged != good:
        try:
            spec = from_canonical(damaged)
        except SpecError:
            return
        assert spec.canonical() == damaged


def test_specs_cannot_be_changed() -> None:
    spec = RunSpec()
    with pytest.raises(ValidationError):
        spec.model.layers = 5
    assert json.loads(spec.canonical())["model"]["layers"] == 4
