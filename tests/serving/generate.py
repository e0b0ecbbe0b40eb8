"""Prints, as JSON, what vLLM writes from each of several folders on a number of ranks.

python -m tests.serving.generate PROMPTS FOLDER=RANKS=TOKENS …
"""

from __future__ import annotations

import json
import sys

from .models import engine, written


def main(prompts: str, *cases: str) -> None:
    texts = {}
    for case in cases:
        folder, ranks, tokens = case.split("=")
        with engine(folder, int(ranks)) as llm:
            texts[case] = written(llm, json.loads(prompts), int(tokens))
    print(json.dumps(texts), flush=True)


if __name__ == "__main__":  # its ranks import this file too
    main(*sys.argv[1:])
