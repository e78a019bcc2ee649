"""The jobs file: what rows it makes, whose settings win, and that every fault of it is told with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import FleetRow
from lora_export.errors import InputError, JobsError
from lora_export.fleet import job_files
from lora_export.workflows.fleet.options import REFUSED, keys, read_rows


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with adapters, of which nothing but names is looked at."""
    for name in ("acme", "beta", ".hidden", "runs/x/checkpoint-5", "runs/y/checkpoint-5", "me/hub"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "README.md").touch()
    (tmp_path / "adapters" / "style.safetensors").touch()
    return tmp_path


def rows(folder: Path, text: str, name: str = "jobs.toml") -> dict[str, FleetRow]:
    (folder / name).write_text(text, encoding="utf-8")
    return {row.name: row for row in read_rows(folder / name)}


def faults(folder: Path, text: str, name: str = "jobs.toml") -> list[str]:
    """Each fault in words."""
    with pytest.raises(InputError) as caught:
        rows(folder, text, name)
    found = caught.value.as_json().get("faults")
    return list(found) if found else [f"{caught.value.where}: {caught.value.message()}"]


ONE = 'model = "owner/base"\n[[adapter]]\nadapter = "owner/lora"\n'


# --- rows ----------------------------------------------------------------------------------------------------


def test_jobs_row_beats_group_beats_base_beats_all(here: Path) -> None:
    (here / "more.csv").write_text("name,adapter,tolerance\nrow,adapters/acme,5\ngroup,adapters/beta,\n")
    found = rows(
        here,
        """
        tolerance = 2
        dtype = "float16"
        [base.one]
        model = "owner/one"
        tolerance = 3
        [base.two]
        model = "owner/two"
        [[adapter]]
        name = "base"
        base = "one"
        adapter = "owner/lora@v1"
        [[adapter]]
        name = "all"
        base = "two"
        adapter = "owner/lora"
        [[adapters]]
        base = "one"
        file = "more.csv"
        tolerance = 4
        """,
    )
    assert {n: r.options.validation.tolerance for n, r in found.items()} == {
        "all": 2, "base": 3, "group": 4, "row": 5,
    }  # fmt: skip
    assert {r.options.merge.dtype for r in found.values()} == {"float16"}
    assert (found["row"].model, found["row"].base) == ("owner/one", "one")
    assert found["base"].adapters == ("owner/lora@v1",) and found["row"].adapters == (str(here / "adapters/acme"),)


def test_jobs_glob_makes_a_row_of_each_adapter_named_by_what_it_left_open(here: Path) -> None:
    text = '[base.b]\nmodel = "owner/base"\n[[adapters]]\nglob = "adapters/{}"\n'
    assert set(rows(here, text.format("*"))) == {"acme", "beta", "runs", "me", "style"}
    assert set(rows(here, text.format("runs/*/checkpoint-5"))) == {"x", "y"}
    assert set(rows(here, text.format("**/checkpoint-*"))) == {"runs-x-checkpoint-5", "runs-y-checkpoint-5"}
    (here / "odd[1]").mkdir()
    (here / "odd[1]" / "adapters").symlink_to(here / "adapters")
    assert set(rows(here / "odd[1]", text.format("ac*"))) == {"acme"}
    assert set(rows(here, f'[base.b]\nmodel = "owner/b"\n[[adapters]]\nglob = "{here}/adapters/b*"\n')) == {"beta"}


