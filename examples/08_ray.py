"""Several engines behind one address, and a file of requests on a pool of them, with Ray.

Needs `pip install "hf-llmopt[serve,ray]" openai`. `hf-llmopt serve demo --replicas 2` does the first in a process of
its own. Both run on a cluster as they do here: start Ray there, and set RAY_ADDRESS.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

if missing := [name for name in ("fastapi", "openai", "ray") if find_spec(name) is None]:
    print(f'{missing[0]} is not installed; this example needs: pip install "hf-llmopt[serve,ray]" openai')
    sys.exit()

import openai
import ray

from hf_llmopt import demo
from hf_llmopt.serving import ray_app, ray_batch
from hf_llmopt.serving.recipe import Recipe

ray.init("local", include_dashboard=False, num_cpus=2, log_to_driver=False)

# 1. Two replicas, each with an engine of its own. Clients see one server.
url = ray_app.start(ray_app.Arguments(model="demo", replicas=2, cpus=0.5), "127.0.0.1", 0)
client = openai.OpenAI(base_url=url + "/v1", api_key="none is needed here")
text = Path(demo.__file__).read_text("utf-8")[:1000]
for turn in range(3):  # the same beginning: it goes where that was computed
    answer = client.completions.create(model="demo", prompt=text + "\n" * turn, max_tokens=8, temperature=0)
    counts = answer.usage
    print(f"{counts.prompt_tokens_details.cached_tokens} of {counts.prompt_tokens} prompt tokens were found")
assert counts.prompt_tokens_details.cached_tokens > counts.prompt_tokens / 2
ray_app.stop()

# 2. A file of requests on a pool of two engines. Stopped, the same call goes on where it was.
with TemporaryDirectory() as folder:
    source, target = Path(folder, "requests.jsonl"), Path(folder, "results.jsonl")
    with source.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(demo.PROMPTS * 4):
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
            line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    counts = ray_batch.run(source, target, Recipe(model="demo"), engines=2, cpus=0.5, batch_size=4)
    print(f"{counts.answered} of {counts.total} requests answered, {counts.failed} with an error")
    assert counts.answered == counts.total == len(target.read_text("utf-8").splitlines())
    again = ray_batch.run(source, target, Recipe(model="demo"))
    assert again.before == counts.total, "nothing is left to do"

ray.shutdown()
