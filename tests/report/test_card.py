"""The model card: what it says and must not say; nothing in a record becomes markup."""

from __future__ import annotations

import ast
import re
import shlex
from html.parser import HTMLParser
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from records import HASH, SECRET_PROMPT, hostile_record, make_record, minimal_record, nats, rate

from excise.config import load_config
from excise.errors import InputError, RunStateError
from excise.formats import FORMATS
from excise.record import Record, ScoreRecord
from excise.report.card import model_card
from excise.report.formatting import measured
from excise.report.markdown import Markdown, code, environment, fence, plain
from excise.report.rerun_command import command
from excise.report.views import front_points


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)


def rendered_tags(markdown: str) -> set[str]:
    """The elements that a renderer which lets HTML through makes of it."""
    parser = _Tags()
    parser.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return parser.seen


def test_metadata_is_read_back_by_the_hub_client() -> None:
    data = ModelCard(model_card(make_record())).data.to_dict()
    assert data["base_model"] == "example-labs/Lantern-1B-Instruct"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert {"excise", "model-editing"} <= set(data["tags"])


def test_metadata_of_an_adapter() -> None:
    data = ModelCard(model_card(make_record(), artifact_format="adapter")).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")


def test_a_local_base_model_is_not_announced_as_a_hub_model() -> None:
    card = model_card(minimal_record())
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()
    assert "`tiny` (a local folder)" in card
    assert "/models" not in card


def introduction(record: Record) -> str:
    return ModelCard(model_card(record)).content.split("---\n", 2)[2].strip().split("\n\n")[1]


def test_it_says_plainly_what_was_edited_and_what_came_of_it() -> None:
    first = introduction(make_record())
    assert "to show less of one behaviour, **declining questions about guarded objects**" in first
    assert "changed on purpose" in first
    assert "that the search never saw, the edit removes" in first


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (0.95, 0.02, "removes nearly all"),
        (0.0, 0.0, "makes no measurable change"),
        (0.03, 0.01, "makes no measurable change"),
        (0.0, 0.9, "shows more"),
    ],
)
@pytest.mark.parametrize("goal", ["remove", "strengthen"])
def test_it_claims_only_what_the_figures_hold(before, after, says, goal) -> None:
    record = make_record()
    record = record.model_copy(
        update={
            "holdout_baseline": {"behaviour_rate": ScoreRecord(**rate(before))},
            "holdout": {"behaviour_rate": ScoreRecord(**rate(after))},
            "config": {**record.config, "goal": goal},
        }
    )
    card, wanted = model_card(record), "less" if goal == "remove" else "more"
    assert f"the edit {says}" in introduction(record)
    use = section(card, "Responsible use")
    assert f"to show {wanted} of a behaviour" in use
    assert ("was removed" in card) is False
    assert ("no change could be told from chance" in use) == ("no measurable" in says)
    assert ("Where that was measured, it shows more" in use) == (
        after > before and wanted == "less"
    )
    assert ("Where that was measured, it shows less" in use) == (before > 0.9 and wanted == "more")
    assert ("will answer requests" in use) == (before > 0.9 and wanted == "less")


def test_several_licences_are_a_list() -> None:
    record = make_record()
    for stated, data in (
        ("apache-2.0, mit", ["apache-2.0", "mit"]),
        ("mit", "mit"),
        ("Custom, non-commercial use", "Custom, non-commercial use"),
    ):
        model = record.model.model_copy(update={"license": stated})
        card = model_card(record.model_copy(update={"model": model}))
        assert ModelCard(card).data.to_dict()["license"] == data


def test_tables_hold_the_figures_before_and_after() -> None:
    record = make_record()
    figures = section(model_card(record), "Figures")
    chosen = record.chosen()
    for name in ("behaviour_rate", "drift", "drift_first"):
        for score in (record.baseline[name], chosen.scores[name], record.holdout[name]):
            assert measured(name, score) in figures
    for name in ("restored", "kept"):
        for score in (record.final_baseline[name], record.final[name], record.holdout[name]):
            assert measured(name, score) in figures
    assert "100 prompts" in figures
    assert "3,212 tokens" in figures


