"""Prompt sets: every format, the columns, and which rows go to direction, search and holdout."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from excise.config import PromptSection, PromptSource
from excise.errors import PromptError
from excise.prompts.sets import Prompt, PromptSet, load_prompt_sets, read_prompts

ROWS = [
    {"text": "What, if anything, is “it”?", "answer": "blue", "kind": "a"},
    {"text": "Where is the naïve orb kept?", "answer": "in a box", "kind": "b"},
    {"text": "Who said \"no\"?", "answer": "the clerk", "kind": "a"},
]  # fmt: skip
TEXTS = [row["text"] for row in ROWS]


def write_rows(path, rows, encoding="utf-8"):
    """The rows in the format that the file's suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding=encoding)
    else:
        path.write_text("".join(r["text"] + "\n" for r in rows), encoding=encoding)
    return path


def texts(found):
    return [prompt.text for prompt in found]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".JSONL"])
def test_every_format_gives_the_same_texts(tmp_path, suffix):
    path = write_rows(tmp_path / f"p{suffix.lower()}", ROWS)
    path = path.rename(tmp_path / f"q{suffix}")
    assert texts(read_prompts(PromptSource(source=str(path)))) == TEXTS
    assert texts(read_prompts(PromptSource(source=str(path)), limit=2)) == TEXTS[:2]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = write_rows(tmp_path / f"p{suffix}", ROWS, encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert texts(read_prompts(PromptSource(source=str(path)))) == TEXTS


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_and_blank_lines(tmp_path, ending):
    path = tmp_path / "p.txt"
    path.write_bytes(ending.join(["", "  first ", "   ", "second", ""]).encode())
    assert texts(read_prompts(PromptSource(source=str(path)))) == ["first", "second"]


def test_blank_rows_do_not_count_towards_the_limit(tmp_path):
    rows = [{"text": t} for t in ("a", " ", "", None, "b", "c")]
    path = write_rows(tmp_path / "p.jsonl", rows)
    path.write_text(path.read_text() + "\n\n")
    assert texts(read_prompts(PromptSource(source=str(path)), limit=3)) == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_answers_and_groups(tmp_path, suffix):
    rows = [{"q": r["text"], "truth": r["answer"], "kind": r["kind"]} for r in ROWS]
    path = str(write_rows(tmp_path / f"p{suffix}", rows))
    source = PromptSource(source=path, column="q", answer_column="truth", group_column="kind")
    expected = tuple(Prompt(r["text"], r["answer"], r["kind"]) for r in ROWS)
    assert read_prompts(source) == expected
    plain = read_prompts(PromptSource(source=path, column="q"))
    assert plain == tuple(Prompt(r["text"]) for r in ROWS)


def test_answers_that_are_no_text_are_written_out(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"text": "a", "answer": 3, "seen": False}])
    source = PromptSource(source=str(path), answer_column="answer", group_column="seen")
    assert read_prompts(source) == (Prompt("a", "3", "False"),)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_answer_is_no_answer(tmp_path, suffix):
    """Not the text "None", which scorers would look for in responses."""
    rows = [{"text": "a", "answer": None, "kind": None}, {"text": "b", "answer": "x", "kind": "k"}]
    path = write_rows(tmp_path / f"p{suffix}", rows)
    source = PromptSource(source=str(path), answer_column="answer", group_column="kind")
    assert read_prompts(source) == (Prompt("a", None, None), Prompt("b", "x", "k"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("field", ["column", "answer_column", "group_column"])
def test_a_column_that_is_not_there(tmp_path, suffix, field):
    path = write_rows(tmp_path / f"p{suffix}", ROWS)
    with pytest.raises(PromptError, match="no column 'question'") as error:
        read_prompts(PromptSource(source=str(path), **{field: "question"}))
    assert field != "column" or "text, answer, kind" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("p.jsonl", b"{\n", "line 1 is not valid JSON: .*column 2"),
        ("p.jsonl", b'"just a string"\n', "line 1: not a JSON object"),
        ("p.txt", b"\xff\xfe\x00", "line 1: it is not UTF-8 text"),
        ("p.parquet", b"PAR1 but no more", "parquet"),
        ("p.txt", b"\n \n", "is empty"),
        ("p.csv", b"text\n", "is empty"),
        ("p.json", b"[]", "use one of .txt, .jsonl, .csv, .parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=text):
        read_prompts(PromptSource(source=str(path)))


@pytest.mark.parametrize("name", ["none.txt", "owner/none.jsonl", "/none/at", "plain", "a/b/c"])
def test_names_that_are_neither_file_nor_dataset(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(PromptSource(source=name))


# -- dataset ids, read by the real library from a local folder that looks like one ---------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder owner/name with two splits; the working directory is its parent."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "test.jsonl", [{"text": "held", "answer": "x", "kind": "c"}])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_dataset_by_its_id(dataset):
    source = PromptSource(source="owner/name", answer_column="answer")
    assert read_prompts(source) == tuple(Prompt(r["text"], r["answer"]) for r in ROWS)
    assert texts(read_prompts(PromptSource(source="owner/name", split="test"))) == ["held"]
    assert texts(read_prompts(PromptSource(source="owner/name", split="train[1:]"))) == TEXTS[1:]


def test_what_a_dataset_does_not_have(dataset):
    with pytest.raises(PromptError, match=r"owner/name \(split other\) cannot be loaded"):
        read_prompts(PromptSource(source="owner/name", split="other"))
    with pytest.raises(PromptError, match="cannot be loaded"):
        read_prompts(PromptSource(source="owner/name", subset="other"))
    with pytest.raises(PromptError, match="no column 'question'"):
        read_prompts(PromptSource(source="owner/name", column="question"))


def test_a_dataset_with_broken_files(dataset):
    (dataset / "train.jsonl").write_text('{"text": "a"}\n{"text": [1}\n')
    with pytest.raises(PromptError, match="owner/name"):
        read_prompts(PromptSource(source="owner/name"))


def test_a_dataset_whose_files_disagree(dataset):
    (dataset / "train.jsonl").unlink()
    write_rows(dataset / "train-0.jsonl", ROWS)
    write_rows(dataset / "train-1.jsonl", [{"text": [1, 2], "other": 3}])
    with pytest.raises(PromptError, match="owner/name"):
        read_prompts(PromptSource(source="owner/name"))


def test_a_dataset_that_is_a_script_is_refused(dataset):
    for path in dataset.iterdir():
        path.unlink()
    (dataset / "name.py").write_text("import datasets\n")
    with pytest.raises(PromptError, match="owner/name"):
        read_prompts(PromptSource(source="owner/name"))


def test_a_dataset_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **kwargs):  # the Hub itself cannot be asked here
        raise ConnectionError("Couldn't reach 'owner/none' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(PromptError) as error:
        read_prompts(PromptSource(source="owner/none"))
    assert str(error.value).endswith("Couldn't reach 'owner/none' on the Hub")


def test_subset_and_revision_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def load_dataset(path, name=None, **kwargs):
        asked.update(kwargs, path=path, name=name)
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = PromptSource(source="owner/name", subset="s", revision="r", split="test")
    assert texts(read_prompts(source)) == ["a"]
    assert asked == {"path": "owner/name", "name": "s", "split": "test", "revision": "r"}


# -- which rows go where ---------------------------------------------------------------------------


def numbered(tmp_path, name, count):
    path = tmp_path / f"{name}.txt"
    path.write_text("".join(f"{name} {i}\n" for i in range(count)))
    return PromptSource(source=str(path))


def sets_of(tmp_path, files, **sizes):
    """The sets when `files` maps role -> number of rows; each role has its own file."""
    sources = {role: numbered(tmp_path, role, count) for role, count in files.items()}
    return load_prompt_sets(PromptSection(**sources, **sizes))


def span(prompt_set):
    """('file', first, last + 1) of a set of consecutive rows; () for an empty one."""
    parts = [p.text.split() for p in prompt_set.prompts]
    numbers = [int(number) for _, number in parts]
    if not numbers:
        return ()
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    return parts[0][0], numbers[0], numbers[-1] + 1


@pytest.mark.parametrize(
    ("files", "more", "expected"),
    [
        # one file: direction, then search, then holdout
        ({"target": 30}, {}, [("target", 0, 10), ("target", 10, 15), ("target", 15, 30)]),
        ({"target": 12}, {}, [("target", 0, 10), ("target", 10, 12), ()]),
        (
            {"target": 30},
            {"holdout_size": 4},
            [("target", 0, 10), ("target", 10, 15), ("target", 15, 19)],
        ),
        # an evaluation file: its rows after the first five are the holdout
        (
            {"target": 30, "target_eval": 9},
            {},
            [("target", 0, 10), ("target_eval", 0, 5), ("target_eval", 5, 9)],
        ),
        (
            {"target": 6, "target_eval": 3},
            {},
            [("target", 0, 6), ("target_eval", 0, 3), ()],
        ),
        # a holdout file as well
        (
            {"target": 30, "target_eval": 9, "target_holdout": 7},
            {},
            [("target", 0, 10), ("target_eval", 0, 5), ("target_holdout", 0, 7)],
        ),
        (
            {"target": 30, "target_holdout": 7},
            {"holdout_size": 2},
            [("target", 0, 10), ("target", 10, 15), ("target_holdout", 0, 2)],
        ),
    ],
)
def test_the_rows_of_each_role(tmp_path, files, more, expected):
    files = {**files, "contrast": 40}
    found = sets_of(tmp_path, files, direction_size=10, eval_size=5, confirm_size=0, **more)
    assert [span(s) for s in (found.target, found.target_eval, found.target_holdout)] == expected
    names = [s.role for s in found.all()]
    assert names == [
        "target", "contrast", "target_eval", "contrast_eval", "target_holdout", "contrast_holdout",
        "keep",
    ]  # fmt: skip
    held = more.get("holdout_size", 25)
    assert span(found.contrast_holdout) == ("contrast", 15, 15 + held)


@pytest.mark.parametrize(
    ("files", "more", "expected"),
    [
        # the holdout keeps a hundred rows before any go to `confirm`
        ({"target": 130}, {}, [("target", 15, 115), ("target", 115, 130)]),
        ({"target": 130}, {"confirm_size": 8}, [("target", 15, 122), ("target", 122, 130)]),
        ({"target": 115}, {}, [("target", 15, 115), ()]),
        ({"target": 60}, {"holdout_size": 4}, [("target", 15, 19), ("target", 19, 60)]),
        (
            {"target": 10, "target_eval": 150, "target_holdout": 7},
            {},
            [("target_holdout", 0, 7), ("target_eval", 5, 105)],
        ),
        ({"target": 130}, {"confirm_size": 0}, [("target", 15, 130), ()]),
    ],
)
def test_what_the_holdout_can_spare_confirms(tmp_path, files, more, expected):
    files = {**files, "contrast": 300}
    found = sets_of(tmp_path, files, direction_size=10, eval_size=5, **more)
    used = "target_confirm" in [s.role for s in found.all()]
    assert used == bool(expected[1])  # of both sides or of none
    assert span(found.target_holdout) == expected[0]
    assert span(found.target_confirm) == expected[1]


def test_a_prompt_that_confirms_stands_nowhere_else(tmp_path):
    numbers = {"target_eval": [0, 1, 2, 3, 7, 2, 4, 1, 5], "target_holdout": [1, 4, 6]}
    for name, rows in numbers.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"orb {number}\n" for number in rows))
    sources = {name: PromptSource(source=str(tmp_path / f"{name}.txt")) for name in numbers}
    plain = {side: numbered(tmp_path, side, 300) for side in ("target", "contrast")}
    found = load_prompt_sets(PromptSection(**plain, **sources, direction_size=5, eval_size=2))
    texts = [p.text for p in found.target_confirm.prompts]
    assert texts == ["orb 2", "orb 3", "orb 7", "orb 2", "orb 5"]


def test_no_row_that_the_search_sees_is_left_in_the_holdout(tmp_path):
    """Nor one of the direction, whichever files they come from, and however often it stands there."""
    names = ("target", "target_eval", "target_holdout")
    lines = {
        "target": [0, 1, 2, 1],
        "target_eval": [1, 10, 0, 11, 12, 10, 13],
        "target_holdout": [0, 10, 20, 11, 13, 2, 21, 10],
    }
    for name in names:
        text = "".join(f"orb {number}\n" for number in lines[name])
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {name: PromptSource(source=str(tmp_path / f"{name}.txt")) for name in names}
    sources["contrast"] = numbered(tmp_path, "contrast", 40)
    sizes = {"direction_size": 3, "eval_size": 2}

    def rows(*given):
        found = load_prompt_sets(
            PromptSection(**{n: sources[n] for n in (*given, "contrast")}, **sizes)
        )
        sets = (found.target, found.target_eval, found.target_holdout)
        return [[int(p.text.split()[1]) for p in one.prompts] for one in sets]

    assert rows(*names) == [[0, 1, 2], [10, 11], [20, 13, 21]]
    assert rows("target", "target_eval") == [[0, 1, 2], [10, 11], [12, 13]]
    (tmp_path / "target.txt").write_text("".join(f"orb {n}\n" for n in [0, 1, 2, 1, 3, 4, 3, 5, 0]))
    assert rows("target") == [[0, 1, 2], [3, 4], [5]]
    assert rows("target", "target_holdout") == [[0, 1, 2], [3, 4], [10, 20, 11, 13, 21, 10]]


def test_each_set_says_where_it_came_from(tmp_path):
    found = sets_of(
        tmp_path,
        {"target": 20, "contrast": 20, "target_eval": 9, "contrast_holdout": 3},
        direction_size=10,
        eval_size=5,
    )
    names = {s.role: s.source.rsplit("/", 1)[-1] for s in found.all()}
    assert names == {
        "target": "target.txt",
        "target_eval": "target_eval.txt",
        "target_holdout": "target_eval.txt",
        "contrast": "contrast.txt",
        "contrast_eval": "contrast.txt",
        "contrast_holdout": "contrast_holdout.txt",
        "keep": "builtin",
    }


def test_nothing_left_to_evaluate(tmp_path):
    with pytest.raises(PromptError, match="all of its rows are used for the direction") as error:
        sets_of(tmp_path, {"target": 10, "contrast": 20}, direction_size=10)
    assert "--target-eval" in str(error.value)


@pytest.mark.parametrize("side", ["target", "contrast"])
def test_a_side_that_nobody_named(tmp_path, side):
    other = "contrast" if side == "target" else "target"
    with pytest.raises(PromptError, match=f"no {side} prompts"):
        sets_of(tmp_path, {other: 20}, direction_size=10)


@pytest.mark.parametrize("role", ["", "_eval", "_holdout"])
def test_the_two_sides_must_differ_in_every_role(tmp_path, role):
    sources = {
        name: numbered(tmp_path, name, 20)
        for name in (
            "target", "contrast", "target_eval", "contrast_eval", "target_holdout",
            "contrast_holdout",
        )
    }  # fmt: skip
    load_prompt_sets(PromptSection(**sources))
    shared = tmp_path / "shared.txt"
    shared.write_text("own\ntarget 3\ntarget_eval 3\ntarget_holdout 3\n")
    sources[f"contrast{role}"] = PromptSource(source=str(shared))
    with pytest.raises(PromptError, match=f"target{role} and contrast{role} share 1 of their"):
        load_prompt_sets(PromptSection(**sources))


# -- the hash --------------------------------------------------------------------------------------


def made(*rows):
    return PromptSet("target", "x", tuple(Prompt(*row) for row in rows))


def test_the_hash_is_over_the_texts_in_order():
    assert made(["a"], ["é"]).sha256 == hashlib.sha256("a\0é\0".encode()).hexdigest()
    hashes = {
        made(*rows).sha256
        for rows in ([["a"], ["b"]], [["b"], ["a"]], [["ab"]], [["a"]], [["a"], ["b"], ["b"]])
    }
    assert len(hashes) == 5


def test_the_hash_does_not_depend_on_role_source_or_file_format(tmp_path):
    hashes = set()
    for suffix in (".txt", ".jsonl", ".csv", ".parquet"):
        path = str(write_rows(tmp_path / f"p{suffix}", ROWS))
        hashes.add(PromptSet(suffix, path, read_prompts(PromptSource(source=path))).sha256)
    assert len(hashes) == 1


def test_what_to_keep_is_read_from_every_source_once_and_never_from_another_set(tmp_path):
    sources = {name: numbered(tmp_path, name, 20) for name in ("target", "contrast")}
    mine = tmp_path / "mine.txt"
    mine.write_text("one\ncontrast 15\ntwo\ntarget 3\none\n")
    more = write_rows(tmp_path / "more.jsonl", [{"text": "two"}, {"text": "three"}])
    keep = tuple(PromptSource(source=str(path)) for path in (mine, more))
    sizes = {"direction_size": 10, "eval_size": 5}
    found = load_prompt_sets(PromptSection(**sources, **sizes, keep=keep)).keep
    assert (found.role, found.source) == ("keep", "mine.txt, more.jsonl")
    assert texts(found.prompts) == ["one", "two", "three"]
    nothing = load_prompt_sets(PromptSection(**sources, **sizes, keep=()))
    assert len(nothing.keep) == 0
    mine.write_text("contrast 15\n")
    with pytest.raises(PromptError, match=r"mine\.txt: the other sets of prompts hold all"):
        load_prompt_sets(PromptSection(**sources, **sizes, keep=keep[:1]))


def test_the_wide_set_that_ships_is_kept_unless_another_is_named(tmp_path):
    sources = {name: numbered(tmp_path, name, 20) for name in ("target", "contrast")}
    found = load_prompt_sets(PromptSection(**sources, direction_size=10)).keep
    assert found.source == "builtin"
    assert len(found) == 256
    assert len({prompt.group for prompt in found.prompts}) > 50
    fewer = load_prompt_sets(PromptSection(**sources, direction_size=10, keep_size=60)).keep
    assert len({prompt.group for prompt in fewer.prompts}) > 50


def test_sources_of_what_to_keep_take_turns_and_so_do_their_kinds(tmp_path):
    sources = {name: numbered(tmp_path, name, 20) for name in ("target", "contrast")}
    rows = [{"text": f"a {n}", "kind": "a"} for n in range(5)]
    rows += [{"text": f"b {n}", "kind": "b"} for n in range(5)]
    plain = numbered(tmp_path, "plain", 20)
    grouped = PromptSource(source=str(write_rows(tmp_path / "g.jsonl", rows)), group_column="kind")
    section = PromptSection(**sources, direction_size=10, keep=(plain, grouped), keep_size=6)
    found = load_prompt_sets(section)
    assert texts(found.keep.prompts) == ["plain 0", "a 0", "plain 1", "b 0", "plain 2", "a 1"]
    assert "keep" not in {s.role for s in found.without_keep().all() if len(s)}


# -- borderline prompts ----------------------------------------------------------------------------


def borderline(tmp_path: Path, rows: list[dict]):
    """The sets of a section whose borderline prompts are these rows."""
    path = tmp_path / "borderline.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for side in ("target", "contrast"):
        lines = "".join(f"{side} {n}\n" for n in range(9))
        (tmp_path / f"{side}.txt").write_text(lines, encoding="utf-8")
    sources = {side: {"source": str(tmp_path / f"{side}.txt")} for side in ("target", "contrast")}
    given = {"source": str(path), "group_column": "kind", "where": "label=safe"}
    tree = {**sources, "borderline": [given], "direction_size": 3, "eval_size": 3, "keep": []}
    return load_prompt_sets(PromptSection.model_validate(tree))


def test_borderline_prompts_are_the_rows_asked_for_and_most_are_held(tmp_path: Path):
    rows = [{"text": f"b{n}", "kind": "k", "label": ("unsafe", "safe")[n % 2]} for n in range(20)]
    rows.append({"text": "target 1", "kind": "k", "label": "safe"})  # another set's
    sets = borderline(tmp_path, rows)
    assert [p.text for p in sets.borderline_eval.prompts] == ["b1", "b3", "b5"]
    assert [p.text for p in sets.borderline_holdout.prompts] == [f"b{n}" for n in range(7, 20, 2)]
    assert {p.group for p in sets.borderline_eval.prompts} == {"k"}
    assert sets.borderline_eval.source == "borderline.jsonl"


def test_a_borderline_set_that_cannot_be_used_says_so(tmp_path: Path):
    with pytest.raises(PromptError, match="at least two"):
        borderline(tmp_path, [{"text": "b", "kind": "k", "label": "safe"}])
    with pytest.raises(PromptError, match=r"is empty.*prompts\.borderline=\[\]"):
        borderline(tmp_path, [{"text": "b", "kind": "k", "label": "unsafe"}])
    with pytest.raises(PromptError, match="no column 'label'"):
        borderline(tmp_path, [{"text": "b", "kind": "k"}])
