"""vLLM's engine, step by step. Run by vLLM's own Python, not ours: `vllm_cpu` starts it and asks on standard input.

    PYTHON vllm_steps.py CHECKPOINT MOST_SEQUENCES MOST_TOKENS    # a line of JSON in, a line of JSON out

Asked {"prompts": [[token, ...], ...], "steps": n} it answers {"prefill_s": [...], "decode_s": [...]}: seconds of each
step of its engine until every prompt has its first token, then of n steps in which every sequence gets one more.
"""

import json
import os
import sys
import time

# One process, so that a step is a call; no look at its makers' servers.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    from vllm import LLM, SamplingParams

    checkpoint, most_sequences, most_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine = LLM(
        checkpoint,
        dtype=sys.argv[4],
        max_model_len=most_tokens,
        max_num_seqs=most_sequences,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    ).llm_engine
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=most_tokens)
    _say(answers, {"ready": True})
    number = 0
    for line in sys.stdin:
        asked = json.loads(line)
        names = []
        for prompt in asked["prompts"]:
            number += 1
            names.append(str(number))
            engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        prefill_s, without_token = [], set(names)
        while without_token:
            outputs, took_s = _step(engine)
            prefill_s.append(took_s)
            without_token -= {each.request_id for each in outputs}
        decode_s = [_step(engine)[1] for _ in range(asked["steps"])]
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        _say(answers, {"prefill_s": prefill_s, "decode_s": decode_s})


def _step(engine):
    begin = time.perf_counter()
    outputs = engine.step()
    return outputs, time.perf_counter() - begin


def _say(answers, what) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