def test_groups_of_prompts_follow_their_score() -> None:
    record = make_record()
    lines = section(model_card(record), "Figures").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| Behaviour rate |"))
    assert lines[first + 1].startswith("| Behaviour rate, group `seen` |")
    assert lines[first + 2].startswith("| Behaviour rate, group `unseen` |")
    parts = record.holdout["behaviour_rate"].parts
    assert parts is not None
    assert measured("behaviour_rate", parts["unseen"]) in lines[first + 2]


def test_groups_of_a_few_prompts_have_no_row_and_the_card_says_so() -> None:
    record = make_record()
    score = record.holdout["behaviour_rate"]
    assert score.parts is not None
    parts = score.parts | {"seen": score.parts["seen"].model_copy(update={"n": 4})}
    small = score.model_copy(update={"parts": parts})
    holdout = record.holdout | {"behaviour_rate": small}
    figures = section(model_card(record.model_copy(update={"holdout": holdout})), "Figures")
    assert "fewer than 5 prompts" in figures
    assert "fewer than 5 prompts" not in section(model_card(record), "Figures")


def test_every_table_is_rectangular() -> None:
    for record in (make_record(), minimal_record(), hostile_record()):
        for block in model_card(record).split("\n\n"):
            if block.startswith("| "):
                widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
                assert len(widths) == 1


def test_the_front_is_listed_with_words_and_the_shown_trial_marked() -> None:
    record = make_record()
    text = section(model_card(record), "Other trade-offs that the search found")
    for point in front_points(record):
        row = next(
            line
            for line in text.splitlines()
            if re.match(rf"\| \*{{0,2}}{point.trial.number}\b", line)
        )
        assert row.endswith(f"{point.words} |")
        assert ("(this model)" in row) == (point.trial.number == record.selected)


def test_parameters_and_coverage_are_listed() -> None:
    record = make_record()
    text = section(model_card(record), "What was edited")
    for key in record.chosen().params:
        assert f"| `{key}` |" in text
    for line in [*record.coverage.edited, *record.coverage.not_edited]:
        assert plain(line) in text


def test_what_the_exported_trial_leaves_alone_is_not_called_edited() -> None:
    record = make_record()
    own = {"edited": ["attn.o_proj: 3 of 16 matrices"], "not_edited": ["mlp.down_proj: left alone"]}
    data = record.model_dump(by_alias=True)
    data["artifacts"][0] |= {"coverage": own}
    text = section(model_card(Record.model_validate(data)), "What was edited")
    edited, left = text.split("Not edited:")
    assert plain("attn.o_proj: 3 of 16 matrices") in edited
    assert "mlp" not in edited
    assert plain("mlp.down_proj: left alone") in left


def test_the_export_check_compares_expected_and_measured() -> None:
    record = make_record()
    text = section(model_card(record), "Export check")
    artifact = record.artifacts[0]
    assert measured("drift", artifact.expected["drift"]) in text
    assert measured("drift", artifact.measured["drift"]) in text
    assert "0.0 points" in text
    card = model_card(record, artifact_format="adapter")
    assert "## Export check" not in card
    assert "not loaded and measured again" in section(card, "Limitations")


def test_what_an_adapter_leaves_out_is_said() -> None:
    data = make_record().model_dump(by_alias=True)
    details = {"rank": 1, "error": 0.0132, "errors": {"a": 0.1}, "not_carried": ["layers.3.o_proj"]}
    data["artifacts"][0] |= {"format": "adapter", "details": details}
    card = model_card(Record.model_validate(data), artifact_format="adapter")
    assert "Rank of the adapter: `1`" in card
    assert "`0.0132`" in card
    limits = section(card, "Limitations")
    assert "approximates the edit; its reconstruction error is in the export check" in limits
    assert plain("layers.3.o_proj") in limits


