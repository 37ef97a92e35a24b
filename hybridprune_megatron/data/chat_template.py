"""The prompt format as a Jinja template, for tokenizers and for serving engines that read one."""

from __future__ import annotations

from hybridprune_megatron.data.conversation import (
    END_TOKEN,
    IMAGE_TOKEN,
    RESERVED_TOKENS,
    SYSTEM_TOKEN,
    TURN_TOKEN,
    VIDEO_TOKEN,
)

_HELD = "message['role'] ~ ' content holds ' ~ token ~ ': reserved for the prompt format; remove it from the text'"
_ORDER = "'expected user and assistant in turn, after at most one system message'"
_PART = "'content part: expected type video, image, or text with a text'"

#: Renders what ``conversation.render_chat`` renders, and raises where ``conversation.read_conversation`` does. It sees
#: text alone: what a tokenizer's normalizer makes a reserved token is found by the processor, not here.
CHAT_TEMPLATE = (
    "{%- set expected = namespace(role='user') -%}"
    "{%- for message in messages -%}"
    "{%- set content = namespace(text='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set content.text = message['content'] -%}"
    "{%- elif message['content'] is undefined or message['content'] is not iterable -%}"
    "{{- raise_exception(" + _PART + ") -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}{%- set content.text = content.text + '" + VIDEO_TOKEN + "' -%}"
    "{%- elif part['type'] == 'image' -%}{%- set content.text = content.text + '" + IMAGE_TOKEN + "' -%}"
    "{%- elif part['type'] == 'text' and part['text'] is string -%}"
    "{%- set content.text = content.text + part['text'] -%}"
    "{%- else -%}{{- raise_exception(" + _PART + ") -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    f"{{%- for token in {[*RESERVED_TOKENS, VIDEO_TOKEN]} -%}}"
    f"{{%- if token in content.text and not (message['role'] == 'user' and token in {[IMAGE_TOKEN, VIDEO_TOKEN]}) -%}}"
    "{{- raise_exception(" + _HELD + ") -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message['role'] == 'system' and loop.first -%}"
    "{{- '" + SYSTEM_TOKEN + "System\n' + content.text + '\n' -}}"
    "{%- elif message['role'] != expected.role -%}{{- raise_exception(" + _ORDER + ") -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- set expected.role = 'assistant' -%}"
    "{%- if loop.previtem is defined and loop.previtem['role'] == 'assistant' -%}{{- '\n' -}}{%- endif -%}"
    "{{- '" + TURN_TOKEN + "User\n' + content.text + '\n' -}}"
    "{%- else -%}"
    "{%- set expected.role = 'user' -%}"
    "{{- '" + TURN_TOKEN + "Assistant\n' + content.text + '\n" + END_TOKEN + "' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + TURN_TOKEN + "Assistant\n' -}}{%- endif -%}"
)
