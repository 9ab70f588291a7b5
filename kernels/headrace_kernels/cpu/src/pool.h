// The threads that kernels share, and the memory they work in.
//
// A kernel is a few stages; a stage is a number of tasks, which the caller and the pool's threads take one by one. A
// stage ends when its tasks are done, not when every thread has passed: a thread that the machine does not run now is
// not waited for, unless it holds a task. Who waits spins for a moment, then sleeps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

namespace headrace {

// A kernel's turn: calls of several threads take turns, each as a whole, so that what a call has worked out from
// num_threads() holds until it ends, however many threads the next one wants.
class Turn {
   public:
    // Wait for the turn, and let it run on so many threads, the caller among them; on fewer if there are no more to get.
    explicit Turn(int num_threads);
    // Count the call (headrace_counters).
    ~Turn();

   private:
    std::lock_guard<std::mutex> lock_;
    int64_t began_ns_;
};

// Threads that take tasks in this turn, the caller among them.
int num_threads();

// Run `body(context, task, thread)` for every task of 0 ... `num_tasks`, in any order; thread is below num_threads().
// A body throws nothing.
void run(int64_t num_tasks, void (*body)(void *context, int64_t task, int thread), void *context);

template <class Body>
void stage(int64_t num_tasks, Body &&body) {
    run(num_tasks, [](void *context, int64_t task, int thread) { (*static_cast<Body *>(context))(task, thread); }, &body);
}

// Memory of one kernel call, aligned to 64 bytes: `place` 0 ... 7 tells apart what one call uses at once. It stays
// allocated for the next call, and belongs to the calling thread.
void *scratch(int place, size_t bytes);

template <class T>
T *scratch_of(int place, size_t count) {
    return static_cast<T *>(scratch(place, count * sizeof(T)));
}

// What an entry does: `call`, in a turn of its own. It returns 0, or 1 if there is no memory for its scratch. Nothing is
// thrown across the C interface.
template <class Call>
int in_turn(int num_threads, Call &&call) {
    try {
        Turn turn(num_threads);
        call();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace headrace
