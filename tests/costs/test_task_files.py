from __future__ import annotations

import pytest

from excise.costs.task_files import read_task
from excise.errors import ConfigError

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{ thing }} is"
doc_to_choice: colours
doc_to_target: right
"""
ROWS = """{"thing": "sky", "colours": ["blue", "red"], "right": 0}
{"thing": "sun", "colours": ["mauve", "gold"], "right": 1}
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "colours.jsonl").write_text(ROWS)

    def write(text=CHOICE):
        path = tmp_path / "colours.yaml"
        path.write_text(text)
        return path

    return write


def test_a_task_file_is_read_with_its_samples(task):
    found = read_task(task())
    sample = found["samples"][1]
    assert len(found["samples"]) == 2
    assert found["doc_to_text"](sample) == "The sun is"
    assert found["doc_to_choice"](sample) == ["mauve", "gold"]
    assert found["doc_to_target"](sample) == 1
    listed = CHOICE.replace("doc_to_choice: colours", "doc_to_choice: ['no', '{{ thing }}']")
    listed = listed.replace("doc_to_target: right", "doc_to_target: '{{ right }}'")
    found = read_task(task(listed))
    assert found["doc_to_choice"](sample) == ["no", "sun"]
    assert found["doc_to_target"](sample) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("doc_to_text: ", "process_docs: !function utils.run\ndoc_to_text: ", "names code"),
        ("doc_to_text: ", "process_docs: !!python/name:os.system \ndoc_to_text: ", "task file"),
        ("doc_to_text: ", "process_results: x\ndoc_to_text: ", "process_results"),
        ("task: colours", "task: &a colours\nbase: *a", "aliases"),
        ("task: colours", "include: other.yaml\ntask: colours", "include"),
        ("dataset_path: json", "dataset_path: someone/set", "dataset_path"),
        ("colours.jsonl", "../colours.jsonl", "not beside"),
        ("colours.jsonl", "/etc/passwd", "not beside"),
        ("colours.jsonl", "gone.jsonl", "gone.jsonl"),
        ("{{ thing }} is", "{{ thing.__class__.__mro__ }}", "unsafe"),
        ("{{ thing }} is", "{{ nothing }}", "undefined"),
        ("{{ thing }} is", "{{ thing", "expected"),
        ("doc_to_choice: colours", "doc_to_choice: thing", "no list"),
        ("right", "right\nmetric_list: [{metric: someone/metric}]", "metric"),
        ("task: colours", "task: [", "not a task file"),
    ],
)
def test_what_names_code_or_cannot_be_read_is_refused(task, old, new, words):
    with pytest.raises(ConfigError, match=words):
        read_task(task(CHOICE.replace(old, new)))


@pytest.mark.parametrize("rows", ["", "[1]\n", "{\n", "\n\n"])
def test_samples_that_are_none(task, tmp_path, rows):
    (tmp_path / "colours.jsonl").write_text(rows)
    with pytest.raises(ConfigError):
        read_task(task())