def test_jobs_paths_are_relative_to_the_file_and_hub_ids_stay(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (here / "me.txt").touch()
    text = """
        text = "me.txt"
        [base.b]
        model = "adapters/acme"
        [[adapter]]
        name = "a"
        adapter = ["adapters/beta:0.7", "me/lora@v2:-0.5", "s3://bucket/lora:2"]
        combine = "linear"
        [[adapter]]
        name = "b"
        adapter = "gone"
    """
    found = rows(here, text)
    home = str(here / "adapters")
    assert found["a"].adapters == (f"{home}/beta:0.7", "me/lora@v2:-0.5", "s3://bucket/lora:2")
    assert found["a"].model == f"{home}/acme" and found["a"].options.validation.text == here / "me.txt"
    assert found["b"].adapters == (str(here / "gone"),)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jobs.csv", "\ufeffname,base,model,adapter,keep,no-merged-folder,max-shard-size\n"
                     'a,b,owner/base,"me/x:0.5;me/y",*down*;*up*,true,5GB\n\n,b,owner/base,me/z,,,\n'),
        ("jobs.jsonl", '{"name": "a", "base": "b", "model": "owner/base", "adapter": ["me/x:0.5", "me/y"], "keep": '
                       '["*down*", "*up*"], "no-merged-folder": true, "max-shard-size": 5000000000}\n\n'
                       '{"base": "b", "model": "owner/base", "adapter": "me/z", "keep": null}\n'),
        ("jobs.toml", '[base.b]\nmodel = "owner/base"\n[[adapter]]\nname = "a"\nadapter = ["me/x:0.5", "me/y"]\n'
                      'keep = ["*down*", "*up*"]\nno-merged-folder = true\nmax-shard-size = "5GB"\n'
                      '[[adapter]]\nadapter = "me/z"\n'),
    ],
)  # fmt: skip
def test_jobs_means_the_same_in_every_form(name: str, text: str, here: Path) -> None:
    found = rows(here, text, name)
    assert list(found) == ["a", "z"]
    a, z = found["a"], found["z"]
    assert (a.base, a.model, a.adapters) == ("b", "owner/base", ("me/x:0.5", "me/y"))
    assert a.options.export.quantization.keep == ("*down*", "*up*") and not a.options.merged_folder
    assert a.options.merge.max_shard_size == 5 * 10**9
    assert z.options.merged_folder and z.options.export.quantization.keep == ()


def test_jobs_base_is_named_after_its_model_where_it_has_no_name(here: Path) -> None:
    text = "model,adapter\nowner/base@v1,me/a\nother/base,me/b\nowner/base@v1,me/c\n"
    assert [r.base for r in rows(here, text, "j.csv").values()] == ["base", "other/base", "base"]


def test_jobs_rows_with_the_same_settings_share_their_options(here: Path) -> None:
    text = "model,adapter,precision,for\n" + "".join(f"owner/base,me/a{i},int4,hf\n" for i in range(50))
    found = list(rows(here, text, "j.csv").values())
    assert len({id(r.options) for r in found}) == 1 and [r.package.name for r in found[:2]] == ["a0", "a1"]


# --- options -------------------------------------------------------------------------------------------------


def test_options_have_the_defaults_of_the_commands(here: Path) -> None:
    row = rows(here, ONE)["lora"]
    from dataclasses import replace

    from lora_export.contracts import PackageOptions, StoryOptions

    cpu = replace(StoryOptions(), export=replace(StoryOptions().export, provider="cpu"))
    assert (row.options, row.package, row.target, row.keep) == (cpu, PackageOptions(), None, "run")


def test_options_of_runtime_are_named_and_kept_as_asked(here: Path) -> None:
    text = 'model = "o/b"\nfor = "triton"\nbackend = "python"\nlicense = "mit"\n[[adapter]]\nadapter = "me/a"\n'
    row = rows(here, text)["a"]
    assert (row.target, row.keep, row.package.name, row.package.backend) == ("triton", "package", "a", "python")
    assert row.package.licence == "mit"
    assert rows(here, f'publish = "both"\n{text}')["a"].keep == "both"


def test_options_memory_that_is_asked_for_holds_for_validation_too(here: Path) -> None:
    assert rows(here, f'max-memory = "3GB"\n{ONE}')["lora"].options.validation.max_memory == 3 * 10**9
    both = rows(here, f'max-memory = "3GB"\nvalidation-memory = "1GB"\n{ONE}')["lora"].options
    assert (both.merge.max_memory, both.validation.max_memory) == (3 * 10**9, 10**9)


def test_options_every_option_of_both_commands_is_a_key_or_refused() -> None:
    from lora_export.commands import configuration
    from lora_export.commands.main import cli

    own = {"base", "adapter", "for", "name"}
    for command in ("merge-and-export", "package"):
        assert set(configuration.options(cli.commands[command])) <= {*keys(), *REFUSED, *own}
    assert not set(keys()) & {*REFUSED, *own, "model", "glob", "file", "collection", "publish"}


# --- faults --------------------------------------------------------------------------------------------------

