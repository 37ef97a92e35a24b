"""The prompt format as a Jinja template, for tokenizers and for serving engines that read one."""

from __future__ import annotations

from hybridprune_megatron.data.conversation import END_TOKEN, IMAGE_TOKEN, SYSTEM_TOKEN, TURN_TOKEN, VIDEO_TOKEN

#: Renders what ``conversation.render_chat`` renders, and refuses nothing.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = namespace(text='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set content.text = message['content'] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}{%- set content.text = content.text + '" + VIDEO_TOKEN + "' -%}"
    "{%- elif part['type'] == 'image' -%}{%- set content.text = content.text + '" + IMAGE_TOKEN + "' -%}"
    "{%- else -%}{%- set content.text = content.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- '" + SYSTEM_TOKEN + "System\n' + content.text + '\n' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if loop.previtem is defined and loop.previtem['role'] == 'assistant' -%}{{- '\n' -}}{%- endif -%}"
    "{{- '" + TURN_TOKEN + "User\n' + content.text + '\n' -}}"
    "{%- else -%}"
    "{{- '" + TURN_TOKEN + "Assistant\n' + content.text + '\n" + END_TOKEN + "' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + TURN_TOKEN + "Assistant\n' -}}{%- endif -%}"
)
