"""Chat templates for models that have none, by name."""

from typing import Final

INSTRUCTION: Final = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' }}
{%- generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}{{ '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
"""In words that every tokenizer has, as Alpaca's prompts are; an answer ends as a text does."""

CHATML: Final = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""OpenAI's ChatML, for tokenizers that have its two marks as tokens."""

CHAT_TEMPLATES: Final = {"instruction": INSTRUCTION, "chatml": CHATML}
"""What ``model.chat_template`` may name."""

MARKS: Final = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Tokens that a named template needs."""
