"""Decoding is strict and says everything at once; recipes compose in the promised order."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.config.recipe import dump_yaml, load_recipe, load_yaml, merge, override
from osler.config.schema import TAGGED, Ge, Lt, PositiveInt, config, decode, encode, range_of
from osler.runtime.errors import UserError


@config
class Adam:
    type: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@config
class Muon:
    type: Literal["muon"] = "muon"
    lr: float = 0.02
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95

    def __post_init__(self) -> None:
        if self.lr > self.momentum:
            raise ValueError(f"lr {self.lr} is above momentum {self.momentum}")


@config
class Stage:
    seq_len: int
    rows: PositiveInt | None = 8


@config
class Fussy:
    size: int

    def __post_init__(self) -> None:
        raise UserError("choose a smaller size")


@config
class Run:
    steps: int
    name: str = "run"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    optim: Annotated[Adam | Muon, TAGGED] = Adam(lr=5e-4)
    second: Annotated[Adam | Muon, TAGGED] | None = None
    only: Adam = Adam()
    stages: tuple[Stage, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: int | Literal["auto"] = "auto"
    folder: Path | None = None


def message(mapping: Any, cls: type = Run) -> str:
    with pytest.raises(UserError) as caught:
        decode(cls, mapping)
    return str(caught.value)


class TestDecode:
    @pytest.mark.parametrize(
        ("mapping", "fields"),
        [
            ({}, {}),
            ({"optim": {"lr": 1, "betas": [0, 0.5]}}, {"optim": Adam(lr=1.0, betas=(0.0, 0.5))}),
            ({"stages": [{"seq_len": 8}], "folder": "a/b"}, {"stages": (Stage(seq_len=8),), "folder": Path("a/b")}),
            ({"optim": {"type": "muon"}, "second": {"type": "adamw"}}, {"optim": Muon(), "second": Adam()}),
            # The default of the field is Adam(lr=5e-4), not Adam(): defaults are below the recipe at every depth.
            ({"optim": {"betas": [0.1, 0.2]}}, {"optim": Adam(lr=5e-4, betas=(0.1, 0.2))}),
            ({"optim": {"type": "adamw"}}, {"optim": Adam(lr=5e-4)}),
            ({"optim": Muon(lr=0.1)}, {"optim": Muon(lr=0.1)}),
        ],
    )
    def test_what_is_given_is_converted_and_completed_with_the_defaults_of_the_field(self, mapping, fields):
        before = copy.deepcopy(mapping)
        run = decode(Run, {"steps": 1, **mapping})
        assert run == Run(steps=1, **fields) and mapping == before and type(run.optim.lr) is float

    @pytest.mark.parametrize(
        ("key", "value"),
        [("steps", "3"), ("steps", 3.5), ("steps", True), ("steps", None), ("name", 3), ("compile", 1)],
    )
    def test_types_are_strict(self, key, value):
        assert key in message({"steps": 1, key: value})

    def test_unknown_key_without_a_near_one_lists_the_known(self):
        assert "zzz: unknown key; known: rows, seq_len" in message({"seq_len": 1, "zzz": 2}, Stage)

    @pytest.mark.parametrize(
        ("mapping", "said"),
        [
            ({"betas": [0, 1]}, "betas: unknown key; did you mean `only.betas` or `optim.betas` (with optim.type=adamw)"),
            ({"lr": 1}, "lr: unknown key; did you mean `only.lr` or `optim.lr` or `second.lr`?"),
            ({"momentun": 1}, "momentun: unknown key; did you mean `optim.momentum` (with optim.type=muon)"),
            ({"only": {"steps": 5}}, "only.steps: unknown key; did you mean `steps`?"),
            ({"stages": [{"seq_len": 1, "row": 2}]}, "stages[0].row: unknown key; did you mean `stages[0].rows`?"),
            ({"optim": {"momentum": 0.5}}, "optim.momentum: unknown key of this type; it needs optim.type=muon, given 0.5"),
            ({"optim": {"momentun": 1}}, "did you mean `optim.momentum` (with optim.type=muon)?, given 1"),
            ({"only": {"typ": 1}}, "only.typ: unknown key; did you mean `only.type`?"),
            ({"stages": [{"seq_len": 1, "type": 2}]}, "stages[0].type: unknown key; did you mean `dtype`?"),
            ({"optim": {"type": "muon", "momentun": 0.9}}, "optim.momentun: unknown key; did you mean `optim.momentum`?"),
            ({"optim": {"type": "moun"}}, "optim: unknown type `moun`; did you mean `muon`?"),
            ({"second": {"lr": 1}}, "second: needs `type`, one of: adamw, muon"),
            ({"optim": {"type": "muon", "lr": 1.5}, "name": 2}, "optim: lr 1.5 is above momentum 0.95"),
            ({"optim": {"type": "muon", "lr": 1.5}, "name": 2}, "name: should be text"),
            ({"steps": 2e9}, "steps: should be an integer (write 2000000000)"),
            ({"dtype": "bf61"}, "dtype: should be 'auto', 'bf16' or 'fp32'; did you mean `bf16`?"),
        ],
    )
    def test_a_mistake_is_named_from_the_top_with_what_may_be_meant(self, mapping, said):
        assert said in message({"steps": 1, **mapping})

    def test_all_errors_at_once_one_line_each(self):
        text = message({"name": 1, "stages": [{"seq_len": 1}, {"seq_len": "x"}], "weights": {"a": "b"}, "rows": "many"})
        assert text.splitlines() == [
            "the configuration: 5 errors",
            "  steps: is required and missing",
            "  name: should be text, given 1",
            '  stages[1].seq_len: should be an integer, given "x"',
            '  weights.a: should be a number, given "b"',
            "  rows: should be an integer or 'auto', given \"many\"",
        ]

    def test_of_more_errors_than_anybody_reads_the_first_are_named(self):
        """A mapping may come over the network, and a message longer than it would take as long to write."""
        lines = message({"steps": 1, "weights": {f"w{number}": "x" for number in range(50_000)}}).splitlines()
        assert lines[0] == "the configuration: more than 20 errors, the first of which are" and len(lines) == 21
        assert lines[1] == '  weights.w0: should be a number, given "x"'
        assert message({f"k{number}": 1 for number in range(19)}).startswith("the configuration: 20 errors\n")

    def test_no_line_is_headed_by_the_name_of_a_class(self):
        assert message({"type": "muon", "momentum": 2.0}, Muon) == (
            "the configuration: 1 error\n  momentum: must be at least 0 and below 1, given 2.0"
        )
        assert message({"type": "muon", "lr": 2.0}, Muon) == "the configuration: 1 error\n  lr 2.0 is above momentum 0.95"
        assert message([], Muon) == "the configuration: should be a mapping of keys to values, given []"

    def test_a_number_out_of_its_range_is_named_with_the_range(self):
        stages = [{"seq_len": 1, "rows": None}, {"seq_len": 1, "rows": 0}]
        text = message({"steps": 1, "stages": stages, "optim": {"type": "muon", "momentum": 1}})
        assert "  stages[1].rows: must be at least 1, given 0" in text and "stages[0]" not in text
        assert "  optim.momentum: must be at least 0 and below 1, given 1" in text
        with pytest.raises(ValueError, match=r"^momentum must be at least 0 and below 1, given nan$"):
            Muon(momentum=float("nan"))
        with pytest.raises(ValueError, match="rows must be at least 1, given 0"):
            Stage(seq_len=1, rows=0)
        assert range_of(PositiveInt | None) == "at least 1" and range_of(int | None) == ""

    def test_user_errors_of_post_init_name_the_source(self):
        with pytest.raises(match=r"my\.yaml: choose a smaller size"):
            decode(Fussy, {"size": 1}, source="my.yaml")
        with pytest.raises(match=r"^my\.yaml: 1 error"):
            decode(Run, {}, source="my.yaml")

    @pytest.mark.parametrize("mapping", [[], "text", None, {"steps": {1, 2}}, {"steps": object()}])
    def test_nonsense_is_a_user_error(self, mapping):
        with pytest.raises(UserError):
            decode(Run, mapping)

    @settings(max_examples=40, deadline=None)
    @given(
        st.builds(
            Run,
            steps=st.integers(),
            name=st.text(st.characters(exclude_categories=["Cs"])),
            dtype=st.sampled_from(["auto", "bf16", "fp32"]),
            optim=st.builds(Adam, lr=st.floats(allow_nan=False, allow_infinity=False)) | st.builds(Muon, lr=st.floats(0, 0.9)),
            second=st.none() | st.builds(Muon),
            stages=st.lists(st.builds(Stage, seq_len=st.integers(1, 9)), max_size=3).map(tuple),
            weights=st.dictionaries(st.text("abc.", max_size=3), st.floats(0, 1), max_size=3),
            rows=st.integers() | st.just("auto"),
            folder=st.none() | st.just(Path("a")),
        )
    )
    def test_encode_is_the_inverse_through_yaml(self, run):
        assert decode(Run, encode(run)) == run
        assert decode(Run, load_yaml(dump_yaml(encode(run)), "test")) == run


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 1e-3), ("1e3", 1000.0), ("2.5E9", 2.5e9), (".5", 0.5), ("-.inf", float("-inf")),
            ("1_000", 1000), ("010", 10), ("-3", -3), ("0x10", 16),
            ("true", True), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
            ("null", None), ("~", None), ("", None), ("'3'", "3"), ("1.2.3", "1.2.3"), ("e3", "e3"),
        ],
    )  # fmt: skip
    def test_scalars(self, text, value):
        parsed = load_yaml(text, "test")
        assert parsed == value and type(parsed) is type(value)

    @pytest.mark.parametrize(
        "text",
        [
            "a: 1\na: 2", "{a: 1, a: 2}", "x:\n  - {b: 1, b: 1}", "1: 2", "? [a]\n: 1", "[", "a: *b", "a: b: c", "\x00",
            "!!python/object:os.system {}",
        ],
    )  # fmt: skip
    def test_keys_given_twice_and_what_is_no_plain_yaml_are_refused(self, text):
        with pytest.raises(UserError, match="test.*given twice" if text.count("1") == 2 else "test"):
            load_yaml(text, "test")

    @settings(max_examples=40, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])) | st.floats(allow_nan=False) | st.integers())
    def test_dump_then_load(self, value):
        assert load_yaml(dump_yaml({"key": [value]}), "test") == {"key": [value]}

    @pytest.mark.parametrize("text", ["no", "1:30", "1e-3", "2024-01-01", "010", "", "~", "<<", "true"])
    def test_text_that_some_reader_would_misread_is_quoted(self, text):
        import yaml

        assert yaml.safe_load(dump_yaml({"key": text})) == {"key": text}


def test_mappings_merge_lists_and_types_replace():
    below = {"a": {"x": 1, "y": 2}, "l": [1, 2], "optim": {"type": "adamw", "betas": [0, 0]}}
    before = copy.deepcopy(below)
    merged = merge(below, {"a": {"y": 3}, "l": [4], "optim": {"lr": 1}})
    assert merged == {"a": {"x": 1, "y": 3}, "l": [4], "optim": {"type": "adamw", "betas": [0, 0], "lr": 1}}
    assert merge(below, {"optim": {"type": "muon"}})["optim"] == {"type": "muon"} and below == before


class TestOverrides:
    def test_values_are_yaml(self):
        overrides = ["optim.lr=3e-4", "name=a b", "stages=[{seq_len: 8}]", "x=null", "y=''", "z=a=b", "u.v=1", "u.v=2"]
        assert override({}, overrides) == {
            "optim": {"lr": 3e-4}, "name": "a b", "stages": [{"seq_len": 8}], "x": None, "y": "", "z": "a=b", "u": {"v": 2},
        }  # fmt: skip

    def test_order_of_type_and_field_does_not_matter(self):
        recipe = {"optim": {"type": "adamw", "betas": [0, 0]}}
        for overrides in (["optim.lr=1", "optim.type=muon"], ["optim.type=muon", "optim.lr=1"]):
            assert override(recipe, overrides) == {"optim": {"type": "muon", "lr": 1}}

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["a.b="], "has no value"),
            *(([text], "write key.path=value") for text in ("a", "=1", "a..b=1", ".a=1", "[0]=1", "l[x]=1", "l[0]a=1")),
            (["a=[1"], "not valid YAML"),
            (["a=1", "a.b=2"], r"a is not a mapping; give a=... as a whole, such as a='{type: NAME, b: VALUE}'"),
            (["l.0=1"], r"l is a list: name an element, as in l\[0\]"),
            (["l[2].x=1"], r"l has no element \[2\]; it has 2, counted from \[0\]"),
            (["a[0]=1"], r"a is not given here; give a=\[...\] as a whole"),
            (["m[0]=1"], "m is no list"),
            (["l[0].x[0]=1"], r"l\[0\].x is no list"),
            (["l=[]", "l[0].x=1"], r"l has no element \[0\]"),
        ],
    )
    def test_malformed_ones_are_refused_and_named(self, overrides, said):
        with pytest.raises(UserError, match=f"override `{re.escape(overrides[-1])}`.*{said}"):
            override({"l": [{"x": 1}, {}], "m": {"n": 1}}, overrides)

    def test_elements_of_lists(self):
        """Their keys come in any order, another type replaces the element, and the recipe stays as it is."""
        recipe = {"data": {"sources": [{"type": "hub", "name": "a"}, {"type": "hub", "name": "b", "exams": [{"n": 1}, 2]}]}}
        before = copy.deepcopy(recipe)
        overrides = ["data.sources[1].exams[0].n=3", "data.sources[0].path=x", "data.sources[0].type=files", "data.root=y"]
        assert override(recipe, overrides)["data"] == {
            "sources": [{"type": "files", "path": "x"}, {"type": "hub", "name": "b", "exams": [{"n": 3}, 2]}], "root": "y",
        }  # fmt: skip
        assert override(recipe, ["data.sources[1].w=3", "data.sources=[{w: 1}, {w: 2}]"])["data"] == {
            "sources": [{"w": 1}, {"w": 3}]
        }
        assert recipe == before


class TestRecipes:
    def write(self, folder: Path, **files: str) -> Path:
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)
        return folder

    def test_bases_build_on_one_another(self, tmp_path):
        self.write(
            tmp_path,
            one="{a: 1, b: 1, c: 1, d: 1}",
            two="{b: 2, c: 2, d: 2}",
            left="base: one",
            top="{description: x, base: [one, left, two.yaml], c: 3, d: 3}",
            mid="base: pure-tiny\nmodel: {num_layers: 2}",
            chain="base: mid\nmodel: {head_dim: 32}",
            stages="first: {base: left, d: 9}\nsecond: {base: two.yaml}",
            shorter="base: stages\nfirst: {a: 0}",
        )
        assert load_recipe(tmp_path / "top.yaml", ["d=4"]) == {"a": 1, "b": 2, "c": 3, "d": 4}
        model = load_recipe(tmp_path / "chain.yaml")["model"]
        assert (model["num_layers"], model["head_dim"], model["hidden_size"]) == (2, 32, 512)
        stages = {"first": {"a": 0, "b": 1, "c": 1, "d": 9}, "second": {"b": 2, "c": 2, "d": 2}}
        assert load_recipe(tmp_path / "shorter.yaml") == stages

    def test_circle_is_refused(self, tmp_path):
        self.write(tmp_path, x="base: y", y="base: z", z="base: x")
        with pytest.raises(match="x → y → z → x"):
            load_recipe(tmp_path / "x.yaml")

    def test_an_unknown_recipe_or_base_is_named(self, tmp_path):
        with pytest.raises(match=r"known: .*pure-large"):
            load_recipe("zzzzzzzzz")
        self.write(tmp_path, top="base: nowhere-at-all")
        with pytest.raises(match=r"top\.yaml: there is no recipe `nowhere-at-all`"):
            load_recipe(tmp_path / "top.yaml")
        with pytest.raises(match="no recipe file"):
            load_recipe(tmp_path / "absent.yaml")

    MALFORMED = ("[1]", "base: 3", "base: [1]", "a: 1\na: 2", "a: [", "[" * 10_000, b"\xff\xfe\x00")

    @pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
    def test_malformed_files_are_refused_with_their_name(self, tmp_path, text):
        (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=r"bad\.yaml"):
            load_recipe(tmp_path / "bad.yaml")
