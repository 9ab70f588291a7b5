// Tokens drawn from logits: a row is one task. Nothing is sorted but what lies in one bucket of a row's probabilities.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>

#include "pool.h"
#include "simd.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t NO_TOKEN = -1, BUCKETS = 4096, STRIP = 64;
// Below this, an exponential is 0 here.
constexpr double LEAST = -708.;

struct Sampling {
    const float *logits;
    int64_t stride, num_rows, V;
    const double *temperatures, *top_p, *min_p;
    const int64_t *top_k;
    const double *uniforms;
    int64_t *tokens;
};

struct Memory {
    // `scaled` [V] are logits less the best one, by the temperature; `mass` [V] their exponentials, 0 where a filter
    // leaves the token out.
    double *scaled, *mass, *some, *buckets;
};

constexpr int SOME = WIDTH / 2;
typedef float Floats __attribute__((vector_size(SOME * sizeof(float))));
typedef double Doubles __attribute__((vector_size(SOME * sizeof(double))));
typedef uint64_t Bits __attribute__((vector_size(SOME * sizeof(double))));

// Return e to numbers that are not positive. In double precision and of our own: the C library's bits are its version's.
INLINE Doubles power(Doubles x) {
    constexpr double LOG2_E = 0x1.71547652b82fep0, LN2_HIGH = 0x1.62e42fefa39efp-1, LN2_LOW = 0x1.abc9e3b39803fp-56;
    constexpr double SHIFT = 0x1.8p52;
    constexpr double TERMS[] = {1. / 479001600., 1. / 39916800., 1. / 3628800., 1. / 362880., 1. / 40320., 1. / 5040.,
                                1. / 720.,       1. / 120.,      1. / 24.,      1. / 6.,      1. / 2.,     1.,
                                1.};
    Doubles zero = {}, at = x > LEAST ? x : zero + LEAST, shifted = at * LOG2_E + SHIFT, n = shifted - SHIFT;
    Doubles r = (at - n * LN2_HIGH) - n * LN2_LOW, sum = zero + 1. / 6227020800.;
    UNROLL for (int i = 0; i < 13; i++) sum = sum * r + TERMS[i];
    Doubles value = sum * (Doubles)(((Bits)shifted + 1023) << 52);
    return x > LEAST ? value : zero;
}

// Fill `scaled` and `mass` for a row of logits.
void fill(const Memory &at, const float *logits, int64_t V, double greatest, double temperature) {
    auto some = [&](int64_t i, size_t count) {
        Floats values = {};
        memcpy(&values, logits + i, count * sizeof(float));
        Doubles x = (__builtin_convertvector(values, Doubles) - greatest) / temperature;
        Doubles mass = power(x);
        memcpy(at.scaled + i, &x, count * sizeof(double));
        memcpy(at.mass + i, &mass, count * sizeof(double));
    };
    int64_t i = 0;
    for (; i + SOME <= V; i += SOME) some(i, SOME);
    if (i < V) some(i, V - i);
}

// Return the first of the greatest logits; NO_TOKEN if one is NaN or +inf, or all are -inf.
int64_t best_of(const float *logits, int64_t V) {
    float most[STRIP], greatest = -INFINITY;
    int num_bad[STRIP] = {}, is_bad = 0;
    std::fill(most, most + STRIP, -INFINITY);
    int64_t i = 0, best = 0;
    for (; i + STRIP <= V; i += STRIP) {
        for (int j = 0; j < STRIP; j++) {
            num_bad[j] |= !(logits[i + j] <= FLT_MAX);
            most[j] = logits[i + j] > most[j] ? logits[i + j] : most[j];
        }
    }
    for (; i < V; i++) is_bad |= !(logits[i] <= FLT_MAX), greatest = std::max(greatest, logits[i]);
    for (int j = 0; j < STRIP; j++) is_bad |= num_bad[j], greatest = std::max(greatest, most[j]);
    if (is_bad || greatest == -INFINITY) return NO_TOKEN;
    while (logits[best] != greatest) best++;
    return best;
}

