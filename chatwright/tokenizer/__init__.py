"""Text <-> token ids.

| file | what |
|---|---|
| tokenizer.py | `Tokenizer`, and `TextStream` for ids that come one by one |
| spelling.py | the bytes that a token stands for |
| text_frame.py | what stands around a text: begin and end tokens, as a model's makers say |
| parts.py | which parts a tokenizer.json may have, and why no others |
"""

from chatwright.tokenizer.tokenizer import (
    CONTROLS,
    END_OF_TEXT,
    PATTERN,
    TextStream,
    Tokenizer,
    byte_alphabet,
    library,
)

__all__ = ["CONTROLS", "END_OF_TEXT", "PATTERN", "TextStream", "Tokenizer", "byte_alphabet", "library"]
