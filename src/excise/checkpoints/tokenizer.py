"""Load a tokenizer from a checkpoint's folder; its libraries' own errors become one line here.

Each tokenizer has encoded and decoded a sample once, so a vocabulary that contradicts itself is reported
when the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.checkpoints.model_folder import library_errors, read_optional
from excise.errors import ModelError

# JSON files that tokenizer classes may read; the first can have tens of megabytes.
_TABLES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "chat_template.json", "processor_config.json"),
)
_SAMPLE = "What is it? 3.14"


def load_tokenizer(folder: Path, source: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in `folder`; `source` names its model in messages.

    Raises:
        ModelError: there is none, or it cannot be read, or does not work.
    """
    from transformers import AutoTokenizer

    what = f"tokenizer of {source}"
    for name in _TABLES:
        read_optional(folder / name)
    with library_errors(what):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer(_SAMPLE)["input_ids"]
        if not isinstance(tokenizer.decode(ids), str):
            raise ModelError(
                f"{what} cannot be loaded: it does not give back the text that it is given"
            )
    return tokenizer