FAULTS = [
    ('precison = "int4"', "line 1: there is no key precison"),
    ('Precision = "int4"', "did you mean precision?"),
    ('text = "gone.txt"', "text = 'gone.txt': there is no such file"),
    ('PRECISION = "int4"', "did you mean precision?"),
    ("nonsense = 1", "an option of merge-and-export or package"),
    ('precision = "int5"', "line 1: precision = 'int5': 'int5' is not one of"),
    ("precision = true", "precision = true: true is not a text or a number"),
    ("precision = 2026-11-30", "is not a text or a number"),
    ("svd-rank = 1.5", "svd-rank = 1.5"),
    ("svd-rank = true", "svd-rank = true"),
    ('tolerance = "nan"', "tolerance = 'nan'"),
    ("tolerance = nan", "tolerance = nan"),
    ("tolerance = [1, 2]", "it takes one value"),
    ('margin = "90%"', "margin = '90%'"),
    ('max-shard-size = "5 potatoes"', "is not a size"),
    ('no-merged-folder = "yes"', "true or false"),
    ("no-merged-folder = 1", "true or false"),
    ("keep = [[1]]", "is not a text or a number"),
    ("force = true", "force is no key of a row"),
    ('graph-from = "x"', "share its graph without it"),
    ('output = "x"', "below ROOT"),
    ("json = true", "an option of lora-export fleet"),
    ('provider = "auto"', "depend on the machine"),
    ('for = "genei"', "one of genai"),
    ("for = 1", "one of genai"),
    ('backend = "python"', "backend without a runtime"),
    ('publish = "all"', "one of run, package, both"),
    ('publish = "package"', "for = RUNTIME with it"),
    ('keep = "both"', "publish = 'both'"),
    ("sessions = 3", "at least 6"),
    ('grid = "paper"\nbatch = 4', "--grid with --batch"),
    ('adapters = "x"', "adapters is not a table"),
    ("base = 5", "a table [base.NAME]"),
    ("base.x = 5", "a table with keys and values"),
]


@pytest.mark.parametrize(("line", "told"), FAULTS)
def test_jobs_faulty_setting_is_told_with_its_place(line: str, told: str, here: Path) -> None:
    (found,) = faults(here, f"{line}\n{ONE}")
    assert told in found and "jobs.toml" in found


ROWS = [
    ("", "has no row"),
    ("[[adapter]]", "there is no adapter"),
    ('[[adapter]]\nadapter = ""', "adapter = ''"),
    ("[[adapter]]\nadapter = []", "adapter = []"),
    ('[[adapter]]\nadapter = ["me/a", 3]', "adapter = ['me/a', 3]"),
    ('[[adapter]]\nadapter = "me/a:nan"', "the weight of 'me/a:nan' is nan"),
    ('[[adapter]]\nadapter = "me/a:1e999"', "is 1e999"),
    ('[[adapter]]\nadapter = "me/a"\nname = "a/b"', "name = 'a/b' cannot be"),
    ('[[adapter]]\nadapter = "me/a"\nname = ".."', "name = '..'"),
    ('[[adapter]]\nadapter = "me/a"\nname = ".a"', "name = '.a'"),
    ('[[adapter]]\nadapter = "me/a"\nname = "a\\nb"', "cannot be the name"),
    ('[[adapter]]\nadapter = "me/a"\nname = true', "name = True"),
    (f'[[adapter]]\nadapter = "me/a"\nname = "{"a" * 201}"', "at most 200 bytes"),
    ('[[adapter]]\nadapter = "me/a"\nbase = "smoll"', "there is no base 'smoll'"),
    ('[[adapter]]\nadapter = "me/a"\nbase = "smol"\nmodel = "o/b"', "a model of its own, and so has this row"),
    ('[[adapter]]\nadapter = "me/a"\nmodel = 3', "model = 3"),
    ('[base.none]\n[[adapter]]\nadapter = "me/a"\nbase = "none"', "the base has no model"),
    ('[adapter]\nadapter = "me/a"', "[adapter] is one table"),
    ("[[adapters]]", "there is nothing that names adapters"),
    ("[[adapters]]\nglob = 5", "glob is not a text"),
    ('[[adapters]]\nglob = "x"\nfile = "y"', "it has glob and file"),
    ('[[adapters]]\nglob = "nothing/*"', "matches no adapter"),
    ('[[adapters]]\nglob = "s3://bucket/*"', "is a URL"),
    ('[[adapters]]\nglob = "a**b"', "'a**b'"),
    ('[[adapters]]\nfile = "gone.csv"', "there is no such file"),
    ('[[adapters]]\nfile = "jobs.toml"', "a file .csv or .jsonl"),
    ('[[adapters]]\ncollection = "owner/slug-1"', "HF_HUB_OFFLINE is set"),
]


@pytest.mark.parametrize(("text", "told"), ROWS)
def test_jobs_faulty_row_is_told_with_its_place(text: str, told: str, here: Path) -> None:
    head = '[base.smol]\nmodel = "owner/base"\n' if text else ""
    found = "; ".join(faults(here, f"{head}{text}\n"))
    assert told in found and "jobs.toml" in found
    assert ("did you mean smol?" in found) == ("smoll" in text)


