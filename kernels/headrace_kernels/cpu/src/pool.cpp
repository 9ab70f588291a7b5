#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() __asm__ volatile("yield")
#endif

namespace headrace {
namespace {

// About 30 us: the time between two kernels of a step. Longer would take cores from whoever could use them.
constexpr int SPINS = 1500;

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of all calls since the process began: how many, how many stages, the callers' time in them once they had their turn,
// and all threads' time in tasks. A thread reads the clock once a task and once a stage.
struct {
    std::atomic<int64_t> calls{0}, stages{0}, call_ns{0}, busy_ns{0};
} counters;

class Pool {
   public:
    explicit Pool(int num_threads) {
        threads_.reserve(num_threads - 1);
        try {
            for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error &) {
            // The system gives no more threads: those that are there do the work.
        }
    }

    ~Pool() {
        is_ended_.store(true);
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto &thread : threads_) thread.join();
    }

    int num_threads() const { return 1 + (int)threads_.size(); }

    void run(int64_t num_tasks, void (*body)(void *, int64_t, int), void *context) {
        body_ = body;
        context_ = context;
        num_tasks_ = num_tasks;
        done_.store(0, std::memory_order_relaxed);
        // Whoever takes a task has read this, so it sees what stands above.
        left_.store(num_tasks, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        take_tasks(0);
        wait_until_done((uint32_t)num_tasks);
    }

   private:
    void work(int thread) {
        uint32_t seen = 0;
        while (true) {
            uint32_t epoch;
            int spins = 0;
            while ((epoch = epoch_.load(std::memory_order_acquire)) == seen) {
                if (++spins < SPINS) PAUSE();
                else epoch_.wait(seen, std::memory_order_acquire);
            }
            seen = epoch;
            if (is_ended_.load()) return;
            take_tasks(thread);
        }
    }

    void take_tasks(int thread) {
        int64_t left = left_.load(std::memory_order_acquire);
        if (left <= 0) return;
        int64_t began_ns = now_ns();
        while (left > 0) {
            // A task taken is a task of the stage that runs now, which can't end before it: what it reads holds.
            if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
            body_(context_, num_tasks_ - left, thread);
            // Before the task counts as done: who reads the counters after the stage sees all of it.
            int64_t ended_ns = now_ns();
            counters.busy_ns.fetch_add(ended_ns - began_ns, std::memory_order_relaxed);
            began_ns = ended_ns;
            done_.fetch_add(1);
            if (is_waited_for_.load()) done_.notify_one();
            left = left_.load(std::memory_order_acquire);
        }
    }

    void wait_until_done(uint32_t num_tasks) {
        int spins = 0;
        uint32_t done;
        while ((done = done_.load(std::memory_order_acquire)) != num_tasks) {
            if (++spins < SPINS) {
                PAUSE();
                continue;
            }
            is_waited_for_.store(true);
            done_.wait(done);
            is_waited_for_.store(false);
        }
    }

    void (*body_)(void *, int64_t, int) = nullptr;
    void *context_ = nullptr;
    int64_t num_tasks_ = 0;
    alignas(64) std::atomic<int64_t> left_{0};
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<bool> is_waited_for_{false};
    std::atomic<bool> is_ended_{false};
    std::vector<std::thread> threads_;
};

std::mutex turn;
// Never freed when the process ends: its threads sleep until then.
Pool *pool = nullptr;
int num_wanted = 1;

// A fork's child has no threads but the one that forked: it makes its own. Nothing runs while a process forks.
void before_fork() { turn.lock(); }
void after_fork_in_parent() { turn.unlock(); }
void after_fork_in_child() {
    pool = nullptr;
    num_wanted = 1;
    new (&turn) std::mutex;
}
[[maybe_unused]] const int forks = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);

#if defined(__x86_64__)
// What the processor has and the system saves; asked here, because not every compiler's runtime knows.
bool has_avx(bool is_512) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, F16C = 1u << 29;
    if ((c & (FMA | OSXSAVE | F16C)) != (FMA | OSXSAVE | F16C)) return false;
    unsigned saved, high, registers = is_512 ? 0xe6 : 0x6;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & registers) != registers) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned AVX2 = 1u << 5, F = 1u << 16, DQ = 1u << 17, BW = 1u << 30, VL = 1u << 31;
    unsigned wanted = is_512 ? AVX2 | F | DQ | BW | VL : AVX2;
    return (b & wanted) == wanted;
}
#endif

struct Block {
    void *memory = nullptr;
    size_t bytes = 0;
    ~Block() { free(memory); }
};

}  // namespace

Turn::Turn(int num_threads) : lock_(turn), began_ns_(now_ns()) {
    if (num_threads == num_wanted) return;
    delete pool;
    pool = nullptr;
    num_wanted = 1;
    if (num_threads > 1) pool = new Pool(num_threads);
    num_wanted = num_threads;
}

Turn::~Turn() {
    counters.calls.fetch_add(1, std::memory_order_relaxed);
    counters.call_ns.fetch_add(now_ns() - began_ns_, std::memory_order_relaxed);
}

int num_threads() { return pool == nullptr ? 1 : pool->num_threads(); }

void run(int64_t num_tasks, void (*body)(void *, int64_t, int), void *context) {
    counters.stages.fetch_add(1, std::memory_order_relaxed);
    if (pool != nullptr && pool->num_threads() > 1 && num_tasks > 1) return pool->run(num_tasks, body, context);
    int64_t began_ns = now_ns();
    for (int64_t task = 0; task < num_tasks; task++) body(context, task, 0);
    counters.busy_ns.fetch_add(now_ns() - began_ns, std::memory_order_relaxed);
}

void *scratch(int place, size_t bytes) {
    static thread_local Block blocks[8];
    Block &block = blocks[place];
    if (block.bytes < bytes) {
        free(block.memory);
        block.bytes = (bytes + 4095) / 4096 * 4096;
        block.memory = aligned_alloc(64, block.bytes);
        if (block.memory == nullptr) {
            block.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return block.memory;
}

}  // namespace headrace

// A checksum of the sources that this was built from (build.py).
extern "C" __attribute__((visibility("default"))) const char *headrace_sources() { return HEADRACE_SOURCES; }

// The best instruction set of this machine that the library was built for; "" if there is none.
extern "C" __attribute__((visibility("default"))) const char *headrace_isa() {
#if defined(__x86_64__)
    return headrace::has_avx(true) ? "avx512" : headrace::has_avx(false) ? "avx2" : "";
#elif defined(__aarch64__)
    return "neon";
#else
    return "";
#endif
}

// calls, stages, call_ns, busy_ns: see `counters`. What runs meanwhile may be counted in part.
extern "C" __attribute__((visibility("default"))) void headrace_counters(int64_t *four) {
    four[0] = headrace::counters.calls.load(std::memory_order_relaxed);
    four[1] = headrace::counters.stages.load(std::memory_order_relaxed);
    four[2] = headrace::counters.call_ns.load(std::memory_order_relaxed);
    four[3] = headrace::counters.busy_ns.load(std::memory_order_relaxed);
}
