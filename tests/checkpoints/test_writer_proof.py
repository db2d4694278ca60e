"""The proof of where a model writes: it finds what rows say, and stops where something else writes."""

from __future__ import annotations

from dataclasses import replace

import builders
import families
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from excise.checkpoints.discovery import discover
from excise.checkpoints.writer_proof import prove
from excise.cli import main as cli
from excise.errors import UnknownArchitecture
from excise.model.anatomy import Writer, describe
from excise.model.forward import Forward


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "gpt_oss", "falcon_h1"])
def test_generic_rules_find_what_the_row_says(name):
    model = families.model(name)
    row = {w.name: w for w in describe(model).writers}
    found = {w.name: w for w in discover(model).writers}
    assert row.keys() == found.keys()
    for key, writer in row.items():
        assert torch.equal(writer.weight, found[key].weight)
        gains = [torch.ones(1) if w.gain is None else w.gain for w in (writer, found[key])]
        ours, theirs = (gain / gain.norm() for gain in gains)
        assert torch.allclose(ours, theirs, atol=1e-4)


def built(kind, **sizes):
    torch.manual_seed(0)
    return families.randomised(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)))


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def minimax():
    """Its residual is the normed input of a sublayer, not the sum itself."""
    more = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
    return built("minimax", num_local_experts=4, **SMALL | more)


def mamba():
    """It keeps its states in `cache_params`."""
    return built("mamba", state_size=8, **SMALL)


def recurrent_gemma():
    """It keeps the states of its recurrent blocks on the blocks themselves."""
    return built("recurrent_gemma", lru_width=32, **SMALL | {"num_hidden_layers": 3})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (minimax, "something besides"),
        (mamba, "cache of keys and values"),
        (recurrent_gemma, "outside its cache"),
    ],
)
def test_what_cannot_be_proven_is_refused_in_one_line(make, text, tmp_path, capsys):
    model = make()
    with pytest.raises(UnknownArchitecture, match=text):
        discover(model)
    families.save(model, tmp_path / "m")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "m")]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert text in err
    assert len(err.splitlines()) == 1


def test_a_matrix_that_does_not_write_is_no_writer():
    model = families.model("llama")
    anatomy = describe(model)
    module = model.model.layers[0].self_attn.q_proj
    wrong = Writer("attn.q_proj", 0, "model.layers.0.self_attn.q_proj", module, None)
    with pytest.raises(UnknownArchitecture, match=r"attn\.q_proj does not write"):
        prove(model, replace(anatomy, writers=(*anatomy.writers, wrong)))


def test_a_wrong_gain_is_noticed():
    model = families.model("gemma2")
    anatomy = describe(model)
    first, *rest = anatomy.writers
    for gain in (None, first.gain - 1.0):
        wrong = replace(anatomy, writers=(replace(first, gain=gain), *rest))
        with pytest.raises(UnknownArchitecture, match="something besides"):
            prove(model, wrong)


def test_what_was_discovered_forgets_what_is_out_of_its_window(monkeypatch):
    """Also where a mask leaves that to the cache, as one does that is made for one token at a time."""
    from transformers.models.mistral import modeling_mistral as modeling

    by_window = modeling.create_sliding_window_causal_mask

    def mask(**given):
        return None if given["inputs_embeds"].shape[1] == 1 else by_window(**given)

    monkeypatch.setattr(modeling, "create_sliding_window_causal_mask", mask)
    model = families.model("mistral")
    forward = Forward(model, discover(model))
    ids = torch.tensor(builders.token_ids(1, 0, 12, 12))
    mask, positions, cache = torch.ones_like(ids), torch.arange(12)[None], forward.cache(12)
    with torch.inference_mode():
        steps = [
            forward.hidden(ids[:, at : at + 1], mask[:, : at + 1], positions[:, at : at + 1], cache)
            for at in range(12)
        ]
        whole = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_steps_past_a_window_are_proven_too(monkeypatch):
    from transformers.models.mistral import modeling_mistral as modeling

    monkeypatch.setattr(modeling, "create_sliding_window_causal_mask", modeling.create_causal_mask)
    with pytest.raises(UnknownArchitecture, match="step by step"):
        discover(families.model("mistral"))


def test_mistral_4_behind_a_tower_is_found():
    own = {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    text = families._sized("mistral4", own).to_dict()
    config = CONFIG_MAPPING["mistral3"](text_config=text, **families.MULTIMODAL["mistral3"][2])
    found = discover(families.randomised(AutoModelForImageTextToText.from_config(config)))
    assert found.tower
    assert found.model_type == "mistral4"
    assert {"attn.o_proj", "mlp.experts.down_proj"} <= set(found.components)