def test_jobs_two_rows_of_one_name_are_told_with_both_places(here: Path) -> None:
    (found,) = faults(here, "model,adapter\nowner/base,me/a\nowner/base,you/a\n", "jobs.csv")
    assert "jobs.csv, line 3" in found and "'a' is also the name of a row at jobs.csv, line 2" in found


def test_jobs_every_fault_is_told_once_in_the_order_of_lines(here: Path) -> None:
    lines = [f"owner/base,me/a{i},{'int5' if i % 2 else 'int4'}" for i in range(200)]
    found = faults(here, "model,adapter,precisoin\n" + "\n".join(lines) + "\nowner/base,me/a\n", "jobs.csv")
    assert len(found) == 2 and "did you mean precision?" in found[0] and "line 202: 2 cells" in found[1]
    found = faults(here, "model,adapter,precision\n" + "\n".join(lines) + "\n", "jobs.csv")
    assert [f"line {n}:" in f for n, f in zip(range(3, 202, 2), found, strict=True)] == [True] * 100
    with pytest.raises(JobsError, match=r"and 75 more, which --json lists"):
        read_rows(here / "jobs.csv")
    assert len(faults(here, f'tolerance = 0\nmargin = "9"\n{ONE}')) == 2  # of defaults once, whatever the rows


BROKEN = [
    ("jobs.toml", b"x = ", "not TOML"),
    ("jobs.toml", b"x = " + b"[" * 5000 + b"]" * 5000, "not TOML"),
    ("jobs.csv", b"model,adapter\n\xff\xfe,1\n", "line 2 is not UTF-8"),
    ("jobs.csv", b"model;adapter\no/b;me/a\n", "columns with commas"),
    ("jobs.csv", b'model,adapter\n"o/b,me/a\n', "not CSV"),
    ("jobs.csv", b"model,adapter,model\no/b,me/a,o/b\n", "two columns are called model"),
    ("jobs.csv", b"model,adapter,\no/b,me/a,x\n", "column 3 has no name"),
    ("jobs.csv", b"model,adapter\n", "has no row"),
    ("jobs.jsonl", b'{"model": "o/b"', "this is not JSON"),
    ("jobs.jsonl", b"[1]\n", "an object, {"),
    ("jobs.jsonl", b"[" * 5000 + b"\n", "this is not JSON"),
    ("jobs.jsonl", b'{"model": "o/b", "model": "o/c", "adapter": "me/a"}\n', "the key model stands twice"),
    ("jobs.jsonl", b'{"model": "o/b", "adapter": "\\ud800/a"}\n', "this is not JSON"),
    ("jobs.yaml", b"", "ends in .yaml"),
]


@pytest.mark.parametrize(("name", "raw", "told"), BROKEN)
def test_jobs_broken_file_is_refused(name: str, raw: bytes, told: str, here: Path) -> None:
    (here / name).write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_rows(here / name)
    assert told in caught.value.message() and name in str(caught.value.where)


def test_jobs_what_is_no_file_or_too_much_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (here / "none.csv", here):
        with pytest.raises(InputError):
            read_rows(path)
    many = "model,adapter\n" + "o/b,me/a\n" * 3
    monkeypatch.setattr(job_files, "MOST_ROWS", 2)
    assert "more than 2 rows" in faults(here, many, "jobs.csv")[0]
    monkeypatch.setattr(job_files, "LONGEST_LINE", 50)
    long = json.dumps({"model": "o/b", "adapter": "a" * 50})
    assert "characters" in faults(here, long, "jobs.jsonl")[0]
    monkeypatch.setattr(job_files, "LARGEST", 20)
    assert "a jobs file of more than" in faults(here, many, "jobs.csv")[0]


def test_jobs_collection_is_a_row_of_each_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        def __init__(self, item_id: str, item_type: str) -> None:
            self.item_id, self.item_type = item_id, item_type

    class Collection:
        items = (Item("me/one", "model"), Item("me/data", "dataset"), Item("me/two", "model"))

    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.get_collection", lambda slug: asked.append(slug) or Collection)
    found = rows(here, '[base.b]\nmodel = "o/b"\n[[adapters]]\ncollection = "me/all-5"\n')
    assert {n: r.adapters for n, r in found.items()} == {"one": ("me/one",), "two": ("me/two",)}
    assert asked == ["me/all-5"]