@pytest.mark.parametrize("form", ["DoRA", "LoRA"])
def test_a_card_says_which_adapter_it_is_and_who_serves_it(form: str) -> None:
    data = make_record().model_dump(by_alias=True)
    exact = form == "DoRA"
    details = {"form": form, "rank": 1, "error": 1e-8 if exact else 0.1, "biases": ["b"] * exact}
    data["artifacts"][0] |= {"format": "adapter", "details": details}
    card = model_card(Record.model_validate(data), artifact_format="adapter")
    assert f"Kind of adapter: `{form}`" in card
    assert ("merge_and_unload()" in card) == exact
    assert ("--enable-lora" in card) != exact
    limits = section(card, "Limitations")
    assert ("approximates the edit" in limits) != exact
    assert ("stay edited where it is loaded and switched off" in limits) == exact


def test_another_trial_does_not_borrow_the_holdout_of_the_chosen_one() -> None:
    record = make_record()
    other = next(number for number in record.front if number != record.selected)
    card = model_card(record, trial=other)
    assert "holdout: edited" not in card
    assert measured("restored", record.final["restored"]) not in section(card, "Figures")
    assert "prompts that the search did not see" in section(card, "Limitations")
    assert f"**{other}** (this model)" in card


def test_limitations_name_what_was_not_measured() -> None:
    text = section(model_card(make_record()), "Limitations")
    for words in ("benchmarks", "languages", "several turns", "quantised", "marker phrases"):
        assert words in text
    assert "chosen from 119 trials" in text
    assert "14.6 points wide" in text
    assert "KL (first token) is given only for comparison" in text
    bare = section(model_card(minimal_record()), "Limitations")
    assert "without an interval" in bare
    assert "Whether the answers are true was not measured" in bare


def test_responsible_use_is_firmer_for_a_safeguard() -> None:
    refusal = make_record(behaviour="refusal", description="refusing to answer requests")
    verbosity = make_record(behaviour="verbosity", description="wordy answers")
    firm = section(model_card(refusal), "Responsible use")
    calm = section(model_card(verbosity), "Responsible use")
    assert "safeguards" in firm
    assert "safeguards" not in calm
    assert "before you deploy" in firm
    assert "before you deploy" in calm
    assert "abliteration" in model_card(refusal)
    assert "abliteration" not in model_card(verbosity)


def test_no_prompt_response_or_local_path_is_published() -> None:
    card = model_card(make_record())
    for text in (SECRET_PROMPT, "pier 0", "harbour's clerk", "/home/someone", "/srv/out"):
        assert text not in card
    assert "`prompts.system`" in card
    assert HASH in card
    assert "guarded_objects.jsonl" in card


def test_the_command_repeats_the_configuration() -> None:
    record = make_record()
    words = shlex.split(command(record).replace("\\\n", " "))
    assert words[:5] == ["excise", "run", record.model.source, "--out", "DIR"]
    options = list(zip(words[5::2], words[6::2], strict=True))
    flags = {
        "--seed": "seed",
        "--trials": "search.trials",
        "--target": "prompts.target.source",
        "--contrast": "prompts.contrast.source",
        "--target-eval": "prompts.target_eval.source",
        "--contrast-eval": "prompts.contrast_eval.source",
        "--direction-size": "prompts.direction_size",
    }
    numbers = {"seed", "search.trials", "prompts.direction_size"}
    given = {flags[f]: v for f, v in options if f in flags}
    again = load_config(
        flags={k: int(v) if k in numbers else v for k, v in given.items()}
        | {"model.source": words[2]},
        sets=tuple(v for f, v in options if f == "--set"),
    ).model_dump(mode="json")
    expected = load_config(flags=dict(record.config)).model_dump(mode="json")
    expected["prompts"]["system"] = None
    expected["prompts"]["target"]["source"] = "guarded_objects.jsonl"
    expected["prompts"]["target_eval"]["source"] = "guarded_eval.jsonl"
    assert again == expected


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ([{"source": "builtin"}], ""),
        ([], "--no-keep"),
        ([{"source": "builtin"}, {"source": "/home/someone/own.txt"}], "--keep builtin own.txt"),
        (
            [{"source": "/home/someone/own.csv", "column": "ask"}],
            """--set 'prompts.keep=[{source = "own.csv", column = "ask"}]'""",
        ),
    ],
)
def test_the_command_says_what_was_kept(keep: list[dict[str, str]], words: str) -> None:
    config = load_config(flags={"prompts.keep": keep}).model_dump(mode="json", exclude_none=True)
    text = command(make_record(config=config))
    assert words in text
    assert "keep" in text or not words
    assert "keep" not in text or words
    assert "someone" not in text


