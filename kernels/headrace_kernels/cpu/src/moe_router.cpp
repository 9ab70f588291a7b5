// Before the experts: norm, router's logits, each token's choice and its weights.
#include "pool.h"
#include "products.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

struct MoeRouter {
    const void *x;
    int64_t x_stride, num_tokens, N;
    const void *norm_weight;
    float eps;
    const float *weight, *bias;
    int64_t E, K, num_shared, is_sigmoid, num_groups, num_groups_kept, is_top2, is_normalised;
    float scaling_factor;
    const int64_t *slots;
    void *normalised;
    int64_t *experts;
    float *weights;
};

// With an exponential of our own: the C library's bits are its version's.
void score(const MoeRouter &call, float *scores) {
    float greatest = -INFINITY, total = 0.f;
    for (int64_t e = 0; e < call.E; e++) greatest = scores[e] > greatest ? scores[e] : greatest;
    for (int64_t e = 0; e < call.E; e += LANES) {
        int some = (int)(call.E - e < LANES ? call.E - e : LANES);
        Lanes at = load_some(scores + e, some);
        if (call.is_sigmoid) {
            Lanes powers = exponential(at * -1.f);
            UNROLL for (int i = 0; i < PARTS; i++) at.part[i] = 1.f / (1.f + powers.part[i]);
        } else {
            at = exponential(at + all(-greatest));
        }
        store_some(scores + e, at, some);
    }
    if (call.is_sigmoid) return;
    for (int64_t e = 0; e < call.E; e++) total += scores[e];
    for (int64_t e = 0; e < call.E; e++) scores[e] /= total;
}

// Leave in `choice` [E] only the experts of the best groups; `is_kept` [num_groups] is for the while.
void keep_best_groups(const MoeRouter &call, float *choice, float *group_scores) {
    int64_t size = call.E / call.num_groups;
    for (int64_t g = 0; g < call.num_groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            if (choice[e] > best) second = best, best = choice[e];
            else if (choice[e] > second) second = choice[e];
        }
        group_scores[g] = call.is_top2 ? best + second : best;
    }
    for (int64_t dropped = call.num_groups_kept; dropped < call.num_groups; dropped++) {
        // The worst that is left, and of equals the last.
        int64_t worst = -1;
        for (int64_t g = 0; g < call.num_groups; g++)
            if (group_scores[g] != INFINITY && (worst < 0 || group_scores[g] <= group_scores[worst])) worst = g;
        if (worst < 0) return;
        group_scores[worst] = INFINITY;
        for (int64_t e = worst * size; e < (worst + 1) * size; e++) choice[e] = -INFINITY;
    }
}

template <class T>
void route(const MoeRouter &call, int64_t token, float *memory) {
    float *wide = memory, *scores = wide + call.N, *choice = scores + call.E, *groups = choice + call.E;
    const T *x = (const T *)call.x + token * call.x_stride;
    T *normalised = (T *)call.normalised + token * call.N;
    widen(x, call.N, call.N, norm_scale(x, call.N, call.eps), (const T *)call.norm_weight, wide);
    narrow(wide, call.N, normalised);
    // What the experts get is what the router sees: rounded.
    widen(normalised, call.N, call.N, 1.f, (const T *)nullptr, wide);
    int64_t e = 0;
    for (; e + 6 <= call.E; e += 6) scores_of<6>(call.weight + e * call.N, call.N, wide, call.N, scores + e, 1);
    for (; e < call.E; e++) scores_of<1>(call.weight + e * call.N, call.N, wide, call.N, scores + e, 1);
    float spoilt = 0.f;
    for (e = 0; e < call.E; e++) spoilt += (scores[e] + (call.bias == nullptr ? 0.f : call.bias[e])) * 0.f;
    score(call, scores);
    for (e = 0; e < call.E; e++) choice[e] = scores[e] + (call.bias == nullptr ? 0.f : call.bias[e]);
    if (call.num_groups_kept < call.num_groups) keep_best_groups(call, choice, groups);
    int64_t width = call.K + call.num_shared, *experts = call.experts + token * width;
    float *weights = call.weights + token * width, total = 0.f;
    bool is_padding = call.slots != nullptr && call.slots[token] < 0;
    for (int64_t k = 0; k < call.K; k++) {
        int64_t best = 0;
        for (e = 1; e < call.E; e++)
            if (choice[e] > choice[best]) best = e;
        experts[k] = best;
        weights[k] = scores[best];
        total += scores[best];
        choice[best] = -INFINITY;
    }
    float factor = call.is_normalised ? call.scaling_factor / (total + 1e-20f) : call.scaling_factor;
    for (int64_t k = 0; k < call.K; k++) weights[k] = weights[k] * factor + spoilt;
    for (int64_t s = 0; s < call.num_shared; s++) experts[call.K + s] = call.E + s, weights[call.K + s] = 1.f;
    if (is_padding)
        for (int64_t k = 0; k < width; k++) experts[k] = -1, weights[k] = 0.f;
}

template <class T>
void moe_router(const MoeRouter &call) {
    int64_t own = call.N + 2 * call.E + call.num_groups + LANES;
    float *memory = headrace::scratch_of<float>(0, own * headrace::num_threads());
    headrace::stage(call.num_tokens, [&](int64_t token, int thread) { route<T>(call, token, memory + thread * own); });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/moe_router.py. 0: done; 1: no memory.
EXPORT int ENTRY(moe_router)(const MoeRouter *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? moe_router<bf16>(*call) : moe_router<float>(*call); });
}
