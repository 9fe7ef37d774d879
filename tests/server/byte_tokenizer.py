"""A tokenizer with one token per byte, so that every character beyond ASCII is spread over several tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from toka.text.tokenizer import _byte_of_char

BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_byte_tokenizer(
    directory: Path, chat_template: str = CHAT_TEMPLATE, marks: Sequence[str] = (), **settings: object
) -> Path:
    """Write tokenizer.json and tokenizer_config.json; token id = byte value, then <bos>, <eos> and the marks, which are special tokens.

    settings: more fields of tokenizer_config.json.
    """
    backend = Tokenizer(BPE(vocab=_byte_of_char(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    backend.save(str(directory / "tokenizer.json"))
    settings |= {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": chat_template, "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
