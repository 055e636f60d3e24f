# ruff: noqa: RUF001
"""Chat templates of published families in short: what each writes around words, without tools and options.

Written from what the formats are; `{s}`, `{u}` and `{a}` are a turn's text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A chat template and what its tokenizer knows.

    Attributes:
        template: Jinja.
        specials: special tokens beside beginning and end.
        bos: beginning of a text.
        eos: end of an answer.
        hides_system: whether nothing marks the end of a system prompt before the user's words.
    """

    template: str
    specials: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"
    hides_system: bool = False


def turns(
    user: str,
    assistant: str,
    system: str | None = None,
    *,
    start: str = "",
    prompt: str = "",
    tool: str | None = None,
    default: str = "",
) -> str:
    """Return a template that writes one turn after the other; `§` in the arguments is a turn's text."""

    def write(text: str) -> str:
        left, _, right = text.partition("§")
        quoted = [part.replace("\n", "\\n").replace("'", "\\'") for part in (left, right)]
        return f"{{{{ '{quoted[0]}' + (m['content'] | trim) + '{quoted[1]}' }}}}"

    kinds = {"user": user, "assistant": assistant, "tool": tool}
    body = "".join(
        f"{{% {'if' if role == 'user' else 'elif'} m['role'] == '{role}' %}}{write(text)}"
        for role, text in kinds.items()
        if text is not None
    )
    refuse = "{{ raise_exception('System role not supported') }}"
    body += f"{{% elif m['role'] == 'system' %}}{refuse if system is None else write(system)}{{% endif %}}"
    start, prompt, default = (text.replace("\n", "\\n") for text in (start, prompt, default))
    return (
        f"{{{{ '{start}' }}}}"
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ '{default}' }}}}{{% endif %}}"
        f"{{% for m in messages %}}{body}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    )


# The system prompt goes into the first user turn.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and s %}{% set text = '<<SYS>>\\n' + s + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Into the last one, with nothing between but a blank line.
MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set s = messages[0]['content'] + '\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (s if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [look]' + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Into the first one, and answers are "model".
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set s = messages[0]['content'] + '\\n\\n' %}{% else %}{% set rest = messages %}{% set s = '' %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + (s if loop.first else '') }}"
    "{{ (m['content'] | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# Results of tools stand in turns of the user; reasoning of earlier answers is left out; thinking may be turned off.
QWEN_3 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% set text = m['content'] %}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ text.split('</think>')[-1].lstrip('\\n') }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\\n' + call.function.name + call.function.arguments | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
# The last answer is in a channel and ends otherwise than earlier ones; system prompts become a developer's.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + m['content'] + '\\n\\n<|end|>' }}"
    "{% elif m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '<|start|>functions.look to=assistant<|channel|>commentary<|message|>' + m['content'] + '<|end|>' }}"
    "{% elif m['tool_calls'] %}"
    "{{ '<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{}<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# A date that changes stands before the first turn.
LLAMA_3_1 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + s }}"
    "{{ '<|eot_id|>' }}"
    "{% for m in rest %}"
    "{{ '<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else m['role']) + '<|end_header_id|>\\n\\n' }}"
    "{{ (m['content'] | trim) + ('<|eom_id|>' if m['tool_calls'] else '<|eot_id|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# A content is a list of parts.
LLAVA_ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The instruction of Command-R's safety preamble is always there.
COMMAND_R = turns(
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>§<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>§<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>§<|END_OF_TURN_TOKEN|>",
    start="<BOS_TOKEN>",
    prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    tool="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n§</results><|END_OF_TURN_TOKEN|>",
)
CHATML = (
    "<|im_start|>user\n§<|im_end|>\n",
    "<|im_start|>assistant\n§<|im_end|>\n",
    "<|im_start|>system\n§<|im_end|>\n",
)
CHATML_SPECIALS = ("<|im_start|>", "<|im_end|>")
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}

