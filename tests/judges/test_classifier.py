"""Tests of classifiers as judges, on one of the real class that is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import judge_models
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from excise.config import JudgeSection
from excise.errors import ConfigError, ModelError
from excise.judges.classifier import Classifier, is_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judge_models.classifier(tmp_path_factory.mktemp("judge"), judge_models.exchanges(150))


def test_it_says_what_the_model_says_of_each_pair_alone(folder: Path):
    """In batches, sorted by length and padded: the same as one at a time with Transformers."""
    rows = judge_models.exchanges(40, seed=3)
    judge = Classifier(JudgeSection(batch=7), folder, "small")
    said = [one.value for one in judge.verdicts([one for one, _ in rows])]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for (one, _), verdict in zip(rows, said, strict=True):
        logits = model(**tokenizer(one.prompt, one.response, return_tensors="pt")).logits
        assert model.config.id2label[int(logits.argmax())] == verdict
    assert sum(v == true for v, (_, true) in zip(said, rows, strict=True)) >= 38


def test_labels_of_its_own_are_given_a_meaning(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match="has the labels LABEL_0, LABEL_1, LABEL_2: say what each"
    ):
        Classifier(JudgeSection(), tmp_path, "small")
    labels = ("LABEL_0=answers", "LABEL_1=answers", "LABEL_2=shows")
    judge = Classifier(JudgeSection(labels=labels), tmp_path, "small")
    rows = judge_models.exchanges(30, seed=4)
    said = [one.value for one in judge.verdicts([one for one, _ in rows])]
    assert set(said) == {"shows", "answers"}
    with pytest.raises(ConfigError, match="no label 'LABEL_9'"):
        Classifier(JudgeSection(labels=(*labels, "LABEL_9=other")), tmp_path, "small")


def test_a_text_longer_than_the_model_reads_is_cut(folder: Path):
    (one, _), *_ = judge_models.exchanges(1)
    long = type(one)(one.prompt * 90, one.response * 90)
    assert len(Classifier(JudgeSection(), folder, "small").verdicts([long, one])) == 2


def test_a_folder_that_is_no_classifier_is_known_as_such(folder: Path, tiny: Path, tmp_path: Path):
    assert is_classifier(folder)
    assert not is_classifier(tiny / "model")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        Classifier(JudgeSection(), tmp_path, "empty")
