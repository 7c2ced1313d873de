"""How a program asks the run's model, ready to be pasted. For the try-it panel; a test runs them."""

from __future__ import annotations

import json
import shlex

BASE_URL = "http://127.0.0.1:8000/v1"  # where `shoal serve` listens unless told otherwise
SERVE = "shoal serve TOKEN"


def curl(model: str, prompt: str) -> str:
    """A line for a shell."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 48}, ensure_ascii=False)
    return f"curl {BASE_URL}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python(model: str, prompt: str) -> str:
    """A program for the `openai` package."""
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{BASE_URL}", api_key="-")\n'
        f"answer = client.completions.create(model={model!r}, prompt={prompt!r}, max_tokens=48)\n"
        "print(answer.choices[0].text)\n"
    )
