"""Chat templates of several families, written small, each in its family's manner."""

QWEN3 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}",
    "{{- '<think>\\n' }}",
)
R1 = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|Assistant|>' + message.content + '<|end|>' }}
{%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- else %}{{ message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GPT_OSS = """{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d") }}
{{- "\\nReasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") + "<|end|>" }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
{%- else %}
{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}"""
PARTS = """{% for message in messages %}{{ '<' + message.role + '>' }}
{%- for part in message.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
