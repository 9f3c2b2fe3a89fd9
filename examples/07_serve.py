"""Serving: OpenAI's own client talks to a model behind HTTP. Needs `pip install "hf-llmopt[serve]" openai`.

`hf-llmopt serve demo` does the same in a process of its own.
"""

import json
import threading

import openai

from hf_llmopt import Engine, demo
from hf_llmopt.serving import Server, Service

model, tokenizer = demo.load()
server = Server(Service(Engine(model), tokenizer, "demo"))
listening = server.listen("127.0.0.1", 0)  # any free port
thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
thread.start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none is needed here")

# 1. A completion: the tokens that `generate` gives.
answer = client.completions.create(model="demo", prompt=demo.PROMPTS[0], max_tokens=16, temperature=0)
print(repr(answer.choices[0].text))
ids = tokenizer(demo.PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
alone = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
assert answer.choices[0].text == tokenizer.decode(alone)

# 2. A chat, as it comes. Its beginning was in a prompt before, so that part is found instead of computed.
stream = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": demo.PROMPTS[0] + ", items"}],
    max_tokens=24,
    temperature=0.7,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:
        print(f"\n{chunk.usage.prompt_tokens_details.cached_tokens} of {chunk.usage.prompt_tokens} tokens were found")

# 3. JSON by a schema: the model cannot write anything else.
schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "kind": {"enum": ["class", "function", "module"]},
        "lines": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "summary = "}],
    max_tokens=200,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "summary", "schema": schema}},
)
found = json.loads(answer.choices[0].message.content)
assert set(found) == {"name", "kind", "lines"}
print(found)

# 4. A tool that has to be called: its arguments obey its schema.
read_file = {
    "type": "function",
    "function": {
        "name": "read_file",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"enum": ["setup.py", "main.py"]},
                "line": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["path", "line"],
        },
    },
}
answer = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "Where does the program begin?"}],
    tools=[read_file],
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=200,
    temperature=0,
)
(call,) = answer.choices[0].message.tool_calls
print(answer.choices[0].finish_reason, call.function.name, json.loads(call.function.arguments))

# 5. The end: what runs is answered, then the server stops.
client.close()
server.stop()
thread.join()
