"""Conversations: messages -> token ids and a loss mask, by the chat template that comes with a model.

| file | what |
|---|---|
| template.py | `ChatTemplate`: a conversation rendered and encoded; `fit_context` cuts it to a length |
| source.py | a template's text: where it lies, how it is compiled |
| values.py | what a template is given: messages, tools, documents, special tokens |
| abilities.py | what a template does with lists, tool calls, thinking and tools, found by rendering |
| turn_ends.py | what a template writes behind an answer |
| loss_mask.py | which tokens are learnt |
| trusted_tokens.py | control tokens count only where the template wrote them |
| traced_text.py, tracing.py | text that knows who wrote each of its characters; Jinja's functions for it |
| sandbox.py | budgets for templates, which are not trusted |
"""

from chatwright.chat.template import (
    NATIVE,
    ROLES,
    Beside,
    ChatTemplate,
    EncodedChat,
    FittedChat,
    Message,
    beside_of,
    check_messages,
    fit_context,
    read_template,
)

__all__ = [
    "NATIVE",
    "ROLES",
    "Beside",
    "ChatTemplate",
    "EncodedChat",
    "FittedChat",
    "Message",
    "beside_of",
    "check_messages",
    "fit_context",
    "read_template",
]
