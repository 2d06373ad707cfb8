"""Run as a program: a job on standard input, one prompt through vllm.LLM, one JSON line at the end."""

import json
import sys
import time

import redis
from vllm import LLM, SamplingParams

from cacheengine import transfer_config


def main() -> None:
    job = json.load(sys.stdin)
    llm = LLM(
        model=job["model"],
        dtype="float32",
        max_model_len=2048,
        seed=0,
        kv_transfer_config=transfer_config(**job["knobs"]),
    )
    (output,) = llm.generate([job["prompt"]], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    count = len(output.prompt_token_ids or ())
    if job.get("wait_chunks"):
        with redis.Redis.from_url(job["redis_url"]) as client:
            until = time.monotonic() + 60
            while len(client.keys("*_bytes")) < count // 128 and time.monotonic() < until:
                time.sleep(0.2)
        time.sleep(1.0)  # the disk is written beside Redis
    print(
        json.dumps(
            {
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
                "prompt": count,
            }
        )
    )


if __name__ == "__main__":
    main()
