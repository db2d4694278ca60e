"""A tokenizer, from a checkpoint's folder: the one place where its libraries' own errors end.

What comes out of here has read a text and written it back once, so that a vocabulary that contradicts
itself is said as the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.checkpoints.model_folder import explained, read_optional
from excise.errors import ModelError

# Of which a tokenizer's classes read what is there; the first is some tens of megabytes at most.
_TABLES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "chat_template.json", "processor_config.json"),
)
_SAMPLE = "What is it? 3.14"


def load_tokenizer(folder: Path, source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`; `source` names the model that it is of, for messages.

    Raises:
        ModelError: there is none, or it cannot be read, or does not work.
    """
    from transformers import AutoTokenizer

    what = f"tokenizer of {source}"
    for name in _TABLES:
        read_optional(folder / name)
    with explained(what):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer(_SAMPLE)["input_ids"]
        if not isinstance(tokenizer.decode(ids), str):
            raise ModelError(
                f"{what} cannot be loaded: it does not give back the text that it is given"
            )
    return tokenizer