// Return the sum of a strip of at most STRIP numbers, in the same order whatever the compiler makes of it.
inline double strip_sum(const double *values, int64_t count) {
    double parts[8] = {};
    if (count == STRIP) {
        for (int i = 0; i < STRIP; i += 8)
            for (int j = 0; j < 8; j++) parts[j] += values[i + j];
    } else {
        for (int64_t i = 0; i < count; i++) parts[i % 8] += values[i];
    }
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

double total_of(const double *mass, int64_t V) {
    double total = 0.;
    for (int64_t i = 0; i < V; i += STRIP) total += strip_sum(mass + i, std::min(V - i, STRIP));
    return total;
}

void leave_out(const Memory &at, int64_t V, double floor) {
    for (int64_t i = 0; i < V; i++) at.mass[i] = at.scaled[i] < floor ? 0. : at.mass[i];
}

// Return the k-th greatest of `scaled`.
double top_k_floor(const Memory &at, int64_t V, int64_t k) {
    std::copy(at.scaled, at.scaled + V, at.some);
    std::nth_element(at.some, at.some + k - 1, at.some + V, std::greater<double>());
    return at.some[k - 1];
}

// Return the greatest of `scaled` down to which, from the best on, tokens have `top_p` of all mass.
double top_p_floor(const Memory &at, int64_t V, double top_p) {
    double wanted = top_p * total_of(at.mass, V), least = 0., reached = 0.;
    for (int64_t i = 0; i < V; i++) least = at.mass[i] > 0. && at.scaled[i] < least ? at.scaled[i] : least;
    double scale = least < 0. ? (BUCKETS - 1) / least : 0.;
    // What is below the least has no mass, whichever bucket it is put into.
    auto bucket = [&](int64_t i) { return (int64_t)(std::max(at.scaled[i], least) * scale); };
    std::fill(at.buckets, at.buckets + BUCKETS, 0.);
    for (int64_t i = 0; i < V; i++) at.buckets[bucket(i)] += at.mass[i];
    for (int64_t b = 0; b < BUCKETS; b++) {
        if (reached + at.buckets[b] < wanted) {
            reached += at.buckets[b];
            continue;
        }
        int64_t count = 0;
        for (int64_t i = 0; i < V; i++)
            if (bucket(i) == b && at.mass[i] > 0.) at.some[count++] = at.scaled[i];
        std::sort(at.some, at.some + count, std::greater<double>());
        for (int64_t i = 0; i < count; i++) {
            reached += power(Doubles{at.some[i]})[0];
            if (reached >= wanted) return at.some[i];
        }
    }
    return least;  // the last bits of a sum are missing
}

// Return the token at which the mass of those up to it passes `uniform` of all.
int64_t pick(const double *mass, int64_t V, double uniform, int64_t best) {
    double total = total_of(mass, V), passed = 0.;
    // Rounding may bring the number up to the total, where no token is left.
    double wanted = std::min(uniform * total, std::nextafter(total, 0.));
    for (int64_t i = 0; i < V; i += STRIP) {
        int64_t end = std::min(V, i + STRIP), last = best;
        double after = passed + strip_sum(mass + i, end - i);
        if (after > wanted) {
            for (int64_t token = i; token < end; token++) {
                if (mass[token] == 0.) continue;
                last = token;
                if ((passed += mass[token]) > wanted) break;
            }
            return last;
        }
        passed = after;
    }
    return best;
}

int64_t draw(const Sampling &call, int64_t row, const Memory &at) {
    const float *logits = call.logits + row * call.stride;
    int64_t V = call.V, best = best_of(logits, V);
    if (best == NO_TOKEN || call.temperatures[row] == 0.) return best;
    fill(at, logits, V, logits[best], call.temperatures[row]);
    if (call.top_k[row] > 0 && call.top_k[row] < V) leave_out(at, V, top_k_floor(at, V, call.top_k[row]));
    if (call.top_p[row] < 1.) leave_out(at, V, top_p_floor(at, V, call.top_p[row]));
    if (call.min_p[row] > 0.) leave_out(at, V, std::log(call.min_p[row]));
    return pick(at.mass, V, call.uniforms[row], best);
}

void sampling(const Sampling &call) {
    int64_t own = 3 * call.V + BUCKETS;
    double *memory = headrace::scratch_of<double>(0, own * headrace::num_threads());
    headrace::stage(call.num_rows, [&](int64_t row, int thread) {
        double *mine = memory + thread * own;
        call.tokens[row] = draw(call, row, {mine, mine + call.V, mine + 2 * call.V, mine + 3 * call.V});
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/sampling.py. 0: done; 1: no memory.
EXPORT int ENTRY(sampling)(const Sampling *call, int, int num_threads) {
    return headrace::in_turn(num_threads, [&] { sampling(*call); });
}
