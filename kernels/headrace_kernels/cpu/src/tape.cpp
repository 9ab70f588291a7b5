// Recorded calls of kernels, made again one after another: nothing of Python lies between them (cpu/tape.py).
#include <ctime>

#include <cstdint>

#include "pool.h"

namespace {

struct Call {
    int (*entry)(const void *arguments, int dtype, int num_threads);
    const void *arguments;
    int64_t dtype;
};

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

}  // namespace

// Make `num_calls` calls; `ends_ns` [num_calls] gets when each was done, by CLOCK_MONOTONIC, unless it is NULL.
// 0: done; 1: no memory, and the calls behind the one that lacked it were not made.
extern "C" __attribute__((visibility("default"))) int headrace_replay(const Call *calls, int64_t num_calls,
                                                                      int num_threads, int64_t *ends_ns) {
    for (int64_t i = 0; i < num_calls; i++) {
        if (calls[i].entry(calls[i].arguments, (int)calls[i].dtype, num_threads)) return 1;
        if (ends_ns != nullptr) ends_ns[i] = now_ns();
    }
    return 0;
}
