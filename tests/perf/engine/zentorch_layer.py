"""zentorch's fused experts, layer by layer. Run by a Python that has zentorch, not ours: `moe_layer` starts it.

    PYTHON zentorch_layer.py HIDDEN WIDTH EXPERTS LAYERS DTYPE    # a line of JSON in, a line of JSON out

Asked {"experts": [[[id, ...] of each token] of each call], "seed": n} it answers the seconds of each call, in which the
layers take turns.
"""

import json
import os
import sys
import time

# By itself it repacks the caller's weights in place.
os.environ.setdefault("ZENDNNL_MATMUL_WEIGHT_CACHE", "0")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import zentorch  # noqa: F401

    hidden, width, num_experts, num_layers = map(int, sys.argv[1:5])
    dtype = getattr(torch, sys.argv[5])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    layers = [
        (
            torch.randn(num_experts, 2 * width, hidden).mul_(hidden**-0.5).to(dtype),
            torch.randn(num_experts, hidden, width).mul_(width**-0.5).to(dtype),
        )
        for _ in range(num_layers)
    ]

    def call(number, experts):
        w13, w2 = layers[number % num_layers]
        ids = torch.tensor(experts, dtype=torch.int32)
        x = torch.randn(len(ids), hidden).to(dtype)
        weights = torch.full(ids.shape, 1 / ids.shape[1])
        out = torch.empty_like(x)
        begin = time.perf_counter()
        torch.ops.zentorch.zentorch_fused_moe(out, x, w13, w2, None, None, weights, ids, False, "silu")
        return time.perf_counter() - begin

    # One expert alone it refuses.
    call(0, [[0, 1]])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        found = [call(number, experts) for number, experts in enumerate(json.loads(line)["experts"])]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
