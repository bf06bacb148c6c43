"""The chat template of a result: the inputs' most common one, one known by name, or jinja text.

The named templates write the prompt formats that the models' makers have published, in their plain form: no tools, no
default system prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from weft.errors import RecipeError, did_you_mean
from weft.recipe.tokenizer_files import TokenizerFiles

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set opening = namespace(text='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set opening.text = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + opening.text + message['content'] + ' [/INST]' }}"
        "{% set opening.text = '' %}"
        "{% else %}"
        "{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
        "{% elif message['role'] == 'user_context' %}{{ '### Input:\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
        "{{ message['content'] | trim }}"
        "{% if add_generation_prompt or not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}
_SHORTEST_JINJA = 20


def choose_template(choice: str, inputs: Iterable[TokenizerFiles]) -> str | None:
    """The text of a chat template.

    Args:
        choice: ``auto``, the name of a template, or jinja text.
        inputs: tokenizers of the models that are merged.

    Returns:
        The text; None for ``auto`` where no input has one.

    Raises:
        RecipeError: neither a name that is known nor jinja text.

    >>> choose_template("{{ messages[0]['content'] }}", [])
    "{{ messages[0]['content'] }}"
    """
    if choice == "auto":
        found = [t.strip() for t in map(template_of, inputs) if t]
        return Counter(found).most_common(1)[0][0] if found else None
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    if len(choice) < _SHORTEST_JINJA or "{" not in choice:
        raise RecipeError(
            f"chat_template {choice!r} is neither a known name nor jinja text.{did_you_mean(choice, [*TEMPLATES, 'auto'])}"
        )
    return choice


def template_of(tokenizer: TokenizerFiles) -> str | None:
    """The chat template of a tokenizer; of several, the default one."""
    text = tokenizer.text("chat_template.jinja")
    if text is not None:
        return text
    for file in ("tokenizer_config.json", "chat_template.json"):
        found: Any = tokenizer.object(file).get("chat_template")
        if isinstance(found, list):
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(found, str) and found:
            return found
    return None


def with_template(tokenizer: TokenizerFiles, text: str) -> TokenizerFiles:
    """The tokenizer with a chat template, in each file that may hold one."""
    files: dict[str, Any] = {}
    files["tokenizer_config.json"] = {**tokenizer.object("tokenizer_config.json"), "chat_template": text}
    if tokenizer.object("chat_template.json"):
        files["chat_template.json"] = {"chat_template": text}
    written = {n: (json.dumps(v, indent=2, ensure_ascii=False) + "\n").encode() for n, v in files.items()}
    if tokenizer.text("chat_template.jinja") is not None:
        written["chat_template.jinja"] = text.encode()
    return TokenizerFiles(tokenizer.name, tokenizer.folder, {**tokenizer.written, **written}, tokenizer.dropped)