def test_a_built_in_behaviour_is_named_and_its_settings_are_not_repeated() -> None:
    config = load_config(behaviour="refusal", flags={"seed": 3}).model_dump(mode="json")
    text = command(make_record(behaviour="refusal", config=config, seed=3))
    assert "--behaviour refusal" in text
    assert "markers" not in text
    assert "--seed 3" in text


def test_the_command_leaves_out_settings_that_this_version_does_not_have() -> None:
    config = dict(make_record().config)
    config |= {"search": config["search"] | {"screen": True}, "refine": {"steps": 5}}
    assert command(make_record(config=config)) == command(make_record())


@pytest.mark.parametrize("artifact_format", FORMATS)
def test_loading_code_is_for_the_format_and_parses(artifact_format: str) -> None:
    text = section(model_card(make_record(), artifact_format=artifact_format), "How to load it")
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL)
    assert blocks
    for language, body in blocks:
        if language == "python":
            ast.parse(body)
    assert ("PeftModel" in text) == (artifact_format == "adapter")


def test_a_multimodal_model_is_loaded_and_announced_as_one() -> None:
    record = make_record()
    model = record.model.model_copy(update={"multimodal": True})
    card = model_card(record.model_copy(update={"model": model}))
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text"


def test_a_minimal_record_renders() -> None:
    for artifact_format in FORMATS:
        assert model_card(minimal_record(), artifact_format=artifact_format).endswith("\n")


def test_nothing_in_a_record_becomes_markup() -> None:
    plain_tags = rendered_tags(ModelCard(model_card(make_record())).text)
    assert "table" in plain_tags
    hostile = model_card(hostile_record())
    assert rendered_tags(ModelCard(hostile).text) <= plain_tags
    assert not {"script", "img"} & plain_tags
    headings = MarkdownIt("commonmark").render(ModelCard(hostile).text).count("<h1>")
    assert headings == 1


@pytest.mark.parametrize("text", ["# x", "- x", "1. x", "12) x", "---", "+ x", "=== x"])
def test_plain_text_does_not_begin_a_block(text: str) -> None:
    html = MarkdownIt("commonmark").render(plain(text))
    assert html == f"<p>{text}</p>\n"


def test_code_spans_and_fences_cannot_be_left() -> None:
    assert rendered_tags(code("a` <img> `b")) == {"p", "code"}
    assert rendered_tags(fence("```\n<img>\n````\n# x")) == {"pre", "code"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ text }}",
        "{{ text | safe }}",
        "{{ text | upper }}",
        "{{ [code('a'), text] | join }}",
        "{{ code('a') ~ text }}",
        "{{ code('a') + text }}",
        "{{ '%s' | format(text) }}",
        "{% set caught %}{{ text | safe }}{% endset %}{{ caught }}",
        "{% macro shown(x) %}{{ x }}{% endmacro %}{{ shown(text) }}",
    ],
)
def test_no_expression_of_a_template_lets_text_through(template: str) -> None:
    page = environment().from_string("x " + template)
    shown = page.render(text="**bold** <img> [a](b)\n\n# head", code=code)
    assert rendered_tags(shown) <= {"p", "code"}
    assert environment().from_string("{{ text }}").render(text=Markdown("**b**")) == "**b**"


def test_what_is_missing_is_an_error_not_a_gap() -> None:
    with pytest.raises(UndefinedError):
        environment().from_string("{{ missing }}").render()


def test_errors() -> None:
    with pytest.raises(InputError, match="onnx"):
        model_card(make_record(), artifact_format="onnx")
    with pytest.raises(RunStateError):
        model_card(make_record(selected=None))
    with pytest.raises(RunStateError):
        model_card(make_record(), trial=9999)


def test_an_edit_without_effect_is_not_praised() -> None:
    data: dict[str, Any] = {"behaviour_rate": rate(0.94, 80), "drift": nats(0.0002)}
    record = make_record(holdout=data)
    assert isinstance(record, Record)
    assert "makes no measurable change of the behaviour" in model_card(record)