FAMILIES = {
    "chatml": Family(turns(*CHATML, prompt="<|im_start|>assistant\n"), CHATML_SPECIALS),
    "qwen2.5": Family(
        turns(
            *CHATML,
            prompt="<|im_start|>assistant\n",
            default="<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n",
            tool="<|im_start|>user\n<tool_response>\n§\n</tool_response><|im_end|>\n",
        ),
        CHATML_SPECIALS,
        eos="<|im_end|>",
    ),
    "qwen3": Family(QWEN_3, CHATML_SPECIALS, eos="<|im_end|>"),
    "llama2": Family(LLAMA_2),
    "llama3": Family(
        turns(
            *(f"<|start_header_id|>{role}<|end_header_id|>\n\n§<|eot_id|>" for role in ("user", "assistant", "system")),
            start="<|begin_of_text|>",
            prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "llama3.1": Family(
        LLAMA_3_1,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "llama4": Family(
        turns(
            *(f"<|header_start|>{role}<|header_end|>\n\n§<|eot|>" for role in ("user", "assistant", "system")),
            start="<|begin_of_text|>",
            prompt="<|header_start|>assistant<|header_end|>\n\n",
            tool="<|header_start|>ipython<|header_end|>\n\n§<|eot|>",
        ),
        ("<|header_start|>", "<|header_end|>", "<|eot|>"),
        "<|begin_of_text|>",
        "<|eot|>",
    ),
    "mistral-v1": Family(turns(" [INST] § [/INST]", " §</s>", start="<s>")),
    "mistral-v3": Family(
        MISTRAL_V3,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        hides_system=True,
    ),
    "mistral-v7-tekken": Family(
        turns("[INST]§[/INST]", "§</s>", "[SYSTEM_PROMPT]§[/SYSTEM_PROMPT]", start="<s>"),
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "gemma2": Family(
        GEMMA.replace("{% set s = messages[0]['content'] + '\\n\\n' %}", "{{ raise_exception('no system role') }}"),
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
    ),
    "gemma3": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", hides_system=True),
    "phi3": Family(
        turns("<|user|>\n§<|end|>\n", "<|assistant|>\n§<|end|>\n", "<|system|>\n§<|end|>\n", prompt="<|assistant|>\n"),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        eos="<|endoftext|>",
    ),
    "phi4": Family(
        turns(
            *(f"<|im_start|>{role}<|im_sep|>§<|im_end|>" for role in ("user", "assistant", "system")),
            prompt="<|im_start|>assistant<|im_sep|>",
        ),
        (*CHATML_SPECIALS, "<|im_sep|>"),
        eos="<|im_end|>",
    ),
    "granite3": Family(
        turns(
            *(f"<|start_of_role|>{role}<|end_of_role|>§<|end_of_text|>\n" for role in ("user", "assistant", "system")),
            prompt="<|start_of_role|>assistant<|end_of_role|>",
            default="<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n",
        ),
        ("<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
    "glm4": Family(
        turns(
            "<|user|>\n§",
            "<|assistant|>\n§",
            "<|system|>\n§",
            start="[gMASK]<sop>",
            prompt="<|assistant|>",
            tool="<|observation|>\n§",
        ),
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "command-r": Family(
        COMMAND_R,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "olmo2": Family(
        turns(
            "<|user|>\n§\n",
            "<|assistant|>\n§<|endoftext|>\n",
            "<|system|>\n§\n",
            start="<|endoftext|>",
            prompt="<|assistant|>\n",
        ),
        (),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "deepseek-v2": Family(
        turns(
            "User: §\n\n",
            "Assistant: §<｜end▁of▁sentence｜>",
            "§\n\n",
            start="<｜begin▁of▁sentence｜>",
            prompt="Assistant:",
        ),
        **DEEPSEEK,
    ),
    "deepseek-v3": Family(
        turns(
            "<｜User｜>§",
            "<｜Assistant｜>§<｜end▁of▁sentence｜>",
            "§",
            start="<｜begin▁of▁sentence｜>",
            prompt="<｜Assistant｜>",
        ),
        ("<｜User｜>", "<｜Assistant｜>"),
        **DEEPSEEK,
    ),
    "deepseek-r1": Family(
        turns(
            "<｜User｜>§",
            "<｜Assistant｜>§<｜end▁of▁sentence｜>",
            "§",
            start="<｜begin▁of▁sentence｜>",
            prompt="<｜Assistant｜><think>\n",
        ),
        ("<｜User｜>", "<｜Assistant｜>"),
        **DEEPSEEK,
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|startoftext|>",
        "<|return|>",
    ),
    "vicuna": Family(
        turns(
            "USER: § ",
            "ASSISTANT: §</s>",
            "§ ",
            prompt="ASSISTANT:",
            default="A chat between a curious user and an artificial intelligence assistant. ",
        )
    ),
    "zephyr": Family(
        turns("<|user|>\n§</s>\n", "<|assistant|>\n§</s>\n", "<|system|>\n§</s>\n", prompt="<|assistant|>\n")
    ),
    "internlm2": Family(
        turns(*CHATML, start="<s>", prompt="<|im_start|>assistant\n"), CHATML_SPECIALS, eos="<|im_end|>"
    ),
    "falcon-chat": Family(
        turns("User: §\n", "Falcon: §\n", "System: §\n", prompt="Falcon:"), (), "<|endoftext|>", "<|endoftext|>"
    ),
    "falcon3": Family(
        turns("<|user|>\n§\n", "<|assistant|>\n§<|endoftext|>\n", "<|system|>\n§\n", prompt="<|assistant|>\n"),
        (),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "smollm2": Family(
        turns(
            *CHATML,
            prompt="<|im_start|>assistant\n",
            default="<|im_start|>system\nYou are a helpful AI assistant named SmolLM.<|im_end|>\n",
        ),
        CHATML_SPECIALS,
        "<|im_start|>",
        "<|im_end|>",
    ),
    "llava-onevision": Family(LLAVA_ONEVISION, CHATML_SPECIALS, eos="<|im_end|>"),
    "alpaca": Family(turns("### Instruction:\n§\n\n", "### Response:\n§</s>\n\n", "§\n\n", prompt="### Response:\n")),
}
TAKES_NO_SYSTEM = {"mistral-v1", "gemma2"}
